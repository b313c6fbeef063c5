"""Pictures of the model itself: its parts and shapes, attention step by step, positions, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike
from torch import Tensor, nn

from llmcore.model import Block, Transformer
from llmcore.notebook.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INPUT,
    LABEL,
    ORANGE,
    PALE,
    PAPER,
    PURPLE,
    QUERY,
    SKY,
    TARGET,
    Picture,
    bare,
    figure_text,
    head,
    name_axes,
    new_figure,
    styled,
)

HIDDEN = "#b9c0c7"  # what the mask hides


@torch.no_grad()
def shapes(model: Transformer, tokens: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape that each part of the model gives for these tokens, (batch, time): by the part's name."""
    found: dict[str, tuple[int, ...]] = {"tokens": tuple(tokens.shape)}

    def note(name: str) -> None:
        def keep(_: nn.Module, __: object, given: Tensor) -> None:
            found[name] = tuple(given.shape)

        hooks.append(model.get_submodule(name).register_forward_hook(keep))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name, part in model.named_modules():
        if name and not isinstance(part, nn.ModuleList):
            note(name)
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@styled
def block_diagram(model: Transformer, tokens: Tensor, title: str) -> Figure:
    """The whole model with the shapes that it gives for these tokens: one block in full, the stream as a line.

    Args:
        model: any.
        tokens: (batch, time) ids.
        title: what to see.
    """
    found, layers = shapes(model, tokens), len(model.layers)
    first = model.layers[0]
    assert isinstance(first, Block)
    attention = first.attention
    figure, [axes] = new_figure(10, 4.6)

    def box(x: float, y: float, text: str, color: str, width: float = 1.5, height: float = 0.62) -> None:
        place, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.1"
        axes.add_patch(FancyBboxPatch(place, width, height, boxstyle=style, facecolor=color, edgecolor=GREY, zorder=3))
        axes.text(x, y, text, ha="center", va="center", fontsize=9, zorder=4)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = "black", width: float = 1.2) -> None:
        axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=color, linewidth=width, zorder=2)
        )

    def note(x: float, y: float, name: str, words: str = "") -> None:
        shape = "(" + ", ".join(f"{size:,}" for size in found[name]) + ")"
        axes.text(x, y, f"{words}{shape}", ha="center", va="center", fontsize=8, color=INPUT, zorder=5)

    # the stream, from the tokens to the scores
    box(0.2, 0, "tokens", PAPER, 1.1)
    note(0.2, -0.5, "tokens")
    arrow((0.75, 0), (1.2, 0))
    box(1.9, 0, f"table\n{model.config.vocab_size:,} × {model.config.dim}", PALE[0], 1.3)
    arrow((2.55, 0), (10.3, 0), INPUT, 3)
    note(1.9, -0.5, "tok_embeddings")
    box(11, 0, "RMSNorm", PALE[1], 1.3)
    arrow((11.65, 0), (12.1, 0))
    box(12.8, 0, "scores", PALE[0], 1.3)
    note(12.8, -0.5, "output")

    # one block: two branches that read the stream and add to it
    branches = (
        (3.7, "attention", f"{attention.n_heads} heads of {attention.head_dim}", "attention.wq", PALE[2]),
        (7.0, "feed-forward", "SwiGLU", "feed_forward.w1", PALE[3]),
    )
    for x, name, words, inside, color in branches:
        axes.plot([x, x], [0, 1.2], color="black", linewidth=1.2, zorder=2)
        box(x, 0.75, "RMSNorm", PALE[1], 1.1, 0.45)
        arrow((x, 1.2), (x, 1.6))
        box(x + 1.0, 1.95, f"{name}\n{words}", color, 3.0, 0.7)
        note(x + 1.0, 2.5, f"layers.0.{inside}", "inside: ")
        arrow((x + 2.2, 1.6), (x + 2.2, 0.16))
        part = "layers.0." + inside.split(".")[0]
        note(x + 1.25, 0.3, part, "adds ")
        axes.text(x + 2.2, 0, "+", ha="center", va="center", fontsize=12, zorder=5)
        axes.plot(x + 2.2, 0, "o", color=PAPER, markeredgecolor=INPUT, markersize=15, zorder=4)
    axes.add_patch(Rectangle((2.95, -0.55), 6.85, 3.4, facecolor="none", edgecolor=GREY, linestyle="--"))
    repeated = f"{layers} such blocks, one after another" if layers > 1 else "one such block"
    axes.text(6.4, 3.05, repeated, ha="center", fontsize=10, fontweight="bold")
    axes.text(6.4, -0.42, "the residual stream: the blocks only add to it", ha="center", fontsize=8, color=INPUT)
    axes.set(xlim=(-0.5, 13.6), ylim=(-0.8, 3.4))
    axes.axis("off")
    head(figure, title)
    return figure


def _heat_map(
    axes: Axes, values: ArrayLike, rows: Sequence[str], columns: Sequence[str], most: float, colors: str
) -> None:
    """Numbers as colours, and written into their cells; what is -inf is grey."""
    matrix = np.asarray(values, dtype=float)
    hidden = np.isneginf(matrix)
    low = 0.0 if colors == "Blues" else -most
    axes.set_facecolor(HIDDEN)
    axes.imshow(matrix, cmap=colors, vmin=low, vmax=most, interpolation="nearest")
    for (row, column), value in np.ndenumerate(matrix):
        text = "-∞" if hidden[row, column] else f"{value:.2f}".removeprefix("-0.00").strip() or "0.00"
        ink = "white" if not hidden[row, column] and abs(value) > 0.7 * most else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(matrix.shape[1]), _texts(columns))
    axes.set_yticks(range(matrix.shape[0]), _texts(rows))
    axes.tick_params(labelsize=9)
    bare(axes)


def _texts(labels: Sequence[str]) -> list[str]:
    return [figure_text(label) for label in labels]


@styled
def attention_steps(steps: Mapping[str, ArrayLike], labels: Sequence[str], title: str) -> Figure:
    """Attention by hand, a heat map for each step with its numbers in the cells.

    Args:
        steps: name -> (time, time) or (time, head_dim); -inf is what the mask hides.
        labels: the token at each position.
        title: what to see.
    """
    figure, panels = new_figure(2.25 * len(steps), 2.9, 1, len(steps))
    for axes, (name, values) in zip(panels, steps.items(), strict=True):
        matrix = np.asarray(values, dtype=float)
        square = matrix.shape[0] == matrix.shape[1] == len(labels)
        shares = square and bool(np.allclose(matrix.sum(1), 1)) and bool((matrix >= 0).all())
        columns = labels if square else [str(number + 1) for number in range(matrix.shape[1])]
        finite = np.abs(matrix[np.isfinite(matrix)])
        _heat_map(
            axes,
            matrix,
            labels,
            columns,
            1.0 if shares else float(finite.max()) or 1.0,
            "Blues" if shares else "PuOr_r",
        )
        axes.set_title(figure_text(name), fontsize=10)
        axes.set_xlabel("token looked at" if square else "number of the value", fontsize=8)
    panels[0].set_ylabel("token that looks", fontsize=8)
    head(figure, title)
    return figure


@styled
def score_spread(scores: Mapping[int, Tensor], title: str) -> Figure:
    """What softmax makes of one query's scores, as they are (above) and divided by √d (below).

    Args:
        scores: d -> (queries, keys) products q·k. The bars are of the first query, the numbers of all.
        title: what to see.
    """
    figure, panels = new_figure(9.5, 4.2, 2, len(scores))
    for column, (d, raw) in enumerate(scores.items()):
        for row, (values, name) in enumerate(((raw, "q·k"), (raw / d**0.5, "q·k / √d"))):
            axes, weights = panels[row * len(scores) + column], values.softmax(-1)
            axes.bar(range(values.shape[1]), weights[0], color=(ORANGE, BLUE)[row])
            axes.set(ylim=(0, 1.15), xticks=[], yticks=[0, 0.25, 0.5, 0.75, 1])
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            largest = weights.max(-1).values.mean()
            axes.set_title(f"d = {d}: {name} spreads by {values.std():.1f}", fontsize=9)
            axes.text(
                0.98, 0.93, f"largest of a query: {largest:.0%}", transform=axes.transAxes, ha="right", fontsize=8
            )
    panels[0].set_ylabel("attention, not divided", fontsize=9)
    panels[len(scores)].set_ylabel("attention, divided", fontsize=9)
    for axes in panels[len(scores) :]:
        axes.set_xlabel(f"{next(iter(scores.values())).shape[1]} keys", fontsize=9)
    head(figure, title)
    return figure


@styled
def rope(
    cos: Tensor, sin: Tensor, pairs: Sequence[int], curves: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str
) -> Figure:
    """Pairs as arrows that turn with the position, and the score of a query against keys by their distance.

    Args:
        cos, sin: the model's rotary table, (positions, pairs).
        pairs: those to draw.
        curves: name -> distances and scores. The first is a line, the others are points on it.
        title: what to see.
    """
    figure = Picture(figsize=(10, 3.3), layout="constrained", dpi=100)
    panels = list(figure.subplots(1, len(pairs) + 1, width_ratios=[1] * len(pairs) + [1.9]))
    for axes, pair in zip(panels, pairs, strict=False):
        for position in range(8):
            x, y = float(cos[position, pair]), float(sin[position, pair])
            arrow = {"arrowstyle": "-|>", "color": QUERY, "alpha": 0.35 + 0.08 * position}
            axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
            axes.text(1.17 * x, 1.17 * y, str(position), ha="center", va="center", fontsize=8)
        axes.add_patch(Circle((0, 0), 1, facecolor="none", edgecolor=HIDDEN))
        turn = np.degrees(np.arctan2(float(sin[1, pair]), float(cos[1, pair])))
        axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(False)
        axes.set_xlabel(f"pair {pair}: {turn:.0f}° a position", fontsize=10)
    for number, (name, (distances, scores)) in enumerate(curves.items()):
        look = (
            {"color": BLUE} if number == 0 else {"color": TARGET, "marker": "o", "linestyle": "none", "markersize": 4}
        )
        panels[-1].plot(np.asarray(distances), np.asarray(scores), label=figure_text(name), **look)
    panels[-1].legend(fontsize=8)
    name_axes(panels[-1], "", "distance of the key (positions back)", "score q·k")
    head(figure, title)
    return figure


@styled
def norm_and_gate(before: Tensor, after: Tensor, title: str) -> Figure:
    """RMSNorm on one token's numbers, before and after, and the curve of SwiGLU's gate.

    Args:
        before: (dim,) the stream at one token.
        after: (dim,) what RMSNorm makes of it.
        title: what to see.
    """
    figure, [left, right] = new_figure(10, 3.0, 1, 2)
    sizes = [float(values.square().mean().sqrt()) for values in (before, after)]
    places = np.arange(len(before))
    left.bar(places, after.numpy(), color=SKY, width=1.0, label=f"after: root mean square {sizes[1]:.2f}")
    left.bar(places, before.numpy(), color=PURPLE, width=1.0, label=f"before: {sizes[0]:.2f}")
    left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    name_axes(left, "", "number of the stream", "value")
    x = torch.linspace(-5, 5, 200)
    right.plot(x, nn.functional.silu(x), color=GREEN, linewidth=2, label="silu(a) = a / (1 + exp(-a))")
    right.plot(x, x.relu(), color=GREY, linestyle="--", label="max(a, 0), for comparison")
    right.legend(fontsize=8)
    name_axes(right, "", "a, a number of w1 x", "silu(a), the gate")
    head(figure, title)
    return figure


def _head_map(axes: Axes, weights: ArrayLike, labels: Sequence[str], size: float) -> None:
    axes.imshow(np.asarray(weights), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.set_xticks(range(len(labels)), _texts(labels), fontsize=size)
    axes.set_yticks(range(len(labels)), _texts(labels), fontsize=size)


@styled
def attention_maps(weights: ArrayLike, labels: Sequence[str], title: str) -> Figure:
    """Every head's attention pattern, a row for each layer: which token (down) looks at which (across).

    Args:
        weights: (layers, heads, time, time).
        labels: the token at each position.
        title: what to see.
    """
    patterns = np.asarray(weights)
    layers, heads = patterns.shape[:2]
    figure, axes = new_figure(2.9 * heads, 3.1 * layers + 0.4, layers, heads)
    for index, axis in enumerate(axes):
        layer, head = divmod(index, heads)
        _head_map(axis, patterns[layer, head], labels, 6)
        axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
        if head == 0:
            axis.set_ylabel("token that looks", fontsize=8)
        if layer == layers - 1:
            axis.set_xlabel("token looked at", fontsize=8)
    figure.suptitle(figure_text(title), fontweight="bold", fontsize=11)
    return figure


@styled
def attention_moments(moments: Mapping[str, ArrayLike], labels: Sequence[str], title: str) -> Figure:
    """One head at several moments of its training: name of the moment -> (time, time) weights."""
    figure, panels = new_figure(3.6 * len(moments), 4.3, 1, len(moments))
    for axes, (name, weights) in zip(panels, moments.items(), strict=True):
        _head_map(axes, weights, labels, 7)
        axes.tick_params(length=0)
        axes.set_title(figure_text(name), fontsize=10)
        axes.set_xlabel("token looked at", fontsize=8)
    panels[0].set_ylabel("token that looks", fontsize=8)
    head(figure, title)
    return figure


@styled
def attention_head(weights: ArrayLike, labels: Sequence[str], shift: int, title: str) -> Figure:
    """One head large: the separator's column and the anti-diagonal of a reversal marked, with a scale.

    Args:
        weights: (time, time).
        labels: begin, the string, "|", the reversed string.
        shift: places that the head looks to the right of the character that is copied next.
        title: what to see.
    """
    n = list(labels).index("|") - 1
    figure, [axes] = new_figure(8, 7)
    _head_map(axes, weights, labels, 10)
    axes.tick_params(length=0)
    bar = figure.colorbar(axes.images[0], ax=axes, fraction=0.04, pad=0.02, label="share of the attention")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    for place in range(shift, n):
        corner = (n - place + shift - 0.5, n + 0.5 + place)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor=TARGET, linewidth=1.4))
    axes.add_patch(Rectangle((n + 0.5, n + 0.5), 1, n + 1, facecolor="none", edgecolor=ORANGE, linewidth=2))
    handles = [
        Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=TARGET, label="the anti-diagonal"),
        Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=ORANGE, label="the column of the separator |"),
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=10)
    axes.set(xlabel="token looked at", ylabel="token that looks")
    head(figure, title)
    return figure


@styled
def accuracy_by_place(shares: Mapping[str, ArrayLike], title: str) -> Figure:
    """Share of right characters at each place of the answer: name of the moment -> (places,)."""
    figure, [axes] = new_figure(8, 3.2)
    for name, values in shares.items():
        right = np.asarray(values)
        axes.plot(np.arange(1, len(right) + 1), right, marker=".", label=figure_text(name, LABEL))
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    name_axes(axes, title, "place in the answer", "characters that are right")
    return figure
