"""Finds the files for C and C++ programs: the headers, the library and its CMake package."""

from __future__ import annotations

import sys
from pathlib import Path

from cumempool.errors import UnavailableError

__all__ = ["get_cmake_dir", "get_include", "get_library"]

_ADVICE = "install cumempool with pip, which puts them beside its modules"


def _installed(operation: str, file: str) -> Path:
    """The path of an installed file, named from the package's folder on."""
    # Two folders where the package was installed to be edited.
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
    """The folder to give to a C or C++ compiler with ``-I``; it holds ``cumempool/cumempool.h``.

    Returns:
        An absolute path.

    Raises:
        UnavailableError: The headers are not installed.
    """
    return str(_installed("get_include", "include/cumempool/cumempool.h").parents[1])


def get_library() -> str:
    """The shared library ``libcumempool.so``, to link to or to open.

    It needs neither Python nor torch nor a CUDA toolkit. A program that links to it finds it at run
    time where the library's folder is in the program's run path; CMake sees to that in a build.

    Returns:
        An absolute path.

    Raises:
        UnavailableError: The library is not installed.
    """
    return str(_installed("get_library", "lib/libcumempool.so"))


def get_cmake_dir() -> str:
    """The folder of ``cumempoolConfig.cmake``, to give to CMake with ``-Dcumempool_DIR=``.

    ``find_package(cumempool)`` then finds this installation; its target is
    ``cumempool::cumempool``.

    Returns:
        An absolute path.

    Raises:
        UnavailableError: The CMake package is not installed.
    """
    return str(_installed("get_cmake_dir", "lib/cmake/cumempool/cumempoolConfig.cmake").parent)
