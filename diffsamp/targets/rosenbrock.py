"""The Rosenbrock banana, in two dimensions or chained."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import cast, default_float, point, require_dim
from diffsamp.types import Target


def _energy(curvature, flatness, log_scale, x):
    x = point(x, curvature.shape[0] + 1)
    curvature, flatness, log_scale = cast(x.dtype, curvature, flatness, log_scale)
    valley = jnp.sum(curvature * (x[1:] - x[:-1] ** 2) ** 2)
    return (valley + jnp.sum((1.0 - x[:-1]) ** 2)) / flatness - log_scale


def _sample(flatness, key, n):
    (flatness,) = cast(default_float(), flatness)
    z = jax.random.normal(key, (n, 2), flatness.dtype)
    first = 1.0 + jnp.sqrt(flatness / 2.0) * z[:, 0]
    second = first**2 + jnp.sqrt(flatness / 200.0) * z[:, 1]
    return jnp.stack([first, second], axis=1)


def _chain_log_z(dim, flatness):
    """Integrates the last coordinate out, then the others on 1-D grids, from the end.

    The next to last coordinate reaches eight standard deviations from 1, all before
    it only the square root of that. Grid steps are half the narrowest kernel width,
    where the trapezoid rule is exact to rounding.
    """
    width = math.sqrt(flatness / 200)
    high = 1 + 8 * math.sqrt(flatness / 2)
    reach = math.sqrt(high + 8 * width)
    inner_step = width / (4 * reach)
    inner = np.arange(-reach, reach, inner_step)
    outer = np.arange(-8 * width, high, width / 2)

    def transfer(x, y):
        valley = -100 * (y[None, :] - x[:, None] ** 2) ** 2
        return np.exp((valley - (1 - x[:, None]) ** 2) / flatness)

    last = np.exp(-((1 - outer) ** 2) / flatness) * math.sqrt(math.pi * flatness / 100)
    message = transfer(inner, outer) @ last * (width / 2)
    step = transfer(inner, inner) * inner_step
    for _ in range(dim - 3):
        message = step @ message
    return math.log(np.sum(message) * inner_step)


def rosenbrock(dim: int = 2, flatness: float = 1.0, log_scale: float = 0.0) -> Target:
    r"""Rosenbrock's curved valley.

    .. math:: \log \rho(x) = \log c - \tfrac1f \sum_{i < D}
              \{100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2\}

    In 2-D log Z = log(pi f / 10) + log c, and ``x_1 ~ N(1, f/2)``,
    ``x_2 | x_1 ~ N(x_1^2, f/200)`` samples exactly. Beyond, log Z comes from a transfer
    recursion over 1-D grids, exact to rounding, and there is no sampler. sde_sampler
    (Richter and Berner 2024) uses D = 15, f = 10, c = 1e5: log Z = 2.832078.
    ``scale`` is 1; the valley is 0.07 wide at f = 1.

    Args:
        dim: dimension D, at least 2.
        flatness: f, between 0.1 and 100.
        log_scale: log c.

    Raises:
        ValueError: when ``dim`` or ``flatness`` lies outside its range.

    Example:
        >>> import diffsamp as ds
        >>> round(ds.targets.rosenbrock().log_z, 6)
        -1.157855
    """
    require_dim(dim, "at least 2", dim >= 2)
    if not 0.1 <= flatness <= 100:
        raise ValueError(f"flatness must lie in [0.1, 100], got {flatness!r}")
    data = (np.full(dim - 1, 100.0), np.asarray(float(flatness)))
    if dim == 2:
        log_z = math.log(math.pi * flatness / 10)
    else:
        log_z = _chain_log_z(dim, flatness)
    is_plain = (flatness, log_scale) == (1.0, 0.0)
    name = "rosenbrock" if dim == 2 and is_plain else f"rosenbrock_{dim}"
    return Target(
        energy=Partial(_energy, *data, np.asarray(float(log_scale))),
        dim=dim,
        name=name,
        log_z=log_z + log_scale,
        sample=Partial(_sample, data[1]) if dim == 2 else None,
        scale=1.0,
    )
