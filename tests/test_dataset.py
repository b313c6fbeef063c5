"""Token files hold the texts, and batches visit every token of an epoch once."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcore.corpus.prepare import _held_out, prepare_dataset
from llmcore.corpus.texts import find_texts
from llmcore.dataset import IGNORED, DatasetError, TokenDataset, verify_dataset
from llmcore.tokenizer import Tokenizer

from .helpers import examples

HASHED = {"sha256": "bin", "offsets_sha256": "offsets", "hashes_sha256": "hashes"}
BLOCK = 1 << 16  # bytes of a token file that have one hash


def written(folder: Path, ids: np.ndarray, vocab_size: int = 70_000, dtype: str = "<u4") -> Path:
    """A data set by hand, in the documented format: both splits hold the same ids."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = ids.astype(dtype).tobytes()
    blocks = [hashlib.sha256(raw[place : place + BLOCK]).digest() for place in range(0, len(raw), BLOCK)]
    offsets = np.array([0, len(ids)], dtype="<u8").tobytes()
    files = {"bin": raw, "offsets": offsets, "hashes": b"".join(blocks)}
    for split, ending in itertools.product(("train", "val"), files):
        (folder / f"{split}.{ending}").write_bytes(files[ending])
    hashes = {key: hashlib.sha256(files[ending]).hexdigest() for key, ending in HASHED.items()}
    counts = {"documents": 1, "tokens": len(ids), "characters": 1, "bytes": 3 * len(ids), **hashes}
    manifest = {
        "format_version": 2,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "splits": {"train": counts, "val": counts},
    }
    return seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> Path:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps({**content, "sha256": digest}))
    return folder


def corpus(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


@settings(deadline=None, max_examples=examples(80))
@given(st.integers(2, 90), st.integers(1, 20), st.integers(1, 7), st.integers(0, 3), st.integers(0, 2))
def test_an_epoch_sees_every_target_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, n_tokens: int, context: int, batch_size: int, epoch: int, seed: int
) -> None:
    ids = np.arange(n_tokens) + 66_000  # more than 16 bits hold
    context = min(context, n_tokens - 1)
    data = TokenDataset(written(tmp_path_factory.mktemp("d"), ids), "train", context)
    seen: Counter[int] = Counter()
    for number in range(epoch * data.n_windows, (epoch + 1) * data.n_windows):
        x, y = data.batch(number, 1, seed)
        assert x.shape == y.shape == (1, context)
        kept = y != IGNORED
        assert kept.any()
        assert torch.equal(y[kept], x[kept] + 1)
        seen.update(y[kept].tolist())
    assert seen == Counter((ids[1:]).tolist())
    rows = [data.batch(number, 1, seed)[0] for number in range(batch_size)]
    assert torch.equal(data.batch(0, batch_size, seed)[0], torch.cat(rows))


@settings(deadline=None, max_examples=examples(30))
@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 5))
def test_validation_reads_every_target_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, n_tokens: int, context: int, batch_size: int
) -> None:
    data = TokenDataset(written(tmp_path_factory.mktemp("d"), np.arange(n_tokens)), "val", min(context, n_tokens - 1))
    targets = torch.cat([y[y != IGNORED] for _, y in data.sequential(batch_size)])
    assert targets.tolist() == list(range(1, n_tokens))


def test_a_step_cut_into_smaller_batches_reads_the_same_windows(tmp_path: Path) -> None:
    """Batch 8, 2 x 4 or 8 x 1: on a smaller device a run goes on with other batches and the same windows."""
    data = TokenDataset(written(tmp_path, np.arange(500)), "train", 24)
    for step in (0, 1, data.n_windows // 8):  # the last of these ends in the second epoch
        whole = data.batch(step, 8, seed=3)
        for parts in (2, 8):
            batches = [data.batch(step * parts + part, 8 // parts, seed=3) for part in range(parts)]
            for together, cut in zip(whole, zip(*batches, strict=True), strict=True):
                assert torch.equal(together, torch.cat(cut))


def test_batches_depend_on_nothing_but_step_and_seed(tmp_path: Path) -> None:
    data = TokenDataset(written(tmp_path, np.arange(5000)), "train", 16)
    later = data.batch(700, 4, seed=5)
    for step in range(0, 900, 90):
        data.batch(step, 4, seed=step)
    again = TokenDataset(tmp_path, "train", 16).batch(700, 4, seed=5)
    assert torch.equal(later[0], again[0])
    assert torch.equal(later[1], again[1])
    assert not torch.equal(later[0], data.batch(700, 4, seed=6)[0])
    epoch = data.n_windows
    orders = [[int(data.batch(e * epoch + i, 1)[0][0, 0]) for i in range(epoch)] for e in range(2)]
    assert orders[0] != orders[1]


def test_token_files_hold_the_documents_each_ended_by_eos(tokenizer: Tokenizer, sanguo: Path, tmp_path: Path) -> None:
    manifest = prepare_dataset(sanguo, tokenizer, tmp_path / "d", progress=False)
    assert manifest["dtype"] == "<u2"
    by_split: dict[str, list[str]] = {"train": [], "val": []}
    for source in manifest["sources"]:
        by_split[source["split"]].append((sanguo / source["path"]).read_text(encoding="utf-8"))
    assert 0.02 < len(by_split["val"]) / 120 < 0.1
    for split, texts in by_split.items():
        data = TokenDataset(tmp_path / "d", split, 64)
        ends = data.offsets[1:]
        assert (data.tokens[ends - 1] == tokenizer.eos_id).all()
        documents = [tokenizer.decode(data.tokens[a:b]) for a, b in zip(data.offsets, ends, strict=False)]
        assert documents == texts
        counts = manifest["splits"][split]
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        assert counts["characters"] == sum(map(len, texts))
        assert data.bytes_per_token == counts["bytes"] / len(data.tokens)


@settings(deadline=None, max_examples=examples(100))
@given(st.sets(st.text(min_size=1, max_size=8), min_size=40, max_size=60), st.sets(st.text(min_size=1, max_size=8)))
def test_adding_files_moves_none_of_the_old_ones(old: set[str], new: set[str]) -> None:
    before, after = _held_out(sorted(old), 0.3), _held_out(sorted(old | new), 0.3)
    assert before == after & old


def test_two_documents_are_one_each_and_one_is_split_by_position(tokenizer: Tokenizer, tmp_path: Path) -> None:
    two = prepare_dataset(corpus(tmp_path / "two", a="玄德曰", b="孔明曰"), tokenizer, tmp_path / "d2", progress=False)
    assert [two["splits"][split]["documents"] for split in ("train", "val")] == [1, 1]
    text = "却说曹操引军追赶，𠮷龘大败而回。\n" * 40
    one = prepare_dataset(corpus(tmp_path / "one", a=text), tokenizer, tmp_path / "d1", 0.25, progress=False)
    assert one["split_by"] == "position"
    parts = [tokenizer.decode(TokenDataset(tmp_path / "d1", split, 8).tokens) for split in ("train", "val")]
    assert "".join(parts) == text
    assert len(parts[1]) / len(text) == pytest.approx(0.25, abs=0.01)
    assert sum(one["splits"][split]["bytes"] for split in ("train", "val")) == len(text.encode())


def test_unchanged_input_is_left_alone_and_any_change_is_seen(
    tokenizer: Tokenizer, english: Path, tmp_path: Path
) -> None:
    texts, folder = corpus(tmp_path / "t", a="one " * 50, b="two " * 50, c="three " * 50), tmp_path / "d"

    def prepare(fraction: float = 0.3) -> tuple[dict[str, object], int]:
        manifest = prepare_dataset(texts, tokenizer, folder, fraction, progress=False)
        return manifest, (folder / "train.bin").stat().st_ino

    first = prepare()
    assert prepare() == first
    (texts / "a.txt").write_text("uno " * 50)
    changed = prepare()
    assert changed[0] != first[0]
    assert prepare(0.6)[0]["val_fraction"] == 0.6
    with open(folder / "train.bin", "ab") as file:
        file.write(b"x")
    prepare(0.6)
    assert TokenDataset(folder, "train", 8).tokens is not None


def test_an_interrupted_preparation_is_no_data_set_and_is_repaired(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = corpus(tmp_path / "t", a="one " * 50, b="two " * 50)
    prepare_dataset(texts, tokenizer, tmp_path / "d", progress=False)
    (tmp_path / "d" / "meta.json").unlink()
    (tmp_path / "d" / ".train.bin.tmp").write_bytes(b"half")
    with pytest.raises(DatasetError, match="02_dataset"):
        TokenDataset(tmp_path / "d", "train", 4)
    prepare_dataset(texts, tokenizer, tmp_path / "d", progress=False)
    assert len(TokenDataset(tmp_path / "d", "train", 4).tokens) > 4


def test_damaged_token_files_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "d", np.arange(100), vocab_size=100)
    with pytest.raises(DatasetError, match="100 tokens; context_size=100 needs 101"):
        TokenDataset(folder, "train", 100)
    with pytest.raises(DatasetError, match="context_size=0"):
        TokenDataset(folder, "train", 0)
    with pytest.raises(DatasetError, match="split='test'"):
        TokenDataset(folder, "test", 8)
    written(tmp_path / "high", np.arange(100), vocab_size=99)
    with pytest.raises(DatasetError, match=r"train.bin holds the id 99"):
        TokenDataset(tmp_path / "high", "train", 8).batch(0, 13)
    (folder / "train.bin").write_bytes(b"\0" * 399)
    with pytest.raises(DatasetError, match=r"train.bin is damaged: it has 399 bytes, not 400"):
        TokenDataset(folder, "train", 8)
    assert len(TokenDataset(folder, "val", 8).tokens) == 100
    (folder / "train.bin").unlink()
    with pytest.raises(DatasetError, match=r"train.bin is missing; run 02_dataset again"):
        TokenDataset(folder, "train", 8)
    for content in ("", "{", "[]", '{"format_version": 2}', '{"format_version": 2, "sha256": 3}'):
        (folder / "meta.json").write_text(content)
        with pytest.raises(DatasetError, match=r"meta.json"):
            TokenDataset(folder, "train", 8)
    written(folder, np.arange(100))
    manifest = json.loads((folder / "meta.json").read_text())
    seal(folder, {**manifest, "format_version": 1})
    with pytest.raises(DatasetError, match="format version 1; this code reads 2; run 02_dataset again"):
        TokenDataset(folder, "train", 8)


@settings(deadline=None, max_examples=examples(300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["meta.json", "train.bin", "train.offsets", "train.hashes"]),
    place=st.integers(0, 700),
    damage=st.one_of(st.just(None), st.binary(min_size=1, max_size=40)),
)
def test_any_damage_to_a_data_set_is_an_error_or_none(
    tmp_path: Path, name: str, place: int, damage: bytes | None
) -> None:
    """A file cut short, or with other bytes in it: never another text, never another kind of error."""
    folder = written(tmp_path, np.arange(50))
    content = bytearray((folder / name).read_bytes())
    place %= len(content)
    content[place:] = damage + content[place + len(damage) :] if damage else b""
    (folder / name).write_bytes(content)
    try:
        data = TokenDataset(folder, "train", 7)
        ids = data.read(0, 50).tolist()
    except DatasetError as error:
        assert str(folder) in str(error)
    else:
        assert (ids, data.bytes_per_token, data.vocab_size) == ([*range(50)], 3.0, 70_000)


def test_odd_files_are_read_or_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = corpus(tmp_path / "t", plain="玄德\n", crlf="孔\r\n明\r", empty="", one="曹")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + "关公".encode())
    (folder / "nested").mkdir()
    (folder / "nested" / "loop").symlink_to(folder)
    (folder / "nested" / "deep.TXT").write_text("张飞")
    manifest = prepare_dataset(folder, tokenizer, tmp_path / "d", 0.001, progress=False)
    splits = {source["path"]: source["split"] for source in manifest["sources"]}
    assert splits.pop("empty.txt") == "empty"
    assert set(splits) == {"plain.txt", "crlf.txt", "one.txt", "bom.txt", "nested/deep.TXT"}
    stored = "".join(tokenizer.decode(np.fromfile(tmp_path / "d" / f"{s}.bin", "<u2")) for s in ("train", "val"))
    assert sorted(stored) == sorted("玄德\n孔\n明\n曹关公张飞")


def test_unreadable_files_are_all_named_or_left_out_on_request(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "t", one="玄德", two="孔明", three="关公"), tmp_path / "d"
    before = prepare_dataset(folder, tokenizer, out, 0.4, progress=False)
    (folder / "gbk.txt").write_bytes(b"abc" + "曹操".encode("gbk"))
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    with pytest.raises(ValueError, match="5 of 8 texts in data_dir=.* cannot be read: ") as caught:
        prepare_dataset(folder, tokenizer, out, progress=False)
    for fault in (
        "gbk.txt.*encoding",
        "pipe.txt: it is not a regular file",
        r"\\xff.txt",
        "errors=skip",
    ):
        assert re.search(fault, str(caught.value))
    assert verify_dataset(out) == before  # nothing was touched
    after = prepare_dataset(folder, tokenizer, out, errors="skip", progress=False)
    assert (after["val_fraction"], after["splits"]) == (0.4, before["splits"])
    assert set(after["refused"]) == {"gbk.txt", "gone.txt", "loop.txt", "pipe.txt", r"\xff.txt"}
    assert prepare_dataset(folder, tokenizer, out, progress=False) == after  # goes on as it was told
    for name in ("one", "two", "three"):
        (folder / f"{name}.txt").unlink()
    with pytest.raises(ValueError, match="5 of 5 texts"):
        prepare_dataset(folder, tokenizer, out, errors="skip", progress=False)


def test_ten_thousand_nested_files_are_found_once_each(tmp_path: Path) -> None:
    for number in range(100):
        folder = tmp_path / f"{number % 7}" / f"{number}"
        folder.mkdir(parents=True)
        for file in range(100):
            (folder / f"{file}.txt").touch()
        (folder / "up").symlink_to(tmp_path)
    found = find_texts(tmp_path)
    assert len(found) == len({os.path.realpath(path) for path in found}) == 10_000


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(tokenizer: Tokenizer, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DatasetError, match="val_fraction"):
        prepare_dataset(corpus(tmp_path / "t", a="x"), tokenizer, tmp_path / "d", fraction)


def test_folders_without_text_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_dir=.*not a folder"):
        prepare_dataset(tmp_path / "none", tokenizer, tmp_path / "d")
    with pytest.raises(FileNotFoundError, match=r"no text \(.txt, .*found: nothing"):
        prepare_dataset(tmp_path, tokenizer, tmp_path / "d")
    with pytest.raises(DatasetError, match="the 2 texts in data_dir=.* are empty"):
        prepare_dataset(corpus(tmp_path / "t", a="", b=""), tokenizer, tmp_path / "d", progress=False)
