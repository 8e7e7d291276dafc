"""Tries the contract of the pools on this machine's driver: a check per promise, with its rule."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Final

import torch

from cumempool.allocator import CuMemAllocator
from cumempool.config import CuMemConfig
from cumempool.errors import (
    CumempoolError,
    InUseError,
    InvalidArgumentError,
    OutOfMemoryError,
    UnknownTagError,
)

_MIB: Final = 1024**2
_ELEMENTS: Final = 3 * _MIB  # of 8 bytes: several granules and slices, the last one not full
_DTYPES: Final = (torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.complex64)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one check.

    Attributes:
        rule: The rule that it tries, as in docs/guarantees.md.
        name: The promise.
        status: ``"PASS"``, ``"FAIL"``, or ``"SKIP"`` if this machine cannot run the check.
        reason: The failure, or the reason for the skip, or ``""``.
        seconds: The duration.
    """

    rule: str
    name: str
    status: str
    reason: str
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Returns all fields as types that ``json.dumps`` takes."""
        return asdict(self)


class _BrokenError(AssertionError):
    """A promise did not hold."""


class _LackingError(Exception):
    """This machine cannot run a check."""


_Check = Callable[[CuMemAllocator], None]
_checks: list[tuple[str, str, _Check]] = []


def _promise(rule: str) -> Callable[[_Check], _Check]:
    """Registers a check under a rule; its docstring is its name."""

    def enter(check: _Check) -> _Check:
        _checks.append((rule, (check.__doc__ or "").rstrip("."), check))
        return check

    return enter


def run_selftest(config: CuMemConfig, *, matching: str = "") -> Iterator[Outcome]:
    """Runs the checks, each with an allocator of its own, and yields the result of each."""
    CuMemAllocator(config).close()  # a missing driver raises here, and fails no check
    for rule, name, check in _checks:
        if matching.lower() in f"{rule} {name}".lower():
            yield _run(config, rule, name, check)


def _run(config: CuMemConfig, rule: str, name: str, check: _Check) -> Outcome:
    begin = time.perf_counter()
    status, reason = "PASS", ""
    allocator = CuMemAllocator(config)
    try:
        check(allocator)
        gc.collect()
        allocator.close()
        held = allocator.stats()
        _expect(
            held.physical_bytes == held.reserved_address_bytes == held.host_bytes == 0,
            f"after close() it still holds {held.physical_bytes} bytes of device memory, "
            f"{held.reserved_address_bytes} of addresses, {held.host_bytes} of host memory",
        )
    except _LackingError as error:
        status, reason = "SKIP", str(error)
    except (_BrokenError, CumempoolError, RuntimeError) as error:
        status, reason = "FAIL", f"{type(error).__name__}: {error}"
    finally:
        gc.collect()
        allocator.close(force=True)
    return Outcome(rule, name, status, reason, time.perf_counter() - begin)


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise _BrokenError(problem)


@contextmanager
def _expect_error(kind: type[CumempoolError]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise _BrokenError(f"no {kind.__name__} was raised")


def _numbers(allocator: CuMemAllocator, tag: str, start: int = 0) -> torch.Tensor:
    tensor = allocator.empty(_ELEMENTS, dtype=torch.int64, tag=tag)
    torch.arange(start, start + _ELEMENTS, out=tensor)
    return tensor


def _holds(tensor: torch.Tensor, start: int = 0) -> bool:
    wanted = torch.arange(start, start + _ELEMENTS, device=tensor.device)
    return torch.equal(tensor, wanted)


# ---- contents and addresses --------------------------------------------------------------------


@_promise("R2")
def _contents_and_addresses(allocator: CuMemAllocator) -> None:
    """Contents and addresses are the same after sleep and wake, for each dtype."""
    tensors = []
    for dtype in _DTYPES:
        tensor = allocator.empty(1000, 1003, dtype=dtype, tag="data")
        tensor.copy_(torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 251)
        tensors.append((tensor, tensor.data_ptr(), tensor.clone()))
    for _ in range(3):
        allocator.sleep(tags="data")
        allocator.wake_up()
        for tensor, address, expected in tensors:
            _expect(tensor.data_ptr() == address, f"{tensor.dtype} has moved")
            _expect(torch.equal(tensor, expected), f"{tensor.dtype} has changed")


@_promise("R3")
def _idempotent(allocator: CuMemAllocator) -> None:
    """Sleeping what sleeps and waking what is awake changes nothing."""
    tensor = _numbers(allocator, "data")
    _expect(allocator.wake_up().bytes_mapped == 0, "awake memory was mapped again")
    allocator.sleep(tags="data")
    _expect(allocator.sleep(tags="data").bytes_freed == 0, "sleeping memory was freed again")
    allocator.wake_up()
    _expect(_holds(tensor), "contents have changed")


@_promise("R4")
def _policies(allocator: CuMemAllocator) -> None:
    """Discarded tags wake as their policy says, and others keep their contents."""
    with allocator.use_memory_pool("kv", on_sleep="discard", on_wake="zero"):
        kept, dropped = _numbers(allocator, "weights"), _numbers(allocator, "kv", 1)
    report = allocator.sleep(offload_tags="weights")
    _expect(report.tags["kv"].bytes_backed_up == 0, "a discarded tag was backed up")
    allocator.wake_up()
    _expect(_holds(kept), "contents that were kept have changed")
    _expect(int(torch.count_nonzero(dropped)) == 0, "memory that wakes as zero is not zero")


@_promise("R4")
def _no_room(allocator: CuMemAllocator) -> None:
    """A wake without room fails whole, leaves all asleep, and works when there is room."""
    if allocator.config.driver == "cuda":
        raise _LackingError("fills the device: tried on the host driver only")
    tensor, other = _numbers(allocator, "data"), _numbers(allocator, "data", 5)
    allocator.sleep(tags="data")
    room = allocator.config.host_driver_bytes - allocator.stats().physical_bytes
    filling = allocator.empty(room - 32 * _MIB, dtype=torch.uint8, tag="filling")
    with _expect_error(OutOfMemoryError):
        allocator.wake_up("data")
    _expect(allocator.stats().tags["data"].awake_bytes == 0, "part of it is awake")
    del filling
    allocator.wake_up("data")
    _expect(_holds(tensor) and _holds(other, 5), "contents have changed")


@_promise("R4")
def _swap(allocator: CuMemAllocator) -> None:
    """A swap puts one tag to sleep while another wakes; both keep their contents."""
    first, second = _numbers(allocator, "a"), _numbers(allocator, "b", 9)
    allocator.sleep(tags="b")
    for asleep, awake in (("a", "b"), ("b", "a")) * 2:
        allocator.swap(sleep=asleep, wake=awake)
        tags = allocator.stats().tags
        _expect(tags[asleep].awake_bytes == 0, f"{asleep} is awake")
        _expect(tags[awake].asleep_bytes == 0, f"{awake} sleeps")
    allocator.wake_up()
    _expect(_holds(first) and _holds(second, 9), "contents have changed")


@_promise("R5")
def _work_in_flight(allocator: CuMemAllocator) -> None:
    """Work in flight is finished before a sleep, and a wake is seen by every stream."""
    tensor = _numbers(allocator, "data")
    for round_ in range(3):
        if allocator.config.driver == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(50):
                    tensor.add_(1)
        else:
            tensor.add_(50)
        allocator.sleep(tags="data")
        allocator.wake_up()
        _expect(_holds(tensor, 50 * (round_ + 1)), "queued work was lost")


@_promise("R5")
def _asynchronous(allocator: CuMemAllocator) -> None:
    """A tensor of a wake in the background is whole once it was waited for."""
    tensors = [_numbers(allocator, "data", start) for start in range(4)]
    allocator.sleep(tags="data")
    handle = allocator.wake_up(blocking=False, first=[tensors[2]])
    for start in (2, 0, 1, 3):
        handle.wait(tensors[start])
        _expect(_holds(tensors[start], start), f"tensor {start} has changed")
    handle.result()


@_promise("R6")
def _free_asleep(allocator: CuMemAllocator) -> None:
    """Memory that is freed while it sleeps is gone, and others wake whole."""
    kept, freed = _numbers(allocator, "data"), _numbers(allocator, "data", 3)
    allocator.sleep(tags="data")
    before = allocator.stats().reserved_address_bytes
    del freed
    _expect(allocator.stats().reserved_address_bytes < before, "its addresses are still held")
    allocator.wake_up()
    _expect(_holds(kept), "contents have changed")


@_promise("R9")
def _clean(allocator: CuMemAllocator) -> None:
    """Unchanged contents are put to sleep without a copy, changed ones are copied."""
    if not allocator.config.retain_backups:
        raise _LackingError("retain_backups is off")
    tensor = _numbers(allocator, "data")
    allocator.sleep(tags="data")
    allocator.wake_up()
    clean = allocator.sleep(tags="data")
    _expect(clean.bytes_dirty == 0, f"{clean.bytes_dirty} bytes were copied; {clean.problems}")
    allocator.wake_up()
    tensor[0] = -1
    changed = allocator.sleep(tags="data")
    _expect(0 < changed.bytes_dirty < tensor.nbytes, f"{changed.bytes_dirty} bytes were copied")
    allocator.wake_up()
    _expect(int(tensor[0]) == -1 and int(tensor[1]) == 1, "contents have changed")


# ---- places of backups ---------------------------------------------------------------------------


@_promise("R4")
def _tiers(allocator: CuMemAllocator) -> None:
    """Backups in pageable memory and in a file give the contents back."""
    with tempfile.TemporaryDirectory() as folder:
        tensor = _numbers(allocator, "data")
        for backup in ("pageable", f"file:{folder}", "pinned"):
            allocator.set_backup("data", backup)
            tensor.add_(1)
            allocator.sleep(tags="data")
            allocator.wake_up()
            tensor.sub_(1)
            _expect(_holds(tensor), f"contents have changed in {backup.partition(':')[0]}")


@_promise("R4")
def _limits(allocator: CuMemAllocator) -> None:
    """A limit on host memory refuses a sleep that does not fit, and nothing is lost."""
    limited = CuMemAllocator(replace(allocator.config, host_backup_limit=_MIB))
    tensor = _numbers(limited, "data")
    try:
        with _expect_error(CumempoolError):
            limited.sleep(tags="data")
        _expect(_holds(tensor), "contents have changed")
    finally:
        del tensor
        limited.close(force=True)


@_promise("R4")
def _read_backup(allocator: CuMemAllocator) -> None:
    """A backup can be read while its memory sleeps, and is not written to by accident."""
    tensor = _numbers(allocator, "data")
    allocator.sleep(tags="data")
    view = allocator.read_backup(tensor)
    _expect(_holds(view), "the backup differs")
    with _expect_error(InvalidArgumentError):
        view.add_(1)
    del view
    allocator.wake_up()
    _expect(_holds(tensor), "contents have changed")


# ---- guards, errors and numbers ------------------------------------------------------------------


@_promise("R5")
def _pins(allocator: CuMemAllocator) -> None:
    """A pinned tag refuses to sleep and names the holder."""
    tensor = _numbers(allocator, "data")
    with allocator.pin("data", holder="the selftest"):
        try:
            allocator.sleep(tags="data")
            raise _BrokenError("pinned memory went to sleep")
        except InUseError as error:
            _expect("the selftest" in str(error), "the error does not name the holder")
    allocator.sleep(tags="data")
    allocator.wake_up()
    _expect(_holds(tensor), "contents have changed")


@_promise("R12")
def _errors(allocator: CuMemAllocator) -> None:
    """Bad input gets a named error, and nothing changes."""
    tensor = _numbers(allocator, "data")
    with _expect_error(UnknownTagError):
        allocator.sleep(tags="nobody")
    with _expect_error(InvalidArgumentError):
        allocator.empty(-1)
    with _expect_error(InvalidArgumentError):
        allocator.use_memory_pool("x" * 300)
    _expect(_holds(tensor), "contents have changed")


@_promise("R13")
def _numbers_add_up(allocator: CuMemAllocator) -> None:
    """Statistics add up, awake and asleep."""
    tensors = [_numbers(allocator, tag) for tag in ("a", "b", "b")]
    for asleep in (False, True):
        if asleep:
            allocator.sleep(offload_tags="a")
        stats, infos = allocator.stats(), allocator.snapshot()
        awake = sum(info.bytes for info in infos if info.state == "awake")
        total = sum(info.bytes for info in infos)
        _expect(len(infos) == len(tensors), "an allocation is missing in the snapshot")
        _expect(stats.physical_bytes == stats.mapped_bytes == stats.awake_bytes == awake, "awake")
        _expect(stats.awake_bytes + stats.asleep_bytes == total, "in total")
        _expect(stats.reserved_address_bytes == total, "addresses")


# ---- torch ---------------------------------------------------------------------------------------


def _need_gpu(allocator: CuMemAllocator) -> None:
    if allocator.config.driver != "cuda":
        raise _LackingError("torch cannot be routed on the host driver")


@_promise("R10")
def _scope(allocator: CuMemAllocator) -> None:
    """What torch allocates in a scope comes from the pool, and goes back with its tensors."""
    _need_gpu(allocator)
    with allocator.use_memory_pool("data"):
        tensor = torch.arange(_ELEMENTS, device="cuda")
        temporary = torch.empty(64 * _MIB, dtype=torch.uint8, device="cuda")
    _expect(allocator.tag_of(tensor) == "data", "it is not in the pool")
    del temporary
    torch.cuda.empty_cache()
    _expect(allocator.stats().physical_bytes < 64 * _MIB, "memory of a dead tensor is stranded")
    allocator.sleep(tags="data")
    allocator.wake_up()
    _expect(_holds(tensor), "contents have changed")


@_promise("R5")
def _graphs(allocator: CuMemAllocator) -> None:
    """A CUDA graph that was captured before a sleep replays equal after the wake."""
    _need_gpu(allocator)
    with allocator.use_memory_pool("data"):
        tensor = torch.zeros(_MIB, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add_(1)
    graph.replay()
    for _ in range(3):
        allocator.sleep(tags="data")
        allocator.wake_up()
        graph.replay()
    torch.cuda.synchronize()
    _expect(bool((tensor == 4).all()), "the graph wrote elsewhere")
