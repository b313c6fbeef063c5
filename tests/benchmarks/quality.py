"""Bits per byte against how it was trained: `python -m tests.benchmarks.quality [ladder | clock]`.

Every 20th chapter of 三国演义 is held out, from the tokenizer too. The ladder compares ways to train, at the same
number of tokens over three seeds, so that the clock's noise is no part of it; what is finished is kept in
`outputs/bench/quality.jsonl`, and a second call goes on from there. `clock` trains the default preset for four minutes
of wall time, start-up and compilation included.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcore import config
from llmcore.corpus import fetch
from llmcore.dataset import TokenDataset
from llmcore.files import PROJECT_ROOT, find_texts, read_text
from llmcore.model import Transformer
from llmcore.planner import measure_speed
from llmcore.tokenizer import Tokenizer, train_tokenizer
from llmcore.train import Trainer
from tests.benchmarks.peers import machine

SEEDS, TOKENS, MINUTES = (0, 1, 2), 512_000, 4
FINISHED = PROJECT_ROOT / "outputs" / "bench" / "quality.jsonl"
# what each rung changes of the preset scifi-mini, whose other settings it keeps
LADDER: dict[str, dict[str, Any]] = {
    "AdamW 2e-3, cosine, batch 4": {"optimizer": "adamw", "batch_size": 4, "learning_rate": 2e-3},
    "AdamW 4e-3, cosine, batch 4": {"optimizer": "adamw", "batch_size": 4, "learning_rate": 4e-3},
    "Muon, batch 4": {"batch_size": 4},
    "**Muon, batch 8 (the preset)**": {},
    "… AdamW's rate 2e-3": {"learning_rate": 2e-3},
    "… linear decay over the last 40% (WSD)": {"schedule": "wsd", "decay_fraction": 0.4},
    "… Muon's rate doubled": {"muon_learning_rate": 4e-2},
    "… embeddings not tied": {"tie_embeddings": False},
    "… vocabulary 2000": {"vocab_size": 2000},
    "… AdamW's rate 5e-2": {"learning_rate": 5e-2},
}


class Chapters(TokenDataset):
    """A data set of some chapters, in memory."""

    def __init__(self, files: list[Path], tokenizer: Tokenizer, context_size: int) -> None:
        texts = [read_text(file) for file in files]
        ids = [id for text in texts for id in tokenizer.encode(text, eos=True)]
        self.tokens, self.context_size, self.vocab_size = np.asarray(ids), context_size, tokenizer.vocab_size
        self.bytes_per_token = sum(len(text.encode()) for text in texts) / len(ids)
        self.n_targets = len(ids) - 1
        self.n_windows = -(-self.n_targets // context_size)

    def read(self, start: int, end: int) -> NDArray[np.int64]:
        """The ids from one place to before another: there are no blocks of a file to check."""
        return self.tokens[start:end]


def train(folder: Path, seed: int, minutes: float | None = None, **changes: Any) -> tuple[float, int, float]:
    """Bits per byte of the held-out chapters, tokens seen, seconds taken."""
    vocab_size = changes.pop("vocab_size", 4000)
    shape, how = config.preset("scifi-mini")
    shape = shape.replace(vocab_size=vocab_size, tie_embeddings=changes.pop("tie_embeddings", True))
    how = how.replace(seed=seed, eval_interval=0, sample_interval=0, checkpoint_interval=0, **changes)
    files = find_texts(fetch("sanguo", PROJECT_ROOT / "data"))
    known = [file for number, file in enumerate(files, 1) if number % 20]
    prefix = folder / str(vocab_size)
    model_file = prefix.with_suffix(".model")
    tok = Tokenizer(model_file) if model_file.exists() else train_tokenizer(known, prefix, vocab_size)
    data = Chapters(known, tok, shape.max_seq_len)
    unseen = Chapters([file for file in files if file not in known], tok, shape.max_seq_len)
    step = how.batch_size * shape.max_seq_len
    steps = TOKENS // step
    if minutes:
        speed = measure_speed(shape, how, data, "cpu")
        steps = round((60 * minutes - speed["start_seconds"]) * speed["tokens_per_second"] / step)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(Transformer(shape), data, unseen, how.replace(max_steps=steps), run_dir, device="cpu")
        *_, last = trainer.steps()
    return last["val_bits_per_byte"], last["tokens"], time.perf_counter() - started


def once(folder: Path, seed: int, changes: dict[str, Any]) -> float:
    """Bits per byte of one run of the ladder: remembered, or trained for."""
    key = {"tokens": TOKENS, "seed": seed, **changes}
    FINISHED.parent.mkdir(parents=True, exist_ok=True)
    lines = FINISHED.read_text().splitlines() if FINISHED.exists() else []
    known = [run["bits"] for run in map(json.loads, lines) if run["run"] == key]
    if known:
        return known[0]
    bits = train(folder, seed, **changes)[0]
    with FINISHED.open("a") as file:
        print(json.dumps({"run": key, "bits": bits}), file=file)
    return bits


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        if "clock" in sys.argv:
            print(f"{MINUTES} minutes of scifi-mini, on {machine()}\n")
            print("| seed | bits per byte, held out | tokens | seconds |\n| --- | --- | --- | --- |")
            for seed in SEEDS:
                bits, tokens, seconds = train(Path(folder), seed, MINUTES)
                print(f"| {seed} | {bits:.3f} | {tokens:,} | {seconds:.0f} |", flush=True)
            return
        print(f"scifi-mini after {TOKENS:,} tokens, seeds {', '.join(map(str, SEEDS))}\n")
        print("| how | bits per byte, held out | spread over seeds |\n| --- | --- | --- |")
        for name, changes in LADDER.items():
            found = [once(Path(folder), seed, changes) for seed in SEEDS]
            print(f"| {name} | {statistics.mean(found):.3f} | {max(found) - min(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
