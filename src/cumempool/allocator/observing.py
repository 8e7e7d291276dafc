"""Reports statistics, allocations, events and progress of an allocator."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cumempool._pool.events import EventLog
from cumempool._pool.progress import OnProgress, ProgressRegistration
from cumempool._pool.stats import AllocationInfo, Stats
from cumempool._pool.tensors import memory_of
from cumempool.allocator._part import Part

if TYPE_CHECKING:
    import torch


class Observed(Part):
    """The methods of `CuMemAllocator` that report its state and its transitions."""

    def get_current_usage(self) -> int:
        """Returns the bytes of awake device memory, over all tags."""
        return self.stats().awake_bytes

    def stats(self) -> Stats:
        """Returns bytes per tag and state, and totals. Cheap; works on a closed allocator too."""
        return self._state.stats()

    def reset_peak_stats(self) -> None:
        """Restarts `Stats.peak_physical_bytes` from the memory held now."""
        self._core.reset_peaks()

    @property
    def tags(self) -> tuple[str, ...]:
        """The name of every tag that was ever used."""
        return tuple(self._state.stats().tags)

    def snapshot(self) -> list[AllocationInfo]:
        """Returns every live allocation, in order of allocation."""
        return self._state.snapshot()

    def tag_of(self, tensor: torch.Tensor) -> str:
        """Returns the tag of the allocation that holds a tensor's memory.

        Raises:
            InvalidTypeError: `tensor` is no tensor.
            NotInPoolError: Its memory is not of this allocator, or it has none.
        """
        return self.allocation_of(tensor).tag

    def allocation_of(self, tensor: torch.Tensor) -> AllocationInfo:
        """Returns the allocation that holds a tensor's memory.

        Raises:
            InvalidTypeError: `tensor` is no tensor.
            NotInPoolError: Its memory is not of this allocator, or it has none.
        """
        return self._state.allocation_at(memory_of(tensor))

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<{type(self).__name__} on {self.config.driver}: {len(stats.tags)} tags, "
            f"{stats.awake_bytes} bytes awake, {stats.asleep_bytes} asleep>"
        )

    @property
    def events(self) -> EventLog:
        """The latest transitions, failed transitions and failed allocations; oldest first."""
        return self._state.observer.log

    def on_progress(
        self,
        callback: OnProgress,
        *,
        after: float = 1.0,
        ended: Callable[[], object] | None = None,
    ) -> ProgressRegistration:
        """Calls a callback with the progress of long transitions, about ten times a second.

        It skips wakes in the background, whose handles report progress. See also `show_progress`.

        Args:
            callback: Called with the operation, the bytes done, and the total bytes, from a thread
                of its own; at the end of a successful transition with done equal to total. Its
                exceptions are logged.
            after: Seconds that a transition may take before the first call.
            ended: Called after the last call for a transition, whether it succeeded or failed.

        Returns:
            The registration, a context manager that removes the callback at its end.

        Raises:
            InvalidTypeError: The callback is not callable, or `after` is no number.
            InvalidArgumentError: `after` is negative.
        """
        return self._progress.register(callback, after, ended)

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Writes statistics, allocations and the latest events to a file, as JSON.

        ``cumempool report`` renders it.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(json.dumps(self._state.observer.snapshot()), encoding="utf-8")

    def record(self, path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
        """Returns a context manager that writes a trace: each event as a line of JSON.

        ``cumempool report`` renders it.

        Raises:
            OSError: On entering: the file cannot be made.
        """
        return self._state.observer.recording(Path(path))
