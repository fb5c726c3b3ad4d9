"""A picture drawn by code, as a density in the plane."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import cast, default_float, point
from diffsamp.types import Target

_FRAME = 4.0
_NODES = 129
_TAIL_SD = 3.0
_TAIL_WEIGHT = 0.05


def _disc(x, y, centre_x, centre_y, radius):
    return np.hypot(x - centre_x, y - centre_y) - radius


def _box(x, y, centre_x, centre_y, half_width, half_height):
    return np.maximum(
        np.abs(x - centre_x) - half_width, np.abs(y - centre_y) - half_height
    )


def _sun(x, y):
    """Signed distance to a smiling sun with nine rays."""
    x, y = x - 1.6, y - 1.6
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    eyes = np.minimum(_disc(x, y, -0.33, 0.25, 0.13), _disc(x, y, 0.33, 0.25, 0.13))
    smile = np.maximum(np.abs(radius - 0.58) - 0.09, y + 0.2)
    face = np.maximum(radius - 0.95, -np.minimum(eyes, smile))
    off_ray = np.abs((angle * 9 / (2 * np.pi)) % 1.0 - 0.5) * 2 * np.pi / 9
    rays = np.maximum(radius * np.sin(off_ray) - 0.09, np.abs(radius - 1.5) - 0.3)
    return np.minimum(face, rays)


def _house(x, y):
    """Signed distance to a house with a door, a window and a chimney."""
    walls = _box(x, y, -1.7, -1.3, 0.95, 0.9)
    door = _box(x, y, -2.1, -1.75, 0.22, 0.45)
    window = _box(x, y, -1.25, -1.2, 0.28, 0.28)
    roof = np.maximum((np.abs(x + 1.7) + y - 0.85) / math.sqrt(2), -0.3 - y)
    chimney = _box(x, y, -1.1, 0.4, 0.14, 0.5)
    return np.minimum(
        np.maximum(walls, -np.minimum(door, window)), np.minimum(roof, chimney)
    )


def _hill(x, y):
    """Signed distance to the line of the ground."""
    ground = np.abs(y + 2.6 - 0.25 * np.sin(1.3 * x)) - 0.12
    return np.maximum(ground, np.abs(x) - 3.2)


@functools.lru_cache
def _draw():
    """Ink on the nodes, in [0, 1] and zero on the frame, indexed [x, y]."""
    axis = np.linspace(-_FRAME, _FRAME, _NODES)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    distance = np.minimum(np.minimum(_sun(x, y), _house(x, y)), _hill(x, y))
    ink = 1.0 / (1.0 + np.exp(np.clip(distance / 0.04, -40.0, 40.0)))
    ink[[0, -1], :] = 0.0
    ink[:, [0, -1]] = 0.0
    return ink


def _log_tail(log_tail_mass, x):
    log_sd = math.log(_TAIL_SD) + 0.5 * math.log(2 * math.pi)
    return log_tail_mass - 2 * log_sd - 0.5 * jnp.sum((x / _TAIL_SD) ** 2)


def _interpolate(ink, x):
    spacing = 2 * _FRAME / (_NODES - 1)
    position = (x + _FRAME) / spacing
    cell = jnp.clip(jnp.floor(position), 0, _NODES - 2)
    u = position - cell
    i, j = cell.astype(int)
    low = ink[i, j] * (1 - u[1]) + ink[i, j + 1] * u[1]
    high = ink[i + 1, j] * (1 - u[1]) + ink[i + 1, j + 1] * u[1]
    return low * (1 - u[0]) + high * u[0]


def _energy(ink, log_tail_mass, x):
    x = point(x, 2)
    ink, log_tail_mass = cast(x.dtype, ink, log_tail_mass)
    inside = jnp.clip(x, -_FRAME, _FRAME)
    contrast = _interpolate(ink, inside) * jnp.exp(-_log_tail(log_tail_mass, inside))
    return -_log_tail(log_tail_mass, x) - jnp.log1p(contrast)


def _sample(row_cdf, column_cdf, key, n):
    row_cdf, column_cdf = cast(default_float(), row_cdf, column_cdf)
    dtype, spacing = row_cdf.dtype, 2 * _FRAME / (_NODES - 1)
    key_tail, key_z, key_u, key_tent = jax.random.split(key, 4)
    u = jax.random.uniform(key_u, (n, 2), dtype)
    row = jnp.searchsorted(row_cdf, u[:, 0], side="right")
    column = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(
        column_cdf[row], u[:, 1]
    )
    tent = jax.random.uniform(key_tent, (2, n, 2), dtype)
    node = jnp.stack([row, column], axis=1).astype(dtype)
    ink = (node + tent[0] - tent[1]) * spacing - _FRAME
    tail = _TAIL_SD * jax.random.normal(key_z, (n, 2), dtype)
    is_tail = jax.random.bernoulli(key_tail, _TAIL_WEIGHT, (n, 1))
    return jnp.where(is_tail, tail, ink)


def drawn_image() -> Target:
    r"""A smiling sun over a house, drawn on 129 x 129 nodes of [-4, 4]^2.

    .. math:: \rho(x) = B(x) + c\, N(x; 0, 3^2 I)

    B interpolates the ink bilinearly and vanishes outside the frame; the Gaussian has
    5 % of the mass, so the energy is finite everywhere, with kinks on the grid lines.
    B is a sum of tents, hence log Z = log(h^2 sum(ink) / 0.95) in closed form, and a
    node plus triangular noise is an exact draw. After the photographs in Stochastic
    Normalizing Flows (Wu et al. 2020) and sde_sampler, but with a picture of our own.
    ``scale`` is the overall root mean square, rounded.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.drawn_image().dim
        2
    """
    ink = _draw()
    spacing = 2 * _FRAME / (_NODES - 1)
    ink_mass = float(ink.sum()) * spacing**2
    rows = ink.sum(axis=1)
    # Rows without ink keep a zero CDF, they are never chosen.
    columns = np.cumsum(ink, axis=1) / np.where(rows > 0, rows, 1.0)[:, None]
    log_tail_mass = math.log(ink_mass * _TAIL_WEIGHT / (1 - _TAIL_WEIGHT))
    return Target(
        energy=Partial(_energy, ink, np.asarray(log_tail_mass)),
        dim=2,
        name="drawn_image",
        log_z=math.log(ink_mass / (1 - _TAIL_WEIGHT)),
        sample=Partial(_sample, (np.cumsum(rows) / rows.sum())[:-1], columns[:, :-1]),
        scale=2.0,
    )
