"""Opens shared memory: asks its owner, maps what the owner sends, and makes tensors on it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from cumempool._pool.checks import check_bool
from cumempool._pool.devices import HOST_GRANULARITY, Devices
from cumempool.errors import (
    CumempoolError,
    DriverError,
    InvalidArgumentError,
    InvalidTypeError,
    SharingError,
    UnsupportedError,
)
from cumempool.sharing.descriptor import VERSION, SharedLayout, SharedMemory
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

_logger = logging.getLogger("cumempool")


def open_shared(
    memory: SharedMemory,
    *,
    device: torch.device | str | int | None = None,
    writable: bool = True,
) -> torch.Tensor | list[torch.Tensor]:
    """Returns tensors on the physical memory of another process, or of this one.

    The owner's tag cannot sleep while they live. The memory outlives its owner. If the descriptor
    carries FABRIC handles, they are imported, or file descriptors if that fails. Such a descriptor
    also opens if its owner cannot be reached, on another host of the NVLink domain; the owner then
    does not know of it. The tensors are ordinary ones, in inference mode too.

    Args:
        memory: The descriptor that `CuMemAllocator.share` returned, as it arrived here.
        device: The device that will use it here; None means the memory's own device. Another
            device needs peer access to that. On another host, name one.
        writable: False maps it read-only: torch refuses to write to the tensors, and so does the
            device, if it can.

    Returns:
        The shared tensor; for a shared tag, a list with a tensor of bytes per allocation.

    Raises:
        SharingError: The owner is gone, has withdrawn it, has slept since (a stale generation), or
            answers others for too long; or the layout does not fit the memory.
        InvalidArgumentError: A descriptor of another version, or a device that does not exist.
        InvalidTypeError: `memory` is no descriptor.
        UnsupportedError: The device cannot reach the memory, or the driver cannot map it like this.
        OutOfMemoryError: No address space is left, or too much is open.
    """
    if not isinstance(memory, SharedMemory):
        raise InvalidTypeError(f"a SharedMemory is needed, not {memory!r}", operation="open_shared")
    check_bool(writable=writable)
    with _opening(memory):
        tensors = _open_tensors(memory, device, writable)
    return tensors if memory.layout is None else tensors[0]


@contextlib.contextmanager
def _opening(memory: SharedMemory) -> Iterator[None]:
    """Adds the operation and the tag to errors that lack them."""
    try:
        yield
    except CumempoolError as error:
        error.operation = error.operation or "open_shared"
        error.tag = error.tag or memory.tag
        raise


def _open_tensors(
    memory: SharedMemory, device: torch.device | str | int | None, writable: bool
) -> list[torch.Tensor]:
    if memory.version != VERSION:
        raise InvalidArgumentError(
            f"the descriptor is of version {memory.version}, this is {VERSION}: both processes "
            "need the same version of cumempool"
        )
    import torch

    from cumempool import _torch

    _check_layout(memory)
    driver = _driver(memory.driver)
    # Resolved once per device: a tag may have thousands of ranges.
    local = {
        name: _local_device(memory, driver, name, device)
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
    return tensors


_T = TypeVar("_T")


def _patiently(memory: SharedMemory, attempt: Callable[[], _T]) -> _T:
    """Retries for `PATIENCE` seconds while the owner answers too many others."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return attempt()
        except BusyError as error:
            if time.monotonic() > deadline:
                raise SharingError(
                    f"process {memory.owner}, which owns the memory, is busy: {error}",
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
    """Asks the owner for the memory and returns capsules of it, which keep the lease."""
    from cumempool import _core

    # Made before anything is mapped: its end always tells the owner that nothing is mapped.
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
    with contextlib.suppress(OSError):  # the owner is gone or has revoked it: this stays open
        wire.connection.sendall(OPENED)
    return capsules


def _map_carried(
    memory: SharedMemory, driver: _core.Driver, devices: Sequence[int], writable: bool
) -> list[object]:
    """Returns capsules of memory from the handles in its descriptor, unknown to the owner."""
    if writable and not memory.writable:
        raise SharingError("this memory is shared for reading only")
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
        # Some devices cannot map read-only; torch still refuses to write.
        return _core.open_shared(driver, device, exported, size, True, lease)


def _check_layout(memory: SharedMemory) -> None:
    layout = memory.layout
    if not memory.ranges:
        raise SharingError("the descriptor names no memory")
    if layout is None:
        return
    import torch

    dtype, fits = getattr(torch, layout.dtype, None), False
    same_rank = len(layout.shape) == len(layout.strides)
    if len(memory.ranges) == 1 and same_rank and isinstance(dtype, torch.dtype):
        last = sum((n - 1) * step for n, step in zip(layout.shape, layout.strides, strict=True))
        fits = (
            min((*layout.shape, *layout.strides, layout.offset)) >= 0
            and layout.offset % dtype.itemsize == 0
            and layout.offset + (last + 1) * dtype.itemsize <= memory.ranges[0].bytes
        )
    if not fits:
        raise SharingError(
            f"the layout is not one of the memory that was shared: {layout} in {memory!r}"
        )


def _in_layout(memory: torch.Tensor, layout: SharedLayout) -> torch.Tensor:
    import torch

    from cumempool import _torch

    dtype, storage = getattr(torch, layout.dtype), memory.untyped_storage()
    first = layout.offset // dtype.itemsize
    return _torch.tensor_over(storage, dtype, layout.shape, layout.strides, first)


_drivers: Final[dict[str, _core.Driver]] = {}


def _driver(name: str) -> _core.Driver:
    """Returns the driver that maps memory of other processes; one of each kind per process."""
    from cumempool import _core

    if name in _drivers:
        return _drivers[name]
    if name == "cuda":
        opened = _core.open_cuda()
    else:  # shared memory counts for no device of this process
        size = HOST_GRANULARITY
        opened = _core.open_host(
            devices=64, bytes_per_device=size, granularity=size, rdma=False, fabric=True
        )
    return _drivers.setdefault(name, opened)  # the fastest thread's


def _local_device(
    memory: SharedMemory,
    driver: _core.Driver,
    name: str,
    device: torch.device | str | int | None,
) -> int:
    """Returns the ordinal, in this process, of the device that will use ranges on the named one."""
    on_host = memory.driver == "host"
    if device is not None:
        ordinal, _ = Devices(driver, memory.driver).resolve(device)
        if not on_host:
            _refuse_unreachable(ordinal, name)
        if not on_host or isinstance(device, int):
            return ordinal
    return int(name) if on_host else _by_uuid(name)


def _refuse_unreachable(ordinal: int, uuid: str) -> None:
    """Refuses a device without peer access. The driver decides if the owner's GPU is hidden."""
    import torch

    owner = _visible(uuid)
    if owner not in (None, ordinal) and not torch.cuda.can_device_access_peer(ordinal, owner):
        raise UnsupportedError(
            f"device {ordinal} cannot reach the memory, which is on device {owner}",
            operation="open_shared",
            device=ordinal,
            advice="open it on another; nvidia-smi topo -p2p rw lists peer access",
        )


def _by_uuid(uuid: str) -> int:
    ordinal = _visible(uuid)
    if ordinal is None:
        raise InvalidArgumentError(
            f"the GPU of the memory, {uuid}, is not visible in this process; name another by "
            "`device`, or add it to CUDA_VISIBLE_DEVICES"
        )
    return ordinal


def _visible(uuid: str) -> int | None:
    """Returns the ordinal, in this process, of the GPU with a UUID; None if it is hidden."""
    from torch import cuda

    ordinals = range(cuda.device_count())
    return next((n for n in ordinals if str(cuda.get_device_properties(n).uuid) == uuid), None)


@contextlib.contextmanager
def _talking(memory: SharedMemory) -> Iterator[None]:
    """Names the owner in errors if it does not answer, or answers garbage."""
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError) as error:
        if isinstance(error, (CumempoolError, BusyError)):
            raise
        raise SharingError(
            f"process {memory.owner}, which owns the memory, does not answer "
            f"({type(error).__name__}: {error})",
            advice="share it again from a process that lives",
        ) from None


def _connect(memory: SharedMemory) -> socket.socket | None:
    """Connects to the owner's endpoint.

    Returns None if it cannot be reached and the descriptor carries all handles.
    """
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise SharingError(
            f"no Unix socket could be made: {error}", advice="raise ulimit -n"
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
            advice="share it again from a process that lives, in this network namespace",
        ) from None
    if not is_of_this_user(*peer_of(connection)):
        connection.close()
        raise SharingError("the endpoint belongs to another user")
    return connection


def _handles(wire: Wire, count: int) -> Generator[int, None, None]:
    """Yields descriptors as they arrive, and closes each before the next."""
    while count:
        fds = wire.receive_fds(min(count, MOST_FDS))
        count -= len(fds)
        try:
            while fds:
                yield fds[0]
                os.close(fds.pop(0))
        finally:
            close_all(fds)
