"""A fixed-size first-in-first-out store of points, as pure functions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffsamp.types import Array, Key


class Buffer(NamedTuple):
    """A ring of points.

    Attributes:
        x: points, [capacity, D]; rows beyond ``size`` are zero.
        size: how many rows are filled, [].
        cursor: where the next point goes, [].
        num_rejected: non-finite points refused so far, [].
    """

    x: Array
    size: Array
    cursor: Array
    num_rejected: Array


def init(capacity: int, dim: int) -> Buffer:
    """An empty buffer.

    Args:
        capacity: number of rows.
        dim: dimension D.

    Raises:
        ValueError: when capacity is below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    dtype = jax.dtypes.canonicalize_dtype(float)
    zero = jnp.zeros((), jnp.int32)
    return Buffer(jnp.zeros((capacity, dim), dtype), zero, zero, zero)


def add(buffer: Buffer, x: Array, energy: Array, rows: Array | None = None) -> Buffer:
    """Adds points, refusing those with a non-finite coordinate or energy.

    Args:
        buffer: the buffer.
        x: points, [N, D] with N at most the capacity.
        energy: their energies, [N].
        rows: which of them to offer, [N] bool; all by default.

    Raises:
        ValueError: when there are more points than the buffer holds.
    """
    capacity = buffer.x.shape[0]
    if x.shape[0] > capacity:
        raise ValueError(
            f"cannot add {x.shape[0]} points at once to a buffer of {capacity}; "
            "raise its capacity or lower batch_size"
        )
    offered = jnp.ones(x.shape[:1], bool) if rows is None else rows
    valid = offered & jnp.isfinite(energy) & jnp.all(jnp.isfinite(x), axis=-1)
    rank = jnp.cumsum(valid, dtype=jnp.int32) - 1
    position = jnp.where(valid, (buffer.cursor + rank) % capacity, capacity)
    added = jnp.sum(valid).astype(jnp.int32)
    return Buffer(
        x=buffer.x.at[position].set(x.astype(buffer.x.dtype), mode="drop"),
        size=jnp.minimum(buffer.size + added, capacity),
        cursor=(buffer.cursor + added) % capacity,
        num_rejected=buffer.num_rejected
        + (jnp.sum(offered) - jnp.sum(valid)).astype(jnp.int32),
    )


def sample(buffer: Buffer, key: Key, num: int) -> Array:
    """Uniform draws with replacement, [num, D]; zeros from an empty buffer.

    Args:
        buffer: the buffer.
        key: random key; consumed.
        num: how many, static.
    """
    index = jax.random.randint(key, (num,), 0, jnp.maximum(buffer.size, 1))
    return buffer.x[index]
