"""Serves several language models on one GPU, one awake at a time, behind one HTTP endpoint.

Builds Llama, Qwen 2 and GPT-2 models from configurations (random weights, fixed seeds, no network),
each in its own pool. Requests name a model; if that sleeps, one ``swap`` puts the awake one to
sleep and wakes it. Every answer must equal the model's answer before its first sleep. Prints how
long switches took. The endpoint is a Starlette application on uvicorn:
``pip install starlette uvicorn``, or ``pip install 'cumempool[examples]'``. Without network, five
wheels of pure Python suffice: starlette, uvicorn, anyio, h11 and idna. If they are missing, it says
so and exits with 77.

    python examples/model_switch.py
    python examples/model_switch.py --hidden 4096 --layers 32 --requests 400
    python examples/model_switch.py --driver host --layers 2 --hidden 64    # no GPU needed
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import cumempool
from cumempool import format_bytes

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ImportError as error:
    MISSING = str(error)
else:
    MISSING = ""

SEED = 47
PROMPTS = 3  # different ones for each model
PROMPT_TOKENS = 16
CLIENTS = 4  # at the same time
PATIENCE = 120  # seconds until a request counts as lost
NOT_RUN = 77  # exit code if the machine cannot run the example


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    vocabulary: int

    @property
    def heads(self) -> int:
        return max(self.hidden // 128, 2)


def kinds(size: Size) -> dict[str, tuple[type[PreTrainedModel], PretrainedConfig]]:
    """Returns class and configuration of each model. The last two have tied embeddings."""
    common: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 11 // 4,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "attn_implementation": "eager",  # fused attention may give other bits each time
        "bos_token_id": None,
        "eos_token_id": None,
    }
    gpt2: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "n_embd": size.hidden,
        "n_layer": size.layers,
        "n_head": size.heads,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return {
        "llama": (LlamaForCausalLM, LlamaConfig(**common, tie_word_embeddings=False)),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config(**common, tie_word_embeddings=True)),
        "gpt2": (GPT2LMHeadModel, GPT2Config(**gpt2)),
    }


# ---- models in pools


class Fleet:
    """The models, one of them awake."""

    def __init__(self, size: Size, driver: str) -> None:
        config = cumempool.CuMemConfig(enable_sleep_mode=True, driver=driver)
        self.allocator = cumempool.CuMemAllocator(config)
        self.driver, self.size = driver, size
        self.device = torch.device("cpu" if driver == "host" else "cuda")
        self.models: dict[str, PreTrainedModel] = {}
        self.awake = ""
        self.switches: list[float] = []
        self.most_bytes = 0

    def load(self, name: str) -> None:
        """Builds a model, after it has put the awake one to sleep."""
        if self.awake:
            self.allocator.sleep(offload_tags=self.awake, tags=self.awake)
        kind, config = kinds(self.size)[name]
        torch.manual_seed(SEED + len(self.models))
        if self.driver == "host":  # torch cannot be routed to the host driver: moved in afterwards
            self.models[name] = kind(config).eval()
            self.allocator.adopt(self.models[name], name)
        else:
            pool = self.allocator.use_memory_pool(name)
            with self._default_dtype(torch.bfloat16), pool, self.device:
                self.models[name] = kind(config).eval()
        self.awake = name
        self._note_memory()

    @contextlib.contextmanager
    def _default_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def switch(self, name: str) -> float:
        """Wakes a model unless it is awake; returns the seconds that took."""
        if name == self.awake:
            return 0.0
        begun = time.perf_counter()
        self.allocator.swap(sleep=self.awake, wake=name, offload_tags=self.awake)
        seconds = time.perf_counter() - begun
        self.awake = name
        self.switches.append(seconds)
        self._note_memory()
        return seconds

    def _note_memory(self) -> None:
        self.most_bytes = max(self.most_bytes, self.allocator.stats().physical_bytes)

    @torch.no_grad()
    def generate(self, name: str, prompt: list[int], count: int) -> list[int]:
        """Returns greedy tokens; the model must be awake."""
        model = self.models[name]
        cache = DynamicCache(config=model.config)
        tokens, found = torch.tensor([prompt], device=self.device), []
        for _ in range(count):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            logits = output.logits[0, -1].float()
            # Takes the first of equal logits, which argmax on a GPU does not promise.
            found.append(int(torch.nonzero(logits == logits.max())[0]))
            tokens = torch.tensor([found[-1:]], device=self.device)
        return found

    def tied(self) -> list[str]:
        """Returns the names of models whose input and output embeddings share memory."""
        return [
            name
            for name, model in self.models.items()
            if model.get_input_embeddings().weight.data_ptr()
            == model.get_output_embeddings().weight.data_ptr()
        ]

    def model_bytes(self, name: str) -> int:
        tag = self.allocator.stats().tags[name]
        return tag.awake_bytes + tag.backed_up_bytes

    def close(self) -> None:
        self.models.clear()
        if self.driver == "cuda":
            torch.cuda.empty_cache()
        self.allocator.close(force=True)


# ---- the endpoint


def application(fleet: Fleet) -> Any:
    """Returns the app: ``POST /generate`` with model, prompt and tokens; ``GET /models``."""
    turn = asyncio.Lock()

    def answer(name: str, prompt: list[int], count: int) -> dict[str, Any]:
        seconds = fleet.switch(name)
        return {"tokens": fleet.generate(name, prompt, count), "switch_seconds": seconds}

    async def generate(request: Request) -> JSONResponse:
        asked = await request.json()
        if asked["model"] not in fleet.models:
            return JSONResponse({"error": f"no model {asked['model']!r}"}, status_code=404)
        async with turn:  # one model is awake, so one request at a time
            made = await run_in_threadpool(answer, asked["model"], asked["prompt"], asked["tokens"])
        return JSONResponse(made)

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({name: name == fleet.awake for name in fleet.models})

    routes = [
        Route("/generate", generate, methods=["POST"]),
        Route("/models", models, methods=["GET"]),
    ]
    return Starlette(routes=routes)


@contextlib.contextmanager
def served(fleet: Fleet) -> Iterator[int]:
    """Runs the endpoint in its own thread, and yields its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application(fleet), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + PATIENCE
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


# ---- results


def percentile(values: list[float], share: float) -> float:
    """Returns the smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def prompt_of(number: int, vocabulary: int) -> list[int]:
    return [(number + 1) * 7919 * (place + 1) % vocabulary for place in range(PROMPT_TOKENS)]


def run(arguments: argparse.Namespace) -> tuple[bool, dict[str, Any]]:
    """Runs the example; returns whether it succeeded, and the figures."""
    size = Size(arguments.layers, arguments.hidden, arguments.vocabulary)
    fleet = Fleet(size, arguments.driver)
    prompts = [prompt_of(number, size.vocabulary) for number in range(PROMPTS)]
    expected: dict[tuple[str, int], list[int]] = {}
    for name in kinds(size):
        fleet.load(name)
        for number, prompt in enumerate(prompts):
            expected[name, number] = fleet.generate(name, prompt, arguments.tokens)
    sizes = {name: fleet.model_bytes(name) for name in fleet.models}
    for name, count in sizes.items():
        print(f"{name}: {format_bytes(count)}, {size.layers} layers of {size.hidden}")
    tied_before = fleet.tied()

    order = random.Random(SEED)
    asked = [
        (order.choice(list(fleet.models)), order.randrange(PROMPTS))
        for _ in range(arguments.requests)
    ]

    def one(request: tuple[str, int]) -> bool:
        name, number = request
        body = {"model": name, "prompt": prompts[number], "tokens": arguments.tokens}
        status, answer = ask(port, "POST", "/generate", body)
        return status == 200 and answer["tokens"] == expected[request]

    with served(fleet) as port, ThreadPoolExecutor(CLIENTS) as clients:
        begun = time.perf_counter()
        equal = list(clients.map(one, asked))
        seconds = time.perf_counter() - begun
        status, states = ask(port, "GET", "/models")
        unknown, _ = ask(port, "POST", "/generate", {"model": "?", "prompt": [1], "tokens": 1})
    switches = fleet.switches
    tied = fleet.tied()
    one_awake = status == 200 and sum(states.values()) == 1 and unknown == 404
    print(f"\n{len(asked)} requests over HTTP in {seconds:.1f} s, {len(switches)} switches")
    figures: dict[str, Any] = {
        "driver": arguments.driver,
        "model_bytes": sizes,
        "most_bytes": fleet.most_bytes,
        "requests": len(asked),
        "switches": len(switches),
        "tied": tied,
        "identical": all(equal),
    }
    if switches:
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            figures[f"switch_{name}_seconds"] = percentile(switches, share)
            print(f"  {name} of a switch: {percentile(switches, share) * 1e3:.1f} ms")
    print(f"answers {'identical' if all(equal) else 'DIFFERENT'} to those before the first sleep")
    print(f"tied embeddings, before and after: {tied_before}, {tied}")
    total = sum(sizes.values())
    print(f"most memory in pools: {format_bytes(fleet.most_bytes)} for {format_bytes(total)}")
    fleet.close()
    good = all(equal) and bool(switches) and one_awake
    good = good and tied == tied_before == ["qwen2", "gpt2"]
    return good and fleet.most_bytes <= max(sizes.values()), figures


def not_run(reason: str) -> None:
    print(f"not run: {reason}", file=sys.stderr)
    sys.exit(NOT_RUN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver", choices=["cuda", "host"], default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if MISSING:
        not_run(f"this example needs Starlette and uvicorn ({MISSING}): pip install them")
    if arguments.driver == "cuda" and not torch.cuda.is_available():
        not_run("this example needs an NVIDIA GPU")
    transformers.logging.set_verbosity_error()
    good, figures = run(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if good else "not proven: see above")


if __name__ == "__main__":
    main()
