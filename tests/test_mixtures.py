"""Mixtures: the fit, and samplers that start from one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.scipy.special import logsumexp
from jax.scipy.stats import multivariate_normal

import diffsamp as ds
from diffsamp.mixtures import Mixture, fit_mixture, log_density, with_mixture

SHARES = np.array([0.7, 0.1, 0.2])
MEANS = np.array([[-3.0, 1.0], [2.0, 4.0], [2.0, -2.0]])
COVARIANCES = np.array(
    [[[1.0, 0.8], [0.8, 1.0]], [[0.05, 0.0], [0.0, 0.4]], [[0.3, -0.1], [-0.1, 0.1]]]
)
THREE = Mixture(np.log(SHARES), MEANS, COVARIANCES)


def _draws(num_draws, seed=0):
    rng = np.random.default_rng(seed)
    index = rng.choice(3, size=num_draws, p=SHARES)
    noise = rng.normal(size=(num_draws, 2))
    roots = np.linalg.cholesky(COVARIANCES)[index]
    return MEANS[index] + np.einsum("nij,nj->ni", roots, noise)


def _energy(x):
    logs = jax.vmap(multivariate_normal.logpdf, in_axes=(None, 0, 0))(
        x, jnp.asarray(MEANS), jnp.asarray(COVARIANCES)
    )
    return -logsumexp(logs + np.log(SHARES)) - 1.5  # so that log Z is 1.5


# ------------------------------------------------------------------------------ the fit


def test_log_density():
    x = _draws(5)
    parts = [
        share * scipy.stats.multivariate_normal(mean, covariance).pdf(x)
        for share, mean, covariance in zip(SHARES, MEANS, COVARIANCES, strict=True)
    ]
    np.testing.assert_allclose(log_density(THREE, x), np.log(np.sum(parts, axis=0)))


def test_a_mixture_is_found():
    x, new = _draws(4_000), _draws(4_000, seed=1)
    mixture, gain = fit_mixture(x)
    assert len(mixture.means) == 4
    assert np.mean(log_density(THREE, new) - log_density(mixture, new)) < 0.02
    normal = scipy.stats.multivariate_normal(x.mean(axis=0), np.cov(x.T))
    better = np.mean(log_density(mixture, new) - normal.logpdf(new))
    assert gain == pytest.approx(better, abs=0.1)
    assert np.sum(np.exp(mixture.log_weights)) == pytest.approx(1.0)


def test_normal_points_have_one_component():
    x = np.random.default_rng(0).normal(size=(2_000, 3)) * [1.0, 10.0, 0.1] + 5.0
    mixture, gain = fit_mixture(x)
    assert gain == 0
    np.testing.assert_allclose(mixture.means[0], x.mean(axis=0))
    np.testing.assert_allclose(mixture.covariances[0], np.cov(x.T, ddof=0), rtol=1e-6)


def test_copies_of_points_are_no_modes():
    """Each of 50 points 40 times in a row, as resampling leaves them."""
    few = np.random.default_rng(0).normal(size=(50, 2))
    assert fit_mixture(np.repeat(few, 40, axis=0))[1] < 0.5


def test_points_of_no_spread_and_points_that_are_few():
    for x in (np.ones((100, 2)), _draws(2), _draws(3)):
        mixture, _ = fit_mixture(x)
        assert np.all(np.isfinite(mixture.covariances))
        assert len(mixture.means) == 1


@pytest.mark.parametrize(
    "points", [np.ones((1, 2)), np.ones(5), np.array([[0.0], [np.nan]])]
)
def test_points_that_are_refused(points):
    with pytest.raises(ValueError, match="points must be finite"):
        fit_mixture(points)


# ------------------------------------------------------------------------- the sampler


def _sampler(num_steps=4, **options):
    return ds.samplers.gmp(
        2, 3, num_steps, loc=(0.5, -1.0), scale=(4.0, 3.0), **options
    )


def _unit(sampler):
    """The mixture in its unit coordinates."""
    scale = np.asarray(sampler.scale)
    return Mixture(
        THREE.log_weights,
        (MEANS - np.asarray(sampler.loc)) / scale,
        COVARIANCES / np.outer(scale, scale),
    )


def _made(num_steps=4, **options):
    sampler = _sampler(num_steps, **options)
    params = sampler.init(jax.random.key(0))
    return sampler, with_mixture(params, _unit(sampler))


def test_prior_is_the_noised_mixture(x64):
    sampler, params = _made()
    keys, noise = jax.random.split(jax.random.key(1), 50_000), 0.1**2
    unit = _unit(sampler)
    y = jax.vmap(lambda k: sampler.prior.sample(params["prior"], k))(keys)
    noised = Mixture(
        unit.log_weights,
        np.sqrt(1 - noise) * unit.means,
        (1 - noise) * unit.covariances + noise * np.eye(2),
    )
    found = jax.vmap(lambda v: sampler.prior.log_density(params["prior"], v))(y[:9])
    np.testing.assert_allclose(found, log_density(noised, y[:9]))
    volume = np.log(4.0 * 3.0)
    np.testing.assert_allclose(
        sampler.log_prior(params, y[0]), log_density(noised, y[:1])[0] - volume
    )
    mean = np.exp(noised.log_weights) @ noised.means
    np.testing.assert_allclose(np.mean(y, axis=0), mean, atol=0.02)
    inner = np.einsum("m,mij->ij", SHARES, noised.covariances)
    between = np.cov(noised.means.T, aweights=SHARES, ddof=0)
    np.testing.assert_allclose(np.cov(y.T), inner + between, rtol=0.05, atol=0.01)


def test_kernel_is_the_denoiser_of_the_mixture(x64):
    """Mean and variances of the later state given the earlier, by quadrature."""
    schedule = ds.schedules.geometric(0.1, largest_scale=0.8)
    sampler = ds.samplers.gmp(
        1, 2, 3, schedule=schedule, generation_bounds=ds.Bounds(log_variance=1e3)
    )
    shares, means = np.array([0.3, 0.7]), np.array([[-0.8], [0.5]])
    stds = np.array([0.2, 0.05])
    mixture = Mixture(np.log(shares), means, stds[:, None, None] ** 2)
    params = with_mixture(sampler.init(jax.random.key(0)), mixture)
    grid = np.linspace(-4.0, 4.0, 40_001)
    start = np.array([-0.6, -0.1, 0.05, 0.9])
    xs = np.stack([start, np.zeros(4), np.zeros(4), np.zeros(4)], axis=1)[..., None]

    def log_kernel(x_now, x_next, k):
        path = jnp.zeros((4, 1)).at[k].set(x_now).at[k + 1].set(x_next)
        return sampler.score(params, path, lambda x: 0.0 * jnp.sum(x)).log_generation[k]

    signals = schedule.signal(np.linspace(0.0, 1.0, 4))
    for k in range(3):
        now, later = signals[k], signals[k + 1]
        std = np.sqrt(later * stds**2 + 1 - later)
        density = scipy.stats.norm(np.sqrt(later) * means[:, 0], std).pdf(grid[:, None])
        for x_now in xs[:, 0, 0]:
            keep = now / later
            noise = scipy.stats.norm(np.sqrt(keep) * grid, np.sqrt(1 - keep)).pdf(x_now)
            weights = noise * (density @ shares)
            weights /= weights.sum()
            mean = weights @ grid
            variance = weights @ (grid - mean) ** 2
            points = mean + jnp.linspace(-1.0, 1.0, 3) * np.sqrt(variance)
            found = jax.vmap(lambda v, x=x_now, k=k: log_kernel(x, v, k))(points)
            expected = scipy.stats.norm(mean, np.sqrt(variance)).logpdf(points)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_untrained_sampler_of_its_own_mixture():
    """Finer steps lose less; log Z is right in both."""
    ess = []
    for num_steps in (2, 16):
        sampler, params = _made(num_steps)
        draws = ds.draw(jax.random.key(2), sampler, params, _energy, 10_000)
        evidence = draws.log_evidence
        error = abs(evidence.estimate - 1.5)
        assert error < 4 * evidence.standard_error + 1e-3
        ess.append(draws.diagnostics.ess_fraction)
    assert ess[1] > 0.97 > ess[0]
    share = np.mean(draws.x[:, 0] > 0)
    assert share == pytest.approx(0.3, abs=0.02)


@pytest.mark.relaxed("dtypes")
def test_mixture_stays_in_training_and_the_rest_does_not():
    sampler, params = _made(network=ds.networks.mixture_guided(3, _NOISE, 8, 1))
    fit = ds.fit(
        jax.random.key(0),
        sampler,
        ds.objectives.reverse_kl(),
        lambda x: _energy(x) + 0.1 * x[0],
        params=params,
        num_updates=5,
        batch_size=8,
        progress_bar=False,
    )
    inner = [p["generation"]["params"] for p in (params, fit.params)]
    for before, after in [
        (params["prior"], fit.params["prior"]),
        (inner[0]["mixture"], inner[1]["mixture"]),
    ]:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), before, after
        )
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), *inner)
    assert any(jax.tree.leaves(moved["FourierMLP_0"]))


_NOISE = ds.schedules.geometric(0.01, largest_scale=0.1)


def test_what_training_moves():
    """A mask for optimisers with weight decay."""
    _, params = _made(learn_destruction=True)
    moves = ds.mixtures.trainable({"sampler": params, "objective": {"log_z": 0.0}})
    inner = moves["sampler"]["generation"]["params"]
    assert not any(jax.tree.leaves((moves["sampler"]["prior"], inner["mixture"])))
    assert all(jax.tree.leaves((inner["FourierMLP_0"], moves["objective"])))
    assert all(jax.tree.leaves(moves["sampler"]["destruction"]))


def test_a_network_that_knows_no_mixture():
    sampler = _sampler(network=ds.networks.free(8, 1))
    params = with_mixture(sampler.init(jax.random.key(0)), _unit(sampler))
    np.testing.assert_allclose(
        params["prior"]["means"], _unit(sampler).means, rtol=1e-6
    )


def test_mixtures_that_do_not_fit():
    _, params = _made()
    two = Mixture(*(np.asarray(field)[:2] for field in THREE))
    for wrong in (
        two,
        THREE._replace(covariances=COVARIANCES[:, 0]),
        THREE._replace(means=np.full((3, 2), np.nan)),
    ):
        with pytest.raises(ValueError, match=r"mixture must be finite.*\(3, 2, 2\)"):
            with_mixture(params, wrong)
    plain = ds.samplers.dis(2, 4)
    with pytest.raises(ValueError, match=r"starts from a mixture .*\['generation'\]"):
        with_mixture(plain.init(jax.random.key(0)), THREE)


def test_samplers_that_cannot_have_a_prior():
    sampler = _sampler()
    with pytest.raises(ValueError, match="prior must be None"):
        ds.Sampler(
            2,
            4,
            ds.processes.PinnedBrownian(),
            sampler.generation,
            prior=sampler.prior,
        )
    with pytest.raises(ValueError, match="does not start where the probability flow"):
        ds.probability_flow(sampler)
    with pytest.raises(ValueError, match="num_components"):
        ds.samplers.gmp(2, 0)
    for network in (
        ds.networks.mixture_guided(2, _NOISE),
        ds.networks.mixture_guided(3, ds.schedules.geometric(0.2)),
    ):
        with pytest.raises(ValueError, match="network must be for the sampler's"):
            _sampler(network=network)
    with pytest.raises(ValueError, match="largest_scale must be above"):
        ds.schedules.geometric(0.2, largest_scale=0.1)
