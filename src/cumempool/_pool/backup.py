"""`Backup`: where the contents of sleeping memory are kept."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from cumempool._pool.checks import check_int
from cumempool.errors import InvalidArgumentError, InvalidTypeError

Tier = Literal["pinned", "pageable", "file", "peer"]
#: The kinds of places; the position, counted from 1, is the number in ``cumempool_backup_tier``.
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)

_FORMS: Final = "'pinned', 'pageable', 'file:DIRECTORY' or 'peer:DEVICE'"
_MOST_DEVICE: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Backup:
    """A place for the contents of sleeping memory. Immutable; construction touches nothing.

    Whatever takes one also takes its text: ``"pinned"``, ``"pageable"``, ``"file:/directory"`` or
    ``"peer:1"``; ``str()`` gives that text.

    Attributes:
        tier: ``"pinned"``, ``"pageable"``, ``"file"`` or ``"peer"``.
        directory: Of a file: where it is made; else None.
        device: Of a peer: the ordinal of the other device; else None.

    Raises:
        InvalidArgumentError: A tier that does not exist, or a directory or device that it lacks or
            does not take.
        InvalidTypeError: A value of the wrong type.
    """

    tier: Tier
    directory: str | None = None
    device: int | None = None

    def __post_init__(self) -> None:
        """Checks that the tier has what belongs to it, and nothing else."""
        if not isinstance(self.tier, str):
            raise InvalidTypeError(f"tier={self.tier!r} is not a str; give one of {TIERS}")
        if self.tier not in TIERS:
            raise InvalidArgumentError(f"tier={self.tier!r} is not one of {', '.join(TIERS)}")
        if self.tier == "file":
            _check_directory(self.directory)
        elif self.directory is not None:
            raise InvalidArgumentError(f"a {self.tier} backup takes no directory")
        if self.tier == "peer":
            _check_device(self.device)
        elif self.device is not None:
            raise InvalidArgumentError(f"a {self.tier} backup takes no device")

    @classmethod
    def pinned(cls) -> Backup:
        """Pinned host memory: copied at the speed of the link. What holds where nothing is set."""
        return cls("pinned")

    @classmethod
    def pageable(cls) -> Backup:
        """Host memory that the system may swap out; takes none of what can be pinned."""
        return cls("pageable")

    @classmethod
    def file(cls, directory: str | os.PathLike[str]) -> Backup:
        """A file that has no name and goes with the process; checked when it is read back.

        Args:
            directory: Where it is made. A relative one counts from the working directory at the
                moment when an allocator is given the backup.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise InvalidTypeError(f"a directory is a str or os.PathLike, not {directory!r}")
        return cls("file", directory=os.fsdecode(directory))

    @classmethod
    def peer(cls, device: int) -> Backup:
        """Memory of another device, which must be able to reach it (NVLink, or PCIe peer to peer).

        Args:
            device: The ordinal of that device.
        """
        return cls("peer", device=device)

    @classmethod
    def parse(cls, text: str) -> Backup:
        """The backup that a text names, such as ``"file:/directory"``.

        Raises:
            InvalidArgumentError: The text names none; the message lists the forms there are.
            InvalidTypeError: It is no text.
        """
        if not isinstance(text, str):
            raise InvalidTypeError(f"a backup is {_FORMS}, not {text!r}")
        tier, _, rest = text.partition(":")
        if text == "pinned":
            return cls.pinned()
        if text == "pageable":
            return cls.pageable()
        if tier == "file" and rest:
            return cls("file", directory=rest)
        if tier == "peer" and re.fullmatch(r"[0-9]{1,10}", rest, re.ASCII):
            return cls("peer", device=int(rest))
        raise InvalidArgumentError(f"{text!r} is not a backup: give {_FORMS}")

    def __str__(self) -> str:
        """The text that `parse` takes."""
        if self.tier == "file":
            return f"file:{self.directory}"
        return f"peer:{self.device}" if self.tier == "peer" else self.tier

    def _to_core(self) -> tuple[int, bytes, int]:
        """Number, directory and device, as the extension module takes them."""
        directory = os.fsencode(os.path.abspath(self.directory)) if self.directory else b""
        return TIERS.index(self.tier) + 1, directory, self.device or 0


def check_backup(value: object, what: str) -> Backup:
    """A backup from one, or from its text."""
    if isinstance(value, Backup):
        return value
    if not isinstance(value, str):
        raise InvalidTypeError(f"{what} is a Backup, or {_FORMS}, not {value!r}")
    try:
        return Backup.parse(value)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{what}: {error}") from None


def _check_directory(directory: object) -> None:
    if directory is None:
        raise InvalidArgumentError("a file backup needs a directory: 'file:DIRECTORY'")
    if not isinstance(directory, str):
        raise InvalidTypeError(f"directory={directory!r} is not a str")
    if not directory or "\0" in directory:
        raise InvalidArgumentError(
            f"directory={directory!r} is not one: it must not be empty or contain a zero byte"
        )
    try:
        os.fsencode(directory)
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"directory={directory!r} cannot be encoded: {error}") from None


def _check_device(device: object) -> None:
    if device is None:
        raise InvalidArgumentError("a peer backup needs a device: 'peer:DEVICE'")
    if not 0 <= check_int(device, "device is an ordinal") <= _MOST_DEVICE:
        raise InvalidArgumentError(
            f"device={device} is out of range: it must be 0 to {_MOST_DEVICE}"
        )
