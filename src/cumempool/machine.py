"""Facts about the machine that decide whether memory can be reserved, pinned and registered."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "address_space_limit",
    "file_limit",
    "host_memory",
    "imex_channels",
    "map_limit",
    "peer_memory_module",
    "transparent_huge_pages",
]


def _read(path: str) -> str:
    """The text of a file of /proc or /sys, or "" where there is none that can be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cgroup_limits() -> Iterator[int]:
    """Bytes of memory that control groups leave to this process, for both versions of them."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        most, now = _read(limit), _read(used)
        if most.isdigit() and now.isdigit():
            yield max(int(most) - int(now), 0)


def host_memory() -> int:
    """Bytes of host memory that this process can still take; 0 where that cannot be found out."""
    available = 0
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            available = int(rest.split()[0]) * 1024
    return min([available, *_cgroup_limits()])


def transparent_huge_pages() -> str:
    """The kernel's mode: ``"always"``, ``"madvise"`` or ``"never"``; "" where it has none."""
    for word in _read("/sys/kernel/mm/transparent_hugepage/enabled").split():
        if word.startswith("["):
            return word.strip("[]")
    return ""


def address_space_limit() -> int | None:
    """Bytes of addresses that the process may have; None: as many as it likes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def file_limit() -> int | None:
    """File descriptors that the process may have open; None: as many as it likes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def map_limit() -> int:
    """Mappings that the process may have; 0 where that cannot be found out."""
    text = _read("/proc/sys/vm/max_map_count")
    return int(text) if text.isdigit() else 0


def imex_channels() -> tuple[str, ...]:
    """Channels that let this process share memory over multi-node NVLink."""
    folder = Path("/dev/nvidia-caps-imex-channels")
    try:
        return tuple(sorted(channel.name for channel in folder.iterdir()))
    except OSError:
        return ()


def peer_memory_module() -> bool:
    """Whether the kernel module nvidia-peermem is loaded."""
    return Path("/sys/module/nvidia_peermem").is_dir()
