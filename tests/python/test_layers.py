"""The arrows between layers: who may include or import whom, and who touches torch internals."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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
    "abi": frozenset({*CORE, "abi"}),
    "python": frozenset({"python"}),
}
CUDA_HEADER = re.compile(r"cuda(_runtime(_api)?|Typedefs)?\.h")
CUDA_FILES = re.compile(r"cpp/driver/cuda_\w+\.(cpp|hpp)")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
CPP_SUFFIXES = frozenset({".h", ".hpp", ".c", ".cpp", ".cc", ".inc", ".def", ".in"})

# ---- src/cumempool

#: Module -> modules that it may import when it is itself imported.
PY_ALLOWED: dict[str, frozenset[str]] = {
    "_core": frozenset(),
    "errors": frozenset(),
    "locks": frozenset(),
    "unfailing": frozenset({"errors"}),
    "backup": frozenset({"errors"}),
    "stats": frozenset(),
    "sizes": frozenset({"errors"}),
    "devices": frozenset({"errors"}),
    "tags": frozenset({"devices", "errors", "locks", "stats"}),
    "sleep_plan": frozenset({"errors", "stats", "tags"}),
    "torch_state": frozenset({"errors"}),
    "paths": frozenset({"errors"}),
    "report": frozenset({"errors"}),
    "config": frozenset({"backup", "errors", "locks"}),
    "guard": frozenset({"errors", "locks"}),
    "descriptor": frozenset({"errors"}),
    "wire": frozenset({"errors"}),
    "endpoint": frozenset({"descriptor", "errors", "guard", "locks", "wire"}),
    "sharing": frozenset({"descriptor", "endpoint", "errors", "locks", "wire"}),
    "waking": frozenset({"errors", "guard", "locks", "report"}),
    "kv_transfer": frozenset({"errors"}),
    "nixl": frozenset({"errors", "locks"}),
    "_torch": frozenset({"errors", "locks"}),
    "probe": frozenset({"config", "errors", "stats"}),
    "adopt": frozenset({"_torch", "errors", "exact_tensor", "preserve", "torch_state"}),
    "training": frozenset({"_torch", "adopt", "errors"}),
    "scope": frozenset({"errors", "locks", "report", "sharing"}),
    "graph_pool": frozenset({"errors", "locks"}),
    "exact_tensor": frozenset({"errors", "scope", "sharing", "sizes", "tags", "torch_state"}),
    "backup_view": frozenset({"errors", "waking"}),
    "preserve": frozenset({"errors", "scope", "tags", "waking"}),
    "exports": frozenset(
        {"descriptor", "devices", "endpoint", "errors", "locks", "stats", "tags", "waking"}
    ),
    "transition": frozenset(
        {"errors", "guard", "report", "scope", "tags", "torch_state", "waking"}
    ),
    "allocator": frozenset(
        {
            "backup",
            "backup_view",
            "config",
            "devices",
            "errors",
            "events",
            "exact_tensor",
            "exports",
            "graph_pool",
            "guard",
            "locks",
            "preserve",
            "probe",
            "progress",
            "publishing",
            "report",
            "scope",
            "sharing",
            "sizes",
            "sleep_plan",
            "stats",
            "tags",
            "torch_state",
            "transition",
            "waking",
        }
    ),
    "__init__": frozenset(
        {
            "allocator",
            "backup",
            "config",
            "errors",
            "guard",
            "kv_transfer",
            "paths",
            "probe",
            "report",
            "sharing",
            "stats",
            "waking",
        }
    ),
    # Every module of the folder.
    "compat": frozenset({"allocator", "backup", "config", "errors", "locks", "report", "scope"}),
    "distributed": frozenset({"allocator", "errors", "report", "scope", "sleep_plan", "tags"}),
    "demo": frozenset({"allocator", "config", "errors", "probe", "report"}),
    "plots": frozenset(),
    "bench": frozenset({"allocator", "config", "errors"}),
    "progress": frozenset({"errors", "locks", "unfailing"}),
    "page": frozenset({"errors", "report"}),
    "events": frozenset({"errors", "locks", "report", "stats", "unfailing"}),
    "publishing": frozenset({"errors", "unfailing", "wire"}),
    "prometheus": frozenset({"stats"}),
    "top": frozenset({"publishing", "report"}),
    "machine": frozenset(),
    "selftest": frozenset({"allocator", "config", "errors"}),
    "doctor": frozenset({"config", "errors", "kv_transfer", "machine", "nixl", "probe", "report"}),
    "cli": frozenset({"errors"}),
    "__main__": frozenset({"cli"}),
}

#: Module -> modules that it may import inside a function as well: so that importing the package
#: loads neither torch nor the library (R11), or against the arrows.
PY_LAZY: dict[str, frozenset[str]] = {
    "config": frozenset({"_core", "probe", "allocator", "kv_transfer"}),
    "kv_transfer": frozenset({"_torch"}),
    "sharing": frozenset({"_core", "_torch", "probe"}),
    "machine": frozenset({"_core"}),
    "wire": frozenset({"_core"}),
    "probe": frozenset({"_core", "_torch"}),
    "scope": frozenset({"_core", "_torch"}),
    "graph_pool": frozenset({"_core", "_torch"}),
    "torch_state": frozenset({"_torch"}),
    "exact_tensor": frozenset({"_torch"}),
    "backup_view": frozenset({"_torch"}),
    "transition": frozenset({"_torch"}),
    "allocator": frozenset({"_core", "training"}),
    "cli": frozenset(
        {"bench", "config", "demo", "doctor", "page", "publishing", "selftest", "top"}
    ),
    "doctor": frozenset({"__init__", "allocator"}),
    "page": frozenset({"plots"}),
    "distributed": frozenset({"_torch"}),
    "compat": frozenset({"_core", "_torch"}),
}
#: Module -> modules that it may import for type checkers only as well.
PY_TYPES: dict[str, frozenset[str]] = {
    "stats": frozenset({"_core"}),
    "guard": frozenset({"_core", "stats"}),
    "devices": frozenset({"_core"}),
    "tags": frozenset({"_core"}),
    "sleep_plan": frozenset({"_core"}),
    "exact_tensor": frozenset({"allocator"}),
    "backup_view": frozenset({"_core"}),
    "preserve": frozenset({"allocator"}),
    "exports": frozenset({"_core"}),
    "transition": frozenset({"_core", "allocator"}),
    "adopt": frozenset({"allocator"}),
    "training": frozenset({"allocator"}),
    "scope": frozenset({"_torch", "allocator"}),
    "graph_pool": frozenset({"_core", "_torch"}),
    "sharing": frozenset({"allocator"}),
    "endpoint": frozenset({"_core"}),
    "waking": frozenset({"_core"}),
    "compat": frozenset({"stats"}),
    "prometheus": frozenset({"allocator"}),
    "progress": frozenset({"allocator"}),
    "doctor": frozenset({"allocator"}),
    "cli": frozenset({"doctor", "selftest"}),
}
#: Modules that torch may be imported by when they are imported themselves (R11).
PY_WITH_TORCH = frozenset({"_torch", "adopt", "training", "demo", "selftest", "bench"})

#: The module that may touch what torch does not promise.
TORCH_MODULE = "_torch"
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

    def __init__(self, module: str, names: frozenset[str]) -> None:
        self.names = names  # modules of the package
        self.module = module
        self.imports: list[tuple[int, str, str]] = []  # line, module, when: top, lazy or types
        self.torch: list[tuple[int, str]] = []  # line, dotted path that starts with torch
        self.torch_at_top: list[int] = []
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
            base = f"cumempool.{base}" if base else "cumempool"
        for name in node.names:
            self.imported(node.lineno, f"{base}.{name.name}")

    def imported(self, line: int, path: str) -> None:
        package, _, rest = path.partition(".")
        if package == "torch":
            self.torch.append((line, path))
            self.torch_at_top += [line] if self.when == "top" else []
        elif package == "cumempool":
            first = rest.partition(".")[0]
            self.imports.append((line, first if first in self.names else "__init__", self.when))

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
        allowed = PY_ALLOWED.get(self.module)
        if allowed is None:
            yield "has no layer; give it one in PY_ALLOWED"
            return
        lazy = allowed | PY_LAZY.get(self.module, frozenset())
        by_when = {"top": allowed, "lazy": lazy}
        by_when["types"] = lazy | PY_TYPES.get(self.module, frozenset())
        for line, target, when in self.imports:
            if target != self.module and target not in by_when[when]:
                yield f"line {line} imports {target} ({when})"
        if self.module not in PY_WITH_TORCH:
            yield from (f"line {line} imports torch at the top" for line in self.torch_at_top)
        if self.module != TORCH_MODULE:
            yield from (
                f"line {line} touches {path}" for line, path in self.torch if is_internal(path)
            )


def is_internal(path: str) -> bool:
    parts = path.split(".")
    private = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return private or any(path == name or path.startswith(f"{name}.") for name in TORCH_INTERNALS)


def python_violations(root: Path) -> list[str]:
    package = root / "src" / "cumempool"
    files = sorted([*package.rglob("*.py"), *package.rglob("*.pyi")])
    names = frozenset({module_of(package, path) for path in files} | {"_core", *PY_ALLOWED})
    found = []
    for path in files:
        reader = ModuleReader(module_of(package, path), names)
        reader.read(ast.parse(path.read_text(encoding="utf-8")))
        found += [f"{path.relative_to(root).as_posix()}: {text}" for text in reader.violations()]
    return found


def module_of(package: Path, path: Path) -> str:
    """The layer of a file: its module, or the subpackage that it lies in."""
    return path.relative_to(package).parts[0].removesuffix(".pyi").removesuffix(".py")


# ---- the project


def test_cpp_folders_include_downwards_only() -> None:
    assert any((ROOT / "cpp").rglob("*.cpp"))
    assert cpp_violations(ROOT) == []


def test_python_modules_import_downwards_only() -> None:
    assert (ROOT / "src" / "cumempool" / "errors.py").is_file()
    assert python_violations(ROOT) == []


# ---- the checks themselves


def plant(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cpp/driver/a.hpp", '#include "vmm/reservation.hpp"'),
        ("cpp/vmm/a.cpp", '#include "pool/registry.hpp"'),
        ("cpp/backup/a.cpp", '  #  include "pool/registry.hpp"'),
        ("cpp/pool/a.cpp", '#include "torch/slots.hpp"'),
        ("cpp/torch/a.cpp", '#include "abi/guard.hpp"'),
        ("cpp/abi/a.cpp", '#include "torch/slots.hpp"'),
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


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("errors", "import cumempool.report"),
        ("report", "from cumempool.config import CuMemConfig"),
        ("config", "from cumempool.probe import probe"),
        ("config", "def f():\n    from cumempool._torch import x"),
        ("config", "if TYPE_CHECKING:\n    from cumempool._torch import x"),
        ("probe", "from . import allocator"),
        ("probe", "from .allocator import CuMemAllocator"),
        ("probe", "from cumempool import CuMemAllocator"),
        ("adopt", "from cumempool.allocator import CuMemAllocator"),
        ("adopt", "def f():\n    from cumempool.allocator import CuMemAllocator"),
        ("allocator", "from cumempool import _core"),
        ("backup", "from cumempool.config import CuMemConfig"),
        ("waking", "from cumempool import _core"),
        ("waking", "if TYPE_CHECKING:\n    from cumempool.allocator import CuMemAllocator"),
        ("allocator", "import importlib\nimportlib.import_module('cumempool.cli')"),
        ("__init__", "from cumempool.demo import main"),
        ("sidecar", "import os"),
        ("folder/thing", "import os"),
        ("compat/thing", "from cumempool.demo import run_demo"),
        ("demo", "import torch\ntorch._C._cuda_beginAllocateToPool(0, 0)"),
        ("demo", "import torch as t\nt.cuda.MemPool()"),
        ("allocator", "import torch"),
        ("probe", "import torch.nn"),
        ("_torch", "from cumempool import _core"),
        ("demo", "import torch\npool = torch.cuda.memory.CUDAPluggableAllocator"),
        ("demo", "import torch.cuda.memory"),
        ("demo", "from torch.cuda import MemPool"),
        ("demo", "from torch.cuda.memory import CUDAPluggableAllocator"),
        ("demo", "from torch import _C"),
        ("demo", "from torch import cuda\ncuda.memory._snapshot()"),
        ("demo", "import torch\ngetattr(torch, '_C')"),
        ("demo", "def f():\n    return torch.cuda._lazy_init()\nimport torch"),
    ],
)
def test_a_planted_import_or_attribute_is_caught(tmp_path: Path, module: str, code: str) -> None:
    for name in PY_ALLOWED:
        plant(tmp_path, f"src/cumempool/{name}.py", "")
    plant(tmp_path, f"src/cumempool/{module}.py", f"{code}\n")
    assert len(python_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("config", "def f():\n    from cumempool.probe import probe"),
        ("adopt", "if TYPE_CHECKING:\n    from cumempool.allocator import CuMemAllocator"),
        ("probe", "def f():\n    from cumempool import _core, _torch"),
        ("allocator", "def f():\n    import torch\n    from cumempool.training import f"),
        ("allocator", "if TYPE_CHECKING:\n    import torch"),
        ("_torch", "import torch\nfrom torch.cuda.memory import MemPool\ntorch._C.x"),
        ("demo", "import torch\ntorch.cuda.memory_allocated()\ntorch.__version__"),
        ("demo", "self._C.memory._snapshot()"),
        ("cli", "def f():\n    from cumempool.demo import run_demo"),
    ],
)
def test_an_import_along_the_arrows_passes(tmp_path: Path, module: str, code: str) -> None:
    for name in PY_ALLOWED:
        plant(tmp_path, f"src/cumempool/{name}.py", "")
    plant(tmp_path, f"src/cumempool/{module}.py", f"{code}\n")
    assert python_violations(tmp_path) == []
