"""The second pass of detached objectives: gradients of given paths, tile by tile.

The loss L of a detached objective depends on the parameters through the densities
d_bk of the steps k of given paths b alone, so that its gradient is the sum over both of
``(dL / dd_bk) (dd_bk / dparams)``, and one term needs nothing of the others but
numbers. Backwards, therefore, a tile of some rows and some steps is evaluated and
differentiated, its gradient added up, and forgotten: memory is that of one tile,
whatever K and B. Tiles fit a budget. Where a device is one core, this is the cache of
that core, and the pass then runs at the speed of arithmetic instead of that of memory.
Several cores share every operation of a tile, and it has to be worth the sharing.

Forwards, a path that has just been simulated with the same parameters needs nothing at
all: its simulation came by the densities (`Path.densities`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import meshes
from diffsamp.types import Array, Densities, Params, Path, Trajectory

CORE_MEMORY = 2**20
CORES_MEMORY = 2**25
DEVICE_MEMORY = 2**30
FEWEST_ROWS = 128  # in a tile, unless a budget asks for fewer

_ROWS = 1009  # a number that is the length of nothing else


class Tile(NamedTuple):
    """What is differentiated at a time.

    Attributes:
        num_rows: rows, on each device; divides the number of all there.
        num_steps: steps in a row of each.
    """

    num_rows: int
    num_steps: int


def score_paths(
    sampler: Any,
    params: Params,
    paths: Path,
    condition: Array | None = None,
    *,
    memory_budget: int | None = None,
    mesh: Any = None,
) -> tuple[Trajectory, Array]:
    """Scores a batch of paths; differentiable in the parameters, not in the states.

    Args:
        sampler: the sampler.
        params: its parameters. Where ``paths.densities`` are given, those with which
            the paths were simulated.
        paths: B paths; leaves have a leading axis B.
        condition: [B, C], or None.
        memory_budget: bytes that a tile may take on the way back on each device, or
            None for a number that suits the backend.
        mesh: devices over which the paths are spread, or None.

    Returns:
        Trajectories, with a leading axis B, and `Densities.share_outside`, [B, K].

    Raises:
        ValueError: when the memory does not suffice for one step of one path.
    """
    paths = jax.lax.stop_gradient(paths)
    num_rows = paths.energy.shape[0] // (1 if mesh is None else mesh.size)
    tile = tile_within(sampler, params, num_rows, memory_budget)
    densities = _densities(sampler, tile, mesh, params, paths, condition)
    with_densities = functools.partial(sampler.with_densities, params)
    trajectories = jax.vmap(with_densities)(paths, densities)
    return trajectories, densities.share_outside


def tile_within(
    sampler: Any, params: Params, num_rows: int, memory_budget: int | None = None
) -> Tile:
    """The largest tile within a budget: all rows if it can be, and as many steps.

    Args:
        sampler: the sampler.
        params: its parameters, or their shapes.
        num_rows: rows of the batch, on each device.
        memory_budget: bytes, or None for a number that suits the backend.

    Raises:
        ValueError: when the memory does not suffice for one step of one path.

    Example:
        >>> import jax, diffsamp as ds
        >>> from diffsamp.scoring import tile_within
        >>> sampler = ds.samplers.dis(dim=2, num_steps=100)
        >>> params = sampler.init(jax.random.key(0))
        >>> tile_within(sampler, params, 512, memory_budget=2**31)
        Tile(num_rows=512, num_steps=100)
    """
    each = bytes_per_step(sampler, params)
    fewest, budget = 1, memory_budget
    if budget is None:
        fewest, budget = FEWEST_ROWS, default_memory()
    elif budget < each:
        raise ValueError(
            f"memory_budget={memory_budget} bytes is too small: scoring one step of "
            f"one path takes {each}; raise it, or lower the width of the network"
        )
    divisors = [n for n in range(1, num_rows + 1) if num_rows % n == 0]
    sizes = [n for n in divisors if n >= fewest] or [num_rows]
    rows = max((n for n in sizes if n * each <= budget), default=sizes[0])
    if sampler.backbone is not None and rows < num_rows:
        rows = sizes[0]  # its features serve both steps beside a state
    steps = min(max(1, budget // (rows * each)), sampler.num_steps)
    num_pieces = -(-sampler.num_steps // steps)
    return Tile(rows, -(-sampler.num_steps // num_pieces))  # pieces alike


def default_memory() -> int:
    """Bytes that suit the backend."""
    if not meshes.on_cpu():
        return DEVICE_MEMORY
    return CORE_MEMORY if meshes.cores_of_device() == 1 else CORES_MEMORY


def bytes_per_step(sampler: Any, params: Params) -> int:
    """What differentiating one step of one path keeps in memory on the way."""
    dtype = jax.dtypes.canonicalize_dtype(float)
    dim, scored = sampler.dim, sampler.dim if sampler.needs_score else 0
    xs = jax.ShapeDtypeStruct((_ROWS, 2, dim), dtype)
    scores = jax.ShapeDtypeStruct((_ROWS, 2, scored), dtype)
    condition = None
    if sampler.condition_dim:
        condition = jax.ShapeDtypeStruct((_ROWS, sampler.condition_dim), dtype)

    def values(params, xs, scores, condition):
        steps = jax.tree.map(lambda column: column[:1], sampler.steps())
        return sampler.densities(params, steps, xs, scores, condition)[:2]

    return _bytes_per_row(values, params, xs, scores, condition)


def bytes_per_state(network: Any, params: Params, dim: int, condition_dim: int) -> int:
    """What differentiating a network of ``(params, x, time, condition)`` keeps."""
    dtype = jax.dtypes.canonicalize_dtype(float)
    shapes = (dim,), (), (condition_dim,)
    rows = [jax.ShapeDtypeStruct((_ROWS, *shape), dtype) for shape in shapes]
    return _bytes_per_row(
        network, params, *rows[:2], rows[2] if condition_dim else None
    )


def _bytes_per_row(function, params, *rows) -> int:
    def kept(params, *rows):
        of_rows = jax.vmap(function, in_axes=(None,) + (0,) * len(rows))
        return jax.vjp(lambda params: of_rows(params, *rows), params)

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, *rows))
    of_rows = [leaf for leaf in leaves if _ROWS in leaf.shape]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in of_rows) // _ROWS


def _densities(sampler, tile, mesh, params, paths, condition) -> Densities:
    num_steps = sampler.num_steps

    def tiles_of(tree):
        """[B, ...] to [tiles, rows, ...], and which tiles begin at which step."""
        num_tiles = jax.tree.leaves(tree)[0].shape[0] // tile.num_rows
        shape = num_tiles, tile.num_rows
        tree = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), tree)
        begins = np.arange(0, num_steps, tile.num_steps)
        index = np.stack(np.meshgrid(np.arange(num_tiles), begins), -1)
        return tree, index.reshape(-1, 2)

    def cut(array, number, start, length):
        """[tiles, rows, steps, ...] to [rows, length, ...]."""
        begin = (number, 0, start) + (0,) * (array.ndim - 3)
        sizes = (1, tile.num_rows, length, *array.shape[3:])
        return jax.lax.dynamic_slice(array, begin, sizes)[0]

    def evaluate(params, paths, condition, number, start) -> Densities:
        """[rows, steps] each, of one tile."""
        length = tile.num_steps
        steps = jax.tree.map(
            lambda column: jax.lax.dynamic_slice_in_dim(column, start, length),
            sampler.steps(),
        )
        states = (cut(a, number, start, length + 1) for a in (paths.xs, paths.scores))
        if condition is not None:
            condition = condition[number]
        of_rows = jax.vmap(sampler.densities, in_axes=(None, None, 0, 0, 0))
        return of_rows(params, steps, *states, condition)

    def start_of(begin):
        """The last tile is as long as the others and begins within its neighbour."""
        return jnp.minimum(begin, num_steps - tile.num_steps)

    def values(params, paths, condition):
        num_rows = paths.energy.shape[0]
        (paths, condition), index = tiles_of((paths, condition))

        def add(found, number_and_begin):
            number, begin = number_and_begin
            start = start_of(begin)
            here = evaluate(params, paths, condition, number, start)
            put = jax.lax.dynamic_update_slice
            return jax.tree.map(
                lambda a, b: put(a, b[None], (number, 0, start)), found, here
            ), None

        shape = num_rows // tile.num_rows, tile.num_rows, num_steps
        empty = Densities(*(jnp.zeros(shape, paths.xs.dtype) for _ in range(3)))
        found, _ = jax.lax.scan(add, empty, index)
        return jax.tree.map(lambda a: a.reshape(num_rows, num_steps), found)

    def gradient(params, paths, condition, slopes):
        (paths, condition, slopes), index = tiles_of((paths, condition, slopes))

        def add(total, number_and_begin):
            number, begin = number_and_begin
            start = start_of(begin)
            _, pull = jax.vjp(
                lambda p: evaluate(p, paths, condition, number, start)[:2], params
            )
            new = start + jnp.arange(tile.num_steps) >= begin
            here = (cut(slope, number, start, tile.num_steps) for slope in slopes)
            (gradient,) = pull(tuple(jnp.where(new[None], s, 0.0) for s in here))
            return jax.tree.map(jnp.add, total, gradient), None

        nothing = jax.tree.map(jnp.zeros_like, params)
        total = jax.lax.scan(add, nothing, index)[0]
        return total if mesh is None else meshes.total(mesh, total)

    known, paths = paths.densities, paths._replace(densities=None)
    one_tile = tile == (paths.energy.shape[0], num_steps)
    if one_tile and known is None:  # what it keeps fits
        return values(params, paths, condition)
    if mesh is not None:
        values = meshes.by_device(mesh, values, whole=1, spread=2)
        gradient = meshes.by_device(mesh, gradient, whole=1, spread=3, out_whole=True)

    def forward(params, known, paths, condition):
        return values(params, paths, condition) if known is None else known

    def keep(params, known, paths, condition):
        found = forward(params, known, paths, condition)
        return found, (params, paths, condition)

    def backward(saved, slopes):
        params, paths, condition = saved
        slope = gradient(params, paths, condition, tuple(slopes[:2]))
        return slope, None, None, None

    run = jax.custom_vjp(forward)
    run.defvjp(keep, backward)
    return run(params, known, paths, condition)
