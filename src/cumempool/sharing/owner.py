"""The owner's side of shared memory: who asks for it, what he gets, and for how long.

The owner listens on a Unix socket without a name in the file system. An importer of the same user,
who has to present the secret of its descriptor, gets a file descriptor per allocation. Its
connection is its lease: the owner's tag is pinned until the importer says that it has released the
memory, or its process is gone. Memory that was sent in a message is kept until it was received and
released.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import json
import logging
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from cumempool._locks import fork_safe_lock
from cumempool._pool.hooks import Pin, pin_tag
from cumempool._pool.publishing import home
from cumempool.errors import ClosedError, CumempoolError, SharingError
from cumempool.sharing.descriptor import VERSION, SharedLayout, SharedMemory, SharedRange
from cumempool.sharing.wire import (
    BUSY,
    FAILED,
    MOST_FDS,
    OPENED,
    RELEASED,
    Wire,
    as_stream,
    close_all,
    is_of_this_user,
    peer_of,
    pidfd_of_peer,
    receive_rights,
    relay_name,
)

if TYPE_CHECKING:
    from cumempool import _core

__all__ = ["Endpoint", "Export"]

_MOST_RANGES: Final = 10_000
_MOST_REQUESTS: Final = 64  # that are answered at the same time
_FABRIC_HOLDER: Final = "FABRIC handles that were given out; revoke() withdraws them"
_QUEUE_HOLDER: Final = "messages that were sent and not received yet; revoke() withdraws them"
#: Seconds for which a sleep waits for a process that has hung up and is not quite gone.
_DYING: Final = 5.0

_logger = logging.getLogger("cumempool")


@dataclass(frozen=True, slots=True)
class Export:
    """Memory that others have open, or will open, and who keeps it awake by that.

    Attributes:
        tag: The tag.
        bytes: Of the allocations concerned; of whole allocations, as importers get them.
        holder: A process, or messages that nobody has received; as an `InUseError` names it.
        seconds: For how long.
        received: False for a message that nobody has received.
    """

    tag: str
    bytes: int
    holder: str
    seconds: float
    received: bool


@dataclass(eq=False)
class _Message:
    """Memory that was sent, and is kept until it was received and released."""

    tag: str
    bytes: int
    kept: object
    sent: float
    received: bool = False
    leases: set[_Lease] = field(default_factory=set)


class _Lease:
    """One importer's connection, and the pin that goes with it.

    An importer that lets go says so. One that dies says nothing: its connection is closed before
    the work is stopped that it had its devices do, so what counts is that the process is gone,
    where the kernel can tell. That is also how a lease ends whose connection a child has as well.

    Attributes:
        opened: The importer has mapped all of it.
        deaf: Nothing more will come over the connection, and the process has to be waited for.
        over: The importer has none of it mapped.
        watched: By the thread that closes it; else it is still being answered.
        heard: That thread is told of what comes over the connection.
    """

    def __init__(self, connection: socket.socket, pin: Pin, size: int, pidfd: int | None) -> None:
        self.connection = connection
        self.pin = pin
        self.bytes = size
        self.pidfd = pidfd
        self.message: _Message | None = None
        self.begin = time.monotonic()
        self.opened = self.deaf = self.over = self.watched = self.heard = False

    def listen(self) -> None:
        """Takes in what has come over the connection, which does not block."""
        while not (self.deaf or self.over):
            try:
                said = os.read(self.connection.fileno(), 64)
            except BlockingIOError:
                return
            except OSError:  # it was closed with something unread
                said = b""
            if said.startswith(OPENED) and not self.opened:
                self.opened = True
                said = said.removeprefix(OPENED)
                if not said:
                    continue
            self.over = said.startswith(RELEASED) or not self.opened or self.pidfd is None
            self.deaf = not self.over

    def look(self) -> None:
        """Takes in whether the process is gone."""
        if self.pidfd is not None and not self.over:
            events = select.poll()
            events.register(self.pidfd, select.POLLIN)
            self.over = bool(events.poll(0))

    def end(self) -> None:
        """Takes the pin off; whoever has the connection finds it shut, and closes it."""
        self.over = True
        self.pin.release()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Endpoint:
    """Serves the memory of one allocator to processes of the same user who know a secret of it.

    One thread waits for requests and for the ends of leases; each request is answered in a thread
    of its own, which has ended after a few seconds. Secrets are signatures of what was shared, so
    that sharing leaves nothing behind.

    Processes in another network namespace do not find the socket's name. For them there is a pair
    of sockets: who is permitted to trace this process may copy one of them (``pidfd_getfd``) and
    send a connection over it, which is then served like any other.

    Args:
        core: The allocator.
    """

    def __init__(self, core: _core.Allocator) -> None:
        self._core = core
        self._lock = fork_safe_lock()
        self._key = secrets.token_bytes(32)
        self._withdrawals: dict[str, int] = {}  # per tag; part of what is signed
        self._leases: dict[int, _Lease] = {}
        self._lease_of_pidfd: dict[int, int] = {}
        self._given_out: dict[str, Pin] = {}  # per tag, for FABRIC handles in descriptors
        self._messages: dict[int, _Message] = {}
        self._last_message = 0
        self._queued: dict[str, Pin] = {}  # per tag, for messages that were not received
        self._asking: dict[Wire, None] = {}  # whose request has not come, the oldest first
        self._connections: set[socket.socket] = set()
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        self._closing = threading.Event()
        self.name: Final = f"cumempool-{os.getpid()}-{secrets.token_hex(16)}"
        self._home: Final = home()
        with contextlib.ExitStack() as made:
            try:
                self._open(made)
            except OSError as error:
                raise SharingError(f"no Unix socket could be made: {error}") from None
            made.pop_all()
        self._thread = threading.Thread(target=self._watch, name="cumempool-sharing", daemon=True)
        self._thread.start()
        _endpoints.add(self)

    def _open(self, made: contextlib.ExitStack) -> None:
        self._events = made.enter_context(select.epoll())
        self._listener = made.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._listener.bind("\0" + self.name)
        self._listener.listen(_MOST_REQUESTS)
        self._listener.setblocking(False)
        self._inlet, self._relay = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        made.callback(self._inlet.close)
        made.callback(self._relay.close)
        self._relay.bind(relay_name(self.name))  # by which who copies it knows what it has
        for each in (self._listener, self._inlet):
            self._events.register(each, select.EPOLLIN)

    # ---- what the allocator calls --------------------------------------------------------------

    def describe(
        self,
        driver: str,
        tag: str,
        ranges: Sequence[SharedRange],
        layout: SharedLayout | None,
        writable: bool,
        fabric: bool = False,
        message: int = 0,
    ) -> SharedMemory:
        """The descriptor of memory, for other processes; with its FABRIC handles where asked."""
        if self._closing.is_set():
            raise ClosedError("the allocator is closed", operation="share", tag=tag)
        if len(ranges) > _MOST_RANGES:
            raise SharingError(
                f"{tag!r} has {len(ranges)} allocations, and {_MOST_RANGES} can be shared at once",
                advice="share the tensors",
            )
        if fabric:
            ranges = self._give_out(tag, ranges)
        return SharedMemory(
            version=VERSION,
            driver=driver,
            owner=os.getpid(),
            home=self._home,
            endpoint=self.name,
            relay=self._relay.fileno(),
            secret=self._sign(tag, writable, message, [part._key() for part in ranges]),
            tag=tag,
            writable=writable,
            ranges=tuple(ranges),
            layout=layout,
            message=message,
        )

    def keep(self, tag: str, size: int, kept: object) -> int:
        """Keeps memory for a message, and its tag awake, until it is received; its number."""
        pin = pin_tag(self._core, tag, _QUEUE_HOLDER)
        with self._lock:
            if self._closing.is_set():
                pin.release()
                raise ClosedError("the allocator is closed", operation="share", tag=tag)
            self._last_message += 1
            self._messages[self._last_message] = _Message(tag, size, kept, time.monotonic())
            if self._queued.setdefault(tag, pin) is not pin:  # one of them is enough
                pin.release()
            return self._last_message

    def forget(self, number: int) -> None:
        """Keeps memory no longer for a message, which was not sent."""
        with self._lock:
            message = self._messages.pop(number, None)
            if message is not None:
                self._unqueue(message.tag)
        del message  # without the lock: it may wait for a device

    def forget_all(self) -> None:
        """Keeps memory for no message any longer."""
        with self._lock:
            dropped = list(self._messages.values())
            self._messages.clear()
            for lease in self._leases.values():
                lease.message = None
            for pin in self._queued.values():
                pin.release()
            self._queued.clear()
        del dropped  # without the lock: it may wait for a device

    def _unqueue(self, tag: str) -> None:
        """Takes the pin of messages off a tag of which none is left that was not received."""
        left = any(not one.received for one in self._messages.values() if one.tag == tag)
        if not left and tag in self._queued:
            self._queued.pop(tag).release()

    def exports(self) -> list[Export]:
        """What others keep awake, the oldest first."""
        self.settle(None)
        now = time.monotonic()
        with self._lock:
            found = [
                (lease.begin, lease.pin.tag, lease.bytes, lease.pin.holder, True)
                for lease in self._leases.values()
                if not lease.over
            ]
            found += [
                (one.sent, one.tag, one.bytes, _QUEUE_HOLDER, False)
                for one in self._messages.values()
                if not one.received
            ]
        return [
            Export(tag, size, who, now - begin, received)
            for begin, tag, size, who, received in sorted(found)
        ]

    def settle(self, tags: Collection[str] | None) -> None:
        """Ends leases of tags, or of all, that are over, though the thread has not seen it yet.

        What an importer has said is in the socket here before it can tell anybody else. A process
        that has hung up is waited for, for a moment, where nobody else has the tags open.
        """
        deadline = time.monotonic() + _DYING
        while True:
            with self._lock:
                leases = [
                    lease
                    for lease in self._leases.values()
                    if not lease.over and (tags is None or lease.pin.tag in tags)
                ]
                dropped = [self._hear(lease, True) for lease in leases]
                leases = [lease for lease in leases if not lease.over]
                dying = [os.dup(lease.pidfd) for lease in leases if lease.deaf and lease.pidfd]
            del dropped  # without the lock: it may wait for a device
            try:
                left = deadline - time.monotonic()
                if tags is None or not dying or len(dying) < len(leases) or left <= 0:
                    return
                events = select.poll()
                events.register(dying[0], select.POLLIN)
                events.poll(left * 1000)
            finally:
                close_all(dying)

    def _hear(self, lease: _Lease, look: bool) -> _Message | None:
        """Takes in how far an importer is; returns a message that is needed no longer."""
        lease.listen()
        if look:
            lease.look()
        message = lease.message
        if message is not None and lease.opened and not message.received:
            message.received = True
            self._unqueue(message.tag)
        return self._end_lease(lease) if lease.over else None

    def _end_lease(self, lease: _Lease) -> _Message | None:
        lease.end()
        return self._leave_message(lease)

    def _leave_message(self, lease: _Lease) -> _Message | None:
        message, lease.message = lease.message, None
        if message is None:
            return None
        message.leases.discard(lease)
        if not message.received or message.leases:
            return None
        for number, one in list(self._messages.items()):
            if one is message:
                del self._messages[number]
        return message

    def _give_out(self, tag: str, ranges: Sequence[SharedRange]) -> list[SharedRange]:
        """Ranges with their FABRIC handles. Their tag is pinned: nobody can say who has them open.

        Raises:
            UnsupportedError: The memory has none.
        """
        pin = pin_tag(self._core, tag, _FABRIC_HOLDER)
        kept = False
        try:
            carrying = []
            for part in ranges:
                handle, info = self._core.export_fabric(part.address)
                _check_current(part, info)
                carrying.append(replace(part, fabric=handle))
            with self._lock:  # one of them is enough
                kept = self._given_out.setdefault(tag, pin) is pin
            return carrying
        finally:
            if not kept:
                pin.release()

    def revoke(self, tag: str) -> int:
        """Withdraws all that was shared of a tag; returns how many leases that has ended."""
        with self._lock:
            self._withdrawals[tag] = self._withdrawals.get(tag, 0) + 1
            ended = [lease for lease in self._leases.values() if lease.pin.tag == tag]
            ended = [lease for lease in ended if not lease.over]
            dropped = self._withdraw([tag], ended)
        del dropped  # without the lock: it may wait for a device
        return len(ended)

    def _withdraw(self, tags: Collection[str], leases: Iterable[_Lease]) -> list[_Message]:
        """Ends leases, and all that keeps tags; returns messages that are needed no longer."""
        for lease in leases:
            self._end_lease(lease)
        dropped = {number: one for number, one in self._messages.items() if one.tag in tags}
        for number in dropped:
            del self._messages[number]
        for tag in tags:
            for pins in (self._queued, self._given_out):
                if tag in pins:
                    pins.pop(tag).release()
        return list(dropped.values())

    def close(self) -> None:
        """Ends all leases, and waits for the thread. Closing twice is no error."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def stop(self) -> None:
        """Ends all leases; the thread ends soon."""
        with self._lock:
            self._closing.set()
            dropped = self._withdraw(
                {*self._queued, *(one.tag for one in self._messages.values())},
                list(self._leases.values()),
            )
        del dropped  # without the lock: it may wait for a device
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def _sign(self, tag: str, writable: bool, message: int, ranges: Sequence[Sequence[int]]) -> str:
        withdrawals = self._withdrawals.get(tag, 0)
        signed = json.dumps([VERSION, tag, withdrawals, writable, message, ranges])
        return hmac.new(self._key, signed.encode(), "sha256").hexdigest()

    # ---- the thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        inlets = {self._listener.fileno(): self._accept, self._inlet.fileno(): self._take_relayed}
        while not self._closing.is_set():
            ready = {fd for fd, _ in self._events.poll()}
            with self._lock:
                heard = {self._lease_of_pidfd.get(fd, fd) for fd in ready - inlets.keys()}
            for fd in heard:  # before others come, who may get the same numbers
                self._attend(fd)
            for fd in ready & inlets.keys():
                inlets[fd]()
        with self._lock:
            watched = [fd for fd, lease in self._leases.items() if lease.watched]
        for fd in watched:
            self._end(fd)
        self._close_sockets()

    def _close_sockets(self) -> None:
        for each in (self._events, self._listener, self._inlet, self._relay):
            each.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if not self._closing.wait(0.1):  # no descriptors left: they may come back
                _logger.warning("an importer could not be accepted: %s", error)
            return
        self._admit(connection)

    def _take_relayed(self) -> None:
        """Takes the connection of somebody who has copied the other end."""
        try:
            _, fds, _ = receive_rights(self._inlet, 1, socket.MSG_DONTWAIT)
        except OSError as error:
            _logger.debug("nothing came over the relay: %s", error)
            return
        for fd in fds:
            connection = as_stream(fd)
            if connection is not None:
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        """Has whoever is at the other end answered, if that is a process of the same user."""
        process, user = peer_of(connection)
        if not is_of_this_user(process, user):
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
                _put_off(connection)
        else:
            self._make_room()
            _put_off(connection)
        self._hang_up(connection)

    def _make_room(self) -> None:
        """Puts off the oldest of those who have asked for nothing yet, the silent ones first."""
        with self._lock:
            silent = (wire for wire in self._asking if not wire.heard)
            wire = next(silent, next(iter(self._asking), None))
            if wire is None:
                return
            del self._asking[wire]
            _put_off(wire.connection)  # not yet closed: it is among those who ask

    def _attend(self, fd: int) -> None:
        """An importer has said something, has hung up or has gone."""
        with self._lock:
            lease = self._leases[fd]
            dropped = self._hear(lease, True)
            if lease.deaf and lease.heard:
                self._events.unregister(fd)  # which would go on saying that it was hung up
                lease.heard = False
        del dropped  # without the lock: it may wait for a device
        if lease.over:
            self._end(fd)

    def _end(self, fd: int) -> None:
        """Closes a lease that is over."""
        with self._lock:
            lease = self._leases.pop(fd)
            if lease.pidfd is not None:
                if self._lease_of_pidfd.pop(lease.pidfd, None) is not None:
                    self._events.unregister(lease.pidfd)
                os.close(lease.pidfd)
            if lease.heard:
                self._events.unregister(fd)
            dropped = self._end_lease(lease)
        del dropped  # without the lock: it may wait for a device
        self._hang_up(lease.connection)

    def _hang_up(self, connection: socket.socket) -> None:
        self._connections.discard(connection)
        connection.close()

    # ---- answering -----------------------------------------------------------------------------

    def _serve(self, connection: socket.socket, process: int) -> None:
        kept = False
        wire = Wire(connection)
        with self._lock:
            self._asking[wire] = None
        try:
            kept = self._answer(wire, process)
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            _logger.debug("process %d went away or sent garbage: %r", process, error)
        finally:
            with self._lock:
                self._asking.pop(wire, None)
            self._room.release()
            if not kept:
                self._hang_up(connection)

    def _answer(self, wire: Wire, process: int) -> bool:
        """Whether there is a lease now."""
        request = wire.receive()
        with self._lock:
            self._asking.pop(wire, None)
        try:
            tag, ranges = self._check(request)
            pin = pin_tag(self._core, tag, f"process {process}, which has it open")
        except CumempoolError as error:
            wire.send({"error": str(error)}, before=FAILED)
            return False
        size = sum(part.bytes for part in ranges)
        lease = _Lease(wire.connection, pin, size, pidfd_of_peer(wire.connection, process))
        fd = wire.connection.fileno()
        with self._lock:
            self._leases[fd] = lease
            lease.message = self._messages.get(request["message"])
            if lease.message is not None:
                lease.message.leases.add(lease)
        try:
            self._check(request)  # what was withdrawn before the pin, revoke() did not see
            self._hand_out(wire, ranges)
            self._watch_lease(fd, lease)
            return True
        except CumempoolError as error:
            refusal = str(error)
        finally:
            if not lease.watched:
                self._abandon(fd, lease)
        # Not before the pin is off: whoever is told may have the owner sleep.
        wire.send({"error": refusal}, before=FAILED)
        return False

    def _abandon(self, fd: int, lease: _Lease) -> None:
        """Gives up a lease whose importer has not got all of it."""
        with self._lock:
            del self._leases[fd]
            lease.over = True
            lease.pin.release()
            dropped = self._leave_message(lease)
            if lease.pidfd is not None:
                os.close(lease.pidfd)
        del dropped  # without the lock: it may wait for a device

    def _watch_lease(self, fd: int, lease: _Lease) -> None:
        with self._lock:
            self._events.register(fd, select.EPOLLIN | select.EPOLLRDHUP)
            lease.watched = lease.heard = True
            if lease.pidfd is None:
                return
            try:
                self._events.register(lease.pidfd, select.EPOLLIN)
            except (OSError, ValueError) as error:  # no room, or closed by now
                _logger.debug("only its connection tells the end of an importer: %s", error)
                os.close(lease.pidfd)
                lease.pidfd = None
                return
            self._lease_of_pidfd[lease.pidfd] = fd

    def _check(self, request: Mapping[str, Any]) -> tuple[str, list[SharedRange]]:
        tag, granted, writable = request["tag"], request["granted"], request["writable"]
        if not (isinstance(tag, str) and isinstance(granted, bool) and isinstance(writable, bool)):
            raise TypeError("a field of the wrong type")
        keys, message = request["ranges"], request["message"]
        with self._lock:
            signature = self._sign(tag, granted, message, keys)
        if not hmac.compare_digest(signature, request["secret"]):
            raise SharingError("this memory is not shared, or no longer", tag=tag)
        if self._closing.is_set():
            raise ClosedError("the allocator is closed", tag=tag)
        if writable and not granted:
            raise SharingError("this memory is shared for reading only", tag=tag)
        return tag, [SharedRange(a, b, g, s, "") for a, b, g, s in keys]

    def _hand_out(self, wire: Wire, ranges: Sequence[SharedRange]) -> None:
        """Exports and sends, some at a time; the pin keeps the memory awake meanwhile."""
        for first in range(0, len(ranges), MOST_FDS):
            fds: list[int] = []
            try:
                for part in ranges[first : first + MOST_FDS]:
                    fd, info = self._core.export_fd(part.address)
                    fds.append(fd)
                    _check_current(part, info)
                wire.send_fds(fds)
            finally:
                close_all(fds)

    def _forked(self) -> None:
        """In a child of the owner, which serves nothing and keeps no descriptor."""
        self._closing.set()
        for lease in self._leases.values():
            if not lease.watched and lease.pidfd is not None:
                os.close(lease.pidfd)
        self._leases.clear()
        close_all(list(self._lease_of_pidfd))
        self._lease_of_pidfd.clear()
        for connection in self._connections:
            connection.close()
        self._close_sockets()


def _put_off(connection: socket.socket) -> None:
    """Tells an importer that it is to ask again, and hears it no longer."""
    with contextlib.suppress(OSError):
        connection.send(BUSY, socket.MSG_DONTWAIT)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


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
