"""Which hashes occur in which documents: more pairs than fit into memory, kept on disk and sorted part by part."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARTS = 64  # files; a part must fit into memory when it is sorted
HELD_ROWS = 1 << 20  # pairs that wait in memory, 12 bytes each, before they are written
ROW = np.dtype([("hash", "<u8"), ("document", "<u4")])


class HashTable:
    """Pairs of a 64-bit hash and a document's number. All pairs with the same hash stand in the same part.

    The parts are temporary files without a name, so nothing is left of them after a kill. A billion bytes of Chinese
    text have about 15 million sentences: 180 MB on the disk, 3 MB a part.
    """

    def __init__(self) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(PARTS)]
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
            self._write()
        for file in self._files:
            file.seek(0)
            rows = np.frombuffer(file.read(), ROW)
            yield rows[np.lexsort((rows["document"], rows["hash"]))]

    def _write(self) -> None:
        rows = np.concatenate([np.empty(0, ROW), *self._held])
        self._held, self._held_rows = [], 0
        part = (rows["hash"] % PARTS).astype(np.uint8)
        for number, file in enumerate(self._files):
            file.seek(0, 2)
            file.write(rows[part == number].tobytes())

    def __enter__(self) -> HashTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            file.close()
