"""The cost of a run before it starts, against the model itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmcore.config import PRESETS, ModelConfig, TrainConfig
from llmcore.measure.memory import predict_memory
from llmcore.measure.planner import RandomTokens, largest_batch, measure_memory, measure_speed, plan
from llmcore.model import Transformer
from llmcore.train import Trainer

from .helpers import Batches, quick, random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("name", PRESETS)
def test_cost_counts_the_presets_parameters_tokens_and_state(name: str) -> None:
    config, train = PRESETS[name]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(config).parameters())
    cost = plan(config, train.replace(optimizer="adamw"), "cpu")
    assert cost.parameters == parameters
    assert cost.memory["weights"] + cost.memory["optimizer"] == 12 * parameters
    assert cost.disk == (train.keep_checkpoints * 12 + 4) * parameters  # the best one has no state
    assert cost.tokens == train.max_steps * train.grad_accum_steps * train.batch_size * config.max_seq_len
    assert cost.best_tokens_for_size == 20 * parameters


def test_tokens_follow_a_context_of_the_runs_own() -> None:
    train = TrainConfig(max_steps=7, batch_size=5, grad_accum_steps=3, context_size=11)
    assert plan(tiny_config(), train, "cpu").tokens == 7 * 5 * 3 * 11


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
    assert plan(c, train, "cpu").flops == 3 * 48 * c.flops_per_token(24)


def test_the_compute_optimal_model_costs_what_the_run_does() -> None:
    """C = 6 N D with D = 20 N, and a model of that size would plan itself."""
    cost = plan(*PRESETS["scifi-117M"], "cpu")
    assert 6 * cost.best_size_for_compute * cost.best_tokens_for_compute == pytest.approx(cost.flops)
    assert cost.best_tokens_for_compute == pytest.approx(20 * cost.best_size_for_compute)
    assert cost.epochs(cost.tokens // 4) == pytest.approx(4)


def test_an_assumed_speed_is_called_so() -> None:
    model, train = PRESETS["scifi-117M"]
    cost = plan(model, train, "cpu", peak_flops=1e15, mfu=0.5)
    assert cost.hours is not None and cost.hours * 3600 * 0.5e15 == pytest.approx(cost.flops)
    assert "assumed" in cost.speed_is and any("assumed" in row for row in cost.rows())
    unmeasured = plan(model, train, "cpu")
    assert unmeasured.hours is None and unmeasured.rows()["speed (not measured)"] == "–"
    assert not [row for row in unmeasured.rows().values() if "nan" in row]


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_the_largest_batch_fits_and_one_more_does_not(policy: str) -> None:
    model, train = PRESETS["scifi-1.5B"]
    train = train.replace(activation_checkpointing=policy, precision="bf16")
    room = 80 * 10**9
    most = largest_batch(model, train, room)
    assert predict_memory(model, train.replace(batch_size=most))["total"] <= room
    assert predict_memory(model, train.replace(batch_size=most + 1))["total"] > room
    assert largest_batch(model, train, 10**9) == 0


# parameters in millions: shape
SIZES = {
    2.6: ModelConfig(4000, 192, 4, 6, hidden_dim=512, max_seq_len=256, tie_embeddings=True),
    9.8: ModelConfig(8000, 320, 6, 5, hidden_dim=864, max_seq_len=256, tie_embeddings=True),
    52: ModelConfig(16_000, 768, 4, 12, hidden_dim=2304, max_seq_len=256),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2.6, {"batch_size": 16, "precision": "fp32"}),
        (2.6, {"batch_size": 8, "precision": "bf16", "optimizer": "muon"}),
        (9.8, {"batch_size": 8, "precision": "fp32", "activation_checkpointing": "selective"}),
        (52, {"batch_size": 2, "precision": "fp32", "activation_checkpointing": "full"}),
        (52, {"batch_size": 2, "precision": "bf16"}),
    ],
)
def test_the_predicted_memory_is_within_a_tenth_of_the_measured_peak(size: float, changes: dict[str, Any]) -> None:
    model, train = SIZES[size], TrainConfig(compile="off", **changes)
    assert model.n_params() / 1e6 == pytest.approx(size, rel=0.1)
    measured = measure_memory(model, train, "cpu")
    assert predict_memory(model, train)["total"] == pytest.approx(measured["peak_bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scifi-117M", "scifi-1.5B", "zhwiki-2.46B"])
def test_a_preset_takes_a_step_at_full_width(name: str, tmp_path: Path) -> None:
    """Two layers of it, in bf16 and with its own policy: the loss is ln(vocabulary), every parameter moves."""
    shape, how = PRESETS[name]
    shape = shape.replace(n_layers=2)
    how = how.replace(batch_size=1, grad_accum_steps=1, context_size=64, precision="bf16", compile="off")
    how = how.replace(warmup_steps=0)
    torch.manual_seed(0)
    model = Transformer(shape)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = RandomTokens(shape, 64)
    [event] = Trainer(model, data, None, how, tmp_path, device="cpu").measured_steps(1)
    assert event["loss"] == pytest.approx(math.log(shape.vocab_size), abs=1.0)
    assert 0 < event["grad_norm"] < math.inf
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_measuring_speed_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = torch.get_rng_state()
    speed = measure_speed(tiny_config(), quick(), Batches(), "cpu", steps=2)
    assert set(speed) == {"tokens_per_second", "start_seconds"} and min(speed.values()) > 0
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), before)
