"""What checkpoints cost beside training steps: `python -m tests.benchmarks.checkpoint [preset ...]`.

With the word `gigabyte` in place of a preset: how long a large checkpoint is written, hashed, checked and copied.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmcore import config
from llmcore.checkpoint import back_up, find_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint
from llmcore.files import sha256_file
from llmcore.measure.planner import RandomTokens
from llmcore.model import Transformer
from llmcore.train import Trainer


def measure(name: str, rounds: int = 15) -> str:
    """One row of the table: medians over rounds of one step and one save each."""
    shape, how = config.preset(name)
    every = how.checkpoint_interval or how.max_steps
    how = how.replace(max_steps=10**6, compile="on", eval_interval=0, sample_interval=0, checkpoint_interval=1)
    steps, saves = [], []
    with tempfile.TemporaryDirectory() as folder:
        events = Trainer(Transformer(shape), RandomTokens(shape), None, how, folder).steps()
        next(events), next(events)  # the first compiles
        for _ in range(rounds):
            started = time.perf_counter()
            steps.append(next(events)["seconds"])
            saves.append(time.perf_counter() - started - steps[-1])
        events.close()
        path = find_checkpoint(folder)
        started = time.perf_counter()
        load_checkpoint(path)
        load = time.perf_counter() - started
        size = sum(file.stat().st_size for file in path.iterdir())
    step, save = statistics.median(steps), statistics.median(saves)
    return (
        f"| {name} | {shape.n_params():,} | {step * 1e3:.0f} | {save * 1e3:.0f} | {save / step:.0%} | "
        f"{save / (step * every):.2%} | {load * 1e3:.0f} | {size / shape.n_params():.1f} |"
    )


def measure_gigabyte(rounds: int = 5) -> str:
    """Seconds per GB of the parts of a save, medians over rounds; the last is a copy into a folder beside it.

    In parentheses the seconds that the processor worked, which other programs on the machine change less.
    """
    model = Transformer(config.preset("scifi-117M")[0].replace(n_layers=8))  # 86M weights, and twice as many moments
    moments = {f"{name}/{key}": torch.randn_like(p) for name, p in model.named_parameters() for key in "ab"}
    parts: dict[str, list[tuple[float, float]]] = {
        "save": [],
        "of it hashing": [],
        "verify": [],
        "load": [],
        "copy": [],
    }

    def timed(part: str, work: Callable[[], object]) -> None:
        started, worked = time.perf_counter(), time.process_time()
        work()
        parts[part].append((time.perf_counter() - started, time.process_time() - worked))

    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Path(folder).resolve() / "run"
        run.mkdir()
        (run / "metrics.jsonl").touch(), (run / "config.json").touch()
        for step in range(rounds):
            timed("save", lambda step=step: save_checkpoint(run, model, None, step=step, loss=1.0, tensors=moments))
            path = find_checkpoint(run)
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e9
            timed("of it hashing", lambda path=path: [*map(sha256_file, path.iterdir())])
            timed("verify", lambda path=path: verify_checkpoint(path))
            timed("load", lambda path=path: load_checkpoint(path, device="cpu"))
            timed("copy", lambda: back_up(run, run.with_name("copy")))
            for old in run.glob("step=*"):
                shutil.rmtree(old)
    medians = {
        part: [statistics.median(column) / size for column in zip(*rows, strict=True)] for part, rows in parts.items()
    }
    row = ", ".join(f"{part} {wall:.2f} ({worked:.2f})" for part, (wall, worked) in medians.items())
    return f"a checkpoint of {size:.2f} GB, seconds per GB: {row}"


def main() -> None:
    """Print the table for the presets named, or for the one that trains on a laptop."""
    if sys.argv[1:] == ["gigabyte"]:
        print(measure_gigabyte())
        return
    print("| preset | parameters | step, ms | save, ms | save / step | of a run | load, ms | bytes per parameter |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or ["scifi-mini"]:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
