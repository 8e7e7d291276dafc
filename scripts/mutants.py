#!/usr/bin/env python3
"""Puts hand-made faults into a copy of the code, one at a time: does the suite catch each?

    scripts/mutants.py                       # all of them
    scripts/mutants.py --only NAME           # one of them; may be repeated
    scripts/mutants.py --list                # list them
    scripts/mutants.py --check               # only check that each applies, as CI does

The faults are in tests/mutants/faults.toml. A fault is one replacement in one file. The script puts
it into a copy of the checkout in a temporary folder, builds and tests that, and takes it out again;
it only reads the checkout. If a fault names Python tests, one of them must catch it; else the C++
tests must: it runs the likely ones first, then all. Fails if a fault survives or does not apply.
Needs Python 3.11, the build requirements of the C++ tests, and for faults with Python tests the
test requirements.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "mutants" / "faults.toml"
#: The files of the checkout that a build and the tests need.
COPIED = (
    "CMakeLists.txt",
    "benchmarks",
    "cmake",
    "cpp",
    "docs",
    "examples",
    "include",
    "pyproject.toml",
    "scripts",
    "src",
    "tests",
)
#: Slow tests, which run after all others, since most faults are caught without them.
SLOW = "Operations/*:Threads/*"
#: As CI builds the tests, but fast to compile.
FLAGS = "-O0 -DNDEBUG"


class MutantError(Exception):
    """A problem that keeps the script from trying faults."""


@dataclass(frozen=True)
class Fault:
    """One record of faults.toml.

    Attributes:
        name: Its name.
        breaks: The rule or promise that it breaks.
        file: The file that it changes.
        find: The text that it replaces, which the file has once.
        replace: The new text.
        likely: A GoogleTest filter of C++ tests that are likely to catch it.
        tests: Python tests, one of which catches it; empty if a C++ test does.
    """

    name: str
    breaks: str
    file: str
    find: str
    replace: str
    likely: str = ""
    tests: tuple[str, ...] = ()

    def applied_to(self, text: str) -> str:
        """Returns the text with the fault.

        Raises:
            MutantError: The fault does not apply.
        """
        count = text.count(self.find)
        if count != 1:
            raise MutantError(f"{self.name}: found {count} times in {self.file}, not once")
        faulty = text.replace(self.find, self.replace)
        if faulty == text:
            raise MutantError(f"{self.name}: changes nothing in {self.file}")
        return faulty


@dataclass(frozen=True)
class Verdict:
    """The result of a fault; `by` is the first test that failed, or the build's failure."""

    name: str
    caught: bool
    by: str
    seconds: float


def read_faults() -> list[Fault]:
    records = tomllib.loads(FAULTS.read_text())["fault"]
    faults = [Fault(**{**record, "tests": tuple(record.get("tests", ()))}) for record in records]
    names = [fault.name for fault in faults]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MutantError(f"named twice: {', '.join(twice)}")
    for fault in faults:
        if bool(fault.likely) == bool(fault.tests):
            raise MutantError(f"{fault.name}: names likely C++ tests, or Python tests")
    return faults


def check(faults: list[Fault]) -> bool:
    """Returns whether all faults apply to the checkout; prints those that do not."""
    good = True
    for fault in faults:
        try:
            fault.applied_to((ROOT / fault.file).read_text())
            for file, _, test in (test.partition("::") for test in fault.tests):
                if f"def {test}" not in (ROOT / file).read_text():
                    raise MutantError(f"{fault.name}: no test {test} in {file}")
        except (MutantError, OSError) as error:
            print(error)
            good = False
    return good


# ---- tests, which may hang -----------------------------------------------------------------------


def first_failure(log: str) -> str:
    """Returns the first test of GoogleTest or pytest that failed, or the last one that began."""
    for pattern in (r"^\[  FAILED  \] ([^\s,]+)", r"^(?:FAILED|ERROR) (\S+)"):
        if failed := re.search(pattern, log, re.MULTILINE):
            return failed[1]
    begun = re.findall(r"^(?:\[ RUN      \] |(?=\S+\.py::))(\S+)", log, re.MULTILINE)
    return begun[-1] if begun else "the start of the tests"


class Run:
    """A process that runs tests, in its own session."""

    def __init__(self, command: list[str], folder: Path, log: str, variables: dict[str, str]):
        self._log = folder / log
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **variables},
            )

    def outcome(self, patience: float) -> str | None:
        """Returns the failed test, "" if it has succeeded, None while it runs."""
        status = self._process.poll()
        if status is None:
            if time.time() - self._log.stat().st_mtime < patience:
                return None
            self.kill()
            return f"{self._first_failure()} (hung)"
        if status == 0:
            return ""
        return self._first_failure() + (f" (signal {-status})" if status < 0 else "")

    def _first_failure(self) -> str:
        return first_failure(self._log.read_text(errors="replace"))

    def kill(self) -> None:
        """Ends it and all processes that it has started."""
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def watch(runs: list[Run], patience: float) -> str:
    """Waits for all runs; the first failure ends the others. Returns the failed test, or ""."""
    running = list(runs)
    try:
        while running:
            time.sleep(0.05)
            for run in list(running):
                failed = run.outcome(patience)
                if failed:
                    return failed
                if failed == "":
                    running.remove(run)
    finally:
        for run in running:
            run.kill()
    return ""


# ---- the copy ------------------------------------------------------------------------------------


@dataclass
class Copy:
    """The copy of the checkout, with its one build folder."""

    folder: Path
    jobs: int
    patience: float
    python: bool

    @property
    def build(self) -> Path:
        return self.folder / "build"

    def make(self) -> None:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.folder / name, ignore=ignored)
            else:
                shutil.copy2(source, self.folder / name)
        options = ["-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS_DEBUG={FLAGS}"]
        options += ["-DCUMEMPOOL_BUILD_TESTS=ON"]
        if self.python:
            options += ["-DCUMEMPOOL_BUILD_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        self.run("cmake", "-S", str(self.folder), "-B", str(self.build), "-G", "Ninja", *options)
        self.compile()
        if self.python:
            self.make_package()

    def make_package(self) -> None:
        """Makes a folder to import the package from: the copy's sources beside the built files."""
        package = self.folder / "package" / "cumempool"
        (package / "lib").mkdir(parents=True)
        for source in (self.folder / "src" / "cumempool").iterdir():
            (package / source.name).symlink_to(source)
        module = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        (package / module).symlink_to(self.build / module)
        (package / "lib" / "libcumempool.so").symlink_to(self.build / "libcumempool.so")

    def run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MutantError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    def compile(self) -> None:
        targets = ["cumempool_tests", *(["_core"] if self.python else [])]
        build = ["cmake", "--build", str(self.build), "--parallel", str(self.jobs)]
        self.run(*build, "--target", *targets)

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        file = self.folder / fault.file
        right = file.read_text()
        file.write_text(fault.applied_to(right))
        try:
            yield
        finally:
            file.write_text(right)

    def test_cpp(self, tests: str) -> str:
        """Returns the first C++ test of a filter that fails, or "" if none does."""
        command = [str(self.build / "cumempool_tests"), "--gtest_fail_fast"]
        runs = []
        for index in range(self.jobs):
            share = {"GTEST_TOTAL_SHARDS": str(self.jobs), "GTEST_SHARD_INDEX": str(index)}
            filtered = [*command, f"--gtest_filter={tests}"]
            runs.append(Run(filtered, self.folder, f"cpp{index}.log", share))
        return watch(runs, self.patience)

    def test_all_cpp(self) -> str:
        """Returns the first C++ test that fails, or "" if none does; slow tests come last."""
        return self.test_cpp(f"-{SLOW}") or self.test_cpp(SLOW)

    @functools.cached_property
    def is_sound(self) -> bool:
        """Checks that all C++ tests pass without a fault; else every fault would seem caught.

        Raises:
            MutantError: A test fails.
        """
        self.compile()
        if failed := self.test_all_cpp():
            raise MutantError(f"without any fault, a test fails: {failed}")
        return True

    def test_python(self, tests: Sequence[str]) -> str:
        """Returns the first of these Python tests that fails, or "" if none does."""
        command = [
            sys.executable,
            "-u",
            "-m",
            "pytest",
            "-m",
            "",
            "-x",
            "-v",
            "-p",
            "no:cacheprovider",
        ]
        path = {"PYTHONPATH": str(self.folder / "package"), "PYTHONDONTWRITEBYTECODE": "1"}
        return watch([Run([*command, *tests], self.folder, "python.log", path)], self.patience)


def try_fault(copy: Copy, fault: Fault) -> Verdict:
    """Puts the fault in, builds, tests, takes it out.

    Raises:
        MutantError: It does not apply, or does not compile, so it proves nothing about the tests.
    """
    began = time.monotonic()
    with copy.with_fault(fault):
        copy.compile()  # also rebuilds the files of an earlier fault
        failed = copy.test_python(fault.tests) if fault.tests else copy.test_cpp(fault.likely)
    if not failed and not fault.tests and copy.is_sound:
        with copy.with_fault(fault):
            copy.compile()
            failed = copy.test_all_cpp()
    return Verdict(fault.name, failed != "", failed, round(time.monotonic() - began, 1))


# ---- the run -------------------------------------------------------------------------------------


def try_all(faults: list[Fault], settings: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="cumempool-mutants-") as folder:
        python = any(fault.tests for fault in faults)
        copy = Copy(Path(folder), settings.jobs, settings.patience, python)
        copy.make()
        likely = ":".join(sorted({fault.likely for fault in faults if fault.likely}))
        named = sorted({test for fault in faults for test in fault.tests})
        failed = copy.test_cpp(likely) if likely else ""
        if failed := failed or (copy.test_python(named) if named else ""):
            raise MutantError(f"without any fault, a test fails: {failed}")
        for fault in faults:
            verdicts.append(try_fault(copy, fault))
            show(verdicts[-1])
    return verdicts


def show(verdict: Verdict) -> None:
    outcome = f"caught by {verdict.by}" if verdict.caught else "SURVIVED"
    print(f"{verdict.name:<48} {verdict.seconds:6.1f} s  {outcome}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="only this fault")
    parser.add_argument("--list", action="store_true", help="list the faults")
    parser.add_argument("--check", action="store_true", help="only see whether all apply")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds of silence until a test has hung"
    )
    return parser.parse_args()


def chosen(settings: argparse.Namespace) -> list[Fault]:
    faults = read_faults()
    if settings.only is None:
        return faults
    if unknown := sorted(set(settings.only) - {fault.name for fault in faults}):
        raise MutantError(f"no such fault: {', '.join(unknown)}")
    return [fault for fault in faults if fault.name in settings.only]


def main() -> int:
    settings = parse()
    # So that nothing is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        faults = chosen(settings)
        if settings.list:
            for fault in faults:
                print(f"{fault.name:<48} {fault.file:<32} {fault.breaks}")
            return 0
        if not check(faults):
            return 1
        if settings.check:
            print(f"{len(faults)} faults, all of which apply")
            return 0
        verdicts = try_all(faults, settings)
    except MutantError as error:
        print(error, file=sys.stderr)
        return 1
    survived = [verdict.name for verdict in verdicts if not verdict.caught]
    print(f"{len(verdicts)} faults, {len(verdicts) - len(survived)} caught", end="")
    print(f"; survived: {', '.join(survived)}" if survived else "")
    if settings.output is not None:
        record = {"faults": len(verdicts), "survived": survived}
        record["verdicts"] = [asdict(verdict) for verdict in verdicts]
        settings.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
