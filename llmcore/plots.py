"""Figures: each function takes data and returns a matplotlib Figure, in one style, with Chinese glyphs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike
from PIL import Image

from llmcore.evaluate import Evaluation
from llmcore.markup import visible
from llmcore.runs import summarize, validations

P = ParamSpec("P")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#666666"
SYSTEM_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "SimHei",
)


class Picture(Figure):
    """A Figure that shows itself in a notebook: crisp on fine screens, with its titles for those who cannot see it."""

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = (round(inches * self.dpi) for inches in self.get_size_inches())
        said = [self.get_suptitle(), *(axes.get_title(loc="left") for axes in self.axes)]
        words = "; ".join(part for part in said if part) or "picture"
        return (
            {"image/png": png(self), "text/plain": f"<picture: {words}>"},
            {"image/png": {"width": width, "height": height, "alt": words}},
        )


def png(figure: Figure, live: bool = False) -> bytes:
    """A figure as PNG: twice as fine as the screen and in 256 colours, or, for a live view, as fast as can be."""
    buffer = io.BytesIO()
    if live:
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
        return buffer.getvalue()
    figure.savefig(buffer, format="png", dpi=2 * figure.dpi, facecolor="white")
    few = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


@functools.cache
def chinese_font() -> str | None:
    """Name of a font with Chinese glyphs: the one installed as a package, else one of the system's."""
    try:
        file = importlib.resources.files("pylopdf_fonts_zh_cn") / "NotoSansSC-Regular.otf"
        font_manager.fontManager.addfont(str(file))
        regular = font_manager.fontManager.ttflist[-1]
        # only the regular weight is packaged: let it stand for the bold one too, lest each bold title warn
        font_manager.fontManager.ttflist.append(dataclasses.replace(regular, weight=700))
        return regular.name
    except (ModuleNotFoundError, FileNotFoundError):
        installed = {font.name for font in font_manager.fontManager.ttflist}
        found = next((name for name in SYSTEM_FONTS if name in installed), None)
        if found is None:
            warnings.warn("no font with Chinese glyphs: pip install pylopdf-fonts-zh-cn", stacklevel=2)
        return found


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with the workbook's style, and leave the caller's settings alone."""

    @functools.wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        chinese = chinese_font()
        style: Any = {
            "font.family": ["DejaVu Sans", *([chinese] if chinese else [])],
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "figure.facecolor": "white",
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
        }
        with matplotlib.rc_context(style):
            return function(*args, **kwargs)

    return draw


def plain(text: str) -> str:
    """Text from outside as a label: no formula begins at a dollar sign, no control character is left."""
    return visible(text).replace("$", r"\$")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Picture(figsize=(width, height), layout="constrained", dpi=100)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).ravel())


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)


@styled
def length_histogram(lengths: Sequence[int], unit: str, title: str) -> Figure:
    """How long the documents are, with the median marked."""
    figure, [axes] = _figure(7, 2.8)
    axes.hist(lengths, bins=min(30, max(5, len(lengths) // 3)), color=BLUE)
    median = float(np.median(lengths))
    axes.axvline(median, color=RED, linestyle="--", label=f"median {median:,.0f}")
    axes.legend()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, title, f"length of a document ({unit})", "documents")
    return figure


@styled
def memory_against_batch(
    predicted: Mapping[str, Mapping[int, float]], measured: Mapping[str, Mapping[int, float]], title: str
) -> Figure:
    """Bytes at the fullest moment of a step, by policy of activation checkpointing and batch size.

    Args:
        predicted: policy -> batch size -> bytes: a line each.
        measured: the same, drawn as points of the line's colour.
        title: the finding.
    """
    figure, [axes] = _figure(7, 3.4)
    for (policy, line), color, marker in zip(predicted.items(), (BLUE, ORANGE, GREEN), "os^", strict=False):
        axes.plot(list(line), [size / 1e6 for size in line.values()], color=color, label=f"{policy}, predicted")
        points = measured.get(policy, {})
        if points:
            axes.plot(
                list(points),
                [size / 1e6 for size in points.values()],
                marker,
                color=color,
                markersize=7,
                label=f"{policy}, measured",
            )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    _label(axes, title, "batch size (windows per forward pass)", "memory (MB)")
    return figure


@styled
def piece_lengths(counts: Mapping[int, int], title: str) -> Figure:
    """How many pieces of the vocabulary have how many characters."""
    figure, [axes] = _figure(7, 2.8)
    lengths = sorted(counts)
    bars = axes.bar([str(n) for n in lengths], [counts[n] for n in lengths], color=BLUE)
    axes.bar_label(bars, [f"{counts[n]:,}" for n in lengths], fontsize=9)
    axes.margins(y=0.15)
    _label(axes, title, "characters in a piece", "pieces")
    return figure


@styled
def compression(
    vocab_sizes: Sequence[int], characters_per_token: Sequence[float], title: str, chosen: int | None = None
) -> Figure:
    """Characters per token against vocabulary size."""
    figure, [axes] = _figure(7, 3.2)
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
    _label(axes, title, "vocabulary size (pieces, log scale)", "characters per token")
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
        axes.text(x + width / 2, -line - 0.43, plain(piece), ha="center", va="center", color="black", fontsize=11)
    axes.set(xlim=(0, columns), ylim=(-(boxes[-1][1] + 1) if boxes else -1, 0.1))
    axes.set_title(title)
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
    figure, [axes] = _figure(7, 3.4)
    axes.loglog(ranks, ordered, color=BLUE, linewidth=2, label="tokens of this corpus")
    middle = len(ordered) // 10
    axes.loglog(
        ranks, ordered[middle] * (middle + 1) / ranks, color=RED, linestyle="--", label="Zipf: count ∝ 1 / rank"
    )
    axes.legend()
    _label(axes, title, "rank of the token (log scale)", "occurrences (log scale)")
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
        metric: what to draw beside the training loss: "val_loss", or "exact_match", which gets an axis of its own.
        metric_label: its name and unit.
        log_x: draw steps on a logarithmic axis, which gives the early ones room.
    """
    figure = Picture(figsize=(10, 4.6), dpi=100)
    # margins by hand: a layout engine would take most of a live drawing's time
    gap = 0.42 if metric == "val_loss" else 0.7  # the second axis needs room
    figure.subplots_adjust(left=0.065, right=0.985, top=0.93, bottom=0.11, wspace=gap, hspace=0.25)
    axes = figure.subplot_mosaic([["loss", "loss", "rate"], ["loss", "loss", "norm"], ["loss", "loss", "speed"]])
    events = list(events)
    thin = events[:: max(1, len(events) // 2000)]
    steps = np.array([event["step"] for event in thin])

    def series(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([event[name] for event in thin], dtype=float)

    loss = series("loss") if thin else np.array([])
    axes["loss"].plot(steps, loss, color=SKY, linewidth=0.8, alpha=0.7, label="training, each step")
    if len(loss) > 20:
        axes["loss"].plot(steps, smoothed(loss, len(loss) / 50), color=BLUE, linewidth=2, label="training, smoothed")
    marked = [(event["step"], event[metric]) for event in events if metric in event]
    target = axes["loss"]
    if metric != "val_loss":
        target = axes["loss"].twinx()
        target.set(ylabel=metric_label, ylim=(0, 1.03))
        target.yaxis.set_major_formatter(PercentFormatter(1.0))
        target.grid(False)
        target.spines["right"].set_visible(True)
    if marked:
        label = f"{metric_label}: {marked[-1][1]:{'.4g' if metric == 'val_loss' else '.2%'}}"
        target.plot(*zip(*marked, strict=True), color=RED, marker="o", markersize=4, label=label)
    finite = loss[np.isfinite(loss)]
    if len(finite):
        axes["loss"].set_ylim(min(0.0, finite.min()) if finite.min() < 1 else finite.min() * 0.95, finite.max() * 1.02)
    counts = [(event["step"], event.get("skipped", 0)) for event in events]
    skipped = [step for (_, before), (step, now) in itertools.pairwise(counts) if now > before]
    if skipped:
        place = np.full(len(skipped), 0.985)
        down = axes["loss"].get_xaxis_transform()  # x in steps, y in heights of the axes
        axes["loss"].plot(skipped, place, "kx", transform=down, label=f"skipped: {len(skipped)}")
    lines = [*axes["loss"].get_lines(), *(target.get_lines() if target is not axes["loss"] else [])]
    frame: dict[str, Any] = {"frameon": True, "framealpha": 0.8, "edgecolor": "none"}  # readable over the curves
    axes["loss"].legend(handles=lines, loc="upper right" if metric == "val_loss" else "center right", **frame)
    _label(axes["loss"], title, "optimizer step", "loss (nats per token)")
    for name, key, label, color in (
        ("rate", "learning_rate", "learning rate", GREEN),
        ("norm", "grad_norm", "gradient norm", PURPLE),
        ("speed", "tokens_per_second", "tokens per second", GREY),
    ):
        axes[name].plot(steps, series(key) if thin else [], color=color, linewidth=1.2)
        axes[name].set_ylabel(label, fontsize=8)
        axes[name].tick_params(labelsize=8, labelbottom=name == "speed")
    axes["speed"].yaxis.set_major_formatter(EngFormatter(sep=" "))
    if thin:
        norm = series("grad_norm")
        axes["norm"].set_ylim(0, 1.2 * float(np.nanpercentile(norm[np.isfinite(norm)], 98)) if len(finite) else None)
        axes["speed"].set_ylim(0, 1.2 * float(np.percentile(series("tokens_per_second"), 98)))
    axes["speed"].set_xlabel("optimizer step", fontsize=8)
    if log_x:
        for each in figure.axes:
            each.set_xscale("log")
        axes["loss"].set_xlabel("optimizer step (log scale)")
    return figure


COSTS = {  # column of `runs.validations` -> what its axis says
    "steps": "optimizer steps",
    "tokens": "tokens read",
    "seconds": "seconds spent in steps",
    "flops": "compute (FLOPs)",
}


@styled
def compare_runs(run_dirs: Sequence[str | os.PathLike[str]], title: str = "") -> Figure:
    """Validation loss of several runs against steps, tokens, time and compute, one panel each.

    Bits per byte where every run has them, so that vocabularies compare; else nats per token. Runs differ in colour,
    marker and dashes. Those without a validation are left out, and named in the title.

    Args:
        run_dirs: folders of runs, as `runs.find_runs` finds them.
        title: what to see; empty: which run ends lowest.
    """
    names = [row["run"] for row in summarize(run_dirs)]
    runs = list(zip(names, map(validations, run_dirs), strict=True))
    silent = [name for name, found in runs if not found]
    drawn = [(name, found) for name, found in runs if found]
    in_bits = all("val_bits_per_byte" in point for _, found in drawn for point in found)
    measure, unit = ("val_bits_per_byte", "bits per byte") if in_bits else ("val_loss", "nats per token")
    figure, panels = _figure(10, 6.2, 2, 2)
    for axes, (cost, label) in zip(panels, COSTS.items(), strict=True):
        for number, (name, found) in enumerate(drawn):
            axes.plot(
                [point[cost] for point in found],
                [point[measure] for point in found],
                marker="os^Dv*"[number % 6],
                linestyle=("-", "--", "-.", ":")[number // 6 % 4],
                markersize=4,
                label=plain(name),
            )
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        _label(axes, "", label, f"validation ({unit})")
    if drawn:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        end, lowest = min((found[-1][measure], name) for name, found in drawn)
        words = f"{lowest} ends lowest of {len(drawn)} runs," if len(drawn) > 1 else f"{lowest} ends"
        title = title or f"{words} at {end:.3f} {unit}"
    else:
        title = title or "No run has been validated yet"
    if silent:
        title += f" (not validated yet: {', '.join(silent)})"
    figure.suptitle(plain(title), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


@styled
def isoflop_curves(
    curves: Mapping[float, tuple[Sequence[float], Sequence[float]]],
    title: str,
    optima: Mapping[float, float] | None = None,
) -> Figure:
    """Loss against parameters, one curve for each compute budget, with the parabola in log N that lies nearest.

    Args:
        curves: by FLOPs of a run: parameters and losses (nats per token) of the runs that spent them.
        title: what to see.
        optima: parameters that a fitted law would choose, by FLOPs; marked on the axis.
    """
    figure, [axes] = _figure(8, 4.2)
    for number, (flops, (parameters, losses)) in enumerate(sorted(curves.items())):
        [runs] = axes.plot(parameters, losses, "os^Dv*"[number % 6], label=f"{flops:.2g} FLOPs")
        if len(parameters) >= 3:
            parabola = np.polynomial.Polynomial.fit(np.log(parameters), losses, 2)
            places = np.geomspace(min(parameters), max(parameters), 100)
            axes.plot(places, parabola(np.log(places)), color=runs.get_color(), linewidth=1.2)
        if optima and flops in optima:
            axes.axvline(optima[flops], color=runs.get_color(), linestyle=":", label="the law's choice for it")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter("")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _label(axes, title, "parameters (log scale)", "validation loss (nats per token)")
    return figure


@styled
def scaling_fit(
    measured: ArrayLike, fitted: ArrayLike, flops: ArrayLike, title: str, held_back: Mapping[str, float] | None = None
) -> Figure:
    """Loss against compute, and measured against fitted loss; a held-back run with its predicted band in both.

    Args:
        measured: losses of the runs that were fitted, nats per token, (runs,).
        fitted: what the law says of them, (runs,).
        flops: what each had cost, (runs,).
        title: what to see.
        held_back: flops, measured, predicted, low and high of a run that was not fitted.
    """
    figure, [left, right] = _figure(10, 4.2, 1, 2)
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
            axes.plot(x, held_back["measured"], "*", color=RED, markersize=11, label="held back, measured")
        ends += [middle, held_back["measured"]]
    right.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, linestyle="--", linewidth=1)
    left.set_xscale("log")
    left.legend()
    _label(left, "", "compute (FLOPs, log scale)", "validation loss (nats per token)")
    _label(right, "", "by the law (nats per token)", "measured (nats per token)")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def smoothed(values: ArrayLike, span: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Exponential moving average over about `span` values, without the usual pull towards the first one."""
    keep = 1 - 1 / max(1.0, span)
    total = weight = 0.0
    out = []
    for value in np.asarray(values, dtype=float):
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight else math.nan)
    return np.array(out)


@styled
def bars(values: Mapping[str, float], title: str, unit: str, highlight: str | None = None) -> Figure:
    """A few named values beside each other, as horizontal bars."""
    figure, [axes] = _figure(7, 0.8 + 0.42 * len(values))
    drawn = axes.barh(
        list(values), list(values.values()), color=[RED if name == highlight else BLUE for name in values]
    )
    axes.bar_label(
        drawn, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values.values()], padding=4
    )
    axes.invert_yaxis()
    axes.margins(x=0.2)
    if max(values.values()) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", visible=False)
    _label(axes, "", unit, "")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)  # above the names too, which may be long
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
    figure, [axes] = _figure(8, 1.2 + 0.2 * len(evaluations) + 0.26 * (len(shown) + gap))
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
    _label(axes, "", "bits per byte (less is better)", "")
    figure.legend(loc="outside lower left")
    figure.suptitle(plain(title), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


@styled
def next_tokens(pieces: Sequence[str], probabilities: Sequence[float], title: str) -> Figure:
    """The most likely next tokens and their probabilities."""
    figure, [axes] = _figure(7, 0.9 + 0.32 * len(pieces))
    places = np.arange(len(pieces))
    drawn = axes.barh(places, probabilities, color=BLUE)
    axes.bar_label(drawn, [f"{p:.1%}" for p in probabilities], padding=4, fontsize=9)
    axes.set_yticks(places, [plain(piece) for piece in pieces], fontsize=12)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    _label(axes, title, "probability", "next token")
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
    figure, axes = _figure(2.9 * heads, 3.1 * layers + 0.4, layers, heads)
    for index, axis in enumerate(axes):
        layer, head = divmod(index, heads)
        axis.imshow(patterns[layer, head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9)
        axis.grid(False)
        axis.set_xticks(range(time), list(labels), fontsize=6)
        axis.set_yticks(range(time), list(labels), fontsize=6)
        if head == 0:
            axis.set_ylabel("token that looks", fontsize=8)
        if layer == layers - 1:
            axis.set_xlabel("token looked at", fontsize=8)
    figure.suptitle(title, fontweight="bold", fontsize=11)
    return figure
