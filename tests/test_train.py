"""The training loop: the arithmetic of a step, what is refused before the first, what a run leaves behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmcore.model
from llmcore.checkpoint import CheckpointError, checkpoints
from llmcore.config import PRESETS, TrainConfig
from llmcore.device import DeviceError
from llmcore.model import Transformer
from llmcore.optim import learning_rate_at
from llmcore.runs import TrainingError, free_run_dir, read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer

from .helpers import (
    ROOT,
    Batches,
    assert_same_tensors,
    quick,
    tiny_model,
    trainer,
    weights,
)

# One step


def test_accumulated_steps_equal_one_large_batch(tmp_path: Path) -> None:
    """Windows differ in how many targets count, so a mean of means would not do."""
    whole, parts = tiny_model(), tiny_model()
    a = trainer(tmp_path / "a", quick(batch_size=8), whole).fit()
    b = trainer(tmp_path / "b", quick(batch_size=2, grad_accum_steps=4), parts).fit()
    assert a.step == b.step == 6
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
    for one, other in zip(read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b"), strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)
        assert one["tokens"] == other["tokens"]


LONG = [name for name, (shape, _) in PRESETS.items() if shape.max_seq_len >= 512]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", [LONG[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LONG[1:])])
def test_presets_train_the_same_without_torchs_loss(
    preset: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 has no operator for the chunked loss. Their vocabulary, context and policy need it, at any width."""
    shape, how = PRESETS[preset]
    shape = shape.replace(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, hidden_dim=48)
    policy = how.activation_checkpointing
    size = max(1, 2 * llmcore.model.CHUNK_ABOVE // (shape.max_seq_len * shape.vocab_size))
    config = quick(max_steps=2, batch_size=size, precision=precision, activation_checkpointing=policy)
    data = Batches(shape.max_seq_len, vocab_size=shape.vocab_size)
    assert size * shape.max_seq_len * shape.vocab_size > llmcore.model.CHUNK_ABOVE
    losses = []
    for way in ("operator", "hidden", "plain"):
        with monkeypatch.context() as patch:
            if way == "hidden":
                patch.delattr(F, "linear_cross_entropy", raising=False)
            if way == "plain":
                patch.setattr(llmcore.model, "CHUNK_ABOVE", 2**40)
            torch.manual_seed(0)
            one = Trainer(Transformer(shape), data, None, config, tmp_path / way, device="cpu")
            losses.append([[event["loss"], event["grad_norm"]] for event in one.steps()])
    close = 1e-4 if precision == "fp32" else 2e-2
    for other in losses[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(losses[0]), rtol=close, atol=0)


def test_a_step_is_torchs_own_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    config = quick(max_steps=4, warmup_steps=3, weight_decay=0.3, grad_clip=0.1)
    model, reference = tiny_model(), tiny_model()
    matrices = [p for p in reference.parameters() if p.dim() > 1]
    vectors = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    norms = []
    for step in range(4):
        x, y = Batches().batch(step, 4)
        optimizer.zero_grad()
        F.cross_entropy(reference(x).flatten(0, 1), y.flatten()).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in reference.parameters()))
        for parameter in reference.parameters():
            parameter.grad *= min(1, 0.1 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * learning_rate_at(step, config)
        optimizer.step()
        norms.append(norm)
    trainer(tmp_path, config, model).fit()
    assert min(norms) > 0.2  # clipping took place
    assert [event["grad_norm"] for event in read_metrics(tmp_path)] == pytest.approx(norms, rel=1e-4)
    for (name, one), other in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(one, other[1], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_learned_by_heart(optimizer: str, tmp_path: Path) -> None:
    class OneBatch(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            return super().batch(0, batch_size)

    config = quick(max_steps=150, optimizer=optimizer, weight_decay=0.0)
    Trainer(tiny_model(), OneBatch(), None, config, tmp_path, device="cpu").fit()
    events = read_metrics(tmp_path)
    assert events[0]["loss"] > 3 and events[-1]["loss"] < 0.1


def test_validation_counts_each_target_once_and_gives_bits_per_byte(tmp_path: Path) -> None:
    model, data = tiny_model(std=0.2), Batches(windows=7)
    found = trainer(tmp_path, quick(batch_size=3), model)
    found.val_data = data
    event = found.validate()
    nats = []
    with torch.no_grad():
        for x, y in data.sequential(1):
            surprise = -model(x).double().log_softmax(-1)[0]
            nats += [float(surprise[t, target]) for t, target in enumerate(y[0].tolist()) if target >= 0]
    mean = sum(nats) / len(nats)
    assert event["val_loss"] == pytest.approx(mean, rel=1e-6)
    assert event["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    total_bytes = len(nats) * data.bytes_per_token
    assert event["val_bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / total_bytes, rel=1e-6)


def test_validation_stops_after_eval_batches(tmp_path: Path) -> None:
    model, data = tiny_model(std=0.2), Batches()
    x, y = next(iter(data.sequential(4)))
    with torch.no_grad():
        expected = float(model(x, y))
    assert trainer(tmp_path, quick(), model).validate(1)["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_batches_without_targets_change_nothing(tmp_path: Path) -> None:
    class Gaps(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
            x, y = super().batch(step // 2, batch_size)
            return x, y if step % 2 else torch.full_like(y, -100)

        def sequential(self, batch_size: int, most: int = 0) -> Any:
            for x, y in super().sequential(batch_size, most):
                yield x, torch.full_like(y, -100)
                yield x, y

    one, other = tiny_model(), tiny_model()
    Trainer(one, Batches(), Batches(), quick(), tmp_path / "a", device="cpu").fit()
    Trainer(other, Gaps(), Gaps(), quick(grad_accum_steps=2), tmp_path / "b", device="cpu").fit()
    assert_same_tensors(weights(one), weights(other))
    assert read_metrics(tmp_path / "a")[-1]["val_loss"] == read_metrics(tmp_path / "b")[-1]["val_loss"]


# Before the start


def test_an_output_dir_that_cannot_hold_a_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(TrainingError, match=r"output_dir='.*file.*' cannot be written"):
            trainer(path, quick())
        with pytest.raises(TrainingError, match=r"output_dir='.*file.*' cannot be written"):
            free_run_dir(path, "run")
    assert file.read_text() == "mine"


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    trainer(tmp_path / "run", quick(max_steps=2)).fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="holds a run already; resume it"):
        trainer(tmp_path / "run", quick())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert free_run_dir(tmp_path, "run") == tmp_path / "run-2"
    assert free_run_dir(tmp_path, "new") == tmp_path / "new"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick())
    steps = one.steps()
    next(steps)
    for _ in range(2):
        with pytest.raises(TrainingError, match=rf"in use by a run of process {os.getpid()} \(this one\)"):
            trainer(tmp_path, quick(), resume="latest")
    steps.close()
    assert trainer(tmp_path, quick(), resume="latest").fit().step == 6


def test_resume_without_a_checkpoint_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        trainer(tmp_path, quick(), resume="latest")


def test_a_run_starts_from_the_step_it_is_told_to_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="init_step=3, but training starts at step 0"):
        trainer(tmp_path, quick(), init_step=3)
    trainer(tmp_path, quick(max_steps=2), init_step=0).fit()
    with pytest.raises(TrainingError, match="init_step=0, but training starts at step 2"):
        trainer(tmp_path, quick(), resume="latest", init_step=0)
    assert trainer(tmp_path, quick(), resume="latest", init_step=2).fit().step == 6


def test_fp16_on_a_cpu_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="precision='fp16' needs a CUDA device, not cpu; use auto, bf16 or fp32"):
        trainer(tmp_path / "run", quick(precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(TrainingError, match=f"tokenizer has {tokenizer.vocab_size} ids, the model only vocab_size=37"):
        trainer(tmp_path, quick(), tokenizer=tokenizer)


# What a run leaves behind


def test_metrics_are_one_line_a_step(tmp_path: Path) -> None:
    trainer(tmp_path, quick(eval_interval=4)).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [4 * 12 * step for step in range(1, 7)]
    assert ["val_loss" in line for line in lines] == [False, False, False, True, False, True]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a crash in the middle of a line
    assert read_metrics(tmp_path) == lines


def test_every_line_is_on_disk_when_its_event_is_out(tmp_path: Path) -> None:
    for event in trainer(tmp_path, quick()).steps():
        assert read_metrics(tmp_path)[-1]["step"] == event["step"]


def test_checkpoints_are_written_when_due_or_requested_and_pruned(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick(max_steps=7, checkpoint_interval=2), val=False)
    saved = []
    for event in one.steps():
        if "checkpoint" in event:
            saved.append(event["step"])
        if event["step"] == 4:
            one.request_save()
    assert saved == [2, 4, 5, 6, 7]
    kept = {int(path.name[5:11]) for path in checkpoints(tmp_path)}
    assert {6, 7} <= kept and len(kept) <= 3


def test_run_folder_says_how_it_was_made(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = quick(max_steps=1)
    result = trainer(tmp_path, config, tiny_model(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer).fit()
    for folder in (tmp_path, result.checkpoint):
        assert folder
        said = json.loads((folder / "config.json").read_text())
        assert TrainConfig.from_dict(said["train"]) == config
        assert said["data"] == {"train": "this", "val": "this"}
        assert (said["tokenizer"], said["precision"]) == (tokenizer.fingerprint, "fp32")
        assert said["train"]["seed"] == 0
        versions = said["environment"]
        assert torch.__version__.startswith(versions["torch"])  # the package says it with or without "+cu130"
        assert versions["threads"] == torch.get_num_threads()
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert (versions["commit"] or "").removesuffix("+changes") == head


def test_what_a_resume_changes_is_in_the_history(tmp_path: Path) -> None:
    trainer(tmp_path, quick(max_steps=2)).fit()
    trainer(tmp_path, quick(max_steps=4, learning_rate=0.02, batch_size=2), resume="latest").fit()
    result = trainer(tmp_path, quick(max_steps=5, learning_rate=0.02, batch_size=2), resume="latest").fit()
    assert result.checkpoint
    for folder in (tmp_path, result.checkpoint):
        history = json.loads((folder / "config.json").read_text())["history"]
        assert [entry["step"] for entry in history] == [2, 4]
        assert history[0]["changed"] == {
            "train.max_steps": [2, 4],
            "train.batch_size": [4, 2],
            "train.learning_rate": [0.01, 0.02],
        }
        assert history[1]["changed"] == {"train.max_steps": [4, 5]}


def test_samples_and_validation_do_not_disturb_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    quiet, chatty = (tiny_model(vocab_size=tokenizer.vocab_size) for _ in range(2))
    trainer(tmp_path / "a", quick(), quiet, val=False).fit()
    config = quick(sample_interval=2, eval_interval=1, sample_tokens=8, sample_prompt="曹操" * 30)
    trainer(tmp_path / "b", config, chatty, tokenizer=tokenizer).fit()
    assert_same_tensors(weights(quiet), weights(chatty))
    assert ["sample" in event for event in read_metrics(tmp_path / "b")] == [False, True] * 3
