"""Measures when a wake in the background has the first layer ready, and when all is awake."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import workloads
from bench import Bench, summary
from contenders import Cumempool

TAG = "weights"
ROUNDS = 4


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """``layers-first``: in order of allocation; ``first-named``: layer 0 asked for ahead of it."""
    workload = workloads.llama8b(bench.small, layers_first=name == "layers-first")
    contender = Cumempool(bench)
    with contender.scope(TAG):
        tensors = workload.make(contender.empty)
    workloads.fill(tensors)
    expected = workloads.total(tensors)
    layer = [tensors[index] for index in workload.layers[0]]
    first = layer if name == "first-named" else []
    expected_layer = [workloads.total([matrix]) for matrix in layer]
    ready, whole, blocking, right = [], [], [], []
    for turn in range(-1, bench.cycles(ROUNDS)):
        _sleep(bench, contender)
        layer_s, whole_s, found = _wake(bench, contender, layer, first)
        right.append(found == expected_layer)
        _sleep(bench, contender)
        blocking_s = bench.timed(lambda: contender.wake(TAG))
        if turn >= 0:  # the first turn warms up
            ready.append(layer_s)
            whole.append(whole_s)
            blocking.append(blocking_s)
    yield {
        "workload": workload.describe(),
        "first_layer_s": summary(ready),
        "whole_wake_s": summary(whole),
        "blocking_wake_s": summary(blocking),
        "first_layer_over_whole": summary(ready)["median"] / summary(whole)["median"],
        "contents_equal": all(right) and workloads.total(tensors) == expected,
    }


def _sleep(bench: Bench, contender: Cumempool) -> None:
    bench.settle()
    contender.sleep(TAG)
    bench.settle()


def _wake(
    bench: Bench, contender: Cumempool, layer: list[torch.Tensor], first: list[torch.Tensor]
) -> tuple[float, float, list[int]]:
    """Returns seconds until a kernel has read every matrix of the layer and until all is awake.

    Also returns the sums of the matrices, made while the other layers still wake.
    """
    read = torch.empty(len(layer), 8, dtype=torch.bfloat16, device=bench.torch_device)
    bench.synchronize()
    start = time.perf_counter()
    handle = contender.allocator.wake_up([TAG], blocking=False, first=first)
    for matrix in layer:
        handle.wait(matrix)
    for target, matrix in zip(read, layer, strict=True):
        torch.add(matrix[-1, -8:], 1, out=target)  # a kernel, since a copy may queue elsewhere
    if bench.on_cuda:
        torch.cuda.current_stream().synchronize()
    ready = time.perf_counter() - start
    sums = [workloads.as_integers(matrix).sum(dtype=torch.int64) for matrix in layer]
    handle.result()
    whole = time.perf_counter() - start
    return ready, whole, [int(value) for value in sums]
