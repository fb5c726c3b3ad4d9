"""Controls: what they are at initialisation, what they clip, what they may look at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tables import NETWORKS, perturbed

import diffsamp as ds
from diffsamp.networks import Context

DIM = 3
X = jnp.array([0.5, -1.0, 2.0])
T = jnp.array(0.25)
SCORE = jnp.array([1.0, -2.0, 3.0])


def context(needs_score=True, gain=0.5, score=SCORE, condition=None):
    score = score if needs_score else jnp.zeros((0,))
    return Context(score, jnp.asarray(gain), condition)


def _new(name, condition_dim=0):
    control = NETWORKS[name]()
    return control, control.init(jax.random.key(0), DIM, condition_dim)


@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_dtype(name):
    control, params = _new(name)
    out = control(params, X, T, context(control.needs_score))
    assert out.shape == (DIM,)
    assert out.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_in_float32_unless_asked(name):
    """GPUs and TPUs would use fewer bits of it, by JAX's default."""
    control, params = _new(name)
    traced = jax.make_jaxpr(control)(params, X, T, context(control.needs_score))
    products = [
        equation.params["precision"]
        for equation in _equations(traced.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    full = (jax.lax.Precision.HIGHEST,) * 2
    assert products
    if name != "reduced_precision":
        assert set(products) == {full}


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_throughout(x64, name):
    control, params = _new(name)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
    x, score = jnp.asarray(X, float), jnp.asarray(SCORE, float)
    state = Context(score if control.needs_score else score[:0], jnp.ones(()), None)
    assert control(params, x, jnp.asarray(0.25), state).dtype == jnp.float64


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_networks_are_equal(name):
    first, second = NETWORKS[name](), NETWORKS[name]()
    assert first == second
    assert hash(first) == hash(second)
    assert first != NETWORKS[name](depth=2)


INITIAL = {
    "free": lambda: np.zeros(DIM),
    "score_guided": lambda: 0.5 * 0.01 * SCORE,
    # gain * (s_t - s_0) with s_t = (1 - t) s_0 + t score and s_0 = -x
    "annealed_score_guided": lambda: 0.5 * (0.75 * -X + 0.25 * SCORE + X),
    "reference_guided": lambda: 0.5 * 0.75 * -X,
    "coordinatewise": lambda: 0.5 * (0.75 * -X + 0.25 * SCORE + X),
    "reduced_precision": lambda: np.zeros(DIM),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_control_before_training(name):
    control, params = _new(name)
    out = control(params, X, T, context(control.needs_score))
    np.testing.assert_allclose(out, INITIAL[name](), rtol=1e-6)


def test_annealed_score_without_offset_is_annealed_langevin():
    control = ds.networks.annealed_score_guided(8, 1, offset=0.0)
    params = control.init(jax.random.key(0), DIM, 0)
    out = control(params, X, T, context())
    np.testing.assert_allclose(out, 0.5 * (0.75 * -X + 0.25 * SCORE), rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["score_guided", "annealed_score_guided", "coordinatewise"]
)
def test_score_input_is_clipped_and_made_finite(name):
    control = NETWORKS[name](score_clip=2.0)
    params = perturbed(control.init(jax.random.key(0), DIM, 0), 0.3)
    wild = jnp.array([jnp.nan, jnp.inf, -1e30])
    tame = jnp.array([0.0, 2.0, -2.0])
    np.testing.assert_allclose(
        control(params, X, T, context(score=wild)),
        control(params, X, T, context(score=tame)),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_network_output_is_clipped(name):
    control, params = _new(name)
    params = perturbed(params, 20.0)
    seen = context(control.needs_score)
    guide, clipped, free = (
        NETWORKS[name](output_clip=bound)(params, X, T, seen)
        for bound in (1e-6, 0.5, 1e4)
    )
    assert np.all(np.abs(free - guide) > 0.5)
    np.testing.assert_allclose(np.abs(clipped - guide), 0.5, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_learned_variance_adds_as_many_outputs_again(name):
    control = NETWORKS[name](learn_variance=True)
    params = control.init(jax.random.key(0), DIM, 0)
    seen = context(control.needs_score)
    out = control(params, X, T, seen)
    np.testing.assert_allclose(out[:DIM], INITIAL[name](), rtol=1e-6)
    assert np.array_equal(out[DIM:], np.zeros(DIM))  # the reference's own variance
    moved = control(perturbed(params, 0.3), X, T, seen)
    assert np.all(moved[DIM:] != 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_condition_is_looked_at(name):
    control, params = _new(name, condition_dim=2)
    params = perturbed(params, 0.3)
    outs = [
        control(params, X, T, context(control.needs_score, condition=jnp.array(c)))
        for c in ([0.0, 1.0], [0.0, 2.0])
    ]
    assert np.all(outs[0] != outs[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_time_and_state_are_looked_at(name):
    control, params = _new(name)
    params = perturbed(params, 0.3)
    seen = context(control.needs_score)
    out = control(params, X, T, seen)
    assert np.all(out != control(params, X, T + 0.5, seen))
    assert np.all(out != control(params, X + 1.0, T, seen))


def test_coordinates_share_one_function_but_for_their_index():
    control = ds.networks.coordinatewise(8, 1, learn_variance=True, use_score=False)
    assert not control.needs_score
    params = perturbed(control.init(jax.random.key(0), DIM, 0), 0.3)
    same = jax.tree.map(lambda a: a, params)
    own = same["params"]["embedding"]
    same["params"]["embedding"] = jnp.broadcast_to(own[:1], own.shape)
    alike, seen = jnp.full(DIM, 0.7), context(needs_score=False)
    out = control(same, alike, T, seen).reshape(2, DIM)
    np.testing.assert_allclose(out, np.tile(out[:, :1], DIM), rtol=1e-5)
    out = control(params, alike, T, seen).reshape(2, DIM)
    assert np.all(np.ptp(out, axis=1) > 1e-3)


def test_width_and_depth():
    def shapes(width, depth):
        params = ds.networks.free(width, depth).init(jax.random.key(0), DIM, 0)
        return [leaf.shape for leaf in jax.tree.leaves(params)]

    assert (16, 16) in shapes(16, 2)
    assert len(shapes(16, 3)) == len(shapes(16, 2)) + 2  # a kernel and a bias


WITH_OCTAVES = {
    "free": (ds.networks.free, DIM),
    "score_guided": (ds.networks.score_guided, DIM),
    "annealed_score_guided": (ds.networks.annealed_score_guided, DIM),
    "reference_guided": (ds.networks.reference_guided, DIM),
    "coordinatewise": (ds.networks.coordinatewise, 1),
    "consistency": (ds.networks.consistency, DIM),
    "data_prediction": (
        functools.partial(ds.networks.data_prediction, ds.schedules.geometric(0.1)),
        DIM,
    ),
}


@pytest.mark.parametrize("name", WITH_OCTAVES)
def test_octaves_are_seen_beside_the_state(name):
    make, num_seen = WITH_OCTAVES[name]
    few, many = make(width=8, depth=1), make(width=8, depth=1, octaves=3)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(n.init(jax.random.key(0), DIM, 0)))
        for n in (few, many)
    ]
    assert sizes[1] - sizes[0] == 8 * 6 * num_seen
    params = perturbed(many.init(jax.random.key(0), DIM, 0), 0.3)
    seen = context(many.needs_score)._replace(step_size=jnp.array(0.5))
    out = many(params, X, T, seen)
    assert out.shape == (DIM,)
    assert np.all(np.isfinite(out))


def test_octaves_are_waves_of_doubled_frequency():
    x = jnp.array([0.3, -1.0])
    expected = [x, np.sin(x), np.cos(x), np.sin(2 * x), np.cos(2 * x)]
    found = ds.networks.with_octaves(x, 2)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6)


class Linear(nn.Module):
    """A user's own module."""

    @nn.compact
    def __call__(self, x, t, context):
        return t * nn.Dense(x.shape[-1])(x) + context.score


def test_any_linen_module():
    control = ds.networks.linen(Linear(), needs_score=True)
    assert control == ds.networks.linen(Linear(), needs_score=True)
    sampler = ds.samplers.pis(dim=2, num_steps=3, network=control)
    assert sampler.needs_score
    params = sampler.init(jax.random.key(0))
    assert params["generation"]["params"]["Dense_0"]["kernel"].shape == (2, 2)
    trajectory = sampler(params, jax.random.key(1), lambda x: jnp.sum(x**2))
    assert np.isfinite(trajectory.log_weight)


def test_any_function():
    def init(key, dim):
        return {"slope": jax.random.normal(key, (dim,))}

    def drift_fn(params, x, t, context):
        assert context.score.shape == (0,)
        assert context.condition is None
        return params["slope"] * x * t

    control = ds.networks.from_function(init, drift_fn)
    assert not control.needs_score
    assert control == ds.networks.from_function(init, drift_fn)
    sampler = ds.samplers.dds(dim=2, num_steps=3, network=control)
    params = sampler.init(jax.random.key(0))
    assert set(params) == {"generation"}
    trajectory = sampler(params, jax.random.key(1), lambda x: jnp.sum(x**2))
    assert np.isfinite(trajectory.log_weight)


def test_context_shows_the_score_in_unit_coordinates():
    """A control that returns the score moves the mean by gain * scale * score."""
    seen = ds.networks.from_function(
        lambda key, dim: (), lambda p, y, t, context: context.score, needs_score=True
    )
    sampler = ds.samplers.pis(2, 1, loc=(1.0, 2.0), scale=(2.0, 3.0), network=seen)
    trajectory = sampler({"generation": ()}, jax.random.key(0), lambda x: jnp.sum(x**2))
    free = ds.networks.from_function(lambda key, dim: (), lambda p, y, t, c: 0.0 * y)
    still = ds.samplers.pis(2, 1, loc=(1.0, 2.0), scale=(2.0, 3.0), network=free)
    plain = still({"generation": ()}, jax.random.key(0), lambda x: jnp.sum(x**2))
    score = -2.0 * np.array([1.0, 2.0])  # at loc
    np.testing.assert_allclose(
        trajectory.x - plain.x, np.array([2.0, 3.0]) ** 2 * score, rtol=1e-5
    )
