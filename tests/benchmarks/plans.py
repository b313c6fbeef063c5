"""What presets and pretrained models need on GPUs: `python -m tests.benchmarks.plans [megabytes [bytes per token]]`.

All figures are predictions, by `llmcore.measure.planner` and `llmcore.measure.memory`: nothing is measured, and no GPU
is needed. The text has 180 MB unless told otherwise, and a token 4.5 bytes, which is a guess; notebook 1 measures it.
"""

from __future__ import annotations

import sys

from llmcore.config import GO_ON, PRESETS, ModelConfig
from llmcore.measure.memory import predict_memory
from llmcore.measure.planner import GOOD_EPOCHS, choose_steps, fit_batch, plan, step_tokens

# name: bytes that a process can use, and the precision that the card computes in
CARDS = {
    "8 GB": (7_500_000_000, "bf16"),
    "16 GB (T4)": (15_500_000_000, "fp16"),
    "80 GB": (80_000_000_000, "bf16"),
}
# shapes of models that people start from, as their config.json gives them
TIED = {"tie_embeddings": True, "max_seq_len": 1024}
PRETRAINED = {
    "SmolLM2-135M": ModelConfig(49_152, 576, 30, 9, n_kv_heads=3, hidden_dim=1536, **TIED),
    "Qwen3-0.6B": ModelConfig(151_936, 1024, 28, 16, n_kv_heads=8, head_dim=128, hidden_dim=3072, **TIED),
    "SmolLM2-1.7B": ModelConfig(49_152, 2048, 24, 32, hidden_dim=8192, **TIED),
}
GOING_ON = GO_ON.replace(batch_size=16)  # 16,384 tokens in a step
COLUMNS = "model | parameters | tokens in a step | batch x accumulation | activation checkpointing | memory, GB"
COLUMNS += " | checkpoints on disk, GB | steps | reads the text"


def rows(text_tokens: float, card: str) -> list[str]:
    """A row for each preset but the toy task, and for each pretrained model."""
    memory, precision = CARDS[card]
    lines = []
    for name, (model, train) in (PRESETS | {name: (model, GOING_ON) for name, model in PRETRAINED.items()}).items():
        if name == "toy-reverse":
            continue
        train = fit_batch(model, train.replace(precision=precision), "cuda", memory)
        train = choose_steps(name, model, train, round(text_tokens), epochs=1 if name in PRETRAINED else None)
        need, step = predict_memory(model, train, "cuda")["total"], step_tokens(model, train)
        cells = [
            name,
            f"{model.n_params() / 1e6:,.1f}M",
            f"{step:,}",
            f"{train.batch_size} x {train.grad_accum_steps}" if need <= memory else "does not fit",
            train.activation_checkpointing,
            f"{need / 1e9:.1f}",
            f"{plan(model, train.replace(precision='fp32'), 'cpu').disk / 1e9:.1f}",
            f"{train.max_steps:,}",
            f"{train.max_steps * step / text_tokens:.1f} times",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print a table for each card."""
    megabytes, size = [float(word) for word in sys.argv[1:]] + [180.0, 4.5][len(sys.argv) - 1 :]
    tokens = 1e6 * megabytes / size
    print(f"{megabytes:,.0f} MB of text, {tokens / 1e6:,.1f}M tokens, read {GOOD_EPOCHS} times; predicted")
    for card in CARDS:
        print(f"\n{card}, {CARDS[card][0] / 1e9:.1f} GB free, {CARDS[card][1]}\n")
        print(f"| {COLUMNS} |\n|{' --- |' * (COLUMNS.count('|') + 1)}")
        print("\n".join(rows(tokens, card)))


if __name__ == "__main__":
    main()
