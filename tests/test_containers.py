"""Files of documents: each document comes out as it went in, and what is broken or hostile ends in words."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import os
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.corpus import archives, containers
from llmcore.corpus.containers import Member, OpenFile, ending, is_litter, is_read
from llmcore.files import one_line
from tests.helpers import examples

TEXT = "滚滚长江东逝水，浪花淘尽英雄。\n"


def documents(path: Path) -> dict[str, bytes]:
    """All documents of a file by name, read in order."""
    with OpenFile(path) as file:
        return {member.name: file.open(member).read() for member in file.members()}


def refusal(path: Path) -> str:
    """The message with which a file, or a document of it, is refused."""
    with pytest.raises(ValueError, match=re.escape(path.name)) as error:
        documents(path)
    assert len(str(error.value)) < 400
    return str(error.value)


def packed(folder: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder / "书.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def raw_zip(folder: Path, names: list[bytes], flag: int = 0, method: int = 0, **changes: int) -> Path:
    """A zip archive written byte by byte. `changes` may set the size, crc or directory_size that it claims."""
    body, directory = b"", b""
    for number, name in enumerate(names):
        content = TEXT.encode() + str(number).encode()
        crc, size = changes.get("crc", zlib.crc32(content)), changes.get("size", len(content))
        fields = struct.pack("<5H3L2H", 20, flag, method, 0, 0, crc, len(content), size, len(name), 0)
        directory += b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<3H2L", 0, 0, 0, 0, len(body)) + name
        body += b"PK\3\4" + fields + name + content
    claimed = changes.get("directory_size", len(directory))
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, len(names), len(names), claimed, len(body), 0)
    path = folder / "raw.zip"
    path.write_bytes(body + directory + end)
    return path


# Which files


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "部/a.Txt.GZ", "a.jsonl", "a.JSONL.gz", "b.zip", "第1.5卷.epub"])
def test_these_files_are_read(name: str) -> None:
    assert is_read(name)
    assert not is_litter(name)


@pytest.mark.parametrize(
    "name", ["__MACOSX/a.txt", "b/._a.txt", ".DS_Store", "x/Thumbs.db", "b/._书.zip", "Desktop.ini"]
)
def test_what_systems_leave_behind_is_litter(name: str) -> None:
    assert is_litter(name)
    assert not is_read(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.PDF", ".pdf"),
        ("a.txt.gz", ".txt.gz"),
        ("a.tar.gz", ".gz"),
        ("no.dir/README", ""),
        ("全集.完 作者", ""),
        ("a.", ""),
        (".txt", ".txt"),
    ],
)
def test_an_ending_is_short_and_in_lower_case(name: str, expected: str) -> None:
    assert ending(name) == expected


def test_a_file_that_is_not_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert ".jsonl.gz" in refusal(tmp_path / "a.pdf")


# Texts


def test_a_text_is_its_raw_bytes_packed_or_not(tmp_path: Path) -> None:
    content = TEXT.encode("gb18030") * 10_000
    (tmp_path / "a.TXT").write_bytes(content)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    for name in ("a.TXT", "a.txt.gz"):
        with OpenFile(tmp_path / name) as file:
            assert file.encoding is None
            assert list(file.members()) == [Member()]
            with file.open(Member()) as document:
                assert document.read(7) == content[:7]
                assert document.seek(300_000) == 300_000
                assert document.read(5) == content[300_000:300_005]
                document.seek(0)
                assert document.read() == content


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip", "empty trailer"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    content = gzip.compress(random.Random(0).randbytes(1000))
    damaged = {
        "truncated": content[:500],
        "flipped": content[:-8] + bytes(4) + content[-4:],
        "no gzip": b"plain text",
        "empty trailer": content[:-8],
    }
    (tmp_path / "a.txt.gz").write_bytes(damaged[damage])
    assert "get it anew" in refusal(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_gzip_bomb_ends_at_the_bound(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(bytes(30_000_000)))
    message = refusal(tmp_path / name)
    assert "100 times" in message
    size = int(message.split(" to ")[1].split(" bytes")[0].replace(",", ""))
    assert archives.UNPACKED_ALLOWED < size < archives.UNPACKED_ALLOWED + 200_000


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(tmp_path / "a.zip")


# Zip archives


def test_the_texts_of_a_zip_come_sorted_and_the_rest_is_counted(tmp_path: Path) -> None:
    members = {name: name.encode() for name in ("b.txt", "卷/a.TXT", "a.txt", "x.PDF", "y.pdf", "in.zip", "README")}
    litter = {"__MACOSX/._a.txt": b"?", "卷/.DS_Store": b"?", "卷/._b.txt": b"?", "empty/": b""}
    path = packed(tmp_path, members | litter)
    assert documents(path) == {name: members[name] for name in ("a.txt", "b.txt", "卷/a.TXT")}
    with OpenFile(path) as file:
        assert file.left_out == {".pdf": 2, ".zip": 1, "": 1}
        assert file.encoding is None


def test_a_member_can_be_read_again_and_in_places(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(300_000)
    with OpenFile(packed(tmp_path, {"a.txt": content, "b.txt": b"b"})) as file:
        first, second = file.members()
        with file.open(first) as document:
            assert document.read(10) == content[:10]
            assert file.open(second).read() == b"b"
            assert document.read(10) == content[10:20]
            document.seek(200_000)
            assert document.read(9) == content[200_000:200_009]
            document.seek(5)
            assert document.read() == content[5:]
        assert file.open(first).read() == content


@pytest.mark.parametrize(
    ("encoding", "names"),
    [
        ("gb18030", ["三国演义.txt", "红楼梦（上）.txt"]),
        ("gb18030", ["春.txt"]),
        ("gb18030", ["宝𠮷.txt", "刘慈欣/三体.txt"]),
        ("big5", ["三國演義.txt", "紅樓夢（上）.txt"]),
        ("big5", ["水滸傳.txt"]),
        ("utf-8", ["三国演义.txt", "café.txt"]),
        ("cp437", ["café.txt", "Müller.txt"]),
    ],
)
def test_names_without_the_utf8_flag_are_decoded(tmp_path: Path, encoding: str, names: list[str]) -> None:
    path = raw_zip(tmp_path, [name.encode(encoding) for name in names])
    assert set(documents(path)) == set(names)


def test_one_name_alone_tells_its_encoding(tmp_path: Path, sanguo: Path) -> None:
    simplified = [path.read_text(encoding="utf-8").split("\n")[0] for path in sorted(sanguo.glob("*.txt"))]
    traditional = ["天地玄黃宇宙洪荒", "日月盈昃辰宿列張", "寒來暑往秋收冬藏", "閏餘成歲律呂調陽", "雲騰致雨露結為霜"]
    for encoding, titles in (("gbk", simplified), ("gb18030", traditional), ("big5", traditional)):
        for title in titles:
            assert list(documents(raw_zip(tmp_path, [f"{title}.txt".encode(encoding)]))) == [f"{title}.txt"]


def test_names_are_clean_and_each_has_its_own_document(tmp_path: Path) -> None:
    names = [
        "../../etc/a.txt",
        "/etc/a.txt",
        "C:\\x\\b.txt",
        "etc/a (2).txt",
        "a\x1b[31m\n.txt",
        "./etc//a.txt",
        "..",
        "d\\",
    ]
    read = documents(raw_zip(tmp_path, [name.encode() for name in names]))
    assert {name: int(text.decode().split("\n")[1]) for name, text in read.items()} == {
        "etc/a.txt": 0,
        "etc/a (2).txt": 1,
        "x/b.txt": 2,
        "etc/a (2) (2).txt": 3,
        "a⟨1B⟩[31m⟨0A⟩.txt": 4,
        "etc/a (3).txt": 5,
    }


@given(st.lists(st.binary(min_size=1, max_size=12), max_size=8), st.sampled_from([0, 0x800]))
@settings(max_examples=examples(60), deadline=None)
def test_any_names_end_in_documents_or_words(tmp_path_factory: Any, names: list[bytes], flag: int) -> None:
    path = raw_zip(tmp_path_factory.mktemp("zip"), [name + b".txt" for name in names], flag)
    try:
        read = documents(path)
    except ValueError as error:
        assert "raw.zip" in str(error)
    else:
        assert all(one_line(name) == name and not name.startswith("/") for name in read)
        assert all(".." not in name.split("/") for name in read)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flag": 1}, "encrypted"),
        ({"method": 12}, "method 12"),
        ({"method": 14}, "method 14"),
        ({"method": 99}, "method 99"),
        ({"crc": 1}, "CRC"),
        ({"size": 10}, "CRC"),
        ({"flag": 0x20}, "patched"),
    ],
)
def test_a_member_that_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    message = refusal(raw_zip(tmp_path, [b"a.txt"], **changes))
    assert words in message
    assert message.startswith("a.txt in ")


def test_a_member_that_has_gone_since_is_named(tmp_path: Path) -> None:
    with OpenFile(packed(tmp_path, {"a.txt": b"a"})) as file, pytest.raises(ValueError, match=r"b\.txt in .*missing"):
        file.open(Member("b.txt"))


def test_other_members_of_a_damaged_zip_are_still_read(tmp_path: Path) -> None:
    path = packed(tmp_path, {"a.txt": b"first", "b.txt": b"second"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"first", b"worst"))
    with OpenFile(path) as file:
        first, second = file.members()
        with pytest.raises(ValueError, match=r"a\.txt in .*CRC"):
            file.open(first).read()
        assert file.open(second).read() == b"second"


@given(st.data())
@settings(max_examples=examples(80), deadline=None)
def test_a_zip_with_any_damage_ends_in_documents_or_words(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = packed(tmp_path_factory.mktemp("zip"), {"a.txt": TEXT.encode() * 9, "b/c.txt": b"c"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        documents(path)
    except ValueError as error:
        assert path.name in str(error)


def test_a_zip_of_zeros_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = packed(tmp_path, {f"{number}.txt": bytes(9_000_000) for number in range(3)})
    with pytest.raises(ValueError, match=r"书\.zip grows .* 27,000,000"):
        OpenFile(path)
    assert len(documents(packed(tmp_path, {"a.txt": bytes(9_000_000)}))["a.txt"]) == 9_000_000


def test_members_that_share_their_bytes_are_a_bomb(tmp_path: Path) -> None:
    content = zlib.compress(bytes(9_000_000), 9)[2:-4]
    local = struct.pack("<5H3L2H", 20, 0, 8, 0, 0, zlib.crc32(bytes(9_000_000)), len(content), 9_000_000, 5, 0)
    entry = b"PK\1\2" + struct.pack("<H", 20) + local + struct.pack("<3H2L", 0, 0, 0, 0, 0) + b"a.txt"
    body = b"PK\3\4" + local + b"a.txt" + content
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 900, 900, 900 * len(entry), len(body), 0)
    (tmp_path / "a.zip").write_bytes(body + 900 * entry + end)
    assert "8,100,000,000" in refusal(tmp_path / "a.zip")


def test_one_member_that_grows_too_much_is_refused_while_it_is_read(tmp_path: Path) -> None:
    path = packed(tmp_path, {"a.txt": bytes(20_000_000)})
    with open(path, "ab") as file:  # what stands before or after an archive counts as its size
        file.write(bytes(60_000))
    content = path.read_bytes()
    path.write_bytes(random.Random(0).randbytes(300_000) + content[:-60_000])
    with OpenFile(path) as opened, pytest.raises(ValueError, match=r"a\.txt in .* grows from .* to 10,0"):
        opened.open(Member("a.txt")).read()


def test_a_list_of_members_of_17_megabytes_is_not_read(tmp_path: Path) -> None:
    path = raw_zip(tmp_path, [b"a.txt"], directory_size=17_000_000)
    content = path.read_bytes()
    with open(path, "wb") as file:
        file.seek(17_000_000)  # the list could be there
        file.write(content)
    assert "its list of members has 17,000,000 bytes" in refusal(path)


# JSON lines


def lines_file(folder: Path, content: bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    return path


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    st.sampled_from(["a.jsonl", "a.jsonl.gz"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=examples(80), deadline=None)
def test_texts_come_back_from_json_lines(
    tmp_path_factory: Any, texts: list[str], end: str, name: str, ascii_only: bool, has_mark: bool
) -> None:
    lines = [f'{{"id": {"9" * 5000}, "text": {json.dumps(text, ensure_ascii=ascii_only)}}}' for text in texts]
    content = ("\ufeff" if has_mark else "") + end.join(lines)
    path = lines_file(tmp_path_factory.mktemp("lines"), content.encode(), name)
    with OpenFile(path) as file:
        assert file.encoding == "utf-8"
        members = list(file.members())
        assert [file.open(member).read().decode() for member in members] == texts
        assert [file.open(member).read().decode() for member in reversed(members)] == texts[::-1]
    lines_before = end.count("\n")
    assert [member.name for member in members] == [str(1 + lines_before * number) for number in range(len(texts))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"content": "a"}', "no text"),
        (b'{"text": 5}', "no text"),
        (b'{"text": null}', "no text"),
        (b'["text"]', "no text"),
        (b'"text"', "no text"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON (Extra data, character 15)"),
        (b"\xff\xfe{", "not UTF-8"),
        ('{"text": "三国"}'.encode("gbk"), "not UTF-8"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_the_next_is_read(tmp_path: Path, line: bytes, words: str) -> None:
    path = lines_file(tmp_path, b'{"text": "first"}\n' + line + b'\n{"text": "third"}')
    assert words in refusal(path)
    with OpenFile(path) as file:
        read = {}
        for member in file.members():
            try:
                read[member.name] = file.open(member).read()
            except ValueError as error:
                assert "a.jsonl, line 2 " in str(error)
    assert read == {"1": b"first", "3": b"third"}


def test_a_line_that_is_too_long_for_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [b'{"text": "a"}', b'{"text": "' + b"b" * 200_000 + b'"}', b" " * 2000 + b'{"text": "c"}', b'{"text": "d"}']
    monkeypatch.setattr(containers, "LINE_BYTES", 1000)
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = lines_file(tmp_path, b"\n".join(lines), name)
        assert "line 2 has more than 1,000 bytes" in refusal(path)
        with OpenFile(path) as file:
            members = list(file.members())
            assert [member.name for member in members] == ["1", "2", "3", "4"]
            assert file.open(members[3]).read() == b"d"


def test_half_a_surrogate_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = lines_file(tmp_path, rb'{"text": "a\ud83db\ude00 \ud83d\ude00"}' + b"\n" + b'{"text": "\xed\xa0\xbd"}')
    assert [text.decode() for text in documents(path).values()] == ["a\ufffdb\ufffd \U0001f600", "\ufffd"]


def test_a_damaged_end_of_packed_json_is_found(tmp_path: Path) -> None:
    path = lines_file(tmp_path, b'{"text": "a"}\n' * 1000, "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-10])
    assert "get it anew" in refusal(path)


# Many documents in one file


class CountingFile(io.FileIO):
    """A file that counts the bytes that are read from it."""

    counted = 0

    def readinto(self, buffer: Any, /) -> int | None:
        size = super().readinto(buffer)
        CountingFile.counted += size or 0
        return size

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(-1 if size is None else size) or b""
        CountingFile.counted += len(content)
        return content


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.zip"])
def test_a_pass_over_many_documents_reads_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    numbers, path = random.Random(0), tmp_path / name
    texts = [str(numbers.random()) * 20 for _ in range(3000)]
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            for number, text in enumerate(texts):
                archive.writestr(f"{number:04d}.txt", text)
    else:
        lines_file(tmp_path, "\n".join(json.dumps({"text": text}) for text in texts).encode(), name)

    def counting_open(file: Any, mode: str = "r", buffering: int = -1) -> Any:
        raw = CountingFile(file, mode.replace("b", ""))
        return raw if buffering == 0 else io.BufferedReader(raw)

    # a first pass that finds the documents, a second over some of them
    monkeypatch.setattr(builtins, "open", counting_open)
    CountingFile.counted = 0
    with OpenFile(path) as file:
        members = []
        for number, member in enumerate(file.members()):
            assert file.open(member).read().decode() == texts[number]
            members.append(member)
        first_pass = CountingFile.counted
        for number, member in list(enumerate(members))[::7]:
            assert file.open(member).read().decode() == texts[number]
    monkeypatch.undo()

    assert len(members) == 3000
    allowed = os.path.getsize(path) * 1.5 + 200_000
    assert path.stat().st_size < first_pass < allowed
    assert CountingFile.counted - first_pass < allowed
