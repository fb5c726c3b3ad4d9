"""Brownian motion with unknown scales and a gap in the observations."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import capped_exp, cast, default_float, point, read_csv
from diffsamp.types import Target

_LOG_SCALE_SD = 2.0
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _log_softplus(z):
    far = z < -15.0
    near = jnp.log(jax.nn.softplus(jnp.where(far, 0.0, z)))
    return jnp.where(far, z - 0.5 * jnp.exp(jnp.where(far, z, 0.0)), near)


def _log_normal(residuals, log_sd, count):
    """Sum of ``count`` Gaussian log-densities, also for tiny standard deviations."""
    squares = jnp.sum(residuals**2)
    return -0.5 * squares * capped_exp(-2.0 * log_sd) - count * (log_sd + _HALF_LOG_2PI)


def _log_prior(observed, x):
    x = point(x, observed.shape[0] + 2)
    log_scales = _log_softplus(x[:2])
    # The scales are log-normal; sigmoid(z) is the Jacobian of softplus.
    log_p = jnp.sum(
        -0.5 * (log_scales / _LOG_SCALE_SD) ** 2
        - (log_scales + math.log(_LOG_SCALE_SD) + _HALF_LOG_2PI)
        + jax.nn.log_sigmoid(x[:2])
    )
    steps = jnp.diff(x[2:], prepend=jnp.zeros(1, x.dtype))
    return log_p + _log_normal(steps, log_scales[0], steps.shape[0])


def _log_likelihood(observed, present, x):
    x = point(x, observed.shape[0] + 2)
    observed, present = cast(x.dtype, observed, present)
    log_scale = _log_softplus(x[1])
    return _log_normal(present * (x[2:] - observed), log_scale, jnp.sum(present))


def _energy(observed, present, x):
    return -_log_prior(observed, x) - _log_likelihood(observed, present, x)


def _sample_prior(observed, key, n):
    dtype = default_float()
    key_scale, key_steps = jax.random.split(key)
    scales = jnp.exp(_LOG_SCALE_SD * jax.random.normal(key_scale, (n, 2), dtype))
    steps = jax.random.normal(key_steps, (n, observed.shape[0]), dtype)
    locations = jnp.cumsum(scales[:, :1] * steps, axis=1)
    return jnp.concatenate([scales + jnp.log(-jnp.expm1(-scales)), locations], axis=1)


def _constrain(x):
    scales = jax.nn.softplus(x[:2])
    return {
        "innovation_scale": scales[0],
        "observation_scale": scales[1],
        "locations": x[2:],
    }


def brownian() -> Target:
    r"""Brownian motion observed with noise, ten observations missing, 32-D.

    .. math:: s, o \sim \mathrm{LogNormal}(0, 2), \quad x_1 \sim N(0, s^2), \quad
              x_t \sim N(x_{t-1}, s^2), \quad y_t \sim N(x_t, o^2), \; t \notin 11..20

    Coordinates: inverse softplus of s and of o, then x_1..x_30, with the Jacobian. log
    Z = 1.187749, exact: Gaussian given the scales, 2-D quadrature over them. Inference
    Gym's model, as in Blessing et al. 2024. Its stored moments are off by up to 0.12
    standard deviations, and NUTS misses part of the left tail of coordinate 1 (o -> 0).

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.brownian().log_z
        1.187749
    """
    observed = read_csv("brownian_missing_middle.csv")[:, 1]
    present = np.isfinite(observed)
    observed = np.where(present, observed, 0.0)
    present = present.astype(float)
    return Target(
        energy=Partial(_energy, observed, present),
        dim=observed.shape[0] + 2,
        name="brownian",
        log_z=1.187749,
        scale=1.0,
        log_prior=Partial(_log_prior, observed),
        log_likelihood=Partial(_log_likelihood, observed, present),
        sample_prior=Partial(_sample_prior, observed),
        constrain=Partial(_constrain),
    )
