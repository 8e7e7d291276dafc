"""Defines `WakeHandle`: a wake in the background."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from cumempool._locks import fork_safe_lock
from cumempool._pool.hooks import Arrival, Transitions
from cumempool._pool.report import TransitionReport
from cumempool._pool.tensors import memory_of
from cumempool.errors import CumempoolError, InvalidTypeError, NotInPoolError

if TYPE_CHECKING:
    import torch

    from cumempool import _core

_live_lock = fork_safe_lock()
_live: Final[weakref.WeakSet[WakeHandle]] = weakref.WeakSet()


class WakeHandle(contextlib.AbstractContextManager["WakeHandle"]):
    """A wake under way, from ``wake_up(blocking=False)``. Thread-safe.

    Tensors become ready one after another, in order of allocation; `wait` makes a stream wait for
    just one. The end of a ``with`` block waits for the whole wake, and so do dropping the last
    reference and the end of the program. If the wake fails, all of its memory sleeps again with its
    backup, including tensors that were waited for: work that touches them faults.
    """

    def __init__(
        self, core: _core.Waking, driver: str, transitions: Transitions, arrival: Arrival
    ) -> None:
        self._core = core
        self._transitions = transitions
        self._arrival = arrival
        self._on_host = driver == "host"
        self._report: TransitionReport | None = None
        with _live_lock:
            _live.add(self)

    def wait(self, tensor: torch.Tensor) -> None:
        """Makes the current stream of a tensor's device wait until the tensor has its contents.

        The calling thread only submits the wait. It has no effect if the tensor is awake or has no
        elements. On the ``host`` driver, where tensors have no streams, the calling thread waits
        for the end of the whole wake.

        Args:
            tensor: A tensor of the tags that are waking.

        Raises:
            InvalidTypeError: `tensor` is no tensor.
            NotInPoolError: Its memory is not of this allocator.
            InvalidArgumentError: It is asleep, and not part of this wake.
            StreamCaptureError: The stream is being captured.
            CumempoolError: The error of the wake.
        """
        address = memory_of(tensor)
        if tensor.numel() == 0:
            return
        if self._on_host:
            self.result()
            self._core.wait(address, 0, 0)
            return
        if not tensor.is_cuda:
            raise NotInPoolError(
                f"the tensor is on {tensor.device}, not on a CUDA device", operation="wait"
            )
        import torch

        stream = torch.cuda.current_stream(tensor.device)
        self._core.wait(address, tensor.device.index, int(stream.cuda_stream))

    def done(self) -> bool:
        """Whether the wake has ended, in success or failure."""
        return self._core.done()

    def result(self) -> TransitionReport:
        """Waits for the end, and returns the report of the wake, the same at every call.

        Hooks of the tags have been called by then, once.

        Raises:
            TransitionInProgressError: Called from one of those hooks.
            OutOfMemoryError: Others have taken the memory meanwhile.
            BackupError: A backup file could not be read; `BackupDamagedError` if it no longer holds
                what was written to it.
            DriverError: A driver call failed.
        """
        raw = self._core.finish()
        problems = self._transitions.settle(self._arrival)
        if self._report is None:
            self._report = TransitionReport.from_rows(
                "wake_up", raw.seconds, raw.rows, [*raw.problems, *problems]
            )
        return self._report

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self.result()
        else:
            self._settle()

    def __del__(self) -> None:
        # Not left to the destructor of the core's handle: at its end, Python may unwind a thread,
        # and a destructor does not survive that.
        if hasattr(self, "_arrival"):
            self._settle()

    def _settle(self) -> None:
        # If another thread has its turn, the next turn calls the hooks: the garbage collector may
        # call this anywhere.
        with contextlib.suppress(CumempoolError):
            self._core.finish()
        self._transitions.settle_soon()


@atexit.register
def _settle_all() -> None:
    """Ends every wake before the interpreter exits."""
    with _live_lock:
        handles = list(_live)
    for handle in handles:
        handle._settle()


def addresses_of(tensors: object) -> list[int]:
    """Returns the addresses of tensors, except those without elements."""
    if tensors == ():
        return []
    import torch

    if isinstance(tensors, torch.Tensor):
        tensors = (tensors,)
    if not isinstance(tensors, Iterable):
        raise InvalidTypeError(f"first is an iterable of tensors, not {tensors!r}")
    found = ((tensor, memory_of(tensor)) for tensor in tensors)
    return [address for tensor, address in found if tensor.numel()]
