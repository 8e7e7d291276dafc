"""Measures a swap of one set of weights for another, beside a sleep and then a wake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import workloads
from bench import Bench, summary
from contenders import Cumempool

ROUNDS = 4  # each of them there and back


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """Swaps two sets under the tags a and b, after a change of all contents of the leaving one."""
    contender = Cumempool(bench)
    allocator = contender.allocator
    workload = workloads.llama8b(bench.small)
    tensors = {}
    for tag in ("a", "b"):
        with contender.scope(tag):
            tensors[tag] = workload.make(contender.empty)
        workloads.fill(tensors[tag])
        bench.settle()
        contender.sleep(tag)  # the first sleep of each is behind them
    totals = {}
    bench.settle()
    contender.wake("a")
    totals["a"] = workloads.total(tensors["a"])
    swaps, turns, equal = [], [], []

    def leave(tag: str, other: str, together: bool) -> None:
        workloads.change_all(tensors[tag])
        totals[tag] = workloads.total(tensors[tag])
        bench.settle()
        if together:
            swaps.append(bench.timed(lambda: allocator.swap(sleep=[tag], wake=[other])))
        else:
            seconds = bench.timed(lambda: contender.sleep(tag))
            bench.settle()
            turns.append(seconds + bench.timed(lambda: contender.wake(other)))
        if other in totals:
            equal.append(workloads.total(tensors[other]) == totals[other])

    for _ in range(bench.cycles(ROUNDS)):
        for together in (True, False):
            leave("a", "b", together)
            leave("b", "a", together)
    yield {
        "workload": workload.describe(),
        "swap_s": summary(swaps),
        "sleep_then_wake_s": summary(turns),
        "over_sleep_then_wake": summary(swaps)["median"] / summary(turns)["median"],
        "contents_equal": all(equal),
    }
