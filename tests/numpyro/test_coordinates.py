"""Maps to coordinates in which a posterior is about a unit normal."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC

import diffsamp as ds
from diffsamp.mixtures import log_density
from diffsamp.numpyro import (
    Affine,
    Bent,
    Chain,
    DiffusionSampler,
    affine_from,
    affine_from_curvature,
    bent,
    bent_from,
    decentred_from,
    fitted_coordinates,
    target_from_model,
)
from diffsamp.numpyro.coordinates import in_coordinates, to_x, to_y
from diffsamp.numpyro.decentred import Decentred
from diffsamp.numpyro.fitted import fitted, is_decentred

relaxed = pytest.mark.relaxed("dtypes", "ranks")


def model(y):
    """Two levels of centred sites, one of them a logarithm, and data."""
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    mu = numpyro.sample("mu", dist.Normal(1.0, 2.0))
    theta = numpyro.sample("a", dist.StudentT(5.0, mu, tau), sample_shape=(2,))
    with numpyro.plate("groups", 2):
        numpyro.sample("b", dist.LogNormal(theta / 10, 0.3))
    numpyro.sample("c", dist.Laplace(mu, 1.0).expand([1]).to_event(1))
    numpyro.sample("free", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(theta, 30.0), obs=y)


Y = jnp.array([-1.0, 4.0])
SITES = {"a": (0, 1), "b": (2, 3), "c": (4,), "free": (5,), "mu": (6,), "tau": (7,)}


@functools.cache
def posterior():
    return target_from_model(model, (Y,))


def by_hand():
    """Of two dimensions, bent to both sides."""
    return Bent(
        shift=jnp.array([0.1, 0.0]),
        stretch=jnp.array([0.8, 1.0]),
        skew=jnp.array([-0.4, 0.3]),
        tail=jnp.array([1.3, 2.0]),
    )


def a_map(name):
    affine = Affine(jnp.array([1.0, -9.0]), jnp.array([[1.2, 0.0], [0.4, 0.8]]))
    if name == "decentred":
        target = posterior()
        chosen = {site: jnp.array(True) for site in ("a", "b", "c")}
        return Decentred(target._program, target.energy.args[1], chosen)
    return {"affine": affine, "bent": by_hand(), "chain": Chain(affine, by_hand())}[
        name
    ]


every_map = pytest.mark.parametrize("name", ["affine", "bent", "chain", "decentred"])


def _dim(name):
    return 8 if name == "decentred" else 2


@relaxed
@every_map
def test_the_inverse_and_the_log_determinant(name, x64):
    coordinates = a_map(name)
    for y in np.random.default_rng(1).normal(size=(5, _dim(name))) * 2:
        y = jnp.asarray(y)
        x, log_det = coordinates.forward_and_log_det(y)
        np.testing.assert_allclose(coordinates.forward(y), x, rtol=1e-12)
        np.testing.assert_allclose(coordinates.inverse(x), y, atol=1e-6)
        jacobian = np.asarray(jax.jacobian(coordinates.forward)(y))
        expected = np.linalg.slogdet(jacobian)[1]
        assert float(log_det) == pytest.approx(expected, abs=1e-6)
        assert name == "affine" or float(log_det) != 0


@relaxed
@every_map
def test_32_bits(name):
    coordinates = a_map(name)
    y = np.random.default_rng(1).normal(size=(50, _dim(name)))
    y = jnp.asarray(y, jnp.float32)
    back = to_y(coordinates, to_x(coordinates, y))
    assert back.dtype == jnp.float32
    np.testing.assert_allclose(back, y, atol=5e-3)


@relaxed
@pytest.mark.parametrize("name", ["affine", "bent", "chain"])
def test_the_integral_is_the_same(name, x64):
    """Of a density that is neither Gaussian nor a funnel, on a grid."""
    coordinates = a_map(name)
    centre = coordinates.forward(jnp.array([0.3, -0.2]))

    def energy(x):
        return jnp.sum((x - centre) ** 4 / jnp.array([1.0, 9.0]))

    grid = np.linspace(-20, 20, 1_001)
    points = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    area = (grid[1] - grid[0]) ** 2
    in_y = in_coordinates(energy, coordinates)
    totals = [
        np.sum(np.exp(-np.asarray(jax.vmap(e)(at)))) * area
        for e, at in ((energy, points + np.asarray(centre)), (in_y, points))
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-8)


# ------------------------------------------------------------------------------ affine


def test_correlations_are_gone():
    linear = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 3.0, 0.1]])
    draws = np.random.default_rng(0).normal(size=(5_000, 3)) @ linear + 7.0
    y = np.asarray(to_y(affine_from(draws), jnp.asarray(draws, jnp.float32)))
    np.testing.assert_allclose(y.mean(axis=0), 0.0, atol=0.02)
    np.testing.assert_allclose(np.cov(y.T), np.eye(3), atol=0.02)


def test_curvature_tells_correlations_by_few_draws():
    """Also of a density that is not normal: wider than one, and never narrower."""
    linear = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 3.0, 0.1]])
    precision = jnp.asarray(np.linalg.inv(linear.T @ linear), jnp.float32)
    draws = np.random.default_rng(0).normal(size=(2, 3)) @ linear + 7.0

    def normal(x):
        return 0.5 * (x - 7.0) @ precision @ (x - 7.0)

    few = affine_from_curvature(draws, normal, num_points=2)
    np.testing.assert_allclose(few.loc, draws.mean(axis=0), rtol=1e-5)
    found = np.asarray(few.matrix, np.float64)
    np.testing.assert_allclose(found @ found.T, linear.T @ linear, rtol=2e-3, atol=2e-3)
    assert np.all(np.diag(found) > 0)
    assert np.all(np.triu(found, 1) == 0)

    skew = log_gamma(num=2_000)

    def log_gamma_energy(x):
        return jnp.sum(jnp.exp(2 * x - 2) - 0.5 * (2 * x - 2))

    wide = affine_from_curvature(skew, log_gamma_energy, num_points=2_000)
    y = to_y(wide, jnp.asarray(skew, jnp.float32))
    np.testing.assert_allclose(np.std(y), np.pi / 2, rtol=0.1)


def test_draws_whose_curvature_fits_no_map():
    draws = np.array([[0.0, 1.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match=r"has a smallest eigenvalue of -1, so no"):
        affine_from_curvature(draws, lambda x: -0.5 * x @ x, num_points=2)
    with pytest.raises(ValueError, match=r"eigenvalue of -inf, so no normal"):
        affine_from_curvature(draws, lambda x: jnp.nan * x @ x, num_points=2)
    with pytest.raises(ValueError, match=r"at most the 2 draws, got 16"):
        affine_from_curvature(draws, lambda x: x @ x)
    with pytest.raises(ValueError, match=r"no spread in coordinates \[0\]"):
        affine_from_curvature(draws * [0, 1], lambda x: x @ x)


@pytest.mark.parametrize("fit", [affine_from, bent_from])
@pytest.mark.parametrize(
    ("draws", "words"),
    [
        ([[0.0, 1.0], [1.0, 1.0]], r"no spread in coordinates \[1\]"),
        ([[0.0, np.nan], [1.0, 1.0]], "at least two finite points"),
    ],
)
def test_draws_that_fit_no_map(fit, draws, words):
    with pytest.raises(ValueError, match=words):
        fit(np.array(draws))


# -------------------------------------------------------------------------------- bent


def log_gamma(seed=0, num=4_000):
    """The logarithm of a parameter whose density is a power near zero."""
    draws = np.log(np.random.default_rng(seed).gamma(0.5, size=(num, 1)))
    return (draws + 2) / 2  # about of unit scale


def test_skewness_and_heavy_tails_are_gone():
    fitted, other = bent_from(log_gamma()), log_gamma(1)
    assert scipy.stats.kurtosis(other[:, 0]) > 3
    y = np.asarray(to_y(fitted, jnp.asarray(other)))[:, 0]
    assert abs(scipy.stats.kurtosis(y)) < 0.6
    assert abs(scipy.stats.skew(y)) < 0.3
    far = jnp.array([-14.0])  # a share of exp(-15) lies below, of a normal below -5
    assert -8 < float(fitted.inverse(far)[0]) < -5


def test_what_is_left_alone():
    """A normal, light tails, and what half of the points do not show."""
    rng = np.random.default_rng(0)
    halves = np.concatenate([rng.standard_t(2, size=1_000), rng.uniform(-2, 2, 1_000)])
    draws = np.stack([rng.normal(size=2_000), rng.uniform(size=2_000), halves], axis=1)
    np.testing.assert_array_equal(bent_from(draws).tail, 1.0)


def test_gradient_of_the_fit():
    u = np.random.default_rng(0).gumbel(size=500)
    for numbers in ([0.1, 0.8, 0.3, 1.4], [0.0, 1.0, 0.0, 1.0]):
        found = bent._nats(np.array(numbers), u)[1]
        expected = scipy.optimize.approx_fprime(
            np.array(numbers), lambda n: bent._nats(n, u)[0], 1e-6
        )
        np.testing.assert_allclose(found, expected, atol=1e-4)


# --------------------------------------------------------------------------- decentred


@relaxed
def test_decentred_sites():
    """Of each family, vectors and plates, beside the formula."""
    y = jax.random.normal(jax.random.key(0), (8,))
    x = a_map("decentred").forward(y)
    mu, tau = x[6], jnp.exp(x[7])
    theta = mu + tau * y[jnp.array(SITES["a"])]
    np.testing.assert_allclose(x[jnp.array(SITES["a"])], theta, rtol=1e-5)
    log_b = theta / 10 + 0.3 * y[jnp.array(SITES["b"])]
    np.testing.assert_allclose(x[jnp.array(SITES["b"])], log_b, rtol=1e-5)
    np.testing.assert_allclose(x[4], mu + y[4], rtol=1e-5)
    for site in ("free", "mu", "tau"):
        np.testing.assert_array_equal(x[SITES[site][0]], y[SITES[site][0]])


@relaxed
def test_what_is_decentred():
    """Where data say little, and only what depends on other sites."""

    def of(noise):
        def model():
            tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
            theta = numpyro.sample("theta", dist.Normal(3.0, tau).expand([4]))
            numpyro.sample("alone", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(theta, noise), obs=jnp.arange(4.0))

        return target_from_model(model)

    weak, strong = of(10.0), of(0.01)
    draws = weak.sample_prior(jax.random.key(0), 1_000)
    chosen = decentred_from(weak, draws).chosen
    assert {k: bool(v) for k, v in chosen.items()} == {"theta": True}
    theta = np.arange(4.0) + 0.01 * np.random.default_rng(0).normal(size=(1_000, 4))
    draws = draws.at[:, 2:].set(theta).at[:, 1].multiply(0.3)
    assert not decentred_from(strong, draws).chosen["theta"]
    coordinates = fitted_coordinates(strong, draws)
    assert not is_decentred(coordinates)
    assert is_decentred(
        fitted_coordinates(weak, weak.sample_prior(jax.random.key(1), 99))
    )


@relaxed
def test_the_narrowest_neck():
    """It is exact where no draw of the fit has been."""
    target = target_from_model(funnel)
    draws = target.sample_prior(jax.random.key(0), 500)
    coordinates = decentred_from(target, draws)
    deep = jnp.append(jnp.exp(-25.0) * jnp.arange(9.0), -50.0)
    np.testing.assert_allclose(coordinates.inverse(deep)[:9], np.arange(9.0), rtol=1e-4)


@relaxed
def test_a_neck_that_few_draws_have_seen():
    """Copies, and fewer points than dimensions, decide nothing by chance."""
    target = target_from_model(funnel)
    draws = target.sample_prior(jax.random.key(0), 60)
    copies = jnp.repeat(draws, 10, axis=0)
    assert decentred_from(target, copies).chosen["a"]
    assert not decentred_from(target, draws[:2]).chosen["a"]


@relaxed
def test_sites_of_a_model_with_discrete_ones_stay():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
        numpyro.sample("theta", dist.Normal(3.0 * z, tau))

    target = target_from_model(model)
    draws = np.random.default_rng(0).normal(size=(500, 2))
    assert decentred_from(target, draws) is None


@relaxed
def test_sites_within_control_flow_stay():
    def model():
        def step(before, _):
            now = numpyro.sample("x", dist.Normal(before, 1.0))
            return now, now

        scan(step, 0.0, None, length=3)
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        numpyro.sample("theta", dist.Normal(0.0, tau))

    target = target_from_model(model)
    assert decentred_from(target, np.random.default_rng(0).normal(size=(9, 5))) is None


# ---------------------------------------------------------------------------- mixtures


@relaxed
def test_narrow_modes_are_not_bent():
    """Rows of 2 x 2 modes, in coordinates of unit covariance, and a mixture there."""
    target = target_from_model(model, (Y,))
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2_000, 8)) * 0.1
    draws[:, :2] += rng.choice([-1.0, 3.0], p=[0.2, 0.8], size=(2_000, 2))
    coordinates, mixture = fitted(target, jnp.asarray(draws, jnp.float32))
    inner = coordinates.inner if isinstance(coordinates, Chain) else coordinates
    assert isinstance(inner, Affine)
    assert len(mixture.means) in (4, 8)
    y = np.asarray(to_y(coordinates, jnp.asarray(draws, jnp.float32)), np.float64)
    better = log_density(mixture, y) - scipy.stats.norm.logpdf(y).sum(axis=1)
    assert np.mean(better) > 2.0


@relaxed
def test_heavy_tails_are_no_modes():
    target = target_from_model(model, (Y,))
    draws = np.random.default_rng(0).standard_t(2.0, size=(2_000, 8)).clip(-1e3, 1e3)
    coordinates, mixture = fitted(target, jnp.asarray(draws, jnp.float32))
    assert mixture is None
    expected = fitted_coordinates(target, jnp.asarray(draws, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, coordinates, expected)


# ------------------------------------------------------------------------- all of them


@relaxed
def test_a_model_in_other_coordinates(x64):
    """Its parts, its sites, its prior draws, other data and the gradient."""
    plain = target_from_model(model, (Y,))
    prior = plain.sample_prior(jax.random.key(0), 1_000)
    coordinates = fitted_coordinates(plain, prior)
    assert is_decentred(coordinates)
    target = plain.standardised(coordinates)
    y = jax.random.normal(jax.random.key(1), (20, 8))
    energy = jax.vmap(target.energy)(y)
    parts = jax.vmap(target.log_prior)(y) + jax.vmap(target.log_likelihood)(y)
    np.testing.assert_allclose(energy, -parts, rtol=1e-9)
    x, log_det = jax.vmap(coordinates.forward_and_log_det)(y)
    np.testing.assert_allclose(energy, jax.vmap(plain.energy)(x) - log_det, rtol=1e-9)
    back = jax.vmap(target.unconstrain)(jax.vmap(target.constrain)(y))
    np.testing.assert_allclose(back, y, atol=1e-6)
    draws = target.sample_prior(jax.random.key(0), 1_000)
    np.testing.assert_allclose(to_x(coordinates, draws), prior, rtol=1e-6, atol=1e-6)
    other, expected = (t.with_data(2 * Y) for t in (target, plain))
    difference = expected.energy(x[0]) - log_det[0]
    assert float(other.energy(y[0])) == pytest.approx(float(difference))
    steps = 1e-6 * jnp.eye(8)
    slopes = [(target.energy(y[0] + e) - target.energy(y[0] - e)) / 2e-6 for e in steps]
    found = jax.grad(target.energy)(y[0])
    np.testing.assert_allclose(found, slopes, rtol=1e-4, atol=1e-5)


@relaxed
def test_a_sampler_of_a_centred_model(x64, compiled):
    """It works without the funnel, gives energies of the model, and moves chains."""
    inference = DiffusionSampler(model, num_steps=2, num_particles=256)
    inference.fit(jax.random.key(0), 4, Y, progress_bar=False)
    inference.run(jax.random.key(1), 100, Y, progress_bar=False)
    assert is_decentred(inference.state.target.coordinates)
    plain = inference.state.target.standardised(None)
    x = jax.vmap(plain.unconstrain)(inference.get_samples())
    energies = inference.get_extra_fields()["potential_energy"]
    np.testing.assert_allclose(energies, jax.vmap(plain.energy)(x), rtol=1e-6)
    kernel = pickle.loads(pickle.dumps(inference.kernel(num_proposals=4)))
    mcmc = MCMC(
        kernel,
        num_warmup=0,
        num_samples=5,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(2), Y, extra_fields=("potential_energy",))
    x = jax.vmap(plain.unconstrain)(mcmc.get_samples())
    energies = mcmc.get_extra_fields()["potential_energy"]
    np.testing.assert_allclose(energies, jax.vmap(plain.energy)(x), rtol=1e-6)
    compiled.clear()
    inference.fit(jax.random.key(0), 4, Y + 1, progress_bar=False)
    inference.run(jax.random.key(1), 100, Y + 1, progress_bar=False)
    assert sum(compiled) < 2.0


def funnel():
    v = numpyro.sample("v", dist.Normal(0.0, 1.5))
    numpyro.sample("a", dist.Normal(0.0, jnp.exp(v / 2)).expand([9]))


@pytest.mark.slow
@relaxed
def test_the_funnel_earns_trust():
    """Neal's, centred, by default settings: log Z is 0.

    At his scale of 3 not even 100,000 exact draws know the variance of a.
    """
    inference = DiffusionSampler(funnel, max_seconds=60)
    inference.run(jax.random.key(0), 2_000, progress_bar=False)
    assert inference.diagnostics.verdict.startswith("trust")
    evidence = inference.log_evidence
    assert abs(evidence.estimate) < 3 * evidence.standard_error + 0.01
    sites, log_weight = inference.get_weighted_samples()
    mean, sd = ds.metrics.moments(np.asarray(sites["v"])[:, None], log_weight)
    np.testing.assert_allclose([mean[0], sd[0]], [0.0, 1.5], atol=0.1)
