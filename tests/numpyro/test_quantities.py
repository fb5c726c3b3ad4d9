"""What verdicts are about: coordinates and sites, as columns."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from diffsamp.numpyro import affine_from, target_from_model
from diffsamp.numpyro.agreement import imprecision
from diffsamp.numpyro.quantities import BLOCK, columns, comparable, constrained

pytestmark = pytest.mark.relaxed("dtypes", "ranks")


def model():
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    numpyro.deterministic("large", tau > 1)
    numpyro.deterministic("one", jnp.ones(2))


@pytest.fixture(scope="module")
def target():
    y = np.random.default_rng(0).normal(size=(500, 3))
    return target_from_model(model).standardised(affine_from(3 * y + 1))


def test_every_site_and_coordinate_is_a_column(target):
    y = np.random.default_rng(1).normal(size=(BLOCK + 10, 3))
    found = columns(target, y)
    free = ["'p' (unconstrained)"] * 2 + ["'tau' (unconstrained)"]
    sites = ["'large'", "'one'", "'one'", *["'p'"] * 3, "'tau'"]
    assert list(found.names) == free + sites
    x = np.stack([target.coordinates.forward(jnp.asarray(row)) for row in y[-3:]])
    np.testing.assert_allclose(found.values[-3:, :3], x, rtol=1e-5)
    np.testing.assert_allclose(found.values[:, -1], np.exp(found.values[:, 2]), 1e-4)
    np.testing.assert_allclose(found.values[:, 6:9].sum(axis=1), 1.0, rtol=1e-5)
    sites = constrained(target, y)
    assert sites["p"].shape == (BLOCK + 10, 3)


def test_what_has_no_spread_or_mean_is_left_out(target):
    y = np.random.default_rng(2).normal(size=(200, 3))
    own, other = comparable(columns(target, y), columns(target, y + 0.1))
    assert "'one'" not in own.names
    assert own.names == other.names
    assert own.values.shape == other.values.shape == (200, 8)
    values = own.values.copy()
    values[3, -1] = np.inf
    kept, _ = comparable(own._replace(values=values), other)
    assert kept.names == own.names
    least = imprecision(kept.values, np.zeros(200))
    assert least.coordinate == 7
    assert least.error == np.inf


def test_too_many_deterministic_numbers_are_left_out(target, monkeypatch):
    monkeypatch.setattr("diffsamp.numpyro.quantities.MOST_COLUMNS", 6)
    found = columns(target, np.zeros((2, 3)))
    assert found.names[3:] == ("'p'",) * 3 + ("'tau'",)
