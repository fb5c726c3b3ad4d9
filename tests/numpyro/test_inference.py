"""DiffusionSampler: from a model to draws, evidence and a verdict."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, Predictive

from diffsamp.numpyro import Affine, DiffusionSampler, affine_from, pilots
from diffsamp.numpyro.agreement import PRECISE, imprecision
from diffsamp.types import Target

pytestmark = pytest.mark.relaxed("dtypes", "ranks")

DATA = jnp.array([0.5, 1.5, 1.0])


def model(y=None):
    """Conjugate: N(0, 4) prior, unit noise."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    numpyro.deterministic("twice", 2 * mean)
    with numpyro.plate("data", 3):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


PRECISION = 3 + 1 / 4
POSTERIOR_MEAN, POSTERIOR_SD = 3.0 / PRECISION, PRECISION**-0.5
COVARIANCE = np.eye(3) + 4.0
LOG_Z = -0.5 * (
    np.asarray(DATA) @ np.linalg.solve(COVARIANCE, np.asarray(DATA))
    + np.linalg.slogdet(2 * np.pi * COVARIANCE)[1]
)


def improper(y):
    mean = numpyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def small(model, **options):
    defaults = {"num_steps": 4, "num_particles": 256, "max_seconds": 2.0}
    return DiffusionSampler(model, **(defaults | options))


@pytest.fixture(scope="module")
def inference():
    made = small(model)
    made.fit(jax.random.key(0), 400, y=DATA, progress_bar=False)
    made.run(jax.random.key(1), 2_000, y=DATA, progress_bar=False)
    return made


def test_the_answer(inference):
    samples = inference.get_samples()
    assert samples["mean"].shape == samples["twice"].shape == (2_000,)
    np.testing.assert_allclose(samples["twice"], 2 * samples["mean"], 1e-5, 1e-6)
    assert samples["mean"].mean() == pytest.approx(POSTERIOR_MEAN, abs=0.05)
    assert samples["mean"].std() == pytest.approx(POSTERIOR_SD, rel=0.1)
    evidence = inference.log_evidence
    assert abs(evidence.estimate - LOG_Z) < 4 * evidence.standard_error + 1e-3
    assert evidence.lower <= LOG_Z + 0.01
    assert inference.diagnostics.verdict.startswith("trust")


def test_shapes_are_those_of_mcmc(inference):
    mcmc = MCMC(NUTS(model), num_warmup=20, num_samples=30, progress_bar=False)
    mcmc.run(jax.random.key(0), y=DATA)
    for grouped in (False, True):
        one, other = (m.get_samples(group_by_chain=grouped) for m in (mcmc, inference))
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].ndim == other[name].ndim
    fields = inference.get_extra_fields(group_by_chain=True)
    assert fields["potential_energy"].shape == fields["log_weight"].shape == (1, 2_000)


def test_potential_energies_are_in_the_models_coordinates(inference):
    energy = inference.state.target.standardised(None).energy
    x = inference.get_samples()["mean"][:20]
    expected = jax.vmap(energy)(x[:, None])
    found = inference.get_extra_fields()["potential_energy"][:20]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_weighted_samples(inference):
    samples, log_weight = inference.get_weighted_samples()
    assert len(log_weight) == len(samples["mean"]) >= 2_000
    assert np.exp(log_weight).sum() == pytest.approx(1.0, abs=1e-3)
    mean = np.exp(log_weight) @ np.asarray(samples["mean"])
    assert mean == pytest.approx(POSTERIOR_MEAN, abs=0.05)


def test_summary(inference, capsys):
    inference.print_summary()
    printed = capsys.readouterr().out
    for words in ("mean", "5.0%", "log Z", "ELBO", "k-hat", "verdict"):
        assert words in printed
    assert "twice" not in printed


def test_everything_is_counted(inference):
    report, cost = inference.diagnostics, inference.state.cost
    assert report.num_energy_evaluations > cost.energy > 0
    assert report.num_gradient_evaluations >= cost.gradient > 0
    assert report.num_network_evaluations > cost.network > 0
    pilot = inference.state.pilot
    assert cost.gradient >= pilot.num_gradient_evaluations


def test_predictive(inference):
    predictive = Predictive(model, inference.get_samples())
    assert predictive(jax.random.key(1))["y"].shape == (2_000, 3)


@pytest.mark.slow
def test_the_kernel(inference):
    mcmc = MCMC(inference.kernel(), num_warmup=0, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(2), y=DATA, extra_fields=("accept_prob",))
    assert mcmc.get_samples()["mean"].mean() == pytest.approx(POSTERIOR_MEAN, abs=0.15)
    assert mcmc.get_extra_fields()["accept_prob"].mean() > 0.5


def test_trained_once_for_the_same_data(inference, monkeypatch):
    monkeypatch.setattr(inference, "fit", lambda *_, **__: pytest.fail("trained"))
    inference.run(jax.random.key(3), 100, y=jnp.array(DATA))
    assert inference.num_samples == 100


def test_draws_until_moments_are_known(inference, monkeypatch):
    inference.run(jax.random.key(3), 100, y=DATA)
    assert inference.get_samples()["mean"].shape == (100,)
    draws = inference.draws
    assert len(draws.x) > 1_000  # 0.03 sd for the mean
    assert imprecision(draws.x, draws.log_weight).excess < 0.7
    assert inference.diagnostics.verdict.startswith("trust")
    monkeypatch.setattr("diffsamp.numpyro.inference.MOST_DRAWS", 500)
    monkeypatch.setitem(PRECISE, "mean", 0.01)
    inference.run(jax.random.key(3), 100, y=DATA)
    assert len(inference.draws.x) == 500
    assert "has a standard error of" in inference.diagnostics.verdict
    assert "'mean'" in inference.diagnostics.verdict


def test_too_few_draws_are_said_to_be_too_few(inference, capsys):
    inference.run(jax.random.key(3), 1, y=DATA)
    assert inference.get_samples()["mean"].shape == (1,)
    inference.print_summary()
    assert "do not trust: too few draws" in capsys.readouterr().out


def test_new_data_of_equal_shape_do_not_compile_the_training_again(inference):
    compiled = []
    listener = functools.partial(_note, compiled)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        inference.fit(jax.random.key(0), 20, y=DATA + 1.0, progress_bar=False)
        inference.run(jax.random.key(1), 2_000, y=DATA + 1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert sum(compiled) < 2.0  # of about 15 seconds
    expected = float(jnp.sum(DATA + 1.0)) / PRECISION
    samples, log_weight = inference.get_weighted_samples()
    mean = np.exp(log_weight) @ np.asarray(samples["mean"])
    assert mean == pytest.approx(expected, abs=0.05)


def _note(found, event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        found.append(seconds)


@pytest.mark.slow
def test_other_data_are_trained_on():
    made = small(model)
    for data in (DATA, DATA + 10.0):
        made.run(jax.random.key(0), 500, y=data, progress_bar=False)
        expected = float(jnp.sum(data)) / PRECISION
        assert made.get_samples()["mean"].mean() == pytest.approx(expected, abs=0.15)


@pytest.mark.slow
def test_fit_goes_on():
    made = small(model)
    first = made.fit(jax.random.key(0), 10, y=DATA, progress_bar=False)
    assert len(first.fit.metrics["loss"]) == 5  # of the second stage
    second = made.fit(jax.random.key(1), 7, y=DATA, state=first, progress_bar=False)
    assert len(second.fit.metrics["loss"]) == 7
    assert second.pilot is first.pilot
    assert second.cost.energy > first.cost.energy


@pytest.mark.slow
def test_a_budget_of_energies():
    made = small(model, max_energy_evaluations=1)
    state = made.fit(jax.random.key(0), None, y=DATA, progress_bar=False)
    assert state.fit is None  # the pilots have spent it
    made.run(jax.random.key(1), 50, y=DATA)
    assert made.get_samples()["mean"].shape == (50,)


@pytest.mark.slow
def test_an_improper_prior_has_no_evidence():
    made = small(improper)
    made.run(jax.random.key(0), 500, y=DATA, progress_bar=False)
    assert made.get_samples()["mean"].mean() == pytest.approx(1.0, abs=0.1)
    with pytest.warns(UserWarning, match="no evidence: the priors of mean"):
        evidence = made.log_evidence
    assert np.isnan(evidence.estimate)


def test_before_anything_is_done():
    made = small(model)
    for call in (made.get_samples, made.print_summary, made.get_weighted_samples):
        with pytest.raises(RuntimeError, match="call run"):
            call()
    with pytest.raises(RuntimeError, match="nothing is trained yet"):
        made.kernel()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DiffusionSampler(3), "model must be a NumPyro model, got"),
        (lambda: DiffusionSampler(model, max_seconds=0.0), "max_seconds must be pos"),
        (
            lambda: DiffusionSampler(model, max_energy_evaluations=1e6),
            "max_energy_evaluations must be an integer",
        ),
        (lambda: small(model).run(jax.random.key(0), 0), "num_samples must be at le"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------ affine coordinates


def test_affine_maps():
    draws = np.random.default_rng(0).normal(size=(5_000, 3)) @ np.array(
        [[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 3.0, 0.1]]
    )
    affine = affine_from(draws + 7.0)
    y = np.asarray(pilots.to_y(affine, jnp.asarray(draws + 7.0, jnp.float32)))
    np.testing.assert_allclose(np.cov(y.T), np.eye(3), atol=0.02)
    back = pilots.to_x(affine, jnp.asarray(y))
    np.testing.assert_allclose(back, draws + 7.0, rtol=1e-3, atol=1e-2)
    volume = np.linalg.slogdet(np.asarray(affine.matrix, np.float64))[1]
    assert float(affine.log_det) == pytest.approx(volume, rel=1e-5)
    with pytest.raises(ValueError, match=r"no spread in coordinates \[1\]"):
        affine_from(np.array([[0.0, 1.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="at least two finite points"):
        affine_from(np.array([[0.0, np.nan], [1.0, 1.0]]))


def test_the_integral_is_the_same_in_affine_coordinates(x64):
    affine = Affine(jnp.array([1.0]), jnp.array([[0.5]]))

    def energy(x):
        return jnp.sum((x - 2.0) ** 4)

    grid = np.linspace(-30, 30, 60_001)
    in_y = pilots.in_affine(energy, affine)
    totals = [
        np.trapezoid(np.exp(-np.asarray(jax.vmap(e)(grid[:, None]))), grid)
        for e in (energy, in_y)
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-8)


@pytest.mark.slow
def test_pilots_without_a_prior_find_a_far_narrow_place():
    def energy(x):
        return 0.5 * jnp.sum(
            ((x - jnp.array([30.0, -4.0])) / jnp.array([0.1, 2.0])) ** 2
        )

    target = Target(energy=energy, dim=2)
    found = pilots.find(jax.random.key(0), target, num_particles=512)
    np.testing.assert_allclose(found.x.mean(axis=0), [30.0, -4.0], atol=0.5)
    np.testing.assert_allclose(found.x.std(axis=0), [0.1, 2.0], rtol=0.2)
    assert found.num_gradient_evaluations > 0
