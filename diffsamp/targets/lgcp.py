"""Log-Gaussian Cox process of the Finnish pine saplings."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.tree_util import Partial

from diffsamp.targets._common import capped_exp, cast, default_float, point, read_csv
from diffsamp.types import Target

_GRID = 40
_DIM = _GRID**2
_VARIANCE = 1.91
_RANGE = _GRID / 33
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@functools.lru_cache
def _prior():
    """Mean [] and Cholesky factor [D, D] of the field, and the counts [D]."""
    points = read_csv("finnish_pines.csv")
    cells = np.minimum(np.floor(points * _GRID).astype(int), _GRID - 1)
    counts = np.zeros((_GRID, _GRID))
    np.add.at(counts, (cells[:, 0], cells[:, 1]), 1.0)
    nodes = np.stack(np.meshgrid(range(_GRID), range(_GRID), indexing="ij"), -1)
    nodes = nodes.reshape(_DIM, 2)
    squared = np.sum((nodes[:, None, :] - nodes[None, :, :]) ** 2, axis=2)
    factor = np.linalg.cholesky(_VARIANCE * np.exp(-np.sqrt(squared) / _RANGE))
    mean = math.log(len(points)) - 0.5 * _VARIANCE
    return np.asarray(mean), factor, counts.reshape(_DIM)


@functools.lru_cache
def _whitening():
    factor = _prior()[1]
    return scipy.linalg.solve_triangular(factor, np.eye(_DIM), lower=True)


def _log_likelihood(counts, field):
    field = point(field, counts.shape[0])
    (counts,) = cast(field.dtype, counts)
    return jnp.sum(counts * field - capped_exp(field) / counts.shape[0])


def _log_prior(mean, whiten, log_det, field):
    field = point(field, whiten.shape[0])
    mean, whiten, log_det = cast(field.dtype, mean, whiten, log_det)
    z = jnp.matmul(whiten, field - mean, precision="highest")
    return -0.5 * jnp.sum(z**2) - log_det - field.shape[0] * _HALF_LOG_2PI


def _energy(counts, mean, whiten, log_det, field):
    prior = _log_prior(mean, whiten, log_det, field)
    return -prior - _log_likelihood(counts, field)


def _to_field(mean, factor, z):
    z = point(z, factor.shape[0])
    mean, factor = cast(z.dtype, mean, factor)
    return mean + jnp.matmul(factor, z, precision="highest")


def _sample_prior(mean, factor, key, n):
    mean, factor = cast(default_float(), mean, factor)
    z = jax.random.normal(key, (n, factor.shape[0]), factor.dtype)
    return mean + jnp.matmul(z, factor.T, precision="highest")


def _whitened_log_prior(counts, z):
    z = point(z, counts.shape[0])
    return -0.5 * jnp.sum(z**2) - z.shape[0] * _HALF_LOG_2PI


def _whitened_log_likelihood(counts, mean, factor, z):
    return _log_likelihood(counts, _to_field(mean, factor, z))


def _whitened_energy(counts, mean, factor, z):
    likelihood = _whitened_log_likelihood(counts, mean, factor, z)
    return -_whitened_log_prior(counts, z) - likelihood


def _whitened_sample_prior(counts, key, n):
    return jax.random.normal(key, (n, counts.shape[0]), default_float())


def lgcp(whitened: bool = False) -> Target:
    r"""Log-Gaussian Cox process of 126 pine saplings on a 40 x 40 grid, 1600-D.

    .. math:: f \sim N(\mu, K), \quad K_{mn} = 1.91\, e^{-33 |m - n| / 40}, \quad
              \log p(y \mid f) = \sum_i y_i f_i - e^{f_i} / 1600

    with mu = log 126 - 1.91/2 (Moeller et al. 1998). The constants of the Poisson
    likelihood are left out, as in AFT, PIS and DDS; the prior's are in. log Z = 501.73
    +- 0.01 (bridge sampling; SMC agrees). The 512.6 in circulation is refuted: the
    evidence upper bound from posterior draws is 504.35. Log-concave.

    Args:
        whitened: use coordinates z with f = mu + L z, L the Cholesky factor of K. The
            Jacobian is included, so log Z is the same; ``constrain`` gives f.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.lgcp(whitened=True).log_z
        501.73
    """
    mean, factor, counts = _prior()
    if whitened:
        return Target(
            energy=Partial(_whitened_energy, counts, mean, factor),
            dim=_DIM,
            name="lgcp_whitened",
            log_z=501.73,
            log_prior=Partial(_whitened_log_prior, counts),
            log_likelihood=Partial(_whitened_log_likelihood, counts, mean, factor),
            sample_prior=Partial(_whitened_sample_prior, counts),
            constrain=Partial(_to_field, mean, factor),
        )
    prior = (mean, _whitening(), np.asarray(np.sum(np.log(np.diag(factor)))))
    return Target(
        energy=Partial(_energy, counts, *prior),
        dim=_DIM,
        name="lgcp",
        log_z=501.73,
        scale=4.0,
        log_prior=Partial(_log_prior, *prior),
        log_likelihood=Partial(_log_likelihood, counts),
        sample_prior=Partial(_sample_prior, mean, factor),
    )
