"""The backup of a sleeping tensor, shown as a tensor on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cumempool._pool.checks import check_bool
from cumempool._pool.waking import memory_of
from cumempool.errors import InvalidTypeError

if TYPE_CHECKING:
    import torch

    from cumempool import _core


def view_backup(core: _core.Allocator, tensor: torch.Tensor, writable: bool) -> torch.Tensor:
    """See `CuMemAllocator.read_backup`."""
    check_bool(writable=writable)
    storage = memory_of(tensor)
    if tensor.is_quantized:
        raise InvalidTypeError("a quantized tensor has scales that are not in its memory")
    import torch

    from cumempool import _torch

    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    last = sum(
        (extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    size = tensor.element_size()
    address = storage + int(tensor.storage_offset()) * size
    capsule = core.view_backup(address, (last + 1) * size, writable)
    with torch.inference_mode(False):
        memory = _torch.from_capsule(capsule)
        view = _torch.tensor_over(
            memory.untyped_storage(), tensor.dtype, tensor.shape, tensor.stride(), 0
        )
        view = _torch.with_lazy_bits(view, tensor)
        return view if writable else _torch.ReadOnlyTensor(view)
