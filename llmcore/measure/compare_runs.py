"""Compare runs: their validations, what each run cost, and a table of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcore.checkpoint import INIT_FROM
from llmcore.config import PRESETS, ModelConfig
from llmcore.files import display_path, read_json, resolve
from llmcore.runs import read_metrics

LARGEST_CONFIG = 10_000_000  # bytes of a config.json; this package writes no larger ones
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
        "init_from": INIT_FROM,
        "device": {"type": "string"},
        "precision": {"type": "string"},
        "environment": {"type": "object"},
        "history": {
            "type": "array",
            "items": {"type": "object", "required": ["step"], "properties": {"step": {"type": "integer"}}},
        },
    },
}
# what `memorised.Memory` adds to some events; "_floor" is the same of held-out text
_MEASURED = ("recited", "recited_floor", "distinct", "distinct_floor", "recall", "recall_floor", "recall_error")
HABITS = {"recited": "recited (held-out text)", "distinct": "distinct pairs (held-out text)"}
COLUMNS = (
    "run", "preset", "parameters", "steps", "tokens", "validation (nats per token)", "best", "bits per byte",
    *HABITS.values(), "time", "device", "differs in",
)  # fmt: skip


def find_runs(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The run folders in a folder, at any depth, sorted by name: folders with metrics and a configuration."""
    needed = {"metrics.jsonl", "config.json"}
    return sorted(Path(folder) for folder, inner, files in os.walk(resolve(output_dir)) if needed <= {*inner, *files})


def read_run(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's `config.json`: model, train, data, precision, device, environment and history.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the field, if it does not have the form that this version writes.
    """
    file = resolve(run_dir) / "config.json"
    if not file.is_file() or file.stat().st_size > LARGEST_CONFIG:  # reading a pipe would wait for ever
        raise ValueError(f"{display_path(file)} cannot be used: it is no file of at most {LARGEST_CONFIG // 10**6} MB")
    config = read_json(file, CONFIG_SCHEMA)
    ModelConfig.from_dict(config["model"])  # raises if the values do not fit together
    return config


def read_events(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """A run's events. Those without the numbers that tables and figures need are left out.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is missing, or is not empty and holds no event.
    """
    file = resolve(run_dir) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{display_path(file)} cannot be used: it is no file")
    events = [event for event in read_metrics(run_dir) if _usable(event)]
    if not events and file.stat().st_size:
        raise ValueError(f"{display_path(file)} cannot be used: it holds no whole event of a run")
    return events


def _usable(event: dict[str, Any]) -> bool:
    """Whether an event's counts are numbers in a sensible range. What is measured may also be infinite or NaN."""

    def in_range(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < 1e18

    counts = [event.get(name) for name in ("step", "tokens", "seconds")]
    measured = [event[name] for name in ("val_loss", "val_bits_per_byte", *_MEASURED) if name in event]
    return all(map(in_range, counts)) and all(type(value) is float or in_range(value) for value in measured)


def validations(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """A run's validations, and what the run had cost by then.

    Returns:
        For each: val_loss (nats per token) and, if the data set knows its bytes, val_bits_per_byte; steps, tokens,
        seconds (spent in steps, without validation and samples) and flops (forward and backward).

    Raises:
        OSError, ValueError: if the run cannot be read, with the reason.
    """
    return validation_points(read_run(run_dir), read_events(run_dir))


def validation_points(config: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """`validations` of a run that is read already, see `read_run` and `read_events`."""
    model = ModelConfig.from_dict(config["model"])
    points, seconds = [], 0.0
    for event in events:
        seconds += event["seconds"]
        if "val_loss" in event:
            point: dict[str, float] = {k: event[k] for k in ("val_loss", "val_bits_per_byte") if k in event}
            costs = {"seconds": seconds, "flops": event["tokens"] * model.flops_per_token()}
            points.append({**point, "steps": event["step"], "tokens": event["tokens"], **costs})
    return points


def summarize(run_dirs: Sequence[str | os.PathLike[str]]) -> list[dict[str, str]]:
    """Runs as rows of a table, values as text: what each run is, what it cost and how good it became.

    "differs in" has the training settings that are not the same in all runs. The row of a run that cannot be read has
    the reason in place of the preset: the files in a folder may be broken, of a newer version, or not of a run.
    """
    folders = [resolve(folder) for folder in run_dirs]
    records = [_read_or_reason(folder) for folder in folders]  # each run's configuration and events
    settings = [record[0]["train"] for record in records if not isinstance(record, str)]
    names = list(settings[0]) if settings else []
    varied = [name for name in names if len({str(train.get(name)) for train in settings}) > 1]

    rows = []
    for folder, record in zip(folders, records, strict=True):
        if isinstance(record, str):
            rows.append({"run": folder.name, "preset": f"unreadable: {record}", **dict.fromkeys(COLUMNS[2:], "–")})
        else:
            rows.append({"run": folder.name, **run_row(*record, varied)})
    return rows


def run_row(config: dict[str, Any], events: list[dict[str, Any]], varied: Sequence[str] = ()) -> dict[str, str]:
    """A run's row of the table without its name, from what `read_run` and `read_events` give."""
    points = validation_points(config, events)
    model, train, origin = ModelConfig.from_dict(config["model"]), config["train"], config.get("init_from")
    last = points[-1] if points else {}
    best = min(points, key=lambda point: (math.isnan(point["val_loss"]), point["val_loss"]), default={})
    step = events[-1]["step"] if events else 0
    return {
        "preset": f"from {Path(origin['source']).name}" if origin else preset_of(model),
        "parameters": f"{model.n_params() / 1e6:,.1f} M",
        "steps": f"{step:,} of {train['max_steps']:,}",
        "tokens": f"{events[-1]['tokens'] if events else 0:,}",
        "validation (nats per token)": _with_step(last, "val_loss", step),
        "best": _with_step(best, "val_loss", step),
        "bits per byte": _with_step(last, "val_bits_per_byte", step),
        **{column: _beside_floor(events, name) for name, column in HABITS.items()},
        "time": f"{sum(event['seconds'] for event in events) / 60:,.1f} min",
        "device": f"{config['device']}, {config['precision']}",
        "differs in": ", ".join(f"{name}={train.get(name)}" for name in varied) or "–",
    }


def _with_step(point: Mapping[str, float], name: str, last_step: int) -> str:
    """A value of a validation as text, with its step if that is not the run's last; "–" without the value."""
    if name not in point:
        return "–"
    return f"{point[name]:.3f}" + (f" at step {point['steps']:,}" if point["steps"] != last_step else "")


def _beside_floor(events: Sequence[Mapping[str, Any]], name: str) -> str:
    """The newest share of this name and, in brackets, that of held-out text; "–" if none was measured."""
    event = next((event for event in reversed(events) if name in event and f"{name}_floor" in event), None)
    return "–" if event is None else f"{event[name]:.1%} ({event[f'{name}_floor']:.1%})"


def _read_or_reason(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | str:
    """A run's configuration and events; or the reason why it cannot be read."""
    try:
        return read_run(folder), read_events(folder)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def preset_of(model: ModelConfig) -> str:
    """The name of the preset with a model's shape, whatever the vocabulary and context; "–" if there is none."""
    shape = ("dim", "n_layers", "n_heads", "hidden_dim")
    for name, (preset, _) in PRESETS.items():
        if all(getattr(preset, field) == getattr(model, field) for field in shape):
            return name
    return "–"
