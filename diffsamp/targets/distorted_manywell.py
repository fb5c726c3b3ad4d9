"""The many-well bent, coupled and scaled by a map of unit Jacobian."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import point, require_dim
from diffsamp.targets.wells import manywell
from diffsamp.types import Target

_BEND, _COUPLING, _SPREAD = 0.5, 0.5, 2.5


def _scales(num_pairs):
    """Geometric from 1 / 2.5 to 2.5, of product 1."""
    return (
        np.geomspace(1 / _SPREAD, _SPREAD, num_pairs) if num_pairs > 1 else np.ones(1)
    )


def _shift(u):
    """What is added to v_k given all u, [..., D/2]."""
    before = jnp.concatenate([jnp.zeros_like(u[..., :1]), u[..., :-1]], axis=-1)
    return _BEND * (u**2 - 3.0) + _COUPLING * before


def _undo(x):
    u, v = x[0::2], x[1::2]
    scale = jnp.asarray(_scales(u.shape[0]), x.dtype)
    return jnp.stack([u, (v - _shift(u)) / scale], axis=1).reshape(x.shape)


def _energy(plain, x):
    return plain(_undo(point(x, 2 * plain.args[0].shape[0])))


def _sample(plain, key, n):
    z = plain(key, n)
    u, v = z[:, 0::2], z[:, 1::2]
    scale = jnp.asarray(_scales(u.shape[1]), z.dtype)[None, :]
    return jnp.stack([u, scale * v + _shift(u)], axis=2).reshape(z.shape)


def distorted_manywell(dim: int = 32) -> Target:
    r"""The tilted many-well of `manywell`, distorted: bent, coupled, unequal scales.

    With (u, v) the pairs of `manywell` the coordinates are

    .. math:: x = (u_1, w_1, u_2, w_2, \ldots), \quad
              w_k = s_k v_k + \tfrac12 (u_k^2 - 3) + \tfrac12 u_{k-1}

    with u_0 = 0 and s_k geometric from 0.4 to 2.5. The Jacobian is triangular of
    determinant prod s_k = 1, so log Z and the modes with their weights are those of
    `manywell`; but w_k now follows its own well and its neighbour's, at a scale of its
    own, so no factor of the density is left to learn by itself. Our own: the
    "distorted manywell" of Gritsaev et al. 2025 is not defined where we could read it,
    and numbers are not comparable.

    Args:
        dim: dimension D, even.

    Raises:
        ValueError: when ``dim`` is not a positive even number.

    Example:
        >>> import diffsamp as ds
        >>> round(ds.targets.distorted_manywell().log_z, 6)
        164.695675
    """
    require_dim(dim, "a positive even number", dim >= 2 and dim % 2 == 0)
    plain = manywell(dim)
    assert isinstance(plain.energy, Partial)
    assert plain.sample is not None
    return Target(
        energy=Partial(_energy, plain.energy),
        dim=dim,
        name="distorted_manywell" if dim == 32 else f"distorted_manywell_{dim}",
        log_z=plain.log_z,
        sample=Partial(_sample, plain.sample),
        modes=plain.modes,  # by the signs of u, which are as they were
        scale=1.6,
    )
