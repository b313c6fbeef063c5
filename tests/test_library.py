"""A library as it comes from the web: everything is read, copies and advertisements are found, nothing is lost."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import papermill
import pytest

from llmcore.corpus import report
from llmcore.corpus.hash_table import HashTable
from llmcore.corpus.library import Library, Reader, open_library
from llmcore.corpus.prepare import dataset_folder, prepare_dataset
from llmcore.corpus.texts import find_texts, read_text
from llmcore.dataset import TokenDataset
from llmcore.files import PROJECT_ROOT
from llmcore.tokenizer import Tokenizer

from .library import ADVERTISEMENT, Truth, build_library


@pytest.fixture(scope="module")
def built(sanguo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """Some 200 files, made of two parts of each chapter."""
    chapters = [read_text(file) for file in find_texts(sanguo)]
    parts = [chapter[start : start + 1200] + "\n" for chapter in chapters for start in (0, 1200)]
    folder = tmp_path_factory.mktemp("library") / "books"
    return folder, build_library(folder, parts)


@pytest.fixture(scope="module")
def library(built: tuple[Path, Truth]) -> Library:
    return open_library(built[0])


def texts_of(library: Library) -> dict[str, str]:
    with Reader() as reader:
        return {document.name: "".join(reader.blocks(document)) for document in library.documents}


def test_every_text_of_a_library_is_read_as_it_was(built: tuple[Path, Truth], library: Library) -> None:
    _, truth = built
    assert not library.refused
    texts = texts_of(library)
    assert {name: texts[name] for name in truth.texts} == truth.texts
    assert set(texts) == set(truth.texts) | set(truth.copies) | set(truth.damaged) | {"novel.epub"}
    assert {document.name: document.damaged for document in library.documents if document.damaged} == truth.damaged


def test_what_is_not_read_is_counted(library: Library) -> None:
    assert dict(library.unread) == {".pdf": 1, ".mobi": 1, ".jpg": 1}
    rows = report.files_by_kind(library)
    assert {row["file"]: row["documents"] for row in rows if row["encoding"] == "not read"} == dict(library.unread)


def test_copies_are_left_out_and_the_longest_is_kept(built: tuple[Path, Truth], library: Library) -> None:
    _, truth = built
    assert library.copy_of == truth.copies
    assert {document.name for document in library.kept}.isdisjoint(truth.copies)


def test_recurring_advertisements_are_cleaned_and_counted(library: Library) -> None:
    assert [line.text.strip() for line in library.recurring] == [ADVERTISEMENT]
    assert not any(ADVERTISEMENT in text for text in texts_of(library).values())
    shown = report.recurring(library)
    assert shown[0]["line"].strip() == ADVERTISEMENT and report.cleaning(library)


def test_without_cleaning_every_text_is_kept_whole(built: tuple[Path, Truth]) -> None:
    folder, _ = built
    library = open_library(folder, clean=False)
    texts = texts_of(library)
    for document in library.documents:
        if document.path.suffix == ".txt" and not document.damaged:
            assert texts[document.name] == document.path.read_bytes().decode(document.encoding).removeprefix("\ufeff")


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_copies_never_stand_on_both_sides(
    built: tuple[Path, Truth], tokenizer: Tokenizer, tmp_path: Path, duplicates: str
) -> None:
    folder, truth = built
    manifest = prepare_dataset(folder, tokenizer, tmp_path / "d", 0.3, duplicates=duplicates, progress=False)
    sides = {source["path"]: source["split"] for source in manifest["sources"]}
    for copy, original in truth.copies.items():
        assert sides[copy] == (sides[original] if duplicates == "keep" else "copy")
    assert {"train", "val"} <= set(sides.values()) <= {"train", "val", "copy"}


def test_a_longer_edition_of_a_held_out_text_is_held_out(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    chapters = [read_text(file) for file in find_texts(sanguo)[:6]]
    for number, text in enumerate(chapters):
        (folder / f"{number}.txt").write_text(text[:2000], encoding="utf-8")
    manifest = prepare_dataset(folder, tokenizer, tmp_path / "d", 0.01, progress=False)
    [held_out] = [source["path"] for source in manifest["sources"] if source["split"] == "val"]
    (folder / "longer.txt").write_text(chapters[int(held_out[0])][:3500], encoding="utf-8")
    sides = {
        s["path"]: s["split"] for s in prepare_dataset(folder, tokenizer, tmp_path / "d", progress=False)["sources"]
    }
    assert sides[held_out] == "copy" and sides["longer.txt"] == "val"
    (folder / "longer.txt").unlink()  # the copy alone is held out as before
    sides = {
        s["path"]: s["split"] for s in prepare_dataset(folder, tokenizer, tmp_path / "d", progress=False)["sources"]
    }
    assert sides[held_out] == "val" and list(sides.values()).count("val") == 1


def test_a_prepared_library_decodes_to_its_texts(
    built: tuple[Path, Truth], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder, truth = built
    manifest = prepare_dataset(folder, tokenizer, tmp_path / "d", 0.2, progress=False)
    decoded: dict[str, str] = {}
    for split in ("train", "val"):
        decoded |= TokenDataset(tmp_path / "d", split, 8).texts(tokenizer)
    kept = {name: text for name, text in truth.texts.items() if name not in truth.copies}
    assert {name: decoded[name] for name in kept} == kept
    assert prepare_dataset(folder, tokenizer, tmp_path / "d", progress=False) == manifest
    assert f"{len(truth.copies)} copies left out" in report.summary(manifest)


def test_a_text_in_another_encoding_keeps_its_place(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for file in find_texts(sanguo)[:6]:
        shutil.copy(file, folder)
    before = prepare_dataset(folder, tokenizer, tmp_path / "d", 0.3, progress=False)
    for number, file in enumerate(sorted(folder.iterdir())):  # under another name too
        text = file.read_text(encoding="utf-8")
        file.unlink()
        (folder / f"x{number}.txt").write_bytes(text.encode(("gb18030", "utf-16", "utf-16-be")[number % 3]))
    after = prepare_dataset(folder, tokenizer, tmp_path / "d", progress=False)
    assert [(s["sha256"], s["split"]) for s in after["sources"]] == [
        (s["sha256"], s["split"]) for s in before["sources"]
    ]
    assert after["splits"] == before["splits"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"errors": "ignore"}, "errors='ignore' must be strict or skip"),
        ({"duplicates": "maybe"}, "duplicates='maybe' must be drop or keep"),
        ({"encoding": "klingon"}, "encoding='klingon'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    (tmp_path / "a.txt").write_text("却说")
    with pytest.raises(ValueError, match=said):
        open_library(tmp_path, **options)


def test_an_encoding_that_is_given_is_taken_for_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("cp1252") * 30)
    [document] = open_library(tmp_path, encoding="cp1252").documents
    with Reader() as reader:
        assert "".join(reader.blocks(document)) == "é" * 30


def test_each_corpus_and_tokenizer_has_a_folder_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one, other = (dataset_folder("auto", tmp_path / name / "books", tokenizer) for name in "ab")
    assert one != other and one.parent == other.parent and one.name.startswith("books-")
    assert dataset_folder(tmp_path / "mine", tmp_path / "books", tokenizer) == tmp_path / "mine"


def test_scripts_are_told_apart() -> None:
    texts = {
        "simplified Chinese": "他说，这个国家的人们来自什么地方。",
        "traditional Chinese": "他說，這個國家的人們來自什麼地方。",
        "Japanese": "吾輩は猫である。名前はまだ無い。",
        "Latin letters": "The old captain watched the engines.",
        "another script": "Все счастливые семьи похожи друг на друга",
        "no letters": "123 ……",
    }
    assert {script: report.script_of(text) for script, text in texts.items()} == {script: script for script in texts}


def test_a_full_disk_for_temporary_files_leaves_no_text_out(
    built: tuple[Path, Truth], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashTable, "add", full)
    with pytest.raises(OSError, match="no room for temporary files in /"):
        open_library(built[0], errors="skip")


@pytest.mark.slow
def test_a_library_goes_through_the_notebooks(
    built: tuple[Path, Truth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encodings, archives, copies, advertisements, broken bytes and files that hold no text, with default choices."""
    monkeypatch.setenv("LLM_WORKBOOK_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, truth = built
    small = {
        "01_tokenize": {"vocab_size": 3000, "character_coverage": 0.98},
        "02_dataset": {"context_size": 32},
        "04_scifi_train": {"context_size": 32, "batch_size": 2, "max_steps": 12, "thorough": False, "device": "cpu"},
    }
    small["04_scifi_train"] |= {"dim": 24, "n_layers": 1, "tokens_per_step": 128}
    printed = {}
    for name, parameters in small.items():
        notebook = papermill.execute_notebook(
            PROJECT_ROOT / "notebooks" / f"{name}.ipynb",
            tmp_path / f"{name}.ipynb",
            parameters={"data_dir": str(folder), **parameters},
            progress_bar=False,
            cwd=tmp_path,
        )
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        printed[name] = "".join(output.get("text", "") for output in outputs)
        printed[name] += "".join(output["data"].get("text/html", "") for output in outputs if "data" in output)
    assert ADVERTISEMENT in printed["01_tokenize"] and "gb18030" in printed["01_tokenize"]
    for name in ("02_dataset", "04_scifi_train"):
        assert f"{len(truth.copies)} copies left out" in printed[name] and "3 other files" in printed[name]
    [dataset] = (tmp_path / "outputs" / "datasets").iterdir()
    assert json.loads((dataset / "meta.json").read_text())["recurring"] == [ADVERTISEMENT]
