"""Measures discard and remap of a KV cache and of weights, beside the bare driver calls.

A separate program makes the bare calls: it takes memory of the same sizes and gives it back while
the contender has none.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import contenders
import programs
import torch
import workloads
from bench import GIB, MIB, Bench, summary
from contenders import Contender, Cumempool
from programs import Program

ROUNDS = 5


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """Measures one contender."""
    contender = contenders.make(name, bench)
    size = 2 * MIB if bench.small else GIB * 5 // 4
    with contender.scope("kv_cache", keep=False):
        kv = [contender.empty((size,), torch.uint8) for _ in range(4 if bench.small else 32)]
    yield {"kv": _measure(bench, contender, "kv_cache", kv)}
    if not isinstance(contender, Cumempool):
        return  # a sleep of peers may concern all tags
    del kv
    with contender.scope("weights"):
        weights = workloads.llama8b(bench.small).make(contender.empty)
    yield {"llama8b": _measure(bench, contender, "weights", weights)}


def _measure(
    bench: Bench, contender: Contender, tag: str, tensors: list[torch.Tensor]
) -> dict[str, Any]:
    result: dict[str, Any] = {"bytes": sum(tensor.nbytes for tensor in tensors)}
    with contextlib.ExitStack() as stack:
        bare = None
        if isinstance(contender, Cumempool):
            try:
                path = programs.find(bench.settings, "bare_driver")
                bare = stack.enter_context(Program(path, _sizes(contender, tag)))
            except programs.MissingProgramError as error:
                result["bare_not_run"] = str(error)
        result |= _rounds(bench, contender, tag, bare)
    return result


def _sizes(contender: Cumempool, tag: str) -> str:
    """Returns the sizes of a tag's allocations in the format of bare_driver."""
    sizes = Counter(
        allocation.bytes for allocation in contender.allocator.snapshot() if allocation.tag == tag
    )
    return ",".join(f"{count}x{size}" for size, count in sizes.items())


def _rounds(bench: Bench, contender: Contender, tag: str, bare: Program | None) -> dict[str, Any]:
    samples: dict[str, list[float]] = {"discard_s": [], "remap_s": [], "both_s": []}
    bare_samples: dict[str, list[float]] = {"discard_s": [], "remap_s": [], "both_s": []}
    for turn in range(-1, bench.cycles(ROUNDS)):
        bench.settle()
        discard = bench.timed(lambda: contender.discard(tag))
        bare_seconds = None if bare is None else _ask(bench, bare)
        bench.settle()
        remap = bench.timed(lambda: contender.wake(tag))
        if turn >= 0:  # the first turn warms up
            _add(samples, discard, remap)
            if bare_seconds is not None:
                _add(bare_samples, *bare_seconds)
    result: dict[str, Any] = {name: summary(values) for name, values in samples.items()}
    if bare is not None:
        result["bare"] = {name: summary(values) for name, values in bare_samples.items()}
        result["over_bare"] = {
            name.removesuffix("_s"): result[name]["median"] / result["bare"][name]["median"]
            for name in samples
        }
    return result


def _ask(bench: Bench, bare: Program) -> tuple[float, float]:
    """Returns seconds of a discard and of a remap by the program, which has nothing mapped."""
    bench.settle()
    remap = float(bare.ask("remap")["seconds"])
    bench.settle()
    return float(bare.ask("discard")["seconds"]), remap


def _add(samples: dict[str, list[float]], discard: float, remap: float) -> None:
    samples["discard_s"].append(discard)
    samples["remap_s"].append(remap)
    samples["both_s"].append(discard + remap)
