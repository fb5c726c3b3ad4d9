"""Neal's funnel, easy and hard."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import capped_exp, cast, default_float, point, require_dim
from diffsamp.types import Target


def _energy(scales, x):
    dim = scales.shape[0]
    x = point(x, dim)
    (scales,) = cast(x.dtype, scales)
    z = x / scales
    narrow = 0.5 * jnp.sum(z[1:] ** 2) * capped_exp(-x[0]) + 0.5 * (dim - 1) * x[0]
    log_normaliser = jnp.sum(jnp.log(scales)) + 0.5 * dim * math.log(2 * math.pi)
    return 0.5 * z[0] ** 2 + narrow + log_normaliser


def _sample(scales, key, n):
    (scales,) = cast(default_float(), scales)
    z = scales[None, :] * jax.random.normal(key, (n, scales.shape[0]), scales.dtype)
    return jnp.concatenate([z[:, :1], z[:, 1:] * jnp.exp(0.5 * z[:, :1])], axis=1)


def _funnel(name, sigma, dim):
    require_dim(dim, "at least 2", dim >= 2)
    scales = np.ones(dim)
    scales[0] = sigma
    return Target(
        energy=Partial(_energy, scales),
        dim=dim,
        name=name if dim == 10 else f"{name}_{dim}",
        log_z=0.0,
        sample=Partial(_sample, scales),
        scale=sigma,
    )


def funnel_easy(dim: int = 10) -> Target:
    r"""Funnel whose mouth has standard deviation 1.

    .. math:: x_1 \sim N(0, 1), \quad x_i \mid x_1 \sim N(0, e^{x_1}), \quad i \ge 2

    log Z = 0 (normalised). The setting of PIS, called easy funnel by Sendera et al.
    2024. Each x_i has standard deviation exp(1/4) = 1.28. ``scale`` is that of x_1.

    Args:
        dim: dimension D, at least 2.

    Raises:
        ValueError: when ``dim`` is less than 2.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.funnel_easy().dim
        10
    """
    return _funnel("funnel_easy", 1.0, dim)


def funnel_hard(dim: int = 10) -> Target:
    r"""Neal's funnel, whose mouth has standard deviation 3.

    .. math:: x_1 \sim N(0, 3^2), \quad x_i \mid x_1 \sim N(0, e^{x_1}), \quad i \ge 2

    log Z = 0 (normalised). From Neal 2003, as in AFT, DIS and Blessing et al. 2024.
    Each x_i has standard deviation exp(9/4) = 9.49, but estimates of its second moment
    are useless: their variance involves exp(18). Some papers clip reference draws to
    [-30, 30]; `sample` does not. ``scale`` is the standard deviation of x_1.

    Args:
        dim: dimension D, at least 2; sigma stays 3 (some codes tie it to D).

    Raises:
        ValueError: when ``dim`` is less than 2.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.funnel_hard().log_z
        0.0
    """
    return _funnel("funnel_hard", 3.0, dim)
