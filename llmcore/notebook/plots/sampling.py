"""Pictures of how the next token is chosen, and of what the cache saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from llmcore.notebook.plots.style import BLUE, GREY, LABEL, RED, figure_text, head, name_axes, new_figure, styled


@styled
def ways_to_choose(pieces: Sequence[str], ways: Mapping[str, ArrayLike], title: str) -> Figure:
    """The same tokens under several ways to choose, side by side.

    A full bar is the probability with which a way takes the token. A hatched bar is a token that the way cuts off, with
    the probability that the model gave it.

    Args:
        pieces: the tokens, the likeliest first.
        ways: by name, the probability of each token, float (tokens). The first is the model's own.
        title: what to see.
    """
    columns = 3
    rows = -(-len(ways) // columns)
    figure, axes = new_figure(10, 0.7 + rows * (0.5 + 0.21 * len(pieces)), rows, columns)
    places, own = np.arange(len(pieces)), np.asarray(next(iter(ways.values())))
    widest = max(float(np.max(values)) for values in ways.values())

    for number, (axis, (name, values)) in enumerate(zip(axes, ways.items(), strict=False)):
        probabilities = np.asarray(values)
        cut = np.where(probabilities > 0, 0.0, own)
        axis.barh(places, probabilities, color=BLUE)
        axis.barh(places, cut, facecolor="none", edgecolor=GREY, hatch="////", linewidth=0.8)
        axis.set_yticks(places, [figure_text(piece, LABEL) for piece in pieces] if number % columns == 0 else [])
        axis.set_xlim(0, 1.05 * widest)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        name_axes(axis, name, "probability" if number >= len(ways) - columns else "", "")
    for axis in axes[len(ways) :]:
        axis.set_visible(False)
    head(figure, title)
    return figure


@styled
def cache_work(read_again: ArrayLike, cached: ArrayLike, title: str) -> Figure:
    """What the cache of keys and values saves: tokens that each step reads, and the time that it takes.

    Args:
        read_again: seconds of each step if the model reads the whole text again, float (steps); step t reads t tokens.
        cached: seconds of each step with the cache, float (steps); each reads one token.
        title: what to see.
    """
    whole, one = np.asarray(read_again), np.asarray(cached)
    steps = np.arange(1, len(whole) + 1)
    figure, [work, time] = new_figure(10, 3.2, 1, 2)
    work.fill_between(steps, steps, color=RED, alpha=0.25, linewidth=0)
    work.plot(steps, steps, color=RED, label=f"whole text again: {steps.sum():,} tokens in all")
    work.fill_between(steps, np.ones_like(steps), color=BLUE, linewidth=0)
    work.plot(steps, np.ones_like(steps), color=BLUE, label=f"with the cache: {len(steps):,} tokens in all")
    name_axes(work, "Tokens that a step reads", "tokens of the text so far", "tokens")

    time.plot(steps, 1000 * whole, color=RED, label=f"whole text again: {whole.sum():.2f} s in all")
    time.plot(steps, 1000 * one, color=BLUE, label=f"with the cache: {one.sum():.2f} s in all")
    time.set_ylim(0, 1.4 * 1000 * float(np.percentile(np.concatenate((whole, one)), 98)))
    name_axes(time, "Time that a step takes", "tokens of the text so far", "milliseconds")
    for axis in (work, time):
        axis.legend(loc="upper left")
    head(figure, title)
    return figure
