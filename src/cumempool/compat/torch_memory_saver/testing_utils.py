"""Measures memory for the examples of torch_memory_saver, under its module name."""

from __future__ import annotations

import sys

from cumempool._pool.report import format_bytes
from cumempool.compat.torch_memory_saver.utils import is_xpu

__all__ = ["empty_cache", "get_and_print_gpu_memory", "get_device", "is_xpu"]


def get_device() -> str:
    """Returns ``"cuda"``, the device of pausable tensors."""
    return "cuda"


def empty_cache() -> None:
    """Gives back memory that torch has cached and no tensor uses."""
    import torch

    torch.cuda.empty_cache()


def get_and_print_gpu_memory(message: str, gpu_id: int = 0) -> int:
    """Writes a line about the memory of a GPU to standard output.

    The figure is the driver's (``cudaMemGetInfo``), over all processes on the GPU. The call creates
    a context on the GPU if there is none.

    Args:
        message: A text to print beside the figure.
        gpu_id: The ordinal of the GPU.

    Returns:
        Bytes in use.
    """
    import torch

    free, total = torch.cuda.mem_get_info(gpu_id)
    used = int(total - free)
    sys.stdout.write(f"GPU {gpu_id}: {format_bytes(used)} in use ({message})\n")
    return used
