"""Transitions of a group: all ranks or none, every wait bounded, every reason told to all."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gloo_rank
import pytest
import torch.distributed as dist
from conftest import GRANULE, MIB, MakeAllocator, filled, random_bytes
from refusals import refuses

from cumempool import (
    CuMemAllocator,
    CumempoolError,
    DistributedTransitionError,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    RegistrableRange,
    UnknownTagError,
    _torch,
    distributed,
)
from cumempool.distributed import GroupReport, StoreGroup
from cumempool.distributed.store import Channel

pytestmark = pytest.mark.extensive

# A server that has imported torch once, and from which processes are forked that use nothing of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed", "cumempool.distributed"])
SIZE = 4
PATIENCE = 60.0  # seconds until a rank of a test is taken to hang

Outcome = GroupReport | BaseException
NO_PIN: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


# ---- ranks that are threads: what the protocol does


class Threads:
    """Ranks in one process, each with an allocator of its own, that meet through one store."""

    def __init__(self, allocators: Sequence[CuMemAllocator]) -> None:
        self.store = dist.HashStore()
        self.allocators = allocators

    def group(self, rank: int) -> StoreGroup:
        return StoreGroup(self.store, rank, len(self.allocators))

    def run(self, work: Callable[[int], GroupReport]) -> list[Outcome]:
        """What `work` gave or raised on each rank, all of them at the same time."""
        outcomes: list[Outcome] = [AssertionError("hangs") for _ in self.allocators]

        def one(rank: int) -> None:
            try:
                outcomes[rank] = work(rank)
            except (CumempoolError, KeyboardInterrupt) as error:
                outcomes[rank] = error

        threads = [
            threading.Thread(target=one, args=(rank,), daemon=True)
            for rank in range(len(self.allocators))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        return outcomes

    def sleep(self, *offload: str, timeout: float = 30.0) -> list[Outcome]:
        return self.run(
            lambda rank: distributed.sleep(
                self.group(rank),
                offload_tags=offload,
                allocator=self.allocators[rank],
                timeout=timeout,
            )
        )

    def wake_up(self, timeout: float = 30.0) -> list[Outcome]:
        return self.run(
            lambda rank: distributed.wake_up(
                self.group(rank), allocator=self.allocators[rank], timeout=timeout
            )
        )

    def wait_for_others(self, number: int) -> None:
        """Waits until ranks 0 and 2 are in a round: who comes later takes rank 1 to be late."""
        keys = [f"cumempool/ranks/{number}/here/{rank}" for rank in (0, 2)]
        deadline = time.monotonic() + PATIENCE
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.001)

    def asleep(self) -> list[bool]:
        return [not a.stats().awake_bytes for a in self.allocators]


@pytest.fixture
def three(make_allocator: MakeAllocator) -> Threads:
    return Threads([make_allocator(mib=32) for _ in range(3)])


def refused(outcomes: Sequence[Outcome]) -> list[DistributedTransitionError]:
    errors = [o for o in outcomes if isinstance(o, DistributedTransitionError)]
    assert len(errors) == len(outcomes), outcomes
    return errors


def reports(outcomes: Sequence[Outcome]) -> list[GroupReport]:
    made = [o for o in outcomes if isinstance(o, GroupReport)]
    assert len(made) == len(outcomes), outcomes
    return made


def test_every_rank_gets_the_reports_of_all(three: Threads) -> None:
    sizes = [GRANULE, 2 * GRANULE, 3 * GRANULE]
    tensors = [filled(a, sizes[rank], "w", rank) for rank, a in enumerate(three.allocators)]
    kv = [a.empty(MIB, tag="kv") for a in three.allocators]
    slept = reports(three.sleep("w"))
    assert three.asleep() == [True] * 3
    for report in slept:
        assert list(report.ranks) == [0, 1, 2]
        assert [r.tags["w"].bytes_backed_up for r in report.ranks.values()] == sizes
        assert all(r.tags["kv"].bytes_discarded for r in report.ranks.values())
        assert report.bytes_freed == sum(r.bytes_freed for r in report.ranks.values())
        assert report.slowest_seconds <= report.seconds
        assert pickle.loads(pickle.dumps(report)) == report
        assert str(report).startswith("sleep on 3 ranks: freed ")
        assert "\n  rank 2: sleep: " in str(report)
        assert report.to_dict()["bytes_freed"] == report.bytes_freed
    woken = reports(three.wake_up())
    assert woken[0].bytes_mapped == slept[0].bytes_freed
    assert not woken[1].problems
    for rank, tensor in enumerate(tensors):
        assert tensor.equal(random_bytes(tensor.numel(), rank))
    del kv


def test_repeating_a_transition_changes_nothing(three: Threads) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    reports(three.sleep("w"))
    (report, *_) = reports(three.sleep("w"))
    assert report.bytes_freed == 0
    assert "nothing changed" in str(report)
    reports(three.wake_up())
    assert tensors[1].equal(random_bytes(MIB))


def test_a_group_that_has_nothing_reports_nothing(three: Threads) -> None:
    assert reports(three.sleep())[0].bytes_freed == 0
    assert reports(three.wake_up())[2].ranks[0].tags == {}


def test_different_calls_are_refused_on_all(three: Threads) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    calls = [distributed.sleep, distributed.wake_up, distributed.sleep]
    outcomes = three.run(
        lambda rank: calls[rank](three.group(rank), allocator=three.allocators[rank], timeout=30)
    )
    for error in refused(outcomes):
        assert "rank 1: called wake_up()" in str(error)
        assert set(error.states.values()) == {"unchanged"}
    assert three.asleep() == [False] * 3
    reports(three.sleep("w"))
    reports(three.wake_up())
    assert tensors[0].equal(random_bytes(MIB))


def test_a_tag_that_is_partly_asleep_is_refused(three: Threads) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    three.allocators[1].sleep(tags="w")
    more = three.allocators[1].empty(MIB, tag="w")
    errors = refused(three.sleep("w"))
    assert "partly awake" in errors[0].failures[1]
    assert isinstance(errors[1].__cause__, InUseError)
    assert errors[0].__cause__ is None
    three.allocators[1].wake_up()
    reports(three.sleep("w"))
    reports(three.wake_up())
    assert tensors[1].equal(random_bytes(MIB))
    del more


def test_a_tag_that_one_rank_does_not_know_is_refused(three: Threads) -> None:
    for allocator in three.allocators[:2]:
        filled(allocator, MIB, "w")
    errors = refused(three.sleep("w"))
    assert list(errors[0].failures) == [2]
    assert isinstance(errors[2].__cause__, UnknownTagError)


def test_a_failure_after_a_discard_says_whose_contents_are_lost(three: Threads) -> None:
    kept = [filled(a, MIB, "w") for a in three.allocators]
    kv = [a.empty(MIB, tag="kv") for a in three.allocators]

    def fail(tag: str, ranges: Sequence[RegistrableRange]) -> None:
        raise ValueError("no deregistration today")

    hook = three.allocators[1].register_hooks("kv", before_unmap=fail)
    errors = refused(three.sleep("w"))
    assert three.asleep() == [False] * 3
    for rank, error in enumerate(errors):
        assert error.failures == {1: "ValueError: no deregistration today"}
        assert error.states == {0: "contents_lost", 1: "unchanged", 2: "contents_lost"}
        assert error.lost_tags == (() if rank == 1 else ("kv",))
        assert kept[rank].equal(random_bytes(MIB))
    hook.remove()
    reports(three.sleep("w"))
    del kv


def test_a_way_back_that_fails_is_told_to_all(three: Threads) -> None:
    tensors = [filled(a, 20 * MIB, "w") for a in three.allocators]
    first, second, _ = three.allocators
    taken: list[Any] = []

    def fail(tag: str, ranges: Sequence[RegistrableRange]) -> None:
        while first.stats().awake_bytes:  # until rank 0 has slept, whose memory others take
            time.sleep(0.001)
        taken.append(first.empty(20 * MIB, dtype=tensors[0].dtype, tag="other"))
        raise ValueError("fails late")

    with second.register_hooks("w", before_unmap=fail):
        errors = refused(three.sleep("w"))
    for error in errors:
        assert error.states == {0: "not_undone", 1: "unchanged", 2: "unchanged"}
        assert "rank 0 could not go back" in str(error)
        assert any("rank 0: OutOfMemoryError" in text for text in error.secondary)
    assert three.asleep() == [False] * 3  # of rank 0, what was taken is awake
    assert first.stats().tags["w"].backed_up_bytes == 20 * MIB
    taken.clear()
    first.wake_up()
    assert tensors[0].equal(random_bytes(20 * MIB))
    errors.clear()


def test_what_is_preserved_is_neither_lost_nor_makes_the_rest_copied(three: Threads) -> None:
    scales = []
    for rank, allocator in enumerate(three.allocators):
        with allocator.use_memory_pool("kv", on_sleep="discard"):
            allocator.empty(8 * MIB)  # dies at once
            with allocator.preserve_contents():
                scales.append(allocator.empty(100).fill_(rank))
    cache = [a.empty(MIB, tag="kv") for a in three.allocators]
    reports(three.sleep())
    hog = three.allocators[2].empty(31 * MIB // 4, tag="other")
    for error in refused(three.wake_up()):
        assert error.failures[2].startswith("OutOfMemoryError: ")
        assert error.states == dict.fromkeys(range(3), "unchanged")
    for allocator in three.allocators:
        assert allocator.stats().tags["kv"].backup_bytes == GRANULE
    del hog
    reports(three.wake_up())
    assert [bool(tensor.eq(rank).all()) for rank, tensor in enumerate(scales)] == [True] * 3
    del cache


def test_an_interrupted_rank_goes_back_and_the_others_are_told(three: Threads) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]

    def interrupt(tag: str, ranges: Sequence[RegistrableRange]) -> None:
        raise KeyboardInterrupt

    with three.allocators[0].register_hooks("w", before_unmap=interrupt):
        outcomes = three.sleep("w")
    assert isinstance(outcomes[0], KeyboardInterrupt)
    for error in refused(outcomes[1:]):
        assert error.failures == {0: "was interrupted"}
    assert three.asleep() == [False] * 3
    assert tensors[2].equal(random_bytes(MIB))


@pytest.mark.timeout(60)
def test_whatever_the_timing_all_ranks_end_alike(three: Threads) -> None:
    tensors = [filled(a, 4 * MIB, "w") for a in three.allocators]
    chance = random.Random(7)
    made = 0
    for number in range(40):
        delays = [chance.choice([0.0, 0.02, 0.04, 0.06]) for _ in range(3)]
        timeout = chance.choice([0.04, PATIENCE])
        if number % 8 == 0:  # too late for sure
            delays[number % 3], timeout = 0.4, 0.04
        call = distributed.sleep if number % 2 else distributed.wake_up
        before = three.asleep()

        def one(
            rank: int,
            call: Any = call,
            delays: list[float] = delays,
            timeout: float = timeout,
        ) -> GroupReport:
            time.sleep(delays[rank])
            report: GroupReport = call(
                three.group(rank), tags=["w"], allocator=three.allocators[rank], timeout=timeout
            )
            return report

        outcomes = three.run(one)
        successes = sum(isinstance(outcome, GroupReport) for outcome in outcomes)
        assert successes in (0, 3), outcomes
        made += successes == 3
        after = [call is distributed.sleep] * 3 if successes else before
        assert three.asleep() == after
    assert 0 < made < 40
    reports(three.wake_up())
    assert all(tensor.equal(random_bytes(4 * MIB)) for tensor in tensors)


def test_nothing_piles_up_in_the_store(three: Threads) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    keys = []
    for _ in range(5):
        reports(three.sleep("w"))
        reports(three.wake_up())
        keys.append(three.store.num_keys())
    assert keys[1:] == [keys[1]] * 4
    assert tensors[0].equal(random_bytes(MIB))


def test_a_caught_error_keeps_no_tensor_of_the_caller(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator()
    causes: list[type] = []

    def refused_alone() -> None:
        tensor = filled(alloc, MIB, "w")
        pin = alloc.pin("w", "a registration")
        try:
            distributed.sleep(StoreGroup(dist.HashStore(), 0, 1), offload_tags="w", allocator=alloc)
        except DistributedTransitionError as error:
            causes.append(type(error.__cause__))
        pin.release()
        assert tensor.equal(random_bytes(MIB))

    gc.collect()
    gc.disable()
    try:
        refused_alone()
        assert alloc.stats().tags["w"].awake_bytes == 0
    finally:
        gc.enable()
    assert causes == [InUseError]


class Stuck:
    """A store whose host is cut off: its calls do not return."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def hang(*arguments: object) -> None:
            self.over.wait(PATIENCE)
            raise RuntimeError("the connection is gone")

        return hang


def test_a_store_that_never_answers_is_given_up(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator()
    tensor = filled(alloc, MIB, "w")
    store: Any = Stuck()
    begun = time.monotonic()
    with refuses(DistributedTransitionError, operation="sleep", states={0: "unchanged"}) as caught:
        distributed.sleep(StoreGroup(store, 0, 2), offload_tags="w", allocator=alloc, timeout=0.3)
    assert time.monotonic() - begun < 5
    store.over.set()
    (failure,) = caught.value.failures.values()
    assert "compare_set in 0.3 s" in failure
    assert tensor.equal(random_bytes(MIB))


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_bad_timeout_is_refused(make_allocator: MakeAllocator, timeout: float) -> None:
    with refuses(InvalidArgumentError, names=f"timeout={timeout}"):
        distributed.sleep(StoreGroup(dist.HashStore(), 0, 1), timeout=timeout)


class Failing:
    """A store that fails for one phase."""

    def __init__(self, store: Any, phase: str) -> None:
        self.store, self.phase = store, phase

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(key: Any, *arguments: object) -> Any:
            if any(f"/{self.phase}" in one for one in ([key] if isinstance(key, str) else key)):
                raise RuntimeError("the connection is gone")
            return getattr(self.store, name)(key, *arguments)

        return call


@pytest.mark.parametrize("phase", ["here", "vote0", "decision", "end"])
def test_a_rank_that_loses_the_store_goes_back(three: Threads, phase: str) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    store: Any = Failing(three.store, phase)
    alone = StoreGroup(store, 1, 3)

    def one(rank: int) -> GroupReport:
        group = alone if rank == 1 else three.group(rank)
        with three.allocators[rank].pin("w", "a registration") if rank == 2 else NO_PIN:
            return distributed.sleep(
                group, offload_tags="w", allocator=three.allocators[rank], timeout=1
            )

    for rank, error in enumerate(refused(three.run(one))):
        assert error.states[rank] == "unchanged"
        told = "the connection is gone" in str(error)
        assert told or (rank != 1 and phase in {"decision", "end"})  # which it cannot write
    assert three.asleep() == [False] * 3
    assert all(tensor.equal(random_bytes(MIB)) for tensor in tensors)


class OddError(BaseException):
    """What no program expects of a store."""


class Once:
    """A store that raises once, in a call for one phase of one round."""

    def __init__(self, store: Any, part: str, error: BaseException) -> None:
        self.store, self.part, self.error = store, part, error
        self.raised = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.store, name)

        def call(key: Any, *arguments: object) -> Any:
            keys = [key] if isinstance(key, str) else key
            if not self.raised and any(each.endswith(self.part) for each in keys):
                self.raised = True
                raise self.error
            return real(key, *arguments)

        return call


class InterruptedChannel(Channel):
    """A channel whose caller is interrupted once, when a call of one phase has been made."""

    def __init__(self, store: Any, prefix: str, patience: float) -> None:
        part, self.interrupt = "", False
        if isinstance(store, Once):
            part, store = store.part, store.store
        self.part = part
        super().__init__(store, prefix, patience)

    def has(self, keys: Sequence[str]) -> bool:
        self._strike(keys)
        return super().has(keys)

    def put(self, key: str, value: object) -> None:
        self._strike([key])
        super().put(key, value)

    def exchange(self, key: str, expected: object, value: object) -> Any:
        self._strike([key])
        return super().exchange(key, expected, value)

    def _strike(self, keys: Sequence[str]) -> None:
        if self.part and any(f"/{key}".endswith(self.part) for key in keys):
            self.part = ""
            raise KeyboardInterrupt


#: The end of a key that a rank touches in each phase; the number of the round is put in.
PHASES = ["/round", "/{}/here/1", "/{}/vote0/1", "/{}/decision", "/{}/end/1"]
ERRORS = [AttributeError, TypeError, KeyError, MemoryError, SystemExit, OddError, KeyboardInterrupt]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("error", [*ERRORS, None])
def test_whatever_a_rank_meets_in_whatever_phase_all_are_told_at_once(
    three: Threads,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException] | None,
    phase: str,
    number: int,
) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    if number:
        reports(three.wake_up())
    store: Any = Once(three.store, phase.format(number), (error or OddError)("odd"))
    if error is None:
        monkeypatch.setattr(distributed, "Channel", InterruptedChannel)
    fails = phase.endswith("end/1")  # a phase of rounds that are not made alone

    def one(rank: int) -> GroupReport:
        group = StoreGroup(store, 1, 3) if rank == 1 else three.group(rank)
        if rank == 1:
            three.wait_for_others(number)
        with three.allocators[rank].pin("w", "a registration") if rank == 2 and fails else NO_PIN:
            return distributed.sleep(
                group, offload_tags="w", allocator=three.allocators[rank], timeout=PATIENCE
            )

    begun = time.monotonic()
    outcomes = three.run(one)
    assert time.monotonic() - begun < PATIENCE / 4, outcomes
    slept = three.asleep()
    assert slept in ([True] * 3, [False] * 3), outcomes
    for rank in (0, 2):
        assert isinstance(outcomes[rank], GroupReport if slept[0] else DistributedTransitionError)
    if error is None:
        assert isinstance(outcomes[1], KeyboardInterrupt)
    elif not slept[0]:
        assert isinstance(outcomes[1], DistributedTransitionError)
    monkeypatch.undo()
    reports(three.sleep("w"))  # the round after it is made
    reports(three.wake_up())
    assert all(tensor.equal(random_bytes(MIB)) for tensor in tensors)


@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupt_while_a_rank_plans_is_told_at_once(three: Threads, number: int) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    if number:
        reports(three.wake_up())

    def interrupt(*_: object) -> None:
        three.wait_for_others(number)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(three.allocators[1]._state.transitions, "turn", interrupt)
        begun = time.monotonic()
        outcomes = three.sleep("w", timeout=PATIENCE)
    assert time.monotonic() - begun < PATIENCE / 4
    assert isinstance(outcomes[1], KeyboardInterrupt)
    for error in refused([outcomes[0], outcomes[2]]):
        assert error.failures == {1: "was interrupted"}
    assert three.asleep() == [False] * 3
    reports(three.sleep("w"))
    reports(three.wake_up())
    del tensors


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_gives_up_before_the_others_have_come_is_told_at_once(
    three: Threads, number: int
) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    if number:
        reports(three.wake_up())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    gave_up = threading.Event()

    def one(rank: int) -> GroupReport:
        if rank != 1:
            assert gave_up.wait(PATIENCE)
        try:
            return distributed.sleep(
                three.group(rank), "w", allocator=three.allocators[rank], timeout=PATIENCE
            )
        finally:
            gave_up.set()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(three.allocators[1]._state.transitions, "turn", interrupt)
        begun = time.monotonic()
        outcomes = three.run(one)
    assert time.monotonic() - begun < PATIENCE / 4
    assert isinstance(outcomes[1], KeyboardInterrupt)
    for error in refused([outcomes[0], outcomes[2]]):
        assert error.failures == {1: "was interrupted"}
        assert error.unanswered == ()
        assert error.states[1] == error.states[error.rank] == "unchanged"
    assert three.asleep() == [False] * 3
    reports(three.sleep("w"))  # in the round after it all meet again
    reports(three.wake_up())
    del tensors


@pytest.mark.parametrize("store", [{}, None, object()])
def test_a_store_without_the_methods_of_one_is_refused_by_name(store: Any) -> None:
    with refuses(InvalidTypeError, names="compare_set"):
        StoreGroup(store, 0, 1)


@pytest.mark.parametrize(("rank", "size", "name"), [("0", 1, "g"), (0, True, "g"), (0, 1, None)])
def test_a_group_of_the_wrong_types_is_refused(rank: Any, size: Any, name: Any) -> None:
    with pytest.raises(InvalidTypeError):
        StoreGroup(dist.HashStore(), rank, size, name)


class Altered:
    """A store whose writes may be made otherwise: `alter` gets the key, and what is to be there.

    Where it raises, the store fails.
    """

    def __init__(self, store: Any, alter: Callable[[str, str], None]) -> None:
        self.store, self.alter = store, alter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.alter(key, desired)
        answer: bytes = self.store.compare_set(key, expected, desired)
        return answer


def lose_the_next_round(key: str, desired: str) -> None:
    if key.endswith("/round") and desired != "0":
        raise RuntimeError("the connection is gone")


def test_a_rank_that_loses_the_store_after_the_decision_says_so_and_goes_back(
    make_allocator: MakeAllocator,
) -> None:
    alloc = make_allocator()
    kept, pinned = filled(alloc, MIB, "w"), filled(alloc, MIB, "pinned")
    store: Any = Altered(dist.HashStore(), lose_the_next_round)
    with alloc.pin("pinned", "a registration"), pytest.raises(DistributedTransitionError) as caught:
        distributed.sleep(StoreGroup(store, 0, 1), offload_tags="w", allocator=alloc)
    assert "tag 'pinned' has 1 pins and cannot sleep" in caught.value.failures[0]
    assert caught.value.states == {0: "unchanged"}
    assert caught.value.secondary == (
        "the group's store failed in a compare_set: RuntimeError: the connection is gone",
    )
    assert kept.equal(random_bytes(MIB))
    assert pinned.equal(random_bytes(MIB))


def test_a_round_that_nobody_has_closed_is_closed_by_who_comes_next(
    make_allocator: MakeAllocator,
) -> None:
    alloc = make_allocator()
    tensor = filled(alloc, MIB, "w")
    store = dist.HashStore()
    dying: Any = Altered(store, lose_the_next_round)
    first = distributed.sleep(StoreGroup(dying, 0, 1), offload_tags="w", allocator=alloc)
    assert first.bytes_freed == GRANULE
    second = distributed.wake_up(StoreGroup(store, 0, 1), allocator=alloc)
    assert second.bytes_mapped == GRANULE
    assert tensor.equal(random_bytes(MIB))


def test_a_decision_that_others_have_made_first_holds(make_allocator: MakeAllocator) -> None:
    """They waited for as long as they were told to, when this rank had just voted."""
    alloc = make_allocator()
    tensor = filled(alloc, MIB, "w")
    store = dist.HashStore()

    def come_first(key: str, desired: str) -> None:
        if key.endswith("/decision"):
            store.compare_set(key, "", '{"commit": false, "unanswered": [0]}')

    slow: Any = Altered(store, come_first)
    with refuses(
        DistributedTransitionError,
        operation="sleep",
        failures={},
        unanswered=(),
        states={0: "unchanged"},
    ):
        distributed.sleep(StoreGroup(slow, 0, 1), offload_tags="w", allocator=alloc)
    assert alloc.stats().tags["w"].awake_bytes == GRANULE
    assert tensor.equal(random_bytes(MIB))


def test_an_interrupt_after_all_have_agreed_undoes_nothing(
    make_allocator: MakeAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    alloc = make_allocator()
    tensor = filled(alloc, MIB, "w")
    group = StoreGroup(dist.HashStore(), 0, 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cumempool.distributed.round.joined", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distributed.sleep(group, offload_tags="w", allocator=alloc)
    assert alloc.stats().tags["w"].backed_up_bytes == GRANULE
    distributed.wake_up(group, allocator=alloc)
    assert tensor.equal(random_bytes(MIB))


def test_ranks_with_fewer_steps_vote_with_the_others_and_go_back_with_them(
    three: Threads,
) -> None:
    """Rank 0 has nothing to discard; it learns only in the last step that rank 2 fails there."""
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    kv = [a.empty(MIB, tag="kv") for a in three.allocators[1:]]

    def fail(tag: str, ranges: Sequence[RegistrableRange]) -> None:
        raise ValueError("not now")

    with three.allocators[2].register_hooks("kv", before_unmap=fail):
        errors = refused(three.sleep("w"))
    assert [error.failures for error in errors] == [{2: "ValueError: not now"}] * 3
    assert [error.lost_tags for error in errors] == [(), ("kv",), ()]
    assert three.asleep() == [False] * 3
    assert all(tensor.equal(random_bytes(MIB)) for tensor in tensors)
    freed = [report.bytes_freed for report in reports(three.sleep("w"))[0].ranks.values()]
    assert freed == [GRANULE, GRANULE + 2 * GRANULE, GRANULE + 2 * GRANULE]
    reports(three.wake_up())
    del kv


def test_what_a_failed_step_has_left_asleep_is_woken(
    three: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [filled(a, MIB, "w") for a in three.allocators]
    stuck = three.allocators[1]
    sleep = stuck.sleep

    def half_way(*arguments: Any, **named: Any) -> None:
        sleep(*arguments, **named)
        raise CumempoolError("it could not be undone")

    with monkeypatch.context() as patched:
        patched.setattr(stuck, "sleep", half_way)
        errors = refused(three.sleep("w"))
    assert [error.failures for error in errors] == [
        {1: "CumempoolError: it could not be undone"}
    ] * 3
    assert errors[0].states == dict.fromkeys(range(3), "unchanged")
    assert three.asleep() == [False] * 3
    assert all(tensor.equal(random_bytes(MIB)) for tensor in tensors)


def test_older_groups_have_their_store_in_torchs_own_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OlderGroup:
        """Without `get_group_store`."""

    group, store = OlderGroup(), dist.HashStore()
    table = dist.distributed_c10d._world.pg_map
    monkeypatch.setitem(table, group, ("gloo", store))  # type: ignore[arg-type]
    assert _torch.store_of_group(group) is store  # type: ignore[arg-type]


def test_a_discard_that_fails_says_which_backups_are_lost(three: Threads) -> None:
    kept = [filled(a, MIB, "w") for a in three.allocators]
    kv = [a.empty(MIB, tag="kv") for a in three.allocators]
    reports(three.sleep("w"))
    reports(three.wake_up())
    for allocator in three.allocators:
        allocator.sleep(offload_tags="w", tags="w")

    def fail(tag: str, ranges: Sequence[RegistrableRange]) -> None:
        raise ValueError("not now")

    def discard(rank: int) -> GroupReport:
        return distributed.discard(
            three.group(rank), ["w", "kv"], allocator=three.allocators[rank], timeout=30
        )

    with three.allocators[0].register_hooks("kv", before_unmap=fail):
        errors = refused(three.run(discard))
    assert [error.lost_tags for error in errors] == [(), ("kv", "w"), ("kv", "w")]
    assert [a.stats().tags["kv"].asleep_bytes for a in three.allocators] == [0, 0, 0]
    three.allocators[0].wake_up()
    assert kept[0].equal(random_bytes(MIB))
    reports(three.wake_up())
    assert reports(three.run(discard))[0].bytes_freed > 0
    del kv


def test_a_bad_group_is_refused() -> None:
    with refuses(InvalidArgumentError, names=("rank 2", "0 to 1")):
        StoreGroup(dist.HashStore(), 2, 2)
    with refuses(InvalidArgumentError, names="torch.distributed.init_process_group()"):
        distributed.wake_up()
    timeout: Any = "1"
    with refuses(InvalidTypeError, names="timeout"):
        distributed.wake_up(timeout=timeout)


def test_the_error_survives_a_pipe() -> None:
    error = DistributedTransitionError(
        "text",
        operation="sleep",
        rank=1,
        failures={0: "x"},
        unanswered=(2,),
        states={1: "unchanged"},
    )
    again = pickle.loads(pickle.dumps(error))
    assert vars(again) == vars(error)
    assert str(again) == "text"


# ---- ranks that are processes of a gloo group


class Ranks:
    """The processes of a gloo group."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=gloo_rank.serve, args=(rank, SIZE, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.pids = [self.answer(rank) for rank in range(SIZE)]

    def ask(self, rank: int, name: str, *arguments: Any, **named: Any) -> None:
        self.pipes[rank].send((name, arguments, named))

    def answer(self, rank: int) -> Any:
        assert self.pipes[rank].poll(PATIENCE), f"rank {rank} does not answer"
        good, value = self.pipes[rank].recv()
        if not good:
            assert isinstance(value, BaseException)
            return value
        return value

    def one(self, rank: int, name: str, *arguments: Any, **named: Any) -> Any:
        self.ask(rank, name, *arguments, **named)
        answer = self.answer(rank)
        assert not isinstance(answer, BaseException), answer
        return answer

    def every(
        self, name: str, *arguments: Any, ranks: Sequence[int] = range(SIZE), **named: Any
    ) -> list[Any]:
        for rank in ranks:
            self.ask(rank, name, *arguments, **named)
        return [self.answer(rank) for rank in ranks]

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def started() -> Iterator[list[Ranks]]:
    """The processes that the tests share; started again where a test has killed some."""
    made: list[Ranks] = []
    yield made
    for one in made:
        one.stop()


@pytest.fixture
def doomed(started: list[Ranks]) -> Ranks:
    """Four ranks that need not all survive."""
    if not started or not started[-1].alive():
        started.append(Ranks())
    return started[-1]


@pytest.fixture
def ranks(doomed: Ranks) -> Iterator[Ranks]:
    """Four ranks with an allocator each that must hold nothing afterwards."""
    yield doomed
    assert doomed.every("end") == [0] * SIZE


def begin(ranks: Ranks, **named: Any) -> None:
    assert ranks.every("begin", weights=4 * MIB, kv=2 * MIB, **named) == [None] * SIZE


def all_is_as_before(ranks: Ranks, members: Sequence[int] = range(SIZE)) -> None:
    awake = {"weights": "awake", "kv": "awake"}
    assert ranks.every("states", ranks=members) == [awake] * len(members)
    intact = {"weights": True, "kv": True}
    assert ranks.every("intact", ranks=members) == [intact] * len(members)


def works(ranks: Ranks) -> None:
    """The group sleeps and wakes, and collectives give what they should."""
    assert ranks.every("reduced", "weights") == [[10] * 16] * SIZE
    for report in reports(ranks.every("sleep", offload_tags=["weights"], timeout=PATIENCE)):
        assert report.bytes_freed == 6 * MIB * SIZE
    asleep = {"weights": "backed_up", "kv": "discarded"}
    assert ranks.every("states") == [asleep] * SIZE
    reports(ranks.every("wake_up", timeout=PATIENCE))
    assert all(intact["weights"] for intact in ranks.every("intact"))
    assert ranks.every("reduced", "weights") == [[10] * 16] * SIZE


def test_four_ranks_sleep_and_wake_between_collectives(ranks: Ranks) -> None:
    begin(ranks)
    works(ranks)
    works(ranks)
    for report in reports(ranks.every("discard", ["kv"], timeout=PATIENCE)):
        assert report.bytes_freed == 2 * MIB * SIZE
    assert ranks.every("states") == [{"weights": "awake", "kv": "discarded"}] * SIZE
    reports(ranks.every("wake_up", timeout=PATIENCE))


def test_older_torch_finds_the_same_store(ranks: Ranks) -> None:
    begin(ranks)
    assert ranks.every("meets_through_one_store", ranks=range(3)) == [True] * 3


def test_a_subgroup_sleeps_alone(ranks: Ranks) -> None:
    begin(ranks)
    pair = ranks.every("sleep", ranks=[0, 1], group="pairs", offload_tags="weights", tags="weights")
    assert [list(report.ranks) for report in reports(pair)] == [[0, 1]] * 2
    assert ranks.every("states", ranks=[2]) == [{"weights": "awake", "kv": "awake"}]
    outsider = ranks.every("sleep", ranks=[3], group="pairs")
    assert isinstance(outsider[0], InvalidArgumentError)
    reports(ranks.every("wake_up", ranks=[0, 1], group="pairs"))
    all_is_as_before(ranks)


def test_a_rank_that_is_not_in_the_group_is_refused(ranks: Ranks) -> None:
    begin(ranks)
    (answer,) = ranks.every("sleep", ranks=[3], group="pairs", offload_tags=["weights"])
    assert isinstance(answer, InvalidArgumentError)
    assert "not in the group" in str(answer)
    all_is_as_before(ranks)


def test_too_little_host_memory_on_one_rank_leaves_all_awake(ranks: Ranks) -> None:
    for rank in range(SIZE):
        limit = 2 * MIB if rank == 2 else None
        ranks.one(rank, "begin", weights=4 * MIB, kv=2 * MIB, limit=limit)
    for rank, error in enumerate(refused(ranks.every("sleep", offload_tags="weights"))):
        assert list(error.failures) == [2]
        assert error.failures[2].startswith("OutOfHostMemoryError: ")
        assert error.states == dict.fromkeys(range(SIZE), "unchanged")
        assert (error.rank, error.operation, error.unanswered) == (rank, "sleep", ())
        assert error.lost_tags == ()  # nothing is discarded before all have come so far
        assert error.failures[2] in str(error)
    all_is_as_before(ranks)
    reports(ranks.every("sleep", offload_tags=[]))
    reports(ranks.every("wake_up"))


@pytest.mark.parametrize("tag", ["weights", "kv"])
def test_a_pinned_tag_on_one_rank_loses_nothing_anywhere(ranks: Ranks, tag: str) -> None:
    begin(ranks)
    ranks.one(1, "pin", tag)
    for error in refused(ranks.every("sleep", offload_tags="weights")):
        assert list(error.failures) == [1]
        assert "InUseError" in error.failures[1]
        assert set(error.states.values()) == {"unchanged"}
    for error in refused(ranks.every("discard", [tag])):
        assert list(error.failures) == [1]
    all_is_as_before(ranks)


def test_a_hook_that_raises_on_one_rank_cancels_it_on_all(ranks: Ranks) -> None:
    begin(ranks)
    ranks.one(3, "hook", "weights", "raise")
    for error in refused(ranks.every("sleep", offload_tags="weights")):
        assert error.failures == {3: "ZeroDivisionError: integer division or modulo by zero"}
    all_is_as_before(ranks)


def test_a_wake_without_room_on_one_rank_leaves_all_asleep(ranks: Ranks) -> None:
    begin(ranks, mib=8)
    reports(ranks.every("sleep", offload_tags=["weights", "kv"]))
    ranks.one(0, "take", "other", 6 * MIB)
    for error in refused(ranks.every("wake_up")):
        assert error.failures[0].startswith("OutOfMemoryError: ")
        assert error.states == dict.fromkeys(range(SIZE), "unchanged")
    for states in ranks.every("states"):
        assert (states["weights"], states["kv"]) == ("backed_up", "backed_up")
    ranks.one(0, "give", "other")
    reports(ranks.every("wake_up"))
    all_is_as_before(ranks)


def test_a_late_rank_makes_the_others_go_back_in_time(ranks: Ranks) -> None:
    begin(ranks)
    begun = time.monotonic()
    for rank in range(SIZE):
        late = 1.5 if rank == 3 else 0.0
        ranks.ask(rank, "sleep", late=late, offload_tags="weights", timeout=0.5)
    errors = refused([ranks.answer(rank) for rank in range(3)])
    assert time.monotonic() - begun < 1.5
    for error in errors:
        assert error.unanswered == (3,)
        assert error.states == dict.fromkeys(range(3), "unchanged")
        assert "no answer within 0.5 s from rank 3" in str(error)
    (late_error,) = refused([ranks.answer(3)])
    assert late_error.unanswered == (0, 1, 2)
    all_is_as_before(ranks)
    works(ranks)


def test_ranks_that_die_make_the_others_go_back(doomed: Ranks) -> None:
    begin(doomed)
    doomed.one(3, "hook", "weights", "die")
    for rank in range(SIZE):
        doomed.ask(rank, "sleep", offload_tags="weights", timeout=1.0)
    for error in refused([doomed.answer(rank) for rank in range(3)]):
        assert error.unanswered == (3,)  # it was there, and died in its transition
        assert error.states == dict.fromkeys(range(3), "unchanged")
    all_is_as_before(doomed, range(3))

    # A group of the survivors goes on; then it loses rank 0, which has the store.
    reports(
        doomed.every("sleep", ranks=range(3), group="survivors", offload_tags=["weights", "kv"])
    )
    reports(doomed.every("wake_up", ranks=range(3), group="survivors"))
    os.kill(doomed.pids[0], signal.SIGSTOP)
    for error in refused(doomed.every("sleep", ranks=[1, 2], group="survivors", timeout=1.0)):
        assert error.states[error.rank] == "unchanged"
    os.kill(doomed.pids[0], signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        doomed.processes[0].join(10)
    begun = time.monotonic()
    for error in refused(doomed.every("sleep", ranks=[1, 2], group="survivors", timeout=1.0)):
        assert "store" in str(error)
        assert error.states == {error.rank: "unchanged"}
    assert time.monotonic() - begun < 10
    all_is_as_before(doomed, [1, 2])
