"""Training that sleeps between phases, and what loading and adopting a model cost (R4, R10)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cumempool
from cumempool._pool import torch_state

from .conftest import Figure

MIB = 1 << 20

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01, device="cuda"), fused=True),
}


@pytest.fixture(autouse=True)
def warm_backward(gpu: torch.device) -> None:
    """Products make a workspace per thread and stream; here, before any scope is open."""
    leaf = torch.ones(64, 64, device=gpu, requires_grad=True)
    (leaf @ leaf).sum().backward()
    torch.cuda.synchronize()


def build(gpu: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(256, 1024), nn.GELU(), nn.LayerNorm(1024), nn.Linear(1024, 256)
    ).to(gpu)


def batch(step: int, gpu: torch.device) -> torch.Tensor:
    generator = torch.Generator(device=gpu).manual_seed(step)
    return torch.randn(64, 256, device=gpu, generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gpu: torch.device,
    backward: Callable[[torch.Tensor], None],
    between: Callable[[], None],
) -> list[torch.Tensor]:
    losses = []
    for step in range(8):
        x = batch(step, gpu)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), torch.tanh(x))
        backward(loss)
        between()
        optimizer.step()
        between()
        losses.append(loss.detach().clone())
    return losses


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    held = [*model.parameters(), *state_tensors(optimizer)]
    return [tensor.detach().clone() for tensor in held]


@pytest.mark.parametrize("way", ["every thread", "adopted"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_after_sleeping_between_phases(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, name: str, way: str
) -> None:
    plain = build(gpu)
    plain_optimizer = OPTIMIZERS[name](plain.parameters())
    expected = train(plain, plain_optimizer, gpu, lambda loss: loss.backward(), lambda: None)

    model = build(gpu)
    optimizer = OPTIMIZERS[name](model.parameters())
    allocator.adopt(model, "weights")
    allocator.adopt(optimizer, "optimizer")

    def backward(loss: torch.Tensor) -> None:
        if way == "adopted":
            loss.backward()
            allocator.adopt(model, "weights", gradients="gradients")
            return
        with allocator.use_memory_pool("gradients", all_threads=True):
            loss.backward()

    def sleep_and_wake() -> None:
        for parameter in model.parameters():
            assert allocator.tag_of(parameter) == "weights"
            assert allocator.tag_of(parameter.grad) == "gradients"
        tags = list(allocator.stats().tags)
        torch.cuda.empty_cache()
        held = allocator.get_current_usage()
        assert allocator.sleep(offload_tags=tags).bytes_freed == held
        assert allocator.get_current_usage() == 0
        allocator.wake_up()

    losses = train(model, optimizer, gpu, backward, sleep_and_wake)
    assert all(map(torch.equal, losses, expected))
    assert all(map(torch.equal, everything(model, optimizer), everything(plain, plain_optimizer)))
    for tensor in state_tensors(optimizer):
        if tensor.is_cuda:
            assert allocator.tag_of(tensor) == "optimizer"
    on_cpu = [tensor for tensor in state_tensors(optimizer) if not tensor.is_cuda]
    assert bool(on_cpu) == (name == "foreach")  # its step counts, which stay there


def test_a_trainer_that_sleeps_leaves_the_device_to_others(
    allocator: cumempool.CuMemAllocator, gpu: torch.device, used: Callable[[], int], figure: Figure
) -> None:
    model = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(4)]).to(gpu)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    allocator.adopt(model, "weights")
    allocator.adopt(optimizer, "optimizer")
    x = torch.randn(16, 4096, device=gpu)
    with allocator.use_memory_pool("gradients", all_threads=True):
        model(x).sum().backward()
    with allocator.use_memory_pool("optimizer"):
        optimizer.step()
    moved = allocator.stats().malloc_calls
    optimizer.step()
    assert allocator.stats().malloc_calls == moved
    gc.collect()
    torch.cuda.empty_cache()
    tags = ("weights", "gradients", "optimizer")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = used()
    allocator.sleep(offload_tags=tags)
    freed = before - used()
    figure("weights_bytes", weights)
    figure("freed_bytes", freed)
    assert freed >= 4 * weights * 0.95  # weights, gradients and two moments
    allocator.wake_up()
    optimizer.step()


def load(gpu: torch.device) -> nn.Module:
    """Half a GiB of weights, in the order and the sizes of an ordinary load."""
    blocks = []
    for _ in range(16):
        with torch.device(gpu):
            block = nn.Sequential(nn.Linear(4096, 4096), nn.LayerNorm(4096))
        blocks.append(block.to(torch.bfloat16))
    return nn.Sequential(*blocks)


def test_adopting_after_a_load_strands_nothing_and_needs_one_pack_more(
    allocator: cumempool.CuMemAllocator,
    gpu: torch.device,
    used: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    figure: Figure,
) -> None:
    load(gpu)  # so that its kernels are there
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start, reserved = used(), torch.cuda.memory_reserved()
    cached = reserved - torch.cuda.memory_allocated()
    with allocator.use_memory_pool("inside"):
        model = load(gpu)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inside_final = used() - start
    inside_peak = torch.cuda.max_memory_reserved() - reserved
    del model
    gc.collect()
    torch.cuda.empty_cache()
    assert used() - start < 4 * MIB

    model = load(gpu)
    loaded = used() - start
    torch.cuda.empty_cache()
    peaks = [used() - start]

    def note(driver: str) -> None:
        peaks.append(used() - start)  # the new pack, and what torch still has of the old one
        torch_state.empty_cache(driver)

    monkeypatch.setattr("cumempool._pool.adopt.empty_cache", note)
    taken = allocator.adopt(model, "adopted")
    final = used() - start
    stranded = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - cached
    figures = {
        "weights": weights,
        "loaded": loaded,
        "adopt peak": max(peaks),
        "adopt final": final,
        "adopt taken": taken,
        "stranded": stranded,
        "inside peak": inside_peak,
        "inside final": inside_final,
    }
    for name, value in figures.items():
        figure(f"{name.replace(' ', '_')}_bytes", value)
    assert weights <= taken <= weights + 8 * MIB
    assert max(peaks) <= weights + (256 + 128) * MIB  # a pack, and the rest of split segments
    assert final <= weights + 32 * MIB
    assert final <= inside_final + 8 * MIB
    assert stranded <= 4 * MIB
    assert len(allocator.snapshot()) <= 4


@pytest.mark.parametrize("called_in", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_adopting_in_any_mode_leaves_a_model_as_trainable_as_it_was(
    allocator: cumempool.CuMemAllocator,
    gpu: torch.device,
    called_in: Callable[[], contextlib.AbstractContextManager[object]],
) -> None:
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256)).to(gpu).eval()
    trained.register_buffer("table", torch.arange(8.0))  # on the CPU, and left there
    with torch.inference_mode():
        served = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256)).to(gpu).eval()
    sample = torch.randn(8, 256, device=gpu)
    models = (trained, served)
    with torch.no_grad():
        expected = [model(sample) for model in models]
    with called_in():
        for model in models:
            assert allocator.adopt(model) > 0
    allocator.sleep(tags="weights")
    allocator.wake_up()
    for inside in (torch.no_grad, torch.inference_mode):
        with inside():
            for model, before in zip(models, expected, strict=True):
                assert torch.equal(model(sample), before)
    assert trained.table.device.type == "cpu"
    trained(sample).sum().backward()
    for parameter in trained.parameters():
        assert parameter.grad is not None
        assert allocator.tag_of(parameter) == "weights"


def test_a_module_of_many_kinds_of_tensors_is_adopted(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    module = nn.Module()
    base = torch.randn(64, 100, device=gpu)
    module.left, module.right = nn.Parameter(base[:, :50]), nn.Parameter(base[:, 50:])
    module.tied = nn.Linear(64, 64).to(gpu)
    module.other = nn.Linear(64, 64).to(gpu)
    module.other.weight = module.tied.weight
    module.turned = nn.Parameter(torch.randn(32, 64, device=gpu).t())
    module.register_buffer("rotary", torch.arange(1000.0, device=gpu))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in module.state_dict().items()}
    allocator.adopt(module, "weights", preserve_buffers=True)
    report = allocator.discard("weights")
    assert report.bytes_backed_up > 0
    allocator.wake_up()
    assert torch.equal(module.rotary, before["rotary"])
    with torch.no_grad():
        module.load_state_dict(before)
    allocator.sleep(offload_tags=("weights",))
    allocator.wake_up()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.stride() == strides[name], name
        assert allocator.tag_of(tensor) == "weights", name
    assert module.other.weight is module.tied.weight
    assert module.left.untyped_storage().data_ptr() == module.right.untyped_storage().data_ptr()
