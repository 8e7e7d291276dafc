"""`CuMemAllocator`: tagged pools of device memory that sleep and wake."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, overload

from cumempool.backup import Backup, check_backup
from cumempool.config import CuMemConfig
from cumempool.errors import (
    CumempoolError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    OutOfMemoryError,
    UnknownTagError,
    UnsupportedError,
)
from cumempool.events import EventLog, Observer
from cumempool.graph_pool import GraphPools
from cumempool.guard import (
    Arrival,
    Hook,
    HookRegistration,
    Hooks,
    Pin,
    RegistrableRange,
    Transitions,
)
from cumempool.probe import open_driver
from cumempool.progress import OnProgress, ProgressRegistration, ProgressWatch
from cumempool.publishing import Publisher
from cumempool.report import TransitionReport
from cumempool.scope import MemoryPoolScope, current_scope, open_tags
from cumempool.sharing import Endpoint, SharedMemory, SharedRange, install_reducers, layout_of
from cumempool.stats import AllocationInfo, Stats, TagStats
from cumempool.waking import WakeHandle, memory_of

if TYPE_CHECKING:
    import torch

    from cumempool import _core, _torch

__all__ = ["DEFAULT_TAG", "Backing", "CuMemAllocator", "OnSleep", "OnWake"]

DEFAULT_TAG: Final = "default"
"""The tag of allocations that name none; what a plain ``sleep()`` backs up."""

OnSleep = Literal["offload", "discard"]
OnWake = Literal["undefined", "zero"]
Backing = Literal["vmm", "cuda_malloc"]

_ON_SLEEP: Final[Mapping[str | None, int]] = {None: 0, "offload": 1, "discard": 2}
_ON_WAKE: Final[Mapping[str | None, int]] = {None: 0, "undefined": 1, "zero": 2}
_BACKING: Final[Mapping[str | None, int]] = {None: 0, "vmm": 1, "cuda_malloc": 2}
_OFFLOAD, _DISCARD = 1, 2
_ACTION_NAMES: Final = {_OFFLOAD: "offload", _DISCARD: "discard"}

_T = TypeVar("_T")

_LARGEST: Final = 2**62  # bytes; what the core takes, and what fits torch's sizes and strides

_instance_lock = threading.Lock()


def _check_tag(tag: object) -> str:
    if not isinstance(tag, str):
        raise InvalidTypeError(f"a tag is a str, not {type(tag).__name__}: {tag!r}")
    try:
        tag.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"the tag {tag!r} cannot be encoded as UTF-8: {error}") from None
    return tag


def _check_tags(tags: object, what: str) -> tuple[str, ...]:
    if isinstance(tags, str):
        return (_check_tag(tags),)
    if not isinstance(tags, Iterable):
        raise InvalidTypeError(f"{what} is a tag or an iterable of tags, not {tags!r}")
    return tuple(dict.fromkeys(_check_tag(tag) for tag in tags))


def _check_choice(value: object, allowed: Mapping[str | None, int], what: str) -> int:
    if value is not None and not isinstance(value, str):
        raise InvalidTypeError(f"{what} is a str or None, not {value!r}")
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise InvalidArgumentError(f"{what}={value!r} is not one of {names}")
    return allowed[value]


def _check_margin(margin: object) -> int:
    if not isinstance(margin, int) or isinstance(margin, bool):
        raise InvalidTypeError(f"a margin is a number of bytes, not {margin!r}")
    if not 0 <= margin <= _LARGEST:
        raise InvalidArgumentError(f"a margin of {margin} bytes does not exist")
    return margin


def _overrides(actions: Mapping[str, int], known: Mapping[str, TagStats]) -> dict[str, str]:
    """For each tag whose own policy says otherwise than its action, in what way."""
    return {
        tag: f"policy {known[tag].on_sleep}, call {_ACTION_NAMES[action]}"
        for tag, action in actions.items()
        if tag in known and known[tag].on_sleep not in (None, _ACTION_NAMES[action])
    }


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
        self._driver: _core.Driver = open_driver(self.config)
        overflow = self.config.host_backup_overflow
        self._core = _core.Allocator(
            self._driver,
            self.config.host_backup_limit or 0,
            self.config.retain_backups,
            overflow._to_core() if overflow is not None else None,
        )
        self._memory_lock = threading.Lock()
        self._memory: dict[str, tuple[int, bool, list[int]]] = {}
        self._hooks: Final = Hooks()
        self._transitions: Final = Transitions()
        self._endpoint_lock = threading.Lock()
        self._endpoint: Endpoint | None = None
        self._progress: Final = ProgressWatch(self._core.progress)
        directory = self.config.out_of_memory_directory
        # Not methods of this allocator: in a cycle it would outlive its last reference.
        self._observer: Final = Observer(
            partial(_stats_of, self._core),
            partial(_allocations_of, self._core),
            partial(_cached_ranges, self.config.driver),
            during=[
                self._progress.watching,
                *([_nvtx_range] if self.config.nvtx else []),
            ],
            directory=None if directory is None else Path(directory),
        )
        self._publisher: Publisher | None = None
        if self.config.publish:
            self._publisher = Publisher(
                self._observer.snapshot, self._observer.summary, Path(sys.argv[0]).name or "python"
            )
        self._graph_pools: Final = GraphPools(self._core)
        weakref.finalize(self, self._graph_pools.abandon).atexit = False
        self._has_preserved = False

    @classmethod
    def get_instance(cls, config: CuMemConfig | None = None) -> CuMemAllocator:
        """The allocator that the parts of a program share; made at the first call.

        Args:
            config: For the first call. Later on None, or the same configuration.

        Raises:
            InvalidArgumentError: The shared allocator has another configuration.
            UnavailableError: As for the constructor.
        """
        with _instance_lock:
            if cls._instance is None:
                cls._instance = cls(config)
            elif config is not None and config != cls._instance.config:
                raise InvalidArgumentError(
                    f"the shared allocator was made with {cls._instance.config}, not {config}; "
                    "close() it first, or make an allocator of your own"
                )
            return cls._instance

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
                their ordinals, or ``"all"`` that can. None leaves it as it was. Memory of
                ``"cuda_malloc"`` takes none here: ``cudaDeviceEnablePeerAccess`` is for all of it.
            all_threads: Take what every other thread allocates as well, for as long as the scope is
                open; ``backward()`` runs in threads of autograd, and gradients land in the pool. A
                scope that a thread enters meanwhile is its own.

        Raises:
            InvalidArgumentError: A tag, policy or device that does not exist.
            UnsupportedError: No device can reach the peer that `backup` names.
            InUseError: Memory of the tag lives that was made otherwise than `backing` and `peers`
                say. On entering with `all_threads`: another thread has a scope open.
            OutOfSlotsError: On entering: too many scopes are open at the same time.
            ClosedError: The allocator is closed.
        """
        if not isinstance(all_threads, bool):
            raise InvalidTypeError(f"all_threads is a bool, not {all_threads!r}")
        place = None if backup is None else check_backup(backup, "backup")
        self._declare(tag, on_sleep, on_wake)
        if place is not None:
            self._core.set_backup(tag, *place._to_core())
        if backing is not None or peers is not None:
            self._set_memory(tag, backing, peers)
        if devices is not None:
            devices = self._check_devices(devices)
        return MemoryPoolScope(self, tag, devices, all_threads=all_threads)

    def _set_memory(self, tag: str, backing: object, peers: object) -> None:
        """Changes what was given, and leaves the other as it was."""
        number = _check_choice(backing, _BACKING, "backing")
        if isinstance(peers, str) and peers != "all":
            raise InvalidArgumentError(f"peers={peers!r} is not 'all' or a sequence of ordinals")
        with self._memory_lock:
            before, every, reached = self._memory.get(tag, (_BACKING["vmm"], False, []))
            if peers is not None:
                every = peers == "all"
                reached = [] if every else self._check_ordinals(peers, "peers")
            elif number == _BACKING["cuda_malloc"]:
                every, reached = False, []  # such memory takes none here
            choice = (number or before, every, reached)
            self._core.set_memory(tag, *choice)
            self._memory[tag] = choice

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
        self._core.set_backup(_check_tag(tag), *check_backup(backup, "backup")._to_core())

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
        import torch

        from cumempool import _torch

        shape = _check_shape(size)
        dtype = dtype if dtype is not None else torch.get_default_dtype()
        if not isinstance(dtype, torch.dtype):
            raise InvalidTypeError(f"dtype is a torch.dtype or None, not {dtype!r}")
        scope = current_scope(self)
        if tag is None:
            tag = DEFAULT_TAG if scope is None else scope.tag
        self._declare(tag, None, None)
        preserved = scope is not None and scope.preserves and scope.tag == tag
        ordinal, on = self._resolve_device(device)
        span = math.prod(max(extent, 1) for extent in shape) * dtype.itemsize
        if span > _LARGEST:
            raise InvalidArgumentError(f"a shape of {span} bytes cannot be allocated", tag=tag)
        if 0 in shape:
            return torch.empty(shape, dtype=dtype, device=on)
        memory = self._allocate(tag, ordinal, span, preserved)
        return _torch.tensor_over(
            memory.untyped_storage(), dtype, shape, _contiguous_strides(shape), 0
        )

    def _empty_bytes(
        self, size: int, *, device: torch.device, tag: str, preserved: bool
    ) -> torch.Tensor:
        """A tensor of that many bytes, whatever scopes are open."""
        self._declare(tag, None, None)
        self._has_preserved = self._has_preserved or preserved
        return self._allocate(tag, self._resolve_device(device)[0], size, preserved)

    def _allocate(self, tag: str, device: int, size: int, preserved: bool) -> torch.Tensor:
        from cumempool import _torch

        install_reducers(self)
        try:
            capsule = self._with_room(
                lambda: self._core.malloc_capsule(tag, device, size, preserved)
            )
        except OutOfMemoryError as error:
            self._observer.note_failure("malloc", error)
            raise
        return _torch.from_capsule(capsule)

    def graph_pool(
        self, tag: str, *, device: torch.device | str | int | None = None
    ) -> tuple[int, int]:
        """The id of a pool that CUDA graphs are captured into: ``torch.cuda.graph(g, pool=...)``.

        The memory of the graphs sleeps and wakes with the tag, at the same addresses, so they
        replay as before; while it sleeps they must not be replayed. The id is the same for a tag
        and device until `release_graph_pool` or `close`, and the pool holds a slot as long. Ask for
        it before each capture: captures do not go with memory that sleeps.

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
        self._declare(tag, None, None)
        if self.config.driver != "cuda":
            raise UnsupportedError(
                f"graph_pool: the {self.config.driver} driver has no CUDA graphs; "
                "use the cuda driver",
                operation="graph_pool",
                tag=tag,
                advice="use the cuda driver",
            )
        install_reducers(self)
        return self._graph_pools.open(tag, self._resolve_device(device)[0])

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
        ordinal = None if device is None else self._resolve_device(device)[0]
        return self._graph_pools.release(_check_tag(tag), ordinal)

    def preserve_contents(self) -> MemoryPoolScope:
        """A context manager inside a `use_memory_pool` scope: what it takes keeps its contents.

        For what cannot be made again in a tag that is discarded: rotary caches, quantization
        scales. Such memory sleeps and wakes with its tag and is backed up at each sleep, also where
        the call or the tag's policy discards the tag, and at `discard`. It is for this thread only.

        Raises:
            InvalidArgumentError: No scope is open.
            OutOfSlotsError: On entering: too many scopes are open at the same time.
        """
        around = current_scope(self)
        if around is None:
            raise InvalidArgumentError(
                "preserve_contents() goes inside a use_memory_pool() scope, whose tag it takes",
                operation="preserve_contents",
                advice="enter use_memory_pool() first",
            )
        self._has_preserved = True
        return MemoryPoolScope(self, around.tag, around.devices, preserves=True)

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
        infos = {}
        for tensor in _tensors_of(what):
            if memory_of(tensor):
                info = self.allocation_of(tensor)
                infos[info.address] = info
        for address in infos:
            self._preserve(address)
        return sum(info.bytes for info in infos.values())

    def _preserve(self, address: int) -> None:
        self._has_preserved = True
        self._core.preserve(address)

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
        self._core.set_memory_margin(_check_margin(margin))

    def adopt(
        self,
        what: torch.nn.Module | torch.optim.Optimizer,
        tag: str = "weights",
        *,
        gradients: bool | str = False,
        preserve_buffers: bool = False,
    ) -> int:
        """Moves a module's parameters and buffers, or an optimizer's state, into the pool, packed.

        Tensors keep their identity; tied weights, views of one storage and strides stay as they
        are. Old storage is freed as far as nothing else refers to it.

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
            InvalidTypeError: It is neither, or a tensor of it is of a kind that cannot be moved;
                the message names it. Nothing was moved.
            InvalidArgumentError: A tensor of it is asleep under another tag. Nothing was moved.
            OutOfMemoryError: The device has no room; what was moved so far stays moved.
        """
        from cumempool.training import adopt_object

        if not isinstance(gradients, bool):
            _check_tag(gradients)
        if not isinstance(preserve_buffers, bool):
            raise InvalidTypeError(f"preserve_buffers is a bool, not {preserve_buffers!r}")
        return adopt_object(self, what, _check_tag(tag), gradients, preserve_buffers)

    # ---- transitions ---------------------------------------------------------------------------

    def sleep(
        self,
        offload_tags: Sequence[str] | str | None = None,
        *,
        tags: Sequence[str] | str | None = None,
    ) -> TransitionReport:
        """Gives the physical memory of tags back; addresses stay reserved.

        All or nothing: on failure everything is awake as before. Work in flight is finished first.
        Hooks of `register_hooks` are called before, and cancel it where they raise.
        Only live bytes are backed up: blocks that torch has cached as free are not. Of those, only
        what has changed since the last sleep is copied, where that backup was kept
        (``retain_backups``); the report counts the others as clean.

        Args:
            offload_tags: Tags whose contents are kept; those of the others are discarded, whatever
                their own policy says (the report lists such overrides). None: each tag follows its
                own policy, and where it has none, ``"default"`` is kept and others are discarded
                (or kept, where `tags` names them).
            tags: Touch only these. None: all.

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
        actions, overrides = self._plan_sleep(offload_tags, tags)
        return self._run_sleep("sleep", actions, overrides, drop_backups=False)

    @overload
    def prepare(
        self,
        offload_tags: Sequence[str] | str | None = ...,
        *,
        tags: Sequence[str] | str | None = ...,
        background: Literal[False] = ...,
    ) -> int: ...

    @overload
    def prepare(
        self,
        offload_tags: Sequence[str] | str | None = ...,
        *,
        tags: Sequence[str] | str | None = ...,
        background: Literal[True],
    ) -> Future[int]: ...

    def prepare(
        self,
        offload_tags: Sequence[str] | str | None = None,
        *,
        tags: Sequence[str] | str | None = None,
        background: bool = False,
    ) -> int | Future[int]:
        """Pins the host memory that a `sleep` with the same arguments will need, ahead of it.

        Pinning is what makes a first sleep slower than later ones. A transition that starts while
        this runs waits for it.

        Args:
            offload_tags: As for `sleep`.
            tags: As for `sleep`.
            background: Run in a thread of its own and return at once.

        Returns:
            Bytes pinned beyond what was there; with `background`, a future of that number.

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
        actions = list(self._plan_sleep(offload_tags, tags)[0].items())
        dead = self._dead_ranges(actions)
        # Hooks take pins off before a sleep.
        yielding = sorted(self._hooks.yielding().intersection(tag for tag, _ in actions))
        if not background:
            return self._core.prepare(actions, dead, yielding)
        future: Future[int] = Future()

        def run() -> None:
            try:
                future.set_result(self._core.prepare(actions, dead, yielding))
            except CumempoolError as error:
                future.set_exception(error)

        threading.Thread(target=run, name="cumempool-prepare", daemon=True).start()
        return future

    def discard(self, tags: Sequence[str] | str) -> TransitionReport:
        """Puts tags to sleep without keeping their contents.

        Where memory of the tags sleeps already with a backup, the backup is dropped.

        Raises:
            As `sleep`.
        """
        actions = dict.fromkeys(_check_tags(tags, "tags"), _DISCARD)
        overrides = _overrides(actions, self.stats().tags)
        return self._run_sleep("discard", actions, overrides, drop_backups=True)

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
        chosen = None if tags is None else list(_check_tags(tags, "tags"))
        addresses = _addresses(first)
        if blocking and addresses:
            raise InvalidArgumentError("`first` goes with blocking=False: else all come at once")
        if not blocking:
            return self._begin_wake(chosen, addresses)
        with self._observer.watch("wake_up") as watched, self._transitions.turn("wake_up"):
            streams = self._current_streams()
            asleep = self._asleep(chosen)
            raw, problems = self._transitions.arriving(
                lambda: self._with_room(lambda: self._core.wake(chosen, streams)),
                lambda: self._hooks.owed(self._awake(asleep)),
            )
            report = watched.report = _report("wake_up", raw, {}, problems)
        return report

    def _begin_wake(self, tags: list[str] | None, first: list[int]) -> WakeHandle:
        begin = time.perf_counter()
        with self._observer.failing("wake_up", begin), self._transitions.turn("wake_up"):
            streams = self._current_streams()
            asleep = self._asleep(tags)
            waking: _core.Waking | None = None

            def wait() -> None:
                if waking is None:  # it has not begun, or was interrupted when it had
                    return
                with self._observer.failing("wake_up", begin):
                    waking.finish()
                self._observer.note("wake_up", None, time.perf_counter() - begin)

            arrival = Arrival(wait, lambda: self._hooks.owed(self._awake(asleep)))
            self._transitions.expect(arrival)
            waking = self._with_room(lambda: self._core.wake_begin(tags, first, streams))
        return WakeHandle(waking, self.config.driver, self._transitions, arrival)

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
            offload_tags: As for ``sleep(offload_tags, tags=sleep)``.

        Raises:
            As `sleep` and `wake_up`.
        """
        named = _check_tags(sleep, "sleep")
        chosen = None if wake is None else list(_check_tags(wake, "wake"))
        actions, overrides = self._plan_sleep(offload_tags, named)
        self._refuse_open_scopes("swap", actions)
        pairs = list(actions.items())
        with (
            self._observer.watch("swap") as watched,
            self._transitions.turn("swap"),
            self._departing(actions),
        ):
            streams = self._current_streams()
            asleep = self._asleep(chosen)
            # Ranges that are dead are looked up at each try: emptying the cache changes them.
            raw, problems = self._transitions.arriving(
                lambda: self._with_room(
                    lambda: self._core.swap(pairs, self._dead_ranges(pairs), chosen, streams)
                ),
                lambda: self._hooks.owed(self._awake(asleep)),
            )
            report = watched.report = _report("swap", raw, overrides, problems)
        return report

    def read_backup(self, tensor: torch.Tensor, *, writable: bool = False) -> torch.Tensor:
        """The backup of a sleeping tensor as a tensor on the CPU, without a copy.

        It keeps the memory that it shows: while it lives, the allocator cannot be closed without
        force. After the wake it shows what was restored. (A backup that was put together of several
        pieces of free host memory is joined first, which takes its size once more.)

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
            OutOfHostMemoryError: The backup is in pieces, and there is no room to join them.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        if not isinstance(writable, bool):
            raise InvalidTypeError(f"writable is a bool, not {writable!r}")
        storage = memory_of(tensor)
        if tensor.is_quantized:
            raise InvalidTypeError("a quantized tensor has scales that are not in its memory")
        import torch

        from cumempool import _torch

        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        last = sum(
            (extent - 1) * stride
            for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        size = tensor.element_size()
        address = storage + int(tensor.storage_offset()) * size
        capsule = self._core.view_backup(address, (last + 1) * size, writable)
        with torch.inference_mode(False):
            memory = _torch.from_capsule(capsule)
            view = _torch.tensor_over(
                memory.untyped_storage(), tensor.dtype, tensor.shape, tensor.stride(), 0
            )
            view = _torch.with_lazy_bits(view, tensor)
            return view if writable else _torch.ReadOnlyTensor(view)

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
        self._check_known(tag, "registrable_ranges")
        infos = self.snapshot()
        return _by_tag(i for i in infos if i.state == "awake" and i.tag == tag).get(tag, [])

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
        self._check_known(tag, "register_hooks")
        return self._hooks.register(tag, before_unmap, after_map)

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
        if not isinstance(holder, str):
            raise InvalidTypeError(f"holder is a str, not {holder!r}")
        try:
            holder.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                f"the holder {holder!r} cannot be encoded as UTF-8: {error}"
            ) from None
        core = self._core
        number = core.pin(_check_tag(tag), holder)
        return Pin(tag, holder, lambda: core.unpin(number))

    def share(
        self, what: torch.Tensor | str, *, writable: bool = True, fabric: bool = False
    ) -> SharedMemory:
        """A descriptor by which other processes of the same user can open memory: `open_shared`.

        It can be pickled, and says nothing to other users. It holds nothing: the memory has to
        live until it is opened, and is stale once it has slept. While others have it open, the tag
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
        for name, value in (("writable", writable), ("fabric", fabric)):
            if not isinstance(value, bool):
                raise InvalidTypeError(f"{name} is a bool, not {value!r}")
        if isinstance(what, str):
            self._check_known(what, "share")
            infos, layout = [i for i in self.snapshot() if i.tag == what], None
            if not infos:
                raise InvalidArgumentError(f"share: there is nothing of tag {what!r}", tag=what)
        else:
            infos = [self.allocation_of(what)]
            layout = layout_of(what, infos[0].address)
        for info in infos:
            os.close(self._core.export_fd(info.address)[0])  # which says what is in the way
        ranges = [
            SharedRange(
                i.address, i.bytes, i.generation, i.sequence, self._name_of_device(i.device)
            )
            for i in infos
        ]
        endpoint = self._open_endpoint()
        tag = infos[0].tag
        return endpoint.describe(self.config.driver, tag, ranges, layout, writable, fabric)

    def revoke(self, tag: str) -> int:
        """Withdraws what was shared of a tag, so that it can sleep.

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
        self._check_known(tag, "revoke")
        with self._endpoint_lock:
            endpoint = self._endpoint
        return 0 if endpoint is None else endpoint.revoke(tag)

    def _open_endpoint(self) -> Endpoint:
        with self._endpoint_lock:
            if self._endpoint is None:
                self._endpoint = Endpoint(self._core)
                weakref.finalize(self, self._endpoint.stop)
            return self._endpoint

    def _name_of_device(self, device: int) -> str:
        if self.config.driver == "host":
            return str(device)
        import torch

        return str(torch.cuda.get_device_properties(device).uuid)

    def _check_known(self, tag: object, operation: str) -> None:
        known = self.stats().tags
        if _check_tag(tag) not in known:
            names = ", ".join(map(repr, known)) or "none yet"
            raise UnknownTagError(
                f"{operation}: nothing was ever allocated under tag {tag!r}; known tags: {names}",
                operation=operation,
                tag=str(tag),
            )

    # ---- what there is -------------------------------------------------------------------------

    def get_current_usage(self) -> int:
        """Bytes of device memory that are awake, over all tags."""
        return self.stats().awake_bytes

    def stats(self) -> Stats:
        """Bytes per tag and state, and totals. Cheap; works on a closed allocator too."""
        return _stats_of(self._core)

    def snapshot(self) -> list[AllocationInfo]:
        """Every live allocation, in order of allocation."""
        return _allocations_of(self._core)

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
        return AllocationInfo(**self._core.find(memory_of(tensor)))

    def close(self, force: bool = False) -> None:
        """Gives everything back. Closing twice is no error.

        Args:
            force: Close although memory is in use: physical memory and backups go, contents are
                lost, and tensors that are still there must not be touched. Their addresses stay
                reserved until they are deleted, so that a late access faults and reads nobody
                else's memory. Memory of ``backing="cuda_malloc"`` stays until it is deleted.

        Raises:
            InUseError: Without `force`: tensors or CUDA graphs live, scopes are open or backups are
                being read; nothing was changed.
            DriverError: The driver did not take something back.
        """
        if not isinstance(force, bool):
            raise InvalidTypeError(f"force is a bool, not {force!r}")
        self._empty_cache()
        if force:
            self._graph_pools.abandon()
            self._empty_cache()
        elif len(self._graph_pools) and self._only_graph_pools_are_left():
            self._graph_pools.release_all()
            self._empty_cache()
        self._core.close(force)
        with self._endpoint_lock:
            endpoint = self._endpoint
        if endpoint is not None:
            endpoint.close()
        if self._publisher is not None:
            self._publisher.close()
        with _instance_lock:
            if CuMemAllocator._instance is self:
                CuMemAllocator._instance = None

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<{type(self).__name__} on {self.config.driver}: {len(stats.tags)} tags, "
            f"{stats.awake_bytes} bytes awake, {stats.asleep_bytes} asleep>"
        )

    @property
    def events(self) -> EventLog:
        """The latest transitions, and failures of them and of allocations; oldest first."""
        return self._observer.log

    def on_progress(self, callback: OnProgress, *, after: float = 1.0) -> ProgressRegistration:
        """Has a callback told how far long transitions have come, about ten times a second.

        Not for wakes in the background, whose handle tells. See also `show_progress`.

        Args:
            callback: Called with the operation, the bytes done, and the bytes in all, from a thread
                of its own; at the end of a transition that succeeded with all of them. What it
                raises is logged.
            after: Seconds that a transition may take before the first call.

        Returns:
            What takes it out again; a context manager.

        Raises:
            InvalidTypeError: It cannot be called, or `after` is no number.
            InvalidArgumentError: `after` is negative.
        """
        return self._progress.register(callback, after)

    def save_snapshot(self, path: str | os.PathLike[str]) -> None:
        """Writes statistics, allocations and the latest events to a file, as JSON.

        ``cumempool report`` renders it.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(json.dumps(self._observer.snapshot()), encoding="utf-8")

    def record(self, path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
        """A context manager that writes a trace: each event meanwhile, as a line of JSON.

        ``cumempool report`` renders it.

        Raises:
            OSError: On entering: the file cannot be made.
        """
        return self._observer.recording(Path(path))

    # ---- inside --------------------------------------------------------------------------------

    def _only_graph_pools_are_left(self) -> bool:
        """Whether closing is possible once graph pools are released, in which no graph lives."""
        self._graph_pools.refuse_close()
        unused = self._graph_pools.unused_segments()
        return not open_tags(self, self.stats().tags) and all(
            info.address in unused for info in self.snapshot()
        )

    def _declare(self, tag: str, on_sleep: OnSleep | None, on_wake: OnWake | None) -> None:
        self._core.declare_tag(
            _check_tag(tag),
            _check_choice(on_sleep, _ON_SLEEP, "on_sleep"),
            _check_choice(on_wake, _ON_WAKE, "on_wake"),
        )

    def _check_device(self, device: object) -> int:
        if not isinstance(device, int) or isinstance(device, bool):
            raise InvalidTypeError(f"a device is an ordinal, not {device!r}")
        count = self._driver.device_count
        if not 0 <= device < count:
            raise InvalidArgumentError(
                f"there is no device {device}: the {self.config.driver} driver has {count}"
            )
        return device

    def _check_ordinals(self, devices: object, what: str) -> list[int]:
        if isinstance(devices, str) or not isinstance(devices, Iterable):
            raise InvalidTypeError(f"{what} are ordinals in a sequence, not {devices!r}")
        return list(dict.fromkeys(self._check_device(device) for device in devices))

    def _check_devices(self, devices: object) -> list[int]:
        checked = self._check_ordinals(devices, "devices")
        if not checked:
            raise InvalidArgumentError("devices is empty: name one, or pass None for those used")
        return checked

    def _resolve_device(self, device: torch.device | str | int | None) -> tuple[int, torch.device]:
        """The driver's ordinal and torch's device for what a caller named."""
        import torch

        kind = "cpu" if self.config.driver == "host" else "cuda"
        if isinstance(device, int):
            ordinal = self._check_device(device)
        elif device is None:
            ordinal = 0 if kind == "cpu" else torch.cuda.current_device()
        else:
            try:
                named = torch.device(device)
            except (RuntimeError, TypeError) as error:
                raise InvalidArgumentError(f"device {device!r} does not exist: {error}") from None
            if named.type != kind:
                raise InvalidArgumentError(
                    f"the {self.config.driver} driver has memory of {kind} devices, not {named}"
                )
            current = 0 if kind == "cpu" else torch.cuda.current_device()
            ordinal = self._check_device(current if named == torch.device(kind) else named.index)
        return ordinal, torch.device("cpu") if kind == "cpu" else torch.device(kind, ordinal)

    def _plan_sleep(
        self, offload_tags: Sequence[str] | str | None, tags: Sequence[str] | str | None
    ) -> tuple[dict[str, int], dict[str, str]]:
        """What to do with each tag, and which policies that overrules; the core knows the tags."""
        named = None if tags is None else _check_tags(tags, "tags")
        known = self.stats().tags
        if offload_tags is None:
            actions = {}
            for tag in known if named is None else named:
                policy = _ON_SLEEP[known[tag].on_sleep] if tag in known else 0
                kept = tag == DEFAULT_TAG or named is not None
                actions[tag] = policy or (_OFFLOAD if kept else _DISCARD)
            return actions, {}
        offload = _check_tags(offload_tags, "offload_tags")
        if named is not None and not set(offload) <= set(named):
            extra = sorted(set(offload) - set(named))
            raise InvalidArgumentError(f"offload_tags {extra} are not among tags {list(named)}")
        actions = dict.fromkeys(known if named is None else named, _DISCARD)
        actions.update(dict.fromkeys(offload, _OFFLOAD))
        return actions, _overrides(actions, known)

    def _run_sleep(
        self,
        operation: str,
        actions: Mapping[str, int],
        overrides: Mapping[str, str],
        *,
        drop_backups: bool,
    ) -> TransitionReport:
        self._refuse_open_scopes(operation, actions)
        pairs = list(actions.items())
        with (
            self._observer.watch(operation) as watched,
            self._transitions.turn(operation),
            self._departing(actions),
        ):
            dead = self._dead_ranges(pairs)
            raw = self._core.sleep(pairs, drop_backups, dead, self._current_streams())
            report = watched.report = _report(operation, raw, overrides)
        return report

    def _departing(self, tags: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        """Calls the hooks of tags that are put to sleep in the body."""
        hooked = self._hooks.tags().intersection(tags)
        if not hooked:
            return contextlib.nullcontext()
        infos = [info for info in self.snapshot() if info.tag in hooked and info.state == "awake"]
        if any(info.backing == "cuda_malloc" for info in infos):
            return contextlib.nullcontext()  # which the core is about to refuse
        leaving = frozenset(info.address for info in infos)
        return self._hooks.departing(_by_tag(infos), lambda: self._awake(leaving))

    def _asleep(self, tags: Iterable[str] | None) -> frozenset[int]:
        """Where memory sleeps that a wake of the tags concerns, of tags that have hooks."""
        hooked = self._hooks.tags()
        if tags is not None:
            hooked &= set(tags)
        if not hooked:
            return frozenset()
        infos = self.snapshot()
        return frozenset(i.address for i in infos if i.tag in hooked and i.state != "awake")

    def _awake(self, addresses: frozenset[int]) -> dict[str, list[RegistrableRange]]:
        """Those of the allocations that are awake now, by tag."""
        if not addresses:
            return {}
        infos = self.snapshot()
        return _by_tag([i for i in infos if i.address in addresses and i.state == "awake"])

    def _dead_ranges(self, actions: Iterable[tuple[str, int]]) -> list[tuple[int, int]]:
        """Ranges that need no backup, where there is anything to back up."""
        if self.config.driver != "cuda":
            return []
        from cumempool import _torch

        self._graph_pools.reap()
        _torch.return_unused()
        kept = self._has_preserved or any(action == _OFFLOAD for _, action in actions)
        return _torch.dead_ranges() if kept else []

    def _refuse_open_scopes(self, operation: str, tags: Iterable[str]) -> None:
        entered = open_tags(self, tags)
        if entered:
            names = ", ".join(repr(tag) for tag in entered)
            raise InUseError(
                f"{operation}: a use_memory_pool() scope of {names} is open, and would hand out "
                "memory that sleeps; leave it first",
                operation=operation,
                tag=entered[0],
                advice="leave the scope first",
            )

    def _current_streams(self) -> list[_torch.CurrentStream]:
        if self.config.driver != "cuda":
            return []
        from cumempool import _torch

        return _torch.current_streams()

    def _with_room(self, begin: Callable[[], _T]) -> _T:
        """What `begin` gives, with torch's cache emptied where the device has no room."""
        try:
            return begin()
        except OutOfMemoryError:
            self._empty_cache()
            return begin()

    def _empty_cache(self) -> None:
        if self.config.driver == "cuda" and "torch" in sys.modules:
            from cumempool import _torch

            _torch.empty_cache()


def _stats_of(core: _core.Allocator) -> Stats:
    return Stats.from_snapshot(core.snapshot(False))


def _allocations_of(core: _core.Allocator) -> list[AllocationInfo]:
    return [AllocationInfo(**info) for info in core.snapshot(True)["allocations"]]


def _cached_ranges(driver: str) -> list[tuple[int, int]]:
    """(address, bytes) of what torch holds of pools as free."""
    if driver != "cuda":
        return []
    from cumempool import _torch

    return _torch.dead_ranges()


def _nvtx_range(operation: str) -> contextlib.AbstractContextManager[object]:
    from cumempool import _torch

    return _torch.nvtx_range(f"cumempool.{operation}")


def _report(
    operation: str,
    raw: Mapping[str, Any],
    overrides: Mapping[str, str],
    problems: Sequence[str] = (),
) -> TransitionReport:
    return TransitionReport.from_rows(
        operation, raw["seconds"], raw["rows"], [*raw["problems"], *problems], overrides
    )


def _by_tag(infos: Iterable[AllocationInfo]) -> dict[str, list[RegistrableRange]]:
    ranges: dict[str, list[RegistrableRange]] = {}
    for info in infos:
        ranges.setdefault(info.tag, []).append(
            RegistrableRange(info.address, info.bytes, info.device, info.generation)
        )
    return ranges


def _addresses(tensors: object) -> list[int]:
    """Where the memory of tensors starts, without those that have none."""
    if tensors == ():
        return []
    import torch

    if isinstance(tensors, torch.Tensor):
        tensors = (tensors,)
    if not isinstance(tensors, Iterable):
        raise InvalidTypeError(f"first is an iterable of tensors, not {tensors!r}")
    found = ((tensor, memory_of(tensor)) for tensor in tensors)
    return [address for tensor, address in found if tensor.numel()]


def _tensors_of(what: object) -> Iterable[torch.Tensor]:
    """The tensors that `CuMemAllocator.preserve` was given."""
    import torch

    if isinstance(what, torch.nn.Module):
        return what.buffers()
    if isinstance(what, torch.Tensor):
        return (what,)
    if not isinstance(what, Iterable):
        raise InvalidTypeError(f"preserve: tensors or a module are needed, not {what!r}")
    return what


def _check_shape(size: tuple[int | Sequence[int], ...]) -> tuple[int, ...]:
    given: Sequence[object] = size
    if len(size) == 1 and isinstance(size[0], Sequence):
        given = size[0]
    shape = []
    for extent in given:
        if isinstance(extent, bool) or not isinstance(extent, Integral):
            raise InvalidTypeError(f"a shape is made of integers, not {extent!r}")
        count = int(extent)
        if count < 0:
            raise InvalidArgumentError(f"a shape cannot be negative: {count}")
        shape.append(count)
    return tuple(shape)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
