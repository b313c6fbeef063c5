"""Packed files: zip archives and gzip, unpacked as they are read, with bounds on size and errors in words."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import posixpath
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

from llmcore.files import display_path, one_line

# Text becomes three to ten times smaller in an archive. An archive that grows far more is made to fill memory or disk.
UNPACKED_RATIO = 100  # at most, unpacked size / packed size, of a member and of all texts of an archive
UNPACKED_ALLOWED = 10_000_000  # bytes that are unpacked at any ratio
DIRECTORY_BYTES = 1 << 24  # of a zip's list of members, which is read into memory: about 100,000 of them
READ_BYTES = 1 << 16
UTF8_FLAG = 0x800  # of a member: its name is in UTF-8
SAMPLE_NAMES = 1000  # that tell the encoding of all

# Methods that zipfile unpacks in small steps. It unpacks 4 KiB of bzip2 at once, which may become gigabytes.
STEPWISE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Archive:
    """A zip archive. Its list of members is read once; members are unpacked as they are read.

    Attributes:
        name: of the file, for messages.
        members: what zipfile knows of each member that is not a folder, by its name. Names are made clean: relative,
            without "..", visible on one line. A name that occurs again gets a number: "a (2).txt".
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read the list of members.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: if it is not a whole zip archive, or has too many members.
        """
        self.name, self._size = display_path(path), os.stat(path).st_size
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(_Directory(open(path, "rb", buffering=0)))
            with _in_words(self.name):
                self._zip = opened.enter_context(zipfile.ZipFile(file))
            self._opened = opened.pop_all()

        named = zip(_decoded_names(self._zip.infolist()), self._zip.infolist(), strict=True)
        files = [(_clean_name(name), info) for name, info in named if not name.endswith(("/", "\\"))]
        self.members = dict(zip(_numbered(name for name, _ in files), (info for _, info in files), strict=True))

    def check_growth(self, names: list[str]) -> None:
        """Refuse an archive whose members grow too much together. zipfile unpacks no more than a member says.

        Raises:
            ValueError: if they do.
        """
        size = sum(self.members[name].file_size for name in names)
        if size > max(UNPACKED_ALLOWED, UNPACKED_RATIO * self._size):
            raise ValueError(f"{self.name} {_growth(size, self._size)}")

    def open(self, name: str) -> BinaryIO:
        """A member's bytes, unpacked as they are read. One can seek, back only by unpacking from the start.

        Raises:
            ValueError: now or while reading, if the member is missing, encrypted, damaged, too large, or packed in a
                rare way.
        """
        what = f"{one_line(name)} in {self.name}"
        if name not in self.members:
            raise ValueError(f"{what} is missing: get the file anew")

        info = self.members[name]
        if info.flag_bits & 1:
            raise ValueError(f"{what} is encrypted: unpack the archive with its password, or remove it")
        if info.compress_type not in STEPWISE:
            raise ValueError(
                f"{what} is packed by method {info.compress_type}; only 0 (stored) and 8 (deflate) are read: unpack "
                "the archive, or pack it anew"
            )
        with _in_words(what):
            member = self._zip.open(info)
        return io.BufferedReader(_Unpacked(member, what, info.compress_size), READ_BYTES)

    def read(self, name: str, limit: int) -> bytes:
        """A member's bytes, at most `limit` of them.

        Raises:
            ValueError: if it is larger, or `open` refuses it.
        """
        with self.open(name) as member:
            content = member.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"{one_line(name)} in {self.name} has more than {limit:,} bytes: remove the file")
        return content

    def close(self) -> None:
        """Close the file."""
        self._opened.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_gzip(path: Path) -> BinaryIO:
    """A gzip file's bytes, unpacked as they are read. One can seek, back only by unpacking from the start.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: while reading, if the file is damaged, or grows too much.
    """
    return io.BufferedReader(_Unpacked(gzip.GzipFile(path), display_path(path), os.stat(path).st_size), READ_BYTES)


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Turn the many kinds of errors of zipfile, gzip and zlib into a ValueError that says what to do."""
    try:
        yield
    except Exception as error:
        # errors of the disk keep their kind; a wrong place in a damaged archive is not one of them
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = one_line(error)[:200] or type(error).__name__  # zipfile may quote a long name
        raise ValueError(f"{what} cannot be unpacked ({reason}): get it anew, or remove it") from None


class _Directory(io.BufferedReader):
    """A zip archive's file. zipfile reads the whole list of members in one call, as long as the archive says."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > DIRECTORY_BYTES:
            raise ValueError(f"its list of members has {size:,} bytes, and at most {DIRECTORY_BYTES:,} are read")
        return super().read(size)


class _Unpacked(io.RawIOBase):
    """An unpacking stream of zipfile or gzip with a bound on its size, whose errors are in words."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, what: str, packed_size: int) -> None:
        """Take over a stream, its name for messages, and its size before unpacking in bytes."""
        self._stream, self._what, self._packed_size = stream, what, packed_size
        self._allowed = max(UNPACKED_ALLOWED, UNPACKED_RATIO * packed_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with _in_words(self._what):
            content = self._stream.read(len(buffer))
            size = self._stream.tell()
        if size > self._allowed:
            raise ValueError(f"{self._what} {_growth(size, self._packed_size)}")
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with _in_words(self._what):
            return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


def _growth(size: int, packed_size: int) -> str:
    return (
        f"grows from {packed_size:,} to {size:,} bytes or more when it is unpacked, and text grows at most "
        f"{UNPACKED_RATIO} times: remove it, or unpack it yourself"
    )


# Names of members


def _decoded_names(infos: list[zipfile.ZipInfo]) -> list[str]:
    """The members' names. Without the UTF-8 flag, zipfile takes bytes for cp437, but tools write what they like."""
    raw = [b"" if info.flag_bits & UTF8_FLAG else info.orig_filename.encode("cp437") for info in infos]
    encoding = _names_encoding(b"\n".join([name for name in raw if not name.isascii()][:SAMPLE_NAMES]))
    return [
        name.decode(encoding, "backslashreplace") if name else info.orig_filename
        for name, info in zip(raw, infos, strict=True)
    ]


def _names_encoding(raw: bytes) -> str:
    """The encoding of names: UTF-8, GB18030 or Big5; else cp437, the format's own.

    GBK and Big5 have their common characters before the rare ones. In the right encoding nearly all characters are
    common. In the wrong one about half are, or fewer. The letters of cp437 make none.
    """
    with contextlib.suppress(UnicodeDecodeError):
        raw.decode("utf-8")
        return "utf-8"

    shares = {}
    for encoding, common in (("gb18030", rb"[\xb0-\xd7][\xa1-\xfe]"), ("big5hkscs", rb"[\xa4-\xc6][\x40-\xfe]")):
        with contextlib.suppress(UnicodeDecodeError):
            letters = [letter.encode(encoding) for letter in raw.decode(encoding) if letter > "\x7f"]
            shares[encoding] = sum(bool(re.fullmatch(common, letter)) for letter in letters) / len(letters)
    best = max(shares, key=lambda encoding: shares[encoding], default="")
    return best if shares.get(best, 0) > 0.2 else "cp437"


def _clean_name(name: str) -> str:
    """A name as a relative path of visible characters. Windows' tools may write backslashes and drives."""
    parts = re.sub(r"^[A-Za-z]:", "", name.partition("\0")[0].replace("\\", "/")).split("/")
    return one_line("/".join(part for part in parts if part not in ("", ".", ".."))) or "unnamed"


def _numbered(names: Iterable[str]) -> Iterator[str]:
    """The same names; one that has occurred before gets a number, the first that is free."""
    given: dict[str, int] = {}
    for name in names:
        unique, (start, suffix) = name, posixpath.splitext(name)
        while unique in given:
            given[name] += 1
            unique = f"{start} ({given[name]}){suffix}"
        given[unique] = 1
        yield unique
