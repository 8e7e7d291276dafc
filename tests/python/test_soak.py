"""A short soak on the host driver, and that a soak finds what it looks for (R13)."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.extensive

ROOT = Path(__file__).resolve().parents[2]
SOAK = ROOT / "scripts" / "soak.py"
SHORT = ("--driver", "host", "--small", "--cycles", "15", "--sample-every", "2")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def samples(soak: ModuleType, grown: Callable[[int], int], count: int = 100) -> list[object]:
    return [soak.Sample(20 * i, 1 << 30, (1 << 28) + grown(i), 30) for i in range(count)]


def test_a_short_soak_finds_nothing(
    soak: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "soak.json"
    assert soak.main([*SHORT, "--directory", str(tmp_path), "--output", str(record)]) == 0
    read = json.loads(record.read_text())
    assert (read["cycles"], read["failures"]) == (15, [])
    assert read["digests"] > 15 * 10
    assert read["rounds_of_threads"] > 0
    assert len(read["samples"]) == 7
    assert {slope["name"] for slope in read["slopes"]} == set(soak.NOISE)
    assert "open_files: +0.0 +- 0.0 per 1000 cycles, flat" in capsys.readouterr().out


def test_a_byte_that_changes_unnoticed_ends_it(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = soak.transition

    def altering(pool: object, kind: str, cycle: int) -> list[str]:
        slept: list[str] = real(pool, kind, cycle)
        if cycle == 9:
            pool.items["pinned"][1].data[77] ^= 1  # type: ignore[attr-defined]
        return slept

    monkeypatch.setattr(soak, "transition", altering)
    assert soak.main(SHORT) == 1
    assert "FAILED: cycle 9: " in capsys.readouterr().out


def test_memory_that_is_left_ends_it(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = []
    real = soak.make_pool

    def keeping(settings: object) -> object:
        pool = real(settings)
        kept.append(pool.allocator.empty(1 << 20, tag="kept"))
        return pool

    monkeypatch.setattr(soak, "make_pool", keeping)
    assert soak.main(SHORT) == 1
    assert "FAILED: close: " in capsys.readouterr().out


def test_the_time_that_is_up_is_a_failure(
    soak: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main([*SHORT, "--time-limit", "0"]) == 1
    assert "FAILED: the time was up after 0 cycles" in capsys.readouterr().out


def test_a_leak_stands_out_of_noise(soak: ModuleType) -> None:
    noisy = soak.slope_of(samples(soak, lambda i: (i * 7919) % 13 << 16), "rss_bytes")
    assert not noisy.leak
    leak = soak.slope_of(
        samples(soak, lambda i: ((i * 7919) % 13 << 16) + i * 100_000), "rss_bytes"
    )
    assert leak.leak
    assert leak.per_1000 == pytest.approx(5_000_000, rel=0.05)
    assert "GROWS" in str(leak)


def test_what_fills_up_at_first_is_no_leak(soak: ModuleType) -> None:
    filling = soak.slope_of(samples(soak, lambda i: min(i, 8) << 24), "rss_bytes")
    assert (filling.per_1000, filling.leak) == (0, False)


def test_too_few_samples_are_refused(soak: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for few in (["--cycles", "8", "--sample-every", "2"], ["--sample-every", "-1"]):
        with pytest.raises(SystemExit):
            soak.parse(few)
        assert "5 samples are the least" in capsys.readouterr().err
