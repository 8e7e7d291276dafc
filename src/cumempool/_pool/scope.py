"""Routes allocations of this thread, or of every thread, to a slot while a scope is open."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from cumempool._locks import fork_safe_lock
from cumempool._pool.report import format_bytes
from cumempool._pool.state import PoolState
from cumempool.errors import InUseError, InvalidArgumentError, UnroutedWarning

if TYPE_CHECKING:
    from cumempool import _torch

# Guards the list below. A scope holds it while it starts to route, so that torch and the list have
# the same order.
_entering = fork_safe_lock()
# The open scopes of the process, in order of entry.
_open: list[MemoryPoolScope] = []


def current_scope(state: PoolState) -> MemoryPoolScope | None:
    """Returns the innermost scope of this thread and allocator, else one for all threads."""
    mine = threading.get_ident()
    # Without the lock: a forked child, where it is never released, must get its named error.
    scopes = [scope for scope in reversed(tuple(_open)) if scope._state is state]
    for scope in scopes:
        if scope._thread == mine:
            return scope
    return next((scope for scope in scopes if scope.all_threads), None)


def open_tags(state: PoolState, tags: Iterable[str]) -> list[str]:
    """Returns the tags that have an open scope, in any thread."""
    with _entering:
        entered = {scope.tag for scope in _open if scope._state is state}
    return [tag for tag in tags if tag in entered]


def refuse_open_scopes(state: PoolState, operation: str, tags: Iterable[str]) -> None:
    """Refuses to put tags with an open scope to sleep, before any hook is called.

    The core sees scopes that are entered later, and refuses as well.
    """
    entered = open_tags(state, tags)
    if entered:
        names = ", ".join(repr(tag) for tag in entered)
        raise InUseError(
            f"{operation}: a use_memory_pool() scope of {names} is open, and would hand out "
            "memory that sleeps",
            operation=operation,
            tag=entered[0],
            advice="leave the scope first",
        )


_warned = False


def _warn_unrouted(tag: str) -> None:
    """Warns once that torch allocates nothing from pools on the host driver."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"nothing was allocated from the pool in a use_memory_pool({tag!r}) scope: torch "
            "cannot be routed to the host driver, and what it allocated does not sleep; use "
            "allocator.empty() or allocator.adopt(), or the cuda driver",
            UnroutedWarning,
            stacklevel=3,
        )


class MemoryPoolScope(contextlib.AbstractContextManager["MemoryPoolScope"]):
    """One entry into a pool, made by `CuMemAllocator.use_memory_pool`; entered once.

    Attributes:
        tag: The tag of its allocations.
        all_threads: Whether it covers every thread of the process.
        preserves: Whether its allocations keep their contents if the tag is discarded.
        devices: The ordinals that it covers. None until it is entered: then those in use.
    """

    def __init__(
        self,
        state: PoolState,
        tag: str,
        devices: Sequence[int] | None,
        *,
        all_threads: bool = False,
        preserves: bool = False,
    ) -> None:
        self.tag: Final = tag
        self.all_threads: Final = all_threads
        self.preserves: Final = preserves
        self._state = state
        self.devices = devices
        self._thread = 0
        self._slots: list[int] = []  # at most one
        self._route: _torch.PoolRoute | None = None
        self._used = False
        self._mallocs = 0  # the allocator's count on entry

    def __enter__(self) -> MemoryPoolScope:
        if self._used:
            raise InvalidArgumentError("a scope is entered once; call use_memory_pool() again")
        self.devices = self._reached()
        if self._state.driver == "host":
            self._mallocs = self._mallocs_now()
        try:
            with _entering:
                self._refuse_overlap()
                self._begin()
                self._thread = threading.get_ident()
                _open.append(self)
                self._used = True
        except BaseException:
            self._end()
            raise
        return self

    def _reached(self) -> Sequence[int]:
        """Returns the devices of the scope."""
        if self.devices is not None:
            return self.devices
        if self._state.driver != "cuda":
            return range(self._state.devices.count)
        from cumempool import _torch

        return _torch.devices_in_use()

    def _refuse_overlap(self) -> None:
        """Refuses to take allocations of other threads that have scopes of their own.

        torch gives an allocation to the scope entered last among those that cover its thread, so a
        scope for all threads would take theirs. It does not take those of scopes entered later.
        """
        if not self.all_threads:
            return
        mine = threading.get_ident()
        for other in _open:
            if other._thread == mine or other._state.driver != self._state.driver:
                continue
            shared = set(other.devices or ()).intersection(self.devices or ())
            if shared:
                raise InUseError(
                    f"use_memory_pool({self.tag!r}, all_threads=True): another thread has a scope "
                    f"of {other.tag!r} open, and its allocations would go to {self.tag!r}",
                    operation="use_memory_pool",
                    tag=self.tag,
                    device=min(shared),
                    advice="leave the other scope first, or enter it after this one",
                )

    def _begin(self) -> None:
        from cumempool import _core

        # One call into C, which no interrupt splits: a bound slot is always known.
        self._slots.extend(map(self._state.core.bind_slot, (self.tag,)))
        (slot,) = self._slots
        if self.preserves:
            _core.preserve_slot(slot)
        if self._state.driver == "cuda":
            from cumempool import _torch

            self._state.before_tensors()
            route = _torch.PoolRoute(slot, self.devices or (), all_threads=self.all_threads)
            self._route = route  # before the routing begins: an interrupt may strike right after
            route.begin()

    def _end(self) -> None:
        """Ends everything that has begun."""
        from cumempool import _core

        try:
            if self._route is not None:
                (slot,) = self._slots
                self._route.end(lambda: _core.slot_mallocs(slot) > 0)
        finally:
            self._route = None
            with _entering:
                if self in _open:
                    _open.remove(self)
            while self._slots:
                _core.unbind_slot(self._slots.pop())

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self._slots:  # not entered, or already left
            return
        notes: list[str] = []
        try:
            if type(error).__name__ == "OutOfMemoryError":
                notes = self._notes()
        finally:
            self._end()
        if error is not None and type(error).__name__ == "OutOfMemoryError":
            self._state.observer.note_failure("malloc", error)
            if hasattr(error, "add_note"):  # Python 3.11
                for note in notes:
                    error.add_note(f"cumempool: {note}")
        elif (
            error is None and self._state.driver == "host" and self._mallocs == self._mallocs_now()
        ):
            _warn_unrouted(self.tag)

    def release_unused(self) -> bool:
        """Gives unused segments back to the device, inside the scope.

        torch frees segments of a pool only when it does not route to it, and uses none for a larger
        request, so tensors that are replaced by larger ones add up. If modules register
        parameters or buffers in place of others, this happens without a call.

        Returns:
            Whether it was done. It is not on `host`, in a scope for all threads, while another
            scope is open in any thread, during a capture, or by another thread.
        """
        return self._route is not None and self._route.renew()

    def _mallocs_now(self) -> int:
        return int(self._state.core.snapshot(False)["totals"]["malloc_calls"])

    def _notes(self) -> list[str]:
        """Returns causes, with remedies, that torch's out-of-memory error does not know."""
        notes = []
        reason = self._state.stats().last_malloc_failure
        if reason:
            notes.append(reason)
        if self._route is None:
            return notes
        from cumempool import _torch

        cached = _torch.cached_bytes()
        inside = self._route.cached_bytes()
        if reason and cached > inside:
            notes.append(
                f"torch has {format_bytes(cached - inside)} cached outside the pool, which it does "
                "not free while a pool scope is open; call torch.cuda.empty_cache() before it"
            )
        if inside:
            notes.append(
                f"{format_bytes(inside)} are free in segments of the scope's pool, which torch "
                "neither gives back while the scope is open nor uses for larger requests; if "
                "tensors are replaced by larger ones, call release_unused() of the scope in "
                "between, or make them outside the scope and adopt() them afterwards"
            )
        for device in self.devices or ():
            notes.extend(self._limit(device, _torch.memory_limit(device)))
        return notes

    def _limit(self, device: int, fraction: float) -> list[str]:
        """Returns a note about torch's own limit on a device, if that may be the cause."""
        asleep = sum(
            info.bytes
            for info in self._state.snapshot()
            if info.device == device and info.state != "awake"
        )
        if fraction >= 1 or not asleep:
            return []
        return [
            f"torch was told to use {fraction:.0%} of device {device} at most "
            f"(set_per_process_memory_fraction), and counts sleeping pools as in use, "
            f"{format_bytes(asleep)}; raise the limit by as much while they sleep"
        ]


class NullScope(MemoryPoolScope):
    """The scope of an allocator that is off: torch allocates as usual."""

    def __enter__(self) -> NullScope:
        return self

    def __exit__(self, *_: object) -> None:
        pass
