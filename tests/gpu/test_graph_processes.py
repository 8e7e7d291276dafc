"""Processes that end, or sleep one tag of two, while CUDA graphs of graph pools live."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

COMMON = """
import sys, os, torch, cumempool
a = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
x = torch.ones(1 << 20, device="cuda")
def capture(tag, work):
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g, pool=a.graph_pool(tag)):
        y = work()
    return g, y
"""

ENDINGS = {
    "live": "",
    "asleep": "a.sleep(tags='graphs')",
    "released": "a.release_graph_pool('graphs')",
    "released asleep": "a.sleep(tags='graphs'); a.release_graph_pool('graphs')",
    "closed by force": "a.close(force=True)",
    "dropped": "del a",
    "graph dropped": "del g, y",
    "exit code": "sys.exit(3)",
    "at once": "os._exit(4)",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMON + code], capture_output=True, text=True, timeout=180
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_quietly_with_graphs_that_live(gpu: torch.device, ending: str) -> None:
    done = run(
        "x * 2\ng, y = capture('graphs', lambda: x * 2)\ng.replay()\ntorch.cuda.synchronize()\n"
        + ENDINGS[ending]
    )
    assert done.returncode == {"exit code": 3, "at once": 4}.get(ending, 0), done.stderr
    assert done.stderr == ""
    assert done.stdout == ""


def test_graphs_of_one_tag_replay_while_another_tag_sleeps(gpu: torch.device) -> None:
    """The workspace of cuBLAS, which all captures of a stream share, sleeps with none of them."""
    done = run(
        """
w = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
b = torch.randn(512, device="cuda", dtype=torch.bfloat16)
v = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16)
def work():
    return torch.nn.functional.linear(v @ w, w, b)
work(); torch.cuda.synchronize()
one, first = capture("one", work)
two, second = capture("two", work)
one.replay(); two.replay()
expected = work()
for asleep, graph, out in (("one", two, second), ("two", one, first)):
    a.sleep(tags=asleep)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(out.float(), expected.float(), rtol=2e-2, atol=4), asleep
    a.wake_up()
print("RIGHT")
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "RIGHT\n"
