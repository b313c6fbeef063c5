"""The compiled decode step against the model itself, and what happens where it cannot be made."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcore import decode, quantize
from llmcore.generate import generate_ids
from llmcore.model import KVCache, Transformer
from llmcore.quantize import int8_weights

from .helpers import tiny_model


def written(model: Transformer, prompts: list[list[int]], count: int, **sampling: Any) -> list[list[int]]:
    return list(generate_ids(model, prompts, count, **sampling))


ONE, SEVERAL = [[5, 6, 7]], [[8], [5, 6, 7], [9, 9]]  # the others are padded on the left


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass through the model itself has read."""
    read: list[int] = []
    own = Transformer.hidden_states

    def noted(self: Transformer, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        read.append(tokens.shape[1])
        return own(self, tokens, *others)

    monkeypatch.setattr(Transformer, "hidden_states", noted)
    return read


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 weights with inputs that are not rounded, as in compiled code: by the products for an odd number of them."""
    monkeypatch.setattr(quantize, "BLOCK", 10**9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
        yield place


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    """A model with grouped queries that is compiled, for one text and for several."""
    made = tiny_model(std=0.2, n_kv_heads=2)
    assert decode.prepare(made, len(ONE)) and decode.prepare(made, len(SEVERAL))
    return made


@pytest.mark.parametrize("inputs", [1, 31, 32, 96, 192])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_row_is_multiplied_as_by_the_layer(inputs: int, weights: str, exact: None) -> None:
    linear, x = torch.nn.Linear(inputs, 7, bias=False), torch.randn(1, 1, inputs)
    layer = quantize.Int8Linear(linear) if weights == "int8" else linear.to(getattr(torch, weights))
    x = x.bfloat16() if weights == "bfloat16" else x
    torch.testing.assert_close(decode._Row(layer)(x), layer(x), rtol=1e-2 if weights == "bfloat16" else 1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_code_computes_what_the_model_does(model: Transformer, steps: list[int]) -> None:
    decoder, cache = decode.Decoder(model, 1), KVCache(model.config, 1, max_seq_len=9)
    ids = torch.tensor([[5, 6, 7, 30, 1, 2, 9, 9, 36]])
    with torch.inference_mode():
        found = [decoder.logits(ids[:, :3], cache)]
        found += [decoder.logits(ids[:, [place]], cache) for place in range(3, 9)]
        assert steps == [3]  # the prompt
        torch.testing.assert_close(torch.stack(found, 1), model(ids)[:, 2:], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [ONE, SEVERAL], ids=["one", "several"])
def test_the_text_is_the_same_on_both_paths_past_the_context(
    model: Transformer, prompts: list[list[int]], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[dict[str, Any]] = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 9, "repetition_penalty": 1.3}]
    compiled = [written(model, prompts, 60, **case) for case in cases]
    context = model.config.max_seq_len
    assert set(steps) == {3, context // 2}  # the prompt, and each time that the window slides
    monkeypatch.setattr(decode, "_kind", lambda *_: None)
    assert [written(model, prompts, 60, **case) for case in cases] == compiled
    assert steps.count(1) > 100


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [ONE, SEVERAL], ids=["one", "several"])
def test_a_model_of_many_blocks_is_compiled_by_the_block(
    folder: Path, prompts: list[list[int]], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here more than one block is many: one function is called for each."""
    monkeypatch.setattr(decode, "FEW_BLOCKS", 1)
    deep = tiny_model(std=0.2, n_layers=3)
    assert decode.prepare(deep, len(prompts))
    compiled = written(deep, prompts, 60, temperature=0)
    assert steps.count(1) == 0
    monkeypatch.setattr(decode, "_kind", lambda *_: None)
    assert written(deep, prompts, 60, temperature=0) == compiled


@pytest.mark.slow
def test_weights_that_change_are_read_anew(model: Transformer, steps: list[int]) -> None:
    before = written(model, ONE, 20, temperature=0)
    norm: Any = model.layers[0].attention_norm.weight
    with torch.no_grad():
        norm.neg_()
        assert written(model, ONE, 20, temperature=0) != before
        norm.neg_()
    assert written(model, ONE, 20, temperature=0) == before
    assert set(steps) == {3}


@pytest.mark.slow
def test_another_number_of_texts_is_compiled_apart(model: Transformer, steps: list[int]) -> None:
    assert len(written(model, [[5, 6, 7], [8]], 5, temperature=0)) == 5
    assert steps == [3, 1, 1, 1, 1]


def test_what_is_not_compiled_passes_through_the_model() -> None:
    assert not decode.prepare(tiny_model().double())
    small = int8_weights(tiny_model())
    assert decode._kind(small, 1) and not decode._kind(small, quantize.FEW_ROWS)


def test_where_nothing_compiles_the_model_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """The process that compiles fails at once here; of the same shape it is started only once."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(decode.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    monkeypatch.setattr(decode, "ENOUGH_TOKENS", 16)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    model = tiny_model(n_layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(written(model, [[5, 6]], 40)) == 40 and not started  # too small to be worth it
        monkeypatch.setattr(decode, "ENOUGH_WEIGHTS", 0)
        assert len(written(model, [[5, 6]], 100)) == 100
    assert len(started) == 1 and steps.count(1) > 100
    assert not decode.prepare(model)


def test_compiled_code_that_is_damaged_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_model()
    kind = decode._kind(model, 1)
    assert kind is not None
    folder = decode._folder(kind)
    folder.mkdir(parents=True)
    for name in kind["files"]:
        (folder / name).write_bytes(b"PK\x03\x04 and no more")
    assert len(written(model, [[5, 6]], 9)) == 9
    assert steps.count(1) == 8


def test_another_shape_thread_count_or_source_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    kinds = [decode._kind(model, 1) for model in (tiny_model(), tiny_model(n_kv_heads=2), tiny_model().bfloat16())]
    kinds += [decode._kind(int8_weights(tiny_model()), 1), {**(kinds[0] or {}), "threads": 99}]
    assert len({decode._folder(kind) for kind in kinds if kind}) == 5
    loaded = tiny_model().bfloat16()
    loaded.reset_rope()  # a model that was loaded has its table in float32
    mixed = tiny_model()
    mixed.layers[1].bfloat16()
    assert decode._kind(loaded, 1) != kinds[2] and decode._kind(mixed, 1) is None
    mixed.layers[0].bfloat16()
    with pytest.raises(ValueError, match="several dtypes"):
        decode.compile_step(decode._kind(mixed, 1) or {}, tmp_path / "mixed")
    assert decode._kind(tiny_model(seed=1), 1) == kinds[0]  # weights are arguments
    deep = [decode._kind(tiny_model(n_layers=decode.FEW_BLOCKS + more), 1) for more in (0, 1, 2)]
    assert deep[0] != deep[1] == deep[2] != kinds[0]  # of many blocks one is compiled, and all are alike
