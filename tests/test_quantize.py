"""int8 weights against the float32 ones they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llmcore.config import ModelConfig
from llmcore.generate import generate_ids
from llmcore.model import Transformer
from llmcore.quantize import FEW_ROWS, Int8Linear, int8_weights


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_every_weight_is_within_half_a_step_of_its_row(outputs: int, inputs: int, seed: int, size: float) -> None:
    linear = nn.Linear(inputs, outputs, bias=False)
    torch.manual_seed(seed)
    nn.init.normal_(linear.weight, std=size)
    small = Int8Linear(linear)
    assert torch.allclose(small.scale, (linear.weight.abs().amax(1) / 127).clamp(min=1e-12))
    scale = small.scale[:, None]
    assert bool(((small.weight * scale - linear.weight).abs() <= scale * 0.501).all())


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 2 * FEW_ROWS), st.integers(0, 10_000))
def test_a_product_of_any_shape_is_that_of_the_rounded_weights(outputs: int, inputs: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    small, x = Int8Linear(nn.Linear(inputs, outputs, bias=False)), torch.randn(2, rows, inputs)
    weight = small.weight * small.scale[:, None]
    off = (small(x) - x @ weight.T).abs()
    assert small(x).dtype == x.dtype
    # inputs have 8 bits here: of bfloat16, or of int8
    assert bool((off <= (x.abs().amax(-1, keepdim=True) / 127 * weight.abs().sum(1)) + 1e-6).all())


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_predicts_nearly_the_same_and_leaves_the_model_alone(tied: bool) -> None:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=500, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, tie_embeddings=tied)
    model = Transformer(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # as sharp as a trained model's
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = int8_weights(model)
    tokens = torch.randint(500, (3, 50))
    with torch.no_grad():
        exact, near = model(tokens), small(tokens)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), near.flatten(), dim=0) > 1 - 0.005
    assert not torch.equal(exact, near)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, nn.Linear) for module in small.modules())


def test_generation_with_a_cache_agrees_with_the_whole_pass() -> None:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, max_seq_len=40, qk_norm=True)
    small = int8_weights(Transformer(shape))
    written = [ids[0] for ids in generate_ids(small, [[5, 6, 7]], 20, temperature=0)]
    with torch.inference_mode():
        logits = small(torch.tensor([[5, 6, 7, *written]]))[0]
    for place, id in enumerate(written, start=2):
        assert logits[place].max() - logits[place, id] < 0.02 * logits[place].std()


def test_another_device_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"on meta; use model\.bfloat16"):
        int8_weights(Transformer(ModelConfig(vocab_size=100, dim=32, n_layers=1, n_heads=2)).to("meta"))
