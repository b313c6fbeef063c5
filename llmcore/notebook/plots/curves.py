"""Figures of training: losses, costs, memory and laws. Each function takes data and returns a matplotlib Figure."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from llmcore.files import one_line, resolve
from llmcore.measure.compare_runs import validations
from llmcore.notebook.plots.style import (
    BLUE,
    GREEN,
    GREY,
    LABEL,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Picture,
    cells,
    figure_text,
    head,
    name_axes,
    new_figure,
    styled,
)


@styled
def memory_against_batch(
    predicted: Mapping[str, Mapping[int, float]], measured: Mapping[str, Mapping[int, float]], title: str
) -> Figure:
    """Bytes at the moment of a step that needs most, by policy of activation checkpointing and batch size.

    Args:
        predicted: policy -> batch size -> bytes; a line for each policy.
        measured: the same, drawn as points in the line's colour.
        title: the finding.
    """
    figure, [axes] = new_figure(7, 3.4)
    for (policy, line), color, marker in zip(predicted.items(), (BLUE, ORANGE, GREEN), "os^", strict=False):
        axes.plot(list(line), [size / 1e6 for size in line.values()], color=color, label=f"{policy}, predicted")
        if points := measured.get(policy):
            sizes = [size / 1e6 for size in points.values()]
            axes.plot(list(points), sizes, marker, color=color, markersize=7, label=f"{policy}, measured")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    name_axes(axes, title, "batch size (windows per forward pass)", "memory (MB)")
    return figure


@styled
def training_curves(
    events: Sequence[Mapping[str, Any]],
    title: str = "",
    metric: str = "val_loss",
    metric_label: str = "validation loss (nats per token)",
    log_x: bool = False,
) -> Figure:
    """Loss, learning rate, gradient norm and speed of a run, from the trainer's events.

    Args:
        events: one a step, as in `metrics.jsonl`.
        title: of the whole picture.
        metric: what to draw beside the training loss: "val_loss", or "exact_match", which gets its own axis.
        metric_label: its name and unit.
        log_x: draw steps on a logarithmic axis, which gives the early steps more room.
    """
    figure = Picture(figsize=(10, 4.6), dpi=100)
    # margins by hand: a layout engine would take most of a live drawing's time
    gap = 0.42 if metric == "val_loss" else 0.7  # the second axis needs room
    figure.subplots_adjust(left=0.065, right=0.985, top=0.86, bottom=0.11, wspace=gap, hspace=0.25)
    axes = figure.subplot_mosaic([["loss", "loss", "rate"], ["loss", "loss", "norm"], ["loss", "loss", "speed"]])
    events = list(events)
    drawn = events[:: max(1, len(events) // 2000)]

    _draw_losses(axes["loss"], events, drawn, metric, metric_label)
    name_axes(axes["loss"], "", "optimizer step", "loss (nats per token)")
    axes["loss"].set_title(figure_text(title), pad=20)  # above the legend
    _draw_small_panels(axes["rate"], axes["norm"], axes["speed"], drawn)
    if log_x:
        for panel in figure.axes:
            panel.set_xscale("log")
        axes["loss"].set_xlabel("optimizer step (log scale)")
    return figure


def _series(events: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([event[name] for event in events], dtype=float)


def _draw_losses(
    axes: Axes,
    events: Sequence[Mapping[str, Any]],
    drawn: Sequence[Mapping[str, Any]],
    metric: str,
    metric_label: str,
) -> None:
    """Training loss, the metric of the validations, and marks for skipped steps.

    Args:
        axes: to draw into.
        events: all of the run.
        drawn: those whose training loss is drawn.
        metric, metric_label: as in `training_curves`.
    """
    steps, loss = _series(drawn, "step"), _series(drawn, "loss")
    axes.plot(steps, loss, color=SKY, linewidth=0.8, alpha=0.7, label="training, each step")
    if len(loss) > 20:
        axes.plot(steps, smoothed(loss, len(loss) // 50), color=BLUE, linewidth=2, label="training, smoothed")
    finite = loss[np.isfinite(loss)]

    # validations, on the same axis or, as a share, on another one
    metric_axes = axes
    if metric != "val_loss":
        metric_axes = axes.twinx()
        metric_axes.set(ylabel=metric_label, ylim=(0, 1.03))
        metric_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        metric_axes.grid(False)
        metric_axes.spines["right"].set_visible(True)
    points = [(event["step"], event[metric]) for event in events if metric in event]
    if points:
        step, value = points[-1]
        label = f"{metric_label}: {value:{'.4g' if metric == 'val_loss' else '.2%'}}"
        label += f" at step {step:,}" if step != events[-1]["step"] else ""
        metric_axes.plot(*zip(*points, strict=True), color=RED, marker="o", markersize=4, label=label)
    if len(finite):
        axes.set_ylim(min(0.0, finite.min()) if finite.min() < 1 else finite.min() * 0.95, finite.max() * 1.02)

    # skipped steps, at the upper edge
    counts = [(event["step"], event.get("skipped", 0)) for event in events]
    skipped = [step for (_, before), (step, now) in itertools.pairwise(counts) if now > before]
    if skipped:
        edge = axes.get_xaxis_transform()  # x in steps, y as a share of the height
        axes.plot(skipped, np.full(len(skipped), 0.985), "kx", transform=edge, label=f"skipped: {len(skipped)}")

    # above the axes, so that no curve is covered
    lines = [*axes.get_lines(), *(metric_axes.get_lines() if metric_axes is not axes else [])]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(handles=lines, ncols=len(lines), fontsize=8, columnspacing=1.2, handlelength=1.5, **place)


def _draw_small_panels(rate: Axes, norm: Axes, speed: Axes, events: Sequence[Mapping[str, Any]]) -> None:
    """Learning rate, gradient norm and speed. Outliers of the last two do not set the scale."""
    steps = _series(events, "step")
    for axes, name, label, color in (
        (rate, "learning_rate", "learning rate", GREEN),
        (norm, "grad_norm", "gradient norm", PURPLE),
        (speed, "tokens_per_second", "tokens per second", GREY),
    ):
        axes.plot(steps, _series(events, name), color=color, linewidth=1.2)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=8, labelbottom=axes is speed)
    speed.yaxis.set_major_formatter(EngFormatter(sep=" "))
    speed.set_xlabel("optimizer step", fontsize=8)
    if events:
        norms, finite = _series(events, "grad_norm"), np.isfinite(_series(events, "loss")).any()
        norm.set_ylim(0, 1.2 * float(np.nanpercentile(norms[np.isfinite(norms)], 98)) if finite else None)
        speed.set_ylim(0, 1.2 * float(np.percentile(_series(events, "tokens_per_second"), 98)))


COSTS = {  # key of `compare_runs.validations` -> label of its axis
    "steps": "optimizer steps",
    "tokens": "tokens read",
    "seconds": "minutes spent in steps",
    "flops": "compute (FLOPs)",
}


@styled
def compare_runs(run_dirs: Sequence[str | os.PathLike[str]], title: str = "") -> Figure:
    """Validation loss of several runs against steps, tokens, time and compute.

    A panel for each of these, but none that would show the curves of another one at another scale.

    In bits per byte if every run has them, so that runs with different vocabularies compare; else in nats per token.
    Runs differ in colour, marker and dashes. Runs without a validation, or unreadable, are only named in the title.

    Args:
        run_dirs: folders of runs, as from `measure.compare_runs.find_runs`.
        title: what to see; empty: which run ends lowest.
    """
    drawn: list[tuple[str, list[dict[str, float]]]] = []
    left_out: dict[str, list[str]] = {"not validated yet": [], "unreadable": []}
    for folder in map(resolve, run_dirs):
        name = one_line(folder.name)
        try:
            points = validations(folder)
        except (OSError, ValueError):
            left_out["unreadable"].append(name)
            continue
        if points:
            drawn.append((name, points))
        else:
            left_out["not validated yet"].append(name)
    in_bits = all("val_bits_per_byte" in point for _, points in drawn for point in points)
    measure, unit = ("val_bits_per_byte", "bits per byte") if in_bits else ("val_loss", "nats per token")

    costs = _telling_costs([points for _, points in drawn])
    columns = min(2, len(costs))
    rows = -(-len(costs) // columns)
    figure, panels = new_figure(10, 0.4 + 3 * rows, rows, columns)
    for axes in panels[len(costs) :]:
        axes.set_visible(False)
    for axes, cost in zip(panels, costs, strict=False):
        unit_of_cost = 60 if cost == "seconds" else 1
        for number, (name, points) in enumerate(drawn):
            axes.plot(
                [point[cost] / unit_of_cost for point in points],
                [point[measure] for point in points],
                marker="os^Dv*"[number % 6],
                linestyle=("-", "--", "-.", ":")[number // 6 % 4],
                markersize=4,
                label=figure_text(name, LABEL),
            )
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlim(left=0)
        name_axes(axes, "", COSTS[cost], f"validation ({unit})")

    if drawn:
        widest = max(cells(figure_text(name, LABEL)) for name, _ in drawn)
        columns = max(1, min(4, 120 // (widest + 8)))  # about 120 letters fit side by side
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    title = title or _lowest(drawn, measure, unit)
    for reason, names in left_out.items():
        if names:
            title += f" ({reason}: {', '.join(names)})"
    head(figure, title)
    return figure


def _telling_costs(runs: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    """Those of `COSTS` whose panels differ: runs that end in about the same ratio of two costs need only one."""
    telling: list[str] = []
    for cost in COSTS:
        ratios = [[points[-1][cost] / (points[-1][other] or 1) for points in runs] for other in telling]
        if not telling or (runs and all(max(each) > 1.2 * min(each) for each in ratios)):
            telling.append(cost)
    return telling


def _lowest(runs: Sequence[tuple[str, Sequence[Mapping[str, float]]]], measure: str, unit: str) -> str:
    """A title that names the run with the lowest last validation."""
    if not runs:
        return "No run has been validated yet"
    end, name = min((points[-1][measure], name) for name, points in runs)
    return f"{name} ends{f' lowest of {len(runs)} runs,' if len(runs) > 1 else ''} at {end:.3f} {unit}"


@styled
def isoflop_curves(
    curves: Mapping[float, tuple[Sequence[float], Sequence[float]]],
    title: str,
    optima: Mapping[float, float] | None = None,
    notes: Mapping[float, Sequence[str]] | None = None,
) -> Figure:
    """Loss against parameters, one curve for each compute budget, with the parabola in log N that fits best.

    Args:
        curves: FLOPs of a run -> parameters and losses (nats per token) of the runs that cost so much.
        title: what to see.
        optima: FLOPs -> parameters that a fitted law would choose; drawn as vertical lines.
        notes: FLOPs -> a word for each run, written above its point.
    """
    figure, [axes] = new_figure(8, 4.2)
    for number, (flops, (parameters, losses)) in enumerate(sorted(curves.items())):
        [runs] = axes.plot(parameters, losses, "os^Dv*"[number % 6], label=f"{flops:.2g} FLOPs")
        if len(parameters) >= 3:
            parabola = np.polynomial.Polynomial.fit(np.log(parameters), losses, 2)
            places = np.geomspace(min(parameters), max(parameters), 100)
            axes.plot(places, parabola(np.log(places)), color=runs.get_color(), linewidth=1.2)
        for place, loss, note in zip(parameters, losses, (notes or {}).get(flops, ()), strict=False):
            text = figure_text(note, LABEL)
            axes.annotate(text, (place, loss), (0, 9), textcoords="offset points", ha="center", fontsize=9)
        if optima and flops in optima:
            axes.axvline(optima[flops], color=runs.get_color(), linestyle=":", label="the law's choice for it")
    axes.set_xscale("log")
    sizes = sorted({size for parameters, _ in curves.values() for size in parameters})
    axes.set_xticks(
        sizes, [f"{size / 1e3:,.0f}k" if size < 1e6 else f"{size / 1e6:,.1f}M" for size in sizes], fontsize=8
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08, y=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    name_axes(axes, title, "parameters (log scale)", "validation loss (nats per token)")
    return figure


@styled
def scaling_fit(
    measured: ArrayLike,
    fitted: ArrayLike,
    flops: ArrayLike,
    title: str,
    held_back: Mapping[str, float] | None = None,
    outcomes: ArrayLike = (),
) -> Figure:
    """Loss against compute, and measured against fitted loss; a held-back run with its predicted band in both.

    Args:
        measured: losses of the runs that were fitted, nats per token, (runs,).
        fitted: losses of the same runs by the law, (runs,).
        flops: what each run cost, (runs,).
        title: what to see.
        held_back: flops, predicted, low and high of a run that was not fitted.
        outcomes: losses of this run, one for each seed.
    """
    figure, [left, right] = new_figure(10, 4.2, 1, 2)
    left.plot(flops, measured, "o", color=BLUE, label="runs, measured")
    left.plot(flops, fitted, "x", color=ORANGE, label="runs, by the law")
    right.plot(fitted, measured, "o", color=BLUE)
    ends = [*np.atleast_1d(measured), *np.atleast_1d(fitted)]

    if held_back:
        place, middle = held_back["flops"], held_back["predicted"]
        reach = [[middle - held_back["low"]], [held_back["high"] - middle]]
        for axes, x in ((left, place), (right, middle)):
            axes.errorbar(
                x, middle, reach, color=RED, capsize=4, marker="_", label="held back, predicted with its band"
            )
            stars = np.atleast_1d(outcomes)
            axes.plot([x] * len(stars), stars, "*", color=PURPLE, markersize=9, label="held back, measured")
        ends += [middle, *np.atleast_1d(outcomes)]

    right.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, linestyle="--", linewidth=1)
    left.set_xscale("log")
    left.legend()
    name_axes(left, "", "compute (FLOPs, log scale)", "validation loss (nats per token)")
    name_axes(right, "", "by the law (nats per token)", "measured (nats per token)")
    head(figure, title)
    return figure


@styled
def prediction_bands(
    rows: Mapping[str, tuple[tuple[float, float, float], Sequence[float]]], title: str, unit: str = "nats per token"
) -> Figure:
    """A row for each prediction: its band, and what was measured as points, which are red outside the band.

    Args:
        rows: name -> prediction, lower and upper end; and the losses of the runs that were predicted.
        title: what to see.
        unit: of all of them.
    """
    figure, [axes] = new_figure(8, 1.5 + 0.32 * len(rows))
    for place, ((middle, low, high), measured) in enumerate(rows.values()):
        axes.plot([low, high], [place, place], color=SKY, linewidth=9, alpha=0.45, solid_capstyle="butt")
        axes.plot(middle, place, "|", color=BLUE, markersize=13, markeredgewidth=2)
        for loss in measured:
            inside = low <= loss <= high
            axes.plot(loss, place, "o" if inside else "D", color=GREEN if inside else RED, markersize=6)
    axes.set_yticks(range(len(rows)), [figure_text(name, LABEL) for name in rows])
    axes.invert_yaxis()
    axes.margins(y=0.6 / len(rows))
    axes.grid(axis="y", visible=False)

    # the key needs no points of its own
    drawn = [("s", SKY, "band"), ("|", BLUE, "predicted"), ("o", GREEN, "measured, inside"), ("D", RED, "outside")]
    for marker, color, label in drawn:
        axes.plot([], [], marker, color=color, label=label)
    figure.legend(loc="outside lower left", ncols=4)
    name_axes(axes, "", f"validation loss ({unit})", "")
    head(figure, title)
    return figure


def smoothed(values: ArrayLike, span: int) -> NDArray[np.float64]:
    """Mean of the finite values up to `span` places before and after each one.

    Near an end the window is as short on its other side, so that the mean never lags behind a loss that falls.
    """
    given = np.asarray(values, dtype=float)
    finite = np.isfinite(given)
    total, count = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(finite, given, 0.0), finite))
    place = np.arange(len(given))
    reach = np.minimum(np.minimum(place, len(given) - 1 - place), span)
    first, end = place - reach, place + reach + 1
    with np.errstate(invalid="ignore"):  # no finite value near: the mean is NaN
        return (total[end] - total[first]) / (count[end] - count[first])
