"""Going on with a trained model: `python -m tests.benchmarks.go_on [what]`. What is `rates`, `table` or `books`.

`rates` is how the rates of `config.GO_ON` were chosen: SmolLM2-135M reads a part of Shakespeare's works for a few
steps, and is scored on works that are held out for this choice alone.

`table` scores it on other works, and on text of the old kind (Python's manual), before and after, without and with
some of the old text mixed in; and beside it the default preset, trained from nothing for the same time. The machine
must be quiet, since time decides.

`books` is how `config.GO_ON_RATE` was chosen: the default preset learns half of the chapters of 三国演义, and goes on
with all of them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmcore import config
from llmcore.checkpoint import Checkpoint
from llmcore.config import TrainConfig
from llmcore.corpus.sources import fetch, fetch_model
from llmcore.corpus.texts import find_texts, read_text
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.dataset import MixedDataset
from llmcore.files import PROJECT_ROOT
from llmcore.formats.pretrained import open_pretrained
from llmcore.measure.evaluate import evaluate
from llmcore.measure.planner import measure_speed
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer
from tests.benchmarks.peers import machine
from tests.benchmarks.quality import Chapters

CONTEXT, BATCH, RATE_STEPS, TABLE_STEPS = 512, 4, 40, 60
EACH = 8_000  # characters of each held-out document that are scored, from its middle
ADAMW_RATES, MUON_RATES = (1e-5, 3e-5, 1e-4, 3e-4), (3e-4, 1e-3)
REPLAY = 0.25
BOOK_RATES, BOOK_STEPS = (0.1, 0.3, 1.0), 250


def works() -> tuple[list[Path], list[Path], list[Path]]:
    """Shakespeare's works: to train on, to choose by, and to report on."""
    files = find_texts(fetch("shakespeare", PROJECT_ROOT / "data"))
    chosen_by, reported = files[2::8], files[6::8]
    return [file for file in files if file not in chosen_by + reported], chosen_by, reported


def manual() -> tuple[list[Path], list[Path]]:
    """The topics of Python's manual: to mix in, and to report on."""
    files = [file for file in find_texts(fetch("pydoc", PROJECT_ROOT / "data")) if file.stat().st_size > 2_000]
    return [file for file in files if file not in files[::3]], files[::3]


def middles(files: list[Path]) -> dict[str, str]:
    """Some text from the middle of each file."""
    texts = {file.stem: read_text(file) for file in files}
    return {name: text[max(0, (len(text) - EACH) // 2) :][:EACH] for name, text in texts.items()}


def opened() -> Checkpoint:
    """SmolLM2-135M, with its weights as they come."""
    return open_pretrained(fetch_model(PROJECT_ROOT / "data" / "smollm2"))


def bits(model: Transformer, tokenizer: Tokenizer, texts: dict[str, str], context: int = CONTEXT) -> float:
    """Bits per byte."""
    return evaluate(model, tokenizer, texts, context_size=context, progress=False).total.bits_per_byte


def trained(model: Transformer, data: Any, train: TrainConfig) -> tuple[Transformer, float]:
    """The model after training, and the seconds that it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, data, None, train, folder, device="cpu")
        trainer.fit()
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer.model, time.perf_counter() - started


def settings(steps: int, **changes: Any) -> TrainConfig:
    """`GO_ON` for some steps, with nothing done on the side."""
    still = {"eval_interval": 0, "sample_interval": 0, "checkpoint_interval": 0, "checkpoint_minutes": 0}
    sizes = {"max_steps": steps, "batch_size": BATCH, "context_size": CONTEXT, "warmup_steps": min(20, steps // 5)}
    return config.GO_ON.replace(**still, **sizes, **changes)


def rates() -> None:
    """Print the held-out bits per byte after a few steps at each rate."""
    to_train, chosen_by, _ = works()
    start = opened()
    assert start.tokenizer is not None
    data, texts = Chapters(to_train, start.tokenizer, CONTEXT), middles(chosen_by)
    old = middles(manual()[1])
    print(f"SmolLM2-135M after {RATE_STEPS} steps of {BATCH * CONTEXT:,} tokens, on {machine()}\n")
    print("| how | works held out | the manual |\n| --- | --- | --- |", flush=True)
    first = bits(start.model, start.tokenizer, texts), bits(start.model, start.tokenizer, old)
    print(f"| as it comes | {first[0]:.3f} | {first[1]:.3f} |", flush=True)
    ways = {f"AdamW {rate:g}": {"learning_rate": rate} for rate in ADAMW_RATES}
    ways |= {
        f"Muon {rate:g}, AdamW 3e-5": {"optimizer": "muon", "muon_learning_rate": rate, "learning_rate": 3e-5}
        for rate in MUON_RATES
    }
    for name, changes in ways.items():
        model, _ = trained(opened().model, data, settings(RATE_STEPS, **changes))
        after = bits(model, start.tokenizer, texts), bits(model, start.tokenizer, old)
        print(f"| {name} | {after[0]:.3f} | {after[1]:.3f} |", flush=True)


def table() -> None:
    """Print before, after and from nothing at equal time, on new and on old text."""
    (to_train, chosen_by, reported), (old_to_train, old_reported) = works(), manual()
    new, old = middles(reported), middles(old_reported)
    start = opened()
    assert start.tokenizer is not None
    tok, data = start.tokenizer, Chapters(to_train + chosen_by, start.tokenizer, CONTEXT)
    tokens = TABLE_STEPS * BATCH * CONTEXT
    print(f"SmolLM2-135M after {tokens:,} tokens of Shakespeare, beside the default preset, on {machine()}\n")
    print("| how | seconds | new text | old text |\n| --- | --- | --- | --- |", flush=True)
    print(f"| SmolLM2-135M as it comes | | {bits(start.model, tok, new):.3f} | {bits(start.model, tok, old):.3f} |")
    model, seconds = trained(start.model, data, settings(TABLE_STEPS))
    print(f"| it goes on | {seconds:.0f} | {bits(model, tok, new):.3f} | {bits(model, tok, old):.3f} |", flush=True)

    old_data = Chapters(old_to_train, tok, CONTEXT)
    for part, files in ((data, to_train), (old_data, old_to_train)):
        part.manifest, part.path = {"tokenizer": tok.fingerprint}, files[0]
        part.fingerprint = files[0].name
    model, again = trained(opened().model, MixedDataset(data, old_data, REPLAY), settings(TABLE_STEPS))
    after = f"{bits(model, tok, new):.3f} | {bits(model, tok, old):.3f}"
    print(f"| it goes on, a share of {REPLAY} of the manual mixed in | {again:.0f} | {after} |", flush=True)

    from_nothing(to_train + chosen_by, seconds, new, old)


def from_nothing(files: list[Path], seconds: float, new: dict[str, str], old: dict[str, str]) -> None:
    """Print the row of the default preset, trained for as many seconds."""
    shape, how = config.preset("scifi-mini")
    with tempfile.TemporaryDirectory() as folder:
        own = train_tokenizer(files, Path(folder) / "own", shape.vocab_size)
    data = Chapters(files, own, shape.max_seq_len)
    measure_speed(shape, how, data, "cpu")  # this one compiles
    speed = measure_speed(shape, how, data, "cpu", steps=30)
    time_left = seconds - speed["start_seconds"]
    steps = round(time_left * speed["tokens_per_second"] / (how.batch_size * shape.max_seq_len))
    torch.manual_seed(0)
    how = how.replace(max_steps=steps, eval_interval=0, sample_interval=0, checkpoint_interval=0)
    model, spent = trained(Transformer(shape), data, how)
    after = f"{bits(model, own, new, 256):.3f} | {bits(model, own, old, 256):.3f}"
    print(f"| scifi-mini from nothing, {steps:,} steps, its own tokenizer | {spent:.0f} | {after} |", flush=True)


def books() -> None:
    """Print how well the default preset learns more chapters, by the share of its rates that it goes on with."""
    files = find_texts(fetch("sanguo", PROJECT_ROOT / "data"))
    unseen, half = files[9::20], [file for file in files if file not in files[9::20]][::2]
    shape, how = config.preset("scifi-mini")
    with tempfile.TemporaryDirectory() as folder:
        tok = train_tokenizer(half, Path(folder) / "half", shape.vocab_size, character_coverage=0.99)
    grown = [file for file in files if file not in unseen]
    texts = {file.stem: read_text(file) for file in unseen}
    how = how.replace(eval_interval=0, sample_interval=0, checkpoint_interval=0)

    torch.manual_seed(0)
    first, _ = trained(Transformer(shape), Chapters(half, tok, shape.max_seq_len), how.replace(max_steps=500))
    weights = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    print(f"scifi-mini, 500 steps on half of the chapters, then {BOOK_STEPS} on all, on {machine()}\n")
    print("| rates | bits per byte, held out |\n| --- | --- |")
    print(f"| before | {bits(first, tok, texts, 256):.3f} |", flush=True)
    for share in BOOK_RATES:
        rates = {name: share * getattr(how, name) for name in ("learning_rate", "muon_learning_rate")}
        model = Transformer(shape)
        model.load_state_dict(weights)
        train = how.replace(max_steps=BOOK_STEPS, warmup_steps=20, **rates)
        model, _ = trained(model, Chapters(grown, tok, shape.max_seq_len), train)
        print(f"| {share:g} of the first run's | {bits(model, tok, texts, 256):.3f} |", flush=True)


if __name__ == "__main__":
    {"rates": rates, "table": table, "books": books}[(sys.argv[1:] or ["rates"])[0]]()
