"""AutoDiffusion: SVI's ELBO is the path-space bound, and learning closes the gap."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoGuideList, AutoNormal
from numpyro.infer.importance import psis_diagnostic
from tables import mostly_slow

import diffsamp as ds
from diffsamp.numpyro import AutoDiffusion, PathELBO, target_from_model

pytestmark = pytest.mark.relaxed("dtypes", "ranks")


def model(y=None, num=3):
    """Sites whose order in the trace is not that of their names."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    loc = numpyro.sample("loc", dist.Normal(1.0, 2.0).expand([2]).to_event(1))
    numpyro.deterministic("sum", loc.sum())
    with numpyro.plate("data", num if y is None else len(y)):
        numpyro.sample("y", dist.Normal(loc.sum(), 2.0 + scale), obs=y)


DATA = jnp.array([0.3, 1.4, 0.2])


def small(dim, num_steps, **reference):
    return ds.samplers.dis(
        dim,
        num_steps,
        network=ds.networks.free(width=8, depth=1, learn_variance=True),
        **reference,
    )


def guided(dim, num_steps, **reference):
    network = ds.networks.score_guided(width=8, depth=1)
    return ds.samplers.dis(dim, num_steps, network=network, **reference)


def svi_of(sampler=small, loss=None, rate=1e-3):
    guide = AutoDiffusion(model, sampler=sampler, num_steps=3, loc=0.3, scale=1.2)
    return SVI(model, guide, optax.adam(rate), loss or Trace_ELBO()), guide


@pytest.mark.parametrize("sampler", mostly_slow([small, guided]))
def test_the_elbo_is_that_of_the_paths(sampler):
    svi, guide = svi_of(sampler, Trace_ELBO(num_particles=4_000))
    state = svi.init(jax.random.key(0), DATA)
    params = svi.get_params(state)
    found = -float(svi.evaluate(state, DATA))
    energy = target_from_model(model, (DATA,)).energy  # over the same points
    draws = ds.draw(
        jax.random.key(1), guide.sampler, guide.params_of(params), energy, 4_000
    )
    error = draws.log_weight.std() * np.sqrt(2 / 4_000)
    assert error < 0.2
    assert abs(found - draws.log_evidence.lower) < 4 * error


def test_its_coordinates_are_those_of_the_target():
    """So that what SVI trains moves a chain, too."""
    svi, guide = svi_of()
    svi.init(jax.random.key(0), DATA)
    x = jnp.array([0.3, -1.0, 2.0])
    target = target_from_model(model, (DATA,))
    expected = target.energy(x)
    np.testing.assert_allclose(guide.energy(DATA)(x), expected, rtol=1e-5)
    np.testing.assert_allclose(
        guide._unpack_latent(x)["loc"], target.constrain(x)["loc"], rtol=1e-6
    )


LOSSES = {
    "Trace_ELBO": Trace_ELBO(),
    "Trace_ELBO, 5 particles": Trace_ELBO(num_particles=5),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "RenyiELBO": RenyiELBO(alpha=0.5, num_particles=3),
    "TraceGraph_ELBO": TraceGraph_ELBO(),
}


@pytest.mark.parametrize(
    "name",
    mostly_slow(LOSSES, "Trace_ELBO"),
)
def test_every_elbo_takes_it(name):
    svi, guide = svi_of(loss=LOSSES[name])
    result = svi.run(jax.random.key(0), 5, DATA, progress_bar=False, stable_update=True)
    assert np.all(np.isfinite(result.losses))
    again = svi.run(
        jax.random.key(1), 5, DATA, progress_bar=False, init_state=result.state
    )
    assert np.all(np.isfinite(again.losses))
    draws = guide.sample_posterior(
        jax.random.key(2), again.params, DATA, sample_shape=(4, 2)
    )
    assert draws["loc"].shape == (4, 2, 2)
    assert draws["scale"].shape == draws["sum"].shape == (4, 2)
    np.testing.assert_allclose(draws["sum"], draws["loc"].sum(-1), rtol=1e-5)


def test_the_gradient_of_every_path_bound_is_one():
    """TraceGraph's, too, which asks each site of the guide whether it has one."""
    svi, _ = svi_of()
    params = svi.get_params(svi.init(jax.random.key(0), DATA))

    def gradient(loss):
        key = jax.random.key(5)
        return jax.grad(lambda p: loss.loss(key, p, model, svi.guide, DATA))(params)

    losses = Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()
    first, *others = map(gradient, losses)
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(first))
    assert size > 0.1
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * size),
            first,
            other,
        )


OBJECTIVES = {
    "log_variance": ds.objectives.log_variance,
    "reverse_kl": ds.objectives.reverse_kl,
    "log_derivative": ds.objectives.reverse_kl_log_derivative,
}


@pytest.mark.parametrize("name", mostly_slow(OBJECTIVES, "log_variance"))
def test_our_objectives_as_losses(name):
    """After training by SVI.run the draws' weights are nearly equal."""
    loss = PathELBO(OBJECTIVES[name](), num_particles=64)
    svi, guide = svi_of(loss=loss, rate=1e-2)
    result = svi.run(jax.random.key(0), 300, DATA, progress_bar=False)
    assert np.all(np.isfinite(result.losses))
    energy = guide.energy(DATA)

    def ess(params):
        draws = ds.draw(jax.random.key(1), guide.sampler, params, energy, 1_000)
        return draws.diagnostics.ess_fraction

    before = ess(guide.sampler.init(jax.random.key(0)))
    assert ess(guide.params_of(result.params)) > max(2 * before, 0.3)


def test_losses_that_cannot_be():
    svi, _ = svi_of(loss=PathELBO(ds.objectives.trajectory_balance()))
    with pytest.raises(ValueError, match=r"own paths.*this one has.*diffsamp\.fit"):
        svi.run(jax.random.key(0), 2, DATA, progress_bar=False)
    other = SVI(model, AutoNormal(model), optax.adam(1e-3), PathELBO())
    with pytest.raises(ValueError, match="must be an AutoDiffusion, got AutoNormal"):
        other.run(jax.random.key(0), 2, DATA, progress_bar=False)


@pytest.fixture(scope="module")
def trained():
    svi, guide = svi_of(loss=Trace_ELBO(num_particles=16), rate=1e-2)
    return guide, svi.run(jax.random.key(0), 800, DATA, progress_bar=False)


def test_learning_closes_the_gap(trained):
    guide, result = trained
    energy = target_from_model(model, (DATA,)).energy
    before, after = (
        ds.draw(jax.random.key(1), guide.sampler, params, energy, 4_000).log_evidence
        for params in (
            guide.sampler.init(jax.random.key(0)),
            guide.params_of(result.params),
        )
    )
    assert after.estimate - after.lower < 0.3 * (before.estimate - before.lower)
    assert abs(after.estimate - before.estimate) < 4 * (
        before.standard_error + after.standard_error
    )


def test_predictive_both_ways(trained):
    guide, result = trained
    joint = Predictive(model, guide=guide, params=result.params, num_samples=7)
    assert joint(jax.random.key(3))["y"].shape == (7, 3)
    alone = Predictive(
        guide, params=result.params, num_samples=7, return_sites=["loc", "scale"]
    )
    assert alone(jax.random.key(3), DATA)["loc"].shape == (7, 2)


@pytest.mark.slow
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_in_64_bits(make_key, x64):
    svi, guide = svi_of()
    result = svi.run(make_key(0), 3, DATA, progress_bar=False)
    draws = guide.sample_posterior(make_key(1), result.params, sample_shape=(4,))
    assert result.losses.dtype == draws["loc"].dtype == jnp.float64
    other, _ = svi_of(loss=PathELBO(num_particles=8))
    assert np.all(np.isfinite(other.run(make_key(0), 3, DATA, progress_bar=False)[2]))


@pytest.mark.slow
def test_quantiles_of_a_posterior_that_is_known():
    """Without control the sampler's ends are its reference, here the posterior."""

    def normal():
        numpyro.sample("x", dist.Normal(3.0, 2.0))

    def still(dim, num_steps, **reference):
        control = ds.networks.from_function(
            lambda key, dim: jnp.zeros(dim), lambda params, x, t, context: params
        )
        return ds.samplers.dis(dim, num_steps, network=control, **reference)

    guide = AutoDiffusion(normal, sampler=still, num_steps=4, loc=3.0, scale=2.0)
    svi = SVI(normal, guide, optax.adam(1e-9), Trace_ELBO())
    result = svi.run(jax.random.key(0), 2, progress_bar=False)
    levels = np.array([0.1, 0.5, 0.9])
    found = guide.quantiles(result.params, levels)["x"]
    expected = scipy.stats.norm.ppf(levels, 3.0, 2.0)
    np.testing.assert_allclose(found, expected, atol=0.25)  # 3 standard errors
    np.testing.assert_allclose(guide.median(result.params)["x"], found[1])


@pytest.mark.slow
def test_quantiles(trained):
    guide, result = trained
    quantiles = guide.quantiles(result.params, [0.1, 0.5, 0.9], DATA)
    assert quantiles["loc"].shape == (3, 2)
    assert np.all(np.diff(quantiles["loc"], axis=0) > 0)
    median = guide.median(result.params, DATA)
    np.testing.assert_allclose(median["loc"], quantiles["loc"][1])


@pytest.mark.slow
def test_medians_of_a_network_that_sees_the_score_of_the_data():
    """Arguments of the model may come by name."""

    def about(y):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        numpyro.sample("obs", dist.Normal(loc, 1.0), obs=y)

    guide = AutoDiffusion(about, sampler=guided, num_steps=3)
    svi = SVI(about, guide, optax.adam(1e-3), Trace_ELBO())
    result = svi.run(jax.random.key(0), 3, y=DATA, progress_bar=False)
    median = guide.median(result.params, y=DATA)
    quantiles = guide.quantiles(result.params, [0.5], y=DATA)
    np.testing.assert_allclose(median["loc"], quantiles["loc"][0])


@pytest.mark.slow
def test_data_of_another_size(trained):
    guide, result = trained
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    more = jnp.concatenate([DATA, DATA])
    state = svi.init(jax.random.key(0), more, init_params=result.params)
    losses = svi.run(jax.random.key(1), 3, more, init_state=state, progress_bar=False)
    assert np.all(np.isfinite(losses.losses))
    draws = guide.sample_posterior(
        jax.random.key(0), losses.params, more, sample_shape=(3,)
    )
    assert draws["loc"].shape == (3, 2)


@pytest.mark.slow
def test_numpyros_own_diagnostic_of_a_guide(trained):
    guide, result = trained
    k_hat = psis_diagnostic(
        jax.random.key(0), result.params, model, guide, DATA, num_particles=1_000
    )
    assert k_hat < 0.7


@pytest.mark.slow
def test_in_a_list_of_guides():
    """One site of two; the mean-field part cannot know how they depend."""

    def pair():
        first = numpyro.sample("first", dist.Normal(1.0, 0.5))
        numpyro.sample("second", dist.Normal(first, 0.5))

    guides = AutoGuideList(pair)
    guides.append(AutoNormal(handlers.block(pair, hide=["second"])))
    other = handlers.block(pair, hide=["first"])
    guides.append(AutoDiffusion(other, sampler=small, num_steps=3, loc=0.7, scale=0.6))
    svi = SVI(pair, guides, optax.adam(1e-2), Trace_ELBO(num_particles=8))
    result = svi.run(jax.random.key(0), 800, progress_bar=False)
    gap = 0.5 * np.log(2.0)  # of the best guide without correlation
    assert np.mean(result.losses[-200:]) == pytest.approx(gap, abs=0.15)
    draws = guides.sample_posterior(
        jax.random.key(1), result.params, sample_shape=(4_000,)
    )
    assert draws["first"].shape == draws["second"].shape == (4_000,)
    assert draws["second"].mean() == pytest.approx(1.0, abs=0.2)


@pytest.mark.slow
def test_pickle(trained):
    guide, result = trained
    again = pickle.loads(pickle.dumps(guide))
    draws = again.sample_posterior(
        jax.random.key(0), result.params, DATA, sample_shape=(3,)
    )
    assert draws["loc"].shape == (3, 2)


def test_subsampled_plates_are_refused():
    def subsampled():
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 10, subsample_size=2):
            numpyro.sample("y", dist.Normal(loc, 1.0), obs=jnp.zeros(2))

    guide = AutoDiffusion(subsampled)
    svi = SVI(subsampled, guide, optax.adam(1e-3), Trace_ELBO())
    with pytest.raises(NotImplementedError, match="plate 'data' is subsampled"):
        svi.init(jax.random.key(0))


def test_before_it_has_seen_the_model():
    with pytest.raises(RuntimeError, match="has not seen its model"):
        _ = AutoDiffusion(model).sampler
