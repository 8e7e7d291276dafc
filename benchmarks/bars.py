"""Compares the figures of a record with the bars that they have to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


def figure(record: Record, *path: str) -> float | None:
    """Returns a number in the results, or None if a part of its path is missing."""
    at: Any = record["parts"]
    part, *rest = path
    for key in (part, "results", *rest):
        if not isinstance(at, dict) or key not in at:
            return None
        at = at[key]
    return float(at["median"] if isinstance(at, dict) else at)


@dataclass(frozen=True)
class Bar:
    """One bar: ``value <relation> limit``."""

    name: str
    relation: str
    limit: float
    read: Callable[[Record], float | None]

    def result(self, record: Record) -> dict[str, Any]:
        value = self.read(record)
        met = None
        if value is not None:
            met = value <= self.limit if self.relation == "<=" else value >= self.limit
        return {
            "name": self.name,
            "bar": f"{self.relation} {self.limit:g}",
            "value": value,
            "met": met,
        }


def _at(*path: str) -> Callable[[Record], float | None]:
    return lambda record: figure(record, *path)


def _better_peer(part: str, *path: str) -> Callable[[Record], float | None]:
    """Returns a reader of how many times longer the better peer takes."""

    def read(record: Record) -> float | None:
        ours = figure(record, part, "cumempool", *path)
        peers = [figure(record, part, peer, *path) for peer in ("vllm", "tms", "tms-retain")]
        known = [value for value in peers if value is not None]
        return min(known) / ours if ours and known else None

    return read


def _segment(index: int) -> Callable[[Record], float | None]:
    """Returns a reader of malloc_path's ratio for its size of that index."""

    def read(record: Record) -> float | None:
        bare = record["parts"].get("malloc", {}).get("results", {}).get("bare", {})
        sizes = bare.get("sizes", [])
        return float(sizes[index]["malloc_ratio"]) if index < len(sizes) else None

    return read


def _floor(contender: str, phase: str, direction: str = "sleep") -> Callable[..., float | None]:
    return _at("llama8b", contender, phase, "over_floor", direction)


BARS = (
    Bar("first sleep, nothing prepared, of the floor", "<=", 2.0, _floor("cumempool", "first")),
    Bar(
        "first sleep, times faster than the better peer",
        ">=",
        8,
        _better_peer("llama8b", "first", "sleep_s"),
    ),
    Bar(
        "first sleep after prepare, of the floor", "<=", 1.05, _floor("cumempool-prepared", "first")
    ),
    Bar("later sleep, all dirty, of the floor", "<=", 1.05, _floor("cumempool", "dirty")),
    Bar("later sleep, all clean, of the floor", "<=", 0.12, _floor("cumempool", "clean")),
    Bar(
        "later sleep, 10% dirty (whole tensors), of the floor",
        "<=",
        0.25,
        _floor("cumempool", "tenth_tensors"),
    ),
    Bar(
        "later sleep, 10% dirty (every tenth MiB), of the floor",
        "<=",
        0.25,
        _floor("cumempool", "tenth_slices"),
    ),
    Bar("wake, of the floor", "<=", 1.04, _floor("cumempool", "dirty", "wake")),
    Bar(
        "discard and remap of the KV cache, of the bare calls",
        "<=",
        1.25,
        _at("kv", "cumempool", "kv", "over_bare", "both"),
    ),
    Bar("swap, of sleep then wake", "<=", 0.62, _at("swap", "cumempool", "over_sleep_then_wake")),
    Bar(
        "first layer in order of allocation, of the whole wake",
        "<=",
        0.05,
        _at("async", "layers-first", "first_layer_over_whole"),
    ),
    Bar(
        "first layer asked for first, of the whole wake",
        "<=",
        0.05,
        _at("async", "first-named", "first_layer_over_whole"),
    ),
    Bar("sleep to a peer GPU, GB/s", ">=", 350, _at("peer", "cumempool", "gb_per_s", "sleep")),
    Bar("wake from a peer GPU, GB/s", ">=", 350, _at("peer", "cumempool", "gb_per_s", "wake")),
    Bar(
        "sleep to a file, of direct I/O's rate",
        ">=",
        0.9,
        _at("file", "cumempool", "rate_over_plain", "sleep"),
    ),
    Bar(
        "wake from a file, of direct I/O's rate",
        ">=",
        0.9,
        _at("file", "cumempool", "rate_over_plain", "wake"),
    ),
    Bar("segment malloc of 2 MiB, of the bare calls", "<=", 1.15, _segment(0)),
    Bar("segment malloc of 20 MiB, of the bare calls", "<=", 1.15, _segment(1)),
    Bar("segment malloc of 512 MiB, of the bare calls", "<=", 1.15, _segment(2)),
    *(
        Bar(
            f"segment of {mib} MiB through torch, times faster than the better peer",
            ">=",
            1.0,
            _better_peer("malloc", f"malloc_{mib}_mib_us"),
        )
        for mib in (20, 512)
    ),
    Bar(
        "host bytes per byte backed up",
        "<=",
        1.02,
        _at("llama8b", "cumempool", "host_bytes_per_byte"),
    ),
)


def results(record: Record) -> list[dict[str, Any]]:
    """Returns every bar with the figure of the record; None if it was not measured."""
    return [bar.result(record) for bar in BARS]
