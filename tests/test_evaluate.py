"""The compressor to beat is measured as the command-line tool would measure it."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from llmcore.evaluate import xz_bits_per_byte


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz program here")
def test_it_agrees_with_the_xz_program(sanguo: Path) -> None:
    text = (sanguo / "037.txt").read_text(encoding="utf-8")
    size = len(subprocess.run(["xz", "-9e", "--check=crc64"], input=text.encode(), capture_output=True).stdout)
    assert xz_bits_per_byte("", text) == pytest.approx(8 * size / len(text.encode()), rel=1e-3)


def test_what_was_read_before_helps() -> None:
    generator = random.Random(0)
    noise = "".join(generator.choices("abcdefgh", k=4000))  # three bits a byte, and nothing less will do
    assert 3.0 <= xz_bits_per_byte("", noise) < 4.0
    assert xz_bits_per_byte(noise, noise) < 0.1
