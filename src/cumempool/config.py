"""The settings of an allocator: the same immutable object from keywords, flags or environment."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, Protocol, cast

from cumempool._locks import fork_safe_lock
from cumempool._pool.backup import Backup, check_backup
from cumempool.errors import InvalidArgumentError, InvalidTypeError, UnavailableError

__all__ = [
    "DRIVERS",
    "SETTINGS",
    "CuMemConfig",
    "DriverName",
    "ReportsAvailability",
    "Setting",
    "parse_bytes",
    "settings_table",
]

DriverName = Literal["cuda", "host"]
#: The drivers that a configuration can name.
DRIVERS: Final[tuple[DriverName, ...]] = ("cuda", "host")

_ENV_PREFIX: Final = "CUMEMPOOL_"

_BOOLEANS: Final = MappingProxyType(
    {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
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
_OVERFLOW_TIERS: Final = ("pageable", "file")
_OVERFLOW_VALUES: Final = "pageable or file:DIRECTORY"
_METAVARS: Final = MappingProxyType(
    {
        "driver": "{" + ",".join(DRIVERS) + "}",
        "host_backup_overflow": "BACKUP",
        "out_of_memory_directory": "DIRECTORY",
    }
)

_logger = logging.getLogger("cumempool")
_implied_lock = fork_safe_lock()
_implied_logged = False
# Variables that were warned of already.
_warned_of: set[str] = set()


class ReportsAvailability(Protocol):
    """What `CuMemConfig.verify` reads of a probe's result."""

    @property
    def ok(self) -> bool:
        """Whether the driver can be used here."""

    @property
    def reason(self) -> str:
        """Why not, or ``""``."""

    @property
    def hint(self) -> str:
        """What to do about it, or ``""``."""


class DescribesConnector(Protocol):
    """A `KVTransferConfig`, as far as it matters here."""

    @property
    def connector(self) -> str | None:
        """The name of the connector."""


@dataclass(frozen=True, slots=True)
class Above:
    """What methods of `CuMemConfig` call in modules that import this one.

    Attributes:
        probe: `cumempool.probe`.
        use_memory_pool: A scope of the process's allocator, by configuration, tag and policy.
        verify_kv_transfer: `verify_kv_transfer_compat`, by configuration, connector and facts.
        of_package: Those of the package, which sets them when it is imported.
    """

    probe: Callable[[CuMemConfig], ReportsAvailability]
    use_memory_pool: Callable[[CuMemConfig, str, dict[str, Any]], AbstractContextManager[object]]
    verify_kv_transfer: Callable[[CuMemConfig, Any, dict[str, Any]], list[str]]
    of_package: ClassVar[Above]


def parse_bytes(text: str) -> int:
    """A number of bytes from text such as ``"16GiB"``, ``"512 MiB"``, ``"10GB"`` or ``"4096"``.

    KiB, MiB, GiB and TiB count in powers of 1024, and so do K, M, G and T; KB, MB, GB and TB in
    powers of 1000; no unit is bytes. Upper and lower case are the same; a fraction is fine where it
    comes to whole bytes.

    Raises:
        InvalidArgumentError: The text is no such number, or it is not positive.
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
    return _in_range(int(count), repr(text), _MOST_BYTES)


def _parse_bool(text: str) -> bool:
    value = _BOOLEANS.get(text.strip().casefold())
    if value is None:
        raise InvalidArgumentError(f"{text!r} is not one of {', '.join(_BOOLEANS)}")
    return value


def _parse_driver(text: str) -> DriverName:
    if text not in DRIVERS:
        raise InvalidArgumentError(f"{text!r} is not one of {', '.join(DRIVERS)}")
    return text


def _parse_overflow(text: str) -> Backup:
    return _check_overflow(Backup.parse(text), repr(text))


def _check_overflow(backup: Backup, what: str) -> Backup:
    if backup.tier not in _OVERFLOW_TIERS:
        raise InvalidArgumentError(f"{what} cannot take an overflow: give {_OVERFLOW_VALUES}")
    return backup


def _parse_directory(text: str) -> str:
    return _check_directory(text, repr(text))


def _check_directory(path: str, what: str) -> str:
    if not os.path.isdir(path):
        raise InvalidArgumentError(f"{what} is not a directory that exists")
    return path


def _parse_device_count(text: str) -> int:
    if re.fullmatch(r"\s*[-+]?[0-9]+\s*", text) is None:
        raise InvalidArgumentError(f"{text!r} is not an integer")
    return _in_range(int(text), repr(text), _MOST_HOST_DEVICES)


def _in_range(value: int, what: str, most: int) -> int:
    if not 1 <= value <= most:
        raise InvalidArgumentError(f"{what} is out of range: it must be 1 to {most}")
    return value


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting under its three names.

    The environment, the command line and the documentation are all made from `SETTINGS`.

    Attributes:
        name: The field of `CuMemConfig`.
        env: The environment variable.
        flag: The command-line flag; settings that are a yes or no also have its ``--no-`` form.
        values: What it takes, for people.
        default: What holds where it is not given, for people.
        parse: From text to the value; raises `InvalidArgumentError`.
        doc: What it does, in a sentence.
    """

    name: str
    env: str
    flag: str
    values: str
    default: str
    parse: Callable[[str], object]
    doc: str

    @property
    def is_switch(self) -> bool:
        """Whether it is a yes or no."""
        return self.parse is _parse_bool

    def flag_with(self, prefix: str) -> str:
        """The flag in a parser whose flags of this library begin with `prefix`."""
        name = self.flag.removeprefix("--")
        return f"--{prefix}{name.removeprefix('cumem-')}" if prefix else f"--{name}"

    def dest_with(self, prefix: str) -> str:
        """The attribute of the ``argparse`` namespace."""
        return self.flag_with(prefix).removeprefix("--").replace("-", "_")


#: Every setting, in the order of the fields of `CuMemConfig`.
SETTINGS: Final[tuple[Setting, ...]] = (
    Setting(
        "enable_sleep_mode",
        "CUMEMPOOL_ENABLE_SLEEP_MODE",
        "--enable-sleep-mode",
        "/".join(_BOOLEANS),
        "off",
        _parse_bool,
        "Allow memory to be put to sleep and woken; switches the allocator on.",
    ),
    Setting(
        "enable_cumem_allocator",
        "CUMEMPOOL_ENABLE_CUMEM_ALLOCATOR",
        "--enable-cumem-allocator",
        "/".join(_BOOLEANS),
        "as sleep mode",
        _parse_bool,
        "Allocate in pools of virtual memory; an explicit no contradicts sleep mode.",
    ),
    Setting(
        "driver",
        "CUMEMPOOL_DRIVER",
        "--cumem-driver",
        " or ".join(DRIVERS),
        "CUMEMPOOL_DRIVER, else cuda",
        _parse_driver,
        "The driver: cuda for GPUs, host for devices simulated in host memory.",
    ),
    Setting(
        "host_backup_limit",
        "CUMEMPOOL_HOST_BACKUP_LIMIT",
        "--cumem-host-backup-limit",
        "bytes, such as 16GiB",
        "no limit",
        parse_bytes,
        "The most pinned host memory held for backups.",
    ),
    Setting(
        "host_backup_overflow",
        "CUMEMPOOL_HOST_BACKUP_OVERFLOW",
        "--cumem-host-backup-overflow",
        _OVERFLOW_VALUES,
        "such a sleep is refused",
        _parse_overflow,
        "What takes the backups that the limit on pinned host memory leaves no room for.",
    ),
    Setting(
        "retain_backups",
        "CUMEMPOOL_RETAIN_BACKUPS",
        "--cumem-retain-backups",
        "/".join(_BOOLEANS),
        "on",
        _parse_bool,
        "Keep backups while awake, and copy only what has changed since the last sleep.",
    ),
    Setting(
        "nvtx",
        "CUMEMPOOL_NVTX",
        "--cumem-nvtx",
        "/".join(_BOOLEANS),
        "off",
        _parse_bool,
        "Mark transitions as NVTX ranges, for profilers.",
    ),
    Setting(
        "out_of_memory_directory",
        "CUMEMPOOL_OUT_OF_MEMORY_DIRECTORY",
        "--cumem-out-of-memory-directory",
        "a directory that exists",
        "nothing is written",
        _parse_directory,
        "Where statistics, allocations and the latest events are written when memory runs out.",
    ),
    Setting(
        "publish",
        "CUMEMPOOL_PUBLISH",
        "--cumem-publish",
        "/".join(_BOOLEANS),
        "off",
        _parse_bool,
        "Let other processes of this user read the statistics: cumempool top, cumempool snapshot.",
    ),
    Setting(
        "host_driver_devices",
        "CUMEMPOOL_HOST_DRIVER_DEVICES",
        "--cumem-host-driver-devices",
        f"1 to {_MOST_HOST_DEVICES}",
        "1",
        _parse_device_count,
        "How many devices the host driver simulates.",
    ),
    Setting(
        "host_driver_bytes",
        "CUMEMPOOL_HOST_DRIVER_BYTES",
        "--cumem-host-driver-bytes",
        "bytes, such as 16GiB",
        "8GiB",
        parse_bytes,
        "Memory of each device that the host driver simulates.",
    ),
)


def settings_table() -> str:
    """`SETTINGS` as a Markdown table, for documentation."""
    lines = [
        "| `CuMemConfig` | command line | environment | values | default | what it does |",
        "|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        flag = f"`{setting.flag}`"
        if setting.is_switch:
            flag += f", `--no-{setting.flag.removeprefix('--')}`"
        lines.append(
            f"| `{setting.name}` | {flag} | `{setting.env}` | {setting.values} | {setting.default} "
            f"| {setting.doc} |"
        )
    return "\n".join(lines) + "\n"


def _setting(name: str) -> Setting:
    return next(setting for setting in SETTINGS if setting.name == name)


def _read_env(setting: Setting, environ: Mapping[str, str]) -> object:
    try:
        return setting.parse(environ[setting.env])
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"environment variable {setting.env}: {error}") from None


def _is_set(setting: Setting, environ: Mapping[str, str]) -> bool:
    """Whether its variable has a value: an empty one, as containers pass it, is none."""
    return bool(environ.get(setting.env, "").strip())


def _driver_of_environment(environ: Mapping[str, str]) -> DriverName:
    setting = _setting("driver")
    return cast(DriverName, _read_env(setting, environ)) if _is_set(setting, environ) else "cuda"


def _warn_of_unknown(environ: Mapping[str, str]) -> None:
    """Says once of each variable with the prefix of the settings that it is none."""
    known = {setting.env for setting in SETTINGS}
    unknown = {name for name in environ if name.startswith(_ENV_PREFIX)} - known - _warned_of
    if unknown:
        _warned_of.update(unknown)
        _logger.warning(
            "unknown environment variable %s has no effect; the known ones are %s",
            ", ".join(sorted(unknown)),
            ", ".join(sorted(known)),
        )


def _of_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that variables say, and the driver in any case."""
    _warn_of_unknown(environ)
    values: dict[str, Any] = {
        setting.name: _read_env(setting, environ)
        for setting in SETTINGS
        if _is_set(setting, environ)
    }
    # Given always, so that os.environ has no say where other variables were passed.
    values.setdefault("driver", "cuda")
    return values


def _missing(driver: DriverName) -> str:
    """Why the library or libcuda cannot be loaded, or ``""``. Loads them, and starts neither."""
    try:
        from cumempool import _core  # noqa: F401 - that it can be loaded is the question
    except ImportError as error:
        return f"the extension module of cumempool cannot be loaded: {error}"
    if driver == "cuda":
        import ctypes  # which opens the program itself when it is imported

        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            return f"libcuda.so.1 cannot be loaded: {error}"
    return ""


def _default_driver() -> DriverName:
    return _driver_of_environment(os.environ)


@dataclass(frozen=True, slots=True, kw_only=True)
class CuMemConfig:
    """The settings of an allocator. Immutable; construction starts no driver.

    Where the allocator is switched on, by itself or by sleep mode, construction looks whether the
    library and libcuda can be loaded; `verify` tries whether they work.

    Attributes:
        enable_sleep_mode: Allow memory to be put to sleep and woken. Switches the allocator on;
            that is logged once per process.
        enable_cumem_allocator: Allocate in pools of virtual memory. None follows
            ``enable_sleep_mode``. An allocator that is made with False has null scopes, gives
            ordinary memory, and does not sleep.
        driver: ``"cuda"`` or ``"host"``. Where it is not given, ``CUMEMPOOL_DRIVER`` decides, else
            it is ``"cuda"``.
        host_backup_limit: The most pinned host memory held for backups, in bytes; None = no limit.
        host_backup_overflow: What takes the backups that this limit, or the system, leaves no
            host memory for: pageable memory or a file; their texts are taken as well. None = such
            a sleep is refused.
        retain_backups: Keep backups while their memory is awake, and copy only what has changed
            since the last sleep.
        nvtx: Mark transitions as NVTX ranges, for profilers.
        out_of_memory_directory: Where statistics, allocations and the latest events are written,
            as a file for ``cumempool report``, when memory runs out; None = nowhere.
        publish: Write the statistics once a second to a file that only this user can read, for
            ``cumempool top`` and ``cumempool snapshot``.
        host_driver_devices: How many devices the host driver simulates, 1 to 64.
        host_driver_bytes: Memory of each simulated device, in bytes.

    Raises:
        InvalidArgumentError: (a ``ValueError``) A value out of range, or sleep mode together with
            an explicit ``enable_cumem_allocator=False``.
        InvalidTypeError: (a ``ValueError`` and ``TypeError``) A value of the wrong type.
        UnavailableError: (a ``ValueError``) The allocator is switched on, and the library or
            libcuda cannot be loaded here.
    """

    enable_sleep_mode: bool = False
    enable_cumem_allocator: bool | None = None
    driver: DriverName = field(default_factory=_default_driver)
    host_backup_limit: int | None = None
    host_backup_overflow: Backup | None = None
    retain_backups: bool = True
    nvtx: bool = False
    out_of_memory_directory: str | None = None
    publish: bool = False
    host_driver_devices: int = 1
    host_driver_bytes: int = 8 * 1024**3

    def __post_init__(self) -> None:
        """Checks every value, and lets sleep mode switch the allocator on."""
        _check_bool("enable_sleep_mode", self.enable_sleep_mode)
        if self.enable_cumem_allocator is not None:
            _check_bool("enable_cumem_allocator", self.enable_cumem_allocator, " or None")
        _check_driver(self.driver)
        if self.host_backup_limit is not None:
            _check_int("host_backup_limit", self.host_backup_limit, _MOST_BYTES, " or None")
        if self.host_backup_overflow is not None:
            backup = check_backup(self.host_backup_overflow, "host_backup_overflow")
            _check_overflow(backup, f"host_backup_overflow={str(backup)!r}")
            object.__setattr__(self, "host_backup_overflow", backup)
        _check_bool("retain_backups", self.retain_backups)
        _check_bool("nvtx", self.nvtx)
        if self.out_of_memory_directory is not None:
            if not isinstance(self.out_of_memory_directory, str):
                raise _wrong_type(
                    "out_of_memory_directory", self.out_of_memory_directory, "a str or None"
                )
            _check_directory(
                self.out_of_memory_directory,
                f"out_of_memory_directory={self.out_of_memory_directory!r}",
            )
        _check_bool("publish", self.publish)
        _check_int("host_driver_devices", self.host_driver_devices, _MOST_HOST_DEVICES)
        _check_int("host_driver_bytes", self.host_driver_bytes, _MOST_BYTES)
        if self.enable_sleep_mode:
            self._imply_allocator()
        if self.enable_cumem_allocator:
            missing = _missing(self.driver)
            if missing:
                raise self._unavailable(missing, "install the NVIDIA driver, or use driver='host'")

    def _imply_allocator(self) -> None:
        if self.enable_cumem_allocator is False:
            raise InvalidArgumentError(
                "enable_sleep_mode=True contradicts enable_cumem_allocator=False: only memory of "
                "the cumem allocator can sleep; leave enable_cumem_allocator out, or switch sleep "
                "mode off"
            )
        if self.enable_cumem_allocator is None:
            object.__setattr__(self, "enable_cumem_allocator", True)
            _log_allocator_implied()

    @property
    def cumem_allocator_enabled(self) -> bool:
        """Whether pools are in use: ``enable_cumem_allocator``, or what sleep mode made of it."""
        return bool(self.enable_cumem_allocator)

    def verify(self, availability: ReportsAvailability | None = None) -> None:
        """Checks that what is asked for can be had here; does nothing where the allocator is off.

        Args:
            availability: A result of ``cumempool.probe()``. None probes the configured driver now.

        Raises:
            UnavailableError: (a ``ValueError``) It cannot; the message has the reason of the probe
                and what to do.
        """
        if not self.cumem_allocator_enabled:
            return
        if availability is None:
            availability = Above.of_package.probe(self)
        if not availability.ok:
            raise self._unavailable(availability.reason or "no reason given", availability.hint)

    def _unavailable(self, reason: str, advice: str) -> UnavailableError:
        """What is raised where the allocator is switched on and cannot be had."""
        asked = "enable_sleep_mode" if self.enable_sleep_mode else "enable_cumem_allocator"
        text = f"{asked}=True is not supported here with driver={self.driver!r}: {reason}"
        return UnavailableError(
            f"{text}; {advice}" if advice else text, operation="verify", advice=advice
        )

    def verify_kv_transfer_compat(self, kv: DescribesConnector | None, **facts: Any) -> list[str]:
        """Checks that a KV-transfer connector can work on the memory that it will be given.

        Args:
            kv: A `KVTransferConfig`; None: there is no connector.
            **facts: What `verify_kv_transfer_compat` takes beside that:
                ``kv_backing``, ``kv_sleeps``, ``fabric``, ``environ``, ``live``.

        Returns:
            Warnings, which were also logged; empty where there are none.

        Raises:
            InvalidArgumentError: (a ``ValueError``) A combination that would fail or corrupt
                transfers; the message says why, and how to get out.
        """
        return Above.of_package.verify_kv_transfer(self, kv, facts)

    def maybe_use_memory_pool(self, tag: str, **policy: Any) -> AbstractContextManager[object]:
        """The pool scope of the process's allocator, or a null context where the allocator is off.

        Args:
            tag: The tag of the pool.
            **policy: What ``CuMemAllocator.use_memory_pool`` takes beside the tag.

        Raises:
            CumempoolError: As ``CuMemAllocator.get_instance`` and ``use_memory_pool`` do.
        """
        if not self.cumem_allocator_enabled:
            return nullcontext()
        return Above.of_package.use_memory_pool(self, tag, policy)

    @staticmethod
    def add_cli_args(
        parser: argparse.ArgumentParser, *, prefix: str = ""
    ) -> argparse.ArgumentParser:
        """Adds the settings to a parser as a group of flags, and returns the parser.

        Args:
            parser: The parser.
            prefix: What the flags begin with, for parsers that have one of their names already, as
                vLLM's has ``--enable-sleep-mode``: with ``"cumem-"``, that of the first setting is
                ``--cumem-enable-sleep-mode``.

        Raises:
            InvalidArgumentError: The parser has one of the flags already. None was added.
        """
        tried = argparse.ArgumentParser(
            parents=[parser], add_help=False, conflict_handler=parser.conflict_handler
        )
        try:
            _add_flags(tried, prefix)
        except argparse.ArgumentError as error:
            raise InvalidArgumentError(
                f"add_cli_args: the parser has this flag already: {error}; give a prefix, such as "
                "add_cli_args(parser, prefix='cumem-')"
            ) from None
        _add_flags(parser, prefix)
        return parser

    @classmethod
    def from_cli_args(
        cls,
        namespace: argparse.Namespace,
        *,
        prefix: str = "",
        environ: Mapping[str, str] | None = None,
    ) -> CuMemConfig:
        """The configuration of a parsed command line.

        A flag counts before its environment variable, and that before the default.

        Args:
            namespace: What the parser has returned.
            prefix: As for `add_cli_args`.
            environ: The variables; None is ``os.environ``.

        Raises:
            InvalidArgumentError: As the constructor and `from_env`; or the parser lacks the flags
                of `add_cli_args`.
        """
        values = _of_environment(os.environ if environ is None else environ)
        for setting in SETTINGS:
            dest = setting.dest_with(prefix)
            if not hasattr(namespace, dest):
                raise InvalidArgumentError(
                    f"the namespace has no {dest!r}: its parser needs the flags of "
                    "CuMemConfig.add_cli_args(parser)"
                )
            value = getattr(namespace, dest)
            if value is not None:
                values[setting.name] = value
        return cls(**values)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> CuMemConfig:
        """The configuration of the ``CUMEMPOOL_*`` variables; defaults hold for those not set.

        An empty variable is not set. Of one that does not exist a warning is logged, once.

        Args:
            environ: The variables; None is ``os.environ``.

        Raises:
            InvalidArgumentError: As the constructor; or a value that its variable does not take.
        """
        return cls(**_of_environment(os.environ if environ is None else environ))


def _add_flags(parser: argparse.ArgumentParser, prefix: str) -> None:
    group = parser.add_argument_group("cumempool", "GPU memory that can be put to sleep")
    for setting in SETTINGS:
        flag = setting.flag_with(prefix)
        text = f"{setting.doc} Default: {setting.default}."
        if setting.is_switch:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(
                flag,
                type=_for_argparse(setting.parse),
                default=None,
                metavar=_METAVARS.get(setting.name, "N"),
                help=f"{text} Takes {setting.values}.",
            )


def _for_argparse(parse: Callable[[str], object]) -> Callable[[str], object]:
    def convert(text: str) -> object:
        try:
            return parse(text)
        except InvalidArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _check_bool(name: str, value: object, also: str = "") -> None:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, f"a bool{also}")


def _check_driver(value: object) -> None:
    if not isinstance(value, str):
        raise _wrong_type("driver", value, "a str")
    if value not in DRIVERS:
        raise InvalidArgumentError(f"driver={value!r} is not one of {', '.join(DRIVERS)}")


def _check_int(name: str, value: object, most: int, also: str = "") -> None:
    # bool is an int to isinstance, but True is no number of bytes.
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(name, value, f"an int{also}")
    _in_range(value, f"{name}={value}", most)


def _wrong_type(name: str, value: object, expected: str) -> InvalidTypeError:
    return InvalidTypeError(f"{name}={value!r} is of type {type(value).__name__}, not {expected}")


def _log_allocator_implied() -> None:
    global _implied_logged
    with _implied_lock:
        if _implied_logged:
            return
        _implied_logged = True
    _logger.info("enable_sleep_mode=True switches enable_cumem_allocator on")
