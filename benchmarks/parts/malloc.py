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
SEGMENTS = ((20 * MIB, 100), (512 * MIB, 24))
SMALL_SEGMENTS = ((2 * MIB, 4), (4 * MIB, 4))


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """``bare`` is malloc_path, which compares the pool's C entry with the bare driver calls.

    A peer takes turns with cumempool in one thread, segment by segment: from process to process and
    from thread to thread all driver calls may take half as long again. The peer's scope stays open;
    cumempool enters one inside it for each segment, so that what a change of scopes costs is on its
    side.
    """
    if name == "bare":
        path = programs.find(bench.settings, "malloc_path")
        done = subprocess.run([str(path)], capture_output=True, text=True, check=True)
        yield dict(json.loads(done.stdout))
        return
    peer, ours = contenders.make(name, bench), contenders.make("cumempool", bench)
    sizes = []
    for size, count in SMALL_SEGMENTS if bench.small else SEGMENTS:
        with peer.scope(f"segments of {size}"):
            sizes.append(_take_turns(bench, peer, ours, size, count))
        yield {"sizes": sizes}


def _take_turns(
    bench: Bench, peer: Contender, ours: Contender, size: int, count: int
) -> dict[str, Any]:
    kept = []  # so that every segment is a new one

    def segment(contender: Contender) -> float:
        # Of torch for all, without a method of one that only calls another.
        empty = partial(Contender.empty, contender) if bench.on_cuda else contender.empty
        bench.synchronize()
        start = time.perf_counter()
        kept.append(empty((size,), torch.uint8))
        return (time.perf_counter() - start) * 1e6

    def segment_of_ours() -> float:
        with ours.scope(f"segments of {size}"):
            return segment(ours)

    peers_us, ours_us = [], []
    for index in range(count + 2):
        if index % 2:
            peers_us.append(segment(peer))
            ours_us.append(segment_of_ours())
        else:
            ours_us.append(segment_of_ours())
            peers_us.append(segment(peer))
    peer_figure, our_figure = summary(peers_us[2:]), summary(ours_us[2:])
    return {
        "bytes": size,
        "malloc_us": peer_figure,
        "cumempool_malloc_us": our_figure,
        "times_faster": peer_figure["median"] / our_figure["median"],
    }
