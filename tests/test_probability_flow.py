"""The probability flow: order of the solvers, draws without weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_flow import LOC, MEAN, SCALE, SD, kernel_control, moved
from tables import (
    LOG_Z,
    SMALL,
    counting_energy,
    perturbed,
    skewed_draws,
    skewed_energy,
)

import diffsamp as ds
from diffsamp.networks.contractive import schatten_norm

KEY = jax.random.key(0)
EMPTY = {"generation": ()}
SCHEDULE = ds.schedules.linear(8.0, 0.5)
SOLVERS = {
    "euler": (ds.solvers.euler(), 1),
    "frozen": (ds.solvers.frozen(), 1),
    "exponential": (ds.solvers.exponential(), 1),
    "linear_end": (ds.solvers.linear_end(), 2),
    "heun": (ds.solvers.heun(), 2),
    "dpm_solver": (ds.solvers.dpm_solver(), 1.4),
}


def gaussian(sd):
    """A sampler with the best kernels to a Gaussian target, and its exact flow."""

    network = kernel_control(SCHEDULE, sd=sd)
    sampler = ds.samplers.dis(
        2, 4, loc=LOC, scale=SCALE, schedule=SCHEDULE, network=network
    )

    def exact(x):
        y = (x - jnp.array(LOC)) / jnp.array(SCALE)
        end = moved(SCHEDULE, y, 0.0, 1.0, sd=sd)
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


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("frozen", 0.02, 0.082), ("dpm_solver", 0, 0.011), ("linear_end", 0, 0.0003)],
)
def test_widths_along_the_flow_of_the_best_kernels(x64, name, least, most):
    """In 128 steps to narrow Gaussians, by the default schedule."""
    for sd, smallest in ((0.1, 0.05), (0.25, 0.05), (0.7, 0.1)):
        schedule = ds.schedules.geometric(smallest)
        network = kernel_control(schedule, mean=0.0, sd=sd)
        sampler = ds.samplers.dis(1, 128, schedule=schedule, network=network)
        flow = ds.probability_flow(sampler, SOLVERS[name][0])
        wide = float(flow.solve(EMPTY, jnp.array([sd**-1]), lambda x: x[0])[0]) - 1
        assert least <= (wide if name == "frozen" else abs(wide)) <= most


def test_the_table_of_the_docs(x64):
    schedule = ds.schedules.geometric(0.1)
    wanted = {
        "frozen": (0.158, -0.077),
        "dpm_solver": (-0.006, 0.0),
        "linear_end": (0.001, -0.001),
    }
    network = kernel_control(schedule, mean=1.0, sd=0.3)
    sampler = ds.samplers.dis(1, 32, schedule=schedule, network=network)
    for name, (wide, shift) in wanted.items():
        flow = ds.probability_flow(sampler, SOLVERS[name][0])
        ends = [
            float(flow.solve(EMPTY, jnp.array([y]), lambda x: x[0])[0])
            for y in (0, 1.0)
        ]
        assert (ends[1] - ends[0]) / 0.3 - 1 == pytest.approx(wide, abs=6e-4)
        assert ends[0] - 1 == pytest.approx(shift, abs=1e-3)


def test_euler_steps_are_not_taken_together():
    sampler = ds.samplers.scds(
        2, 8, process=ds.processes.EulerVariancePreserving, schedule=SCHEDULE
    )
    flow = ds.probability_flow(sampler, ds.solvers.linear_end())
    with pytest.raises(ValueError, match="variance-preserving process, got Euler"):
        flow.solve(sampler.init(KEY), jnp.zeros(2), skewed_energy)
    objective = ds.objectives.self_consistency(second_order=True)
    with pytest.raises(ValueError, match="variance-preserving process, got Euler"):
        objective.init(KEY, sampler, sampler.init(KEY), skewed_energy, None)


def test_an_odd_step_is_left_to_the_frozen_control(x64):
    sampler, _ = gaussian(SD)
    x = jnp.array([1.3, -2.0])
    for num_steps in (1, 3):
        few, solvers = sampler.with_num_steps(num_steps), ds.solvers
        flows = (
            ds.probability_flow(few, make())
            for make in (solvers.frozen, solvers.linear_end)
        )
        a, b = (flow.solve(EMPTY, x, skewed_energy) for flow in flows)
        assert np.allclose(a, b) == (num_steps == 1)
    sampler, exact = gaussian(SD)
    odd = ds.probability_flow(sampler.with_num_steps(65), ds.solvers.linear_end())
    np.testing.assert_allclose(odd.solve(EMPTY, x, skewed_energy), exact(x), atol=2e-3)
    assert ds.solvers.linear_end().num_calls(3) == 3


@pytest.mark.parametrize("name", ["exponential", "dpm_solver"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_point_is_reached_at_once(x64, name, num_steps):
    sampler, _ = gaussian(np.zeros(2))
    flow = ds.probability_flow(sampler.with_num_steps(num_steps), SOLVERS[name][0])
    end = flow.solve(EMPTY, jnp.array([1.3, -2.0]), skewed_energy)
    np.testing.assert_allclose(end, np.array(LOC) + np.array(SCALE) * MEAN, rtol=1e-9)


def test_composed_means_shrink_what_the_flow_keeps():
    """A unit normal: the kernels' means alone end at a deviation of 0.08."""
    control = ds.networks.from_function(
        lambda key, dim: jnp.zeros(()), lambda params, x, t, context: params + 0.0 * x
    )
    sampler = ds.samplers.scds(
        1, 128, schedule=ds.schedules.linear(10.0, 0.1), network=control
    )
    assert np.prod(sampler.steps().generation_decay) == pytest.approx(0.08, abs=0.003)
    flow, x = ds.probability_flow(sampler, ds.solvers.frozen()), jnp.array([1.7])
    end = flow.solve(sampler.init(jax.random.key(0)), x, skewed_energy)
    np.testing.assert_allclose(end, x, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_data_prediction_is_reached(x64, num_steps):
    """In one step at once; without training the flow stands still."""
    network = ds.networks.data_prediction(SCHEDULE, **SMALL)
    sampler = ds.samplers.scds(
        2, num_steps, loc=LOC, scale=SCALE, schedule=SCHEDULE, network=network
    )
    flow, x = ds.probability_flow(sampler), jnp.array([1.3, -2.0])
    params = sampler.init(KEY)
    stays = jax.jit(lambda x: flow.solve(params, x, skewed_energy))(x)
    np.testing.assert_allclose(stays, x, rtol=1e-12)
    moved_params = perturbed(params, 0.3)
    context = ds.networks.Context(
        score=jnp.zeros(0),
        gain=jnp.ones(()),
        condition=None,
        step_size=jnp.asarray(1 / num_steps),
    )
    y, grid = sampler.unit(x), flow.grid
    control = network(moved_params["generation"], y, jnp.zeros(()), context)
    keep = grid.sigma[1] / grid.sigma[0]
    share = grid.alpha[1] - grid.alpha[0] * keep
    correction = control * (1 - grid.alpha[0] / grid.alpha[1]) / share
    end = (1 - keep) / share * y + correction
    step = jax.tree.map(lambda column: column[0], sampler.steps())
    found = sampler.flow_step(moved_params, step, x, jnp.zeros(0))
    once = sampler.original(keep * y + share * end)
    np.testing.assert_allclose(found, once, rtol=1e-9)
    if num_steps == 1:
        np.testing.assert_allclose(once, sampler.original(end), rtol=1e-9)


def test_euler_steps_are_those_of_the_papers(x64):
    """Generation ``(1 - beta d / 2) y + beta d c``, c = score + y; noise beta d."""
    sampler = ds.samplers.dis(
        2,
        400,
        schedule=SCHEDULE,
        network=kernel_control(SCHEDULE),
        process=ds.processes.EulerVariancePreserving,
    )
    table = sampler.process.coefficients(400)
    beta = np.interp(table.times[:-1] + 1 / 800, [0.0, 1.0], [8.0, 0.5])
    np.testing.assert_allclose(table.generation_decay, 1 - beta / 800, rtol=1e-6)
    np.testing.assert_allclose(table.generation_std**2, beta / 400, rtol=1e-6)
    np.testing.assert_array_equal(table.generation_decay, table.destruction_decay)
    flow = ds.probability_flow(sampler, ds.solvers.euler())
    x = jnp.array([1.3, -2.0])
    end = jax.jit(lambda x: flow.solve(EMPTY, x, skewed_energy))(x)
    np.testing.assert_allclose(end, moved(SCHEDULE, x, 0.0, 1.0), atol=0.03)


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


@pytest.mark.parametrize("process", ["VariancePreserving", "EulerVariancePreserving"])
def test_the_default_steps_are_those_of_self_consistency(process):
    sampler = ds.samplers.scds(
        2,
        4,
        loc=LOC,
        scale=SCALE,
        network=ds.networks.annealed_score_guided(**SMALL, step_conditioned=True),
        process=getattr(ds.processes, process),
    )
    params = perturbed(sampler.init(KEY), 0.1)
    x = jnp.array([1.3, -2.0])

    @jax.jit
    def by_hand(x):
        def move(x, step):
            score = sampler.score_at(skewed_energy, x)
            return sampler.flow_step(params, step, x, score), None

        return jax.lax.scan(move, x, sampler.steps())[0]

    flow = ds.probability_flow(sampler)
    end = jax.jit(lambda x: flow.solve(params, x, skewed_energy))(x)
    np.testing.assert_allclose(end, by_hand(x), rtol=1e-4)


def test_draws_have_no_weights(trained):
    sampler, params = trained
    flow = ds.probability_flow(sampler.with_num_steps(2), ds.solvers.heun())
    energy, take = counting_energy(skewed_energy)
    draws = ds.draw(KEY, flow, params, energy, 40, batch_size=32)
    assert draws.x.shape == (40, 2)
    assert draws.log_weight is None
    expected = jax.vmap(skewed_energy)(jnp.asarray(draws.x))
    np.testing.assert_allclose(draws.energy, expected, rtol=1e-4)
    assert np.isnan(draws.log_evidence.estimate)
    assert draws.log_evidence.standard_error == np.inf
    assert draws.log_evidence.lower == -np.inf
    report = draws.diagnostics
    assert not report.verdict.startswith("trust")
    assert "weight" in report.verdict
    assert report.num_network_evaluations == 40 * 3
    assert report.num_gradient_evaluations == 40 * 3
    assert report.num_energy_evaluations == 40
    made = take()  # in whole blocks
    assert made["gradient"] == 3 * made["energy"]
    assert draws.resample(KEY, 50).shape == (50, 2)
    again = ds.draw(KEY, flow, params, energy, 10, batch_size=32)
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
    with pytest.raises(ValueError, match="these draws have none: this flow"):
        ds.draw(KEY, flow, params, skewed_energy, 10, probe=points)
    with pytest.raises(ValueError, match="no valid weight"):
        ds.log_weights_of(KEY, flow, params, skewed_energy, points)
    with pytest.raises(ValueError, match="a path of a flow has no density"):
        flow.score(params, points, skewed_energy)
    with pytest.raises(ValueError, match="no valid weight"):
        flow.trace_back(params, KEY, points[0], skewed_energy)
    for name in ("pis", "gbs"):
        with pytest.raises(ValueError, match="has no probability flow"):
            ds.probability_flow(getattr(ds.samplers, name)(2, 4))
    assert flow.with_num_steps(2) == ds.probability_flow(sampler.with_num_steps(2))


# -- certified flows -------------------------------------------------------------------

CONTRACTIVE = ds.networks.contractive(**SMALL, lipschitz=0.8)


def certified(num_steps, scale=0.4):
    """A flow with random parameters."""
    sampler = ds.samplers.scds(
        2, num_steps, loc=LOC, scale=SCALE, schedule=SCHEDULE, network=CONTRACTIVE
    )
    return ds.probability_flow(sampler), perturbed(sampler.init(KEY), scale)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (8, 8), (64, 64), (3, 64)])
def test_the_norm_is_an_upper_bound(shape):
    for seed in range(5):
        matrix = np.random.default_rng(seed).standard_normal(shape) * 10.0**seed
        exact = np.linalg.norm(matrix, 2)
        bound = float(schatten_norm(jnp.asarray(matrix, jnp.float32)))
        assert exact * (1 - 1e-5) <= bound <= exact * min(shape) ** (1 / 32) * 1.001


@pytest.mark.parametrize("width", [256, 512])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_norm_of_wide_matrices(width, scale):
    """Of equal singular values, whose powers float32 cannot hold."""
    noise = np.random.default_rng(0).standard_normal((width, width))
    orthogonal = np.linalg.qr(noise)[0]
    matrix = jnp.asarray(scale * orthogonal, jnp.float32)
    bound, gradient = jax.value_and_grad(schatten_norm)(matrix)
    assert float(bound) / scale == pytest.approx(width ** (1 / 32), rel=1e-5)
    # Every singular value has the same share in the gradient.
    expected = orthogonal * width ** (1 / 32 - 1)
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * expected.max())


def test_the_norm_of_nothing():
    bound, gradient = jax.value_and_grad(schatten_norm)(jnp.zeros((3, 5)))
    assert 0 <= float(bound) < 0.1
    np.testing.assert_array_equal(gradient, 0)


def test_the_control_keeps_its_constant(x64):
    _, params = certified(4, scale=2.0)  # every matrix meets its bound
    points = 3 * jax.random.normal(KEY, (300, 2))

    def control(y, t, step_size):
        context = ds.networks.Context(
            score=jnp.zeros(0), gain=jnp.ones(()), condition=None, step_size=step_size
        )
        return CONTRACTIVE(params["generation"], y, t, context)

    jacobian = jax.vmap(jax.jacfwd(control), in_axes=(0, None, None))
    slopes = jax.jit(jacobian)(points, jnp.array(0.3), jnp.array(0.25))
    norms = np.linalg.norm(slopes, 2, axis=(1, 2))
    assert 0.05 < norms.max() <= 0.8


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_weight_of_a_certified_flow_integrates_to_z(x64, num_steps):
    """By quadrature over the reference, with random parameters."""
    flow, params = certified(num_steps)
    assert flow.has_weights
    side = np.linspace(-9, 9, 241)
    ys = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2))
    starts = jnp.array(LOC)[None] + jnp.array(SCALE)[None] * ys

    @jax.jit
    def mass(params):
        path = jax.vmap(lambda x: flow.transport(params, x, skewed_energy))(starts)
        return jnp.sum(jnp.exp(path.log_prior + path.log_weight))

    cell = (side[1] - side[0]) ** 2 * np.prod(SCALE)
    assert np.log(float(mass(params)) * cell) == pytest.approx(LOG_Z, abs=1e-3)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_certified_flow_runs_backwards(x64, num_steps):
    flow, params = certified(num_steps)
    x = jnp.array([1.3, -2.0])
    there = jax.jit(lambda x: flow.transport(params, x, skewed_energy))(x)
    end = jax.jit(lambda x: flow.solve(params, x, skewed_energy))(x)
    np.testing.assert_allclose(there.x, end, rtol=1e-9)
    back = jax.jit(lambda x: flow.trace_back(params, KEY, x, skewed_energy))(end)
    np.testing.assert_allclose(back.xs, there.xs, rtol=1e-6)
    np.testing.assert_allclose(back.log_weight, there.log_weight, atol=1e-6)
    jacobian = jax.jacfwd(lambda x: flow.solve(params, x, skewed_energy))(x)
    log_q = there.log_prior - np.linalg.slogdet(jacobian)[1]
    expected = -skewed_energy(end) - log_q
    assert float(there.log_weight) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.slow
def test_weights_of_drawn_points():
    flow, params = certified(4, scale=0.2)
    draws = ds.draw(KEY, flow, params, skewed_energy, 2_000, probe=skewed_draws())
    evidence = draws.log_evidence
    assert draws.diagnostics.pareto_k < 0.7
    assert abs(evidence.estimate - LOG_Z) < 4 * evidence.standard_error
    assert evidence.lower < LOG_Z < evidence.upper
    assert draws.diagnostics.num_network_evaluations == (
        2_000 * 4 * 3 + 512 * flow.evaluations_per_trace.network
    )


def test_flows_that_are_not_certified():
    network = ds.networks.contractive(**SMALL, lipschitz=2.0)
    sampler = ds.samplers.scds(2, 8, schedule=SCHEDULE, network=network)
    flow = ds.probability_flow(sampler)
    assert flow.has_weights
    few = flow.with_num_steps(1)
    assert (
        "Lipschitz constant of up to 1.76, which must be below 1" in few.why_no_weight
    )
    params = sampler.init(KEY)
    draws = ds.draw(KEY, few, params, skewed_energy, 300)
    assert draws.log_weight is None
    assert "Lipschitz constant of up to 1.76" in draws.diagnostics.verdict
    with pytest.raises(ValueError, match="no valid weight: a step of this flow"):
        few.transport(params, jnp.zeros(2), skewed_energy)
    assert not ds.probability_flow(sampler, ds.solvers.heun()).has_weights
    shown = dataclasses.replace(CONTRACTIVE, needs_score=True)
    flow = ds.probability_flow(dataclasses.replace(sampler, generation=shown))
    assert flow.lipschitz is None
    assert "not known to be one to one" in flow.why_no_weight
    sees = ds.networks.annealed_score_guided(
        **SMALL, learn_variance=True, step_conditioned=True
    )
    tied = ds.networks.tied(CONTRACTIVE, sees)  # gradients are taken for its residual
    flow = ds.probability_flow(dataclasses.replace(sampler, generation=tied))
    few = flow.with_num_steps(4)
    assert few.has_weights
    assert few.evaluations_per_path == (1, 4, 4 * 3)
    with pytest.raises(ValueError, match="lipschitz must be positive, got 0"):
        ds.networks.contractive(lipschitz=0)
