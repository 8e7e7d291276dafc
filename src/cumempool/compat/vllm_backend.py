"""Defines the sleep-mode backend ``cumempool`` for vLLM's ``SleepModeBackendFactory``.

Only this module imports vLLM at its own import; vLLM imports it when the backend is selected.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from vllm.device_allocator.sleep_mode_backend import (  # type: ignore[import-not-found]
    SleepModeBackend,
)

from cumempool.compat import vllm
from cumempool.compat.vllm_install import MODULE, refuse_own_memory
from cumempool.compat.vllm_memory import check_tags
from cumempool.errors import InvalidArgumentError

__all__ = ["CumempoolBackend"]

#: Tags that every level keeps: state of the running engine, and memory of captured graphs.
_KEPT: Final = ("runtime", vllm.CUDAGRAPH_TAG)


class CumempoolBackend(SleepModeBackend):  # type: ignore[misc]
    """Puts memory that vLLM has allocated through `cumempool.compat.vllm` to sleep.

    A failed call changes neither the memory nor the state, and can be repeated.

    Args:
        suspend_tags: The tags that every `suspend` keeps, at any level. None means the level's
            tags. (Memory of the running engine and of graphs is always kept.)
        **options: None exist; see ``sleep_mode_backend_options`` of vLLM.

    Raises:
        InvalidArgumentError: (a ``ValueError``) An option that does not exist.
        InvalidTypeError: `suspend_tags` is no tag or sequence of tags.
    """

    def __init__(self, suspend_tags: Sequence[str] | str | None = None, **options: Any) -> None:
        if options:
            raise InvalidArgumentError(
                f"the sleep-mode backend {vllm.BACKEND!r} has no options {sorted(options)}; there "
                "is suspend_tags"
            )
        super().__init__()
        self.suspend_tags = (
            None if suspend_tags is None else check_tags(suspend_tags, "suspend_tags")
        )

    def suspend(self, level: int = 1, tags: Sequence[str] | str | None = None) -> None:
        """Gives the device memory back.

        Args:
            level: 1 keeps the weights; 2 discards them, and vLLM loads them again after `resume`.
            tags: The tags to keep, instead of the level's tags and ``suspend_tags``.

        Raises:
            InvalidArgumentError: Another level.
            InvalidTypeError: `tags` is no tag or sequence of tags.
            InUseError: vLLM's own allocator holds the memory, since this one was not installed.
            CumempoolError: As `cumempool.compat.vllm.CuMemAllocator.sleep`.
        """
        if level not in (1, 2):
            raise InvalidArgumentError(f"sleep: there are the levels 1 and 2, not {level!r}")
        chosen: tuple[str, ...] = ("weights",) if level == 1 else ()
        if tags is not None:
            chosen = check_tags(tags, "tags")
        elif self.suspend_tags is not None:
            chosen = self.suspend_tags
        _allocator("sleep").sleep((*chosen, *_KEPT))
        self._state = "SUSPENDED"

    def resume(self, tags: list[str] | None = None) -> None:
        """Maps the memory again and restores its backups.

        Args:
            tags: The tags to wake among ``"weights"`` and ``"kv_cache"``; all others always wake.
                None wakes all.

        Raises:
            OutOfMemoryError: (a ``RuntimeError``) The device has no room.
            CumempoolError: As `cumempool.compat.vllm.CuMemAllocator.wake_up`.
        """
        before, self._state = self._state, "RESUMING"
        try:
            _allocator("wake_up").wake_up(tags)
        except BaseException:
            self._state = before
            raise
        self._state = "RUNNING"

    def discard(self, tags: tuple[str, ...]) -> None:
        """Gives the memory of some tags back without keeping its contents.

        Raises:
            InUseError: As `suspend`.
            CumempoolError: As `cumempool.compat.vllm.CuMemAllocator.discard`.
        """
        _allocator("discard").discard(tags)
        self._state = "SUSPENDED"

    @classmethod
    def is_supported(cls) -> bool:
        """Returns whether the library and a driver can be loaded here."""
        return vllm.cumem_available

    @classmethod
    def preserves_communicators(cls) -> bool:
        """Returns True: memory outside the pools is not touched."""
        return True

    @classmethod
    def preserves_nccl(cls) -> bool:
        """Returns `preserves_communicators`, under the name in other versions of vLLM."""
        return True

    @classmethod
    def supports_selective_offload(cls) -> bool:
        """Returns True: `suspend` and `resume` take tags."""
        return True


def _allocator(operation: str) -> vllm.CuMemAllocator:
    refuse_own_memory(operation, sys.modules.get(MODULE), vllm)
    return vllm.CuMemAllocator.get_instance()
