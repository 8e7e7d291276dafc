"""Defines `CuMemAllocator`: tagged pools of device memory that sleep and wake.

Each file has the public methods of one topic and their promises. `_pool` and `sharing` do the work.
"""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cumempool._locks import fork_safe_lock
from cumempool._pool.checks import check_bool
from cumempool._pool.devices import Devices
from cumempool._pool.events import Observer
from cumempool._pool.graph_pool import GraphPools
from cumempool._pool.hooks import Hooks, Transitions
from cumempool._pool.progress import ProgressWatch
from cumempool._pool.publishing import Publisher, publish
from cumempool._pool.scope import open_tags
from cumempool._pool.state import PoolState
from cumempool._pool.stats import allocations_of, stats_of
from cumempool._pool.tags import DEFAULT_TAG, Backing, OnSleep, OnWake, Tags
from cumempool._pool.torch_state import cached_ranges, empty_cache, nvtx_range
from cumempool.allocator.allocating import Allocates
from cumempool.allocator.observing import Observed
from cumempool.allocator.registering import Registers
from cumempool.allocator.sleeping import Sleeps
from cumempool.config import CuMemConfig
from cumempool.errors import CumempoolError, InvalidArgumentError, InvalidTypeError
from cumempool.probe import open_driver
from cumempool.sharing.exports import Exports
from cumempool.sharing.reducers import install_reducers

if TYPE_CHECKING:
    from cumempool import _core

__all__ = ["DEFAULT_TAG", "Backing", "CuMemAllocator", "OnSleep", "OnWake"]

_instance_lock = fork_safe_lock()


class CuMemAllocator(Allocates, Sleeps, Registers, Observed):
    """Allocates device memory under tags; puts tags to sleep and wakes them at the same addresses.

    Several may live in one process. Any thread may call any method; transitions (`sleep`,
    `wake_up`, `swap`, `discard`) of one allocator run one after another, while allocating, freeing
    and reading statistics go on.

    As a context manager it closes at its end. If tensors live then, it stays open with them and
    raises the `InUseError` of `close`. If the body has failed, it stays open without an error,
    because the traceback may keep tensors.

    Args:
        config: The driver and the limits. None means ``CuMemConfig()``.

    Raises:
        UnavailableError: The driver cannot be opened here; the message has the reason. An allocator
            on ``cuda`` never falls back to ``host``.
    """

    _instance: CuMemAllocator | None = None

    def __init__(self, config: CuMemConfig | None = None) -> None:
        if config is not None and not isinstance(config, CuMemConfig):
            raise InvalidTypeError(f"config is a CuMemConfig or None, not {config!r}")
        from cumempool import _core

        self.config = config or CuMemConfig()
        driver = open_driver(self.config)
        overflow = self.config.host_backup_overflow
        self._core = _core.Allocator(
            driver,
            self.config.host_backup_limit or 0,
            self.config.retain_backups,
            overflow._to_core() if overflow is not None else None,
        )
        self._progress = ProgressWatch(self._core.progress)
        devices = Devices(driver, self.config.driver)
        tags = Tags(self._core, devices)
        self._exports = Exports(self._core, tags, devices, self.config.driver)
        self._state = PoolState(
            core=self._core,
            driver=self.config.driver,
            enabled=self.enabled,
            devices=devices,
            tags=tags,
            hooks=Hooks(),
            transitions=Transitions(),
            observer=_observer_of(self._core, self.config, self._progress),
            graph_pools=GraphPools(self._core),
            before_tensors=partial(install_reducers, self._exports),
            before_sleep=self._exports.settle,
        )
        weakref.finalize(self._state, self._state.graph_pools.abandon).atexit = False
        observer = self._state.observer
        self._publisher: Publisher | None = (
            publish(observer.snapshot, observer.summary) if self.config.publish else None
        )

    @classmethod
    def get_instance(cls, config: CuMemConfig | None = None) -> CuMemAllocator:
        """Returns the allocator that the parts of a program share; the first call makes it.

        It never returns a closed one: after `close` the next call makes another. If threads race in
        the first call, each may open a driver; all of them get the first allocator made.

        Args:
            config: For the first call. Later None, or the same configuration.

        Raises:
            InvalidArgumentError: The shared allocator has another configuration.
            UnavailableError: As for the constructor.
        """
        shared = cls._open_instance()
        if shared is None:
            made = cls(config)
            with _instance_lock:
                shared = CuMemAllocator._instance = cls._open_instance() or made
            if shared is not made:
                made.close()
        if config is not None and config != shared.config:
            raise InvalidArgumentError(
                f"the shared allocator was made with {shared.config}, not {config}; "
                "close() it first, or make an allocator of your own"
            )
        return shared

    @classmethod
    def _open_instance(cls) -> CuMemAllocator | None:
        """Returns the shared allocator, or None if there is none or it is closed."""
        shared = cls._instance
        return None if shared is None or shared._core.closed else shared

    def __enter__(self) -> CuMemAllocator:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(CumempoolError):
                self.close()

    def close(self, force: bool = False) -> None:
        """Releases everything. Closing twice is no error.

        Args:
            force: Close even if memory is in use: physical memory, backups and contents are lost,
                and remaining tensors must not be touched. Their addresses stay reserved until they
                are deleted, so that a late access faults and reads no other memory. Memory of
                ``backing="cuda_malloc"`` stays until it is deleted.

        Raises:
            InUseError: Without `force`: tensors or CUDA graphs live, scopes are open, backups are
                being read, or sent messages were not received. Nothing was changed.
            DriverError: The driver refused to take something back.
        """
        check_bool(force=force)
        self._exports.settle_close(force)
        empty_cache(self.config.driver)
        if force:
            self._state.graph_pools.abandon()
            empty_cache(self.config.driver)
        elif len(self._state.graph_pools) and self._only_graph_pools_are_left():
            self._state.graph_pools.release_all()
            empty_cache(self.config.driver)
        try:
            self._core.close(force)
        finally:
            if self._core.closed:  # also if the driver refused to take something back
                self._retire()

    def _retire(self) -> None:
        """Ends what a closed allocator leaves: the shared instance, its server, its file."""
        with _instance_lock:
            if CuMemAllocator._instance is self:
                CuMemAllocator._instance = None
        self._exports.close()
        if self._publisher is not None:
            self._publisher.close()

    def _only_graph_pools_are_left(self) -> bool:
        """Whether closing is possible once graph pools without live graphs are released."""
        self._state.graph_pools.refuse_close()
        unused = self._state.graph_pools.unused_segments()
        return not open_tags(self._state, self.stats().tags) and all(
            info.address in unused for info in self.snapshot()
        )


def _observer_of(core: _core.Allocator, config: CuMemConfig, progress: ProgressWatch) -> Observer:
    """Makes the observer of an allocator, which refers to the core only.

    In a reference cycle with its observer, the allocator would outlive its last reference.
    """
    directory = config.out_of_memory_directory
    return Observer(
        partial(stats_of, core),
        partial(allocations_of, core),
        partial(cached_ranges, config.driver),
        during=[progress.watching, *([nvtx_range] if config.nvtx else [])],
        directory=None if directory is None else Path(directory),
    )
