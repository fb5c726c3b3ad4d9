"""Gaussian mixtures fitted to points of a target, for samplers that start from one.

Expectation maximisation (Dempster, Laird and Rubin 1977), started by k-means++ (Arthur
and Vassilvitskii 2007) with distances in units of the mean covariance within half as
many components, so that narrow modes side by side are far apart. The points of a
component may be few: to its covariance D + 1 points of that mean covariance are added,
which does not depend on the coordinates. The number of components is the smallest power
of two that fits points left out about best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.special import logsumexp

from diffsamp.types import Array, ArrayLike, Params

MOST_COMPONENTS = 128
_POINTS_EACH = 64  # points per component, at least, and 4 D
_MOST_ITERATIONS = 100
_ENOUGH = 1e-3  # nats per point that an iteration still gains
_SMALL = 0.02  # nats per point, for which no more components are taken
_LEFT_OUT = 0.2  # share of the points, the last ones


class Mixture(NamedTuple):
    """A mixture of M normal distributions.

    Attributes:
        log_weights: normalised, [M].
        means: [M, D].
        covariances: [M, D, D].
    """

    log_weights: Array
    means: Array
    covariances: Array


def fit_mixture(points: ArrayLike) -> tuple[Mixture, float]:
    """A mixture that fits points, with full covariances.

    Args:
        points: [N, D], at least two, in the order in which they were made: the last
            fifth is left out, so that copies of one particle, and neighbours in a
            chain, are on one side.

    Returns:
        The mixture, and how much better it fits points that were left out than a single
        normal distribution does, in nats per point: 0 where it has one component.

    Raises:
        ValueError: when points are fewer than two or not finite.

    Example:
        >>> import numpy as np
        >>> from diffsamp.mixtures import fit_mixture
        >>> rng = np.random.default_rng(0)
        >>> mode = rng.choice([-5.0, 5.0], p=[0.3, 0.7], size=(1_000, 1))
        >>> mixture, gain = fit_mixture(mode + rng.normal(size=(1_000, 2)) * [1.0, 0.1])
        >>> np.sort(np.exp(mixture.log_weights)).round(1)
        array([0.3, 0.7])
    """
    x = np.asarray(points, np.float64)
    if x.ndim != 2 or len(x) < 2 or not np.all(np.isfinite(x)):
        raise ValueError(
            "points must be finite, of shape [N, D] with N of 2 or more, got shape "
            f"{list(x.shape)}; drop those that are not finite"
        )
    rng = np.random.default_rng(0)
    num_seen = min(math.ceil((1 - _LEFT_OUT) * len(x)), len(x) - 1)
    seen, left_out = x[:num_seen], x[num_seen:]
    mixture, found = None, []
    most = min(MOST_COMPONENTS, len(x) // max(_POINTS_EACH, 4 * x.shape[1]))
    count, fits = 1, []
    while count <= max(most, 1):
        mixture = _improved(seen, _started(rng, seen, count, mixture))
        found.append(mixture)
        fits.append(float(np.mean(log_density(mixture, left_out))))
        if len(fits) > 2 and fits[-1] < max(fits) and fits[-2] < max(fits):
            break
        count *= 2
    best = int(np.argmax(np.array(fits) >= max(fits) - _SMALL))
    return _improved(x, found[best]), fits[best] - fits[0]


def log_density(mixture: Mixture, points: ArrayLike) -> np.ndarray:
    """Log-density of a mixture at points [N, D], [N], on the host."""
    return np.asarray(
        logsumexp(_joint(mixture, np.asarray(points, np.float64)), axis=1)
    )


def with_mixture(params: Params, mixture: Mixture) -> Params:
    """Parameters of a `samplers.gmp` with its mixture replaced.

    Args:
        params: from ``init`` of a sampler with as many components.
        mixture: in unit coordinates of the sampler.

    Raises:
        ValueError: when the sampler starts from no mixture, or one of another shape.

    Example:
        >>> import jax, numpy as np, diffsamp as ds
        >>> from diffsamp.mixtures import Mixture, with_mixture
        >>> means = np.array([[-2.0, 0.0], [2.0, 0.0]])
        >>> two = Mixture(np.log([0.5, 0.5]), means, np.stack([0.1 * np.eye(2)] * 2))
        >>> sampler = ds.samplers.gmp(dim=2, num_components=2, num_steps=4)
        >>> params = with_mixture(sampler.init(jax.random.key(0)), two)
        >>> params["prior"]["means"][1].tolist()
        [2.0, 0.0]
    """
    if "prior" not in params or not isinstance(params["generation"], Mapping):
        raise ValueError(
            "params must be those of a sampler that starts from a mixture "
            f"(ds.samplers.gmp), got those of {sorted(params)}"
        )
    count, size = np.shape(params["prior"]["means"])
    shapes = [(count,), (count, size), (count, size, size)]
    found = [np.shape(field) for field in mixture]
    if found != shapes or not all(np.all(np.isfinite(field)) for field in mixture):
        raise ValueError(
            f"mixture must be finite, with arrays of shapes {shapes}, as the sampler "
            f"has, got {found}"
        )
    variances, axes = np.linalg.eigh(np.asarray(mixture.covariances, np.float64))
    widths = np.sqrt(np.maximum(variances, 0.0))
    logits, means = mixture.log_weights, mixture.means
    prior = {"logits": logits, "means": means, "factors": axes * widths[:, None]}
    known = {"logits": logits, "means": means, "axes": axes, "widths": widths}
    generation = dict(params["generation"])
    inner = generation.get("params", {})
    if "mixture" in inner:
        generation["params"] = {**inner, "mixture": _like(inner["mixture"], known)}
    prior = _like(params["prior"], prior)
    return {**params, "prior": prior, "generation": generation}


def trainable(params: Params) -> Params:
    """Which parameters training moves: all but mixtures.

    A mixture gets no gradient, but weight decay, for one, would move it all the same.

    Args:
        params: of a sampler, or ``{"sampler": ..., "objective": ...}``.

    Returns:
        A tree of bools of the same structure.

    Example:
        >>> import optax, diffsamp as ds
        >>> optimizer = optax.masked(optax.adamw(1e-3), ds.mixtures.trainable)
    """

    def moves(path, _):
        names = {getattr(part, "key", None) for part in path}
        return not names & {"prior", "mixture"}

    return jax.tree_util.tree_map_with_path(moves, params)


def _like(old: Params, new: dict) -> Params:
    return jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), old, new)


def _started(rng, x, count, before: Mixture | None) -> Mixture:
    """A mixture from k-means, with distances in widths of the components before."""
    flat = x
    if before is not None:
        within = np.tensordot(np.exp(before.log_weights), before.covariances, 1)
        flat = scipy.linalg.solve_triangular(
            np.linalg.cholesky(within), x.T, lower=True
        ).T
    return _maximised(x, np.eye(count)[_nearest(flat, _centres(rng, flat, count))])


def _improved(x, mixture: Mixture) -> Mixture:
    """Expectation and maximisation in turn, until that gains little."""
    before = -np.inf
    for _ in range(_MOST_ITERATIONS):
        joint = _joint(mixture, x)
        total = np.asarray(logsumexp(joint, axis=1, keepdims=True))
        if not np.mean(total) - before > _ENOUGH:
            break
        before = np.mean(total)
        mixture = _maximised(x, np.exp(joint - total))
    return mixture


def _joint(mixture: Mixture, x):
    """Log-density of each component at each point, times its weight, [N, M]."""
    size, columns = x.shape[1], []
    for log_weight, mean, covariance in zip(*map(np.asarray, mixture), strict=True):
        factor = np.linalg.cholesky(covariance)
        z = scipy.linalg.solve_triangular(factor, (x - mean).T, lower=True)
        log_det = np.sum(np.log(np.diagonal(factor)))
        columns.append(log_weight - log_det - 0.5 * np.sum(z**2, axis=0))
    return np.stack(columns, axis=1) - 0.5 * size * np.log(2 * np.pi)


def _maximised(x, share) -> Mixture:
    """The mixture for given shares of components in points, [N, M]."""
    num_points, size = x.shape
    counts = share.sum(axis=0) + 1e-9
    means = share.T @ x / counts[:, None]
    scatter = np.stack(
        [((x - m).T * s) @ (x - m) for m, s in zip(means, share.T, strict=True)]
    )
    within, added = scatter.sum(axis=0) / num_points, size + 1.0
    within += (1e-9 * np.trace(within) / size + 1e-30) * np.eye(size)
    covariances = (scatter + added * within) / (counts + added)[:, None, None]
    return Mixture(np.log(counts / counts.sum()), means, covariances)


def _centres(rng, x, count, num_iterations=10):
    """Centres of k-means, [count, D]."""
    centres = [x[rng.integers(len(x))]]
    distance = np.sum((x - centres[0]) ** 2, axis=1)
    for _ in range(count - 1):
        total = distance.sum()
        chances = distance / total if total > 0 else None
        centres.append(x[rng.choice(len(x), p=chances)])
        distance = np.minimum(distance, np.sum((x - centres[-1]) ** 2, axis=1))
    centres = np.array(centres)
    for _ in range(num_iterations):
        member = np.eye(count)[_nearest(x, centres)]
        counts = member.sum(axis=0)[:, None]
        centres = np.where(counts > 0, member.T @ x / np.maximum(counts, 1), centres)
    return centres


def _nearest(x, centres):
    return np.argmin(np.sum(centres**2, axis=1) - 2 * x @ centres.T, axis=1)
