"""What a sleep does with each tag: back it up or discard it, by the call or by the tag's policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cumempool.errors import InvalidArgumentError
from cumempool.stats import TagStats, stats_of
from cumempool.tags import DEFAULT_TAG, DISCARD, OFFLOAD, ON_SLEEP, check_tags

if TYPE_CHECKING:
    from cumempool import _core

__all__ = ["plan_discard", "plan_sleep"]

_ACTION_NAMES: Final = {OFFLOAD: "offload", DISCARD: "discard"}


def plan_sleep(
    core: _core.Allocator,
    offload_tags: Sequence[str] | str | None,
    tags: Sequence[str] | str | None,
) -> tuple[dict[str, int], dict[str, str]]:
    """What to do with each tag, and which policies that overrules; the core knows the tags."""
    named = None if tags is None else check_tags(tags, "tags")
    known = stats_of(core).tags
    if offload_tags is None:
        actions = {}
        for tag in known if named is None else named:
            policy = ON_SLEEP[known[tag].on_sleep] if tag in known else 0
            kept = tag == DEFAULT_TAG or named is not None
            actions[tag] = policy or (OFFLOAD if kept else DISCARD)
        return actions, {}
    offload = check_tags(offload_tags, "offload_tags")
    if named is not None and not set(offload) <= set(named):
        extra = sorted(set(offload) - set(named))
        raise InvalidArgumentError(f"offload_tags {extra} are not among tags {list(named)}")
    actions = dict.fromkeys(known if named is None else named, DISCARD)
    actions.update(dict.fromkeys(offload, OFFLOAD))
    return actions, _overrides(actions, known)


def plan_discard(
    core: _core.Allocator, tags: Sequence[str] | str
) -> tuple[dict[str, int], dict[str, str]]:
    """As `plan_sleep`, where every tag is discarded."""
    actions = dict.fromkeys(check_tags(tags, "tags"), DISCARD)
    return actions, _overrides(actions, stats_of(core).tags)


def _overrides(actions: Mapping[str, int], known: Mapping[str, TagStats]) -> dict[str, str]:
    """For each tag whose own policy says otherwise than its action, in what way."""
    return {
        tag: f"policy {known[tag].on_sleep}, call {_ACTION_NAMES[action]}"
        for tag, action in actions.items()
        if tag in known and known[tag].on_sleep not in (None, _ACTION_NAMES[action])
    }
