"""The style of all figures: colours, fonts with Chinese glyphs, sharp pictures."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import importlib.resources
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from llmcore.notebook.safe_html import COLORS, visible

P = ParamSpec("P")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
LABEL, TITLE = 32, 300  # characters of a label and of a title that are shown at most
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#666666"
# The same colours mean the same thing in all figures: what a model reads, what it is to guess, and attention's three.
INPUT, TARGET, QUERY, KEY, VALUE = BLUE, RED, ORANGE, GREEN, PURPLE
PAPER = "#eef1f4"  # behind every figure: dark enough for a dark page not to glare, light enough for black text
PALE = COLORS  # of boxes under black text
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
    """A Figure that shows itself in a notebook: sharp on fine screens, with its titles as text for screen readers."""

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = (round(inches * self.dpi) for inches in self.get_size_inches())
        titles = [self.get_suptitle(), *(axes.get_title(loc="left") for axes in self.axes)]
        text = "; ".join(" ".join(title.split()) for title in titles if title) or "picture"
        return (
            {"image/png": png(self), "text/plain": f"<picture: {text}>"},
            {"image/png": {"width": width, "height": height, "alt": text}},
        )


def png(figure: Figure, live: bool = False) -> bytes:
    """A figure as PNG: twice as fine as the screen and in 256 colours. For a live view: faster, and not so fine."""
    buffer = io.BytesIO()
    if live:
        figure.savefig(buffer, format="png", facecolor=PAPER, pil_kwargs={"compress_level": 1})
        return buffer.getvalue()
    figure.savefig(buffer, format="png", dpi=2 * figure.dpi, facecolor=PAPER)
    quantized = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    quantized.save(buffer, format="png", optimize=True)
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
    """Name of a font with Chinese glyphs: one of the system's, else the installed package's; None without either."""
    manager = font_manager.fontManager
    family = next(filter(draws_chinese, SYSTEM_FONTS), None)
    if family is None:
        try:
            file = importlib.resources.files("pylopdf_fonts_zh_cn") / "NotoSansSC-Regular.otf"
            manager.addfont(str(file))
            family = manager.ttflist[-1].name
        except (ModuleNotFoundError, FileNotFoundError):
            warnings.warn(
                "no font with Chinese glyphs, so figures show boxes: install one, such as Noto Sans CJK SC (Debian: "
                f"fonts-noto-cjk), and remove {matplotlib.get_cachedir()}; or: pip install pylopdf-fonts-zh-cn",
                stacklevel=2,
            )
            return None

    # without a bold weight the regular one is used for it: matplotlib would warn at each bold title
    faces = [font for font in manager.ttflist if font.name == family]
    if not any(font.weight in (700, "bold") for font in faces):
        manager.ttflist.append(dataclasses.replace(faces[0], weight=700))
    return family


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with the workbook's style, and break long titles into lines. The caller's settings stay as they are."""

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
            "grid.color": "#d3d8dd",
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "figure.facecolor": PAPER,
            "axes.facecolor": PAPER,
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
        }
        with matplotlib.rc_context(style):
            figure = function(*args, **kwargs)
            _break_titles(figure)
            return figure

    return draw


def figure_text(text: str, most: int | None = None) -> str:
    """Text from outside as a label: a dollar sign begins no formula, and characters without a glyph show as numbers.

    Args:
        text: any text.
        most: cells to show at most; the end of a longer text is left out.
    """
    drawable = _glyphs()
    characters = visible(text if most is None else text[: most + 1])
    signs = [c if c.isspace() or not drawable or ord(c) in drawable else f"⟨{ord(c):X}⟩" for c in characters]
    if most is not None and sum(map(cells, signs)) > most:
        ends = itertools.accumulate(map(cells, signs))
        signs = [sign for sign, end in zip(signs, ends, strict=True) if end < most] + ["…"]
    return "".join(signs).replace("$", r"\$")


def cells(text: str) -> int:
    """The width of a text: one cell for a letter, two for a Chinese character."""
    return sum(1 + (ord(character) > 0x2E7F) for character in text)


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that the figures' fonts can draw, regular and bold; empty if there is no Chinese font."""
    chinese = chinese_font()
    if chinese is None:
        return frozenset()

    def drawn(family: str, weight: str) -> set[int]:
        file = font_manager.findfont(font_manager.FontProperties(family=[family], weight=weight))
        return set(font_manager.get_font(file).get_charmap())

    return frozenset((drawn("DejaVu Sans", "normal") & drawn("DejaVu Sans", "bold")) | drawn(chinese, "normal"))


def _break_titles(figure: Figure) -> None:
    """Break every title that is wider than its figure into lines. After three lines the rest is left out."""
    titles = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]  # type: ignore[attr-defined]
    titles = [title for title in [figure._suptitle, *titles] if title and title.get_text()]  # type: ignore[attr-defined]
    width = 0.96 * figure.bbox.width  # a little space at its edge
    on_screen, in_file = RendererAgg(1, 1, figure.dpi), RendererAgg(1, 1, 2 * figure.dpi)

    def measure(title: Text, text: str) -> float:
        font = title.get_fontproperties()
        widths = [drawn.get_text_width_height_descent(text, font, False)[0] for drawn in (on_screen, in_file)]
        return max(widths[0], widths[1] / 2)

    for title in titles:
        whole = title.get_text()
        text = " ".join(whole[:TITLE].split())
        if whole == text and measure(title, text) < width / 2:
            continue

        # where the title begins
        left = 0.0
        if title.get_horizontalalignment() == "left":
            title.set_text("")  # a title that is too long would push the axes together
            figure.draw_without_rendering()  # the layout engine places the axes
            left = title.get_window_extent(on_screen).x0
            title.set_text(whole)
        if whole == text and left + measure(title, text) <= width:
            continue

        lines, rest = _lines(text, functools.partial(measure, title), width - left)
        if rest or len(whole) > TITLE:
            lines[-1] = lines[-1][:-2] + "…"
        title.set_parse_math(False)  # a line may end between a dollar sign and the backslash before it
        title.set_text("\n".join(lines).replace("\\$", "$"))

        # a higher figure
        height = figure.get_figheight()
        added = (len(lines) - 1) * 1.25 * title.get_fontproperties().get_size_in_points() / 72
        figure.set_figheight(height + added)
        if figure.get_layout_engine() is None:  # margins set by hand
            top = height * (1 - figure.subplotpars.top) + added
            figure.subplots_adjust(top=1 - top / figure.get_figheight())


def _lines(text: str, measure: Callable[[str], float], width: float) -> tuple[list[str], str]:
    """Up to three lines that fit into a width, broken at spaces if possible, and the rest of the text."""
    lines: list[str] = []
    while text and len(lines) < 3:
        fits = bisect.bisect_right(range(1, len(text) + 1), width, key=lambda n: measure(text[:n]))
        space = text.rfind(" ", 0, fits + 1)
        cut = len(text) if fits == len(text) else space if space > fits / 2 else max(1, fits)
        lines, text = [*lines, text[:cut]], text[cut:].lstrip()
    return lines, text


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of a size in inches, and its axes, row by row."""
    figure = Picture(figsize=(width, height), layout="constrained", dpi=100)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).ravel())


def bare(axes: Axes) -> None:
    """Leave out the grid, the edges and the small lines at the labels: for axes that hold a drawing."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels of the axes."""
    axes.set(title=figure_text(title), xlabel=figure_text(x), ylabel=figure_text(y))


def head(figure: Figure, title: str) -> None:
    """Set a title over the whole figure, at its left edge: labels beside the axes may be long."""
    figure.suptitle(figure_text(title), x=0.01, ha="left", fontweight="bold", fontsize=11)
