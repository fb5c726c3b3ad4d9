"""Volatility that depends on the past, GARCH(1, 1).

Source: posteriordb, `garch-garch11`; simulated data of Stan's benchmarks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from diffsamp.posteriors.posterior import Posterior, evidence_of, load_json
from diffsamp.types import Array


def model(y: Array, sigma1: float):
    """The NumPyro model; (alpha1, beta1) flat on the triangle alpha1 + beta1 < 1.

    The upper limit of beta1 depends on alpha1, and the 1 / (1 - alpha1) of its uniform
    distribution is taken out again. (`ImproperUniform` with such a limit gives wrong
    constrained samples in NumPyro 0.22.)

    Args:
        y: the series, [200].
        sigma1: its first standard deviation.
    """
    positive = dist.ImproperUniform(constraints.positive, (), ())
    mu = jnp.asarray(
        numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    )
    alpha0 = jnp.asarray(numpyro.sample("alpha0", positive))
    alpha1 = jnp.asarray(numpyro.sample("alpha1", dist.Uniform(0.0, 1.0)))
    beta1 = jnp.asarray(numpyro.sample("beta1", dist.Uniform(0.0, 1.0 - alpha1)))
    numpyro.factor("flat_beta1", jnp.log1p(-alpha1))

    def step(variance, y):
        variance = alpha0 + alpha1 * (y - mu) ** 2 + beta1 * variance
        return variance, variance

    first = jnp.asarray(sigma1**2, jnp.result_type(float))
    _, rest = jax.lax.scan(step, first, jnp.asarray(y[:-1]))
    variance = jnp.concatenate([first[None], rest])
    numpyro.sample("obs", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def data() -> dict[str, Any]:
    """The series ``y`` [200] and its first standard deviation ``sigma1``."""
    stored = load_json("garch.json")
    return {"y": np.array(stored["y"], float), "sigma1": float(stored["sigma1"])}


def garch11() -> Posterior:
    """GARCH(1, 1), D = 4; improper priors, so no evidence.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    return Posterior(
        name="garch11",
        model=model,
        data=data,
        shapes={"mu": (), "alpha0": (), "alpha1": (), "beta1": ()},
        dim=4,
        **evidence_of("garch11"),
        note="the support of beta1 depends on alpha1; mass runs into its boundary",
    )
