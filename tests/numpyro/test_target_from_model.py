"""A NumPyro model as a target: density, parameters, prior, errors, compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats

import diffsamp as ds
from diffsamp.numpyro import Affine, ModelTarget, target_from_model

# NumPyro broadcasts in its own code.
pytestmark = pytest.mark.relaxed("ranks", "dtypes")

Y = np.array([0.3, -0.5, 0.9, 1.4])


def scale_model(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    mean = numpyro.sample("mean", dist.Uniform(-0.5, 2.0))
    numpyro.deterministic("precision", scale**-2)
    numpyro.sample("obs", dist.Normal(mean, scale), obs=y)


def moving_model(y, num_groups=2):
    """A support that moves with another site, a vector site, a simplex, a factor."""
    width = numpyro.sample("width", dist.LogNormal(0.3, 0.5))
    z = numpyro.sample("z", dist.Uniform(0.0, width).expand([num_groups]).to_event(1))
    w = numpyro.sample("w", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    numpyro.deterministic("total", z.sum() + w[0])
    numpyro.factor("extra", -z.sum() * w[1])
    with numpyro.plate("data", len(y)):
        numpyro.sample("obs", dist.Normal(width, 1.0), obs=y)


@pytest.fixture(scope="module")
def moving():
    return target_from_model(moving_model, (Y,))


@pytest.fixture(scope="module")
def scale():
    return target_from_model(scale_model, (Y,))


def test_unconstrained_evidence_equals_the_constrained_one(x64):
    """The anchor of every claim about log Z."""
    target = target_from_model(scale_model, model_kwargs={"y": Y})
    assert target.site_names == ("mean", "scale")

    # mean: logit of an interval; scale: log of a positive number
    logit, log = np.linspace(-30, 30, 600), np.linspace(-6, 3, 300)
    points = jnp.stack(jnp.meshgrid(logit, log, indexing="ij"), -1).reshape(-1, 2)
    energy = jax.jit(jax.vmap(target.energy))(points)
    unconstrained = jnp.exp(-energy).sum() * (logit[1] - logit[0]) * (log[1] - log[0])

    edges = np.linspace(-0.5, 2.0, 801)
    mean = (edges[1:] + edges[:-1])[:, None] / 2
    edges = np.linspace(0.0, 8.0, 2001)
    scale = (edges[1:] + edges[:-1]) / 2
    joint = scipy.stats.halfnorm.pdf(scale) / 2.5
    for y in Y:
        joint = joint * scipy.stats.norm.pdf(y, mean, scale)
    constrained = joint.sum() * (2.5 / 800) * (8.0 / 2000)
    np.testing.assert_allclose(unconstrained, constrained, rtol=1e-5)


def test_energy_is_minus_prior_minus_likelihood(moving):
    assert isinstance(moving, ModelTarget)
    assert moving.is_proper
    assert moving.log_z is None
    xs = moving.sample_prior(jax.random.key(1), 64)
    prior = jax.jit(jax.vmap(moving.log_prior))(xs)
    likelihood = jax.jit(jax.vmap(moving.log_likelihood))(xs)
    energy = jax.jit(jax.vmap(moving.energy))(xs)
    np.testing.assert_allclose(energy, -(prior + likelihood), rtol=1e-5, atol=1e-4)

    sites = jax.jit(jax.vmap(moving.constrain))(xs)
    expected = -(sites["z"].sum(1) * sites["w"][:, 1])  # the factor is likelihood
    y = scipy.stats.norm.logpdf(Y, np.array(sites["width"])[:, None]).sum(1)
    np.testing.assert_allclose(likelihood, expected + y, rtol=1e-4, atol=1e-4)


def test_prior_is_normalised(x64, scale):  # a target made in 32 bits serves 64
    logit, log = np.linspace(-40, 40, 300), np.linspace(-30, 4, 300)
    points = jnp.stack(jnp.meshgrid(logit, log, indexing="ij"), -1).reshape(-1, 2)
    density = jnp.exp(jax.jit(jax.vmap(scale.log_prior))(points))
    integral = density.sum() * (logit[1] - logit[0]) * (log[1] - log[0])
    np.testing.assert_allclose(integral, 1.0, rtol=1e-6)


def test_sample_prior_has_the_law_of_the_prior(moving):
    n = 4000
    sites = jax.jit(jax.vmap(moving.constrain))(
        moving.sample_prior(jax.random.key(2), n)
    )
    width = np.array(sites["width"])
    assert (
        scipy.stats.kstest(
            width, scipy.stats.lognorm(0.5, scale=np.exp(0.3)).cdf
        ).pvalue
        > 0.01
    )
    share = (np.array(sites["z"]) / width[:, None]).ravel()
    assert scipy.stats.kstest(share, scipy.stats.uniform.cdf).pvalue > 0.01
    first = np.array(sites["w"])[:, 0]
    assert scipy.stats.kstest(first, scipy.stats.beta(1.0, 5.0).cdf).pvalue > 0.01


def test_constrain_replays_the_model(moving):
    assert moving.dim == 5
    assert moving.site_names == ("w", "width", "z")
    xs = moving.sample_prior(jax.random.key(3), 10)
    sites = jax.jit(jax.vmap(moving.constrain))(xs)
    assert {k: v.shape[1:] for k, v in sites.items()} == {
        "w": (3,),
        "width": (),
        "z": (2,),
        "total": (),
    }
    assert bool((sites["z"] < sites["width"][:, None]).all())
    np.testing.assert_allclose(
        sites["total"], sites["z"].sum(1) + sites["w"][:, 0], rtol=1e-6
    )
    back = jax.jit(jax.vmap(moving.unconstrain))(
        sites
    )  # deterministic sites are ignored
    np.testing.assert_allclose(back, xs, rtol=1e-3, atol=1e-3)
    assert list(moving.unravel(xs[0])) == ["w", "width", "z"]
    assert jnp.isfinite(moving.energy(moving.initial))


def test_new_data_of_equal_shape_do_not_recompile():
    num_runs = 0

    def model(y, num_means=2):
        nonlocal num_runs
        num_runs += 1
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0).expand([num_means]))
        numpyro.sample("obs", dist.Normal(mean.sum(), 1.0), obs=y)

    @jax.jit
    def value_and_grad(energy, x):
        return jax.value_and_grad(energy)(x)

    target = target_from_model(model, (Y,))
    x = jnp.array([0.1, 0.2])
    first, _ = value_and_grad(target.energy, x)
    other = target.with_data(2.0 * Y)
    before = num_runs
    second, _ = value_and_grad(other.energy, x)
    assert num_runs == before
    assert first != second
    np.testing.assert_allclose(second, other.energy(x), rtol=1e-5)

    again = target_from_model(model, (3.0 * Y,))  # nor does a target made anew
    before = num_runs
    third, _ = value_and_grad(again.energy, x)
    assert num_runs == before
    np.testing.assert_allclose(third, again.energy(x), rtol=1e-5)

    more = target_from_model(model, (Y,), {"num_means": 3})
    assert more.dim == 3
    assert value_and_grad(more.energy, jnp.ones(3))[1].shape == (3,)
    for name in ("constrain", "unconstrain", "log_prior", "log_likelihood"):
        assert getattr(other, name).args[1] is not getattr(target, name).args[1]
    assert other.sample_prior(jax.random.key(0), 3).shape == (3, 2)


def test_with_data_of_another_form_is_refused(moving):
    with pytest.raises(ValueError, match="shapes"):
        moving.with_data(np.ones(7))
    with pytest.raises(ValueError, match="structure"):
        moving.with_data(Y, num_groups=3)
    with pytest.raises(ValueError, match="hashable"):
        target_from_model(scale_model, ({1, 2},))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_typed_and_raw_keys(make, scale):
    """Neither their kind nor their value influences the density."""
    target = target_from_model(scale_model, (Y,), key=make(3))
    draws = target.sample_prior(make(1), 5)
    assert draws.shape == (5, 2)
    np.testing.assert_array_equal(draws, scale.sample_prior(jax.random.key(1), 5))
    assert not jnp.array_equal(target.initial, scale.initial)
    assert target.energy(draws[0]) == scale.energy(draws[0])


def test_improper_prior():
    def model(y):
        flat = dist.ImproperUniform(dist.constraints.positive, (), ())
        scale = numpyro.sample("scale", flat)
        numpyro.sample("obs", dist.Normal(0.0, scale), obs=y)

    target = target_from_model(model, (Y,))
    assert not target.is_proper
    assert target.improper_sites == ("scale",)
    assert target.log_prior is None
    assert target.log_likelihood is None
    assert target.sample_prior is None
    x = jnp.array([0.5])
    expected = -scipy.stats.norm.logpdf(Y, 0.0, np.exp(0.5)).sum() - 0.5
    np.testing.assert_allclose(target.energy(x), expected, rtol=1e-5)
    assert sorted(target.with_data(2 * Y).constrain(x)) == ["scale"]


@pytest.mark.parametrize("name", ["scale", "mask"])
def test_modified_latent_site_leaves_no_normalised_prior(name):
    def model():
        if name == "scale":
            handler = numpyro.handlers.scale(scale=0.5)
        else:
            handler = numpyro.handlers.mask(mask=False)
        with handler:
            numpyro.sample("x", dist.Normal(0.0, 1.0))

    target = target_from_model(model)
    assert target.log_prior is None
    assert target.sample_prior is None


def test_param_values_are_frozen():
    def model(y):
        shift = numpyro.param("shift", 0.7)
        mean = numpyro.sample("mean", dist.Normal(shift, 1.0))
        numpyro.deterministic("twice", 2 * mean + shift)
        numpyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    target = target_from_model(model, (Y,))
    np.testing.assert_allclose(target.constrain(jnp.ones(1))["twice"], 2.7, rtol=1e-6)
    np.testing.assert_allclose(
        target.log_prior(jnp.ones(1)), scipy.stats.norm.logpdf(1.0, 0.7), rtol=1e-5
    )


def test_nan_density_counts_as_none():
    def model(y):
        x = numpyro.sample("x", dist.Normal(1.0, 1.0))
        numpyro.factor("bad", jnp.log(x) - y.sum())

    def init(site=None):
        return numpyro.infer.init_to_value(site, values={"x": 1.0})

    target = target_from_model(model, (Y,), init_strategy=init)
    assert target.energy(-jnp.ones(1)) == jnp.inf
    assert target.log_likelihood(-jnp.ones(1)) == -jnp.inf
    assert jnp.isfinite(target.energy(jnp.ones(1)))


PILOTS = {
    "prior_draws": ds.prior_draws(500),
    "laplace": ds.laplace(num_draws=500),
    "short_mcmc": ds.short_mcmc(4, 20, 20),
}


@pytest.mark.parametrize("pilot", PILOTS.values(), ids=PILOTS)
def test_standardised(pilot):
    """Other coordinates: the same sites, the same log Z, about a unit normal."""
    plain = target_from_model(scale_model, (Y,))
    target = target_from_model(scale_model, (Y,), standardise=pilot)
    assert plain.coordinates is None
    assert target.coordinates is not None
    ys = jax.random.normal(jax.random.key(0), (20, 2))
    xs = jax.vmap(target.coordinates.forward)(ys)
    log_det = np.linalg.slogdet(np.asarray(target.coordinates.matrix, np.float64))[1]
    for name, constant in (("energy", -log_det), ("log_prior", log_det)):
        one, other = (jax.vmap(getattr(t, name)) for t in (target, plain))
        np.testing.assert_allclose(one(ys), other(xs) + constant, rtol=1e-4)
    parts = jax.vmap(target.log_prior)(ys) + jax.vmap(target.log_likelihood)(ys)
    np.testing.assert_allclose(jax.vmap(target.energy)(ys), -parts, rtol=1e-4)
    sites = jax.vmap(target.constrain)(ys)
    for name, values in jax.vmap(plain.constrain)(xs).items():
        np.testing.assert_allclose(sites[name], values, rtol=1e-4)
    back = jax.vmap(target.unconstrain)(sites)
    np.testing.assert_allclose(back, ys, atol=2e-3)
    np.testing.assert_allclose(target.unravel(ys[0])["mean"], xs[0, 0], rtol=1e-5)
    draws = target.sample_prior(jax.random.key(1), 2_000)
    of_plain = plain.sample_prior(jax.random.key(1), 2_000)
    np.testing.assert_allclose(
        jax.vmap(target.coordinates.forward)(draws), of_plain, rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        target.coordinates.forward(target.initial), plain.initial, rtol=1e-4, atol=1e-4
    )
    other = target.with_data(2 * Y)
    assert other.coordinates is target.coordinates
    expected = plain.with_data(2 * Y).energy(xs[0]) - log_det
    np.testing.assert_allclose(other.energy(ys[0]), expected, rtol=1e-4)


def test_maps_follow_one_another(scale):
    first = Affine(jnp.array([1.0, -2.0]), jnp.array([[2.0, 0.0], [1.0, 0.5]]))
    second = Affine(jnp.array([0.3, 0.1]), jnp.array([[0.5, 0.0], [-1.0, 3.0]]))
    both = scale.standardised(first).standardised(second)
    y = jnp.array([0.2, -0.4])
    x = first.forward(second.forward(y))
    np.testing.assert_allclose(both.coordinates.forward(y), x, rtol=1e-5)
    expected = (
        scale.energy(x)
        - first.forward_and_log_det(y)[1]
        - second.forward_and_log_det(y)[1]
    )
    np.testing.assert_allclose(both.energy(y), expected, rtol=1e-5)


def test_a_model_that_needs_the_values_of_its_data():
    """It computes with them in NumPy; they are constants of the program then."""

    def model(y, num_lags):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        lags = np.stack([y[num_lags - k : len(y) - k] for k in range(1, num_lags + 1)])
        numpyro.sample("obs", dist.Normal(slope * lags.sum(0), 1.0), obs=y[num_lags:])

    y = np.array([0.5, -1.0, 2.0, 0.3])
    target = target_from_model(model, model_kwargs={"y": y, "num_lags": 2})
    x = 0.7
    residual = y[2:] - x * (y[1:-1] + y[:-2])
    expected = 0.5 * (residual @ residual + x**2) + 1.5 * np.log(2 * np.pi)
    assert float(target.energy(jnp.array([x]))) == pytest.approx(expected, rel=1e-5)
    again = target.with_data(y=y.copy(), num_lags=2)
    assert again.energy.args == target.energy.args
    with pytest.raises(ValueError, match="call target_from_model for a different"):
        target.with_data(y=y + 1, num_lags=2)
