"""Reads torch's segments and blocks, by pool."""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch

from cumempool._torch import runtime
from cumempool.errors import UnsupportedError

_C: Final[Any] = torch._C

PoolId = tuple[int, int]
Segment = dict[str, Any]

#: torch's id for all pools.
_ALL_POOLS: Final[PoolId] = (0, 0)
#: No pool has this id, so torch lists no segments for it.
NO_POOL: Final[PoolId] = (0, 1 << 62)


@functools.lru_cache(maxsize=2)
def parameters_of(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _add_references(value: object, count: int) -> None:
    for _ in range(count):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


@functools.cache
def _references_taken() -> int:
    """Returns how many references ``_cuda_memorySnapshot`` wrongly drops of each argument item.

    Reference counts show one in torch 2.11. If Python does not keep a number for good, such as a
    pool id, this frees it while it is in use, and corrupts the heap.
    """
    ask = getattr(_C, "_cuda_memorySnapshot", None)
    if ask is None:
        return 0
    number = int(str(NO_POOL[1]))  # an object without other references
    lent = 2
    _add_references(number, lent)
    before = sys.getrefcount(number)
    ask((NO_POOL[0], number, False))
    taken = before - sys.getrefcount(number)
    for _ in range(lent - taken):
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(number))
    return taken


def lend(pool: PoolId) -> None:
    """Gives torch the references that it is about to drop of a pool's id (`_references_taken`)."""
    for item in (*pool, False):
        _add_references(item, _references_taken())


def segments_of(pool: PoolId | None = None) -> list[Segment]:
    """Returns torch's segments, of one pool or all; without the history if this torch can."""
    ask: Callable[..., list[Segment]] = torch.cuda.memory_snapshot
    takes = parameters_of(ask)
    options: dict[str, Any] = {}
    if "include_traces" in takes:
        options["include_traces"] = False
        lend(_ALL_POOLS if pool is None else pool)
    if pool is None:
        return ask(**options)
    if "mempool_id" in takes:
        options["mempool_id"] = pool
    return [segment for segment in ask(**options) if pool_of(segment) == pool]


def field_of(of: Mapping[str, Any], name: str) -> Any:
    """Returns a field of torch's answer about its memory, or raises an error that names it."""
    try:
        return of[name]
    except KeyError:
        raise UnsupportedError(
            f"torch {torch.__version__} does not report {name!r} of its memory, which cumempool "
            "needs",
            advice="use a version of torch that cumempool was tested with",
        ) from None


def pool_of(segment: Segment) -> PoolId:
    first, second = field_of(segment, "segment_pool_id")
    return int(first), int(second)


def is_in_use(segment: Segment) -> bool:
    return any(block["state"] != "inactive" for block in segment["blocks"])


def dead_ranges(
    live: Collection[PoolId] = (), segments: Sequence[Segment] | None = None
) -> list[tuple[int, int]]:
    """Returns (address, bytes) of blocks that torch has cached as free in custom pools.

    Args:
        live: Pools to leave out: graphs use blocks of theirs that torch counts as free.
        segments: torch's segments. None queries torch.
    """
    if segments is None:
        segments = (
            segments_of() if runtime.is_initialized() and runtime.has_native_allocator() else []
        )
    without = {(0, 0), *live}
    return [
        (block["address"], block["size"])
        for segment in segments
        if pool_of(segment) not in without
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
