"""Defines the settings of an allocator: one immutable object from keywords, flags or variables."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Final, Protocol

from cumempool._pool.backup import Backup
from cumempool._settings import (
    BOOL,
    BYTES,
    DEVICES,
    DIRECTORY,
    DRIVER,
    DRIVERS,
    ENV_PREFIX,
    OVERFLOW,
    DriverName,
    Kind,
    Setting,
    parse_bytes,
)
from cumempool.errors import InvalidArgumentError, UnavailableError

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

_logger = logging.getLogger("cumempool")
# Messages logged already: each is logged once per process.
_logged: set[str] = set()


class ReportsAvailability(Protocol):
    """The part of a probe's result that `CuMemConfig.verify` reads."""

    @property
    def ok(self) -> bool:
        """Whether the driver can be used here."""

    @property
    def reason(self) -> str:
        """The cause if not `ok`, or ``""``."""

    @property
    def hint(self) -> str:
        """The remedy if not `ok`, or ``""``."""


class DescribesConnector(Protocol):
    """The part of a `KVTransferConfig` that `verify_kv_transfer_compat` reads."""

    @property
    def connector(self) -> str | None:
        """The name of the connector."""


@dataclass(frozen=True, slots=True)
class Above:
    """Functions of higher modules that `CuMemConfig` calls.

    Attributes:
        probe: `cumempool.probe`.
        use_memory_pool: Makes a scope of the process's allocator from configuration, tag, policy.
        verify_kv_transfer: `verify_kv_transfer_compat` of configuration, connector and facts.
        of_package: The package's functions; the package sets them when it is imported.
    """

    probe: Callable[[CuMemConfig], ReportsAvailability]
    use_memory_pool: Callable[[CuMemConfig, str, dict[str, Any]], AbstractContextManager[object]]
    verify_kv_transfer: Callable[[CuMemConfig, Any, dict[str, Any]], list[str]]
    of_package: ClassVar[Above]


def _of(kind: Kind, default: str, doc: str) -> dict[str, Any]:
    """Returns the metadata of a field: the parts of a `Setting` that the field does not give."""
    return {"kind": kind, "default": default, "doc": doc}


def _default_driver() -> Any:
    return _by_name["driver"].from_environment(os.environ) or "cuda"


def _missing(driver: DriverName) -> str:
    """Returns why the library or libcuda does not load, or ``""``. Loads them; starts neither."""
    try:
        from cumempool import _core  # noqa: F401 - imported only to see whether it loads
    except ImportError as error:
        return f"the extension module of cumempool cannot be loaded: {error}"
    if driver == "cuda":
        import ctypes  # here, because importing it opens the running program

        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            return f"libcuda.so.1 cannot be loaded: {error}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CuMemConfig:
    """The settings of an allocator. Immutable; construction starts no driver.

    If the allocator is on, construction checks that the library and libcuda load; `verify` checks
    that they work.

    Attributes:
        enable_sleep_mode: Allow memory to sleep and wake. Switches the allocator on, and logs that
            once per process.
        enable_cumem_allocator: Allocate in pools of virtual memory. None follows
            ``enable_sleep_mode``. If False, the allocator has null scopes, gives ordinary memory,
            and does not sleep.
        driver: ``"cuda"`` or ``"host"``. Defaults to ``CUMEMPOOL_DRIVER``, else ``"cuda"``.
        host_backup_limit: Limit on pinned host memory for backups, in bytes; None = no limit.
        host_backup_overflow: Tier for backups that exceed that limit or the system's host memory:
            pageable memory or a file, as a `Backup` or its text. None = refuse such a sleep.
        retain_backups: Keep backups while their memory is awake, and copy only what has changed
            since the last sleep.
        nvtx: Mark transitions as NVTX ranges, for profilers.
        out_of_memory_directory: Directory for a file of statistics, allocations and the latest
            events, for ``cumempool report``, if memory runs out; None = nowhere.
        publish: Write the statistics once a second to a file that only this user can read, for
            ``cumempool top`` and ``cumempool snapshot``.
        host_driver_devices: Number of devices that the host driver simulates, 1 to 64.
        host_driver_bytes: Memory of each simulated device, in bytes.

    Raises:
        InvalidArgumentError: (a ``ValueError``) A value is out of range, or sleep mode comes with
            an explicit ``enable_cumem_allocator=False``.
        InvalidTypeError: (a ``ValueError`` and ``TypeError``) A value has the wrong type.
        UnavailableError: (a ``ValueError``) The allocator is on, and the library or libcuda does
            not load here.
    """

    enable_sleep_mode: bool = field(
        default=False,
        metadata=_of(BOOL, "off", "Allow memory to sleep and wake; switches the allocator on."),
    )
    enable_cumem_allocator: bool | None = field(
        default=None,
        metadata=_of(
            BOOL,
            "as sleep mode",
            "Allocate in pools of virtual memory; an explicit no contradicts sleep mode.",
        ),
    )
    driver: DriverName = field(
        default_factory=_default_driver,
        metadata=_of(
            DRIVER,
            "CUMEMPOOL_DRIVER, else cuda",
            "The driver: cuda for GPUs, host for devices simulated in host memory.",
        ),
    )
    host_backup_limit: int | None = field(
        default=None,
        metadata=_of(BYTES, "no limit", "Limit on pinned host memory for backups."),
    )
    host_backup_overflow: Backup | None = field(
        default=None,
        metadata=_of(
            OVERFLOW,
            "such a sleep is refused",
            "Tier for backups that exceed the limit on pinned host memory.",
        ),
    )
    retain_backups: bool = field(
        default=True,
        metadata=_of(
            BOOL,
            "on",
            "Keep backups while awake, and copy only what has changed since the last sleep.",
        ),
    )
    nvtx: bool = field(
        default=False,
        metadata=_of(BOOL, "off", "Mark transitions as NVTX ranges, for profilers."),
    )
    out_of_memory_directory: str | None = field(
        default=None,
        metadata=_of(
            DIRECTORY,
            "nothing is written",
            "Directory for statistics, allocations and the latest events if memory runs out.",
        ),
    )
    publish: bool = field(
        default=False,
        metadata=_of(
            BOOL,
            "off",
            "Let other processes of this user read the statistics: cumempool top, cumempool "
            "snapshot.",
        ),
    )
    host_driver_devices: int = field(
        default=1, metadata=_of(DEVICES, "1", "Number of devices that the host driver simulates.")
    )
    host_driver_bytes: int = field(
        default=8 * 1024**3,
        metadata=_of(BYTES, "8GiB", "Memory of each device that the host driver simulates."),
    )

    def __post_init__(self) -> None:
        """Checks every value, and switches the allocator on for sleep mode."""
        for setting in SETTINGS:
            value = setting.checked(getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
        if self.enable_sleep_mode and self.enable_cumem_allocator is None:
            object.__setattr__(self, "enable_cumem_allocator", True)
            if "implied" not in _logged:
                _logged.add("implied")
                _logger.info("enable_sleep_mode=True switches enable_cumem_allocator on")
        if self.enable_sleep_mode and not self.enable_cumem_allocator:
            raise InvalidArgumentError(
                "enable_sleep_mode=True contradicts enable_cumem_allocator=False: only memory of "
                "the cumem allocator can sleep; leave enable_cumem_allocator out, or switch sleep "
                "mode off"
            )
        if self.enable_cumem_allocator:
            missing = _missing(self.driver)
            if missing:
                raise self._unavailable(missing, "install the NVIDIA driver, or use driver='host'")

    @property
    def cumem_allocator_enabled(self) -> bool:
        """Whether pools are in use: ``enable_cumem_allocator``, or on because of sleep mode."""
        return bool(self.enable_cumem_allocator)

    def verify(self, availability: ReportsAvailability | None = None) -> None:
        """Checks that the configured driver works here; does nothing if the allocator is off.

        Args:
            availability: A result of ``cumempool.probe()``. None probes the configured driver now.

        Raises:
            UnavailableError: (a ``ValueError``) It does not work; the message has the probe's
                reason and the remedy.
        """
        if not self.cumem_allocator_enabled:
            return
        if availability is None:
            availability = Above.of_package.probe(self)
        if not availability.ok:
            raise self._unavailable(availability.reason or "no reason given", availability.hint)

    def _unavailable(self, reason: str, advice: str) -> UnavailableError:
        """Returns the error for an allocator that is on but not available."""
        asked = "enable_sleep_mode" if self.enable_sleep_mode else "enable_cumem_allocator"
        text = f"{asked}=True is not supported here with driver={self.driver!r}: {reason}"
        return UnavailableError(
            f"{text}; {advice}" if advice else text, operation="verify", advice=advice
        )

    def verify_kv_transfer_compat(self, kv: DescribesConnector | None, **facts: Any) -> list[str]:
        """Checks that a KV-transfer connector can work on the memory that it will get.

        Args:
            kv: A `KVTransferConfig`; None means no connector.
            **facts: Further arguments of `verify_kv_transfer_compat`:
                ``kv_backing``, ``kv_sleeps``, ``fabric``, ``environ``, ``live``.

        Returns:
            Warnings, also logged; empty if there are none.

        Raises:
            InvalidArgumentError: (a ``ValueError``) The combination would fail or corrupt
                transfers; the message gives the reason and the remedy.
        """
        return Above.of_package.verify_kv_transfer(self, kv, facts)

    def maybe_use_memory_pool(self, tag: str, **policy: Any) -> AbstractContextManager[object]:
        """Returns a scope of the process's allocator, or a null context if the allocator is off.

        Args:
            tag: The tag of the pool.
            **policy: Further arguments of ``CuMemAllocator.use_memory_pool``.

        Raises:
            CumempoolError: As ``CuMemAllocator.get_instance`` and ``use_memory_pool``.
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
            prefix: Prefix of the flags, for parsers that have one of their names already, such as
                vLLM's ``--enable-sleep-mode``: ``"cumem-"`` makes the first flag
                ``--cumem-enable-sleep-mode``.

        Raises:
            InvalidArgumentError: The parser has one of the flags already. None is added.
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
        """Returns the configuration of a parsed command line.

        A flag comes before its environment variable, and the variable before the default.

        Args:
            namespace: The result of the parser.
            prefix: As for `add_cli_args`.
            environ: The variables; None is ``os.environ``.

        Raises:
            InvalidArgumentError: As the constructor and `from_env`, or the parser lacks the flags
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
        """Returns the configuration of the ``CUMEMPOOL_*`` variables; unset ones have defaults.

        An empty variable counts as unset. An unknown variable logs a warning, once.

        Args:
            environ: The variables; None is ``os.environ``.

        Raises:
            InvalidArgumentError: As the constructor, or a variable has an invalid value.
        """
        return cls(**_of_environment(os.environ if environ is None else environ))


#: Every setting, in the order of the fields of `CuMemConfig`.
SETTINGS: Final[tuple[Setting, ...]] = tuple(
    Setting(each.name, optional=each.default is None, **each.metadata)
    for each in dataclasses.fields(CuMemConfig)
)
_by_name: Final = {setting.name: setting for setting in SETTINGS}


def settings_table() -> str:
    """Returns `SETTINGS` as a Markdown table, for documentation."""
    lines = [
        "| `CuMemConfig` | command line | environment | values | default | what it does |",
        "|---|---|---|---|---|---|",
    ]
    for each in SETTINGS:
        flag = f"`{each.flag}`"
        if each.kind is BOOL:
            flag += f", `--no-{each.flag.removeprefix('--')}`"
        cells = (f"`{each.name}`", flag, f"`{each.env}`", each.kind.values, each.default, each.doc)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _of_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings that variables give, and always the driver."""
    known = {setting.env for setting in SETTINGS}
    unknown = {name for name in environ if name.startswith(ENV_PREFIX)} - known - _logged
    if unknown:
        _logged.update(unknown)
        _logger.warning(
            "unknown environment variable %s has no effect; the known ones are %s",
            ", ".join(sorted(unknown)),
            ", ".join(sorted(known)),
        )
    read = {setting.name: setting.from_environment(environ) for setting in SETTINGS}
    # The driver is always given: os.environ must not decide if other variables were passed.
    return {"driver": "cuda"} | {name: value for name, value in read.items() if value is not None}


def _add_flags(parser: argparse.ArgumentParser, prefix: str) -> None:
    group = parser.add_argument_group("cumempool", "GPU memory that can be put to sleep")
    for setting in SETTINGS:
        flag, text = setting.flag_with(prefix), f"{setting.doc} Default: {setting.default}."
        if setting.kind is BOOL:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(
                flag,
                type=partial(_parse_flag, setting),
                default=None,
                metavar=setting.kind.metavar,
                help=f"{text} Takes {setting.kind.values}.",
            )


def _parse_flag(setting: Setting, text: str) -> object:
    try:
        return setting.parse(text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
