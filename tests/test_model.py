"""The transformer against transformers' Llama, float64 arithmetic and its own uncached self."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import llmcore.model
from llmcore.model import KVCache, Transformer, apply_rope, rope_frequencies, rope_table

from .helpers import examples, random_ids, tiny_config, tiny_model

SHAPES: dict[str, dict[str, Any]] = {
    "heads": {},
    "heads-tied": {"tie_embeddings": True},
    "grouped": {"n_kv_heads": 2},
    "grouped-tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "wide-heads": {"head_dim": 14, "n_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 1e-5},
    "scaled-rope": {
        "head_dim": 12,
        "n_kv_heads": 2,
        "rope_scaling_factor": 8.0,
        "rope_low_freq_factor": 0.3,
        "rope_high_freq_factor": 2.0,
        "rope_original_max_seq_len": 16,
    },
    "qk-norm": {"head_dim": 14, "n_kv_heads": 2, "qk_norm": True, "norm_eps": 1e-3},
}
NAMES = {
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


def hugging_face(model: Transformer) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """The same weights in transformers' Llama or Qwen3, whose heads turn halves instead of interleaved pairs."""
    c = model.config
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling_factor != 1:
        rope |= {"rope_type": "llama3", "factor": c.rope_scaling_factor, "low_freq_factor": c.rope_low_freq_factor}
        rope["high_freq_factor"] = c.rope_high_freq_factor
        rope["original_max_position_embeddings"] = c.rope_original_max_seq_len
    config = (Qwen3Config if c.qk_norm else LlamaConfig)(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len,
        rope_parameters=rope,
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation="eager",
    )
    outside = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            part = rest.removesuffix(".weight")
            if part in ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm"):
                columns = tensor.numel() // len(tensor)
                tensor = tensor.view(-1, c.head_dim // 2, 2, columns).transpose(1, 2).reshape(tensor.shape)
            weights[f"model.layers.{layer}.{NAMES[part]}.weight"] = tensor
        else:
            weights[outside.get(name, "lm_head.weight")] = tensor
    theirs = Qwen3ForCausalLM(config) if c.qk_norm else LlamaForCausalLM(config)
    theirs.load_state_dict(weights)
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_loss_equal_transformers_llama(shape: str) -> None:
    model = tiny_model(std=0.12, **SHAPES[shape])
    tokens = random_ids(3, 24)
    targets = tokens.clone()
    targets[0, :7] = targets[2, 5] = -100
    with torch.no_grad():
        logits = model(tokens)
        theirs = hugging_face(model)(tokens, labels=targets)  # shifts the labels itself
        loss = model(tokens[:, :-1], targets[:, 1:])
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-6, atol=1e-6)


def test_loss_is_the_mean_cross_entropy_of_targets_that_count() -> None:
    model, tokens, targets = tiny_model(std=0.2), random_ids(2, 9), random_ids(2, 9, seed=1)
    targets[0, 3:] = -100
    surprise = -model(tokens).double().log_softmax(-1)
    kept = [surprise[b, t, targets[b, t]] for b in range(2) for t in range(9) if targets[b, t] >= 0]
    torch.testing.assert_close(model(tokens, targets).double(), torch.stack(kept).mean(), rtol=1e-6, atol=1e-6)


def loss_and_gradients(model: Transformer, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(tokens, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hide_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.11."""
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_chunked_loss_equals_the_plain_one(
    bf16: bool, tie: bool, operator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not operator:
        hide_operator(monkeypatch)
    model = tiny_model(std=0.1, vocab_size=700, tie_embeddings=tie)
    tokens, targets = random_ids(16, 24, vocab_size=700), random_ids(16, 24, seed=1, vocab_size=700)
    targets[3] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        plain, expected = loss_and_gradients(model, tokens, targets)
        monkeypatch.setattr(llmcore.model, "CHUNK_ABOVE", 0)
        chunked, gradients = loss_and_gradients(model, tokens, targets)
    tolerance = 2e-2 if bf16 else 1e-5
    assert abs(float(chunked - plain)) < tolerance * float(plain)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < tolerance * expected[name].norm(), name


def test_a_validation_loss_in_bf16_is_not_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between 4 and 8 nats, neighbours in bf16 are 1/32 apart: too far to choose the best checkpoint by."""
    model = tiny_model(std=0.1, vocab_size=700)
    monkeypatch.setattr(llmcore.model, "CHUNK_ABOVE", 0)
    losses = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for seed in range(8):
            tokens, targets = (random_ids(16, 24, seed=seed + last, vocab_size=700) for last in (0, 100))
            targets[3] = -100
            losses.append(model(tokens, targets))
            exact = torch.nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())
            assert abs(float(losses[-1] - exact)) < 2e-3
    assert len({float(loss) for loss in losses}) == 8


@settings(deadline=None, max_examples=examples(50))
@given(
    tokens=st.integers(1, 40),
    vocab_size=st.integers(2, 30),
    chunk=st.integers(4, 60),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_loss_without_torchs_operator_is_float64s(
    tokens: int, vocab_size: int, chunk: int, kept: float, dtype: torch.dtype, seed: int
) -> None:
    """In a chunk or many, of whatever size, with some or all targets left out; its gradients too."""
    torch.manual_seed(seed)
    targets = torch.where(torch.rand(tokens) < kept, torch.randint(vocab_size, (tokens,)), -100)
    parts = torch.randn(tokens, 8), torch.randn(vocab_size, 8)
    wide = [part.to(dtype).double().requires_grad_() for part in parts]
    F.cross_entropy(wide[0] @ wide[1].T, targets).backward()
    ours = [part.to(dtype).float().requires_grad_() for part in parts]
    with pytest.MonkeyPatch.context() as patch:
        hide_operator(patch)
        patch.setattr(llmcore.model, "LOSS_CHUNK", chunk)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = llmcore.model._chunked_loss(*ours, targets)
        loss.backward()
    close = 1e-5 if dtype == torch.float32 else 3e-2
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=close, atol=close, equal_nan=True)
    for mine, exact in zip(ours, wide, strict=True):
        assert mine.grad is not None and exact.grad is not None
        assert (mine.grad - exact.grad).norm() <= close * exact.grad.norm() + 1e-7


def test_bf16_gradients_of_many_chunks_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum kept in bf16 stops growing at some two hundred times of what is added."""
    hide_operator(monkeypatch)
    monkeypatch.setattr(llmcore.model, "LOSS_CHUNK", 16)
    torch.manual_seed(0)
    hidden, targets = torch.randn(4096, 8).abs(), torch.zeros(4096).long()
    weight = torch.zeros(10, 8, requires_grad=True)
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = llmcore.model._chunked_loss(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert (gradient - exact).norm() < 1e-2 * exact.norm()


def test_fp16_gradients_of_the_chunked_loss_do_not_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler raises small gradients into float16's range; an operator that computes them before loses them."""
    torch.manual_seed(0)
    tokens, vocab_size = 4096, 3000
    hidden, targets = torch.randn(tokens, 16), torch.randint(vocab_size, (tokens,))
    weight = (0.02 * torch.randn(vocab_size, 16)).requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), weight)[0]
    with torch.autocast("cpu", torch.float16):
        loss = llmcore.model._chunked_loss(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss * 2.0**16, weight)
    assert (gradient / 2**16 - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("operator", [False, True])
def test_large_batches_never_hold_their_logits(operator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not operator:
        hide_operator(monkeypatch)
        monkeypatch.setattr(llmcore.model, "LOSS_CHUNK", 512)
    model, tokens = tiny_model(vocab_size=5000), random_ids(16, 24, vocab_size=5000)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (5000,):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(llmcore.model, "CHUNK_ABOVE", 16 * 24 * 5000 - 1)
    with Watch():
        model(tokens, tokens)
    assert largest < tokens.numel() * 5000
    monkeypatch.setattr(llmcore.model, "CHUNK_ABOVE", 16 * 24 * 5000)
    with Watch():
        model(tokens, tokens)
    assert largest == tokens.numel() * 5000


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_activation_checkpointing_changes_no_bit(qk_norm: bool, policy: str, bf16: bool) -> None:
    model = tiny_model(std=0.1, n_kv_heads=2, qk_norm=qk_norm)
    tokens, targets = random_ids(2, 24), random_ids(2, 24, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, expected = loss_and_gradients(model, tokens, targets)
        model.activation_checkpointing = policy
        again, gradients = loss_and_gradients(model, tokens, targets)
    assert torch.equal(loss, again)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_activation_checkpointing_changes_only_rounding(bf16: bool) -> None:
    model = tiny_model(std=0.1, n_layers=1, qk_norm=bf16)
    tokens, targets = random_ids(2, 24), random_ids(2, 24, seed=1)
    loss, expected = loss_and_gradients(model, tokens, targets)
    tolerance = 3e-2 if bf16 else 1e-5
    for model.activation_checkpointing in ("none", "selective", "full"):
        torch.compiler.reset()
        compiled: Any = torch.compile(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            again, gradients = loss_and_gradients(compiled, tokens, targets)
        torch.testing.assert_close(again, loss, rtol=tolerance, atol=0)
        for name, gradient in gradients.items():
            difference = (gradient - expected[name.removeprefix("_orig_mod.")]).norm()
            assert difference < tolerance * gradient.norm(), (model.activation_checkpointing, name)


def test_selective_checkpointing_computes_no_product_again() -> None:
    def flops(policy: str) -> int:
        model, tokens = tiny_model(), random_ids(2, 24)
        model.activation_checkpointing = policy
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
        return counter.get_total_flops()

    assert flops("selective") == flops("none") < flops("full")


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_activation_checkpointing_heeds_padding_and_cache(policy: str) -> None:
    model, tokens = tiny_model(std=0.1), random_ids(2, 12)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, :5] = True
    expected = model.hidden_states(tokens, padding=padding)
    model.activation_checkpointing = policy
    assert torch.equal(model.hidden_states(tokens, padding=padding), expected)
    cache = KVCache(model.config, 2)
    model.hidden_states(tokens[:, :7], cache)
    torch.testing.assert_close(model.hidden_states(tokens[:, 7:], cache), model.hidden_states(tokens)[:, 7:])


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rope_turns_pairs_as_complex_numbers_do(head_dim: int) -> None:
    x = torch.randn(2, 300, 3, head_dim, generator=torch.Generator().manual_seed(0))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.outer(torch.arange(300, dtype=torch.float64), 10_000.0**-exponents)
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
    turned = apply_rope(x, *rope_table(rope_frequencies(tiny_config(head_dim=head_dim)), 300))
    torch.testing.assert_close(turned.double(), expected, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=examples(30))
@given(i=st.integers(0, 255), j=st.integers(0, 255), shift=st.integers(0, 256), seed=st.integers(0, 99))
def test_rope_depends_on_the_distance_alone(i: int, j: int, shift: int, seed: int) -> None:
    cos, sin = rope_table(rope_frequencies(tiny_config(head_dim=16)), 512)
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(seed))

    def product(a: int, b: int) -> Tensor:
        return (apply_rope(q, cos[a : a + 1], sin[a : a + 1]) * apply_rope(k, cos[b : b + 1], sin[b : b + 1])).sum()

    torch.testing.assert_close(product(i, j), product(i + shift, j + shift), rtol=0, atol=2e-3)


@settings(deadline=None, max_examples=examples(20))
@given(changed=st.integers(0, 23), n_kv_heads=st.sampled_from([1, 4]))
def test_the_future_changes_nothing_before_it(changed: int, n_kv_heads: int) -> None:
    model, tokens = tiny_model(std=0.2, n_kv_heads=n_kv_heads), random_ids(1, 24)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 37
    with torch.no_grad():
        before, after = model(tokens)[0], model(other)[0]
    torch.testing.assert_close(before[:changed], after[:changed], rtol=0, atol=1e-5)
    assert ((before[changed:] - after[changed:]).abs().amax(1) > 1e-3).all()


def test_initial_weights_have_the_documented_spread() -> None:
    model = tiny_model(dim=128, hidden_dim=384, n_layers=8, vocab_size=500)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.03 and abs(parameter.mean().item()) < 0.05 * std, name


def test_names_are_metas() -> None:
    block = {f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")}
    block |= {f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")} | {"attention_norm.weight", "ffn_norm.weight"}
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    expected |= {f"layers.{layer}.{name}" for layer in range(2) for name in block}
    assert set(tiny_model().state_dict()) == expected


@pytest.mark.parametrize("tie", [False, True])
def test_tied_weights_are_one_tensor(tie: bool) -> None:
    model = tiny_model(tie_embeddings=tie)
    assert (model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()) is tie
    loss_and_gradients(model, torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    assert bool(model.tok_embeddings.weight.grad[1].any()) is tie  # id 1 is only ever an output


@settings(deadline=None, max_examples=examples(25))
@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=8), shape=st.sampled_from(sorted(SHAPES)))
def test_cached_logits_equal_uncached_however_the_tokens_come(parts: list[int], shape: str) -> None:
    model = tiny_model(std=0.15, max_seq_len=80, **SHAPES[shape])
    tokens = random_ids(2, sum(parts))
    cache = KVCache(model.config, 2)
    with torch.no_grad():
        pieces = [model.hidden_states(piece, cache) for piece in tokens.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model.hidden_states(tokens), rtol=1e-4, atol=1e-4)
    assert cache.length == sum(parts)


@settings(deadline=None, max_examples=examples(20))
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=4), steps=st.integers(1, 8))
def test_a_row_padded_on_the_left_gives_the_logits_it_gives_alone(lengths: list[int], steps: int) -> None:
    model, longest = tiny_model(std=0.15), max(lengths)
    rows = random_ids(len(lengths), longest + steps)
    padding = torch.arange(longest + steps) < longest - torch.tensor(lengths)[:, None]
    cache = KVCache(model.config, len(lengths))
    with torch.no_grad():
        together = model.hidden_states(rows[:, :longest], cache, padding[:, :longest])
        later = [
            model.hidden_states(rows[:, end - 1 : end], cache, padding[:, :end])
            for end in range(longest + 1, longest + steps + 1)
        ]
        together = torch.cat([together, *later], dim=1)
        assert together.isfinite().all()
        for row, length in enumerate(lengths):
            alone = model.hidden_states(rows[row : row + 1, longest - length :])[0]
            torch.testing.assert_close(together[row, longest - length :], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_weights_are_those_the_model_uses(shape: str) -> None:
    model, tokens = tiny_model(std=0.15, **SHAPES[shape]), random_ids(2, 10)
    c = model.config
    patterns = model.attention_weights(tokens)
    assert patterns.shape == (c.n_layers, 2, c.n_heads, 10, 10)
    torch.testing.assert_close(patterns.sum(-1), torch.ones(c.n_layers, 2, c.n_heads, 10))
    assert (patterns.triu(1) == 0).all()
    x = model.tok_embeddings(tokens)
    for layer, block in enumerate(model.layers):
        normed = block.attention_norm(x)
        v = block.attention.wv(normed).unflatten(-1, (c.n_kv_heads, c.head_dim)).transpose(1, 2)
        heads = patterns[layer] @ v.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1)
        x = x + block.attention.wo(heads.transpose(1, 2).flatten(-2))
        x = x + block.feed_forward(block.ffn_norm(x))
    torch.testing.assert_close(model.norm(x), model.hidden_states(tokens), rtol=1e-4, atol=1e-4)


def test_too_many_tokens_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="25 new tokens exceed max_seq_len=24"):
        model(random_ids(1, 25))
    with pytest.raises(ValueError, match="25 new tokens exceed max_seq_len=24"):
        model.attention_weights(random_ids(1, 25))
    cache = KVCache(model.config, 1)
    model.hidden_states(random_ids(1, 20), cache)
    with pytest.raises(ValueError, match=r"20 cached \+ 5 new tokens exceed max_seq_len=24"):
        model.hidden_states(random_ids(1, 5), cache)


@pytest.mark.slow
def test_compiled_model_equals_the_eager_one() -> None:
    model, tokens, targets = tiny_model(std=0.1, n_layers=1), random_ids(2, 24), random_ids(2, 24, seed=1)
    eager, expected = loss_and_gradients(model, tokens, targets)
    model.zero_grad()
    loss = torch.compile(model)(tokens, targets)
    loss.backward()
    torch.testing.assert_close(loss.detach(), eager, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_bf16_autocast_computes_in_bf16_and_takes_the_loss_in_float32() -> None:
    model, tokens = tiny_model(std=0.1), random_ids(2, 24)
    exact = model(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, rough = model(tokens), model(tokens, tokens)
    assert logits.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()))
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)
    assert rough != exact
