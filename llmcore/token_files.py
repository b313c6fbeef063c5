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

from llmcore.files import check_json, fsync, pointer_hint, read_json, sha256_file, write_atomic

FORMAT_VERSION = 2
HASHED_BYTES = 1 << 16  # of a token file per hash: a window of a batch needs little more than itself checked
SPLITS = ("train", "val")
FILES = {"bin": "sha256", "offsets": "offsets_sha256", "hashes": "hashes_sha256"}  # ending -> key of its hash
AGAIN = "run 02_dataset again"


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
    manifest = _read_manifest(file)
    for split in manifest["splits"] if splits is None else splits:
        if split not in manifest["splits"]:
            raise DatasetError(f"split={split!r} must be one of {', '.join(manifest['splits'])}")
        counts = manifest["splits"][split]
        for ending, key in FILES.items():
            part = file.with_name(f"{split}.{ending}")
            if not part.is_file():
                raise DatasetError(f"{part} is missing; {AGAIN}")
            if hint := pointer_hint(part):
                raise DatasetError(f"{part} cannot be read: {hint}")
            size, wanted = part.stat().st_size, counts["tokens"] * np.dtype(manifest["dtype"]).itemsize
            if ending == "bin" and size != wanted:
                raise DatasetError(f"{part} is damaged: it has {size:,} bytes, not {wanted:,}; {AGAIN}")
            if (tokens or ending != "bin") and sha256_file(part) != counts[key]:
                raise DatasetError(f"{part} is damaged: its {size:,} bytes have another hash; {AGAIN}")
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
            raise DatasetError(f"{file.parent} has format version {version}; this code reads {FORMAT_VERSION}; {AGAIN}")
        if manifest.get("sha256") != _seal(manifest):
            raise DatasetError(f"{file} is damaged: its own hash differs; {AGAIN}")
        check_json(manifest, _MANIFEST, str(file))
    except DatasetError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file} cannot be used ({error}); {AGAIN}") from None
    if manifest["dtype"] == "<u2" and manifest["vocab_size"] > 1 << 16:
        raise DatasetError(f"{file} cannot be used: dtype <u2 is too small for its vocab_size; {AGAIN}")
    for number, source in enumerate(manifest.get("sources", [])):
        fits = isinstance(source, dict) and all(type(source.get(key)) is kind for key, kind in _SOURCE.items())
        if not (fits and 0 <= source["tokens"] <= 2**50):
            raise DatasetError(f"{file} cannot be used: sources.{number} needs path, sha256, split, tokens; {AGAIN}")
    return manifest


def _check_documents(file: Path, manifest: dict[str, Any], split: str) -> None:
    """Compare what a manifest says of a split's documents with their offsets and hashes.

    Raises:
        DatasetError: naming what disagrees.
    """
    counts, dtype = manifest["splits"][split], np.dtype(manifest["dtype"])
    blocks = -(-counts["tokens"] * dtype.itemsize // HASHED_BYTES)
    if file.with_name(f"{split}.hashes").stat().st_size != 32 * blocks:
        raise DatasetError(f"{file.with_name(f'{split}.hashes')} does not hold {blocks} hashes; {AGAIN}")
    part = file.with_name(f"{split}.offsets")
    offsets = np.frombuffer(part.read_bytes(), dtype=np.uint8)
    if len(offsets) != 8 * (counts["documents"] + 1):
        raise DatasetError(f"{part} does not hold the offsets of {counts['documents']} documents; {AGAIN}")
    offsets = offsets.view("<u8")
    if offsets[0] != 0 or offsets[-1] != counts["tokens"] or (offsets[1:] < offsets[:-1]).any():
        raise DatasetError(f"{part} is damaged: offsets must rise from 0 to {counts['tokens']}; {AGAIN}")
    own = [source for source in manifest.get("sources", []) if source["split"] in (split, "both")]
    if "sources" in manifest and (
        len(own) != counts["documents"]
        or any(s["split"] == split and s["tokens"] != n for s, n in zip(own, np.diff(offsets).tolist(), strict=True))
    ):
        raise DatasetError(f"{file} cannot be used: sources: they are not the documents of {part.name}; {AGAIN}")
