"""Whether the weighted draws know means and variances, and the pilots agree.

The probe of `diffsamp.diagnostics` looks for places where the sampler has nothing. A
sampler that has a little too little of something, such as the neck of a funnel, shows
in moments first. Two independent pilots say how well a pilot knows them: with f = x or
(x - c)^2 in one column, and a, b the means of f over the two,

    z = | own - (a + b) / 2 | / sqrt( se_own^2 + max(i var(f) / (2 N), (a - b)^2 / 4) ),

where i >= 1 is the mean over all f of (a - b)^2 / (2 var(f) / N): what two pilots
differ by, over what independent draws would. Pilots that differ by much from each other
(`FAR`) are witnesses of nothing, and that is said, too.

Weights of finite variance are not enough either: with a sampler whose tails are too
light, (x - c)^2 has its largest values where the weights are largest, and a handful of
draws decide about the variance. `imprecision` is the standard error of the least known
moment, that of the self-normalised estimate,

    se^2 = sum_n w_n^2 (f(x_n) - mean f)^2,    sum_n w_n = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffsamp import metrics
from diffsamp.types import ArrayLike

Z_LIMIT = 4.0
LARGE = {"mean": 0.05, "variance": 0.15}  # smaller differences are let pass
FAR = 0.3  # standard deviations between the means of two pilots
PRECISE = {"mean": 0.04, "variance": 0.08}  # largest standard errors


class Disagreement(NamedTuple):
    """The clearest difference.

    Attributes:
        what: "mean" or "variance".
        coordinate: index of the column.
        between_pilots: whether it is one between the pilots.
        size: in standard deviations, or relative to the variance.
        z: in standard errors.
    """

    what: str
    coordinate: int
    between_pilots: bool
    size: float
    z: float


class Imprecision(NamedTuple):
    """The moment that weighted draws know least.

    Attributes:
        what: "mean" or "variance".
        coordinate: index of the column.
        error: standard error, in standard deviations or relative to the variance; inf
            where there are no usable weights.
        excess: that over what `PRECISE` allows.
    """

    what: str
    coordinate: int
    error: float
    excess: float


def imprecision(x: ArrayLike, log_weight: ArrayLike) -> Imprecision:
    """The mean or variance that the draws know least.

    Args:
        x: draws, a column for each quantity, [N, D].
        log_weight: their log-weights, [N].

    Example:
        >>> import numpy as np
        >>> from diffsamp.numpyro.agreement import imprecision
        >>> x = np.random.default_rng(0).normal(size=(10_000, 2))
        >>> found = imprecision(x, np.zeros(10_000))
        >>> found.what, bool(found.excess < 1)
        ('mean', True)
    """
    x, weights = np.asarray(x, np.float64), _normalised(log_weight)
    if weights is None:
        return Imprecision("mean", 0, np.inf, np.inf)
    with np.errstate(all="ignore"):
        centre = np.sum(weights * x, axis=0)
        variance, variance_se = _moment((x - centre) ** 2, weights)
        _, mean_se = _moment(x, weights)
        errors = np.stack([mean_se / np.sqrt(variance), variance_se / variance])
    # A variance of 0 is that of a single draw with weight; none is of infinite draws.
    errors = np.where((variance > 0) & np.isfinite(errors), errors, np.inf)
    excess = errors / np.array(list(PRECISE.values()))[:, None]
    kind, coordinate = np.unravel_index(np.argmax(excess), excess.shape)
    return Imprecision(
        what=list(PRECISE)[kind],
        coordinate=int(coordinate),
        error=float(errors[kind, coordinate]),
        excess=float(excess[kind, coordinate]),
    )


def disagreement(
    x: ArrayLike, log_weight: ArrayLike, first: ArrayLike, second: ArrayLike
) -> Disagreement | None:
    """The clearest difference between draws and pilots, None where there is none.

    Args:
        x: draws, a column for each quantity, [N, D].
        log_weight: their log-weights, [N].
        first: points of a pilot, [M, D].
        second: of another, [M, D].

    Example:
        >>> import numpy as np
        >>> from diffsamp.numpyro.agreement import disagreement
        >>> rng = np.random.default_rng(0)
        >>> x, first, second = rng.normal(size=(3, 2_000, 2))
        >>> disagreement(x, np.zeros(2_000), first, second) is None
        True
        >>> disagreement(x + [0.0, 0.5], np.zeros(2_000), first, second).coordinate
        1
    """
    x, first, second = (np.asarray(v, np.float64) for v in (x, first, second))
    weights = _normalised(log_weight)
    if weights is None:
        return None  # the weights say so themselves
    centre = (first.mean(axis=0) + second.mean(axis=0)) / 2
    own, se, halves, spread = [], [], [], []
    for power in (1, 2):
        f, *pilots = ((v - centre) ** power for v in (x, first, second))
        mean, error = _moment(f, weights)
        own.append(mean)
        se.append(error)
        halves.append([v.mean(axis=0) for v in pilots])
        spread.append(np.mean([v.var(axis=0) for v in pilots], axis=0))
    own, se, halves, spread = map(np.array, (own, se, halves, spread))
    noise = spread / len(first)
    both, apart = halves.mean(axis=1), np.abs(halves[:, 0] - halves[:, 1])
    varies = noise > 0  # the square of what takes two values may not
    noise = np.where(varies, noise, 1.0)
    inflation = max(np.mean(apart**2 / (2 * noise), where=varies), 1.0)
    z_pilots = np.where(varies, apart / np.sqrt(2 * noise), 0.0)
    z = np.abs(own - both)
    z /= np.sqrt(se**2 + np.maximum(inflation * noise / 2, apart**2 / 4))
    unit = np.where(varies, np.stack([np.sqrt(both[1]), both[1]]), 1.0)
    size, gap = np.abs(own - both) / unit, apart[0] / unit[0]
    gap = np.where(z_pilots[0] > Z_LIMIT, gap, 0.0)
    if np.max(gap) > FAR:
        worst = int(np.argmax(gap))
        return Disagreement(
            "mean", worst, True, float(gap[worst]), float(z_pilots[0, worst])
        )
    limits = np.array(list(LARGE.values()))[:, None]
    z = np.where(varies & (size > limits), z, 0.0)
    kind, coordinate = np.unravel_index(np.argmax(z), z.shape)
    if z[kind, coordinate] <= Z_LIMIT:
        return None
    return Disagreement(
        what=list(LARGE)[kind],
        coordinate=int(coordinate),
        between_pilots=False,
        size=float(size[kind, coordinate]),
        z=float(z[kind, coordinate]),
    )


def _normalised(log_weight: ArrayLike) -> np.ndarray | None:
    """Weights of sum 1, [N, 1]; None where none is positive or one infinite."""
    try:
        return metrics.normalised_weights(np.asarray(log_weight))[:, None]
    except ValueError:
        return None


def _moment(f: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means of [N, D] and their standard errors."""
    mean = np.sum(weights * f, axis=0)
    return mean, np.sqrt(np.sum(weights**2 * (f - mean) ** 2, axis=0))
