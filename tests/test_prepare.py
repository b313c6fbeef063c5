"""Preparation: in blocks, again and again, killed anywhere, the token files are those of one fresh preparation."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmcore.corpus import prepare
from llmcore.corpus.library import sample_texts
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.texts import cut_text, find_texts, read_text, split_long, text_blocks
from llmcore.corpus.train_tokenizer import sentences, train_tokenizer
from llmcore.dataset import DatasetError, TokenDataset, verify_dataset
from llmcore.tokenizer import Tokenizer

from .helpers import ROOT, examples
from .kill import kill_at

KILLS = int(os.environ.get("KILL_ROUNDS", "8"))


class Recording(Tokenizer):
    """A tokenizer that remembers what it was given."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen: list[str] = []

    def encode_array(self, text: str):  # type: ignore[no-untyped-def]
        self.seen.append(text)
        return super().encode_array(text)


@pytest.fixture
def recording(tokenizer: Tokenizer, tmp_path: Path) -> Recording:
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    return Recording(tmp_path / "t.model")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fresh(texts: Path, tokenizer: Tokenizer, folder: Path, **options: Any) -> dict[str, bytes]:
    prepare_dataset(texts, tokenizer, folder, progress=False, **options)
    return content(folder)


@pytest.fixture(scope="module")
def unigram(sanguo: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("unigram") / "t"
    files = find_texts(sanguo)[:30]
    return train_tokenizer(files, prefix, 4000, model_type="unigram", character_coverage=0.98, progress=False)


@pytest.fixture(scope="module")
def spaced(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(find_texts(english), tmp_path_factory.mktemp("spaced") / "t", 500, progress=False)


@settings(deadline=None, max_examples=examples(300))
@given(st.data(), st.integers(1, 9), st.sampled_from(["tokenizer", "unigram", "spaced"]))
def test_blocks_encode_as_the_whole_text_does(
    request: pytest.FixtureRequest, data: st.DataObject, size: int, which: str
) -> None:
    """Texts of the tokenizer's own pieces meet the merges that a cut could break."""
    tokenizer: Tokenizer = request.getfixturevalue(which)
    piece = st.integers(0, tokenizer.vocab_size - 1).map(lambda id: tokenizer.decode([id]))
    text = "".join(data.draw(st.lists(st.one_of(piece, st.text(max_size=3), st.sampled_from("▁ \n曹操")), max_size=40)))
    pairs = tokenizer.inner_pairs()
    parts = list(cut_text([text[:7], text[7:]], pairs, size))
    assert "".join(parts) == text
    assert all(size <= len(part) <= 2 * size for part in parts[:-1]) and (not parts or len(parts[-1]) <= 2 * size)
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
    if all(a[-1] + b[0] not in pairs for a, b in itertools.pairwise(parts)):
        assert [id for part in parts for id in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_safe_place_is_taken_where_there_is_one(tokenizer: Tokenizer, sanguo: Path) -> None:
    text = read_text(sanguo / "001.txt").replace("\n", "")
    pairs = tokenizer.inner_pairs()
    parts = list(cut_text([text], pairs, 50))
    assert len(parts) > 50
    assert not any(a[-1] + b[0] in pairs for a, b in itertools.pairwise(parts))
    assert list(cut_text(["aaaaaaa"], {"aa"}, 2)) == ["aa", "aa", "aaa"]


@pytest.mark.parametrize("shift", range(6))
def test_what_lies_across_the_border_of_two_blocks_is_read_whole(tmp_path: Path, shift: int) -> None:
    filler = "x" * ((1 << 20) - shift)
    text = filler + "𠮷\r\n曹\r\r\n操" * 3
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text(tmp_path / "a.txt") == text.replace("\r\n", "\n").replace("\r", "\n")
    assert len(list(text_blocks(tmp_path / "a.txt"))) >= 2


def test_lines_to_learn_from_do_not_depend_on_how_the_file_is_read(tmp_path: Path) -> None:
    chance = random.Random(0)
    text = "".join(chance.choices("曹操aé。.\t\n", [9, 9, 9, 9, 2, 2, 0.01, 0.02], k=1_500_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = (part for line in text.split("\n") for part in line.split("\t") if part)
    expected = [piece for part in parts for piece in split_long(part, 300)]
    assert list(sentences([tmp_path / "a.txt"], 300)) == expected


@pytest.mark.parametrize("by_position", [False, True])
def test_a_text_in_many_blocks_is_its_whole_encoding(
    tokenizer: Tokenizer, sanguo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_position: bool
) -> None:
    monkeypatch.setattr(prepare, "BLOCK", 100)
    folder = tmp_path / "t"
    folder.mkdir()
    texts = [read_text(file) for file in find_texts(sanguo)[: 1 if by_position else 5]]
    texts[0] = texts[0].replace("\n", "")  # one line
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    manifest = prepare_dataset(folder, tokenizer, tmp_path / "d", 0.3, progress=False)
    if by_position:
        cut = round(len(texts[0]) * 0.7)
        expected = {"train": tokenizer.encode(texts[0][:cut]), "val": tokenizer.encode(texts[0][cut:], eos=True)}
    else:
        expected = {"train": [], "val": []}
        for source, text in zip(manifest["sources"], texts, strict=True):
            expected[source["split"]] += tokenizer.encode(text, eos=True)
    for split, ids in expected.items():
        assert TokenDataset(tmp_path / "d", split, 8).tokens.tolist() == ids
        assert manifest["splits"][split]["tokens"] == len(ids)


@pytest.mark.filterwarnings("ignore:text that was held out before")  # where too few documents are left
@settings(deadline=None, max_examples=10)
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5), min_size=1), min_size=2, max_size=4))
@example([{"a": 1}, {"a": 1, "b": 1}, {"b": 1}, {"b": 1, "c": 2, "d": 2}])
def test_only_new_files_are_encoded_and_the_result_is_as_if_fresh(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, int]]
) -> None:
    """Each step is a folder: which file holds which text. Text 0 is empty."""
    here = tmp_path_factory.mktemp("steps")
    (here / "t.model").write_bytes(tokenizer.model_bytes)
    known: set[str] = set()
    for number, files in enumerate(steps):
        texts = here / f"texts-{number}"
        texts.mkdir()
        for name, which in files.items():
            (texts / f"{name}.txt").write_text(f"第{which}回\n却说曹操" * which, encoding="utf-8", newline="\n")
        recording = Recording(here / "t.model")
        if not any(files.values()):
            with pytest.raises(DatasetError, match="are empty"):
                prepare_dataset(texts, recording, here / "d", progress=False)
            continue
        (here / f"fresh-{number}").mkdir()  # which knows the places of the documents, and has nothing to copy from
        if (here / "d" / "meta.json").exists():
            (here / f"fresh-{number}" / "meta.json").write_bytes((here / "d" / "meta.json").read_bytes())
        manifest = prepare_dataset(texts, recording, here / "d", duplicates="keep", progress=False)
        assert content(here / "d") == fresh(texts, tokenizer, here / f"fresh-{number}", duplicates="keep")
        whole, parts = set(), set()
        for source in manifest["sources"]:
            text = read_text(texts / source["path"])
            if source["split"] == "both":
                cut = min(round(len(text) * 0.95), len(text) - 1)
                parts |= {text[:cut], text[cut:]}
            elif text:
                whole.add(text)
        assert set(recording.seen) - parts == whole - known - parts
        known = whole


def test_another_tokenizer_or_a_damaged_file_copies_nothing(
    recording: Recording, spaced: Tokenizer, english: Path, tmp_path: Path
) -> None:
    before = fresh(english, recording, tmp_path / "d")
    characters = sum(len(read_text(file)) for file in find_texts(english))
    recording.seen.clear()
    (tmp_path / "d" / "train.bin").write_bytes(before["train.bin"][:-1] + b"x")
    assert fresh(english, recording, tmp_path / "d") == before
    assert sum(map(len, recording.seen)) == characters
    assert fresh(english, spaced, tmp_path / "d") == fresh(english, spaced, tmp_path / "e")


def test_the_old_data_set_stands_until_the_new_one_is_complete(
    tokenizer: Tokenizer, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, folder = tmp_path / "t", tmp_path / "d"
    texts.mkdir()
    for file in find_texts(english):
        (texts / file.name).write_bytes(file.read_bytes())
    before = fresh(texts, tokenizer, folder)
    (texts / "new.txt").write_text("却说" * 1000)
    monkeypatch.setattr(prepare, "BLOCK", 16)

    class Breaks(Recording):
        def encode_array(self, text: str):  # type: ignore[no-untyped-def]
            if len(self.seen) == 20:
                raise KeyboardInterrupt
            return super().encode_array(text)

    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(texts, Breaks(tmp_path / "t.model"), folder, progress=False)
    assert {name: (folder / name).read_bytes() for name in before} == before
    verify_dataset(folder)
    after = fresh(texts, tokenizer, folder)
    assert after == fresh(texts, tokenizer, tmp_path / "e") and after != before


def test_a_file_that_changes_while_it_is_read_is_named(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path) -> None:
    texts = tmp_path / "t"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(f"却说曹操{name}\n" * 100, encoding="utf-8")
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)

    class Writes(Tokenizer):
        def inner_pairs(self) -> set[str]:  # asked for between the two times that a file is read
            (texts / "b.txt").write_text("却说曹丕\n" * 100, encoding="utf-8")
            return super().inner_pairs()

    with pytest.raises(DatasetError, match=r"b.txt changed while it was read; run 02_dataset again"):
        prepare_dataset(texts, Writes(tmp_path / "t.model"), tmp_path / "d", progress=False)
    assert fresh(texts, tokenizer, tmp_path / "d") == fresh(texts, tokenizer, tmp_path / "e")


# One process imports torch and this file. Each preparation is a copy of it, which starts in no time.
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload([__name__])


def prepare_and_tell(texts: Path, model: Path, folder: Path, at: int, told: Connection) -> None:
    """Prepare with small blocks and a journal line for every few, and say how many characters were encoded.

    Given a number, this process kills itself at that file operation or encoded block.
    """
    prepare.BLOCK, prepare.SAVED_EVERY = 200, 2000
    encoded = 0

    class Counting(Tokenizer):
        def encode_array(self, text: str):  # type: ignore[no-untyped-def]
            nonlocal encoded
            count("block")
            encoded += len(text)
            return super().encode_array(text)

    tokenizer = Counting(model)
    count = kill_at(at, {"os.truncate", "block"})
    prepare_dataset(texts, tokenizer, folder, 0.2, progress=False)
    told.send(encoded)
    os._exit(0)  # nothing is counted any more


def prepare_elsewhere(texts: Path, model: Path, folder: Path, at: int = 0) -> tuple[ForkServerProcess, Connection]:
    """Begin in a process of its own; returns it, and where it will say how many characters it encoded."""
    answer, told = COPIES.Pipe(duplex=False)
    process = COPIES.Process(target=prepare_and_tell, args=(texts, model, folder, at, told))
    process.start()
    told.close()
    return process, answer


def outcome(begun: tuple[ForkServerProcess, Connection]) -> int | None:
    """Characters encoded; None if it was killed."""
    process, answer = begun
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return int(answer.recv()) if process.exitcode == 0 else None


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_ends_as_if_never_killed(
    tokenizer: Tokenizer, sanguo: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for file in find_texts(sanguo)[:6]:
        (texts / file.name).write_bytes(file.read_bytes())
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    whole = outcome(prepare_elsewhere(texts, tmp_path / "t.model", tmp_path / "straight"))
    straight = content(tmp_path / "straight")
    assert whole == sum(len(read_text(file)) for file in find_texts(texts))
    chance = random.Random(0)
    kills, saved = 0, 0
    while kills < KILLS:
        folder = tmp_path / f"d{kills}"
        while (
            encoded := outcome(prepare_elsewhere(texts, tmp_path / "t.model", folder, chance.randrange(1, 260)))
        ) is None:
            kills += 1
            journal = folder / ".unfinished" / "journal.jsonl"
            if journal.exists() and len(journal.read_text().splitlines()) > 1:
                saved += 1
        assert content(folder) == straight
        assert encoded is not None and encoded <= whole
    assert saved, "no kill left anything to go on with"
    # in the last stretch of a long preparation
    folder = tmp_path / "late"
    assert outcome(prepare_elsewhere(texts, tmp_path / "t.model", folder, 160)) is None
    encoded = outcome(prepare_elsewhere(texts, tmp_path / "t.model", folder))
    assert encoded is not None and 0 < encoded < whole / 2
    assert content(folder) == straight


@pytest.mark.slow
def test_two_that_prepare_one_folder_wait_for_each_other(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    both = [prepare_elsewhere(sanguo, tmp_path / "t.model", tmp_path / "d") for _ in range(2)]
    encoded = sorted(outcome(process) or 0 for process in both)
    assert encoded == [0, sum(len(read_text(file)) for file in find_texts(sanguo))]
    verify_dataset(tmp_path / "d")


MEMORY = """
import re, sys
from pathlib import Path
from typing import Any
from llmcore.corpus.prepare import prepare_dataset
from llmcore.tokenizer import Tokenizer

prepare_dataset(Path(sys.argv[1]), Tokenizer(sys.argv[2]), Path(sys.argv[3]), progress=False)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # getrusage counts the parent's too
"""


@pytest.mark.slow
@pytest.mark.parametrize("newline", ["\n", ""])
def test_memory_does_not_grow_with_the_text(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path, newline: str) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    text = "".join(read_text(file) for file in find_texts(sanguo)).replace("\n", newline)
    peaks = []
    for copies in (2, 30):  # 4 and 50 MB
        texts = tmp_path / f"{copies}"
        texts.mkdir()
        with open(texts / "a.txt", "w", encoding="utf-8") as file:
            for _ in range(copies):
                file.write(text)
        command = [sys.executable, "-c", MEMORY, str(texts), str(tmp_path / "t.model"), str(tmp_path / f"d{copies}")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 16e6


def test_a_damaged_block_is_met_by_exactly_the_batches_that_read_it(
    tokenizer: Tokenizer, sanguo: Path, tmp_path: Path
) -> None:
    prepare_dataset(sanguo, tokenizer, tmp_path / "d", progress=False)
    file, window, size = tmp_path / "d" / "train.bin", 64, 1 << 15
    whole = TokenDataset(tmp_path / "d", "train", window)
    batches = [whole.batch(step, 1) for step in range(whole.n_windows)]
    raw = bytearray(file.read_bytes())
    damaged = 3 * size + 100  # an id in the fourth block, swapped for another that is in the vocabulary
    raw[2 * damaged] ^= 1
    file.write_bytes(raw)
    data = TokenDataset(tmp_path / "d", "train", window)
    refused = 0
    for step, (x, y) in enumerate(batches):
        first, end = data.segment(step, 0)
        start = min(first, data.n_targets - window)
        touches = start < 4 * size and start + window + 1 > 3 * size and end > first
        if touches:
            refused += 1
            with pytest.raises(DatasetError, match=f"train.bin is damaged at byte {6 * size} or after; run 02_dataset"):
                data.batch(step, 1)
        else:
            again = data.batch(step, 1)
            assert again[0].equal(x) and again[1].equal(y)
    assert size // window <= refused <= size // window + 2
    with pytest.raises(DatasetError, match=r"train.bin is damaged: its [\d,]+ bytes have another hash"):
        verify_dataset(tmp_path / "d")


def test_of_a_large_text_a_sample_is_learnt_from(english: Path, tmp_path: Path) -> None:
    """A sample is smaller, so it supports fewer pieces; the same seed takes the same one."""
    files = find_texts(english)
    size = sum(file.stat().st_size for file in files)
    whole, one, same, other = (
        train_tokenizer(files, tmp_path / "t", 400, input_bytes=limit, seed=seed, progress=False).model_bytes
        for limit, seed in ((size, 0), (size // 4, 0), (size // 4, 0), (size // 4, 1))
    )
    assert one == same
    assert len({whole, one, other}) == 3


def test_many_files_with_odd_names_are_all_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = tmp_path / "t"
    expected, refused = {}, {}
    for number in range(400):
        folder = texts / f"卷 {number % 7}" / ("深" * (number % 3) + "x")
        folder.mkdir(parents=True, exist_ok=True)
        name = [f"{number} 回.txt", f"é{number}.TXT", f"{number}\n.txt", os.fsdecode(b"\xff%d.txt" % number)][
            number % 4
        ]
        text = f"第{number}回 曹操\r\n" if number % 5 else f"Nº {number}"
        raw = [text.encode(), text.encode("utf-8-sig"), b"\0\1\2" * 30, b"\x89PNG\r\n\0" + bytes(range(256))]
        (folder / name).write_bytes(raw[number % 4 if number % 20 > 15 else number % 2])
        shown = os.fsencode((folder / name).relative_to(texts)).decode("utf-8", "backslashreplace")
        (refused if number % 20 > 15 and number % 4 > 1 else expected)[shown] = text.replace("\r\n", "\n")
    with pytest.raises(ValueError, match=f"{len(refused)} of 400 texts") as caught:
        prepare_dataset(texts, tokenizer, tmp_path / "d", progress=False)
    assert "errors=skip" in str(caught.value)
    manifest = prepare_dataset(texts, tokenizer, tmp_path / "d", errors="skip", progress=False)
    assert set(manifest["refused"]) == set(refused)
    assert all("does not look like text" in reason for reason in manifest["refused"].values())
    places = {"train": 0, "val": 0}
    data = {split: TokenDataset(tmp_path / "d", split, 8) for split in places}
    for source in manifest["sources"]:
        split = source["split"]
        ids = data[split].read(places[split], places[split] + source["tokens"])
        places[split] += source["tokens"]
        assert tokenizer.decode(ids.tolist()) == expected.pop(source["path"])
    assert not expected


def test_a_sample_of_texts_is_whole_if_small_and_bounded_if_large(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text(f"{number:02d}" * 1000)
    files = find_texts(tmp_path)
    assert sample_texts(files) == [read_text(file) for file in files]
    few = sample_texts(files, 20_000)
    assert 5 <= len(few) <= 10 and set(few) < set(map(read_text, files))
    (tmp_path / "z.txt").write_text("x" * 20_000_000)
    assert sum(map(len, sample_texts(find_texts(tmp_path), 3_000_000))) <= 6_000_000
    [large] = sample_texts([tmp_path / "z.txt"], 3_000_000)
    assert 3_000_000 <= len(large) <= 6_000_000


def test_ids_are_counted(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path) -> None:
    prepare_dataset(sanguo, tokenizer, tmp_path / "d", progress=False)
    counted = Counter(id for text in map(read_text, find_texts(sanguo)) for id in tokenizer.encode(text, eos=True))
    total = sum(TokenDataset(tmp_path / "d", split, 8).count_ids() for split in ("train", "val"))
    assert dict(enumerate(total)) == {id: counted[id] for id in range(tokenizer.vocab_size)}


def split_of(manifest: dict[str, Any]) -> dict[str, str]:
    return {Path(source["path"]).stem: source["split"] for source in manifest["sources"]}


def write_texts(folder: Path, texts: dict[str, str]) -> Path:
    """A folder of just these texts, by name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def tokens_of(folder: Path, tokenizer: Tokenizer, split: str) -> str:
    return tokenizer.decode(TokenDataset(folder, split, 2).tokens.tolist())


def test_the_chapter_held_out_of_six_stays_so_when_a_seventh_comes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chapters = {f"{number:03d}": f"第{number}回\n却说曹操" * 9 for number in range(1, 8)}
    six = dict(list(chapters.items())[:6])
    for number, texts in enumerate((six, chapters)):
        manifest = prepare_dataset(write_texts(tmp_path / "t", texts), tokenizer, tmp_path / "d", progress=False)
        assert split_of(manifest) == {name: "val" if name == "001" else "train" for name in texts}, number
    assert prepare.held_out_share(manifest) == pytest.approx(1 / 7)


@settings(deadline=None, max_examples=examples(25))
@given(st.data())
def test_what_was_held_out_is_never_trained_on(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Files come, go, come back, are renamed and rewritten; token files are lost; val_fraction rises."""
    here = tmp_path_factory.mktemp("held-out")
    names = st.text("abcdefgh", min_size=1, max_size=3)
    serial = itertools.count()
    unique = st.builds(lambda: f"第{next(serial)}回\n却说曹操引军而还" * 3)
    texts = data.draw(st.dictionaries(names, unique, min_size=2, max_size=6))
    fraction, raised = data.draw(st.sampled_from([0.05, 0.3, 0.9])), False
    held_out, trained_on, gone = set[str](), set[str](), dict[str, str]()
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing has to move
            manifest = prepare_dataset(write_texts(here / "t", texts), tokenizer, here / "d", fraction, progress=False)
        split = split_of(manifest)
        assert set(split.values()) == {"train", "val"}
        now = {side: {text for name, text in texts.items() if split[name] == side} for side in ("train", "val")}
        assert not held_out & now["train"]
        assert raised or not trained_on & now["val"]
        held_out, trained_on, raised = held_out | now["val"], now["train"], False
        change = data.draw(st.sampled_from(["add", "rename", "rewrite", "damage", "raise", "remove", "put back"]))
        name = data.draw(st.sampled_from(sorted(texts)))
        if change == "add":
            texts = {**data.draw(st.dictionaries(names, unique, min_size=1, max_size=3)), **texts}
        elif change == "rename":
            texts = {
                data.draw(names.filter(lambda new, old=frozenset(texts): new not in old)): texts.pop(name),
                **texts,
            }
        elif change == "rewrite":
            held_out, trained_on = held_out - {texts[name]}, trained_on - {texts[name]}
            new = data.draw(unique)
            (held_out if split[name] == "val" else trained_on).add(new)
            texts[name] = new
        elif change == "remove":
            if len(now[split[name]]) > 1:  # else a document would have to change sides
                gone[name] = texts.pop(name)
        elif change == "put back":
            texts = {**gone, **texts}
        elif change == "damage":
            (here / "d" / "val.bin").unlink()
        else:
            raised, fraction = True, min(0.95, 2 * fraction)


@pytest.mark.parametrize("away", ["empty", "unreadable", "other text", "other name"])
def test_held_out_text_that_goes_and_comes_back_is_held_out(away: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = {name: f"第{name}回\n却说曹操" * 9 for name in "abcdef"}

    def split(texts: dict[str, str], raw: bytes | None = None) -> dict[str, str]:
        folder = write_texts(tmp_path / "t", texts)
        if raw is not None:
            (folder / f"{name}.txt").write_bytes(raw)
        return split_of(prepare_dataset(folder, tokenizer, tmp_path / "d", 0.01, errors="skip", progress=False))

    name = ""
    [name] = [name for name, side in split(texts).items() if side == "val"]
    split(texts, {"empty": b"", "unreadable": b"\xff\xfe\xe4"}.get(away, "玄德曰".encode()))
    back = texts if away != "other name" else {**texts, name: "玄德曰", "zz": texts[name]}
    assert split(back)["zz" if away == "other name" else name] == "val"


def test_a_text_split_by_position_is_known_when_it_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = {name: f"第{name}回\n却说曹操" * 9 for name in "abcdef"}
    for some in ("a", "b", "abcdef"):
        folder = write_texts(tmp_path / "t", {name: texts[name] for name in some})
        manifest = prepare_dataset(folder, tokenizer, tmp_path / "d", 0.01, progress=False)
    assert split_of(manifest)["a"] == split_of(manifest)["b"] == "both"


def test_a_text_split_by_position_stays_split_there_when_others_join(tokenizer: Tokenizer, tmp_path: Path) -> None:
    novel = "".join(f"第{number}回\n却说曹操引军而还" for number in range(200))
    others = {"b": "玄德曰" * 50, "c": "孔明曰" * 50, "d": "关公曰" * 50}
    prepare_dataset(write_texts(tmp_path / "t", {"a": novel}), tokenizer, tmp_path / "d", 0.2, progress=False)
    held_out = tokens_of(tmp_path / "d", tokenizer, "val")
    assert novel.endswith(held_out) and held_out
    for texts in ({"a": novel, "b": others["b"]}, {"a": novel, **others}, {"z": novel, **others}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            manifest = prepare_dataset(write_texts(tmp_path / "t", texts), tokenizer, tmp_path / "d", progress=False)
        assert manifest["split_by"] == "position"
        assert held_out in tokens_of(tmp_path / "d", tokenizer, "val")
        assert held_out not in tokens_of(tmp_path / "d", tokenizer, "train")
        val = TokenDataset(tmp_path / "d", "val", 2)
        texts_held_out = val.texts(tokenizer)
        assert {Path(name).stem for name in texts_held_out} == {
            n for n, s in split_of(manifest).items() if s != "train"
        }
        assert held_out in texts_held_out.values()


@pytest.mark.parametrize(
    ("before", "after", "fractions", "named"),
    [
        ({"a": "甲" * 99}, {"a": "甲" * 999}, (0.2, 0.2), "a.txt"),  # its old end is now in its middle
        ({"a": "甲" * 99, "b": "乙" * 99}, {"a": "甲" * 99}, (0.05, 0.05), None),  # filled in below: the one held out
        ({f"{n}": f"{n}" * 99 for n in range(40)}, {f"{n}": f"{n}" * 99 for n in range(40)}, (0.5, 0.1), r"\d+.txt, "),
    ],
)
def test_where_held_out_text_must_be_trained_on_it_is_said(
    tokenizer: Tokenizer,
    tmp_path: Path,
    before: dict[str, str],
    after: dict[str, str],
    fractions: tuple[float, float],
    named: str | None,
) -> None:
    texts = write_texts(tmp_path / "t", before)
    manifest = prepare_dataset(texts, tokenizer, tmp_path / "d", fractions[0], progress=False)
    if named is None:
        [name] = [name for name, split in split_of(manifest).items() if split == "val"]
        after, named = {name: before[name]}, f"{name}.txt"
    with pytest.warns(UserWarning, match=f"held out before is now trained on: {named}"):
        prepare_dataset(write_texts(texts, after), tokenizer, tmp_path / "d", fractions[1], progress=False)


def test_a_kill_while_publishing_does_not_forget_what_is_held_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Between the removal of the old manifest and the arrival of the new one."""
    texts = {"a": "甲" * 99, "b": "乙" * 99}
    first = prepare_dataset(write_texts(tmp_path / "t", texts), tokenizer, tmp_path / "d", 0.3, progress=False)
    unfinished = tmp_path / "d" / ".unfinished"
    unfinished.mkdir()
    os.rename(tmp_path / "d" / "meta.json", unfinished / "meta.json")
    texts |= {name: name * 99 for name in "cdefgh"}
    manifest = prepare_dataset(write_texts(tmp_path / "t", texts), tokenizer, tmp_path / "d", progress=False)
    assert manifest["val_fraction"] == 0.3
    assert {name: split_of(manifest)[name] for name in "ab"} == split_of(first)


def test_what_was_encoded_with_lost_spaces_is_encoded_again(tmp_path: Path) -> None:
    """Before, a tokenizer without a piece for the space spelled it as U+2581."""
    texts = write_texts(tmp_path / "t", {"a": "却说曹操 a b" * 20, "b": "玄德 ▁曰" * 20})
    learnt = write_texts(tmp_path / "learnt", {"c": "却说曹操玄德曰" * 50})
    train_tokenizer(find_texts(learnt), tmp_path / "tok", 270, progress=False)
    tokenizer = Tokenizer(tmp_path / "tok.model")
    before = Tokenizer(tmp_path / "tok.model")
    before.has_space_piece, before._spelled = True, re.compile("(▁)")
    prepare_dataset(texts, before, tmp_path / "d", progress=False)
    old = {split: tokens_of(tmp_path / "d", tokenizer, split) for split in ("train", "val")}
    assert " " not in "".join(old.values())
    manifest = prepare_dataset(texts, tokenizer, tmp_path / "d", progress=False)
    new = [tokens_of(tmp_path / "d", tokenizer, split) for split in ("train", "val")]
    assert sorted(new) == sorted(map(read_text, find_texts(texts)))
    assert prepare_dataset(texts, tokenizer, tmp_path / "d", progress=False) == manifest
    assert manifest["space"] == tokenizer.encode(" ")


def test_a_git_lfs_pointer_is_not_read_as_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "t", {"a": "却说" * 99, "b": "曹操" * 99})
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (texts / "novel.txt").write_text(pointer, encoding="utf-8")
    said = r"novel\.txt cannot be read: it is only a Git LFS pointer.*git lfs pull"
    with pytest.raises(ValueError, match=said):
        read_text(texts / "novel.txt")
    with pytest.raises(ValueError, match=said):
        prepare_dataset(texts, tokenizer, tmp_path / "d", progress=False)
    manifest = prepare_dataset(texts, tokenizer, tmp_path / "d", errors="skip", progress=False)
    assert set(manifest["refused"]) == {"novel.txt"} and len(manifest["sources"]) == 2


@settings(deadline=None, max_examples=examples(200))
@given(st.binary(max_size=300))
def test_any_bytes_are_text_or_an_error_in_words(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.mktemp("bytes") / "a.txt"
    file.write_bytes(raw)
    try:
        text = read_text(file)
    except ValueError as error:
        assert str(file.name) in str(error) and re.search("convert|remove|only a Git LFS pointer", str(error), re.I)
    else:
        with contextlib.suppress(UnicodeDecodeError):
            assert b"\0" in raw or text == raw.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n").replace(
                "\r", "\n"
            )


def test_only_held_out_text_can_be_helped_by_a_larger_val_fraction(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "t", {"a": "却说", "b": "曹操"})
    prepare_dataset(texts, tokenizer, tmp_path / "d", progress=False)
    for split in ("train", "val"):
        with pytest.raises(DatasetError, match="lower context_size, add text") as error:
            TokenDataset(tmp_path / "d", split, 100)
        assert ("raise val_fraction" in str(error.value)) == (split == "val")
