"""Counts with a latent Gaussian process.

Source: posteriordb, `gp_pois_regr`; simulated data of Stan's benchmarks.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from diffsamp.posteriors.posterior import Posterior, evidence_of, load_json
from diffsamp.types import Array


def model(x: Array, k: Array, jitter: float = 1e-10):
    """The NumPyro model.

    In 32 bits the Cholesky factor is NaN for ``rho`` of about 6 to 7 and above, inside
    the posterior: set ``jax_enable_x64``.

    Args:
        x: places, [11].
        k: counts there, [11].
        jitter: added to the variance.
    """
    rho = jnp.asarray(numpyro.sample("rho", dist.Gamma(25.0, 4.0)))
    alpha = jnp.asarray(numpyro.sample("alpha", dist.HalfNormal(2.0)))
    standard = dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1)
    f_tilde = jnp.asarray(numpyro.sample("f_tilde", standard))
    square = (x[:, None] - x[None, :]) ** 2
    covariance = alpha**2 * jnp.exp(-0.5 * square / rho**2) + jitter * jnp.eye(len(x))
    f = numpyro.deterministic("f", jnp.linalg.cholesky(covariance) @ f_tilde)
    numpyro.sample("obs", dist.Poisson(jnp.exp(f)), obs=k)


def data() -> dict[str, np.ndarray]:
    """Places ``x`` and counts ``k``, [11] each."""
    stored = load_json("gp_pois_regr.json")
    return {"x": np.array(stored["x"], float), "k": np.array(stored["k"], int)}


def gp_pois_regr() -> Posterior:
    """Latent Gaussian process, D = 13; ``f`` is a deterministic site.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    return Posterior(
        name="gp_pois_regr",
        model=model,
        data=data,
        shapes={"rho": (), "alpha": (), "f": (11,)},
        dim=13,
        x64=True,
        **evidence_of("gp_pois_regr"),
        note="ill-conditioned covariance",
    )
