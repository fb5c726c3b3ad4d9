"""Many devices: rows of a batch are spread over a mesh, all else is on each of them.

All that the library knows of devices is here. Programs run on several hosts as on one:
every process calls the same functions with the same arguments, and what depends on a
clock is decided by the first. An exception or an interrupt in one of them leaves the
others waiting.
"""

from __future__ import annotations

import os
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
    if 1 < len(_hosts(mesh)) < jax.process_count():
        raise ValueError(
            f"mesh has devices of {len(_hosts(mesh))} of {jax.process_count()} "
            "processes; use those of all, or of one alone"
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
    if mesh is None or len(_hosts(mesh)) == 1:
        return values
    sent = multihost_utils.broadcast_one_to_all(np.asarray(values, np.float32))
    return tuple(float(value) for value in sent)


def is_first_process(mesh: Mesh | None) -> bool:
    """Whether this process is the one that writes files."""
    return mesh is None or jax.process_index() == min(_hosts(mesh))


def check_agreed(mesh: Mesh | None, values: tuple[float, ...], message: str) -> None:
    """Raises on all processes that share a mesh where one has other values.

    Raises:
        RuntimeError: with the message.
    """
    if mesh is None or len(_hosts(mesh)) == 1:
        return
    found = multihost_utils.process_allgather(np.asarray(values, np.float32))
    if np.any(found != found[:1]):
        raise RuntimeError(message)


def wait_for_others(mesh: Mesh | None) -> None:
    """Returns when all processes that share a mesh have come here."""
    if mesh is not None and len(_hosts(mesh)) > 1:
        multihost_utils.sync_global_devices("diffsamp")


def by_device(
    mesh: Mesh, function: Any, *, whole: int, spread: int, out_whole: bool = False
) -> Any:
    """Runs a function on every device with its part of the rows.

    Args:
        mesh: the devices.
        function: of ``whole`` arguments that every device has, and after them
            ``spread`` ones of which each has its rows.
        whole: how many of the first kind.
        spread: how many of the second.
        out_whole: whether all devices return the same, or each its rows.
    """
    here, everywhere = rows(mesh), PartitionSpec()
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(everywhere,) * whole + (here,) * spread,
        out_specs=everywhere if out_whole else here,
        check_vma=False,
    )


def total(mesh: Mesh, tree: Tree) -> Tree:
    """Within `by_device`: the sum over devices."""
    return jax.lax.psum(tree, mesh.axis_names)


def on_cpu(mesh: Mesh | None = None) -> bool:
    """Whether the devices of a mesh, or those of arrays without one, are CPUs."""
    if mesh is None:
        return jax.default_backend() == "cpu"
    return mesh.devices.flat[0].platform == "cpu"


def cores_of_device() -> int:
    """How many cores of this machine, that this process may use, a CPU device has."""
    try:
        num_cores = len(os.sched_getaffinity(0))
    except AttributeError:  # outside Linux
        num_cores = os.cpu_count() or 1
    return max(1, num_cores // jax.local_device_count("cpu"))


def _hosts(mesh: Mesh) -> set[int]:
    return {device.process_index for device in mesh.devices.flat}


def _constrained(tree, sharding):
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree
    )
