"""The toy task: reverse a string of letters and digits, as a causal language model must, one token at a time.

A sequence is `bos, string, separator, reversed string, eos`. Only what follows the separator is trained. To write the
answer's first token the model must look back one place, for the second three places, for the third five. Each token of
the answer looks back another distance, so there is no short cut, and the attention is easy to read. The answer ends
where the mirrored string has its bos: the model writes eos there.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcore.dataset import IGNORED, spread
from llmcore.generate import generate_ids
from llmcore.model import Transformer

SYMBOLS = string.ascii_letters + string.digits
PAD, SEPARATOR, BOS, EOS, FIRST_SYMBOL = 0, 1, 2, 3, 4  # ids
VOCAB_SIZE = FIRST_SYMBOL + len(SYMBOLS)
MAX_LENGTH = 32
FEW_SYMBOLS = (2, 4, 8, 16)  # different symbols, at most, in half of the training strings: one of these numbers each


def encode(text: str) -> list[int]:
    """Ids of a string of 1 to 32 letters and digits.

    Raises:
        ValueError: naming the character or length at fault.
    """
    if not 1 <= len(text) <= MAX_LENGTH:
        raise ValueError(f"the string has {len(text)} characters; it may have 1 to {MAX_LENGTH}")
    wrong = next((character for character in text if character not in SYMBOLS), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is neither an ASCII letter nor a digit")
    return [FIRST_SYMBOL + SYMBOLS.index(character) for character in text]


def check_prompt(text: str) -> None:
    """Check that a notebook's prompt is a string that can be reversed.

    Raises:
        ValueError: naming the parameter, and the character or length at fault.
    """
    try:
        encode(text)
    except ValueError as error:
        raise ValueError(f"prompt cannot be reversed: {error}") from None


def question(text: str) -> list[int]:
    """Ids of the prompt: bos, the string, the separator."""
    return [BOS, *encode(text), SEPARATOR]


def decode(ids: Sequence[int]) -> str:
    """The letters and digits among ids, up to the first eos; "·" stands for any other id."""
    ids = list(ids)
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return "".join(SYMBOLS[id - FIRST_SYMBOL] if id >= FIRST_SYMBOL else "·" for id in ids)


def random_strings(count: int, length: int, seed: int) -> list[str]:
    """Strings to test on. There are 62^32, about 10^57, strings of 32 characters: training cannot have seen these."""
    symbols = np.random.default_rng((seed, 1)).integers(len(SYMBOLS), size=(count, length))
    return ["".join(SYMBOLS[i] for i in row) for row in symbols]


def repetitive_strings(count: int, length: int, symbols: int, seed: int) -> list[str]:
    """Strings of a few different symbols, which a model that only compares characters gets wrong."""
    generator = np.random.default_rng((seed, 3, length, symbols))
    few = generator.permuted(np.tile(np.arange(len(SYMBOLS)), (count, 1)), axis=1)[:, :symbols]
    rows = np.take_along_axis(few, generator.integers(symbols, size=(count, length)), axis=1)
    return ["".join(SYMBOLS[i] for i in row) for row in rows]


class ReverseData:
    """Batches of the task: random strings. Half have any length, the others the full length, which is hardest.

    Half of the strings repeat a few symbols. Without these, a model learns to find the letter that it wrote last and to
    copy the letter to its left. That fails where a letter comes twice. With these, it learns to count places.

    Attributes:
        context_size: tokens in a row of x; shorter sequences are padded on the right.
    """

    context_size = 2 * MAX_LENGTH + 2

    def __init__(self, val_batches: int = 4) -> None:
        self.val_batches = val_batches

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The batch of a training step, a pure function of its arguments.

        Returns:
            x and y, int64 (batch, time). y is -100 except where x is the separator or part of the answer.
        """
        return self._batch(np.random.default_rng((seed, 0, step)), batch_size)

    def sequential(self, batch_size: int, most: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """A few fixed batches for validation, from random streams that training does not use."""
        for number in spread(self.val_batches, most):
            yield self._batch(np.random.default_rng((0, 2, number)), batch_size)

    def _batch(self, generator: np.random.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        any_length = generator.integers(1, MAX_LENGTH + 1, batch_size)
        lengths = np.where(np.arange(batch_size) % 2 == 0, any_length, MAX_LENGTH)[:, None]
        symbols = generator.integers(FIRST_SYMBOL, VOCAB_SIZE, (batch_size, MAX_LENGTH))
        how_few = np.array(FEW_SYMBOLS)[generator.integers(len(FEW_SYMBOLS), size=batch_size)][:, None]
        few = np.take_along_axis(symbols, generator.integers(0, how_few, symbols.shape), axis=1)
        symbols = np.where(np.arange(batch_size)[:, None] // 2 % 2 == 0, symbols, few)

        # bos, string, separator, mirrored string, eos, padding
        place = np.arange(self.context_size + 1)[None, :]
        mirrored = np.where(place <= lengths, place - 1, 2 * lengths + 1 - place).clip(0, MAX_LENGTH - 1)
        tokens: NDArray[np.int64] = np.take_along_axis(symbols, mirrored, axis=1)
        for at, id in ((0, BOS), (lengths + 1, SEPARATOR), (2 * lengths + 2, EOS)):
            tokens = np.where(place == at, id, tokens)
        tokens = np.where(place > 2 * lengths + 2, PAD, tokens)

        answer = (place > lengths + 1) & (place <= 2 * lengths + 2)
        targets = np.where(answer, tokens, IGNORED)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())


def answers(model: Transformer, texts: Sequence[str], batch_size: int = 1000) -> list[str]:
    """What the model writes after each string and the separator, by greedy decoding.

    Raises:
        ValueError: as `encode`.
    """
    written: list[str] = []
    for first in range(0, len(texts), batch_size):
        prompts = [question(text) for text in texts[first : first + batch_size]]
        steps = generate_ids(model, prompts, MAX_LENGTH + 1, eos_id=EOS, temperature=0)
        written += [decode(row) for row in zip(*steps, strict=True)]
    return written


def exact_match(model: Transformer, texts: Sequence[str]) -> float:
    """Share of the strings that the model reverses without a mistake, 0 to 1."""
    return _share_right(answers(model, texts), [text[::-1] for text in texts])


def _share_right(written: Sequence[str], truth: Sequence[str]) -> float:
    return sum(answer == true for answer, true in zip(written, truth, strict=True)) / len(truth)


def right_by_place(written: Sequence[str], truth: Sequence[str]) -> NDArray[np.float64]:
    """Share of the answers, to strings of one length, that are right at each place: (length,)."""
    pairs = zip(written, truth, strict=True)
    return np.array([[answer[i : i + 1] == sign for i, sign in enumerate(true)] for answer, true in pairs]).mean(0)


def attention(model: Transformer, ids: Sequence[int]) -> Tensor:
    """Attention over one sequence of ids, on the CPU: (layers, heads, time, time)."""
    device = model.tok_embeddings.weight.device
    return model.attention_weights(torch.tensor([ids], device=device))[:, 0].float().cpu()


class Probe:
    """A callback for a Trainer that looks at the model at each validation and adds `exact_match` to the event.

    Args:
        model: the one in training.
        texts: strings of one length, to be reversed.
        shown: the string over whose reversal the attention is kept.

    Attributes:
        by_place: step -> share of right characters at each place of the answer.
        weights: step -> attention over `shown`, the separator and the reversed string, (layers, heads, time, time).
    """

    def __init__(self, model: Transformer, texts: Sequence[str], shown: str) -> None:
        self.model, self.texts = model, texts
        self.ids = [*question(shown), *encode(shown[::-1])]
        self.by_place: dict[int, NDArray[np.float64]] = {}
        self.weights: dict[int, Tensor] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """Look at the model if the event comes with a validation."""
        if "val_loss" in event:
            event["exact_match"] = self.look(event["step"])

    def look(self, step: int) -> float:
        """Keep what the model does at this step; returns the share of strings that it reverses without a mistake."""
        written, truth = answers(self.model, self.texts), [text[::-1] for text in self.texts]
        self.by_place[step] = right_by_place(written, truth)
        self.weights[step] = attention(self.model, self.ids)
        return _share_right(written, truth)


def labels(ids: Sequence[int]) -> list[str]:
    """Each id as one character: ^ bos, | separator, ■ eos, · padding or an untrained place, else the symbol itself."""
    special = {BOS: "^", SEPARATOR: "|", EOS: "■"}
    return [SYMBOLS[id - FIRST_SYMBOL] if id >= FIRST_SYMBOL else special.get(id, "·") for id in ids]
