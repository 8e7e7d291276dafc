"""Collects the tensors to adopt: a module's weights and gradients, an optimizer's state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cumempool import _torch
from cumempool._pool.adopt import Found, adopt_tensors, device_type_of, refusal
from cumempool._pool.state import PoolState
from cumempool.errors import ClosedError, InvalidArgumentError, InvalidTypeError


def adopt_object(
    state: PoolState,
    what: object,
    tag: str,
    gradients: bool | str,
    preserve_buffers: bool,
) -> int:
    """See `CuMemAllocator.adopt`."""
    if isinstance(what, torch.nn.Module):
        return _adopt_module(state, what, tag, gradients, preserve_buffers)
    if not isinstance(what, torch.optim.Optimizer):
        raise InvalidTypeError(
            "adopt: a torch.nn.Module or a torch.optim.Optimizer is needed, "
            f"not {type(what).__name__}"
        )
    if gradients is not False or preserve_buffers:
        raise InvalidArgumentError(
            "adopt: gradients and preserve_buffers apply to a module, not to an optimizer",
            operation="adopt",
            tag=tag,
        )
    return _adopt_optimizer(state, what, tag)


# ---- modules -----------------------------------------------------------------------------------


def _adopt_module(
    state: PoolState,
    module: torch.nn.Module,
    tag: str,
    gradients: bool | str,
    preserve_buffers: bool,
) -> int:
    _refuse_wrappers(module, gradients)
    found = [
        Found(name, parameter, tag)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    ]
    under = tag if isinstance(gradients, bool) else gradients
    if gradients is not False:
        found += [
            Found(f"{one.name}.grad", one.tensor.grad, under)
            for one in found
            if one.tensor.grad is not None
        ]
    elsewhere = "cpu" if device_type_of(state) != "cpu" else None
    found += [
        Found(name, buffer, tag, preserve_buffers)
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if buffer.device.type != elsewhere
    ]
    return adopt_tensors(state, found)


def _is_a(thing: object, name: str) -> bool:
    """Whether a thing has a class of that name, without importing the class's module."""
    return any(base.__name__ == name for base in type(thing).__mro__)


def _refuse_wrappers(module: torch.nn.Module, gradients: bool | str) -> None:
    """Refuses modules that keep memory of their tensors elsewhere."""
    for name, part in module.named_modules():
        if _is_a(part, "FullyShardedDataParallel"):
            raise refusal(
                name,
                "is a FullyShardedDataParallel, which frees and makes storage itself: "
                "build it inside use_memory_pool(tag, all_threads=True)",
            )
        if (
            gradients is not False
            and _is_a(part, "DistributedDataParallel")
            and getattr(part, "gradient_as_bucket_view", False)
        ):
            raise refusal(
                name,
                "is a DistributedDataParallel whose gradients are views of its buckets: "
                "build it without gradient_as_bucket_view, or adopt it without gradients",
            )


# ---- optimizers --------------------------------------------------------------------------------


def _state_of(optimizer: torch.optim.Optimizer, tag: str, device_type: str) -> Iterator[Found]:
    """Yields an optimizer's tensors on devices of the allocator, except parameters."""
    parameters = {id(one) for group in optimizer.param_groups for one in group["params"]}
    places: list[tuple[str, Any]] = [
        (f"state[{number}]", state) for number, state in enumerate(optimizer.state.values())
    ]
    for number, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        places.append((f"param_groups[{number}]", settings))
    for name, place in places:
        for found in _tensors_in(place, name, tag):
            if found.tensor.device.type == device_type and id(found.tensor) not in parameters:
                yield found


def _tensors_in(thing: object, name: str, tag: str) -> Iterator[Found]:
    if isinstance(thing, torch.Tensor):
        yield Found(name, thing, tag)
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from _tensors_in(value, f"{name}[{key!r}]", tag)
    elif isinstance(thing, (list, tuple)):
        for number, value in enumerate(thing):
            yield from _tensors_in(value, f"{name}[{number}]", tag)


def _address(tensor: torch.Tensor) -> int | None:
    """Returns the data pointer, or None if there is no single storage (`adopt_tensors` reports)."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


class _Adoption:
    """Moves the state of one optimizer, now and whenever the optimizer makes more.

    It holds neither the optimizer nor the allocator.
    """

    def __init__(self, state: PoolState, tag: str) -> None:
        self.tag = tag
        self._state = weakref.ref(state)
        self._known: set[int | None] = set()  # addresses of the state at the last check
        self._removals: list[Callable[[], None]] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Registers it to run after each step, and after a state is loaded."""
        self._removals = [
            optimizer.register_step_post_hook(self._after_step).remove,
            optimizer.register_load_state_dict_post_hook(self._after_load).remove,
        ]

    def end(self) -> None:
        """Stops watching the optimizer."""
        for remove in self._removals:
            remove()
        self._removals = []

    def move(self, state: PoolState, optimizer: torch.optim.Optimizer) -> int:
        """Moves state that is not under the tag; returns the device memory allocated, in bytes."""
        found = list(_state_of(optimizer, self.tag, device_type_of(state)))
        moved = 0
        if any(_address(one.tensor) not in self._known for one in found):
            moved = adopt_tensors(state, found)
        self._known = {_address(one.tensor) for one in found}
        return moved

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._after_load(optimizer)

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        state = self._state()
        if state is None:
            self.end()
        elif not _torch.is_capturing():  # a graph keeps using the captured memory
            try:
                self.move(state, optimizer)
            except ClosedError:
                self.end()


_adoptions: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Adoption] = (
    weakref.WeakKeyDictionary()
)


def _adopt_optimizer(state: PoolState, optimizer: torch.optim.Optimizer, tag: str) -> int:
    if _is_a(optimizer, "ZeroRedundancyOptimizer"):
        raise refusal("optimizer", "is a ZeroRedundancyOptimizer: adopt its .optim instead")
    adoption = _Adoption(state, tag)
    moved = adoption.move(state, optimizer)
    before = _adoptions.get(optimizer)
    if before is not None:
        before.end()
    adoption.watch(optimizer)
    _adoptions[optimizer] = adoption
    return moved
