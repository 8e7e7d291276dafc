"""Fails every allocation of Python in calls of the extension module, one at a time.

Run by ``test_memory_errors.py`` in a process of its own. A call that raises has changed nothing and
left nothing behind; one that has succeeded says so.
"""

from __future__ import annotations

import _testcapi  # of CPython's own tests
import os
import sys
from collections.abc import Callable
from typing import Any

from cumempool import _core

GRANULE = 64 << 10
ON_SLEEP_OFFLOAD = 1


class World:
    """An allocator with memory of one tag; what must hold of it is what `picture` says."""

    def __init__(self) -> None:
        self.driver = _core.open_host(1, 64 * GRANULE, GRANULE, False, False)
        self.core = _core.Allocator(self.driver, 0, True, None)
        self.core.declare_tag("weights", 0, 0)
        self.core.declare_tag("next", 0, 0)
        self.addresses = [self.core.malloc("weights", 0, GRANULE) for _ in range(3)]
        self.actions = [("weights", ON_SLEEP_OFFLOAD)]

    def picture(self) -> tuple[object, ...]:
        found = self.core.snapshot(True)
        states = [(info["address"], info["state"]) for info in found["allocations"]]
        totals = found["totals"]
        return states, totals["physical_bytes"], [tag["pins"] for tag in found["tags"]]

    def sleep(self) -> object:
        return self.core.sleep(self.actions, False, [], [])

    def wake(self) -> object:
        return self.core.wake(None, [])

    def swap(self) -> object:
        return self.core.swap(self.actions, [], None, [])

    def wake_and_finish(self) -> object:
        return self.core.wake_begin(None, [], []).finish()

    def malloc(self) -> object:
        return self.core.malloc("weights", 0, GRANULE)

    def capsule(self) -> object:
        return self.core.malloc_capsule("weights", 0, GRANULE)

    def pin(self) -> object:
        return self.core.pin("weights", "a holder")

    def bind(self) -> object:
        return self.core.bind_slot("weights")

    def export(self) -> object:
        return self.core.export_fd(self.addresses[0])

    def view(self) -> object:
        return self.core.view_backup(self.addresses[0], GRANULE, False)

    def end(self, name: str, result: Any) -> None:
        """Takes back what a call that succeeded has given."""
        if name == "malloc":
            _core.free(result)
        elif name == "pin":
            self.core.unpin(result)
        elif name == "bind":
            _core.unbind_slot(result)
        elif name == "export":
            os.close(result[0])

    def close(self) -> None:
        """Fails where something is in use still: a slot, a view, memory that nobody knows of."""
        self.core.wake(None, [])
        for address in self.addresses:
            _core.free(address)
        self.core.close(False)


ASLEEP = ("wake", "wake_and_finish", "view")


def failing(nth: int, call: Callable[[], object]) -> tuple[bool, object]:
    """Whether the call succeeded, and its result, where the n-th allocation fails."""
    result = None
    try:
        _testcapi.set_nomemory(nth, nth + 1)
        result = call()
    except (MemoryError, RuntimeError, TypeError):  # pybind11 raises all of them
        _testcapi.remove_mem_hooks()
        return False, None
    _testcapi.remove_mem_hooks()
    return True, result


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def sweep(name: str, most: int) -> int:
    """How many allocations the call failed with; ends where it has long succeeded."""
    failures = calm = 0
    for nth in range(most):
        world = World()
        if name in ASLEEP:
            world.sleep()
        before, open_before = world.picture(), descriptors()
        succeeded, result = failing(nth, getattr(world, name))
        if succeeded:
            calm += 1
            world.end(name, result)
        else:
            failures, calm = failures + 1, 0
            if name == "wake_and_finish" and world.picture() != before:
                # The handle was there, and was asked for its report: the wake has ended with it.
                world.sleep()
            assert world.picture() == before, (name, nth)
        result = None
        if name == "export":  # the driver's own memory is made of some, too
            assert descriptors() == open_before, nth
        world.close()
        if calm == 20:
            return failures
    raise AssertionError(f"{name}: {most} allocations and no end")


if __name__ == "__main__":
    print(sweep(sys.argv[1], 2000))
