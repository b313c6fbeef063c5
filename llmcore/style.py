"""One look for all figures: colours, font, crisp pictures. Chinese glyphs render."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import io
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from llmcore.markup import visible

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


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, in inches, and its axes, row by row."""
    figure = Picture(figsize=(width, height), layout="constrained", dpi=100)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).ravel())


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, and what the axes mean, with units."""
    axes.set(title=title, xlabel=x, ylabel=y)
