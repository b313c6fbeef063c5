"""The law finds the numbers that made its data, says how sure it is, and refuses runs that cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcore.measure.scaling import ScalingError, ScalingLaw, fit_scaling, isoflop_minimum

TRUE = ScalingLaw(*map(np.float64, (1.8, 30.0, 300.0, 0.3, 0.4)))
LARGER = 2.2e6, 1.8e6
Runs = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def runs(noise: float = 0.0, seed: int = 0) -> Runs:
    """Five sizes at three budgets, as the notebook has them, with losses of the true law and relative noise."""
    parameters = np.repeat([1.6e5, 2.5e5, 3.6e5, 7.2e5, 1.36e6], 3)
    tokens = np.tile([4e11, 1e12, 2.5e12], 5) / (6.5 * parameters)
    chance = np.random.default_rng(seed).standard_normal(15)
    return parameters, tokens, TRUE.loss(parameters, tokens) * np.exp(noise * chance)


def test_the_numbers_behind_exact_data_are_found() -> None:
    fit = fit_scaling(*runs(), resamples=20)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)
        low, high = fit.interval(name)
        assert low == pytest.approx(high, rel=1e-2)
    assert fit.predict(*LARGER)[0] == pytest.approx(float(TRUE.loss(*LARGER)), rel=1e-5)


@pytest.mark.slow
def test_bands_and_intervals_cover_the_truth_at_about_their_rate() -> None:
    noise, trials = 0.003, 60
    held = {"alpha": 0, "beta": 0, "E": 0, "band": 0}
    for seed in range(trials):
        fit = fit_scaling(*runs(noise, seed), resamples=200, seed=seed)
        outcome = TRUE.loss(*LARGER) * np.exp(noise * np.random.default_rng(1000 + seed).standard_normal())
        middle, low, high = fit.predict(*LARGER)
        assert low < middle < high
        held["band"] += int(low <= outcome <= high)
        for name in ("alpha", "beta", "E"):
            low, high = fit.interval(name)
            held[name] += int(low <= getattr(TRUE, name) <= high)
    assert all(0.75 <= count / trials <= 1 for count in held.values()), held  # of a stated 0.9
    assert min(held.values()) < trials, "bands that never miss say nothing"


def test_one_run_gone_wrong_pulls_less_than_least_squares_would() -> None:
    parameters, tokens, losses = runs()
    losses[7] *= 1.1
    assert fit_scaling(parameters, tokens, losses, resamples=1).predict(*LARGER)[0] == pytest.approx(
        float(TRUE.loss(*LARGER)), rel=0.01
    )


def test_bands_depend_on_the_seed_and_not_on_the_order_of_runs() -> None:
    parameters, tokens, losses = runs(0.003)
    one, two = (fit_scaling(parameters, tokens, losses, resamples=50, seed=3) for _ in range(2))
    assert one.predict(*LARGER) == two.predict(*LARGER) and one.interval("E") == two.interval("E")
    turned = fit_scaling(parameters[::-1], tokens[::-1], losses[::-1], resamples=1).law
    assert turned.loss(*LARGER) == pytest.approx(float(one.law.loss(*LARGER)), rel=1e-5)


def test_the_optimum_of_a_budget_is_the_best_way_to_spend_it() -> None:
    budgets = np.array([1e12, 1e15, 1e18])
    parameters, tokens = TRUE.optimum(budgets)
    assert 6 * parameters * tokens == pytest.approx(budgets)
    for size, text, budget in zip(parameters, tokens, budgets, strict=True):
        tried = size * np.geomspace(0.1, 10, 2001)
        assert tried[TRUE.loss(tried, budget / 6 / tried).argmin()] == pytest.approx(size, rel=0.01)
        assert TRUE.loss(size, text) <= TRUE.loss(tried, budget / 6 / tried).min() + 1e-12


def test_a_valley_is_found_where_it_is_and_only_there() -> None:
    sizes = np.geomspace(1e5, 1e6, 5)
    assert isoflop_minimum(sizes, 5 + np.log(sizes / 3e5) ** 2) == pytest.approx(3e5)
    assert isoflop_minimum(sizes, 5 + np.log(sizes / 3e6) ** 2) is None  # beyond the largest
    assert isoflop_minimum(sizes, 5 - np.log(sizes / 3e5) ** 2) is None  # a hill
    assert isoflop_minimum(sizes[:2], [5, 4]) is None


def test_runs_that_cannot_determine_a_law_are_refused_by_name() -> None:
    parameters, tokens, losses = runs()
    with pytest.raises(ScalingError, match="5 runs do not determine the law: 6"):
        fit_scaling(parameters[::3], tokens[::3], losses[::3])
    with pytest.raises(ScalingError, match="2 sizes of model"):
        fit_scaling(parameters[:6], tokens[:6], losses[:6])
    with pytest.raises(ScalingError, match="1 token counts"):
        fit_scaling(parameters, np.full(15, 1e6), losses)
    for bad in (np.nan, 0.0, -1.0):
        with pytest.raises(ScalingError, match="losses must be 15 finite numbers"):
            fit_scaling(parameters, tokens, np.where(np.arange(15) == 4, bad, losses))
    with pytest.raises(ScalingError, match="tokens must be 15"):
        fit_scaling(parameters, tokens[:14], losses)
