"""Defines the sets of tensors that sleep and wake, and the ways to change their contents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench import GIB, MIB

SUMMED_AT_ONCE = 128 * MIB  # elements

Shape = tuple[int, ...]
Empty = Callable[[Shape, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A set of tensors, in order of allocation.

    Attributes:
        name: Its name in the records.
        shapes: The shapes of its bf16 tensors.
        tenth: Indices of whole tensors that make up a tenth of the bytes; () if none do.
        layers: Indices of the matrices of each layer, in order of use.
    """

    name: str
    shapes: tuple[Shape, ...]
    tenth: tuple[int, ...] = ()
    layers: tuple[tuple[int, ...], ...] = ()

    @property
    def bytes(self) -> int:
        return sum(2 * math.prod(shape) for shape in self.shapes)

    def make(self, empty: Empty) -> list[torch.Tensor]:
        return [empty(shape, torch.bfloat16) for shape in self.shapes]

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "tensors": len(self.shapes), "bytes": self.bytes}


def llama8b(small: bool, *, layers_first: bool = False) -> Workload:
    """Returns bf16 embedding, head and 32 layers of an 8B model: 14.96 GiB.

    Embedding and head come first, as users load them; with `layers_first` they come last.
    """
    hidden, inner, vocabulary, count = (64, 224, 2004, 4) if small else (4096, 14336, 128256, 32)
    matrices = ((hidden * 3 // 2, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
    layer = (*matrices, (hidden,), (hidden,))
    ends = ((vocabulary, hidden),) * 2
    layers = layer * count
    start = 0 if layers_first else len(ends)
    firsts = range(start, start + len(layers), len(layer))
    return Workload(
        "llama8b-layers-first" if layers_first else "llama8b",
        (*layers, *ends) if layers_first else (*ends, *layers),
        # The first matrix of every layer: 10.03 % of all bytes.
        tenth=tuple(firsts),
        layers=tuple(tuple(range(first, first + len(matrices))) for first in firsts),
    )


def uniform(name: str, count: int, size: int) -> Workload:
    """Returns equal tensors of `size` bytes; of ten or more, each tenth one is in `tenth`."""
    tenth = tuple(range(0, count, 10)) if count >= 10 else ()
    return Workload(name, ((size // 2,),) * count, tenth=tenth)


def many_small(small: bool) -> Workload:
    return uniform("small", 20 if small else 2000, 3 * MIB)


def few_huge(small: bool) -> Workload:
    return uniform("huge", 4, 16 * MIB if small else 16 * GIB)


# ---- contents ------------------------------------------------------------------------------------


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same bytes as integers, so that sums are exact."""
    return tensor.view(torch.int16).view(-1)


def fill(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        as_integers(tensor).random_()


def total(tensors: Sequence[torch.Tensor]) -> int:
    """Returns the exact sum of all contents as int16."""
    # In pieces: torch converts its input to int64, which is four times as large.
    pieces = (piece for tensor in tensors for piece in as_integers(tensor).split(SUMMED_AT_ONCE))
    return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)


def change_all(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        as_integers(tensor).add_(1)


def change_nothing(tensors: Sequence[torch.Tensor]) -> None:
    """Changes nothing, for a sleep of unchanged contents."""


def change_every_tenth_mib(tensors: Sequence[torch.Tensor]) -> None:
    """Changes one element of every tenth MiB, counted through all tensors."""
    stride, passed = 10 * MIB // 2, 0
    for tensor in tensors:
        integers = as_integers(tensor)
        integers[-passed % stride :: stride].add_(1)
        passed += integers.numel()
