"""Gaussians: any mean and covariance, and a spike inside a slab."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import (
    cast,
    default_float,
    point,
    require_dim,
    root_mean_square,
)
from diffsamp.types import Modes, Target


def _gaussian_energy(mean, whiten, log_scale, x):
    x = point(x, mean.shape[0])
    mean, whiten, log_scale = cast(x.dtype, mean, whiten, log_scale)
    z = jnp.matmul(whiten, x - mean, precision="highest")
    return 0.5 * jnp.sum(z**2) - log_scale


def _gaussian_sample(mean, factor, key, n):
    mean, factor = cast(default_float(), mean, factor)
    z = jax.random.normal(key, (n, mean.shape[0]), mean.dtype)
    return mean[None, :] + jnp.matmul(z, factor.T, precision="highest")


def gaussian(
    mean: Any = (1.0, -2.0),
    covariance: Any = ((2.0, 0.9), (0.9, 1.0)),
    *,
    log_z: float = 0.0,
) -> Target:
    r"""Gaussian with any mean, covariance and normalising constant.

    .. math:: \rho(x) = e^{\log Z} N(x; m, C)

    A ``log_z`` other than 0 lets a test catch a lost normaliser.

    Args:
        mean: centre m, [D].
        covariance: variance of every coordinate [], variances [D] or matrix [D, D].
        log_z: log of the integral of rho.

    Raises:
        ValueError: when the shapes disagree or the covariance is not positive definite.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.gaussian((3.0,), 0.25, log_z=1.5).log_z
        1.5
    """
    mean = np.asarray(mean, float)
    covariance = np.asarray(covariance, float)
    if mean.ndim != 1:
        raise ValueError(f"mean must have shape [D], got shape {mean.shape}")
    dim = mean.shape[0]
    if covariance.shape not in ((), (dim,), (dim, dim)):
        raise ValueError(
            f"covariance must have shape (), ({dim},) or ({dim}, {dim}), "
            f"got shape {covariance.shape}"
        )
    if covariance.ndim < 2:
        covariance = np.diag(np.broadcast_to(covariance, (dim,)))
    if not np.allclose(covariance, covariance.T):
        raise ValueError("covariance must be symmetric")
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError as error:
        raise ValueError("covariance must be positive definite") from error
    log_scale = (
        log_z - 0.5 * dim * math.log(2 * math.pi) - np.sum(np.log(np.diag(factor)))
    )
    return Target(
        energy=Partial(
            _gaussian_energy, mean, np.linalg.inv(factor), np.asarray(log_scale)
        ),
        dim=dim,
        name="gaussian",
        log_z=float(log_z),
        sample=Partial(_gaussian_sample, mean, factor),
        scale=root_mean_square(mean, np.sqrt(np.diag(covariance))),
    )


def _spike_and_slab_terms(means, scales, weights, x):
    means, scales, weights = cast(x.dtype, means, scales, weights)
    z = (x[None, :] - means) / scales[:, None]
    normaliser = x.shape[0] * (jnp.log(scales) + 0.5 * math.log(2 * math.pi))
    return jnp.log(weights) - 0.5 * jnp.sum(z**2, axis=1) - normaliser


def _spike_and_slab_energy(means, scales, weights, x):
    x = point(x, means.shape[1])
    return -jax.nn.logsumexp(_spike_and_slab_terms(means, scales, weights, x))


def _spike_and_slab_assign(means, scales, weights, x):
    x = point(x, means.shape[1])
    return jnp.argmax(_spike_and_slab_terms(means, scales, weights, x))


def _spike_and_slab_sample(means, scales, weights, key, n):
    means, scales, weights = cast(default_float(), means, scales, weights)
    key_component, key_z = jax.random.split(key)
    u = jax.random.uniform(key_component, (n,), means.dtype)
    component = (u < weights[1]).astype(int)
    z = jax.random.normal(key_z, (n, means.shape[1]), means.dtype)
    return means[component] + scales[component][:, None] * z


def spike_and_slab(dim: int = 10) -> Target:
    r"""Phase transition: a narrow spike with most of the mass inside a broad slab.

    .. math:: \rho(x) = 0.1\, N(x; 0, 2^2 I) + 0.9\, N(x; 1, 0.05^2 I)

    log Z = 0. On the way from a broad reference the spike wins only at the very end,
    through a jump of about ``D log 40`` in energy. Tempering, plain or learned, tends
    to report the slab alone, an error of log 10 in log Z (blackjax sampling-book #96).
    Mode 0 is the slab, mode 1 the spike, separated by the larger responsibility.

    Args:
        dim: dimension D, at least 5 (below, spike and slab overlap).

    Raises:
        ValueError: when ``dim`` is less than 5.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.spike_and_slab().modes.weights.tolist()[0] < 0.11
        True
    """
    require_dim(dim, "at least 5", dim >= 5)
    means = np.stack([np.zeros(dim), np.ones(dim)])
    scales = np.array([2.0, 0.05])
    weights = np.array([0.1, 0.9])
    data = (means, scales, weights)
    return Target(
        energy=Partial(_spike_and_slab_energy, *data),
        dim=dim,
        name="spike_and_slab" if dim == 10 else f"spike_and_slab_{dim}",
        log_z=0.0,
        sample=Partial(_spike_and_slab_sample, *data),
        modes=Modes(jnp.asarray(weights), Partial(_spike_and_slab_assign, *data)),
        scale=2.0,
    )
