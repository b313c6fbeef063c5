"""The tokenizer loses nothing, whatever it is given, and says in plain words what it cannot do."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcore.corpus.library import open_library
from llmcore.corpus.texts import cut_text, find_texts, read_text, split_long
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.tokenizer import Tokenizer, TokenizerError

from .helpers import examples

STRANGE = [
    "",
    " ",
    "  two  spaces ",
    "\t\ttab\t",
    "\u3000ideographic",
    "\r\n",
    "\n\n \n",
    "\x00",
    "▁",
    " ▁ ▁▁",
    "▅",
    "⁇",
]
STRANGE += [
    "<s> </s> <unk> <pad>",
    "<0x41><0x0A>",
    "，。！？：“”",
    "ＡＢＣ１２３",
    "e\u0301 ﬁ",
    "👩\u200d🚀 🐉",
    "龘䶮𠮷",
    "\ufeffx",
]


def test_every_chapter_comes_back_unchanged(tokenizer: Tokenizer, sanguo: Path) -> None:
    texts = [read_text(file) for file in find_texts(sanguo)]
    assert len(texts) == 120
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


@pytest.mark.parametrize("text", STRANGE)
def test_strange_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@settings(deadline=None, max_examples=examples(300))
@given(st.text())
def test_any_unicode_comes_back_unchanged_and_never_as_special_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)


@settings(deadline=None, max_examples=examples(100))
@given(st.lists(st.text(alphabet="曹操曰，。\n a▁\t龘", max_size=12), max_size=5))
def test_a_batch_encodes_like_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_document_encodes_like_its_lines(tokenizer: Tokenizer, sanguo: Path) -> None:
    text = read_text(sanguo / "001.txt")
    lines = [id for line in re.findall("[^\n]*\n", text) for id in tokenizer.encode(line)]
    assert tokenizer.encode(text) == lines


def test_special_ids_are_fixed_and_the_newline_is_one_symbol(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.encode("曹\n\n", bos=True, eos=True)[0] == 2
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    assert tokenizer.encode("\n\n\n") == newline * 3
    assert tokenizer.decode([2, *newline, 3, 0]) == "\n"


@settings(deadline=None, max_examples=examples(100))
@given(st.lists(st.integers(0, 3999), max_size=40))
def test_any_ids_decode_to_the_bytes_of_their_pieces(tokenizer: Tokenizer, ids: list[int]) -> None:
    raw = b"".join(tokenizer.id_to_bytes(id) for id in ids)
    assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")


@pytest.mark.parametrize("id", [-1, 4000, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, id: int) -> None:
    with pytest.raises(ValueError, match=str(id)):
        tokenizer.decode([5, id])


@pytest.mark.parametrize("text", ["", "却说曹操", "a ▁ b▁", "é\n\U0001f600"])
def test_ids_are_the_same_where_sentencepiece_has_no_arrays(
    text: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Release 0.2.1, which hosted notebooks have, hands over lists."""
    expected = tokenizer.encode_array(text)
    monkeypatch.setattr("llmcore.tokenizer._IDS_AS", int)
    ids = tokenizer.encode_array(text)
    assert ids.dtype == expected.dtype == np.int32
    assert ids.tolist() == expected.tolist()


def test_half_a_surrogate_pair_is_refused_in_words(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_training_twice_gives_the_same_bytes(english: Path, tmp_path: Path) -> None:
    files = find_texts(english)
    models = [train_tokenizer(files, tmp_path / name, 400).model_bytes for name in ("a", "b")]
    assert models[0] == models[1]


def test_a_line_over_the_limit_is_split_not_dropped(tmp_path: Path) -> None:
    words = [f"word{number} and so on. " for number in range(300)] + ["zyzzyva zyzzyva "] * 200
    (tmp_path / "one-line.txt").write_text("".join(words), encoding="utf-8")
    tokenizer = train_tokenizer([tmp_path / "one-line.txt"], tmp_path / "t", 330, max_sentence_length=200)
    assert any("zyzzyva" in tokenizer.id_to_piece(id) for id in range(tokenizer.vocab_size))


@settings(deadline=None, max_examples=examples(200))
@given(st.text(alphabet="aé曹𠮷。.?!", max_size=80), st.integers(4, 40))
def test_split_lines_add_up_fit_and_end_with_sentences_where_they_can(line: str, limit: int) -> None:
    parts = list(split_long(line, limit))
    assert "".join(parts) == line
    assert all(len(part.encode()) <= limit for part in parts)
    for part in parts[:-1]:
        assert part[-1] in ".?!。" or not set(part) & set(".?!。")


@pytest.mark.parametrize(("size", "coverage"), [(300, 0.9995), (2000, 0.9995), (2400, 0.999), (4000, 1.0)])
def test_the_advice_for_a_small_vocabulary_works(sanguo: Path, tmp_path: Path, size: int, coverage: float) -> None:
    files = find_texts(sanguo)
    with pytest.raises(TokenizerError) as error:
        train_tokenizer(files, tmp_path / "t", size, character_coverage=coverage)
    message = str(error.value)
    larger = re.search(r"Set vocab_size to (\d+) or more", message)
    assert larger, message
    assert train_tokenizer(files, tmp_path / "a", int(larger[1]), character_coverage=coverage)
    if lower := re.search(r"character_coverage to ([\d.]+) or less", message):
        assert train_tokenizer(files, tmp_path / "b", size, character_coverage=float(lower[1]))
    if both := re.search(r"or to (\d+) or more with character_coverage=([\d.]+)", message):
        assert train_tokenizer(files, tmp_path / "c", int(both[1]), character_coverage=float(both[2]))
    assert not (tmp_path / "t.model").exists()


def test_the_advice_for_a_large_vocabulary_works(english: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as error:
        train_tokenizer(find_texts(english), tmp_path / "t", 50_000)
    smaller = re.search(r"set vocab_size to (\d+) or less", str(error.value))
    assert smaller, str(error.value)
    assert train_tokenizer(find_texts(english), tmp_path / "t", int(smaller[1])).vocab_size == int(smaller[1])


def test_nothing_to_learn_from_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(TokenizerError, match="empty: nothing to learn from"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "t", 400)


@pytest.mark.parametrize("model_type", ["word", "char", "BPE", "wordpiece"])
def test_a_kind_of_tokenizer_that_may_lose_spaces_is_refused(model_type: str, english: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=f"model_type='{model_type}' must be bpe or unigram"):
        train_tokenizer(find_texts(english), tmp_path / "t", 300, model_type=model_type, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_coverage_out_of_range_is_an_error(english: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"character_coverage=0\.5"):
        train_tokenizer(find_texts(english), tmp_path / "t", 400, character_coverage=0.5)


@settings(deadline=None, max_examples=examples(60))
@given(st.one_of(st.binary(max_size=200), st.integers(0, 5000)))
def test_a_broken_model_file_is_an_error_or_still_a_tokenizer(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, damage: bytes | int
) -> None:
    file = tmp_path_factory.mktemp("model") / "t.model"
    file.write_bytes(damage if isinstance(damage, bytes) else tokenizer.model_bytes[:damage])
    try:
        assert Tokenizer(file).vocab_size > 0
    except TokenizerError as error:
        assert str(file) in str(error)


def test_a_missing_model_file_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer_model_file.*01_tokenize"):
        Tokenizer(tmp_path / "no.model")


CORPORA = {
    "no spaces, no newlines": "却说曹操引军而还。刘备关羽张飞三人。" * 30,
    "a few spaces, too rare for a piece": "却说曹操引军而还。刘备关羽张飞三人。" * 400 + " b",
    "one character": "a" * 500,
    "spaces": " " * 300,
    "white space": " \u3000\t\n\r" * 100,
    "U+2581": "▁" * 300,
    "U+2581 in words": "▁a b▁c ▁▁ " * 100,
    "tabs": "\ta\tb\tc" * 100,
    "U+2028": "a\u2028b\u2028c\u2029\u0085" * 100,
    "names of special pieces": "<s>hi</s> <unk> <pad> <0x41>\n" * 100,
    "NUL and control characters": "a\0b\x1b[31mc\x7f" * 100,
    "English": "the cat sat on the mat. the dog did not. " * 40,
}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def odd_tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """For each odd corpus, the smallest and the largest tokenizer that can be trained on it, as the advice says."""
    folder, trained = tmp_path_factory.mktemp("odd"), {}
    for name, text in CORPORA.items():
        (folder / "corpus.txt").write_text(text, encoding="utf-8", newline="")
        texts = open_library(folder, encoding="utf-8", clean=False).documents
        for vocab_size, advice in (
            (261, r"Set vocab_size to (\d+) or more"),
            (9999, r"set vocab_size to (\d+) or less"),
        ):
            with pytest.raises(TokenizerError) as error:
                train_tokenizer(texts, folder / "t", vocab_size, model_type=request.param, progress=False)
            [size] = re.findall(advice, str(error.value))
            trained[f"{name}, {size}"] = train_tokenizer(
                texts, folder / "t", int(size), model_type=request.param, progress=False
            )
    return trained


@settings(deadline=None, max_examples=examples(60))
@given(st.one_of(st.text(max_size=30), st.text(alphabet=" ▁\u3000a\t曹\0\u2028<s>", max_size=30)))
@example("Hello world")
@example(" ▁ ▁▁ ")
@example("<s> </s> <0x20>\r\n")
def test_any_text_survives_a_tokenizer_of_any_corpus(odd_tokenizers: dict[str, Tokenizer], text: str) -> None:
    for corpus, tokenizer in odd_tokenizers.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, corpus
        assert tokenizer.encode_batch([text, ""]) == [ids, []], corpus
        assert tokenizer.encode_array(text).tolist() == ids, corpus
        assert "".join(stream_of(tokenizer, ids)) == text, corpus


def stream_of(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """Text as it is streamed, byte by byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return (decoder.decode(tokenizer.id_to_bytes(id)) for id in ids)


@settings(deadline=None, max_examples=examples(60))
@given(st.text(alphabet=" ▁ab曹却说\n", max_size=40), st.integers(1, 6))
def test_a_tokenizer_without_spaces_may_be_cut_at_safe_places(
    odd_tokenizers: dict[str, Tokenizer], text: str, size: int
) -> None:
    for corpus, tokenizer in odd_tokenizers.items():
        pairs = tokenizer.inner_pairs()
        parts = list(cut_text([text], pairs, size))
        if all(a[-1] + b[0] not in pairs for a, b in pairwise(parts)):
            assert [id for part in parts for id in tokenizer.encode(part)] == tokenizer.encode(text), corpus


def test_a_space_without_a_piece_is_its_byte_and_no_other(odd_tokenizers: dict[str, Tokenizer]) -> None:
    without = [tokenizer for tokenizer in odd_tokenizers.values() if not tokenizer.has_space_piece]
    assert len(without) > 5
    for tokenizer in without:
        assert [tokenizer.id_to_piece(id) for id in tokenizer.encode(" ▁")] == ["<0x20>", "<0xE2>", "<0x96>", "<0x81>"]
    for name, tokenizer in odd_tokenizers.items():
        if name.startswith(("English", "spaces")):
            assert tokenizer.has_space_piece
            assert not any(map(tokenizer.is_byte, tokenizer.encode("  ")))


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff", "▁\udfff "])
def test_half_a_surrogate_pair_is_refused_in_a_batch_too(tokenizer: Tokenizer, text: str) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_array, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            encode(text)
