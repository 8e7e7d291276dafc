"""Writes the measured numbers of docs/performance.md from the records in benchmarks/results.

python scripts/performance_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys

from readme_figures import BEGIN, END, RESULTS, ROOT, figures, table


def instruction_tables() -> list[str]:
    """Returns the instructions per allocation, in the library and with the host driver."""
    record = json.loads((RESULTS / "instructions.json").read_text(encoding="utf-8"))
    rows = [
        [name.replace("_", " "), *(f"{counts[of]:,.0f}" for of in ("library", "with_host_driver"))]
        for name, counts in record["instructions_per_allocation"].items()
    ]
    return [
        "## Instructions",
        "",
        f"Instructions per allocation of one operation on {record['allocations']} allocations, "
        f"counted by `{record['command']}`. Continuous integration counts them again.",
        "",
        *table(["operation", "the library", "with the host driver"], rows),
    ]


def text() -> str:
    """Returns the text between the marks."""
    beside = figures().replace("](benchmarks/", "](../benchmarks/")
    return "\n".join(["## Sleep and wake", "", beside, "", *instruction_tables()]).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page differs")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "performance.md"
    found = page.read_text(encoding="utf-8")
    before, _, rest = found.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{text()}\n{END}{after}"
    if arguments.check:
        sys.exit(0 if wanted == found else "docs/performance.md: run scripts/performance_page.py")
    page.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
