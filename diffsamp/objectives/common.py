"""Means over the rows of a batch that can be used, and stateless objectives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffsamp.types import Array, Batch, Energy, Key, Params


def finite_rows(log_weight: Array, rows: Array | None = None) -> Array:
    """Rows whose log-weight is finite, and in ``rows`` if given, [B] bool."""
    usable = jnp.isfinite(log_weight)
    return usable if rows is None else usable & rows


def row_mean(values: Array, rows: Array) -> Array:
    """Mean over the marked rows; NaN without any, so that the update is skipped.

    Masked values must not reach the sum: 0 * inf is NaN.
    """
    kept = jnp.where(rows, values, jnp.zeros_like(values))
    count = jnp.sum(rows).astype(values.dtype)
    return jnp.sum(kept) / jnp.where(count > 0, count, jnp.nan)


def half_square(residual: Array, huber: float | None) -> Array:
    """``r^2 / 2``, or Huber's loss, linear beyond ``|r| = huber``."""
    if huber is None:
        return 0.5 * residual**2
    return optax.huber_loss(residual, delta=huber)


def check_huber(huber: float | None) -> None:
    """Raises where it is neither None nor positive."""
    if huber is not None and not huber > 0:
        raise ValueError(f"huber must be positive or None, got {huber}")


def safe(log_weight: Array, rows: Array) -> Array:
    """The log-weights with unusable rows set to zero."""
    return jnp.where(rows, log_weight, jnp.zeros_like(log_weight))


def group_mean(values: Array, rows: Array, batch: Batch) -> tuple[Array, Array]:
    """For each row the mean over the usable rows of its condition, and their number.

    Without conditions the whole batch is one group. NaN for a group without any.
    """
    kept = jnp.where(rows, values, jnp.zeros_like(values))
    count = rows.astype(values.dtype)
    if batch.condition.shape[-1] == 0:
        count = jnp.broadcast_to(jnp.sum(count), values.shape)
        return jnp.broadcast_to(row_mean(values, rows), values.shape), count
    size = values.shape[0]
    total, number = (
        jax.ops.segment_sum(v, batch.group, num_segments=size) for v in (kept, count)
    )
    mean = total / jnp.where(number > 0, number, jnp.nan)
    return mean[batch.group], number[batch.group]


def over_the_others(values: Array, rows: Array, batch: Batch) -> Array:
    """Each row's value less the mean of the other usable rows of its condition.

    A baseline that depends on the row itself would shrink the estimate by 1 - 1/B.
    """
    mean, count = group_mean(values, rows, batch)
    return (values - mean) * count / jnp.maximum(count - 1, 1)


def no_state(
    key: Key, sampler: Any, params: Params, energy: Energy, pilot: Any
) -> tuple[dict, tuple]:
    """`Objective.init` of objectives with neither parameters nor state."""
    del key, sampler, params, energy, pilot
    return {}, ()


def keep_state(params: Params, state: Any, batch: Batch) -> Any:
    """`Objective.update` that changes nothing."""
    del params, batch
    return state
