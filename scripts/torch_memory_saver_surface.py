"""Writes the public names and signatures of an unpacked torch_memory_saver wheel.

    python scripts/torch_memory_saver_surface.py FOLDER

FOLDER holds the unpacked wheel. It reads the syntax trees of the files, and neither imports nor
runs them. The result is tests/data/torch_memory_saver_surface.json.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "data" / "torch_memory_saver_surface.json"
PACKAGE = "torch_memory_saver"

Surface = dict[str, object]


def parameters(arguments: ast.arguments) -> list[list[str | None]]:
    """Returns name, kind and default of each parameter; a default is source text or None."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    rows: list[list[str | None]] = [
        [a.arg, "plain", d and ast.unparse(d)] for a, d in zip(plain, defaults, strict=True)
    ]
    for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        rows.append([a.arg, "keyword", d and ast.unparse(d)])
    return rows


def function(node: ast.FunctionDef) -> Surface:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if "property" in decorators:
        return {"kind": "property", "settable": False}
    kind = "context manager" if "contextmanager" in decorators else "function"
    return {"kind": kind, "parameters": parameters(node.args)}


def is_public(name: str) -> bool:
    return not name.startswith("_")


def members(body: list[ast.stmt]) -> Surface:
    """Returns the public functions, classes and choices that a body defines."""
    found: Surface = {}
    for node in body:
        if isinstance(node, ast.FunctionDef) and is_public(node.name):
            if any(ast.unparse(d) == f"{node.name}.setter" for d in node.decorator_list):
                found[node.name] = {"kind": "property", "settable": True}
            else:
                found[node.name] = function(node)
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            found[node.name] = {"kind": "class", "members": members(node.body)}
        elif isinstance(node, ast.Assign):
            found.update(assigned(node))
    return found


def assigned(node: ast.Assign) -> Iterator[tuple[str, Surface]]:
    for target in node.targets:
        if not isinstance(target, ast.Name) or not is_public(target.id) or target.id == "logger":
            continue
        value = node.value
        if isinstance(value, ast.Subscript) and ast.unparse(value.value) == "Literal":
            yield target.id, {"kind": "choice", "of": sorted(ast.literal_eval(value.slice))}
        elif isinstance(value, ast.Call):
            yield target.id, {"kind": "object", "class": ast.unparse(value.func)}


def constants(tree: ast.Module) -> dict[str, str]:
    return {
        target.id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def reexports(tree: ast.Module) -> list[str]:
    """Returns the names that a package imports from its own modules, and so offers."""
    return sorted(
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
        if is_public(alias.name)
    )


def with_values(rows: object, values: dict[str, str]) -> None:
    """Replaces the names of a module's constants in signatures by their values."""
    if isinstance(rows, dict):
        for row in rows.get("parameters", []):
            row[2] = values.get(row[2], row[2])
        for value in rows.values():
            with_values(value, values)


def surface(folder: Path) -> Surface:
    """Returns the surface of the package in a folder, module by module."""
    package = folder / PACKAGE
    modules: Surface = {}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        found = members(tree.body)
        with_values(found, constants(tree))
        if path.name == "__init__.py":
            found.update({name: {"kind": "reexport"} for name in reexports(tree)})
        modules[name] = found
    return {"package": PACKAGE, "version": version(folder), "modules": modules}


def version(folder: Path) -> str:
    (info,) = folder.glob(f"{PACKAGE}-*.dist-info")
    return info.name.removeprefix(f"{PACKAGE}-").removesuffix(".dist-info")


if __name__ == "__main__":
    recorded = surface(Path(sys.argv[1]))
    RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
