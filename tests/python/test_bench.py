"""`cumempool bench`: every row has figures that go together, and wrong contents are found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from refusals import refuses
from simulated_cuda import SimulatedCuda

from cumempool import CuMemAllocator, CuMemConfig, InternalError
from cumempool.tools import bench
from cumempool.tools.bench import run_bench
from cumempool.tools.cli import main

CONFIG = CuMemConfig(driver="host")
SIZE = 8 * 1024**2


def test_every_row_has_figures_that_go_together() -> None:
    result = CliRunner().invoke(
        main, ["bench", "--driver", "host", "--gib", "0.01", "--rounds", "2", "--json"]
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert len(rows) == 6
    size = int(0.01 * 1024**3)
    for row in rows.values():
        assert row["gb_per_s"] == pytest.approx(size / row["seconds"] / 1e9)
    wake, plain = rows["wake"], rows["plain copy to the device"]
    assert wake["link"] == pytest.approx(wake["gb_per_s"] / plain["gb_per_s"])
    assert plain["link"] is None


def test_it_is_a_table_for_people() -> None:
    result = CliRunner().invoke(
        main, ["bench", "--driver", "host", "--gib", "0.01", "--rounds", "1"]
    )
    assert "sleep, nothing changed" in result.output


def test_contents_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    read = CuMemAllocator.read_backup

    def flip(self: CuMemAllocator, tensor: torch.Tensor) -> torch.Tensor:
        return read(self, tensor) + 1

    monkeypatch.setattr(CuMemAllocator, "read_backup", flip)
    with refuses(InternalError, names="piece 0"):
        run_bench(CONFIG, SIZE, rounds=1)


def test_a_driver_that_is_missing_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = CliRunner().invoke(main, ["bench"])
    assert result.exit_code == 1
    assert "libcuda" in result.output


def test_on_a_gpu_each_measurement_begins_and_ends_with_an_idle_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimulatedCuda(monkeypatch)
    steps: list[str] = []
    for name in ("sleep", "wake_up"):
        transition = getattr(CuMemAllocator, name)

        def noted(*arguments: object, transition: Any = transition, **named: object) -> object:
            steps.append("transition")
            return transition(*arguments, **named)

        monkeypatch.setattr(CuMemAllocator, name, noted)
    monkeypatch.setattr(bench, "_SETTLE", 0.0)
    with cuda.tensors(monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: steps.append("idle"))
        rows = run_bench(CuMemConfig(driver="cuda"), SIZE, rounds=1)
    assert len(rows) == 6
    copies = ["idle", "idle"] * 4  # each direction once unmeasured
    assert steps == copies + ["idle", "transition", "idle"] * 5
