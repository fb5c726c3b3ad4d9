"""Amortised sampling: one sampler for a family of conditional energies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import OBJECTIVES, SMALL, mostly_slow

import diffsamp as ds

SAMPLER = ds.samplers.dis(
    2, 4, scale=1.5, condition_dim=3, network=ds.networks.free(**SMALL)
)
KEY = jax.random.key(0)


def energy(x, condition):
    """Normal round the first two entries; log Z is twice the third."""
    square = jnp.sum((x - condition[:2]) ** 2)
    return 0.5 * square + jnp.log(2 * jnp.pi).astype(x.dtype) - 2 * condition[2]


def conditions(key, num):
    return 0.7 * jax.random.normal(key, (num, 3))


fit = functools.partial(
    ds.fit,
    KEY,
    SAMPLER,
    energy=energy,
    conditions=conditions,
    batch_size=32,
    num_updates=2,
    progress_bar=False,
)


@functools.cache
def trained(name):
    return fit(
        objective=OBJECTIVES[name](),
        batch_size=128,
        num_updates=600,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 600)),
        ema_decay=None,
    )


@pytest.mark.parametrize(
    "name", mostly_slow(["log_variance", "trajectory_balance"], "trajectory_balance")
)
def test_one_sampler_serves_conditions_it_was_not_trained_on(name):
    for condition in ([0.8, -0.5, 0.3], [-0.4, 0.9, -0.6]):
        draws = ds.draw(
            KEY,
            SAMPLER,
            trained(name).params,
            energy,
            4_000,
            condition=condition,
            probe=jnp.asarray(condition)[None, :2]
            + jax.random.normal(jax.random.key(1), (1_000, 2)),
        )
        evidence = draws.log_evidence
        assert evidence.lower > 2 * condition[2] - 0.3
        assert evidence.upper < 2 * condition[2] + 0.3
        error = abs(evidence.estimate - 2 * condition[2])
        assert error < max(4 * evidence.standard_error, 1e-3)
        mean = np.average(draws.x, axis=0, weights=np.exp(draws.log_weight))
        np.testing.assert_allclose(mean, condition[:2], atol=0.1)


def test_evaluation_under_one_condition():
    condition = jnp.array([0.8, -0.5, 0.3])

    def sample(key, num):
        return condition[None, :2] + jax.random.normal(key, (num, 2))

    target = ds.Target(energy, 2, log_z=2 * float(condition[2]), sample=sample)
    params = trained("trajectory_balance").params
    options = {"num_draws": 2_000, "sinkhorn": False}
    report = ds.evaluate(KEY, SAMPLER, params, target, condition=condition, **options)
    assert abs(report["log_z_error"]) < max(4 * report["log_z_standard_error"], 1e-3)
    assert 0 < report["elbo_gap"] < 0.3
    assert 0 < report["eubo_gap"] < 0.3
    with pytest.raises(ValueError, match="condition_dim=3, condition is None"):
        ds.evaluate(KEY, SAMPLER, params, target, **options)


def test_log_z_is_a_function_of_the_condition():
    from diffsamp.objectives.log_z import log_z_of

    state = trained("trajectory_balance").state
    points = conditions(jax.random.key(5), 64)
    batch = ds.Request(points, jnp.arange(64))
    raw, offset = state.params["objective"]["log_z"], state.objective_state
    learned = np.asarray(log_z_of(raw, offset, 10.0, batch))
    assert np.corrcoef(learned, points[:, 2])[0, 1] > 0.95
    np.testing.assert_allclose(learned, 2 * points[:, 2], atol=0.6)


def test_variance_is_taken_within_conditions():
    log_weight = jnp.array([1.0, 3.0, 5.0, 110.0, 110.0, jnp.nan, 7.0])
    group = jnp.array([0, 0, 0, 4, 4, 4, 6])
    rows = jnp.ones(7, bool)
    trajectories = ds.Trajectory(*[log_weight] * 7)
    batch = ds.Batch(
        trajectories,
        rollouts=None,
        paths=None,
        on_policy=rows,
        target_draws=~rows,
        condition=jnp.zeros((7, 1)),
        group=group,
        count=jnp.asarray(0),
        key=KEY,
        sampler=None,
        energy=None,
    )
    for huber in (None, 1e3):
        objective = ds.objectives.log_variance(huber=huber)
        value, _ = objective.loss({}, (), batch)
        # 4, 0 and, of a single path, 0: the mean over the six usable rows.
        assert float(value) == pytest.approx(4.0 * 3 / 6, rel=1e-3)


@pytest.mark.slow
def test_conditions_from_an_array_and_resume(tmp_path):
    points = np.asarray(conditions(jax.random.key(3), 10))
    objective = ds.objectives.log_variance()
    options = {"objective": objective, "conditions": points, "num_updates": 4}
    whole = fit(**options)
    path = tmp_path / "run"
    fit(**options | {"num_updates": 2}, checkpoint=path)
    resumed = fit(**options, checkpoint=path)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    with pytest.raises(ds.CheckpointError, match="another energy"):
        fit(**options | {"conditions": points + 1.0}, checkpoint=path)
    with pytest.raises(ds.CheckpointError, match="paths_per_condition"):
        fit(**options, paths_per_condition=4, checkpoint=path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"conditions": None}, "condition_dim=3: pass conditions to train on"),
        ({"conditions": np.zeros((4, 2))}, "must have 3 columns .*got \\[2\\]"),
        ({"conditions": np.zeros(3)}, "finite array \\[N, C\\] or a function"),
        ({"conditions": np.full((4, 3), np.nan)}, "finite array"),
        ({"paths_per_condition": 1}, "at least 2 and divide batch_size, got 1 and 32"),
        ({"paths_per_condition": 5}, "divide batch_size, got 5 and 32"),
        (
            {
                "behaviour": ds.behaviours.mixture(
                    (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(64), 0.5)
                )
            },
            "no conditions to go with them",
        ),
    ],
)
def test_bad_conditions_in_training(options, match):
    with pytest.raises(ValueError, match=match):
        fit(objective=ds.objectives.log_variance(), **options)


def test_conditions_for_a_sampler_without_any():
    sampler = ds.samplers.dis(2, 4, network=ds.networks.free(**SMALL))
    with pytest.raises(ValueError, match="the sampler has condition_dim=0"):
        ds.fit(
            KEY,
            sampler,
            ds.objectives.log_variance(),
            lambda x: jnp.sum(x**2),
            conditions=conditions,
        )


@pytest.mark.parametrize("condition", [None, jnp.zeros(2), jnp.zeros((1, 3))])
def test_bad_conditions_in_drawing(condition):
    params = SAMPLER.init(KEY)
    with pytest.raises(ValueError, match="condition must be an array of shape"):
        ds.draw(KEY, SAMPLER, params, energy, 10, condition=condition)
    with pytest.raises(ValueError, match="condition must be an array of shape"):
        ds.log_weights_of(
            KEY, SAMPLER, params, energy, jnp.zeros((2, 2)), condition=condition
        )
