"""Facts about the machine that decide whether memory can be reserved, pinned and registered."""

from __future__ import annotations

import resource
from pathlib import Path


def _read(path: str) -> str:
    """The text of a file of /proc or /sys, or "" where there is none that can be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def host_room() -> tuple[int, int, str]:
    """Measures the host memory that the kernel leaves this process, as a sleep does.

    Returns:
        The bytes that it can still take, page cache included; 0 where that cannot be found out. The
        limit that leaves so little: what the machine has, or that of a control group, from the
        process's own up to the root. The file that says so. 0, 0, "" without the extension module.
    """
    try:
        from cumempool import _core
    except ImportError:  # what `doctor` is there to say
        return 0, 0, ""
    return _core.host_room()


def host_memory() -> int:
    """Bytes of host memory that this process can still take; 0 where that cannot be found out."""
    return host_room()[0]


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
