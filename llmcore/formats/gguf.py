"""GGUF files, for llama.cpp and what builds on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from llmcore.files import replacing, resolve
from llmcore.formats.hf_tokenizer import BPE, UNUSED, why_other_ids
from llmcore.formats.shared import AnyCheckpoint, FormatError, open_checkpoint, translate, warn_of_other_ids, weights_of
from llmcore.tokenizer import Tokenizer

GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


# GGUF


def to_gguf(checkpoint: AnyCheckpoint, file: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Path:
    """Write a GGUF file, which llama.cpp and what builds on it run: weights and tokenizer in one.

    llama.cpp turns spaces into U+2581 before it cuts a text, so a U+2581 in the text becomes a space there.

    Args:
        checkpoint: a loaded one, or what `load_checkpoint` takes.
        file: such as model.gguf; replaced if it is there.
        dtype: of the matrices, torch.float32 or torch.float16. The norms are always float32.

    Raises:
        CheckpointError: if there is no such checkpoint.
        FormatError: for another dtype, or a tokenizer that is not BPE. (One that llama.cpp cannot follow in other
            ways goes along with a warning.)
    """
    import gguf  # here, because only this function needs it

    kinds = {torch.float32: gguf.LlamaFileType.ALL_F32, torch.float16: gguf.LlamaFileType.MOSTLY_F16}
    if dtype not in kinds:
        raise FormatError(f"dtype={dtype} must be torch.float32 or torch.float16 in a GGUF file")
    checkpoint, file = open_checkpoint(checkpoint), resolve(file)
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    assert config.head_dim and config.hidden_dim and config.n_kv_heads
    if tokenizer is not None and tokenizer.model_proto().trainer_spec.model_type != BPE:
        raise FormatError(
            "llama.cpp cuts text as BPE does, and the tokenizer is of another kind; train one that is BPE"
        )
    if tokenizer is not None:
        warn_of_other_ids("llama.cpp", why_other_ids(tokenizer, config.vocab_size, prefix=True, symbols=True))
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name(os.fsencode(checkpoint.path.parent.name).decode("utf-8", "replace"))
        writer.add_file_type(kinds[dtype])
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
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        for name, tensor in weights_of(checkpoint).items():
            kind = dtype if tensor.dim() == 2 else torch.float32
            writer.add_tensor(translate(name, GGUF_NAMES, "blk.{}."), tensor.to(kind).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return file


def _add_tokenizer(writer: Any, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """The vocabulary: pieces, scores and types are SentencePiece's own."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    proto = tokenizer.model_proto()
    more = range(len(proto.pieces), vocab_size)  # a model may have more ids than its tokenizer
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*(part.piece.encode() for part in proto.pieces), *(f"<unused{id}>".encode() for id in more)])
    writer.add_token_scores([*(part.score for part in proto.pieces), *(-1e9 for _ in more)])
    writer.add_token_types([*(part.type for part in proto.pieces), *(UNUSED for _ in more)])
    for name in ("bos", "eos", "unk", "pad"):
        if getattr(tokenizer, f"{name}_id") >= 0:
            getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_id"))
    writer.add_add_bos_token(False)  # texts are not begun with it in training either
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
