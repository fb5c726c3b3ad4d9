"""Noise schedules and time grids.

A *noise schedule* of the variance-preserving family gives the share of the target's
variance that is still signal at time t: ``signal(t) = alpha_bar(t)``, with value 1 at
t = 1 (target) and nearly 0 at t = 0 (reference). A *time grid* turns a number of steps
into times. Both work on NumPy float64 on the host, where samplers turn them into
constants; noise schedules also take JAX arrays, for times that are learned.

Schedules over training updates (exploration noise, weights of objectives) are Optax
schedules: any ``count -> value``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

FORGETTING = 1e-4


class NoiseSchedule(Protocol):
    """``signal(t) -> alpha_bar``: increasing in t, 1 at the target.

    NumPy for NumPy times; JAX for JAX times, where these are to be learned.
    """

    def signal(self, t: Any) -> Any: ...


class TimeGrid(Protocol):
    """``num_steps -> times`` of shape [num_steps + 1], from 0 to 1."""

    def __call__(self, num_steps: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class GeometricNoise:
    """See `geometric`."""

    smallest_scale: float
    floor: float
    largest_scale: float = 1.0

    def signal(self, t: Any) -> Any:
        xp, t = _numbers(t)
        r2 = (self.smallest_scale / self.largest_scale) ** 2
        noise = self.largest_scale**2 * (r2**t - r2) / (1 - r2)
        return xp.maximum(1 - noise, self.floor)


@dataclasses.dataclass(frozen=True)
class CosineNoise:
    """See `cosine`."""

    floor: float

    def signal(self, t: Any) -> Any:
        xp, t = _numbers(t)
        share = xp.sin(0.5 * np.pi * t) ** 2
        return self.floor + (1 - self.floor) * share  # strictly increasing


@dataclasses.dataclass(frozen=True)
class LinearNoise:
    """See `linear`."""

    beta_reference: float
    beta_target: float

    def signal(self, t: Any) -> Any:
        xp, t = _numbers(t)
        slope = self.beta_target - self.beta_reference
        return xp.exp(-(self.beta_reference * (1 - t) + 0.5 * slope * (1 - t**2)))


@dataclasses.dataclass(frozen=True)
class CosinePowerNoise:
    """See `cosine_power`."""

    total: float

    def signal(self, t: Any) -> Any:
        # int cos^4(pi u / 2) du = 3 u / 8 + sin(pi u) / (2 pi) + sin(2 pi u) / (16 pi)
        xp, u = _numbers(t)
        mass = 3 * u / 8 + xp.sin(np.pi * u) / (2 * np.pi)
        mass = (mass + xp.sin(2 * np.pi * u) / (16 * np.pi)) / (3 / 8)
        return xp.exp(-self.total * (1 - mass))


@dataclasses.dataclass(frozen=True)
class PowerGrid:
    """See `power_grid`."""

    power: float

    def __call__(self, num_steps: int) -> np.ndarray:
        return 1 - (1 - np.linspace(0.0, 1.0, num_steps + 1)) ** self.power


@dataclasses.dataclass(frozen=True)
class FixedGrid:
    """Given times, for their own number of steps only.

    Attributes:
        times: from 0 to 1, increasing.

    Raises:
        ValueError: when they are not; when called for another number of steps.
    """

    times: tuple[float, ...]

    def __post_init__(self):
        times = np.asarray(self.times, np.float64)
        ends = times.ndim == 1 and times.size > 1 and times[0] == 0 and times[-1] == 1
        if not (ends and np.all(np.diff(times) > 0)):
            raise ValueError(f"times must increase from 0 to 1, got {self.times}")

    def __call__(self, num_steps: int) -> np.ndarray:
        if num_steps != len(self.times) - 1:
            raise ValueError(
                f"this time grid has {len(self.times) - 1} steps, got {num_steps}; "
                "take with_num_steps of the sampler it was made from, and tune again"
            )
        return np.asarray(self.times, np.float64)


def geometric(
    smallest_scale: float = 0.1, floor: float = 1e-6, *, largest_scale: float = 1.0
) -> GeometricNoise:
    """Noise whose total variance shrinks geometrically to ``smallest_scale**2``.

    For a Gaussian of standard deviation r (in units of the reference) under the
    variance-preserving process with generation variance equal to the destruction
    variance, step k costs a path divergence of about ``((1 - v) a / (2 v))**2`` with v
    the total variance; the sum over K steps is smallest when log v falls linearly, and
    is then ``(log r**2)**2 / (4 K)`` per coordinate. This schedule is that optimum.

    Args:
        smallest_scale: r, the finest standard deviation to resolve in units of the
            reference scale, in (0, 1).
        floor: smallest signal share, at the reference.
        largest_scale: standard deviation of the noise where paths begin; 1, which
            leaves nothing of the target, unless the sampler has a prior about like it
            (`samplers.gmp`).

    Raises:
        ValueError: when smallest_scale or floor is outside (0, 1), or largest_scale
            outside (smallest_scale, 1].

    Example:
        >>> import diffsamp as ds
        >>> float(ds.schedules.geometric(0.1).signal(1.0))
        1.0
    """
    _check_open_unit("smallest_scale", smallest_scale)
    _check_open_unit("floor", floor)
    if not smallest_scale < largest_scale <= 1:
        raise ValueError(
            f"largest_scale must be above smallest_scale={smallest_scale} and at most "
            f"1, got {largest_scale}"
        )
    return GeometricNoise(float(smallest_scale), float(floor), float(largest_scale))


def cosine(floor: float = 1e-6) -> CosineNoise:
    """``alpha_bar = sin^2(pi t / 2)``: the cosine schedule of Nichol and Dhariwal 2021.

    Args:
        floor: smallest signal share, at the reference, in (0, 1).

    Raises:
        ValueError: when floor is outside (0, 1).
    """
    _check_open_unit("floor", floor)
    return CosineNoise(float(floor))


def linear(beta_reference: float = 20.0, beta_target: float = 0.1) -> LinearNoise:
    """``beta(t)`` linear from the reference end to the target end, as in VP-SDE papers.

    The DIS paper's 10 to 0.1 leaves ``alpha_bar(0) = 0.006``, so that a mode several
    reference scales away is not forgotten; the default here is 20 to 0.1 (4e-5).

    Args:
        beta_reference: rate at t = 0.
        beta_target: rate at t = 1.

    Raises:
        ValueError: when a rate is not positive.
    """
    if not (beta_reference > 0 and beta_target > 0):
        raise ValueError(
            "beta_reference and beta_target must be positive, got "
            f"{beta_reference} and {beta_target}"
        )
    return LinearNoise(float(beta_reference), float(beta_target))


def cosine_power(total: float = 12.0) -> CosinePowerNoise:
    """``beta(t)`` proportional to cos^4, small near the target: the DDS schedule.

    Vargas et al. 2023; see `methods`. ``total`` is the integral of beta, so the process
    forgets down to ``alpha_bar(0) = exp(-total)``.

    Args:
        total: integral of beta over [0, 1].

    Raises:
        ValueError: when ``exp(-total) > 1e-4``: the process would not forget its start.
    """
    if not np.exp(-total) <= FORGETTING:
        raise ValueError(
            f"total must be at least {-np.log(FORGETTING):.2f}, so that the process "
            f"forgets its start, got {total}"
        )
    return CosinePowerNoise(float(total))


def power_grid(power: float = 1.0) -> PowerGrid:
    """Times ``1 - (1 - k/K)**power``: uniform at 1, finer near the target above 1.

    Args:
        power: positive exponent.

    Raises:
        ValueError: when power is not positive.

    Example:
        >>> import diffsamp as ds
        >>> ds.schedules.power_grid(1.0)(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}")
    return PowerGrid(float(power))


def cosine_anneal(progress: jax.Array) -> jax.Array:
    """Factor on updates: 1 at the start of the budget, half a cosine down to 0.

    Args:
        progress: share of the budget spent, in [0, 1].

    Example:
        >>> import diffsamp as ds
        >>> round(float(ds.schedules.cosine_anneal(0.5)), 6)
        0.5
    """
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.asarray(progress)))


def _numbers(t):
    """The module that computes on t, and t: float64 on the host."""
    if isinstance(t, jax.Array):
        return jnp, t
    return np, np.asarray(t, np.float64)


def _check_open_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")
