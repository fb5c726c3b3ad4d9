import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsamp import metrics
from diffsamp.types import Modes


def sets(seed, num_x, num_y, dim):
    """Two skewed sets of unequal scale, apart from each other."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=(num_x, dim))
    y = 2.0 * rng.exponential(size=(num_y, dim)) ** 1.5 - np.arange(dim)
    return x, y


# Wasserstein-2


def test_wasserstein2_against_all_permutations():
    x, y = sets(0, 6, 6, 3)
    costs = [
        np.mean(np.sum((x - y[list(order)]) ** 2, axis=1))
        for order in itertools.permutations(range(6))
    ]
    assert metrics.wasserstein2(x, y) == pytest.approx(np.sqrt(min(costs)), rel=1e-12)


def test_wasserstein2_of_a_shift_and_in_one_dimension():
    x, y = sets(1, 300, 300, 4)
    shift = np.array([1.0, -2.0, 4.0, 2.0])
    order = np.random.default_rng(0).permutation(300)
    assert metrics.wasserstein2(x, x[order] + shift) == pytest.approx(5.0)
    assert metrics.wasserstein2(x, y) == pytest.approx(metrics.wasserstein2(y, x))
    in_one = np.sqrt(np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2))
    assert metrics.wasserstein2(x[:, :1], y[:, :1]) == pytest.approx(in_one)


def test_wasserstein2_of_gaussians():
    # W2^2 = |m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances.
    rng = np.random.default_rng(2)
    scales_x, scales_y = np.array([1.0, 3.0]), np.array([2.0, 0.5])
    x = scales_x * rng.normal(size=(1_000, 2))
    y = scales_y * rng.normal(size=(1_000, 2)) + np.array([3.0, -1.0])
    exact = np.sqrt(10 + np.sum((scales_x - scales_y) ** 2))
    assert metrics.wasserstein2(x, y) == pytest.approx(exact, rel=0.05)


# Sinkhorn


def test_sinkhorn_divergence():
    x, y = sets(3, 80, 80, 2)
    offset = 1_000.0  # so far from the origin float32 has lost the fourth digit
    shifted = metrics.sinkhorn_divergence(x + offset, x + offset + 3.0)
    assert shifted.value == pytest.approx(18.0, rel=2e-3)
    with jax.enable_x64(True):
        assert abs(metrics.sinkhorn_divergence(x, x).value) < 1e-4
        rough = metrics.sinkhorn_divergence(x, y)
        fine = metrics.sinkhorn_divergence(x, y, epsilon=0.02, max_iterations=50_000)
    exact = metrics.wasserstein2(x, y) ** 2
    assert rough.converged
    assert fine.converged
    assert fine.epsilon == 0.02 < rough.epsilon
    assert fine.value == pytest.approx(exact, rel=5e-3)
    assert abs(fine.value - exact) < abs(rough.value - exact)


def test_sinkhorn_divergence_says_when_it_has_not_converged():
    x, y = sets(4, 60, 40, 2)  # unequal sizes are fine
    arguments = {"epsilon": 1e-3, "max_iterations": 20}
    with pytest.raises(RuntimeError, match="has not converged in 20 iterations"):
        metrics.sinkhorn_divergence(x, y, **arguments)
    result = metrics.sinkhorn_divergence(x, y, **arguments, require_convergence=False)
    assert not result.converged
    assert result.num_iterations == 20


def test_sinkhorn_divergence_without_ott(monkeypatch):
    metrics._ott_solver.cache_clear()
    monkeypatch.setitem(sys.modules, "ott.geometry", None)
    with pytest.raises(ImportError, match=r"diffsamp\[ot\]"):
        metrics.sinkhorn_divergence(np.zeros((2, 1)), np.ones((2, 1)))


def scds_in_numpy(x, y, epsilon, num_iterations):
    """The same convention, in plain float64 loops."""
    distance = np.linalg.norm(x[:, None] - y[None, :], axis=-1)
    u, v = np.zeros(len(x)), np.zeros(len(y))
    for _ in range(num_iterations):
        u = -epsilon * (
            np.logaddexp.reduce((v[None, :] - distance) / epsilon, axis=1)
            + np.log(len(x))
        )
        v = -epsilon * (
            np.logaddexp.reduce((u[:, None] - distance) / epsilon, axis=0)
            + np.log(len(y))
        )
    plan = np.exp((u[:, None] + v[None, :] - distance) / epsilon)
    return np.sum(plan * distance), plan


@pytest.mark.parametrize("num_iterations", [1, 7, 100])
@pytest.mark.parametrize("stored", [True, False])
def test_sinkhorn_scds_counts_its_iterations(num_iterations, stored, monkeypatch):
    monkeypatch.setattr(metrics, "_STORED_DISTANCES", 70 * 50 - (not stored))
    x, y = sets(5, 70, 50, 3)
    expected, plan = scds_in_numpy(x, y, 1e-3, num_iterations)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / 50, rtol=1e-9)
    value = metrics.sinkhorn_scds(x, y, num_iterations=num_iterations)
    assert value == pytest.approx(expected, rel=2e-3)
    with jax.enable_x64(True):
        value = metrics.sinkhorn_scds(x, y, num_iterations=num_iterations)
    assert value == pytest.approx(expected, rel=1e-9)


def test_sinkhorn_scds_is_a_cost_of_distances_not_converged():
    x, y = sets(6, 100, 100, 2)
    by_count = [metrics.sinkhorn_scds(x, y, num_iterations=n) for n in (10, 100, 3_000)]
    assert by_count[0] < by_count[1] < by_count[2]
    # Converged at a small epsilon it is the Wasserstein-1 distance: here every plan
    # costs 50, and what is missing is in the wrong marginal.
    far = metrics.sinkhorn_scds(x[:, :1], x[:, :1] + 50.0)
    assert far == pytest.approx(50.0, rel=2e-3)


# MMD


def test_mmd_against_its_definition():
    x, y = sets(7, 7, 9, 2)
    h = 1.7

    def mean_kernel(a, b, diagonal):
        pairs = [
            np.exp(-np.sum((p - q) ** 2) / (2 * h**2))
            for (i, p), (j, q) in itertools.product(enumerate(a), enumerate(b))
            if diagonal or i != j
        ]
        return np.mean(pairs)

    expected = mean_kernel(x, x, False) + mean_kernel(y, y, False)
    expected -= 2 * mean_kernel(x, y, True)
    assert metrics.mmd(x, y, bandwidth=h) == pytest.approx(expected, rel=1e-12)
    pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations(y, 2)]
    by_median = metrics.mmd(x, y, bandwidth=float(np.median(pairs)))
    assert metrics.mmd(x, y) == pytest.approx(by_median, rel=1e-12)


def test_mmd_is_unbiased():
    rng = np.random.default_rng(8)
    values = [
        metrics.mmd(*rng.exponential(size=(2, 40, 2)), bandwidth=1.0)
        for _ in range(1_000)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(1_000)
    # Gaussians in one dimension, kernel of variance h^2: closed form.
    h2, shift, variance = 1.0, 1.5, 4.0

    def kernel_mean(total_variance, distance):
        total = h2 + total_variance
        return np.sqrt(h2 / total) * np.exp(-(distance**2) / 2 / total)

    exact = kernel_mean(2.0, 0.0) + kernel_mean(2 * variance, 0.0)
    exact -= 2 * kernel_mean(1.0 + variance, shift)
    values = [
        metrics.mmd(
            rng.normal(size=(100, 1)),
            shift + np.sqrt(variance) * rng.normal(size=(60, 1)),
            bandwidth=1.0,
        )
        for _ in range(500)
    ]
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / np.sqrt(500)


# Summaries of weighted draws


def test_mode_weights_and_total_variation():
    modes = Modes(jnp.array([0.2, 0.5, 0.3]), lambda x: jnp.sum(x > 0.0))
    x = np.array([[-1.0, -1.0], [1.0, -2.0], [-3.0, 2.0], [1.0, 1.0]])
    np.testing.assert_allclose(metrics.mode_weights(x, modes), [0.25, 0.5, 0.25])
    log_weight = np.log([4.0, 1.0, 2.0, 3.0]) - 900.0
    weighted = metrics.mode_weights(x, modes, log_weight)
    np.testing.assert_allclose(weighted, [0.4, 0.3, 0.3])
    assert metrics.total_variation(weighted, modes.weights) == pytest.approx(0.2)
    assert metrics.total_variation(modes.weights, weighted) == pytest.approx(0.2)
    # A point that is not finite, and one outside every mode, are in none.
    x[0], x[1] = np.nan, np.inf
    outside = modes._replace(assign=lambda x: jnp.sum(x > 0.0) - 3)
    np.testing.assert_allclose(metrics.mode_weights(x, modes), [0, 0.25, 0.25])
    np.testing.assert_allclose(metrics.mode_weights(x, outside), [0, 0, 0])
    missing = metrics.total_variation(np.array([0.5, 0.0]), np.array([0.5, 0.5]))
    assert missing == 0.5


def test_quantiles():
    x, _ = sets(9, 501, 1, 3)
    q = np.array([0.0, 0.1, 0.5, 0.937, 1.0])
    expected = np.quantile(x, q, axis=0, method="inverted_cdf")
    np.testing.assert_array_equal(metrics.quantiles(x, q), expected)
    # Integer weights are repetitions, NaN and -inf are zero weights.
    counts = np.random.default_rng(0).integers(0, 4, size=501)
    with np.errstate(divide="ignore"):
        log_weight = np.log(counts) - 400.0
    log_weight[counts == 0] = np.where(np.arange(np.sum(counts == 0)) % 2, np.nan, -9e9)
    x[counts == 0] = np.nan
    repeated = np.repeat(x, counts, axis=0)
    q = np.array([0.0003, 0.1003, 0.5003, 0.937, 0.9999])  # between the jumps
    expected = np.quantile(repeated, q, axis=0, method="inverted_cdf")
    np.testing.assert_array_equal(metrics.quantiles(x, q, log_weight), expected)
    mean, sd = metrics.moments(x, log_weight)
    np.testing.assert_allclose(mean, repeated.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sd, repeated.std(axis=0), rtol=1e-10)
    assert mean.shape == sd.shape == (3,)


def test_quantile_error():
    exact = np.random.default_rng(12).normal(size=(2_000, 2)) * np.array([1.0, 5.0])
    assert metrics.quantile_error(exact, exact) == 0
    shifted = exact + np.array([0.0, 2.0])  # 0.4 of the second standard deviation
    expected = 2.0 / exact[:, 1].std()
    assert metrics.quantile_error(shifted, exact) == pytest.approx(expected)
    # Only the tail of the first coordinate is wrong.
    cut = np.minimum(exact, [2.0, np.inf])
    missing = np.quantile(exact[:, 0], 0.99, method="inverted_cdf") - 2.0
    expected = missing / exact[:, 0].std()
    assert metrics.quantile_error(cut, exact) == pytest.approx(expected)
    assert metrics.quantile_error(cut, exact, [0.5]) == 0
    assert np.isnan(metrics.quantile_error(exact * np.nan, exact))


def test_weighted_moments_of_a_reweighted_gaussian():
    # N(0, 1) with weights exp(x): N(1, 1).
    x = np.random.default_rng(10).normal(size=(200_000, 1))
    mean, sd = metrics.moments(x, x[:, 0])
    assert float(mean[0]) == pytest.approx(1.0, abs=0.02)
    assert float(sd[0]) == pytest.approx(1.0, abs=0.02)


def test_with_floor():
    a, b, x = np.random.default_rng(11).normal(size=(3, 200, 2))
    result = metrics.with_floor(metrics.wasserstein2, x + 2.0, a, b)
    assert result.value == metrics.wasserstein2(x + 2.0, a)
    assert result.floor == metrics.wasserstein2(b, a)
    assert result.floor < 0.5 < result.value
    with pytest.raises(ValueError, match="must be independent sets"):
        metrics.with_floor(metrics.mmd, x, a, a)
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.with_floor(metrics.mmd, x[:50], a, b)


# Errors


TWO_SETS = [
    metrics.wasserstein2,
    metrics.sinkhorn_divergence,
    metrics.sinkhorn_scds,
    metrics.mmd,
    metrics.quantile_error,
]


@pytest.mark.parametrize("metric", TWO_SETS)
def test_two_sets_are_checked(metric):
    good = np.arange(6.0).reshape(3, 2)
    with pytest.raises(ValueError, match=r"x must have shape \[N, D\], got \(3,\)"):
        metric(good[:, 0], good)
    with pytest.raises(ValueError, match=r"y must have shape \[N, D\]"):
        metric(good, good[:0])
    with pytest.raises(ValueError, match="must have one dimension D"):
        metric(good, good[:, :1])
    bad = np.where(good == 2.0, np.nan, good)
    for value in (metric(good, bad), metric(bad, good)):
        assert np.isnan(getattr(value, "value", value))


ONE = np.zeros((3, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.wasserstein2(ONE, ONE[:2]), "equally many points, got 3 and"),
        (
            lambda: metrics.wasserstein2(np.zeros((2_001, 1)), np.zeros((2_001, 1))),
            "takes at most 2000; take the first",
        ),
        (lambda: metrics.sinkhorn_divergence(ONE, ONE, epsilon=0.0), "epsilon must be"),
        (lambda: metrics.sinkhorn_scds(ONE, ONE, epsilon=-1.0), "epsilon must be"),
        (lambda: metrics.sinkhorn_scds(ONE, ONE, num_iterations=0), "num_iterations"),
        (lambda: metrics.mmd(ONE, ONE), "median distance within y is zero"),
        (lambda: metrics.mmd(ONE, ONE, bandwidth=0.0), "bandwidth must be positive"),
        (lambda: metrics.mmd(ONE[:1], ONE), "two points at least, got 1 and 3"),
        (lambda: metrics.total_variation(ONE, ONE), r"one shape \[M\]"),
        (lambda: metrics.total_variation(-np.ones(2), np.ones(2)), "p must hold prob"),
        (lambda: metrics.quantiles(ONE, np.array([1.1])), "q must be probabilities"),
        (lambda: metrics.moments(ONE, np.zeros(2)), r"log_weight must have shape \(3,"),
        (lambda: metrics.moments(ONE, np.full(3, -np.inf)), "no weight that is not"),
        (lambda: metrics.moments(ONE, np.full(3, np.inf)), "an infinite weight"),
        (lambda: metrics.moments(ONE[:, 0]), r"x must have shape \[N, D\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
