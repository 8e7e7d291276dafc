"""GPU memory in tagged pools that PyTorch can put to sleep and wake at the same address.

Importing this package touches no driver, creates no context and does not import torch; that happens
when an allocator is made or something is probed.
"""

from __future__ import annotations

import importlib
import types

from cumempool._pool.backup import Backup
from cumempool._pool.events import Event, EventLog
from cumempool._pool.hooks import HookRegistration, Pin, RegistrableRange
from cumempool._pool.progress import ProgressRegistration, show_progress
from cumempool._pool.report import TagReport, TransitionReport, format_bytes
from cumempool._pool.scope import MemoryPoolScope
from cumempool._pool.stats import AllocationInfo, Stats, TagStats
from cumempool._pool.waking import WakeHandle
from cumempool.allocator import CuMemAllocator
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
from cumempool.integrations.kv_transfer import KVTransferConfig
from cumempool.paths import get_cmake_dir, get_include, get_library
from cumempool.probe import Availability, DeviceProbe, TorchProbe, is_available, probe
from cumempool.sharing import Export, SharedLayout, SharedMemory, SharedRange, open_shared

__version__ = "0.1.0"

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

_MOVED = {
    "events": "_pool.events",
    "kv_transfer": "integrations.kv_transfer",
    "nixl": "integrations.nixl",
    "progress": "_pool.progress",
    "prometheus": "integrations.prometheus",
    "report": "_pool.report",
    "scope": "_pool.scope",
}


def __getattr__(name: str) -> types.ModuleType:
    """Modules under the names that they had before they moved, see the changelog."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"cumempool.{_MOVED[name]}")
