"""What memory of a tag is made of, and who can reach it: backing, peers and RDMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GRANULE, MIB, MakeAllocator, filled, random_bytes, states
from refusals import refuses

from cumempool import (
    CuMemAllocator,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
    _core,
)
from cumempool._pool.tags import _Memory


@pytest.fixture
def plain(alloc: CuMemAllocator) -> CuMemAllocator:
    """An allocator whose tag "plain" is of ordinary memory."""
    alloc.use_memory_pool("plain", backing="cuda_malloc")
    return alloc


def memory_of(alloc: CuMemAllocator) -> _Memory | None:
    """What was chosen for the tag "kv", before anything is allocated of it."""
    return alloc._state.tags._memory.get("kv")


def test_the_default_is_virtual_memory(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(3, tag="kv")
    assert alloc.allocation_of(kv).backing == "vmm"
    assert alloc.stats().tags["kv"].backing == "vmm"
    assert alloc.stats().tags["kv"].pins == 0


def test_memory_of_cuda_malloc_is_memory(plain: CuMemAllocator) -> None:
    tensor = filled(plain, 3 * MIB, "plain")
    info = plain.allocation_of(tensor[5:])
    assert (info.backing, info.bytes, info.state) == ("cuda_malloc", 2 * GRANULE, "awake")
    stats = plain.stats()
    of_tag = stats.tags["plain"]
    assert (of_tag.backing, of_tag.awake_bytes) == ("cuda_malloc", 4 * MIB)
    assert stats.physical_bytes == 4 * MIB
    assert torch.equal(tensor, random_bytes(3 * MIB))
    assert [r.address for r in plain.registrable_ranges("plain")] == [tensor.data_ptr()]


def test_the_scope_gives_its_tag_and_backing(alloc: CuMemAllocator) -> None:
    with alloc.use_memory_pool("plain", backing="cuda_malloc"):
        inside = alloc.empty(3)
    with alloc.use_memory_pool("plain"):
        again = alloc.empty(3)
    for tensor in (inside, again):
        assert alloc.allocation_of(tensor).backing == "cuda_malloc"
    del tensor


@pytest.mark.parametrize("call", ["sleep", "sleep of all", "discard", "swap"])
def test_memory_of_cuda_malloc_does_not_sleep(plain: CuMemAllocator, call: str) -> None:
    tensor = filled(plain, MIB, "plain")
    kv = filled(plain, MIB, "kv", 1)
    called: list[str] = []
    for tag in ("plain", "kv"):
        plain.register_hooks(tag, before_unmap=lambda tag, ranges: called.append(tag))
    before = plain.stats()
    with refuses(
        UnsupportedError, names="cudaMalloc", operation=call.split()[0], tag="plain", device=0
    ):
        {
            "sleep": lambda: plain.sleep(tags=("kv", "plain")),
            "sleep of all": lambda: plain.sleep(),
            "discard": lambda: plain.discard("plain"),
            "swap": lambda: plain.swap(sleep=("kv", "plain")),
        }[call]()
    assert called == []
    after = plain.stats()
    assert after.failed_transitions == before.failed_transitions + 1
    assert after.tags == before.tags
    assert states(plain) == {"plain": "awake", "kv": "awake"}
    plain.sleep(tags="kv")
    assert states(plain) == {"plain": "awake", "kv": "backed_up"}
    plain.wake_up()
    assert torch.equal(tensor, random_bytes(MIB))
    assert torch.equal(kv, random_bytes(MIB, 1))


@pytest.mark.parametrize("background", [False, True])
def test_nothing_is_prepared_for_a_sleep_that_will_be_refused(
    plain: CuMemAllocator, background: bool
) -> None:
    tensor = filled(plain, MIB, "plain")
    kv = filled(plain, MIB, "kv", 1)
    prepare: Callable[[], object] = {
        False: lambda: plain.prepare(tags=("kv", "plain")),
        True: lambda: plain.prepare(tags=("kv", "plain"), background=True).result(timeout=60),
    }[background]
    with refuses(UnsupportedError, names="cudaMalloc", operation="prepare", tag="plain", device=0):
        prepare()
    assert plain.stats().host_bytes == 0
    assert plain.prepare(tags="kv") == GRANULE
    del tensor, kv


def test_an_empty_tag_of_cuda_malloc_sleeps_like_any(plain: CuMemAllocator) -> None:
    tensor = filled(plain, MIB, "plain")
    del tensor
    assert plain.sleep(tags="plain").tags == {}
    assert plain.stats().physical_bytes == 0


def test_the_backing_of_live_memory_stays(plain: CuMemAllocator) -> None:
    tensor = plain.empty(3, tag="plain")
    plain.use_memory_pool("plain", backing="cuda_malloc")
    with refuses(InUseError, operation="set_memory", tag="plain"):
        plain.use_memory_pool("plain", backing="vmm")
    assert plain.allocation_of(tensor).backing == "cuda_malloc"
    del tensor
    plain.use_memory_pool("plain", backing="vmm")
    tensor = plain.empty(3, tag="plain")
    assert plain.allocation_of(tensor).backing == "vmm"


@pytest.mark.parametrize("peers", ["all", [1], [0, 1], (1,), []])
def test_peers_reach_the_memory_before_and_after_a_sleep(
    make_allocator: MakeAllocator, peers: Any
) -> None:
    alloc = make_allocator(devices=2)
    alloc.use_memory_pool("kv", peers=peers)
    kv = alloc.empty(3 * MIB, dtype=torch.uint8, device=0, tag="kv").copy_(random_bytes(3 * MIB))
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert torch.equal(kv, random_bytes(3 * MIB))


def test_no_peers_is_a_choice_of_its_own(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(devices=2)
    kv = alloc.empty(3, tag="kv")
    with pytest.raises(InUseError):
        alloc.use_memory_pool("kv", peers=())
    del kv
    alloc.use_memory_pool("kv", peers=())
    assert memory_of(alloc) == _Memory(1, 2, [], True)
    alloc.use_memory_pool("kv", peers=[0])
    assert memory_of(alloc) == _Memory(1, 0, [0], True)
    alloc.use_memory_pool("plain", backing="cuda_malloc", peers=())


def test_what_is_not_given_stays_as_it_was(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(devices=2)
    alloc.use_memory_pool("kv", peers=[1])
    alloc.use_memory_pool("kv")
    alloc.use_memory_pool("kv", backing="vmm")
    assert memory_of(alloc) == _Memory(1, False, [1], True)
    alloc.use_memory_pool("kv", rdma=False)
    assert memory_of(alloc) == _Memory(1, False, [1], False)
    alloc.use_memory_pool("kv", peers="all")
    assert memory_of(alloc) == _Memory(1, True, [], False)
    alloc.use_memory_pool("kv", backing="cuda_malloc")
    assert memory_of(alloc) == _Memory(2, False, [], True)
    alloc.use_memory_pool("kv")
    kv = alloc.empty(3, tag="kv")
    assert alloc.allocation_of(kv).backing == "cuda_malloc"
    with refuses(InvalidArgumentError, names="peers", operation="set_memory"):
        alloc.use_memory_pool("kv", peers=[1])
    with refuses(InvalidArgumentError, names="RDMA", operation="set_memory"):
        alloc.use_memory_pool("kv", rdma=False)
    alloc.use_memory_pool("kv", rdma=True)


def test_memory_is_made_for_rdma_unless_the_tag_is_told_otherwise(
    make_allocator: MakeAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_host = _core.open_host
    monkeypatch.setattr(_core, "open_host", lambda **given: open_host(**(given | {"rdma": True})))
    alloc = make_allocator()
    alloc.use_memory_pool("weights", rdma=False)
    weights = filled(alloc, MIB, "weights")
    kv = filled(alloc, MIB, "kv", 1)
    for _ in range(2):
        stats = alloc.stats().tags
        assert (stats["weights"].rdma, stats["kv"].rdma) == (False, True)
        assert stats["weights"].handle_types == stats["kv"].handle_types == ("posix_fd",)
        alloc.sleep(tags=("weights", "kv"))
        alloc.wake_up()
    assert torch.equal(weights, random_bytes(MIB))
    assert torch.equal(kv, random_bytes(MIB, 1))
    with refuses(InUseError, operation="set_memory", tag="kv"):
        alloc.use_memory_pool("kv", rdma=False)
    del kv
    alloc.use_memory_pool("kv", rdma=False)
    kv = alloc.empty(3, tag="kv")
    assert not alloc.stats().tags["kv"].rdma
    del weights, kv


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ({"backing": "malloc"}, InvalidArgumentError),
        ({"backing": 1}, InvalidTypeError),
        ({"peers": "some"}, InvalidArgumentError),
        ({"peers": 1}, InvalidTypeError),
        ({"peers": [2]}, InvalidArgumentError),
        ({"peers": ["1"]}, InvalidTypeError),
        ({"peers": [True]}, InvalidTypeError),
        ({"rdma": 0}, InvalidTypeError),
        ({"rdma": "no"}, InvalidTypeError),
        ({"backing": "cuda_malloc", "rdma": False}, InvalidArgumentError),
    ],
)
def test_wrong_values_are_refused(
    make_allocator: MakeAllocator, policy: dict[str, Any], error: type[Exception]
) -> None:
    alloc = make_allocator(devices=2)
    with pytest.raises(error, match=next(iter(policy)) + "|device"):
        alloc.use_memory_pool("kv", **policy)
    assert memory_of(alloc) is None
