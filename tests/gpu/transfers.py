"""The example of NIXL as a process of its own, and its figures."""

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

from cumempool.integrations.nixl import is_installed

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nixl_kv_transfer.py"
GIB = 1024**3
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

#: What the tests of a file need.
NEEDS = [
    pytest.mark.skipif(not is_installed(), reason="NIXL is not installed: pip install nixl"),
    pytest.mark.xfail(
        torch.cuda.device_count() < 2, reason="there is one GPU; this needs two", run=False
    ),
]


def transfer(tmp_path: Path, timeout: int, *arguments: str, **variables: str) -> dict[str, Any]:
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
            said, _ = example.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(example.pid, signal.SIGKILL)  # its two processes as well
            pytest.fail(f"not done after {timeout} s: {example.communicate()[0]}")
    print(said)
    assert example.returncode == 0, said
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    assert found["devices"] == [0, 1]
    assert found["bytes"] >= GIB
    return found
