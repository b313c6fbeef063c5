"""Files that hold documents: texts, zips of texts, books in EPUB, and JSON with a document a line."""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from llmcore.corpus.archives import READ_BYTES, Archive, open_gzip
from llmcore.corpus.epub import epub_text
from llmcore.files import display_path, pointer_hint

READ_ENDINGS = (".txt", ".txt.gz", ".zip", ".jsonl", ".jsonl.gz", ".epub")
LINE_BYTES = 1 << 25  # the longest line of JSON, which is read into memory: a book of eleven million Chinese characters

# What systems and programs leave in folders and archives. A file "._a.txt" holds what macOS knows about "a.txt".
LITTER = ("__macosx", ".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints")


def ending(name: str) -> str:
    """What a name ends in, in lower case: ".txt", ".txt.gz"; "" if that does not look like an ending."""
    found = re.search(r"((\.txt|\.jsonl)(?=\.gz$))?\.[a-z0-9]{1,8}$", PurePosixPath(name).name.lower())
    return found[0] if found else ""


def is_litter(name: str) -> bool:
    """Whether a path inside a folder or archive, with "/", is of no interest to anybody, and so need not be listed."""
    parts = name.lower().split("/")
    return parts[-1].startswith("._") or any(part in LITTER for part in parts)


def is_read(name: str) -> bool:
    """Whether a file of this path inside the corpus, with "/", holds documents that `OpenFile` reads."""
    return ending(name) in READ_ENDINGS and not is_litter(name)


@dataclass(frozen=True)
class Member:
    """A document in a file.

    Attributes:
        name: unique in its file: the path in a zip, the number of the line in JSON from "1"; "" if the file is one
            document.
        offset: where the line starts in the unpacked JSON, bytes.
    """

    name: str = ""
    offset: int = 0


class OpenFile:
    """A file of documents, opened once for all of them. Only one thread may use it.

    Open the documents in the order of `members`: then each next one is near, and all of them together cost as much as
    reading the file once. This holds within the loop over `members` and later, in a pass over a list of them. Going
    back is allowed, but unpacks a `.jsonl.gz` from its start. One line of JSON or one book is in memory at a time;
    all else is read in blocks.

    Attributes:
        encoding: "utf-8" where the format fixes it, None where it must be found out for each document.
        left_out: endings of members of a zip that are not read, with their number. Only `.txt` is read there.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: if it is only a pointer of Git LFS, or not a whole zip archive, or a zip whose texts grow too
                much (see `archives`), or if its name has none of `READ_ENDINGS`.
        """
        self._path, self._ending = path, ending(path.name)
        self.encoding = "utf-8" if self._ending in (".jsonl", ".jsonl.gz", ".epub") else None
        self.left_out: Counter[str] = Counter()
        if self._ending not in READ_ENDINGS:
            raise ValueError(f"{display_path(path)} is not read: its name must end in {', '.join(READ_ENDINGS)}")
        if hint := pointer_hint(path):
            raise ValueError(f"{display_path(path)} cannot be read: {hint}")

        with contextlib.ExitStack() as opened:
            if self._ending in (".zip", ".epub"):
                self._archive = opened.enter_context(Archive(path))
                self._texts = self._find_texts() if self._ending == ".zip" else []
            elif self._ending in (".jsonl", ".jsonl.gz"):
                self._lines = opened.enter_context(_open_plain_or_gzip(path))
                self._line = (-1, b"")  # the one that was read last, and its offset
            self._opened = opened.pop_all()

    def members(self) -> Iterator[Member]:
        """The documents: of a zip sorted by name, of JSON in the order of lines. Lines that are blank are passed over.

        Raises:
            ValueError: if a `.jsonl.gz` is damaged. All other faults show when the document is opened or read.
        """
        if self._ending == ".zip":
            yield from map(Member, self._texts)
        elif self._ending in (".jsonl", ".jsonl.gz"):
            yield from self._find_lines()
        else:
            yield Member()

    def open(self, member: Member) -> BinaryIO:
        """A document's bytes: as they are in the file, but the text in UTF-8 of a book or a line of JSON.

        Half a surrogate, which JSON may hold and UTF-8 may not, becomes U+FFFD.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: naming the file and the document, if it cannot be read. A damaged archive may show only while
                its bytes are read. The other documents can still be opened.
        """
        if self._ending == ".zip":
            return self._archive.open(member.name)
        if self._ending == ".epub":
            return io.BytesIO(epub_text(self._archive).encode())
        if self._ending in (".txt", ".txt.gz"):
            return _open_plain_or_gzip(self._path)

        if self._line[0] != member.offset:
            self._lines.seek(member.offset)
            self._line = (member.offset, self._lines.readline(LINE_BYTES + 1))
        return io.BytesIO(_text_of_line(self._line[1], f"{display_path(self._path)}, line {member.name}"))

    def close(self) -> None:
        """Close the file. Documents that are still open must not be read after this."""
        self._opened.close()

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _find_texts(self) -> list[str]:
        """The names of a zip's texts, sorted. Counts what else is there."""
        texts = []
        for name in self._archive.members:
            if is_litter(name):
                continue
            if ending(name) == ".txt":
                texts.append(name)
            else:
                self.left_out[ending(name)] += 1
        self._archive.check_growth(texts)
        return sorted(texts)

    def _find_lines(self) -> Iterator[Member]:
        """The lines of JSON. Where the caller goes on after opening one, the file stands at the next already."""
        offset = 0
        for number in itertools.count(1):
            self._lines.seek(offset)
            line = self._lines.readline(LINE_BYTES + 1)
            if not line:
                return
            self._line = (offset, line)

            # the end of a line that is too long for memory
            size, part = len(line), line
            while part and not part.endswith(b"\n"):
                part = self._lines.readline(READ_BYTES)
                size += len(part)

            if len(line) > LINE_BYTES or line.removeprefix(codecs.BOM_UTF8).strip():
                yield Member(str(number), offset)
            offset += size


def _open_plain_or_gzip(path: Path) -> BinaryIO:
    """A file's bytes, unpacked if its name ends in `.gz`."""
    return open_gzip(path) if ending(path.name).endswith(".gz") else open(path, "rb", READ_BYTES)


def _text_of_line(line: bytes, what: str) -> bytes:
    """The field `text` of a line of JSON, in UTF-8.

    Raises:
        ValueError: naming `what`, if there is none, or the line is too long or not JSON.
    """
    if len(line) > LINE_BYTES:
        raise ValueError(f"{what} has more than {LINE_BYTES:,} bytes: move this text to a .txt file")
    try:
        # numbers are of no interest, and Python refuses to read an integer of thousands of digits
        content = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass"), parse_int=float)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 (byte {error.start + 1} of the line): convert the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON ({error.msg}, character {error.pos + 1}): mend or remove it") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply: remove it") from None

    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{what} has no text: it must look like {{"text": "…"}}')
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
