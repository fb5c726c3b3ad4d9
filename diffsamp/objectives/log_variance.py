"""Log-variance divergence of Richter et al. 2020; Richter and Berner 2024.

    loss = Var_batch(log_weight)   (unbiased), detached paths from any behaviour

Zero exactly when generation and destruction agree on the support of the behaviour; no
log Z is needed. On-policy its gradient for generation parameters is **twice** that of
reverse KL in expectation. Half of it is VarGrad, the trajectory balance loss with log Z
replaced by its batch optimum.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from diffsamp.objectives.common import (
    finite_rows,
    keep_state,
    no_state,
    row_mean,
    safe,
)
from diffsamp.types import Objective, Requirements


def _loss(params, state, batch):
    del params, state
    log_weight = batch.trajectories.log_weight
    rows = finite_rows(log_weight)
    log_weight = safe(log_weight, rows)
    deviation = log_weight - row_mean(log_weight, rows)
    count = jnp.sum(rows).astype(log_weight.dtype)
    return row_mean(deviation**2, rows) * count / jnp.maximum(count - 1, 1), {}


@functools.cache
def log_variance() -> Objective:
    """Unbiased batch variance of the log-weight; any behaviour.

    On-policy, twice the gradient of reverse KL in expectation.

    Example:
        >>> import diffsamp as ds
        >>> ds.objectives.log_variance() is ds.objectives.log_variance()
        True
    """
    return Objective(Requirements(), no_state, _loss, keep_state)
