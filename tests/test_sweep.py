"""Sweeps: the package's own, which resumes, and the one for a Dask cluster of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from llmcore.config import preset
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.files import PROJECT_ROOT
from llmcore.measure import sweep
from llmcore.measure.compare_runs import read_run
from llmcore.measure.sweep import (
    SweepError,
    SweepProgress,
    finished,
    isoflop_grid,
    remove_unfinished,
    run_outcome,
    run_sweep,
    scaled_to_width,
)
from llmcore.runs import read_metrics
from llmcore.tokenizer import Tokenizer

from .helpers import FIND_TESTS, quick, tiny_config, trainer

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
TRAINS = """
from tests.helpers import quick, trainer
trainer(f"{output_dir}/{project}", quick(max_steps=max_steps), resume=checkpoint_dir).fit()
"""


def example() -> str:
    """The program that the notebooks' README names."""
    assert "tests/tools/dask_sweep.py" in (PROJECT_ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    return (PROJECT_ROOT / "tests" / "tools" / "dask_sweep.py").read_text(encoding="utf-8")


def test_the_sweep_is_short_and_needs_nothing_of_ours() -> None:
    assert len(example().splitlines()) <= 40
    assert "llmcore" not in example()


@pytest.mark.slow
def test_the_sweep_runs_every_point_of_its_grid_and_sorts_them(english: Path, tmp_path: Path) -> None:
    train_tokenizer(sorted(english.glob("*.txt")), tmp_path / "outputs" / "tokenizer", 400, character_coverage=1.0)
    assert Tokenizer(tmp_path / "outputs" / "tokenizer.model").vocab_size == 400
    (tmp_path / "notebooks").symlink_to(PROJECT_ROOT / "notebooks")
    program = re.sub(r"GRID = .*", 'GRID = {"learning_rate": [1e-5, 1e-3]}', example())
    fixed = {"preset": "scifi-mini", "max_steps": 8, "context_size": 32, "data_dir": str(english), "device": "cpu"}
    fixed |= {"dim": 24, "n_layers": 1, "tokens_per_step": 256}
    fixed["thorough"] = False  # another test lets the notebook measure all that it can
    program = re.sub(r"FIXED = .*", lambda _: f"FIXED = {fixed}", program)
    (tmp_path / "sweep.py").write_text(program, encoding="utf-8")
    environment = {**os.environ, "LLM_WORKBOOK_ROOT": str(tmp_path), "LLM_WORKBOOK_WATCHED": "0"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "sweep.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2: " in done.stdout
    best, worst = done.stdout.strip().splitlines()[-2:]
    expected = []
    for rate in ("1e-05", "0.001"):
        events = read_metrics(tmp_path / "outputs" / "runs" / f"sweep-{rate}")
        assert len(events) == 8
        expected.append((events[-1]["val_loss"], f"{{'learning_rate': {rate}}}"))
    assert [best, worst] == [f"{loss:.4f} {point}" for loss, point in sorted(expected)]


def test_a_grid_spends_each_budget_on_every_size_that_it_suits() -> None:
    base = preset("scifi-mini")[0]
    models = {model.n_params(): model for model in (scaled_to_width(base, dim) for dim in (16, 32, 64, 128))}
    budgets = 2e11, 4e11
    grid = isoflop_grid(models.values(), budgets, 4, 1e5, 5e5)
    spent = []
    for run in grid.values():
        model = next(model for model in models.values() if model.dim == run["dim"])
        assert (model.n_layers, model.n_heads) == (run["n_layers"], run["n_heads"])
        tokens = run["max_steps"] * run["batch_size"] * model.max_seq_len
        assert 0.99e5 <= tokens <= 5.05e5
        spent.append((run["dim"], tokens * model.flops_per_token()))
    suited = {
        (model.dim, budget)
        for model in models.values()
        for budget in budgets
        if 1e5 <= budget / model.flops_per_token() <= 5e5
    }
    assert {(dim, min(budgets, key=lambda b: abs(b - flops))) for dim, flops in spent} == suited and len(suited) >= 4
    assert all(min(abs(flops / budget - 1) for budget in budgets) < 0.01 for _, flops in spent)


def test_a_finished_run_is_told_from_a_stopped_one_and_from_another(tmp_path: Path) -> None:
    assert not finished(tmp_path / "run", {"max_steps": 6})
    run = trainer(tmp_path / "run", quick(max_steps=6))
    run.callbacks.append(lambda event: run.request_stop() if event["step"] == 3 else None)
    run.fit()
    assert not finished(tmp_path / "run", {"max_steps": 6, "seed": 0, "device": "cpu"})
    trainer(tmp_path / "run", quick(max_steps=6), resume="latest").fit()
    assert finished(tmp_path / "run", {"max_steps": 6, "seed": 0, "context_size": tiny_config().max_seq_len})
    with pytest.raises(SweepError, match=r"another sweep \(max_steps: 6 there, 8 here; dim: 32 there, 64 here\)"):
        finished(tmp_path / "run", {"max_steps": 8, "dim": 64})
    found, events = run_outcome(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert found["loss"] == events[-1]["val_loss"] and found["tokens"] == events[-1]["tokens"]
    assert found["train_loss"] == events[-1]["loss"] and found["parameters"] == tiny_config().n_params()
    assert found["seconds"] == pytest.approx(sum(event["seconds"] for event in events))
    assert found["flops"] == pytest.approx(events[-1]["tokens"] * tiny_config().flops_per_token())


def test_progress_counts_the_work_done_and_names_the_runs_at_work(tmp_path: Path) -> None:
    def write(name: str, steps: int) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        lines = [
            f'{{"step": {n}, "tokens": {n * 10}, "loss": {9 - n / 10}, "seconds": 0.1}}' for n in range(1, steps + 1)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    runs = {name: {"max_steps": 10, "batch_size": 4} for name in ("ended", "one", "two")}
    write("ended", 10)
    now = [0.0]
    progress = SweepProgress(runs, dict.fromkeys(runs, 1e6), tmp_path, clock=lambda: now[0])
    assert progress.minutes_left() is None and progress.line() == "time left not known yet; starting"
    now[0] = 120.0
    write("one", 5)
    assert progress.minutes_left() == pytest.approx(6)  # 5 steps in 2 minutes, 15 are left; "ended" took none of them
    assert progress.line() == "about 6 min left; one step 5 of 10, loss 8.50"
    with open(tmp_path / "one" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "los')  # just being written
    assert "one step 5 of 10" in progress.line()
    write("one", 10)
    write("two", 10)
    assert progress.minutes_left() == 0


def test_progress_knows_that_larger_models_take_longer(tmp_path: Path) -> None:
    runs = {name: {"max_steps": 10, "batch_size": 4} for name in ("small", "large")}
    costs = {"small": 1e6, "large": 1e8}
    progress = SweepProgress(runs, costs, tmp_path)
    assert 0.01 < progress.step_cost["small"] / progress.step_cost["large"] < 0.1


@pytest.mark.parametrize("file", ["notes.txt", "step=000002_loss=1.000", ".step=000002_loss=1.000"])
def test_a_folder_with_other_files_is_left_as_it_is(file: str, tmp_path: Path) -> None:
    """There is no checkpoint in it, but it does not only hold what an unfinished run leaves."""
    folder = tmp_path / "run"
    (folder / file).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(SweepError, match=f"^run: .*{file} was not written by an unfinished run; move it"):
        list(run_sweep({"run": {"max_steps": 2}}, tmp_path))
    assert (folder / file).exists() and (folder / "metrics.jsonl").exists()


def test_what_an_unfinished_run_leaves_is_removed(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=6))
    steps = run.steps()
    next(steps)
    steps.close()
    for checkpoint in (tmp_path / "run").glob("step=*"):
        checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.7.tmp"))
    remove_unfinished(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["a damaged checkpoint", "what was cut off", "no run"])
def test_a_sweep_deletes_nothing_that_is_not_its_own(what: str, tmp_path: Path) -> None:
    run = tmp_path / "one"
    if what == "no run":
        run.mkdir()
        (run / "novel.txt").write_text("mine")
    else:
        stopped = trainer(run, quick(max_steps=6))
        stopped.callbacks.append(lambda event: stopped.request_stop())
        last = stopped.fit().checkpoint
        assert last
        with open(last / "model.safetensors", "r+b") as file:
            file.truncate(99)
        if what == "what was cut off":
            last.rename(run / f"cut.1.{last.name}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(SweepError, match=r"one: .*(step=|cut\.1\.step=|novel).* was not written by an unfinished run"):
        list(run_sweep({"one": {}}, tmp_path, notebook=tmp_path / "never.ipynb"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before


@pytest.mark.slow
def test_a_sweep_skips_finished_runs_resumes_stopped_names_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", FIND_TESTS)
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    set_there = nbformat.v4.new_code_cell("checkpoint_dir = None", metadata={"tags": ["parameters"]})
    notebook.cells = [set_there, nbformat.v4.new_code_cell(TRAINS)]
    nbformat.write(notebook, tmp_path / "train.ipynb")
    runs = tmp_path / "runs"

    trainer(runs / "finished", quick(max_steps=4)).fit()
    before = (runs / "finished" / "metrics.jsonl").read_bytes()
    stopped = trainer(runs / "stopped", quick(max_steps=5))
    stopped.callbacks.append(lambda event: stopped.request_stop() if event["step"] == 2 else None)
    stopped.fit()
    (runs / "killed").mkdir()  # before its first checkpoint
    (runs / "killed" / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")

    wanted = {"finished": {"max_steps": 4}, "stopped": {"max_steps": 5}, "killed": {"max_steps": 3}}
    wanted["new"] = {"max_steps": 2}
    monkeypatch.setattr(sweep, "TICK", 0.2)
    progress, lines = (
        SweepProgress(
            {name: {**run, "batch_size": 4} for name, run in wanted.items()}, dict.fromkeys(wanted, 1e5), runs
        ),
        [],
    )
    ended = run_sweep(wanted, runs, notebook=tmp_path / "train.ipynb", tick=lambda: lines.append(progress.line()))
    assert {path.name for path in ended} == set(wanted)
    assert lines and progress.minutes_left() == 0
    assert (runs / "finished" / "metrics.jsonl").read_bytes() == before and not (runs / "finished.ipynb").exists()
    for name, parameters in wanted.items():
        steps = [event["step"] for event in read_metrics(runs / name)]
        assert steps == list(range(1, parameters["max_steps"] + 1))
    assert [entry["step"] for entry in read_run(runs / "stopped")["history"]] == [2]

    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert len(list(run_sweep(wanted, runs, notebook=tmp_path / "train.ipynb"))) == 4
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == written
    with pytest.raises(SweepError, match="^bad: "):
        list(run_sweep({"bad": {"max_steps": -1}}, runs, notebook=tmp_path / "train.ipynb"))
    with pytest.raises(SweepError, match="new belongs to another sweep"):
        list(run_sweep({"fresh": {"max_steps": 2}, "new": {"max_steps": 9}}, runs, notebook=tmp_path / "train.ipynb"))
    assert not (runs / "fresh").exists()
