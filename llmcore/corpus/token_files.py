"""Writing the token files and the manifest that `llmcore.dataset` reads."""

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
    """Write the offsets and hashes of a complete token file.

    Args:
        folder: holds the file `<split>.bin`.
        split: "train" or "val".
        lengths: of the documents in the file, in tokens.

    Returns:
        What the manifest says of the split: documents, tokens, sha256, offsets_sha256, hashes_sha256.
    """
    file_hash, block_hashes = hashlib.sha256(), []
    fsync(folder / f"{split}.bin")
    with open(folder / f"{split}.bin", "rb") as file:
        while block := file.read(HASHED_BYTES):
            file_hash.update(block)
            block_hashes.append(hashlib.sha256(block).digest())

    offsets = np.cumsum([0, *lengths], dtype="<u8").tobytes()
    write_atomic(folder / f"{split}.offsets", offsets)
    hashes = b"".join(block_hashes)
    write_atomic(folder / f"{split}.hashes", hashes)
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "sha256": file_hash.hexdigest(),
        "offsets_sha256": hashlib.sha256(offsets).hexdigest(),
        "hashes_sha256": hashlib.sha256(hashes).hexdigest(),
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `meta.json`, with a hash of the manifest in it. The folder is a data set from then on."""
    manifest = {**manifest, "sha256": manifest_hash(manifest)}
    write_atomic(folder / "meta.json", json.dumps(manifest, indent=1, ensure_ascii=False))


def publish(folder: Path, dataset_dir: Path) -> None:
    """Move a complete data set from a folder into `dataset_dir`, in place of what is there. The folder is removed.

    Without a manifest in the folder, nothing happens. After a kill, another call completes the move.
    """
    if not (folder / "meta.json").exists():
        return
    (dataset_dir / "meta.json").unlink(missing_ok=True)
    for name in (f"{split}.{ending}" for split in SPLITS for ending in FILES):
        if (folder / name).exists():
            os.replace(folder / name, dataset_dir / name)
    fsync(dataset_dir)  # the files reach the disk before the manifest
    os.replace(folder / "meta.json", dataset_dir / "meta.json")
    fsync(dataset_dir)
    shutil.rmtree(folder)
