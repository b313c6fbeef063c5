"""Pictures of what a model has learned by heart, and of how much it repeats itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from llmcore.measure.memorised import Recall
from llmcore.notebook.plots.curves import smoothed
from llmcore.notebook.plots.style import (
    BLUE,
    GREEN,
    GREY,
    LABEL,
    ORANGE,
    PURPLE,
    RED,
    figure_text,
    head,
    name_axes,
    new_figure,
    styled,
)


@styled
def recited_shares(shares: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """The share of texts that stands in the training text word for word, by the shortest run that counts.

    Args:
        shares: by whose texts they are: tokens of a run -> share. The first is the model, the last is held-out text.
        title: what to see.
    """
    figure, [axes] = new_figure(8, 3.2)
    width = 0.8 / len(shares)
    for number, (name, by_size) in enumerate(shares.items()):
        places = np.arange(len(by_size)) + (number - (len(shares) - 1) / 2) * width
        look = {"color": BLUE} if number == 0 else {"facecolor": "none", "edgecolor": GREY, "hatch": "////"}
        drawn = axes.bar(places, list(by_size.values()), 0.92 * width, label=figure_text(name, LABEL), **look)  # type: ignore[arg-type]
        axes.bar_label(drawn, [f"{value:.1%}" for value in by_size.values()], padding=2, fontsize=9)
    sizes = next(iter(shares.values()))
    axes.set_xticks(range(len(sizes)), [f"{size} or more" for size in sizes])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    axes.legend()
    name_axes(axes, "", "tokens of a run that counts", "share of the text in such runs")
    head(figure, title)
    return figure


@styled
def recall_by_prompt(results: Mapping[str, Mapping[int, Recall]], title: str) -> Figure:
    """How far a model continues passages word for word, by the number of tokens it is shown.

    Args:
        results: "training text" and "held-out text", in this order: tokens of the prompt -> result.
        title: what to see.
    """
    figure, [whole, tokens] = new_figure(10, 3.2, 1, 2)
    for (name, by_size), color, style in zip(results.items(), (BLUE, RED), ("o-", "s--"), strict=False):
        sizes, label = list(by_size), figure_text(name, LABEL)
        whole.plot(sizes, [each.whole for each in by_size.values()], style, color=color, label=label)
        means, errors = [each.tokens for each in by_size.values()], [2 * each.error for each in by_size.values()]
        tokens.errorbar(sizes, means, errors, fmt=style, color=color, capsize=4, label=label)
    for axes in (whole, tokens):
        axes.set_xscale("log", base=2)
        sizes = [size for by_size in results.values() for size in by_size]
        axes.set_xticks(sorted(set(sizes)), [str(size) for size in sorted(set(sizes))])
        axes.set_ylim(bottom=0)
        axes.legend()
    whole.set_ylim(top=max(0.05, whole.get_ylim()[1]))
    whole.yaxis.set_major_formatter(PercentFormatter(1.0))
    name_axes(whole, "Continued to the end", "tokens of the prompt", "share of the passages")
    name_axes(tokens, "Tokens before the first wrong one", "tokens of the prompt", "tokens (bars: two standard errors)")
    head(figure, title)
    return figure


@styled
def learned_by_heart(events: Sequence[Mapping[str, Any]], title: str, tokens_per_epoch: int | None = None) -> Figure:
    """Losses, recall and recitation of a run, side by side, from its events (see `measure.memorised.Memory`).

    Of a run that was not measured, only the losses are drawn.

    Args:
        events: one a step, as in `metrics.jsonl`.
        title: what to see.
        tokens_per_epoch: of the training text; where it begins anew is a dotted line.
    """
    panels = [
        ("Loss", "nats per token", {"val_loss": ("validation", "s--", RED)}),
        (
            "Tokens continued word for word",
            "tokens before the first wrong one",
            {"recall": ("training text", "o-", BLUE), "recall_floor": ("held-out text", "s--", RED)},
        ),
        (
            "Recited in runs of 8 tokens or more",
            "share of the text",
            {"recited": ("the model's text", "o-", BLUE), "recited_floor": ("held-out text", "s--", RED)},
        ),
    ]
    panels = [panel for panel in panels if "val_loss" in panel[2] or any(panel[2].keys() & event for event in events)]
    figure, all_axes = new_figure(4 * len(panels) if len(panels) > 1 else 6, 3.4, 1, len(panels))
    steps = [event["step"] for event in events]
    loss = smoothed([event["loss"] for event in events], len(events) // 50)
    all_axes[0].plot(steps, loss, color=BLUE, label="training, smoothed")

    for axes, (title_, unit, lines) in zip(all_axes, panels, strict=True):
        for key, (label, style, color) in lines.items():
            points = np.array([(event["step"], event[key]) for event in events if key in event]).reshape(-1, 2)
            axes.plot(*points.T, style, color=color, markersize=5, label=label)
        for number, step in enumerate(_epoch_steps(events, tokens_per_epoch)):
            axes.axvline(step, color=GREY, linestyle=":", linewidth=1, label="" if number else "text begins anew")
        axes.set_xlim(all_axes[0].get_xlim())
        axes.legend(fontsize=9)
        if axes is not all_axes[0]:
            axes.set_ylim(bottom=0)
        if "recited" in lines:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        name_axes(axes, title_, "optimizer step", unit)
    head(figure, title)
    return figure


def _epoch_steps(events: Sequence[Mapping[str, Any]], tokens: int | None) -> list[int]:
    """The first step of each epoch but the first."""
    if not tokens:
        return []
    numbers = [int(event["tokens"] // tokens) for event in events]
    return [event["step"] for event, now, before in zip(events[1:], numbers[1:], numbers, strict=False) if now > before]


@styled
def quality_and_repetition(
    points: Mapping[str, Mapping[str, tuple[float, float]]], held_out: tuple[float, float], title: str
) -> Figure:
    """How unusual and how varied texts are under several ways to sample. The star is the author's own text.

    Args:
        points: by the parameter that changes: its value as text -> surprise under 4-grams (nats per token) and distinct
            pairs of tokens (share). Points of one parameter are joined by a line.
        held_out: the same two of held-out text.
        title: what to see.
    """
    figure, [axes] = new_figure(9, 4.6)
    looks = zip((BLUE, GREEN, ORANGE, PURPLE), "o^Dv", strict=True)
    for (parameter, values), (color, marker) in zip(points.items(), looks, strict=False):
        x, y = zip(*values.values(), strict=True)
        axes.plot(x, y, marker=marker, color=color, label=figure_text(parameter, LABEL), alpha=0.9)
        for number, (name, place) in enumerate(values.items()):
            beside = (-16, 7) if number % 2 else (6, -11)  # neighbours on different sides
            axes.annotate(figure_text(name, LABEL), place, beside, textcoords="offset points", fontsize=8)
    axes.plot(*held_out, "*", color=RED, markersize=18, label="held-out text", linestyle="none")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(0.08)
    axes.legend(loc="lower right")
    name_axes(axes, "", "surprise of counted 4-grams (nats per token)", "pairs of tokens that are different ones")
    head(figure, title)
    return figure
