"""Double wells: one alone, many side by side, and the tilted Manywell."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp.targets._common import cast, default_float, point, require_dim
from diffsamp.targets._well_pairs import sample_pair, sign_pattern, tabulate
from diffsamp.types import Modes, Target

_MAX_MODES = 64
_MANYWELL_CENTRE, _MANYWELL_SD, _MANYWELL_RIGHT = 1.7, 0.5, 0.8


def _wells_energy(separation, shift, gaussian_sd, x):
    num_wells = separation.shape[0]
    x = point(x, num_wells + gaussian_sd.shape[0])
    separation, shift, gaussian_sd = cast(x.dtype, separation, shift, gaussian_sd)
    wells = jnp.sum(((x[:num_wells] - shift) ** 2 - separation) ** 2)
    return wells + 0.5 * jnp.sum((x[num_wells:] / gaussian_sd) ** 2)


def _wells_sample(separation, shift, gaussian_sd, log_bound, key, n):
    delta, shift, gaussian_sd = cast(default_float(), separation, shift, gaussian_sd)
    key_wells, key_rest = jax.random.split(key)
    wells = sample_pair(
        key_wells,
        (n, delta.shape[0]),
        lambda y: -((y**2 - delta[None, :]) ** 2),
        log_bound,
        jnp.sqrt(delta)[None, :],
        jnp.sqrt(0.5 / delta)[None, :],
        0.5,
    )
    rest = jax.random.normal(key_rest, (n, gaussian_sd.shape[0]), delta.dtype)
    return jnp.concatenate([wells + shift[None, :], gaussian_sd[None, :] * rest], 1)


def _wells_assign(shift, gaussian_sd, x):
    x = point(x, shift.shape[0] + gaussian_sd.shape[0])
    (shift_x,) = cast(x.dtype, shift)
    return sign_pattern(shift, x[: shift.shape[0]] - shift_x)


def _wells(name, num_wells, separation, shift, num_gaussian, scale):
    # Variance 1/(2 separation): target and proposal fall equally to the barrier.
    log_z, _, log_bound = tabulate(
        lambda y: -((y**2 - separation) ** 2),
        math.sqrt(separation),
        math.sqrt(0.5 / separation),
        0.5,
    )
    delta, shifts = np.full(num_wells, separation), np.full(num_wells, shift)
    gaussian_sd = np.ones(num_gaussian)
    num_modes = 2**num_wells
    return Target(
        energy=Partial(_wells_energy, delta, shifts, gaussian_sd),
        dim=num_wells + num_gaussian,
        name=name,
        log_z=num_wells * log_z + 0.5 * num_gaussian * math.log(2 * math.pi),
        sample=Partial(
            _wells_sample, delta, shifts, gaussian_sd, np.asarray(log_bound)
        ),
        modes=Modes(
            jnp.full(num_modes, 1 / num_modes),
            Partial(_wells_assign, shifts, gaussian_sd),
        ),
        scale=scale,
    )


def double_well(separation: float = 2.0, shift: float = 1.5) -> Target:
    r"""One double well, 1-D.

    .. math:: \rho(x) = \exp\{-((x - s)^2 - \delta)^2\}

    From the DIS family (Richter and Berner 2024). Modes at ``s +- sqrt(delta)`` of
    weight 1/2, barrier ``delta**2``. log Z by 1-D quadrature (a trapezoid sum, exact
    to rounding): 0.293002 at separation 2, -0.108211 at 4. Note that ``separation``
    is delta, the squared distance of a mode from the centre. ``scale`` is the root
    mean square about 0.

    Raises:
        ValueError: when ``separation`` is not positive.

    Example:
        >>> import diffsamp as ds
        >>> round(ds.targets.double_well().log_z, 6)
        0.293002
    """
    if not separation > 0:
        raise ValueError(f"separation must be positive, got {separation!r}")
    scale = math.sqrt(separation + shift**2)
    is_default = (separation, shift) == (2.0, 1.5)
    name = "double_well" if is_default else f"double_well_{separation:g}_{shift:g}"
    return _wells(name, 1, float(separation), float(shift), 0, scale)


def mw54() -> Target:
    r"""Five double wells of separation 4, 5-D.

    .. math:: \rho(x) = \exp\{-\textstyle\sum_{i \le 5} (x_i^2 - 4)^2\}

    log Z = -0.541056, five 1-D quadratures. From DIS (Richter and Berner 2024). There
    are 32 modes at (+-2)^5 of weight 1/32; bit i of a mode's index is the sign of
    x_i. Not tilted, unlike `manywell`. ``scale`` is the overall root mean square.

    Example:
        >>> import diffsamp as ds
        >>> round(ds.targets.mw54().log_z, 6)
        -0.541056
    """
    return _wells("mw54", 5, 4.0, 0.0, 0, 2.0)


def mw52() -> Target:
    r"""Five double wells of separation 2 beside 45 standard Gaussians, 50-D.

    .. math:: \rho(x) = \exp\{-\textstyle\sum_{i \le 5} (x_i^2 - 2)^2
                             - \tfrac12 \sum_{i > 5} x_i^2\}

    log Z = 42.817243, five 1-D quadratures and 22.5 log(2 pi). From DIS (Richter and
    Berner 2024). 32 modes of weight 1/32; bit i of a mode's index is the sign of x_i.

    Example:
        >>> import diffsamp as ds
        >>> round(ds.targets.mw52().log_z, 6)
        42.817243
    """
    return _wells("mw52", 5, 2.0, 0.0, 45, 1.0)


def _manywell_log_f(y, tilt):
    return -(y**4) + 6.0 * y**2 + tilt * y


def _manywell_energy(tilt, x):
    x = point(x, 2 * tilt.shape[0])
    (tilt,) = cast(x.dtype, tilt)
    return 0.5 * jnp.sum(x[1::2] ** 2) - jnp.sum(_manywell_log_f(x[0::2], tilt))


def _manywell_sample(tilt, log_bound, key, n):
    (tilt,) = cast(default_float(), tilt)
    key_well, key_gaussian = jax.random.split(key)
    shape = (n, tilt.shape[0])
    well = sample_pair(
        key_well,
        shape,
        lambda y: _manywell_log_f(y, tilt[None, :]),
        log_bound,
        _MANYWELL_CENTRE,
        _MANYWELL_SD,
        _MANYWELL_RIGHT,
    )
    gaussian = jax.random.normal(key_gaussian, shape, tilt.dtype)
    return jnp.stack([well, gaussian], axis=2).reshape(n, 2 * tilt.shape[0])


def _manywell_assign(tilt, x):
    return sign_pattern(tilt, point(x, 2 * tilt.shape[0])[0::2])


def manywell(dim: int = 32) -> Target:
    r"""Tilted double wells, each beside one standard Gaussian coordinate.

    .. math:: \rho(x) = \exp \textstyle\sum_k \{-u_k^4 + 6 u_k^2 + \tfrac12 u_k
              - \tfrac12 v_k^2\}, \quad x = (u_1, v_1, u_2, v_2, \ldots)

    log Z = 10.293480 per pair (1-D quadrature), 164.695675 for D = 32. From Noe et al.
    2019 and FAB (Midgley et al. 2023). 2^(D/2) modes with a pair's wells at -1.711 and
    1.753; the right one has weight 0.844307 (0.8 in some codes is a proposal weight).
    Bit k of a mode's index is the sign of u_k. ``modes`` is None beyond D = 12.

    Args:
        dim: dimension D, even.

    Raises:
        ValueError: when ``dim`` is not a positive even number.

    Example:
        >>> import diffsamp as ds
        >>> round(ds.targets.manywell().log_z, 6)
        164.695675
    """
    require_dim(dim, "a positive even number", dim >= 2 and dim % 2 == 0)
    num_pairs = dim // 2
    tilt = np.full(num_pairs, 0.5)
    log_z, right, log_bound = tabulate(
        lambda y: _manywell_log_f(y, 0.5),
        _MANYWELL_CENTRE,
        _MANYWELL_SD,
        _MANYWELL_RIGHT,
    )
    modes = None
    if 2**num_pairs <= _MAX_MODES:
        patterns = np.array(list(itertools.product([0, 1], repeat=num_pairs)))[:, ::-1]
        weights = np.prod(np.where(patterns, right, 1 - right), axis=1)
        modes = Modes(jnp.asarray(weights), Partial(_manywell_assign, tilt))
    return Target(
        energy=Partial(_manywell_energy, tilt),
        dim=dim,
        name="manywell" if dim == 32 else f"manywell_{dim}",
        log_z=num_pairs * (log_z + 0.5 * math.log(2 * math.pi)),
        sample=Partial(_manywell_sample, tilt, np.asarray(log_bound)),
        modes=modes,
        scale=1.4,
    )
