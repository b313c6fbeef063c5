"""Cleaning: what goes and what stays, the same whatever the blocks; and which lines a library's web sites put in."""

from __future__ import annotations

import html
import html.entities
import itertools
import random
import re
import tracemalloc
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.corpus.cleaning import (
    LONGEST,
    MOST_LINES,
    RULES,
    Cleaner,
    LineCounter,
    line_rows,
    recurring_hashes,
    recurring_lines,
    rule_rows,
)
from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.texts import find_texts, read_text
from tests.benchmarks.cleaning import ADVERTISEMENTS, WAYS, build_library, examine, find_lines
from tests.helpers import examples

ADS = ["更多精彩 www.abc.com", "第12章 请记住本站域名：abc.cc/12", "Read more at Abc, page 3"]
PROSE = "长江东逝水浪花淘尽英雄"


def cleaner_of(*ads: str) -> Cleaner:
    return Cleaner(line.hash for line in find_lines(["".join(f"{ad}\n" for ad in ads for _ in range(3))]))


def clean(text: str, cleaner: Cleaner | None = None, counts: Counter[str] | None = None) -> str:
    return "".join((cleaner or Cleaner()).clean([text], counts))


# What goes and what stays

CASES = {  # rule: texts that change, each with what becomes of it
    "control characters": {"a\x00b\x07c\x0b\x1b\x7f\x85\x9fd": "abcd"},
    "zero-width characters": {"是\u200b非\ufeff成\u2060败\u00ad": "是非成败"},
    "HTML entities": {
        "&nbsp;&nbsp;话说&quot;天下&quot;": '  话说"天下"',
        "&#8220;是&#x201D; &apos;&hellip;": "“是” '…",
        "a &lt; b &amp; c": "a < b & c",
        "&amp;amp;lt;三国&amp;gt;": "<三国>",
        "&#1;是&#8203;非&shy;": "是非",
        "一&#10;二": "一\n二",
    },
    "HTML tags": {
        "一<br>二<BR/>三<br />四": "一\n二\n三\n四",
        "<p>一</p><p>二</p>": "一\n二\n",
        '<div class="text">是<b>非</b></div>': "是非\n",
        "<a href='/12.html' target=_blank>成败</a><h1>回</h1>": "成败回\n",
        "&lt;br&gt;": "\n",
        "<<b>br>": "\n",
    },
    "runs of blank lines": {
        "一\n\n\n二": "一\n\n二",
        "一\n  \n　\n\t\n二\n\n\n": "一\n  \n二\n\n",
        "\n\n\n": "\n",
        "一\n\n  ": "一\n\n",
    },
    "recurring lines": {
        f"一\n{ADS[0]}\n二": "一\n二",
        "一\n　　【更多精彩】WWW www.abc.com  \n": "一\n　　【更多精彩】WWW www.abc.com  \n",
        "一\n【第3章】请记住本站域名:abc.cc/77\n第十二章 请记住本站域名：abc.cc": "一\n",
    },
}
KEPT = [
    "“是。”\n\n“是。”\n",
    "第一章\n\n* * *\n\n（完）",
    "tabs\tand spaces  and　wide ones\u00a0stay, newlines\n\ntoo",
    "👨‍👩‍👧 क्‍ष می‌خواهم",
    "a < b > c, a<c>d, 1 < 2, x <- y -> z, <三国>, <b and c>, < br >, <>",
    "AT&T; R&D &nosuchname; &; &#; &#xyz; &#x110000; &#0; & nbsp; fish&chips",
    "\u2028\u2029\u200e",
    "更多精彩" + PROSE + " www.abc.com",
]


@pytest.mark.parametrize(
    ("rule", "text", "cleaned"), [(rule, *case) for rule, cases in CASES.items() for case in cases.items()]
)
def test_each_rule_removes_what_it_says(rule: str, text: str, cleaned: str) -> None:
    counts: Counter[str] = Counter()
    assert clean(text, cleaner_of(*ADS), counts) == cleaned
    rows = {row["rule"]: row for row in rule_rows(counts)}
    assert list(rows) == list(RULES)
    assert (rows[rule]["removed"] > 0) == (text != cleaned)
    assert sum(row["characters"] for row in rows.values()) == len(text) - len(cleaned)


@pytest.mark.parametrize("text", KEPT)
def test_what_an_author_may_have_written_stays(text: str) -> None:
    counts: Counter[str] = Counter()
    assert clean(text, cleaner_of(*ADS), counts) == text
    assert not any(counts.values())


def test_a_recurring_line_that_is_too_long_stays() -> None:
    for size, goes in ((LONGEST, True), (LONGEST + 1, False)):
        line = (ADS[0] + PROSE * LONGEST)[:size]
        assert (find_lines([f"{line}\n" * 3]) != []) == goes
        short = cleaner_of(ADS[0])
        assert clean(f"{ADS[0]}{' ' * (size - len(ADS[0]))}\n", short) == "" or not goes


# The same as a slow reference, whatever the blocks, and once for all

FRAGMENTS = [
    *ADS,
    "第13章 请记住本站域名，abc.cc/4",
    "“是。”",
    "一",
    "a",
    *"\n\n\n\n",
    *" \t　;&<>/",
    *("amp;", "lt;", "&nbsp;", "&#", "59;", "#38;", "&#x26;", "&#10;", "&zwnj;", "&#8203;", "gt;"),
    *("br", "<b", "<br>", "</p>", "<p>", '<a href="&gt;', "> ", "b>", "</", "<h1 id = 1"),
    *"\u200b\ufeff\u2060\u00ad\u200d\x00\x85\r\ud800😀",
    "长" * (LONGEST - 2),
    " " * LONGEST,
    "<a href=" + "x" * 499,
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
NUMERALS = "〇零一二三四五六七八九十百千万萬两兩"
ATTRIBUTES = r"[ \t]{1,9}[a-z][\w:-]{0,30}[ \t]?=[^<>\n]{0,500}"


def letters(line: str) -> str:
    """What lines are compared by. All characters beyond the basic plane count as letters."""
    return "".join(
        c for c in line if c > "\uffff" or (unicodedata.category(c)[0] in "LM" and c not in NUMERALS and c != "\uffff")
    )


def slow_resolve(text: str) -> str:
    """Without marks and markup: a character at a time, each entity and tag resolved at its last character."""
    out = ""
    for c in text:
        if (unicodedata.category(c) == "Cc" and c not in "\n\t") or c in "\u200b\u2060\ufeff\u00ad":
            continue
        out += c
        while True:
            if match := re.search(r"&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,9});\Z", out):
                name = match[1]
                if name[0] != "#" and name != "apos" and name not in html.entities.entitydefs:
                    break
                new = html.unescape(match[0])
                if new == "\ufffd":
                    break
                new = "" if re.fullmatch("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u200b\u2060\ufeff\u00ad]", new) else new
                new = new.replace("\xa0", " ")
            elif match := re.search(rf"<(/?)(br|b|p|a|h1)({ATTRIBUTES})?[ \t]{{0,9}}/?>\Z", out):
                new = "\n" if match[2] == "br" or (match[1] and match[2] in ("p", "h1")) else ""
            else:
                break
            out = out[: match.start()] + new
    return out


def slow_clean(text: str) -> str:
    ads = set(map(letters, ADS))
    kept: list[str] = []
    for line in re.findall("[^\n]*\n|[^\n]+", slow_resolve(text)):
        bare = line.removesuffix("\n")
        if len(bare) <= LONGEST and letters(bare) in ads:
            continue
        blank = len(bare) <= LONGEST and not bare.strip()
        if blank and kept and not kept[-1].strip() and len(kept[-1].removesuffix("\n")) <= LONGEST:
            continue
        kept.append(line)
    return "".join(kept)


@given(texts)
@settings(max_examples=examples(120), deadline=None)
def test_cleaning_gives_what_a_slow_reference_gives(text: str) -> None:
    assert clean(text, CLEANER) == slow_clean(text)


CLEANER = cleaner_of(*ADS)


@given(texts, st.lists(st.integers(0, 2000)))
@settings(max_examples=examples(60), deadline=None)
def test_the_cuts_between_blocks_do_not_matter(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    blocks = [text[start:end] for start, end in itertools.pairwise(places)]
    whole: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    assert "".join(CLEANER.clean(blocks, cut)) == clean(text, CLEANER, whole)
    assert +cut == +whole
    by_cuts, at_once = counted(blocks, [text])
    assert by_cuts == at_once


@given(texts)
@settings(max_examples=examples(120), deadline=None)
def test_a_clean_text_stays_as_it_is(text: str) -> None:
    counts: Counter[str] = Counter()
    once = clean(text, CLEANER, counts)
    assert sum(row["characters"] for row in rule_rows(counts)) == len(text) - len(once)
    again: Counter[str] = Counter()
    assert clean(once, CLEANER, again) == once
    assert not any(again.values())


def counted(*documents: Iterable[str]) -> list[tuple[Counter[str], list[int]]]:
    """What the first pass says of each document: counts of the rules, and hashes."""
    said = []
    with HashTable() as table:
        for number, blocks in enumerate(documents):
            counter = LineCounter(table, number)
            for block in blocks:
                counter.add(block)
            counter.close()
            said.append(+counter.counts)
        rows = np.concatenate(list(table.parts()))
    return [(counts, rows["hash"][rows["document"] == number].tolist()) for number, counts in enumerate(said)]


def test_the_first_pass_counts_what_cleaning_removes() -> None:
    text = "".join(text for rule in RULES[1:] for text in CASES[rule])
    counts: Counter[str] = Counter()
    clean(text, None, counts)
    assert counted([text])[0][0] == +counts


@pytest.mark.parametrize("piece", ["", " ", "&", "<", "<a href=", "&amp;", "x;<", "<b>"])
def test_a_line_without_an_end_needs_no_memory(piece: str) -> None:
    block = (piece + PROSE * 30) * 60 if piece.strip() else (piece or PROSE) * 20_000
    cleaned = block.replace("&amp;", "&").replace("<b>", "")
    tracemalloc.start()
    size = sum(map(len, CLEANER.clean(block for _ in range(60))))
    counted(block for _ in range(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 60 * len(cleaned)
    assert peak < 60 * len(block)  # in a byte a character, the line would not fit


# Which lines recur


def table_of(rows: Iterable[tuple[int, int]]) -> HashTable:
    table = HashTable()
    for number, document in rows:
        table.add(document, np.array([number], np.uint64))
    return table


hashes = st.integers(0, 6) | st.integers(2**64 - 4, 2**64 - 1)


@given(
    st.lists(st.tuples(hashes, st.integers(0, 11)), max_size=150), st.lists(st.integers(0, 8), min_size=12, max_size=12)
)
@settings(max_examples=examples(30), deadline=None)
def test_recurring_hashes_are_those_of_a_slow_count(rows: list[tuple[int, int]], group_of: list[int]) -> None:
    times: dict[int, dict[int, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    for number, document in rows:
        times[number][group_of[document]][document] += 1
    expected = []
    for number, groups in times.items():
        occurrences = sum(max(documents.values()) for documents in groups.values())
        if (number % 2 and occurrences >= 3) or (number % 2 == 0 and len(groups) >= 5):
            first = min(document for documents in groups.values() for document in documents)
            expected.append((number, len(groups), occurrences, first))

    with table_of(rows) as table:
        found = recurring_hashes(table, group_of).tolist()
    assert found == sorted(expected, key=lambda row: (-row[2], row[0]))


def test_the_most_frequent_lines_are_found_of_too_many() -> None:
    with HashTable() as table:
        numbers = np.arange(1, 2 * MOST_LINES + 400, 2, dtype=np.uint64)
        for _ in range(3):
            table.add(0, numbers)
        table.add(1, numbers[-10:])
        found = recurring_hashes(table, [0, 1])
    assert len(found) == MOST_LINES
    assert set(found["hash"][:10]) == set(numbers[-10:])


def test_copies_of_a_book_do_not_make_its_lines_recur() -> None:
    book = "".join(f"{PROSE[:k]}在{PROSE[k:]}，{PROSE}。\n" for k in range(5)) + "　　QQ群的网友请到论坛注册\n"
    books = [book, book, *[f"{PROSE}{k}\n" for k in range(8)]] + [book] * 5

    def found(group_of: Sequence[int]) -> int:
        with HashTable() as table:
            for number, text in enumerate(books):
                counter = LineCounter(table, number)
                counter.add(text)
                counter.close()
            return len(recurring_hashes(table, group_of))

    assert found(range(15)) == 6
    assert found([0, 0, *range(2, 10), 0, 0, 0, 0, 0]) == 0


def test_the_order_in_which_threads_read_does_not_matter(sanguo: Path) -> None:
    library = ["".join(f"{line.text}\n" for line in book) for book in build_library(sanguo, books=10)]
    expected = find_lines(library)
    with HashTable() as table, ThreadPoolExecutor(4) as pool:

        def survey(number: int) -> None:
            counter = LineCounter(table, number)
            for start in range(0, len(library[number]), 999):
                counter.add(library[number][start : start + 999])
            counter.close()

        list(pool.map(survey, random.Random(1).sample(range(len(library)), len(library))))
        found = recurring_lines(recurring_hashes(table, range(len(library))), lambda number: iter([library[number]]))
    assert len(found) > 20
    assert found == expected


def test_lines_are_said_with_text_and_counts() -> None:
    texts = ["一\n" + f"　{ADS[0]} \n" * 2, f"{ADS[0]}\n二"]
    (line,) = find_lines(texts)
    assert line_rows([line]) == [{"line": ADS[0], "documents": 2, "times": 3, "why": "signs of a web site"}]


def test_a_line_that_is_no_longer_there_is_left_out() -> None:
    with HashTable() as table:
        counter = LineCounter(table, 0)
        counter.add(f"{ADS[0]}\n{ADS[1]}\n" * 3)
        counter.close()
        candidates = recurring_hashes(table, [0])
    assert len(candidates) == 2
    assert [line.text for line in recurring_lines(candidates, lambda number: iter(["一", f"\n{ADS[1]}"]))] == [ADS[1]]


def test_reading_stops_after_the_last_candidate_of_a_document() -> None:
    def read(number: int) -> Iterator[str]:
        yield f"{ADS[0]}\n"
        raise AssertionError("the rest is not needed")

    with HashTable() as table:
        counter = LineCounter(table, 0)
        counter.add(f"{ADS[0]}\n" * 3)
        counter.close()
        assert len(recurring_lines(recurring_hashes(table, [0]), read)) == 1


def test_the_fingerprint_says_which_lines_are_removed() -> None:
    assert Cleaner([4, 9]).fingerprint == Cleaner([9, 4, 9]).fingerprint
    assert len({Cleaner(lines).fingerprint for lines in ([], [4], [9])}) == 3


@pytest.mark.parametrize(
    ("line", "signs"),
    [
        ("请到论坛下载", True),
        ("免费小说，欢迎网友下载", True),
        ("ＨＴＴＰ：／／ａ．ｂ", True),
        ("“来看看www.abc.com吧”", True),
        ("This eBook is for the use of anyone; Project Gutenberg", True),
        ("ALL RIGHTS RESERVED.", True),
        ("“求收藏，求推荐票！”", False),
        ("他伸手打开了门。", False),
        ("他登录了论坛。", False),
        ("Chapter 12: Free", False),
        ("He went home. Net worth, he said, was all.", False),
        ("欲知后事如何，且听下回分解。", False),
    ],
)
def test_signs_of_a_web_site_are_told_from_stories(line: str, signs: bool) -> None:
    assert bool(find_lines([f"{line}\n" * 3])) == signs


# A built library


def test_advertisements_are_found_and_no_refrain_is_lost(sanguo: Path) -> None:
    found = examine(build_library(sanguo, books=12))
    assert found.precision() >= 0.99
    assert found.recall() >= 0.9
    for way in WAYS:
        assert found.recall(lambda kind, at, way=way: at == way) >= 0.85  # type: ignore[misc]
    with_signs = [kind for kind in ADVERTISEMENTS if "no sign" not in kind]
    for kind in with_signs:
        assert found.recall(lambda of, at, kind=kind: of == kind) == 1  # type: ignore[misc]


def test_the_chapters_of_one_novel_have_no_recurring_line(sanguo: Path) -> None:
    assert find_lines([read_text(file) for file in find_texts(sanguo)]) == []
