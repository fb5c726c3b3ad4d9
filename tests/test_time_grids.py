"""Learned time grids: a better ELBO, and a sampler like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_flow import LOC, MEAN, SCALE, SD, score_control
from tables import NOISE_SCHEDULES, SAMPLERS

import diffsamp as ds
from diffsamp import checkpoint

KEY = jax.random.key(0)
SCHEDULE = ds.schedules.geometric(0.1)


def gaussian_energy(x):
    """Of the normalised target of `score_control`."""
    sd = jnp.array(SCALE) * jnp.asarray(SD, x.dtype)
    mean = jnp.array(LOC) + jnp.array(SCALE) * jnp.asarray(MEAN, x.dtype)
    z = (x - mean) / sd
    return 0.5 * jnp.sum(z**2) + jnp.sum(jnp.log(sd)) + jnp.log(2 * jnp.pi)


def sampler_on(grid, num_steps=6):
    return ds.samplers.dis(
        2,
        num_steps,
        loc=LOC,
        scale=SCALE,
        schedule=SCHEDULE,
        time_grid=grid,
        network=score_control(SCHEDULE),
    )


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
def test_a_bad_grid_gets_better():
    """The geometric schedule is built so that uniform times are about optimal."""
    bad, good = (sampler_on(ds.schedules.power_grid(p)) for p in (3.0, 1.0))
    params = bad.init(KEY)
    tuned = ds.tune_time_grid(KEY, bad, params, gaussian_energy, learning_rate=0.1)

    def elbo(sampler):
        draws = ds.draw(jax.random.key(9), sampler, params, gaussian_energy, 40_000)
        return draws.log_evidence.lower

    assert tuned.elbo_after > tuned.elbo_before + 10 * tuned.standard_error
    assert elbo(bad) == pytest.approx(tuned.elbo_before, abs=0.15)
    assert elbo(tuned.sampler) == pytest.approx(tuned.elbo_after, abs=0.15)
    assert elbo(tuned.sampler) > elbo(good) - 0.05
    times = tuned.sampler.process.coefficients(6).times
    np.testing.assert_array_equal(times, tuned.times)
    assert (times[0], times[-1]) == (0, 1)
    assert np.all(np.diff(times) > 0)
    assert tuned.sampler == tuned.sampler.with_num_steps(6)
    process = tuned.sampler.process
    assert checkpoint._decode(checkpoint._encode(process)) == process
    with pytest.raises(ValueError, match="this time grid has 6 steps, got 3"):
        tuned.sampler.with_num_steps(3).steps()


@pytest.mark.relaxed("dtypes")
def test_a_grid_that_is_no_better_is_not_taken():
    sampler = sampler_on(ds.schedules.power_grid(1.0))
    params = sampler.init(KEY)
    options = {"num_updates": 1, "batch_size": 1, "learning_rate": 30.0}
    tuned = ds.tune_time_grid(KEY, sampler, params, gaussian_energy, **options)
    assert tuned.sampler == sampler
    assert tuned.elbo_after == tuned.elbo_before
    # Two grids are judged on 4,096 paths each; this control asks for no score.
    assert tuned.num_energy_evaluations == 2 * 4_096
    assert tuned.num_gradient_evaluations == 1  # of the one path of training
    assert tuned.num_network_evaluations == 6 * (2 * 4_096 + 1)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_processes_take_learned_times(x64, name):
    """JAX times give what NumPy times give."""
    process = SAMPLERS[name]().process
    host = process.coefficients(5)
    traced = jax.jit(process.on)(jnp.asarray(host.times))
    for a, b in zip(host, traced, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_schedules_take_learned_times(x64, name):
    schedule = NOISE_SCHEDULES[name]()
    times = np.linspace(0, 1, 9)
    traced = jax.jit(schedule.signal)(jnp.asarray(times))
    np.testing.assert_allclose(schedule.signal(times), traced, rtol=1e-12)


def test_bad_input():
    sampler = sampler_on(ds.schedules.power_grid(1.0))
    params = sampler.init(KEY)
    with pytest.raises(ValueError, match="must be positive, got 0, 256"):
        ds.tune_time_grid(KEY, sampler, params, gaussian_energy, num_updates=0)
    one = sampler.with_num_steps(1)
    with pytest.raises(ValueError, match="there is no grid to tune"):
        ds.tune_time_grid(KEY, one, params, gaussian_energy)
    for times in ((0.0, 0.5), (0.0, 0.5, 0.5, 1.0), (1.0,)):
        with pytest.raises(ValueError, match="times must increase from 0 to 1"):
            ds.schedules.FixedGrid(times)
