"""Mixture of two Gaussians, told apart by ordered means.

Source: posteriordb, `low_dim_gauss_mix`; simulated data of Stan's benchmarks.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from diffsamp.posteriors.posterior import Posterior, evidence_of, load_json
from diffsamp.types import Array


def model(y: Array):
    """The NumPyro model.

    Args:
        y: observations, [1000].
    """
    ordered = dist.ImproperUniform(constraints.ordered_vector, (), (2,))
    mu = jnp.asarray(numpyro.sample("mu", ordered))
    # Two normals, of which half the space is left: the density doubles.
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum() + math.log(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = jnp.asarray(numpyro.sample("theta", dist.Beta(5.0, 5.0)))
    mu, sigma = jnp.expand_dims(mu, 0), jnp.expand_dims(sigma, 0)
    parts = dist.Normal(mu, sigma).log_prob(y[:, None])
    weights = jnp.stack([jnp.log(theta), jnp.log1p(-theta)])
    numpyro.factor("obs", jax.nn.logsumexp(parts + weights[None], axis=-1).sum())


def data() -> dict[str, np.ndarray]:
    """The observations ``y``, [1000]."""
    return {"y": np.array(load_json("low_dim_gauss_mix.json")["y"], float)}


def low_dim_gauss_mix() -> Posterior:
    """Mixture with ordered means, D = 5.

    The ordered means have an improper site whose prior is a factor, so NumPyro calls
    the model improper although its integral is the evidence.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    return Posterior(
        name="low_dim_gauss_mix",
        model=model,
        data=data,
        shapes={"mu": (2,), "sigma": (2,), "theta": ()},
        dim=5,
        **evidence_of("low_dim_gauss_mix"),
        note="narrow and nearly normal, far from a wide start",
    )
