"""Raises KeyboardInterrupt at a chosen moment at which Python would handle a signal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th moment since it was made at which a signal can strike.

    Those are the entry of a function, and the return from a call into C. (Python looks for signals
    at the end of a loop as well, where nothing of interest happens. Inside ``__del__`` it reports
    the exception and goes on.)

    Args:
        moment: 1 is the first; 0 never raises, and counts.
        strikes_in: Skips the moments of files for which this says no.
    """

    def __init__(self, moment: int, strikes_in: Callable[[str], bool] = lambda _: True) -> None:
        self.moment = moment
        self.seen = 0
        self.where = ""
        self._strikes_in = strikes_in

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in {"call", "c_return", "c_exception"}:
            return
        file = frame.f_code.co_filename
        if not self._strikes_in(file) or _finalizing(frame):
            return
        self.seen += 1
        if self.seen == self.moment:
            self.where = f"{file}:{frame.f_lineno} {event} {getattr(argument, '__name__', '')}"
            raise KeyboardInterrupt

    def run(self, act: Callable[[], object]) -> bool:
        """Whether `act` came to its end."""
        sys.setprofile(self)
        try:
            act()
        except KeyboardInterrupt:
            return False
        finally:
            sys.setprofile(None)
        return True


def _finalizing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
