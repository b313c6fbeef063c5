"""What a run will cost before it starts: parameters, tokens, FLOPs and memory from the shapes, speed from a probe."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import torch

from llmcore.config import ModelConfig, TrainConfig
from llmcore.model import Transformer
from llmcore.train import TrainData, Trainer

TOKENS_PER_PARAMETER = 20  # compute-optimal, by Hoffmann et al., "Chinchilla", arXiv:2203.15556, table 3


def training_cost(model: ModelConfig, train: TrainConfig) -> dict[str, float]:
    """Counts that follow from the shapes.

    Returns:
        parameters; tokens (seen in training); flops (forward and backward); state_bytes (float32 weights,
        gradients and AdamW's two moments); activation_bytes (a rough estimate: what a forward pass keeps for the
        backward pass in 16-bit precision); compute_optimal_tokens (20 per parameter).
    """
    assert model.hidden_dim and model.head_dim and model.n_kv_heads
    context = train.context_size or model.max_seq_len
    tokens_per_pass = train.batch_size * context
    parameters = model.n_params()
    attention = (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    per_layer = 2 * (4 * model.dim + attention + 3 * model.hidden_dim) + 4 * 2 * model.dim  # norms are float32
    layers = 4 * model.n_layers * model.dim + per_layer if train.gradient_checkpointing else model.n_layers * per_layer
    steps = train.max_steps * train.grad_accum_steps
    return {
        "parameters": parameters,
        "tokens": steps * tokens_per_pass,
        "flops": steps * tokens_per_pass * model.flops_per_token(context),
        "state_bytes": 16 * parameters,
        "activation_bytes": tokens_per_pass * layers,
        "compute_optimal_tokens": TOKENS_PER_PARAMETER * parameters,
    }


def measure_speed(
    model: ModelConfig, train: TrainConfig, data: TrainData, device: str = "auto", steps: int = 5
) -> dict[str, Any]:
    """Train a throw-away model for a few steps, as the run itself would.

    Returns:
        tokens_per_second (median of the steps after the first) and start_seconds (the first step, which compiles).
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        probe = Trainer(Transformer(model), data, None, train, folder, device=device)
        events = probe.measured_steps(1 + steps)
    speed = statistics.median(event["tokens_per_second"] for event in events[1:])
    return {"tokens_per_second": speed, "start_seconds": events[0]["seconds"]}
