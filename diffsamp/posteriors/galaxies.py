"""Mixture of three Gaussians for the velocities of 82 galaxies.

Nothing tells the components apart, so the posterior is the sum of 3! = 6 copies, one
for each labelling. Within each there is a minor mode in which the third component does
not sit on the fastest galaxies but under the main group.

Sources: Roeder, "Density estimation with confidence sets exemplified by superclusters
and voids in the galaxies", JASA 1990 (data); Richardson, Green, "On Bayesian analysis
of mixtures with an unknown number of components", JRSS B 1997 (label switching).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from diffsamp.numpyro import ModelTarget
from diffsamp.posteriors.posterior import Posterior, load_json
from diffsamp.types import Array, Modes

# A fastest component above this sits on the three fastest galaxies.
_FAST = 26.0


def model(y: Array, num_components: int = 3):
    """The NumPyro model.

    Args:
        y: velocities in 1000 km/s, [82].
        num_components: number of components; the reference is for 3.
    """
    ones = jnp.ones(num_components)
    w = numpyro.sample("w", dist.Dirichlet(2.0 * ones))
    mu = numpyro.sample("mu", dist.Normal(21.0 * ones, 7.0).to_event(1))
    sigma = numpyro.sample(
        "sigma", dist.LogNormal(math.log(2.0) * ones, 0.5).to_event(1)
    )
    mu, sigma = jnp.expand_dims(mu, 0), jnp.expand_dims(sigma, 0)
    parts = jnp.log(w)[None] + dist.Normal(mu, sigma).log_prob(y[:, None])
    numpyro.factor("obs", jax.nn.logsumexp(parts, axis=-1).sum())


def data() -> dict[str, np.ndarray]:
    """The velocities, ``{"y": [82]}``, in 1000 km/s."""
    return {"y": np.array(load_json("galaxies.json")["y"])}


def galaxies_mixture() -> Posterior:
    """Galaxy velocities under an exchangeable mixture: 6 exact copies, D = 8.

    ``modes`` are the labellings (index: the order of the means, lexicographic in the
    component that is slowest, middle, fastest), each of weight exactly 1/6.
    ``minor_modes`` split each by whether the fastest mean is below 26, which has
    posterior probability 0.238 +- 0.001; index ``2 * labelling + (mean >= 26)``.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.

    Example:
        >>> from diffsamp.posteriors import galaxies_mixture
        >>> galaxies_mixture().modes.weights.shape
        (6,)
    """
    reference = load_json("galaxies_mixture_reference.json")
    slow = reference["modes"]["P(largest mean < 26)"][0]
    return Posterior(
        name="galaxies_mixture",
        model=model,
        data=data,
        shapes={"w": (3,), "mu": (3,), "sigma": (3,)},
        dim=8,
        log_evidence=reference["log_evidence"]["value"],
        log_evidence_se=reference["log_evidence"]["se"],
        modes=Modes(jnp.full(6, 1.0 / 6.0), _labelling),
        minor_modes=Modes(jnp.tile(jnp.array([slow, 1.0 - slow]) / 6.0, 6), _cell),
        note="label switching: 6 exact copies, and minor modes within each",
    )


def target() -> ModelTarget:
    """``galaxies_mixture().target()``: the posterior with log Z and modes filled in."""
    return galaxies_mixture().target()


def _labelling(x: Array) -> Array:
    mu = x[:3]  # flat order is by site name: mu, sigma, w; mu is not constrained
    order = jnp.argsort(mu)
    return 2 * order[0] + jnp.where(order[1] > order[2], 1, 0)


def _cell(x: Array) -> Array:
    return 2 * _labelling(x) + jnp.where(jnp.max(x[:3]) >= _FAST, 1, 0)
