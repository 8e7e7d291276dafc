"""NIXL between two processes and two GPUs on pool memory, through sleeps of either side."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Figure
from .transfers import NEEDS, transfer

TIMEOUT = 480  # seconds; 42 GiB, of which TCP moves less than 0.5 GB/s

pytestmark = [*NEEDS, pytest.mark.timeout(TIMEOUT + 30)]


def test_every_byte_arrives_through_twenty_sleeps_of_either_side(
    tmp_path: Path, figure: Figure
) -> None:
    found = transfer(tmp_path, TIMEOUT, "--cycles", "20", "--repeats", "1", "--no-compare")
    for operation in ("write", "read"):
        figure(f"{operation}_gb_per_s", round(found[f"{operation}_gb_per_s"], 2))
    assert found["cycles"] == 20
    # One registration at first, one after each of ten wakes on either side.
    assert found["registrations"] == [11, 11]
