"""A data set of random tokens, of any size, in its real format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmcore.corpus.token_files import finish_split, write_manifest
from llmcore.dataset import FORMAT_VERSION, SPLITS


def write_tokens(folder: Path, vocab_size: int, tokens: int) -> None:
    """A data set of so many tokens in its real format; validation gets fewer."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(vocab_size, size=min(tokens, 10**7), dtype="<u2")
    counts = {}
    for split, blocks in zip(SPLITS, (tokens // len(ids), 1), strict=True):
        with open(folder / f"{split}.bin", "wb") as file:
            for number in range(blocks):
                file.write(np.roll(ids, number).data)
        counts[split] = {**finish_split(folder, split, [len(ids)] * blocks), "bytes": 3 * blocks * len(ids)}
    manifest = {"format_version": FORMAT_VERSION, "dtype": "<u2", "vocab_size": vocab_size, "splits": counts}
    write_manifest(folder, manifest)
