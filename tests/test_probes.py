"""Independent probes: where they look, what they cost, and what verdict they lead to.

Draws from one of two modes look perfect to themselves; each kind of probe must say so,
and none may spoil a sampler that covers its target. One energy serves both: its data
are the place of the second mode, so that the probes compile once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import diffsamp as ds

# BlackJAX and Optax mix floats with step counts.
pytestmark = pytest.mark.relaxed("dtypes")

DIM = 2
CONTROL = ds.networks.from_function(
    lambda key, dim: jnp.zeros(dim), lambda params, x, t, context: params + 0.0 * x
)
SAMPLER = ds.samplers.dis(DIM, 4, loc=4.0, scale=1.0, network=CONTROL)


def _energy(other, x):
    one = -0.5 * jnp.sum((x - 4.0) ** 2)
    return -jnp.logaddexp(one, -0.5 * jnp.sum((x - other) ** 2))


TWO_MODES = Partial(_energy, jnp.full(DIM, -4.0))
ONE_MODE = Partial(_energy, jnp.full(DIM, 4.0))  # the same mode twice
LOG_Z = np.log(2 * 2 * np.pi)


def _probe(kind, energy, key=None):
    key = jax.random.key(1) if key is None else key
    if kind == "smc":
        return ds.probes.smc(
            key, energy, DIM, scale=5.0, num_particles=1_024, num_mcmc_steps=3
        )
    return ds.probes.multistart(key, energy, DIM, scale=5.0, num_starts=256)


@pytest.fixture(scope="module")
def probes():
    return {
        (kind, name): _probe(kind, energy)
        for kind in ("smc", "multistart")
        for name, energy in (("two", TWO_MODES), ("one", ONE_MODE))
    }


def _draw(energy, probe, num_draws=4_000):
    params = SAMPLER.init(jax.random.key(0))
    return ds.draw(
        jax.random.key(2), SAMPLER, params, energy, num_draws=num_draws, probe=probe
    )


@pytest.mark.parametrize("kind", ["smc", "multistart"])
def test_a_lost_mode_is_found(probes, kind):
    draws = _draw(TWO_MODES, probes[kind, "two"])
    report = draws.diagnostics
    assert report.ess_fraction > 0.99
    assert report.verdict.startswith("do not trust")
    assert "lost a part of the target" in report.verdict
    assert report.collapsed
    assert 0.3 < report.missing_mass < 0.7
    assert draws.log_evidence.estimate < LOG_Z - 0.6  # that is the harm


@pytest.mark.parametrize("kind", ["smc", "multistart"])
def test_a_good_sampler_is_trusted(probes, kind):
    draws = _draw(ONE_MODE, probes[kind, "one"])
    assert draws.diagnostics.verdict == "trust"
    assert not draws.diagnostics.collapsed
    assert abs(draws.log_evidence.estimate - LOG_Z) < 1e-3


@pytest.mark.parametrize("kind", ["smc", "multistart"])
def test_points_lie_in_both_modes(probes, kind):
    probe = probes[kind, "two"]
    points = np.asarray(probe.x)
    assert points.shape == (1_024 if kind == "smc" else 256, DIM)
    assert np.all(np.isfinite(points))
    distance = np.minimum(
        np.abs(points - 4.0).max(axis=1), np.abs(points + 4.0).max(axis=1)
    )
    assert np.mean(distance < 4.0) > 0.98
    assert 0.25 < np.mean(points[:, 0] > 0) < 0.75
    assert probe.name
    assert not probe.target_draws  # nearly so, which bounds nothing


def test_the_cost_of_smc_is_counted(probes):
    probe = probes["smc", "two"]
    assert probe.num_gradient_evaluations > 1_024
    assert probe.num_energy_evaluations > 0
    np.testing.assert_allclose(np.sum(probe.weights), 1.0, rtol=1e-4)
    assert probe.log_z == pytest.approx(LOG_Z, abs=0.4)
    report = _draw(TWO_MODES, probe, num_draws=100).diagnostics
    expected = 100 + 1_024 + probe.num_energy_evaluations
    assert report.num_energy_evaluations == expected
    assert report.num_gradient_evaluations == probe.num_gradient_evaluations


def test_the_cost_of_multistart_is_counted(probes):
    """300 steps of the optimiser, and at least a gradient for each of 50 of NUTS."""
    assert probes["multistart", "two"].num_gradient_evaluations >= 256 * 350


def test_keys(probes):
    raw = _probe("smc", TWO_MODES, jax.random.PRNGKey(1))
    np.testing.assert_array_equal(raw.x, probes["smc", "two"].x)
    other = _probe("smc", TWO_MODES, jax.random.key(7))
    assert not np.array_equal(other.x, raw.x)


def _smc_result(reached):
    return ds.mcmc.SMCResult(
        particles=jnp.arange(8.0).reshape(4, DIM),
        log_weight=jnp.log(jnp.arange(4.0)),
        log_z=jnp.zeros(()),
        num_iterations=jnp.array(3),
        num_energy_evaluations=jnp.array(70),
        num_gradient_evaluations=jnp.array(80),
        acceptance=jnp.array(0.8),
        beta=jnp.array(1.0 if reached else 0.25),
        reached_target=jnp.array(reached),
    )


def test_smc_from_the_prior(monkeypatch):
    """The wrapper alone; what it wraps runs in test_mcmc.py."""
    target, calls = ds.Target(energy=TWO_MODES, dim=DIM), []

    def smc_from_prior(key, target, **options):
        calls.append((target, options))
        return _smc_result(True)

    with monkeypatch.context() as patch:
        patch.setattr(ds.mcmc, "smc_from_prior", smc_from_prior)
        probe = ds.probes.smc_from_prior(
            jax.random.PRNGKey(0), target, num_particles=64, num_mcmc_steps=2
        )
    assert calls == [(target, {"num_particles": 64, "num_mcmc_steps": 2})]
    np.testing.assert_array_equal(probe.x, np.arange(8.0).reshape(4, DIM))
    np.testing.assert_allclose(probe.weights, np.arange(4) / 6, rtol=1e-5)
    assert (probe.num_energy_evaluations, probe.num_gradient_evaluations) == (70, 80)
    with pytest.raises(ValueError, match="prior"):
        ds.probes.smc_from_prior(jax.random.key(0), target)


def test_smc_that_did_not_arrive_says_so(monkeypatch):
    monkeypatch.setattr(
        ds.mcmc, "smc_from_gaussian", lambda *_, **__: _smc_result(False)
    )
    with pytest.raises(ValueError, match=r"temperature 0\.25.*wider reference"):
        _probe("smc", TWO_MODES)


def test_smc_whose_moves_are_rejected_says_so(monkeypatch):
    stuck = _smc_result(True)._replace(particles=jnp.ones((64, DIM)))
    monkeypatch.setattr(ds.mcmc, "smc_from_gaussian", lambda *_, **__: stuck)
    with pytest.raises(ValueError, match="1 distinct points of 64"):
        _probe("smc", TWO_MODES)


def test_prior_draws_are_weighted_by_the_likelihood():
    """Prior N(0, 9), likelihood that of two modes: the probe knows both shares."""

    def log_likelihood(x):
        return -TWO_MODES(x)

    target = ds.Target(
        energy=TWO_MODES,
        dim=DIM,
        log_likelihood=log_likelihood,
        sample_prior=lambda key, n: 3.0 * jax.random.normal(key, (n, DIM)),
    )
    probe = ds.probes.prior(jax.random.key(0), target, num_draws=20_000)
    assert not probe.target_draws
    assert probe.num_energy_evaluations == 20_000
    right = float(jnp.sum(jnp.where(probe.x[:, 0] > 0, probe.weights, 0.0)))
    assert abs(right - 0.5) < 0.1
    assert _draw(TWO_MODES, probe).diagnostics.verdict.startswith("do not trust")
    nowhere = dataclasses.replace(target, log_likelihood=lambda x: x[0] - jnp.inf)
    with pytest.raises(ValueError, match="positive likelihood"):
        ds.probes.prior(jax.random.key(0), nowhere, num_draws=8)
    with pytest.raises(ValueError, match="no prior"):
        ds.probes.prior(jax.random.key(0), ds.targets.gmm9())


def test_smc_finds_no_density():
    nowhere = Partial(_energy, jnp.full(DIM, jnp.nan))
    with pytest.raises(ValueError, match=r"energy is not finite at any of .* sign"):
        _probe("smc", nowhere)
    with pytest.raises(ValueError, match="num_particles must be at least 2, got 0"):
        ds.probes.smc(jax.random.key(0), nowhere, DIM, num_particles=0)


def test_given_draws():
    probe = ds.probes.given(np.zeros((5, DIM)))
    assert (probe.name, probe.weights) == ("given draws", None)
    assert probe.target_draws
    assert probe.num_energy_evaluations == probe.num_gradient_evaluations == 0


@pytest.mark.parametrize(
    ("words", "draws"),
    [
        ("shape", np.zeros(5)),
        ("shape", np.zeros((0, DIM))),
        ("finite", np.array([[0.0, np.inf]])),
        ("finite", np.full((3, DIM), np.nan)),
    ],
)
def test_bad_draws(words, draws):
    with pytest.raises(ValueError, match=words):
        ds.probes.given(draws)


def test_weights_of_a_probe_count():
    """Points in the lost mode that have no weight raise no alarm."""
    points = jnp.concatenate([jnp.full((500, DIM), 4.0), jnp.full((500, DIM), -4.0)])
    points += 0.8 * jax.random.normal(jax.random.key(3), points.shape)
    weights = np.repeat([1.0, 0.0], 500)
    assert _draw(TWO_MODES, ds.Probe(points)).diagnostics.collapsed
    assert not _draw(TWO_MODES, ds.Probe(points, weights)).diagnostics.collapsed
