"""Puts a tensor-parallel Llama to sleep and wakes it on all of its GPUs, or on none.

Starts one process per GPU. Each holds its part of a model of the shape of Llama 3 8B (random
weights, fixed seeds, no network) in a pool; the parts meet by collectives (NCCL). The ranks sleep
and wake together by ``cumempool.distributed``; one fails on purpose, which leaves all of them
awake. Logits and tokens must be the same, bit for bit, each time and on every rank.

    python examples/tensor_parallel.py
    python examples/tensor_parallel.py --ranks 4
    python examples/tensor_parallel.py --driver host --layers 2 --hidden 64    # no GPU needed
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import queue
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import cumempool
from cumempool import distributed, format_bytes

SEED = 31
PROMPT_TOKENS = 48
PATIENCE = 240  # seconds until a rank counts as lost
NOT_RUN = 77  # exit code if the machine cannot run the example


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, by default of Llama 3 8B."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    ffn: int = 14336
    vocabulary: int = 128256
    length: int = 256

    @property
    def head(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Place:
    """A rank's place in the group, its device and its dtype."""

    rank: int
    ranks: int
    device: torch.device
    dtype: torch.dtype


# ---- the model


def matrix(place: Place, rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    made = torch.empty(rows, columns, device=place.device, dtype=place.dtype)
    made.normal_(0.0, 0.6 / math.sqrt(columns), generator=generator)
    return nn.Parameter(made, requires_grad=False)


def total(partial: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all ranks."""
    dist.all_reduce(partial)
    return partial


def normalized(states: torch.Tensor) -> torch.Tensor:
    """Returns the RMS norm with a weight of one."""
    scale = states.float().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
    return (states.float() * scale).to(states.dtype)


def rotated(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns the rotary position embedding of (heads, tokens, size)."""
    half = heads.shape[-1] // 2
    steps = torch.arange(half, device=heads.device, dtype=torch.float32)
    angles = positions[:, None].float() * 500000.0 ** (-steps / half)
    left, right = heads[..., :half].float(), heads[..., half:].float()
    cosine, sine = angles.cos(), angles.sin()
    turned = (left * cosine - right * sine, right * cosine + left * sine)
    return torch.cat(turned, -1).to(heads.dtype)


class Layer(nn.Module):
    """One decoder layer; this rank has some of its heads and of its feed-forward columns."""

    def __init__(self, shape: Shape, place: Place, generator: torch.Generator) -> None:
        super().__init__()
        self.shape, self.ranks = shape, place.ranks
        attention = shape.hidden // place.ranks
        kv = shape.kv_heads * shape.head // place.ranks
        ffn = shape.ffn // place.ranks
        self.qkv = matrix(place, attention + 2 * kv, shape.hidden, generator)  # by columns
        self.output = matrix(place, shape.hidden, attention, generator)  # by rows
        self.gate_up = matrix(place, 2 * ffn, shape.hidden, generator)
        self.down = matrix(place, shape.hidden, ffn, generator)

    def attend(
        self, states: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        tokens, begin = states.shape[0], int(positions[0])
        kv_heads = self.shape.kv_heads // self.ranks
        heads = self.shape.heads // self.ranks
        split = (states @ self.qkv.T).view(tokens, heads + 2 * kv_heads, -1).transpose(0, 1)
        query = rotated(split[:heads], positions)
        cache[0, :, begin : begin + tokens] = rotated(split[heads : heads + kv_heads], positions)
        cache[1, :, begin : begin + tokens] = split[heads + kv_heads :]
        # Plain attention: a fused one may give other bits each time.
        keys, values = cache[:, :, : begin + tokens].repeat_interleave(heads // kv_heads, 1)
        scores = (query @ keys.transpose(1, 2)).float() / math.sqrt(self.shape.head)
        columns = torch.arange(begin + tokens, device=states.device)
        scores.masked_fill_(columns > positions[:, None], -math.inf)
        mixed = scores.softmax(-1).to(values.dtype) @ values
        return mixed.transpose(0, 1).reshape(tokens, -1)

    def forward(
        self, states: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        mixed = self.attend(normalized(states), cache, positions)
        states = states + total(mixed @ self.output.T)
        gate, up = (normalized(states) @ self.gate_up.T).chunk(2, -1)
        return states + total((nn.functional.silu(gate) * up) @ self.down.T)


class Model(nn.Module):
    """This rank's part of a Llama; the vocabulary is split as well."""

    def __init__(self, shape: Shape, place: Place) -> None:
        super().__init__()
        generator = torch.Generator(place.device).manual_seed(SEED + place.rank)
        self.words = shape.vocabulary // place.ranks
        self.first = self.words * place.rank
        self.embedding = matrix(place, self.words, shape.hidden, generator)
        self.layers = nn.ModuleList(Layer(shape, place, generator) for _ in range(shape.layers))
        self.head = matrix(place, self.words, shape.hidden, generator)
        self.ranks = place.ranks

    def forward(
        self, tokens: torch.Tensor, caches: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Returns the logits of the last token, over the whole vocabulary."""
        local = tokens - self.first
        ours = (local >= 0) & (local < self.words)
        states = self.embedding[local.clamp(0, self.words - 1)] * ours[:, None]
        states = total(states)
        for layer, cache in zip(self.layers, caches, strict=True):
            states = layer(states, cache, positions)
        part = normalized(states[-1:]) @ self.head.T
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        dist.all_gather(parts, part)
        return torch.cat(parts, -1)[0]


# ---- one rank


class Rank:
    """The model, its cache and its allocator in one process."""

    def __init__(self, shape: Shape, place: Place, driver: str) -> None:
        config = cumempool.CuMemConfig(enable_sleep_mode=True, driver=driver)
        self.allocator = cumempool.CuMemAllocator(config)
        self.shape, self.place = shape, place
        kv_heads = shape.kv_heads // place.ranks
        sizes = (shape.layers, 2, kv_heads, shape.length, shape.head)
        if driver == "cuda":
            with self.allocator.use_memory_pool("weights"):
                self.model = Model(shape, place)
            with self.allocator.use_memory_pool("kv_cache", on_wake="zero"):
                self.caches = torch.zeros(sizes, dtype=place.dtype, device=place.device)
        else:  # torch cannot be routed to the host driver: memory is moved in, or asked for
            self.model = Model(shape, place)
            self.allocator.adopt(self.model, "weights")
            self.caches = self.allocator.empty(sizes, dtype=place.dtype, tag="kv_cache").zero_()

    def generate(self, count: int) -> tuple[str, list[int]]:
        """Returns a fingerprint of the logits of every step, and the greedy tokens."""
        device = self.place.device
        prompt = torch.arange(PROMPT_TOKENS, device=device) * 7919 % self.shape.vocabulary
        positions = torch.arange(PROMPT_TOKENS, device=device)
        digest, chosen = hashlib.sha256(), []
        tokens = prompt
        for _ in range(count):
            logits = self.model(tokens, self.caches, positions).float()
            digest.update(logits.cpu().numpy().tobytes())
            chosen.append(int(torch.nonzero(logits == logits.max())[0]))  # the first of equals
            tokens = torch.tensor(chosen[-1:], device=device)
            positions = positions[-1:] + 1
        return digest.hexdigest(), chosen

    def used_bytes(self) -> int:
        """Returns the device memory in use, as the driver counts it."""
        if self.place.device.type == "cpu":
            return self.allocator.stats().physical_bytes
        torch.cuda.synchronize()
        free, whole = torch.cuda.mem_get_info()
        return whole - free

    def refuse_on_purpose(self) -> str:
        """Pins the last rank's weights; returns the error of the group's sleep on this rank."""
        last = self.place.rank == self.place.ranks - 1
        pin = self.allocator.pin("weights", "a registration left on purpose") if last else None
        try:
            self.sleep()
        except cumempool.DistributedTransitionError as error:
            return error.failures.get(self.place.ranks - 1, "")
        finally:
            if pin is not None:
                pin.release()
        return ""

    def sleep(self) -> distributed.GroupReport:
        return distributed.sleep(
            None, offload_tags="weights", allocator=self.allocator, timeout=PATIENCE / 2
        )

    def wake_up(self) -> distributed.GroupReport:
        return distributed.wake_up(None, allocator=self.allocator, timeout=PATIENCE / 2)


@torch.no_grad()
def work(rank: Rank, cycles: int, tokens: int) -> dict[str, Any]:
    """Runs one rank and returns its results."""
    stats = rank.allocator.stats
    found: dict[str, Any] = {
        "weight_bytes": stats().tags["weights"].awake_bytes,
        "kv_bytes": stats().tags["kv_cache"].awake_bytes,
    }
    expected = rank.generate(tokens)
    runs = [expected]
    found["refusal"] = rank.refuse_on_purpose()
    runs.append(rank.generate(tokens))
    rows = []
    for _ in range(cycles):
        awake = rank.used_bytes()
        slept = rank.sleep()
        asleep = rank.used_bytes()
        woken = rank.wake_up()
        rows.append(
            {
                "awake_bytes": awake,
                "asleep_bytes": asleep,
                "sleep_seconds": slept.seconds,
                "wake_seconds": woken.seconds,
                "copied_bytes": slept.ranks[rank.place.rank].bytes_dirty,
                "group_freed_bytes": slept.bytes_freed,
            }
        )
        rank.caches.zero_()
        runs.append(rank.generate(tokens))
    found |= {"cycles": rows, "digests": [run[0] for run in runs], "tokens": expected[1]}
    return found


def rank_main(rank: int, ranks: int, port: int, arguments: Any, results: Any) -> None:
    """Runs the process of a rank: joins the group, works, and reports."""
    host = arguments.driver == "host"
    if not host:
        torch.cuda.set_device(rank)
    device = torch.device("cpu") if host else torch.device("cuda", rank)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=PATIENCE))
    dist.init_process_group(
        "gloo" if host else "nccl",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=PATIENCE),
        device_id=None if host else device,
    )
    torch.set_num_threads(1)
    place = Place(rank, ranks, device, torch.float32 if host else torch.bfloat16)
    made = Rank(shape_of(arguments), place, arguments.driver)
    results.put((rank, work(made, arguments.cycles, arguments.tokens)))
    dist.barrier()
    dist.destroy_process_group()
    allocator = made.allocator
    del made
    if not host:
        torch.cuda.empty_cache()
    allocator.close(force=True)


# ---- all ranks


def start(arguments: Any) -> list[dict[str, Any]]:
    """Runs all ranks and returns their results; ends every process in any case."""
    context = torch.multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    results: Any = context.Queue()
    ranks = arguments.ranks
    processes = [
        context.Process(target=rank_main, args=(rank, ranks, store.port, arguments, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        return collect(processes, results)
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def collect(processes: list[Any], results: Any) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + 2 * PATIENCE
    while len(found) < len(processes):
        try:
            rank, value = results.get(timeout=1)
            found[rank] = value
        except queue.Empty:
            lost = [rank for rank, one in enumerate(processes) if one.exitcode not in (None, 0)]
            if lost or time.monotonic() > deadline:
                for process in processes:
                    process.kill()
                sys.exit(f"no result: ranks {lost or 'all'} ended early or took too long")
    return [found[rank] for rank in range(len(processes))]


def shape_of(arguments: Any) -> Shape:
    sizes = {name: getattr(arguments, name) for name in asdict(Shape())}
    return Shape(**{name: size for name, size in sizes.items() if size is not None})


def show(found: list[dict[str, Any]]) -> None:
    print("  rank  cycle  awake        asleep       sleep      wake       copied")
    for rank, one in enumerate(found):
        for number, row in enumerate(one["cycles"]):
            print(
                f"  {rank:4}  {number:5}  {format_bytes(row['awake_bytes']):11}  "
                f"{format_bytes(row['asleep_bytes']):11}  "
                f"{row['sleep_seconds'] * 1e3:6.1f} ms  {row['wake_seconds'] * 1e3:6.1f} ms  "
                f"{format_bytes(row['copied_bytes'])}"
            )


def run(arguments: Any) -> tuple[bool, dict[str, Any]]:
    """Runs the example; returns whether it succeeded, and the figures."""
    shape = shape_of(arguments)
    found = start(arguments)
    weights = sum(one["weight_bytes"] for one in found)
    print(
        f"Llama with {shape.layers} layers of {shape.hidden} over {arguments.ranks} ranks "
        f"({arguments.driver} driver): {format_bytes(weights)} of weights"
    )
    print("\n1. A sleep of the group while the last rank's weights are pinned")
    refusals = {one["refusal"] for one in found}
    refused = len(refusals) == 1 and "InUseError" in found[0]["refusal"]
    print(f"every rank was told: {found[0]['refusal']}" if refused else f"DIFFERENT: {refusals}")
    print("\n2. Sleep and wake on all ranks, weights backed up, KV cache discarded")
    show(found)
    digests = {digest for one in found for digest in one["digests"]}
    same = len(digests) == 1 and len({tuple(one["tokens"]) for one in found}) == 1
    times = f"{len(found[0]['digests'])} times on {len(found)} ranks"
    print(f"\nlogits {'identical' if same else 'DIFFERENT'}, bit for bit, {times}")
    tokens = found[0]["tokens"]
    print(f"first tokens: {tokens[:12]}, {len(set(tokens))} distinct of {len(tokens)}")
    # The memory that a rank has given back, less the memory that other programs take meanwhile.
    freed = all(
        row["awake_bytes"] - row["asleep_bytes"] >= 0.95 * (one["weight_bytes"] + one["kv_bytes"])
        for one in found
        for row in one["cycles"]
    )
    if not freed:
        print("the memory was NOT given back")
    figures = {
        "driver": arguments.driver,
        "ranks": found,
        "shape": asdict(shape),
        "weight_bytes": weights,
        "identical": same,
        "refused_on_all": refused,
    }
    return same and refused and freed, figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes, one GPU each")
    parser.add_argument("--driver", choices=["cuda", "host"], default="cuda")
    parser.add_argument("--cycles", type=int, default=3, help="sleeps and wakes")
    parser.add_argument("--tokens", type=int, default=8, help="tokens to generate each time")
    for name, size in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default {size}")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.driver == "cuda" and torch.cuda.device_count() < arguments.ranks:
        print(
            f"not run: this example needs {arguments.ranks} NVIDIA GPUs, one for each rank, and "
            f"there are {torch.cuda.device_count()}",
            file=sys.stderr,
        )
        sys.exit(NOT_RUN)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is not granted everywhere
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a container need not know its own name
    good, figures = run(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if good else "not proven: see above")


if __name__ == "__main__":
    main()
