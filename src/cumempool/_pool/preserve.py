"""Memory whose contents are kept where its tag is discarded: new, by a scope, or as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cumempool._pool.scope import MemoryPoolScope, NullScope, current_scope
from cumempool._pool.state import PoolState
from cumempool._pool.tags import DEFAULT_TAG
from cumempool._pool.waking import memory_of
from cumempool.errors import InvalidArgumentError, InvalidTypeError

if TYPE_CHECKING:
    import torch


def preserving_scope(state: PoolState) -> MemoryPoolScope:
    """See `CuMemAllocator.preserve_contents`."""
    if not state.enabled:
        return NullScope(state, DEFAULT_TAG, None)
    around = current_scope(state)
    if around is None:
        raise InvalidArgumentError(
            "preserve_contents() goes inside a use_memory_pool() scope, whose tag it takes",
            operation="preserve_contents",
            advice="enter use_memory_pool() first",
        )
    state.has_preserved = True
    return MemoryPoolScope(state, around.tag, around.devices, preserves=True)


def preserve_tensors(state: PoolState, what: object) -> int:
    """See `CuMemAllocator.preserve`."""
    if not state.enabled:
        return 0
    infos = {}
    for tensor in _tensors_of(what):
        if address := memory_of(tensor):
            info = state.allocation_at(address)
            infos[info.address] = info
    for address in infos:
        preserve_allocation(state, address)
    return sum(info.bytes for info in infos.values())


def preserve_allocation(state: PoolState, address: int) -> None:
    """Has the contents of the allocation that starts there kept from now on."""
    state.has_preserved = True
    state.core.preserve(address)


def _tensors_of(what: object) -> Iterable[torch.Tensor]:
    import torch

    if isinstance(what, torch.nn.Module):
        return what.buffers()
    if isinstance(what, torch.Tensor):
        return (what,)
    if not isinstance(what, Iterable):
        raise InvalidTypeError(f"preserve: tensors or a module are needed, not {what!r}")
    return what
