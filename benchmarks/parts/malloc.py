"""What a fresh segment costs beside the driver calls made bare, and through torch beside peers."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
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

    A peer takes turns with cumempool in one process, segment by segment: from process to process
    all driver calls may take half as long again.
    """
    if name == "bare":
        path = programs.find(bench.settings, "malloc_path")
        done = subprocess.run([str(path)], capture_output=True, text=True, check=True)
        yield dict(json.loads(done.stdout))
        return
    peer, ours = contenders.make(name, bench), contenders.make("cumempool", bench)
    sizes = []
    for size, count in SMALL_SEGMENTS if bench.small else SEGMENTS:
        with Turns(bench, peer, size) as peers_turns, Turns(bench, ours, size) as our_turns:
            for index in range(count + 2):
                both = (peers_turns, our_turns)
                for turns in both if index % 2 else reversed(both):
                    turns.take()
        peers_figure, our_figure = peers_turns.figure(), our_turns.figure()
        sizes.append(
            {
                "bytes": size,
                "malloc_us": peers_figure,
                "cumempool_malloc_us": our_figure,
                "times_faster": peers_figure["median"] / our_figure["median"],
            }
        )
        yield {"sizes": sizes}


class Turns:
    """Allocates segments of one size, in a thread of its own inside a scope of the contender.

    Both stay as they are between turns, since scopes are per thread and entering one takes longer
    than a segment.
    """

    def __init__(self, bench: Bench, contender: Contender, size: int) -> None:
        self._bench = bench
        self._contender = contender
        self._size = size
        self._scope = contender.scope(f"segments of {size}")
        self._thread = ThreadPoolExecutor(1)
        self._microseconds: list[float] = []
        self._kept: list[torch.Tensor] = []  # so that every segment is a new one

    def take(self) -> None:
        self._thread.submit(self._segment).result()

    def figure(self) -> dict[str, Any]:
        """Without the first two turns."""
        return summary(self._microseconds[2:])

    def _segment(self) -> None:
        self._bench.synchronize()
        start = time.perf_counter()
        self._kept.append(self._contender.empty((self._size,), torch.uint8))
        self._microseconds.append((time.perf_counter() - start) * 1e6)

    def __enter__(self) -> Turns:
        self._thread.submit(self._scope.__enter__).result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.submit(self._scope.__exit__, kind, error, traceback).result()
        self._thread.shutdown()
