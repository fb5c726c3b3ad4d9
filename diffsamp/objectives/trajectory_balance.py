"""Trajectory balance: Malkin et al. 2022; for diffusion Sendera et al. 2024.

    loss = mean h(log Z_psi - log_weight),  h(r) = r^2 / 2,
    detached paths from any behaviour

With log Z_psi at the behaviour's mean log-weight and on-policy paths its gradient for
generation parameters is that of reverse KL. How log Z_psi is represented is said in
log_z.py. With ``huber`` h is linear beyond that many nats, as in `log_variance`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from diffsamp.objectives.common import (
    check_huber,
    finite_rows,
    half_square,
    keep_state,
    row_mean,
    safe,
)
from diffsamp.objectives.log_z import check_scale, init_log_z, log_z_of
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
    check_scale(log_z_scale)
    check_huber(huber)

    def init(key, sampler, params, energy, pilot):
        del params, energy
        raw, offset = init_log_z(key, sampler, pilot)
        return {"log_z": raw}, offset

    def loss(params, offset, batch):
        log_z = log_z_of(params["objective"]["log_z"], offset, log_z_scale, batch)
        log_weight = batch.trajectories.log_weight
        rows = finite_rows(log_weight)
        residual = log_z - safe(log_weight, rows)
        loss = row_mean(half_square(residual, huber), rows)
        return loss, {"log_z": jnp.mean(log_z)}

    return Objective(Requirements(pilot=True), init, loss, keep_state)
