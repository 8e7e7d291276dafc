"""Makes tensors of exactly the requested size, each with an allocation of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Final

from cumempool._pool.scope import current_scope
from cumempool._pool.state import PoolState
from cumempool._pool.tags import DEFAULT_TAG
from cumempool._pool.torch_state import with_room
from cumempool.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
)

if TYPE_CHECKING:
    import torch

LARGEST: Final = 2**62  # bytes; the limit of the core, and of torch's sizes and strides


def check_tensor(tensor: object) -> torch.Tensor:
    """Returns the argument, which must be a tensor."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"a torch.Tensor is needed, not {type(tensor).__name__}")
    return tensor


def memory_of(tensor: object) -> int:
    """Returns the address of a tensor's storage; 0 if it has no elements."""
    try:
        return check_tensor(tensor).untyped_storage().data_ptr()
    except RuntimeError as error:  # such as sparse tensors, which do not view one storage
        raise NotInPoolError(f"the tensor has no memory of its own: {error}") from None


def _check_shape(size: tuple[int | Sequence[int], ...]) -> tuple[int, ...]:
    """Returns a shape, given as one sequence or as integers."""
    given: Sequence[object] = size
    if len(size) == 1 and isinstance(size[0], Sequence):
        given = size[0]
    for extent in given:
        if isinstance(extent, bool) or not isinstance(extent, Integral):
            raise InvalidTypeError(f"a shape is made of integers, not {extent!r}")
    shape = tuple(int(extent) for extent in given if isinstance(extent, Integral))
    if shape and min(shape) < 0:
        raise InvalidArgumentError(f"a shape cannot be negative: {min(shape)}")
    return shape


def empty_tensor(
    state: PoolState,
    size: tuple[int | Sequence[int], ...],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    tag: str | None,
) -> torch.Tensor:
    """Makes the tensor for `CuMemAllocator.empty`."""
    import torch

    from cumempool import _torch

    shape = _check_shape(size)
    dtype = dtype if dtype is not None else torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        raise InvalidTypeError(f"dtype is a torch.dtype or None, not {dtype!r}")
    if not state.enabled:
        ordinary = "cpu" if state.driver == "host" else device or "cuda"
        return torch.empty(shape, dtype=dtype, device=ordinary)
    scope = current_scope(state)
    if tag is None:
        tag = DEFAULT_TAG if scope is None else scope.tag
    state.tags.declare(tag)
    preserved = scope is not None and scope.preserves and scope.tag == tag
    ordinal, on = state.devices.resolve(device)
    strides = [math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape))]
    span = math.prod(max(n, 1) for n in shape) * dtype.itemsize
    if span > LARGEST:
        raise InvalidArgumentError(f"a shape of {span} bytes cannot be allocated", tag=tag)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=on)
    memory = _allocate(state, tag, ordinal, span, preserved)
    return _torch.tensor_over(memory.untyped_storage(), dtype, shape, strides, 0)


def empty_bytes(
    state: PoolState, size: int, *, device: torch.device, tag: str, preserved: bool
) -> torch.Tensor:
    """Makes a tensor of a number of bytes, whatever scopes are open."""
    state.tags.declare(tag)
    state.has_preserved = state.has_preserved or preserved
    return _allocate(state, tag, state.devices.resolve(device)[0], size, preserved)


def _allocate(state: PoolState, tag: str, device: int, size: int, preserved: bool) -> torch.Tensor:
    from cumempool import _torch

    state.before_tensors()
    try:
        capsule = with_room(
            state.driver, lambda: state.core.malloc_capsule(tag, device, size, preserved)
        )
    except OutOfMemoryError as error:
        state.observer.note_failure("malloc", error)
        raise
    return _torch.from_capsule(capsule)
