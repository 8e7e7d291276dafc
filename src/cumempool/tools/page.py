"""Renders a snapshot or a trace to one self-contained HTML page, or for torch's visualizer."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cumempool._pool.report import format_bytes
from cumempool.errors import InvalidArgumentError

_SNAPSHOT: Final = "cumempool snapshot 1"
_TRACE: Final = "cumempool trace 1"


@dataclass(frozen=True, slots=True)
class Record:
    """The contents of a file.

    Attributes:
        title: Its kind, process and time.
        allocations: Allocations of a snapshot; empty for a trace.
        events: Events, oldest first.
        stats: Statistics of a snapshot, or None.
        error: The out-of-memory error that caused the snapshot, or ``""``.
    """

    title: str
    allocations: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    stats: Mapping[str, Any] | None
    error: str


def load(path: Path) -> Record:
    """Reads a snapshot (`CuMemAllocator.save_snapshot`) or a trace (`CuMemAllocator.record`).

    Raises:
        InvalidArgumentError: The file holds neither.
        OSError: The file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() or [""]
        first = json.loads(lines[0])
        form = first.get("format") if isinstance(first, dict) else ""
        if form == _TRACE:
            events = [json.loads(line) for line in lines[1:]]
            return Record(_title(first, "Trace"), (), events, None, "")
        if form == _SNAPSHOT:
            return Record(
                _title(first, "Snapshot"),
                first["allocations"],
                first["events"],
                first["stats"],
                str(first.get("error", "")),
            )
    except (ValueError, KeyError) as error:
        raise InvalidArgumentError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    raise InvalidArgumentError(
        f"{path} is neither a snapshot nor a trace of cumempool",
        advice="make one with cumempool snapshot, CuMemAllocator.save_snapshot() or record()",
    )


def _title(first: Mapping[str, Any], kind: str) -> str:
    when = datetime.fromtimestamp(first["time"], timezone.utc)
    return f"{kind} of process {first['process']}, {when:%Y-%m-%d %H:%M:%S} UTC"


# ---- HTML ----------------------------------------------------------------------------------------

_PAGE: Final = Path(__file__).with_name("page.html")


def _tag_rows(allocations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for one in allocations:
        row = rows.setdefault(
            one["tag"],
            dict.fromkeys(
                ("count", "awake", "backed_up", "discarded", "requested", "lost", "stranded"), 0
            )
            | {"name": one["tag"], "tier": "-"},
        )
        row["count"] += 1
        row[one["state"]] += one["bytes"]
        row["requested"] += one["requested_bytes"]
        row["lost"] += one["bytes"] - one["requested_bytes"]
        row["stranded"] += one.get("cached_bytes", 0)
        row["tier"] = one["backup_tier"] or row["tier"]
    return [rows[tag] for tag in sorted(rows)]


def _event_rows(events: Sequence[Mapping[str, Any]], link: float) -> list[dict[str, Any]]:
    begin = events[0]["time"] if events else 0.0
    rows = []
    for event in events:
        report = event["report"] or {}
        rate = report.get("gb_per_s", 0.0)
        rows.append(
            {
                "at": f"{event['time'] - begin:.2f} s",
                "operation": event["operation"],
                "took": f"{event['seconds'] * 1e3:.1f} ms",
                "error": event["error"],
                "freed": report.get("bytes_freed", 0),
                "mapped": report.get("bytes_mapped", 0),
                "copied": report.get("bytes_restored", 0)
                + report.get("bytes_backed_up", 0)
                - report.get("bytes_clean", 0),
                "clean": report.get("bytes_clean", 0),
                "rate": f"{rate:.1f}" if rate else "-",
                "share": f"{rate / link:.0%}" if rate and link else "-",
            }
        )
    return rows


def _size(count: int) -> str:
    return format_bytes(count) if count else "-"


def to_html(record: Record, *, link_gb_per_s: float | None = None) -> str:
    """Returns one page with tables and pictures inside; it loads nothing.

    Args:
        record: The result of `load`.
        link_gb_per_s: The rate of the link between device and backup, in 1e9 bytes per second. None
            compares with the fastest transition of the record.
    """
    from cumempool.tools import plots

    rates = [event["report"]["gb_per_s"] for event in record.events if event["report"]]
    link = link_gb_per_s or max(rates, default=0.0)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["size"] = _size
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        title=record.title,
        error=record.error,
        tags=_tag_rows(record.allocations),
        events=_event_rows(record.events, link),
        link_name="the link" if link_gb_per_s else "the fastest",
        # matplotlib escapes the names of tags.
        address_map=Markup(plots.svg(plots.address_map(record.allocations))),
        memory_over_time=Markup(plots.svg(plots.memory_over_time(record.events))),
    )


# ---- torch's memory visualizer -------------------------------------------------------------------


def to_torch(record: Record) -> bytes:
    """Returns a pickle for torch's memory visualizer, as ``torch.cuda.memory._dump_snapshot`` does.

    Each allocation is a segment with one block, inactive if it sleeps; its tag is the innermost
    frame.
    """
    segments = [_segment(one) for one in sorted(record.allocations, key=lambda o: o["address"])]
    devices = 1 + max((one["device"] for one in record.allocations), default=0)
    traces: list[list[dict[str, Any]]] = [[] for _ in range(devices)]
    return pickle.dumps({"segments": segments, "device_traces": traces})


def _segment(one: Mapping[str, Any]) -> dict[str, Any]:
    awake = one["state"] == "awake"
    frames = [{"filename": f"tag {one['tag']}", "line": 0, "name": one["state"]}]
    block = {
        "address": one["address"],
        "size": one["bytes"],
        "requested_size": one["requested_bytes"],
        "state": "active_allocated" if awake else "inactive",
        "frames": frames,
    }
    return {
        "device": one["device"],
        "address": one["address"],
        "total_size": one["bytes"],
        "allocated_size": one["bytes"] if awake else 0,
        "active_size": one["bytes"] if awake else 0,
        "requested_size": one["requested_bytes"],
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": frames,
        "blocks": [block],
    }
