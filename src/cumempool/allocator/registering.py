"""Memory of an allocator that others know of: transports, libraries, other processes."""

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
    """The methods of `CuMemAllocator` about memory that others have registered or open."""

    def registrable_ranges(self, tag: str) -> list[RegistrableRange]:
        """Returns the awake ranges of a tag, one per allocation, for memory registration.

        Each lies inside one handle, as registrations need it. A registration is stale when the
        generation has grown.

        Raises:
            UnknownTagError: A tag that was never used.
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
        """Has functions called around each sleep, discard, swap and wake of a tag.

        They are called in the order of registration, with the tag and the ranges concerned, in the
        thread of the transition; after ``wake_up(blocking=False)`` in that of ``result()``, or of
        the transition that comes next. They may pin and unpin, and must start no transition. Where
        nothing of the tag goes or comes, they are not called, nor for a wake that was under way
        when they were registered.

        Args:
            tag: A tag that was used before.
            before_unmap: Called before memory goes. Where it raises, the transition is cancelled
                with nothing changed, and hooks that ran before it get their ``after_map`` called;
                so they do where the transition fails later.
            after_map: Called after memory has come. Where it raises, the memory stays awake, and
                the report of the transition lists it among its problems.

        Returns:
            What takes them out again, by ``remove()`` or as a context manager.

        Raises:
            UnknownTagError: A tag that was never used.
            InvalidTypeError: A hook that cannot be called.
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
            The pin; ``release()`` or the end of a ``with`` block takes it off.

        Raises:
            UnknownTagError: A tag that was never used.
            InvalidArgumentError: The holder has no name.
            ClosedError: The allocator is closed.
        """
        return pin_tag(self._core, check_tag(tag), check_text(holder, "holder"))

    def share(
        self, what: torch.Tensor | str, *, writable: bool = True, fabric: bool = False
    ) -> SharedMemory:
        """A descriptor by which other processes of the same user can open memory: `open_shared`.

        It can be pickled, and says nothing to other users. It holds nothing: the memory has to
        live until it is opened, and is stale once it has slept. (What is sent through
        `torch.multiprocessing` is kept until it was received.) While others have it open, the tag
        cannot sleep. A process that opens it gets the whole of each allocation; a tensor inside a
        pool scope shares its allocation with others.

        Args:
            what: A tensor of this allocator; or a tag: all of it that is awake.
            writable: False grants reading only. (It protects from mistakes, not from attacks: the
                holder of a descriptor has the rights of this user.)
            fabric: Put the memory's FABRIC handles into the descriptor, for processes on other
                hosts of the NVLink domain. **Whoever has such a descriptor can map the memory**, to
                read and to write, and nobody can tell who does. The tag cannot sleep until it is
                revoked, and handles that were given out stay good for as long as anybody has the
                memory mapped.

        Raises:
            NotInPoolError: The tensor's memory is not of this allocator.
            UnknownTagError: A tag that was never used.
            InvalidArgumentError: It sleeps, or there is nothing of it.
            InvalidTypeError: Neither a tensor nor a tag, or a tensor that is more than its bytes.
            UnsupportedError: It is of ``backing="cuda_malloc"``, or has no handles to be shared by.
            TransitionInProgressError: Called from inside a transition.
            ClosedError: The allocator is closed.
        """
        return self._exports.share(what, writable, fabric)

    def exports(self) -> list[Export]:
        """Returns the memory that other processes keep awake: opened, or sent and not yet received.

        The oldest first. A message that nobody will receive, since its queue or its receiver is
        gone, keeps its memory until `revoke`, ``close(force=True)``, or the end of the process.
        FABRIC handles that descriptors carry are not in it.
        """
        return self._exports.list()

    def revoke(self, tag: str) -> int:
        """Withdraws what was shared of a tag, so that it can sleep.

        Messages that were sent and not received yet are lost; the memory that they kept is freed.
        Importers keep what they have mapped, and the device keeps that memory for them until they
        close it; from the next wake on, it is another one than the owner's. FABRIC handles that
        descriptors carry cannot be taken back: they open the memory as long as there is any.

        Args:
            tag: A tag that was used before.

        Returns:
            How many other openings that has ended.

        Raises:
            UnknownTagError: A tag that was never used.
        """
        return self._exports.revoke(tag)
