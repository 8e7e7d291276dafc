"""Has ``torch.multiprocessing`` send tensors of a pool as what they are: shared memory."""

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
    """Has torch.multiprocessing send tensors of an allocator as what they are: shared memory.

    Both torch's functions themselves and `ForkingPickler` ask here first, so that it holds whoever
    has imported those functions before, calls them, or registers reducers of his own.
    """
    global _installed
    with _senders_lock:
        _senders.add(exports)
    if _installed:
        return
    # Outside of the lock: an import may run anything. It registers torch's own first.
    from torch.multiprocessing import reductions

    with _senders_lock:
        if not _installed:
            _ask_first(reductions.reduce_tensor, _first_reduce_tensor)
            _ask_first(reductions.reduce_storage, _first_reduce_storage)
            _ask_pickler_first()
            _installed = True


#: What torch's functions did before.
_torchs_own: Final[dict[str, Callable[[Any], Any]]] = {}


def _ask_first(function: Any, instead: Any) -> None:
    """Replaces the code of a function, and with it all that is bound to the function anywhere."""
    own = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    _torchs_own[function.__name__] = own
    function.__code__ = instead.__code__


# The code of these two runs as that of torch's functions, among the globals of torch's module.
def _first_reduce_tensor(tensor: Any) -> Any:
    from cumempool.sharing import reducers

    reduced = reducers._reduce(tensor)
    return reducers._torchs_own["reduce_tensor"](tensor) if reduced is None else reduced


def _first_reduce_storage(storage: Any) -> Any:
    from cumempool.sharing import reducers

    reduced = reducers._reduce(storage)
    return reducers._torchs_own["reduce_storage"](storage) if reduced is None else reduced


def _ask_pickler_first() -> None:
    """Has every `ForkingPickler` ask here before it looks for a reducer that was registered."""
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
    """Reduces a tensor, parameter or storage of a pool for sending; None if it is none.

    Some receivers put their own device in the place that it has among the arguments of torch's
    `rebuild_cuda_tensor`, the seventh: `rebuild_tensor` takes it there.
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
        return None  # torch's own does that, and refuses the other
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
            # They go with it: were they dropped, nobody could be answered.
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
    """The tensor or parameter that was sent through `torch.multiprocessing`.

    The name is part of what is sent: unpicklers with a list of what they admit have to admit it.

    Args:
        is_parameter: Whether it is a parameter.
        size: Its shape; as all up to the device for those who look at what they receive.
        stride: In elements.
        offset: In bytes, inside the allocation.
        storage: None.
        dtype: Name of the element type.
        device: The ordinal of a device here that is to use it; anything else: that of the memory.
        memory: What was shared.
        requires_grad: Whether it requires a gradient.

    Raises:
        SharingError: See `open_shared`, and all others.
    """
    import torch

    here = device if isinstance(device, int) else None
    tensor = cast("torch.Tensor", open_shared(memory, device=here))  # which has a layout
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def rebuild_storage(memory: SharedMemory) -> torch.UntypedStorage:
    """The storage that was sent through `torch.multiprocessing`; see `rebuild_tensor`."""
    from cumempool import _torch

    part = cast("torch.Tensor", open_shared(memory))  # of bytes, somewhere in the allocation
    return _torch.from_capsule(part).untyped_storage()
