"""Makes locks that signal handlers, finalizers and forked children can meet at any moment."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    # The type that `threading.RLock` makes; before Python 3.13 `RLock` itself is a function.
    from _thread import RLock

_locks: Final[weakref.WeakSet[RLock]] = weakref.WeakSet()


def fork_safe_lock() -> RLock:
    """Returns a reentrant lock that a forked child finds open, whichever thread held it.

    Every lock of the package is one. It is reentrant, because a signal handler or the garbage
    collector may call the package while the same thread holds the lock. It is open in a child,
    because the thread that held it is not there to release it. If the forking thread itself holds
    it, it stays held: the thread's own ``with`` block releases it.

    Hold it only to change a few fields. Foreign code (making an allocator, an import, a driver, a
    callback) runs outside it.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _after_fork() -> None:
    for lock in _locks:
        if not lock._is_owned():  # type: ignore[attr-defined]  # conditions use it too
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does


os.register_at_fork(after_in_child=_after_fork)
