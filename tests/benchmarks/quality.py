"""Bits per byte against how it was trained: `python -m tests.benchmarks.quality [what [seed ...]]`.

What is `clock`, `ladder`, `10M` or `40M`.

`clock` trains the default preset for four minutes of wall time, start-up and compilation included, and scores it on
every 20th chapter of 三国演义, which is held out, from the tokenizer too: chapters 20, 40, …, and, since chapters
differ, chapters 1, 21, …. Nothing was chosen by either.

`ladder` is how the preset was chosen: ways to train, by chapters 10, 30, 50, … held out instead, all for the tokens
that two cores read in four minutes, so that the clock's noise is no part of it. What is finished is kept in
`outputs/bench/quality.jsonl`, and a second call goes on from there; on two cores, one process for each seed with
`OMP_NUM_THREADS=1` is soonest done.

`10M` and `40M` are how the optimizers and rates of scifi-10M and scifi-40M were chosen: short runs of their own shape
and context on the same novel, by the same chapters. They read less than half of the novel, in steps of 2,048 tokens:
enough to tell a rate that learns from one that does not, and not more.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmcore import config
from llmcore.corpus.sources import fetch
from llmcore.corpus.texts import find_texts, read_text
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.dataset import TokenDataset
from llmcore.files import PROJECT_ROOT
from llmcore.measure.planner import measure_speed
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer
from tests.benchmarks.peers import machine

SEEDS, TOKENS, MINUTES = (0, 1, 2), 2_304_000, 4
CLOCK, CHOICE = (0, 1), 10  # the remainders by 20 of the chapters held out
FINISHED = PROJECT_ROOT / "outputs" / "bench" / "quality.jsonl"
# what each rung changes of the preset scifi-mini, whose other settings it keeps
ADAMW = {"optimizer": "adamw", "batch_size": 4}
LADDER: dict[str, dict[str, Any]] = {
    "AdamW 2e-3, cosine, batch 4, decay 0.1": {**ADAMW, "learning_rate": 2e-3, "weight_decay": 0.1},
    "AdamW 4e-3, cosine, batch 4, decay 0.1": {**ADAMW, "learning_rate": 4e-3, "weight_decay": 0.1},
    "AdamW 4e-3, cosine, batch 4, decay 0.3": {**ADAMW, "learning_rate": 4e-3},
    "Muon, batch 8, AdamW 2e-2 for the tables, decay 0.1": {"weight_decay": 0.1},
    "**the same with decay 0.3 (the preset)**": {},
    "… decay 0.5": {"weight_decay": 0.5},
    "… 3 heads of 64": {"n_heads": 3},
    "… batch 4": {"batch_size": 4},
    "… batch 16": {"batch_size": 16},
    "… Muon's rate halved": {"muon_learning_rate": 1e-2},
    "… AdamW's rate 1e-2": {"learning_rate": 1e-2},
    "… linear decay over the last 40% (WSD)": {"schedule": "wsd", "decay_fraction": 0.4},
    "… embeddings not tied": {"tie_embeddings": False},
    "… context 512, batch 4": {"max_seq_len": 512, "batch_size": 4},
    "… 6 layers": {"n_layers": 6},
    "… 256 wide, two thirds of the tokens": {"dim": 256, "hidden_dim": 704, "n_heads": 8, "tokens": 1_536_000},
    "… vocabulary 2600": {"vocab_size": 2600},
    "… vocabulary 6000, as many bytes": {"vocab_size": 6000, "tokens": 1_900_544},
    "… unigram pieces": {"model_type": "unigram"},
    "… half as many tokens again": {"tokens": 3_456_000},
}

SHORT_10M = {"preset": "scifi-10M", "tokens": 163_840, "batch_size": 4, "compile": "off"}
SHORT_40M = {"preset": "scifi-40M", "tokens": 81_920, "batch_size": 2, "compile": "off"}
ADAMW_ALONE, MUON = {"optimizer": "adamw"}, {"optimizer": "muon"}
LADDER_10M: dict[str, dict[str, Any]] = {
    "AdamW 1e-3": {**SHORT_10M, **ADAMW_ALONE, "learning_rate": 1e-3},
    "AdamW 3e-3": {**SHORT_10M, **ADAMW_ALONE, "learning_rate": 3e-3},
    "Muon 1e-2, AdamW 5e-3 for the tables": {**SHORT_10M, **MUON, "muon_learning_rate": 1e-2, "learning_rate": 5e-3},
    "Muon 2e-2, AdamW 5e-3 for the tables": {**SHORT_10M, **MUON, "muon_learning_rate": 2e-2, "learning_rate": 5e-3},
    "Muon 2e-2, AdamW 1.5e-2": {**SHORT_10M, **MUON, "muon_learning_rate": 2e-2, "learning_rate": 1.5e-2},
    "Muon 2e-2, AdamW 5e-3, not tied": {
        **SHORT_10M,
        **MUON,
        "muon_learning_rate": 2e-2,
        "learning_rate": 5e-3,
        "tie_embeddings": False,
    },
}
LADDER_40M: dict[str, dict[str, Any]] = {
    "AdamW 1e-3": {**SHORT_40M, **ADAMW_ALONE, "learning_rate": 1e-3},
    "Muon 1e-2, AdamW 3e-3 for the tables": {**SHORT_40M, **MUON, "muon_learning_rate": 1e-2, "learning_rate": 3e-3},
    "Muon 2e-2, AdamW 3e-3 for the tables": {**SHORT_40M, **MUON, "muon_learning_rate": 2e-2, "learning_rate": 3e-3},
}
# a title, the rungs, and the seeds of each
LADDERS = {
    "ladder": (f"scifi-mini after {TOKENS:,} tokens", LADDER, SEEDS),
    "10M": (f"scifi-10M after {SHORT_10M['tokens']:,} tokens", LADDER_10M, (0,)),
    "40M": (f"scifi-40M after {SHORT_40M['tokens']:,} tokens", LADDER_40M, (0,)),
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


def train(
    folder: Path,
    seed: int,
    held_out: int,
    minutes: float | None = None,
    tokens: int = TOKENS,
    model_type: str = "bpe",
    preset: str = "scifi-mini",
    **changes: Any,
) -> dict[str, float]:
    """The last event of a run, with bits per byte of the chapters held out, and the seconds it took."""
    shape, how = config.preset(preset)
    of_shape = {field.name for field in dataclasses.fields(shape)} & changes.keys()
    shape = shape.replace(**{name: changes.pop(name) for name in of_shape})
    how = how.replace(seed=seed, eval_interval=0, sample_interval=0, checkpoint_interval=0, **changes)
    files = find_texts(fetch("sanguo", PROJECT_ROOT / "data"))
    known = [file for number, file in enumerate(files, 1) if number % 20 != held_out]
    prefix = folder / f"{model_type}-{shape.vocab_size}"
    model_file = prefix.with_suffix(".model")
    tok = (
        Tokenizer(model_file)
        if model_file.exists()
        else train_tokenizer(known, prefix, shape.vocab_size, model_type=model_type)
    )
    data = Chapters(known, tok, shape.max_seq_len)
    unseen = Chapters([file for file in files if file not in known], tok, shape.max_seq_len)
    step = how.batch_size * shape.max_seq_len
    steps = tokens // step
    if minutes:
        speed = measure_speed(shape, how, data, "cpu")
        steps = round((60 * minutes - speed["start_seconds"]) * speed["tokens_per_second"] / step)
    how = how.replace(max_steps=steps, warmup_steps=min(how.warmup_steps, steps // 10))
    torch.manual_seed(seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = Trainer(Transformer(shape), data, unseen, how, run_dir, device="cpu")
        *_, last = trainer.steps()
    if trainer.interrupted:
        raise KeyboardInterrupt  # a run that was cut short has no figure
    return {**last, "seconds": time.perf_counter() - started}


def finished() -> list[dict[str, Any]]:
    """The ladder's runs so far."""
    lines = FINISHED.read_bytes().split(b"\n")[:-1] if FINISHED.exists() else []
    return [json.loads(line) for line in lines]


def clock(folder: Path) -> None:
    """Print the table of the preset against the clock."""
    print(f"{MINUTES} minutes of scifi-mini, on {machine()}\n")
    print("| held out | seed | bits per byte | tokens | seconds |\n| --- | --- | --- | --- | --- |")
    for remainder, seed in itertools.product(CLOCK, SEEDS):
        chapters = f"{remainder or 20}, {(remainder or 20) + 20}, …"
        last = train(folder, seed, remainder, MINUTES)
        print(
            f"| {chapters} | {seed} | {last['val_bits_per_byte']:.3f} | {last['tokens']:,} | {last['seconds']:.0f} |",
            flush=True,
        )


def ladder(folder: Path, title: str, rungs: dict[str, dict[str, Any]], seeds: Sequence[int]) -> None:
    """Train what is missing of some seeds, then print the table of all."""
    FINISHED.parent.mkdir(parents=True, exist_ok=True)
    for changes in rungs.values():
        for seed in seeds:
            run = {"seed": seed, **changes}
            if run not in [line["run"] for line in finished()]:
                bits = train(folder, held_out=CHOICE, **run)["val_bits_per_byte"]
                with FINISHED.open("a") as file:
                    print(json.dumps({"run": run, "bits": bits}), file=file)
    print(f"{title}\n")
    print("| how | seeds | bits per byte, held out | spread over seeds |\n| --- | --- | --- | --- |")
    for name, changes in rungs.items():
        bits = [line["bits"] for line in finished() if {**changes, "seed": line["run"]["seed"]} == line["run"]]
        if bits:
            print(f"| {name} | {len(bits)} | {statistics.mean(bits):.3f} | {max(bits) - min(bits):.3f} |")


def main() -> None:
    """Print the table asked for."""
    what, *seeds = sys.argv[1:] or ["ladder"]
    with tempfile.TemporaryDirectory() as folder:
        if what == "clock":
            clock(Path(folder))
        else:
            title, rungs, usual = LADDERS[what]
            ladder(Path(folder), title, rungs, [int(seed) for seed in seeds] or usual)


if __name__ == "__main__":
    main()
