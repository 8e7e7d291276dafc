"""Serves shared memory to the processes that open it, and keeps it awake while they have it open.

The owner listens on a Unix socket without a name in the file system. An importer of the same user
presents the secret of its descriptor and gets a file descriptor per allocation. Its connection is
its lease: the owner's tag is pinned until the importer says that it has released the memory, or its
process is gone. Memory sent in a message is kept until the receiver has released it.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from cumempool._locks import fork_safe_lock
from cumempool._pool.hooks import pin_tag
from cumempool.errors import ClosedError, CumempoolError, SharingError
from cumempool.sharing.descriptor import VERSION, SharedLayout, SharedMemory, SharedRange
from cumempool.sharing.leases import Lease, Leases
from cumempool.sharing.wire import (
    BUSY,
    FAILED,
    MOST_FDS,
    Wire,
    close_all,
    is_of_this_user,
    peer_of,
    pidfd_of_peer,
)

if TYPE_CHECKING:
    from cumempool import _core

_MOST_RANGES: Final = 10_000
_MOST_REQUESTS: Final = 64  # answered at the same time

_logger = logging.getLogger("cumempool")


class Endpoint:
    """Serves the memory of one allocator to processes of the same user that know its secret.

    One thread waits for requests and for the ends of leases. Each request is answered in its own
    thread, which ends within a few seconds. A secret is a signature of the shared memory, so
    sharing keeps no state.

    Attributes:
        leases: The leases that keep its memory awake.
        name: The name of the socket.
    """

    def __init__(self, core: _core.Allocator) -> None:
        self._core = core
        self.leases: Final = Leases(core)
        self._key = secrets.token_bytes(32)
        self._lock = fork_safe_lock()
        self._asking: dict[Wire, None] = {}  # no request has come yet; the oldest first
        self._connections: set[socket.socket] = set()
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        self._closing = threading.Event()
        self.name: Final = f"cumempool-{os.getpid()}-{secrets.token_hex(16)}"
        with contextlib.ExitStack() as failed:
            try:
                self._events = failed.enter_context(selectors.EpollSelector())
                self._listener = failed.enter_context(socket.socket(socket.AF_UNIX))
                self._listener.bind("\0" + self.name)
                self._listener.listen(_MOST_REQUESTS)
                self._listener.setblocking(False)
                self._events.register(self._listener, selectors.EVENT_READ, self._accept)
            except OSError as error:
                raise SharingError(
                    f"no Unix socket could be made: {error}", operation="share"
                ) from None
            failed.pop_all()
        self._thread = threading.Thread(target=self._watch, name="cumempool-sharing", daemon=True)
        self._thread.start()
        _endpoints.add(self)

    # ---- called by the allocator ---------------------------------------------------------------

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
        """Returns the descriptor of memory for other processes, with FABRIC handles if asked."""
        self._refuse_closed("share", tag)
        if len(ranges) > _MOST_RANGES:
            raise SharingError(
                f"{tag!r} has {len(ranges)} allocations, and {_MOST_RANGES} can be shared at once",
                operation="share",
                tag=tag,
                advice="share the tensors",
            )
        if fabric:
            ranges = self._give_out(tag, ranges)
        secret = self._sign(tag, writable, message, [part._key() for part in ranges])
        whose = (VERSION, driver, os.getpid(), self.name, secret)
        return SharedMemory(*whose, tag, writable, tuple(ranges), layout, message)

    def _refuse_closed(self, operation: str, tag: str) -> None:
        if self._closing.is_set():
            raise ClosedError("the allocator is closed", operation=operation, tag=tag)

    def _give_out(self, tag: str, ranges: Sequence[SharedRange]) -> list[SharedRange]:
        """Returns ranges with their FABRIC handles; their tag cannot sleep until `revoke`."""
        carrying = []
        with pin_tag(self._core, tag, "share"):
            for part in ranges:
                handle, info = self._core.export_fabric(part.address)
                _check_current(part, info)
                carrying.append(replace(part, fabric=handle))
            self.leases.give_out(tag)
        return carrying

    def close(self) -> None:
        """Ends all leases, and waits for the thread. A second close has no effect."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def stop(self) -> None:
        """Ends all leases; the thread ends soon."""
        self._closing.set()
        self.leases.end_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def _sign(self, tag: str, writable: bool, message: int, ranges: Sequence[Sequence[int]]) -> str:
        withdrawals = self.leases.withdrawals[tag]
        signed = json.dumps([VERSION, tag, withdrawals, writable, message, ranges])
        return hmac.new(self._key, signed.encode(), "sha256").hexdigest()

    # ---- the thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._events.select():
                key.data()
        for lease in self.leases.watched():
            self._end(lease)
        self._events.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if not self._closing.wait(0.1):  # no file descriptor is free; one may be later
                _logger.warning("an importer could not be accepted: %s", error)
            return
        self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        """Answers a connection in its own thread if its process is of the same user."""
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
        """Puts off the oldest connection without a request, the silent ones first."""
        with self._lock:
            silent = (wire for wire in self._asking if not wire.heard)
            wire = next(silent, next(iter(self._asking), None))
            if wire is not None:
                del self._asking[wire]
                _put_off(wire.connection)  # not closed yet: it was in `_asking`

    def _attend(self, lease: Lease) -> None:
        """Updates or ends a lease whose importer has sent a message, hung up or died."""
        if lease.connection.fileno() == -1:
            return  # both of its descriptors were ready, and the first event ended it
        self.leases.hear(lease)
        if lease.over:
            self._end(lease)
        elif lease.deaf:
            self._ignore(lease.connection)  # it would stay ready, as it was hung up

    def _end(self, lease: Lease) -> None:
        self._drop(lease)
        self._hang_up(lease.connection)

    def _drop(self, lease: Lease) -> None:
        for event in (lease.connection, lease.pidfd):
            self._ignore(event)
        self.leases.remove(lease)

    def _ignore(self, event: int | socket.socket | None) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it was not watched
            self._events.unregister(event)  # type: ignore[arg-type]

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
        """Answers a request; returns whether it has begun a lease."""
        request = wire.receive()
        with self._lock:
            self._asking.pop(wire, None)
        try:
            with contextlib.ExitStack() as failed:
                tag, ranges = self._check(request)
                pin = pin_tag(self._core, tag, f"process {process}, which has it open")
                pidfd = pidfd_of_peer(wire.connection, process)
                lease = Lease(wire.connection, pin, sum(part.bytes for part in ranges), pidfd)
                failed.callback(self._drop, lease)
                self.leases.add(lease, request["message"])
                self._check(request)  # again: a revoke() before the pin did not see the lease
                self._hand_out(wire, ranges)
                self._watch_lease(lease)
                failed.pop_all()
        except CumempoolError as error:
            # The pin is released by now: the importer may make the owner sleep.
            wire.send({"error": str(error), "advice": error.advice}, before=FAILED)
            return False
        return True

    def _watch_lease(self, lease: Lease) -> None:
        attend = partial(self._attend, lease)
        with self.leases.lock:
            self._events.register(lease.connection, selectors.EVENT_READ, attend)
            lease.watched = True
            if lease.pidfd is None:
                return
            try:
                self._events.register(lease.pidfd, selectors.EVENT_READ, attend)
            except (OSError, ValueError) as error:  # no room, or closed by now
                _logger.debug("only its connection tells the end of an importer: %s", error)
                os.close(lease.pidfd)
                lease.pidfd = None

    def _check(self, request: Mapping[str, Any]) -> tuple[str, list[SharedRange]]:
        tag, granted, writable = request["tag"], request["granted"], request["writable"]
        if not (isinstance(tag, str) and isinstance(granted, bool) and isinstance(writable, bool)):
            raise TypeError("a field of the wrong type")
        keys, message = request["ranges"], request["message"]
        signature = self._sign(tag, granted, message, keys)
        if not hmac.compare_digest(signature, request["secret"]):
            raise SharingError("this memory is not shared, or no longer", tag=tag)
        self._refuse_closed("open_shared", tag)
        if writable and not granted:
            raise SharingError("this memory is shared for reading only", tag=tag)
        return tag, [SharedRange(a, b, g, s, "") for a, b, g, s in keys]

    def _hand_out(self, wire: Wire, ranges: Sequence[SharedRange]) -> None:
        """Exports and sends ranges in batches; the pin keeps the memory awake meanwhile."""
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
        """Closes everything in a forked child, which serves nothing."""
        self._closing.set()
        self.leases.forked()
        for connection in (*self._connections, self._listener):
            connection.close()
        self._events.close()


def _put_off(connection: socket.socket) -> None:
    """Tells an importer to ask again, and shuts the connection down."""
    with contextlib.suppress(OSError):
        connection.send(BUSY, socket.MSG_DONTWAIT)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _check_current(part: SharedRange, info: Mapping[str, Any]) -> None:
    if info["sequence"] != part.sequence:
        raise SharingError(
            "the memory was freed since it was shared", operation="share", tag=info["tag"]
        )
    if info["generation"] != part.generation:
        raise SharingError(
            f"the memory is of generation {info['generation']}, and the descriptor of "
            f"{part.generation}: it has slept since it was shared; share it again",
            operation="share",
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
    """Closes all endpoints, so that none of their threads runs when the interpreter ends."""
    for endpoint in list(_endpoints):
        endpoint.close()
