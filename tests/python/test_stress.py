"""About a minute of random calls from several threads (`stress.py`)."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extensive

PROGRAM = Path(__file__).with_name("stress.py")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "seconds"), [("1", 12), ("2", 12), ("fresh", 30)])
def test_every_promise_holds_in_whatever_order_threads_call(
    seed: str, seconds: int, uncounted: dict[str, str]
) -> None:
    chosen = secrets.token_hex(4) if seed == "fresh" else seed
    command = [sys.executable, str(PROGRAM), "--seconds", str(seconds), "--seed", chosen]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=250, env=uncounted
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}\n{done.stderr}"
    assert f"--seed {chosen}" in done.stdout
    assert "allocate: " in done.stdout
