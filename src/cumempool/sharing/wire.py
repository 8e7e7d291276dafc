"""Sends messages and file descriptors between owner and importer; identifies the peer process."""

from __future__ import annotations

import array
import functools
import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cumempool.errors import SharingError

#: Seconds for a request and its answer.
PATIENCE: Final = 10.0
#: Descriptors per message; the kernel takes up to 253.
MOST_FDS: Final = 64
_MORE: Final = b"f"  # precedes descriptors
#: Precedes an error, sent instead of descriptors.
FAILED: Final = b"e"
#: Sent instead of an answer if the owner is answering too many others.
BUSY: Final = b"b"
#: Sent by an importer when it has mapped all memory, before anything uses it.
OPENED: Final = b"o"
#: Sent by an importer when it has unmapped all memory (`Connection` in module.cpp).
RELEASED: Final = b"r"

_MOST_MESSAGE: Final = 2 << 20  # bytes; enough for the most ranges, FABRIC handles included
_LENGTH: Final = struct.Struct("!I")
_SO_PEERPIDFD: Final = 77  # Linux 6.5; the same number on all platforms that PyTorch is built for


class BusyError(EOFError):
    """The owner is answering too many others; the importer may ask again."""


class Wire:
    """A connection whose messages have a common deadline."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.heard = False  # whether anything has arrived
        self._deadline = time.monotonic() + PATIENCE

    def _hurry(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not through after {PATIENCE:.0f} seconds")
        self.connection.settimeout(left)

    def send(self, message: Mapping[str, Any], before: bytes = b"") -> None:
        """Sends a message, after a byte that says its kind if the receiver cannot know it."""
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
            self.heard = True
        return bytes(data)

    def receive(self) -> dict[str, Any]:
        """Returns the next message."""
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
        """Sends at most `MOST_FDS` descriptors; the caller still owns them."""
        self._hurry()
        socket.send_fds(self.connection, [_MORE], fds)

    def receive_fds(self, count: int) -> list[int]:
        """Returns `count` descriptors, close-on-exec; leaves none open if it raises."""
        self._hurry()
        fds = array.array("i")
        # `socket.recv_fds` ignores flags, so children could inherit the descriptors for a moment.
        room, cloexec = socket.CMSG_LEN(count * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        data, ancillary, flags, _ = self.connection.recvmsg(1, room, cloexec)
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if data == _MORE and len(fds) == count:
            return list(fds)
        close_all(fds)
        if data == FAILED:
            refusal = self.receive()
            advice = str(refusal.get("advice", ""))
            raise SharingError(f"the owner refused: {refusal.get('error')}", advice=advice)
        if data == BUSY:
            raise BusyError("too many others are being answered")
        if flags & socket.MSG_CTRUNC:
            raise SharingError("no room for more open files", advice="raise ulimit -n")
        raise EOFError("the other end hung up")


def close_all(fds: Iterable[int]) -> None:
    """Closes descriptors."""
    for fd in fds:
        os.close(fd)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Returns process and user of the other end, as the kernel reports them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, _ = struct.unpack("3i", raw)
    return process, user


@functools.cache
def _overflow_user() -> int:
    """Returns the id that stands for users without a number in this user namespace."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 65534


def is_of_this_user(process: int, user: int) -> bool:
    """Returns whether a process, with the user that the kernel reports, runs as this one's user.

    All users without a number in this namespace appear as one, the overflow user. A process that
    runs as the overflow user accepts only processes of its own namespace.
    """
    if user != os.geteuid():
        return False
    if user != _overflow_user():
        return True
    try:
        theirs, ours = os.stat(f"/proc/{process}/ns/user"), os.stat("/proc/self/ns/user")
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def pidfd_of_peer(connection: socket.socket, process: int) -> int | None:
    """Returns a pidfd of the process at the other end; None if the kernel has none."""
    from cumempool import _core

    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        # An older kernel. Another process may have taken the number meanwhile. That does no harm:
        # the importer and its end of the connection are gone then, unless a child holds that end.
        try:
            return _core.pidfd_open(process)
        except OSError:
            return None
    os.set_inheritable(pidfd, False)
    return pidfd
