"""Text to token files, on all cores and in constant memory, never doing the same work twice.

New token files grow in the folder `.unfinished` inside the data set's own folder. A journal there says what they hold.
A preparation that was killed goes on after the journal's last line. A document that the present data set holds already
is copied from it; the hash of its source identifies it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmcore.corpus.folder_lock import hold_folder
from llmcore.corpus.library import Document, Library, Reader, open_library
from llmcore.corpus.texts import cut_text
from llmcore.corpus.token_files import finish_split, publish, write_manifest
from llmcore.dataset import FORMAT_VERSION, PREPARE_AGAIN, SPLITS, DatasetError, sources_of, verify_dataset
from llmcore.files import display_path, one_line, resolve, write_atomic
from llmcore.tokenizer import Tokenizer

BLOCK = 1 << 14  # characters that are encoded in one call
SAVED_EVERY = 1 << 24  # characters between two updates of the journal, and tokens that are copied in one call
JOURNAL = "journal.jsonl"
OPTIONS = ("errors", "encoding", "clean", "duplicates")  # of `open_library`


def dataset_folder(dataset_dir: str | os.PathLike[str], data_dir: Path, tokenizer: Tokenizer) -> Path:
    """Where a notebook's token files are. "auto" is a folder of its own for each corpus and tokenizer."""
    if str(dataset_dir) != "auto":
        return resolve(dataset_dir)
    identity = hashlib.sha256(f"{display_path(data_dir)}\0{tokenizer.fingerprint}".encode()).hexdigest()
    name = re.sub(r"[^\w-]+", "_", data_dir.resolve().name)[:60]
    return resolve("outputs/datasets") / f"{name}-{identity[:8]}"


def prepare_dataset(
    texts: Library | str | os.PathLike[str],
    tokenizer: Tokenizer,
    dataset_dir: str | os.PathLike[str],
    val_fraction: float | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Turn a folder of texts into token files. Running it again on unchanged input does nothing.

    The split is by document. A new document's place follows from a hash of its name, seen as a number from 0 to 1: the
    document is held out if that is below val_fraction. So the share held out is val_fraction only on average; the
    manifest tells the real share of the text (see `held_out_share`). If no hash is below val_fraction, the document
    with the lowest one is held out. A corpus of one document is split by position instead: its end is held out.

    What was held out stays held out. A document that the data set in dataset_dir holds keeps its place, also when files
    are added, or when it is renamed, changed, or taken away and put back. It is recognised by its text, else by its
    name. Copies of one text stand on the same side, and that is the held-out side if one of them was held out before.
    A text split by position stays split at the same character when other texts join it. With a higher
    val_fraction, more documents are held out. With a lower one, all places follow from the hashes anew. Where text that
    was held out must now be trained on (a lower val_fraction, a changed text that is split by position, all others
    gone), a warning names it.

    The texts are read a block at a time, first by `open_library`, then to encode them. A document is encoded as
    `tokenizer.encode` encodes it whole, with one exception: text of over 16,384 characters without a safe place to cut
    (see `Tokenizer.inner_pairs`), such as a very long row of the same letter, is cut all the same. It decodes to the
    same text either way.

    Until the new files are complete, the present data set stays as it is. After a kill or an error, the next call goes
    on from there; at most about 16 million characters are encoded twice. Documents whose source has not changed since
    the last data set are copied from it.

    Args:
        texts: a library, or the folder of one.
        tokenizer: turns text into ids.
        dataset_dir: where the token files go.
        val_fraction: share of the documents held out; above 0, below 1. None: as in the present data set, else 0.05.
        progress: show bars.
        options: for a folder, those of `open_library`: errors, encoding, clean, duplicates. One that is None or not
            given is as for the present data set.

    Returns:
        The manifest, as in `meta.json`: format_version, dtype, vocab_size, tokenizer (fingerprint), val_fraction,
        errors, encoding, clean, duplicates, split_by ("position" if a text is on both sides, else "document"), splits
        (name -> documents, tokens, characters, bytes, and sha256, offsets_sha256 and hashes_sha256 of its files),
        sources (path, sha256 of the text, encoding, damaged, bytes, tokens, split, which is "copy" for a copy that is
        left out, and copy_of), gone (sources that were held out and are no longer there), refused (path -> why it
        was skipped), unread (ending -> number of other files), cleaned (rule -> times, characters), recurring (lines
        left out), and sha256 of all this as JSON.

    Raises:
        FileNotFoundError: if there are no texts.
        DatasetError: if the texts are all empty, or change meanwhile, or val_fraction is out of range.
        ValueError: if a file cannot be read and errors="strict". The present data set stays as it is.
    """
    dataset_dir = Path(dataset_dir)
    earlier = _newest_manifest(dataset_dir)
    val_fraction = earlier.get("val_fraction", 0.05) if val_fraction is None else val_fraction
    if not 0 < val_fraction < 1:
        raise DatasetError(f"val_fraction={val_fraction} must be above 0 and below 1")

    if isinstance(texts, Library):
        library = texts
    else:
        as_before = {name: earlier[name] for name in OPTIONS if name in earlier}
        given = {name: value for name, value in options.items() if value is not None}
        library = open_library(texts, **{**as_before, **given}, progress=progress)
    if not any(document.characters for document in library.kept):
        raise DatasetError(f"the {len(library.documents)} texts in data_dir={str(library.folder)!r} are empty")
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "val_fraction": val_fraction,
        **library.settings,
        "refused": library.refused,
        "unread": library.unread,
        "cleaned": library.cleaned,
        "recurring": [line.text for line in library.recurring],
    }
    if not tokenizer.has_space_piece:  # earlier versions spelled spaces otherwise: their documents are not copied
        settings["space"] = tokenizer.encode(" ")

    dataset_dir.mkdir(parents=True, exist_ok=True)
    unfinished = dataset_dir / ".unfinished"
    with hold_folder(dataset_dir):
        publish(unfinished, dataset_dir)  # if a kill came just before
        present: dict[str, Any] = {}
        with contextlib.suppress(DatasetError):
            present = verify_dataset(dataset_dir)
        if _is_up_to_date(present, settings, library):
            shutil.rmtree(unfinished, ignore_errors=True)
            return present

        earlier = _newest_manifest(dataset_dir)
        plan = _plan_parts(library, val_fraction, earlier)
        settings["gone"] = _gone_sources(library.documents, earlier)
        has_same_ids = all(present.get(key) == settings.get(key) for key in ("tokenizer", "space"))
        stored = _stored_documents(dataset_dir, present) if has_same_ids else {}
        _write_dataset(unfinished, library, plan, tokenizer, settings, stored, progress)
        publish(unfinished, dataset_dir)
        return verify_dataset(dataset_dir, tokens=False)


def held_out_share(manifest: dict[str, Any]) -> float:
    """The share of a data set's characters that is really held out, 0 to 1."""
    held_out, trained_on = (manifest["splits"][split]["characters"] for split in ("val", "train"))
    return held_out / (held_out + trained_on)


# The data set that is there already


def _newest_manifest(dataset_dir: Path) -> dict[str, Any]:
    """The manifest of the newest complete data set, which a kill may have left unpublished; {} if there is none."""
    for folder in (dataset_dir / ".unfinished", dataset_dir):
        with contextlib.suppress(DatasetError):
            return verify_dataset(folder, (), tokens=False)
    return {}


def _is_up_to_date(manifest: dict[str, Any], settings: dict[str, Any], library: Library) -> bool:
    """Whether a data set was made with these settings from this library."""
    sources = [(source["path"], source["sha256"], source.get("copy_of")) for source in manifest.get("sources", [])]
    has_settings = all(manifest.get(key) == value for key, value in settings.items())
    documents = [(text.name, text.sha256, library.copy_of.get(text.name)) for text in library.documents]
    return has_settings and sources == documents


class _StoredDocument(NamedTuple):
    """Where a token file holds a whole document: its first id, and the number of its ids."""

    file: Path
    first: int
    tokens: int


def _stored_documents(folder: Path, manifest: dict[str, Any]) -> dict[str, _StoredDocument]:
    """The whole documents of a data set, by the sha256 of their source. None for an empty manifest."""
    documents = {}
    for split in SPLITS if manifest else ():
        spans = itertools.pairwise(np.fromfile(folder / f"{split}.offsets", dtype="<u8").tolist())
        for source, (start, end) in zip(sources_of(manifest, split), spans, strict=True):
            if source["split"] == split:
                documents[source["sha256"]] = _StoredDocument(folder / f"{split}.bin", start, end - start)
    return documents


def _gone_sources(texts: list[Document], earlier: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources of an earlier manifest that were held out, at least in part, and whose text is no longer there."""
    still_there = {text.sha256 for text in texts}
    return [
        source
        for source in _placed_sources(earlier)
        if source["split"] in ("val", "both") and source["sha256"] not in still_there
    ]


def _placed_sources(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources of a manifest, those that are gone too. A copy that was left out has the place of its original."""
    sources = manifest.get("gone", []) + manifest.get("sources", [])
    places = {source["path"]: source["split"] for source in sources if source["split"] != "copy"}
    return [
        {**source, "split": places.get(source.get("copy_of"), "train")} if source["split"] == "copy" else source
        for source in sources
    ]


# Which text goes into which split


@dataclass(frozen=True)
class _Part:
    """A document, or the share of it that goes into one split: characters `start` to `end` of its text."""

    text: Document
    split: str
    start: int
    end: int

    def is_whole_text(self) -> bool:
        return self.end - self.start == self.text.characters


def _plan_parts(library: Library, val_fraction: float, earlier: dict[str, Any]) -> list[_Part]:
    """The parts of all texts, in the order of writing. A text that has a place in an earlier manifest keeps it."""
    filled = [text for text in library.kept if text.characters]
    sources = _earlier_sources(library.documents, earlier)
    leaders = _leaders(library, filled)

    # with another val_fraction, texts change sides; only with a lower one, also those that were held out
    earlier_fraction = earlier.get("val_fraction", val_fraction)
    staying = {"both"}
    if val_fraction >= earlier_fraction:
        staying.add("val")
    if val_fraction == earlier_fraction:
        staying.add("train")
    kept = _kept_places(library, leaders, sources, staying)
    if len(leaders) == 1:
        kept = {leader.name: "both" for leader in leaders.values()}
    held_out = _held_out([leader.name for leader in leaders.values()], val_fraction, kept)

    plan, lost = [], []
    for text in filled:
        leader = leaders[library.groups[text.name]].name
        split = "val" if leader in held_out else "train"
        if kept.get(leader) == "both":
            split = "both"
        cut = _first_held_out(text, split, val_fraction)
        if split == "both":
            plan += [_Part(text, "train", 0, cut), _Part(text, "val", cut, text.characters)]
        else:
            plan.append(_Part(text, split, 0, text.characters))

        # what part of it was held out before?
        source = sources.get(text, {"split": "train"})
        split_before = source["split"]
        if split_before == "both" and source["sha256"] != text.sha256:
            split_before = "val"  # the text has changed: any of it may have been held out
        if cut > _first_held_out(text, split_before, earlier_fraction):
            lost.append(text.name)

    if lost:
        names = ", ".join(map(one_line, lost[:5]))
        warnings.warn(
            f"text that was held out before is now trained on: {names}{', …' if len(lost) > 5 else ''}. "
            "The validation loss of a model that was trained before cannot be compared with a new one. To keep both "
            "splits, choose another dataset_dir",
            stacklevel=3,
        )
    return plan


def _leaders(library: Library, texts: list[Document]) -> dict[int, Document]:
    """The longest of the texts in each group of copies. The place of the whole group follows from its name."""
    leaders: dict[int, Document] = {}
    for text in sorted(texts, key=lambda text: (-text.characters, len(text.name), text.name)):
        leaders.setdefault(library.groups[text.name], text)
    return leaders


def _kept_places(
    library: Library, leaders: dict[int, Document], sources: dict[Document, dict[str, Any]], staying: set[str]
) -> dict[str, str]:
    """The places that groups of copies keep, by the names of their leaders."""
    before: dict[int, set[str]] = {}
    for text, source in sources.items():
        before.setdefault(library.groups[text.name], set()).add(source["split"])

    kept = {}
    for group, leader in leaders.items():
        places = before.get(group, set()) & staying
        if leader in sources and sources[leader]["split"] == "both":
            kept[leader.name] = "both"
        elif places:
            kept[leader.name] = "train" if places == {"train"} else "val"
    return kept


def _earlier_sources(texts: list[Document], earlier: dict[str, Any]) -> dict[Document, dict[str, Any]]:
    """What an earlier manifest says of each text that it knows: by name and content, else by content, else by name."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for source in sorted(_placed_sources(earlier), key=lambda source: source["split"]):  # "val" overrides, being last
        if source["split"] != "empty":
            name, content = source["path"], source["sha256"]
            known |= {(name, content): source, ("", content): source, (name, ""): source}

    recognised = {}
    for text in texts:
        for key in ((text.name, text.sha256), ("", text.sha256), (text.name, "")):
            if key in known:
                recognised[text] = known[key]
                break
    return recognised


def _first_held_out(text: Document, split: str, val_fraction: float) -> int:
    """The first character that is held out of a text in this split; the text's length if none is."""
    if split == "both":  # at least the last character
        return min(round(text.characters * (1 - val_fraction)), text.characters - 1)
    return 0 if split == "val" else text.characters


def _held_out(names: list[str], val_fraction: float, kept: Mapping[str, str] | None = None) -> set[str]:
    """The names of documents that are held out, or split by position.

    Args:
        names: of all documents.
        val_fraction: a new document is held out if the hash of its name, from 0 to 1, is below this.
        kept: name -> "train", "val" or "both", for documents that keep their place. If otherwise one side would be
            empty, a document changes sides: a new one if possible.
    """
    kept = kept or {}
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    chosen = {name for name in names if kept.get(name, "val" if places[name] < val_fraction else "train") != "train"}

    # neither side may be empty
    new = [name for name in names if name not in kept]
    lowest = {min(new or names, key=lambda name: places[name])}
    if not chosen:
        chosen = lowest
    elif len(chosen) == len(names) and "both" not in kept.values():
        chosen = chosen - set(new) if 0 < len(new) < len(names) else lowest
    return chosen


# Writing


@dataclass
class _Written:
    """How much of a part has been written: a line of the journal."""

    sha256: str
    split: str
    start: int
    end: int
    tokens: int = 0
    characters: int = 0
    bytes: int = 0

    def is_complete(self) -> bool:
        return self.characters == self.end - self.start

    def describes(self, part: _Part) -> bool:
        return (self.sha256, self.split, self.start, self.end) == (part.text.sha256, part.split, part.start, part.end)


@dataclass
class _Job:
    """Ids to write: `ids` computes them, on any thread. `characters` and `bytes` (in UTF-8) count their text."""

    written: _Written
    ids: Callable[[], NDArray[Any]]
    characters: int
    bytes: int


def _write_dataset(
    folder: Path,
    library: Library,
    plan: list[_Part],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    stored: dict[str, _StoredDocument],
    progress: bool,
) -> None:
    """Fill a folder with a data set, or go on filling it."""
    folder.mkdir(exist_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    written = _resume(folder, plan, tokenizer.fingerprint, dtype)
    completed = sum(record.is_complete() for record in written)
    written += [_Written(part.text.sha256, part.split, part.start, part.end) for part in plan[len(written) :]]

    # the token files
    inner_pairs = tokenizer.inner_pairs()

    def jobs(reader: Reader) -> Iterator[_Job]:
        for part, record in zip(plan[completed:], written[completed:], strict=True):
            if part.is_whole_text() and not record.characters and part.text.sha256 in stored:
                yield from _copy_jobs(part, record, stored[part.text.sha256], dtype)
            else:
                yield from _encode_jobs(part, record, reader, tokenizer, inner_pairs)

    size = sum(text.text_bytes for text in library.kept)
    done = sum(record.bytes for record in written)
    bar = tqdm(total=size, initial=done, unit="B", unit_scale=True, desc="tokenize", disable=not progress, leave=False)
    with bar, Reader() as reader:
        _write_tokens(folder, jobs(reader), dtype, bar)

    # offsets, hashes and the manifest
    splits = {}
    for split in SPLITS:
        own = [record for record in written if record.split == split]
        sizes = {"characters": sum(record.characters for record in own), "bytes": sum(record.bytes for record in own)}
        splits[split] = finish_split(folder, split, [record.tokens for record in own]) | sizes
    sources = _sources(library, plan, written)
    manifest = {
        **settings,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "split_by": "position" if any(source["split"] == "both" for source in sources) else "document",
        "splits": splits,
        "sources": sources,
    }
    write_manifest(folder, manifest)


def _sources(library: Library, plan: list[_Part], written: list[_Written]) -> list[dict[str, Any]]:
    """What the manifest says of each text."""
    tokens = dict.fromkeys(library.documents, 0)
    splits = {text: "copy" if text.name in library.copy_of else "empty" for text in library.documents}
    for part, record in zip(plan, written, strict=True):
        tokens[part.text] += record.tokens
        splits[part.text] = part.split if splits[part.text] == "empty" else "both"
    sources = []
    for text in library.documents:
        source = {"path": text.name, "sha256": text.sha256, "encoding": text.encoding, "bytes": text.bytes}
        source |= {"tokens": tokens[text], "split": splits[text]}
        if text.damaged:
            source["damaged"] = text.damaged
        if text.name in library.copy_of:
            source["copy_of"] = library.copy_of[text.name]
        sources.append(source)
    return sources


def _copy_jobs(part: _Part, written: _Written, stored: _StoredDocument, dtype: np.dtype[Any]) -> Iterator[_Job]:
    """Jobs that copy a document out of a token file. The last job counts the text."""
    for place in range(0, stored.tokens, SAVED_EVERY):
        count = min(SAVED_EVERY, stored.tokens - place)
        offset = (stored.first + place) * dtype.itemsize
        read = functools.partial(np.fromfile, stored.file, dtype, count, offset=offset)
        is_last = place + count == stored.tokens
        yield _Job(written, read, part.text.characters if is_last else 0, part.text.text_bytes if is_last else 0)


def _encode_jobs(
    part: _Part, written: _Written, reader: Reader, tokenizer: Tokenizer, inner_pairs: Container[str]
) -> Iterator[_Job]:
    """Jobs that encode the rest of a part."""
    digest = hashlib.sha256()
    start = part.start + written.characters
    blocks = _characters_between(reader.blocks(part.text, digest), start, part.end)
    left = part.end - start
    ends_document = part.end == part.text.characters

    def encode(text: str, is_last: bool) -> NDArray[Any]:
        ids = tokenizer.encode_array(text)
        return np.append(ids, [tokenizer.eos_id]) if is_last and ends_document else ids

    if not left:  # of a text of one character, the part to train on is empty; the journal needs a line for it too
        yield _Job(written, functools.partial(encode, "", True), 0, 0)
        return
    for text in cut_text(blocks, inner_pairs, BLOCK):
        left -= len(text)
        yield _Job(written, functools.partial(encode, text, not left), len(text), len(text.encode()))
    if digest.hexdigest() != part.text.sha256 or left:
        raise DatasetError(f"{one_line(part.text.name)} changed while it was read; {PREPARE_AGAIN}")


def _characters_between(blocks: Iterable[str], start: int, end: int) -> Iterator[str]:
    """The text of the blocks from character `start` to before `end`. All blocks are read, for the sake of the hash."""
    place = 0
    for block in blocks:
        if piece := block[max(0, start - place) : max(0, end - place)]:
            yield piece
        place += len(block)


def _write_tokens(folder: Path, jobs: Iterable[_Job], dtype: np.dtype[Any], bar: tqdm[Any]) -> None:
    """Append the ids of all jobs to the token files, and from time to time lines to the journal."""
    unsaved: list[_Written] = []
    unsaved_characters = 0
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "ab")) for split in SPLITS}
        journal = stack.enter_context(open(folder / JOURNAL, "a"))
        for job, ids in _run_in_order(jobs):
            record = job.written
            files[record.split].write(ids.astype(dtype, copy=False).data)
            record.tokens += len(ids)
            record.characters += job.characters
            record.bytes += job.bytes
            bar.update(job.bytes)

            if not unsaved or unsaved[-1] is not record:
                unsaved.append(record)
            unsaved_characters += job.characters
            if unsaved_characters >= SAVED_EVERY:  # the tokens reach the disk before the journal speaks of them
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                journal.writelines(_line(asdict(record)) for record in unsaved)
                journal.flush()
                unsaved, unsaved_characters = [], 0


def _run_in_order(jobs: Iterable[_Job]) -> Iterator[tuple[_Job, NDArray[Any]]]:
    """Each job with its ids. Some jobs run ahead, on all cores: SentencePiece lets other threads work meanwhile."""
    running: deque[tuple[_Job, Future[NDArray[Any]]]] = deque()
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        for job in jobs:
            running.append((job, pool.submit(job.ids)))
            if len(running) > 4 * cores:
                first, ids = running.popleft()
                yield first, ids.result()
        for first, ids in running:
            yield first, ids.result()


# The journal


def _line(content: object) -> str:
    """A line of the journal."""
    return json.dumps(content) + "\n"


def _resume(folder: Path, plan: list[_Part], fingerprint: str, dtype: np.dtype[Any]) -> list[_Written]:
    """Restore what a killed preparation has written of the plan, and cut off what the journal does not list.

    Returns:
        The parts at the beginning of the plan that are written; the last one perhaps not completely.
    """
    head = _line([FORMAT_VERSION, BLOCK, fingerprint])
    written: list[_Written] = []
    journal = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).exists() else b""
    if journal.startswith(head.encode()):
        for line in journal.split(b"\n")[1:]:  # the last is empty, or was cut short by a kill
            record = _parsed(line)
            if record is None:
                break
            if written and not written[-1].is_complete():
                written.pop()  # the same part, further on
            if len(written) == len(plan) or not record.describes(plan[len(written)]):
                break
            written.append(record)

    # the token files must hold all that the journal lists, and are cut to that
    files = {split: folder / f"{split}.bin" for split in SPLITS}
    sizes = {split: sum(r.tokens for r in written if r.split == split) * dtype.itemsize for split in SPLITS}
    if any(sizes[split] > (file.stat().st_size if file.exists() else 0) for split, file in files.items()):
        written, sizes = [], dict.fromkeys(SPLITS, 0)
    for split, size in sizes.items():
        with open(files[split], "ab") as file:
            file.truncate(size)
    write_atomic(folder / JOURNAL, head + "".join(_line(asdict(record)) for record in written))
    return written


def _parsed(line: bytes) -> _Written | None:
    """A line of the journal; None if it is damaged."""
    try:
        record = _Written(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    counts = (record.tokens, record.characters, record.bytes)
    return record if all(type(count) is int and count >= 0 for count in counts) else None
