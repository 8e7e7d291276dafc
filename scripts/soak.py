#!/usr/bin/env python3
"""Sleeps and wakes a thousand times over: are all contents right each time, and does nothing grow?

    scripts/soak.py --output benchmarks/results/soak.json   # 2000 cycles: a GPU used by no other
    scripts/soak.py --driver host --cycles 40 --small       # a dry run without one

On one H200, 2000 cycles should take at most four minutes; --time-limit ends a slower run as a
failure.

Each cycle changes contents on several streams, replays a CUDA graph, takes tags of several tiers
through some kind of transition while threads allocate and free, and compares a digest of every
tensor with the expected one. Every few cycles, with all awake and all caches empty, it reads used
device memory, the memory of the process and its open files. Fails if contents differ, if one of
these figures grows, or if anything is left after the end.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cumempool import CuMemAllocator, CuMemConfig, CumempoolError

MIB = 1 << 20
WORD = 8  # bytes of an element
SIZES = (3 * MIB, 20 * MIB, 48 * MIB, 65 * MIB + 4096)  # the last is larger than a pinned block
SMALL_SIZES = (64 * 1024, 2 * MIB + 4096, 3 * MIB)
HOST_DEVICE_BYTES = 4 << 30
FIRST_SAMPLES_LEFT_OUT = 0.1  # of all: caches of kernels, of threads, of malloc fill up
LEAST_SAMPLES = 5  # fewer say nothing about growth
SIGNIFICANT = 3.0  # standard errors
#: Growth over the whole run that counts as noise: less than one granule, and an interpreter's own.
NOISE = {"used_bytes": MIB, "rss_bytes": 4 * MIB, "open_files": 0.5}


class SoakError(Exception):
    """A failure that the soak has found."""


@dataclass(frozen=True)
class Settings:
    """The settings of the command line."""

    driver: str
    cycles: int
    small: bool
    sample_every: int
    threads: int
    seed: int
    directory: str | None
    time_limit: float | None
    output: Path | None


# ---- contents whose digest is known without reading them -----------------------------------------


def wrapped(value: int) -> int:
    """Returns a Python number wrapped to 64 bits, as a device computes it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


@dataclass
class Patterns:
    """Patterns for contents, outside the pool. Digest: the sum of (2 i + 1) word[i]."""

    base: torch.Tensor
    weights: torch.Tensor
    base_digests: dict[int, int]

    @classmethod
    def make(cls, counts: Sequence[int], device: torch.device, seed: int) -> Patterns:
        generator = torch.Generator().manual_seed(seed)
        limits = torch.iinfo(torch.int64)
        base = torch.randint(limits.min, limits.max, (max(counts),), generator=generator)
        weights = torch.arange(max(counts)) * 2 + 1
        digests = {n: int((base[:n] * weights[:n]).sum()) for n in counts}
        return cls(base.to(device), weights.to(device), digests)

    def digest(self, data: torch.Tensor) -> torch.Tensor:
        return (data * self.weights[: data.numel()]).sum()


@dataclass
class Item:
    """One tensor of the pool, its address, and its expected digest."""

    tag: str
    data: torch.Tensor
    address: int
    expected: int = 0

    def write(self, patterns: Patterns, factor: int, shift: int) -> None:
        count = self.data.numel()
        torch.mul(patterns.base[:count], factor, out=self.data)
        self.data.add_(shift)
        self.expected = wrapped(factor * patterns.base_digests[count] + shift * count**2)

    def add(self, first: int, last: int, amount: int) -> None:
        self.data[first:last].add_(amount)
        self.added(first, last, amount)

    def added(self, first: int, last: int, amount: int) -> None:
        self.expected = wrapped(self.expected + amount * (last**2 - first**2))

    def check(self, digest: int, cycle: int) -> None:
        if self.data.data_ptr() != self.address:
            raise SoakError(f"cycle {cycle}: a tensor of {self.tag!r} has moved")
        if digest != self.expected:
            raise SoakError(
                f"cycle {cycle}: {self.data.numel() * WORD} bytes of {self.tag!r} have the digest "
                f"{digest} instead of {self.expected}"
            )


# ---- the pool and the work on it -----------------------------------------------------------------


@dataclass
class Pool:
    """Tags of several tiers, with the tensors of each, and the streams that work on them."""

    allocator: CuMemAllocator
    patterns: Patterns
    streams: list[torch.cuda.Stream]
    choose: random.Random
    items: dict[str, list[Item]] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return bool(self.streams)

    def add_tag(self, tag: str, sizes: Sequence[int], **policies: Any) -> None:
        with self.allocator.use_memory_pool(tag, **policies):
            tensors = [self._tensor(size // WORD, i % 2 == 0) for i, size in enumerate(sizes)]
        self.items[tag] = [Item(tag, tensor, tensor.data_ptr()) for tensor in tensors]
        for item in self.items[tag]:
            item.write(self.patterns, 1, 0)

    def _tensor(self, count: int, routed: bool) -> torch.Tensor:
        if routed and self.on_cuda:
            return torch.empty(count, dtype=torch.int64, device="cuda")
        return self.allocator.empty(count, dtype=torch.int64)

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def on_some_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self.choose.choice(self.streams)) if self.on_cuda else _nothing()

    def change(self, item: Item) -> None:
        """Changes all of it, or a part, on some stream, and does not wait for that."""
        count = item.data.numel()
        with self.on_some_stream():
            if self.choose.random() < 0.5:
                factor = self.choose.randrange(1, 1 << 31, 2)
                item.write(self.patterns, factor, self.choose.randrange(1 << 31))
            else:
                first = self.choose.randrange(count)
                item.add(first, min(count, first + count // 8 + 1), self.choose.randrange(1 << 31))

    def check(self, tags: Sequence[str], cycle: int) -> int:
        """Compares the tensors of tags on several streams at once; returns their number."""
        items = [item for tag in tags for item in self.items[tag]]
        digests = []
        for item in items:
            with self.on_some_stream():
                digests.append(self.patterns.digest(item.data))
        self.synchronize()
        for item, digest in zip(items, digests, strict=True):
            item.check(int(digest), cycle)
        return len(items)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


class Graph:
    """A captured graph that counts in one tensor of the pool and takes the digest of another."""

    def __init__(self, pool: Pool, counter: Item, read: Item) -> None:
        self._counter, self._read, self._pool = counter, read, pool
        self._seen = torch.zeros((), dtype=torch.int64, device="cuda")
        pool.patterns.digest(read.data)  # loads kernels, which a capture cannot do
        pool.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            counter.data.add_(1)
            self._seen.copy_(pool.patterns.digest(read.data))

    def replay(self) -> None:
        """Starts a replay, which is still in flight when it returns."""
        self._graph.replay()
        self._counter.added(0, self._counter.data.numel(), 1)

    def check(self, cycle: int) -> None:
        self.replay()
        self._pool.synchronize()
        self._read.check(int(self._seen), cycle)


def make_pool(settings: Settings) -> Pool:
    on_cuda = settings.driver == "cuda"
    extra = {} if on_cuda else {"host_driver_bytes": HOST_DEVICE_BYTES}
    allocator = CuMemAllocator(CuMemConfig(driver=settings.driver, **extra))
    sizes = SMALL_SIZES if settings.small else SIZES
    device = torch.device("cuda" if on_cuda else "cpu")
    streams = [torch.cuda.Stream() for _ in range(4)] if on_cuda else []
    patterns = Patterns.make([size // WORD for size in sizes], device, settings.seed)
    pool = Pool(allocator, patterns, streams, random.Random(settings.seed))
    pool.add_tag("pinned", sizes, on_sleep="offload", backup="pinned")
    pool.add_tag("pageable", sizes, on_sleep="offload", backup="pageable")
    pool.add_tag("other", sizes, on_sleep="offload", backup="pinned")
    pool.add_tag("counter", sizes[:1], on_sleep="offload", backup="pinned")
    pool.add_tag("discarded", sizes, on_sleep="discard", on_wake="zero")
    if settings.directory is not None:
        backup = f"file:{settings.directory}"
        pool.add_tag("file", sizes[:2], on_sleep="offload", backup=backup)
    pool.synchronize()
    return pool


# ---- kinds of cycles -----------------------------------------------------------------------------


def sleep_and_wake(pool: Pool, tags: list[str]) -> None:
    pool.allocator.sleep(tags=tags)
    pool.allocator.wake_up(tags)


def wake_asynchronously(pool: Pool, tags: list[str], cycle: int) -> None:
    """Wakes tags in the background, and uses one tensor after `wait`, before the wake has ended."""
    early = pool.choose.choice(pool.items[pool.choose.choice(tags)])
    pool.allocator.sleep(tags=tags)
    _forget_discarded(pool, tags)
    with pool.allocator.wake_up(tags, blocking=False, first=[early.data]) as handle:
        handle.wait(early.data)
        early.check(int(pool.patterns.digest(early.data)), cycle)


def swap_twice(pool: Pool) -> None:
    """Swaps two sets of tags, and back."""
    pool.allocator.sleep(tags=["other"])
    pool.allocator.swap(sleep=["pinned", "pageable"], wake=["other"])
    pool.allocator.swap(sleep=["other"], wake=["pinned", "pageable"])
    pool.allocator.wake_up(["other"])


def _forget_discarded(pool: Pool, tags: Sequence[str]) -> None:
    if "discarded" in tags:
        for item in pool.items["discarded"]:
            item.expected = 0  # on_wake="zero"


def transition(pool: Pool, kind: str, cycle: int) -> list[str]:
    """Runs a cycle of one kind; returns the tags that have slept."""
    tags = list(pool.items)
    if kind == "swap":
        swap_twice(pool)
        return ["other", "pinned", "pageable"]
    if kind == "discard":
        tags = ["discarded"]
        pool.allocator.discard(tags)
        pool.allocator.wake_up(tags)
    elif kind == "asynchronous":
        wake_asynchronously(pool, tags, cycle)
    else:
        if kind == "some":
            tags = pool.choose.sample(tags, pool.choose.randint(1, len(tags) - 1))
        sleep_and_wake(pool, tags)
    _forget_discarded(pool, tags)
    return tags


KINDS = ("all", "some", "asynchronous", "swap", "discard", "all", "asynchronous")


def change_some(pool: Pool) -> None:
    """Changes no tensor, a few or all, for sleeps that are clean, partly clean or dirty."""
    share = pool.choose.choice((0.0, 0.25, 1.0))
    for tag, items in pool.items.items():
        for item in items:
            if tag != "counter" and pool.choose.random() < share:
                pool.change(item)


def run_cycle(pool: Pool, graph: Graph | None, cycle: int) -> int:
    change_some(pool)
    if graph is not None:
        graph.replay()
    slept = transition(pool, KINDS[cycle % len(KINDS)], cycle)
    checked = pool.check(slept, cycle)  # at once, on any stream
    checked += pool.check([tag for tag in pool.items if tag not in slept], cycle)
    if graph is not None:
        graph.check(cycle)
    return checked


# ---- threads that allocate and free --------------------------------------------------------------


class Churn:
    """Threads that allocate, fill, check and free, under tags that do not sleep."""

    def __init__(self, pool: Pool, threads: int) -> None:
        self._pool = pool
        self._locks = [threading.Lock() for _ in range(threads)]
        self._stop = threading.Event()
        self._executor = ThreadPoolExecutor(max(1, threads))
        self._futures: list[Future[int]] = [
            self._executor.submit(self._run, number) for number in range(threads)
        ]

    def _run(self, number: int) -> int:
        stream = torch.cuda.Stream() if self._pool.on_cuda else None
        rounds = 0
        while not self._stop.wait(0.01):
            with self._locks[number], torch.cuda.stream(stream) if stream else _nothing():
                self._allocate(f"churn {number}", rounds)
            rounds += 1
        return rounds

    def _allocate(self, tag: str, rounds: int) -> None:
        count = (1 + rounds % 7) * 50_000
        made = [self._pool.allocator.empty(count, dtype=torch.int64, tag=tag).fill_(3)]
        if self._pool.on_cuda and rounds % 4 == 0:  # the end of a scope empties torch's cache
            with self._pool.allocator.use_memory_pool(tag):
                made.append(torch.full((count,), 3, device="cuda"))
        if any(int(tensor.sum()) != 3 * count for tensor in made):
            raise SoakError(f"{tag}: contents of fresh memory differ in round {rounds}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            yield

    def check(self) -> None:
        """Raises the error of a thread that has failed."""
        for future in self._futures:
            if future.done():
                future.result()

    def end(self) -> int:
        """Ends the threads; returns the number of their rounds."""
        self._stop.set()
        self._executor.shutdown()
        return sum(future.result() for future in self._futures)


# ---- what must not grow --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Memory and files in use while all is awake, without backups and caches."""

    cycle: int
    used_bytes: int
    rss_bytes: int
    open_files: int


def take_sample(pool: Pool, cycle: int) -> Sample:
    pool.synchronize()
    pool.allocator.release_host_memory()
    gc.collect()
    if pool.on_cuda:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        used = total - free
    else:
        used = pool.allocator.stats().physical_bytes
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(cycle, used, pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd")))


@dataclass(frozen=True)
class Slope:
    """Growth per 1000 cycles by least squares, its standard error, and whether that is a leak."""

    name: str
    per_1000: float
    error: float
    growth: float
    leak: bool

    def __str__(self) -> str:
        verdict = "GROWS" if self.leak else "flat"
        slope = f"{self.per_1000:+.1f} +- {self.error:.1f} per 1000 cycles"
        growth = f"grown by {self.growth:.1f}, of which {NOISE[self.name]} may be noise"
        return f"{self.name}: {slope}, {verdict} ({growth})"


def slope_of(samples: Sequence[Sample], name: str) -> Slope:
    kept = samples[math.ceil(len(samples) * FIRST_SAMPLES_LEFT_OUT) :]
    cycles = [float(sample.cycle) for sample in kept]
    values = [float(getattr(sample, name)) for sample in kept]
    line = statistics.linear_regression(cycles, values)
    rest = sum(
        (y - line.intercept - line.slope * x) ** 2 for x, y in zip(cycles, values, strict=True)
    )
    spread = statistics.variance(cycles) * (len(kept) - 1)
    error = math.sqrt(rest / (len(kept) - 2) / spread)
    growth = line.slope * (cycles[-1] - cycles[0])
    leak = line.slope > SIGNIFICANT * error and growth > NOISE[name]
    return Slope(name, line.slope * 1000, error * 1000, growth, leak)


def left_behind(pool: Pool) -> list[str]:
    """Closes the allocator; returns what it still counts then."""
    pool.synchronize()
    pool.items.clear()
    gc.collect()
    if pool.on_cuda:
        torch.cuda.empty_cache()
    try:
        pool.allocator.close()
    except CumempoolError as error:
        pool.allocator.close(force=True)
        return [f"close: {error}"]
    held = pool.allocator.stats().to_dict()
    names = ("reserved_address_bytes", "physical_bytes", "mapped_bytes", "pending_free_bytes")
    names += ("host_bytes", "pageable_bytes", "file_bytes", "staging_bytes")
    return [f"{held[name]} {name} are left after close" for name in names if held[name]]


# ---- the run and its record ----------------------------------------------------------------------


@dataclass
class Soak:
    """One run, with its counts and failures so far."""

    settings: Settings
    samples: list[Sample] = field(default_factory=list)
    cycles: int = 0
    digests: int = 0
    rounds: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        start = time.monotonic()
        pool = make_pool(self.settings)
        try:
            self._cycles(pool, lambda: time.monotonic() - start)
        except (SoakError, CumempoolError) as error:
            self.failures.append(str(error))
        self.seconds = time.monotonic() - start
        self.failures += left_behind(pool)
        if self.cycles < self.settings.cycles and not self.failures:
            self.failures.append(f"the time was up after {self.cycles} cycles")
        self.failures += [str(slope) for slope in self.slopes() if slope.leak]

    def _cycles(self, pool: Pool, elapsed: Callable[[], float]) -> None:
        graph = None
        if pool.on_cuda:
            graph = Graph(pool, pool.items["counter"][0], pool.items["pinned"][0])
        churn = Churn(pool, self.settings.threads)
        try:
            limit = math.inf if self.settings.time_limit is None else self.settings.time_limit
            while self.cycles < self.settings.cycles and elapsed() < limit:
                self.digests += run_cycle(pool, graph, self.cycles)
                self.cycles += 1
                churn.check()
                if self.cycles % self.settings.sample_every == 0:
                    with churn.paused():
                        self.samples.append(take_sample(pool, self.cycles))
                if self.cycles % 100 == 0:
                    print(f"{self.cycles} cycles in {elapsed():.0f} s", flush=True)
        finally:
            self.rounds = churn.end()

    def slopes(self) -> list[Slope]:
        if len(self.samples) < LEAST_SAMPLES:
            return []  # the run has failed
        return [slope_of(self.samples, name) for name in NOISE]

    def to_dict(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        del settings["output"]
        return {
            **describe(self.settings.driver),
            "settings": settings,
            "cycles": self.cycles,
            "digests": self.digests,
            "rounds_of_threads": self.rounds,
            "seconds": round(self.seconds, 1),
            "slopes": [asdict(slope) for slope in self.slopes()],
            "failures": self.failures,
            "samples": [asdict(sample) for sample in self.samples],
        }


def describe(driver: str) -> dict[str, str]:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    commit = os.environ.get("CUMEMPOOL_COMMIT")
    if commit is None:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or "unknown"
    device = torch.cuda.get_device_name() if driver == "cuda" else "simulated"
    return {"commit": commit, "device": device, "torch": torch.__version__}


def parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--small", action="store_true", help="small tensors")
    parser.add_argument("--sample-every", type=int, help="cycles; default: 100 samples, at most 20")
    parser.add_argument("--threads", type=int, default=2, help="threads that allocate and free")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", help="also back up a tag in a file there")
    parser.add_argument("--time-limit", type=float, help="seconds")
    parser.add_argument("--output", type=Path, help="a JSON record")
    given = vars(parser.parse_args(arguments))
    if given["sample_every"] is None:
        given["sample_every"] = min(20, max(1, given["cycles"] // 20))
    if min(given["sample_every"], given["cycles"] // LEAST_SAMPLES // given["sample_every"]) < 1:
        parser.error(f"{LEAST_SAMPLES} samples are the least: more --cycles, or more often")
    return Settings(**given)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse(arguments)
    soak = Soak(settings)
    soak.run()
    print(
        f"{soak.cycles} cycles in {soak.seconds:.0f} s, {soak.digests} digests, "
        f"{soak.rounds} rounds of threads"
    )
    for slope in soak.slopes():
        print(slope)
    for failure in soak.failures:
        print(f"FAILED: {failure}")
    if settings.output is not None:
        settings.output.write_text(json.dumps(soak.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
