"""NIXL between two processes and two GPUs: refusals, rates, and allocator settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Figure
from .transfers import NEEDS, VARIABLES, transfer

TIMEOUT = 280  # seconds

pytestmark = NEEDS


def test_a_raw_registration_makes_the_sleep_refuse_by_name(tmp_path: Path) -> None:
    found = transfer(tmp_path, TIMEOUT, "--cycles", "0", "--repeats", "1", "--no-compare")
    for refusal in found["refusals"]:
        assert "a raw NIXL registration" in refusal


def test_memory_of_cuda_malloc_is_as_fast_as_that_of_torch(
    tmp_path: Path,
    figure: Figure,
) -> None:
    found = transfer(tmp_path, TIMEOUT, "--backing", "cuda_malloc", "--repeats", "8")
    for operation in ("write", "read"):
        ratio = found[f"{operation}_gb_per_s"] / found[f"plain_{operation}_gb_per_s"]
        figure(f"{operation}_gb_per_s", round(found[f"{operation}_gb_per_s"], 1))
        figure(f"{operation}_over_plain", round(ratio, 3))
        assert ratio >= 0.8, found
    assert found["registrations"] == [1, 1]


@pytest.mark.parametrize("variable", VARIABLES[:2])
def test_expandable_segments_change_nothing(tmp_path: Path, variable: str) -> None:
    found = transfer(
        tmp_path,
        TIMEOUT,
        *("--cycles", "2", "--repeats", "1", "--no-compare"),
        **{variable: "expandable_segments:True"},
    )
    assert found["registrations"] == [2, 2]
