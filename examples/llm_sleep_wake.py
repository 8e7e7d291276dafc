"""Puts a language model to sleep in the middle of a sentence, and lets it finish after the wake.

Builds a Llama of at least 4 GiB from a configuration (random weights, fixed seed, no network),
keeps its weights and its static KV cache in pools, captures the decode step in a CUDA graph, and
shows that the same graph continues with identical tokens after a sleep and a wake.

    python examples/llm_sleep_wake.py
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import cumempool
from cumempool import format_bytes

SEED = 20
PROMPT_TOKENS = 32


class Decoder:
    """Decodes greedily, one token per step, with the step captured in a CUDA graph."""

    def __init__(
        self, model: LlamaForCausalLM, cache: StaticCache, device: torch.device, length: int
    ) -> None:
        self.model, self.cache, self.device, self.length = model, cache, device, length
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.columns = torch.arange(length, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # Without an explicit mask the model reads data on the host, which a capture forbids.
        mask = (self.columns[None, None, None, :] <= positions[:, None, :, None]).contiguous()
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
        )
        # bf16 logits tie often, and argmax on a GPU may take any of two equal ones.
        logits = output.logits[:, -1].float()
        best = logits == logits.max(-1, keepdim=True).values
        indices = torch.arange(logits.shape[-1], device=self.device)
        return torch.where(best, indices, logits.shape[-1]).min(-1, keepdim=True).values

    def _step(self) -> None:
        self.token.copy_(self._forward(self.token, self.position))
        self.position.add_(1)

    def capture(self) -> None:
        """Captures one decode step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def start(self, prompt: torch.Tensor) -> list[int]:
        """Clears the cache, reads the prompt and returns the first token."""
        for layer in self.cache.layers:
            layer.keys.zero_()
            layer.values.zero_()
            layer.cumulative_length.zero_()
        positions = torch.arange(prompt.shape[1], device=self.device)[None]
        self.token.copy_(self._forward(prompt, positions))
        self.position.fill_(prompt.shape[1])
        return [int(self.token)]

    def go_on(self, count: int) -> list[int]:
        """Returns the next `count` tokens."""
        tokens = []
        for _ in range(count):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            tokens.append(int(self.token))
        return tokens


def build(
    allocator: cumempool.CuMemAllocator, config: LlamaConfig, device: torch.device, length: int
) -> Decoder:
    """Returns a model in the pool ``weights`` and a KV cache in the pool ``kv_cache``."""
    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with allocator.use_memory_pool("weights"), device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    cache = StaticCache(config=config, max_cache_len=length)
    with allocator.use_memory_pool("kv_cache", on_wake="zero"):
        cache.early_initialization(
            batch_size=1,
            num_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=torch.bfloat16,
            device=device,
        )
    return Decoder(model, cache, device, length)


def used_bytes() -> int:
    """Returns the device memory in use, as the driver counts it."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@torch.no_grad()
def run(layers: int, tokens: int) -> bool:
    """Runs the example; returns whether every continuation was identical."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        attn_implementation="eager",  # fused attention may give other bits each time
    )
    device = torch.device("cuda")
    allocator = cumempool.CuMemAllocator(cumempool.CuMemConfig(enable_sleep_mode=True))
    decoder = build(allocator, config, device, length=2048)
    weights = sum(p.nbytes for p in decoder.model.parameters())
    print(f"Llama with {layers} layers on {torch.cuda.get_device_name()}: {format_bytes(weights)}")
    decoder.capture()
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT_TOKENS), device=device)
    half = tokens // 2

    expected = decoder.start(prompt) + decoder.go_on(tokens)

    interrupted = decoder.start(prompt) + decoder.go_on(half)
    awake = used_bytes()
    print("\n1. Sleep in the middle of a sentence, weights and KV cache backed up")
    print(allocator.sleep(offload_tags=("weights", "kv_cache")))
    print(f"device memory in use: {format_bytes(awake)} -> {format_bytes(used_bytes())}")
    print(allocator.wake_up())
    interrupted += decoder.go_on(tokens - half)
    same = interrupted == expected
    print(f"tokens {'identical' if same else 'DIFFERENT'} through the same graph")

    print("\n2. Sleep between two requests, KV cache discarded")
    print(allocator.sleep(offload_tags=("weights",)))
    print(f"device memory in use: {format_bytes(awake)} -> {format_bytes(used_bytes())}")
    print(allocator.wake_up())
    again = decoder.start(prompt) + decoder.go_on(tokens)
    same_again = again == expected
    print(f"tokens {'identical' if same_again else 'DIFFERENT'} through the same graph")

    print(f"\nfirst tokens: {expected[:12]} ... {len(set(expected))} distinct of {len(expected)}")
    return same and same_again and weights >= 4 * 1024**3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this example needs an NVIDIA GPU")
    sys.exit(0 if run(arguments.layers, arguments.tokens) else "the tokens differ")


if __name__ == "__main__":
    main()
