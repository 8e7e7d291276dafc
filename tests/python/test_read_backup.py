"""read_backup: sleeping contents as a tensor on the CPU, without a copy."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    EVERY_DTYPE,
    GRANULE,
    MIB,
    MakeAllocator,
    bits,
    filled,
    quantized,
    random_bytes,
    states,
)
from refusals import refuses

from cumempool import (
    ClosedError,
    CuMemAllocator,
    CuMemConfig,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    UnsupportedError,
)


@pytest.fixture(params=["pinned", "pageable", "file"])
def tier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    name = str(request.param)
    return f"file:{tmp_path_factory.mktemp('backups')}" if name == "file" else name


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype(alloc: CuMemAllocator, dtype: torch.dtype) -> None:
    tensor = alloc.empty(33, 65, dtype=dtype, tag="t")
    contents = random_bytes(33 * 65 * dtype.itemsize)
    bits(tensor).copy_(contents)
    alloc.sleep(tags="t")
    backup = alloc.read_backup(tensor)
    assert (backup.dtype, backup.shape, backup.stride()) == (dtype, (33, 65), (65, 1))
    assert backup.device == torch.device("cpu")
    assert torch.equal(bits(backup), contents)
    part = alloc.read_backup(tensor[7:, 3])
    assert (part.shape, part.stride()) == ((26,), (65,))
    assert part.data_ptr() - backup.data_ptr() == (7 * 65 + 3) * dtype.itemsize


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda t: t,
    "offset": lambda t: t[3:, 5:],
    "steps": lambda t: t[::3, 1::4],
    "transposed": lambda t: t.t(),
    "one element": lambda t: t[11, 9],
    "the last element": lambda t: t[-1, -1],
    "one of a size of one": lambda t: t[4:5, 2:3],
    "expanded": lambda t: t[0, :1].expand(7, 5),
    "windows": lambda t: t.unfold(0, 4, 2),
    "diagonal": lambda t: t.diagonal(),
    "flat": lambda t: t.view(-1),
    "as bytes": lambda t: t.view(torch.uint8)[1:, 3:18:2],
    "parameter": lambda t: torch.nn.Parameter(t),
}


@pytest.mark.parametrize("view", VIEWS)
def test_every_layout(alloc: CuMemAllocator, tier: str, view: str) -> None:
    alloc.use_memory_pool("t", backup=tier)
    tensor = alloc.empty(12, 10, tag="t")
    tensor.copy_(torch.randn(12, 10, generator=torch.Generator().manual_seed(5)))
    seen = VIEWS[view](tensor)
    expected = seen.detach().clone()
    alloc.sleep(tags="t")
    for writable in (False, True):
        backup = alloc.read_backup(seen, writable=writable)
        assert (backup.shape, backup.stride()) == (seen.shape, seen.stride())
        assert (type(backup) is torch.Tensor) == writable
        assert torch.equal(backup, expected)
        assert not backup.requires_grad
        last = sum((n - 1) * s for n, s in zip(seen.shape, seen.stride(), strict=True))
        assert backup.untyped_storage().nbytes() == (last + 1) * seen.element_size()


def test_conjugated_and_negated_views(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(5, dtype=torch.complex64, tag="t")
    tensor.copy_(torch.randn(5, dtype=torch.complex64))
    views = [tensor.conj(), tensor.conj().imag, tensor.real]
    expected = [view.clone() for view in views]
    alloc.sleep(tags="t")
    for view, want in zip(views, expected, strict=True):
        assert torch.equal(alloc.read_backup(view), want)


@pytest.mark.parametrize("size", [(0,), (3, 0, 2)], ids=repr)
def test_zero_size_tensors_of_anywhere(alloc: CuMemAllocator, size: tuple[int, ...]) -> None:
    for tensor in (alloc.empty(*size, dtype=torch.int16), torch.empty(*size, dtype=torch.int16)):
        backup = alloc.read_backup(tensor)
        assert (backup.shape, backup.dtype, backup.device.type) == (size, torch.int16, "cpu")


@pytest.mark.extensive
def test_large_tensors_across_blocks_and_slices(alloc: CuMemAllocator, tier: str) -> None:
    alloc.use_memory_pool("t", backup=tier)
    sizes = [GRANULE + 1, 70 * MIB + 12345, 3 * MIB]
    tensors = [filled(alloc, size, "t", seed) for seed, size in enumerate(sizes)]
    alloc.sleep(tags="t")
    for seed, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert torch.equal(alloc.read_backup(tensor), random_bytes(size, seed))
        middle = slice(size // 3, 2 * size // 3 + 1)
        assert torch.equal(alloc.read_backup(tensor[middle]), random_bytes(size, seed)[middle])
    alloc.wake_up()
    for seed, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert torch.equal(tensor, random_bytes(size, seed))


def test_the_backup_is_not_copied(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, GRANULE, "t")
    alloc.sleep(tags="t")
    before = alloc.stats()
    views = [alloc.read_backup(tensor), alloc.read_backup(tensor), alloc.read_backup(tensor[8:])]
    assert views[0].data_ptr() == views[1].data_ptr() == views[2].data_ptr() - 8
    assert alloc.stats() == before


# ---- writing


def test_what_is_written_is_what_the_next_wake_restores(alloc: CuMemAllocator, tier: str) -> None:
    alloc.use_memory_pool("t", backup=tier)
    tensor = filled(alloc, 3 * GRANULE, "t")
    other = filled(alloc, GRANULE, "t", 1)
    expected = random_bytes(3 * GRANULE)
    alloc.sleep(tags="t")
    backup = alloc.read_backup(tensor[MIB : 4 * MIB], writable=True)
    backup.add_(1)
    expected[MIB : 4 * MIB] += 1
    assert torch.equal(alloc.read_backup(tensor), expected)
    alloc.wake_up()
    assert torch.equal(tensor, expected)
    assert torch.equal(other, random_bytes(GRANULE, 1))
    backup.zero_()  # shows what was restored, and changes nothing any more
    assert torch.equal(tensor, expected)
    report = alloc.sleep(tags="t")
    assert (report.bytes_dirty, report.bytes_clean) == (3 * GRANULE, GRANULE)
    alloc.wake_up()
    assert torch.equal(tensor, expected)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "fill": lambda t: t.fill_(1),
    "one element": lambda t: t.__setitem__(0, 1),
    "a mask": lambda t: t.__setitem__(t > 3, 1),
    "of a view": lambda t: t[3].zero_(),
    "of a view of a view": lambda t: t.view(8, 8).t()[2:].copy_(torch.ones(6, 8)),
    "as another dtype": lambda t: t.view(torch.int32).zero_(),
    "of a part": lambda t: t.chunk(2)[1].random_(),
    "of what is contiguous already": lambda t: t.contiguous().reshape(64).zero_(),
    "out=": lambda t: torch.add(torch.ones(64, dtype=torch.uint8), 1, out=t),
    "out= of several": lambda t: torch.max(
        torch.ones(2, 64, dtype=torch.uint8), 0, out=(t, torch.zeros(64, dtype=torch.int64))
    ),
    "many at once": lambda t: torch._foreach_add_([torch.ones(1), t], 1),
    "detached": lambda t: t.detach().zero_(),
    "data": lambda t: t.data.zero_(),
    "in inference mode": torch.inference_mode()(lambda t: t.zero_()),
    "without gradients": torch.no_grad()(lambda t: t.zero_()),
    "resized": lambda t: t.resize_(1),
    "other memory": lambda t: t.set_(torch.ones(3, dtype=torch.uint8)),
    "numpy": lambda t: t.numpy().__setitem__(0, 1),
    "asarray": lambda t: np.asarray(t).__setitem__(0, 1),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_view_to_read_refuses_what_would_write_to_it(alloc: CuMemAllocator, way: str) -> None:
    tensor = filled(alloc, 64, "t")
    alloc.sleep(tags="t")
    backup = alloc.read_backup(tensor)
    with pytest.raises(ValueError, match="read-only"):
        WRITES[way](backup)
    assert torch.equal(backup, random_bytes(64))
    alloc.wake_up()
    assert torch.equal(tensor, random_bytes(64))


def test_a_view_to_read_is_good_for_everything_else(alloc: CuMemAllocator) -> None:
    tensor = alloc.empty(2, 3, tag="t").copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    alloc.sleep(tags="t")
    backup = alloc.read_backup(tensor)
    plain = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert repr(backup) == repr(plain)
    assert backup.tolist() == plain.tolist()
    assert backup.sum().item() == 21
    assert [row.tolist() for row in backup] == plain.tolist()
    assert np.array_equal(backup.numpy(), plain.numpy())
    weight = torch.ones(3, requires_grad=True)
    (backup @ weight).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([5.0, 7, 9]))  # type: ignore[arg-type]
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.load_state_dict({"weight": backup})
    assert torch.equal(layer.weight, plain)
    assert backup.to_sparse().to_dense().tolist() == plain.tolist()
    assert backup.to("meta").shape == plain.shape
    for copied in (
        backup + 0,
        backup.clone(),
        copy.deepcopy(backup),
        pickle.loads(pickle.dumps(backup)),
        torch.empty(2, 3).copy_(backup),
        torch.cat([backup]),
    ):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, plain)
        copied.zero_()
    assert torch.equal(backup, plain)
    with pytest.raises(BufferError):
        np.from_dlpack(backup)


def test_modes_of_the_caller_change_nothing(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, 64, "t")
    alloc.sleep(tags="t")
    with torch.inference_mode():
        read, write = alloc.read_backup(tensor), alloc.read_backup(tensor, writable=True)
    assert not read.is_inference()
    assert not write.is_inference()
    write.fill_(9)
    assert read.tolist() == [9] * 64


def test_reading_leaves_the_next_sleep_clean(alloc: CuMemAllocator, tier: str) -> None:
    alloc.use_memory_pool("t", backup=tier)
    tensor = filled(alloc, GRANULE, "t")
    alloc.sleep(tags="t")
    assert torch.equal(alloc.read_backup(tensor), random_bytes(GRANULE))
    alloc.wake_up()
    assert alloc.sleep(tags="t").bytes_clean == GRANULE
    alloc.wake_up()


# ---- how long it lives


def test_a_view_outlives_the_wake_the_next_sleep_and_the_tensor(
    alloc: CuMemAllocator, tier: str
) -> None:
    alloc.use_memory_pool("t", backup=tier)
    tensor = filled(alloc, GRANULE, "t")
    alloc.sleep(tags="t")
    backup = alloc.read_backup(tensor)
    numpy = np.from_dlpack(alloc.read_backup(tensor, writable=True))
    alloc.wake_up()
    tensor.fill_(1)
    alloc.release_host_memory()
    assert torch.equal(backup, random_bytes(GRANULE))
    alloc.sleep(tags="t")
    assert torch.equal(backup, random_bytes(GRANULE))  # that sleep went elsewhere
    assert bool((alloc.read_backup(tensor) == 1).all())
    del tensor
    assert torch.equal(backup, random_bytes(GRANULE))
    del backup
    assert torch.equal(torch.from_numpy(numpy), random_bytes(GRANULE))


def test_close_is_refused_while_a_view_is_open(alloc: CuMemAllocator, tier: str) -> None:
    alloc.use_memory_pool("t", backup=tier)
    tensor = filled(alloc, GRANULE, "t")
    alloc.sleep(tags="t")
    backup = alloc.read_backup(tensor)[5:]
    del tensor
    with refuses(InUseError, names="1 open view", operation="close"):
        alloc.close()
    assert torch.equal(backup, random_bytes(GRANULE)[5:])
    del backup
    alloc.close()


def test_close_by_force_leaves_an_open_view_its_memory(tier: str) -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=64 * MIB))
    allocator.use_memory_pool("t", backup=tier)
    tensor = filled(allocator, GRANULE, "t")
    allocator.sleep(tags="t")
    backup = allocator.read_backup(tensor)
    try:
        allocator.close(force=True)
    except RuntimeError:  # says that some memory was not given back
        assert allocator.stats().host_bytes > 0
    assert torch.equal(backup, random_bytes(GRANULE))
    del backup, tensor
    allocator.close(force=True)
    assert allocator.stats().host_bytes == 0


def test_a_view_outlives_the_allocator_object(tier: str) -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=64 * MIB))
    allocator.use_memory_pool("t", backup=tier)
    tensor = filled(allocator, GRANULE, "t")
    allocator.sleep(tags="t")
    backup = allocator.read_backup(tensor)
    del allocator, tensor
    gc.collect()
    assert torch.equal(backup, random_bytes(GRANULE))


# ---- what cannot be read


def test_memory_that_has_no_backup_to_be_read(make_allocator: MakeAllocator) -> None:
    allocator, other = make_allocator(devices=2), make_allocator()
    tensor, theirs = filled(allocator, GRANULE, "t"), filled(other, GRANULE, "t")
    for state in ("awake", "discarded"):
        with refuses(InvalidArgumentError, names=state, operation="read_backup", tag="t"):
            allocator.read_backup(tensor)
        allocator.discard("t")
    allocator.wake_up()
    allocator.set_backup("t", "peer:1")
    tensor.copy_(random_bytes(GRANULE))
    allocator.sleep(tags="t")
    with refuses(UnsupportedError, names="another device", operation="read_backup", tag="t"):
        allocator.read_backup(tensor)
    other.sleep(tags="t")
    for foreign in (theirs, torch.ones(3), torch.eye(3).to_sparse()):
        with pytest.raises(NotInPoolError):
            allocator.read_backup(foreign)
    assert states(allocator) == {"t": "backed_up"}
    allocator.wake_up()
    assert torch.equal(tensor, random_bytes(GRANULE))


@pytest.mark.parametrize("thing", [None, 3, "t", b"x", [1]], ids=repr)
def test_what_is_no_tensor(alloc: CuMemAllocator, thing: Any) -> None:
    with refuses(InvalidTypeError, names="Tensor"):
        alloc.read_backup(thing)


def test_a_quantized_tensor_is_more_than_its_bytes(alloc: CuMemAllocator) -> None:
    with refuses(InvalidTypeError, names="scales"):
        alloc.read_backup(quantized())


def test_writable_is_a_bool(alloc: CuMemAllocator) -> None:
    tensor = filled(alloc, 8, "t")
    alloc.sleep(tags="t")
    for value in (1, None, "yes"):
        with refuses(InvalidTypeError, names="writable"):
            alloc.read_backup(tensor, writable=value)  # type: ignore[arg-type]


def test_a_closed_allocator() -> None:
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=64 * MIB))
    tensor = filled(allocator, 8, "t")
    allocator.sleep(tags="t")
    allocator.close(force=True)
    with pytest.raises(ClosedError):
        allocator.read_backup(tensor)
