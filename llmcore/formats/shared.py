"""What the formats of other programs share: names and layout of the weights, checks, and warnings.

Our names and shapes are Meta's. The main difference is the rotary embedding. Meta, llama2.c and llama.cpp rotate
neighbours (x0, x1), (x2, x3), … as we do. Hugging Face rotates halves (x0, x_d/2), (x1, x_d/2+1), …, and so does
llama.cpp with Qwen3. So the rows of wq and wk, and the weights of their norms, are reordered on the way there and back.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.checkpoint import WEIGHT_TYPES, Checkpoint, CheckpointError, load_checkpoint, model_with
from llmcore.config import ModelConfig
from llmcore.device import pick_device
from llmcore.files import display_path, pointer_hint, read_json
from llmcore.formats.hf_tokenizer import open_sentencepiece, open_tokenizer_json
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer, TokenizerError

AnyCheckpoint = Checkpoint | str | os.PathLike[str]

# Parts of JSON schemas
SIZE = {"type": "integer", "minimum": 1, "maximum": 1 << 40}
MAYBE_SIZE = {"type": ["integer", "null"], "minimum": 1, "maximum": 1 << 40}
NUMBER = {"type": ["number", "null"]}


class FormatError(ValueError):
    """A file that cannot be read, or a model that a format cannot hold. The message names the file and the field."""


# Names and layout


def translate(name: str, names: dict[str, str], layer: str) -> str:
    """A weight's name in another format, from its last parts and the prefix of a layer, such as "blk.{}."."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, number, stem = stem.split(".", 2)
        return layer.format(number) + names[stem] + ".weight"
    return names[stem] + ".weight"


ROTATED = tuple(f"attention.{name}.weight" for name in ("wq", "wk", "q_norm", "k_norm"))  # ends of their names


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """A `ROTATED` weight, (heads * head_dim, …), from interleaved pairs to halves: first all x, then all y."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# Reading


def read_config_file(file: Path, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON file and check it against a schema.

    Raises:
        FormatError: naming the file, and the first field with a wrong value.
    """
    check_file(file)
    try:
        return read_json(file, schema)
    except (OSError, ValueError) as error:
        raise FormatError(f"{display_path(file)} cannot be read: {error}") from None


def check_file(file: Path) -> None:
    """Raise a FormatError if there is no such file, or only a Git LFS pointer to it."""
    try:
        if not file.is_file():
            raise FormatError(f"{display_path(file)} cannot be read: there is no such file")
        if hint := pointer_hint(file):
            raise FormatError(f"{display_path(file)} cannot be read: {hint}")
    except OSError as error:
        raise FormatError(f"{display_path(file)} cannot be read: {error.strerror}") from None


def check_dtype(tensor: Tensor, source: Path) -> None:
    """Raise a FormatError for weights that are not floating-point numbers, such as quantised ones."""
    if tensor.dtype not in WEIGHT_TYPES:
        raise FormatError(
            f"{display_path(source)} holds weights of {tensor.dtype}; quantised weights are not supported"
        )


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Compare the weights of a configuration with those of a file, before a model is built or a weight is read.

    Args:
        config: of the model.
        shapes: of the file's weights, by our names.
        source: the file, for the error.

    Raises:
        CheckpointError: naming the first weights that are missing, unexpected or of another shape.
    """

    def faults() -> Iterator[str]:
        for name, _ in _expected_shapes(config):
            if name not in shapes and not (name == "output.weight" and config.tie_embeddings):
                yield f"missing {name}"
        expected = dict(_expected_shapes(config))  # the file holds all of them, so there are not too many
        yield from (f"unexpected {name}" for name in shapes if name not in expected)
        for name, shape in shapes.items():
            if shape != expected.get(name, shape):
                yield f"{name} is {shape}, the model's {expected[name]}"

    if first_faults := list(itertools.islice(faults(), 8)):
        raise CheckpointError(f"{display_path(source)} does not fit the model: " + "; ".join(first_faults))


def _expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight of a model, lazily: a configuration may claim any number of layers."""
    with torch.device("meta"):  # takes no memory; the first layer is like all others
        weights = Transformer(dataclasses.replace(config, n_layers=1)).state_dict()
    first = "layers.0."
    block = {name.removeprefix(first): tuple(weights[name].shape) for name in weights if name.startswith(first)}
    yield "tok_embeddings.weight", tuple(weights["tok_embeddings.weight"].shape)
    for layer in range(config.n_layers):
        yield from ((f"layers.{layer}.{name}", shape) for name, shape in block.items())
    for name in ("norm.weight", "output.weight"):
        yield name, tuple(weights[name].shape)


def as_checkpoint(
    config: ModelConfig,
    weights: dict[str, Tensor],
    path: Path,
    source: Path,
    device: str,
    tokenizers: Sequence[Callable[[], Tokenizer]],
) -> Checkpoint:
    """Make a checkpoint of step 0 from the weights of another program.

    Args:
        config: of the model.
        weights: by our names. All get the widest of their dtypes.
        path: the folder or file that the model comes from.
        source: the file of the weights, for errors.
        device: "auto", "cpu", "cuda" or "mps".
        tokenizers: ways to open one, the best first. If none gives a tokenizer that fits, a warning says why.
    """
    dtypes = {tensor.dtype for tensor in weights.values()}
    widest = functools.reduce(torch.promote_types, dtypes, next(iter(dtypes), torch.float32))
    model = model_with(config, {name: tensor.to(widest) for name, tensor in weights.items()}, source)

    tokenizer, problems = None, []
    for open_tokenizer in tokenizers:
        try:
            tokenizer = open_tokenizer()
            if tokenizer.vocab_size <= config.vocab_size:
                break
            problems.append(f"its tokenizer has {tokenizer.vocab_size:,} ids, the model only {config.vocab_size:,}")
        except FileNotFoundError:
            continue
        except TokenizerError as error:
            problems.append(str(error))
        tokenizer = None
    if tokenizer is None:
        warnings.warn(
            f"{display_path(path)} has no tokenizer that can be used ({'; '.join(problems) or 'there is none'}), so "
            ".tokenizer is None: turn text into ids with another library, and call the model with ids",
            stacklevel=3,
        )

    model = model.to(pick_device(device)).eval()
    return Checkpoint(model, tokenizer, {"model": config.to_dict(), "step": 0}, 0, path)


def folder_tokenizers(folder: Path) -> list[Callable[[], Tokenizer]]:
    """Ways to open the tokenizer of a folder; see `as_checkpoint`."""
    model, json = folder / "tokenizer.model", folder / "tokenizer.json"
    for file in (model, json):
        if file.exists():
            check_file(file)
    return [functools.partial(open_sentencepiece, model), functools.partial(open_tokenizer_json, json)]


def shortened(value: Any) -> str:
    """A value as Python writes it, for a message: at most 200 characters."""
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"


# Writing


def open_checkpoint(checkpoint: AnyCheckpoint) -> Checkpoint:
    """The checkpoint itself, or the one that `load_checkpoint` loads for a path, on the CPU."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint, device="cpu")


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by our names, on the CPU. An output matrix that is the embedding is left out."""
    weights = {name: tensor.detach().cpu() for name, tensor in checkpoint.model.state_dict().items()}
    if checkpoint.model.config.tie_embeddings:
        del weights["output.weight"]
    return weights


def warn_of_other_ids(program: str, reason: str | None) -> None:
    """Warn that a program will get other ids than our tokenizer, if there is a reason (see `why_other_ids`)."""
    if reason:
        warnings.warn(f"{program} will not cut prompts as the tokenizer does: it {reason}", stacklevel=3)
