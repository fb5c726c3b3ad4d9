"""The face: the first snippet of the design runs as written, on a small budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffsamp as ds

# Optax, OTT and NumPyro promote by themselves.
pytestmark = pytest.mark.relaxed("dtypes", "ranks")


@pytest.mark.slow  # .ci/run takes it
def test_the_face_runs_as_written(tmp_path):
    target = ds.targets.gmm25()
    assert target.energy(jnp.zeros(target.dim)).shape == ()
    assert target.log_z == 0
    assert target.sample(jax.random.key(0), 3).shape == (3, 2)
    sampler = ds.samplers.dis(dim=target.dim, num_steps=10)
    params = sampler.init(jax.random.key(0))

    trajectory = sampler(params, jax.random.key(1), target.energy)
    batch = jax.vmap(sampler, in_axes=(None, 0, None))(
        params, jax.random.split(jax.random.key(2), 512), target.energy
    )
    assert batch.log_weight.shape == (512,)
    assert trajectory.xs.shape == (11, 2)
    assert trajectory.x.shape == (2,)
    assert trajectory.log_weight.shape == trajectory.log_prior.shape == ()
    assert trajectory.log_generation.shape == trajectory.log_destruction.shape == (10,)
    assert trajectory.energy.shape == ()
    again = sampler.score(params, trajectory.xs, target.energy)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        again,
        trajectory,
    )
    back = sampler.trace_back(params, jax.random.key(9), trajectory.x, target.energy)
    np.testing.assert_array_equal(back.x, trajectory.x)

    objective = ds.objectives.trajectory_balance()
    assert isinstance(objective, ds.Objective)
    objective = ds.objectives.weighted_sum(
        (ds.objectives.log_variance(), 1.0), (ds.objectives.self_consistency(), 0.5)
    )
    behaviour = ds.behaviours.mixture(
        (ds.behaviours.on_policy(), 0.5),
        (ds.behaviours.replay(capacity=100_000), 0.5),
    )

    fit = ds.fit(
        jax.random.key(3),
        sampler,
        objective,
        target.energy,
        behaviour=behaviour,
        optimizer=optax.adam(1e-3),
        num_updates=5,
        batch_size=32,
    )
    draws = ds.draw(
        jax.random.key(4), sampler, fit.params, target.energy, num_draws=200
    )
    assert draws.x.shape == (200, 2)
    assert draws.log_weight.shape == (200,)
    evidence = draws.log_evidence
    assert evidence.lower <= evidence.estimate
    assert evidence.standard_error > 0
    assert evidence.upper is None
    diagnostics = draws.diagnostics
    assert 0 < diagnostics.ess <= 200
    assert not np.isnan(diagnostics.pareto_k)
    assert diagnostics.num_gradient_evaluations == 200 * 11
    assert not diagnostics.verdict.startswith("trust")
    assert draws.resample(jax.random.key(6), 1_000).shape == (1_000, 2)

    report = ds.evaluate(jax.random.key(5), sampler, fit.params, target, num_draws=200)
    wanted = {"elbo", "eubo", "log_z", "ess", "sinkhorn", "w2", "mode_weights"}
    assert wanted <= set(report)
    assert report["elbo"] < 0 < report["eubo"]
    for name in ("sinkhorn", "sinkhorn_scds_n200"):  # the latter depends on N
        assert np.isfinite(report[name])
        assert 0 < report[f"{name}_floor"] < report[f"{name}_unweighted"]

    path = tmp_path / "sampler.ds"
    ds.save(path, sampler, fit.params)
    sampler, params = ds.load(path)
    jax.tree.map(np.testing.assert_array_equal, params, fit.params)
    fast = sampler.with_num_steps(1)
    assert fast(params, jax.random.key(1), target.energy).xs.shape == (2, 2)


def test_other_samplers_are_as_easy():
    for name in ("pis", "dis", "dds", "gbs"):
        sampler = getattr(ds.samplers, name)(dim=3, num_steps=4)
        assert isinstance(sampler, ds.Sampler)
        assert jax.eval_shape(sampler.init, jax.random.key(0)).keys() >= {"generation"}


def test_samplers_are_static_values():
    one, other = (ds.samplers.dis(dim=2, num_steps=4) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != other.with_num_steps(5)


def test_numpyro_target():
    numpyro = pytest.importorskip("numpyro")
    from diffsamp.numpyro import target_from_model

    def model(y):
        mean = numpyro.sample("mean", numpyro.distributions.Normal(0.0, 2.0))
        numpyro.sample("y", numpyro.distributions.Normal(mean, 1.0), obs=y)

    target = target_from_model(model, (jnp.array([0.5, 1.5]),))
    assert isinstance(target, ds.Target)
    assert target.dim == 1

    # N(0, 4) prior and two observations: precision 2.25, mean 2 / 2.25.
    def energy(value):
        return float(target.energy(jnp.array([value])))

    expected = 0.5 * 2.25 * ((0.1 - 2 / 2.25) ** 2 - (0.9 - 2 / 2.25) ** 2)
    assert energy(0.1) - energy(0.9) == pytest.approx(expected, abs=1e-4)
