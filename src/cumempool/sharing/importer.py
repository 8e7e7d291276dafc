"""The importer's side of shared memory: asking its owner, mapping what he sends, tensors on it.

Also how ``torch.multiprocessing`` sends tensors of a pool: as what they are, shared memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
import types
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from cumempool._locks import fork_safe_lock
from cumempool._pool.devices import HOST_GRANULARITY
from cumempool.errors import (
    CumempoolError,
    DriverError,
    InvalidArgumentError,
    InvalidTypeError,
    SharingError,
    UnsupportedError,
)
from cumempool.sharing.descriptor import VERSION, SharedLayout, SharedMemory, SharedRange, layout_of
from cumempool.sharing.exports import Exports
from cumempool.sharing.leases import Export
from cumempool.sharing.owner import Endpoint
from cumempool.sharing.wire import (
    MOST_FDS,
    OPENED,
    PATIENCE,
    BusyError,
    Wire,
    close_all,
    is_of_this_user,
    peer_of,
)

if TYPE_CHECKING:
    import torch

    from cumempool import _core

__all__ = [
    "Endpoint",
    "Export",
    "SharedLayout",
    "SharedMemory",
    "SharedRange",
    "install_reducers",
    "layout_of",
    "open_shared",
    "rebuild_storage",
    "rebuild_tensor",
]

_logger = logging.getLogger("cumempool")


def open_shared(
    memory: SharedMemory,
    *,
    device: torch.device | str | int | None = None,
    writable: bool = True,
) -> torch.Tensor | list[torch.Tensor]:
    """Tensors on the physical memory of another process, or of this one.

    The owner's tag cannot sleep while they live. The memory outlives its owner. What a descriptor
    carries FABRIC handles for is imported by them, and by file descriptors where that fails. It
    also opens where its owner cannot be reached, on another host of the NVLink domain; then the
    owner does not know of it. In inference mode, too, the tensors are ordinary ones.

    Args:
        memory: What `CuMemAllocator.share` returned, as it arrived here.
        device: The device that will use it here; None: the one that the memory is on. Another one
            needs peer access to that, and is to be named on another host.
        writable: False maps it for reading only: torch refuses to write to the tensors, and so
            does the device, where it can.

    Returns:
        The tensor that was shared, or one of bytes per allocation of the tag that was.

    Raises:
        SharingError: The owner is gone, has withdrawn it, or has slept since (a stale generation),
            or answers others for too long; or the layout is not one of that memory.
        InvalidArgumentError: A descriptor of another version, or a device that does not exist.
        InvalidTypeError: It is no descriptor.
        UnsupportedError: The device cannot reach the memory, or the driver cannot map it like this.
        OutOfMemoryError: No address space, or too much is open.
    """
    if not isinstance(memory, SharedMemory):
        raise InvalidTypeError(f"a SharedMemory is needed, not {memory!r}")
    if not isinstance(writable, bool):
        raise InvalidTypeError(f"writable is a bool, not {writable!r}")
    if memory.version != VERSION:
        raise InvalidArgumentError(
            f"the descriptor is of version {memory.version}, this is {VERSION}: both processes "
            "need the same version of cumempool"
        )
    import torch

    from cumempool import _torch

    _check_layout(memory)
    driver = _driver(memory.driver)
    # Once per device: a tag may have thousands of ranges.
    local = {
        name: _local_device(memory, name, device, driver.device_count)
        for name in {part.device for part in memory.ranges}
    }
    devices = [local[part.device] for part in memory.ranges]
    capsules = _patiently(memory, lambda: _open(memory, driver, devices, writable))
    with torch.inference_mode(False):
        tensors = [_torch.from_capsule(capsule) for capsule in capsules]
        if memory.layout is not None:
            tensors = [_in_layout(tensors[0], memory.layout)]
        if not writable:
            tensors = [_torch.ReadOnlyTensor(tensor) for tensor in tensors]
    return tensors if memory.layout is None else tensors[0]


_T = TypeVar("_T")


def _patiently(memory: SharedMemory, attempt: Callable[[], _T]) -> _T:
    """Tries again for as long as the owner answers too many others."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return attempt()
        except BusyError as error:
            if time.monotonic() > deadline:
                raise SharingError(
                    f"process {memory.owner}, which owns the memory, is busy: {error}",
                    tag=memory.tag,
                    advice="open it again later, or in fewer processes at a time",
                ) from None
        time.sleep(random.uniform(0.01, 0.05))


def _open(
    memory: SharedMemory, driver: _core.Driver, devices: Sequence[int], writable: bool
) -> list[object]:
    connection = _connect(memory)
    if connection is None:
        return _map_carried(memory, driver, devices, writable)
    with connection, _talking(memory):
        return _map_leased(memory, driver, devices, writable, Wire(connection))


def _map_leased(
    memory: SharedMemory,
    driver: _core.Driver,
    devices: Sequence[int],
    writable: bool,
    wire: Wire,
) -> list[object]:
    """Capsules of memory whose owner is asked for it; they keep the lease."""
    from cumempool import _core

    # Before anything can be mapped: whatever happens, its end tells the owner that nothing is.
    lease = _core.Connection(wire.connection.fileno())
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer says why
        wire.send(memory._request(writable))
    capsules = []
    with contextlib.closing(_handles(wire, len(memory.ranges))) as handles:
        for part, ordinal, fd in zip(memory.ranges, devices, handles, strict=True):
            place = (driver, ordinal, part.bytes, writable, lease)
            try:
                capsule = _map(part.fabric, *place) if part.fabric else None
            except (UnsupportedError, DriverError) as error:
                _logger.debug("memory is opened by its file descriptor: %s", error)
                capsule = None
            capsules.append(_map(fd, *place) if capsule is None else capsule)
    with contextlib.suppress(OSError):  # gone by now, or it has revoked it: this is open
        wire.connection.sendall(OPENED)
    return capsules


def _map_carried(
    memory: SharedMemory, driver: _core.Driver, devices: Sequence[int], writable: bool
) -> list[object]:
    """Capsules of memory whose descriptor carries its handles. Nobody is asked, and none knows."""
    if writable and not memory.writable:
        raise SharingError("this memory is shared for reading only", tag=memory.tag)
    return [
        _map(part.fabric, driver, ordinal, part.bytes, writable, None)
        for part, ordinal in zip(memory.ranges, devices, strict=True)
    ]


def _map(
    exported: int | bytes,
    driver: _core.Driver,
    device: int,
    size: int,
    writable: bool,
    lease: _core.Connection | None,
) -> object:
    from cumempool import _core

    try:
        return _core.open_shared(driver, device, exported, size, writable, lease)
    except (UnsupportedError, DriverError):
        if writable:
            raise
        # Some devices map nothing for reading only; torch still refuses to write.
        return _core.open_shared(driver, device, exported, size, True, lease)


def _check_layout(memory: SharedMemory) -> None:
    layout = memory.layout
    if not memory.ranges:
        raise SharingError("the descriptor names no memory", tag=memory.tag)
    if layout is None:
        return
    import torch

    dtype = getattr(torch, layout.dtype, None)
    fits = False
    if isinstance(dtype, torch.dtype) and len(memory.ranges) == 1:
        last = sum(
            (extent - 1) * stride
            for extent, stride in zip(layout.shape, layout.strides, strict=False)
        )
        fits = (
            len(layout.shape) == len(layout.strides)
            and min((*layout.shape, *layout.strides, layout.offset), default=0) >= 0
            and layout.offset % dtype.itemsize == 0
            and layout.offset + (last + 1) * dtype.itemsize <= memory.ranges[0].bytes
        )
    if not fits:
        raise SharingError(
            f"the layout is not one of the memory that was shared: {layout} in {memory!r}",
            tag=memory.tag,
        )


def _in_layout(memory: torch.Tensor, layout: SharedLayout) -> torch.Tensor:
    import torch

    from cumempool import _torch

    dtype = getattr(torch, layout.dtype)
    return _torch.tensor_over(
        memory.untyped_storage(),
        dtype,
        layout.shape,
        layout.strides,
        layout.offset // dtype.itemsize,
    )


_drivers: Final[dict[str, _core.Driver]] = {}


def _driver(name: str) -> _core.Driver:
    """The driver that maps what others share; one of a kind per process."""
    from cumempool import _core

    driver = _drivers.get(name)
    if driver is not None:
        return driver
    # On `host`, memory of others counts for no device here.
    opened = (
        _core.open_cuda()
        if name == "cuda"
        else _core.open_host(
            devices=64,
            bytes_per_device=HOST_GRANULARITY,
            granularity=HOST_GRANULARITY,
            rdma=False,
            fabric=True,
        )
    )
    return _drivers.setdefault(name, opened)  # that of the thread that was fastest


def _local_device(
    memory: SharedMemory, name: str, device: torch.device | str | int | None, count: int
) -> int:
    """The ordinal, in this process, of the device that is to use ranges on the one of that name."""
    import torch

    kind = "cpu" if memory.driver == "host" else "cuda"
    if device is None:
        return int(name) if kind == "cpu" else _by_uuid(name)
    if isinstance(device, int) and not isinstance(device, bool):
        ordinal = device
    else:
        try:
            named = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InvalidArgumentError(f"device {device!r} does not exist: {error}") from None
        if named.type != kind:
            raise InvalidArgumentError(f"the memory is of a {kind} device, not for {named}")
        if kind == "cpu":
            return int(name)
        ordinal = torch.cuda.current_device() if named == torch.device(kind) else named.index
    if not 0 <= ordinal < count:
        raise InvalidArgumentError(f"there is no device {ordinal}: the driver has {count}")
    if kind == "cuda":
        _refuse_unreachable(ordinal, name)
    return ordinal


def _refuse_unreachable(ordinal: int, uuid: str) -> None:
    """Where the GPU of the memory is not visible here, it is left to the driver to say."""
    import torch

    owner = _visible(uuid)
    if owner in (None, ordinal) or torch.cuda.can_device_access_peer(ordinal, owner):
        return
    raise UnsupportedError(
        f"device {ordinal} cannot reach the memory, which is on device {owner}",
        operation="open_shared",
        device=ordinal,
        advice="open it on another; nvidia-smi topo -p2p rw says which reach each other",
    )


def _by_uuid(uuid: str) -> int:
    ordinal = _visible(uuid)
    if ordinal is not None:
        return ordinal
    raise InvalidArgumentError(
        f"the GPU of the memory, {uuid}, is not visible in this process; name another by `device`, "
        "or let CUDA_VISIBLE_DEVICES have it"
    )


def _visible(uuid: str) -> int | None:
    """The ordinal, in this process, of the GPU with that identity."""
    import torch

    for ordinal in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(ordinal).uuid) == uuid:
            return ordinal
    return None


@contextlib.contextmanager
def _talking(memory: SharedMemory) -> Iterator[None]:
    """Says of which owner it was that did not answer, or answered garbage."""
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError) as error:
        if isinstance(error, (CumempoolError, BusyError)):
            raise
        raise SharingError(
            f"process {memory.owner}, which owns the memory, does not answer "
            f"({type(error).__name__}: {error})",
            tag=memory.tag,
            advice="share it again from a process that lives",
        ) from None


def _connect(memory: SharedMemory) -> socket.socket | None:
    """A connection to the owner, by the name of its endpoint.

    None where there is no way to it, and none is needed: the descriptor carries all handles.
    """
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise SharingError(
            f"no Unix socket could be made: {error}", tag=memory.tag, advice="raise ulimit -n"
        ) from None
    try:
        connection.settimeout(PATIENCE)
        connection.connect("\0" + memory.endpoint)
    except BlockingIOError:
        connection.close()
        raise BusyError("too many others wait for an answer") from None
    except (OSError, ValueError, TypeError) as error:
        connection.close()
        if all(part.fabric for part in memory.ranges):
            return None
        raise SharingError(
            f"process {memory.owner}, which owns the memory, cannot be reached "
            f"({type(error).__name__}: {error})",
            tag=memory.tag,
            advice="share it again from a process that lives, in this network namespace",
        ) from None
    if not is_of_this_user(*peer_of(connection)):
        connection.close()
        raise SharingError("the endpoint belongs to another user", tag=memory.tag)
    return connection


def _handles(wire: Wire, count: int) -> Generator[int, None, None]:
    """Descriptors as they come; each is closed when the next is asked for."""
    while count:
        fds = wire.receive_fds(min(count, MOST_FDS))
        count -= len(fds)
        try:
            while fds:
                yield fds[0]
                os.close(fds.pop(0))
        finally:
            close_all(fds)


# ---- torch.multiprocessing -----------------------------------------------------------------------

_senders: Final[weakref.WeakSet[Exports]] = weakref.WeakSet()
_senders_lock = fork_safe_lock()
_installed = False


def install_reducers(exports: Exports) -> None:
    """Has torch.multiprocessing send tensors of an allocator as what they are: shared memory.

    Both torch's functions themselves and `ForkingPickler` ask here first, so that it holds whoever
    has imported those functions before, calls them, or registers reducers of his own.
    """
    global _installed
    with _senders_lock:
        _senders.add(exports)
    if _installed:
        return
    # Outside of the lock: an import may run anything. It registers torch's own first.
    from torch.multiprocessing import reductions

    with _senders_lock:
        if not _installed:
            _ask_first(reductions.reduce_tensor, _first_reduce_tensor)
            _ask_first(reductions.reduce_storage, _first_reduce_storage)
            _ask_pickler_first()
            _installed = True


#: What torch's functions did before.
_torchs_own: Final[dict[str, Callable[[Any], Any]]] = {}


def _ask_first(function: Any, instead: Any) -> None:
    """Replaces the code of a function, and with it all that is bound to the function anywhere."""
    own = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    _torchs_own[function.__name__] = own
    function.__code__ = instead.__code__


# The code of these two runs as that of torch's functions, among the globals of torch's module.
def _first_reduce_tensor(tensor: Any) -> Any:
    from cumempool.sharing import importer as sharing

    reduced = sharing._reduce(tensor)
    return sharing._torchs_own["reduce_tensor"](tensor) if reduced is None else reduced


def _first_reduce_storage(storage: Any) -> Any:
    from cumempool.sharing import importer as sharing

    reduced = sharing._reduce(storage)
    return sharing._torchs_own["reduce_storage"](storage) if reduced is None else reduced


def _ask_pickler_first() -> None:
    """Has every `ForkingPickler` ask here before it looks for a reducer that was registered."""
    from multiprocessing.reduction import ForkingPickler

    pickler: Any = ForkingPickler
    before = getattr(pickler, "reducer_override", None)

    def reducer_override(self: Any, what: Any) -> Any:
        reduced = _reduce(what)
        if reduced is not None:
            return reduced
        return NotImplemented if before is None else before(self, what)

    pickler.reducer_override = reducer_override


def _reduce(what: Any) -> Any:
    """How a tensor, parameter or storage of a pool is sent; None: it is none.

    Some receivers put their own device in the place that it has among the arguments of torch's
    `rebuild_cuda_tensor`, the seventh: `rebuild_tensor` takes it there.
    """
    import torch

    kind = type(what)
    if kind is torch.UntypedStorage:
        if what.device.type not in ("cpu", "cuda"):
            return None
        memory = _send(what, torch.empty(0, dtype=torch.uint8, device=what.device).set_(what))
        return None if memory is None else (rebuild_storage, (memory,))
    if kind not in (torch.Tensor, torch.nn.Parameter):
        return None
    taken_apart = what.layout is not torch.strided or what.is_nested
    if taken_apart or (what.requires_grad and not what.is_leaf):
        return None  # torch's own does that, and refuses the other
    memory = _send(what, what.detach())
    if memory is None or memory.layout is None:
        return None
    layout, is_parameter = memory.layout, kind is torch.nn.Parameter
    described = (is_parameter, layout.shape, layout.strides, layout.offset, None, layout.dtype)
    return rebuild_tensor, (*described, None, memory, what.requires_grad)


def _send(what: Any, tensor: torch.Tensor) -> SharedMemory | None:
    with _senders_lock:
        senders = list(_senders)
    for exports in senders:
        if not exports.holds(tensor):
            continue
        try:
            # They go with it: were they dropped, nobody could be answered.
            return exports.send(tensor, (tensor, exports))
        except UnsupportedError:
            return None
    return None


def rebuild_tensor(
    is_parameter: bool,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
    storage: None,
    dtype: str,
    device: object,
    memory: SharedMemory,
    requires_grad: bool,
) -> torch.Tensor:
    """The tensor or parameter that was sent through `torch.multiprocessing`.

    The name is part of what is sent: unpicklers with a list of what they admit have to admit it.

    Args:
        is_parameter: Whether it is a parameter.
        size: Its shape; as all up to the device for those who look at what they receive.
        stride: In elements.
        offset: In bytes, inside the allocation.
        storage: None.
        dtype: Name of the element type.
        device: The ordinal of a device here that is to use it; anything else: that of the memory.
        memory: What was shared.
        requires_grad: Whether it requires a gradient.

    Raises:
        SharingError: See `open_shared`, and all others.
    """
    import torch

    here = device if isinstance(device, int) else None
    tensor = cast("torch.Tensor", open_shared(memory, device=here))  # which has a layout
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def rebuild_storage(memory: SharedMemory) -> torch.UntypedStorage:
    """The storage that was sent through `torch.multiprocessing`; see `rebuild_tensor`."""
    from cumempool import _torch

    part = cast("torch.Tensor", open_shared(memory))  # of bytes, somewhere in the allocation
    return _torch.from_capsule(part).untyped_storage()
