"""Configurations: the presets' sizes, and refusal in words of everything that cannot work."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.config import PRESETS, ConfigError, ModelConfig, TrainConfig, preset
from llmcore.model import Transformer

from .helpers import examples, tiny_config

SIZES = {"scifi-117M": (116.6e6, 0.05e6), "scifi-1.5B": (1.504e9, 0.5e6), "zhwiki-2.46B": (2.46e9, 5e6)}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_counts_the_parameters_that_a_model_has(name: str) -> None:
    config = preset(name)[0]
    with torch.device("meta"):
        model = Transformer(config)
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    without = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("tok_embeddings", "output")))
    assert config.n_params(embeddings=False) == without


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_the_size_in_its_name(name: str) -> None:
    size, tolerance = SIZES[name]
    assert abs(preset(name)[0].n_params() - size) <= tolerance


def test_presets_between_the_small_and_the_real_ones() -> None:
    for name, size, context in (("scifi-10M", 10e6, 512), ("scifi-40M", 40e6, 1024)):
        model = preset(name)[0]
        assert abs(model.n_params() / size - 1) < 0.03 and (model.vocab_size, model.max_seq_len) == (8000, context)
    sizes = [model.n_params() for model, _ in PRESETS.values()]
    assert sizes == sorted(sizes)


def test_small_presets_stay_small() -> None:
    toy, mini = preset("toy-reverse")[0], preset("scifi-mini")[0]
    assert toy.n_params() <= 0.6e6 and toy.vocab_size <= 70 and toy.max_seq_len == 80
    assert 2e6 <= mini.n_params() <= 8e6 and 2000 <= mini.vocab_size <= 4000 and mini.max_seq_len == 256


def test_real_presets_have_the_shapes_of_the_design() -> None:
    shapes = {
        name: (m.dim, m.n_layers, m.n_heads, m.hidden_dim, m.max_seq_len, m.vocab_size)
        for name, (m, _) in PRESETS.items()
        if name in SIZES
    }
    assert shapes == {
        "scifi-117M": (768, 12, 12, 2304, 1024, 16000),
        "scifi-1.5B": (2048, 28, 16, 5632, 1024, 16000),
        "zhwiki-2.46B": (2560, 30, 20, 6912, 2048, 16000),
    }


@pytest.mark.parametrize(("typed", "meant"), [("scifi-117m", "scifi-117M"), ("toyreverse", "toy-reverse")])
def test_unknown_preset_names_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"{typed}.*did you mean.*{meant}"):
        preset(typed)


def test_preset_unlike_any_lists_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("?")
    assert all(name in str(caught.value) for name in PRESETS)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'learning_rte'.*learning_rate"):
        TrainConfig.from_dict({"learning_rte": 1e-3})


def test_a_setting_of_an_earlier_version_is_refused_with_its_new_name() -> None:
    with pytest.raises(ConfigError, match=r"'gradient_checkpointing'.*activation_checkpointing"):
        TrainConfig.from_dict({"gradient_checkpointing": True})


def test_unknown_and_missing_keys_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({"vocab_size": 10, "n_layer": 1, "n_head": 1})
    assert all(f"'{key}'" in str(caught.value) for key in ("n_layer", "n_head", "dim", "n_layers", "n_heads"))


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    for config in preset(name):
        assert type(config).from_dict(json.loads(config.to_json())) == config


def test_what_came_later_is_written_only_where_it_is_used() -> None:
    """So the files of other models stay as they were, and older ones open."""
    assert list(tiny_config().to_dict())[-2:] == ["max_seq_len", "tie_embeddings"]
    relative = tiny_config(qk_norm=True, rope_scaling_factor=32)
    written = json.loads(relative.to_json())
    assert written == tiny_config().to_dict() | {"qk_norm": True, "rope_scaling_factor": 32.0}
    assert ModelConfig.from_dict(written) == relative and relative.replace(qk_norm=False).to_dict() != written


def test_derived_fields_follow_llama() -> None:
    config = ModelConfig(vocab_size=10, dim=96, n_layers=1, n_heads=4)
    assert (config.n_kv_heads, config.head_dim, config.hidden_dim) == (4, 24, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"dim": 12, "n_heads": 4}, "head_dim=3 must be even"),
        ({"dim": 30, "n_heads": 4}, "dim=30 does not divide by n_heads=4"),
        ({"n_kv_heads": 3}, "n_heads=4 does not divide by n_kv_heads=3"),
        ({"n_kv_heads": 8}, "n_heads=4 does not divide by n_kv_heads=8"),
        ({"n_layers": True}, "n_layers=True must be of type int"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be a finite number"),
        ({"rope_theta": 10**400}, "rope_theta=.* must be a finite number"),
        ({"rope_theta": 1e-300}, "rope_theta=1e-300 must be 1 or more"),
        ({"rope_theta": 0.99}, "rope_theta=0.99 must be 1 or more"),
        ({"qk_norm": 1}, "qk_norm=1 must be of type bool"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor=0.5 must be 1 or more"),
        ({"rope_scaling_factor": None}, "rope_scaling_factor=None must be of type float"),
        ({"rope_scaling_factor": 1e7}, "rope_scaling_factor=10000000.0 must be above 0 and at most 1,000,000"),
        ({"rope_low_freq_factor": 4}, "rope_high_freq_factor=4.0 must be above rope_low_freq_factor=4.0"),
        ({"rope_low_freq_factor": 5e-324, "rope_high_freq_factor": 1e-323}, "rope_high_freq_factor=1e-323 must be"),
        ({"rope_original_max_seq_len": 0}, "rope_original_max_seq_len=0 must be above 0"),
    ],
)
def test_impossible_shape_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_smallest_shape_works() -> None:
    config = ModelConfig(vocab_size=1, dim=2, n_layers=1, n_heads=1, hidden_dim=1, max_seq_len=1)
    assert Transformer(config)(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 1, 1)


WRONG_MODEL = {"vocab_size": "many", "dim": -1, "n_layers": 0, "head_dim": 7, "norm_eps": float("inf")}
WRONG_TRAIN = {
    "max_steps": 0,
    "batch_size": 2.5,
    "learning_rate": float("nan"),
    "weight_decay": -0.1,
    "beta2": 1.0,
    "context_size": 0,
    "keep_checkpoints": 1,
    "min_lr_ratio": 2,
    "optimizer": "adam",
    "schedule": "cosin",
    "activation_checkpointing": "some",
}


def test_model_error_lists_every_field_at_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(**WRONG_MODEL)
    assert [name for name in WRONG_MODEL if f"{name}=" not in str(caught.value)] == []


def test_train_error_lists_every_field_at_fault_and_no_other() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(WRONG_TRAIN)
    named = {f.name for f in dataclasses.fields(TrainConfig) if f" {f.name}=" in str(caught.value)}
    assert named == set(WRONG_TRAIN)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=1),
)


@pytest.mark.parametrize("kind", [ModelConfig, TrainConfig])
@settings(deadline=None, max_examples=examples(150))
@given(data=st.data())
def test_any_values_construct_or_raise_config_error(kind: type[ModelConfig | TrainConfig], data: st.DataObject) -> None:
    names = [f.name for f in dataclasses.fields(kind)]
    valid = tiny_config().to_dict() if kind is ModelConfig else {}
    values = {**valid, **data.draw(st.dictionaries(st.sampled_from(names), ANYTHING, max_size=4))}
    try:
        config = kind.from_dict(values)
    except ConfigError:
        return
    assert kind.from_dict(json.loads(config.to_json())) == config


@settings(deadline=None, max_examples=examples(30))
@given(
    dim=st.integers(1, 24),
    n_heads=st.integers(1, 6),
    n_kv_heads=st.none() | st.integers(1, 6),
    head_dim=st.none() | st.integers(1, 10),
    tie_embeddings=st.booleans(),
    qk_norm=st.booleans(),
    rope_scaling_factor=st.floats(0.5, 1e6),
    rope_low_freq_factor=st.floats(0, 1e6),
    rope_high_freq_factor=st.floats(0, 1e6),
    rope_original_max_seq_len=st.integers(0, 1 << 24),
)
def test_every_accepted_shape_computes_and_counts_right(dim: int, n_heads: int, **shape: Any) -> None:
    try:
        config = tiny_config(dim=dim, n_heads=n_heads, **shape)
    except ConfigError:
        return
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_params()
    assert model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


def test_replace_checks_again() -> None:
    config = TrainConfig()
    assert config.replace(max_steps=5).max_steps == 5
    with pytest.raises(ConfigError, match="max_steps=0"):
        config.replace(max_steps=0)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("scifi-117M", {"dim": 512}, (8, 64, 1536, 8)),  # hidden_dim is three times dim, as before
        ("scifi-117M", {"dim": 640}, (10, 64, 1920, 10)),
        ("scifi-117M", {"dim": 512, "n_heads": 4}, (4, 128, 1536, 4)),
        ("scifi-117M", {"dim": 512, "hidden_dim": 999}, (8, 64, 999, 8)),
        ("scifi-117M", {"n_heads": 6}, (6, 128, 2304, 6)),
        ("scifi-117M", {"dim": 768}, (12, 64, 2304, 12)),
        ("scifi-1.5B", {"dim": 1024}, (8, 128, 2816, 8)),
        ("scifi-mini", {"dim": 256}, (8, 32, 704, 8)),  # hidden_dim is 8/3 dim, rounded up as in Llama
        ("scifi-mini", {"dim": 100}, (2, 50, 320, 2)),  # 3 heads do not divide it
        ("scifi-mini", {"dim": 50}, (1, 50, 192, 1)),  # 2 heads would have 25
        ("scifi-mini", {"dim": 8}, (1, 8, 64, 1)),
    ],
)
def test_another_width_rescales_what_follows_from_it(
    name: str, changes: dict[str, Any], expected: tuple[int, ...]
) -> None:
    config = preset(name)[0].replace(**changes)
    assert (config.n_heads, config.head_dim, config.hidden_dim, config.n_kv_heads) == expected


def test_heads_of_a_size_of_their_own_keep_it() -> None:
    """dim / n_heads is 3, which no head could have; the model has heads of 4."""
    config = tiny_config(dim=12, n_heads=4, head_dim=4)
    assert config.replace(n_layers=3).n_layers == 3
    wider = config.replace(dim=24)
    assert (wider.n_heads, wider.head_dim, wider.n_kv_heads) == (8, 4, 8)


@settings(deadline=None, max_examples=examples(60))
@given(name=st.sampled_from(list(PRESETS)), dim=st.integers(1, 4096).map(lambda half: 2 * half))
def test_any_even_width_of_a_preset_is_a_model(name: str, dim: int) -> None:
    before = preset(name)[0]
    after = before.replace(dim=dim)
    assert before.hidden_dim and after.hidden_dim and after.head_dim and before.head_dim
    assert after.head_dim * after.n_heads == dim and after.hidden_dim % 64 in (0, before.hidden_dim % 64)
    of_llama = after.hidden_dim == -(-dim // 24) * 64
    assert of_llama or abs(after.hidden_dim - before.hidden_dim * dim / before.dim) <= 64
    if dim % before.head_dim == 0:
        assert after.head_dim == before.head_dim


@pytest.mark.parametrize("wrong", [0, -1, "wide", 2.5, True])
def test_a_width_that_is_none_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="dim="):
        preset("scifi-117M")[0].replace(dim=wrong)


def test_flops_grow_with_the_context_by_attention_alone() -> None:
    config = tiny_config()
    per_position = 6 * config.n_layers * config.n_heads * config.head_dim
    assert config.flops_per_token(20) - config.flops_per_token(10) == 10 * per_position
    multiplying = config.n_params() - config.vocab_size * config.dim  # the embedding is looked up
    assert config.flops_per_token(10) == 6 * multiplying + 10 * per_position


def test_a_text_with_half_a_surrogate_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="sample_prompt holds half a surrogate"):
        TrainConfig(sample_prompt="却说\ud83d")
