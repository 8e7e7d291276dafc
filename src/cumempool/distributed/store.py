"""Calls the store through which ranks meet, with a limit on the time of each call."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from cumempool._pool.checks import check_int
from cumempool.errors import InvalidArgumentError, InvalidTypeError

_T = TypeVar("_T")

_METHODS: Final = ("set", "get", "check", "compare_set", "delete_key")


class Store(Protocol):
    """The methods of a ``torch.distributed.Store`` that cumempool calls, as in ``TCPStore``."""

    def set(self, key: str, value: str, /) -> None:
        """Writes a value."""

    def get(self, key: str, /) -> bytes:
        """Reads a value."""

    def check(self, keys: list[str], /) -> bool:
        """Returns whether all keys exist."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Writes a value in place of an expected one; returns the value that is there then."""

    def delete_key(self, key: str, /) -> bool:
        """Deletes a key."""


@dataclass(frozen=True, slots=True)
class StoreGroup:
    """Ranks that meet through a store, for programs without a ``torch.distributed`` process group.

    Attributes:
        store: A ``torch.distributed.Store`` that all of them reach, such as a ``TCPStore``.
        rank: The rank of this process, from 0.
        size: The number of ranks.
        name: Tells groups apart that share a store.

    Raises:
        InvalidTypeError: The store lacks a method of `Store`, or a field is of another type.
        InvalidArgumentError: `rank` is not one of 0 to `size` - 1.
    """

    store: Store
    rank: int
    size: int
    name: str = "ranks"

    def __post_init__(self) -> None:
        """Checks all fields."""
        missing = [name for name in _METHODS if not callable(getattr(self.store, name, None))]
        if missing:
            raise InvalidTypeError(
                f"a store has the methods {', '.join(_METHODS)}, and {type(self.store).__name__} "
                f"has no {', '.join(missing)}; take a torch.distributed.TCPStore"
            )
        check_int(self.rank, "rank is an int")
        check_int(self.size, "size is an int")
        if not isinstance(self.name, str):
            raise InvalidTypeError(f"name is a str, not {self.name!r}")
        if not 0 <= self.rank < self.size:
            raise InvalidArgumentError(f"rank {self.rank} is not one of 0 to {self.size - 1}")


class StoreLostError(Exception):
    """The store does not answer, or fails."""


class Channel(contextlib.AbstractContextManager["Channel"]):
    """A store with a limit of `patience` seconds on each call.

    A thread of its own makes the calls: they never return if the store's host is cut off.
    """

    def __init__(self, store: Store, prefix: str, patience: float) -> None:
        self._store = store
        self._prefix = prefix
        self._patience = patience
        self._lost = ""
        self._silent = False
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="cumempool-store", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 -- the caller raises it
                future.set_exception(error)

    def _call(self, what: str, work: Callable[[], _T]) -> _T:
        if self._lost:
            raise StoreLostError(self._lost)
        future: Future[_T] = Future()
        self._calls.put((future, work))
        try:
            return future.result(self._patience)
        except BaseException as error:
            if future.done() and error is future.exception():
                why = f"{type(error).__name__}: {error}"
                self._lost = f"the group's store failed in a {what}: {why}"
            elif isinstance(error, FutureTimeoutError):
                self._silent = True
                self._lost = f"the group's store did not answer a {what} in {self._patience:g} s"
            else:  # an exception of the caller, such as Ctrl-C
                raise
            raise StoreLostError(self._lost) from error

    def reopen(self) -> None:
        """Allows calls again after an error, so that this rank can tell the others."""
        if self._silent:
            raise StoreLostError(self._lost)
        self._lost = ""

    def put(self, key: str, value: object) -> None:
        """Writes a value, as JSON."""
        text = json.dumps(value)
        self._call("set", lambda: self._store.set(self._prefix + key, text))

    def has(self, keys: Sequence[str]) -> bool:
        """Returns whether all keys exist."""
        names = [self._prefix + key for key in keys]
        return bool(self._call("check", lambda: self._store.check(names)))

    def get(self, key: str) -> Any:
        """Returns the value of a key that exists."""
        return self._call("get", lambda: json.loads(self._store.get(self._prefix + key)))

    def first(self, key: str, value: object) -> Any:
        """Writes a value if there is none yet; returns the value that is there then."""
        return self.exchange(key, None, value)

    def exchange(self, key: str, expected: object, value: object) -> Any:
        """Writes a value in place of the expected one (None: no value); returns the value then."""
        before = "" if expected is None else json.dumps(expected)
        after = json.dumps(value)
        name = self._prefix + key
        return self._call(
            "compare_set", lambda: json.loads(self._store.compare_set(name, before, after))
        )

    def drop(self, keys: Iterable[str]) -> None:
        """Deletes keys."""
        for key in keys:
            self._call("delete", partial(self._store.delete_key, self._prefix + key))
