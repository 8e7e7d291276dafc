"""Makes tensors that operations cannot write to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from cumempool._torch.tensors import tensor_over, with_lazy_bits
from cumempool.errors import InvalidArgumentError

_C: Final[Any] = torch._C


def _read_only_in(value: object) -> list[ReadOnlyTensor]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return [item for item in items if isinstance(item, ReadOnlyTensor)]


class ReadOnlyTensor(torch.Tensor):
    """A tensor that operations cannot write to; its views, of this class, cannot be written either.

    Other results of operations are ordinary tensors. torch has no read-only tensors: an inference
    tensor raises only after it has been written.
    """

    __torch_function__ = _C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> ReadOnlyTensor:
        """Views the memory of an ordinary tensor."""
        made: ReadOnlyTensor = torch.Tensor._make_subclass(cls, tensor)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, unless it declares to write to a tensor of this class."""
        kwargs = kwargs or {}
        named = {argument.name: argument.alias_info for argument in func._schema.arguments}
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        for name, value in given.items():
            if named[name] is not None and named[name].is_write and _read_only_in(value):
                raise InvalidArgumentError(
                    f"{func} would write to a read-only tensor: clone() it, or ask for it with "
                    "writable=True"
                )
        memory = {
            tensor.untyped_storage().data_ptr()
            for value in given.values()
            for tensor in _read_only_in(value)
        }

        def protect(result: Any) -> Any:
            if isinstance(result, (list, tuple)):
                return type(result)(map(protect, result))
            views = (
                isinstance(result, torch.Tensor)
                and not isinstance(result, cls)
                and result.device.type in ("cpu", "cuda")
                and result.layout == torch.strided
                and result.untyped_storage().data_ptr() in memory
            )
            return cls(result) if views else result

        with _C._DisableTorchDispatch():
            return protect(func(*args, **kwargs))

    def _unprotected(self) -> torch.Tensor:
        tensor = tensor_over(
            self.untyped_storage(),
            self.dtype,
            self.shape,
            self.stride(),
            int(self.storage_offset()),
        )
        return with_lazy_bits(tensor, self)

    # Methods that torch refuses for subclasses, or that would allow writing.

    def numpy(self, *, force: bool = False) -> Any:
        """Returns a read-only array on the same memory."""
        array = self._unprotected().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """As for any tensor."""
        return self._unprotected().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._unprotected())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = memo.setdefault(id(self), self.clone())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __dlpack__(self, **options: object) -> Any:
        raise BufferError("a read-only tensor cannot be exchanged by DLPack: clone() it")
