"""The GPU benchmark's paths, on whatever device there is, at a tiny size."""

from __future__ import annotations

import re

import pytest

from tests.benchmarks import gpu


@pytest.mark.slow
def test_the_gpu_benchmark_fills_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["toy"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| toy")]
    assert len(rows) == len(gpu.LADDERS["toy"]) + 2  # and transformers, and decoding
    for row in rows:
        assert all(float(figure.replace(",", "")) > 0 for figure in re.findall(r"\| ([\d,.]+)(?=[ %])", row))
    assert all(re.search(r"\| [\d,]+ \| \d+\.\d% \|", row) for row in rows[:-1])
