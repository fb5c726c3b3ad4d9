"""A one-dimensional density with two wells: its integral, exact draws, mode index."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.targets._common import cast, default_float, rejection


def log_pair(y, centre, sd, right, xp=jnp):
    """Log of the proposal of a well pair up to a constant: a Gaussian on each side."""
    return xp.logaddexp(
        math.log(1 - right) - 0.5 * ((y + centre) / sd) ** 2,
        math.log(right) - 0.5 * ((y - centre) / sd) ** 2,
    )


def sample_pair(key, shape, log_f, log_bound, centre, sd, right):
    """Exact draws of the density f by rejection from the pair of Gaussians."""
    dtype = default_float()
    log_bound, centre, sd = cast(dtype, log_bound, centre, sd)

    def propose(key):
        key_side, key_z = jax.random.split(key)
        is_right = jax.random.bernoulli(key_side, right, shape)
        z = jax.random.normal(key_z, shape, dtype)
        return jnp.where(is_right, centre, -centre) + sd * z

    def log_accept(y):
        return log_f(y) - log_pair(y, centre, sd, right) - log_bound

    return rejection(key, propose, log_accept)


def tabulate(log_f, centre, sd, right):
    """Log integral of f, its share right of 0, and the rejection bound, in float64."""
    step = (centre + 6.0) / 20_000
    y = step * np.arange(-20_000, 20_001)
    f = np.exp(log_f(y))
    total = np.sum(f) * step
    share = (np.sum(f[20_001:]) + 0.5 * f[20_000]) * step / total
    bound = np.max(log_f(y) - log_pair(y, centre, sd, right, np)) + 0.001
    return math.log(total), share, bound


def sign_pattern(like, x):
    """Index of the orthant of the first coordinates: bit i is set where x_i > 0."""
    bits = (x > 0).astype(int)
    return jnp.sum(bits * 2 ** jnp.arange(like.shape[0], dtype=bits.dtype))
