"""Takes the place of ``vllm.device_allocator.cumem`` of vLLM 0.33.0.

`install` puts this module in the place of vLLM's own; `register` is the plugin that vLLM loads by
itself. docs/migrating-from-vllm.md compares the two method by method. Importing this module neither
opens a driver nor imports vLLM.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

from cumempool._locks import fork_safe_lock
from cumempool._pool.scope import current_scope
from cumempool.allocator import DEFAULT_TAG
from cumempool.allocator import CuMemAllocator as Pools
from cumempool.compat import vllm_install as installing
from cumempool.compat import vllm_memory as memory
from cumempool.compat.vllm_install import BACKEND
from cumempool.compat.vllm_memory import AllocationData, HandleType
from cumempool.config import CuMemConfig
from cumempool.errors import InvalidArgumentError, UnavailableError, UnsupportedError

__all__ = [
    "BACKEND",
    "CUDAGRAPH_TAG",
    "DEFERRABLE_TAGS",
    "AllocationData",
    "CuMemAllocator",
    "HandleType",
    "create_and_map",
    "cumem_available",
    "get_pluggable_allocator",
    "install",
    "installed",
    "lib_name",
    "libcudart",
    "logger",
    "register",
    "uninstall",
    "unmap_and_release",
    "use_memory_pool_with_allocator",
]

logger = logging.getLogger("cumempool")

DEFERRABLE_TAGS: tuple[str, ...] = ("weights", "kv_cache")
"""Tags that a wake leaves asleep if it does not name them; it always wakes every other tag."""

CUDAGRAPH_TAG: Final = "cudagraph"
"""The tag of memory of graphs captured inside ``cudagraph_pool``."""

lib_name: str | None = str(Path(__file__).parents[1] / "lib" / "libcumempool.so")
"""The library that torch allocates through."""

#: vLLM keeps the calls of its extension module here, or None if that could not be loaded.
init_module = python_create_and_map = python_unmap_and_release = None


# ---- availability --------------------------------------------------------------------------------


def _find_out() -> bool:
    """Returns whether library and driver can be loaded. Starts neither, so a fork stays safe."""
    try:
        CuMemConfig(enable_cumem_allocator=True)
    except (UnavailableError, InvalidArgumentError) as error:
        logger.debug("cumempool cannot be used here: %s", error)
        return False
    return True


cumem_available: bool = _find_out()


# ---- low-level functions -------------------------------------------------------------------------


libcudart: Any = memory.Memory()


def create_and_map(allocation_handle: HandleType) -> None:
    """Checks that an allocation is mapped.

    If a program replaces this function, `CuMemAllocator.wake_up` calls the replacement for each
    allocation that comes back without contents, for example to fill it.

    Raises:
        NotInPoolError: The handle is of no live allocation.
        UnsupportedError: The allocation sleeps. Memory wakes by tags, all or nothing.
    """
    if memory.find("create_and_map", allocation_handle).state != "awake":
        raise UnsupportedError(
            "one allocation cannot be woken alone: call wake_up(tags=...)",
            operation="create_and_map",
        )


def unmap_and_release(allocation_handle: HandleType) -> None:
    """Checks that an allocation is not mapped.

    Raises:
        NotInPoolError: The handle is of no live allocation.
        UnsupportedError: The allocation is awake. Memory sleeps by tags.
    """
    if memory.find("unmap_and_release", allocation_handle).state == "awake":
        raise UnsupportedError(
            "one allocation cannot be put to sleep alone: call sleep() or discard(tags)",
            operation="unmap_and_release",
        )


_own_create_and_map: Final = create_and_map


def get_pluggable_allocator(
    python_malloc_fn: Callable[[HandleType], None], python_free_func: Callable[[int], HandleType]
) -> NoReturn:
    """Raises: cumempool has no callbacks.

    Raises:
        UnsupportedError: Always. malloc and free of cumempool never enter Python.
    """
    raise UnsupportedError(
        "malloc and free of cumempool never enter Python, so there are no callbacks to set: use "
        "CuMemAllocator.get_instance().use_memory_pool(tag); pointer_to_data lists allocations",
        operation="get_pluggable_allocator",
    )


def use_memory_pool_with_allocator(
    python_malloc_fn: Callable[[HandleType], None], python_free_func: Callable[[int], HandleType]
) -> NoReturn:
    """Raises, as `get_pluggable_allocator` does.

    Raises:
        UnsupportedError: Always.
    """
    get_pluggable_allocator(python_malloc_fn, python_free_func)


# ---- the allocator -------------------------------------------------------------------------------

_NO_POOL: Final = (None, None)
_instance_lock = fork_safe_lock()


class CuMemAllocator:
    """vLLM's interface to the allocator that the parts of a program share.

    It has no state: every instance works on ``cumempool.CuMemAllocator.get_instance()``. Unless the
    program has made that, the first use makes it from the ``CUMEMPOOL_*`` variables. The program
    can also call its other methods, such as ``stats()``. Thread-safe.
    """

    instance: CuMemAllocator | None = None
    default_tag: str = DEFAULT_TAG
    cudagraph_tag: str = CUDAGRAPH_TAG

    def __init__(self) -> None:
        self._entered: Counter[str] = Counter()
        self._capturing = threading.local()

    @staticmethod
    def get_instance() -> CuMemAllocator:
        """Returns the shared instance.

        Raises:
            UnavailableError: The driver cannot be opened here, with the reason.
            InvalidArgumentError: A ``CUMEMPOOL_*`` variable has a value that it does not take.
        """
        memory.shared()
        with _instance_lock:
            if CuMemAllocator.instance is None:
                CuMemAllocator.instance = CuMemAllocator()
            return CuMemAllocator.instance

    # ---- allocating

    @contextlib.contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        """Allocates this thread's memory in the body under `tag`; None is ``default_tag``.

        Raises:
            InvalidTypeError: The tag is no text.
            OutOfSlotsError: Too many scopes are open at the same time.
        """
        tag = self.default_tag if tag is None else tag
        with memory.shared().use_memory_pool(tag):
            self._entered[tag] += 1
            yield

    @contextlib.contextmanager
    def cudagraph_pool(self) -> Iterator[tuple[int, int]]:
        """Yields the id for ``torch.cuda.graph(pool=...)``; the same each time on a device.

        Memory of graphs captured with it has the tag ``"cudagraph"``, and sleeps and wakes.

        Raises:
            UnsupportedError: On the ``host`` driver, which has no graphs.
            InUseError: Memory of such graphs sleeps.
        """
        yield memory.shared().graph_pool(CUDAGRAPH_TAG)

    @contextlib.contextmanager
    def use_cudagraph_pool(self, pool: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
        """Yields the id of `cudagraph_pool`, under the name that vLLM after 0.33 has for it.

        Inside, ``current_tag`` is ``cudagraph_tag``, which tells vLLM that the captured graph uses
        memory that legacy IPC cannot register.

        Args:
            pool: The pool that vLLM would capture into otherwise; ignored.

        Raises:
            UnsupportedError: As `cudagraph_pool`.
            InUseError: As `cudagraph_pool`.
        """
        identity = memory.shared().graph_pool(CUDAGRAPH_TAG)
        before = getattr(self._capturing, "now", False)
        self._capturing.now = True
        try:
            yield identity
        finally:
            self._capturing.now = before

    def release_cudagraph_pool(self) -> None:
        """Releases the pool of `use_cudagraph_pool`, once its graphs are gone."""
        gc.collect()  # graphs, which keep their pools
        memory.shared().release_graph_pool(CUDAGRAPH_TAG)

    # ---- transitions

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        """Gives the memory of every tag back; see `cumempool.CuMemAllocator.sleep`.

        Memory that sleeps already stays as it is, with its backup or without.

        Args:
            offload_tags: The tags whose contents are kept; contents of all others are discarded.
                None keeps ``default_tag``. Tags without allocations are ignored.

        Raises:
            InvalidTypeError: It is neither a tag nor a sequence of tags.
            CumempoolError: As `cumempool.CuMemAllocator.sleep`; everything is awake as before.
        """
        allocator = memory.shared()
        kept = memory.check_tags(
            self.default_tag if offload_tags is None else offload_tags, "offload_tags"
        )
        memory.return_what_nobody_uses(allocator)
        known = allocator.stats().tags
        contrary = [
            name
            for name, tag in known.items()
            if (tag.discarded_bytes if name in kept else tag.backed_up_bytes)
        ]
        if contrary:
            logger.warning("sleep: %s slept already, and is left as it is", ", ".join(contrary))
        if known:
            with self._unmapping(None):
                logger.info(
                    "%s", allocator.sleep(offload_tags=[tag for tag in kept if tag in known])
                )

    def discard(self, tags: tuple[str, ...] | str) -> None:
        """Gives the memory of some tags back without keeping its contents.

        Memory that sleeps already keeps its backup. Tags without allocations are ignored.

        Raises:
            InvalidTypeError: It is neither a tag nor a sequence of tags.
            CumempoolError: As `cumempool.CuMemAllocator.sleep`; everything is as before.
        """
        allocator = memory.shared()
        known = allocator.stats().tags
        chosen = [tag for tag in memory.check_tags(tags, "tags") if tag in known]
        if any(known[tag].backed_up_bytes for tag in chosen):
            logger.warning("discard: what slept already keeps its backup")
        if chosen:
            with self._unmapping(chosen):
                logger.info("%s", allocator.sleep(offload_tags=(), tags=chosen))

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Maps memory at its old addresses and restores its backups.

        If a hook of vLLM (``register_tag_hooks``) raises, this raises once the memory is awake; the
        next wake calls the hook again.

        Args:
            tags: The tags of `DEFERRABLE_TAGS` to wake; every other tag always wakes. None wakes
                all.

        Raises:
            InvalidTypeError: It is neither a tag nor a sequence of tags.
            OutOfMemoryError: (a ``RuntimeError``) The device has no room.
            CumempoolError: As `cumempool.CuMemAllocator.wake_up`; everything sleeps as before, with
                its backup, and the call can be repeated.
        """
        allocator = memory.shared()
        named = None if tags is None else memory.check_tags(tags, "tags")
        memory.return_what_nobody_uses(allocator)
        chosen = [
            tag
            for tag in allocator.stats().tags
            if named is None or tag in named or tag not in DEFERRABLE_TAGS
        ]
        if not chosen:
            return
        empty = self._empty_handles(chosen) if create_and_map is not _own_create_and_map else []
        logger.info("%s", allocator.wake_up(chosen))
        for handle in empty:
            create_and_map(handle)
        self._run_after_map_hooks()

    @contextlib.contextmanager
    def _unmapping(self, tags: Collection[str] | None) -> Iterator[None]:
        """Runs vLLM's hooks for memory of the tags, around the body that unmaps it.

        If the body fails, all memory is mapped as before, so it runs the hooks that follow a map.
        """
        before = installing.their_hooks("run_before_unmap_hooks")
        if before is None:
            yield
            return
        try:
            before(list(self.pointer_to_data.values()), tags)
            yield
        except BaseException:
            self._run_after_map_hooks()
            raise

    def _run_after_map_hooks(self) -> None:
        after = installing.their_hooks("run_after_map_hooks")
        if after is not None:
            after(list(self.pointer_to_data.values()))

    def _empty_handles(self, tags: Sequence[str]) -> list[HandleType]:
        return [
            memory.data_of(info).handle
            for info in memory.shared().snapshot()
            if info.state == "discarded" and info.tag in tags
        ]

    # ---- looking

    def get_current_usage(self) -> int:
        """Returns the bytes of all allocations, awake or asleep."""
        stats = memory.shared().stats()
        return stats.awake_bytes + stats.asleep_bytes

    @property
    def pointer_to_data(self) -> Mapping[int, AllocationData]:
        """Every allocation as it is now, by address, in order of allocation; read-only."""
        return MappingProxyType(
            {info.address: memory.data_of(info) for info in memory.shared().snapshot()}
        )

    @property
    def current_tag(self) -> str:
        """The tag of this thread's innermost open scope, or ``default_tag``."""
        if getattr(self._capturing, "now", False):
            return self.cudagraph_tag
        scope = current_scope(memory.shared()._state)
        return self.default_tag if scope is None else scope.tag

    @property
    def allocator_and_pools(self) -> dict[str, list[tuple[None, None]]]:
        """One ``(None, None)`` per tag and scope opened for it since the last `release_pools`.

        The pools themselves are not kept: their memory is given back with their tensors.
        """
        return {tag: [_NO_POOL] * count for tag, count in self._entered.items()}

    # ---- the end

    def release_pools(self) -> None:
        """Gives back unused memory, host memory of old backups included.

        Live tensors stay valid, and the allocator can be used again. May be called at any time and
        more than once.
        """
        self._entered.clear()
        allocator = Pools._instance
        if allocator is None:
            return
        gc.collect()  # graphs, which keep their pools
        allocator.release_graph_pool(CUDAGRAPH_TAG)
        memory.return_what_nobody_uses(allocator)
        allocator.release_host_memory()

    def close(self) -> None:
        """Does what `release_pools` does."""
        self.release_pools()


# ---- in vLLM's place -----------------------------------------------------------------------------


def installed() -> bool:
    """Returns whether vLLM finds this module in the place of its own."""
    return installing.is_in_place(sys.modules[__name__])


def install() -> None:
    """Puts this module in the place of ``vllm.device_allocator.cumem``, in this process.

    Call it before vLLM allocates; a second call has no effect. If code has imported vLLM's
    ``CuMemAllocator`` already, its ``get_instance()`` returns the instance of this module. In
    processes that vLLM starts, the plugin does this (`register`).

    Raises:
        UnavailableError: vLLM cannot be imported, lacks the module, or has functions in it that
            this one lacks: vLLM is newer than this version of cumempool supports.
        InUseError: vLLM's own allocator holds memory already.
    """
    installing.put_in_place(sys.modules[__name__])


def uninstall() -> None:
    """Undoes `install`; without one it does nothing.

    Memory allocated meanwhile stays with ``cumempool.CuMemAllocator.get_instance()``.
    """
    installing.take_back()


def register() -> None:
    """Registers the sleep-mode backend ``cumempool``; vLLM calls it in each of its processes.

    It is the ``vllm.general_plugins`` entry point. Workers that were started with
    ``--sleep-mode-backend cumempool`` then call `install` before they allocate. If ``VLLM_PLUGINS``
    names ``cumempool``, it installs with any backend. Otherwise it leaves vLLM as it is. May be
    called more than once.

    Raises:
        InUseError: ``VLLM_PLUGINS`` names it, and vLLM's own allocator holds memory already.
        InvalidArgumentError: Another backend is registered under this name.
    """
    installing.add_plugin(sys.modules[__name__])
