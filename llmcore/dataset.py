"""Token files to batches: NumPy memory maps, and batches that are a pure function of (seed, step)."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
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
HASHED_BYTES = 1 << 16  # of a token file per hash: a window of a batch needs little more than itself checked
SPLITS = ("train", "val")
FILES = {"bin": "sha256", "offsets": "offsets_sha256", "hashes": "hashes_sha256"}  # ending -> key of its hash
PREPARE_AGAIN = "run 02_dataset again"


_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**50}
_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_MANIFEST = {  # what `meta.json` must look like, `sources` apart; it may hold more
    "type": "object",
    "required": ["dtype", "vocab_size", "splits"],
    "properties": {
        "dtype": {"enum": ["<u2", "<u4"]},
        "vocab_size": {"type": "integer", "minimum": 1, "maximum": 1 << 22},
        "tokenizer": {"type": "string"},
        "val_fraction": {"type": "finite number", "minimum": 0, "maximum": 1},
        "errors": {"type": "string"},
        "split_by": {"type": "string"},
        "sources": {"type": "array"},
        "refused": {"type": "object"},
        "splits": {
            "type": "object",
            "patternProperties": {
                "^(train|val)$": {
                    "type": "object",
                    "required": ["documents", "tokens", "bytes", *FILES.values()],
                    "properties": {
                        **dict.fromkeys(("documents", "tokens", "characters", "bytes"), _COUNT),
                        **dict.fromkeys(FILES.values(), _HASH),
                    },
                }
            },
            "additionalProperties": False,
        },
    },
}
_SOURCE = {"path": str, "sha256": str, "split": str, "tokens": int}  # of each of `sources`: checked in a plain loop,
# since a schema would take seconds for thousands of files


class DatasetError(ValueError):
    """A data set that is missing, damaged, too short or made for something else. The message says what to do."""


def manifest_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_dataset(
    dataset_dir: str | os.PathLike[str], splits: Iterable[str] | None = None, *, tokens: bool = True
) -> dict[str, Any]:
    """A data set's manifest, after checking it and the files of the splits (of all, if none are named) by their hash.

    Args:
        dataset_dir: folder written by `prepare_dataset`.
        splits: "train", "val".
        tokens: False to check the token files by their size alone, which takes no time however large they are.

    Raises:
        DatasetError: naming the file that is missing, damaged or of another format version.
    """
    file = Path(dataset_dir) / "meta.json"
    manifest = _read_manifest(file)
    for split in manifest["splits"] if splits is None else splits:
        if split not in manifest["splits"]:
            raise DatasetError(f"split={split!r} must be one of {', '.join(manifest['splits'])}")
        counts = manifest["splits"][split]
        for ending, key in FILES.items():
            part = file.with_name(f"{split}.{ending}")
            if not part.is_file():
                raise DatasetError(f"{part} is missing; {PREPARE_AGAIN}")
            if hint := pointer_hint(part):
                raise DatasetError(f"{part} cannot be read: {hint}")
            size, wanted = part.stat().st_size, counts["tokens"] * np.dtype(manifest["dtype"]).itemsize
            if ending == "bin" and size != wanted:
                raise DatasetError(f"{part} is damaged: it has {size:,} bytes, not {wanted:,}; {PREPARE_AGAIN}")
            if (tokens or ending != "bin") and sha256_file(part) != counts[key]:
                raise DatasetError(f"{part} is damaged: its {size:,} bytes have another hash; {PREPARE_AGAIN}")
        _check_documents(file, manifest, split)
    return manifest


def _read_manifest(file: Path) -> dict[str, Any]:
    """A data set's `meta.json`, checked by its own hash and against its schema."""
    if not file.is_file():
        raise DatasetError(f"no data set in dataset_dir={str(file.parent)!r}; make one with notebook 02_dataset")
    try:
        manifest = read_json(file, {"type": "object", "required": ["format_version"]})
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{file.parent} has format version {version}; this code reads {FORMAT_VERSION}; {PREPARE_AGAIN}"
            )
        if manifest.get("sha256") != manifest_hash(manifest):
            raise DatasetError(f"{file} is damaged: its own hash differs; {PREPARE_AGAIN}")
        check_json(manifest, _MANIFEST, str(file))
    except DatasetError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file} cannot be used ({error}); {PREPARE_AGAIN}") from None
    if manifest["dtype"] == "<u2" and manifest["vocab_size"] > 1 << 16:
        raise DatasetError(f"{file} cannot be used: dtype <u2 is too small for its vocab_size; {PREPARE_AGAIN}")
    for number, source in enumerate(manifest.get("sources", [])):
        fits = isinstance(source, dict) and all(type(source.get(key)) is kind for key, kind in _SOURCE.items())
        if not (fits and 0 <= source["tokens"] <= 2**50):
            raise DatasetError(
                f"{file} cannot be used: sources.{number} needs path, sha256, split, tokens; {PREPARE_AGAIN}"
            )
    return manifest


def _check_documents(file: Path, manifest: dict[str, Any], split: str) -> None:
    """Compare what a manifest says of a split's documents with their offsets and hashes.

    Raises:
        DatasetError: naming what disagrees.
    """
    counts, dtype = manifest["splits"][split], np.dtype(manifest["dtype"])
    blocks = -(-counts["tokens"] * dtype.itemsize // HASHED_BYTES)
    if file.with_name(f"{split}.hashes").stat().st_size != 32 * blocks:
        raise DatasetError(f"{file.with_name(f'{split}.hashes')} does not hold {blocks} hashes; {PREPARE_AGAIN}")
    part = file.with_name(f"{split}.offsets")
    offsets = np.frombuffer(part.read_bytes(), dtype=np.uint8)
    if len(offsets) != 8 * (counts["documents"] + 1):
        raise DatasetError(f"{part} does not hold the offsets of {counts['documents']} documents; {PREPARE_AGAIN}")
    offsets = offsets.view("<u8")
    if offsets[0] != 0 or offsets[-1] != counts["tokens"] or (offsets[1:] < offsets[:-1]).any():
        raise DatasetError(f"{part} is damaged: offsets must rise from 0 to {counts['tokens']}; {PREPARE_AGAIN}")
    own = [source for source in manifest.get("sources", []) if source["split"] in (split, "both")]
    if "sources" in manifest and (
        len(own) != counts["documents"]
        or any(s["split"] == split and s["tokens"] != n for s, n in zip(own, np.diff(offsets).tolist(), strict=True))
    ):
        raise DatasetError(
            f"{file} cannot be used: sources: they are not the documents of {part.name}; {PREPARE_AGAIN}"
        )


IGNORED = -100  # a target that is left out of the loss
TRIES = 100  # at opening a data set that is being replaced, a hundredth of a second apart


class TokenDataset:
    """One split of a data set, read as windows of `context_size` tokens.

    Every target token of an epoch is seen exactly once: windows tile the stream, in an order and from a starting
    phase that change each epoch, and where a window overlaps its neighbour at an end of the stream, the targets that
    belong to the neighbour are -100.

    Opening reads the manifest and no tokens, however many there are. Each block of the token file is compared with its
    hash when it is first read from, so nothing damaged gets into a batch.

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
        DatasetError: if the files are missing, cut short, at odds, or shorter than one window; from a batch, if it
            would hold damaged tokens.
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
        """Verify and open the files of one and the same data set, though a preparation may replace it meanwhile.

        An open file stays what it is, whatever takes its name. So if the manifest is still the same after all files
        have been opened, they belong together; if not, whatever was found is of no account.
        """
        folder = self.path.parent
        for _ in range(TRIES):
            before = _stamp(folder / "meta.json")
            found: DatasetError | None = None
            try:
                self._open_once()
            except (OSError, ValueError) as error:
                found = (
                    error if isinstance(error, DatasetError) else DatasetError(f"{self.path}: {error}; {PREPARE_AGAIN}")
                )
            unfinished = before is None and (folder / ".unfinished" / "meta.json").exists()  # its turn comes last
            if before == _stamp(folder / "meta.json") and not unfinished:
                if found:
                    raise found
                return
            time.sleep(0.01)
        raise DatasetError(f"{folder} is being replaced, or a preparation broke off; let it end, or {PREPARE_AGAIN}")

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
        self._hashes = self.path.with_suffix(".hashes").read_bytes()
        self.offsets = np.fromfile(self.path.with_suffix(".offsets"), dtype="<u8").astype(np.int64)

    @property
    def names(self) -> list[str]:
        """Names of the documents, in the order of `offsets`.

        Raises:
            DatasetError: if the manifest does not say them.
        """
        if "sources" not in self.manifest:
            raise DatasetError(f"{self.path.with_name('meta.json')} does not name its sources; {PREPARE_AGAIN}")
        return [source["path"] for source in self.manifest["sources"] if source["split"] in (self.split, "both")]

    def texts(self, tokenizer: Tokenizer, max_tokens: int | None = None) -> dict[str, str]:
        """The documents' texts by name, decoded (without loss); None for all, else the first ones up to `max_tokens`.

        At least one document is given, whatever its length.

        Raises:
            DatasetError: if the data set was made with another tokenizer.
        """
        if tokenizer.fingerprint != self.manifest.get("tokenizer"):
            raise DatasetError(
                f"{self.path.parent} was made with another tokenizer; run 02_dataset again with this one"
            )
        ends = self.offsets[1:]
        count = len(ends) if max_tokens is None else max(1, int((ends <= max_tokens).sum()))
        spans = itertools.pairwise(self.offsets[: count + 1])
        return {
            name: tokenizer.decode(self.read(start, end).tolist())
            for name, (start, end) in zip(self.names[:count], spans, strict=True)
        }

    def read(self, start: int, end: int) -> NDArray[np.int64]:
        """The ids from one place to before another, after a check of the blocks that hold them, once for each.

        Raises:
            DatasetError: if a block is damaged, or holds an id that is not in the vocabulary.
        """
        end, size = min(end, len(self.tokens)), HASHED_BYTES // self.tokens.itemsize
        for number in range(start // size, -(-end // size)):
            if number in self._checked:
                continue
            block = self.tokens[number * size : (number + 1) * size]
            if hashlib.sha256(block.data).digest() != self._hashes[number * 32 : (number + 1) * 32]:
                raise DatasetError(f"{self.path} is damaged at byte {number * HASHED_BYTES} or after; {PREPARE_AGAIN}")
            if int(block.max()) >= self.vocab_size:
                raise DatasetError(
                    f"{self.path} holds the id {block.max()}, but the vocabulary has {self.vocab_size}; {PREPARE_AGAIN}"
                )
            self._checked.add(number)
        return self.tokens[start:end].astype(np.int64)

    def count_ids(self) -> NDArray[np.int64]:
        """(vocab_size,) how often each id occurs, counted a block at a time."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, len(self.tokens), 1 << 20):
            counts += np.bincount(self.read(start, start + (1 << 20)), minlength=self.vocab_size)
        return counts

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The batch of a training step: a pure function of its arguments, with no state behind it.

        Args:
            step: number of the batch, from 0; the epoch follows from it.
            batch_size: windows.
            seed: of the order and phase.

        Returns:
            x and y, int64 (batch, time): y is what follows x, -100 where another window has that target.
        """
        numbers = range(step * batch_size, (step + 1) * batch_size)
        return self._windows([self._segment(number, seed) for number in numbers])

    def sequential(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The whole split once, in order: for validation."""
        bounds = [*range(0, self.n_targets, self.context_size), self.n_targets]
        segments = list(itertools.pairwise(bounds))
        for first in range(0, len(segments), batch_size):
            yield self._windows(segments[first : first + batch_size])

    def _segment(self, number: int, seed: int) -> tuple[int, int]:
        """First and last-plus-one target of a window, by its number counted over all epochs."""
        epoch, index = divmod(number, self.n_windows)
        last = self.n_targets - (self.n_windows - 1) * self.context_size  # what is left over for the last window
        first, order = _epoch(seed, epoch, self.n_windows, last, self.context_size)
        start = int(order[index] - 1) * self.context_size + first
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


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What tells a file from another of its name; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n_windows: int, shortest: int, longest: int) -> tuple[int, NDArray[np.int64]]:
    """Length of an epoch's first window, which shifts all others, and their order. Cached: each window asks."""
    generator = np.random.default_rng((seed, epoch))
    return int(generator.integers(shortest, longest + 1)), generator.permutation(n_windows)


class TrainData(Protocol):
    """What the trainer asks of its data: batches that are a pure function of (step, seed)."""

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x and y, int64 (batch, time)."""


class ValData(Protocol):
    """What the trainer asks of its validation data: the whole split, once, in order.

    Where it has `bytes_per_token`, the raw bytes of its text per token, losses are given in bits per byte too.
    """

    def sequential(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of x and y, int64 (batch, time)."""
