"""Checks the types of arguments."""

from __future__ import annotations

from cumempool.errors import InvalidTypeError


def check_bool(**arguments: object) -> None:
    """Refuses arguments that are not bool, by name: ``check_bool(force=force)``."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise InvalidTypeError(f"{name} is a bool, not {value!r}")


def check_int(value: object, what: str) -> int:
    """Returns the argument, which must be an int and not a bool; `what` begins the message."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{what}, not {value!r}")
    return value


def check_seconds(value: object, name: str) -> float:
    """Returns the argument, which must be a number of seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(f"{name} is a number of seconds, not {value!r}")
    return value
