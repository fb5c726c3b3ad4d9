"""Exploration: generation with more noise than the kernel has. Sendera et al. 2024."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from diffsamp.behaviours.common import keep_state, no_state, proposal, simulate
from diffsamp.types import Behaviour, Provides


@functools.cache
def exploration(noise: float | Callable) -> Behaviour:
    """Generation paths with noise added in quadrature at every step.

    The objective still evaluates the kernel's own density, so any objective for
    off-policy paths remains valid.

    Args:
        noise: extra standard deviation per step in units of the reference scale, a
            number or an Optax schedule of the update count. Sendera et al. use
            ``optax.linear_schedule(0.2, 0.0, 5_000)``.

    Raises:
        ValueError: when a constant noise is negative.

    Example:
        >>> import optax, diffsamp as ds
        >>> noise = optax.linear_schedule(0.2, 0.0, 5_000)
        >>> behaviour = ds.behaviours.exploration(noise)
    """
    if not callable(noise) and not noise >= 0:
        raise ValueError(f"noise must not be negative, got {noise}")

    def propose(state, key, sampler, params, energy, request, count):
        del state
        extra_std = jnp.asarray(noise(count) if callable(noise) else noise)
        paths = simulate(key, sampler, params, energy, request, extra_std)
        return proposal(paths, simulated=True)

    return Behaviour(
        no_state, propose, keep_state, Provides(simulated=True, conditions=True)
    )
