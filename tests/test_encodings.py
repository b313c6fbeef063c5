"""Encodings are found, or refused in words, and their texts come whole out of blocks."""

from __future__ import annotations

import io
import random
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcore.corpus import encodings
from llmcore.corpus.encodings import Damage, broken_allowed, check_encoding, decoded_blocks, find_encoding
from tests import passages

BLOCK = encodings.READ_BYTES
CODECS = ["utf-8", "utf-16-le", "utf-32-be", "gb18030", "big5hkscs", "cp932", "euc_jis_2004", "cp949", "cp1252"]


def read(raw: bytes, damage: Damage | None = None) -> tuple[str, str]:
    """The encoding and the text of some bytes, as of a file novel.txt."""
    stream = io.BytesIO(raw)
    encoding = find_encoding(stream, "novel.txt")
    assert stream.tell() == 0
    return encoding, "".join(decoded_blocks(stream, encoding, "novel.txt", damage))


class Crumbs(io.BytesIO):
    """A stream that gives so many bytes at a time."""

    def __init__(self, raw: bytes, sizes: list[int]) -> None:
        super().__init__(raw)
        self.sizes = sizes

    def read(self, size: int | None = -1, /) -> bytes:
        self.sizes = [*self.sizes[1:], self.sizes[0]]
        return super().read(self.sizes[0])


class Long(io.RawIOBase):
    """So many copies of a block, made when they are read. Counts how often the stream was sought back."""

    def __init__(self, block: bytes, copies: int) -> None:
        self.block, self.size, self.place, self.back = block, copies * len(block), 0, 0

    def read(self, size: int = -1, /) -> bytes:
        size = min(size, self.size - self.place)
        start = self.place % len(self.block)
        self.place += size
        return (self.block * (2 + size // len(self.block)))[start : start + size]

    def seek(self, place: int, whence: int = 0, /) -> int:
        self.back += place < self.place
        self.place = place
        return place


# Text in blocks


@settings(deadline=None)
@given(st.text(), st.sampled_from(CODECS), st.lists(st.integers(1, 5), min_size=1, max_size=3))
@example("\ufeff\r", "utf-16-le", [1])
@example("a\r\n\r\n\rb\r", "gb18030", [2])
@example("\ufffd\ufffd", "utf-8", [2])
def test_blocks_of_any_size_join_to_the_whole_text(text: str, encoding: str, sizes: list[int]) -> None:
    raw = text.encode(encoding, "ignore")
    damage = Damage()
    found = "".join(decoded_blocks(Crumbs(raw, sizes), encoding, "novel.txt", damage))
    whole = raw.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if encoding == "big5hkscs":
        whole = whole.translate(str.maketrans(encodings.BIG5_SIGNS))
    assert (found, damage) == (whole, Damage())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_a_byte_order_mark_decides_and_is_dropped(encoding: str) -> None:
    text = "玄德曰：\r\n“善。”"
    raw = text.encode(encoding) if encoding in ("utf-8-sig", "utf-16", "utf-32") else f"\ufeff{text}".encode(encoding)
    found, read_text = read(raw)
    assert read_text == "玄德曰：\n“善。”"
    assert found in (encoding, "utf-8", f"{encoding}-{sys.byteorder[0]}e")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_broken_bytes_are_counted_each(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(["utf-8", "gb18030"]))
    text = passages.MODERN * 4 + "\ufffd"
    places = data.draw(st.sets(st.integers(0, len(text)), max_size=broken_allowed(len(text.encode(encoding)))))
    pieces = [text[a:b] for a, b in zip([0, *sorted(places)], [*sorted(places), len(text)], strict=True)]
    raw = b"\xff".join(piece.encode(encoding) for piece in pieces)
    damage = Damage()
    assert read(raw, damage) == (encoding, "\ufffd".join(pieces))
    first = len(pieces[0].encode(encoding)) if places else None
    assert damage == Damage(len(places), first)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_a_few_broken_bytes_anywhere_are_damage(encoding: str) -> None:
    text = passages.MODERN * 300
    for places in ([0], [5, 9, 13], range(60), range(0, len(text), 1500), [len(text) - 2]):
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        damage = Damage()
        raw = b"\xff".join(piece.encode(encoding) for piece in pieces)
        assert read(raw, damage) == (encoding, "\ufffd".join(pieces))
        assert damage.count == len(places)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_the_first_bad_byte_is_found_across_a_border(encoding: str) -> None:
    for shift in range(4):
        raw = b"x" * (BLOCK - shift) + "曹".encode(encoding)[:-1] + b"!" + "操".encode(encoding)
        damage = Damage()
        blocks = decoded_blocks(io.BytesIO(raw), encoding, "novel.txt", damage)
        assert "".join(blocks) == "x" * (BLOCK - shift) + "\ufffd!操"
        assert damage == Damage(1, BLOCK - shift)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_many_broken_bytes_are_refused(encoding: str) -> None:
    raw = passages.MODERN.encode(encoding) + "林雨".encode(encoding).join([b"\xff"] * 9) + b"\n"
    with pytest.raises(ValueError, match=rf"novel\.txt is not {encoding}: 9 .* the first at byte") as error:
        list(decoded_blocks(io.BytesIO(raw), encoding, "novel.txt"))
    assert f"byte {len(passages.MODERN.encode(encoding))}." in str(error.value)
    assert "encoding=" in str(error.value)


# What is found


@pytest.mark.parametrize(
    ("passage", "written", "found"),
    [
        ("MODERN", "gb18030", "gb18030"),
        ("MODERN", "gb2312", "gb18030"),
        ("MODERN", "utf-16-le", "utf-16-le"),
        ("TRADITIONAL", "big5", "big5hkscs"),
        ("TRADITIONAL", "gbk", "gb18030"),
        ("TRADITIONAL", "utf-16-be", "utf-16-be"),
        ("CLASSICAL", "big5", "big5hkscs"),
        ("CLASSICAL", "gb18030", "gb18030"),
        ("CLASSICAL", "utf-16-le", "utf-16-le"),
        ("JAPANESE", "utf-8", "utf-8"),
        ("JAPANESE", "shift_jis", "cp932"),
        ("JAPANESE", "euc_jp", "euc_jis_2004"),
        ("KOREAN", "euc_kr", "cp949"),
        ("KOREAN", "utf-16-le", "utf-16-le"),
        ("ENGLISH", "utf-8", "utf-8"),
        ("ENGLISH", "cp1252", "cp1252"),
        ("ENGLISH", "utf-16-be", "utf-16-be"),
        ("FRENCH", "cp1252", "cp1252"),
        ("RUSSIAN", "cp1251", "cp1251"),
        ("RUSSIAN", "koi8_r", "koi8_r"),
    ],
)
def test_a_passage_is_read_whole_and_cut(passage: str, written: str, found: str) -> None:
    text = getattr(passages, passage)
    assert read(text.encode(written)) == (found, text)
    for size in range(160, 300, 17):
        for start in range(0, len(text) - 160, 23):
            raw = text[start:].encode(written)[:size]  # ends at any byte
            kept = raw.decode(written, "ignore")
            if not kept.isascii():
                encoding, cut = read(raw)
                assert encoding == found
                assert cut in (kept, kept + "\ufffd")


def test_chapters_are_read_in_every_encoding_of_chinese(sanguo: Path) -> None:
    for file in sorted(sanguo.iterdir())[7::20]:
        text = file.read_text(encoding="utf-8")
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "gbk"):
            assert read(text.encode(encoding, "ignore"))[1] == text.encode(encoding, "ignore").decode(encoding)


def test_signs_of_taiwan_and_characters_of_hong_kong_are_read() -> None:
    assert read((passages.TRADITIONAL + "哈利‧波特～").encode("cp950"))[1].endswith("哈利‧波特～")
    assert read((passages.TRADITIONAL + "佢哋嘅嘢喺邊度").encode("big5hkscs"))[1].endswith("佢哋嘅嘢喺邊度")


@pytest.mark.parametrize("encoding", ["gb18030", "cp950", "utf-8"])
@pytest.mark.parametrize("before", [50, BLOCK - 1, BLOCK, 2 * BLOCK + 3, 5 * BLOCK - 7])
def test_what_is_not_ascii_decides_however_late_it_comes(encoding: str, before: int) -> None:
    text = "x" * before + passages.TRADITIONAL.replace("\n", "")
    assert read(text.encode(encoding))[1] == text
    text = ("All rights reserved.\n" * before)[:before] + passages.TRADITIONAL
    assert read(text.encode(encoding))[1] == text


def test_nothing_and_ascii_are_utf_8() -> None:
    assert read(b"") == ("utf-8", "")
    assert read(b"Call me Ishmael.\r\n" * 9) == ("utf-8", "Call me Ishmael.\n" * 9)


def test_one_quote_of_windows_in_english_is_found() -> None:
    assert read(b"The ship\x92s bell rang.") == ("cp1252", "The ship’s bell rang.")


def test_a_member_of_an_archive_is_read() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr("a.txt", (passages.MODERN * 1000).encode("gb18030"))
    with zipfile.ZipFile(archive).open("a.txt") as member:
        assert find_encoding(member, "a.txt") == "gb18030"
        assert "".join(decoded_blocks(member, "gb18030", "a.txt")) == passages.MODERN * 1000


# What is refused


@pytest.mark.parametrize("copies", [3, 500])
@pytest.mark.parametrize(("first", "second"), [("utf-8", "gb18030"), ("gb18030", "utf-8"), ("utf-8", "big5")])
def test_two_encodings_in_one_file_are_refused(first: str, second: str, copies: int) -> None:
    text = passages.TRADITIONAL * copies
    with pytest.raises(ValueError, match=r"novel\.txt.*UTF-8"):
        read(text.encode(first) + text.encode(second))
    french = passages.FRENCH * 10
    with pytest.raises(ValueError, match=r"a part of novel\.txt is UTF-8"):
        read(french.encode() + french.encode("cp1252"))


JPEG = bytes.fromhex("ffd8ffe000104a46494600010101004800480000ffdb004300080606070605080707")
BINARY: dict[str, Callable[[random.Random], bytes]] = {
    "a picture": lambda chance: JPEG + chance.randbytes(chance.randrange(1000, 100_000)),
    "zeros": lambda chance: bytes(chance.randrange(10, 100_000)),
    "random": lambda chance: chance.randbytes(chance.randrange(40, 10_000)),
    "random, not ASCII": lambda chance: bytes(chance.choices(range(128, 256), k=chance.randrange(40, 10_000))),
    "packed": lambda chance: zlib.compress(chance.randbytes(500).hex().encode()),
    "a program": lambda chance: Path(sys.executable).read_bytes()[chance.randrange(9000) :][:90_000],
    "text, then zeros": lambda chance: passages.MODERN.encode() * 30 + bytes(chance.randrange(10_000, 200_000)),
}


@pytest.mark.parametrize("kind", BINARY)
def test_binary_data_are_refused_in_words(kind: str) -> None:
    chance = random.Random(0)
    for _ in range(20):
        with pytest.raises(ValueError, match=r"novel\.txt"):
            read(BINARY[kind](chance))


@settings(deadline=None)
@given(st.binary(max_size=3000) | st.binary(max_size=60).map(lambda raw: raw * 50))
def test_any_bytes_give_text_or_a_word_about_the_file(raw: bytes) -> None:
    try:
        _, text = read(raw)
    except ValueError as error:
        assert not isinstance(error, UnicodeError)
        assert "novel.txt" in str(error)
    else:
        text.encode()  # without half a surrogate


def test_too_little_to_be_sure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"novel\.txt holds too little.* gb18030.*encoding="):
        read(("x" * 99 + "曹操").encode("gbk"))


# A person's own choice


def test_a_chosen_encoding_is_used_whatever_the_bytes_say() -> None:
    raw = ("x" * 99 + "曹操").encode("gbk")
    assert "".join(decoded_blocks(io.BytesIO(raw), check_encoding("GBK"), "novel.txt")) == "x" * 99 + "曹操"
    with pytest.raises(ValueError, match=r"novel\.txt is not gb18030: .* There it is UTF-8"):
        list(decoded_blocks(io.BytesIO(passages.MODERN.encode() * 9), "gb18030", "novel.txt"))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("auto", "auto"),
        ("gb2312", "gb18030"),
        ("GBK", "gb18030"),
        ("UTF8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("big5", "big5hkscs"),
        ("Shift-JIS", "cp932"),
        ("euc-kr", "cp949"),
        ("latin-1", "iso8859-1"),
        ("utf16", "utf-16"),
    ],
)
def test_a_chosen_encoding_becomes_its_widest_form(name: str, codec: str) -> None:
    assert check_encoding(name) == codec
    if name != "auto":
        assert check_encoding(codec) == codec
        assert "".join(decoded_blocks(io.BytesIO("a\r\nb".encode(codec)), codec, "novel.txt")) == "a\nb"


@pytest.mark.parametrize(
    "name", ["rot13", "hex", "base64", "idna", "punycode", "unicode_escape", "utf-7", "", "x\0", 8]
)
def test_an_encoding_that_is_none_of_texts_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"encoding=.* auto.*gb18030"):
        check_encoding(name)


# Size


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_memory_does_not_grow_with_the_text(encoding: str) -> None:
    def peak(megabytes: int) -> int:
        block = passages.MODERN.encode(encoding)
        stream = Long(block, megabytes * 10**6 // len(block))
        tracemalloc.start()
        found = find_encoding(stream, "novel.txt")  # type: ignore[arg-type]
        characters = sum(map(len, decoded_blocks(stream, found, "novel.txt")))  # type: ignore[arg-type]
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert characters == stream.size // len(block) * len(passages.MODERN)
        assert stream.back <= 2
        return memory

    peak(1)  # builds the tables
    assert peak(64) < 2 * peak(2) < 10**7
