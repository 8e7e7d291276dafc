"""Makes the local transitions of a rank, each with its undo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cumempool._pool.report import TransitionReport
from cumempool._pool.scope import refuse_open_scopes
from cumempool._pool.tags import DISCARD, OFFLOAD
from cumempool.allocator import CuMemAllocator
from cumempool.errors import InUseError


@dataclass(frozen=True, slots=True)
class Step:
    """One local transition and its undo."""

    run: Callable[[], TransitionReport]
    undo: Callable[[], object]
    undone: Callable[[], bool]
    lost_tags: tuple[str, ...] = ()  # the undo does not restore their contents


def _has_none(allocator: CuMemAllocator, tags: Iterable[str], state: str) -> bool:
    """Returns whether no allocation of the tags is in a state, ``"awake"`` or ``"asleep"``."""
    known = allocator.stats().tags
    return not any(_count_by_state(known[tag])[state] for tag in tags if tag in known)


def _count_by_state(tag: Any) -> dict[str, int]:
    asleep = tag.backed_up_allocations + tag.discarded_allocations
    return {"awake": tag.awake_allocations, "asleep": asleep}


def _tags_wholly(
    operation: str, allocator: CuMemAllocator, tags: Iterable[str], state: str
) -> list[str]:
    """Returns the tags that have memory in a state; all their memory must be in it.

    An undo works on whole tags: it would wake too much of a tag that slept in part before.
    """
    known = allocator.stats().tags
    chosen = []
    for tag in tags:
        allocator._state.tags.check_known(tag, operation)
        if tag not in known or not (counts := _count_by_state(known[tag]))[state]:
            continue
        if min(counts.values()):
            raise InUseError(
                f"{operation}: tag {tag!r} is partly awake ({counts['awake']} allocations) and "
                f"partly asleep ({counts['asleep']}), and the change could not be undone; call "
                "sleep() or wake_up() of the allocator first",
                operation=operation,
                tag=tag,
            )
        chosen.append(tag)
    return chosen


def _refuse_pinned(operation: str, allocator: CuMemAllocator, tags: Iterable[str]) -> None:
    """Raises if the tags cannot be discarded, before another rank has discarded anything."""
    known = allocator.stats().tags
    refuse_open_scopes(allocator._state, operation, tags)
    for tag in tags:
        if known[tag].pins or known[tag].backing == "cuda_malloc":
            why = f"has {known[tag].pins} pins" if known[tag].pins else "is of cudaMalloc memory"
            raise InUseError(
                f"{operation}: tag {tag!r} {why} and cannot sleep", operation=operation, tag=tag
            )


def _tags_to_lose(allocator: CuMemAllocator, tags: Iterable[str]) -> tuple[str, ...]:
    """Returns the awake tags whose contents a discard would lose."""
    known = allocator.stats().tags
    return tuple(tag for tag in tags if known[tag].awake_bytes > known[tag].preserved_bytes)


def sleep_steps(allocator: CuMemAllocator, actions: Mapping[str, int]) -> list[Step]:
    """Returns the steps of a sleep: first the backups, which can be undone, then the discards."""
    keep = [tag for tag, action in actions.items() if action == OFFLOAD]
    drop = [tag for tag, action in actions.items() if action == DISCARD]
    steps = [_sleep_step(allocator, keep, keep)] if keep else []
    return [*steps, _sleep_step(allocator, drop, [])] if drop else steps


def _sleep_step(allocator: CuMemAllocator, tags: list[str], kept: list[str]) -> Step:
    touched = _tags_wholly("sleep", allocator, tags, "awake")
    if not kept:
        _refuse_pinned("sleep", allocator, touched)
    return Step(
        run=lambda: allocator.sleep(offload_tags=kept, tags=tags),
        undo=lambda: allocator.wake_up(touched),
        undone=lambda: _has_none(allocator, touched, "asleep"),
        lost_tags=() if kept else _tags_to_lose(allocator, touched),
    )


def wake_steps(allocator: CuMemAllocator, tags: Sequence[str] | str | None) -> list[Step]:
    """Returns one step, whose undo puts to sleep again what it has woken."""
    known = allocator.stats().tags
    named = list(known) if tags is None else [tags] if isinstance(tags, str) else list(tags)
    touched = _tags_wholly("wake_up", allocator, named, "asleep")
    # Preserved memory inside a discarded tag is backed up again by either sleep of the tag.
    backed_up = {i.tag for i in allocator.snapshot() if i.state == "backed_up" and not i.preserved}
    kept = [tag for tag in touched if tag in backed_up]
    return [
        Step(
            run=lambda: allocator.wake_up(named),
            undo=lambda: allocator.sleep(offload_tags=kept, tags=touched),
            undone=lambda: _has_none(allocator, touched, "awake"),
        )
    ]


def discard_steps(allocator: CuMemAllocator, tags: Sequence[str] | str) -> list[Step]:
    """Returns one step, whose undo wakes what was awake, without its contents."""
    named = [tags] if isinstance(tags, str) else list(tags)
    known = allocator.stats().tags
    touched = _tags_wholly("discard", allocator, named, "awake")
    _refuse_pinned("discard", allocator, touched)
    backed_up = [tag for tag in named if known[tag].backed_up_bytes > known[tag].preserved_bytes]
    return [
        Step(
            run=lambda: allocator.discard(named),
            undo=lambda: allocator.wake_up(touched),
            undone=lambda: _has_none(allocator, touched, "asleep"),
            lost_tags=(*_tags_to_lose(allocator, touched), *backed_up),
        )
    ]
