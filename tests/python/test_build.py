"""What is built and installed for C and C++: symbols, headers, CMake package, example, cuda.h."""

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
from refusals import refuses

import cumempool

ROOT = Path(__file__).resolve().parents[2]
HEADERS = sorted((ROOT / "include" / "cumempool").glob("*.h"))
EXAMPLE = ROOT / "examples" / "cpp"
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


# ---- paths for C and C++ programs


def test_the_paths_lead_to_what_is_installed(prefix: Path) -> None:
    places = [cumempool.get_include(), cumempool.get_library(), cumempool.get_cmake_dir()]
    inside = ["include", "lib/libcumempool.so", "lib/cmake/cumempool"]
    assert [Path(place) for place in places] == [prefix.resolve() / path for path in inside]
    assert (Path(cumempool.get_include()) / "cumempool" / "cumempool.h").is_file()
    assert (Path(cumempool.get_cmake_dir()) / "cumempoolConfig.cmake").is_file()


@pytest.mark.parametrize("name", ["get_include", "get_library", "get_cmake_dir"])
def test_what_is_not_installed_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cumempool, "__path__", [str(tmp_path)])
    with refuses(cumempool.UnavailableError, operation=name, names="install cumempool"):
        getattr(cumempool, name)()


# ---- the C++ example


def assert_example_works(program: Path) -> None:
    lines = run(program, "host").splitlines()
    assert lines[0] == f"cumempool {importlib.metadata.version('cumempool')}, driver host"
    assert [line for line in lines if line.startswith("proven: ")] == [
        "proven: awake, both tags hold memory",
        "proven: asleep, they hold none of the device's memory",
        "proven: awake again, at the same addresses in new physical memory",
        "proven: the weights are equal bit for bit",
        "proven: the cache is zero",
    ]


def test_the_cpp_example_is_built_as_the_readme_says(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (commands,) = re.findall(r"^```text\n(cmake -S examples/cpp .*?)^```$", readme, re.M | re.S)
    shutil.copytree(EXAMPLE, tmp_path / "examples" / "cpp")
    said = run("bash", "-euo", "pipefail", "-c", f"cd {tmp_path}\n{commands}")
    assert "proven: the weights are equal bit for bit\n" in said
    assert_example_works(tmp_path / "build" / "example" / "sleep_wake")


def compile_example(source: Path, program: Path) -> Path:
    library = Path(cumempool.get_library())
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wpedantic", "-Werror"]
    places = [f"-I{cumempool.get_include()}", library, f"-Wl,-rpath,{library.parent}"]
    run(tool("CXX", "c++", "g++"), *flags, source, *places, "-o", program)
    return program


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as a compiler alone makes it, from the paths that the package gives."""
    program = tmp_path_factory.mktemp("example") / "sleep_wake"
    return compile_example(EXAMPLE / "sleep_wake.cpp", program)


def test_the_cpp_example_is_built_by_a_compiler_alone(example: Path) -> None:
    assert_example_works(example)


def test_the_cpp_example_fails_where_nothing_slept(tmp_path: Path) -> None:
    text = (EXAMPLE / "sleep_wake.cpp").read_text()
    assert text.count("  put_to_sleep(allocator);\n") == 1
    source = tmp_path / "sleepless.cpp"
    sleepless = text.replace("  put_to_sleep(allocator);", "  static_cast<void>(put_to_sleep);")
    source.write_text(sleepless)
    program = compile_example(source, tmp_path / "sleepless")
    done = subprocess.run([program, "host"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NOT PROVEN: asleep, they hold none of the device's memory" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 2), (("rocm",), 2), (("host", "host"), 2), (("cuda",), 1)]
)
def test_the_cpp_example_says_what_it_cannot_do(
    arguments: tuple[str, ...], code: int, example: Path
) -> None:
    if arguments == ("cuda",) and cumempool.is_available():
        code = 0
    done = subprocess.run([example, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    said = {0: "proven", 1: "NOT PROVEN: ", 2: "usage: sleep_wake host|cuda"}[code]
    assert said in done.stdout + done.stderr


# ---- how it is built


def test_build_needs_no_cuda_toolkit(tmp_path: Path) -> None:
    cmake = tool("CMAKE", "cmake")
    hidden = "-DCUMEMPOOL_IGNORE_CUDA_TOOLKIT=ON"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run(cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", hidden, python)
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert re.search(r"^CudaHeader_INCLUDE_DIR:PATH=.*/nvidia/[^/]+/include$", cache, re.MULTILINE)
    driver = "CMakeFiles/cumempool_core.dir/cpp/driver/cuda_driver.cpp.o"
    run(cmake, "--build", tmp_path, "--target", driver)
