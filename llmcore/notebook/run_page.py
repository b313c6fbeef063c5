"""The experiment log: a page for each run, in its folder, and a list of all. Markdown, read from the run's files."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from urllib.parse import quote

from llmcore.files import resolve, write_atomic
from llmcore.measure.compare_runs import find_runs, read_events, read_run, summarize, validations
from llmcore.notebook.safe_html import ending, visible

SAMPLES = 3  # the newest samples on a page
COLUMNS = ("preset", "parameters", "steps", "tokens", "validation (nats/token)", "bits per byte", "time", "device")


def write_summary(run_dir: str | os.PathLike[str]) -> Path:
    """Write a run's page, `summary.md`, into its folder: results, curves, validations, samples and configuration.

    Raises:
        OSError: if it cannot be written, or there is no such run.
        ValueError: if the run cannot be read, with the reason.
    """
    folder = resolve(run_dir)
    config, events = read_run(folder), read_events(folder)
    row = summarize([folder])[0]
    facts = {name: row[name] for name in ("preset", "parameters", "steps", "tokens")}
    skipped = events[-1].get("skipped", 0) if events else 0
    at_end = bool(events) and events[-1]["step"] >= config["train"]["max_steps"]
    facts |= {"state": "finished" if at_end else "not at its end"}
    facts |= {name: row[name] for name in ("validation (nats/token)", "best", "bits per byte", "time", "device")}
    facts |= {"steps skipped": str(skipped), "data set": _fingerprint((config.get("data") or {}).get("train"))}
    facts |= {"tokenizer": _fingerprint(config.get("tokenizer"))}
    facts |= {name: str(value) for name, value in config.get("environment", {}).items() if value is not None}
    parts = [f"# {_plain(folder.name)}", _table([{"what": name, "value": value} for name, value in facts.items()])]
    if (folder / "curves.png").exists():
        parts.append("![Training curves](curves.png)")
    if measured := validations(folder):
        shown = measured[:: max(1, len(measured) // 10)]
        shown += [] if shown[-1] is measured[-1] else [measured[-1]]
        rows = [
            {
                "step": f"{point['steps']:,}",
                "tokens": f"{point['tokens']:,}",
                "nats per token": f"{point['val_loss']:.4f}",
                "bits per byte": f"{point['val_bits_per_byte']:.4f}" if "val_bits_per_byte" in point else "–",
            }
            for point in shown
        ]
        parts += ["## Validation", _table(rows)]
    samples = [event for event in events if "sample" in event][-SAMPLES:]
    if samples:
        parts.append("## Samples")
    for event in samples:
        parts += [
            f"After step {event['step']:,}:",
            _fenced(ending(str(event.get("sample_prompt", ""))) + str(event["sample"])),
        ]
    if config.get("history"):
        steps = ", ".join(f"{entry['step']:,}" for entry in config["history"])
        parts.append(f"Stopped, and resumed at step {steps}.")
    settings = json.dumps({"model": config["model"], "train": config["train"]}, indent=1, ensure_ascii=False)
    parts += ["## Configuration", _fenced(settings, "json")]
    write_atomic(folder / "summary.md", "\n\n".join(parts) + "\n")
    return folder / "summary.md"


def write_index(output_dir: str | os.PathLike[str]) -> Path:
    """Write `index.md`, a table of all runs with links to their pages.

    It lists the project's whole `outputs` if the folder lies in there, else the folder. A run that cannot be read is
    listed with the reason.

    Raises:
        OSError: if it cannot be written.
    """
    folder, outputs = resolve(output_dir), resolve("outputs")
    folder = outputs if folder.is_relative_to(outputs) else folder
    found = find_runs(folder)
    rows = []
    for run, words in zip(found, summarize(found), strict=True):
        path = run.relative_to(folder).as_posix()
        page = f"{path}/summary.md" if (run / "summary.md").exists() else path
        rows.append(
            {"run": f"[{_plain(path)}]({quote(os.fsencode(page))})", **{name: _plain(words[name]) for name in COLUMNS}}
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "index.md", "# Runs\n\n" + (_rows(rows) if rows else "None yet.") + "\n")
    return folder / "index.md"


def _plain(text: str) -> str:
    """Text from outside on one line of Markdown: no markup, tag or column begins in it."""
    line = " ".join(visible(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", html.escape(line, quote=False))


def _fenced(text: str, language: str = "") -> str:
    """Text as it is, in a fence longer than any row of backticks in it."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{visible(text)}\n{ticks}"


def _table(rows: list[dict[str, str]]) -> str:
    return _rows([{name: _plain(value) for name, value in row.items()} for row in rows])


def _rows(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fingerprint(value: object) -> str:
    return str(value)[:16] if value else "not known"
