"""Random sequences of writes and transitions on random tiers: contents are those of a model.

Failures are those that Python can bring about: a full device, a directory that is not there, pins.
A driver call that fails is for tests/cpp: the sweep and the fuzzer have the driver that does that.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from conftest import GRANULE, MIB, assert_nothing_is_held
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cumempool import (
    Backup,
    BackupError,
    CuMemAllocator,
    CuMemConfig,
    InUseError,
    OutOfHostMemoryError,
    OutOfMemoryError,
    open_shared,
)

TAGS = ("a", "b", "c")
LATER = ("d", "層")  # not known at first
TAG = st.sampled_from(TAGS)
ANY_TAG = st.sampled_from(TAGS + LATER)
SOME = st.lists(TAG, unique=True)
SIZE = st.sampled_from([1, 1000, GRANULE, GRANULE + 1, 2 * GRANULE + 4097])
TIER = st.sampled_from(["pinned", "pageable", "file", "peer"])
MOST = 6  # tensors

T = TypeVar("T")


def in_a_new_thread(act: Callable[[], T]) -> T:
    """What `act` returns in a thread that lives no longer."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


class Contents(RuleBasedStateMachine):
    """An allocator on two devices beside plain tensors on the CPU.

    `model` has what each tensor must hold, or None where nobody knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.memory: list[tuple[str, torch.Tensor]] = []
        self.model: list[torch.Tensor | None] = []
        self.asleep: dict[int, bool] = {}  # place in the lists above -> is it backed up?
        self.failed = 0  # transitions

    @initialize(
        retain=st.booleans(),
        limit=st.sampled_from([None, 3 * GRANULE]),
        overflow=st.sampled_from(["pageable", "file"]),
    )
    def make(self, retain: bool, limit: int | None, overflow: str) -> None:
        config = CuMemConfig(
            driver="host",
            host_driver_devices=2,
            host_driver_bytes=128 * MIB,
            host_backup_limit=limit,
            host_backup_overflow=self.backup(overflow),
            retain_backups=retain,
        )
        self.alloc = CuMemAllocator(config)
        for tag in TAGS:
            self.alloc.use_memory_pool(tag, on_sleep="offload")

    def backup(self, tier: str) -> Backup:
        texts = {"file": f"file:{self.directory.name}", "peer": "peer:1"}
        return Backup.parse(texts.get(tier, tier))

    def of(self, tags: list[str]) -> list[int]:
        return [at for at, (tag, _) in enumerate(self.memory) if tag in tags]

    def backup_of(self, at: int, *, writable: bool = False) -> torch.Tensor | None:
        """A view of the backup, where there is one to be had."""
        tensor = self.memory[at][1]
        if self.alloc.allocation_of(tensor).backup_tier in {None, "peer"}:
            return None
        try:
            return self.alloc.read_backup(tensor, writable=writable)
        except OutOfHostMemoryError:  # it is in pieces, and there is no room to join them
            assert self.alloc.config.host_backup_limit is not None
            return None

    def to_sleep(self, tags: list[str]) -> int:
        moved = [at for at in self.of(tags) if at not in self.asleep]
        self.asleep |= dict.fromkeys(moved, True)
        return len(moved)

    def to_wake(self, tags: list[str]) -> int:
        moved = [at for at in self.of(tags) if at in self.asleep]
        for at in moved:
            if not self.asleep.pop(at):
                self.model[at] = None
        return len(moved)

    def add(self, tag: str, tensor: torch.Tensor, value: int) -> None:
        assert self.alloc.tag_of(tensor) == tag
        self.memory.append((tag, tensor.fill_(value)))
        self.model.append(torch.full((tensor.numel(),), value, dtype=torch.uint8))

    def declare(self, tag: str) -> None:
        if tag in LATER:
            self.alloc.use_memory_pool(tag, on_sleep="offload")

    @precondition(lambda self: len(self.memory) < MOST)
    @rule(tag=ANY_TAG, size=SIZE, value=st.integers(0, 255), threaded=st.booleans())
    def allocate(self, tag: str, size: int, value: int, threaded: bool) -> None:
        self.declare(tag)

        def make() -> torch.Tensor:
            return self.alloc.empty(size, dtype=torch.uint8, tag=tag)

        self.add(tag, in_a_new_thread(make) if threaded else make(), value)

    @precondition(lambda self: len(self.memory) < MOST - 2)
    @rule(outer=ANY_TAG, inner=ANY_TAG, size=SIZE, value=st.integers(0, 255))
    def allocate_in_nested_scopes(self, outer: str, inner: str, size: int, value: int) -> None:
        for tag in (outer, inner):
            self.declare(tag)

        def make() -> torch.Tensor:
            return self.alloc.empty(size, dtype=torch.uint8)

        with self.alloc.use_memory_pool(outer):
            self.add(outer, make(), value)
            with self.alloc.use_memory_pool(inner):
                assert self.alloc.tag_of(in_a_new_thread(make)) == "default"  # freed at once
                self.add(inner, make(), value)
                with pytest.raises(InUseError):
                    self.alloc.sleep(tags=[outer])
            self.add(outer, make(), value)

    @precondition(lambda self: any(at not in self.asleep for at in range(len(self.memory))))
    @rule(at=st.integers(0, MOST - 1), value=st.integers(0, 255), whole_tag=st.booleans())
    def share(self, at: int, value: int, whole_tag: bool) -> None:
        """Another mapping of the same memory, through the endpoint; the tag stays awake for it."""
        awake = [n for n in range(len(self.memory)) if n not in self.asleep]
        at = awake[at % len(awake)]
        tag, tensor = self.memory[at]
        if whole_tag and all(n not in self.asleep for n in self.of([tag])):
            opened = open_shared(self.alloc.share(tag))
            assert len(opened) == len(self.of([tag]))
        else:
            one = open_shared(self.alloc.share(tensor))
            assert isinstance(one, torch.Tensor)
            assert torch.equal(one, tensor)
            one[-1] = value
            expected = self.model[at]
            if expected is not None:
                expected[-1] = value
            del one
            opened = open_shared(self.alloc.share(tensor))
        with pytest.raises(InUseError):
            self.alloc.sleep(tags=[tag])
        self.failed += 1
        del opened
        deadline = time.monotonic() + 20
        while self.alloc.stats().tags[tag].pins:
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    @rule(tags=SOME)
    def wake_without_room(self, tags: list[str]) -> None:
        """Either there is enough all the same, or nothing wakes and nothing is lost."""
        stats = self.alloc.stats()
        needed = sum(self.alloc.allocation_of(self.memory[at][1]).bytes for at in self.asleep)
        room = 128 * MIB - stats.physical_bytes
        filler = self.alloc.empty(max(room - GRANULE, GRANULE), dtype=torch.uint8, tag="filler")
        assert self.alloc.stats().physical_bytes <= 128 * MIB
        waking = [at for at in self.of(tags) if at in self.asleep]
        wanted = sum(self.alloc.allocation_of(self.memory[at][1]).bytes for at in waking)
        assert wanted <= needed
        if wanted > GRANULE:
            with pytest.raises(OutOfMemoryError):
                self.alloc.wake_up(tags)
            self.failed += 2  # it is tried once more
        else:
            self.alloc.wake_up(tags)
            self.to_wake(tags)
        del filler

    @rule(tag=TAG)
    def sleep_without_a_directory(self, tag: str) -> None:
        awake = [at for at in self.of([tag]) if at not in self.asleep]
        self.alloc.set_backup(tag, Backup.parse(f"file:{self.directory.name}/missing"))
        if awake:
            with pytest.raises(BackupError):
                self.alloc.sleep(tags=[tag])
            self.failed += 1
        self.alloc.set_backup(tag, Backup.parse("pinned"))

    @precondition(lambda self: self.memory)
    @rule(at=st.integers(0, MOST - 1), threaded=st.booleans())
    def free(self, at: int, threaded: bool) -> None:
        at %= len(self.memory)
        if threaded:
            in_a_new_thread(lambda: self.memory.pop(at))
        else:
            del self.memory[at]
        del self.model[at]
        self.asleep = {n - (n > at): kept for n, kept in self.asleep.items() if n != at}

    @precondition(lambda self: self.memory)
    @rule(at=st.integers(0, MOST - 1), where=st.floats(0, 0.999), value=st.integers(0, 255))
    def write(self, at: int, where: float, value: int) -> None:
        at %= len(self.memory)
        tensor: torch.Tensor | None = self.memory[at][1]
        position = int(where * tensor.numel())
        if at in self.asleep:
            tensor = self.backup_of(at, writable=True)
        if tensor is None:
            return
        tensor[position] = value
        expected = self.model[at]
        if expected is not None:
            expected[position] = value

    @rule(tag=TAG, tier=TIER)
    def set_backup(self, tag: str, tier: str) -> None:
        self.alloc.set_backup(tag, self.backup(tier))

    @rule(tags=SOME, threaded=st.booleans())
    def sleep(self, tags: list[str], threaded: bool) -> None:
        if threaded:
            report = in_a_new_thread(lambda: self.alloc.sleep(tags=tags))
        else:
            report = self.alloc.sleep(tags=tags)
        assert sum(tag.allocations for tag in report.tags.values()) == self.to_sleep(tags)
        assert 0 <= report.bytes_clean <= report.bytes_backed_up == report.bytes_freed

    @rule(tags=SOME, blocking=st.booleans())
    def wake(self, tags: list[str], blocking: bool) -> None:
        if blocking:
            report = self.alloc.wake_up(tags)
        else:
            report = self.alloc.wake_up(tags, blocking=False).result()
        assert sum(tag.allocations for tag in report.tags.values()) == self.to_wake(tags)

    @rule(tags=SOME)
    def swap(self, tags: list[str]) -> None:
        known = self.alloc.stats().tags
        others = [tag for tag in TAGS + LATER if tag not in tags and tag in known]
        report = self.alloc.swap(sleep=tags, wake=others)
        moved = self.to_sleep(tags) + self.to_wake(others)
        assert sum(tag.allocations for tag in report.tags.values()) == moved

    @rule(tag=st.sampled_from(LATER))
    def sleep_and_wake_a_new_tag(self, tag: str) -> None:
        self.declare(tag)
        self.alloc.sleep(tags=[tag])
        self.to_sleep([tag])
        self.alloc.wake_up()
        self.to_wake(list(TAGS + LATER))

    @rule(tags=SOME)
    def discard(self, tags: list[str]) -> None:
        self.alloc.discard(tags)
        for at in self.of(tags):
            self.asleep[at] = False

    @rule()
    def release_host_memory(self) -> None:
        self.alloc.release_host_memory()

    @invariant()
    def contents_and_numbers_are_those_of_the_model(self) -> None:
        if not hasattr(self, "alloc"):
            return
        stats = self.alloc.stats()
        asleep = [at for at in self.asleep if self.asleep[at]]
        assert sum(tag.backed_up_allocations for tag in stats.tags.values()) == len(asleep)
        assert stats.physical_bytes == stats.mapped_bytes == stats.awake_bytes
        backups = sum(tag.backup_bytes + tag.retained_bytes for tag in stats.tags.values())
        elsewhere = stats.pageable_bytes + stats.file_bytes + stats.peer_bytes
        assert backups <= stats.host_used_bytes + elsewhere
        assert stats.host_used_bytes <= 2 * backups  # those in pieces are joined to be read
        assert stats.failed_transitions == self.failed
        for at, (_, tensor) in enumerate(self.memory):
            expected = self.model[at]
            if expected is not None and at not in self.asleep:
                assert torch.equal(tensor, expected)
            if expected is None or not self.asleep.get(at):
                continue
            backup = self.backup_of(at)
            assert backup is None or torch.equal(backup, expected)

    def teardown(self) -> None:
        self.memory.clear()
        if hasattr(self, "alloc"):
            self.alloc.close()
            assert_nothing_is_held(self.alloc.stats())
        self.directory.cleanup()


class TestContents(Contents.TestCase):  # type: ignore[misc]
    """Runs the machine."""

    settings = hypothesis.settings(
        max_examples=30, stateful_step_count=25, deadline=None, derandomize=True, database=None
    )
