"""Finds out by trying whether and how cumempool works here; every no has a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from cumempool._pool.devices import HOST_GRANULARITY
from cumempool._pool.report import format_bytes
from cumempool._pool.stats import handle_type_names
from cumempool.config import CuMemConfig, DriverName
from cumempool.errors import CumempoolError, InvalidArgumentError, InvalidTypeError

if TYPE_CHECKING:
    from cumempool import _core

__all__ = ["Availability", "DeviceProbe", "TorchProbe", "is_available", "open_driver", "probe"]

#: Ways to wait for the work of a device.
FenceWay = Literal["", "host registration", "allocation", "context synchronisation", "none"]
#: By the core's number for each.
FENCE_WAYS: Final[tuple[FenceWay, ...]] = (
    "",
    "host registration",
    "allocation",
    "context synchronisation",
    "none",
)


@dataclass(frozen=True, slots=True)
class DeviceProbe:
    """One device: the attributes that it reports, and what could be created and exported.

    Attributes:
        ordinal: Device ordinal.
        name: Its name, from the driver.
        compute_capability: ``"9.0"``.
        usable: Whether a granule was created, mapped, written, read back and returned.
        reason: The cause if not `usable`, or ``""``.
        virtual_memory: Whether it reports support for virtual memory management.
        handle_types: Handle types that memory could be exported as: ``"posix_fd"``, ``"fabric"``.
        handle_types_claimed: Handle types that it reports.
        rdma: Whether memory for GPUDirect RDMA could be created.
        rdma_claimed: Whether it reports support for such memory.
        granularity: Bytes; every allocation is a multiple of it.
        free_bytes: Free device memory, in bytes.
        total_bytes: Device memory, in bytes.
        fence: The first way found to wait for the work of the device. ``"none"`` if none works: its
            memory cannot be put to sleep; ``""`` if none was tried.
        pins_host_memory: Whether host memory could be pinned. If not, as in confidential computing,
            backups go to pageable memory or to files.
    """

    ordinal: int
    name: str
    compute_capability: str
    usable: bool
    reason: str
    virtual_memory: bool
    handle_types: tuple[str, ...]
    handle_types_claimed: tuple[str, ...]
    rdma: bool
    rdma_claimed: bool
    granularity: int
    free_bytes: int
    total_bytes: int
    fence: FenceWay = ""
    pins_host_memory: bool = False

    def __str__(self) -> str:
        if not self.usable:
            return f"device {self.ordinal} cannot be used: {self.reason}"
        free, total = format_bytes(self.free_bytes), format_bytes(self.total_bytes)
        return f"device {self.ordinal}: {self.name}, {free} of {total} free"


@dataclass(frozen=True, slots=True)
class TorchProbe:
    """The installed torch.

    Attributes:
        version: Its version, or ``""`` if there is none.
        build: ``"cuda"``, ``"rocm"``, ``"cpu"`` or ``"none"``.
        routes: Whether its ``MemPool`` routes allocations to a slot, by trying; None = not tried,
            because torch has not started to use CUDA in this process and trying would start it.
        reason: Why it does not route, or was not tried; or ``""``.
    """

    version: str
    build: str
    routes: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class Availability:
    """The result of `probe`.

    Attributes:
        ok: Whether an allocator on this driver can be made and torch can use it.
        reason: The cause if not `ok`, or ``""``.
        hint: The remedy if not `ok`, or ``""``.
        driver: ``"cuda"`` or ``"host"``.
        driver_version: ``"13.0"``; ``""`` if no driver was found.
        devices: One entry per device.
        torch: The installed torch.
    """

    ok: bool
    reason: str
    hint: str
    driver: str
    driver_version: str = ""
    devices: tuple[DeviceProbe, ...] = ()
    torch: TorchProbe = field(default_factory=lambda: TorchProbe("", "none", None, "not examined"))

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            driver = f"{self.driver} {self.driver_version}".rstrip()
            first = f"cumempool can be used: driver {driver}, torch {self.torch.version}"
        else:
            first = f"cumempool cannot be used with driver {self.driver}: {self.reason}"
            first += f"; {self.hint}" if self.hint else ""
        return "\n".join([first, *(f"  {device}" for device in self.devices)])

    def to_dict(self) -> dict[str, object]:
        """Returns all fields, as types that ``json.dumps`` accepts."""
        return asdict(self)


def open_driver(config: CuMemConfig) -> _core.Driver:
    """Opens the driver of a configuration. Creates no context.

    If the allocator is off, opens an empty stand-in.

    Raises:
        UnavailableError: The driver library or a device is missing.
        InvalidArgumentError: The host driver does not accept the configured sizes.
    """
    from cumempool import _core

    devices, granules = config.host_driver_devices, config.host_driver_bytes // HOST_GRANULARITY
    if config.enable_cumem_allocator is False:
        devices, granules = 1, 1  # a device without allocations
    elif config.driver == "cuda":
        return _core.open_cuda()
    if not granules:
        raise InvalidArgumentError(
            f"host_driver_bytes={config.host_driver_bytes} is less than one granule of "
            f"{HOST_GRANULARITY} bytes"
        )
    return _core.open_host(
        devices=devices,
        bytes_per_device=granules * HOST_GRANULARITY,
        granularity=HOST_GRANULARITY,
        rdma=False,
        fabric=False,
    )


def is_available(driver: DriverName | None = None) -> bool:
    """Whether cumempool can be used here. Never raises; see `probe` for the reason."""
    return probe(driver=driver).ok


def probe(config: CuMemConfig | None = None, *, driver: DriverName | None = None) -> Availability:
    """Tries the driver, every device and torch.

    A context that it creates is gone afterwards. If torch has not started to use CUDA, its routing
    is not tried, because a context made by torch stays.

    Args:
        config: The configuration to try; its driver and sizes count. None means the default one.
        driver: Overrides the driver of the configuration.

    Returns:
        The result. Never raises.
    """
    name = str(driver or "cuda")
    try:
        if config is not None and not isinstance(config, CuMemConfig):
            raise InvalidTypeError(f"config is a CuMemConfig or None, not {config!r}")
        if driver is None:
            wanted = config or CuMemConfig()
        else:
            wanted = replace(config, driver=driver) if config else CuMemConfig(driver=driver)
        name = wanted.driver
        opened = open_driver(wanted)
    except ImportError as error:
        return Availability(
            False,
            f"the extension module of cumempool cannot be loaded: {error}",
            "install cumempool with pip, so that it is built for this interpreter",
            name,
            torch=_probe_torch(None),
        )
    except CumempoolError as error:
        reason = str(error).removesuffix(error.advice).rstrip(" .;")
        hint = error.advice or "correct the argument or the environment variable"
        return Availability(False, reason, hint, name, torch=_probe_torch(None))
    return _judge(name, opened)


def _judge(name: str, driver: _core.Driver) -> Availability:
    devices = tuple(_probe_device(driver, ordinal) for ordinal in range(driver.device_count))
    usable = [device for device in devices if device.usable]
    torch = _probe_torch(driver if usable else None)
    reason = hint = ""
    if not devices:
        reason = "the driver has no device"
        hint = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    elif not usable:
        reason = f"no device is usable; device 0: {devices[0].reason}"
        hint = "free device memory, or use a GPU and driver with virtual memory management"
    elif torch.build == "none":
        reason = f"torch cannot be used: {torch.reason}"
        hint = "install torch"
    elif name == "cuda" and torch.build != "cuda":
        reason = f"this torch ({torch.version}) is built for {torch.build}, not for CUDA"
        hint = "install a CUDA build of torch"
    elif name == "cuda" and torch.routes is False:
        reason = f"torch does not send allocations to the pool: {torch.reason}"
        hint = "use torch 2.6 or newer with its native allocator backend"
    version = f"{driver.version // 1000}.{driver.version % 1000 // 10}" if driver.version else ""
    return Availability(not reason, reason, hint, name, version, devices, torch)


def _probe_device(driver: _core.Driver, ordinal: int) -> DeviceProbe:
    try:
        found: dict[str, Any] = driver.probe(ordinal)
    except CumempoolError as error:
        return DeviceProbe(ordinal, "", "", False, str(error), False, (), (), False, False, 0, 0, 0)
    capability = found.pop("compute_capability")
    fence: FenceWay = FENCE_WAYS[found.pop("fence")]
    return DeviceProbe(
        ordinal=ordinal,
        compute_capability=f"{capability // 10}.{capability % 10}",
        fence=fence,
        handle_types=handle_type_names(found.pop("handle_types")),
        handle_types_claimed=handle_type_names(found.pop("handle_types_claimed")),
        **found,
    )


def _probe_torch(driver: _core.Driver | None) -> TorchProbe:
    """Examines torch, and tries its routing if CUDA is already in use."""
    import importlib.metadata  # here, because importing it takes as long as this package

    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return TorchProbe("", "none", None, "torch is not installed")
    try:
        from cumempool import _torch
    except (ImportError, OSError) as error:
        return TorchProbe(version, "none", None, f"torch cannot be imported: {error}")
    build = _torch.build_kind()
    if build != "cuda":
        return TorchProbe(version, build, None, f"a {build} build of torch has no CUDA pools")
    if driver is None or not _torch.is_initialized():
        return TorchProbe(version, build, None, "CUDA is not in use in this process yet")
    return _try(lambda: _route_once(driver), version, build)


def _try(route: Callable[[], bool], version: str, build: str) -> TorchProbe:
    try:
        routed = route()
    except Exception as error:  # noqa: BLE001 -- any failure of any torch version is the answer
        return TorchProbe(version, build, False, f"{type(error).__name__}: {error}")
    reason = "" if routed else "a tensor made inside the pool was allocated elsewhere"
    return TorchProbe(version, build, routed, reason)


def _route_once(driver: _core.Driver) -> bool:
    """Allocates one tensor through a slot and checks that it came from there."""
    import torch

    from cumempool import _core, _torch

    allocator = _core.Allocator(driver, 0, False, None)
    try:
        allocator.declare_tag("probe", 0, 0)
        slot = allocator.bind_slot("probe")
        route = _torch.PoolRoute(slot, [torch.cuda.current_device()])
        try:
            route.begin()
            try:
                tensor = torch.empty(1, device="cuda")
                routed = bool(allocator.snapshot(False)["totals"]["malloc_calls"])
                del tensor
            finally:
                route.end()
        finally:
            _core.unbind_slot(slot)
    finally:
        _torch.empty_cache()
        allocator.close(True)
    return routed
