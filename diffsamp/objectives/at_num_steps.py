"""Any objective at other step counts than the sampler's own.

The kernels of a step-conditioned sampler have exact weights at every step count, and
every objective on paths can be asked of them at each:

    loss = objective on paths of K' steps, K' in turn from a given list.

With `trajectory_balance`, `log_variance` or Jeffreys' divergence this is any-step
training: few-step kernels are fitted for what they are, with their own weights, while
`self_consistency` hands them the displacement of the flow. Z, and so a learned log Z,
is the same at every step count.

On-policy rows of the batch are drawn anew with K' steps; all others keep their last
state, which is traced back with K' steps. Both are done for every row, at the price of
two more paths of K' steps, which are counted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffsamp.scoring import score_paths
from diffsamp.types import Batch, Cost, Objective, counted, total_cost


@functools.cache
def at_num_steps(objective: Objective, num_steps: tuple[int, ...]) -> Objective:
    """The objective on paths of other numbers of steps, one after the other.

    Args:
        objective: any objective that works on detached paths.
        num_steps: step counts; update number i uses entry i modulo their number.

    Raises:
        ValueError: when there is no step count or one below 1, or the objective
            differentiates the simulation or needs a trust region's paths; at the start
            of training when a step count does not divide the sampler's `finest`, or its
            time grid knows none of so many steps.

    Example:
        >>> import diffsamp as ds
        >>> o = ds.objectives
        >>> objective = o.weighted_sum(
        ...     (o.log_variance(), 1.0),
        ...     (o.at_num_steps(o.trajectory_balance(), (1, 2, 4, 8)), 1.0),
        ...     (o.self_consistency(), 0.5),
        ... )
    """
    if not num_steps or min(num_steps) < 1:
        raise ValueError(
            f"num_steps must be one or more step counts of at least 1, got {num_steps}"
        )
    needs = objective.requires
    if needs.simulation_gradient or needs.anchor:
        raise ValueError(
            "at_num_steps draws its own detached paths; use an objective that takes "
            "them, such as log_variance, trajectory_balance or "
            "reverse_kl_log_derivative"
        )

    def init(key, sampler, params, energy, pilot):
        finest = sampler.finest
        wrong = [k for k in num_steps if finest is not None and finest % k]
        if wrong:
            raise ValueError(
                f"num_steps of at_num_steps must divide {finest}, the number of steps "
                f"with which the sampler is trained, got {', '.join(map(str, wrong))}"
            )
        for k in num_steps:
            sampler.process.coefficients(k)  # the time grid may refuse
        return objective.init(key, sampler, params, energy, pilot)

    def loss(params, state, batch):
        branches = [
            functools.partial(_loss_at, k, objective, params, state, batch)
            for k in num_steps
        ]
        return jax.lax.switch(batch.count % len(num_steps), branches)

    return objective._replace(init=init, loss=loss)


def _loss_at(num_steps, objective, params, state, batch: Batch):
    sampler = batch.sampler.with_num_steps(num_steps)
    live = params["sampler"]
    condition = batch.condition if batch.condition.shape[-1] else None
    for_draws, for_traces, key = jax.random.split(batch.key, 3)
    size = batch.on_policy.shape[0]
    drawn = jax.vmap(sampler.simulate, in_axes=(None, 0, None, 0))(
        live, jax.random.split(for_draws, size), batch.energy, condition
    )
    traced = jax.vmap(sampler.trace_path, in_axes=(None, 0, 0, None, 0))(
        live,
        jax.random.split(for_traces, size),
        batch.paths.xs[:, -1],
        batch.energy,
        condition,
    )

    def choose(a, b):
        return jnp.where(batch.on_policy.reshape((size,) + (1,) * (a.ndim - 1)), a, b)

    paths = jax.tree.map(choose, drawn._replace(densities=None), traced)
    trajectories, _ = score_paths(
        sampler,
        live,
        paths,
        condition,
        memory_budget=batch.memory_budget,
        mesh=batch.mesh,
    )
    own = batch._replace(
        trajectories=trajectories,
        rollouts=None,
        paths=paths,
        sampler=sampler,
        key=key,
    )
    value, metrics = objective.loss(params, state, own)
    price = sampler.evaluations_per_path
    cost = Cost(*(2 * size * count for count in price))
    cost = total_cost([cost, metrics.pop("cost", Cost(0, 0))])
    return value, {**metrics, "cost": counted(cost)}
