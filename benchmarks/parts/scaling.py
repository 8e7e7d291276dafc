"""Measures how the cost grows with bytes and with allocations of exact size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import host_memory
import torch
import workloads
from bench import GIB, MIB, Bench, median, summary
from contenders import Cumempool
from cycles import Cycles

TAG = "data"
MEASURES = ("copy_sleep_s", "clean_sleep_s", "wake_s", "discard_s", "remap_s")
CYCLES = 3


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """``bytes``: allocations of 64 MiB, more and more; ``allocations``: the same of 2 MiB."""
    by_bytes = name == "bytes"
    size = 64 * MIB if by_bytes else 2 * MIB
    counts = [gib * GIB // size for gib in (1, 4, 16, 64)] if by_bytes else [10, 100, 1000, 10000]
    if bench.small:
        size, counts = 2 * MIB, [2, 8] if by_bytes else [10, 100]
    points: list[dict[str, Any]] = []
    skipped: list[str] = []
    for count in counts:
        if (reason := _no_room(count * size)) is not None:
            skipped.append(f"{count} x {size} bytes: {reason}")
            continue
        points.append(_point(bench, count, size))
        # Small counts are dominated by what every transition costs, however little it moves.
        large = [
            p for p in points if (p["bytes"] >= 4 * GIB if by_bytes else p["allocations"] >= 100)
        ]
        unit = GIB if by_bytes else size
        yield {
            "points": points,
            "skipped": skipped,
            "seconds_per": "GiB" if by_bytes else "allocation",
            "largest_over_smallest": _straightness(large, unit),
        }


def _no_room(size: int) -> str | None:
    available = host_memory.available_bytes()
    if available is not None and size > available * 0.8:
        return f"{available} bytes of host memory are available"
    return None


def _point(bench: Bench, count: int, size: int) -> dict[str, Any]:
    contender = Cumempool(bench)
    with contender.scope(TAG):
        tensors = [contender.exact((size // 2,), torch.bfloat16) for _ in range(count)]
    workloads.fill(tensors)
    cycles = Cycles(bench, contender, TAG, tensors)
    cycles.first()
    rounds = bench.cycles(CYCLES)
    copy = cycles.run(rounds, workloads.change_all)
    clean = cycles.run(rounds, workloads.change_nothing)
    discards, remaps = [], []
    for _ in range(rounds):
        bench.settle()
        discards.append(bench.timed(lambda: contender.discard(TAG)))
        bench.settle()
        remaps.append(bench.timed(lambda: contender.wake(TAG)))
    del tensors, cycles
    contender.allocator.close()
    return {
        "bytes": count * size,
        "allocations": count,
        "copy_sleep_s": copy["sleep_s"],
        "clean_sleep_s": clean["sleep_s"],
        "wake_s": copy["wake_s"],
        "discard_s": summary(discards),
        "remap_s": summary(remaps),
        "contents_equal": copy["contents_equal"] and clean["contents_equal"],
    }


def _straightness(points: list[dict[str, Any]], unit: int) -> dict[str, float]:
    """Returns, per measure, the largest time per unit over the smallest; a line gives 1."""
    if len(points) < 2:
        return {}

    def per_unit(name: str) -> list[float]:
        return [(median(point, name) or 0.0) / (point["bytes"] / unit) for point in points]

    return {name: max(per_unit(name)) / min(per_unit(name)) for name in MEASURES}
