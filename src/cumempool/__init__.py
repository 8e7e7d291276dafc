"""GPU memory in tagged pools that PyTorch can put to sleep and wake at the same address.

Importing this package touches no driver, creates no context and does not import torch; that happens
when an allocator is made or something is probed.
"""

from __future__ import annotations

from cumempool.allocator import CuMemAllocator
from cumempool.backup import Backup
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
from cumempool.guard import HookRegistration, Pin, RegistrableRange
from cumempool.kv_transfer import KVTransferConfig
from cumempool.paths import get_cmake_dir, get_include, get_library
from cumempool.probe import Availability, DeviceProbe, TorchProbe, is_available, probe
from cumempool.report import TagReport, TransitionReport
from cumempool.sharing import Export, SharedLayout, SharedMemory, SharedRange, open_shared
from cumempool.stats import AllocationInfo, Stats, TagStats
from cumempool.waking import WakeHandle

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
    "Export",
    "ForkedError",
    "HookRegistration",
    "InUseError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KVTransferConfig",
    "NotInPoolError",
    "OutOfHostMemoryError",
    "OutOfMemoryError",
    "OutOfSlotsError",
    "Pin",
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
    "get_cmake_dir",
    "get_include",
    "get_library",
    "is_available",
    "open_shared",
    "probe",
]
