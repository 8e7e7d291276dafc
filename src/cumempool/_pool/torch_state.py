"""Queries torch for transitions: streams, caches, room. On `host` all of these are no-ops."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cumempool.errors import OutOfMemoryError

if TYPE_CHECKING:
    from cumempool import _torch

_T = TypeVar("_T")


def current_streams(driver: str) -> list[_torch.CurrentStream]:
    """Returns the current streams of the calling thread, one per device in use."""
    if driver != "cuda":
        return []
    from cumempool import _torch

    return _torch.current_streams()


def cached_ranges(driver: str) -> list[tuple[int, int]]:
    """Returns (address, bytes) of blocks that torch holds in pools as free."""
    if driver != "cuda":
        return []
    from cumempool import _torch

    return _torch.dead_ranges()


def empty_cache(driver: str) -> None:
    """Makes torch release its cache, if the program uses torch."""
    if driver == "cuda" and "torch" in sys.modules:
        from cumempool import _torch

        _torch.empty_cache()


def with_room(driver: str, begin: Callable[[], _T]) -> _T:
    """Calls `begin`; if the device has no room, empties torch's cache and calls it again."""
    try:
        return begin()
    except OutOfMemoryError:
        empty_cache(driver)
        return begin()


def nvtx_range(operation: str) -> contextlib.AbstractContextManager[object]:
    """Marks the body for profilers, as ``cumempool.<operation>``."""
    from cumempool import _torch

    return _torch.nvtx_range(f"cumempool.{operation}")
