"""Reads and changes the settings of torch's caching allocator, such as expandable segments."""

from __future__ import annotations

from typing import Any, Final

import torch

from cumempool._locks import fork_safe_lock
from cumempool._torch import runtime, snapshots

_C: Final[Any] = torch._C

#: From this version on, torch keeps expandable segments out of pools with an allocator of their own
#: (seen with 2.11). Earlier ones are reported to bypass the allocator (pytorch#147851).
_HONOURS_CUSTOM_POOLS: Final = (2, 11)


def _split_settings(text: str) -> list[str]:
    """Splits an allocator settings string into options; commas in brackets do not separate."""
    options, depth, current = [], 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            options.append(current)
            current = ""
        else:
            current += character
    return [option.strip() for option in [*options, current] if option.strip()]


def replace_setting(text: str, name: str, value: str) -> str:
    """Returns an allocator settings string with one option changed or added.

    torch resets every option that a settings string leaves out, so the result names all of them.
    """
    kept = [option for option in _split_settings(text) if option.partition(":")[0].strip() != name]
    return ",".join([*kept, f"{name}:{value}"])


def live_settings() -> dict[str, Any]:
    """Returns the current settings of torch's caching allocator, by name."""
    if not runtime.has_native_allocator():
        return {}
    if "include_traces" in snapshots.parameters_of(torch.cuda.memory_snapshot):
        snapshots.lend(snapshots.NO_POOL)
        said = _C._cuda_memorySnapshot((*snapshots.NO_POOL, False))  # no segments, no history
    else:
        said = torch.cuda.memory._snapshot()
    settings: dict[str, Any] = snapshots.field_of(said, "allocator_settings")
    return settings


def _apply_settings(text: str) -> None:
    setter = getattr(_C, "_accelerator_setAllocatorSettings", None)
    if setter is None:
        setter = _C._cuda_cudaCachingAllocator_set_allocator_settings
    setter(text)


def expandable_segments_bypass_pools() -> bool:
    """Whether torch would make segments of pools now without calling their allocator."""
    if runtime.torch_version() >= _HONOURS_CUSTOM_POOLS:
        return False
    return bool(live_settings().get("expandable_segments", False))


class ExpandableSegmentsOff:
    """Keeps expandable segments off while a scope is open, if this torch needs that.

    The setting is per process: the first scope switches it off, the last one restores it. If other
    code applied a settings string in between, that string stays.
    """

    _lock = fork_safe_lock()
    _open = 0
    _before: str | None = None
    _ours = ""

    def __init__(self) -> None:
        self._counts = False

    def begin(self) -> None:
        """Switches expandable segments off if they are on and would bypass the pool."""
        if runtime.torch_version() >= _HONOURS_CUSTOM_POOLS:
            return
        cls = ExpandableSegmentsOff
        with cls._lock:
            settings = live_settings()
            if settings.get("expandable_segments", False):
                before = str(settings.get("PYTORCH_CUDA_ALLOC_CONF", ""))
                ours = replace_setting(before, "expandable_segments", "False")
                _apply_settings(ours)
                cls._before, cls._ours = before, ours
            cls._open += 1
            self._counts = True

    def end(self) -> None:
        """Restores the setting when the last open scope ends. Does nothing without a `begin`."""
        cls = ExpandableSegmentsOff
        with cls._lock:
            if not self._counts:
                return
            self._counts = False
            cls._open -= 1
            if cls._open or cls._before is None:
                return
            before, cls._before = cls._before, None
            if live_settings().get("PYTORCH_CUDA_ALLOC_CONF", "") == cls._ours:
                _apply_settings(before)

    def __enter__(self) -> ExpandableSegmentsOff:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
