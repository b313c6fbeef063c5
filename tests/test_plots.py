"""Figures show the data they were given."""

from __future__ import annotations

import importlib.resources
import io
import logging
import math
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image

from llmcore.measure.compare_runs import find_runs
from llmcore.measure.evaluate import Evaluation, Score
from llmcore.notebook import plots
from llmcore.notebook.plots import style
from llmcore.runs import read_metrics

from .helpers import quick, tiny_config, trainer


def events(steps: int) -> list[dict[str, float]]:
    made = []
    for step in range(1, steps + 1):
        event = {"step": step, "loss": 8 / step + 4, "learning_rate": 1e-3, "grad_norm": 1.0}
        event |= (
            {"tokens_per_second": 1e4, "val_loss": 8 / step + 4.5} if step % 10 == 0 else {"tokens_per_second": 9e3}
        )
        made.append(event)
    return made


def line(figure: Figure, axes: int, label: str) -> np.ndarray:
    found = [line for line in figure.axes[axes].get_lines() if str(line.get_label()).startswith(label)]
    assert len(found) == 1, [line.get_label() for line in figure.axes[axes].get_lines()]
    return np.asarray(found[0].get_xydata())


def test_training_curves_draw_each_step_and_each_validation() -> None:
    figure = plots.training_curves(events(100), "falls")
    assert figure.axes[0].get_title(loc="left") == "falls"
    assert line(figure, 0, "training, each step") == pytest.approx(np.array([(s, 8 / s + 4) for s in range(1, 101)]))
    validated = range(10, 101, 10)
    assert line(figure, 0, "validation loss") == pytest.approx(np.array([(s, 8 / s + 4.5) for s in validated]))
    assert figure.axes[0].get_xlabel() == "optimizer step" and "nats" in figure.axes[0].get_ylabel()


def test_training_curves_draw_one_step_and_a_loss_of_nan() -> None:
    for some in ([], events(1), [*events(30), {**events(1)[0], "step": 31, "loss": math.nan, "grad_norm": math.inf}]):
        figure = plots.training_curves(some)
        figure.draw_without_rendering()
        low, high = figure.axes[0].get_ylim()
        assert math.isfinite(low) and math.isfinite(high)


def test_skipped_steps_are_marked_and_counted() -> None:
    some = [{**event, "skipped": (event["step"] >= 7) + 2 * (event["step"] >= 40)} for event in events(50)]
    figure = plots.training_curves(some)
    assert line(figure, 0, "skipped: 2")[:, 0].tolist() == [7, 40]


def test_steps_may_be_on_a_logarithmic_axis() -> None:
    assert {axes.get_xscale() for axes in plots.training_curves(events(50), log_x=True).axes} == {"log"}
    assert {axes.get_xscale() for axes in plots.training_curves(events(50)).axes} == {"linear"}


def test_memory_is_drawn_as_predicted_lines_and_measured_points() -> None:
    predicted = {"none": {1: 1e8, 4: 3e8}, "selective": {1: 9e7, 4: 2e8}, "full": {1: 8e7, 4: 1e8}}
    figure = plots.memory_against_batch(predicted, {"none": {2: 1.8e8}, "full": {4: 1.1e8}}, "half")
    for policy, expected in predicted.items():
        assert line(figure, 0, f"{policy}, predicted")[:, 1] == pytest.approx(
            [size / 1e6 for size in expected.values()]
        )
    assert line(figure, 0, "none, measured").tolist() == [[2, 180]]
    assert line(figure, 0, "full, measured").tolist() == [[4, 110]]
    assert len(figure.axes[0].get_lines()) == 5
    assert "MB" in figure.axes[0].get_ylabel() and figure.axes[0].get_ylim()[0] == 0


def run_folder(folder: Path, rate: float, **options: object) -> Path:
    trainer(folder, quick(max_steps=8, eval_interval=2, learning_rate=rate), **options).fit()
    return folder


def test_runs_are_drawn_against_steps_tokens_time_and_compute(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / f"lr={rate}", rate) for rate in (1e-3, 1e-2, 1e-1)]
    assert find_runs(tmp_path) == sorted(folders)
    figure = plots.compare_runs(folders)
    for number, folder in enumerate(folders):
        events = read_metrics(folder)
        validated = [event for event in events if "val_loss" in event]
        flops = tiny_config().flops_per_token()
        drawn = [axes.get_lines()[number] for axes in figure.axes]
        assert {tuple(each.get_ydata()) for each in drawn} == {tuple(e["val_bits_per_byte"] for e in validated)}
        steps, tokens, seconds, compute = (each.get_xdata() for each in drawn)
        assert list(steps) == [2, 4, 6, 8] and list(tokens) == [event["tokens"] for event in validated]
        assert seconds[-1] == pytest.approx(sum(event["seconds"] for event in events))
        assert list(compute) == pytest.approx([event["tokens"] * flops for event in validated])
    assert [axes.get_xlabel() for axes in figure.axes] == list(plots.COSTS.values())
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {folder.name for folder in folders}
    best = min(folders, key=lambda folder: read_metrics(folder)[-1]["val_loss"])
    assert figure.get_suptitle().startswith(f"{best.name} ends lowest of 3 runs")
    looks = {(each.get_color(), each.get_marker()) for each in figure.axes[0].get_lines()}
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 3


def test_a_run_that_was_not_validated_is_named_and_left_out(tmp_path: Path) -> None:
    silent = run_folder(tmp_path / "silent", 1e-2, val=False)
    assert plots.compare_runs([silent]).get_suptitle().startswith("No run has been validated yet")
    figure = plots.compare_runs([silent, run_folder(tmp_path / "heard", 1e-2)])
    assert len(figure.axes[0].get_lines()) == 1 and "not validated yet: silent" in figure.get_suptitle()
    assert plots.compare_runs([]).axes


def test_no_text_from_outside_is_taken_for_a_formula_or_an_escape() -> None:
    odd = [r"$\frac{$", "$x$", "\x1b[31m", "a$b"]
    for figure in (plots.text_pieces(odd, "odd"), plots.next_tokens(odd, [0.4, 0.3, 0.2, 0.1], "odd")):
        figure.draw_without_rendering()
    drawn = [text.get_text() for text in plots.text_pieces(odd, "odd").axes[0].texts]
    assert drawn == [r"\$\frac{\$", r"\$x\$", "⟨1B⟩[31m", r"a\$b"]


def test_a_figure_shows_itself_crisp_small_and_with_words() -> None:
    figure = plots.training_curves(events(300), "loss falls")
    data, about = figure._repr_mimebundle_()
    width, height = Image.open(io.BytesIO(data["image/png"])).size
    assert (width, height) == (2 * about["image/png"]["width"], 2 * about["image/png"]["height"])
    assert "loss falls" in about["image/png"]["alt"] and "loss falls" in data["text/plain"]
    assert len(data["image/png"]) < 120_000


def test_smoothing_keeps_a_constant_and_starts_unbiased() -> None:
    assert plots.smoothed([3.0] * 50, 10) == pytest.approx(np.full(50, 3.0))
    assert plots.smoothed([5.0, math.nan, 5.0], 10) == pytest.approx([5.0] * 3)
    noisy = np.random.default_rng(0).normal(size=2000)
    assert plots.smoothed(noisy, 50)[200:].std() < 0.3 * noisy.std()


def test_every_piece_is_drawn_in_order() -> None:
    pieces = ["却说", "曹操", "，", "⏎", "玄德"]
    figure = plots.text_pieces(pieces, "pieces", values=[1.0, 2.0, 0.5, 0.1, 3.0], unit="nats")
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == pieces
    assert texts[4].get_position()[1] < texts[0].get_position()[1]  # a newline begins a new line
    shades = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert shades[4][1] < shades[1][1] < shades[3][1]  # the more surprising, the redder: the less green


def test_rank_frequency_is_sorted_and_leaves_out_what_never_occurs() -> None:
    figure = plots.rank_frequency([5, 0, 100, 20, 0, 1], "counts")
    assert line(figure, 0, "tokens")[:, 1].tolist() == [100, 20, 5, 1]


def scores(bits: list[float], name: str = "第{}回") -> Evaluation:
    return Evaluation.of([Score(name.format(n), 1000, 400, 300, 1000 * b * math.log(2)) for n, b in enumerate(bits)])


def test_document_scores_draw_points_totals_and_intervals() -> None:
    ours, floor = scores([1.5, 2.5, 2.0, 1.75, 2.25]), scores([2.0, 2.75, 2.5, 2.2, 2.3])
    figure = plots.document_scores({"ours": ours, "floor": floor}, "$ours$ is better")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["第1回", "第4回", "第2回", "第3回", "第0回"]
    assert axes.yaxis_inverted()
    assert line(figure, 0, "ours: 2.000")[:, 0] == pytest.approx([2.5, 2.25, 2.0, 1.75, 1.5])
    assert line(figure, 0, "floor: 2.350")[:, 0] == pytest.approx([2.75, 2.3, 2.5, 2.2, 2.0])
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert bands == [pytest.approx(ours.interval), pytest.approx(floor.interval)]
    with pytest.raises(ValueError, match="floor was evaluated on other documents than ours"):
        plots.document_scores({"ours": ours, "floor": scores([1.0])}, "")
    figure.draw_without_rendering()


def test_of_many_documents_the_hardest_and_the_easiest_ten_are_shown() -> None:
    figure = plots.document_scores({"ours": scores([1 + n / 300 for n in range(300)], "a/long/$path/" * 5 + "{}")}, "")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [name.split("/")[-1] for name in names] == [str(n) for n in [*range(299, 289, -1), *range(9, -1, -1)]]
    assert max(map(len, names)) < 50 and "280 documents between" in figure.axes[0].texts[0].get_text()
    figure.draw_without_rendering()


def test_one_document_is_drawn_without_an_interval() -> None:
    figure = plots.document_scores({"ours": scores([1.5])}, "one")
    assert not figure.axes[0].patches
    figure.draw_without_rendering()


def test_attention_maps_show_one_square_a_head() -> None:
    weights = np.random.default_rng(0).random((2, 3, 4, 4))
    figure = plots.attention_maps(weights, list("abc|"), "heads")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"layer {m}, head {n}" for m in (1, 2) for n in (1, 2, 3)
    ]
    assert np.array_equal(figure.axes[5].images[0].get_array(), weights[1, 2])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list("abc|")


def test_isoflop_curves_show_every_run_and_the_parabola_through_them() -> None:
    sizes = np.geomspace(1e5, 1e6, 5)
    curves = {c: (sizes, 5 - np.log10(c) / 9 + np.log(sizes / 3e5) ** 2) for c in (1e9, 1e10)}
    figure = plots.isoflop_curves({**curves, 1e11: (sizes[:2], [3, 4])}, "valleys", {1e9: 2e5})
    for flops in curves:
        assert line(figure, 0, f"{flops:.2g} FLOPs") == pytest.approx(np.column_stack(curves[flops]))
    parabolas = [each for each in figure.axes[0].get_lines() if len(each.get_xdata()) == 100]
    assert len(parabolas) == 2  # two runs have none
    x, y = parabolas[0].get_data()
    assert x[y.argmin()] == pytest.approx(3e5, rel=0.03)
    assert line(figure, 0, "the law's choice")[:, 0].tolist() == [2e5, 2e5]
    assert "nats" in figure.axes[0].get_ylabel() and figure.axes[0].get_xscale() == "log"
    words = [f"reads {n}×" for n in range(5)]
    figure = plots.isoflop_curves({1e9: curves[1e9]}, "one valley", notes={1e9: words})
    assert [(each.get_text(), *each.xy) for each in figure.axes[0].texts] == list(zip(words, *curves[1e9], strict=True))


def test_a_scaling_fit_shows_runs_and_the_held_back_one_with_its_band() -> None:
    held_back = {"flops": 1e12, "predicted": 4.0, "low": 3.9, "high": 4.3}
    figure = plots.scaling_fit([6.0, 5.0, 4.5], [5.9, 5.1, 4.5], [1e9, 1e10, 1e11], "law", held_back, [4.2, 4.1])
    assert line(figure, 0, "runs, measured").tolist() == [[1e9, 6.0], [1e10, 5.0], [1e11, 4.5]]
    assert line(figure, 0, "runs, by the law")[:, 1].tolist() == [5.9, 5.1, 4.5]
    assert line(figure, 0, "held back, measured").tolist() == [[1e12, 4.2], [1e12, 4.1]]
    assert line(figure, 1, "held back, measured").tolist() == [[4.0, 4.2], [4.0, 4.1]]
    [band] = [each for each in figure.axes[0].containers if "predicted" in str(each.get_label())]
    [segment] = band.lines[2][0].get_segments()
    assert segment[:, 1] == pytest.approx([3.9, 4.3])
    assert figure.get_suptitle() == "law"
    assert not [each for each in plots.scaling_fit([6.0], [5.9], [1e9], "law").axes[0].containers]


def test_a_predicted_band_is_drawn_with_what_lies_in_it_and_what_does_not() -> None:
    figure = plots.prediction_bands({"near": ((5.0, 4.9, 5.2), [5.1]), "far": ((4.5, 4.3, 4.6), [4.4, 4.7])}, "bands")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["near", "far"]
    drawn = [(each.get_marker(), *np.column_stack(each.get_data()).tolist()) for each in axes.get_lines()]
    assert drawn[:7] == [
        ("None", [4.9, 0], [5.2, 0]),
        ("|", [5.0, 0]),
        ("o", [5.1, 0]),
        ("None", [4.3, 1], [4.6, 1]),
        ("|", [4.5, 1]),
        ("o", [4.4, 1]),
        ("D", [4.7, 1]),
    ]


def test_the_style_leaves_the_callers_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    plots.bars({"a": 1.0, "b": 2000.0}, "two", "things", highlight="b")
    assert dict(matplotlib.rcParams) == before


def test_the_chinese_font_has_every_character_of_the_novel(sanguo: Path) -> None:
    name = plots.chinese_font()
    assert name is not None
    characters = set("".join(path.read_text(encoding="utf-8") for path in sanguo.iterdir())) - {"\n", " "}
    known = FT2Font(font_manager.findfont(name)).get_charmap()
    assert len([c for c in characters if ord(c) not in known]) <= 3  # rare characters that fonts do not draw


def chinese_font_where(fonts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What `chinese_font` answers on a machine that has matplotlib's own fonts and these, by name and file."""
    own = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    entries = [font_manager.FontEntry(fname=fonts[name], name=name, weight=400, size="scalable") for name in fonts]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own + entries)
    font_manager.fontManager._findfont_cached.cache_clear()
    return style.chinese_font.__wrapped__()


def test_a_chinese_font_of_the_system_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(importlib.resources.files("pylopdf_fonts_zh_cn") / "NotoSansSC-Regular.otf")
    assert chinese_font_where({"SimHei": file, "Microsoft YaHei": file}, monkeypatch) == "Microsoft YaHei"
    assert font_manager.findfont("Microsoft YaHei") == file


def test_a_system_font_without_glyphs_or_file_is_passed_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font at all")
    useless = {"Noto Sans CJK SC": font_manager.findfont("DejaVu Sans"), "PingFang SC": str(tmp_path / "gone.ttf")}
    assert chinese_font_where({**useless, "SimHei": str(broken)}, monkeypatch) == "Noto Sans SC"  # the package's


def test_no_chinese_font_is_one_warning_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pylopdf_fonts_zh_cn", None)
    with pytest.warns(UserWarning, match=r"Noto Sans CJK SC .* pip install pylopdf-fonts-zh-cn"):
        assert chinese_font_where({}, monkeypatch) is None


def test_bold_titles_do_not_warn_of_a_regular_font(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = str(importlib.resources.files("pylopdf_fonts_zh_cn") / "NotoSansSC-Regular.otf")
    name = chinese_font_where({"WenQuanYi Zen Hei": file}, monkeypatch)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure()
        figure.suptitle("却说曹操", fontweight="bold", fontfamily=["DejaVu Sans", name])
        plots.png(figure)
    assert not caplog.records


LONG = {
    "words": "a title of so many words that no figure is wide enough for it " * 6,
    "no spaces": "却说曹操引军追赶" * 30,
    "formulas": "$x^2$ costs $ " * 40,
    "emoji": "🐉𠀀" * 90,
    "lines": "one line\nand another, which is far longer than the figure it stands in, and then some more of it\n" * 2,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", LONG)
def test_no_title_leaves_its_figure_and_no_glyph_is_missing(kind: str) -> None:
    title = LONG[kind]
    figures = [
        plots.bars({title: 3.0, "b": 1.0}, title, "units", highlight=title),
        plots.text_pieces([*title[:40], title], title, [1.0] * 41, "nats"),
        plots.next_tokens([*title[:3], title], [0.4, 0.3, 0.2, 0.1], title),
        plots.length_histogram([1, 2, 3, 9], "tokens", title),
        plots.training_curves(events(30), title),
        plots.training_curves(events(30), title, metric="exact_match"),
        plots.attention_maps(np.ones((1, 2, 3, 3)) / 3, list("🐉bc"), title),
        plots.scaling_fit([1.0, 2.0], [1.1, 2.1], [1e9, 1e10], title),
    ]
    for figure in figures:
        figure.set_dpi(2 * figure.dpi)  # as a notebook shows it
        figure.draw_without_rendering()
        titles = [figure._suptitle, *(each for axes in figure.axes for each in (axes.title, axes._left_title))]  # type: ignore[attr-defined]
        shown = [each for each in titles if each is not None and each.get_text()]
        assert any(len(each.get_text()) > 20 for each in shown)
        for each in shown:
            box = each.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_a_title_that_fits_stays_as_it_is_and_keeps_its_dollars() -> None:
    for title in ("falls to 3.1", "却说曹操", r"costs 3$, or 4$"):
        figure = plots.length_histogram([1, 2, 3], "tokens", title)
        assert figure.axes[0].get_title(loc="left") == title.replace("$", r"\$")


def test_a_character_without_a_glyph_is_shown_by_its_number() -> None:
    figure = plots.text_pieces(["🐉", "龘", "é"], "after “🐉”")
    assert [text.get_text() for text in figure.axes[0].texts] == ["⟨1F409⟩", "龘", "é"]
    assert figure.axes[0].get_title(loc="left") == "after “⟨1F409⟩”"


def test_odd_names_of_runs_stay_inside_their_figure(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, 1e-2) for name in ("x" * 200, "a\nb\x1b[31m\u202e", "史" * 60)]
    figure = plots.compare_runs(folders)
    figure.draw_without_rendering()
    assert all(axes.get_position().width > 0.2 for axes in figure.axes)
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert "a⟨0A⟩b⟨1B⟩[31m⟨202E⟩" in {text.get_text() for text in figure.legends[0].get_texts()}
