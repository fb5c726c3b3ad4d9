"""What a user reads off the draws: every site, and the unconstrained coordinates.

A standard deviation of ``tau`` can hang on a few draws where that of ``log tau`` does
not, and the other way round. Verdicts are about both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.numpyro.coordinates import to_x
from diffsamp.numpyro.target import ModelTarget
from diffsamp.types import Array, ArrayLike

BLOCK = 1_024  # points in a compiled call: one program for any number of points
MOST_COLUMNS = 1_000  # with more, deterministic sites are left out


class Columns(NamedTuple):
    """Numbers of which means and variances are asked, a column each.

    Attributes:
        values: of every point, [N, M].
        names: of the site that a column belongs to, M of them; those of unconstrained
            coordinates say so.
        num_free: number of these coordinates, which come first.
    """

    values: np.ndarray
    names: tuple[str, ...]
    num_free: int


def constrained(target: ModelTarget, y: ArrayLike) -> dict[str, Any]:
    """All sites at many points, block by block.

    Args:
        target: the posterior.
        y: points in its coordinates, [N, D].

    Returns:
        Site to [N, ...], on the host.
    """
    assert target.constrain is not None
    y = np.asarray(y)
    parts = []
    for start in range(0, len(y), BLOCK):
        block = y[start : start + BLOCK]
        filled = np.concatenate([block, np.repeat(block[:1], BLOCK - len(block), 0)])
        sites = jax.device_get(_constrain_block(target.constrain, jnp.asarray(filled)))
        parts.append(sites)
    return jax.tree.map(lambda *v: np.concatenate(v)[: len(y)], *parts)


def columns(target: ModelTarget, y: ArrayLike) -> Columns:
    """Unconstrained coordinates and all sites of points, as columns.

    Deterministic sites are left out where they are too many.

    Args:
        target: the posterior.
        y: points in its coordinates, [N, D].

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from diffsamp.numpyro import target_from_model
        >>> from diffsamp.numpyro.quantities import columns
        >>> def model():
        ...     numpyro.sample("tau", dist.HalfNormal(1.0))
        >>> columns(target_from_model(model), jnp.zeros((5, 1))).names
        ("'tau' (unconstrained)", "'tau'")
    """
    plain = target.standardised(None)
    assert plain.unravel is not None
    y = jnp.asarray(y)
    x = y if target.coordinates is None else to_x(target.coordinates, y)
    index = plain.unravel(jnp.arange(plain.dim, dtype=jnp.result_type(float)))
    own = {int(i): name for name, v in index.items() for i in np.ravel(v)}
    names = [f"{own[i]!r} (unconstrained)" for i in range(plain.dim)]
    values = [np.asarray(x, np.float64)]
    sites = {k: jax.tree.leaves(v) for k, v in constrained(target, y).items()}
    size = sum(leaf[0].size for leaves in sites.values() for leaf in leaves)
    kept = sites if size <= MOST_COLUMNS else target.site_names
    for name in sorted(kept):
        for leaf in sites[name]:
            flat = np.asarray(leaf, np.float64).reshape(len(y), -1)
            values.append(flat)
            names += [repr(name)] * flat.shape[1]
    return Columns(np.concatenate(values, axis=1), tuple(names), plain.dim)


def comparable(own: Columns, *others: Columns) -> tuple[Columns, ...]:
    """The columns that have a mean and a spread to be right about.

    Unconstrained coordinates, and of the sites what is finite and not constant, but
    for rounding, in the others.

    Args:
        own: of the draws.
        *others: of sets to compare them with.
    """
    good = np.ones(own.values.shape[1], bool)
    for other in others:
        size = np.max(np.abs(other.values), axis=0)
        with np.errstate(invalid="ignore"):
            good &= np.isfinite(size) & (np.std(other.values, axis=0) > 1e-6 * size)
    good[: own.num_free] = True
    kept = np.flatnonzero(good)
    return tuple(
        s._replace(values=s.values[:, kept], names=tuple(s.names[i] for i in kept))
        for s in (own, *others)
    )


@jax.jit
def _constrain_block(constrain: Partial, y: Array) -> dict[str, Array]:
    return jax.vmap(constrain)(y)
