"""Resolves the devices of an allocator, as callers, the driver and torch name them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from cumempool._pool.checks import check_int
from cumempool.errors import InvalidArgumentError, InvalidTypeError

if TYPE_CHECKING:
    import torch

    from cumempool import _core

#: Granularity of the devices simulated by the host driver: that of an H200.
HOST_GRANULARITY: Final = 2 * 1024**2


class Devices:
    """The devices of one driver, ``"cuda"`` or ``"host"``."""

    def __init__(self, driver: _core.Driver, name: str) -> None:
        self._driver = driver
        self._name = name
        self.type: Final = "cpu" if name == "host" else "cuda"  # torch's device type

    @property
    def count(self) -> int:
        return self._driver.device_count

    def check(self, device: object) -> int:
        """Returns the argument, which must be an ordinal of the driver."""
        ordinal, count = check_int(device, "a device is an ordinal"), self.count
        if not 0 <= ordinal < count:
            raise InvalidArgumentError(
                f"there is no device {ordinal}: the {self._name} driver has {count}"
            )
        return ordinal

    def check_ordinals(self, devices: object, what: str) -> list[int]:
        """Returns the distinct ordinals of a sequence; messages call it `what`."""
        if isinstance(devices, str) or not isinstance(devices, Iterable):
            raise InvalidTypeError(f"{what} are ordinals in a sequence, not {devices!r}")
        return list(dict.fromkeys(self.check(device) for device in devices))

    def check_routed(self, devices: object) -> list[int]:
        """Returns the devices of a scope, at least one."""
        checked = self.check_ordinals(devices, "devices")
        if not checked:
            raise InvalidArgumentError("devices is empty: name one, or pass None for those used")
        return checked

    def resolve(self, device: torch.device | str | int | None) -> tuple[int, torch.device]:
        """Returns the driver's ordinal and torch's device for a caller's device."""
        import torch

        kind = self.type
        if isinstance(device, int):
            ordinal = self.check(device)
        elif device is None:
            ordinal = 0 if kind == "cpu" else torch.cuda.current_device()
        else:
            try:
                named = torch.device(device)
            except (RuntimeError, TypeError) as error:
                raise InvalidArgumentError(f"device {device!r} does not exist: {error}") from None
            if named.type != kind:
                raise InvalidArgumentError(
                    f"the {self._name} driver has memory of {kind} devices, not {named}"
                )
            current = 0 if kind == "cpu" else torch.cuda.current_device()
            ordinal = self.check(current if named == torch.device(kind) else named.index)
        return ordinal, torch.device("cpu") if kind == "cpu" else torch.device(kind, ordinal)

    def name_for_others(self, device: int) -> str:
        """Returns the name of a device in every process: its UUID, or its ordinal on ``host``."""
        if self._name == "host":
            return str(device)
        import torch

        return str(torch.cuda.get_device_properties(device).uuid)
