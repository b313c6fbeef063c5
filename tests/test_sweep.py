"""The README's sweep on a Dask cluster of this machine, with a smaller grid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmcore.files import PROJECT_ROOT
from llmcore.runs import read_metrics
from llmcore.tokenizer import Tokenizer, train_tokenizer


def example() -> str:
    """The program in the README."""
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT_ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    [found] = [block for block in blocks if "dask.distributed" in block]
    return found


def test_the_sweep_is_short_and_needs_nothing_of_ours() -> None:
    assert len(example().splitlines()) <= 40
    assert "llmcore" not in example()


@pytest.mark.slow
def test_the_sweep_runs_every_point_of_its_grid_and_sorts_them(english: Path, tmp_path: Path) -> None:
    train_tokenizer(sorted(english.glob("*.txt")), tmp_path / "outputs" / "tokenizer", 400, character_coverage=1.0)
    assert Tokenizer(tmp_path / "outputs" / "tokenizer.model").vocab_size == 400
    (tmp_path / "notebooks").symlink_to(PROJECT_ROOT / "notebooks")
    program = re.sub(r"GRID = .*", 'GRID = {"learning_rate": [1e-5, 1e-3]}', example())
    fixed = {"preset": "scifi-mini", "max_steps": 8, "context_size": 32, "data_dir": str(english), "device": "cpu"}
    program = re.sub(r"FIXED = .*", lambda _: f"FIXED = {fixed}", program)
    (tmp_path / "sweep.py").write_text(program, encoding="utf-8")
    environment = {**os.environ, "LLM_WORKBOOK_ROOT": str(tmp_path), "LLM_WORKBOOK_WATCHED": "0"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "sweep.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2: " in done.stdout
    best, worst = done.stdout.strip().splitlines()[-2:]
    expected = []
    for rate in ("1e-05", "0.001"):
        events = read_metrics(tmp_path / "outputs" / "runs" / f"sweep-{rate}")
        assert len(events) == 8
        expected.append((events[-1]["val_loss"], f"{{'learning_rate': {rate}}}"))
    assert [best, worst] == [f"{loss:.4f} {point}" for loss, point in sorted(expected)]
