"""Says whether torch's expandable segments are on: from the live allocator, or the environment."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

#: The variables that torch reads its allocator's settings from, in torch's order (seen with 2.13,
#: whatever its documentation says of priorities). The first one that is set is the only one that
#: counts, even where it is empty.
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
        on: True or False; None where the setting has a value that is neither.
        source: Where that was read, for people.
    """

    on: bool | None
    source: str


def _option_of(text: str) -> str | None:
    """The last value of the option in a settings string, in lower case, or None."""
    found = None
    # Options may list values of their own in brackets; none of those is of interest here.
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
    """Whether torch's expandable segments are on.

    Spaces and case do not matter, ``true``, ``1``, ``yes`` and ``on`` are the same, an option that
    is repeated counts with its last value, and of `ALLOCATOR_VARIABLES` the first that is set is
    the one that counts.

    Args:
        environ: The variables; None is ``os.environ``.
        live: The settings that the allocator runs with, which overrule the variables:
            ``torch.cuda.memory._snapshot()["allocator_settings"]``. None asks torch where this
            process has started to use CUDA; an empty mapping asks nobody.
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
