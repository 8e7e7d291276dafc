"""Draws a snapshot or trace with matplotlib: the address map, and memory over time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

_UNITS: Final = (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))
_ROWS: Final = 16
#: Colours for colour-blind readers too (Okabe and Ito), one per tag.
_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
_HATCHES: Final = {"awake": "", "backed_up": "///", "discarded": "..."}
_STATES: Final = {"awake": "awake", "backed_up": "asleep, backed up", "discarded": "discarded"}
_MARKS: Final = {"sleep": "v", "wake_up": "^", "swap": "D", "discard": "x", "malloc": "s"}


def _colours(tags: Sequence[str]) -> dict[str, str]:
    return {tag: _COLOURS[number % len(_COLOURS)] for number, tag in enumerate(sorted(set(tags)))}


def _unit(most: int) -> tuple[str, int]:
    """Returns the largest unit that a number of bytes fills."""
    return next((unit for unit in _UNITS if most >= unit[1]), _UNITS[-1])


def address_map(allocations: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws allocations by address without gaps; each row is an equal share of all bytes."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ordered = sorted(allocations, key=lambda one: (one["device"], one["address"]))
    colours = _colours([one["tag"] for one in ordered])
    row = max(-(-sum(one["bytes"] for one in ordered) // _ROWS), 1)
    name, unit = _unit(row)
    position = 0
    for one in ordered:
        end = position + one["bytes"]
        while position < end:
            line, left = divmod(position, row)
            width = min(row - left, end - position)
            axes.add_patch(
                Rectangle(
                    (left / unit, line),
                    width / unit,
                    0.86,
                    facecolor=colours[one["tag"]] if one["state"] == "awake" else "white",
                    edgecolor=colours[one["tag"]],
                    hatch=_HATCHES[one["state"]],
                    linewidth=0.8,
                )
            )
            position += width
    axes.set_xlim(0, row / unit)
    axes.set_ylim(_ROWS, 0)
    axes.set_yticks([])
    axes.set_xlabel(f"{name} of a row; gaps between allocations are left out")
    handles = [Patch(facecolor=colour, label=tag) for tag, colour in colours.items()]
    handles += [
        Patch(facecolor="grey" if not hatch else "white", edgecolor="grey", hatch=hatch, label=text)
        for hatch, text in ((_HATCHES[state], text) for state, text in _STATES.items())
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6))
    return figure


def memory_over_time(events: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws device and host memory after each event, and marks the events."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.add_subplot()
    most = max((max(event["physical_bytes"], event["asleep_bytes"]) for event in events), default=0)
    name, unit = _unit(most)
    begin = events[0]["time"] if events else 0.0
    times = [event["time"] - begin for event in events]
    for field, label, colour in (
        ("physical_bytes", "device memory held", "#0072b2"),
        ("asleep_bytes", "asleep", "#e69f00"),
        ("host_bytes", "pinned host memory", "#009e73"),
    ):
        values = [event[field] / unit for event in events]
        axes.step(times, values, where="post", label=label, color=colour)
    for operation, marker in _MARKS.items():
        chosen = [n for n, event in enumerate(events) if event["operation"] == operation]
        for failed in (False, True):
            points = [n for n in chosen if bool(events[n]["error"]) == failed]
            if points:
                axes.plot(
                    [times[n] for n in points],
                    [events[n]["physical_bytes"] / unit for n in points],
                    marker,
                    color="#d55e00" if failed else "black",
                    label=f"{operation}{' (failed)' if failed else ''}",
                )
    axes.set_xlabel("seconds since the first event")
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    if events:
        figure.legend(loc="outside upper center", ncols=5)
    return figure


def svg(figure: Figure) -> str:
    """Returns the picture as an SVG element, without a prologue."""
    out = io.StringIO()
    # A fixed salt and no date, so that the same snapshot gives the same page.
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
