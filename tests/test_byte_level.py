"""Byte-level BPE from a tokenizer.json: nothing is lost, and what would lose text is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from llmcore.byte_level import PRE_TOKENIZERS
from llmcore.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.texts import cut_text
from llmcore.dataset import TokenDataset
from llmcore.formats.gguf import from_gguf, to_gguf
from llmcore.formats.hf_tokenizer import open_tokenizer_json, tokenizer_json
from llmcore.formats.huggingface import from_hf, to_hf
from llmcore.formats.llama2c import to_llama2c
from llmcore.formats.shared import FormatError
from llmcore.generate import generate, stream
from llmcore.notebook.explorers import TokenExplorer
from llmcore.notebook.safe_html import piece_text
from llmcore.tokenizer import Tokenizer, TokenizerError

from .helpers import ROOT, examples
from .test_export import LlamaCpp, made
from .test_tokenizer import STRANGE, stream_of
from .test_untrusted import edit_json

NASTY = " '’sStTrRveEmMlLdD.,!?-_\n\r\t\u3000\u00a0\u2028\x1c\x85曹操曰，。123½٣Ⅷéªe\u0301ſK🐉\u200d<|end|>▁\0"
TEXTS = st.one_of(st.text(max_size=40), st.text(alphabet=NASTY, max_size=40))
SPACED = "they're we've I'LL 'tis\n \n  x\r\n\r\n 12345 2024\n\n\n\t\t."
SPECIAL = {
    "eos_token": "<|end|>",
    "bos_token": {"content": "<|begin|>", "__type": "AddedToken"},
    "pad_token": "<|end|>",
}


@pytest.fixture(scope="module")
def descriptions(english: Path, sanguo: Path) -> dict[str, dict[str, Any]]:
    """The content of a small tokenizer.json for each pre-tokenizer, learned from a little English and Chinese."""
    texts = [file.read_text(encoding="utf-8")[:20_000] for file in (english / "story-0.txt", sanguo / "001.txt")]
    texts.append(SPACED * 300)  # so that there are pieces of white space, digits and contractions
    learned = {}
    for name, (steps, whole_words) in PRE_TOKENIZERS.items():
        empty = {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": whole_words}
        steps = [{**step, "trim_offsets": True} for step in steps]
        pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        theirs = tokenizers.Tokenizer.from_str(json.dumps({"model": empty, "pre_tokenizer": pre_tokenizer}))
        theirs.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
            special_tokens=["<|begin|>", "<|end|>"],
        )  # fmt: skip
        theirs.train_from_iterator(texts, trainer)
        theirs.add_tokens([tokenizers.AddedToken("<think>", normalized=False, special=False)])
        learned[name] = json.loads(theirs.to_str())
    return learned


def written(folder: Path, description: dict[str, Any], special: dict[str, Any] | None = SPECIAL) -> Path:
    """The folder with a tokenizer.json, and the special tokens beside it."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    if special is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def opened(
    descriptions: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Tokenizer, Any]]:
    """Each tokenizer, opened by us and by transformers."""
    folder, both = tmp_path_factory.mktemp("opened"), {}
    for name, description in descriptions.items():
        file = written(folder / name, description, {**SPECIAL, "split_special_tokens": True})
        both[name] = Tokenizer(file), AutoTokenizer.from_pretrained(file.parent)
    return both


@settings(deadline=None, max_examples=examples(150))
@given(TEXTS)
@example("<|end|><|begin|> <think> </think>")
@example("\x00\ufeff\u3000▁ \u2581\U0010ffff\ud7ff")
@example("I'll we'Re 'ſ\r\n\r\n  12345 ")
def test_any_text_comes_back_with_the_ids_of_transformers(opened: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    for name, (tokenizer, theirs) in opened.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, name
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], name
        assert not {tokenizer.eos_id, tokenizer.bos_id} & set(ids), name
        assert tokenizer.encode_batch([text, ""]) == [ids, []], name
        assert tokenizer.encode_array(text).tolist() == ids and tokenizer.encode_array(text).dtype == np.int32
        assert "".join(stream_of(tokenizer, ids)) == text, name
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize("text", STRANGE)
def test_strange_text_comes_back_too(opened: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    assert all(tokenizer.decode(tokenizer.encode(text, eos=True)) == text for tokenizer, _ in opened.values())


@settings(deadline=None, max_examples=examples(300))
@given(st.one_of(TEXTS, st.text(max_size=6)), st.integers(1, 5))
@example(SPACED, 1)
def test_a_text_may_be_cut_at_safe_places(opened: dict[str, tuple[Tokenizer, Any]], text: str, size: int) -> None:
    for name, (tokenizer, _) in opened.items():
        pairs = tokenizer.inner_pairs()
        for place in range(1, len(text)):
            if text[place - 1 : place + 1] not in pairs:
                parts = tokenizer.encode(text[:place]) + tokenizer.encode(text[place:])
                assert parts == tokenizer.encode(text), (name, place)
        assert "".join(cut_text([text], pairs, size)) == text


def test_safe_places_are_there_and_of_an_unknown_pre_tokenizer_none(
    opened: dict[str, tuple[Tokenizer, Any]], descriptions: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    for tokenizer, _ in opened.values():
        pairs = tokenizer.inner_pairs()
        assert not any(pair in pairs for pair in ("说，", "d ", "d.", "7\u3000", "d<"))
        assert all(pair in pairs for pair in ("ab", " a", "，说", "'s", "\n\n", ".\n", "  "))
        assert tokenizer.byte_level is not None
        joined = tokenizer.byte_level.inner_pairs.pre_tokenizer.pre_tokenize_str
        letters = [pair for pair in ("a\ua7cd", "a\u1c89", "aé") if len(joined(pair)) == 1]  # Python may know fewer
        assert letters and all(pair in pairs for pair in letters)
    other = copy.deepcopy(descriptions["qwen2"])
    other["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+( \p{L}+)?|\s+"}  # joins words
    tokenizer = Tokenizer(written(tmp_path, other))
    assert tokenizer.decode(tokenizer.encode("the old captain，说")) == "the old captain，说"
    assert "d " in tokenizer.inner_pairs() and "说，" in tokenizer.inner_pairs()


def test_special_ids_come_from_the_files_beside_it_and_go_along(
    descriptions: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    first = Tokenizer(written(tmp_path / "a", descriptions["gpt-2"]))
    assert (first.pad_id, first.unk_id, first.bos_id, first.eos_id) == (1, -1, 0, 1)
    assert first.vocab_size == 901 and first.id_to_piece(900) == "<think>" and first.id_to_bytes(900) == b"<think>"
    (tmp_path / "alone.json").write_bytes(first.model_bytes)
    alone = Tokenizer(tmp_path / "alone.json")
    assert (alone.fingerprint, alone.eos_id) == (first.fingerprint, 1)
    assert Tokenizer(tmp_path / "alone.json", alone.model_bytes).fingerprint == first.fingerprint

    by_id = written(tmp_path / "b", descriptions["gpt-2"], None)
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json' has no piece that ends a text .*tokenizer_config\.json"
    ):
        Tokenizer(by_id)
    (tmp_path / "b" / "config.json").write_text(json.dumps({"eos_token_id": [1, 0], "bos_token_id": None}))
    assert Tokenizer(by_id).eos_id == 1 and Tokenizer(by_id).bos_id == -1
    with pytest.raises(TokenizerError, match="special token '!' can come from plain text"):
        Tokenizer(written(tmp_path / "c", descriptions["gpt-2"], {"eos_token": "!"}))


def test_half_a_character_is_shown_and_streamed_as_such(opened: dict[str, tuple[Tokenizer, Any]]) -> None:
    for tokenizer, _ in opened.values():
        halves = [id for id in range(tokenizer.vocab_size) if tokenizer.is_byte(id)]
        assert all(b"\xff" in tokenizer.id_to_bytes(id) or "�" in tokenizer.decode([id]) for id in halves)
        [shown] = [piece_text(tokenizer, id) for id in halves if tokenizer.id_to_bytes(id) == b"\xe4"]
        assert shown == "⟨E4⟩"
        assert all(piece_text(tokenizer, id) for id in range(tokenizer.vocab_size))
        [dragon] = [tokenizer.encode("🐉")]
        assert all(map(tokenizer.is_byte, dragon))
    explorer = TokenExplorer({"bytes": opened["gpt-2"][0]}, "曹 🐉")
    assert "⟨F0" in explorer.result.value


def test_a_model_writes_the_same_text_in_pieces_and_at_once(opened: dict[str, tuple[Tokenizer, Any]]) -> None:
    tokenizer = opened["llama-bpe"][0]
    model = made(tokenizer, vocab_size=950).model  # more ids than the tokenizer
    pieces = list(stream(model, tokenizer, "曹操", 60, seed=1))
    assert "".join(pieces) == generate(model, tokenizer, "曹操", 60, seed=1)


def test_a_data_set_holds_the_ids_of_whole_texts(
    opened: dict[str, tuple[Tokenizer, Any]], sanguo: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(2):
        chapters = [sanguo / f"{number * 8 + one:03}.txt" for one in range(1, 9)]
        long = "".join(file.read_text(encoding="utf-8") for file in chapters)
        assert len(long) > 33_000  # of which 16,384 characters are encoded at a time
        (texts / f"{number}.txt").write_text(long + "<|end|> <think>", encoding="utf-8")
    for name, (tokenizer, _) in opened.items():
        manifest = prepare_dataset(texts, tokenizer, tmp_path / name, 0.5, progress=False, clean=False)
        assert (manifest["tokenizer"], manifest["vocab_size"]) == (tokenizer.fingerprint, tokenizer.vocab_size)
        found = []
        for split in ("train", "val"):
            data = TokenDataset(tmp_path / name, split)
            found += [data.read(start, end).tolist() for start, end in pairwise(data.offsets.tolist())]
        expected = [tokenizer.encode(file.read_text(encoding="utf-8"), eos=True) for file in texts.iterdir()]
        assert sorted(found) == sorted(expected), name


def test_a_checkpoint_keeps_it_as_tokenizer_json(opened: dict[str, tuple[Tokenizer, Any]], tmp_path: Path) -> None:
    tokenizer = opened["qwen2"][0]
    model = made(tokenizer).model
    path = save_checkpoint(tmp_path, model, tokenizer, step=1, loss=3.0, config={"tokenizer": tokenizer.fingerprint})
    assert (path / "tokenizer.json").read_bytes() == tokenizer.model_bytes and not (path / "tokenizer.model").exists()
    back = load_checkpoint(path, device="cpu").tokenizer
    assert back is not None and back.fingerprint == tokenizer.fingerprint
    assert back.encode("曹操 said <|end|>") == tokenizer.encode("曹操 said <|end|>")
    (path / "tokenizer.json").write_bytes(tokenizer.model_bytes.replace(b"<think>", b"<thimk>"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged: its hash differs"):
        load_checkpoint(path, device="cpu")


def test_a_checkpoint_with_two_tokenizers_is_refused(
    opened: dict[str, tuple[Tokenizer, Any]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, made(opened["qwen2"][0]).model, tokenizer, step=1, loss=3.0)
    (path / "tokenizer.json").write_bytes(opened["qwen2"][0].model_bytes)
    with pytest.raises(CheckpointError, match=r"holds tokenizer\.json, which its manifest\.json does not list"):
        load_checkpoint(path, device="cpu")
    edit_json(path / "manifest.json", ("sha256", "tokenizer.json"), opened["qwen2"][0].fingerprint)
    with pytest.raises(CheckpointError, match=r"two tokenizers, tokenizer\.model and tokenizer\.json"):
        load_checkpoint(path, device="cpu")


# What cannot be opened


def edited(*place: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one field of a description."""

    def edit(description: Any) -> None:
        for key in place[:-1]:
            description = description[key]
        description[place[-1]] = value

    return edit


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unigram": (edited("model", value={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}), "type Unigram"),
    "wordpiece": (edited("model", "type", value="WordPiece"), "type WordPiece"),
    "suffix": (edited("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix='</w>'"),
    "normalizer": (edited("normalizer", value={"type": "NFKC"}), "normalizer NFKC"),
    "lowercase": (
        edited("normalizer", value={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        "normalizer Sequence",
    ),
    "prefix-space": (edited("pre_tokenizer", "add_prefix_space", value=True), "ByteLevel does not keep the text"),
    "white-space": (edited("pre_tokenizer", value={"type": "Whitespace"}), "Whitespace does not keep the text"),
    "no-pre-tokenizer": (edited("pre_tokenizer", value=None), "pre-tokenizer None"),
    "nested": (
        edited("pre_tokenizer", value={"type": "Sequence", "pretokenizers": [{"type": "Sequence"}]}),
        "Sequence does not",
    ),
    "removing": (
        lambda one: one["pre_tokenizer"].update(
            type="Sequence",
            pretokenizers=[{"type": "Split", "behavior": "Removed"}, copy.deepcopy(one["pre_tokenizer"])],
        ),
        "Split does not keep the text",
    ),
    "space-missing": (lambda one: one["model"]["vocab"].pop("Ġ"), "no pieces|not a tokenizer.json"),
    "byte-missing": (lambda one: one["model"]["vocab"].update({"[Ç]": one["model"]["vocab"].pop("Ç")}), "bytes C7"),
    "special-from-text": (lambda one: one["added_tokens"][1].update(content="he"), "'he'"),
    "spaces-eaten": (lambda one: one["added_tokens"][2].update(lstrip=True), "'<think>' depends on the text around"),
    "other-id": (lambda one: one["added_tokens"][2].update(id=2000), "'<think>' has the id 900, not 2000"),
    "far-id": (lambda one: one["model"]["vocab"].update({"<think>": 1 << 31}), r"ids up to 2,147,483,649"),
    "same-id": (lambda one: one["model"]["vocab"].update({"zzz": 5}), "some perhaps twice"),
    "half-a-surrogate": (lambda one: one["model"]["vocab"].update({"\ud800": 902}), "surrogates"),
    "unknown-merge": (lambda one: one["model"]["merges"].append(["Q", "zzzz"]), "not a tokenizer.json"),
    "ids-of-text": (lambda one: one["model"]["vocab"].update({"a": "b"}), "not a tokenizer.json"),
    "no-model": (lambda one: one.pop("model"), "not a tokenizer.json"),
    "added-numbers": (edited("added_tokens", value=[1, 2]), "not a tokenizer.json"),
    "bad-regex": (
        lambda one: one["pre_tokenizer"].update(
            type="Sequence",
            pretokenizers=[
                {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
                copy.deepcopy(one["pre_tokenizer"]),
            ],
        ),
        "not a tokenizer.json",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_lose_text_is_refused_by_name(
    kind: str, descriptions: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    edit, words = REFUSED[kind]
    description = copy.deepcopy(descriptions["gpt-2"])
    edit(description)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json' cannot be used: .*(?:{words})"):
        Tokenizer(file)


def test_dropout_padding_and_truncation_are_switched_off(
    descriptions: dict[str, dict[str, Any]], opened: dict[str, tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    description = copy.deepcopy(descriptions["gpt-2"])
    description["model"]["dropout"] = 0.9
    description["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(written(tmp_path, description))
    text = "the old captain said " * 5
    assert tokenizer.encode(text) == opened["gpt-2"][0].encode(text)


def test_a_unicode_normalisation_is_left_out_with_a_word(
    descriptions: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    file = written(tmp_path, {**descriptions["qwen2"], "normalizer": {"type": "NFC"}})
    with pytest.warns(UserWarning, match="NFC.* is left out"):
        tokenizer = Tokenizer(file)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "e\u0301"
    file.write_bytes(tokenizer.model_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tokenizer(file).fingerprint == tokenizer.fingerprint


def test_rare_characters_without_pieces_become_visible_with_a_word(
    descriptions: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in SmolLM2: some control characters, and the planes of Unicode that nobody uses."""
    description = copy.deepcopy(descriptions["gpt-2"])
    vocab = description["model"]["vocab"]
    for letter in (chr(0x100 + 0x13), "ñ"):  # the bytes 13 and F1
        vocab[f"[{letter}]"] = vocab.pop(letter)
    tokenizer = Tokenizer(written(tmp_path, description))
    monkeypatch.setattr("llmcore.files._warned", set())
    with pytest.warns(UserWarning, match=r"no pieces for.* becomes U\+FFFD"):
        assert tokenizer.decode(tokenizer.encode("a\x13b\U00040000\U0007ffffc")) == "a\ufffdb\ufffd\ufffdc"
    fine = "a\x12b\x14\U0003ffff\U00080000ñ"
    assert tokenizer.decode(tokenizer.encode(fine)) == fine


@settings(deadline=None, max_examples=examples(80))
@given(data=st.data())
def test_a_damaged_tokenizer_json_is_an_error_or_still_loses_nothing(
    data: st.DataObject, descriptions: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    description = copy.deepcopy(descriptions[data.draw(st.sampled_from(sorted(descriptions)))])
    odd = st.sampled_from([None, True, -1, 1 << 40, 0.5, "", "x", "\ud800", [], [1], {}, {"type": "x"}, {"a": {}}])
    for _ in range(data.draw(st.integers(1, 2))):
        place: Any = description
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                place[key] = copy.deepcopy(data.draw(odd))
                break
            place = inner
    file = tmp_path_factory.mktemp("damaged") / "tokenizer.json"
    file.write_text(json.dumps(description))
    file.with_name("tokenizer_config.json").write_text(json.dumps(SPECIAL))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = Tokenizer(file)
        text = "the 12 captains 曹操\n\n  <|end|>"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    except TokenizerError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"model": 1}', b"{" * 100_000, b'{"a":' * 50_000])
def test_what_is_no_tokenizer_json_at_all_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")


# Other programs


def test_exports_keep_the_ids_and_come_back(opened: dict[str, tuple[Tokenizer, Any]], tmp_path: Path) -> None:
    text = "I'll say  曹操曰：“12345”\n\n<|end|><think>\u3000\u2581"
    for name, (tokenizer, _) in opened.items():
        ours, folder, file = made(tokenizer, vocab_size=910), tmp_path / name, tmp_path / f"{name}.gguf"
        to_hf(ours, folder)
        assert not (folder / "tokenizer.model").exists()
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text), name
        assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)
        back = from_hf(folder, device="cpu").tokenizer
        assert back is not None and back.fingerprint == tokenizer.fingerprint
        back = from_gguf(to_gguf(ours, file), device="cpu").tokenizer
        assert back is not None and back.encode(text) == tokenizer.encode(text) and back.vocab_size == 901
        assert (back.pad_id, back.unk_id, back.bos_id, back.eos_id) == (1, -1, 0, 1)
        assert back.byte_level is not None and back.byte_level.pre_name == name
        with pytest.raises(FormatError, match="no room for byte-level BPE"):
            to_llama2c(ours, tmp_path / "model.bin")


def test_llama_cpp_has_no_name_for_any_other_pre_tokenizer(
    descriptions: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    other = copy.deepcopy(descriptions["qwen2"])
    other["model"]["ignore_merges"] = True
    with pytest.raises(FormatError, match="no name for the tokenizer's pre-tokenizer"):
        to_gguf(made(Tokenizer(written(tmp_path, other))), tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def programs(opened: dict[str, tuple[Tokenizer, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, LlamaCpp]:
    folder = tmp_path_factory.mktemp("programs")
    return {name: LlamaCpp(to_gguf(made(one), folder / f"{name}.gguf")) for name, (one, _) in opened.items()}


@settings(deadline=None, max_examples=examples(100))
@given(TEXTS)
@example("I'll we'Re 12345 ²½\r\n\r\n  x\u3000 曹操曰：“<|end|> <think>”")
def test_llama_cpp_cuts_into_the_same_ids(
    opened: dict[str, tuple[Tokenizer, Any]], programs: dict[str, LlamaCpp], text: str
) -> None:
    text = text.replace("ſ", "")  # after an apostrophe it is a small s to the original pattern, not to llama.cpp's
    for name, (tokenizer, _) in opened.items():
        assert programs[name].tokenize(text) == tokenizer.encode(text), name


# Folders of Llama 2 and TinyLlama: a SentencePiece model as tokenizer.json


@pytest.fixture(scope="module")
def llama2(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama2")
    sentencepiece.SentencePieceTrainer.train(
        input=sorted(map(str, english.glob("*.txt"))), model_prefix=str(folder / "llama"), vocab_size=420,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return Tokenizer(folder / "llama.model")


def as_llama2(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json that Hugging Face's converter makes of Llama 2's model."""
    ours = json.loads(tokenizer_json(tokenizer.model_proto()))
    vocab = {piece.replace(" ", "▁"): id for piece, id in ours["model"]["vocab"].items()}
    ours["model"] |= {"vocab": vocab, "fuse_unk": True, "unk_token": "<unk>"}
    ours["model"]["merges"] = [[a.replace(" ", "▁"), b.replace(" ", "▁")] for a, b in ours["model"]["merges"]]
    replace = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs = tokenizers.Tokenizer(BPE())
    theirs.normalizer = replace
    return {**ours, "normalizer": json.loads(theirs.to_str())["normalizer"]}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


SOME = ["The old captain", " rain  and \n tea", "écolé 曹操", "a</s>b", "12.5", "t" * 50, "", "\0\u3000"]
LEFT_OUT = "puts a space before each text. This is left out"


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "ours"])
def test_a_folder_of_llama_2_opens_by_its_tokenizer_json(
    kind: str, llama2: Tokenizer, english: Path, tmp_path: Path
) -> None:
    description = as_llama2(llama2)
    if kind == "metaspace":
        description |= {"normalizer": None, "pre_tokenizer": METASPACE}
    if kind == "ours":  # spaces in the pieces, as `to_hf` writes them
        description = json.loads(tokenizer_json(llama2.model_proto()))
    to_hf(made(None, vocab_size=420), tmp_path)
    written(tmp_path, description, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    with contextlib.nullcontext() if kind == "ours" else pytest.warns(UserWarning, match=LEFT_OUT):
        back = from_hf(tmp_path, device="cpu").tokenizer
    assert back is not None and back.file_name == "tokenizer.model"
    assert (back.unk_id, back.bos_id, back.eos_id, back.vocab_size) == (0, 1, 2, 420)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(description))
    theirs.encode_special_tokens = True
    for text in [*SOME, (english / "story-0.txt").read_text(encoding="utf-8")[:3000]]:
        ids, newline = back.encode(text), back.encode("\n")
        assert ids == theirs.encode("\n" + text, add_special_tokens=False).ids[len(newline) + (kind != "ours") :]
        assert back.decode(ids) == text
    assert back.decode(back.encode("▁ ▁")) == "▁ ▁"


@pytest.mark.parametrize("way", ["hf", "gguf"])
def test_the_space_that_llama_2_puts_in_front_is_left_out_with_a_word(
    way: str, llama2: Tokenizer, tmp_path: Path
) -> None:
    ours = made(llama2)
    if way == "hf":
        with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
            to_hf(ours, tmp_path / way)
    else:
        to_gguf(ours, tmp_path / way)
    assert LlamaCpp(to_gguf(ours, tmp_path / "model.gguf")).tokenize("x") == llama2._processor.encode("x")
    with pytest.warns(UserWarning, match=LEFT_OUT):
        back = (from_hf if way == "hf" else from_gguf)(tmp_path / way, device="cpu").tokenizer
    assert back is not None and (back.vocab_size, back.unk_id, back.bos_id, back.eos_id) == (420, 0, 1, 2)
    assert all(back.decode(back.encode(text)) == text for text in SOME)
    with warnings.catch_warnings():  # from then on it is a tokenizer as ours
        warnings.simplefilter("error")
        again = from_hf(to_hf(made(back), tmp_path / "again"), device="cpu").tokenizer
    assert again is not None and again.fingerprint == back.fingerprint


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited("normalizer", "normalizers", value=[{"type": "NFKC"}]), "its NFKC changes"),
        (edited("normalizer", "normalizers", value=[{"type": "Prepend", "prepend": "x"}]), "its Prepend changes"),
        (edited("pre_tokenizer", value={**METASPACE, "split": True}), "its Metaspace changes or cuts"),
        (lambda one: one["model"]["merges"].pop(), "merges are not those"),
        (lambda one: one["model"]["vocab"].update({"zz": 1000}), "leave some out"),
        (lambda one: one["added_tokens"].append(7), "TypeError"),
        (edited("model", "merges", value=5), "TypeError"),
    ],
)
def test_a_tokenizer_json_that_no_sentencepiece_model_equals_is_refused(
    edit: Callable[[dict[str, Any]], Any], words: str, llama2: Tokenizer, tmp_path: Path
) -> None:
    description = as_llama2(llama2)
    edit(description)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json cannot be used: .*{words}"):
        open_tokenizer_json(written(tmp_path, description))


def test_the_tokenizer_that_fits_the_model_is_taken(
    opened: dict[str, tuple[Tokenizer, Any]], tokenizer: Tokenizer, llama2: Tokenizer, tmp_path: Path
) -> None:
    ours = opened["gpt-2"][0]
    to_hf(made(ours), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(llama2.model_bytes)  # 420 ids fit into the model's 901
    assert from_hf(tmp_path, device="cpu").tokenizer.vocab_size == 420  # type: ignore[union-attr]
    for other in (tokenizer.model_bytes, b"IQ== 0\nIg== 1\n"):  # 4,000 ids do not; nor does Llama 3's own kind of file
        (tmp_path / "tokenizer.model").write_bytes(other)
        assert from_hf(tmp_path, device="cpu").tokenizer.fingerprint == ours.fingerprint  # type: ignore[union-attr]


@pytest.mark.slow
def test_its_library_is_loaded_only_where_it_is_needed() -> None:
    code = "import sys, llmcore.checkpoint, llmcore.generate; print('tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
