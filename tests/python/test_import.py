"""What importing costs (R11), and what the public names say of themselves (R15)."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import pytest
from conftest import RunPython

import cumempool

PUBLIC = [name for name in cumempool.__all__ if not name.startswith("__")]


def test_importing_touches_neither_torch_nor_a_driver(run_python: RunPython) -> None:
    code = """
import pathlib, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "ctypes.dlopen" else None)
import cumempool
cumempool.CuMemConfig(driver="host")
for name in ("torch", "numpy", "rich", "click", "cumempool._core", "cumempool._torch"):
    assert name not in sys.modules, name
assert not opened, opened
maps = pathlib.Path("/proc/self/maps").read_text()
assert "libcuda" not in maps and "libcumempool" not in maps
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_loading_the_library_opens_no_driver(run_python: RunPython) -> None:
    code = """
import pathlib
from cumempool import _core
assert _core.slot_count() == 64
assert "libcuda.so" not in pathlib.Path("/proc/self/maps").read_text()
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_the_host_driver_opens_no_libcuda(run_python: RunPython) -> None:
    code = """
import cumempool, pathlib
alloc = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="host"))
alloc.empty(3)
assert "libcuda.so" not in pathlib.Path("/proc/self/maps").read_text()
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_all_is_sorted_complete_and_importable() -> None:
    assert list(cumempool.__all__) == sorted(set(cumempool.__all__), key=cumempool.__all__.index)
    for name in cumempool.__all__:
        assert hasattr(cumempool, name)
    public = {
        name
        for name, value in vars(cumempool).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("cumempool")
    }
    assert public == set(PUBLIC)
    assert set(cumempool.__all__) <= set(dir(cumempool))
    with pytest.raises(AttributeError, match="has no attribute 'CuMemAlocator'"):
        cumempool.CuMemAlocator  # noqa: B018


MOVED = ["backup", "doctor", "events", "kv_transfer", "machine", "nixl", "progress", "prometheus"]
MOVED += ["report", "scope", "selftest", "stats"]


@pytest.mark.parametrize("name", MOVED)
def test_modules_that_moved_are_found_by_their_old_names(run_python: RunPython, name: str) -> None:
    done = run_python(f"import cumempool; print(cumempool.{name}.__name__)")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(rf"cumempool\.(_pool|integrations|tools)\.{name}\n", done.out)


def test_importing_loads_few_modules_in_little_time(run_python: RunPython) -> None:
    code = """
import sys, time
begin = time.process_time()
import cumempool
seconds = time.process_time() - begin
ours = [name for name in sys.modules if name.partition(".")[0] == "cumempool"]
assert len(ours) <= 16, sorted(ours)
print(seconds)
"""
    done = [run_python(code) for _ in range(5)]
    assert {(one.code, one.err) for one in done} == {(0, "")}
    assert min(float(one.out) for one in done) <= 0.06


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name: str) -> None:
    thing = getattr(cumempool, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        assert thing.__dict__.get("__doc__"), "its own, not an inherited one"
        for member, value in public_members(thing):
            assert inspect.getdoc(value), f"{name}.{member}"


def public_members(thing: type) -> Iterator[tuple[str, object]]:
    ours = [vars(kind) for kind in thing.__mro__ if kind.__module__.startswith("cumempool.")]
    for member, value in (item for names in ours for item in names.items()):
        documented = isinstance(value, (property, classmethod, staticmethod))
        if not member.startswith("_") and (documented or inspect.isfunction(value)):
            yield member, value


@pytest.mark.parametrize(
    "name", [name for name in PUBLIC if dataclasses.is_dataclass(getattr(cumempool, name))]
)
def test_every_field_of_a_record_is_in_its_docstring(name: str) -> None:
    record = getattr(cumempool, name)
    text = inspect.getdoc(record) or ""
    for field in dataclasses.fields(record):
        assert f"{field.name}:" in text, field.name


@pytest.mark.parametrize(
    "function",
    [
        *(
            value
            for _, value in public_members(cumempool.CuMemAllocator)
            if not isinstance(value, property)
        ),
        cumempool.probe,
        cumempool.is_available,
        cumempool.MemoryPoolScope,
    ],
    ids=lambda value: getattr(value, "__qualname__", repr(value)),
)
def test_every_argument_of_the_allocator_is_in_its_docstring(function: object) -> None:
    function = getattr(function, "__func__", function)
    assert callable(function)
    text = inspect.getdoc(function) or ""
    names = [name for name in inspect.signature(function).parameters if name not in {"self", "cls"}]
    public = function not in {cumempool.MemoryPoolScope, cumempool.is_available}
    if public and len(names) > 1:
        assert [name for name in names if f"{name}:" not in text] == []


def test_the_records_are_frozen() -> None:
    for name in PUBLIC:
        thing = getattr(cumempool, name)
        if dataclasses.is_dataclass(thing):
            assert thing.__dataclass_params__.frozen, name  # type: ignore[union-attr]


def test_every_exception_is_a_cumempool_error() -> None:
    errors = [getattr(cumempool, name) for name in PUBLIC if name.endswith("Error")]
    assert len(errors) > 10
    assert all(issubclass(error, cumempool.CumempoolError) for error in errors)


@pytest.mark.extensive
def test_no_module_of_the_package_does_anything_when_it_is_imported(run_python: RunPython) -> None:
    """R11: but for the one that needs vLLM."""
    code = """
import importlib, pathlib, pkgutil, threading
import cumempool
names = [found.name for found in pkgutil.walk_packages(cumempool.__path__, "cumempool.")]
assert "cumempool.__main__" in names and "cumempool.compat.vllm" in names, names
for name in names:
    if name != "cumempool.compat.vllm_backend":
        importlib.import_module(name)
assert "libcuda.so" not in pathlib.Path("/proc/self/maps").read_text()
assert cumempool.CuMemAllocator._instance is None
assert threading.active_count() == 1, threading.enumerate()
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")
