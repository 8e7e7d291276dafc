"""Writes the README's tables of measured numbers from the records in benchmarks/results.

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
#: Workloads that sleep and wake, with their descriptions.
WORKLOADS = {
    "llama8b": "weights of an 8B model, 14.96 GiB in 194 tensors",
    "small": "2000 tensors of 3 MiB",
    "huge": "4 tensors of 16 GiB",
}
#: (phase, direction) of each column.
COLUMNS = {
    "first sleep": ("first", "sleep"),
    "later sleep": ("dirty", "sleep"),
    "10% changed": ("tenth_tensors", "sleep"),
    "unchanged": ("clean", "sleep"),
    "wake": ("dirty", "wake"),
}

Record = dict[str, Any]


def name_of(contender: str, versions: dict[str, str]) -> str:
    """Returns a contender's name for people, with the version that was measured."""
    saver = f"torch_memory_saver {versions.get('torch_memory_saver', '')}".strip()
    names = {
        "cumempool-prepared": "cumempool after `prepare()`",
        "cumempool-copy": "cumempool, `retain_backups=False`",
        "cumempool-no-rdma": "cumempool, `rdma=False`",
        "vllm": f"vLLM {versions.get('vllm', '')}'s allocator",
        "tms": saver,
        "tms-retain": f"{saver}, backup retained",
    }
    return names.get(contender, contender)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"

    return [line(header), "|" + "---|" * len(header), *map(line, rows), ""]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def gpu_of(record: Record, part: str) -> str:
    """Returns the GPU that a part ran on, such as "H200"; parts of a record may differ."""
    name: str = record["parts"][part]["gpus"][0]
    return name.removeprefix("NVIDIA ").split(" ")[0]


# ---- sleep and wake ------------------------------------------------------------------------------


def cycle_cell(result: Record, phase: str, direction: str) -> str:
    """Returns the time, and in brackets the multiple of the link's; "" if not measured."""
    if phase not in result or "over_floor" not in result[phase]:
        return ""
    seconds = result[phase][f"{direction}_s"]["median"]
    return f"{milliseconds(seconds)} ({result[phase]['over_floor'][direction]:.2f}x)"


def sleep_wake_tables(record: Record) -> list[str]:
    versions = record["versions"]
    lines = [
        f"Driver {record['machine']['kernel_driver']}, torch {versions['torch']}. "
        "Figures are medians; each contender runs in its own process. Brackets give the multiple "
        "of the time that the link needs for the bytes, at its rate in the same process. Later "
        "sleeps follow a change of all contents, of 10% of them, or of nothing.",
        "",
    ]
    for part, title in WORKLOADS.items():
        if part not in record["parts"]:
            continue
        rows = [
            [name_of(name, versions), *(cycle_cell(result, *at) for at in COLUMNS.values())]
            for name, result in record["parts"][part]["results"].items()
            if "first" in result
        ]
        lines += table([f"{title}, {gpu_of(record, part)}", *COLUMNS], rows)
    if (RESULTS / "sleep_wake.png").exists():
        lines += ["![The same figures, and how cost grows](benchmarks/results/sleep_wake.png)", ""]
    return lines


# ---- one line each -------------------------------------------------------------------------------


def first_result(record: Record, part: str, contender: str = "cumempool") -> Record:
    """Returns a contender's results of a part; {} if the part was not run."""
    results = record["parts"].get(part, {}).get("results", {})
    found: Record = results.get(contender, {})
    return found


def kv_rows(record: Record) -> list[list[str]]:
    kv = first_result(record, "kv").get("kv", {})
    if "over_bare" not in kv:
        return []
    return [
        [
            "discard and remap 40 GiB of KV cache",
            f"{milliseconds(kv['discard_s']['median'])} + {milliseconds(kv['remap_s']['median'])}",
            f"{kv['over_bare']['both']:.2f}x the bare driver calls",
            gpu_of(record, "kv"),
        ]
    ]


def swap_rows(record: Record) -> list[list[str]]:
    swap = first_result(record, "swap")
    if "swap_s" not in swap:
        return []
    ratio = f"{swap['over_sleep_then_wake']:.2f}x a sleep and then a wake"
    seconds = milliseconds(swap["swap_s"]["median"])
    return [["swap one 8B model for another", seconds, ratio, gpu_of(record, "swap")]]


def asynchronous_rows(record: Record) -> list[list[str]]:
    titles = {
        "layers-first": "first layer ready, in order of allocation",
        "first-named": "first layer ready, asked for first",
    }
    rows = []
    for contender, title in titles.items():
        result = first_result(record, "async", contender)
        if "first_layer_s" in result:
            ratio = f"{result['first_layer_over_whole'] * 100:.1f}% of the whole wake"
            seconds = milliseconds(result["first_layer_s"]["median"])
            rows.append([title, seconds, ratio, gpu_of(record, "async")])
    return rows


def tier_rows(record: Record) -> list[list[str]]:
    titles = {
        "pageable": "{gib} GiB to pageable memory and back",
        "file": "{gib} GiB to a file and back",
        "peer": "{gib} GiB to another GPU and back",
    }
    rows = []
    for part, title in titles.items():
        result = first_result(record, part)
        if "gb_per_s" not in result:
            continue
        rates = [f"{result['gb_per_s'][way]:.1f}" for way in ("sleep", "wake")]
        beside = ""
        if "rate_over_plain" in result:
            beside = " and ".join(f"{result['rate_over_plain'][w]:.2f}x" for w in ("sleep", "wake"))
            beside += f" the rate of plain direct I/O by {result['plain']['threads']} threads"
        elif "plain_gb_per_s" in result:
            plain = [f"{result['plain_gb_per_s'][way]:.1f}" for way in ("sleep", "wake")]
            beside = f"plain copies: {' and '.join(plain)} GB/s"
        name = title.format(gib=result["bytes"] // 2**30)
        rows.append([name, f"{' and '.join(rates)} GB/s", beside, gpu_of(record, part)])
    return rows


def scaling_rows(record: Record) -> list[list[str]]:
    titles = {
        "bytes": "per GiB, from 4 GiB on, largest over smallest",
        "allocations": "per allocation, from 100 on, largest over smallest",
    }
    rows = []
    for contender, title in titles.items():
        straight = first_result(record, "scaling", contender).get("largest_over_smallest")
        if straight:
            each = (
                f"{key.removesuffix('_s').replace('_', ' ')} {value:.2f}"
                for key, value in straight.items()
            )
            largest = f"{max(straight.values()):.2f}"
            rows.append([title, largest, ", ".join(each), gpu_of(record, "scaling")])
    return rows


def other_table(record: Record) -> list[str]:
    rows = [
        row
        for rows_of in (kv_rows, swap_rows, asynchronous_rows, tier_rows, scaling_rows)
        for row in rows_of(record)
    ]
    lines = table(["cumempool", "", "in the same run", "on"], rows) if rows else []
    commands = dict.fromkeys(part["command"] for part in record["parts"].values())
    return [*lines, *(line for command in commands for line in (f"`{command}`", ""))]


# ---- malloc --------------------------------------------------------------------------------------


def malloc_tables(record: Record, check: Record) -> list[str]:
    """Compares a segment malloc with the bare driver calls, and through torch with peers."""
    sizes = first_result(record, "malloc", "bare").get("sizes") or check["malloc_path"]["sizes"]
    lines = [
        "Medians of one segment malloc through a slot, and of the same four driver calls made "
        f"directly, on one {gpu_of(record, 'malloc')}.",
        "",
    ]
    rows = [
        [
            f"{size['bytes'] // 1024**2} MiB",
            f"{size['bare_malloc_us']:.1f} us",
            f"{size['pool_malloc_us']:.1f} us",
            f"{size['malloc_ratio']:.2f}",
        ]
        for size in sizes
    ]
    lines += table(["segment", "bare", "through the pool", "ratio"], rows)
    through_torch = {
        name: result
        for name, result in record["parts"].get("malloc", {}).get("results", {}).items()
        if "malloc_512_mib_us" in result
    }
    if through_torch:
        count = min(len(r["malloc_512_mib_us"]["samples"]) for r in through_torch.values())
        lines += [f"The same through torch, medians over {count} processes of each:", ""]
        rows = [
            [
                name_of(name, record["versions"]),
                *(f"{result[f'malloc_{mib}_mib_us']['median']:.1f} us" for mib in (20, 512)),
            ]
            for name, result in through_torch.items()
        ]
        lines += table(["`torch.empty` of a fresh segment", "20 MiB", "512 MiB"], rows)
    return lines


def figures() -> str:
    """Returns the text between the marks."""
    record = json.loads((RESULTS / "sleep_wake.json").read_text())
    if record.get("format") != 2:
        sys.exit("benchmarks/results/sleep_wake.json is of an old form: record it again")
    check = json.loads((RESULTS / "gpu_check.json").read_text())
    lines = [*sleep_wake_tables(record), *other_table(record), *malloc_tables(record, check)]
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README differs")
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
