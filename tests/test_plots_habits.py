"""Figures of what is learned by heart and of repetition show what they were given."""

from __future__ import annotations

import numpy as np
import pytest

from llmcore.measure.memorised import Recall
from llmcore.notebook import plots
from tests.test_plots import line


def test_recited_shares_stand_beside_the_floor() -> None:
    figure = plots.recited_shares({"the model": {8: 0.4, 16: 0.1}, "held-out": {8: 0.02, 16: 0.0}}, "recites")
    [axes] = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [0.4, 0.1, 0.02, 0.0]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, False, True, True]  # not by colour alone
    assert [text.get_text() for text in axes.texts] == ["40.0%", "10.0%", "2.0%", "0.0%"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8 or more", "16 or more"]


def test_recall_is_drawn_against_the_prompt_with_its_error() -> None:
    known = {8: Recall(0.1, 2.0, 0.5), 32: Recall(0.4, 7.0, 0.5)}
    results = {"training text": known, "held-out text": {8: Recall(0, 1.0, 0.1)}}
    whole, tokens = plots.recall_by_prompt(results, "recall").axes
    assert line(plots.recall_by_prompt(results, "recall"), 0, "training").tolist() == [[8, 0.1], [32, 0.4]]
    assert [text.get_text() for text in whole.get_xticklabels()] == ["8", "32"]
    bars = tokens.containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[1.0, 3.0], [6.0, 8.0]]  # two standard errors each way


def test_learning_by_heart_is_drawn_beside_the_losses() -> None:
    events = [{"step": step, "tokens": 10 * step, "loss": 5.0} for step in range(1, 11)]
    events[4] |= {"val_loss": 5.5, "recall": 1.5, "recall_floor": 0.5, "recited": 0.2, "recited_floor": 0.1}
    figure = plots.learned_by_heart(events, "by heart", tokens_per_epoch=40)
    assert line(figure, 0, "training") == pytest.approx(np.array([(step, 5.0) for step in range(1, 11)]))
    assert line(figure, 0, "validation").tolist() == [[5, 5.5]]
    assert line(figure, 1, "training text").tolist() == [[5, 1.5]]
    assert line(figure, 1, "held-out").tolist() == [[5, 0.5]]
    assert line(figure, 2, "the model").tolist() == [[5, 0.2]]
    assert line(figure, 2, "held-out").tolist() == [[5, 0.1]]
    epochs = [each.get_xdata() for each in figure.axes[1].get_lines() if each.get_linestyle() == ":"]
    assert [list(each) for each in epochs] == [[4, 4], [8, 8]]


def test_learning_by_heart_is_drawn_before_anything_is_measured() -> None:
    for events in ([], [{"step": 1, "tokens": 8, "loss": 5.0}]):
        assert len(plots.learned_by_heart(events, "nothing yet", 100).axes) == 1


def test_quality_and_repetition_join_one_parameters_points_and_star_the_author() -> None:
    points = {"temperature": {"0.5": (4.0, 0.6), "1.0": (6.0, 0.9)}, "top-p": {"0.9": (5.0, 0.8)}}
    figure = plots.quality_and_repetition(points, (5.5, 0.95), "near")
    assert line(figure, 0, "temperature").tolist() == [[4.0, 0.6], [6.0, 0.9]]
    assert line(figure, 0, "held-out").tolist() == [[5.5, 0.95]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.5", "1.0", "0.9"]
