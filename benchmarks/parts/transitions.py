"""Measures sleep and wake of one set of tensors: first, later, clean, a tenth dirty; and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import contenders
import torch
import workloads
from bench import Bench, summary
from contenders import Contender, Cumempool
from cycles import Cycles, PeakDeviceBytes
from workloads import Workload

TAG = "weights"


def run(
    bench: Bench, name: str, make_workload: Callable[[bool], Workload], most_cycles: int = 5
) -> Iterator[dict[str, Any]]:
    """Measures one contender; yields results as they come."""
    workload = make_workload(bench.small)
    contender = contenders.make(name, bench)
    yield {"workload": workload.describe()}
    _load_kernels(bench)
    gc.collect()
    before = contender.device_bytes()
    tensors: list[torch.Tensor] = []
    with contender.scope(TAG):
        seconds = bench.timed(lambda: tensors.extend(workload.make(contender.empty)))
    workloads.fill(tensors)
    yield {"allocation_s": summary([seconds])}
    if name == "cumempool-prepared":
        assert isinstance(contender, Cumempool)
        prepare = contender.allocator.prepare
        yield {"prepare_s": summary([bench.timed(lambda: prepare(tags=[TAG]))])}
    cycles = Cycles(bench, contender, TAG, tensors)
    later = min(most_cycles, bench.cycles(contender.later_cycles))
    yield {"first": cycles.first()}
    if name == "cumempool-first":
        return
    yield {"dirty": cycles.run(later, workloads.change_all)}
    if isinstance(contender, Cumempool):
        yield {"host_bytes_per_byte": contender.allocator.stats().host_bytes / workload.bytes}
    if name == "cumempool":
        yield from _retained(bench, contender, cycles, workload, later)
    yield {"peak_device_bytes_over_tensors": _peak(bench, contender, workload, tensors, before)}


def _load_kernels(bench: Bench) -> None:
    """Makes the driver load the kernels that change and sum contents, which takes memory."""
    few = [torch.ones(1024, dtype=torch.bfloat16, device=bench.torch_device)]
    workloads.fill(few)
    workloads.change_all(few)
    workloads.change_every_tenth_mib(few)
    workloads.total(few)


def _retained(
    bench: Bench, contender: Contender, cycles: Cycles, workload: Workload, later: int
) -> Iterator[dict[str, Any]]:
    """Measures sleeps with a partly valid backup, and first sleeps again."""
    yield {"clean": cycles.run(later, workloads.change_nothing)}
    few = min(later, 3)
    if workload.tenth:
        yield {"tenth_tensors": cycles.run(few, lambda every: _change_tenth(workload, every))}
    yield {"tenth_slices": cycles.run(few, workloads.change_every_tenth_mib)}
    yield {"released": _first_again(contender, cycles, min(later, 2))}


def _change_tenth(workload: Workload, tensors: Sequence[torch.Tensor]) -> None:
    workloads.change_all([tensors[index] for index in workload.tenth])


def _first_again(contender: Contender, cycles: Cycles, count: int) -> dict[str, Any]:
    """Measures first sleeps again, after all host memory is given back."""
    assert isinstance(contender, Cumempool)
    allocator = contender.allocator

    def release(_: Sequence[torch.Tensor]) -> None:
        allocator.release_host_memory()

    return cycles.run(count, release)


def _peak(
    bench: Bench,
    contender: Contender,
    workload: Workload,
    tensors: list[torch.Tensor],
    before: int,
) -> int:
    """Returns the peak device bytes of a further cycle, less `before` and the tensors' bytes."""
    workloads.change_all(tensors)
    with PeakDeviceBytes(contender) as device:
        contender.sleep(TAG)
        bench.settle()
        contender.wake(TAG)
        bench.synchronize()
    return device.peak - before - workload.bytes
