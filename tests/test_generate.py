"""Generation against a loop without a cache, and sampling against plain Python."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmcore.checkpoint import load_checkpoint, save_checkpoint
from llmcore.config import ModelConfig
from llmcore.generate import _draw, generate, generate_ids, next_token_probabilities, prompt_ids, stream, surprise
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer

from .helpers import examples, random_ids, tiny_model

GREEDY = {"temperature": 0.0}


def generated(model: Transformer, prompts: Sequence[Sequence[int]], count: int, **sampling: Any) -> list[list[int]]:
    return [list(row) for row in zip(*generate_ids(model, prompts, count, **sampling), strict=True)]


@torch.no_grad()
def naive_greedy(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """The most likely ids, each by a whole forward pass; a window that overflows keeps its newest half."""
    context, new = model.config.max_seq_len, []
    window = list(prompt[-context:])
    for _ in range(count):
        new.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window.append(new[-1])
        if len(window) > context:
            window = window[-max(1, context // 2) :]
    return new


@settings(deadline=None, max_examples=examples(25))
@given(length=st.integers(1, 20), context=st.integers(1, 16), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_cached_greedy_equals_whole_forward_passes(length: int, context: int, count: int, seed: int) -> None:
    model = tiny_model(seed, std=0.2, max_seq_len=context, n_kv_heads=2).double()
    prompt = random_ids(length, seed=seed).tolist()
    assert generated(model, [prompt], count, **GREEDY) == [naive_greedy(model, prompt, count)]


@settings(deadline=None, max_examples=examples(15))
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5), seed=st.integers(0, 9))
def test_prompts_together_give_what_each_gives_alone(lengths: list[int], seed: int) -> None:
    model = tiny_model(seed, std=0.2).double()
    prompts = [random_ids(length, seed=seed + row).tolist() for row, length in enumerate(lengths)]
    for penalty in (1.0, 1.3):
        sampling = {**GREEDY, "repetition_penalty": penalty}
        alone = [generated(model, [prompt], 12, **sampling)[0] for prompt in prompts]
        assert generated(model, prompts, 12, **sampling) == alone


def test_a_batch_goes_on_past_the_context() -> None:
    model = tiny_model(std=0.2, max_seq_len=10).double()
    rows = generated(model, [[1], [2, 3, 4, 5, 6, 7, 8]], 50, **GREEDY)
    assert [len(row) for row in rows] == [50, 50]
    assert rows[1] == naive_greedy(model, [2, 3, 4, 5, 6, 7, 8], 50)  # the longest is not padded


def test_a_seed_repeats_and_another_differs() -> None:
    model = tiny_model()
    runs = [generated(model, [[1, 2]], 20, seed=seed)[0] for seed in (1, 1, 2, None, None)]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs}) == 4


def test_sampling_follows_the_models_distribution() -> None:
    model = tiny_model(std=0.3)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]]))[0, -1].softmax(0)
    drawn = next(iter(generate_ids(model, [[5, 6]] * 20_000, 1, seed=0)))
    counts = torch.bincount(torch.tensor(drawn), minlength=37)
    kept = expected * 20_000 > 5
    chi2 = ((counts - 20_000 * expected) ** 2 / (20_000 * expected))[kept].sum()
    freedom = int(kept.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_generation_leaves_the_callers_random_state_and_modes_alone() -> None:
    model, before = tiny_model(), torch.get_rng_state()
    model.train()
    for _ in generate_ids(model, [[1]], 3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def reference_probabilities(
    logits: list[float],
    seen: list[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
) -> list[float]:
    """The filters one after the other, in plain Python; inputs too near a threshold are given up."""
    scores = list(logits)
    for id in set(seen):
        scores[id] = scores[id] / penalty if scores[id] > 0 else scores[id] * penalty
    ranked = sorted(range(len(scores)), key=lambda id: -scores[id])
    assume(all(scores[a] - scores[b] > 1e-4 for a, b in itertools.pairwise(ranked)))
    ranked = ranked[:top_k]
    mass = {id: math.exp((scores[id] - scores[ranked[0]]) / temperature) for id in ranked}
    total = sum(mass.values())
    kept, before = {}, 0.0
    for id in ranked:
        assume(top_p is None or not kept or abs(before - top_p) > 1e-5)
        if top_p is None or before < top_p or not kept:
            kept[id] = mass[id] / total
        before += mass[id] / total
    if min_p:
        assume(all(abs(p - min_p * kept[ranked[0]]) > 1e-6 for id, p in kept.items() if id != ranked[0]))
        kept = {id: p for id, p in kept.items() if p >= min_p * kept[ranked[0]]}
    return [kept.get(id, 0.0) / sum(kept.values()) for id in range(len(scores))]


@settings(deadline=None, max_examples=examples(200))
@given(
    numbers=st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True),
    seen=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(1e-6, 1),
    min_p=st.none() | st.floats(0, 1),
    penalty=st.sampled_from([1.0, 0.5, 1.7]),
)
def test_probabilities_equal_the_reference(
    numbers: list[int],
    seen: list[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
) -> None:
    logits = [number / 7 for number in numbers]
    expected = reference_probabilities(logits, seen, temperature, top_k, top_p, min_p, penalty)
    found = next_token_probabilities(
        torch.tensor([logits, [0.0] * len(logits)]),  # rows do not touch each other
        torch.tensor([seen, [0] * len(seen)]),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=examples(60))
@given(
    # eighths: of logits that are closer together, float32 may not tell the probabilities apart
    logits=st.lists(st.integers(-80_000, 80_000).map(lambda eighths: eighths / 8), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 1e-300, 1e-30, 1e-6, 1.0, 1e30]),
    top_k=st.none() | st.integers(1, 99),
    top_p=st.none() | st.floats(1e-12, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_probabilities_are_never_nan_and_add_up(logits: list[float], temperature: float, **filters: Any) -> None:
    found = next_token_probabilities(torch.tensor([logits]), temperature=temperature, **filters)
    assert abs(found.sum().item() - 1) < 1e-5 and (found >= 0).all()
    assert found[0].argmax() in [i for i, v in enumerate(logits) if v == max(logits)] or temperature > 1


def test_of_tokens_as_likely_as_the_last_of_top_p_the_first_ids_stay() -> None:
    logits = torch.tensor([[0.0] * 8, [1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0]])
    kept = [next_token_probabilities(logits, top_p=p) > 0 for p in (0.124, 0.376, 0.9)]
    assert [[row.nonzero().flatten().tolist() for row in each] for each in kept] == [
        [[0], [1]],
        [[0, 1, 2, 3], [1, 3]],
        [[*range(8)], [*range(7)]],
    ]


def test_an_id_without_probability_is_never_drawn() -> None:
    probabilities, generator = torch.zeros(4000, 9), torch.Generator().manual_seed(0)
    probabilities[:, 3], probabilities[:, 6] = 1e-3, 0.999
    drawn = _draw(probabilities, generator).bincount(minlength=9)
    assert drawn.nonzero().flatten().tolist() == [3, 6] and drawn[3] < 20
    # a row draws the same, whatever its probabilities add up to, and the id at the end may be the only one
    assert torch.equal(_draw(torch.eye(9) * 3e-5, generator), torch.arange(9))


def test_logits_that_are_not_numbers_end_the_text_with_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    for top_p in (None, 0.9):
        with pytest.raises(ValueError, match="NaN or infinite"):
            list(generate_ids(model, [[1]], 1, top_p=top_p))


def test_probabilities_of_logits_with_a_gradient_have_one() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    [gradient] = torch.autograd.grad(next_token_probabilities(logits, top_p=0.9)[0, 2], logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.1966, 0.1966]]), atol=1e-4, rtol=0)  # p (1 - p)


def test_temperature_0_is_argmax_after_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0], [-1.0, -1.8, -1.5]])
    seen = torch.tensor([[0, 0], [0, 2]])
    found = next_token_probabilities(logits, seen, temperature=0.0, repetition_penalty=2.0)
    assert found.tolist() == [[0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_new_tokens": [-1, 1.5, True, None, "5", math.nan],
        "temperature": [-0.1, math.nan, math.inf, None, "warm"],
        "top_k": [0, -3, 1.5, math.nan, "all"],
        "top_p": [0, -0.5, 1.0001, math.nan, "most"],
        "min_p": [-0.1, 1.1, math.nan, "some"],
        "repetition_penalty": [0, -1, math.nan, math.inf, None],
    }.items(),
)
def test_values_out_of_range_are_refused_by_name(name: str, values: list[Any], tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    for value in values:
        arguments = {"max_new_tokens": 3, name: value}
        with pytest.raises(ValueError, match=f"^{name}=.* must be "):
            generate(model, tokenizer, "a", **arguments)
        with pytest.raises(ValueError, match=f"^{name}=.* must be "):
            list(stream(model, tokenizer, "a", **arguments))


def test_all_values_out_of_range_are_listed() -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens=-1 .*temperature=-1 .*top_k=0 .*top_p=2 "):
        list(generate_ids(tiny_model(), [[1]], -1, temperature=-1, top_k=0, top_p=2))


def test_prompts_without_tokens_are_refused() -> None:
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            list(generate_ids(tiny_model(), prompts, 1))


def test_edges_of_the_ranges_work() -> None:
    model = tiny_model()
    plain = generated(model, [[1]], 9, seed=0)
    for edge in ({"top_k": 37}, {"top_k": 10**6}, {"top_p": 1.0}, {"min_p": 0.0}, {"repetition_penalty": 1.0}):
        assert generated(model, [[1]], 9, seed=0, **edge) == plain
    greedy = generated(model, [[1]], 9, **GREEDY)
    for edge in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-9}):
        assert generated(model, [[1]], 9, seed=0, **edge) == greedy


# Texts


def chain(tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int | None = None) -> Transformer:
    """A model that says each of the given ids after the one before it, and nothing else: its blocks add 0."""
    config = ModelConfig(
        vocab_size=vocab_size or tokenizer.vocab_size,
        dim=len(ids),
        n_layers=1,
        n_heads=1,
        head_dim=2,
        hidden_dim=1,
        max_seq_len=64,
    )
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.constant_(parameter, float("norm" in name))
    with torch.no_grad():
        for place, (id, following) in enumerate(zip(ids, [*ids[1:], ids[0]], strict=True)):
            model.tok_embeddings.weight[id, place] = 1
            model.output.weight[following, place] = 100
    return model


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")


@settings(deadline=None, max_examples=examples(60))
@given(text=st.text(CHARACTERS, min_size=1, max_size=6))
def test_streamed_pieces_are_whole_characters_that_add_up(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assume(len(set(ids)) == len(ids) and tokenizer.eos_id not in ids)
    model = chain(tokenizer, [tokenizer.eos_id, *ids])
    pieces = list(stream(model, tokenizer, "", 50, **GREEDY))
    assert "".join(pieces) == text
    assert all(pieces)
    assert generate(model, tokenizer, "", 50, **GREEDY) == text


def test_a_character_in_byte_pieces_is_held_back_until_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🐉")
    assert all(tokenizer.is_byte(id) for id in ids) and len(ids) == 4
    model = chain(tokenizer, [tokenizer.eos_id, *ids])
    assert list(stream(model, tokenizer, "", 4, **GREEDY)) == ["🐉"]
    assert list(stream(model, tokenizer, "", 3, **GREEDY)) == ["\ufffd"]  # cut by the limit: said once, at the end
    assert generate(model, tokenizer, "", 3, **GREEDY) == "\ufffd"


@settings(deadline=None, max_examples=examples(60))
@given(data=st.data())
def test_stream_adds_up_to_generate_for_any_ids(data: st.DataObject, tokenizer: Tokenizer) -> None:
    byte_ids = [id for id in range(tokenizer.vocab_size) if tokenizer.is_byte(id)]
    some = st.one_of(st.sampled_from(byte_ids), st.sampled_from(byte_ids), st.integers(4, tokenizer.vocab_size - 1))
    ids = data.draw(st.lists(some, min_size=1, max_size=12, unique=True))
    model = chain(tokenizer, [tokenizer.eos_id, *ids])
    whole = generate(model, tokenizer, "", 50, **GREEDY)
    assert "".join(stream(model, tokenizer, "", 50, **GREEDY)) == whole == tokenizer.decode(ids)


def test_eos_ends_the_text(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    model = chain(tokenizer, [a, b, tokenizer.eos_id, c])
    assert generate(model, tokenizer, "a", 40, **GREEDY) == "b"
    steps = list(generate_ids(model, [[a], [b]], 40, eos_id=tokenizer.eos_id, **GREEDY))
    assert steps == [[b, tokenizer.eos_id], [tokenizer.eos_id] * 2]
    assert generate(model, tokenizer, ["a", "b", ""], 40, **GREEDY) == ["b", "", "cab"]


def test_ids_that_the_tokenizer_lacks_are_never_drawn(tokenizer: Tokenizer) -> None:
    spare, (a,) = tokenizer.vocab_size + 1, tokenizer.encode("a")
    model = chain(tokenizer, [tokenizer.eos_id, spare, a], vocab_size=tokenizer.vocab_size + 2)
    assert generated(model, [[tokenizer.eos_id]], 2, **GREEDY) == [[spare, a]]
    text = generate(model, tokenizer, "", 5, seed=0)
    assert "".join(stream(model, tokenizer, "", 5, seed=0)) == text


def test_an_empty_prompt_starts_a_document_as_in_training(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, "") == [tokenizer.eos_id]


def test_nothing_is_asked_nothing_comes(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    assert generate(model, tokenizer, "a", 0) == ""
    assert generate(model, tokenizer, ["a", "b"], 0) == ["", ""]
    assert list(stream(model, tokenizer, "a", 0)) == []


def test_a_prompt_beyond_the_context_loses_its_start_with_a_warning(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size, std=0.3)
    long = "曹操刘备孙权诸葛亮" * 20
    ids = tokenizer.encode(long)
    with pytest.warns(UserWarning, match=f"{len(ids)} tokens; only the last 24"):
        text = generate(model, tokenizer, long, 30, **GREEDY)
    tail = generated(model, [ids[-24:]], 30, eos_id=tokenizer.eos_id, **GREEDY)[0]
    assert text == tokenizer.decode(tail)


def test_of_a_very_long_prompt_only_the_end_is_encoded(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    text = "却说曹操引军追赶，玄德大喜。Two words.  \n" * 20_000
    started = time.process_time()
    with pytest.warns(UserWarning, match=r"more than \d+ tokens; only the last 24"):
        found = prompt_ids(model, tokenizer, text)
    took, started = time.process_time() - started, time.process_time()
    assert found == tokenizer.encode(text)[-24:]
    assert took < (time.process_time() - started) / 10


def test_a_prompt_of_unknown_characters_is_spelled_in_bytes(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    prompt = "🜁\x00ꙮ"
    assert tokenizer.decode(prompt_ids(model, tokenizer, prompt)) == prompt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, prompt, 5, seed=0) == generate(model, tokenizer, prompt, 5, seed=0)


def test_a_consumer_may_stop_early(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    model = chain(tokenizer, [a, b, c])
    pieces: Iterator[str] = stream(model, tokenizer, "a", 10**9, **GREEDY)
    assert [next(pieces), next(pieces)] == ["b", "c"]
    pieces.close()  # type: ignore[attr-defined]
    assert list(pieces) == []
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[a]])).sum().backward()  # the model is as usable as before


@settings(deadline=None, max_examples=examples(20))
@given(length=st.integers(2, 60))
def test_surprise_is_each_tokens_own_cross_entropy(length: int) -> None:
    model, ids = tiny_model(std=0.3), random_ids(length).tolist()
    found = surprise(model, ids)
    expected = []
    for index in range(1, length):
        start = (index - 1) // 24 * 24  # windows of the context's length, one after the other
        with torch.no_grad():
            last = model(torch.tensor([ids[start:index]]))[0, -1]
        expected.append(-last.double().log_softmax(0)[ids[index]].item())
    assert found == pytest.approx(expected, abs=1e-4)


def test_surprise_needs_two_tokens() -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        surprise(tiny_model(), [1])


def test_writing_without_a_tokenizer_is_refused_in_words(tmp_path: Path) -> None:
    """As notebook 5 meets it, opened on a run of the toy task."""
    save_checkpoint(tmp_path, tiny_model(), None, step=1, loss=1.0)
    checkpoint = load_checkpoint(tmp_path, device="cpu")
    tokenizer: Any = checkpoint.tokenizer
    for write in (generate, lambda *given: list(stream(*given))):
        with pytest.raises(ValueError, match="the checkpoint has no tokenizer"):
            write(checkpoint.model, tokenizer, "a", 3)
