"""What notebooks 1 and 2 state as facts is true of any corpus: their cells, run on odd ones."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CHINESE = "却说曹操引军而还。刘备、关羽、张飞三人，于路无话。"


def run_cells(name: str, capsys: pytest.CaptureFixture[str], **parameters: object) -> tuple[dict[str, Any], str]:
    """Run a notebook's code with these parameters; gives its names, and what its checked cells print."""
    cells = re.split(r"^# %%(.*)\n", (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    namespace: dict[str, Any] = {"In": []}  # where IPython keeps the cells that were run
    facts = ""
    for tags, code in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in tags:
            continue
        capsys.readouterr()
        namespace["In"].append(code)
        exec(code, namespace)
        if "nbval-check-output" in tags:
            facts += capsys.readouterr().out
        if '"parameters"' in tags:
            namespace |= parameters
    return namespace, facts


@pytest.mark.parametrize("name", [file.stem for file in sorted(NOTEBOOKS.glob("*.py"))])
def test_a_notebook_that_reads_texts_has_what_errors_advise(name: str) -> None:
    """The messages about texts and data sets name parameters to change: each notebook that may show them has them."""
    source = (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")
    [parameters] = re.findall(r'tags=\["parameters"\]\n(.*?)\n# %%', source, re.DOTALL)
    has = set(re.findall(r"^(\w+):", parameters, re.MULTILINE))
    settings = {"errors", "encoding", "clean", "duplicates"}
    needed = {"data_dir", *settings} if "open_library(" in source else set()
    if "prepare_dataset(" in source:
        needed |= {"data_dir", "dataset_dir", "val_fraction", "context_size", "tokenizer_model_file", *settings}
    if "train_tokenizer(" in source:
        needed |= {"vocab_size", "character_coverage"}
    assert needed <= has


LARGE = "".join(f"第{number}回，{CHINESE}\r\n" for number in range(3000))
CORPORA: dict[str, dict[str, bytes]] = {
    "one huge line": {"a.txt": LARGE.replace("\r\n", "").encode()},
    "one small file": {"a.txt": CHINESE.encode() * 30},
    "a huge first file with U+FFFD everywhere": {
        "a.txt": b"\xef\xbb\xbf" + LARGE.replace("话", "\ufffd").encode(),
        "b.txt": b"b" * 900,
    },
    "empty files first and among others": {
        "0.txt": b"",
        "n.txt": b"\n\n",
        "2.txt": CHINESE.encode() * 20,
        "3.txt": b"\xef\xbb\xbf",
        "4.txt": b"\r\n" + CHINESE.encode() * 30,
    },
    "names that are no UTF-8 or break lines": {
        os.fsdecode(b"\xff.txt"): CHINESE.encode() * 30,
        "\u2028.txt": "\r曹操\r\n".encode() * 60,
        "a\\b.txt": "▁ \u2028\u0085 ".encode() * 90,
    },
    "English": {f"{n}.txt": f"The old captain watched the engines, {n} times.\n".encode() * 30 for n in range(30)},
    "spaces": {"a.txt": b"  \n" * 400},
}


@pytest.mark.slow
@pytest.mark.parametrize("corpus", CORPORA)
def test_the_facts_of_notebooks_1_and_2_hold_for_odd_corpora(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, raw in CORPORA[corpus].items():
        (texts / name).write_bytes(raw)
    vocab_size = {"spaces": 262}.get(corpus, 310)
    choices = {"data_dir": str(texts), "clean": corpus != "spaces"}  # a clean text has no runs of blank lines
    one, facts = run_cells("01_tokenize", capsys, **choices, model_prefix=str(tmp_path / "tok"), vocab_size=vocab_size)
    assert f"{len(CORPORA[corpus])} documents" in facts and "False" not in facts
    assert "unknown tokens: 0" in facts
    for what in ("documents that come back unchanged", "strange strings that come back unchanged"):
        [(same, of)] = re.findall(rf"{what}: (\d+) of (\d+)", facts)
        assert same == of != "0"
    files = {"tokenizer_model_file": str(tmp_path / "tok.model"), "dataset_dir": str(tmp_path / "d")}
    two, facts = run_cells("02_dataset", capsys, **choices, **files, context_size=16)
    assert "False" not in facts
    equal = re.findall(r"(?:at|same again:|document:|again:) ([\d,]+) of ([\d,]+)", facts)
    assert len(equal) == 3 and all(same == of != "0" for same, of in equal)  # document, y beside x, the batch again
    [(documents, ends)] = re.findall(r"end in the training split: (\d+), eos tokens there: (\d+)", facts)
    assert documents == ends
    [(targets, *epochs)] = re.findall(
        r"targets in the stream: ([\d,]+); in the two epochs: ([\d,]+) and ([\d,]+)", facts
    )
    assert epochs == [targets, targets]
    characters = {split: counts["characters"] for split, counts in two["manifest"]["splits"].items()}
    assert sum(characters.values()) == one["characters"]
    assert f"held out: {characters['val'] / sum(characters.values()):.1%} of the text" in facts
