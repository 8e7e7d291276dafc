"""Keeps the open regions of each thread, and can leave and enter them again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cumempool._pool.scope import MemoryPoolScope


class _Region(contextlib.ExitStack):
    """One region. Each entry is a separate scope, which sees the error that it is left with."""

    def __init__(self, name: str, make_scope: Callable[[], MemoryPoolScope]) -> None:
        super().__init__()
        self.name = name
        self._make_scope = make_scope
        self._ended = False

    def enter(self) -> None:
        """Routes allocations, unless the region has ended meanwhile."""
        if not self._ended:
            self.enter_context(self._make_scope())

    def end(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leaves the region for good."""
        self._ended = True
        self.__exit__(kind, error, traceback)


class OpenRegions:
    """The regions that each thread has opened by `opened` and not yet closed."""

    def __init__(self) -> None:
        self._local = threading.local()

    def _mine(self) -> tuple[_Region, ...]:
        found: tuple[_Region, ...] = getattr(self._local, "regions", ())
        return found

    def names(self) -> set[str]:
        """Returns the names of the calling thread's open regions."""
        return {region.name for region in self._mine()}

    @contextlib.contextmanager
    def opened(self, name: str, make_scope: Callable[[], MemoryPoolScope]) -> Iterator[None]:
        """Routes allocations of the body to a scope."""
        region = _Region(name, make_scope)
        with contextlib.ExitStack() as stack:
            region.enter()
            stack.push(region.end)
            outer = self._mine()
            self._local.regions = (*outer, region)
            stack.callback(setattr, self._local, "regions", outer)
            yield

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Leaves all regions of the calling thread in the body.

        Regions may be opened in the body, and end with it.
        """
        regions = self._mine()
        with contextlib.ExitStack() as stack:
            for region in reversed(regions):
                stack.callback(region.enter)  # the stack unwinds outermost first
                region.close()
            stack.callback(setattr, self._local, "regions", regions)
            self._local.regions = ()
            yield
