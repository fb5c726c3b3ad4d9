"""Coordinates y in which a posterior over x is about a unit normal.

With ``x = forward(y)`` one to one and smooth but for kinks, the energy of y is

    E_y(y) = E(forward(y)) - log_det(y),

with the log-determinant of dx/dy, so that the integral of ``exp(-energy)``, the
evidence, is the same in both.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from diffsamp.energies import as_energy
from diffsamp.types import Array, Energy


class Coordinates(Protocol):
    """A map such as `Affine`; a pytree."""

    def forward(self, y: Array) -> Array:
        """X of y, [D]."""
        ...

    def inverse(self, x: Array) -> Array:
        """Y of x, [D]."""
        ...

    def forward_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Both x of y, [D], and the log-determinant of dx/dy at y, []."""
        ...


class Chain(NamedTuple):
    """One map after another: ``x = outer.forward(inner.forward(y))``.

    Attributes:
        outer: the map that is next to x.
        inner: the one that is next to y.

    Example:
        >>> import jax.numpy as jnp
        >>> from diffsamp.numpyro import Affine, Chain
        >>> twice = Affine(jnp.zeros(1), 2 * jnp.eye(1))
        >>> Chain(twice, twice).forward(jnp.ones(1)).tolist()
        [4.0]
    """

    outer: Coordinates
    inner: Coordinates

    def forward(self, y: Array) -> Array:
        """X of y, [D]."""
        return self.outer.forward(self.inner.forward(y))

    def inverse(self, x: Array) -> Array:
        """Y of x, [D]."""
        return self.inner.inverse(self.outer.inverse(x))

    def forward_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Both x of y, [D], and the log-determinant of dx/dy at y, []."""
        between, inner = self.inner.forward_and_log_det(y)
        x, outer = self.outer.forward_and_log_det(between)
        return x, outer + inner


def energy_in(coordinates: Coordinates, energy: Energy, y: Array) -> Array:
    """The energy of y, of one that maps x [D] to []; NaN counts as no density.

    Args:
        coordinates: the map from y to x.
        energy: of x.
        y: [D].
    """
    x, log_det = coordinates.forward_and_log_det(y)
    value = energy(x) - log_det
    return jnp.where(jnp.isnan(value), jnp.inf, value)


def in_coordinates(energy: Energy, coordinates: Coordinates) -> Partial:
    """The energy of ``y`` with ``x = coordinates.forward(y)``; data stay data.

    Args:
        energy: maps [D] to [], of x.
        coordinates: the map.
    """
    return Partial(energy_in, coordinates, as_energy(energy))


@jax.jit
def to_y(coordinates: Coordinates, x: Array) -> Array:
    """Points [N, D] in the coordinates of a map."""
    return jax.vmap(coordinates.inverse)(x)


@jax.jit
def to_x(coordinates: Coordinates, y: Array) -> Array:
    """Points [N, D] out of them."""
    return jax.vmap(coordinates.forward)(y)


@jax.jit
def log_dets_of(coordinates: Coordinates, y: Array) -> Array:
    """Log-determinants of dx/dy at points [N, D], [N]."""
    return jax.vmap(coordinates.forward_and_log_det)(y)[1]
