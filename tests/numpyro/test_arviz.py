"""Results in ArviZ, whichever of its two lines is installed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from diffsamp.numpyro import DiffusionSampler

with warnings.catch_warnings():  # ArviZ announces its next version on import
    warnings.simplefilter("ignore")
    arviz = pytest.importorskip("arviz")

pytestmark = pytest.mark.relaxed("dtypes", "ranks")

Y = jnp.array([0.5, 1.5, 1.0])


def model(y=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    with numpyro.plate("group", 2):
        effect = numpyro.sample("effect", dist.Normal(mean, 1.0))
    numpyro.deterministic("difference", effect[0] - effect[1])
    with numpyro.plate("data", 3):
        numpyro.sample("y", dist.Normal(effect.sum(), 1.0), obs=y)


@pytest.fixture(scope="module")
def inference():
    made = DiffusionSampler(model, num_steps=2, num_particles=64)
    made.fit(jax.random.key(0), 1, y=Y, progress_bar=False)
    made.run(jax.random.key(1), 50, y=Y)
    return made


@pytest.mark.filterwarnings("ignore:fill_missing_values")
def test_groups_dimensions_and_signs(inference):
    found = inference.to_arviz(log_likelihood=True)
    assert dict(found.posterior.sizes)["draw"] == 50
    assert found.posterior["effect"].dims == ("chain", "draw", "group")
    assert {"mean", "effect", "difference"} <= set(found.posterior.data_vars)
    samples = inference.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(found.posterior["mean"], samples["mean"])
    fields = inference.get_extra_fields(group_by_chain=True)
    lp = np.asarray(found.sample_stats["lp"])
    np.testing.assert_allclose(lp, -fields["potential_energy"], rtol=1e-6)
    weights = np.asarray(found.sample_stats["log_weight"])
    np.testing.assert_allclose(weights, fields["log_weight"], rtol=1e-6)
    assert found.log_likelihood["y"].shape == (1, 50, 3)
    np.testing.assert_array_equal(found.observed_data["y"], Y)


def test_nothing_is_drawn_yet():
    with pytest.raises(RuntimeError, match="call run"):
        DiffusionSampler(model).to_arviz()
