"""Which KV-transfer connectors go together with which memory: a table, and the rules over it."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

from cumempool.errors import InvalidArgumentError, InvalidTypeError

__all__ = [
    "ALLOCATOR_VARIABLES",
    "CONNECTORS",
    "Connector",
    "ExpandableSegments",
    "KVBacking",
    "KVTransferConfig",
    "MemoryConfig",
    "connectors_table",
    "expandable_segments",
    "find_connector",
    "verify_kv_transfer_compat",
]

KVBacking = Literal["vmm", "cuda_malloc"]
_BACKINGS: Final = ("vmm", "cuda_malloc")

_logger = logging.getLogger("cumempool")


# ---- connectors --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Connector:
    """What a connector does with the memory of the KV cache.

    Attributes:
        name: Its name in vLLM.
        registers: It registers that memory with a transport, or exports it to another process; no
            page of it may change while it is registered. False: it copies to and from buffers of
            its own, and a sleep is as good as any other change of contents to it.
        follows_remap: It can drop its registrations before a sleep and make them again after the
            wake. True as well where there is nothing to drop.
        transports: What the bytes travel over.
        legacy_ipc: It exports the memory by ``cudaIpcGetMemHandle``, which takes memory from
            ``cudaMalloc`` only.
        aliases: Other names that it is known by.
        note: What else is worth knowing, uncertainty included.
    """

    name: str
    registers: bool
    follows_remap: bool
    transports: tuple[str, ...]
    legacy_ipc: bool = False
    aliases: tuple[str, ...] = ()
    note: str = ""


#: The connectors that are known. The notes say where public documentation leaves room for doubt.
CONNECTORS: Final[tuple[Connector, ...]] = (
    Connector(
        name="NixlConnector",
        registers=True,
        follows_remap=True,
        transports=("UCX",),
        aliases=("nixl",),
        note='Other NIXL backends may be named in `backends`. With `kv_buffer_device` "cpu" it '
        "copies through host memory and registers only that.",
    ),
    Connector(
        name="MooncakeConnector",
        registers=True,
        follows_remap=False,
        transports=("RDMA", "TCP"),
        aliases=("mooncake",),
        note="Its transfer engine can unregister memory; whether the connector does so around a "
        "sleep is not documented, so it is taken not to.",
    ),
    Connector(
        name="MooncakeStoreConnector",
        registers=True,
        follows_remap=False,
        transports=("RDMA", "TCP"),
        note="Registers KV memory as buffers of the store; taken not to follow a remap.",
    ),
    Connector(
        name="MoRIIOConnector",
        registers=True,
        follows_remap=False,
        transports=("RDMA",),
        note="For AMD GPUs; taken not to follow a remap.",
    ),
    Connector(
        name="FlexKVConnectorV1",
        registers=True,
        follows_remap=False,
        transports=("CUDA IPC", "RDMA", "file"),
        legacy_ipc=True,
        aliases=("FlexKVConnector", "FlexKV"),
        note="Its server process opens the KV cache by CUDA IPC; uncertain for all versions.",
    ),
    Connector(
        name="LMCacheMPConnector",
        registers=True,
        follows_remap=False,
        transports=("CUDA IPC",),
        legacy_ipc=True,
        note="The multi-process mode of LMCache: its server opens the KV cache by CUDA IPC.",
    ),
    Connector(
        name="LMCacheConnectorV1",
        registers=False,
        follows_remap=True,
        transports=("copy", "UCX", "file"),
        aliases=("LMCacheConnector", "lmcache"),
        note="Copies into buffers of its own; a transport registers only those.",
    ),
    Connector(
        name="P2pNcclConnector",
        registers=False,
        follows_remap=True,
        transports=("NCCL",),
        note="Sends copies of blocks through NCCL. NCCL itself may register buffers that a CUDA "
        "graph captured; `NCCL_GRAPH_REGISTER=0` keeps it from that.",
    ),
    Connector(
        name="OffloadingConnector",
        registers=False,
        follows_remap=True,
        transports=("copy",),
        note="Copies to host memory.",
    ),
    Connector(
        name="SimpleCPUOffloadConnector",
        registers=False,
        follows_remap=True,
        transports=("copy",),
        aliases=("SimpleCPUOffloadingConnector",),
        note="Copies to host memory.",
    ),
    Connector(
        name="ExampleConnector",
        registers=False,
        follows_remap=True,
        transports=("file",),
        aliases=("SharedStorageConnector",),
        note="Copies to files; earlier called SharedStorageConnector.",
    ),
    Connector(
        name="HF3FSKVConnector",
        registers=False,
        follows_remap=True,
        transports=("file", "RDMA"),
        aliases=("HF3FSConnector",),
        note="Copies to 3FS through host buffers, which alone are registered; uncertain for all "
        "versions.",
    ),
    Connector(
        name="DecodeBenchConnector",
        registers=False,
        follows_remap=True,
        transports=(),
        note="Fills the KV cache with made-up values; nothing travels.",
    ),
)

#: A connector made of others, which are listed under ``"connectors"`` in its extra configuration.
_MULTI: Final = "MultiConnector"

_BY_FOLDED_NAME: Final = {
    name.casefold(): connector
    for connector in CONNECTORS
    for name in (connector.name, *connector.aliases)
}


def find_connector(name: str) -> Connector | None:
    """The connector of that name or alias, upper and lower case being the same; or None."""
    return _BY_FOLDED_NAME.get(name.strip().casefold())


def connectors_table() -> str:
    """`CONNECTORS` as a Markdown table, for documentation."""
    lines = [
        "| connector | KV memory is | follows a remap | transports | note |",
        "|---|---|---|---|---|",
    ]
    for connector in CONNECTORS:
        how = "registered" if connector.registers else "copied"
        follows = "yes" if connector.follows_remap else "no"
        transports = ", ".join(connector.transports) or "none"
        name = f"`{connector.name}`"
        lines.append(f"| {name} | {how} | {follows} | {transports} | {connector.note} |")
    return "\n".join(lines) + "\n"


# ---- what users write --------------------------------------------------------------------------


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
    """Which connector a program moves its KV cache with. Immutable.

    Attributes:
        connector: The connector's name, as vLLM has it; None = KV caches stay where they are.
        extra: The connector's own settings (vLLM: ``kv_connector_extra_config``).
        buffer_device: ``"cuda"``, or ``"cpu"`` where the connector sends from host memory
            (vLLM: ``kv_buffer_device``).
        follows_remap: Whether registrations are dropped before a sleep and made again after the
            wake, where the program knows better than `CONNECTORS`: because it does so itself, by
            ``register_hooks`` or `cumempool.integrations.nixl`. None = what the table says.

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
        if self.connector is not None and not isinstance(self.connector, str):
            raise _wrong_type("connector", self.connector, "a str or None")
        if self.connector is not None and not self.connector.strip():
            raise InvalidArgumentError("connector is an empty name; None means no connector")
        if not isinstance(self.extra, Mapping):
            raise _wrong_type("extra", self.extra, "a mapping")
        if not isinstance(self.buffer_device, str):
            raise _wrong_type("buffer_device", self.buffer_device, "a str")
        if self.follows_remap is not None and not isinstance(self.follows_remap, bool):
            raise _wrong_type("follows_remap", self.follows_remap, "a bool or None")
        object.__setattr__(self, "extra", _freeze(self.extra))
        if self._is_multi:
            self._nested()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (
            self.connector,
            _thaw(self.extra),
            self.buffer_device,
            self.follows_remap,
        )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> KVTransferConfig:
        """The configuration of a mapping such as vLLM's ``--kv-transfer-config``.

        Args:
            settings: ``kv_connector`` (or ``connector``), ``kv_connector_extra_config`` (or
                ``extra``), ``kv_buffer_device`` (or ``buffer_device``), ``follows_remap``; what
                else is there (``kv_role``, ``kv_ip``, ...) has no bearing on memory. None is empty.

        Raises:
            InvalidTypeError: It is no mapping, or a value is of the wrong type.
            InvalidArgumentError: Both names of a setting are there; or as the constructor.
        """
        if settings is None:
            return cls()
        if not isinstance(settings, Mapping):
            raise _wrong_type("the KV transfer configuration", settings, "a mapping")
        buffer_device = _one_of(settings, "kv_buffer_device", "buffer_device")
        extra = _one_of(settings, "kv_connector_extra_config", "extra")
        return cls(
            connector=_one_of(settings, "kv_connector", "connector"),
            extra={} if extra is None else extra,
            buffer_device="cuda" if buffer_device is None else buffer_device,
            follows_remap=settings.get("follows_remap"),
        )

    @classmethod
    def from_json(cls, text: str) -> KVTransferConfig:
        """The configuration of a JSON object; see `from_dict`.

        Raises:
            InvalidTypeError: `text` is no text, or its JSON is no object.
            InvalidArgumentError: It is no JSON; or as `from_dict`.
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
        """The configurations of single connectors: those of a MultiConnector, or this one."""
        if self.connector is None:
            return ()
        if not self._is_multi:
            return (self,)
        return tuple(
            part
            if part.follows_remap is not None
            else replace(part, follows_remap=self.follows_remap)
            for nested in self._nested()
            for part in nested.parts()
        )

    def _nested(self) -> tuple[KVTransferConfig, ...]:
        listed = self.extra.get("connectors", ())
        if not isinstance(listed, tuple):
            raise _wrong_type(f"the connectors of {_MULTI}", _thaw(listed), "a list")
        nested = tuple(KVTransferConfig.from_dict(_mapping(entry)) for entry in listed)
        if not nested or any(part.connector is None for part in nested):
            raise InvalidArgumentError(
                f'{_MULTI} takes its parts from "connectors" in its extra configuration: a list '
                'of mappings with a "kv_connector" each'
            )
        return nested


def _mapping(entry: object) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise _wrong_type(f"a part of {_MULTI}", entry, "a mapping")
    return entry


def _one_of(settings: Mapping[str, Any], theirs: str, ours: str) -> Any:
    if theirs in settings and ours in settings:
        raise InvalidArgumentError(f"{theirs} and {ours} are the same setting: give one of them")
    return settings.get(theirs, settings.get(ours))


def _wrong_type(what: str, value: object, expected: str) -> InvalidTypeError:
    return InvalidTypeError(f"{what} is {value!r}, of type {type(value).__name__}, not {expected}")


# ---- expandable segments -------------------------------------------------------------------------

#: The variables that torch reads its allocator's settings from, in torch's order (seen with 2.13,
#: whatever its documentation says of priorities). The first one that is set is the only one that
#: counts, even where it is empty.
ALLOCATOR_VARIABLES: Final = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
_OPTION: Final = "expandable_segments"
_ON: Final = frozenset({"true", "1", "yes", "on"})
_OFF: Final = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True)
class ExpandableSegments:
    """Whether torch's allocator grows its segments by mapping pages.

    Attributes:
        on: True or False; None where the setting has a value that is neither.
        source: Where that was read, for people.
    """

    on: bool | None
    source: str


def _option_of(text: str) -> str | None:
    """The last value of the option in a settings string, in lower case, or None."""
    found = None
    # Options may list values of their own in brackets; none of those is of interest here.
    for option in re.sub(r"\[[^\]]*\]?|\s", "", text).casefold().split(","):
        name, _, value = option.partition(":")
        if name == _OPTION:
            found = value
    return found


def _switch(value: str) -> bool | None:
    return True if value in _ON else False if value in _OFF else None


def _first_set(variables: Mapping[str, object]) -> tuple[str, str] | None:
    for name in ALLOCATOR_VARIABLES:
        text = variables.get(name)
        if isinstance(text, str):
            return name, text
    return None


def expandable_segments(
    environ: Mapping[str, str] | None = None, live: Mapping[str, Any] | None = None
) -> ExpandableSegments:
    """Whether torch's expandable segments are on.

    Spaces and case do not matter, ``true``, ``1``, ``yes`` and ``on`` are the same, an option that
    is repeated counts with its last value, and of `ALLOCATOR_VARIABLES` the first that is set is
    the one that counts.

    Args:
        environ: The variables; None is ``os.environ``.
        live: The settings that the allocator runs with, which overrule the variables:
            ``torch.cuda.memory._snapshot()["allocator_settings"]``. None asks torch where this
            process has started to use CUDA; an empty mapping asks nobody.
    """
    live = _live_settings() if live is None else live
    setting = live.get(_OPTION)
    if setting is not None:
        on = setting if isinstance(setting, bool) else _switch(str(setting).strip().casefold())
        return ExpandableSegments(on, f"the live allocator setting {_OPTION}={setting}")
    found, prefix = _first_set(live), "the live allocator setting "
    if found is None:
        found, prefix = _first_set(os.environ if environ is None else environ), ""
    if found is None:
        return ExpandableSegments(False, "no allocator variable is set")
    name, text = found
    value = _option_of(text)
    on = False if value is None else _switch(value)
    return ExpandableSegments(on, f"{prefix}{name}={text!r}")


def _live_settings() -> Mapping[str, Any]:
    if "torch" not in sys.modules:
        return {}
    from cumempool import _torch

    return _torch.live_settings() if _torch.is_initialized() else {}


# ---- the rules -----------------------------------------------------------------------------------


class MemoryConfig(Protocol):
    """What `verify_kv_transfer_compat` reads of a ``CuMemConfig``."""

    @property
    def enable_sleep_mode(self) -> bool:
        """Whether memory may be put to sleep."""

    @property
    def cumem_allocator_enabled(self) -> bool:
        """Whether pools are in use."""


def verify_kv_transfer_compat(
    config: MemoryConfig,
    kv: KVTransferConfig | None,
    *,
    environ: Mapping[str, str] | None = None,
    live: Mapping[str, Any] | None = None,
    kv_backing: KVBacking = "vmm",
    kv_sleeps: bool | None = None,
    fabric: bool | None = None,
) -> list[str]:
    """Checks that a connector can work on the memory that a program will give it.

    Connectors that copy go with everything. For those that register: torch's expandable segments
    must be off or the pools on, and where the KV cache sleeps, the connector must follow a remap.

    Args:
        config: Whether pools and sleep mode are on.
        kv: The connector. None, or one without a name: nothing to check but `kv_backing`.
        environ: As for `expandable_segments`.
        live: As for `expandable_segments`.
        kv_backing: The backing of the KV cache's tag.
        kv_sleeps: Whether that tag is put to sleep; None = where sleep mode is on.
        fabric: Whether its memory has FABRIC handles (``TagStats.handle_types``,
            ``DeviceProbe.handle_types``); None = not known.

    Returns:
        Warnings, which were also logged; empty where there are none.

    Raises:
        InvalidArgumentError: (a ``ValueError``) A combination that would fail or corrupt
            transfers; the message says why, and how to get out.
    """
    sleeps = config.enable_sleep_mode if kv_sleeps is None else kv_sleeps
    _refuse_contradictions(config, kv_backing, sleeps)
    warnings: list[str] = []
    registering = []
    for connector, known in _resolve(kv):
        if not known:
            warnings.append(_unknown(connector))
        if connector.registers:
            registering.append(connector)
    if registering and not config.cumem_allocator_enabled:
        segments = expandable_segments(environ, live)
        _refuse_expandable_segments(registering, segments)
        if segments.on is None:
            warnings.append(_unclear(registering, segments))
    if sleeps:
        _refuse_remap(registering)
    if config.cumem_allocator_enabled and kv_backing == "vmm":
        warnings.extend(_costs(registering, fabric))
    for text in warnings:
        _logger.warning("%s", text)
    return warnings


def _resolve(kv: KVTransferConfig | None) -> Iterator[tuple[Connector, bool]]:
    """What is known of each connector, with what its configuration changes of it."""
    for part in kv.parts() if kv is not None else ():
        name = str(part.connector).strip()
        found = find_connector(name)
        connector = found or Connector(
            name=name, registers=True, follows_remap=False, transports=()
        )
        if connector.name == "NixlConnector":
            connector = _resolve_nixl(connector, part)
        if part.follows_remap is not None and connector.registers:
            connector = replace(connector, follows_remap=part.follows_remap)
        yield connector, found is not None


def _resolve_nixl(connector: Connector, part: KVTransferConfig) -> Connector:
    if part.buffer_device.strip().casefold() == "cpu":
        return replace(connector, registers=False)
    backends = part.extra.get("backends") or connector.transports
    named = (backends,) if isinstance(backends, str) else tuple(map(str, backends))
    return replace(connector, transports=named)


def _refuse_contradictions(config: MemoryConfig, kv_backing: str, sleeps: bool) -> None:
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


def _refuse_expandable_segments(registering: list[Connector], segments: ExpandableSegments) -> None:
    if registering and segments.on:
        raise InvalidArgumentError(
            f"KV connector {_names(registering)} registers the memory of the KV cache, and "
            f"torch's expandable segments are on ({segments.source}): torch maps other pages "
            "under a registration, and transfers then fail with IBV_WC_REM_ACCESS_ERR; either "
            "switch the cumem allocator on (enable_cumem_allocator=True), whose memory keeps its "
            "pages while it is registered, or switch expandable segments off "
            "(expandable_segments:False)",
            operation="verify",
            advice="enable_cumem_allocator=True, or expandable_segments:False",
        )


def _refuse_remap(registering: list[Connector]) -> None:
    fixed = [connector for connector in registering if not connector.follows_remap]
    if fixed:
        raise InvalidArgumentError(
            f"KV connector {_names(fixed)} cannot follow a remap: its registrations would name "
            "pages that a sleep has given away; switch sleep mode off, keep the KV cache out of "
            "what sleeps (kv_sleeps=False, and name the other tags in sleep()), or, where the "
            "program drops and makes the registrations itself by register_hooks(), say so with "
            "KVTransferConfig(follows_remap=True)",
            operation="verify",
            advice="switch sleep mode off, or keep the KV cache out of what sleeps",
        )


def _unknown(connector: Connector) -> str:
    return (
        f"KV connector {connector.name} is not known here: it is taken to register the memory of "
        "the KV cache, and not to follow a remap unless KVTransferConfig(follows_remap=True) says "
        "so"
    )


def _unclear(registering: list[Connector], segments: ExpandableSegments) -> str:
    return (
        f"cannot tell whether torch's expandable segments are on ({segments.source}); if they "
        f"are, transfers of KV connector {_names(registering)} can fail with "
        "IBV_WC_REM_ACCESS_ERR: give True or False"
    )


def _costs(registering: list[Connector], fabric: bool | None) -> Iterator[str]:
    ipc = [connector for connector in registering if connector.legacy_ipc]
    if ipc:
        yield (
            f"KV connector {_names(ipc)} opens the KV cache by cudaIpcGetMemHandle, which does "
            'not take virtual memory: use backing="cuda_malloc" for its tag (which then cannot '
            "sleep)"
        )
    over_ucx = [connector for connector in registering if "UCX" in connector.transports]
    if over_ucx and not fabric:
        without = "" if fabric is False else "if it has no FABRIC handles, "
        yield (
            f"KV connector {_names(over_ucx)} sends the KV cache over UCX: {without}the UCX of "
            "PyPI wheels reaches virtual memory on the same host by TCP only, at about 0.5 GB/s "
            "where memory of cudaMalloc gets about 300 GB/s; ways out: FABRIC handles (an IMEX "
            'channel), backing="cuda_malloc" for its tag (which then cannot sleep), or an '
            "InfiniBand path with dma-buf or nvidia-peermem"
        )
