"""Makes ``torch.multiprocessing`` send tensors of a pool as shared memory."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from cumempool._locks import fork_safe_lock
from cumempool.errors import UnsupportedError
from cumempool.sharing.descriptor import SharedMemory
from cumempool.sharing.exports import Exports
from cumempool.sharing.importer import open_shared

if TYPE_CHECKING:
    import torch

_senders: Final[weakref.WeakSet[Exports]] = weakref.WeakSet()
_senders_lock = fork_safe_lock()
_installed = False


def install_reducers(exports: Exports) -> None:
    """Makes torch.multiprocessing send tensors of an allocator as shared memory.

    Torch's functions and `ForkingPickler` both ask this module first. So it also works for code
    that imported those functions before, calls them, or registers its own reducers.
    """
    global _installed
    with _senders_lock:
        _senders.add(exports)
    if _installed:
        return
    # Outside the lock: an import may run anything. It registers torch's own reducers first.
    from torch.multiprocessing import reductions

    with _senders_lock:
        if not _installed:
            _ask_first(reductions.reduce_tensor, _first_reduce_tensor)
            _ask_first(reductions.reduce_storage, _first_reduce_storage)
            _ask_pickler_first()
            _installed = True


#: Torch's functions with their own code.
_torchs_own: Final[dict[str, Callable[[Any], Any]]] = {}


def _ask_first(function: Any, instead: Any) -> None:
    """Replaces the code of a function, so that every reference to the function runs the new one."""
    own = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    _torchs_own[function.__name__] = own
    function.__code__ = instead.__code__


# These two run as the code of torch's functions, with the globals of torch's module.
def _first_reduce_tensor(tensor: Any) -> Any:
    from cumempool.sharing import reducers

    reduced = reducers._reduce(tensor)
    return reducers._torchs_own["reduce_tensor"](tensor) if reduced is None else reduced


def _first_reduce_storage(storage: Any) -> Any:
    from cumempool.sharing import reducers

    reduced = reducers._reduce(storage)
    return reducers._torchs_own["reduce_storage"](storage) if reduced is None else reduced


def _ask_pickler_first() -> None:
    """Makes every `ForkingPickler` ask this module before it looks up a registered reducer."""
    from multiprocessing.reduction import ForkingPickler

    pickler: Any = ForkingPickler
    before = getattr(pickler, "reducer_override", None)

    def reducer_override(self: Any, what: Any) -> Any:
        reduced = _reduce(what)
        if reduced is not None:
            return reduced
        return NotImplemented if before is None else before(self, what)

    pickler.reducer_override = reducer_override


def _reduce(what: Any) -> Any:
    """Reduces a tensor, parameter or storage of a pool for sending; returns None for others.

    Some receivers put their own device in as the seventh argument, its place in torch's
    `rebuild_cuda_tensor`. `rebuild_tensor` takes it there.
    """
    import torch

    kind = type(what)
    if kind is torch.UntypedStorage:
        if what.device.type not in ("cpu", "cuda"):
            return None
        memory = _send(what, torch.empty(0, dtype=torch.uint8, device=what.device).set_(what))
        return None if memory is None else (rebuild_storage, (memory,))
    if kind not in (torch.Tensor, torch.nn.Parameter):
        return None
    taken_apart = what.layout is not torch.strided or what.is_nested
    if taken_apart or (what.requires_grad and not what.is_leaf):
        return None  # torch's own reducer takes the first kind apart, and refuses the second
    memory = _send(what, what.detach())
    if memory is None or memory.layout is None:
        return None
    layout, is_parameter = memory.layout, kind is torch.nn.Parameter
    described = (is_parameter, layout.shape, layout.strides, layout.offset, None, layout.dtype)
    return rebuild_tensor, (*described, None, memory, what.requires_grad)


def _send(what: Any, tensor: torch.Tensor) -> SharedMemory | None:
    with _senders_lock:
        senders = list(_senders)
    for exports in senders:
        if not exports.holds(tensor):
            continue
        try:
            # The message keeps both alive: without them the owner could not answer.
            return exports.send(tensor, (tensor, exports))
        except UnsupportedError:
            return None
    return None


def rebuild_tensor(
    is_parameter: bool,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
    storage: None,
    dtype: str,
    device: object,
    memory: SharedMemory,
    requires_grad: bool,
) -> torch.Tensor:
    """Returns the tensor or parameter that was sent through `torch.multiprocessing`.

    The pickle names this function: unpicklers with an allow-list have to allow it.

    Args:
        is_parameter: Whether it is a parameter.
        size: Its shape. All arguments up to the device are for receivers that inspect them.
        stride: Its strides, in elements.
        offset: Bytes from the start of the allocation.
        storage: None.
        dtype: Name of the element type.
        device: The ordinal of the device that will use it here; anything else means the memory's
            own device.
        memory: The descriptor of the memory.
        requires_grad: Whether it requires a gradient.

    Raises:
        SharingError: As for `open_shared`, which also lists the other errors.
    """
    import torch

    here = device if isinstance(device, int) else None
    tensor = cast("torch.Tensor", open_shared(memory, device=here))  # it has a layout
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def rebuild_storage(memory: SharedMemory) -> torch.UntypedStorage:
    """Returns the storage that was sent through `torch.multiprocessing`; see `rebuild_tensor`."""
    from cumempool import _torch

    part = cast("torch.Tensor", open_shared(memory))  # bytes, somewhere in the allocation
    return _torch.from_capsule(part).untyped_storage()
