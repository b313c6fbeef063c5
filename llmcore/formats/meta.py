"""Llama folders as Meta publishes them: read."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from llmcore.checkpoint import Checkpoint
from llmcore.config import ConfigError, ModelConfig
from llmcore.files import display_path, resolve
from llmcore.formats.shared import (
    MAYBE_SIZE,
    NUMBER,
    SIZE,
    FormatError,
    as_checkpoint,
    check_dtype,
    check_file,
    check_shapes,
    folder_tokenizers,
    read_config_file,
    shortened,
)

# what params.json must look like
META_SCHEMA = {
    "type": "object",
    "required": ["dim", "n_layers", "n_heads"],
    "properties": {
        "dim": SIZE,
        "n_layers": SIZE,
        "n_heads": SIZE,
        "n_kv_heads": MAYBE_SIZE,
        "vocab_size": {"type": "integer", "minimum": -1},
        "multiple_of": SIZE,
        "ffn_dim_multiplier": NUMBER,
        "norm_eps": {"type": "number"},
        "rope_theta": {"type": "number"},
        "use_scaled_rope": {"type": "boolean"},
        "max_batch_size": {"type": "integer"},
        "max_seq_len": {"type": "integer"},
        "model_parallel_size": {"type": "integer"},
    },
}


def from_meta(folder: str | os.PathLike[str], device: str = "auto", max_seq_len: int = 2048) -> Checkpoint:
    """Open a folder as Meta publishes Llama: params.json, consolidated.00.pth, tokenizer.model.

    Args:
        folder: of a model in one file. Those of 13B and more come in several files and are not supported.
        device: "auto", "cpu", "cuda" or "mps".
        max_seq_len: the longest window; Meta's files do not give it.

    Returns:
        As `from_hf` does.

    Raises:
        FormatError: if a file is missing or cannot be read, and for features that our model does not have, by name.
        CheckpointError: for weights that are missing, unexpected, of another shape, or not finite.
    """
    folder = resolve(folder)
    params_file, weights_file = folder / "params.json", folder / "consolidated.00.pth"
    params = read_config_file(params_file, {"type": "object"})
    known = META_SCHEMA["properties"]
    unsupported = [f"{name}={shortened(value)}" for name, value in params.items() if name not in known]
    if (folder / "consolidated.01.pth").exists():
        unsupported.append("weights in several pieces")
    if unsupported:
        raise FormatError(f"{display_path(folder)} has what is not supported: " + "; ".join(unsupported))

    # part of the configuration is in the weights only
    params = read_config_file(params_file, META_SCHEMA)
    weights = _read_pth(weights_file)
    frequencies = weights.pop("rope.freqs", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    vocab_size = params.get("vocab_size", -1)
    if vocab_size <= 0:  # not given
        vocab_size = shapes.get("tok_embeddings.weight", (1,))[0]
    try:
        config = ModelConfig(
            vocab_size=vocab_size,
            dim=params["dim"],
            hidden_dim=shapes.get("layers.0.feed_forward.w1.weight", (1,))[0],  # params.json does not give it
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 10_000.0),
            max_seq_len=max_seq_len,
            tie_embeddings="output.weight" not in weights,
            rope_scaling_factor=8.0 if params.get("use_scaled_rope") else 1.0,  # the rest of it is our default
        )
    except ConfigError as error:
        raise FormatError(f"{display_path(params_file)} cannot be used: {error}") from None

    check_shapes(config, shapes, weights_file)
    if params.get("use_scaled_rope"):
        warnings.warn(
            f"{display_path(params_file)} says use_scaled_rope, but not the factor. It is taken to be 8, as in Meta's "
            "code and for Llama 3.1. Llama 3.2 of 1B and 3B has 32 in its Hugging Face folder: open that with from_hf",
            stacklevel=2,
        )
    if frequencies is not None and config.head_dim and len(frequencies) != config.head_dim // 2:
        raise FormatError(
            f"{display_path(weights_file)} holds rope.freqs for heads of {2 * len(frequencies)}, and params.json says "
            f"dim / n_heads = {config.head_dim}"
        )
    return as_checkpoint(config, weights, folder, weights_file, device, folder_tokenizers(folder))


def _read_pth(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote. No code in the file is run, and no tensor is larger than the file.

    Raises:
        FormatError: naming the file, if it holds anything but tensors by name.
    """
    check_file(file)
    try:
        with zipfile.ZipFile(file) as parts:
            if any(part.file_size > part.compress_size for part in parts.infolist()):
                raise ValueError("it holds compressed parts, which torch.save does not write")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many errors, and its messages advise to read the file unsafely
        reason = "it holds more than tensors" if isinstance(error, UnpicklingError) else str(error).split("\n")[0]
        raise FormatError(
            f"{display_path(file)} or params.json cannot be read: {type(error).__name__}: {reason}"
        ) from None

    # only plain tensors, which the file holds completely
    if not isinstance(content, dict):
        raise FormatError(
            f"{display_path(file)} cannot be read: it holds a {type(content).__name__} instead of weights by name"
        )
    for name, tensor in content.items():
        is_plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not is_plain or tensor.is_quantized or not tensor.dim():
            raise FormatError(f"{display_path(file)} cannot be used: {shortened(name)} does not name a plain tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise FormatError(
                f"{display_path(file)} cannot be used: {shortened(name)} claims to be larger than what is stored"
            )
        check_dtype(tensor, file)
    return {name: tensor.detach() for name, tensor in content.items()}
