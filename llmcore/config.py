"""What to build and how to train it: two dataclasses and five presets. No torch in here."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self


class ConfigError(ValueError):
    """A configuration that cannot work. The message lists every field at fault and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the closest known ones, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


class _JSONConfig:
    """Strict conversion between a dataclass and JSON: unknown keys are errors."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dictionary. Raises ConfigError on unknown or missing keys."""
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = [key for key in values if key not in fields][:8]
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        wrong = [f"unknown key {reprlib.repr(key)}: {nearest(key, fields)}" for key in unknown]
        wrong += [f"missing key {name!r}" for name in required if name not in values]
        if wrong:
            raise ConfigError(f"{cls.__name__}: " + "; ".join(wrong))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> str:
        """All fields as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (and checked again)."""
        return type(self).from_dict({**self.to_dict(), **changes})


# The largest value of each field, far above those of known models. They are here so that a damaged or hostile file is
# refused before it makes the program allocate gigabytes, or build layers for minutes.
_LARGEST = {
    "vocab_size": 1 << 22,
    "dim": 1 << 17,
    "n_layers": 512,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "hidden_dim": 1 << 19,
    "max_seq_len": 1 << 24,
    "norm_eps": 1.0,
    "rope_theta": 1e12,
    "rope_scaling_factor": 1e6,
    "rope_low_freq_factor": 1e6,
    "rope_high_freq_factor": 1e6,
    "rope_original_max_seq_len": 1 << 24,
}
LARGEST_ROPE = 1 << 28  # max_seq_len times head_dim
# Fields of ModelConfig that came later. At their defaults they are not written, so that files stay what they were.
_LATER = ["qk_norm", "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"]
_LATER += ["rope_original_max_seq_len"]


@dataclass(frozen=True)
class ModelConfig(_JSONConfig):
    """Shape of a Llama-like decoder. Field names are those of Meta's `params.json`.

    Raises:
        ConfigError: at construction, with every field at fault.
    """

    vocab_size: int  # token ids
    dim: int  # width of the residual stream
    n_layers: int  # blocks
    n_heads: int  # query heads
    n_kv_heads: int | None = None  # key and value heads; fewer than n_heads is grouped-query attention. None: as many
    head_dim: int | None = None  # width of one head, even, since RoPE turns pairs. None: dim / n_heads
    hidden_dim: int | None = None  # width inside the SwiGLU MLP. None: 8/3 dim, rounded up to a multiple of 64
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    max_seq_len: int = 1024  # longest window that the model sees, in tokens
    tie_embeddings: bool = False  # use the token embedding as the output matrix too
    qk_norm: bool = False  # RMSNorm on the queries and keys of each head, as Qwen3 has
    # Llama 3.1's scaling of the rotary frequencies for a longer context than the original one, see `rope_frequencies`
    rope_scaling_factor: float = 1.0  # how much slower the slowest pairs turn; 1: no scaling
    rope_low_freq_factor: float = 1.0  # turns in the original context below which a pair is slowed by the whole factor
    rope_high_freq_factor: float = 4.0  # and above which it stays as it is
    rope_original_max_seq_len: int = 8192  # the original context, in tokens

    def __post_init__(self) -> None:
        wrong = _check_types(self)
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if name not in wrong and value is not None and not 0 < value <= largest:
                limit = f" and at most {largest:,}" if value > 0 else ""
                wrong[name] = f"{name}={value} must be above 0{limit}"
        if "rope_theta" not in wrong and self.rope_theta < 1:
            wrong["rope_theta"] = f"rope_theta={self.rope_theta} must be 1 or more: frequencies must not grow"
        if "rope_scaling_factor" not in wrong and self.rope_scaling_factor < 1:
            wrong["rope_scaling_factor"] = (
                f"rope_scaling_factor={self.rope_scaling_factor} must be 1 or more: it makes the context longer"
            )
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if not {"rope_low_freq_factor", "rope_high_freq_factor"} & set(wrong) and high < low + 0.01:
            wrong["rope_high_freq_factor"] = f"rope_high_freq_factor={high} must be above rope_low_freq_factor={low}"

        # fields that follow from others
        if not {"dim", "n_heads", "n_kv_heads"} & set(wrong):
            if self.n_kv_heads is None:
                object.__setattr__(self, "n_kv_heads", self.n_heads)
            if self.head_dim is None:
                object.__setattr__(self, "head_dim", self.dim // self.n_heads)
                if self.dim % self.n_heads:
                    wrong["dim"] = (
                        f"dim={self.dim} does not divide by n_heads={self.n_heads}; change one or set head_dim"
                    )
            if self.hidden_dim is None:
                object.__setattr__(self, "hidden_dim", -(-self.dim // 24) * 64)
            if self.n_heads % self.n_kv_heads:  # type: ignore[operator]
                wrong["n_kv_heads"] = f"n_heads={self.n_heads} does not divide by n_kv_heads={self.n_kv_heads}"

        # what rotary embedding needs
        if self.head_dim is not None and "head_dim" not in wrong and self.head_dim % 2:
            wrong["head_dim"] = f"head_dim={self.head_dim} must be even: rotary embedding turns pairs"
        if not wrong and self.max_seq_len * self.head_dim > LARGEST_ROPE:  # type: ignore[operator]
            wrong["max_seq_len"] = (
                f"max_seq_len={self.max_seq_len} with head_dim={self.head_dim}: the two multiplied must be at most "
                f"{LARGEST_ROPE:,}, or the rotary table takes gigabytes"
            )
        if wrong:
            raise ConfigError("ModelConfig: " + "; ".join(wrong.values()))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, ready for JSON; without those of `_LATER` that have their default value."""
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in _LATER}
        return {name: value for name, value in super().to_dict().items() if value != defaults.get(name, ...)}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, and those that follow from them.

        A field with the value that follows from the others follows them again. With another `dim`, the number of heads
        and `hidden_dim` keep their share of it: as near as heads of an even size and multiples of 64 allow.
        """
        derived = {"n_kv_heads": self.n_heads, "head_dim": self.dim / self.n_heads}
        derived["hidden_dim"] = -(-self.dim // 24) * 64
        changes = {name: None for name, value in derived.items() if getattr(self, name) == value} | changes
        dim = changes.get("dim")
        if type(dim) is int and 0 < dim != self.dim:
            heads = max(1, round(self.n_heads * dim / self.dim))
            if changes.get("head_dim", self.head_dim) is None:
                heads = next((n for n in range(heads, 0, -1) if not dim % (2 * n)), 1)
            hidden = max(64, 64 * round(self.hidden_dim * dim / self.dim / 64))  # type: ignore[operator]
            changes = {"n_heads": heads, "hidden_dim": hidden} | changes
        return super().replace(**changes)

    def n_params(self, embeddings: bool = True) -> int:
        """Exact number of trainable parameters; with embeddings=False without the embedding and output matrices."""
        assert self.head_dim and self.n_kv_heads and self.hidden_dim
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        norms = 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0)
        block = attention + 3 * self.dim * self.hidden_dim + norms
        tables = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * block + self.dim + (tables if embeddings else 0)

    def flops_per_token(self, context_size: int | None = None) -> float:
        """FLOPs to train on one token, forward and backward, without recomputation.

        Six per weight that multiplies (PaLM, appendix B, arXiv:2204.02311), plus causal attention's two
        products, which see half the context on average.
        """
        assert self.head_dim
        multiplying = self.n_params(embeddings=False) + self.vocab_size * self.dim
        context = context_size or self.max_seq_len
        return 6.0 * multiplying + 6.0 * self.n_layers * self.n_heads * self.head_dim * context


@dataclass(frozen=True)
class TrainConfig(_JSONConfig):
    """How to train. Sizes are in windows of `context_size` tokens, intervals in optimizer steps.

    Raises:
        ConfigError: at construction, with every field at fault.
    """

    max_steps: int = 1000  # optimizer steps in the whole run
    batch_size: int = 8  # windows per forward pass
    grad_accum_steps: int = 1  # forward passes per optimizer step
    context_size: int | None = None  # tokens per window. None: the model's max_seq_len

    optimizer: str = "adamw"  # "adamw", or "muon" (matrices by Muon, the rest by AdamW)
    learning_rate: float = 6e-4  # peak learning rate of AdamW
    muon_learning_rate: float = 2e-2  # peak learning rate of Muon's matrices, in AdamW-like units
    schedule: str = "cosine"  # "cosine", "wsd" (constant, then linear decay) or "plateau" (lower if validation stalls)
    warmup_steps: int = 100  # linear warm-up
    min_lr_ratio: float = 0.1  # the last learning rate as a share of the peak
    decay_fraction: float = 0.2  # share of the run in which "wsd" decays
    plateau_patience: int = 5  # validations without a new best before "plateau" lowers the rate
    plateau_factor: float = 0.5  # what "plateau" multiplies the rate by
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW's first moment decay
    beta2: float = 0.95  # AdamW's second moment decay
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off

    precision: str = "auto"  # "auto", "bf16", "fp16" (CUDA only) or "fp32"; weights are always float32
    # what the backward pass computes again to save memory: "none", "full" (whole blocks) or "selective" (all but matrix
    # products and attention)
    activation_checkpointing: str = "none"
    compile: str = "auto"  # "auto" (if the run is long enough to win the time back), "on" or "off"

    eval_interval: int = 200  # steps between validations; 0: only at the end
    # batches per validation, spread over the split; 0: all; None: as many as take at most 2% of the time
    eval_batches: int | None = None
    checkpoint_interval: int = 200  # steps between checkpoints; 0: only at the end or a stop
    checkpoint_minutes: float = 0.0  # also save when the last save is so long ago; 0: never for that reason
    keep_checkpoints: int = 2  # how many of the newest are kept, besides the best (its weights only); 2 or more
    sample_interval: int = 0  # steps between samples; 0: none
    sample_prompt: str = ""  # what samples continue
    sample_tokens: int = 64  # length of a sample
    max_skipped_steps: int = 20  # non-finite steps in a row that stop the run
    seed: int = 0  # of the order of the data

    def __post_init__(self) -> None:
        wrong = _check_types(self)
        for fits, wanted, names in _RANGES:
            for name in names:
                value = getattr(self, name)
                if name not in wrong and value is not None and not fits(value):
                    wrong[name] = f"{name}={value!r} must be {wanted}"
        for name, choices in CHOICES.items():
            if name not in wrong and getattr(self, name) not in choices:
                wrong[name] = f"{name}={getattr(self, name)!r} must be {', '.join(choices[:-1])} or {choices[-1]}"
        if wrong:
            raise ConfigError("TrainConfig: " + "; ".join(wrong.values()))

    @property
    def validation_batches(self) -> int:
        """How many batches a validation reads; 0: the whole split.

        By default it takes at most 2% of the time since the last one: a forward pass takes about a third of a training
        step on the same tokens. All of a run read the same batches, so that they can be compared.
        """
        only_at_the_end = not 0 < self.eval_interval < self.max_steps
        if self.eval_batches is not None or only_at_the_end:
            return self.eval_batches or 0
        return max(1, 6 * self.eval_interval * self.grad_accum_steps // 100)


_ABOVE_0 = ["max_steps", "batch_size", "grad_accum_steps", "context_size", "learning_rate", "muon_learning_rate"]
_ABOVE_0 += ["plateau_patience", "max_skipped_steps"]
_FROM_0 = ["warmup_steps", "weight_decay", "grad_clip", "eval_interval", "eval_batches", "checkpoint_interval"]
_FROM_0 += ["checkpoint_minutes", "sample_interval", "sample_tokens", "seed"]
_RANGES: list[tuple[Callable[[Any], bool], str, list[str]]] = [
    (lambda value: value > 0, "above 0", _ABOVE_0),
    (lambda value: value >= 0, "0 or more", _FROM_0),
    (lambda value: 0 <= value <= 1, "between 0 and 1", ["min_lr_ratio", "decay_fraction", "plateau_factor"]),
    (lambda value: 0 <= value < 1, "at least 0 and below 1", ["beta1", "beta2"]),
    (lambda value: value >= 2, "2 or more, because one may be damaged", ["keep_checkpoints"]),
]
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "wsd", "plateau"),
    "precision": ("auto", "bf16", "fp16", "fp32"),
    "activation_checkpointing": ("none", "selective", "full"),
    "compile": ("auto", "on", "off"),
}


def _check_types(config: Any) -> dict[str, str]:
    """The fields whose value is of another type than declared, each with what is wrong.

    An int may stand for a float, and becomes one. A bool may not stand for an int, nor NaN for a number.
    """
    wrong = {}
    for field in dataclasses.fields(config):
        name, value, kind = field.name, getattr(config, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        base = {"int": int, "float": float, "str": str, "bool": bool}[kind.split(" ")[0]]
        if base is float and type(value) is int:
            value = float(value) if abs(value) < 1e300 else math.inf
            object.__setattr__(config, name, value)

        if not isinstance(value, base) or (base is int and isinstance(value, bool)):
            wrong[name] = f"{name}={reprlib.repr(value)} must be of type {kind}"
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            wrong[name] = f"{name} holds half a surrogate, which is no character; leave it out"
        elif isinstance(value, float) and not math.isfinite(value):
            wrong[name] = f"{name}={value} must be a finite number"
    return wrong


# how often a long run is looked at
_LONG: dict[str, Any] = {
    "eval_interval": 500,
    "checkpoint_interval": 1000,
    "checkpoint_minutes": 30,
    "sample_interval": 1000,
}
_FULL: dict[str, Any] = {"activation_checkpointing": "full", **_LONG}
_SMALL: dict[str, Any] = {"max_steps": 100_000, "optimizer": "muon", "warmup_steps": 200, "min_lr_ratio": 0.0, **_LONG}

# What a preset means is the tokens of a step, batch x accumulation x context: notebook 4 cuts them to fit the memory.
# After the first two, `max_steps` is the most: notebook 4 takes fewer steps where these read the text four times.
PRESETS: dict[str, tuple[ModelConfig, TrainConfig]] = {
    # Reversing strings of letters and digits: notebook 03. 66 tokens: 62 symbols and four specials.
    # A small rope_theta, because there are only 66 positions: pairs that hardly turn within them carry no information.
    "toy-reverse": (
        ModelConfig(
            vocab_size=66,
            dim=128,
            n_layers=2,
            n_heads=4,
            hidden_dim=352,
            max_seq_len=80,
            tie_embeddings=True,
            rope_theta=30.0,
        ),
        TrainConfig(
            max_steps=810,
            batch_size=64,
            optimizer="muon",
            learning_rate=4e-3,
            warmup_steps=50,
            min_lr_ratio=0.0,
            weight_decay=0.01,
            eval_interval=90,
            checkpoint_interval=0,
        ),
    ),
    # One classical novel on a laptop CPU in minutes: the default.
    "scifi-mini": (
        ModelConfig(
            vocab_size=4000, dim=192, n_layers=4, n_heads=6, hidden_dim=512, max_seq_len=256, tie_embeddings=True
        ),
        TrainConfig(
            max_steps=1000,
            batch_size=8,
            optimizer="muon",
            learning_rate=2e-2,
            warmup_steps=50,
            min_lr_ratio=0.0,
            weight_decay=0.3,
            eval_interval=300,
            checkpoint_interval=250,
            sample_interval=250,
            sample_tokens=48,
        ),
    ),
    # A library of novels on a laptop's GPU, or a free one: `python -m tests.benchmarks.quality 10M` has the tuning.
    "scifi-10M": (
        ModelConfig(vocab_size=8000, dim=320, n_layers=6, n_heads=5, max_seq_len=512, tie_embeddings=True),
        TrainConfig(batch_size=16, learning_rate=1.5e-2, **_SMALL),
    ),
    "scifi-40M": (
        ModelConfig(vocab_size=8000, dim=512, n_layers=11, n_heads=8, max_seq_len=1024, tie_embeddings=True),
        TrainConfig(batch_size=32, learning_rate=3e-3, **_SMALL),
    ),
    # The real sizes, each on one 80 GB GPU. Batch x accumulation x context is about half a million tokens a step.
    "scifi-117M": (
        ModelConfig(vocab_size=16_000, dim=768, n_layers=12, n_heads=12, hidden_dim=2304, max_seq_len=1024),
        TrainConfig(max_steps=20_000, batch_size=64, grad_accum_steps=8, learning_rate=6e-4, warmup_steps=500, **_LONG),
    ),
    "scifi-1.5B": (
        ModelConfig(vocab_size=16_000, dim=2048, n_layers=28, n_heads=16, hidden_dim=5632, max_seq_len=1024),
        TrainConfig(
            max_steps=20_000, batch_size=16, grad_accum_steps=32, learning_rate=2.5e-4, warmup_steps=1000, **_FULL
        ),
    ),
    "zhwiki-2.46B": (
        ModelConfig(vocab_size=16_000, dim=2560, n_layers=30, n_heads=20, hidden_dim=6912, max_seq_len=2048),
        TrainConfig(
            max_steps=40_000, batch_size=8, grad_accum_steps=32, learning_rate=2e-4, warmup_steps=2000, **_FULL
        ),
    ),
}


# A new run that starts from a trained model's weights, which high rates would destroy.
GO_ON = TrainConfig(
    max_steps=100_000, batch_size=4, learning_rate=1e-4, muon_learning_rate=1e-3, warmup_steps=20, **_LONG
)
GO_ON_CONTEXT = 512  # tokens in a window of such a run, where the model has room for them
GO_ON_RATE = 0.3  # of the rates of a model of ours


def go_on(model: ModelConfig, train: dict[str, Any] | None = None, context_size: int | None = None) -> TrainConfig:
    """How to train a model that is trained already: `GO_ON`, or the way a model of ours was trained, at lower rates.

    Args:
        model: its shape.
        train: the settings of its own run, if it is one of ours.
        context_size: tokens in a window; None: `GO_ON_CONTEXT`, or as many as the model has room for.

    Raises:
        ConfigError: if the model has not room for context_size tokens.
    """
    context = context_size or min(GO_ON_CONTEXT, model.max_seq_len)
    if context > model.max_seq_len:
        raise ConfigError(f"context_size={context} is above the model's max_seq_len={model.max_seq_len}; lower it")
    settings = GO_ON.replace(context_size=context)
    if not train:
        return settings
    kept = ("optimizer", "learning_rate", "muon_learning_rate", "weight_decay", "batch_size", "grad_accum_steps")
    settings = settings.replace(**{name: train[name] for name in kept if name in train})
    rates = ("learning_rate", "muon_learning_rate")
    return settings.replace(**{name: GO_ON_RATE * getattr(settings, name) for name in rates})


def preset(name: str) -> tuple[ModelConfig, TrainConfig]:
    """The model and training configuration of a named preset.

    Raises:
        ConfigError: for an unknown name, with the nearest known ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r} is not known: {nearest(name, PRESETS)}")
    return PRESETS[name]
