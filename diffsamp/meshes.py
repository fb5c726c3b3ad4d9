"""Many devices: rows of a batch are spread over a mesh, all else is on each of them.

Nothing else in the library knows of devices. Programs run on several hosts as on one:
every process calls the same functions with the same arguments, and what depends on a
clock is decided by the first.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def as_mesh(mesh: Any) -> Mesh | None:
    """A mesh over whose devices the compiler is free to spread arrays, or None.

    Raises:
        ValueError: when it is no mesh.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}; make one of "
            'all devices by jax.make_mesh((jax.device_count(),), ("batch",))'
        )
    return Mesh(mesh.devices, mesh.axis_names)


def check_divides(name: str, num_rows: int, mesh: Mesh | None) -> None:
    """Checks that every device gets as many rows as the others.

    Raises:
        ValueError: when one does not.
    """
    if mesh is not None and num_rows % mesh.size:
        raise ValueError(
            f"{name}={num_rows} cannot be spread evenly over the {mesh.size} devices "
            f"of the mesh; use a multiple of {mesh.size}, or a mesh "
            "of fewer devices"
        )


def rows(mesh: Mesh) -> PartitionSpec:
    """The first axis is spread over all axes of the mesh."""
    return PartitionSpec(mesh.axis_names)


def spread(mesh: Mesh | None, tree: Tree) -> Tree:
    """Within compiled code: the first axis of every leaf goes over the mesh."""
    if mesh is None:
        return tree
    return _constrained(tree, NamedSharding(mesh, rows(mesh)))


def everywhere(mesh: Mesh | None, tree: Tree) -> Tree:
    """Within compiled code: every leaf is whole on every device."""
    if mesh is None:
        return tree
    return _constrained(tree, NamedSharding(mesh, PartitionSpec()))


def put_everywhere(mesh: Mesh | None, tree: Tree) -> Tree:
    """Copies every array to all devices of the mesh."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _put_on_all_hosts(leaf, sharding), tree)


def _put_on_all_hosts(leaf, sharding):
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = _put_on_all_hosts(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def on_this_host(tree: Tree) -> Tree:
    """Arrays that are whole everywhere, as this process has them."""
    return jax.tree.map(
        lambda leaf: leaf.addressable_data(0) if _is_global(leaf) else leaf, tree
    )


def _is_global(leaf) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def agreed(mesh: Mesh | None, values: tuple[float, ...]) -> tuple[float, ...]:
    """The first process's values, on all processes that share a mesh."""
    if mesh is None or jax.process_count() == 1:
        return values
    sent = multihost_utils.broadcast_one_to_all(np.asarray(values, np.float32))
    return tuple(float(value) for value in sent)


def is_first_process(mesh: Mesh | None) -> bool:
    """Whether this process is the one that writes files."""
    return mesh is None or jax.process_index() == 0


def _constrained(tree, sharding):
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree
    )
