"""Pictures of what a language model is asked, and how its answer is scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from llmcore.notebook.plots.style import (
    GREY,
    INPUT,
    LABEL,
    PALE,
    PAPER,
    TARGET,
    bare,
    figure_text,
    head,
    name_axes,
    new_figure,
    styled,
)


@styled
def staircase(pieces: Sequence[str], title: str) -> Figure:
    """What the model sees at each position, as filled cells, and what it is to guess there, as a framed one.

    Args:
        pieces: the texts of the tokens; the last one is only guessed.
        title: what to see.
    """
    places = len(pieces) - 1
    figure, [axes] = new_figure(9, 0.45 * places + 1.1)
    for t in range(places):
        for column in range(t + 2):
            guessed = column == t + 1
            fill, edge = ("none", TARGET) if guessed else (PALE[0], "none")
            box = (column + 0.04, t + 0.06)
            axes.add_patch(Rectangle(box, 0.92, 0.88, facecolor=fill, edgecolor=edge, linewidth=1.8))
            ink = TARGET if guessed else "black"
            text = figure_text(pieces[column], LABEL)
            axes.text(column + 0.5, t + 0.5, text, ha="center", va="center", color=ink, fontsize=11)
    axes.set(xlim=(0, places + 1), ylim=(places, 0))
    axes.set_yticks(np.arange(places) + 0.5, [f"position {t}" for t in range(places)])
    axes.set_xticks([])
    bare(axes)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=PALE[0], label="seen (x)"),
        Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=TARGET, label="to be guessed (y)"),
    ]
    axes.legend(handles=handles, loc="upper right")
    name_axes(axes, title, "", "")
    return figure


@styled
def surprise(names: Sequence[str], scores: ArrayLike, right: int, title: str) -> Figure:
    """From scores to a loss: scores, the softmax of them, and -ln p with the token that follows marked.

    Args:
        names: of the tokens.
        scores: their logits, (tokens,).
        right: number of the token that follows.
        title: what to see.
    """
    logits = np.asarray(scores, dtype=float)
    odds = np.exp(logits - logits.max())
    p = odds / odds.sum()
    figure, [left, middle, curve] = new_figure(10, 3.2, 1, 3)
    colors = [TARGET if number == right else INPUT for number in range(len(logits))]
    for axes, values, label, form in (
        (left, logits, "score (logit)", "{:.1f}"),
        (middle, p, "probability p", "{:.1%}"),
    ):
        bars = axes.bar(range(len(values)), values, color=colors)
        axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=9)
        axes.set_xticks(range(len(values)), [figure_text(name, LABEL) for name in names], fontsize=9)
        axes.margins(y=0.18)
        name_axes(axes, "", "", label)
    left.axhline(0, color=GREY, linewidth=0.8)
    x = np.linspace(0.01, 1, 200)
    curve.plot(x, -np.log(x), color=GREY)
    curve.plot(p[right], -math.log(p[right]), "o", color=TARGET, markersize=9)
    note = f"-ln {p[right]:.3f} = {-math.log(p[right]):.2f}"
    away: dict[str, Any] = {
        "textcoords": "offset points",
        "xytext": (0, 12),
        "ha": "right" if p[right] > 0.5 else "left",
    }
    curve.annotate(note, (p[right], -math.log(p[right])), color=TARGET, **away)
    middle.yaxis.set_major_formatter(PercentFormatter(1.0))
    name_axes(curve, "", "probability of the token that follows", "surprise -ln p (nats)")
    head(figure, title)
    return figure


@styled
def loss_units(losses: Mapping[str, float], bytes_per_token: float, title: str) -> Figure:
    """One ruler in three units: nats per token, perplexity, bits per byte, with some models on it.

    Args:
        losses: what each model loses, in nats per token.
        bytes_per_token: of the text that they are measured on.
        title: what to see.
    """
    end = 1.08 * max(losses.values())
    figure, [axes] = new_figure(9, 2.6)
    bits = 1 / math.log(2) / bytes_per_token  # nats per token -> bits per byte
    nats = np.arange(0, end, 1)
    whole = np.arange(0, end * bits, 0.5)
    rulers = (
        ("nats per token", nats, [f"{value:.0f}" for value in nats]),
        ("perplexity", nats, [f"{math.exp(value):,.0f}" for value in nats]),
        ("bits per byte", whole / bits, [f"{value:.1f}" for value in whole]),
    )
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # a mark stands above the line of a model
    for row, (_, places, marks) in enumerate(rulers):
        axes.hlines(row, 0, end, color="black", linewidth=1.2)
        axes.plot(places, np.full(len(places), row), "|", color="black", markersize=8)
        for place, mark in zip(places, marks, strict=True):
            axes.text(place, row + 0.2, mark, ha="center", va="top", fontsize=9, bbox=box)
    for name, loss in losses.items():
        axes.plot([loss, loss], [-0.35, 2], color=TARGET, linewidth=1.5)
        axes.text(loss, -0.42, figure_text(name), ha="center", va="bottom", color=TARGET, fontsize=9)
    axes.set_yticks(range(3), [name for name, _, _ in rulers])
    axes.set(xlim=(-0.2, end), ylim=(2.6, -1.0), xticks=[])
    bare(axes)
    name_axes(axes, title, "", "")
    return figure


@styled
def reading_order(windows: Sequence[tuple[int, int, int]], total: int, title: str) -> Figure:
    """Which part of the stream each window of the first epochs reads, in the order of reading.

    Args:
        windows: epoch, first token and one after the last, in the order in which they are read.
        total: tokens in the stream.
        title: what to see.
    """
    figure, [axes] = new_figure(9, 3.4)
    colors = (INPUT, TARGET)
    for number, (epoch, first, end) in enumerate(windows):
        axes.plot([first, end], [number, number], color=colors[epoch % 2], linewidth=2.4, solid_capstyle="butt")
    for epoch in sorted({epoch for epoch, _, _ in windows}):
        axes.plot([], [], color=colors[epoch % 2], linewidth=2.4, label=f"epoch {epoch + 1}")
    axes.set(xlim=(0, total))
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    name_axes(axes, title, "place in the stream (tokens)", "window, in reading order")
    return figure
