"""Shares one GPU between a trainer and an inference engine, as in reinforcement learning.

While the engine rolls out, the trainer sleeps: weights, gradients (accumulated over two rollouts)
and optimizer state. At the trainer's turn, the engine's weights and KV cache are discarded. Before
a rollout, the engine copies the weights, layer by layer, from the sleeping trainer's backup in host
memory: there is never a second copy. The same loop also runs without the pool and without sleeping;
losses, weights and optimizer state must be equal, bit for bit. Random weights and prompts, fixed
seeds, no network.

    python examples/rlhf_loop.py
    python examples/rlhf_loop.py --driver host --layers 2 --hidden 64    # no GPU needed
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts

import torch
from torch import nn
from torch.nn import functional

import cumempool
from cumempool import format_bytes

SEED = 53
TRAINER = ("weights", "gradients", "optimizer")
ENGINE = ("engine", "kv_cache")
ACCUMULATE = 2  # rollouts per step of the optimizer
NOT_RUN = 77  # exit code if the machine cannot run the example

_T = TypeVar("_T")


@dataclass(frozen=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    batch: int
    prompt: int
    rollout: int
    iterations: int

    @property
    def length(self) -> int:
        return self.prompt + self.rollout


# ---- the model, the same for both


class Block(nn.Module):
    """One layer of a decoder."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        super().__init__()
        self.heads = sizes.heads
        shapes = {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}
        for name, (rows, columns) in shapes.items():
            made = torch.empty(rows * sizes.hidden, columns * sizes.hidden, device=device)
            self.register_parameter(name, nn.Parameter(made))

    def forward(self, states: torch.Tensor, cache: torch.Tensor | None, begin: int) -> torch.Tensor:
        batch, tokens, hidden = states.shape
        qkv = functional.linear(normalized(states), self.qkv)
        split = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, keys, values = split
        if cache is not None:
            cache[:, :, :, begin : begin + tokens] = split[1:]
            keys, values = cache[:, :, :, : begin + tokens]
        scores = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
        rows = torch.arange(begin, begin + tokens, device=states.device)
        columns = torch.arange(begin + tokens, device=states.device)
        scores = scores.masked_fill(columns > rows[:, None], -math.inf)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, tokens, hidden)
        states = states + functional.linear(mixed, self.out)
        inner = functional.gelu(functional.linear(normalized(states), self.up))
        return states + functional.linear(inner, self.down)


def normalized(states: torch.Tensor) -> torch.Tensor:
    return states * states.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()


class Policy(nn.Module):
    """A decoder with tied embeddings; its weights are undefined until `start` or a copy."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(sizes.vocabulary, sizes.hidden, device=device))
        self.places = nn.Parameter(torch.empty(sizes.length, sizes.hidden, device=device))
        self.blocks = nn.ModuleList(Block(sizes, device) for _ in range(sizes.layers))

    @torch.no_grad()
    def start(self) -> None:
        """Sets random weights from a fixed seed."""
        generator = torch.Generator(self.tokens.device).manual_seed(SEED)
        for parameter in self.parameters():
            parameter.normal_(0.0, 0.5 / math.sqrt(parameter.shape[1]), generator=generator)

    def forward(
        self, tokens: torch.Tensor, caches: torch.Tensor | None = None, begin: int = 0
    ) -> torch.Tensor:
        end = begin + tokens.shape[1]
        states = functional.embedding(tokens, self.tokens) + self.places[begin:end]
        for number, block in enumerate(self.blocks):
            states = block(states, None if caches is None else caches[number], begin)
        return functional.linear(normalized(states), self.tokens)


# ---- memory: in pools, or torch's own


@dataclass
class Memory:
    """Makes tensors in a pool or in torch's memory, and measures the device memory in use."""

    device: torch.device
    allocator: cumempool.CuMemAllocator | None = None

    def scope(self, tag: str, **settings: Any) -> contextlib.AbstractContextManager[object]:
        if self.allocator is None:
            return contextlib.nullcontext()
        return self.allocator.use_memory_pool(tag, **settings)

    def take(self, what: nn.Module | torch.optim.Optimizer, tag: str, **named: Any) -> None:
        """Moves torch's allocations into the pool: all, on the host driver, which routes none."""
        if self.allocator is not None:
            self.allocator.adopt(what, tag, **named)

    def zeros(self, *shape: int, tag: str) -> torch.Tensor:
        if self.allocator is None:
            return torch.zeros(shape, device=self.device)
        return self.allocator.empty(shape, device=self.device, tag=tag).zero_()

    def baseline(self) -> int:
        """Returns the memory in use at the start."""
        if self.device.type == "cpu":
            return 0
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def used(self, tensors: Callable[[], Iterator[torch.Tensor]]) -> int:
        """Returns the device memory in use; without a device, the bytes of the tensors."""
        if self.device.type != "cpu":
            return self.baseline()
        if self.allocator is not None:
            return self.allocator.stats().physical_bytes
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors()}
        return sum(storage.nbytes() for storage in storages.values())


# ---- the two that share the device


class Engine:
    """Rolls out; its own weights are lost whenever it sleeps."""

    def __init__(self, sizes: Sizes, memory: Memory) -> None:
        self.sizes, self.memory = sizes, memory
        with memory.scope("engine"):
            self.policy = Policy(sizes, memory.device).requires_grad_(False)
        if memory.device.type == "cpu":
            memory.take(self.policy, "engine")
        head = sizes.hidden // sizes.heads
        shape = (sizes.layers, 2, sizes.batch, sizes.heads, sizes.length, head)
        self.caches = memory.zeros(*shape, tag="kv_cache")
        self.noise = torch.Generator(memory.device).manual_seed(SEED + 1)

    @torch.no_grad()
    def take_weights(self, source: Policy) -> None:
        """Copies the trainer's weights, one tensor at a time; from its backup if it sleeps."""
        allocator = self.memory.allocator
        for ours, theirs in zip(self.policy.parameters(), source.parameters(), strict=True):
            ours.copy_(theirs if allocator is None else allocator.read_backup(theirs))

    @torch.no_grad()
    def roll_out(self, prompts: torch.Tensor) -> torch.Tensor:
        """Returns the prompts, each followed by sampled tokens."""
        tokens, begin, latest = [prompts], 0, prompts
        for _ in range(self.sizes.rollout):
            logits = self.policy(latest, self.caches, begin)[:, -1]
            begin += latest.shape[1]
            waits = torch.empty_like(logits).exponential_(generator=self.noise)
            latest = (logits.softmax(-1) / waits).argmax(-1, keepdim=True)
            tokens.append(latest)
        return torch.cat(tokens, 1)


class Trainer:
    """REINFORCE: makes tokens of the lower half of the vocabulary more likely."""

    def __init__(self, sizes: Sizes, memory: Memory) -> None:
        self.sizes, self.memory = sizes, memory
        with memory.scope("weights"):
            self.policy = Policy(sizes, memory.device)
            self.policy.start()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=3e-4)
        if memory.device.type == "cpu":
            memory.take(self.policy, "weights")
        memory.take(self.optimizer, "optimizer")  # also what the first step will make
        self.rollouts = 0

    def learn(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Returns loss and reward of one rollout; every second call makes an optimizer step."""
        actions = tokens[:, self.sizes.prompt :]
        rewards = (actions < self.sizes.vocabulary // 2).float().mean(1)
        logits = self.policy(tokens[:, :-1])[:, self.sizes.prompt - 1 :]
        surprise = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), actions.reshape(-1), reduction="none"
        ).view(actions.shape)
        loss = ((rewards - rewards.mean())[:, None] * surprise).mean() * 10
        del logits
        with self.memory.scope("gradients", all_threads=True):
            loss.backward()
        if self.memory.device.type == "cpu":
            self.memory.take(self.policy, "weights", gradients="gradients")
        self._check_gradients()
        self.rollouts += 1
        if self.rollouts % ACCUMULATE == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach()), float(rewards.mean())

    def _check_gradients(self) -> None:
        """Checks that gradients lie in their pool, though autograd's threads have made them."""
        allocator = self.memory.allocator
        gradients = [parameter.grad for parameter in self.policy.parameters()]
        for gradient in gradients if allocator is not None else []:
            if gradient is None or allocator.tag_of(gradient) != "gradients":
                sys.exit("not proven: a gradient is not in its pool")

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields all of its state, in a fixed order."""
        for parameter in self.policy.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
            state = self.optimizer.state.get(parameter, {})
            yield from (state[name] for name in sorted(state))

    def fingerprints(self) -> list[int]:
        return [fingerprint(tensor.detach()) for tensor in self.tensors()]


def fingerprint(tensor: torch.Tensor) -> int:
    """Returns a number that tells contents apart: integer sums do not depend on order."""
    bits = tensor.reshape(-1).view(torch.int32)
    total = 0
    for begin in range(0, bits.numel(), 1 << 24):
        part = bits[begin : begin + (1 << 24)].long()
        places = torch.arange(begin + 1, begin + 1 + part.numel(), device=part.device)
        total += int((part * (places * 2654435761 + 97)).sum())
    return total


# ---- the loop


@dataclass
class Record:
    """The results of one run of the loop."""

    losses: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # most, by phase
    copied: dict[str, int] = field(default_factory=dict)
    state: list[int] = field(default_factory=list)  # fingerprints of the trainer

    def timed(self, phase: str, device: torch.device, work: Callable[[], _T]) -> _T:
        begun = time.perf_counter()
        made = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - begun)
        if isinstance(made, cumempool.TransitionReport):
            self.copied[phase] = self.copied.get(phase, 0) + made.bytes_copied
        return made


class Loop:
    """Runs rollouts and training in turns, with the pool or without."""

    def __init__(self, sizes: Sizes, memory: Memory) -> None:
        self.sizes, self.memory, self.record = sizes, memory, Record()
        self.before = memory.baseline()
        self.trainer = Trainer(sizes, memory)
        self.engine: Engine | None = None

    def _note_memory(self, phase: str) -> None:
        used = self.memory.used(self._tensors) - self.before
        self.record.memory[phase] = max(used, self.record.memory.get(phase, 0))

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self.trainer.tensors()
        if self.engine is not None:
            yield from self.engine.policy.parameters()
            yield self.engine.caches

    def _turn_to_engine(self) -> Engine:
        """Puts the trainer to sleep and wakes the engine, without contents."""
        allocator = self.memory.allocator
        if self.memory.device.type == "cuda":
            torch.cuda.empty_cache()  # activations
        if self.engine is None:  # made when there is room for it
            if allocator is not None:
                self._timed("trainer sleeps", lambda: allocator.sleep(tags=TRAINER))
            self.engine = Engine(self.sizes, self.memory)
        elif allocator is not None:
            self._timed(
                "trainer sleeps, engine wakes",
                lambda: allocator.swap(sleep=TRAINER, wake=ENGINE),
            )
        return self.engine

    def _turn_to_trainer(self) -> None:
        allocator = self.memory.allocator
        if allocator is not None:
            self._timed(
                "engine sleeps, trainer wakes",
                lambda: allocator.swap(sleep=ENGINE, wake=TRAINER),
            )

    def _timed(self, phase: str, work: Callable[[], _T]) -> _T:
        return self.record.timed(phase, self.memory.device, work)

    def iterate(self, number: int) -> None:
        engine = self._turn_to_engine()
        self._timed("weight sync", lambda: engine.take_weights(self.trainer.policy))
        generator = torch.Generator().manual_seed(SEED + 2 + number)
        shape = (self.sizes.batch, self.sizes.prompt)
        prompts = torch.randint(self.sizes.vocabulary, shape, generator=generator)
        prompts = prompts.to(self.memory.device)
        tokens = self._timed("rollout", lambda: engine.roll_out(prompts))
        self._note_memory("rollout")
        self._turn_to_trainer()
        loss, reward = self._timed("train", lambda: self.trainer.learn(tokens))
        self._note_memory("train")
        self.record.losses.append(loss)
        self.record.rewards.append(reward)

    def run(self) -> Record:
        for number in range(self.sizes.iterations):
            self.iterate(number)
        self.record.state = self.trainer.fingerprints()
        return self.record


def run_awake(sizes: Sizes, device: torch.device) -> Record:
    """Runs the loop with torch's own memory, all of it resident."""
    return Loop(sizes, Memory(device)).run()


def run_in_turns(sizes: Sizes, device: torch.device, driver: str) -> Record:
    """Runs the loop with both in pools, one of them asleep at any time."""
    config = cumempool.CuMemConfig(enable_sleep_mode=True, driver=driver)
    allocator = cumempool.CuMemAllocator(config)
    for tag in TRAINER:
        allocator.use_memory_pool(tag, on_sleep="offload")
    for tag in ENGINE:
        allocator.use_memory_pool(tag, on_sleep="discard")
    record = Loop(sizes, Memory(device, allocator)).run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    allocator.close(force=True)
    return record


# ---- results


def show(awake: Record, turns: Record) -> None:
    print("\n  phase                          all awake     in turns    copied in all")
    for phase in [*awake.seconds, *(p for p in turns.seconds if p not in awake.seconds)]:
        columns = [
            f"{sum(r.seconds[phase]) / len(r.seconds[phase]) * 1e3:9.1f} ms"
            if phase in r.seconds
            else "            "
            for r in (awake, turns)
        ]
        copied = format_bytes(turns.copied[phase]) if phase in turns.copied else ""
        print(f"  {phase:29}  {columns[0]}  {columns[1]}    {copied}")
    for phase in awake.memory:
        sizes = [format_bytes(r.memory[phase]) for r in (awake, turns)]
        print(f"  {'memory in use, ' + phase:29}  {sizes[0]:>12}  {sizes[1]:>12}")
    print("\n  iteration  loss, all awake        loss, in turns         reward")
    for number, (one, other) in enumerate(zip(awake.losses, turns.losses, strict=True)):
        print(f"  {number:9}  {one!r:21}  {other!r:21}  {turns.rewards[number]:.3f}")


def run(sizes: Sizes, driver: str) -> tuple[bool, dict[str, Any]]:
    """Runs the example; returns whether it succeeded, and the figures."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cpu" if driver == "host" else "cuda")
    awake = run_awake(sizes, device)
    turns = run_in_turns(sizes, device, driver)
    where = "host driver" if driver == "host" else torch.cuda.get_device_name()
    print(
        f"policy with {sizes.layers} layers of {sizes.hidden} on {where}; "
        f"{sizes.iterations} iterations, a step of the optimizer after every {ACCUMULATE}"
    )
    show(awake, turns)
    same = awake.losses == turns.losses and all(map(math.isfinite, awake.losses))
    same_state = awake.state == turns.state
    most = [max(record.memory.values()) for record in (awake, turns)]
    print(f"\nloss curve {'equal, bit for bit' if same else 'DIFFERENT'}")
    print(f"weights, gradients and optimizer state {'equal' if same_state else 'DIFFERENT'}")
    print(
        f"most memory in use: {format_bytes(most[0])} all awake, {format_bytes(most[1])} in turns"
    )
    figures = {
        "driver": driver,
        "losses": turns.losses,
        "rewards": turns.rewards,
        "equal_losses": same,
        "equal_state": same_state,
        "all_awake": {"seconds": awake.seconds, "memory_bytes": awake.memory},
        "in_turns": {"seconds": turns.seconds, "memory_bytes": turns.memory},
    }
    return same and same_state and most[1] < most[0], figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver", choices=["cuda", "host"], default="cuda")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--rollout", type=int, default=64, help="tokens")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = vars(parser.parse_args())
    driver, target = arguments.pop("driver"), arguments.pop("json")
    if driver == "cuda" and not torch.cuda.is_available():
        print("not run: this example needs an NVIDIA GPU", file=sys.stderr)
        sys.exit(NOT_RUN)
    good, figures = run(Sizes(**arguments), driver)
    if target is not None:
        target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if good else "not proven: see above")


if __name__ == "__main__":
    main()
