"""Hugging Face's folder with a Llama or a Qwen3: written for transformers, vLLM and torchtitan, and read back."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcore.checkpoint import Checkpoint, CheckpointError, dtype_name, read_tensors
from llmcore.config import ConfigError, ModelConfig
from llmcore.files import display_path, replacing_folder, resolve
from llmcore.formats.hf_tokenizer import write_hf_tokenizer
from llmcore.formats.shared import (
    MAYBE_SIZE,
    NUMBER,
    ROTATED,
    AnyCheckpoint,
    FormatError,
    as_checkpoint,
    check_dtype,
    check_file,
    check_shapes,
    folder_tokenizers,
    open_checkpoint,
    read_config_file,
    shortened,
    to_halves,
    to_pairs,
    translate,
    weights_of,
)
from llmcore.model import rope_frequencies

HF_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "README.md",  # this and the picture are written for the Hub
    "training.png",
}

# our names of weights -> theirs
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUR_NAMES = {theirs: ours for ours, theirs in HF_NAMES.items()}
Shapes = dict[str, tuple[int, ...]]  # of tensors, by name

# our names of Llama 3.1's rotary scaling -> theirs in `rope_parameters`
ROPE_NAMES = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
}
# what the classes of transformers assume where config.json says nothing
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen3": {"max_position_embeddings": 32_768, "head_dim": 128, "num_key_value_heads": 32},
}

# what their config.json must look like
ROPE_SCHEMA = {
    "type": ["object", "null"],
    "properties": {
        "rope_type": {"type": "string"},
        "type": {"type": "string"},
        "rope_theta": NUMBER,
        **dict.fromkeys(ROPE_NAMES.values(), NUMBER),
    },
}
HF_SCHEMA = {
    "type": "object",
    "properties": {
        "vocab_size": MAYBE_SIZE,
        "hidden_size": MAYBE_SIZE,
        "intermediate_size": MAYBE_SIZE,
        "num_hidden_layers": MAYBE_SIZE,
        "num_attention_heads": MAYBE_SIZE,
        "num_key_value_heads": MAYBE_SIZE,
        "head_dim": MAYBE_SIZE,
        "max_position_embeddings": {"type": "integer", "minimum": 1, "maximum": 1 << 24},
        "rms_norm_eps": {"type": "number"},
        "rope_theta": NUMBER,
        "tie_word_embeddings": {"type": "boolean"},
        "rope_parameters": ROPE_SCHEMA,
        "rope_scaling": ROPE_SCHEMA,
        "layer_types": {"type": ["array", "null"], "maxItems": 1 << 16, "items": {"type": "string"}},
    },
}


# Reading


def from_hf(folder: str | os.PathLike[str], device: str = "auto", max_seq_len: int | None = None) -> Checkpoint:
    """Open a Hugging Face folder with a Llama or a Qwen3 as our model.

    If config.json and the weights disagree about tied embeddings, the weights decide, as in transformers: a model with
    a separate output matrix is opened untied, with a warning.

    Args:
        folder: holds config.json and safetensors, in one file or in shards; for a tokenizer, tokenizer.model, or
            tokenizer.json where that is not there or has more ids than the model.
        device: "auto", "cpu", "cuda" or "mps".
        max_seq_len: the longest window. None: the folder's `max_position_embeddings`.

    Returns:
        The model with weights in the dtype of the file, and its tokenizer; that is None (with a warning) if it is
        neither a SentencePiece model nor byte-level BPE. What it would change in a text is left out, with a warning.
        The step is 0.

    Raises:
        FormatError: for files that cannot be read, and for features that our model does not have, by name: other
            architectures, biases, other rotary embeddings, quantised weights.
        CheckpointError: for weights that are missing, unexpected, of another shape, or not finite.
    """
    folder = resolve(folder)
    config = _model_config(read_config_file(folder / "config.json", HF_SCHEMA), folder, max_seq_len)

    # names and shapes must fit before any weight is read
    files = _weight_files(folder)
    shapes = _merged(files)
    names = _our_names(shapes, config, folder)
    source = folder / "model.safetensors"
    check_shapes(config, {ours: shapes[theirs] for theirs, ours in names.items()}, source)

    weights = _read_weights(files, names, config)
    if config.tie_embeddings and "output.weight" in weights:
        output, embedding = weights["output.weight"], weights["tok_embeddings.weight"]
        if output.dtype == embedding.dtype and torch.equal(output, embedding):
            del weights["output.weight"]
        else:
            config = dataclasses.replace(config, tie_embeddings=False)
            warnings.warn(
                f"{display_path(folder / 'config.json')} says tie_word_embeddings=true, but lm_head.weight is not the "
                "embedding: opened with both, untied",
                stacklevel=2,
            )
    return as_checkpoint(config, weights, folder, source, device, folder_tokenizers(folder))


def _model_config(content: dict[str, Any], folder: Path, max_seq_len: int | None) -> ModelConfig:
    """Our configuration from the content of config.json. Defaults are those of transformers' configurations.

    Raises:
        FormatError: naming every field that our model does not support.
    """
    file = display_path(folder / "config.json")

    # features that our model does not have
    ropes = [content.get(name) or {} for name in ("rope_scaling", "rope_parameters")]  # before version 5, and since
    rope = ropes[0] or ropes[1]
    rope_type = rope.get("rope_type") or rope.get("type") or "default"

    # field -> its value, and the values that are supported
    other_layers = sorted({*(content.get("layer_types") or [])} - {"full_attention"})
    supported: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model_type": (content.get("model_type"), tuple(DEFAULTS)),
        "hidden_act": (content.get("hidden_act", "silu"), ("silu",)),
        "attention_bias": (content.get("attention_bias", False), (False,)),
        "mlp_bias": (content.get("mlp_bias", False), (False,)),
        "use_sliding_window": (content.get("use_sliding_window", False), (False,)),
        "layer_types": (other_layers[:1] or ["full_attention"], (["full_attention"],)),
        "rope_type": (rope_type, ("default", "llama3")),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 1)) or 1,
            (1,),
        ),
        "quantization_config": (content.get("quantization_config"), (None,)),
    }
    unsupported = [
        f"{name}={shortened(value)}, and only {' or '.join(map(repr, values))} is supported"
        for name, (value, values) in supported.items()
        if value not in values
    ]
    if unsupported:
        raise FormatError(f"{file} describes a model with unsupported features: " + "; ".join(unsupported))

    # sizes
    content = DEFAULTS[content["model_type"]] | content
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if missing := [name for name in sizes if name not in content]:
        raise FormatError(f"{file} cannot be used: it has no {', '.join(missing)}")
    thetas = {each["rope_theta"] for each in (*ropes, content) if each.get("rope_theta") is not None}
    scaling: dict[str, Any] = {}
    if rope_type == "llama3":
        scaling = {ours: rope.get(theirs) for ours, theirs in ROPE_NAMES.items()}
    if unset := [ROPE_NAMES[name] for name, value in scaling.items() if value is None]:
        raise FormatError(f"{file} cannot be used: its rotary embedding of type llama3 has no {', '.join(unset)}")
    if len(thetas) > 1:
        raise FormatError(f"{file} cannot be used: it gives rope_theta twice, {' and '.join(map(str, thetas))}")

    try:
        return ModelConfig(
            vocab_size=content["vocab_size"],
            dim=content["hidden_size"],
            hidden_dim=content["intermediate_size"],
            n_layers=content["num_hidden_layers"],
            n_heads=content["num_attention_heads"],
            n_kv_heads=content.get("num_key_value_heads"),
            head_dim=content.get("head_dim"),
            norm_eps=content.get("rms_norm_eps", 1e-6),
            rope_theta=thetas.pop() if thetas else 10_000.0,
            max_seq_len=content["max_position_embeddings"] if max_seq_len is None else max_seq_len,
            tie_embeddings=content.get("tie_word_embeddings", False),
            qk_norm=content["model_type"] == "qwen3",
            **scaling,
        )
    except ConfigError as error:
        raise FormatError(f"{file} cannot be used: {error}") from None


def _weight_files(folder: Path) -> dict[Path, Shapes]:
    """The safetensors files of a folder, with their tensors' shapes: one, or the shards that an index describes."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise FormatError(
                f"{display_path(folder)} holds no model.safetensors; "
                "save it with transformers' model.save_pretrained(folder), which writes that"
            )
        return {single: _shapes(single)}

    # in shards
    places = read_config_file(index, {"type": "object"}).get("weight_map")
    if not isinstance(places, dict) or not places or not all(map(_is_file_name, places.values())):
        raise FormatError(f"{display_path(index)} cannot be read: weight_map must give each tensor the name of a file")
    files = sorted({folder / file for file in places.values()})
    if single.exists() and single not in files:
        raise FormatError(
            f"{display_path(folder)} holds model.safetensors and an index of other files; delete one of the two"
        )
    shapes = {file: _shapes(file) for file in files}
    for name, file_name in places.items():
        if name not in shapes[folder / file_name]:
            raise FormatError(
                f"{display_path(folder / file_name)} does not hold {shortened(name)}, although {index.name} says so"
            )
    return shapes


def _is_file_name(file: Any) -> bool:
    """Whether this is the name of a weights file in the same folder, not a path."""
    return isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file) is not None


def _shapes(file: Path) -> Shapes:
    """The shape of each tensor in a safetensors file, from its header alone."""
    check_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{display_path(file)} cannot be read: {error}") from None


def _merged(files: dict[Path, Shapes]) -> Shapes:
    """The shape of each tensor in several files. No two files may hold the same tensor."""
    shapes: Shapes = {}
    for file, found in files.items():
        for name, shape in found.items():
            if name in shapes:
                raise FormatError(
                    f"{display_path(file)} holds {shortened(name)}, which another file of the folder holds too"
                )
            shapes[name] = shape
    return shapes


def _our_names(shapes: Shapes, config: ModelConfig, folder: Path) -> dict[str, str]:
    """Our name of each weight by its Hugging Face name, without the rotary frequencies that older files hold."""
    names = {name: _our_name(name) for name in shapes if not name.endswith("rotary_emb.inv_freq")}
    has_embedding, has_output = "model.embed_tokens.weight" in shapes, "lm_head.weight" in shapes
    if config.tie_embeddings and has_output and not has_embedding:
        names["lm_head.weight"] = "tok_embeddings.weight"  # the same matrix, stored under the other name
    if not config.tie_embeddings and has_embedding and not has_output:
        raise FormatError(
            f"{display_path(folder)} holds no lm_head.weight, and config.json does not say that the embedding is "
            "the output matrix too. If it is, set tie_word_embeddings to true there; else the weights are not complete"
        )
    return names


def _our_name(name: str) -> str:
    """Our name of a weight from its Hugging Face name. An unknown name stays as it is."""
    number, stem = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    stem = stem.removesuffix(".weight")
    if stem not in OUR_NAMES or not name.endswith(".weight"):
        return name
    return f"{f'layers.{number}.' if number else ''}{OUR_NAMES[stem]}.weight"


def _read_weights(files: Iterable[Path], names: dict[str, str], config: ModelConfig) -> dict[str, Tensor]:
    """The weights by our names, in our layout."""
    assert config.head_dim
    weights = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name not in names:
                _check_frequencies(name, tensor, config, file)
                continue
            check_dtype(tensor, file)
            if names[name].endswith(ROTATED):
                tensor = to_pairs(tensor, config.head_dim)
            weights[names[name]] = tensor
    return weights


def _check_frequencies(name: str, tensor: Tensor, config: ModelConfig, source: Path) -> None:
    """Compare the rotary frequencies that older files hold, (head_dim / 2,), with those that our model computes."""
    ours = rope_frequencies(config)
    if tensor.shape != ours.shape or not torch.allclose(tensor.float(), ours, rtol=0.02, atol=1e-6):
        raise FormatError(
            f"{display_path(source)} holds {name} for another model than config.json describes: "
            f"head_dim={config.head_dim}, rope_theta={config.rope_theta:g}"
        )


# Writing


def to_hf(checkpoint: AnyCheckpoint, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
    """Write a folder that `transformers.AutoModelForCausalLM` and `AutoTokenizer` load without our code.

    Args:
        checkpoint: a `Checkpoint`, or what `load_checkpoint` takes.
        folder: replaced as a whole. It may hold only files of an earlier export.
        dtype: of the weights. None: their own.

    Returns:
        The folder: config.json, generation_config.json, model.safetensors; tokenizer.json, tokenizer_config.json
        and, for SentencePiece, tokenizer.model where the checkpoint has a tokenizer.

    Raises:
        CheckpointError: if there is no such checkpoint.
        FileExistsError: if the folder holds other files.
    """
    checkpoint, folder = open_checkpoint(checkpoint), resolve(folder)
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    assert config.head_dim
    weights = {}
    for name, tensor in weights_of(checkpoint).items():
        if name.endswith(ROTATED):
            tensor = to_halves(tensor, config.head_dim)
        weights[translate(name, HF_NAMES, "model.layers.{}.")] = tensor.to(dtype or tensor.dtype).contiguous()

    ids = {}
    for name in ("bos", "eos", "pad"):
        if tokenizer is not None and getattr(tokenizer, f"{name}_id") >= 0:
            ids[f"{name}_token_id"] = getattr(tokenizer, f"{name}_id")
    description = _hf_config(config, weights["model.embed_tokens.weight"].dtype) | ids

    with replacing_folder(folder, HF_FILES) as new:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
        (new / "generation_config.json").write_text(json.dumps(ids, indent=2), encoding="utf-8")
        if tokenizer is not None:
            write_hf_tokenizer(tokenizer, new, config.vocab_size, config.max_seq_len)
    return folder


def _hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json, but for the special ids."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1:
        rope |= {"rope_type": "llama3", **{theirs: getattr(config, ours) for ours, theirs in ROPE_NAMES.items()}}
    description = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,  # transformers before version 5, vLLM, llama.cpp's converter
        "rope_parameters": rope,  # from version 5 on
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype_name(dtype),
        "torch_dtype": dtype_name(dtype),  # before version 5
    }
    return description | ({"rope_scaling": rope} if config.rope_scaling_factor != 1 else {})  # before version 5
