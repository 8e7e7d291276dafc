"""Training that sleeps between steps: weights, gradients and optimizer state, bit for bit (R4)."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GRANULE, MakeAllocator
from refusals import refuses
from torch import nn

from cumempool import (
    CuMemAllocator,
    CuMemConfig,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
    _torch,
)

Optimizers = dict[str, Callable[[Any], torch.optim.Optimizer]]

OPTIMIZERS: Optimizers = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
}


class Model(nn.Module):
    """Tied weights, a strided weight, a normalisation with buffers."""

    def __init__(self, *, strided: bool = True) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(13, 8)
        self.norm = nn.BatchNorm1d(8)
        turned = torch.randn(16, 8).t()
        self.turned = nn.Parameter(turned if strided else turned.contiguous())
        self.back = nn.Linear(16, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(words)) @ self.turned
        return self.head(self.back(torch.tanh(hidden)))


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 13, (2, 32), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    between: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """One loss per step; `between` runs between the gradients of a step and its update."""
    losses: list[float] = []
    for step in steps:
        words, wanted = batch(step)

        def closure(words: torch.Tensor = words, wanted: torch.Tensor = wanted) -> float:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(words), wanted)
            loss.backward()
            return loss.item()

        if isinstance(optimizer, torch.optim.LBFGS):
            between(step)
            losses.append(optimizer.step(closure))
            continue
        losses.append(closure())
        between(step)
        optimizer.step()
    return losses


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of all that training has changed."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    held = [*model.parameters(), *model.buffers(), *gradients, *state_tensors(optimizer)]
    return [tensor.detach().clone() for tensor in held]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.extensive
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_after_sleeping_between_steps(
    alloc: CuMemAllocator, name: str
) -> None:
    strided = name != "lbfgs"  # which takes no other
    plain = Model(strided=strided)
    plain_optimizer = OPTIMIZERS[name](plain.parameters())
    expected = train(plain, plain_optimizer, range(5))

    model = Model(strided=strided)
    optimizer = OPTIMIZERS[name](model.parameters())
    alloc.adopt(model, "weights")
    alloc.adopt(optimizer, "optimizer")
    tags = ["weights", "gradients", "optimizer"]

    def sleep_and_wake(step: int) -> None:
        alloc.adopt(model, "weights", gradients="gradients")
        known = [tag for tag in tags if tag in alloc.stats().tags]
        held = alloc.get_current_usage()
        report = alloc.sleep(offload_tags=known, tags=known)
        assert report.bytes_freed == held
        assert alloc.get_current_usage() == 0
        alloc.wake_up(known)

    assert train(model, optimizer, range(5), sleep_and_wake) == expected
    assert same(everything(model, optimizer), everything(plain, plain_optimizer))
    for parameter in model.parameters():
        assert alloc.tag_of(parameter) == "weights"
    for tensor in state_tensors(optimizer):
        assert alloc.tag_of(tensor) == "optimizer"


def test_gradients_are_moved_under_the_tag_that_is_named(alloc: CuMemAllocator) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, range(1))
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    grads = {name: id(p.grad) for name, p in model.named_parameters()}
    strides = {name: p.grad.stride() for name, p in model.named_parameters()}
    assert alloc.adopt(model, "w", gradients="g") == 2 * GRANULE
    assert alloc.adopt(model, "w", gradients="g") == 0
    for name, parameter in model.named_parameters():
        assert id(parameter.grad) == grads[name]
        assert parameter.grad.stride() == strides[name]
        assert torch.equal(parameter.grad, before[name])
        assert (alloc.tag_of(parameter), alloc.tag_of(parameter.grad)) == ("w", "g")
    other = Model()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(1))
    assert alloc.adopt(other, "both", gradients=True) == GRANULE
    assert alloc.tag_of(other.back.weight.grad) == "both"


def test_gradients_accumulate_in_place_after_they_were_moved(alloc: CuMemAllocator) -> None:
    model = nn.Linear(4, 4)
    model(torch.ones(1, 4)).sum().backward()
    alloc.adopt(model, "w", gradients="g")
    address = model.weight.grad.data_ptr()
    alloc.sleep(offload_tags=["w", "g"])
    alloc.wake_up()
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad.data_ptr() == address
    assert set(model.weight.grad.flatten().tolist()) == {2.0}


def test_without_gradients_they_stay_where_they_are(alloc: CuMemAllocator) -> None:
    model = nn.Linear(4, 4)
    model(torch.ones(1, 4)).sum().backward()
    alloc.adopt(model, "w")
    with pytest.raises(NotInPoolError):
        alloc.tag_of(model.weight.grad)


# ---- optimizers


def stepped(*, parameters: int = 1) -> tuple[nn.ParameterList, torch.optim.Optimizer]:
    params = nn.ParameterList([torch.full((5,), float(n)) for n in range(parameters)])
    optimizer = torch.optim.Adam(params, lr=0.1)
    step(params, optimizer)
    return params, optimizer


def step(params: nn.ParameterList, optimizer: torch.optim.Optimizer) -> None:
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_state_that_exists_is_moved_and_keeps_its_identity(alloc: CuMemAllocator) -> None:
    params, optimizer = stepped(parameters=3)
    before = [(id(t), t.clone()) for t in state_tensors(optimizer)]
    assert alloc.adopt(optimizer, "o") == GRANULE
    assert alloc.adopt(optimizer, "o") == 0
    assert [id(t) for t in state_tensors(optimizer)] == [identity for identity, _ in before]
    assert same(state_tensors(optimizer), [values for _, values in before])
    assert len(alloc.snapshot()) == 1
    with pytest.raises(NotInPoolError):
        alloc.tag_of(params[0])


def test_state_made_later_is_moved_after_its_step(alloc: CuMemAllocator) -> None:
    params = nn.ParameterList([torch.ones(5)])
    optimizer = torch.optim.Adam(params, lr=0.1)
    assert alloc.adopt(optimizer, "o") == 0
    assert alloc.snapshot() == []
    step(params, optimizer)
    addresses = [t.data_ptr() for t in state_tensors(optimizer)]
    assert [alloc.tag_of(t) for t in state_tensors(optimizer)] == ["o"] * 3
    calls = alloc.stats().malloc_calls
    for _ in range(3):
        step(params, optimizer)
    assert [t.data_ptr() for t in state_tensors(optimizer)] == addresses
    assert alloc.stats().malloc_calls == calls
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(7)
    optimizer.step()
    assert {alloc.tag_of(t) for t in state_tensors(optimizer)} == {"o"}
    assert len(state_tensors(optimizer)) == 6


def test_state_that_is_loaded_is_moved(alloc: CuMemAllocator) -> None:
    params, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    alloc.adopt(optimizer, "o")
    step(params, optimizer)
    optimizer.load_state_dict(saved)
    assert [alloc.tag_of(t) for t in state_tensors(optimizer)] == ["o"] * 3
    assert float(state_tensors(optimizer)[0]) == 1.0
    assert alloc.stats().tags["o"].awake_allocations == 1


def test_adopting_under_another_tag_looks_after_that_one_alone(alloc: CuMemAllocator) -> None:
    params, optimizer = stepped()
    alloc.adopt(optimizer, "a")
    assert alloc.adopt(optimizer, "b") == GRANULE
    step(params, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(7)
    optimizer.step()
    assert {alloc.tag_of(t) for t in state_tensors(optimizer)} == {"b"}
    assert alloc.stats().tags["a"].awake_bytes == 0


def test_an_adopted_optimizer_keeps_neither_itself_nor_the_allocator_alive(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator()
    params, optimizer = stepped()
    allocator.adopt(optimizer, "o")
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert allocator.snapshot() == []
    params, optimizer = stepped()
    allocator.adopt(optimizer, "o")
    hooks = len(optimizer._optimizer_step_post_hooks)
    optimizer.state.clear()
    allocator.close()
    step(params, optimizer)  # makes new state, which nobody moves
    assert len(optimizer._optimizer_step_post_hooks) == hooks - 1
    step(params, optimizer)


def test_an_optimizer_outlives_the_allocator_that_adopted_it() -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host"))
    params, optimizer = stepped()
    allocator.adopt(optimizer, "o")
    hooks = len(optimizer._optimizer_step_post_hooks)
    optimizer.state.clear()
    gone = weakref.ref(allocator)
    del allocator
    gc.collect()
    assert gone() is None
    step(params, optimizer)
    assert len(state_tensors(optimizer)) == 3
    assert len(optimizer._optimizer_step_post_hooks) == hooks - 1


def test_state_made_during_a_capture_is_moved_after_a_step_outside_of_it(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph goes on using what it was captured with."""
    params, optimizer = stepped()
    optimizer.state.clear()
    alloc.adopt(optimizer, tag="state")
    monkeypatch.setattr(_torch, "is_capturing", lambda: True)
    step(params, optimizer)
    assert alloc.snapshot() == []
    monkeypatch.setattr(_torch, "is_capturing", lambda: False)
    step(params, optimizer)
    assert {alloc.tag_of(tensor) for tensor in state_tensors(optimizer)} == {"state"}
    del params, optimizer


def test_a_copy_of_an_adopted_optimizer_is_an_ordinary_one(alloc: CuMemAllocator) -> None:
    _, optimizer = stepped()
    alloc.adopt(optimizer, "o")
    twin = copy.deepcopy(optimizer)
    for tensor in state_tensors(twin):
        with pytest.raises(NotInPoolError):
            alloc.tag_of(tensor)


def test_without_room_for_new_state_the_step_has_been_made(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=2)
    held = allocator.empty(GRANULE, dtype=torch.uint8)
    params, twin = nn.ParameterList([torch.ones(5)]), nn.ParameterList([torch.ones(5)])
    optimizer = torch.optim.Adam(params, lr=0.1)
    allocator.adopt(optimizer, "o")
    with refuses(OutOfMemoryError, operation="malloc", tag="o", bytes=GRANULE):
        step(params, optimizer)
    step(twin, torch.optim.Adam(twin, lr=0.1))
    assert torch.equal(params[0], twin[0])
    del held
    step(params, optimizer)
    assert {allocator.tag_of(t) for t in state_tensors(optimizer)} == {"o"}


class Sparse(torch.optim.Optimizer):
    """Keeps a state that is of no one storage."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["seen"] = [{"rows": torch.eye(2).to_sparse()}]


def test_state_that_cannot_be_moved_is_refused_by_name_and_not_watched(
    alloc: CuMemAllocator,
) -> None:
    optimizer = Sparse([nn.Parameter(torch.ones(2))])
    with refuses(
        InvalidTypeError, names=("state[0]['seen'][0]['rows']", "sparse_coo"), operation="adopt"
    ):
        alloc.adopt(optimizer, "o")
    assert len(optimizer._optimizer_step_post_hooks) == 0
    assert alloc.snapshot() == []


@pytest.mark.parametrize("options", [{"gradients": True}, {"preserve_buffers": True}])
def test_options_of_modules_do_not_go_with_optimizers(
    alloc: CuMemAllocator, options: dict[str, Any]
) -> None:
    _, optimizer = stepped()
    with refuses(
        InvalidArgumentError, names=("gradients", "preserve_buffers"), operation="adopt", tag="o"
    ):
        alloc.adopt(optimizer, "o", **options)


@pytest.mark.parametrize("options", [{"gradients": 3}, {"preserve_buffers": "yes"}])
def test_options_are_of_their_types(alloc: CuMemAllocator, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidTypeError):
        alloc.adopt(nn.Linear(1, 1), "w", **options)


# ---- wrappers


@pytest.fixture
def one_rank(tmp_path: Any) -> Any:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("views", [False, True])
def test_a_distributed_data_parallel_module_trains_on_bit_for_bit(
    alloc: CuMemAllocator, one_rank: None, views: bool
) -> None:
    plain = Model()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), range(4))
    inner = Model()
    model = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=views)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    alloc.adopt(model, "w")
    alloc.adopt(optimizer, "o")

    def sleep_and_wake(step: int) -> None:
        if views:
            with refuses(
                InvalidTypeError,
                names=("gradient_as_bucket_view", "nothing was moved"),
                operation="adopt",
            ):
                alloc.adopt(model, "w", gradients=True)
        else:
            alloc.adopt(model, "w", gradients=True)
        known = list(alloc.stats().tags)
        alloc.sleep(offload_tags=known)
        alloc.wake_up()

    assert train(model, optimizer, range(4), sleep_and_wake) == expected
    assert same(list(inner.parameters()), list(plain.parameters()))


class FullyShardedDataParallel(nn.Module):
    """Named as the wrapper of torch, which needs a GPU."""


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """Named as the wrapper of torch, which keeps its state in another optimizer."""


def test_wrappers_that_keep_memory_elsewhere_are_refused_by_name(alloc: CuMemAllocator) -> None:
    module = nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel())
    with refuses(
        InvalidTypeError,
        names=("'1'", "FullyShardedDataParallel", "all_threads=True"),
        operation="adopt",
    ):
        alloc.adopt(module)
    optimizer = ZeroRedundancyOptimizer(module.parameters(), lr=0.1)
    with refuses(InvalidTypeError, names=("ZeroRedundancyOptimizer", ".optim"), operation="adopt"):
        alloc.adopt(optimizer)
    assert alloc.snapshot() == []


def test_distributed_tensors_are_refused_by_name(alloc: CuMemAllocator, one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    mesh = init_device_mesh("cpu", (1,))
    module = distribute_module(nn.Linear(4, 4), mesh)
    with refuses(
        InvalidTypeError, names=("'weight'", "DTensor", "use_memory_pool()"), operation="adopt"
    ):
        alloc.adopt(module)
