"""A run's folder: its name, its lock, its metrics, what it was made with, and how it compares with others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from llmcore.files import display_path, resolve

try:
    import fcntl
except ImportError:  # Windows: runs there are not kept apart
    fcntl = None  # type: ignore[assignment]

MEASURED = ("tokens", "loss", "learning_rate", "grad_norm", "seconds", "tokens_per_second")  # in every event
OPTIONAL: dict[str, tuple[type, ...]] = {"sample": (str,), "sample_prompt": (str,)}
OPTIONAL |= dict.fromkeys(("val_loss", "val_perplexity", "val_bits_per_byte", "exact_match", "skipped"), (int, float))
PACKAGES = ("llmcore", "torch", "numpy", "sentencepiece", "safetensors")


class TrainingError(RuntimeError):
    """Training cannot start or go on. The message says why and what to change."""


def free_run_dir(output_dir: str | os.PathLike[str], name: str) -> Path:
    """A folder for a new run: `<output_dir>/<name>`, or `<name>-2`, … where a run is there already.

    Raises:
        TrainingError: if it could not be made.
    """
    parent = resolve(output_dir)
    check_writable(parent)
    number = 1
    while (path := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def check_writable(output_dir: Path) -> None:
    """See whether a folder could be made, or written to where it exists. Nothing is made or written.

    Raises:
        TrainingError: if not.
    """
    try:
        there = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
    except OSError as error:  # a name that is too long, say
        raise TrainingError(
            f"output_dir={display_path(output_dir)!r} cannot be written: {error.strerror}; choose another"
        ) from None
    if not writable:
        raise TrainingError(f"output_dir={display_path(output_dir)!r} cannot be written; choose another")


@contextlib.contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other runs out. The system drops the lock with the process.

    Raises:
        TrainingError: naming the process at work there, or if the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"output_dir={display_path(run_dir)!r} cannot be written: {error.strerror}; choose another"
        ) from None
    with file:
        _lock(file, run_dir)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def nobody_at_work(run_dir: Path) -> None:
    """See whether another run is at work in a folder. Nothing is written.

    Raises:
        TrainingError: naming the process at work there.
    """
    with contextlib.suppress(OSError), open(run_dir / ".lock", "r+", encoding="utf-8") as file:
        _lock(file, run_dir)


def _lock(file: IO[str], run_dir: Path) -> None:
    """Lock a run's lock file until it is closed."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read()
        raise TrainingError(
            f"output_dir={display_path(run_dir)!r} is in use by a run of process {owner}"
            f"{' (this one)' if owner == str(os.getpid()) else ''}; let it end or choose another"
        ) from None


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in a run's `metrics.jsonl`, in its order; none if there is no such file.

    What is no event is left out with a warning: a line cut short by a crash, or one that another program wrote.
    """
    lines = metric_lines(run_dir)
    events = [event for _, event in lines if event is not None]
    if len(events) < len(lines):
        where = display_path(resolve(run_dir) / "metrics.jsonl")
        warnings.warn(f"{where}: left out {len(lines) - len(events)} lines that are no whole events", stacklevel=2)
    return events


def metric_lines(run_dir: str | os.PathLike[str]) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a run's `metrics.jsonl` without their ends, each with its event; None where it holds none.

    Lines end at a newline byte and nowhere else: JSON strings may hold what Unicode calls a line's end. An event that
    was written behind a torn line, or behind others, counts as a line.
    """
    path, found = resolve(run_dir) / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        # where events begin: a quote inside a string has a backslash
        parts = re.split(rb'(?=\{"step")', line) if _event(line) is None else [line]
        found += [(part, _event(part)) for part in parts if part.strip()]
    return found


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line of metrics; None if it is no JSON, or lacks what tables and plots need."""
    try:
        event = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or type(event.get("step")) is not int:
        return None
    if not all(type(event.get(name)) in (int, float) for name in MEASURED):
        return None
    for name, kinds in OPTIONAL.items():  # a callback may have put in something else
        if name in event and type(event[name]) not in kinds:
            del event[name]
    return event


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
    top, head = place.rstrip("\n").rsplit("\n", 1)
    if Path(top).resolve() != here.parent:  # installed into an environment that lies in someone's own repository
        return None
    return head + ("+changes" if status.strip() else "")
