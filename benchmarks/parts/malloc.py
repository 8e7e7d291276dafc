"""Measures a fresh segment beside the bare driver calls, and through torch beside peers."""

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
SEGMENTS = ((20 * MIB, 100), (512 * MIB, 30))


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """``bare`` is malloc_path, which compares the pool's C entry with the bare driver calls.

    Contenders have processes of their own, since what one asks of libcuda changes what it costs
    others in the process.
    """
    if name == "bare":
        path = programs.find(bench.settings, "malloc_path")
        done = subprocess.run([str(path)], capture_output=True, text=True, check=True)
        yield dict(json.loads(done.stdout))
        return
    contender = contenders.make(name, bench)
    # Of torch for all, without a method of one that only calls another.
    empty = partial(Contender.empty, contender) if bench.on_cuda else contender.empty
    kept = []  # so that every segment is a new one
    for size, count in SEGMENTS:
        if bench.small:
            size, count = size // 10, 4
        microseconds = []
        with contender.scope(f"segments of {size}"):
            for _ in range(count + 2):
                bench.synchronize()
                start = time.perf_counter()
                kept.append(empty((size,), torch.uint8))
                microseconds.append((time.perf_counter() - start) * 1e6)
        yield {f"malloc_{size // MIB}_mib_us": summary(microseconds[2:])}
