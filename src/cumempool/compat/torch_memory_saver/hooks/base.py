"""The names of the hook modes."""

from __future__ import annotations

from cumempool.compat.torch_memory_saver.entrypoint import HookMode

__all__ = ["HookMode"]
