"""Processes of the GPU tests: started fresh, heard within a time, and never left behind."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch.multiprocessing

CONTEXT = torch.multiprocessing.get_context("spawn")
TIMEOUT = 180.0  # seconds for anything that another process is waited for


class Child(contextlib.AbstractContextManager["Child"]):
    """A process that runs ``work(inbox, outbox, *arguments)``; gone when the context ends."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.inbox, self.outbox = CONTEXT.Queue(), CONTEXT.Queue()
        self.process = CONTEXT.Process(
            target=work, args=(self.inbox, self.outbox, *arguments), daemon=True
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def put(self, what: object) -> None:
        self.inbox.put(what)

    def get(self) -> Any:
        """The next thing that it says."""
        return gather([self])[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.join(timeout=TIMEOUT)

    def join(self) -> None:
        """Waits for its end, which must be a good one."""
        self.process.join(timeout=TIMEOUT)
        assert self.process.exitcode == 0, f"exit code {self.process.exitcode}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.is_alive():
            self.kill()
        for each in (self.inbox, self.outbox):
            each.close()
            each.cancel_join_thread()


def gather(children: Sequence[Child]) -> list[Any]:
    """The next thing that each of them says; fails as soon as one has died."""
    found: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(found) < len(children):
        for number, child in enumerate(children):
            if number in found:
                continue
            ended = child.process.exitcode is not None
            try:
                found[number] = child.outbox.get(timeout=1.0)
            except queue.Empty:
                code = child.process.exitcode
                assert not ended, f"process {number} ended with {code} and said nothing"
        assert time.monotonic() < deadline, f"only {sorted(found)} of {len(children)} answered"
    return [found[number] for number in range(len(children))]


def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for what another process or thread brings about."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)
