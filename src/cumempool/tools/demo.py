"""Demonstrates sleep and wake: backs weights up, discards a KV cache, wakes both in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from cumempool._pool.report import TransitionReport, format_bytes
from cumempool.allocator import CuMemAllocator
from cumempool.config import CuMemConfig
from cumempool.errors import UnavailableError
from cumempool.probe import probe

_WIDTH = 1024
_SEED = 20


def _choose_driver(wanted: str, console: Console) -> CuMemConfig:
    if wanted != "host":
        found = probe(driver="cuda")
        if not found.ok and wanted == "cuda":
            raise UnavailableError(
                f"{found.reason}. {found.hint}", operation="demo", advice=found.hint
            )
        if not found.ok:
            console.print(
                "Driver: host. NO GPU IS USED: memory is host memory, tensors are on the CPU.",
                style="bold yellow",
            )
            hint = found.hint.rstrip(".")
            console.print(f"  why not cuda: {found.reason}. To change that: {hint}.")
        wanted = "cuda" if found.ok else "host"
    else:
        console.print("Driver: host, as asked for. Memory is host memory, tensors are on the CPU.")
    if wanted == "cuda":
        name = torch.cuda.get_device_name()
        console.print(f"Driver: cuda. Memory is device memory of {name}.")
        return CuMemConfig(driver="cuda")
    return CuMemConfig(driver="host")


@dataclass
class _Model:
    """A small network with adopted weights, and a KV buffer for its output."""

    network: torch.nn.Module
    kv_cache: torch.Tensor
    sample: torch.Tensor

    def compute(self) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = self.network(self.sample)
        self.kv_cache[: output.numel()].copy_(output.flatten())
        return self.kv_cache[: output.numel()].clone()

    def addresses(self) -> list[int]:
        return [self.kv_cache.data_ptr(), *(p.data_ptr() for p in self.network.parameters())]


def _make_model(allocator: CuMemAllocator, size: int) -> _Model:
    device = torch.device("cpu" if allocator.config.driver == "host" else "cuda")
    torch.manual_seed(_SEED)
    layers = max(1, size // (_WIDTH * _WIDTH * 4))
    network = torch.nn.Sequential(
        *(torch.nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers))
    ).to(device)
    allocator.adopt(network, tag="weights")
    with allocator.use_memory_pool("kv_cache", on_sleep="discard", on_wake="zero"):
        # On a GPU an ordinary torch call is routed to the pool; CPU tensors need empty().
        count = max(size // 4, _WIDTH * 8)
        if device.type == "cuda":
            kv_cache = torch.zeros(count, device=device)
        else:
            kv_cache = allocator.empty(count).zero_()
    return _Model(network, kv_cache, torch.randn(8, _WIDTH, device=device))


def _memory_used(allocator: CuMemAllocator) -> int:
    """Returns bytes in use on the device; on a GPU its driver counts the whole device."""
    if allocator.config.driver == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free
    return allocator.stats().physical_bytes


def _print_table(console: Console, *reports: TransitionReport) -> None:
    table = Table("transition", "tag", "device memory", "copied", "ms", "GB/s")
    for report in reports:
        for tag in report.tags.values():
            table.add_row(
                report.operation,
                tag.tag,
                format_bytes(tag.bytes_freed or tag.bytes_mapped),
                format_bytes(tag.bytes_copied) if tag.bytes_copied else "-",
                f"{tag.seconds * 1e3:.2f}",
                f"{tag.gb_per_s:.1f}" if tag.bytes_copied else "-",
            )
        table.add_row(report.operation, "total", "", "", f"{report.seconds * 1e3:.2f}", "")
        table.add_section()
    console.print(table)


def run_demo(driver: str, size: int, console: Console | None = None) -> bool:
    """Runs the demonstration and prints its results.

    Returns:
        Whether results and addresses were the same after the wake.
    """
    console = console or Console()
    allocator = CuMemAllocator(_choose_driver(driver, console))
    try:
        return _demonstrate(allocator, size, console)
    finally:
        allocator.close(force=True)


def _demonstrate(allocator: CuMemAllocator, size: int, console: Console) -> bool:
    model = _make_model(allocator, size)
    before = model.compute()
    addresses = model.addresses()
    used_awake = _memory_used(allocator)
    slept = allocator.sleep(offload_tags=("weights",))
    used_asleep = _memory_used(allocator)
    woken = allocator.wake_up()
    after = model.compute()

    _print_table(console, slept, woken)
    console.print(
        f"Device memory in use: {format_bytes(used_awake)} awake, {format_bytes(used_asleep)} "
        f"asleep: {format_bytes(used_awake - used_asleep)} given back."
    )
    equal = torch.equal(before, after)
    same = addresses == model.addresses()
    console.print(f"Results after waking: {'bit-equal' if equal else 'DIFFERENT'}.")
    console.print(f"Addresses of {len(addresses)} tensors: {'unchanged' if same else 'CHANGED'}.")
    return equal and same and used_asleep < used_awake
