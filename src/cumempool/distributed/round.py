"""Runs one transition of a group: each rank does its steps and votes; one entry decides for all."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cumempool._pool.report import TransitionReport
from cumempool.distributed.reports import joined, to_json
from cumempool.distributed.steps import Step
from cumempool.distributed.store import Channel, StoreLostError
from cumempool.errors import DistributedTransitionError, RankState

_FIRST_PAUSE: Final = 0.0005  # seconds between two looks into the store
_LONGEST_PAUSE: Final = 0.02

_logger = logging.getLogger("cumempool")


class _AbortedError(Exception):
    """The group has decided against this transition."""


@dataclass
class Round:
    """One transition of a group, as one rank sees it.

    The store numbers the rounds. A rank that comes after a round was decided begins the next one,
    so ranks that were late or restarted meet the others again.
    """

    channel: Channel
    rank: int
    size: int
    operation: str
    timeout: float
    number: int = -1  # -1: not known yet
    missed: bool = False  # another rank gave this round up before this rank came
    failures: dict[int, str] = field(default_factory=dict)
    unanswered: set[int] = field(default_factory=set)
    done: list[Step] = field(default_factory=list)
    reports: list[TransitionReport] = field(default_factory=list)
    cause: BaseException | None = None
    secondary: list[str] = field(default_factory=list)

    # ---- forwards

    def run(self, plan: Callable[[], list[Step]]) -> dict[int, TransitionReport]:
        """Runs all phases; returns the reports of all ranks."""
        lost: StoreLostError | None = None
        try:
            try:
                return self._all_or_none(plan)
            except _AbortedError:
                states = self._leave()
            except StoreLostError as error:
                lost = error
                states = self._lose(error)
        except BaseException:  # such as the user's Ctrl-C, in any phase
            self._give_up("was interrupted")
            raise
        raise self._error(states) from (self._take_cause() or lost)

    def _all_or_none(self, plan: Callable[[], list[Step]]) -> dict[int, TransitionReport]:
        # Comes first: a rank that gives up while it plans has to name the round.
        self._find_number()
        steps = self._planned(plan)
        arrived = self._gather("here", {"operation": self.operation, "steps": len(steps)})
        self._check_operations(arrived)
        if self.number:
            self.channel.drop(self._own_keys(self.number - 1))
        for stage in range(max(answer["steps"] for answer in arrived.values())):
            if stage < len(steps):
                self._run_step(steps[stage])
            last = [to_json(report) for report in self.reports]
            votes = self._gather(f"vote{stage}", {"reports": last})
        if not self._agree():
            raise _AbortedError
        if not any(answer["steps"] for answer in arrived.values()):
            return {rank: joined(self.operation, []) for rank in arrived}
        return {rank: joined(self.operation, vote["reports"]) for rank, vote in votes.items()}

    def _planned(self, plan: Callable[[], list[Step]]) -> list[Step]:
        try:
            return plan()
        except Exception as error:  # told to all ranks, and raised from
            _logger.debug("%s: this rank cannot take part", self.operation, exc_info=True)
            self._failed(error)
            return []

    def _run_step(self, step: Step) -> None:
        try:
            self.reports.append(step.run())
        except Exception as error:  # told to all ranks, and raised from; hooks raise anything
            _logger.debug("%s failed on this rank", self.operation, exc_info=True)
            self._failed(error)
            if not step.undone():  # the allocator could not undo all of it
                self.done.append(step)
        else:
            self.done.append(step)

    def _failed(self, error: Exception) -> None:
        self.cause = error
        self.failures[self.rank] = f"{type(error).__name__}: {error}"

    def _take_cause(self) -> BaseException | None:
        """Returns and drops this rank's error, whose frames refer to this object."""
        cause, self.cause = self.cause, None
        return cause

    def _find_number(self) -> None:
        """Finds the open round, or one that another rank gave up before this rank came."""
        while True:
            self.number = int(self.channel.first("round", 0))
            if not self.channel.has([self._decision]):
                return
            gave_up = self.channel.get(self._decision).get("gave_up", {})
            was_here = self.channel.has([self._key("here", self.rank)])
            if gave_up and str(self.rank) not in gave_up and not was_here:
                self.missed = True
                return
            self._begin_next()

    def _begin_next(self) -> None:
        self.channel.exchange("round", self.number, self.number + 1)

    def _gather(self, phase: str, answer: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Writes this rank's answer, waits for all others and returns all answers."""
        answer["failure"] = self.failures.get(self.rank)
        self.channel.put(self._key(phase, self.rank), answer)
        if self.missed:
            raise _AbortedError
        made, missing = True, []
        if not self._wait(phase, range(self.size), self._decision):
            missing = self._missing(phase, range(self.size))
            made = self._decide({"commit": False, "unanswered": missing})["commit"]
        answers = self._answers(phase, set(range(self.size)) - set(missing))
        self._note_failures(answers)
        if self.failures:
            made = self._decide({"commit": False})["commit"]
        if not made:
            raise _AbortedError
        return answers

    def _check_operations(self, arrived: Mapping[int, dict[str, Any]]) -> None:
        """Refuses a round in which ranks called different operations; all ranks see the same."""
        wanted = {rank: str(answer["operation"]) for rank, answer in arrived.items()}
        if len(set(wanted.values())) > 1:
            for rank, operation in wanted.items():
                self.failures[rank] = f"called {operation}(), and not all ranks called that"
            self._decide({"commit": False})
            raise _AbortedError

    def _decide(self, decision: dict[str, Any]) -> dict[str, Any]:
        """Decides the round unless a rank has done so; returns the final decision."""
        made: dict[str, Any] = self.channel.first(self._decision, decision)
        if "gave_up" not in made:  # else the round stays open, to tell ranks that come later
            with contextlib.suppress(StoreLostError):  # the next rank does it then
                self._begin_next()
        return made

    def _agree(self) -> bool:
        """Decides for the round, with a second try: ranks that have decided for it do not undo."""
        try:
            return bool(self._decide({"commit": True})["commit"])
        except StoreLostError:
            self.channel.reopen()
            return bool(self._decide({"commit": True})["commit"])

    # ---- back

    def _leave(self) -> dict[int, RankState]:
        """Undoes this rank's steps, and returns the state of all ranks."""
        state = self._undo()
        try:
            decision = self.channel.get(self._decision)
            gave_up = {int(rank): str(why) for rank, why in decision.get("gave_up", {}).items()}
            self.failures.update(gave_up)
            self.unanswered.update(decision.get("unanswered", ()))
            self._tell_end(state)
            came = set(range(self.size)) - self.unanswered
            if gave_up:  # perhaps before all had come
                came -= {*self._missing("here", came)} - gave_up.keys()
            others = sorted(came - {self.rank})
            if not self._wait("end", others, None):
                self.unanswered.update(self._missing("end", others))
            ends = self._answers("end", set(others) - self.unanswered)
        except StoreLostError as error:
            self.secondary.append(str(error))
            with contextlib.suppress(StoreLostError):
                self.channel.reopen()
                self._tell_end(state)
            return {self.rank: state}
        self._note_failures(ends)
        self.unanswered.discard(self.rank)
        self.secondary += [text for end in ends.values() for text in end["secondary"]]
        return {self.rank: state, **{rank: end["state"] for rank, end in ends.items()}}

    def _give_up(self, why: str) -> None:
        """Aborts the round on a foreign exception, unless all ranks have agreed before."""
        self.failures[self.rank] = why
        if not self._refuse():
            state = self._undo()
            with contextlib.suppress(StoreLostError):
                self._tell_end(state)

    def _lose(self, error: StoreLostError) -> dict[int, RankState]:
        """Undoes this rank's steps without the store; tells the others if the store takes that."""
        self.failures.setdefault(self.rank, f"{error}; this rank does not know what the others did")
        with contextlib.suppress(StoreLostError):
            self.channel.reopen()
        if self._refuse():  # the others do not undo
            return {self.rank: "not_undone"}
        state = self._undo()
        with contextlib.suppress(StoreLostError):
            self._tell_end(state)
        return {self.rank: state}

    def _refuse(self) -> bool:
        """Decides against the round if it is open; returns whether the group makes it."""
        with contextlib.suppress(StoreLostError):
            if self.number < 0:
                self._find_number()
            why = self.failures[self.rank]
            return bool(self._decide({"commit": False, "gave_up": {self.rank: why}})["commit"])
        return False

    def _tell_end(self, state: RankState) -> None:
        if self.number >= 0:
            self.channel.put(self._key("end", self.rank), self._end(state))

    def _end(self, state: RankState) -> dict[str, Any]:
        failure = self.failures.get(self.rank)
        return {"failure": failure, "state": state, "secondary": self.secondary}

    def _undo(self) -> RankState:
        """Undoes this rank's steps, last first; returns the state that is left."""
        for step in reversed(self.done):
            try:
                step.undo()
            except Exception as error:  # told to all ranks; the other steps go on
                _logger.debug("%s could not be undone", self.operation, exc_info=True)
                self.secondary.append(f"rank {self.rank}: {type(error).__name__}: {error}")
        if not all(step.undone() for step in self.done):
            return "not_undone"
        return "contents_lost" if self._lost_tags() else "unchanged"

    def _lost_tags(self) -> tuple[str, ...]:
        return tuple(tag for step in self.done for tag in step.lost_tags)

    def _error(self, states: Mapping[int, RankState]) -> DistributedTransitionError:
        failures = dict(sorted(self.failures.items()))
        unanswered = tuple(sorted(self.unanswered))
        advice = "repair the named ranks, then repeat the call on all ranks"
        lines = [f"{self.operation} was made on none of {self.size} ranks"]
        lines += [f"rank {rank}: {reason}" for rank, reason in failures.items()]
        if unanswered:
            names = ", ".join(map(str, unanswered))
            lines.append(f"no answer within {self.timeout:g} s from rank {names}")
        if not failures and not unanswered:
            lines.append("the others gave up before this rank came")
        stuck = [rank for rank, state in sorted(states.items()) if state == "not_undone"]
        if stuck:
            lines.append(
                f"rank {', '.join(map(str, stuck))} could not go back, and is in between: "
                "wake_up() or sleep() of its allocator takes it on"
            )
        lost = self._lost_tags()
        if lost:
            lines.append(f"this rank has lost the contents of {', '.join(map(repr, lost))}")
        return DistributedTransitionError(
            "; ".join([*lines, *self.secondary, advice]),
            operation=self.operation,
            rank=self.rank,
            failures=failures,
            unanswered=unanswered,
            states=dict(sorted(states.items())),
            lost_tags=lost,
            secondary=tuple(self.secondary),
            advice=advice,
        )

    # ---- keys

    @property
    def _decision(self) -> str:
        return f"{self.number}/decision"

    def _key(self, phase: str, rank: int) -> str:
        return f"{self.number}/{phase}/{rank}"

    def _own_keys(self, number: int) -> list[str]:
        """Returns the keys that this rank may have written in a round."""
        phases = ("here", "vote0", "vote1", "end")
        keys = [f"{number}/{phase}/{self.rank}" for phase in phases]
        return [*keys, f"{number}/decision"] if self.rank == 0 else keys

    def _wait(self, phase: str, ranks: Sequence[int], decision: str | None) -> bool:
        """Returns whether all have answered in time; ends early if the round was decided."""
        keys = [self._key(phase, rank) for rank in ranks]
        if not keys:
            return True
        deadline = time.monotonic() + self.timeout
        pause = _FIRST_PAUSE
        while not self.channel.has(keys):
            left = deadline - time.monotonic()
            if left <= 0 or (decision is not None and self.channel.has([decision])):
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        return True

    def _missing(self, phase: str, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if not self.channel.has([self._key(phase, rank)])]

    def _answers(self, phase: str, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        return {rank: self.channel.get(self._key(phase, rank)) for rank in sorted(ranks)}

    def _note_failures(self, answers: Mapping[int, dict[str, Any]]) -> None:
        for rank, answer in answers.items():
            if answer["failure"] is not None:
                self.failures[rank] = str(answer["failure"])
