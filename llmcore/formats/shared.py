"""What the formats of other programs call the weights, and how they lay them out.

Names and shapes are Meta's in ours already. What differs is mostly the rotary embedding: Meta, llama2.c and llama.cpp
turn neighbours (x0, x1), (x2, x3), … as we do; Hugging Face turns halves (x0, x_d/2), (x1, x_d/2+1), …, so rows of wq
and wk change places on the way there and back.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.checkpoint import Checkpoint, CheckpointError, load_checkpoint, model_with
from llmcore.config import ModelConfig
from llmcore.device import pick_device
from llmcore.files import display_path, pointer_hint, read_json
from llmcore.tokenizer import Tokenizer, TokenizerError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

SIZE = {"type": "integer", "minimum": 1, "maximum": 1 << 40}
MAYBE_SIZE = {"type": ["integer", "null"], "minimum": 1, "maximum": 1 << 40}  # null: what is missing is said later
NUMBER = {"type": ["number", "null"]}


# Files


def read_config_file(file: Path, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, checked.

    Raises:
        FormatError: naming the file, and the field that is not as it must be.
    """
    check_file(file)
    try:
        return read_json(file, schema)
    except (OSError, ValueError) as error:
        raise FormatError(f"{display_path(file)} cannot be read: {error}") from None


def check_file(file: Path) -> None:
    """Refuse what is no file, and Git LFS's placeholder for one."""
    try:
        if not file.is_file():
            raise FormatError(f"{display_path(file)} cannot be read: there is no such file")
        if hint := pointer_hint(file):
            raise FormatError(f"{display_path(file)} cannot be read: {hint}")
    except OSError as error:
        raise FormatError(f"{display_path(file)} cannot be read: {error.strerror}") from None


def _expected(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight of a model, one after the other: a file may claim any number of layers."""
    assert config.head_dim and config.n_kv_heads and config.hidden_dim
    dim, hidden = config.dim, config.hidden_dim
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield "tok_embeddings.weight", (config.vocab_size, dim)
    for layer in range(config.n_layers):
        yield f"layers.{layer}.attention.wq.weight", (heads, dim)
        yield f"layers.{layer}.attention.wk.weight", (kv_heads, dim)
        yield f"layers.{layer}.attention.wv.weight", (kv_heads, dim)
        yield f"layers.{layer}.attention.wo.weight", (dim, heads)
        yield f"layers.{layer}.feed_forward.w1.weight", (hidden, dim)
        yield f"layers.{layer}.feed_forward.w2.weight", (dim, hidden)
        yield f"layers.{layer}.feed_forward.w3.weight", (hidden, dim)
        yield f"layers.{layer}.attention_norm.weight", (dim,)
        yield f"layers.{layer}.ffn_norm.weight", (dim,)
    yield "norm.weight", (dim,)
    yield "output.weight", (config.vocab_size, dim)


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Compare what a configuration claims with what a file holds, by our names, before anything is built or read.

    Raises:
        CheckpointError: naming the first weights that are missing, too many or of another shape.
    """

    def wrong() -> Iterator[str]:
        for name, _ in _expected(config):
            if name not in found and not (name == "output.weight" and config.tie_embeddings):
                yield f"missing {name}"
        expected = dict(_expected(config))  # hardly more than there are in the file
        yield from (f"unexpected {name}" for name in found if name not in expected)
        for name, shape in found.items():
            if shape != expected.get(name, shape):
                yield f"{name} is {shape}, the model's {expected[name]}"

    if some := list(itertools.islice(wrong(), 8)):
        raise CheckpointError(f"{display_path(source)} does not fit the model: " + "; ".join(some))


def check_dtype(tensor: Tensor, source: Path) -> None:
    """Refuse weights that are not floating-point numbers, such as quantised ones."""
    if tensor.dtype not in FLOATS:
        raise FormatError(
            f"{display_path(source)} holds weights of {tensor.dtype}; quantised weights are not supported"
        )


def as_checkpoint(
    config: ModelConfig, weights: dict[str, Tensor], folder: Path, source: Path, device: str
) -> Checkpoint:
    """A foreign folder's weights, by our names, as a checkpoint, with its tokenizer if that is SentencePiece."""
    kinds = {tensor.dtype for tensor in weights.values()}
    widest = functools.reduce(torch.promote_types, kinds, next(iter(kinds), torch.float32))
    model = model_with(config, {name: tensor.to(widest) for name, tensor in weights.items()}, source)
    tokenizer, file, without = None, folder / "tokenizer.model", "has no SentencePiece tokenizer.model"
    if file.exists():
        check_file(file)
    try:
        tokenizer = Tokenizer(file)
    except (FileNotFoundError, TokenizerError):
        pass
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        without = f"has a tokenizer of {tokenizer.vocab_size:,} ids for a model of {config.vocab_size:,}"
        tokenizer = None
    if tokenizer is None:
        warnings.warn(
            f"{display_path(folder)} {without}, so .tokenizer is None: turn text into ids with "
            f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}), and call the model with ids",
            stacklevel=3,
        )
    model = model.to(pick_device(device)).eval()
    return Checkpoint(model, tokenizer, {"model": config.to_dict(), "step": 0}, 0, folder)


def shortened(value: Any) -> str:
    """A value as Python writes it, at most 200 characters of it."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"


AnyCheckpoint = Checkpoint | str | os.PathLike[str]


def open_checkpoint(checkpoint: AnyCheckpoint) -> Checkpoint:
    """A checkpoint as it is, or the one that `load_checkpoint` finds, on the CPU."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint, device="cpu")


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by our names, on the CPU; without the output matrix where it is the embedding's."""
    weights = {name: tensor.detach().cpu() for name, tensor in checkpoint.model.state_dict().items()}
    if checkpoint.model.config.tie_embeddings:
        del weights["output.weight"]
    return weights


def warn_of_other_ids(program: str, reason: str | None) -> None:
    """Warn that a program will get other ids, if there is a reason."""
    if reason:
        warnings.warn(f"{program} will not cut prompts as the tokenizer does: it {reason}", stacklevel=3)


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
