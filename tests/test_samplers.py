"""What every sampler promises: values, keys, compilation, dtypes, gradients, memory."""

import dataclasses
import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tables import (
    PROCESSES,
    SAMPLERS,
    conditional_energy,
    counting_energy,
    mostly_slow,
    perturbed,
    shifted_energy,
    skewed_energy,
)

import diffsamp as ds
from diffsamp.networks import Context

Partial = jax.tree_util.Partial
K = 3


@pytest.fixture(scope="module", params=mostly_slow(SAMPLERS, *PROCESSES))
def made(request):
    """A sampler, parameters, and ``jit(sampler)`` with a count of its traces."""
    name = request.param
    sampler = SAMPLERS[name](num_steps=K)
    traces = []

    def energy(data, x):
        traces.append(x.dtype)
        return shifted_energy(data, x)

    return types.SimpleNamespace(
        name=name,
        sampler=sampler,
        params=perturbed(sampler.init(jax.random.key(0)), 0.2),
        draw=jax.jit(sampler),
        traces=traces,
        energy=energy,
        with_data=Partial(energy, jnp.array([1.0, -0.5])),
    )


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_one_compilation_serves_new_params_keys_and_data(made):
    first = made.draw(made.params, jax.random.key(1), made.with_data)
    count = len(made.traces)
    other = perturbed(made.params, 0.1)
    data = Partial(made.energy, jnp.array([-1.0, 2.0]))
    second = made.draw(other, jax.random.key(2), data)
    twin = SAMPLERS[made.name](num_steps=K)
    assert twin is not made.sampler
    assert twin == made.sampler
    assert hash(twin) == hash(made.sampler)
    third = jax.jit(twin)(made.params, jax.random.key(1), made.with_data)
    assert len(made.traces) == count
    assert_trees_close(first, third, rtol=0)
    assert first.log_weight != second.log_weight


def test_static_argument(made):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def steps(sampler, params):
        traces.append(sampler)
        return jnp.asarray(sampler.num_steps)

    for _ in range(2):
        assert steps(SAMPLERS[made.name](num_steps=K), made.params) == K
    assert len(traces) == 1
    assert steps(made.sampler.with_num_steps(7), made.params) == 7
    assert len(traces) == 2


def test_eager_with_a_raw_key_equals_jit_with_a_typed_one(made):
    compiled = made.draw(made.params, jax.random.key(1), made.with_data)
    eager = made.sampler(made.params, jax.random.PRNGKey(1), made.with_data)
    assert_trees_close(compiled, eager, rtol=2e-5, atol=2e-5)
    again = made.draw(made.params, jax.random.key(1), made.with_data)
    assert_trees_close(compiled, again, rtol=0)


def test_vmap_equals_a_loop(made):
    keys = jax.random.split(jax.random.key(4), 5)
    batch = jax.jit(jax.vmap(made.sampler, in_axes=(None, 0, None)))
    together = batch(made.params, keys, made.with_data)
    assert together.xs.shape == (5, K + 1, 2)
    for i, key in enumerate(keys):
        alone = made.draw(made.params, key, made.with_data)
        row = jax.tree.map(lambda a, i=i: a[i], together)
        assert_trees_close(row, alone, rtol=2e-5, atol=2e-5)


def test_shapes_and_default_dtype(made):
    trajectory = made.draw(made.params, jax.random.key(1), made.with_data)
    shapes = {name: v.shape for name, v in trajectory._asdict().items()}
    assert shapes == {
        "xs": (K + 1, 2),
        "x": (2,),
        "log_weight": (),
        "log_prior": (),
        "log_generation": (K,),
        "log_destruction": (K,),
        "energy": (),
    }
    for leaf in jax.tree.leaves((made.params, trajectory)):
        assert leaf.dtype == jnp.float32
        assert np.all(np.isfinite(leaf))


def test_rounding_errors_of_a_weight_do_not_grow_with_the_dimension():
    """An exact sampler of 1,000 dimensions: every weight is one."""
    network = ds.networks.from_function(
        lambda key, dim: jnp.zeros(()), lambda params, x, t, context: 0.0 * x
    )
    sampler = ds.samplers.dis(1_000, 64, scale=0.1, network=network)

    def energy(x):
        return jnp.sum(50.0 * x**2 + 0.5 * np.log(2 * np.pi * 0.01))

    draw = jax.jit(jax.vmap(sampler, in_axes=(None, 0, None)), static_argnums=2)
    keys = jax.random.split(jax.random.key(1), 64)
    log_weight = draw(sampler.init(jax.random.key(0)), keys, energy).log_weight
    assert float(jnp.max(jnp.abs(log_weight))) < 0.02


def test_scored_paths_have_no_gradient_in_the_states(made):
    xs = made.draw(made.params, jax.random.key(1), made.with_data).xs

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, xs):
        return made.sampler.score(params, xs, made.with_data).log_weight

    in_params, in_states = gradients(made.params, xs)
    assert np.array_equal(in_states, np.zeros_like(xs))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(in_params))


# -- step counts ----------------------------------------------------------------------


def test_step_counts_share_parameters(made):
    one = made.sampler.with_num_steps(1)
    assert one.with_num_steps(K) == made.sampler
    shapes = jax.eval_shape(one.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, made.params)
    back = jax.jit(one.trace_back)
    trajectory = back(made.params, jax.random.key(0), jnp.ones(2), made.with_data)
    assert trajectory.xs.shape == (2, 2)
    assert np.isfinite(trajectory.log_weight)


# -- float64 and the gradient of a rollout --------------------------------------------


def _kernel(sampler, k, y, decay, std, control, bounds, *, destroys=False):
    """Mean and standard deviation, as the docstrings state them."""
    free, c = 1.0, bounds.log_variance
    if sampler.finest is not None:
        free = math.sqrt(
            (sampler.finest / sampler.num_steps - 1) / (sampler.finest - 1)
        )

    def shift(numbers):
        moved = numbers / math.sqrt(sampler.num_steps)
        if bounds.shift is None:
            return std[k] * moved
        return std[k] * bounds.shift * jnp.tanh(moved / bounds.shift)

    drift, spread, residual = jnp.split(jnp.resize(control, 6), 3)
    jumps = isinstance(sampler.process, ds.processes.Renoising)
    if control.size == 6 and not jumps:
        spread = spread - 4
    mean = decay[k] * y + shift(drift) * (free if destroys else 1.0)
    if control.size == 2:
        return mean, jnp.full(2, std[k])
    ratio = jnp.exp(free * c * jnp.tanh(spread / c))
    if control.size == 6:
        flow = mean if jumps else y + shift(drift) / 2
        mean = flow + jnp.minimum(ratio, 1.0) * (mean - flow) + free * shift(residual)
    return mean, std[k] * jnp.sqrt(ratio)


def _log_normal(x, mean, std):
    return -0.5 * jnp.sum(((x - mean) / std) ** 2 + jnp.log(2 * jnp.pi * std**2))


def _by_hand(sampler, params, y, noise):
    """log_weight by a plain loop, differentiated by plain automatic differentiation.

    Args: y: first state in unit coordinates; noise: [K, D], or a path ys [K+1, D] from
    which to recover it. Returns the log-weight and the noise.
    """
    loc, scale = jnp.asarray(sampler.loc), jnp.asarray(sampler.scale)
    table = sampler.process.coefficients(sampler.num_steps)
    ys = noise if noise.shape[0] == sampler.num_steps + 1 else None
    used = []

    def control(network, group, y, t, gain, step_size):
        score = -scale * jax.grad(skewed_energy)(jax.lax.stop_gradient(loc + scale * y))
        score = score if network.needs_score else jnp.zeros((0,))
        features = None
        if sampler.backbone is not None:
            features = sampler.backbone(params["backbone"], y, jnp.asarray(t), None)
        constants = jnp.asarray(gain), None, features, jnp.asarray(step_size)
        given = y, jnp.asarray(t), Context(score, *constants)
        if not isinstance(network, ds.networks.Tied):
            return network(params[group], *given)
        flow = jax.lax.stop_gradient(params[group]["flow"])
        drift = network.flow(flow, *given)
        own = network.residual(params[group]["residual"], *given)
        return jnp.concatenate([drift, own[2:], own[:2]])

    log_volume = jnp.sum(jnp.log(scale))
    total = 0.0
    if sampler.prior is not None:
        total = -sampler.prior.log_density(params["prior"], y) + log_volume
    elif not sampler.process.point_mass:
        total = -_log_normal(y, jnp.zeros(2), jnp.ones(2)) + log_volume
    for k in range(sampler.num_steps):
        t, t_next, gain = table.times[k], table.times[k + 1], table.score_gain[k]
        u = control(sampler.generation, "generation", y, t, gain, t_next - t)
        generation = table.generation_decay, table.generation_std
        mean, std = _kernel(sampler, k, y, *generation, u, sampler.generation_bounds)
        used.append((ys[k + 1] - mean) / std if ys is not None else noise[k])
        y_next = mean + std * used[-1]
        total -= _log_normal(y_next, mean, std) - log_volume
        v = jnp.zeros(2)
        if sampler.destruction is not None:
            at = y_next, t_next, gain, t_next - t
            v = control(sampler.destruction, "destruction", *at)
        destruction = table.destruction_decay, table.destruction_std
        bounds = sampler.destruction_bounds
        mean, std = _kernel(sampler, k, y_next, *destruction, v, bounds, destroys=True)
        if table.destruction_std[k] > 0:
            total += _log_normal(y, mean, std) - log_volume
        y = y_next
    return total - skewed_energy(loc + scale * y), jnp.stack(used)


@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize("name", mostly_slow(SAMPLERS, "dis_free"))
def test_rollout_gradient_is_that_of_a_plain_loop(x64, name, keep_states):
    sampler = SAMPLERS[name](num_steps=5)  # two segments of two steps, and one more
    params = perturbed(sampler.init(jax.random.key(0)), 0.2)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def rollout(params):
        trajectory, path = sampler.rollout(
            params, jax.random.key(1), skewed_energy, keep_states=keep_states
        )
        return trajectory.log_weight, (trajectory, path)

    (log_weight, (trajectory, path)), gradient = rollout(params)
    for leaf in jax.tree.leaves((params, trajectory, path, gradient)):
        assert leaf.dtype == jnp.float64
    np.testing.assert_allclose(trajectory.xs, path.xs)
    ys = (path.xs - jnp.asarray(sampler.loc)[None]) / jnp.asarray(sampler.scale)[None]
    _, noise = _by_hand(sampler, params, ys[0], ys)
    naive = jax.jit(jax.value_and_grad(lambda p: _by_hand(sampler, p, ys[0], noise)[0]))
    value, expected = naive(params)
    assert float(log_weight) == pytest.approx(float(value), rel=1e-11)
    assert_trees_close(gradient, expected, rtol=1e-10, atol=1e-11)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name_of = jax.tree_util.keystr(path)
        constant = any(word in name_of for word in ("prior", "mixture", "'flow'"))
        assert np.any(leaf != 0) != constant


def _backward_bytes(sampler, params, batch_size=64, energy=skewed_energy, **options):
    @jax.jit
    @jax.grad
    def gradient(params, keys):
        def one(key):
            rolled, _ = sampler.rollout(params, key, energy, **options)
            return rolled.log_weight

        return jnp.mean(jax.vmap(one)(keys))

    keys = jax.random.split(jax.random.key(0), batch_size)
    compiled = gradient.lower(params, keys).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_rollout_memory_grows_like_the_root_of_the_step_count(name):
    sampler = SAMPLERS[name]()
    params = sampler.init(jax.random.key(0))
    few, many = (_backward_bytes(sampler.with_num_steps(k), params) for k in (16, 256))
    assert many < 6 * few  # 4 by the root of 16, and the scores, which are kept


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_rollout_memory_in_32_dimensions(name):
    """Where scores, all of which are kept, outweigh a root of the states."""
    sampler, size = SAMPLERS[name](dim=32, loc=0.4, scale=1.8), 64
    params = sampler.init(jax.random.key(0))
    few, many = (
        _backward_bytes(sampler.with_num_steps(k), params, size, lambda x: x @ x)
        for k in (16, 256)
    )
    scores = 4 * size * 32 * 256 * sampler.needs_score
    assert many < 4 * few + 1.1 * scores


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_rollout_keeps_the_states_it_says(name):
    sampler = SAMPLERS[name](num_steps=256)
    params, size = sampler.init(jax.random.key(0)), 64
    without = _backward_bytes(sampler, params, size)
    kept = _backward_bytes(sampler, params, size, keep_states=True)
    assert kept - without < 1.5 * size * sampler.bytes_of_states


# -- cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(SAMPLERS, "pis", "gbs", "dis_free"))
def test_evaluations_are_counted_as_they_are_made(name):
    sampler = SAMPLERS[name](num_steps=K)
    params = sampler.init(jax.random.key(0))
    energy, take = counting_energy(skewed_energy)
    per_path = sampler.evaluations_per_path
    expected = {"energy": per_path.energy, "gradient": per_path.gradient}
    assert sum(expected.values()) == (K + 1 if sampler.needs_score else 1)
    trajectory = jax.jit(lambda p, k: sampler(p, k, energy))(params, jax.random.key(1))
    assert take() == expected
    back = jax.jit(lambda p, k, x: sampler.trace_back(p, k, x, energy))
    back(params, jax.random.key(1), trajectory.x)
    assert take() == expected
    networks = len(params) + isinstance(sampler.generation, ds.networks.Tied)
    shared = sampler.backbone is not None  # evaluated once per state
    assert per_path.network == (K + 1 if shared else K * networks)


# -- conditional energies -------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(SAMPLERS, "gbs"))
def test_conditional_energy(name):
    sampler = SAMPLERS[name](num_steps=2, condition_dim=3)
    params = perturbed(sampler.init(jax.random.key(0)), 0.2)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def run(key, condition):
        forward = sampler(params, key, conditional_energy, condition)
        score = sampler.score(params, forward.xs, conditional_energy, condition)
        back = sampler.trace_back(params, key, forward.x, conditional_energy, condition)
        return forward, score, back

    conditions = jnp.array([[0.0, 1.0, 2.0], [0.0, 1.0, 9.0], [3.0, 1.0, 2.0]])
    forward, score, back = run(jax.random.key(1), conditions)
    assert_trees_close(score, forward, rtol=1e-4, atol=1e-4)
    by_hand = jax.vmap(conditional_energy)(forward.x, conditions)
    np.testing.assert_allclose(forward.energy, by_hand, rtol=1e-6)
    assert np.array_equal(back.x, forward.x)
    # The third entry enters by the network alone.
    assert np.all(forward.x[0] != forward.x[1])


@pytest.mark.parametrize("condition_dim", [0, 3])
@pytest.mark.parametrize("condition", [None, jnp.zeros(2), jnp.zeros((1, 3))])
def test_wrong_condition_is_named(condition_dim, condition):
    if condition is None and condition_dim == 0:
        return
    sampler = SAMPLERS["pis"](num_steps=2, condition_dim=condition_dim)
    params = jax.eval_shape(sampler.init, jax.random.key(0))

    def energy(x, condition=None):
        return jnp.sum(x**2)

    key, xs = jax.random.key(0), jnp.zeros((3, 2))
    calls = {
        "draw": lambda p: sampler(p, key, energy, condition),
        "score": lambda p: sampler.score(p, xs, energy, condition),
        "trace_back": lambda p: sampler.trace_back(p, key, xs[0], energy, condition),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="condition must be"):
            jax.eval_shape(call, params)


# -- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"dim": 0}, "dim must be at least 1"),
        ({"dim": 2.0}, "dim must be an integer"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_steps": -3}, "num_steps must be at least 1"),
        ({"num_steps": 2.5}, "num_steps must be an integer"),
        ({"num_steps": True}, "num_steps must be an integer"),
        ({"loc": (1.0, 2.0, 3.0)}, "loc must be a number or 2 numbers"),
        ({"loc": ((1.0, 2.0),)}, "loc must be a number or 2 numbers"),
        ({"loc": math.nan}, "loc must be finite"),
        ({"scale": (1.0,)}, "scale must be a number or 2 numbers"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": (1.0, -1.0)}, "scale must be positive"),
        ({"scale": math.nan}, "scale must be positive"),
        ({"scale": math.inf}, "scale must be finite"),
        ({"condition_dim": -1}, "condition_dim must be at least 0"),
    ],
)
def test_bad_construction_is_named(name, bad, match):
    with pytest.raises(ValueError, match=match):
        SAMPLERS[name](**bad)


def test_a_bare_function_is_no_network():
    def drift(params, x, t, context):
        return x

    with pytest.raises(ValueError, match=r"of generation .*networks\.from_function"):
        ds.samplers.dis(2, 4, network=drift)
    with pytest.raises(ValueError, match="network of destruction must be a control"):
        ds.samplers.dis(2, 4, destruction_network=drift)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"schedule": "cosine"}, r"schedule must come from diffsamp\.schedules"),
        ({"time_grid": "cosine"}, "time_grid must be a function"),
        ({"backbone": "mlp"}, "network of backbone must be a control"),
    ],
)
def test_names_in_place_of_parts(bad, match):
    with pytest.raises(ValueError, match=match):
        ds.samplers.dis(2, 4, **bad)


@pytest.mark.parametrize("name", ["data_prediction", "mixture_guided"])
def test_a_network_for_another_schedule_is_named(name):
    """It would take other steps than it is documented to take."""
    given = {"data_prediction": (), "mixture_guided": (3,)}[name]
    network = getattr(ds.networks, name)(*given, ds.schedules.geometric(0.05))
    with pytest.raises(ValueError, match="generation must have the schedule of the sa"):
        ds.samplers.dis(2, 4, schedule=ds.schedules.geometric(0.1), network=network)


def test_bad_step_count_is_named():
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        SAMPLERS["dis"]().with_num_steps(0)


def test_arrays_and_numpy_numbers_are_accepted():
    sampler = SAMPLERS["dis"](
        dim=np.int64(2), loc=np.array([0.4, -0.3]), scale=jnp.asarray(1.5)
    )
    assert sampler == SAMPLERS["dis"](loc=[0.4, -0.3], scale=1.5)
    assert hash(sampler) == hash(SAMPLERS["dis"](loc=(0.4, -0.3), scale=1.5))


@pytest.fixture(scope="module")
def shapes():
    sampler = SAMPLERS["dis"](num_steps=K)
    return sampler, sampler.init(jax.random.key(0))


BAD_ENERGIES = {
    "vector": (lambda x: x**2, r"energy must return a scalar .*\(2,\)"),
    "batch": (lambda x: jnp.sum(x**2, axis=1), "energy failed on one point .*dim=2"),
    "integer": (lambda x: jnp.sum(x > 0), "energy must return a floating-point number"),
    "boolean": (lambda x: jnp.all(x > 0), "energy must return a floating-point number"),
    "text": (lambda x: "energy", "energy failed on one point|energy must return"),
    "dimension": (lambda x: jnp.dot(x, jnp.ones(3)), "energy failed on one point"),
    "python": (lambda x: float(x[0]), "energy failed on one point"),
    "pair": (lambda x: (jnp.sum(x), x), "energy must return a scalar"),
}


@pytest.mark.parametrize("name", BAD_ENERGIES)
def test_bad_energy_is_named(shapes, name):
    sampler, params = shapes
    energy, match = BAD_ENERGIES[name]
    key, xs = jax.random.key(0), jnp.zeros((K + 1, 2))
    for call in (
        lambda: sampler(params, key, energy),
        lambda: sampler.score(params, xs, energy),
        lambda: sampler.trace_back(params, key, xs[0], energy),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_constant_energy_is_an_energy(shapes):
    sampler, params = shapes
    trajectory = sampler(params, jax.random.key(0), lambda x: 1.5)
    assert trajectory.energy == 1.5
    assert trajectory.energy.dtype == jnp.float32


def test_energy_of_lower_precision_is_cast(shapes):
    sampler, params = shapes
    trajectory = sampler.score(
        params, jnp.ones((K + 1, 2)), lambda x: jnp.sum(x).astype(jnp.bfloat16)
    )
    assert trajectory.energy.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(K, 2), (K + 1, 3), (K + 1,), (5, K + 1, 2)])
def test_wrong_path_is_named(shapes, shape):
    sampler, params = shapes
    with pytest.raises(ValueError, match=r"xs must have shape .*\[4, 2\]"):
        sampler.score(params, jnp.zeros(shape), skewed_energy)


@pytest.mark.parametrize("shape", [(3,), (), (5, 2), (1,)])
def test_wrong_point_is_named(shapes, shape):
    sampler, params = shapes
    with pytest.raises(ValueError, match=r"x must be one point of shape \[2\]"):
        sampler.trace_back(params, jax.random.key(0), jnp.zeros(shape), skewed_energy)


BAD_KEYS = {
    "number": 0,
    "none": None,
    "float": jnp.zeros(2),
    "signed": jnp.zeros(2, jnp.int32),
    "short": jnp.zeros((1,), jnp.uint32),
    "raw batch": jnp.zeros((4, 2), jnp.uint32),
    "scalar": jnp.zeros((), jnp.uint32),
}


@pytest.mark.parametrize("name", [*BAD_KEYS, "typed batch"])
def test_wrong_key_is_named(shapes, name):
    sampler, params = shapes
    key = BAD_KEYS.get(name)
    if name == "typed batch":
        key = jax.random.split(jax.random.key(0), 3)
    for call in (
        lambda: sampler.init(key),
        lambda: sampler(params, key, skewed_energy),
        lambda: sampler.final(params, key, skewed_energy),
        lambda: sampler.simulate(params, key, skewed_energy),
        lambda: sampler.trace_back(params, key, jnp.zeros(2), skewed_energy),
    ):
        with pytest.raises(ValueError, match="key must be one"):
            call()


def test_numpy_raw_key_is_accepted(shapes):
    sampler, _ = shapes
    raw = np.asarray(jax.random.key_data(jax.random.key(3)))
    assert_trees_close(sampler.init(raw), sampler.init(jax.random.key(3)), rtol=0)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_control_of_wrong_size_is_named(size):
    control = ds.networks.from_function(
        lambda key, dim: (), lambda p, x, t, context: jnp.zeros(size)
    )
    sampler = ds.samplers.pis(2, 2, network=control)
    with pytest.raises(ValueError, match=r"network must return \[2\]"):
        sampler({"generation": ()}, jax.random.key(0), skewed_energy)


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        [*"pis dds dis gbs scds cdds pis_shared dis_shared".split()],
        "pis_shared",
        "cdds",
    ),
)
def test_what_is_learned_starts_at_the_reference(x64, name):
    """Means and variances of both kernels are the fixed ones until trained."""
    factory = getattr(ds.samplers, name.removesuffix("_shared"))
    options = {"loc": (0.5, -1.0), "scale": (2.0, 0.7)}
    if name == "scds":
        options["finest"] = 12  # with as many steps nothing else is learned
    learned = {"learn_generation_variance": True, "learn_destruction": True}
    if name.endswith("_shared"):
        learned["backbone"] = ds.networks.backbone(width=8)
        options["network"] = ds.networks.free(8)
        learned["network"] = ds.networks.free(8, learn_variance=True)
    fixed, free = factory(2, 3, **options), factory(2, 3, **options | learned)
    if name == "scds":  # which starts near its flow otherwise
        network = dataclasses.replace(free.generation, log_variance=0.0)
        free = dataclasses.replace(free, generation=network)
    own = fixed.init(jax.random.key(0))
    path = jax.jit(lambda: fixed.simulate(own, jax.random.key(1), skewed_energy))()
    same, found = (
        jax.jit(sampler.score_path)(params, path)
        for sampler, params in ((fixed, own), (free, free.init(jax.random.key(0))))
    )
    np.testing.assert_allclose(found.log_generation, same.log_generation, rtol=1e-9)
    np.testing.assert_allclose(found.log_destruction, same.log_destruction, rtol=1e-9)
    if name == "cdds":  # its process knows no mean; the network's is the skip alone
        step, skip = fixed.steps(), 0.25 / ((1 - fixed.steps().time) ** 2 + 0.25)
        signal = fixed.process.schedule.signal(step.next_time)
        ys = fixed.unit(path.xs)
        mean = (jnp.sqrt(signal) * skip)[:, None] * ys[:-1]
        by_hand = [
            _log_normal(y, m, jnp.full(2, std)) - np.log(2.0 * 0.7)
            for y, m, std in zip(ys[1:], mean, step.generation_std, strict=True)
        ]
        np.testing.assert_allclose(found.log_generation, by_hand, rtol=1e-9)


FACTORIES = ("pis", "dds", "dis", "gbs", "scds", "cdds")
TIED = ("scds", "cdds")  # whose variance has a network of its own
GIVEN = {
    "learn_generation_variance": ("generation", "network"),
    "learn_destruction": ("destruction", "destruction_network"),
}


SWITCHED = [
    (name, argument)
    for name, argument in itertools.product(FACTORIES, GIVEN)
    if name not in TIED or argument == "learn_destruction"
]


@pytest.mark.parametrize("argument", GIVEN)
@pytest.mark.parametrize("name", FACTORIES)
def test_a_given_network_learns_the_variance_that_is_asked_for(name, argument):
    factory, (kernel, given) = getattr(ds.samplers, name), GIVEN[argument]
    tied = name in TIED and kernel == "generation"
    own = ds.networks.free(learn_variance=True, step_conditioned=True)
    reduced = ds.networks.reduced_precision
    for module in (
        ds.networks.free(8, 1),
        ds.networks.coordinatewise(8, 1, use_score=False, output_clip=7.0),
    ):
        on = dataclasses.replace(
            module, module=module.module.clone(learn_variance=True)
        )
        pairs = [(module, on), (on, on), (reduced(module), reduced(on))]
        if tied:
            on = ds.networks.tied(module, own)
            both = ds.networks.tied(reduced(module), reduced(own))
            mixed = ds.networks.tied(reduced(module), own)
            assert reduced(on) == both
            loud = {"log_variance": 0.0}
            changed = dataclasses.replace(on, **loud), dataclasses.replace(both, **loud)
            assert reduced(changed[0]) == changed[1]
            pairs = [(module, on), (on, on), (both, both), (reduced(module), mixed)]
        for network, learned in pairs:
            asked = factory(2, 4, **{given: network, argument: True})
            assert getattr(asked, kernel) == learned
            assert asked == factory(2, 4, **{given: learned})
            assert getattr(factory(2, 4, **{given: network}), kernel) == network
    params = jax.eval_shape(asked.init, jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(1))
    jax.eval_shape(lambda p, k: asked(p, k, skewed_energy), params, key)
    default = getattr(factory(2, 4, **{argument: True}), kernel)
    if tied:
        assert default.residual == own
    else:
        assert default.module.learn_variance


class _NoSwitch(nn.Module):
    @nn.compact
    def __call__(self, x, t, context):
        return nn.Dense(x.shape[-1])(x)


@pytest.mark.parametrize(("name", "argument"), SWITCHED)
def test_a_network_that_cannot_learn_the_variance_is_named(name, argument):
    factory, (_, given) = getattr(ds.samplers, name), GIVEN[argument]
    function = ds.networks.from_function(
        lambda key, dim: (), lambda p, x, t, context: jnp.concatenate([x, x])
    )
    reduced = ds.networks.reduced_precision(
        ds.networks.linen(_NoSwitch(), needs_score=False)
    )
    for network, kind in (
        (function, "FunctionControl"),
        (ds.networks.contractive(8, 1), "ContractiveModule"),
        (ds.networks.linen(_NoSwitch(), needs_score=False), "_NoSwitch"),
        (reduced, "_NoSwitch"),
    ):
        factory(2, 4, **{given: network})
        match = rf"{argument}=True needs .*{kind}; take .*leave {argument} out"
        with pytest.raises(ValueError, match=match):
            factory(2, 4, **{given: network, argument: True})
