"""Defines the base of the parts of `CuMemAllocator`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cumempool._pool.progress import ProgressWatch
from cumempool._pool.state import PoolState
from cumempool.config import CuMemConfig
from cumempool.errors import UnsupportedError
from cumempool.sharing.exports import Exports

if TYPE_CHECKING:
    from cumempool import _core


class Part:
    """The methods of an allocator about one topic.

    Attributes:
        config: Its configuration.
    """

    config: CuMemConfig
    _core: _core.Allocator
    _state: PoolState
    _exports: Exports
    _progress: ProgressWatch

    @property
    def enabled(self) -> bool:
        """False if the configuration has ``enable_cumem_allocator=False``.

        Then scopes are null scopes, `empty` gives ordinary memory, `adopt` and `preserve` change
        nothing, and calls that would put memory to sleep raise `UnsupportedError`.
        """
        return self.config.enable_cumem_allocator is not False

    def _check_enabled(self, operation: str) -> None:
        if not self.enabled:
            raise UnsupportedError(
                f"{operation}: the allocator is switched off (enable_cumem_allocator=False), and "
                "none of its memory can sleep",
                operation=operation,
                advice="leave that setting out",
            )
