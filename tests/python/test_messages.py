"""What is sent through torch.multiprocessing: how long it lives, and reducers of others."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from conftest import (
    GRANULE,
    MIB,
    MakeAllocator,
    RunPython,
    pins,
    until,
)
from refusals import refuses
from torch.multiprocessing import reductions
from torch.multiprocessing.reductions import reduce_tensor  # before anything of ours is put in

from cumempool import (
    CuMemAllocator,
    CuMemConfig,
    InUseError,
    InvalidArgumentError,
    OutOfMemoryError,
    SharingError,
    _core,
)
from cumempool.sharing.leases import Leases

pytestmark = pytest.mark.extensive

QUEUED = "messages that were sent and not received yet"


def send(what: object) -> bytes:
    return bytes(ForkingPickler.dumps(what))


@pytest.fixture(autouse=True)
def their_reducers() -> Iterator[None]:
    """Whatever a test registers goes with it."""
    pickler: Any = ForkingPickler
    before = dict(pickler._extra_reducers)
    yield
    pickler._extra_reducers.clear()
    pickler._extra_reducers.update(before)


# ---- how long it lives


def test_what_lies_in_a_queue_is_kept_until_it_was_received_and_released(
    alloc: CuMemAllocator,
) -> None:
    message = send(alloc.empty(1000, tag="kv").fill_(7))
    gc.collect()
    assert len(alloc.snapshot()) == 1
    received = pickle.loads(message)
    assert received.eq(7).all()
    assert len(alloc.snapshot()) == 1
    del received
    alloc.exports()  # which takes note of what was released
    assert alloc.snapshot() == []
    assert pins(alloc) == 0


class SlowToGo:
    """Something that a message keeps, and that takes a while to go, as memory of a busy device."""

    def __init__(self) -> None:
        self.going = threading.Event()
        self.gone = threading.Event()

    def __del__(self) -> None:
        self.going.set()
        time.sleep(0.2)
        self.gone.set()


def test_who_asks_after_the_end_of_a_message_finds_that_its_memory_has_gone(
    alloc: CuMemAllocator,
) -> None:
    kept = SlowToGo()
    going, gone = kept.going, kept.gone
    alloc._core.declare_tag("kv", 0, 0)
    leases = Leases(alloc._core)
    number = leases.keep("kv", 1, kept)
    del kept
    forgetting = threading.Thread(target=leases.forget, args=(number,))
    forgetting.start()
    assert going.wait(20)
    assert leases.exports() == []
    assert gone.is_set()
    forgetting.join()


def test_memory_that_was_sent_says_who_keeps_it_awake(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(1000, tag="kv").fill_(7)
    messages = [send(kv), send(kv)]
    waiting = alloc.exports()
    assert [(one.tag, one.bytes, one.received) for one in waiting] == [("kv", GRANULE, False)] * 2
    assert all(0 <= one.seconds < 60 and QUEUED in one.holder for one in waiting)
    for refused in (alloc.sleep, alloc.prepare):
        with refuses(InUseError, names=QUEUED, operation=refused.__name__, tag="kv"):
            refused(tags="kv")
    received = [pickle.loads(message) for message in messages]
    until(lambda: [one.received for one in alloc.exports()] == [True, True])
    with refuses(
        InUseError, names=f"process {os.getpid()}", operation="sleep", tag="kv"
    ) as refusal:
        alloc.sleep(tags="kv")
    assert QUEUED not in str(refusal.value)
    received.clear()
    alloc.sleep(tags="kv")
    alloc.wake_up()
    assert kv.eq(7).all()


def test_revoking_loses_messages_and_frees_what_they_kept(alloc: CuMemAllocator) -> None:
    message = send(alloc.empty(1000, tag="kv"))
    assert alloc.revoke("kv") == 0
    assert alloc.snapshot() == []
    assert alloc.exports() == []
    assert pins(alloc) == 0
    with refuses(SharingError, names="no longer"):
        pickle.loads(message)


def test_close_refuses_to_lose_messages_and_loses_them_by_force(
    make_allocator: MakeAllocator,
) -> None:
    alloc = make_allocator()
    message = send(alloc.empty(1000, tag="kv").fill_(3))
    with refuses(InUseError, names=("1 messages", f"{GRANULE} bytes"), operation="close", tag="kv"):
        alloc.close()
    received = pickle.loads(message)
    assert received.eq(3).all()
    until(lambda: [one.received for one in alloc.exports()] == [True])
    alloc.close()
    assert received.eq(3).all()
    other = make_allocator()
    message = send(other.empty(1000, tag="kv"))
    other.close(force=True)
    with pytest.raises(SharingError):
        pickle.loads(message)


def test_a_message_is_kept_while_any_of_its_receivers_has_it_open(alloc: CuMemAllocator) -> None:
    message = send(alloc.empty(1000, tag="kv").fill_(7))
    first, second = pickle.loads(message), pickle.loads(message)
    del first
    alloc.exports()
    third = pickle.loads(message)
    assert second.eq(7).all()
    assert third.eq(7).all()
    del second, third
    alloc.exports()
    assert alloc.snapshot() == []
    with pytest.raises(SharingError):
        pickle.loads(message)


def test_a_receiver_that_cannot_map_it_has_not_received_it(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = send(alloc.empty(1000, tag="kv").fill_(7))

    def fail(*_: object) -> object:
        raise OutOfMemoryError("no address space")

    with monkeypatch.context() as patch:
        patch.setattr(_core, "open_shared", fail)
        with pytest.raises(OutOfMemoryError):
            pickle.loads(message)
    until(lambda: [one.received for one in alloc.exports()] == [False])
    assert pickle.loads(message).eq(7).all()


def test_memory_that_cannot_be_sent_is_not_kept(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(1000, tag="kv")
    alloc.sleep(tags="kv")
    with refuses(InvalidArgumentError, names="asleep", operation="export", tag="kv"):
        send(kv)
    assert alloc.exports() == []
    assert pins(alloc) == 0
    alloc.wake_up()


def test_an_allocator_that_is_dropped_serves_its_messages() -> None:
    alloc = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=8 * MIB))
    message = send(alloc.empty(3, tag="kv").fill_(5))
    del alloc
    gc.collect()
    assert pickle.loads(message).eq(5).all()


# ---- reducers of others


def shares(alloc: CuMemAllocator, kv: torch.Tensor, received: torch.Tensor) -> bool:
    """Whether it is the same memory, and the sender's is still that of the pool."""
    with torch.no_grad():
        received.fill_(float(kv.flatten()[0]) + 1)
    return torch.equal(kv.detach(), received.detach()) and alloc.tag_of(kv) == "kv"


def test_reduce_tensor_that_was_imported_early_sends_the_memory_itself(
    alloc: CuMemAllocator,
) -> None:
    plain, owned = (alloc.empty(10, tag="kv").fill_(1) for _ in range(2))
    for kv in (plain, torch.nn.Parameter(owned)):
        rebuild, arguments = reduce_tensor(kv)
        received = rebuild(*arguments)
        assert type(received) is type(kv)
        assert shares(alloc, kv, received)
        placed = list(reduce_tensor(kv)[1])
        assert placed[6] is None
        placed[6] = 0  # what receivers do that use another device
        assert shares(alloc, kv, rebuild(*placed))


def test_reducers_that_were_bound_anew_send_the_memory_itself(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(10, tag="kv").fill_(1)
    assert shares(alloc, kv, pickle.loads(send(kv)))
    reductions.init_reductions()
    assert shares(alloc, kv, pickle.loads(send(kv)))


def test_reducers_that_others_have_registered_get_no_memory_of_a_pool(
    alloc: CuMemAllocator,
) -> None:
    def theirs(tensor: torch.Tensor) -> Any:
        return torch.full, ((tensor.numel(),), 99.0)

    for kind in (torch.Tensor, torch.nn.Parameter):
        ForkingPickler.register(kind, theirs)
    kv = alloc.empty(10, tag="kv").fill_(1)
    parameter = torch.nn.Parameter(alloc.empty(10, tag="kv").fill_(1))
    assert shares(alloc, kv, pickle.loads(send(kv)))
    received = pickle.loads(send(parameter))
    assert type(received) is torch.nn.Parameter
    assert shares(alloc, parameter, received)
    assert pickle.loads(send(torch.ones(3))).eq(99).all(), "all others go to them"


def test_a_storage_arrives_as_the_part_of_the_allocation_that_it_is(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(10, dtype=torch.uint8, tag="kv").fill_(1)
    storage = pickle.loads(send(kv.untyped_storage()))
    assert type(storage) is torch.UntypedStorage
    assert len(storage) == len(kv.untyped_storage())
    assert shares(alloc, kv, torch.empty(0, dtype=torch.uint8).set_(storage)[:10])
    typed = pickle.loads(send(kv.view(torch.uint8)._typed_storage()))
    assert typed.dtype == torch.uint8
    assert alloc.tag_of(kv) == "kv"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, of its rebuilding
def test_what_is_made_of_tensors_of_a_pool_is_taken_apart(alloc: CuMemAllocator) -> None:
    values = alloc.empty(2, tag="kv").fill_(4)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), values, (3,), check_invariants=True)
    assert pickle.loads(send(sparse)).to_dense().tolist() == [4, 0, 4]
    assert alloc.tag_of(values) == "kv"


def test_ordinary_tensors_are_sent_as_before(alloc: CuMemAllocator) -> None:
    kept = alloc.empty(3, tag="kv")
    plain = torch.ones(3)
    received = pickle.loads(send({"plain": plain, "shape": plain.shape}))
    received["plain"].fill_(2)
    assert plain.eq(2).all()
    with pytest.raises(RuntimeError, match="requires_grad"):
        reduce_tensor(torch.ones(1, requires_grad=True) * 2)
    assert alloc.exports() == []
    del kept


@pytest.mark.parametrize("first", ["cumempool", "torch.multiprocessing"])
def test_it_does_not_matter_which_is_imported_first(run_python: RunPython, first: str) -> None:
    done = run_python(f"""
import {first}
import pickle, torch.multiprocessing
from multiprocessing.reduction import ForkingPickler
from cumempool import CuMemAllocator
alloc = CuMemAllocator()
kv = alloc.empty(3, tag="kv").fill_(1)
pickle.loads(ForkingPickler.dumps(kv)).fill_(2)
print(kv.tolist(), alloc.tag_of(kv))
""")
    assert (done.code, done.out, done.err) == (0, "[2.0, 2.0, 2.0] kv\n", "")
