"""Figures of a training step and of writing show what they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcore.notebook import plots
from llmcore.notebook.plots.training import format_bits, kept_by


def test_ways_to_choose_show_what_is_taken_and_what_is_cut_off() -> None:
    ways = {"own": [0.5, 0.3, 0.2], "top_k = 2": [0.625, 0.375, 0.0]}
    figure = plots.ways_to_choose(["a", "b", "c"], ways, "two ways")
    own, cut = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in (own, cut)] == ["own", "top_k = 2"]
    full, hatched = cut.patches[:3], cut.patches[3:]
    assert [bar.get_width() for bar in full] == [0.625, 0.375, 0.0]
    assert [bar.get_width() for bar in hatched] == [0.0, 0.0, 0.2]  # what the model gave it
    assert all(bar.get_hatch() for bar in hatched)
    assert not any(bar.get_width() for bar in own.patches[3:])


def test_the_caches_picture_adds_up_tokens_and_seconds() -> None:
    figure = plots.cache_work([0.1, 0.2, 0.3], [0.1, 0.1, 0.1], "saved")
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert labels[0] == ["whole text again: 6 tokens in all", "with the cache: 3 tokens in all"]
    assert labels[1] == ["whole text again: 0.60 s in all", "with the cache: 0.30 s in all"]


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, (1, 8, 23)), (torch.bfloat16, (1, 8, 7)), (torch.float16, (1, 5, 10))]
)
def test_formats_have_the_bits_of_their_standard(dtype: torch.dtype, bits: tuple[int, int, int]) -> None:
    assert format_bits(dtype) == bits
    assert len(plots.number_formats({"x": dtype}, "bits").axes[0].patches) == sum(bits)


@pytest.mark.parametrize(("policy", "kept", "again"), [("none", 9, 0), ("selective", 6, 5), ("full", 1, 8)])
def test_each_policy_keeps_what_it_says(policy: str, kept: int, again: int) -> None:
    states = kept_by(policy, attention_kernel=True)
    assert (states.count("kept"), states.count("again")) == (kept, again)
    figure = plots.kept_and_again({policy: 12.0}, True, "kept")
    filled = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[3] > 0]
    assert len(filled) == kept
    assert "12 MB kept" in [text.get_text() for text in figure.axes[0].texts]


def test_singular_values_are_those_of_the_matrix() -> None:
    figure = plots.singular_values({"diagonal": np.diag([4.0, 1.0, 2.0])}, "values")
    [line] = figure.axes[0].get_lines()
    assert np.asarray(line.get_ydata()) == pytest.approx([1, 0.5, 0.25])


def test_the_parts_of_a_bar_stand_side_by_side() -> None:
    figure = plots.stacked({"weights": 10.0, "gradients": 30.0}, "MB", "a step")
    assert [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches] == [(0, 10), (10, 30)]
    assert figure.axes[0].get_xlabel() == "MB, 40 in all"
