"""The law finds the numbers that made its data, says how sure it is, and refuses runs that cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from llmcore.measure.scaling import (
    LeftOut,
    ScalingError,
    ScalingLaw,
    fit_scaling,
    isoflop_minimum,
    leave_out_budgets,
    needed_widening,
)

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
    noise, trials = 0.003, 40
    held = {"alpha": 0, "beta": 0, "E": 0, "band": 0}
    for seed in range(trials):
        fit = fit_scaling(*runs(noise, seed), resamples=100, seed=seed)
        outcome = TRUE.loss(*LARGER) * np.exp(noise * np.random.default_rng(1000 + seed).standard_normal())
        middle, low, high = fit.predict(*LARGER)
        assert low < middle < high
        held["band"] += int(low <= outcome <= high)
        for name in ("alpha", "beta", "E"):
            low, high = fit.interval(name)
            held[name] += int(low <= getattr(TRUE, name) <= high)
    assert all(0.75 <= count / trials <= 1 for count in held.values()), held  # of a stated 0.9
    assert min(held.values()) < trials, "bands that never miss say nothing"


def bent(share: float, budget: NDArray[np.float64]) -> NDArray[np.float64]:
    """A factor that no law has: it grows with the square of the log of compute."""
    return np.exp(share * np.log(budget / 2e12) ** 2)


def grid() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Parameters, tokens and budget of runs at four budgets, as the notebook has them."""
    budget = np.repeat([4e11, 8e11, 1.6e12, 3.2e12], 5)
    parameters = np.tile([0.35, 0.6, 1.0, 1.7, 2.8], 4) * 1e5 * np.sqrt(budget / 4e11)
    return parameters, budget / 6 / parameters, budget


@pytest.mark.slow
def test_a_widened_band_holds_most_runs_of_a_wrong_law_and_its_own_few() -> None:
    parameters, tokens, budget = grid()
    reach, trials, noise = 4.0, 24, 0.002
    size, text = np.array([6e5]), reach * budget.max() / 6 / np.array([6e5])
    held, widths = {"own": 0, "widened": 0, "own, right law": 0, "widened, right law": 0}, []
    for seed in range(trials):
        chance = np.random.default_rng(seed)
        share, errors = 0.004 * chance.choice([-1, 1]), noise * chance.standard_normal(budget.size + 1)
        for wrong in (0.0, share):
            losses = TRUE.loss(parameters, tokens) * bent(wrong, budget) * np.exp(errors[:-1])
            [outcome] = TRUE.loss(size, text) * bent(wrong, reach * budget.max()) * np.exp(errors[-1])
            fit = fit_scaling(parameters, tokens, losses, resamples=60)
            left = leave_out_budgets(parameters, tokens, losses, budget, resamples=60)
            for name, extra in (("own", 0.0), ("widened", needed_widening(left, np.log(reach)))):
                _, low, high = fit.predict(float(size[0]), float(text[0]), widening=extra)
                held[name if wrong else f"{name}, right law"] += int(low <= outcome <= high)
                widths.append(np.log(high / low))
    assert held["own"] <= 0.25 * trials, held
    assert held["widened"] >= 0.5 * trials, held
    assert held["own, right law"] >= 0.75 * trials and held["widened, right law"] >= 0.85 * trials, held
    assert np.median(widths) < 0.15, "a band that holds everything says nothing"


def test_runs_are_predicted_only_from_smaller_budgets() -> None:
    parameters, tokens, budget = grid()
    losses = TRUE.loss(parameters, tokens) * np.exp(0.002 * np.random.default_rng(0).standard_normal(budget.size))
    left = leave_out_budgets(parameters, tokens, losses, budget, resamples=20)
    small, middle = budget <= 8e11, budget <= 1.6e12
    assert [run.run for run in left] == [*np.flatnonzero(~middle), *np.flatnonzero(~small)]
    assert [round(float(np.exp(run.distance)), 6) for run in left] == [2] * 10 + [4] * 5
    alone = fit_scaling(parameters[small], tokens[small], losses[small], resamples=20)
    for run in left[5:]:
        band = run.predicted, run.low, run.high
        assert band == alone.predict(parameters[run.run], tokens[run.run])
        assert run.measured == losses[run.run]
    changed = losses * np.where(middle, 1, 1.5)
    for run, other in zip(left, leave_out_budgets(parameters, tokens, changed, budget, resamples=20), strict=True):
        assert (run.predicted, run.low, run.high) == (other.predicted, other.low, other.high)


def test_a_band_is_widened_until_it_holds_what_was_left_out() -> None:
    inside = LeftOut(0, 1.0, 5.0, 5.0, 4.9, 5.1)
    below, above = (
        LeftOut(1, 1.0, 4.9 * np.exp(-0.01), 5.0, 4.9, 5.1),
        LeftOut(2, 2.0, 5.1 * np.exp(0.08), 5.0, 4.9, 5.1),
    )
    assert needed_widening([inside], 3.0) == 0
    assert needed_widening([inside, below], 3.0) == pytest.approx(9 * 0.01)
    assert needed_widening([inside, below, above], 0.5) == pytest.approx(0.25 * 0.02)
    fit = fit_scaling(*runs(0.003), resamples=20)
    (middle, low, high), wide = fit.predict(*LARGER), fit.predict(*LARGER, widening=0.02)
    assert wide == pytest.approx((middle, low * np.exp(-0.02), high * np.exp(0.02)))


def test_too_few_budgets_leave_nothing_to_predict_from() -> None:
    parameters, tokens, budget = grid()
    losses = TRUE.loss(parameters, tokens)
    few = budget <= 8e11
    with pytest.raises(ScalingError, match="2 budgets: none can be left out; 3 or more"):
        leave_out_budgets(parameters[few], tokens[few], losses[few], budget[few])
    thin = np.r_[0, 1, 5, 6, 10:20]  # without the largest budget nine runs, without the two largest only four
    left = leave_out_budgets(parameters[thin], tokens[thin], losses[thin], budget[thin], resamples=1)
    assert {round(float(np.exp(run.distance))) for run in left} == {2}
    thinner = np.r_[0, 5, 10, 15:20]
    with pytest.raises(ScalingError, match="3 runs do not determine the law"):
        leave_out_budgets(parameters[thinner], tokens[thinner], losses[thinner], budget[thinner])


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
