"""Documents are scored as one forward pass per token would score them, and floors as their sources define them."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcore.corpus.prepare import prepare_dataset
from llmcore.corpus.texts import find_texts, read_text
from llmcore.corpus.train_tokenizer import train_tokenizer
from llmcore.dataset import DatasetError, TokenDataset
from llmcore.measure.evaluate import (
    Evaluation,
    Score,
    bootstrap_interval,
    evaluate,
    paired_difference,
    xz_bits_per_byte,
)
from llmcore.measure.ngram import NGram, evaluate_ngram
from llmcore.model import Transformer
from llmcore.tokenizer import Tokenizer

from .helpers import examples, quick, tiny_model, trainer

VOCABULARY = 330


@pytest.fixture(scope="module")
def english_tokenizer(english: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("tokenizer") / "english"
    return train_tokenizer(find_texts(english), prefix, VOCABULARY, character_coverage=1.0)


def one_forward_per_token(model: Transformer, ids: list[int], stride: int) -> float:
    """Nats of ids[1:], each from the first window of the model's context that begins at a multiple of the stride."""
    context, nats = model.config.max_seq_len, 0.0
    for target in range(1, len(ids)):
        start = stride * max(0, math.ceil((target - context) / stride))
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:target]]))[0, -1].double()
        nats -= float(logits.log_softmax(-1)[ids[target]])
    return nats


@settings(deadline=None, max_examples=examples(60))
@given(
    st.lists(st.text("abcdeth .é三", min_size=1, max_size=40), min_size=1, max_size=4),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda sizes: sizes[1] <= sizes[0]),
    st.integers(1, 5),
)
def test_every_token_is_scored_once_from_its_window(
    english_tokenizer: Tokenizer, texts: list[str], sizes: tuple[int, int], batch_size: int
) -> None:
    tok, (context, stride) = english_tokenizer, sizes
    model = tiny_model(std=0.2, vocab_size=VOCABULARY, max_seq_len=context)
    options = {"stride": stride, "precision": "fp32", "progress": False}
    found = evaluate(model, tok, texts, batch_size=batch_size, **options)
    for text, score in zip(texts, found.documents, strict=True):
        ids = tok.encode(text, eos=True)
        assert (score.bytes, score.characters, score.tokens) == (len(text.encode()), len(text), len(ids))
        assert score.nats == pytest.approx(one_forward_per_token(model, [tok.eos_id, *ids], stride), rel=1e-5)
    assert found.total.bits_per_byte == pytest.approx(
        sum(score.nats for score in found.documents) / math.log(2) / len("".join(texts).encode())
    )
    assert evaluate(model, tok, texts, batch_size=1, **options).total.nats == pytest.approx(found.total.nats, rel=1e-5)


def test_without_a_stride_windows_do_not_overlap(english: Path, english_tokenizer: Tokenizer) -> None:
    model = tiny_model(std=0.2, vocab_size=VOCABULARY)
    files = find_texts(english)[:2]
    default, disjoint, half = (
        evaluate(model, english_tokenizer, files, stride=stride, progress=False)
        for stride in (None, model.config.max_seq_len, model.config.max_seq_len // 2)
    )
    assert default == disjoint != half
    assert [score.name for score in default.documents] == list(map(str, files))


def test_shorter_windows_score_as_a_model_of_that_context(english: Path, english_tokenizer: Tokenizer) -> None:
    long, short = (tiny_model(std=0.2, vocab_size=VOCABULARY, max_seq_len=length) for length in (40, 10))
    files = find_texts(english)[:2]
    options = {"precision": "fp32", "progress": False}
    expected = evaluate(short, english_tokenizer, files, **options).total.nats
    assert evaluate(long, english_tokenizer, files, context_size=10, **options).total.nats == pytest.approx(expected)
    assert evaluate(long, english_tokenizer, files, **options).total.nats != pytest.approx(expected)


def test_a_model_that_knows_nothing_needs_all_its_bits(english_tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.tok_embeddings.weight.zero_()
        model.output.weight.zero_()
    text = "The old captain watched the rain. 三国"
    tokens = len(english_tokenizer.encode(text)) + 1
    for precision in ("fp32", "bf16"):
        [score] = evaluate(model, english_tokenizer, [text], precision=precision, progress=False).documents
        assert score.bits_per_byte == pytest.approx(math.log2(VOCABULARY) * tokens / len(text.encode()), rel=1e-6)
        assert score.perplexity == pytest.approx(VOCABULARY, rel=1e-5)


def test_bytes_are_those_of_the_text_that_is_read(tmp_path: Path, english_tokenizer: Tokenizer) -> None:
    text = "Now.\nThen.\n"
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    model = tiny_model(vocab_size=VOCABULARY)
    read = evaluate(model, english_tokenizer, [tmp_path / "dos.txt"], progress=False).total
    assert read.bytes == len(text)
    assert read == evaluate(model, english_tokenizer, {"any": text}, progress=False).total


def test_what_cannot_be_scored_is_refused_by_name(tmp_path: Path, english_tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=VOCABULARY)
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "good.txt").write_bytes(b"a")
    for documents, options, words in [
        (["a"], {"stride": 0}, "stride=0 must be from 1 to the context of 24"),
        (["a"], {"context_size": 25}, r"context_size=25 must be from 1 to the model's context of 24"),
        (["a"], {"stride": 25}, "stride=25"),
        (["a"], {"batch_size": 0}, "batch_size=0"),
        ([], {}, "no documents"),
        ("a text", {}, "put a single one in a list"),
        (["a", ""], {}, "without text.*text 2"),
        ([tmp_path / "bad.txt"], {}, "encoding of .*bad.txt is not known"),
        ([tmp_path / "good.txt"] * 2, {}, "2 documents have only 1 names: is a file named twice"),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluate(model, english_tokenizer, documents, **options)
    with pytest.raises(ValueError, match="330 ids, the model only vocab_size=37"):
        evaluate(tiny_model(), english_tokenizer, ["a"])


def test_a_data_set_gives_its_texts_back(english: Path, english_tokenizer: Tokenizer, tokenizer: Tokenizer) -> None:
    folder = english.parent / "tokens"
    prepare_dataset(english, english_tokenizer, folder, 0.3, progress=False)
    found = {}
    for split in ("train", "val"):
        data = TokenDataset(folder, split, 16)
        found |= data.texts(english_tokenizer)
        for documents in (1, len(data.names)):
            exactly = int(data.offsets[documents])
            assert list(data.texts(english_tokenizer, exactly)) == data.names[:documents]
            assert list(data.texts(english_tokenizer, exactly - 1)) == data.names[: max(1, documents - 1)]
    assert found == {path.name: read_text(path) for path in find_texts(english)}
    with pytest.raises(DatasetError, match="another tokenizer"):
        data.texts(tokenizer)


def test_validation_agrees_where_windows_make_no_difference(
    english: Path, english_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Without attention the model sees only the token before, so cutting across documents changes nothing."""
    model = tiny_model(std=0.3, vocab_size=VOCABULARY)
    for block in model.layers:
        torch.nn.init.zeros_(block.attention.wo.weight)
    prepare_dataset(english, english_tokenizer, tmp_path / "tokens", 0.7, progress=False)
    data = TokenDataset(tmp_path / "tokens", "val", model.config.max_seq_len)
    assert len(data.names) > 1
    found = trainer(tmp_path / "run", quick(), model)
    found.val_data = data
    event = found.validate()
    exact = evaluate(model, english_tokenizer, data.texts(english_tokenizer), precision="fp32", progress=False).total
    eos, one = english_tokenizer.eos_id, int(data.tokens[0])
    with torch.no_grad():
        unseen = float(-model(torch.tensor([[eos]]))[0, -1].log_softmax(-1)[one])  # what validation leaves out
    assert exact.tokens == len(data.tokens)
    assert event["val_loss"] * (exact.tokens - 1) == pytest.approx(exact.nats - unseen, rel=1e-5)
    stretched = (exact.nats - unseen) * exact.tokens / (exact.tokens - 1)  # that token counted at the mean
    assert event["val_bits_per_byte"] == pytest.approx(stretched / math.log(2) / exact.bytes, rel=1e-5)


@pytest.mark.slow
def test_an_interval_covers_at_about_its_rate() -> None:
    generator = np.random.default_rng(0)
    for documents in (6, 30):
        hits, trials = 0, 300
        for seed in range(trials):
            sizes = generator.lognormal(9, 0.5, documents)
            low, high = bootstrap_interval(sizes * generator.normal(1.9, 0.1, documents), sizes, seed)
            hits += low <= 1.9 <= high
        assert 0.90 < hits / trials < 0.985


def test_an_interval_is_seeded_holds_the_total_and_needs_documents() -> None:
    scores = [Score(str(n), 1000 + n, 900, 300, 1300.0 + 40 * (n % 3)) for n in range(9)]
    some = Evaluation.of(scores, seed=1)
    assert some == Evaluation.of(scores, seed=1) != Evaluation.of(scores, seed=2)
    assert some.interval is not None and some.interval[0] < some.total.bits_per_byte < some.interval[1]
    assert "9 documents (95% interval" in str(some)
    easier = Evaluation.of([replace(score, nats=score.nats - 7 * math.log(2)) for score in scores])
    difference, bounds = paired_difference(easier, some)
    assert difference == pytest.approx(easier.total.bits_per_byte - some.total.bits_per_byte)
    assert bounds == pytest.approx((-0.007, -0.007), rel=0.01)  # far narrower than either's own interval
    with pytest.raises(ValueError, match="not of the same documents"):
        paired_difference(some, Evaluation.of(scores[:8]))
    assert Evaluation.of(scores[:4]).interval is None and "too few" in str(Evaluation.of(scores[:4]))
    with pytest.raises(ValueError, match="needs 5 documents"):
        bootstrap_interval([1.0], [1.0])


# Floors


def kneser_ney(stream: list[int], order: int, vocab_size: int, context: tuple[int, ...], symbol: int) -> float:
    """Chen and Goodman's equations 24 to 26, straight from n-grams in dictionaries."""

    def counts(length: int) -> Counter[tuple[int, ...]]:
        grams = Counter(tuple(stream[i : i + length]) for i in range(len(stream) - length + 1))
        if length == order:
            return grams
        return Counter(gram[1:] for gram in {tuple(stream[i : i + length + 1]) for i in range(len(stream) - length)})

    def probability(context: tuple[int, ...]) -> float:
        table = counts(len(context) + 1)
        n = [sum(count == times for count in table.values()) for times in range(5)]
        discounts = [0, 0.5, 1.0, 1.5]
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            computed = [0, *(times - (times + 1) * y * n[times + 1] / n[times] for times in (1, 2, 3))]
            discounts = computed if min(computed[1:]) > 0 else discounts
        shorter = probability(context[1:]) if context else 1 / vocab_size
        followers = {gram: count for gram, count in table.items() if gram[:-1] == context}
        if not followers:
            return shorter
        own = table[(*context, symbol)]
        freed = sum(discounts[min(count, 3)] for count in followers.values())
        return (own - discounts[min(own, 3)] + freed * shorter) / sum(followers.values())

    return probability(context)


@settings(deadline=None, max_examples=examples(60))
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=25), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=12),
    st.integers(1, 4),
)
def test_ngrams_are_smoothed_as_published(documents: list[list[int]], document: list[int], order: int) -> None:
    stream = [4, *(symbol for each in documents for symbol in (*each, 4))]
    if order >= len(stream):
        with pytest.raises(ValueError, match=f"order={order}"):
            NGram(documents, order, 5, 4)
        return
    found = NGram(documents, order, 5, 4).nats(document)
    whole = [4, *document, 4]
    for place in range(1, len(whole)):
        context = tuple(whole[max(0, place - order + 1) : place])
        assert math.exp(-found[place - 1]) == pytest.approx(kneser_ney(stream, order, 5, context, whole[place]))


def test_ngram_probabilities_sum_to_one_over_all_bytes(sanguo: Path) -> None:
    texts = [path.read_bytes() for path in sorted(sanguo.iterdir())[:6]]
    model = NGram(texts[:5], 5, 257, 256)
    generator = random.Random(0)
    contexts = [b"", bytes(range(7)), *(texts[5][n : n + 9] for n in (generator.randrange(9000) for _ in range(10)))]
    for context in contexts:
        each = [model.nats([*context, byte])[len(context)] for byte in range(256)]
        surprise = np.array([*each, model.nats(context)[-1]])
        assert np.exp(-surprise).sum() == pytest.approx(1) and np.isfinite(surprise).all()


def test_more_context_and_more_text_help_on_the_novel(sanguo: Path, tokenizer: Tokenizer) -> None:
    texts = [read_text(path) for path in sorted(sanguo.iterdir())[:30]]
    held_out = dict(enumerate(texts[25:]))
    bits = [
        evaluate_ngram(known, {str(name): text for name, text in held_out.items()}, tokenizer, order).total
        for known, order in ((texts[:25], 1), (texts[:25], 3), (texts[:5], 3), ([*texts[:25], *texts[25:]], 3))
    ]
    unigram, trigram, less, cheating = (score.bits_per_byte for score in bits)
    assert cheating < trigram < less < unigram < math.log2(tokenizer.vocab_size) * bits[0].tokens / bits[0].bytes
    assert {score.tokens for score in bits} == {sum(len(tokenizer.encode(text)) + 1 for text in texts[25:])}


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz program here")
def test_it_agrees_with_the_xz_program(sanguo: Path) -> None:
    text = (sanguo / "037.txt").read_text(encoding="utf-8")
    size = len(subprocess.run(["xz", "-9e", "--check=crc64"], input=text.encode(), capture_output=True).stdout)
    assert xz_bits_per_byte("", text) == pytest.approx(8 * size / len(text.encode()), rel=1e-3)


def test_what_was_read_before_helps() -> None:
    generator = random.Random(0)
    noise = "".join(generator.choices("abcdefgh", k=4000))  # three bits a byte, and nothing less will do
    assert 3.0 <= xz_bits_per_byte("", noise) < 4.0
    assert xz_bits_per_byte(noise, noise) < 0.1
