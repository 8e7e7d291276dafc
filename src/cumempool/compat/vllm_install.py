"""Puts a module in the place of vLLM's allocator, and follows vLLM's choice of a backend."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from cumempool._locks import fork_safe_lock
from cumempool.errors import InUseError, InvalidArgumentError, UnavailableError

_logger = logging.getLogger("cumempool")

BACKEND: Final = "cumempool"
"""The name of the sleep-mode backend, and of the plugin."""

_PACKAGE: Final = "vllm.device_allocator"
MODULE: Final = f"{_PACKAGE}.cumem"
_WORKERS: Final = "vllm.v1.worker.worker_base"

#: Functions of vLLM's package that its allocator must call.
_HONOURED: Final = frozenset({"run_before_unmap_hooks", "run_after_map_hooks"})

_install_lock = fork_safe_lock()
_undo = contextlib.ExitStack()  # closed by `uninstall`


def is_in_place(this: ModuleType) -> bool:
    """Returns whether vLLM finds a module in the place of its own."""
    return sys.modules.get(MODULE) is this


def put_in_place(this: ModuleType) -> None:
    """Installs a module; see `cumempool.compat.vllm.install`."""
    if is_in_place(this):
        return
    try:
        package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise UnavailableError(
            f"install: {_PACKAGE} cannot be imported: {error}",
            operation="install",
            advice="install vLLM 0.33 or newer",
        ) from error
    with _install_lock:
        if is_in_place(this):
            return
        replaced = sys.modules.get(MODULE)
        refuse_own_memory("install", replaced, this)
        _refuse_unknown_surface(package, this)
        _replace(package, "cumem", this)
        if replaced is not None:
            _replace(
                replaced.CuMemAllocator,
                "get_instance",
                staticmethod(this.CuMemAllocator.get_instance),
            )
            _replace(replaced, "CuMemAllocator", this.CuMemAllocator)
            _undo.callback(sys.modules.__setitem__, MODULE, replaced)
        else:
            _undo.callback(sys.modules.pop, MODULE, None)
        sys.modules[MODULE] = this


def take_back() -> None:
    """Undoes `put_in_place`."""
    with _install_lock:
        _undo.close()


def _replace(owner: Any, name: str, value: object) -> None:
    """Sets an attribute until `uninstall`."""
    if name in vars(owner):
        _undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        _undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def their_hooks(name: str) -> Callable[..., None] | None:
    """Returns a function of vLLM's package that its allocator must call, if there is one."""
    found: Callable[..., None] | None = getattr(sys.modules.get(_PACKAGE), name, None)
    return found


def _refuse_unknown_surface(package: ModuleType, this: ModuleType) -> None:
    """Raises if vLLM's own module has public functions or methods that `this` does not know."""
    unknown = [
        f"{_PACKAGE}.{name}"
        for name in vars(package)
        if name.startswith("run_") and name not in _HONOURED
    ]
    spec = importlib.util.find_spec(MODULE)
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        unknown += [
            f"{MODULE}.{name}" for name in _public_functions(tree) if not hasattr(this, name)
        ]
        unknown += [
            f"{MODULE}.CuMemAllocator.{name}"
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == "CuMemAllocator"
            for name in _public_functions(node)
            if not hasattr(this.CuMemAllocator, name)
        ]
    if unknown:
        advice = "install a newer cumempool, or use vLLM's own backend"
        raise UnavailableError(
            f"install: this vLLM has names that this version of cumempool does not know: "
            f"{', '.join(sorted(unknown))}; {advice}",
            operation="install",
            advice=advice,
        )


def _public_functions(node: ast.Module | ast.ClassDef) -> list[str]:
    return [
        inner.name
        for inner in node.body
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not inner.name.startswith("_")
    ]


def refuse_own_memory(operation: str, module: ModuleType | None, this: ModuleType) -> None:
    """Raises if vLLM's own allocator, another than `this`, holds memory."""
    allocator = getattr(getattr(module, "CuMemAllocator", None), "instance", None)
    if module is this or allocator is None:
        return
    used = allocator.get_current_usage()
    if used:
        advice = (
            "start vLLM with --sleep-mode-backend cumempool, or call "
            "cumempool.compat.vllm.install() before the model is loaded"
        )
        raise InUseError(
            f"{operation}: vLLM's own allocator holds {used} bytes, which cumempool cannot reach; "
            f"{advice}",
            operation=operation,
            bytes=used,
            advice=advice,
        )


# ---- the plugin ----------------------------------------------------------------------------------

_followed: list[type] = []  # worker classes that install if the backend is selected


def add_plugin(this: ModuleType) -> None:
    """Registers a module's plugin; see `cumempool.compat.vllm.register`."""
    try:
        backends = importlib.import_module(f"{_PACKAGE}.sleep_mode_backend")
    except ImportError as error:
        _logger.warning("this vLLM takes no sleep-mode backends: %s", error)
    else:
        _register_backend(backends.SleepModeBackendFactory, this)
        _follow_selection(this.install)
    if BACKEND in os.environ.get("VLLM_PLUGINS", "").split(","):
        this.install()


def _register_backend(factory: Any, this: ModuleType) -> None:
    module, name = f"{this.__name__}_backend", "CumempoolBackend"
    try:
        factory.register_backend(BACKEND, module, name)
    except ValueError:
        found = factory.get_backend_class(BACKEND)
        if (found.__module__, found.__name__) != (module, name):
            raise InvalidArgumentError(
                f"the sleep-mode backend {BACKEND!r} is registered already, as {found!r}"
            ) from None


def _follow_selection(install: Callable[[], None]) -> None:
    """Makes a worker install before it allocates, if its configuration selects the backend.

    Only the worker knows its configuration. If that selects another backend, the worker restores
    its class.
    """
    try:
        wrapper = importlib.import_module(_WORKERS).WorkerWrapperBase
    except (ImportError, AttributeError) as error:
        _logger.warning("workers of this vLLM cannot be followed: %s", error)
        return
    if wrapper in _followed:
        return
    init_device = wrapper.init_device

    @functools.wraps(init_device)
    def install_and_init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(self.vllm_config, "model_config", None)
        if getattr(model, "sleep_mode_backend", None) == BACKEND:
            install()
        elif wrapper.init_device is install_and_init_device:
            wrapper.init_device = init_device
            _followed.remove(wrapper)
        return init_device(self, *args, **kwargs)

    wrapper.init_device = install_and_init_device
    _followed.append(wrapper)
