"""The GPU benchmark's paths, on whatever device there is, at a tiny size."""

from __future__ import annotations

import re

import pytest

from llmcore.config import TrainConfig
from tests.benchmarks import gpu


@pytest.mark.slow
def test_the_gpu_benchmark_fills_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["toy"], seconds=3600)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| toy")]
    assert len(rows) == len(gpu.LADDERS["toy"]) + 2  # and transformers, and decoding
    for row in rows:
        assert all(float(figure.replace(",", "")) > 0 for figure in re.findall(r"\| ([\d,.]+)(?=[ %])", row))
    decoding = [row for row in rows if not re.search(r"\| [\d,]+ \| \d+\.\d% \|", row)]
    assert decoding == [rows[2]] and len(re.findall(r"[\d,]+(?= \|)", decoding[0])) == 3


def test_the_gpu_benchmark_names_what_it_has_no_time_for(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["toy"], seconds=0)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| toy")]
    assert len(rows) == len(gpu.LADDERS["toy"]) + 2
    assert all(row.endswith("| no time left |") for row in rows)


def test_each_rung_of_the_gpu_benchmark_is_a_run() -> None:
    """Its settings are ones of a run, and its last rung, the best, is not the only one."""
    for name, ladder in gpu.LADDERS.items():
        assert len(ladder) > 1 and name in gpu.PEER_BATCH
        for batch_size, changes in ladder:
            TrainConfig(batch_size=batch_size, **{key: value for key, value in changes.items() if value is not True})
