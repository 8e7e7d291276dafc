"""What the benchmark makes of the findings of several processes, and of its bars."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a module of the benchmark by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_findings_of_one_process_stay_what_they_are(load: Load) -> None:
    found = {"malloc_us": {"median": 2.0, "samples": [1.0, 2.0, 9.0]}, "bytes": 5}
    assert load("bench").merged([found]) == found


def test_findings_of_several_processes_are_the_medians_of_theirs(load: Load) -> None:
    def process(median: float, ratio: float) -> dict[str, Any]:
        return {
            "malloc_us": {"median": median, "samples": [0.0, median, 100.0]},
            "sizes": [{"bytes": 2 << 20, "ratio": ratio}, {"bytes": 20 << 20, "ratio": 1.0}],
            "benchmark": "malloc_path",
            "contents_equal": True,
        }

    merged = load("bench").merged([process(4.0, 1.5), process(1.0, 1.25), process(2.0, 1.0)])
    assert merged == {
        "malloc_us": {"median": 2.0, "samples": [4.0, 1.0, 2.0]},
        "sizes": [{"bytes": 2 << 20, "ratio": 1.25}, {"bytes": 20 << 20, "ratio": 1.0}],
        "benchmark": "malloc_path",
        "contents_equal": True,
    }
    assert isinstance(load("bench").merged([{"bytes": 1}] * 2)["bytes"], int)


def test_processes_that_found_different_things_are_not_merged(load: Load) -> None:
    with pytest.raises(ValueError, match="argument 2"):
        load("bench").merged([[1.0], [1.0, 2.0]])
    with pytest.raises(KeyError):
        load("bench").merged([{"a": 1.0}, {"b": 1.0}])


@pytest.mark.parametrize(("tms", "value", "met"), [(60.0, 1.2, True), (45.0, 0.9, False)])
def test_a_segment_is_held_against_the_better_peer(
    load: Load, tms: float, value: float, met: bool
) -> None:
    def found(median: float) -> dict[str, Any]:
        return {"malloc_512_mib_us": {"median": median, "samples": [median]}}

    results = {"cumempool": found(50.0), "vllm": found(200.0), "tms": found(tms)}
    record = {"parts": {"malloc": {"results": results}}}
    bars = {bar["name"]: bar for bar in load("bars").results(record)}
    ours = bars["segment of 512 MiB through torch, times faster than the better peer"]
    assert (ours["value"], ours["met"]) == (pytest.approx(value), met)
    other = bars["segment of 20 MiB through torch, times faster than the better peer"]
    assert (other["value"], other["met"]) == (None, None)
