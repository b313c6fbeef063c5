"""Runs that nobody watches: a copy on another drive, full disks, drives without locks, `checkpoint_dir="auto"`."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import llmcore.files
from llmcore.checkpoint import CheckpointError, checkpoints, find_checkpoint, has_state, load_checkpoint
from llmcore.config import PRESETS, preset
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.measure.disk import check_disk
from llmcore.measure.planner import plan
from llmcore.notebook.dashboard import run_status
from llmcore.notebook.toy_reverse import ReverseData
from llmcore.runs import TrainingError, read_metrics
from llmcore.train import Event, Trainer
from llmcore.trainer_state import auto_start

from .helpers import (
    ROOT,
    Batches,
    assert_same_tensors,
    numbers,
    printed_by,
    quick,
    state,
    tiny_config,
    tiny_model,
    trainer,
)
from .kill import kill_at, survives

NIGHT = quick(max_steps=12, checkpoint_interval=2, eval_interval=3, optimizer="muon")


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees the warnings that a process gives once."""
    monkeypatch.setattr(llmcore.files, "_warned", set())


def night(run: Path, seed: int = 0, backup: Path | None = None, stop: int = 0, **changes: Any) -> Trainer:
    """Train a run as `auto` does, a resumed one from other weights, which must not matter; returns the trainer."""
    start = auto_start(run, backup)
    model = tiny_model(seed if start else 0)
    one = trainer(run, NIGHT.replace(**changes), model, resume=start, backup_dir=backup)
    one.callbacks.append(lambda event: one.request_stop() if event["step"] == stop else None)
    one.fit()
    return one


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def everything(run: Path) -> dict[str, Any]:
    """What a run is, without what the clock says: its checkpoints' tensors, which still have a state, its metrics."""
    saved = checkpoints(run)
    return {
        "checkpoints": [(path.name, has_state(path)) for path in saved],
        "tensors": {name: tensor.numpy().tobytes() for name, tensor in state(saved[-1]).items()},
        "metrics": numbers(run),
    }


# What is kept


def best_then_worse(run: Path) -> Path:
    """A run whose best checkpoint is its second, with four steps after it; returns the best one."""
    config = quick(max_steps=6, eval_interval=1, checkpoint_interval=1, learning_rate=1e-2)
    one = trainer(run, config)
    one.callbacks.append(lambda event: event.update(event))
    steps = one.steps()
    next(steps), next(steps)
    for group in (group for optimizer in one.optimizers for group in optimizer.param_groups):
        group["weight_decay"] = -3000.0  # weights that only grow: each later step is worse
    list(steps)
    return find_checkpoint(run, "best")


def test_the_best_checkpoint_gives_up_its_state_and_still_writes(tmp_path: Path) -> None:
    best = best_then_worse(tmp_path / "run")
    saved = checkpoints(tmp_path / "run")
    assert [path.name[:11] for path in saved] == ["step=000002", "step=000005", "step=000006"] and best == saved[0]
    assert [has_state(path) for path in saved] == [False, True, True]
    assert names(best) == ["config.json", "manifest.json", "model.safetensors"]
    assert load_checkpoint(best, device="cpu").step == load_checkpoint(tmp_path / "run", "best", device="cpu").step == 2
    held = [load_file(file) for path in saved for file in path.glob("*.safetensors")]
    sizes = [(name, tensor.nbytes) for tensors in held for name, tensor in tensors.items()]
    counted = sum(size for name, size in sizes if name != "rng.cpu" and not name.endswith("/step"))
    assert counted == plan(tiny_config(), quick(), "cpu").disk
    said = rf"holds a model, but not the optimizer's state: .*The newest one there that has it: .*{saved[-1].name}"
    for resume in ("best", best):
        with pytest.raises(CheckpointError, match=said):
            trainer(tmp_path / "run", quick(max_steps=9), resume=resume)
    assert trainer(tmp_path / "run", quick(max_steps=9), resume="latest").step == 6


def test_a_state_that_nobody_deleted_is_still_damage_when_it_is_missing(tmp_path: Path) -> None:
    path = trainer(tmp_path, quick(max_steps=1)).fit().checkpoint
    assert path
    (path / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is missing"):
        load_checkpoint(path)


def test_a_disk_too_small_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train = preset("scifi-1.5B")
    usage = shutil.disk_usage(tmp_path)
    # 4 bytes a weight and 8 for AdamW: two whole checkpoints, the best one's weights, and one more while it is written
    parameters = model.n_params()
    kept, written = (2 * 12 + 4) * parameters, 12 * parameters
    assert plan(model, train, "cpu").disk == kept
    for free, fits in ((kept + written, True), (kept + written - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            check_disk(model, train, "cpu", tmp_path / "run")
            continue
        with pytest.raises(
            TrainingError, match=r"output_dir=.* needs 60\.2 GB \(it keeps 42\.1 GB, .*optimizer='muon'"
        ):
            check_disk(model, train, "cpu", tmp_path / "run")
    # what the run has already counts, and a full backup is a warning
    (tmp_path / "run" / "step=000001_loss=1.000").mkdir(parents=True)
    (tmp_path / "run" / "step=000001_loss=1.000" / "model.safetensors").write_bytes(b"1")
    with pytest.warns(UserWarning, match="backup_dir=.* has too little room"):
        check_disk(model, train, "cpu", tmp_path / "run", tmp_path / "drive")


# When it is saved and validated


def test_minutes_save_as_well_as_steps_and_change_nothing_else(tmp_path: Path) -> None:
    config = quick(max_steps=6, checkpoint_interval=4, keep_checkpoints=9, schedule="plateau", eval_interval=2)
    steps = {}
    for minutes in (0, 1e-9, 1e6):
        run = tmp_path / str(minutes)
        events = list(trainer(run, config.replace(checkpoint_minutes=minutes), val=False).steps())
        steps[minutes] = [event["step"] for event in events if "checkpoint" in event]
        assert all(event["checkpoint_seconds"] > 0 for event in events if "checkpoint" in event)
        assert numbers(run) == numbers(tmp_path / "0")
        assert_same_tensors(state(find_checkpoint(run)), state(find_checkpoint(tmp_path / "0")))
    assert steps == {0: [4, 6], 1e-9: [1, 2, 3, 4, 5, 6], 1e6: [4, 6]}


def test_a_slow_save_shows_its_seconds(tmp_path: Path) -> None:
    one = trainer(tmp_path, quick(max_steps=1))
    event: Event = next(iter(one.steps()))
    assert "saved in" not in run_status({**event, "checkpoint_seconds": 0.9}, one, 0.0)
    assert run_status({**event, "checkpoint_seconds": 42.3}, one, 0.0)["saved in"] == "42 s"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_validates_two_percent_of_the_time_at_most(name: str) -> None:
    train = preset(name)[1]
    batches = train.validation_batches
    assert batches > 0
    assert batches / 3 <= 0.02 * train.eval_interval * train.grad_accum_steps
    assert train.replace(eval_interval=0).validation_batches == 0  # the only one, at the end, reads all
    assert train.replace(eval_interval=train.max_steps).validation_batches == 0
    assert train.replace(eval_batches=0).validation_batches == 0
    assert train.replace(eval_batches=7).validation_batches == 7


def test_the_default_runs_validate_on_their_whole_split() -> None:
    """Of scifi-mini's corpus: 33,444 tokens, see notebook 4. Then its curve is of one text, and so is the toy's."""
    mini, toy = preset("scifi-mini")[1], preset("toy-reverse")[1]
    assert mini.validation_batches * mini.batch_size * 256 >= 33_444
    assert toy.validation_batches >= ReverseData().val_batches


def test_few_validation_batches_are_spread_over_the_split(tmp_path: Path) -> None:
    model, data = tiny_model(std=0.2), Batches(windows=40)
    one = Trainer(model, data, data, quick(eval_interval=1, eval_batches=4, max_steps=2), tmp_path, device="cpu")
    read: list[int] = []
    batches = [x.tolist() for x, _ in data.sequential(4)]
    model.register_forward_pre_hook(lambda _, args: read.append(batches.index(args[0].tolist())))
    one.validate(4)
    assert read == [0, 3, 6, 9]
    read.clear()
    one.validate()
    assert read == list(range(10))


# A copy on another drive


def test_the_copy_is_as_the_run_after_each_save(tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    one = trainer(tmp_path / "run", NIGHT, backup_dir=tmp_path / "drive")
    for event in one.steps():
        if "checkpoint" not in event:
            continue
        run, copy = tmp_path / "run", tmp_path / "drive" / "run"
        assert names(copy) == names(run)
        for path in (path for path in run.rglob("*") if path.is_file() and path.name != ".lock"):
            assert (copy / path.relative_to(run)).read_bytes() == path.read_bytes(), path
    assert [has_state(path) for path in checkpoints(tmp_path / "drive" / "run")][-2:] == [True, True]


def test_a_lost_folder_goes_on_from_its_copy_as_if_never_lost(tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    night(tmp_path / "straight")
    night(tmp_path / "run", backup=tmp_path / "drive", stop=7)
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"run was lost, and is taken from .*drive"):
        night(tmp_path / "run", 5, backup=tmp_path / "drive")
    assert everything(tmp_path / "run") == everything(tmp_path / "straight")
    assert everything(tmp_path / "drive" / "run") == everything(tmp_path / "straight")
    # an older folder of the same run, on a machine where it was left behind
    shutil.rmtree(tmp_path / "run")
    night(tmp_path / "run", backup=tmp_path / "drive", max_steps=14)
    shutil.copytree(tmp_path / "run", tmp_path / "behind")
    night(tmp_path / "run", backup=tmp_path / "drive", max_steps=16)
    shutil.rmtree(tmp_path / "run"), (tmp_path / "behind").rename(tmp_path / "run")
    with pytest.warns(UserWarning, match="set-aside-1"):
        assert night(tmp_path / "run", 6, backup=tmp_path / "drive", max_steps=17).step == 17
    assert [event["step"] for event in read_metrics(tmp_path / "run")] == list(range(1, 18))
    assert read_metrics(tmp_path / "run.set-aside-1")[-1]["step"] == 14


def test_a_faulty_drive_is_said_once_and_training_goes_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")  # Python itself would show the same words once
    (tmp_path / "drive").mkdir()
    one = trainer(tmp_path / "run", NIGHT, backup_dir=tmp_path / "drive")

    def unplug(event: Event) -> None:
        if event["step"] == 3:
            (tmp_path / "drive").rename(tmp_path / "away")
        if event["step"] == 9:
            (tmp_path / "away").rename(tmp_path / "drive")

    one.callbacks.append(unplug)
    assert not one.fit().stopped_early
    [warning] = [str(warning.message) for warning in recwarn if "backup_dir" in str(warning.message)]
    assert "is not up to date" in warning and "No such file" in warning
    assert everything(tmp_path / "drive" / "run") == everything(tmp_path / "run")  # it has caught up


@pytest.mark.parametrize("why", ["is not there", "own output_dir", "holds another run"])
def test_a_backup_that_cannot_be_is_refused_before_anything(why: str, tmp_path: Path) -> None:
    backup = {"is not there": tmp_path / "no", "own output_dir": tmp_path, "holds another run": tmp_path / "drive"}[why]
    if why == "holds another run":
        trainer(tmp_path / "drive" / "run", quick(max_steps=1)).fit()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TrainingError, match=f"backup_dir.*{why}"):
        trainer(tmp_path / "run", NIGHT, backup_dir=backup)
    assert sorted(tmp_path.rglob("*")) == before


KILLED_WHILE_COPYING = """
import sys
from pathlib import Path
from llmcore.checkpoint import back_up, checkpoints, prune_checkpoints, verify_checkpoint
from tests.kill import kill_at, survives
from tests.test_checkpoint import save

run, copy, at, finished = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "copy", 0, False
for step in (1, 2, 3):
    save(run, step=step, loss=float(step))
(run / "metrics.jsonl").write_text("old"), (run / "config.json").write_text("old")
back_up(run, copy)
(run / "metrics.jsonl").write_text("new")
save(run, step=4)
prune_checkpoints(run, 2)

def bring_up_to_date():
    kill_at(at)
    back_up(run, copy)

while not finished:
    at += 1
    finished = survives(bring_up_to_date)
    steps = [path.name[5:11] for path in checkpoints(copy)]
    assert steps[-1] in ("000003", "000004") and "000001" in steps, steps
    for path in checkpoints(copy):
        verify_checkpoint(path)
    assert (copy / "metrics.jsonl").read_text() in ("old", "new")
    print(at, steps[-1])
assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in run.iterdir()), list(copy.iterdir())
for path in run.rglob("*"):
    assert path.is_dir() or (copy / path.relative_to(run)).read_bytes() == path.read_bytes(), path
"""


@pytest.mark.slow
def test_a_copy_killed_anywhere_is_whole_and_catches_up(tmp_path: Path) -> None:
    kills = [line.split() for line in printed_by(KILLED_WHILE_COPYING, tmp_path).splitlines()]
    assert len(kills) > 20 and kills[0][1] == "000003" and kills[-1][1] == "000004"


# Drives without locks, and files that cannot be flushed


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_a_drive_that_refuses_locks_and_fsync_is_a_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    night(tmp_path / "run", stop=7)
    night(tmp_path / "run", 3)
    said = [str(warning.message) for warning in recwarn if os.strerror(code) in str(warning.message)]
    assert len(said) == 2 and "only one run at a time" in said[0] and "power cut" in said[1]
    monkeypatch.undo()
    night(tmp_path / "straight")
    assert everything(tmp_path / "run") == everything(tmp_path / "straight")


def test_any_other_fault_of_a_flush_still_ends_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises((CheckpointError, TrainingError), match="Input/output error"):
        trainer(tmp_path, quick(max_steps=1)).fit()


# auto


def test_auto_starts_goes_on_and_shows_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert auto_start(run) is None and list(tmp_path.iterdir()) == []
    night(run, stop=5)
    assert auto_start(run) == find_checkpoint(run)
    night(run, 4)
    with pytest.warns(UserWarning, match="nothing is left to train"):
        assert night(run, 9).step == 12
    night(tmp_path / "straight")
    assert everything(run) == everything(tmp_path / "straight")
    # of what an ordinary resume refuses, nothing is let through
    with pytest.raises(CheckpointError, match="belongs to another run"):
        trainer(run, NIGHT, tiny_model(hidden_dim=64), resume=auto_start(run))


def test_auto_sets_a_run_without_a_checkpoint_aside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = trainer(run, NIGHT).steps()
    next(steps)
    killed = (run / "metrics.jsonl").read_bytes()  # as a kill would leave it: its only checkpoint is never made
    steps.close()
    for path in checkpoints(run):
        shutil.rmtree(path)
    for number in (1, 2):
        with pytest.warns(UserWarning, match=rf"holds a run without a checkpoint.*now .*run\.set-aside-{number}"):
            assert auto_start(run) is None
        assert (tmp_path / f"run.set-aside-{number}" / "metrics.jsonl").read_bytes() == killed
        shutil.copytree(tmp_path / "run.set-aside-1", run)
    night_before = checkpoints(run)
    assert night_before == []


def test_auto_passes_over_damage_and_leaves_a_busy_folder_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    night(run, stop=7)
    older, newest = [path for path in checkpoints(run) if has_state(path)][-2:]
    (newest / "model.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match=f"passed over: .*{newest.name}"):
        assert auto_start(run) == older
    steps = trainer(tmp_path / "busy", NIGHT).steps()
    next(steps)
    with pytest.raises(TrainingError, match="in use by a run of process"):
        auto_start(tmp_path / "busy")
    steps.close()


def test_auto_refuses_two_runs_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    night(tmp_path / "run", stop=5), night(tmp_path / "drive" / "run", stop=3)
    with pytest.raises(TrainingError, match="holds another run than"):
        auto_start(tmp_path / "run", tmp_path / "drive")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_auto_killed_three_times_ends_as_never_killed(lost: bool, tmp_path: Path) -> None:
    """At file operations: of a save, of the copy, while the lost folder is taken from the copy."""
    run, drive = tmp_path / "run", tmp_path / "drive"
    drive.mkdir(), (tmp_path / "other").mkdir()
    night(tmp_path / "straight", backup=tmp_path / "other")
    kills = 0
    for at in (260, 150, 330, 0):
        if kills and lost:
            shutil.rmtree(run, ignore_errors=True)  # the machine is another one

        def train(at: int = at) -> None:
            kill_at(at)
            night(run, at, backup=drive)

        kills += not survives(train)
    assert kills == 3
    assert everything(run) == everything(drive / "run") == everything(tmp_path / "straight")


def notebook_4(root: Path, project: str, backup: Path) -> subprocess.Popen[str]:
    """Notebook 4 at a tiny size, through papermill, with auto."""
    tiny = {"max_steps": 60, "context_size": 16, "batch_size": 1, "dim": 12, "n_layers": 1, "thorough": False}
    tiny |= {"tokens_per_step": 256}  # a step of some 20 ms, so that a kill comes before the last one
    given = {"checkpoint_dir": "auto", "checkpoint_interval": 10, "device": "cpu", "backup_dir": backup}
    given |= {"data_dir": root / "texts", "tokenizer_model_file": root / "tokenizer.model", "prompt": "The "}
    options = [word for key, value in {**tiny, **given, "project": project}.items() for word in ("-p", key, str(value))]
    notebook, made = ROOT / "notebooks" / "04_scifi_train.ipynb", root / f"{project}.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(made), *options]
    environment = {**os.environ, "LLM_WORKBOOK_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def kill_with_kernel(process: subprocess.Popen[str]) -> None:
    """As when a machine goes away: papermill and its kernel get no chance to save."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(everyone)
    process.communicate()


@pytest.mark.slow
def test_notebook_4_killed_three_times_ends_as_never_killed(tmp_path: Path, english: Path) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    shutil.copytree(english, tmp_path / "texts")
    train_tokenizer(sorted(english.glob("*.txt")), tmp_path / "tokenizer", 400, character_coverage=1.0)
    straight = notebook_4(tmp_path, "straight", drive)
    assert not straight.wait(1800), straight.communicate()[1]
    runs = tmp_path / "outputs" / "runs"
    for at in (3, 24, 45):
        process, metrics = notebook_4(tmp_path, "killed", drive), runs / "killed" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < at:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        kill_with_kernel(process)
        assert read_metrics(runs / "killed")[-1]["step"] < 60
        if at == 24:
            shutil.rmtree(runs / "killed")  # the hosted machine is another one
    for _ in range(2):  # the second time it is finished, and Run All ends well
        process = notebook_4(tmp_path, "killed", drive)
        assert not process.wait(1800), process.communicate()[1]
        process.communicate()
        assert everything(runs / "killed") == everything(runs / "straight") == everything(drive / "killed")
    assert "is finished at step 60: it is shown, not trained" in (tmp_path / "killed.ipynb").read_text()
    assert json.loads((runs / "killed" / "config.json").read_text())["history"]
    assert load_file(find_checkpoint(runs / "killed") / "model.safetensors")
