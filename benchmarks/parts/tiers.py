"""Measures slower and faster tiers for backups, each beside the hardware without a pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import programs
import torch
import workloads
from bench import GIB, MIB, Bench, summary
from contenders import Cumempool
from cycles import Cycles
from programs import Program

TAG = "data"
ROUNDS = 5


def _tensors(
    bench: Bench, contender: Cumempool, backup: str, size: int, piece: int = 256 * MIB
) -> list[torch.Tensor]:
    piece = 2 * MIB if bench.small else piece
    count = 4 if bench.small else size // piece
    with contender.scope(TAG, backup=backup):
        tensors = [contender.exact((piece // 2,), torch.bfloat16) for _ in range(count)]
    workloads.fill(tensors)
    return tensors


def _rates(cycle: dict[str, Any], size: int) -> dict[str, float]:
    """Returns GB/s of a sleep and of a wake, by their wall time."""
    return {name: size / cycle[f"{name}_s"]["median"] / 1e9 for name in ("sleep", "wake")}


# ---- file ----------------------------------------------------------------------------------------


def run_file(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """Moves 8 GiB to a file and back, in turns with a program that does direct I/O only."""
    contender = Cumempool(bench)
    directory = bench.settings.directory
    tensors = _tensors(bench, contender, f"file:{directory}", 8 * GIB)
    cycles = Cycles(bench, contender, TAG, tensors)
    size = cycles.bytes
    yield {"bytes": size, "directory": directory, "first": cycles.first()}
    with contextlib.ExitStack() as stack:
        try:
            path = programs.find(bench.settings, "direct_io")
            plain = stack.enter_context(Program(path, directory, size))
            yield {"plain_first_write": plain.ask("write")}
        except programs.MissingProgramError as error:
            plain = None
            yield {"plain_not_run": str(error)}
        yield from _file_rounds(bench, cycles, plain)
    yield {
        "clean": cycles.run(bench.cycles(ROUNDS), workloads.change_nothing),
        "file_bytes": contender.allocator.stats().file_bytes,
    }


def _file_rounds(bench: Bench, cycles: Cycles, plain: Program | None) -> Iterator[dict[str, Any]]:
    sleeps, wakes, writes, reads, equal = [], [], [], [], []
    for _ in range(bench.cycles(ROUNDS)):
        cycle = cycles.run(1, workloads.change_all)
        sleeps += cycle["sleep_s"]["samples"]
        wakes += cycle["wake_s"]["samples"]
        equal.append(cycle["contents_equal"])
        if plain is not None:
            answer = plain.ask("write")
            writes.append(float(answer["seconds"]))
            reads.append(float(plain.ask("read")["seconds"]))
    dirty: dict[str, Any] = {
        "sleep_s": summary(sleeps),
        "wake_s": summary(wakes),
        "contents_equal": all(equal),
    }
    yield {"dirty": dirty, "gb_per_s": _rates(dirty, cycles.bytes)}
    if plain is not None:
        yield {
            "plain": {"write_s": summary(writes), "read_s": summary(reads)} | answer,
            "rate_over_plain": {
                "sleep": summary(writes)["median"] / dirty["sleep_s"]["median"],
                "wake": summary(reads)["median"] / dirty["wake_s"]["median"],
            },
        }


# ---- pageable ------------------------------------------------------------------------------------


def run_pageable(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """Moves 8 GiB to pageable host memory and back, beside torch's copies of a GiB to the same."""
    contender = Cumempool(bench)
    tensors = _tensors(bench, contender, "pageable", 8 * GIB)
    cycles = Cycles(bench, contender, TAG, tensors)
    yield {"bytes": cycles.bytes, "first": cycles.first()}
    dirty = cycles.run(bench.cycles(ROUNDS), workloads.change_all)
    yield {"dirty": dirty, "gb_per_s": _rates(dirty, cycles.bytes)}
    yield {"clean": cycles.run(bench.cycles(ROUNDS), workloads.change_nothing)}
    size = 16 * MIB if bench.small else GIB
    device = torch.empty(size, dtype=torch.uint8, device=bench.torch_device)
    host = torch.ones(size, dtype=torch.uint8)
    yield {
        "plain_gb_per_s": {
            "sleep": _copy_rate(bench, device, host),
            "wake": _copy_rate(bench, host, device),
        }
    }


def _copy_rate(bench: Bench, source: torch.Tensor, target: torch.Tensor) -> float:
    target.copy_(source)
    seconds = [bench.timed(lambda: target.copy_(source)) for _ in range(5)]
    return source.nbytes / float(summary(seconds)["median"]) / 1e9


# ---- peer ----------------------------------------------------------------------------------------


def run_peer(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    """Moves 15 GiB to another device and back, beside a plain copy between ordinary tensors.

    In pieces of 1.25 GiB, as the KV cache of the other parts has, and in pieces of 256 MiB: what
    the driver calls of an allocation take shows behind a link this fast.
    """
    contender = Cumempool(bench, devices=2)
    kv = _tensors(bench, contender, "peer:1", 15 * GIB, 1280 * MIB)
    cycles = Cycles(bench, contender, TAG, kv)
    yield {"bytes": cycles.bytes, "first": cycles.first()}
    dirty = cycles.run(bench.cycles(9), workloads.change_all)
    yield {"dirty": dirty, "gb_per_s": _rates(dirty, cycles.bytes)}
    yield {
        "clean": cycles.run(bench.cycles(5), workloads.change_nothing),
        "peer_bytes": contender.allocator.stats().peer_bytes,
    }
    kv.clear()
    pieces = _tensors(bench, contender, "peer:1", 15 * GIB)
    cycles = Cycles(bench, contender, TAG, pieces)
    cycles.run(1, workloads.change_nothing)
    dirty = cycles.run(bench.cycles(9), workloads.change_all)
    yield {"pieces": {"dirty": dirty, "gb_per_s": _rates(dirty, cycles.bytes)}}
    pieces.clear()
    size = 16 * MIB if bench.small else 4 * GIB
    near = torch.empty(size, dtype=torch.uint8, device=bench.torch_device)
    far = torch.empty(size, dtype=torch.uint8, device="cuda:1" if bench.on_cuda else "cpu")
    yield {
        "plain_gb_per_s": {
            "sleep": _copy_rate(bench, near, far),
            "wake": _copy_rate(bench, far, near),
        }
    }
