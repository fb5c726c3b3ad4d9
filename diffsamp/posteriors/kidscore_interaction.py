"""Test scores of children by their mothers' schooling and test score.

Raw predictors and their product: scales differ a hundredfold and coefficients correlate
to 0.99.

Sources: Gelman, Hill, "Data analysis using regression and multilevel/hierarchical
models", 2006 (data); posteriordb, `kidiq-kidscore_interaction`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from diffsamp.posteriors.posterior import Posterior, evidence_of, load_json
from diffsamp.types import Array


def model(kid_score: Array, mom_hs: Array, mom_iq: Array):
    """The NumPyro model; flat coefficients.

    Args:
        kid_score: scores of the children, [434].
        mom_hs: whether the mother finished high school, 0 or 1, [434].
        mom_iq: score of the mother, [434].
    """
    beta = jnp.asarray(
        numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), (4,)))
    )
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
    numpyro.sample("obs", dist.Normal(mean, sigma), obs=kid_score)


def data() -> dict[str, np.ndarray]:
    """The three columns, [434] each."""
    stored = load_json("kidiq.json")
    columns = ("kid_score", "mom_hs", "mom_iq")
    return {name: np.array(stored[name], float) for name in columns}


def kidscore_interaction() -> Posterior:
    """Regression with an interaction, D = 5; improper priors, so no evidence.

    Returns:
        A :class:`~diffsamp.posteriors.Posterior`.
    """
    return Posterior(
        name="kidscore_interaction",
        model=model,
        data=data,
        shapes={"beta": (4,), "sigma": ()},
        dim=5,
        **evidence_of("kidscore_interaction"),
        note="scales differ 100-fold, coefficients correlate to 0.99; flat priors",
    )
