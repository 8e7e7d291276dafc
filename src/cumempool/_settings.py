"""Defines the kinds of settings, and reads them from text, flags and environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

from cumempool._pool.backup import Backup, check_backup
from cumempool.errors import InvalidArgumentError, InvalidTypeError

DriverName = Literal["cuda", "host"]
#: The drivers that a configuration may name.
DRIVERS: Final[tuple[DriverName, ...]] = ("cuda", "host")

ENV_PREFIX: Final = "CUMEMPOOL_"
_BOOLEANS: Final = MappingProxyType(
    dict.fromkeys(("1", "true", "yes", "on"), True)
    | dict.fromkeys(("0", "false", "no", "off"), False)
)
_UNITS: Final = MappingProxyType(
    {"": 1, "B": 1}
    | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
    | {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
    | {letter: 1024**power for power, letter in enumerate("KMGT", start=1)}
)
_UNIT_BY_FOLDED_NAME: Final = {name.casefold(): factor for name, factor in _UNITS.items()}
_BYTES_PATTERN: Final = re.compile(r"\s*([-+]?[0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_MOST_BYTES: Final = 2**63 - 1
_MOST_HOST_DEVICES: Final = 64


def parse_bytes(text: str) -> int:
    """Parses a number of bytes such as ``"16GiB"``, ``"512 MiB"``, ``"10GB"`` or ``"4096"``.

    KiB, MiB, GiB, TiB and K, M, G, T are powers of 1024; KB, MB, GB, TB are powers of 1000; no unit
    means bytes. Case does not matter. A fraction is valid if it comes to whole bytes.

    Raises:
        InvalidArgumentError: The text is no such number, or is not positive.
    """
    match = _BYTES_PATTERN.fullmatch(text)
    factor = _UNIT_BY_FOLDED_NAME.get(match[2].casefold()) if match else None
    if match is None or factor is None:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise InvalidArgumentError(
            f"{text!r} is not a number of bytes; give an integer or a number with one of the units "
            f"{units}, such as '16GiB'"
        )
    count = Fraction(match[1]) * factor
    if count.denominator != 1:
        raise InvalidArgumentError(f"{text!r} is not a whole number of bytes")
    return int(_check_range(int(count), repr(text), _MOST_BYTES))


# ---- kinds of values -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value: `read` converts text, `check` returns the value or raises."""

    values: str
    type: type | tuple[type, ...]
    type_name: str
    read: Callable[[str], Any]
    check: Callable[[Any, str], Any] = lambda value, _: value
    metavar: str = "N"


def _read_choice(values: Mapping[str, Any], text: str) -> Any:
    if text.strip().casefold() not in values:
        raise InvalidArgumentError(f"{text!r} is not one of {', '.join(values)}")
    return values[text.strip().casefold()]


def _read_int(text: str) -> int:
    if re.fullmatch(r"\s*[-+]?[0-9]+\s*", text) is None:
        raise InvalidArgumentError(f"{text!r} is not an integer")
    return int(text)


def _check_range(value: int, what: str, most: int) -> int:
    if not 1 <= value <= most:
        raise InvalidArgumentError(f"{what} is out of range: it must be 1 to {most}")
    return value


def _check_driver(value: str, what: str) -> str:
    if value not in DRIVERS:
        raise InvalidArgumentError(f"{what} is not one of {', '.join(DRIVERS)}")
    return value


def _check_overflow(value: Backup | str, what: str) -> Backup:
    backup = check_backup(value, what.partition("=")[0])
    if backup.tier not in ("pageable", "file"):
        raise InvalidArgumentError(f"{what} cannot take an overflow: give {OVERFLOW.values}")
    return backup


def _check_directory(value: str, what: str) -> str:
    if not os.path.isdir(value):
        raise InvalidArgumentError(f"{what} is not a directory that exists")
    return value


BOOL: Final = Kind("/".join(_BOOLEANS), bool, "a bool", partial(_read_choice, _BOOLEANS))
DRIVER: Final = Kind(
    " or ".join(DRIVERS), str, "a str", str, _check_driver, "{" + ",".join(DRIVERS) + "}"
)
BYTES: Final = Kind(
    "bytes, such as 16GiB", int, "an int", parse_bytes, partial(_check_range, most=_MOST_BYTES)
)
DEVICES: Final = Kind(
    f"1 to {_MOST_HOST_DEVICES}",
    int,
    "an int",
    _read_int,
    partial(_check_range, most=_MOST_HOST_DEVICES),
)
OVERFLOW: Final = Kind(
    "pageable or file:DIRECTORY",
    (Backup, str),
    "a Backup or its text",
    Backup.parse,
    _check_overflow,
    "BACKUP",
)
DIRECTORY: Final = Kind("a directory that exists", str, "a str", str, _check_directory, "DIRECTORY")


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: a field of `CuMemConfig`, a flag and an environment variable.

    Attributes:
        name: The field of `CuMemConfig`.
        kind: The kind of its values.
        default: The default, as text for people.
        doc: What it does, in a sentence.
        optional: Whether None is a value.
    """

    name: str
    kind: Kind
    default: str
    doc: str
    optional: bool

    @property
    def env(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """The command-line flag; a boolean also has a ``--no-`` form."""
        return self.flag_with("")

    def flag_with(self, prefix: str) -> str:
        """Returns the flag in a parser whose flags of this library begin with `prefix`."""
        if not prefix and not self.name.startswith("enable_"):
            prefix = "cumem-"
        return f"--{prefix}{self.name.replace('_', '-')}"

    def dest_with(self, prefix: str) -> str:
        """Returns the attribute of the ``argparse`` namespace."""
        return self.flag_with(prefix).removeprefix("--").replace("-", "_")

    def parse(self, text: str) -> Any:
        """Returns the value of a text, checked."""
        return self.kind.check(self.kind.read(text), repr(text))

    def checked(self, value: object) -> Any:
        """Returns the value of a keyword, checked."""
        if value is None and self.optional:
            return None
        # bool is an int to isinstance, but True is no number of bytes.
        fits = isinstance(value, self.kind.type)
        if not fits or (isinstance(value, bool) and self.kind is not BOOL):
            raise InvalidTypeError(
                f"{self.name}={value!r} is of type {type(value).__name__}, not "
                f"{self.kind.type_name}{' or None' if self.optional else ''}"
            )
        shown = str(value) if isinstance(value, Backup) else value
        return self.kind.check(value, f"{self.name}={shown!r}")

    def from_environment(self, environ: Mapping[str, str]) -> Any:
        """Returns the value of its variable; None if unset or empty, as containers may pass it."""
        text = environ.get(self.env, "")
        try:
            return self.parse(text) if text.strip() else None
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"environment variable {self.env}: {error}") from None
