"""Checks whether a KV-transfer connector can work on the memory that a program gives it.

docs/kv-transfer.md has the table of connectors, with notes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from cumempool.errors import InvalidArgumentError, InvalidTypeError
from cumempool.integrations.expandable_segments import (
    ALLOCATOR_VARIABLES,
    ExpandableSegments,
    expandable_segments,
)

if TYPE_CHECKING:
    from cumempool.config import CuMemConfig

__all__ = [
    "ALLOCATOR_VARIABLES",
    "CONNECTORS",
    "Connector",
    "ExpandableSegments",
    "KVBacking",
    "KVTransferConfig",
    "expandable_segments",
    "find_connector",
    "verify_kv_transfer_compat",
]

KVBacking = Literal["vmm", "cuda_malloc"]
_BACKINGS: Final = ("vmm", "cuda_malloc")

_logger = logging.getLogger("cumempool")


# ---- connectors --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connector:
    """How a connector uses the memory of the KV cache.

    Attributes:
        name: Its name in vLLM.
        registers: Whether it registers that memory with a transport, or exports it to another
            process; no page of it may change while it is registered. If False, it copies to and
            from its own buffers.
        follows_remap: Whether it can drop its registrations before a sleep and make them again
            after the wake, or has none.
        aliases: Its other names.
        legacy_ipc: Whether it exports the memory by ``cudaIpcGetMemHandle``, which takes memory
            from ``cudaMalloc`` only.
        over_ucx: Whether it sends the memory over UCX.
    """

    name: str
    registers: bool
    follows_remap: bool
    aliases: tuple[str, ...] = ()
    legacy_ipc: bool = False
    over_ucx: bool = False


def _registers(name: str, *aliases: str, **facts: bool) -> Connector:
    return Connector(name, True, facts.pop("follows_remap", False), aliases, **facts)


def _copies(name: str, *aliases: str) -> Connector:
    return Connector(name, False, True, aliases)


#: The known connectors.
CONNECTORS: Final[tuple[Connector, ...]] = (
    _registers("NixlConnector", "nixl", follows_remap=True, over_ucx=True),
    _registers("MooncakeConnector", "mooncake"),
    _registers("MooncakeStoreConnector"),
    _registers("MoRIIOConnector"),
    _registers("FlexKVConnectorV1", "FlexKVConnector", "FlexKV", legacy_ipc=True),
    _registers("LMCacheMPConnector", legacy_ipc=True),
    _copies("LMCacheConnectorV1", "LMCacheConnector", "lmcache"),
    _copies("P2pNcclConnector"),
    _copies("OffloadingConnector"),
    _copies("SimpleCPUOffloadConnector", "SimpleCPUOffloadingConnector"),
    _copies("ExampleConnector", "SharedStorageConnector"),
    _copies("HF3FSKVConnector", "HF3FSConnector"),
    _copies("DecodeBenchConnector"),
)

#: A connector made of others, which are listed under ``"connectors"`` in its extra configuration.
_MULTI: Final = "MultiConnector"

_BY_FOLDED_NAME: Final = {
    name.casefold(): connector
    for connector in CONNECTORS
    for name in (connector.name, *connector.aliases)
}


def find_connector(name: str) -> Connector | None:
    """Returns the connector of a name or alias, ignoring case; None if it is not known."""
    return _BY_FOLDED_NAME.get(name.strip().casefold())


# ---- configuration -----------------------------------------------------------------------------


def _freeze(value: object) -> object:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _freeze(inner) for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(inner) for inner in value)
    return value


def _thaw(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_thaw(inner) for inner in value]
    return value


@dataclass(frozen=True, slots=True)
class KVTransferConfig:
    """The connector that a program moves its KV cache with, and its settings. Immutable.

    Attributes:
        connector: The connector's name in vLLM; None = KV caches are not transferred.
        extra: The connector's own settings (vLLM: ``kv_connector_extra_config``).
        buffer_device: ``"cuda"``, or ``"cpu"`` if the connector sends from host memory
            (vLLM: ``kv_buffer_device``).
        follows_remap: Whether registrations are dropped before a sleep and made again after the
            wake. Set it if the program does so itself, by ``register_hooks`` or
            `cumempool.integrations.nixl`. None = as in `CONNECTORS`.

    Raises:
        InvalidTypeError: A field of the wrong type.
        InvalidArgumentError: An empty name, or a MultiConnector without parts.
    """

    connector: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    buffer_device: str = "cuda"
    follows_remap: bool | None = None

    def __post_init__(self) -> None:
        """Checks every value and freezes the mapping."""
        for name, allowed, expected in (
            ("connector", (str, type(None)), "a str or None"),
            ("extra", Mapping, "a mapping"),
            ("buffer_device", str, "a str"),
            ("follows_remap", (bool, type(None)), "a bool or None"),
        ):
            if not isinstance(getattr(self, name), allowed):
                raise _wrong_type(name, getattr(self, name), expected)
        if self.connector is not None and not self.connector.strip():
            raise InvalidArgumentError("connector is an empty name; None means no connector")
        object.__setattr__(self, "extra", _freeze(self.extra))
        if self._is_multi:
            self._nested()

    def __reduce__(self) -> tuple[object, ...]:
        extra = _thaw(self.extra)
        return type(self), (self.connector, extra, self.buffer_device, self.follows_remap)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> KVTransferConfig:
        """Returns the configuration of a mapping such as vLLM's ``--kv-transfer-config``.

        Args:
            settings: ``kv_connector`` (or ``connector``), ``kv_connector_extra_config`` (or
                ``extra``), ``kv_buffer_device`` (or ``buffer_device``), ``follows_remap``. Other
                keys (``kv_role``, ``kv_ip``, ...) do not concern memory. None means empty.

        Raises:
            InvalidTypeError: `settings` is no mapping, or a value is of the wrong type.
            InvalidArgumentError: It has both names of a setting; or as the constructor.
        """
        if settings is None:
            return cls()
        if not isinstance(settings, Mapping):
            raise _wrong_type("the KV transfer configuration", settings, "a mapping")
        given = {
            ours: value
            for theirs, ours in (
                ("kv_connector", "connector"),
                ("kv_connector_extra_config", "extra"),
                ("kv_buffer_device", "buffer_device"),
                ("follows_remap", "follows_remap"),
            )
            if (value := _one_of(settings, theirs, ours)) is not None
        }
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> KVTransferConfig:
        """Returns the configuration of a JSON object; see `from_dict`.

        Raises:
            InvalidTypeError: `text` is no str, or its JSON is no object.
            InvalidArgumentError: `text` is no JSON; or as `from_dict`.
        """
        if not isinstance(text, str):
            raise _wrong_type("the KV transfer configuration", text, "a str")
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidArgumentError(
                f"the KV transfer configuration is no JSON: {error}"
            ) from None
        return cls.from_dict(settings)

    @property
    def _is_multi(self) -> bool:
        return (self.connector or "").strip().casefold() == _MULTI.casefold()

    def parts(self) -> tuple[KVTransferConfig, ...]:
        """Returns the parts of a MultiConnector; of any other connector, this configuration."""
        if self.connector is None:
            return ()
        if not self._is_multi:
            return (self,)
        parts = [part for nested in self._nested() for part in nested.parts()]
        own = self.follows_remap
        return tuple(
            replace(part, follows_remap=own) if part.follows_remap is None else part
            for part in parts
        )

    def _nested(self) -> tuple[KVTransferConfig, ...]:
        listed = self.extra.get("connectors", ())
        if not isinstance(listed, tuple):
            raise _wrong_type(f"the connectors of {_MULTI}", _thaw(listed), "a list")
        for entry in listed:
            if not isinstance(entry, Mapping):
                raise _wrong_type(f"a part of {_MULTI}", entry, "a mapping")
        nested = tuple(map(KVTransferConfig.from_dict, listed))
        if not nested or any(part.connector is None for part in nested):
            raise InvalidArgumentError(
                f'{_MULTI} takes its parts from "connectors" in its extra configuration: a list '
                'of mappings with a "kv_connector" each'
            )
        return nested


def _one_of(settings: Mapping[str, Any], theirs: str, ours: str) -> Any:
    if theirs != ours and theirs in settings and ours in settings:
        raise InvalidArgumentError(f"{theirs} and {ours} are the same setting: give one of them")
    return settings.get(theirs, settings.get(ours))


def _wrong_type(what: str, value: object, expected: str) -> InvalidTypeError:
    return InvalidTypeError(f"{what} is {value!r}, of type {type(value).__name__}, not {expected}")


# ---- the rules -----------------------------------------------------------------------------------


def verify_kv_transfer_compat(
    config: CuMemConfig,
    kv: KVTransferConfig | None,
    *,
    environ: Mapping[str, str] | None = None,
    live: Mapping[str, Any] | None = None,
    kv_backing: KVBacking = "vmm",
    kv_sleeps: bool | None = None,
    fabric: bool | None = None,
) -> list[str]:
    """Checks that a connector can work on the memory that a program will give it.

    Connectors that copy work with any memory. If a connector registers memory, torch's expandable
    segments must be off or the pools on; if the KV cache sleeps, it must also follow a remap.

    Args:
        config: The configuration, which says whether pools and sleep mode are on.
        kv: The connector. For None, or one without a name, only `kv_backing` is checked.
        environ: As for `expandable_segments`.
        live: As for `expandable_segments`.
        kv_backing: The backing of the KV cache's tag.
        kv_sleeps: Whether that tag is put to sleep; None = if sleep mode is on.
        fabric: Whether its memory has FABRIC handles (``TagStats.handle_types``,
            ``DeviceProbe.handle_types``); None = not known.

    Returns:
        The warnings, which it also logs.

    Raises:
        InvalidArgumentError: (a ``ValueError``) A combination that would fail or corrupt
            transfers; the message gives the reason and the ways out.
    """
    sleeps = config.enable_sleep_mode if kv_sleeps is None else kv_sleeps
    _refuse_contradictions(config, kv_backing, sleeps)
    connectors = list(_resolve(kv))
    warnings = [_unknown(connector) for connector, known in connectors if not known]
    registering = [connector for connector, _ in connectors if connector.registers]
    if registering and not config.cumem_allocator_enabled:
        segments = expandable_segments(environ, live)
        if segments.on:
            raise _with_expandable_segments(registering, segments)
        if segments.on is None:
            warnings.append(
                f"cannot tell whether torch's expandable segments are on ({segments.source}); if "
                f"they are, transfers of KV connector {_names(registering)} can fail with "
                "IBV_WC_REM_ACCESS_ERR: give True or False"
            )
    fixed = [connector for connector in registering if not connector.follows_remap]
    if sleeps and fixed:
        raise _without_following(fixed)
    if config.cumem_allocator_enabled and kv_backing == "vmm":
        warnings.extend(_costs(registering, fabric))
    for text in warnings:
        _logger.warning("%s", text)
    return warnings


def _unknown(connector: Connector) -> str:
    return (
        f"KV connector {connector.name} is unknown: it is taken to register the memory of the KV "
        "cache, and not to follow a remap unless KVTransferConfig(follows_remap=True) says so"
    )


def _resolve(kv: KVTransferConfig | None) -> Iterator[tuple[Connector, bool]]:
    """Yields each connector as configured, and whether it is known."""
    for part in kv.parts() if kv is not None else ():
        name = str(part.connector).strip()
        found = find_connector(name)
        connector = found or _registers(name)
        if connector.name == "NixlConnector":
            backends = part.extra.get("backends") or "UCX"
            over_ucx = "UCX" in ((backends,) if isinstance(backends, str) else map(str, backends))
            on_device = part.buffer_device.strip().casefold() != "cpu"
            connector = replace(connector, over_ucx=over_ucx, registers=on_device)
        if part.follows_remap is not None and connector.registers:
            connector = replace(connector, follows_remap=part.follows_remap)
        yield connector, found is not None


def _refuse_contradictions(config: CuMemConfig, kv_backing: str, sleeps: bool) -> None:
    if kv_backing not in _BACKINGS:
        names = ", ".join(map(repr, _BACKINGS))
        raise InvalidArgumentError(f"kv_backing={kv_backing!r} is not one of {names}")
    if sleeps and not config.enable_sleep_mode:
        raise InvalidArgumentError(
            "kv_sleeps=True contradicts enable_sleep_mode=False: switch sleep mode on, or leave "
            "kv_sleeps out"
        )
    if sleeps and kv_backing == "cuda_malloc":
        raise InvalidArgumentError(
            'backing="cuda_malloc" of the KV cache contradicts sleep mode: such memory cannot '
            'sleep; use backing="vmm", or keep the KV cache out of what sleeps (kv_sleeps=False, '
            "and name the other tags in sleep())"
        )


def _names(connectors: list[Connector]) -> str:
    return ", ".join(dict.fromkeys(connector.name for connector in connectors))


def _with_expandable_segments(
    registering: list[Connector], segments: ExpandableSegments
) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"KV connector {_names(registering)} registers the memory of the KV cache, and torch's "
        f"expandable segments are on ({segments.source}): torch maps other pages under a "
        "registration, and transfers then fail with IBV_WC_REM_ACCESS_ERR; either switch the cumem "
        "allocator on (enable_cumem_allocator=True), whose memory keeps its pages while it is "
        "registered, or switch expandable segments off (expandable_segments:False)",
        operation="verify",
        advice="enable_cumem_allocator=True, or expandable_segments:False",
    )


def _without_following(fixed: list[Connector]) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"KV connector {_names(fixed)} cannot follow a remap: its registrations would name pages "
        "that a sleep has given away; switch sleep mode off, keep the KV cache out of what sleeps "
        "(kv_sleeps=False, and name the other tags in sleep()), or, if the program drops and "
        "makes the registrations itself by register_hooks(), say so with "
        "KVTransferConfig(follows_remap=True)",
        operation="verify",
        advice="switch sleep mode off, or keep the KV cache out of what sleeps",
    )


def _costs(registering: list[Connector], fabric: bool | None) -> Iterator[str]:
    ipc = [connector for connector in registering if connector.legacy_ipc]
    if ipc:
        yield (
            f"KV connector {_names(ipc)} opens the KV cache by cudaIpcGetMemHandle, which does "
            'not take virtual memory: use backing="cuda_malloc" for its tag (which then cannot '
            "sleep)"
        )
    over_ucx = [connector for connector in registering if connector.over_ucx]
    if over_ucx and not fabric:
        without = "" if fabric is False else "if it has no FABRIC handles, "
        yield (
            f"KV connector {_names(over_ucx)} sends the KV cache over UCX: {without}the UCX of "
            "PyPI wheels reaches virtual memory on the same host by TCP only, at about 0.5 GB/s "
            "where memory of cudaMalloc gets about 300 GB/s; ways out: FABRIC handles (an IMEX "
            'channel), backing="cuda_malloc" for its tag (which then cannot sleep), or an '
            "InfiniBand path with dma-buf or nvidia-peermem"
        )
