"""vLLM's allocator interface over ours: the surface, the plugin, and what each call does."""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GRANULE, MIB, RunPython, assert_nothing_is_held, random_bytes
from refusals import refuses
from simulated_cuda import SimulatedCuda

from cumempool import (
    CuMemAllocator,
    DriverError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
    UnavailableError,
    UnsupportedError,
)
from cumempool.compat import vllm as compat

pytestmark = pytest.mark.extensive

ROOT = Path(__file__).resolve().parents[2]
#: A folder with vLLM's own files, as its wheel has them, or None.
FILES = os.environ.get("CUMEMPOOL_VLLM_FILES")
RECORDED = ROOT / "tests" / "data" / "vllm_surface.json"

needs_files = pytest.mark.skipif(
    FILES is None, reason="CUMEMPOOL_VLLM_FILES names no folder with vLLM's own files"
)

#: A package vllm that has what the plugin and the programs here meet of it.
STAND_IN = ROOT / "tests" / "data" / "vllm_stand_in"


# ---- fixtures


@pytest.fixture(autouse=True)
def host_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The shared allocator on one simulated device of 64 MiB; afterwards nothing may be held."""
    monkeypatch.delenv("CUMEMPOOL_VLLM_FILES", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "host")
    monkeypatch.setenv("CUMEMPOOL_HOST_DRIVER_BYTES", "64MiB")
    monkeypatch.setattr(compat.CuMemAllocator, "instance", None)
    monkeypatch.setattr(compat, "cumem_available", True)
    yield
    gc.collect()
    made = CuMemAllocator._instance
    if made is not None:
        made.close()
        assert_nothing_is_held(made.stats())


@pytest.fixture
def allocator() -> compat.CuMemAllocator:
    return compat.CuMemAllocator.get_instance()


@pytest.fixture(params=["stand-in", pytest.param("wheel", marks=needs_files)])
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package vllm as it can be imported: a stand-in, or files of the wheel."""
    before = dict(sys.modules)
    forget_vllm()
    monkeypatch.syspath_prepend(str(STAND_IN) if request.param == "stand-in" else FILES)
    yield
    compat.uninstall()
    forget_vllm()
    sys.modules.update({name: before[name] for name in before if is_of_vllm(name)})


def is_of_vllm(name: str) -> bool:
    return name.partition(".")[0] == "vllm" or name == "cumempool.compat.vllm_backend"


def forget_vllm() -> None:
    for name in [name for name in sys.modules if is_of_vllm(name)]:
        del sys.modules[name]


def tensor(count: int, tag: str, seed: int = 0) -> torch.Tensor:
    compat.CuMemAllocator.get_instance()  # made with the settings of the environment
    made = CuMemAllocator.get_instance().empty(count, dtype=torch.uint8, tag=tag)
    return made.copy_(random_bytes(count, seed))


def asleep(allocator: compat.CuMemAllocator) -> dict[str, bool]:
    return {data.tag: data.is_asleep for data in allocator.pointer_to_data.values()}


def backup_bytes(allocator: compat.CuMemAllocator) -> dict[str, int | None]:
    return {
        data.tag: None if data.cpu_backup_tensor is None else data.cpu_backup_tensor.nbytes
        for data in allocator.pointer_to_data.values()
    }


# ---- the surface


def surface_of(files: Path) -> dict[str, Any]:
    path = ROOT / "scripts" / "vllm_surface.py"
    spec = importlib.util.spec_from_file_location("vllm_surface", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found: dict[str, Any] = json.loads(json.dumps(script.surface(files, "0.33.0")))
    return found


def recorded_or_real() -> dict[str, Any]:
    if FILES is not None:
        return surface_of(Path(FILES))
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


MODULES = recorded_or_real()["modules"]
PACKAGE = MODULES["vllm.device_allocator"]
CUMEM = MODULES["vllm.device_allocator.cumem"]
THEIR_CLASS = CUMEM["classes"]["CuMemAllocator"]
THEIR_BACKEND = MODULES["vllm.device_allocator.sleep_mode_backend"]["classes"]


def parameters(function: Callable[..., Any]) -> list[list[str | None]]:
    return [
        [name, found.kind.name, None if found.default is found.empty else repr(found.default)]
        for name, found in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    ]


def kind(owner: type, name: str) -> str:
    for of in (staticmethod, classmethod, property):
        if isinstance(inspect.getattr_static(owner, name), of):
            return of.__name__
    return "method"


@needs_files
def test_the_recorded_surface_is_that_of_the_files() -> None:
    assert FILES is not None
    assert surface_of(Path(FILES)) == json.loads(RECORDED.read_text(encoding="utf-8"))


def test_the_surface_is_that_of_the_version_in_the_issue() -> None:
    assert json.loads(RECORDED.read_text(encoding="utf-8"))["version"] == "0.33.0"
    assert len(THEIR_CLASS["methods"]) == 9


@pytest.mark.parametrize("name", CUMEM["functions"])
def test_functions_take_the_same_arguments(name: str) -> None:
    assert parameters(getattr(compat, name)) == CUMEM["functions"][name]


@pytest.mark.parametrize("name", THEIR_CLASS["methods"])
def test_methods_take_the_same_arguments(name: str) -> None:
    theirs = THEIR_CLASS["methods"][name]
    assert kind(compat.CuMemAllocator, name) == theirs["kind"]
    assert parameters(getattr(compat.CuMemAllocator, name)) == theirs["parameters"]


def test_values_and_attributes_are_there(allocator: compat.CuMemAllocator) -> None:
    assert [name for name in CUMEM["values"] if not hasattr(compat, name)] == []
    assert set(CUMEM["classes"]) == {"CuMemAllocator"}
    for name, value in THEIR_CLASS["attributes"].items():
        if name != "instance":  # made by now
            assert repr(getattr(compat.CuMemAllocator, name)) == value
    # Callbacks of their extension module: malloc and free of ours never enter Python.
    left_out = {"python_malloc_callback", "python_free_callback"}
    assert [n for n in THEIR_CLASS["instance_attributes"] if not hasattr(allocator, n)] == sorted(
        left_out
    )


def test_what_their_package_defines_and_their_module_passes_on() -> None:
    assert repr(compat.DEFERRABLE_TAGS) == PACKAGE["values"]["DEFERRABLE_TAGS"]
    record = compat.AllocationData((0, 1, 2, 0), "t")
    for name, value in PACKAGE["classes"]["AllocationData"]["attributes"].items():
        assert hasattr(record, name)
        if value is not None:
            assert repr(getattr(record, name)) == value
    assert list(inspect.signature(compat.AllocationData).parameters) == [
        "handle",
        "tag",
        "cpu_backup_tensor",
        "is_asleep",
    ]
    for name in ("use_memory_pool", "sleep", "discard", "wake_up", "get_current_usage"):
        theirs = PACKAGE["classes"]["MemAllocator"]["methods"][name]["parameters"]
        assert parameters(getattr(compat.CuMemAllocator, name)) == theirs


def test_the_backend_has_the_methods_of_theirs() -> None:
    tree = ast.parse((ROOT / "src/cumempool/compat/vllm_backend.py").read_text(encoding="utf-8"))
    (ours,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [ast.unparse(base) for base in ours.bases] == ["SleepModeBackend"]
    defined = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)}
    assert set(THEIR_BACKEND["CuMemBackend"]["methods"]) <= defined
    newer = {"__init__", "preserves_nccl", "supports_selective_offload"}
    assert defined <= set(THEIR_BACKEND["SleepModeBackend"]["methods"]) | newer


def test_a_surface_that_differs_is_seen(tmp_path: Path) -> None:
    for name in ("__init__", "cumem", "sleep_mode_backend"):
        path = tmp_path / "vllm" / "device_allocator" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "class A:\n    x = 1\n    @staticmethod\n    def f(a, /, b=2, *c, d, **e): ...\n"
            "try:\n    y = z()\nexcept OSError:\n    y = None\n"
        )
    found = surface_of(tmp_path)["modules"]["vllm.device_allocator.cumem"]
    assert found["values"] == {"y": "None"}
    assert found["classes"]["A"]["attributes"] == {"x": "1"}
    assert found["classes"]["A"]["methods"]["f"] == {
        "kind": "staticmethod",
        "parameters": [
            ["a", "POSITIONAL_ONLY", None],
            ["b", "POSITIONAL_OR_KEYWORD", "2"],
            ["c", "VAR_POSITIONAL", None],
            ["d", "KEYWORD_ONLY", None],
            ["e", "VAR_KEYWORD", None],
        ],
    }


# ---- instances


def test_there_is_one_instance_over_the_shared_allocator() -> None:
    assert compat.CuMemAllocator.instance is None
    found: list[compat.CuMemAllocator] = []
    threads = [
        threading.Thread(target=lambda: found.append(compat.CuMemAllocator.get_instance()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(map(id, found)) == {id(compat.CuMemAllocator.instance)}
    held = tensor(100, "weights")
    assert found[0].get_current_usage() == GRANULE
    assert compat.CuMemAllocator().get_current_usage() == GRANULE  # a second one is no failure
    del held


def test_settings_come_from_the_environment() -> None:
    compat.CuMemAllocator.get_instance()
    config = CuMemAllocator.get_instance().config
    assert (config.driver, config.host_driver_bytes) == ("host", 64 * MIB)


def test_it_works_again_after_the_shared_allocator_was_closed(
    allocator: compat.CuMemAllocator,
) -> None:
    CuMemAllocator.get_instance().close()
    again = tensor(100, "weights")
    assert compat.CuMemAllocator.get_instance() is allocator
    assert allocator.get_current_usage() == GRANULE
    del again


def test_an_unusable_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "nonsense")
    with refuses(InvalidArgumentError, names="CUMEMPOOL_DRIVER"):
        compat.CuMemAllocator.get_instance()


def test_availability_follows_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat._find_out() is True
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "cuda")
    opened: list[str] = []

    def no_library(name: str) -> None:
        opened.append(name)
        raise OSError("not there")

    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert compat._find_out() is False
    assert opened == ["libcuda.so.1"]


def test_the_import_starts_nothing_and_survives_a_fork(run_python: RunPython) -> None:
    done = run_python(
        "import os, sys, cumempool.compat.vllm as compat\n"
        "assert 'torch' not in sys.modules and 'vllm' not in sys.modules\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    compat.CuMemAllocator.get_instance().get_current_usage()\n"
        "    os._exit(7)\n"
        "print(compat.cumem_available, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert (done.code, done.err, done.out.split()) == (0, "", ["True", "7"])


# ---- allocating


def test_scopes_set_the_tag_and_an_error_inside_leaves_them(
    allocator: compat.CuMemAllocator,
) -> None:
    assert allocator.current_tag == "default"
    with allocator.use_memory_pool("weights"):
        with allocator.use_memory_pool(tag="kv_cache"):
            assert allocator.current_tag == "kv_cache"
        with allocator.use_memory_pool():
            assert allocator.current_tag == "default"
        with pytest.raises(KeyError, match="within"), allocator.use_memory_pool("runtime"):
            raise KeyError("within")
        assert allocator.current_tag == "weights"
        held = CuMemAllocator.get_instance().empty(1)
    assert allocator.current_tag == "default"
    (data,) = allocator.pointer_to_data.values()
    assert (data.tag, data.is_asleep, data.cpu_backup_tensor) == ("weights", False, None)
    assert data.handle == (0, GRANULE, held.data_ptr(), 0)
    allocator.sleep()  # no scope is left open


def test_a_tag_that_is_no_text_is_refused(allocator: compat.CuMemAllocator) -> None:
    with pytest.raises(InvalidTypeError), allocator.use_memory_pool(3):  # type: ignore[arg-type]
        pass
    assert allocator.allocator_and_pools == {}


def test_usage_is_exact_and_counts_what_sleeps(allocator: compat.CuMemAllocator) -> None:
    assert allocator.get_current_usage() == 0
    a, b = tensor(3 * MIB, "weights"), tensor(5 * MIB, "kv_cache")
    assert allocator.get_current_usage() == (4 + 6) * MIB
    allocator.sleep("weights")
    assert allocator.get_current_usage() == (4 + 6) * MIB
    del b
    assert allocator.get_current_usage() == 4 * MIB
    del a
    assert allocator.get_current_usage() == 0


def test_the_table_of_allocations_cannot_be_written_to(allocator: compat.CuMemAllocator) -> None:
    held = tensor(1, "t")
    table = allocator.pointer_to_data
    with pytest.raises(TypeError):
        table[0] = compat.AllocationData((0, 0, 0, 0), "t")  # type: ignore[index]
    with pytest.raises(AttributeError):
        table[held.data_ptr()].is_asleep = True  # type: ignore[misc]


def test_entries_are_counted_and_take_no_memory_until_the_pools_are_released(
    allocator: compat.CuMemAllocator,
) -> None:
    for _ in range(100):
        with allocator.use_memory_pool("workspace"):
            pass
    assert allocator.allocator_and_pools == {"workspace": [(None, None)] * 100}
    assert allocator._entered == {"workspace": 100}
    allocator.release_pools()
    assert allocator.allocator_and_pools == {}


# ---- sleep, discard, wake


@pytest.mark.parametrize(
    ("offload", "kept"),
    [
        (None, {"default"}),
        ("weights", {"weights"}),
        (("weights", "kv_cache"), {"weights", "kv_cache"}),
        (["weights"], {"weights"}),
        ((), set()),
        (("weights", "runtime", "cudagraph", "weights"), {"weights"}),
        ("nobody has heard of it", set()),
    ],
)
def test_sleep_keeps_the_named_tags_and_discards_all_others(
    allocator: compat.CuMemAllocator, offload: Any, kept: set[str]
) -> None:
    tags = ("default", "weights", "kv_cache")
    tensors = {tag: tensor(3 * MIB, tag, seed) for seed, tag in enumerate(tags)}
    addresses = {tag: tensors[tag].data_ptr() for tag in tags}
    assert allocator.sleep(offload) is None
    assert asleep(allocator) == dict.fromkeys(tags, True)
    sizes = backup_bytes(allocator)
    assert {tag for tag, size in sizes.items() if size is not None} == kept
    assert all(size >= 3 * MIB for size in sizes.values() if size is not None)
    assert CuMemAllocator.get_instance().stats().physical_bytes == 0
    assert allocator.wake_up() is None
    assert asleep(allocator) == dict.fromkeys(tags, False)
    assert {tag: tensors[tag].data_ptr() for tag in tags} == addresses
    for seed, tag in enumerate(tags):
        if tag in kept:
            assert torch.equal(tensors[tag], random_bytes(3 * MIB, seed))


def test_the_policy_of_a_tag_does_not_count(allocator: compat.CuMemAllocator) -> None:
    with CuMemAllocator.get_instance().use_memory_pool("weights", on_sleep="discard"):
        weights = tensor(100, "weights")
    allocator.sleep(("weights",))
    allocator.wake_up()
    assert torch.equal(weights, random_bytes(100))


def test_sleeping_twice_keeps_the_backup_that_is_there(
    allocator: compat.CuMemAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tensor(100, "weights")
    allocator.sleep("weights")
    caplog.clear()
    allocator.sleep("weights")
    assert caplog.messages == []
    allocator.sleep(())
    allocator.discard("weights")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert all("slept already" in message for message in caplog.messages)
    allocator.wake_up()
    assert torch.equal(weights, random_bytes(100))


def test_what_was_discarded_stays_so(
    allocator: compat.CuMemAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tensor(100, "kv_cache")
    allocator.discard(("kv_cache",))
    allocator.sleep("kv_cache")
    assert "slept already" in caplog.text
    assert backup_bytes(allocator) == {"kv_cache": None}
    del cache


def test_discard_takes_the_named_tags_only(allocator: compat.CuMemAllocator) -> None:
    weights, cache = tensor(100, "weights"), tensor(100, "kv_cache")
    allocator.discard("kv_cache")
    assert asleep(allocator) == {"weights": False, "kv_cache": True}
    assert torch.equal(weights, random_bytes(100))
    allocator.discard(("nobody has heard of it",))
    allocator.discard(())
    assert asleep(allocator) == {"weights": False, "kv_cache": True}
    allocator.wake_up(["kv_cache"])
    cache.fill_(5)
    assert int(cache.sum()) == 500


def test_a_wake_by_tags_defers_weights_and_cache_only(allocator: compat.CuMemAllocator) -> None:
    tags = ("weights", "kv_cache", "runtime", "default")
    tensors = {tag: tensor(100, tag, seed) for seed, tag in enumerate(tags)}
    allocator.sleep(("weights", "runtime"))
    allocator.wake_up(tags=["weights"])
    assert asleep(allocator) == {
        "weights": False,
        "kv_cache": True,
        "runtime": False,
        "default": False,
    }
    assert torch.equal(tensors["weights"], random_bytes(100, 0))
    assert torch.equal(tensors["runtime"], random_bytes(100, 2))
    allocator.wake_up(tags=["kv_cache"])
    assert not any(asleep(allocator).values())
    allocator.sleep(tags)
    allocator.wake_up([])
    assert [tag for tag, sleeps in asleep(allocator).items() if sleeps] == ["weights", "kv_cache"]
    allocator.wake_up("weights")  # type: ignore[arg-type]  # where theirs looks for substrings
    assert [tag for tag, sleeps in asleep(allocator).items() if sleeps] == ["kv_cache"]
    allocator.wake_up()
    assert not any(asleep(allocator).values())
    assert torch.equal(tensors["weights"], random_bytes(100, 0))


def test_calls_on_nothing_do_nothing(allocator: compat.CuMemAllocator) -> None:
    allocator.sleep()
    allocator.discard("weights")
    allocator.wake_up()
    allocator.wake_up(["weights"])
    stats = CuMemAllocator.get_instance().stats()
    assert (stats.sleeps, stats.wakes) == (0, 0)


@pytest.mark.parametrize("tags", [3, (3,), [None]])
def test_tags_that_are_none_are_refused(allocator: compat.CuMemAllocator, tags: Any) -> None:
    held = tensor(1, "t")
    for call in (allocator.sleep, allocator.discard, allocator.wake_up):
        with refuses(InvalidTypeError, names="tag"):
            call(tags)
    assert asleep(allocator) == {"t": False}
    del held


def test_a_wake_without_room_is_a_runtime_error_and_nothing_sticks(
    allocator: compat.CuMemAllocator,
) -> None:
    weights = tensor(40 * MIB, "weights")
    allocator.sleep("weights")
    other = CuMemAllocator.get_instance().empty(40 * MIB, dtype=torch.uint8, tag="other")
    for _ in range(2):
        with refuses(OutOfMemoryError, operation="wake", tag="weights", bytes=40 * MIB):
            allocator.wake_up()
    assert asleep(allocator) == {"weights": True, "other": False}
    del other
    gc.collect()
    allocator.wake_up()
    assert torch.equal(weights, random_bytes(40 * MIB))
    allocator.sleep("weights")


def test_sleep_inside_a_scope_is_refused(allocator: compat.CuMemAllocator) -> None:
    held = tensor(1, "weights")
    with (
        allocator.use_memory_pool("weights"),
        refuses(InUseError, names="scope", operation="sleep", tag="weights"),
    ):
        allocator.sleep("weights")
    assert asleep(allocator) == {"weights": False}
    del held


def test_garbage_is_not_backed_up(allocator: compat.CuMemAllocator) -> None:
    cycle: list[Any] = [tensor(100, "weights")]
    cycle.append(cycle)
    del cycle
    allocator.sleep("weights")
    assert allocator.get_current_usage() == 0


# ---- low-level calls


def test_memory_without_contents_can_be_filled_as_it_wakes(
    allocator: compat.CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, cache = tensor(100, "weights"), tensor(3 * MIB, "kv_cache")
    mapped: list[Any] = []
    original = compat.create_and_map

    def create_map_and_fill(handle: compat.HandleType) -> None:
        original(handle)
        _, size, address, _ = handle
        compat.libcudart.cudaMemset(address, 0xA5, size)
        mapped.append(handle)

    monkeypatch.setattr(compat, "create_and_map", create_map_and_fill)
    allocator.sleep("weights")
    allocator.wake_up(["weights"])
    assert mapped == []
    allocator.wake_up()
    assert mapped == [(0, 4 * MIB, cache.data_ptr(), 0)]
    assert bool((cache == 0xA5).all())
    assert torch.equal(weights, random_bytes(100))


def test_single_allocations_neither_sleep_nor_wake(allocator: compat.CuMemAllocator) -> None:
    held = tensor(100, "weights")
    handle = allocator.pointer_to_data[held.data_ptr()].handle
    compat.create_and_map(handle)
    with refuses(UnsupportedError, names=("sleep()", "discard(tags)")):
        compat.unmap_and_release(handle)
    allocator.sleep("weights")
    compat.unmap_and_release(handle)
    with refuses(UnsupportedError, names="wake_up(tags=...)"):
        compat.create_and_map(handle)
    allocator.wake_up()
    assert torch.equal(held, random_bytes(100))
    with pytest.raises(NotInPoolError):
        compat.create_and_map((0, GRANULE, 4096, 0))


def test_memory_is_copied_and_filled_by_address(allocator: compat.CuMemAllocator) -> None:
    held = tensor(100, "weights", seed=1)
    copy = torch.zeros(100, dtype=torch.uint8)
    compat.libcudart.cudaMemcpy(copy.data_ptr(), held.data_ptr(), 100)
    assert torch.equal(copy, random_bytes(100, 1))
    compat.libcudart.cudaMemset(held.data_ptr(), 7, 50)
    assert held.tolist() == [7] * 50 + copy[50:].tolist()


def test_callbacks_are_refused(allocator: compat.CuMemAllocator) -> None:
    for function in (compat.get_pluggable_allocator, compat.use_memory_pool_with_allocator):
        with refuses(UnsupportedError, names="use_memory_pool(tag)"):
            function(print, print)


# ---- graph memory and the end


def test_the_graph_pool_is_that_of_the_tag(
    allocator: compat.CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def graph_pool(self: CuMemAllocator, tag: str) -> tuple[int, int]:
        asked.append(tag)
        return (0, 42)

    monkeypatch.setattr(CuMemAllocator, "graph_pool", graph_pool)
    for _ in range(2):
        with allocator.cudagraph_pool() as identity:
            assert identity == (0, 42)
    assert asked == ["cudagraph", "cudagraph"]


def test_the_graph_pool_has_the_name_of_newer_versions_too(
    allocator: compat.CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    monkeypatch.setattr(CuMemAllocator, "graph_pool", lambda self, tag: (0, 42))
    monkeypatch.setattr(
        CuMemAllocator, "release_graph_pool", lambda self, tag: released.append(tag)
    )
    with allocator.use_cudagraph_pool((0, 7)) as identity:
        assert identity == (0, 42)
        assert allocator.current_tag == allocator.cudagraph_tag == "cudagraph"
        with allocator.use_cudagraph_pool() as again:
            assert again == identity
        assert allocator.current_tag == "cudagraph"
    assert allocator.current_tag == "default"
    allocator.release_cudagraph_pool()
    assert released == ["cudagraph"]


def test_the_host_driver_has_no_graphs(allocator: compat.CuMemAllocator) -> None:
    with (
        refuses(UnsupportedError, operation="graph_pool", tag="cudagraph"),
        allocator.cudagraph_pool(),
    ):
        pass


def test_releasing_the_pools_keeps_what_lives_and_returns_host_memory(
    allocator: compat.CuMemAllocator,
) -> None:
    allocator.release_pools()
    weights = tensor(3 * MIB, "weights")
    allocator.sleep("weights")
    allocator.release_pools()
    assert CuMemAllocator.get_instance().stats().host_bytes > 0  # the backup of what sleeps
    allocator.wake_up()
    allocator.close()
    allocator.close()
    assert CuMemAllocator.get_instance().stats().host_bytes == 0
    assert torch.equal(weights, random_bytes(3 * MIB))
    assert tensor(1, "weights").numel() == 1


def test_releasing_the_pools_makes_no_allocator() -> None:
    compat.CuMemAllocator().release_pools()
    assert CuMemAllocator._instance is None


# ---- in vLLM's place


def theirs() -> Any:
    return importlib.import_module("vllm.device_allocator")


def test_one_line_puts_it_in_place_and_one_takes_it_out(vllm: None) -> None:
    compat.install()
    compat.install()
    assert compat.installed()
    assert importlib.import_module("vllm.device_allocator.cumem") is compat
    namespace: dict[str, Any] = {}
    exec("import vllm.device_allocator.cumem as cumem", namespace)
    assert namespace["cumem"] is compat
    instance = theirs().get_mem_allocator_instance()
    assert instance is compat.CuMemAllocator.instance
    compat.uninstall()
    compat.uninstall()
    assert not compat.installed()
    assert "vllm.device_allocator.cumem" not in sys.modules
    assert not hasattr(theirs(), "cumem")


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
def test_who_has_imported_theirs_gets_ours(vllm: None) -> None:
    before = importlib.import_module("vllm.device_allocator.cumem")
    their_class = before.CuMemAllocator
    compat.install()
    assert before.CuMemAllocator is compat.CuMemAllocator
    assert their_class.get_instance() is compat.CuMemAllocator.get_instance()
    compat.uninstall()
    assert before.CuMemAllocator is their_class
    assert type(their_class.get_instance()) is their_class
    assert importlib.import_module("vllm.device_allocator.cumem") is before
    assert theirs().cumem is before


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
def test_it_is_not_put_beside_memory_of_theirs(vllm: None) -> None:
    before = importlib.import_module("vllm.device_allocator.cumem")
    before.CuMemAllocator.get_instance().used = 100
    with refuses(InUseError, operation="install", bytes=100) as caught:
        compat.install()
    assert "before the model is loaded" in caught.value.advice
    assert not compat.installed()
    assert importlib.import_module("vllm.device_allocator.cumem") is before
    before.CuMemAllocator.get_instance().used = 0
    compat.install()
    assert compat.installed()


# ---- hooks that newer versions of vLLM have, and names that are not known


@pytest.fixture
def hooks(vllm: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What the allocator has had vLLM's package call, with the tags that are awake then."""
    calls: list[tuple[str, list[str]]] = []

    def note(what: str, allocations: Any) -> None:
        calls.append((what, sorted({data.tag for data in allocations if not data.is_asleep})))

    package = theirs()
    monkeypatch.setattr(
        package,
        "run_before_unmap_hooks",
        lambda allocations, tags=None: note(f"before {tags}", allocations),
        raising=False,
    )
    monkeypatch.setattr(
        package, "run_after_map_hooks", lambda found: note("after", found), raising=False
    )
    compat.install()
    return calls


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
def test_hooks_of_vllm_are_called_around_each_transition(
    hooks: list[tuple[str, list[str]]], allocator: compat.CuMemAllocator
) -> None:
    held = tensor(100, "weights"), tensor(100, "kv_cache")
    allocator.discard("kv_cache")
    allocator.sleep("weights")
    allocator.wake_up(["weights"])
    allocator.wake_up()
    assert hooks == [
        ("before ['kv_cache']", ["kv_cache", "weights"]),
        ("before None", ["weights"]),
        ("after", ["weights"]),
        ("after", ["kv_cache", "weights"]),
    ]
    del held


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
def test_hooks_of_vllm_are_undone_where_a_sleep_fails(
    hooks: list[tuple[str, list[str]]], allocator: compat.CuMemAllocator
) -> None:
    held = tensor(100, "kv_cache")
    with (
        CuMemAllocator.get_instance().pin("kv_cache", "a transfer"),
        refuses(InUseError, names="a transfer", operation="sleep", tag="kv_cache"),
    ):
        allocator.sleep()
    assert hooks == [("before None", ["kv_cache"]), ("after", ["kv_cache"])]
    del held


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
@pytest.mark.parametrize(
    ("place", "name"),
    [("package", "run_after_trim_hooks"), ("module", "trim"), ("class", "checkpoint")],
)
def test_names_that_are_not_known_are_refused(
    vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    copied = tmp_path / "vllm"
    shutil.copytree(STAND_IN / "vllm", copied)
    file = "__init__.py" if place == "package" else "cumem.py"
    indent = "    " if place == "class" else ""
    path = copied / "device_allocator" / file
    text = path.read_text(encoding="utf-8")
    path.write_text(f"{text}\n{indent}def {name}(*arguments):\n{indent}    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_vllm()
    with refuses(UnavailableError, names=name, operation="install"):
        compat.install()
    assert not compat.installed()


def test_without_vllm_it_says_so(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # type: ignore[arg-type]
    with refuses(UnavailableError, operation="install", advice="install vLLM 0.33 or newer"):
        compat.install()
    assert not compat.installed()


# ---- the plugin


def entry_points() -> list[importlib.metadata.EntryPoint]:
    """What the project declares, and what the installed distribution has, if there is one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    _, _, rest = text.partition('[project.entry-points."vllm.general_plugins"]\n')
    name, _, value = rest.partition("\n")[0].partition(" = ")
    group = "vllm.general_plugins"
    declared = importlib.metadata.EntryPoint(name, value.strip('"'), group)
    found = importlib.metadata.entry_points(group=group, name="cumempool")
    return [declared, *found]


def test_the_entry_point_is_the_plugin() -> None:
    for entry_point in entry_points():
        assert entry_point.name == "cumempool"
        assert entry_point.load() is compat.register


def load_plugin() -> None:
    entry_points()[0].load()()


def factory() -> Any:
    return importlib.import_module("vllm.device_allocator.sleep_mode_backend")


def test_the_plugin_registers_the_backend_and_leaves_the_rest(vllm: None) -> None:
    registry = factory().SleepModeBackendFactory
    before = set(registry._registry)
    load_plugin()
    load_plugin()  # vLLM may do so
    assert set(registry._registry) - before == {"cumempool"}
    assert not compat.installed()
    backend_class = registry.get_backend_class("cumempool")
    assert issubclass(backend_class, factory().SleepModeBackend)
    backend = registry.create_backend(SimpleNamespace(sleep_mode_backend="cumempool"))
    assert type(backend) is backend_class
    assert backend.state() == "RUNNING"
    assert backend_class.preserves_communicators() is True
    assert CuMemAllocator._instance is None  # making one touches nothing
    registry._registry.pop("cumempool")


def test_a_backend_without_a_driver_is_not_supported(
    vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "cumem_available", False)
    load_plugin()
    registry = factory().SleepModeBackendFactory
    with pytest.raises(ValueError, match="not supported"):
        registry.create_backend(SimpleNamespace(sleep_mode_backend="cumempool"))
    registry._registry.pop("cumempool")


def test_the_plugin_takes_the_name_from_nobody(vllm: None) -> None:
    registry = factory().SleepModeBackendFactory
    registry.register_backend("cumempool", "fractions", "Fraction")
    with refuses(InvalidArgumentError, names=("'cumempool'", "Fraction")):
        load_plugin()
    registry._registry.pop("cumempool")


def test_the_plugin_installs_where_it_is_named(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "something,cumempool")
    load_plugin()
    assert compat.installed()
    assert theirs().get_mem_allocator_instance() is compat.CuMemAllocator.instance


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
@pytest.mark.parametrize(("selected", "expected"), [("cumempool", True), ("cumem", False)])
def test_workers_install_where_the_backend_is_selected(
    vllm: None, selected: str, expected: bool
) -> None:
    load_plugin()
    load_plugin()
    workers = importlib.import_module("vllm.v1.worker.worker_base")
    config = SimpleNamespace(model_config=SimpleNamespace(sleep_mode_backend=selected))
    worker = workers.WorkerWrapperBase(config)
    assert not compat.installed()
    worker.init_device()
    assert compat.installed() is expected
    assert isinstance(worker.allocator, compat.CuMemAllocator) is expected
    # Where another one is selected, vLLM is as it was.
    assert hasattr(workers.WorkerWrapperBase.init_device, "__wrapped__") is expected


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
def test_a_vllm_without_backends_still_starts(
    vllm: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.sleep_mode_backend", None)
    with caplog.at_level(logging.WARNING, "cumempool"):
        load_plugin()
    assert "no sleep-mode backends" in caplog.text
    assert not compat.installed()


@needs_files
def test_the_workers_of_the_real_files_can_be_followed() -> None:
    path = Path(str(FILES)) / "vllm" / "v1" / "worker" / "worker_base.py"
    if not path.is_file():
        pytest.skip("CUMEMPOOL_VLLM_FILES has the allocator's files only")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (wrapper,) = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "WorkerWrapperBase"
    ]
    methods = {node.name: node for node in wrapper.body if isinstance(node, ast.FunctionDef)}
    assert "self.vllm_config = vllm_config" in ast.unparse(methods["init_worker"])
    assert "load_general_plugins()" in ast.unparse(methods["init_worker"])
    assert [argument.arg for argument in methods["init_device"].args.args] == ["self"]


# ---- the backend


@pytest.fixture
def backend(vllm: None) -> Iterator[Any]:
    load_plugin()
    compat.install()
    registry = factory().SleepModeBackendFactory
    yield registry.create_backend(SimpleNamespace(sleep_mode_backend="cumempool"))
    registry._registry.pop("cumempool")


ENGINE = ("weights", "kv_cache", "runtime", "cudagraph", "workspace")


@pytest.mark.parametrize("level", [1, 2])
def test_suspend_keeps_what_its_level_says(backend: Any, level: int) -> None:
    tensors = {tag: tensor(100, tag, seed) for seed, tag in enumerate(ENGINE)}
    allocator = theirs().get_mem_allocator_instance()
    backend.suspend(level)
    assert backend.state() == "SUSPENDED"
    kept = {tag for tag, size in backup_bytes(allocator).items() if size is not None}
    assert kept == {"runtime", "cudagraph"} | ({"weights"} if level == 1 else set())
    backend.resume(tags=["weights"])
    assert [tag for tag, sleeps in asleep(allocator).items() if sleeps] == ["kv_cache"]
    backend.resume(["kv_cache"])
    assert backend.state() == "RUNNING"
    assert not any(asleep(allocator).values())
    assert all(torch.equal(tensors[t], random_bytes(100, ENGINE.index(t))) for t in kept)


@pytest.mark.parametrize(
    ("options", "tags", "expected"),
    [
        ({"suspend_tags": ["kv_cache"]}, None, {"kv_cache"}),
        ({"suspend_tags": "kv_cache"}, ("weights", "workspace"), {"weights", "workspace"}),
        ({}, (), set()),
    ],
)
def test_options_and_tags_say_what_is_kept(
    backend: Any, options: dict[str, Any], tags: Any, expected: set[str]
) -> None:
    made = type(backend)(**options)
    held = [tensor(100, tag) for tag in ENGINE]
    made.suspend(1, tags=tags)
    sizes = backup_bytes(theirs().get_mem_allocator_instance())
    kept = {tag for tag, size in sizes.items() if size is not None}
    assert kept == expected | {"runtime", "cudagraph"}
    made.resume()
    with refuses(InvalidArgumentError, names=("'warp'", "suspend_tags")):
        type(backend)(warp=9)
    assert made.supports_selective_offload() is made.preserves_nccl() is True
    del held


def test_discard_gives_up_the_cache_and_nothing_else(backend: Any) -> None:
    tensors = [tensor(100, tag) for tag in ENGINE]
    backend.discard(("kv_cache",))
    assert backend.state() == "SUSPENDED"
    sleeping = asleep(theirs().get_mem_allocator_instance())
    assert [tag for tag, sleeps in sleeping.items() if sleeps] == ["kv_cache"]
    backend.resume()
    assert backend.state() == "RUNNING"
    del tensors


def test_a_call_that_fails_changes_no_state(backend: Any) -> None:
    weights = tensor(40 * MIB, "weights")
    with refuses(InvalidArgumentError, names=("levels 1 and 2", "3")):
        backend.suspend(3)
    assert backend.state() == "RUNNING"
    with theirs().get_mem_allocator_instance().use_memory_pool("weights"):
        with pytest.raises(InUseError):
            backend.suspend()
        assert backend.state() == "RUNNING"
    backend.suspend()
    other = CuMemAllocator.get_instance().empty(40 * MIB, dtype=torch.uint8, tag="other")
    with pytest.raises(OutOfMemoryError):
        backend.resume()
    assert backend.state() == "SUSPENDED"
    del other
    gc.collect()
    backend.resume()
    assert backend.state() == "RUNNING"
    assert torch.equal(weights, random_bytes(40 * MIB))


@pytest.mark.parametrize("vllm", ["stand-in"], indirect=True)
def test_a_backend_that_was_not_installed_says_so(vllm: None) -> None:
    load_plugin()
    registry = factory().SleepModeBackendFactory
    backend = registry.create_backend(SimpleNamespace(sleep_mode_backend="cumempool"))
    module: ModuleType = importlib.import_module("vllm.device_allocator.cumem")
    module.CuMemAllocator.get_instance().used = 100
    calls: dict[str, Callable[[], object]] = {
        "sleep": backend.suspend,
        "wake_up": backend.resume,
        "discard": lambda: backend.discard(("kv_cache",)),
    }
    for operation, call in calls.items():
        with refuses(InUseError, names="install()", operation=operation, bytes=100):
            call()
        assert backend.state() == "RUNNING"


# ---- on cuda, which is simulated


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimulatedCuda:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "cuda")
    return SimulatedCuda(monkeypatch)


def test_the_runtime_calls_are_made_on_an_idle_device_and_waited_for(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []

    def function(name: str) -> Callable[..., int]:
        def call(address: Any, argument: Any, count: Any) -> int:
            steps.append((name, address.value, argument.value, count.value))
            return 700 if address.value == 0 else 0

        return call

    library = SimpleNamespace(
        cuMemsetD8_v2=function("cuMemsetD8_v2"), cuMemcpy=function("cuMemcpy")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: steps.append("idle"))
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": library}.__getitem__)
    compat.libcudart.cudaMemset(2**40, 0xA5, 3 * 2**32)
    assert steps == ["idle", ("cuMemsetD8_v2", 2**40, 0xA5, 3 * 2**32), "idle"]
    steps.clear()
    compat.libcudart.cudaMemcpy(2**40, 2**41, 100)
    assert steps == ["idle", ("cuMemcpy", 2**40, 2**41, 100), "idle"]
    with refuses(DriverError, names="0x0", driver_call="cuMemcpy", result=700, bytes=100):
        compat.libcudart.cudaMemcpy(0, 2**41, 100)


def test_what_torch_has_cached_is_given_back_before_a_wake_needs_the_room(
    cuda: SimulatedCuda, allocator: compat.CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with allocator.use_memory_pool("weights"):
        cuda.allocate(40 * MIB)
    allocator.sleep("weights")
    with allocator.use_memory_pool("kv_cache"):
        cuda.allocate(40 * MIB)
    for block in cuda.segments[1]["blocks"]:
        block["state"] = "inactive"  # its tensors are gone
    held: list[int] = []
    pools = CuMemAllocator.get_instance()
    wake_up = pools.wake_up

    def noted(*arguments: Any, **named: Any) -> Any:
        held.append(pools.stats().physical_bytes)
        return wake_up(*arguments, **named)

    monkeypatch.setattr(pools, "wake_up", noted)
    allocator.wake_up()
    assert held == [0]
    assert asleep(allocator) == {"weights": False}
    cuda.drop_tensors()
