"""SIGKILL at any moment: what is on disk is whole, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmcore.checkpoint import checkpoints

from .helpers import numbers, start

ROUNDS = int(os.environ.get("KILL_ROUNDS", "8"))
STEPS = 60

# A process that trains with a checkpoint every other step, on a disk so slow that it is mostly saving. Given a number,
# it kills itself at that file operation; given none, it waits for others to do it.
TRAIN = """
import sys, time
from pathlib import Path
import torch
import llmcore.checkpoint, llmcore.files
from llmcore.checkpoint import checkpoints
from tests.helpers import quick, tiny_model, trainer
from tests.kill import kill_at

run, seed, at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = quick(max_steps=int(sys.argv[4]), eval_interval=3, checkpoint_interval=2, optimizer="muon", keep_checkpoints=2)
saved = bool(checkpoints(run))  # a resumed run starts from other weights, which must not matter
one = trainer(run, config, tiny_model(seed if saved else 0), resume="latest" if saved else None)
for module in (llmcore.checkpoint, llmcore.files):
    module.fsync = lambda path, disk=module.fsync: (time.sleep(0.002), disk(path))

kill_at(at)
print("started", one.step, flush=True)
one.fit()
"""


def train(run: Path, seed: int = 0, kill_at: int = 0) -> subprocess.Popen[str]:
    return start(TRAIN, run, seed, kill_at, STEPS)


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
    with train(tmp_path / "straight") as process:
        assert process.wait() == 0, process.stderr and process.stderr.read()
    straight = everything(tmp_path / "straight")
    chance = random.Random(0)
    killed = finished = before_any_checkpoint = 0
    while killed < ROUNDS:
        run, number = tmp_path / f"run-{finished}", chance.randrange(1000)
        itself = chance.random() < 0.5  # at a file operation; else from outside, at any instruction
        with train(run, number, kill_at=chance.randrange(1, 200) if itself else 0) as process:
            assert process.stdout and process.stderr
            assert process.stdout.readline().startswith("started"), process.stderr.read()
            if not itself:
                select.select([process.stdout], [], [], chance.uniform(0, 1.5))
                process.send_signal(signal.SIGKILL)
            code = process.wait()
            assert code in (0, -signal.SIGKILL), process.stderr.read()
        killed += code != 0
        if not checkpoints(run):
            before_any_checkpoint += 1
            shutil.rmtree(run)  # nothing was saved yet: start again
        elif code == 0:
            assert everything(run) == straight, f"round {killed} of run {finished}"
            finished += 1
    print(f"{killed} kills, {finished} runs to the end, all as if never killed; {before_any_checkpoint} too early")
    with train(run) as process:
        assert process.wait() == 0, process.stderr and process.stderr.read()
    assert everything(run) == straight
