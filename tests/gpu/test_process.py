"""Contexts, fork and the end of the process (R11, R14)."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMON = "import sys, os, ctypes\nimport cumempool\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMON + code], capture_output=True, text=True, timeout=180
    )


def test_import_and_probe_leave_no_context() -> None:
    done = run(
        """
assert "torch" not in sys.modules
found = cumempool.probe(driver="cuda")
assert found.ok, found
assert found.torch.routes is None
assert found.devices[0].usable
from cumempool import _core
assert not any(_core.open_cuda().context_active(i) for i in range(len(found.devices)))
print(found.devices[0].handle_types, found.devices[0].handle_types_claimed, found.devices[0].rdma)
"""
    )
    assert done.returncode == 0, done.stderr
    assert "posix_fd" in done.stdout


def test_the_current_context_and_device_are_left_alone() -> None:
    done = run(
        """
cuda = ctypes.CDLL("libcuda.so.1")
a = cumempool.CuMemAllocator()
def current():
    c = ctypes.c_void_p(); cuda.cuCtxGetCurrent(ctypes.byref(c)); return c.value
before = current()
assert before is None
a._state.tags.declare("weights", None, None)
address = a._core.malloc("weights", 0, 1 << 20)
assert current() is None
a.sleep(tags="weights"); a.wake_up()
assert current() is None
from cumempool import _core
_core.free(address)
a.close()
assert not _core.open_cuda().context_active(0)
"""
    )
    assert done.returncode == 0, done.stderr


ENDINGS = {
    "live": "",
    "asleep": "a.sleep(offload_tags='weights')",
    "closed": "a.close(force=True)",
    "singleton": "b = cumempool.CuMemAllocator.get_instance()\nu = b.empty(10)\nb.sleep()",
    "graph": """
g = torch.cuda.CUDAGraph()
with torch.cuda.graph(g):
    t.add_(1)
g.replay(); torch.cuda.synchronize()
a.sleep(offload_tags='weights')
""",
    "scope": """
scope = a.use_memory_pool('open')
scope.__enter__()
v = torch.ones(10, device='cuda')
""",
    "thread": """
import threading, time
threading.Thread(target=lambda: [a.stats() or time.sleep(0.001) for _ in range(10**6)],
                 daemon=True).start()
""",
}


@pytest.mark.parametrize(
    ("ending", "leave"),
    [
        *((ending, "") for ending in ENDINGS),
        ("asleep", "sys.exit(3)"),
        ("scope", "sys.exit(3)"),
        ("graph", "os._exit(4)"),
    ],
)
def test_the_interpreter_ends_quietly_with_its_own_code(ending: str, leave: str) -> None:
    done = run(
        f"""
import torch
a = cumempool.CuMemAllocator()
with a.use_memory_pool("weights"):
    t = torch.ones(1 << 20, device="cuda")
e = a.empty(1 << 20, tag="weights")
{ENDINGS[ending]}
{leave}
"""
    )
    assert done.returncode == {"": 0, "sys.exit(3)": 3, "os._exit(4)": 4}[leave], done.stderr
    assert done.stderr == ""
    assert done.stdout == ""


def test_a_forked_child_gets_a_named_error_and_the_parent_goes_on() -> None:
    done = run(
        """
import torch
a = cumempool.CuMemAllocator()
with a.use_memory_pool("weights"):
    t = torch.ones(1 << 20, device="cuda")
pid = os.fork()
if pid == 0:
    codes = 0
    for call in (a.stats, a.sleep, a.wake_up, lambda: a.empty(3), a.close):
        try:
            call()
        except cumempool.ForkedError as error:
            codes += "spawn" in str(error)
    os._exit(10 + codes)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 15, os.waitstatus_to_exitcode(status)
a.sleep(offload_tags="weights"); a.wake_up()
assert float(t.sum()) == 1 << 20
"""
    )
    assert done.returncode == 0, done.stderr
