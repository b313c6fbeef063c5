"""A run's folder: nothing in it is lost, doubled or changed by a refusal, and every loss in it says what it is of."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcore.checkpoint import (
    CheckpointError,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    loss_in_words,
    read_config,
    read_manifest,
    save_checkpoint,
)
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.dataset import TokenDataset
from llmcore.device import DeviceError
from llmcore.formats.hub import model_card, write_card
from llmcore.measure.compare_runs import find_runs, read_run, summarize
from llmcore.notebook import plots
from llmcore.notebook.dashboard import TrainingDashboard, run_status
from llmcore.notebook.run_page import write_summary
from llmcore.runs import TrainingError, read_metrics
from llmcore.train import Event, Trainer

from .helpers import (
    Batches,
    assert_same_tensors,
    examples,
    numbers,
    printed_by,
    quick,
    state,
    tiny_model,
    trainer,
    weights,
)
from .test_sweep import example

MANY = settings(deadline=None, max_examples=examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # str.splitlines cuts at each


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def eight(folder: Path, **changes: Any) -> Path:
    """A finished run of eight steps with a checkpoint every other step."""
    trainer(folder, quick(max_steps=8, checkpoint_interval=2, keep_checkpoints=9, **changes), val=False).fit()
    return folder


def at_step(folder: Path, step: int) -> Path:
    [path] = folder.glob(f"step={step:06d}_*")
    return path


class Made(Batches):
    """Batches that say which tokenizer they were made with."""

    def __init__(self, tokenizer: str, **changes: Any) -> None:
        super().__init__(**changes)
        self.manifest = {"tokenizer": tokenizer}


# What a refusal leaves

LONGER = quick(max_steps=12, checkpoint_interval=2, keep_checkpoints=9)
REFUSED: dict[str, dict[str, Any]] = {
    "another first step": {"init_step": 999},
    "fewer steps": {"config": LONGER.replace(max_steps=3)},
    "another optimizer": {"config": LONGER.replace(optimizer="muon")},
    "other precision": {"config": LONGER.replace(precision="fp16")},
    "another model": {"model": {"hidden_dim": 64}},
    "other data": {"data": {"fingerprint": "other"}},
    "no such checkpoint": {"resume": "step=000099_loss=1.000"},
    "no resume": {"resume": None},
}


def build(folder: Path, **options: Any) -> Trainer:
    data, model = Batches(**options.pop("data", {})), tiny_model(**options.pop("model", {}))
    return Trainer(model, data, None, options.pop("config", LONGER), folder, device="cpu", **options)


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_resume_changes_nothing_on_disk(why: str, tmp_path: Path) -> None:
    run = eight(tmp_path / "run")
    before = snapshot(run)
    with pytest.raises((TrainingError, DeviceError, CheckpointError)):
        build(run, **{"resume": at_step(run, 4), **REFUSED[why]})
    assert snapshot(run) == before


@pytest.mark.parametrize("why", ["another first step", "other precision", "no such checkpoint"])
def test_a_refused_fresh_run_leaves_no_folder(why: str, tmp_path: Path) -> None:
    with pytest.raises((TrainingError, DeviceError, CheckpointError)):
        build(tmp_path / "deep" / "run", **REFUSED[why])
    assert list(tmp_path.iterdir()) == []


def test_building_trainers_writes_nothing(tmp_path: Path) -> None:
    build(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    run = eight(tmp_path / "run")
    (run / ".lock").write_text("another process")
    before = snapshot(run)
    for resume in ("latest", "best", at_step(run, 4)):
        one = build(run, resume=resume)
        one.steps()  # not begun
        one.serve_requests()
    assert snapshot(run) == before


@pytest.mark.parametrize("where", ["data", "memory", "backward", "signal"])
def test_a_resume_broken_off_in_its_first_step_changes_nothing(where: str, tmp_path: Path) -> None:
    class Failing(Batches):
        def batch(self, step: int, batch_size: int, seed: int = 0) -> Any:
            if where == "data":
                raise ValueError("injected")
            if where == "memory":
                torch.empty(2**50)
            if where == "signal":
                signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
            return super().batch(step, batch_size, seed)

    def fail(_: Any) -> None:
        raise ValueError("injected")

    run = eight(tmp_path / "run")
    before, model = snapshot(run), tiny_model()
    one = Trainer(model, Failing(), None, LONGER, run, device="cpu", resume=at_step(run, 4))
    if where == "backward":
        model.tok_embeddings.weight.register_hook(fail)
    with pytest.raises((ValueError, TrainingError, KeyboardInterrupt)):
        one.fit()
    assert snapshot(run) == before


def test_a_resume_killed_in_its_first_step_changes_nothing(tmp_path: Path) -> None:
    run = eight(tmp_path / "run")
    before = snapshot(run)
    child = os.fork()
    if not child:  # the test's copy of this process, killed before it can clean up

        class Killing(Batches):
            def batch(self, step: int, batch_size: int, seed: int = 0) -> Any:
                os.kill(os.getpid(), signal.SIGKILL)

        Trainer(tiny_model(), Killing(), None, LONGER, run, device="cpu", resume=at_step(run, 4)).fit()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {**snapshot(run), ".lock": b""} == {**before, ".lock": b""}


@pytest.mark.parametrize(("at", "max_steps"), [(8, 8), (4, 4)])
def test_a_resume_without_steps_left_deletes_no_checkpoint(at: int, max_steps: int, tmp_path: Path) -> None:
    run = eight(tmp_path / "run")
    before = snapshot(run)
    fewer = LONGER.replace(max_steps=max_steps, keep_checkpoints=2)
    with pytest.warns(UserWarning, match="nothing is left to train"):
        build(run, config=fewer, resume=at_step(run, at)).fit()
    assert {**snapshot(run), ".lock": b""} == {**before, ".lock": b""}


def test_a_run_is_known_by_any_path_to_it_and_mixed_with_no_other(tmp_path: Path) -> None:
    run, other = eight(tmp_path / "run"), eight(tmp_path / "other")
    (tmp_path / "link").symlink_to(run)
    for one, two in ((run, tmp_path / "link"), (tmp_path / "link", run), (run, tmp_path / "other" / ".." / "run")):
        assert build(one, resume=at_step(two, 4)).step == 4
    (run / "metrics.jsonl").unlink()  # checkpoints make a run too
    with pytest.raises(TrainingError, match="is of another"):
        build(run, resume=at_step(other, 4))
    assert build(run, resume="latest").step == 8


# What a resume cuts off


def test_what_a_resume_cuts_off_is_set_aside_whole(tmp_path: Path) -> None:
    run = eight(tmp_path / "run")
    before, lines = snapshot(run), (run / "metrics.jsonl").read_bytes().split(b"\n")
    with pytest.warns(UserWarning, match=r"first 4 steps is kept as cut\.1\.\* \(lines of metrics\.jsonl: 4, check.*2"):
        next(steps := build(run, resume=at_step(run, 4)).steps())
    steps.close()
    assert [event["step"] for event in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert (run / "cut.1.metrics.jsonl").read_bytes() == b"\n".join(lines[4:])
    after = snapshot(run)
    for name in (name for name in before if name.startswith(("step=000006", "step=000008"))):
        assert after[f"cut.1.{name}"] == before[name] and name not in after
    assert read_config(find_checkpoint(run))["history"][-1]["set_aside"] == "cut.1"
    # the branch is the run: nothing of what was cut off is found, but all of it opens
    assert find_checkpoint(run).name.startswith("step=000005") and find_runs(tmp_path) == [run]
    [older] = run.glob("cut.1.step=000008*")
    assert load_checkpoint(older, device="cpu").step == 8
    with pytest.raises(TrainingError, match="is of another one; choose another output_dir"):
        build(run, resume=older)
    assert build(tmp_path / "other", resume=older).step == 8
    with pytest.warns(UserWarning, match=r"cut\.2\.\*"):
        build(run, resume=at_step(run, 2)).fit()
    assert [event["step"] for event in read_metrics(run)] == [*range(1, 13)]
    assert (run / "cut.1.metrics.jsonl").read_bytes() == b"\n".join(lines[4:])


def test_the_best_checkpoint_is_of_the_run_that_went_on(tmp_path: Path) -> None:
    config = quick(max_steps=6, eval_interval=1, checkpoint_interval=1, keep_checkpoints=9)
    trainer(tmp_path, config).fit()
    assert find_checkpoint(tmp_path, "best").name.startswith("step=000006")
    trainer(tmp_path, config.replace(learning_rate=1e-30), resume=at_step(tmp_path, 2)).fit()
    best = find_checkpoint(tmp_path, "best")
    assert read_config(best)["history"] or read_config(best)["step"] <= 2
    assert read_manifest(best)["loss"] == min(event["val_loss"] for event in read_metrics(tmp_path))  # type: ignore[index]


KILLED_WHILE_CUTTING = """
import json, shutil, sys, warnings
from pathlib import Path
from tests.kill import kill_at, survives
from tests.test_run_folder import LONGER, at_step, build, eight

warnings.simplefilter("ignore")
root = Path(sys.argv[1])
eight(root / "whole")
lines = (root / "whole" / "metrics.jsonl").read_bytes().split(b"\\n")
saved = {path.name for path in (root / "whole").glob("step=*")}
at, finished = 0, False

def cut():
    global steps  # not closed when this ends
    steps = build(run, resume=at_step(run, 4)).steps()
    kill_at(at)
    next(steps)

while not finished:
    at += 1
    run = shutil.copytree(root / "whole", root / f"run-{at}")
    finished = survives(cut)
    left_over = b"".join(file.read_bytes() for file in run.glob("*metrics.jsonl"))
    assert all(line in left_over for line in lines), (at, "a line is gone")
    assert saved <= {path.name.split(".", 2)[-1] if path.name[:3] == "cut" else path.name for path in run.iterdir()}, at
    resumed = build(run, resume="latest")
    assert resumed.step in (4, 8), at
    resumed.fit()
    steps = [json.loads(line)["step"] for line in open(run / "metrics.jsonl", "rb")]
    assert steps == [*range(1, 13)], (at, steps)
print(at)
"""


@pytest.mark.slow
def test_a_cut_killed_at_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    assert int(printed_by(KILLED_WHILE_CUTTING, tmp_path)) > 8


# Lines and torn lines


@MANY
@given(text=st.text(alphabet=st.characters() | st.sampled_from(SEPARATORS + "\ud800\udfff\n\r"), max_size=12))
def test_any_text_in_an_event_is_read_back_and_resumed(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    prompt = "".join(sign for sign in text if not "\ud800" <= sign <= "\udfff")  # a configuration refuses these
    for resume in (None, "latest"):
        config = quick(max_steps=4, sample_prompt=prompt)
        one = trainer(run, config, val=False, sampler=lambda prompt: prompt + text, resume=resume)
        one.request_sample("甲" + SEPARATORS + text)
        steps = one.steps()
        next(steps), next(steps)
        steps.close()
    events = read_metrics(run)
    assert [event["step"] for event in events] == [1, 2, 3, 4]
    assert [event.get("sample") for event in events[::2]] == ["甲" + SEPARATORS + text + text] * 2
    assert (run / "metrics.jsonl").read_bytes().count(b"\n") == 4
    for folder in (run, find_checkpoint(run)):
        assert read_run(folder)["train"]["sample_prompt"] == prompt


def test_the_readmes_sweep_reads_lines_with_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask.distributed")
    run = tmp_path / "outputs" / "runs" / "one"
    one = trainer(run, quick(sample_interval=1), sampler=lambda prompt: SEPARATORS)
    last = [*one.steps()][-1]
    program: dict[str, Any] = {"__name__": "sweep"}
    exec(example(), program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "true")  # the notebook has run already
    assert program["train"]("one", {}) == last["val_loss"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose events hold Chinese samples, stopped at step 6 of 8 with a checkpoint at 4."""
    run = tmp_path_factory.mktemp("sampled") / "run"
    config = quick(max_steps=8, sample_interval=1, eval_interval=4, checkpoint_interval=4, sample_prompt="曹操")
    steps = trainer(run, config, sampler=lambda prompt: "大軍" * 4).steps()
    for _ in range(6):
        next(steps)
    metrics = (run / "metrics.jsonl").read_bytes()
    steps.close()
    shutil.rmtree(at_step(run, 6))  # as if killed, not closed
    assert (run / "metrics.jsonl").read_bytes() == metrics
    return run


def go_on(run: Path) -> list[int]:
    """Resume a sampled run to its end; the steps in its metrics, read by hand."""
    config = quick(max_steps=8, sample_interval=1, eval_interval=4, checkpoint_interval=4, sample_prompt="曹操")
    trainer(run, config, sampler=lambda prompt: "大軍" * 4, resume="latest").fit()
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes()[:-1].split(b"\n")]


@MANY
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metrics_cut_at_any_byte_are_read_and_the_run_resumed(
    data: st.DataObject, sampled: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = shutil.copytree(sampled, tmp_path_factory.mktemp("torn") / "run")
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    fourth = len(b"\n".join(whole.split(b"\n")[:4]))  # what was saved with a checkpoint has reached the disk
    size = data.draw(st.integers(fourth, len(whole)))
    os.truncate(metrics, size)
    assert [event["step"] for event in read_metrics(run)] == [
        *range(1, 1 + sum(len(b"\n".join(whole.split(b"\n")[:n])) <= size for n in range(1, 7)))
    ]
    assert summarize([run]) and write_summary(run)
    assert go_on(run) == [*range(1, 9)]
    torn = whole[:size].split(b"\n")[4:]
    aside = b"".join(file.read_bytes() for file in run.glob("cut.*.metrics.jsonl"))
    assert all(part in aside for part in torn)


def test_a_torn_line_is_left_out_with_a_warning(sampled: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sampled, tmp_path / "run")
    whole = (run / "metrics.jsonl").read_bytes()
    os.truncate(run / "metrics.jsonl", whole.rindex("軍".encode()) + 1)  # inside a character
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: left out 1 lines that are no whole events"):
        assert [event["step"] for event in read_metrics(run)] == [1, 2, 3, 4, 5]


ODD = [b"null", b"3", b"[]", b'"step"', b'{"step": 4}', b'{"step": "4", "loss": 1}', b"\xff\xfe", b"{" * 10**5, b"\x00"]
ODD += [b"[" * 10**5, b'{"step": 9' + b"9" * 5000 + b"}", b"", b" ", b'{"step": true, "tokens": 1}']


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_reader_fails_over_a_line_that_is_no_event(odd: bytes, sampled: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sampled, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(b"\n".join([lines[0], odd, *lines[1:]]))
    events = read_metrics(run)
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert plots.training_curves(events) and plots.compare_runs([run]) and write_summary(run) and summarize([run])
    assert go_on(run) == [*range(1, 9)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_events_on_one_line_are_found(sampled: Path, tmp_path: Path) -> None:
    """Newlines may be what a crash has lost."""
    run = shutil.copytree(sampled, tmp_path / "run")
    metrics = run / "metrics.jsonl"
    events, line = read_metrics(run), metrics.read_bytes().replace(b"\n", b"")
    metrics.write_bytes(line[:40] + line)
    with pytest.warns(UserWarning, match="left out 1 lines"):
        assert read_metrics(run) == events


def test_an_event_glued_to_a_torn_line_is_found(sampled: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sampled, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(b"\n".join([lines[0], lines[1][:-30] + lines[1], *lines[2:-1]]))  # no end
    assert [event["step"] for event in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert go_on(run) == [*range(1, 9)]


def test_what_a_callback_adds_does_not_cost_the_event(tmp_path: Path) -> None:
    def add(event: Event) -> None:
        event |= {"sample": 7, "val_loss": "low", "tensor": torch.ones(1), "odd": {1: {2}}}

    trainer(tmp_path, quick(max_steps=3), callbacks=[add]).fit()
    events = read_metrics(tmp_path)
    assert [event["step"] for event in events] == [1, 2, 3]
    assert summarize([tmp_path]) and plots.training_curves(events) and write_summary(tmp_path)


def test_a_full_disk_tears_no_line_and_no_event_is_lost(tmp_path: Path) -> None:
    """The system itself cuts the write short, in the middle of a line."""
    straight = trainer(tmp_path / "a", quick()).fit()
    one = trainer(tmp_path / "b", quick())
    steps = one.steps()
    next(steps), next(steps)
    metrics = tmp_path / "b" / "metrics.jsonl"
    before, limits = metrics.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written: .*Make room"):
            next(steps)
        assert metrics.read_bytes() == before and not checkpoints(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    result = one.fit()
    assert straight.checkpoint and result.checkpoint
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert_same_tensors(state(straight.checkpoint), state(result.checkpoint))


def test_a_last_save_that_failed_is_made_when_there_is_room(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick(max_steps=4, checkpoint_interval=2), val=False)
    steps = one.steps()
    next(steps), next(steps), next(steps)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            next(steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_checkpoint(tmp_path).name.startswith("step=000002") and len(read_metrics(tmp_path)) == 4
    result = one.fit()
    assert result.checkpoint and result.checkpoint.name.startswith("step=000004")
    assert_same_tensors(weights(one.model), weights(load_checkpoint(tmp_path, device="cpu").model))


def test_metrics_are_on_the_disk_before_their_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, rename = os.fsync, os.rename
    synced: dict[int, int] = {}
    saved: list[str] = []

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def checking(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step="):
            metrics = (tmp_path / "metrics.jsonl").stat()
            assert synced.get(metrics.st_ino) == metrics.st_size
            saved.append(Path(target).name[:11])
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "rename", checking)
    steps = trainer(tmp_path, quick(checkpoint_interval=2)).steps()
    for _ in range(5):
        next(steps)
    steps.close()
    assert saved == ["step=000002", "step=000004", "step=000005"]


# The data's tokenizer


@pytest.mark.parametrize(("train", "val"), [("other", "ours"), ("ours", "other"), ("other", "other"), ("other", None)])
def test_data_of_another_tokenizer_are_refused(train: str, val: str | None, english: Path, tmp_path: Path) -> None:
    tok = train_tokenizer(sorted(english.glob("*.txt")), tmp_path / "t", 320, character_coverage=1.0)
    made = {"ours": tok.fingerprint, "other": "0" * 64}
    data, unseen = Made(made[train]), Made(made[val]) if val else None
    model = tiny_model(vocab_size=tok.vocab_size)
    with pytest.raises(TrainingError, match=f"another tokenizer.*{tok.fingerprint[:16]}.*prepare the data again"):
        Trainer(model, data, unseen, quick(), tmp_path / "run", tokenizer=tok, device="cpu")
    assert not (tmp_path / "run").exists()
    Trainer(model, Made(tok.fingerprint), Batches(), quick(), tmp_path / "run", tokenizer=tok, device="cpu")


def test_splits_of_two_preparations_are_refused(english: Path, tmp_path: Path) -> None:
    """Two tokenizers of one size; the second data set replaces the first while a run opens it."""
    texts = sorted(english.glob("*.txt"))
    toks = [
        train_tokenizer(chosen, tmp_path / name, 300, character_coverage=1.0)
        for name, chosen in (("a", texts[:2]), ("b", texts[2:]))
    ]
    assert toks[0].fingerprint != toks[1].fingerprint and toks[0].vocab_size == toks[1].vocab_size
    prepare_dataset(english, toks[0], tmp_path / "data", 0.4, progress=False)
    train = TokenDataset(tmp_path / "data", "train", 12)
    prepare_dataset(english, toks[1], tmp_path / "data", 0.4, progress=False)
    val = TokenDataset(tmp_path / "data", "val", 12)
    for tok in (None, *toks):
        with pytest.raises(TrainingError, match="the data were made with another tokenizer"):
            Trainer(tiny_model(vocab_size=300), train, val, quick(), tmp_path / "r", tokenizer=tok, device="cpu")


# Two trainers, one folder


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("how_far", ["to the end", "one step"])
def test_of_two_trainers_built_on_one_folder_only_one_trains(resumed: bool, how_far: str, tmp_path: Path) -> None:
    run = eight(tmp_path) if resumed else tmp_path
    one, other, again = (build(run, resume=at_step(run, 4) if resumed else None) for _ in range(3))
    steps = one.steps()
    next(steps)
    if how_far == "to the end":
        list(steps)
    steps.close()
    before = snapshot(run)
    for late in (other, again, other):
        with pytest.raises(TrainingError, match=r"has gone on since this Trainer, at step \d, was.*resume='latest'"):
            late.fit()
        with pytest.raises(TrainingError, match="has gone on since"):
            asyncio.run(TrainingDashboard().run(late))
    assert snapshot(run) == before
    assert build(run, resume="latest").fit().step == 12
    assert [event["step"] for event in read_metrics(run)] == [*range(1, 13)]


def test_a_finished_first_half_pressed_again_changes_nothing(tmp_path: Path) -> None:
    half = trainer(tmp_path, quick(), callbacks=[lambda e: half.request_stop() if e["step"] == 3 else None])
    asyncio.run(TrainingDashboard().run(half))
    assert half.result().stopped_early
    asyncio.run(TrainingDashboard().run(trainer(tmp_path, quick(), resume="latest")))
    before = snapshot(tmp_path)
    with pytest.raises(TrainingError, match="has gone on since this Trainer, at step 3"):
        asyncio.run(TrainingDashboard().run(half))
    assert snapshot(tmp_path) == before


def test_a_trainer_that_was_stopped_goes_on_as_often_as_asked(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick(max_steps=9))
    one.callbacks.append(lambda event: one.request_stop() if event["step"] in (2, 3, 7) else None)
    rebuilt = trainer(tmp_path, quick(max_steps=9))  # the cell was run twice: the object before does not matter
    assert rebuilt.step == 0
    assert [one.fit().step for _ in range(4)] == [2, 3, 7, 9]
    assert [event["step"] for event in read_metrics(tmp_path)] == [*range(1, 10)]


def test_one_trainer_in_two_threads_trains_once(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick(max_steps=8))
    steps = one.steps()
    next(steps)
    one.request_stop()
    refused: list[str] = []

    def second() -> None:
        try:
            one.fit()
        except TrainingError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(refused) == 1 and "in use by a run" in refused[0]
    assert [*steps] == [] and one.result().stopped_early  # the stop was not forgotten
    assert [event["step"] for event in read_metrics(tmp_path)] == [1]


# One label, one meaning


@MANY
@given(stop=st.integers(1, 9), eval_interval=st.sampled_from([0, 2, 4]))
def test_a_checkpoints_name_is_the_loss_of_its_own_step(
    stop: int, eval_interval: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    one = trainer(run, quick(max_steps=9, eval_interval=eval_interval), val=bool(eval_interval))
    one.callbacks.append(lambda event: one.request_stop() if event["step"] == stop else None)
    one.fit()
    events = read_metrics(run)
    validated = [event for event in events if "val_loss" in event]
    path = find_checkpoint(run)
    config, manifest, words = read_config(path), read_manifest(path) or {}, loss_in_words(read_config(path))
    row, known = summarize([run])[0], validated[-1] if validated else {}
    if "val_loss" in events[-1]:
        assert path.name == f"step={stop:06d}_loss={known['val_loss']:.3f}"
        assert config["loss_of"] == manifest["loss_of"] == "validation" and config["loss"] == known["val_loss"]
        assert row["validation (nats per token)"] == f"{known['val_loss']:.3f}"
        assert words == f"{known['val_loss']:.3f} nats per token on held-out text"
    else:
        assert path.name == f"step={stop:06d}_train_loss={events[-1]['loss']:.3f}"
        assert config["loss_of"] == manifest["loss_of"] == "training" and config["loss"] == events[-1]["loss"]
        at = f"{known['val_loss']:.3f} at step {known['step']}" if known else "–"
        assert row["validation (nats per token)"] == at
        assert words.startswith(f"{events[-1]['loss']:.3f} nats per token in")
        assert (f"at step {known['step']}, {known['val_loss']:.3f}" if known else "not validated") in words
        bits = row["bits per byte"]
        assert bits == (f"{known['val_bits_per_byte']:.3f} at step {known['step']}" if known else "–")
    assert (config["val_loss"], config["val_step"]) == (known.get("val_loss"), known.get("step"))
    card = model_card(load_checkpoint(path, device="cpu"), events, "name")
    if not known:
        assert f"| training loss | {events[-1]['loss']:.4f} nats per token |" in card
    else:
        at = "" if known["step"] == stop else f" at step {known['step']}"
        assert f"| validation loss | {known['val_loss']:.4f} nats per token{at} |" in card
    assert row["validation (nats per token)"] in write_summary(run).read_text(encoding="utf-8")


def test_the_card_of_a_checkpoint_set_aside_says_nothing_of_the_run(tmp_path: Path) -> None:
    """The run has gone on from an earlier step without it: validations and curves are now another branch's."""
    run, config = tmp_path / "run", quick(max_steps=6, checkpoint_interval=2, keep_checkpoints=9)
    trainer(run, config).fit()
    loss = read_config(at_step(run, 4))["loss"]
    trainer(run, config.replace(eval_interval=1), resume=at_step(run, 2)).fit()
    [aside] = run.glob("cut.1.step=000004*")
    write_card(load_checkpoint(aside, device="cpu"), tmp_path, "name")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| training loss | {loss:.4f} nats per token |" in card and "validation loss" not in card
    assert "training.png" not in card and not (tmp_path / "training.png").exists()


def test_a_validation_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    def spoil(event: Event) -> None:
        event |= {"val_loss": math.nan} if event["step"] == 2 else {}

    trainer(tmp_path, quick(eval_interval=2), callbacks=[spoil]).fit()
    assert summarize([tmp_path])[0]["best"] == f"{read_metrics(tmp_path)[-1]['val_loss']:.3f}"


def test_the_dashboard_says_of_which_step_a_validation_is(tmp_path: Path) -> None:
    one, board = trainer(tmp_path, quick(eval_interval=4)), TrainingDashboard()
    one.callbacks.append(lambda event: one.request_stop() if event["step"] == 5 else None)
    asyncio.run(board.run(one))
    said = run_status(board._validated | board.events[-1], one, 0.0)
    assert said["validation"] == f"{board.events[3]['val_loss']:.3f} at step 4"
    assert (
        run_status(board._validated | board.events[3], one, 0.0)["validation"] == f"{board.events[3]['val_loss']:.3f}"
    )


def test_best_compares_validations_where_there_are_any(tmp_path: Path) -> None:
    def save(run: str, step: int, loss: float, of: str) -> Path:
        return save_checkpoint(tmp_path / run, tiny_model(), None, step=step, loss=loss, loss_of=of)

    save("a", 1, 1.0, "training")
    best = save("a", 2, 3.0, "validation")
    save("a", 3, 4.0, "validation"), save("a", 4, math.nan, "validation"), save("a", 5, 0.5, "training")
    assert find_checkpoint(tmp_path / "a", "best") == best
    best = save("b", 1, 1.0, "training")
    save("b", 2, 2.0, "training"), save("b", 3, math.nan, "validation")
    assert find_checkpoint(tmp_path / "b", "best") == best


def test_a_checkpoint_that_does_not_say_loss_of_still_opens(tmp_path: Path) -> None:
    """As they were written before: no loss_of, no val_step, and the loss of an older validation."""
    steps = trainer(tmp_path / "run", quick(eval_interval=2)).steps()
    events = [next(steps) for _ in range(3)]
    steps.close()
    new = find_checkpoint(tmp_path / "run")
    path = new.rename(new.with_name(f"step=000003_loss={events[1]['val_loss']:.3f}"))
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("config.json", "trainer_state.json"):
        content = json.loads((path / name).read_text())
        content = {k: v for k, v in content.items() if k not in ("loss_of", "val_step")}
        if name == "config.json":
            content["loss"] = events[1]["val_loss"]
            del content["val_loss"]
        (path / name).write_text(json.dumps(content))
        manifest["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    manifest["loss"] = events[1]["val_loss"]
    del manifest["loss_of"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert find_checkpoint(tmp_path / "run", "best").name.endswith(f"_loss={events[1]['val_loss']:.3f}")
    assert loss_in_words(load_checkpoint(path, device="cpu").config).startswith(f"{events[1]['val_loss']:.3f} nats")
    straight = trainer(tmp_path / "straight", quick(eval_interval=2)).fit()
    result = trainer(tmp_path / "run", quick(eval_interval=2), tiny_model(4), resume="latest").fit()
    assert straight.checkpoint and result.checkpoint and straight.checkpoint.name == result.checkpoint.name
    assert_same_tensors(state(straight.checkpoint), state(result.checkpoint))


# Nothing unfit is saved


@pytest.mark.parametrize("where", ["data", "backward", "memory"])
def test_a_first_step_that_fails_saves_nothing(where: str, tmp_path: Path) -> None:
    class Failing(Batches):
        broken = True

        def batch(self, step: int, batch_size: int, seed: int = 0) -> Any:
            if self.broken and where != "backward":
                torch.empty(2**50) if where == "memory" else [].pop()
            return super().batch(step, batch_size, seed)

    data, model = Failing(), tiny_model()
    one = Trainer(model, data, None, quick(), tmp_path / "run", device="cpu")
    one.request_save()
    one.serve_requests()  # asked for before there is anything to keep
    if where == "backward":
        model.norm.weight.register_hook(lambda gradient: [].pop() if data.broken else gradient)
    with pytest.raises((TrainingError, IndexError)):
        one.fit()
    assert checkpoints(tmp_path / "run") == [] and find_runs(tmp_path) == []
    data.broken = False
    assert one.fit().step == 6  # the same trainer, or a new one, goes on in the same folder
    assert [event["step"] for event in read_metrics(tmp_path / "run")] == [*range(1, 7)]


@pytest.mark.parametrize("at", [2, 6])
@pytest.mark.parametrize("by", ["callback", "update"])
def test_weights_that_are_not_finite_are_not_saved(by: str, at: int, tmp_path: Path) -> None:
    model = tiny_model()

    def spoil(event: Event) -> None:
        if by == "callback" and event["step"] == at:
            with torch.no_grad():
                model.layers[0].feed_forward.w1.weight[0, 0] = math.inf

    one = trainer(tmp_path, quick(max_skipped_steps=9, checkpoint_interval=1), model, val=False, callbacks=[spoil])
    update = one.optimizers[-1].step

    def overflow(*options: Any, **more: Any) -> Any:
        done = update(*options, **more)
        if by == "update" and one.step + 1 == at:
            with torch.no_grad():
                model.layers[0].feed_forward.w1.weight[0, 0] = -math.inf
        return done

    one.optimizers[-1].step = overflow  # type: ignore[method-assign]
    with pytest.warns(
        UserWarning, match=rf"step 6 is not saved: its weights are not finite\. Last.*step=00000{at - 1}"
    ):
        one.fit()
    assert find_checkpoint(tmp_path).name.startswith(f"step=00000{at - 1}")
    for path in checkpoints(tmp_path):
        assert all(
            bool(tensor.isfinite().all()) for tensor in weights(load_checkpoint(path, device="cpu").model).values()
        )


# Where a resume starts


def test_fewer_steps_than_taken_are_refused_with_both_numbers(tmp_path: Path) -> None:
    run = eight(tmp_path)
    before = snapshot(run)
    with pytest.raises(TrainingError, match="max_steps=4, but the run has reached step 8; raise max_steps"):
        build(run, config=LONGER.replace(max_steps=4), resume="latest")
    with pytest.warns(
        UserWarning, match="nothing is left to train: the run is at step 8 of max_steps=8; raise max_steps"
    ):
        result = build(run, config=LONGER.replace(max_steps=8, learning_rate=1.0), resume="latest").fit()
    assert result.step == 8 and not result.stopped_early
    assert snapshot(run) == before and summarize([run])[0]["steps"] == "8 of 8"


class Noting(Batches):
    """Which windows were read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def window(self, number: int, seed: int) -> Any:
        if seed < 10**6:
            self.read.append(number)
        return super().window(number, seed)


@MANY
@given(before=st.tuples(st.integers(1, 4), st.integers(1, 3)), after=st.tuples(st.integers(1, 4), st.integers(1, 3)))
def test_a_resume_says_which_windows_it_misses_or_reads_again(
    before: tuple[int, int], after: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run, data = tmp_path_factory.mktemp("run"), Noting()
    for number, (batch_size, parts) in enumerate((before, after)):
        config = quick(max_steps=3 * (number + 1), batch_size=batch_size, grad_accum_steps=parts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one = Trainer(tiny_model(), data, None, config, run, device="cpu", resume="latest" if number else None)
            one.fit()
    said = " ".join(str(warning.message) for warning in caught)
    twice = len(data.read) - len(set(data.read))
    never = max(data.read) + 1 - len(set(data.read))
    found = [int(n) for n in re.findall(r"(\d+) windows are (?:read twice|never read)", said)]
    assert found == [n for n in (3 * math.prod(before) - 3 * math.prod(after), 0) if n > 0] or found == [never]
    assert bool(found) == bool(never or math.prod(before) > math.prod(after))
    assert not never or f"{never} windows are never read" in said
    assert twice <= sum(found)
    history = json.loads((run / "config.json").read_text())["history"]
    assert ("data" in history[-1]) == bool(found) and str(history[-1].get("data", "")) in said


def test_a_resume_with_another_seed_says_so(tmp_path: Path) -> None:
    trainer(tmp_path, quick(max_steps=2)).fit()
    with pytest.warns(UserWarning, match="seed was 0 and is 1: from step 2 on the windows come in another order"):
        trainer(tmp_path, quick(seed=1), resume="latest")
