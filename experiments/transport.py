"""Transport distances between sets of points over their floors, with little noise.

A set of N points is compared with an exact set of N, and beside it two exact sets with
one another, the floor. Where a target has far modes, W2 and Sinkhorn's divergence D
follow how many of the N points each mode happened to get, and little else. The cheapest
transport between two vectors of mode shares, squared distance of mode centres as price,

    T(p, q) = min over plans with margins p and q of sum_ij plan_ij |c_i - c_j|^2,

is a control variate: its mean over sets of N is had without transporting a point (the
shares of exact sets are multinomial, those of sets cut from given draws
hypergeometric). ``D - slope (T - E T)`` has the mean of D and, between exact sets of
gmm9, a fifth (Sinkhorn) or an eighth (W2) of its standard deviation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import diffsamp as ds

SINKHORN_POINTS = 1_000  # in a set, at most
SIMULATIONS = 50  # of mode shares for each pair of sets


class Controlled(NamedTuple):
    """Means of the pair ``(found, floor)``, and the noise of their difference."""

    found: float
    floor: float
    noise: float


class Pair(NamedTuple):
    """Two exact sets, the entropy for their target, and their own distances."""

    exact: np.ndarray
    other: np.ndarray
    epsilon: float
    floors: dict[str, float]


def exact_pairs(key, target, size, num_repeats):
    """What sets of ``size`` points are compared with, for `distances`."""
    pairs = []
    for repeat in range(num_repeats):
        keys = jax.random.split(jax.random.fold_in(key, repeat), 2)
        exact, other = (np.asarray(target.sample(k, size)) for k in keys)
        few = exact[:SINKHORN_POINTS]
        epsilon = 0.05 * float(np.sum(np.var(few, axis=0)))
        pair = Pair(exact, other, epsilon, {})
        pairs.append(pair._replace(floors=between(pair, other)))
    return pairs


def between(pair, points):
    """W2 and Sinkhorn's divergence of points from an exact set, with one entropy."""
    few = slice(SINKHORN_POINTS)
    return {
        "w2": ds.metrics.wasserstein2(points, pair.exact),
        "sinkhorn": sinkhorn(points[few], pair.exact[few], pair.epsilon),
    }


def distances(key, target, points, num_repeats, pairs=None):
    """W2 and Sinkhorn on disjoint sets of points over their floors, and the noise.

    The points are cut into ``num_repeats`` sets, of which each has its pair of exact
    ones: ``pairs``, or those of the key. NaN where a point is not finite or Sinkhorn
    does not converge.
    """
    size = len(points) // num_repeats
    pairs = pairs or exact_pairs(key, target, size, num_repeats)
    parts = [points[i * size : (i + 1) * size] for i in range(num_repeats)]
    sets = [(x, p.other, p.exact) for x, p in zip(parts, pairs, strict=True)]
    found = [between(*both) for both in zip(pairs, parts, strict=True)]
    out, centres, used = {"num_repeats": num_repeats}, None, points[: size * len(parts)]
    if target.modes is not None and np.all(np.isfinite(used)):
        centres = mode_centres(jax.random.fold_in(key, num_repeats), target)
    for name, num, power in (
        ("w2", size, 0.5),
        ("sinkhorn", min(size, SINKHORN_POINTS), 1.0),
    ):
        controls = None
        if centres is not None:
            shares = [[mode_shares(target.modes, x[:num]) for x in s] for s in sets]
            price = np.sum((centres[:, None] - centres[None, :]) ** 2, axis=2)
            counts = np.rint(mode_shares(target.modes, used) * len(used)).astype(int)
            weights = np.asarray(target.modes.weights, np.float64)
            controls = controls_of(price, counts, weights, shares, num, power)
        values = [[f[name], p.floors[name]] for f, p in zip(found, pairs, strict=True)]
        mean = controlled(np.array(values), controls)
        out[name], out[f"{name}_floor"] = mean.found, mean.floor
        out[f"{name}_ratio"] = mean.found / mean.floor
        out[f"{name}_ratio_se"] = mean.noise / mean.floor
    return out


def sinkhorn(x, y, epsilon):
    """NaN where it has not converged."""
    found = ds.metrics.sinkhorn_divergence(
        x, y, epsilon=epsilon, require_convergence=False
    )
    return found.value if found.converged else np.nan


def controlled(values, controls=None):
    """Means of pairs, with the noise taken out that controls explain.

    Args:
        values: ``(found, floor)`` of each repeat, [R, 2].
        controls: their control variates [R, 2] and many more draws of these [S, 2].
    """
    extra = 0.0
    if controls is not None:
        beside, simulated = controls
        spread, moved = (v - v.mean(axis=0) for v in (beside, values))
        slope = np.sum(spread * moved) / max(np.sum(spread**2), 1e-30)
        values = values - slope * (beside - simulated.mean(axis=0))
        extra = slope**2 * np.var(np.diff(simulated, axis=1)) / len(simulated)
    found, floor = values.T
    noise = np.var(found - floor, ddof=1) / len(values) + extra
    return Controlled(found.mean(), floor.mean(), np.sqrt(noise))


def controls_of(price, counts, weights, shares, num_points, power):
    """Control variates of pairs of sets, and many draws of their law.

    Args:
        price: of a share from one mode to another, [M, M].
        counts: how many of all draws lie in each mode, [M].
        weights: of the modes of the target, [M].
        shares: mode shares of draws, an exact set and another one, for each repeat.
        num_points: in a set.
        power: of the transport cost, 1/2 where a distance is not squared.
    """

    def pair(part, other, exact):
        return [transport(price, p, exact) ** power for p in (part, other)]

    beside = np.array([pair(*three) for three in shares])
    rng = np.random.default_rng(0)
    simulated = []
    for _ in range(SIMULATIONS * len(shares)):
        part = rng.multivariate_hypergeometric(counts, num_points)
        exact = rng.multinomial(num_points, weights / weights.sum(), size=2)
        simulated.append(pair(*(np.stack([part, *exact]) / num_points)))
    return beside, np.array(simulated)


def transport(price, p, q):
    """The cheapest transport of shares p [M] to q [M] at prices [M, M]."""
    found = scipy.optimize.linprog(
        price.ravel(), A_eq=margins(len(p)), b_eq=np.concatenate([p, q[:-1]])
    )
    # Rounding makes it negative; margins of no finite sum have no transport at all.
    return np.nan if found.fun is None else max(found.fun, 0.0)


@functools.cache
def margins(num):
    """The sums over a plan [num, num] that give p and q, but for the last of q.

    Shares sum to one, so that one margin follows from the others.
    """
    rows = np.kron(np.eye(num), np.ones(num))
    columns = np.kron(np.ones(num), np.eye(num))
    return np.concatenate([rows, columns[:-1]])


def mode_shares(modes, x):
    """Share of points in each mode, [M]."""
    return np.asarray(ds.metrics.mode_weights(x, modes))


def mode_centres(key, target):
    """Means of exact draws in each mode, [M, D]; of all where one has none."""
    x = np.asarray(target.sample(key, 100_000))
    index = np.asarray(jax.jit(jax.vmap(target.modes.assign))(jnp.asarray(x)))
    found = [x[index == m] for m in range(len(target.modes.weights))]
    return np.array([(part if len(part) else x).mean(axis=0) for part in found])
