"""Has `configure_subprocess`, which programs import from here; nothing is preloaded."""

from __future__ import annotations

from cumempool.compat.torch_memory_saver.standing_in import configure_subprocess

__all__ = ["configure_subprocess"]
