"""Tracks memory that others use: transports, libraries, other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cumempool._pool.hooks import (
    Hook,
    HookRegistration,
    Pin,
    RegistrableRange,
    pin_tag,
    ranges_by_tag,
)
from cumempool._pool.tags import check_tag, check_text
from cumempool.allocator._part import Part
from cumempool.sharing import Export, SharedMemory

if TYPE_CHECKING:
    import torch


class Registers(Part):
    """The methods of `CuMemAllocator` about memory that others have registered or opened."""

    def registrable_ranges(self, tag: str) -> list[RegistrableRange]:
        """Returns the awake ranges of a tag, one per allocation, for memory registration.

        Each lies inside one handle, as registrations require. A registration is stale once the
        generation has grown.

        Raises:
            UnknownTagError: The tag was never used.
        """
        self._state.tags.check_known(tag, "registrable_ranges")
        infos = self._state.snapshot()
        return ranges_by_tag(i for i in infos if i.state == "awake" and i.tag == tag).get(tag, [])

    def register_hooks(
        self,
        tag: str,
        *,
        before_unmap: Hook | None = None,
        after_map: Hook | None = None,
    ) -> HookRegistration:
        """Registers functions to call around each sleep, discard, swap and wake of a tag.

        They are called in the order of registration, with the tag and the ranges concerned, in the
        thread of the transition. After ``wake_up(blocking=False)`` they are called in the thread of
        ``result()``, or of the next transition. They may pin and unpin, and must start no
        transition. They are not called if no memory of the tag goes or comes, nor for a wake that
        was under way when they were registered.

        Args:
            tag: A tag that was used before.
            before_unmap: Called before memory goes. If it raises, the transition is cancelled with
                nothing changed, and hooks that ran before it get their ``after_map`` called. The
                same happens if the transition fails later.
            after_map: Called after memory has come. If it raises, the memory stays awake, and the
                transition's report lists the failure among its problems.

        Returns:
            A registration; ``remove()`` or the end of a ``with`` block removes the hooks.

        Raises:
            UnknownTagError: The tag was never used.
            InvalidTypeError: A hook is not callable.
        """
        self._state.tags.check_known(tag, "register_hooks")
        return self._state.hooks.register(tag, before_unmap, after_map)

    def pin(self, tag: str, holder: str = "an unnamed holder") -> Pin:
        """Keeps a tag awake while its memory is registered elsewhere.

        Waits for a transition of another thread.

        Args:
            tag: A tag that was used before.
            holder: Names the owner of the pin in the errors of refused sleeps.

        Returns:
            The pin; ``release()`` or the end of a ``with`` block releases it.

        Raises:
            UnknownTagError: The tag was never used.
            InvalidArgumentError: The holder has no name.
            ClosedError: The allocator is closed.
        """
        return pin_tag(self._core, check_tag(tag), check_text(holder, "holder"))

    def share(
        self, what: torch.Tensor | str, *, writable: bool = True, fabric: bool = False
    ) -> SharedMemory:
        """Returns a descriptor with which this user's processes open the memory by `open_shared`.

        It can be pickled, and is useless to other users. It keeps nothing alive: the memory must
        live until it is opened, and the descriptor is stale once the memory has slept. (Memory sent
        through `torch.multiprocessing` is kept until it is received.) While others have it open,
        the tag cannot sleep. A process that opens it gets the whole of each allocation; a tensor
        inside a pool scope shares its allocation with others.

        Args:
            what: A tensor of this allocator, or a tag: all its awake memory.
            writable: False grants reading only. (It protects from mistakes, not from attacks: the
                holder of a descriptor has the rights of this user.)
            fabric: Put the memory's FABRIC handles into the descriptor, for processes on other
                hosts of the NVLink domain. **Any holder of such a descriptor can map the memory**,
                to read and to write, and nobody can tell who does. The tag cannot sleep until it is
                revoked, and the handles stay valid while anybody has the memory mapped.

        Raises:
            NotInPoolError: The tensor's memory is not of this allocator.
            UnknownTagError: The tag was never used.
            InvalidArgumentError: The memory sleeps, or the tag has none.
            InvalidTypeError: `what` is neither a tensor nor a tag, or a tensor that is more than
                its bytes.
            UnsupportedError: The memory has ``backing="cuda_malloc"``, or no shareable handles.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        return self._exports.share(what, writable, fabric)

    def exports(self) -> list[Export]:
        """Returns the memory that other processes keep awake: opened, or sent and not yet received.

        Oldest first. A message that nobody will receive, because its queue or its receiver is gone,
        keeps its memory until `revoke`, ``close(force=True)``, or the end of the process. FABRIC
        handles in descriptors are not listed.
        """
        return self._exports.list()

    def revoke(self, tag: str) -> int:
        """Withdraws the shared memory of a tag, so that it can sleep.

        Messages sent but not yet received are lost, and the memory that they kept is freed.
        Importers keep their mappings, and the device keeps that memory until they close it; from
        the owner's next wake on, it is other memory than the owner's. FABRIC handles in descriptors
        cannot be taken back: they open the memory as long as it exists.

        Args:
            tag: A tag that was used before.

        Returns:
            The number of openings by others that it ended.

        Raises:
            UnknownTagError: The tag was never used.
        """
        return self._exports.revoke(tag)
