"""Sharing pool memory between processes of one user: the owner's endpoint and the importer's side.

The owner listens on a Unix socket without a name in the file system. An importer of the same user,
who has to present the secret of its descriptor, gets a file descriptor per allocation; its
connection is its lease: while it is open, the owner's tag is pinned, and it ends with the importer.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import hmac
import json
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from cumempool.errors import (
    ClosedError,
    CumempoolError,
    InvalidArgumentError,
    InvalidTypeError,
    SharingError,
    UnsupportedError,
)
from cumempool.guard import Pin

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

_VERSION: Final = 1
_MOST_RANGES: Final = 10_000
_MOST_MESSAGE: Final = 2 << 20  # bytes; what so many ranges need, fabric handles included
_MOST_FDS: Final = 64  # per message; the kernel takes up to 253
_MOST_REQUESTS: Final = 64  # that are answered at the same time
_PATIENCE: Final = 10.0  # seconds for a request and its answer
_LENGTH: Final = struct.Struct("!I")
_MORE, _FAILED = b"f", b"e"  # what goes before descriptors, and before an error instead of them

_logger = logging.getLogger("cumempool")


@dataclass(frozen=True, slots=True)
class SharedRange:
    """One allocation of the owner.

    Attributes:
        address: Its start in the owner's address space.
        bytes: Its size.
        generation: Its generation when it was shared.
        sequence: What tells it from later allocations at the same address.
        device: What names its device in every process: a UUID, or the ordinal on ``host``.
    """

    address: int
    bytes: int
    generation: int
    sequence: int
    device: str

    def _key(self) -> list[int]:
        return [self.address, self.bytes, self.generation, self.sequence]


@dataclass(frozen=True, slots=True)
class SharedLayout:
    """A tensor inside a range.

    Attributes:
        offset: Bytes from the start of the range to the first element.
        dtype: Name of the element type, such as ``"bfloat16"``.
        shape: Elements per dimension.
        strides: In elements.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """What `CuMemAllocator.share` returns: small, picklable, and useless to other users.

    Attributes:
        version: Of this format.
        driver: ``"cuda"`` or ``"host"``.
        owner: Process number of the owner.
        endpoint: Name of the owner's socket, in the abstract namespace.
        secret: What the importer has to present.
        tag: The tag of the memory.
        writable: Whether importers may ask for write access.
        ranges: The allocations.
        layout: The tensor that was shared, inside the only range; None where a tag was.
    """

    version: int
    driver: str
    owner: int
    endpoint: str
    secret: str
    tag: str
    writable: bool
    ranges: tuple[SharedRange, ...]
    layout: SharedLayout | None

    def __repr__(self) -> str:
        """Without the secret."""
        total = sum(part.bytes for part in self.ranges)
        return (
            f"<SharedMemory of process {self.owner}: {total} bytes of {self.tag!r} in "
            f"{len(self.ranges)} allocations>"
        )


# ---- messages ------------------------------------------------------------------------------------


class _Wire:
    """A connection whose messages have to be through at a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._deadline = time.monotonic() + _PATIENCE

    def _hurry(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not through after {_PATIENCE:.0f} seconds")
        self.connection.settimeout(left)

    def send(self, message: Mapping[str, Any], before: bytes = b"") -> None:
        data = json.dumps(message).encode()
        self._hurry()
        self.connection.sendall(before + _LENGTH.pack(len(data)) + data)

    def _receive_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._hurry()
            part = self.connection.recv(min(count - len(data), 1 << 16))
            if not part:
                raise EOFError("the other end hung up")
            data += part
        return bytes(data)

    def receive(self) -> dict[str, Any]:
        (length,) = _LENGTH.unpack(self._receive_exactly(_LENGTH.size))
        if length > _MOST_MESSAGE:
            raise ValueError(f"a message of {length} bytes")
        try:
            message = json.loads(self._receive_exactly(length))
        except RecursionError:
            raise ValueError("a message too deep") from None
        if not isinstance(message, dict):
            raise TypeError("a message that is no object")
        return message

    def send_fds(self, fds: Sequence[int]) -> None:
        self._hurry()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        self.connection.sendmsg([_MORE], [rights])

    def receive_fds(self, count: int) -> list[int]:
        """As many descriptors, close-on-exec; none stays open where it raises."""
        self._hurry()
        fds = array.array("i")
        data, ancillary, flags, _ = self.connection.recvmsg(
            1, socket.CMSG_LEN(count * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if data == _MORE and len(fds) == count:
            return list(fds)
        _close_all(fds)
        if data == _FAILED:
            raise SharingError(f"the owner refused: {self.receive().get('error')}")
        if flags & socket.MSG_CTRUNC:
            raise SharingError("no room for more open files", advice="raise ulimit -n")
        raise EOFError("the other end hung up")


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user of the other end, as the kernel knows them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, _ = struct.unpack("3i", raw)
    return process, user


# ---- the owner's side ----------------------------------------------------------------------------


class _Lease:
    """One importer's connection, and the pin that goes with it."""

    def __init__(self, connection: socket.socket, pin: Pin) -> None:
        self.connection = connection
        self.pin = pin
        self.watched = False  # by the thread that closes it; else it is still being answered

    def end(self) -> None:
        """Takes the pin off; whoever has the connection finds it shut, and closes it."""
        self.pin.release()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Endpoint:
    """Serves the memory of one allocator to processes of the same user who know a secret of it.

    One thread waits for requests and for the ends of leases; each request is answered in a thread
    of its own, which has ended after a few seconds. Secrets are signatures of what was shared, so
    that sharing leaves nothing behind.

    Args:
        core: The allocator.
    """

    def __init__(self, core: _core.Allocator) -> None:
        self._core = core
        self._lock = threading.RLock()  # stop() may be called by the garbage collector, anywhere
        self._key = secrets.token_bytes(32)
        self._withdrawals: dict[str, int] = {}  # per tag; part of what is signed
        self._leases: dict[int, _Lease] = {}
        self._connections: set[socket.socket] = set()
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        self._closing = threading.Event()
        self.name: Final = f"cumempool-{os.getpid()}-{secrets.token_hex(16)}"
        self._events = select.epoll()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind("\0" + self.name)
            self._listener.listen(_MOST_REQUESTS)
            self._listener.setblocking(False)
            self._events.register(self._listener, select.EPOLLIN)
        except OSError as error:
            self._listener.close()
            self._events.close()
            raise SharingError(f"no Unix socket could be made: {error}") from None
        self._thread = threading.Thread(target=self._watch, name="cumempool-sharing", daemon=True)
        self._thread.start()
        _endpoints.add(self)

    # ---- what the allocator calls --------------------------------------------------------------

    def describe(
        self,
        driver: str,
        tag: str,
        ranges: Sequence[SharedRange],
        layout: SharedLayout | None,
        writable: bool,
    ) -> SharedMemory:
        """The descriptor of memory, for other processes."""
        if self._closing.is_set():
            raise ClosedError("the allocator is closed", operation="share", tag=tag)
        if len(ranges) > _MOST_RANGES:
            raise SharingError(
                f"{tag!r} has {len(ranges)} allocations, and {_MOST_RANGES} can be shared at once",
                advice="share the tensors",
            )
        secret = self._sign(tag, writable, [part._key() for part in ranges])
        return SharedMemory(
            _VERSION, driver, os.getpid(), self.name, secret, tag, writable, tuple(ranges), layout
        )

    def revoke(self, tag: str) -> int:
        """Withdraws all that was shared of a tag; returns how many leases that has ended."""
        with self._lock:
            self._withdrawals[tag] = self._withdrawals.get(tag, 0) + 1
            ended = [lease for lease in self._leases.values() if lease.pin.tag == tag]
            ended = [lease for lease in ended if not lease.pin.released]
        for lease in ended:
            lease.end()
        return len(ended)

    def close(self) -> None:
        """Ends all leases, and waits for the thread. Closing twice is no error."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def stop(self) -> None:
        """Ends all leases; the thread ends soon."""
        with self._lock:
            self._closing.set()
            leases = list(self._leases.values())
        for lease in leases:
            lease.end()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def _sign(self, tag: str, writable: bool, ranges: Sequence[Sequence[int]]) -> str:
        signed = json.dumps([_VERSION, tag, self._withdrawals.get(tag, 0), writable, ranges])
        return hmac.new(self._key, signed.encode(), "sha256").hexdigest()

    # ---- the thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        listener = self._listener.fileno()
        while not self._closing.is_set():
            for fd, _ in self._events.poll():
                if fd == listener:
                    self._accept()
                else:
                    self._end(fd)
        with self._lock:
            watched = [fd for fd, lease in self._leases.items() if lease.watched]
        for fd in watched:
            self._end(fd)
        self._events.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if not self._closing.wait(0.1):  # no descriptors left: they may come back
                _logger.warning("an importer could not be accepted: %s", error)
            return
        process, user = _peer(connection)
        if user != os.geteuid():
            _logger.warning("process %d of user %d asked for shared memory", process, user)
        elif self._room.acquire(blocking=False):
            self._connections.add(connection)
            arguments = (connection, process)
            try:
                threading.Thread(target=self._serve, args=arguments, daemon=True).start()
                return
            except RuntimeError as error:  # no more threads
                _logger.warning("an importer could not be answered: %s", error)
                self._room.release()
        self._hang_up(connection)

    def _end(self, fd: int) -> None:
        """An importer has gone, or has sent what it should not."""
        with self._lock:
            lease = self._leases.pop(fd)
        self._events.unregister(fd)
        lease.pin.release()
        self._hang_up(lease.connection)

    def _hang_up(self, connection: socket.socket) -> None:
        self._connections.discard(connection)
        connection.close()

    # ---- answering -----------------------------------------------------------------------------

    def _serve(self, connection: socket.socket, process: int) -> None:
        kept = False
        try:
            kept = self._answer(_Wire(connection), process)
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            _logger.debug("process %d went away or sent garbage: %r", process, error)
        finally:
            self._room.release()
            if not kept:
                self._hang_up(connection)

    def _answer(self, wire: _Wire, process: int) -> bool:
        """Whether there is a lease now."""
        request = wire.receive()
        try:
            tag, ranges = self._check(request)
            number = self._core.pin(tag, f"process {process}, which has it open")
        except CumempoolError as error:
            wire.send({"error": str(error)}, before=_FAILED)
            return False
        fd = wire.connection.fileno()
        lease = _Lease(
            wire.connection,
            Pin(tag, f"process {process}", lambda: self._core.unpin(number)),
        )
        with self._lock:
            self._leases[fd] = lease
        try:
            self._check(request)  # what was withdrawn before the pin, revoke() did not see
            self._hand_out(wire, ranges)
            with self._lock:
                self._events.register(fd, select.EPOLLIN | select.EPOLLRDHUP)
                lease.watched = True
            return True
        except CumempoolError as error:
            wire.send({"error": str(error)}, before=_FAILED)
            return False
        finally:
            if not lease.watched:
                with self._lock:
                    del self._leases[fd]
                lease.pin.release()

    def _check(self, request: Mapping[str, Any]) -> tuple[str, list[SharedRange]]:
        tag, granted, writable = request["tag"], request["granted"], request["writable"]
        if not (isinstance(tag, str) and isinstance(granted, bool) and isinstance(writable, bool)):
            raise TypeError("a field of the wrong type")
        keys = request["ranges"]
        with self._lock:
            signature = self._sign(tag, granted, keys)
        if not hmac.compare_digest(signature, request["secret"]):
            raise SharingError("this memory is not shared, or no longer", tag=tag)
        if self._closing.is_set():
            raise ClosedError("the allocator is closed", tag=tag)
        if writable and not granted:
            raise SharingError("this memory is shared for reading only", tag=tag)
        return tag, [SharedRange(a, b, g, s, "") for a, b, g, s in keys]

    def _hand_out(self, wire: _Wire, ranges: Sequence[SharedRange]) -> None:
        """Exports and sends, some at a time; the pin keeps the memory awake meanwhile."""
        for first in range(0, len(ranges), _MOST_FDS):
            fds: list[int] = []
            try:
                for part in ranges[first : first + _MOST_FDS]:
                    fd, info = self._core.export_fd(part.address)
                    fds.append(fd)
                    _check_current(part, info)
                wire.send_fds(fds)
            finally:
                _close_all(fds)

    def _forked(self) -> None:
        """In a child of the owner, which serves nothing and keeps no descriptor."""
        self._lock = threading.RLock()  # a thread that had it is not in this process
        self._closing.set()
        self._leases.clear()
        for connection in self._connections:
            connection.close()
        self._events.close()
        self._listener.close()


def _check_current(part: SharedRange, info: Mapping[str, Any]) -> None:
    if info["sequence"] != part.sequence:
        raise SharingError("the memory was freed since it was shared", tag=info["tag"])
    if info["generation"] != part.generation:
        raise SharingError(
            f"the memory is of generation {info['generation']}, and the descriptor of "
            f"{part.generation}: it has slept since it was shared; share it again",
            tag=info["tag"],
            advice="share it again",
        )


_endpoints: Final[weakref.WeakSet[Endpoint]] = weakref.WeakSet()


def _after_fork() -> None:
    for endpoint in _endpoints:
        endpoint._forked()


os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _close_all_endpoints() -> None:
    """No thread of theirs runs when the interpreter goes."""
    for endpoint in list(_endpoints):
        endpoint.close()


def layout_of(tensor: torch.Tensor, start: int) -> SharedLayout:
    """Where a tensor is in the allocation that starts at an address.

    Raises:
        InvalidTypeError: More than bytes, shape and strides is needed to read it.
    """
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise InvalidTypeError(
            "a quantized tensor, and one that is conjugated or negated lazily, is more than its "
            "bytes; share its resolve_conj().resolve_neg(), or its parts"
        )
    return SharedLayout(
        offset=tensor.data_ptr() - start,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
    )


# ---- the importer's side -------------------------------------------------------------------------


def open_shared(
    memory: SharedMemory,
    *,
    device: torch.device | str | int | None = None,
    writable: bool = True,
) -> torch.Tensor | list[torch.Tensor]:
    """Tensors on the physical memory of another process, or of this one.

    The owner's tag cannot sleep while they live. The memory outlives its owner.

    Args:
        memory: What `CuMemAllocator.share` returned, as it arrived here.
        device: The device that will use it here; None: the one that the memory is on. Another one
            needs peer access to that.
        writable: False maps it for reading only: torch refuses to write to the tensors, and so
            does the device, where it can.

    Returns:
        The tensor that was shared, or one of bytes per allocation of the tag that was.

    Raises:
        SharingError: The owner is gone, has withdrawn it, or has slept since (a stale generation);
            or the layout is not one of that memory.
        InvalidArgumentError: A descriptor of another version, or a device that does not exist.
        InvalidTypeError: It is no descriptor.
        UnsupportedError: The driver cannot map it like this.
        OutOfMemoryError: No address space, or too much is open.
    """
    if not isinstance(memory, SharedMemory):
        raise InvalidTypeError(f"a SharedMemory is needed, not {memory!r}")
    if not isinstance(writable, bool):
        raise InvalidTypeError(f"writable is a bool, not {writable!r}")
    if memory.version != _VERSION:
        raise InvalidArgumentError(
            f"the descriptor is of version {memory.version}, this is {_VERSION}: both processes "
            "need the same version of cumempool"
        )
    from cumempool import _core, _torch

    _check_layout(memory)
    driver = _driver(memory.driver)
    devices = [_local_device(memory, part, device, driver.device_count) for part in memory.ranges]
    tensors: list[torch.Tensor] = []
    with _ask(memory, writable) as wire:
        connection = _core.Connection(wire.connection.fileno())
        handles = _handles(wire, len(memory.ranges))
        with contextlib.closing(handles):
            for part, ordinal, fd in zip(memory.ranges, devices, handles, strict=True):
                arguments = (driver, ordinal, fd, part.bytes)
                try:
                    capsule = _core.open_shared(*arguments, writable, connection)
                except UnsupportedError:
                    if writable:
                        raise
                    # This device maps nothing for reading only; torch still refuses to write.
                    capsule = _core.open_shared(*arguments, True, connection)
                tensors.append(_torch.from_capsule(capsule))
    if memory.layout is not None:
        tensors = [_in_layout(tensors[0], memory.layout)]
    if not writable:
        tensors = [_torch.ReadOnlyTensor(tensor) for tensor in tensors]
    return tensors if memory.layout is None else tensors[0]


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


_drivers_lock = threading.Lock()
_drivers: Final[dict[str, Any]] = {}


def _driver(name: str) -> _core.Driver:
    """The driver that maps what others share; one of a kind per process."""
    from cumempool.config import CuMemConfig
    from cumempool.probe import HOST_GRANULARITY, open_driver

    with _drivers_lock:
        if name not in _drivers:
            # On `host`, memory of others counts for no device here.
            _drivers[name] = open_driver(
                CuMemConfig(driver="cuda")
                if name == "cuda"
                else CuMemConfig(
                    driver="host", host_driver_devices=64, host_driver_bytes=HOST_GRANULARITY
                )
            )
        driver: _core.Driver = _drivers[name]
        return driver


def _local_device(
    memory: SharedMemory, part: SharedRange, device: torch.device | str | int | None, count: int
) -> int:
    """The ordinal, in this process, of the device that is to use a range."""
    import torch

    kind = "cpu" if memory.driver == "host" else "cuda"
    if device is None:
        return int(part.device) if kind == "cpu" else _by_uuid(part.device)
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
            return int(part.device)
        ordinal = torch.cuda.current_device() if named == torch.device(kind) else named.index
    if not 0 <= ordinal < count:
        raise InvalidArgumentError(f"there is no device {ordinal}: the driver has {count}")
    return ordinal


def _by_uuid(uuid: str) -> int:
    import torch

    for ordinal in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(ordinal).uuid) == uuid:
            return ordinal
    raise InvalidArgumentError(
        f"the GPU of the memory, {uuid}, is not visible in this process; name another by `device`, "
        "or let CUDA_VISIBLE_DEVICES have it"
    )


@contextlib.contextmanager
def _ask(memory: SharedMemory, writable: bool) -> Iterator[_Wire]:
    """A connection to the owner, who has got the request."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        wire = _Wire(connection)
        try:
            connection.settimeout(_PATIENCE)
            connection.connect("\0" + memory.endpoint)
            if _peer(connection)[1] != os.geteuid():
                raise SharingError("the endpoint belongs to another user")
            wire.send(
                {
                    "tag": memory.tag,
                    "granted": memory.writable,
                    "writable": writable,
                    "ranges": [part._key() for part in memory.ranges],
                    "secret": memory.secret,
                }
            )
            yield wire
        except (OSError, EOFError, ValueError, TypeError) as error:
            if isinstance(error, CumempoolError):
                raise
            raise SharingError(
                f"process {memory.owner}, which owns the memory, cannot be reached, or does not "
                f"answer ({type(error).__name__}: {error})",
                tag=memory.tag,
                advice="share it again from a process that lives",
            ) from None


def _handles(wire: _Wire, count: int) -> Generator[int, None, None]:
    """Descriptors as they come; each is closed when the next one is asked for."""
    while count:
        fds = wire.receive_fds(min(count, _MOST_FDS))
        count -= len(fds)
        try:
            while fds:
                yield fds[0]
                os.close(fds.pop(0))
        finally:
            _close_all(fds)


# ---- torch.multiprocessing -----------------------------------------------------------------------

_senders: Final[weakref.WeakSet[CuMemAllocator]] = weakref.WeakSet()
_senders_lock = threading.Lock()
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
