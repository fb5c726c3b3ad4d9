"""Many draws in compiled calls of fixed shape.

Draw number i depends on ``fold_in(key, i)`` alone. On CPUs it is computed in blocks of
`BLOCK` rows, whatever the batch size: matrix products over another number of rows may
round differently, and draws should not depend on chunking. Other devices would be idle
with so few rows: there a block is all that a device has of a batch, and draws of other
batch sizes are the same but for rounding. One program serves any number of draws of a
batch size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffsamp import meshes
from diffsamp.deterministic import ProbabilityFlow
from diffsamp.energies import as_energy
from diffsamp.sampler import Final, Sampler
from diffsamp.types import Array, Energy, Key, Params

BLOCK = 256
BATCH = 1024
LARGE_BATCH = 16_384  # of many draws, where a device is no CPU


class Blocks(NamedTuple):
    """What one compiled call computes: so many blocks of so many rows."""

    number: int
    num_rows: int

    @property
    def total(self) -> int:
        return self.number * self.num_rows


def draw_final(
    key: Key,
    sampler: Sampler | ProbabilityFlow,
    params: Params,
    energy: Energy,
    num_draws: int,
    batch_size: int | None = None,
    condition: Array | None = None,
    mesh: Mesh | None = None,
) -> Final:
    """Last states, weights and energies of ``num_draws`` paths, on the host."""
    blocks = blocks_of(batch_size, num_draws, mesh)
    size, parts, last = blocks.total, [], None
    given = params, key, as_energy(energy), _repeated(condition, size)
    given = meshes.put_everywhere(mesh, given)
    for start in range(0, num_draws, size):
        part = _draw_blocks(sampler, blocks, mesh, np.int32(start), *given)
        if last is not None:  # is copied while this one is computed
            parts.append(jax.tree.map(np.asarray, last))
        last = part
    keep = num_draws - len(parts) * size
    parts.append(jax.tree.map(lambda a: np.asarray(a)[:keep], last))
    if len(parts) == 1:
        return parts[0]
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
    given = params, key, as_energy(energy), conditions
    blocks = blocks_of(BATCH, BATCH, None)
    return _draw_blocks(sampler, blocks, None, np.int32(0), *given)


def trace_back_log_weights(
    key: Key,
    sampler: Sampler | ProbabilityFlow,
    params: Params,
    energy: Energy,
    x: Array,
    batch_size: int | None = None,
    condition: Array | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Log-weights of paths traced back from points x [M, D], on the host."""
    blocks = blocks_of(batch_size, len(x), mesh)
    size, parts = blocks.total, []
    given = params, key, as_energy(energy), _repeated(condition, size)
    given = meshes.put_everywhere(mesh, given)
    for start in range(0, x.shape[0], size):
        points = x[start : start + size]
        padding = jnp.broadcast_to(points[:1], (size - len(points), x.shape[1]))
        filled = meshes.put_everywhere(mesh, jnp.concatenate([points, padding]))
        first = np.int32(start)
        values = _trace_blocks(sampler, blocks, mesh, first, *given, filled)
        parts.append(np.asarray(values)[: len(points)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw_blocks(sampler, blocks, mesh, start, params, key, energy, conditions):
    def block(shared, inputs):
        params, key, energy, start = shared
        index, rows = inputs
        final = jax.vmap(sampler.final, in_axes=(None, 0, None, 0))
        return final(params, _keys(key, start, index, blocks), energy, rows)

    shared = params, key, energy, start
    return _over_blocks(block, blocks, mesh, shared, conditions)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _trace_blocks(sampler, blocks, mesh, start, params, key, energy, conditions, x):
    def block(shared, inputs):
        params, key, energy, start = shared
        index, (points, rows) = inputs
        keys = _keys(key, start, index, blocks)
        trace = jax.vmap(sampler.trace_back, in_axes=(None, 0, 0, None, 0))
        return trace(params, keys, points, energy, rows).log_weight

    shared = params, key, energy, start
    return _over_blocks(block, blocks, mesh, shared, (x, conditions))


def _over_blocks(block, blocks, mesh, shared, of_rows):
    """One block after the other, and the devices of a mesh side by side."""

    def run(shared, inputs):
        return jax.lax.map(lambda one: block(shared, one), inputs)

    if mesh is not None:
        run = meshes.by_device(mesh, run, whole=1, spread=1)
    inputs = jnp.arange(blocks.number), _in_blocks(of_rows, blocks)
    return meshes.everywhere(mesh, _flat(run(shared, inputs)))


def blocks_of(batch_size: int | None, num_draws: int, mesh: Mesh | None) -> Blocks:
    """As many rows as the batch needs, and as many for each device as for the others.

    On CPUs in blocks of a fixed size, elsewhere in one for each device.
    """
    num_devices = 1 if mesh is None else mesh.size
    if batch_size is None:
        many = num_draws > BATCH and not meshes.on_cpu(mesh)
        batch_size = LARGE_BATCH if many else BATCH
    if not meshes.on_cpu(mesh):
        return Blocks(num_devices, -(-batch_size // num_devices))
    return Blocks(-(-batch_size // (BLOCK * num_devices)) * num_devices, BLOCK)


def _repeated(condition, size):
    if condition is None:
        return None
    return jnp.broadcast_to(condition, (size, *condition.shape))


def _in_blocks(tree: Any, blocks: Blocks) -> Any:
    return jax.tree.map(lambda a: a.reshape(*blocks, *a.shape[1:]), tree)


def _keys(key, start, index, blocks):
    number = start + index * blocks.num_rows + jnp.arange(blocks.num_rows)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(number)


def _flat(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), tree)
