"""Checks this machine, and gives the reason and the fix for each problem."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, Literal

from cumempool._pool.report import format_bytes
from cumempool._version import __version__
from cumempool.config import CuMemConfig, DriverName
from cumempool.errors import CumempoolError
from cumempool.integrations import nixl
from cumempool.integrations.kv_transfer import expandable_segments
from cumempool.probe import Availability, DeviceProbe, probe
from cumempool.tools import machine

if TYPE_CHECKING:
    from cumempool.allocator import CuMemAllocator

Status = Literal["PASS", "WARN", "FAIL"]

_TRIAL_BYTES: Final = 64 * 1024**2
_LEAST_FILES: Final = 1024
_LEAST_MAPPINGS: Final = 65530  # the default of the kernel


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: The subject of the check.
        status: ``"PASS"``; ``"WARN"``: works, but slower or with less; ``"FAIL"``: does not work.
        value: The finding.
        reason: The problem, or ``""``.
        fix: The way to solve it, or ``""``.
    """

    name: str
    status: Status
    value: str
    reason: str = ""
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """Returns all fields as types that ``json.dumps`` takes."""
        return asdict(self)


def passed(checks: list[Check]) -> bool:
    """Returns whether no check failed."""
    return all(check.status != "FAIL" for check in checks)


def examine(driver: DriverName = "cuda", environ: Mapping[str, str] | None = None) -> list[Check]:
    """Checks the installation, the driver, every device, torch and the host.

    Starts CUDA in torch, since nothing else can try its routing: call it in a separate process.
    """
    environ = os.environ if environ is None else environ
    _start_cuda(driver)
    found = probe(driver=driver)
    checks = [_package(found), _torch_build(found), _driver(found)]
    checks += [check for device in found.devices for check in _device(device, found.driver)]
    if found.ok or found.torch.routes is False:  # the probe is not ok without routing
        checks.append(_routing(found))
    if found.ok:
        checks.append(_round_trip(found))
    checks += [_caching(environ), _expandable(environ), _host_memory(found)]
    checks += [_huge_pages(), _address_space(), _mappings(), _files(), _nixl()]
    return checks


def _start_cuda(driver: DriverName) -> None:
    """Makes torch start CUDA if it can; the probe finds the reason if it cannot."""
    if driver != "cuda" or find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()


# ---- installation --------------------------------------------------------------------------------


def _package(found: Availability) -> Check:
    value = f"cumempool {__version__}, Python {sys.version.split()[0]}"
    if find_spec("cumempool._core") is not None:
        return Check("package", "PASS", value)
    return Check("package", "FAIL", value, found.reason, found.hint)


def _torch_build(found: Availability) -> Check:
    torch = found.torch
    value = f"torch {torch.version or '-'}, build {torch.build}"
    if torch.build == "cuda" or (found.driver == "host" and torch.build != "none"):
        return Check("torch", "PASS", value)
    if torch.build == "none":
        return Check("torch", "FAIL", value, torch.reason, "install torch 2.6 or newer")
    return Check(
        "torch",
        "FAIL",
        value,
        f"it is built for {torch.build}: its tensors cannot be on a GPU of this library",
        "install a CUDA build of torch (https://pytorch.org/get-started/locally)",
    )


def _driver(found: Availability) -> Check:
    name = f"driver {found.driver}"
    if found.devices:
        count = len(found.devices)
        version = f"CUDA {found.driver_version}, " if found.driver_version else ""
        return Check(name, "PASS", f"{version}{count} device{'' if count == 1 else 's'}")
    return Check(name, "FAIL", "not available", found.reason, found.hint)


# ---- devices -------------------------------------------------------------------------------------


def _device(device: DeviceProbe, driver: str) -> Iterator[Check]:
    name = f"device {device.ordinal}"
    if not device.usable:
        yield Check(
            name,
            "FAIL",
            device.name or "unknown",
            device.reason,
            "free device memory, or use a GPU and driver with virtual memory management",
        )
        return
    yield Check(
        name,
        "PASS",
        f"{device.name}, compute capability {device.compute_capability}, "
        f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}, "
        f"granularity {format_bytes(device.granularity)}",
    )
    yield _fence(device, name)
    yield _handles(device, name)
    if driver == "cuda":
        yield _rdma(device, name)


def _fence(device: DeviceProbe, name: str) -> Check:
    value = f"{device.fence}, host memory {'pinned' if device.pins_host_memory else 'not pinned'}"
    if not device.pins_host_memory:
        return Check(
            f"{name}: fence",
            "WARN",
            value,
            "the driver pins no host memory (confidential computing?): no pinned backups",
            'use backup="pageable" or a file, or discard; clean sleeps copy everything',
        )
    if device.fence == "context synchronisation":
        return Check(
            f"{name}: fence",
            "WARN",
            value,
            "sleeping and freeing are refused while a stream captures",
            "put to sleep and free outside of captures",
        )
    return Check(f"{name}: fence", "PASS", value)


def _handles(device: DeviceProbe, name: str) -> Check:
    value = ", ".join(device.handle_types) or "none"
    if not device.handle_types:
        return Check(
            f"{name}: sharing",
            "WARN",
            value,
            "memory cannot be shared with other processes",
            "use a driver that exports POSIX file descriptors; sleep and wake work as they are",
        )
    if "fabric" in device.handle_types_claimed and "fabric" not in device.handle_types:
        if machine.imex_channels():
            return Check(
                f"{name}: sharing",
                "WARN",
                value,
                "there are IMEX channels, but memory with fabric handles was refused",
                "check nvidia-imex and the rights on /dev/nvidia-caps-imex-channels",
            )
        # Most devices claim it; without a channel none can use it.
        value += " (no fabric handles: no IMEX channel)"
    return Check(f"{name}: sharing", "PASS", value)


def _rdma(device: DeviceProbe, name: str) -> Check:
    module = "loaded" if machine.peer_memory_module() else "not loaded"
    value = f"{'yes' if device.rdma else 'no'}, nvidia-peermem {module}"
    if device.rdma or not device.rdma_claimed:
        return Check(f"{name}: GPUDirect RDMA", "PASS", value)
    return Check(
        f"{name}: GPUDirect RDMA",
        "WARN",
        value,
        "the device says that it can, but such memory was refused: network cards that write to "
        "GPU memory directly may fail",
        "update the NVIDIA driver; without such a network card this does not matter",
    )


# ---- torch and the pools -------------------------------------------------------------------------


def _routing(found: Availability) -> Check:
    if found.driver == "host":
        return Check("routing", "PASS", "none: on the host driver tensors are asked for by empty()")
    if found.torch.routes:
        return Check("routing", "PASS", "torch sends allocations of a scope to the pool")
    return Check(
        "routing",
        "FAIL",
        "not tried" if found.torch.routes is None else "no",
        found.torch.reason,
        "use torch 2.6 or newer with its native allocator backend",
    )


def _round_trip(found: Availability) -> Check:
    """Checks two sleeps and wakes of memory with contents; the second tries dirty tracking too."""
    from cumempool.allocator import CuMemAllocator

    name = "sleep and wake"
    try:
        allocator = CuMemAllocator(CuMemConfig(driver="host" if found.driver == "host" else "cuda"))
        try:
            return replace(_try_cycles(allocator), name=name)
        finally:
            allocator.close(force=True)
    except CumempoolError as error:
        return Check(name, "FAIL", "failed", str(error), error.advice)


def _try_cycles(allocator: CuMemAllocator) -> Check:
    import torch

    tensor = allocator.empty(_TRIAL_BYTES // 8, dtype=torch.int64, tag="doctor")
    torch.arange(tensor.numel(), out=tensor)
    expected = tensor.cpu().clone()
    allocator.sleep(tags="doctor")
    first = allocator.wake_up()
    slept = allocator.sleep(tags="doctor")
    allocator.wake_up()
    value = f"{format_bytes(_TRIAL_BYTES)} equal, wake {first.gb_per_s:.1f} GB/s"
    if not torch.equal(tensor.cpu(), expected):
        return Check(
            "",
            "FAIL",
            "contents differ",
            "memory did not come back as it was",
            "do not use this machine; run cumempool selftest, and report its output",
        )
    if slept.problems or slept.bytes_clean != _TRIAL_BYTES:
        return Check(
            "",
            "WARN",
            value,
            "; ".join(slept.problems) or "unchanged contents were copied again",
            "unchanged contents are copied at each sleep; update the NVIDIA driver",
        )
    return Check("", "PASS", f"{value}, unchanged contents are not copied again")


def _caching(environ: Mapping[str, str]) -> Check:
    for variable in ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_HIP_MEMORY_CACHING"):
        if environ.get(variable, ""):
            return Check(
                "torch's cache",
                "FAIL",
                f"{variable}={environ[variable]}",
                "without its cache torch sends no allocation to a pool",
                f"unset {variable}",
            )
    return Check("torch's cache", "PASS", "on")


def _expandable(environ: Mapping[str, str]) -> Check:
    setting = expandable_segments(environ)
    if not setting.on:
        return Check("expandable segments", "PASS", "off")
    return Check(
        "expandable segments",
        "WARN",
        f"on, by {setting.source}",
        "memory outside of pools is remapped while it is registered, and RDMA on it fails "
        "(IBV_WC_REM_ACCESS_ERR); pools are kept out of it",
        "allocate registered memory inside a pool, or switch them off",
    )


# ---- host ----------------------------------------------------------------------------------------


def _host_memory(found: Availability) -> Check:
    available, limit, source = machine.host_room()
    # Backups seldom need more than half of a device: KV caches are discarded.
    needed = max((device.total_bytes // 2 for device in found.devices), default=0)
    value = f"{format_bytes(available)} of {format_bytes(limit)} available ({source or 'unknown'})"
    if found.driver == "host" or available >= needed:
        return Check("host memory", "PASS", value)
    return Check(
        "host memory",
        "WARN",
        value,
        f"half of a device is {format_bytes(needed)}: a backup of that has no room",
        "discard contents that can be loaded again, or set host_backup_overflow to a file",
    )


def _huge_pages() -> Check:
    mode = machine.transparent_huge_pages()
    if mode in ("always", "madvise"):
        return Check("huge pages", "PASS", mode)
    return Check(
        "huge pages",
        "WARN",
        mode or "none",
        "pinning memory for the first backup takes several times as long",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )


def _address_space() -> Check:
    limit = machine.address_space_limit()
    if limit is None:
        return Check("address space", "PASS", "unlimited")
    return Check(
        "address space",
        "FAIL",
        f"limited to {format_bytes(limit)}",
        "reservations for device and host memory take addresses, not memory, and do not fit",
        "ulimit -v unlimited",
    )


def _mappings() -> Check:
    limit = machine.map_limit()
    if limit == 0 or limit >= _LEAST_MAPPINGS:
        return Check("mappings", "PASS", str(limit or "unknown"))
    return Check(
        "mappings",
        "WARN",
        str(limit),
        "many allocations need many mappings",
        f"sysctl vm.max_map_count={_LEAST_MAPPINGS}",
    )


def _files() -> Check:
    limit = machine.file_limit()
    if limit is None or limit >= _LEAST_FILES:
        return Check("open files", "PASS", "unlimited" if limit is None else str(limit))
    return Check(
        "open files",
        "WARN",
        str(limit),
        "sharing takes a descriptor for each allocation while it is handed over",
        f"ulimit -n {_LEAST_FILES}",
    )


def _nixl() -> Check:
    return Check("NIXL", "PASS", "installed" if nixl.is_installed() else "not installed")
