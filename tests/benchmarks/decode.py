"""Decoding beside llama2.c, transformers and the memory's speed: `python -m tests.benchmarks.decode [15M] [117M]`.

All are timed as llama2.c's program times itself: from the first new token to the last.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llmcore import config, decode
from llmcore.config import ModelConfig
from llmcore.formats.llama2c import _tensors_in_order
from llmcore.generate import generate_ids
from llmcore.model import Transformer
from llmcore.quantize import int8_weights
from tests.benchmarks.peers import FAST, machine, ratio, take_turns, transformers_llama
from tests.run_c import run_c_program

STORIES = ModelConfig(
    vocab_size=32000, dim=288, n_layers=6, n_heads=6, hidden_dim=768, max_seq_len=256, tie_embeddings=True
)
SIZES = {"15M": STORIES, "117M": config.preset("scifi-117M")[0]}
PROMPT, NEW, TOGETHER = 16, 64, 16  # tokens, tokens, prompts
TOP_P = 0.95  # of notebook 5
BYTES = {"float32": 4, **({"bfloat16": 2} if FAST == "bf16" else {}), "int8": 1}  # of a weight


def read_bandwidth() -> float:
    """Bytes per second at which a sum reads memory that no cache holds."""
    source = torch.ones(2**28)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        source.sum()
        times.append(time.perf_counter() - started)
    return source.nbytes / min(times)


def our_decoding(
    shape: ModelConfig, weights: str, count: int, compiled: bool = True, temperature: float = 0
) -> Callable[[], float]:
    """Seconds of tokens after `count` prompts."""
    model = Transformer(shape).eval()
    if weights != "float32":
        model = int8_weights(model) if weights == "int8" else model.bfloat16()
    if compiled:
        decode.prepare(model, count)
    else:
        decode.ENOUGH_TOKENS = 10**9  # never while this is measured
        decode.CACHE = "llmcore_decode_none"  # where nothing was compiled before
    prompts = torch.randint(4, shape.vocab_size, (count, PROMPT)).tolist()

    def write() -> float:
        steps = generate_ids(model, prompts, NEW + 1, temperature=temperature, top_p=TOP_P)
        next(steps)
        started = time.perf_counter()
        assert len(list(steps)) == NEW
        return time.perf_counter() - started

    return write


def c_decoding(shape: ModelConfig, program: str) -> Callable[[], float]:
    """Seconds of the C program for as many greedy tokens. It reads its prompt, none, one token at a time too."""
    folder = Path(program).parent / str(shape.dim)
    folder.mkdir(exist_ok=True)
    sizes = (shape.dim, shape.hidden_dim, shape.n_layers, shape.n_heads, shape.n_kv_heads)
    with open(folder / "model.bin", "wb") as file:
        file.write(
            struct.pack("<7i", *sizes, shape.vocab_size * (1 if shape.tie_embeddings else -1), shape.max_seq_len)
        )
        for tensor in _tensors_in_order(Transformer(shape).state_dict(), shape):
            tensor.numpy().tofile(file)
    pieces = b"".join(struct.pack("<fi", 0.0, 5) + b"%05d" % id for id in range(shape.vocab_size))
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 5) + pieces)

    def write() -> float:
        command = [program, "model.bin", "0", str(PROMPT + NEW)]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
        return NEW / float(done.stdout.split(b"achieved tok/s:")[1])

    return write


class Clock(BaseStreamer):
    """When transformers' `generate` gave each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take a token, or at first the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more comes."""


def their_decoding(shape: ModelConfig, sampled: bool = False) -> Callable[[], float]:
    """Seconds of tokens after one prompt, by transformers' `generate` with its cache."""
    model = transformers_llama(shape).eval()
    prompt = torch.randint(4, shape.vocab_size, (1, PROMPT))
    options: dict[str, Any] = {"max_new_tokens": NEW + 1, "min_new_tokens": NEW + 1, "pad_token_id": 0}
    options |= {"do_sample": True, "top_p": TOP_P, "top_k": 0} if sampled else {"do_sample": False}

    def write() -> float:
        clock = Clock()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options)
        _, first, *_, last = clock.times
        return last - first

    return write


def measure(size: str, program: str | None, rounds: int = 5) -> tuple[list[str], list[str]]:
    """Rows of the table, and the targets' figures in words."""
    shape = SIZES[size]
    contestants: dict[str, Any] = {"transformers": (their_decoding, shape)}
    if program is not None:
        contestants["run"] = (c_decoding, shape, program)
    for weights in BYTES:
        contestants[f"{weights}, not compiled"] = (our_decoding, shape, weights, 1, False)
        contestants[weights] = (our_decoding, shape, weights, 1)
        contestants[f"{weights}, together"] = (our_decoding, shape, weights, TOGETHER)
    contestants["transformers, drawn"] = (their_decoding, shape, True)
    contestants["float32, drawn"] = (our_decoding, shape, "float32", 1, True, 1.0)
    contestants["float32, drawn together"] = (our_decoding, shape, "float32", TOGETHER, True, 1.0)
    seconds = take_turns(contestants, rounds)
    rate = {name: NEW / statistics.median(times) for name, times in seconds.items()}
    matrices = shape.n_params() - (not shape.tie_embeddings) * shape.vocab_size * shape.dim  # one row is looked up
    bandwidth = read_bandwidth()

    def row(name: str, size_of: int, rest: str) -> str:
        than = [f"{ratio(seconds, name, peer):.2f}" if peer in seconds else "–" for peer in ("run", "transformers")]
        share = rate[name] * matrices * size_of / bandwidth
        return f"| {size} | {name} | {rate[name]:.0f} | {than[0]} | {than[1]} | {share:.0%} | {rest} |"

    rows = [row(name, 4, "| ") for name in ("transformers", "run") if name in seconds]
    targets = []
    for weights, size_of in BYTES.items():
        together = f"{weights}, together"
        batch = TOGETHER / ratio(seconds, weights, together)
        rows.append(row(f"{weights}, not compiled", size_of, "| "))
        rows.append(row(weights, size_of, f"{rate[together] * TOGETHER:.0f} | {batch:.1f}"))
        against = f"{ratio(seconds, weights, 'run'):.2f} × llama2.c's run" if program else "no C program here"
        wanted = {"float32": "1.0 × run", "int8": "2 × run", "bfloat16": "float32's speed"}[weights]
        than = ratio(seconds, weights, "float32")
        targets.append(
            f"{size}, {weights}: {against}, {than:.2f} × float32 (target {wanted}); {TOGETHER} prompts at once "
            f"{batch:.1f} × the tokens of one (target 6)"
        )
    drawn, together = rate["float32, drawn"], rate["float32, drawn together"] * TOGETHER
    than = ratio(seconds, "float32, drawn", "transformers, drawn")
    targets.append(
        f"{size}, float32, drawn with top_p={TOP_P}: {drawn:.0f} tokens/s, {drawn / rate['float32']:.2f} × greedy, "
        f"{than:.1f} × transformers; {TOGETHER} prompts {together:.0f} tokens/s"
    )
    return rows, targets


def main() -> None:
    """Print the table and the ratios."""
    print(f"Greedy decoding, {NEW} tokens after {PROMPT}, on {machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        try:  # -Ofast: without it, sums are made one number after the other, a seventh as fast
            program = str(run_c_program(Path(folder), "-Ofast", "-march=native", "-fopenmp"))
        except OSError as error:
            print(f"Without llama2.c: {error}\n")
            program = None
        print("| size | weights | tokens/s | × run | × transformers | share of reading | 16 prompts | × one |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        said = []
        for size in sys.argv[1:] or SIZES:
            rows, targets = measure(size, program)
            print("\n".join(rows), flush=True)
            said += targets
    print("\n" + "\n".join(f"- {line}" for line in said))


if __name__ == "__main__":
    main()
