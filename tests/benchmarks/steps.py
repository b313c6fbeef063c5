"""Training steps beside peers on the same work: `python -m tests.benchmarks.steps [10M] [117M]`.

Every contestant computes loss and gradient of the same random batches, clips, and takes an AdamW step (fused for all).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from llmcore import config
from llmcore.config import ModelConfig, TrainConfig
from llmcore.measure.planner import RandomTokens
from llmcore.model import Transformer
from llmcore.train import Trainer
from tests.benchmarks.peers import FAST, PEERS, machine, peer_step, ratio, take_turns

SMALL = ModelConfig(
    vocab_size=8000, dim=320, n_layers=6, n_heads=5, hidden_dim=864, max_seq_len=256, tie_embeddings=True
)
SIZES = {"10M": (SMALL, 8, 11), "117M": (config.preset("scifi-117M")[0], 1, 4)}  # shape, batch, rounds
OURS = "llmcore"
EAGER, COMPILED = "eager fp32", f"compiled {FAST}"


def our_step(shape: ModelConfig, batch_size: int, compiled: bool) -> Callable[[], object]:
    """The trainer's own step, at its default settings or eager in float32."""
    how = TrainConfig(
        max_steps=10**6,
        batch_size=batch_size,
        compile="on" if compiled else "off",
        precision="auto" if compiled else "fp32",
    )
    trainer = Trainer(Transformer(shape), RandomTokens(shape), None, how, tempfile.mkdtemp(), device="cpu")
    trainer.measured_steps(0)  # compiles
    return trainer._train_step


def measure(size: str) -> tuple[list[str], list[str]]:
    """Rows of the table, and the targets' ratios in words."""
    shape, batch_size, rounds = SIZES[size]
    contestants: dict[str, Any] = {}
    for words, compiled in ((EAGER, False), (COMPILED, True)):
        contestants[f"{OURS}, {words}"] = (our_step, shape, batch_size, compiled)
        for peer in PEERS:
            bf16 = compiled and FAST == "bf16"
            contestants[f"{peer}, {words}"] = (peer_step, peer, shape, batch_size, compiled, bf16)
    seconds = take_turns(contestants, rounds)
    tokens = batch_size * shape.max_seq_len
    base = f"{OURS}, {COMPILED}"
    rows = [
        f"| {size}, batch {batch_size} × {shape.max_seq_len} | {name} | {tokens / statistics.median(times):,.0f} "
        f"| {ratio(seconds, base, name):.2f} |"
        for name, times in seconds.items()
    ]

    def slowest_lead(ours: str, theirs: str) -> float:
        return min(ratio(seconds, f"{OURS}, {ours}", f"{peer}, {theirs}") for peer in PEERS)

    targets = [
        f"{size}: {slowest_lead(COMPILED, EAGER):.2f}× the fastest peer as it comes (target 2.5)",
        f"{size}: {slowest_lead(COMPILED, COMPILED):.2f}× the fastest peer {COMPILED} (target 1.1)",
        f"{size}: {slowest_lead(EAGER, EAGER):.2f}× the fastest peer, both eager in float32 (target 1.0)",
    ]
    return rows, targets


def main() -> None:
    """Print the table and the ratios."""
    print(f"Training steps on {machine()}\n")
    print("| work | who | tokens/s | llmcore's default is … × as fast |\n| --- | --- | --- | --- |")
    said = []
    for size in sys.argv[1:] or SIZES:
        rows, targets = measure(size)
        print("\n".join(rows), flush=True)
        said += targets
    print("\n" + "\n".join(f"- {line}" for line in said))


if __name__ == "__main__":
    main()
