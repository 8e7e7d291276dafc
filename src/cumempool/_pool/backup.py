"""Defines `Backup`: the tier for the contents of sleeping memory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from cumempool._pool.checks import check_int
from cumempool.errors import InvalidArgumentError, InvalidTypeError

Tier = Literal["pinned", "pageable", "file", "peer"]
#: The tiers; the position, counted from 1, is the number in ``cumempool_backup_tier``.
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)

_FORMS: Final = "'pinned', 'pageable', 'file:DIRECTORY' or 'peer:DEVICE'"
_MOST_DEVICE: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Backup:
    """A place for the contents of sleeping memory. Immutable; construction touches nothing.

    Functions that accept one also accept its text: ``"pinned"``, ``"pageable"``,
    ``"file:/directory"`` or ``"peer:1"``; ``str()`` returns that text.

    Attributes:
        tier: ``"pinned"``, ``"pageable"``, ``"file"`` or ``"peer"``.
        directory: The directory of a file; else None.
        device: The ordinal of a peer, the other device; else None.

    Raises:
        InvalidArgumentError: The tier does not exist, or lacks or does not accept a directory or
            device.
        InvalidTypeError: A value has the wrong type.
    """

    tier: Tier
    directory: str | None = None
    device: int | None = None

    def __post_init__(self) -> None:
        """Checks that the tier has its own fields, and no others."""
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
        """Pinned host memory: copied at the speed of the link. The default."""
        return cls("pinned")

    @classmethod
    def pageable(cls) -> Backup:
        """Host memory that the system may swap out; does not use up pinnable memory."""
        return cls("pageable")

    @classmethod
    def file(cls, directory: str | os.PathLike[str]) -> Backup:
        """An unnamed file that is deleted with the process; its contents are checked when read.

        Args:
            directory: The directory of the file. A relative path is resolved against the working
                directory when an allocator gets the backup.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise InvalidTypeError(f"a directory is a str or os.PathLike, not {directory!r}")
        return cls("file", directory=os.fsdecode(directory))

    @classmethod
    def peer(cls, device: int) -> Backup:
        """Memory of another device, reachable over NVLink or PCIe peer to peer.

        Args:
            device: The ordinal of that device.
        """
        return cls("peer", device=device)

    @classmethod
    def parse(cls, text: str) -> Backup:
        """Returns the backup for a text such as ``"file:/directory"``.

        Raises:
            InvalidArgumentError: The text names no backup; the message lists the forms.
            InvalidTypeError: `text` is no str.
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
        """Returns the text that `parse` accepts."""
        if self.tier == "file":
            return f"file:{self.directory}"
        return f"peer:{self.device}" if self.tier == "peer" else self.tier

    def _to_core(self) -> tuple[int, bytes, int]:
        """Returns number, directory and device, as the extension module takes them."""
        directory = os.fsencode(os.path.abspath(self.directory)) if self.directory else b""
        return TIERS.index(self.tier) + 1, directory, self.device or 0


def check_backup(value: object, what: str) -> Backup:
    """Returns a backup, given one or its text."""
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
            f"directory={directory!r} is invalid: it must not be empty or contain a zero byte"
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
