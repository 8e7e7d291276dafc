"""Checks arguments whose type is all there is to check."""

from __future__ import annotations

from cumempool.errors import InvalidTypeError


def check_bool(**arguments: object) -> None:
    """Refuses arguments that are no bool, by name: ``check_bool(force=force)``."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise InvalidTypeError(f"{name} is a bool, not {value!r}")
