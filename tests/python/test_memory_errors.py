"""Python runs out of memory inside calls of the extension module: nothing is lost (R4, R13)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("_testcapi", reason="this Python comes without its own tests")

SCRIPT = Path(__file__).with_name("failing_memory.py")


@pytest.mark.parametrize(
    "call",
    [
        "sleep",
        "wake",
        "swap",
        "wake_and_finish",
        "malloc",
        "capsule",
        "pin",
        "bind",
        "export",
        "view",
    ],
)
def test_r4_r13_a_call_that_raises_has_changed_nothing(
    call: str, uncounted: dict[str, str]
) -> None:
    command = [sys.executable, "-X", "faulthandler", str(SCRIPT), call]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=uncounted
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no allocation of Python was reached"
