"""Checks and declares tags: their names, their policies, and the kind of their memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from cumempool._locks import fork_safe_lock
from cumempool._pool.devices import Devices
from cumempool._pool.stats import stats_of
from cumempool.errors import InvalidArgumentError, InvalidTypeError, UnknownTagError

if TYPE_CHECKING:
    from cumempool import _core

DEFAULT_TAG: Final = "default"
"""The tag of allocations without a named tag, such as `empty` outside of scopes."""

OnSleep = Literal["offload", "discard"]
OnWake = Literal["undefined", "zero"]
Backing = Literal["vmm", "cuda_malloc"]

# The core's numbers; 0 means unchanged.
OFFLOAD, DISCARD = 1, 2
ON_SLEEP: Final[Mapping[str | None, int]] = {None: 0, "offload": OFFLOAD, "discard": DISCARD}
_ON_WAKE: Final[Mapping[str | None, int]] = {None: 0, "undefined": 1, "zero": 2}
_BACKING: Final[Mapping[str | None, int]] = {None: 0, "vmm": 1, "cuda_malloc": 2}


def check_text(text: object, what: str) -> str:
    """Returns the argument, which must be text in UTF-8; messages call it `what`."""
    if not isinstance(text, str):
        raise InvalidTypeError(f"a {what} is a str, not {type(text).__name__}: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"the {what} {text!r} cannot be encoded as UTF-8: {error}"
        ) from None
    return text


def check_tag(tag: object) -> str:
    return check_text(tag, "tag")


def check_tags(tags: object, what: str) -> tuple[str, ...]:
    """Returns the distinct tags of an argument; messages call it `what`."""
    if isinstance(tags, str):
        return (check_tag(tags),)
    if not isinstance(tags, Iterable):
        raise InvalidTypeError(f"{what} is a tag or an iterable of tags, not {tags!r}")
    return tuple(dict.fromkeys(check_tag(tag) for tag in tags))


def _check_choice(value: object, allowed: Mapping[str | None, int], what: str) -> int:
    if value is not None and not isinstance(value, str):
        raise InvalidTypeError(f"{what} is a str or None, not {value!r}")
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise InvalidArgumentError(f"{what}={value!r} is not one of {names}")
    return allowed[value]


_LISTED, _ALL, _NONE = 0, 1, 2  # CUMEMPOOL_PEERS_*


@dataclass(frozen=True, slots=True)
class _Memory:
    """The kind of a tag's memory, as the core takes it."""

    backing: int = _BACKING["vmm"]
    all_peers: int = _LISTED
    peers: list[int] = field(default_factory=list)
    rdma: bool = True


class Tags:
    """The tags of one allocator. Thread-safe."""

    def __init__(self, core: _core.Allocator, devices: Devices) -> None:
        self._core = core
        self._devices = devices
        self._lock = fork_safe_lock()
        self._memory: dict[str, _Memory] = {}

    def declare(
        self, tag: str, on_sleep: OnSleep | None = None, on_wake: OnWake | None = None
    ) -> None:
        """Declares a tag with its policy; None keeps the earlier policy."""
        self._core.declare_tag(
            check_tag(tag),
            _check_choice(on_sleep, ON_SLEEP, "on_sleep"),
            _check_choice(on_wake, _ON_WAKE, "on_wake"),
        )

    def set_memory(self, tag: str, backing: object, peers: object, rdma: object) -> None:
        """Changes the backing, peers and RDMA of a tag; None keeps the earlier choice."""
        number = _check_choice(backing, _BACKING, "backing")
        if isinstance(peers, str) and peers != "all":
            raise InvalidArgumentError(f"peers={peers!r} is not 'all' or a sequence of ordinals")
        if rdma is not None and not isinstance(rdma, bool):
            raise InvalidTypeError(f"rdma is a bool or None, not {rdma!r}")
        with self._lock:
            choice = self._memory.get(tag, _Memory())
            if number == _BACKING["cuda_malloc"]:
                choice = _Memory()  # cudaMalloc memory has no other choices
            if number:
                choice = replace(choice, backing=number)
            if peers is not None:
                reached = [] if peers == "all" else self._devices.check_ordinals(peers, "peers")
                others = _ALL if peers == "all" else _LISTED if reached else _NONE
                if others == _NONE and choice.backing == _BACKING["cuda_malloc"]:
                    others = _LISTED  # cudaMalloc memory has no choice of peers
                choice = replace(choice, all_peers=others, peers=reached)
            if rdma is not None:
                choice = replace(choice, rdma=rdma)
            self._core.set_memory(tag, choice.backing, choice.all_peers, choice.peers, choice.rdma)
            self._memory[tag] = choice

    def check_known(self, tag: object, operation: str) -> None:
        """Raises `UnknownTagError` if a tag was never used."""
        known = stats_of(self._core).tags
        if check_tag(tag) not in known:
            names = ", ".join(map(repr, known)) or "none yet"
            raise UnknownTagError(
                f"{operation}: nothing was ever allocated under tag {tag!r}; known tags: {names}",
                operation=operation,
                tag=str(tag),
            )
