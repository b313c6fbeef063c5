"""Figures of what a model predicts and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from llmcore.measure.evaluate import Evaluation
from llmcore.notebook.plots.style import (
    BLUE,
    GREEN,
    GREY,
    LABEL,
    PAPER,
    PURPLE,
    RED,
    figure_text,
    head,
    name_axes,
    new_figure,
    styled,
)


@styled
def bars(values: Mapping[str, float], title: str, unit: str, highlight: str | None = None) -> Figure:
    """A few named values as horizontal bars."""
    figure, [axes] = new_figure(7, 0.8 + 0.42 * len(values))
    places = range(len(values))
    drawn = axes.barh(places, list(values.values()), color=[RED if name == highlight else BLUE for name in values])
    axes.set_yticks(places, [figure_text(name, LABEL) for name in values])
    numbers = [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values.values()]
    axes.bar_label(drawn, numbers, padding=4)
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
    """Bits per byte of each document, the hardest on top. Each model's total is a line, and its interval a band.

    Of more than 24 documents, the ten hardest and the ten easiest are shown.

    Args:
        evaluations: of the same documents, by model; the first model gives the order.
        title: what to see.

    Raises:
        ValueError: if they are not of the same documents.
    """
    first = next(iter(evaluations.values())).documents
    names = [score.name for score in first]

    # which documents, and in which rows: if some are left out, a row between stays free
    ordered = sorted(range(len(names)), key=lambda number: -first[number].bits_per_byte)
    shown = ordered if len(ordered) <= 24 else ordered[:10] + ordered[-10:]
    gap = 0 if len(shown) == len(ordered) else 1
    rows = np.array([place if place < 10 else place + gap for place in range(len(shown))])
    labels = [name if len(name) <= 24 else f"…{name[-23:]}" for name in (names[number] for number in shown)]

    figure, [axes] = new_figure(8, 1.2 + 0.2 * len(evaluations) + 0.26 * (len(shown) + gap))
    for number, (name, evaluation) in enumerate(evaluations.items()):
        if [score.name for score in evaluation.documents] != names:
            raise ValueError(f"{name} was evaluated on other documents than {next(iter(evaluations))}")
        color = (RED, BLUE, GREEN, PURPLE)[number % 4]
        bits = [evaluation.documents[document].bits_per_byte for document in shown]
        total = evaluation.total.bits_per_byte
        label = f"{name}: {total:.3f} in all"
        axes.axvline(total, color=color, linewidth=1.2)
        if evaluation.interval:
            axes.axvspan(*evaluation.interval, color=color, alpha=0.12, linewidth=0)
            label += " (line), 95% interval {:.3f} to {:.3f} (band)".format(*evaluation.interval)
        axes.plot(bits, rows, color=color, marker="os^D"[number % 4], linestyle="none", label=figure_text(label))

    axes.set_yticks(rows, [figure_text(label) for label in labels])
    if gap:
        note, left = f"⋮ {len(ordered) - len(shown):,} documents between", axes.get_yaxis_transform()
        axes.text(0.01, 10, note, transform=left, va="center", color=GREY, backgroundcolor=PAPER)
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
    axes.set_yticks(places, [figure_text(piece, LABEL) for piece in pieces], fontsize=12)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    name_axes(axes, title, "probability", "next token")
    return figure
