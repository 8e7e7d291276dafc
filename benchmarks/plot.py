"""Draws a record of sleep_wake.py: multiples of the link's time, and how cost grows.

python benchmarks/plot.py results/sleep_wake.json    # writes results/sleep_wake.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from bars import figure
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

Record = dict[str, Any]
#: (phase, direction, label) of each group of bars.
GROUPS = (
    ("first", "sleep", "first\nsleep"),
    ("dirty", "sleep", "later\nsleep"),
    ("tenth_tensors", "sleep", "10%\ndirty"),
    ("clean", "sleep", "clean"),
    ("dirty", "wake", "wake"),
)
NAMES = {
    "cumempool": "cumempool",
    "cumempool-prepared": "after prepare()",
    "vllm": "vLLM",
    "tms": "torch_memory_saver",
    "tms-retain": "the same, retained",
}
COLOURS = ("#1f5fa8", "#7fb2e5", "#e0803a", "#9a9a9a", "#5c5c5c")
MEASURES = {
    "copy_sleep_s": "sleep",
    "clean_sleep_s": "clean sleep",
    "wake_s": "wake",
    "discard_s": "discard",
    "remap_s": "remap",
}


def draw_floors(axes: Axes, record: Record) -> None:
    """Draws sleeps and wakes in multiples of the link's time."""
    results = record["parts"].get("llama8b", {}).get("results", {})
    present = [name for name in NAMES if name in results]
    width = 0.8 / max(1, len(present))
    for place, name in enumerate(present):
        for group, (phase, direction, _) in enumerate(GROUPS):
            value = figure(record, "llama8b", name, phase, "over_floor", direction)
            if value is None:
                continue
            at = group - 0.4 + width * (place + 0.5)
            colour = COLOURS[list(NAMES).index(name)]
            axes.bar(at, value, width * 0.92, color=colour)
            text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.text(at, value * 1.05, text, ha="center", fontsize=6)
    for name in present:
        axes.bar(0, 0, color=COLOURS[list(NAMES).index(name)], label=NAMES[name])
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(GROUPS)), [label for _, _, label in GROUPS], fontsize=8)
    axes.set_ylabel("times what the link needs")
    axes.set_title("8B model, 14.96 GiB", fontsize=10)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0.03)
    if present:
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0.42, 1))


def draw_scaling(axes: Axes, record: Record, name: str, of: str) -> None:
    """Draws milliseconds over bytes or over allocations."""
    results = record["parts"].get("scaling", {}).get("results", {})
    points = results.get(name, {}).get("points", [])
    for measure, label in MEASURES.items():
        counts = [p["bytes"] / 1024**3 if name == "bytes" else p["allocations"] for p in points]
        times = [point[measure]["median"] * 1e3 for point in points]
        axes.plot(counts, times, marker="o", markersize=3, linewidth=1.2, label=label)
    if points:  # a logarithmic scale of nothing is an error
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(of)
    axes.set_ylabel("ms")
    axes.set_title("cumempool, cost over size" if name == "bytes" else "over number", fontsize=10)
    if points:
        axes.legend(fontsize=7, frameon=False)


def draw(record_path: Path) -> Path:
    """Writes the PNG beside the record and returns its path."""
    record = json.loads(record_path.read_text())
    canvas, axes = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=(2.2, 1, 1))
    draw_floors(axes[0], record)
    draw_scaling(axes[1], record, "bytes", "GiB in allocations of 64 MiB")
    draw_scaling(axes[2], record, "allocations", "allocations of 2 MiB")
    devices = record["machine"].get("devices") or [{"name": "host driver, no measurement"}]
    versions = record["versions"]
    canvas.suptitle(f"{devices[0]['name']}, torch {versions.get('torch', '')}", fontsize=9)
    canvas.tight_layout()
    path = record_path.with_suffix(".png")
    canvas.savefig(path, dpi=110)
    plt.close(canvas)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    print(draw(parser.parse_args().record))


if __name__ == "__main__":
    main()
