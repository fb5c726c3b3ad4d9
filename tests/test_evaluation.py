"""Evaluation against known truth: every number beside its floor, no metric invented.

The sampler is a VP process whose reference is nearly the Gaussian target; it needs no
training and its quality is set by the mismatch.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

NUM = 600
CONTROL = ds.networks.from_function(
    lambda key, dim: jnp.zeros(dim), lambda params, x, t, context: params + 0.0 * x
)
LOG_Z = -0.7
GAUSSIAN = ds.targets.gaussian((1.0, -2.0), (4.0, 4.0), log_z=LOG_Z)
NEAR = ds.samplers.dis(2, 4, loc=(1.0, -2.0), scale=2.2, network=CONTROL)

ALWAYS = {
    "num_draws",
    "elbo",
    "elbo_standard_error",
    "log_z",
    "log_z_standard_error",
    "log_z_smoothed",
    "ess",
    "pareto_k",
    "verdict",
    "num_energy_evaluations",
    "num_gradient_evaluations",
    "num_network_evaluations",
    "collapsed",
    "mean",
    "sd",
}
KNOWN_LOG_Z = {"log_z_true", "log_z_error", "elbo_gap"}
DISTANCES = {
    f"{name}{suffix}"
    for name in ("w2", "mmd", "quantile_error")
    for suffix in ("", "_floor", "_unweighted")
}
WITH_DRAWS = DISTANCES | {
    "missing_mass",
    "coverage_tolerance",
    "eubo",
    "eubo_standard_error",
    "log_z_forward",
    "log_z_forward_standard_error",
    "forward_ess",
    "quantile_levels",
    "quantiles",
    "quantiles_exact",
}
MODES = {"mode_weights", "mode_tv", "mode_tv_unweighted"}


def evaluate(target, sampler=NEAR, seed=1, **options):
    return ds.evaluate(
        jax.random.key(seed),
        sampler,
        sampler.init(jax.random.key(0)),
        target,
        **({"num_draws": NUM, "sinkhorn": False} | options),
    )


@pytest.fixture(scope="module")
def report():
    return evaluate(GAUSSIAN)


def test_keys(report):
    assert set(report) == ALWAYS | KNOWN_LOG_Z | WITH_DRAWS | {"eubo_gap"}
    assert report["num_draws"] == NUM
    for name, value in report.items():
        if name != "verdict":
            assert np.all(np.isfinite(value)), name


def test_bounds_hold_the_truth(report):
    assert report["log_z_true"] == LOG_Z
    assert report["elbo"] < LOG_Z < report["eubo"]
    assert report["elbo"] < report["log_z"] < report["eubo"]
    assert report["elbo_gap"] == pytest.approx(LOG_Z - report["elbo"])
    assert report["eubo_gap"] == pytest.approx(report["eubo"] - LOG_Z)
    assert report["log_z_error"] == pytest.approx(report["log_z"] - LOG_Z)
    assert report["elbo_gap"] > 0
    assert report["eubo_gap"] > 0
    assert abs(report["log_z_error"]) < 4 * report["log_z_standard_error"]
    smoothing = report["log_z_smoothed"] - report["log_z"]
    assert 0 < abs(smoothing) < report["log_z_standard_error"]
    forward_error = abs(report["log_z_forward"] - LOG_Z)
    assert forward_error < 4 * report["log_z_forward_standard_error"]


def test_distances_stand_beside_their_floors(report):
    """Weighted draws are near the floor, raw ones of the wrong scale above it."""
    assert 0.5 * report["w2_floor"] < report["w2"] < 2 * report["w2_floor"]
    assert report["w2_floor"] > 0
    raw = evaluate(
        GAUSSIAN, ds.samplers.dis(2, 4, loc=(1.0, -2.0), scale=3.0, network=CONTROL)
    )
    assert raw["w2_unweighted"] > 1.5 * raw["w2"]
    assert raw["w2_unweighted"] > 2 * raw["w2_floor"]
    assert 0 < report["quantile_error_floor"] < 0.4
    assert report["quantile_error"] < 2 * report["quantile_error_floor"]
    assert raw["quantile_error_unweighted"] > 3 * raw["quantile_error_floor"]
    assert raw["mmd_unweighted"] > 5 * abs(raw["mmd"])
    assert raw["ess"] < report["ess"]
    assert raw["forward_ess"] < report["forward_ess"] <= 1


def test_moments_and_quantiles_are_weighted(report):
    np.testing.assert_allclose(report["mean"], [1.0, -2.0], atol=0.3)
    np.testing.assert_allclose(report["sd"], 2.0, rtol=0.1)
    levels = report["quantile_levels"]
    assert report["quantiles"].shape == report["quantiles_exact"].shape
    assert report["quantiles"].shape == (len(levels), 2)
    middle = list(levels).index(0.5)
    np.testing.assert_allclose(report["quantiles"][middle], [1.0, -2.0], atol=0.4)


def test_a_good_sampler_is_trusted_by_its_exact_draws(report):
    assert report["verdict"].startswith("trust")
    assert report["pareto_k"] < 0.7


def test_evaluations_are_those_of_draws_and_probe(report):
    assert report["num_energy_evaluations"] == 3 * NUM  # draws, probe, EUBO
    assert report["num_gradient_evaluations"] == 0
    assert report["num_network_evaluations"] == 3 * NUM * 4


def test_a_target_that_knows_nothing_of_itself():
    plain = ds.Target(energy=GAUSSIAN.energy, dim=2)
    report = evaluate(plain)
    assert set(report) == ALWAYS
    assert report["verdict"] == "reweight (coverage unchecked)"


def test_log_z_without_draws():
    known = ds.Target(energy=GAUSSIAN.energy, dim=2, log_z=LOG_Z)
    assert set(evaluate(known)) == ALWAYS | KNOWN_LOG_Z


def test_reference_draws_stand_in_for_a_sampler():
    plain = ds.Target(energy=GAUSSIAN.energy, dim=2)
    draws = np.asarray(GAUSSIAN.sample(jax.random.key(3), 1_200))
    report = evaluate(plain, reference_draws=draws)
    assert set(report) == ALWAYS | WITH_DRAWS
    assert report["elbo"] < LOG_Z < report["eubo"]
    assert not report["collapsed"]
    # Half of them each; 600 points have a floor of their own.
    assert 0.5 * report["w2_floor"] < report["w2"] < 2 * report["w2_floor"]


def test_mode_weights():
    target = ds.targets.gmm9()
    sampler = ds.samplers.dis(2, 4, scale=4.0, network=CONTROL)
    report = evaluate(target, sampler, num_draws=600)
    assert set(report) == (
        ALWAYS | KNOWN_LOG_Z | WITH_DRAWS | MODES | {"eubo_gap", "mode_tv_floor"}
    )
    assert report["mode_weights"].shape == (9,)
    assert report["mode_weights"].sum() == pytest.approx(1.0)
    # One wide Gaussian: its raw shares are wrong (a quarter of it in the middle), the
    # weighted ones right but noisy (the ESS is a tenth).
    assert report["mode_tv_unweighted"] == pytest.approx(0.16, abs=0.04)
    assert report["mode_tv"] < 0.25
    assert 0 < report["mode_tv_floor"] < 0.1


def test_a_floor_is_of_as_many_points():
    target = ds.targets.gmm9()
    sampler = ds.samplers.dis(2, 4, scale=4.0, network=CONTROL)
    for num_reference, known in ((599, False), (600, True)):
        draws = target.sample(jax.random.key(0), num_reference)
        report = evaluate(target, sampler, reference_draws=draws)
        assert ("mode_tv_floor" in report) == known


def test_sinkhorn_and_its_floor_have_one_entropy(monkeypatch):
    seen, solve = [], ds.metrics.sinkhorn_divergence

    def spy(x, y, **options):
        seen.append(options["epsilon"])
        return solve(x, y, **options)

    monkeypatch.setattr(ds.metrics, "sinkhorn_divergence", spy)
    target = ds.targets.gmm9()
    lost = ds.samplers.dis(2, 4, loc=5.0, scale=0.55, network=CONTROL)
    report = evaluate(target, lost, num_draws=64, sinkhorn=True)
    assert len(seen) == 3
    assert set(seen) == {report["sinkhorn_epsilon"]}
    exact = 0.05 * 2 * (2 * 25 / 3 + 0.3)  # nine modes at -5, 0 and 5, variance 0.3
    assert report["sinkhorn_epsilon"] == pytest.approx(exact, rel=0.3)
    assert report["sinkhorn"] > 10 * report["sinkhorn_floor"]


def test_a_lost_mode_shows():
    target = ds.targets.gmm9()
    sampler = ds.samplers.dis(2, 4, loc=5.0, scale=0.55, network=CONTROL)
    report = evaluate(target, sampler, num_draws=200)
    assert report["verdict"].startswith("do not trust")
    assert report["collapsed"]
    assert report["missing_mass"] > 0.8 > report["coverage_tolerance"]
    assert report["mode_tv"] == pytest.approx(8 / 9, abs=0.01)
    assert report["log_z_error"] == pytest.approx(-np.log(9), abs=0.1)
    assert report["eubo_gap"] > 5
    assert report["forward_ess"] < 0.01
    assert report["w2"] > 5 * report["w2_floor"]


def test_no_usable_weight_is_a_report_and_not_an_error():
    target = ds.Target(
        energy=lambda x: jnp.where(x[0] > 1e6, 0.0, jnp.inf), dim=2, log_z=0.0
    )
    report = evaluate(target)
    assert report["verdict"].startswith("do not trust")
    assert report["log_z"] == report["log_z_smoothed"] == -np.inf
    assert report["log_z_standard_error"] == np.inf
    np.testing.assert_allclose(report["sd"], 2.2, rtol=0.1)  # of the raw draws


def test_the_same_key_gives_the_same_report(report):
    again = evaluate(GAUSSIAN)
    for name, value in report.items():
        np.testing.assert_array_equal(again[name], value)
    assert evaluate(GAUSSIAN, seed=2)["elbo"] != report["elbo"]


def test_bad_numbers():
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        evaluate(GAUSSIAN, num_draws=1)
    with pytest.raises(ValueError, match=r"num_draws must be an integer, got 100\.0"):
        evaluate(GAUSSIAN, num_draws=1e2)
    with pytest.raises(ValueError, match=r"reference_draws.*\[1, 2\]"):
        evaluate(GAUSSIAN, reference_draws=np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"target has dim=3, .* sampler has dim=2"):
        evaluate(ds.Target(energy=GAUSSIAN.energy, dim=3))
    with pytest.raises(ValueError, match=r"must be a Target, .* ds\.Target\(energy"):
        evaluate(GAUSSIAN.energy)


def test_without_ott(monkeypatch):
    """By default Sinkhorn is left out; asked for, its lack is told at once."""
    monkeypatch.setitem(sys.modules, "ott", None)
    with pytest.raises(ImportError):
        evaluate(GAUSSIAN, sinkhorn=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "ott" else find_spec(name, *rest),
    )
    report = evaluate(GAUSSIAN, sinkhorn=None, num_draws=64)
    assert "w2" in report
    assert "sinkhorn" not in report
