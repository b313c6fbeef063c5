"""Cleaning: `python -m tests.benchmarks.cleaning [megabytes]`. How much of what web sites put in is found; how fast.

The library is the default novel, three chapters a book, with lines put in: twenty kinds of advertisements in four
ways, and twenty kinds of lines that recur and are an author's own. Then as much text as asked for, 180 MB if nothing is
said, is surveyed and cleaned beside SentencePiece.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmcore.corpus.cleaning import Cleaner, LineCounter, RecurringLine, recurring_hashes, recurring_lines
from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.sources import fetch
from llmcore.corpus.texts import find_texts, read_text
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.files import PROJECT_ROOT
from tests.benchmarks.peers import machine
from tests.benchmarks.prepare import MB, timed

BOOKS, CHAPTERS = 40, 3

# {name}, {site}: a web site's name, one for each way to put lines in; {n}, {date}: another one each time
ADVERTISEMENTS = {
    "address": "更多精彩小说请访问 www.{site}.com",
    "address with a chapter's number": "第{n}章 更多精彩 www.{site}.com/{n}",
    "who made the file": "本书由{name}整理制作",
    "remember the address": "请记住本站域名：{site}.cc",
    "for telephones": "手机用户请浏览 m.{site}.net 阅读，更优质的阅读体验。",
    "download with a date": "（{name}TXT下载，更新时间：{date}）",
    "navigation": "加入书签 返回目录 上一章 下一章 {name}",
    "please collect": "喜欢请大家收藏：{name}更新速度全网最快。",
    "a group with its number": "书友群：{n}，欢迎加入{name}",
    "wide letters": "ＷＷＷ．{site}．ＣＯＭ 首发",
    "remember the name": "一秒记住【{name}】，为您提供精彩小说阅读。",
    "delete within a day": "声明：本书为{name}网友上传，请于下载后24小时内删除。",
    "please vote": "求推荐票，求收藏！——{name}",
    "a channel": "微信公众号“{name}”，扫码关注，每日更新",
    "more chapters": "未完待续，更多章节请到{name}小说网",
    "English address with a page": "Read more chapters at {site}.org, page {n}",
    "English rights with a year": "Copyright {n} {site}. All rights reserved.",
    "good wishes, no sign": "{name}祝各位看官日日有好梦，夜夜有好书相伴，一生平安喜乐",
    "thanks, no sign": "感谢{name}的老朋友们一路相伴，我们下一回再在这里相见",
    "English wishes, no sign": "The people of {site} wish their patient friends a very pleasant evening with this.",
}
WAYS = {  # how advertisements are put in: the site's names
    "every 30 lines of 6 books": ("白鹿书斋", "bailu"),
    "head and tail of 10 books": ("青灯书屋", "qingdeng"),
    "once in 5 books": ("听雨书阁", "tingyu"),
    "20 times in one book": ("望月书坊", "wangyue"),
}

# lines of authors, and in how many books they stand how often
HONEST = {
    "short speech": ("“是。”", 40, 30),
    "chapter's number": ("第一章", 40, 3),
    "chapter in English": ("Chapter {n}", 20, 5),
    "end of a chapter": ("且听下文分解。", 40, 3),
    "longer end of a chapter": ("欲知后事如何，且听下回分解。", 20, 3),
    "dash": ("——", 20, 10),
    "stars": ("* * *", 20, 10),
    "the end": ("（完）", 40, 1),
    "to be continued": ("未完待续", 30, 2),
    "date of a diary": ("{date} 星期四 晴", 10, 10),
    "verse, 5 characters": ("床前明月光，疑是地上霜。", 20, 1),
    "verse, 7 characters": ("春蚕到死丝方尽，蜡炬成灰泪始干。", 12, 1),
    "four clauses of 7": ("朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。", 12, 1),
    "uneven verse": ("明月几时有？把酒问青天。不知天上宫阙，今夕是何年。", 12, 1),
    "refrain of one book": ("风从海上来，吹过长长的堤岸，也吹过我们没有说出口的每一句话。", 1, 40),
    "saying in prose": ("天将降大任于斯人也，必先苦其心志，劳其筋骨，饿其体肤，空乏其身。", 4, 1),
    "long speech": ("“天下大势，分久必合合久必分，此乃天理循环，非人力所能挽回也。”", 12, 1),
    "everyday line": ("他伸手打开了门。", 30, 2),
    "everyday lines of today": ("他打开微信，看了看手机。", 20, 2),
    "speech of today": ("“你加我QQ吧，论坛上说。”", 20, 2),
    "English sentence": ("He did not know what to say to her.", 20, 2),
}


@dataclass(frozen=True)
class Line:
    """A line of a built book; `kind` and `way` say what was put in, "" where nothing was."""

    text: str
    kind: str = ""
    way: str = ""


def changing(template: str, way: str, chance: random.Random) -> str:
    """An advertisement or a line of an author, with a number and a date of its own."""
    name, site = WAYS.get(way, ("", ""))
    date = f"{chance.randrange(2005, 2026)}-{chance.randrange(1, 13):02d}-{chance.randrange(1, 29):02d}"
    return template.format(name=name, site=site, n=chance.randrange(1, 2000), date=date)


def sentences(chapters: list[Path]) -> list[Line]:
    """Chapters, a sentence a line, as many novels from the web have it."""
    text = "\n".join(map(read_text, chapters))
    return [Line(line) for line in re.split(r"(?<=[。！？])(?!”)|(?<=[。！？]”)|\n", text) if line]


def build_library(novel: Path, books: int = BOOKS, seed: int = 0) -> list[list[Line]]:
    """Books with advertisements and lines of authors put in."""
    chance, chapters = random.Random(seed), find_texts(novel)
    library = [sentences(chapters[book * CHAPTERS : (book + 1) * CHAPTERS]) for book in range(books)]

    def put(book: int, line: Line, places: int) -> None:
        for _ in range(places):
            new = Line(changing(line.text, line.way, chance), line.kind, line.way)
            library[book].insert(chance.randrange(len(library[book])), new)

    for kind, (text, in_books, times) in HONEST.items():
        for book in chance.sample(range(books), min(in_books, books)):
            put(book, Line(text, kind), times)
    regular, margin, rare, single = WAYS
    for kind, text in ADVERTISEMENTS.items():
        for book in chance.sample(range(books), 6):
            put(book, Line(text, kind, regular), len(library[book]) // 30)
        for book in chance.sample(range(books), 5):
            put(book, Line(text, kind, rare), 1)
        put(chance.randrange(books), Line(text, kind, single), 20)
        for book in chance.sample(range(books), 10):
            ends = (Line(changing(text, margin, chance), kind, margin) for _ in range(2))
            library[book] = [next(ends), *library[book], next(ends)]
    return library


def find_lines(texts: list[str]) -> list[RecurringLine]:
    """The recurring lines of some texts."""
    with HashTable() as table:
        for number, text in enumerate(texts):
            counter = LineCounter(table, number)
            counter.add(text)
            counter.close()
        return recurring_lines(recurring_hashes(table, range(len(texts))), lambda number: iter([texts[number]]))


@dataclass
class Found:
    """How many lines of a library were put in and removed: by (kind, way); kind "" counts the novel's own lines."""

    put_in: Counter[tuple[str, str]]
    removed: Counter[tuple[str, str]]

    def recall(self, belongs: Callable[[str, str], bool] = lambda kind, way: True) -> float:
        """The share of the advertisements that were removed."""
        keys = [key for key in self.put_in if key[1] and belongs(*key)]
        return sum(self.removed[key] for key in keys) / sum(self.put_in[key] for key in keys)

    def precision(self) -> float:
        """The share of the removed lines that were advertisements."""
        return sum(number for (_, way), number in self.removed.items() if way) / max(1, self.removed.total())


def examine(library: list[list[Line]]) -> Found:
    """Find what recurs in a library, clean it, and count."""
    texts = ["".join(f"{line.text}\n" for line in book) for book in library]
    cleaner = Cleaner(line.hash for line in find_lines(texts))
    found = Found(Counter(), Counter())
    for book, text in zip(library, texts, strict=True):
        kept = "".join(cleaner.clean([text])).split("\n")[::-1]
        for line in book:
            found.put_in[line.kind, line.way] += 1
            if line.text == kept[-1]:
                kept.pop()
            else:
                found.removed[line.kind, line.way] += 1
        assert kept == [""], "a line changed"
    return found


def report(found: Found) -> Iterator[str]:
    """Tables of what was found, by kind and by way."""
    yield "| advertisements | " + " | ".join(WAYS) + " |"
    yield "| --- |" + " --- |" * len(WAYS)
    for kind in ADVERTISEMENTS:
        cells = (f"{found.removed[kind, way]} of {found.put_in[kind, way]}" for way in WAYS)
        yield f"| {kind} | {' | '.join(cells)} |"
    yield "| recall | " + " | ".join(f"{found.recall(lambda _, at, way=way: at == way):.1%}" for way in WAYS) + " |"

    wrong = {kind: number for (kind, way), number in found.removed.items() if number and not way}
    honest = sum(number for (kind, way), number in found.put_in.items() if kind and not way)
    yield f"\nrecall {found.recall():.1%} (target 90%), precision {found.precision():.1%} (target 99%)"
    yield f"removed of {honest} recurring lines of authors, and {found.put_in['', '']} other ones: {wrong or 'none'}"


# Speed and memory


def write_large(folder: Path, megabytes: int) -> None:
    """Files of 0.6 MB: sentences of the novel, cut and joined anew, a line each; every 30th an advertisement."""
    chance = random.Random(0)
    own = [line.text for line in sentences(find_texts(fetch("sanguo", PROJECT_ROOT / "data")))]
    folder.mkdir()
    size, number = 0, 0
    while size < megabytes * MB:
        pairs = zip(chance.sample(own, 8000), chance.sample(own, 8000), strict=True)
        lines = [a[: chance.randrange(len(a) + 1)] + b[chance.randrange(len(b) + 1) :] for a, b in pairs]
        for place in range(0, len(lines), 30):
            way = chance.choice(list(WAYS))
            lines[place] = changing(chance.choice(list(ADVERTISEMENTS.values())), way, chance)
        size += (folder / f"{number:04d}.txt").write_bytes("\n".join(lines).encode())
        number += 1


ALONE = """
import re, sys, time
from pathlib import Path
from llmcore.corpus.cleaning import Cleaner, LineCounter, recurring_hashes, recurring_lines
from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.texts import find_texts, text_blocks

def say(what):
    global started
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(what, 1024 * int(peak), time.process_time() - started, sep="|")
    started = time.process_time()

files = find_texts(Path(sys.argv[1]))
started = time.process_time()
for file in files:
    for block in text_blocks(file):
        pass
say("only read")
table = HashTable()
for number, file in enumerate(files):
    counter = LineCounter(table, number)
    for block in text_blocks(file):
        counter.add(block)
    counter.close()
say("read, note the lines")
candidates = recurring_hashes(table, range(len(files)))
say("find what recurs")
lines = recurring_lines(candidates, lambda number: text_blocks(files[number]))
say(f"look {len(lines)} lines up")
cleaner = Cleaner(line.hash for line in lines)
for file in files:
    for text in cleaner.clean(text_blocks(file)):
        pass
say("read, clean")
"""


def measure_speed(folder: Path, megabytes: int) -> Iterator[str]:
    """Rows of a table: processor time in one thread, and memory."""
    write_large(folder / "texts", megabytes)
    files = find_texts(folder / "texts")
    size = sum(file.stat().st_size for file in files) / MB
    command = [sys.executable, "-c", ALONE, str(folder / "texts")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
    yield f"| {size:.0f} MB, one thread | processor's seconds | MB/s | peak of resident memory, MB |"
    yield "| --- | --- | --- | --- |"
    for line in done.stdout.splitlines():
        what, memory, seconds = line.split("|")
        yield f"| {what} | {float(seconds):.1f} | {size / float(seconds):,.0f} | {int(memory) / MB:.0f} |"

    novel = find_texts(fetch("sanguo", PROJECT_ROOT / "data"))
    tokenizer = train_tokenizer(novel, folder / "t", 4000, character_coverage=0.99, progress=False)
    sample = [line for file in files[:10] for line in read_text(file).splitlines(keepends=True)]
    _, seconds = timed(lambda: tokenizer._processor.encode(sample, num_threads=1))
    yield f"| SentencePiece, encode | {seconds * size * MB / sum(len(line.encode()) for line in sample):.1f} | " + (
        f"{sum(len(line.encode()) for line in sample) / MB / seconds:.1f} | |"
    )


def main() -> None:
    """Print the tables."""
    print(f"Cleaning on {machine()}\n")
    novel = fetch("sanguo", PROJECT_ROOT / "data")
    print("\n".join(report(examine(build_library(novel)))))
    print(f"the novel's 120 chapters as 120 files: {len(find_lines(list(map(read_text, find_texts(novel)))))} lines\n")
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 180
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(measure_speed(Path(folder), megabytes)))


if __name__ == "__main__":
    main()
