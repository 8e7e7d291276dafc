"""Offers the part of ``torch_memory_saver.utils`` that programs import."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NoReturn

from cumempool.errors import UnsupportedError

__all__ = ["change_env", "get_binary_path_from_package", "is_xpu"]


def is_xpu() -> bool:
    """Returns False: cumempool is for NVIDIA GPUs."""
    return False


def get_binary_path_from_package(stem: str) -> NoReturn:
    """Raises: cumempool has no library to preload.

    Args:
        stem: The name of the library.

    Raises:
        UnsupportedError: Always; the message gives the alternative.
    """
    raise UnsupportedError(
        f"there is no library {stem!r} to preload: cumempool routes torch's allocations in the "
        "process, without LD_PRELOAD; allocate inside region(), with all_threads=True if other "
        "threads allocate too",
        operation="get_binary_path_from_package",
        advice="allocate inside region() instead",
    )


@contextlib.contextmanager
def change_env(key: str, value: str) -> Iterator[None]:
    """Sets an environment variable of this process in the body, and restores it after.

    Args:
        key: The variable.
        value: Its value in the body.
    """
    before = os.environ.get(key)
    os.environ[key] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = before
