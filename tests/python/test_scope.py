"""`use_memory_pool`: which tag counts, nesting, re-entry, exceptions, slots, threads (R10)."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GRANULE, MakeAllocator, assert_nothing_is_held
from refusals import refuses

from cumempool import (
    ClosedError,
    CuMemAllocator,
    CuMemConfig,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
    OutOfSlotsError,
    UnroutedWarning,
    UnsupportedError,
    _core,
)
from cumempool._pool import events, scope


def tag_here(alloc: CuMemAllocator) -> str:
    return alloc.tag_of(alloc.empty(1))


def test_inside_the_scope_its_tag_is_that_of_empty_and_outside_the_default(
    alloc: CuMemAllocator,
) -> None:
    assert tag_here(alloc) == "default"
    with alloc.use_memory_pool("weights") as scope:
        assert scope.tag == "weights"
        assert tag_here(alloc) == "weights"
        assert alloc.tag_of(alloc.empty(1, tag="named")) == "named"
    assert tag_here(alloc) == "default"
    with alloc.use_memory_pool():
        assert tag_here(alloc) == "default"


def test_scopes_nest_and_the_innermost_counts(alloc: CuMemAllocator) -> None:
    with alloc.use_memory_pool("a"):
        with alloc.use_memory_pool("b"):
            with alloc.use_memory_pool("a"):
                assert tag_here(alloc) == "a"
            assert tag_here(alloc) == "b"
        assert tag_here(alloc) == "a"


def test_a_tag_is_entered_again_and_keeps_its_allocations(alloc: CuMemAllocator) -> None:
    kept = []
    for value in range(3):
        with alloc.use_memory_pool("weights"):
            kept.append(alloc.empty(4).fill_(value))
    assert alloc.stats().tags["weights"].awake_allocations == 3
    assert [tensor[0].item() for tensor in kept] == [0, 1, 2]


def test_scopes_of_two_allocators_do_not_mix(make_allocator: MakeAllocator) -> None:
    one, two = make_allocator(), make_allocator()
    with one.use_memory_pool("a"), two.use_memory_pool("b"):
        assert tag_here(one) == "a"
        assert tag_here(two) == "b"
    with one.use_memory_pool("a"):
        assert tag_here(two) == "default"


def test_an_exception_passes_and_the_scope_is_left(alloc: CuMemAllocator) -> None:
    with pytest.raises(KeyError, match="mine"), alloc.use_memory_pool("a"):
        raise KeyError("mine")
    assert tag_here(alloc) == "default"
    assert alloc.sleep().bytes_freed == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before 3.11")
def test_out_of_memory_of_torch_gets_the_reason_of_the_driver(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(mib=4)
    with pytest.raises(OutOfMemoryError):
        allocator.empty(5 * GRANULE)
    with pytest.raises(torch.OutOfMemoryError) as caught, allocator.use_memory_pool("a"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    (note,) = caught.value.__notes__
    assert note.startswith("cumempool: ")
    assert "CUDA_ERROR_OUT_OF_MEMORY" in note


def test_out_of_memory_of_torch_alone_gets_no_note(alloc: CuMemAllocator) -> None:
    """What was out of memory has not asked this library."""
    with pytest.raises(torch.OutOfMemoryError) as caught, alloc.use_memory_pool("a"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert not hasattr(caught.value, "__notes__")
    assert [event.error for event in alloc.events] == ["OutOfMemoryError: CUDA out of memory"]


def test_out_of_memory_is_written_down_where_exceptions_take_no_notes(
    make_allocator: MakeAllocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Python 3.11."""
    monkeypatch.setattr(events, "_file_numbers", itertools.count())

    class OutOfMemoryError(torch.OutOfMemoryError):
        @property
        def add_note(self) -> None:
            raise AttributeError

    allocator = make_allocator(mib=4, out_of_memory_directory=str(tmp_path))
    raised = OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as caught, allocator.use_memory_pool("a"):
        raise raised
    assert caught.value is raised
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["error"] == "CUDA out of memory"
    assert [event.operation for event in allocator.events] == ["malloc"]


def test_tensors_outlive_their_scope(alloc: CuMemAllocator) -> None:
    with alloc.use_memory_pool("a"):
        tensor = alloc.empty(4).fill_(3)
    alloc.sleep(tags="a")
    alloc.wake_up()
    assert tensor.tolist() == [3.0] * 4
    del tensor
    assert alloc.get_current_usage() == 0


def test_a_scope_object_is_entered_once_and_leaving_twice_does_nothing(
    alloc: CuMemAllocator,
) -> None:
    scope = alloc.use_memory_pool("a")
    with scope, refuses(InvalidArgumentError, names="once"):
        scope.__enter__()
    with refuses(InvalidArgumentError, names="once"), scope:
        pytest.fail("entered")
    with alloc.use_memory_pool("b"):
        scope.__exit__(None, None, None)  # must not end the scope that took its slot
        assert tag_here(alloc) == "b"
        with pytest.raises(InUseError):
            alloc.sleep(tags="b")
        alloc.sleep(tags="a")


def test_other_threads_are_not_affected(alloc: CuMemAllocator) -> None:
    seen = []
    with alloc.use_memory_pool("a"):
        thread = threading.Thread(target=lambda: seen.append(tag_here(alloc)))
        thread.start()
        thread.join()
    assert seen == ["default"]


# ---- all threads


def in_a_thread(work: Callable[[], object]) -> object:
    """What `work` returns in a thread of its own; it raises what that raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def test_a_scope_for_all_threads_takes_what_other_threads_allocate(alloc: CuMemAllocator) -> None:
    with alloc.use_memory_pool("a", all_threads=True) as scope:
        assert scope.all_threads
        assert in_a_thread(lambda: tag_here(alloc)) == "a"
        assert tag_here(alloc) == "a"
        with alloc.use_memory_pool("mine"):
            assert tag_here(alloc) == "mine"
            assert in_a_thread(lambda: tag_here(alloc)) == "a"
    assert in_a_thread(lambda: tag_here(alloc)) == "default"


def test_a_scope_that_a_thread_enters_inside_of_one_for_all_is_its_own(
    alloc: CuMemAllocator,
) -> None:
    def enter() -> tuple[str, str]:
        with alloc.use_memory_pool("theirs"):
            inside = tag_here(alloc)
        return inside, tag_here(alloc)

    with alloc.use_memory_pool("a", all_threads=True):
        assert in_a_thread(enter) == ("theirs", "a")


def test_scopes_for_all_threads_nest_in_one_thread_and_the_innermost_takes_all(
    alloc: CuMemAllocator,
) -> None:
    with alloc.use_memory_pool("a", all_threads=True):
        with alloc.use_memory_pool("b", all_threads=True):
            assert in_a_thread(lambda: tag_here(alloc)) == "b"
        assert in_a_thread(lambda: tag_here(alloc)) == "a"


@pytest.mark.parametrize("theirs_for_all", [False, True])
def test_a_scope_for_all_threads_does_not_take_those_of_an_open_scope(
    alloc: CuMemAllocator, theirs_for_all: bool
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> str:
        with alloc.use_memory_pool("theirs", all_threads=theirs_for_all):
            entered.set()
            assert leave.wait(60)
            return tag_here(alloc)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert entered.wait(60)
        mine = alloc.use_memory_pool("a", all_threads=True)
        with refuses(InUseError, names="'theirs'", operation="use_memory_pool", tag="a", device=0):
            mine.__enter__()
        with alloc.use_memory_pool("b"):  # for this thread alone it goes
            assert tag_here(alloc) == "b"
        leave.set()
        assert held.result(60) == "theirs"
    with mine:
        assert in_a_thread(lambda: tag_here(alloc)) == "a"


def test_scopes_for_all_threads_on_other_devices_do_not_meet(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(devices=2)
    with allocator.use_memory_pool("a", all_threads=True, devices=[0]):

        def enter() -> str:
            with allocator.use_memory_pool("b", all_threads=True, devices=[1]):
                return tag_here(allocator)

        assert in_a_thread(enter) == "b"


def test_scopes_of_several_allocators_meet_too(make_allocator: MakeAllocator) -> None:
    """There is one list of them in torch."""
    one, two = make_allocator(), make_allocator()
    with one.use_memory_pool("a"), two.use_memory_pool("b", all_threads=True):
        assert in_a_thread(lambda: (tag_here(one), tag_here(two))) == ("default", "b")

        def enter() -> None:
            with one.use_memory_pool("c", all_threads=True):
                pytest.fail("entered")

        with refuses(InUseError, names="'a'", operation="use_memory_pool", tag="c"):
            in_a_thread(enter)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_all_threads_is_a_bool(alloc: CuMemAllocator, value: Any) -> None:
    with refuses(InvalidTypeError, names="all_threads"):
        alloc.use_memory_pool("a", all_threads=value)


# ---- leaving


def test_another_thread_may_leave_the_scope(alloc: CuMemAllocator) -> None:
    scope = alloc.use_memory_pool("a")
    scope.__enter__()
    thread = threading.Thread(target=scope.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert tag_here(alloc) == "default"
    alloc.sleep()  # no scope is open any more
    alloc.close()


@pytest.mark.parametrize("operation", ["sleep", "sleep tags", "discard"])
def test_tags_of_open_scopes_do_not_sleep(alloc: CuMemAllocator, operation: str) -> None:
    kept = alloc.empty(2, tag="other").fill_(1)
    with alloc.use_memory_pool("a"):
        inside = alloc.empty(2).fill_(2)
        with refuses(InUseError, names="scope", operation=operation.split()[0], tag="a"):
            {
                "sleep": alloc.sleep,
                "sleep tags": lambda: alloc.sleep(tags=["other", "a"]),
                "discard": lambda: alloc.discard(["other", "a"]),
            }[operation]()
        assert alloc.stats().asleep_bytes == 0
        assert alloc.sleep(tags="other").bytes_freed == GRANULE  # others may
        assert alloc.wake_up().bytes_restored == GRANULE
    assert alloc.sleep(tags=["a", "other"]).bytes_freed == 2 * GRANULE
    alloc.wake_up()
    assert (kept.tolist(), inside.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_close_with_an_open_scope_is_refused(alloc: CuMemAllocator) -> None:
    with alloc.use_memory_pool("a"):
        with refuses(InUseError, names="1 open scope", operation="close"):
            alloc.close()
        assert tag_here(alloc) == "a"


def test_closing_by_force_inside_a_scope_leaves_it_cleanly() -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=8 * GRANULE))
    with allocator.use_memory_pool("a"):
        tensor = allocator.empty(1)
        allocator.close(force=True)
        with pytest.raises(ClosedError):
            allocator.empty(1)
    del tensor
    assert_nothing_is_held(allocator.stats())


def test_running_out_of_slots_is_a_clear_error_and_slots_come_back(alloc: CuMemAllocator) -> None:
    count = _core.slot_count()
    for _ in range(2):
        with ExitStack() as stack:
            for number in range(count):
                stack.enter_context(alloc.use_memory_pool(f"tag {number % 5}"))
            extra = alloc.use_memory_pool("one more")
            with refuses(
                OutOfSlotsError, names=f"{count} slots", operation="bind_slot", tag="one more"
            ):
                extra.__enter__()
            assert tag_here(alloc) == f"tag {(count - 1) % 5}"
            stack.pop_all().close()
            with extra:  # the scope that could not be entered can be, now
                assert tag_here(alloc) == "one more"


def test_policies_given_on_entering_are_those_of_the_tag(alloc: CuMemAllocator) -> None:
    with alloc.use_memory_pool("kv", on_sleep="discard", on_wake="zero"):
        tensor = alloc.empty(4).fill_(5)
    report = alloc.sleep(tags="kv")
    assert (report.bytes_discarded, report.bytes_backed_up) == (GRANULE, 0)
    assert alloc.wake_up().bytes_zeroed == GRANULE
    assert tensor.tolist() == [0.0] * 4


# ---- on the host driver, where torch cannot be routed


def test_a_scope_that_routed_nothing_warns_once_per_process(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "_warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with alloc.use_memory_pool("used"):
            kept = alloc.empty(4)
        assert caught == []
        for tag in ("weights", "kv_cache"):
            with alloc.use_memory_pool(tag):
                torch.ones(4)
    (warning,) = caught
    assert warning.category is UnroutedWarning
    assert warning.filename == __file__
    for part in ("'weights'", "host driver", "allocator.empty()", "allocator.adopt()"):
        assert part in str(warning.message)
    del kept


def test_a_scope_is_left_where_its_warning_is_an_error(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnroutedWarning), alloc.use_memory_pool("t"):
            pass
    assert scope.open_tags(alloc._state, ["t"]) == []
    assert alloc.sleep().bytes_freed == 0


def test_an_error_in_a_scope_that_routed_nothing_is_not_covered_by_a_warning(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError), alloc.use_memory_pool("t"):
            raise ZeroDivisionError


# ---- an allocator that is switched off


@pytest.fixture
def off() -> Iterator[CuMemAllocator]:
    config = CuMemConfig(enable_cumem_allocator=False, driver="host")
    allocator = CuMemAllocator(config)
    yield allocator
    allocator.close()
    assert_nothing_is_held(allocator.stats())


def test_switched_off_scopes_are_null_and_memory_is_ordinary(off: CuMemAllocator) -> None:
    assert not off.enabled
    module = torch.nn.Linear(4, 4)
    address = module.weight.data_ptr()
    with off.use_memory_pool("weights", on_sleep="discard", backup="pinned") as entered:
        assert entered.tag == "weights"
        tensor = off.empty(2, 3, dtype=torch.int32)
        with off.preserve_contents():
            assert off.adopt(module) == 0
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((2, 3), torch.int32, "cpu")
    assert module.weight.data_ptr() == address
    assert off.preserve(module) == 0
    assert off.snapshot() == []
    assert off.wake_up().bytes_mapped == 0
    with pytest.raises(NotInPoolError):
        off.tag_of(tensor)


@pytest.mark.parametrize(
    "call",
    [
        lambda off: off.sleep(),
        lambda off: off.sleep(offload_tags="weights"),
        lambda off: off.prepare(),
        lambda off: off.discard("weights"),
        lambda off: off.swap(sleep="weights"),
    ],
    ids=["sleep", "offload", "prepare", "discard", "swap"],
)
def test_switched_off_nothing_sleeps(
    off: CuMemAllocator, call: Callable[[CuMemAllocator], object]
) -> None:
    with refuses(UnsupportedError, names="enable_cumem_allocator=False"):
        call(off)


def test_switched_off_no_driver_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "open_cuda", lambda: pytest.fail("was opened"))
    allocator = CuMemAllocator(CuMemConfig(enable_cumem_allocator=False, driver="cuda"))
    with allocator.use_memory_pool("weights"):
        assert allocator.get_current_usage() == 0
    allocator.close()


# ---- scopes and transitions


def test_no_sleep_reaches_into_a_scope_that_was_entered_while_it_waited_for_its_turn(
    alloc: CuMemAllocator,
) -> None:
    held = [alloc.empty(1024, tag="weights"), alloc.empty(1024, tag="kv")]
    in_hook, go_on = threading.Event(), threading.Event()

    def hook(*_: object) -> None:
        in_hook.set()
        assert go_on.wait(60)

    registration = alloc.register_hooks("weights", before_unmap=hook)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(alloc.sleep, tags="weights")
        assert in_hook.wait(60)
        second = pool.submit(alloc.sleep, tags="kv")  # finds no scope, and waits for its turn
        waiting = [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
        while not any(_is_waiting(thread) for thread in waiting):
            time.sleep(0.005)
        with alloc.use_memory_pool("kv"):
            inside = alloc.empty(1024)
            go_on.set()
            first.result(60)
            with refuses(InUseError, names="scope", operation="sleep", tag="kv"):
                second.result(60)
            assert alloc.allocation_of(inside).state == "awake"
            inside.fill_(1)
    assert alloc.allocation_of(held[0]).state != "awake"
    registration.remove()
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert inside[0].item() == 1


def _is_waiting(thread: threading.Thread) -> bool:
    """Whether a thread waits in `Transitions` for its turn."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return False
    code = frame.f_code
    return code.co_name == "__enter__" and code.co_filename.endswith("_pool/hooks.py")


@pytest.mark.parametrize("operation", ["sleep", "discard", "swap"])
def test_a_scope_that_a_hook_leaves_open_refuses_what_called_the_hook(
    alloc: CuMemAllocator, operation: str
) -> None:
    tensor = alloc.empty(1024, tag="kv").fill_(3)
    told: list[str] = []
    scopes = ExitStack()

    def enter(*_: object) -> None:
        scopes.enter_context(alloc.use_memory_pool("kv"))

    with alloc.register_hooks(
        "kv", before_unmap=enter, after_map=lambda *_: told.append("there again")
    ):
        act: dict[str, Callable[[], object]] = {
            "sleep": lambda: alloc.sleep(tags="kv"),
            "discard": lambda: alloc.discard("kv"),
            "swap": lambda: alloc.swap(sleep="kv", wake=()),
        }
        with refuses(InUseError, names="scope", operation=operation, tag="kv"):
            act[operation]()
    assert told == ["there again"]
    assert tensor[0].item() == 3
    scopes.close()
    alloc.sleep(tags="kv")
