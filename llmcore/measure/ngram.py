"""An n-gram model to compare a neural model with: it predicts from the last few symbols alone.

Interpolated Kneser-Ney smoothing with three discounts: Chen and Goodman, "An Empirical Study of Smoothing Techniques
for Language Modeling", Harvard TR-10-98 (1998), section 3. Counts are kept in sorted arrays, so a book takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmcore.measure.evaluate import Documents, Evaluation, Score, named_texts
from llmcore.tokenizer import Tokenizer


class NGram:
    """Probabilities of each symbol, given the `order` - 1 symbols before it.

    The documents are read as one stream with an end after each, as in the training of a language model. Each
    distribution is over the whole vocabulary, the end included. It sums to 1, and no symbol has probability 0.

    Args:
        documents: symbols, from 0 to `vocab_size` - 1: the ids of a tokenizer, or bytes.
        order: number of symbols in the longest n-gram.
        vocab_size: number of symbols, the end included.
        end: the symbol after each document, and before the first.

    Raises:
        ValueError: if the order is below 1 or above the number of symbols.
    """

    def __init__(self, documents: Iterable[Sequence[int]], order: int, vocab_size: int, end: int) -> None:
        self.order, self.vocab_size, self.end = order, vocab_size, end
        stream = np.concatenate([[end], *([*document, end] for document in documents)])
        if not 1 <= order < len(stream):
            raise ValueError(f"order={order} must be 1 or more, and at most the {len(stream) - 1} symbols there are")

        # An n-gram's key has two parts: the place of all but its last symbol in the table of shorter n-grams, and the
        # last symbol.
        places = np.zeros(len(stream) + 1, dtype=np.int64)  # of the n-gram that starts at each symbol
        tables: list[NDArray[np.int64]] = []
        counts: list[NDArray[np.int64]] = []
        for length in range(order):
            keys = places[:-1] * vocab_size + stream[length:]
            table, first, longer, times = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            if length:  # a shorter n-gram counts once for each different symbol before it
                counts[-1] = np.bincount(places[first + 1], minlength=len(tables[-1]))
            tables.append(table)
            counts.append(times)
            places = longer

        # For each table: keys; discounted counts; for each context the sum of the counts, and that of the discounts.
        self._tables = []
        contexts = 1
        for table, times in zip(tables, counts, strict=True):
            discounts = _discounts(times)[np.minimum(times, 3)]
            context = table // vocab_size
            totals, freed = (np.bincount(context, weights, contexts) for weights in (times, discounts))
            self._tables.append((table, times - discounts, totals, freed))
            contexts = len(table)

    def nats(self, document: Sequence[int]) -> NDArray[np.float64]:
        """-ln p of each symbol of a document and of its end, (symbols + 1,), in nats."""
        symbols = np.array([self.end, *document, self.end], dtype=np.int64)
        probabilities = np.full(len(symbols), 1 / self.vocab_size)
        contexts = np.zeros(len(symbols), dtype=np.int64)  # places of the symbols before each; -1: never seen
        for table, discounted, totals, freed in self._tables:
            keys = contexts * self.vocab_size + symbols
            places = np.searchsorted(table, keys).clip(max=len(table) - 1)
            known = table[places] == keys
            seen = (contexts >= 0) & (totals[contexts] > 0)  # else the shorter context's probability stays
            mixed = known * discounted[places] + freed[contexts] * probabilities
            probabilities = np.divide(mixed, totals[contexts], out=probabilities, where=seen)
            contexts = np.append(-1, np.where(known, places, -1)[:-1])
        return -np.log(probabilities[1:])


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The discounts of counts of 0, 1, 2, and 3 or more: equation 26 of Chen and Goodman.

    If the equation gives no sensible value, as with few n-grams that occur once: half of the largest possible discount,
    as in KenLM.
    """
    fallback = np.array([0.0, 0.5, 1.0, 1.5])
    once, twice, thrice, four = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (once and twice and thrice):
        return fallback
    y = once / (once + 2 * twice)
    discounts = np.array([0.0, 1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice])
    return discounts if (discounts[1:] > 0).all() else fallback


def evaluate_ngram(
    known: Iterable[str], documents: Documents, tokenizer: Tokenizer, order: int = 4, seed: int = 0
) -> Evaluation:
    """Score documents with an n-gram model over a tokenizer's ids that has counted the known texts.

    Tokens are scored as in `llmcore.measure.evaluate.evaluate`: each token once, and the end of each document.

    Raises:
        ValueError: for no documents, a document without text, or an order out of range.
    """
    texts = named_texts(documents)
    model = NGram((tokenizer.encode(text) for text in known), order, tokenizer.vocab_size, tokenizer.eos_id)
    scores = []
    for name, text in texts.items():
        nats = model.nats(tokenizer.encode(text))
        scores.append(Score(name, len(text.encode()), len(text), len(nats), float(nats.sum())))
    return Evaluation.of(scores, seed)
