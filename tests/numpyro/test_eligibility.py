"""Which models are eligible, and what those that are not are told."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.infer import MCMC, Predictive, init_to_value
from numpyro.primitives import mutable

import diffsamp as ds
from diffsamp.numpyro import DiffusionKernel, target_from_model

# NumPyro broadcasts in its own code.
pytestmark = pytest.mark.relaxed("ranks", "dtypes")

Y = jnp.array([0.3, -1.0, 2.0])


def delta():
    numpyro.sample("d", dist.Delta(1.0))
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def poisson():
    numpyro.sample("count", dist.Poisson(1.0))
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def sphere():
    numpyro.sample("v", dist.ProjectedNormal(jnp.ones(2)))


def not_a_number():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("bad", jnp.nan)


def observed():
    numpyro.sample("x", dist.Normal(0.0, 1.0), obs=1.0)


def subsampled():
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 3, subsample_size=2):
        batch = numpyro.subsample(Y, event_dim=0)
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=batch)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (delta, ValueError, "'d' has a delta distribution; use `numpyro.determinis"),
        (poisson, RuntimeError, "Poisson distribution at site count"),
        (sphere, ValueError, "spherical sample site 'v'.*reparam"),
        (not_a_number, RuntimeError, "valid initial parameters"),
        (observed, RuntimeError, "'observed' has no continuous latent site"),
        (subsampled, ValueError, "plate 'data' takes 2 of 3 rows.*pass all data"),
    ],
)
def test_models_that_are_refused(model, error, words):
    with pytest.raises(error, match=words):
        target_from_model(model)


def test_the_site_without_a_density_stands_in_a_note():
    with pytest.raises(RuntimeError) as caught:
        target_from_model(not_a_number)
    assert "not finite at sites: bad; check data" in " ".join(caught.value.__notes__)


def no_gradient():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("root", jnp.sqrt(0.0 * x))


def test_the_site_without_a_gradient_stands_in_a_note():
    with pytest.raises(RuntimeError) as caught:
        target_from_model(no_gradient)
    said = " ".join(caught.value.__notes__)
    assert "gradient is not finite at sites: root; check data" in said
    assert "pass an init_strategy" in said


def test_the_note_is_about_the_strategy_that_was_given():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("far", jnp.log(x - 5.0))

    target_from_model(model, init_strategy=init_to_value(values={"x": 6.0}))
    strategy = init_to_value(values={"x": 4.0})
    with pytest.raises(RuntimeError) as caught:
        target_from_model(model, init_strategy=strategy)
    assert "density is not finite at sites: far" in " ".join(caught.value.__notes__)


def test_mutable_sites_are_frozen():
    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        count = mutable("count", {"value": jnp.array(2.0)})
        numpyro.sample("y", dist.Normal(mean * count["value"], 1.0), obs=y)

    target = target_from_model(model, (Y,))
    x = 0.4
    normal = scipy.stats.norm.logpdf
    expected = -normal(x) - normal(Y, 2 * x, 1).sum()
    assert float(target.energy(jnp.array([x]))) == pytest.approx(expected, rel=1e-5)


def test_circles_are_warned_of():
    def model():
        numpyro.sample("angle", dist.VonMises(0.0, 1.0))

    with pytest.warns(UserWarning, match="circular sample site 'angle'"):
        target_from_model(model)


def test_discrete_sites_are_summed_out():
    pytest.importorskip("funsor")

    def model(y):
        share = numpyro.sample("share", dist.Beta(2.0, 3.0))
        with numpyro.plate("data", 3):
            z = numpyro.sample(
                "z", dist.Bernoulli(share), infer={"enumerate": "parallel"}
            )
            numpyro.sample("y", dist.Normal(2.0 * z - 1.0, 1.0), obs=y)

    target = target_from_model(model, (Y,))
    x = 0.4
    share = scipy.special.expit(x)
    normal = scipy.stats.norm.pdf
    mixture = share * normal(Y, 1, 1) + (1 - share) * normal(Y, -1, 1)
    log_joint = np.log(mixture).sum() + scipy.stats.beta.logpdf(share, 2, 3)
    expected = -(log_joint + np.log(share * (1 - share)))
    assert float(target.energy(jnp.array([x]))) == pytest.approx(expected, rel=1e-5)
    assert target.is_proper
    prior = scipy.stats.beta.logpdf(share, 2, 3) + np.log(share * (1 - share))
    point = jnp.array([x])
    assert float(target.log_prior(point)) == pytest.approx(prior, rel=1e-5)
    likelihood = float(target.log_likelihood(point))
    assert likelihood == pytest.approx(np.log(mixture).sum(), rel=1e-5)
    assert target.sample_prior(jax.random.key(0), 3).shape == (3, 1)
    sites = jax.vmap(target.constrain)(jnp.full((5, 1), x))
    assert sorted(sites) == ["share"]
    found = Predictive(model, sites, infer_discrete=True)(jax.random.key(0), Y)
    assert found["z"].shape == (5, 3)


def counted(y):
    share = numpyro.sample("share", dist.Beta(2.0, 3.0))
    z = numpyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
    sign = numpyro.deterministic("sign", 2.0 * z - 1.0)
    numpyro.deterministic("odds", share / (1 - share))
    numpyro.sample("y", dist.Normal(sign, 1.0), obs=y)


def test_deterministic_sites_of_what_is_summed_out_have_no_value():
    """It would be that of one value of the discrete site, whatever the point."""
    pytest.importorskip("funsor")
    with pytest.warns(
        UserWarning, match=r"sites sign depend .* \(z\), and are left out"
    ):
        target = target_from_model(counted, (Y[0],))
    sites = jax.vmap(target.constrain)(jnp.zeros((3, 1)))
    assert sorted(sites) == ["odds", "share"]
    found = Predictive(counted, sites, infer_discrete=True)(jax.random.key(0), Y[0])
    assert set(np.unique(found["z"])) <= {0, 1}
    given = sites | {"z": found["z"]}
    again = Predictive(counted, given, return_sites=["sign"])(jax.random.key(0), Y[0])
    np.testing.assert_array_equal(again["sign"], 2 * found["z"] - 1)
    sampler = ds.samplers.dis(1, 3)
    kernel = DiffusionKernel(sampler, sampler.init(jax.random.key(0)), counted)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=4, progress_bar=False)
    mcmc.run(jax.random.key(0), Y[0])
    assert sorted(mcmc.get_samples()) == ["odds", "share"]


def test_a_prior_that_depends_on_an_enumerated_site_is_none_alone():
    pytest.importorskip("funsor")

    def model(y):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with numpyro.plate("pair", 2):
            x = numpyro.sample("x", dist.Normal(4.0 * z, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    target = target_from_model(model, (Y[:2],))
    assert target.log_prior is None
    x = np.array([0.3, 2.0])
    normal = scipy.stats.norm.pdf
    prior = 0.7 * normal(x, 0, 1).prod() + 0.3 * normal(x, 4, 1).prod()
    expected = -np.log(prior * normal(Y[:2], x, 1).prod())
    assert float(target.energy(jnp.asarray(x))) == pytest.approx(expected, rel=1e-5)


def test_without_funsor_the_note_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro.contrib.funsor", None)
    monkeypatch.setitem(sys.modules, "funsor", None)
    with pytest.raises(ImportError) as caught:
        target_from_model(counted, (Y[0],))
    assert "diffsamp[enum]" in " ".join(caught.value.__notes__)


def test_unmarked_discrete_sites_are_warned_of():
    pytest.importorskip("funsor")

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0))

    with pytest.warns(FutureWarning, match="discrete latent site z"):
        target_from_model(model)


@pytest.mark.parametrize("how", ["factor", "scale", "mask"])
def test_log_z_is_that_of_the_modified_density(how, x64):
    """A third of the likelihood's power, whichever way it is written."""

    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        likelihood = dist.Normal(mean, 1.0)
        if how == "factor":
            numpyro.factor("part", likelihood.log_prob(y)[0])
        elif how == "scale":
            with numpyro.handlers.scale(scale=1 / 3):
                numpyro.sample("y", likelihood, obs=jnp.full(3, y[0]))
        else:
            mask = jnp.array([True, False, False])
            numpyro.sample("y", likelihood.mask(mask), obs=y)

    target = target_from_model(model, (Y,))
    grid = np.linspace(-12, 12, 4_001)
    density = np.exp(-jax.jit(jax.vmap(target.energy))(jnp.asarray(grid)[:, None]))
    expected = scipy.stats.norm.pdf(Y[0], 0, np.sqrt(2))
    assert np.trapezoid(density, grid) == pytest.approx(expected, rel=1e-5)
