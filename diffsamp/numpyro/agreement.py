"""Whether the weighted draws and the pilots agree about means and variances.

The probe of `diffsamp.diagnostics` looks for places where the sampler has nothing. A
sampler that has a little too little of something, such as the neck of a funnel, shows
in moments first. Two independent pilots say how well a pilot knows them: with f = x or
(x - c)^2 in one coordinate, and a, b the means of f over the two,

    z = | own - (a + b) / 2 | / sqrt( se_own^2 + i var(f) / (2 N) ),

where i >= 1 is the mean over all f of (a - b)^2 / (2 var(f) / N): what two pilots
differ by, over what independent draws would.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffsamp.types import ArrayLike

Z_LIMIT = 4.0
LARGE = {"mean": 0.05, "variance": 0.15}  # smaller differences are let pass


class Disagreement(NamedTuple):
    """The clearest difference.

    Attributes:
        what: "mean" or "variance".
        coordinate: index.
        size: in standard deviations, or relative to the variance.
        z: in standard errors.
    """

    what: str
    coordinate: int
    size: float
    z: float


def disagreement(
    x: ArrayLike, log_weight: ArrayLike, first: ArrayLike, second: ArrayLike
) -> Disagreement | None:
    """The clearest difference between draws and pilots, None where there is none.

    Args:
        x: draws, [N, D].
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
    log_weight = np.asarray(log_weight, np.float64)
    log_weight = np.where(np.isnan(log_weight), -np.inf, log_weight)
    top = np.max(log_weight)
    if not np.isfinite(top):
        return None  # the weights say so themselves
    weights = np.exp(log_weight - top)[:, None]
    weights = weights / weights.sum()
    centre = (first.mean(axis=0) + second.mean(axis=0)) / 2
    own, se, halves, spread = [], [], [], []
    for power in (1, 2):
        f, *pilots = ((v - centre) ** power for v in (x, first, second))
        mean = np.sum(weights * f, axis=0)
        own.append(mean)
        se.append(np.sqrt(np.sum(weights**2 * (f - mean) ** 2, axis=0)))
        halves.append([v.mean(axis=0) for v in pilots])
        spread.append(np.mean([v.var(axis=0) for v in pilots], axis=0))
    own, se, halves, spread = map(np.array, (own, se, halves, spread))
    noise = spread / len(first)
    both = halves.mean(axis=1)
    inflation = np.mean((halves[:, 0] - halves[:, 1]) ** 2 / (2 * noise))
    z = np.abs(own - both) / np.sqrt(se**2 + max(inflation, 1.0) * noise / 2)
    size = np.abs(own - both) / np.stack([np.sqrt(both[1]), both[1]])
    limits = np.array(list(LARGE.values()))[:, None]
    z = np.where(size > limits, z, 0.0)
    kind, coordinate = np.unravel_index(np.argmax(z), z.shape)
    if z[kind, coordinate] <= Z_LIMIT:
        return None
    return Disagreement(
        what=list(LARGE)[kind],
        coordinate=int(coordinate),
        size=float(size[kind, coordinate]),
        z=float(z[kind, coordinate]),
    )
