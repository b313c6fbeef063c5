"""A scaling law: the loss as a function of parameters and tokens, fitted to small runs and asked about a larger one.

    L(N, D) = E + A / N^alpha + B / D^beta

E is what no model can know of the text, the second term what N parameters are too few for, the third what D tokens are
too few to teach. Hoffmann et al., "Training compute-optimal large language models" (Chinchilla), arXiv:2203.15556,
section 3.3 and appendix D.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MIN_RUNS = 6  # runs: one more than there are numbers to fit
HUBER = 1e-2  # in log loss: runs further off than 1% pull with constant force (Hoffmann: 1e-3, with 400 runs)
STEPS = 150  # of the descent
START = np.array([0.2, 0.5, 1.0])  # exponents to start from
LOW, HIGH = np.array([-10.0, -10.0, -10.0, 0.02, 0.02]), np.array([5.0, 5.0, 5.0, 3.0, 3.0])


class ScalingError(ValueError):
    """These runs do not determine a law. The message says what is missing."""


def isoflop_minimum(parameters: ArrayLike, losses: ArrayLike) -> float | None:
    """The size at the bottom of the parabola in log N through runs of equal compute.

    None if there are fewer than three, or the bottom does not lie between the sizes tried.
    """
    n, loss = np.asarray(parameters, float), np.asarray(losses, float)
    if n.size < 3:
        return None
    bend, slope, _ = map(float, np.polyfit(np.log(n), loss, 2))
    bottom = float(np.exp(-slope / (2 * bend))) if bend > 0 else 0.0
    return bottom if n.min() <= bottom <= n.max() else None


@dataclass(frozen=True)
class ScalingLaw:
    """The five numbers of a law, or arrays of them for many laws at once.

    Attributes:
        E: nats per token that remain with endless parameters and tokens.
        A: with N = 1, nats per token that parameters are too few for.
        B: with D = 1, nats per token that tokens are too few for.
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
        """Parameters and tokens that a budget is best spent on, where it costs 6 N D FLOPs (Hoffmann, equation 4)."""
        product = np.asarray(flops, float) / 6
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * product ** (self.beta / (self.alpha + self.beta))
        return parameters, product / parameters


@dataclass(frozen=True)
class ScalingFit:
    """A law with what the runs leave open of it.

    Attributes:
        law: the best fit to all runs.
        resampled: the best fits to runs drawn again with replacement, as one law of arrays (resamples,).
        residuals: log of measured over fitted loss for each run, (runs,).
    """

    law: ScalingLaw
    resampled: ScalingLaw
    residuals: Floats

    def interval(self, name: str, share: float = 0.9) -> tuple[float, float]:
        """Where the middle `share` of the resampled fits have one of the law's numbers."""
        low, high = _middle(getattr(self.resampled, name), share)
        return low, high

    def predict(
        self, parameters: float, tokens: float, share: float = 0.9, seed: int = 0
    ) -> tuple[float, float, float]:
        """The loss of a run that was not fitted, and the band that holds it with probability `share`.

        The band adds up two things: how the law changes with the runs it was fitted to, and how far single runs lie
        from it, which is taken from the residuals, made larger for the five numbers that they were fitted with.

        Returns:
            Prediction, lower and upper end, nats per token.
        """
        runs = len(self.residuals)
        noise = np.sqrt(np.mean(self.residuals**2) * runs / (runs - 5))
        laws = self.resampled.loss(parameters, tokens)
        outcomes = laws * np.exp(noise * np.random.default_rng(seed).standard_normal(laws.shape))
        return (float(self.law.loss(parameters, tokens)), *_middle(outcomes, share))


def fit_scaling(
    parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, resamples: int = 1000, seed: int = 0
) -> ScalingFit:
    """Fit the law to the last losses of runs, and once more to each of many resamples of the runs (bootstrap).

    Args:
        parameters: of each run's model, (runs,).
        tokens: that each run was trained on, (runs,).
        losses: nats per token, each from a schedule that ended at that run's last token, (runs,).
        resamples: how many.
        seed: of the resampling.

    Raises:
        ScalingError: if the runs are too few, or too much alike, or a value is not above 0.
    """
    n, d, loss = (np.asarray(values, float) for values in (parameters, tokens, losses))
    for name, values in (("parameters", n), ("tokens", d), ("losses", loss)):
        if values.shape != (n.size,) or not (np.isfinite(values) & (values > 0)).all():
            raise ScalingError(f"{name} must be {n.size} finite numbers above 0, one a run")
    for name, values, fewest in (
        ("runs", np.arange(n.size), MIN_RUNS),
        ("sizes of model", n, 3),
        ("token counts", d, 3),
    ):
        if len(np.unique(values)) < fewest:
            raise ScalingError(f"{len(np.unique(values))} {name} do not determine the law: {fewest} or more do")
    counts = _resample(n, d, resamples, np.random.default_rng(seed))
    middle = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    x, y, target = np.log(n / middle[0]), np.log(d / middle[1]), np.log(loss)
    terms = [[np.log(loss.min() * e), np.log(loss.min() * (1 - e) / 2)] for e in (0.3, 0.6, 0.9)]
    starts = np.array([[e, rest, rest, a, b] for e, rest in terms for a in START for b in START])
    ends, cost = _descend(starts, np.ones((len(starts), n.size)), x, y, target)
    best = ends[cost.argmin()]
    again, _ = _descend(np.tile(best, (resamples, 1)), counts, x, y, target)

    def law(theta: Floats) -> ScalingLaw:
        e, a, b, alpha, beta = theta.T
        return ScalingLaw(np.exp(e), np.exp(a) * middle[0] ** alpha, np.exp(b) * middle[1] ** beta, alpha, beta)

    return ScalingFit(law(best), law(again), target - np.log(law(best).loss(n, d)))


def _resample(n: Floats, d: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """How often each run is in each resample, (resamples, runs); only draws that could determine a law."""
    drawn: list[Floats] = []
    while len(drawn) < resamples:
        chosen = rng.integers(n.size, size=n.size)
        if len(np.unique(chosen)) >= MIN_RUNS and min(len(np.unique(v[chosen])) for v in (n, d)) >= 3:
            drawn.append(np.bincount(chosen, minlength=n.size).astype(float))
    return np.array(drawn)


def _descend(theta: Floats, counts: Floats, x: Floats, y: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Lower Huber's loss of the log residuals from many starts at once, by damped Gauss-Newton steps.

    Args:
        theta: (starts, 5): log of E, of A and B in the middle of the runs, alpha, beta. Logs keep them above 0.
        counts: the weight of each run for each start, (starts, runs).
        x: log parameters, from the middle of the runs, (runs,).
        y: log tokens, likewise.
        target: log loss, (runs,).

    Returns:
        theta at the end of each, and Huber's loss there.
    """

    def terms(theta: Floats) -> Floats:
        e, a, b, alpha, beta = theta.T[..., None]
        return np.exp(np.stack([e + 0 * x, a - alpha * x, b - beta * y]))  # (3, starts, runs)

    def huber(residual: Floats) -> Floats:
        size = np.abs(residual)
        return (counts * np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2))).sum(1)

    damping = np.full(len(theta), 1e-2)
    parts = terms(theta)
    residual = np.log(parts.sum(0)) - target
    cost = huber(residual)
    for _ in range(STEPS):
        shares = parts / parts.sum(0)
        slope = np.stack([*shares, -x * shares[1], -y * shares[2]], axis=-1)  # (starts, runs, 5)
        weight = (counts * np.minimum(1, HUBER / np.maximum(np.abs(residual), 1e-12)))[..., None]
        curvature = slope.mT @ (weight * slope)
        gradient = slope.mT @ (weight * residual[..., None])
        ridge = np.einsum("sii->si", curvature) + 1e-9
        step = np.linalg.solve(curvature + np.eye(5) * (damping[:, None] * ridge)[:, None], gradient)[..., 0]
        trial = np.clip(theta - step, LOW, HIGH)
        trial_parts = terms(trial)
        trial_residual = np.log(trial_parts.sum(0)) - target
        trial_cost = huber(trial_residual)
        better = trial_cost < cost
        theta, cost = np.where(better[:, None], trial, theta), np.where(better, trial_cost, cost)
        parts, residual = (
            np.where(better[:, None], trial_parts, parts),
            np.where(better[:, None], trial_residual, residual),
        )
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-6, 1e6)
    return theta, cost


def _middle(values: Floats, share: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
