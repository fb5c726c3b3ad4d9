"""Solvers of the probability flow of a variance-preserving process.

With signal ``alpha^2 = alpha_bar(t)``, noise ``sigma^2 = 1 - alpha^2`` and the process'
own time ``d tau = d log alpha^2``, the score stands for the flow

    dy / d tau = (score + y) / 2,    or    d(y / sigma) / d(alpha / sigma) = x_hat,
    x_hat = alpha y + (sigma^2 / alpha) (score + y),

x_hat the expected end of the path. A solver takes K steps of it from the reference to
the target in unit coordinates.

A sampler learns the means of K kernels ``N(d y + 2 (1 - d) c, 1 - d^2)``, with ``d =
alpha / alpha'``. The best mean is the expected next state, and that is the mean for

    c = (1 + d) / (2 d) (score + y),
    x_hat = alpha y + 2 sigma^2 c / (alpha + alpha'):

more than the score by a share of the order of a step, and in the first step, out of
nearly nothing but noise, many times as much. Controls c are taken to be of this kind,
on the very grid on which they were trained; on another the first step is off. Only the
exact kernels of `processes.VariancePreserving` have this c: for Euler steps ``c = score
+ y`` is assumed, and `linear_end` refuses them.

`euler` and `heun` treat the first form; `exponential` (DDIM; Song et al. 2021, arXiv
2010.02502) and `dpm_solver` (DPM-Solver++(2M); Lu et al. 2022, arXiv 2211.01095) the
second, whose only approximation is that x_hat changes slowly. There noise is exactly
zero at the end and x_hat is where they arrive. `frozen` moves by ``(1 - d) c``, half of
what the control adds to the mean. `linear_end` takes two steps together and x_hat as
linear in alpha over both; with what is above this is

    y'' = y + b_0 c(y, t) + b_1 c(y', t'),    y' = y + (1 - d) c(y, t),

exact where the target is the reference, or a point, and of second order otherwise.

Orders are those on grids whose steps shrink in ``log alpha``. The first step of
`schedules.geometric` does not, for it begins where there is hardly any signal: there
`exponential` and `dpm_solver` are of first order and `linear_end` of about 1.5, and
`euler` and `heun`, which have to follow log alpha, are not to be used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.types import Array

ControlAt = Callable[[Array, Array], Array]  # (k, y [D]) -> c [D]


class FlowGrid(NamedTuple):
    """Signal and noise at the K + 1 times of a grid.

    Attributes:
        alpha: root of the signal's share of the variance, [K+1].
        sigma: root of the noise's, [K+1].
        decay: factor on y in the mean of the process' own generation kernel, [K]:
            ``alpha / alpha'`` where that is exponential, 1 minus the step of `euler`
            where it is Euler's.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    decay: np.ndarray


class Solver(Protocol):
    """Frozen and hashable.

    ``solver(control, grid, y) -> y`` takes ``len(grid.alpha) - 1`` steps from y [D];
    ``control(k, y)`` is c at the start of step k. ``num_calls(num_steps)`` counts them.
    """

    def num_calls(self, num_steps: int) -> int: ...

    def __call__(self, control: ControlAt, grid: FlowGrid, y: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class OneCallSolver:
    """``y' = a_k y + b_k c(k, y)``.

    Attributes:
        coefficients: ``grid -> (a [K], b [K])``.
    """

    coefficients: Callable[[FlowGrid], tuple[np.ndarray, np.ndarray]]

    def num_calls(self, num_steps: int) -> int:
        return num_steps

    def __call__(self, control: ControlAt, grid: FlowGrid, y: Array) -> Array:
        a, b = (jnp.asarray(v, y.dtype) for v in self.coefficients(grid))

        def step(y, row):
            k, a, b = row
            return a * y + b * control(k, y), None

        return jax.lax.scan(step, y, (jnp.arange(len(a)), a, b))[0]


@dataclasses.dataclass(frozen=True)
class LinearEnd:
    """See `linear_end`."""

    def num_calls(self, num_steps: int) -> int:
        return num_steps

    def __call__(self, control: ControlAt, grid: FlowGrid, y: Array) -> Array:
        share = jnp.asarray(1 - grid.decay, y.dtype)
        weights = (jnp.asarray(w, y.dtype) for w in pair_weights(grid))
        num_pairs, rest = divmod(len(grid.decay), 2)

        def pair(y, row):
            k, first, second = row
            now = control(k, y)
            later = control(k + 1, y + share[k] * now)
            return y + first * now + second * later, None

        y, _ = jax.lax.scan(pair, y, (2 * jnp.arange(num_pairs), *weights))
        if rest:
            last = jnp.asarray(2 * num_pairs)
            y = y + share[last] * control(last, y)
        return y


def pair_weights(grid: FlowGrid) -> tuple[np.ndarray, np.ndarray]:
    """``b_0`` and ``b_1`` of two steps together, [K // 2] each; see the module.

    With ``y'' = keep y + A G + B (1 - keep)`` for ``x_hat = A + B alpha``, where
    ``keep = sigma'' / sigma`` and ``G = alpha'' - alpha keep``. The factors on y add up
    to 1.

    Raises:
        ValueError: where steps are Euler's.
    """
    if not is_exact(grid):
        raise ValueError(
            "two steps together, by ds.solvers.linear_end() or second_order=True, take "
            "the exact kernels of a variance-preserving process, got Euler steps; "
            "leave out process=, or take ds.solvers.frozen() and second_order=False"
        )
    ends = 2 * (len(grid.decay) // 2) + 1
    now, then, end = (grid.alpha[i:ends:2][: ends // 2] for i in range(3))
    keep = grid.sigma[2:ends:2] / grid.sigma[: ends - 1 : 2]
    whole = end - now * keep
    later = (1 - keep - now * whole) / (then - now)  # of x_hat at the second step
    gain, share = _end_gain(grid)[: ends - 1], 1 - grid.decay[: ends - 1 : 2]
    first = (whole - later) * gain[::2] + later * then * share
    return first, later * gain[1::2]


@dataclasses.dataclass(frozen=True)
class Heun:
    """See `heun`."""

    def num_calls(self, num_steps: int) -> int:
        return 2 * num_steps - 1

    def __call__(self, control: ControlAt, grid: FlowGrid, y: Array) -> Array:
        half = jnp.asarray(np.diff(np.log(grid.alpha)), y.dtype)  # of the step in tau
        share = jnp.asarray(_score_share(grid), y.dtype)

        def step(y, row):
            k, half = row
            first = share[k] * control(k, y)
            second = share[k + 1] * control(k + 1, y + half * first)
            return y + half * 0.5 * (first + second), None

        last = len(half) - 1
        y, _ = jax.lax.scan(step, y, (jnp.arange(last), half[:-1]))
        return y + half[-1] * share[-1] * control(jnp.asarray(last), y)


@dataclasses.dataclass(frozen=True)
class DPMSolver:
    """See `dpm_solver`."""

    def num_calls(self, num_steps: int) -> int:
        return num_steps

    def __call__(self, control: ControlAt, grid: FlowGrid, y: Array) -> Array:
        keep, gain = _of_end(grid)
        noise = grid.sigma / grid.alpha
        width = np.diff(-np.log(noise[:-1]))
        ratio = np.zeros(len(keep))  # how far to extrapolate x_hat
        ratio[1:-1] = width[1:] / width[:-1] / 2  # to the middle of the step
        if len(keep) > 1:  # to its end, where there is no noise and the log is infinite
            ratio[-1] = noise[-2] ** 2 / (noise[-3] ** 2 - noise[-2] ** 2)
        rows = (grid.alpha[:-1], _end_gain(grid), keep, gain, ratio)
        rows = (jnp.arange(len(keep)), *(jnp.asarray(r, y.dtype) for r in rows))

        def step(carry, row):
            y, before = carry
            k, alpha, end_gain, keep, gain, ratio = row
            end = alpha * y + end_gain * control(k, y)
            y = keep * y + gain * (end + ratio * (end - before))
            return (y, end), None

        return jax.lax.scan(step, (y, jnp.zeros_like(y)), rows)[0][0]


def _of_end(grid):
    """``y' = keep y + gain x_hat``."""
    keep = grid.sigma[1:] / grid.sigma[:-1]
    return keep, grid.alpha[1:] - grid.alpha[:-1] * keep


def is_exact(grid: FlowGrid) -> bool:
    """Whether kernels are those of the process itself, and not Euler's."""
    return np.allclose(grid.decay, grid.alpha[:-1] / grid.alpha[1:], rtol=1e-6, atol=0)


def _score_share(grid: FlowGrid) -> np.ndarray:
    """``(score + y) / c`` of the kernels' controls, [K]; see the module."""
    if not is_exact(grid):
        return np.ones(len(grid.decay))
    return 2 * grid.alpha[:-1] / (grid.alpha[:-1] + grid.alpha[1:])


def _end_gain(grid):
    """Factor on c in x_hat, [K]."""
    return grid.sigma[:-1] ** 2 / grid.alpha[:-1] * _score_share(grid)


def _euler(grid):
    ones = np.ones(len(grid.alpha) - 1)
    return ones, np.diff(np.log(grid.alpha)) * _score_share(grid)


def _frozen(grid):
    return np.ones(len(grid.alpha) - 1), 1 - grid.decay


def _exponential(grid):
    keep, gain = _of_end(grid)
    return keep + gain * grid.alpha[:-1], gain * _end_gain(grid)


def euler() -> OneCallSolver:
    """Euler steps in the process' own time; first order, one call a step."""
    return OneCallSolver(_euler)


def frozen() -> OneCallSolver:
    """Half of the control's share of the generation kernel's mean; one call a step.

    The step that `objectives.self_consistency` trains (`Sampler.flow_step`), of any
    process: the one to take with a step-conditioned control. First order.
    """
    return OneCallSolver(_frozen)


def linear_end() -> LinearEnd:
    """Two steps together, x_hat linear in alpha; second order, one call a step.

    The one to take with a control that was trained at the same step count (also of a
    step-conditioned sampler, at the number of steps of its training grid), or to teach
    others (``second_order=True`` of the objectives that do). The last of an odd number
    of steps is one of `frozen`. Extrapolating to where there is no noise it counts
    errors of the network in the last two steps about three times.

    Raises:
        ValueError: when it is used, where steps are Euler's.
    """
    return LinearEnd()


def heun() -> Heun:
    """Heun's method; second order, two calls a step but one in the last."""
    return Heun()


def exponential() -> OneCallSolver:
    """DDIM: exact where x_hat stays the same along the path; first order otherwise."""
    return OneCallSolver(_exponential)


def dpm_solver() -> DPMSolver:
    """DPM-Solver++(2M): x_hat extrapolated from the step before, one call a step.

    Second order in the logarithm of signal over noise. In the last step, down to no
    noise at all, that is infinite, and x_hat is extrapolated in the square of noise
    over signal instead; the last few steps leave an order of about 1.4 altogether, and
    the first of `schedules.geometric` one of 1.
    """
    return DPMSolver()
