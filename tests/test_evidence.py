import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from diffsamp import diagnostics, evidence

INF = math.inf


def test_log_mean_exp():
    log_mean_exp = jax.jit(evidence.log_mean_exp)
    x = np.array([-3.0, 0.5, 2.0, -INF])
    expected = math.log(np.mean(np.exp(x)))
    assert float(log_mean_exp(jnp.asarray(x))) == pytest.approx(expected, rel=1e-5)
    shifted = float(log_mean_exp(jnp.asarray(x) + 5_000.0))
    assert shifted == pytest.approx(expected + 5_000.0, rel=1e-6)
    assert log_mean_exp(jnp.full(4, -INF)) == -INF
    assert log_mean_exp(jnp.array([0.0, INF])) == INF
    assert jnp.isnan(log_mean_exp(jnp.array([0.0, jnp.nan])))
    with jax.enable_x64(True):
        value = log_mean_exp(jnp.asarray(x, jnp.float64))
        assert value.dtype == jnp.float64
        assert float(value) == pytest.approx(expected, rel=1e-14)


def test_estimates_of_log_normal_weights():
    # log w ~ N(m, s^2) under P gives log Z = m + s^2/2, ELBO m, EUBO m + s^2.
    m, s = -250.0, 0.4
    noise = np.random.default_rng(0).normal(size=(2, 20_000))
    own, target = m + s * noise[0], m + s**2 + s * noise[1]
    log_z = evidence.log_evidence(own, target_log_weight=target)
    reverse = evidence.log_z_from_target_draws(target)
    for estimate, error in ((log_z.estimate, log_z.standard_error), reverse):
        assert error == pytest.approx(math.sqrt((math.exp(s**2) - 1) / 20_000), rel=0.1)
        assert abs(estimate - (m + s**2 / 2)) < 4 * error
    for bound, truth in ((evidence.elbo(own), m), (evidence.eubo(target), m + s**2)):
        assert bound.standard_error == pytest.approx(s / math.sqrt(20_000), rel=0.05)
        assert abs(bound.estimate - truth) < 4 * bound.standard_error
    assert log_z.lower == evidence.elbo(own).estimate
    assert log_z.upper == evidence.eubo(target).estimate
    assert all(type(number) is float for number in (*log_z, *reverse))


def test_skewed_discrete_weights():
    # Weights 0, 1 and 5 with probabilities 0.2, 0.5, 0.3: Z = 2.
    weights = np.random.default_rng(1).choice(
        [0.0, 1.0, 5.0], p=[0.2, 0.5, 0.3], size=50_000
    )
    with np.errstate(divide="ignore"):
        log_z = evidence.log_evidence(np.log(weights), pareto_k=0.0)
    exact_sd = math.sqrt(0.5 + 0.3 * 25 - 4)
    exact_error = exact_sd / 2 / math.sqrt(50_000)
    assert log_z.standard_error == pytest.approx(exact_error, rel=0.02)
    assert abs(log_z.estimate - math.log(2)) < 4 * exact_error
    assert log_z.lower == -INF


def test_a_lost_mode_lowers_one_estimate_only():
    # A sampler exact on 80 % of the mass: weights 0.8 Z there, enormous elsewhere.
    own = np.full(1_000, math.log(0.8))
    target = np.where(np.arange(1_000) < 800, math.log(0.8), 40.0)
    assert evidence.log_evidence(own).estimate == pytest.approx(math.log(0.8))
    reverse = evidence.log_z_from_target_draws(target)
    assert reverse.estimate == pytest.approx(0.0, abs=1e-12)


def test_standard_error_is_infinite_without_a_tail():
    rng = np.random.default_rng(2)
    heavy = 1.2 * rng.exponential(size=2_000)
    assert diagnostics.pareto_smooth(heavy).pareto_k > 0.7
    assert evidence.log_evidence(heavy).standard_error == INF
    assert math.isfinite(evidence.log_evidence(heavy).estimate)
    assert evidence.log_z_from_target_draws(-heavy).standard_error == INF
    light = 0.1 * rng.normal(size=2_000)
    assert evidence.log_evidence(light).standard_error < 0.01
    assert evidence.log_evidence(light, pareto_k=0.7).standard_error == INF
    assert evidence.log_evidence(light, pareto_k=math.nan).standard_error == INF
    assert evidence.log_evidence(light[:10]).standard_error == INF


def test_weights_that_are_not_numbers():
    constant = np.zeros(1_000)
    zero, infinite = np.append(constant, -INF), np.append(constant, INF)
    log_z = evidence.log_evidence(zero, target_log_weight=infinite)
    assert log_z.estimate == pytest.approx(math.log(1_000 / 1_001))
    assert (log_z.lower, log_z.upper) == (-INF, INF)
    nothing = evidence.log_evidence(np.full(100, -INF))
    assert nothing[:3] == (-INF, INF, -INF)
    everything = evidence.log_evidence(infinite)
    assert everything[:3] == (INF, INF, INF)
    assert evidence.log_z_from_target_draws(zero) == (-INF, INF)
    both = np.array([0.0, INF, -INF])
    assert evidence.elbo(both) == (-INF, INF)
    assert evidence.eubo(both) == (INF, INF)
    assert evidence.elbo(np.zeros(1)) == (0.0, INF)


def test_nan_is_counted_and_makes_the_statement_weaker():
    nan = np.append(np.zeros(1_000), [math.nan, math.nan])
    with pytest.warns(RuntimeWarning, match="2 of 1002 entries of log_weight are NaN"):
        log_z = evidence.log_evidence(nan)
    assert log_z.estimate == pytest.approx(math.log(1_000 / 1_002))
    assert log_z.lower == -INF
    with pytest.warns(RuntimeWarning, match="of target_log_weight are NaN") as record:
        log_z = evidence.log_evidence(np.zeros(100), target_log_weight=nan)
    assert record[0].filename == __file__
    assert log_z.upper == INF
    with pytest.warns(RuntimeWarning, match="infinite weights"):
        reverse = evidence.log_z_from_target_draws(nan)
    assert reverse.estimate == pytest.approx(math.log(1_002 / 1_000))


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.8])
def test_coverage_of_the_interval(sigma):
    # 2,500 repeats: the binomial standard error of 95 % is 0.44 %.
    rng = np.random.default_rng(3)
    inside, k_hats = {"own": 0, "target": 0}, []
    num_repeats = 2_500
    for _ in range(num_repeats):
        noise = sigma * rng.normal(size=(2, 2_000))
        own, target = noise[0] - sigma**2 / 2, noise[1] + sigma**2 / 2
        log_z = evidence.log_evidence(own, pareto_k=0.0)
        inside["own"] += abs(log_z.estimate) < 1.96 * log_z.standard_error
        estimate, error = evidence.log_z_from_target_draws(target, pareto_k=0.0)
        inside["target"] += abs(estimate) < 1.96 * error
    for _ in range(50):
        noise = sigma * rng.normal(size=2_000)
        k_hats.append(float(diagnostics.pareto_smooth(noise).pareto_k))
    assert np.median(k_hats) < 0.5
    for count in inside.values():
        assert 0.93 < count / num_repeats < 0.97


def _pareto_tail(index):
    return lambda u: -index * np.log(u) + math.log(1 - index)


def _half_zero(u):
    """Half of the weights are zero, the others log-normal."""
    normal = scipy.special.ndtri(np.clip(2 * u - 1, 1e-12, None))
    return np.where(u < 0.5, -INF, 0.5 * normal - 0.125 + math.log(2))


WEIGHTS = {  # maps uniform numbers to log-weights with log Z = 0
    "log-normal, sd 1": lambda u: scipy.special.ndtri(u) - 0.5,
    "half of them zero": _half_zero,
    "Pareto, index 0.2": _pareto_tail(0.2),
    "Pareto, index 0.3": _pareto_tail(0.3),
}


def _coverage(weights, num_draws, num_repeats=2_500):
    """Share of intervals that cover, of the samples with a k-hat below 0.5."""
    rng, inside = np.random.default_rng(4), []
    for _ in range(num_repeats):
        log_weight = weights(rng.random(num_draws))
        pareto_k = float(diagnostics.pareto_smooth(log_weight).pareto_k)
        if pareto_k < 0.5:
            log_z = evidence.log_evidence(log_weight, pareto_k=pareto_k)
            inside.append(abs(log_z.estimate) < 1.96 * log_z.standard_error)
    assert len(inside) > num_repeats / 2
    return np.mean(inside)


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_coverage_where_k_hat_is_below_a_half(name):
    assert 0.93 < _coverage(WEIGHTS[name], 2_000) < 0.97


@pytest.mark.slow
def test_coverage_near_an_infinite_variance_needs_more_draws():
    """A tail of index 0.4 looks lighter where the large weights are missing."""
    weights = _pareto_tail(0.4)
    assert 0.89 < _coverage(weights, 2_000) < 0.93
    assert 0.93 < _coverage(weights, 20_000) < 0.97


@pytest.mark.parametrize(
    "call",
    [
        lambda bad: evidence.log_mean_exp(bad),
        lambda bad: evidence.log_evidence(bad),
        lambda bad: evidence.log_evidence(np.zeros(3), target_log_weight=bad),
        lambda bad: evidence.log_z_from_target_draws(bad),
        lambda bad: evidence.elbo(bad),
        lambda bad: evidence.eubo(bad),
    ],
)
@pytest.mark.parametrize("bad", [np.zeros((3, 1)), np.zeros(0), np.float64(1.0)])
def test_errors_name_the_argument(call, bad):
    with pytest.raises(ValueError, match=r"log_weights? must have shape \[N\]"):
        call(bad)
