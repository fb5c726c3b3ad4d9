"""Many draws in compiled calls of fixed shape.

Draw number i depends on ``fold_in(key, i)`` alone and is computed in blocks of `BLOCK`
rows, whatever the batch size: matrix products over another number of rows may round
differently, and draws should not depend on chunking. One program serves any number of
draws.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.deterministic import ProbabilityFlow
from diffsamp.energies import as_energy
from diffsamp.sampler import Final, Sampler
from diffsamp.types import Array, Energy, Key, Params

BLOCK = 256
BATCH = 1024


def draw_final(
    key: Key,
    sampler: Sampler | ProbabilityFlow,
    params: Params,
    energy: Energy,
    num_draws: int,
    batch_size: int = BATCH,
    condition: Array | None = None,
) -> Final:
    """Last states, weights and energies of ``num_draws`` paths, on the host."""
    num_blocks = -(-batch_size // BLOCK)
    size = num_blocks * BLOCK
    energy, parts = as_energy(energy), []
    conditions = _repeated(condition, size)
    for start in range(0, num_draws, size):
        part = _draw_blocks(
            sampler, num_blocks, params, key, energy, np.int32(start), conditions
        )
        keep = min(size, num_draws - start)
        parts.append(jax.tree.map(lambda a, n=keep: np.asarray(a)[:n], part))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


def pilot(
    key: Key,
    sampler: Sampler,
    params: Params,
    energy: Energy,
    conditions: Array | None = None,
) -> Final:
    """`BATCH` draws as device arrays, traceable, by the same compiled program.

    ``conditions`` are one per draw, [BATCH, C], where the sampler has any.
    """
    start, num_blocks = np.int32(0), BATCH // BLOCK
    return _draw_blocks(
        sampler, num_blocks, params, key, as_energy(energy), start, conditions
    )


def trace_back_log_weights(
    key: Key,
    sampler: Sampler | ProbabilityFlow,
    params: Params,
    energy: Energy,
    x: Array,
    batch_size: int = BATCH,
    condition: Array | None = None,
) -> np.ndarray:
    """Log-weights of paths traced back from points x [M, D], on the host."""
    num_blocks = -(-batch_size // BLOCK)
    size = num_blocks * BLOCK
    energy, parts = as_energy(energy), []
    conditions = _repeated(condition, size)
    for start in range(0, x.shape[0], size):
        rows = x[start : start + size]
        padding = jnp.broadcast_to(rows[:1], (size - len(rows), x.shape[1]))
        filled = jnp.concatenate([rows, padding])
        values = _trace_blocks(
            sampler,
            num_blocks,
            params,
            key,
            energy,
            np.int32(start),
            filled,
            conditions,
        )
        parts.append(np.asarray(values)[: len(rows)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_blocks(sampler, num_blocks, params, key, energy, start, conditions):
    def block(inputs):
        index, rows = inputs
        keys = _keys(key, start, index)
        final = jax.vmap(sampler.final, in_axes=(None, 0, None, 0))
        return final(params, keys, energy, rows)

    blocks = _in_blocks(conditions, num_blocks)
    return _flat(jax.lax.map(block, (jnp.arange(num_blocks), blocks)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trace_blocks(sampler, num_blocks, params, key, energy, start, x, conditions):
    def block(inputs):
        index, (points, rows) = inputs
        keys = _keys(key, start, index)
        trace = jax.vmap(sampler.trace_back, in_axes=(None, 0, 0, None, 0))
        return trace(params, keys, points, energy, rows).log_weight

    blocks = _in_blocks((x, conditions), num_blocks)
    return _flat(jax.lax.map(block, (jnp.arange(num_blocks), blocks)))


def _repeated(condition, size):
    if condition is None:
        return None
    return jnp.broadcast_to(condition, (size, *condition.shape))


def _in_blocks(tree: Any, num_blocks: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(num_blocks, BLOCK, *a.shape[1:]), tree)


def _keys(key, start, index):
    number = start + index * BLOCK + jnp.arange(BLOCK)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(number)


def _flat(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), tree)
