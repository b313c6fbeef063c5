"""The optimizers and the schedules of their rates, beside torch's own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcore.config import TrainConfig
from llmcore.device import has_bf16
from llmcore.optim import Muon, build_optimizers, learning_rate_at, orthogonalised
from llmcore.runs import read_metrics
from llmcore.train import Trainer

from .helpers import (
    Batches,
    examples,
    quick,
    tiny_model,
    trainer,
)


@settings(deadline=None, max_examples=examples(100))
@given(
    schedule=st.sampled_from(["cosine", "wsd", "plateau"]),
    max_steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 100),
    min_lr_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0, 1),
)
def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor(schedule: str, max_steps: int, **changes: Any) -> None:
    config = TrainConfig(schedule=schedule, max_steps=max_steps, **changes)
    warmup = min(config.warmup_steps, max_steps)
    rates = [learning_rate_at(step, config) for step in range(max_steps + 1)]
    assert rates[:warmup] == pytest.approx([(step + 1) / config.warmup_steps for step in range(warmup)])
    after = rates[warmup:] if config.warmup_steps < max_steps else []
    assert all(config.min_lr_ratio - 1e-9 <= rate <= 1 for rate in after)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    if after and schedule == "plateau":
        assert set(after) == {1.0}
    elif after:
        assert after[-1] == pytest.approx(config.min_lr_ratio)


def test_cosine_is_halfway_down_in_the_middle() -> None:
    config = TrainConfig(max_steps=110, warmup_steps=10, min_lr_ratio=0.2)
    assert [learning_rate_at(step, config) for step in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.6, 0.2])


def test_wsd_is_flat_and_then_a_line() -> None:
    config = TrainConfig(schedule="wsd", max_steps=100, warmup_steps=0, decay_fraction=0.2, min_lr_ratio=0)
    assert [learning_rate_at(step, config) for step in (0, 80, 85, 90, 99)] == pytest.approx([1, 1, 0.75, 0.5, 0.05])


@pytest.mark.parametrize(("supported", "tolerance"), [(True, 0.02), (False, 1e-5)])
def test_muon_orthogonalises_in_bf16_only_where_the_cpu_has_it(
    supported: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    matrices = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    exact = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    near = orthogonalised(matrices, coefficients, 5, 1e-7)
    assert near.dtype == (torch.bfloat16 if supported else torch.float32)
    assert (near - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_on_many_matrices_at_once_is_torchs_muon(nesterov: bool) -> None:
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (8, 24), (1, 5)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    pair = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for before, one, other in zip(start, ours, theirs, strict=True):
        moved = (other - before).norm()
        # bf16 has eight bits; without it ours are float32's
        assert (one - other).norm() < (0.01 if has_bf16(torch.device("cpu")) else 0.02) * moved
    assert pair[0].state_dict()["param_groups"] == pair[1].state_dict()["param_groups"]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(pair[0].state[one]["momentum_buffer"], pair[1].state[other]["momentum_buffer"])


def test_plateau_lowers_the_rate_when_validation_stalls(tmp_path: Path) -> None:
    config = quick(schedule="plateau", max_steps=12, warmup_steps=0, eval_interval=1, plateau_patience=2, grad_clip=0)
    config = config.replace(min_lr_ratio=0.3, learning_rate=1e-30, weight_decay=0)  # nothing is learned: all stall
    trainer(tmp_path, config).fit()
    rates = [event["learning_rate"] / 1e-30 for event in read_metrics(tmp_path)]
    assert rates == pytest.approx([1] * 3 + [0.5] * 2 + [0.3] * 7)


def test_plateau_counts_validations_in_a_row(tmp_path: Path) -> None:
    class Course(Batches):
        """One window at each validation, chosen by how hard it is for a model that learns nothing."""

        def sequential(self, batch_size: int, most: int = 0) -> Any:
            yield ranked[next(course)]

    def hardness(window: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return float(model(*window))

    model, course = tiny_model(std=0.3), iter([7, 8, 6, 9, 5, 6, 7, 4])
    ranked = sorted(Batches().sequential(1), key=hardness)
    config = quick(schedule="plateau", max_steps=8, warmup_steps=0, eval_interval=1, plateau_patience=2)
    config = config.replace(learning_rate=1e-30, weight_decay=0)
    Trainer(model, Batches(), Course(), config, tmp_path, device="cpu").fit()
    rates = [event["learning_rate"] / 1e-30 for event in read_metrics(tmp_path)]
    assert rates == pytest.approx([1] * 7 + [0.5])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [False, True])
def test_every_parameter_is_optimized_once_and_matrices_alone_decay(optimizer: str, tie: bool) -> None:
    model = tiny_model(tie_embeddings=tie, qk_norm=tie)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for o in build_optimizers(model, quick(optimizer=optimizer)) for group in o.param_groups]
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        assert all((p.dim() == 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    if optimizer == "muon":
        *_, last = build_optimizers(model, quick(optimizer=optimizer))
        assert {names[id(p)].split(".")[0] for group in last.param_groups for p in group["params"]} == {"layers"}
