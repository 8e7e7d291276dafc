"""Moves tensors that exist already into the pool.

Storages are copied into packed allocations, and every tensor over them is pointed at the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch

from cumempool import _torch
from cumempool.errors import InvalidArgumentError, InvalidTypeError, NotInPoolError
from cumempool.exact_tensor import empty_bytes
from cumempool.preserve import preserve_allocation
from cumempool.torch_state import empty_cache

if TYPE_CHECKING:
    from cumempool.allocator import CuMemAllocator

__all__ = ["Found", "adopt_tensors", "device_type_of", "refusal"]

# What torch's own allocator aligns to, so that kernels find adopted memory as aligned as any other.
_ALIGNMENT: Final = 512
# Storages are packed into allocations of about this size: few enough handles to map fast, small
# enough that moving a model needs little more memory than the model.
_PACK_BYTES: Final = 256 * 1024**2

_PLAIN_TYPES: Final = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True)
class Found:
    """A tensor to be moved.

    Attributes:
        name: What messages call it.
        tensor: It.
        tag: The tag to move it under.
        preserved: Whether its contents are kept where the tag is discarded.
    """

    name: str
    tensor: torch.Tensor
    tag: str
    preserved: bool = False


@dataclass
class _Storage:
    """One storage and the tensors that view it; it goes where the first of them is to go."""

    name: str
    address: int
    tag: str
    preserved: bool
    storage: torch.UntypedStorage
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.storage.nbytes()


def device_type_of(allocator: CuMemAllocator) -> str:
    """What torch calls the devices of an allocator."""
    return "cpu" if allocator.config.driver == "host" else "cuda"


def _check_kind(name: str, tensor: torch.Tensor, device_type: str) -> None:
    """Refuses by name what cannot be moved by copying its storage."""
    problem = ""
    if type(tensor) not in _PLAIN_TYPES:
        problem = f"is a {type(tensor).__module__}.{type(tensor).__qualname__}, a tensor subclass"
        if type(tensor).__name__ in ("DTensor", "FlatParameter"):
            problem += ", which frees and makes storage itself: shard inside use_memory_pool()"
    elif tensor.layout is not torch.strided:
        problem = f"has the layout {tensor.layout}, not torch.strided"
    elif tensor.device.type == "meta":
        problem = "is on the meta device: it has no memory yet"
    elif tensor.device.type != device_type:
        problem = f"is on {tensor.device}: move it to {device_type} first"
    elif tensor.is_quantized:
        problem = "is quantized, and its scales lie outside its storage"
    elif tensor.is_conj() or tensor.is_neg():
        problem = "is a lazy conjugate or negation: resolve it first (resolve_conj, resolve_neg)"
    elif tensor.is_shared() and device_type == "cpu":
        problem = "is in shared memory of several processes"
    if problem:
        raise refusal(name, problem)


def refusal(name: str, problem: str) -> InvalidTypeError:
    """What is raised of something that cannot be moved."""
    return InvalidTypeError(f"adopt: {name!r} {problem}; nothing was moved", operation="adopt")


def _address(name: str, storage: torch.UntypedStorage) -> int:
    try:
        return storage.data_ptr()
    except RuntimeError as error:  # a storage that torch only pretends to have
        raise refusal(name, f"has no memory: {error}") from None


def _collect(found: Iterable[Found], device_type: str) -> list[_Storage]:
    """The distinct storages, in order of first appearance, with the tensors on each."""
    storages: dict[tuple[torch.device, int], _Storage] = {}
    seen: set[int] = set()
    for one in found:
        if id(one.tensor) in seen:
            continue
        seen.add(id(one.tensor))
        _check_kind(one.name, one.tensor, device_type)
        storage = one.tensor.untyped_storage()
        if storage.nbytes() == 0:
            continue
        address = _address(one.name, storage)
        known = storages.setdefault(
            (one.tensor.device, address),
            _Storage(one.name, address, one.tag, one.preserved, storage),
        )
        if storage.nbytes() > known.size:  # two storages over one memory, from NumPy for example
            known.storage = storage
        known.preserved = known.preserved or one.preserved
        known.tensors.append(one.tensor)
    _refuse_overlaps(list(storages.values()))
    return list(storages.values())


def _refuse_overlaps(storages: list[_Storage]) -> None:
    """Storages that share part of their memory would come apart."""
    for left, right in pairwise(sorted(storages, key=lambda storage: storage.address)):
        if left.address + left.size > right.address:
            raise refusal(right.name, f"shares part of the memory of {left.name!r}")


def _packs(storages: list[_Storage]) -> Iterator[list[_Storage]]:
    """Groups of storages that go to one place, each to be packed into one allocation."""
    by_place: dict[tuple[torch.device, str, bool], list[_Storage]] = {}
    for storage in storages:
        place = (storage.storage.device, storage.tag, storage.preserved)
        by_place.setdefault(place, []).append(storage)
    for group in by_place.values():
        pack: list[_Storage] = []
        size = 0
        for storage in group:
            if pack and size + storage.size > _PACK_BYTES:
                yield pack
                pack, size = [], 0
            pack.append(storage)
            size += storage.size
        yield pack


def _aligned(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _move(allocator: CuMemAllocator, pack: list[_Storage]) -> int:
    """Moves a pack into an allocation of its own, and returns the bytes of that."""
    first = pack[0]
    total = sum(_aligned(storage.size) for storage in pack)
    memory = empty_bytes(
        allocator, total, device=first.storage.device, tag=first.tag, preserved=first.preserved
    )
    offset = 0
    for old in pack:
        copy = memory[offset : offset + old.size]
        copy.copy_(_torch.tensor_over(old.storage, torch.uint8, (old.size,), (1,), 0))
        for tensor in old.tensors:
            _point(tensor, memory, offset)
        offset += _aligned(old.size)
    return allocator.allocation_of(memory).bytes


def _point(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> None:
    """Makes a tensor, without changing its identity, view `memory` from `offset` bytes on."""
    moved = _torch.tensor_over(
        memory.untyped_storage(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        offset // tensor.element_size() + int(tensor.storage_offset()),
    )
    tensor.data = moved


def adopt_tensors(allocator: CuMemAllocator, found: Iterable[Found]) -> int:
    """Moves tensors under their tags, all of them checked before the first is moved.

    Returns:
        Bytes of device memory allocated for them; 0 where all lie under their tags already.
    """
    storages, unpreserved = [], []
    for storage in _collect(found, device_type_of(allocator)):
        there = _ours(allocator, storage)
        if there is None:
            storages.append(storage)
        elif storage.preserved and not there["preserved"]:
            unpreserved.append(there["address"])
    for address in unpreserved:
        preserve_allocation(allocator, address)
    allocated = 0
    for pack in _packs(storages):
        allocated += _move(allocator, pack)
        for storage in pack:
            storage.tensors.clear()
            storage.storage = torch.UntypedStorage(0)
        # The old copies go before the next pack asks for memory.
        empty_cache(allocator.config.driver)
    return allocated


def _ours(allocator: CuMemAllocator, storage: _Storage) -> dict[str, Any] | None:
    """The allocation that holds a storage, where that is under the right tag already."""
    try:
        found = allocator._core.find(storage.address)
    except NotInPoolError:
        return None
    if found["tag"] == storage.tag:
        return found
    if found["state"] != "awake":
        raise InvalidArgumentError(
            f"adopt: {storage.name!r} is asleep under the tag {found['tag']!r} and cannot be read: "
            "wake that tag first; nothing was moved",
            operation="adopt",
            tag=found["tag"],
        )
    return None
