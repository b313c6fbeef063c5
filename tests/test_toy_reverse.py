"""The toy task asks what it says, and is scored honestly."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcore.dataset import IGNORED
from llmcore.notebook import toy_reverse
from tests.helpers import tiny_model

SYMBOLS = string.ascii_letters + string.digits


@given(st.text(SYMBOLS, min_size=1, max_size=32))
def test_strings_survive_encoding(text: str) -> None:
    assert toy_reverse.decode(toy_reverse.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "word"), [("", "0 characters"), ("a" * 33, "33 characters"), ("a b", "' '"), ("三", "'三'")]
)
def test_what_the_task_cannot_spell_is_refused_by_name(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        toy_reverse.encode(text)


def test_each_row_is_string_separator_reverse_and_trains_the_reverse() -> None:
    x, y = toy_reverse.ReverseData().batch(step=3, batch_size=200)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (200, toy_reverse.ReverseData.context_size)
    seen = set()
    for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
        length = inputs.index(toy_reverse.SEPARATOR) - 1
        symbols = inputs[1 : 1 + length]
        answer = [*symbols[::-1], toy_reverse.EOS]
        padding = len(inputs) - 2 * length - 2
        assert inputs[0] == toy_reverse.BOS and min(symbols) >= toy_reverse.FIRST_SYMBOL
        assert targets == [IGNORED] * (length + 1) + answer + [IGNORED] * padding
        assert inputs[length + 2 : 2 * length + 2] == answer[:-1]
        seen.add(length)
    assert min(seen) < 4 and max(seen) == 32


def test_batches_are_a_pure_function_of_step_and_seed() -> None:
    one, other = toy_reverse.ReverseData(), toy_reverse.ReverseData()
    other.batch(5, 8)
    assert torch.equal(one.batch(7, 8, seed=1)[0], other.batch(7, 8, seed=1)[0])
    assert not torch.equal(one.batch(7, 8, seed=1)[0], one.batch(8, 8, seed=1)[0])
    assert not torch.equal(one.batch(7, 8, seed=1)[0], one.batch(7, 8, seed=2)[0])


def test_test_strings_come_from_a_stream_that_training_does_not_use() -> None:
    tested = set(toy_reverse.random_strings(2000, 32, seed=0))
    assert len(tested) == 2000
    data = toy_reverse.ReverseData()
    batches = [data.batch(step, 500)[0] for step in range(20)] + [x for x, _ in data.sequential(500)]
    trained = {toy_reverse.decode(row[1:33]) for x in batches for row in x.tolist() if row[33] == toy_reverse.SEPARATOR}
    assert len(trained) > 500
    assert not tested & trained


def test_exact_match_is_the_share_of_whole_answers() -> None:
    """A model that has only learnt to copy single characters is right about all of those, and about nothing longer."""
    model = tiny_model(vocab_size=toy_reverse.VOCAB_SIZE, max_seq_len=80)
    single = [[*toy_reverse.question(symbol), *toy_reverse.encode(symbol)] for symbol in SYMBOLS]
    x = torch.tensor(single)
    y = torch.cat([x[:, 1:], torch.full((len(x), 1), toy_reverse.EOS)], dim=1)
    y[:, :2] = IGNORED
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    model.eval()
    long = toy_reverse.random_strings(62, 32, seed=0)
    assert toy_reverse.exact_match(model, list(SYMBOLS)) == 1.0
    assert toy_reverse.exact_match(model, long) == 0.0
    assert toy_reverse.exact_match(model, [*SYMBOLS, *long]) == 0.5


def test_answers_are_what_the_model_says_one_token_at_a_time() -> None:
    model = tiny_model(std=0.3, vocab_size=toy_reverse.VOCAB_SIZE, max_seq_len=80).eval()
    texts = ["abc", "x", "Hello42", "q" * 32]
    for text, answer in zip(texts, toy_reverse.answers(model, texts), strict=True):
        ids = toy_reverse.question(text)
        for _ in range(toy_reverse.MAX_LENGTH + 1):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert answer == toy_reverse.decode(ids[len(text) + 2 :])


def test_random_strings_have_their_length_and_all_symbols() -> None:
    texts = toy_reverse.random_strings(300, 32, seed=4)
    assert {len(text) for text in texts} == {32}
    assert set("".join(texts)) == set(SYMBOLS)
    counts = np.array([("".join(texts)).count(symbol) for symbol in SYMBOLS])
    assert counts.min() > 100  # about 155 each


@pytest.mark.parametrize("prompt", ["", "x" * 33, "no space", "曹操"])
def test_a_prompt_that_cannot_be_reversed_is_refused_by_name(prompt: str) -> None:
    with pytest.raises(ValueError, match="^prompt cannot be reversed: "):
        toy_reverse.check_prompt(prompt)


def test_repetitive_strings_have_few_symbols_and_differ_from_each_other() -> None:
    texts = toy_reverse.repetitive_strings(500, 12, 3, seed=0)
    assert {len(text) for text in texts} == {12} and max(len(set(text)) for text in texts) == 3
    assert set("".join(texts)) == set(SYMBOLS) and len(set(texts)) == 500
    assert texts != toy_reverse.repetitive_strings(500, 12, 3, seed=1)


def test_half_of_the_training_strings_use_few_symbols_and_half_may_be_short() -> None:
    x, _ = toy_reverse.ReverseData().batch(step=0, batch_size=4000)
    rows = [row[1 : row.index(toy_reverse.SEPARATOR)] for row in x.tolist()]
    assert 0.4 < np.mean([len(row) < 32 for row in rows]) < 0.55
    for long in (True, False):  # among the strings of full length and among the short ones
        different = np.array([len(set(row)) for row in rows if (len(row) == 32) == long and len(row) > 16])
        assert 0.4 < np.mean(different <= max(toy_reverse.FEW_SYMBOLS)) < 0.6
        assert (different <= 2).sum() > 0.08 * len(different)


def test_a_probe_keeps_what_it_saw_at_each_validation() -> None:
    model = tiny_model(std=0.3, vocab_size=toy_reverse.VOCAB_SIZE, max_seq_len=80).eval()
    texts = toy_reverse.random_strings(20, 3, seed=0)
    probe = toy_reverse.Probe(model, texts, "ab")
    without, event = {"step": 1}, {"step": 2, "val_loss": 3.0}
    probe(without)
    probe(event)
    assert without == {"step": 1} and event["exact_match"] == toy_reverse.exact_match(model, texts)
    assert [*probe.by_place] == [*probe.weights] == [2]
    ids = torch.tensor([[*toy_reverse.question("ab"), *toy_reverse.encode("ba")]])
    assert torch.equal(probe.weights[2], model.attention_weights(ids)[:, 0])


def test_accuracy_by_place_counts_a_missing_character_as_wrong() -> None:
    shares = toy_reverse.right_by_place(["abc", "ab", "xbc", ""], ["abc"] * 4)
    assert shares.tolist() == [0.5, 0.75, 0.5]
