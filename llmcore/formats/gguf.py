"""GGUF files, for llama.cpp and programs built on it: written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from llmcore.config import ModelConfig
from llmcore.files import replacing, resolve
from llmcore.formats.hf_tokenizer import BPE, UNUSED, why_other_ids
from llmcore.formats.shared import (
    ROTATED,
    AnyCheckpoint,
    FormatError,
    open_checkpoint,
    to_halves,
    translate,
    warn_of_other_ids,
    weights_of,
)
from llmcore.model import rope_frequencies
from llmcore.tokenizer import Tokenizer

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
        FormatError: for another dtype, a tokenizer that is not BPE, or `qk_norm` together with a scaled rotary
            embedding. A tokenizer that llama.cpp follows only in part is written with a warning.
    """
    import gguf  # here, because only this function needs it

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
    if tokenizer is not None:
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
        if config.rope_scaling_factor != 1:  # how many times slower each pair turns
            unscaled = rope_frequencies(dataclasses.replace(config, rope_scaling_factor=1))
            writer.add_tensor("rope_freqs.weight", (unscaled / rope_frequencies(config)).numpy())
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
    """The vocabulary, with SentencePiece's pieces, scores and types."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    proto = tokenizer.model_proto()
    unused = range(len(proto.pieces), vocab_size)  # a model may have more ids than its tokenizer
    writer.add_tokenizer_model("llama")
    writer.add_token_list([part.piece.encode() for part in proto.pieces] + [f"<unused{id}>".encode() for id in unused])
    writer.add_token_scores([part.score for part in proto.pieces] + [-1e9] * len(unused))
    writer.add_token_types([part.type for part in proto.pieces] + [UNUSED] * len(unused))

    for name in ("bos", "eos", "unk", "pad"):
        if getattr(tokenizer, f"{name}_id") >= 0:
            getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_id"))
    writer.add_add_bos_token(False)  # texts do not begin with it in training either
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
