"""A run's folder: its name, its lock, its metrics, the environment it was made in, and signals that end it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from llmcore.files import display_path, fsync, lock, resolve, to_json, write_atomic

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
    """Check that a folder can be made, or written to if it exists. Nothing is made or written.

    Raises:
        TrainingError: if it cannot.
    """
    try:
        existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK)
    except OSError as error:  # a name that is too long, say
        raise _not_writable(output_dir, error) from None
    if not writable:
        raise _not_writable(output_dir)


def _not_writable(output_dir: Path, error: OSError | None = None) -> TrainingError:
    reason = f": {error.strerror}" if error is not None else ""
    return TrainingError(f"output_dir={display_path(output_dir)!r} cannot be written{reason}; choose another")


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if need be, so that no other run trains in it.

    The system drops the lock when the process ends, however it ends.

    Raises:
        TrainingError: naming the process at work there, or if the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise _not_writable(run_dir, error) from None
    with file:
        _lock(file, run_dir)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def check_not_in_use(run_dir: Path) -> None:
    """Check that no other run is at work in a folder. Nothing is written.

    Raises:
        TrainingError: naming the process at work there.
    """
    with contextlib.suppress(OSError), open(run_dir / ".lock", "r+", encoding="utf-8") as file:
        _lock(file, run_dir)


def holds_run(folder: Path) -> bool:
    """Whether some run has left metrics or checkpoints in a folder."""
    return (folder / "metrics.jsonl").exists() or any(folder.glob("step=*"))


def backup_folder(run_dir: Path, backup_dir: str | os.PathLike[str]) -> Path:
    """Where the copy of a run goes: `<backup_dir>/<the run's name>`.

    Raises:
        TrainingError: if `backup_dir` is not there, or holds the run itself.
    """
    parent = resolve(backup_dir)
    if not parent.is_dir():
        raise TrainingError(
            f"backup_dir={display_path(parent)!r} is not there; mount the drive, or make the folder, and start again"
        )
    if (parent / run_dir.name).resolve() == run_dir.resolve():
        raise TrainingError(f"backup_dir={display_path(parent)!r} is the run's own output_dir; choose another")
    return parent / run_dir.name


def check_same_first_event(run_dir: Path, copy: Path) -> None:
    """Raise TrainingError if the folder for a run's copy holds another run: its first event took other seconds."""
    first = [next((line for line, _ in metric_lines(folder)), b"") for folder in (run_dir, copy)]
    if holds_run(copy) and first[0] != first[1]:
        raise TrainingError(
            f"backup_dir: {display_path(copy)} holds another run than {display_path(run_dir)}; choose another project "
            "or backup_dir, or move one of them away. (If the run's folder is lost: checkpoint_dir='auto')"
        )


def _lock(file: IO[str], run_dir: Path) -> None:
    """Lock a run's lock file until it is closed."""
    try:
        lock(file, wait=False)
    except BlockingIOError:
        file.seek(0)
        owner = file.read()
        raise TrainingError(
            f"output_dir={display_path(run_dir)!r} is in use by a run of process {owner}"
            f"{' (this one)' if owner == str(os.getpid()) else ''}; let it end or choose another"
        ) from None


class RunFolder:
    """A run's folder as its trainer writes it: `metrics.jsonl`, one line an event, and `config.json`.

    Building one only checks. The folder changes, and becomes this run's, when the first events are written.

    Args:
        path: of the folder, which need not exist.

    Raises:
        TrainingError: if it cannot be written, or another run is at work in it.
    """

    def __init__(self, path: Path) -> None:
        check_writable(path)
        check_not_in_use(path)
        self.path, self.metrics = path, path / "metrics.jsonl"
        self._pending: list[dict[str, Any]] = []  # events that are not in metrics.jsonl yet
        self._taken_over = False
        self._hash = hashlib.sha256(_content(self.metrics))  # of metrics.jsonl as this trainer knows it

    def check_free(self) -> None:
        """Raise TrainingError for a new run where some run has left metrics or checkpoints."""
        if holds_run(self.path):
            raise TrainingError(
                f"{display_path(self.path)} holds a run already; resume it (resume='latest') or choose another "
                "output_dir"
            )

    def check_own(self, checkpoint: Path) -> None:
        """Raise TrainingError for another run's checkpoint where a run has left its files."""
        own = checkpoint.resolve().parent == self.path.resolve() and checkpoint.name.startswith("step=")
        if not own and holds_run(self.path):
            raise TrainingError(
                f"{display_path(self.path)} holds a run already, and {display_path(checkpoint)} is of another one; "
                "choose another output_dir, or copy that checkpoint into a folder of its own and go on there"
            )

    def copy_in(self, backup_dir: str | os.PathLike[str] | None) -> Path | None:
        """Where the copy of this run goes, see `backup_folder`; None if there is to be none.

        Raises:
            TrainingError: also if there is a copy of another run.
        """
        if backup_dir is None:
            return None
        copy = backup_folder(self.path, backup_dir)
        check_same_first_event(self.path, copy)
        return copy

    @contextlib.contextmanager
    def held(self, step: int) -> Iterator[None]:
        """Hold the lock, see `run_lock`, to train from a step on.

        Raises:
            TrainingError: also if another trainer has trained here since this one was built or stopped.
        """
        with run_lock(self.path):
            if hashlib.sha256(_content(self.metrics)).digest() != self._hash.digest():
                raise TrainingError(
                    f"the run in {display_path(self.path)} has gone on since this Trainer, at step {step}, was "
                    "built or stopped. Build the Trainer again with resume='latest', or choose another output_dir"
                )
            yield

    def add(self, event: dict[str, Any]) -> None:
        """Keep an event for the next `write`. Until then it may still be added to."""
        self._pending.append(event)

    def write(self, start: int, description: dict[str, Any], to_disk: bool = False) -> None:
        """Append the events that `metrics.jsonl` does not have yet: all of them or, if that fails, none.

        Args:
            start: the step that this trainer started from.
            description: for `config.json`. What is set aside is noted in its `history`.
            to_disk: wait until the events have reached the disk.

        Raises:
            TrainingError: if the disk is full. The events are kept, and written by the next call.
        """
        lines = "".join(to_json(event) + "\n" for event in self._pending).encode()
        try:
            if not self._taken_over:
                self._take_over(start, description)
            self._append(lines)
            if to_disk:
                fsync(self.metrics)
        except OSError as error:
            raise TrainingError(
                f"{display_path(self.metrics)} cannot be written: {error}. Make room on the disk and train on; "
                "nothing is lost yet"
            ) from error

    def _append(self, lines: bytes) -> None:
        extended = self._hash.copy()
        extended.update(lines)
        with open(self.metrics, "ab", buffering=0) as file:
            end = file.tell()
            try:
                while file.tell() < end + len(lines):  # the system may write only a part
                    file.write(lines[file.tell() - end :])
                self._hash, self._pending = extended, []
            except BaseException:
                file.truncate(end)
                raise

    def _take_over(self, start: int, description: dict[str, Any]) -> None:
        """Let the folder become this run's. What it holds of later steps is set aside, and none of it is deleted.

        If this is broken off anywhere, the checkpoint to resume from is still the latest, and all its events are there.
        """
        kept: list[bytes] = []
        cut: list[bytes] = []
        for line, event in metric_lines(self.path):
            (kept if event and event["step"] <= start else cut).append(line)
        later = [path for path in sorted(self.path.glob("step=*")) if _step_of(path) > start]

        if cut or later:
            names = (f"cut.{number}" for number in itertools.count(1))
            name = next(name for name in names if not any(self.path.glob(f"{name}.*")))
            for path in later:
                os.rename(path, self.path / f"{name}.{path.name}")
            if cut:
                write_atomic(self.path / f"{name}.metrics.jsonl", b"\n".join(cut) + b"\n")
            for entry in description["history"][-1:]:
                entry["set_aside"] = name
            warnings.warn(
                f"{display_path(self.path)}: what does not belong to the first {start} steps is kept as {name}.* "
                f"(lines of metrics.jsonl: {len(cut)}, checkpoints: {len(later)}); delete it if you do not need it",
                stacklevel=2,
            )

        content = b"".join(line + b"\n" for line in kept)
        if content != _content(self.metrics):
            write_atomic(self.metrics, content)
        self._hash = hashlib.sha256(content)
        write_atomic(self.path / "config.json", to_json(description, indent=1))
        self._taken_over = True


def _content(file: Path) -> bytes:
    """The content of a run's `metrics.jsonl`; nothing if there is no such file.

    Raises:
        TrainingError: if it is a folder, or a pipe or device, which might never end.
    """
    if file.exists() and not file.is_file():
        raise TrainingError(f"{display_path(file)} is no file; move it away, or choose another output_dir")
    return file.read_bytes() if file.exists() else b""


def _step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for another name."""
    match = re.match(r"step=(\d+)", path.name)
    return int(match[1]) if match else -1


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in a run's `metrics.jsonl`, in its order; none if there is no such file.

    What is no event is left out with a warning: a line that a crash cut short, or that another program wrote.
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
    lines: list[tuple[bytes, dict[str, Any] | None]] = []
    for line in _content(resolve(run_dir) / "metrics.jsonl").split(b"\n"):
        # where events begin: a quote inside a string has a backslash
        parts = re.split(rb'(?=\{"step")', line) if _event(line) is None else [line]
        lines += [(part, _event(part)) for part in parts if part.strip()]
    return lines


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


@contextlib.contextmanager
def signals_call(request_stop: Callable[[], None]) -> Iterator[None]:
    """Let a first SIGINT or SIGTERM call a function. A second one raises KeyboardInterrupt at once.

    Only the main thread may set handlers; in another one signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    called = False
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        nonlocal called
        if called:
            signal.signal(number, previous[number])
            raise KeyboardInterrupt
        called = True
        request_stop()

    try:
        for number in previous:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions of Python and the packages that compute, the machine, and the commit of this code if git knows it.

    On a CPU the number of threads is part of it: sums are split among them, and rounded accordingly.
    """
    versions: dict[str, Any] = {package: _version(package) for package in PACKAGES}
    if device.type == "cuda":
        machine: dict[str, Any] = {"cuda": torch.version.cuda, "machine": torch.cuda.get_device_name(device)}
    else:
        machine = {"threads": torch.get_num_threads(), "machine": f"{platform.system()} {platform.machine()}"}
    return {"python": platform.python_version(), **versions, **machine, "commit": _commit()}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # the code that runs is the one that was imported, whatever is checked out later
def _commit() -> str | None:
    """The checked-out commit, with "+changes" where tracked files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        where, status = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "--show-toplevel", "HEAD"], ["status", "--porcelain", "-uno", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    top, head = where.rstrip("\n").rsplit("\n", 1)
    if Path(top).resolve() != here.parent:  # installed into an environment inside some other repository
        return None
    return head + ("+changes" if status.strip() else "")
