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
# As matplotlib calls them. "Noto Sans SC" is not among them: a system has it as a variable font, which comes out thin.
SYSTEM_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Noto Sans CJK JP",  # all glyphs too; an older matplotlib sees only this first one of the file's fonts
    "SimHei",
    "Heiti TC",
    "Arial Unicode MS",
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


def draws_chinese(family: str) -> bool:
    """Whether matplotlib finds a font of this name, its file is there, and it has glyphs for Chinese text."""
    try:
        path = font_manager.findfont(
            font_manager.FontProperties(family=[family]), fallback_to_default=False, rebuild_if_missing=False
        )
        font = font_manager.get_font(path)
    except (ValueError, OSError, RuntimeError):  # no such font, no such file, a broken file
        return False
    return all(font.get_char_index(ord(character)) for character in "汉語，")


@functools.cache
def chinese_font() -> str | None:
    """Name of a font with Chinese glyphs: one of the system's, else the one installed as a package."""
    manager = font_manager.fontManager
    found = next(filter(draws_chinese, SYSTEM_FONTS), None)
    if found is None:
        try:
            file = importlib.resources.files("pylopdf_fonts_zh_cn") / "NotoSansSC-Regular.otf"
            manager.addfont(str(file))
            found = manager.ttflist[-1].name
        except (ModuleNotFoundError, FileNotFoundError):
            warnings.warn(
                "no font with Chinese glyphs, so figures show boxes: install one, such as Noto Sans CJK SC (Debian: "
                f"fonts-noto-cjk), and remove {matplotlib.get_cachedir()}; or: pip install pylopdf-fonts-zh-cn",
                stacklevel=2,
            )
            return None
    # where only the regular weight is there, let it stand for the bold one too, lest each bold title warn
    faces = [font for font in manager.ttflist if font.name == found]
    if not any(font.weight in (700, "bold") for font in faces):
        manager.ttflist.append(dataclasses.replace(faces[0], weight=700))
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
