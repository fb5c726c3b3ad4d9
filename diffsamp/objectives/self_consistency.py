"""Self-consistency of the probability flow. Jutras-Dubé et al., arXiv 2502.07579.

With F the flow step of the control u(x, t, d) (`Sampler.flow_step`), a state x_t of a
path and a step of length 2 d from t to t',

    loss = mean |F(x_t; t, 2 d) - sg F(F(x_t; t, d); t + d, d)|^2 / (D s^2)

in squared deviations s of the reference per coordinate: one long step is to arrive
where two short ones do, both taken with the current parameters or their exponential
moving average. Lengths are 2^k / K as far as 2^k divides K, up to a single step where K
is a power of two; the paper draws k uniformly and then t uniformly from the multiples
of 2 d. The loss says nothing about the shortest
step: that one has to be trained by another objective in a `weighted_sum`, or everything
is consistent with an arbitrary flow.

Two of the shortest steps are of first order, and what they get wrong all longer ones
inherit: with 128 steps down to a tenth of the reference's standard deviation draws are
too wide by 7 %. With ``second_order`` the target of the shortest pair is that of
`solvers.linear_end`, which at no further cost is right within 0.1 % there. Longer
steps are compared as before.

Errors of the halves are those of the whole, doubling by doubling. With ``whole_paths``
a long step of 2^k of the shortest ones is compared with where these lead themselves,

    loss = mean |F(x_t; t, d) - sg x_{t + d}|^2 / (D s^2),

x the flow from a draw of the reference, solved on the finest grid once for each path of
the batch. The minimum is the same; nothing but the
finest flow is handed on.

Otherwise states come from whatever behaviour there is, and the second short step of a
control that is shown the score costs one energy gradient per pair. States carry no
gradient. The paper divides by D once more and takes an optimiser step of its own for
this loss.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import meshes
from diffsamp._distributions import standard_normal
from diffsamp.objectives.common import row_mean
from diffsamp.objectives.teachers import check_second_order, follow, weights_of_pairs
from diffsamp.sampler import Sampler
from diffsamp.types import Array, Cost, Objective, Requirements, as_count


class Pairs(Protocol):
    """The law of the length of the long step, as a hashable function.

    ``pairs(num_levels, count)`` returns unnormalised log-probabilities [num_levels] of
    long steps of 2, 4, ..., 2^num_levels steps of the grid, at update ``count``.
    """

    def __call__(self, num_levels: int, count: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every length of the long step as often as any other."""

    def __call__(self, num_levels: int, count: Array) -> Array:
        del count
        return jnp.zeros(num_levels)


@dataclasses.dataclass(frozen=True)
class Biased:
    """Probability proportional to ``exp(-rate k)`` for a long step of 2^k steps.

    Attributes:
        rate: 1.5 is the paper's, which favours short steps; 0 the uniform law.
    """

    rate: float = 1.5

    def __call__(self, num_levels: int, count: Array) -> Array:
        del count
        return -self.rate * jnp.arange(1.0, num_levels + 1.0)


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Uniform over the lengths up to a longest one, which doubles as training goes on.

    Attributes:
        num_updates: updates until all lengths are in use.
    """

    num_updates: int

    def __post_init__(self):
        if self.num_updates < 1:
            raise ValueError(f"num_updates must be at least 1, got {self.num_updates}")

    def __call__(self, num_levels: int, count: Array) -> Array:
        longest = 1 + num_levels * count // self.num_updates
        return jnp.where(jnp.arange(1, num_levels + 1) <= longest, 0.0, -jnp.inf)


_UNIFORM = Uniform()


@functools.cache
def self_consistency(
    *,
    pairs: Pairs = _UNIFORM,
    ema_decay: float | None = None,
    second_order: bool = False,
    whole_paths: bool = False,
    pairs_per_path: int = 1,
) -> Objective:
    """Squared distance between one long step of the flow and shorter ones.

    Args:
        pairs: law of the length of the long step: `Uniform`, `Biased`, `Curriculum` or
            any hashable function like them.
        ema_decay: decay of an exponential moving average of the parameters that takes
            all steps but the long one; None for the current ones.
        second_order: whether the two shortest steps are taken together, see above; the
            paper's loss is without.
        whole_paths: whether long steps are compared with where the shortest ones lead,
            along flows from draws of the reference, instead of two of half the length;
            it takes as many calls as simulating the batch. The paper's loss is without.
        pairs_per_path: pairs of every path of the batch. A pair costs three calls of
            the network (of whole paths one), a path as many as it has steps: with 128
            of them a gradient of less noise is nearly free.

    Raises:
        ValueError: when ema_decay is not in (0, 1) or pairs_per_path less than 1; at
            the start of training when the sampler has no probability flow, it is to
            share parameters between step counts (`samplers.scds`) with a network known
            not to see the length of the step, its number of steps is odd, its time grid
            of half the steps is not every other time, or its steps cannot be taken
            together where they are to be.

    Example:
        >>> import diffsamp as ds
        >>> objective = ds.objectives.weighted_sum(
        ...     (ds.objectives.log_variance(), 1.0),
        ...     (ds.objectives.self_consistency(), 0.5),
        ... )
    """
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay must be in (0, 1) or None, got {ema_decay}")
    pairs_per_path = as_count("pairs_per_path", pairs_per_path)

    def init(key, sampler, params, energy, pilot):
        del key, energy, pilot
        _check_control(sampler)
        _check_grid(sampler)
        if second_order:
            check_second_order(sampler, 2)
        if ema_decay is None:
            return {}, ()
        return {}, jax.tree.map(jnp.asarray, params)

    def loss(params, average, batch):
        sampler: Sampler = batch.sampler
        num_levels = _num_halvings(sampler.num_steps)
        short = params["sampler"] if ema_decay is None else average
        short = jax.lax.stop_gradient(short)
        for_level, for_place, for_start = jax.random.split(batch.key, 3)
        shape, dtype = (batch.on_policy.shape[0], pairs_per_path), batch.paths.xs.dtype
        log_probs = pairs(num_levels, batch.count)
        level = 1 + jax.random.categorical(for_level, log_probs, shape=shape)
        num_long = jnp.asarray(sampler.num_steps) >> level
        place = jax.random.randint(for_place, shape, 0, num_long)
        condition = batch.condition if batch.condition.shape[-1] else None
        step_of = _steps_of_all_grids(sampler)

        def miss(num_long, place, x, score, end, condition):
            own, long = params["sampler"], step_of(num_long, place)
            reached = sampler.flow_step(own, long, x, score, condition)
            return jnp.mean((sampler.unit(reached) - end) ** 2)

        def of_flow(num_long, place, key, condition):
            stride = 2 if second_order else 1
            advance = follow(sampler, short, batch.energy, condition, second_order)
            start = sampler.original(standard_normal(key, (sampler.dim,), dtype))
            moves = jnp.arange(sampler.num_steps // stride)
            end, xs = jax.lax.scan(lambda x, k: (advance(k, x), x), start, moves)
            xs = jax.lax.stop_gradient(jnp.concatenate([xs, end[None]]))

            def of_step(num_long, place):
                length = sampler.num_steps // num_long // stride
                x, end = xs[place * length], xs[(place + 1) * length]
                score = sampler.score_at(batch.energy, x, condition)
                return miss(num_long, place, x, score, sampler.unit(end), condition)

            return jax.vmap(of_step)(num_long, place)

        weights_of_all = weights_of_pairs(sampler) if second_order else ()

        def of_pair(num_long, place, path, condition):
            first, second = (step_of(2 * num_long, 2 * place + i) for i in range(2))
            start = place * (sampler.num_steps // num_long)
            x, score = path.xs[start], path.scores[start]
            y = sampler.unit(x)
            now = sampler.flow_control(short, first, x, score, condition)
            share, later_share = (1 - s.generation_decay for s in (first, second))
            middle = sampler.original(y + share * now)
            score_there = sampler.score_at(batch.energy, middle, condition)
            later = sampler.flow_control(short, second, middle, score_there, condition)
            if second_order:
                shortest = 2 * num_long == sampler.num_steps
                pair = (weights[place] for weights in weights_of_all)
                share, later_share = (
                    jnp.where(shortest, weight, usual)
                    for weight, usual in zip(pair, (share, later_share), strict=True)
                )
            end = jax.lax.stop_gradient(y + share * now + later_share * later)
            return miss(num_long, place, x, score, end, condition)

        if whole_paths:
            keys = meshes.spread(batch.mesh, jax.random.split(for_start, shape[0]))
            values = jax.vmap(of_flow)(num_long, place, keys, condition)
            calls = shape[0] * sampler.num_steps + values.size
            gradients = calls
        else:
            paths = jax.lax.stop_gradient(batch.paths)
            of_path = jax.vmap(of_pair, in_axes=(0, 0, None, None))
            values = jax.vmap(of_path)(num_long, place, paths, condition)
            calls, gradients = 3 * values.size, values.size
        value = row_mean(values, jnp.isfinite(values))
        cost = Cost(0, gradients if sampler.needs_score else 0, calls)
        return value, {"cost": cost, "self_consistency": value}

    def update(params, average, batch):
        del batch
        if ema_decay is None:
            return average
        rate = 1 - ema_decay
        return jax.tree.map(
            lambda old, new: old + rate * (new - old),
            average,
            params["sampler"],
        )

    return Objective(Requirements(), init, loss, update)


def _num_halvings(num_steps: int) -> int:
    """How often it can be divided by two."""
    return (num_steps & -num_steps).bit_length() - 1


def _check_control(sampler: Any) -> None:
    """Of a network of another make nobody knows what it sees.

    For a sampler of a single step count the loss is a penalty on curved paths.
    """
    sampler.check_flow()
    control = sampler.flow_network
    control = getattr(control, "network", control)
    module = getattr(control, "module", None)
    if sampler.finest is None or getattr(module, "step_conditioned", True):
        return
    raise ValueError(
        "self_consistency of a sampler for many step counts needs a network that sees "
        f"the length of the step, got {type(module).__name__} with "
        "step_conditioned=False, which cannot take long steps and short ones; build "
        "it with step_conditioned=True"
    )


def _check_grid(sampler: Any) -> None:
    num = sampler.num_steps
    if num % 2:
        raise ValueError(
            "self_consistency takes steps in pairs: num_steps must be even, and a "
            f"power of two if a single step is to be trained; got {num}"
        )
    for _ in range(_num_halvings(num)):
        fine, coarse = (sampler.process.coefficients(k).times for k in (num, num // 2))
        if not np.allclose(fine[::2], coarse, rtol=0, atol=1e-9):
            raise ValueError(
                f"the time grid of {num // 2} steps is not every other time of that of "
                f"{num}; self_consistency needs nested grids, as "
                "ds.schedules.power_grid makes them"
            )
        num //= 2


def _steps_of_all_grids(sampler: Any):
    """``(num_steps, index) -> Step`` for grids of K, K / 2, K / 4, ... steps."""
    num_levels = _num_halvings(sampler.num_steps)
    coarsest = sampler.num_steps >> num_levels
    sizes = [coarsest << k for k in range(num_levels + 1)]
    grids = [sampler.with_num_steps(k).steps() for k in sizes]
    rows = jax.tree.map(lambda *columns: jnp.concatenate(columns), *grids)

    def step_of(num_steps, index):
        row = num_steps - coarsest + index  # all coarser grids come before
        return jax.tree.map(lambda column: column[row], rows)

    return step_of
