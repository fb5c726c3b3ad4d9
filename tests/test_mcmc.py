"""BlackJAX wrappers: SMC finds weights and log Z, nothing turns NaN, costs are true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from jax.tree_util import Partial
from tables import MEANS, STDS, WEIGHTS, counting_energy, sample_skewed
from tables import skewed_energy as mixture_energy

import diffsamp as ds
from diffsamp.mcmc import (
    SMCResult,
    multistart,
    num_distinct,
    run_chains,
    run_hmc,
    smc_from_gaussian,
    smc_from_prior,
    tempered_smc,
)

LOG_Z = 1.3
WEIGHT = 0.3  # of the narrow mode on the left


def skewed_energy(x):
    """Two modes of different weight and width, badly scaled coordinates, [2] -> []."""
    scale = jnp.array([1.0, 30.0])
    left = jnp.sum(norm.logpdf(x, jnp.array([-4.0, 0.0]), 0.5 * scale))
    right = jnp.sum(norm.logpdf(x, jnp.array([3.0, 60.0]), 1.0 * scale))
    mixture = jnp.logaddexp(jnp.log(WEIGHT) + left, jnp.log(1 - WEIGHT) + right)
    return -mixture - LOG_Z


def gaussian_energy(mean, x):
    return 0.5 * jnp.sum((x - mean) ** 2)


def reference_energy(x):
    return -jnp.sum(norm.logpdf(x))


@pytest.fixture(scope="module")
def skewed():
    """Five runs at once: SMC is pure, so it can be mapped."""

    @jax.jit
    def run(keys):
        scale = jnp.array([5.0, 100.0])
        return jax.lax.map(
            lambda k: smc_from_gaussian(
                k, skewed_energy, 2, scale=scale, num_particles=1000
            ),
            keys,
        )

    return run(jax.random.split(jax.random.key(0), 5))


def test_smc_log_z_and_mode_weights(skewed):
    assert skewed.reached_target.all()
    assert (skewed.beta == 1.0).all()
    assert abs(float(skewed.log_z.mean()) - LOG_Z) < 0.1
    assert float(skewed.log_z.std()) < 0.2
    np.testing.assert_array_equal(
        skewed.log_weight, skewed.log_z[:, None].repeat(1000, 1)
    )
    x = np.array(skewed.particles)
    left = x[..., 0] < -1.0
    assert abs(left.mean() - WEIGHT) < 0.05
    np.testing.assert_allclose(x[left].std(0), [0.5, 15.0], rtol=0.1)
    np.testing.assert_allclose(x[~left].mean(0), [3.0, 60.0], rtol=0.1)
    assert (skewed.acceptance > 0.6).all()
    # HMC moves the copies apart again
    assert len(np.unique(x[0, :, 0])) > 950


@pytest.mark.slow
def test_smc_in_a_branch_of_compiled_code_without_recompilation():
    num_traces = 0

    @jax.jit
    def maybe(flag, key, energy):
        nonlocal num_traces
        num_traces += 1

        def run():
            return smc_from_gaussian(key, energy, 2, num_particles=64).particles

        return jax.lax.cond(flag, run, lambda: jnp.zeros((64, 2)))

    key = jax.random.key(0)
    near = maybe(True, key, Partial(gaussian_energy, jnp.array([0.0, 0.0])))
    far = maybe(True, key, Partial(gaussian_energy, jnp.array([6.0, 6.0])))
    none = maybe(False, key, Partial(gaussian_energy, jnp.array([6.0, 6.0])))
    assert num_traces == 1
    assert jnp.abs(near.mean()) < 0.5
    assert jnp.abs(far.mean() - 6.0) < 0.5
    assert (none == 0).all()


def half_line_energy(x):
    """A Gaussian on x_0 > 0; NaN with NaN gradient elsewhere."""
    return reference_energy(x) + 0.0 * jnp.sqrt(x[0])


def test_energies_that_are_not_finite_have_no_density():
    noise = jax.random.normal(jax.random.key(3), (1024, 2))
    bad = noise.at[:900].set(jnp.nan).at[900].set(jnp.inf)
    for particles in (noise, bad):
        result = tempered_smc(
            jax.random.key(2), half_line_energy, particles, reference_energy
        )
        assert result.reached_target
        assert jnp.isfinite(result.particles).all()
        assert (result.particles[:, 0] > 0).all()
        log_share = np.log((particles[:, 0] > 0).mean())
        np.testing.assert_allclose(result.log_z, log_share, rtol=0.02)


def test_a_target_that_is_not_reached_is_reported():
    nowhere = Partial(gaussian_energy, jnp.array([jnp.nan, 0.0]))
    result = smc_from_gaussian(
        jax.random.key(1), nowhere, 2, num_particles=16, max_iterations=1
    )
    assert not result.reached_target
    assert result.log_z == -jnp.inf
    assert jnp.isfinite(result.particles).all()

    result = smc_from_gaussian(
        jax.random.key(1),
        Partial(gaussian_energy, jnp.array([9.0, 9.0])),
        2,
        num_particles=16,
        max_iterations=1,
    )
    assert not result.reached_target
    assert result.beta < 1.0


@pytest.mark.slow
def test_a_target_too_far_is_not_reached_by_one_particle_of_luck():
    """Energy differences of 1e8 leave float32 no digits for the conditional ESS."""

    def narrow(x):
        return 5e3 * jnp.sum((x - 100.0) ** 2)

    result = smc_from_gaussian(
        jax.random.key(0), narrow, 2, num_particles=64, max_iterations=3
    )
    assert not result.reached_target
    assert float(result.beta) < 0.01
    assert len(np.unique(result.particles[:, 0])) > 32


def test_copies_are_told_from_particles_in_many_dimensions():
    x = np.random.default_rng(0).normal(size=(7, 2_000)).astype(np.float32)
    x[[3, 5]] = x[0]
    x[6] = np.where(np.arange(2_000) < 1_999, x[1], 9.0)
    others = [jnp.zeros(())] * (len(SMCResult._fields) - 1)
    assert int(num_distinct(SMCResult(jnp.asarray(x), *others))) == 5


def test_smc_from_prior_tempers_the_likelihood_only():
    def log_likelihood(x):
        return norm.logpdf(2.0, x[0], 0.5)

    def energy(x):
        return reference_energy(x) - log_likelihood(x)

    target = ds.Target(
        energy=energy,
        dim=2,
        log_prior=lambda x: -reference_energy(x),
        log_likelihood=log_likelihood,
        sample_prior=lambda key, n: jax.random.normal(key, (n, 2)),
    )
    raw = smc_from_prior(jax.random.PRNGKey(3), target, 512)
    result = smc_from_prior(jax.random.key(3), target, 512)
    np.testing.assert_array_equal(raw.particles, result.particles)
    assert abs(float(result.log_z) - norm.logpdf(2.0, 0.0, 1.25**0.5)) < 0.15
    np.testing.assert_allclose(result.particles.mean(0), [1.6, 0.0], atol=0.2)
    np.testing.assert_allclose(result.particles.std(0), [0.2**0.5, 1.0], rtol=0.15)

    with pytest.raises(ValueError, match="got None for log_prior"):
        smc_from_prior(jax.random.key(0), ds.Target(energy=energy, dim=2))


def test_evaluations_are_counted():
    count = 0

    def add(_):
        nonlocal count
        count += 1

    def energy(x):
        jax.debug.callback(add, x)
        return gaussian_energy(2.0, x)

    result = smc_from_gaussian(
        jax.random.key(0),
        energy,
        2,
        num_particles=8,
        num_mcmc_steps=2,
        num_integration_steps=3,
    )
    jax.block_until_ready(result)
    jax.effects_barrier()
    counted = result.num_energy_evaluations + result.num_gradient_evaluations
    assert count == counted


def test_hmc_recovers_a_skewed_density():
    def energy(x):  # the log of a Gamma(3, 1) variable, and one badly scaled
        return jnp.exp(x[0]) - 3.0 * x[0] + 0.5 * (x[1] / 50.0) ** 2

    starts = jax.random.normal(jax.random.key(1), (8, 2))
    draws, info = run_hmc(
        jax.random.PRNGKey(0), energy, starts, num_warmup=300, num_draws=250
    )
    assert draws.shape == (8, 250, 2)
    gamma = np.exp(draws[..., 0])
    assert abs(gamma.mean() - 3.0) < 0.25  # 0.25 is 4 standard errors at ESS 750
    assert abs(gamma.var() - 3.0) < 0.9
    np.testing.assert_allclose(draws[..., 1].std(), 50.0, rtol=0.15)
    assert info.acceptance.shape == info.step_size.shape == (8,)
    assert (info.acceptance > 0.6).all()
    assert info.num_gradient_evaluations > 8 * 550
    assert info.num_divergences.sum() < 20


def _mixture_moments():
    mean = WEIGHTS @ MEANS
    second = WEIGHTS @ (STDS**2 + MEANS**2)
    return mean, np.sqrt(second - mean**2)


@pytest.mark.parametrize(
    "num_integration_steps", [1, pytest.param(3, marks=pytest.mark.slow)]
)
def test_chains_leave_the_target_as_it_is(num_integration_steps):
    """Exact draws of an asymmetric target stay so, and rates meet their target."""
    starts = sample_skewed(jax.random.key(0), 2_000)
    chains = run_chains(
        jax.random.key(1),
        mixture_energy,
        starts,
        scale=jnp.array([1.8, 1.5]),
        step_size=0.05,
        num_steps=40,
        num_burn_in=30,
        num_integration_steps=num_integration_steps,
    )
    x = np.asarray(chains.positions[-1])
    mean, std = _mixture_moments()
    error = std / np.sqrt(len(x))
    assert np.all(np.abs(x.mean(0) - mean) < 4 * error)
    assert np.all(np.abs(x.std(0) / std - 1) < 4 / np.sqrt(len(x)))
    left = np.mean(x[:, 0] < 0.0), np.mean(np.asarray(starts)[:, 0] < 0.0)
    assert abs(left[0] - left[1]) < 0.06
    target = 0.574 if num_integration_steps == 1 else 0.651
    assert float(chains.acceptance) == pytest.approx(target, abs=0.03)
    assert float(chains.step_size) > 0.3
    energies = jax.vmap(jax.vmap(mixture_energy))(chains.positions)
    np.testing.assert_allclose(chains.energy, energies, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_units_of_chains_do_not_matter_and_keys_do():
    centre, unit = jnp.array([3.0, -500.0]), jnp.array([1e-2, 1e3])

    def scaled(x):
        return mixture_energy((x - centre) / unit)

    starts = sample_skewed(jax.random.key(0), 8)
    options = {"num_steps": 6, "num_burn_in": 3}
    plain = run_chains(jax.random.PRNGKey(1), mixture_energy, starts, **options)
    typed = run_chains(jax.random.key(1), mixture_energy, starts, **options)
    jax.tree.map(np.testing.assert_array_equal, plain, typed)
    starts = centre[None] + unit[None] * starts
    wide = run_chains(jax.random.key(1), scaled, starts, scale=unit, **options)
    np.testing.assert_allclose(wide.step_size, plain.step_size, rtol=1e-3)
    np.testing.assert_array_equal(wide.moved, plain.moved)
    again = (wide.positions - centre[None, None]) / unit[None, None]
    np.testing.assert_allclose(again, plain.positions, atol=1e-2)


def test_gradients_of_chains_are_counted_and_dead_chains_stay():
    energy, take = counting_energy(half_line_energy)
    starts = jnp.array([[1.0, 0.0], [-1.0, 0.0], [jnp.nan, 0.0], [0.5, 2.0]])
    options = {"num_steps": 12, "num_burn_in": 4, "num_integration_steps": 2}
    chains = run_chains(jax.random.key(0), energy, starts, **options)
    jax.block_until_ready(chains)
    made = int(chains.num_gradient_evaluations)
    assert take() == {"energy": 0, "gradient": made}
    assert made == 4 * (12 * 2 + 1)
    assert int(chains.num_running) == 2
    assert chains.positions.shape == (8, 4, 2)
    moved = np.asarray(chains.moved)
    assert moved[:, [0, 3]].any()
    assert not moved[:, [1, 2]].any()
    np.testing.assert_array_equal(chains.positions[-1, 1], starts[1])
    assert float(chains.acceptance) == pytest.approx(moved[:, [0, 3]].mean())
    assert np.all(np.asarray(chains.positions[:, [0, 3], 0]) > 0)
    # None runs: nothing is learned of the step size.
    dead = run_chains(jax.random.key(0), energy, -jnp.abs(starts), **options)
    assert float(dead.step_size) == pytest.approx(0.5)
    assert float(dead.acceptance) == int(dead.num_running) == 0
    assert not np.any(dead.moved)


def test_multistart_finds_both_modes():
    starts = jnp.array([[-8.0, -50.0], [-2.5, 10.0], [6.0, 20.0], [9.0, 90.0]])
    optimum = Partial(gaussian_energy, jnp.array([1.0, 2.0]))
    optima = multistart(jax.random.key(0), optimum, starts, num_hmc_steps=0)
    np.testing.assert_allclose(
        optima, jnp.tile(jnp.array([[1.0, 2.0]]), (4, 1)), atol=0.1
    )
    points = multistart(jax.random.key(0), skewed_energy, starts)
    assert points.shape == starts.shape
    assert (points[:2, 0] < 0).all()
    assert (points[2:, 0] > 0).all()
    assert len(np.unique(points[:, 0])) == 4


def test_wrong_arguments_are_explained(key):
    x = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match=r"initial_particles .* got shape \(2,\)"):
        tempered_smc(key, reference_energy, x[0], reference_energy)
    with pytest.raises(ValueError, match=r"initial_positions .* dtype int32"):
        run_hmc(key, reference_energy, jnp.zeros((4, 2), int))
    with pytest.raises(ValueError, match="num_mcmc_steps must be at least 1, got 0"):
        tempered_smc(key, reference_energy, x, reference_energy, num_mcmc_steps=0)
    with pytest.raises(ValueError, match="target_ess must be between 0 and 1"):
        tempered_smc(key, reference_energy, x, reference_energy, target_ess=1.5)
    with pytest.raises(ValueError, match=r"num_burn_in .* got num_burn_in=9 and"):
        run_chains(key, reference_energy, x, num_steps=9, num_burn_in=9)
    with pytest.raises(ValueError, match="num_integration_steps must be at least 1"):
        run_chains(key, reference_energy, x, num_integration_steps=0)
    with pytest.raises(ValueError, match="num_draws"):
        run_hmc(key, reference_energy, x, num_draws=0)
    with pytest.raises(ValueError, match="scalar"):
        multistart(key, lambda x: x, x)
