"""What is inside a wheel and an sdist; scripts/package_contents.py finds what is not right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def contents() -> ModuleType:
    """The module scripts/package_contents.py."""
    path = ROOT / "scripts" / "package_contents.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packages_are_to_have_what_users_need_and_nothing_else(contents: ModuleType) -> None:
    wheel, sdist = contents.expected_wheel(ROOT), contents.expected_sdist(ROOT)
    assert wheel >= {
        "cumempool/__init__.py",
        "cumempool/_core.pyi",
        "cumempool/_core.so",
        "cumempool/py.typed",
        "cumempool/compat/on_path/torch_memory_saver.py",
        "cumempool/compat/torch_memory_saver/hooks/base.py",
        "cumempool/include/cumempool/cumempool.h",
        "cumempool/lib/libcumempool.so",
        "cumempool/lib/cmake/cumempool/cumempoolConfig.cmake",
        "dist-info/licenses/LICENSE",
    }
    assert sdist >= {"LICENSE", "pyproject.toml", "CMakeLists.txt", "examples/cpp/sleep_wake.cpp"}
    unwanted = re.compile(r"(^|/)(tests|benchmarks|build|\.[^/]*|__pycache__)(/|$)|\.py[co]$")
    assert [name for name in wheel | sdist if unwanted.search(name)] == []


def test_the_installed_package_has_what_a_wheel_is_to_have(contents: ModuleType) -> None:
    record = [str(path) for path in importlib.metadata.files("cumempool") or []]
    if "cumempool/__init__.py" not in record:
        pytest.skip("installed to be edited: its modules are those of the source tree")
    by_pip = re.compile(r"\.\./|.*__pycache__/|[^/]+\.dist-info/(INSTALLER|REQUESTED|\w+\.json)")
    found = [contents.plain(path) for path in record if not by_pip.match(path)]
    installed = Path("what pip installed")
    assert contents.differences(installed, found, contents.expected_wheel(ROOT)) == []


def make_packages(contents: ModuleType, folder: Path, leave_out: str, add: str) -> list[Path]:
    """A wheel and an sdist with empty files, but for one file too few and one too many."""
    wheel, sdist = folder / "cumempool-1-x.whl", folder / "cumempool-1.tar.gz"

    def names(expected: Iterable[str]) -> list[str]:
        return sorted({*expected, add} - {leave_out, ""})

    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names(contents.expected_wheel(ROOT)):
            path = name.replace("dist-info/", "cumempool-1.dist-info/")
            archive.writestr(path.replace("_core.so", "_core.cpython-3-x.so"), "")
    with tarfile.open(sdist, "w:gz") as archive_of_sources:
        for name in names(contents.expected_sdist(ROOT)):
            archive_of_sources.addfile(tarfile.TarInfo(f"cumempool-1/{name}"))
    return [wheel, sdist]


@pytest.mark.parametrize(
    ("leave_out", "add", "problem"),
    [
        ("", "", ""),
        ("LICENSE", "", "cumempool-1.tar.gz lacks LICENSE"),
        ("cumempool/py.typed", "", "cumempool-1-x.whl lacks cumempool/py.typed"),
        ("cumempool/_core.so", "", "cumempool-1-x.whl lacks cumempool/_core.so"),
        ("", "cumempool/compat/a.pyc", "cumempool-1-x.whl has cumempool/compat/a.pyc"),
        ("", "tests/python/test_a.py", "cumempool-1.tar.gz has tests/python/test_a.py"),
        ("", ".ci/run", "cumempool-1-x.whl has .ci/run"),
    ],
)
def test_a_file_too_many_or_too_few_is_caught(
    contents: ModuleType, tmp_path: Path, leave_out: str, add: str, problem: str
) -> None:
    packages = make_packages(contents, tmp_path, leave_out, add)
    check = [sys.executable, ROOT / "scripts" / "package_contents.py", *packages]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if problem else 0)
    assert problem in done.stderr.splitlines() or not problem
