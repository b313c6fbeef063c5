"""Models from elsewhere: Hugging Face folders and Meta's, opened as ours."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmcore.checkpoint import Checkpoint, CheckpointError, model_with, read_tensors
from llmcore.config import ConfigError, ModelConfig
from llmcore.device import pick_device
from llmcore.files import pointer_hint, read_json, resolve, shown
from llmcore.formats import HF_NAMES, FormatError, to_pairs
from llmcore.tokenizer import Tokenizer, TokenizerError

OUR_NAMES = {theirs: ours for ours, theirs in HF_NAMES.items()}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_SIZE = {"type": "integer", "minimum": 1, "maximum": 1 << 40}
_MAYBE_SIZE = {"type": ["integer", "null"], "minimum": 1, "maximum": 1 << 40}  # null: what is missing is said later
_NUMBER = {"type": ["number", "null"]}
_ROPE = {
    "type": ["object", "null"],
    "properties": {"rope_type": {"type": "string"}, "type": {"type": "string"}, "rope_theta": _NUMBER},
}
HF_SCHEMA = {
    "type": "object",
    "properties": {
        "vocab_size": _MAYBE_SIZE,
        "hidden_size": _MAYBE_SIZE,
        "intermediate_size": _MAYBE_SIZE,
        "num_hidden_layers": _MAYBE_SIZE,
        "num_attention_heads": _MAYBE_SIZE,
        "num_key_value_heads": _MAYBE_SIZE,
        "head_dim": _MAYBE_SIZE,
        "max_position_embeddings": {"type": "integer", "minimum": 1, "maximum": 1 << 24},
        "rms_norm_eps": {"type": "number"},
        "rope_theta": _NUMBER,
        "tie_word_embeddings": {"type": "boolean"},
        "rope_parameters": _ROPE,
        "rope_scaling": _ROPE,
    },
}
META_SCHEMA = {
    "type": "object",
    "required": ["dim", "n_layers", "n_heads"],
    "properties": {
        "dim": _SIZE,
        "n_layers": _SIZE,
        "n_heads": _SIZE,
        "n_kv_heads": _MAYBE_SIZE,
        "vocab_size": {"type": "integer", "minimum": -1},
        "multiple_of": _SIZE,
        "ffn_dim_multiplier": _NUMBER,
        "norm_eps": {"type": "number"},
        "rope_theta": {"type": "number"},
        "use_scaled_rope": {"type": "boolean"},
        "max_batch_size": {"type": "integer"},
        "max_seq_len": {"type": "integer"},
        "model_parallel_size": {"type": "integer"},
    },
}


def from_hf(folder: str | os.PathLike[str], device: str = "auto", max_seq_len: int | None = None) -> Checkpoint:
    """Open a Hugging Face folder with a Llama as our model.

    Where config.json and the weights disagree about tied embeddings, the weights decide, as in transformers: an output
    matrix of its own opens untied, with a warning.

    Args:
        folder: config.json and safetensors, in one file or sharded; tokenizer.model if it is to have a tokenizer.
        device: "auto", "cpu", "cuda" or "mps".
        max_seq_len: the longest window. None: the folder's `max_position_embeddings`.

    Returns:
        The model with weights in the dtype they are stored in, and its tokenizer, or None (with a warning) where
        that is not SentencePiece. Step 0.

    Raises:
        FormatError: for files that cannot be read, and for what our model does not have, by name: other architectures,
            biases, other rotary embeddings, quantised weights.
        CheckpointError: for weights that are missing, too many, of another shape, or not finite.
    """
    folder = resolve(folder)
    config = _config_from_hf(_read_json(folder / "config.json", HF_SCHEMA), folder, max_seq_len)
    files = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in _shapes(file).items():
            if name in shapes:
                raise FormatError(f"{shown(file)} holds {name}, which another file of the folder holds too")
            shapes[name] = shape
    source = folder / "model.safetensors"
    if not config.tie_embeddings and "lm_head.weight" not in shapes and "model.embed_tokens.weight" in shapes:
        raise FormatError(
            f"{shown(folder)} holds no lm_head.weight, and config.json does not say that the embedding is the output "
            "matrix too. If it is, set tie_word_embeddings to true there; else the weights are not complete"
        )
    ours = {name: _our_name(name) for name in shapes if not name.endswith("rotary_emb.inv_freq")}
    found = {ours[name]: shapes[name] for name in ours}
    if config.tie_embeddings and "tok_embeddings.weight" not in found and "output.weight" in found:
        ours["lm_head.weight"] = "tok_embeddings.weight"  # stored once, under the other name
        found["tok_embeddings.weight"] = found.pop("output.weight")
    _check_shapes(config, found, source)

    weights = {}
    assert config.head_dim
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name not in ours:
                _check_frequencies(name, tensor, config, file)
                continue
            _check_dtype(tensor, file)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weights[ours[name]] = to_pairs(tensor, config.head_dim)
            else:
                weights[ours[name]] = tensor
    if config.tie_embeddings and "output.weight" in weights:
        output, embedding = weights["output.weight"], weights["tok_embeddings.weight"]
        if output.dtype == embedding.dtype and torch.equal(output, embedding):
            del weights["output.weight"]
        else:
            config = dataclasses.replace(config, tie_embeddings=False)
            warnings.warn(
                f"{shown(folder / 'config.json')} says tie_word_embeddings=true, but lm_head.weight is not the "
                "embedding: opened with both, untied",
                stacklevel=2,
            )
    return _checkpoint(config, weights, folder, source, device)


def _config_from_hf(found: dict[str, Any], folder: Path, max_seq_len: int | None) -> ModelConfig:
    """Our configuration from theirs; defaults are those of transformers' LlamaConfig.

    Raises:
        FormatError: naming every field that our model cannot follow.
    """
    file = shown(folder / "config.json")
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
        f"{name}={_short(value)}, and only {only!r} is supported"
        for name, (value, only) in fits.items()
        if value != only
    ]
    if wrong:
        raise FormatError(f"{file} describes a model that is not ours: " + "; ".join(wrong))
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if missing := [name for name in sizes if name not in found]:
        raise FormatError(f"{file} cannot be used: it has no {', '.join(missing)}")
    thetas = {theta for theta in (rope.get("rope_theta"), found.get("rope_theta")) if theta is not None}
    if len(thetas) > 1:
        raise FormatError(f"{file} cannot be used: it gives rope_theta twice, {' and '.join(map(str, thetas))}")
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
            rope_theta=thetas.pop() if thetas else 10_000.0,
            max_seq_len=found.get("max_position_embeddings", 2048) if max_seq_len is None else max_seq_len,
            tie_embeddings=found.get("tie_word_embeddings", False),
        )
    except ConfigError as error:
        raise FormatError(f"{file} cannot be used: {error}") from None


# Files


def _read_json(file: Path, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, checked.

    Raises:
        FormatError: naming the file, and the field that is not as it must be.
    """
    _check_file(file)
    try:
        return read_json(file, schema)
    except (OSError, ValueError) as error:
        raise FormatError(f"{shown(file)} cannot be read: {error}") from None


def _check_file(file: Path) -> None:
    """Refuse what is no file, and Git LFS's placeholder for one."""
    try:
        if not file.is_file():
            raise FormatError(f"{shown(file)} cannot be read: there is no such file")
        if hint := pointer_hint(file):
            raise FormatError(f"{shown(file)} cannot be read: {hint}")
    except OSError as error:
        raise FormatError(f"{shown(file)} cannot be read: {error.strerror}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that an index names and describes."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.exists():
        if not one.exists():
            raise FormatError(
                f"{shown(folder)} holds no model.safetensors; "
                "save it with transformers' model.save_pretrained(folder), which writes that"
            )
        return [one]
    places = _read_json(index, {"type": "object"}).get("weight_map")
    if not isinstance(places, dict) or not places or not all(map(_is_name, places.values())):
        raise FormatError(f"{shown(index)} cannot be read: weight_map must give each tensor the name of a file")
    files = sorted({folder / file for file in places.values()})
    if one.exists() and one not in files:
        raise FormatError(f"{shown(folder)} holds model.safetensors and an index of other files; delete one of the two")
    held = {file.name: _shapes(file) for file in files}
    if lost := [name for name, file in places.items() if name not in held[file]]:
        raise FormatError(f"{shown(folder / places[lost[0]])} does not hold {lost[0]}, which {index.name} says it does")
    return files


def _is_name(file: Any) -> bool:
    """Whether this is the name of a weights file in the same folder, and no path."""
    return isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file) is not None


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, from its header alone."""
    _check_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{shown(file)} cannot be read: {error}") from None


# Weights


def _our_name(name: str) -> str:
    """A weight's name here, from Hugging Face's; one that is not known stays."""
    number, stem = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    stem = stem.removesuffix(".weight")
    if stem not in OUR_NAMES or not name.endswith(".weight"):
        return name
    return f"{f'layers.{number}.' if number else ''}{OUR_NAMES[stem]}.weight"


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


def _check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], source: Path) -> None:
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
        raise CheckpointError(f"{shown(source)} does not fit the model: " + "; ".join(some))


def _check_dtype(tensor: Tensor, source: Path) -> None:
    if tensor.dtype not in FLOATS:
        raise FormatError(f"{shown(source)} holds weights of {tensor.dtype}; quantised weights are not supported")


def _check_frequencies(name: str, tensor: Tensor, config: ModelConfig, source: Path) -> None:
    """Older files carry the rotary frequencies, one for each pair of a head: they are computed here, so must agree."""
    assert config.head_dim
    own = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    if tensor.shape != own.shape or not torch.allclose(tensor.float(), own, rtol=0.02, atol=1e-6):
        raise FormatError(
            f"{shown(source)} holds {name} for another model than config.json describes: "
            f"head_dim={config.head_dim}, rope_theta={config.rope_theta:g}"
        )


def _checkpoint(config: ModelConfig, weights: dict[str, Tensor], folder: Path, source: Path, device: str) -> Checkpoint:
    """A foreign folder's weights, by our names, as a checkpoint, with its tokenizer if that is SentencePiece."""
    kinds = {tensor.dtype for tensor in weights.values()}
    widest = functools.reduce(torch.promote_types, kinds, next(iter(kinds), torch.float32))
    model = model_with(config, {name: tensor.to(widest) for name, tensor in weights.items()}, source)
    tokenizer, file, without = None, folder / "tokenizer.model", "has no SentencePiece tokenizer.model"
    if file.exists():
        _check_file(file)
    try:
        tokenizer = Tokenizer(file)
    except (FileNotFoundError, TokenizerError):
        pass
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        without = f"has a tokenizer of {tokenizer.vocab_size:,} ids for a model of {config.vocab_size:,}"
        tokenizer = None
    if tokenizer is None:
        warnings.warn(
            f"{shown(folder)} {without}, so .tokenizer is None: turn text into ids with "
            f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}), and call the model with ids",
            stacklevel=3,
        )
    model = model.to(pick_device(device)).eval()
    return Checkpoint(model, tokenizer, {"model": config.to_dict(), "step": 0}, 0, folder)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"


# Meta


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
        CheckpointError: for weights that are missing, too many, of another shape, or not finite.
    """
    folder = resolve(folder)
    params, file = _read_json(folder / "params.json", {"type": "object"}), folder / "consolidated.00.pth"
    wrong = [f"{name}={_short(value)}" for name, value in params.items() if name not in META_SCHEMA["properties"]]
    wrong += ["use_scaled_rope=True"] if params.get("use_scaled_rope") else []
    wrong += ["weights in several pieces"] if (folder / "consolidated.01.pth").exists() else []
    if wrong:
        raise FormatError(f"{shown(folder)} has what is not supported: " + "; ".join(wrong))
    params = _read_json(folder / "params.json", META_SCHEMA)
    weights = _read_pth(file)
    frequencies = weights.pop("rope.freqs", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    vocab_size = params.get("vocab_size", -1)
    vocab_size = vocab_size if vocab_size > 0 else shapes.get("tok_embeddings.weight", (1,))[0]  # -1: not said
    try:
        config = ModelConfig(
            vocab_size=vocab_size,
            dim=params["dim"],
            hidden_dim=shapes.get("layers.0.feed_forward.w1.weight", (1,))[0],  # params.json has only a recipe
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 10_000.0),
            max_seq_len=max_seq_len,
            tie_embeddings="output.weight" not in weights,
        )
    except ConfigError as error:
        raise FormatError(f"{shown(folder / 'params.json')} cannot be used: {error}") from None
    _check_shapes(config, shapes, file)
    if frequencies is not None and config.head_dim and len(frequencies) != config.head_dim // 2:
        raise FormatError(
            f"{shown(file)} holds rope.freqs for heads of {2 * len(frequencies)}, and params.json says dim / n_heads = "
            f"{config.head_dim}"
        )
    return _checkpoint(config, weights, folder, file, device)


def _read_pth(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote: never code, and nothing larger than the file itself.

    Raises:
        FormatError: naming the file, if it holds anything but tensors by name.
    """
    _check_file(file)
    try:
        with zipfile.ZipFile(file) as parts:
            if any(part.file_size > part.compress_size for part in parts.infolist()):
                raise ValueError("it holds compressed parts, which torch.save does not write")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its reader meets, and advises to read the file unsafely
        first = "it holds more than tensors" if isinstance(error, UnpicklingError) else str(error).split("\n")[0]
        raise FormatError(f"{shown(file)} or params.json cannot be read: {type(error).__name__}: {first}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{shown(file)} cannot be read: it holds no weights by name, but a {type(content).__name__}")
    for name, tensor in content.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain or tensor.is_quantized or not tensor.dim():
            raise FormatError(f"{shown(file)} cannot be used: {_short(name)} is no name of a plain tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise FormatError(f"{shown(file)} cannot be used: {_short(name)} claims to be larger than what is stored")
        _check_dtype(tensor, file)
    return {name: tensor.detach() for name, tensor in content.items()}
