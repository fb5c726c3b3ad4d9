"""Log-variance divergence of Richter et al. 2020; Richter and Berner 2024.

    loss = Var_batch(log_weight)   (unbiased), detached paths from any behaviour

Zero exactly when generation and destruction agree on the support of the behaviour; no
log Z is needed. On-policy its gradient for generation parameters is **twice** that of
reverse KL in expectation. Half of it is VarGrad, the trajectory balance loss with log Z
replaced by its batch optimum:

    Var_batch(log_weight) = 2 n / (n - 1) min_c mean h(log_weight - c),  h(r) = r^2 / 2.

With ``huber=d`` this is kept and h is Huber's function, linear beyond |r| = d. Where
energies span many orders of magnitude (a funnel: 10^14 nats in a batch) the square of a
single path decides the update of all, and overflows; the minimiser c, Huber's estimate
of location, lies within d of the median. As c is optimal, its own derivative drops out.

For a conditional energy the variance is taken among the rows of one condition and
averaged over conditions, since log Z depends on the condition.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffsamp.objectives.common import (
    check_huber,
    finite_rows,
    group_mean,
    half_square,
    keep_state,
    no_state,
    row_mean,
    safe,
)
from diffsamp.types import Array, Batch, Objective, Requirements


@functools.cache
def log_variance(*, huber: float | None = None) -> Objective:
    """Unbiased batch variance of the log-weight; any behaviour.

    On-policy, twice the gradient of reverse KL in expectation.

    Args:
        huber: distance in nats from which on a log-weight counts linearly, or None.

    Raises:
        ValueError: when huber is not positive.

    Example:
        >>> import diffsamp as ds
        >>> ds.objectives.log_variance() is ds.objectives.log_variance()
        True
    """
    check_huber(huber)

    def loss(params, state, batch):
        del params, state
        log_weight = batch.trajectories.log_weight
        rows = finite_rows(log_weight)
        log_weight = safe(log_weight, rows)
        centre, count = group_mean(log_weight, rows, batch)
        if huber is not None:
            centre = _huber_location(log_weight, rows, batch, huber)
        square = 2.0 * half_square(log_weight - centre, huber)
        return row_mean(square * count / jnp.maximum(count - 1, 1), rows), {}

    return Objective(Requirements(), no_state, loss, keep_state)


def _huber_location(values: Array, rows: Array, batch: Batch, delta: float) -> Array:
    """Root of ``mean clip(values - c, -delta, delta)`` of each row's group, [B].

    By bisection. Without conditions round the median: half of the values lie above it
    and half below, so the mean is not positive at median + delta and not negative at
    median - delta. With conditions between the extremes of the batch.
    """
    values = jax.lax.stop_gradient(values)
    usable = jnp.where(rows, values, jnp.nan)
    if batch.condition.shape[-1] == 0:
        median = jnp.nanmedian(usable)
        ends, num_halvings = (median - delta, median + delta), 40
    else:
        ends, num_halvings = (jnp.nanmin(usable), jnp.nanmax(usable)), 80
    low, high = (jnp.broadcast_to(end, values.shape) for end in ends)

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        clipped = jnp.clip(values - middle, -delta, delta)
        above = group_mean(clipped, rows, batch)[0] > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, num_halvings, halve, (low, high))
    return 0.5 * (low + high)
