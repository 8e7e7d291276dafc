"""Allocates memory: scopes, tensors, graph pools, adopted modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from cumempool._pool.backup import Backup, check_backup
from cumempool._pool.checks import check_bool, check_int
from cumempool._pool.scope import MemoryPoolScope, NullScope, current_scope
from cumempool._pool.tags import DEFAULT_TAG, Backing, OnSleep, OnWake, check_tag
from cumempool._pool.tensors import LARGEST, check_tensor, empty_tensor, memory_of
from cumempool.allocator._part import Part
from cumempool.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError

if TYPE_CHECKING:
    import torch


class Allocates(Part):
    """The methods of `CuMemAllocator` that allocate memory."""

    def use_memory_pool(
        self,
        tag: str = DEFAULT_TAG,
        *,
        on_sleep: OnSleep | None = None,
        on_wake: OnWake | None = None,
        backup: Backup | str | None = None,
        devices: Sequence[int] | None = None,
        backing: Backing | None = None,
        peers: Literal["all"] | Sequence[int] | None = None,
        rdma: bool | None = None,
        all_threads: bool = False,
    ) -> MemoryPoolScope:
        """Returns a context manager that routes this thread's allocations to a pool under `tag`.

        Scopes nest, and the innermost one counts; a tag may be entered again. On leaving, unused
        segments go back at once, or with the last open scope; segments whose tensors die later go
        back at ``torch.cuda.empty_cache()``. torch cannot be routed on the ``host`` driver; there
        the scope sets the default tag of `empty`.

        Args:
            tag: 1 to 255 bytes of UTF-8.
            on_sleep: The tag's own policy, for calls that do not name the tag.
            on_wake: Contents of the tag's discarded memory after a wake: undefined, or zero bytes.
            backup: Tier for the tag's contents while it sleeps; see `set_backup`.
            devices: Ordinals to route on. None: the current device and every other one in use.
            backing: Kind of the tag's memory: ``"vmm"``, the default, or ``"cuda_malloc"``, which
                can neither sleep nor be shared.
            peers: Devices that get access beside the memory's own: ordinals, ``()`` for none, or
                ``"all"``; by default those that the process uses. Not with ``"cuda_malloc"``.
            rdma: Whether the memory supports GPUDirect RDMA if the device allows it; default True.
                For `backing`, `peers` and `rdma`, None keeps the earlier choice.
            all_threads: Also take the allocations of every other thread, such as gradients. A
                scope that a thread enters meanwhile takes that thread's own allocations.

        Raises:
            InvalidArgumentError: A tag, policy or device does not exist.
            UnsupportedError: No device can reach the peer that `backup` names.
            InUseError: Memory of the tag lives that was made with other choices of `backing`,
                `peers` and `rdma`. On entering with `all_threads`: another thread has a scope open.
            OutOfSlotsError: On entering: too many scopes are open at the same time.
            ClosedError: The allocator is closed.
        """
        check_bool(all_threads=all_threads)
        if not self.enabled:
            return NullScope(self._state, check_tag(tag), devices, all_threads=all_threads)
        place = None if backup is None else check_backup(backup, "backup")
        self._state.tags.declare(tag, on_sleep, on_wake)
        if place is not None:
            self._core.set_backup(tag, *place._to_core())
        if not (backing is None and peers is None and rdma is None):
            self._state.tags.set_memory(tag, backing, peers, rdma)
        if devices is not None:
            devices = self._state.devices.check_routed(devices)
        return MemoryPoolScope(self._state, tag, devices, all_threads=all_threads)

    def set_backup(self, tag: str, backup: Backup | str) -> None:
        """Sets the tier for the contents of a tag from its next sleep on.

        Memory that is asleep keeps its backup where it is.

        Args:
            tag: A tag that was used before.
            backup: ``"pinned"`` (the default), ``"pageable"``, ``"file:/directory"``,
                ``"peer:1"``, or a `Backup`.

        Raises:
            UnknownTagError: The tag was never used.
            InvalidArgumentError: The backup or a device does not exist.
            UnsupportedError: No device can reach the peer.
            ClosedError: The allocator is closed.
        """
        self._core.set_backup(check_tag(tag), *check_backup(backup, "backup")._to_core())

    def empty(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        tag: str | None = None,
    ) -> torch.Tensor:
        """Returns a contiguous tensor with undefined contents and an allocation of its own.

        It bypasses torch's caching allocator: deleting the last reference frees the memory, and the
        whole allocation is one handle, as memory registration requires.

        Args:
            size: The shape, as one sequence or as integers.
            dtype: Element type; None takes torch's default.
            device: None: the current CUDA device; on the ``host`` driver, the CPU. An integer names
                a device of the driver.
            tag: None: the tag of the innermost open scope of this thread and allocator, else
                ``"default"``.

        Raises:
            InvalidArgumentError: The size is negative or huge, or the device does not exist.
            OutOfMemoryError: The device has no room, even after emptying torch's cache.
            ClosedError: The allocator is closed.
        """
        return empty_tensor(self._state, size, dtype, device, tag)

    def zeros(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        tag: str | None = None,
    ) -> torch.Tensor:
        """As `empty`, filled with zeros.

        Args:
            size: As for `empty`.
            dtype: As for `empty`.
            device: As for `empty`.
            tag: As for `empty`.
        """
        return self.empty(*size, dtype=dtype, device=device, tag=tag).zero_()

    def full(
        self,
        size: int | Sequence[int],
        fill_value: complex,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        tag: str | None = None,
    ) -> torch.Tensor:
        """As `empty`, filled with a number.

        Args:
            size: The shape.
            fill_value: The number.
            dtype: Element type; None takes the one of ``torch.full`` for the number.
            device: As for `empty`.
            tag: As for `empty`.
        """
        import torch

        if dtype is None:
            dtype = torch.full((), fill_value).dtype
        return self.empty(size, dtype=dtype, device=device, tag=tag).fill_(fill_value)

    def empty_like(
        self,
        tensor: torch.Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        tag: str | None = None,
    ) -> torch.Tensor:
        """As `empty`, with the shape of another tensor; contiguous whatever the other's strides.

        Args:
            tensor: The other tensor.
            dtype: Element type; None takes that of the other tensor.
            device: None: the device of the other tensor if the allocator has it; else as `empty`.
            tag: As for `empty`.

        Raises:
            InvalidTypeError: `tensor` is no tensor.
        """
        tensor = check_tensor(tensor)
        if device is None and tensor.device.type == self._state.devices.type:
            device = tensor.device
        return self.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device, tag=tag)

    def from_tensor(
        self,
        tensor: torch.Tensor,
        *,
        device: torch.device | str | int | None = None,
        tag: str | None = None,
    ) -> torch.Tensor:
        """Copies a tensor: contiguous, without a gradient, with an allocation of its own.

        Args:
            tensor: The tensor to copy, on any device.
            device: As for `empty_like`.
            tag: As for `empty`.

        Raises:
            InvalidTypeError: `tensor` is no tensor, or has no strides, such as a sparse one.
        """
        import torch

        if check_tensor(tensor).layout is not torch.strided:
            raise InvalidTypeError(f"the tensor has the layout {tensor.layout}, not torch.strided")
        with torch.no_grad():
            return self.empty_like(tensor, device=device, tag=tag).copy_(tensor)

    def graph_pool(
        self, tag: str, *, device: torch.device | str | int | None = None
    ) -> tuple[int, int]:
        """Returns the id of a pool to capture CUDA graphs into: ``torch.cuda.graph(g, pool=...)``.

        The memory of the graphs sleeps and wakes with the tag, at the same addresses and with its
        contents, so they replay as before. They must not be replayed while it sleeps. All of it is
        kept while a graph lives, because a graph may read blocks that torch counts as free. The id
        is the same for a tag and device until `release_graph_pool` or `close`, and the pool holds
        a slot until then. Ask for it before each capture: memory that sleeps cannot be captured
        into.

        Args:
            tag: 1 to 255 bytes of UTF-8.
            device: None: the current CUDA device.

        Raises:
            UnsupportedError: The ``host`` driver has no CUDA graphs, or torch before 2.11 has
                expandable segments on.
            InUseError: Memory of the pool is asleep, and torch would hand out parts of it.
            InvalidArgumentError: The tag or the device does not exist.
            OutOfSlotsError: Too many scopes and graph pools are open at the same time.
            ClosedError: The allocator is closed.
        """
        if self.config.driver == "cuda" and not self.enabled:
            import torch

            return torch.cuda.graph_pool_handle()
        self._state.tags.declare(tag)
        if self.config.driver != "cuda":
            raise UnsupportedError(
                f"graph_pool: the {self.config.driver} driver has no CUDA graphs",
                operation="graph_pool",
                tag=tag,
                advice="use the cuda driver",
            )
        self._state.before_tensors()
        return self._state.graph_pools.open(tag, self._state.devices.resolve(device)[0])

    def release_graph_pool(
        self, tag: str, *, device: torch.device | str | int | None = None
    ) -> int:
        """Releases the graph pools of a tag. Do not capture into their ids any more.

        Memory of live graphs stays, and sleeps and wakes as before, until they are deleted.

        Args:
            tag: The tag.
            device: None: every device.

        Returns:
            The number of pools released.

        Raises:
            InvalidArgumentError: The device does not exist.
        """
        ordinal = None if device is None else self._state.devices.resolve(device)[0]
        return self._state.graph_pools.release(check_tag(tag), ordinal)

    def preserve_contents(self) -> MemoryPoolScope:
        """Returns a context manager, inside a scope, whose allocations keep their contents.

        Use it in a discarded tag for contents that cannot be recomputed: rotary caches,
        quantization scales. Such memory sleeps and wakes with its tag. Each sleep backs it up,
        even if the call or the tag's policy discards the tag, and so does `discard`. It covers
        this thread only.

        Raises:
            InvalidArgumentError: No scope is open.
            OutOfSlotsError: On entering: too many scopes are open at the same time.
        """
        if not self.enabled:
            return NullScope(self._state, DEFAULT_TAG, None)
        around = current_scope(self._state)
        if around is None:
            raise InvalidArgumentError(
                "preserve_contents() goes inside a use_memory_pool() scope, whose tag it takes",
                operation="preserve_contents",
                advice="enter use_memory_pool() first",
            )
        self._state.has_preserved = True
        return MemoryPoolScope(self._state, around.tag, around.devices, preserves=True)

    def preserve(self, what: torch.nn.Module | torch.Tensor | Iterable[torch.Tensor]) -> int:
        """Keeps the contents of tensors from now on if their tag is discarded.

        As `preserve_contents`, but nothing is moved. It applies to the whole allocation of a
        tensor, so other tensors that torch put there are backed up as well. Waits for a transition
        of another thread.

        Args:
            what: A tensor, an iterable of tensors, or a module: its buffers.

        Returns:
            Bytes of their allocations.

        Raises:
            NotInPoolError: Some memory is not of this allocator. Nothing is preserved then.
            InvalidTypeError: An item is no tensor.
            TransitionInProgressError: Called from inside a transition.
        """
        import torch

        if not self.enabled:
            return 0
        tensors: object = (what,) if isinstance(what, torch.Tensor) else what
        if isinstance(what, torch.nn.Module):
            tensors = what.buffers()
        if not isinstance(tensors, Iterable):
            raise InvalidTypeError(f"preserve: tensors or a module are needed, not {what!r}")
        addresses = filter(None, map(memory_of, tensors))
        sizes = {i.address: i.bytes for i in map(self._state.allocation_at, addresses)}
        for address in sizes:
            self._state.preserve(address)
        return sum(sizes.values())

    def set_memory_margin(self, margin: int) -> None:
        """Fails allocations that would leave less than this much device memory free.

        The margin is for other libraries and processes on the device. It applies to allocations
        from now on, also in scopes, where torch empties its cache and retries. Wakes ignore it.

        Args:
            margin: Bytes; 0, the initial value, means no margin.

        Raises:
            InvalidArgumentError: The number is negative or huge.
        """
        check_int(margin, "a margin is a number of bytes")
        if not 0 <= margin <= LARGEST:
            raise InvalidArgumentError(f"a margin of {margin} bytes is out of range")
        self._core.set_memory_margin(margin)

    def adopt(
        self,
        what: torch.nn.Module | torch.optim.Optimizer,
        tag: str = "weights",
        *,
        gradients: bool | str = False,
        preserve_buffers: bool = False,
    ) -> int:
        """Moves a module's parameters and buffers, or an optimizer's state, into the pool, packed.

        Tensors keep their identity, class and attributes; tied weights, views of one storage and
        strides stay as they are. Old storage is freed if nothing else refers to it. The caller may
        be in any mode (``no_grad``, ``inference_mode``): inference tensors stay inference tensors,
        and ordinary ones remain trainable.

        Buffers on the CPU stay there; parameters on another device, or on ``meta``, are refused.

        State that an optimizer makes later, for example in its first step, or loads by
        ``load_state_dict``, is moved after the step that made it, unless it is under the tag
        already. To avoid the move, take that step inside ``use_memory_pool(tag)``. State on the CPU
        stays there. To place later gradients, put ``use_memory_pool(tag, all_threads=True)`` around
        ``backward()``.

        Args:
            what: The module, on the device of this allocator; or the optimizer.
            tag: The tag to move it under.
            gradients: Also move the gradients that a module's parameters have now, under the same
                tag, or under the given one.
            preserve_buffers: Keep the contents of a module's buffers if the tag is discarded; see
                `preserve_contents`.

        Returns:
            Bytes of device memory allocated for it; 0 if all of it was under the tag already.

        Raises:
            InvalidTypeError: `what` is neither, or has a tensor that cannot be moved, such as a
                subclass that keeps its memory in other tensors; the message names it. Nothing was
                moved.
            InvalidArgumentError: A tensor is asleep under another tag. Nothing was moved.
            OutOfMemoryError: The device has no room; tensors moved so far stay moved.
        """
        from cumempool._pool.optimizer import adopt_object

        if not isinstance(gradients, bool):
            check_tag(gradients)
        check_bool(preserve_buffers=preserve_buffers)
        if not self.enabled:
            return 0
        return adopt_object(self._state, what, check_tag(tag), gradients, preserve_buffers)
