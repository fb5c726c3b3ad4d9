"""The BUGS seeds example: a binomial regression with random effects."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import capped_exp, cast, point, read_csv
from diffsamp.types import Target

_GAMMA = 0.01
_COEFFICIENT_SD = 10.0


def _log_prior(design, x):
    x = point(x, design.shape[0] + 5)
    coefficients, effects, log_tau = x[:4], x[4:-1], x[-1]
    log_normal = 0.5 * math.log(2 * math.pi)
    tau = capped_exp(log_tau)
    log_gamma = (
        _GAMMA * math.log(_GAMMA) - math.lgamma(_GAMMA) + _GAMMA * (log_tau - tau)
    )
    log_coefficients = -0.5 * jnp.sum((coefficients / _COEFFICIENT_SD) ** 2) - 4 * (
        log_normal + math.log(_COEFFICIENT_SD)
    )
    log_effects = -0.5 * tau * jnp.sum(effects**2) + effects.shape[0] * (
        0.5 * log_tau - log_normal
    )
    return log_gamma + log_coefficients + log_effects


def _log_likelihood(design, germinated, sown, log_binomial, x):
    x = point(x, design.shape[0] + 5)
    design, germinated, sown, log_binomial = cast(
        x.dtype, design, germinated, sown, log_binomial
    )
    logits = jnp.matmul(design, x[:4], precision="highest") + x[4:-1]
    return log_binomial + jnp.sum(germinated * logits - sown * jax.nn.softplus(logits))


def _energy(design, germinated, sown, log_binomial, x):
    data = (design, germinated, sown, log_binomial)
    return -_log_prior(design, x) - _log_likelihood(*data, x)


def _constrain(x):
    return {
        "a_0": x[0],
        "a_1": x[1],
        "a_12": x[2],
        "a_2": x[3],
        "b": x[4:-1],
        "tau": jnp.exp(x[-1]),
    }


def seeds() -> Target:
    r"""Germination of seeds on 21 plates, with a random effect each, 26-D.

    .. math:: \tau \sim \Gamma(0.01, \text{rate } 0.01), \quad a \sim N(0, 10^2 I),
              \quad b_j \sim N(0, 1/\tau) \\
              r_j \sim \mathrm{Binomial}(n_j, \mathrm{sigmoid}(
              a_0 + a_1 x_{1j} + a_2 x_{2j} + a_{12} x_{1j} x_{2j} + b_j))

    Coordinates: a_0, a_1, a_12, a_2, b_1..b_21, log tau, with the Jacobian and the
    binomial coefficients. log Z = -73.4055 +- 0.0009 (Gauss-Hermite over b, importance
    sampling of the rest). Crowder 1978, as in Geffner and Domke 2023 and Blessing et
    al. 2024. Funnel-like in (log tau, b). There is no `sample_prior`: the prior
    gives a sixth of its mass to b so large that float32 overflows.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.seeds().log_z
        -73.4055
    """
    germinated, sown, x1, x2 = read_csv("seeds.csv").T
    design = np.column_stack([np.ones_like(x1), x1, x1 * x2, x2])
    log_binomial = sum(
        math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)
        for r, n in zip(germinated, sown, strict=True)
    )
    data = (design, germinated, sown, np.asarray(log_binomial))
    return Target(
        energy=Partial(_energy, *data),
        dim=26,
        name="seeds",
        log_z=-73.4055,
        scale=1.0,
        log_prior=Partial(_log_prior, design),
        log_likelihood=Partial(_log_likelihood, *data),
        constrain=Partial(_constrain),
    )
