"""What checkpoints cost beside training steps: `python -m tests.benchmarks.checkpoint [preset ...]`."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time

from llmcore import config
from llmcore.checkpoint import find_checkpoint, load_checkpoint
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


def main() -> None:
    """Print the table for the presets named, or for the one that trains on a laptop."""
    print("| preset | parameters | step, ms | save, ms | save / step | of a run | load, ms | bytes per parameter |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or ["scifi-mini"]:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
