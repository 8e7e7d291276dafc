"""Makes tensors over memory that torch did not allocate, and points tensors at other memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


def from_capsule(capsule: object) -> torch.Tensor:
    """Returns the uint8 tensor over a DLPack capsule; its storage frees the memory."""
    return torch.utils.dlpack.from_dlpack(capsule)


def tensor_over(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int,
) -> torch.Tensor:
    """Returns a tensor of any dtype on part of a storage; ``storage_offset`` counts elements."""
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, storage_offset, tuple(size), tuple(stride))


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Makes ordinary tensors in the body: no inference, no gradients, no subclass functions."""
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        yield


def dispatches(tensor: torch.Tensor) -> bool:
    """Whether a subclass implements its tensors itself, so that their storage says nothing."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same memory as a `torch.Tensor`, ignoring a subclass's own shape or dtype."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    return torch.Tensor.as_subclass(tensor, torch.Tensor)


def can_be_pointed(tensor: torch.Tensor) -> bool:
    """Whether torch lets a tensor view other memory, by `point`."""
    plain = as_plain(tensor)
    other = torch.empty(0, dtype=plain.dtype, device=plain.device)
    return torch._has_compatible_shallow_copy_type(tensor, other)


def point(tensor: torch.Tensor, storage: torch.UntypedStorage, offset: int) -> None:
    """Makes a tensor, without changing its identity, view a storage from `offset` bytes on.

    If the tensor is an inference tensor, it takes over one: it has no version counter, and never
    gets one. An ordinary tensor that took over an inference tensor would lose its gradients.
    """
    plain = as_plain(tensor)
    with torch.inference_mode(plain.is_inference()):
        moved = tensor_over(
            storage,
            plain.dtype,
            plain.shape,
            plain.stride(),
            offset // plain.element_size() + int(plain.storage_offset()),
        )
        torch.Tensor.data.__set__(tensor, moved)  # type: ignore[attr-defined]


def with_lazy_bits(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with `like`'s lazy conjugation and negation, for the same bytes."""
    if like.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if like.is_neg() else tensor
