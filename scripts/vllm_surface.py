"""Prints the names and signatures of vLLM's allocator modules: vllm_surface.py FILES VERSION.

FILES is a folder that holds ``vllm/device_allocator``. It parses the files and does not import
them. The tests compare its output, tests/data/vllm_surface.json, with cumempool.compat.vllm.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

MODULES = {
    "vllm.device_allocator": "vllm/device_allocator/__init__.py",
    "vllm.device_allocator.cumem": "vllm/device_allocator/cumem.py",
    "vllm.device_allocator.sleep_mode_backend": "vllm/device_allocator/sleep_mode_backend.py",
}

Functions = (ast.FunctionDef, ast.AsyncFunctionDef)


def surface(files: Path, version: str) -> dict[str, Any]:
    """Returns the definitions of the modules under a folder, as plain data."""
    modules = {
        name: module_surface(ast.parse((files / path).read_text(encoding="utf-8")))
        for name, path in MODULES.items()
    }
    return {"version": version, "modules": modules}


def module_surface(tree: ast.Module) -> dict[str, Any]:
    """Returns the public functions, classes and values that a module defines itself."""
    return {
        "functions": {
            node.name: parameters(node) for node in tree.body if is_public_function(node)
        },
        "classes": {
            node.name: class_surface(node)
            for node in tree.body
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        },
        "values": assigned(tree.body),
    }


def class_surface(node: ast.ClassDef) -> dict[str, Any]:
    """Returns public methods, class attributes, and attributes that ``__init__`` sets."""
    methods = [member for member in node.body if isinstance(member, Functions)]
    return {
        "methods": {
            method.name: {"kind": kind(method), "parameters": parameters(method)}
            for method in methods
            if is_public_function(method)
        },
        "attributes": assigned(node.body),
        "instance_attributes": sorted(
            name
            for method in methods
            if method.name == "__init__"
            for target in ast.walk(method)
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
            if not (name := target.attr).startswith("_")
        ),
    }


def is_public_function(node: ast.stmt) -> bool:
    return isinstance(node, Functions) and not node.name.startswith("_")


def kind(method: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Returns ``staticmethod``, ``classmethod``, ``property`` or ``method``."""
    names = {ast.unparse(decorator) for decorator in method.decorator_list}
    return next((k for k in ("staticmethod", "classmethod", "property") if k in names), "method")


def parameters(function: Any) -> list[list[str | None]]:
    """Returns name, kind (as in `inspect`) and default text of parameters but self and cls."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = len(positional) - len(arguments.defaults)
    defaults = [None] * missing + [ast.unparse(value) for value in arguments.defaults]
    found: list[list[str | None]] = [
        [
            argument.arg,
            "POSITIONAL_ONLY" if argument in arguments.posonlyargs else "POSITIONAL_OR_KEYWORD",
            default,
        ]
        for argument, default in zip(positional, defaults, strict=True)
    ]
    if arguments.vararg:
        found.append([arguments.vararg.arg, "VAR_POSITIONAL", None])
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append([argument.arg, "KEYWORD_ONLY", None if value is None else ast.unparse(value)])
    if arguments.kwarg:
        found.append([arguments.kwarg.arg, "VAR_KEYWORD", None])
    return [entry for entry in found if entry[0] not in ("self", "cls")]


def assigned(body: list[ast.stmt]) -> dict[str, str | None]:
    """Returns public names that statements assign, also in ``try`` and ``if``; literals as text."""
    found: dict[str, str | None] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= dict.fromkeys(names, literal(node.value))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = literal(node.value)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(h.body for h in node.handlers)):
                found |= assigned(part)
        elif isinstance(node, ast.If):
            found |= assigned(node.body) | assigned(node.orelse)
    return {name: value for name, value in sorted(found.items()) if not name.startswith("_")}


def literal(value: ast.expr | None) -> str | None:
    """Returns the text of a literal value, or None."""
    try:
        return None if value is None else repr(ast.literal_eval(value))
    except ValueError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, help="folder that holds vllm/device_allocator")
    parser.add_argument("version", help="version of vLLM that the files are of")
    arguments = parser.parse_args()
    json.dump(surface(arguments.files, arguments.version), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
