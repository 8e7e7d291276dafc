"""What torch holds of device memory, and giving back what it does not use."""

from __future__ import annotations

import logging

_logger = logging.getLogger("cumempool")


def reserved_bytes() -> int:
    """What torch has reserved on all devices, pools included."""
    import torch

    if not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(d) for d in range(torch.cuda.device_count()))


def empty_cache() -> None:
    """Has torch give back what it has cached, unless somebody captures a graph."""
    import torch

    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        # torch before 2.9 refuses while somebody captures a graph. What is unused stays cached.
        _logger.debug("torch refused to empty its cache")
