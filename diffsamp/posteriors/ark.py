"""Autoregression of order five; nearly normal, of small scales.

Source: posteriordb, `arK-arK`; simulated data of Stan's benchmarks.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from diffsamp.posteriors.posterior import Posterior, evidence_of, load_json


def model(y: np.ndarray, num_lags: int):
    """The NumPyro model, given the first ``num_lags`` values.

    Args:
        y: the series, [200].
        num_lags: order of the autoregression.
    """
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = jnp.asarray(
        numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([num_lags]).to_event(1))
    )
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = np.stack([y[num_lags - k : len(y) - k] for k in range(1, num_lags + 1)], 1)
    numpyro.sample("obs", dist.Normal(alpha + lags @ beta, sigma), obs=y[num_lags:])


def data() -> dict[str, Any]:
    """The series ``y`` [200] and its ``num_lags``."""
    stored = load_json("ark.json")
    return {"y": np.array(stored["y"], float), "num_lags": int(stored["K"])}


def ark() -> Posterior:
    """Autoregression, D = 7.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    return Posterior(
        name="ark",
        model=model,
        data=data,
        shapes={"alpha": (), "beta": (5,), "sigma": ()},
        dim=7,
        **evidence_of("ark"),
        note="nearly normal, of small scales",
    )
