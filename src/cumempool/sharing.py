"""The importer's side of shared memory: asking its owner, mapping what he sends, tensors on it.

Also how ``torch.multiprocessing`` sends tensors of a pool: as what they are, shared memory.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from cumempool.descriptor import VERSION, SharedLayout, SharedMemory, SharedRange, layout_of
from cumempool.endpoint import Endpoint
from cumempool.errors import (
    CumempoolError,
    DriverError,
    InvalidArgumentError,
    InvalidTypeError,
    SharingError,
    UnsupportedError,
)
from cumempool.locks import fork_safe_lock
from cumempool.wire import MOST_FDS, PATIENCE, Wire, close_all, home, peer_of, relay_name

if TYPE_CHECKING:
    import torch

    from cumempool import _core
    from cumempool.allocator import CuMemAllocator

__all__ = [
    "Endpoint",
    "SharedLayout",
    "SharedMemory",
    "SharedRange",
    "install_reducers",
    "layout_of",
    "open_shared",
]

_logger = logging.getLogger("cumempool")


def open_shared(
    memory: SharedMemory,
    *,
    device: torch.device | str | int | None = None,
    writable: bool = True,
) -> torch.Tensor | list[torch.Tensor]:
    """Tensors on the physical memory of another process, or of this one.

    The owner's tag cannot sleep while they live. The memory outlives its owner. Memory that has
    FABRIC handles is imported by them, and by file descriptors where that fails. A descriptor that
    carries such handles also opens where its owner cannot be reached, on another host of the NVLink
    domain; then the owner does not know of it.

    Args:
        memory: What `CuMemAllocator.share` returned, as it arrived here.
        device: The device that will use it here; None: the one that the memory is on. Another one
            needs peer access to that, and is to be named on another host.
        writable: False maps it for reading only: torch refuses to write to the tensors, and so
            does the device, where it can.

    Returns:
        The tensor that was shared, or one of bytes per allocation of the tag that was.

    Raises:
        SharingError: The owner is gone, has withdrawn it, or has slept since (a stale generation);
            or the layout is not one of that memory.
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
    from cumempool import _torch

    _check_layout(memory)
    driver = _driver(memory.driver)
    # Once per device: a tag may have thousands of ranges.
    local = {
        name: _local_device(memory, name, device, driver.device_count)
        for name in {part.device for part in memory.ranges}
    }
    devices = [local[part.device] for part in memory.ranges]
    connection = _connect(memory)
    if connection is None:
        capsules = _map_carried(memory, driver, devices, writable)
    else:
        with connection, _talking(memory):
            wire = Wire(connection)
            _ask(wire, memory, writable)
            capsules = _map_leased(memory, driver, devices, writable, wire)
    tensors = [_torch.from_capsule(capsule) for capsule in capsules]
    if memory.layout is not None:
        tensors = [_in_layout(tensors[0], memory.layout)]
    if not writable:
        tensors = [_torch.ReadOnlyTensor(tensor) for tensor in tensors]
    return tensors if memory.layout is None else tensors[0]


def _map_leased(
    memory: SharedMemory,
    driver: _core.Driver,
    devices: Sequence[int],
    writable: bool,
    wire: Wire,
) -> list[object]:
    """Capsules of memory whose owner has been asked for it; they keep the lease."""
    from cumempool import _core

    lease = _core.Connection(wire.connection.fileno())
    capsules = []
    with contextlib.closing(_handles(wire, len(memory.ranges))) as handles:
        for part, ordinal, (fd, fabric) in zip(memory.ranges, devices, handles, strict=True):
            place = (driver, ordinal, part.bytes, writable, lease)
            try:
                capsule = None if fabric is None else _map(fabric, *place)
            except (UnsupportedError, DriverError) as error:
                _logger.debug("memory is opened by its file descriptor: %s", error)
                capsule = None
            capsules.append(_map(fd, *place) if capsule is None else capsule)
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
    from cumempool.probe import HOST_GRANULARITY

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
        if isinstance(error, CumempoolError):
            raise
        raise SharingError(
            f"process {memory.owner}, which owns the memory, does not answer "
            f"({type(error).__name__}: {error})",
            tag=memory.tag,
            advice="share it again from a process that lives",
        ) from None


def _connect(memory: SharedMemory) -> socket.socket | None:
    """A connection to the owner, by the name of its endpoint, or else by way of its relay.

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
    except (OSError, ValueError, TypeError) as error:
        connection.close()
        try:
            return _connect_by_relay(memory)
        except (OSError, ValueError, TypeError, OverflowError) as second:
            if all(part.fabric for part in memory.ranges):
                return None
            raise SharingError(
                f"process {memory.owner}, which owns the memory, cannot be reached "
                f"({type(error).__name__}: {error}; past namespaces: {second})",
                tag=memory.tag,
                advice="share it again from a process that lives",
            ) from None
    if peer_of(connection)[1] != os.geteuid():
        connection.close()
        raise SharingError("the endpoint belongs to another user", tag=memory.tag)
    return connection


def _connect_by_relay(memory: SharedMemory) -> socket.socket:
    """A connection made here, whose other end is sent to the owner over a socket copied from it.

    The kernel permits that to who may trace the owner, in whatever network namespace.

    Raises:
        OSError: It is not permitted, or there is no such process or socket.
    """
    if not memory.home or memory.home != home():
        raise ProcessLookupError("it is of another host or PID namespace")
    with _relay_of(memory) as relay:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    # Its flags are the owner's as well, so it stays as it is: blocking.
                    relay.sendmsg([b"\0"], [rights], socket.MSG_DONTWAIT)
                    return ours
                except OSError as error:
                    if not isinstance(error, BlockingIOError) or time.monotonic() > deadline:
                        ours.close()
                        raise
                time.sleep(0.01)


def _relay_of(memory: SharedMemory) -> socket.socket:
    """A copy of the owner's end of the relay."""
    from cumempool import _core

    process = _core.pidfd_open(memory.owner)
    try:
        # Who answers to the number still lives when the copy is made, so it is the same process.
        if os.stat(f"/proc/{memory.owner}").st_uid != os.geteuid():
            raise PermissionError("the process belongs to another user")
        number = _core.pidfd_getfd(process, memory.relay)
    finally:
        os.close(process)
    try:
        relay = socket.socket(fileno=number)
    except OSError:
        os.close(number)
        raise
    if relay.getsockname() != relay_name(memory.endpoint).encode():
        relay.close()
        raise ProcessLookupError("the process is another one by now")
    return relay


def _ask(wire: Wire, memory: SharedMemory, writable: bool) -> None:
    wire.send(
        {
            "tag": memory.tag,
            "granted": memory.writable,
            "writable": writable,
            "ranges": [part._key() for part in memory.ranges],
            "secret": memory.secret,
            "fabric": True,
        }
    )


def _handles(wire: Wire, count: int) -> Generator[tuple[int, bytes | None], None, None]:
    """Descriptors and FABRIC handles as they come; each is closed when the next is asked for."""
    while count:
        fds = wire.receive_fds(min(count, MOST_FDS))
        count -= len(fds)
        try:
            fabric = [
                None if text is None else bytes.fromhex(text) for text in wire.receive()["fabric"]
            ]
            for handle in fabric[: len(fds)]:
                yield fds[0], handle
                os.close(fds.pop(0))
            if fds:
                raise ValueError("fewer FABRIC handles than descriptors")
        finally:
            close_all(fds)


# ---- torch.multiprocessing -----------------------------------------------------------------------

_senders: Final[weakref.WeakSet[CuMemAllocator]] = weakref.WeakSet()
_senders_lock = fork_safe_lock()
_installed = False


def install_reducers(allocator: CuMemAllocator) -> None:
    """Has torch.multiprocessing send tensors of an allocator as what they are: shared memory.

    As with torch's own CUDA tensors, the sender keeps a tensor until the receiver has it.
    """
    global _installed
    with _senders_lock:
        _senders.add(allocator)
    if _installed:
        return
    from multiprocessing.reduction import ForkingPickler

    import torch
    import torch.multiprocessing  # which registers its own first

    ForkingPickler.register(torch.Tensor, _reduce)
    ForkingPickler.register(torch.nn.Parameter, _reduce)
    _installed = True


def _reduce(tensor: torch.Tensor) -> Any:
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    memory = _share(tensor) if tensor.is_leaf or not tensor.requires_grad else None
    if memory is None:
        return reduce_tensor(tensor)
    return _rebuild, (memory, isinstance(tensor, torch.nn.Parameter), tensor.requires_grad)


def _share(tensor: torch.Tensor) -> SharedMemory | None:
    with _senders_lock:
        senders = list(_senders)
    for allocator in senders:
        try:
            allocator.allocation_of(tensor)
        except CumempoolError:
            continue
        try:
            return allocator.share(tensor)
        except UnsupportedError:
            return None
    return None


def _rebuild(memory: SharedMemory, is_parameter: bool, requires_grad: bool) -> torch.Tensor:
    import torch

    tensor = cast("torch.Tensor", open_shared(memory))  # which has a layout
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)
