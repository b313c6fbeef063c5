"""Runs of texts in a training text: `python -m tests.benchmarks.memorised [million tokens]`: time and memory.

The data set is of random tokens in its real format: ten million of them, again and again. A billion need 2 GB on the
disk. Half of the texts are cut out of it, so that each is one run; the others are random. For comparison, the tokens
are only read and checked.
"""

from __future__ import annotations

import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmcore.dataset import TokenDataset
from llmcore.measure.memorised import BLOCK, recited, share
from tests.benchmarks.token_files import write_tokens

VOCAB = 16_000
MB = 10**6


def texts_of(data: TokenDataset, count: int, length: int) -> list[list[int]]:
    """Random tokens and stretches of the data set in turns."""
    chance = np.random.default_rng(1)
    starts = chance.integers(len(data.tokens) - length, size=count)
    return [
        data.read(start, start + length).tolist() if number % 2 else chance.integers(VOCAB, size=length).tolist()
        for number, start in enumerate(starts.tolist())
    ]


def read_all(data: TokenDataset) -> None:
    for start in range(0, len(data.tokens), BLOCK):
        data.read(start, start + BLOCK)


def measured(function: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of the processor, and megabytes that the call held at most."""
    tracemalloc.start()
    started, used = time.perf_counter(), time.process_time()
    function()
    seconds, busy = time.perf_counter() - started, time.process_time() - used
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, busy, peak / MB


def main() -> None:
    """Print a row for reading, and one for each number of texts."""
    tokens = int(float(sys.argv[1]) * MB) if len(sys.argv) > 1 else 10 * MB
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "d", VOCAB, tokens)
        print(f"{tokens / MB:,.0f} million tokens\n")
        print("| what | seconds | of the processor | memory, MB |\n| --- | --- | --- | --- |", flush=True)
        data = TokenDataset(Path(folder) / "d", "train", 1024)
        print(
            "| {} | {:.1f} | {:.1f} | {:.0f} |".format("read and check", *measured(lambda: read_all(data))), flush=True
        )
        for count, length in ((16, 128), (200, 128)):
            texts = texts_of(data, count, length)
            fresh = TokenDataset(Path(folder) / "d", "train", 1024)
            figures = measured(lambda: texts.append(recited(texts, fresh)))  # type: ignore[arg-type]  # noqa: B023
            runs = texts.pop()
            found = share(runs, [length] * count, length)  # type: ignore[arg-type]
            assert 0.5 <= found < 0.51, f"the texts that were cut out are half of all, not {found:.1%}"
            print("| {} texts of {:,} tokens | {:.1f} | {:.1f} | {:.0f} |".format(count, length, *figures), flush=True)


if __name__ == "__main__":
    main()
