"""Lists the parts of the benchmark, with the contenders and the needs of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import workloads
from bench import Bench

from parts import asynchronous, kv, malloc, scaling, swap, tiers, transitions

Run = Callable[[Bench, str], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        title: A description for people.
        contenders: Its contenders, each in a separate process, in this order.
        run: A generator of its results, piece by piece.
        host_gib: Host memory that it fills.
        device_gib: Device memory that it fills.
        devices: The number of GPUs that it needs.
        limit_s: Seconds after which a process of it is killed.
        first_again: The number of extra processes that measure the first sleep of "cumempool"; a
            process has only one.
        on_the_link: Whether it copies, so that the link's rate is measured with it.
        rounds: How often each contender runs, taking turns, if results differ between processes;
            its figures are medians over its processes.
    """

    title: str
    contenders: tuple[str, ...]
    run: Run
    host_gib: int
    device_gib: int
    devices: int = 1
    limit_s: float = 120
    first_again: int = 0
    rounds: int = 1
    on_the_link: bool = True


#: The parts in the order of their runs.
PARTS = {
    "llama8b": Part(
        "sleep and wake of an 8B model's weights",
        ("cumempool", "cumempool-prepared", "cumempool-copy", "vllm", "tms", "tms-retain"),
        partial(transitions.run, make_workload=workloads.llama8b),
        host_gib=20,
        device_gib=18,
        first_again=4,
    ),
    "kv": Part(
        "discard and remap of 40 GiB of KV cache, beside the bare driver calls",
        ("cumempool", "vllm", "tms"),
        kv.run,
        host_gib=2,
        device_gib=44,
    ),
    "swap": Part(
        "one 8B model leaves while another arrives",
        ("cumempool",),
        swap.run,
        host_gib=32,
        device_gib=34,
    ),
    "async": Part(
        "first layer of a wake that does not block",
        ("layers-first", "first-named"),
        asynchronous.run,
        host_gib=18,
        device_gib=18,
    ),
    "malloc": Part(
        "a fresh segment",
        ("bare", "cumempool", "cumempool-no-rdma", "vllm", "tms"),
        malloc.run,
        host_gib=1,
        device_gib=20,
        rounds=30,  # fifteen were seen to differ by 6%, which is as much as is compared
        on_the_link=False,
    ),
    "scaling": Part(
        "1 to 64 GiB, 10 to 10000 allocations",
        ("bytes", "allocations"),
        scaling.run,
        host_gib=70,
        device_gib=66,
        limit_s=180,
    ),
    "small": Part(
        "sleep and wake of 2000 tensors of 3 MiB",
        ("cumempool", "vllm", "tms-retain"),
        partial(transitions.run, make_workload=workloads.many_small, most_cycles=3),
        host_gib=8,
        device_gib=8,
    ),
    "file": Part(
        "8 GiB to a file, beside plain direct I/O",
        ("cumempool",),
        tiers.run_file,
        host_gib=4,
        device_gib=10,
        limit_s=240,
    ),
    "pageable": Part(
        "8 GiB to pageable host memory",
        ("cumempool",),
        tiers.run_pageable,
        host_gib=12,
        device_gib=10,
    ),
    "peer": Part(
        "15 GiB to another GPU",
        ("cumempool",),
        tiers.run_peer,
        host_gib=2,
        device_gib=26,
        devices=2,
    ),
    "huge": Part(
        "sleep and wake of 4 tensors of 16 GiB",
        ("cumempool", "vllm", "tms-retain"),
        partial(transitions.run, make_workload=workloads.few_huge, most_cycles=2),
        host_gib=72,
        device_gib=68,
        limit_s=180,
    ),
}
