"""One process at a time works in a folder."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmcore.files import lock_folder


@contextlib.contextmanager
def hold_folder(folder: Path, waiting: str = "") -> Iterator[None]:
    """Hold the lock of an existing folder, after waiting until no other process holds it.

    Where the system has no such locks (on Windows), nothing is locked.

    Args:
        folder: to lock.
        waiting: a warning that says why it takes long, shown if another process holds the lock. Empty: no warning.
    """
    lock = lock_folder(folder, wait=not waiting)
    if lock is None and waiting:
        warnings.warn(waiting, stacklevel=5)
        lock = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
