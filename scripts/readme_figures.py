"""Writes the README's table of measured numbers from the records in benchmarks/results.

python scripts/readme_figures.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NAMES = {
    "cumempool": "cumempool",
    "cumempool-prepared": "cumempool after `prepare()`",
    "vllm": "vLLM 0.33.0's allocator",
    "tms": "torch_memory_saver 0.0.10",
    "tms-retain": "torch_memory_saver 0.0.10, backup retained",
}


def sleep_wake_table(record: dict[str, Any]) -> list[str]:
    """Milliseconds, and multiples of the time that the link needs for the bytes."""
    lines = [
        f"Weights of an 8B model, 14.96 GiB in 194 tensors, {record['device']}, torch "
        f"{record['torch']}; medians, each contender in a process of its own; in brackets the "
        "multiple of what the link needs, measured in the same process.",
        "",
        "| | first sleep | later sleep | wake |",
        "|---|---|---|---|",
    ]
    for key, result in record["results"].items():
        if "error" in result:
            continue
        cells = [
            f"{result[f'{name}_s'] * 1e3:.0f} ms ({result['over_floor'][name]:.2f}x)"
            for name in ("first_sleep", "later_sleep", "wake")
        ]
        lines.append(f"| {NAMES[key]} | {' | '.join(cells)} |")
    return [*lines, "", "`python benchmarks/sleep_wake.py --peers DIRECTORY`", ""]


def malloc_table(record: dict[str, Any]) -> list[str]:
    """A segment malloc beside the same driver calls made bare."""
    lines = [
        f"One segment malloc through a slot beside the same four driver calls made bare, "
        f"{record['device']}; medians.",
        "",
        "| segment | bare | through the pool | ratio |",
        "|---|---|---|---|",
    ]
    for size in record["malloc_path"]["sizes"]:
        lines.append(
            f"| {size['bytes'] // 1024**2} MiB | {size['bare_malloc_us']:.1f} us "
            f"| {size['pool_malloc_us']:.1f} us | {size['malloc_ratio']:.2f} |"
        )
    return [*lines, "", "`scripts/gpu_check.sh`"]


def figures() -> str:
    """The text between the markers."""
    sleep_wake = json.loads((RESULTS / "sleep_wake.json").read_text())
    check = json.loads((RESULTS / "gpu_check.json").read_text())
    return "\n".join([*sleep_wake_table(sleep_wake), *malloc_table(check)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the README differs")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{figures()}\n{END}{after}"
    if arguments.check:
        sys.exit(0 if wanted == text else "README.md: run scripts/readme_figures.py")
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
