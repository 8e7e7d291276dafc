"""Measures the rate of the link between host and device, to compare sleeps and wakes with."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from bench import GIB, MIB, Bench, summary

PIECE = 32 * MIB
ROUNDS = 5


class Link:
    """Copies between pinned memory and the device in pieces of 32 MiB, before and after a part."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._bytes = 4 * PIECE if bench.small else GIB
        self._host = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=bench.on_cuda)
        self._device = torch.empty(self._bytes, dtype=torch.uint8, device=bench.torch_device)
        self._samples: dict[str, list[float]] = {"to_host": [], "to_device": []}
        self._host.fill_(1)
        for source, target in self._directions().values():
            self._copy(source, target)  # warm-up

    def _directions(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {"to_host": (self._device, self._host), "to_device": (self._host, self._device)}

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for at in range(0, self._bytes, PIECE):
            target[at : at + PIECE].copy_(source[at : at + PIECE], non_blocking=True)

    def _rate(self, source: torch.Tensor, target: torch.Tensor) -> float:
        return self._bytes / self._bench.timed(lambda: self._copy(source, target)) / 1e9

    def measure(self) -> None:
        for name, (source, target) in self._directions().items():
            rates = [self._rate(source, target) for _ in range(ROUNDS)]
            self._samples[name] += rates

    def rates(self) -> dict[str, Any]:
        """Returns GB/s of each direction, over all measurements."""
        return {name: summary(samples) for name, samples in self._samples.items()}

    def floor(self, direction: str, size: int) -> float:
        """Returns the seconds that the link needs for `size` bytes."""
        return size / statistics.median(self._samples[direction]) / 1e9
