"""What a fresh segment costs through torch, and what the same driver calls cost made bare."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import contenders
import programs
import torch
from bench import MIB, Bench, summary


def run(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """``bare`` is malloc_path, which compares the pool's C entry with the bare driver calls."""
    if name == "bare":
        path = programs.find(bench.settings, "malloc_path")
        done = subprocess.run([str(path)], capture_output=True, text=True, check=True)
        yield dict(json.loads(done.stdout))
        return
    contender = contenders.make(name, bench)
    kept = []  # so that every segment is a new one
    for size, count in ((20 * MIB, 100), (512 * MIB, 30)):
        if bench.small:
            size, count = size // 10, 4
        microseconds = []
        with contender.scope(f"segments of {size}"):
            for _ in range(count + 2):
                bench.synchronize()
                start = time.perf_counter()
                kept.append(contender.empty((size,), torch.uint8))
                microseconds.append((time.perf_counter() - start) * 1e6)
        yield {f"malloc_{size // MIB}_mib_us": summary(microseconds[2:])}
