"""Compares the files of a wheel and an sdist with the expected ones.

python scripts/package_contents.py WHEEL SDIST prints each missing or extra file, and exits with 1
if there is one.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]

#: What an sdist has besides the folders that a build reads, and besides what is made for it.
SDIST_FILES = {
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
}
SDIST_FOLDERS = ("cmake", "cpp", "examples", "include", "src")

#: What a wheel has besides Python modules, stubs and headers: built, or made for it.
WHEEL_FILES = {
    "cumempool/_core.so",
    "cumempool/lib/libcumempool.so",
    "cumempool/lib/cmake/cumempool/cumempoolConfig.cmake",
    "cumempool/lib/cmake/cumempool/cumempoolConfigVersion.cmake",
    "cumempool/lib/cmake/cumempool/cumempoolTargets.cmake",
    "cumempool/lib/cmake/cumempool/cumempoolTargets-release.cmake",
    "dist-info/METADATA",
    "dist-info/RECORD",
    "dist-info/WHEEL",
    "dist-info/entry_points.txt",
    "dist-info/licenses/LICENSE",
}


def files_of(folder: Path) -> set[str]:
    """Returns the files below a folder of the source tree, without caches, as relative names."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def expected_wheel(root: Path) -> set[str]:
    modules = {f"cumempool/{name}" for name in files_of(root / "src" / "cumempool")}
    headers = {f"cumempool/include/{name}" for name in files_of(root / "include")}
    return WHEEL_FILES | modules | headers


def expected_sdist(root: Path) -> set[str]:
    folders = {f"{top}/{name}" for top in SDIST_FOLDERS for name in files_of(root / top)}
    return SDIST_FILES | folders


def plain(name: str) -> str:
    """Returns a name in a wheel without the parts for the version and the interpreter."""
    name = re.sub(r"^cumempool-[^/]+\.dist-info/", "dist-info/", name)
    return re.sub(r"^(cumempool/_core)\.[^/]+\.so$", r"\1.so", name)


def in_wheel(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [plain(info.filename) for info in archive.infolist() if not info.is_dir()]


def in_sdist(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as archive:
        names = [PurePosixPath(member.name) for member in archive if not member.isdir()]
    return [str(PurePosixPath(*name.parts[1:])) for name in names]


def differences(archive: Path, found: Iterable[str], expected: set[str]) -> list[str]:
    there = list(found)
    missing = [f"{archive.name} lacks {name}" for name in sorted(expected - set(there))]
    extra = [f"{archive.name} has {name}" for name in sorted(set(there) - expected)]
    twice = sorted({name for name in there if there.count(name) > 1})
    return missing + extra + [f"{archive.name} has {name} twice" for name in twice]


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheel, sdist = map(Path, sys.argv[1:])
    problems = differences(wheel, in_wheel(wheel), expected_wheel(ROOT))
    problems += differences(sdist, in_sdist(sdist), expected_sdist(ROOT))
    if problems:
        sys.exit("\n".join(problems))
    print(f"{wheel.name} and {sdist.name} hold what belongs there and nothing else")


if __name__ == "__main__":
    main()
