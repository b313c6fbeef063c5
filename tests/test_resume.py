"""A resumed run ends as if it had never stopped, or is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcore.checkpoint import CheckpointError, checkpoints, find_checkpoint
from llmcore.measure.memory import predict_memory
from llmcore.measure.planner import choose_batch
from llmcore.model import Transformer
from llmcore.runs import TrainingError, read_metrics
from llmcore.tokenizer import Tokenizer
from llmcore.train import Event, Trainer, TrainResult

from .helpers import (
    Batches,
    assert_same_tensors,
    examples,
    numbers,
    printed_by,
    quick,
    read_until,
    start,
    state,
    tiny_config,
    tiny_model,
    trainer,
    weights,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wsd-muon": {"schedule": "wsd", "optimizer": "muon", "decay_fraction": 0.5},
    "plateau": {"schedule": "plateau", "eval_interval": 1, "plateau_patience": 2, "learning_rate": 0.3},
    "bf16-accumulated": {"precision": "bf16", "grad_accum_steps": 3, "batch_size": 2},
    "muon-checkpointed-bf16": {"precision": "bf16", "optimizer": "muon", "activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at", [1, 5])
def test_resume_is_bit_exact(variant: str, at: int, tmp_path: Path) -> None:
    config = quick(**{"max_steps": 9, "eval_interval": 3, **VARIANTS[variant]})

    def run(folder: str, seed: int, stop_at: int = 0, **options: Any) -> TrainResult:
        def stop(event: Event) -> None:
            if event["step"] == stop_at:
                one.request_stop()

        torch.manual_seed(seed)  # a resumed run must not lean on how the process began
        model = tiny_model(seed, tie_embeddings=True, qk_norm="muon" in variant)
        one = trainer(tmp_path / folder, config, model, callbacks=[stop], **options)
        return one.fit()

    straight = run("straight", 0)
    if variant == "plateau":
        rates = [event["learning_rate"] for event in read_metrics(tmp_path / "straight")]
        assert rates[4] < rates[1] == rates[2]  # lowered between the two stops
    first = run("resumed", 0, stop_at=at)
    assert first.stopped_early and first.step == at
    second = run("resumed", 5, resume="latest")
    assert (second.step, second.val_loss, second.stopped_early) == (9, straight.val_loss, False)
    assert straight.checkpoint and second.checkpoint
    assert straight.checkpoint.name == second.checkpoint.name
    assert_same_tensors(state(straight.checkpoint), state(second.checkpoint))
    assert numbers(tmp_path / "straight") == numbers(tmp_path / "resumed")
    saved = [json.loads((r.checkpoint / "trainer_state.json").read_text()) for r in (straight, second)]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("relative", [{"qk_norm": True}, {"rope_scaling_factor": 8.0}])
def test_a_run_is_resumed_only_with_the_same_norms_and_rope(relative: dict[str, Any], tmp_path: Path) -> None:
    for one, other in (({}, relative), (relative, {})):
        folder = tmp_path / str(len(one))
        trainer(folder, quick(max_steps=2), tiny_model(**one)).fit()
        with pytest.raises(CheckpointError, match=f"belongs to another run: model.{next(iter(relative))}: "):
            trainer(folder, quick(max_steps=4), tiny_model(**other), resume="latest")
        assert trainer(folder, quick(max_steps=4), tiny_model(**one), resume="latest").fit().step == 4


@settings(deadline=None, max_examples=examples(15), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(1, 11), max_size=3, unique=True),
    schedule=st.sampled_from(["cosine", "wsd", "plateau"]),
    optimizer=st.sampled_from(["adamw", "muon"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    grad_accum_steps=st.integers(1, 2),
    activation_checkpointing=st.sampled_from(["none", "selective", "full"]),
)
def test_stops_anywhere_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], **changes: Any
) -> None:
    config = quick(max_steps=12, eval_interval=4, plateau_patience=1, batch_size=2, **changes)
    folder = tmp_path_factory.mktemp("runs")
    straight = trainer(folder / "straight", config).fit()
    for number, stop in enumerate([*sorted(stops), 12]):
        one = trainer(folder / "stopped", config, tiny_model(number), resume="latest" if number else None)
        one.callbacks.append(lambda event, one=one, stop=stop: one.request_stop() if event["step"] == stop else None)
        result = one.fit()
    assert straight.checkpoint and result.checkpoint
    assert_same_tensors(state(straight.checkpoint), state(result.checkpoint))
    assert numbers(folder / "straight") == numbers(folder / "stopped")
    saved = [json.loads((r.checkpoint / "trainer_state.json").read_text()) for r in (straight, result) if r.checkpoint]
    assert saved[0] == saved[1]


def test_a_resume_on_a_smaller_device_learns_the_same(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The losses differ only by the order of sums, and nothing is said of windows read twice or never."""
    config = quick(max_steps=12, batch_size=8, learning_rate=3e-3)
    straight = trainer(tmp_path / "straight", config)
    straight.fit()
    first = trainer(tmp_path / "moved", config)
    first.callbacks.append(lambda event: first.request_stop() if event["step"] == 5 else None)
    first.fit()

    saved = json.loads((first.last_checkpoint / "config.json").read_text())["train"] if first.last_checkpoint else {}
    model = tiny_config()
    free = predict_memory(model, config)["total"] - 1  # the run's own batch no longer fits
    smaller = choose_batch("scifi-mini", model, config, "cpu", saved=saved, memory=free)
    assert smaller.batch_size < 8 and smaller.batch_size * smaller.grad_accum_steps == 8
    trainer(tmp_path / "moved", smaller, tiny_model(9), resume="latest").fit()

    losses = [[event["loss"] for event in read_metrics(tmp_path / run)] for run in ("straight", "moved")]
    assert len(losses[1]) == 12 and losses[0][:5] == losses[1][:5] and losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    history = json.loads((tmp_path / "moved" / "config.json").read_text())["history"]
    assert "train.batch_size" in history[-1]["changed"] and "data" not in history[-1]
    assert not list(recwarn)


SEEDED = """
import hashlib, sys, torch
from pathlib import Path
from tests.helpers import Batches, quick, tiny_model
from llmcore.train import Trainer

torch.set_num_threads(4)
config = quick(max_steps=12, batch_size=64, compile="on", precision="bf16", optimizer="muon")
for folder, stop in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    run = Path(folder)
    resume = {"resume": "latest"} if run.exists() else {}
    model = tiny_model(dim=64, n_layers=1, max_seq_len=64)
    one = Trainer(model, Batches(time=64), None, config, run, device="cpu", **resume)
    one.callbacks.append(lambda event: one.request_stop() if event["step"] == stop else None)
    one.fit()
    print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in one.model.parameters())).hexdigest())
"""


@pytest.mark.slow
def test_compiled_on_many_threads_a_stopped_run_gives_the_same_result(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("straight", "again", "stopped")}
    first = printed_by(SEEDED, folders["straight"], 0, folders["again"], 0, folders["stopped"], 5)
    straight, again, stopped = first.split()
    assert len(straight) == 64
    assert again == straight
    assert stopped != straight
    assert printed_by(SEEDED, folders["stopped"], 0).strip() == straight
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight") == numbers(tmp_path / "again")


KILLED = """
import sys
from pathlib import Path
from tests.helpers import quick, trainer

config = quick(max_steps=10**6, schedule="plateau", checkpoint_interval=3)
trainer(Path(sys.argv[1]), config, callbacks=[lambda e: print(e["step"], flush=True)]).fit()
"""


@pytest.mark.slow
def test_a_killed_run_resumes_exactly_and_is_locked_while_it_lives(tmp_path: Path) -> None:
    with start(KILLED, tmp_path / "killed") as process:
        read_until(process, "8")
        with pytest.raises(TrainingError, match=f"in use by a run of process {process.pid};"):
            trainer(tmp_path / "killed", quick(), resume="latest")
        process.kill()
    reached = read_metrics(tmp_path / "killed")[-1]["step"]
    config = quick(max_steps=reached + 4, schedule="plateau")  # a rate that max_steps does not change
    resumed = trainer(tmp_path / "killed", config, tiny_model(3), resume="latest")
    assert resumed.step % 3 == 0 and 6 <= resumed.step <= reached
    result, straight = resumed.fit(), trainer(tmp_path / "straight", config).fit()
    assert result.checkpoint and straight.checkpoint
    assert_same_tensors(state(result.checkpoint), state(straight.checkpoint))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")


def test_resume_refuses_what_is_of_another_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    big = {"vocab_size": tokenizer.vocab_size}
    trainer(tmp_path, quick(max_steps=1), tiny_model(**big), tokenizer=tokenizer).fit()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def resume(match: str, model: Transformer, data: Batches | None = None, **changes: Any) -> None:
        options = {"tokenizer": tokenizer, **changes}
        config = quick(optimizer=options.pop("optimizer", "adamw"))
        untouched = weights(model)
        with pytest.raises(CheckpointError, match=match):
            Trainer(model, data or Batches(), Batches(), config, tmp_path, device="cpu", resume="latest", **options)
        assert_same_tensors(weights(model), untouched)

    resume("tokenizer: .* there, None here", tiny_model(**big), tokenizer=None)
    resume("data: .*'this'.* there, .*'other'.* here", tiny_model(**big), Batches(fingerprint="other"))
    resume(r"model.hidden_dim: 48 there, 64 here", tiny_model(hidden_dim=64, **big))
    resume(
        r"model.n_layers: 2 there, 1 here; model.max_seq_len: 24 there", tiny_model(n_layers=1, max_seq_len=30, **big)
    )
    resume("optimizer: adamw there, muon here", tiny_model(**big), optimizer="muon")
    assert {file: file.read_bytes() for file in before} == before


def test_resume_may_go_on_longer_and_from_another_runs_checkpoint(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", quick(max_steps=3)).fit()
    assert first.checkpoint
    longer = trainer(tmp_path / "b", quick(max_steps=5), tiny_model(4), resume=first.checkpoint).fit()
    assert (longer.step, longer.stopped_early) == (5, False)
    assert [event["step"] for event in read_metrics(tmp_path / "b")] == [4, 5]
    with pytest.raises(TrainingError, match="holds a run already"):
        trainer(tmp_path / "b", quick(max_steps=5), resume=first.checkpoint)


def test_resume_takes_the_older_checkpoint_when_the_newest_is_damaged(tmp_path: Path) -> None:
    straight = tiny_model()
    trainer(tmp_path / "a", quick(schedule="plateau"), straight).fit()
    trainer(tmp_path / "b", quick(schedule="plateau", checkpoint_interval=2)).fit()
    newest = find_checkpoint(tmp_path / "b")
    os.truncate(newest / "trainer_state.safetensors", 100)
    again = tiny_model(7)
    with pytest.warns(UserWarning, match=r"passed over: .*trainer_state\.safetensors is damaged"):
        resumed = trainer(tmp_path / "b", quick(schedule="plateau"), again, resume="latest")
    assert resumed.step == 4
    resumed.fit()
    assert_same_tensors(weights(again), weights(straight))
    assert [event["step"] for event in read_metrics(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]


def test_leftovers_of_a_kill_are_deleted_by_the_next_run(tmp_path: Path) -> None:
    config = quick(checkpoint_interval=1, keep_checkpoints=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmcore.train.prune_checkpoints", lambda run_dir, keep: None)
        last = trainer(tmp_path, config, val=False).fit().checkpoint
    saved = checkpoints(tmp_path)
    assert last and len(saved) == 6  # as if killed before the deletion, and here in its middle:
    shutil.copytree(last, tmp_path / ".step=000001_loss=1.000.deleted.tmp")
    again = trainer(tmp_path, config, tiny_model(3), val=False, resume="latest")
    assert again.fit().step == 6
    kept = {*saved[-2:], find_checkpoint(tmp_path, "best")}
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == kept and len(kept) < 6
