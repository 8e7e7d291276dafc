"""Offers the surface of torch_memory_saver 0.0.10 over `CuMemAllocator`; `install` takes its name.

See docs/migrating-from-torch-memory-saver.md.
"""

from __future__ import annotations

from cumempool.compat.torch_memory_saver.entrypoint import TorchMemorySaver
from cumempool.compat.torch_memory_saver.standing_in import (
    configure_subprocess,
    folder_for_path,
    install,
    uninstall,
)

__all__ = [
    "TorchMemorySaver",
    "configure_subprocess",
    "folder_for_path",
    "install",
    "torch_memory_saver",
    "uninstall",
]

torch_memory_saver = TorchMemorySaver()
"""The instance that programs use; it makes its allocator at the first use."""
