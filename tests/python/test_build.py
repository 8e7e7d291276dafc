"""What is built and installed: exported symbols, public headers, the CMake package, cuda.h."""

from __future__ import annotations

import ctypes
import fnmatch
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = sorted((ROOT / "include" / "cumempool").glob("*.h"))
# The environment's own tools come first, also where it was not activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def run(*command: str | Path) -> str:
    """Runs a command, and shows all of its output where it fails."""
    words = [str(word) for word in command]
    environment = {**os.environ, "PATH": PATH}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(variable: str, *names: str) -> str:
    """The program that an environment variable names, or the first of `names` that there is."""
    there = (shutil.which(name, path=PATH) for name in names)
    found = os.environ.get(variable) or next(filter(None, there), None)
    assert found, f"none of {names} is on the PATH; the build needed it too"
    return found


@pytest.fixture(scope="module")
def prefix() -> Path:
    """The folder of the installed package; `import cumempool` is not needed for what is in it."""
    spec = importlib.util.find_spec("cumempool")
    assert spec is not None
    places = [Path(place) for place in spec.submodule_search_locations or []]
    return next(place for place in places if (place / "lib" / "libcumempool.so").is_file())


@pytest.fixture(scope="module")
def library(prefix: Path) -> Path:
    return prefix / "lib" / "libcumempool.so"


def export_patterns() -> list[str]:
    text = (ROOT / "cpp" / "exports.map").read_text()
    listed = text[text.index("global:") : text.index("local:")]
    return re.findall(r"^\s+(cumempool_\S+);$", listed, flags=re.MULTILINE)


def exported_symbols(library: Path) -> list[str]:
    lines = run(tool("NM", "nm", "llvm-nm"), "-D", "--defined-only", library).splitlines()
    return [line.split()[-1].partition("@")[0] for line in lines]


def test_export_list_is_what_the_header_declares() -> None:
    header = (ROOT / "include" / "cumempool" / "cumempool.h").read_text()
    declared = re.findall(r"^CUMEMPOOL_API[^;(]*?\b(cumempool_\w+)\s*\(", header, re.MULTILINE)
    listed = [name for name in export_patterns() if "*" not in name]
    assert sorted(listed) == sorted(declared)


def test_library_exports_exactly_the_export_list(library: Path) -> None:
    symbols = exported_symbols(library)
    patterns = export_patterns()
    assert [s for s in symbols if not any(fnmatch.fnmatchcase(s, p) for p in patterns)] == []
    assert [p for p in patterns if not fnmatch.filter(symbols, p)] == []


def test_every_slot_is_exported_as_a_pair(library: Path) -> None:
    symbols = set(exported_symbols(library))
    count = ctypes.CDLL(str(library)).cumempool_slot_count()
    assert count > 0
    slots = {s for s in symbols if re.fullmatch(r"cumempool_(malloc|free)_\d+", s)}
    pairs = {f"cumempool_{kind}_{slot}" for kind in ("malloc", "free") for slot in range(count)}
    assert slots == pairs


def test_library_links_neither_cuda_nor_torch_nor_python(library: Path) -> None:
    dynamic = run(tool("READELF", "readelf", "llvm-readelf"), "-d", library)
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    allowed = r"(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux-[\w-]+)\.so(\.\d+)?"
    assert needed
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_library_and_package_have_one_version(library: Path) -> None:
    version = ctypes.CDLL(str(library)).cumempool_version
    version.restype = ctypes.c_char_p
    assert version().decode() == importlib.metadata.version("cumempool")


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.name)
@pytest.mark.parametrize(("language", "standard"), [("c", "c11"), ("c++", "c++17")])
def test_public_header_compiles_alone(
    header: Path, language: str, standard: str, tmp_path: Path
) -> None:
    compiler = tool("CC", "cc", "gcc", "clang") if language == "c" else tool("CXX", "c++", "g++")
    source = tmp_path / "alone.txt"
    source.write_text(f'#include "cumempool/{header.name}"\n')
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wpedantic", "-Werror"]
    include = f"-I{ROOT / 'include'}"
    run(compiler, "-x", language, f"-std={standard}", *warnings, include, "-fsyntax-only", source)


def test_headers_are_installed(prefix: Path) -> None:
    installed = prefix / "include" / "cumempool"
    assert {h.name: h.read_text() for h in HEADERS} == {
        h.name: h.read_text() for h in installed.iterdir()
    }


def test_program_outside_the_project_finds_the_cmake_package(prefix: Path, tmp_path: Path) -> None:
    cmake = tool("CMAKE", "cmake")
    source = ROOT / "tests" / "cmake_package"
    run(cmake, "-S", source, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake, "--build", tmp_path)
    version, freed, same_address, same_contents = run(tmp_path / "sleep_and_wake").split()
    assert version == importlib.metadata.version("cumempool")
    assert int(freed) == 1 << 20
    assert (same_address, same_contents) == ("1", "1")


def test_build_needs_no_cuda_toolkit(tmp_path: Path) -> None:
    cmake = tool("CMAKE", "cmake")
    hidden = "-DCUMEMPOOL_IGNORE_CUDA_TOOLKIT=ON"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run(cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", hidden, python)
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert re.search(r"^CudaHeader_INCLUDE_DIR:PATH=.*/nvidia/[^/]+/include$", cache, re.MULTILINE)
    driver = "CMakeFiles/cumempool_core.dir/cpp/driver/cuda_driver.cpp.o"
    run(cmake, "--build", tmp_path, "--target", driver)
