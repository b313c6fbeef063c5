"""Run notebook 4 at every point of a grid, two runs at a time, and print the best first."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

from dask.distributed import Client, as_completed

GRID = {"learning_rate": [1e-2, 2e-2, 4e-2], "seed": [0, 1]}
FIXED = {"preset": "scifi-mini", "max_steps": 300}


def train(name: str, point: dict) -> float:
    """Run papermill in its own process and return the last validation loss."""
    options = [word for key, value in {**FIXED, **point, "project": name}.items() for word in ("-p", key, str(value))]
    notebook, output = "notebooks/04_scifi_train.ipynb", f"outputs/{name}.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, output, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    lines = Path("outputs/runs", name, "metrics.jsonl").open("rb")  # in bytes, only a newline ends a line
    return [event["val_loss"] for event in map(json.loads, lines) if "val_loss" in event][-1]


if __name__ == "__main__":
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    names = ["sweep-" + "-".join(f"{value:g}" for value in point.values()) for point in points]
    with Client(n_workers=2, threads_per_worker=1) as client:  # on a cluster: Client("tcp://<scheduler>:8786")
        runs = dict(zip(client.map(train, names, points, retries=1), points, strict=True))
        results = []
        for run in as_completed(runs):
            results.append((run.result(), runs[run]))
            print(f"{len(results)} of {len(runs)}: {results[-1]}")
    for loss, point in sorted(results, key=lambda result: result[0]):
        print(f"{loss:.4f}", point)
