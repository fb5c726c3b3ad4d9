"""A fixed-size first-in-first-out store of points, and the ways to draw from it.

A *priority* is a function ``(buffer, key, num) -> rows [num]``, the row numbers of
draws with replacement: :func:`uniform`, or what :func:`by_rank` and :func:`by_weight`
return. An empty buffer answers with row 0; otherwise no row beyond ``size`` is drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from diffsamp.types import Array, Key, as_count

_BISECTIONS = 20  # the exponent of `temper` to a millionth


class Buffer(NamedTuple):
    """A ring of points; rows beyond ``size`` are zero.

    Attributes:
        x: points, [capacity, D].
        energy: their energies, [capacity].
        score: minus the energy gradient in unit coordinates, that is times the
            reference's scale, as in `Path.scores`, [capacity, D]; [capacity, 0]
            where it is not kept.
        log_weight: log importance weight of each at the time it was added, [capacity].
        size: how many rows are filled, [].
        cursor: where the next point goes, [].
        num_rejected: points refused so far for a number that is not finite, [].
    """

    x: Array
    energy: Array
    score: Array
    log_weight: Array
    size: Array
    cursor: Array
    num_rejected: Array


Priority = Callable[[Buffer, Key, int], Array]


def init(capacity: int, dim: int, score_dim: int = 0) -> Buffer:
    """An empty buffer.

    Args:
        capacity: number of rows.
        dim: dimension D.
        score_dim: D to keep scores as well, 0 not to.

    Raises:
        ValueError: when capacity is below 1, or score_dim is neither 0 nor dim.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffsamp import buffers
        >>> buffer = buffers.add(buffers.init(4, 2), jnp.ones((3, 2)), jnp.zeros(3))
        >>> int(buffer.size), buffers.sample(buffer, jax.random.key(0), 5).shape
        (3, (5, 2))
    """
    capacity = as_count("capacity", capacity)
    if score_dim not in (0, dim):
        raise ValueError(f"score_dim must be 0 or dim={dim}, got {score_dim}")
    dtype = jax.dtypes.canonicalize_dtype(float)
    zero = jnp.zeros((), jnp.int32)
    return Buffer(
        x=jnp.zeros((capacity, dim), dtype),
        energy=jnp.zeros((capacity,), dtype),
        score=jnp.zeros((capacity, score_dim), dtype),
        log_weight=jnp.zeros((capacity,), dtype),
        size=zero,
        cursor=zero,
        num_rejected=zero,
    )


def add(
    buffer: Buffer,
    x: Array,
    energy: Array,
    rows: Array | None = None,
    *,
    score: Array | None = None,
    log_weight: Array | None = None,
) -> Buffer:
    """Adds points, refusing those of which any number is not finite.

    Args:
        buffer: the buffer.
        x: points, [N, D] with N at most the capacity.
        energy: their energies, [N].
        rows: which of them to offer, [N] bool; all by default.
        score: their scores, [N, D]; needed where the buffer keeps them.
        log_weight: their log importance weights, [N]; zero by default.

    Raises:
        ValueError: when there are more points than the buffer holds, or their scores
            are missing or of another shape.
    """
    num, capacity = x.shape[0], buffer.x.shape[0]
    if num > capacity:
        raise ValueError(
            f"cannot add {num} points at once to a buffer of {capacity}; "
            "raise its capacity or lower batch_size"
        )
    if score is None and not buffer.score.shape[1]:
        score = jnp.zeros((num, 0), buffer.score.dtype)
    if score is None or score.shape != (num, buffer.score.shape[1]):
        raise ValueError(
            f"this buffer keeps scores: score must be {[num, buffer.score.shape[1]]}, "
            f"got {None if score is None else list(score.shape)}"
        )
    if log_weight is None:
        log_weight = jnp.zeros((num,), buffer.log_weight.dtype)
    offered = jnp.ones((num,), bool) if rows is None else rows
    valid = offered & jnp.isfinite(energy) & jnp.isfinite(log_weight)
    valid &= jnp.all(jnp.isfinite(x), axis=-1) & jnp.all(jnp.isfinite(score), axis=-1)
    rank = jnp.cumsum(valid, dtype=jnp.int32) - 1
    position = jnp.where(valid, (buffer.cursor + rank) % capacity, capacity)
    added = jnp.sum(valid).astype(jnp.int32)

    def put(held, new):
        return held.at[position].set(new.astype(held.dtype), mode="drop")

    return Buffer(
        x=put(buffer.x, x),
        energy=put(buffer.energy, energy),
        score=put(buffer.score, score),
        log_weight=put(buffer.log_weight, log_weight),
        size=jnp.minimum(buffer.size + added, capacity),
        cursor=(buffer.cursor + added) % capacity,
        num_rejected=buffer.num_rejected
        + (jnp.sum(offered) - jnp.sum(valid)).astype(jnp.int32),
    )


def uniform(buffer: Buffer, key: Key, num: int) -> Array:
    """The priority of no priority: every stored row alike."""
    return jax.random.randint(key, (num,), 0, jnp.maximum(buffer.size, 1))


def by_rank(offset: float = 0.01) -> Priority:
    """The priority of low energies, whatever their size.

    The row whose energy has rank r among the n stored (0 for the lowest) is drawn with
    probability proportional to 1 / (offset n + r).

    Sorts the energies at every call: on one CPU core, 2 to 3 ms for 10,000 rows and 25
    to 50 ms for 100,000.

    Args:
        offset: share of the rows that count as best; smaller is greedier.

    Raises:
        ValueError: when offset is not positive.

    Sources: Tripp, Daxberger, Hernández-Lobato 2020 (arXiv 2006.09191); Sendera et al.
    2024 (arXiv 2402.05098), with 0.01.

    Example:
        >>> import diffsamp as ds
        >>> behaviour = ds.behaviours.replay(10_000, priority=ds.buffers.by_rank())
    """
    if not 0 < offset < math.inf:
        raise ValueError(f"offset must be positive and finite, got {offset}")
    return _by_rank(float(offset))


@functools.cache
def _by_rank(offset: float) -> Priority:
    def priority(buffer: Buffer, key: Key, num: int) -> Array:
        rank = jnp.arange(buffer.energy.shape[0], dtype=jnp.int32)
        stored = rank < buffer.size
        dtype = buffer.energy.dtype
        shifted = offset * buffer.size.astype(dtype) + rank.astype(dtype)
        weight = jnp.where(stored, 1 / jnp.maximum(shifted, offset), 0.0)
        order = jnp.argsort(jnp.where(stored, buffer.energy, jnp.inf))
        return order[draw(key, weight, num, buffer.size)]

    return priority


def by_weight(min_ess: float = 0.05) -> Priority:
    """The priority of large importance weights, tempered.

    A row of weight w is drawn with probability proportional to w^λ, with the largest
    λ in [0, 1] that leaves an effective sample size of min_ess times the stored rows.

    A path drawn by any sampler has E[w g(x)] = Z E_π[g] for the target π and every g,
    with one Z for all. So the unnormalised weights of rows from different updates
    compare, with λ = 1 and many rows the draws follow the target, and a smaller λ
    leads from what the samplers made to there. N times (estimate of Z of a batch of N)
    times (self-normalised weight within it) is the same number.

    Args:
        min_ess: the effective sample size, as a share of the stored rows. With 0.05,
            10,000 rows are at least worth 500, about as many as a batch has paths.

    Raises:
        ValueError: when min_ess is not in (0, 1].

    Source: reinforced SMC (arXiv 2510.11711), whose priority and rule this is.

    Example:
        >>> import diffsamp as ds
        >>> behaviour = ds.behaviours.replay(10_000, priority=ds.buffers.by_weight())
    """
    check_min_ess(min_ess)
    return _by_weight(float(min_ess))


@functools.cache
def _by_weight(min_ess: float) -> Priority:
    def priority(buffer: Buffer, key: Key, num: int) -> Array:
        rows = jnp.arange(buffer.log_weight.shape[0], dtype=jnp.int32)
        stored = rows < buffer.size
        log_weight = jnp.where(stored, buffer.log_weight, -jnp.inf)
        tempered = temper(log_weight, min_ess)
        shift = jnp.max(jnp.where(stored, tempered, -jnp.inf))
        weight = jnp.where(stored, jnp.exp(tempered - shift), 0.0)
        return draw(key, weight, num, buffer.size)

    return priority


def check_priority(priority: Priority) -> None:
    """Raises ValueError for what is no function, a name for example."""
    if not callable(priority):
        raise ValueError(
            "priority must be a function (buffer, key, num) -> rows: buffers.uniform, "
            f"buffers.by_rank() or buffers.by_weight(), got {priority!r}"
        )


def check_min_ess(min_ess: float) -> None:
    """Raises ValueError for a share of rows that is not in (0, 1]."""
    if not 0 < min_ess <= 1:
        raise ValueError(
            f"min_ess must be a share of the rows in (0, 1], got {min_ess}"
        )


def temper(log_weight: Array, min_ess: float) -> Array:
    """λ times log-weights, [N], for the λ of :func:`by_weight`.

    The effective sample size of w^λ falls with λ (its logarithm has the derivative
    2 E_λ[log w] - 2 E_2λ[log w], with E_λ the mean under weights w^λ), so that λ is
    found by bisection.

    Args:
        log_weight: [N]; minus infinity for rows that do not count.
        min_ess: effective sample size to keep, as a share of the rows that count.

    Returns:
        [N]; minus infinity for the same rows.
    """
    counts = log_weight > -jnp.inf
    shift = jnp.max(jnp.where(counts, log_weight, -jnp.inf))
    centred = jnp.where(counts, log_weight - shift, 0.0)
    size = jnp.sum(counts).astype(log_weight.dtype)
    enough = jnp.log(size) + math.log(min_ess)

    def allowed(exponent):
        tempered = jnp.where(counts, exponent * centred, -jnp.inf)
        return 2 * logsumexp(tempered) - logsumexp(2 * tempered) >= enough

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        good = allowed(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    zero, one = jnp.zeros((), log_weight.dtype), jnp.ones((), log_weight.dtype)
    low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (zero, one))
    exponent = jnp.where(allowed(one), one, low)
    finite = jnp.where(counts, log_weight, 0.0)
    return jnp.where(counts, exponent * finite, -jnp.inf)


def sample(buffer: Buffer, key: Key, num: int, priority: Priority = uniform) -> Array:
    """Draws with replacement, [num, D]; zeros from an empty buffer.

    Args:
        buffer: the buffer.
        key: random key; consumed.
        num: how many, static.
        priority: which rows are drawn how often; all alike by default.
    """
    return buffer.x[priority(buffer, key, num)]


def draw(key: Key, weight: Array, num: int, size: Array) -> Array:
    """Row numbers in proportion to weights, by inversion in O(N + num log N).

    Args:
        key: random key; consumed.
        weight: not negative, [N].
        num: how many, static.
        size: rows from here on are never drawn, [] int; of none, row 0 is.
    """
    edges = jnp.cumsum(weight)
    height = edges[-1] * (1 - jax.random.uniform(key, (num,), weight.dtype))
    row = jnp.searchsorted(edges, height, side="left").astype(jnp.int32)
    # The last edges of a parallel sum need not be equal to the last bit.
    return jnp.minimum(row, jnp.maximum(size.astype(jnp.int32) - 1, 0))
