"""Copies of books: `python -m tests.benchmarks.duplicates [--full]`: which are found, how fast, in how much memory.

The library is built: 40 books of three chapters each, and copies of them made by code. Large libraries are the clauses
of the novel in a new random order for each book, 45 kB a book, up to 180 MB of text, or up to 1 GB.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llmcore.corpus.duplicates import LEAST_SHARE, Copies, PassageReader, find_copies, find_overlaps
from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.sources import fetch
from llmcore.corpus.texts import find_texts, read_text
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.files import PROJECT_ROOT

MB = 10**6
BLOCK = 1 << 14  # characters read at a time
BOOK = 15_000  # characters of a book in a large library
SENTENCE_ENDS = "[。！？!?…；;\n]"
ADVERTISEMENTS = [
    "更多精彩好书，尽在本站，请记住网址！",
    "手机用户请浏览阅读，章节更快！",
    "（本章未完，请点击下一页继续）",
]
TRADITIONAL = str.maketrans(
    "来为时张将军马关刘汉国个这说话见问闻听与后从众进还过发动杀败战阵东书写岁两万无当应边难处归闭开门"
    "车转轻辽赵吴陈诸许孙权鲁肃颜严亲会议论计谋袭阳阴险险随际",
    "來為時張將軍馬關劉漢國個這說話見問聞聽與後從眾進還過發動殺敗戰陣東書寫歲兩萬無當應邊難處歸閉開門"
    "車轉輕遼趙吳陳諸許孫權魯肅顏嚴親會議論計謀襲陽陰險險隨際",
)
LARGE = """
import sys
from tests.benchmarks.duplicates import print_large_library
print_large_library(sys.argv[1], int(sys.argv[2]))
"""


# A library and its copies


def chapters() -> list[str]:
    return [read_text(file) for file in find_texts(fetch("sanguo", PROJECT_ROOT / "data"))]


def books() -> list[str]:
    texts = chapters()
    return ["".join(texts[number : number + 3]) for number in range(0, len(texts), 3)]


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


class NewText:
    """Text that stands nowhere else: the novel's clauses in random order."""

    def __init__(self, seed: int = 0) -> None:
        self._clauses = re.findall(r"[^，。！？；：\n]+[，。！？；：\n]+", "".join(chapters()))
        self._chance = np.random.default_rng(seed)

    def write(self, characters: int) -> str:
        numbers = self._chance.integers(len(self._clauses), size=characters // 4).tolist()
        return "".join(map(self._clauses.__getitem__, numbers))[:characters]


def cut(text: str, share: float, chance: random.Random) -> str:
    size = round(len(text) * share)
    start = chance.randrange(len(text) - size + 1)
    return text[start : start + size]


def with_advertisements(text: str, chance: random.Random) -> str:
    """The text in lines of up to 40 characters, an advertisement after each 20."""
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, 40)]
    return "\n".join(
        line if place % 20 else f"{line}\n{chance.choice(ADVERTISEMENTS)}" for place, line in enumerate(lines, start=1)
    )


def wrapped(text: str) -> str:
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap("　　" + paragraph.strip(), 40)]
    return "\n\n".join(lines)


def with_other_characters(text: str, share: float, chance: random.Random) -> str:
    return "".join(chance.choice(text) if chance.random() < share else character for character in text)


def with_other_punctuation(text: str) -> str:
    return text.translate(str.maketrans("，。：；“”‘’！？", ",.:;\"\"''!?")).replace("\n", " \r\n")


# Reading a library


def read_document(table: HashTable, number: int, text: str) -> tuple[int, str]:
    """Add a text to a table; its letters and its hash."""
    reader = PassageReader(table, number)
    for start in range(0, len(text), BLOCK):
        reader.read(text[start : start + BLOCK])
    return reader.finish(), hashlib.sha256(text.encode()).hexdigest()


def read_library(table: HashTable, texts: Iterable[str]) -> tuple[list[int], list[str]]:
    """Add all texts to a table with two threads; the letters of each and the hash of its text."""

    with ThreadPoolExecutor(2) as pool:
        waiting: list[Future[tuple[int, str]]] = []
        done = []
        for number, text in enumerate(texts):
            waiting.append(pool.submit(read_document, table, number, text))
            if len(waiting) == 8:  # no more texts are in memory
                done.append(waiting.pop(0).result())
        done += [future.result() for future in waiting]
    return [size for size, _ in done], [text for _, text in done]


def copies_among(texts: Sequence[str]) -> Copies:
    with HashTable() as table:
        sizes, hashes = read_library(table, texts)
        return find_copies(table, sizes, [f"{number:05d}.txt" for number in range(len(texts))], hashes)


# What is found


def print_recall() -> None:
    """A row for each kind of copy: each is put into a library of its own with the 40 books."""
    originals, chance, new = books(), random.Random(0), NewText()
    kinds: dict[str, Callable[[str], str]] = {
        "the same text": lambda text: text,
        "cut to 80%": lambda text: cut(text, 0.8, chance),
        "cut to 60%": lambda text: cut(text, 0.6, chance),
        "cut to 50%": lambda text: cut(text, 0.5, chance),
        "an advertisement after each 20 lines of 40 characters": lambda text: with_advertisements(text, chance),
        "lines of 40 characters, indented, with blank lines": wrapped,
        "other punctuation and line ends": with_other_punctuation,
        "2% of the characters changed": lambda text: with_other_characters(text, 0.02, chance),
        "5% of the characters changed": lambda text: with_other_characters(text, 0.05, chance),
        "traditional characters": lambda text: text.translate(TRADITIONAL),
    }
    for percent in (30, 40, 45, 50, 55, 60, 70, 80):
        kinds[f"{percent}% of it, then new text"] = lambda text, share=percent / 100: (  # type: ignore[misc]
            cut(text, share, chance) + new.write(round(len(text) * (1 - share)))
        )

    print("| copy | found | shares of passages | pairs of different books |\n| --- | --- | --- | --- |")
    for kind, change in kinds.items():
        print_kind(kind, originals, [change(text) for text in originals], range(len(originals)))
    collections = [first + second for first, second in zip(originals[::2], originals[1::2], strict=True)]
    print_kind("two books in one", originals, collections, [number // 2 for number in range(len(originals))])


def print_kind(kind: str, originals: list[str], copies: list[str], holding: Sequence[int]) -> None:
    """A row of the table; `holding` tells which copy belongs to each original."""
    found = copies_among(originals + copies)
    pairs = {(number, len(originals) + copy) for number, copy in enumerate(holding)}
    shares = []
    for pair in pairs:
        for one, other in (pair, pair[::-1]):
            if found.copy_of[one] == other:
                shares.append(found.shares[one])
    wrong = sum(tuple(sorted((overlap.first, overlap.second))) not in pairs for overlap in found.overlaps)
    spread = f"{min(shares):.2f} to {max(shares):.2f}" if shares else ""
    print(f"| {kind} | {len(shares)} of {len(pairs)} | {spread} | {wrong} |", flush=True)


def print_short() -> None:
    """A row for each length: of short documents, fewer passages are looked at, so their share is known less well."""
    chance, new = random.Random(0), NewText()
    print(
        "\n| documents of so many letters | found, whole | 60% of it, then new text | 50% |\n| --- | --- | --- | --- |"
    )
    for size in (200, 500, 1000, 2000, 5000, 15_000):
        originals = [letters(new.write(2 * size))[:size] for _ in range(200)]
        row = []
        for share in (1.0, 0.6, 0.5):
            copies = [cut(text, share, chance) + letters(new.write(2 * size))[size:][: round(size * (1 - share))]
                      for text in originals]  # fmt: skip
            found = copies_among(originals + [f"　{text}" for text in copies])
            right = {tuple(sorted((overlap.first, overlap.second))) for overlap in found.overlaps}
            assert right <= {(number, 200 + number) for number in range(200)}, (
                "different documents were taken for copies"
            )
            row.append(f"{len(right) / 200:.0%}")
        print(f"| {size} | {' | '.join(row)} |", flush=True)


def print_different() -> None:
    """How alike different texts look: the highest share of any two chapters and any two books."""
    for what, texts in (("120 chapters", chapters()), ("40 books", books())):
        with HashTable() as table:
            sizes, _ = read_library(table, texts)
            order = sorted(range(len(texts)), key=lambda number: -sizes[number])
            overlaps = find_overlaps(table, order, 0.001)
        highest = max((overlap.share for overlap in overlaps), default=0)
        pairs = sum(overlap.share >= LEAST_SHARE for overlap in overlaps)
        print(f"- {what}, all different: {pairs} pairs found; the highest share of two is {highest:.3f}")


def print_sentences() -> None:
    """Why passages: what 5% of changed characters leave of sentences, and of longer and shorter passages."""
    originals = books()[:10]
    changed = [with_other_characters(text, 0.05, random.Random(number)) for number, text in enumerate(originals)]

    def sentences(text: str) -> set[str]:
        return {sentence for sentence in map(letters, re.split(SENTENCE_ENDS, text)) if len(sentence) >= 8}

    def passages(text: str, size: int) -> set[str]:
        text = letters(text)
        return {text[start : start + size] for start in range(len(text) - size + 1)}

    ways: dict[str, Callable[[str], set[str]]] = {"sentences of 8 letters or more": sentences}
    for size in (6, 8, 10, 12, 16):
        ways[f"passages of {size} letters"] = lambda text, size=size: passages(text, size)  # type: ignore[misc]
    for way, split in ways.items():
        sets = [split(text) for text in originals]
        shares = [len(one & split(other)) / len(one) for one, other in zip(sets, changed, strict=True)]
        false = max(len(a & b) / min(len(a), len(b)) for a, b in itertools.combinations(sets, 2))
        print(f"- {way}: {statistics.mean(shares):.2f} in common after 5% are changed; two different books {false:.4f}")


# How fast, and in how much memory


def print_speed(rounds: int = 5) -> None:
    """Reading passages into a table, in turns with SentencePiece, both in one thread."""
    texts = books()
    size = sum(len(text.encode()) for text in texts) / MB
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    with tempfile.TemporaryDirectory() as folder:
        files = find_texts(fetch("sanguo", PROJECT_ROOT / "data"))
        tokenizer = train_tokenizer(files, Path(folder, "t"), 4000, character_coverage=0.99, progress=False)
    ours, theirs = [], []
    for _ in range(rounds):
        started = time.process_time()  # other programs change the time by the clock
        tokenizer._processor.encode(lines, num_threads=1)
        theirs.append(time.process_time() - started)
        with HashTable() as table:
            started = time.process_time()
            for number, text in enumerate(texts):
                read_document(table, number, text)
            ours.append(time.process_time() - started)
    share = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"- in a second of one core, {size / statistics.median(ours):.0f} MB into the table, SentencePiece "
        f"{size / statistics.median(theirs):.1f} MB: {share:.1%} of its time"
    )


def large_library(kind: str, megabytes: int) -> Iterator[str]:
    """Books of 45 kB, made while they are read."""
    new, chance = NewText(), random.Random(0)
    licence = new.write(BOOK // 2)
    text = ""
    for number in range(megabytes * MB // (3 * BOOK)):
        if kind == "a cut copy of every 10th" and number % 10 == 1:
            yield cut(text, 0.6, chance)
        elif kind == "each in 30 copies, with advertisements" and number % 30:
            yield with_advertisements(text, chance)
        elif kind == "half of each is the same licence":
            yield licence + new.write(BOOK // 2)
        else:
            text = new.write(BOOK)
            yield text


LARGE_KINDS = ("a cut copy of every 10th", "each in 30 copies, with advertisements", "half of each is the same licence")


def print_large_library(kind: str, megabytes: int) -> None:
    """A row of the table. Runs in a process of its own, because the peak of its memory is measured."""
    NewText(), PassageReader(HashTable(), 0).read(" ")  # what is made once does not count
    before = memory("VmRSS")
    started = time.perf_counter()
    with HashTable() as table:
        sizes, hashes = read_library(table, large_library(kind, megabytes))
        read, peak = time.perf_counter(), memory("VmHWM")
        found = find_copies(table, sizes, [f"{number:06d}.txt" for number in range(len(sizes))], hashes)
    done = time.perf_counter()
    copies = sum(copy is not None for copy in found.copy_of)
    print(
        f"| {megabytes} MB, {len(sizes):,} books: {kind} | {copies:,} | {len(found.overlaps):,} | "
        f"{read - started:.0f} | {done - read:.1f} | {(peak - before) / MB:.0f} | "
        f"{(memory('VmHWM') - before) / MB:.0f} |",
        flush=True,
    )


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def main() -> None:
    """Print all tables."""
    from tests.benchmarks.peers import machine  # imports torch, which is not to count as memory of the large libraries

    print(f"Copies of books on {machine()}\n")
    print_recall()
    print_short()
    print()
    print_different()
    print_sentences()
    print_speed()
    print(
        "\n| library | copies | pairs | seconds to make and read it | to find copies | memory to read, MB | for all |\n"
        "| --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for megabytes in (180, 1000) if "--full" in sys.argv else (180,):
        for kind in LARGE_KINDS:
            subprocess.run([sys.executable, "-c", LARGE, kind, str(megabytes)], check=True, cwd=PROJECT_ROOT)


if __name__ == "__main__":
    main()
