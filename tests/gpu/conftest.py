"""Fixtures of the GPU tests; where CUMEMPOOL_REQUIRE_GPU=1, a test that would skip fails."""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable, Generator, Iterator

import pytest
import torch

import cumempool

Figure = Callable[[str, object], None]

# Taken out, so that programs which tests start are not warned of them: they are no settings.
REQUIRED = os.environ.pop("CUMEMPOOL_REQUIRE_GPU", None) == "1"
os.environ.pop("CUMEMPOOL_COMMIT", None)
GRANULE = 2 * 1024**2
CYCLES = 200_000_000  # 100 ms at 2 GHz


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} skipped although CUMEMPOOL_REQUIRE_GPU=1: {report.longrepr}"
        )
    return report


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The GPU of the tests, its context and kernels warm, so that used memory is steady."""
    found = cumempool.probe(driver="cuda")
    if not found.ok:
        pytest.skip(f"no usable GPU: {found.reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    warm = torch.ones(1024, device=device)
    (warm + 1).sum().item()
    torch.equal(warm, warm.clone())
    torch.cuda.synchronize()
    return device


@pytest.fixture
def allocator(gpu: torch.device) -> Iterator[cumempool.CuMemAllocator]:
    """An allocator that must give everything back when the test is over."""
    made = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
    yield made
    gc.collect()
    torch.cuda.empty_cache()
    made.close(force=True)
    gc.collect()
    torch.cuda.empty_cache()
    totals = made.stats()
    assert totals.physical_bytes == 0
    assert totals.mapped_bytes == 0
    assert totals.host_bytes == 0


@pytest.fixture(params=["idle", "100 ms queued"])
def load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test on an idle device, and with 100 ms of work queued before every transition."""
    if request.param == "idle":
        return
    stream = torch.cuda.Stream()

    def after_queueing(transition: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(transition)
        def call(*arguments: object, **options: object) -> object:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)
            return transition(*arguments, **options)

        return call

    for name in ("sleep", "discard", "wake_up", "swap", "close"):
        transition = getattr(cumempool.CuMemAllocator, name)
        monkeypatch.setattr(cumempool.CuMemAllocator, name, after_queueing(transition))


def settled(allocator: cumempool.CuMemAllocator) -> cumempool.Stats:
    """The statistics once memory that was freed is back, which takes a moment on an idle device."""
    end = time.monotonic() + 10
    while (stats := allocator.stats()).pending_free_bytes and time.monotonic() < end:
        time.sleep(0.001)
    assert stats.pending_free_bytes == 0
    return stats


@pytest.fixture
def used(gpu: torch.device) -> Callable[[], int]:
    """Device memory in use, as the driver counts it."""

    def read() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    return read


@pytest.fixture
def figure(record_property: Figure) -> Figure:
    """Notes a figure that was measured: it is printed, and kept in the record of the run."""

    def note(name: str, value: object) -> None:
        print(f"{name}: {value}")
        record_property(name, value)

    return note
