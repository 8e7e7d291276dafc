"""Reads whether this machine lets memory be reserved, pinned and registered."""

from __future__ import annotations

import resource
from pathlib import Path


def _read(path: str) -> str:
    """Returns the text of a file of /proc or /sys; "" if it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def host_room() -> tuple[int, int, str]:
    """Measures the host memory that the kernel leaves this process, as a sleep does.

    Returns:
        The bytes that it can still take, page cache included, or 0 if unknown; the limit that
        leaves so little, of the machine or of a control group from the process's own up to the
        root; the file that names that limit. Without the extension module, 0, 0, "".
    """
    try:
        from cumempool import _core
    except ImportError:  # `doctor` reports it
        return 0, 0, ""
    return _core.host_room()


def host_memory() -> int:
    """Returns the bytes of host memory that this process can still take; 0 if unknown."""
    return host_room()[0]


def transparent_huge_pages() -> str:
    """Returns the kernel's mode: ``"always"``, ``"madvise"`` or ``"never"``; "" if it has none."""
    for word in _read("/sys/kernel/mm/transparent_hugepage/enabled").split():
        if word.startswith("["):
            return word.strip("[]")
    return ""


def address_space_limit() -> int | None:
    """Returns the bytes of addresses that the process may have; None if unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def file_limit() -> int | None:
    """Returns the number of open file descriptors that the process may have; None if unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def map_limit() -> int:
    """Returns the number of mappings that the process may have; 0 if unknown."""
    text = _read("/proc/sys/vm/max_map_count")
    return int(text) if text.isdigit() else 0


def imex_channels() -> tuple[str, ...]:
    """Returns the channels that let this process share memory over multi-node NVLink."""
    folder = Path("/dev/nvidia-caps-imex-channels")
    try:
        return tuple(sorted(channel.name for channel in folder.iterdir()))
    except OSError:
        return ()


def peer_memory_module() -> bool:
    """Returns whether the kernel module nvidia-peermem is loaded."""
    return Path("/sys/module/nvidia_peermem").is_dir()
