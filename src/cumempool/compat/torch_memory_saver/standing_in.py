"""Puts cumempool's module under the name ``torch_memory_saver``, here and in child processes."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cumempool._locks import fork_safe_lock
from cumempool.compat.torch_memory_saver.utils import change_env
from cumempool.errors import InUseError

_NAME: Final = "torch_memory_saver"
_OURS: Final = "cumempool.compat.torch_memory_saver"
#: Names that can be imported from the package as ``torch_memory_saver``.
_MODULES: Final = (
    "",
    ".entrypoint",
    ".hooks",
    ".hooks.base",
    ".hooks.mode_preload",
    ".testing_utils",
    ".utils",
)
_lock = fork_safe_lock()


def folder_for_path() -> str:
    """Returns the folder that, on ``PYTHONPATH``, makes a process import this module instead.

    It holds one file only. Use it for programs whose code cannot be changed.
    """
    return str(Path(__file__).resolve().parents[1] / "on_path")


def install() -> None:
    """Makes ``import torch_memory_saver`` return this module, from now on, in the whole process.

    Processes that `multiprocessing` starts by ``spawn`` or ``forkserver`` get it too, since they
    copy ``sys.path``; for others see `configure_subprocess`. A second call has no effect.

    Raises:
        InUseError: The real torch_memory_saver was imported already; nothing has changed.
    """
    ours = importlib.import_module(_OURS)
    modules = {_NAME + name: importlib.import_module(_OURS + name) for name in _MODULES}
    with _lock:
        loaded = sys.modules.get(_NAME)
        if loaded is not None and loaded is not ours and not _is_on_its_way(loaded):
            raise InUseError(
                "torch_memory_saver has been imported from "
                f"{getattr(loaded, '__file__', 'somewhere')} already; code that has imported "
                "it goes on using it",
                operation="install",
                advice="call install() before anything imports torch_memory_saver",
            )
        sys.modules.update(modules)
        folder = folder_for_path()
        if folder not in sys.path:
            sys.path.insert(0, folder)


def uninstall() -> None:
    """Undoes `install`; without one it does nothing.

    Code that has imported this module as ``torch_memory_saver`` goes on using it.
    """
    ours = importlib.import_module(_OURS)
    with _lock:
        if sys.modules.get(_NAME) is not ours:
            return
        for module in _MODULES:
            sys.modules.pop(_NAME + module, None)
        with contextlib.suppress(ValueError):
            sys.path.remove(folder_for_path())


def _is_on_its_way(loaded: object) -> bool:
    """Returns whether a module is the file in `folder_for_path`, which is calling `install` now."""
    file = getattr(loaded, "__file__", None)
    return file is not None and str(Path(file).resolve().parent) == folder_for_path()


@contextlib.contextmanager
def configure_subprocess() -> Iterator[None]:
    """Makes processes started in the body import this module as ``torch_memory_saver``.

    It puts `folder_for_path` in front of ``PYTHONPATH``, so any way to start them works. It
    preloads nothing.
    """
    before = os.environ.get("PYTHONPATH")
    with change_env("PYTHONPATH", os.pathsep.join([folder_for_path(), *filter(None, [before])])):
        yield
