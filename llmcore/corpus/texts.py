"""Text files: which ones a folder holds, how one is read, and how long texts are cut into pieces."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from llmcore.corpus.containers import READ_ENDINGS, OpenFile, ending, is_litter, is_read
from llmcore.corpus.encodings import decoded_blocks, find_encoding
from llmcore.files import display_path

# What may be chosen about a folder of texts. Here, because the check of a notebook's parameters needs nothing else.
CHOICES = {"errors": ("strict", "skip"), "duplicates": ("drop", "keep")}

# Which files


def find_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """All files below a folder that hold texts, in sorted order, and the endings of the others with their number.

    The folder is searched recursively. Each folder is entered once, whatever symbolic links lead there.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir={str(folder)!r} is not a folder; give one that holds texts: {', '.join(READ_ENDINGS)}"
        )

    texts, others, entered = [], Counter[str](), set()
    for parent, names, files in os.walk(folder, followlinks=True):
        names.sort()  # so that of two ways to a folder the first in order is taken
        real_path = os.path.realpath(parent)
        if real_path in entered:  # a symbolic link back up: do not walk in circles
            names.clear()
            continue
        entered.add(real_path)
        texts += [Path(parent, name) for name in files if is_read(name)]
        others.update(ending(name) for name in files if not is_read(name) and not is_litter(name))

    if not texts:
        found = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5)) or "nothing"
        raise FileNotFoundError(
            f"no text ({', '.join(READ_ENDINGS)}) in data_dir={str(folder)!r} or its folders; found: {found}"
        )
    return sorted(texts), others


def find_texts(folder: Path) -> list[Path]:
    """The files of `find_files` that hold texts."""
    return find_files(folder)[0]


def text_name(file: Path, folder: Path) -> str:
    """A file's path inside its folder. Bytes that are not UTF-8 show as escapes."""
    return os.fsencode(file.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


# Reading


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a file that holds one, 64 KiB at a time, in whatever encoding it is: see `decoded_blocks`.

    Raises:
        ValueError: if its encoding is not known, or if it does not hold exactly one text.
    """
    name = display_path(path)
    with OpenFile(path) as file:
        members = list(file.members())
        if len(members) != 1:
            raise ValueError(f"{name} holds {len(members)} texts, not one; give its folder as data_dir")
        with file.open(members[0]) as raw:
            yield from decoded_blocks(raw, file.encoding or find_encoding(raw, name), name)


def read_text(path: Path) -> str:
    """The text of a file as one string; see `text_blocks`."""
    return "".join(text_blocks(Path(path)))


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


def cut_text(blocks: Iterable[str], inner_pairs: Container[str], size: int) -> Iterator[str]:
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
