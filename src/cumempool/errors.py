"""The exceptions of the library, one per status of ``cumempool/status.h``."""

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
        message: What happened, where, and what to do, as one text; the advice is added where it is
            not in it.
        operation: The operation that failed: ``"sleep"``, ``"wake"``, ``"malloc"``, ...; or ``""``.
        tag: The tag concerned, or None.
        device: The device ordinal, or None.
        bytes: Bytes that the failing step asked for; 0 where no size is involved.
        driver_call: The driver call that failed (``"cuMemCreate"``), or ``""``.
        result: What that call returned, numbered as ``CUresult``; 0 where no driver call failed.
        result_name: The name of ``result`` (``"CUDA_ERROR_OUT_OF_MEMORY"``), or ``""``.
        free_bytes: Free memory of the device at that moment, or None where unknown.
        total_bytes: Total memory of the device, or None where unknown.
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

    # The message is the only positional argument and the fields live in __dict__: that is what
    # BaseException needs to pickle and copy an exception with nothing lost.
    def __init__(
        self,
        message: str = "",
        *,
        operation: str = "",
        tag: str | None = None,
        device: int | None = None,
        bytes: int = 0,  # noqa: A002 - the name that the C record has
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
    """A value that the function does not take.

    A negative or zero budget, an unknown policy, settings that contradict each other, or a feature
    that the platform does not have.
    The message names the argument and what is allowed. Correct the call and repeat it.
    """


class InvalidTypeError(InvalidArgumentError, TypeError):
    """An argument of the wrong type, such as a text or a bool where a number of bytes is expected.

    Both a ``ValueError`` and a ``TypeError``. The message names the argument, the type that was
    given and the type that is expected.
    """


class UnavailableError(CumempoolError, RuntimeError, ValueError):
    """No driver library, no device, or no virtual memory management on the device.

    Also a ``ValueError``, since a `CuMemConfig` that asks for it is one that cannot be had here.
    ``cumempool.probe()`` says which of them is missing and what to do.
    """


class OutOfMemoryError(CumempoolError, RuntimeError):
    """The device has no room for what a wake or an exact-size allocation asked for.

    A failed wake leaves every allocation asleep with its backup. ``bytes``, ``free_bytes`` and
    ``total_bytes`` say how much was asked for and how much there is. Free memory on ``device``
    (other tags can sleep, ``torch.cuda.empty_cache()`` returns cached blocks), then repeat the
    call. Inside a pool scope torch reports a full device by its own ``torch.OutOfMemoryError``.
    """


class OutOfHostMemoryError(CumempoolError, MemoryError):
    """No host memory for a backup: over ``CuMemConfig.host_backup_limit``, or one of the system.

    Nothing went to sleep; the message names the limit. Raise it, or discard tags that can be
    computed again.
    """


class UnknownTagError(CumempoolError, KeyError):
    """Nothing was ever allocated or declared under that tag; ``tag`` holds it.

    The usual cause is a spelling mistake; ``allocator.stats()`` lists the tags there are.
    """


class NotInPoolError(CumempoolError, ValueError):
    """The tensor or address lies in no allocation of this allocator.

    Memory made outside a pool scope, or by another allocator, is not counted, slept or woken here.
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
    """Open pool scopes or live allocations forbid it, as they do ``close()``.

    Leave the scopes and delete the tensors first, or close by force, which loses their contents.
    """


class ClosedError(CumempoolError, RuntimeError):
    """The allocator was closed. Make another one."""


class ForkedError(CumempoolError, RuntimeError):
    """Called in a process forked after the library was used; driver memory does not survive a fork.

    Start child processes with the ``spawn`` method.
    """


class OutOfSlotsError(CumempoolError, RuntimeError):
    """Every pair of exported torch malloc and free functions is bound to a pool in use.

    Leave scopes, or use fewer tags and allocators at a time; a slot is free again when its pool is
    gone.
    """


class DriverError(CumempoolError, RuntimeError):
    """A driver call failed for another reason than a lack of memory.

    ``driver_call``, ``result`` and ``result_name`` say which and how. An error left by an earlier
    kernel (an illegal address, say) is reported here too, and no later call succeeds then.
    """


class BackupError(CumempoolError, RuntimeError):
    """A backup file could not be made, written or read.

    A missing directory, a full disk, a file system that fails. Nothing is lost: after a failed
    sleep everything is awake as before, after a failed wake asleep with its backup. See to the
    directory, or choose another `Backup`, and repeat the call.
    """


class BackupDamagedError(BackupError):
    """A backup file does not hold what was written to it: the disk or file system has changed it.

    Nothing was woken, and what is asleep stays so. ``discard()`` the tag and compute its contents
    again, or load them again.
    """


class UnsupportedError(CumempoolError, RuntimeError):
    """The hardware or the system cannot do what was asked for.

    A device that cannot reach the peer that was named for its backups, or the memory that another
    process shares; a backup that lies on a peer and was to be read by the CPU. The message says
    what is missing.
    """


class SharingError(CumempoolError, RuntimeError):
    """Memory of another process cannot be had.

    Its owner is gone, does not answer, or refuses: the memory was withdrawn, was freed, or has
    slept since it was shared (its generation is stale). The message says which; have the owner
    ``share()`` it again.
    """


RankState = Literal["unchanged", "contents_lost", "not_undone"]
"""What a rank is left with: all as before; as before but for contents that had been discarded; or
in between, since the way back failed there."""


class DistributedTransitionError(CumempoolError, RuntimeError):
    """A rank failed, or did not answer, so that no rank of the group sleeps or wakes.

    Unlike other errors it may leave something changed; `states` says where. The message has the
    reason of every rank that failed. See to those ranks, then repeat the call on all.

    Args:
        message: As for `CumempoolError`.
        rank: The rank in the group that raises it, or None.
        failures: Rank -> what it failed with, for all that said so.
        unanswered: Ranks that did not answer within the timeout.
        states: Rank -> what it is left with: ``"unchanged"``, ``"contents_lost"`` or
            ``"not_undone"``; for those ranks that said so, this one among them.
        lost_tags: Tags of this rank that were discarded, and whose contents are gone.
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
    """A scope on the ``host`` driver in which nothing was allocated from the pool.

    torch cannot be routed there: what it allocates is ordinary memory, which does not sleep. Use
    ``allocator.empty`` or ``allocator.adopt``. Given once per process.
    """


class InternalError(CumempoolError, RuntimeError):
    """A defect of this library. Report the whole message, with the versions it came from."""


#: The class for each status number of ``cumempool/status.h``, ``CUMEMPOOL_OK`` left out.
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
    """Makes the exception for a failure record of the C interface (``cumempool_error``).

    Args:
        fields: ``status``, ``message``, and the arguments of `CumempoolError`. All but ``status``
            may be missing.

    Returns:
        An instance of ``ERROR_BY_STATUS[status]``; of `InternalError` for an unknown status.
    """
    arguments = dict(fields)
    status = arguments.pop("status")
    message = arguments.pop("message", "") or f"status {status} without a message"
    return ERROR_BY_STATUS.get(status, InternalError)(message, **arguments)
