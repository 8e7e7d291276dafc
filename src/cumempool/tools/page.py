"""Renders a snapshot or a trace to one HTML page that needs nothing else, and to other formats."""

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
    """What was read from a file.

    Attributes:
        title: What it is of.
        allocations: Allocations of a snapshot; empty for a trace.
        events: Events, oldest first.
        stats: Statistics of a snapshot, or None.
        error: What memory ran out with, or ``""``.
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
        OSError: It cannot be read.
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

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right; }
th, td { white-space: nowrap; } td.error { white-space: normal; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
.wide { overflow-x: auto; } svg { width: 100%; height: auto; } .error { color: #b00020; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if error %}<p class="error" id="error">{{ error }}</p>{% endif %}
{% if tags %}
<h2>Tags</h2>
<div class="wide"><table id="tags">
<tr><th>tag</th><th>allocations</th><th>awake</th><th>backed up</th><th>discarded</th>
<th>asked for</th><th>lost to rounding</th><th>cached, unused</th><th class="text">backup</th></tr>
{% for tag in tags %}
<tr><td>{{ tag.name }}</td><td>{{ tag.count }}</td><td>{{ tag.awake | size }}</td>
<td>{{ tag.backed_up | size }}</td><td>{{ tag.discarded | size }}</td>
<td>{{ tag.requested | size }}</td><td>{{ tag.lost | size }}</td><td>{{ tag.stranded | size }}</td>
<td class="text">{{ tag.tier }}</td></tr>
{% endfor %}
</table></div>
<h2>Address map</h2>
<div id="map">{{ address_map }}</div>
{% endif %}
{% if events %}
<h2>Memory over time</h2>
<div id="time">{{ memory_over_time }}</div>
<h2>Transitions</h2>
<div class="wide"><table id="transitions">
<tr><th>at</th><th class="text">what</th><th>took</th><th>freed</th><th>mapped</th><th>copied</th>
<th>clean</th><th>GB/s</th><th>of {{ link_name }}</th></tr>
{% for event in events %}
<tr><td>{{ event.at }}</td><td class="text">{{ event.operation }}</td><td>{{ event.took }}</td>
{% if event.error %}<td class="text error" colspan="6">{{ event.error }}</td>
{% else %}<td>{{ event.freed | size }}</td><td>{{ event.mapped | size }}</td>
<td>{{ event.copied | size }}</td><td>{{ event.clean | size }}</td>
<td>{{ event.rate }}</td><td>{{ event.share }}</td>{% endif %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% if not tags and not events %}<p id="empty">Nothing was allocated, and nothing has happened.</p>
{% endif %}
</body>
</html>
"""


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
    """One page with tables and pictures inside; it loads nothing.

    Args:
        record: What `load` gave.
        link_gb_per_s: What the link between device and backup can do, in 1e9 bytes per second. None
            compares with the fastest transition of the record.
    """
    from cumempool.tools import plots

    rates = [event["report"]["gb_per_s"] for event in record.events if event["report"]]
    link = link_gb_per_s or max(rates, default=0.0)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["size"] = _size
    return environment.from_string(_PAGE).render(
        title=record.title,
        error=record.error,
        tags=_tag_rows(record.allocations),
        events=_event_rows(record.events, link),
        link_name="the link" if link_gb_per_s else "the fastest",
        # Made by matplotlib, which escapes what tags are called.
        address_map=Markup(plots.svg(plots.address_map(record.allocations))),
        memory_over_time=Markup(plots.svg(plots.memory_over_time(record.events))),
    )


# ---- torch's memory visualizer -------------------------------------------------------------------


def to_torch(record: Record) -> bytes:
    """A pickle for torch's memory visualizer, as ``torch.cuda.memory._dump_snapshot`` writes it.

    Each allocation is a segment with one block. What sleeps is there as inactive; its tag is the
    innermost frame.
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
