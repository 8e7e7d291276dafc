"""Defines the exceptions of the library, one per status of ``cumempool/status.h``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = [
    "ERROR_BY_STATUS",
    "BackupDamagedError",
    "BackupError",
    "ClosedError",
    "CumempoolError",
    "DistributedTransitionError",
    "DriverError",
    "ForkedError",
    "InUseError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "NotInPoolError",
    "OutOfHostMemoryError",
    "OutOfMemoryError",
    "OutOfSlotsError",
    "RankState",
    "SharingError",
    "StreamCaptureError",
    "TransitionInProgressError",
    "UnavailableError",
    "UnknownTagError",
    "UnroutedWarning",
    "UnsupportedError",
    "error_from_fields",
]


class CumempoolError(Exception):
    """Base of every exception that the library raises. ``str()`` is the message.

    A call that raises has changed nothing: memory, backups and states are as they were before.

    Args:
        message: What happened, where, and what to do, as one text; the advice is appended if
            missing.
        operation: The operation that failed: ``"sleep"``, ``"wake"``, ``"malloc"``, ...; or ``""``.
        tag: The tag concerned, or None.
        device: The device ordinal, or None.
        bytes: Bytes that the failing step requested; 0 if no size is involved.
        driver_call: The driver call that failed (``"cuMemCreate"``), or ``""``.
        result: The result of that call, numbered as ``CUresult``; 0 if no driver call failed.
        result_name: The name of ``result`` (``"CUDA_ERROR_OUT_OF_MEMORY"``), or ``""``.
        free_bytes: Free memory of the device at that moment; None if unknown.
        total_bytes: Total memory of the device; None if unknown.
        advice: What to do about it; the message ends with the same words.
        secondary: Failures met while the operation was undone, as texts.
    """

    operation: str
    tag: str | None
    device: int | None
    bytes: int
    driver_call: str
    result: int
    result_name: str
    free_bytes: int | None
    total_bytes: int | None
    advice: str
    secondary: tuple[str, ...]

    # The message is the only positional argument, and the fields live in __dict__, because
    # BaseException pickles and copies exactly these.
    def __init__(
        self,
        message: str = "",
        *,
        operation: str = "",
        tag: str | None = None,
        device: int | None = None,
        bytes: int = 0,  # noqa: A002 - the name in the C record
        driver_call: str = "",
        result: int = 0,
        result_name: str = "",
        free_bytes: int | None = None,
        total_bytes: int | None = None,
        advice: str = "",
        secondary: tuple[str, ...] = (),
    ) -> None:
        if advice and advice.rstrip(".") not in message:
            message = f"{message}; {advice}" if message else advice
        super().__init__(message)
        self.operation = operation
        self.tag = tag
        self.device = device
        self.bytes = bytes
        self.driver_call = driver_call
        self.result = result
        self.result_name = result_name
        self.free_bytes = free_bytes
        self.total_bytes = total_bytes
        self.advice = advice
        self.secondary = tuple(secondary)

    def __str__(self) -> str:
        """The message."""
        return str(self.args[0]) if self.args else ""


class InvalidArgumentError(CumempoolError, ValueError):
    """The function does not accept a value.

    A negative or zero budget, an unknown policy, contradictory settings, or a feature that the
    platform does not have. The message names the argument and what is allowed. Correct the call and
    repeat it.
    """


class InvalidTypeError(InvalidArgumentError, TypeError):
    """An argument has the wrong type, such as a string or a bool for a number of bytes.

    Both a ``ValueError`` and a ``TypeError``. The message names the argument, its type and the
    expected type.
    """


class UnavailableError(CumempoolError, RuntimeError, ValueError):
    """There is no driver library, no device, or no virtual memory management on the device.

    Also a ``ValueError``, because a `CuMemConfig` that requires it is invalid here.
    ``cumempool.probe()`` says what is missing and what to do.
    """


class OutOfMemoryError(CumempoolError, RuntimeError):
    """The device has no room for a wake or an exact-size allocation.

    A failed wake leaves every allocation asleep with its backup. ``bytes`` is the requested size;
    ``free_bytes`` and ``total_bytes`` describe the device. Free memory on ``device`` (other tags
    can sleep, ``torch.cuda.empty_cache()`` returns cached blocks), then repeat the call. Inside a
    pool scope torch reports a full device by its own ``torch.OutOfMemoryError``.
    """


class OutOfHostMemoryError(CumempoolError, MemoryError):
    """A backup exceeds ``CuMemConfig.host_backup_limit`` or the host memory of the system.

    Nothing went to sleep. The message names the limit. Raise it, or discard tags that can be
    computed again.
    """


class UnknownTagError(CumempoolError, KeyError):
    """Nothing was ever allocated or declared under a tag; ``tag`` holds its name.

    The usual cause is a spelling mistake; ``allocator.stats()`` lists the known tags.
    """


class NotInPoolError(CumempoolError, ValueError):
    """The tensor or address belongs to no allocation of this allocator.

    The allocator does not count, sleep or wake memory made outside a pool scope or by another
    allocator.
    """


class TransitionInProgressError(CumempoolError, RuntimeError):
    """Called from inside a sleep, wake or discard of the same allocator.

    Call it after the transition has returned.
    """


class StreamCaptureError(CumempoolError, RuntimeError):
    """A CUDA graph capture is under way on the current stream of a device that the call concerns.

    Sleep and wake before the capture begins or after it has ended.
    """


class InUseError(CumempoolError, RuntimeError):
    """Open pool scopes or live allocations prevent the call, such as ``close()``.

    Leave the scopes and delete the tensors first, or close with force, which loses their contents.
    """


class ClosedError(CumempoolError, RuntimeError):
    """The allocator was closed. Make another one."""


class ForkedError(CumempoolError, RuntimeError):
    """The process was forked after the library was used; driver memory does not survive a fork.

    Start child processes with the ``spawn`` method.
    """


class OutOfSlotsError(CumempoolError, RuntimeError):
    """Every slot (an exported pair of torch malloc and free functions) is bound to a pool in use.

    Leave scopes, or use fewer tags and allocators at a time; a slot is free again when its pool is
    gone.
    """


class DriverError(CumempoolError, RuntimeError):
    """A driver call failed for a reason other than lack of memory.

    ``driver_call``, ``result`` and ``result_name`` identify the call and the failure. An error from
    an earlier kernel, such as an illegal address, also appears here; every later call then fails.
    """


class BackupError(CumempoolError, RuntimeError):
    """A backup file could not be made, written or read.

    A missing directory, a full disk, a failing file system. Nothing is lost: after a failed sleep
    everything is awake as before, after a failed wake asleep with its backup. Fix the directory, or
    choose another `Backup`, and repeat the call.
    """


class BackupDamagedError(BackupError):
    """A backup file no longer holds what was written to it: the disk or file system changed it.

    Nothing was woken, and sleeping memory stays asleep. ``discard()`` the tag and compute or load
    its contents again.
    """


class UnsupportedError(CumempoolError, RuntimeError):
    """The hardware or the system cannot do what was requested.

    For example, a device cannot reach the peer named for its backups or memory that another process
    shares, or the CPU cannot read a backup on a peer. The message says what is missing.
    """


class SharingError(CumempoolError, RuntimeError):
    """Memory shared by another process could not be opened.

    Its owner is gone, does not answer, or refuses: the memory was withdrawn, was freed, or has
    slept since it was shared (its generation is stale). The message says which. The owner must
    ``share()`` it again.
    """


RankState = Literal["unchanged", "contents_lost", "not_undone"]
"""State of a rank after a failed transition: as before; as before except for contents that were
discarded; or in between, because undoing failed."""


class DistributedTransitionError(CumempoolError, RuntimeError):
    """A rank failed or did not answer, so no rank of the group sleeps or wakes.

    Unlike other errors it may leave something changed; `states` says where. The message has the
    reason of every rank that failed. Fix those ranks, then repeat the call on all.

    Args:
        message: As for `CumempoolError`.
        rank: The rank in the group that raises it, or None.
        failures: Rank -> its error, for all ranks that reported one.
        unanswered: Ranks that did not answer within the timeout.
        states: Rank -> its state: ``"unchanged"``, ``"contents_lost"`` or ``"not_undone"``, for
            the ranks that reported it, including this one.
        lost_tags: Tags of this rank that were discarded and lost their contents.
        fields: The fields of `CumempoolError`.
    """

    rank: int | None
    failures: dict[int, str]
    unanswered: tuple[int, ...]
    states: dict[int, RankState]
    lost_tags: tuple[str, ...]

    def __init__(
        self,
        message: str = "",
        *,
        rank: int | None = None,
        failures: Mapping[int, str] | None = None,
        unanswered: tuple[int, ...] = (),
        states: Mapping[int, RankState] | None = None,
        lost_tags: tuple[str, ...] = (),
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.rank = rank
        self.failures = dict(failures or {})
        self.unanswered = tuple(unanswered)
        self.states = dict(states or {})
        self.lost_tags = tuple(lost_tags)


class UnroutedWarning(UserWarning):
    """A scope on the ``host`` driver allocated nothing from the pool.

    torch cannot be routed there: it allocates ordinary memory, which does not sleep. Use
    ``allocator.empty`` or ``allocator.adopt``. Given once per process.
    """


class InternalError(CumempoolError, RuntimeError):
    """A defect of this library. Report the whole message and the versions."""


#: The class for each status number of ``cumempool/status.h`` except ``CUMEMPOOL_OK``.
ERROR_BY_STATUS: dict[int, type[CumempoolError]] = {
    1: InvalidArgumentError,
    2: UnavailableError,
    3: OutOfMemoryError,
    4: OutOfHostMemoryError,
    5: UnknownTagError,
    6: NotInPoolError,
    7: TransitionInProgressError,
    8: StreamCaptureError,
    9: InUseError,
    10: ClosedError,
    11: ForkedError,
    12: OutOfSlotsError,
    13: DriverError,
    14: InternalError,
    15: BackupError,
    16: BackupDamagedError,
    17: UnsupportedError,
}


def error_from_fields(fields: Mapping[str, Any]) -> CumempoolError:
    """Returns the exception for a failure record of the C interface (``cumempool_error``).

    Args:
        fields: ``status``, ``message``, and the arguments of `CumempoolError`. Only ``status`` is
            required.

    Returns:
        An instance of ``ERROR_BY_STATUS[status]``, or of `InternalError` for an unknown status.
    """
    arguments = dict(fields)
    status = arguments.pop("status")
    message = arguments.pop("message", "") or f"status {status} without a message"
    return ERROR_BY_STATUS.get(status, InternalError)(message, **arguments)
