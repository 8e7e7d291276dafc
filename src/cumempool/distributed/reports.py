"""Defines `GroupReport`, and converts the reports that ranks exchange."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from cumempool._pool.report import TagReport, TransitionReport, format_bytes


@dataclass(frozen=True, slots=True)
class GroupReport:
    """The effect of one transition on every rank of a group.

    Attributes:
        operation: ``"sleep"``, ``"wake_up"`` or ``"discard"``.
        seconds: Wall time of the call on this rank, waiting for the others included.
        ranks: Rank of the group -> its report; read-only.
    """

    operation: str
    seconds: float
    ranks: Mapping[int, TransitionReport]

    def __post_init__(self) -> None:
        """Makes the reports read-only."""
        object.__setattr__(self, "ranks", MappingProxyType(dict(self.ranks)))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles a plain dict, since a mapping proxy cannot be pickled."""
        return (type(self), (self.operation, self.seconds, dict(self.ranks)))

    @property
    def bytes_freed(self) -> int:
        """Bytes of device memory given back to the driver, all ranks."""
        return sum(report.bytes_freed for report in self.ranks.values())

    @property
    def bytes_mapped(self) -> int:
        """Bytes of device memory taken from the driver, all ranks."""
        return sum(report.bytes_mapped for report in self.ranks.values())

    @property
    def slowest_seconds(self) -> float:
        """Seconds of the local transition on the slowest rank."""
        return max(report.seconds for report in self.ranks.values())

    @property
    def problems(self) -> tuple[str, ...]:
        """Failures that did not stop the transition, each with its rank."""
        return tuple(
            f"rank {rank}: {problem}"
            for rank, report in self.ranks.items()
            for problem in report.problems
        )

    def to_dict(self) -> dict[str, object]:
        """Returns all of it as types that ``json.dumps`` takes; ranks become strings."""
        return {
            "operation": self.operation,
            "seconds": self.seconds,
            "bytes_freed": self.bytes_freed,
            "bytes_mapped": self.bytes_mapped,
            "ranks": {str(rank): report.to_dict() for rank, report in self.ranks.items()},
        }

    def __str__(self) -> str:
        """Returns one line for all ranks, then the report of each."""
        amounts = [("freed", self.bytes_freed), ("mapped", self.bytes_mapped)]
        text = ", ".join(f"{verb} {format_bytes(count)}" for verb, count in amounts if count)
        lines = [
            f"{self.operation} on {len(self.ranks)} ranks: {text or 'nothing changed'} "
            f"in {self.seconds * 1e3:.1f} ms"
        ]
        for rank, report in self.ranks.items():
            first, *rest = str(report).splitlines()
            lines += [f"  rank {rank}: {first}", *(f"  {line}" for line in rest)]
        return "\n".join(lines)


def to_json(report: TransitionReport) -> dict[str, Any]:
    """Returns a report as types that ``json.dumps`` takes; `joined` converts it back."""
    return {
        "seconds": report.seconds,
        "tags": [asdict(tag) for tag in report.tags.values()],
        "overrides": dict(report.overrides),
        "problems": list(report.problems),
    }


def joined(operation: str, parts: Iterable[Mapping[str, Any]]) -> TransitionReport:
    """Joins the reports of the steps, which concern different tags."""
    tags: dict[str, TagReport] = {}
    overrides: dict[str, str] = {}
    problems: list[str] = []
    seconds = 0.0
    for part in parts:
        seconds += float(part["seconds"])
        for raw in part["tags"]:
            tags[raw["tag"]] = TagReport(**{**raw, "devices": tuple(raw["devices"])})
        overrides.update(part["overrides"])
        problems += part["problems"]
    return TransitionReport(operation, seconds, tags, overrides, tuple(problems))
