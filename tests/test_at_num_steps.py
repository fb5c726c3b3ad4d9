"""An objective at other step counts: by hand, in turn, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import (
    LOG_Z,
    SMALL,
    batch_of_paths,
    counting_energy,
    perturbed,
    skewed_energy,
)

import diffsamp as ds
from diffsamp.objectives import at_num_steps, log_variance, trajectory_balance

KEY = jax.random.key(0)
FREE = ds.networks.free(**SMALL, learn_variance=True, step_conditioned=True)
SAMPLER = ds.samplers.scds(
    2, 8, loc=(0.4, -0.3), scale=(1.8, 1.5), network=FREE, destruction_network=FREE
)


def half_on_policy(params):
    first = jnp.arange(8) < 4
    rows = {"on_policy": first, "target_draws": ~first}
    return batch_of_paths(SAMPLER, params, 8, KEY, **rows)


def test_each_count_has_its_turn_and_its_own_weights():
    params = perturbed(SAMPLER.init(KEY), 0.2)
    seen = []

    def spy(params, state, batch):
        log_weight = batch.trajectories.log_weight
        seen.append(batch)
        return jnp.mean(log_weight), {"ends": batch.paths.xs[:, -1]}

    objective = at_num_steps(log_variance()._replace(loss=spy), (1, 4))

    @jax.jit
    def run(params, count):
        batch = half_on_policy(params)._replace(count=count)
        return objective.loss({"sampler": params, "objective": {}}, (), batch)

    values = []
    ends = half_on_policy(params).paths.xs[:, -1]
    for count in range(3):
        value, metrics = run(params, jnp.asarray(count))
        values.append(float(value))
        np.testing.assert_allclose(metrics["ends"][4:], ends[4:], rtol=1e-5)
        assert not np.any(np.isclose(metrics["ends"][:4], ends[:4]))
        assert (int(metrics["cost"].energy), int(metrics["cost"].gradient)) == (16, 0)
    assert values[0] == values[2] != values[1]
    assert [b.sampler.num_steps for b in seen] == [1, 4]
    assert [b.trajectories.log_generation.shape for b in seen] == [(8, 1), (8, 4)]
    assert all(b.rollouts is None for b in seen)


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
@pytest.mark.parametrize("name", ["balance", "variance"])
def test_any_step_training_keeps_the_weights_honest(x64, name):
    """Both kernels learned; then, by quadrature over all paths of one step, Z."""
    tied = ds.networks.tied(ds.networks.free(**SMALL, step_conditioned=True), FREE)
    sampler = ds.samplers.scds(
        1, 4, loc=0.2, scale=1.3, network=tied, destruction_network=FREE
    )
    few = {"balance": trajectory_balance, "variance": log_variance}[name]()
    start = perturbed(sampler.init(KEY), 0.2)
    fit = ds.fit(
        KEY,
        sampler,
        ds.objectives.weighted_sum(
            (log_variance(), 1.0),
            (at_num_steps(few, (1, 2, 4)), 1.0),
            (ds.objectives.self_consistency(), 1.0),
        ),
        skewed_energy,
        optimizer=optax.adam(1e-2),
        params=start,
        num_updates=6,
        batch_size=8,
        ema_decay=None,
        progress_bar=False,
    )
    assert int(fit.state.num_skipped) == 0
    for member in range(3):
        assert np.all(np.isfinite(fit.metrics[f"loss_{member}"]))
    for kernel in ("generation", "destruction"):
        for a, b in zip(
            *(jax.tree.leaves(p[kernel]) for p in (fit.params, start)), strict=True
        ):
            assert np.max(np.abs(a - b)) > 1e-3
    points = np.linspace(-12, 12, 401)
    xs = jnp.asarray(np.stack(np.meshgrid(points, points), -1).reshape(-1, 2, 1))
    one = sampler.with_num_steps(1)

    @jax.jit
    def integral(params):
        path = jax.vmap(lambda xs: one.score(params, xs, skewed_energy))(xs)
        weighted = path.log_prior + path.log_generation[:, 0] + path.log_weight
        return jnp.sum(jnp.exp(weighted)) * (points[1] - points[0]) ** 2

    assert float(integral(fit.params)) == pytest.approx(np.exp(LOG_Z), rel=1e-6)


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
def test_energies_are_counted_and_log_z_is_shared():
    energy, take = counting_energy(skewed_energy)
    balance = trajectory_balance()
    fit = ds.fit(
        KEY,
        SAMPLER,
        ds.objectives.weighted_sum(
            (log_variance(), 1.0), (at_num_steps(balance, (1, 2)), 1.0)
        ),
        energy,
        num_updates=3,
        batch_size=8,
        progress_bar=False,
    )
    made = take()
    assert fit.num_energy_evaluations == made["energy"]
    assert fit.num_gradient_evaluations == made["gradient"] == 0


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
def test_network_calls_are_counted():
    """Of a sampler with one network, so that every pass is of that one."""
    calls = [0]

    def add(_):
        calls[0] += 1

    def drift(params, x, t, context):
        jax.debug.callback(add, x)
        return FREE(params, x, t, context)[:2]

    network = ds.networks.from_function(lambda key, dim: FREE.init(key, dim, 0), drift)
    objective = ds.objectives.weighted_sum(
        (log_variance(), 1.0),
        (at_num_steps(log_variance(), (1, 2)), 1.0),
        (ds.objectives.self_consistency(), 1.0),
    )
    fit = ds.fit(
        KEY,
        ds.samplers.scds(2, 4, network=network),
        objective,
        skewed_energy,
        num_updates=3,
        batch_size=8,
        progress_bar=False,
    )
    jax.effects_barrier()
    per_row = 3 * 2 * 4 + 2 * (1 + 2 + 1) + 3 * 3  # in three updates
    assert fit.num_network_evaluations == calls[0] == 8 * per_row + 4 * 1_024  # pilot


@pytest.mark.parametrize("num_steps", [(), (0, 1)])
def test_bad_step_counts(num_steps):
    with pytest.raises(ValueError, match="step counts of at least 1"):
        at_num_steps(log_variance(), num_steps)


@pytest.mark.parametrize(
    ("num_steps", "found"), [((1, 3), "3"), ((16,), "16"), ((2, 3, 16), "3, 16")]
)
def test_step_counts_that_the_sampler_is_not_trained_for(num_steps, found):
    objective = ds.objectives.weighted_sum(
        (log_variance(), 1.0), (at_num_steps(trajectory_balance(), num_steps), 1.0)
    )
    with pytest.raises(ValueError, match=f"must divide 8, .* got {found}$"):
        objective.init(KEY, SAMPLER, None, skewed_energy, None)


def test_time_grids_that_know_one_step_count():
    grid = ds.schedules.FixedGrid((0.0, 0.3, 1.0))
    sampler = ds.samplers.dis(2, 2, network=FREE, time_grid=grid)
    objective = at_num_steps(log_variance(), (1,))
    with pytest.raises(ValueError, match="time grid has 2 steps, got 1"):
        objective.init(KEY, sampler, None, skewed_energy, None)


@pytest.mark.parametrize("name", ["reverse_kl", "trust_region_log_variance"])
def test_objectives_that_cannot(name):
    with pytest.raises(ValueError, match="draws its own detached paths"):
        at_num_steps(getattr(ds.objectives, name)(), (1,))


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
def test_few_steps_learn_their_own_weights():
    """A shifted Gaussian of unequal scales: one step can be exact, and becomes so."""
    mean, sd = jnp.array([1.0, -0.5]), jnp.array([0.3, 1.2])

    def energy(x):
        return 0.5 * jnp.sum(((x - mean) / sd) ** 2)

    log_z = float(jnp.log(2 * jnp.pi) + jnp.sum(jnp.log(sd)))
    jeffreys = ds.objectives.weighted_sum(
        (ds.objectives.reverse_kl_log_derivative(), 1.0),
        (ds.objectives.forward_kl_log_derivative(), 1.0),
    )
    draws = mean[None] + sd[None] * jax.random.normal(KEY, (2_000, 2))
    fit = ds.fit(
        KEY,
        SAMPLER,
        at_num_steps(jeffreys, (1, 2)),
        energy,
        behaviour=ds.behaviours.mixture(
            (ds.behaviours.on_policy(), 0.5),
            (ds.behaviours.reference_draws(draws), 0.5),
        ),
        optimizer=optax.adam(1e-2),
        anneal=ds.schedules.cosine_anneal,
        num_updates=1_500,
        batch_size=64,
        progress_bar=False,
    )
    for num_steps in (1, 2):
        few = SAMPLER.with_num_steps(num_steps)
        found = ds.draw(KEY, few, fit.params, energy, 4_000, probe=draws[:1_000])
        evidence = found.log_evidence
        assert log_z - 0.1 < evidence.lower < log_z + 0.01
        assert log_z - 0.01 < evidence.upper < log_z + 0.1
        assert found.diagnostics.ess_fraction > 0.9
