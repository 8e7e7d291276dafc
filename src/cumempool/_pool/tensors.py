"""Tensors of exactly the size that is asked for, each with an allocation of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from cumempool._pool.scope import current_scope
from cumempool._pool.sizes import LARGEST, check_shape, contiguous_strides
from cumempool._pool.state import PoolState
from cumempool._pool.tags import DEFAULT_TAG
from cumempool._pool.torch_state import with_room
from cumempool.errors import InvalidArgumentError, InvalidTypeError, OutOfMemoryError

if TYPE_CHECKING:
    import torch


def empty_tensor(
    state: PoolState,
    size: tuple[int | Sequence[int], ...],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    tag: str | None,
) -> torch.Tensor:
    """See `CuMemAllocator.empty`."""
    import torch

    from cumempool import _torch

    shape = check_shape(size)
    dtype = dtype if dtype is not None else torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        raise InvalidTypeError(f"dtype is a torch.dtype or None, not {dtype!r}")
    if not state.enabled:
        ordinary = "cpu" if state.driver == "host" else device or "cuda"
        return torch.empty(shape, dtype=dtype, device=ordinary)
    scope = current_scope(state)
    if tag is None:
        tag = DEFAULT_TAG if scope is None else scope.tag
    state.tags.declare(tag, None, None)
    preserved = scope is not None and scope.preserves and scope.tag == tag
    ordinal, on = state.devices.resolve(device)
    span = math.prod(max(extent, 1) for extent in shape) * dtype.itemsize
    if span > LARGEST:
        raise InvalidArgumentError(f"a shape of {span} bytes cannot be allocated", tag=tag)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=on)
    memory = _allocate(state, tag, ordinal, span, preserved)
    return _torch.tensor_over(memory.untyped_storage(), dtype, shape, contiguous_strides(shape), 0)


def empty_like(
    state: PoolState,
    tensor: object,
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    tag: str | None,
) -> torch.Tensor:
    """See `CuMemAllocator.empty_like`."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"a torch.Tensor is needed, not {type(tensor).__name__}")
    if device is None and tensor.device.type == ("cpu" if state.driver == "host" else "cuda"):
        device = tensor.device
    return empty_tensor(state, (tensor.shape,), dtype or tensor.dtype, device, tag)


def copy_of(
    state: PoolState,
    tensor: object,
    device: torch.device | str | int | None,
    tag: str | None,
) -> torch.Tensor:
    """See `CuMemAllocator.from_tensor`."""
    import torch

    if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
        raise InvalidTypeError(f"the tensor has the layout {tensor.layout}, not torch.strided")
    made = empty_like(state, tensor, None, device, tag)
    with torch.no_grad():
        return made.copy_(cast("torch.Tensor", tensor))


def empty_bytes(
    state: PoolState, size: int, *, device: torch.device, tag: str, preserved: bool
) -> torch.Tensor:
    """A tensor of that many bytes, whatever scopes are open."""
    state.tags.declare(tag, None, None)
    state.has_preserved = state.has_preserved or preserved
    return _allocate(state, tag, state.devices.resolve(device)[0], size, preserved)


def _allocate(state: PoolState, tag: str, device: int, size: int, preserved: bool) -> torch.Tensor:
    from cumempool import _torch

    state.before_tensors()
    try:
        capsule = with_room(
            state.driver,
            lambda: state.core.malloc_capsule(tag, device, size, preserved),
        )
    except OutOfMemoryError as error:
        state.observer.note_failure("malloc", error)
        raise
    return _torch.from_capsule(capsule)
