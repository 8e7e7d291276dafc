"""Decides whether a sleep backs a tag up or discards it: by the call, or by the tag's policy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from cumempool._pool.stats import TagStats, stats_of
from cumempool._pool.tags import DISCARD, OFFLOAD, ON_SLEEP, check_tags
from cumempool.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cumempool import _core

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ACTION_NAMES: Final = {OFFLOAD: "offload", DISCARD: "discard"}


def takes_offload_tags_first(function: _Function) -> _Function:
    """Makes a function also accept ``f(x, offload_tags, tags=...)``, with a warning.

    `offload_tags` was once the first argument. A positional second argument beside ``tags=`` can
    mean nothing else.
    """

    @functools.wraps(function)
    def call(*given: Any, **kwargs: Any) -> Any:
        args = list(given)
        if len(args) == 2 and "tags" in kwargs and "offload_tags" not in kwargs:
            warnings.warn(
                f"{function.__name__}(X, tags=Y): the first argument is `tags`, as that of "
                "wake_up(); write offload_tags=X",
                DeprecationWarning,
                stacklevel=2,
            )
            kwargs["offload_tags"] = args.pop()
        return function(*args, **kwargs)

    return cast(_Function, call)


def plan_sleep(
    core: _core.Allocator,
    tags: Sequence[str] | str | None,
    offload_tags: Sequence[str] | str | None,
) -> tuple[dict[str, int], dict[str, str]]:
    """Returns the action for each tag, and the policies that it overrules."""
    named = None if tags is None else check_tags(tags, "tags")
    known = stats_of(core).tags
    if offload_tags is None:
        # Contents are lost only on request, by the call or by a policy.
        return {
            tag: (ON_SLEEP[known[tag].on_sleep] if tag in known else 0) or OFFLOAD
            for tag in (known if named is None else named)
        }, {}
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
    """As `plan_sleep`, but discards every tag."""
    actions = dict.fromkeys(check_tags(tags, "tags"), DISCARD)
    return actions, _overrides(actions, stats_of(core).tags)


def _overrides(actions: Mapping[str, int], known: Mapping[str, TagStats]) -> dict[str, str]:
    """Returns how the actions differ from the tags' own policies, for each tag that differs."""
    return {
        tag: f"policy {known[tag].on_sleep}, call {_ACTION_NAMES[action]}"
        for tag, action in actions.items()
        if tag in known and known[tag].on_sleep not in (None, _ACTION_NAMES[action])
    }
