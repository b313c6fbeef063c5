"""Pictures of texts and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from llmcore.notebook.plots.style import (
    BLUE,
    LABEL,
    RED,
    Picture,
    figure_text,
    name_axes,
    new_figure,
    styled,
)


@styled
def length_histogram(lengths: Sequence[int], unit: str, title: str) -> Figure:
    """How long the documents are, with the median marked."""
    figure, [axes] = new_figure(7, 2.8)
    axes.hist(lengths, bins=min(30, max(5, len(lengths) // 3)), color=BLUE)
    median = float(np.median(lengths))
    axes.axvline(median, color=RED, linestyle="--", label=f"median {median:,.0f}")
    axes.legend()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    name_axes(axes, title, f"length of a document ({unit})", "documents")
    return figure


@styled
def piece_lengths(counts: Mapping[int, int], title: str) -> Figure:
    """How many pieces of the vocabulary have how many characters."""
    figure, [axes] = new_figure(7, 2.8)
    lengths = sorted(counts)
    bars = axes.bar([str(n) for n in lengths], [counts[n] for n in lengths], color=BLUE)
    axes.bar_label(bars, [f"{counts[n]:,}" for n in lengths], fontsize=9)
    axes.margins(y=0.15)
    name_axes(axes, title, "characters in a piece", "pieces")
    return figure


@styled
def compression(
    vocab_sizes: Sequence[int], characters_per_token: Sequence[float], title: str, chosen: int | None = None
) -> Figure:
    """Characters per token against vocabulary size."""
    figure, [axes] = new_figure(7, 3.2)
    axes.plot(vocab_sizes, characters_per_token, marker="o", color=BLUE)
    for size, ratio in zip(vocab_sizes, characters_per_token, strict=True):
        axes.annotate(f"{ratio:.2f}", (size, ratio), textcoords="offset points", xytext=(0, 7), ha="center")
    if chosen is not None and chosen in vocab_sizes:
        at = list(vocab_sizes).index(chosen)
        axes.plot([chosen], [characters_per_token[at]], marker="o", markersize=11, color=RED, label="chosen here")
        axes.legend(loc="lower right")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(vocab_sizes), [f"{size:,}" for size in vocab_sizes])
    axes.minorticks_off()
    axes.margins(y=0.2)
    name_axes(axes, title, "vocabulary size (pieces, log scale)", "characters per token")
    return figure


@styled
def text_pieces(
    pieces: Sequence[str], title: str, values: Sequence[float] | None = None, unit: str = "", columns: float = 34
) -> Figure:
    """A text cut into its pieces, a box for each. Colours alternate, or show a value, with a scale beside the text.

    Args:
        pieces: the text of each token; "⏎" stands for a newline, and ends the line.
        title: what to see.
        values: one for each piece, such as its -ln p in nats.
        unit: of the values.
        columns: width of a line, in full-width characters.
    """
    # place the boxes: (x, line, width, text), all but the line in full-width characters
    boxes, x, line = [], 0.0, 0
    for piece in (figure_text(piece, LABEL) for piece in pieces):
        width = max(0.6, sum(1.0 if ord(c) > 0x2E7F else 0.62 for c in piece)) + 0.25
        if x + width > columns:
            x, line = 0.0, line + 1
        boxes.append((x, line, width, piece))
        x += width + 0.08
        if "⏎" in piece:
            x, line = 0.0, line + 1
    lines = boxes[-1][1] + 1 if boxes else 1

    # draw them
    figure = Picture(figsize=(9, 0.42 * lines + 0.7), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    colors = ["#cfe4f3", "#fbe6bd", "#c9e9dd", "#f2d9e6"]
    scale = matplotlib.colormaps["YlOrRd"]
    largest = max(values) if values is not None and len(values) else 1.0
    for index, (x, line, width, piece) in enumerate(boxes):
        color = scale(0.8 * values[index] / largest) if values is not None else colors[index % len(colors)]
        style = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((x, -line - 0.8), width, 0.76, boxstyle=style, facecolor=color, edgecolor="none"))
        axes.text(x + width / 2, -line - 0.43, piece, ha="center", va="center", color="black", fontsize=11)

    axes.set(xlim=(0, columns), ylim=(-lines, 0.1))
    axes.set_title(figure_text(title))
    axes.axis("off")
    if values is not None:
        shades = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, largest / 0.8), scale)
        bar = figure.colorbar(shades, ax=axes, fraction=0.02, pad=0.01, label=unit)
        bar.ax.set_ylim(0, largest)
    return figure


@styled
def rank_frequency(counts: ArrayLike, title: str) -> Figure:
    """Token counts by rank on logarithmic axes, with Zipf's line of slope -1."""
    ordered = np.sort(np.asarray(counts))[::-1]
    ordered = ordered[ordered > 0]
    ranks = np.arange(1, len(ordered) + 1)
    figure, [axes] = new_figure(7, 3.4)
    axes.loglog(ranks, ordered, color=BLUE, linewidth=2, label="tokens of this corpus")
    anchor = len(ordered) // 10  # the rank at which the line meets the counts
    zipf = ordered[anchor] * (anchor + 1) / ranks
    axes.loglog(ranks, zipf, color=RED, linestyle="--", label="Zipf: count ∝ 1 / rank")
    axes.legend()
    name_axes(axes, title, "rank of the token (log scale)", "occurrences (log scale)")
    return figure
