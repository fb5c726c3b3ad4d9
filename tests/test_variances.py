"""Ratios of the kernels' variances: their values, the share outside, the alarm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import SAMPLERS, skewed_energy

import diffsamp as ds

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def constant(drift, log_variance):
    """A control without parameters that returns the same everywhere."""
    out = jnp.concatenate([jnp.asarray(drift, float), jnp.asarray(log_variance, float)])

    def drift_fn(params, x, t, context):
        return out.astype(x.dtype) + 0 * params

    return ds.networks.from_function(lambda key, dim: jnp.zeros(()), drift_fn)


def sampler_with(generation, destruction, **options):
    """log-variances of both kernels over those of the reference, two coordinates."""
    return ds.samplers.pis(
        2,
        4,
        network=constant([0.3, -0.2], generation),
        destruction_network=constant([0.1, 0.4], destruction),
        **options,
    )


@pytest.mark.parametrize(
    ("generation", "destruction"),
    [("both", "drift"), ("drift", "both"), ("drift",) * 2],
)
def test_variances_that_are_not_learned(generation, destruction):
    """A network may leave the variance to the reference."""
    log_variance = {"both": [1.0, -0.5], "drift": []}
    sampler = sampler_with(log_variance[generation], log_variance[destruction], **WIDE)
    report = report_of(sampler)
    factor = np.exp(20 * np.tanh(0.5 / 20))
    largest = {"both": np.exp(20 * np.tanh(1 / 20)), "drift": 1.0}[generation]
    largest *= {"both": factor, "drift": 1.0}[destruction]
    assert report.quantiles[1, -1] == pytest.approx(2.0 * largest, rel=0.03)


WIDE = {
    "generation_bounds": ds.Bounds(20.0),
    "destruction_bounds": ds.Bounds(20.0),
}


def report_of(sampler):
    params = sampler.init(jax.random.key(0))
    return ds.variance_ratios(jax.random.key(1), sampler, params, skewed_energy, 16)


def test_ratios_are_those_of_the_kernels():
    bounded = 20 * np.tanh(np.array([1.0, -0.5, 2.0, 0.25]) / 20)
    report = report_of(sampler_with([1.0, -0.5], [2.0, 0.25], **WIDE))
    assert report.quantiles.shape == (4, len(report.levels))
    # Brownian bridge: dt against dt t_k / t_{k+1}; out of the point mass no ratio.
    bridge = np.array([1.0, 2.0, 3 / 2, 4 / 3])
    ratios = np.exp(bounded[:2] - bounded[2:])
    np.testing.assert_allclose(report.quantiles[0], 1.0, rtol=1e-6)
    low, high = (
        np.quantile(ratios, q, method="inverted_cdf") * bridge[1:] for q in (0.01, 0.99)
    )
    np.testing.assert_allclose(report.quantiles[1:, 0], low, rtol=0.03)
    np.testing.assert_allclose(report.quantiles[1:, -1], high, rtol=0.03)
    assert report.alarm is None
    assert report.share_outside == 0
    counts = report.num_energy_evaluations, report.num_gradient_evaluations
    assert counts == (16, 0)  # networks of this test see no score
    assert report.num_network_evaluations == 16 * 4 * 3  # drawn, then both kernels


@pytest.mark.relaxed("dtypes")  # Optax's Adam
@pytest.mark.parametrize(
    ("generation", "destruction", "share"),
    [
        ([0.0, 0.0], [-9.0, 0.0], 3 / 8),  # collapsed in one coordinate
        slow([0.0, 0.0], [9.0, 9.0], 3 / 4),  # exploded in both
        slow([8.0, 0.0], [0.0, 0.0], 3 / 8),
        slow([9.0, -9.0], [9.0, -9.0], 0.0),  # far from the reference, but together
    ],
)
def test_a_variance_that_collapses_is_told(generation, destruction, share):
    sampler = sampler_with(generation, destruction, **WIDE)
    report = report_of(sampler)
    assert report.share_outside == pytest.approx(share)
    assert (report.alarm is None) == (share == 0)
    if share:
        assert "differ more than 100-fold on" in report.alarm
        assert "narrow the Bounds" in report.alarm
    fit = ds.fit(
        jax.random.key(0),
        sampler,
        ds.objectives.log_variance(),
        skewed_energy,
        num_updates=2,
        batch_size=8,
        progress_bar=False,
    )
    np.testing.assert_allclose(fit.metrics["variance_alarm"], share)


def test_bounds_keep_a_kernel_from_collapsing():
    narrow = {"destruction_bounds": ds.Bounds(1.5), "generation_bounds": ds.Bounds(1.5)}
    report = report_of(sampler_with([50.0, 50.0], [-50.0, -50.0], **narrow))
    assert report.quantiles.max() < 2 * np.exp(3.0) * 1.01
    assert report.alarm is None


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
@pytest.mark.parametrize("name", ["log_variance", "shift"])
def test_bad_bounds(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        ds.Bounds(**{name: value})


def test_number_of_paths():
    sampler = SAMPLERS["pis"]()
    with pytest.raises(ValueError, match="num_paths must be at least 1, got 0"):
        ds.variance_ratios(jax.random.key(0), sampler, {}, skewed_energy, 0)
