"""One rank of a gloo group on the host driver: does by name what the test asks for."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from cumempool import (
    CuMemAllocator,
    CuMemConfig,
    CumempoolError,
    Pin,
    RegistrableRange,
    _torch,
    distributed,
)

MIB = 1 << 20


def contents(tag: str, rank: int, size: int) -> torch.Tensor:
    seed = rank * 1000 + sum(map(ord, tag))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


class Rank:
    """What a rank holds between two commands."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a container need not know its own name
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        self.rank = rank
        self.pairs = dist.new_group([0, 1])
        self.survivors = dist.new_group(range(size - 1))
        self.tensors: dict[str, torch.Tensor] = {}
        self.pins: list[Pin] = []

    def begin(self, mib: int = 64, limit: int | None = None, **bytes_of_tag: int) -> None:
        """Makes an allocator and fills tags with contents of this rank."""
        config = CuMemConfig(driver="host", host_driver_bytes=mib * MIB, host_backup_limit=limit)
        self.allocator = CuMemAllocator(config)
        for tag, size in bytes_of_tag.items():
            self.take(tag, size)
            self.tensors[tag].copy_(contents(tag, self.rank, size))

    def take(self, tag: str, size: int) -> None:
        self.tensors[tag] = self.allocator.empty(size, dtype=torch.uint8, tag=tag)

    def give(self, tag: str) -> None:
        del self.tensors[tag]

    def end(self) -> int:
        """Closes without force; what is still held then."""
        for pin in self.pins:
            pin.release()
        self.pins.clear()
        self.tensors.clear()
        gc.collect()
        self.allocator.close()
        stats = self.allocator.stats()
        return stats.physical_bytes + stats.reserved_address_bytes + stats.host_bytes

    def group(self, name: str) -> dist.ProcessGroup | None:
        return {"pairs": self.pairs, "survivors": self.survivors}.get(name)

    def sleep(self, group: str = "", late: float = 0.0, **arguments: Any) -> Any:
        time.sleep(late)
        return distributed.sleep(self.group(group), allocator=self.allocator, **arguments)

    def wake_up(self, group: str = "", **arguments: Any) -> Any:
        return distributed.wake_up(self.group(group), allocator=self.allocator, **arguments)

    def discard(self, tags: Sequence[str], **arguments: Any) -> Any:
        return distributed.discard(None, tags, allocator=self.allocator, **arguments)

    def meets_through_one_store(self) -> bool:
        """Whether the ways to find a group's store, of older torch and newer, give the same."""
        found = []
        for group in (dist.GroupMember.WORLD, self.survivors):
            _torch.store_of_group(group).set(f"probe {self.rank}", "here")
            older = distributed_c10d._world.pg_map[group][1]
            found.append(older.check([f"probe {self.rank}"]))
        return all(found)

    def states(self) -> dict[str, str]:
        return {info.tag: info.state for info in self.allocator.snapshot()}

    def intact(self) -> dict[str, bool]:
        return {
            tag: torch.equal(tensor, contents(tag, self.rank, tensor.numel()))
            for tag, tensor in self.tensors.items()
        }

    def pin(self, tag: str) -> None:
        self.pins.append(self.allocator.pin(tag, "a registration"))

    def hook(self, tag: str, what: str) -> None:
        """Has something happen before memory of the tag goes."""
        happenings: dict[str, Callable[[], object]] = {
            "raise": lambda: 1 // 0,
            "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        }

        def before(tag: str, ranges: Sequence[RegistrableRange]) -> None:
            happenings[what]()

        self.allocator.register_hooks(tag, before_unmap=before)

    def reduced(self, tag: str) -> list[int]:
        """Contents of a tag added up over all ranks, by a collective on the pool's memory."""
        before = self.tensors[tag][:64].clone()
        part = self.tensors[tag][:64].view(torch.int32)
        part.fill_(self.rank + 1)
        dist.all_reduce(part)
        found = part.tolist()
        self.tensors[tag][:64].copy_(before)
        return found


def serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """Answers commands until the pipe closes."""
    torch.set_num_threads(1)
    served = Rank(rank, size, port)
    pipe.send((True, os.getpid()))
    while True:
        try:
            name, arguments, named = pipe.recv()
        except EOFError:
            break
        try:
            answer = (True, getattr(served, name)(*arguments, **named))
        except (CumempoolError, RuntimeError, ValueError) as error:
            answer = (False, error)
        pipe.send(answer)
    os._exit(0)  # peers may be gone, and leaving a group properly would wait for them
