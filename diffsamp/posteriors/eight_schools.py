"""Effects of coaching in eight schools, in two parametrisations.

The same posterior twice: given (mu, tau) directly, the effects form a funnel whose
scale is tau; through standardised effects they do not.

Sources: Rubin, "Estimation in parallel randomized experiments", 1981 (data);
posteriordb, `eight_schools`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from diffsamp.posteriors.posterior import Posterior, evidence_of, load_json
from diffsamp.types import Array


def centered(y: Array, sigma: Array):
    """The NumPyro model with the funnel.

    Args:
        y: estimated effects, [8].
        sigma: their standard errors, [8].
    """
    mu = jnp.asarray(numpyro.sample("mu", dist.Normal(0.0, 5.0)))
    tau = jnp.asarray(numpyro.sample("tau", dist.HalfCauchy(5.0)))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def noncentered(y: Array, sigma: Array):
    """The NumPyro model in standardised effects.

    Args:
        y: estimated effects, [8].
        sigma: their standard errors, [8].
    """
    mu = jnp.asarray(numpyro.sample("mu", dist.Normal(0.0, 5.0)))
    tau = jnp.asarray(numpyro.sample("tau", dist.HalfCauchy(5.0)))
    with numpyro.plate("schools", len(y)):
        standard = jnp.asarray(numpyro.sample("theta_trans", dist.Normal(0.0, 1.0)))
        theta = numpyro.deterministic("theta", mu + tau * standard)
        numpyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def data() -> dict[str, np.ndarray]:
    """Estimated effects ``y`` [8] and their standard errors ``sigma`` [8]."""
    stored = load_json("eight_schools.json")
    return {name: np.array(stored[name], float) for name in ("y", "sigma")}


def eight_schools_centered() -> Posterior:
    """Eight schools with the funnel, D = 10.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    note = "hierarchical funnel: the scale of theta shrinks with tau"
    return _posterior("eight_schools_centered", centered, note)


def eight_schools_noncentered() -> Posterior:
    """Eight schools without the funnel, D = 10; ``theta`` is a deterministic site.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    note = "the same posterior without the funnel; tau heavy-tailed"
    return _posterior("eight_schools_noncentered", noncentered, note)


def _posterior(name, model, note):
    return Posterior(
        name=name,
        model=model,
        data=data,
        shapes={"theta": (8,), "mu": (), "tau": ()},
        dim=10,
        **evidence_of(name),
        note=note,
    )
