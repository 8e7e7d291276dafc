"""Moving what is loaded already into the pool.

Storages are copied into packed allocations, and every tensor over them is pointed at the copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

from cumempool import _torch
from cumempool.errors import InvalidArgumentError, InvalidTypeError, NotInPoolError

if TYPE_CHECKING:
    from cumempool.allocator import CuMemAllocator

__all__ = ["adopt_module"]

# What torch's own allocator aligns to, so that kernels find adopted memory as aligned as any other.
_ALIGNMENT: Final = 512
# Storages are packed into allocations of about this size: few enough handles to map fast, small
# enough that moving a model needs little more memory than the model.
_PACK_BYTES: Final = 256 * 1024**2

_PLAIN_TYPES: Final = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass
class _Storage:
    """One storage and the named tensors of the module that view it."""

    name: str
    address: int
    storage: torch.UntypedStorage
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.storage.nbytes()


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _check_kind(name: str, tensor: torch.Tensor, device_type: str) -> None:
    """Refuses by name what cannot be moved by copying its storage."""
    problem = ""
    if type(tensor) not in _PLAIN_TYPES:
        problem = f"is a {type(tensor).__module__}.{type(tensor).__qualname__}, a tensor subclass"
    elif tensor.layout is not torch.strided:
        problem = f"has the layout {tensor.layout}, not torch.strided"
    elif tensor.device.type == "meta":
        problem = "is on the meta device: it has no memory yet"
    elif tensor.device.type != device_type:
        problem = f"is on {tensor.device}: move the module to {device_type} first"
    elif tensor.is_quantized:
        problem = "is quantized, and its scales lie outside its storage"
    elif tensor.is_conj() or tensor.is_neg():
        problem = "is a lazy conjugate or negation: resolve it first (resolve_conj, resolve_neg)"
    elif tensor.is_shared() and device_type == "cpu":
        problem = "is in shared memory of several processes"
    if problem:
        raise _refusal(name, problem)


def _refusal(name: str, problem: str) -> InvalidTypeError:
    return InvalidTypeError(f"adopt: {name!r} {problem}; nothing was moved", operation="adopt")


def _address(name: str, storage: torch.UntypedStorage) -> int:
    try:
        return storage.data_ptr()
    except RuntimeError as error:  # a storage that torch only pretends to have
        raise _refusal(name, f"has no memory: {error}") from None


def _collect(module: torch.nn.Module, device_type: str) -> list[_Storage]:
    """The distinct storages of a module, in order of first appearance, with the tensors on each."""
    storages: dict[tuple[torch.device, int], _Storage] = {}
    seen: set[int] = set()
    for name, tensor in _named_tensors(module):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        _check_kind(name, tensor, device_type)
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            continue
        address = _address(name, storage)
        known = storages.setdefault((tensor.device, address), _Storage(name, address, storage))
        if storage.nbytes() > known.size:  # two storages over one memory, from NumPy for example
            known.storage = storage
        known.tensors.append(tensor)
    _refuse_overlaps(list(storages.values()))
    return list(storages.values())


def _refuse_overlaps(storages: list[_Storage]) -> None:
    """Storages that share part of their memory would come apart."""
    for left, right in pairwise(sorted(storages, key=lambda storage: storage.address)):
        if left.address + left.size > right.address:
            raise _refusal(right.name, f"shares part of the memory of {left.name!r}")


def _packs(storages: list[_Storage]) -> Iterator[list[_Storage]]:
    """Groups of storages of one device, each to be packed into one allocation."""
    by_device: dict[torch.device, list[_Storage]] = {}
    for storage in storages:
        by_device.setdefault(storage.storage.device, []).append(storage)
    for group in by_device.values():
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


def _move(allocator: CuMemAllocator, pack: list[_Storage], tag: str) -> int:
    """Moves a pack into an allocation of its own, and returns the bytes of that."""
    device = pack[0].storage.device
    total = sum(_aligned(storage.size) for storage in pack)
    memory = allocator.empty(total, dtype=torch.uint8, device=device, tag=tag)
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


def adopt_module(allocator: CuMemAllocator, module: torch.nn.Module, tag: str) -> int:
    """See `CuMemAllocator.adopt`."""
    if not isinstance(module, torch.nn.Module):
        raise InvalidTypeError(f"adopt: a torch.nn.Module is needed, not {type(module).__name__}")
    device_type = "cpu" if allocator.config.driver == "host" else "cuda"
    storages = [
        storage
        for storage in _collect(module, device_type)
        if not _is_ours(allocator, storage, tag)
    ]
    allocated = 0
    for pack in _packs(storages):
        allocated += _move(allocator, pack, tag)
        for storage in pack:
            storage.tensors.clear()
            storage.storage = torch.UntypedStorage(0)
        allocator._empty_cache()  # the old copies go before the next pack asks for memory
    return allocated


def _is_ours(allocator: CuMemAllocator, storage: _Storage, tag: str) -> bool:
    """Whether a storage lies in the pool under this very tag already."""
    try:
        found = allocator._core.find(storage.address)
    except NotInPoolError:
        return False
    if found["tag"] != tag and found["state"] != "awake":
        raise InvalidArgumentError(
            f"adopt: {storage.name!r} is asleep under the tag {found['tag']!r} and cannot be read: "
            "wake that tag first; nothing was moved",
            operation="adopt",
            tag=found["tag"],
        )
    return bool(found["tag"] == tag)
