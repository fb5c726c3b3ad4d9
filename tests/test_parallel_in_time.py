"""Parareal: exact after as many iterations as blocks, or sooner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_flow import LOC, SCALE, step_control
from tables import SMALL, perturbed, skewed_energy

import diffsamp as ds

KEY = jax.random.key(0)
SCHEDULE = ds.schedules.geometric(0.1)
START = np.array([1.3, -2.0])


def flow_of(network, num_steps=16, solver=None, **options):
    sampler = ds.samplers.scds(
        2,
        num_steps,
        loc=LOC,
        scale=SCALE,
        schedule=SCHEDULE,
        network=network,
        **options,
    )
    params = perturbed(sampler.init(KEY), 0.3)
    return ds.probability_flow(sampler, solver or ds.solvers.frozen()), params


NETWORK = ds.networks.annealed_score_guided(**SMALL, step_conditioned=True)


@pytest.mark.parametrize("num_blocks", [1, 4, 8])
def test_all_iterations_give_the_sequential_path(x64, num_blocks):
    flow, params = flow_of(NETWORK)
    run = functools.partial(ds.parareal, flow, energy=skewed_energy, tolerance=0.0)
    found = jax.jit(lambda x: run(params, x, num_blocks=num_blocks))(jnp.asarray(START))
    end = jax.jit(lambda x: flow.solve(params, x, skewed_energy))(jnp.asarray(START))
    assert int(found.num_iterations) == num_blocks
    assert found.xs.shape == (num_blocks + 1, 2)
    np.testing.assert_array_equal(found.xs[0], START)
    np.testing.assert_array_equal(found.xs[-1], found.x)
    np.testing.assert_allclose(found.x, end, rtol=1e-9)


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_every_iteration_gains_a_block(x64, num_iterations):
    """After i iterations the first i blocks are the sequential ones, and no more."""
    flow, params = flow_of(NETWORK)
    start = jnp.asarray(START)

    @jax.jit
    def sequential(y):
        step = flow.stepper(params, skewed_energy)
        ys = jax.lax.scan(lambda y, k: (step(k, y),) * 2, y, jnp.arange(16))[1]
        return flow.sampler.original(ys[1::2])  # of 8 blocks

    blocks = sequential(flow.sampler.unit(start))
    tolerance = {1: 1.0, 3: 1e-4}[num_iterations]
    run = jax.jit(
        lambda x: ds.parareal(flow, params, x, skewed_energy, 8, tolerance=tolerance)
    )
    found = run(start)
    assert int(found.num_iterations) == num_iterations
    done, rest = found.xs[1 : num_iterations + 1], found.xs[num_iterations + 1 :]
    np.testing.assert_allclose(done, blocks[:num_iterations], rtol=1e-9)
    assert np.all(np.max(np.abs(rest - blocks[num_iterations:]), axis=1) > 1e-7)


def test_a_perfect_coarse_step_leaves_nothing_to_do(x64):
    flow, _ = flow_of(step_control(SCHEDULE))
    params = flow.init(KEY)
    run = jax.jit(lambda x: ds.parareal(flow, params, x, skewed_energy, 4))
    found = run(jnp.asarray(START))
    assert int(found.num_iterations) == 1
    assert float(found.change) < 1e-12


def test_it_stops_when_nothing_changes(x64):
    flow, params = flow_of(NETWORK, 64)
    found = jax.jit(
        lambda x: ds.parareal(flow, params, x, skewed_energy, 16, tolerance=1e-6)
    )(jnp.asarray(START))
    end = flow.solve(params, jnp.asarray(START), skewed_energy)
    assert 1 <= int(found.num_iterations) < 16
    assert float(found.change) < 1e-6
    np.testing.assert_allclose(found.x, end, atol=1e-4)


def test_rows_stop_together_under_vmap(x64):
    flow, params = flow_of(NETWORK)
    xs = jax.random.normal(KEY, (5, 2))
    run = jax.jit(jax.vmap(lambda x: ds.parareal(flow, params, x, skewed_energy, 4)))
    found = run(xs)
    ends = jax.vmap(lambda x: flow.solve(params, x, skewed_energy))(xs)
    assert np.all(found.num_iterations <= 4)
    np.testing.assert_allclose(found.x, ends, atol=0.01)


def halves_elsewhere(num_steps):
    return np.linspace(0, 1, num_steps + 1) ** (1 + 1 / num_steps)


def test_bad_input():
    flow, params = flow_of(NETWORK)
    for num_blocks in (0, 3, 16, 32):
        with pytest.raises(ValueError, match=f"must divide .* got {num_blocks} for 16"):
            ds.parareal(flow, params, jnp.asarray(START), skewed_energy, num_blocks)
    with pytest.raises(ValueError, match="tolerance must not be negative, got -1"):
        ds.parareal(flow, params, jnp.asarray(START), skewed_energy, 4, tolerance=-1)
    other, params = flow_of(NETWORK, time_grid=halves_elsewhere)
    with pytest.raises(ValueError, match="not among those of 16"):
        ds.parareal(other, params, jnp.asarray(START), skewed_energy, 4)
    two_calls, params = flow_of(NETWORK, solver=ds.solvers.heun())
    with pytest.raises(ValueError, match="Heun cannot take a single step"):
        ds.parareal(two_calls, params, jnp.asarray(START), skewed_energy, 4)
