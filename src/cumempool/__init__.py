"""GPU memory in tagged pools that PyTorch can put to sleep and wake at the same address.

Importing this package touches no driver, creates no context and does not import torch. That happens
when an allocator is made or a probe runs. Most names load at their first use.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from cumempool._version import __version__
from cumempool.config import Above as _Above
from cumempool.config import CuMemConfig
from cumempool.errors import (
    BackupDamagedError,
    BackupError,
    ClosedError,
    CumempoolError,
    DistributedTransitionError,
    DriverError,
    ForkedError,
    InternalError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfHostMemoryError,
    OutOfMemoryError,
    OutOfSlotsError,
    SharingError,
    StreamCaptureError,
    TransitionInProgressError,
    UnavailableError,
    UnknownTagError,
    UnroutedWarning,
    UnsupportedError,
)
from cumempool.probe import Availability, DeviceProbe, TorchProbe, is_available, probe

if TYPE_CHECKING:
    from cumempool._pool.backup import Backup
    from cumempool._pool.events import Event, EventLog
    from cumempool._pool.hooks import HookRegistration, Pin, RegistrableRange
    from cumempool._pool.progress import ProgressRegistration, show_progress
    from cumempool._pool.report import TagReport, TransitionReport, format_bytes
    from cumempool._pool.scope import MemoryPoolScope
    from cumempool._pool.stats import AllocationInfo, Stats, TagStats
    from cumempool._pool.waking import WakeHandle
    from cumempool.allocator import CuMemAllocator
    from cumempool.integrations.kv_transfer import KVTransferConfig
    from cumempool.paths import get_cmake_dir, get_include, get_library
    from cumempool.sharing import Export, SharedLayout, SharedMemory, SharedRange, open_shared

__all__ = [
    "AllocationInfo",
    "Availability",
    "Backup",
    "BackupDamagedError",
    "BackupError",
    "ClosedError",
    "CuMemAllocator",
    "CuMemConfig",
    "CumempoolError",
    "DeviceProbe",
    "DistributedTransitionError",
    "DriverError",
    "Event",
    "EventLog",
    "Export",
    "ForkedError",
    "HookRegistration",
    "InUseError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KVTransferConfig",
    "MemoryPoolScope",
    "NotInPoolError",
    "OutOfHostMemoryError",
    "OutOfMemoryError",
    "OutOfSlotsError",
    "Pin",
    "ProgressRegistration",
    "RegistrableRange",
    "SharedLayout",
    "SharedMemory",
    "SharedRange",
    "SharingError",
    "Stats",
    "StreamCaptureError",
    "TagReport",
    "TagStats",
    "TorchProbe",
    "TransitionInProgressError",
    "TransitionReport",
    "UnavailableError",
    "UnknownTagError",
    "UnroutedWarning",
    "UnsupportedError",
    "WakeHandle",
    "__version__",
    "format_bytes",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "is_available",
    "open_shared",
    "probe",
    "show_progress",
]

#: Public name -> its module.
_HOMES: Final[dict[str, str]] = {
    **dict.fromkeys(("CuMemAllocator",), "allocator"),
    **dict.fromkeys(("Backup",), "_pool.backup"),
    **dict.fromkeys(("Event", "EventLog"), "_pool.events"),
    **dict.fromkeys(("HookRegistration", "Pin", "RegistrableRange"), "_pool.hooks"),
    **dict.fromkeys(("ProgressRegistration", "show_progress"), "_pool.progress"),
    **dict.fromkeys(("TagReport", "TransitionReport", "format_bytes"), "_pool.report"),
    **dict.fromkeys(("MemoryPoolScope",), "_pool.scope"),
    **dict.fromkeys(("AllocationInfo", "Stats", "TagStats"), "_pool.stats"),
    **dict.fromkeys(("WakeHandle",), "_pool.waking"),
    **dict.fromkeys(("KVTransferConfig",), "integrations.kv_transfer"),
    **dict.fromkeys(("get_cmake_dir", "get_include", "get_library"), "paths"),
    **dict.fromkeys(
        ("Export", "SharedLayout", "SharedMemory", "SharedRange", "open_shared"), "sharing"
    ),
}
#: Module name in programs -> its place.
_MODULES: Final[dict[str, str]] = {
    "allocator": "allocator",
    "backup": "_pool.backup",
    "doctor": "tools.doctor",
    "events": "_pool.events",
    "kv_transfer": "integrations.kv_transfer",
    "machine": "tools.machine",
    "nixl": "integrations.nixl",
    "progress": "_pool.progress",
    "prometheus": "integrations.prometheus",
    "report": "_pool.report",
    "scope": "_pool.scope",
    "selftest": "tools.selftest",
    "sharing": "sharing",
    "stats": "_pool.stats",
}


def __getattr__(name: str) -> Any:
    """Loads a name, or a module by its name before it moved (see the changelog)."""
    if name in _HOMES:
        found = getattr(importlib.import_module(f"cumempool.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    if name in _MODULES:
        return importlib.import_module(f"cumempool.{_MODULES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _use_memory_pool(
    config: CuMemConfig, tag: str, policy: dict[str, Any]
) -> AbstractContextManager[object]:
    from cumempool.allocator import CuMemAllocator

    return CuMemAllocator.get_instance(config).use_memory_pool(tag, **policy)


def _verify_kv_transfer(config: CuMemConfig, kv: Any, facts: dict[str, Any]) -> list[str]:
    from cumempool.integrations.kv_transfer import verify_kv_transfer_compat

    return verify_kv_transfer_compat(config, kv, **facts)


_Above.of_package = _Above(probe, _use_memory_pool, _verify_kv_transfer)
