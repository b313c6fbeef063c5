"""What one GPU reaches at the real sizes: `python -m tests.benchmarks.gpu`; with `toy`, the same paths at a tiny size.

A ladder of training settings, transformers' Llama in the best of them, and decoding. The peak that utilisation is a
share of is measured too, by a large matrix product: no table of devices can be wrong about it.

What matters most comes first: of each size the best setting, transformers and decoding, then the rest of the ladder.
What there is no time left for is named and left out: all is done in `SECONDS`, unless a single row takes far longer
than the ones before it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmcore import config
from llmcore.config import ModelConfig, TrainConfig
from llmcore.dataset import TokenDataset
from llmcore.device import is_out_of_memory, pick_device
from llmcore.generate import generate_ids
from llmcore.model import Transformer
from llmcore.train import Trainer
from tests.bare import do_without_jsonschema
from tests.benchmarks.peers import PEERS, peer_step, transformers_llama
from tests.benchmarks.token_files import write_tokens

TOY = ModelConfig(vocab_size=256, dim=32, n_layers=2, n_heads=2, max_seq_len=32)
SECONDS = 450  # for everything: eight minutes with what comes before and after
PLAIN = "attention in plain operations"  # instead of PyTorch's fused kernels
ORDERED = "sums in a fixed order"  # PyTorch's deterministic kernels: what a bit-exact resume would cost
# settings by rung, the best last: batch size, then what differs from the defaults
LADDERS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "scifi-117M": [
        (8, {"precision": "fp32", "compile": "off", PLAIN: True}),
        (8, {"precision": "bf16", "compile": "off", PLAIN: True}),
        (8, {"precision": "bf16", "compile": "off"}),
        (8, {"precision": "bf16", "compile": "on"}),
        (32, {"precision": "bf16", "compile": "on"}),
        (64, {"precision": "bf16", "compile": "on", ORDERED: True}),
        (64, {"precision": "fp16", "compile": "on"}),
        (64, {"precision": "bf16", "compile": "on"}),
    ],
    "scifi-1.5B": [
        (16, {"precision": "bf16", "compile": "on", "activation_checkpointing": "full"}),
        (8, {"precision": "bf16", "compile": "on"}),
        (16, {"precision": "bf16", "compile": "on", "activation_checkpointing": "selective"}),
    ],
    "toy": [
        (2, {"precision": "fp32", "compile": "off", PLAIN: True}),
        (2, {"precision": "fp32", "compile": "off", ORDERED: True}),
        (2, {"precision": "bf16", "compile": "off", "activation_checkpointing": "full"}),
    ],
}

PEER_BATCH = {"scifi-117M": 64, "scifi-1.5B": 8, "toy": 2}  # transformers keeps more for the backward pass


def shape_of(name: str) -> ModelConfig:
    """The shape of a preset, or the tiny one."""
    return TOY if name == "toy" else config.preset(name)[0]


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(call: Callable[[], object], device: torch.device, rounds: int, warm_up: int = 2) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(warm_up + rounds):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_up:])


def peak_flops(device: torch.device, size: int) -> float:
    """Operations per second of a square bf16 matrix product, the fastest thing that the device does for us."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_each(lambda: left @ right, device, 20, 5)


@contextlib.contextmanager
def how_to_compute(changes: dict[str, Any]) -> Iterator[None]:
    """What of a rung is no setting of a run: which kernels PyTorch takes."""
    before = torch.get_deterministic_debug_mode()
    with sdpa_kernel(SDPBackend.MATH) if PLAIN in changes else contextlib.nullcontext():
        torch.set_deterministic_debug_mode("warn" if ORDERED in changes else before)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


def training_row(
    name: str, batch_size: int, changes: dict[str, Any], data: TokenDataset, device: torch.device, peak: float
) -> str:
    """One rung: the trainer's own steps."""
    shape = shape_of(name)
    settings = {key: value for key, value in changes.items() if key not in (PLAIN, ORDERED)}
    how = TrainConfig(max_steps=10**6, batch_size=batch_size, **settings)
    with tempfile.TemporaryDirectory() as folder, how_to_compute(changes):
        trainer = Trainer(Transformer(shape), data, None, how, folder, device=str(device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = statistics.median(event["seconds"] for event in trainer.measured_steps(9)[3:])
    rate = batch_size * shape.max_seq_len / seconds
    # the device waits while a batch is read and sent
    steps = iter(range(9, 10**6))
    data_seconds = seconds_each(lambda: [x.to(device) for x in data.batch(next(steps), batch_size)], device, 9)
    words = ", ".join(
        {PLAIN: PLAIN, ORDERED: ORDERED, "compile": f"compile {value}"}.get(key, value)
        for key, value in changes.items()
    )
    return f"{row(name, f'llmcore, {words}', batch_size, rate, shape, device, peak)} {data_seconds / seconds:.2%} |"


def peer_row(name: str, batch_size: int, device: torch.device, peak: float) -> str:
    """transformers' Llama, compiled and in bf16, with the same fused optimizer."""
    shape = shape_of(name)
    step = peer_step(PEERS[0], shape, batch_size, compiled=True, bf16=True, device=device.type)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rate = batch_size * shape.max_seq_len / seconds_each(step, device, 6, 3)
    return f"{row(name, 'transformers Llama, bf16, compile on', batch_size, rate, shape, device, peak)} |"


def row(
    name: str, who: str, batch_size: int, rate: float, shape: ModelConfig, device: torch.device, peak: float
) -> str:
    """A row of the training table, but for its last column."""
    memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f}" if device.type == "cuda" else "–"
    return f"| {name} | {who} | {batch_size} | {rate:,.0f} | {rate * shape.flops_per_token() / peak:.1%} | {memory} |"


def decoding_row(name: str, device: torch.device, new: int) -> str:
    """Greedy tokens per second in bf16, one prompt and sixteen, beside transformers' `generate`."""
    shape = shape_of(name)
    model = Transformer(shape).to(device).bfloat16().eval()
    theirs = transformers_llama(shape).to(device).bfloat16().eval()
    prompts = torch.randint(4, shape.vocab_size, (16, 8)).tolist()
    first = torch.tensor(prompts[:1], device=device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    calls: list[tuple[int, Callable[[], object]]] = [
        (1, lambda: list(generate_ids(model, prompts[:1], new, temperature=0))),
        (16, lambda: list(generate_ids(model, prompts, new, temperature=0))),
        (1, lambda: theirs.generate(first, attention_mask=torch.ones_like(first), **options)),
    ]
    rates = [count * new / seconds_each(call, device, 3, 1) for count, call in calls]
    return f"| {name} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |"


def main(names: list[str], seconds: float = SECONDS) -> None:
    """Print three tables. A row that does not fit into the memory or the time says so."""
    device, begun = pick_device(), time.monotonic()
    if device.type == "cpu" and names != ["toy"]:
        sys.exit("this benchmark needs a GPU; `python -m tests.benchmarks.gpu toy` runs its paths without one")
    do_without_jsonschema()
    longest = dict.fromkeys(names, 0.0)  # seconds of a row

    def attempt(name: str, what: str, make: Callable[[], str]) -> None:
        """Print a row, or that there was no room for it, or no time."""
        torch.compiler.reset()
        left, started = begun + seconds - time.monotonic(), time.monotonic()
        if left < longest[name]:
            print(f"| {name} | {what} | no time left |", flush=True)
            return
        try:
            print(make(), flush=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"| {name} | {what} | out of memory |", flush=True)
        longest[name] = max(longest[name], time.monotonic() - started)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    peak = peak_flops(device, 8192 if device.type == "cuda" else 256)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{machine}, torch {torch.__version__}; a bf16 matrix product reaches {peak / 1e12:.3g} TFLOP/s\n")
    head = (
        "| size | who | batch | tokens/s | of that peak | GB | for data |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = {}
        for name in names:
            shape = shape_of(name)
            write_tokens(Path(folder, name), shape.vocab_size, 10**5 if name == "toy" else 10**8)
            data[name] = TokenDataset(Path(folder, name), "train", shape.max_seq_len)

        def rungs(chosen: slice) -> None:
            """Some rungs of each ladder, the best first."""
            for name in names:
                for batch_size, changes in reversed(LADDERS[name][chosen]):
                    make = functools.partial(training_row, name, batch_size, changes, data[name], device, peak)
                    attempt(name, f"llmcore, batch {batch_size}", make)

        print(head)
        rungs(slice(-1, None))
        for name in names:
            make = functools.partial(peer_row, name, PEER_BATCH[name], device, peak)
            attempt(name, "transformers", make)
        print("\n| size | decoding, tokens/s | 16 prompts | transformers |\n| --- | --- | --- | --- |")
        for name in names:
            attempt(name, "decoding", functools.partial(decoding_row, name, device, 8 if name == "toy" else 128))
        print(f"\n{head}")
        rungs(slice(None, -1))
    print(f"\n{time.monotonic() - begun:.0f} seconds")


if __name__ == "__main__":
    main(sys.argv[1:] or ["scifi-117M", "scifi-1.5B"])
