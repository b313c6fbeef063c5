"""Token files: what a data set looks like on disk.

A data set is a folder:

- `train.bin` and `val.bin`: little-endian token ids, one document after the other, each ended by eos;
- `train.offsets` and `val.offsets`: little-endian uint64, where each document starts, and the end;
- `train.hashes` and `val.hashes`: SHA-256 of each 64 KiB of the token file, 32 bytes each;
- `meta.json`: the manifest, written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmcore.files import fsync, sha256_file, write_atomic

FORMAT_VERSION = 2
HASHED_BYTES = 1 << 16  # of a token file per hash: a window of a batch needs little more than itself checked
SPLITS = ("train", "val")
FILES = {"bin": "sha256", "offsets": "offsets_sha256", "hashes": "hashes_sha256"}  # ending -> key of its hash
AGAIN = "run 02_dataset again"


class DatasetError(ValueError):
    """A data set that is missing, damaged, too short or made for something else. The message says what to do."""


def finish_split(folder: Path, split: str, lengths: list[int]) -> dict[str, Any]:
    """Write offsets and hashes beside a complete token file, whose documents have these lengths, in tokens.

    Returns:
        For the manifest: documents, tokens, sha256, offsets_sha256, hashes_sha256.
    """
    whole, hashes = hashlib.sha256(), []
    fsync(folder / f"{split}.bin")
    with open(folder / f"{split}.bin", "rb") as file:
        while block := file.read(HASHED_BYTES):
            whole.update(block)
            hashes.append(hashlib.sha256(block).digest())
    offsets = np.cumsum([0, *lengths], dtype="<u8").tobytes()
    write_atomic(folder / f"{split}.offsets", offsets)
    write_atomic(folder / f"{split}.hashes", b"".join(hashes))
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "sha256": whole.hexdigest(),
        "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
        "hashes_sha256": hashlib.sha256(b"".join(hashes)).hexdigest(),
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `meta.json`, with a hash of itself: from now on the folder is a data set."""
    manifest = {**manifest, "sha256": _seal(manifest)}
    write_atomic(folder / "meta.json", json.dumps(manifest, indent=1, ensure_ascii=False))


def publish(folder: Path, dataset_dir: Path) -> None:
    """Let a complete data set take the place of the one in `dataset_dir`. Killed anywhere, it can be called again."""
    if not (folder / "meta.json").exists():
        return
    (dataset_dir / "meta.json").unlink(missing_ok=True)
    for name in (f"{split}.{ending}" for split in SPLITS for ending in FILES):
        if (folder / name).exists():
            os.replace(folder / name, dataset_dir / name)
    fsync(dataset_dir)  # the files before the manifest
    os.replace(folder / "meta.json", dataset_dir / "meta.json")
    fsync(dataset_dir)
    shutil.rmtree(folder)


def _seal(manifest: dict[str, Any]) -> str:
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
    if not file.is_file():
        raise DatasetError(f"no data set in dataset_dir={str(dataset_dir)!r}; make one with notebook 02_dataset")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, seal = manifest["format_version"], manifest.get("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} cannot be read ({error!r}); {AGAIN}") from None
    if version != FORMAT_VERSION:
        raise DatasetError(f"{dataset_dir} has format version {version}; this code reads {FORMAT_VERSION}; {AGAIN}")
    if seal != _seal(manifest):
        raise DatasetError(f"{file} is damaged: its own hash differs; {AGAIN}")
    for split in manifest["splits"] if splits is None else splits:
        if split not in manifest["splits"]:
            raise DatasetError(f"split={split!r} must be one of {', '.join(manifest['splits'])}")
        counts = manifest["splits"][split]
        for ending, key in FILES.items():
            part = file.with_name(f"{split}.{ending}")
            if not part.is_file():
                raise DatasetError(f"{part} is missing; {AGAIN}")
            size, wanted = part.stat().st_size, counts["tokens"] * np.dtype(manifest["dtype"]).itemsize
            if ending == "bin" and size != wanted:
                raise DatasetError(f"{part} is damaged: it has {size:,} bytes, not {wanted:,}; {AGAIN}")
            if (tokens or ending != "bin") and sha256_file(part) != counts[key]:
                raise DatasetError(f"{part} is damaged: its {size:,} bytes have another hash; {AGAIN}")
    return manifest
