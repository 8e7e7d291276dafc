"""Reports transitions, per tag and in total: bytes, seconds and copy rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_UNITS = ("KiB", "MiB", "GiB", "TiB")

# Field of a report -> its name in a line of text.
_BYTE_FIELDS = {
    "bytes_freed": "freed",
    "bytes_mapped": "mapped",
    "bytes_backed_up": "backed up",
    "bytes_clean": "clean",
    "bytes_restored": "restored",
    "bytes_discarded": "discarded",
    "bytes_zeroed": "zeroed",
}
# Field of a report -> field of a row of the C interface: "bytes_freed" -> "freed_bytes".
_ROW_FIELD = {field: f"{field.removeprefix('bytes_')}_bytes" for field in _BYTE_FIELDS}


def format_bytes(count: int) -> str:
    """Formats a number of bytes for people, in binary units: ``"14.96 GiB"``, ``"512 bytes"``."""
    if abs(count) < 1024:
        return f"{count} bytes"
    value, (unit, *larger) = count / 1024, _UNITS
    while abs(value) >= 1024 and larger:
        value, (unit, *larger) = value / 1024, larger
    return f"{value:.2f} {unit}"


def _rate(copied_bytes: int, seconds: float) -> float:
    return copied_bytes / seconds / 1e9 if copied_bytes and seconds > 0.0 else 0.0


def _amounts(report: TagReport | TransitionReport) -> str:
    amounts = [(getattr(report, field), verb) for field, verb in _BYTE_FIELDS.items()]
    return ", ".join(f"{verb} {format_bytes(count)}" for count, verb in amounts if count)


@dataclass(frozen=True, slots=True)
class TagReport:
    """The effect of one transition on the allocations of one tag, on all devices together.

    Attributes:
        tag: The tag.
        devices: Ordinals of the devices concerned, ascending.
        allocations: Allocations that changed state.
        bytes_freed: Device memory released to the driver.
        bytes_mapped: Device memory taken from the driver.
        bytes_backed_up: Bytes that the backup holds now: copied, or clean.
        bytes_clean: The part of them kept without a copy, because a retained backup had it.
        bytes_restored: Bytes copied from the backup to the device.
        bytes_discarded: Bytes dropped without a copy: discarded allocations, and dead ranges of
            allocations that were backed up.
        bytes_zeroed: Bytes filled with zero.
        seconds: Copy time, summed over the devices, which copy concurrently.
    """

    tag: str
    devices: tuple[int, ...] = ()
    allocations: int = 0
    bytes_freed: int = 0
    bytes_mapped: int = 0
    bytes_backed_up: int = 0
    bytes_clean: int = 0
    bytes_restored: int = 0
    bytes_discarded: int = 0
    bytes_zeroed: int = 0
    seconds: float = 0.0

    @property
    def bytes_dirty(self) -> int:
        """Bytes copied from the device to the backup."""
        return self.bytes_backed_up - self.bytes_clean

    @property
    def bytes_copied(self) -> int:
        """Bytes copied in either direction."""
        return self.bytes_dirty + self.bytes_restored

    @property
    def gb_per_s(self) -> float:
        """Copied bytes over copy time, in 1e9 bytes per second; 0.0 if nothing was copied.

        Devices copy concurrently, so this is the mean of their rates, weighted by time.
        """
        return _rate(self.bytes_copied, self.seconds)

    def to_dict(self) -> dict[str, object]:
        """Returns all fields and the rate, as types that ``json.dumps`` accepts."""
        return {
            "tag": self.tag,
            "devices": list(self.devices),
            "allocations": self.allocations,
            **{field: getattr(self, field) for field in _BYTE_FIELDS},
            "seconds": self.seconds,
            "gb_per_s": self.gb_per_s,
        }

    def __str__(self) -> str:
        """Returns one line."""
        plural = "" if self.allocations == 1 else "s"
        parts = [f"{self.tag}: {self.allocations} allocation{plural}"]
        if self.devices:
            numbers = ", ".join(map(str, self.devices))
            parts[0] += f" on device{'' if len(self.devices) == 1 else 's'} {numbers}"
        if amounts := _amounts(self):
            parts.append(amounts)
        if self.bytes_copied:
            parts.append(f"copies {self.seconds * 1e3:.1f} ms at {self.gb_per_s:.1f} GB/s")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class TransitionReport:
    """The effect of one transition. ``str()`` has one line per tag.

    Attributes:
        operation: ``"sleep"``, ``"wake_up"``, ``"swap"`` or ``"discard"``.
        seconds: Wall time of the whole transition, including the wait for work in flight.
        tags: One `TagReport` per tag that the transition covered; read-only.
        overrides: Tag -> how the call overruled the tag's own policy; read-only.
        problems: Failures that did not stop the transition. The statistics count the memory
            concerned.
    """

    operation: str
    seconds: float
    tags: Mapping[str, TagReport]
    overrides: Mapping[str, str]
    problems: tuple[str, ...]

    def __post_init__(self) -> None:
        """Makes the mappings read-only copies."""
        object.__setattr__(self, "tags", MappingProxyType(dict(self.tags)))
        object.__setattr__(self, "overrides", MappingProxyType(dict(self.overrides)))
        object.__setattr__(self, "problems", tuple(self.problems))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles plain dicts, because mapping proxies cannot be pickled; workers send reports."""
        fields = (
            self.operation,
            self.seconds,
            dict(self.tags),
            dict(self.overrides),
            self.problems,
        )
        return (type(self), fields)

    @classmethod
    def from_rows(
        cls,
        operation: str,
        seconds: float,
        rows: Sequence[Mapping[str, Any]],
        problems: Sequence[str] = (),
        overrides: Mapping[str, str] = MappingProxyType({}),
    ) -> TransitionReport:
        """Makes a report from C rows (``cumempool_report_row``), one per tag and device.

        Args:
            operation: ``"sleep"``, ``"wake_up"``, ``"swap"`` or ``"discard"``.
            seconds: Wall time of the transition.
            rows: Mappings with ``tag``, ``device``, ``allocations``, ``freed_bytes``,
                ``mapped_bytes``, ``backed_up_bytes``, ``clean_bytes``, ``restored_bytes``,
                ``discarded_bytes``, ``zeroed_bytes`` and ``copy_seconds``. Rows of one tag are
                summed.
            problems: Failures that did not stop the transition.
            overrides: Tag -> how the call overruled the tag's own policy.
        """
        rows_of_tag: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            rows_of_tag.setdefault(row["tag"], []).append(row)
        tags = {tag: _tag_report(tag, of_tag) for tag, of_tag in rows_of_tag.items()}
        return cls(operation, seconds, tags, overrides, tuple(problems))

    @property
    def bytes_freed(self) -> int:
        """Device memory released to the driver, all tags."""
        return sum(tag.bytes_freed for tag in self.tags.values())

    @property
    def bytes_mapped(self) -> int:
        """Device memory taken from the driver, all tags."""
        return sum(tag.bytes_mapped for tag in self.tags.values())

    @property
    def bytes_backed_up(self) -> int:
        """Bytes that backups hold now, copied or clean, all tags."""
        return sum(tag.bytes_backed_up for tag in self.tags.values())

    @property
    def bytes_clean(self) -> int:
        """The part of them kept without a copy, all tags."""
        return sum(tag.bytes_clean for tag in self.tags.values())

    @property
    def bytes_dirty(self) -> int:
        """Bytes copied from the device to the backup, all tags."""
        return sum(tag.bytes_dirty for tag in self.tags.values())

    @property
    def bytes_copied(self) -> int:
        """Bytes copied in either direction, all tags."""
        return sum(tag.bytes_copied for tag in self.tags.values())

    @property
    def bytes_restored(self) -> int:
        """Bytes copied from the backup to the device, all tags."""
        return sum(tag.bytes_restored for tag in self.tags.values())

    @property
    def bytes_discarded(self) -> int:
        """Bytes given up without a copy, all tags."""
        return sum(tag.bytes_discarded for tag in self.tags.values())

    @property
    def bytes_zeroed(self) -> int:
        """Bytes filled with zero, all tags."""
        return sum(tag.bytes_zeroed for tag in self.tags.values())

    @property
    def gb_per_s(self) -> float:
        """Copied bytes over copy time, all tags, in 1e9 bytes per second; 0.0 without copies."""
        return _rate(self.bytes_copied, sum(tag.seconds for tag in self.tags.values()))

    def to_dict(self) -> dict[str, object]:
        """Returns totals, tags, overrides, problems, as types that ``json.dumps`` accepts."""
        return {
            "operation": self.operation,
            "seconds": self.seconds,
            **{field: getattr(self, field) for field in _BYTE_FIELDS},
            "gb_per_s": self.gb_per_s,
            "tags": {tag: report.to_dict() for tag, report in self.tags.items()},
            "overrides": dict(self.overrides),
            "problems": list(self.problems),
        }

    def __str__(self) -> str:
        """Returns the totals, then one line per tag, override and problem."""
        amounts = _amounts(self) or "nothing changed"
        lines = [f"{self.operation}: {amounts} in {self.seconds * 1e3:.1f} ms"]
        lines += [f"  {report}" for report in self.tags.values()]
        lines += [f"  override, {tag}: {text}" for tag, text in self.overrides.items()]
        lines += [f"  problem: {text}" for text in self.problems]
        return "\n".join(lines)


def _tag_report(tag: str, rows: Sequence[Mapping[str, Any]]) -> TagReport:
    return TagReport(
        tag=tag,
        devices=tuple(sorted({row["device"] for row in rows if row["device"] >= 0})),
        allocations=sum(row["allocations"] for row in rows),
        seconds=sum((row["copy_seconds"] for row in rows), 0.0),
        **{field: sum(row[_ROW_FIELD[field]] for row in rows) for field in _BYTE_FIELDS},
    )
