"""The cost of a run before it starts, against the model itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmcore.config import GO_ON, PRESETS, ModelConfig, TrainConfig
from llmcore.measure.memory import predict_memory
from llmcore.measure.planner import (
    POLICIES,
    RandomTokens,
    choose_batch,
    choose_steps,
    fit_batch,
    largest_batch,
    measure_memory,
    measure_speed,
    plan,
    preset_advice,
    text_advice,
)
from llmcore.model import Transformer
from llmcore.train import Trainer

from .helpers import Batches, examples, quick, random_ids, tiny_config, tiny_model


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


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1, "tie_embeddings": True}, {"head_dim": 16}, {"qk_norm": True}])
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


# The batch that fits


def windows(train: TrainConfig) -> int:
    return train.batch_size * train.grad_accum_steps


def test_the_default_run_keeps_its_batch_on_a_cpu() -> None:
    model, train = PRESETS["scifi-mini"]
    assert fit_batch(model, train, "cpu", 4 * 10**9) == train
    assert choose_batch("scifi-mini", model, train, "cpu", memory=4 * 10**9) == train
    assert choose_steps("scifi-mini", model, train, 450_000) == train


REAL = {name: preset for name, preset in PRESETS.items() if name != "toy-reverse"}


@settings(deadline=None, max_examples=examples(60))
@given(
    name=st.sampled_from(list(REAL)),
    number=st.integers(1, 96),
    gigabytes=st.floats(0.1, 90),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_a_fitted_step_has_the_same_windows_and_leaves_room(
    name: str, number: int, gigabytes: float, device: str
) -> None:
    model, train = PRESETS[name]
    train = train.replace(batch_size=number, grad_accum_steps=1, precision="bf16")
    fitted = fit_batch(model, train, device, round(1e9 * gigabytes))
    assert windows(fitted) == number
    same = {"batch_size": number, "grad_accum_steps": 1, "activation_checkpointing": train.activation_checkpointing}
    assert fitted.replace(**same) == train

    need = predict_memory(model, fitted, device)["total"]
    if need > 0.9e9 * gigabytes:  # then nothing needs less
        for policy in POLICIES:
            least = fitted.replace(batch_size=1, grad_accum_steps=number, activation_checkpointing=policy)
            assert predict_memory(model, least, device)["total"] >= need


def test_less_memory_means_smaller_batches_then_more_computed_again() -> None:
    """The largest model at 1024 tokens, from a card on which everything fits down to one on which nothing does."""
    model, train = PRESETS["scifi-1.5B"]
    train = train.replace(precision="bf16")
    rooms = [9999, 80, 40, 36, 33, 31, 28, 10]
    choices = [fit_batch(model, train, "cuda", room * 10**9) for room in rooms]
    order = [[*POLICIES].index(choice.activation_checkpointing) for choice in choices]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    assert (choices[0].batch_size, choices[0].activation_checkpointing) == (32, "none")  # 32,768 tokens are enough
    for policy in POLICIES:
        sizes = [choice.batch_size for choice in choices if choice.activation_checkpointing == policy]
        assert sizes == sorted(sizes, reverse=True)
    needs = [predict_memory(model, choice, "cuda")["total"] for choice in choices]
    assert needs == sorted(needs, reverse=True) and choices[-1].batch_size == 1


def test_a_fitted_batch_is_not_the_presets_full_recomputation_on_80_gb() -> None:
    model, train = PRESETS["scifi-1.5B"]
    assert train.activation_checkpointing == "full"
    fitted = fit_batch(model, train.replace(precision="bf16"), "cuda", 80 * 10**9)
    assert fitted.activation_checkpointing != "full" and fitted.batch_size >= 8


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({}, (8, 1)),
        ({"batch_size": 4}, (4, 2)),
        ({"batch_size": 3}, (3, 3)),  # the nearest
        ({"batch_size": 100}, (100, 1)),
        ({"grad_accum_steps": 4}, (2, 4)),
        ({"batch_size": 2, "grad_accum_steps": 3}, (2, 3)),
        ({"tokens_per_step": 4096}, (16, 1)),
        ({"tokens_per_step": 4096, "batch_size": 2}, (2, 8)),
        ({"tokens_per_step": 100}, (1, 1)),
        ({"tokens_per_step": 1_000_000, "grad_accum_steps": 8}, (488, 8)),  # 3904 windows, a multiple of eight
        ({"activation_checkpointing": "full"}, (8, 1)),
    ],
)
def test_what_is_given_of_a_step_stands_and_the_rest_follows(given_: dict[str, Any], expected: tuple[int, int]) -> None:
    model, train = PRESETS["scifi-mini"]
    chosen = choose_batch("scifi-mini", model, train, "cpu", memory=10**12, **given_)
    assert (chosen.batch_size, chosen.grad_accum_steps) == expected
    assert chosen.activation_checkpointing == given_.get("activation_checkpointing", "none")


@pytest.mark.parametrize("context", [32, 100, 256, 1024])
def test_a_step_has_the_presets_tokens_at_any_context(context: int) -> None:
    model, train = PRESETS["scifi-117M"]
    chosen = choose_batch("scifi-117M", model.replace(max_seq_len=context), train, "cpu", memory=10**12)
    assert windows(chosen) * context == pytest.approx(64 * 8 * 1024, rel=0.001)
    assert windows(chosen) % 8 == 0  # not a prime number of windows, one by one


def test_a_run_that_goes_on_keeps_its_batch_if_it_fits_and_else_its_windows() -> None:
    model, train = PRESETS["scifi-117M"]
    train = train.replace(precision="bf16")
    saved = train.replace(batch_size=16, grad_accum_steps=6, activation_checkpointing="selective").to_dict()
    same = choose_batch("scifi-117M", model, train, "cuda", saved=saved, memory=80 * 10**9)
    assert (same.batch_size, same.grad_accum_steps, same.activation_checkpointing) == (16, 6, "selective")
    need = predict_memory(model, same, "cuda")["total"]
    assert choose_batch("scifi-117M", model, train, "cuda", saved=saved, memory=need) == same
    smaller = choose_batch("scifi-117M", model, train, "cuda", saved=saved, memory=need - 1)
    assert smaller != same and windows(smaller) == 96
    assert predict_memory(model, smaller, "cuda")["total"] < 0.9 * need
    other = choose_batch("scifi-117M", model, train, "cuda", saved=saved, memory=need, tokens_per_step=64 * 1024)
    assert windows(other) == 64


# The steps that a text is worth


@pytest.mark.parametrize(
    ("name", "text", "given_", "steps"),
    [
        ("scifi-mini", 450_000, {}, 1000),
        ("scifi-mini", 450_000, {"epochs": 2}, 440),
        ("scifi-117M", 262_144_000, {}, 2000),  # four times
        ("scifi-117M", 262_144_000, {"epochs": 1.5}, 750),
        ("scifi-117M", 262_144_000, {"max_steps": 77}, 77),
        ("scifi-117M", 10**11, {}, 20_000),  # a text so long is not read four times
        ("scifi-117M", 10**10, {"epochs": 4}, 76_294),
        ("scifi-117M", 1000, {}, 1),
    ],
)
def test_the_steps_follow_from_the_text(name: str, text: int, given_: dict[str, Any], steps: int) -> None:
    model, train = PRESETS[name]
    assert choose_steps(name, model, train, text, **given_).max_steps == steps


def test_a_short_run_has_a_short_warmup_and_is_looked_at_more_often() -> None:
    model, train = PRESETS["scifi-117M"]
    short = choose_steps("scifi-117M", model, train, 262_144_000)
    assert (short.warmup_steps, short.eval_interval, short.checkpoint_interval) == (200, 200, 500)
    long = choose_steps("scifi-117M", model, train, 10**11)
    assert long == train
    mini = choose_steps("scifi-mini", *PRESETS["scifi-mini"], 450_000, max_steps=40)
    assert (mini.warmup_steps, mini.eval_interval) == (4, 300)


def test_a_run_that_goes_on_keeps_its_steps_unless_others_are_given() -> None:
    model, train = PRESETS["scifi-117M"]
    started = choose_steps(None, model, GO_ON, 450_000, max_steps=60)  # from another model
    assert (started.max_steps, started.eval_interval, started.warmup_steps) == (60, 6, 6)
    saved = choose_steps("scifi-117M", model, train, 262_144_000, max_steps=500)
    assert choose_steps("scifi-117M", model, train, 262_144_000, saved=saved.to_dict()) == saved
    assert choose_steps("scifi-117M", model, train, 262_144_000, max_steps=600, saved=saved.to_dict()).max_steps == 600
    assert choose_steps("scifi-117M", model, train, 262_144_000, epochs=1, saved=saved.to_dict()).max_steps == 500


def test_the_plan_warns_of_a_text_read_too_often() -> None:
    """Figures by equation 5 of Muennighoff et al., summed: each repetition is worth exp(-1 / R*) of the one before."""
    for epochs in (8, 40):
        said = text_advice(116_600_000, epochs * 262_000_000, 262_000_000)
        worth = 1 + sum(math.exp(-(number - 0.5) / 15.4) for number in range(1, epochs))
        assert "scifi-40M" in said and "warning" in said and "epochs=4" in said
        assert f"{1 - worth / epochs:.0%} of the compute is lost" in said
    assert "warning" not in text_advice(116_600_000, 4 * 262_000_000, 262_000_000)


@pytest.mark.parametrize(
    ("text", "preset"),
    [(450_000, "scifi-mini"), (55_000_000, "scifi-10M"), (600_000_000, "scifi-117M"), (10**11, "zhwiki-2.46B")],
)
def test_the_plan_says_which_preset_a_text_can_feed(text: int, preset: str) -> None:
    assert preset in text_advice(10**6, 4 * text, text)
    enough = [row["preset"] for row in preset_advice(text) if row["text, read 4 times"] == "enough"]
    assert enough[-1:] == [preset] or (not enough and preset == "scifi-mini")


def test_a_model_too_large_for_its_text_is_said_to_be() -> None:
    assert "learns" in text_advice(116_600_000, 4 * 40_000_000, 40_000_000)
    assert "learns" not in text_advice(8_000_000, 4 * 40_000_000, 40_000_000)


def test_the_plan_shows_how_a_step_is_cut() -> None:
    rows = plan(*PRESETS["scifi-117M"], "cpu").rows()
    for word in ("524,288 tokens", "batch_size 64", "grad_accum_steps 8", "context 1024"):
        assert word in rows["a step"]
    assert rows["activation_checkpointing"] == "none"


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
@pytest.mark.parametrize("name", ["scifi-10M", "scifi-40M", "scifi-117M", "scifi-1.5B", "zhwiki-2.46B"])
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


def test_measuring_the_speed_of_a_large_step_reads_a_few_batches() -> None:
    data = Counting()
    measure_speed(tiny_config(), quick(grad_accum_steps=500), data, "cpu", steps=2)
    assert 3 <= data.batches <= 12


class Counting(Batches):
    """Counts the batches that are read."""

    batches = 0

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches += 1
        return super().batch(step, batch_size, seed)
