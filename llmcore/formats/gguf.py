"""GGUF files, those of llama.cpp and programs built on it: read and written.

llama.cpp keeps the rows of wq and wk of a Llama as interleaved pairs, as we do, and those of a Qwen3 as halves.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcore.byte_level import PRE_TOKENIZERS, ROLES, added_token, mark_roles, merges_of
from llmcore.checkpoint import Checkpoint
from llmcore.config import ConfigError, ModelConfig
from llmcore.files import check_json, display_path, replacing, resolve
from llmcore.formats.hf_tokenizer import (
    BPE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    keep_text,
    sentencepiece_model,
    why_other_ids,
)
from llmcore.formats.shared import (
    ROTATED,
    SIZE,
    AnyCheckpoint,
    FormatError,
    as_checkpoint,
    check_file,
    check_shapes,
    open_checkpoint,
    shortened,
    to_halves,
    to_pairs,
    translate,
    warn_of_other_ids,
    weights_of,
)
from llmcore.model import rope_frequencies
from llmcore.tokenizer import Tokenizer, TokenizerError

# our names of weights -> those of GGUF
GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
ARCHITECTURES = ("llama", "qwen3")  # without and with norms of queries and keys
FACTORS = "rope_freqs.weight"  # the tensor with `rope_factors`
FIELDS = {  # GGUF's field, after the name of the architecture -> that of ModelConfig
    "embedding_length": "dim",
    "feed_forward_length": "hidden_dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_seq_len",
}
# fields that must agree with others, or say nothing about what the model computes
MORE_FIELDS = ("attention.value_length", "rope.dimension_count", "vocab_size", "tensor_data_layout")
GGUF_SCHEMA = {
    "type": "object",
    "required": ["embedding_length", "feed_forward_length", "block_count", "attention.head_count"],
    "properties": {
        **dict.fromkeys((*FIELDS, *MORE_FIELDS[:3]), SIZE),
        "attention.layer_norm_rms_epsilon": {"type": "number"},
        "rope.freq_base": {"type": "number"},
    },
}
# fields of the special ids
SPECIAL = dict(zip(ROLES, ("padding", "unknown", "bos", "eos"), strict=True))
# other names of the pre-tokenizers
PRE_NAMES = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm", "refact": "smollm"}


# Reading


def from_gguf(file: str | os.PathLike[str], device: str = "auto", max_seq_len: int | None = None) -> Checkpoint:
    """Open a GGUF file with a Llama or Qwen3 as our model, with its tokenizer. Quantised weights are dequantised.

    Args:
        file: of architecture "llama" or "qwen3", and with a vocabulary of kind "gpt2" (byte-level BPE) or "llama"
            (SentencePiece).
        device: "auto", "cpu", "cuda" or "mps".
        max_seq_len: the longest window. None: the file's `context_length`.

    Returns:
        The model with weights in float32, and its tokenizer; that is None (with a warning) for a vocabulary of another
        kind. The step is 0.

    Raises:
        FormatError: for a file that cannot be read, and for features that our model does not have, by name: other
            architectures, biases, experts, scaled rotary embeddings other than Llama 3.1's.
        CheckpointError: for weights that are missing, unexpected, of another shape, or not finite.
    """
    file = resolve(file)
    fields, tensors = _read_gguf(file)
    config = _model_config(fields, set(tensors), file, max_seq_len)
    if FACTORS in tensors:
        config = _with_factors(config, _dequantized(tensors.pop(FACTORS), file), file)

    # names and shapes must fit before any weight is read
    own = {}
    for name in GGUF_NAMES:
        layers = range(config.n_layers) if "." in name or name.endswith("_norm") else [None]
        for layer in layers[: len(tensors)]:
            ours = f"{name}.weight" if layer is None else f"layers.{layer}.{name}.weight"
            own[translate(ours, GGUF_NAMES, "blk.{}.")] = ours
    tensors = {own.get(name, name): tensor for name, tensor in tensors.items()}
    check_shapes(config, {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}, file)

    weights = {name: _dequantized(tensor, file) for name, tensor in tensors.items()}
    if config.qk_norm:
        assert config.head_dim
        halves = [name for name in weights if name.endswith(ROTATED)]
        weights |= {name: to_pairs(weights[name], config.head_dim) for name in halves}
    return as_checkpoint(config, weights, file, file, device, [lambda: _open_tokenizer(fields, file)])


def _read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a GGUF file, and its tensors, unread, both by name.

    Raises:
        FormatError: naming the file, if it is damaged, cut short, or of the other byte order.
    """
    import gguf  # here, because only GGUF files need it

    class Reader(gguf.GGUFReader):
        """The library's reader goes on behind the end of a file, as far as the file claims to go."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            self.data: Any = self.data.view(np.ndarray)  # faster by half than numpy's memmap
            return super()._get(offset, dtype, count, override_order)

    check_file(file)
    try:
        reader = Reader(file)
        if reader.byte_order != "I":
            raise ValueError("it is of the other byte order")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the library and numpy raise many kinds
        raise FormatError(f"{display_path(file)} is not a GGUF file that can be read: {error}") from None


def _model_config(fields: dict[str, Any], tensors: set[str], file: Path, max_seq_len: int | None) -> ModelConfig:
    """Our configuration from the fields of a GGUF file and the names of its tensors.

    Raises:
        FormatError: naming everything that our model does not support.
    """
    architecture = fields.get("general.architecture")
    if architecture not in list(ARCHITECTURES):
        raise FormatError(
            f"{display_path(file)} holds a model of architecture {shortened(architecture)}; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )

    # features that our model does not have
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    unsupported = [
        f"{name}={shortened(value)}"
        for name, value in own.items()
        if name not in (*FIELDS, *MORE_FIELDS) and value not in (0, "none")
    ]
    known = {FACTORS} if architecture == "llama" else set()  # llama.cpp's Qwen3 does not read them
    unsupported += sorted(
        name for name in tensors - known if name.endswith(".bias") or "_exp" in name or name.startswith("rope_")
    )
    if fields.get("split.count", 1) not in (0, 1):
        unsupported.append("weights in several files")
    if unsupported:
        more = f" and {len(unsupported) - 8} more" if len(unsupported) > 8 else ""
        found = "; ".join(map(display_path, unsupported[:8]))
        raise FormatError(f"{display_path(file)} has what is not supported: {found}{more}")

    # sizes
    try:
        check_json(own, GGUF_SCHEMA, f"{display_path(file)}, {architecture}")
        values = {ours: own[theirs] for theirs, ours in FIELDS.items() if theirs in own}
        values = {name: float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-5, not 9.99…e-06
                  for name, value in values.items()}  # fmt: skip
        values["max_seq_len"] = values.get("max_seq_len", 2048) if max_seq_len is None else max_seq_len
        config = ModelConfig(
            vocab_size=own.get("vocab_size") or len(fields.get("tokenizer.ggml.tokens", [])) or 1,
            tie_embeddings="output.weight" not in tensors,
            qk_norm=architecture == "qwen3",
            **{"norm_eps": 1e-5, "rope_theta": 10_000.0, **values},
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise FormatError(f"{display_path(file)} cannot be used: {error}") from None
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, config.head_dim) != config.head_dim:
            raise FormatError(
                f"{display_path(file)}: {name}={own[name]}, and only head_dim={config.head_dim} is supported"
            )
    return config


def _with_factors(config: ModelConfig, factors: Tensor, file: Path) -> ModelConfig:
    """A configuration with Llama 3.1's scaling, from how many times slower each pair turns: (head_dim / 2,).

    Raises:
        FormatError: if they are others than Llama 3.1's with any factor and its other three numbers.
    """
    try:
        config = dataclasses.replace(config, rope_scaling_factor=float(f"{factors.max():.6g}"))
        if factors.shape == rope_factors(config).shape and torch.allclose(factors, rope_factors(config), rtol=1e-4):
            return config
    except (ConfigError, RuntimeError):  # no number, or no tensor of any length
        pass
    raise FormatError(
        f"{display_path(file)} has what is not supported: {FACTORS} is not Llama 3.1's scaling of a context of "
        f"{config.rope_original_max_seq_len} tokens (low_freq_factor={config.rope_low_freq_factor}, "
        f"high_freq_factor={config.rope_high_freq_factor}) by any factor"
    )


def rope_factors(config: ModelConfig) -> Tensor:
    """How many times slower each pair turns than without scaling: (head_dim / 2,) float32."""
    return rope_frequencies(dataclasses.replace(config, rope_scaling_factor=1)) / rope_frequencies(config)


def _dequantized(tensor: Any, file: Path) -> Tensor:
    """A tensor of a GGUF file in float32."""
    from gguf import quants

    try:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
    except Exception as error:  # also what numpy says of odd shapes
        reason = f"{shortened(tensor.name)} is {tensor.tensor_type.name}, which cannot be dequantised"
        raise FormatError(f"{display_path(file)} cannot be read: {reason}: {error}") from None
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _open_tokenizer(fields: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer in a GGUF file.

    Raises:
        TokenizerError: if there is none, or its kind is not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    pieces, types = (fields.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
    special = {role: fields.get(f"tokenizer.ggml.{name}_token_id", -1) for role, name in SPECIAL.items()}
    try:
        while types and types[-1] == UNUSED:  # a model may have more ids than its tokenizer
            types = types[:-1]
        if kind == "llama":
            rows = list(zip(pieces, fields["tokenizer.ggml.scores"], types, strict=False))
            rules = [fields.get(f"tokenizer.ggml.{name}") for name in ("add_space_prefix", "remove_extra_whitespaces")]
            proto = sentencepiece_model(rows, special, rules[0] in (None, True), bool(rules[1]))
            keep_text(proto, file)
            content = proto.SerializeToString()
        elif kind == "gpt2":
            pre = fields.get("tokenizer.ggml.pre", "default")
            merges = [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]
            content = _tokenizer_json(list(zip(pieces, types, strict=False)), merges, PRE_NAMES.get(pre, pre), special)
        else:
            raise TokenizerError(f"its vocabulary is of kind {shortened(kind)}, and only gpt2 and llama are supported")
    except TokenizerError:
        raise
    except Exception as error:  # fields of any type
        raise TokenizerError(f"its vocabulary cannot be used: {type(error).__name__}: {error}") from None
    return Tokenizer(file, content)


def _tokenizer_json(pieces: list[tuple[str, int]], merges: list[list[str]], pre: str, special: dict[str, int]) -> bytes:
    """The tokenizer.json of a vocabulary of kind "gpt2": pieces with their types, merges, and the pre-tokenizer."""
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"its pre-tokenizer {shortened(pre)} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    steps, whole_words = PRE_TOKENIZERS[pre]
    description = {
        "version": "1.0",
        "added_tokens": [
            added_token(id, piece, special=kind != USER_DEFINED)
            for id, (piece, kind) in enumerate(pieces)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**step, "trim_offsets": True} for step in steps]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": whole_words,
            "vocab": {piece: id for id, (piece, _) in enumerate(pieces)},
            "merges": merges,
        },
    }
    mark_roles(description, special)
    return json.dumps(description, ensure_ascii=False).encode()


# Writing


def to_gguf(checkpoint: AnyCheckpoint, file: str | os.PathLike[str], dtype: torch.dtype | str = torch.float32) -> Path:
    """Write a GGUF file with the weights and the tokenizer, for llama.cpp and programs built on it.

    llama.cpp replaces spaces by U+2581 before it cuts a text, so a U+2581 in the text becomes a space there.

    Args:
        checkpoint: a `Checkpoint`, or what `load_checkpoint` takes.
        file: such as model.gguf; replaced if it is there.
        dtype: of the matrices: torch.float32, torch.float16, or "q8_0", 8-bit integers with a scale for each 32 of a
            row (a matrix whose rows do not divide by 32 is float16 then). The norms are always float32.

    Raises:
        CheckpointError: if there is no such checkpoint.
        FormatError: for another dtype, for a tokenizer that is not BPE or has a pre-tokenizer that llama.cpp does not
            know, and for `qk_norm` together with a scaled rotary embedding. A tokenizer that llama.cpp follows only in
            part is written with a warning.
    """
    import gguf

    types, files = gguf.GGMLQuantizationType, gguf.LlamaFileType
    kinds: dict[torch.dtype | str, tuple[Any, Any]] = {  # of the matrices, and of the file
        torch.float32: (types.F32, files.ALL_F32),
        torch.float16: (types.F16, files.MOSTLY_F16),
        "q8_0": (types.Q8_0, files.MOSTLY_Q8_0),
    }
    if dtype not in kinds:
        raise FormatError(f'dtype={dtype} must be torch.float32, torch.float16 or "q8_0" in a GGUF file')
    checkpoint, file = open_checkpoint(checkpoint), resolve(file)
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    assert config.head_dim
    if config.qk_norm and config.rope_scaling_factor != 1:
        raise FormatError(
            f"llama.cpp has no room for qk_norm with rope_scaling_factor={config.rope_scaling_factor}: "
            "its Qwen3 has no scaled rotary embedding"
        )
    if tokenizer is not None and tokenizer.byte_level:
        if tokenizer.byte_level.pre_name is None:
            raise FormatError("llama.cpp has no name for the tokenizer's pre-tokenizer, so it would cut text otherwise")
    elif tokenizer is not None:
        if tokenizer.model_proto().trainer_spec.model_type != BPE:
            raise FormatError("llama.cpp cuts text as BPE does, and this tokenizer is not BPE; train one that is BPE")
        warn_of_other_ids("llama.cpp", why_other_ids(tokenizer, config.vocab_size, prefix=True, symbols=True))

    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, "qwen3" if config.qk_norm else "llama")
        writer.add_name(os.fsencode(checkpoint.path.parent.name).decode("utf-8", "replace"))
        writer.add_file_type(kinds[dtype][1])
        _add_config(writer, config)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        for name, tensor in weights_of(checkpoint).items():
            if config.qk_norm and name.endswith(ROTATED):
                tensor = to_halves(tensor, config.head_dim)
            kind = kinds[dtype][0] if tensor.dim() == 2 else types.F32  # vectors are the norms' weights
            if kind == types.Q8_0 and tensor.shape[1] % 32:
                kind = types.F16
            stored = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(translate(name, GGUF_NAMES, "blk.{}."), stored, raw_dtype=kind)
        if config.rope_scaling_factor != 1:
            writer.add_tensor(FACTORS, rope_factors(config).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return file


def _add_config(writer: Any, config: ModelConfig) -> None:
    """The model's sizes."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """The vocabulary: SentencePiece's pieces, scores and types, or the pieces and merges of byte-level BPE."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    unused = range(tokenizer.vocab_size, vocab_size)  # a model may have more ids than its tokenizer
    pieces = [tokenizer.id_to_piece(id) for id in range(tokenizer.vocab_size)] + [f"<unused{id}>" for id in unused]
    writer.add_token_list([piece.encode() for piece in pieces])
    if tokenizer.byte_level:
        description = tokenizer.byte_level.description
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokenizer.byte_level.pre_name)
        writer.add_token_merges([" ".join(pair) for pair in merges_of(description)])
        types = [UNUSED if piece == f"<unused{id}>" else NORMAL for id, piece in enumerate(pieces)]
        for token in description["added_tokens"]:
            types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
        writer.add_token_types(types)
        writer.add_add_space_prefix(False)
    else:
        proto = tokenizer.model_proto()
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([part.score for part in proto.pieces] + [-1e9] * len(unused))
        writer.add_token_types([part.type for part in proto.pieces] + [UNUSED] * len(unused))
        writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)

    for name in ROLES:
        if getattr(tokenizer, f"{name}_id") >= 0:
            getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_id"))
    writer.add_add_bos_token(False)  # texts do not begin with it in training either
    writer.add_add_eos_token(False)
