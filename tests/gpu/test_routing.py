"""Which allocations go to which tag: scopes, nesting, threads, allocators, expandable segments."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from refusals import refuses

import cumempool
from cumempool import _core, _torch


def test_scopes_nest_and_tags_can_be_entered_again(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        a = torch.ones(1000, device=gpu)
        with allocator.use_memory_pool("kv_cache"):
            b = torch.ones(1000, device=gpu)
        c = torch.ones(1000, device=gpu)
    with allocator.use_memory_pool("weights"):
        d = torch.ones(1000, device=gpu)
    outside = torch.ones(1000, device=gpu)
    assert [allocator.tag_of(t) for t in (a, b, c, d)] == [
        "weights",
        "kv_cache",
        "weights",
        "weights",
    ]
    with pytest.raises(cumempool.NotInPoolError):
        allocator.tag_of(outside)


def test_another_thread_has_its_own_scope(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    made: dict[str, torch.Tensor] = {}

    def work() -> None:
        made["outside"] = torch.ones(1000, device=gpu)
        with allocator.use_memory_pool("kv_cache"):
            made["inside"] = torch.ones(1000, device=gpu)

    with allocator.use_memory_pool("weights"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        mine = torch.ones(1000, device=gpu)
    assert allocator.tag_of(made["inside"]) == "kv_cache"
    assert allocator.tag_of(mine) == "weights"
    with pytest.raises(cumempool.NotInPoolError):
        allocator.tag_of(made["outside"])


def test_several_allocators_keep_apart(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    other = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
    with allocator.use_memory_pool("weights"):
        a = torch.arange(1000, device=gpu)
        with other.use_memory_pool("weights"):
            b = torch.arange(1000, device=gpu)
    other.sleep(offload_tags="weights")
    assert int(a.sum()) == 499500
    assert allocator.stats().asleep_bytes == 0
    with refuses(cumempool.NotInPoolError, names="another allocator"):
        allocator.tag_of(b)
    other.wake_up()
    assert torch.equal(a, b)
    del b
    other.close()


def test_freeing_from_any_thread_and_while_asleep(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        tensors = [torch.ones(4 << 20, device=gpu) for _ in range(6)]
    tensors.append(allocator.empty(1 << 20, tag="weights"))
    allocator.sleep(offload_tags="weights")

    def free() -> None:
        del tensors[2:]
        torch.cuda.empty_cache()

    thread = threading.Thread(target=free)
    thread.start()
    thread.join()
    stats = allocator.stats()
    assert stats.reserved_address_bytes == 2 * (16 << 20)
    assert stats.host_used_bytes == 2 * (16 << 20)
    allocator.wake_up()
    assert all(float(t.sum()) == 4 << 20 for t in tensors)


def test_slots_run_out_with_a_clear_error(allocator: cumempool.CuMemAllocator) -> None:
    scopes = [allocator.use_memory_pool(f"tag{i}") for i in range(_core.slot_count() + 1)]
    for scope in scopes[:-1]:
        scope.__enter__()
    try:
        with refuses(
            cumempool.OutOfSlotsError,
            names=f"{_core.slot_count()} slots",
            operation="bind_slot",
            tag=f"tag{_core.slot_count()}",
        ):
            scopes[-1].__enter__()
    finally:
        for scope in reversed(scopes[:-1]):
            scope.__exit__(None, None, None)
    with allocator.use_memory_pool("again"):
        assert allocator.tag_of(torch.ones(10, device="cuda")) == "again"


def test_adopted_module_keeps_values_identity_and_sharing(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 300, bias=False)
    ).to(gpu)
    module[2].weight = module[0].weight  # tied
    sample = torch.randn(16, 300, device=gpu)
    module.eval()
    expected = module(sample)
    identities = [id(p) for p in module.parameters()]
    reserved = torch.cuda.memory_allocated()
    taken = allocator.adopt(module, tag="weights")
    assert taken >= 300 * 300 * 4
    assert torch.cuda.memory_allocated() < reserved
    assert [id(p) for p in module.parameters()] == identities
    assert module[2].weight.data_ptr() == module[0].weight.data_ptr()
    allocator.sleep(offload_tags="weights")
    allocator.wake_up()
    assert torch.equal(module(sample), expected)


EXPANDABLE = """
import sys, torch, cumempool
from cumempool import _torch
if {force}:
    _torch.settings._HONOURS_CUSTOM_POOLS = (99, 0)
if {runtime!r}:
    torch.cuda.init()
    _torch.settings._apply_settings({runtime!r})
def live():
    return torch.cuda.memory._snapshot()["allocator_settings"]
torch.cuda.init()
before = live()
assert before["expandable_segments"], before
a = cumempool.CuMemAllocator()
with a.use_memory_pool("weights"):
    t = torch.full((5 << 20,), 3, device="cuda")
    assert live()["expandable_segments"] == (not {force}), live()
    assert a.tag_of(t) == "weights"
    inside = live()
after = live()
assert after == before, (before, after)
for key in before:
    if key not in ("expandable_segments", "PYTORCH_CUDA_ALLOC_CONF"):
        assert inside[key] == before[key], key
a.sleep(offload_tags="weights"); a.wake_up()
assert int(t.sum()) == 3 * (5 << 20)
outside = torch.ones(1 << 20, device="cuda")
try:
    a.tag_of(outside)
except cumempool.NotInPoolError:
    print("RIGHT", after["max_split_size"])
"""


@pytest.mark.parametrize(
    "variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", ""]
)
@pytest.mark.parametrize("force", [False, True], ids=["as-is", "as-older-torch"])
def test_expandable_segments_do_not_reach_the_pool(variable: str, force: bool) -> None:
    settings = "max_split_size_mb:64,expandable_segments:True,garbage_collection_threshold:0.75"
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_ALLOC_CONF")}
    if variable:
        environment[variable] = settings
    code = EXPANDABLE.format(force=force, runtime="" if variable else settings)
    if variable == "PYTORCH_HIP_ALLOC_CONF":
        # A CUDA build does not read the ROCm variable: nothing is expandable, and the pool works.
        code = code.replace('assert before["expandable_segments"], before', "").replace(
            f'assert live()["expandable_segments"] == (not {force}), live()', ""
        )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RIGHT")


def test_routing_trial_of_the_probe(gpu: torch.device) -> None:
    found = cumempool.probe(driver="cuda")
    assert found.ok
    assert found.torch.routes is True
    assert found.torch.build == "cuda"
    assert _torch.is_initialized()
