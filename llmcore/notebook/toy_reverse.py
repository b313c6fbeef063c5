"""The toy task: reverse a string of letters and digits, as a causal language model must, one token at a time.

A sequence is `bos, string, separator, reversed string, eos`, and only what follows the separator is trained. To write
the answer's first token the model must look back one place, for the next three, then five: no two tokens of the answer
look equally far, so the task is hard to cheat and its attention is easy to read. The bos that comes first tells where
the answer ends: eos is its mirror image.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcore.dataset import IGNORED
from llmcore.generate import generate_ids
from llmcore.model import Transformer

SYMBOLS = string.ascii_letters + string.digits
PAD, SEPARATOR, BOS, EOS, FIRST_SYMBOL = 0, 1, 2, 3, 4  # ids
VOCAB_SIZE = FIRST_SYMBOL + len(SYMBOLS)
MAX_LENGTH = 32
FEW = 16  # different symbols at most in every other pair of training strings


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


def question(text: str) -> list[int]:
    """What the model is to answer: bos, the string, the separator."""
    return [BOS, *encode(text), SEPARATOR]


def decode(ids: Sequence[int]) -> str:
    """The letters and digits among ids, up to the first eos; "·" stands for any other id."""
    ids = list(ids)
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return "".join(SYMBOLS[id - FIRST_SYMBOL] if id >= FIRST_SYMBOL else "·" for id in ids)


def random_strings(count: int, length: int, seed: int) -> list[str]:
    """Strings to test on. Training cannot have seen one of 32 characters: there are 62^32, about 10^57."""
    symbols = np.random.default_rng((seed, 1)).integers(len(SYMBOLS), size=(count, length))
    return ["".join(SYMBOLS[i] for i in row) for row in symbols]


class ReverseData:
    """Batches of the task: random strings, a quarter of any length, the others of the full one, the hardest.

    Half of them are made of few symbols, again and again. Without these a model learns to find the letter it wrote
    last and to read on to its left, and goes wrong where that letter comes twice; with these it learns to count.

    Attributes:
        context_size: tokens in a row of x; shorter sequences are padded on the right.
    """

    context_size = 2 * MAX_LENGTH + 2

    def __init__(self, val_batches: int = 4) -> None:
        self.val_batches = val_batches

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The batch of a training step, a pure function of its arguments: x and y, int64 (batch, time).

        y is -100 except where x is the separator or part of the answer.
        """
        return self._batch(np.random.default_rng((seed, 0, step)), batch_size)

    def sequential(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A few fixed batches for validation, from random streams that training does not use."""
        for number in range(self.val_batches):
            yield self._batch(np.random.default_rng((0, 2, number)), batch_size)

    def _batch(self, generator: np.random.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        any_length = generator.integers(1, MAX_LENGTH + 1, batch_size)
        lengths = np.where(np.arange(batch_size) % 4 == 0, any_length, MAX_LENGTH)[:, None]
        symbols = generator.integers(FIRST_SYMBOL, VOCAB_SIZE, (batch_size, MAX_LENGTH))
        few = np.take_along_axis(symbols, generator.integers(0, FEW, symbols.shape), axis=1)
        symbols = np.where(np.arange(batch_size)[:, None] // 2 % 2 == 0, symbols, few)
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
    """What the model says, greedily, after each string and the separator.

    Raises:
        ValueError: for a string that `encode` refuses.
    """
    out: list[str] = []
    for first in range(0, len(texts), batch_size):
        prompts = [question(text) for text in texts[first : first + batch_size]]
        steps = generate_ids(model, prompts, MAX_LENGTH + 1, eos_id=EOS, temperature=0)
        out += [decode(row) for row in zip(*steps, strict=True)]
    return out


def exact_match(model: Transformer, texts: Sequence[str]) -> float:
    """Share of strings that come back reversed without a single mistake."""
    given = answers(model, texts)
    return sum(text[::-1] == answer for text, answer in zip(texts, given, strict=True)) / len(texts)


def measure_exact_match(model: Transformer, texts: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """A trainer's callback that adds `exact_match` on these strings to every event with a validation."""

    def measure(event: dict[str, Any]) -> None:
        if "val_loss" in event:
            event["exact_match"] = exact_match(model, texts)

    return measure


def show(ids: Sequence[int]) -> list[str]:
    """Each id as one sign: ^ bos, | separator, ■ eos, · padding or an untrained place, else the symbol itself."""
    special = {BOS: "^", SEPARATOR: "|", EOS: "■"}
    return [SYMBOLS[id - FIRST_SYMBOL] if id >= FIRST_SYMBOL else special.get(id, "·") for id in ids]
