"""Time grids learned for a trained sampler and a given, small number of steps.

The K step lengths are a softmax of K numbers, and these follow the gradient of the ELBO

    E[log_weight],    paths simulated on the grid and differentiated through,

with the parameters of the sampler fixed (scores shown to its networks carry no
gradient, as in `objectives.reverse_kl`). Every grid has exact weights, so that the
ELBO's are comparable. The ELBO does not see modes that are missing; where to step is a
question of how, not of whether, a path reaches them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffsamp.energies import as_condition, as_energy, as_key
from diffsamp.sampler import Sampler, Step
from diffsamp.schedules import FixedGrid
from diffsamp.types import Array, ArrayLike, Energy, Key, Params

_NUM_JUDGED = 4_096


class TunedGrid(NamedTuple):
    """A sampler on the better of two time grids, judged on fresh paths.

    Attributes:
        sampler: the sampler on its new grid, or as it was if that is no better.
        times: times of its grid, [K+1].
        elbo_before: on the old grid.
        elbo_after: on the grid that was kept; from the same random numbers.
        standard_error: of the difference of the two.
        num_energy_evaluations: energies evaluated alone, to judge.
        num_gradient_evaluations: energies evaluated with their gradient.
        num_network_evaluations: control evaluations.
    """

    sampler: Sampler
    times: np.ndarray
    elbo_before: float
    elbo_after: float
    standard_error: float
    num_energy_evaluations: int
    num_gradient_evaluations: int
    num_network_evaluations: int


def tune_time_grid(
    key: Key,
    sampler: Sampler,
    params: Params,
    energy: Energy,
    *,
    num_updates: int = 200,
    batch_size: int = 256,
    learning_rate: float = 0.05,
    condition: ArrayLike | None = None,
) -> TunedGrid:
    """Learns the times of a sampler's steps by its ELBO.

    Args:
        key: random key; consumed.
        sampler: on the grid to start from, with the number of steps that is wanted.
        params: its parameters, which stay as they are.
        energy: maps [D] to [].
        num_updates: Adam updates of the K step lengths.
        batch_size: paths per update.
        learning_rate: of the logarithms of the step lengths.
        condition: [condition_dim], where the sampler has one.

    Raises:
        ValueError: when a number is not positive, or the sampler has a single step.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> tuned = ds.tune_time_grid(
        ...     jax.random.key(1), sampler, params, target.energy, num_updates=5
        ... )
        >>> tuned.elbo_after >= tuned.elbo_before
        True
    """
    if num_updates < 1 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            "num_updates, batch_size and learning_rate must be positive, got "
            f"{num_updates}, {batch_size} and {learning_rate}"
        )
    if sampler.num_steps < 2:
        raise ValueError("a single step goes from 0 to 1: there is no grid to tune")
    sampler.check_energy(energy, condition)
    for_training, for_judging = jax.random.split(as_key(key))
    energy = as_energy(energy)
    condition = as_condition(condition)
    old = sampler.process.coefficients(sampler.num_steps).times
    optimizer = optax.adam(learning_rate)

    def log_weights(logits, params, key, num, energy, condition):
        on_grid = _OnGrid(**_fields(sampler))
        on_grid = on_grid.with_times(_times(logits))
        keys = jax.random.split(key, num)
        run = jax.vmap(on_grid.rollout, in_axes=(None, 0, None, None))
        return run(params, keys, energy, condition)[0].log_weight

    def loss(logits, *rest):
        values = log_weights(logits, *rest)
        usable = jnp.isfinite(values)
        return -jnp.sum(jnp.where(usable, values, 0.0)) / jnp.sum(usable)

    @jax.jit
    def train(logits, params, key, energy, condition):
        def update(carry, key):
            logits, state = carry
            gradient = jax.grad(loss)(
                logits, params, key, batch_size, energy, condition
            )
            change, state = optimizer.update(jnp.nan_to_num(gradient), state)
            return (optax.apply_updates(logits, change), state), None

        carry = logits, optimizer.init(logits)
        keys = jax.random.split(key, num_updates)
        return jax.lax.scan(update, carry, keys)[0][0]

    @jax.jit
    def judge(logits, params, key, energy, condition):
        return log_weights(logits, params, key, _NUM_JUDGED, energy, condition)

    start = jnp.log(jnp.asarray(np.diff(old), jax.dtypes.canonicalize_dtype(float)))
    rest = params, for_training, energy, condition
    end = train(start, *rest)
    rest = params, for_judging, energy, condition
    before, after = (np.asarray(judge(v, *rest), np.float64) for v in (start, end))
    usable = np.isfinite(before)
    before, after = before[usable], after[usable]
    better, error = False, 0.0
    if before.size and np.all(np.isfinite(after)):
        gain = after - before
        better, error = np.mean(gain) > 0, float(np.std(gain) / np.sqrt(gain.size))
    lengths = np.exp(np.asarray(end, np.float64))
    times = np.append(0.0, np.cumsum(lengths / lengths.sum()))
    times[-1] = 1.0
    if not better:
        times, after = old, before
    else:
        process: Any = sampler.process
        process = dataclasses.replace(
            process, time_grid=FixedGrid(tuple(times.tolist()))
        )
        sampler = dataclasses.replace(sampler, process=process)
    price = sampler.evaluations_per_path
    trained, judged = num_updates * batch_size, 2 * _NUM_JUDGED
    return TunedGrid(
        sampler=sampler,
        times=times,
        elbo_before=_mean(before),
        elbo_after=_mean(after),
        standard_error=error,
        num_energy_evaluations=judged * price.energy,
        num_gradient_evaluations=(trained + judged) * price.gradient
        + trained * price.energy,  # in training every energy is differentiated
        num_network_evaluations=(trained + judged) * price.network,
    )


class _OnGrid(Sampler):
    """A sampler whose times are traced; never leaves this module."""

    _traced_times: Any = None  # of the class alone, which is no dataclass itself

    def with_times(self, times: Array) -> _OnGrid:
        object.__setattr__(self, "_traced_times", times)
        return self

    def steps(self) -> Step:
        return self._as_steps(self.process.on(self._traced_times))


def _mean(values):
    return float(np.mean(values)) if values.size else float("-inf")


def _fields(sampler):
    return {f.name: getattr(sampler, f.name) for f in dataclasses.fields(sampler)}


def _times(logits):
    lengths = jax.nn.softmax(logits)
    inner = jnp.cumsum(lengths)[:-1]
    zero, one = jnp.zeros((1,), logits.dtype), jnp.ones((1,), logits.dtype)
    return jnp.concatenate([zero, inner, one])
