"""The texts a user reads: a table of weighted draws, and the verdict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

CONTROL = ds.networks.from_function(
    lambda key, dim: jnp.zeros(dim), lambda params, x, t, context: params + 0.0 * x
)


def draws_of_gmm9(loc, scale):
    target = ds.targets.gmm9()
    sampler = ds.samplers.dis(2, 4, loc=loc, scale=scale, network=CONTROL)
    return ds.draw(
        jax.random.key(1),
        sampler,
        sampler.init(jax.random.key(0)),
        target.energy,
        1_000,
        probe=target.sample(jax.random.key(2), 1_000),
    )


@pytest.mark.parametrize("log_weight", [None, np.log([1.0, 1.0, 8.0])])
def test_every_scalar_has_a_row(log_weight):
    x = np.array([[1.0, 10.0], [2.0, 30.0], [3.0, 20.0]])
    lines = ds.summary({"a": x[:, 0], "b": x}, log_weight, prob=0.8).splitlines()
    assert lines[0].split() == ["mean", "std", "median", "10.0%", "90.0%", "ess"]
    assert [line.split()[0] for line in lines[1:]] == ["a", "b[0]", "b[1]"]
    mean, _, median, *_, ess = map(float, lines[1].split()[1:])
    weights = np.ones(3) / 3 if log_weight is None else np.exp(log_weight) / 10
    assert mean == pytest.approx(weights @ x[:, 0], abs=0.005)
    assert median == (2.0 if log_weight is None else 3.0)
    assert ess == pytest.approx(1 / np.sum(weights**2), abs=0.005)
    with pytest.raises(ValueError, match=r"prob must lie in \(0, 1\), got 1.0"):
        ds.summary(x, prob=1.0)


def test_a_lost_mode_is_loud():
    lost = draws_of_gmm9(loc=5.0, scale=0.55)
    lines = ds.verdict_lines(lost, log_z=0.0).splitlines()
    assert lost.diagnostics.collapsed
    assert lines[0].startswith("COLLAPSED")
    assert "(true value 0.000)" in lines[1]
    assert lines[-1].startswith("verdict          do not trust")
    kept = draws_of_gmm9(loc=0.0, scale=4.0)
    assert not kept.diagnostics.collapsed
    assert "COLLAPSED" not in ds.verdict_lines(kept)
