"""A run's page and the list of runs say what the run's files say, and no text in them becomes markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmcore import files
from llmcore.notebook.dashboard import TrainingDashboard
from llmcore.notebook.run_page import write_index, write_summary
from llmcore.runs import read_metrics

from .helpers import quick, trainer

NASTY = "# no heading\n````\n<script>alert(1)</script> | a | b |\n```\n\x1b[31m"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = quick(max_steps=6, eval_interval=2, sample_interval=3, sample_prompt="NOW ")
    trainer(tmp_path / "runs" / "a", config, sampler=lambda prompt: NASTY).fit()
    return tmp_path / "runs" / "a"


def test_a_page_has_what_the_runs_files_have(run: Path) -> None:
    text = write_summary(run).read_text(encoding="utf-8")
    events = read_metrics(run)
    for event in (event for event in events if "val_loss" in event):
        row = f"| {event['step']} | {event['tokens']:,} | {event['val_loss']:.4f} | {event['val_bits_per_byte']:.4f} |"
        assert row in text
    assert "| state | finished |" in text and "| steps | 6 of 6 |" in text and '"max_steps": 6' in text
    assert "After step 3:" in text and "After step 6:" in text
    assert "cpu, fp32" in text and "![" not in text  # no picture was made


def test_a_sample_cannot_end_its_fence(run: Path) -> None:
    lines = write_summary(run).read_text(encoding="utf-8").split("\n")
    start = lines.index("After step 3:") + 2
    fence = lines[start]
    assert set(fence) == {"`"} and len(fence) == 5
    end = lines.index(fence, start + 1)
    assert "\n".join(lines[start + 1 : end]) == "NOW " + NASTY.replace("\x1b", "⟨1B⟩")
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", "\n".join(lines))
    assert "<script>" not in outside and "no heading" not in outside


def test_the_list_links_to_the_pages_of_all_runs_whatever_their_names(run: Path) -> None:
    odd = run.parent / "deep" / "a|b [x](y) <i>"
    trainer(odd, quick(max_steps=2)).fit()
    write_summary(run)
    write_summary(odd)
    index = write_index(run.parent)
    text = index.read_text(encoding="utf-8")
    assert index == run.parent / "index.md"
    links = re.findall(r"(?m)^\| \[((?:\\.|[^\]\\])*)\]\(([^)]+)\) \|", text)
    assert len(links) == 2
    from urllib.parse import unquote

    assert {(index.parent / unquote(link)).resolve() for _, link in links} == {
        (folder / "summary.md").resolve() for folder in (run, odd)
    }
    assert "<i>" not in text and r"a\|b \[x\]\(y\) &lt;i&gt;" in text


def test_runs_inside_outputs_are_all_listed_there(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROJECT_ROOT", tmp_path)
    (tmp_path / "runs").rename(tmp_path / "outputs")
    trainer(tmp_path / "outputs" / "sweep" / "b", quick(max_steps=2)).fit()
    index = write_index("outputs/sweep")
    assert index == tmp_path / "outputs" / "index.md"
    assert "[a](a)" in (text := index.read_text(encoding="utf-8")) and "[sweep/b](sweep/b)" in text
    assert "None yet" in write_index(tmp_path / "empty").read_text(encoding="utf-8")


@pytest.mark.parametrize("stop_at", [None, 3])
def test_every_run_on_the_dashboard_leaves_a_page_with_its_curves(tmp_path: Path, stop_at: int | None) -> None:
    import asyncio

    training = trainer(tmp_path / "run", quick(max_steps=6))
    training.callbacks.append(lambda event: training.request_stop() if event["step"] == stop_at else None)
    asyncio.run(TrainingDashboard().run(training))
    text = (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")
    assert "![Training curves](curves.png)" in text and (tmp_path / "run" / "curves.png").exists()
    assert ("| state | finished |" in text) == (stop_at is None)
    if stop_at:
        again = trainer(tmp_path / "run", quick(max_steps=6), resume="latest")
        asyncio.run(TrainingDashboard().run(again))
        text = (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")
        assert "| state | finished |" in text and "resumed at step 3." in text
