"""Text to token files, on all cores and in constant memory, never doing the same work twice.

While a data set is made, its files grow in the folder `.unfinished` inside its own, with a journal of what they hold:
a preparation that was killed goes on behind the journal's last line. Documents that the data set there already holds
are copied from it, known by the hash of their source.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llmcore.corpus.texts import TextFile, cut_text, survey_texts, text_blocks
from llmcore.corpus.token_files import finish_split, publish, write_manifest
from llmcore.dataset import FORMAT_VERSION, PREPARE_AGAIN, SPLITS, DatasetError, verify_dataset
from llmcore.files import lock, write_atomic
from llmcore.tokenizer import Tokenizer

BLOCK = 1 << 14  # characters that are encoded in one go
SAVED_EVERY = 1 << 24  # characters between two lines of the journal inside a long document
JOURNAL = "journal.jsonl"


def prepare_dataset(
    data_dir: str | os.PathLike[str],
    tokenizer: Tokenizer,
    dataset_dir: str | os.PathLike[str],
    val_fraction: float | None = None,
    *,
    errors: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn a folder of texts into token files. Running it again on unchanged input does nothing.

    The split is by document. A new document's place follows from a hash of its name: it is held out where that falls
    below val_fraction, seen as a number from 0 to 1. So the share held out is val_fraction only on average; the share
    of the text that really is can be read from the manifest (see `held_out_share`). If no hash falls below, the lowest
    one is held out. A corpus of one document is split by position instead, its end held out.

    What was held out stays held out. A document that the data set in dataset_dir holds keeps its place, known by its
    text, else by its name: whatever files are added, and also where it is renamed, changed, or taken away and put back.
    A text split by position stays split at the same character when others join it. With a higher val_fraction,
    documents are held out besides those that were; with a lower one, all places follow from the hashes anew. Where text
    that was held out must be trained on (a lower val_fraction, a text split by position that changed, all others gone),
    a warning names it.

    Each file is read twice, a block at a time: once for its hash, and once to encode it. A document encodes as
    `tokenizer.encode` would encode it whole, except that text without any safe place to cut (see
    `Tokenizer.inner_pairs`) over 16,384 characters, such as a very long row of the same letter, is cut there all the
    same. It decodes to the same text either way.

    Until the new files are complete, the data set that was there stays as it was. After a kill, or an error, the next
    call goes on where this one was, give or take 16 million characters. Documents whose source has not changed since
    the last data set are copied from it.

    Args:
        data_dir: folder of `.txt` files.
        tokenizer: what turns text into ids.
        dataset_dir: where the token files go.
        val_fraction: share of the documents held out; above 0, below 1. None: as in the data set that is there
            already, else 0.05.
        errors: what to do about files that cannot be read: "strict" or "skip", see `survey_texts`. None: as for
            the data set that is there already, else "strict".
        progress: show bars.

    Returns:
        The manifest, as in `meta.json`: format_version, dtype, vocab_size, tokenizer (fingerprint), val_fraction,
        errors, split_by ("position" where a text is on both sides, else "document"), splits (name -> documents,
        tokens, characters, bytes, and sha256, offsets_sha256 and hashes_sha256 of its files), sources (path, sha256,
        bytes, tokens, split), gone (sources that were held out, and are no longer there), refused (path -> why it was
        skipped), and sha256 of all this as JSON.

    Raises:
        FileNotFoundError: if there are no texts.
        DatasetError: if the texts are all empty, or change meanwhile, or val_fraction is out of range.
        ValueError: if a file cannot be read and errors="strict"; what was there before is as it was.
    """
    data_dir, dataset_dir = Path(data_dir), Path(dataset_dir)
    before = _newest_manifest(dataset_dir)
    val_fraction = before.get("val_fraction", 0.05) if val_fraction is None else val_fraction
    errors = before.get("errors", "strict") if errors is None else errors
    if not 0 < val_fraction < 1:
        raise DatasetError(f"val_fraction={val_fraction} must be above 0 and below 1")
    texts, refused = survey_texts(data_dir, errors, progress)
    if not any(text.characters for text in texts):
        raise DatasetError(f"the {len(texts)} files in data_dir={str(data_dir)!r} hold no text")
    wanted = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "val_fraction": val_fraction,
        "errors": errors,
        "refused": refused,
    }
    if not tokenizer.has_space_piece:  # earlier versions spelled spaces otherwise: what they encoded is not copied
        wanted["space"] = tokenizer.encode(" ")
    dataset_dir.mkdir(parents=True, exist_ok=True)
    unfinished = dataset_dir / ".unfinished"
    with _only_preparation(dataset_dir):
        publish(unfinished, dataset_dir)  # where a kill came between
        existing: dict[str, Any] = {}
        with contextlib.suppress(DatasetError):
            existing = verify_dataset(dataset_dir)
        sources = [(source["path"], source["sha256"]) for source in existing.get("sources", [])]
        if {**existing, **wanted} == existing and sources == [(text.name, text.sha256) for text in texts]:
            shutil.rmtree(unfinished, ignore_errors=True)
            return existing
        same_ids = all(existing.get(key) == wanted.get(key) for key in ("tokenizer", "space"))
        old = _documents(dataset_dir, existing) if same_ids else {}
        before = _newest_manifest(dataset_dir)
        plan = _plan(texts, val_fraction, before)
        here = {text.sha256 for text in texts}
        wanted["gone"] = [
            source
            for source in before.get("sources", []) + before.get("gone", [])
            if source["split"] in ("val", "both") and source["sha256"] not in here
        ]
        _write(unfinished, texts, plan, tokenizer, wanted, old, progress)
        publish(unfinished, dataset_dir)
        return verify_dataset(dataset_dir, tokens=False)


@contextlib.contextmanager
def _only_preparation(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares this folder, and keep others waiting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Part:
    """A document, or the share of it that goes into one split: characters `start` to `end` of its text."""

    text: TextFile
    split: str
    start: int
    end: int


@dataclass
class _Progress:
    """What has been written of a part: a line of the journal."""

    sha256: str
    split: str
    start: int
    end: int
    tokens: int = 0
    characters: int = 0
    bytes: int = 0

    def is_whole(self) -> bool:
        return self.characters == self.end - self.start

    def is_of(self, part: _Part) -> bool:
        return (self.sha256, self.split, self.start, self.end) == (part.text.sha256, part.split, part.start, part.end)


def held_out_share(manifest: dict[str, Any]) -> float:
    """The share of a data set's characters that is really held out, 0 to 1."""
    held_out, trained_on = (manifest["splits"][split]["characters"] for split in ("val", "train"))
    return held_out / (held_out + trained_on)


def _newest_manifest(dataset_dir: Path) -> dict[str, Any]:
    """Of the complete data set whose publishing a kill cut short, else of the one that is there; {} if none is."""
    for folder in (dataset_dir / ".unfinished", dataset_dir):
        with contextlib.suppress(DatasetError):
            return verify_dataset(folder, (), tokens=False)
    return {}


def _plan(texts: list[TextFile], val_fraction: float, before: dict[str, Any]) -> list[_Part]:
    """Which text goes where, in the order of writing. What had a place in the manifest from before keeps it."""
    filled = [text for text in texts if text.characters]

    # where each text was: known by its name and content, else by its content, else by its name
    known: dict[tuple[str, str], dict[str, Any]] = {}
    sources = before.get("gone", []) + before.get("sources", [])
    for source in sorted(sources, key=lambda source: source["split"]):  # "val" last: it counts most
        if source["split"] != "empty":
            name, content = source["path"], source["sha256"]
            known |= {(name, content): source, ("", content): source, (name, ""): source}
    was = {}
    for text in filled:
        keys = ((text.name, text.sha256), ("", text.sha256), (text.name, ""))
        if source := next((known[key] for key in keys if key in known), None):
            was[text] = source

    # another val_fraction moves texts, but with a higher one what was held out stays so
    old_fraction = before.get("val_fraction", val_fraction)
    stays = ["both"] + ["val"] * (val_fraction >= old_fraction) + ["train"] * (val_fraction == old_fraction)
    kept = {text.name: source["split"] for text, source in was.items() if source["split"] in stays}
    if len(filled) == 1:
        kept = {filled[0].name: "both"}
    held_out = _held_out([text.name for text in filled], val_fraction, kept)

    plan, lost = [], []
    for text in filled:
        if kept.get(text.name) == "both":
            cut = _cut(text, val_fraction)
            plan += [_Part(text, "train", 0, cut), _Part(text, "val", cut, text.characters)]
        else:
            cut = 0 if text.name in held_out else text.characters
            plan.append(_Part(text, "val" if text.name in held_out else "train", 0, text.characters))

        # held out from character `cut` on; and before?
        source, old_cut = was.get(text, {"split": "train"}), text.characters
        if source["split"] != "train":
            is_same = source["split"] == "both" and source["sha256"] == text.sha256
            old_cut = _cut(text, old_fraction) if is_same else 0
        if cut > old_cut:
            lost.append(text.name)
    if lost:
        warnings.warn(
            f"text that was held out before is now trained on: {', '.join(lost[:5])}{', …' if len(lost) > 5 else ''}. "
            "The validation loss of a model that was trained before does not compare with a new one. To keep both "
            "splits, choose another dataset_dir",
            stacklevel=3,
        )
    return plan


def _cut(text: TextFile, val_fraction: float) -> int:
    """The first character that is held out of a text split by position: at the latest its last."""
    return min(round(text.characters * (1 - val_fraction)), text.characters - 1)


def _held_out(names: list[str], val_fraction: float, kept: Mapping[str, str] | None = None) -> set[str]:
    """The names that are not for training alone.

    They are those that are kept so, and of the others those whose hash falls below the fraction. Where this leaves one
    side empty, a name changes sides, if possible one that is not kept.
    """
    kept = kept or {}
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    chosen = {name for name in names if kept.get(name, "val" if places[name] < val_fraction else "train") != "train"}
    new = [name for name in names if name not in kept]
    lowest = {min(new or names, key=lambda name: places[name])}
    if not chosen:
        chosen = lowest
    elif len(chosen) == len(names) and "both" not in kept.values():
        chosen = chosen - set(new) if 0 < len(new) < len(names) else lowest
    return chosen


def _documents(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[Path, int, int]]:
    """Where a data set holds which whole documents: sha256 of the source -> token file, first id, number of ids."""
    found = {}
    for split in SPLITS if manifest else ():
        spans = itertools.pairwise(np.fromfile(folder / f"{split}.offsets", dtype="<u8").tolist())
        own = (source for source in manifest["sources"] if source["split"] in (split, "both"))
        for source, (start, end) in zip(own, spans, strict=True):
            if source["split"] == split:
                found[source["sha256"]] = (folder / f"{split}.bin", start, end - start)
    return found


def _between(blocks: Iterable[str], start: int, end: int) -> Iterator[str]:
    """What the blocks hold from one character to before another. All are read, for the sake of the hash."""
    place = 0
    for block in blocks:
        if piece := block[max(0, start - place) : max(0, end - place)]:
            yield piece
        place += len(block)


@dataclass
class _Job:
    """Some ids to write: `ids` makes them, on any thread."""

    done: _Progress
    ids: Callable[[], NDArray[Any]]
    characters: int
    bytes: int


def _copy(part: _Part, done: _Progress, old: tuple[Path, int, int], dtype: np.dtype[Any]) -> Iterator[_Job]:
    """Jobs that copy a document out of a token file. The last one counts for the text."""
    path, first, tokens = old
    for place in range(0, tokens, SAVED_EVERY):
        count = min(SAVED_EVERY, tokens - place)
        read = functools.partial(np.fromfile, path, dtype, count, offset=(first + place) * dtype.itemsize)
        last = place + count == tokens
        yield _Job(done, read, last * part.text.characters, last * part.text.text_bytes)


def _encode(part: _Part, done: _Progress, tokenizer: Tokenizer, inner_pairs: set[str]) -> Iterator[_Job]:
    """Jobs that encode what is still to be done of a part."""
    digest = hashlib.sha256()
    blocks = _between(text_blocks(part.text.path, digest), part.start + done.characters, part.end)
    left = part.end - part.start - done.characters
    eos = [tokenizer.eos_id] if part.end == part.text.characters else []

    def encode(text: str, last: bool) -> NDArray[Any]:
        ids = tokenizer.encode_array(text)
        return np.append(ids, eos) if last and eos else ids

    if not left:  # of a text of one character
        yield _Job(done, functools.partial(encode, "", True), 0, 0)
        return
    for text in cut_text(blocks, inner_pairs, BLOCK):
        left -= len(text)
        yield _Job(done, functools.partial(encode, text, not left), len(text), len(text.encode()))
    if digest.hexdigest() != part.text.sha256 or left:
        raise DatasetError(f"{part.text.path} changed while it was read; {PREPARE_AGAIN}")


def _in_order(jobs: Iterable[_Job]) -> Iterator[tuple[_Job, NDArray[Any]]]:
    """Each job with its result. A few are ahead, on all cores: SentencePiece lets other threads work meanwhile."""
    running: deque[tuple[_Job, Future[NDArray[Any]]]] = deque()
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        for job in jobs:
            running.append((job, pool.submit(job.ids)))
            if len(running) > 4 * cores:
                first, result = running.popleft()
                yield first, result.result()
        for first, result in running:
            yield first, result.result()


def _write(
    folder: Path,
    texts: list[TextFile],
    plan: list[_Part],
    tokenizer: Tokenizer,
    wanted: dict[str, Any],
    old: dict[str, tuple[Path, int, int]],
    progress: bool,
) -> None:
    """Fill a folder with a data set, or go on filling it."""
    folder.mkdir(exist_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    done = _resume(folder, plan, tokenizer.fingerprint, dtype)
    finished = sum(one.is_whole() for one in done)
    done += [_Progress(part.text.sha256, part.split, part.start, part.end) for part in plan[len(done) :]]
    inner_pairs = tokenizer.inner_pairs()

    def jobs() -> Iterator[_Job]:
        for part, one in zip(plan[finished:], done[finished:], strict=True):
            is_document = part.end - part.start == part.text.characters
            if is_document and not one.characters and part.text.sha256 in old:
                yield from _copy(part, one, old[part.text.sha256], dtype)
            else:
                yield from _encode(part, one, tokenizer, inner_pairs)

    total, already = sum(text.text_bytes for text in texts), sum(one.bytes for one in done)
    bar = tqdm(
        total=total, initial=already, unit="B", unit_scale=True, desc="tokenize", disable=not progress, leave=False
    )
    unsaved: list[_Progress] = []
    characters = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "ab")) for split in SPLITS}
        journal = stack.enter_context(open(folder / JOURNAL, "a"))
        for job, ids in _in_order(jobs()):
            one = job.done
            files[one.split].write(ids.astype(dtype, copy=False).data)
            one.tokens += len(ids)
            one.characters += job.characters
            one.bytes += job.bytes
            if not unsaved or unsaved[-1] is not one:
                unsaved.append(one)
            characters += job.characters
            bar.update(job.bytes)
            if characters >= SAVED_EVERY:  # the tokens before the line that speaks of them
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                journal.writelines(_line(each) for each in unsaved)
                journal.flush()
                unsaved, characters = [], 0
    counts = {}
    for split in SPLITS:
        own = [one for one in done if one.split == split]
        sums = {"characters": sum(one.characters for one in own), "bytes": sum(one.bytes for one in own)}
        counts[split] = finish_split(folder, split, [one.tokens for one in own]) | sums
    tokens: dict[TextFile, list[int]] = {text: [] for text in texts}
    for part, one in zip(plan, done, strict=True):
        tokens[part.text].append(one.tokens)
    split_of = {part.text: part.split for part in plan} | {text: "both" for text in texts if len(tokens[text]) > 1}
    sources = []
    for text in texts:
        known = {"path": text.name, "sha256": text.sha256, "bytes": text.bytes}
        sources.append({**known, "tokens": sum(tokens[text]), "split": split_of.get(text, "empty")})
    manifest = {
        **wanted,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "split_by": "position" if "both" in split_of.values() else "document",
        "splits": counts,
        "sources": sources,
    }
    write_manifest(folder, manifest)


def _line(content: object) -> str:
    """A line of the journal."""
    return json.dumps(asdict(content) if isinstance(content, _Progress) else content) + "\n"


def _resume(folder: Path, plan: list[_Part], tokenizer: str, dtype: np.dtype[Any]) -> list[_Progress]:
    """What a killed preparation has done of the plan, in order, the last part perhaps in half. What is more goes."""
    head, done = _line([FORMAT_VERSION, BLOCK, tokenizer]), list[_Progress]()
    journal = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).exists() else b""
    if journal.startswith(head.encode()):
        for line in journal.split(b"\n")[1:]:  # the last is empty, or was cut short by a kill
            try:
                one = _Progress(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                break
            if not all(type(n) is int and n >= 0 for n in (one.tokens, one.characters, one.bytes)):
                break
            if done and not done[-1].is_whole():
                done.pop()  # the same part, further on
            if len(done) == len(plan) or not one.is_of(plan[len(done)]):
                break
            done.append(one)
    kept = {split: sum(one.tokens for one in done if one.split == split) * dtype.itemsize for split in SPLITS}
    files = {split: folder / f"{split}.bin" for split in SPLITS}
    if any(size > (files[split].stat().st_size if files[split].exists() else 0) for split, size in kept.items()):
        done, kept = [], dict.fromkeys(SPLITS, 0)
    for split, size in kept.items():
        with open(files[split], "ab") as file:
            file.truncate(size)
    write_atomic(folder / JOURNAL, head + "".join(map(_line, done)))
    return done
