"""The second pass of detached objectives: gradients of given paths, a piece at a time.

The loss L of a detached objective depends on the parameters through the densities
d_k of the steps of given paths alone, so that its gradient is the sum over steps of
``(dL / dd_k) (dd_k / dparams)``, and one step needs nothing of the others but numbers.
Backwards, therefore, a piece of C steps of all paths is evaluated and differentiated,
its gradient added up, and forgotten: memory is that of one piece, whatever K. C is
chosen so that a piece fits a budget. On a CPU this is the cache, and the pass then
runs at the speed of arithmetic instead of that of memory.

Forwards, a path that has just been simulated with the same parameters needs nothing at
all: its simulation came by the densities (`Path.densities`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffsamp.types import Array, Densities, Params, Path, Trajectory

CPU_MEMORY = 8 * 2**20
DEVICE_MEMORY = 2**30

_ROWS = 1009  # a number that is the length of nothing else


def score_paths(
    sampler: Any,
    params: Params,
    paths: Path,
    condition: Array | None = None,
    *,
    memory: int | None = None,
    mesh: Any = None,
) -> tuple[Trajectory, Array]:
    """Scores a batch of paths; differentiable in the parameters, not in the states.

    Args:
        sampler: the sampler.
        params: its parameters. Where ``paths.densities`` are given, those with which
            the paths were simulated.
        paths: B paths; leaves have a leading axis B.
        condition: [B, C], or None.
        memory: bytes that a piece may take on the way back, or None for a number that
            suits the backend.
        mesh: devices over which the paths are spread, or None.

    Returns:
        Trajectories, with a leading axis B, and `Densities.share_outside`, [B, K].

    Raises:
        ValueError: when the memory does not suffice for a single step.
    """
    paths = jax.lax.stop_gradient(paths)
    num_rows = paths.energy.shape[0] // (1 if mesh is None else mesh.size)
    size = steps_at_a_time(sampler, params, num_rows, memory)
    densities = _densities(sampler, size, params, paths, condition)
    trajectories = jax.vmap(sampler.with_densities)(paths, densities)
    return trajectories, densities.share_outside


def steps_at_a_time(
    sampler: Any, params: Params, num_rows: int, memory: int | None = None
) -> int:
    """Number C of steps of ``num_rows`` paths that are differentiated together.

    Args:
        sampler: the sampler.
        params: its parameters, or their shapes.
        num_rows: B.
        memory: bytes that they may take, or None for a number that suits the backend.

    Raises:
        ValueError: when the memory does not suffice for a single step.

    Example:
        >>> import jax, diffsamp as ds
        >>> from diffsamp.scoring import steps_at_a_time
        >>> sampler = ds.samplers.dis(dim=2, num_steps=100)
        >>> params = sampler.init(jax.random.key(0))
        >>> steps_at_a_time(sampler, params, 512, memory=2**31)
        100
    """
    if memory is None:
        on_cpu = jax.default_backend() == "cpu"
        budget = CPU_MEMORY if on_cpu else DEVICE_MEMORY
    else:
        budget = memory
    per_step = num_rows * bytes_per_step(sampler, params)
    if memory is not None and memory < per_step:
        raise ValueError(
            f"memory_budget={memory} bytes is too small: scoring one step of "
            f"{num_rows} paths takes {per_step}; raise it, or lower batch_size or the "
            "width of the network"
        )
    size = min(max(1, budget // per_step), sampler.num_steps)
    return -(-sampler.num_steps // -(-sampler.num_steps // size))  # pieces alike


def bytes_per_step(sampler: Any, params: Params) -> int:
    """What differentiating one step of one path keeps in memory on the way."""
    dtype = jax.dtypes.canonicalize_dtype(float)
    dim, scored = sampler.dim, sampler.dim if sampler.needs_score else 0
    xs = jax.ShapeDtypeStruct((_ROWS, 2, dim), dtype)
    scores = jax.ShapeDtypeStruct((_ROWS, 2, scored), dtype)
    condition = None
    if sampler.condition_dim:
        condition = jax.ShapeDtypeStruct((_ROWS, sampler.condition_dim), dtype)

    def kept(params, xs, scores, condition):
        steps = jax.tree.map(lambda column: column[:1], sampler.steps())
        of_rows = jax.vmap(sampler.densities, in_axes=(None, None, 0, 0, 0))

        def values(params):
            return of_rows(params, steps, xs, scores, condition)[:2]

        return jax.vjp(values, params)

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, xs, scores, condition))
    of_rows = [leaf for leaf in leaves if _ROWS in leaf.shape]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in of_rows) // _ROWS


def _densities(sampler, size, params, paths, condition) -> Densities:
    num_steps, num_rows = sampler.num_steps, paths.energy.shape[0]
    starts = size * jnp.arange(-(-num_steps // size))

    def piece(params, paths, condition, start) -> Densities:
        """[B, C] each, of the steps from ``start`` on."""

        def cut(array, length, axis):
            return jax.lax.dynamic_slice_in_dim(array, start, length, axis)

        steps = jax.tree.map(lambda column: cut(column, size, 0), sampler.steps())
        states = cut(paths.xs, size + 1, 1), cut(paths.scores, size + 1, 1)
        of_rows = jax.vmap(sampler.densities, in_axes=(None, None, 0, 0, 0))
        return of_rows(params, steps, *states, condition)

    def forward(params, paths, condition):
        if paths.densities is not None:
            return paths.densities
        if len(starts) == 1:
            return piece(params, paths, condition, 0)

        def add(found, start):
            start = jnp.minimum(start, num_steps - size)
            here = piece(params, paths, condition, start)
            put = jax.lax.dynamic_update_slice_in_dim
            return jax.tree.map(lambda a, b: put(a, b, start, 1), found, here), None

        dtype = paths.energy.dtype
        empty = Densities(*(jnp.zeros((num_rows, num_steps), dtype) for _ in range(3)))
        return jax.lax.scan(add, empty, starts)[0]

    if len(starts) == 1 and paths.densities is None:
        return forward(params, paths, condition)  # what it keeps fits: nothing twice

    def backward(saved, slopes):
        params, paths, condition = saved

        def add(total, begin):
            # The last piece is as long as the others and begins within its neighbour.
            start = jnp.minimum(begin, num_steps - size)
            _, pull = jax.vjp(lambda p: piece(p, paths, condition, start)[:2], params)
            new = start + jnp.arange(size) >= begin
            here = (
                jax.lax.dynamic_slice_in_dim(slope, start, size, 1)
                for slope in slopes[:2]
            )
            (gradient,) = pull(tuple(jnp.where(new[None], s, 0.0) for s in here))
            return jax.tree.map(jnp.add, total, gradient), None

        nothing = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, nothing, starts)[0], None, None

    values = jax.custom_vjp(forward)
    values.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    return values(params, paths, condition)
