"""A scaling law: the loss as a function of parameters and tokens, fitted to small runs, to predict a larger one.

    L(N, D) = E + A / N^alpha + B / D^beta

E is the loss that remains for any model. The second term is there because the model has only N parameters, the third
because it was trained on only D tokens. Hoffmann et al., "Training compute-optimal large language models" (Chinchilla),
arXiv:2203.15556, section 3.3 and appendix D.3. The fit follows Besiroglu et al., "Chinchilla scaling: a replication
attempt", arXiv:2404.10102: the costs of the runs are added up, not averaged, and every fit goes on to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MIN_RUNS = 6  # one more than the law has numbers
HUBER_DELTA = 1e-3  # in log loss: beyond 0.1% a residual's cost grows linearly (Hoffmann; Besiroglu)
GAUSS_NEWTON_STEPS = 400  # where the runs hardly determine E, its lower end needs so many
START_EXPONENTS = np.array([0.2, 0.5, 1.0])
# bounds of log E, log A, log B, alpha and beta
LOW, HIGH = np.array([-10.0, -10.0, -10.0, 0.02, 0.02]), np.array([5.0, 5.0, 5.0, 3.0, 3.0])


class ScalingError(ValueError):
    """The runs do not determine a law. The message says what is missing."""


def isoflop_minimum(parameters: ArrayLike, losses: ArrayLike) -> float | None:
    """The size at the minimum of the parabola in log N through runs of equal compute.

    None for fewer than three runs, or if the minimum does not lie between the sizes of the runs.
    """
    n, loss = np.asarray(parameters, float), np.asarray(losses, float)
    if n.size < 3:
        return None
    curvature, slope, _ = map(float, np.polyfit(np.log(n), loss, 2))
    if curvature <= 0:
        return None
    minimum = float(np.exp(-slope / (2 * curvature)))
    return minimum if n.min() <= minimum <= n.max() else None


@dataclass(frozen=True)
class ScalingLaw:
    """The five numbers of a law, or arrays of them for many laws at once.

    Attributes:
        E: nats per token that remain with infinitely many parameters and tokens.
        A: the second term at N = 1, nats per token.
        B: the third term at D = 1, nats per token.
        alpha: exponent of the parameters.
        beta: exponent of the tokens.
    """

    E: Floats
    A: Floats
    B: Floats
    alpha: Floats
    beta: Floats

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        """Nats per token of a model of `parameters` trained on `tokens`; arrays broadcast with the law's."""
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def optimum(self, flops: ArrayLike) -> tuple[Floats, Floats]:
        """Parameters and tokens with the lowest loss for a budget of 6 N D FLOPs (Hoffmann, equation 4)."""
        product = np.asarray(flops, float) / 6
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * product ** (self.beta / (self.alpha + self.beta))
        return parameters, product / parameters


@dataclass(frozen=True)
class ScalingFit:
    """A law, and how uncertain it is.

    Attributes:
        law: the best fit to all runs.
        resampled: the best fits to runs drawn with replacement (bootstrap), as a law of arrays (resamples,).
        residuals: log of measured over fitted loss for each run, (runs,).
    """

    law: ScalingLaw
    resampled: ScalingLaw
    residuals: Floats

    def interval(self, name: str, share: float = 0.9) -> tuple[float, float]:
        """The interval of one of the law's numbers that holds the middle `share` of the resampled fits."""
        low, high = _middle(getattr(self.resampled, name), share)
        return low, high

    def predict(
        self, parameters: float, tokens: float, share: float = 0.9, seed: int = 0, widening: float = 0.0
    ) -> tuple[float, float, float]:
        """The loss of a run that was not fitted, and the band that holds it with probability `share`.

        The band has two parts: how much the law changes with the runs that it was fitted to, and how far a single run
        lies from the law. The second comes from the residuals, which are made larger because five numbers were fitted.
        Neither knows how wrong the law becomes beyond its runs: `widening` is for that.

        Args:
            parameters, tokens: of the run.
            share: probability.
            seed: of the second part.
            widening: moves both ends outwards, in log loss; see `needed_widening`.

        Returns:
            Prediction, lower and upper end, nats per token.
        """
        runs = len(self.residuals)
        noise = np.sqrt(np.mean(self.residuals**2) * runs / (runs - 5))
        laws = self.resampled.loss(parameters, tokens)
        outcomes = laws * np.exp(noise * np.random.default_rng(seed).standard_normal(laws.shape))
        low, high = _middle(outcomes, share)
        predicted = float(self.law.loss(parameters, tokens))
        return predicted, float(low * np.exp(-widening)), float(high * np.exp(widening))


def fit_scaling(
    parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, resamples: int = 1000, seed: int = 0
) -> ScalingFit:
    """Fit the law to the last losses of runs, and again to many resamples of the runs (bootstrap).

    Args:
        parameters: of each run's model, (runs,).
        tokens: that each run was trained on, (runs,).
        losses: nats per token, (runs,). Each run's schedule must have ended at its last token.
        resamples: number of resamples.
        seed: of the resampling.

    Raises:
        ScalingError: if there are too few runs, or they are too similar, or a value is not above 0.
    """
    n, d, loss = (np.asarray(values, float) for values in (parameters, tokens, losses))
    _check_runs(n, d, loss)
    counts = _resample(n, d, resamples, np.random.default_rng(seed))

    # fit in logs, with N and D relative to the middle of the runs: there A and B depend little on the exponents
    middle_n, middle_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    x, y, target = np.log(n / middle_n), np.log(d / middle_d), np.log(loss)
    terms = [[np.log(loss.min() * share), np.log(loss.min() * (1 - share) / 2)] for share in (0.3, 0.6, 0.9)]
    starts = np.array([[e, rest, rest, a, b] for e, rest in terms for a in START_EXPONENTS for b in START_EXPONENTS])
    ends, costs = _descend(starts, np.ones((len(starts), n.size)), x, y, target)
    best = ends[costs.argmin()]
    resampled, _ = _descend(np.tile(best, (resamples, 1)), counts, x, y, target)

    def law(theta: Floats) -> ScalingLaw:
        e, a, b, alpha, beta = theta.T
        return ScalingLaw(np.exp(e), np.exp(a) * middle_n**alpha, np.exp(b) * middle_d**beta, alpha, beta)

    return ScalingFit(law(best), law(resampled), target - np.log(law(best).loss(n, d)))


@dataclass(frozen=True)
class LeftOut:
    """A run that was predicted from runs of smaller budgets only.

    Attributes:
        run: its place among all runs.
        distance: log of its budget over the largest budget that was fitted.
        measured, predicted, low, high: nats per token.
    """

    run: int
    distance: float
    measured: float
    predicted: float
    low: float
    high: float


def leave_out_budgets(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    budgets: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
) -> list[LeftOut]:
    """Leave out the largest budget, fit the law to the others, predict; then leave out the two largest, and so on.

    At least two budgets are fitted: one says nothing of how the loss falls with compute.

    Args:
        parameters, tokens, losses, resamples, seed: as for `fit_scaling`.
        budgets: the budget of each run in FLOPs, the same number for all runs of a budget, (runs,).

    Raises:
        ScalingError: if not even the runs without the largest budget determine a law.
    """
    n, d, loss, budget = (np.asarray(values, float) for values in (parameters, tokens, losses, budgets))
    known = np.unique(budget)
    if len(known) < 3:
        raise ScalingError(f"{len(known)} budgets: none can be left out; 3 or more are needed")
    left: list[LeftOut] = []
    for largest in known[-2:0:-1]:
        small = budget <= largest
        try:
            fit = fit_scaling(n[small], d[small], loss[small], resamples, seed)
        except ScalingError:
            if not left:
                raise
            break
        for run in np.flatnonzero(~small):
            band = fit.predict(n[run], d[run], seed=seed)
            left.append(LeftOut(int(run), float(np.log(budget[run] / largest)), float(loss[run]), *band))
    return left


def needed_widening(left: Sequence[LeftOut], distance: float) -> float:
    """What to add to both ends of a band, in log loss, for a run at `distance` from the budgets that were fitted.

    A law that is fitted to its runs has about the right value and slope there. What it first gets wrong is the
    curvature, so its error grows with the square of the distance. The factor is the smallest for which the widened
    bands hold all runs that were left out. This is a calibration by few runs, not a promise of the band's `share`.
    """
    outside = [max(0.0, np.log(run.low / run.measured), np.log(run.measured / run.high)) for run in left]
    return distance**2 * max(out / run.distance**2 for out, run in zip(outside, left, strict=True))


def _check_runs(n: Floats, d: Floats, loss: Floats) -> None:
    """Refuse runs that do not determine a law. Raises ScalingError."""
    for name, values in (("parameters", n), ("tokens", d), ("losses", loss)):
        if values.shape != (n.size,) or not (np.isfinite(values) & (values > 0)).all():
            raise ScalingError(f"{name} must be {n.size} finite numbers above 0, one for each run")
    for name, number, needed in (
        ("runs", n.size, MIN_RUNS),
        ("sizes of model", len(np.unique(n)), 3),
        ("token counts", len(np.unique(d)), 3),
    ):
        if number < needed:
            raise ScalingError(f"{number} {name} do not determine the law: {needed} or more are needed")


def _resample(n: Floats, d: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """How often each run is in each resample, (resamples, runs). Draws that do not determine a law are left out."""
    counts: list[Floats] = []
    while len(counts) < resamples:
        drawn = rng.integers(n.size, size=n.size)
        if len(np.unique(drawn)) >= MIN_RUNS and min(len(np.unique(values[drawn])) for values in (n, d)) >= 3:
            counts.append(np.bincount(drawn, minlength=n.size).astype(float))
    return np.array(counts)


def _descend(theta: Floats, counts: Floats, x: Floats, y: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Lower Huber's loss of the log residuals from many starts at once, by damped Gauss-Newton steps.

    Args:
        theta: (starts, 5): logs of E, and of A and B in the middle of the runs; alpha, beta.
        counts: the weight of each run for each start, (starts, runs).
        x: log parameters, from the middle of the runs, (runs,).
        y: log tokens, likewise.
        target: log loss, (runs,).

    Returns:
        theta at each end, (starts, 5), and Huber's loss there, (starts,).
    """

    def terms(theta: Floats) -> Floats:
        """The law's three terms for each run."""
        e, a, b, alpha, beta = theta.T[..., None]
        return np.exp(np.stack([e + 0 * x, a - alpha * x, b - beta * y]))  # (3, starts, runs)

    def huber(residual: Floats) -> Floats:
        size = np.abs(residual)
        return (counts * np.where(size < HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))).sum(1)

    damping = np.full(len(theta), 1e-2)
    parts = terms(theta)
    residual = np.log(parts.sum(0)) - target
    cost = huber(residual)
    for _ in range(GAUSS_NEWTON_STEPS):
        # the step: slopes of the log loss in theta, and weights that make a square of Huber's loss
        shares = parts / parts.sum(0)
        slope = np.stack([*shares, -x * shares[1], -y * shares[2]], axis=-1)  # (starts, runs, 5)
        weight = (counts * np.minimum(1, HUBER_DELTA / np.maximum(np.abs(residual), 1e-12)))[..., None]
        curvature = slope.mT @ (weight * slope)
        gradient = slope.mT @ (weight * residual[..., None])
        ridge = np.einsum("sii->si", curvature) + 1e-9
        step = np.linalg.solve(curvature + np.eye(5) * (damping[:, None] * ridge)[:, None], gradient)[..., 0]

        # keep it where it lowers the cost, with less damping next time; elsewhere try a shorter one
        trial = np.clip(theta - step, LOW, HIGH)
        trial_parts = terms(trial)
        trial_residual = np.log(trial_parts.sum(0)) - target
        trial_cost = huber(trial_residual)
        better = trial_cost < cost
        theta = np.where(better[:, None], trial, theta)
        parts = np.where(better[:, None], trial_parts, parts)
        residual = np.where(better[:, None], trial_residual, residual)
        cost = np.where(better, trial_cost, cost)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-6, 1e6)
    return theta, cost


def _middle(values: Floats, share: float) -> tuple[float, float]:
    """The ends of the middle `share` of the values."""
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
