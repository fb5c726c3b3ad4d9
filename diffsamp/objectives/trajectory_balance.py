"""Trajectory balance: Malkin et al. 2022; for diffusion Sendera et al. 2024.

    loss = mean h(log Z_psi - log_weight),  h(r) = r^2 / 2,
    detached paths from any behaviour

With log Z_psi at the behaviour's mean log-weight and on-policy paths its gradient for
generation parameters is that of reverse KL. log Z_psi = offset + scale * raw: the
offset is the log-mean-exp of a pilot batch's weights and ``scale`` multiplies the
learning rate of log Z, so that one optimiser for all parameters works; a log Z that
starts at 0 has to travel (165 nats on the 32-D many-well) at the speed of its learning
rate. With ``huber`` h is linear beyond that many nats, as in `log_variance`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffsamp import batching
from diffsamp.objectives.common import (
    check_huber,
    finite_rows,
    half_square,
    keep_state,
    row_mean,
    safe,
)
from diffsamp.types import Objective, Requirements


@functools.cache
def trajectory_balance(
    log_z_scale: float = 10.0, *, huber: float | None = None
) -> Objective:
    """Half the mean squared distance of log-weights to a learned log Z; any behaviour.

    Args:
        log_z_scale: factor between the raw parameter and log Z; the learning rate of
            log Z is this times that of the rest under Adam.
        huber: residual in nats from which on the loss grows linearly, or None.

    Raises:
        ValueError: when log_z_scale or huber is not positive.

    Example:
        >>> import diffsamp as ds
        >>> ds.objectives.trajectory_balance().requires.on_policy
        False
    """
    if not log_z_scale > 0:
        raise ValueError(f"log_z_scale must be positive, got {log_z_scale}")
    check_huber(huber)

    def init(key, sampler, params, energy):
        log_weight = batching.pilot(key, sampler, params, energy).log_weight
        usable = jnp.isfinite(log_weight)
        log_weight = jnp.where(usable, log_weight, -jnp.inf)
        offset = jax.nn.logsumexp(log_weight) - jnp.log(
            jnp.maximum(jnp.sum(usable), 1).astype(log_weight.dtype)
        )
        offset = jnp.where(jnp.isfinite(offset), offset, jnp.zeros_like(offset))
        return {"log_z": jnp.zeros((), offset.dtype)}, offset

    def loss(params, offset, batch):
        log_z = offset + log_z_scale * params["objective"]["log_z"]
        log_weight = batch.trajectories.log_weight
        rows = finite_rows(log_weight)
        residual = log_z - safe(log_weight, rows)
        return row_mean(half_square(residual, huber), rows), {"log_z": log_z}

    requires = Requirements(pilot_paths=batching.BATCH)
    return Objective(requires, init, loss, keep_state)
