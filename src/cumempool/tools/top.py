"""Shows a live view of processes that publish their statistics."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cumempool._pool.publishing import Published, published
from cumempool._pool.report import format_bytes

_COLUMNS = ("process", "name", "tag", "awake", "asleep", "backup", "where", "pins")


def _last(one: Published) -> str:
    last = one.stats.get("last_event")
    if not last:
        return ""
    ago = max(time.time() - last["time"], 0.0)
    outcome = f"failed: {last['error']}" if last["error"] else f"{last['seconds'] * 1e3:.1f} ms"
    report = last["report"]
    rate = f", {report['gb_per_s']:.1f} GB/s" if report and report["gb_per_s"] else ""
    return f"{one.process}: {last['operation']} {ago:.0f} s ago, {outcome}{rate}"


def _view(processes: Sequence[Published]) -> Group | Text:
    if not processes:
        return Text(
            "no process publishes its statistics: CuMemConfig(publish=True), or CUMEMPOOL_PUBLISH=1"
        )
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if 3 <= number <= 5 else "left")
    for one in processes:
        for tag in one.stats["tags"].values():
            table.add_row(
                str(one.process),
                one.name,
                tag["tag"],
                format_bytes(tag["awake_bytes"]),
                format_bytes(tag["backed_up_bytes"] + tag["discarded_bytes"]),
                format_bytes(tag["backup_bytes"] + tag["retained_bytes"]),
                tag["backup_tier"],
                str(tag["pins"]),
            )
    lines = [Text(line, style="dim") for line in map(_last, processes) if line]
    return Group(table, *lines)


def run_top(console: Console, *, interval: float, once: bool) -> None:
    """Shows the processes until it is interrupted."""
    if once or not console.is_terminal:
        console.print(_view(published()))
        return
    with Live(_view(published()), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_view(published()), refresh=True)
