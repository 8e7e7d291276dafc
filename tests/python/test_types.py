"""What type checkers see: the stubs of the extension module, and the types of the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cumempool import _core

pytestmark = pytest.mark.extensive

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *command: str | Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_stubs_are_what_the_extension_module_has(tmp_path: Path) -> None:
    # torch is left out: these stubs do not need it, and reading it takes long.
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n")
    check = [sys.executable, "-m", "mypy.stubtest", "cumempool._core"]
    said = run(tmp_path, *check, "--mypy-config-file", settings)
    assert said.startswith("Success: ")


def test_a_program_that_uses_the_package_is_fully_typed(tmp_path: Path) -> None:
    program = Path(__file__).with_name("consumer.py")
    check = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", tmp_path]
    assert run(tmp_path, *check, program).startswith("Success: ")
    assert run(tmp_path, sys.executable, program) == "all types are as declared\n"


def test_the_stubs_name_every_argument_as_the_module_does() -> None:
    """A call by keyword that the stubs allow is one that the module takes."""
    tree = ast.parse((ROOT / "src" / "cumempool" / "_core.pyi").read_text())
    functions = [
        (owner, node)
        for owner, body in [("", tree), *((c.name, c) for c in tree.body if is_class(c))]
        for node in getattr(body, "body", [])
        if isinstance(node, ast.FunctionDef) and node.args.args and not node.decorator_list
    ]
    assert len(functions) > 25
    for owner, node in functions:
        holder = getattr(_core, owner) if owner else _core
        signature = (getattr(holder, node.name).__doc__ or "").splitlines()[0]
        names = [argument.arg for argument in node.args.args]
        if node.args.vararg is None:
            assert re.findall(r"(\w+): ", signature) == names, f"{owner}.{node.name}: {signature}"


def is_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and not node.decorator_list
