"""The stand-in for torch_memory_saver: its surface, and what it does on the host driver."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import logging
import os
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import GRANULE, MIB, MakeAllocator, RunPython, random_bytes
from refusals import refuses
from simulated_cuda import SimulatedCuda

import cumempool
from cumempool import CuMemAllocator
from cumempool.compat.torch_memory_saver import TorchMemorySaver
from cumempool.compat.torch_memory_saver.graph_captures import GraphCaptures

pytestmark = pytest.mark.extensive

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads(
    (ROOT / "tests" / "data" / "torch_memory_saver_surface.json").read_text(encoding="utf-8")
)
OURS = "cumempool.compat.torch_memory_saver"
WHEEL = os.environ.get("CUMEMPOOL_TMS_FILES")
ENTRIES = [(module, name) for module, names in RECORD["modules"].items() for name in names]

#: How the real one finds and calls its libraries, which there are none of here.
LEFT_OUT = {
    ("torch_memory_saver.binary_wrapper", "BinaryWrapper"),
    ("torch_memory_saver.hooks.base", "HookUtilBase"),
    ("torch_memory_saver.hooks.mode_preload", "HookUtilModePreload"),
    ("torch_memory_saver.hooks.mode_torch", "HookUtilModeTorch"),
}


@pytest.fixture(autouse=True)
def no_variables_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUMEMPOOL_TMS_FILES", raising=False)
    for variable in [name for name in os.environ if name.startswith("TMS_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def saver(alloc: CuMemAllocator) -> TorchMemorySaver:
    """On one simulated device of 256 MiB."""
    return TorchMemorySaver(allocator=alloc)


def made(saver: TorchMemorySaver, count: int = 1000, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes where the open region says."""
    tensor = saver.allocator.empty(count, dtype=torch.uint8)
    tensor.copy_(random_bytes(count, seed))
    return tensor


def state(saver: TorchMemorySaver, tensor: torch.Tensor) -> str:
    return saver.allocator.allocation_of(tensor).state


# ---- surface


def ours(module: str) -> Any:
    return importlib.import_module(OURS + module.removeprefix("torch_memory_saver"))


def compare(name: str, recorded: dict[str, Any], found: object) -> None:
    kind = recorded["kind"]
    if kind == "class":
        for member, inner in recorded["members"].items():
            compare(f"{name}.{member}", inner, inspect.getattr_static(found, member))
    elif kind == "property":
        assert isinstance(found, property), name
        assert (found.fset is not None) == recorded["settable"], name
    elif kind == "choice":
        assert sorted(get_args(found)) == recorded["of"], name
    elif kind == "object":
        assert type(found).__name__ == recorded["class"], name
    elif kind == "reexport":
        assert found is not None, name
    else:
        assert callable(found), name
        compare_parameters(name, recorded["parameters"], found)
        # What contextlib.contextmanager makes has the generator behind it.
        wraps = inspect.isgeneratorfunction(inspect.unwrap(found))
        assert wraps == (kind == "context manager"), name


def compare_parameters(name: str, recorded: list[list[str]], found: Callable[..., Any]) -> None:
    """Ours may take more, by keyword and with a default."""
    parameters = list(inspect.signature(found).parameters.values())
    kinds = {"plain": inspect.Parameter.POSITIONAL_OR_KEYWORD}
    kinds["keyword"] = inspect.Parameter.KEYWORD_ONLY
    for (wanted, kind, default), parameter in zip(recorded, parameters, strict=False):
        assert parameter.name == wanted, name
        assert parameter.kind == kinds[kind], (name, wanted)
        is_required = parameter.default is inspect.Parameter.empty
        assert (None if is_required else repr(parameter.default)) == default, (name, wanted)
    assert len(parameters) >= len(recorded), name
    for extra in parameters[len(recorded) :]:
        assert extra.kind == inspect.Parameter.KEYWORD_ONLY, (name, extra)
        assert extra.default is not inspect.Parameter.empty, (name, extra)


def test_record_is_of_the_version_that_the_page_names() -> None:
    page = (ROOT / "docs" / "migrating-from-torch-memory-saver.md").read_text(encoding="utf-8")
    assert (RECORD["package"], RECORD["version"]) == ("torch_memory_saver", "0.0.10")
    assert "torch_memory_saver 0.0.10" in page


@pytest.mark.parametrize(
    ("module", "name"), [entry for entry in ENTRIES if entry not in LEFT_OUT], ids=".".join
)
def test_every_recorded_name_is_there_with_its_signature(module: str, name: str) -> None:
    compare(f"{module}.{name}", RECORD["modules"][module][name], getattr(ours(module), name))


def test_what_is_left_out_is_in_the_record() -> None:
    assert set(ENTRIES) >= LEFT_OUT
    assert len(ENTRIES) > len(LEFT_OUT) + 10


@pytest.mark.skipif(WHEEL is None, reason="CUMEMPOOL_TMS_FILES names no unpacked wheel")
def test_record_is_what_the_wheel_has() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "torch_memory_saver_surface.py"))
    assert script["surface"](Path(str(WHEEL))) == RECORD


@pytest.mark.parametrize(
    ("recorded", "found"),
    [
        ([["self", "plain", None]], lambda: 0),
        ([["tag", "plain", "'default'"]], lambda tag="other": 0),
        ([["tag", "plain", None]], lambda tag="default": 0),
        ([["tag", "keyword", None]], lambda tag: 0),
        ([], lambda extra: 0),
        ([], lambda extra=1: 0),
    ],
)
def test_a_signature_that_differs_is_seen(
    recorded: list[list[str]], found: Callable[..., Any]
) -> None:
    with pytest.raises(AssertionError):
        compare_parameters("planted", recorded, found)


# ---- pause and resume


def test_pause_gives_memory_back_and_resume_brings_it_to_the_same_address(
    saver: TorchMemorySaver,
) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver, 3 * MIB)
    address, before = tensor.data_ptr(), saver.allocator.stats().physical_bytes
    saver.pause()
    assert saver.allocator.stats().physical_bytes == before - 2 * GRANULE
    saver.resume()
    assert saver.allocator.stats().physical_bytes == before
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, random_bytes(3 * MIB))


def test_without_backup_contents_are_discarded(saver: TorchMemorySaver) -> None:
    with saver.region():
        tensor = made(saver)
    saver.pause()
    assert state(saver, tensor) == "discarded"
    assert saver.allocator.stats().host_used_bytes == 0
    assert saver.get_cpu_backup(tensor) is None
    saver.resume()
    assert state(saver, tensor) == "awake"


def test_regions_of_one_tag_with_and_without_backup_go_in_one_transaction(
    saver: TorchMemorySaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver.region("weights", enable_cpu_backup=True):
        kept = made(saver)
    with saver.region("weights", enable_cpu_backup=False):
        lost = made(saver)
    calls: list[object] = []
    sleep = saver.allocator.sleep

    def counted(*args: Any, **kwargs: Any) -> object:
        calls.append(kwargs["tags"])
        return sleep(*args, **kwargs)

    monkeypatch.setattr(saver.allocator, "sleep", counted)
    saver.pause("weights")
    assert calls == [["weights:discarded", "weights:pinned"]]
    assert (state(saver, kept), state(saver, lost)) == ("backed_up", "discarded")
    saver.resume("weights")
    assert torch.equal(kept, random_bytes(1000))
    assert state(saver, lost) == "awake"


def test_failed_resume_leaves_all_paused_and_can_be_repeated(
    make_allocator: MakeAllocator,
) -> None:
    saver = TorchMemorySaver(allocator=make_allocator(mib=16))
    with saver.region(enable_cpu_backup=True):
        kept = made(saver, 6 * MIB)
    with saver.region():
        lost = made(saver, 6 * MIB)
    saver.pause()
    other = saver.allocator.empty(8 * MIB, dtype=torch.uint8, tag="other")
    with pytest.raises(cumempool.OutOfMemoryError):
        saver.resume()
    assert (state(saver, kept), state(saver, lost)) == ("backed_up", "discarded")
    del other
    saver.resume()
    assert torch.equal(kept, random_bytes(6 * MIB))


def test_tags_are_paused_and_resumed_apart(saver: TorchMemorySaver) -> None:
    with saver.region(tag="weights", enable_cpu_backup=True):
        weights = made(saver)
    with saver.region(tag="kv_cache"):
        cache = made(saver)
    saver.pause("kv_cache")
    assert (state(saver, weights), state(saver, cache)) == ("awake", "discarded")
    saver.pause("weights")
    saver.resume("kv_cache")
    assert (state(saver, weights), state(saver, cache)) == ("backed_up", "awake")
    saver.resume(tag="weights")
    assert torch.equal(weights, random_bytes(1000))


def test_pause_of_all_leaves_other_tags_of_the_allocator_alone(saver: TorchMemorySaver) -> None:
    other = saver.allocator.empty(10, tag="other")
    with saver.region("a"):
        a = made(saver)
    with saver.region("b", True):
        b = made(saver)
    saver.pause()
    assert [state(saver, t) for t in (other, a, b)] == ["awake", "discarded", "backed_up"]
    saver.resume()
    assert [state(saver, t) for t in (other, a, b)] == ["awake"] * 3


def test_pausing_what_is_paused_and_resuming_what_is_not_change_nothing(
    saver: TorchMemorySaver,
) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver)
    before = saver.allocator.allocation_of(tensor).generation
    saver.resume()
    assert saver.allocator.allocation_of(tensor).generation == before
    saver.pause()
    saver.pause()
    saver.pause("default")
    saver.resume()
    saver.resume()
    assert saver.allocator.allocation_of(tensor).generation == before + 1
    assert torch.equal(tensor, random_bytes(1000))


def test_tag_without_memory_is_no_error(saver: TorchMemorySaver) -> None:
    saver.pause()
    saver.resume("never used")
    with saver.region("empty"):
        pass
    saver.pause("empty")
    saver.resume("empty")
    assert saver.allocator.snapshot() == []


def test_tags_that_look_like_names_of_kinds_stay_apart(saver: TorchMemorySaver) -> None:
    tensors = {}
    for tag in ("a", "a:pinned", "a:pinned:pinned", ":"):
        with saver.region(tag, enable_cpu_backup=True):
            tensors[tag] = made(saver)
    saver.pause("a:pinned")
    assert [tag for tag, t in tensors.items() if state(saver, t) != "awake"] == ["a:pinned"]


def test_memory_allocated_during_a_pause_is_awake(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        first = made(saver, seed=1)
    saver.pause()
    with saver.region(enable_cpu_backup=True):
        second = made(saver, seed=2)
    assert (state(saver, first), state(saver, second)) == ("backed_up", "awake")
    saver.resume()
    assert torch.equal(first, random_bytes(1000, 1))
    assert torch.equal(second, random_bytes(1000, 2))


def test_freeing_during_a_pause_frees_the_backup(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver)
    saver.pause()
    del tensor
    assert saver.allocator.stats().host_used_bytes == 0
    assert saver.allocator.snapshot() == []
    saver.resume()


@pytest.mark.parametrize("tag", [3, b"weights"])
def test_tag_that_is_no_text_is_refused(saver: TorchMemorySaver, tag: Any) -> None:
    with pytest.raises(cumempool.InvalidTypeError):
        saver.pause(tag)
    with pytest.raises(cumempool.InvalidTypeError):
        saver.resume(tag)
    with pytest.raises(cumempool.InvalidTypeError), saver.region(tag):
        pass


# ---- regions


def test_innermost_region_counts(saver: TorchMemorySaver) -> None:
    with saver.region("outer"):
        a = made(saver)
        with saver.region("inner", enable_cpu_backup=True):
            b = made(saver)
        c = made(saver)
        with contextlib.suppress(ZeroDivisionError), saver.region("inner"):
            raise ZeroDivisionError
        d = made(saver)
    tags = [saver.allocator.tag_of(t) for t in (a, b, c, d)]
    assert tags == ["outer:discarded", "inner:pinned", "outer:discarded", "outer:discarded"]


def test_disabled_allocations_are_in_no_region(saver: TorchMemorySaver) -> None:
    with saver.region("outer"), saver.region("inner"):
        with saver.disable():
            outside = made(saver)
            with saver.region("again"):
                again = made(saver)
        inside = made(saver)
    assert saver.allocator.tag_of(outside) == cumempool.allocator.DEFAULT_TAG
    assert saver.allocator.tag_of(again) == "again:discarded"
    assert saver.allocator.tag_of(inside) == "inner:discarded"
    saver.pause()
    assert [state(saver, t) for t in (outside, again, inside)] == ["awake"] + ["discarded"] * 2


def test_disable_outside_of_regions_and_after_an_error(saver: TorchMemorySaver) -> None:
    with saver.disable():
        pass
    with saver.region("outer"):
        with contextlib.suppress(ZeroDivisionError), saver.disable():
            raise ZeroDivisionError
        tensor = made(saver)
    assert saver.allocator.tag_of(tensor) == "outer:discarded"
    assert saver.allocator.tag_of(made(saver)) == cumempool.allocator.DEFAULT_TAG


def test_pause_within_an_open_region_of_the_tag(saver: TorchMemorySaver) -> None:
    with saver.region("weights", enable_cpu_backup=True), saver.region("other"):
        with saver.region("weights", enable_cpu_backup=True):
            first = made(saver)
        saver.pause("weights")
        assert state(saver, first) == "backed_up"
        second = made(saver)
        saver.resume("weights")
    assert saver.allocator.tag_of(second) == "other:discarded"
    assert torch.equal(first, random_bytes(1000))


def test_failed_pause_leaves_the_region_open(saver: TorchMemorySaver) -> None:
    with saver.region("weights"):
        first = made(saver)
        with (
            saver.allocator.pin("weights:discarded", "a test"),
            refuses(
                cumempool.InUseError, names="a test", operation="sleep", tag="weights:discarded"
            ),
        ):
            saver.pause()
        second = made(saver)
    assert saver.allocator.tag_of(second) == "weights:discarded"
    assert (state(saver, first), state(saver, second)) == ("awake", "awake")


def test_pause_while_another_thread_is_in_a_region_of_the_tag(saver: TorchMemorySaver) -> None:
    inside, leave = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def work() -> None:
        with saver.region("weights"):
            found.append(made(saver))
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(30)
    try:
        assert saver.allocator.tag_of(made(saver)) == cumempool.allocator.DEFAULT_TAG
        with refuses(
            cumempool.InUseError, names="scope", operation="sleep", tag="weights:discarded"
        ):
            saver.pause()
        assert state(saver, found[0]) == "awake"
    finally:
        leave.set()
        thread.join()
    saver.pause()
    assert state(saver, found[0]) == "discarded"


def test_region_for_all_threads(saver: TorchMemorySaver) -> None:
    found: list[torch.Tensor] = []
    with saver.region("gradients", all_threads=True):
        thread = threading.Thread(target=lambda: found.append(made(saver)))
        thread.start()
        thread.join()
    assert saver.allocator.tag_of(found[0]) == "gradients:discarded"


def test_region_ended_inside_of_disable_is_not_entered_again(saver: TorchMemorySaver) -> None:
    region = saver.region("weights")
    region.__enter__()
    with saver.disable():
        region.__exit__(None, None, None)
    assert saver.allocator.tag_of(made(saver)) == cumempool.allocator.DEFAULT_TAG
    saver.allocator.close()


# ---- where contents go


@pytest.mark.parametrize(
    ("backend", "tier"), [(None, "pinned"), ("pinned", "pinned"), ("mmap", "pageable")]
)
def test_backend_of_the_backup(saver: TorchMemorySaver, backend: Any, tier: str) -> None:
    with saver.region(enable_cpu_backup=True, cpu_backup_backend=backend):
        tensor = made(saver)
    saver.pause()
    assert saver.allocator.allocation_of(tensor).backup_tier == tier
    saver.resume()
    assert torch.equal(tensor, random_bytes(1000))


def test_backend_from_the_environment(
    saver: TorchMemorySaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMS_INIT_CPU_BACKUP_BACKEND", "mmap")
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver)
    assert saver.allocator.tag_of(tensor) == "default:pageable"
    monkeypatch.setenv("TMS_INIT_CPU_BACKUP_BACKEND", "tape")
    with (
        refuses(cumempool.InvalidArgumentError, names="'tape'"),
        saver.region(enable_cpu_backup=True),
    ):
        pass
    with saver.region():
        assert saver.allocator.tag_of(made(saver)) == "default:discarded"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (
            {"enable_cpu_backup": True, "enable_disk_backup": True},
            ("enable_cpu_backup", "enable_disk_backup"),
        ),
        ({"cpu_backup_backend": "pinned"}, ("cpu_backup_backend", "enable_cpu_backup")),
        ({"enable_cpu_backup": True, "cpu_backup_backend": "tape"}, "'tape'"),
        ({"enable_disk_backup": True}, "set_disk_backup_dir"),
    ],
)
def test_options_that_do_not_go_together(
    saver: TorchMemorySaver, options: dict[str, Any], names: str | tuple[str, ...]
) -> None:
    with refuses(cumempool.InvalidArgumentError, names=names), saver.region(**options):
        pass
    assert saver.allocator.tag_of(made(saver)) == cumempool.allocator.DEFAULT_TAG


def test_contents_in_files(saver: TorchMemorySaver, tmp_path: Path) -> None:
    saver.set_disk_backup_dir(str(tmp_path / "made" / "here"))
    with saver.region(enable_disk_backup=True):
        tensor = made(saver, 3 * MIB)
    for _ in range(2):
        saver.pause()
        assert saver.allocator.allocation_of(tensor).backup_tier == "file"
        assert saver.allocator.stats().file_bytes >= 3 * MIB
        backup = saver.get_cpu_backup(tensor)
        assert backup is not None
        assert torch.equal(backup, random_bytes(3 * MIB))
        saver.resume()
        assert torch.equal(tensor, random_bytes(3 * MIB))
        assert saver.allocator.stats().file_bytes == 0


def test_directory_for_files_holds_from_the_next_pause_on(
    saver: TorchMemorySaver, tmp_path: Path
) -> None:
    saver.set_disk_backup_dir(str(tmp_path / "first"))
    with saver.region(enable_disk_backup=True):
        tensor = made(saver)
    (tmp_path / "first").rmdir()
    with pytest.raises(cumempool.BackupError):
        saver.pause()
    assert state(saver, tensor) == "awake"
    saver.set_disk_backup_dir(str(tmp_path / "second"))
    saver.pause()
    saver.resume()
    assert torch.equal(tensor, random_bytes(1000))


def test_directory_for_files_from_the_environment(
    alloc: CuMemAllocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMS_DISK_BACKUP_DIR", str(tmp_path / "here"))
    saver = TorchMemorySaver(allocator=alloc)
    with saver.region(enable_disk_backup=True):
        made(saver)
    assert (tmp_path / "here").is_dir()


# ---- reading backups


def test_copy_of_a_backup_is_an_ordinary_tensor(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver)
    saver.pause()
    backup = saver.get_cpu_backup(tensor)
    assert backup is not None
    assert torch.equal(backup, random_bytes(1000))
    backup.zero_()
    saver.resume()
    assert torch.equal(tensor, random_bytes(1000))
    assert not backup.any()


def test_view_of_a_backup_takes_no_copy_and_cannot_be_written_to(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver, 240).view(torch.float32).view(6, 10)[::2].t()
    saver.pause()
    first = saver.get_cpu_backup(tensor, zero_copy=True)
    second = saver.get_cpu_backup(tensor, True)
    assert first is not None
    assert second is not None
    assert first.data_ptr() == second.data_ptr()
    assert (first.shape, first.dtype, first.stride()) == ((10, 3), torch.float32, (1, 20))
    expected = random_bytes(240).view(torch.float32).view(6, 10)[::2].t()
    assert torch.equal(first.view(torch.int32), expected.view(torch.int32))
    with refuses(cumempool.InvalidArgumentError, names="read-only"):
        first.zero_()
    saver.resume()


def test_there_is_no_backup_of_what_is_not_paused(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver)
    assert saver.get_cpu_backup(tensor) is None
    assert saver.get_cpu_backup(torch.zeros(3)) is None
    with pytest.raises(TypeError):
        saver.get_cpu_backup("weights")  # type: ignore[arg-type]
    saver.pause()
    assert saver.get_cpu_backup(tensor) is not None
    saver.resume()
    assert saver.get_cpu_backup(tensor, zero_copy=True) is None


# ---- retained backups


def test_host_memory_goes_back_after_a_resume(saver: TorchMemorySaver) -> None:
    assert saver.retain_cpu_backup is False
    with saver.region("a", enable_cpu_backup=True):
        a = made(saver, 4 * MIB)
    with saver.region("b", enable_cpu_backup=True):
        b = made(saver, 4 * MIB)
    saver.pause()
    saver.resume("a")
    assert saver.allocator.stats().host_used_bytes == 4 * MIB
    saver.resume("b")
    assert saver.allocator.stats().host_bytes == 0
    assert torch.equal(a, b)


def test_retained_backups_are_not_copied_again(
    saver: TorchMemorySaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.retain_cpu_backup = True
    reports: list[cumempool.TransitionReport] = []
    sleep = saver.allocator.sleep

    def reported(*args: Any, **kwargs: Any) -> cumempool.TransitionReport:
        reports.append(sleep(*args, **kwargs))
        return reports[-1]

    monkeypatch.setattr(saver.allocator, "sleep", reported)
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver, 4 * MIB)
    for _ in range(2):
        saver.pause()
        saver.get_cpu_backup(tensor, zero_copy=True)
        saver.resume()
        assert saver.allocator.stats().host_used_bytes == 4 * MIB
    assert [report.bytes_clean for report in reports] == [0, 4 * MIB]
    saver.retain_cpu_backup = False
    assert saver.allocator.stats().host_used_bytes == 4 * MIB
    saver.pause()
    saver.resume()
    assert saver.allocator.stats().host_bytes == 0
    assert torch.equal(tensor, random_bytes(4 * MIB))


def test_retained_backup_stays_visible_at_its_address_and_follows_each_pause(
    saver: TorchMemorySaver,
) -> None:
    saver.retain_cpu_backup = True
    with saver.region("weights", enable_cpu_backup=True):
        tensor = made(saver)
    with saver.region("other", enable_cpu_backup=True):
        other = made(saver)
    saver.pause("weights")
    first = saver.get_cpu_backup(tensor, zero_copy=True)
    assert first is not None
    address = first.data_ptr()
    saver.resume("weights")
    tensor.fill_(7)
    saver.pause("other")
    again = saver.get_cpu_backup(tensor, zero_copy=True)
    assert again is not None
    assert again.data_ptr() == address
    assert torch.equal(again, random_bytes(1000))  # as of the pause, not as it is now
    saver.pause("weights")
    second = saver.get_cpu_backup(tensor, zero_copy=True)
    assert second is not None
    assert second.data_ptr() == address
    assert torch.equal(second, torch.full((1000,), 7, dtype=torch.uint8))
    assert torch.equal(first, second)
    saver.resume()
    assert torch.equal(tensor, second)
    assert torch.equal(other, random_bytes(1000))
    del first, again, second
    saver.retain_cpu_backup = False
    saver.pause()
    saver.resume()
    assert saver.get_cpu_backup(tensor) is None
    assert saver.allocator.stats().host_bytes == 0


def test_retained_views_of_one_memory_are_told_apart(saver: TorchMemorySaver) -> None:
    saver.retain_cpu_backup = True
    with saver.region(enable_cpu_backup=True):
        tensor = saver.allocator.empty(10, dtype=torch.complex64)
    tensor.copy_(torch.arange(10) * (1 + 2j))
    saver.pause()
    seen = [tensor, tensor.conj(), tensor.conj().imag, tensor[::2], tensor.view(torch.int64)]
    views = [saver.get_cpu_backup(t, zero_copy=True) for t in seen]
    saver.resume()
    assert len({v.data_ptr() for v in views if v is not None}) == 2  # the imaginary parts
    assert all(v is not None and torch.equal(v, t) for v, t in zip(views, seen, strict=True))
    views.clear()
    saver.retain_cpu_backup = False
    saver.resume()
    assert saver.allocator.stats().host_bytes == 0


def test_retained_backup_that_is_asked_for_twice_is_one_view(saver: TorchMemorySaver) -> None:
    saver.retain_cpu_backup = True
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver)
    saver.pause()
    first = saver.get_cpu_backup(tensor, zero_copy=True)
    assert first is not None
    assert saver.get_cpu_backup(tensor, zero_copy=True) is first
    saver.resume()
    assert saver.get_cpu_backup(tensor, zero_copy=True) is first
    assert torch.equal(first, random_bytes(1000))
    del first
    saver.retain_cpu_backup = False
    saver.pause()
    saver.resume()
    assert saver.allocator.stats().host_bytes == 0


def test_retained_backup_in_a_file_stays_visible(saver: TorchMemorySaver, tmp_path: Path) -> None:
    saver.retain_cpu_backup = True
    saver.set_disk_backup_dir(str(tmp_path))
    with saver.region(enable_disk_backup=True):
        tensor = made(saver)
    for seed in (0, 1):
        tensor.copy_(random_bytes(1000, seed))
        saver.pause()
        shown = saver.get_cpu_backup(tensor, zero_copy=True)
        assert shown is not None
        saver.resume()
        assert saver.get_cpu_backup(tensor, zero_copy=True) is shown
        assert torch.equal(shown, random_bytes(1000, seed))
        del shown
    saver.retain_cpu_backup = False
    saver.pause()
    saver.resume()
    assert saver.allocator.stats().file_bytes == 0


@pytest.mark.parametrize("grown", [0, GRANULE])
def test_what_torch_reserves_while_disabled_goes_back_to_the_device(
    monkeypatch: pytest.MonkeyPatch, grown: int
) -> None:
    cuda = SimulatedCuda(monkeypatch)
    allocator = cuda.make_allocator()
    saver = TorchMemorySaver(allocator=allocator)
    cuda.cached_outside = 7 * GRANULE
    with saver.region():
        with saver.disable():
            assert not cuda.routes
            cuda.cached_outside += grown
        assert cuda.cached_outside == (0 if grown else 7 * GRANULE)
        assert len(cuda.routes) == 1
    allocator.close()


def test_view_kept_without_retaining_shows_what_it_showed(saver: TorchMemorySaver) -> None:
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver)
    saver.pause()
    view = saver.get_cpu_backup(tensor, zero_copy=True)
    saver.resume()
    tensor.fill_(7)
    saver.pause()
    saver.resume()
    assert view is not None
    assert torch.equal(view, random_bytes(1000))
    assert torch.equal(tensor, torch.full((1000,), 7, dtype=torch.uint8))


def test_retaining_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_RETAIN_CPU_BACKUP", "1")
    saver = TorchMemorySaver()
    assert saver.retain_cpu_backup is True
    with refuses(cumempool.InvalidTypeError, names="retain_cpu_backup"):
        saver.retain_cpu_backup = 1  # type: ignore[assignment]


# ---- settings


def test_margin_is_left_free(make_allocator: MakeAllocator) -> None:
    saver = TorchMemorySaver(allocator=make_allocator(mib=16))
    assert saver.memory_margin_bytes == 0
    saver.memory_margin_bytes = 8 * MIB
    assert saver.memory_margin_bytes == 8 * MIB
    with saver.region(enable_cpu_backup=True):
        tensor = made(saver, 6 * MIB)
        with pytest.raises(cumempool.OutOfMemoryError):
            made(saver, 6 * MIB)
        saver.memory_margin_bytes = 0
        second = made(saver, 6 * MIB)
    saver.memory_margin_bytes = 8 * MIB
    saver.pause()
    saver.resume()  # which takes all there is
    assert torch.equal(tensor, second)


def test_margin_set_before_the_first_use_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "host")
    monkeypatch.setenv("CUMEMPOOL_HOST_DRIVER_BYTES", "16MiB")
    saver = TorchMemorySaver()
    saver.memory_margin_bytes = 8 * MIB
    with saver.region(), pytest.raises(cumempool.OutOfMemoryError):
        made(saver, 10 * MIB)
    saver.allocator.close()


def test_margin_that_does_not_exist(saver: TorchMemorySaver) -> None:
    with refuses(cumempool.InvalidArgumentError, names="memory_margin_bytes=-1"):
        saver.memory_margin_bytes = -1
    with pytest.raises(TypeError):
        saver.memory_margin_bytes = "1GiB"  # type: ignore[assignment]
    assert saver.memory_margin_bytes == 0


def test_preload_mode_is_taken_and_explained(
    saver: TorchMemorySaver, caplog: pytest.LogCaptureFixture
) -> None:
    assert saver.hook_mode == "torch"
    assert saver.enabled is True
    with caplog.at_level(logging.WARNING, "cumempool"):
        saver.hook_mode = "torch"
        assert caplog.messages == []
        saver.hook_mode = "preload"
        saver.hook_mode = "preload"
    assert saver.hook_mode == "preload"
    (message,) = caplog.messages
    assert "beside torch is not paused" in message
    with refuses(cumempool.InvalidArgumentError, names="'elsewhere'"):
        saver.hook_mode = "elsewhere"  # type: ignore[assignment]
    with saver.region():
        tensor = made(saver)
    saver.pause()
    assert state(saver, tensor) == "discarded"


def test_variables_for_the_preloaded_library_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "host")
    monkeypatch.setenv("TMS_INIT_ENABLE", "1")
    saver = TorchMemorySaver()
    with caplog.at_level(logging.WARNING, "cumempool"):
        saver.allocator.close()
    (message,) = caplog.messages
    assert message.startswith("TMS_INIT_ENABLE has no effect")


def test_library_to_preload_does_not_exist() -> None:
    with refuses(
        cumempool.UnsupportedError, names="LD_PRELOAD", operation="get_binary_path_from_package"
    ):
        ours(".utils").get_binary_path_from_package("hook")


def test_environment_is_changed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_A", "before")
    with ours(".utils").change_env("TMS_A", "1"), ours(".utils").change_env("TMS_B", "2"):
        assert (os.environ["TMS_A"], os.environ["TMS_B"]) == ("1", "2")
    assert os.environ["TMS_A"] == "before"
    assert "TMS_B" not in os.environ


# ---- graphs


def test_graphs_are_refused_on_the_host_driver(saver: TorchMemorySaver) -> None:
    with (
        refuses(cumempool.UnsupportedError, operation="cuda_graph", tag="default"),
        saver.cuda_graph(object()),
    ):  # type: ignore[arg-type]
        pass


class Graph:
    """In place of a CUDA graph, of which only the life counts here."""


class PoolsOnRecord:
    """In place of an allocator: hands out graph pools, and notes which are open."""

    def __init__(self) -> None:
        self.open: dict[tuple[str, int], tuple[int, int]] = {}
        self.made = 0

    def graph_pool(self, tag: str, *, device: int) -> tuple[int, int]:
        if (tag, device) not in self.open:
            self.made += 1
            self.open[tag, device] = (100, self.made)
        return self.open[tag, device]

    def release_graph_pool(self, tag: str, *, device: int) -> None:
        del self.open[tag, device]


@pytest.fixture
def capture() -> Iterator[Callable[..., tuple[int, int]]]:
    """Captures into a graph and returns the pool; all pools must be released in the end."""
    pools, captures, declared = PoolsOnRecord(), GraphCaptures(), []

    def run(
        graph: Graph,
        shared: Any = None,
        prefix: str = "graph:discarded",
        device: int = 0,
    ) -> tuple[int, int]:
        with captures.pool(pools, declared.append, prefix, device, shared, graph) as handle:  # type: ignore[arg-type]
            assert captures.capturing()
        assert not captures.capturing()
        assert set(declared) >= {tag for tag, _ in pools.open}
        return handle

    run.pools = pools  # type: ignore[attr-defined]
    yield run
    gc.collect()
    captures.reap(pools)  # type: ignore[arg-type]
    assert pools.open == {}


def test_graphs_without_a_pool_share_none(capture: Callable[..., tuple[int, int]]) -> None:
    first, second = Graph(), Graph()
    assert capture(first) != capture(second)


def test_graphs_that_name_the_same_pool_share_one(
    capture: Callable[..., tuple[int, int]],
) -> None:
    graphs = [Graph() for _ in range(6)]
    first = capture(graphs[0], (0, 7))
    assert capture(graphs[1], (0, 7)) == first
    assert capture(graphs[2], (0, 8)) != first
    assert capture(graphs[3], (0, 7), device=1) != first
    assert capture(graphs[4], (0, 7), prefix="graph:pinned") != first
    assert capture(graphs[5], first) == first


def test_pool_of_another_graph_can_be_named(capture: Callable[..., tuple[int, int]]) -> None:
    graphs = [Graph() for _ in range(4)]
    own = capture(graphs[0])
    assert capture(graphs[1], own) == own
    other = capture(graphs[2], own, prefix="other:discarded")
    assert other != own
    assert capture(graphs[3], own, prefix="other:discarded") == other


def test_pool_stays_until_its_last_graph_is_gone(capture: Callable[..., Any]) -> None:
    first, second, third = Graph(), Graph(), Graph()
    handle = capture(first, (0, 7))
    capture(second, (0, 7))
    del first
    gc.collect()
    assert capture(third, (0, 7)) == handle
    del second, third
    gc.collect()
    fresh = Graph()
    assert capture(fresh, (0, 7)) != handle
    assert list(capture.pools.open) == [("graph:discarded:graph0.7", 0)]  # type: ignore[attr-defined]


def test_capture_goes_to_torch_with_the_pool_of_its_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[object, dict[str, object]]] = []
    policies: dict[str, tuple[str, str]] = {}

    @contextlib.contextmanager
    def record(graph: object, **options: object) -> Iterator[None]:
        captured.append((graph, options))
        yield

    class OnCuda(PoolsOnRecord):
        config = cumempool.CuMemConfig(driver="cuda")

        def use_memory_pool(self, tag: str, *, on_sleep: str, backup: object) -> None:
            policies[tag] = (on_sleep, str(backup))

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    pools, graph = OnCuda(), Graph()
    saver = TorchMemorySaver(allocator=pools)  # type: ignore[arg-type]
    with (
        saver.cuda_graph(graph, capture_error_mode="relaxed", tag="graph"),  # type: ignore[arg-type]
        refuses(cumempool.UnsupportedError, operation="disable"),
        saver.disable(),
    ):
        pass
    expected = {"pool": (100, 1), "stream": None, "capture_error_mode": "relaxed"}
    assert captured == [(graph, expected)]
    assert list(pools.open) == [("graph:discarded:graph0", 2)]
    with saver.cuda_graph(graph, (0, 7), None, "global", "graph", True, "mmap"):  # type: ignore[arg-type]
        pass
    assert captured[1][1]["pool"] == (100, 2)
    assert policies == {
        "graph:discarded:graph0": ("discard", "None"),
        "graph:pageable:graph0.7": ("offload", "pageable"),
    }


@pytest.mark.parametrize("pool", ["pool", 7, (1,), (1, None)])
def test_pool_that_is_none_is_refused(capture: Callable[..., Any], pool: Any) -> None:
    with refuses(cumempool.InvalidArgumentError, names="torch.cuda.graph_pool_handle()"):
        capture(Graph(), pool)


# ---- under the lent name


def test_import_loads_neither_torch_nor_the_library(run_python: RunPython) -> None:
    done = run_python(
        f"import sys, {OURS} as t; t.install(); import torch_memory_saver\n"
        "print([n for n in ('torch', 'cumempool._core') if n in sys.modules])"
    )
    assert (done.out, done.err, done.code) == ("[]\n", "", 0)


PROGRAM = """
import torch
import torch_memory_saver as package
from torch_memory_saver import torch_memory_saver, configure_subprocess, TorchMemorySaver
from torch_memory_saver.testing_utils import get_and_print_gpu_memory
from torch_memory_saver.hooks.mode_preload import configure_subprocess as same
import torch_memory_saver.utils as utils
from torch_memory_saver.entrypoint import TorchMemorySaver as same_class

assert same is configure_subprocess and same_class is TorchMemorySaver
assert package.torch_memory_saver is torch_memory_saver
assert type(torch_memory_saver) is TorchMemorySaver
assert TorchMemorySaver.__module__.startswith("cumempool."), TorchMemorySaver.__module__
torch_memory_saver.hook_mode = "torch"
with torch_memory_saver.region(tag="weights", enable_cpu_backup=True):
    t = torch_memory_saver.allocator.empty(100).fill_(3)
torch_memory_saver.pause("weights")
assert torch_memory_saver.get_cpu_backup(t).sum() == 300
torch_memory_saver.resume("weights")
assert t.sum() == 300
torch_memory_saver.retain_cpu_backup = True
torch_memory_saver.pause()
view = torch_memory_saver.get_cpu_backup(t, zero_copy=True)
print("RIGHT")
"""


def test_program_runs_under_the_lent_name_and_ends_while_paused(run_python: RunPython) -> None:
    done = run_python(f"import {OURS}; {OURS}.install(); {OURS}.install()\n{PROGRAM}")
    assert (done.out, done.err, done.code) == ("RIGHT\n", "", 0)


def test_name_is_given_back(run_python: RunPython) -> None:
    done = run_python(
        f"import sys; before = list(sys.path); import {OURS} as t\n"
        "t.uninstall(); t.install(); import torch_memory_saver; t.uninstall()\n"
        "assert sys.path == before, sys.path\n"
        "assert not [n for n in sys.modules if n.startswith('torch_memory_saver')]\n"
        "try: import torch_memory_saver\n"
        "except ModuleNotFoundError: print('RIGHT')"
    )
    assert (done.out, done.err, done.code) == ("RIGHT\n", "", 0)


def test_install_after_the_real_one_is_refused(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "torch_memory_saver.py").write_text("torch_memory_saver = 'real'\n")
    done = run_python(
        f"import sys; sys.path.append({str(tmp_path)!r}); import torch_memory_saver\n"
        f"import cumempool, {OURS} as t\n"
        "try: t.install()\n"
        "except cumempool.InUseError as e: print(e)\n"
        "assert sys.modules['torch_memory_saver'].torch_memory_saver == 'real'\n"
        "assert t.folder_for_path() not in sys.path"
    )
    assert (done.err, done.code) == ("", 0)
    assert str(tmp_path) in done.out
    assert "before anything imports" in done.out


def test_installed_module_comes_before_the_real_one_on_the_path(
    run_python: RunPython, tmp_path: Path
) -> None:
    (tmp_path / "torch_memory_saver.py").write_text("raise AssertionError('the real one')\n")
    done = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import {OURS}; {OURS}.install()\n{PROGRAM}"
    )
    assert (done.out, done.err, done.code) == ("RIGHT\n", "", 0)


def test_folder_on_the_path_is_enough(
    run_python: RunPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = [ours("").folder_for_path(), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    done = run_python(PROGRAM)
    assert (done.out, done.err, done.code) == ("RIGHT\n", "", 0)


def test_spawned_process_gets_it(run_python: RunPython, tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(f"def run():\n    exec({PROGRAM!r}, {{}})\n")
    main = tmp_path / "main.py"
    main.write_text(
        "import multiprocessing, sys\n"
        "if __name__ == '__main__':\n"
        f"    import {OURS} as t, child\n"
        "    t.install()\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child.run)\n"
        "    process.start(); process.join(60); sys.exit(process.exitcode)\n"
    )
    done = run_python("", str(main))
    assert (done.out, done.err, done.code) == ("RIGHT\n", "", 0)


def test_process_of_any_kind_gets_it_inside_configure_subprocess(run_python: RunPython) -> None:
    done = run_python(
        f"import os, subprocess, sys, {OURS} as t\n"
        "before = os.environ.get('PYTHONPATH')\n"
        f"code = {PROGRAM!r}\n"
        "with t.configure_subprocess():\n"
        "    assert 'LD_PRELOAD' not in os.environ\n"
        "    subprocess.run([sys.executable, '-W', 'error', '-c', code], check=True, timeout=60)\n"
        "assert os.environ.get('PYTHONPATH') == before"
    )
    assert (done.out, done.err, done.code) == ("RIGHT\n", "", 0)
