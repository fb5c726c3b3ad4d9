"""Published few-step weights: as they are defined, and no bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_flow import LOC, MEAN, SCALE, SD, signal, step_control
from tables import SMALL, perturbed, skewed_energy

import diffsamp as ds

KEY = jax.random.key(0)
SCHEDULE = ds.schedules.geometric(0.1)


def flow_of(num_steps):
    sampler = ds.samplers.scds(
        2,
        num_steps,
        loc=LOC,
        scale=SCALE,
        schedule=SCHEDULE,
        network=step_control(SCHEDULE),
    )
    return ds.probability_flow(sampler), sampler.init(KEY)


def gaussian_energy(x):
    """Of the normalised target of which the flow is exact: log Z = 0."""
    sd = jnp.array(SCALE) * jnp.array(SD)
    z = (x - jnp.array(LOC) - jnp.array(SCALE) * jnp.array(MEAN)) / sd
    return 0.5 * jnp.sum(z**2) + jnp.sum(jnp.log(sd)) + jnp.log(2 * jnp.pi)


@pytest.mark.parametrize("num_steps", [1, 64])
def test_of_an_exact_flow(x64, num_steps):
    """The true weight is log Z = 0 everywhere; volume changes by a known factor."""
    flow, params = flow_of(num_steps)
    x = jnp.array([1.3, -2.0])
    names = ("boundary_ratio", "first_order_log_determinant")
    functions = (getattr(ds.not_bounds, name) for name in names)
    ratio, first_order = (
        float(jax.jit(lambda x, f=f: f(flow, params, x, gaussian_energy))(x))
        for f in functions
    )
    times = np.linspace(0, 1, num_steps + 1)
    share = np.array([float(signal(SCHEDULE, t)) for t in times])[:, None]
    spread = np.sqrt(share * SD**2 + 1 - share)
    growth = spread[1:] / spread[:-1]
    # p_0 is not quite the law from which the exact flow starts: alpha_bar(0) is 1e-6.
    assert ratio == pytest.approx(-np.sum(np.log(growth)), abs=5e-3)
    error = np.sum(growth - 1 - np.log(growth))
    assert first_order == pytest.approx(error, abs=5e-3)
    assert first_order > (0.1 if num_steps == 1 else 0.001)  # above log Z: no bound


def test_the_divergence_goes_through_the_score(x64):
    """Against finite differences of the steps."""
    network = ds.networks.annealed_score_guided(**SMALL, step_conditioned=True)
    sampler = ds.samplers.scds(2, 2, loc=LOC, scale=SCALE, network=network)
    flow, params = ds.probability_flow(sampler), perturbed(sampler.init(KEY), 0.3)
    step = jax.jit(flow.stepper(params, skewed_energy))
    x, h = jnp.array([1.3, -2.0]), 1e-5
    y, divergence = sampler.unit(x), 0.0
    for k in range(2):
        for i in range(2):
            nudge = h * jnp.eye(2)[i]
            difference = step(k, y + nudge)[i] - step(k, y - nudge)[i]
            divergence += difference / (2 * h) - 1
        y = step(k, y)
    functions = ds.not_bounds.boundary_ratio, ds.not_bounds.first_order_log_determinant
    without, with_it = (
        jax.jit(lambda x, f=f: f(flow, params, x, skewed_energy))(x) for f in functions
    )
    assert float(with_it - without) == pytest.approx(float(divergence), rel=1e-6)


def test_single_steps_are_needed():
    flow, params = flow_of(4)
    flow = ds.probability_flow(flow.sampler, ds.solvers.dpm_solver())
    with pytest.raises(ValueError, match="DPMSolver cannot take a single step"):
        ds.not_bounds.first_order_log_determinant(
            flow, params, jnp.zeros(2), skewed_energy
        )
