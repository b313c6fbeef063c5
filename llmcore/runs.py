"""A run's folder: its name, its lock, its metrics, and what the run was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmcore.files import resolve, shown

try:
    import fcntl
except ImportError:  # Windows: runs there are not kept apart
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("llmcore", "torch", "numpy", "sentencepiece", "safetensors")


class TrainingError(RuntimeError):
    """Training cannot start or go on. The message says why and what to change."""


def new_run_dir(output_dir: str | os.PathLike[str], name: str) -> Path:
    """A folder for a new run: `<output_dir>/<name>`, or `<name>-2`, … where a run is there already.

    Raises:
        TrainingError: if it could not be made.
    """
    parent = resolve(output_dir)
    there = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise TrainingError(f"output_dir={shown(parent)!r} cannot be written; choose another")
    number = 1
    while (path := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


@contextlib.contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of the folder. The system drops the lock with the process, however that ends.

    Raises:
        TrainingError: naming the process at work there.
    """
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            raise TrainingError(
                f"output_dir={shown(run_dir)!r} is in use by a run of process {owner}"
                f"{' (this one)' if owner == str(os.getpid()) else ''}; let it end or choose another"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in a run's `metrics.jsonl`; a last line cut short by a crash is left out."""
    path = resolve(run_dir) / "metrics.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[Any]]:
    """What differs between two descriptions of a run, as `group.name: [before, after]`."""
    changed: dict[str, list[Any]] = {}
    for group in ("train", "environment"):
        old, new = before.get(group, {}), after[group]
        changed |= {f"{group}.{key}": [old.get(key), new[key]] for key in new if old.get(key) != new[key]}
    for key in ("precision", "device"):
        if before.get(key) != after[key]:
            changed[key] = [before.get(key), after[key]]
    return changed


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of Python and the packages that compute, the machine, and the commit of this code if git knows it.

    On a CPU the number of threads belongs to it: sums are split among them, and rounded accordingly.
    """
    found: dict[str, Any] = {package: _version(package) for package in PACKAGES}
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "machine": torch.cuda.get_device_name(device)}
    else:
        found |= {"threads": torch.get_num_threads(), "machine": f"{platform.system()} {platform.machine()}"}
    return {"python": platform.python_version(), **found, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, with "+changes" where tracked files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        place, status = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "--show-toplevel", "HEAD"], ["status", "--porcelain", "-uno", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    top, head = place.splitlines()
    if Path(top).resolve() != here.parent:  # installed into an environment that lies in someone's own repository
        return None
    return head + ("+changes" if status.strip() else "")
