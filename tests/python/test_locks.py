"""Locks: no signal handler, finalizer or forked child ever hangs on one (R14)."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from conftest import MIB, RunPython

import cumempool
from cumempool import CuMemAllocator, CuMemConfig
from cumempool._locks import fork_safe_lock

pytestmark = pytest.mark.extensive

HOST = CuMemConfig(driver="host", host_driver_bytes=64 * MIB)
MAKES_A_LOCK = re.compile(r"\b(Lock|RLock|Condition)\(")

#: In each script: a hang ends the interpreter with a traceback of every thread.
WATCHED = """
import faulthandler, os, signal, sys, threading, warnings
faulthandler.dump_traceback_later(40, exit=True)
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
import cumempool
from cumempool import CuMemAllocator, CuMemConfig, ForkedError
"""


def test_every_lock_of_the_package_is_made_by_the_one_helper() -> None:
    folder = Path(cumempool.__file__).parent
    elsewhere = {
        str(file.relative_to(folder))
        for file in folder.rglob("*.py")
        if MAKES_A_LOCK.search(file.read_text())
    }
    assert elsewhere == {"_locks.py"}


#: What is interrupted -> the place at which the signal comes, and the call that gets there.
INTERRUPTED = {
    "the shared allocator": (
        "cumempool.allocator.open_driver",
        "CuMemAllocator.get_instance",
    ),
    "the allocator of vLLM's interface": (
        "cumempool.allocator.open_driver",
        "__import__('cumempool.compat.vllm').compat.vllm.CuMemAllocator.get_instance",
    ),
    "the allocator of torch_memory_saver's interface": (
        "cumempool.compat.torch_memory_saver.entrypoint._warn_of_preload_variables",
        "lambda: saver.allocator",
    ),
    "the endpoint": (
        "cumempool.sharing.exports.Endpoint",
        "lambda: own.share(tensor)",
    ),
    "the driver of importers": (
        "cumempool._core.open_host",
        "lambda: cumempool.sharing.importer._driver('host')",
    ),
}

HANDLER = """
import torch
import cumempool.compat.torch_memory_saver.entrypoint as entrypoint
import cumempool.compat.vllm, cumempool.sharing.importer
own = CuMemAllocator()
tensor = own.empty(1)
saver = entrypoint.TorchMemorySaver()
PLACE, CALL = {place!r}, {call}
module, _, name = PLACE.rpartition(".")
real = getattr(sys.modules[module], name)
handled = []

def handler(number, frame):
    CALL()
    CuMemAllocator.get_instance().close()
    handled.append(number)

def interrupted(*arguments, **keywords):
    setattr(sys.modules[module], name, real)
    signal.raise_signal(signal.SIGALRM)
    return real(*arguments, **keywords)

signal.signal(signal.SIGALRM, handler)
setattr(sys.modules[module], name, interrupted)
CALL()
assert handled == [signal.SIGALRM]
assert CuMemAllocator.get_instance().stats().awake_bytes == 0
"""


@pytest.mark.parametrize("what", INTERRUPTED)
def test_a_signal_handler_may_call_what_it_has_interrupted(
    run_python: RunPython, what: str
) -> None:
    place, call = INTERRUPTED[what]
    done = run_python(WATCHED + HANDLER.format(place=place, call=call))
    assert (done.code, done.out, done.err) == (0, "", "")


FORK = """
from cumempool import _locks as locks
import cumempool._torch, cumempool._pool.graph_pool
import cumempool.compat.torch_memory_saver.entrypoint as entrypoint
import cumempool.compat.vllm as vllm
alloc = CuMemAllocator.get_instance(CuMemConfig.from_env())
saver = entrypoint.TorchMemorySaver(allocator=alloc)
tensor = alloc.empty(1, tag="weights")
alloc.share(tensor)
held = list(locks._locks)
inside, leave = threading.Event(), threading.Event()

def hold():
    for lock in held:
        lock.acquire()
    inside.set()
    leave.wait()
    for lock in held:
        lock.release()

thread = threading.Thread(target=hold)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    calls = [
        lambda: CuMemAllocator.get_instance().stats(),
        lambda: alloc.use_memory_pool("w"),
        lambda: alloc.empty(1),
        lambda: alloc.sleep(tags="weights"),
        lambda: alloc.wake_up(blocking=False),
        lambda: alloc.share(tensor),
        lambda: alloc.pin("weights", "me"),
        lambda: CuMemAllocator(),
        lambda: vllm.CuMemAllocator.get_instance().get_current_usage(),
        lambda: saver.region().__enter__(),
        lambda: alloc.register_hooks("weights"),
        alloc.close,
    ]
    wrong = []
    for number, call in enumerate(calls):
        try:
            call()
            wrong.append(f"{number} did not raise")
        except ForkedError:
            pass
        except BaseException as error:
            wrong.append(f"{number}: {error!r}")
    print(*wrong, sep="", end="", file=sys.stderr)
    sys.stderr.flush()
    os._exit(3)
leave.set()
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
del tensor
alloc.close()
"""


def test_a_fork_while_another_thread_holds_every_lock_gives_named_errors(
    run_python: RunPython,
) -> None:
    done = run_python(WATCHED + FORK)
    assert (done.code, done.out, done.err) == (0, "", "")


FORK_WHILE_MAKING = """
import cumempool.allocator as module
real, inside, leave = module.open_driver, threading.Event(), threading.Event()

def slow(config):
    driver = real(config)
    inside.set()
    leave.wait()
    return driver

module.open_driver = slow
thread = threading.Thread(target=CuMemAllocator.get_instance)
thread.start()
inside.wait()
module.open_driver = real
child = os.fork()
if child == 0:
    signal.alarm(20)
    try:
        CuMemAllocator.get_instance()
    except ForkedError:
        os._exit(3)
    os._exit(4)
leave.set()
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""


def test_a_fork_while_the_shared_allocator_is_made_gives_a_named_error(
    run_python: RunPython,
) -> None:
    done = run_python(WATCHED + FORK_WHILE_MAKING)
    assert (done.code, done.out, done.err) == (0, "", "")


HELD_BY_THE_FORKING_THREAD = """
from cumempool._locks import fork_safe_lock
lock = fork_safe_lock()
with lock:
    child = os.fork()
assert lock.acquire(blocking=False)
if child == 0:
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""


def test_a_lock_that_the_forking_thread_holds_is_released_by_it_in_both_processes(
    run_python: RunPython,
) -> None:
    done = run_python(WATCHED + HELD_BY_THE_FORKING_THREAD)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_lock_excludes_other_threads_and_lets_its_own_in_again() -> None:
    lock = fork_safe_lock()
    got: list[bool] = []
    with lock, lock:
        thread = threading.Thread(target=lambda: got.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
    assert got == [False]


# ---- the shared allocator


def test_threads_that_meet_in_the_first_call_get_the_same_allocator() -> None:
    together = threading.Barrier(8)
    found: list[CuMemAllocator] = []

    def ask() -> None:
        together.wait()
        found.append(CuMemAllocator.get_instance(HOST))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    found[0].empty(1)
    found[0].close()


def test_a_closed_allocator_is_never_handed_out_while_its_close_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = CuMemAllocator.get_instance(HOST)
    found: list[CuMemAllocator] = []

    def close_of_the_server() -> None:
        found.append(CuMemAllocator.get_instance(HOST))

    monkeypatch.setattr(first._exports, "close", close_of_the_server)
    first.close()
    assert found[0] is not first
    found[0].empty(1)
    found[0].close()


def test_an_allocator_whose_close_has_failed_is_not_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = CuMemAllocator.get_instance(HOST)
    first._core.close(False)  # as where the driver raises then: nothing after it has run
    second = CuMemAllocator.get_instance(HOST)
    assert second is not first
    second.close()
    first.close()
