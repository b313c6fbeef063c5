"""A run's folder: its name, its lock, its metrics, what it was made with, and how it compares with others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from llmcore.config import PRESETS, ModelConfig
from llmcore.files import read_json, resolve, shown

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


def new_run_dir(output_dir: str | os.PathLike[str], name: str) -> Path:
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
            f"output_dir={shown(output_dir)!r} cannot be written: {error.strerror}; choose another"
        ) from None
    if not writable:
        raise TrainingError(f"output_dir={shown(output_dir)!r} cannot be written; choose another")


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
            f"output_dir={shown(run_dir)!r} cannot be written: {error.strerror}; choose another"
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
            f"output_dir={shown(run_dir)!r} is in use by a run of process {owner}"
            f"{' (this one)' if owner == str(os.getpid()) else ''}; let it end or choose another"
        ) from None


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in a run's `metrics.jsonl`, in its order; none if there is no such file.

    What is no event is left out with a warning: a line cut short by a crash, or one that another program wrote.
    """
    lines = metric_lines(run_dir)
    events = [event for _, event in lines if event is not None]
    if len(events) < len(lines):
        where = shown(resolve(run_dir) / "metrics.jsonl")
        warnings.warn(f"{where}: left out {len(lines) - len(events)} lines that are no whole events", stacklevel=2)
    return events


def metric_lines(run_dir: str | os.PathLike[str]) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a run's `metrics.jsonl` without their ends, each with its event; None where it holds none.

    Lines end at a newline byte and nowhere else: JSON strings may hold what Unicode calls a line's end. An event that
    was written behind a torn line counts as a line.
    """
    path, found = resolve(run_dir) / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        at = line.rfind(b'{"step"') if _event(line) is None else 0  # a quote inside a string has a backslash
        found += [(part, _event(part)) for part in (line[: max(0, at)], line[max(0, at) :]) if part.strip()]
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


# Runs side by side

LARGEST_CONFIG = 10_000_000  # bytes of a config.json; what is larger was not written here
_COUNT = {"type": "integer", "minimum": 1, "maximum": 10**15}
CONFIG_SCHEMA = {
    "type": "object",
    "required": ["model", "train", "device", "precision"],
    "properties": {
        "model": {
            "type": "object",
            "properties": {
                **dict.fromkeys(("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len"), _COUNT),
                **{name: {"anyOf": [_COUNT, {"type": "null"}]} for name in ("n_kv_heads", "head_dim", "hidden_dim")},
            },
        },
        "train": {"type": "object", "required": ["max_steps"], "properties": {"max_steps": _COUNT}},
        "data": {"type": ["object", "null"]},
        "tokenizer": {"type": ["string", "null"]},
        "device": {"type": "string"},
        "precision": {"type": "string"},
        "environment": {"type": "object"},
        "history": {
            "type": "array",
            "items": {"type": "object", "required": ["step"], "properties": {"step": {"type": "integer"}}},
        },
    },
}
COLUMNS = (
    "run", "preset", "parameters", "steps", "tokens", "validation (nats/token)", "best", "bits per byte", "time",
    "device", "differs in",
)  # fmt: skip


def find_runs(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The run folders below a folder, at any depth, in order of their names: those with metrics and a configuration."""
    walk = os.walk(resolve(output_dir))
    return sorted(Path(folder) for folder, inner, files in walk if {"metrics.jsonl", "config.json"} <= {*inner, *files})


def read_run(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's `config.json`: model, train, data, precision, device, environment and history.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the field, if it is not what this version writes.
    """
    file = resolve(run_dir) / "config.json"
    if not file.is_file() or file.stat().st_size > LARGEST_CONFIG:  # a pipe would wait for ever
        raise ValueError(f"{shown(file)} cannot be used: it is no file of at most {LARGEST_CONFIG // 10**6} MB")
    config = read_json(file, CONFIG_SCHEMA)
    ModelConfig.from_dict(config["model"])
    return config


def read_events(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """A run's events, each with the numbers that tables and figures need; what lacks them is left out.

    Raises:
        OSError: if they cannot be read.
        ValueError: if there is something, and no event in it.
    """
    file = resolve(run_dir) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{shown(file)} cannot be used: it is no file")
    events = [event for event in read_metrics(run_dir) if isinstance(event, dict) and _usable(event)]
    if not events and file.stat().st_size:
        raise ValueError(f"{shown(file)} cannot be used: it holds no whole event of a run")
    return events


def _usable(event: dict[str, Any]) -> bool:
    needed: list[Any] = [event.get(name) for name in ("step", "tokens", "seconds")]
    measured = [event[name] for name in ("val_loss", "val_bits_per_byte") if name in event]  # may be infinite, or NaN
    return all(type(value) in (int, float) and abs(value) < 1e18 for value in needed) and all(
        type(value) is float or (type(value) is int and abs(value) < 1e18) for value in measured
    )


def validations(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """A run's validations, and what each had cost by then.

    Returns:
        For each: val_loss (nats per token) and, where the data knows, val_bits_per_byte; steps, tokens, seconds (spent
        in steps, without validation and samples) and flops (forward and backward).

    Raises:
        OSError, ValueError: if the run cannot be read, with the reason.
    """
    model = ModelConfig.from_dict(read_run(run_dir)["model"])
    found, seconds = [], 0.0
    for event in read_events(run_dir):
        seconds += event["seconds"]
        if "val_loss" in event:
            point: dict[str, float] = {k: event[k] for k in ("val_loss", "val_bits_per_byte") if k in event}
            costs = {"seconds": seconds, "flops": event["tokens"] * model.flops_per_token()}
            found.append({**point, "steps": event["step"], "tokens": event["tokens"], **costs})
    return found


def summarize(run_dirs: Sequence[str | os.PathLike[str]]) -> list[dict[str, str]]:
    """Runs as rows of a table, values as words: what each was, what it cost and how good it became.

    "differs in" names the training settings that are not the same in all of them. A run that cannot be read says so,
    and why, in the place of its preset: what lies in a folder may be broken, of a newer version, or no run at all.
    """
    read = [_readable(resolve(folder)) for folder in run_dirs]
    settings = [found[0]["train"] for found in read if not isinstance(found, str)]
    varied = [name for name in (settings[0] if settings else {}) if len({str(each.get(name)) for each in settings}) > 1]
    rows = []
    for folder, found in zip(map(resolve, run_dirs), read, strict=True):
        if isinstance(found, str):
            rows.append({"run": folder.name, "preset": f"unreadable: {found}", **dict.fromkeys(COLUMNS[2:], "–")})
            continue
        config, events, measured = found
        last = measured[-1] if measured else {}
        best = min(measured, key=lambda point: point["val_loss"], default={})
        reached = events[-1]["step"] if events else 0
        model, train = ModelConfig.from_dict(config["model"]), config["train"]
        seconds = sum(event["seconds"] for event in events)
        rows.append(
            {
                "run": folder.name,
                "preset": preset_of(model),
                "parameters": f"{model.n_params() / 1e6:,.1f} M",
                "steps": f"{reached:,} of {train['max_steps']:,}",
                "tokens": f"{events[-1]['tokens'] if events else 0:,}",
                "validation (nats/token)": _measured(last, "val_loss", reached),
                "best": _measured(best, "val_loss", reached),
                "bits per byte": _measured(last, "val_bits_per_byte", reached),
                "time": f"{seconds / 60:,.1f} min",
                "device": f"{config['device']}, {config['precision']}",
                "differs in": ", ".join(f"{name}={train.get(name)}" for name in varied) or "–",
            }
        )
    return rows


def _measured(point: Mapping[str, float], name: str, reached: int) -> str:
    """A validation's figure in words, with its step where the run has gone on since; "–" for none."""
    if name not in point:
        return "–"
    return f"{point[name]:.3f}" + (f" at step {point['steps']:,}" if point["steps"] != reached else "")


def _readable(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, float]]] | str:
    """A run's configuration, events and validations; or why it has none."""
    try:
        return read_run(folder), read_events(folder), validations(folder)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def preset_of(model: ModelConfig) -> str:
    """The preset whose shape a model has, whatever its vocabulary and context; "–" for a shape of one's own."""
    shape = ("dim", "n_layers", "n_heads", "hidden_dim")
    same = (
        name for name, (preset, _) in PRESETS.items() if all(getattr(preset, s) == getattr(model, s) for s in shape)
    )
    return next(same, "–")
