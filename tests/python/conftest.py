"""Allocators on the host driver whose every byte is counted again after the test (R13)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cumempool import (
    Backup,
    CuMemAllocator,
    CuMemConfig,
    OutOfSlotsError,
    Stats,
    TransitionReport,
    _core,
)
from cumempool.config import SETTINGS

MIB = 1 << 20
#: What an allocation of the host driver is a multiple of.
GRANULE = 2 * MIB

#: Fixtures that start other processes.
PROCESSES = frozenset({"importer", "run_python"})

MakeAllocator = Callable[..., CuMemAllocator]
RunPython = Callable[..., "Done"]


EVERY_DTYPE = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not str(value).startswith(("torch.q", "torch.bits"))
    },
    key=str,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start other processes are extensive."""
    for item in items:
        if PROCESSES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.extensive)


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def filled(alloc: CuMemAllocator, count: int, tag: str, seed: int = 0) -> torch.Tensor:
    tensor = alloc.empty(count, dtype=torch.uint8, tag=tag)
    tensor.copy_(random_bytes(count, seed))
    return tensor


def intact(tensors: list[torch.Tensor]) -> bool:
    """Whether each holds what `filled` has put there, with its place in the list as the seed."""
    return all(torch.equal(t, random_bytes(t.numel(), s)) for s, t in enumerate(tensors))


def states(alloc: CuMemAllocator) -> dict[str, str]:
    return {info.tag: info.state for info in alloc.snapshot()}


def totals(report: TransitionReport) -> dict[str, int]:
    return {
        name: value
        for name, value in report.to_dict().items()
        if name.startswith("bytes_") and isinstance(value, int) and value
    }


def pins(alloc: CuMemAllocator, tag: str = "kv") -> int:
    return alloc.stats().tags[tag].pins


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def until(done: Callable[[], bool]) -> None:
    """Waits for what another thread or process brings about."""
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def slots_left(alloc: CuMemAllocator) -> int:
    """How many slots are not bound at this moment."""
    alloc._core.declare_tag("many", 0, 0)
    bound: list[int] = []
    try:
        while len(bound) < _core.slot_count():
            bound.append(alloc._core.bind_slot("many"))
    except OutOfSlotsError:
        pass
    finally:
        for slot in bound:
            _core.unbind_slot(slot)
    return len(bound)


def quantized() -> torch.Tensor:
    """A tensor whose scale lies outside of its storage; torch is about to give them up."""
    if not hasattr(torch, "quantize_per_tensor"):
        pytest.skip("this torch has no quantized tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.quint8)


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(setting.env, raising=False)


@pytest.fixture(autouse=True)
def no_shared_allocator_is_left() -> Iterator[None]:
    assert CuMemAllocator._instance is None
    yield
    left, CuMemAllocator._instance = CuMemAllocator._instance, None
    if left is not None:
        left.close(force=True)
    assert left is None, "the test left the shared allocator open"


def assert_nothing_is_held(stats: Stats) -> None:
    held = {
        "reserved": stats.reserved_address_bytes,
        "physical": stats.physical_bytes,
        "mapped": stats.mapped_bytes,
        "pending": stats.pending_free_bytes,
        "host": stats.host_bytes,
        "host used": stats.host_used_bytes,
        "pageable": stats.pageable_bytes,
        "files": stats.file_bytes,
        "peers": stats.peer_bytes,
        "staging": stats.staging_bytes,
        "awake": stats.awake_bytes,
        "asleep": stats.asleep_bytes,
    }
    assert held == dict.fromkeys(held, 0)


@pytest.fixture
def make_allocator() -> Iterator[MakeAllocator]:
    """Makes allocators; after the test each is closed without force and must hold nothing."""
    made: list[CuMemAllocator] = []

    def make(
        *,
        mib: int = 256,
        devices: int = 1,
        limit: int | None = None,
        overflow: Backup | None = None,
        retain: bool = True,
        **settings: Any,
    ) -> CuMemAllocator:
        config = CuMemConfig(
            driver="host",
            host_driver_bytes=mib * MIB,
            host_driver_devices=devices,
            host_backup_limit=limit,
            host_backup_overflow=overflow,
            retain_backups=retain,
            **settings,
        )
        made.append(CuMemAllocator(config))
        return made[-1]

    yield make
    if any(allocator.stats().reserved_address_bytes for allocator in made):
        gc.collect()  # tensors in the cycles that a caught exception makes
    for allocator in made:
        allocator.close()
        assert_nothing_is_held(allocator.stats())


@pytest.fixture
def alloc(make_allocator: MakeAllocator) -> CuMemAllocator:
    """An allocator on one simulated device of 256 MiB."""
    return make_allocator()


@dataclass(frozen=True)
class Done:
    """What an interpreter of its own left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def uncounted() -> dict[str, str]:
    """The environment without coverage, which deadlocks with signal handlers and needs memory."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


@pytest.fixture
def run_python(monkeypatch: pytest.MonkeyPatch) -> RunPython:
    """Runs code in an interpreter of its own, on the host driver, warnings being errors."""
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "host")
    monkeypatch.setenv("CUMEMPOOL_HOST_DRIVER_BYTES", "256MiB")

    def run(code: str, *arguments: str) -> Done:
        command = [sys.executable, "-W", "error", *arguments]
        done = subprocess.run(
            command if not code else [*command, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=dict(os.environ),
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run
