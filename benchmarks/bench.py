"""Gives every part of the benchmark its sizes, device, clock, and pauses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

KIB = 1024
MIB = 1024**2
GIB = 1024**3

#: Drivers scrub released memory (about 25 ms per 15 GiB), and a call that needs memory meanwhile
#: waits for that. Every contender pauses this long after every sleep and wake.
PAUSE_S = 0.3


@dataclass(frozen=True)
class Settings:
    """The settings of the command line.

    Attributes:
        driver: ``"cuda"``, or ``"host"`` for a dry run without a GPU.
        small: Tiny sizes and few cycles: shows that everything works, and measures nothing.
        directory: The directory of the file tier and of the direct I/O beside it.
        programs: The build folder with the C++ benchmarks, or None.
        peers: The folder to import peers from, or None.
        vllm_version: For the record, if the folder has vLLM's files without their metadata.
    """

    driver: str = "cuda"
    small: bool = False
    directory: str = "/tmp"
    programs: str | None = None
    peers: str | None = None
    vllm_version: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Returns a figure for the record: the median and its samples."""
    return {"median": statistics.median(samples), "samples": list(samples)}


def merged(results: Sequence[Any]) -> Any:
    """Merges the results of several processes: every number is the median of theirs.

    The samples of a figure are then the medians of the processes. A number that is the same in all
    is kept, so that bytes stay whole.
    """
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, dict) and first.keys() == {"median", "samples"}:
        return summary([result["median"] for result in results])
    if isinstance(first, dict):
        return {key: merged([result[key] for result in results]) for key in first}
    if isinstance(first, list):
        return [merged(items) for items in zip(*results, strict=True)]
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        return first if len(set(results)) == 1 else statistics.median(results)
    return first


def median(result: dict[str, Any], name: str) -> float | None:
    """Returns a figure of a result, or None if the part ended before it."""
    figure = result.get(name)
    return None if figure is None else float(figure["median"])


@dataclass
class Bench:
    """One process of the benchmark on one device."""

    settings: Settings
    torch_device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.torch_device = torch.device("cuda" if self.on_cuda else "cpu")

    @property
    def on_cuda(self) -> bool:
        return self.settings.driver == "cuda"

    @property
    def small(self) -> bool:
        return self.settings.small

    def cycles(self, count: int) -> int:
        return min(count, 2) if self.small else count

    def synchronize(self) -> None:
        """Waits for all work on the device."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object]) -> float:
        """Returns the seconds of a call, with the device idle before and after."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def settle(self) -> None:
        """Lets the driver finish with released memory."""
        self.synchronize()
        time.sleep(0.001 if self.small else PAUSE_S)
