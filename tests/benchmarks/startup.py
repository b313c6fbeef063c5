"""How long until something happens: `python -m tests.benchmarks.startup`. A Python of its own per line, in turns."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from llmcore.files import PROJECT_ROOT
from tests.benchmarks.peers import machine, ratio

TWO_STEPS = """
import tempfile
from llmcore import config
from llmcore.model import Transformer
from llmcore.train import Trainer
from llmcore.measure.planner import RandomTokens
shape, how = config.preset("scifi-mini")
with tempfile.TemporaryDirectory() as folder:
    Trainer(Transformer(shape), RandomTokens(shape), None, how.replace(max_steps=2), folder).fit()
"""
PROGRAMS = {
    "import torch": "import torch",
    "import llmcore": "import llmcore",
    "import what trains and writes": "import llmcore.checkpoint, llmcore.dataset, llmcore.generate, llmcore.train",
    "two steps of scifi-mini, and a checkpoint": TWO_STEPS,
}


def main(rounds: int = 5) -> None:
    """Print the table."""
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for round_ in range(rounds + 1):
        for name, program in PROGRAMS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, cwd=PROJECT_ROOT, capture_output=True)
            if round_:  # the first reads the files from the disk
                seconds[name].append(time.perf_counter() - started)
    print(f"From the start of Python to its end, on {machine()}\n")
    print("| what | seconds | × import torch |\n| --- | --- | --- |")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.2f} | {ratio(seconds, 'import torch', name):.2f} |")


if __name__ == "__main__":
    main()
