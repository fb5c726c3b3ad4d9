"""The probability flow: order of the solvers, draws without weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import SMALL, counting_energy, perturbed, skewed_energy

import diffsamp as ds

KEY = jax.random.key(0)
EMPTY = {"generation": ()}
LOC, SCALE = (0.4, -0.3), (1.8, 1.5)
MEAN, SD = (
    np.array([0.7, -0.2]),
    np.array([0.3, 1.4]),
)  # of the target, unit coordinates
SCHEDULE = ds.schedules.linear(8.0, 0.5)
SOLVERS = {
    "euler": (ds.solvers.euler(), 1),
    "frozen": (ds.solvers.frozen(), 1),
    "exponential": (ds.solvers.exponential(), 1),
    "heun": (ds.solvers.heun(), 2),
    "dpm_solver": (ds.solvers.dpm_solver(), 1.4),
}


def signal(t):
    slope = 0.5 - 8.0
    return jnp.exp(-(8.0 * (1 - t) + 0.5 * slope * (1 - t**2)))


def gaussian(sd):
    """A sampler whose control is the score of a Gaussian target, and its exact flow."""

    def drift(params, y, t, context):
        share = signal(t)
        score = (jnp.sqrt(share) * MEAN - y) / (share * sd**2 + 1 - share)
        return context.gain * (score + y)

    network = ds.networks.from_function(lambda key, dim: (), drift)
    sampler = ds.samplers.dis(
        2, 4, loc=LOC, scale=SCALE, schedule=SCHEDULE, network=network
    )

    def exact(x):
        share = signal(0.0)
        spread = jnp.sqrt(share * sd**2 + 1 - share)
        y = (x - jnp.array(LOC)) / jnp.array(SCALE)
        end = MEAN + sd / spread * (y - jnp.sqrt(share) * MEAN)
        return jnp.array(LOC) + jnp.array(SCALE) * end

    return sampler, exact


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_converge_at_their_order(x64, name):
    solver, order = SOLVERS[name]
    sampler, exact = gaussian(SD)
    x = jnp.array([1.3, -2.0])
    errors = []
    for num_steps in (32, 64):
        flow = ds.probability_flow(sampler.with_num_steps(num_steps), solver)
        end = jax.jit(lambda x, flow=flow: flow.solve(EMPTY, x, skewed_energy))(x)
        errors.append(float(jnp.max(jnp.abs(end - exact(x)))))
    assert errors[1] < (0.05 if order == 1 else 0.005)
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("name", ["exponential", "dpm_solver"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_point_is_reached_at_once(x64, name, num_steps):
    sampler, _ = gaussian(np.zeros(2))
    flow = ds.probability_flow(sampler.with_num_steps(num_steps), SOLVERS[name][0])
    end = flow.solve(EMPTY, jnp.array([1.3, -2.0]), skewed_energy)
    np.testing.assert_allclose(end, np.array(LOC) + np.array(SCALE) * MEAN, rtol=1e-9)


def test_the_grid_is_that_of_the_process():
    flow = ds.probability_flow(gaussian(SD)[0].with_num_steps(5))
    times = np.linspace(0, 1, 6)
    np.testing.assert_allclose(flow.grid.alpha**2, SCHEDULE.signal(times), rtol=1e-9)
    np.testing.assert_allclose(flow.grid.alpha**2 + flow.grid.sigma**2, 1.0)
    assert flow.grid.sigma[-1] == 0


@pytest.fixture(scope="module")
def trained():
    network = ds.networks.annealed_score_guided(**SMALL, step_conditioned=True)
    sampler = ds.samplers.scds(2, 4, loc=LOC, scale=SCALE, network=network)
    return sampler, perturbed(sampler.init(KEY), 0.2)


def test_frozen_steps_are_those_of_self_consistency(trained):
    sampler, params = trained
    x = jnp.array([1.3, -2.0])

    @jax.jit
    def by_hand(x):
        for k in range(4):
            step = jax.tree.map(lambda a, k=k: a[k], sampler.steps())
            score = sampler.score_at(skewed_energy, x)
            x = sampler.flow_step(params, step, x, score)
        return x

    flow = ds.probability_flow(sampler)
    end = jax.jit(lambda x: flow.solve(params, x, skewed_energy))(x)
    np.testing.assert_allclose(end, by_hand(x), rtol=1e-4)


def test_draws_have_no_weights(trained):
    sampler, params = trained
    flow = ds.probability_flow(sampler.with_num_steps(2), ds.solvers.heun())
    energy, take = counting_energy(skewed_energy)
    draws = ds.draw(KEY, flow, params, energy, 300)
    assert draws.x.shape == (300, 2)
    assert draws.log_weight is None
    expected = jax.vmap(skewed_energy)(jnp.asarray(draws.x))
    np.testing.assert_allclose(draws.energy, expected, rtol=1e-4)
    assert np.isnan(draws.log_evidence.estimate)
    assert draws.log_evidence.standard_error == np.inf
    assert draws.log_evidence.lower == -np.inf
    report = draws.diagnostics
    assert not report.verdict.startswith("trust")
    assert "weight" in report.verdict
    assert report.num_network_evaluations == 300 * 3
    assert report.num_gradient_evaluations == 300 * 3
    assert report.num_energy_evaluations == 300
    made = take()  # in whole blocks
    assert made["gradient"] == 3 * made["energy"]
    assert draws.resample(KEY, 50).shape == (50, 2)
    again = ds.draw(KEY, flow, params, energy, 10)
    np.testing.assert_array_equal(again.x, draws.x[:10])


def test_evaluation_leaves_out_what_needs_weights(trained):
    sampler, params = trained
    target = ds.targets.gmm9()
    flow = ds.probability_flow(sampler.with_num_steps(1))
    options = {"num_draws": 300, "sinkhorn": False}
    report = ds.evaluate(KEY, flow, params, target, **options)
    assert {"w2", "w2_floor", "mode_tv", "quantiles", "verdict"} <= set(report)
    missing = {"elbo", "eubo", "log_z", "log_z_error", "ess", "pareto_k", "forward_ess"}
    assert not missing & set(report)
    assert report["w2"] == report["w2_unweighted"]


def test_what_a_flow_cannot_do(trained):
    sampler, params = trained
    flow = ds.probability_flow(sampler)
    points = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="this flow has none; leave out probe="):
        ds.draw(KEY, flow, params, skewed_energy, 10, probe=points)
    with pytest.raises(ValueError, match="no valid weight"):
        ds.log_weights_of(KEY, flow, params, skewed_energy, points)
    with pytest.raises(ValueError, match="no valid weight"):
        flow.score(params, points, skewed_energy)
    with pytest.raises(ValueError, match="no valid weight"):
        flow.trace_back(params, KEY, points[0], skewed_energy)
    for name in ("pis", "gbs"):
        with pytest.raises(ValueError, match="has no probability flow"):
            ds.probability_flow(getattr(ds.samplers, name)(2, 4))
    assert flow.with_num_steps(2) == ds.probability_flow(sampler.with_num_steps(2))
