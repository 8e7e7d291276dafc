"""Takes the place of ``vllm.device_allocator.cumem`` of vLLM 0.33.0.

`install` puts this module where vLLM looks for its own; `register` is the plugin that vLLM loads by
itself. docs/migrating-from-vllm.md compares the two method by method. Importing this module opens
no driver and does not import vLLM.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.util
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from cumempool._locks import fork_safe_lock
from cumempool._pool.scope import current_scope
from cumempool.allocator import DEFAULT_TAG
from cumempool.allocator import CuMemAllocator as Pools
from cumempool.config import CuMemConfig
from cumempool.errors import (
    DriverError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    UnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    import torch

    from cumempool._pool.stats import AllocationInfo

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

HandleType = tuple[int, int, int, int]
"""Device ordinal, bytes, address, and 0: the driver's handle is not given out."""

DEFERRABLE_TAGS: tuple[str, ...] = ("weights", "kv_cache")
"""What a wake that names tags may leave asleep; it wakes every other tag in any case."""

CUDAGRAPH_TAG: Final = "cudagraph"
"""The tag of the memory that graphs captured inside ``cudagraph_pool`` use."""

BACKEND: Final = "cumempool"
"""The name of the sleep-mode backend, and of the plugin."""

lib_name: str | None = str(Path(__file__).parents[1] / "lib" / "libcumempool.so")
"""The library that torch allocates through."""

#: vLLM keeps the calls of its extension module here, and None where it could not be loaded.
init_module = python_create_and_map = python_unmap_and_release = None


# ---- whether it can be used ----------------------------------------------------------------------


def _find_out() -> bool:
    """Whether the library and a driver can be loaded. Starts neither, so that a fork stays safe."""
    try:
        CuMemConfig(enable_cumem_allocator=True)
    except (UnavailableError, InvalidArgumentError) as error:
        logger.debug("cumempool cannot be used here: %s", error)
        return False
    return True


cumem_available: bool = _find_out()


# ---- what low-level callers use ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AllocationData:
    """One allocation as it was when it was asked for.

    Attributes:
        handle: See `HandleType`.
        tag: Its tag.
        cpu_backup_tensor: None where it has no backup; else a tensor on the ``meta`` device, of the
            size of the backup. Contents are for `cumempool.CuMemAllocator.read_backup`.
        is_asleep: Whether it sleeps.
    """

    handle: HandleType
    tag: str
    cpu_backup_tensor: torch.Tensor | None = None
    is_asleep: bool = False


class _Memory:
    """The two calls of the CUDA runtime that programs reach for beside the allocator.

    Both return when the bytes are there. They work on memory of either driver.
    """

    def cudaMemset(self, devPtr: int, value: int, count: int) -> None:  # noqa: N802, N803
        """Fills `count` bytes.

        Raises:
            DriverError: The driver refuses the address, or an earlier kernel has failed.
        """
        if _driver() == "host":
            ctypes.memset(devPtr, value, count)
        else:
            self._call("cuMemsetD8_v2", devPtr, ctypes.c_ubyte(value), count)

    def cudaMemcpy(self, dst: int, src: int, count: int) -> None:  # noqa: N802
        """Copies `count` bytes between addresses of the device or the host.

        Raises:
            DriverError: As `cudaMemset`.
        """
        if _driver() == "host":
            ctypes.memmove(dst, src, count)
        else:
            self._call("cuMemcpy", dst, ctypes.c_uint64(src), count)

    def _call(self, name: str, address: int, argument: Any, count: int) -> None:
        import torch

        torch.cuda.synchronize()  # which makes the context current, too
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
        result = function(ctypes.c_uint64(address), argument, ctypes.c_size_t(count))
        if result:
            advice = "check the address, and whether an earlier kernel has failed"
            raise DriverError(
                f"{name} of {count} bytes at {address:#x}: CUDA error {result}; {advice}",
                bytes=count,
                driver_call=name,
                result=result,
                advice=advice,
            )
        torch.cuda.synchronize()


libcudart: Any = _Memory()


def create_and_map(allocation_handle: HandleType) -> None:
    """Sees that an allocation is mapped, which it is when `CuMemAllocator.wake_up` calls this.

    It is called for each allocation that has come back without contents, if another function has
    been put in its place: to fill such memory, say.

    Raises:
        NotInPoolError: The handle is not of an allocation that lives.
        UnsupportedError: The allocation sleeps. Memory is woken by tags, all or nothing.
    """
    if _find(allocation_handle).state != "awake":
        raise UnsupportedError("one allocation cannot be woken alone: call wake_up(tags=...)")


def unmap_and_release(allocation_handle: HandleType) -> None:
    """Sees that an allocation is not mapped.

    Raises:
        NotInPoolError: The handle is not of an allocation that lives.
        UnsupportedError: The allocation is awake. Memory is put to sleep by tags.
    """
    if _find(allocation_handle).state == "awake":
        raise UnsupportedError(
            "one allocation cannot be put to sleep alone: call sleep() or discard(tags)"
        )


_own_create_and_map: Final = create_and_map


def get_pluggable_allocator(
    python_malloc_fn: Callable[[HandleType], None], python_free_func: Callable[[int], HandleType]
) -> NoReturn:
    """There is nothing to be called back by.

    Raises:
        UnsupportedError: Always. malloc and free of cumempool never enter Python.
    """
    raise UnsupportedError(
        "malloc and free of cumempool never enter Python, so there are no callbacks to set: use "
        "CuMemAllocator.get_instance().use_memory_pool(tag); pointer_to_data says what there is"
    )


def use_memory_pool_with_allocator(
    python_malloc_fn: Callable[[HandleType], None], python_free_func: Callable[[int], HandleType]
) -> NoReturn:
    """As `get_pluggable_allocator`.

    Raises:
        UnsupportedError: Always.
    """
    get_pluggable_allocator(python_malloc_fn, python_free_func)


# ---- the allocator -------------------------------------------------------------------------------

_NO_POOL: Final = (None, None)
_instance_lock = fork_safe_lock()


def _pools() -> Pools:
    """The allocator that all share, made with the settings of the environment if nobody has."""
    made = Pools._instance
    return Pools.get_instance(CuMemConfig.from_env()) if made is None else made


def _driver() -> str:
    return _pools().config.driver


def _tags(tags: object, what: str) -> tuple[str, ...]:
    named = (tags,) if isinstance(tags, str) else tags
    if not isinstance(named, Iterable):
        raise InvalidTypeError(f"{what} is a tag or a sequence of tags, not {tags!r}")
    chosen = tuple(dict.fromkeys(named))
    if not all(isinstance(tag, str) for tag in chosen):
        raise InvalidTypeError(f"{what} holds something that is no tag: {tags!r}")
    return chosen


def _data(info: AllocationInfo) -> AllocationData:
    backup = None
    if info.state == "backed_up":
        import torch

        backup = torch.empty(info.backup_bytes, dtype=torch.uint8, device="meta")
    handle = (info.device, info.bytes, info.address, 0)
    return AllocationData(handle, info.tag, backup, info.state != "awake")


def _find(handle: HandleType) -> AllocationInfo:
    address = handle[2]
    for info in _pools().snapshot():
        if info.address == address:
            return info
    raise NotInPoolError(f"there is no allocation at {address:#x}")


def _return_what_nobody_uses(pools: Pools) -> None:
    """Gives back what only garbage and torch's cache hold: it would be copied, or in the way."""
    gc.collect()
    if pools.config.driver == "cuda":
        from cumempool import _torch

        _torch.empty_cache()


class CuMemAllocator:
    """vLLM's interface to the allocator that the parts of a program share.

    There is no state of its own behind it: every instance works on
    ``cumempool.CuMemAllocator.get_instance()``, which is made at the first use from the
    ``CUMEMPOOL_*`` variables where the program has not made it before. Its other methods, such as
    ``stats()``, can be used beside this one.

    All methods may be called from any thread.
    """

    instance: CuMemAllocator | None = None
    default_tag: str = DEFAULT_TAG
    cudagraph_tag: str = CUDAGRAPH_TAG

    def __init__(self) -> None:
        self._entered: Counter[str] = Counter()
        self._capturing = threading.local()

    @staticmethod
    def get_instance() -> CuMemAllocator:
        """The instance that all share.

        Raises:
            UnavailableError: The driver cannot be opened here, with the reason.
            InvalidArgumentError: A ``CUMEMPOOL_*`` variable has a value that it does not take.
        """
        _pools()
        with _instance_lock:
            if CuMemAllocator.instance is None:
                CuMemAllocator.instance = CuMemAllocator()
            return CuMemAllocator.instance

    # ---- allocating

    @contextlib.contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        """What this thread allocates inside comes from a pool under `tag`; None is ``default_tag``.

        Raises:
            InvalidTypeError: The tag is no text.
            OutOfSlotsError: Too many scopes are open at the same time.
        """
        tag = self.default_tag if tag is None else tag
        with _pools().use_memory_pool(tag):
            self._entered[tag] += 1
            yield

    @contextlib.contextmanager
    def cudagraph_pool(self) -> Iterator[tuple[int, int]]:
        """The id to give to ``torch.cuda.graph(pool=...)``; the same each time on a device.

        Memory of graphs captured with it has the tag ``"cudagraph"``, and sleeps and wakes.

        Raises:
            UnsupportedError: On the ``host`` driver, which has no graphs.
            InUseError: Memory of such graphs sleeps.
        """
        yield _pools().graph_pool(CUDAGRAPH_TAG)

    @contextlib.contextmanager
    def use_cudagraph_pool(self, pool: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
        """As `cudagraph_pool`, under the name that vLLM after 0.33 has for it.

        Inside, ``current_tag`` is ``cudagraph_tag``: vLLM asks for that to know that what is
        captured lies in memory that legacy IPC cannot register.

        Args:
            pool: The pool that vLLM would capture into otherwise; it is not used.

        Raises:
            UnsupportedError: As `cudagraph_pool`.
            InUseError: As `cudagraph_pool`.
        """
        identity = _pools().graph_pool(CUDAGRAPH_TAG)
        before = getattr(self._capturing, "now", False)
        self._capturing.now = True
        try:
            yield identity
        finally:
            self._capturing.now = before

    def release_cudagraph_pool(self) -> None:
        """Gives up the pool of `use_cudagraph_pool`, once its graphs are gone."""
        gc.collect()  # graphs, which keep their pools
        _pools().release_graph_pool(CUDAGRAPH_TAG)

    # ---- transitions

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        """Gives the memory of every tag back; see `cumempool.CuMemAllocator.sleep`.

        What sleeps already is left as it is, with its backup or without.

        Args:
            offload_tags: The tags whose contents are kept. Those of all others are discarded. None
                keeps ``default_tag``. Tags that nothing was allocated under are ignored.

        Raises:
            InvalidTypeError: It is neither a tag nor a sequence of tags.
            CumempoolError: As `cumempool.CuMemAllocator.sleep`; everything is awake as before.
        """
        pools = _pools()
        kept = _tags(self.default_tag if offload_tags is None else offload_tags, "offload_tags")
        _return_what_nobody_uses(pools)
        known = pools.stats().tags
        contrary = [
            name
            for name, tag in known.items()
            if (tag.discarded_bytes if name in kept else tag.backed_up_bytes)
        ]
        if contrary:
            logger.warning("sleep: %s slept already, and is left as it is", ", ".join(contrary))
        if known:
            with self._unmapping(None):
                logger.info("%s", pools.sleep(offload_tags=[tag for tag in kept if tag in known]))

    def discard(self, tags: tuple[str, ...] | str) -> None:
        """Gives the memory of some tags back without keeping its contents.

        What sleeps already keeps the backup that it has. Tags that nothing was allocated under are
        ignored.

        Raises:
            InvalidTypeError: It is neither a tag nor a sequence of tags.
            CumempoolError: As `cumempool.CuMemAllocator.sleep`; everything is as before.
        """
        pools = _pools()
        known = pools.stats().tags
        chosen = [tag for tag in _tags(tags, "tags") if tag in known]
        if any(known[tag].backed_up_bytes for tag in chosen):
            logger.warning("discard: what slept already keeps its backup")
        if chosen:
            with self._unmapping(chosen):
                logger.info("%s", pools.sleep(offload_tags=(), tags=chosen))

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Maps memory at its old addresses and restores what was kept.

        Args:
            tags: The tags of `DEFERRABLE_TAGS` to wake; every other tag wakes in any case. None
                wakes all.

        What a hook of vLLM raises (``register_tag_hooks``) is raised when the memory is awake; the
        next wake calls it again.

        Raises:
            InvalidTypeError: It is neither a tag nor a sequence of tags.
            OutOfMemoryError: (a ``RuntimeError``) The device has no room.
            CumempoolError: As `cumempool.CuMemAllocator.wake_up`; everything sleeps as before, with
                its backup, and the call can be repeated.
        """
        pools = _pools()
        named = None if tags is None else _tags(tags, "tags")
        _return_what_nobody_uses(pools)
        chosen = [
            tag
            for tag in pools.stats().tags
            if named is None or tag in named or tag not in DEFERRABLE_TAGS
        ]
        if not chosen:
            return
        empty = self._empty_handles(chosen) if create_and_map is not _own_create_and_map else []
        logger.info("%s", pools.wake_up(chosen))
        for handle in empty:
            create_and_map(handle)
        self._run_after_map_hooks()

    @contextlib.contextmanager
    def _unmapping(self, tags: Collection[str] | None) -> Iterator[None]:
        """Runs the hooks that vLLM has for memory of the tags, around the body that unmaps it.

        Where the body fails, everything is mapped as before, and so what the hooks have taken down
        is put up again.
        """
        before = _their_hooks("run_before_unmap_hooks")
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
        after = _their_hooks("run_after_map_hooks")
        if after is not None:
            after(list(self.pointer_to_data.values()))

    def _empty_handles(self, tags: Sequence[str]) -> list[HandleType]:
        return [
            _data(info).handle
            for info in _pools().snapshot()
            if info.state == "discarded" and info.tag in tags
        ]

    # ---- what there is

    def get_current_usage(self) -> int:
        """Bytes of all allocations, awake or asleep."""
        stats = _pools().stats()
        return stats.awake_bytes + stats.asleep_bytes

    @property
    def pointer_to_data(self) -> Mapping[int, AllocationData]:
        """Every allocation as it is now, by its address, in order of allocation; read-only."""
        return MappingProxyType({info.address: _data(info) for info in _pools().snapshot()})

    @property
    def current_tag(self) -> str:
        """The tag of this thread's innermost open scope, else ``default_tag``."""
        if getattr(self._capturing, "now", False):
            return self.cudagraph_tag
        scope = current_scope(_pools()._state)
        return self.default_tag if scope is None else scope.tag

    @property
    def allocator_and_pools(self) -> dict[str, list[tuple[None, None]]]:
        """For each tag, one ``(None, None)`` per time that it was entered, up to `release_pools`.

        Pools are not kept: their memory is given back when the tensors in it are gone.
        """
        return {tag: [_NO_POOL] * count for tag, count in self._entered.items()}

    # ---- the end

    def release_pools(self) -> None:
        """Gives back memory that nothing uses any more, host memory of old backups included.

        Tensors that live stay valid, and the allocator can be used again. May be called at any time
        and more than once.
        """
        self._entered.clear()
        pools = Pools._instance
        if pools is None:
            return
        gc.collect()  # graphs, which keep their pools
        pools.release_graph_pool(CUDAGRAPH_TAG)
        _return_what_nobody_uses(pools)
        pools.release_host_memory()

    def close(self) -> None:
        """As `release_pools`."""
        self.release_pools()


# ---- in vLLM's place -----------------------------------------------------------------------------

_PACKAGE: Final = "vllm.device_allocator"
_MODULE: Final = f"{_PACKAGE}.cumem"
_WORKERS: Final = "vllm.v1.worker.worker_base"

#: Functions of vLLM's package that its allocator has to call.
_HONOURED: Final = frozenset({"run_before_unmap_hooks", "run_after_map_hooks"})

_install_lock = fork_safe_lock()
_undo = contextlib.ExitStack()  # what `uninstall` puts back
_followed: list[type] = []  # worker classes that install where the backend is selected


def installed() -> bool:
    """Whether vLLM would find this module in the place of its own."""
    return sys.modules.get(_MODULE) is sys.modules[__name__]


def install() -> None:
    """Puts this module in the place of ``vllm.device_allocator.cumem``, in this process.

    Call it before vLLM allocates; calling it again changes nothing. Who has imported vLLM's
    ``CuMemAllocator`` already gets the instance of this one from its ``get_instance()``. Processes
    that vLLM starts are not reached: there, the plugin does it (`register`).

    Raises:
        UnavailableError: vLLM cannot be imported, has no such module, or one that can do what this
            one cannot: a newer vLLM than this version of cumempool knows.
        InUseError: vLLM's own allocator holds memory already.
    """
    if installed():
        return
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise UnavailableError(
            f"install: {_PACKAGE} cannot be imported: {error}; install vLLM 0.33 or newer",
            operation="install",
            advice="install vLLM 0.33 or newer",
        ) from error
    with _install_lock:
        if installed():
            return
        replaced = sys.modules.get(_MODULE)
        _refuse_own_memory("install", replaced)
        _refuse_unknown_surface(package)
        this = sys.modules[__name__]
        _replace(package, "cumem", this)
        if replaced is not None:
            _replace(replaced.CuMemAllocator, "get_instance", staticmethod(_instance))
            _replace(replaced, "CuMemAllocator", CuMemAllocator)
            _undo.callback(sys.modules.__setitem__, _MODULE, replaced)
        else:
            _undo.callback(sys.modules.pop, _MODULE, None)
        sys.modules[_MODULE] = this


def uninstall() -> None:
    """Takes `install` back; without one it does nothing.

    Memory that was allocated meanwhile stays with ``cumempool.CuMemAllocator.get_instance()``.
    """
    with _install_lock:
        _undo.close()


def _instance() -> CuMemAllocator:
    return CuMemAllocator.get_instance()


def _replace(owner: Any, name: str, value: object) -> None:
    """Sets an attribute until `uninstall`."""
    if name in vars(owner):
        _undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        _undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _their_hooks(name: str) -> Callable[..., None] | None:
    """A function of vLLM's package that its allocator has to call, where there is one."""
    found: Callable[..., None] | None = getattr(sys.modules.get(_PACKAGE), name, None)
    return found


def _refuse_unknown_surface(package: ModuleType) -> None:
    """Raises where vLLM's own module has what vLLM would call, or have called, in vain here."""
    unknown = [
        f"{_PACKAGE}.{name}"
        for name in vars(package)
        if name.startswith("run_") and name not in _HONOURED
    ]
    spec = importlib.util.find_spec(_MODULE)
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        unknown += [
            f"{_MODULE}.{name}" for name in _public_functions(tree) if name not in globals()
        ]
        unknown += [
            f"{_MODULE}.CuMemAllocator.{name}"
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == "CuMemAllocator"
            for name in _public_functions(node)
            if not hasattr(CuMemAllocator, name)
        ]
    if unknown:
        advice = "install a newer cumempool, or use vLLM's own backend"
        raise UnavailableError(
            f"install: this vLLM has what this version of cumempool does not know: "
            f"{', '.join(sorted(unknown))}; {advice}",
            operation="install",
            advice=advice,
        )


def _public_functions(node: ast.Module | ast.ClassDef) -> list[str]:
    return [
        inner.name
        for inner in node.body
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not inner.name.startswith("_")
    ]


def _refuse_own_memory(operation: str, module: ModuleType | None) -> None:
    """Raises where vLLM's own allocator, which is another one, holds memory."""
    allocator = getattr(getattr(module, "CuMemAllocator", None), "instance", None)
    if module is sys.modules[__name__] or allocator is None:
        return
    used = allocator.get_current_usage()
    if used:
        advice = (
            "start vLLM with --sleep-mode-backend cumempool, or call "
            "cumempool.compat.vllm.install() before the model is loaded"
        )
        raise InUseError(
            f"{operation}: vLLM's own allocator holds {used} bytes, which cumempool cannot reach; "
            f"{advice}",
            operation=operation,
            bytes=used,
            advice=advice,
        )


# ---- the plugin ----------------------------------------------------------------------------------


def register() -> None:
    """What vLLM calls in each of its processes: the ``vllm.general_plugins`` entry point.

    Registers the sleep-mode backend ``cumempool``, and has workers that were started with
    ``--sleep-mode-backend cumempool`` call `install` before they allocate. Where ``VLLM_PLUGINS``
    names ``cumempool``, it is installed whatever the backend. Otherwise vLLM is left as it is. May
    be called more than once.

    Raises:
        InUseError: ``VLLM_PLUGINS`` names it, and vLLM's own allocator holds memory already.
        InvalidArgumentError: Somebody else has registered a backend under this name.
    """
    try:
        backends = importlib.import_module(f"{_PACKAGE}.sleep_mode_backend")
    except ImportError as error:
        logger.warning("this vLLM takes no sleep-mode backends: %s", error)
    else:
        _register_backend(backends.SleepModeBackendFactory)
        _follow_selection()
    if BACKEND in os.environ.get("VLLM_PLUGINS", "").split(","):
        install()


def _register_backend(factory: Any) -> None:
    module, name = f"{__name__}_backend", "CumempoolBackend"
    try:
        factory.register_backend(BACKEND, module, name)
    except ValueError:
        found = factory.get_backend_class(BACKEND)
        if (found.__module__, found.__name__) != (module, name):
            raise InvalidArgumentError(
                f"the sleep-mode backend {BACKEND!r} is registered already, as {found!r}"
            ) from None


def _follow_selection() -> None:
    """Has a worker install before it allocates, where its configuration selects the backend.

    Only the worker knows its configuration. Where that selects another backend, its class is as it
    was from then on.
    """
    try:
        wrapper = importlib.import_module(_WORKERS).WorkerWrapperBase
    except (ImportError, AttributeError) as error:
        logger.warning("workers of this vLLM cannot be followed: %s", error)
        return
    if wrapper in _followed:
        return
    init_device = wrapper.init_device

    @functools.wraps(init_device)
    def install_and_init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(self.vllm_config, "model_config", None)
        if getattr(model, "sleep_mode_backend", None) == BACKEND:
            install()
        elif wrapper.init_device is install_and_init_device:
            wrapper.init_device = init_device
            _followed.remove(wrapper)
        return init_device(self, *args, **kwargs)

    wrapper.init_device = install_and_init_device
    _followed.append(wrapper)
