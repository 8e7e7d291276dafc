"""Describes shared memory: its ranges, its owner, and how to ask for it."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cumempool.errors import InvalidTypeError

if TYPE_CHECKING:
    import torch

#: The version of the format of `SharedMemory`.
VERSION: Final = 3


@dataclass(frozen=True, slots=True)
class SharedRange:
    """One allocation of the owner.

    Attributes:
        address: Its start in the owner's address space.
        bytes: Its size.
        generation: Its generation when it was shared.
        sequence: A number that tells it from later allocations at the same address.
        device: A name of its device that every process knows: a UUID, or the ordinal on ``host``.
        fabric: Its FABRIC handle, 64 bytes, if it was shared with one; else empty.
    """

    address: int
    bytes: int
    generation: int
    sequence: int
    device: str
    fabric: builtins.bytes = field(default=b"", repr=False)

    def _key(self) -> list[int]:
        return [self.address, self.bytes, self.generation, self.sequence]


@dataclass(frozen=True, slots=True)
class SharedLayout:
    """A tensor inside a range.

    Attributes:
        offset: Bytes from the start of the range to the first element.
        dtype: Name of the element type, such as ``"bfloat16"``.
        shape: Elements per dimension.
        strides: Elements between neighbours, per dimension.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """The descriptor that `CuMemAllocator.share` returns: small, picklable, useless to other users.

    If it carries FABRIC handles, every holder can use it, on any host of the NVLink domain.

    Attributes:
        version: The version of this format.
        driver: ``"cuda"`` or ``"host"``.
        owner: Process number of the owner.
        endpoint: Name of the owner's socket, in the abstract namespace.
        secret: The secret that the importer has to present.
        tag: The tag of the memory.
        writable: Whether importers may ask for write access.
        ranges: The allocations.
        layout: The shared tensor inside the only range; None if a tag was shared.
        message: Number of the message that keeps the memory until it is received; 0 if none does.
    """

    version: int
    driver: str
    owner: int
    endpoint: str
    secret: str
    tag: str
    writable: bool
    ranges: tuple[SharedRange, ...]
    layout: SharedLayout | None
    message: int = 0

    def _request(self, writable: bool) -> dict[str, object]:
        """Returns an importer's request; the secret signs all of it but `writable`."""
        return {
            "tag": self.tag,
            "granted": self.writable,
            "message": self.message,
            "ranges": [part._key() for part in self.ranges],
            "writable": writable,
            "secret": self.secret,
        }

    def __repr__(self) -> str:
        """Describes the memory, without the secret."""
        total = sum(part.bytes for part in self.ranges)
        return (
            f"<SharedMemory of process {self.owner}: {total} bytes of {self.tag!r} in "
            f"{len(self.ranges)} allocations>"
        )


def layout_of(tensor: torch.Tensor, start: int) -> SharedLayout:
    """Returns the layout of a tensor in the allocation that starts at an address."""
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise InvalidTypeError(
            "a quantized, lazily conjugated or lazily negated tensor is more than its bytes; share "
            "its resolve_conj().resolve_neg(), or its parts"
        )
    return SharedLayout(
        offset=tensor.data_ptr() - start,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
    )
