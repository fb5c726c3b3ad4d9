"""Detailed balance: Bengio et al. 2023, with a learned flow F (flows.py).

    loss = mean_paths mean_k h(log F_k + log p_k - log q_k - log F_{k+1}),
    h(r) = r^2 / 2, detached paths from any behaviour

The limit of sub-trajectory balance for short pieces: information about the energy
travels back through the flow one step per update.
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
)
from diffsamp.objectives.flows import Flow
from diffsamp.objectives.sub_trajectory_balance import flow_init, log_flow_minus_sum
from diffsamp.types import Objective, Requirements

_DEFAULT_FLOW = Flow()


@functools.cache
def detailed_balance(
    *, flow: Flow = _DEFAULT_FLOW, huber: float | None = None
) -> Objective:
    """Mean of the half squared residuals of all steps of a path.

    Args:
        flow: the learned flow.
        huber: residual in nats from which on the loss grows linearly, or None.

    Raises:
        ValueError: when huber is not positive.

    Example:
        >>> import diffsamp as ds
        >>> flow = ds.objectives.Flow(forward_looking=True)
        >>> objective = ds.objectives.detailed_balance(flow=flow)
    """
    check_huber(huber)

    def loss(params, offset, batch):
        cumulative, metrics = log_flow_minus_sum(flow, params, offset, batch)
        rows = finite_rows(jnp.sum(cumulative, axis=-1))
        cumulative = jnp.where(rows[:, None], cumulative, 0.0)
        residual = cumulative[:, :-1] - cumulative[:, 1:]
        values = jnp.mean(half_square(residual, huber), axis=1)
        return row_mean(values, rows), metrics

    return Objective(Requirements(pilot=True), flow_init(flow), loss, keep_state)
