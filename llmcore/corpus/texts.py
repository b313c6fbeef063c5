"""Text files: which ones a folder holds, and what stands in them, a block at a time."""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

# What texts in Chinese, and in most others, are full of; to tell encodings apart
FREQUENT = "，。的一是不了人我在有他这這为為们們来來个個说說国國道上大中到就那你要出也得里裡后後会會 \n"
FREQUENT += "abcdefghijklmnopqrstuvwxyz"

READ_BYTES = 1 << 16  # at a time, of a text; the C library keeps larger pieces of memory for itself


def find_texts(folder: Path) -> list[Path]:
    """All `.txt` files below a folder, recursively, in sorted order; each folder is entered once.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir={str(folder)!r} is not a folder; give one that holds .txt files")
    found, seen = [], set()
    for parent, names, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        if here in seen:  # a symbolic link back up: do not walk in circles
            names.clear()
            continue
        seen.add(here)
        found += [Path(parent, name) for name in files if name.lower().endswith(".txt")]
    if not found:
        raise FileNotFoundError(f"no file matches *.txt in data_dir={str(folder)!r} or its folders")
    return sorted(found)


@dataclass(frozen=True)
class TextFile:
    """What is known of a text file after reading it once.

    Attributes:
        path: where it is.
        name: its `text_name`.
        sha256: of its raw bytes, in hexadecimal.
        bytes: raw size.
        characters, text_bytes: of its text as `read_text` gives it, the latter in UTF-8.
    """

    path: Path
    name: str
    sha256: str
    bytes: int
    characters: int
    text_bytes: int


def survey_texts(folder: Path, errors: str = "strict", progress: bool = False) -> tuple[list[TextFile], dict[str, str]]:
    """The texts of a folder that can be read, and why others cannot. Every file is read once, in constant memory.

    Args:
        folder: searched as by `find_texts`.
        errors: "strict" to refuse them all for one that cannot be read, "skip" to leave such files out.
        progress: show a bar.

    Returns:
        The readable files, and the reason for each other one, by its `text_name`.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
        ValueError: for a file that cannot be read and errors="strict", or if no file can be read.
    """
    if errors not in ("strict", "skip"):
        raise ValueError(f"errors={errors!r} must be strict or skip")
    files = find_texts(folder)
    size = sum(file.stat().st_size for file in files if file.is_file())

    def survey(file: Path) -> TextFile | str:
        try:
            if not file.is_file():  # a pipe would wait for ever
                raise ValueError("it is no regular file")
            digest, characters, text_bytes = hashlib.sha256(), 0, 0
            for block in text_blocks(file, digest):
                characters += len(block)
                text_bytes += len(block.encode())
            return TextFile(
                file, text_name(file, folder), digest.hexdigest(), file.stat().st_size, characters, text_bytes
            )
        except (OSError, ValueError) as error:
            return getattr(error, "strerror", None) or str(error)

    readable, refused = [], {}
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="check", disable=not progress, leave=False)
    with bar, ThreadPoolExecutor() as pool:
        for file, found in zip(files, pool.map(survey, files), strict=True):
            if isinstance(found, str):
                refused[text_name(file, folder)] = found
            else:
                readable.append(found)
                bar.update(found.bytes)
    if refused and (errors == "strict" or not readable):
        some = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise ValueError(
            f"{len(refused)} of {len(refused) + len(readable)} files in data_dir={str(folder)!r} cannot be read: {some}"
            f"{'; …' if len(refused) > 5 else ''}. Mend them"
            f"{' or leave them out with errors=skip' if readable else ''}"
        )
    return readable, refused


def readable_texts(folder: Path, errors: str = "strict") -> tuple[list[Path], dict[str, str]]:
    """The paths of the texts that can be read, and why others cannot: see `survey_texts`."""
    texts, refused = survey_texts(folder, errors)
    return [text.path for text in texts], refused


def text_name(file: Path, folder: Path) -> str:
    """A file's path inside its folder; bytes that are no UTF-8 show as escapes."""
    return os.fsencode(file.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def text_blocks(path: Path, digest: Any = None) -> Iterator[str]:
    """A text file's content, 64 KiB at a time: UTF-8, a byte order mark dropped, CRLF and CR turned into newlines.

    Args:
        path: the file.
        digest: of hashlib; takes in the raw bytes on the way.

    Raises:
        ValueError: if the file is not UTF-8, naming it and the first bad byte.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    place = 0
    with open(path, "rb") as file:
        while True:
            raw = file.read(READ_BYTES)
            if digest is not None:
                digest.update(raw)
            start, place = place, place + len(raw)
            try:
                text = decoder.decode(raw if start else raw.removeprefix(codecs.BOM_UTF8), final=not raw)
            except UnicodeDecodeError as error:  # its object may begin with what the block before has left over
                bad = place - len(error.object) + error.start
                name = os.fsencode(path).decode("utf-8", "backslashreplace")
                raise ValueError(
                    f"{name} is not UTF-8: byte {bad} is 0x{error.object[error.start]:02x}. {_looks_like(path, bad)}"
                ) from None
            if text:
                yield text
            if not raw:
                return


def _looks_like(path: Path, bad: int) -> str:
    """A sentence on the encoding that a file may be in, which at byte `bad` is not UTF-8, and on what to do."""
    place = bad - bad % READ_BYTES
    with open(path, "rb") as file:
        mark = file.read(4)
        file.seek(place)
        sample, rest = file.read(READ_BYTES), file.read(1)
    if place and 0 not in sample:  # not from the middle of a character
        sample = sample.partition(b"\n")[2] or sample

    def text_in(encoding: str) -> str:
        """The sample's text; nothing if more than 1% of it is wrong."""
        text = codecs.getincrementaldecoder(encoding)("replace").decode(sample, final=not rest)
        return text if 100 * text.count("\ufffd") <= len(text) else ""

    def score(text: str) -> float:
        return sum(map(text.count, FREQUENT)) / len(text)

    # by its first bytes, or since most of it is good UTF-8
    if mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return _convert("UTF-32")
    if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return _convert("UTF-16")
    if any(character > "\x7f" for character in text_in("utf-8").replace("\ufffd", "")):
        return "The text around it is UTF-8, so some bytes are damaged: iconv -c -f UTF-8 -t UTF-8 drops them"

    # much of what is Big5 could be GB18030, and the other way round: the right one has more of the frequent characters
    found = {name: text for name in ("GB18030", "Big5", "UTF-16LE", "UTF-16BE") if (text := text_in(name))}
    found = {name: text for name, text in found.items() if name[:3] != "UTF" or score(text) > 0.05}
    if 0 in sample:
        found = {name: text for name, text in found.items() if name[:3] == "UTF"}
    if found:
        return _convert(max(found, key=lambda name: score(found[name])))
    return (
        f"{'It looks like no text' if 0 in sample else 'Its encoding is not known'}: convert it to UTF-8, or remove it"
    )


def _convert(encoding: str) -> str:
    return f"It looks like {encoding}: convert it with iconv -f {encoding} -t UTF-8"


def read_text(path: Path) -> str:
    """A text file's content as one string; see `text_blocks`."""
    return "".join(text_blocks(Path(path)))


def sample_texts(files: Sequence[Path], max_bytes: int = 10_000_000) -> list[str]:
    """Texts to look at: all, or of a larger corpus the beginnings of evenly chosen files, of about so many bytes."""
    size = sum(file.stat().st_size for file in files)
    chosen = files[:: max(1, -(-size // max_bytes))]
    blocks = 1 + max_bytes // len(chosen) // READ_BYTES if size > max_bytes else None
    return ["".join(itertools.islice(text_blocks(file), blocks)) for file in chosen]


def split_long(line: str, max_bytes: int) -> Iterator[str]:
    """Cut a line into pieces of at most `max_bytes` UTF-8 bytes (4 or more) that add up to the line.

    Cuts fall after sentence ends (. ? ! 。 ？ ！) where there is one, else between two characters. A piece depends on
    no more of the line than the first `max_bytes` that are left, so a line may also come in parts.
    """
    start = 0
    while (len(line) - start) * 4 > max_bytes:
        # no character is longer than four bytes, none shorter than one
        rest = line[start : start + max_bytes + 1].encode()
        if len(rest) <= max_bytes:
            break
        piece = rest[:max_bytes].decode(errors="ignore")  # without half a character at its end
        cut = max(map(piece.rfind, ".?!。？！")) + 1 or len(piece)
        yield piece[:cut]
        start += cut
    yield line[start:]


def cut_text(blocks: Iterable[str], inner_pairs: set[str], size: int) -> Iterator[str]:
    """The same text in pieces of `size` to 2 * `size` characters (the last may be shorter).

    Each ends at the first place where the two characters around are no inner pair, or after `size` if there is none.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > 2 * size:
            places = range(start + size, start + 2 * size)
            cut = next((place for place in places if rest[place - 1 : place + 1] not in inner_pairs), places[0])
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest
