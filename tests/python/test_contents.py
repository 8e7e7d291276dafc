"""Random sequences of writes and transitions on random tiers: contents are those of a model."""

from __future__ import annotations

import tempfile

import hypothesis
import hypothesis.strategies as st
import torch
from conftest import GRANULE, MIB, assert_nothing_is_held
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cumempool import Backup, CuMemAllocator, CuMemConfig, OutOfHostMemoryError

TAGS = ("a", "b", "c")
TAG = st.sampled_from(TAGS)
SOME = st.lists(TAG, unique=True)
SIZE = st.sampled_from([1, 1000, GRANULE, GRANULE + 1, 2 * GRANULE + 4097])
TIER = st.sampled_from(["pinned", "pageable", "file", "peer"])


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

    @precondition(lambda self: len(self.memory) < 6)
    @rule(tag=TAG, size=SIZE, value=st.integers(0, 255))
    def allocate(self, tag: str, size: int, value: int) -> None:
        tensor = self.alloc.empty(size, dtype=torch.uint8, tag=tag).fill_(value)
        self.memory.append((tag, tensor))
        self.model.append(torch.full((size,), value, dtype=torch.uint8))

    @precondition(lambda self: self.memory)
    @rule(at=st.integers(0, 5))
    def free(self, at: int) -> None:
        at %= len(self.memory)
        del self.memory[at], self.model[at]
        self.asleep = {n - (n > at): kept for n, kept in self.asleep.items() if n != at}

    @precondition(lambda self: self.memory)
    @rule(at=st.integers(0, 5), where=st.floats(0, 0.999), value=st.integers(0, 255))
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

    @rule(tags=SOME)
    def sleep(self, tags: list[str]) -> None:
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
        others = [tag for tag in TAGS if tag not in tags]
        report = self.alloc.swap(sleep=tags, wake=others)
        moved = self.to_sleep(tags) + self.to_wake(others)
        assert sum(tag.allocations for tag in report.tags.values()) == moved

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
        assert stats.failed_transitions == 0
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
