"""Touches the machine's memory before anything is timed, and measures how much is left."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import torch


def available_bytes() -> int | None:
    """Returns the bytes that programs can still get without swapping; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def touch(size: int) -> None:
    """Makes a virtual machine that grows on first use get its memory, and gives it all back.

    All threads of torch touch it, in huge pages.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: small pages take longer
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE]
    pages.fill_(1)
    del pages
    memory.close()
