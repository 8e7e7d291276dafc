"""`CuMemAllocator`: tagged pools of device memory that sleep and wake.

What programs call, and what each call promises. The work is done in modules of their own, which the
imports below name.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, overload

from cumempool._locks import fork_safe_lock
from cumempool._pool import transition
from cumempool._pool.backup import Backup, check_backup
from cumempool._pool.backup_view import view_backup
from cumempool._pool.devices import Devices
from cumempool._pool.events import EventLog, Observer
from cumempool._pool.graph_pool import GraphPools
from cumempool._pool.hooks import (
    Hook,
    HookRegistration,
    Hooks,
    Pin,
    RegistrableRange,
    Transitions,
    pin_tag,
    ranges_by_tag,
)
from cumempool._pool.preserve import preserve_tensors, preserving_scope
from cumempool._pool.progress import OnProgress, ProgressRegistration, ProgressWatch
from cumempool._pool.publishing import Publisher, publish
from cumempool._pool.report import TransitionReport
from cumempool._pool.scope import MemoryPoolScope, NullScope, open_tags
from cumempool._pool.sizes import check_margin
from cumempool._pool.sleep_plan import plan_discard, plan_sleep, takes_offload_tags_first
from cumempool._pool.state import PoolState
from cumempool._pool.stats import AllocationInfo, Stats, allocations_of, stats_of
from cumempool._pool.tags import (
    DEFAULT_TAG,
    Backing,
    OnSleep,
    OnWake,
    Tags,
    check_tag,
    check_tags,
    check_text,
)
from cumempool._pool.tensors import empty_tensor
from cumempool._pool.torch_state import cached_ranges, empty_cache, nvtx_range
from cumempool._pool.waking import WakeHandle, addresses_of, memory_of
from cumempool.config import CuMemConfig
from cumempool.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from cumempool.probe import open_driver
from cumempool.sharing.exports import Exports
from cumempool.sharing.importer import Export, SharedMemory, install_reducers

if TYPE_CHECKING:
    import torch

    from cumempool import _core

__all__ = ["DEFAULT_TAG", "Backing", "CuMemAllocator", "OnSleep", "OnWake"]

_instance_lock = fork_safe_lock()


class CuMemAllocator:
    """Allocates device memory under tags; puts tags to sleep and wakes them at the same addresses.

    Several may live in one process. All methods may be called from any thread; transitions
    (`sleep`, `wake_up`, `swap`, `discard`) of one allocator run one after another, and allocating,
    freeing and reading statistics go on meanwhile.

    Args:
        config: Which driver, and the limits. None takes ``CuMemConfig()``.

    Raises:
        UnavailableError: The driver cannot be opened here, with the reason. An allocator on
            ``cuda`` never turns into one on ``host`` by itself.
    """

    _instance: CuMemAllocator | None = None

    def __init__(self, config: CuMemConfig | None = None) -> None:
        if config is not None and not isinstance(config, CuMemConfig):
            raise InvalidTypeError(f"config is a CuMemConfig or None, not {config!r}")
        from cumempool import _core

        self.config: Final = config or CuMemConfig()
        driver = open_driver(self.config)
        overflow = self.config.host_backup_overflow
        self._core = _core.Allocator(
            driver,
            self.config.host_backup_limit or 0,
            self.config.retain_backups,
            overflow._to_core() if overflow is not None else None,
        )
        self._progress: Final = ProgressWatch(self._core.progress)
        devices = Devices(driver, self.config.driver)
        tags = Tags(self._core, devices)
        self._exports: Final = Exports(self._core, tags, devices, self.config.driver)
        self._state: Final = PoolState(
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

    @property
    def enabled(self) -> bool:
        """False where the configuration says ``enable_cumem_allocator=False``.

        Then scopes are null scopes, `empty` gives ordinary memory, `adopt` and `preserve` leave all
        as it is, and what would put memory to sleep is an `UnsupportedError`.
        """
        return self.config.enable_cumem_allocator is not False

    def _check_enabled(self, operation: str) -> None:
        if not self.enabled:
            raise UnsupportedError(
                f"{operation}: the allocator is switched off (enable_cumem_allocator=False), and "
                "nothing of it can sleep; leave that setting out",
                operation=operation,
                advice="leave that setting out",
            )

    @classmethod
    def get_instance(cls, config: CuMemConfig | None = None) -> CuMemAllocator:
        """The allocator that the parts of a program share; made at the first call.

        Never one that is closed: after `close` the next call makes another. Where threads meet in
        the first call, each may open a driver; all of them get the allocator of the fastest.

        Args:
            config: For the first call. Later on None, or the same configuration.

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
        """The shared allocator, unless it is closed."""
        shared = cls._instance
        return None if shared is None or shared._core.closed else shared

    # ---- allocating ----------------------------------------------------------------------------

    def use_memory_pool(
        self,
        tag: str = DEFAULT_TAG,
        *,
        on_sleep: OnSleep | None = None,
        on_wake: OnWake | None = None,
        backup: Backup | str | None = None,
        devices: Sequence[int] | None = None,
        backing: Backing | None = None,
        peers: Literal["all"] | Sequence[int] | None = None,
        rdma: bool | None = None,
        all_threads: bool = False,
    ) -> MemoryPoolScope:
        """A context manager: what this thread allocates inside comes from a pool under `tag`.

        Scopes nest, and the innermost one counts; a tag may be entered again. Other threads are not
        affected, unless `all_threads`. On leaving, unused segments go back at once (where other
        scopes are open, with the last of them, since torch frees nothing before); segments whose
        tensors die later go back at ``torch.cuda.empty_cache()``. On the ``host`` driver torch
        cannot be routed: there, the scope sets the tag that `empty` takes when it is given none.

        Args:
            tag: 1 to 255 bytes of UTF-8.
            on_sleep: The tag's own policy, which calls that do not name the tag follow.
            on_wake: What discarded memory of the tag holds after a wake: anything, or zero bytes.
            backup: Where contents of the tag are kept while it sleeps; see `set_backup`.
            devices: Ordinals to route on. None: the current device and every other one in use.
            backing: What memory of the tag is made of: ``"vmm"`` (what holds for tags that were
                never given one), or ``"cuda_malloc"``, which others can register that know no
                virtual memory, and which can neither sleep nor be shared.
            peers: Devices that get access to the memory beside its own, now and at each wake:
                their ordinals, ``()`` for none, or ``"all"`` that can. Where nobody has chosen, it
                is the devices that the process uses: one that it comes to use later is let in by
                the next allocation, scope or transition. None leaves it as it was. Memory of
                ``"cuda_malloc"`` takes none here: ``cudaDeviceEnablePeerAccess`` is for all of it.
            rdma: Whether memory of the tag is made for GPUDirect RDMA where the device grants it
                (what holds for tags that were never told). Without, no network card, GPUDirect
                Storage or GDRCopy can reach it, and ``libcuda`` makes one call less to the kernel
                at each map and unmap. None leaves it as it was.
            all_threads: Take what every other thread allocates as well, for as long as the scope is
                open; ``backward()`` runs in threads of autograd, and gradients land in the pool. A
                scope that a thread enters meanwhile is its own.

        Raises:
            InvalidArgumentError: A tag, policy or device that does not exist.
            UnsupportedError: No device can reach the peer that `backup` names.
            InUseError: Memory of the tag lives that was made otherwise than `backing`, `peers` and
                `rdma` say. On entering with `all_threads`: another thread has a scope open.
            OutOfSlotsError: On entering: too many scopes are open at the same time.
            ClosedError: The allocator is closed.
        """
        if not isinstance(all_threads, bool):
            raise InvalidTypeError(f"all_threads is a bool, not {all_threads!r}")
        if not self.enabled:
            return NullScope(self._state, check_tag(tag), devices, all_threads=all_threads)
        place = None if backup is None else check_backup(backup, "backup")
        self._state.tags.declare(tag, on_sleep, on_wake)
        if place is not None:
            self._core.set_backup(tag, *place._to_core())
        if not (backing is None and peers is None and rdma is None):
            self._state.tags.set_memory(tag, backing, peers, rdma)
        if devices is not None:
            devices = self._state.devices.check_routed(devices)
        return MemoryPoolScope(self._state, tag, devices, all_threads=all_threads)

    def set_backup(self, tag: str, backup: Backup | str) -> None:
        """Says where the contents of a tag are kept from its next sleep on.

        What sleeps already stays where it is.

        Args:
            tag: A tag that was used before.
            backup: ``"pinned"`` (what holds for tags that were never given one), ``"pageable"``,
                ``"file:/directory"``, ``"peer:1"``, or a `Backup`.

        Raises:
            UnknownTagError: A tag that was never used.
            InvalidArgumentError: A backup or a device that does not exist.
            UnsupportedError: No device can reach the peer.
            ClosedError: The allocator is closed.
        """
        self._core.set_backup(check_tag(tag), *check_backup(backup, "backup")._to_core())

    def empty(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        tag: str | None = None,
    ) -> torch.Tensor:
        """A contiguous tensor with undefined contents and an allocation of its own.

        No caching allocator stands between: deleting the last reference gives the memory back, and
        the whole allocation is one handle, as memory registration needs it.

        Args:
            size: The shape, as one sequence or as integers.
            dtype: Element type; None takes torch's default.
            device: None: the current CUDA device; on the ``host`` driver, the CPU. An integer names
                a device of the driver.
            tag: None: the tag of the innermost open scope of this thread and allocator, else
                ``"default"``.

        Raises:
            InvalidArgumentError: A negative or huge size, or a device that does not exist.
            OutOfMemoryError: The device has no room, even with torch's cache emptied.
            ClosedError: The allocator is closed.
        """
        return empty_tensor(self._state, size, dtype, device, tag)

    def graph_pool(
        self, tag: str, *, device: torch.device | str | int | None = None
    ) -> tuple[int, int]:
        """The id of a pool that CUDA graphs are captured into: ``torch.cuda.graph(g, pool=...)``.

        The memory of the graphs sleeps and wakes with the tag, at the same addresses and with its
        contents, so they replay as before. All of it is kept while a graph lives, which may read
        what torch has as free. While it sleeps they must not be replayed. The id is the same for a
        tag and device until `release_graph_pool` or `close`, and the pool holds a slot as long. Ask
        for it before each capture: captures do not go with memory that sleeps.

        Args:
            tag: 1 to 255 bytes of UTF-8.
            device: None: the current CUDA device.

        Raises:
            UnsupportedError: The ``host`` driver has no CUDA graphs; or torch before 2.11 has
                expandable segments on.
            InUseError: Memory of the pool is asleep: torch would hand out parts of it.
            InvalidArgumentError: A tag or a device that does not exist.
            OutOfSlotsError: Too many scopes and graph pools are open at the same time.
            ClosedError: The allocator is closed.
        """
        if self.config.driver == "cuda" and not self.enabled:
            import torch

            return torch.cuda.graph_pool_handle()
        self._state.tags.declare(tag, None, None)
        if self.config.driver != "cuda":
            raise UnsupportedError(
                f"graph_pool: the {self.config.driver} driver has no CUDA graphs; "
                "use the cuda driver",
                operation="graph_pool",
                tag=tag,
                advice="use the cuda driver",
            )
        self._state.before_tensors()
        return self._state.graph_pools.open(tag, self._state.devices.resolve(device)[0])

    def release_graph_pool(
        self, tag: str, *, device: torch.device | str | int | None = None
    ) -> int:
        """Gives up the graph pools of a tag; their ids must not be captured into any more.

        Memory of graphs that live stays, and sleeps and wakes as before, until they are deleted.

        Args:
            tag: The tag.
            device: None: those on every device.

        Returns:
            How many pools there were.

        Raises:
            InvalidArgumentError: A device that does not exist.
        """
        ordinal = None if device is None else self._state.devices.resolve(device)[0]
        return self._state.graph_pools.release(check_tag(tag), ordinal)

    def preserve_contents(self) -> MemoryPoolScope:
        """A context manager inside a `use_memory_pool` scope: what it takes keeps its contents.

        For what cannot be made again in a tag that is discarded: rotary caches, quantization
        scales. Such memory sleeps and wakes with its tag and is backed up at each sleep, also where
        the call or the tag's policy discards the tag, and at `discard`. It is for this thread only.

        Raises:
            InvalidArgumentError: No scope is open.
            OutOfSlotsError: On entering: too many scopes are open at the same time.
        """
        return preserving_scope(self._state)

    def preserve(self, what: torch.nn.Module | torch.Tensor | Iterable[torch.Tensor]) -> int:
        """Has contents kept from now on wherever their tag is discarded, as `preserve_contents`.

        Nothing is moved: it goes for the whole allocation that a tensor lies in, so that what torch
        has put beside it is backed up as well. Waits for a transition of another thread.

        Args:
            what: A tensor, some of them, or a module: its buffers.

        Returns:
            Bytes of the allocations that they lie in.

        Raises:
            NotInPoolError: Memory that is not of this allocator. Nothing is preserved then.
            InvalidTypeError: Something that is no tensor.
            TransitionInProgressError: Called from inside a transition.
        """
        return preserve_tensors(self._state, what)

    def set_memory_margin(self, margin: int) -> None:
        """Has allocations fail for lack of memory where less than that would stay free.

        Free for other libraries and processes on the device. It concerns what is allocated from now
        on, in scopes too, where torch empties its cache and tries once more; wakes take all there
        is.

        Args:
            margin: Bytes; 0, as at the start, for none.

        Raises:
            InvalidArgumentError: A negative or huge number.
        """
        self._core.set_memory_margin(check_margin(margin))

    def adopt(
        self,
        what: torch.nn.Module | torch.optim.Optimizer,
        tag: str = "weights",
        *,
        gradients: bool | str = False,
        preserve_buffers: bool = False,
    ) -> int:
        """Moves a module's parameters and buffers, or an optimizer's state, into the pool, packed.

        Tensors keep their identity, class and attributes; tied weights, views of one storage and
        strides stay as they are. Old storage is freed as far as nothing else refers to it. It does
        not matter in which mode this is called (``no_grad``, ``inference_mode``): inference tensors
        stay such, and ordinary ones can be trained as before.

        Buffers on the CPU stay there; parameters on another device, or on ``meta``, are refused.

        State that an optimizer makes later, in its first step for example, or takes from
        ``load_state_dict``, is moved after the step that made it, unless it is under the tag
        already: take that step inside ``use_memory_pool(tag)``, and nothing has to be moved. State
        on the CPU stays there. Gradients that are made later are caught by
        ``use_memory_pool(tag, all_threads=True)`` around ``backward()``.

        Args:
            what: The module, on the device of this allocator; or the optimizer.
            tag: The tag to move it under.
            gradients: Move the gradients that a module's parameters have now as well, under the
                same tag, or under the one that is named.
            preserve_buffers: Keep the contents of a module's buffers where the tag is discarded;
                see `preserve_contents`.

        Returns:
            Bytes of device memory allocated for it; 0 where all of it was under the tag already.

        Raises:
            InvalidTypeError: It is neither, or a tensor of it is of a kind that cannot be moved,
                such as a subclass that keeps its memory in other tensors; the message names it.
                Nothing was moved.
            InvalidArgumentError: A tensor of it is asleep under another tag. Nothing was moved.
            OutOfMemoryError: The device has no room; what was moved so far stays moved.
        """
        from cumempool._pool.optimizer import adopt_object

        if not isinstance(gradients, bool):
            check_tag(gradients)
        if not isinstance(preserve_buffers, bool):
            raise InvalidTypeError(f"preserve_buffers is a bool, not {preserve_buffers!r}")
        if not self.enabled:
            return 0
        return adopt_object(self._state, what, check_tag(tag), gradients, preserve_buffers)

    # ---- transitions ---------------------------------------------------------------------------

    @takes_offload_tags_first
    def sleep(
        self,
        tags: Sequence[str] | str | None = None,
        *,
        offload_tags: Sequence[str] | str | None = None,
    ) -> TransitionReport:
        """Gives the physical memory of tags back; addresses stay reserved.

        All or nothing: on failure everything is awake as before. Work in flight is finished first.
        Hooks of `register_hooks` are called before, and cancel it where they raise.
        Only live bytes are backed up: blocks that torch has cached as free are not. Of those, only
        what has changed since the last sleep is copied, where that backup was kept
        (``retain_backups``); the report counts the others as clean.

        Contents are kept, but for tags that were told ``on_sleep="discard"``.

        Args:
            tags: Touch only these. None: all.
            offload_tags: Tags whose contents are kept; those of all others are discarded, whatever
                their own policy says (the report lists such overrides), as vLLM's allocator does.
                None: each tag follows its own policy, and is kept where it has none.

        Raises:
            UnknownTagError: A tag that was never used.
            InUseError: A scope of one of the tags is open, or a tag is pinned: by `pin`, or by
                another process that has its memory open.
            StreamCaptureError: The calling thread's current stream is being captured.
            TransitionInProgressError: Called from inside a transition.
            OutOfHostMemoryError: No host memory for the backup, or over ``host_backup_limit``.
            OutOfMemoryError: The peer device has no room for the backup.
            BackupError: A backup file cannot be made or written: a missing directory, a full disk.
            UnsupportedError: A device of the tag cannot reach its peer, or memory of the tag is of
                ``backing="cuda_malloc"``.
            ClosedError: The allocator is closed.
            DriverError: A driver call failed.
        """
        self._check_enabled("sleep")
        actions, overrides = plan_sleep(self._core, tags, offload_tags)
        return transition.sleep(self._state, "sleep", actions, overrides, drop_backups=False)

    @overload
    def prepare(
        self,
        tags: Sequence[str] | str | None = ...,
        *,
        offload_tags: Sequence[str] | str | None = ...,
        background: Literal[False] = ...,
    ) -> int: ...

    @overload
    def prepare(
        self,
        tags: Sequence[str] | str | None = ...,
        *,
        offload_tags: Sequence[str] | str | None = ...,
        background: Literal[True],
    ) -> Future[int]: ...

    @takes_offload_tags_first
    def prepare(
        self,
        tags: Sequence[str] | str | None = None,
        *,
        offload_tags: Sequence[str] | str | None = None,
        background: bool = False,
    ) -> int | Future[int]:
        """Pins the host memory that a `sleep` with the same arguments will need, ahead of it.

        Pinning is what makes a first sleep slower than later ones. A transition that starts while
        this runs waits for it.

        Args:
            tags: As for `sleep`.
            offload_tags: As for `sleep`.
            background: Run in a thread of its own and return at once.

        Returns:
            Bytes pinned beyond what was there; with `background`, a future of that number, which
            can be cancelled until the thread has begun.

        Raises:
            UnknownTagError: A tag that was never used.
            InUseError: A tag is pinned and has no hooks that could take the pin off, so that the
                sleep would be refused.
            UnsupportedError: Memory of a tag is of ``backing="cuda_malloc"``.
            OutOfHostMemoryError: There is not so much host memory, or it is over
                ``host_backup_limit``.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        self._check_enabled("prepare")
        actions, _ = plan_sleep(self._core, tags, offload_tags)
        return transition.prepare(self._state, actions, background=background)

    def discard(self, tags: Sequence[str] | str) -> TransitionReport:
        """Puts tags to sleep without keeping their contents.

        Where memory of the tags sleeps already with a backup, the backup is dropped.

        Raises:
            As `sleep`.
        """
        self._check_enabled("discard")
        actions, overrides = plan_discard(self._core, tags)
        return transition.sleep(self._state, "discard", actions, overrides, drop_backups=True)

    @overload
    def wake_up(
        self, tags: Sequence[str] | str | None = ..., *, blocking: Literal[True] = ...
    ) -> TransitionReport: ...

    @overload
    def wake_up(
        self,
        tags: Sequence[str] | str | None = ...,
        *,
        blocking: Literal[False],
        first: Iterable[torch.Tensor] = ...,
    ) -> WakeHandle: ...

    def wake_up(
        self,
        tags: Sequence[str] | str | None = None,
        *,
        blocking: bool = True,
        first: Iterable[torch.Tensor] = (),
    ) -> TransitionReport | WakeHandle:
        """Maps physical memory at the old addresses and restores what was backed up.

        All or nothing: on failure everything is still asleep with its backup, and the call can be
        repeated. When it returns, the contents are visible to every stream, and hooks of
        `register_hooks` have been called; what they failed with is among the report's problems.
        Where the device has no room, torch's cache is emptied and the wake tried once more.

        Args:
            tags: Wake only these. None: all.
            blocking: False returns a handle as soon as it is known that there is room. Tensors are
                ready in order of allocation; ``handle.wait(tensor)`` comes before a tensor is used.
                Other transitions wait for the end.
            first: With ``blocking=False``: tensors whose allocations come before all others.

        Raises:
            UnknownTagError: A tag that was never used.
            OutOfMemoryError: The device has no room (also a ``RuntimeError``).
            StreamCaptureError: The calling thread's current stream is being captured.
            TransitionInProgressError: Called from inside a transition.
            BackupError: A backup file could not be read; `BackupDamagedError` where it does not
                hold what was written to it.
            NotInPoolError: A tensor of `first` is not of this allocator.
            ClosedError: The allocator is closed.
            DriverError: A driver call failed.
        """
        if not isinstance(blocking, bool):
            raise InvalidTypeError(f"blocking is a bool, not {blocking!r}")
        chosen = None if tags is None else list(check_tags(tags, "tags"))
        addresses = addresses_of(first)
        if blocking and addresses:
            raise InvalidArgumentError("`first` goes with blocking=False: else all come at once")
        if not blocking:
            return transition.begin_wake(self._state, chosen, addresses)
        return transition.wake(self._state, chosen)

    def swap(
        self,
        *,
        sleep: Sequence[str] | str,
        wake: Sequence[str] | str | None = None,
        offload_tags: Sequence[str] | str | None = None,
    ) -> TransitionReport:
        """Puts tags to sleep while others wake: one transition, both directions of the link busy.

        All or nothing: on failure both are as they were. Needs no more device memory than what is
        free and what the sleep gives back. Where that is not enough, torch's cache is emptied and
        the swap tried once more.

        Args:
            sleep: The tags to put to sleep.
            wake: The tags to wake; none of them may be in `sleep`. None: all others that sleep.
            offload_tags: As for ``sleep(tags, offload_tags=...)``.

        Raises:
            As `sleep` and `wake_up`.
        """
        self._check_enabled("swap")
        named = check_tags(sleep, "sleep")
        chosen = None if wake is None else list(check_tags(wake, "wake"))
        actions, overrides = plan_sleep(self._core, named, offload_tags)
        return transition.swap(self._state, actions, overrides, chosen)

    def read_backup(self, tensor: torch.Tensor, *, writable: bool = False) -> torch.Tensor:
        """The backup of a sleeping tensor as a tensor on the CPU, without a copy.

        It keeps the memory that it shows: while it lives, the allocator cannot be closed without
        force. After the wake it shows what was restored. A backup that was put together of several
        pieces of free host memory is joined first, which takes its size once more. Pinned memory
        can be copied to a device as a whole; for that, the first call that meets the border of two
        blocks of 64 MiB pins the blocks about it anew, at some 50 GB/s.

        Without `writable`, operations that would write to it or to its views raise
        `InvalidArgumentError` (a ``ValueError``) and change nothing, NumPy arrays of it are
        read-only, and DLPack is refused; what else is made of it is ordinary tensors. Not
        protected from: its address and its storage, and the few operations that do not declare
        what they write, such as running statistics of ``batch_norm``.

        Args:
            tensor: A tensor or view of memory that sleeps with a backup; also a part of it.
            writable: Give an ordinary tensor: what is written to it is what the next wake restores.

        Returns:
            A tensor of the same shape, dtype and strides, without a gradient.

        Raises:
            InvalidTypeError: It is no tensor, or a quantized one.
            NotInPoolError: Its memory is not of this allocator.
            InvalidArgumentError: It is awake, its contents were discarded, or the bytes from its
                first to its last element are not all in the backup.
            UnsupportedError: The backup is on a peer device.
            OutOfHostMemoryError: The backup is in pieces, and there is no room to join them, or
                the system does not let its blocks be pinned as one.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        return view_backup(self._core, tensor, writable)

    def release_host_memory(self) -> int:
        """Gives back host memory that holds no contents of what sleeps; returns its bytes.

        That is free room, backups kept of what is awake (the next sleep copies all of it), and
        buffers.

        Raises:
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        return self._core.release_host_memory()

    # ---- memory that others know of ------------------------------------------------------------

    def registrable_ranges(self, tag: str) -> list[RegistrableRange]:
        """What is awake of a tag, for whoever registers memory: one range per allocation.

        Each lies inside one handle, as registrations need it. A registration is stale when the
        generation has grown.

        Raises:
            UnknownTagError: A tag that was never used.
        """
        self._state.tags.check_known(tag, "registrable_ranges")
        infos = self._state.snapshot()
        return ranges_by_tag(i for i in infos if i.state == "awake" and i.tag == tag).get(tag, [])

    def register_hooks(
        self,
        tag: str,
        *,
        before_unmap: Hook | None = None,
        after_map: Hook | None = None,
    ) -> HookRegistration:
        """Has functions called around each sleep, discard, swap and wake of a tag.

        They are called in the order of registration, with the tag and the ranges concerned, in the
        thread of the transition; after ``wake_up(blocking=False)`` in that of ``result()``, or of
        the transition that comes next. They may pin and unpin, and must start no transition. Where
        nothing of the tag goes or comes, they are not called, nor for a wake that was under way
        when they were registered.

        Args:
            tag: A tag that was used before.
            before_unmap: Called before memory goes. Where it raises, the transition is cancelled
                with nothing changed, and hooks that ran before it get their ``after_map`` called;
                so they do where the transition fails later.
            after_map: Called after memory has come. Where it raises, the memory stays awake, and
                the report of the transition lists it among its problems.

        Returns:
            What takes them out again, by ``remove()`` or as a context manager.

        Raises:
            UnknownTagError: A tag that was never used.
            InvalidTypeError: A hook that cannot be called.
        """
        self._state.tags.check_known(tag, "register_hooks")
        return self._state.hooks.register(tag, before_unmap, after_map)

    def pin(self, tag: str, holder: str = "an unnamed holder") -> Pin:
        """Forbids that memory of a tag goes to sleep, for whoever has it registered.

        Waits for a transition of another thread.

        Args:
            tag: A tag that was used before.
            holder: What refused sleeps call whoever holds the pin.

        Returns:
            The pin; ``release()`` or the end of a ``with`` block takes it off.

        Raises:
            UnknownTagError: A tag that was never used.
            InvalidArgumentError: The holder has no name.
            ClosedError: The allocator is closed.
        """
        return pin_tag(self._core, check_tag(tag), check_text(holder, "holder"))

    def share(
        self, what: torch.Tensor | str, *, writable: bool = True, fabric: bool = False
    ) -> SharedMemory:
        """A descriptor by which other processes of the same user can open memory: `open_shared`.

        It can be pickled, and says nothing to other users. It holds nothing: the memory has to
        live until it is opened, and is stale once it has slept. (What is sent through
        `torch.multiprocessing` is kept until it was received.) While others have it open, the tag
        cannot sleep. A process that opens it gets the whole of each allocation; a tensor inside a
        pool scope shares its allocation with others.

        Args:
            what: A tensor of this allocator; or a tag: all of it that is awake.
            writable: False grants reading only. (Which keeps honest programs from writing: whoever
                gets a descriptor has the rights of this user.)
            fabric: Put the memory's FABRIC handles into the descriptor, for processes on other
                hosts of the NVLink domain. **Whoever has such a descriptor can map the memory**, to
                read and to write, and nobody can tell who does. The tag cannot sleep until it is
                revoked, and handles that were given out stay good for as long as anybody has the
                memory mapped.

        Raises:
            NotInPoolError: The tensor's memory is not of this allocator.
            UnknownTagError: A tag that was never used.
            InvalidArgumentError: It sleeps, or there is nothing of it.
            InvalidTypeError: Neither a tensor nor a tag, or a tensor that is more than its bytes.
            UnsupportedError: It is of ``backing="cuda_malloc"``, or has no handles to be shared by.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        return self._exports.share(what, writable, fabric)

    def exports(self) -> list[Export]:
        """What other processes keep awake: what they have open, and messages not received yet.

        The oldest first. A message that nobody will receive, since its queue or its receiver is
        gone, keeps its memory until `revoke`, ``close(force=True)``, or the end of the process.
        FABRIC handles that descriptors carry are not in it.
        """
        return self._exports.list()

    def revoke(self, tag: str) -> int:
        """Withdraws what was shared of a tag, so that it can sleep.

        Messages that were sent and not received yet are lost; the memory that they kept is freed.
        Importers keep what they have mapped, and the device keeps that memory for them until they
        close it; from the next wake on, it is another one than the owner's. FABRIC handles that
        descriptors carry cannot be taken back: they open the memory as long as there is any.

        Args:
            tag: A tag that was used before.

        Returns:
            How many other openings that has ended.

        Raises:
            UnknownTagError: A tag that was never used.
        """
        return self._exports.revoke(tag)

    # ---- what there is -------------------------------------------------------------------------

    def get_current_usage(self) -> int:
        """Bytes of device memory that are awake, over all tags."""
        return self.stats().awake_bytes

    def stats(self) -> Stats:
        """Bytes per tag and state, and totals. Cheap; works on a closed allocator too."""
        return self._state.stats()

    def snapshot(self) -> list[AllocationInfo]:
        """Every live allocation, in order of allocation."""
        return self._state.snapshot()

    def tag_of(self, tensor: torch.Tensor) -> str:
        """The tag of the allocation that holds a tensor's memory.

        Raises:
            InvalidTypeError: It is no tensor.
            NotInPoolError: Its memory is not of this allocator, or it has none.
        """
        return self.allocation_of(tensor).tag

    def allocation_of(self, tensor: torch.Tensor) -> AllocationInfo:
        """The allocation that holds a tensor's memory.

        Raises:
            InvalidTypeError: It is no tensor.
            NotInPoolError: Its memory is not of this allocator, or it has none.
        """
        return self._state.allocation_at(memory_of(tensor))

    def close(self, force: bool = False) -> None:
        """Gives everything back. Closing twice is no error.

        Args:
            force: Close although memory is in use: physical memory and backups go, contents are
                lost, and tensors that are still there must not be touched. Their addresses stay
                reserved until they are deleted, so that a late access faults and reads nobody
                else's memory. Memory of ``backing="cuda_malloc"`` stays until it is deleted.

        Raises:
            InUseError: Without `force`: tensors or CUDA graphs live, scopes are open, backups are
                being read, or messages that were sent were not received; nothing was changed.
            DriverError: The driver did not take something back.
        """
        if not isinstance(force, bool):
            raise InvalidTypeError(f"force is a bool, not {force!r}")
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
            if self._core.closed:  # also where the driver did not take something back
                self._retire()

    def _retire(self) -> None:
        """Ends what a closed allocator leaves behind: its shared place, its server, its file."""
        with _instance_lock:
            if CuMemAllocator._instance is self:
                CuMemAllocator._instance = None
        self._exports.close()
        if self._publisher is not None:
            self._publisher.close()

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<{type(self).__name__} on {self.config.driver}: {len(stats.tags)} tags, "
            f"{stats.awake_bytes} bytes awake, {stats.asleep_bytes} asleep>"
        )

    @property
    def events(self) -> EventLog:
        """The latest transitions, and failures of them and of allocations; oldest first."""
        return self._state.observer.log

    def on_progress(
        self,
        callback: OnProgress,
        *,
        after: float = 1.0,
        ended: Callable[[], object] | None = None,
    ) -> ProgressRegistration:
        """Has a callback told how far long transitions have come, about ten times a second.

        Not for wakes in the background, whose handle tells. See also `show_progress`.

        Args:
            callback: Called with the operation, the bytes done, and the bytes in all, from a thread
                of its own; at the end of a transition that succeeded with all of them. What it
                raises is logged.
            after: Seconds that a transition may take before the first call.
            ended: Called after the last call for a transition, however that ended.

        Returns:
            What takes it out again; a context manager.

        Raises:
            InvalidTypeError: It cannot be called, or `after` is no number.
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
        """A context manager that writes a trace: each event meanwhile, as a line of JSON.

        ``cumempool report`` renders it.

        Raises:
            OSError: On entering: the file cannot be made.
        """
        return self._state.observer.recording(Path(path))

    def _only_graph_pools_are_left(self) -> bool:
        """Whether closing is possible once graph pools are released, in which no graph lives."""
        self._state.graph_pools.refuse_close()
        unused = self._state.graph_pools.unused_segments()
        return not open_tags(self._state, self.stats().tags) and all(
            info.address in unused for info in self.snapshot()
        )


def _observer_of(core: _core.Allocator, config: CuMemConfig, progress: ProgressWatch) -> Observer:
    """What observes an allocator: its core, and not itself.

    In a cycle with its observer it would outlive its last reference.
    """
    directory = config.out_of_memory_directory
    return Observer(
        partial(stats_of, core),
        partial(allocations_of, core),
        partial(cached_ranges, config.driver),
        during=[progress.watching, *([nvtx_range] if config.nvtx else [])],
        directory=None if directory is None else Path(directory),
    )
