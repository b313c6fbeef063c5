"""Runs side by side: their validations, what each cost, and a table of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcore.config import PRESETS, ModelConfig
from llmcore.files import display_path, read_json, resolve
from llmcore.runs import read_metrics

try:
    import fcntl
except ImportError:  # Windows: runs there are not kept apart
    fcntl = None  # type: ignore[assignment]


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
        raise ValueError(f"{display_path(file)} cannot be used: it is no file of at most {LARGEST_CONFIG // 10**6} MB")
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
        raise ValueError(f"{display_path(file)} cannot be used: it is no file")
    events = [event for event in read_metrics(run_dir) if isinstance(event, dict) and _usable(event)]
    if not events and file.stat().st_size:
        raise ValueError(f"{display_path(file)} cannot be used: it holds no whole event of a run")
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
        best = min(measured, key=lambda point: (math.isnan(point["val_loss"]), point["val_loss"]), default={})
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
