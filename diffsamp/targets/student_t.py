"""Mixture of heavy-tailed Student-t components."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import cast, default_float, point, read_csv
from diffsamp.targets.moments import mode_weights
from diffsamp.types import Modes, Target

_DIMS = (2, 50, 200)


def _log_components(means, x):
    """Log-densities [M]; a t with two degrees of freedom is (2 + z^2)^(-3/2)."""
    x = point(x, means.shape[1])
    (means,) = cast(x.dtype, means)
    return -1.5 * jnp.sum(jnp.log(2.0 + (x[None, :] - means) ** 2), axis=1)


def _energy(means, x):
    return math.log(means.shape[0]) - jax.nn.logsumexp(_log_components(means, x))


def _assign(means, x):
    return jnp.argmax(_log_components(means, x))


def _sample(means, key, n):
    (means,) = cast(default_float(), means)
    key_mode, key_z, key_u = jax.random.split(key, 3)
    shape = (n, means.shape[1])
    mode = jax.random.randint(key_mode, (n,), 0, means.shape[0])
    z = jax.random.normal(key_z, shape, means.dtype)
    tiny = float(jnp.finfo(means.dtype).tiny)
    u = jax.random.uniform(key_u, shape, means.dtype, minval=tiny)
    return means[mode] + z / jnp.sqrt(-jnp.log(u))


def student_t_mixture(dim: int = 2) -> Target:
    r"""Ten components, each a product of one-dimensional t with 2 degrees of freedom.

    .. math:: \rho(x) = \tfrac1{10} \sum_m \prod_i t_2(x_i - m_i)

    log Z = 0 (normalised). "MoS" of Blessing et al. 2024, with means uniform in
    [-10, 10]^D; not a mixture of multivariate t. The variance is infinite, so
    Wasserstein-2, squared-cost Sinkhorn and mean-square errors do not converge; use
    E|x - m| = sqrt(2). A mode is the region where one component has the largest
    density, its weight is by quadrature in 2-D and 1/10 beyond. ``scale`` is 15, as
    in the paper.

    Args:
        dim: dimension D: 2, 50 or 200.

    Raises:
        ValueError: when ``dim`` is another number.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.student_t_mixture().log_z
        0.0
    """
    if dim not in _DIMS:
        raise ValueError(f"dim must be one of {_DIMS}, got {dim!r}")
    file = f"student_t10_means_jax_key0_d{dim}"
    means = read_csv(f"{file}.csv")
    weights = mode_weights(file) if dim == 2 else np.full(10, 0.1)
    return Target(
        energy=Partial(_energy, means),
        dim=dim,
        name="student_t_mixture" if dim == 2 else f"student_t_mixture_{dim}",
        log_z=0.0,
        sample=Partial(_sample, means),
        modes=Modes(jnp.asarray(weights), Partial(_assign, means)),
        scale=15.0,
    )
