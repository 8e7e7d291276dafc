"""NCCL between two GPUs on pool memory: its rate, and registered buffers through a sleep."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

import cumempool
from cumempool import RegistrableRange

from .conftest import Figure
from .processes import TIMEOUT, Child, gather

MIB = 1024**2
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where two ranks on two GPUs meet."""
    if torch.cuda.device_count() < 2:
        pytest.xfail("there is one GPU; this needs two")
    if not torch.distributed.is_nccl_available():
        pytest.xfail("this torch has no NCCL")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")  # multicast is not granted everywhere
    return str(tmp_path / "store")


def run_ranks(work: Any, *arguments: Any) -> list[Any]:
    """What each of two ranks says; both have ended well."""
    with Child(work, 0, *arguments) as first, Child(work, 1, *arguments) as second:
        said = gather([first, second])
        first.join()
        second.join()
    return said


@contextlib.contextmanager
def group(rank: int, store: str) -> Iterator[Any]:
    """The NCCL backend of a group of two, on this rank's device."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
        device_id=device,  # makes the communicator now
    )
    yield torch.distributed.group.WORLD._get_backend(device)  # type: ignore[union-attr]
    torch.distributed.destroy_process_group()


def in_step() -> None:
    """Both ranks are here, and have nothing in flight."""
    torch.cuda.synchronize()
    torch.distributed.barrier()
    torch.cuda.synchronize()


def check_sum(tensor: torch.Tensor, rank: int) -> None:
    tensor.fill_(rank + 1)
    torch.distributed.all_reduce(tensor)
    assert bool(tensor.eq(3).all()), f"rank {rank}: {tensor[:4].tolist()}"


# ---- rate


def measure(tensor: torch.Tensor) -> float:
    """Seconds of one all-reduce."""
    in_step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(5):
        torch.distributed.all_reduce(tensor)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 5000


def compare(pooled: torch.Tensor, plain: torch.Tensor, rank: int) -> tuple[float, float]:
    """What an all-reduce of pool memory takes over one of plain memory, and its GB/s."""
    for tensor in (pooled, plain):
        check_sum(tensor, rank)
        tensor.zero_()  # sums of sums would overflow
    pairs = [(measure(pooled), measure(plain)) for _ in range(12)][3:]
    ratio = statistics.median(pool / other for pool, other in pairs)
    return ratio, pooled.nbytes / statistics.median(pool for pool, _ in pairs) / 1e9


def rates(allocator: cumempool.CuMemAllocator, rank: int) -> list[tuple[float, float]]:
    """Before a sleep, and after it."""
    with allocator.use_memory_pool("kv"):
        pooled = torch.zeros(256 * MIB, dtype=torch.float32, device="cuda")
    plain = torch.zeros(256 * MIB, dtype=torch.float32, device="cuda")
    before = compare(pooled, plain, rank)
    in_step()
    allocator.sleep(tags="kv", offload_tags="kv")
    in_step()
    allocator.wake_up()
    return [before, compare(pooled, plain, rank)]


def close(allocator: cumempool.CuMemAllocator) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    allocator.close(force=True)
    assert allocator.stats().physical_bytes == 0


def reduce_all(inbox: Any, outbox: Any, rank: int, store: str) -> None:
    with group(rank, store):
        allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
        outbox.put(rates(allocator, rank))
        in_step()
    close(allocator)


@pytest.mark.parametrize("variable", [None, *VARIABLES])
def test_an_all_reduce_costs_the_same_on_pool_memory(
    store: str, monkeypatch: pytest.MonkeyPatch, variable: str | None, figure: Figure
) -> None:
    if variable is not None:
        monkeypatch.setenv(variable, "expandable_segments:True")
    found = run_ranks(reduce_all, store)
    for rank, pair in enumerate(found):
        for when, (ratio, rate) in zip(("before", "after"), pair, strict=True):
            name = f"rank_{rank}_{when}_a_sleep"
            figure(f"{name}_gb_per_s", round(rate, 1))
            figure(f"{name}_over_plain", round(ratio, 3))
    assert max(ratio for pair in found for ratio, _ in pair) <= 1.05, found


# ---- registered buffers


class Registrar:
    """A way to register memory of a tag with NCCL, through every sleep."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def register(self, ranges: Sequence[RegistrableRange]) -> None:
        raise NotImplementedError

    def deregister(self) -> None:
        raise NotImplementedError

    def before_unmap(self, tag: str, ranges: Sequence[RegistrableRange]) -> None:
        self.deregister()
        self.said.append(f"deregistered {len(ranges)}")

    def after_map(self, tag: str, ranges: Sequence[RegistrableRange]) -> None:
        self.register(ranges)
        self.said.append(f"registered generation {ranges[0].generation}")


def load_nccl() -> ctypes.CDLL:
    """The NCCL that torch has loaded: a library of its own, or part of torch's."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = {line.split()[-1] for line in maps if "/" in line}
    for stem in ("libnccl.so", "libtorch_cuda.so"):
        for file in sorted(files):
            if not Path(file).name.startswith(stem):
                continue
            library = ctypes.CDLL(file)
            if hasattr(library, "ncclCommRegister"):
                return library
    raise AssertionError("no library that is loaded has ncclCommRegister")


class ByNccl(Registrar):
    """``ncclCommRegister`` on each range."""

    def __init__(self, backend: Any, tensor: torch.Tensor) -> None:
        super().__init__()
        self.nccl = load_nccl()
        self.comm = ctypes.c_void_p(backend._comm_ptr())  # of the current device
        assert self.comm.value
        self.handles: list[ctypes.c_void_p] = []

    def register(self, ranges: Sequence[RegistrableRange]) -> None:
        for part in ranges:
            handle = ctypes.c_void_p()
            code = self.nccl.ncclCommRegister(
                self.comm,
                ctypes.c_void_p(part.address),
                ctypes.c_size_t(part.bytes),
                ctypes.byref(handle),
            )
            assert code == 0, f"ncclCommRegister: {code}"
            assert handle.value, "NCCL_LOCAL_REGISTER=0 makes registering do nothing"
            self.handles.append(handle)

    def deregister(self) -> None:
        while self.handles:
            code = self.nccl.ncclCommDeregister(self.comm, self.handles.pop())
            assert code == 0, f"ncclCommDeregister: {code}"


class ByTorch(Registrar):
    """torch's own registration of a whole pool, the one that a tensor is in."""

    def __init__(self, backend: Any, tensor: torch.Tensor) -> None:
        super().__init__()
        self.backend = backend
        (identity,) = {
            tuple(segment["segment_pool_id"])
            for segment in torch.cuda.memory_snapshot()
            if segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]
        }
        # The scope made the pool; its object stays, as long as somebody else has it.
        self.pool = next(
            each
            for each in gc.get_objects()
            if type(each) is torch.cuda.MemPool and tuple(each.id) == identity
        )

    def register(self, ranges: Sequence[RegistrableRange]) -> None:
        self.backend.register_mem_pool(self.pool)

    def deregister(self) -> None:
        self.backend.deregister_mem_pool(self.pool)


NOT_OFFERED = "this torch does not offer it"
WAYS: dict[str, type[ByNccl | ByTorch]] = {"nccl": ByNccl, "torch": ByTorch}


def sleep_registered(allocator: cumempool.CuMemAllocator, backend: Any, rank: int, way: str) -> Any:
    """All-reduces before and after each of four sleeps; what the hooks did."""
    with allocator.use_memory_pool("kv"):
        pooled = torch.zeros(64 * MIB, dtype=torch.float32, device="cuda")
        registrar = WAYS[way](backend, pooled)
    registrar.register(allocator.registrable_ranges("kv"))
    with allocator.register_hooks(
        "kv", before_unmap=registrar.before_unmap, after_map=registrar.after_map
    ):
        for cycle in range(4):
            for _ in range(3):
                check_sum(pooled, rank)
            kept = float(cycle * 10 + rank)
            pooled.fill_(kept)
            in_step()
            report = allocator.sleep(tags="kv", offload_tags="kv")
            in_step()
            assert report.bytes_freed >= pooled.nbytes
            assert allocator.stats().physical_bytes == 0
            report = allocator.wake_up()
            assert not report.problems, report.problems
            assert bool(pooled.eq(kept).all())
            in_step()
        check_sum(pooled, rank)
    in_step()
    registrar.deregister()
    in_step()
    return registrar.said


def reduce_registered(inbox: Any, outbox: Any, rank: int, store: str, way: str) -> None:
    with group(rank, store) as backend:
        if not hasattr(backend, {"nccl": "_comm_ptr", "torch": "register_mem_pool"}[way]):
            outbox.put(NOT_OFFERED)
            return
        allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(driver="cuda"))
        outbox.put(sleep_registered(allocator, backend, rank, way))
        in_step()
    close(allocator)


@pytest.mark.parametrize("way", WAYS)
def test_registered_buffers_are_reduced_right_through_sleeps(store: str, way: str) -> None:
    found = run_ranks(reduce_registered, store, way)
    if found[0] == NOT_OFFERED:
        pytest.xfail(NOT_OFFERED)
    expected = [
        line
        for cycle in range(4)
        for line in ("deregistered 1", f"registered generation {cycle + 2}")
    ]
    assert found == [expected, expected]
