"""Puts an allocator's memory to sleep and wakes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal, overload

from cumempool._pool import transition
from cumempool._pool.checks import check_bool
from cumempool._pool.report import TransitionReport
from cumempool._pool.sleep_plan import plan_discard, plan_sleep, takes_offload_tags_first
from cumempool._pool.tags import check_tags
from cumempool._pool.tensors import memory_of
from cumempool._pool.waking import WakeHandle, addresses_of
from cumempool.allocator._part import Part
from cumempool.errors import InvalidArgumentError, InvalidTypeError

if TYPE_CHECKING:
    import torch


class Sleeps(Part):
    """The methods of `CuMemAllocator` that put memory to sleep and wake it."""

    @takes_offload_tags_first
    def sleep(
        self,
        tags: Sequence[str] | str | None = None,
        *,
        offload_tags: Sequence[str] | str | None = None,
    ) -> TransitionReport:
        """Releases the physical memory of tags; addresses stay reserved.

        All or nothing: on failure everything is awake as before. Work in flight is finished first.
        Hooks of `register_hooks` are called before; a hook that raises cancels the sleep. Only live
        bytes are backed up, not blocks that torch has cached as free. If the last backup was kept
        (``retain_backups``), only bytes that have changed since are copied; the report counts the
        others as clean.

        Contents are kept, except for tags with ``on_sleep="discard"``.

        Args:
            tags: Limits the sleep to these tags. None: all.
            offload_tags: Tags whose contents are kept. All others are discarded whatever their own
                policy (the report lists such overrides), as in vLLM's allocator. None: each tag
                follows its own policy, and keeps its contents if it has none.

        Raises:
            UnknownTagError: A tag was never used.
            InUseError: A scope of one of the tags is open, or a tag is pinned: by `pin`, or by
                another process that has its memory open.
            StreamCaptureError: The calling thread's current stream is being captured.
            TransitionInProgressError: Called from inside a transition.
            OutOfHostMemoryError: No host memory for the backup, or over ``host_backup_limit``.
            OutOfMemoryError: The peer device has no room for the backup.
            BackupError: A backup file cannot be made or written: a missing directory, a full disk.
            UnsupportedError: A device of the tag cannot reach its peer, or memory of the tag has
                ``backing="cuda_malloc"``.
            ClosedError: The allocator is closed.
            DriverError: A driver call failed.
        """
        self._check_enabled("sleep")
        actions, overrides = plan_sleep(self._core, tags, offload_tags)
        return transition.sleep(self._state, "sleep", actions, overrides, drop_backups=False)

    @overload
    def prepare(
        self,
        tags: Sequence[str] | str | None = ...,
        *,
        offload_tags: Sequence[str] | str | None = ...,
        background: Literal[False] = ...,
    ) -> int: ...

    @overload
    def prepare(
        self,
        tags: Sequence[str] | str | None = ...,
        *,
        offload_tags: Sequence[str] | str | None = ...,
        background: Literal[True],
    ) -> Future[int]: ...

    @takes_offload_tags_first
    def prepare(
        self,
        tags: Sequence[str] | str | None = None,
        *,
        offload_tags: Sequence[str] | str | None = None,
        background: bool = False,
    ) -> int | Future[int]:
        """Pins ahead of time the host memory that a `sleep` with the same arguments will need.

        Pinning makes a first sleep slower than later ones. A transition that starts while this runs
        waits for it.

        Args:
            tags: As for `sleep`.
            offload_tags: As for `sleep`.
            background: Run in a thread and return at once.

        Returns:
            The additional bytes pinned; with `background`, a future of that number, which can be
            cancelled until the thread has begun.

        Raises:
            UnknownTagError: A tag was never used.
            InUseError: A tag is pinned and has no hooks that could release the pin, so the sleep
                would be refused.
            UnsupportedError: Memory of a tag has ``backing="cuda_malloc"``.
            OutOfHostMemoryError: There is not enough host memory, or it is over
                ``host_backup_limit``.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        self._check_enabled("prepare")
        actions, _ = plan_sleep(self._core, tags, offload_tags)
        return transition.prepare(self._state, actions, background=background)

    def discard(self, tags: Sequence[str] | str) -> TransitionReport:
        """Puts tags to sleep without keeping their contents.

        If memory of the tags is already asleep with a backup, the backup is dropped.

        Raises:
            As `sleep`.
        """
        self._check_enabled("discard")
        actions, overrides = plan_discard(self._core, tags)
        return transition.sleep(self._state, "discard", actions, overrides, drop_backups=True)

    @overload
    def wake_up(
        self, tags: Sequence[str] | str | None = ..., *, blocking: Literal[True] = ...
    ) -> TransitionReport: ...

    @overload
    def wake_up(
        self,
        tags: Sequence[str] | str | None = ...,
        *,
        blocking: Literal[False],
        first: Iterable[torch.Tensor] = ...,
    ) -> WakeHandle: ...

    def wake_up(
        self,
        tags: Sequence[str] | str | None = None,
        *,
        blocking: bool = True,
        first: Iterable[torch.Tensor] = (),
    ) -> TransitionReport | WakeHandle:
        """Maps physical memory at the old addresses and restores backups.

        All or nothing: on failure everything is still asleep with its backup, and the call can be
        repeated. When it returns, the contents are visible to every stream, and hooks of
        `register_hooks` have been called; their failures are among the report's problems. If the
        device has no room, torch's cache is emptied and the wake is retried once.

        Args:
            tags: Limits the wake to these tags. None: all.
            blocking: False returns a handle once there is known to be room. Tensors become ready in
                order of allocation; call ``handle.wait(tensor)`` before using a tensor. Other
                transitions wait for the end.
            first: With ``blocking=False``: tensors whose allocations come before all others.

        Raises:
            UnknownTagError: A tag was never used.
            OutOfMemoryError: The device has no room (also a ``RuntimeError``).
            StreamCaptureError: The calling thread's current stream is being captured.
            TransitionInProgressError: Called from inside a transition.
            BackupError: A backup file could not be read; `BackupDamagedError` if it no longer holds
                what was written to it.
            NotInPoolError: A tensor of `first` is not of this allocator.
            ClosedError: The allocator is closed.
            DriverError: A driver call failed.
        """
        check_bool(blocking=blocking)
        chosen = None if tags is None else list(check_tags(tags, "tags"))
        addresses = addresses_of(first)
        if blocking and addresses:
            raise InvalidArgumentError("`first` needs blocking=False: else all wake at once")
        if not blocking:
            return transition.begin_wake(self._state, chosen, addresses)
        return transition.wake(self._state, chosen)

    def swap(
        self,
        *,
        sleep: Sequence[str] | str,
        wake: Sequence[str] | str | None = None,
        offload_tags: Sequence[str] | str | None = None,
    ) -> TransitionReport:
        """Puts tags to sleep while others wake, in one transition; copies run in both directions.

        All or nothing: on failure both are as before. It needs only the device memory that is free
        plus what the sleep releases. If that is not enough, torch's cache is emptied and the swap
        is retried once.

        Args:
            sleep: The tags to put to sleep.
            wake: The tags to wake, none of them in `sleep`. None: all others that sleep.
            offload_tags: As for ``sleep(tags, offload_tags=...)``.

        Raises:
            As `sleep` and `wake_up`.
        """
        self._check_enabled("swap")
        named = check_tags(sleep, "sleep")
        chosen = None if wake is None else list(check_tags(wake, "wake"))
        actions, overrides = plan_sleep(self._core, named, offload_tags)
        return transition.swap(self._state, actions, overrides, chosen)

    def is_asleep(self, tag: str) -> bool:
        """Whether any memory of a tag sleeps, so that it must be woken before use.

        Raises:
            UnknownTagError: The tag was never used.
        """
        self._state.tags.check_known(tag, "is_asleep")
        return self._state.stats().tags[tag].asleep_bytes > 0

    @contextlib.contextmanager
    def awake(self, tags: Sequence[str] | str | None = None) -> Iterator[None]:
        """Returns a context manager that wakes tags, and at its end puts the woken ones to sleep.

        They go to sleep as whole tags, by their own policies. Tags that were awake stay awake; if
        all were, nothing happens. Blocks may be nested.

        Args:
            tags: The tags. None: all.

        Raises:
            As `wake_up` on entering, and as `sleep` on leaving.
        """
        self._check_enabled("awake")
        named = self._state.stats().tags if tags is None else check_tags(tags, "tags")
        asleep = [tag for tag in named if self.is_asleep(tag)]
        if not asleep:
            yield
            return
        self.wake_up(asleep)
        try:
            yield
        finally:
            self.sleep(asleep)

    def read_backup(self, tensor: torch.Tensor, *, writable: bool = False) -> torch.Tensor:
        """Returns the backup of a sleeping tensor as a tensor on the CPU, without a copy.

        The tensor keeps the backup's memory: while it lives, the allocator cannot be closed without
        force. After the wake it shows the contents that were restored. A backup in several pieces
        of host memory is joined first, which needs its size once more. Pinned memory can be copied
        to a device as a whole. For that, the first call that meets the border of two blocks of
        64 MiB pins the blocks around it anew, at some 50 GB/s.

        Without `writable`, operations that would write to it or to its views raise
        `InvalidArgumentError` (a ``ValueError``) and change nothing; its NumPy arrays are
        read-only, and DLPack is refused. Other results are ordinary tensors. Its address, its
        storage, and the few operations that do not declare their writes, such as running statistics
        of ``batch_norm``, are not protected.

        Args:
            tensor: A tensor or view of memory, or a part of it, that sleeps with a backup.
            writable: Return an ordinary tensor; the next wake restores what is written to it.

        Returns:
            A tensor of the same shape, dtype and strides, without a gradient.

        Raises:
            InvalidTypeError: `tensor` is no tensor, or a quantized one.
            NotInPoolError: Its memory is not of this allocator.
            InvalidArgumentError: It is awake, its contents were discarded, or the backup lacks some
                of the bytes from its first to its last element.
            UnsupportedError: The backup is on a peer device.
            OutOfHostMemoryError: The backup is in pieces, and there is no room to join them, or
                the system does not let its blocks be pinned as one.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        check_bool(writable=writable)
        storage = memory_of(tensor)
        if tensor.is_quantized:
            raise InvalidTypeError("a quantized tensor has scales that are not in its memory")
        import torch

        from cumempool import _torch

        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        extents = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((extent - 1) * stride for extent, stride in extents)
        size = tensor.element_size()
        address = storage + int(tensor.storage_offset()) * size
        capsule = self._core.view_backup(address, (last + 1) * size, writable)
        with torch.inference_mode(False):
            memory = _torch.from_capsule(capsule).untyped_storage()
            view = _torch.tensor_over(memory, tensor.dtype, tensor.shape, tensor.stride(), 0)
            view = _torch.with_lazy_bits(view, tensor)
            return view if writable else _torch.ReadOnlyTensor(view)

    def release_host_memory(self) -> int:
        """Releases host memory that no sleeping memory needs; returns its bytes.

        This includes free room, retained backups of awake memory (the next sleep copies all of it),
        and buffers.

        Raises:
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        return self._core.release_host_memory()
