"""NIXL between two processes and two GPUs on pool memory, through sleeps of either side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cumempool.nixl import is_installed

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nixl_kv_transfer.py"
GIB = 1024**3
TIMEOUT = 280  # seconds; TCP moves about 0.5 GB/s
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

pytestmark = [
    pytest.mark.skipif(not is_installed(), reason="NIXL is not installed: pip install nixl"),
    pytest.mark.xfail(
        torch.cuda.device_count() < 2, reason="there is one GPU; this needs two", run=False
    ),
]


def transfer(tmp_path: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """Runs the example, which compares every byte itself, and returns its figures."""
    figures = tmp_path / "figures.json"
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    with subprocess.Popen(
        [sys.executable, str(EXAMPLE), *arguments, "--json", str(figures)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | variables,
        start_new_session=True,
    ) as example:
        try:
            said, _ = example.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(example.pid, signal.SIGKILL)  # its two processes as well
            pytest.fail(f"not done after {TIMEOUT} s: {example.communicate()[0]}")
    print(said)
    assert example.returncode == 0, said
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    assert found["devices"] == [0, 1]
    assert found["bytes"] >= GIB
    return found


def test_every_byte_arrives_through_twenty_sleeps_of_either_side(tmp_path: Path) -> None:
    found = transfer(tmp_path, "--cycles", "20", "--repeats", "1")
    assert found["cycles"] == 20
    # One registration at first, one after each of ten wakes on either side.
    assert found["registrations"] == [11, 11]


def test_a_raw_registration_makes_the_sleep_refuse_by_name(tmp_path: Path) -> None:
    found = transfer(tmp_path, "--cycles", "0", "--repeats", "1", "--no-compare")
    for refusal in found["refusals"]:
        assert "a raw NIXL registration" in refusal


def test_memory_of_cuda_malloc_is_as_fast_as_that_of_torch(tmp_path: Path) -> None:
    found = transfer(tmp_path, "--backing", "cuda_malloc", "--repeats", "8")
    for operation in ("write", "read"):
        ratio = found[f"{operation}_gb_per_s"] / found[f"plain_{operation}_gb_per_s"]
        assert ratio >= 0.8, found
    assert found["registrations"] == [1, 1]


@pytest.mark.parametrize("variable", VARIABLES[:2])
def test_expandable_segments_change_nothing(tmp_path: Path, variable: str) -> None:
    found = transfer(
        tmp_path,
        *("--cycles", "2", "--repeats", "1", "--no-compare"),
        **{variable: "expandable_segments:True"},
    )
    assert found["registrations"] == [2, 2]
