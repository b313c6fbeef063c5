"""A run that starts from another model's weights: which models open, what is recorded, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.exceptions import PapermillExecutionError

from llmcore.checkpoint import CheckpointError, load_checkpoint
from llmcore.config import GO_ON, GO_ON_CONTEXT, ConfigError, go_on
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.report import spelled_share
from llmcore.corpus.sources import fetch
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.dataset import IGNORED, DatasetError, MixedDataset, TokenDataset
from llmcore.formats.gguf import to_gguf
from llmcore.formats.hub import model_card
from llmcore.formats.huggingface import to_hf
from llmcore.formats.pretrained import check_started_from, open_pretrained
from llmcore.formats.shared import FormatError
from llmcore.measure.compare_runs import summarize
from llmcore.model import Transformer
from llmcore.notebook.run_page import write_summary
from llmcore.runs import TrainingError
from llmcore.tokenizer import Tokenizer
from llmcore.train import Trainer
from tests.helpers import (
    Batches,
    assert_same_tensors,
    examples,
    numbers,
    quick,
    state,
    tiny_config,
    tiny_model,
    trainer,
)
from tests.helpers import weights as weights_of
from tests.test_notebooks import output_of, papermill_run

SOURCE = {"source": "a/model", "format": "GGUF", "sha256": "0" * 64}


@pytest.fixture(scope="module")
def words(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of the English texts."""
    prefix = tmp_path_factory.mktemp("words") / "english"
    return train_tokenizer(sorted(english.glob("*.txt")), prefix, 400, character_coverage=1.0)


@pytest.fixture(scope="module")
def trained(english: Path, words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the English texts, with its data set beside it: a few steps of a tiny model."""
    root = tmp_path_factory.mktemp("trained")
    prepare_dataset(english, words, root / "data", 0.2)
    splits = [TokenDataset(root / "data", split, 24) for split in ("train", "val")]
    torch.manual_seed(0)
    model = Transformer(tiny_config(vocab_size=words.vocab_size))
    Trainer(model, *splits, quick(max_steps=30, batch_size=8), root / "run", tokenizer=words, device="cpu").fit()
    return root / "run"


# Which models open


@pytest.mark.parametrize("kind", ["checkpoint", "run", "Hugging Face", "GGUF", "folder with a GGUF"])
def test_a_model_opens_from_every_format(tmp_path: Path, trained: Path, words: Tokenizer, kind: str) -> None:
    saved = load_checkpoint(trained, device="cpu")
    file = tmp_path / "model.gguf"
    source, weights = {
        "checkpoint": lambda: (saved.path, saved.path / "model.safetensors"),
        "run": lambda: (trained, saved.path / "model.safetensors"),
        "Hugging Face": lambda: (to_hf(saved, tmp_path / "hf"), tmp_path / "hf" / "model.safetensors"),
        "GGUF": lambda: (to_gguf(saved, file), file),
        "folder with a GGUF": lambda: (to_gguf(saved, file).parent, file),
    }[kind]()
    opened = open_pretrained(source)
    assert_same_tensors(weights_of(opened.model), weights_of(saved.model))
    assert opened.tokenizer is not None and opened.step == 0
    text = "The old captain 船长 forgot.\n"
    assert opened.tokenizer.encode(text) == words.encode(text)
    record = opened.config["init_from"]
    assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert str(tmp_path if kind not in ("checkpoint", "run") else trained) in record["source"]
    if kind in ("checkpoint", "run"):
        assert (record["step"], record["init_from"]) == (30, None)
        assert opened.config["train"]["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "does not exist"),
        (lambda folder: folder, "no checkpoint in"),
        (lambda folder: (folder / "config.json").write_text("{}") and folder, "config.json"),
        (lambda folder: (folder / "a.gguf").touch() or (folder / "b.gguf").touch() or folder, "holds 2 GGUF files"),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises((FormatError, CheckpointError), match=message):
        open_pretrained(make(tmp_path))


# Training from it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_trained_in_float32_whatever_the_file_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=2), tiny_model().to(dtype), init_from=SOURCE)
    run.fit()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert {tensor.dtype for name, tensor in state(run.last_checkpoint).items() if "rng" not in name} == {torch.float32}  # type: ignore[arg-type]


def test_the_run_records_what_it_started_from(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", quick(max_steps=2), init_from=SOURCE)
    run.fit()
    saved = load_checkpoint(tmp_path / "run", device="cpu")
    assert (
        saved.config["init_from"] == json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == SOURCE
    )
    assert saved.config["history"] == [{"step": 0, "changed": {}, "init_from": "a/model"}]
    assert "a/model" in write_summary(tmp_path / "run").read_text()
    assert "a/model (sha256 0000000000000000)" in model_card(saved, [], "name")
    assert summarize([tmp_path / "run"])[0]["preset"] == "from model"


def test_a_resume_is_exact_and_keeps_the_record(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", quick(), tiny_model(3), init_from=SOURCE).fit()
    first = trainer(tmp_path / "halves", quick(), tiny_model(3), init_from=SOURCE)
    first.callbacks.append(lambda event: first.request_stop() if event["step"] == 3 else None)
    first.fit()
    second = trainer(tmp_path / "halves", quick(), tiny_model(4), resume="latest")
    second.fit()
    whole, halves = (load_checkpoint(tmp_path / name, device="cpu") for name in ("whole", "halves"))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "halves")
    assert_same_tensors(state(whole.path), state(halves.path))
    assert halves.config["init_from"] == SOURCE
    assert [entry["step"] for entry in halves.config["history"]] == [0, 3]


def test_init_from_and_resume_together_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "run", quick(max_steps=2)).fit()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match="leave out one of them"):
        trainer(tmp_path / "run", quick(max_steps=4), init_from=SOURCE, resume="latest")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_settings_to_go_on_are_lower_rates_of_the_same_optimizer() -> None:
    own = quick(optimizer="muon", learning_rate=2e-2, muon_learning_rate=1e-2, weight_decay=0.3).to_dict()
    settings = go_on(tiny_config(), own)
    assert (settings.optimizer, settings.weight_decay) == ("muon", 0.3)
    assert 0 < settings.learning_rate < 2e-2 and 0 < settings.muon_learning_rate < 1e-2
    large = tiny_config(max_seq_len=2 * GO_ON_CONTEXT)
    assert go_on(large) == go_on(large, {}) == GO_ON.replace(context_size=GO_ON_CONTEXT)


def test_windows_longer_than_the_models_are_refused_by_name() -> None:
    shape = tiny_config()
    assert go_on(shape).context_size == shape.max_seq_len
    with pytest.raises(ConfigError, match=f"context_size={shape.max_seq_len + 1} .* max_seq_len={shape.max_seq_len}"):
        go_on(shape, context_size=shape.max_seq_len + 1)


def test_a_run_that_began_otherwise_does_not_go_on_from_a_model(trained: Path) -> None:
    own = {"init_from": open_pretrained(trained).config["init_from"]}
    for same in (trained, load_checkpoint(trained, device="cpu").path):
        check_started_from(own, same)
    check_started_from({"init_from": {"source": "someone/llama"}}, "someone/llama")
    others: list[tuple[dict[str, Any], str]] = [
        ({}, "random weights"),
        ({"init_from": None}, "random weights"),
        ({"init_from": {"source": "someone/llama-2"}}, "someone/llama-2"),
    ]
    for config, started in others:
        with pytest.raises(FormatError, match=f"someone/llama'.* started from {started}; leave out"):
            check_started_from(config, "someone/llama")


# Other data


@settings(max_examples=examples(30), deadline=None)
@given(each=st.integers(1, 700), most=st.none() | st.integers(1, 3000))
def test_texts_begin_as_the_documents_do(trained: Path, words: Tokenizer, each: int, most: int | None) -> None:
    data = TokenDataset(trained.parent / "data", "train", 24)
    whole, parts = data.texts(words), data.texts(words, most, each)
    assert list(parts) == list(whole)[: len(parts)]
    assert all(whole[name].startswith(part) for name, part in parts.items())
    for name, part in parts.items():
        ids = words.encode(whole[name], eos=True)[:each]
        assert len(words.decode(ids).rstrip("\ufffd")) == len(part)
    if most is None:
        assert len(parts) == len(whole)


def test_a_refused_resume_names_the_files_and_the_way_out(tmp_path: Path, english: Path, words: Tokenizer) -> None:
    texts = Path(shutil.copytree(english, tmp_path / "texts"))

    def run(**options: Any) -> Trainer:
        prepare_dataset(texts, words, tmp_path / "data", 0.2)
        splits = [TokenDataset(tmp_path / "data", split, 24) for split in ("train", "val")]
        model = options.pop("model", None) or Transformer(tiny_config(vocab_size=words.vocab_size))
        config = quick(max_steps=4)
        return Trainer(model, *splits, config, tmp_path / options.pop("name", "run"), tokenizer=words, **options)

    run().fit()
    (texts / "story-0.txt").unlink()
    (texts / "story-1.txt").write_text("Another story altogether.\n" * 50, encoding="utf-8")
    (texts / "a-new-book.txt").write_text("One more of the captain's letters.\n" * 50, encoding="utf-8")
    with pytest.raises(CheckpointError) as refusal:
        run(resume="latest")
    for words_of in ("1 file added (a-new-book.txt)", "removed (story-0.txt)", "changed (story-1.txt)", "init_from="):
        assert words_of in str(refusal.value)

    start = open_pretrained(tmp_path / "run")
    grown = run(name="grown", model=start.model, init_from=start.config["init_from"])
    assert grown.step == 0
    grown.fit()
    assert load_checkpoint(tmp_path / "grown", device="cpu").config["init_from"]["step"] == 4


class Numbered(Batches):
    """Windows that say their number, for what `MixedDataset` asks of a data set."""

    def __init__(self, first: int, tokenizer: str = "same", context_size: int = 4) -> None:
        super().__init__(context_size)
        self.first, self.manifest, self.context_size, self.path = (
            first,
            {"tokenizer": tokenizer},
            context_size,
            Path("x/y"),
        )

    def window(self, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((self.time,), self.first + number), torch.full((self.time,), IGNORED)


@settings(max_examples=examples(100), deadline=None)
@given(
    share=st.floats(0.001, 0.999), batch_size=st.integers(1, 9), step=st.integers(0, 10**6), seed=st.integers(0, 2**31)
)
def test_mixed_windows_come_in_proportion_and_in_order(share: float, batch_size: int, step: int, seed: int) -> None:
    mixed = MixedDataset(Numbered(0), Numbered(10**9), share)  # type: ignore[arg-type]
    rows = [int(row[0]) for n in range(step, step + 20) for row in mixed.batch(n, batch_size, seed)[0]]
    old, new = [n - 10**9 for n in rows if n >= 10**9], [n for n in rows if n < 10**9]
    assert old == list(range(old[0], old[0] + len(old))) if old else True
    assert new == list(range(new[0], new[0] + len(new))) if new else True
    assert abs(len(old) - share * len(rows)) <= 1
    first = step * batch_size  # windows before: together they are the ones that were not skipped
    assert (new[0] if new else 0) + (old[0] if old else 0) in ({first} if old and new else range(first + 1))
    again = [
        int(row[0]) for n in range(step * batch_size, (step + 20) * batch_size) for row in mixed.batch(n, 1, seed)[0]
    ]
    assert again == rows


@pytest.mark.parametrize(
    ("old", "share", "message"),
    [
        (Numbered(0), 0.0, "must be above 0"),
        (Numbered(0), 1.0, "below 1"),
        (Numbered(0, tokenizer="other"), 0.5, "different tokenizers"),
        (Numbered(0, context_size=8), 0.5, "context_size=4"),
    ],
)
def test_data_that_cannot_be_mixed_are_refused(old: Numbered, share: float, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        MixedDataset(Numbered(0), old, share)  # type: ignore[arg-type]


def test_spelled_share_counts_characters_without_a_piece(words: Tokenizer) -> None:
    assert spelled_share(words, "The old captain forgot") == 0
    assert spelled_share(words, "The 船长 captain") == 2 / 14
    assert spelled_share(words, "") == 0


def test_the_manual_of_python_is_a_corpus(tmp_path: Path) -> None:
    texts = [file.read_text(encoding="utf-8") for file in fetch("pydoc", tmp_path).glob("*.txt")]
    assert len(texts) > 50 and any('The "assert" statement' in text for text in texts)


# In the notebook


@pytest.mark.slow
def test_notebook_4_starts_from_a_model_and_compares(
    trained: Path, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New text is learnt, the old kind is measured, and the same line goes on with the run by itself."""
    monkeypatch.setenv("LLM_WORKBOOK_ROOT", str(tmp_path))
    new = tmp_path / "new"
    new.mkdir()
    for number in range(6):
        (new / f"{number}.txt").write_text(f"Call me {number}. Some years ago, I went to sea.\n" * 60, encoding="utf-8")
    parameters = {
        "init_from": str(to_hf(trained, tmp_path / "hf")),
        "data_dir": str(new),
        "replay_dir": str(english),
        "replay_fraction": 0.25,
        "val_fraction": 0.4,
        "max_steps": 30,
        "learning_rate": 3e-3,
        "project": "goes-on",
        "prompt": "Call me",
        "device": "cpu",
        "thorough": False,
    }
    text = output_of(papermill_run("04_scifi_train", tmp_path, **parameters, checkpoint_dir="auto"))
    assert "starts from" in text and "Hugging Face" in text
    found = re.findall(r"^the (new text|old kind of text): ([\d.]+) bits per byte before, ([\d.]+) after", text, re.M)
    bits = {kind: (float(before), float(after)) for kind, before, after in found}
    assert bits["new text"][1] < bits["new text"][0] - 0.5
    assert bits["old kind of text"][1] < bits["old kind of text"][0] + 1
    again = output_of(papermill_run("04_scifi_train", tmp_path, **parameters, checkpoint_dir="auto"))
    assert "it is shown, not trained" in again and "bits per byte before" in again
    with pytest.raises(PapermillExecutionError, match="started from .*hf; leave out init_from"):
        papermill_run("04_scifi_train", tmp_path, **parameters | {"init_from": str(trained)}, checkpoint_dir="auto")
