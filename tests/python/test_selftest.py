"""`cumempool selftest`: all promises hold on the host driver, and a broken one is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from simulated_cuda import SimulatedCuda

from cumempool import CuMemAllocator, CuMemConfig
from cumempool.tools import selftest
from cumempool.tools.cli import main
from cumempool.tools.selftest import run_selftest

pytestmark = pytest.mark.extensive

CONFIG = CuMemConfig(driver="host")


def test_every_promise_holds_on_the_host_driver() -> None:
    result = CliRunner().invoke(main, ["selftest", "--driver", "host", "--json"])
    record = json.loads(result.output)
    assert result.exit_code == 0, record
    assert record["passed"]
    by_status: dict[str, list[str]] = {}
    for check in record["checks"]:
        by_status.setdefault(check["status"], []).append(check["rule"])
    assert len(by_status["PASS"]) >= 15
    assert "FAIL" not in by_status
    assert all(check["reason"] for check in record["checks"] if check["status"] == "SKIP")


def test_a_wake_that_restores_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wake_up = CuMemAllocator.wake_up

    def forget(self: CuMemAllocator, *arguments: object, **options: object) -> object:
        for info in self.snapshot():
            if info.state == "backed_up":
                self.discard(info.tag)
        return wake_up(self, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(CuMemAllocator, "wake_up", forget)
    failed = [one for one in run_selftest(CONFIG, matching="R2") if one.status == "FAIL"]
    assert [one.rule for one in failed] == ["R2"]
    assert "has changed" in failed[0].reason


def test_memory_that_is_not_given_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    def keep(allocator: CuMemAllocator) -> None:
        """Keeps its memory."""
        kept.append(allocator.empty(8, tag="data"))

    monkeypatch.setattr(selftest, "_checks", [("R10", "keeps its memory", keep)])
    (outcome,) = run_selftest(CONFIG)
    assert outcome.status == "FAIL"
    assert "InUseError" in outcome.reason
    kept.clear()


def test_some_checks_can_be_chosen_and_none_is_a_failure() -> None:
    chosen = CliRunner().invoke(main, ["selftest", "--driver", "host", "-k", "r13"])
    assert chosen.exit_code == 0
    assert "1 PASS" in chosen.output
    nothing = CliRunner().invoke(main, ["selftest", "--driver", "host", "-k", "no such check"])
    assert nothing.exit_code == 1


def test_a_failure_is_printed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(allocator: CuMemAllocator) -> None:
        allocator.wake_up("nobody")

    monkeypatch.setattr(selftest, "_checks", [("R12", "names a tag", fail)])
    result = CliRunner().invoke(main, ["selftest", "--driver", "host"])
    assert result.exit_code == 1
    assert "UnknownTagError" in result.output
    assert "1 FAIL" in result.output


def test_a_driver_that_is_not_there_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    result = CliRunner().invoke(main, ["selftest"])
    assert result.exit_code == 1
    assert "libcuda" in result.output


# ---- on cuda, which is simulated


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    cuda = SimulatedCuda(monkeypatch, mib=512)
    with cuda.tensors(monkeypatch):
        yield cuda


def test_every_promise_about_torch_holds_on_cuda(cuda: SimulatedCuda) -> None:
    outcomes = list(run_selftest(CuMemConfig(driver="cuda")))
    assert [one for one in outcomes if one.status == "FAIL"] == []
    (skipped,) = [one for one in outcomes if one.status == "SKIP"]
    assert skipped.reason == "fills the device: tried on the host driver only"


def route_nothing(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "tensor", lambda like: like)


def free_nothing(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def replay_nothing(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)


@pytest.mark.parametrize(
    ("fault", "check", "reason"),
    [
        (route_nothing, "in a scope", "NotInPoolError"),
        (free_nothing, "in a scope", "memory of a dead tensor is stranded"),
        (replay_nothing, "CUDA graph", "the graph wrote elsewhere"),
    ],
)
def test_a_torch_that_breaks_a_promise_is_found(
    cuda: SimulatedCuda,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[SimulatedCuda, pytest.MonkeyPatch], None],
    check: str,
    reason: str,
) -> None:
    fault(cuda, monkeypatch)
    (outcome,) = run_selftest(CuMemConfig(driver="cuda"), matching=check)
    assert outcome.status == "FAIL"
    assert reason in outcome.reason


def test_what_the_settings_switch_off_is_skipped_with_its_reason() -> None:
    config = CuMemConfig(driver="host", retain_backups=False)
    (outcome,) = run_selftest(config, matching="R9")
    assert (outcome.status, outcome.reason) == ("SKIP", "retain_backups is off")
