"""Measures sleep and wake on this machine, beside plain copies of the same bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import torch

from cumempool.allocator import CuMemAllocator
from cumempool.config import CuMemConfig
from cumempool.errors import InternalError

_PIECE: Final = 256 * 1024**2
_SETTLE: Final = 0.3  # seconds; a device clears memory given back, and a wake would wait for that


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of one operation on all bytes.

    Attributes:
        name: The operation.
        seconds: The median of the rounds.
        gb_per_s: All bytes, copied or not, over that time, in 1e9 bytes per second.
        link: Ratio of that rate to the plain copy in the same direction; None for plain copies.
    """

    name: str
    seconds: float
    gb_per_s: float
    link: float | None

    def to_dict(self) -> dict[str, object]:
        """Returns all fields as types that ``json.dumps`` takes."""
        return asdict(self)


def run_bench(config: CuMemConfig, size: int, rounds: int = 5) -> list[Measurement]:
    """Measures plain copies, and sleeps and wakes of changed and of unchanged memory."""
    allocator = CuMemAllocator(config)
    try:
        return _measure(allocator, size, rounds)
    finally:
        allocator.close(force=True)


def _measure(allocator: CuMemAllocator, size: int, rounds: int) -> list[Measurement]:
    pieces = [min(_PIECE, size)] * max(-(-size // _PIECE), 1)
    total = sum(pieces)
    out, back = _plain(allocator, pieces[0], rounds)
    tensors = [allocator.empty(piece, dtype=torch.uint8, tag="bench") for piece in pieces]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    first = _timed(allocator, lambda: allocator.sleep(tags="bench"))
    times: dict[str, list[float]] = {"changed": [], "wake": [], "unchanged": []}
    for round_ in range(rounds):
        times["wake"].append(_timed(allocator, allocator.wake_up))
        for tensor in tensors:
            tensor.add_(1)
        times["changed"].append(_timed(allocator, lambda: allocator.sleep(tags="bench")))
        times["wake"].append(_timed(allocator, allocator.wake_up))
        times["unchanged"].append(_timed(allocator, lambda: allocator.sleep(tags="bench")))
        _check(allocator, tensors, round_ + 1)
    del tensors

    def row(name: str, seconds: float, plain: float) -> Measurement:
        rate = total / seconds / 1e9
        return Measurement(name, seconds, rate, rate / plain)

    return [
        Measurement("plain copy to the host", total / out / 1e9, out, None),
        Measurement("plain copy to the device", total / back / 1e9, back, None),
        row("first sleep", first, out),
        row("sleep, all changed", statistics.median(times["changed"]), out),
        row("sleep, nothing changed", statistics.median(times["unchanged"]), out),
        row("wake", statistics.median(times["wake"]), back),
    ]


def _check(allocator: CuMemAllocator, tensors: list[torch.Tensor], added: int) -> None:
    for number, tensor in enumerate(tensors):
        view = allocator.read_backup(tensor)
        wanted = (number + added) % 256
        if int(view[0]) != wanted or int(view[-1]) != wanted:
            raise InternalError(f"piece {number} did not come back as it was", operation="bench")


def _timed(allocator: CuMemAllocator, operation: Callable[[], object]) -> float:
    _finish(allocator)
    time.sleep(_SETTLE if allocator.config.driver == "cuda" else 0.0)
    begin = time.perf_counter()
    operation()
    _finish(allocator)
    return time.perf_counter() - begin


def _finish(allocator: CuMemAllocator) -> None:
    if allocator.config.driver == "cuda":
        torch.cuda.synchronize()


def _plain(allocator: CuMemAllocator, size: int, rounds: int) -> tuple[float, float]:
    """Returns GB/s of copies between ordinary device and pinned host memory, both directions."""
    on_cuda = allocator.config.driver == "cuda"
    device = torch.zeros(size, dtype=torch.uint8, device="cuda" if on_cuda else "cpu")
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_cuda)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)

        _timed(allocator, copy)
        return size / statistics.median(_timed(allocator, copy) for _ in range(rounds)) / 1e9

    return rate(host, device), rate(device, host)
