"""What a text shares with the training tokens, how far a model recites, and how much a text repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcore.checkpoint import Checkpoint
from llmcore.corpus.token_files import finish_split, write_manifest
from llmcore.dataset import FORMAT_VERSION, DatasetError, TokenDataset
from llmcore.measure import memorised
from llmcore.measure.compare_runs import summarize
from llmcore.measure.memorised import (
    Memory,
    Run,
    begins_to_recall,
    data_of,
    forced_recall,
    held_out_prompts,
    longest,
    passages,
    recited,
    share,
    source,
)
from llmcore.measure.repetition import distinct, longest_loop, nearest, repeated_lines, repetition
from llmcore.model import Transformer
from llmcore.notebook import recitation
from llmcore.notebook.run_page import write_summary
from llmcore.tokenizer import Tokenizer
from tests.helpers import examples, quick, tiny_model, trainer

EOS = 0


def every_run(text: Sequence[int], tokens: Sequence[int], least: int, eos_id: int | None) -> list[tuple[int, int]]:
    """By trying every pair of places: the runs that are not within another."""
    longest = []
    for start in range(len(text)):
        sizes = [0]
        for place in range(len(tokens)):
            size = 0
            while (
                start + size < len(text)
                and place + size < len(tokens)
                and text[start + size] == tokens[place + size] != eos_id
            ):
                size += 1
            sizes.append(size)
        longest.append(max(sizes))
    spans = [(start, start + size) for start, size in enumerate(longest) if size >= least]
    return [span for span in spans if not any(a <= span[0] and span[1] <= b and (a, b) != span for a, b in spans)]


# tokens and texts of the kinds that mislead: few different tokens, one token, a short piece again and again
few = st.integers(1, 3).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=40))
loops = st.builds(
    lambda piece, times: piece * times, st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(1, 12)
)
streams = st.one_of(few, loops, st.builds(list.__add__, loops, few), st.builds(list.__add__, few, loops))


@settings(max_examples=examples(400), deadline=None)
@given(
    tokens=streams,
    texts=st.lists(streams, max_size=3),
    least=st.integers(1, 9),
    eos_id=st.sampled_from([None, EOS]),
    dtype=st.sampled_from([np.uint16, np.uint32]),
    # small blocks, so that runs lie across their borders; a multiplier of 0 gives every window the same hash
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4)),
    multiplier=st.sampled_from([memorised.MULTIPLIER, 1, 0]),
)
@example([1, 2, 9], [[1, 2, 3], [1, 2, 4]], 2, None, np.uint16, (8, 4, 4), 1)  # the first is not a neighbour
@example([1, 2, 0], [[1, 2, 3], [1, 2, 4]], 2, None, np.uint16, (8, 4, 4), 1)  # nor the second here
@example([1] * 40, [[1] * 30, [1] * 31], 8, None, np.uint16, (8, 4, 4), 0)
@example([1, 2] * 9 + [0] + [2, 1] * 9, [[2, 1] * 9], 8, EOS, np.uint32, (1, 1, 1), 1)
def test_the_runs_are_those_that_every_pair_of_places_has(
    tokens: list[int],
    texts: list[list[int]],
    least: int,
    eos_id: int | None,
    dtype: Any,
    sizes: tuple[int, int, int],
    multiplier: int,
) -> None:
    stored = np.array(tokens, dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("BLOCK", "LOOKED_UP", "STRIDE"), sizes, strict=True):
            patch.setattr(memorised, name, size)
        patch.setattr(memorised, "MULTIPLIER", multiplier)
        runs = recited(texts, stored, least, eos_id=eos_id)
    for text, found in zip(texts, runs, strict=True):
        assert [(run.start, run.end) for run in found] == every_run(text, tokens, least, eos_id)
        for start, end, place in found:
            assert stored[place : place + end - start].tolist() == text[start:end]
    expected = {
        position for number, found in enumerate(runs) for run in found for position in
        ((number, at) for at in range(run.start, run.end))
    }  # fmt: skip
    assert share(runs, [len(text) for text in texts], least) == len(expected) / max(1, sum(map(len, texts)))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_largest_ids_and_both_ends_of_the_tokens_are_found(dtype: Any) -> None:
    last = int(np.iinfo(dtype).max)
    tokens = np.random.default_rng(0).integers(last + 1, size=3 * memorised.LOOKED_UP, dtype=dtype)
    tokens[-3:] = last
    first, end = tokens[:50].tolist(), tokens[-50:].tolist()
    assert recited([[5, *first], [*end, last, 5]], tokens) == [[Run(1, 51, 0)], [Run(0, 50, len(tokens) - 50)]]


def test_runs_across_the_borders_of_the_blocks_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(60_000, size=1000).astype(np.uint16)
    monkeypatch.setattr(memorised, "BLOCK", 100)
    text = tokens[150:550].tolist()
    assert recited([text], tokens) == [[Run(0, 400, 150)]]
    for start in range(90, 102):
        assert recited([tokens[start : start + 8].tolist()], tokens) == [[Run(0, 8, start)]]


def test_a_stream_and_a_text_of_one_token_take_no_longer() -> None:
    """There are 10^8 pairs of places with 49 tokens to compare; one for each place takes part of a second."""
    tokens = np.zeros(10_000, np.uint16)
    tokens[::50] = 1
    [runs] = recited([[0] * 10_000], tokens, 8)
    assert len(runs) == 10_000 - 48 and all(run.end - run.start == 49 for run in runs)


def test_what_cannot_be_looked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="least=0 must be 1 or more"):
        recited([[1]], np.zeros(9, np.uint16), 0)
    monkeypatch.setattr(memorised, "LONGEST_TEXT", 9)
    with pytest.raises(ValueError, match="10 tokens, more than 9: look at fewer"):
        recited([[1] * 9], np.zeros(9, np.uint16))
    assert recited([], np.zeros(9, np.uint16)) == [] and recited([[]], np.zeros(0, np.uint16)) == [[]]


# On a data set


def write(folder: Path, train: Sequence[Sequence[int]], val: Sequence[Sequence[int]], vocab_size: int = 37) -> Path:
    """A data set of these documents, named 0, 1, …; each gets its eos."""
    folder.mkdir()
    splits, sources = {}, []
    for split, documents in (("train", train), ("val", val)):
        ids = [id for document in documents for id in (*document, EOS)]
        np.array(ids, "<u2").tofile(folder / f"{split}.bin")
        splits[split] = {**finish_split(folder, split, [len(each) + 1 for each in documents]), "bytes": len(ids)}
        for document in documents:
            name = {"path": f"{split}-{len(sources)}", "sha256": "0" * 64, "split": split}
            sources.append({**name, "tokens": len(document) + 1})
    described = {"format_version": FORMAT_VERSION, "dtype": "<u2", "vocab_size": vocab_size}
    write_manifest(folder, {**described, "splits": splits, "sources": sources})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = np.random.default_rng(0)
    train, val = ([chance.integers(1, 37, size).tolist() for size in sizes] for sizes in ((90, 70, 5), (80, 40)))
    return write(tmp_path_factory.mktemp("memorised") / "d", train, val)


def test_a_run_has_its_documents_name_and_ends_with_it(folder: Path) -> None:
    data = TokenDataset(folder, "train", 8)
    across = data.read(80, 110).tolist()  # the first document ends after 90 tokens, and its eos is the 91st
    [runs] = recited([across], data, eos_id=EOS)
    assert runs == [Run(0, 10, 80), Run(11, 30, 91)]
    assert [source(data, run.place) for run in runs] == [("train-0", 80), ("train-1", 0)]
    assert longest([[], runs]) == (1, Run(11, 30, 91)) and longest([[], []]) is None
    assert recited([across], data) == [[Run(0, 30, 80)]]  # unless nobody says what ends a document


def test_damaged_tokens_are_not_looked_at(folder: Path, tmp_path: Path) -> None:
    copy = write(tmp_path / "d", [[1, 2, 3] * 20], [[4] * 30])
    raw = bytearray((copy / "train.bin").read_bytes())
    raw[10] ^= 1
    (copy / "train.bin").write_bytes(raw)
    with pytest.raises(DatasetError, match="damaged"):
        recited([[1, 2, 3] * 4], TokenDataset(copy, "train", 8))


def test_a_plain_text_is_found_but_for_tokens_at_its_ends(tokenizer: Tokenizer, sanguo: Path) -> None:
    chapter = (sanguo / "037.txt").read_text(encoding="utf-8")
    tokens = np.array(tokenizer.encode(chapter), np.uint16)
    for start in range(0, 3000, 101):
        ids = tokenizer.encode(chapter[start : start + 60])
        [[run, *others]] = recited([ids], tokens)
        assert run.start <= 3 and run.end >= len(ids) - 3 and not others, chapter[start : start + 60]


def test_a_checkpoints_data_set_is_found_by_its_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcore.files.PROJECT_ROOT", tmp_path)
    datasets = tmp_path / "outputs" / "datasets"
    datasets.mkdir(parents=True)
    other, own = (write(datasets / name, [[1, 2, last] * 9], [[4] * 30]) for name, last in (("a", 3), ("b", 4)))
    (datasets / "damaged").mkdir()
    (datasets / "damaged" / "meta.json").write_text("{")
    splits = TokenDataset(own, "train", 8).manifest["splits"]
    config = {"data": {split: counts["sha256"] for split, counts in splits.items()}}
    checkpoint = Checkpoint(tiny_model(), None, config, 1, tmp_path)
    assert data_of(checkpoint) == own and data_of(checkpoint, other) == other
    assert data_of(Checkpoint(tiny_model(), None, {}, 1, tmp_path)) is None


def test_a_data_set_of_another_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", [[1] * 9], [[1] * 9])
    checkpoint = Checkpoint(tiny_model(), tokenizer, {}, 1, tmp_path)
    with pytest.raises(DatasetError, match="made with another tokenizer than the checkpoint"):
        data_of(checkpoint, folder)


def test_passages_lie_within_documents_and_over_the_split(folder: Path) -> None:
    data = TokenDataset(folder, "train", 8)
    found = passages(data, 30, 60)
    assert len(found) == 30 and {len(each) for each in found} == {60} and all(EOS not in each for each in found)
    assert found[0] == data.read(0, 60).tolist() and found[-1] == data.read(91 + 10, 91 + 70).tolist()
    assert len(passages(data, 1000, 60)) == 31 + 11  # all there are
    assert {len(each) for each in passages(data, 9, 1000)} == {90}  # as long as the longest document
    prompts, rest = held_out_prompts(TokenDataset(folder, "val", 8), 4)
    assert {(len(a), len(b)) for a, b in zip(prompts, rest, strict=True)} == {(32, 48)}


def learned(folder: Path, steps: int) -> Transformer:
    """A small model that has read the training split again and again."""
    model, data = tiny_model(dim=64, hidden_dim=96, max_seq_len=64), TokenDataset(folder, "train", 48)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        loss = model(*data.batch(step, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_model_that_knows_the_text_by_heart_is_found_out(folder: Path) -> None:
    train, val = (TokenDataset(folder, split, 48) for split in ("train", "val"))
    model, new = learned(folder, 150), tiny_model(max_seq_len=64)
    known, guessed = (forced_recall(model, data, (8, 32, 128), 60) for data in (train, val))
    assert list(known) == [8, 32]  # 128 do not fit into the context
    assert known[32].whole > 0.5 and known[32].tokens > 10 and guessed[32].whole == 0 and guessed[32].tokens < 3
    assert forced_recall(new, train, (8,), 60)[8].tokens < 3

    measured, untrained = Memory(model, train, val, 10).measure(), Memory(new, train, val, 10).measure()
    assert measured["recited"] > 0.05 and measured["recited_floor"] == 0 == untrained["recited"]
    assert measured["recall"] > 10 > 3 > measured["recall_floor"] and untrained["recall"] < 3


def test_recall_counts_up_to_the_first_wrong_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TokenDataset(folder, "train", 8)
    texts = passages(data, 2, 12)
    answers = [texts[0][-4:], [*texts[1][-4:-2], 36 - texts[1][-2], texts[1][-1]]]
    monkeypatch.setattr(memorised, "generate_ids", lambda *_, **__: zip(*answers, strict=True))
    assert forced_recall(tiny_model(), data, (8,), 2, 4) == {8: (0.5, 3.0, pytest.approx(1.0))}


def test_a_run_is_measured_five_times_and_a_short_one_at_its_end(folder: Path, tmp_path: Path) -> None:
    train, val = (TokenDataset(folder, split, 8) for split in ("train", "val"))
    model = tiny_model(max_seq_len=64)
    memory = Memory(model, train, val, 11, texts=2, passages=3)
    run = trainer(tmp_path / "run", quick(max_steps=11), model, callbacks=[memory])
    events = [event for event in run.steps() if "recited" in event]
    assert [event["step"] for event in events] == [11]
    assert {"recited_floor", "recall", "recall_floor", "recall_error", "distinct", "distinct_floor"} < events[0].keys()
    row, page = summarize([tmp_path / "run"])[0], write_summary(tmp_path / "run").read_text(encoding="utf-8")
    distinct_pairs = f"{events[-1]['distinct']:.1%} ({events[-1]['distinct_floor']:.1%})"
    assert row["distinct pairs (held-out text)"] == distinct_pairs and row["recited (held-out text)"].endswith("%)")
    assert f"({events[-1]['distinct_floor']:.1%})" in page.replace("\\", "")

    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    event = {"step": 11}
    memory(event)
    assert event == {"step": 11}


@pytest.mark.parametrize(("max_steps", "steps"), [(50, [10, 20, 30, 40, 50]), (52, [10, 20, 30, 40, 50, 52]), (4, [4])])
def test_the_steps_that_are_measured_are_fifths_of_a_run(folder: Path, max_steps: int, steps: list[int]) -> None:
    val = TokenDataset(folder, "val", 8)
    memory = Memory(tiny_model(max_seq_len=64), val, val, max_steps, texts=1, passages=1)
    events: list[dict[str, Any]] = [{"step": step} for step in range(1, max_steps + 1)]
    for event in events:
        memory(event)
    assert [event["step"] for event in events if "recited" in event] == steps


def test_learning_by_heart_begins_where_it_stays() -> None:
    def event(step: int, more: float) -> dict[str, float]:
        return {"step": step, "recall": 1 + more, "recall_floor": 1.0, "recall_error": 0.1}

    events = [event(1, 0.3), event(2, 0.2), {"step": 3, "loss": 1.0}, event(4, 0.21), event(5, 0.9)]
    assert begins_to_recall(events) == 4
    assert begins_to_recall(events[:2]) is None and begins_to_recall([]) is None


# Repetition


def test_distinct_is_the_share_of_different_n_grams() -> None:
    assert distinct([[1, 2, 1, 2], [2, 1]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [2, 1]], 2) == 2 / 4  # no pair goes from one text to the next
    assert distinct([[1]], 2) == 1.0


@pytest.mark.parametrize(
    ("ids", "size"),
    [([], 0), ([1, 2, 3], 0), ([1, 1], 2), ([9, 1, 2, 3, 1, 2, 3, 1, 8], 7), ([1, 2, 3, 4, 1, 2, 3], 0), ([5] * 6, 6)],
)
def test_the_longest_loop_is_a_piece_twice_in_a_row(ids: list[int], size: int) -> None:
    assert longest_loop(ids) == size


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.integers(0, 2), max_size=20))
def test_the_longest_loop_is_that_of_every_stretch(ids: list[int]) -> None:
    def is_loop(stretch: list[int]) -> bool:
        return any(stretch[period:] == stretch[:-period] for period in range(1, len(stretch) // 2 + 1))

    stretches = [ids[start:end] for start in range(len(ids)) for end in range(start, len(ids) + 1)]
    assert longest_loop(ids) == max((len(each) for each in stretches if is_loop(each)), default=0)


def test_lines_and_sentences_that_stood_before_are_counted() -> None:
    assert repeated_lines(["玄德大喜。孔明笑曰。玄德大喜。", "玄德大喜。"]) == 1 / 4
    assert repeated_lines(["He went home. He went home.\nHe went home", "a\na\na"]) == 2 / 3  # short lines do not count
    assert repeated_lines(["1.5 and 1.5 and"]) == 0 == repeated_lines([])
    assert repetition([[1, 1]], ["abcd\nabcd"]) == ((0.5, 1.0, 1.0, 1.0), 2, 0.5)


# The page


def test_a_page_marks_each_run_and_shows_where_it_stands(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode("玄德曰：“此人<b>何在？”孔明笑曰：“只在此山中，云深不知处。”")
    train = [tokenizer.encode("却说" * 9), ids]
    data = TokenDataset(write(tmp_path / "d", train, [ids], tokenizer.vocab_size), "train", 8)
    text = [*tokenizer.encode("一"), *ids[3:], *tokenizer.encode("一")]
    [runs] = recited([text], data, eos_id=EOS)
    html = recitation.page(tokenizer, "a page", text, runs, data, 8)
    assert html.count("[1]</sup>") == 1 and html.count("<details>") == 1 and "<b>何在" not in html
    assert f"[1] {len(ids) - 3} tokens of train-1, from its token 3 on" in html
    assert "no run of so many tokens" in recitation.page(tokenizer, "a page", text, [], data, 8)


@pytest.mark.parametrize(("first", "second", "border"), [((0, 3), (2, 10), 2), ((0, 8), (6, 10), 8)])
def test_of_two_runs_that_overlap_the_longer_has_the_tokens(
    tokenizer: Tokenizer, first: tuple[int, int], second: tuple[int, int], border: int
) -> None:
    ids = [id for character in "曰之人兵大来不为有将" for id in tokenizer.encode(character)]
    html = recitation.marked(tokenizer, ids, [Run(*first, 0), Run(*second, 50)])
    assert f">{tokenizer.decode(ids[:border])}</ins><sup>[1]</sup>" in html
    assert f">{tokenizer.decode(ids[border:])}</ins><sup>[2]</sup>" in html


def test_the_nearest_setting_is_nearest_in_shares_of_the_target() -> None:
    points = {"surprise off by 4%": (5.2, 0.5), "repetition off by 8%": (5.0, 0.54)}
    assert nearest(points, (5.0, 0.5)) == "surprise off by 4%"  # though 0.2 nats are more than 0.04
    assert nearest({"far": (9.0, 0.1), "itself": (5.0, 0.5)}, (5.0, 0.5)) == "itself"
