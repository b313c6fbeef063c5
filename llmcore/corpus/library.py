"""A folder of texts as they come: which documents it holds, which of them are copies, and what is cleaned away.

Every document is read once to see what is in it: its encoding, its size, the lines that recur and the passages that
other documents have too. The files are never changed. What is left out is left out each time a document is read.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tqdm import tqdm

from llmcore.corpus.cleaning import Cleaner, LineCounter, RecurringLine, recurring_hashes, recurring_lines, rule_rows
from llmcore.corpus.containers import Member, OpenFile
from llmcore.corpus.duplicates import PassageReader, find_copies
from llmcore.corpus.encodings import Damage, check_encoding, decoded_blocks, find_encoding
from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.texts import CHOICES, find_files, text_blocks, text_name
from llmcore.files import is_disk_full, one_line

SAMPLE_BYTES = 10_000_000


@dataclass(frozen=True)
class Document:
    """A text of a library, and what is known of it after reading it.

    Attributes:
        path: the file that holds it.
        member: its place in that file.
        name: of the file inside the library's folder, and of the member in it.
        encoding: a codec of Python.
        bytes: size of the file or member.
        damaged: broken byte sequences that stand as U+FFFD in the text.
        sha256: of its text in UTF-8, in hexadecimal.
        characters, text_bytes: size of its text; text_bytes is that in UTF-8.
        cleaner: what is left out of the text. None: nothing.
    """

    path: Path
    member: Member
    name: str
    encoding: str
    bytes: int
    damaged: int
    sha256: str
    characters: int
    text_bytes: int
    cleaner: Cleaner | None = field(default=None, compare=False, repr=False)


class Copy(NamedTuple):
    """A document that is a copy of another, or of a part of it.

    Attributes:
        name, of: of the copy, and of the longer document.
        share: of the copy's passages, those in the other one, 0 to 1.
    """

    name: str
    of: str
    share: float


@dataclass(frozen=True)
class Library:
    """The documents of a folder.

    Attributes:
        folder: where they are.
        settings: the values of errors, encoding, clean and duplicates.
        documents: all that can be read, in order, copies included.
        refused: why others cannot be read, by name.
        unread: endings of files that are not read, with their number.
        copies: documents that are copies of others.
        groups: a number for each document, by name. Copies of each other have the same one.
        recurring: lines that are left out because they recur, the most frequent first.
        cleaned: what each rule of the cleaner leaves out: see `rule_rows`.
    """

    folder: Path
    settings: dict[str, Any]
    documents: list[Document]
    refused: dict[str, str]
    unread: dict[str, int]
    copies: list[Copy]
    groups: dict[str, int]
    recurring: list[RecurringLine]
    cleaned: list[dict[str, Any]]

    @functools.cached_property
    def copy_of(self) -> dict[str, str]:
        """For each document that is left out as a copy, by name: the document that is kept."""
        return {copy.name: copy.of for copy in self.copies} if self.settings["duplicates"] == "drop" else {}

    @functools.cached_property
    def kept(self) -> list[Document]:
        """The documents to work with: all but copies that are left out."""
        return [document for document in self.documents if document.name not in self.copy_of]

    def sample(self, max_bytes: int = SAMPLE_BYTES) -> list[str]:
        """Texts to look at: all of a small library; of a larger one the beginnings of evenly spaced documents."""
        return sample_texts(self.kept, max_bytes)


class Reader:
    """Reads documents. It keeps the last file open, since the documents of a zip or jsonl file are read in a row."""

    def __init__(self) -> None:
        self._file: OpenFile | None = None
        self._path: Path | None = None  # of that file

    def blocks(self, text: Document | Path, digest: Any = None) -> Iterator[str]:
        """The text of a document, cleaned, or of a file (see `text_blocks`), a block at a time.

        Args:
            text: what to read.
            digest: a hash of hashlib, which is updated with the text in UTF-8.

        Raises:
            ValueError: if it cannot be read any more.
        """
        blocks = self._document_blocks(text) if isinstance(text, Document) else text_blocks(text)
        for block in blocks:
            if digest is not None:
                digest.update(block.encode())
            yield block

    def _document_blocks(self, document: Document) -> Iterator[str]:
        if self._file is None or self._path != document.path:
            self.close()
            self._file, self._path = OpenFile(document.path), document.path
        with self._file.open(document.member) as raw:
            blocks = decoded_blocks(raw, document.encoding, one_line(document.name))
            yield from document.cleaner.clean(blocks) if document.cleaner else blocks

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def text_size(text: Document | Path) -> int:
    """The bytes of a document's text in UTF-8, or of a file."""
    return text.text_bytes if isinstance(text, Document) else text.stat().st_size


def sample_texts(texts: Iterable[Document | Path], max_bytes: int = SAMPLE_BYTES) -> list[str]:
    """Texts to look at: all of a small corpus; of a larger one the beginnings of evenly spaced documents.

    Args:
        texts: the corpus.
        max_bytes: the size of the sample, roughly.
    """
    texts = list(texts)
    size = sum(map(text_size, texts))
    chosen = texts[:: max(1, -(-size // max_bytes))]
    blocks = 1 + max_bytes // len(chosen) // (1 << 16) if size > max_bytes else None
    with Reader() as reader:
        return ["".join(itertools.islice(reader.blocks(text), blocks)) for text in chosen]


def open_library(
    folder: str | os.PathLike[str],
    *,
    errors: str = "strict",
    encoding: str = "auto",
    clean: bool = True,
    duplicates: str = "drop",
    progress: bool = False,
) -> Library:
    """Read all documents of a folder, and see what is in them. Memory does not grow with their size.

    Args:
        folder: searched recursively for the files that `OpenFile` reads.
        errors: "strict" to raise an error if any document cannot be read, "skip" to leave such documents out.
        encoding: of the text files; "auto" to find out that of each, see `find_encoding`.
        clean: leave out what is not the author's, see `Cleaner`.
        duplicates: "drop" to leave out copies of other documents, see `find_copies`; "keep" to keep them all.
        progress: show bars.

    Raises:
        FileNotFoundError: if the folder is missing or holds no text.
        ValueError: for a document that cannot be read and errors="strict", or if none can be read.
    """
    settings: dict[str, Any] = {"errors": errors, "encoding": check_encoding(encoding)}
    settings |= {"clean": clean, "duplicates": duplicates}
    for name, allowed in CHOICES.items():
        if settings[name] not in allowed:
            raise ValueError(f"{name}={settings[name]!r} must be {' or '.join(allowed)}")

    folder = Path(folder)
    files, unread = find_files(folder)
    places, refused = _find_members(files, folder, unread)
    with HashTable() as lines, HashTable() as passages:
        # read all
        survey = _Survey(places, settings, refused, lines, passages)
        survey.run(progress)
        documents = [document for document in survey.documents if document is not None]
        refused = dict(sorted(refused.items()))  # the threads have filled it in another order each time
        if refused and (errors == "strict" or not documents):
            raise ValueError(_refusal(refused, len(refused) + len(documents), folder, bool(documents)))

        # copies first: lines that recur only in copies of one book are the author's
        names = [place.name for place in places]
        found = find_copies(passages, survey.letters, names, survey.identities())
        recurring: list[RecurringLine] = []
        if clean:
            with Reader() as reader:
                candidates = recurring_hashes(lines, found.groups)
                recurring = recurring_lines(candidates, lambda number: reader.blocks(survey.document(number)))

    cleaned: list[dict[str, Any]] = []
    if clean:
        documents, cleaned = _clean(documents, survey.unclean, recurring, progress)
    standing = zip(names, found.copy_of, found.shares, strict=True)
    return Library(
        folder=folder,
        settings=settings,
        documents=documents,
        refused=refused,
        unread=dict(unread.most_common()),
        copies=[Copy(name, names[of], share) for name, of, share in standing if of is not None],
        groups=dict(zip(names, found.groups, strict=True)),
        recurring=recurring,
        cleaned=cleaned,
    )


class _Place(NamedTuple):
    """Where a document is said to be."""

    path: Path
    member: Member
    name: str


def _find_members(files: list[Path], folder: Path, unread: Counter[str]) -> tuple[list[_Place], dict[str, str]]:
    """The places of all documents in these files, and why files cannot be opened. Adds what archives hold to unread."""
    places, refused = [], {}
    for path in files:
        name = text_name(path, folder)
        try:
            if not path.is_file():  # a pipe would wait for ever
                raise ValueError("it is not a regular file")
            with OpenFile(path) as file:
                inside = [
                    _Place(path, member, f"{name}/{member.name}" if member.name else name) for member in file.members()
                ]
                unread.update(file.left_out)
                places += inside
        except (OSError, ValueError) as error:
            refused[name] = _reason(error)
    return places, refused


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class _Survey:
    """Reads the documents in all places, and notes what is in them.

    Attributes:
        documents: one for each place; None where it cannot be read.
        letters: how many each has.
        unclean: names of documents in which the cleaner has something to do, lines that recur apart.
    """

    def __init__(
        self,
        places: list[_Place],
        settings: dict[str, Any],
        refused: dict[str, str],
        lines: HashTable,
        passages: HashTable,
    ) -> None:
        self._places, self._settings, self._refused = places, settings, refused
        self._lines, self._passages = lines, passages
        self.documents: list[Document | None] = [None] * len(places)
        self.letters = [0] * len(places)
        self.unclean: set[str] = set()

    def run(self, progress: bool) -> None:
        numbers = range(len(self._places))
        in_files = [list(group) for _, group in itertools.groupby(numbers, key=lambda n: self._places[n].path)]
        sizes = [self._places[in_file[0]].path.stat().st_size for in_file in in_files]
        for _ in _in_threads(self._read_file, in_files, sizes, "check", progress):
            pass

    def document(self, number: int) -> Document:
        """One that can be read."""
        document = self.documents[number]
        assert document is not None
        return document

    def identities(self) -> list[str]:
        """For each place the hash of its text; something else for a text that is empty or cannot be read."""
        return [
            document.sha256 if document and document.characters else f"none {number}"
            for number, document in enumerate(self.documents)
        ]

    def _read_file(self, numbers: list[int]) -> None:
        with OpenFile(self._places[numbers[0]].path) as file:
            for number in numbers:
                try:
                    self._read(number, file)
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and is_disk_full(error):
                        raise OSError(error.errno, f"no room for temporary files in {tempfile.gettempdir()}") from None
                    self._refused[self._places[number].name] = _reason(error)

    def _read(self, number: int, file: OpenFile) -> None:
        path, member, name = self._places[number]
        with file.open(member) as raw:
            encoding = file.encoding or self._settings["encoding"]
            if encoding == "auto":
                encoding = find_encoding(raw, one_line(name))
            measure, damage = _Measure(), Damage()
            passages, lines = PassageReader(self._passages, number), LineCounter(self._lines, number)
            for block in decoded_blocks(raw, encoding, one_line(name), damage):
                passages.read(block)
                if self._settings["clean"]:
                    lines.add(block)
                measure.add(block)
            size = raw.tell()

        lines.close()
        if lines.counts.total():
            self.unclean.add(name)
        self.letters[number] = passages.finish()
        known = (encoding, size, damage.count, measure.sha256(), measure.characters, measure.text_bytes)
        self.documents[number] = Document(path, member, name, *known)


class _Measure:
    """The hash of a text that comes in blocks, and its sizes."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.characters = self.text_bytes = 0

    def add(self, block: str) -> None:
        in_utf8 = block.encode()
        self._digest.update(in_utf8)
        self.characters += len(block)
        self.text_bytes += len(in_utf8)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _clean(
    documents: list[Document], unclean: set[str], recurring: list[RecurringLine], progress: bool
) -> tuple[list[Document], list[dict[str, Any]]]:
    """The documents with their cleaner, and sizes and hashes of what it leaves; and what it leaves out."""
    cleaner = Cleaner(line.hash for line in recurring)

    def clean(in_file: list[Document]) -> list[tuple[Document, Counter[str]]]:
        cleaned = []
        with Reader() as reader:
            for document in in_file:
                counts: Counter[str] = Counter()
                if recurring or document.name in unclean:
                    measure = _Measure()
                    for block in cleaner.clean(reader.blocks(document), counts):
                        measure.add(block)
                    if counts:
                        document = replace(
                            document,
                            sha256=measure.sha256(),
                            characters=measure.characters,
                            text_bytes=measure.text_bytes,
                            cleaner=cleaner,
                        )
                cleaned.append((document, counts))
        return cleaned

    in_files = [list(group) for _, group in itertools.groupby(documents, key=lambda document: document.path)]
    sizes = [sum(document.bytes for document in in_file) for in_file in in_files]
    counts: Counter[str] = Counter()
    result = []
    for in_file in _in_threads(clean, in_files, sizes, "clean", progress):
        for document, own in in_file:
            result.append(document)
            counts.update(own)
    return result, rule_rows(counts) if counts else []


def _in_threads(
    work: Callable[[Any], Any], items: list[Any], sizes: list[int], what: str, progress: bool
) -> Iterator[Any]:
    """The results of a function for all items, in order, computed on all cores, with a bar that counts bytes."""
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=what, disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for result, size in zip(pool.map(work, items), sizes, strict=True):
            bar.update(size)
            yield result


def _refusal(refused: dict[str, str], count: int, folder: Path, some_readable: bool) -> str:
    """The message for texts that cannot be read."""
    some = list(refused.items())[:5]
    reasons = "; ".join(reason if one_line(name) in reason else f"{one_line(name)}: {reason}" for name, reason in some)
    return (
        f"{len(refused)} of {count} texts in data_dir={str(folder)!r} cannot be read: {reasons}"
        f"{'; …' if len(refused) > 5 else ''}. Mend them"
        f"{' or leave them out with errors=skip' if some_readable else ''}"
    )
