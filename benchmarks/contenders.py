"""Puts cumempool and its peers behind one interface for the parts of the benchmark."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from bench import GIB, Bench
from workloads import Shape


class Contender(ABC):
    """Tagged memory that sleeps and wakes.

    Attributes:
        later_cycles: The number of later cycles; some peers need seconds for each.
    """

    later_cycles = 5

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @abstractmethod
    def scope(self, tag: str, keep: bool = True) -> AbstractContextManager[object]:
        """Allocates under the tag in the body; `keep` says whether a sleep saves contents."""

    @abstractmethod
    def sleep(self, tag: str) -> Any:
        """Puts the tag to sleep; returns a report, or None."""

    @abstractmethod
    def wake(self, tag: str) -> Any: ...

    @abstractmethod
    def discard(self, tag: str) -> Any: ...

    def empty(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Allocates a tensor inside a scope, as a user does."""
        return torch.empty(shape, dtype=dtype, device="cuda")

    def device_bytes(self) -> int:
        """Returns the device memory in use by all processes."""
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


class Cumempool(Contender):
    """cumempool on the driver of the run."""

    def __init__(
        self, bench: Bench, *, retain: bool = True, rdma: bool = True, devices: int = 1
    ) -> None:
        import cumempool

        super().__init__(bench)
        self.rdma = rdma
        options: dict[str, Any] = {"driver": bench.settings.driver, "retain_backups": retain}
        if not bench.on_cuda:
            options |= {"host_driver_devices": devices, "host_driver_bytes": 2 * GIB}
        self.allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(**options))

    def scope(
        self, tag: str, keep: bool = True, backup: str | None = None
    ) -> AbstractContextManager[object]:
        options: dict[str, Any] = {} if backup is None else {"backup": backup}
        return self.allocator.use_memory_pool(
            tag, on_sleep="offload" if keep else "discard", rdma=self.rdma, **options
        )

    def empty(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        if self.bench.on_cuda:
            return super().empty(shape, dtype)
        return self.allocator.empty(shape, dtype=dtype)  # torch cannot be routed there

    def exact(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Returns a tensor with its own allocation."""
        return self.allocator.empty(shape, dtype=dtype)

    def sleep(self, tag: str) -> Any:
        return self.allocator.sleep(tags=[tag])

    def wake(self, tag: str) -> Any:
        return self.allocator.wake_up([tag])

    def discard(self, tag: str) -> Any:
        return self.allocator.discard([tag])

    def device_bytes(self) -> int:
        if self.bench.on_cuda:
            return super().device_bytes()
        return self.allocator.stats().physical_bytes


class Vllm(Contender):
    """vLLM's allocator. Its sleep takes all tags, and keeps the contents of the named ones."""

    later_cycles = 3

    def __init__(self, bench: Bench) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator

        super().__init__(bench)
        self.allocator = CuMemAllocator.get_instance()

    def scope(self, tag: str, keep: bool = True) -> AbstractContextManager[object]:
        scope: AbstractContextManager[object] = self.allocator.use_memory_pool(tag=tag)
        return scope

    def sleep(self, tag: str) -> None:
        self.allocator.sleep(offload_tags=(tag,))

    def wake(self, tag: str) -> None:
        self.allocator.wake_up(tags=[tag])

    def discard(self, tag: str) -> None:
        self.allocator.sleep(offload_tags=(f"all but {tag}",))


class TorchMemorySaver(Contender):
    """torch_memory_saver in its torch mode, which needs no preloaded library."""

    def __init__(self, bench: Bench, *, retain: bool = False) -> None:
        from torch_memory_saver import torch_memory_saver

        super().__init__(bench)
        self.later_cycles = 3 if retain else 1
        self.saver = torch_memory_saver
        self.saver.hook_mode = "torch"
        self.saver.retain_cpu_backup = retain

    def scope(self, tag: str, keep: bool = True) -> AbstractContextManager[object]:
        scope: AbstractContextManager[object] = self.saver.region(tag=tag, enable_cpu_backup=keep)
        return scope

    def sleep(self, tag: str) -> None:
        self.saver.pause(tag)

    def wake(self, tag: str) -> None:
        self.saver.resume(tag)

    def discard(self, tag: str) -> None:
        self.saver.pause(tag)


#: Contenders that need --peers.
PEERS = ("vllm", "tms", "tms-retain")


def make(name: str, bench: Bench) -> Contender:
    """Makes a contender by its name in the records.

    ``cumempool-copy`` keeps no backups between sleeps. Only ``cumempool-no-rdma`` has memory that
    is not made for RDMA. ``cumempool-prepared`` and ``cumempool-first`` are ``cumempool``, used
    differently.
    """
    if name == "vllm":
        return Vllm(bench)
    if name in ("tms", "tms-retain"):
        return TorchMemorySaver(bench, retain=name == "tms-retain")
    return Cumempool(bench, retain=name != "cumempool-copy", rdma=name != "cumempool-no-rdma")
