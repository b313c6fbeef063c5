"""A library of texts as they come from the web, built from the chapters of a novel, with what is true about it."""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ADVERTISEMENT = "更多精彩小说请访问 www.example-novels.com 免费下载"
CODECS = ("utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "gbk")
# The opening of 論語, in traditional characters
ANALECTS = """子曰：「學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍，不亦君子乎？」
有子曰：「其為人也孝弟，而好犯上者，鮮矣；不好犯上，而好作亂者，未之有也。君子務本，本立而道生。孝弟也者，其為仁之本與！」
子曰：「巧言令色，鮮矣仁！」
曾子曰：「吾日三省吾身：為人謀而不忠乎？與朋友交而不信乎？傳不習乎？」
子曰：「道千乘之國：敬事而信，節用而愛人，使民以時。」
子曰：「弟子入則孝，出則弟，謹而信，汎愛眾，而親仁。行有餘力，則以學文。」
子夏曰：「賢賢易色，事父母能竭其力，事君能致其身，與朋友交言而有信。雖曰未學，吾必謂之學矣。」
子曰：「君子不重則不威，學則不固。主忠信，無友不如己者，過則勿憚改。」
"""


@dataclass
class Truth:
    """What a built library holds.

    Attributes:
        texts: name of a document -> its text, without advertisements and leftovers.
        copies: name of a copy -> name of its original.
        damaged: name of a document -> broken places.
        advertisements: how many lines were inserted.
    """

    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)
    advertisements: int = 0


def build_library(folder: Path, chapters: Sequence[str]) -> Truth:
    """Write a library of texts of every kind that is read, and some that are not, made of chapters of a novel."""
    truth = Truth()
    folder.mkdir(parents=True, exist_ok=True)
    damaged, plain, packed = chapters[0], list(chapters[1:-30]), list(chapters[-30:])

    # text files, in turn in all encodings, half of them with advertisements and leftovers of a web page
    for number, text in enumerate(plain):
        codec, name = CODECS[number % len(CODECS)], f"第{number % 5}架/{number:03d}.txt"
        written = text
        if number % 2:
            lines = text.split("\n")
            for place in range(len(lines) - 1, 0, -12):
                lines.insert(place, ADVERTISEMENT)
                truth.advertisements += 1
            written = "\n".join(lines).replace("，", "&nbsp;，", 1).replace("。", "。<br/>", 1) + "\n\n\n\n"
            text = text.replace("，", " ，", 1).replace("。", "。\n", 1) + "\n"
        truth.texts[name] = text
        _write(folder / name, written.encode(codec))
    _write(folder / "論語.txt", ANALECTS.encode("big5"))
    truth.texts["論語.txt"] = ANALECTS

    # three bytes that are no character in a long file
    places = [0, len(damaged) // 4, len(damaged) // 2, len(damaged)]
    parts = [damaged[start:end].encode("gb18030") for start, end in itertools.pairwise(places)]
    _write(folder / "broken.txt", b"\xff".join([*parts, b""]))
    truth.damaged["broken.txt"] = 3

    # copies: under another name, in another encoding, cut, and three texts in a row
    for number, (name, raw_copy) in enumerate(
        {
            "第1架/001(1).txt": (folder / "第1架/001.txt").read_bytes(),
            "second/002.txt": plain[2].encode("utf-16"),
            "second/cut.txt": plain[8][: int(0.7 * len(plain[8]))].encode(),
        }.items()
    ):
        _write(folder / name, raw_copy)
        truth.copies[name] = f"第{(1, 2, 3)[number]}架/{(1, 2, 8)[number]:03d}.txt"
    collection = "collection.txt"
    _write(folder / collection, "".join(plain[10:13]).encode())
    truth.copies |= {f"第{number % 5}架/{number:03d}.txt": collection for number in (10, 11, 12)}
    truth.texts[collection] = "".join(plain[10:13])

    # archives, books and lines
    with zipfile.ZipFile(folder / "shelf.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, text in enumerate(packed[:12]):
            archive.writestr(f"卷{number}.txt", text.encode(CODECS[number % 3]))
            truth.texts[f"shelf.zip/卷{number}.txt"] = text
        archive.writestr("cover.jpg", b"\xff\xd8\xff")
    _write(folder / "one.txt.gz", gzip.compress(packed[12].encode("gb18030")))
    truth.texts["one.txt.gz"] = packed[12]
    for name, texts in {"a.jsonl": packed[13:18], "b.jsonl.gz": packed[18:24]}.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
        _write(folder / name, gzip.compress(lines) if name.endswith("gz") else lines)
        truth.texts |= {f"{name}/{number}": text for number, text in enumerate(texts, start=1)}
    _write_epub(folder / "novel.epub", packed[24:30])
    _write(folder / "scan.pdf", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    _write(folder / "kindle.mobi", b"BOOKMOBI")
    return truth


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_epub(path: Path, chapters: Sequence[str]) -> None:
    names = [f"c{number}.xhtml" for number in range(len(chapters))]
    items = "".join(
        f'<item id="i{n}" href="{name}" media-type="application/xhtml+xml"/>' for n, name in enumerate(names)
    )
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(names)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
            '<rootfile full-path="OPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        book.writestr(
            "OPS/book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><manifest>'
            f"{items}</manifest><spine>{spine}</spine></package>",
        )
        for name, text in zip(names, chapters, strict=True):
            body = "".join(f"<p>{line}</p>" for line in text.split("\n") if line)
            book.writestr(f"OPS/{name}", f'<html xmlns="http://www.w3.org/1999/xhtml"><body>{body}</body></html>')
