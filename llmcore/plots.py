"""Figures: each function takes data and returns a matplotlib Figure. Those of training are in `curves`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from llmcore.curves import (
    COSTS,
    compare_runs,
    isoflop_curves,
    memory_against_batch,
    scaling_fit,
    smoothed,
    training_curves,
)
from llmcore.evaluate import Evaluation
from llmcore.style import (
    BLUE,
    GREEN,
    GREY,
    LABEL,
    PURPLE,
    RED,
    Picture,
    chinese_font,
    head,
    name_axes,
    new_figure,
    plain,
    png,
    styled,
)

__all__ = [
    "COSTS",
    "attention_maps",
    "bars",
    "chinese_font",
    "compare_runs",
    "compression",
    "document_scores",
    "isoflop_curves",
    "length_histogram",
    "memory_against_batch",
    "next_tokens",
    "piece_lengths",
    "png",
    "rank_frequency",
    "scaling_fit",
    "smoothed",
    "text_pieces",
    "training_curves",
]


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
    """A text cut into its pieces, one box each; coloured in turns, or by a value with a scale beside it.

    Args:
        pieces: the text of each token; "⏎" stands for a newline, and ends the line.
        title: what to see.
        values: one per piece, as its surprise in nats.
        unit: of the values.
        columns: width of a line, in full-width characters.
    """
    pieces = [plain(piece, LABEL) for piece in pieces]
    boxes, x, line = [], 0.0, 0
    for piece in pieces:
        width = max(0.6, sum(1.0 if ord(c) > 0x2E7F else 0.62 for c in piece)) + 0.25
        if x + width > columns:
            x, line = 0.0, line + 1
        boxes.append((x, line, width, piece))
        x += width + 0.08
        if "⏎" in piece:
            x, line = 0.0, line + 1
    height = 0.42 * (boxes[-1][1] + 1 if boxes else 1)
    figure = Picture(figsize=(9, height + 0.7), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    colors = ["#cfe4f3", "#fbe6bd", "#c9e9dd", "#f2d9e6"]
    scale = matplotlib.colormaps["YlOrRd"]
    top = max(values) if values is not None and len(values) else 1.0
    for index, (x, line, width, piece) in enumerate(boxes):
        color = scale(0.8 * values[index] / top) if values is not None else colors[index % len(colors)]
        axes.add_patch(
            FancyBboxPatch(
                (x, -line - 0.8),
                width,
                0.76,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=color,
                edgecolor="none",
            )
        )
        axes.text(x + width / 2, -line - 0.43, piece, ha="center", va="center", color="black", fontsize=11)
    axes.set(xlim=(0, columns), ylim=(-(boxes[-1][1] + 1) if boxes else -1, 0.1))
    axes.set_title(plain(title))
    axes.axis("off")
    if values is not None:
        shades = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, top / 0.8), scale)
        bar = figure.colorbar(shades, ax=axes, fraction=0.02, pad=0.01, label=unit)
        bar.ax.set_ylim(0, top)
    return figure


@styled
def rank_frequency(counts: ArrayLike, title: str) -> Figure:
    """Token counts by rank, both logarithmic, with Zipf's line of slope -1."""
    ordered = np.sort(np.asarray(counts))[::-1]
    ordered = ordered[ordered > 0]
    ranks = np.arange(1, len(ordered) + 1)
    figure, [axes] = new_figure(7, 3.4)
    axes.loglog(ranks, ordered, color=BLUE, linewidth=2, label="tokens of this corpus")
    middle = len(ordered) // 10
    axes.loglog(
        ranks, ordered[middle] * (middle + 1) / ranks, color=RED, linestyle="--", label="Zipf: count ∝ 1 / rank"
    )
    axes.legend()
    name_axes(axes, title, "rank of the token (log scale)", "occurrences (log scale)")
    return figure


@styled
def bars(values: Mapping[str, float], title: str, unit: str, highlight: str | None = None) -> Figure:
    """A few named values beside each other, as horizontal bars."""
    figure, [axes] = new_figure(7, 0.8 + 0.42 * len(values))
    places = range(len(values))
    drawn = axes.barh(places, list(values.values()), color=[RED if name == highlight else BLUE for name in values])
    axes.set_yticks(places, [plain(name, LABEL) for name in values])
    axes.bar_label(
        drawn, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values.values()], padding=4
    )
    axes.invert_yaxis()
    axes.margins(x=0.2)
    if max(values.values()) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", visible=False)
    name_axes(axes, "", unit, "")
    head(figure, title)
    return figure


@styled
def document_scores(evaluations: Mapping[str, Evaluation], title: str) -> Figure:
    """Bits per byte of each document, hardest on top, with every model's total as a line and its interval as a band.

    Of more than 24 documents, the ten hardest and the ten easiest are shown.

    Args:
        evaluations: of the same documents, by model; the first gives the order.
        title: what to see.

    Raises:
        ValueError: if they are not of the same documents.
    """
    first = next(iter(evaluations.values())).documents
    names = [score.name for score in first]
    ordered = sorted(range(len(names)), key=lambda number: -first[number].bits_per_byte)
    shown = ordered if len(ordered) <= 24 else ordered[:10] + ordered[-10:]
    gap = 0 if len(shown) == len(ordered) else 1  # a row left free for what is not shown
    rows = np.array([place + gap * (place >= 10) for place in range(len(shown))])
    labels = [name if len(name) <= 24 else f"…{name[-23:]}" for name in (names[number] for number in shown)]
    figure, [axes] = new_figure(8, 1.2 + 0.2 * len(evaluations) + 0.26 * (len(shown) + gap))
    for number, (name, each) in enumerate(evaluations.items()):
        if [score.name for score in each.documents] != names:
            raise ValueError(f"{name} was evaluated on other documents than {next(iter(evaluations))}")
        color = (RED, BLUE, GREEN, PURPLE)[number % 4]
        bits = [each.documents[document].bits_per_byte for document in shown]
        total, label = each.total.bits_per_byte, f"{name}: {each.total.bits_per_byte:.3f} in all"
        axes.axvline(total, color=color, linewidth=1.2)
        if each.interval:
            axes.axvspan(*each.interval, color=color, alpha=0.12, linewidth=0)
            label += " (line), 95% interval {:.3f} to {:.3f} (band)".format(*each.interval)
        axes.plot(bits, rows, color=color, marker="os^D"[number % 4], linestyle="none", label=plain(label))
    axes.set_yticks(rows, [plain(label) for label in labels])
    if gap:
        said = f"⋮ {len(ordered) - len(shown):,} documents between"
        axes.text(
            0.01, 10, said, transform=axes.get_yaxis_transform(), va="center", color=GREY, backgroundcolor="white"
        )
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.5 / len(shown))
    name_axes(axes, "", "bits per byte (less is better)", "")
    figure.legend(loc="outside lower left")
    head(figure, title)
    return figure


@styled
def next_tokens(pieces: Sequence[str], probabilities: Sequence[float], title: str) -> Figure:
    """The most likely next tokens and their probabilities."""
    figure, [axes] = new_figure(7, 0.9 + 0.32 * len(pieces))
    places = np.arange(len(pieces))
    drawn = axes.barh(places, probabilities, color=BLUE)
    axes.bar_label(drawn, [f"{p:.1%}" for p in probabilities], padding=4, fontsize=9)
    axes.set_yticks(places, [plain(piece, LABEL) for piece in pieces], fontsize=12)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    name_axes(axes, title, "probability", "next token")
    return figure


@styled
def attention_maps(weights: ArrayLike, labels: Sequence[str], title: str) -> Figure:
    """Every head's attention pattern, a row per layer: who (down) looks at whom (across).

    Args:
        weights: (layers, heads, time, time).
        labels: the token at each position.
        title: what to see.
    """
    patterns = np.asarray(weights)
    layers, heads, time, _ = patterns.shape
    figure, axes = new_figure(2.9 * heads, 3.1 * layers + 0.4, layers, heads)
    for index, axis in enumerate(axes):
        layer, head = divmod(index, heads)
        axis.imshow(patterns[layer, head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
        axis.grid(False)
        axis.set_xticks(range(time), list(map(plain, labels)), fontsize=6)
        axis.set_yticks(range(time), list(map(plain, labels)), fontsize=6)
        if head == 0:
            axis.set_ylabel("token that looks", fontsize=8)
        if layer == layers - 1:
            axis.set_xlabel("token looked at", fontsize=8)
    figure.suptitle(plain(title), fontweight="bold", fontsize=11)
    return figure
