"""What several test files share: the novel, a tokenizer for it, and a small folder of English texts."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest

from llmcore.corpus.sources import fetch
from llmcore.corpus.texts import find_texts
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.files import PROJECT_ROOT
from llmcore.tokenizer import Tokenizer

from . import LEAN, first_on_path

if str(LEAN) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # pytest's workers have it already
    os.environ["PYTHONPATH"] = first_on_path(LEAN)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection: a whole one would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def sanguo() -> Path:
    """The 120 chapters, fetched once into the project's data folder."""
    return fetch("sanguo", PROJECT_ROOT / "data")


@pytest.fixture(scope="session")
def tokenizer(sanguo: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """4000 pieces of the novel, as notebook 1 makes them."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "sanguo"
    return train_tokenizer(find_texts(sanguo), prefix, 4000, character_coverage=0.99)


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of made-up English, a few kilobytes each."""
    folder = tmp_path_factory.mktemp("english")
    chance = random.Random(0)
    who = ["The old captain", "A young engineer", "My sister", "The ship's computer", "Nobody", "Every passenger"]
    does = ["watched", "forgot", "repaired", "followed", "described", "quietly sold", "dreamt of", "painted"]
    what = ["the engines", "a distant star", "the last letter", "an empty harbour", "the map of the colony", "the rain"]
    when = ["before dawn", "for a hundred years", "without a word", "as the lights went out", "again and again"]
    for number in range(5):
        lines = [f"Chapter {number + 1}"]
        for _ in range(60):
            sentence = f"{chance.choice(who)} {chance.choice(does)} {chance.choice(what)} {chance.choice(when)}."
            lines.append(f"{sentence} “{chance.choice(what).capitalize()}?” asked {chance.choice(who).lower()}.")
        (folder / f"story-{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
