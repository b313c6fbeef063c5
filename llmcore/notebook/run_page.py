"""The experiment log: a page for each run, in its folder, and a list of all runs. Both are Markdown files."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmcore.files import resolve, write_atomic
from llmcore.measure.compare_runs import HABITS, find_runs, read_events, read_run, run_row, summarize, validation_points
from llmcore.notebook.safe_html import ending, visible

SAMPLES = 3  # the newest samples on a page
COLUMNS = ("preset", "parameters", "steps", "tokens", "validation (nats per token)", "bits per byte", "time", "device")


def write_summary(run_dir: str | os.PathLike[str]) -> Path:
    """Write a run's page, `summary.md`, into its folder: results, curves, validations, samples and configuration.

    Raises:
        OSError: if it cannot be written, or there is no such run.
        ValueError: if the run cannot be read, with the reason.
    """
    folder = resolve(run_dir)
    config, events = read_run(folder), read_events(folder)
    parts = [f"# {markdown_text(folder.name)}", _overview(config, events)]

    if (folder / "curves.png").exists():
        parts.append("![Training curves](curves.png)")
    if points := validation_points(config, events):
        parts += ["## Validation", _validation_table(points)]

    samples = [event for event in events if "sample" in event][-SAMPLES:]
    if samples:
        parts.append("## Samples")
    for event in samples:
        prompt = ending(str(event.get("sample_prompt", "")))
        parts += [f"After step {event['step']:,}:", _fenced(prompt + str(event["sample"]))]

    if resumes := [entry for entry in config.get("history", []) if "init_from" not in entry]:
        steps = ", ".join(f"{entry['step']:,}" for entry in resumes)
        parts.append(f"Stopped, and resumed at step {steps}.")
    settings = json.dumps({"model": config["model"], "train": config["train"]}, indent=1, ensure_ascii=False)
    parts += ["## Configuration", _fenced(settings, "json")]

    write_atomic(folder / "summary.md", "\n\n".join(parts) + "\n")
    return folder / "summary.md"


def _overview(config: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """The table at the top of a run's page: what the run is, how it stands, and what it was made with."""
    row = run_row(config, events)
    at_end = bool(events) and events[-1]["step"] >= config["train"]["max_steps"]
    values = {name: row[name] for name in ("preset", "parameters", "steps", "tokens")}
    if start := config.get("init_from"):
        values["started from"] = f"{start['source']} (sha256 {_fingerprint(start.get('sha256'))})"
    values["state"] = "finished" if at_end else "not at its end"
    results = ("validation (nats per token)", "best", "bits per byte", *HABITS.values(), "time", "device")
    values |= {name: row[name] for name in results}
    values["steps skipped"] = str(events[-1].get("skipped", 0) if events else 0)
    values["data set"] = _fingerprint((config.get("data") or {}).get("train"))
    values["tokenizer"] = _fingerprint(config.get("tokenizer"))
    values |= {name: str(value) for name, value in config.get("environment", {}).items() if value is not None}
    return _text_table([{"what": name, "value": value} for name, value in values.items()])


def _validation_table(points: list[dict[str, float]]) -> str:
    """About ten of a run's validations, the last one among them."""
    selected = points[:: max(1, len(points) // 10)]
    if selected[-1] is not points[-1]:
        selected.append(points[-1])
    return _text_table(
        [
            {
                "step": f"{point['steps']:,}",
                "tokens": f"{point['tokens']:,}",
                "nats per token": f"{point['val_loss']:.4f}",
                "bits per byte": f"{point['val_bits_per_byte']:.4f}" if "val_bits_per_byte" in point else "–",
            }
            for point in selected
        ]
    )


def write_index(output_dir: str | os.PathLike[str]) -> Path:
    """Write `index.md`, a table of all runs with links to their pages.

    If the folder lies in the project's `outputs`, the table is of all runs in `outputs`. A run that cannot be read is
    listed with the reason.

    Raises:
        OSError: if it cannot be written.
    """
    folder, outputs = resolve(output_dir), resolve("outputs")
    folder = outputs if folder.is_relative_to(outputs) else folder
    runs, rows = find_runs(folder), []
    for run, row in zip(runs, summarize(runs), strict=True):
        path = run.relative_to(folder).as_posix()
        page = f"{path}/summary.md" if (run / "summary.md").exists() else path
        link = f"[{markdown_text(path)}]({quote(os.fsencode(page))})"
        rows.append({"run": link, **{name: markdown_text(row[name]) for name in COLUMNS}})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "index.md", "# Runs\n\n" + (_table(rows) if rows else "None yet.") + "\n")
    return folder / "index.md"


def markdown_text(text: str) -> str:
    """Text from outside on one line of Markdown: nothing in it acts as markup, as a tag or as a column."""
    line = " ".join(visible(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", html.escape(line, quote=False))


def _fenced(text: str, language: str = "") -> str:
    """Text as a code block. Its fence is longer than any row of backticks in the text."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{visible(text)}\n{ticks}"


def _text_table(rows: list[dict[str, str]]) -> str:
    return _table([{name: markdown_text(value) for name, value in row.items()} for row in rows])


def _table(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows with the same keys; the values are Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fingerprint(value: object) -> str:
    return str(value)[:16] if value else "not known"
