"""Where contents go while they sleep: the four tiers, per tag, and the budget of pinned memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    GRANULE,
    MIB,
    MakeAllocator,
    RunPython,
    assert_nothing_is_held,
    filled,
    random_bytes,
    states,
    totals,
)
from refusals import refuses

from cumempool import (
    Backup,
    BackupDamagedError,
    BackupError,
    CuMemAllocator,
    CuMemConfig,
    InvalidArgumentError,
    InvalidTypeError,
    OutOfHostMemoryError,
    OutOfMemoryError,
    UnknownTagError,
    UnsupportedError,
)

# ---- the object


@pytest.mark.parametrize(
    ("backup", "text"),
    [
        (Backup.pinned(), "pinned"),
        (Backup.pageable(), "pageable"),
        (Backup.file("/var/tmp"), "file:/var/tmp"),
        (Backup.file(Path("/var/tmp")), "file:/var/tmp"),
        (Backup.file("a b:c"), "file:a b:c"),
        (Backup.file("\N{GRINNING FACE}"), "file:\N{GRINNING FACE}"),
        (Backup.file(os.fsdecode(b"\xff")), "file:\udcff"),
        (Backup.peer(0), "peer:0"),
        (Backup.peer(12), "peer:12"),
    ],
    ids=ascii,
)
def test_a_backup_and_its_text_are_the_same(backup: Backup, text: str) -> None:
    assert str(backup) == text
    assert Backup.parse(text) == backup
    assert hash(Backup.parse(text)) == hash(backup)
    assert pickle.loads(pickle.dumps(backup)) == backup


def test_backups_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Backup.pinned().tier = "file"  # type: ignore[misc]
    assert not hasattr(Backup.pinned(), "__dict__")


@pytest.mark.parametrize(
    "text",
    [
        *("", "PINNED", "pinned:", "pinned:1", "pageable:x", "disk:/tmp"),
        *("file", "file:", "file:\0", "file:\ud800"),
        *("peer", "peer:", "peer:-1", "peer:1.0", "peer: 1", "peer:x", "peer:\u0663"),
        *("peer:99999999999", "peer:4294967296"),
    ],
    ids=ascii,
)
def test_texts_that_are_no_backup(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Backup.parse(text)


def test_a_bad_text_says_what_there_is() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Backup.parse("disk")
    for form in ("'disk'", "'pinned'", "'pageable'", "'file:DIRECTORY'", "'peer:DEVICE'"):
        assert form in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Backup.parse(1),  # type: ignore[arg-type]
        lambda: Backup.parse(b"pinned"),  # type: ignore[arg-type]
        lambda: Backup.file(1),  # type: ignore[arg-type]
        lambda: Backup.file(None),  # type: ignore[arg-type]
        lambda: Backup.peer("1"),  # type: ignore[arg-type]
        lambda: Backup.peer(True),
        lambda: Backup.peer(1.0),  # type: ignore[arg-type]
        lambda: Backup(1),  # type: ignore[arg-type]
        lambda: Backup("file", directory=b"/tmp"),  # type: ignore[arg-type]
    ],
)
def test_parts_of_the_wrong_type(make: Callable[[], Backup]) -> None:
    with pytest.raises(InvalidTypeError):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Backup("disk"),  # type: ignore[arg-type]
        lambda: Backup("file"),
        lambda: Backup("file", directory=""),
        lambda: Backup("file", directory="/tmp", device=1),
        lambda: Backup("peer"),
        lambda: Backup("peer", device=1, directory="/tmp"),
        lambda: Backup("pinned", directory="/tmp"),
        lambda: Backup("pageable", device=0),
        lambda: Backup.file(""),
        lambda: Backup.file("a\0b"),
        lambda: Backup.peer(-1),
        lambda: Backup.peer(2**31),
    ],
)
def test_parts_that_do_not_go_together(make: Callable[[], Backup]) -> None:
    with pytest.raises(InvalidArgumentError):
        make()


# ---- tags and their tiers


@pytest.fixture
def two(make_allocator: MakeAllocator) -> CuMemAllocator:
    """An allocator on two simulated devices."""
    return make_allocator(devices=2)


def held(alloc: CuMemAllocator) -> tuple[int, int, int, int]:
    stats = alloc.stats()
    return stats.host_used_bytes, stats.pageable_bytes, stats.file_bytes, stats.peer_bytes


def tier_texts(directory: Path) -> dict[str, str]:
    return {"pinned": "pinned", "pageable": "pageable", "file": f"file:{directory}"} | {
        "peer": "peer:1"
    }


TIER_NAMES = ("pinned", "pageable", "file", "peer")


@pytest.mark.parametrize("tier", TIER_NAMES)
def test_contents_come_back_from_every_tier(two: CuMemAllocator, tmp_path: Path, tier: str) -> None:
    sizes = [1, 1000, GRANULE, 3 * GRANULE + 17, 21 * MIB + 4097]
    two.use_memory_pool("t", backup=tier_texts(tmp_path)[tier])
    tensors = [filled(two, size, "t", seed) for seed, size in enumerate(sizes)]
    whole = two.stats().awake_bytes
    addresses = [tensor.data_ptr() for tensor in tensors]
    for cycle in range(3):
        report = two.sleep(tags="t")
        assert (report.bytes_backed_up, report.bytes_freed) == (whole, whole)
        stats = two.stats()
        assert (stats.physical_bytes, stats.mapped_bytes) == (0, 0)
        assert stats.tags["t"].backup_tier == tier
        assert {info.backup_tier for info in two.snapshot()} == {tier}
        assert stats.tags["t"].backup_bytes == whole
        assert two.wake_up().bytes_restored == whole
        assert [tensor.data_ptr() for tensor in tensors] == addresses
        for seed, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
            assert torch.equal(tensor, random_bytes(size, seed) + cycle)
            tensor.add_(1)
    assert two.stats().failed_transitions == 0


def test_bytes_are_counted_where_they_are(two: CuMemAllocator, tmp_path: Path) -> None:
    tensor = filled(two, 5 * GRANULE, "t")
    for tier, text in tier_texts(tmp_path).items():
        two.set_backup("t", text)
        two.sleep(tags="t")
        pinned, pageable, file, peer = held(two)
        assert pinned == (5 * GRANULE if tier == "pinned" else 0)
        assert (pageable >= 5 * GRANULE) == (tier == "pageable")
        assert (file >= 5 * GRANULE) == (tier == "file")
        assert peer == (5 * GRANULE if tier == "peer" else 0)
        assert two.stats().physical_bytes == 0  # memory of peers is not memory of tags
        two.wake_up()
        two.release_host_memory()
        assert held(two) == (0, 0, 0, 0)
        assert torch.equal(tensor, random_bytes(5 * GRANULE))


def test_several_tags_with_tiers_of_their_own_in_one_sleep(
    two: CuMemAllocator, tmp_path: Path
) -> None:
    tiers = tier_texts(tmp_path)
    for tag, text in tiers.items():
        two.use_memory_pool(tag, backup=text)
    tensors = {tag: filled(two, 3 * MIB, tag, seed) for seed, tag in enumerate(tiers)}
    dropped = filled(two, MIB, "dropped")
    report = two.sleep(offload_tags=tuple(tiers))
    assert report.bytes_backed_up == 16 * MIB
    assert {info.tag: info.backup_tier for info in two.snapshot()} == {
        **{tag: tag for tag in tiers},
        "dropped": None,
    }
    two.wake_up(["file", "peer"])
    two.wake_up()
    for seed, tensor in enumerate(tensors.values()):
        assert torch.equal(tensor, random_bytes(3 * MIB, seed))
    assert dropped.numel() == MIB


def test_a_tag_that_was_given_no_backup_is_pinned(alloc: CuMemAllocator) -> None:
    alloc.use_memory_pool("t")
    assert alloc.stats().tags["t"].backup_tier == "pinned"
    alloc.use_memory_pool("t", backup=Backup.pageable())
    alloc.use_memory_pool("t")  # None leaves what was set before
    assert alloc.stats().tags["t"].backup_tier == "pageable"


def test_a_backup_that_is_set_anew_counts_from_the_next_sleep_on(
    alloc: CuMemAllocator, tmp_path: Path
) -> None:
    tensor = filled(alloc, GRANULE, "t")
    alloc.sleep(tags="t")
    alloc.set_backup("t", Backup.file(tmp_path))
    assert alloc.snapshot()[0].backup_tier == "pinned"  # stays where it is
    alloc.wake_up()
    report = alloc.sleep(tags="t")
    assert (report.bytes_backed_up, report.bytes_clean) == (GRANULE, 0)
    assert alloc.snapshot()[0].backup_tier == "file"
    assert alloc.stats().host_used_bytes == 0
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(GRANULE))


def test_set_backup_wants_a_tag_that_is_known(alloc: CuMemAllocator) -> None:
    with pytest.raises(UnknownTagError):
        alloc.set_backup("nobody", "pinned")
    assert "nobody" not in alloc.stats().tags


@pytest.mark.parametrize(
    ("backup", "kind"),
    [
        (None, InvalidTypeError),
        (1, InvalidTypeError),
        (b"pinned", InvalidTypeError),
        ("disk", InvalidArgumentError),
        ("peer:2", InvalidArgumentError),
        (Backup.peer(64), InvalidArgumentError),
    ],
    ids=repr,
)
def test_bad_backups_leave_what_was_set(two: CuMemAllocator, backup: Any, kind: Any) -> None:
    two.use_memory_pool("t", backup="pageable")
    with pytest.raises(kind) as caught:
        two.set_backup("t", backup)
    assert "backup" in str(caught.value) or "device" in str(caught.value)
    if backup is not None:
        with pytest.raises(kind):
            two.use_memory_pool("new", backup=backup)
    assert two.stats().tags["t"].backup_tier == "pageable"


def test_a_peer_that_nothing_reaches_is_refused(alloc: CuMemAllocator) -> None:
    alloc.use_memory_pool("t")
    with refuses(UnsupportedError, names="device 0", operation="set_backup"):
        alloc.set_backup("t", "peer:0")  # there is one device
    with refuses(UnsupportedError, names="device 0", operation="set_backup"):
        alloc.use_memory_pool("t", backup=Backup.peer(0))
    assert alloc.stats().tags["t"].backup_tier == "pinned"


def test_a_device_cannot_back_itself_up(two: CuMemAllocator) -> None:
    two.use_memory_pool("t", backup="peer:1")
    other = two.empty(GRANULE, dtype=torch.uint8, device=0, tag="t").fill_(1)
    same = two.empty(GRANULE, dtype=torch.uint8, device=1, tag="t").fill_(2)
    with pytest.raises(UnsupportedError) as caught:
        two.sleep(tags="t")
    assert (caught.value.operation, caught.value.tag, caught.value.device) == ("sleep", "t", 1)
    assert set(states(two).values()) == {"awake"}
    assert (int(other.sum()), int(same.sum())) == (GRANULE, 2 * GRANULE)
    assert two.stats().peer_bytes == 0


def test_a_peer_without_room_puts_nothing_to_sleep(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=16, devices=2)
    allocator.use_memory_pool("t", backup="peer:1")
    tensors = [filled(allocator, 2 * GRANULE, "t", seed) for seed in range(3)]
    filler = allocator.empty(6 * GRANULE, dtype=torch.uint8, device=1, tag="filler")
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.sleep(tags="t")
    assert (caught.value.operation, caught.value.tag) == ("sleep", "t")
    assert allocator.stats().peer_bytes == 0
    assert set(states(allocator).values()) == {"awake"}
    assert all(torch.equal(t, random_bytes(2 * GRANULE, s)) for s, t in enumerate(tensors))
    del filler
    assert allocator.sleep(tags="t").bytes_backed_up == 6 * GRANULE
    allocator.wake_up()
    assert all(torch.equal(t, random_bytes(2 * GRANULE, s)) for s, t in enumerate(tensors))


def test_freeing_what_sleeps_gives_its_backup_back_on_every_tier(
    two: CuMemAllocator, tmp_path: Path
) -> None:
    """R6."""
    for tag, text in tier_texts(tmp_path).items():
        two.use_memory_pool(tag, backup=text)
        tensor = filled(two, GRANULE, tag)
        two.sleep(tags=tag)
        del tensor
        stats = two.stats()
        assert (stats.tags[tag].backup_bytes, stats.reserved_address_bytes) == (0, 0)
        assert (stats.host_used_bytes, stats.peer_bytes) == (0, 0)


# ---- files


def descriptors(directory: Path) -> list[str]:
    """Paths of this process's open files in a directory, those without a name included."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            if os.readlink(path).startswith(f"{directory}/"):
                found.append(str(path))
    return found


def test_a_directory_that_is_missing_loses_nothing(alloc: CuMemAllocator, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    alloc.use_memory_pool("t", backup=f"file:{missing}")
    tensor = filled(alloc, GRANULE, "t")
    for _ in range(2):
        with pytest.raises(BackupError) as caught:
            alloc.sleep(tags="t")
        assert type(caught.value) is BackupError
        assert (caught.value.operation, caught.value.tag) == ("sleep", "t")
        assert str(missing) in str(caught.value)
        assert caught.value.advice
        assert states(alloc) == {"t": "awake"}
    missing.mkdir()
    alloc.sleep(tags="t")
    assert states(alloc) == {"t": "backed_up"}
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(GRANULE))


def test_backup_files_have_no_name_and_go_with_the_allocator(tmp_path: Path) -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host"))
    allocator.use_memory_pool("t", backup=Backup.file(tmp_path))
    tensor = filled(allocator, 3 * GRANULE, "t")
    allocator.sleep(tags="t")
    assert os.listdir(tmp_path) == []
    (path,) = descriptors(tmp_path)
    assert os.stat(path).st_blocks * 512 >= 3 * GRANULE
    del tensor
    allocator.close()
    assert_nothing_is_held(allocator.stats())
    assert [os.stat(path).st_blocks for path in descriptors(tmp_path)] in ([], [0])
    del allocator
    assert descriptors(tmp_path) == []


def test_a_relative_directory_counts_from_where_it_was_set(
    alloc: CuMemAllocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    alloc.use_memory_pool("t", backup="file:here")
    monkeypatch.chdir("/")
    tensor = filled(alloc, GRANULE, "t")
    alloc.sleep(tags="t")
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(GRANULE))


def damage(directory: Path, at: int) -> None:
    """Changes one byte of the backup file, through the process's own descriptor."""
    (path,) = descriptors(directory)
    with open(path, "r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_file_wakes_nothing_and_can_be_discarded(
    alloc: CuMemAllocator, tmp_path: Path
) -> None:
    alloc.use_memory_pool("t", backup=Backup.file(tmp_path))
    tensor = filled(alloc, 4 * GRANULE, "t")
    kept = filled(alloc, GRANULE, "kept")
    alloc.sleep(offload_tags=("t", "kept"))
    damage(tmp_path, 3 * MIB + 5)
    for _ in range(2):
        with pytest.raises(BackupDamagedError) as caught:
            alloc.wake_up()
        assert isinstance(caught.value, BackupError)
        assert caught.value.operation == "wake"
        assert str(tmp_path) in str(caught.value)
        assert states(alloc) == {"t": "backed_up", "kept": "backed_up"}
        assert alloc.stats().physical_bytes == 0
    damage(tmp_path, 3 * MIB + 5)
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(4 * GRANULE))
    alloc.sleep(offload_tags=("t", "kept"))
    damage(tmp_path, 1)
    alloc.discard("t")
    alloc.wake_up()
    assert torch.equal(kept, random_bytes(GRANULE))


def test_a_full_disk_loses_nothing(run_python: RunPython, tmp_path: Path) -> None:
    code = f"""
import resource, torch
from cumempool import Backup, BackupError, CuMemAllocator
alloc = CuMemAllocator()
alloc.use_memory_pool("t", backup=Backup.file({str(tmp_path)!r}))
big = alloc.empty(16 << 20, dtype=torch.uint8, tag="t").fill_(3)
small = alloc.empty(1 << 20, dtype=torch.uint8, tag="small").fill_(4)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, hard))  # no file can be larger
for _ in range(2):
    try:
        alloc.sleep(offload_tags=("small", "t"))
        raise SystemExit("did not raise")
    except BackupError as error:
        assert error.operation == "sleep" and error.advice, repr(error)
        assert {str(tmp_path)!r} in str(error), str(error)
    assert [info.state for info in alloc.snapshot()] == ["awake", "awake"]
    assert int(big.sum()) == 3 * 16 << 20 and int(small.sum()) == 4 << 20
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
alloc.sleep(offload_tags=("small", "t"))
alloc.wake_up()
assert int(big.sum()) == 3 * 16 << 20 and int(small.sum()) == 4 << 20
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")


# ---- the budget of pinned memory


def test_a_sleep_over_the_limit_is_refused_and_loses_nothing(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(limit=8 * MIB)
    tensors = [filled(allocator, 3 * MIB, "t", seed) for seed in range(3)]
    with refuses(
        OutOfHostMemoryError,
        names="host_backup_overflow",
        operation="sleep",
        tag="t",
        bytes=12 * MIB,
    ):
        allocator.sleep(tags="t")
    assert states(allocator) == {"t": "awake"}
    assert all(torch.equal(t, random_bytes(3 * MIB, s)) for s, t in enumerate(tensors))


@pytest.mark.parametrize("overflow", ["pageable", "file"])
def test_what_the_limit_leaves_no_room_for_overflows(
    make_allocator: MakeAllocator, tmp_path: Path, overflow: str
) -> None:
    backup = Backup.parse(tier_texts(tmp_path)[overflow])
    allocator = make_allocator(limit=8 * MIB, overflow=backup)
    tensors = [filled(allocator, 3 * MIB, "t", seed) for seed in range(4)]
    for cycle in range(3):
        report = allocator.sleep(tags="t")
        assert report.bytes_backed_up == 16 * MIB
        tiers = [info.backup_tier for info in allocator.snapshot()]
        assert sorted(filter(None, tiers)) == sorted(["pinned", "pinned", overflow, overflow])
        stats = allocator.stats()
        assert stats.host_used_bytes == 8 * MIB
        assert stats.host_bytes <= 8 * MIB
        assert (stats.pageable_bytes > 0) == (overflow == "pageable")
        assert (stats.file_bytes > 0) == (overflow == "file")
        assert report.bytes_clean == (16 * MIB if cycle else 0)
        allocator.wake_up()
        assert all(torch.equal(t, random_bytes(3 * MIB, s)) for s, t in enumerate(tensors))


def test_tiers_of_their_own_do_not_count_against_the_limit(
    make_allocator: MakeAllocator, tmp_path: Path
) -> None:
    allocator = make_allocator(limit=4 * MIB, devices=2)
    tensors = []
    for seed, (tag, text) in enumerate(tier_texts(tmp_path).items()):
        allocator.use_memory_pool(tag, backup=text)
        tensors.append(filled(allocator, (1 if tag == "pinned" else 8) * MIB, tag, seed))
    allocator.sleep(offload_tags=TIER_NAMES)
    assert {info.tag: info.backup_tier for info in allocator.snapshot()} == {
        tag: tag for tag in TIER_NAMES
    }
    allocator.wake_up()
    assert all(torch.equal(t, random_bytes(t.numel(), s)) for s, t in enumerate(tensors))


def test_retained_backups_go_where_another_tag_needs_the_room(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(limit=8 * MIB)
    first, second = filled(allocator, 6 * MIB, "first", 1), filled(allocator, 8 * MIB, "second", 2)
    allocator.sleep(tags="first")
    allocator.wake_up()
    assert allocator.stats().tags["first"].retained_bytes == 6 * MIB
    allocator.sleep(tags="second")
    stats = allocator.stats()
    assert (stats.tags["first"].retained_bytes, stats.tags["second"].backup_bytes) == (0, 8 * MIB)
    allocator.wake_up()
    report = allocator.sleep(tags="first")
    assert totals(report) == {"bytes_freed": 6 * MIB, "bytes_backed_up": 6 * MIB}
    allocator.wake_up()
    assert torch.equal(first, random_bytes(6 * MIB, 1))
    assert torch.equal(second, random_bytes(8 * MIB, 2))


def test_backups_of_what_sleeps_are_never_given_up_for_room(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(limit=8 * MIB)
    first, second = filled(allocator, 6 * MIB, "first", 1), filled(allocator, 4 * MIB, "second", 2)
    allocator.sleep(tags="first")
    with pytest.raises(OutOfHostMemoryError):
        allocator.sleep(tags="second")
    assert states(allocator) == {"first": "backed_up", "second": "awake"}
    allocator.wake_up()
    assert torch.equal(first, random_bytes(6 * MIB, 1))
    assert torch.equal(second, random_bytes(4 * MIB, 2))
