"""The cost of a run before it starts, against the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmcore.config import PRESETS, TrainConfig
from llmcore.model import Transformer
from llmcore.planner import measure_speed, training_cost

from .tiny import Batches, quick, random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("name", PRESETS)
def test_cost_counts_the_presets_parameters_tokens_and_state(name: str) -> None:
    config, train = PRESETS[name]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(config).parameters())
    cost = training_cost(config, train)
    assert cost["parameters"] == parameters
    assert cost["state_bytes"] == 16 * parameters
    assert cost["tokens"] == train.max_steps * train.grad_accum_steps * train.batch_size * config.max_seq_len
    assert cost["compute_optimal_tokens"] == 20 * parameters


def test_tokens_follow_a_context_of_the_runs_own() -> None:
    train = TrainConfig(max_steps=7, batch_size=5, grad_accum_steps=3, context_size=11)
    assert training_cost(tiny_config(), train)["tokens"] == 7 * 5 * 3 * 11


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1, "tie_embeddings": True}, {"head_dim": 16}])
def test_flops_are_those_of_the_matrix_products(shape: dict[str, Any]) -> None:
    """torch counts what a forward and backward pass multiply; attention there is not halved by the causal mask."""
    model = tiny_model(**shape)
    c = model.config
    tokens = random_ids(2, 24)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens, tokens).backward()
    unseen = 6 * c.n_layers * c.n_heads * c.head_dim * 24
    norms = 6 * sum(p.numel() for p in model.parameters() if p.dim() == 1)  # which torch does not count
    assert counter.get_total_flops() == (c.flops_per_token(24) + unseen - norms) * tokens.numel()
    train = quick(max_steps=3, batch_size=2)
    assert training_cost(c, train)["flops"] == 3 * 48 * c.flops_per_token(24)


def test_gradient_checkpointing_costs_less_memory() -> None:
    config, train = PRESETS["scifi-1.5B"]
    without = training_cost(config, train.replace(gradient_checkpointing=False))
    assert training_cost(config, train)["activation_bytes"] < without["activation_bytes"] / 5


def test_measuring_speed_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = torch.get_rng_state()
    speed = measure_speed(tiny_config(), quick(), Batches(), "cpu", steps=2)
    assert set(speed) == {"tokens_per_second", "start_seconds"} and min(speed.values()) > 0
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before)
