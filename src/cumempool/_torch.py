"""The only module that knows how torch works inside.

Routing to a slot, what torch has cached, which streams are current, expandable segments, tensors
that cannot be written to. Everything else uses public torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import torch

from cumempool.errors import InvalidArgumentError
from cumempool.locks import fork_safe_lock

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LIBRARY",
    "CurrentStream",
    "ExpandableSegmentsOff",
    "PoolRoute",
    "PrivatePool",
    "ReadOnlyTensor",
    "as_plain",
    "build_kind",
    "cached_bytes",
    "can_be_pointed",
    "current_streams",
    "dead_ranges",
    "devices_in_use",
    "dispatches",
    "empty_cache",
    "expandable_segments_bypass_pools",
    "from_capsule",
    "is_capturing",
    "is_initialized",
    "live_settings",
    "nvtx_range",
    "ordinary_tensors",
    "point",
    "replace_setting",
    "return_unused",
    "store_of_group",
    "tensor_over",
    "warm_capture_stream",
    "with_lazy_bits",
]

#: The shared library whose slots torch loads.
LIBRARY: Final = Path(__file__).parent / "lib" / "libcumempool.so"

#: From this version on, torch keeps expandable segments out of pools with an allocator of their own
#: (seen with 2.11). Earlier ones are reported to bypass the allocator (pytorch#147851).
_HONOURS_CUSTOM_POOLS: Final = (2, 11)

CurrentStream = tuple[int, int]
"""A device ordinal and the ``cudaStream_t`` that is current there, as an integer."""

_C: Final[Any] = torch._C
_logger = logging.getLogger("cumempool")


def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build_kind() -> str:
    """``"cuda"``, ``"rocm"`` or ``"cpu"``: what this torch was built for."""
    if torch.version.hip is not None:
        return "rocm"
    return "cuda" if torch.version.cuda is not None else "cpu"


def is_initialized() -> bool:
    """Whether torch has started to use CUDA in this process; asking does not start it."""
    return build_kind() == "cuda" and torch.cuda.is_initialized()


def devices_in_use() -> list[int]:
    """The current device and every other one whose primary context exists, ascending."""
    torch.cuda.init()
    current = torch.cuda.current_device()
    others = [
        device
        for device in range(torch.cuda.device_count())
        if device == current or _C._cuda_hasPrimaryContext(device)
    ]
    return sorted({current, *others})


def current_streams() -> list[CurrentStream]:
    """The calling thread's current stream of each device that is in use."""
    if not is_initialized():
        return []
    return [
        (device, int(torch.cuda.current_stream(device).cuda_stream)) for device in devices_in_use()
    ]


def is_capturing() -> bool:
    """Whether the calling thread's current stream is being captured into a graph."""
    return is_initialized() and torch.cuda.is_current_stream_capturing()


def warm_capture_stream(device: int) -> None:
    """Has cuBLAS make its workspace for torch's capture stream now, in ordinary memory.

    torch keeps one per stream for good. Made during a capture, it would lie in the memory of that
    graph, and graphs of other tags that are captured later would use it while that tag sleeps.
    Does nothing where it would not end up in ordinary memory, or the stream is on another device.
    """
    if is_capturing() or +_open_routes:
        return
    with torch.cuda.device(device):
        if torch.cuda.graph.default_capture_stream is None:
            torch.cuda.graph.default_capture_stream = torch.cuda.Stream()
        stream = torch.cuda.graph.default_capture_stream
        if stream.device.index != device:
            return
        with torch.cuda.stream(stream), torch.no_grad():
            square = torch.zeros(16, 16, dtype=torch.bfloat16, device=stream.device)
            torch.addmm(square[0], torch.mm(square, square), square)  # through both its interfaces


def empty_cache() -> None:
    """Gives torch's unused segments back, those of pools that are gone included."""
    if is_initialized():
        torch.cuda.empty_cache()


def nvtx_range(name: str) -> contextlib.AbstractContextManager[object]:
    """An NVTX range of a name, where this torch can make one."""
    if build_kind() != "cuda":
        return contextlib.nullcontext()
    mark: contextlib.AbstractContextManager[object] = torch.cuda.nvtx.range(name)
    return mark


def cached_bytes() -> int:
    """Bytes of all devices that torch holds and no tensor uses."""
    if not is_initialized():
        return 0
    return sum(
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices_in_use()
    )


def dead_ranges(live: Collection[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """(address, bytes) of the blocks that torch has cached as free in segments of custom pools.

    Pools in `live` are left out: graphs use blocks of theirs that torch has as free.
    """
    if not is_initialized():
        return []
    without = {(0, 0), *live}
    return [
        (block["address"], block["size"])
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 1))) not in without
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]


def from_capsule(capsule: object) -> torch.Tensor:
    """The uint8 tensor over the memory of a DLPack capsule; the memory goes with its storage."""
    return torch.utils.dlpack.from_dlpack(capsule)


def tensor_over(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
) -> torch.Tensor:
    """A tensor of any dtype on part of a storage; ``storage_offset`` counts elements."""
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, storage_offset, tuple(size), tuple(stride))


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is made in the body is no inference tensor, has no gradient, and asks no subclass."""
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        yield


def dispatches(tensor: torch.Tensor) -> bool:
    """Whether a subclass does the work of its tensors itself, so that a storage says nothing."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a `torch.Tensor`, past what a subclass says of its shape or dtype."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    return torch.Tensor.as_subclass(tensor, torch.Tensor)


def can_be_pointed(tensor: torch.Tensor) -> bool:
    """Whether torch lets a tensor view other memory, by `point`."""
    plain = as_plain(tensor)
    other = torch.empty(0, dtype=plain.dtype, device=plain.device)
    return torch._has_compatible_shallow_copy_type(tensor, other)


def point(tensor: torch.Tensor, storage: torch.UntypedStorage, offset: int) -> None:
    """Makes a tensor, without changing its identity, view a storage from `offset` bytes on.

    What it takes over is an inference tensor where it is one: it has no version counter, and never
    gets one. An ordinary one that took over an inference tensor would be left without gradients.
    """
    plain = as_plain(tensor)
    with torch.inference_mode(plain.is_inference()):
        moved = tensor_over(
            storage,
            plain.dtype,
            plain.shape,
            plain.stride(),
            offset // plain.element_size() + int(plain.storage_offset()),
        )
        torch.Tensor.data.__set__(tensor, moved)  # type: ignore[attr-defined]


def with_lazy_bits(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor on the bytes of `like`, read as `like` reads them: conjugated or negated lazily."""
    if like.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if like.is_neg() else tensor


# ---- read-only tensors --------------------------------------------------------------------------


def _read_only_in(value: object) -> list[ReadOnlyTensor]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return [item for item in items if isinstance(item, ReadOnlyTensor)]


class ReadOnlyTensor(torch.Tensor):
    """A tensor that operations do not write to, and neither to its views, which are of this class.

    All else that operations make of it are ordinary tensors. torch has no such thing: of an
    inference tensor it does complain, but when it has been written to already.
    """

    __torch_function__ = _C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> ReadOnlyTensor:
        """Views the memory of an ordinary tensor."""
        made: ReadOnlyTensor = torch.Tensor._make_subclass(cls, tensor)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, unless it declares to write to a tensor of this class."""
        kwargs = kwargs or {}
        named = {argument.name: argument.alias_info for argument in func._schema.arguments}
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        for name, value in given.items():
            if named[name] is not None and named[name].is_write and _read_only_in(value):
                raise InvalidArgumentError(
                    f"{func} would write to a read-only tensor: clone() it, or ask for it with "
                    "writable=True"
                )
        memory = {
            tensor.untyped_storage().data_ptr()
            for value in given.values()
            for tensor in _read_only_in(value)
        }

        def protect(result: Any) -> Any:
            if isinstance(result, (list, tuple)):
                return type(result)(map(protect, result))
            views = (
                isinstance(result, torch.Tensor)
                and not isinstance(result, cls)
                and result.device.type in ("cpu", "cuda")
                and result.layout == torch.strided
                and result.untyped_storage().data_ptr() in memory
            )
            return cls(result) if views else result

        with _C._DisableTorchDispatch():
            return protect(func(*args, **kwargs))

    def _unprotected(self) -> torch.Tensor:
        tensor = tensor_over(
            self.untyped_storage(),
            self.dtype,
            self.shape,
            self.stride(),
            int(self.storage_offset()),
        )
        return with_lazy_bits(tensor, self)

    # What torch refuses of subclasses, or would let write.

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array on the same memory."""
        array = self._unprotected().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """As of any tensor."""
        return self._unprotected().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._unprotected())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = memo.setdefault(id(self), self.clone())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __dlpack__(self, **options: object) -> Any:
        raise BufferError("a read-only tensor cannot be exchanged by DLPack: clone() it")


# ---- routing -----------------------------------------------------------------------------------

_pluggable_lock = fork_safe_lock()
# Never emptied: torch frees segments through these objects long after their pools are gone.
_pluggable: dict[int, Any] = {}


def _pluggable_allocator(slot: int) -> Any:
    with _pluggable_lock:
        if slot not in _pluggable:
            _pluggable[slot] = torch.cuda.memory.CUDAPluggableAllocator(
                str(LIBRARY), f"cumempool_malloc_{slot}", f"cumempool_free_{slot}"
            )
        return _pluggable[slot].allocator()


class PrivatePool:
    """A pool of torch's own on one device, whose segments come from a slot, until `release`.

    torch's context manager and the destructor of its ``MemPool`` are not used. The destructor
    empties the pool's cache, which torch asserts must not happen while any pool scope or graph
    capture is under way on the device, in any thread: a nested scope would abort the process. Here
    a pool is released by count, which is always allowed; torch frees it with the next emptying of
    its cache, and `return_unused` asks for that when something is there to be freed.

    Attributes:
        device: The device ordinal.
        id: What torch knows it by.
    """

    def __init__(self, slot: int, device: int) -> None:
        with torch.cuda.device(device):
            pool = torch.cuda.MemPool(_pluggable_allocator(slot))
        # The object goes on holding its count of the pool until `release` takes that count itself;
        # its destructor must never run, not even when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
        self._pool = pool
        self.device: Final = device
        self.id: Final = (int(pool.id[0]), int(pool.id[1]))

    def users(self) -> int:
        """How many counts torch has of it: graphs, routes, and this object until `release`."""
        try:
            return int(self._pool.use_count())
        except RuntimeError as error:
            # torch forgets a pool that nobody counts when it frees its last segment, and asserts
            # that it is asked of pools it knows.
            if "graph_pools.end()" not in str(error):
                raise
            return 0

    def segments(self) -> list[tuple[int, bool]]:
        """The address of each of its segments, and whether something in it is in use."""
        return [
            (segment["address"], any(block["state"] != "inactive" for block in segment["blocks"]))
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment.get("segment_pool_id", (0, 0))) == self.id
        ]

    def release(self) -> None:
        """Gives up the count of this object. What is unused goes once no graph counts it either."""
        _C._cuda_releasePool(self.device, self.id)

    def forget(self) -> None:
        """Has `return_unused` see to its segments, now that nobody counts it."""
        with _pools_lock:
            _released_pools.add(self.id)


class PoolRoute:
    """Routes allocations on some devices to a slot, from `begin` to `end`.

    They are those of the calling thread, or of every thread of the process. torch gives an
    allocation to the route that began last and takes its thread.
    """

    def __init__(self, slot: int, devices: Sequence[int], *, all_threads: bool = False) -> None:
        self._slot = slot
        self._devices = tuple(devices)
        self._all_threads = all_threads
        self._pools: list[PrivatePool] = []
        self._expandable = ExpandableSegmentsOff()

    def begin(self) -> None:
        """Makes a pool per device and starts the routing. On failure nothing is routed."""
        self._expandable.begin()
        try:
            for device in self._devices:
                self._begin_device(device)
        except BaseException:
            self.end()
            raise

    def _begin_device(self, device: int) -> None:
        pool = PrivatePool(self._slot, device)
        begin = _C._cuda_beginAllocateToPool
        if not self._all_threads:  # which older torch does not tell apart
            begin = getattr(_C, "_cuda_beginAllocateCurrentThreadToPool", begin)
        try:
            begin(device, pool.id)
        except BaseException:
            pool.release()
            raise
        with _pools_lock:
            _open_routes[device] += 1
        self._pools.append(pool)

    def end(self) -> None:
        """Ends the routing and gives up the pools; what is unused in them goes back to the slot.

        Every device is seen to, whatever torch says of one of them.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(return_unused)
            stack.callback(self._expandable.end)
            while self._pools:
                stack.callback(_end_device, self._pools.pop(0))


def _end_device(pool: PrivatePool) -> None:
    with _pools_lock:
        _open_routes[pool.device] -= 1
    pool.forget()
    _C._cuda_endAllocateToPool(pool.device, pool.id)
    _C._cuda_releasePool(pool.device, pool.id)  # the count that beginning took
    pool.release()


_pools_lock = fork_safe_lock()
# Scopes that are open, by device.
_open_routes: Counter[int] = Counter()
# Pools whose scope has ended and that torch may still hold segments of.
_released_pools: set[tuple[int, int]] = set()


def return_unused() -> None:
    """Has torch free the unused segments of pools whose scopes have ended, if there are any.

    While a scope of ours is open on any device it waits, because torch frees nothing then; the end
    of that scope comes here again.
    """
    with _pools_lock:
        if not _released_pools or +_open_routes:
            return
        unused = _forget_empty_pools()
    if not unused:
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        # torch before 2.9 refuses while somebody's capture or pool scope is under way. The segments
        # stay cached, as after any other empty_cache() that came too early.
        _logger.debug("torch refused to empty its cache; unused segments stay for now")


def _forget_empty_pools() -> bool:
    """Drops released pools that torch holds nothing of; whether any holds an unused segment."""
    held: set[tuple[int, int]] = set()
    unused = False
    for segment in torch.cuda.memory_snapshot():
        first, second = segment.get("segment_pool_id", (0, 0))
        if (first, second) not in _released_pools:
            continue
        held.add((first, second))
        unused = unused or all(block["state"] == "inactive" for block in segment["blocks"])
    _released_pools.intersection_update(held)
    return unused


# ---- expandable segments -------------------------------------------------------------------------


def _split_settings(text: str) -> list[str]:
    """The options of an allocator settings string; commas inside brackets do not separate."""
    options, depth, current = [], 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            options.append(current)
            current = ""
        else:
            current += character
    return [option.strip() for option in [*options, current] if option.strip()]


def replace_setting(text: str, name: str, value: str) -> str:
    """An allocator settings string with one option changed or added, all others as they were.

    torch resets every option that a settings string leaves out, so a change has to name them all.
    """
    kept = [option for option in _split_settings(text) if option.partition(":")[0].strip() != name]
    return ",".join([*kept, f"{name}:{value}"])


def live_settings() -> dict[str, Any]:
    """The settings of torch's caching allocator that hold now, by name."""
    settings: dict[str, Any] = torch.cuda.memory._snapshot().get("allocator_settings", {})
    return settings


def _apply_settings(text: str) -> None:
    setter = getattr(_C, "_accelerator_setAllocatorSettings", None)
    if setter is None:
        setter = _C._cuda_cudaCachingAllocator_set_allocator_settings
    setter(text)


def expandable_segments_bypass_pools() -> bool:
    """Whether torch would now make segments of pools without asking their allocator."""
    if _version() >= _HONOURS_CUSTOM_POOLS:
        return False
    return bool(live_settings().get("expandable_segments", False))


class ExpandableSegmentsOff:
    """Keeps expandable segments away while a scope is open, where this torch needs that.

    The setting is one for the process: the first scope switches it off, the last one puts back what
    was there. A settings string that somebody applied in between is left alone.
    """

    _lock = fork_safe_lock()
    _open = 0
    _before: str | None = None
    _ours = ""

    def begin(self) -> None:
        """Switches expandable segments off if they are on and would bypass the pool."""
        if _version() >= _HONOURS_CUSTOM_POOLS:
            return
        cls = ExpandableSegmentsOff
        with cls._lock:
            cls._open += 1
            settings = live_settings()
            if not settings.get("expandable_segments", False):
                return
            cls._before = str(settings.get("PYTORCH_CUDA_ALLOC_CONF", ""))
            cls._ours = replace_setting(cls._before, "expandable_segments", "False")
            _apply_settings(cls._ours)

    def end(self) -> None:
        """Puts the setting back when the last open scope ends."""
        cls = ExpandableSegmentsOff
        with cls._lock:
            if cls._open == 0:
                return
            cls._open -= 1
            if cls._open or cls._before is None:
                return
            before, cls._before = cls._before, None
            if live_settings().get("PYTORCH_CUDA_ALLOC_CONF", "") == cls._ours:
                _apply_settings(before)

    def __enter__(self) -> ExpandableSegmentsOff:
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


def store_of_group(group: ProcessGroup | None) -> Any:
    """The store that the ranks of a process group met through; None: of the default group."""
    from torch.distributed import distributed_c10d

    chosen: Any = distributed_c10d.GroupMember.WORLD if group is None else group
    if hasattr(chosen, "get_group_store"):  # not in every torch since 2.6
        return chosen.get_group_store()
    return distributed_c10d._world.pg_map[chosen][1]
