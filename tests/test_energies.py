"""The border between users' functions and compiled code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp.energies import as_energy, as_key, bind_condition, check_energy

Partial = jax.tree_util.Partial


def gaussian(x):
    return 0.5 * jnp.sum(x**2)


def test_typed_keys_pass_and_raw_keys_are_wrapped():
    typed = jax.random.key(3)
    assert as_key(typed) is typed
    raw = as_key(jax.random.PRNGKey(3))
    assert jnp.issubdtype(raw.dtype, jax.dtypes.prng_key)
    assert raw == typed
    assert as_key(np.asarray(jax.random.PRNGKey(3))) == typed


def test_other_generators_keep_their_implementation():
    key = jax.random.key(0, impl="rbg")
    assert as_key(key) is key


@pytest.mark.parametrize(
    "key", [0, None, "key", np.zeros(2), np.zeros(3, np.uint32), np.uint32(7)]
)
def test_anything_else_is_no_key(key):
    with pytest.raises(ValueError, match="key must be one"):
        as_key(key)


def test_several_keys_are_not_a_key():
    for keys in (jax.random.split(jax.random.key(0)), np.zeros((3, 2), np.uint32)):
        with pytest.raises(ValueError, match="vmap over several"):
            as_key(keys)


def test_keys_under_vmap_and_jit():
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    draw = jax.jit(jax.vmap(lambda key: jax.random.bits(as_key(key))))
    assert len(np.unique(draw(keys))) == 3


def test_an_energy_with_data_stays_as_it_is():
    energy = Partial(lambda scale, x: scale * gaussian(x), jnp.asarray(2.0))
    assert as_energy(energy) is energy


def test_two_wraps_of_one_function_share_compiled_code():
    traces = []

    @jax.jit
    def run(energy, x):
        traces.append(energy)
        return energy(x)

    for wrap in (as_energy, as_energy, Partial):
        assert run(wrap(gaussian), jnp.ones(2)) == 1.0
    assert len(traces) == 1
    closures = [functools.partial(lambda x, y: y, 0.0) for _ in range(2)]
    for closure in closures:  # as documented, a new closure compiles anew
        run(as_energy(closure), jnp.ones(()))
    assert len(traces) == 3


def test_a_bound_method_is_an_energy():
    target = ds.targets.gmm9()
    assert as_energy(target.energy)(jnp.ones(2)) == target.energy(jnp.ones(2))


@pytest.mark.parametrize("thing", [None, 3.0, "gmm9", ds.targets.gmm9()])
def test_what_cannot_be_called_is_named(thing):
    with pytest.raises(ValueError, match=r"energy must be a function .*target\.energy"):
        as_energy(thing)


def test_condition():
    def energy(x, condition):
        return jnp.sum((x - condition) ** 2)

    assert bind_condition(gaussian, None) is gaussian
    bound = bind_condition(energy, jnp.array([1.0, 2.0]))
    assert bound(jnp.array([1.0, 4.0])) == 4.0


def test_checking_evaluates_nothing():
    def energy(x):
        jax.debug.callback(lambda: pytest.fail("evaluated"))
        return gaussian(x)

    check_energy(energy, 3, jnp.float32)


def test_cause_of_a_failure_is_kept():
    def energy(x):
        raise RuntimeError("no such data set")

    with pytest.raises(ValueError, match="RuntimeError: no such data set") as caught:
        check_energy(energy, 2, jnp.float32)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("energy", "match"),
    [
        (lambda x: x, r"energy must return a scalar .* got \(3,\)"),
        (lambda x: jnp.sum(x)[None], r"energy must return a scalar .* got \(1,\)"),
        (lambda x: None, "energy must return a scalar"),
        (lambda x: jnp.sum(x).astype(int), "floating-point number, got int32"),
        (lambda x: jnp.sum(x).astype(complex), "floating-point number, got complex64"),
        (lambda x: jnp.sum(x, axis=1), r"shape \[3\].*dim=3"),
        (lambda x, y: jnp.sum(x), r"failed on one point of shape \[3\]"),
    ],
)
def test_bad_energies_are_explained(energy, match):
    with pytest.raises(ValueError, match=match):
        check_energy(energy, 3, jnp.float32)


def _outside(x):
    """An energy that JAX cannot trace, through a callback."""
    shape = jax.ShapeDtypeStruct((), x.dtype)

    def evaluate(x):
        return np.asarray(0.5 * np.sum(np.asarray(x) ** 2, axis=-1), x.dtype)

    return jax.pure_callback(evaluate, shape, x, vmap_method="expand_dims")


def test_an_energy_that_jax_cannot_trace():
    sampler = ds.samplers.dis(2, 4, network=ds.networks.free(width=8, depth=1))
    params, key = sampler.init(jax.random.key(0)), jax.random.key(1)
    with pytest.raises(ValueError, match=r"jax\.pure_callback.*jax\.custom_jvp.*free"):
        ds.draw(key, sampler, params, lambda x: float(np.sum(np.asarray(x) ** 2)), 8)
    drawn = ds.draw(key, sampler, params, _outside, 8)  # one way out
    same = ds.draw(key, sampler, params, gaussian, 8)
    np.testing.assert_allclose(drawn.log_weight, same.log_weight, rtol=1e-5)


def test_an_energy_of_one_point_only():
    def energy(x):
        shape = jax.ShapeDtypeStruct((), x.dtype)
        return jax.pure_callback(lambda x: np.sum(x, dtype=x.dtype), shape, x)

    assert energy(jnp.ones(2)) == 2
    with pytest.raises(ValueError, match=r"jax\.vmap.*a vmap_method"):
        check_energy(energy, 2, jnp.float32)


def test_an_energy_without_a_gradient():
    sampler = ds.samplers.dis(2, 4, network=ds.networks.score_guided(width=8, depth=1))
    params, key = sampler.init(jax.random.key(0)), jax.random.key(1)
    with pytest.raises(ValueError, match=r"no gradient.*custom_jvp.*networks\.free"):
        ds.draw(key, sampler, params, _outside, 8)

    @jax.custom_jvp
    def energy(x):
        return _outside(x)

    @energy.defjvp
    def _(primals, tangents):
        (x,), (direction,) = primals, tangents
        return energy(x), jnp.sum(x * direction)

    drawn = ds.draw(key, sampler, params, energy, 8)  # the other way out
    same = ds.draw(key, sampler, params, gaussian, 8)
    np.testing.assert_allclose(drawn.log_weight, same.log_weight, rtol=1e-5)


def test_good_energies_pass():
    check_energy(gaussian, 3, jnp.float32)
    check_energy(Partial(lambda a, x: a * jnp.sum(x), jnp.ones(())), 1, jnp.float32)
    check_energy(lambda x: 0.0, 2, jnp.float32)
    check_energy(lambda x: jnp.sum(x.astype(jnp.float16)), 2, jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"energy": 1.0, "dim": 2}, "energy must be callable"),
        ({"energy": gaussian, "dim": 0}, "dim must be at least 1, got 0"),
        ({"energy": gaussian, "dim": 2.5}, r"dim must be an integer, got 2\.5"),
    ],
)
def test_bad_targets_are_explained(arguments, match):
    with pytest.raises(ValueError, match=match):
        ds.Target(**arguments)
