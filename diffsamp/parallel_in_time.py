"""Parallel-in-time draws: Parareal, Lions et al. 2001; SRDS, Selvam et al. 2024.

A path of K steps of the probability flow is cut into B blocks of m = K / B. With F the
m fine steps of a block, G one step of the length of the block, and i the iteration,

    x_{b+1}^{i+1} = G(x_b^{i+1}) + F(x_b^i) - G(x_b^i),    x^0 by G alone.

All blocks' F are evaluated at once. After i iterations the first i blocks are those of
the sequential path, whatever G is, so that at most B iterations are needed; with a good
G, such as a step-conditioned control trained by self-consistency, a few are enough. A
machine with room for B evaluations at once waits for ``B + i (m + B)`` network calls
instead of K; the total number of calls is larger.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.deterministic import ProbabilityFlow
from diffsamp.types import Array, Energy, Params


class Parareal(NamedTuple):
    """A path of the flow, found in parallel.

    Attributes:
        x: its end, [D].
        xs: states between the blocks, [B+1, D].
        num_iterations: iterations done, [] int.
        change: largest change of a coordinate of any state in the last iteration, in
            deviations of the reference, [].
    """

    x: Array
    xs: Array
    num_iterations: Array
    change: Array


def parareal(
    flow: ProbabilityFlow,
    params: Params,
    x: Array,
    energy: Energy,
    num_blocks: int,
    *,
    tolerance: float = 1e-3,
    condition: Array | None = None,
) -> Parareal:
    """Where the flow takes a point of the reference, with its blocks in parallel.

    Under ``vmap`` iterations go on until every row has met the tolerance.

    Args:
        flow: a flow with a solver of one call per step.
        params: parameters of its sampler.
        x: start, [D].
        energy: maps [D] to [], or ([D], condition) to [].
        num_blocks: B, also the number of coarse steps.
        tolerance: change at which to stop, in deviations of the reference; at 0 all B
            iterations are done.
        condition: [condition_dim], or None.

    Raises:
        ValueError: when B does not divide the number of steps, is not below it, or the
            times of B steps are not among the flow's; when the solver needs more than
            one call per step, or the tolerance is negative.

    Example:
        >>> import jax, jax.numpy as jnp, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.scds(dim=2, num_steps=64, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> flow = ds.probability_flow(sampler)
        >>> found = ds.parareal(flow, params, jnp.ones(2), target.energy, 8)
        >>> bool(found.num_iterations <= 8)
        True
    """
    num_steps = flow.num_steps
    if num_blocks < 1 or num_steps % num_blocks or num_blocks >= num_steps:
        raise ValueError(
            "num_blocks must divide the number of steps and be below it, got "
            f"{num_blocks} for {num_steps} steps"
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    length = num_steps // num_blocks
    coarse = flow.with_num_steps(num_blocks)
    fine_times, coarse_times = (
        f.sampler.process.coefficients(f.num_steps).times for f in (flow, coarse)
    )
    if not np.allclose(fine_times[::length], coarse_times, rtol=0, atol=1e-9):
        raise ValueError(
            f"the times of {num_blocks} steps are not among those of {num_steps}; "
            "parareal needs nested grids, as ds.schedules.power_grid() makes them"
        )
    flow.check_energy(energy, condition)
    fine_step = flow.stepper(params, energy, condition)
    coarse_step = coarse.stepper(params, energy, condition)
    blocks = jnp.arange(num_blocks)

    def fine(block, y):
        return jax.lax.fori_loop(
            0, length, lambda i, y: fine_step(length * block + i, y), y
        )

    def sweep(start, jumps):
        """Coarse steps, each followed by its jump; states [B], coarse ends [B]."""

        def step(y, row):
            block, jump = row
            end = coarse_step(block, y)
            return end + jump, (end + jump, end)

        return jax.lax.scan(step, start, (blocks, jumps))[1]

    start = flow.sampler.unit(jnp.asarray(x))
    later, ends = sweep(start, jnp.zeros((num_blocks, *start.shape), start.dtype))
    infinite = jnp.full((), jnp.inf, start.dtype)

    def more(carry):
        iteration, _, _, change = carry
        return (iteration < num_blocks) & ~(change < tolerance)

    def iterate(carry):
        iteration, later, ends, _ = carry
        starts = jnp.concatenate([start[None], later[:-1]])
        jumps = jax.vmap(fine)(blocks, starts) - ends
        new, ends = sweep(start, jumps)
        return iteration + 1, new, ends, jnp.max(jnp.abs(new - later))

    iteration, later, _, change = jax.lax.while_loop(
        more, iterate, (jnp.zeros((), jnp.int32), later, ends, infinite)
    )
    xs = flow.sampler.original(jnp.concatenate([start[None], later]))
    return Parareal(xs[-1], xs, iteration, change)
