"""Distances between sets of draws, and summaries of weighted draws.

Everything runs on the host, in float64 unless said otherwise, and returns Python floats
or NumPy arrays. A distance between sets that hold a point that is not finite is NaN.

A distance between two finite sets is never zero, even where both come from the same
law, and the published conventions differ by factors. So each function states its cost,
whether squares are taken, and its bias; `with_floor` puts the distance between two
independent exact sets beside the value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.types import Array, Modes

ArrayLike = Array | np.ndarray
Value = TypeVar("Value")

MAX_ASSIGNMENT = 2_000
"""Largest set for the exact assignment of `wasserstein2`: about 1 s, cubic in N."""

_STORED_DISTANCES = 2**26  # of `sinkhorn_scds`: 256 MiB in float32


class SinkhornDivergence(NamedTuple):
    """A debiased entropic transport cost.

    Attributes:
        value: the divergence, in squared units of the points.
        epsilon: entropic regularisation used, in the same units.
        converged: whether all three transport problems met the tolerance.
        num_iterations: iterations of the problem between the two sets.
    """

    value: float
    epsilon: float
    converged: bool
    num_iterations: int


class Moments(NamedTuple):
    """Mean and standard deviation per coordinate.

    Attributes:
        mean: [D].
        standard_deviation: square root of the weighted mean square deviation, [D].
    """

    mean: np.ndarray
    standard_deviation: np.ndarray


class WithFloor(NamedTuple, Generic[Value]):
    """A metric beside its value between two exact sets.

    Attributes:
        value: metric between the draws and an exact set.
        floor: the same metric between two independent exact sets.
    """

    value: Value
    floor: Value


def wasserstein2(x: ArrayLike, y: ArrayLike) -> float:
    """Exact Wasserstein-2 distance between two sets of equal size.

    ``sqrt(min over permutations s of mean_i |x_i - y_s(i)|^2)`` with the Euclidean
    norm, by SciPy's linear assignment; 2,000 points take about a second. Between two
    sets from one law it is positive and shrinks like N^(-1/D) in high dimension.

    Args:
        x: points, [N, D], N <= 2,000.
        y: points, [N, D].

    Returns:
        The distance, in the units of the points.

    Raises:
        ValueError: when the shapes differ or N is above 2,000.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> x = np.array([[0.0, 0.0], [3.0, 1.0]])
        >>> metrics.wasserstein2(x, x[::-1] + np.array([3.0, 4.0]))
        5.0
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    points_x, points_y = _two_sets(x, y)
    if points_x.shape[0] != points_y.shape[0]:
        raise ValueError(
            "x and y must hold equally many points, got "
            f"{points_x.shape[0]} and {points_y.shape[0]}; take the first N of each, "
            "or use sinkhorn_divergence"
        )
    if points_x.shape[0] > MAX_ASSIGNMENT:
        raise ValueError(
            f"x has {points_x.shape[0]} points, the exact assignment takes at most "
            f"{MAX_ASSIGNMENT}; take the first {MAX_ASSIGNMENT} of each, or use "
            "sinkhorn_divergence"
        )
    if not _all_finite(points_x, points_y):
        return float("nan")
    cost = cdist(points_x, points_y, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(np.mean(cost[rows, columns])))


def sinkhorn_divergence(
    x: ArrayLike,
    y: ArrayLike,
    *,
    epsilon: float | None = None,
    max_iterations: int = 10_000,
    tolerance: float = 1e-3,
    require_convergence: bool = True,
) -> SinkhornDivergence:
    """Debiased Sinkhorn divergence with squared Euclidean cost, converged, by OTT.

    ``OT_eps(x, y) - (OT_eps(x, x) + OT_eps(y, y)) / 2``: zero where the sets are equal,
    the square of `wasserstein2` for ``epsilon -> 0``, a squared MMD for
    ``epsilon -> inf``. Values at different epsilon do not compare. Computed in JAX's
    default precision. Source: Feydy et al., "Interpolating between optimal transport
    and MMD using Sinkhorn divergences", AISTATS 2019.

    Args:
        x: points, [N, D].
        y: points, [M, D].
        epsilon: entropic regularisation, in squared units of the points; by default
            0.05 times the mean squared distance between a point of x and one of y.
        max_iterations: limit on the iterations of each transport problem.
        tolerance: largest L1 error of the marginals that counts as converged.
        require_convergence: raise where a problem has not converged, instead of saying
            so in the result.

    Returns:
        `SinkhornDivergence`.

    Raises:
        ImportError: when OTT is not installed (extra ``diffsamp[ot]``).
        ValueError: when a shape or ``epsilon`` is wrong.
        RuntimeError: when a problem has not converged and ``require_convergence``.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> x = np.random.default_rng(0).normal(size=(50, 2))
        >>> result = metrics.sinkhorn_divergence(x, x + 2.0)     # shifted: exactly 8
        >>> round(result.value, 2), result.converged
        (8.0, True)
    """
    points_x, points_y = _two_sets(x, y)
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    solve = _ott_solver()
    if not _all_finite(points_x, points_y):
        return SinkhornDivergence(float("nan"), float("nan"), False, 0)
    # The divergence does not depend on the origin, float32 does.
    centre = np.mean(points_y, axis=0)
    points_x, points_y = points_x - centre, points_y - centre
    if epsilon is None:
        epsilon = 0.05 * _mean_square_distance(points_x, points_y) or 1.0
    # OTT promotes ranks and dtypes; the caller's JAX may forbid it. Its squared
    # distances are differences of products, which need all their bits.
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("highest"),
    ):
        value, converged, num_iterations = solve(
            jnp.asarray(points_x),
            jnp.asarray(points_y),
            jnp.asarray(epsilon, float),
            tolerance,
            max_iterations,
        )
    result = SinkhornDivergence(
        value=float(value),
        epsilon=float(epsilon),
        converged=bool(converged),
        num_iterations=int(num_iterations),
    )
    if require_convergence and not result.converged:
        raise RuntimeError(
            f"Sinkhorn has not converged in {max_iterations} iterations at epsilon = "
            f"{epsilon:.3g}; use a larger epsilon, more max_iterations, a larger "
            "tolerance, or x64"
        )
    return result


def sinkhorn_scds(
    x: ArrayLike, y: ArrayLike, *, epsilon: float = 1e-3, num_iterations: int = 100
) -> float:
    """The "Sinkhorn" number of the SCDS paper's tables. For comparison with those only.

    The transport cost ``sum_ij P_ij |x_i - y_j|`` (Euclidean distance, *not* squared;
    not debiased) of the plan P after 100 Sinkhorn iterations at ``epsilon = 1e-3``.
    This is **not converged**: at such an epsilon the plan's marginal over x is still
    far off. The value therefore depends on the number of points, on the iteration count
    and on the order of the arguments, and is neither a distance nor a bound of one.
    Always state N with it. Computed in JAX's default precision. Up to 2^26 distances
    are kept; more are computed anew in every iteration, so that 100,000 points fit in
    memory, though hardly in patience without an accelerator.

    Convention: that of `sde_sampler` (Richter and Berner; after
    fwilliams/scalable-pytorch-sinkhorn), whose defaults for cost, epsilon and number of
    iterations are those stated for SCDS. Deviation: that code stops early where both
    potentials change by less than 1e-5; this one always makes all iterations.

    Args:
        x: points, [N, D].
        y: points, [M, D]; the plan's marginal over these is exact.
        epsilon: entropic regularisation, in units of the points.
        num_iterations: number of iterations, each updating both potentials.

    Returns:
        The cost, in the units of the points.

    Raises:
        ValueError: when a shape, ``epsilon`` or ``num_iterations`` is wrong.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> x = np.arange(10.0)[:, None]
        >>> round(metrics.sinkhorn_scds(x, x + 0.25), 3)
        0.25
    """
    points_x, points_y = _two_sets(x, y)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    if not _all_finite(points_x, points_y):
        return float("nan")
    centre = np.mean(points_y, axis=0)
    x_array, y_array = jnp.asarray(points_x - centre), jnp.asarray(points_y - centre)
    stored = len(points_x) * len(points_y) <= _STORED_DISTANCES
    return float(
        _unconverged_cost(x_array, y_array, epsilon, num_iterations, stored=stored)
    )


def mmd(x: ArrayLike, y: ArrayLike, *, bandwidth: float | None = None) -> float:
    """Unbiased estimate of the *squared* maximum mean discrepancy, Gaussian kernel.

    With ``k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2))`` it is the U-statistic
    ``mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_ij k(x_i, y_j)``:
    its mean is zero where both sets come from one law, and it is then negative about
    half of the time. The default bandwidth is the median distance within ``y``, the
    reference set, so that values for several samplers against one ``y`` compare. For
    modes far apart that is the distance of the modes, and what happens inside a mode
    hardly counts. Source: Gretton et al., "A kernel two-sample test", JMLR 13, 2012,
    Lemma 6.

    Args:
        x: points, [N, D], N >= 2.
        y: points of the reference set, [M, D], M >= 2.
        bandwidth: standard deviation of the kernel, in units of the points.

    Returns:
        The estimate, without unit, at most 2.

    Raises:
        ValueError: when a shape or ``bandwidth`` is wrong, or all of ``y`` is one point
            and no bandwidth is given.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(2, 500, 3))
        >>> abs(metrics.mmd(x, y)) < 0.005 < metrics.mmd(x + 1.0, y)
        True
    """
    from scipy.spatial.distance import cdist, pdist

    points_x, points_y = _two_sets(x, y)
    num_x, num_y = points_x.shape[0], points_y.shape[0]
    if num_x < 2 or num_y < 2:
        raise ValueError(f"x and y need two points at least, got {num_x} and {num_y}")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    if not _all_finite(points_x, points_y):
        return float("nan")
    squares_y = pdist(points_y, "sqeuclidean")
    if bandwidth is None:
        bandwidth = float(np.median(np.sqrt(squares_y)))
    if not bandwidth > 0:
        raise ValueError(
            "the median distance within y is zero; pass bandwidth, or a y whose points "
            "differ"
        )

    scale = 2 * bandwidth**2

    def mean_kernel(squares: np.ndarray) -> float:
        return float(np.mean(np.exp(-squares / scale)))

    within = mean_kernel(pdist(points_x, "sqeuclidean")) + mean_kernel(squares_y)
    return within - 2 * mean_kernel(cdist(points_x, points_y, "sqeuclidean"))


def mode_weights(
    x: ArrayLike, modes: Modes, log_weight: ArrayLike | None = None
) -> np.ndarray:
    """Share of the draws, or of their weight, in every mode.

    Args:
        x: draws, [N, D].
        modes: the target's modes; ``modes.assign`` maps a point to its mode's index.
        log_weight: log-weights of the draws, [N], or None for equal weights; NaN is a
            zero weight.

    Returns:
        One share for each of the modes, [M]. They sum to one, or less where points are
        not finite or have an index outside 0 ... M - 1: those are in no mode.

    Raises:
        ValueError: when a shape is wrong, a weight is infinite, or all are zero.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from diffsamp import metrics
        >>> from diffsamp.types import Modes
        >>> modes = Modes(jnp.array([0.5, 0.5]), lambda x: (x[0] > 0).astype(int))
        >>> x = np.array([[-1.0], [-2.0], [-1.5], [4.0]])
        >>> metrics.mode_weights(x, modes)
        array([0.75, 0.25])
        >>> metrics.mode_weights(x, modes, np.log([1.0, 1.0, 1.0, 3.0]))
        array([0.5, 0.5])
    """
    points, weights = _weighted_set(x, log_weight)
    num_modes = np.shape(modes.weights)[0]
    index = np.asarray(jax.vmap(modes.assign)(jnp.asarray(points)))
    inside = (index >= 0) & (index < num_modes) & np.all(np.isfinite(points), axis=1)
    return np.bincount(index[inside], weights[inside], minlength=num_modes)


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Total variation distance of two discrete laws, ``sum |p - q| / 2``, in [0, 1].

    Args:
        p: probabilities, [M].
        q: probabilities, [M].

    Returns:
        The distance. Where one does not sum to one (see `mode_weights`) the lacking
        mass counts as one more outcome.

    Raises:
        ValueError: when the shapes differ or an entry is negative or not finite.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> metrics.total_variation(np.array([0.5, 0.5]), np.array([0.75, 0.25]))
        0.25
    """
    probs_p, probs_q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if probs_p.ndim != 1 or probs_p.shape != probs_q.shape:
        raise ValueError(
            f"p and q must have one shape [M], got {probs_p.shape} and {probs_q.shape}"
        )
    for name, probs in (("p", probs_p), ("q", probs_q)):
        if not np.all(probs >= 0) or not np.all(np.isfinite(probs)):
            raise ValueError(f"{name} must hold probabilities, got {probs}")
    lacking = abs(np.sum(probs_p) - np.sum(probs_q))
    return float((np.sum(np.abs(probs_p - probs_q)) + lacking) / 2)


def quantiles(
    x: ArrayLike, q: ArrayLike, log_weight: ArrayLike | None = None
) -> np.ndarray:
    """Weighted quantiles of every coordinate, by the inverse distribution function.

    The result is always one of the draws: the smallest whose cumulated weight reaches
    q (type 1 of Hyndman and Fan; no interpolation).

    Args:
        x: draws, [N, D].
        q: probabilities in [0, 1], [Q].
        log_weight: log-weights of the draws, [N], or None for equal weights; NaN is a
            zero weight.

    Returns:
        Quantiles, [Q, D].

    Raises:
        ValueError: when a shape or probability is wrong, a weight is infinite, or all
            are zero.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> x = np.array([[1.0, 10.0], [2.0, 30.0], [3.0, 20.0]])
        >>> metrics.quantiles(x, np.array([0.5]))
        array([[ 2., 20.]])
        >>> metrics.quantiles(x, np.array([0.5]), np.log([1.0, 1.0, 8.0]))
        array([[ 3., 20.]])
    """
    points, weights = _weighted_set(x, log_weight)
    probs = np.asarray(q, np.float64)
    if probs.ndim != 1 or not np.all((probs >= 0) & (probs <= 1)):
        raise ValueError(f"q must be probabilities of shape [Q], got {q}")
    used = weights > 0
    return np.quantile(
        points[used], probs, axis=0, weights=weights[used], method="inverted_cdf"
    )


def quantile_error(
    x: ArrayLike,
    exact: ArrayLike,
    q: ArrayLike | Sequence[float] = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99),
) -> float:
    """Largest error of a quantile of any coordinate, in its standard deviations.

    Args:
        x: draws, [N, D].
        exact: exact draws, [M, D]; their standard deviations are the units.
        q: probabilities in [0, 1], [Q].

    Raises:
        ValueError: when the sets do not have the same D, or q is wrong.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> exact = np.array([[-1.0], [1.0]])
        >>> metrics.quantile_error(exact + 0.25, exact)
        0.25
    """
    x, exact = _two_sets(x, exact)
    if not _all_finite(x, exact):
        return float("nan")
    levels = np.asarray(q)
    error = np.abs(quantiles(x, levels) - quantiles(exact, levels))
    unit = np.std(exact, axis=0)
    return float(np.max(error / np.where(unit > 0, unit, 1.0)))


def moments(x: ArrayLike, log_weight: ArrayLike | None = None) -> Moments:
    """Weighted mean and standard deviation of every coordinate.

    Args:
        x: draws, [N, D].
        log_weight: log-weights of the draws, [N], or None for equal weights; NaN is a
            zero weight. A draw of zero weight may be anything, NaN included.

    Returns:
        `Moments`; the standard deviation divides by the sum of weights, not by N - 1.

    Raises:
        ValueError: when a shape is wrong, a weight is infinite, or all are zero.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> metrics.moments(np.array([[0.0], [4.0]]), np.log([3.0, 1.0]))
        Moments(mean=array([1.]), standard_deviation=array([1.73205081]))
    """
    points, weights = _weighted_set(x, log_weight)
    used = weights > 0
    points, weights = points[used], weights[used]
    mean = weights @ points
    return Moments(mean, np.sqrt(weights @ (points - mean) ** 2))


def with_floor(
    metric: Callable[[Any, Any], Value], x: Any, exact_a: Any, exact_b: Any
) -> WithFloor[Value]:
    """A metric between draws and an exact set, and the floor it can reach.

    Args:
        metric: any function of two sets, such as `wasserstein2`.
        x: draws, [N, D].
        exact_a: exact draws of the target, [N, D].
        exact_b: further exact draws, independent of these, [N, D].

    Returns:
        `WithFloor` with ``metric(x, exact_a)`` and ``metric(exact_b, exact_a)``.

    Raises:
        ValueError: when ``exact_a`` and ``exact_b`` are the same array, or ``x`` and
            ``exact_b`` do not have the same shape: the floor depends on N.

    Example:
        >>> import numpy as np
        >>> from diffsamp import metrics
        >>> a, b, x = np.random.default_rng(0).normal(size=(3, 300, 1))
        >>> result = metrics.with_floor(metrics.wasserstein2, x + 1.0, a, b)
        >>> result.value > 0.8, result.floor < 0.3
        (True, True)
    """
    if exact_a is exact_b:
        raise ValueError("exact_a and exact_b must be independent sets, got one array")
    if np.shape(x) != np.shape(exact_b):
        raise ValueError(
            f"x and exact_b must have one shape, got {np.shape(x)} and "
            f"{np.shape(exact_b)}; take equally many points"
        )
    return WithFloor(metric(x, exact_a), metric(exact_b, exact_a))


def _points(name: str, value: ArrayLike) -> np.ndarray:
    points = np.asarray(value, np.float64)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(
            f"{name} must have shape [N, D], got {points.shape}; a set of scalars is "
            f"{name}[:, None]"
        )
    return points


def _two_sets(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    points_x, points_y = _points("x", x), _points("y", y)
    if points_x.shape[1] != points_y.shape[1]:
        raise ValueError(
            "x and y must have one dimension D, got shapes "
            f"{points_x.shape} and {points_y.shape}"
        )
    return points_x, points_y


def _all_finite(x: np.ndarray, y: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(x)) and np.all(np.isfinite(y)))


def normalised_weights(log_weight: ArrayLike) -> np.ndarray:
    """Weights of sum 1; a log-weight that is NaN counts as a weight of zero.

    Args:
        log_weight: log-weights, [N].

    Raises:
        ValueError: when no weight is positive, or one is infinite.

    Example:
        >>> import numpy as np, diffsamp as ds
        >>> ds.metrics.normalised_weights(np.array([3.0, np.nan, 3.0]))
        array([0.5, 0. , 0.5])
    """
    log_weight = np.asarray(log_weight, np.float64)
    log_weight = np.where(np.isnan(log_weight), -np.inf, log_weight)
    top = np.max(log_weight)
    if not np.isfinite(top):
        what = "an infinite weight" if top > 0 else "no weight that is not zero"
        raise ValueError(f"log_weight holds {what}; the draws cannot be weighted")
    weights = np.exp(log_weight - top)
    return weights / np.sum(weights)


def _weighted_set(
    x: ArrayLike, log_weight: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normalised weights."""
    points = _points("x", x)
    if log_weight is None:
        return points, np.full(points.shape[0], 1 / points.shape[0])
    log_w = np.asarray(log_weight, np.float64)
    if log_w.shape != points.shape[:1]:
        raise ValueError(
            f"log_weight must have shape ({points.shape[0]},), one for each row of x, "
            f"got {log_w.shape}"
        )
    return points, normalised_weights(log_w)


@functools.cache
def _ott_solver() -> Callable[..., tuple[Array, Array, Array]]:
    """OTT's Sinkhorn divergence, compiled once per shape; importing OTT is slow."""
    try:
        from ott.geometry import costs, pointcloud
        from ott.tools import sinkhorn_divergence as ott_divergence
    except ImportError as error:
        raise ImportError(
            "sinkhorn_divergence needs OTT: pip install 'diffsamp[ot]'"
        ) from error

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def solve(x, y, epsilon, tolerance, max_iterations):
        value, out = ott_divergence.sinkhorn_divergence(
            pointcloud.PointCloud,
            x,
            y,
            cost_fn=costs.SqEuclidean(),
            epsilon=epsilon,
            solve_kwargs={"max_iterations": max_iterations, "threshold": tolerance},
        )
        converged = jnp.all(jnp.stack([jnp.asarray(c) for c in out.converged]))
        return value, converged, jnp.asarray(out.n_iters[0])

    return solve


def _mean_square_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over all pairs of |x_i - y_j|^2, without the pairs."""
    between = np.sum((np.mean(x, axis=0) - np.mean(y, axis=0)) ** 2)
    return float(np.sum(np.var(x, axis=0)) + np.sum(np.var(y, axis=0)) + between)


@functools.partial(jax.jit, static_argnames="stored")
def _unconverged_cost(
    x: Array, y: Array, epsilon: Any, num_iterations: Any, *, stored: bool
) -> Array:
    """Cost <P, M> of the plan after so many Sinkhorn iterations, in log space.

    Distances are kept, or computed anew whenever they are needed.
    """
    # Row by row: a difference [N, M, D] would not fit, and |x|^2 + |y|^2 - 2 x y
    # cancels. A block of rows at a time keeps the device busy.
    block = max(1, 2**22 // max(x.size, y.size))

    def by_rows(function, *rows):
        rows_at_once = min(block, rows[0].shape[0])
        return jax.lax.map(lambda row: function(*row), rows, batch_size=rows_at_once)

    def distances(others):
        return lambda point: jnp.sqrt(jnp.sum((point - others) ** 2, axis=1))

    of_x, of_y = distances(y), distances(x)
    if stored:
        x = by_rows(of_x, x)
        y, of_x, of_y = x.T, lambda row: row, lambda row: row
    log_a, log_b = -np.log(x.shape[0]), -np.log(y.shape[0])

    def iterate(_, potentials):
        _, v = potentials

        def best(log_share, potential, distance):
            scaled = (potential - distance) / epsilon
            return epsilon * (log_share - jax.nn.logsumexp(scaled))

        u = by_rows(lambda row: best(log_a, v, of_x(row)), x)
        return u, by_rows(lambda row: best(log_b, u, of_y(row)), y)

    def cost(row, u):
        distance = of_x(row)
        return jnp.sum(jnp.exp((u + v - distance) / epsilon) * distance)

    start = jnp.zeros(x.shape[0], x.dtype), jnp.zeros(y.shape[0], x.dtype)
    u, v = jax.lax.fori_loop(0, num_iterations, iterate, start)
    return jnp.sum(by_rows(cost, x, u))
