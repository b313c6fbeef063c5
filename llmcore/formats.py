"""What the formats of other programs call the weights, and how they lay them out.

Names and shapes are Meta's in ours already. What differs is mostly the rotary embedding: Meta, llama2.c and llama.cpp
turn neighbours (x0, x1), (x2, x3), … as we do; Hugging Face turns halves (x0, x_d/2), (x1, x_d/2+1), …, so rows of wq
and wk change places on the way there and back.
"""

from __future__ import annotations

from torch import Tensor

HF_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "README.md",  # these two are written for the Hub
    "training.png",
}
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
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


class FormatError(ValueError):
    """A file that cannot be read, or a model that a format cannot hold. The message names the file and the field."""


def translate(name: str, names: dict[str, str], layer: str) -> str:
    """A weight's name in another format, from its last parts and the prefix of a layer, such as "blk.{}."."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, number, stem = stem.split(".", 2)
        return layer.format(number) + names[stem] + ".weight"
    return names[stem] + ".weight"


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, (heads * head_dim, dim), from interleaved pairs to halves: first all x, then all y."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """The way back from `to_halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
