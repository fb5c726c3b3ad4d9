"""The fence around Distrax: the only module that knows which library it is.

Distrax takes seconds to import, so it is imported on the first use.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.cache
def _distrax() -> Any:
    with warnings.catch_warnings():
        # TFP touches a deprecated JAX name at import; nothing we can mend here.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import distrax
    return distrax


def normal_log_prob(x: Array, mean: Array, std: Array) -> Array:
    """Log-density of independent normals, summed over the last axis.

    Args:
        x: points, [..., D].
        mean: means, [..., D].
        std: standard deviations, broadcastable to [..., D].

    Returns:
        [...].
    """
    return jnp.sum(_distrax().Normal(mean, std).log_prob(x), axis=-1)


def standard_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Independent standard normal draws of the given shape and dtype."""
    distribution = _distrax().Normal(jnp.zeros((), dtype), jnp.ones((), dtype))
    return distribution.sample(seed=key, sample_shape=shape)
