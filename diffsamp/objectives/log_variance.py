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
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffsamp.objectives.common import (
    check_huber,
    finite_rows,
    half_square,
    keep_state,
    no_state,
    row_mean,
    safe,
)
from diffsamp.types import Array, Objective, Requirements


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
        if huber is None:
            centre = row_mean(log_weight, rows)
        else:
            centre = _huber_location(jax.lax.stop_gradient(log_weight), rows, huber)
        count = jnp.sum(rows).astype(log_weight.dtype)
        total = row_mean(2.0 * half_square(log_weight - centre, huber), rows)
        return total * count / jnp.maximum(count - 1, 1), {}

    return Objective(Requirements(), no_state, loss, keep_state)


def _huber_location(values: Array, rows: Array, delta: float) -> Array:
    """Root of ``mean clip(values - c, -delta, delta)``, by bisection round the median.

    Half of the values lie above the median and half below, so the mean is not positive
    at median + delta and not negative at median - delta.
    """
    median = jnp.nanmedian(jnp.where(rows, values, jnp.nan))

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        above = row_mean(jnp.clip(values - middle, -delta, delta), rows) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (median - delta, median + delta))
    return 0.5 * (low + high)
