"""Records what keeps shared memory awake: importers that have it open, and messages."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cumempool._locks import fork_safe_lock
from cumempool._pool.hooks import Pin, pin_tag
from cumempool.errors import ClosedError
from cumempool.sharing.wire import OPENED, RELEASED, close_all

if TYPE_CHECKING:
    from cumempool import _core

_FABRIC_HOLDER: Final = "FABRIC handles that were given out; revoke() withdraws them"
_QUEUE_HOLDER: Final = "messages that were sent and not received yet; revoke() withdraws them"
#: Seconds that a sleep waits for a process that has hung up and has not yet ended.
_DYING: Final = 5.0


@dataclass(frozen=True, slots=True)
class Export:
    """Memory that another process has open or will open, and the holder that keeps it awake.

    Attributes:
        tag: The tag.
        bytes: Size of the allocations. Importers get whole allocations.
        holder: A process, or messages not received yet; as an `InUseError` names it.
        seconds: Time since it was opened or sent.
        received: False for a message not received yet.
    """

    tag: str
    bytes: int
    holder: str
    seconds: float
    received: bool


@dataclass(eq=False)
class _Message:
    """Memory that was sent, and is kept until the receiver has released it."""

    number: int
    tag: str
    bytes: int
    kept: object
    sent: float
    received: bool = False
    leases: set[Lease] = field(default_factory=set)


@dataclass(eq=False)
class Lease:
    """One importer's connection, and the pin that goes with it.

    An importer that releases the memory says so. One that dies says nothing, and the kernel closes
    its connection before it stops the work of its devices. So the lease then ends with the process,
    if the kernel can report that. A lease whose connection a child also holds ends the same way.

    Attributes:
        opened: The importer has mapped all of it.
        deaf: The connection has ended; the lease waits for the process.
        over: The importer has none of it mapped.
        watched: The endpoint's thread watches and closes it; False while it is being answered.
    """

    connection: socket.socket
    pin: Pin
    bytes: int
    pidfd: int | None
    message: _Message | None = None
    begin: float = field(default_factory=time.monotonic)
    opened: bool = False
    deaf: bool = False
    over: bool = False
    watched: bool = False

    def listen(self) -> None:
        """Reads the importer's messages and whether its process is gone, without blocking."""
        while not (self.deaf or self.over):
            try:
                said = os.read(self.connection.fileno(), 64)
            except BlockingIOError:
                break
            except OSError:  # the importer closed it with something unread
                said = b""
            if said.startswith(OPENED) and not self.opened:
                self.opened = True
                said = said.removeprefix(OPENED)
                if not said:
                    continue
            self.over = said.startswith(RELEASED) or not self.opened or self.pidfd is None
            self.deaf = not self.over
        if self.pidfd is not None and not self.over:
            self.over = _ends_within(self.pidfd, 0)


def _ends_within(pidfd: int, seconds: float) -> bool:
    events = select.poll()
    events.register(pidfd, select.POLLIN)
    return bool(events.poll(seconds * 1000))


class Leases:
    """The memory of one allocator that other processes keep awake. Thread-safe.

    Attributes:
        lock: Guards all of it.
        withdrawals: How often each tag was withdrawn.
        closed: Whether it refuses messages.
    """

    def __init__(self, core: _core.Allocator) -> None:
        self._core = core
        self.lock: Final = fork_safe_lock()
        self._turn: Final = fork_safe_lock()  # held by a change; taken before `lock`
        self.withdrawals: Final = Counter[str]()
        self.closed = False
        self._leases: set[Lease] = set()
        self._messages: dict[int, _Message] = {}
        self._numbers = itertools.count(1)
        self._queued: dict[str, Pin] = {}  # per tag, for messages not received yet
        self._given_out: dict[str, Pin] = {}  # per tag, for FABRIC handles in descriptors
        self._dropped: list[_Message] = []  # since the lock was taken

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock, and frees dropped messages after it: that may wait for a device.

        They are freed before the next change begins, so a close finds none half freed.
        """
        with self._turn:
            with self.lock:
                try:
                    yield
                finally:
                    dropped, self._dropped = self._dropped, []
            del dropped

    def keep(self, tag: str, size: int, kept: object) -> int:
        """Keeps memory for a message, and its tag awake until receipt; returns the number."""
        with self.lock:
            if self.closed:
                raise ClosedError("the allocator is closed", operation="share", tag=tag)
            if tag not in self._queued:
                self._queued[tag] = pin_tag(self._core, tag, _QUEUE_HOLDER)
            number = next(self._numbers)
            self._messages[number] = _Message(number, tag, size, kept, time.monotonic())
        return number

    def forget(self, number: int) -> None:
        """Drops a message that was not sent."""
        with self._changing():
            self._drop([self._messages[number]] if number in self._messages else [])

    def forget_all(self) -> None:
        """Drops all messages."""
        with self._changing():
            for lease in self._leases:
                lease.message = None
            self._drop(self._messages.values())

    def _drop(self, messages: Iterable[_Message]) -> None:
        """Forgets messages; their memory is freed after the lock is released."""
        dropped = list(messages)
        for message in dropped:
            self._messages.pop(message.number, None)
        for tag in {message.tag for message in dropped}:
            self._unqueue(tag)
        self._dropped += dropped

    def _unqueue(self, tag: str) -> None:
        """Releases the pin of messages on a tag if all its messages are received."""
        left = any(not one.received for one in self._messages.values() if one.tag == tag)
        if not left and tag in self._queued:
            self._queued.pop(tag).release()

    def exports(self) -> list[Export]:
        """Returns the memory that other processes keep awake, the oldest first."""
        self.settle(None)
        now = time.monotonic()
        with self.lock:
            found = [
                (lease.begin, lease.pin.tag, lease.bytes, lease.pin.holder, True)
                for lease in self._leases
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
        """Ends the leases of tags, or of all, that are over but not yet seen by the thread.

        An importer's message is in this socket before the importer can tell another process. If
        only processes that have hung up hold the tags, it waits `_DYING` seconds for them at most.
        """
        deadline = time.monotonic() + _DYING
        while True:
            with self._changing():
                leases = [lease for lease in self._leases if tags is None or lease.pin.tag in tags]
                for lease in leases:
                    self._hear(lease)
                leases = [lease for lease in leases if not lease.over]
                dying = [os.dup(lease.pidfd) for lease in leases if lease.deaf and lease.pidfd]
            try:
                left = deadline - time.monotonic()
                if tags is None or not dying or len(dying) < len(leases) or left <= 0:
                    return
                _ends_within(dying[0], left)
            finally:
                close_all(dying)

    def _hear(self, lease: Lease) -> None:
        if not lease.over:
            lease.listen()
        message = lease.message
        if message is not None and lease.opened and not message.received:
            message.received = True
            self._unqueue(message.tag)
        if lease.over:
            self._end(lease)

    def _end(self, lease: Lease) -> None:
        """Releases the pin of a lease, and hangs up; the endpoint's thread closes it."""
        self._let_go(lease)
        with contextlib.suppress(OSError):
            lease.connection.shutdown(socket.SHUT_RDWR)

    def _let_go(self, lease: Lease) -> None:
        lease.over = True
        lease.pin.release()
        message, lease.message = lease.message, None
        if message is not None:
            message.leases.discard(lease)
            if message.received and not message.leases:
                self._drop([message])

    def give_out(self, tag: str) -> None:
        """Keeps a tag awake until `revoke`: the holders of FABRIC handles are unknown."""
        with self.lock:
            if tag not in self._given_out:
                self._given_out[tag] = pin_tag(self._core, tag, _FABRIC_HOLDER)

    def revoke(self, tag: str) -> int:
        """Withdraws all shared memory of a tag; returns how many leases that has ended."""
        with self._changing():
            self.withdrawals[tag] += 1
            ended = [one for one in self._leases if one.pin.tag == tag and not one.over]
            for lease in ended:
                self._end(lease)
            self._drop(one for one in self._messages.values() if one.tag == tag)
            if tag in self._given_out:
                self._given_out.pop(tag).release()
        return len(ended)

    def end_all(self) -> None:
        """Ends all leases, drops all messages and refuses later ones."""
        with self._changing():
            self.closed = True
            for lease in self._leases:
                self._end(lease)
            self._drop(self._messages.values())

    def add(self, lease: Lease, message: int) -> None:
        """Begins a lease, and gives it the message of that number if there is one."""
        with self.lock:
            self._leases.add(lease)
            lease.message = self._messages.get(message)
            if lease.message is not None:
                lease.message.leases.add(lease)

    def hear(self, lease: Lease) -> None:
        """Updates a lease from its importer's messages, without blocking."""
        with self._changing():
            self._hear(lease)

    def remove(self, lease: Lease) -> None:
        """Ends a lease; the caller still owns its connection."""
        with self._changing():
            self._leases.discard(lease)
            if lease.pidfd is not None:
                os.close(lease.pidfd)
                lease.pidfd = None
            self._let_go(lease)

    def watched(self) -> list[Lease]:
        """Returns the leases that the endpoint's thread closes."""
        with self.lock:
            return [lease for lease in self._leases if lease.watched]

    def forked(self) -> None:
        """Forgets all leases, in a forked child of the owner."""
        close_all(lease.pidfd for lease in self._leases if lease.pidfd is not None)
        self._leases.clear()
