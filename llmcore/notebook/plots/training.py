"""Pictures of a training step: formats of numbers, what is kept for the backward pass, what Muon does to a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from llmcore.notebook.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    figure_text,
    head,
    name_axes,
    new_figure,
    styled,
)

# A block's operations in order: the name, whether it is a matrix product, whether its result is needed to go back.
BLOCK = (
    ("block's\ninput", False, True),
    ("norm", False, True),
    ("wq wk wv", True, True),
    ("RoPE", False, True),
    ("attention", False, True),
    ("wo", True, False),
    ("add", False, True),
    ("norm", False, True),
    ("w1 w3", True, True),
    ("silu\n× gate", False, True),
    ("w2", True, False),
)


def format_bits(dtype: torch.dtype) -> tuple[int, int, int]:
    """Bits of a floating-point format: sign, exponent, mantissa."""
    info = torch.finfo(dtype)
    mantissa = round(-np.log2(info.eps))  # eps is the gap between 1 and the next number
    return 1, info.bits - 1 - mantissa, mantissa


@styled
def number_formats(formats: Mapping[str, torch.dtype], title: str) -> Figure:
    """The bits of floating-point formats as boxes, with the range and the gap between neighbours that follow."""
    figure, [axes] = new_figure(10, 0.9 + 0.75 * len(formats))
    for row, (name, dtype) in enumerate(formats.items()):
        info, place = torch.finfo(dtype), 0
        for count, color, part in zip(
            format_bits(dtype), (RED, ORANGE, BLUE), ("±", "exponent", "mantissa"), strict=True
        ):
            for bit in range(place, place + count):
                axes.add_patch(Rectangle((bit + 0.05, row + 0.2), 0.9, 0.45, color=color, linewidth=0))
            axes.text(place + count / 2, row + 0.8, f"{part} {count}", ha="center", va="center", fontsize=8)
            place += count
        note = f"largest {info.max:.2g}   smallest {info.tiny:.1g}   next after 1: 1 + {info.eps:.2g}"
        axes.text(33, row + 0.42, note, va="center", fontsize=10)
        axes.text(-0.7, row + 0.42, figure_text(name), ha="right", va="center", fontsize=11)
    axes.set(xlim=(-4, 60), ylim=(len(formats), 0))
    axes.axis("off")
    head(figure, title)
    return figure


def kept_by(policy: str, attention_kernel: bool) -> list[str]:
    """For each of `BLOCK`: "kept" for the backward pass, "again" (computed again there) or "not needed"."""
    states = []
    for number, (name, product, needed) in enumerate(BLOCK):
        slow = product or (name == "attention" and attention_kernel)
        kept = {"none": needed, "selective": number == 0 or slow, "full": number == 0}[policy]
        states.append("kept" if kept else "again" if needed and policy != "none" else "not needed")
    return states


@styled
def kept_and_again(megabytes: Mapping[str, float], attention_kernel: bool, title: str) -> Figure:
    """A block's operations, a row for each policy: which results stay in memory, and which are computed again.

    Args:
        megabytes: by policy of activation checkpointing, what all blocks keep in a step.
        attention_kernel: whether attention is one operation of torch (with short windows on a CPU it is spelled out).
        title: what to see.
    """
    figure, [axes] = new_figure(10, 1.3 + 0.62 * len(megabytes))
    for row, (policy, size) in enumerate(megabytes.items()):
        for column, state in enumerate(kept_by(policy, attention_kernel)):
            box = Rectangle((column + 0.06, row + 0.14), 0.88, 0.66, linewidth=1, edgecolor=GREY, facecolor="none")
            if state == "kept":
                box.set(facecolor=GREEN, edgecolor=GREEN)
            elif state == "again":
                box.set(hatch="////", edgecolor=ORANGE)
            axes.add_patch(box)
        axes.text(-0.15, row + 0.47, policy, ha="right", va="center", fontsize=11)
        axes.text(len(BLOCK) + 0.15, row + 0.47, f"{size:,.0f} MB kept", va="center", fontsize=10)
    for column, (name, _, _) in enumerate(BLOCK):
        axes.text(column + 0.5, -0.08, name, ha="center", va="bottom", fontsize=9)

    axes.set(xlim=(-1.4, len(BLOCK) + 1.9), ylim=(len(megabytes), -0.6))
    axes.axis("off")
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=GREEN, label="kept for the backward pass"),
        Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=ORANGE, hatch="////", label="computed again"),
        Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=GREY, label="not needed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    head(figure, title)
    return figure


@styled
def singular_values(matrices: Mapping[str, ArrayLike], title: str) -> Figure:
    """The singular values of matrices, the largest first, each divided by the matrix's largest."""
    figure, [axes] = new_figure(7, 3.2)
    for (name, matrix), color, line in zip(matrices.items(), (RED, BLUE, GREEN), ("--", "-", ":"), strict=False):
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        axes.plot(np.arange(1, len(values) + 1), values / values[0], line, color=color, label=figure_text(name))
    axes.set_ylim(0, 1.05)
    axes.legend()
    name_axes(axes, "", "singular value, the largest first", "size, the largest is 1")
    head(figure, title)
    return figure


@styled
def stacked(parts: Mapping[str, float], unit: str, title: str) -> Figure:
    """A whole as one bar of its parts, each with its name and size."""
    figure, [axes] = new_figure(10, 1.5)
    place, whole = 0.0, sum(parts.values())
    colors: Sequence[str] = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
    for number, (name, size) in enumerate(parts.items()):
        label = f"{figure_text(name)}: {size:,.0f} {unit}"
        axes.barh(0, size, left=place, color=colors[number % len(colors)], label=label)
        place += size
    axes.set_xlim(0, whole)
    axes.set_yticks([])
    axes.grid(False)
    figure.legend(loc="outside lower center", ncols=3)
    name_axes(axes, "", f"{unit}, {whole:,.0f} in all", "")
    head(figure, title)
    return figure
