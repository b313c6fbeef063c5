"""Why does it repeat itself? Distinct n-grams, loops and repeated lines, to be compared with held-out text's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEAST_LINE = 4  # characters of a line that counts
_LINE_ENDS = re.compile(r"[\n。！？!?；;…]+|\.(?=\s|$)")


class Repetition(NamedTuple):
    """How much some texts repeat themselves.

    Attributes:
        distinct: for n = 1 to 4, the share of n-grams of tokens that are different ones.
        loop: tokens of the longest loop.
        lines: the share of lines that stood before in the same text.
    """

    distinct: tuple[float, float, float, float]
    loop: int
    lines: float


def repetition(ids: Sequence[Sequence[int]], texts: Sequence[str]) -> Repetition:
    """How much some texts repeat themselves, from their ids and their characters.

    More and longer texts repeat more. So compare only as many tokens, in texts of the same length.
    """
    one, two, three, four = (distinct(ids, n) for n in range(1, 5))
    return Repetition((one, two, three, four), max(map(longest_loop, ids), default=0), repeated_lines(texts))


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts together, as a share of their n-grams; 1 if there is none.

    Distinct-n of Li et al., "A Diversity-Promoting Objective Function", arXiv:1510.03055, section 5.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(ids: Sequence[int]) -> int:
    """Tokens of the longest stretch that is one piece twice or more in a row; 0 if there is none.

    The last piece may be cut off: 1 2 3 1 2 3 1 is a loop of seven tokens.
    """
    tokens, longest = np.asarray(ids), 0
    for period in range(1, len(tokens) // 2 + 1):
        differs = np.flatnonzero(tokens[period:] != tokens[:-period])
        row = int(np.diff(differs, prepend=-1, append=len(tokens) - period).max()) - 1  # equal ones in a row
        if row >= period:
            longest = max(longest, row + period)
    return longest


def repeated_lines(texts: Sequence[str]) -> float:
    """The share of all lines that stood before in the same text; 0 if there is none.

    A line ends at a line break or at the end of a sentence, and has four characters or more. With lines alone it is a
    filter of Rae et al., "Scaling Language Models", arXiv:2112.11446, table A1.
    """
    count = repeated = 0
    for text in texts:
        lines = [line for line in map(str.strip, _LINE_ENDS.split(text)) if len(line) >= LEAST_LINE]
        count += len(lines)
        repeated += len(lines) - len(set(lines))
    return repeated / count if count else 0.0


def nearest(points: Mapping[str, Sequence[float]], target: Sequence[float]) -> str:
    """The name of the point that differs least from the target: the sum of squares of the relative differences."""

    def difference(name: str) -> float:
        return sum((value / wanted - 1) ** 2 for value, wanted in zip(points[name], target, strict=True))

    return min(points, key=difference)
