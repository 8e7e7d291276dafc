"""Times and checks sleeps and wakes of one tag, and measures their peak device memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import host_memory
import torch
from bench import Bench, summary
from contenders import Contender
from workloads import total

Change = Callable[[Sequence[torch.Tensor]], None]


class Cycles:
    """Cycles of one tag of a contender, with a pause between every two transitions."""

    def __init__(
        self, bench: Bench, contender: Contender, tag: str, tensors: list[torch.Tensor]
    ) -> None:
        self._bench = bench
        self._contender = contender
        self._tag = tag
        self._tensors = tensors
        self.bytes = sum(tensor.nbytes for tensor in tensors)

    def first(self) -> dict[str, Any]:
        """Runs a sleep and a wake, and measures the host memory that the system lacks between."""
        before = host_memory.available_bytes()
        asleep: list[int | None] = []
        result = self.run(1, lambda _: None, lambda: asleep.append(host_memory.available_bytes()))
        if before is not None and asleep[0] is not None:
            result["host_memory_taken_per_byte"] = (before - asleep[0]) / self.bytes
        return result

    def run(
        self,
        count: int,
        change: Change,
        while_asleep: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Runs cycles with a change before each, and compares contents around the last one."""
        sleeps, wakes, expected, report = [], [], 0, None

        def sleep() -> None:
            nonlocal report
            report = self._contender.sleep(self._tag)

        for cycle in range(count):
            change(self._tensors)
            if cycle == count - 1:
                expected = total(self._tensors)
            self._bench.settle()
            sleeps.append(self._bench.timed(sleep))
            while_asleep()
            self._bench.settle()
            wakes.append(self._bench.timed(lambda: self._contender.wake(self._tag)))
        result: dict[str, Any] = {
            "sleep_s": summary(sleeps),
            "wake_s": summary(wakes),
            "contents_equal": total(self._tensors) == expected,
        }
        if report is not None:
            result["bytes_backed_up"] = report.bytes_backed_up
            result["bytes_clean"] = report.bytes_clean
            result["problems"] = list(report.problems)
        return result


class PeakDeviceBytes:
    """The most device memory in use while it is open; a thread samples it every millisecond."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def _watch(self) -> None:
        while not self._end.wait(0.001):
            self.peak = max(self.peak, self._contender.device_bytes())

    def __enter__(self) -> PeakDeviceBytes:
        self.peak = self._contender.device_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
