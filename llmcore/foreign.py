"""Models from elsewhere: Hugging Face folders and Meta's, opened as ours."""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcore.checkpoint import Checkpoint, empty_model, fill_model, read_tensors
from llmcore.config import ConfigError, ModelConfig
from llmcore.device import pick_device
from llmcore.files import resolve, shown
from llmcore.formats import HF_NAMES, FormatError, to_pairs, translate
from llmcore.tokenizer import Tokenizer, TokenizerError

META_PARAMS = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "max_batch_size",
    "max_seq_len",
    "model_parallel_size",
}


def from_hf(folder: str | os.PathLike[str], device: str = "auto", max_seq_len: int | None = None) -> Checkpoint:
    """Open a Hugging Face folder with a Llama as our model.

    Args:
        folder: config.json and safetensors, in one file or sharded; tokenizer.model if it is to have a tokenizer.
        device: "auto", "cpu", "cuda" or "mps".
        max_seq_len: the longest window. None: the folder's `max_position_embeddings`.

    Returns:
        The model with weights in the dtype they are stored in, and its tokenizer, or None (with a warning) where
        that is not SentencePiece. Step 0.

    Raises:
        FormatError: for what our model does not have, by name: other architectures, biases, other rotary embeddings,
            quantised weights.
        CheckpointError: for weights that are missing, too many or of another shape.
    """
    folder = resolve(folder)
    found = _read_json(folder / "config.json")
    config = _config_from_hf(found, folder, max_seq_len)
    assert config.head_dim
    names = {translate(name, HF_NAMES, "model.layers.{}."): name for name in empty_model(config).state_dict()}
    weights = {}
    for name, tensor in _read_safetensors(folder).items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
            continue  # computed, or said already
        if (
            name.endswith(("q_proj.weight", "k_proj.weight"))
            and tensor.dim() == 2
            and not len(tensor) % config.head_dim
        ):
            tensor = to_pairs(tensor, config.head_dim)
        weights[names.get(name, name)] = tensor
    return _checkpoint(config, weights, folder, folder / "model.safetensors", device)


def _config_from_hf(found: dict[str, Any], folder: Path, max_seq_len: int | None) -> ModelConfig:
    """Our configuration from theirs; defaults are those of transformers' LlamaConfig.

    Raises:
        FormatError: naming every field that our model cannot follow.
    """
    rope = found.get("rope_parameters") or {}
    scaling = found.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    fits = {
        "model_type": (found.get("model_type"), "llama"),
        "hidden_act": (found.get("hidden_act", "silu"), "silu"),
        "attention_bias": (found.get("attention_bias", False), False),
        "mlp_bias": (found.get("mlp_bias", False), False),
        "rope_type": (rope_type, "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1)) or 1, 1),
        "quantization_config": (found.get("quantization_config"), None),
    }
    wrong = [
        f"{name}={value!r}, and only {only!r} is supported" for name, (value, only) in fits.items() if value != only
    ]
    if wrong:
        raise FormatError(f"{shown(folder / 'config.json')} describes a model that is not ours: " + "; ".join(wrong))
    try:
        return ModelConfig(
            vocab_size=found["vocab_size"],
            dim=found["hidden_size"],
            hidden_dim=found["intermediate_size"],
            n_layers=found["num_hidden_layers"],
            n_heads=found["num_attention_heads"],
            n_kv_heads=found.get("num_key_value_heads"),
            head_dim=found.get("head_dim"),
            norm_eps=found.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or found.get("rope_theta") or 10_000.0,
            max_seq_len=max_seq_len or found.get("max_position_embeddings", 2048),
            tie_embeddings=found.get("tie_word_embeddings", False),
        )
    except (KeyError, ConfigError) as error:
        raise FormatError(f"{shown(folder / 'config.json')} cannot be used: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{shown(file)} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{shown(file)} cannot be read: it holds no fields")
    return content


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or in the shards that an index names."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(Path(str(file)).name == file for file in places.values()):
            raise FormatError(f"{shown(index)} cannot be read: weight_map must give each tensor the name of a file")
        files = sorted(set(places.values()))
    elif not (folder / files[0]).exists():
        raise FormatError(
            f"{shown(folder)} holds no model.safetensors; "
            "save it with transformers' model.save_pretrained(folder), which writes that"
        )
    return {name: tensor for file in files for name, tensor in read_tensors(folder / file).items()}


def _checkpoint(config: ModelConfig, weights: dict[str, Tensor], folder: Path, source: Path, device: str) -> Checkpoint:
    """A foreign folder's weights, by our names, as a checkpoint, with its tokenizer if that is SentencePiece."""
    kinds = {tensor.dtype for tensor in weights.values()}
    if odd := [kind for kind in kinds if kind not in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]:
        raise FormatError(f"{shown(source)} holds weights of {odd[0]}; quantised weights are not supported")
    widest = functools.reduce(torch.promote_types, kinds, next(iter(kinds), torch.float32))
    model = empty_model(config)
    fill_model(model, {name: tensor.to(widest) for name, tensor in weights.items()}, source)
    tokenizer, file = None, folder / "tokenizer.model"
    try:
        tokenizer = Tokenizer(file)
    except (FileNotFoundError, TokenizerError):
        warnings.warn(
            f"{shown(folder)} has no SentencePiece tokenizer.model, so .tokenizer is None: turn text into ids with "
            f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}), and call the model with ids",
            stacklevel=3,
        )
    model = model.to(pick_device(device)).eval()
    return Checkpoint(model, tokenizer, {"model": config.to_dict(), "step": 0}, 0, folder)


def from_meta(folder: str | os.PathLike[str], device: str = "auto", max_seq_len: int = 2048) -> Checkpoint:
    """Open a folder as Meta publishes Llama: params.json, consolidated.00.pth, tokenizer.model.

    Args:
        folder: of a model in one piece; those of 13B and more come in several.
        device: "auto", "cpu", "cuda" or "mps".
        max_seq_len: the longest window, which Meta's files do not say.

    Returns:
        As `from_hf` does.

    Raises:
        FormatError: if a file is missing or no such file, or the model has what ours has not, by name.
        CheckpointError: for weights that are missing, too many or of another shape.
    """
    folder = resolve(folder)
    params, file = _read_json(folder / "params.json"), folder / "consolidated.00.pth"
    wrong = [f"{name}={value!r}" for name, value in params.items() if name not in META_PARAMS]
    wrong += ["use_scaled_rope=True"] if params.get("use_scaled_rope") else []
    wrong += ["weights in several pieces"] if (folder / "consolidated.01.pth").exists() else []
    if wrong:
        raise FormatError(f"{shown(folder)} has what is not supported: " + "; ".join(wrong))
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # tensors only, never code
        weights = {str(name): tensor for name, tensor in weights.items() if name != "rope.freqs"}
        config = ModelConfig(
            vocab_size=len(weights["tok_embeddings.weight"]),  # params.json says -1 in places
            dim=params["dim"],
            hidden_dim=len(weights["layers.0.feed_forward.w1.weight"]),  # and gives only a recipe for this
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 10_000.0),
            max_seq_len=max_seq_len,
            tie_embeddings="output.weight" not in weights,
        )
    except Exception as error:  # torch raises whatever its reader meets
        first = str(error).split("\n")[0]
        raise FormatError(f"{shown(file)} or params.json cannot be read: {type(error).__name__}: {first}") from None
    return _checkpoint(config, weights, folder, file, device)
