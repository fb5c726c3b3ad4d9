"""Reference processes: the pair of Gaussian kernels that a network then corrects.

A process lives in *unit coordinates* y = (x - loc) / scale and is a table of constants,
one row per step. With h = 1/K, control u of the generation network and v of the
destruction network (absent: v = 0),

    p(y' | y) = N(y'; generation_decay y + generation_std sqrt(h) u(y, t),
                  generation_std^2 I)
    q(y | y') = N(y; destruction_decay y' + destruction_std sqrt(h) v(y', t'),
                  destruction_std^2 I)

so u and v are controls in the sense of Girsanov: ``0.5 sum |u|^2 h`` is the price of a
path in nats. ``score_gain`` converts a score into a control: a score s enters the mean
as ``generation_std sqrt(h) score_gain s``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.schedules import NoiseSchedule, PowerGrid, TimeGrid

Times = np.ndarray | jax.Array


class Coefficients(NamedTuple):
    """Constants of a process on a grid of K steps: NumPy float64, or JAX.

    Attributes:
        times: [K+1], from 0 at the reference to 1 at the target.
        generation_decay: [K].
        generation_std: [K].
        destruction_decay: [K].
        destruction_std: [K]; 0 marks the transition into a point mass.
        score_gain: [K].
    """

    times: Any
    generation_decay: Any
    generation_std: Any
    destruction_decay: Any
    destruction_std: Any
    score_gain: Any


class Process(Protocol):
    """A frozen, hashable description that yields `Coefficients` for any step count.

    ``on(times)`` yields them for given times, NumPy or JAX, without a check.
    ``has_flow`` says whether half of the generation control is a probability flow, as
    it is where generation without a control reverses destruction.
    """

    @property
    def point_mass(self) -> bool: ...

    @property
    def has_flow(self) -> bool: ...

    def coefficients(self, num_steps: int) -> Coefficients: ...

    def on(self, times: Times) -> Coefficients: ...


@dataclasses.dataclass(frozen=True)
class PinnedBrownian:
    """Brownian motion from a point mass, destroyed by the Brownian bridge to it.

    With times t_k and the whole path of unit variance, ``p = N(y + (dt) u, dt)`` and
    ``q = N((t_k / t_{k+1}) y', dt t_k / t_{k+1})``; the first bridge step is the point
    mass itself. Zhang and Chen 2022 (PIS); Sendera et al. 2024.
    """

    time_grid: TimeGrid = PowerGrid(1.0)

    @property
    def point_mass(self) -> bool:
        return True

    @property
    def has_flow(self) -> bool:
        return False

    @functools.lru_cache(maxsize=64)  # noqa: B019 - frozen and small
    def coefficients(self, num_steps: int) -> Coefficients:
        return self.on(self.time_grid(num_steps))

    def on(self, times: Times) -> Coefficients:
        xp, num_steps = _module_of(times), times.shape[0] - 1
        dt = xp.diff(times)
        ratio = times[:-1] / times[1:]
        bridge = xp.sqrt(dt[1:] * ratio[1:])
        return Coefficients(
            times=times,
            generation_decay=xp.ones(num_steps),
            generation_std=xp.sqrt(dt),
            destruction_decay=ratio,
            destruction_std=xp.concatenate([xp.zeros(1), bridge]),
            score_gain=xp.sqrt(dt * num_steps),
        )


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """Ornstein-Uhlenbeck noise with exact transitions, stationary at N(0, I).

    With alpha_bar from the schedule and ``1 - a = alpha_bar_k / alpha_bar_{k+1}``,
    destruction is exactly ``q(y | y') = N(sqrt(1 - a) y', a)``. Generation integrates
    ``dY = (-Y / 2 + c) d tau + dW`` with the control c, score + y for short steps (see
    `solvers`), frozen over the step (exponential integrator): the mean is ``sqrt(1 - a)
    y + 2 (1 - sqrt(1 - a)) c``, the variance a. Both stay finite and well conditioned
    at K = 1, unlike the Euler step.
    """

    schedule: NoiseSchedule
    time_grid: TimeGrid = PowerGrid(1.0)

    @property
    def point_mass(self) -> bool:
        return False

    @property
    def has_flow(self) -> bool:
        return True

    @functools.lru_cache(maxsize=64)  # noqa: B019 - frozen and small
    def coefficients(self, num_steps: int) -> Coefficients:
        return self.on(_increasing(self.schedule, self.time_grid, num_steps))

    def on(self, times: Times) -> Coefficients:
        xp, num_steps = _module_of(times), times.shape[0] - 1
        signal = self.schedule.signal(times)
        keep = signal[:-1] / signal[1:]
        decay, std = xp.sqrt(keep), xp.sqrt(1 - keep)
        return Coefficients(
            times=times,
            generation_decay=decay,
            generation_std=std,
            destruction_decay=decay,
            destruction_std=std,
            score_gain=2 * (1 - decay) * np.sqrt(num_steps) / std,
        )


@dataclasses.dataclass(frozen=True)
class EulerVariancePreserving:
    """The same in Euler steps, as the papers take them: for comparison.

    With ``b = log(alpha_bar_{k+1} / alpha_bar_k)``, the integral of beta over the step,
    generation is ``N((1 - b/2) y + b c, b)`` and destruction ``N((1 - b/2) y', b)``.
    Weights are as valid as any, but a step must not be long: in a single one b is about
    10, the mean ``-4 y + 10 c``, and the weights' variance infinite.
    """

    schedule: NoiseSchedule
    time_grid: TimeGrid = PowerGrid(1.0)

    @property
    def point_mass(self) -> bool:
        return False

    @property
    def has_flow(self) -> bool:
        return True

    @functools.lru_cache(maxsize=64)  # noqa: B019 - frozen and small
    def coefficients(self, num_steps: int) -> Coefficients:
        return self.on(_increasing(self.schedule, self.time_grid, num_steps))

    def on(self, times: Times) -> Coefficients:
        xp, num_steps = _module_of(times), times.shape[0] - 1
        rate = xp.diff(xp.log(self.schedule.signal(times)))
        decay, std = 1 - 0.5 * rate, xp.sqrt(rate)
        return Coefficients(
            times=times,
            generation_decay=decay,
            generation_std=std,
            destruction_decay=decay,
            destruction_std=std,
            score_gain=xp.sqrt(rate * num_steps),
        )


@dataclasses.dataclass(frozen=True)
class Brownian:
    """Brownian motion both ways from N(0, I): the reference of the general bridge.

    ``p = N(y + dt^(1/2) diffusion u .., diffusion^2 dt)`` and the same backwards, so
    all drift comes from the two networks. Richter and Berner 2024 (GBS).
    """

    diffusion: float = 1.0
    time_grid: TimeGrid = PowerGrid(1.0)

    @property
    def point_mass(self) -> bool:
        return False

    @property
    def has_flow(self) -> bool:
        return False

    @functools.lru_cache(maxsize=64)  # noqa: B019 - frozen and small
    def coefficients(self, num_steps: int) -> Coefficients:
        return self.on(self.time_grid(num_steps))

    def on(self, times: Times) -> Coefficients:
        xp, num_steps = _module_of(times), times.shape[0] - 1
        std = self.diffusion * xp.sqrt(xp.diff(times))
        one = xp.ones(num_steps)
        return Coefficients(
            times=times,
            generation_decay=one,
            generation_std=std,
            destruction_decay=one,
            destruction_std=std,
            score_gain=0.5 * std * np.sqrt(num_steps),
        )


@dataclasses.dataclass(frozen=True)
class Renoising:
    """Jump to the end of the path and noise it anew: multistep consistency sampling.

    With alpha^2 = alpha_bar from the schedule and sigma^2 = 1 - alpha^2 at the end of a
    step, generation is ``p(y' | y) = N(alpha' f, sigma'^2 + smallest_std^2)``, where f
    is the whole of the control's part, ``std sqrt(h) u = alpha' f``: a control returns
    ``gain f``. Destruction is that of `VariancePreserving`. The last step would have no
    noise at all, and no density, without ``smallest_std``. Song et al. 2023.
    """

    schedule: NoiseSchedule
    time_grid: TimeGrid = PowerGrid(1.0)
    smallest_std: float = 0.01

    def __post_init__(self):
        if not 0 < self.smallest_std < 1:
            raise ValueError(
                "smallest_std must lie strictly between 0 and 1: without noise in the "
                f"last step there is no density, got {self.smallest_std}"
            )

    @property
    def point_mass(self) -> bool:
        return False

    @property
    def has_flow(self) -> bool:
        return False

    @functools.lru_cache(maxsize=64)  # noqa: B019 - frozen and small
    def coefficients(self, num_steps: int) -> Coefficients:
        return self.on(_increasing(self.schedule, self.time_grid, num_steps))

    def on(self, times: Times) -> Coefficients:
        table = VariancePreserving(self.schedule).on(times)
        xp, num_steps = _module_of(table.times), table.times.shape[0] - 1
        signal = self.schedule.signal(table.times[1:])
        std = xp.sqrt(1 - signal + self.smallest_std**2)
        return table._replace(
            generation_decay=xp.zeros(num_steps),
            generation_std=std,
            score_gain=xp.sqrt(signal * num_steps) / std,
        )


def _module_of(times: Times) -> Any:
    return jnp if isinstance(times, jax.Array) else np


def _increasing(schedule: NoiseSchedule, time_grid: TimeGrid, num_steps: int):
    """The times of a grid, at each of which there is more signal than before."""
    times = time_grid(num_steps)
    if not np.all(np.diff(schedule.signal(times)) > 0):
        raise ValueError(
            "the noise schedule must increase strictly on the time grid; with "
            f"{num_steps} steps it stands still. Use fewer steps or another schedule"
        )
    return times
