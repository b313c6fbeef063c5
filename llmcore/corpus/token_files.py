"""Writing token files: what `dataset` reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llmcore.dataset import FILES, HASHED_BYTES, SPLITS, manifest_hash
from llmcore.files import fsync, write_atomic


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
    manifest = {**manifest, "sha256": manifest_hash(manifest)}
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
