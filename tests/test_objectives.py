"""Values, gradients against a closed form, requirements, and that each one trains.

The closed form: one dimension, two steps, affine drifts both ways and a Gaussian
target. Generation and destruction paths are then jointly Gaussian, their divergence is
known, and log-weights are quadratic in the noise, so that Gauss-Hermite quadrature
with three nodes per noise is exact for every expectation below. Its weights
(1, 4, 1) / 6 make it a plain mean over a batch of 6^3 = 216 paths.
"""

import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tables import (
    BEHAVIOURS,
    NEED_DESTRUCTION,
    OBJECTIVES,
    PROCESSES,
    SAMPLERS,
    counting_energy,
    mostly_slow,
    perturbed,
    rows_of,
    sample_skewed,
    skewed_energy,
    small_flow,
)

import diffsamp as ds
from diffsamp.types import Batch, Trajectory

# -- the closed form ------------------------------------------------------------------

K, DIFFUSION, LOC, SCALE = 2, 1.2, 0.4, 1.7
MEAN, STD, LOG_Z = 0.6, 0.8, 0.3  # of the target, in unit coordinates
STEP = DIFFUSION / K  # std sqrt(h) with std = diffusion / sqrt(K), h = 1 / K
NOISE = DIFFUSION / np.sqrt(K)
THETA = {"a": 0.7, "b": -0.5, "c": -0.4, "d": -0.3}
GENERATION, DESTRUCTION = ("a", "b"), ("c", "d")
NODES = np.array([-np.sqrt(3)] + [0.0] * 4 + [np.sqrt(3)])
GRID = np.array(list(itertools.product(NODES, repeat=K + 1)))
BATCH = len(GRID)


def gaussian_energy(x):
    y = (x - LOC) / SCALE
    log_norm = np.log(2 * np.pi * (STD * SCALE) ** 2) / 2
    return 0.5 * jnp.sum(((y - MEAN) / STD) ** 2) + log_norm - LOG_Z


def _affine(first, second, needs_score=False):
    def init_fn(key, dim):
        return {name: jnp.asarray(THETA[name]) for name in (first, second)}

    def drift_fn(params, y, t, context):
        return params[first] + params[second] * y

    return ds.networks.from_function(init_fn, drift_fn, needs_score=needs_score)


GAUSSIAN = ds.samplers.gbs(
    1,
    K,
    loc=LOC,
    scale=SCALE,
    diffusion=DIFFUSION,
    network=_affine(*GENERATION),
    destruction_network=_affine(*DESTRUCTION),
)


def generated(theta, noise):
    """Generation paths in unit coordinates, [B, K+1], and their moments."""
    ys, maps = [noise[:, 0]], [(0.0, np.eye(K + 1)[0])]
    for k in range(K):
        slope = 1 + STEP * theta["b"]
        ys.append(STEP * theta["a"] + slope * ys[-1] + NOISE * noise[:, k + 1])
        offset, row = maps[-1]
        row = slope * row + NOISE * np.eye(K + 1)[k + 1]
        maps.append((STEP * theta["a"] + slope * offset, row))
    return np.stack(ys, 1), _moments(maps)


def destroyed(theta, noise):
    """Destruction paths of the target in unit coordinates, and their moments."""
    ys, maps = [MEAN + STD * noise[:, K]], [(MEAN, STD * np.eye(K + 1)[K])]
    for k in reversed(range(K)):
        slope = 1 + STEP * theta["d"]
        ys.insert(0, STEP * theta["c"] + slope * ys[0] + NOISE * noise[:, k])
        offset, row = maps[0]
        row = slope * row + NOISE * np.eye(K + 1)[k]
        maps.insert(0, (STEP * theta["c"] + slope * offset, row))
    return np.stack(ys, 1), _moments(maps)


def _moments(maps):
    offsets, rows = (np.array(v) for v in zip(*maps, strict=True))
    return offsets, rows @ rows.T


def divergence(p, q):
    """KL(N(p) || N(q))."""
    (m, s), (n, t) = p, q
    inverse = np.linalg.inv(t)
    log_ratio = np.linalg.slogdet(t)[1] - np.linalg.slogdet(s)[1]
    trace = np.trace(inverse @ s) - len(m)
    return 0.5 * (trace + (n - m) @ inverse @ (n - m) + log_ratio)


def reverse(theta):
    return divergence(generated(theta, GRID)[1], destroyed(theta, GRID)[1])


def forward(theta):
    return divergence(destroyed(theta, GRID)[1], generated(theta, GRID)[1])


def finite_differences(function, step=1e-5):
    out = {}
    for name in THETA:
        up, down = ({**THETA, name: THETA[name] + s * step} for s in (1, -1))
        out[name] = (function(up) - function(down)) / (2 * step)
    return out


def gaussian_params():
    return {
        "generation": {name: jnp.asarray(THETA[name]) for name in GENERATION},
        "destruction": {name: jnp.asarray(THETA[name]) for name in DESTRUCTION},
    }


def quadrature_gradient(objective, paths, own=None, state=(), on_policy=True):
    """Loss, gradient in THETA and in the objective's own parameters."""
    xs = jnp.asarray(LOC + SCALE * paths[:, :, None])
    rows = jnp.full((BATCH,), on_policy)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        score = jax.vmap(GAUSSIAN.score, in_axes=(None, 0, None))
        batch = Batch(
            trajectories=score(params["sampler"], xs, gaussian_energy),
            rollouts=None,
            paths=jax.vmap(lambda x: GAUSSIAN._complete(x, gaussian_energy, None))(xs),
            on_policy=rows,
            target_draws=~rows,
            **rows_of(BATCH)._asdict(),
            count=jnp.asarray(0),
            key=jax.random.key(0),
            sampler=GAUSSIAN,
            energy=gaussian_energy,
        )
        return objective.loss(params, state, batch)[0]

    params = {"sampler": gaussian_params(), "objective": own or {}}
    value, gradient = loss(params)
    by_name = {
        **gradient["sampler"]["generation"],
        **gradient["sampler"]["destruction"],
    }
    return float(value), by_name, gradient["objective"]


def assert_gradient(actual, expected, names, factor=1.0, **tolerance):
    tolerance = tolerance or {"rel": 1e-7, "abs": 1e-8}
    for name in names:
        assert float(actual[name]) == pytest.approx(
            factor * float(expected[name]), **tolerance
        ), name


def test_the_closed_form_is_the_mean_log_weight(x64):
    """ELBO = log Z - KL on the nodes: the test's own oracle is right."""
    paths, _ = generated(THETA, GRID)
    xs = jnp.asarray(LOC + SCALE * paths[:, :, None])
    score = jax.jit(
        jax.vmap(lambda x: GAUSSIAN.score(gaussian_params(), x, gaussian_energy))
    )
    elbo = np.mean(score(xs).log_weight)
    assert elbo == pytest.approx(LOG_Z - reverse(THETA), abs=1e-10)
    paths, _ = destroyed(THETA, GRID)
    xs = jnp.asarray(LOC + SCALE * paths[:, :, None])
    eubo = np.mean(score(xs).log_weight)
    assert eubo == pytest.approx(LOG_Z + forward(THETA), abs=1e-10)


# -- gradients against finite differences of the true divergence ----------------------


def test_log_derivative_gradient_in_both_kernels(x64):
    expected = finite_differences(reverse)
    paths, _ = generated(THETA, GRID)
    objective = ds.objectives.reverse_kl_log_derivative()
    _, actual, _ = quadrature_gradient(objective, paths)
    # The leave-one-out baseline is unbiased for independent rows; on a batch that is
    # the whole distribution it leaves B / (B - 1).
    assert_gradient(actual, expected, GENERATION, BATCH / (BATCH - 1))
    assert_gradient(actual, expected, DESTRUCTION)


def test_log_variance_has_twice_the_gradient_in_the_generation_kernel(x64):
    expected = finite_differences(reverse)
    paths, _ = generated(THETA, GRID)
    objective = ds.objectives.log_variance()
    value, actual, _ = quadrature_gradient(objective, paths)
    assert_gradient(actual, expected, GENERATION, 2 * BATCH / (BATCH - 1))
    for name in DESTRUCTION:  # as its docstring says, not for learned destruction
        assert abs(float(actual[name]) / (2 * expected[name]) - 1) > 0.1
    assert value > 0


@pytest.mark.parametrize("log_z_scale", [1.0, 10.0])
def test_trajectory_balance_has_the_gradient_of_reverse_kl(x64, log_z_scale):
    expected = finite_differences(reverse)
    elbo = LOG_Z - reverse(THETA)
    paths, _ = generated(THETA, GRID)
    objective = ds.objectives.trajectory_balance(log_z_scale)
    offset = jnp.asarray(elbo + 0.1)
    for raw in (-0.1 / log_z_scale, 0.4):  # at the ELBO, and away from it
        own = {"log_z": jnp.asarray(raw)}
        value, actual, own = quadrature_gradient(objective, paths, own, offset)
        assert_gradient(actual, expected, GENERATION)
        log_z = elbo + 0.1 + log_z_scale * raw
        slope = log_z_scale * (log_z - elbo)
        assert float(own["log_z"]) == pytest.approx(slope, abs=1e-9)
        assert value > 0.5 * (log_z - elbo) ** 2


def test_trajectory_likelihood_has_the_gradient_of_reverse_kl_in_destruction(x64):
    expected = finite_differences(reverse)
    paths, _ = generated(THETA, GRID)
    objective = ds.objectives.trajectory_likelihood()
    _, actual, _ = quadrature_gradient(objective, paths)
    assert_gradient(actual, expected, DESTRUCTION)
    assert_gradient(actual, dict.fromkeys(GENERATION, 0.0), GENERATION)


def test_each_kernel_by_its_own_objective_is_the_gradient_of_reverse_kl(x64):
    """Balance for generation plus likelihood for destruction: nothing counted twice."""
    expected = finite_differences(reverse)
    elbo = LOG_Z - reverse(THETA)
    paths, _ = generated(THETA, GRID)
    objective = OBJECTIVES["one_for_each_kernel"]()
    own = {"0": {"log_z": jnp.asarray(0.0)}, "1": {}}
    state = (jnp.asarray(elbo), ())
    _, actual, _ = quadrature_gradient(objective, paths, own, state)
    assert_gradient(actual, expected, THETA)


def test_gradient_scale_multiplies_one_kernel_and_not_the_value(x64):
    paths, _ = generated(THETA, GRID)
    objective = ds.objectives.log_variance()
    value, plain, _ = quadrature_gradient(objective, paths)
    for generation, destruction, factors in (
        (0.0, 1.0, (0.0, 1.0)),
        (0.5, -2.0, (0.5, -2.0)),
        (lambda count: 3.0 - count, lambda count: count >= 1, (3.0, 0.0)),
    ):
        scaled = ds.objectives.gradient_scale(
            objective, generation=generation, destruction=destruction
        )
        same, actual, _ = quadrature_gradient(scaled, paths)  # at count 0
        assert same == pytest.approx(value, rel=1e-12)
        assert_gradient(actual, plain, GENERATION, factors[0])
        assert_gradient(actual, plain, DESTRUCTION, factors[1])
    only = ds.objectives.destruction_only(objective)
    assert only is ds.objectives.destruction_only(objective)
    _, actual, _ = quadrature_gradient(only, paths)
    assert_gradient(actual, plain, GENERATION, 0.0)
    assert_gradient(actual, plain, DESTRUCTION)


def test_long_pieces_alone_are_trajectory_balance(x64):
    paths, _ = generated(THETA, GRID)
    offset = jnp.asarray(0.2)
    balance = ds.objectives.trajectory_balance()
    own = {"log_z": jnp.asarray(0.03)}
    value, expected, log_z = quadrature_gradient(balance, paths, own, offset)
    for flow in (small_flow(), small_flow(forward_looking=True)):
        objective = ds.objectives.sub_trajectory_balance(1e30, flow=flow)
        network = perturbed(flow.network.init(jax.random.key(0), 1, 0), 0.5)
        both = {"flow": network, **own}
        actual = quadrature_gradient(objective, paths, both, offset)
        assert actual[0] == pytest.approx(value, rel=1e-10)
        assert_gradient(actual[1], expected, THETA)
        assert_gradient(actual[2], log_z, ["log_z"])


def _log_normal(y, mean, variance):
    return -0.5 * ((y - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def _log_marginal(ys, k):
    """log density that the destruction of the target gives to state k, units of x."""
    offsets, covariance = destroyed(THETA, GRID)[1]
    return _log_normal(ys, offsets[k], covariance[k, k]) - np.log(SCALE)


class _ExactFlow(NamedTuple):
    """The network that makes the flow Z times the density of destruction."""

    feature_dim: int = 1

    def init(self, key, dim, condition_dim):
        return {}

    def __call__(self, params, y, t, condition):
        return _log_marginal(y, 1) / ds.objectives.Flow().log_z_scale


def test_pieces_of_a_path_with_the_exact_flow(x64):
    """Every residual by hand, with the flow that fits the destruction kernel."""
    ys, _ = generated(THETA, GRID)

    def log_kernel(first, slope, start, end):
        mean = start + STEP * (THETA[first] + THETA[slope] * start)
        return _log_normal(end, mean, NOISE**2) - np.log(SCALE)

    log_flow = [
        LOG_Z + _log_normal(ys[:, 0], 0.0, 1.0) - np.log(SCALE),
        LOG_Z + _log_marginal(ys[:, 1], 1),
        LOG_Z + _log_marginal(ys[:, 2], 2),
    ]
    first, second = (
        log_flow[k]
        + log_kernel("a", "b", ys[:, k], ys[:, k + 1])
        - log_kernel("c", "d", ys[:, k + 1], ys[:, k])
        - log_flow[k + 1]
        for k in range(K)
    )
    residuals = np.array([first, second, first + second])
    flow = ds.objectives.Flow(network=_ExactFlow())
    offset = jnp.asarray(0.2)
    own = {"flow": {}, "log_z": jnp.asarray((LOG_Z - 0.2) / flow.log_z_scale)}
    size = np.abs(residuals)
    bend = float(np.median(size))
    linear = np.where(size < bend, size**2 / 2, bend * (size - bend / 2))
    for huber, parts in ((None, size**2 / 2), (bend, linear)):
        options = {"flow": flow, "huber": huber}
        for objective, weights in (
            (ds.objectives.detailed_balance(**options), [1 / 2, 1 / 2, 0]),
            (ds.objectives.sub_trajectory_balance(3.0, **options), [0.2, 0.2, 0.6]),
        ):
            value, _, _ = quadrature_gradient(objective, ys, own, offset)
            expected = float(np.dot(weights, np.mean(parts, axis=1)))
            assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", mostly_slow(["pis", "dis", "gbs"], "pis"))
def test_forward_looking_flow_is_the_geometric_path(x64, name):
    """Before training: (1 - t) (log Z + log reference marginal) - t energy."""
    sampler = SAMPLERS[name](num_steps=3)
    params = sampler.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 4)

    @jax.jit
    def simulated(params, keys):
        simulate = jax.vmap(sampler.simulate, in_axes=(None, 0, None))
        paths = simulate(params, keys, skewed_energy)
        return paths, jax.vmap(lambda p: sampler.score_path(params, p))(paths)

    paths, trajectories = simulated(params, keys)
    flow = small_flow(forward_looking=True)
    objective = ds.objectives.detailed_balance(flow=flow)
    pilot = ds.batching.pilot(keys[0], sampler, params, skewed_energy)
    own, offset = objective.init(keys[1], sampler, params, skewed_energy, pilot)
    energy, take = counting_energy(skewed_energy)
    fields = rows_of(4)._asdict() | {"sampler": sampler, "energy": energy}
    batch = batch_of(trajectories.log_weight, **fields)
    for known in (True, False):
        if not known:
            paths = paths._replace(energies=jnp.zeros((4, 0)))
        batch = batch._replace(trajectories=trajectories, paths=paths)
        log_flow, log_z, cost = flow(own, offset, batch)
        made = take()
        assert made == {"energy": 0 if known else 4 * 2, "gradient": 0}
        assert (cost.energy, cost.gradient) == (made["energy"], 0)
        np.testing.assert_allclose(log_z, offset)
        np.testing.assert_allclose(log_flow[:, 0], log_z + trajectories.log_prior)
        np.testing.assert_allclose(log_flow[:, -1], -trajectories.energy)
        table = sampler.process.coefficients(3)
        std = 0.0 if sampler.process.point_mass else 1.0
        for k in (1, 2):
            decay, noise = table.generation_decay[k - 1], table.generation_std[k - 1]
            std = np.hypot(decay * std, noise)
            x, t = np.asarray(paths.xs[:, k]), table.times[k]
            scale = std * np.asarray(sampler.scale)
            log_reference = _log_normal(x, np.asarray(sampler.loc), scale**2).sum(-1)
            expected = (1 - t) * (float(offset) + log_reference) - t * jax.vmap(
                skewed_energy
            )(x)
            np.testing.assert_allclose(log_flow[:, k], expected, rtol=1e-10)


@pytest.mark.parametrize(
    "options", [{"rate": 0.25}, pytest.param({"every": 2}, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("generation", mostly_slow([False, True], False))
def test_target_copy_lags_behind_one_kernel(x64, options, generation):
    """The copy's kernel in the value, no gradient to it, and the way the copy moves."""
    copied = ds.objectives.target_copy(
        ds.objectives.log_variance(), **options, generation=generation
    )
    old = jax.tree.map(lambda v: v + 0.3, gaussian_params())
    _, state = copied.init(jax.random.key(0), GAUSSIAN, old, gaussian_energy, None)
    paths, _ = generated(THETA, GRID)
    value, gradient, _ = quadrature_gradient(copied, paths, state=state)
    fixed, trained = (
        (GENERATION, DESTRUCTION) if generation else (DESTRUCTION, GENERATION)
    )
    group = "generation" if generation else "destruction"
    mixed = gaussian_params() | {group: old[group]}
    log_weight = jax.vmap(
        lambda x: GAUSSIAN.score(mixed, x, gaussian_energy).log_weight
    )(jnp.asarray(LOC + SCALE * paths[:, :, None]))
    assert value == pytest.approx(float(np.var(log_weight, ddof=1)), rel=1e-9)
    assert_gradient(gradient, dict.fromkeys(fixed, 0.0), fixed)
    assert all(gradient[name] != 0 for name in trained)
    params = {"sampler": gaussian_params(), "objective": {}}
    shares = []
    for count in range(4):
        batch = batch_of(jnp.zeros(4), count=jnp.asarray(count))
        before = state[0]["generation"]["a"] - THETA["a"]
        state = copied.update(params, state, batch)
        after = state[0]["generation"]["a"] - THETA["a"]
        shares.append(1 - float(after / before) if before else 1.0)
    assert shares == pytest.approx([0.25] * 4 if "rate" in options else [0, 1, 1, 1])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda o: o.target_copy(o.log_variance()), "either rate in"),
        (lambda o: o.target_copy(o.log_variance(), rate=0.1, every=2), "either rate"),
        (lambda o: o.target_copy(o.log_variance(), rate=1.5), "rate=1.5"),
        (lambda o: o.target_copy(o.log_variance(), every=0), "every=0"),
        (lambda o: o.target_copy(o.reverse_kl(), rate=0.1), "differentiates the sim"),
        (lambda o: o.generation_only(o.reverse_kl()), "trains both kernels at once"),
        (
            lambda o: o.gradient_scale(o.log_variance(), destruction=float("nan")),
            "destruction must be a finite number",
        ),
        (lambda o: o.sub_trajectory_balance(0.0), "decay must be positive"),
        (lambda o: o.Flow(log_z_scale=0.0), "log_z_scale must be positive"),
        (
            lambda o: o.Flow(network=ds.networks.backbone(4)),
            "must return one number, got feature_dim=4",
        ),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make(ds.objectives)


@pytest.mark.parametrize("name", sorted(NEED_DESTRUCTION))
def test_a_destruction_kernel_that_is_not_learned_is_named(name):
    with pytest.raises(ValueError, match="learn_destruction=True"):
        _fit(OBJECTIVES[name](), ds.behaviours.on_policy())


def test_forward_kl_gradient_in_the_generation_kernel(x64):
    expected = finite_differences(forward)
    paths, _ = destroyed(THETA, GRID)
    objective = ds.objectives.forward_kl()
    _, actual, _ = quadrature_gradient(objective, paths, on_policy=False)
    assert_gradient(actual, expected, GENERATION)
    assert_gradient(actual, dict.fromkeys(DESTRUCTION, 0.0), DESTRUCTION)


def test_forward_kl_log_derivative_gradient_in_both_kernels(x64):
    expected = finite_differences(forward)
    paths, _ = destroyed(THETA, GRID)
    objective = ds.objectives.forward_kl_log_derivative()
    _, actual, _ = quadrature_gradient(objective, paths, on_policy=False)
    assert_gradient(actual, expected, GENERATION)
    assert_gradient(actual, expected, DESTRUCTION, BATCH / (BATCH - 1))


def test_forward_kl_gradient_on_given_draws(x64):
    """The draws are the nodes of the target, the noise of tracing back is random."""
    expected = finite_differences(forward)
    draws = LOC + SCALE * (MEAN + STD * NODES[:, None])
    objective = ds.objectives.forward_kl(draws)
    params = {"sampler": gaussian_params(), "objective": {}}
    key = jax.random.key(0)
    own, state = objective.init(key, GAUSSIAN, params, gaussian_energy, None)
    assert own == {}

    @jax.jit
    def gradients(keys):
        rows = jnp.zeros((64,), bool)

        def loss(params, key):
            batch = batch_of(
                jnp.zeros(64),
                on_policy=rows,
                key=key,
                sampler=GAUSSIAN,
                energy=gaussian_energy,
            )
            return objective.loss(params, state, batch)

        return jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(params, keys)

    gradient, metrics = gradients(jax.random.split(jax.random.key(1), 400))
    evaluations = metrics["cost"].energy + metrics["cost"].gradient
    assert np.all(evaluations == 64)  # counted by `fit`
    for name in GENERATION:
        sample = np.asarray(gradient["sampler"]["generation"][name])
        error = sample.std() / np.sqrt(sample.size)
        assert error < 0.03
        assert abs(sample.mean() - expected[name]) < 5 * error, name


def test_reverse_kl_gradient_through_the_simulation(x64):
    expected = finite_differences(reverse)

    @jax.jit
    def per_path(keys):
        def loss(params, key):
            return -GAUSSIAN.rollout(params, key, gaussian_energy)[0].log_weight

        return jax.vmap(jax.value_and_grad(loss), (None, 0))(gaussian_params(), keys)

    values, gradient = per_path(jax.random.split(jax.random.key(0), 4_000))
    assert abs(np.mean(values) - (reverse(THETA) - LOG_Z)) < 5 * np.std(values) / 63
    for name in THETA:
        group = "generation" if name in GENERATION else "destruction"
        sample = np.asarray(gradient[group][name])
        error = sample.std() / np.sqrt(sample.size)
        assert error < 0.1
        assert abs(sample.mean() - expected[name]) < 5 * error, name


# -- values on batches made by hand ---------------------------------------------------


def batch_of(log_weight, **fields):
    """A batch of paths of one step, from log-weights alone."""
    log_weight = jnp.asarray(log_weight, float)
    size = log_weight.shape[0]
    trajectories = Trajectory(
        xs=jnp.zeros((size, 2, 1)),
        x=jnp.zeros((size, 1)),
        log_weight=log_weight,
        log_prior=jnp.zeros(size),
        log_generation=fields.pop("log_generation", jnp.zeros((size, 1))),
        log_destruction=fields.pop("log_destruction", jnp.zeros((size, 1))),
        energy=jnp.zeros(size),
    )
    defaults = {
        "rollouts": trajectories,
        "paths": None,
        **rows_of(size)._asdict(),
        "on_policy": jnp.ones(size, bool),
        "target_draws": jnp.zeros(size, bool),
        "count": jnp.asarray(0),
        "key": jax.random.key(0),
        "sampler": None,
        "energy": None,
    }
    return Batch(trajectories, **{**defaults, **fields})


def loss_of(objective, batch, own=None, state=()):
    params = {"sampler": {}, "objective": own or {}}
    return objective.loss(params, state, batch)[0]


BALANCE = {"own": {"log_z": jnp.asarray(0.2)}, "state": jnp.asarray(1.0)}  # log Z = 3
SOME_BAD = [1.0, jnp.nan, 3.0, -jnp.inf, 5.0, jnp.inf]


def test_values():
    batch = batch_of([1.0, 3.0, 5.0])
    objectives = ds.objectives
    assert loss_of(objectives.log_variance(), batch) == pytest.approx(4.0)
    assert loss_of(objectives.reverse_kl(), batch) == pytest.approx(-3.0)
    balance = objectives.trajectory_balance()
    assert loss_of(balance, batch, **BALANCE) == pytest.approx((4 + 0 + 4) / 6)
    batch = batch_of(
        [1.0, 3.0, 5.0],
        log_generation=jnp.array([[1.0], [2.0], [4.0]]),
        log_destruction=jnp.array([[0.5], [0.0], [1.0]]),
        target_draws=jnp.array([True, False, True]),
    )
    assert loss_of(objectives.forward_kl(), batch) == pytest.approx(-2.5)
    # advantages (2, 0, -2) * 3 / 2
    by_hand = (3.0 * 1 + 0.0 - 3.0 * 4) / 3 - 0.5
    log_derivative = objectives.reverse_kl_log_derivative()
    assert loss_of(log_derivative, batch) == pytest.approx(by_hand)


def test_log_derivative_ignores_rows_that_are_not_on_policy():
    rows = jnp.array([True, True, False])
    full = {
        "log_generation": jnp.array([[1.0], [2.0], [400.0]]),
        "log_destruction": jnp.array([[0.5], [0.0], [100.0]]),
    }
    objective = ds.objectives.reverse_kl_log_derivative()
    three = batch_of([1.0, 3.0, 500.0], on_policy=rows, **full)
    two = batch_of([1.0, 3.0], **{k: v[:2] for k, v in full.items()})
    assert loss_of(objective, three) == pytest.approx(float(loss_of(objective, two)))


@pytest.mark.parametrize(
    "name", ["reverse_kl_log_derivative", "log_variance", "trajectory_balance"]
)
def test_non_finite_rows_are_left_out_of_value_and_gradient(name):
    objective = OBJECTIVES[name]()
    extra = BALANCE if name == "trajectory_balance" else {}

    def loss(scale, log_weight):
        log_weight = np.asarray(log_weight)
        good = np.isfinite(log_weight)
        log_weight = jnp.where(good, scale * np.where(good, log_weight, 0), log_weight)
        log_generation = jnp.zeros((log_weight.size, 1)) + scale
        batch = batch_of(log_weight, log_generation=log_generation)
        return loss_of(objective, batch, **extra)

    some, good = (
        jax.value_and_grad(loss)(1.0, rows) for rows in (SOME_BAD, [1.0, 3.0, 5.0])
    )
    assert float(some[0]) == pytest.approx(float(good[0]))
    assert float(some[1]) == pytest.approx(float(good[1]))
    assert np.isnan(loss(1.0, [jnp.nan, jnp.inf, -jnp.inf]))


@pytest.mark.parametrize("needs_score", mostly_slow([False, True], True))
def test_reverse_kl_leaves_out_paths_that_end_where_the_energy_is_not_a_number(
    needs_score,
):
    """Neither they nor the infinite slopes there touch the gradient of the others."""
    network = _affine(*GENERATION, needs_score)
    sampler = ds.samplers.dis(1, 3, loc=LOC, scale=SCALE, network=network)

    def energy(x):
        return gaussian_energy(x) + 0.0 * jnp.sqrt(x[0] - LOC + SCALE)

    @jax.jit
    @jax.value_and_grad
    def loss(params, keys):
        roll = jax.vmap(sampler.rollout, in_axes=(None, 0, None))
        rollouts = roll(params, keys, energy)[0]
        batch = batch_of(rollouts.log_weight)._replace(rollouts=rollouts)
        return loss_of(ds.objectives.reverse_kl(), batch)

    params = sampler.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 64)
    draw = jax.jit(jax.vmap(sampler, in_axes=(None, 0, None)), static_argnums=2)
    good = np.isfinite(draw(params, keys, energy).log_weight)
    assert 0 < good.sum() < 64
    value, gradient = loss(params, keys)
    expected_value, expected = loss(params, keys[good])
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    assert all(np.isfinite(leaf) and leaf != 0 for leaf in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_forward_kl_without_a_usable_row_is_nan():
    batch = batch_of([1.0, 3.0])
    assert np.isnan(loss_of(ds.objectives.forward_kl(), batch))


def test_rows_outside_the_support_leave_a_finite_gradient():
    """An infinite energy makes a log-weight of -inf; the kernels stay fine."""

    def half_line(x):
        return jnp.where(x[0] > LOC, gaussian_energy(x), jnp.inf)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        keys = jax.random.split(jax.random.key(1), 32)
        draw = jax.vmap(GAUSSIAN, in_axes=(None, 0, None))
        trajectories = draw(params, keys, half_line)
        batch = batch_of(trajectories.log_weight)._replace(trajectories=trajectories)
        return loss_of(ds.objectives.log_variance(), batch)

    value, gradient = loss(gaussian_params())
    assert np.isfinite(value)
    assert all(np.isfinite(leaf) and leaf != 0 for leaf in jax.tree.leaves(gradient))


# -- Huber's loss ---------------------------------------------------------------------


def _of_shifted(objective, log_weight):
    """Value, and gradient for each log-weight."""

    def loss(log_weight):
        extra = BALANCE if "trajectory" in objective.loss.__module__ else {}
        return loss_of(objective, batch_of(log_weight), **extra)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_weight))
    return float(value), np.asarray(gradient)


@pytest.mark.parametrize("name", ["log_variance", "trajectory_balance"])
def test_huber_is_the_square_near_and_linear_far(name):
    factory = OBJECTIVES[name]
    near = [1.0, 3.0, 5.0, 2.5]
    plain, wide = (_of_shifted(factory(**o), near) for o in ({}, {"huber": 100.0}))
    assert wide[0] == pytest.approx(plain[0], rel=1e-4)
    np.testing.assert_allclose(wide[1], plain[1], rtol=1e-4, atol=1e-4)
    far = [*near, -1e14, jnp.nan]
    value, gradient = _of_shifted(factory(huber=2.0), far)
    assert np.isfinite(value)
    assert np.all(np.abs(gradient) <= 2 * 2.0)
    assert gradient[4] < 0  # minus the loss' slope: this path must become likelier
    assert gradient[5] == 0


def test_huber_log_variance_is_balance_at_the_best_log_z():
    """Twice the least mean loss over the centre, by brute force."""
    x = np.array([0.3, -1.0, 2.0, 9.0, 8.5, -30.0, 0.1])
    centres = np.linspace(-10, 10, 20_001)
    r = np.abs(x[:, None] - centres)
    h = np.where(r <= 1.5, r**2 / 2, 1.5 * (r - 0.75)).mean(axis=0)
    objective = ds.objectives.log_variance(huber=1.5)
    value, gradient = _of_shifted(objective, x)
    assert value == pytest.approx(2 * h.min() * 7 / 6, rel=1e-4)
    assert abs(gradient.sum()) < 1e-3  # blind to log Z


@pytest.mark.parametrize("huber", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize(
    "name",
    [
        "log_variance",
        "trajectory_balance",
        "sub_trajectory_balance",
        "detailed_balance",
    ],
)
def test_bad_huber(name, huber):
    with pytest.raises(ValueError, match="huber must be positive"):
        getattr(ds.objectives, name)(huber=huber)


# -- factories, pilots, sums ----------------------------------------------------------


def test_factories_return_one_object():
    """Equal recipes then share one compilation."""
    objectives = ds.objectives
    assert objectives.reverse_kl() is objectives.reverse_kl()
    assert objectives.trajectory_balance() is objectives.trajectory_balance()
    assert objectives.trajectory_balance(2.0) is not objectives.trajectory_balance()
    assert objectives.forward_kl() is objectives.forward_kl()
    twice = [
        objectives.weighted_sum(
            (objectives.log_variance(), 1), [objectives.reverse_kl(), w]
        )
        for w in (2.0, jnp.asarray(2.0))
    ]
    assert twice[0] is twice[1]


def test_trajectory_balance_starts_at_the_log_mean_weight_of_a_pilot():
    sampler = SAMPLERS["pis"](num_steps=2)
    params = sampler.init(jax.random.key(0))
    objective = ds.objectives.trajectory_balance()
    assert objective.requires.pilot
    pilot = ds.batching.pilot(jax.random.key(1), sampler, params, skewed_energy)
    own, offset = objective.init(
        jax.random.key(1), sampler, params, skewed_energy, pilot
    )
    assert own["log_z"] == 0.0
    assert float(offset) == pytest.approx(0.7, abs=0.3)  # log Z of this target


@pytest.mark.parametrize("log_z_scale", [0.0, -1.0, float("nan")])
def test_bad_log_z_scale(log_z_scale):
    with pytest.raises(ValueError, match="log_z_scale must be positive"):
        ds.objectives.trajectory_balance(log_z_scale)


@pytest.mark.parametrize(
    ("draws", "match"),
    [
        (np.zeros(3), r"draws must have shape \[N, D\], got \[3\]"),
        (np.zeros((0, 2)), r"draws must have shape \[N, D\], got \[0, 2\]"),
        (np.array([[1.0, np.nan]]), "draws must be finite"),
    ],
)
def test_bad_draws(draws, match):
    with pytest.raises(ValueError, match=match):
        ds.objectives.forward_kl(draws)
    with pytest.raises(ValueError, match=match):
        ds.behaviours.reference_draws(draws)


def test_draws_of_another_dimension():
    objective = ds.objectives.forward_kl(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="draws must have 2 columns, got 3"):
        objective.init(jax.random.key(0), SAMPLERS["pis"](), {}, skewed_energy, None)


def test_weighted_sum_weighs_and_schedules_on_one_batch():
    objectives = ds.objectives
    fading = optax.linear_schedule(1.0, 0.0, 10)
    total = objectives.weighted_sum(
        (objectives.log_variance(), 0.5),
        (objectives.trajectory_balance(), fading),
        (objectives.log_variance(), -2.0),
        (objectives.trajectory_balance(huber=1.0), 0.0),
    )
    own = {"0": {}, "1": BALANCE["own"], "2": {}, "3": BALANCE["own"]}
    params = {"sampler": {}, "objective": own}
    state = ((), BALANCE["state"], (), BALANCE["state"])
    for count, factor in ((0, 1.0), (4, 0.6), (10, 0.0), (20, 0.0)):
        batch = batch_of([1.0, 3.0, 5.0], count=jnp.asarray(count))
        value, metrics = total.loss(params, state, batch)
        assert float(value) == pytest.approx(-1.5 * 4.0 + factor * 8 / 6, abs=1e-5)
        assert float(metrics["loss_0"]) == float(metrics["loss_2"]) == 4.0
        assert float(metrics["log_z"]) == float(metrics["log_z_3"]) == 3.0
    assert total.update(params, state, batch) == state


def test_weighted_sum_joins_requirements_and_states():
    objectives = ds.objectives
    draws = sample_skewed(jax.random.key(0), 16)
    total = objectives.weighted_sum(
        (objectives.reverse_kl(), 1.0),
        (objectives.forward_kl(), 1.0),
        (objectives.trajectory_balance(), 1.0),
        (objectives.forward_kl(draws), 1.0),
    )
    requires = total.requires
    assert requires.simulation_gradient
    assert requires.on_policy
    assert requires.target_draws
    assert requires.pilot
    assert not objectives.weighted_sum((objectives.log_variance(), 1)).requires.pilot
    sampler = SAMPLERS["pis"](num_steps=2)
    params = sampler.init(jax.random.key(0))
    pilot = ds.batching.pilot(jax.random.key(1), sampler, params, skewed_energy)
    own, states = total.init(jax.random.key(0), sampler, params, skewed_energy, pilot)
    assert set(own) == {"0", "1", "2", "3"}
    assert set(own["2"]) == {"log_z"}
    assert states[3].shape == (16, 2)


@pytest.mark.parametrize(
    "members",
    [
        (),
        (ds.objectives.log_variance(),),
        (ds.objectives.log_variance, 1.0),
        ((ds.objectives.log_variance, 1.0),),
        ((1.0, ds.objectives.log_variance()),),
        ((ds.objectives.log_variance(), 1.0, 2.0),),
        ((ds.objectives.log_variance(), "a lot"),),
        ((ds.objectives.log_variance(), float("nan")),),
        ((ds.objectives.log_variance(), None),),
        ((ds.objectives.log_variance(), np.ones(2)),),
    ],
)
def test_bad_members_of_a_weighted_sum(members):
    with pytest.raises(ValueError, match="weighted_sum"):
        ds.objectives.weighted_sum(*members)


# -- what an objective needs ----------------------------------------------------------

UNDEFINED = [
    ("reverse_kl", "mixture", r"needs behaviours\.on_policy\(\) alone"),
    ("reverse_kl", "exploration", r"needs behaviours\.on_policy\(\) alone"),
    ("reverse_kl_log_derivative", "exploration", "needs on-policy rows"),
    ("reverse_kl_log_derivative", "reference_draws", "needs on-policy rows"),
    ("forward_kl", "on_policy", r"needs paths into target draws.*smc_seeded"),
    ("forward_kl", "mixture", r"needs paths into target draws.*reference_draws"),
    (
        "trust_region_log_variance",
        "on_policy",
        r"use behaviours.trust_region\(\), by itself or in a behaviours.mixture",
    ),
    ("log_variance", "replay", r"only repeats what another one found.*on_policy\(\)"),
]


def _fit(objective, behaviour):
    """Raises before anything is compiled."""
    ds.fit(
        jax.random.key(0),
        SAMPLERS["pis"](),
        objective,
        skewed_energy,
        behaviour=behaviour,
        num_updates=1,
        batch_size=8,
        progress_bar=False,
    )


@pytest.mark.parametrize(("objective", "behaviour", "match"), UNDEFINED)
def test_undefined_combinations_say_what_is_missing(objective, behaviour, match):
    with pytest.raises(ValueError, match=match):
        _fit(OBJECTIVES[objective](), BEHAVIOURS[behaviour]())


def test_a_sum_needs_what_its_members_need():
    total = ds.objectives.weighted_sum(
        (ds.objectives.log_variance(), 1.0), (ds.objectives.forward_kl(), 1.0)
    )
    with pytest.raises(ValueError, match="needs paths into target draws"):
        _fit(total, ds.behaviours.on_policy())


@pytest.mark.parametrize(
    ("objective", "behaviour", "match"),
    [
        (ds.objectives.log_variance, None, "objective must come from .* called"),
        (None, None, "objective must come from"),
        (
            ds.objectives.log_variance(),
            ds.behaviours.replay,
            "behaviour must come from",
        ),
    ],
)
def test_uncalled_factories_are_named(objective, behaviour, match):
    with pytest.raises(ValueError, match=match):
        _fit(objective, behaviour)


# -- training -------------------------------------------------------------------------


def _quadratic(params, y, t, context):
    """Affine in the state, quadratic in time: near the optimum for a Gaussian."""
    powers = jnp.stack([jnp.ones_like(t), t, t**2])
    return jnp.dot(powers, params["offset"]) + jnp.dot(powers, params["slope"]) * y


AFFINE = ds.networks.from_function(
    lambda key, dim: {"offset": jnp.zeros(3), "slope": jnp.zeros(3)}, _quadratic
)
REFERENCE = {"dim": 1, "num_steps": 4, "loc": LOC, "scale": SCALE}


def _affine_sampler(name):
    networks = {"network": AFFINE}
    if "destruction" in SAMPLERS[name]().init(jax.random.key(0)):
        networks["destruction_network"] = AFFINE
    return SAMPLERS[name](**REFERENCE, **networks)


def _gap_before_and_after(objective, sampler, energy, log_z, draws, **options):
    behaviour = ds.behaviours.on_policy()
    if objective.requires.anchor:
        behaviour = ds.behaviours.trust_region(512, every=5, max_divergence=1.0)
    if objective.requires.target_draws:
        behaviour = ds.behaviours.mixture(
            (behaviour, 0.5), (ds.behaviours.reference_draws(draws), 0.5)
        )
    settings = {"batch_size": 128, "updates_per_chunk": 50, "ema_decay": None}
    fit = ds.fit(
        jax.random.key(0),
        sampler,
        objective,
        energy,
        behaviour=behaviour,
        progress_bar=False,
        **settings,
        **options,
    )
    assert fit.num_skipped == 0
    assert np.all(np.isfinite(fit.metrics["loss"]))
    elbo = fit.metrics["elbo"]
    gap = log_z - elbo[np.isfinite(elbo)]
    few, many = max(1, len(gap) // 20), max(1, 3 * len(gap) // 10)
    return np.mean(gap[:few]), np.mean(gap[-many:])


TRAINED = [
    (objective, sampler)
    for objective in OBJECTIVES
    for sampler in PROCESSES
    if objective not in NEED_DESTRUCTION or sampler == "gbs"
]
FAST = {
    ("reverse_kl", "pis"),
    ("reverse_kl_log_derivative", "gbs"),
    ("log_variance", "dis"),
    ("trajectory_balance", "pis"),
    ("forward_kl", "dds"),
}


@pytest.mark.parametrize(("objective", "sampler"), mostly_slow(TRAINED, *FAST))
def test_every_objective_closes_the_gap_on_a_shifted_gaussian(objective, sampler):
    noise = jax.random.normal(jax.random.key(5), (512, 1))
    draws = LOC + SCALE * (MEAN + STD * noise)
    forward = objective == "forward_kl_draws"
    make = OBJECTIVES[objective]
    before, after = _gap_before_and_after(
        ds.objectives.forward_kl(draws) if forward else make(),
        _affine_sampler(sampler),
        gaussian_energy,
        LOG_Z,
        draws,
        optimizer=optax.adam(3e-2),
        num_updates=100,
    )
    assert before > 0.15
    # Both leave a learned destruction kernel as it is, and with it a part of the gap.
    leaves = "forward" in objective or objective == "target_copy"
    assert -0.03 < after < (0.6 if leaves else 0.4) * before


def _sampler_for(objective, sampler):
    """Most go with any; `dis` starts too close to the optimum for some."""
    if objective in NEED_DESTRUCTION:
        return "dis_shared"
    return "pis" if objective == "trust_region_log_variance" else sampler


NETWORKS = [
    (objective, _sampler_for(objective, sampler))
    for objective, sampler in zip(OBJECTIVES, itertools.cycle(SAMPLERS), strict=False)
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "sampler"), NETWORKS)
def test_every_objective_closes_the_gap_with_a_network(objective, sampler):
    sampler = SAMPLERS[sampler](num_steps=6)
    before, after = _gap_before_and_after(
        OBJECTIVES[objective](),
        sampler,
        skewed_energy,
        0.7,
        sample_skewed(jax.random.key(100), 512),
        params=perturbed(sampler.init(jax.random.key(0)), 0.1),
        optimizer=optax.adam(1e-2),
        num_updates=200,
    )
    assert -0.1 < after < 0.75 * before


def test_labels_choose_what_moves():
    objective = ds.objectives.weighted_sum(
        (ds.objectives.log_variance(), 1.0), (ds.objectives.trajectory_balance(), 1.0)
    )
    trainable = {
        "sampler": gaussian_params(),
        "objective": {"0": {}, "1": {"log_z": jnp.zeros(())}},
    }
    labels = ds.param_labels(trainable)
    assert set(jax.tree.leaves(labels)) == {"generation", "destruction", "log_z"}
    assert jax.tree.structure(labels) == jax.tree.structure(trainable)
    optimizer = optax.multi_transform(
        {
            "generation": optax.set_to_zero(),
            "destruction": optax.sgd(1e-3),
            "log_z": optax.sgd(1.0),
        },
        ds.param_labels,
    )
    fit = ds.fit(
        jax.random.key(0),
        GAUSSIAN,
        objective,
        gaussian_energy,
        optimizer=optimizer,
        num_updates=3,
        batch_size=8,
        max_grad_norm=None,
        ema_decay=None,
        progress_bar=False,
    )
    after, before = fit.params, gaussian_params()
    for name in GENERATION:
        assert after["generation"][name] == before["generation"][name]
    for name in DESTRUCTION:
        assert after["destruction"][name] != before["destruction"][name]
    assert float(fit.state.params["objective"]["1"]["log_z"]) != 0.0


def test_own_groups_are_labelled_by_their_name():
    params = {
        "sampler": {"generation": 0.0},
        "objective": {"flow": [0.0], "other": 0.0},
    }
    assert ds.param_labels(params) == {
        "sampler": {"generation": "generation"},
        "objective": {"flow": ["flow"], "other": "other"},
    }
