"""Calls everything in random order from several threads, and looks whether the promises hold.

    python tests/python/stress.py --seconds 60 --seed 7

A program, since a hang has to end it: a watchdog prints where every thread is. It exits with 0 if
every promise held. The seed decides what each thread does; how threads take turns it cannot.

What must hold, whatever happens meanwhile:

- contents of kept memory are the same after a wake, at the same addresses;
- a call raises no error but those that its interleaving explains;
- a tag that a thread has a scope open of is awake;
- once all is quiet, the statistics add up, and after the last close nothing is held;
- nothing hangs, and nothing is written to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch

from cumempool import (
    CuMemAllocator,
    CuMemConfig,
    CumempoolError,
    ForkedError,
    InUseError,
    InvalidArgumentError,
    NotInPoolError,
    OutOfMemoryError,
    SharedMemory,
    TransitionInProgressError,
    open_shared,
)

MIB: Final = 1 << 20
DEVICE_BYTES: Final = 96 * MIB
TAGS: Final = ("weights", "kv", "adapters", "scratch")
#: Tags that sleeps of every kind keep; what is in the others may be lost.
KEPT: Final = frozenset({"weights", "adapters"})
PATIENCE: Final = 60.0  # seconds after which a call hangs
#: What sharing and reading a backup raise of memory that is asleep, or is not.
NOT_SHARED: Final = (InUseError, InvalidArgumentError)
NO_BACKUP: Final = (InvalidArgumentError, NotInPoolError)
#: Statistics that are 0 after a close.
HELD: Final = frozenset(
    f"{what}_bytes"
    for what in (
        "reserved_address",
        "physical",
        "mapped",
        "pending_free",
        "host",
        "host_used",
        "pageable",
        "file",
        "peer",
        "staging",
        "awake",
        "asleep",
    )
)


class Broken(Exception):  # noqa: N818 -- a promise is
    """A promise was broken."""


@dataclass
class Entry:
    """A tensor, and what must be in it."""

    tensor: torch.Tensor
    tag: str
    address: int
    contents: int

    def check(self, tensor: torch.Tensor) -> None:
        """Compares with a tensor or a view of its backup; what may be lost is anything.

        Raises:
            Broken: They differ.
        """
        if self.tag in KEPT and fingerprint(tensor) != self.contents:
            raise Broken(f"contents of {self.tag!r} at {self.address:#x} are not what they were")


def fingerprint(tensor: torch.Tensor) -> int:
    """A number that changes with the contents."""
    return hash(tensor.detach().view(-1).view(torch.uint8).numpy().tobytes())


def import_memory(requests: Any, answers: Any) -> None:
    """The other process: opens what it is sent, and says what is in it."""
    torch.set_num_threads(1)
    while (memory := requests.get()) is not None:
        try:
            tensor = open_shared(memory)
            assert isinstance(tensor, torch.Tensor)
            answers.put(tensor.view(torch.uint8).numpy().tobytes())
            del tensor
        except CumempoolError as error:
            answers.put(type(error).__name__)


class Importer:
    """Another process that opens memory; one request at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._requests, self._answers = context.Queue(), context.Queue()
        self.lock = threading.Lock()
        arguments = (self._requests, self._answers)
        self._process = context.Process(target=import_memory, args=arguments, daemon=True)
        self._process.start()

    def ask(self, memory: SharedMemory) -> bytes | str:
        """Contents, or the name of the error."""
        self._requests.put(memory)
        answer: bytes | str = self._answers.get(timeout=PATIENCE)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._requests.put(None)
        self._process.join(PATIENCE)


class Worker(threading.Thread):
    """One thread: makes calls in random order, and knows what has to be in its own tensors."""

    def __init__(self, stress: Stress, number: int, seed: str) -> None:
        super().__init__(name=f"worker {number}", daemon=True)
        self.stress = stress
        self.alloc = stress.alloc
        self.chance = random.Random(seed)
        self.entries: list[Entry] = []
        self.counts: Counter[str] = Counter()
        self.doing = ""
        self.since = time.monotonic()

    def run(self) -> None:
        """Goes on until the time is up, or something is wrong."""
        calls: list[tuple[Callable[[], object], int]] = [
            (self.allocate, 30),
            (self.drop, 18),
            (self.check, 25),
            (self.scope, 15),
            (self.sleep, 20),
            (self.discard, 5),
            (self.wake, 25),
            (self.wake_later, 15),
            (self.swap, 10),
            (self.adopt, 4),
            (self.share, 6),
            (self.record, 4),
            (self.read_backup, 10),
            (self.prepare, 8),
            (self.release_host_memory, 4),
            (self.close, 3),
            (self.look, 10),
            (self.fork, 1),
        ]
        names, weights = zip(*calls, strict=True)
        while time.monotonic() < self.stress.end and not self.stress.failures:
            call = self.chance.choices(names, weights)[0]
            self.doing, self.since = call.__name__, time.monotonic()
            self.attempt(call)
        self.doing = ""

    def attempt(self, call: Callable[[], object]) -> None:
        """Makes a call; what it raises is a failure."""
        try:
            call()
            self.counts[call.__name__] += 1
        except BaseException:  # noqa: BLE001 -- whatever it is, it is told
            self.stress.failures.append(f"{self.name}: {traceback.format_exc()}")

    @contextlib.contextmanager
    def may_raise(self, *errors: type[CumempoolError]) -> Iterator[None]:
        """What the calls of other threads explain."""
        try:
            yield
        except errors as error:
            self.counts[f"{self.doing}: {type(error).__name__}"] += 1

    def tag(self) -> str:
        """A tag."""
        return self.chance.choice(TAGS)

    def some_tags(self) -> list[str]:
        """Some tags, at least one."""
        return self.chance.sample(TAGS, self.chance.randint(1, len(TAGS)))

    # ---- tensors

    def keep(self, tensor: torch.Tensor, tag: str, *, fill: bool = True) -> None:
        """Takes a tensor that cannot go to sleep now."""
        raw = tensor.detach().view(-1).view(torch.uint8)
        if fill:
            raw[:64] = torch.tensor(list(self.chance.randbytes(64)), dtype=torch.uint8)
            raw[-64:] = torch.tensor(list(self.chance.randbytes(64)), dtype=torch.uint8)
        self.entries.append(Entry(tensor, tag, tensor.data_ptr(), fingerprint(tensor)))

    def allocate(self) -> None:
        """Pinned, so that nobody puts the tag to sleep while it is filled."""
        tag, size = self.tag(), self.chance.choice([1, 8, 300, 2600])
        with self.may_raise(OutOfMemoryError), self.alloc.pin(tag, "a writer"):
            self.keep(self.alloc.empty(size << 10, dtype=torch.uint8, tag=tag).zero_(), tag)

    def drop(self) -> None:
        """Drops tensors, asleep or awake."""
        while len(self.entries) > 10 or (self.entries and self.chance.random() < 0.5):
            self.entries.pop(self.chance.randrange(len(self.entries)))

    def check(self) -> None:
        """Looks at tensors that are awake, and cannot go to sleep meanwhile."""
        for entry in self.chance.sample(self.entries, min(3, len(self.entries))):
            with self.alloc.pin(entry.tag, "a reader"):
                info = self.alloc.allocation_of(entry.tensor)
                if info.tag != entry.tag or entry.tensor.data_ptr() != entry.address:
                    raise Broken(f"{entry} is at {info} now")
                if info.state == "awake":
                    entry.check(entry.tensor)

    def scope(self) -> None:
        """What is made inside a scope stays awake until its end, whoever wants it to sleep."""
        tag = self.tag()
        with self.may_raise(OutOfMemoryError), self.alloc.use_memory_pool(tag):
            tensor = self.alloc.empty(8 << 10, dtype=torch.uint8).zero_()
            for _ in range(self.chance.randint(0, 5)):
                if self.alloc.allocation_of(tensor).state != "awake":
                    raise Broken(f"{tag!r} sleeps inside its scope")
                tensor.add_(1)
                time.sleep(self.chance.random() * 0.002)
            self.keep(tensor, tag)

    def adopt(self) -> None:
        """Moves a module in."""
        tag = self.chance.choice(sorted(KEPT))
        module = torch.nn.Linear(64, 64)
        before = [fingerprint(parameter) for parameter in module.parameters()]
        with self.may_raise(OutOfMemoryError), self.alloc.pin(tag, "a writer"):
            if self.chance.random() < 0.5:
                with torch.inference_mode():
                    self.alloc.adopt(module, tag)
            else:
                self.alloc.adopt(module, tag)
            for parameter, contents in zip(module.parameters(), before, strict=True):
                self.keep(parameter, tag, fill=False)
                if self.entries[-1].contents != contents:
                    raise Broken("adopting has changed a parameter")

    # ---- transitions

    def sleep(self) -> None:
        """All forms of it, none of which loses what is kept."""
        form = self.chance.randrange(4)
        with self.may_raise(InUseError):
            if form == 0:
                self.alloc.sleep()
            elif form == 1:
                self.alloc.sleep(tags=self.some_tags())
            elif form == 2:
                self.alloc.sleep(offload_tags=sorted(KEPT))
            else:
                tags = self.some_tags()
                self.alloc.sleep(tags=tags, offload_tags=sorted(KEPT.intersection(tags)))

    def discard(self) -> None:
        """Of what may be lost."""
        with self.may_raise(InUseError):
            self.alloc.discard(self.chance.choice(sorted(set(TAGS) - KEPT)))

    def wake(self) -> None:
        """Blocks."""
        with self.may_raise(OutOfMemoryError):
            self.alloc.wake_up(self.chance.choice([None, self.some_tags()]))

    def wake_later(self) -> None:
        """Goes on in the background; waits for a tensor, for all, or is dropped."""
        with self.may_raise(OutOfMemoryError, InvalidArgumentError):
            handle = self.alloc.wake_up(
                self.chance.choice([None, self.some_tags()]), blocking=False
            )
            form = self.chance.randrange(3)
            if form == 0 and self.entries:
                handle.wait(self.chance.choice(self.entries).tensor)
            elif form == 1:
                handle.result()

    def swap(self) -> None:
        """One tag for another."""
        first, second = self.chance.sample(TAGS, 2)
        with self.may_raise(InUseError, OutOfMemoryError):
            self.alloc.swap(sleep=first, wake=second)

    def prepare(self) -> None:
        """Pins ahead, and may think better of it."""
        background = self.chance.random() < 0.5
        with self.may_raise(InUseError):
            if not background:
                self.alloc.prepare(tags=self.some_tags())
                return
            future = self.alloc.prepare(tags=self.some_tags(), background=True)
            if self.chance.random() < 0.5 and future.cancel():
                return
            future.result(PATIENCE)

    # ---- others

    def share(self) -> None:
        """Another process sees the same bytes, or is told that it cannot."""
        kept = [entry for entry in self.entries if entry.tag in KEPT]
        if not kept:
            return
        entry = self.chance.choice(kept)
        with self.may_raise(*NOT_SHARED):
            memory = self.alloc.share(entry.tensor)
            with self.stress.importer.lock:
                answer = self.stress.importer.ask(memory)
            if isinstance(answer, str):
                if answer not in {"SharingError"}:
                    raise Broken(f"the importer was told {answer}")
            elif hash(answer) != entry.contents:
                raise Broken("the importer sees other bytes")

    def read_backup(self) -> None:
        """What a sleeping tensor holds, while others wake it."""
        kept = [entry for entry in self.entries if entry.tag in KEPT]
        if kept:
            entry = self.chance.choice(kept)
            with self.may_raise(*NO_BACKUP):
                entry.check(self.alloc.read_backup(entry.tensor))

    def record(self) -> None:
        """A trace that others' transitions go into."""
        with self.alloc.record(self.stress.folder / f"{self.name}.trace"):
            time.sleep(self.chance.random() * 0.01)

    def release_host_memory(self) -> None:
        """At any time."""
        self.alloc.release_host_memory()

    def close(self) -> None:
        """Is refused: the anchor lives."""
        try:
            self.alloc.close()
        except InUseError:
            return
        raise Broken("an allocator was closed that is in use")

    def look(self) -> None:
        """Statistics, and the shared allocator."""
        stats = self.alloc.stats()
        if stats.awake_bytes + stats.asleep_bytes > stats.reserved_address_bytes:
            raise Broken(f"more memory than addresses: {stats}")
        if CuMemAllocator.get_instance() is not self.alloc:
            raise Broken("there is another shared allocator")

    def fork(self) -> None:
        """A child is told that it is one, and ends."""
        child = os.fork()
        if child == 0:
            self.end_child()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            raise Broken(f"a forked child has ended with {status}")

    def end_child(self) -> None:
        """Never returns."""
        status = 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            status = 0
            for call in (
                lambda: self.alloc.empty(1, tag="kv"),
                lambda: self.alloc.sleep(),
                lambda: self.alloc.wake_up(blocking=False),
                lambda: self.alloc.use_memory_pool("kv"),
                lambda: CuMemAllocator.get_instance().stats(),
                lambda: self.alloc.close(force=True),
            ):
                try:
                    call()
                    status = 2
                except ForkedError:
                    pass
        finally:
            os._exit(status)


class Stress:
    """One allocator under stress, until all is quiet and it is closed.

    Args:
        seed: Of what the threads do.
        seconds: How long.
        threads: How many, beside the main thread.
        importer: The other process.
        folder: For traces.
    """

    def __init__(
        self, seed: str, seconds: float, threads: int, importer: Importer, folder: Path
    ) -> None:
        chance = random.Random(seed)
        config = CuMemConfig(
            driver="host",
            host_driver_bytes=DEVICE_BYTES,
            retain_backups=chance.random() < 0.7,
        )
        self.alloc = CuMemAllocator.get_instance(config)
        for tag in TAGS:
            self.alloc.use_memory_pool(tag, on_sleep="offload" if tag in KEPT else "discard")
        self.importer = importer
        self.folder = folder
        self.failures: list[str] = []
        self.handled: Counter[str] = Counter()
        self.end = time.monotonic() + seconds
        self._chance = chance
        self._handling = False
        self._anchor = self.alloc.empty(1, tag="anchor")
        self.workers = [Worker(self, number, f"{seed}/{number}") for number in range(threads + 1)]

    def run(self) -> Counter[str]:
        """How often what was done.

        Raises:
            Broken: A promise was not kept.
        """
        main, *others = self.workers
        watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        watchdog.start()
        for worker in others:
            worker.start()
        signal.signal(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.017)
        try:
            main.run()  # in this thread, which signals interrupt
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for worker in others:
            worker.join()
        if self.failures:
            raise Broken("\n".join(self.failures))
        self._quiet()
        total = Counter(self.handled)
        for worker in self.workers:
            total += worker.counts
        self._close()
        return total

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """A signal handler that calls the library, and is not interrupted by the next signal."""
        if self._handling:
            return
        self._handling = True
        calls: list[Callable[[], object]] = [
            self.alloc.stats,
            CuMemAllocator.get_instance,
            lambda: self.alloc.sleep(tags=self._chance.choice(TAGS)),
            lambda: self.alloc.wake_up(self._chance.choice(TAGS)),
            lambda: self.alloc.empty(1, tag="scratch"),
        ]
        index = self._chance.randrange(len(calls))
        try:
            calls[index]()
            self.handled[f"signal {index}"] += 1
        except (InUseError, OutOfMemoryError, TransitionInProgressError) as error:
            self.handled[f"signal {index}: {type(error).__name__}"] += 1
        except BaseException:  # noqa: BLE001 -- whatever it is, it is told
            self.failures.append(f"signal handler: {traceback.format_exc()}")
        finally:
            self._handling = False

    def _watch(self) -> None:
        """Ends the process where a call takes too long."""
        while any(worker.doing for worker in self.workers) or time.monotonic() < self.end:
            faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)  # without the interpreter
            now = time.monotonic()
            stuck = [w for w in self.workers if w.doing and now - w.since > PATIENCE]
            if stuck:
                names = ", ".join(f"{worker.name} in {worker.doing}" for worker in stuck)
                print(f"hangs: {names}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(3)
            time.sleep(0.1)

    def _quiet(self) -> None:
        """Looks at everything, now that nobody calls."""
        entries = [entry for worker in self.workers for entry in worker.entries]
        while True:
            try:
                self.alloc.wake_up()
                break
            except OutOfMemoryError:  # others have taken the room since
                if not entries:
                    raise
                dropped = entries.pop()
                for worker in self.workers:
                    worker.entries = [e for e in worker.entries if e is not dropped]
                del dropped
        for entry in entries:
            if entry.tensor.data_ptr() != entry.address:
                raise Broken(f"{entry} has moved")
            entry.check(entry.tensor)
        stats, infos = self.alloc.stats(), self.alloc.snapshot()
        awake = sum(info.bytes for info in infos if info.state == "awake")
        if (stats.awake_bytes, stats.asleep_bytes) != (awake, 0):
            raise Broken(f"{awake} bytes are awake, and the statistics say {stats}")
        if not stats.physical_bytes == stats.mapped_bytes == awake:
            raise Broken(f"{awake} bytes are awake, and the driver gave {stats}")

    def _close(self) -> None:
        """Nothing is held after it."""
        for worker in self.workers:
            worker.entries.clear()
        del self._anchor
        gc.collect()
        self._close_once_importers_are_gone()
        held = {k: v for k, v in self.alloc.stats().to_dict().items() if v and k in HELD}
        if held:
            raise Broken(f"held after the close: {held}")

    def _close_once_importers_are_gone(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self.alloc.close()
                return
            except InUseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def main() -> int:
    """Runs allocators under stress, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", default=None, help="a text; what an earlier run has printed")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--each", type=float, default=5.0, help="seconds of one allocator")
    arguments = parser.parse_args()
    seed = arguments.seed or secrets.token_hex(4)
    print(f"stress.py --seconds {arguments.seconds:g} --seed {seed}", flush=True)
    faulthandler.enable()
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
    torch.set_num_threads(1)
    importer = Importer()
    total: Counter[str] = Counter()
    end, number = time.monotonic() + arguments.seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            seconds = min(arguments.each, end - time.monotonic())
            name = f"{seed}/{number}"
            try:
                stress = Stress(name, seconds, arguments.threads, importer, Path(folder))
                total += stress.run()
            except Broken as broken:
                print(f"seed {name}: {broken}", file=sys.stderr)
                os._exit(1)
            number += 1
    importer.close()
    faulthandler.cancel_dump_traceback_later()
    print(f"{number} allocators, {sum(total.values())} calls")
    for what, count in sorted(total.items()):
        print(f"  {what}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
