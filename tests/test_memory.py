"""Memory: what is predicted against what PyTorch's allocator hands out, and plans that cannot fit."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import llmcore.model
from llmcore.config import PRESETS, ModelConfig, TrainConfig
from llmcore.device import chunk_rows
from llmcore.files import PROJECT_ROOT
from llmcore.measure import memory
from llmcore.measure.memory import available_memory, block_activations, predict_memory
from llmcore.measure.planner import RandomTokens
from llmcore.model import Block, rope_frequencies, rope_table
from llmcore.runs import TrainingError
from llmcore.train import Trainer

from .helpers import quick, tiny_config, tiny_model

SHAPE = ModelConfig(vocab_size=500, dim=128, n_layers=3, n_heads=4, hidden_dim=384, max_seq_len=128)


def allocated(model: ModelConfig, train: TrainConfig, folder: Path) -> int:
    """The most bytes that the second step's tensors took at once, weights and optimizer included."""
    torch.manual_seed(0)
    trainer = Trainer(tiny_model_of(model), RandomTokens(model, model.max_seq_len), None, train, folder, device="cpu")
    trainer.measured_steps(1)
    gc.collect()  # else what earlier tests left may be freed within the step, and count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.measured_steps(1)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    states = [value for each in trainer.optimizers for state in each.state.values() for value in state.values()]
    return most + 4 * model.n_params() + sum(value.nbytes for value in states)


def tiny_model_of(model: ModelConfig) -> Any:
    return tiny_model(**model.to_dict())


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        *[
            ({}, {"precision": precision, "activation_checkpointing": policy})
            for precision in ("fp32", "bf16")
            for policy in ("none", "selective", "full")
        ],
        ({"max_seq_len": 512}, {"batch_size": 1, "precision": "bf16", "activation_checkpointing": "selective"}),
        ({"max_seq_len": 512}, {"batch_size": 1, "precision": "bf16"}),
        ({"n_kv_heads": 2}, {"precision": "fp32"}),
        *[({"qk_norm": True, "head_dim": 64}, {"precision": precision}) for precision in ("fp32", "bf16")],
        ({"qk_norm": True, "n_kv_heads": 2}, {"precision": "bf16", "activation_checkpointing": "selective"}),
        ({"vocab_size": 70_000}, {"precision": "fp32"}),
        ({"vocab_size": 70_000}, {"precision": "bf16"}),
        ({"max_seq_len": 16, "tie_embeddings": True}, {"batch_size": 1, "optimizer": "muon", "precision": "fp32"}),
        ({"max_seq_len": 16}, {"batch_size": 1, "precision": "bf16"}),
        ({}, {"batch_size": 2, "grad_accum_steps": 2, "precision": "fp32"}),
    ],
)
def test_prediction_is_what_the_allocator_hands_out(
    shape: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    model, train = SHAPE.replace(**shape), quick(**changes)
    predicted = predict_memory(model, train)
    assert predicted["total"] == sum(value for part, value in predicted.items() if part != "total")
    ours = predicted["total"] - predicted["libraries"]
    assert ours == pytest.approx(allocated(model, train, tmp_path), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [{"vocab_size": 70_000}, {"vocab_size": 12_000, "dim": 512, "n_layers": 1}])
def test_without_torchs_operator_the_prediction_holds(
    shape: dict[str, Any], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in torch 2.11, and about what the operator takes: at most half more."""
    model, train = SHAPE.replace(**shape), quick(precision=precision)
    with_operator = predict_memory(model, train)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    predicted = predict_memory(model, train)
    measured = allocated(model, train, tmp_path)
    assert predicted["total"] - predicted["libraries"] == pytest.approx(measured, rel=0.03)
    assert measured < 1.5 * with_operator["total"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_larger_chunks_of_a_gpu_are_predicted_too(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with the chunks that a GPU gets."""
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    for module in (memory, llmcore.model):
        monkeypatch.setattr(module, "chunk_rows", lambda *counts: chunk_rows(*counts[:-1], device="cuda"))
    model = SHAPE.replace(vocab_size=3000, dim=512, n_layers=1)
    train = quick(precision=precision, batch_size=32)
    rows = chunk_rows(256, 32 * 128, 3000, 512, "cuda")
    assert rows == -(-32 * 128 * 512 // 3000) > 256 == chunk_rows(256, 32 * 128, 3000, 512, "cpu")
    predicted = predict_memory(model, train)
    assert predicted["total"] - predicted["libraries"] == pytest.approx(allocated(model, train, tmp_path), rel=0.03)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("time", [96, 512])
def test_a_block_keeps_what_is_counted(bf16: bool, time: int, qk_norm: bool) -> None:
    """autograd says what it saves: each storage counts once; parameters, their casts and RoPE's table do not."""
    shape = SHAPE.replace(qk_norm=qk_norm)
    block, kept = Block(shape, 0), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    matrices = {shape for p in block.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
    cos, sin = rope_table(rope_frequencies(SHAPE), time)
    shared = {each.untyped_storage().data_ptr() for each in (cos, sin)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        cast = tensor.shape in matrices and tensor.dtype == torch.bfloat16  # of a weight
        table = tensor.dtype in (torch.bool, torch.complex64)  # the same for every row of the batch
        if place.data_ptr() not in weights | shared and not table and not cast:
            kept[place.data_ptr()] = place
        return tensor

    x = torch.randn(2, time, SHAPE.dim, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        y = block(x, cos, sin)
    counted = 2 * time * block_activations(shape, "none", time, 2 if bf16 else 4, fused=False)
    assert sum(place.nbytes() for place in kept.values()) == counted
    assert y.shape == x.shape


def test_stricter_policies_keep_less() -> None:
    model, train = PRESETS["scifi-1.5B"]
    none, selective, full = (
        predict_memory(model, train.replace(activation_checkpointing=policy, precision="bf16"))["activations"]
        for policy in ("none", "selective", "full")
    )
    assert full < none / 5 and full < selective < 0.75 * none


def test_what_cannot_fit_is_refused_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    need = predict_memory(tiny_config(), quick())["total"]
    monkeypatch.setattr(memory, "available_memory", lambda device: need // 2)
    with pytest.raises(TrainingError) as caught:
        memory.check_memory(tiny_config(), quick())
    for word in (f"{need / 2e9:.2f} GB", f"{need / 1e9:.2f} GB", "batch_size=4", "context_size=24", "full", "preset"):
        assert word in str(caught.value)
    monkeypatch.setattr(memory, "available_memory", lambda device: need)
    memory.check_memory(tiny_config(), quick())


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_all_that_the_advice_names_can_be_set_in_notebook_4(policy: str) -> None:
    notebook = (PROJECT_ROOT / "notebooks" / "04_scifi_train.py").read_text(encoding="utf-8")
    settable = set(re.findall(r"(?m)^(\w+): \w+ = ", notebook))
    train = quick(activation_checkpointing=policy, grad_accum_steps=3)
    named = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", memory.advice(tiny_config(), train, "cpu")))
    assert named <= settable and {"batch_size", "grad_accum_steps", "context_size"} <= named
    assert ("activation_checkpointing" in named) == (policy != "full")


HUGE = """
import time
import torch
from llmcore.config import preset
from llmcore.measure.memory import check_memory
from llmcore.measure.planner import plan, resident_bytes
from llmcore.runs import TrainingError
model, train = preset("scifi-1.5B")
before, started = resident_bytes()[0], time.process_time()
plan(model, train, "cpu")
try:
    check_memory(model, train.replace(batch_size=65_536), "cpu")
except TrainingError:
    print(resident_bytes()[1] - before, time.process_time() - started)
"""


@pytest.mark.slow
def test_a_huge_plan_is_refused_before_anything_is_allocated() -> None:
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, cwd=PROJECT_ROOT, check=True)
    taken, seconds = map(float, done.stdout.split())
    assert taken < 50e6 and seconds < 5


def test_available_memory_is_part_of_the_machines() -> None:
    assert 0.01 < available_memory("cpu") / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) < 1
