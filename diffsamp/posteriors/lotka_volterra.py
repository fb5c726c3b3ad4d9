"""Hares and lynxes: a predator-prey equation with log-normal errors.

Sources: Howard, "Modeling basics", 2009 (data, after Hewitt 1921); posteriordb,
`hudson_lynx_hare-lotka_volterra`. The equation is solved for the logarithms of the
populations by Runge-Kutta steps of fixed size, which keeps them positive.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from diffsamp.posteriors.posterior import Posterior, evidence_of, load_json
from diffsamp.types import Array

_LOC = jnp.array([1.0, 0.05, 1.0, 0.05])
_SCALE = jnp.array([0.5, 0.05, 0.5, 0.05])


def model(y_init: Array, y: Array, steps_per_year: int = 10):
    """The NumPyro model.

    Args:
        y_init: both populations in the first year, [2].
        y: in the years after it, [20, 2].
        steps_per_year: Runge-Kutta steps.
    """
    rates = dist.TruncatedNormal(_LOC, _SCALE, low=0.0).to_event(1)
    alpha, beta, gamma, delta = jnp.asarray(numpyro.sample("theta", rates))
    start = dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1)
    z_init = jnp.asarray(numpyro.sample("z_init", start))
    errors = dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1)
    sigma = numpyro.sample("sigma", errors)

    def growth(log_z):
        hares, lynxes = jnp.exp(log_z)
        return jnp.stack([alpha - beta * lynxes, -gamma + delta * hares])

    def step(log_z, _):
        return _runge_kutta(growth, log_z, 1.0 / steps_per_year), None

    def year(log_z, _):
        log_z, _ = jax.lax.scan(step, log_z, None, length=steps_per_year)
        return log_z, log_z

    log_z0 = jnp.log(z_init)
    _, log_z = jax.lax.scan(year, log_z0, None, length=len(y))
    numpyro.sample("obs_init", dist.LogNormal(log_z0, sigma), obs=y_init)
    numpyro.sample("obs", dist.LogNormal(log_z, sigma), obs=y)


def _runge_kutta(rate, x, h):
    first = rate(x)
    second = rate(x + 0.5 * h * first)
    third = rate(x + 0.5 * h * second)
    fourth = rate(x + h * third)
    return x + h / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)


def data() -> dict[str, np.ndarray]:
    """Populations (hares, lynxes) in the first year [2] and the 20 after it."""
    stored = load_json("hudson_lynx_hare.json")
    return {name: np.array(stored[name], float) for name in ("y_init", "y")}


def lotka_volterra() -> Posterior:
    """Predator and prey, D = 8.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    return Posterior(
        name="lotka_volterra",
        model=model,
        data=data,
        shapes={"theta": (4,), "z_init": (2,), "sigma": (2,)},
        dim=8,
        **evidence_of("lotka_volterra"),
        note="costly gradients, strong correlations, false modes far away",
    )
