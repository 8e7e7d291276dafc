"""The owner's side of shared memory: who asks for it, what he gets, and for how long.

The owner listens on a Unix socket without a name in the file system. An importer of the same user,
who has to present the secret of its descriptor, gets a file descriptor per allocation, and a FABRIC
handle where there is one; its connection is its lease: while it is open, the owner's tag is pinned,
and it ends with the importer.
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
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from cumempool.descriptor import VERSION, SharedLayout, SharedMemory, SharedRange
from cumempool.errors import (
    ClosedError,
    CumempoolError,
    DriverError,
    SharingError,
    UnsupportedError,
)
from cumempool.guard import Pin, pin_tag
from cumempool.locks import fork_safe_lock
from cumempool.wire import (
    FAILED,
    MOST_FDS,
    Wire,
    as_stream,
    close_all,
    home,
    peer_of,
    pidfd_of_peer,
    relay_name,
)

if TYPE_CHECKING:
    from cumempool import _core

__all__ = ["Endpoint"]

_MOST_RANGES: Final = 10_000
_MOST_REQUESTS: Final = 64  # that are answered at the same time
_FABRIC_HOLDER: Final = "FABRIC handles that were given out; revoke() withdraws them"

_logger = logging.getLogger("cumempool")


class _Lease:
    """One importer's connection, and the pin that goes with it.

    A child that the importer has forked may have the connection as well, so the end of the importer
    itself is watched for where the kernel can tell.
    """

    def __init__(self, connection: socket.socket, pin: Pin) -> None:
        self.connection = connection
        self.pin = pin
        self.pidfd: int | None = None
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
            secret=self._sign(tag, writable, [part._key() for part in ranges]),
            tag=tag,
            writable=writable,
            ranges=tuple(ranges),
            layout=layout,
        )

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
            given_out = self._given_out.pop(tag, None)
            ended = [lease for lease in self._leases.values() if lease.pin.tag == tag]
            ended = [lease for lease in ended if not lease.pin.released]
        for lease in ended:
            lease.end()
        if given_out is not None:
            given_out.release()
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
        signed = json.dumps([VERSION, tag, self._withdrawals.get(tag, 0), writable, ranges])
        return hmac.new(self._key, signed.encode(), "sha256").hexdigest()

    # ---- the thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        inlets = {self._listener.fileno(): self._accept, self._inlet.fileno(): self._take_relayed}
        while not self._closing.is_set():
            ready = {fd for fd, _ in self._events.poll()}
            with self._lock:
                ended = {self._lease_of_pidfd.get(fd, fd) for fd in ready - inlets.keys()}
            for fd in ended:  # before others come, who may get the same numbers
                self._end(fd)
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
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        fds = array.array("i")
        try:
            _, ancillary, _, _ = self._inlet.recvmsg(1, socket.CMSG_LEN(fds.itemsize), flags)
        except OSError as error:
            _logger.debug("nothing came over the relay: %s", error)
            return
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        for fd in fds:
            connection = as_stream(fd)
            if connection is not None:
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        """Has whoever is at the other end answered, if that is a process of the same user."""
        process, user = peer_of(connection)
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
            if lease.pidfd is not None:
                del self._lease_of_pidfd[lease.pidfd]
                self._events.unregister(lease.pidfd)
                os.close(lease.pidfd)
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
            kept = self._answer(Wire(connection), process)
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            _logger.debug("process %d went away or sent garbage: %r", process, error)
        finally:
            self._room.release()
            if not kept:
                self._hang_up(connection)

    def _answer(self, wire: Wire, process: int) -> bool:
        """Whether there is a lease now."""
        request = wire.receive()
        try:
            tag, ranges = self._check(request)
            pin = pin_tag(self._core, tag, f"process {process}, which has it open")
        except CumempoolError as error:
            wire.send({"error": str(error)}, before=FAILED)
            return False
        fd = wire.connection.fileno()
        lease = _Lease(wire.connection, pin)
        with self._lock:
            self._leases[fd] = lease
        try:
            self._check(request)  # what was withdrawn before the pin, revoke() did not see
            self._hand_out(wire, ranges, request.get("fabric") is True)
            self._watch_lease(fd, lease, process)
            return True
        except CumempoolError as error:
            refusal = str(error)
        finally:
            if not lease.watched:
                with self._lock:
                    del self._leases[fd]
                lease.pin.release()
        # Not before the pin is off: whoever is told may have the owner sleep.
        wire.send({"error": refusal}, before=FAILED)
        return False

    def _watch_lease(self, fd: int, lease: _Lease, process: int) -> None:
        with self._lock:
            self._events.register(fd, select.EPOLLIN | select.EPOLLRDHUP)
            lease.watched = True
            pidfd = pidfd_of_peer(lease.connection, process)
            if pidfd is None:
                return
            try:
                self._events.register(pidfd, select.EPOLLIN)
            except (OSError, ValueError) as error:  # no room, or closed by now
                _logger.debug("only its connection tells the end of an importer: %s", error)
                os.close(pidfd)
                return
            lease.pidfd = pidfd
            self._lease_of_pidfd[pidfd] = fd

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

    def _hand_out(self, wire: Wire, ranges: Sequence[SharedRange], fabric: bool) -> None:
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
            if fabric:
                parts = ranges[first : first + MOST_FDS]
                wire.send({"fabric": [self._fabric_handle(part) for part in parts]})

    def _fabric_handle(self, part: SharedRange) -> str | None:
        """In hexadecimal; None where the memory has none, and is used by its descriptor alone."""
        try:
            handle, info = self._core.export_fabric(part.address)
        except (UnsupportedError, DriverError) as error:
            _logger.debug("no FABRIC handle of tag %r is sent: %s", error.tag, error)
            return None
        _check_current(part, info)
        return handle.hex()

    def _forked(self) -> None:
        """In a child of the owner, which serves nothing and keeps no descriptor."""
        self._closing.set()
        self._leases.clear()
        close_all(list(self._lease_of_pidfd))
        self._lease_of_pidfd.clear()
        for connection in self._connections:
            connection.close()
        self._close_sockets()


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
