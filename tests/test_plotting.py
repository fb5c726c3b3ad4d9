"""Figures: every result can be drawn, however bad it is."""

import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import diffsamp as ds

matplotlib.use("Agg")
TARGET = ds.targets.gmm9()
SAMPLER = ds.samplers.dis(
    2,
    4,
    scale=4.0,
    network=ds.networks.from_function(
        lambda key, dim: jnp.zeros(dim), lambda params, x, t, context: params + 0.0 * x
    ),
)
NAN = np.full(500, np.nan)


@pytest.fixture(scope="module")
def draws():
    params = SAMPLER.init(jax.random.key(0))
    return ds.draw(jax.random.key(1), SAMPLER, params, TARGET.energy, 200)


def drawn(figure):
    figure.draw_without_rendering()
    return {axis.get_title(): axis for axis in figure.axes}


def test_what_is_shown(draws):
    elbo = np.where(np.arange(500) % 2, np.nan, np.linspace(-3.0, -1.0, 500))
    bars = {"truth": np.ones(9) / 9, "sampler": np.arange(9) / 36}
    figure = ds.plotting.overview(
        draws,
        {"elbo": elbo},
        log_z=0.0,
        points={"exact": np.asarray(TARGET.sample(jax.random.key(2), 50))},
        bars=bars,
        labels=("a", "b"),
    )
    axes = drawn(figure)
    assert list(axes) == ["draws", "log weights", "training", "mode weights"]
    assert (axes["draws"].get_xlabel(), axes["draws"].get_ylabel()) == ("a", "b")
    exact, own = axes["draws"].collections
    assert len(exact.get_offsets()) == 50
    np.testing.assert_allclose(own.get_offsets(), draws.x)
    size, weight = own.get_sizes(), np.exp(draws.log_weight)
    plain = (size > 0.2) & (size < 60)
    ratio = size[plain] / weight[plain]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    curve = axes["training"].lines[0].get_ydata()
    assert np.all(np.diff(curve) > 0)
    assert len(axes["mode weights"].patches) == 18
    assert draws.diagnostics.verdict in figure.get_suptitle()


@pytest.mark.parametrize("curve", [{"elbo": NAN}, {"elbo": NAN[:0]}, {}, None])
def test_a_training_curve_without_on_policy_paths(draws, curve):
    axis = drawn(ds.plotting.overview(draws, curve))["training"]
    assert not axis.lines


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_weights_that_are_not_numbers(draws, value):
    log_weight = draws.log_weight.copy()
    log_weight[:5] = value
    evidence = draws.log_evidence._replace(estimate=abs(value))
    some = draws._replace(log_weight=log_weight, log_evidence=evidence)
    every = some._replace(log_weight=np.full_like(log_weight, value))
    for one in (some, every, draws._replace(log_weight=None)):
        drawn(ds.plotting.overview(one, log_z=0.0))


def test_one_dimension():
    target = ds.targets.gaussian((1.0,), (4.0,))
    sampler = ds.samplers.dis(1, 2, network=SAMPLER.generation)
    params = sampler.init(jax.random.key(0))
    draws = ds.draw(jax.random.key(1), sampler, params, target.energy, 30)
    drawn(ds.plotting.overview(draws))


def test_without_matplotlib(draws, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install diffsamp\[plots\]"):
        ds.plotting.overview(draws)
