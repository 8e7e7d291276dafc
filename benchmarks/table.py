"""Renders a record as tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bars import figure

PHASES = {
    "first": "first sleep",
    "dirty": "later sleep",
    "tenth_tensors": "10% dirty",
    "clean": "clean",
}


def render(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def milliseconds(seconds: float | None, over: float | None = None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" + ("" if over is None else f" ({over:.2f}x)")


def transitions(record: dict[str, Any], part: str) -> str:
    """Returns milliseconds, and multiples of the link's time."""
    rows = [[part, *PHASES.values(), "wake"]]
    for name in record["parts"][part]["results"]:
        cells = []
        for phase, direction in [*((phase, "sleep") for phase in PHASES), ("dirty", "wake")]:
            seconds = figure(record, part, name, phase, f"{direction}_s")
            cells.append(
                milliseconds(seconds, figure(record, part, name, phase, "over_floor", direction))
            )
        rows.append([name, *cells])
    return render(rows)


def scaling(results: dict[str, Any]) -> str:
    measures = ("copy_sleep_s", "clean_sleep_s", "wake_s", "discard_s", "remap_s")
    rows = [["scaling", *(name.removesuffix("_s").replace("_", " ") for name in measures)]]
    for result in results.values():
        for point in result.get("points", []):
            label = f"{point['allocations']} x {point['bytes'] // point['allocations'] >> 20} MiB"
            rows.append([label, *(milliseconds(point[name]["median"]) for name in measures)])
        straight = result.get("largest_over_smallest") or {}
        if straight:
            per = f"per {result['seconds_per']}, largest / smallest"
            rows.append([per, *(f"{straight[name]:.2f}" for name in measures)])
    return render(rows)


def failures(record: dict[str, Any]) -> list[str]:
    """Returns a line for each contender that failed, was not run, or lost contents."""
    lines = []
    for part, content in record["parts"].items():
        for name, result in content["results"].items():
            if "error" in result:
                lines.append(f"{part}, {name}: {result['error'].strip().splitlines()[-1]}")
            if lost_contents(result):
                lines.append(f"{part}, {name}: CONTENTS DIFFER")
    return lines


def lost_contents(result: Any) -> bool:
    """Returns whether any comparison of contents in a result failed."""
    if isinstance(result, list):
        return any(map(lost_contents, result))
    if not isinstance(result, dict):
        return False
    return result.get("contents_equal") is False or any(map(lost_contents, result.values()))


def bars(record: dict[str, Any]) -> str:
    verdicts = {True: "met", False: "MISSED", None: "not measured"}
    rows = [["bar", "", "measured", ""]]
    for bar in record["bars"]:
        value = "-" if bar["value"] is None else f"{bar['value']:.3f}"
        rows.append([bar["name"], bar["bar"], value, verdicts[bar["met"]]])
    return render(rows)


def text(record: dict[str, Any]) -> str:
    """Returns all tables."""
    parts = record["parts"]
    blocks = [transitions(record, p) for p in ("llama8b", "small", "huge") if p in parts]
    if "scaling" in parts:
        blocks.append(scaling(parts["scaling"]["results"]))
    if record["bars"]:
        blocks.append(bars(record))
    if failed := failures(record):
        blocks.append("\n".join(failed))
    return "\n\n".join(blocks)
