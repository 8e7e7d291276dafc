"""A program that uses cumempool as others do; test_types.py has it type-checked and run."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import cumempool
from cumempool import distributed


def main() -> None:
    """Every value has the type that the interface says, for the type checker and when it runs."""
    alloc = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="host"))
    assert_type(cumempool.is_available(), bool)
    assert_type(cumempool.probe().devices, tuple[cumempool.DeviceProbe, ...])
    assert_type(cumempool.get_library(), str)
    weights = assert_type(alloc.empty(3, 5, dtype=torch.float16, tag="weights"), torch.Tensor)
    weights.fill_(1.5)
    report = assert_type(alloc.sleep(offload_tags=["weights"]), cumempool.TransitionReport)
    assert_type(report.tags["weights"], cumempool.TagReport)
    assert_type(alloc.read_backup(weights), torch.Tensor)
    handle = assert_type(alloc.wake_up(blocking=False), cumempool.WakeHandle)
    handle.wait(weights)
    assert_type(handle.result(), cumempool.TransitionReport)
    assert_type(alloc.wake_up(), cumempool.TransitionReport)
    assert_type(alloc.stats(), cumempool.Stats)
    assert_type(alloc.snapshot(), list[cumempool.AllocationInfo])
    assert_type(alloc.tag_of(weights), str)
    with alloc.pin("weights", "a test") as pin:
        assert_type(pin, cumempool.Pin)
    try:
        alloc.wake_up(tags=["misspelt"])
    except cumempool.UnknownTagError as error:
        assert_type(error.tag, "str | None")
    del weights
    alloc.close()


def refused(alloc: cumempool.CuMemAllocator, group: None) -> None:
    """Never called: what a type checker has to refuse. An ignored error that is none is one."""
    alloc.empty(3, tag=5)  # type: ignore[arg-type]
    alloc.sleep(offload_tags=3)  # type: ignore[arg-type]
    alloc.use_memory_pool("a", on_sleep="keep")  # type: ignore[arg-type]
    alloc.no_such_method()  # type: ignore[attr-defined]
    cumempool.CuMemConfig(driver="rocm")  # type: ignore[arg-type]
    alloc.stats().tags["weights"].awake_bytes = 0  # type: ignore[misc]
    distributed.sleep("allocator")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
    print("all types are as declared")
