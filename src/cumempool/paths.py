"""Finds the files for C and C++ programs: the headers, the library and its CMake package."""

from __future__ import annotations

import sys
from pathlib import Path

from cumempool.errors import UnavailableError

__all__ = ["get_cmake_dir", "get_include", "get_library"]

_ADVICE = "install cumempool with pip, which puts them beside its modules"


def _installed(operation: str, file: str) -> Path:
    """Returns the path of an installed file, given relative to the package's folder."""
    # An editable installation has two folders.
    for folder in sys.modules[__package__].__path__:
        path = Path(folder).resolve() / file
        if path.is_file():
            return path
    raise UnavailableError(
        f"{operation}: there is no {file} beside the modules of cumempool; {_ADVICE}",
        operation=operation,
        advice=_ADVICE,
    )


def get_include() -> str:
    """Returns the ``-I`` folder for a C or C++ compiler; it holds ``cumempool/cumempool.h``.

    Returns:
        An absolute path.

    Raises:
        UnavailableError: The headers are not installed.
    """
    return str(_installed("get_include", "include/cumempool/cumempool.h").parents[1])


def get_library() -> str:
    """Returns the shared library ``libcumempool.so``, to link to or to open.

    It needs neither Python nor torch nor a CUDA toolkit. A program that links to it finds it at run
    time if the program's run path has the library's folder; CMake sets that in a build.

    Returns:
        An absolute path.

    Raises:
        UnavailableError: The library is not installed.
    """
    return str(_installed("get_library", "lib/libcumempool.so"))


def get_cmake_dir() -> str:
    """Returns the folder of ``cumempoolConfig.cmake``, for CMake's ``-Dcumempool_DIR=``.

    ``find_package(cumempool)`` then finds this installation; its target is
    ``cumempool::cumempool``.

    Returns:
        An absolute path.

    Raises:
        UnavailableError: The CMake package is not installed.
    """
    return str(_installed("get_cmake_dir", "lib/cmake/cumempool/cumempoolConfig.cmake").parent)
