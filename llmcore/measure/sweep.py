"""Many runs of one notebook, each by papermill in its own process. Finished runs are not run again.

First which runs a scaling law needs, then how to run them, and how each ended.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from llmcore.checkpoint import CheckpointError, find_checkpoint
from llmcore.config import ModelConfig
from llmcore.files import display_path, resolve, visible
from llmcore.measure.compare_runs import read_events, read_run, validation_points
from llmcore.runs import run_lock

# what a run writes into its folder before its first checkpoint
UNFINISHED = ["metrics.jsonl", "config.json", ".lock", "curves.png", "summary.md", ".step=*.tmp", ".llmcore-*.tmp"]
UNFINISHED += ["tensorboard", "wandb", "wandb-id.txt"]
TICK = 5.0  # seconds between two looks at the runs in progress
STEP_OVERHEAD = 2.4e6  # FLOPs that take as long on a CPU core as what a token needs in a model of no size
NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "04_scifi_train.ipynb"


class SweepError(RuntimeError):
    """A run of a sweep failed or cannot be continued. The message names it."""


def scaled_to_width(base: ModelConfig, dim: int) -> ModelConfig:
    """A model of another width, with a block and a head for every 32 of width, and at least 2 blocks.

    Raises:
        ConfigError: if the width is not a multiple of the number of heads.
    """
    return base.replace(dim=dim, n_layers=max(2, dim // 32), n_heads=max(1, dim // 32))


def planned_run(model: ModelConfig, tokens: float, batch_size: int) -> dict[str, Any]:
    """Notebook 4's parameters for a run on about `tokens` tokens."""
    steps = max(1, round(tokens / batch_size / model.max_seq_len))
    shape = {"dim": model.dim, "n_layers": model.n_layers, "n_heads": model.n_heads}
    return {**shape, "max_steps": steps, "batch_size": batch_size, "grad_accum_steps": 1}


def isoflop_grid(
    models: Iterable[ModelConfig], budgets: Iterable[float], batch_size: int, fewest_tokens: float, most_tokens: float
) -> dict[str, dict[str, Any]]:
    """Runs that spend the same compute on models of different sizes (Hoffmann et al., arXiv:2203.15556, section 3.2).

    Args:
        models: of different sizes.
        budgets: FLOPs of a run, forward and backward.
        batch_size: windows of the model's context in a step.
        fewest_tokens, most_tokens: a run on fewer or on more tokens is left out.

    Returns:
        Notebook 4's parameters by name of the run, `<parameters>_<tokens>`.
    """
    runs = {}
    for budget in budgets:
        for model in models:
            tokens = budget / model.flops_per_token()
            if fewest_tokens <= tokens <= most_tokens:
                runs[f"{model.n_params() // 1000}k_{round(tokens / 1000)}k"] = planned_run(model, tokens, batch_size)
    return runs


class SweepProgress:
    """How far a sweep is, read from the metrics that its runs write.

    Args:
        runs: the parameters of each run's notebook, by the name of its folder.
        flops_per_token: of each run's model, by the same names.
        output_dir: the runs' folders are here.
        clock: seconds.
    """

    def __init__(
        self,
        runs: Mapping[str, Mapping[str, Any]],
        flops_per_token: Mapping[str, float],
        output_dir: str | os.PathLike[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runs, self.folder, self.clock = runs, resolve(output_dir), clock
        # a step of a small model takes longer than its FLOPs say
        self.step_cost = {
            name: (cost + STEP_OVERHEAD) * runs[name]["batch_size"] for name, cost in flops_per_token.items()
        }
        self.work = sum(runs[name]["max_steps"] * cost for name, cost in self.step_cost.items())
        self.started, self.before = clock(), self._look()[0]

    def minutes_left(self) -> float | None:
        """None before there is anything to judge by."""
        return self._minutes_left(self._look()[0])

    def _minutes_left(self, done: float) -> float | None:
        gained = done - self.before
        return (self.clock() - self.started) / gained * (self.work - done) / 60 if gained > 0 else None

    def line(self) -> str:
        """The runs in progress with the last training loss of each, and the time left."""
        done, now = self._look()
        left = self._minutes_left(done)
        when = "time left not known yet" if left is None else f"about {max(1, round(left))} min left"
        return f"{when}; " + ("; ".join(now) or "starting")

    def _look(self) -> tuple[float, list[str]]:
        """Work done, and the runs that have begun and not ended."""
        done, now = 0.0, []
        for name, run in self.runs.items():
            try:
                whole, _, _ = (self.folder / name / "metrics.jsonl").read_bytes().rpartition(b"\n")
                event = json.loads(whole.rpartition(b"\n")[2])
                step, loss = min(int(event["step"]), run["max_steps"]), float(event["loss"])
            except (OSError, ValueError, KeyError, TypeError):  # not begun, or its first line is being written
                continue
            done += step * self.step_cost[name]
            if step < run["max_steps"]:
                now.append(f"{name} step {step} of {run['max_steps']}, loss {loss:.2f}")
        return done, now


def run_sweep(
    runs: Mapping[str, Mapping[str, Any]],
    output_dir: str | os.PathLike[str],
    workers: int = 2,
    notebook: str | os.PathLike[str] = NOTEBOOK,
    tick: Callable[[], object] | None = None,
) -> Iterator[Path]:
    """Train every run that is not finished, a few at a time, and yield the folder of each as it ends.

    The processes share the cores evenly: two with one thread each do more work than two that compete for both cores.
    A stopped run goes on from its last checkpoint. A run without a checkpoint starts again.

    Args:
        runs: the parameters of each run's notebook, by the name of its folder.
        output_dir: the runs' folders go here, and beside each the notebook that made it, `<name>.ipynb`.
        workers: processes at a time.
        notebook: executed by papermill; it must train to `max_steps` into `<output_dir>/<project>`.
        tick: called every few seconds while runs are in progress.

    Raises:
        SweepError: before any run is started, if a folder holds a run with other parameters; later, if a run failed or
            its folder holds files that are not of a run. The runs that have started are finished first.
        TrainingError: if another process is at work in one of the folders.
    """
    folder = resolve(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    left = {name: parameters for name, parameters in runs.items() if not finished(folder / name, parameters)}
    yield from (folder / name for name in runs if name not in left)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        try:
            jobs = {
                pool.submit(_run, Path(notebook), folder, name, parameters, threads): name
                for name, parameters in left.items()
            }
            going = set(jobs)
            while going:
                ended, going = wait(going, timeout=TICK, return_when=FIRST_COMPLETED)
                for job in ended:
                    job.result()
                    yield folder / jobs[job]
                if tick and going:
                    tick()
        finally:  # also after an interrupt: the processes get it too, save and end
            pool.shutdown(cancel_futures=True)


def finished(run_dir: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether a folder holds a run with these parameters that was trained to its end and validated there.

    Raises:
        SweepError: if it holds a run with other parameters, or a run that cannot be read.
    """
    if not (run_dir / "config.json").exists():
        return False
    try:
        config = read_run(run_dir)
        events = read_events(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    except (OSError, ValueError) as error:
        raise SweepError(
            f"{display_path(run_dir)} holds a run that cannot be read ({error}); choose another output_dir"
        ) from None
    settings = {**config["model"], **config["train"], "context_size": config["model"]["max_seq_len"]}
    differing = [
        f"{name}: {settings[name]} there, {value} here"
        for name, value in parameters.items()
        if value is not None and settings.get(name, value) != value
    ]
    if differing:
        raise SweepError(
            f"{display_path(run_dir)} belongs to another sweep ({'; '.join(differing)}); choose another output_dir"
        )
    last = events[-1] if events else {}
    return last.get("step") == config["train"]["max_steps"] and "val_loss" in last


def run_outcome(run_dir: Path) -> dict[str, float]:
    """What a finished run was, what it cost and how good it became.

    Returns:
        parameters; without_tables: parameters without the embedding and output matrices; tokens; flops; seconds: of
        the steps; loss: of the last validation; train_loss: the mean over the last tenth of the steps. Losses are in
        nats per token.
    """
    config, events = read_run(run_dir), read_events(run_dir)
    model, last = ModelConfig.from_dict(config["model"]), validation_points(config, events)[-1]
    sizes = {"parameters": model.n_params(), "without_tables": model.n_params(embeddings=False)}
    train = statistics.fmean(event["loss"] for event in events[-max(1, len(events) // 10) :])
    costs = {name: last[name] for name in ("tokens", "flops", "seconds")}
    return {**sizes, **costs, "loss": last["val_loss"], "train_loss": train}


def _run(notebook: Path, folder: Path, name: str, parameters: Mapping[str, Any], threads: int) -> None:
    """Execute the notebook for one run.

    Raises:
        SweepError: if the run failed, or its folder holds files that are not of a run.
    """
    run_dir = folder / name
    notebook_parameters = {**parameters, "output_dir": str(folder), "project": name}
    if run_dir.exists():
        with run_lock(run_dir):
            try:
                notebook_parameters["checkpoint_dir"] = str(find_checkpoint(run_dir))
            except CheckpointError:  # the run was killed before its first checkpoint
                remove_unfinished(run_dir)

    command = [sys.executable, "-m", "papermill", "--engine", "llmcore", "--no-progress-bar"]
    command += ["-y", json.dumps(notebook_parameters), str(notebook), str(folder / f"{name}.ipynb")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "LLM_WORKBOOK_WATCHED": "0"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode or not finished(run_dir, parameters):
        reason = visible((process.stderr.strip().splitlines() or ["it was stopped"])[-1])
        raise SweepError(f"{name}: {reason}. Its notebook: {display_path(folder / name)}.ipynb")


def remove_unfinished(run_dir: Path) -> None:
    """Remove the folder of a run that has no checkpoint.

    Raises:
        SweepError: if it holds other files, which would be lost.
    """
    others = [path for path in run_dir.iterdir() if not any(path.match(pattern) for pattern in UNFINISHED)]
    if others:
        raise SweepError(
            f"{run_dir.name}: {display_path(min(others))} was not written by an unfinished run; move it, or choose "
            "another output_dir"
        )
    shutil.rmtree(run_dir)
