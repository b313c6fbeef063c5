"""Decoding beside transformers and beside the memory's speed: `python -m tests.benchmarks.decode [15M] [117M]`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from llmcore import config
from llmcore.config import ModelConfig
from llmcore.generate import generate_ids
from llmcore.model import Transformer
from llmcore.quantize import int8_weights
from tests.benchmarks.peers import FAST, machine, ratio, take_turns, transformers_llama

STORIES = ModelConfig(
    vocab_size=32000, dim=288, n_layers=6, n_heads=6, hidden_dim=768, max_seq_len=256, tie_embeddings=True
)
SIZES = {"15M": STORIES, "117M": config.preset("scifi-117M")[0]}
PROMPT, NEW, TOGETHER = 16, 64, 16  # tokens, tokens, prompts
BYTES = {"float32": 4, **({"bfloat16": 2} if FAST == "bf16" else {}), "int8": 1}  # of a weight


def copy_bandwidth() -> float:
    """Bytes per second at which memory is read, while as many are written elsewhere."""
    source = torch.ones(2**28, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return source.nbytes / statistics.median(times)


def our_decoding(shape: ModelConfig, weights: str, count: int) -> Callable[[], object]:
    """Greedy tokens after `count` prompts."""
    model = Transformer(shape).eval()
    if weights != "float32":
        model = int8_weights(model) if weights == "int8" else model.bfloat16()
    prompts = torch.randint(4, shape.vocab_size, (count, PROMPT)).tolist()
    return lambda: list(generate_ids(model, prompts, NEW, temperature=0))


def their_decoding(shape: ModelConfig) -> Callable[[], object]:
    """Greedy tokens after one prompt, by transformers' `generate` with its cache."""
    model = transformers_llama(shape).eval()
    prompt = torch.randint(4, shape.vocab_size, (1, PROMPT))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def measure(size: str, rounds: int = 4) -> tuple[list[str], list[str]]:
    """Rows of the table, and the targets' figures in words."""
    shape = SIZES[size]
    contestants: dict[str, Any] = {"theirs": (their_decoding, shape)}
    for weights in BYTES:
        contestants[weights] = (our_decoding, shape, weights, 1)
        contestants[f"{weights}, together"] = (our_decoding, shape, weights, TOGETHER)
    seconds = take_turns(contestants, rounds)
    rate = {name: NEW / statistics.median(times) for name, times in seconds.items()}
    matrices = shape.n_params() - (not shape.tie_embeddings) * shape.vocab_size * shape.dim  # one row is looked up
    bandwidth = copy_bandwidth()
    rows, targets = [f"| {size} | transformers, float32 | {rate['theirs']:.0f} | | | | | |"], []
    for weights, size_of in BYTES.items():
        faster, bound = ratio(seconds, weights, "theirs"), bandwidth / (matrices * size_of)
        batch = TOGETHER / ratio(seconds, weights, f"{weights}, together")
        rows.append(
            f"| {size} | llmcore, {weights} | {rate[weights]:.0f} | {faster:.2f} | {bound:.0f} "
            f"| {rate[weights] / bound:.0%} | {rate[f'{weights}, together'] * TOGETHER:.0f} | {batch:.1f} |"
        )
        targets.append(
            f"{size}, {weights}: {faster:.2f}× transformers' generate (target 2.5), {rate[weights] / bound:.0%} of "
            f"what the memory allows (target 50%), {TOGETHER} prompts at once {batch:.1f}× the tokens of one (target 6)"
        )
    return rows, targets


def main() -> None:
    """Print the table and the ratios."""
    print(f"Greedy decoding, {NEW} tokens after {PROMPT}, on {machine()}\n")
    print("| size | who, weights | tokens/s | × transformers | memory allows | share | 16 prompts | × one |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    said = []
    for size in sys.argv[1:] or SIZES:
        rows, targets = measure(size)
        print("\n".join(rows), flush=True)
        said += targets
    print("\n" + "\n".join(f"- {line}" for line in said))


if __name__ == "__main__":
    main()
