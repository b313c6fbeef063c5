"""Text files: which ones a folder holds, what is in them, and how long texts are cut into pieces."""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import os
import string
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmcore.files import display_path, one_line, pointer_hint_of

READ_BYTES = 1 << 16  # read at a time; the C library keeps the memory of larger blocks
POINTER_BYTES = 1 << 10  # a pointer of Git LFS is smaller than this

# Frequent characters of Chinese and other texts. They tell encodings apart.
FREQUENT = "，。的一是不了人我在有他這这為为們们来來个個说說国國道上大中到就那你要出也得里裡后後会會 \n"
FREQUENT += string.ascii_lowercase


# Which files


def find_texts(folder: Path) -> list[Path]:
    """All `.txt` files below a folder, recursively, in sorted order. Each folder is entered once.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir={str(folder)!r} is not a folder; give one that holds .txt files")

    texts, entered = [], set()
    for parent, names, files in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in entered:  # a symbolic link back up: do not walk in circles
            names.clear()
            continue
        entered.add(real_path)
        texts += [Path(parent, name) for name in files if name.lower().endswith(".txt")]

    if not texts:
        raise FileNotFoundError(f"no file matches *.txt in data_dir={str(folder)!r} or its folders")
    return sorted(texts)


def text_name(file: Path, folder: Path) -> str:
    """A file's path inside its folder. Bytes that are not UTF-8 show as escapes."""
    return os.fsencode(file.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


# Reading


def text_blocks(path: Path, digest: Any = None) -> Iterator[str]:
    """A text file's content, 64 KiB at a time: UTF-8, a byte order mark dropped, CRLF and CR turned into newlines.

    Args:
        path: the file.
        digest: a hash of hashlib, which is updated with the raw bytes.

    Raises:
        ValueError: if the file is not UTF-8, naming it and the first bad byte; or if it is a pointer of Git LFS.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    place = 0
    with open(path, "rb") as file:
        while True:
            raw = file.read(READ_BYTES)
            if digest is not None:
                digest.update(raw)
            if not place and len(raw) < POINTER_BYTES and (hint := pointer_hint_of(raw)):
                raise ValueError(f"{display_path(path)} cannot be read: {hint}")

            start, place = place, place + len(raw)
            try:
                text = decoder.decode(raw if start else raw.removeprefix(codecs.BOM_UTF8), final=not raw)
            except UnicodeDecodeError as error:
                bad = place - len(error.object) + error.start  # the object may begin in the block before
                raise ValueError(
                    f"{display_path(path)} is not UTF-8: byte {bad} is 0x{error.object[error.start]:02x}. "
                    f"{_encoding_advice(path, bad)}"
                ) from None

            if text:
                yield text
            if not raw:
                return


def read_text(path: Path) -> str:
    """A text file's content as one string; see `text_blocks`."""
    return "".join(text_blocks(Path(path)))


def sample_texts(files: Sequence[Path], max_bytes: int = 10_000_000) -> list[str]:
    """Texts to look at: all of a small corpus; of a larger one the beginnings of evenly spaced files.

    Args:
        files: the corpus.
        max_bytes: the size of the sample, roughly.
    """
    size = sum(file.stat().st_size for file in files)
    chosen = files[:: max(1, -(-size // max_bytes))]
    blocks = 1 + max_bytes // len(chosen) // READ_BYTES if size > max_bytes else None
    return ["".join(itertools.islice(text_blocks(file), blocks)) for file in chosen]


def _encoding_advice(path: Path, bad: int) -> str:
    """Which encoding a file may be in that is not UTF-8 at byte `bad`, and what to do: a sentence for an error."""
    place = bad - bad % READ_BYTES
    with open(path, "rb") as file:
        mark = file.read(4)
        file.seek(place)
        sample, rest = file.read(READ_BYTES), file.read(1)
    if place and 0 not in sample:  # the block may begin inside a character
        sample = sample.partition(b"\n")[2] or sample

    def decoded(encoding: str) -> str:
        """The sample's text; empty if more than 1% of it is wrong."""
        text = codecs.getincrementaldecoder(encoding)("replace").decode(sample, final=not rest)
        return text if 100 * text.count("\ufffd") <= len(text) else ""

    def score(text: str) -> float:
        """The share of frequent characters."""
        return sum(map(text.count, FREQUENT)) / len(text)

    # a byte order mark, or other characters that are good UTF-8, decide
    if mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return _conversion_advice("UTF-32")
    if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return _conversion_advice("UTF-16")
    if any(character > "\x7f" for character in decoded("utf-8").replace("\ufffd", "")):
        return "The text around it is UTF-8, so some bytes are damaged: iconv -c -f UTF-8 -t UTF-8 drops them"

    # many bytes are valid in several encodings; the right one gives the most frequent characters
    encodings = ("UTF-16LE", "UTF-16BE") if 0 in sample else ("GB18030", "Big5", "UTF-16LE", "UTF-16BE")
    scores = {encoding: score(text) for encoding in encodings if (text := decoded(encoding))}
    for encoding in ("UTF-16LE", "UTF-16BE"):
        if scores.get(encoding, 0) <= 0.05:  # almost any bytes are valid UTF-16
            scores.pop(encoding, None)
    if scores:
        return _conversion_advice(max(scores, key=lambda encoding: scores[encoding]))
    problem = "It does not look like text" if 0 in sample else "Its encoding is not known"
    return f"{problem}: convert it to UTF-8, or remove it"


def _conversion_advice(encoding: str) -> str:
    return f"It looks like {encoding}: convert it with iconv -f {encoding} -t UTF-8"


# Surveying a folder


@dataclass(frozen=True)
class TextFile:
    """What is known of a text file after reading it once.

    Attributes:
        path: where it is.
        name: its `text_name`.
        sha256: of its raw bytes, in hexadecimal.
        bytes: raw size.
        characters, text_bytes: size of its text as `read_text` gives it; text_bytes is that in UTF-8.
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
        errors: "strict" to raise an error if any file cannot be read, "skip" to leave such files out.
        progress: show a bar.

    Returns:
        The readable files, and the reason for each other file, by its `text_name`.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
        ValueError: for a file that cannot be read and errors="strict", or if no file can be read.
    """
    if errors not in ("strict", "skip"):
        raise ValueError(f"errors={errors!r} must be strict or skip")
    files = find_texts(folder)
    size = sum(file.stat().st_size for file in files if file.is_file())

    def survey(file: Path) -> TextFile | str:
        """What is in a file, or why it cannot be read."""
        try:
            if not file.is_file():  # a pipe would wait for ever
                raise ValueError("it is not a regular file")
            digest, characters, text_bytes = hashlib.sha256(), 0, 0
            for block in text_blocks(file, digest):
                characters += len(block)
                text_bytes += len(block.encode())
            name, raw_size = text_name(file, folder), file.stat().st_size
            return TextFile(file, name, digest.hexdigest(), raw_size, characters, text_bytes)
        except (OSError, ValueError) as error:
            return getattr(error, "strerror", None) or str(error)

    readable, refused = [], {}
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="check", disable=not progress, leave=False)
    with bar, ThreadPoolExecutor() as pool:
        for file, surveyed in zip(files, pool.map(survey, files), strict=True):
            if isinstance(surveyed, str):
                refused[text_name(file, folder)] = surveyed
            else:
                readable.append(surveyed)
                bar.update(surveyed.bytes)

    if refused and (errors == "strict" or not readable):
        reasons = "; ".join(f"{one_line(name)}: {reason}" for name, reason in list(refused.items())[:5])
        raise ValueError(
            f"{len(refused)} of {len(files)} files in data_dir={str(folder)!r} cannot be read: {reasons}"
            f"{'; …' if len(refused) > 5 else ''}. Mend them"
            f"{' or leave them out with errors=skip' if readable else ''}"
        )
    return readable, refused


def readable_texts(folder: Path, errors: str = "strict") -> tuple[list[Path], dict[str, str]]:
    """The paths of the texts that can be read, and why others cannot: see `survey_texts`."""
    texts, refused = survey_texts(folder, errors)
    return [text.path for text in texts], refused


# Cutting


def split_long(line: str, max_bytes: int) -> Iterator[str]:
    """Cut a line into pieces of at most `max_bytes` UTF-8 bytes (4 or more). Together the pieces are the line.

    Cuts fall after sentence ends (. ? ! 。 ？ ！) where possible, else between two characters. A piece depends only on
    the next `max_bytes` of the line, so a line may also come in parts.
    """
    start = 0
    while (len(line) - start) * 4 > max_bytes:
        # a character has one to four bytes
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

    A piece ends at the first place where the two characters around are not an inner pair (see
    `Tokenizer.inner_pairs`), or after `size` characters if there is no such place.
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
