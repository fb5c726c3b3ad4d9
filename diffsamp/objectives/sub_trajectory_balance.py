"""Sub-trajectory balance: Madan et al. 2023; for diffusion Zhang et al. 2024 (DGFS).

With a learned flow F (flows.py) and S_k = sum_{l<k} [log p_l - log q_l], every piece of
a path from state i to state j has the residual

    r_ij = log F_i + S_j - S_i - log F_j = c_i - c_j,    c_k = log F_k - S_k,

and all of them vanish exactly when generation, destruction and flow agree. The loss is

    mean_paths sum_{i<j} w_ij h(r_ij),   w_ij = lambda^(j-i) / sum_{i<j} lambda^(j-i),

h(r) = r^2 / 2, on detached paths from any behaviour. As lambda grows it becomes
trajectory balance, whose only piece is the whole path; as it falls to 0, detailed
balance. DGFS takes lambda = 2 and divides r by the dimension; here it is in nats.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.objectives.common import (
    check_huber,
    finite_rows,
    half_square,
    keep_state,
    row_mean,
)
from diffsamp.objectives.flows import Flow
from diffsamp.types import Array, Batch, Objective, Requirements

_DEFAULT_FLOW = Flow()


@functools.cache
def sub_trajectory_balance(
    decay: float = 2.0, *, flow: Flow = _DEFAULT_FLOW, huber: float | None = None
) -> Objective:
    """Weighted mean of the half squared residuals of all pieces of a path.

    Args:
        decay: lambda, the weight of a piece relative to one that is a step shorter.
        flow: the learned flow.
        huber: residual in nats from which on the loss grows linearly, or None.

    Raises:
        ValueError: when decay or huber is not positive.

    Example:
        >>> import diffsamp as ds
        >>> objective = ds.objectives.sub_trajectory_balance(0.9)
    """
    if not 0 < decay < np.inf:
        raise ValueError(f"decay must be positive and finite, got {decay}")
    check_huber(huber)

    def weights(num_steps):
        step = np.arange(num_steps + 1)
        length = step[None] - step[:, None]
        log_weight = np.where(length > 0, length * np.log(decay), -np.inf)
        weight = np.exp(log_weight - log_weight.max())
        return weight / weight.sum()

    def loss(params, offset, batch):
        cumulative, metrics = log_flow_minus_sum(flow, params, offset, batch)
        rows = finite_rows(jnp.sum(cumulative, axis=-1))
        cumulative = jnp.where(rows[:, None], cumulative, 0.0)
        num_steps = cumulative.shape[1] - 1
        weight = jnp.asarray(weights(num_steps), cumulative.dtype)

        @jax.checkpoint
        def pieces_from(start):  # one start at a time: all at once are [B, K+1, K+1]
            begin = jnp.take(cumulative, start, axis=1)
            values = half_square(begin[:, None] - cumulative, huber)
            return jnp.sum(values * weight[start][None], axis=1)

        values = jnp.sum(jax.lax.map(pieces_from, jnp.arange(num_steps)), axis=0)
        return row_mean(values, rows), metrics

    return Objective(Requirements(pilot=True), flow_init(flow), loss, keep_state)


def flow_init(flow: Flow):
    """`Objective.init` of an objective with a learned flow."""

    def init(key, sampler, params, energy, pilot):
        del params, energy
        return flow.init(key, sampler, pilot)

    return init


def log_flow_minus_sum(
    flow: Flow, params, offset: Array, batch: Batch
) -> tuple[Array, dict]:
    """c_k of all states, [B, K+1], and metrics."""
    log_flow, log_z, cost = flow(params["objective"], offset, batch)
    trajectories = batch.trajectories
    log_ratio = trajectories.log_generation - trajectories.log_destruction
    total = jnp.pad(jnp.cumsum(log_ratio, axis=1), ((0, 0), (1, 0)))
    return log_flow - total, {"log_z": jnp.mean(log_z), "cost": cost}
