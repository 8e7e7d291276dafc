"""Finds the benchmark's C++ programs in the build folder, and talks to them line by line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from bench import Settings


class MissingProgramError(Exception):
    """The program cannot be run here; the message says why."""


class ProgramEndedError(Exception):
    """The program ended before it was asked to."""


def find(settings: Settings, name: str) -> Path:
    """Returns the program's path.

    Raises:
        MissingProgramError: It is not built, or it needs a GPU and the run uses none.
    """
    if settings.driver != "cuda" and name != "direct_io":
        raise MissingProgramError(f"{name} runs on the cuda driver only")
    if settings.programs is None:
        raise MissingProgramError(f"{name} was not looked for: --programs names no build folder")
    path = Path(settings.programs) / name
    if not path.exists():
        raise MissingProgramError(f"{path} is not there: build with CUMEMPOOL_BUILD_BENCHMARKS=ON")
    return path


class Program:
    """A running program that answers each command with a line of JSON; ends with its context."""

    def __init__(self, path: Path, *arguments: object) -> None:
        self._name = path.name
        self._process = subprocess.Popen(
            [str(path), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ProgramEndedError(f"{self._name} ended; what it printed is in the log")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the program ends with its input
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
