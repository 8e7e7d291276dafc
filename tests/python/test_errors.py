"""Exceptions: one class per status, caught by the built-in class that fits, nothing lost (R12)."""

from __future__ import annotations

import base64
import builtins
import contextlib
import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from conftest import GRANULE, MIB, MakeAllocator, filled

import cumempool.errors as errors
from cumempool import CuMemAllocator, distributed, open_shared
from cumempool._pool import publishing
from cumempool.errors import ERROR_BY_STATUS, CumempoolError, error_from_fields

ROOT = Path(__file__).resolve().parents[2]

FIELDS: dict[str, object] = {
    "status": 3,
    "message": "wake of tag 'kv' on device 1: no room",
    "operation": "wake",
    "tag": "kv",
    "device": 1,
    "bytes": 2 << 20,
    "driver_call": "cuMemCreate",
    "result": 2,
    "result_name": "CUDA_ERROR_OUT_OF_MEMORY",
    "free_bytes": 1 << 20,
    "total_bytes": 1 << 30,
    "advice": "free memory on device 1",
    "secondary": ["cuMemUnmap returned CUDA_ERROR_INVALID_VALUE"],
}

EVERY_CLASS = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, CumempoolError)
]


def statuses_of_header() -> dict[str, int]:
    text = (ROOT / "include" / "cumempool" / "status.h").read_text(encoding="utf-8")
    body = re.search(r"typedef enum cumempool_status \{(.*?)\}", text, re.DOTALL)
    assert body is not None
    found = re.findall(r"CUMEMPOOL_(\w+) = (\d+)", body[1])
    return {name: int(number) for name, number in found}


def test_every_status_of_the_header_has_a_class() -> None:
    statuses = statuses_of_header()
    assert statuses.pop("OK") == 0
    assert sorted(ERROR_BY_STATUS) == sorted(statuses.values())
    assert len(set(ERROR_BY_STATUS.values())) == len(statuses)


def test_each_status_name_goes_to_the_class_that_means_it() -> None:
    renamed = {
        "NOT_OWNED": "NotInPoolError",
        "BUSY": "TransitionInProgressError",
        "CAPTURING": "StreamCaptureError",
        "DRIVER_ERROR": "DriverError",
        "BACKUP_FAILED": "BackupError",
    }
    for name, number in statuses_of_header().items():
        if name != "OK":
            words = "".join(word.capitalize() for word in name.split("_"))
            assert ERROR_BY_STATUS[number].__name__ == renamed.get(name, f"{words}Error")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InvalidArgumentError", ValueError),
        ("InvalidTypeError", ValueError),
        ("InvalidTypeError", TypeError),
        ("UnavailableError", RuntimeError),
        ("UnavailableError", ValueError),
        ("OutOfMemoryError", RuntimeError),
        ("OutOfHostMemoryError", MemoryError),
        ("UnknownTagError", KeyError),
        ("NotInPoolError", ValueError),
        ("SharingError", RuntimeError),
        ("TransitionInProgressError", RuntimeError),
        ("StreamCaptureError", RuntimeError),
        ("InUseError", RuntimeError),
        ("ClosedError", RuntimeError),
        ("ForkedError", RuntimeError),
        ("OutOfSlotsError", RuntimeError),
        ("DriverError", RuntimeError),
        ("InternalError", RuntimeError),
        ("BackupError", RuntimeError),
        ("BackupDamagedError", RuntimeError),
        ("BackupDamagedError", errors.BackupError),
        ("UnsupportedError", RuntimeError),
    ],
)
def test_can_be_caught_as_the_builtin_class(name: str, builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise getattr(errors, name)("text")


def test_all_fields_arrive() -> None:
    error = error_from_fields(FIELDS)
    assert type(error) is errors.OutOfMemoryError
    assert str(error) == f"{FIELDS['message']}; {FIELDS['advice']}"
    assert vars(error) == {
        "operation": "wake",
        "tag": "kv",
        "device": 1,
        "bytes": 2 << 20,
        "driver_call": "cuMemCreate",
        "result": 2,
        "result_name": "CUDA_ERROR_OUT_OF_MEMORY",
        "free_bytes": 1 << 20,
        "total_bytes": 1 << 30,
        "advice": "free memory on device 1",
        "secondary": ("cuMemUnmap returned CUDA_ERROR_INVALID_VALUE",),
    }


def test_what_does_not_apply_is_none(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator()
    alloc.close()
    with pytest.raises(errors.ClosedError) as caught:
        alloc.empty(4)
    error = caught.value
    assert (error.device, error.free_bytes, error.total_bytes) == (None,) * 3
    assert (error.bytes, error.result, error.secondary) == (0, 0, ())
    with pytest.raises(errors.NotInPoolError) as caught:
        make_allocator().tag_of(torch.ones(3))
    assert (caught.value.tag, caught.value.device) == (None, None)


def test_a_full_device_has_zero_free_bytes_and_not_none() -> None:
    error = error_from_fields({**FIELDS, "free_bytes": 0})
    assert (error.free_bytes, error.total_bytes) == (0, 1 << 30)


@pytest.mark.parametrize("status", [0, 99, -1])
def test_a_status_without_a_class_is_an_internal_error(status: int) -> None:
    error = error_from_fields({**FIELDS, "status": status})
    assert type(error) is errors.InternalError
    assert str(error) == f"{FIELDS['message']}; {FIELDS['advice']}"
    assert str(status) in str(error_from_fields({"status": status}))


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_survives_pickling_and_copying(cls: type[CumempoolError]) -> None:
    error = cls("text", tag="kv", device=0, bytes=7, free_bytes=0, secondary=("a", "b"))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert str(again) == "text"
        assert vars(again) == vars(error)


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_the_message_has_the_advice_once(cls: type[CumempoolError]) -> None:
    assert str(cls("no room", advice="free some")) == "no room; free some"
    assert str(cls("no room: free some.", advice="free some.")) == "no room: free some."
    assert str(cls(advice="free some")) == "free some"
    again = pickle.loads(pickle.dumps(cls("no room", advice="free some")))
    assert str(again) == "no room; free some"


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_str_is_the_plain_message(cls: type[CumempoolError]) -> None:
    assert str(cls("unknown tag 'a'")) == "unknown tag 'a'"
    assert str(cls()) == ""


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_every_class_says_when_it_is_raised_and_is_exported(cls: type[CumempoolError]) -> None:
    assert len(vars(cls).get("__doc__") or "") > 30
    assert cls.__name__ in errors.__all__


# ---- R12, over every class: each is provoked, and says what there is to say

Provoke = Callable[[MakeAllocator, Path], object]


@dataclass(frozen=True)
class Case:
    """How an error of a class comes about on any machine, and what it must tell.

    Attributes:
        provoke: Raises it.
        tells: Fields that are set.
        says: What the message has in it.
    """

    provoke: Provoke
    tells: str
    says: str


def sleeping(alloc: CuMemAllocator, tag: str = "kv") -> torch.Tensor:
    tensor = filled(alloc, 3 * GRANULE, tag)
    alloc.sleep(offload_tags=tag)
    return tensor


def wake_without_room(make: MakeAllocator, path: Path) -> None:
    alloc = make(mib=8)
    tensor = sleeping(alloc)
    other = alloc.empty(3 * GRANULE, dtype=torch.uint8, tag="other")
    try:
        alloc.wake_up("kv")
    finally:
        del tensor, other


def sleep_over_the_limit(make: MakeAllocator, path: Path) -> None:
    alloc = make(limit=MIB)
    tensor = filled(alloc, GRANULE, "kv")
    alloc.sleep(tags=alloc.tag_of(tensor))


def sleep_in_a_hook(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    tensor = filled(alloc, GRANULE, "kv")
    caught: list[CumempoolError] = []

    def hook(tag: str, ranges: object) -> None:
        try:
            alloc.sleep(tags="kv")
        except CumempoolError as error:
            caught.append(error)

    with alloc.register_hooks("kv", before_unmap=hook):
        alloc.sleep(tags="kv")
    del tensor
    raise caught.pop()


def sleep_of_pinned_memory(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    tensor = filled(alloc, GRANULE, "kv")
    with alloc.pin("kv", holder="a network card"):
        alloc.sleep(tags=alloc.tag_of(tensor))


def use_after_close(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    alloc.close()
    alloc.empty(3, tag="kv")


def use_in_a_fork(make: MakeAllocator, path: Path) -> None:
    raise from_python(
        "alloc = cumempool.CuMemAllocator()\n"
        "if os.fork() == 0:\n"
        "    give(lambda: alloc.empty(3, tag='kv'))\n"
        "else:\n"
        "    os.wait()\n"
    )


def too_many_scopes(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    with contextlib.ExitStack() as scopes:
        for number in range(65):
            scopes.enter_context(alloc.use_memory_pool(f"tag {number}"))


def backup_in_no_directory(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    tensor = filled(alloc, GRANULE, "kv")
    folder = path / "gone"
    folder.mkdir()
    alloc.set_backup("kv", f"file:{folder}")
    folder.rmdir()
    alloc.sleep(tags=alloc.tag_of(tensor))


def damaged_backup(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    with alloc.use_memory_pool("kv", backup=f"file:{path}"):
        pass
    tensor = sleeping(alloc)
    for link in Path("/proc/self/fd").iterdir():
        # A backup file has no name: "/path/#123 (deleted)".
        if link.exists() and os.readlink(link).startswith(f"{path}/"):
            with open(link, "r+b") as file:
                file.seek(MIB)
                file.write(b"damage")
    try:
        alloc.wake_up("kv")
    finally:
        del tensor


def sleep_of_ordinary_memory(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    with alloc.use_memory_pool("kv", backing="cuda_malloc"):
        tensor = filled(alloc, GRANULE, "kv")
    try:
        alloc.sleep(tags="kv")
    finally:
        del tensor


def open_what_has_slept(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    tensor = filled(alloc, GRANULE, "kv")
    memory = alloc.share(tensor)
    alloc.sleep(tags="kv")
    alloc.wake_up()
    open_shared(memory)


def a_rank_that_does_not_come(make: MakeAllocator, path: Path) -> None:
    alloc = make()
    tensor = filled(alloc, GRANULE, "kv")
    group = distributed.StoreGroup(dist.HashStore(), 0, 2)
    distributed.sleep(group, offload_tags=["kv"], allocator=alloc, timeout=0.2)
    del tensor


def process_that_does_not_answer(make: MakeAllocator, path: Path) -> None:
    file = path / "1-1.stats.json"
    publishing.request_snapshot(
        publishing.Published(1, "stopped", 0.0, MappingProxyType({}), file), timeout=0.05
    )


def from_record(status: int, **fields: object) -> Provoke:
    """Raises what the core's record of a failure becomes, where no host can be made to fail so."""

    def provoke(make: MakeAllocator, path: Path) -> None:
        record = {**FIELDS, "status": status, **fields}
        raise error_from_fields({**record, "message": f"{FIELDS['message']}. {record['advice']}"})

    return provoke


def from_python(code: str, **environment: str) -> CumempoolError:
    """What `give` caught in an interpreter of its own, which it has gone through pickled."""
    prelude = (
        "import base64, os, pickle, sys, cumempool\n"
        "def give(call):\n"
        "    try:\n"
        "        call()\n"
        "    except cumempool.CumempoolError as error:\n"
        "        print(base64.b64encode(pickle.dumps(error)).decode(), flush=True)\n"
        "    os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "CUMEMPOOL_DRIVER": "host", **environment},
    )
    assert done.stdout, done.stderr
    error: CumempoolError = pickle.loads(base64.b64decode(done.stdout))
    return error


def no_gpu(make: MakeAllocator, path: Path) -> None:
    config = "cumempool.CuMemConfig(driver='cuda')"
    code = f"give(lambda: cumempool.CuMemAllocator({config}))\n"
    raise from_python(code, CUDA_VISIBLE_DEVICES="")


CASES: dict[type[CumempoolError], Case] = {
    errors.CumempoolError: Case(process_that_does_not_answer, "advice", "did not answer"),
    errors.InvalidArgumentError: Case(
        lambda make, path: make().use_memory_pool("x" * 300), "advice", "255 bytes"
    ),
    errors.InvalidTypeError: Case(
        lambda make, path: make().sleep(tags=3),  # type: ignore[arg-type]
        "",
        "tags is a tag or an iterable of tags, not 3",
    ),
    errors.UnavailableError: Case(no_gpu, "operation advice", "CUDA"),
    errors.OutOfMemoryError: Case(
        wake_without_room,
        "operation tag device bytes driver_call result result_name free_bytes total_bytes advice",
        "everything is still asleep with its backup",
    ),
    errors.OutOfHostMemoryError: Case(
        sleep_over_the_limit, "operation tag device bytes advice", "host_backup_limit"
    ),
    errors.UnknownTagError: Case(
        lambda make, path: make().wake_up("wieghts"), "operation tag advice", "wieghts"
    ),
    errors.NotInPoolError: Case(
        lambda make, path: make().tag_of(torch.ones(3)), "operation advice", "no allocation"
    ),
    errors.TransitionInProgressError: Case(sleep_in_a_hook, "operation advice", "sleep"),
    errors.StreamCaptureError: Case(
        from_record(8, driver_call="", result=0, result_name="", bytes=0),
        "operation tag device advice",
        "wake",
    ),
    errors.InUseError: Case(
        sleep_of_pinned_memory, "operation tag device advice", "'a network card'"
    ),
    errors.ClosedError: Case(use_after_close, "operation advice", "closed"),
    errors.ForkedError: Case(use_in_a_fork, "advice", "spawn"),
    errors.OutOfSlotsError: Case(too_many_scopes, "operation tag advice", "64 slots"),
    errors.DriverError: Case(
        from_record(13, result=700, result_name="CUDA_ERROR_ILLEGAL_ADDRESS"),
        "operation tag device bytes driver_call result result_name free_bytes total_bytes advice",
        "wake",
    ),
    errors.InternalError: Case(from_record(14), "operation advice", "wake"),
    errors.BackupError: Case(backup_in_no_directory, "operation tag device advice", "gone"),
    errors.BackupDamagedError: Case(
        damaged_backup, "operation tag device bytes advice", "does not hold what was written"
    ),
    errors.UnsupportedError: Case(
        sleep_of_ordinary_memory, "operation tag device advice", "cudaMalloc"
    ),
    errors.SharingError: Case(
        open_what_has_slept, "", "it has slept since it was shared; share it again"
    ),
    errors.DistributedTransitionError: Case(
        a_rank_that_does_not_come, "operation rank unanswered states advice", "1"
    ),
}


def test_every_class_has_a_case_and_a_new_one_needs_one() -> None:
    assert set(CASES) == set(EVERY_CLASS)
    public = {name for name in errors.__all__ if name.endswith("Error")}
    assert {cls.__name__ for cls in EVERY_CLASS} == public


@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda cls: cls.__name__)
def test_an_error_tells_what_happened_and_what_to_do(
    cls: type[CumempoolError], make_allocator: MakeAllocator, tmp_path: Path
) -> None:
    case = CASES[cls]
    with pytest.raises(cls) as caught:
        case.provoke(make_allocator, tmp_path)
    error = caught.value
    assert type(error) is cls
    silent = [
        name
        for name in case.tells.split()
        if getattr(error, name) is None or not (getattr(error, name) or name in ("device", "rank"))
    ]
    assert silent == [], vars(error)
    assert case.says in str(error)
    assert error.advice in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (cls, str(error), vars(error))


# ---- the page about them

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SECTIONS = dict(
    zip(*[iter(re.split(r"^## (\w+Error)$", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True)
)
STATUS_BY_ERROR = {cls: status for status, cls in ERROR_BY_STATUS.items()}


def fields_in_table(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_the_page_has_a_section_for_every_error_and_no_other() -> None:
    assert sorted(SECTIONS) == sorted(cls.__name__ for cls in EVERY_CLASS)


def test_troubleshooting_leads_to_every_section() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(errors\.md#(\w+)\) \|", page, re.MULTILINE)
    assert listed == [(name, name.lower()) for name in SECTIONS]


def test_the_page_has_every_field() -> None:
    common = PAGE.partition("## Fields")[2].partition("## CumempoolError")[0]
    assert fields_in_table(common) == list(CumempoolError.__annotations__)
    for cls in EVERY_CLASS:
        own = [] if cls is CumempoolError else list(vars(cls).get("__annotations__", {}))
        assert fields_in_table(SECTIONS[cls.__name__]) == own


@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda cls: cls.__name__)
def test_a_section_says_when_what_to_do_and_what_else_it_is(cls: type[CumempoolError]) -> None:
    section = SECTIONS[cls.__name__]
    assert re.search(r"^When: \w.{20,}", section, re.MULTILINE)
    assert re.search(r"^What to do: [\w`].{10,}", section, re.MULTILINE)
    first = section.strip().splitlines()[0]
    bases = set(re.findall(r"`(\w+)`", first))
    assert bases
    assert all(issubclass(cls, {**vars(builtins), **vars(errors)}[base]) for base in bases)
    expected = {base.__name__ for base in cls.__mro__[1:] if base.__module__ == "builtins"}
    expected -= {"object", "BaseException", "LookupError"}
    assert bases >= (expected - {"Exception"} or expected)
    status = re.search(r"Status (\d+)\.", first)
    assert (int(status[1]) if status else None) == STATUS_BY_ERROR.get(cls)
