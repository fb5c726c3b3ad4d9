"""Curved densities in the plane: concentric rings and two moons."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import cast, default_float, point, rejection, safe_norm
from diffsamp.types import Modes, Target

_RINGS_STIFFNESS = 100.0
_MOON_RADIUS, _MOON_RADIAL_SD, _MOON_SIDE_SD = 2.0, 0.2, 0.3


def _on_circle(radius, angle):
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)


def _rings_energy(radii, x):
    x = point(x, 2)
    (radii,) = cast(x.dtype, radii)
    return _RINGS_STIFFNESS * jnp.min((safe_norm(x) - radii) ** 2)


def _rings_assign(radii, x):
    x = point(x, 2)
    (radii,) = cast(x.dtype, radii)
    return jnp.argmin(jnp.abs(safe_norm(x) - radii))


def _rings_sample(radii, key, n):
    (radii,) = cast(default_float(), radii)
    key_ring, key_radius, key_angle = jax.random.split(key, 3)
    edges = jnp.cumsum(radii) / jnp.sum(radii)
    u = jax.random.uniform(key_ring, (n,), radii.dtype)
    centre = radii[jnp.sum((u[:, None] >= edges[None, :-1]).astype(int), axis=1)]
    sd = math.sqrt(0.5 / _RINGS_STIFFNESS)

    def propose(key):
        return centre + sd * jax.random.normal(key, (n,), radii.dtype)

    def log_accept(radius):
        ratio = radius / (2.0 * centre)
        inside = (ratio > 0) & (ratio < 1)
        return jnp.where(inside, jnp.log(jnp.where(inside, ratio, 1.0)), -jnp.inf)

    radius = rejection(key_radius, propose, log_accept)
    angle = jax.random.uniform(key_angle, (n,), radii.dtype, -math.pi, math.pi)
    return _on_circle(radius, angle)


def rings() -> Target:
    r"""Three concentric rings, 2-D.

    .. math:: \rho(x) = \exp\{-100 \min_k (|x| - c_k)^2\}, \quad c = (1, 3, 5)

    log Z = 2.304881 = log(1.8 pi sqrt(pi)), up to exp(-100). As in sde_sampler
    (Richter and Berner 2024); the rings of Blessing et al. 2024 are another density.
    Modes are the nearest rings, weights 1/9, 3/9, 5/9. ``scale`` is the root mean
    square per coordinate. The energy has kinks at radii 2 and 4 and at the origin,
    where its gradient is set to 0.

    Example:
        >>> import diffsamp as ds
        >>> round(ds.targets.rings().log_z, 6)
        2.304881
    """
    radii = np.array([1.0, 3.0, 5.0])
    width = math.sqrt(math.pi / _RINGS_STIFFNESS)
    return Target(
        energy=Partial(_rings_energy, radii),
        dim=2,
        name="rings",
        log_z=math.log(2 * math.pi * width * radii.sum()),
        sample=Partial(_rings_sample, radii),
        modes=Modes(jnp.asarray(radii / radii.sum()), Partial(_rings_assign, radii)),
        scale=2.9,
    )


def _moons_energy(x):
    x = point(x, 2)
    radial = (safe_norm(x) - _MOON_RADIUS) / _MOON_RADIAL_SD
    right = (x[0] - _MOON_RADIUS) / _MOON_SIDE_SD
    left = (x[0] + _MOON_RADIUS) / _MOON_SIDE_SD
    return 0.5 * radial**2 - jnp.logaddexp(-0.5 * right**2, -0.5 * left**2)


def _moons_assign(x):
    return (point(x, 2)[0] > 0).astype(int)


def _moons_sample(key, n):
    dtype = default_float()
    key_side, key_right = jax.random.split(key)
    reach = _MOON_RADIUS + 10 * _MOON_RADIAL_SD

    def propose(key):
        key_radius, key_angle = jax.random.split(key)
        z = jax.random.normal(key_radius, (n,), dtype)
        angle = jax.random.uniform(key_angle, (n,), dtype, -math.pi, math.pi)
        return jnp.stack([_MOON_RADIUS + _MOON_RADIAL_SD * z, angle], axis=-1)

    def log_accept(polar):
        ratio = polar[:, 0] / reach
        inside = (ratio > 0) & (ratio < 1)
        log_area = jnp.where(inside, jnp.log(jnp.where(inside, ratio, 1.0)), -jnp.inf)
        side = (polar[:, 0] * jnp.cos(polar[:, 1]) - _MOON_RADIUS) / _MOON_SIDE_SD
        return log_area - 0.5 * side**2

    polar = rejection(key_right, propose, log_accept)
    sign = jax.random.rademacher(key_side, (n,), dtype)
    x = _on_circle(polar[:, 0], polar[:, 1])
    return jnp.stack([sign * x[:, 0], x[:, 1]], axis=-1)


def two_moons() -> Target:
    r"""Two facing crescents, 2-D.

    .. math:: \rho(x) = \exp\{-\tfrac12 (\tfrac{|x| - 2}{0.2})^2\}
              \big[e^{-\frac12 (\frac{x_1 - 2}{0.3})^2}
                 + e^{-\frac12 (\frac{x_1 + 2}{0.3})^2}\big]

    log Z = 0.804214 (2-D quadrature). Normalising-flow folklore, after Rezende and
    Mohamed 2015. Modes are the half planes (0 left, 1 right), weight 1/2 each.
    ``scale`` is the root mean square per coordinate. `sample` leaves out the parts
    beyond ten standard deviations, a mass below 1e-22.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.two_moons().modes.weights.tolist()
        [0.5, 0.5]
    """
    return Target(
        energy=Partial(_moons_energy),
        dim=2,
        name="two_moons",
        log_z=0.8042144486324325,
        sample=Partial(_moons_sample),
        modes=Modes(jnp.array([0.5, 0.5]), Partial(_moons_assign)),
        scale=1.5,
    )
