"""What a fresh segment costs beside the driver calls made bare, and through torch beside peers."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import contenders
import programs
import torch
from bench import MIB, Bench, summary
from contenders import Contender

#: Bytes of a segment, and how many of them; torch's own have 20 MiB where tensors are small.
SEGMENTS = ((20 * MIB, 60), (512 * MIB, 16))
SMALL_SEGMENTS = ((2 * MIB, 4), (4 * MIB, 4))


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """``bare`` is malloc_path, which compares the pool's C entry with the bare driver calls.

    A peer takes turns with cumempool in one thread, segment by segment, each inside a scope of its
    own that was entered just before: from process to process and from thread to thread all driver
    calls may take half as long again.
    """
    if name == "bare":
        path = programs.find(bench.settings, "malloc_path")
        done = subprocess.run([str(path)], capture_output=True, text=True, check=True)
        yield dict(json.loads(done.stdout))
        return
    peer, ours = contenders.make(name, bench), contenders.make("cumempool", bench)
    sizes = []
    for size, count in SMALL_SEGMENTS if bench.small else SEGMENTS:
        sizes.append(_take_turns(bench, peer, ours, size, count))
        yield {"sizes": sizes}


def _take_turns(
    bench: Bench, peer: Contender, ours: Contender, size: int, count: int
) -> dict[str, Any]:
    kept = []  # so that every segment is a new one

    def segment(contender: Contender) -> float:
        # Of torch for all, without a method of one that only calls another.
        empty = partial(Contender.empty, contender) if bench.on_cuda else contender.empty
        with contender.scope(f"segments of {size}"):
            bench.synchronize()
            start = time.perf_counter()
            kept.append(empty((size,), torch.uint8))
            return (time.perf_counter() - start) * 1e6

    microseconds: dict[Contender, list[float]] = {peer: [], ours: []}
    for index in range(count + 2):
        for contender in (peer, ours) if index % 2 else (ours, peer):
            microseconds[contender].append(segment(contender))
    peer_figure, our_figure = summary(microseconds[peer][2:]), summary(microseconds[ours][2:])
    return {
        "bytes": size,
        "malloc_us": peer_figure,
        "cumempool_malloc_us": our_figure,
        "times_faster": peer_figure["median"] / our_figure["median"],
    }
