"""Finds whether torch's expandable segments are on: from the live allocator or the environment."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

#: The variables that torch reads its allocator's settings from, in torch's order (seen with 2.13;
#: its documentation may give other priorities). Only the first that is set counts, even if empty.
ALLOCATOR_VARIABLES: Final = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
_OPTION: Final = "expandable_segments"
_ON: Final = frozenset({"true", "1", "yes", "on"})
_OFF: Final = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True)
class ExpandableSegments:
    """Whether torch's allocator grows its segments by mapping pages.

    Attributes:
        on: True or False; None if the setting has a value that is neither.
        source: The setting that says so, as text for people.
    """

    on: bool | None
    source: str


def _option_of(text: str) -> str | None:
    """Returns the last value of the option in a settings string, in lower case, or None."""
    found = None
    # Options may list values in brackets; none of those matters here.
    for option in re.sub(r"\[[^\]]*\]?|\s", "", text).casefold().split(","):
        name, _, value = option.partition(":")
        if name == _OPTION:
            found = value
    return found


def _switch(value: str) -> bool | None:
    return True if value in _ON else False if value in _OFF else None


def _first_set(variables: Mapping[str, object]) -> tuple[str, str] | None:
    for name in ALLOCATOR_VARIABLES:
        text = variables.get(name)
        if isinstance(text, str):
            return name, text
    return None


def expandable_segments(
    environ: Mapping[str, str] | None = None, live: Mapping[str, Any] | None = None
) -> ExpandableSegments:
    """Returns whether torch's expandable segments are on, and the setting that says so.

    Spaces and case do not matter. ``true``, ``1``, ``yes`` and ``on`` are the same. The last value
    of a repeated option counts. The first of `ALLOCATOR_VARIABLES` that is set counts.

    Args:
        environ: The variables; None means ``os.environ``.
        live: The settings that the allocator runs with, which overrule the variables:
            ``torch.cuda.memory._snapshot()["allocator_settings"]``. None asks torch if this
            process uses CUDA; an empty mapping means none.
    """
    live = _live_settings() if live is None else live
    setting = live.get(_OPTION)
    if setting is not None:
        on = setting if isinstance(setting, bool) else _switch(str(setting).strip().casefold())
        return ExpandableSegments(on, f"the live allocator setting {_OPTION}={setting}")
    found, prefix = _first_set(live), "the live allocator setting "
    if found is None:
        found, prefix = _first_set(os.environ if environ is None else environ), ""
    if found is None:
        return ExpandableSegments(False, "no allocator variable is set")
    name, text = found
    value = _option_of(text)
    on = False if value is None else _switch(value)
    return ExpandableSegments(on, f"{prefix}{name}={text!r}")


def _live_settings() -> Mapping[str, Any]:
    if "torch" not in sys.modules:
        return {}
    from cumempool import _torch

    return _torch.live_settings() if _torch.is_initialized() else {}
