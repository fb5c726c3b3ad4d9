"""What a user reads off the draws: every site, and the unconstrained coordinates.

A standard deviation of ``tau`` can hang on a few draws where that of ``log tau`` does
not, and the other way round. Verdicts are about both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.numpyro.pilots import to_x
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
    """

    values: np.ndarray
    names: tuple[str, ...]


def constrained(target: ModelTarget, y: ArrayLike) -> dict[str, np.ndarray]:
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
        parts.append({name: v[: len(block)] for name, v in sites.items()})
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


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
    x = y if target.affine is None else to_x(target.affine, y)
    index = plain.unravel(jnp.arange(plain.dim, dtype=jnp.result_type(float)))
    own = {int(i): name for name, v in index.items() for i in np.ravel(v)}
    names = [f"{own[i]!r} (unconstrained)" for i in range(plain.dim)]
    values = [np.asarray(x, np.float64)]
    sites = constrained(target, y)
    size = sum(v[0].size for v in sites.values())
    kept = sites if size <= MOST_COLUMNS else target.site_names
    for name in sorted(kept):
        flat = np.asarray(sites[name], np.float64).reshape(len(y), -1)
        values.append(flat)
        names += [repr(name)] * flat.shape[1]
    return Columns(np.concatenate(values, axis=1), tuple(names))


def comparable(own: Columns, *others: Columns) -> tuple[Columns, ...]:
    """The columns that have a mean and a spread to be right about.

    They are finite in all sets and not constant, but for rounding, in the others.

    Args:
        own: of the draws.
        *others: of sets to compare them with.
    """
    good = np.all(np.isfinite(own.values), axis=0)
    for other in others:
        size = np.max(np.abs(other.values), axis=0)
        with np.errstate(invalid="ignore"):
            good &= np.isfinite(size) & (np.std(other.values, axis=0) > 1e-6 * size)
    kept = np.flatnonzero(good)
    return tuple(
        Columns(s.values[:, kept], tuple(s.names[i] for i in kept))
        for s in (own, *others)
    )


@jax.jit
def _constrain_block(constrain: Partial, y: Array) -> dict[str, Array]:
    return jax.vmap(constrain)(y)
