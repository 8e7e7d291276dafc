"""Moves existing tensors into the pool.

It copies storages into packed allocations, and points every tensor over them at the copy. A tensor
stays the same object: its class, its attributes, and whether it is an inference tensor, whatever
the mode of the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import torch

from cumempool import _torch
from cumempool._pool.state import PoolState
from cumempool._pool.stats import AllocationInfo
from cumempool._pool.tensors import empty_bytes
from cumempool._pool.torch_state import empty_cache
from cumempool.errors import InvalidArgumentError, InvalidTypeError, NotInPoolError

# torch's own alignment, so that kernels find adopted memory as aligned as any other.
_ALIGNMENT: Final = 512
# Storages are packed into allocations of about this size: few enough handles to map fast, small
# enough that moving a model needs little more memory than the model.
_PACK_BYTES: Final = 256 * 1024**2


@dataclass(frozen=True)
class Found:
    """A tensor to move.

    Attributes:
        name: Its name in messages.
        tensor: The tensor.
        tag: The tag to move it under.
        preserved: Whether its contents are kept if the tag is discarded.
    """

    name: str
    tensor: torch.Tensor
    tag: str
    preserved: bool = False


@dataclass
class _Storage:
    """One storage and the tensors that view it; it moves under the tag of the first."""

    name: str
    address: int
    tag: str
    preserved: bool
    storage: torch.UntypedStorage
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.storage.nbytes()


def device_type_of(state: PoolState) -> str:
    """Returns torch's name for the kind of device."""
    return "cpu" if state.driver == "host" else "cuda"


def _problem(tensor: torch.Tensor, device_type: str) -> str:
    """Returns why a tensor cannot be moved by copying its storage, or ``""``."""
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if type(tensor).__name__ in ("DTensor", "FlatParameter"):
        return f"is a {kind}, which frees and makes storage itself: shard inside use_memory_pool()"
    if torch.nn.parameter.is_lazy(tensor):
        return f"is a {kind}, which has no memory yet: run the module once first"
    if _torch.dispatches(tensor):
        return f"is a {kind}, a tensor subclass that keeps its memory in other tensors"
    plain = _torch.as_plain(tensor)
    if plain.layout is not torch.strided:
        return f"has the layout {plain.layout}, not torch.strided"
    if plain.device.type == "meta":
        return "is on the meta device: it has no memory yet"
    if plain.device.type != device_type:
        return f"is on {plain.device}: move it to {device_type} first"
    if plain.is_quantized:
        return "is quantized, and its scales lie outside its storage"
    if plain.is_conj() or plain.is_neg():
        return "is a lazy conjugate or negation: resolve it first (resolve_conj, resolve_neg)"
    if plain.is_shared() and device_type == "cpu":
        return "is in shared memory of several processes"
    if not _torch.can_be_pointed(tensor):
        return f"is a {kind}, which torch does not let view other memory"
    return ""


def refusal(name: str, problem: str) -> InvalidTypeError:
    """Returns the error for a tensor that cannot be moved."""
    return InvalidTypeError(f"adopt: {name!r} {problem}; nothing was moved", operation="adopt")


def _address(name: str, storage: torch.UntypedStorage) -> int:
    try:
        return storage.data_ptr()
    except RuntimeError as error:  # torch only pretends that the storage exists
        raise refusal(name, f"has no memory: {error}") from None


def _collect(found: Iterable[Found], device_type: str) -> list[_Storage]:
    """Returns the distinct storages, in order of first appearance, with their tensors."""
    storages: dict[tuple[torch.device, int], _Storage] = {}
    seen: dict[int, Found] = {}
    for one in found:
        if id(one.tensor) in seen:
            continue
        seen[id(one.tensor)] = one
        if problem := _problem(one.tensor, device_type):
            raise refusal(one.name, problem)
        storage = _torch.as_plain(one.tensor).untyped_storage()
        if storage.nbytes() == 0:
            continue
        address = _address(one.name, storage)
        known = storages.setdefault(
            (storage.device, address),
            _Storage(one.name, address, one.tag, one.preserved, storage),
        )
        if storage.nbytes() > known.size:  # two storages over one memory, for example from NumPy
            known.storage = storage
        known.preserved = known.preserved or one.preserved
        known.tensors.append(one.tensor)
    _refuse_overlaps(list(storages.values()))
    for one in list(seen.values()):
        _take_attributes(one, storages, seen, device_type)
    return list(storages.values())


def _take_attributes(
    one: Found,
    storages: dict[tuple[torch.device, int], _Storage],
    seen: dict[int, Found],
    device_type: str,
) -> None:
    """Adds tensor attributes that view the tensor's storage, so that they stay together."""
    for name, value in vars(one.tensor).items():
        if not isinstance(value, torch.Tensor) or id(value) in seen:
            continue
        if _problem(value, device_type):
            continue
        found = Found(f"{one.name}.{name}", value, one.tag)
        seen[id(value)] = found
        storage = _torch.as_plain(value).untyped_storage()
        if storage.nbytes() == 0:
            continue
        known = storages.get((storage.device, _address(found.name, storage)))
        if known is not None:
            known.tensors.append(value)


def _refuse_overlaps(storages: list[_Storage]) -> None:
    """Refuses storages that share part of their memory, because they would come apart."""
    for left, right in pairwise(sorted(storages, key=lambda storage: storage.address)):
        if left.address + left.size > right.address:
            raise refusal(right.name, f"shares part of the memory of {left.name!r}")


def _packs(storages: list[_Storage]) -> Iterator[list[_Storage]]:
    """Groups storages by their place, each group to be packed into one allocation."""
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


def _move(state: PoolState, pack: list[_Storage]) -> int:
    """Moves a pack into an allocation of its own, and returns its bytes."""
    first = pack[0]
    total = sum(_aligned(storage.size) for storage in pack)
    memory = empty_bytes(
        state, total, device=first.storage.device, tag=first.tag, preserved=first.preserved
    )
    offset = 0
    for old in pack:
        copy = memory[offset : offset + old.size]
        copy.copy_(_torch.tensor_over(old.storage, torch.uint8, (old.size,), (1,), 0))
        for tensor in old.tensors:
            _torch.point(tensor, memory.untyped_storage(), offset)
        offset += _aligned(old.size)
    return state.allocation_at(memory.untyped_storage().data_ptr()).bytes


def adopt_tensors(state: PoolState, found: Iterable[Found]) -> int:
    """Moves tensors under their tags, after checking all of them.

    Returns:
        Bytes of device memory allocated for them; 0 if all lie under their tags already.
    """
    with _torch.ordinary_tensors():
        return _adopt(state, _collect(found, device_type_of(state)))


def _adopt(state: PoolState, collected: Iterable[_Storage]) -> int:
    storages, unpreserved = [], []
    for storage in collected:
        there = _ours(state, storage)
        if there is None:
            storages.append(storage)
        elif storage.preserved and not there.preserved:
            unpreserved.append(there.address)
    for address in unpreserved:
        state.preserve(address)
    allocated = 0
    for pack in _packs(storages):
        allocated += _move(state, pack)
        for storage in pack:
            storage.tensors.clear()
            storage.storage = torch.UntypedStorage(0)
        # Frees the old copies before the next pack requests memory.
        empty_cache(state.driver)
    return allocated


def _ours(state: PoolState, storage: _Storage) -> AllocationInfo | None:
    """Returns a storage's allocation if it is under the right tag already, else None."""
    try:
        found = state.allocation_at(storage.address)
    except NotInPoolError:
        return None
    if found.tag == storage.tag:
        return found
    if found.state != "awake":
        raise InvalidArgumentError(
            f"adopt: {storage.name!r} is asleep under the tag {found.tag!r} and cannot be read: "
            "wake that tag first; nothing was moved",
            operation="adopt",
            tag=found.tag,
        )
    return None
