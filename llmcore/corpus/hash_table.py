"""Which hashes occur in which documents: more pairs than fit into memory, kept on disk and sorted part by part."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from threading import Lock
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

PARTS = 64  # files; a part must fit into memory when it is sorted
HELD_ROWS = 1 << 17  # pairs that wait in memory, 12 bytes each, before they are written
ROW = np.dtype([("hash", "<u8"), ("document", "<u4")])


class HashTable:
    """Pairs of a 64-bit hash and a document's number. All pairs with the same hash stand in the same part.

    Up to 131,072 pairs stay in memory. More go to temporary files without a name, so nothing is left of them after a
    kill. They lie in the folder that the environment variable TMPDIR names. A billion bytes of Chinese text have some
    17 million sampled passages (see `duplicates`): 200 MB on the disk, 3 MB a part.
    """

    def __init__(self) -> None:
        self._files: list[IO[bytes]] = []
        self._held: list[NDArray[Any]] = []
        self._held_rows = 0
        self._lock = Lock()

    def add(self, document: int, hashes: NDArray[np.uint64]) -> None:
        """Note that a document has these hashes, as often as they are given. Several threads may call this."""
        rows = np.empty(len(hashes), ROW)
        rows["hash"], rows["document"] = hashes, document
        with self._lock:
            self._held.append(rows)
            self._held_rows += len(rows)
            if self._held_rows >= HELD_ROWS:
                self._write()

    def parts(self) -> Iterator[NDArray[Any]]:
        """All pairs, a part at a time: arrays with the fields `hash` and `document`, sorted by the two."""
        with self._lock:
            if not self._files:
                self._held = [np.concatenate([np.empty(0, ROW), *self._held])]
                small = self._held[0]
            else:
                self._write()
        if not self._files:
            yield _sorted(small)
        for file in self._files:
            file.seek(0)
            yield _sorted(np.frombuffer(file.read(), ROW))

    def _write(self) -> None:
        self._files = self._files or [tempfile.TemporaryFile() for _ in range(PARTS)]
        rows = np.concatenate([np.empty(0, ROW), *self._held])
        self._held, self._held_rows = [], 0
        part = (rows["hash"] % PARTS).astype(np.uint8)
        rows = rows[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=PARTS))
        for file, piece in zip(self._files, np.split(rows, ends[:-1]), strict=True):
            file.seek(0, 2)
            file.write(piece.tobytes())

    def __enter__(self) -> HashTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            file.close()


def _sorted(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows sorted by hash and document: two sorts of numbers, which are several times as fast as `np.lexsort`."""
    by_hash = np.argsort(rows["hash"])
    hashes = rows["hash"][by_hash]
    place = np.cumsum(np.diff(hashes, prepend=hashes[:1]) != 0).astype(np.uint64)  # of the hash among all hashes
    ordered = np.empty_like(rows)
    ordered["hash"] = hashes
    ordered["document"] = np.sort(place << np.uint64(32) | rows["document"][by_hash]) & np.uint64(0xFFFFFFFF)
    return ordered
