"""Figures show the data they were given."""

from __future__ import annotations

import importlib.resources
import io
import json
import logging
import math
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image

from llmcore.measure.compare_runs import find_runs
from llmcore.measure.evaluate import Evaluation, Score
from llmcore.model import rope_frequencies, rope_table
from llmcore.notebook import plots
from llmcore.notebook.plots import style
from llmcore.runs import read_metrics

from .helpers import quick, tiny_config, tiny_model, trainer


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
    for number, folder in enumerate(folders):  # costs in no fixed ratio to each other, so that no panel is left out
        events = read_metrics(folder)
        for event in events:
            event["tokens"] *= (1, 2, 3)[number]
            event["seconds"] = (1.0, 7.0, 2.0)[number]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        model = json.loads((folder / "config.json").read_text())
        model["model"]["hidden_dim"] *= (1, 8, 64)[number]
        (folder / "config.json").write_text(json.dumps(model))
    assert find_runs(tmp_path) == sorted(folders)
    figure = plots.compare_runs(folders)
    for number, folder in enumerate(folders):
        events = read_metrics(folder)
        validated = [event for event in events if "val_loss" in event]
        flops = tiny_config(hidden_dim=tiny_config().hidden_dim * (1, 8, 64)[number]).flops_per_token()
        drawn = [axes.get_lines()[number] for axes in figure.axes]
        assert {tuple(each.get_ydata()) for each in drawn} == {tuple(e["val_bits_per_byte"] for e in validated)}
        steps, tokens, minutes, compute = (each.get_xdata() for each in drawn)
        assert list(steps) == [2, 4, 6, 8] and list(tokens) == [event["tokens"] for event in validated]
        assert 60 * minutes[-1] == pytest.approx(sum(event["seconds"] for event in events))
        assert list(compute) == pytest.approx([event["tokens"] * flops for event in validated])
    assert [axes.get_xlabel() for axes in figure.axes] == list(plots.COSTS.values())
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {folder.name for folder in folders}
    best = min(folders, key=lambda folder: read_metrics(folder)[-1]["val_loss"])
    assert figure.get_suptitle().startswith(f"{best.name} ends lowest of 3 runs")
    looks = {(each.get_color(), each.get_marker()) for each in figure.axes[0].get_lines()}
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 3


def test_of_one_run_the_curve_is_drawn_once(tmp_path: Path) -> None:
    figure = plots.compare_runs([run_folder(tmp_path / "one", 1e-2)])
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer steps"]
    assert figure.axes[0].get_xlim()[0] == 0


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
    shown = about["image/png"]  # in half as many pixels, an odd one of which some versions of matplotlib cut
    assert width == 2 * shown["width"] and 2 * shown["height"] - height in (0, 1)
    assert "loss falls" in about["image/png"]["alt"] and "loss falls" in data["text/plain"]
    assert len(data["image/png"]) < 120_000


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    assert plots.smoothed([3.0] * 50, 10) == pytest.approx(np.full(50, 3.0))
    assert plots.smoothed([5.0, math.nan, 5.0], 10) == pytest.approx([5.0] * 3)
    assert np.isnan(plots.smoothed([math.nan, 1.0], 10)[0])
    falling = np.linspace(8, 1, 300)
    assert plots.smoothed(falling, 16) == pytest.approx(falling)
    noisy = np.random.default_rng(0).normal(size=2000)
    assert plots.smoothed(noisy, 50)[200:-200].std() < 0.3 * noisy.std()


@pytest.mark.parametrize("metric", ["val_loss", "exact_match"])
def test_the_legend_of_a_run_lies_above_its_curves(metric: str) -> None:
    some = [{**event, "skipped": event["step"] // 10, "exact_match": 0.5} for event in events(100)]
    figure = plots.training_curves(some, "loss falls", metric=metric)
    figure.draw_without_rendering()
    legend, axes = figure.axes[0].get_legend().get_window_extent(), figure.axes[0].get_window_extent()
    title = figure.axes[0]._left_title.get_window_extent()  # type: ignore[attr-defined]
    assert axes.y1 - 1 <= legend.y0 and legend.y1 <= title.y0 + 1
    assert legend.x1 <= figure.bbox.x1 and title.y1 <= figure.bbox.y1


@pytest.mark.parametrize("live", [True, False])
def test_no_figure_glares_on_a_dark_page(live: bool) -> None:
    picture = Image.open(io.BytesIO(plots.png(plots.bars({"a": 1.0}, "one", "things"), live))).convert("RGB")
    assert picture.getpixel((2, 2)) == pytest.approx(tuple(bytes.fromhex(style.PAPER[1:])), abs=2)
    assert (255, 255, 255) not in {color for _, color in picture.getcolors(1 << 24) or []}


def test_every_piece_is_drawn_in_order() -> None:
    pieces = ["却说", "曹操", "，", "⏎", "玄德"]
    figure = plots.text_pieces(pieces, "pieces", values=[1.0, 2.0, 0.5, 0.1, 3.0], unit="nats")
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == pieces
    assert texts[4].get_position()[1] < texts[0].get_position()[1]  # a newline begins a new line
    shades = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert shades[4][1] < shades[1][1] < shades[3][1]  # the more surprising, the redder: the less green


def test_rank_frequency_is_sorted_and_marks_the_shares_of_the_text() -> None:
    figure = plots.rank_frequency([5, 0, 100, 20, 0, 1], "counts", shares=(0.5, 0.95))
    assert line(figure, 0, "tokens")[:, 1].tolist() == [100, 20, 5, 1]  # what never occurs is left out
    assert [text.get_text().split("\n") for text in figure.axes[0].texts] == [
        ["1 tokens:", "50% of the text "],
        ["2 tokens:", "95% of the text "],
    ]


def test_a_note_stands_below_its_piece() -> None:
    figure = plots.text_pieces(["曹操", "曰"], "glossed", notes=["Cao Cao", "said"])
    drawn = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert drawn["Cao Cao"][0] == drawn["曹操"][0] and drawn["Cao Cao"][1] < drawn["曹操"][1]


def test_rows_of_boxes_have_names_and_marks() -> None:
    figure = plots.box_rows([("3 letters", list("abc"), ()), ("2 pieces", ["ab", "c"], (0,))], "cuts")
    assert [text.get_text() for text in figure.axes[0].texts] == ["3 letters", "a", "b", "c", "2 pieces", "ab", "c"]
    colors = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert len({*colors[:3], colors[4]}) == 1 and colors[3] != colors[0]
    wrapped = plots.box_rows([("bytes", ["E6"] * 90, ())], "long").axes[0]
    right = max(patch.get_x() + patch.get_width() for patch in wrapped.patches)
    assert len(wrapped.patches) == 90 and right <= wrapped.get_xlim()[1]


def test_a_merge_shows_its_pairs_and_marks_the_new_piece() -> None:
    steps = [([(("a", "b"), 3), (("b", " "), 2)], ["ab", " ", "ab", "ab"])]
    figure = plots.merge_steps(list("ab abab"), steps, "one merge")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[8:] == ["1. pairs", "a + b: 3×", "b + ␣: 2×", "4 pieces", "ab", "␣", "ab", "ab"]
    colors = [patch.get_facecolor() for patch in figure.axes[0].patches][7:]
    assert [color == colors[0] for color in colors] == [True, False, True, False, True, True]


def test_a_vocabulary_is_drawn_with_what_its_table_costs() -> None:
    figure = plots.compression([1000, 4000], [1.1, 1.4], "sizes", chosen=4000, dim=200)
    gain, cost = figure.axes
    assert gain.get_lines()[0].get_xydata().tolist() == [[1000, 1.1], [4000, 1.4]]
    assert cost.get_lines()[0].get_xydata().tolist() == [[1000, 0.2], [4000, 0.8]]
    assert all(line(figure, n, "chosen")[:, 0].tolist() == [4000] for n in (0, 1))
    assert len(plots.compression([1000, 4000], [1.1, 1.4], "sizes").axes) == 1


def test_a_staircase_shows_what_is_seen_and_frames_what_is_guessed() -> None:
    [axes] = plots.staircase(["a", "b", "c", "d"], "stairs").axes
    cells = {(int(patch.get_x()), int(patch.get_y())): patch.get_facecolor()[3] for patch in axes.patches}
    assert cells == {(column, row): float(column <= row) for row in range(3) for column in range(row + 2)}
    assert [text.get_text() for text in axes.texts] == [*"ab", *"abc", *"abcd"]


def test_surprise_is_drawn_from_scores_over_softmax_to_its_logarithm() -> None:
    scores = torch.tensor([2.0, -1.0, 0.5])
    left, middle, curve = plots.surprise(list("abc"), scores, 2, "three").axes
    assert [bar.get_height() for bar in left.patches] == scores.tolist()
    assert [bar.get_height() for bar in middle.patches] == pytest.approx(scores.softmax(0).tolist())
    [[p, nats]] = curve.get_lines()[1].get_xydata()
    assert (p, nats) == pytest.approx((float(scores.softmax(0)[2]), float(-scores.log_softmax(0)[2])))
    assert f"{nats:.2f}" in curve.texts[0].get_text()


def test_three_rulers_agree() -> None:
    [axes] = plots.loss_units({"nothing": 8.0, "something": 5.0}, 3.5, "units").axes
    marks = {(text.get_text(), text.get_position()[1]): text.get_position()[0] for text in axes.texts}
    assert marks["8", 0.2] == marks[f"{math.exp(8):,.0f}", 1.2] == 8
    assert marks["2.0", 2.2] == pytest.approx(2 * 3.5 * math.log(2))
    assert marks["nothing", -0.42] == 8 and marks["something", -0.42] == 5


def test_windows_are_drawn_where_and_when_they_are_read() -> None:
    figure = plots.reading_order([(0, 10, 20), (0, 0, 10), (1, 5, 15)], 20, "order")
    drawn = [each.get_xydata().tolist() for each in figure.axes[0].get_lines()[:3]]
    assert drawn == [[[10, 0], [20, 0]], [[0, 1], [10, 1]], [[5, 2], [15, 2]]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["epoch 1", "epoch 2"]
    assert figure.axes[0].yaxis_inverted()


def test_a_diagram_has_the_shapes_that_the_model_gives() -> None:
    model, tokens = tiny_model(), torch.zeros(3, 5, dtype=torch.int64)
    config = model.config
    given = plots.shapes(model, tokens)
    assert given["tokens"] == (3, 5) and given["output"] == tuple(model(tokens).shape) == (3, 5, config.vocab_size)
    assert given["layers.0.feed_forward.w1"] == (3, 5, config.hidden_dim)
    assert given["layers.0"] == given["norm"] == (3, 5, config.dim)
    assert not [part for part in model.modules() if part._forward_hooks]
    drawn = [text.get_text() for text in plots.block_diagram(model, tokens, "all").axes[0].texts]
    assert "(3, 5)" in drawn and f"(3, 5, {config.vocab_size})" in drawn and "inside: (3, 5, 48)" in drawn
    assert any(f"{config.n_heads} heads of {config.head_dim}" in text for text in drawn)


def test_attention_steps_write_their_numbers_and_hide_the_future() -> None:
    scores = torch.tensor([[1.0, -math.inf], [0.5, -2.0]])
    steps = {"masked": scores, "softmax": scores.softmax(-1), "times v": torch.ones(2, 3)}
    masked, shares, values = plots.attention_steps(steps, ["a", "b"], "steps").axes
    assert [text.get_text() for text in masked.texts] == ["1.00", "-∞", "0.50", "-2.00"]
    assert masked.images[0].get_array().mask.tolist() == [[False, True], [False, False]]
    assert shares.images[0].get_clim() == (0, 1) and masked.images[0].get_clim() == (-2, 2)
    assert [label.get_text() for label in shares.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in values.get_xticklabels()] == ["1", "2", "3"]


def test_the_spread_of_scores_is_drawn_with_and_without_the_root() -> None:
    products = {4: torch.randn(50, 8), 64: 8 * torch.randn(50, 8)}
    figure = plots.score_spread(products, "spread")
    for axes, values in zip(figure.axes, [products[4], products[64], products[4] / 2, products[64] / 8], strict=True):
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(values[0].softmax(0).tolist())
        assert f"spreads by {values.std():.1f}" in axes.get_title(loc="left")


def test_pairs_are_arrows_that_turn_as_the_table_says() -> None:
    cos, sin = rope_table(rope_frequencies(tiny_config(head_dim=8, rope_theta=10.0)), 20)
    figure = plots.rope(cos, sin, (0, 3), {"here": ([0, 1], [5.0, 4.0]), "there": ([0, 1], [5.0, 4.0])}, "turns")
    for axes, pair in zip(figure.axes[:2], (0, 3), strict=True):
        ends = [text.xy for text in axes.texts if hasattr(text, "xy")]
        angles = torch.arange(8) * 10.0 ** (-2 * pair / 8)
        assert ends == [pytest.approx((math.cos(a), math.sin(a)), abs=1e-5) for a in angles]
    assert line(figure, 2, "here").tolist() == line(figure, 2, "there").tolist() == [[0, 5], [1, 4]]


def test_a_norm_is_drawn_before_and_after_and_the_gate_is_silu() -> None:
    before = torch.tensor([3.0, -4.0])
    left, right = plots.norm_and_gate(before, before / 12.5**0.5, "norm").axes
    heights = [bar.get_height() for bar in left.patches]
    assert heights == pytest.approx([3 / 12.5**0.5, -4 / 12.5**0.5, 3, -4])
    assert "1.00" in left.get_legend().get_texts()[0].get_text()
    x, y = right.get_lines()[0].get_data()
    assert y == pytest.approx(x / (1 + np.exp(-x)), abs=1e-6)


def test_a_large_head_has_its_anti_diagonal_and_separator_framed() -> None:
    labels = list("^abc|cb")
    figure = plots.attention_head(np.eye(7), labels, 1, "head")
    *diagonal, column = [(p.get_x() + 0.5, p.get_y() + 0.5, p.get_height()) for p in figure.axes[0].patches]
    assert diagonal == [(3, 5, 1), (2, 6, 1)]  # one place to the right of b and a; right of c there is nothing
    assert column == (4, 4, 4)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == labels
    assert len(figure.axes) == 2  # the second is the scale


def test_one_head_is_shown_at_its_moments() -> None:
    moments = {"step 1": np.zeros((2, 2)), "step 9": np.eye(2)}
    figure = plots.attention_moments(moments, ["a", "b"], "moments")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [*moments]
    assert np.array_equal(figure.axes[1].images[0].get_array(), np.eye(2))


def test_accuracy_is_drawn_by_place_from_one() -> None:
    figure = plots.accuracy_by_place({"step 1": [0.1, 0.2], "step 9": [1.0, 0.5]}, "by place")
    assert line(figure, 0, "step 9").tolist() == [[1, 1.0], [2, 0.5]]


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
        plots.box_rows([(title[:20], list(title[:90]), (1,))], title),
        plots.staircase([*title[:5], title], title),
        plots.surprise(list(title[:3]), [1.0, 2.0, 3.0], 0, title),
        plots.accuracy_by_place({title[:20]: [0.5, 1.0]}, title),
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
