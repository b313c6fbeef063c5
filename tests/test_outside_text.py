"""Text from outside (prompts, names of files, projects and runs) shows what it holds and never acts."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcore import files
from llmcore.checkpoint import load_checkpoint, save_checkpoint
from llmcore.files import display_path, one_line
from llmcore.formats.gguf import to_gguf
from llmcore.formats.huggingface import to_hf
from llmcore.formats.llama2c import to_llama2c
from llmcore.generate import generate, stream
from llmcore.measure.repetition import distinct, longest_loop
from llmcore.notebook import widgets
from llmcore.notebook.gloss import gloss
from llmcore.notebook.run_page import write_index
from llmcore.notebook.safe_html import SHOWN, ending, html_text, visible
from llmcore.notebook.trackers import tracker_callback
from llmcore.tokenizer import Tokenizer

from .helpers import quick, tiny_model, trainer

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
ACTS = {"Cc", "Cs", "Zl", "Zp"}  # controls, half surrogates, separators of lines and paragraphs
ANY = st.text(st.characters(exclude_categories=()))  # half surrogates too


def acts(text: str) -> set[str]:
    turning = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
    return {c for c in text if c not in "\n\t" and (unicodedata.category(c) in ACTS or c in turning)}


@given(ANY)
def test_no_character_acts_in_a_shown_text_name_or_path(text: str) -> None:
    for form in (visible(text), html_text(text), one_line(text), display_path(f"runs/{text}"), visible(ending(text))):
        assert not acts(form)
        form.encode()
    assert len(one_line(text).splitlines()) <= 1 and "\t" not in one_line(text)


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"])))
def test_text_that_only_shows_is_left_as_it_is(text: str) -> None:
    assert visible(text) == one_line(text) == text


@given(ANY, st.integers(1, 50))
def test_the_end_of_a_long_text_is_shown_with_its_length(text: str, most: int) -> None:
    short = ending(text, most)
    if len(text) <= most:
        assert short == text
    else:
        assert short.endswith("…" + text[-most:]) and f"({len(text) - most:,} characters)" in short
        assert len(short) < most + 40
    assert SHOWN < 1000


def cell(name: str, words: str) -> str:
    """The code of a notebook's cell in which some words stand."""
    source = (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")
    [found] = [part for part in re.split(r"(?m)^# %%.*$", source) if words in part and not part.startswith("\n# #")]
    return found


HOSTILE = "name\x1b[31m\u202e\udcff\nfake: True"


@pytest.mark.parametrize("words", ["for piece in stream(", "for degree in"])
def test_a_prompt_of_any_length_is_written_after_its_visible_end(
    words: str, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    code, model = cell("05_generate", words), tiny_model(vocab_size=tokenizer.vocab_size)
    space = {"model": model, "tok": tokenizer, "max_new_tokens": 8, "temperature": 0.8, "widgets": widgets}
    space |= {"top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0, "seed": 0}
    space |= {"stream": stream, "generate": generate, "gloss": gloss, "prompt": "曹\x1b[31m\u202e操" * 200_000}
    if words == "for degree in":
        space |= {"sampling": {"seed": 0}, "distinct": distinct, "longest_loop": longest_loop}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, space)
    printed = capsys.readouterr().out
    assert "⟨1B⟩[31m⟨202E⟩操" in printed and not acts(printed)
    assert len(printed) < 10_000 and "characters) …" in printed


def test_names_of_files_are_printed_on_one_visible_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [next(line for line in cell("01_tokenize", "left out:").splitlines() if "left out:" in line)]
    lines += [next(line for line in cell("02_dataset", "val.names[:12]").splitlines() if "val.names[:12]" in line)]
    for line in lines:
        library = SimpleNamespace(refused={HOSTILE: "no text"})
        exec(line, {"library": library, "val": SimpleNamespace(names=[HOSTILE]), "one_line": one_line})
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and not acts(printed) and "⟨1B⟩" in printed


def test_a_tracker_gets_a_sample_with_half_a_surrogate(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    track = tracker_callback("tensorboard", "p", tmp_path, {"sample_prompt": "\ud83d"})
    track({"step": 1, "loss": 1.0, "sample": "a \ud83d \x1b[31m"})  # warns, and so fails, if it is left out
    written = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert "⟨D83D⟩ ⟨1B⟩[31m".encode() in written


def test_a_run_in_a_folder_of_undecodable_bytes_is_listed_and_linked(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"a\xff\x1b[31m\nb")
    trainer(folder, quick(max_steps=1)).fit()
    text = write_index(tmp_path).read_text(encoding="utf-8")
    [link] = re.findall(r"\]\((\S+)\)", text)
    assert (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + unquote_to_bytes(link)))).is_dir()
    assert not acts(text)


def test_an_export_that_cannot_be_written_is_left_out_with_a_word(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "PROJECT_ROOT", tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "export").write_text("a file in the way", encoding="utf-8")
    save_checkpoint(tmp_path / "run", tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, step=3, loss=2.0)
    space = {"checkpoint": load_checkpoint(tmp_path / "run"), "torch": torch, "widgets": widgets}
    space |= {name: getattr(files, name) for name in ("resolve", "display_path")}
    space |= {"to_hf": to_hf, "to_llama2c": to_llama2c, "to_gguf": to_gguf}
    exec(cell("05_generate", "export_dir = "), space)
    assert space["hf_dir"] is None and "left out, since outputs/export/run" in capsys.readouterr().out
    exec(cell("05_generate", "transformers gives the same ids"), space)  # goes on without
