"""Location and scale of a reference: from draws, a prior, or a short NUTS run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

# BlackJAX mixes floats with step counts.
pytestmark = pytest.mark.relaxed("dtypes")

# Far from where the chains start, with scales that differ by a factor of 50.
TARGET = ds.targets.gaussian((30.0, -5.0, 0.5), (100.0, 1.0, 0.04))
LOC, SCALE = np.array([30.0, -5.0, 0.5]), np.array([10.0, 1.0, 0.2])


def test_reference_from_numbers():
    reference = ds.reference_from(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    assert reference.loc == (2.0, 2.0)
    np.testing.assert_allclose(reference.scale, [np.sqrt(8 / 3), np.sqrt(2)])
    assert all(isinstance(v, float) for v in (*reference.loc, *reference.scale))
    assert reference.num_gradient_evaluations == 0
    assert reference.arguments == {"loc": reference.loc, "scale": reference.scale}


def test_reference_makes_an_exact_sampler():
    """With the Gaussian target as reference, nothing is left to learn."""
    draws = TARGET.sample(jax.random.key(0), 100_000)
    reference = ds.reference_from(draws)
    arguments = reference.arguments | {
        "network": ds.networks.from_function(
            lambda key, dim: jnp.zeros(dim),
            lambda params, x, t, context: params + 0 * x,
        )
    }
    sampler = ds.samplers.dis(3, 4, **arguments)
    assert hash(sampler) == hash(ds.samplers.dis(3, 4, **arguments))
    params = sampler.init(jax.random.key(1))
    x = ds.draw(jax.random.key(2), sampler, params, TARGET.energy, num_draws=1_000)
    assert x.diagnostics.ess_fraction > 0.99


@pytest.mark.parametrize(
    ("words", "draws"),
    [
        (r"\[N, D\] with N > 1, got \[3\]", np.zeros(3)),
        (r"\[N, D\] with N > 1, got \[1, 3\]", np.zeros((1, 3))),
        (r"\[N, D\] with N > 1, got \[0, 3\]", np.zeros((0, 3))),
        ("finite", np.array([[0.0], [np.nan]])),
        ("finite", np.array([[0.0], [np.inf]])),
        (r"no spread in coordinates \[1\]", np.array([[0.0, 1.0], [2.0, 1.0]])),
    ],
)
def test_bad_draws(words, draws):
    with pytest.raises(ValueError, match=words):
        ds.reference_from(draws)


def test_prior_draws_are_free():
    target = ds.Target(
        energy=lambda x: 0.5 * jnp.sum(x**2),
        dim=2,
        sample_prior=lambda key, n: 3.0 * jax.random.normal(key, (n, 2)) + 1.0,
    )
    reference = ds.standardise(jax.random.key(0), target, ds.prior_draws(4_000))
    np.testing.assert_allclose(reference.loc, 1.0, atol=0.2)
    np.testing.assert_allclose(reference.scale, 3.0, rtol=0.1)
    assert reference.num_gradient_evaluations == 0


def test_prior_draws_without_a_prior():
    with pytest.raises(ValueError, match=r"no prior.*short_mcmc"):
        ds.standardise(jax.random.key(0), TARGET, ds.prior_draws())


def test_a_pilot_of_ones_own():
    def pilot(key, target):
        return target.sample(key, 5_000), 123

    reference = ds.standardise(jax.random.PRNGKey(0), TARGET, pilot)
    np.testing.assert_allclose(reference.scale, SCALE, rtol=0.1)
    assert reference.num_gradient_evaluations == 123


def test_short_mcmc_finds_a_shifted_target_of_unequal_scales():
    pilot = ds.short_mcmc(num_chains=16, num_warmup=100, num_draws=30)
    reference = ds.standardise(jax.random.key(0), TARGET, pilot)
    np.testing.assert_array_less(np.abs(np.array(reference.loc) - LOC), 0.5 * SCALE)
    np.testing.assert_allclose(reference.scale, SCALE, rtol=0.3)
    assert reference.num_gradient_evaluations > 16 * 130


def test_laplace_finds_the_same():
    reference = ds.standardise(jax.random.key(0), TARGET, ds.laplace(num_draws=4_000))
    np.testing.assert_array_less(np.abs(np.array(reference.loc) - LOC), 0.1 * SCALE)
    np.testing.assert_allclose(reference.scale, SCALE, rtol=0.05)
    assert 3 < reference.num_gradient_evaluations < 2_000


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("num_draws must be at least 2, got 1", lambda: ds.prior_draws(1)),
        ("num_starts must be at least 1, got 0", lambda: ds.laplace(0)),
        ("num_draws must be an integer, got 10.0", lambda: ds.laplace(num_draws=1e1)),
        ("num_chains must be at least 1, got 0", lambda: ds.short_mcmc(0)),
        ("num_warmup must be at least 0, got -1", lambda: ds.short_mcmc(8, -1)),
    ],
)
def test_numbers_that_are_none(words, make):
    with pytest.raises(ValueError, match=words):
        make()


def test_laplace_where_nothing_fits():
    flat = ds.Target(energy=lambda x: 0.5 * x[0] ** 2, dim=2)
    with pytest.raises(ValueError, match=r"eigenvalues from 0 to 1.*short_mcmc"):
        ds.standardise(jax.random.key(0), flat, ds.laplace())
    for words, energy in (
        ("must return a scalar", lambda x: x),
        ("finite energy and Hessian", lambda x: jnp.sum(x) * jnp.nan),
    ):
        with pytest.raises(ValueError, match=words):
            ds.standardise(
                jax.random.key(0), ds.Target(energy=energy, dim=2), ds.laplace()
            )
