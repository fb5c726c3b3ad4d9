"""Step-conditioned kernels: the reference's at many steps, the flow's without noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import SMALL, perturbed, skewed_energy

import diffsamp as ds

KEY = jax.random.key(0)
PROCESS = {"loc": (0.4, -0.3), "scale": (1.8, 1.5)}
FLOW = ds.networks.annealed_score_guided(**SMALL, step_conditioned=True)
BACK = ds.networks.free(**SMALL, learn_variance=True, step_conditioned=True)
TIED = ds.networks.tied(FLOW, BACK)


def sampler_of(num_steps, **options):
    options = {"network": TIED, "destruction_network": BACK, **PROCESS, **options}
    return ds.samplers.scds(2, num_steps, **options)


def run(sampler, params):
    return jax.jit(lambda params: sampler(params, KEY, skewed_energy))(params)


def test_at_the_finest_grid_only_the_drift_is_learned(x64):
    """The factory's own number of steps; the drift is that of the flow's network."""
    sampler = sampler_of(4)
    assert sampler.finest == 4
    params = perturbed(sampler.init(KEY), 0.3)

    plain = ds.samplers.dis(2, 4, **PROCESS, network=FLOW)
    drift_params = {"generation": params["generation"]["flow"]}
    found, expected = run(sampler, params), run(plain, drift_params)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    few = run(sampler.with_num_steps(2), params)
    other = run(plain.with_num_steps(2), drift_params)
    assert not np.any(np.isclose(few.xs[1:], other.xs[1:], rtol=1e-4))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_without_noise_a_path_is_the_flow(x64, num_steps):
    def quiet(params, x, t, context):
        return jnp.concatenate([jnp.zeros(2), jnp.full(2, -1e3)])

    network = ds.networks.from_function(lambda key, dim: (), quiet)
    network = ds.networks.tied(FLOW, network)
    bounds = ds.Bounds(log_variance=80.0)
    sampler = sampler_of(8, network=network, generation_bounds=bounds)
    sampler = sampler.with_num_steps(num_steps)
    params = perturbed(sampler.init(KEY), 0.3)
    path = run(sampler, params)
    flow = ds.probability_flow(sampler)
    end = jax.jit(lambda x: flow.solve(params, x, skewed_energy))(path.xs[0])
    np.testing.assert_allclose(path.x, end, rtol=1e-9)


@pytest.mark.slow
def test_how_free_kernels_are():
    """The log-variance of the way back, from a network that always says 2."""

    def two(params, x, t, context):
        return jnp.concatenate([jnp.zeros(2), jnp.full(2, 2.0)])

    network = ds.networks.from_function(lambda key, dim: (), two)
    expected = {2: 7 / 15, 16: 0.0}
    for num_steps, share in expected.items():
        sampler = sampler_of(16, network=FLOW, destruction_network=network)
        few = sampler.with_num_steps(num_steps)
        params = {**sampler.init(KEY), "destruction": ()}
        path = few.simulate(params, KEY, skewed_energy)
        ratios = few.log_variance_ratios(params, path)
        found = -ratios  # of an untrained generation kernel
        np.testing.assert_allclose(found, np.sqrt(share) * 10 * np.tanh(0.2), atol=1e-4)


def test_a_sampler_of_one_step_is_trained_for_that_alone(x64):
    flow = ds.networks.free(**SMALL, step_conditioned=True)
    network = ds.networks.tied(flow, BACK)
    sampler = sampler_of(1, network=network, destruction_network=None)
    with pytest.raises(ValueError, match=r"must divide 1, .* got 128"):
        sampler.with_num_steps(128)
    params = perturbed(sampler.init(KEY), 0.3)
    path = run(sampler, params)
    step = jax.tree.map(lambda column: column[0], sampler.steps())
    flow = sampler.flow_step(params, step, path.xs[0], jnp.zeros(0))
    start, end, flow = (sampler.unit(v) for v in (path.xs[0], path.x, flow))
    mean = step.generation_decay * start + 2 * (flow - start)
    noise = (end - mean) / step.generation_std  # the reference's, without a residual
    noise_density = jnp.sum(-0.5 * noise**2 - 0.5 * jnp.log(2 * jnp.pi))
    volume = jnp.sum(jnp.log(jnp.array(PROCESS["scale"]) * step.generation_std))
    np.testing.assert_allclose(path.log_generation[0], noise_density - volume)


def test_where_half_of_the_control_is_a_flow():
    back = {"destruction_network": BACK}
    for factory in (ds.samplers.dis, ds.samplers.dds):
        with pytest.raises(ValueError, match="destruction is learned, too, and then"):
            factory(2, 4, **back).check_flow()
    with pytest.raises(ValueError, match="destruction is learned, too, and then"):
        ds.probability_flow(ds.samplers.dis(2, 4, learn_destruction=True))
    ds.samplers.scds(2, 4, **back).check_flow()
    # With fixed destruction there is one law of paths to reverse.
    ds.samplers.dis(2, 4, learn_generation_variance=True).check_flow()


def test_bad_input():
    with pytest.raises(ValueError, match="finest must be at least 1, got 0"):
        ds.samplers.scds(2, 1, finest=0)
    for num_steps in (3, 5, 16, 256):  # no divisors, or more than there are
        with pytest.raises(ValueError, match=f"must divide 8, .* got {num_steps}"):
            sampler_of(8).with_num_steps(num_steps)
    for kernel in ("generation_variance", "destruction"):
        with pytest.raises(ValueError, match=r"with finest=1 there is only .* finest="):
            ds.samplers.scds(2, 1, **{f"learn_{kernel}": True})
        ds.samplers.scds(2, 1, finest=2, **{f"learn_{kernel}": True})
    with pytest.raises(ValueError, match="only the generation kernel can be tied"):
        sampler_of(4, destruction_network=TIED)
    with pytest.raises(ValueError, match="Brownian has no probability flow"):
        ds.samplers.gbs(2, 4, network=TIED)
    with pytest.raises(ValueError, match=r"the residual .* would be free at every"):
        ds.samplers.dis(2, 4, network=TIED)
    for flow, residual, match in (
        (BACK, BACK, r"of a flow must return \[2\] numbers .* got \[4\]"),
        (FLOW, FLOW, r"of a residual must return \[4\] numbers .* got \[2\]"),
    ):
        wrong = sampler_of(4, network=ds.networks.tied(flow, residual))
        few = wrong.with_num_steps(2)
        with pytest.raises(ValueError, match=match):
            run(few, few.init(KEY))
    for name, parts in {"flow": (TIED, BACK), "residual": (FLOW, abs)}.items():
        with pytest.raises(ValueError, match=f"{name} must be a control that is not"):
            ds.networks.tied(*parts)
    with pytest.raises(ValueError, match="log_variance must be a finite number"):
        ds.networks.tied(FLOW, BACK, log_variance=-np.inf)
    with pytest.raises(ValueError, match="free at every step"):
        ds.samplers.dis(2, 4, network=TIED, learn_generation_variance=True)
    with pytest.raises(ValueError, match="tied to a flow"):
        ds.samplers.dis(2, 4, destruction_network=TIED, learn_destruction=True)
    backbone = ds.networks.backbone(**SMALL)
    with pytest.raises(ValueError, match="cannot build on a backbone"):
        dataclasses.replace(sampler_of(4), backbone=backbone)
    schedules = ds.schedules.cosine(), ds.schedules.geometric()
    other = ds.networks.data_prediction(schedules[0], **SMALL)
    for both in ((other, BACK), (FLOW, other)):
        with pytest.raises(ValueError, match="the network of generation must have the"):
            sampler_of(4, schedule=schedules[1], network=ds.networks.tied(*both))


def moved_by_paths(sampler):
    """Whether a path's weight has a gradient in the flow's network and the other's."""
    params = perturbed(sampler.init(KEY), 0.1)
    path = sampler.simulate(params, KEY, skewed_energy)
    found = jax.grad(lambda p: sampler.score_path(p, path).log_weight)(params)
    return {k: _is_moved(v) for k, v in found["generation"].items()}


@pytest.mark.parametrize("name", ["cdds", "scds"])
def test_the_flow_alone_draws_as_a_sampler_without_a_residual(name):
    flow = {"cdds": ds.networks.consistency(**SMALL), "scds": FLOW}[name]
    make = getattr(ds.samplers, name)
    both = make(2, 2, network=ds.networks.tied(flow, BACK), destruction_network=BACK)
    if name == "scds":
        both = dataclasses.replace(both, finest=4)
    params = perturbed(both.init(KEY), 0.5)
    alone, its_params = both.flow_alone(params)
    expected = dataclasses.replace(both, generation=flow, destruction=None)
    assert alone == expected
    assert alone.flow_alone(its_params)[0] == alone
    assert sorted(params) == ["destruction", "generation"]
    found, of_both = run(alone, its_params), run(both, params)
    plain = run(expected, {"generation": params["generation"]["flow"]})
    np.testing.assert_array_equal(found.xs, plain.xs)
    assert np.max(np.abs(found.xs - of_both.xs)) > 0.05


def _is_moved(gradient):
    return any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_paths_of_few_steps_leave_the_flow_to_other_objectives():
    sampler = sampler_of(4)
    assert moved_by_paths(sampler) == {"flow": True, "residual": False}
    few = sampler.with_num_steps(2)
    assert moved_by_paths(few) == {"flow": False, "residual": True}
    student = ds.samplers.cdds(
        2, network=ds.networks.tied(ds.networks.consistency(**SMALL), BACK)
    )
    assert moved_by_paths(student) == {"flow": False, "residual": True}
    params, x = perturbed(few.init(KEY), 0.1), jnp.array([0.3, -0.2])
    step = jax.tree.map(lambda column: column[0], few.steps())
    score = few.score_at(skewed_energy, x)
    of_flow = jax.grad(lambda p: jnp.sum(few.flow_step(p, step, x, score)))(params)
    params, time = perturbed(student.init(KEY), 0.1), jnp.array(0.4)
    of_end = jax.grad(lambda p: jnp.sum(student.predicted_end(p, time, x)))(params)
    for found in (of_flow["generation"], of_end["generation"]):
        moved = {k: _is_moved(v) for k, v in found.items()}
        assert moved == {"flow": True, "residual": False}


def test_where_variances_start(x64):
    """At -4 of the bound's 10, and none of it on the training grid."""
    for num_steps, share in ((1, 1.0), (2, 1 / 3**0.5), (4, 0.0)):
        sampler = sampler_of(4, destruction_network=None)
        few = sampler.with_num_steps(num_steps)
        params = few.init(KEY)
        path = few.simulate(params, KEY, skewed_energy)
        expected = share * 10 * np.tanh(-0.4)
        found = few.log_variance_ratios(params, path)
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_both_networks_of_a_step_are_counted():
    sampler = sampler_of(4)
    assert sampler.evaluations_per_path.network == 4 * 2
    assert sampler.with_num_steps(2).evaluations_per_path.network == 2 * 3
    assert ds.probability_flow(sampler).evaluations_per_path.network == 4
