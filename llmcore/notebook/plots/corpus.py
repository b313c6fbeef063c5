"""Pictures of texts and tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from llmcore.notebook.plots.style import (
    BLUE,
    GREY,
    LABEL,
    ORANGE,
    PALE,
    RED,
    cells,
    figure_text,
    head,
    name_axes,
    new_figure,
    styled,
)

MARKED, EDGE = "#f5b942", "#8a97a3"  # a box that is looked at; the edge of all


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


def _place_boxes(
    pieces: Sequence[str], columns: float, notes: Sequence[str] = ()
) -> tuple[list[tuple[float, int, float, str]], int]:
    """Boxes side by side, (x, line, width, text), all but the line in full-width characters; and how many lines."""
    boxes, x, line = [], 0.0, 0
    for number, piece in enumerate(figure_text(piece, LABEL) for piece in pieces):
        width = max(0.6, sum(1.0 if ord(c) > 0x2E7F else 0.62 for c in piece)) + 0.25
        if notes:
            width = max(width, 0.47 * cells(notes[number]) + 0.3)
        if x + width > columns:
            x, line = 0.0, line + 1
        boxes.append((x, line, width, piece))
        x += width + 0.08
        if "⏎" in piece:
            x, line = 0.0, line + 1
    return boxes, boxes[-1][1] + 1 if boxes else 1


def _draw_box(axes: Axes, box: tuple[float, float, float, str], color: Any, edge: str = EDGE) -> None:
    x, line, width, piece = box
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, -line - 0.8), width, 0.76, boxstyle=style, facecolor=color, edgecolor=edge, linewidth=0.6)
    )
    axes.text(x + width / 2, -line - 0.43, piece, ha="center", va="center", color="black", fontsize=11)


@styled
def text_pieces(
    pieces: Sequence[str],
    title: str,
    values: Sequence[float] | None = None,
    unit: str = "",
    columns: float = 34,
    notes: Sequence[str] = (),
) -> Figure:
    """A text cut into its pieces, a box for each. Colours alternate, or show a value, with a scale beside the text.

    Args:
        pieces: the text of each token; "⏎" stands for a newline, and ends the line.
        title: what to see.
        values: one for each piece, such as its -ln p in nats.
        unit: of the values.
        columns: width of a line, in full-width characters.
        notes: small print below each piece, such as its English.
    """
    boxes, lines = _place_boxes(pieces, columns, notes)
    below = 0.5 if notes else 0.0  # room below each line, in lines
    height = lines * (1 + below)
    figure, [axes] = new_figure(9, 0.42 * height + 0.7)
    scale = matplotlib.colormaps["YlOrRd"]
    largest = max(values) if values is not None and len(values) else 1.0
    for index, (x, line, width, piece) in enumerate(boxes):
        top = line * (1 + below)
        color = scale(0.8 * values[index] / largest) if values is not None else PALE[index % len(PALE)]
        _draw_box(axes, (x, top, width, piece), color)
        if notes:
            axes.text(x + width / 2, -top - 1.05, figure_text(notes[index]), ha="center", va="center", fontsize=8)

    axes.set(xlim=(0, columns), ylim=(-height, 0.1))
    axes.set_title(figure_text(title))
    axes.axis("off")
    if values is not None:
        shades = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, largest / 0.8), scale)
        bar = figure.colorbar(shades, ax=axes, fraction=0.02, pad=0.01, label=unit)
        bar.ax.set_ylim(0, largest)
    return figure


@styled
def box_rows(rows: Sequence[tuple[str, Sequence[str], Collection[int]]], title: str, columns: float = 36) -> Figure:
    """Rows of boxes with a name at the left: one text cut in several ways, or in several steps.

    Args:
        rows: name, pieces, and the numbers of the pieces to mark.
        title: what to see.
        columns: width of the figure, in full-width characters.
    """
    names = [figure_text(name, LABEL) for name, _, _ in rows]
    margin = 0.6 + 0.44 * max(map(cells, names), default=0)
    placed = [_place_boxes(pieces, columns - margin) for _, pieces, _ in rows]
    lines = sum(count for _, count in placed) + 0.25 * len(rows)
    figure, [axes] = new_figure(9.5, 0.4 * lines + 0.5)
    top = 0.0
    for name, (_, _, marked), (boxes, count) in zip(names, rows, placed, strict=True):
        axes.text(0, -top - 0.43, name, va="center", fontsize=10)
        for number, (x, line, width, piece) in enumerate(boxes):
            color = MARKED if number in marked else PALE[0]
            _draw_box(axes, (margin + x, top + line, width, piece), color)
        top += count + 0.25
    axes.set(xlim=(0, columns), ylim=(-lines, 0.1), title=figure_text(title))
    axes.axis("off")
    return figure


def _spaced(pieces: Sequence[str]) -> list[str]:
    return [piece.replace(" ", "␣").replace("\n", "⏎") for piece in pieces]


Step = tuple[Sequence[tuple[tuple[str, str], int]], Sequence[str]]


def merge_steps(start: Sequence[str], steps: Sequence[Step], title: str) -> Figure:
    """Byte-pair encoding step by step: the most frequent pairs, the winner marked, and the pieces after the merge.

    Args:
        start: the pieces at first.
        steps: for each merge the pairs with their counts, the winner first, and the pieces after it.
        title: what to see.
    """
    rows: list[tuple[str, Sequence[str], Collection[int]]] = [(f"{len(start)} pieces", _spaced(start), ())]
    for number, (pairs, pieces) in enumerate(steps, start=1):
        counts = ["{} + {}: {}×".format(*_spaced(pair), count) for pair, count in pairs]
        rows.append((f"{number}. pairs", counts, (0,)))
        new = "".join(pairs[0][0])
        marked = [place for place, piece in enumerate(pieces) if piece == new]
        rows.append((f"{len(pieces)} pieces", _spaced(pieces), marked))
    return box_rows(rows, title)


@styled
def compression(
    vocab_sizes: Sequence[int],
    characters_per_token: Sequence[float],
    title: str,
    chosen: int | None = None,
    dim: int | None = None,
) -> Figure:
    """Characters per token against vocabulary size, and on request what the vocabulary's table costs.

    Args:
        vocab_sizes: pieces.
        characters_per_token: one for each size.
        title: what to see.
        chosen: the size to mark.
        dim: numbers that a model holds for each piece. With it, a second panel shows the table's parameters.
    """
    figure, panels = new_figure(10 if dim else 7, 3.2, 1, 2 if dim else 1)
    curves = [(list(characters_per_token), "characters per token", [f"{each:.2f}" for each in characters_per_token])]
    if dim:
        table = [size * dim / 1e6 for size in vocab_sizes]
        curves.append((table, "million parameters in the table", [f"{each:.1f}" for each in table]))
    for axes, (values, label, notes), color in zip(panels, curves, (BLUE, ORANGE), strict=False):
        axes.plot(vocab_sizes, values, marker="o", color=color)
        for size, value, note in zip(vocab_sizes, values, notes, strict=True):
            axes.annotate(note, (size, value), textcoords="offset points", xytext=(0, 8), ha="center")
        if chosen is not None and chosen in vocab_sizes:
            at = list(vocab_sizes).index(chosen)
            axes.plot([chosen], [values[at]], "o", markersize=11, color=RED, label="chosen here", zorder=1)
            axes.legend(loc="lower right")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(vocab_sizes), [f"{size:,}" for size in vocab_sizes])
        axes.minorticks_off()
        axes.margins(x=0.08, y=0.2)
        name_axes(axes, "", "pieces (log scale)", label)
    head(figure, title)
    return figure


@styled
def rank_frequency(counts: ArrayLike, title: str, shares: Sequence[float] = (0.5, 0.9)) -> Figure:
    """Token counts by rank on logarithmic axes, beside a line of slope -1.

    Args:
        counts: of each id.
        title: what to see.
        shares: of the whole text, marked at the rank to which the most frequent tokens make up so much of it.
    """
    ordered = np.sort(np.asarray(counts))[::-1]
    ordered = ordered[ordered > 0]
    ranks = np.arange(1, len(ordered) + 1)
    figure, [axes] = new_figure(7.5, 3.6)
    axes.loglog(ranks, ordered, color=BLUE, linewidth=2, label="tokens of this corpus")
    anchor = len(ordered) // 10  # the rank at which the line meets the counts
    zipf = ordered[anchor] * (anchor + 1) / ranks
    axes.loglog(ranks, zipf, color=RED, linestyle="--", label="count ∝ 1 / rank (Zipf's law)")
    covered = np.cumsum(ordered) / ordered.sum()
    for share in shares:
        rank = int(np.searchsorted(covered, share)) + 1
        axes.axvline(rank, color=GREY, linestyle=":", linewidth=1.2)
        note = f"{rank:,} tokens:\n{share:.0%} of the text "
        axes.text(rank, 0.03, note, transform=axes.get_xaxis_transform(), ha="right", va="bottom", fontsize=8)
    axes.legend()
    name_axes(axes, title, "rank of the token (log scale)", "occurrences (log scale)")
    return figure
