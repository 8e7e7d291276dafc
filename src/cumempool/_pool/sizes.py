"""Sizes that callers give: margins of memory, and shapes of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Final

from cumempool.errors import InvalidArgumentError, InvalidTypeError

LARGEST: Final = 2**62  # bytes; what the core takes, and what fits torch's sizes and strides


def check_margin(margin: object) -> int:
    """A number of bytes that is to stay free."""
    if not isinstance(margin, int) or isinstance(margin, bool):
        raise InvalidTypeError(f"a margin is a number of bytes, not {margin!r}")
    if not 0 <= margin <= LARGEST:
        raise InvalidArgumentError(f"a margin of {margin} bytes does not exist")
    return margin


def check_shape(size: tuple[int | Sequence[int], ...]) -> tuple[int, ...]:
    """A shape, from one sequence or from integers."""
    given: Sequence[object] = size
    if len(size) == 1 and isinstance(size[0], Sequence):
        given = size[0]
    shape = []
    for extent in given:
        if isinstance(extent, bool) or not isinstance(extent, Integral):
            raise InvalidTypeError(f"a shape is made of integers, not {extent!r}")
        count = int(extent)
        if count < 0:
            raise InvalidArgumentError(f"a shape cannot be negative: {count}")
        shape.append(count)
    return tuple(shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
