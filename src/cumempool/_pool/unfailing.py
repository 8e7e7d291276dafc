"""Keeps failures of observers away from the code that they observe."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from types import TracebackType

from cumempool.errors import CumempoolError

_logger = logging.getLogger("cumempool")


def report_failure(what: str, error: BaseException) -> None:
    """Logs that an observer has failed. Raises nothing, even if the logger fails as well."""
    expected = isinstance(error, (OSError, CumempoolError))  # their messages need no traceback
    with contextlib.suppress(Exception):
        _logger.warning(
            "%s: %s: %s", what, type(error).__name__, error, exc_info=None if expected else error
        )


def unfailing(what: str, call: Callable[[], object]) -> bool:
    """Calls an observer. Logs what it raises, and returns whether it raised nothing."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 -- an observer may raise anything
        report_failure(what, error)
        return False
    return True


class Unfailing(contextlib.AbstractContextManager[None]):
    """Runs a body inside the context manager of an observer, whose failures it logs.

    Errors of the body go on.
    """

    def __init__(
        self, what: str, make: Callable[[], contextlib.AbstractContextManager[object]]
    ) -> None:
        self._what = what
        self._make = make
        self._inner: contextlib.AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        unfailing(self._what, self._enter)

    def _enter(self) -> None:
        inner = self._make()
        inner.__enter__()
        self._inner = inner

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        inner = self._inner
        if inner is not None:
            unfailing(self._what, lambda: inner.__exit__(kind, error, traceback))
