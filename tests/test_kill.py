"""SIGKILL at any moment: what is on disk is whole, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from safetensors.torch import load_file

import llmcore.checkpoint
import llmcore.files
from llmcore.checkpoint import checkpoints

from .helpers import numbers, quick, tiny_model, trainer
from .kill import kill_at

ROUNDS = int(os.environ.get("KILL_ROUNDS", "8"))
STEPS = 60

# One process imports torch and this file. Each run is a copy of it, which starts in no time.
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload([__name__])


def train(run: Path, seed: int, at: int, started: Connection) -> None:
    """Train with a checkpoint every other step, on a disk so slow that it is mostly saving.

    Args:
        run: its folder. A run that is there goes on, from other weights, which must not matter.
        seed: of the weights that a resumed run begins with.
        at: the number of the file operation at which this process kills itself; 0 if others do it.
        started: is told when the training begins.
    """
    config = quick(max_steps=STEPS, eval_interval=3, checkpoint_interval=2, optimizer="muon", keep_checkpoints=2)
    saved = bool(checkpoints(run))
    one = trainer(run, config, tiny_model(seed if saved else 0), resume="latest" if saved else None)
    for module in (llmcore.checkpoint, llmcore.files):
        disk = module.fsync
        module.fsync = lambda path, disk=disk: (time.sleep(0.002), disk(path))  # type: ignore[attr-defined]
    kill_at(at)
    started.send("started")
    one.fit()


def start(run: Path, seed: int = 0, at: int = 0) -> ForkServerProcess:
    """Train in a process of its own; returns when the training begins."""
    told, started = COPIES.Pipe(duplex=False)
    process = COPIES.Process(target=train, args=(run, seed, at, started))
    process.start()
    started.close()
    assert told.recv() == "started"
    return process


def everything(run: Path) -> dict[str, object]:
    """Tensors, counts and metrics of a finished run, without what the clock says."""
    path = checkpoints(run)[-1]
    tensors = load_file(path / "model.safetensors") | load_file(path / "trainer_state.safetensors")
    metrics = numbers(run)
    for event in metrics:
        if "checkpoint" in event:
            event["checkpoint"] = Path(event["checkpoint"]).name
    return {
        "folders": sorted(p.name for p in run.iterdir() if p.is_dir()),
        "state": json.loads((path / "trainer_state.json").read_text()),
        "tensors": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "metrics": metrics,
    }


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_never_killed(tmp_path: Path) -> None:
    straight_run = start(tmp_path / "straight")
    straight_run.join()
    assert straight_run.exitcode == 0
    straight = everything(tmp_path / "straight")
    chance = random.Random(0)
    killed = finished = before_any_checkpoint = 0
    while killed < ROUNDS:
        run, number = tmp_path / f"run-{finished}", chance.randrange(1000)
        itself = chance.random() < 0.5  # at a file operation; else from outside, at any instruction
        process = start(run, number, at=chance.randrange(1, 200) if itself else 0)
        if not itself:
            process.join(chance.uniform(0, 1.5))
            process.kill()
        process.join()
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if not checkpoints(run):
            before_any_checkpoint += 1
            shutil.rmtree(run)  # nothing was saved yet: start again
        elif code == 0:
            assert everything(run) == straight, f"round {killed} of run {finished}"
            finished += 1
    print(f"{killed} kills, {finished} runs to the end, all as if never killed; {before_any_checkpoint} too early")
    last = start(run)
    last.join()
    assert last.exitcode == 0
    assert everything(run) == straight
