"""Text to token files to batches: NumPy memory maps, and batches that are a pure function of (seed, step).

A data set is a folder: `train.bin` and `val.bin` (little-endian token ids, one document after the other, each ended
by eos), `train.offsets` and `val.offsets` (little-endian uint64, where each document starts, and the end), and
`meta.json`, written last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from llmcore.files import fsync, read_text, readable_texts, sha256_file, text_name, write_atomic
from llmcore.tokenizer import Tokenizer

FORMAT_VERSION = 1
IGNORED = -100  # a target that is left out of the loss


class DatasetError(ValueError):
    """A data set that is missing, damaged, too short or made for something else. The message says what to do."""


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

    The split is by document: each file's place follows from a hash of its name, so adding files moves none. A corpus
    of one document is split by position instead, which the manifest's `split_by` says.

    Args:
        data_dir: folder of `.txt` files.
        tokenizer: what turns text into ids.
        dataset_dir: where the token files go.
        val_fraction: share of the documents held out; above 0, below 1. None: as in the data set that is there
            already, else 0.05.
        errors: what to do about files that cannot be read: "strict" or "skip", see `readable_texts`. None: as for
            the data set that is there already, else "strict".
        progress: show a bar.

    Returns:
        The manifest, as in `meta.json`: format_version, dtype, vocab_size, tokenizer (fingerprint), val_fraction,
        errors, split_by, splits (name -> documents, tokens, characters, bytes, sha256 and offsets_sha256 of its
        files), sources (path, sha256, bytes, tokens, split), refused (path -> why it was skipped), and sha256 of all
        this as JSON.

    Raises:
        FileNotFoundError: if there are no texts.
        DatasetError: if the texts are all empty, or val_fraction is out of range.
        ValueError: if a file cannot be read and errors="strict"; what was there before is as it was.
    """
    data_dir, dataset_dir = Path(data_dir), Path(dataset_dir)
    existing: dict[str, Any] = {}
    with contextlib.suppress(DatasetError):
        existing = verify_dataset(dataset_dir)
    val_fraction = existing.get("val_fraction", 0.05) if val_fraction is None else val_fraction
    errors = existing.get("errors", "strict") if errors is None else errors
    if not 0 < val_fraction < 1:
        raise DatasetError(f"val_fraction={val_fraction} must be above 0 and below 1")
    files, refused = readable_texts(data_dir, errors)
    names = [text_name(file, data_dir) for file in files]
    hashes = [sha256_file(file) for file in files]
    wanted = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "val_fraction": val_fraction,
        "errors": errors,
        "refused": refused,
    }
    if existing and {**existing, **wanted} == existing:
        sources = [(source["path"], source["sha256"]) for source in existing["sources"]]
        if sources == list(zip(names, hashes, strict=True)):
            return existing

    dataset_dir.mkdir(parents=True, exist_ok=True)
    (dataset_dir / "meta.json").unlink(missing_ok=True)  # what follows is no data set until it is written again
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    texts = [name for name, file in zip(names, files, strict=True) if file.stat().st_size]
    by_position = len(texts) == 1
    held_out = _held_out(texts, val_fraction)
    writers = {split: _Writer(dataset_dir, split, dtype) for split in ("train", "val")}
    done = []
    bar = tqdm(
        total=sum(file.stat().st_size for file in files),
        unit="B",
        unit_scale=True,
        desc="tokenize",
        disable=not progress,
        leave=False,
    )
    for name, file, digest in zip(names, files, hashes, strict=True):
        text = read_text(file)
        split = "empty" if not text else "both" if by_position else "val" if name in held_out else "train"
        tokens = 0
        if split == "both":
            cut = round(len(text) * (1 - val_fraction))
            tokens = writers["train"].write(_encode(tokenizer, text[:cut]), text[:cut])
            tokens += writers["val"].write([*_encode(tokenizer, text[cut:]), tokenizer.eos_id], text[cut:])
        elif split != "empty":
            tokens = writers[split].write([*_encode(tokenizer, text), tokenizer.eos_id], text)
        done.append({"path": name, "sha256": digest, "bytes": file.stat().st_size, "tokens": tokens, "split": split})
        bar.update(file.stat().st_size)
    bar.close()
    manifest: dict[str, Any] = {
        **wanted,
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "split_by": "position" if by_position else "document",
        "splits": {split: writer.close() for split, writer in writers.items()},
        "sources": done,
    }
    if not any(split["tokens"] for split in manifest["splits"].values()):
        raise DatasetError(f"the {len(files)} files in data_dir={str(data_dir)!r} hold no text")
    manifest["sha256"] = _seal(manifest)
    write_atomic(dataset_dir / "meta.json", json.dumps(manifest, indent=1, ensure_ascii=False))
    return manifest


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """One document's ids, its lines on all cores. A newline is a symbol of its own, so lines encode alone."""
    *lines, last = text.split("\n")
    batches = tokenizer.encode_batch([line + "\n" for line in lines] + [last])
    return [id for ids in batches for id in ids]


def _held_out(names: list[str], val_fraction: float) -> set[str]:
    """The names whose hash falls below the fraction; the lowest one if none does."""
    if len(names) < 2:
        return set()
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    chosen = {name for name, place in places.items() if place < val_fraction}
    if len(chosen) in (0, len(names)):
        chosen = {min(names, key=lambda name: places[name])}
    return chosen


class _Writer:
    """One split's token file, offsets and counts."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.temporary = folder / f".{split}.bin.tmp"
        self.file = open(self.temporary, "wb")
        self.hash = hashlib.sha256()
        self.offsets = [0]
        self.characters = self.bytes = 0

    def write(self, ids: list[int], text: str) -> int:
        """Append a document, given as ids and as the text they stand for; returns the number of ids."""
        block = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(block)
        self.hash.update(block)
        self.offsets.append(self.offsets[-1] + len(ids))
        self.characters += len(text)
        self.bytes += len(text.encode())
        return len(ids)

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.folder / f"{self.split}.bin")
        offsets = np.asarray(self.offsets, dtype="<u8").tobytes()
        write_atomic(self.folder / f"{self.split}.offsets", offsets)
        fsync(self.folder)
        return {
            "documents": len(self.offsets) - 1,
            "tokens": self.offsets[-1],
            "characters": self.characters,
            "bytes": self.bytes,
            "sha256": self.hash.hexdigest(),
            "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
        }


def _seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_dataset(dataset_dir: str | os.PathLike[str], splits: Iterable[str] | None = None) -> dict[str, Any]:
    """A data set's manifest, after checking it and the files of the splits (of all, if none are named) by their hash.

    Raises:
        DatasetError: naming the file that is missing, damaged or of another format version.
    """
    file = Path(dataset_dir) / "meta.json"
    again = "run 02_dataset again"
    if not file.is_file():
        raise DatasetError(f"no data set in dataset_dir={str(dataset_dir)!r}; make one with notebook 02_dataset")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, seal = manifest["format_version"], manifest.get("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} cannot be read ({error!r}); {again}") from None
    if version != FORMAT_VERSION:
        raise DatasetError(f"{dataset_dir} has format version {version}; this code reads {FORMAT_VERSION}")
    if seal != _seal(manifest):
        raise DatasetError(f"{file} is damaged: its own hash differs; {again}")
    for split in manifest["splits"] if splits is None else splits:
        if split not in manifest["splits"]:
            raise DatasetError(f"split={split!r} must be one of {', '.join(manifest['splits'])}")
        for ending, key in (("bin", "sha256"), ("offsets", "offsets_sha256")):
            part = file.with_name(f"{split}.{ending}")
            if not part.is_file():
                raise DatasetError(f"{part} is missing; {again}")
            if sha256_file(part) != manifest["splits"][split][key]:
                raise DatasetError(f"{part} is damaged: its {part.stat().st_size} bytes have another hash; {again}")
    return manifest


class TokenDataset:
    """One split of a data set, read as windows of `context_size` tokens.

    Every target token of an epoch is seen exactly once: windows tile the stream, in an order and from a starting
    phase that change each epoch, and where a window overlaps its neighbour at an end of the stream, the targets that
    belong to the neighbour are -100.

    Args:
        dataset_dir: folder written by `prepare_dataset`.
        split: "train" or "val".
        context_size: tokens per window.

    Attributes:
        tokens: memory map of all ids.
        offsets: (documents + 1,) where each document starts, and the end.
        n_windows: windows per epoch.
        manifest: the data set's `meta.json`.
        bytes_per_token: raw UTF-8 bytes of this split's text per token.

    Raises:
        DatasetError: if the files are missing, damaged or shorter than one window.
    """

    def __init__(self, dataset_dir: str | os.PathLike[str], split: str = "train", context_size: int = 1024) -> None:
        dataset_dir = Path(dataset_dir)
        if context_size < 1:
            raise DatasetError(f"context_size={context_size} must be 1 or more")
        self.manifest = verify_dataset(dataset_dir, [split])
        counts = self.manifest["splits"][split]
        if counts["tokens"] < context_size + 1:
            raise DatasetError(
                f"the {split} split has {counts['tokens']} tokens; context_size={context_size} "
                f"needs {context_size + 1}: lower context_size, add text or raise val_fraction"
            )
        self.split, self.context_size = split, context_size
        self.path = dataset_dir / f"{split}.bin"
        self.vocab_size = int(self.manifest["vocab_size"])
        self.tokens: NDArray[Any] = np.memmap(self.path, dtype=np.dtype(self.manifest["dtype"]), mode="r")
        self.offsets: NDArray[Any] = np.fromfile(dataset_dir / f"{split}.offsets", dtype="<u8").astype(np.int64)
        self.bytes_per_token = counts["bytes"] / counts["tokens"]
        self.fingerprint: str = counts["sha256"]
        self.n_targets = len(self.tokens) - 1
        self.n_windows = -(-self.n_targets // context_size)

    @property
    def names(self) -> list[str]:
        """Names of the documents, in the order of `offsets`."""
        return [source["path"] for source in self.manifest["sources"] if source["split"] in (self.split, "both")]

    def texts(self, tokenizer: Tokenizer, max_tokens: int | None = None) -> dict[str, str]:
        """The documents' texts by name, decoded (without loss); None for all, else the first ones up to `max_tokens`.

        At least one document is given, whatever its length.

        Raises:
            DatasetError: if the data set was made with another tokenizer.
        """
        if tokenizer.fingerprint != self.manifest["tokenizer"]:
            raise DatasetError(
                f"{self.path.parent} was made with another tokenizer; run 02_dataset again with this one"
            )
        ends = self.offsets[1:]
        count = len(ends) if max_tokens is None else max(1, int((ends <= max_tokens).sum()))
        spans = itertools.pairwise(self.offsets[: count + 1])
        return {
            name: tokenizer.decode(self.tokens[start:end].tolist())
            for name, (start, end) in zip(self.names[:count], spans, strict=True)
        }

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
            block[row] = self.tokens[start : start + time + 1]
            y[row, first - start : end - start] = torch.from_numpy(block[row, first - start + 1 : end - start + 1])
        if int(block.max()) >= self.vocab_size:
            raise DatasetError(
                f"{self.path} holds the id {block.max()}, but the vocabulary has {self.vocab_size}; "
                "the file is damaged: run 02_dataset again"
            )
        return torch.from_numpy(block[:, :-1].copy()), y


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n_windows: int, shortest: int, longest: int) -> tuple[int, NDArray[np.int64]]:
    """Length of an epoch's first window, which shifts all others, and their order. Cached: each window asks."""
    generator = np.random.default_rng((seed, epoch))
    return int(generator.integers(shortest, longest + 1)), generator.permutation(n_windows)
