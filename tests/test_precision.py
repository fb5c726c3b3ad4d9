"""Networks that multiply in bfloat16: what is rounded, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import LOG_Z, REFERENCE, SMALL, perturbed, skewed_energy

import diffsamp as ds
from diffsamp.networks import Context

EXACT = ds.networks.score_guided(**SMALL)
ROUNDED = ds.networks.reduced_precision(EXACT)


def test_products_are_rounded_and_nothing_else():
    params = perturbed(EXACT.init(jax.random.key(0), 2, 0), 0.3)
    x, t = jnp.array([0.3, -1.7]), jnp.array(0.4)
    seen = Context(jnp.array([1.0, -0.5]), jnp.array(0.5), None)
    exact, rounded = (jax.jit(n)(params, x, t, seen) for n in (EXACT, ROUNDED))
    assert rounded.dtype == jnp.float32
    assert np.all(exact != rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0.1, atol=0.02)
    slopes = [
        jax.jit(jax.grad(lambda p, n=n: jnp.sum(n(p, x, t, seen))))(params)
        for n in (EXACT, ROUNDED)
    ]
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(b, a, rtol=0.2, atol=0.05 * float(jnp.abs(a).max()))


def test_weights_are_those_of_the_rounded_network():
    """E[exp(log_weight)] = Z, and a path is scored as it was drawn."""
    sampler = ds.samplers.pis(**REFERENCE, network=ROUNDED)
    params = perturbed(sampler.init(jax.random.key(0)), 0.1)
    draws = ds.draw(jax.random.key(1), sampler, params, skewed_energy, 8_192)
    found = draws.log_evidence
    assert draws.log_weight.dtype == np.float32
    assert abs(found.estimate - LOG_Z) < 4 * found.standard_error < 0.3

    @jax.jit
    def both(params, key):
        trajectory = sampler(params, key, skewed_energy)
        return trajectory, sampler.score(params, trajectory.xs, skewed_energy)

    trajectory, again = both(params, jax.random.key(2))
    np.testing.assert_allclose(again.log_weight, trajectory.log_weight, atol=0.05)


def test_saved_and_loaded(tmp_path):
    sampler = ds.samplers.dis(
        2,
        4,
        network=ROUNDED,
        backbone=None,
        destruction_network=ds.networks.free(**SMALL),
    )
    params = sampler.init(jax.random.key(0))
    ds.save(tmp_path / "sampler", sampler, params)
    assert ds.load(tmp_path / "sampler")[0] == sampler


def test_a_shared_backbone():
    rounded = ds.networks.reduced_precision(ds.networks.backbone(**SMALL))
    sampler = ds.samplers.dis(**REFERENCE, backbone=rounded)
    params = perturbed(sampler.init(jax.random.key(0)), 0.3)
    exact = ds.samplers.dis(**REFERENCE, backbone=ds.networks.backbone(**SMALL))
    one, other = (
        s(params, jax.random.key(1), skewed_energy).log_weight for s in (sampler, exact)
    )
    assert one != other
    np.testing.assert_allclose(one, other, rtol=0.1)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("must be a Flax control", (ds.networks.from_function(None, None),)),
        ("BF16_BF16_F32 or TF32", (EXACT, jax.lax.DotAlgorithmPreset.F64_F64_F64)),
    ],
)
def test_bad_requests_are_named(words, arguments):
    with pytest.raises(ValueError, match=words):
        ds.networks.reduced_precision(*arguments)
