"""`adopt`: a loaded module moves into the pool, and whatever was true of its tensors stays true."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from conftest import GRANULE, MIB, MakeAllocator, quantized
from refusals import refuses
from torch import nn

from cumempool import (
    CuMemAllocator,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    OutOfMemoryError,
)

#: The modes that a caller may be in; serving engines are in the last one.
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(params=MODES, autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every adoption of a test happen in each of the modes."""
    adopt = CuMemAllocator.adopt

    def adopt_in_mode(*args: Any, **kwargs: Any) -> int:
        with MODES[request.param]():
            return adopt(*args, **kwargs)

    monkeypatch.setattr(CuMemAllocator, "adopt", adopt_in_mode)


class Everything(nn.Module):
    """Parameters and buffers of many kinds: tied, views of one storage, strided, empty, scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight  # tied
        base = torch.randn(4, 10)
        self.left = nn.Parameter(base[:, :5])  # one storage, two views
        self.right = nn.Parameter(base[:, 5:])
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.scales = nn.Parameter(torch.randn(7).bfloat16(), requires_grad=False)
        self.register_buffer("expanded", torch.randn(3, 1).expand(3, 4))
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("steps", torch.arange(5), persistent=False)
        self.register_buffer("absent", None)

    def tensors(self) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = dict(self.named_parameters(remove_duplicate=False))
        return named | dict(self.named_buffers(remove_duplicate=False))


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.requires_grad,
        tensor.is_inference(),
    )


def test_values_layout_and_identity_stay(alloc: CuMemAllocator) -> None:
    module = Everything()
    before = {name: (id(t), layout(t), t.detach().clone()) for name, t in module.tensors().items()}
    assert alloc.adopt(module) == GRANULE  # all of it packed into one allocation
    for name, tensor in module.tensors().items():
        identity, shape, values = before[name]
        assert (id(tensor), layout(tensor)) == (identity, shape), name
        assert torch.equal(tensor, values), name
        if tensor.numel():
            assert alloc.tag_of(tensor) == "weights", name
    assert len(alloc.snapshot()) == 1


def test_tied_weights_and_views_of_one_storage_stay_tied(alloc: CuMemAllocator) -> None:
    module = Everything()
    alloc.adopt(module, tag="w")
    assert module.head.weight is module.embed.weight
    with torch.no_grad():
        module.left.fill_(1)
        module.right.fill_(2)
    row = torch.as_strided(module.left, (10,), (1,), module.left.storage_offset())
    assert row.tolist() == [1.0] * 5 + [2.0] * 5
    assert module.left.untyped_storage().data_ptr() == module.right.untyped_storage().data_ptr()


def test_it_sleeps_wakes_and_computes_and_trains_as_before(alloc: CuMemAllocator) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    sample = torch.randn(2, 8)
    expected = module(sample).detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    alloc.adopt(module)
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    assert torch.equal(module(sample), expected)
    alloc.sleep(offload_tags=("weights",))
    alloc.wake_up()
    assert torch.equal(module(sample), expected)
    module(sample).sum().backward()
    optimizer.step()
    assert not torch.equal(module(sample), expected)
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses


def test_a_module_made_in_inference_mode_computes_as_before(alloc: CuMemAllocator) -> None:
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    sample = torch.randn(2, 8)
    with torch.no_grad():
        expected = module(sample)
    before = [(id(tensor), layout(tensor)) for tensor in module.state_dict(keep_vars=True).values()]
    alloc.adopt(module)
    assert before == [(id(t), layout(t)) for t in module.state_dict(keep_vars=True).values()]
    for inside in (torch.no_grad, torch.inference_mode):
        with inside():
            assert torch.equal(module(sample), expected)
    with torch.inference_mode():  # written to in place, as in training and when weights are loaded
        module.train()(sample)
        module[0].weight.copy_(torch.ones(8, 8))
    alloc.sleep(tags="weights")
    alloc.wake_up()
    assert module[0].weight.tolist() == [[1.0] * 8] * 8


def test_ordinary_and_inference_tensors_over_one_storage_stay_what_they_are(
    alloc: CuMemAllocator,
) -> None:
    weight = nn.Parameter(torch.ones(4))
    with torch.inference_mode():
        view = torch.empty(0).set_(weight.data.untyped_storage(), 0, (4,))
    module = nn.Module()
    module.weight = weight
    module.register_buffer("view", view)
    alloc.adopt(module)
    assert (weight.is_inference(), view.is_inference()) == (False, True)
    assert weight.data_ptr() == view.data_ptr()
    (module.weight * 3).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 4


def test_a_graph_recorded_before_still_runs_backward(alloc: CuMemAllocator) -> None:
    module = nn.Linear(3, 3)
    loss = module(torch.ones(1, 3)).sum()
    alloc.adopt(module)
    loss.backward()
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[1.0] * 3] * 3
    with pytest.raises(NotInPoolError):
        alloc.tag_of(module.weight.grad)


def test_adopt_is_idempotent(alloc: CuMemAllocator) -> None:
    module = Everything()
    alloc.adopt(module)
    addresses = {name: t.data_ptr() for name, t in module.tensors().items()}
    calls = alloc.stats().malloc_calls
    assert alloc.adopt(module) == 0
    assert {name: t.data_ptr() for name, t in module.tensors().items()} == addresses
    assert alloc.stats().malloc_calls == calls
    alloc.sleep(offload_tags=("weights",))
    assert alloc.adopt(module) == 0  # asleep under the same tag: it is where it should be
    alloc.wake_up()


def test_adopting_under_another_tag_moves_it(alloc: CuMemAllocator) -> None:
    module = nn.Linear(4, 4)
    weight = module.weight.detach().clone()
    alloc.adopt(module, "a")
    assert alloc.adopt(module, "b") == GRANULE
    stats = alloc.stats()
    assert (stats.tags["a"].awake_bytes, stats.tags["b"].awake_bytes) == (0, GRANULE)
    assert torch.equal(module.weight, weight)


def test_adopting_what_sleeps_under_another_tag_is_refused(alloc: CuMemAllocator) -> None:
    module = nn.Linear(4, 4)
    weight = module.weight.detach().clone()
    alloc.adopt(module, "a")
    alloc.sleep(tags="a")
    with refuses(InvalidArgumentError, names=("'weight'", "asleep"), operation="adopt", tag="a"):
        alloc.adopt(module, "b")
    alloc.wake_up()
    assert torch.equal(module.weight, weight)
    assert alloc.tag_of(module.weight) == "a"


def test_old_storage_is_freed_unless_something_else_refers_to_it(alloc: CuMemAllocator) -> None:
    module = nn.Linear(64, 64)
    bias = module.bias.detach()  # somebody else's view of the old storage
    gone = weakref.ref(module.weight.untyped_storage())
    old = module.bias.data_ptr()
    alloc.adopt(module)
    gc.collect()
    assert gone() is None
    assert bias.data_ptr() == old != module.bias.data_ptr()
    assert torch.equal(bias, module.bias)


def test_storages_are_aligned_for_kernels(alloc: CuMemAllocator) -> None:
    module = nn.ParameterList([torch.ones(count) for count in (1, 3, 129, 1000)])
    alloc.adopt(module)
    assert all(parameter.data_ptr() % 512 == 0 for parameter in module)
    assert [int(parameter.sum()) for parameter in module] == [1, 3, 129, 1000]


def test_large_modules_are_packed_into_several_allocations(make_allocator: MakeAllocator) -> None:
    allocator = make_allocator(mib=640)
    module = nn.ParameterList(
        [nn.Parameter(torch.full((100 * MIB,), n, dtype=torch.uint8), False) for n in range(4)]
    )
    assert allocator.adopt(module) == 400 * MIB
    assert [info.bytes for info in allocator.snapshot()] == [200 * MIB, 200 * MIB]
    assert [int(parameter[::65536].max()) for parameter in module] == [0, 1, 2, 3]


def test_without_room_what_was_moved_stays_moved_and_all_values_stay(
    make_allocator: MakeAllocator,
) -> None:
    allocator = make_allocator(mib=280)
    module = nn.ParameterList(
        [nn.Parameter(torch.full((200 * MIB,), n, dtype=torch.uint8), False) for n in range(2)]
    )
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.adopt(module)
    assert caught.value.tag == "weights"
    assert allocator.tag_of(module[0]) == "weights"
    with pytest.raises(NotInPoolError):
        allocator.tag_of(module[1])
    assert [int(parameter[::65536].max()) for parameter in module] == [0, 1]


class EngineParameter(nn.Parameter):
    """As the parameters of serving engines: it knows how it is loaded, and is asked by torch."""

    def __new__(cls, data: torch.Tensor, **kwargs: Any) -> EngineParameter:
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data: torch.Tensor, weight_loader: Callable[..., None]) -> None:
        self._weight_loader = weight_loader

    @property
    def weight_loader(self) -> Callable[..., None]:
        return self._weight_loader

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Int8Parameter(nn.Parameter):
    """As those of quantization libraries: its bytes under a second name, and scales beside them."""

    def __new__(cls, data: torch.Tensor) -> Int8Parameter:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.codes = data
        made.scales = torch.full((2,), 0.5)
        return made


class LabelledParameter(nn.Parameter):
    """As those of GGUF files: what is computed from it is of its class and says what it is."""

    asked: ClassVar[list[Any]] = []

    def __new__(cls, data: torch.Tensor, quant_type: str = "") -> LabelledParameter:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.quant_type = quant_type
        return made

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1, 2, 3)  # of the matrix that it stands for

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls.asked.append(func)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor:
            return cls(result.detach(), next(a.quant_type for a in args if isinstance(a, cls)))
        return result


class TextTensor(torch.Tensor):
    """A tensor type of a program's own, which is no parameter."""


ENGINES: dict[str, Callable[[], torch.Tensor]] = {
    "EngineParameter": lambda: EngineParameter(torch.arange(6.0), weight_loader=print),
    "Int8Parameter": lambda: Int8Parameter(torch.arange(6, dtype=torch.int8)),
    "LabelledParameter": lambda: LabelledParameter(torch.arange(6.0), "Q4_0"),
    "TextTensor": lambda: torch.arange(6.0).as_subclass(TextTensor),
}


@pytest.mark.parametrize("built_in", ["grad", "inference_mode"])
@pytest.mark.parametrize("kind", ENGINES)
def test_subclasses_keep_their_class_identity_and_attributes(
    alloc: CuMemAllocator, kind: str, built_in: str
) -> None:
    with MODES[built_in]():
        tensor = ENGINES[kind]()
    attributes = dict(vars(tensor))
    module = nn.Module()
    if isinstance(tensor, nn.Parameter):
        module.weight = tensor
    else:
        module.register_buffer("weight", tensor)
    LabelledParameter.asked.clear()
    alloc.adopt(module)
    assert LabelledParameter.asked == []
    assert module.weight is tensor
    assert type(tensor).__name__ == kind
    assert vars(tensor).keys() == attributes.keys()
    assert all(vars(tensor)[name] is value for name, value in attributes.items())
    assert tensor.is_inference() is (built_in == "inference_mode")
    assert alloc.tag_of(tensor) == "weights"
    with MODES[built_in]():
        assert tensor.tolist() == [0, 1, 2, 3, 4, 5]
    alloc.sleep(tags="weights")
    alloc.wake_up()
    assert tensor.tolist() == [0, 1, 2, 3, 4, 5]


def test_attributes_that_view_the_storage_of_their_parameter_go_with_it(
    alloc: CuMemAllocator,
) -> None:
    module = nn.Module()
    module.weight = Int8Parameter(torch.arange(6, dtype=torch.int8))
    alloc.adopt(module)
    assert module.weight.codes.data_ptr() == module.weight.data_ptr()
    module.weight.codes[2] = 77
    assert module.weight.tolist() == [0, 1, 77, 3, 4, 5]
    assert module.weight.scales.tolist() == [0.5, 0.5]
    with pytest.raises(NotInPoolError):
        alloc.tag_of(module.weight.scales)


class Subclass(torch.Tensor):
    """A tensor type that does the work of its tensors itself."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} was called")


def overlapping() -> dict[str, torch.Tensor]:
    memory = bytearray(64)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return {"bad": torch.frombuffer(memory, dtype=torch.uint8, offset=8), "whole": whole}


REFUSED: dict[str, Callable[[], torch.Tensor]] = {
    "Subclass": lambda: torch.ones(2).as_subclass(Subclass),
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse_coo": lambda: torch.eye(2).to_sparse(),
    "shared memory": lambda: torch.ones(2).share_memory_(),
    "conjugate": lambda: torch.view_as_complex(torch.ones(4, 2)).conj(),
    "negation": lambda: torch.view_as_complex(torch.ones(4, 2)).conj().imag,
    "UninitializedBuffer": lambda: nn.UninitializedBuffer(),
    "quantized": quantized,
    "has no memory": lambda: torch._efficientzerotensor((3,)),
    "shares part": lambda: overlapping()["bad"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_moved_is_refused_by_name_with_nothing_moved(
    alloc: CuMemAllocator, reason: str
) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Module())
    tensors = overlapping() if reason == "shares part" else {"bad": REFUSED[reason]()}
    for name, tensor in tensors.items():
        module[1].register_buffer(name, tensor)
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    with refuses(
        InvalidTypeError, names=(reason, "'1.bad'", "nothing was moved"), operation="adopt"
    ):
        alloc.adopt(module)
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses
    assert alloc.snapshot() == []
    assert module[1].bad is tensors["bad"]


def test_buffers_on_the_cpu_are_left_there_and_parameters_refused(
    alloc: CuMemAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in ("adopt", "optimizer"):
        monkeypatch.setattr(f"cumempool._pool.{where}.device_type_of", lambda allocator: "cuda")
    module = nn.Module()
    module.register_buffer("table", torch.arange(4.0))
    address = module.table.data_ptr()
    assert alloc.adopt(module) == 0
    assert module.table.data_ptr() == address
    module.weight = nn.Parameter(torch.ones(4))
    with refuses(InvalidTypeError, names=("'weight'", "cpu"), operation="adopt"):
        alloc.adopt(module)
    assert alloc.snapshot() == []


def test_lazy_parameters_are_refused(alloc: CuMemAllocator) -> None:
    with refuses(InvalidTypeError, names=("'weight'", "UninitializedParameter"), operation="adopt"):
        alloc.adopt(nn.LazyLinear(3))


def test_two_storages_over_the_same_memory_stay_one(alloc: CuMemAllocator) -> None:
    memory = bytearray(range(64))
    module = nn.Module()
    module.register_buffer("short", torch.frombuffer(memory, dtype=torch.uint8, count=8))
    module.register_buffer("long", torch.frombuffer(memory, dtype=torch.uint8))
    module.register_buffer("next", torch.full((600,), 9, dtype=torch.uint8))
    alloc.adopt(module)
    assert module.long.tolist() == list(range(64))
    assert module.next.tolist() == [9] * 600
    module.long[3] = 77
    assert module.short[3] == 77


@pytest.mark.parametrize("thing", [None, 3, torch.ones(2), nn.Linear, [nn.Linear(1, 1)]], ids=repr)
def test_only_modules_are_adopted(alloc: CuMemAllocator, thing: Any) -> None:
    with refuses(InvalidTypeError, names="torch.nn.Module"):
        alloc.adopt(thing)


def test_a_module_without_memory_costs_nothing(alloc: CuMemAllocator) -> None:
    assert alloc.adopt(nn.ReLU()) == 0
    assert alloc.adopt(nn.ParameterList([torch.empty(0)])) == 0
    assert alloc.snapshot() == []
