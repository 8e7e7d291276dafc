"""Keeps a tag's memory registered with a NIXL agent, through every sleep and wake of the tag.

Only `create_agent` imports NIXL.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from cumempool._locks import fork_safe_lock
from cumempool.errors import (
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    UnavailableError,
)

if TYPE_CHECKING:
    import torch

    from cumempool._pool.hooks import HookRegistration, Pin, RegistrableRange
    from cumempool.allocator import CuMemAllocator

    _Piece = torch.Tensor | RegistrableRange

__all__ = [
    "OnMetadata",
    "RegisteredTag",
    "create_agent",
    "is_installed",
    "replace_remote_agent",
]

OnMetadata = Callable[[bytes, int], None]
"""A function that takes new metadata and its generation, called after each registration."""

#: The first package picks one of the others by torch's CUDA version; each works without it.
_PACKAGES: Final = ("nixl", "nixl_cu13", "nixl_cu12")


_Registration = tuple[int, Any]
"""A device and the NIXL registration list of its ranges."""


def is_installed() -> bool:
    """Returns whether a package of NIXL is installed. Imports nothing."""
    return any(importlib.util.find_spec(name) for name in _PACKAGES)


def create_agent(name: str, *, backends: Sequence[str] = ("UCX",), **settings: Any) -> Any:
    """Creates a ``nixl_agent`` of the installed NIXL.

    Create one per process and GPU, after ``torch.cuda.set_device`` and the first use of CUDA: UCX
    uses the current context.

    Args:
        name: The agent's name, unique among its peers.
        backends: NIXL backends to start.
        **settings: Other arguments of ``nixl_agent_config``. ``sync_mode`` is strict unless given,
            since a sleep may run in another thread than the transfers.

    Raises:
        UnavailableError: NIXL or one of the backends is not installed.
    """
    package = _import_nixl()
    if hasattr(package, "nixl_thread_sync_t"):
        settings.setdefault("sync_mode", package.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
    agent = package.nixl_agent(name, package.nixl_agent_config(backends=list(backends), **settings))
    # NIXL skips backends that it does not find, with only a line in its log.
    missing = [backend for backend in backends if backend not in agent.backends]
    if missing:
        raise UnavailableError(
            f"this NIXL has no backend {', '.join(missing)}; it has "
            f"{', '.join(agent.get_plugin_list())}",
            operation="create_agent",
        )
    return agent


def _import_nixl() -> Any:
    reasons = []
    for name in _PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise UnavailableError(
        f"NIXL cannot be imported ({'; '.join(reasons)})",
        operation="create_agent",
        advice="pip install nixl",
    )


def replace_remote_agent(agent: Any, name: str, metadata: bytes) -> str:
    """Replaces an agent's metadata of a peer.

    NIXL does not replace registrations that it has loaded, so a peer that registered again has to
    be removed first. A removal ends the connection in both directions, so both sides call this.

    Args:
        agent: The local agent.
        name: The peer's name; the agent need not know it yet.
        metadata: The result of the peer's `RegisteredTag.metadata`.

    Returns:
        The peer's name in the metadata.
    """
    agent.remove_remote_agent(name)
    loaded = agent.add_remote_agent(metadata)
    return loaded.decode() if isinstance(loaded, bytes) else str(loaded)


class RegisteredTag(contextlib.AbstractContextManager["RegisteredTag"]):
    """A tag whose memory is registered with a NIXL agent whenever it is awake. Thread-safe.

    Registered memory is pinned. A sleep, discard or swap of the tag first drops the registration
    and the pin; the wake after it registers again. That voids everything that NIXL made from the
    old registration: release transfer handles and prepared lists before a sleep, and give
    `metadata` to the peers again after the wake (`replace_remote_agent` on their side). The program
    must stop all transfers before a sleep, those of peers included. If sleeps and transfers run in
    different threads, the agent needs a ``sync_mode`` that allows it; `create_agent` gives it one.

    The next wake or `refresh` registers memory that is allocated under the tag later. Do not free
    registered memory.

    Args:
        agent: A ``nixl_agent``; type checks do not need its package.
        allocator: The allocator. Memory of its ``host`` driver is registered as ``"DRAM"``.
        tag: The tag; if it sleeps, it is registered when it wakes.
        backends: NIXL backends to register with; None = all that take such memory.
        on_metadata: Called with the metadata and their generation after every registration, also
            the constructor's, in the thread that registered; in a wake, therefore, from inside the
            transition. If it raises in a wake, the memory stays registered and the report of the
            wake says so.

    Raises:
        UnknownTagError: The tag was never used.
        InvalidTypeError: An argument of the wrong type.
        ClosedError: The allocator is closed.
        Exception: An exception of the agent or `on_metadata`; nothing stays registered.
    """

    def __init__(
        self,
        agent: Any,
        allocator: CuMemAllocator,
        tag: str,
        *,
        backends: Sequence[str] | None = None,
        on_metadata: OnMetadata | None = None,
    ) -> None:
        if isinstance(backends, str):
            raise InvalidTypeError(f"backends is a sequence of names, not {backends!r}")
        if on_metadata is not None and not callable(on_metadata):
            raise InvalidTypeError(f"on_metadata is a function or None, not {on_metadata!r}")
        self.tag: Final = tag
        self._agent = agent
        self._allocator = allocator
        self._backends = list(backends or ())
        self._on_metadata = on_metadata
        self._memory: Final[Literal["DRAM", "VRAM"]] = (
            "DRAM" if allocator.config.driver == "host" else "VRAM"
        )
        # Hooks take it inside transitions, so code that holds it never waits for a transition.
        self._lock = fork_safe_lock()
        self._ranges: tuple[RegistrableRange, ...] = ()
        self._registrations: list[_Registration] = []
        self._pin: Pin | None = None
        self._generation = 0
        self._closed = False
        self._hooks: HookRegistration | None = allocator.register_hooks(
            tag, before_unmap=self._before_unmap, after_map=self._after_map
        )
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            self.refresh()
            failed.pop_all()

    @property
    def registered(self) -> bool:
        """Whether memory of the tag is registered now."""
        return bool(self._ranges)

    @property
    def generation(self) -> int:
        """Number of registrations so far; metadata of an older generation are stale."""
        return self._generation

    @property
    def ranges(self) -> tuple[RegistrableRange, ...]:
        """The registered ranges."""
        return self._ranges

    def metadata(self) -> bytes:
        """Returns the agent's metadata, to give to peers.

        Raises:
            UnavailableError: Nothing is registered: the tag sleeps or has no memory yet.
            ClosedError: `close` was called.
            Exception: An exception of the agent.
        """
        with self._lock:
            self._check_registered("metadata")
            return bytes(self._agent.get_agent_metadata())

    def refresh(self) -> int:
        """Drops the registration and registers all awake memory of the tag again.

        Call it after an allocation, or if a registration failed after a wake.

        Returns:
            The generation, unchanged if no memory of the tag is awake.

        Raises:
            UnknownTagError: The tag was never used.
            ClosedError: `close` was called.
            Exception: An exception of the agent or `on_metadata`. If the agent's registration
                fails, nothing is registered or pinned.
        """
        with self._lock:
            self._check_open("refresh")
        self._register_again()
        return self._generation

    def xfer_descs(self, what: _Piece | Iterable[_Piece]) -> Any:
        """Returns a NIXL transfer list over contiguous tensors or ranges of the tag.

        Raises:
            InvalidArgumentError: A tensor is not contiguous, or there is nothing to transfer.
            NotInPoolError: A piece does not lie in one registered range; its transfer would fail
                with ``NIXL_ERR_NOT_FOUND``.
            UnavailableError: Nothing is registered: the tag sleeps or has no memory yet.
            ClosedError: `close` was called.
        """
        spans = (_span(each, self._memory) for each in _listed(what))
        pieces = [span for span in spans if span[1]]
        if not pieces:
            raise InvalidArgumentError("there is nothing to transfer", tag=self.tag)
        with self._lock:
            self._check_registered("xfer_descs")
            for piece in pieces:
                self._check_inside("xfer_descs", *piece)
            return self._agent.get_xfer_descs(pieces, self._memory)

    def close(self) -> None:
        """Drops the registration, the pin and the hooks. A second close has no effect.

        Raises:
            Exception: An exception of the agent; the memory stays pinned, and `close` can be
                called again.
        """
        # Not under the lock: a running hook may be waiting for it.
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.remove()
        with self._lock:
            self._closed = True
            self._deregister()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "registered" if self.registered else "not registered"
        return f"<{type(self).__name__} {self.tag!r}: {state}, generation {self._generation}>"

    # ---- registering ---------------------------------------------------------------------------

    def _before_unmap(self, tag: str, ranges: Sequence[RegistrableRange]) -> None:
        with self._lock:
            self._deregister()

    def _after_map(self, tag: str, ranges: Sequence[RegistrableRange]) -> None:
        self._register_again()

    def _register_again(self) -> None:
        # Pin first, so that no other thread can put the tag to sleep meanwhile.
        pin = self._allocator.pin(self.tag, f"NIXL registration of {self.tag!r}")
        with self._lock:
            try:
                self._deregister()
            except BaseException:
                pin.release()
                raise
            self._pin = pin  # _deregister() releases it from here on
            try:
                metadata = None if self._closed else self._register()
                if metadata is None:
                    self._deregister()
                    return
            except BaseException:
                self._deregister()
                raise
            self._generation += 1
            generation = self._generation
        if self._on_metadata is not None:
            self._on_metadata(metadata, generation)

    def _register(self) -> bytes | None:
        """Registers awake memory by device; returns the metadata, or None if none is awake."""
        ranges = tuple(self._allocator.registrable_ranges(self.tag))
        by_device: dict[int, list[tuple[int, int, int, str]]] = {}
        for each in ranges:
            address, size, device = _span(each, self._memory)
            by_device.setdefault(device, []).append((address, size, device, ""))
        for device, pieces in by_device.items():
            descs = self._agent.get_reg_descs(pieces, self._memory)
            with self._current(device):
                self._agent.register_memory(descs, backends=self._backends)
            self._registrations.append((device, descs))
        self._ranges = ranges
        return bytes(self._agent.get_agent_metadata()) if ranges else None

    def _deregister(self) -> None:
        """Drops the registrations, last first, then the pin; both stay if the agent refuses."""
        while self._registrations:
            device, descs = self._registrations[-1]
            with self._current(device):
                self._agent.deregister_memory(descs, backends=self._backends)
            self._registrations.pop()
            self._ranges = ()
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.release()

    @contextlib.contextmanager
    def _current(self, device: int) -> Iterator[None]:
        """Makes a device's context current for UCX; a thread of a sleep may have none."""
        if self._memory == "DRAM":
            yield
            return
        import torch

        with torch.cuda.device(device):
            # A call that needs the context: selecting the selected device makes none current.
            torch.cuda.mem_get_info(device)
            yield

    # ---- checks --------------------------------------------------------------------------------

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise ClosedError(
                f"{operation}: the registration of tag {self.tag!r} was closed",
                operation=operation,
                tag=self.tag,
            )

    def _check_registered(self, operation: str) -> None:
        self._check_open(operation)
        if not self._ranges:
            raise UnavailableError(
                f"{operation}: nothing of tag {self.tag!r} is registered, because it sleeps, has "
                "no memory yet, or could not be registered after a wake; wake it, or call "
                "refresh()",
                operation=operation,
                tag=self.tag,
                advice="wake the tag, or call refresh()",
            )

    def _check_inside(self, operation: str, address: int, size: int, device: int) -> None:
        for each in self._ranges:
            start, length, ordinal = _span(each, self._memory)
            inside = start <= address and address + size <= start + length
            if inside and device == ordinal:
                return
        raise NotInPoolError(
            f"{size} bytes at {address:#x} on device {device} do not lie in one registered range "
            f"of tag {self.tag!r}; after allocating, refresh()",
            operation=operation,
            tag=self.tag,
            device=device,
            bytes=size,
            advice="refresh()",
        )


def _listed(what: Any) -> list[Any]:
    if hasattr(what, "data_ptr") or hasattr(what, "address"):
        return [what]
    if not isinstance(what, Iterable):
        raise InvalidTypeError(f"a transfer list is of tensors or ranges, not {what!r}")
    return list(what)


def _span(each: Any, memory: str) -> tuple[int, int, int]:
    """Returns (address, bytes, device) of a range or tensor; host memory is NIXL's device 0."""
    if hasattr(each, "address"):
        return each.address, each.bytes, each.device if memory == "VRAM" else 0
    if not hasattr(each, "data_ptr"):
        raise InvalidTypeError(f"a transfer list is of tensors or ranges, not {each!r}")
    if not each.is_contiguous():
        raise InvalidArgumentError("a tensor to transfer must be contiguous")
    return int(each.data_ptr()), each.numel() * each.element_size(), each.device.index or 0
