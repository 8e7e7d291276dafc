"""The arrows between layers: who may include or import whom, and who touches torch internals."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# ---- cpp/

CORE = {"driver": 0, "vmm": 1, "backup": 2, "pool": 3}
#: Folder of cpp/ -> folders that it may include; public headers ("cumempool/...") are open to all.
CPP_ALLOWED: dict[str, frozenset[str]] = {
    folder: frozenset(other for other, below in CORE.items() if below <= height)
    for folder, height in CORE.items()
} | {
    "torch": frozenset({*CORE, "torch"}),
    "abi": frozenset({*CORE, "torch", "abi"}),
    "python": frozenset({"python"}),
}
CUDA_HEADER = re.compile(r"cuda(_runtime(_api)?|Typedefs)?\.h")
CUDA_FILES = re.compile(r"cpp/driver/cuda_\w+\.(cpp|hpp)")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
CPP_SUFFIXES = frozenset({".h", ".hpp", ".c", ".cpp", ".cc", ".inc", ".def", ".in"})

# ---- src/cumempool

BELOW = frozenset({"_core", "_locks", "_torch", "errors"})
POOL = BELOW | {"_pool"}
FACE = POOL | {"allocator", "config", "probe", "sharing"}
#: Sub-package, or module beside them -> those that it may import from, wherever the import stands.
PY_ALLOWED: dict[str, frozenset[str]] = {
    "_core": frozenset(),
    "errors": frozenset(),
    "_locks": frozenset(),
    "_version": frozenset(),
    "paths": frozenset({"errors"}),
    "_torch": frozenset({"_locks", "errors"}),
    "_pool": BELOW,
    "sharing": POOL,
    "_settings": POOL,
    "config": POOL | {"_settings"},
    "probe": POOL | {"config"},
    "allocator": FACE - {"allocator"},
    "distributed": FACE,
    "integrations": FACE,
    "compat": FACE,
    "tools": FACE | {"_version", "integrations"},
    "__init__": FACE | {"_version", "integrations", "paths"},
    "__main__": frozenset({"tools"}),
}
#: What is imported inside functions only, so that importing the package loads neither the library
#: nor torch (R11), but by modules that are imported for it.
PY_LAZY = frozenset({"_core", "_torch", "torch"})
PY_WITH_TORCH = frozenset(
    {"_torch", "_pool.adopt", "_pool.optimizer", "tools.bench", "tools.demo", "tools.selftest"}
)

#: The sub-package that may touch what torch does not promise.
TORCH_PACKAGE = "_torch"
TORCH_INTERNALS = ("torch.cuda.memory", "torch.cuda.MemPool", "torch.cuda.use_mem_pool")


def cpp_violations(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "cpp").rglob("*")):
        if path.suffix in CPP_SUFFIXES:
            relative = path.relative_to(root).as_posix()
            includes = INCLUDE.findall(path.read_text(encoding="utf-8"))
            found += [
                f"{relative}: includes {target}: {problem}"
                for bracket, target in includes
                if (problem := include_problem(relative, bracket, target))
                and not (bracket == '"' and lies_beside(path, target))
            ]
    for path in sorted((root / "include").rglob("*.h")):
        for bracket, target in INCLUDE.findall(path.read_text(encoding="utf-8")):
            if bracket == '"' and not target.startswith("cumempool/"):
                found.append(f"{path.relative_to(root).as_posix()}: includes {target}: not public")
    return found


def lies_beside(path: Path, target: str) -> bool:
    """Whether an include without a folder names a file of the same folder."""
    return "/" not in target and (path.parent / target).is_file()


def include_problem(file: str, bracket: str, target: str) -> str:
    folder, target_folder = file.split("/")[1], target.partition("/")[0]
    if folder not in CPP_ALLOWED:
        return f"the folder {folder}/ has no layer"
    if ".." in target.split("/"):
        return "name the folder from cpp/ on"
    if CUDA_HEADER.fullmatch(target):
        return "" if CUDA_FILES.fullmatch(file) else "only the cuda_* files of cpp/driver may"
    if target == "Python.h" or target_folder == "pybind11":
        return "" if folder == "python" else "only cpp/python may"
    if bracket == "<":
        return "torch is not linked" if target_folder in {"torch", "ATen", "c10"} else ""
    if target_folder == "cumempool" or target_folder in CPP_ALLOWED[folder]:
        return ""
    return f"{folder} may include {', '.join(sorted(CPP_ALLOWED[folder]))} and cumempool/"


class ModuleReader(ast.NodeVisitor):
    """Collects what one module imports from its package, and what it touches of torch."""

    def __init__(self, module: str, modules: frozenset[str]) -> None:
        self.module = module
        self.modules = modules  # of the package, as "errors" or "_pool.tags"
        self.imports: list[tuple[int, str, str]] = []  # line, module, when: top, lazy or types
        self.torch: list[tuple[int, str]] = []  # line, dotted path that starts with torch
        self.when = "top"
        self.aliases: dict[str, str] = {}  # local name -> dotted path in torch

    def read(self, tree: ast.Module) -> ModuleReader:
        # Aliases first: a function may use a name that a later line imports.
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    path = name.name if name.asname else name.name.partition(".")[0]
                    self.alias(name.asname or path, path)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for name in node.names:
                    self.alias(name.asname or name.name, f"{node.module}.{name.name}")
        self.visit(tree)
        return self

    def alias(self, local: str, path: str) -> None:
        if path.partition(".")[0] == "torch":
            self.aliases[local] = path

    def under(self, when: str, nodes: list[ast.stmt]) -> None:
        before, self.when = self.when, when if self.when == "top" else self.when
        for node in nodes:
            self.visit(node)
        self.when = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.in_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.in_function(node)

    def in_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for child in (*node.decorator_list, node.args, node.returns):
            if child is not None:
                self.visit(child)
        self.under("lazy", node.body)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        of_types = ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        self.under("types" if of_types else self.when, node.body)
        self.under(self.when, node.orelse)

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.imported(node.lineno, name.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = f"cumempool.{self.module}".split(".")
            is_package = self.module == "__init__" or any(
                name.startswith(f"{self.module}.") for name in self.modules
            )
            up = node.level - (1 if is_package and self.module != "__init__" else 0)
            base = ".".join([*parents[: len(parents) - up], *([base] if base else [])])
        for name in node.names:
            self.imported(node.lineno, f"{base}.{name.name}")

    def imported(self, line: int, path: str) -> None:
        package, _, rest = path.partition(".")
        if package == "torch":
            self.torch.append((line, path))
            self.imports.append((line, "torch", self.when))
        elif package == "cumempool":
            while rest and rest not in self.modules:
                rest = rest.rpartition(".")[0]
            self.imports.append((line, rest or "__init__", self.when))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if path := self.torch_path(node):
            self.torch.append((node.lineno, path))
        else:
            self.generic_visit(node)

    def torch_path(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, "")
        if isinstance(node, ast.Attribute) and (base := self.torch_path(node.value)):
            return f"{base}.{node.attr}"
        return ""

    def visit_Call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func).rpartition(".")[2]
        texts = [
            argument.value
            for argument in node.args
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        ]
        if function in {"import_module", "__import__"} and texts:
            self.imported(node.lineno, texts[0])
        elif texts and function in {"getattr", "hasattr", "setattr", "delattr"}:
            base = self.torch_path(node.args[0])
            self.torch += [(node.lineno, f"{base}.{texts[0]}")] if base else []
        self.generic_visit(node)

    def violations(self) -> Iterator[str]:
        layer = layer_of(self.module)
        allowed = PY_ALLOWED.get(layer)
        if allowed is None:
            yield "has no layer; give it one in PY_ALLOWED"
            return
        with_torch = self.module in PY_WITH_TORCH or layer in PY_WITH_TORCH
        for line, target, when in self.imports:
            other = layer_of(target)
            if other not in {layer, "torch"} and other not in allowed:
                yield f"line {line} imports {target}"
            elif other in PY_LAZY and when == "top" and not with_torch:
                yield f"line {line} imports {target} at the top"
        if layer != TORCH_PACKAGE:
            yield from (
                f"line {line} touches {path}" for line, path in self.torch if is_internal(path)
            )


def is_internal(path: str) -> bool:
    parts = path.split(".")
    private = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return private or any(path == name or path.startswith(f"{name}.") for name in TORCH_INTERNALS)


def layer_of(module: str) -> str:
    return module.partition(".")[0]


def module_of(package: Path, path: Path) -> str:
    """The name of a file's module inside the package; that of its folder for an `__init__`."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def read_package(root: Path) -> dict[Path, ModuleReader]:
    package = root / "src" / "cumempool"
    files = sorted([*package.rglob("*.py"), *package.rglob("*.pyi")])
    modules = frozenset({module_of(package, path) for path in files} | {"_core"})
    return {
        path: ModuleReader(module_of(package, path), modules).read(
            ast.parse(path.read_text(encoding="utf-8"))
        )
        for path in files
    }


def python_violations(root: Path) -> list[str]:
    readers = read_package(root)
    found = [
        f"{path.relative_to(root).as_posix()}: {text}"
        for path, reader in readers.items()
        for text in reader.violations()
    ]
    arrows = {
        reader.module: {target for _, target, _ in reader.imports if target != reader.module}
        for reader in readers.values()
    }
    return found + [f"{' -> '.join(circle)}: a circle" for circle in circles(arrows)]


def circles(arrows: Mapping[str, Collection[str]]) -> list[list[str]]:
    """A shortest circle for each module that is in one, without naming any circle twice."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(arrows):
        ways = [[start]]
        seen: set[str] = set()
        while ways:
            way = ways.pop(0)
            for target in sorted(arrows.get(way[-1], ())):
                if target == start:
                    found.setdefault(frozenset(way), [*way, start])
                    ways.clear()
                    break
                if target not in seen:
                    seen.add(target)
                    ways.append([*way, target])
    return list(found.values())


# ---- the project


def test_cpp_folders_include_downwards_only() -> None:
    assert any((ROOT / "cpp").rglob("*.cpp"))
    assert cpp_violations(ROOT) == []


def test_python_modules_import_downwards_only() -> None:
    assert len(read_package(ROOT)) > 60
    assert python_violations(ROOT) == []


MOST_LINES = 450
MOST_LINES_OF_A_FUNCTION = 60  # its docstring included


def test_files_and_functions_stay_readable() -> None:
    too_long = []
    for path in sorted((ROOT / "src" / "cumempool").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MOST_LINES:
            too_long.append(f"{path.name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    too_long.append(f"{path.name}: {node.name} of {lines} lines")
    assert too_long == []


# ---- the checks themselves


def plant(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cpp/driver/a.hpp", '#include "vmm/backing.hpp"'),
        ("cpp/vmm/a.cpp", '#include "pool/registry.hpp"'),
        ("cpp/backup/a.cpp", '  #  include "pool/registry.hpp"'),
        ("cpp/pool/a.cpp", '#include "torch/slots.hpp"'),
        ("cpp/torch/a.cpp", '#include "abi/guard.hpp"'),
        ("cpp/torch/a.cpp", '#include "abi/boundary.hpp"'),
        ("cpp/python/a.cpp", '#include "pool/registry.hpp"'),
        ("cpp/pool/a.cpp", '#include "registry.hpp"'),
        ("cpp/pool/a.cpp", '#include "../torch/slots.hpp"'),
        ("cpp/pool/a.cpp", '#include "vmm/../torch/slots.hpp"'),
        ("cpp/other/a.cpp", "#include <vector>"),
        ("cpp/driver/host_driver.cpp", "#include <cuda.h>"),
        ("cpp/driver/sub/cuda_a.cpp", "#include <cuda.h>"),
        ("cpp/driver/a_cuda_b.hpp", "#include <cuda.h>"),
        ("cpp/pool/cuda_a.cpp", "#include <cuda.h>"),
        ("cpp/vmm/a.cpp", "#include <cuda_runtime.h>"),
        ("cpp/driver/a.hpp", "#include <cudaTypedefs.h>"),
        ("cpp/abi/a.cpp", "#include <pybind11/pybind11.h>"),
        ("cpp/torch/a.cpp", "#include <torch/extension.h>"),
        ("include/cumempool/a.h", '#include "driver/driver.hpp"'),
    ],
)
def test_a_planted_include_is_caught(tmp_path: Path, path: str, line: str) -> None:
    plant(tmp_path, path, f"// text\n{line}\n")
    assert len(cpp_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cpp/driver/cuda_driver.cpp", "#include <cuda.h>"),
        ("cpp/driver/cuda_driver.hpp", "#include <cuda.h>"),
        ("cpp/pool/a.cpp", '#include "backup/arena.hpp"'),
        ("cpp/abi/a.cpp", '#include "pool/transition.hpp"'),
        ("cpp/python/a.cpp", "#include <pybind11/pybind11.h>"),
        ("cpp/python/b.cpp", '#include "cumempool/cumempool.h"'),
        ("include/cumempool/a.h", '#include "cumempool/driver.h"'),
    ],
)
def test_an_include_along_the_arrows_passes(tmp_path: Path, path: str, line: str) -> None:
    plant(tmp_path, path, f"{line}\n")
    assert cpp_violations(tmp_path) == []


def test_an_include_of_a_file_beside_it_passes(tmp_path: Path) -> None:
    plant(tmp_path, "cpp/pool/registry.hpp", "")
    plant(tmp_path, "cpp/pool/a.cpp", '#include "registry.hpp"\n')
    assert cpp_violations(tmp_path) == []


MODULES = (
    *("__init__", "_core", "errors", "_locks", "paths", "config", "probe", "allocator"),
    *("_torch/__init__", "_torch/routing", "_pool/__init__", "_pool/tags", "_pool/adopt"),
    *("sharing/__init__", "sharing/wire", "integrations/nixl", "distributed/__init__"),
    *("compat/vllm", "tools/cli", "tools/demo"),
)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("errors", "import cumempool._pool.tags"),
        ("_pool/tags", "from cumempool.config import CuMemConfig"),
        ("_pool/tags", "from ..config import CuMemConfig"),
        ("_pool/tags", "from cumempool.sharing.wire import Wire"),
        ("_pool/tags", "def f():\n    from cumempool.sharing import open_shared"),
        ("_pool/tags", "if TYPE_CHECKING:\n    from cumempool.allocator import CuMemAllocator"),
        ("_pool/adopt", "from cumempool.allocator import CuMemAllocator"),
        ("_pool/adopt", "def f():\n    from cumempool.allocator import CuMemAllocator"),
        ("_torch/routing", "from cumempool._pool.tags import Tags"),
        ("_torch/routing", "from cumempool import _core"),
        ("sharing/wire", "if TYPE_CHECKING:\n    from cumempool.config import CuMemConfig"),
        ("config", "def f():\n    from cumempool.probe import probe"),
        ("config", "def f():\n    from cumempool.integrations.nixl import create_agent"),
        ("probe", "from . import allocator"),
        ("probe", "from .allocator import CuMemAllocator"),
        ("probe", "from cumempool import CuMemAllocator"),
        ("allocator", "from cumempool import _core"),
        ("_pool/tags", "from cumempool import _core"),
        ("_pool/tags", "from cumempool import _torch"),
        ("_pool/tags", "from cumempool._torch.routing import PoolRoute"),
        ("allocator", "import importlib\nimportlib.import_module('cumempool.tools.cli')"),
        ("allocator", "def f():\n    from cumempool.distributed import sleep"),
        ("integrations/nixl", "from cumempool.compat import vllm"),
        ("__init__", "from cumempool.tools.demo import main"),
        ("sidecar", "import os"),
        ("folder/thing", "import os"),
        ("compat/thing", "from cumempool.tools.demo import run_demo"),
        ("tools/demo", "import torch\ntorch._C._cuda_beginAllocateToPool(0, 0)"),
        ("tools/demo", "import torch as t\nt.cuda.MemPool()"),
        ("allocator", "import torch"),
        ("probe", "import torch.nn"),
        ("tools/demo", "import torch\npool = torch.cuda.memory.CUDAPluggableAllocator"),
        ("tools/demo", "import torch.cuda.memory"),
        ("tools/demo", "from torch.cuda import MemPool"),
        ("tools/demo", "from torch.cuda.memory import CUDAPluggableAllocator"),
        ("tools/demo", "from torch import _C"),
        ("tools/demo", "from torch import cuda\ncuda.memory._snapshot()"),
        ("tools/demo", "import torch\ngetattr(torch, '_C')"),
        ("tools/demo", "def f():\n    return torch.cuda._lazy_init()\nimport torch"),
    ],
)
def test_a_planted_import_or_attribute_is_caught(tmp_path: Path, module: str, code: str) -> None:
    for name in MODULES:
        plant(tmp_path, f"src/cumempool/{name}.py", "")
    plant(tmp_path, f"src/cumempool/{module}.py", f"{code}\n")
    assert len(python_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("config", "from cumempool._pool.tags import Tags"),
        ("_pool/adopt", "import torch\nfrom cumempool import _torch"),
        ("_pool/tags", "if TYPE_CHECKING:\n    import torch\n    from cumempool import _core"),
        ("probe", "def f():\n    from cumempool import _core, _torch"),
        ("allocator", "def f():\n    import torch\n    from cumempool._pool.adopt import f"),
        ("allocator", "from cumempool import sharing\nfrom .sharing.wire import Wire"),
        ("sharing/__init__", "from .wire import Wire\nfrom cumempool._pool import tags"),
        ("_torch/routing", "import torch\nfrom torch.cuda.memory import MemPool\ntorch._C.x"),
        ("tools/demo", "import torch\ntorch.cuda.memory_allocated()\ntorch.__version__"),
        ("tools/demo", "self._C.memory._snapshot()"),
        ("tools/cli", "def f():\n    from cumempool.tools.demo import run_demo"),
        ("tools/cli", "from cumempool.integrations.nixl import create_agent"),
    ],
)
def test_an_import_along_the_arrows_passes(tmp_path: Path, module: str, code: str) -> None:
    for name in MODULES:
        plant(tmp_path, f"src/cumempool/{name}.py", "")
    plant(tmp_path, f"src/cumempool/{module}.py", f"{code}\n")
    assert python_violations(tmp_path) == []


@pytest.mark.parametrize(
    "back",
    [
        "from cumempool._pool.tags import Tags",
        "from cumempool._pool import tags",
        "from .tags import Tags",
        "def f():\n    from cumempool._pool.tags import Tags",
        "if TYPE_CHECKING:\n    from cumempool._pool.tags import Tags",
        "import importlib\nimportlib.import_module('cumempool._pool.tags')",
    ],
)
def test_a_circle_is_caught_wherever_the_import_stands(tmp_path: Path, back: str) -> None:
    plant(tmp_path, "src/cumempool/_pool/__init__.py", "")
    plant(tmp_path, "src/cumempool/_pool/tags.py", "from cumempool._pool.scope import Scope\n")
    plant(tmp_path, "src/cumempool/_pool/scope.py", "from cumempool._pool.hooks import Hooks\n")
    plant(tmp_path, "src/cumempool/_pool/hooks.py", f"{back}\n")
    assert len(python_violations(tmp_path)) == 1
