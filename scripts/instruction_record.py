"""Turns the profiles of instruction_counts.sh into a JSON record, or compares them with it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

#: The most that a path may differ from the record.
TOLERANCE = 0.10
#: "1,737,303 (61.84%)  file:function [object]", as callgrind_annotate writes it.
LINE = re.compile(r"^\s*([\d,]+) \([\d. ]+%\)\s+(.*)$")
#: The entries of the host driver, whose instructions simulate a device.
HOST_DRIVER = re.compile(r"cumempool::driver::\(anonymous namespace\)::(on_devices|in_memory)<")


def read_profile(path: Path, allocations: int) -> dict[str, float]:
    """Returns instructions per allocation: the library alone, and with the simulated device."""
    total = simulated = 0
    for line in path.read_text().splitlines():
        if (match := LINE.match(line)) is None:
            continue
        count, name = int(match[1].replace(",", "")), match[2]
        if name.startswith("PROGRAM TOTALS"):
            total = count
        elif HOST_DRIVER.search(name):
            simulated += count
    if not 0 < simulated < total:
        sys.exit(f"{path.stem}: {total} instructions, {simulated} of them of the host driver")
    return {
        "library": round((total - simulated) / allocations, 1),
        "with_host_driver": round(total / allocations, 1),
    }


def compare(measured: dict[str, dict[str, float]], recorded: dict[str, dict[str, float]]) -> bool:
    """Prints both; returns whether no path needs too many more."""
    good = set(measured) == set(recorded)
    for path, counts in measured.items():
        if path not in recorded:
            print(f"{path}: not in the record")
            continue
        ratio = counts["library"] / recorded[path]["library"]
        verdict = ""
        if ratio > 1 + TOLERANCE:
            good, verdict = False, "  TOO MANY"
        elif ratio < 1 - TOLERANCE:
            verdict = "  fewer: record it with scripts/instruction_counts.sh"
        print(f"{path}: {counts['library']:.0f} instructions, {ratio:.3f} of the record{verdict}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--allocations", type=int, required=True)
    parser.add_argument("--compiler", required=True)
    arguments = parser.parse_args()
    measured = {
        path.stem: read_profile(path, arguments.allocations)
        for path in sorted(arguments.profiles.glob("*.txt"))
    }
    if arguments.check:
        recorded = json.loads(arguments.record.read_text())["instructions_per_allocation"]
        sys.exit(0 if compare(measured, recorded) else 1)
    record = {
        "benchmark": "instructions",
        "command": "scripts/instruction_counts.sh",
        "compiler": arguments.compiler,
        "allocations": arguments.allocations,
        "instructions_per_allocation": measured,
    }
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    for path, counts in measured.items():
        print(f"{path}: {counts['library']:.0f} instructions")


if __name__ == "__main__":
    main()
