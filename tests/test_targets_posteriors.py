"""Posteriors with data: densities against SciPy, log Z by independent computations."""

import functools
import importlib.resources
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from diffsamp import targets

NAMES = (
    "brownian",
    "breast_cancer",
    "german_credit",
    "german_credit_1",
    "ionosphere",
    "lgcp",
    "lgcp_whitened",
    "seeds",
    "sonar",
)
MOMENTS = {"german_credit_1": "german_credit_sd1"}
by_name = functools.cache(targets.by_name)


def read_csv(filename):
    path = importlib.resources.files("diffsamp.targets") / "data" / filename
    with path.open() as file:
        return np.genfromtxt(file, delimiter=",", skip_header=1)


@jax.jit
def energies(energy, xs):
    return jax.vmap(energy)(xs)


# Densities


def log_regression(name, w):
    """The models as their docstrings state them, from the raw tables."""
    table = read_csv(f"{name}.csv")
    features, labels = table[:, :-1], table[:, -1]
    if name in ("ionosphere", "sonar"):
        mean, sign, y = features.mean(0), 1.0, labels > 0
    else:
        mean, sign, y = 0.0, -1.0, labels == labels.max()
    sd = features.std(axis=0)
    sd[sd == 0] = 1.0
    logits = sign * (w[0] + (features - mean) / sd @ w[1:])
    return scipy.special.log_expit(np.where(y, logits, -logits)).sum()


def log_joint(name, x):
    log_normal = scipy.stats.norm.logpdf
    if name in ("ionosphere", "sonar"):
        return log_normal(x).sum(), log_regression(name, x)
    if name in ("breast_cancer", "german_credit"):
        return log_normal(x, 0, 10).sum(), log_regression(name, x)
    if name == "german_credit_1":
        return log_normal(x).sum(), log_regression("german_credit", x)
    if name == "seeds":
        r, n, x1, x2 = read_csv("seeds.csv").T
        a_0, a_1, a_12, a_2 = x[:4]
        b, tau = x[4:25], math.exp(x[25])
        prior = log_normal(x[:4], 0, 10).sum() + log_normal(b, 0, tau**-0.5).sum()
        prior += scipy.stats.gamma.logpdf(tau, 0.01, scale=100) + x[25]
        p = scipy.special.expit(a_0 + a_1 * x1 + a_2 * x2 + a_12 * x1 * x2 + b)
        return prior, scipy.stats.binom.logpmf(r, n, p).sum()
    if name == "brownian":
        observed = read_csv("brownian_missing_middle.csv")[:, 1]
        assert np.isnan(observed).nonzero()[0].tolist() == list(range(10, 20))
        s, o = np.log1p(np.exp(x[:2]))
        prior = scipy.stats.lognorm.logpdf([s, o], 2.0).sum()
        prior += np.log(scipy.special.expit(x[:2])).sum()
        prior += log_normal(np.diff(x[2:], prepend=0.0), 0, s).sum()
        return prior, np.nansum(log_normal(observed, x[2:], o))
    raise AssertionError(name)


@pytest.mark.parametrize("name", [name for name in NAMES if "lgcp" not in name])
def test_density_equals_scipys(name, key, x64):
    target = by_name(name)
    moments = targets.reference_moments(MOMENTS.get(name, name))
    noise = np.asarray(jax.random.normal(key, (3, target.dim)))
    for x in moments["mean"] + moments["sd"] * noise:
        log_prior, log_likelihood = log_joint(name, x)
        x = jnp.asarray(x)
        assert float(target.log_prior(x)) == pytest.approx(log_prior, rel=1e-9)
        assert float(target.log_likelihood(x)) == pytest.approx(
            log_likelihood, rel=1e-9
        )


@pytest.mark.parametrize("name", NAMES)
def test_energy_is_minus_prior_and_likelihood(name, key):
    target = by_name(name)
    x = 0.3 * jax.random.normal(key, (target.dim,))
    total = float(target.log_prior(x)) + float(target.log_likelihood(x))
    assert float(target.energy(x)) == pytest.approx(-total, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "seeds"])
def test_prior_draws_fit_the_prior_density(name, key):
    """E[x_i d log p / dx_i] = -1, and the expected log-density is minus the entropy."""
    target = by_name(name)
    n = 400 if target.dim == 1600 else 4_000
    xs = target.sample_prior(key, n)
    assert xs.shape == (n, target.dim)
    assert np.isfinite(xs).all()
    with jax.enable_x64(True):
        gradients = jax.jit(jax.vmap(jax.grad(target.log_prior)))(
            jnp.asarray(np.asarray(xs), jnp.float64)
        )
    identity = -np.asarray(xs, np.float64) * np.asarray(gradients)
    error = identity.std(axis=0) / math.sqrt(n)
    assert np.all(np.abs(identity.mean(axis=0) - 1) < 5 * error)


def test_seeds_has_no_prior_sampler():
    assert by_name("seeds").sample_prior is None


def test_credit_without_prior_is_the_bare_likelihood(key):
    flat, full = targets.german_credit(math.inf), by_name("german_credit")
    w = 0.1 * jax.random.normal(key, (25,))
    assert float(flat.energy(w)) == pytest.approx(-float(full.log_likelihood(w)))
    assert flat.log_prior is None
    assert flat.log_z == -504.4864
    assert targets.german_credit(3.0).log_z is None
    assert targets.breast_cancer(3.0).log_z is None


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_prior_scale_is_checked(bad):
    with pytest.raises(ValueError, match="prior_scale must be positive"):
        targets.german_credit(bad)
    with pytest.raises(ValueError, match="prior_scale must be positive and finite"):
        targets.breast_cancer(bad)


def test_breast_cancer_refuses_a_flat_prior():
    with pytest.raises(ValueError, match="improper, as the data are separable"):
        targets.breast_cancer(math.inf)


def test_constrain_names_the_parameters(key):
    x = jax.random.normal(key, (32,))
    brownian = by_name("brownian").constrain(x)
    assert brownian["locations"].shape == (30,)
    assert float(brownian["innovation_scale"]) == pytest.approx(
        math.log1p(math.exp(x[0]))
    )
    seeds = by_name("seeds").constrain(x[:26])
    assert seeds["b"].shape == (21,)
    assert float(seeds["tau"]) == pytest.approx(math.exp(x[25]), rel=1e-5)


def test_reference_moments():
    for name in NAMES:
        if name == "lgcp_whitened":
            continue
        target = by_name(name)
        moments = targets.reference_moments(MOMENTS.get(name, name))
        assert moments["mean"].shape == moments["sd"].shape == (target.dim,)
        assert np.all(moments["sd"] > 0)
        assert target.log_z == moments["log_z"]
    with pytest.raises(ValueError, match=r"brownian.*sonar; got 'gmm9'"):
        targets.reference_moments("gmm9")


# log Z


def tempered(rng, energy, mean, factor, num_particles, num_temperatures):
    """Tempered SMC from N(mean, factor factor^T): log Z and the last particles.

    The noise comes from NumPy, as generators take long to compile.
    """
    moves = (num_temperatures, 3)
    noise = (
        rng.standard_normal((*moves, num_particles, mean.shape[0])),
        rng.uniform(0.7, 1.3, moves) * mean.shape[0] ** -0.25,
        np.log(rng.uniform(size=(*moves, num_particles))),
    )
    z = rng.standard_normal((num_particles, mean.shape[0]))
    offsets = rng.uniform(size=num_temperatures) / num_particles
    return anneal(energy, mean, factor, z, offsets, noise)


@jax.jit
def anneal(energy, mean, factor, z, offsets, noise):
    num_particles, dim = z.shape
    betas = jnp.linspace(0, 1, len(offsets) + 1)[1:]
    log_base = -jnp.sum(jnp.log(jnp.diag(factor))) - dim / 2 * math.log(2 * math.pi)

    @jax.vmap
    def gap(z):
        """Target minus base energy and its gradient, in whitened coordinates."""
        return jax.value_and_grad(
            lambda z: energy(mean + factor @ z) + log_base - 0.5 * z @ z
        )(z)

    def step(state, inputs):
        z, log_z = state
        beta, offset, noise = inputs
        log_weight = -gap(z)[0] / len(offsets)
        log_z += jax.nn.logsumexp(log_weight) - math.log(num_particles)
        cdf = jnp.cumsum(jax.nn.softmax(log_weight))
        u = jnp.linspace(0, 1, num_particles, endpoint=False) + offset
        z = z[jnp.minimum(jnp.searchsorted(cdf, u), num_particles - 1)]

        def hamiltonian(z, p):
            energy, gradient = gap(z)
            total = 0.5 * jnp.sum(z**2 + p**2, axis=1) + beta * energy
            return total, z + beta * gradient

        def hmc(z, noise):
            p, size, log_u = noise

            def leapfrog(state, _):
                z, p, force = state
                p = p - 0.5 * size * force
                z = z + size * p
                force = hamiltonian(z, p)[1]
                return (z, p - 0.5 * size * force, force), None

            start, force = hamiltonian(z, p)
            (new, p, _), _ = jax.lax.scan(leapfrog, (z, p, force), None, length=3)
            accept = log_u < start - hamiltonian(new, p)[0]
            return jnp.where(accept[:, None], new, z), None

        return (jax.lax.scan(hmc, z, noise)[0], log_z), None

    (z, log_z), _ = jax.lax.scan(step, (z, jnp.zeros(())), (betas, offsets, noise))
    return log_z, mean[None, :] + z @ factor.T


@jax.jit
def newton_step(energy, x):
    hessian = jax.hessian(energy)(x)
    return x - jnp.linalg.solve(hessian, jax.grad(energy)(x)), hessian


def laplace(target):
    x = jnp.zeros(target.dim)
    for _ in range(20):
        x, hessian = newton_step(target.energy, x)
    return x, jnp.linalg.cholesky(jnp.linalg.inv(hessian))


@pytest.mark.parametrize("name", ["german_credit", "german_credit_1", "flat"])
def test_credit_log_z_by_importance_sampling(name, x64):
    """A multivariate t around the mode is nearly the posterior itself."""
    n, dof = 20_000, 20.0
    target = targets.german_credit(math.inf) if name == "flat" else by_name(name)
    mode, factor = laplace(target)
    proposal = scipy.stats.multivariate_t(mode, factor @ factor.T, dof, seed=0)
    xs = proposal.rvs(n)
    log_weight = -np.asarray(energies(target.energy, xs)) - proposal.logpdf(xs)
    weight = np.exp(log_weight - target.log_z)
    error = weight.std() / math.sqrt(n)
    assert error < 0.01
    assert weight.mean() == pytest.approx(1, abs=4 * error)
    if name == "flat":
        return
    moments = targets.reference_moments(MOMENTS.get(name, name))
    mean = weight @ xs / weight.sum()
    assert np.all(np.abs(mean - moments["mean"]) < 0.05 * moments["sd"])


@pytest.mark.parametrize(
    ("name", "num_temperatures"),
    [
        ("sonar", 8),
        pytest.param("ionosphere", 8, marks=pytest.mark.slow),
        pytest.param("breast_cancer", 12, marks=pytest.mark.slow),
    ],
)
def test_skewed_regression_log_z_by_tempering(name, num_temperatures, x64):
    target, rng = by_name(name), np.random.default_rng(0)
    mean, factor = laplace(target)
    budget = {"num_particles": 300, "num_temperatures": num_temperatures}
    _, pilot = tempered(rng, target.energy, mean, factor, **budget)
    mean, factor = pilot.mean(axis=0), 1.1 * jnp.linalg.cholesky(jnp.cov(pilot.T))
    runs = [tempered(rng, target.energy, mean, factor, **budget) for _ in range(3)]
    log_z = np.mean([float(log_z) for log_z, _ in runs])
    assert log_z == pytest.approx(target.log_z, abs=0.12)
    xs = np.concatenate([particles for _, particles in runs])
    moments = targets.reference_moments(name)
    assert np.all(np.abs(xs.mean(axis=0) - moments["mean"]) < 0.25 * moments["sd"])
    np.testing.assert_allclose(xs.std(axis=0), moments["sd"], rtol=0.2)


def test_brownian_log_z_and_scales_by_quadrature():
    """Given the scales the data are jointly Gaussian; integrate over the scales."""
    target = by_name("brownian")
    observed = read_csv("brownian_missing_middle.csv")[:, 1]
    times = np.flatnonzero(np.isfinite(observed))
    shared = np.minimum(times[:, None], times[None, :]) + 1.0
    log_s, log_o = np.meshgrid(
        np.linspace(-5, 4, 121), np.linspace(-18, 4, 221), indexing="ij"
    )
    log_s, log_o = log_s.ravel(), log_o.ravel()
    # The spectrum of the noiseless covariance gives all scales at once.
    values, vectors = np.linalg.eigh(shared)
    variance = np.exp(2 * log_s)[:, None] * values + np.exp(2 * log_o)[:, None]
    rotated = observed[times] @ vectors
    log_p = scipy.stats.norm.logpdf(rotated, 0, np.sqrt(variance)).sum(axis=1)
    log_p += scipy.stats.norm.logpdf(log_s, 0, 2) + scipy.stats.norm.logpdf(log_o, 0, 2)
    mass = np.exp(log_p) * 0.075 * 0.1
    assert math.log(mass.sum()) == pytest.approx(target.log_z, abs=1e-6)

    moments = targets.reference_moments("brownian")
    for i, log_scale in enumerate((log_s, log_o)):
        z = log_scale + np.log(-np.expm1(-np.exp(log_scale))) + np.exp(log_scale)
        z -= log_scale
        mean = mass @ z / mass.sum()
        sd = math.sqrt(mass @ (z - mean) ** 2 / mass.sum())
        assert moments["mean"][i] == pytest.approx(mean, abs=1e-4)
        assert moments["sd"][i] == pytest.approx(sd, abs=1e-4)


def seeds_marginal(theta):
    """Log joint of (a_0, a_1, a_12, a_2, log tau) with the effects integrated out.

    Args:
        theta: [n, 5].
    """
    r, n, x1, x2 = read_csv("seeds.csv").T
    fixed = theta[:, :4] @ np.stack([np.ones(21), x1, x1 * x2, x2])
    tau = np.exp(theta[:, 4:])
    b = np.zeros_like(fixed)
    for _ in range(30):
        p = scipy.special.expit(fixed + b)
        step = (r - n * p - tau * b) / (n * p * (1 - p) + tau)
        b += np.clip(step, -1, 1)
    p = scipy.special.expit(fixed + b)
    sd = (n * p * (1 - p) + tau) ** -0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    b = b[..., None] + sd[..., None] * nodes
    p = scipy.special.expit(fixed[..., None] + b)
    log_f = scipy.stats.norm.logpdf(b, 0, tau[..., None] ** -0.5)
    log_f += scipy.stats.binom.logpmf(r[:, None], n[:, None], p)
    log_f += np.log(weights) + 0.5 * nodes**2 + np.log(sd)[..., None]
    log_p = scipy.special.logsumexp(log_f, axis=2).sum(axis=1)
    log_p += scipy.stats.norm.logpdf(theta[:, :4], 0, 10).sum(axis=1)
    return log_p + scipy.stats.gamma.logpdf(tau[:, 0], 0.01, scale=100) + theta[:, 4]


def test_seeds_log_z_by_gauss_hermite():
    target = by_name("seeds")
    moments = targets.reference_moments("seeds")
    columns = [0, 1, 2, 3, 25]
    mean, covariance = moments["mean"][columns], np.diag(moments["sd"][columns] ** 2)
    rng = np.random.default_rng(0)
    for n in (1_000, 6_000):
        proposal = scipy.stats.multivariate_t(mean, 0.9 * covariance, 5, seed=rng)
        theta = proposal.rvs(n)
        weight = np.exp(seeds_marginal(theta) - proposal.logpdf(theta) - target.log_z)
        share = weight / weight.sum()
        mean = share @ theta
        covariance = (theta - mean).T @ ((theta - mean) * share[:, None])
    error = weight.std() / math.sqrt(n)
    assert error < 0.03
    assert weight.mean() == pytest.approx(1, abs=4 * error)
    assert np.all(
        np.abs(mean - moments["mean"][columns]) < 0.1 * moments["sd"][columns]
    )


# Cox process


@functools.cache
def cox_inputs():
    """Mean, covariance and counts of the process, computed anew."""
    points = read_csv("finnish_pines.csv")
    counts, _, _ = np.histogram2d(*points.T, bins=40, range=[[0, 1], [0, 1]])
    nodes = np.indices((40, 40)).reshape(2, -1)
    distance = np.hypot(*(nodes[:, :, None] - nodes[:, None, :]))
    return math.log(126) - 1.91 / 2, 1.91 * np.exp(-33 * distance / 40), counts.ravel()


def cox_mode(mean, precision, counts, half_variance=0.0):
    field = np.full(1600, mean)
    for _ in range(12):
        rate = np.exp(field + half_variance) / 1600
        gradient = precision @ (field - mean) - counts + rate
        hessian = scipy.linalg.cho_factor(precision + np.diag(rate))
        field = field - scipy.linalg.cho_solve(hessian, gradient)
        if np.abs(gradient).max() < 1e-9:
            break
    return field, hessian[0]


def test_lgcp_density_and_laplace_value(x64):
    """511.205 is the Laplace approximation that goes with log Z = 501.73."""
    mean, covariance, counts = cox_inputs()
    assert counts.sum() == 126
    assert counts.max() == 3
    mode, factor = cox_mode(mean, np.linalg.inv(covariance), counts)
    chol = np.linalg.cholesky(covariance)
    z = scipy.linalg.solve_triangular(chol, mode - mean, lower=True)
    log_joint = scipy.stats.norm.logpdf(z).sum() - np.log(np.diag(chol)).sum()
    log_joint += counts @ mode - np.exp(mode).sum() / 1600

    target, whitened = by_name("lgcp"), by_name("lgcp_whitened")
    assert float(target.energy(jnp.asarray(mode))) == pytest.approx(
        -log_joint, rel=1e-9
    )
    log_det = np.log(np.diag(chol)).sum()
    in_z = float(whitened.energy(jnp.asarray(z)))
    assert in_z == pytest.approx(-log_joint - log_det, rel=1e-9)
    np.testing.assert_allclose(whitened.constrain(jnp.asarray(z)), mode, rtol=1e-9)
    half_log_det = np.log(np.abs(np.diag(factor))).sum()
    laplace_value = log_joint + 800 * math.log(2 * math.pi) - half_log_det
    assert laplace_value == pytest.approx(511.205437, abs=1e-4)
    assert target.log_z == whitened.log_z


@pytest.mark.slow
def test_lgcp_log_z_lies_above_the_best_gaussian_bound_and_at_the_smc_value(x64):
    mean, covariance, counts = cox_inputs()
    precision = np.linalg.inv(covariance)
    variance = np.zeros(1600)
    for _ in range(12):
        field, _ = cox_mode(mean, precision, counts, variance / 2)
        rate = np.exp(field + variance / 2) / 1600
        posterior = np.linalg.inv(precision + np.diag(rate))
        variance = np.diag(posterior)
    elbo = counts @ field - np.exp(field + variance / 2).sum() / 1600
    elbo -= 0.5 * (field - mean) @ precision @ (field - mean)
    elbo -= 0.5 * np.sum(precision * posterior) - 800
    elbo += (
        0.5 * np.linalg.slogdet(posterior)[1] - 0.5 * np.linalg.slogdet(covariance)[1]
    )
    target = by_name("lgcp")
    assert elbo == pytest.approx(498.803, abs=1e-2)
    assert elbo < target.log_z < 504.353

    log_z, xs = tempered(
        np.random.default_rng(0),
        target.energy,
        jnp.asarray(field),
        jnp.linalg.cholesky(jnp.asarray(posterior)),
        num_particles=64,
        num_temperatures=10,
    )
    assert float(log_z) == pytest.approx(target.log_z, abs=0.3)
    moments = targets.reference_moments("lgcp")
    assert np.abs((xs.mean(axis=0) - moments["mean"]) / moments["sd"]).mean() < 0.2
