"""Puts Ray actors to sleep and wakes them together, or not at all.

Each actor holds a model in a pool, on its own GPU. The actors meet through a store that the first
of them opens, so ``cumempool.distributed`` works without a process group. Shows that all actors
sleep and wake with equal outputs, that all stay awake if one cannot sleep, and that the others wake
again if one dies. Needs Ray (``pip install ray``); without it, or without enough GPUs, says so and
exits with 77.

    python examples/ray_actors.py
    python examples/ray_actors.py --driver host --hidden 64    # no GPU needed
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import cumempool
from cumempool import distributed, format_bytes

try:
    import ray
except ImportError:
    ray = None

PATIENCE = 120  # seconds until an actor counts as lost
SHORT = 5.0  # seconds that the others wait for a killed actor
NOT_RUN = 77  # exit code if the machine cannot run the example

Outcome = distributed.GroupReport | cumempool.DistributedTransitionError


@dataclass(frozen=True)
class Options:
    driver: str
    actors: int
    layers: int
    hidden: int


class Worker:
    """The process of one actor."""

    def __init__(self, rank: int, options: Options) -> None:
        self.rank, self.options = rank, options
        config = cumempool.CuMemConfig(enable_sleep_mode=True, driver=options.driver)
        self.allocator = cumempool.CuMemAllocator(config)
        self.device = torch.device("cpu" if options.driver == "host" else "cuda")
        torch.manual_seed(rank)
        if options.driver == "host":  # torch cannot be routed to the host driver
            self.model = self._build()
            self.allocator.adopt(self.model, "weights")
        else:
            with self.allocator.use_memory_pool("weights"):
                self.model = self._build()

    def _build(self) -> nn.Module:
        sizes = [(self.options.hidden, self.options.hidden)] * self.options.layers
        return nn.Sequential(*(nn.Linear(*size, device=self.device) for size in sizes))

    def open_store(self) -> tuple[str, int]:
        """Opens the store that all meet through; returns its host and port."""
        host = ray.util.get_node_ip_address()
        patience = timedelta(seconds=PATIENCE)
        self.store = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False)
        self._meet()
        return host, self.store.port

    def join(self, host: str, port: int) -> None:
        self.store = dist.TCPStore(host, port, None, False, timedelta(seconds=PATIENCE))
        self._meet()

    def _meet(self) -> None:
        self.group = distributed.StoreGroup(self.store, self.rank, self.options.actors)

    def sleep(self, timeout: float) -> Outcome:
        try:
            return distributed.sleep(
                self.group, offload_tags="weights", allocator=self.allocator, timeout=timeout
            )
        except cumempool.DistributedTransitionError as error:
            return error

    def wake_up(self, timeout: float) -> Outcome:
        try:
            return distributed.wake_up(self.group, allocator=self.allocator, timeout=timeout)
        except cumempool.DistributedTransitionError as error:
            return error

    def pin(self) -> None:
        self.pinned = self.allocator.pin("weights", "a registration left on purpose")

    def unpin(self) -> None:
        self.pinned.release()

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Returns a fingerprint of the model's output."""
        steps = torch.arange(4 * self.options.hidden, device=self.device, dtype=torch.float32)
        output = self.model((steps / steps.numel()).view(4, -1))
        return hashlib.sha256(output.cpu().numpy().tobytes()).hexdigest()

    def used_bytes(self) -> int:
        """Returns the bytes of the pool that the device holds for this actor."""
        return self.allocator.stats().physical_bytes


class Actors:
    """All actors, called at the same time."""

    def __init__(self, options: Options) -> None:
        gpus = 0 if options.driver == "host" else 1
        remote = ray.remote(num_cpus=0.5, num_gpus=gpus)(Worker)
        self.handles = [remote.remote(rank, options) for rank in range(options.actors)]
        where = ray.get(self.handles[0].open_store.remote(), timeout=PATIENCE)
        self.of(self.handles[1:], "join", *where)

    def of(self, handles: list[Any], name: str, *arguments: Any) -> list[Any]:
        asked = [getattr(handle, name).remote(*arguments) for handle in handles]
        return list(ray.get(asked, timeout=2 * PATIENCE))

    def all(self, name: str, *arguments: Any) -> list[Any]:
        return self.of(self.handles, name, *arguments)


def sleeps_and_wakes(actors: Actors, expected: list[str]) -> tuple[bool, dict[str, Any]]:
    """Returns whether all sleep and wake with the same outputs, and the figures."""
    awake = sum(actors.all("used_bytes"))
    slept = actors.all("sleep", float(PATIENCE))
    asleep = sum(actors.all("used_bytes"))
    woken = actors.all("wake_up", float(PATIENCE))
    if not all(isinstance(outcome, distributed.GroupReport) for outcome in [*slept, *woken]):
        print(f"NOT done: {slept} {woken}")
        return False, {}
    print(slept[0])
    print(f"memory of all actors: {format_bytes(awake)} -> {format_bytes(asleep)}")
    print(woken[0])
    same = actors.all("fingerprint") == expected
    print(f"outputs {'identical' if same else 'DIFFERENT'}")
    figures = {
        "awake_bytes": awake,
        "asleep_bytes": asleep,
        "sleep_seconds": slept[0].seconds,
        "wake_seconds": woken[0].seconds,
    }
    return same and asleep == 0 and slept[0].bytes_freed == awake, figures


def one_refuses(actors: Actors, expected: list[str]) -> bool:
    """Returns whether all stay awake and are told the reason if one cannot sleep."""
    last = len(actors.handles) - 1
    actors.of(actors.handles[last:], "pin")
    outcomes = actors.all("sleep", float(PATIENCE))
    actors.of(actors.handles[last:], "unpin")
    errors = [o for o in outcomes if isinstance(o, cumempool.DistributedTransitionError)]
    told = len(errors) == len(outcomes) and all(list(e.failures) == [last] for e in errors)
    print(f"every actor was told: {errors[0].failures[last]}" if told else f"NOT told: {outcomes}")
    return told and actors.all("fingerprint") == expected


def one_dies(actors: Actors, expected: list[str]) -> bool:
    """Returns whether the others wake again in time if one is gone."""
    last = len(actors.handles) - 1
    ray.kill(actors.handles[last])
    others = actors.handles[:last]
    begun = time.monotonic()
    outcomes = actors.of(others, "sleep", SHORT)
    taken = time.monotonic() - begun
    errors = [o for o in outcomes if isinstance(o, cumempool.DistributedTransitionError)]
    told = len(errors) == len(outcomes) and all(e.unanswered == (last,) for e in errors)
    print(f"after {taken:.1f} s: {errors[0] if told else outcomes}")
    return told and actors.of(others, "fingerprint") == expected[:last] and taken < 3 * SHORT


def run(options: Options) -> tuple[bool, dict[str, Any]]:
    """Runs the example; returns whether it succeeded, and the figures."""
    gpus = 0 if options.driver == "host" else options.actors
    ray.init(
        num_cpus=options.actors,
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        actors = Actors(options)
        expected = actors.all("fingerprint")
        print(f"{options.actors} Ray actors ({options.driver} driver)")
        print("\n1. All sleep and wake")
        good, figures = sleeps_and_wakes(actors, expected)
        print("\n2. One has its weights pinned: none sleeps")
        good = one_refuses(actors, expected) and good
        print("\n3. All sleep and wake again")
        good = sleeps_and_wakes(actors, expected)[0] and good
        print("\n4. One is killed: the others go back")
        return one_dies(actors, expected) and good, figures
    finally:
        ray.shutdown()


def not_run(reason: str) -> None:
    print(f"not run: {reason}", file=sys.stderr)
    sys.exit(NOT_RUN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", type=int, default=2, help="one GPU each")
    parser.add_argument("--driver", choices=["cuda", "host"], default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if ray is None:
        not_run("this example needs Ray, which is not installed: pip install ray")
    if arguments.driver == "cuda" and torch.cuda.device_count() < arguments.actors:
        not_run(
            f"this example needs {arguments.actors} NVIDIA GPUs, one for each actor, and there are "
            f"{torch.cuda.device_count()}"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which would want a network
    options = Options(arguments.driver, arguments.actors, arguments.layers, arguments.hidden)
    good, figures = run(options)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\nproven" if good else "\nNOT proven")
    sys.exit(0 if good else "not proven: see above")


if __name__ == "__main__":
    main()
