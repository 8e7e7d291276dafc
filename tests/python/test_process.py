"""What the process does: how it ends, forks and spawns (R14)."""

from __future__ import annotations

import pytest
from conftest import RunPython

pytestmark = pytest.mark.extensive

SETUP = """
import os, sys, torch
from cumempool import CuMemAllocator
alloc = CuMemAllocator()
tensor = alloc.empty(1000, tag="weights").fill_(3)
kv = alloc.empty(1000, tag="kv")
"""

ENDINGS = {
    "live pools": ("", 0),
    "closed": ("del tensor, kv; alloc.close()", 0),
    "closed by force": ("alloc.close(force=True)", 0),
    "asleep": ("alloc.sleep(offload_tags=('weights',))", 0),
    "shared instance": ("one = CuMemAllocator.get_instance(); x = one.empty(3); one.sleep()", 0),
    "open scope": ("scope = alloc.use_memory_pool('s'); scope.__enter__()", 0),
    "sys.exit in a scope": ("with alloc.use_memory_pool('s'): alloc.empty(9); sys.exit(7)", 7),
    "sys.exit asleep": ("alloc.sleep(offload_tags=('weights',)); sys.exit(5)", 5),
    "os._exit": ("alloc.sleep(offload_tags=('weights',)); os._exit(6)", 6),
    "os._exit in a scope": ("with alloc.use_memory_pool('s'): os._exit(8)", 8),
    "in a cycle": ("cycle = [alloc, tensor]; cycle.append(cycle); del alloc, tensor, cycle", 0),
    "in a thread that goes on": (
        "import threading, time\n"
        "def work():\n"
        "    while True: alloc.sleep(tags='weights'); alloc.wake_up()\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.2)",
        0,
    ),
    "a hook that still uses it": (
        "import atexit\natexit.register(lambda: alloc.sleep(tags='weights'))",
        0,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_quietly_with_its_exit_status(
    run_python: RunPython, ending: str
) -> None:
    code, status = ENDINGS[ending]
    done = run_python(f"{SETUP}\n{code}")
    assert (done.code, done.out, done.err) == (status, "", "")


def test_an_uncaught_exception_in_a_scope_is_all_that_is_printed(run_python: RunPython) -> None:
    done = run_python(f"{SETUP}\nwith alloc.use_memory_pool('s'): raise KeyError('mine')")
    assert done.code == 1
    assert done.err.startswith("Traceback")
    assert done.err.rstrip().endswith("KeyError: 'mine'")
    assert done.err.count("Error") == 1


FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
from cumempool import CumempoolError, ForkedError, CuMemConfig, probe
alloc.sleep(tags="kv")
child = os.fork()
if child == 0:
    wrong = []
    calls = {
        "empty": lambda: alloc.empty(3),
        "scope": lambda: alloc.use_memory_pool("x"),
        "sleep": alloc.sleep,
        "wake_up": alloc.wake_up,
        "discard": lambda: alloc.discard("kv"),
        "stats": alloc.stats,
        "snapshot": alloc.snapshot,
        "tag_of": lambda: alloc.tag_of(tensor),
        "close": alloc.close,
        "close by force": lambda: alloc.close(force=True),
        "release_host_memory": alloc.release_host_memory,
        "swap": lambda: alloc.swap(sleep="weights"),
        "wake_up later": lambda: alloc.wake_up(blocking=False),
        "set_backup": lambda: alloc.set_backup("kv", "pageable"),
        "read_backup": lambda: alloc.read_backup(kv),
        "adopt": lambda: alloc.adopt(torch.nn.Linear(1, 1)),
        "new": lambda: CuMemAllocator(CuMemConfig(driver="host")),
    }
    for name, call in calls.items():
        try:
            call()
            wrong.append(f"{name} did not raise")
        except ForkedError as error:
            if "spawn" not in error.advice:
                wrong.append(f"{name}: no advice")
        except BaseException as error:
            wrong.append(f"{name}: {error!r}")
    found = probe(driver="host")
    if found.ok or "fork" not in found.reason:
        wrong.append(repr(found))
    del tensor, kv, alloc  # frees nothing that is the parent's
    if wrong:
        print("\\n".join(wrong), file=sys.stderr)
    CHILD_ENDS
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 3, status
assert float(tensor.sum()) == 3000
alloc.wake_up()
alloc.sleep()
alloc.wake_up()
del tensor, kv
assert alloc.stats().reserved_address_bytes == 0
alloc.close()
"""


@pytest.mark.parametrize("ends", ["os._exit(3)", "sys.exit(3)"])
def test_a_forked_child_gets_a_named_error_and_the_parent_goes_on(
    run_python: RunPython, ends: str
) -> None:
    done = run_python(SETUP + FORK.replace("CHILD_ENDS", ends))
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_fork_before_first_use_is_no_fork_of_the_library(run_python: RunPython) -> None:
    code = """
import os, cumempool
child = os.fork()
alloc = cumempool.CuMemAllocator()
assert alloc.empty(4).fill_(1).sum() == 4
alloc.close()
if child:
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_spawned_processes_have_their_own(
    run_python: RunPython, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("spawn") / "spawning.py"
    script.write_text(
        """
import multiprocessing

from cumempool import CuMemAllocator


def work(value):
    alloc = CuMemAllocator.get_instance()
    tensor = alloc.empty(100, tag="t").fill_(value)
    report = alloc.sleep(offload_tags=("t",))
    alloc.wake_up()
    return report, alloc.stats().to_dict()["wakes"], float(tensor.sum())


if __name__ == "__main__":
    alloc = CuMemAllocator.get_instance()
    mine = alloc.empty(3, tag="mine").fill_(9)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (report, wakes, total), = pool.map(work, [2])
    assert (report.bytes_freed, wakes, total) == (2 << 20, 1, 200.0)
    assert mine.tolist() == [9.0] * 3
    del mine
    alloc.close()
""",
        encoding="utf-8",
    )
    done = run_python("", str(script))
    assert (done.code, done.out, done.err) == (0, "", "")


def test_errors_travel_between_processes_whole(run_python: RunPython) -> None:
    code = (
        SETUP
        + """
import pickle
try:
    alloc.sleep(tags="nope")
except KeyError as error:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert vars(copy) == vars(error) and copy.tag == "nope"
"""
    )
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")
