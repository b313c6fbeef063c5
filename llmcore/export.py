"""Our models in other programs' formats, and others' models in ours.

| format | read by | written by | read here by |
| --- | --- | --- | --- |
| Hugging Face Llama | transformers, vLLM, torchtitan | `to_hf` | `from_hf` |
| Meta Llama | Meta's own code | | `from_meta` |
| llama2.c | its C program | `to_llama2c` | |
| GGUF | llama.cpp and what builds on it | `to_gguf` | |

Names and shapes of the weights are Meta's already. What differs is mostly the rotary embedding: Meta, llama2.c and
llama.cpp turn neighbours (x0, x1), (x2, x3), … as we do; Hugging Face turns halves (x0, x_d/2), (x1, x_d/2+1), …, so
rows of wq and wk change places on the way there and back.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmcore.checkpoint import Checkpoint, empty_model, fill_model, load_checkpoint, read_tensors
from llmcore.config import ConfigError, ModelConfig
from llmcore.device import pick_device
from llmcore.files import replacing_folder, resolve, shown
from llmcore.hf_tokenizer import write_hf_tokenizer
from llmcore.tokenizer import Tokenizer, TokenizerError

AnyCheckpoint = Checkpoint | str | os.PathLike[str]

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


class FormatError(ValueError):
    """A file that cannot be read, or a model that a format cannot hold. The message names the file and the field."""


def _open(checkpoint: AnyCheckpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint, device="cpu")


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by our names, on the CPU; without the output matrix where it is the embedding's."""
    weights = {name: tensor.detach().cpu() for name, tensor in checkpoint.model.state_dict().items()}
    if checkpoint.model.config.tie_embeddings:
        del weights["output.weight"]
    return weights


# Hugging Face


def _translate(name: str, names: dict[str, str], layer: str) -> str:
    """A weight's name in another format, from its last parts and the prefix of a layer, such as "blk.{}."."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, number, stem = stem.split(".", 2)
        return layer.format(number) + names[stem] + ".weight"
    return names[stem] + ".weight"


def _to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, (heads * head_dim, dim), from interleaved pairs to halves: first all x, then all y."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """The way back from `_to_halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(checkpoint: AnyCheckpoint, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
    """Write a folder that `transformers.AutoModelForCausalLM` and `AutoTokenizer` load, without code of ours.

    Args:
        checkpoint: a loaded one, or what `load_checkpoint` takes.
        folder: replaced as a whole; it may hold nothing but an earlier export.
        dtype: of the weights. None: their own.

    Returns:
        The folder: config.json, generation_config.json, model.safetensors; tokenizer.json, tokenizer_config.json
        and tokenizer.model where the checkpoint has a tokenizer.

    Raises:
        CheckpointError: if there is no such checkpoint.
        FileExistsError: if the folder holds something else.
    """
    checkpoint, folder = _open(checkpoint), resolve(folder)
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    assert config.head_dim
    weights = {}
    for name, tensor in _weights(checkpoint).items():
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            tensor = _to_halves(tensor, config.head_dim)
        weights[_translate(name, HF_NAMES, "model.layers.{}.")] = tensor.to(dtype or tensor.dtype).contiguous()
    kind = str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    ids = {} if tokenizer is None else {f"{n}_token_id": getattr(tokenizer, f"{n}_id") for n in ("bos", "eos", "pad")}
    ids = {name: id for name, id in ids.items() if id >= 0}
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # from version 5 on
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": kind,
        "torch_dtype": kind,  # before version 5
        **ids,
    }
    with replacing_folder(folder, HF_FILES) as new:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
        (new / "generation_config.json").write_text(json.dumps(ids, indent=2), encoding="utf-8")
        if tokenizer is not None:
            write_hf_tokenizer(tokenizer, new, config.max_seq_len)
    return folder


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
    names = {_translate(name, HF_NAMES, "model.layers.{}."): name for name in empty_model(config).state_dict()}
    weights = {}
    for name, tensor in _read_safetensors(folder).items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
            continue  # computed, or said already
        if (
            name.endswith(("q_proj.weight", "k_proj.weight"))
            and tensor.dim() == 2
            and not len(tensor) % config.head_dim
        ):
            tensor = _to_pairs(tensor, config.head_dim)
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


# Meta

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
