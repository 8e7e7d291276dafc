"""What allocating costs: cached blocks as outside the pool."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import cumempool

from .conftest import Figure


def _batch(count: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        torch.empty(1 << 18, device="cuda")
    return (time.perf_counter() - start) / count


def test_a_cached_block_costs_the_same_inside_a_scope(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, figure: Figure
) -> None:
    def inside(measure: Callable[[int], float]) -> float:
        with allocator.use_memory_pool("weights"):
            measure(1000)
            return measure(20_000)

    def outside(measure: Callable[[int], float]) -> float:
        measure(1000)
        return measure(20_000)

    pairs = []
    for turn in range(15):  # interleaved, in both orders, so that drift hits both alike
        if turn % 2:
            pairs.append((inside(_batch), outside(_batch)))
        else:
            out = outside(_batch)
            pairs.append((inside(_batch), out))
    ratio = statistics.median(a / b for a, b in pairs)
    figure("cached_empty_inside_ns", round(statistics.median(a for a, _ in pairs) * 1e9))
    figure("cached_empty_outside_ns", round(statistics.median(b for _, b in pairs) * 1e9))
    figure("ratio", round(ratio, 3))
    assert ratio <= 1.05
