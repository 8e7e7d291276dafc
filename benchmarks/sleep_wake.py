"""Sleep and wake of an 8B-parameter model and its KV cache, beside the link and beside peers.

Every contender runs in a process of its own, one after another, with the link's rate measured in
each. Host memory is touched once before, since some virtual machines grow it on first use.

    python benchmarks/sleep_wake.py --output result.json
    python benchmarks/sleep_wake.py --peers DIRECTORY   # with the peers' packages in it
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GIB = 1024**3
MIB = 1024**2
#: bf16 embedding and head, and 32 layers of an 8B model: 14.96 GiB.
LLAMA8B = [(128256, 4096)] * 2 + [
    shape
    for _ in range(32)
    for shape in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096,), (4096,))
]
KV = [int(1.25 * GIB)] * 32
CYCLES = 5
CONTENDERS = ("cumempool", "cumempool-prepared", "vllm", "tms", "tms-retain")


def touch_host_memory(size: int) -> None:
    """Has a growing virtual machine get its memory before anything is timed."""
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def timed(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def link_rates() -> dict[str, float]:
    """GB/s of pinned copies in 32 MiB pieces, the median of five gigabytes each way."""
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(GIB, dtype=torch.uint8, device="cuda")

    def move(target: torch.Tensor, source: torch.Tensor) -> None:
        for at in range(0, GIB, 32 * MIB):
            target[at : at + 32 * MIB].copy_(source[at : at + 32 * MIB], non_blocking=True)

    def median(target: torch.Tensor, source: torch.Tensor) -> float:
        move(target, source)
        return statistics.median(GIB / timed(lambda: move(target, source)) / 1e9 for _ in range(5))

    rates = {"to_host": median(host, device), "to_device": median(device, host)}
    del host, device
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    return rates


def make_weights() -> list[torch.Tensor]:
    weights = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in LLAMA8B]
    for weight in weights:
        weight.view(torch.int16).random_()
    return weights


def make_kv() -> list[torch.Tensor]:
    return [torch.empty(size, dtype=torch.uint8, device="cuda") for size in KV]


def digest(tensors: list[torch.Tensor]) -> int:
    return sum(int(t.view(torch.int16).sum(dtype=torch.int64)) for t in tensors)


def cycles(sleep: Callable[[], object], wake: Callable[[], object]) -> dict[str, Any]:
    first = timed(sleep)
    wakes, sleeps = [timed(wake)], []
    for _ in range(CYCLES):
        sleeps.append(timed(sleep))
        wakes.append(timed(wake))
    return {
        "first_sleep_s": first,
        "later_sleep_s": statistics.median(sleeps),
        "wake_s": statistics.median(wakes),
    }


def run_cumempool(prepared: bool) -> dict[str, Any]:
    import cumempool

    allocator = cumempool.CuMemAllocator()
    with allocator.use_memory_pool("weights"):
        weights = make_weights()
    expected = digest(weights)
    result: dict[str, Any] = {}
    if prepared:
        result["prepare_s"] = timed(lambda: allocator.prepare("weights"))
    result |= cycles(lambda: allocator.sleep("weights"), allocator.wake_up)
    stats = allocator.stats()
    result["host_bytes_per_backup_byte"] = stats.host_bytes / sum(w.nbytes for w in weights)
    result["contents_equal"] = digest(weights) == expected
    with allocator.use_memory_pool("kv_cache"):
        kv = make_kv()
    remaps = [
        (timed(lambda: allocator.discard("kv_cache")), timed(lambda: allocator.wake_up("kv_cache")))
        for _ in range(CYCLES)
    ]
    result["discard_kv_s"] = statistics.median(a for a, _ in remaps)
    result["remap_kv_s"] = statistics.median(b for _, b in remaps)
    del kv
    return result


def run_vllm() -> dict[str, Any]:
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    with allocator.use_memory_pool(tag="weights"):
        weights = make_weights()
    expected = digest(weights)
    result = cycles(lambda: allocator.sleep(offload_tags=("weights",)), allocator.wake_up)
    result["contents_equal"] = digest(weights) == expected
    return result


def run_tms(retain: bool) -> dict[str, Any]:
    from torch_memory_saver import torch_memory_saver as saver

    saver.hook_mode = "torch"
    saver.retain_cpu_backup = retain
    with saver.region(tag="weights", enable_cpu_backup=True):
        weights = make_weights()
    expected = digest(weights)
    result = cycles(lambda: saver.pause("weights"), lambda: saver.resume("weights"))
    result["contents_equal"] = digest(weights) == expected
    return result


RUNNERS: dict[str, Callable[[], dict[str, Any]]] = {
    "cumempool": lambda: run_cumempool(prepared=False),
    "cumempool-prepared": lambda: run_cumempool(prepared=True),
    "vllm": run_vllm,
    "tms": lambda: run_tms(retain=False),
    "tms-retain": lambda: run_tms(retain=True),
}


def run_one(contender: str) -> None:
    touch_host_memory(20 * GIB)
    rates = link_rates()
    result = RUNNERS[contender]()
    size = sum(2 * torch.Size(shape).numel() for shape in LLAMA8B)
    floors = {
        "first_sleep": size / rates["to_host"] / 1e9,
        "later_sleep": size / rates["to_host"] / 1e9,
        "wake": size / rates["to_device"] / 1e9,
    }
    result["link_gb_per_s"] = rates
    result["over_floor"] = {name: result[f"{name}_s"] / floor for name, floor in floors.items()}
    print(json.dumps(result), flush=True)
    os._exit(0)  # some peers end the process with an error of their own


def run_all(contenders: list[str], peers: str | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    path = os.pathsep.join(filter(None, [peers, os.environ.get("PYTHONPATH")]))
    for contender in contenders:
        done = subprocess.run(
            [sys.executable, __file__, "--one", contender],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        results[contender] = json.loads(lines[-1]) if lines else {"error": done.stderr[-2000:]}
        print(contender, json.dumps(results[contender]), flush=True)
    return results


def commit() -> str:
    """The commit that is measured; "unknown" outside a checkout."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or os.environ.get("CUMEMPOOL_COMMIT", "unknown")


def print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "first sleep", "later sleep", "wake", "of the link's time", title="llama8b, ms"
    )
    for name, result in results.items():
        if "error" in result:
            table.add_row(name, "failed")
            continue
        times = (f"{result[key] * 1e3:.0f}" for key in ("first_sleep_s", "later_sleep_s", "wake_s"))
        table.add_row(name, *times, " / ".join(f"{r:.2f}x" for r in result["over_floor"].values()))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--peers", help="a directory to import peers from")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one)
    chosen = arguments.contenders or list(CONTENDERS if arguments.peers else CONTENDERS[:2])
    record = {
        "benchmark": "sleep_wake",
        "workload": "llama8b",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        "results": run_all(chosen, arguments.peers),
    }
    print_table(record["results"])
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
