"""Copies: found by the passages that two texts share, however the text is cut, wrapped or read, and no others."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcore.corpus import duplicates, hash_table
from llmcore.corpus.duplicates import Copies, Overlap, PassageReader, find_copies, find_overlaps
from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.texts import find_texts, read_text

from .benchmarks.duplicates import cut, with_advertisements, with_other_characters, with_other_punctuation, wrapped
from .helpers import examples

CHARACTERS = [chr(code) for code in range(0x4E00, 0x5600)]
ODD = "ab Aé ßﬁ中国ガｶﾞｶか一二三。，\n\u2581😀０1_'-ไท한글\u0301½②\u3000\r"


def new_text(seed: int, size: int = 2000) -> str:
    """Sentences of random letters, unlike those of any other seed."""
    chance = random.Random(seed)
    letters = "".join(chance.choices(CHARACTERS, k=size))
    return "\n".join(
        f"{letters[start : start + 17]}，{letters[start + 17 : start + 30]}。" for start in range(0, size, 30)
    )


def read_all(table: HashTable, texts: Sequence[str], block: int = 1000) -> list[int]:
    sizes = []
    for number, text in enumerate(texts):
        reader = PassageReader(table, number)
        for start in range(0, len(text), block):
            reader.read(text[start : start + block])
        sizes.append(reader.finish())
    return sizes


def copies_among(texts: Sequence[str], names: Sequence[str] | None = None) -> Copies:
    names = names or [f"{number:05d}" for number in range(len(texts))]
    hashes = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
    with HashTable() as table:
        return find_copies(table, read_all(table, texts), names, hashes)


def pairs_of(copies: Copies) -> set[tuple[int, int]]:
    return {(overlap.first, overlap.second) for overlap in copies.overlaps}


def rows_of(table: HashTable) -> set[tuple[int, int]]:
    return {tuple(row) for part in table.parts() for row in part.tolist()}


def passages_of(text: str) -> set[tuple[str, ...]]:
    """All passages of a text, slowly: eight words, or letters of scripts without spaces."""

    def letter(character: str) -> str:
        lower = character.lower()
        parts = [part for part in unicodedata.normalize("NFKD", lower) if part.isalnum()]
        return lower[0] if len(parts) > 1 else "".join(parts)

    alone = "".join(f"{chr(first)}-{chr(last)}" for first, last in duplicates.WITHOUT_SPACES)
    units: list[str] = []
    text = "".join(sign for sign in text if unicodedata.category(sign) not in ("Mn", "Mc", "Me", "Cf"))
    for run in re.findall(r"[^\W_]+", text):
        units += re.findall(f"[{alone}]|[^{alone}]{{1,64}}", "".join(map(letter, run)))
    return {tuple(units[start : start + 8]) for start in range(len(units) - 7)}


@pytest.fixture
def every_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sampled, and the shortest texts are compared."""
    monkeypatch.setattr(duplicates, "SAMPLED", 1)
    monkeypatch.setattr(duplicates, "LEAST_PASSAGES", 1)


# Passages


texts = st.lists(
    st.one_of(
        st.text(st.sampled_from(ODD), max_size=30),
        st.sampled_from(["那一日天色已晚众人", "it was a dark and stormy night, ", "x" * 63, "y" * 130, "\n" * 40]),
    ),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=examples(60))
@given(texts, texts, texts)
def test_shares_are_those_of_a_slow_count(start: str, middle: str, end: str) -> None:
    first, second = start + middle + end, middle + end + start[:10]
    with pytest.MonkeyPatch.context() as patch, HashTable() as table:
        patch.setattr(duplicates, "SAMPLED", 1)
        patch.setattr(duplicates, "LEAST_PASSAGES", 1)
        read_all(table, [first, second], 7)
        found = find_overlaps(table, [0, 1], 1e-9)
    theirs, ours = passages_of(first), passages_of(second)
    common = len(theirs & ours)
    assert found == ([Overlap(0, 1, common / len(ours))] if common else [])


@settings(deadline=None, max_examples=examples(200))
@given(texts, st.lists(st.integers(0, 40), max_size=12))
@example("x" * 200 + "那一日天色已晚众人", [63, 1, 64, 1])
@example("it was a dark and stormy night in the small town", [3, 1, 7, 0, 5])
def test_where_a_block_ends_makes_no_difference(text: str, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch, HashTable() as whole, HashTable() as parts:
        patch.setattr(duplicates, "SAMPLED", 1)
        letters = read_all(whole, [text], len(text) + 1)
        reader, place = PassageReader(parts, 0), 0
        for size in sizes:
            reader.read(text[place : place + size])
            place += size
        reader.read(text[place:])
        assert [reader.finish()] == letters
        assert rows_of(whole) == rows_of(parts)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("ｶﾞﾗｽﾉｳﾐﾆｵﾖｸﾞ", "ガラスノウミニオヨグ"),
        ("Ｔｈｅ ｏｌｄ captain saw 10 ships and no land", "the OLD captain\nsaw １０ ships — and “no” land"),
        ("那一日，天色已晚。众人", "　　那一日\n天色\u200b已晚！▁众😀人"),
        ("cafés à la carte are not so very cheap", "cafe\u0301s a\u0300 la carte are not so very cheap"),
    ],
)
def test_width_case_accents_and_signs_make_no_difference(every_passage: None, text: str, same: str) -> None:
    with HashTable() as one, HashTable() as other:
        read_all(one, [text])
        read_all(other, [same])
        assert rows_of(one) == rows_of(other) != set()


@pytest.mark.parametrize("text", ["", "字", "。", "\u2581" * 50, "😀" * 5000, "\ud800", "one two three", " \n" * 3000])
def test_a_text_without_a_passage_is_only_compared_exactly(text: str) -> None:
    found = copies_among([text, text, new_text(0), text + "字"])
    assert found.copy_of == [None, 0, None, None]
    assert found.overlaps == []


def test_a_row_of_the_same_letter_needs_little_room(every_passage: None) -> None:
    with HashTable() as table:
        read_all(table, ["哈" * 100_000, "x" * 100_000], 1000)
        assert sum(map(len, table.parts())) < 500


# The table


@settings(deadline=None, max_examples=examples(50))
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 70)))))
def test_a_table_on_disk_gives_back_its_rows_in_order(documents: list[tuple[int, list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch, HashTable() as small, HashTable() as large:
        for number, hashes in documents:
            small.add(number, np.array(hashes, np.uint64))
        patch.setattr(hash_table, "HELD_ROWS", 5)
        patch.setattr(hash_table, "PARTS", 3)
        for number, hashes in documents:
            large.add(number, np.array(hashes, np.uint64))
        expected = sorted((row, number) for number, hashes in documents for row in hashes)
        assert [row for part in small.parts() for row in part.tolist()] == expected
        for _ in range(2):  # it can be read again
            parts = [part.tolist() for part in large.parts()]
            assert all(part == sorted(part) for part in parts)
            assert sorted(row for part in parts for row in part) == expected
        large.add(1, np.array([7], np.uint64))  # and goes on
        assert sum(map(len, large.parts())) == len(expected) + 1


def test_threads_may_add_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_table, "HELD_ROWS", 100)
    with HashTable() as table, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: table.add(number, np.arange(number, number + 20, dtype=np.uint64)), range(200)))
        assert rows_of(table) == {(number + step, number) for number in range(200) for step in range(20)}


# What is found


@pytest.fixture(scope="module")
def books(sanguo: Path) -> list[str]:
    chapters = [read_text(file) for file in find_texts(sanguo)[:36]]
    return ["".join(chapters[start : start + 3]) for start in range(0, 36, 3)]


CHANCE = random.Random(0)
CHANGES: dict[str, Callable[[str], str]] = {
    "cut to half": lambda text: cut(text, 0.5, CHANCE),
    "advertisements": lambda text: with_advertisements(text, CHANCE),
    "wrapped": wrapped,
    "punctuation": with_other_punctuation,
    "variants": lambda text: with_other_characters(text, 0.05, CHANCE),
    "half new": lambda text: cut(text, 0.5, CHANCE) + new_text(len(text), len(text) // 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_copy_is_found_and_no_other_pair(books: list[str], change: str) -> None:
    found = copies_among([*books, *map(CHANGES[change], books)])
    assert {tuple(sorted(pair)) for pair in pairs_of(found)} == {(number, number + 12) for number in range(12)}
    assert sum(copy is not None for copy in found.copy_of) == 12
    assert sorted(found.groups) == sorted(2 * list(set(found.groups)))


def test_chapters_of_one_novel_are_not_alike(sanguo: Path) -> None:
    found = copies_among([read_text(file) for file in find_texts(sanguo)])
    assert found.overlaps == []
    assert found.groups == list(range(120))


def test_books_are_parts_of_a_collection(books: list[str]) -> None:
    found = copies_among([*books[:5], "".join(books[:3])])
    assert found.copy_of == [5, 5, 5, None, None, None]
    assert found.shares == [1, 1, 1, 0, 0, 0]
    assert found.groups == [5, 5, 5, 3, 4, 5]


def test_english_editions_are_found() -> None:
    words = [f"{first}{second}" for first in ("ba", "de", "fi", "go", "lu") for second in ("m", "n", "r", "st", "x")]

    def english(seed: int) -> str:
        return " ".join(random.Random(seed).choices(words, k=3000)).capitalize() + "."

    shouted = english(0).upper().replace(" ", "\n", 500)
    assert pairs_of(copies_among([english(0), english(1), shouted, english(1)[:9000]])) == {(0, 2), (1, 3)}


# Which one is kept


def test_the_longest_is_kept_then_the_shorter_name() -> None:
    text = new_text(0)
    names = ["b(1).txt", "b.txt", "a.txt.old", "a.txt"]
    assert copies_among([text] * 4, names).copy_of == [3, 3, 3, None]
    assert copies_among([text, text, text + "字", text], names).copy_of == [2, 2, None, 2]
    assert copies_among([text, "　" + text], ["b(1).txt", "b.txt"]).copy_of == [1, None]


def test_no_book_is_left_out_for_one_that_is_left_out() -> None:
    parts = [new_text(number, 600) for number in range(6)]
    longest = "".join(parts[:4])
    middle = "".join(parts[2:5])  # two thirds of it are in the longest
    last = parts[4] + parts[5][:300]  # two thirds of it are in the middle one, nothing in the longest
    found = copies_among([last, middle, longest])
    assert found.copy_of == [None, 2, None]
    assert found.groups == [2, 2, 2]
    assert found.shares[1] == pytest.approx(2 / 3, abs=0.1)


def test_two_books_that_a_third_joins_are_a_group_of_the_longest() -> None:
    short, long = new_text(0, 2000), new_text(1, 2500)
    found = copies_among([short[:700] + long[:700], short, long])
    assert found.copy_of[1:] == [None, None]
    assert found.groups == [2, 2, 2]


def test_exact_copies_of_a_copy_follow_it() -> None:
    book = new_text(0)
    half = book[:1000]
    found = copies_among([half, half, book, half])
    assert found.copy_of == [2, 2, None, 2]
    assert found.groups == [2, 2, 2, 2]
    assert found.overlaps == [Overlap(2, 0, 1.0)]


def test_short_texts_are_not_copies_of_what_quotes_them() -> None:
    poem = new_text(0, 100)
    assert copies_among([poem, new_text(1) + poem, poem]).copy_of == [None, None, 0]


# Text that many documents share


def test_many_copies_of_one_book_are_found() -> None:
    chance = random.Random(0)
    book, others = new_text(0, 3000), [new_text(number) for number in range(1, 20)]
    editions = [with_advertisements(cut(book, 0.9 + number / 3000, chance), chance) for number in range(300)]
    found = copies_among(others + editions + [book] * 300)
    kept = [number for number, copy in enumerate(found.copy_of) if copy is None]
    assert len(kept) == 20 and kept[:19] == list(range(19))
    assert len(set(found.groups[19:])) == 1
    assert len(found.overlaps) < 17 * 301


def test_a_book_in_many_collections_is_found_and_they_differ() -> None:
    book = new_text(0)
    collections = [new_text(2 * number) + book + new_text(2 * number + 1) for number in range(1, 60)]
    found = copies_among([*collections, book])
    assert found.copy_of[:-1] == [None] * 59
    assert found.copy_of[-1] is not None
    assert {overlap.second for overlap in found.overlaps} == {59}


@pytest.mark.parametrize("documents", [18, 100])
def test_what_stands_in_all_documents_makes_none_alike(documents: int) -> None:
    licence = new_text(0, 3000)
    found = copies_among([licence + new_text(number, 2000) for number in range(1, documents)])
    assert found.overlaps == []


# The same result always


@settings(deadline=None, max_examples=examples(30))
@given(st.randoms(use_true_random=False))
def test_the_order_of_reading_makes_no_difference(chance: random.Random) -> None:
    book = new_text(0)
    library = [book, book[:1500], new_text(1), with_other_punctuation(book), book + new_text(2), new_text(1)[500:]]
    expected = copies_among(library)
    with HashTable() as table:
        readers = [PassageReader(table, number) for number in range(len(library))]
        blocks = [(number, start) for number, text in enumerate(library) for start in range(0, len(text), 300)]
        turns = [number for number, _ in blocks]
        chance.shuffle(turns)
        places = dict.fromkeys(range(len(library)), 0)
        for number in turns:
            readers[number].read(library[number][places[number] : places[number] + 300])
            places[number] += 300
        sizes = [reader.finish() for reader in readers]
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in library]
        assert find_copies(table, sizes, [f"{number:05d}" for number in range(len(library))], hashes) == expected


def test_counting_in_many_turns_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    library = [cut(new_text(number % 7), 0.5 + number / 200, chance) for number in range(60)]
    expected = copies_among(library)
    assert len(expected.overlaps) > 50
    monkeypatch.setattr(duplicates, "MEETINGS", 100)
    assert copies_among(library) == expected


def test_an_empty_library_has_no_copies() -> None:
    assert copies_among([]) == Copies([], [], [], [])
