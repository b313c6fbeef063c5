"""Exports opened by the programs they are for, and imports of what those programs write."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmcore.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.files import PROJECT_ROOT
from llmcore.formats.gguf import to_gguf
from llmcore.formats.huggingface import _hf_config, _model_config, from_hf, to_hf
from llmcore.formats.llama2c import check_run, speed_of_run, to_llama2c
from llmcore.formats.meta import from_meta
from llmcore.formats.shared import FormatError
from llmcore.generate import generate_ids
from llmcore.measure.evaluate import evaluate
from llmcore.tokenizer import Tokenizer

from .helpers import examples, random_ids, tiny_model
from .run_c import run_c_program

# tied or not, grouped queries or not, weights in float32 or bfloat16
MATRIX = [
    pytest.param({"tie_embeddings": tie, "n_kv_heads": heads}, dtype, id=f"{'tied' if tie else 'untied'}-{name}-{kind}")
    for tie, (heads, name), (dtype, kind) in itertools.product(
        (True, False), ((4, "MHA"), (2, "GQA")), ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    )
]
matrix = pytest.mark.parametrize(("shape", "dtype"), MATRIX)
CONTEXT = 96

# our close relatives: pairs of the rotary embedding are slowed by the whole factor, by part of it, and not at all
SCALED: dict[str, Any] = {"rope_scaling_factor": 8.0, "rope_low_freq_factor": 0.5, "rope_original_max_seq_len": 32}
RELATIVES: dict[str, dict[str, Any]] = {
    "llama3": {"head_dim": 16, "n_kv_heads": 2, "rope_theta": 500.0, **SCALED},
    "llama3-tied": {"tie_embeddings": True, "n_kv_heads": 1, **SCALED},
    "qwen3": {"qk_norm": True, "head_dim": 14, "n_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-5},
    "qwen3-tied": {"qk_norm": True, "tie_embeddings": True},
    "qwen3-llama3": {"qk_norm": True, "head_dim": 12, "n_kv_heads": 1, **SCALED},
}


def made(tokenizer: Tokenizer | None, dtype: torch.dtype = torch.float32, **shape: Any) -> Checkpoint:
    """A checkpoint of a small random model whose logits differ clearly."""
    shape = {"max_seq_len": CONTEXT, **({"vocab_size": tokenizer.vocab_size} if tokenizer else {}), **shape}
    model = tiny_model(std=0.12, **shape).to(dtype).eval()
    model.reset_rope()  # in float32, whatever the weights are
    return Checkpoint(model, tokenizer, {"model": model.config.to_dict()}, 1, Path("made"))


def greedy(checkpoint: Checkpoint, ids: list[int], count: int) -> list[int]:
    """What the model writes after ids, computed in float32."""
    return [id for [id] in generate_ids(checkpoint.model.float(), [ids], count, eos_id=3, temperature=0)]


def assert_same_weights(a: Checkpoint, b: Checkpoint) -> None:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert a.model.config == b.model.config


# All formats


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dummy-prefix": {"add_dummy_prefix": True},
    "squeezed": {"remove_extra_whitespaces": True},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "own-symbols": {"user_defined_symbols": ["<sep>", "\n"]},
    "space-behind": {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
    "no-bytes": {"byte_fallback": False, "vocab_size": 90},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_export_gives_the_same_ids_or_warns(kind: str, english: Path, tmp_path: Path) -> None:
    """What a SentencePiece model may do to a text, and what each program makes of it."""
    sentencepiece.SentencePieceTrainer.train(
        input=sorted(map(str, english.glob("*.txt"))), model_prefix=str(tmp_path / "one"), model_type="bpe",
        **{"vocab_size": 350, "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2,
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, **KINDS[kind]},
    )  # fmt: skip
    ours = made(Tokenizer(tmp_path / "one.model"))
    assert ours.tokenizer
    warned = {}
    for export in (to_hf, to_gguf, to_llama2c):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            export(ours, tmp_path / export.__name__)
        warned[export] = [str(one.message) for one in said if "tokenizer" in str(one.message)]
        assert all(one.filename == __file__ for one in said if "tokenizer" in str(one.message))
    texts = ["the old captain", "a  b", "  x ", "<sep>star<sep>", "ＡＢ １ﬁ", "écolé", "rain\nmap"]
    same = {
        to_hf: bool(warned[to_hf])
        or [AutoTokenizer.from_pretrained(tmp_path / "to_hf")(text)["input_ids"] for text in texts]
        == [ours.tokenizer.encode(text) for text in texts]
    }
    theirs = LlamaCpp(tmp_path / "to_gguf")
    with contextlib.suppress(urllib.error.HTTPError):  # 500: it has no piece
        own = ours.tokenizer._processor.encode
        same[to_gguf] = [theirs.tokenize(text) for text in texts] == [own(text) for text in texts]
    assert same[to_hf]
    assert same.get(to_gguf, False) != bool(warned[to_gguf]), "it warns if and only if the ids differ"
    assert bool(warned[to_llama2c]) == (kind != "plain")


def test_a_failed_llama2c_export_leaves_both_files_as_they_were(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_llama2c(made(tokenizer), tmp_path / "model.bin")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        to_llama2c(made(tokenizer, n_layers=1), tmp_path / "model.bin")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_of_any_name_can_be_exported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = dataclasses.replace(made(tokenizer), path=Path(os.fsdecode(b"run-\xff\n"), "step=1"))
    theirs = LlamaCpp(to_gguf(ours, tmp_path / "model.gguf"))
    assert theirs.tokenize("曹操") == ours.tokenizer.encode("曹操")


# Hugging Face


@matrix
def test_transformers_computes_and_writes_the_same(
    shape: dict[str, Any], dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = made(tokenizer, dtype, **shape)
    folder = to_hf(ours, tmp_path / "hf")
    assert all(tensor.dtype == dtype for tensor in load_file(folder / "model.safetensors").values())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    assert type(theirs) is LlamaForCausalLM
    ids = random_ids(2, 80, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        logits = ours.model.float()(ids)
        assert logits.std() > 0.5
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-5)
    prompt = random_ids(1, 5, vocab_size=tokenizer.vocab_size, seed=1)
    written = theirs.generate(prompt, max_new_tokens=64, do_sample=False)[0, 5:].tolist()
    assert written == greedy(ours, prompt[0].tolist(), 64)


@matrix
def test_there_and_back_every_bit_is_the_same(
    shape: dict[str, Any], dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = made(tokenizer, dtype, **shape)
    back = from_hf(to_hf(ours, tmp_path / "hf"), device="cpu")
    assert_same_weights(ours, back)
    assert back.tokenizer is not None and back.tokenizer.fingerprint == tokenizer.fingerprint


def test_other_head_sizes_and_rotary_bases_go_along(tmp_path: Path) -> None:
    ours = made(None, head_dim=14, n_kv_heads=2, rope_theta=500.0, norm_eps=1e-4)
    folder = to_hf(ours, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids(2, 90)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids), rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match=r"no tokenizer that can be used \(there is none\), so \.tokenizer is None"):
        assert_same_weights(ours, from_hf(folder, device="cpu"))


@pytest.mark.parametrize("kind", RELATIVES)
def test_relatives_open_in_transformers_and_come_back(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = made(tokenizer, **RELATIVES[kind])
    assert ours.model.config.max_seq_len > 2 * SCALED["rope_original_max_seq_len"]
    folder = to_hf(ours, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    assert type(theirs) is (Qwen3ForCausalLM if "qwen3" in kind else LlamaForCausalLM)
    ids = random_ids(2, 90, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids), rtol=0, atol=1e-5)
    assert_same_weights(ours, from_hf(folder, device="cpu"))
    if "llama3" in kind:  # as versions before 5 write it, and find it in the export
        scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
        del scaling["rope_theta"]
        changed(folder, rope_parameters=None, rope_scaling=scaling)
        assert from_hf(folder, device="cpu").model.config == ours.model.config


def test_an_export_can_be_in_another_dtype(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = made(tokenizer)
    half = AutoModelForCausalLM.from_pretrained(to_hf(ours, tmp_path / "hf", torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert ours.model.norm.weight.dtype == torch.float32
    assert torch.equal(half.lm_head.weight, ours.model.output.weight.bfloat16())


@pytest.fixture(scope="module")
def pairs(tokenizer: Tokenizer, english: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Any]]:
    """Tokenizers of ours and the ones that transformers loads from their exports."""
    folder = tmp_path_factory.mktemp("tokenizers")
    files = sorted(english.glob("*.txt"))
    found = []
    for number, one in enumerate((tokenizer, train_tokenizer(files, folder / "english", 400, character_coverage=1.0))):
        exported = to_hf(made(one), folder / str(number))
        found.append((one, AutoTokenizer.from_pretrained(exported, trust_remote_code=False)))
    return found


TEXT = st.text(
    st.one_of(
        st.sampled_from("玄德曰：“此莫非即孔明否？”遂整衣出迎。，　"),
        st.sampled_from("The engine of a distant star was repaired before dawn, “again”."),
        st.sampled_from(" \n\t\r\u3000▁\0<>/s|0xA"),
        st.sampled_from("😀👩\u200d🚀é한ﬁ①"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=examples(400))
@given(text=TEXT)
@example(text="<s></s><unk><pad><0x0A>")
@example(text="  两个空格  \n\n 行首 \t制表　全角\r\n")
@example(text="▁a ▁ b▁")
@example(text="aaaaaaaaaaaa 啊啊啊啊啊啊啊 the the the")
def test_transformers_encodes_and_decodes_text_the_same(text: str, pairs: list[tuple[Tokenizer, Any]]) -> None:
    for ours, theirs in pairs:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_a_whole_chapter_gets_the_same_ids(sanguo: Path, pairs: list[tuple[Tokenizer, Any]]) -> None:
    text = (sanguo / "001.txt").read_text(encoding="utf-8")
    for ours, theirs in pairs:
        assert theirs(text)["input_ids"] == ours.encode(text)


def test_transformers_knows_the_special_ids(pairs: list[tuple[Tokenizer, Any]]) -> None:
    for ours, theirs in pairs:
        named = theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id
        assert named == (ours.pad_id, ours.unk_id, ours.bos_id, ours.eos_id)
        ids = [ours.bos_id, *ours.encode("the star"), ours.eos_id, ours.pad_id]
        assert theirs.decode(ids, skip_special_tokens=True) == "the star"
        assert len(theirs) == ours.vocab_size


def test_a_tokenizer_without_an_exact_equal_goes_as_it_is_with_a_word(english: Path, tmp_path: Path) -> None:
    files = sorted(english.glob("*.txt"))
    unigram = train_tokenizer(files, tmp_path / "one", 350, character_coverage=1.0, model_type="unigram")
    with pytest.warns(UserWarning, match=r"is not BPE: tokenizer\.model is written, but no tokenizer\.json"):
        to_hf(made(unigram), tmp_path / "hf")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    back = from_hf(tmp_path / "hf", device="cpu").tokenizer
    assert back is not None and back.fingerprint == unigram.fingerprint


def test_a_path_does_as_well_as_a_loaded_checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = made(tokenizer)
    save_checkpoint(tmp_path / "run", ours.model, tokenizer, step=7, loss=1.0)
    assert_same_weights(ours, from_hf(to_hf(tmp_path / "run", tmp_path / "hf"), device="cpu"))


MORE = PROJECT_ROOT / "tests" / "tools" / "more_processes.py"


def test_the_script_for_more_processes_is_short_and_named_in_readme() -> None:
    script, readme = MORE.read_text(encoding="utf-8"), (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 40 and "llmcore" not in script
    assert "torchrun --nproc_per_node 2 tests/tools/more_processes.py" in readme


@pytest.mark.slow
def test_an_export_learns_on_in_two_processes_and_comes_back(
    sanguo: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours, held_out = made(tokenizer, max_seq_len=32), [sanguo / "100.txt"]
    to_hf(ours, tmp_path / "hf")
    shutil.copytree(sanguo, tmp_path / "texts", ignore=lambda _, names: [n for n in names if not n < "009"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(MORE)]
    steps = [tmp_path / "hf", tmp_path / "texts", tmp_path / "more", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *steps], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "60 steps of 2 processes" in done.stdout
    back = from_hf(tmp_path / "more", device="cpu")
    assert back.tokenizer is not None and back.tokenizer.fingerprint == tokenizer.fingerprint
    before, after = (evaluate(one.model, tokenizer, held_out, progress=False).total for one in (ours, back))
    assert after.bits_per_byte < before.bits_per_byte - 0.2


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    to_hf(made(None), tmp_path / "hf")
    to_hf(made(None, n_layers=1), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "hf" / "novel.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"hf holds 'novel\.txt', which is not of this export; choose another"):
        to_hf(made(None), tmp_path / "hf")
    assert (tmp_path / "hf" / "novel.txt").read_text() == "mine"


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_hf(made(None), tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmcore.formats.huggingface.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        to_hf(made(None, n_layers=1), tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def theirs_saved(folder: Path, shard: str = "5GB", qwen3: bool = False, **changes: Any) -> Any:
    """A Llama or Qwen3 that transformers itself has made and written, no two weights of its norms the same."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.12, **changes}
    model = Qwen3ForCausalLM(Qwen3Config(**shape)) if qwen3 else LlamaForCausalLM(LlamaConfig(**shape))
    for parameter in model.eval().parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


THEIR_SCALING = {"factor": 8.0, "low_freq_factor": 0.3, "high_freq_factor": 2.0, "original_max_position_embeddings": 16}
THEIRS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2},
    "one-kv-head-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "head-dim": {"head_dim": 14, "num_key_value_heads": 2},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-5},
    "sharded": {"shard": "20KB"},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **THEIR_SCALING}, "head_dim": 16},
    "qwen3": {"qwen3": True, "head_dim": 14, "num_key_value_heads": 2, "rope_theta": 1e6},
    "qwen3-tied": {"qwen3": True, "head_dim": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
}


@pytest.mark.filterwarnings("ignore:.*no tokenizer that can be used")
@pytest.mark.parametrize("kind", THEIRS)
def test_a_llama_that_transformers_wrote_computes_the_same_here(kind: str, tmp_path: Path) -> None:
    theirs = theirs_saved(tmp_path, **THEIRS[kind])
    assert (kind == "sharded") == (tmp_path / "model.safetensors.index.json").exists()
    ours = from_hf(tmp_path, device="cpu")
    ids = random_ids(2, 60)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no tokenizer that can be used")
def test_an_older_config_is_understood(tmp_path: Path) -> None:
    """Versions before 5 write rope_theta at the top, and null where nothing is scaled."""
    theirs_saved(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 500.0, "rope_scaling": None, "pretraining_tp": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = from_hf(tmp_path, device="cpu").model.config
    assert (found.rope_theta, found.head_dim, found.max_seq_len) == (500.0, 8, 64)
    assert from_hf(tmp_path, device="cpu", max_seq_len=16).model.config.max_seq_len == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe', and only 'llama' or 'qwen3' is supported"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types=\['sliding_attention'\]"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
            "type llama3 has no low_freq_factor, high_freq_fac",
        ),
        ({"rope_scaling": {"rope_type": "llama3", **THEIR_SCALING, "factor": 0.5}}, "rope_scaling_factor=0.5 must be"),
        ({"rope_scaling": {"rope_type": "longrope", **THEIR_SCALING}}, "rope_type='longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"hidden_size": None}, "dim"),
        ({"num_attention_heads": 5}, "does not divide"),
    ],
)
def test_what_our_model_has_not_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    theirs_saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("head_dim")
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(FormatError, match=said):
        from_hf(tmp_path)


# config.json as published, of what our model needs, and the published number of parameters
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "TinyLlama-1.1B": (
        {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
        | {"model_type": "llama", "rope_scaling": None, "tie_word_embeddings": False},
        1_100_048_384,
    ),
    "SmolLM2-135M": (
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
        | {"model_type": "llama", "rope_scaling": None, "rope_interleaved": False, "rope_theta": 100000}
        | {"tie_word_embeddings": True},
        134_515_008,
    ),
    "Llama-3.2-1B": (
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "head_dim": 64}
        | {"model_type": "llama", "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
        | {"rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}}
        | {"pretraining_tp": 1, "mlp_bias": False, "attention_bias": False},
        1_235_814_400,
    ),
    "Qwen3-0.6B": (
        {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960, "head_dim": 128}
        | {"model_type": "qwen3", "rope_theta": 1000000, "rope_scaling": None, "max_window_layers": 28}
        | {"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "attention_bias": False},
        596_049_920,
    ),
}
PUBLISHED["Llama-3.2-1B"][0]["rope_scaling"]["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_of_published_relatives_are_understood(name: str, tmp_path: Path) -> None:
    content, parameters = PUBLISHED[name]
    config = _model_config(content, tmp_path, None)
    assert (config.n_params(), config.qk_norm) == (parameters, name.startswith("Qwen3"))
    assert config.rope_scaling_factor == (32 if name.startswith("Llama") else 1)
    assert _model_config(_hf_config(config, torch.bfloat16), tmp_path, None) == config


def test_damaged_folders_are_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json cannot be read"):
        from_hf(tmp_path)
    theirs_saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"holds no model\.safetensors; save it with transformers'"):
        from_hf(tmp_path)
    less = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    save_file({**less, "model.extra.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing norm\.weight; unexpected model\.extra\.weight"):
        from_hf(tmp_path)
    save_file({**weights, "lm_head.weight": torch.zeros(9, 9)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"output\.weight is \(9, 9\), the model's \(37, 32\)"):
        from_hf(tmp_path)
    save_file({n: tensor.to(torch.int8) for n, tensor in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"weights of torch\.int8; quantised weights are not supported"):
        from_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../b.safetensors"}}))
    with pytest.raises(FormatError, match="weight_map must give each tensor the name of a file"):
        from_hf(tmp_path)


# What a configuration claims and the weights contradict


def changed(folder: Path, **fields: Any) -> None:
    """Change fields of a folder's config.json; None deletes one."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewritten(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of a folder's weights; None deletes one."""
    weights = {**load_file(folder / "model.safetensors"), **tensors}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:.*no tokenizer that can be used")
def test_a_separate_output_matrix_opens_untied_whatever_config_says(tmp_path: Path) -> None:
    theirs = theirs_saved(tmp_path)
    changed(tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"tie_word_embeddings=true, but lm_head\.weight is not the embedding"):
        ours = from_hf(tmp_path, device="cpu")
    assert not ours.model.config.tie_embeddings and ours.config["model"]["tie_embeddings"] is False
    ids = random_ids(2, 60)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=0, atol=1e-5)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # transformers decides so too
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    assert_same_weights(ours, from_hf(to_hf(ours, tmp_path / "hf"), device="cpu"))


@pytest.mark.filterwarnings("ignore:.*no tokenizer that can be used")
@pytest.mark.parametrize("stored", [["lm_head.weight"], ["model.embed_tokens.weight"], ["both"]])
def test_a_tied_matrix_may_be_stored_under_either_name(stored: list[str], tmp_path: Path) -> None:
    theirs = theirs_saved(tmp_path, tie_word_embeddings=True)
    matrix = theirs.model.embed_tokens.weight.detach()
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    rewritten(tmp_path, **{name: matrix.clone() if name in stored or "both" in stored else None for name in names})
    ours, ids = from_hf(tmp_path, device="cpu"), random_ids(2, 60)
    assert ours.model.config.tie_embeddings
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_untied_without_an_output_matrix_is_refused(tmp_path: Path) -> None:
    theirs_saved(tmp_path, tie_word_embeddings=True)
    for said in (False, None):
        changed(tmp_path, tie_word_embeddings=said)
        with pytest.raises(FormatError, match=r"holds no lm_head\.weight.*set tie_word_embeddings to true there"):
            from_hf(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 38),
        ("vocab_size", 36),
        ("hidden_size", 36),
        ("intermediate_size", 10**12),
        ("head_dim", 16),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 2),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 10**12),
        ("vocab_size", 10**12),
        ("max_position_embeddings", 10**12),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", -2),
        ("num_hidden_layers", [2]),
        ("hidden_size", math.nan),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", math.inf),
        ("rope_theta", {"a": 1}),
        ("rope_theta", 77.0),
        ("rope_parameters", "default"),
        ("rope_parameters", ["default"]),
        ("rope_scaling", 8),
        ("rope_scaling", {"rope_type": "llama3", **THEIR_SCALING, "factor": "8"}),
        ("rope_scaling", {"rope_type": "llama3", **THEIR_SCALING, "low_freq_factor": math.nan}),
        ("rope_scaling", {"rope_type": "llama3", **THEIR_SCALING, "original_max_position_embeddings": 10**12}),
        ("layer_types", "full_attention"),
        ("model_type", "qwen3"),
        ("tie_word_embeddings", "false"),
    ],
)
def test_a_field_that_cannot_be_right_is_refused_at_once(field: str, value: Any, tmp_path: Path) -> None:
    theirs_saved(tmp_path)
    changed(tmp_path, **{field: value})
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises((FormatError, CheckpointError), match=r"config\.json cannot|does not fit the model") as error:
        from_hf(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 1500
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.filterwarnings("ignore:.*no tokenizer that can be used")
def test_stored_rotary_frequencies_must_be_those_of_the_config(tmp_path: Path) -> None:
    theirs_saved(tmp_path)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewritten(tmp_path, **{name: 10_000.0 ** -(torch.arange(4) / 4)})
    assert from_hf(tmp_path, device="cpu").model.config.rope_theta == 10_000
    for other in (500.0 ** -(torch.arange(4) / 4), torch.ones(8)):
        rewritten(tmp_path, **{name: other})
        with pytest.raises(FormatError, match=r"inv_freq for another model.*head_dim=8, rope_theta=10000"):
            from_hf(tmp_path)


def test_a_tokenizer_with_more_ids_than_the_model_is_not_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs_saved(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    with pytest.warns(UserWarning, match=r"its tokenizer has 4,000 ids, the model only 37\), so \.tokenizer is None"):
        assert from_hf(tmp_path, device="cpu").tokenizer is None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model"]
)
def test_a_git_lfs_pointer_is_named_as_such(name: str, tmp_path: Path) -> None:
    theirs_saved(tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(FormatError, match=rf"{name} cannot be read: it is only a Git LFS pointer.*git lfs pull"):
        from_hf(tmp_path)


def whole(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


BROKEN: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "deep": ("config.json", lambda _: b"[" * 100_000),
    "deep-in-a-field": ("config.json", lambda _: b'{"rope_scaling":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
    "no-json": ("config.json", lambda _: b"\xff\xfe{}"),
    "a-list": ("config.json", lambda _: b"[1]"),
    "a-long-number": ("config.json", lambda _: b'{"vocab_size": ' + b"9" * 10_000 + b"}"),
    "cut": ("model.safetensors", lambda folder: whole(folder)[:-100]),
    "cut-header": ("model.safetensors", lambda folder: whole(folder)[:100]),
    "empty": ("model.safetensors", lambda _: b""),
    "header-of-exabytes": ("model.safetensors", lambda folder: struct.pack("<Q", 1 << 60) + whole(folder)[8:]),
    "header-no-json": ("model.safetensors", lambda folder: whole(folder)[:8] + b"\xff" * 50 + whole(folder)[58:]),
    "longer": ("model.safetensors", lambda folder: whole(folder) + b"more"),
    "index-elsewhere": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "/etc/passwd"}}'),
    "index-above": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": ".."}}'),
    "index-number": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": 3}}'),
    "index-list": ("model.safetensors.index.json", lambda _: b'{"weight_map": ["model.safetensors"]}'),
    "index-empty": ("model.safetensors.index.json", lambda _: b'{"weight_map": {}}'),
    "index-nul": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "b\\u0000.safetensors"}}'),
    "index-of-a-tensor-that-is-not-there": (
        "model.safetensors.index.json",
        lambda _: b'{"weight_map": {"a": "model.safetensors"}}',
    ),
    "index-of-other-files": ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": "b.safetensors"}}'),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_words_that_name_it(kind: str, tmp_path: Path) -> None:
    theirs_saved(tmp_path)
    name, content = BROKEN[kind]
    (tmp_path / name).write_bytes(content(tmp_path))
    with pytest.raises((FormatError, CheckpointError), match=rf"{tmp_path}.* (cannot be|does not hold|delete one)"):
        from_hf(tmp_path)


def test_a_shard_that_is_missing_or_a_pipe_is_refused(tmp_path: Path) -> None:
    theirs_saved(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FormatError, match=rf"{shard.name} cannot be read: there is no such file"):
        from_hf(tmp_path)
    os.mkfifo(shard)
    with pytest.raises(FormatError, match=rf"{shard.name} cannot be read: there is no such file"):
        from_hf(tmp_path)
    shard.unlink()
    save_file({**load_file(sorted(tmp_path.glob("model-*.safetensors"))[0])}, shard)
    with pytest.raises(FormatError, match=r"does not hold .*, although model\.safetensors\.index\.json says so"):
        from_hf(tmp_path)
    shard.write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors and an index of other files; delete one"):
        from_hf(tmp_path)


@settings(deadline=None, max_examples=examples(60))
@given(data=st.data())
def test_a_damaged_weights_file_never_ends_in_anything_but_words(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    theirs_saved(folder)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    header = min(len(content), 2500)  # what comes behind are numbers, each as good as another
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(FormatError, CheckpointError):
            from_hf(folder, device="cpu")


# Meta


def meta_folder(checkpoint: Checkpoint, folder: Path, **changes: Any) -> None:
    """A folder as Meta publishes one; names are ours already, and the rotary frequencies come along."""
    config = checkpoint.model.config
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
    params |= {"n_kv_heads": config.n_kv_heads, "vocab_size": -1, "multiple_of": 16, "rope_theta": config.rope_theta}
    (folder / "params.json").write_text(json.dumps({**params, **changes}))
    weights = checkpoint.model.state_dict()
    if config.tie_embeddings:
        del weights["output.weight"]
    torch.save({**weights, "rope.freqs": torch.ones(4)}, folder / "consolidated.00.pth")
    if checkpoint.tokenizer:
        (folder / "tokenizer.model").write_bytes(checkpoint.tokenizer.model_bytes)


@matrix
def test_a_folder_as_meta_publishes_it_opens(
    shape: dict[str, Any], dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = made(tokenizer, dtype, rope_theta=5e5, norm_eps=1e-5, **shape)
    meta_folder(ours, tmp_path)
    back = from_meta(tmp_path, device="cpu", max_seq_len=CONTEXT)
    assert_same_weights(ours, back)
    assert back.tokenizer is not None and back.tokenizer.fingerprint == tokenizer.fingerprint
    # and on to transformers: Meta's layout is ours, theirs is not
    theirs = AutoModelForCausalLM.from_pretrained(to_hf(back, tmp_path / "hf"), dtype=torch.float32).eval()
    ids = random_ids(2, 40, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model.float()(ids), rtol=0, atol=1e-5)


def test_the_scaled_rope_of_metas_code_is_understood(tmp_path: Path) -> None:
    ours = made(None, rope_theta=5e5, rope_scaling_factor=8.0, max_seq_len=9000)
    meta_folder(ours, tmp_path, use_scaled_rope=True)
    with pytest.warns(UserWarning, match=r"params\.json says use_scaled_rope.* taken to be 8.*Llama 3\.2"):
        back = from_meta(tmp_path, device="cpu", max_seq_len=9000)
    assert_same_weights(ours, back)
    # apply_scaling of Meta's code: wavelengths above 8192 tokens, below 2048, and between the two
    plain = 5e5 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    waves = 2 * math.pi / plain
    between = (8192 / waves - 1) / (4 - 1)
    slowed = torch.where(waves > 8192, plain / 8, (1 - between) * plain / 8 + between * plain)
    expected = torch.where(waves < 2048, plain, slowed)
    assert (expected < plain).sum() == 2
    angles = torch.atan2(back.model.rope_sin[1], back.model.rope_cos[1])
    torch.testing.assert_close(angles.double(), expected, rtol=1e-5, atol=0)


class Explosive:
    """An object whose unpickling would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_meta_folder_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    ours = made(None)
    with pytest.raises(FormatError, match=r"params\.json cannot be read"):
        from_meta(tmp_path)
    meta_folder(ours, tmp_path, use_scaled_rope=True, moe={"num_experts": 8})
    with pytest.raises(FormatError, match=r"not supported: moe=\{'num_experts': 8\}"):
        from_meta(tmp_path)
    meta_folder(ours, tmp_path, n_layers=3)
    with pytest.raises(CheckpointError, match=r"missing layers\.2\.attention\.wq\.weight"):
        from_meta(tmp_path)
    meta_folder(ours, tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3's is of another kind
    with pytest.warns(UserWarning, match="no tokenizer that can be used .*not a SentencePiece model"):
        assert from_meta(tmp_path, device="cpu").tokenizer is None
    (tmp_path / "consolidated.01.pth").touch()
    with pytest.raises(FormatError, match="weights in several pieces"):
        from_meta(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    torch.save({"tok_embeddings.weight": Explosive(tmp_path / "boom")}, tmp_path / "consolidated.00.pth")
    with pytest.raises(FormatError, match=r"consolidated\.00\.pth or params\.json cannot be read: UnpicklingError"):
        from_meta(tmp_path)
    (tmp_path / "consolidated.00.pth").write_bytes(pickle.dumps(Explosive(tmp_path / "boom")))
    with pytest.raises(FormatError, match=r"consolidated\.00\.pth or params\.json cannot be read"):
        from_meta(tmp_path)
    assert not (tmp_path / "boom").exists()


class Odd:
    """Things that a .pth file may hold instead of weights."""

    zeros = torch.zeros(37, 32)
    things: dict[str, Any] = {  # noqa: RUF012
        "a-list": [zeros],
        "a-number": 3,
        "a-tensor": zeros,
        "nothing": {},
        "a-number-for-a-tensor": {"tok_embeddings.weight": 3},
        "nested": {"model": {"tok_embeddings.weight": zeros}},
        "number-names": {0: zeros},
        "sparse": {"tok_embeddings.weight": zeros.to_sparse()},
        "without-storage": {"tok_embeddings.weight": torch.zeros(37, 32, device="meta")},
        "far-larger-than-stored": {"tok_embeddings.weight": torch.zeros(1, 1).expand(10**7, 10**7)},
        "a-scalar": {"tok_embeddings.weight": torch.tensor(1.0)},
        "integers": {"tok_embeddings.weight": zeros.int()},
        "complex": {"tok_embeddings.weight": zeros.cfloat()},
    }


@pytest.mark.parametrize("kind", Odd.things)
def test_a_meta_file_with_odd_things_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    meta_folder(made(None), tmp_path)
    content = Odd.things[kind]
    if isinstance(content, dict) and "tok_embeddings.weight" in content:
        content = {**torch.load(tmp_path / "consolidated.00.pth"), **content}
    torch.save(content, tmp_path / "consolidated.00.pth")
    with pytest.raises((FormatError, CheckpointError), match=r"consolidated\.00\.pth ") as error:
        from_meta(tmp_path)
    assert "\033" not in str(error.value) and "only if you trust" not in str(error.value)


def test_a_meta_file_that_would_explode_is_not_unpacked(tmp_path: Path) -> None:
    meta_folder(made(None), tmp_path)
    file = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(file) as stored:
        parts = [(part.filename, stored.read(part)) for part in stored.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts:
            packed.writestr(name, content + b"\0" * 10_000_000 * name.endswith("data.pkl"))
    with pytest.raises(FormatError, match=r"consolidated\.00\.pth .*it holds compressed parts"):
        from_meta(tmp_path)
    for content in (POINTER, file.read_bytes()[:5000], b""):
        file.write_bytes(content)
        with pytest.raises(FormatError, match=r"consolidated\.00\.pth .*cannot be read"):
            from_meta(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 10**7),
        ("n_layers", 1),
        ("n_layers", "2"),
        ("dim", 64),
        ("dim", 10**15),
        ("dim", None),
        ("n_heads", 8),  # the rotary frequencies are for heads of 8
        ("n_heads", 0),
        ("n_kv_heads", 2),
        ("vocab_size", 38),
        ("vocab_size", 1.5),
        ("norm_eps", "small"),
        ("norm_eps", math.nan),
        ("rope_theta", -1),
        ("rope_theta", None),
        ("use_scaled_rope", "no"),
    ],
)
def test_a_field_of_metas_that_cannot_be_right_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    meta_folder(made(None), tmp_path, **{field: value})
    with pytest.raises(
        (FormatError, CheckpointError), match=r"consolidated\.00\.pth|params\.json|not supported"
    ) as error:
        from_meta(tmp_path, device="cpu")
    assert str(tmp_path) in str(error.value)


# llama2.c


def llama2c_logits(file: Path, tokens: list[int], eps: float) -> np.ndarray:
    """Logits (time, vocab_size) of a version-0 file in float64, from nothing but its description."""
    content = file.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", content[:28])
    numbers = iter(np.frombuffer(content[28:], "<f4").astype(np.float64))

    def take(*shape: int) -> np.ndarray:
        return np.fromiter(itertools.islice(numbers, math.prod(shape)), np.float64, math.prod(shape)).reshape(shape)

    size, shared, vocab = dim // heads, vocab > 0, abs(vocab)
    embedding, att_norm = take(vocab, dim), take(layers, dim)
    wq, wk, wv = take(layers, dim, dim), take(layers, kv_heads * size, dim), take(layers, kv_heads * size, dim)
    wo, ffn_norm = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    last_norm, cos, sin = take(dim), take(seq_len, size // 2), take(seq_len, size // 2)
    classifier = embedding if shared else take(vocab, dim)
    assert next(numbers, None) is None, "bytes are left over"

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    def rotate(x: np.ndarray) -> np.ndarray:  # (time, heads, size), as complex numbers
        turned = x.reshape(*x.shape[:-1], -1, 2) @ [1, 1j] * (cos + 1j * sin)[: len(x), None]
        return np.stack((turned.real, turned.imag), -1).reshape(x.shape)

    x = embedding[tokens]
    time = len(tokens)
    for layer in range(layers):
        h = norm(x, att_norm[layer])
        q = rotate((h @ wq[layer].T).reshape(time, heads, size))
        k = rotate((h @ wk[layer].T).reshape(time, kv_heads, size))
        v = (h @ wv[layer].T).reshape(time, kv_heads, size)
        out = np.zeros((time, heads, size))
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv].T / math.sqrt(size)
            scores[np.triu_indices(time, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
        x = x + out.reshape(time, dim) @ wo[layer].T
        h = norm(x, ffn_norm[layer])
        gate = h @ w1[layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w3[layer].T)) @ w2[layer].T
    return norm(x, last_norm) @ classifier.T


def llama2c_pieces(file: Path, count: int) -> list[tuple[float, bytes]]:
    """Scores and pieces of a tokenizer.bin."""
    content = file.read_bytes()
    (longest,), at, found = struct.unpack("<i", content[:4]), 4, []
    for _ in range(count):
        score, length = struct.unpack("<fi", content[at : at + 8])
        found.append((score, content[at + 8 : at + 8 + length]))
        at += 8 + length
    assert at == len(content) and longest == max(len(piece) for _, piece in found)
    return found


@matrix
def test_a_llama2c_file_read_by_its_description_computes_the_same(
    shape: dict[str, Any], dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = made(tokenizer, dtype, **shape)
    file = to_llama2c(ours, tmp_path / "model.bin")
    ids = random_ids(1, 70, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        logits = ours.model.float()(ids)[0].numpy()
    np.testing.assert_allclose(llama2c_logits(file, ids[0].tolist(), eps=1e-6), logits, rtol=0, atol=1e-5)
    pieces = llama2c_pieces(tmp_path / "tokenizer.bin", tokenizer.vocab_size)
    assert pieces[tokenizer.encode("玄德")[0]][1] == "玄德".encode()
    assert (pieces[2][1], pieces[4][1], pieces[5][1]) == (b"<s>", b"\n", b"<0x00>")
    assert pieces[tokenizer.encode(" ")[0]][1] == b" "
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "tokenizer.bin"]


@matrix
def test_adapted_to_its_program_the_same_logits_come_under_its_ids(
    shape: dict[str, Any], dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Its program adds 1e-5 in RMSNorm where this model adds 1e-6; small embeddings make that matter."""
    ours = made(tokenizer, dtype, **shape, vocab_size=tokenizer.vocab_size + 5)
    with torch.no_grad():
        ours.model.tok_embeddings.weight *= 0.05
    file = to_llama2c(ours, tmp_path / "model.bin", adapt=True)
    places = llama2c_pieces(tmp_path / "tokenizer.bin", tokenizer.vocab_size + 5)
    assert [piece for _, piece in places[:4]] == [b"<unk>", b"</s>", b"<s>", b"<0x00>"]
    assert places[3 + 0xE4][1] == b"<0xE4>" and places[-1][1] == b"<unused4004>"
    by_piece = {piece: place for place, (_, piece) in enumerate(places)}
    assert len(by_piece) == len(places)
    own = llama2c_pieces(to_llama2c(ours, tmp_path / "own" / "model.bin").with_name("tokenizer.bin"), len(places))
    place = [by_piece[piece] for _, piece in own]
    ids = random_ids(1, 50, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        logits = ours.model.float()(ids)[0].numpy()
    found = llama2c_logits(file, [place[id] for id in ids[0]], eps=1e-5)[:, place]
    np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5)
    unscaled = llama2c_logits(tmp_path / "own" / "model.bin", ids[0].tolist(), eps=1e-5)
    assert np.abs(unscaled - logits).max() > 1e-3


@pytest.fixture(scope="module")
def run_c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama2.c's own program, compiled."""
    try:
        return run_c_program(tmp_path_factory.mktemp("llama2c"), "-O2")
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_llama2c_itself_says_its_speed(english: Path, run_c: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(sorted(english.glob("*.txt")), tmp_path / "english", 400, character_coverage=1.0)
    small, large = made(tokenizer), made(tokenizer, dim=512, n_layers=6, hidden_dim=2048)
    assert speed_of_run(run_c, small) > 10 * speed_of_run(run_c, large)
    with pytest.raises(FormatError, match="qk_norm"):
        speed_of_run(run_c, made(tokenizer, qk_norm=True))


def test_another_program_is_not_taken_for_llama2c(tmp_path: Path) -> None:
    """As a program of today's options, it is called with them; what says no speed is refused."""
    (tmp_path / "text").write_text("no program")
    for name in ("text", "absent"):
        with pytest.raises(FormatError, match=f"{name} is not a program"):
            check_run(tmp_path / name)
    program = tmp_path / "run"
    program.write_text('#!/bin/sh\necho "options: -t -n -z"; echo "called with $@"\n')
    program.chmod(0o755)
    with pytest.raises(FormatError, match=r"called with model.bin -t 0 -n 9 -z tokenizer.bin"):
        speed_of_run(program, made(None), 9)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", "The old captain wat", "another line\nof the rain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_llama2c_itself_writes_the_same(
    tie: bool, dtype: torch.dtype, prompt: str, english: Path, run_c: Path, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(sorted(english.glob("*.txt")), tmp_path / "english", 400, character_coverage=1.0)
    ours = made(tokenizer, dtype, tie_embeddings=tie)
    to_llama2c(ours, tmp_path / "model.bin", adapt=True)
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    steps = len(ids) - 1 + 64
    done = subprocess.run([run_c, "model.bin", "0", str(steps), prompt], cwd=tmp_path, capture_output=True, check=True)
    ids += [id for [id] in generate_ids(ours.model.float(), [ids], 64, temperature=0)]
    expected = b"".join(
        tokenizer.id_to_piece(id).encode() if tokenizer.is_byte(id) or id < 4 else tokenizer.id_to_bytes(id)
        for id in ids[1:]
    )
    written = done.stdout.removeprefix(b"<s>\n").split(b"\nachieved tok/s")[0]
    assert written == expected


def test_a_tokenizer_with_llamas_own_ids_keeps_them_when_adapted(english: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=sorted(map(str, english.glob("*.txt"))), model_prefix=str(tmp_path / "llama"), vocab_size=400,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "llama.model")
    with pytest.warns(UserWarning, match="changes text before cutting it"):
        to_llama2c(made(tokenizer), tmp_path / "model.bin", adapt=True)
    pieces = [piece for _, piece in llama2c_pieces(tmp_path / "tokenizer.bin", 400)]
    assert pieces[:4] == [b"<unk>", b"<s>", b"</s>", b"<0x00>"]
    with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
        folder = to_hf(made(tokenizer), tmp_path / "hf")
    assert "pad_token_id" not in json.loads((folder / "config.json").read_text())
    theirs = LlamaCpp(to_gguf(made(tokenizer), tmp_path / "model.gguf"))
    for text in ("The old captain", "a  b", "x"):
        assert theirs.tokenize(text) == tokenizer._processor.encode(text)


def test_what_llama2c_cannot_hold_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, value in {"head_dim": 14, "rope_theta": 500.0, "qk_norm": True, "rope_scaling_factor": 8.0}.items():
        with pytest.raises(FormatError, match=f"no room for {name}={value}"):
            to_llama2c(made(None, **{name: value}), tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


# GGUF


class LlamaCpp:
    """llama.cpp's server with one model, on this machine's own address, computing in float32."""

    def __init__(self, file: Path) -> None:
        self.xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes as a wheel for Linux only")
        types = self.xllamacpp.ggml_type
        settings = self.xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(file), CONTEXT, 1
        settings.warmup, settings.fit_params, settings.verbosity = False, False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = types.GGML_TYPE_F32
        settings.flash_attn_type = self.xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = self.xllamacpp.Server(settings)
        # never deleted: its destructor now and then waits for a thread that waits for a client, and so forever
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.server))

    def ask(self, what: str, **question: Any) -> Any:
        url, body = f"{self.server.listening_address}/{what}", json.dumps(question).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str) -> list[int]:
        return self.ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@matrix
def test_llama_cpp_computes_and_writes_the_same(
    shape: dict[str, Any], dtype: torch.dtype, stored: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = made(tokenizer, dtype, **shape)
    theirs = LlamaCpp(to_gguf(ours, tmp_path / "model.gguf", stored))
    prompt = random_ids(1, 6, vocab_size=tokenizer.vocab_size, seed=1)[0].tolist()
    answer = theirs.ask("completion", prompt=prompt, n_predict=64, temperature=0, return_tokens=True, n_probs=10)
    with torch.no_grad():
        for parameter in ours.model.float().parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.to(stored))
        odds = ours.model(torch.tensor([prompt]))[0, -1].log_softmax(0)
    for top in answer["completion_probabilities"][0]["top_logprobs"]:
        assert abs(top["logprob"] - odds[top["id"]]) < (1e-4 if stored == torch.float32 else 2e-2)
    assert answer["tokens"] == greedy(ours, prompt, 64)


@settings(deadline=None, max_examples=examples(150))
@given(text=TEXT)
@example(text="<s></s><unk><pad><0x0A>")
@example(text="  两个空格  \n\n 行首 \t制表　全角\r\n")
def test_llama_cpp_cuts_text_into_the_same_ids(text: str, llama_cpp: LlamaCpp, tokenizer: Tokenizer) -> None:
    text = text.replace("▁", "")  # a space to it
    assert llama_cpp.tokenize(text) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def llama_cpp(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return LlamaCpp(to_gguf(made(tokenizer), tmp_path_factory.mktemp("gguf") / "model.gguf"))


def test_other_head_sizes_run_in_llama_cpp_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = made(tokenizer, head_dim=16, n_kv_heads=2, rope_theta=500.0, norm_eps=1e-3, vocab_size=4100)
    theirs = LlamaCpp(to_gguf(ours, tmp_path / "model.gguf"))
    answer = theirs.ask("completion", prompt=[300, 301], n_predict=64, temperature=0, return_tokens=True)
    assert answer["tokens"] == greedy(ours, [300, 301], 64)


@pytest.mark.parametrize("kind", [kind for kind in RELATIVES if kind != "qwen3-llama3"])
def test_relatives_run_in_llama_cpp_too(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = made(tokenizer, **RELATIVES[kind])
    theirs = LlamaCpp(to_gguf(ours, tmp_path / "model.gguf"))
    prompt = random_ids(1, 40, vocab_size=tokenizer.vocab_size, seed=1)[0].tolist()
    answer = theirs.ask("completion", prompt=prompt, n_predict=50, temperature=0, return_tokens=True, n_probs=10)
    with torch.no_grad():
        odds = ours.model(torch.tensor([prompt]))[0, -1].log_softmax(0)
    for top in answer["completion_probabilities"][0]["top_logprobs"]:
        assert abs(top["logprob"] - odds[top["id"]]) < 1e-4
    assert answer["tokens"] == greedy(ours, prompt, 50)


@pytest.mark.parametrize(
    "shape", [{"hidden_dim": 64}, {"tie_embeddings": True, "n_kv_heads": 2}, {"qk_norm": True, "head_dim": 16}]
)
def test_llama_cpp_computes_nearly_the_same_in_8_bits(
    shape: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """It rounds activations to 8 bits too, which our model with the file's weights does not."""
    ours = made(tokenizer, **shape)
    file = to_gguf(ours, tmp_path / "model.gguf", "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {types[name] for name in ("token_embd.weight", "blk.1.attn_q.weight")} == {"Q8_0"}
    assert types["blk.0.ffn_down.weight"] == ("Q8_0" if "hidden_dim" in shape else "F16")  # its rows have 64 or 48
    for parameter in ours.model.parameters():
        if parameter.dim() == 2:
            kind = gguf.GGMLQuantizationType["F16" if parameter.shape[1] % 32 else "Q8_0"]
            stored = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(stored, kind))

    prompt = random_ids(1, 6, vocab_size=tokenizer.vocab_size, seed=1)[0].tolist()
    question = {"prompt": prompt, "n_predict": 64, "temperature": 0, "return_tokens": True, "n_probs": 10}
    answer = LlamaCpp(file).ask("completion", **question)
    with torch.no_grad():
        odds = ours.model(torch.tensor([prompt + answer["tokens"]]))[0, 5:-1].log_softmax(-1)
    for top in answer["completion_probabilities"][0]["top_logprobs"]:
        assert abs(top["logprob"] - odds[0, top["id"]]) < 5e-2
    chosen = odds.gather(1, torch.tensor(answer["tokens"])[:, None])[:, 0]
    assert (odds.amax(1) - chosen).max() < 5e-2  # greedy, but for ties within the rounding


def test_what_a_gguf_file_cannot_hold_is_refused(english: Path, tmp_path: Path) -> None:
    for wrong in (torch.int8, "q4_0"):
        with pytest.raises(FormatError, match=rf'dtype={wrong} must be torch\.float32, torch\.float16 or "q8_0"'):
            to_gguf(made(None), tmp_path / "model.gguf", wrong)
    with pytest.raises(FormatError, match=r"no room for qk_norm with rope_scaling_factor=8\.0"):
        to_gguf(made(None, **RELATIVES["qwen3-llama3"]), tmp_path / "model.gguf")
    files = sorted(english.glob("*.txt"))
    unigram = train_tokenizer(files, tmp_path / "one", 350, character_coverage=1.0, model_type="unigram")
    with pytest.raises(FormatError, match="llama.cpp cuts text as BPE does"):
        to_gguf(made(unigram), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))
