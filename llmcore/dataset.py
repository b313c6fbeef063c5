"""A data set: its files on disk, how they are verified, and batches that are a pure function of (seed, step).

The folder of a data set holds three files for each split, "train" and "val", and a manifest that describes them:

    train.bin       the ids of all documents in a row, little-endian uint16 or uint32
    train.offsets   where each document starts in it, and where the last one ends, in tokens: uint64
    train.hashes    SHA-256 of each 64 KiB of train.bin, 32 bytes each
    meta.json       counts, the hash of each file, the tokenizer's, and the sources; with a hash of itself
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcore.files import check_json, pointer_hint, read_json, sha256_file
from llmcore.tokenizer import Tokenizer

FORMAT_VERSION = 2
HASHED_BYTES = 1 << 16  # of a token file per hash, so that a batch needs little more than its own tokens checked
SPLITS = ("train", "val")
FILES = {"bin": "sha256", "offsets": "offsets_sha256", "hashes": "hashes_sha256"}  # ending -> key of its hash
PREPARE_AGAIN = "run 02_dataset again"
IGNORED = -100  # a target that is left out of the loss
ATTEMPTS = 100  # at opening a data set that is being replaced, a hundredth of a second apart

# What `meta.json` must look like, its `sources` apart. It may hold more.
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**50}
_SPLIT = {
    "type": "object",
    "required": ["documents", "tokens", "bytes", *FILES.values()],
    "properties": {
        **dict.fromkeys(("documents", "tokens", "characters", "bytes"), _COUNT),
        **{key: {"type": "string", "pattern": "^[0-9a-f]{64}$"} for key in FILES.values()},
    },
}
_MANIFEST = {
    "type": "object",
    "required": ["dtype", "vocab_size", "splits"],
    "properties": {
        "dtype": {"enum": ["<u2", "<u4"]},
        "vocab_size": {"type": "integer", "minimum": 1, "maximum": 1 << 22},
        "val_fraction": {"type": "finite number", "minimum": 0, "maximum": 1},
        **{key: {"type": "string"} for key in ("tokenizer", "errors", "split_by")},
        "sources": {"type": "array"},
        "gone": {"type": "array"},
        "refused": {"type": "object"},
        "splits": {"type": "object", "patternProperties": {"^(train|val)$": _SPLIT}, "additionalProperties": False},
    },
}
# Each of `sources` and `gone`, checked in a plain loop: a schema would take seconds for thousands of files.
_SOURCE = {"path": str, "sha256": str, "split": str, "tokens": int}


class DatasetError(ValueError):
    """A data set that is missing, damaged, too short or made for something else. The message says what to do."""


def _fault(file: Path, fault: str) -> DatasetError:
    return DatasetError(f"{file} {fault}; {PREPARE_AGAIN}")


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_dataset(
    dataset_dir: str | os.PathLike[str], splits: Iterable[str] | None = None, *, tokens: bool = True
) -> dict[str, Any]:
    """A data set's manifest, after checking it and the files of the splits by their hashes.

    Args:
        dataset_dir: folder written by `prepare_dataset`.
        splits: "train", "val". None: all.
        tokens: False to check the token files by their size alone, which takes no time however large they are.

    Raises:
        DatasetError: naming the file that is missing, damaged or of another format version.
    """
    file = Path(dataset_dir) / "meta.json"
    manifest = _read_manifest(file)
    for split in manifest["splits"] if splits is None else splits:
        if split not in manifest["splits"]:
            known = ", ".join(manifest["splits"]) or "none"
            raise DatasetError(f"split={split!r} is not in {file.parent}; its splits are: {known}")
        counts = manifest["splits"][split]
        token_bytes = counts["tokens"] * np.dtype(manifest["dtype"]).itemsize
        sizes = {"bin": token_bytes, "offsets": 8 * (counts["documents"] + 1)}
        sizes["hashes"] = 32 * -(-token_bytes // HASHED_BYTES)
        for ending, key in FILES.items():
            part = file.with_name(f"{split}.{ending}")
            if not part.is_file():
                raise _fault(part, "is missing")
            if hint := pointer_hint(part):
                raise DatasetError(f"{part} cannot be read: {hint}")
            size = part.stat().st_size
            if size != sizes[ending]:
                raise _fault(part, f"is damaged: it has {size:,} bytes, not {sizes[ending]:,}")
            if (tokens or ending != "bin") and sha256_file(part) != counts[key]:
                raise _fault(part, f"is damaged: its {size:,} bytes have another hash")
        _check_offsets(file, manifest, split)
    return manifest


def _read_manifest(file: Path) -> dict[str, Any]:
    """A data set's `meta.json`, checked by its own hash and against its schema."""
    if not file.is_file():
        raise DatasetError(f"no data set in dataset_dir={str(file.parent)!r}; make one with notebook 02_dataset")
    try:
        manifest = read_json(file, {"type": "object", "required": ["format_version"]})
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise _fault(file.parent, f"has format version {version}; this code reads {FORMAT_VERSION}")
        if manifest.get("sha256") != manifest_hash(manifest):
            raise _fault(file, "is damaged: its own hash differs")
        check_json(manifest, _MANIFEST, str(file))
    except DatasetError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _fault(file, f"cannot be used ({error})") from None

    if manifest["dtype"] == "<u2" and manifest["vocab_size"] > 1 << 16:
        raise _fault(file, "cannot be used: dtype <u2 is too small for its vocab_size")
    named = ((f"{key}.{n}", source) for key in ("sources", "gone") for n, source in enumerate(manifest.get(key, [])))
    for name, source in named:
        fits = isinstance(source, dict) and all(type(source.get(key)) is kind for key, kind in _SOURCE.items())
        if not (fits and 0 <= source["tokens"] <= 2**50):
            raise _fault(file, f"cannot be used: {name} needs path, sha256, split, tokens")
    return manifest


def _check_offsets(file: Path, manifest: dict[str, Any], split: str) -> None:
    """Compare a split's offsets with what the manifest says of its tokens and documents."""
    part, tokens = file.with_name(f"{split}.offsets"), manifest["splits"][split]["tokens"]
    offsets = np.frombuffer(part.read_bytes(), dtype="<u8")
    if offsets[0] != 0 or offsets[-1] != tokens or (offsets[1:] < offsets[:-1]).any():
        raise _fault(part, f"is damaged: offsets must rise from 0 to {tokens}")
    if "sources" in manifest:
        lengths = np.diff(offsets).tolist()
        # a document in both splits has only a part of its tokens here
        named = [None if source["split"] == "both" else source["tokens"] for source in sources_of(manifest, split)]
        if len(named) != len(lengths) or any(n not in (None, length) for n, length in zip(named, lengths, strict=True)):
            raise _fault(file, f"cannot be used: sources: they are not the documents of {part.name}")


def sources_of(manifest: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """The sources of a split's documents, in their order. One that is split by position is in both splits."""
    return [source for source in manifest["sources"] if source["split"] in (split, "both")]


class TokenDataset:
    """One split of a data set, read as windows of `context_size` tokens.

    Every target token of an epoch is seen exactly once. Windows tile the stream, in an order and from a starting
    phase that change each epoch. Where a window overlaps its neighbour at an end of the stream, the targets that
    belong to the neighbour are -100.

    Opening reads the manifest and no tokens, however many there are. Each block of the token file is compared with its
    hash when it is first read, so no damaged token gets into a batch.

    Args:
        dataset_dir: folder written by `prepare_dataset`.
        split: "train" or "val".
        context_size: tokens per window.

    Attributes:
        tokens: memory map of all ids; `read` is the way to those that have been checked.
        offsets: (documents + 1,) where each document starts, and the end.
        n_windows: windows per epoch.
        manifest: the data set's `meta.json`.
        bytes_per_token: raw UTF-8 bytes of this split's text per token.

    Raises:
        DatasetError: if files are missing, damaged, or shorter than one window; from a batch, if it would hold damaged
            tokens.
    """

    def __init__(self, dataset_dir: str | os.PathLike[str], split: str = "train", context_size: int = 1024) -> None:
        dataset_dir = Path(dataset_dir)
        if context_size < 1:
            raise DatasetError(f"context_size={context_size} must be 1 or more")
        self.split, self.context_size = split, context_size
        self.path = dataset_dir / f"{split}.bin"
        self.tokens: NDArray[Any]
        self.offsets: NDArray[Any]
        self._open()
        self._checked: set[int] = set()
        self.vocab_size = int(self.manifest["vocab_size"])
        counts = self.manifest["splits"][split]
        self.bytes_per_token = counts["bytes"] / counts["tokens"]
        self.fingerprint: str = counts["sha256"]
        self.n_targets = len(self.tokens) - 1
        self.n_windows = -(-self.n_targets // context_size)

    def _open(self) -> None:
        """Verify and open the files of a data set, all of the same one, though a preparation may replace it meanwhile.

        An open file stays what it is, even if another file takes its name. So if the manifest is still the same after
        all files have been opened, they belong together. If not, they are opened again.
        """
        manifest_file = self.path.with_name("meta.json")
        unfinished = self.path.parent / ".unfinished" / "meta.json"  # a preparation moves its manifest last
        for _ in range(ATTEMPTS):
            before, error = _identity(manifest_file), None
            try:
                self._open_once()
            except DatasetError as refusal:
                error = refusal
            except (OSError, ValueError) as failure:
                error = _fault(self.path, f"cannot be opened: {failure}")
            if before == _identity(manifest_file) and not (before is None and unfinished.exists()):
                if error is not None:
                    raise error
                return
            time.sleep(0.01)
        raise _fault(self.path.parent, "is being replaced, or a preparation broke off")

    def _open_once(self) -> None:
        self.manifest = verify_dataset(self.path.parent, [self.split], tokens=False)
        tokens = self.manifest["splits"][self.split]["tokens"]
        if tokens < self.context_size + 1:
            raise DatasetError(
                f"the {self.split} split has {tokens} tokens; context_size={self.context_size} "
                f"needs {self.context_size + 1}: lower context_size, add text"
                f"{' or raise val_fraction' if self.split == 'val' else ''}"
            )
        self.tokens = np.asarray(np.memmap(self.path, dtype=self.manifest["dtype"], mode="r"))
        self.offsets = np.fromfile(self.path.with_suffix(".offsets"), dtype="<u8").astype(np.int64)
        self._hashes = self.path.with_suffix(".hashes").read_bytes()

    @property
    def names(self) -> list[str]:
        """Names of the documents, in the order of `offsets`.

        Raises:
            DatasetError: if the manifest does not say them.
        """
        if "sources" not in self.manifest:
            raise _fault(self.path.with_name("meta.json"), "does not name its sources")
        return [source["path"] for source in sources_of(self.manifest, self.split)]

    def texts(self, tokenizer: Tokenizer, max_tokens: int | None = None, each: int | None = None) -> dict[str, str]:
        """The documents' texts by name, decoded without loss: the first ones up to `max_tokens`, but at least one.

        With `each`, of each document only its first tokens. Where these end within a character, they are cut before it.

        Raises:
            DatasetError: if the data set was made with another tokenizer.
        """
        if tokenizer.fingerprint != self.manifest.get("tokenizer"):
            raise DatasetError(f"{self.path.parent} was made with another tokenizer; {PREPARE_AGAIN} with this one")
        ends = self.offsets[1:] if each is None else np.minimum(np.diff(self.offsets), each).cumsum()
        count = len(ends) if max_tokens is None else max(1, int((ends <= max_tokens).sum()))
        texts = {}
        for name, (start, end) in zip(self.names[:count], itertools.pairwise(self.offsets[: count + 1]), strict=True):
            ids = self.read(start, end if each is None else min(end, start + each)).tolist()
            cut = end - start > len(ids)  # perhaps within a character
            texts[name] = tokenizer.decode(ids, "ignore" if cut else "replace")
        return texts

    def read(self, start: int, end: int) -> NDArray[np.int64]:
        """The ids at `start` to before `end`, (tokens,). Each block that holds some is checked when first read.

        Raises:
            DatasetError: if a block is damaged, or holds an id that is not in the vocabulary.
        """
        end, size = min(end, len(self.tokens)), HASHED_BYTES // self.tokens.itemsize
        for number in range(start // size, -(-end // size)):
            if number in self._checked:
                continue
            block = self.tokens[number * size : (number + 1) * size]
            if hashlib.sha256(block.data).digest() != self._hashes[number * 32 : (number + 1) * 32]:
                raise _fault(self.path, f"is damaged at byte {number * HASHED_BYTES} or after")
            if int(block.max()) >= self.vocab_size:
                raise _fault(self.path, f"holds the id {block.max()}, but the vocabulary has {self.vocab_size}")
            self._checked.add(number)
        return self.tokens[start:end].astype(np.int64)

    def count_ids(self) -> NDArray[np.int64]:
        """(vocab_size,) how often each id occurs, counted a block at a time."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, len(self.tokens), 1 << 20):
            counts += np.bincount(self.read(start, start + (1 << 20)), minlength=self.vocab_size)
        return counts

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The batch of a training step: a pure function of its arguments.

        Args:
            step: number of the batch, from 0; the epoch follows from it.
            batch_size: windows.
            seed: of the order and phase.

        Returns:
            x and y, int64 (batch, time): y is what follows x, -100 where another window has that target.
        """
        numbers = range(step * batch_size, (step + 1) * batch_size)
        return self._windows([self.segment(number, seed) for number in numbers])

    def sequential(self, batch_size: int, most: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
        """The whole split once, in order, or `most` batches of it: for validation."""
        bounds = [*range(0, self.n_targets, self.context_size), self.n_targets]
        segments = list(itertools.pairwise(bounds))
        for number in spread(-(-len(segments) // batch_size), most):
            yield self._windows(segments[number * batch_size : (number + 1) * batch_size])

    def segment(self, number: int, seed: int) -> tuple[int, int]:
        """A window's first target and the one after its last. Windows are numbered over all epochs."""
        epoch, index = divmod(number, self.n_windows)
        shortest = self.n_targets - (self.n_windows - 1) * self.context_size  # what full windows leave over
        first_length, order = _epoch(seed, epoch, self.n_windows, shortest, self.context_size)
        start = int(order[index] - 1) * self.context_size + first_length
        return max(0, start), min(start + self.context_size, self.n_targets)

    def _windows(self, segments: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        time = self.context_size
        block = np.empty((len(segments), time + 1), dtype=np.int64)
        y = torch.full((len(segments), time), IGNORED)
        for row, (first, end) in enumerate(segments):
            start = min(first, self.n_targets - time)
            block[row] = self.read(start, start + time + 1)
            y[row, first - start : end - start] = torch.from_numpy(block[row, first - start + 1 : end - start + 1])
        return torch.from_numpy(block[:, :-1].copy()), y


class MixedDataset:
    """Training windows of two data sets in a fixed proportion: new text, and some of the old against forgetting.

    Window n of a run is one of the old text where n · share passes a whole number. So batches are a pure function of
    (seed, step) here too, and the windows of each text come in the order in which they come without the other.

    Args:
        new, old: training splits with the same context_size and tokenizer.
        share: of the windows that are of the old text, above 0 and below 1.

    Raises:
        DatasetError: if the share is out of range, or the two do not fit together.
    """

    def __init__(self, new: TokenDataset, old: TokenDataset, share: float) -> None:
        if not 0 < share < 1:
            raise DatasetError(f"the share of old text is {share}; it must be above 0 and below 1")
        if new.manifest.get("tokenizer") != old.manifest.get("tokenizer"):
            raise DatasetError(f"{new.path.parent} and {old.path.parent} were made with different tokenizers")
        if new.context_size != old.context_size:
            raise DatasetError(f"context_size={new.context_size} of the new text is not {old.context_size} of the old")
        self.new, self.old, self.share = new, old, share
        self.vocab_size, self.manifest = new.vocab_size, new.manifest
        self.fingerprint = f"{new.fingerprint} with {share:g} of {old.fingerprint}"

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x and y, int64 (batch, time), as of `TokenDataset.batch`."""
        rows = []
        for number in range(step * batch_size, (step + 1) * batch_size):
            old = math.floor(number * self.share)  # windows of the old text before this one
            is_old = math.floor((number + 1) * self.share) > old
            rows.append(self.old.batch(old, 1, seed) if is_old else self.new.batch(number - old, 1, seed))
        return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def _identity(file: Path) -> tuple[int, int, int] | None:
    """What tells a file from a later one of the same name; None if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n_windows: int, shortest: int, longest: int) -> tuple[int, NDArray[np.int64]]:
    """Length of an epoch's first window, which shifts all others, and their order. Cached for all windows."""
    generator = np.random.default_rng((seed, epoch))
    return int(generator.integers(shortest, longest + 1)), generator.permutation(n_windows)


class TrainData(Protocol):
    """What the trainer asks of its data: batches that are a pure function of (step, seed)."""

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x and y, int64 (batch, time)."""


def spread(count: int, most: int) -> range:
    """The numbers of at most `most` of `count` batches, spread evenly over them; 0: of all."""
    return range(0, count, max(1, -(-count // most)) if most else 1)


class ValData(Protocol):
    """What the trainer asks of its validation data: the whole split, once, in order.

    Where it has `bytes_per_token`, the raw bytes of its text per token, losses are given in bits per byte too.
    """

    def sequential(self, batch_size: int, most: int = 0) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of x and y, int64 (batch, time): all, or at most so many, see `spread`."""
