"""Moves a KV cache between two processes and GPUs by NIXL, with sleeps of either side in between.

The prefill side writes its KV cache into the decode side's, and the decode side reads it; both
compare every byte. Then one side sleeps and wakes at the same addresses, registers again, exchanges
metadata again, and both repeat the transfers, for as many cycles as asked for. Needs NIXL
(``pip install nixl``); with one GPU both sides share it.

    python examples/nixl_kv_transfer.py
    python examples/nixl_kv_transfer.py --backing cuda_malloc    # faster, but cannot sleep
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

import cumempool
from cumempool.integrations.nixl import (
    RegisteredTag,
    create_agent,
    is_installed,
    replace_remote_agent,
)

TAG = "kv"
LAYER_BYTES = 64 * 1024**2
#: The transports of UCX. One host needs no InfiniBand, whose devices a container often shows but
#: does not grant. sm and tcp are for messages, and for memory that CUDA IPC does not take.
UCX_TLS = "cuda,sm,tcp,self"
PATIENCE = 120.0  # seconds until a peer counts as lost


@dataclass(frozen=True)
class Options:
    layers: int
    cycles: int
    repeats: int
    backing: str
    compare: bool


@dataclass
class Memory:
    """Tensors registered with an agent, and the function that makes a transfer list of them."""

    tensors: Sequence[torch.Tensor]
    transfer_list: Callable[[], Any]
    metadata: Callable[[], bytes]
    seconds: list[float] = field(default_factory=list)

    @property
    def gb_per_s(self) -> float:
        """Returns the median rate of this side's transfers."""
        moved = sum(tensor.nbytes for tensor in self.tensors)
        return moved / statistics.median(self.seconds) / 1e9


class Side:
    """One of the two processes. Both run the same steps, and meet at each message."""

    def __init__(self, role: str, device: int, pipe: Connection) -> None:
        self.role = role
        self.peer = "decode" if role == "prefill" else "prefill"
        self.device = device
        self.pipe = pipe
        self.agent = create_agent(role)
        self.remote: list[tuple[int, int, int]] = []
        self.rounds = 0

    def receive(self) -> Any:
        if not self.pipe.poll(PATIENCE):
            raise TimeoutError(f"{self.role}: no word from {self.peer}")
        return self.pipe.recv()

    def meet(self) -> None:
        """Waits until the other side comes here too."""
        self.pipe.send("here")
        self.receive()

    def exchange(self, memory: Memory) -> None:
        """Exchanges metadata with the peer; needed after each registration."""
        # Both remove each other first: a removal ends the connection in both directions.
        self.agent.remove_remote_agent(self.peer)
        pieces = [(t.data_ptr(), t.nbytes, self.device) for t in memory.tensors]
        self.pipe.send((memory.metadata(), pieces))
        metadata, self.remote = self.receive()
        replace_remote_agent(self.agent, self.peer, metadata)

    def transfer(self, operation: str, memory: Memory) -> None:
        """Moves all of the memory, and tells the peer."""
        torch.cuda.synchronize()
        handle = self.agent.initialize_xfer(
            operation,
            memory.transfer_list(),
            self.agent.get_xfer_descs(self.remote, "VRAM"),
            self.peer,
            f"round {self.rounds}.".encode(),
        )
        try:
            start = time.perf_counter()
            state = self.agent.transfer(handle)
            while state == "PROC" and time.perf_counter() - start < PATIENCE:
                state = self.agent.check_xfer_state(handle)
            memory.seconds.append(time.perf_counter() - start)
        finally:
            self.agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"{self.role}: {operation} ended as {state}")

    def await_transfer(self) -> None:
        """Waits until the peer's transfer is complete on this side."""
        deadline = time.monotonic() + PATIENCE
        while not self.agent.check_remote_xfer_done(self.peer, f"round {self.rounds}.".encode()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.role}: the transfer of {self.peer} did not arrive")
            time.sleep(0.0005)

    def round(self, memory: Memory) -> None:
        """Prefill WRITEs everything to decode, then decode READs everything from prefill."""
        self.rounds += 1
        if self.role == "prefill":
            fill(memory.tensors, 2 * self.rounds)
            self.meet()
            self.transfer("WRITE", memory)
            self.meet()
            fill(memory.tensors, 2 * self.rounds + 1)
            self.meet()
            self.await_transfer()
        else:
            for tensor in memory.tensors:
                tensor.zero_()
            torch.cuda.synchronize()
            self.meet()
            self.await_transfer()
            check(memory.tensors, 2 * self.rounds, "after a WRITE")
            self.meet()
            self.meet()
            self.transfer("READ", memory)
            check(memory.tensors, 2 * self.rounds + 1, "after a READ")
        self.meet()


def expected(seed: int, layer: int) -> torch.Tensor:
    """Returns the contents of a layer: the same bytes on every GPU of one kind."""
    generator = torch.Generator("cuda").manual_seed(seed * 1000 + layer)
    return torch.randint(
        0, 256, (LAYER_BYTES,), dtype=torch.uint8, device="cuda", generator=generator
    )


def fill(tensors: Sequence[torch.Tensor], seed: int) -> None:
    for layer, tensor in enumerate(tensors):
        tensor.copy_(expected(seed, layer))
    torch.cuda.synchronize()


def check(tensors: Sequence[torch.Tensor], seed: int, when: str) -> None:
    for layer, tensor in enumerate(tensors):
        if not torch.equal(tensor, expected(seed, layer)):
            raise RuntimeError(f"layer {layer} is not what was sent, {when}")


def raw_registration_keeps_it_awake(side: Side, allocator: cumempool.CuMemAllocator) -> str:
    """Registers and pins by hand, and returns the error of a sleep."""
    pieces = [(r.address, r.bytes, r.device, "") for r in allocator.registrable_ranges(TAG)]
    registered = side.agent.register_memory(side.agent.get_reg_descs(pieces, "VRAM"))
    try:
        with allocator.pin(TAG, holder="a raw NIXL registration"):
            allocator.sleep(offload_tags=TAG, tags=TAG)
    except cumempool.CumempoolError as error:
        return str(error)
    finally:
        side.agent.deregister_memory(registered)
    raise RuntimeError("memory went to sleep under a registration")


def sleep_and_wake(allocator: cumempool.CuMemAllocator, registered: RegisteredTag) -> None:
    """Puts the KV cache to sleep and wakes it; the registration follows by itself."""
    before = registered.generation
    allocator.sleep(offload_tags=TAG, tags=TAG)
    if registered.registered:
        raise RuntimeError("memory sleeps and is still registered")
    report = allocator.wake_up(TAG)
    if report.problems or registered.generation != before + 1:
        raise RuntimeError(f"not registered again: {report.problems}")


def cycle(
    side: Side, allocator: cumempool.CuMemAllocator, registered: RegisteredTag, memory: Memory
) -> None:
    """Puts this side or the other to sleep and wakes it, then transfers everything again."""
    if side.rounds % 2 == (side.role == "decode"):
        sleep_and_wake(allocator, registered)
        # Both sides ended the last round with the same bytes.
        check(memory.tensors, 2 * side.rounds + 1, "after a sleep")
    side.exchange(memory)
    side.round(memory)


def plain_memory(side: Side, options: Options) -> float:
    """Returns the rate of this side's transfers of ordinary torch memory."""
    tensors = [
        torch.empty(LAYER_BYTES, dtype=torch.uint8, device="cuda") for _ in range(options.layers)
    ]
    registered = side.agent.register_memory(tensors)
    memory = Memory(
        tensors, lambda: side.agent.get_xfer_descs(tensors), side.agent.get_agent_metadata
    )
    side.exchange(memory)
    for _ in range(options.repeats + 1):
        side.round(memory)
    del memory.seconds[0]  # sets the connection up
    side.agent.deregister_memory(registered)
    return memory.gb_per_s


def run_side(
    role: str, device: int, pipe: Connection, results: Connection, options: Options
) -> None:
    """Runs one of the two processes, and sends its figures to the parent."""
    torch.cuda.set_device(device)
    allocator = cumempool.CuMemAllocator()
    with allocator.use_memory_pool(TAG, backing=options.backing):
        tensors = [
            torch.empty(LAYER_BYTES, dtype=torch.uint8, device="cuda")
            for _ in range(options.layers)
        ]
    side = Side(role, device, pipe)
    found: dict[str, Any] = {
        "device": device,
        "handle_types": allocator.stats().tags[TAG].handle_types,
        "refusal": raw_registration_keeps_it_awake(side, allocator),
    }
    with RegisteredTag(side.agent, allocator, TAG) as registered:
        memory = Memory(tensors, lambda: registered.xfer_descs(tensors), registered.metadata)
        side.exchange(memory)
        for _ in range(options.repeats + 1):
            side.round(memory)
        del memory.seconds[0]  # sets the connection up
        for _ in range(options.cycles):
            cycle(side, allocator, registered, memory)
        found["registrations"] = registered.generation
        found["gb_per_s"] = memory.gb_per_s
    if options.compare:
        found["plain_gb_per_s"] = plain_memory(side, options)
    side.agent.remove_remote_agent(side.peer)
    side.meet()
    results.send(found)


def run(options: Options) -> dict[str, Any]:
    """Starts both processes and merges their figures."""
    spawn = multiprocessing.get_context("spawn")
    ends = spawn.Pipe()
    children: dict[Connection, Any] = {}
    for number, role in enumerate(("prefill", "decode")):
        device = number % torch.cuda.device_count()
        results, there = spawn.Pipe(duplex=False)
        child = spawn.Process(
            target=run_side, args=(role, device, ends[number], there, options), name=role
        )
        child.start()
        there.close()
        children[results] = child
    for end in ends:
        end.close()
    found: dict[str, Any] = {}
    pending = list(children)
    while pending:
        ready = wait(pending)
        for results in [each for each in pending if each in ready]:
            pending.remove(results)
            try:
                found[children[results].name] = results.recv()
            except EOFError:
                sys.stderr.write(f"the {children[results].name} side failed\n")
                for child in children.values():  # the other would wait for it in vain
                    child.terminate()
    for child in children.values():
        child.join()
    return found


def summary(options: Options, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of both sides: READ rates of decode, WRITE rates of prefill."""
    write, read = found["prefill"], found["decode"]
    return {
        "backing": options.backing,
        "bytes": options.layers * LAYER_BYTES,
        "cycles": options.cycles,
        "devices": [write["device"], read["device"]],
        "handle_types": list(write["handle_types"]),
        "ucx_tls": os.environ["UCX_TLS"],
        "registrations": [write["registrations"], read["registrations"]],
        "refusals": [write["refusal"], read["refusal"]],
        "write_gb_per_s": write["gb_per_s"],
        "read_gb_per_s": read["gb_per_s"],
        "plain_write_gb_per_s": write.get("plain_gb_per_s"),
        "plain_read_gb_per_s": read.get("plain_gb_per_s"),
    }


def describe(figures: dict[str, Any]) -> str:
    """Returns the figures as text."""
    devices = " to ".join(f"cuda:{device}" for device in figures["devices"])
    lines = [
        f"KV cache of {figures['bytes'] / 1024**3:.2f} GiB, {devices}, "
        f"backing {figures['backing']}, handles {', '.join(figures['handle_types']) or 'none'}, "
        f"UCX_TLS={figures['ucx_tls']}",
        f"sleep under a raw registration: {figures['refusals'][0]}",
        "every byte as it was sent",
    ]
    if figures["cycles"]:
        lines[-1] += f", through {figures['cycles']} cycles of sleep, wake and registration"
    for operation in ("write", "read"):
        pool, plain = figures[f"{operation}_gb_per_s"], figures[f"plain_{operation}_gb_per_s"]
        line = f"{operation.upper():5} {pool:8.2f} GB/s"
        if plain:
            line += f", ordinary torch memory {plain:8.2f} GB/s, ratio {pool / plain:.2f}"
        lines.append(line)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="size of the KV cache")
    parser.add_argument("--cycles", type=int, default=20, help="sleeps, by turns on either side")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds before the cycles")
    parser.add_argument("--backing", choices=["vmm", "cuda_malloc"], default="vmm")
    parser.add_argument("--no-compare", action="store_true", help="leave ordinary torch memory out")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("this example needs an NVIDIA GPU")
    if not is_installed():
        sys.exit("this example needs NIXL: pip install nixl")
    os.environ.setdefault("UCX_TLS", UCX_TLS)  # for the child processes
    options = Options(
        layers=max(1, round(arguments.gib * 1024**3 / LAYER_BYTES)),
        # Memory of cudaMalloc cannot sleep.
        cycles=arguments.cycles if arguments.backing == "vmm" else 0,
        repeats=max(1, arguments.repeats),
        backing=arguments.backing,
        compare=not arguments.no_compare,
    )
    found = run(options)
    if len(found) < 2:
        sys.exit(1)
    figures = summary(options, found)
    print(describe(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
