"""Target copies: an objective that sees one kernel through slowly moving parameters.

When both kernels are trained each is the other's moving target. As in Q-learning the
objective may instead look at a copy of one of them, which follows by Polyak averaging,
``copy += rate (params - copy)``, or is replaced every so many updates. The copied
kernel gets no gradient from this objective: train it with another one,

    weighted_sum((target_copy(trajectory_balance(), rate=0.05), 1.0),
                 (trajectory_likelihood(), 1.0)),

which is the loop of Gritsaev et al. 2025 (arXiv 2410.15474): the copy of destruction
is used by the loss of generation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffsamp.objectives.kernels import with_kernels
from diffsamp.scoring import score_paths
from diffsamp.types import Cost, Objective, total_cost


@functools.cache
def target_copy(
    objective: Objective,
    *,
    rate: float | None = None,
    every: int | None = None,
    generation: bool = False,
) -> Objective:
    """The objective with the destruction kernel of a target copy of the parameters.

    Args:
        objective: the objective.
        rate: share of the way to the parameters that the copy moves at each update.
        every: instead, copy them every so many updates.
        generation: copy the generation kernel instead of the destruction kernel.

    Raises:
        ValueError: unless exactly one of rate, in (0, 1], and every, at least 1, is
            given; when the objective differentiates the simulation; at the start of
            training when there is no learned destruction to copy.

    Example:
        >>> import diffsamp as ds
        >>> objective = ds.objectives.target_copy(
        ...     ds.objectives.trajectory_balance(), rate=0.05
        ... )
    """
    valid = (rate is None) != (every is None)
    if not valid or not 0 < (rate or 1) <= 1 or (every is not None and every < 1):
        raise ValueError(
            "target_copy takes either rate in (0, 1] or every of at least 1, got "
            f"rate={rate} and every={every}"
        )
    if objective.requires.simulation_gradient:
        raise ValueError(
            "an objective that differentiates the simulation cannot use a copy of one "
            "kernel; use reverse_kl_log_derivative"
        )

    def init(key, sampler, params, energy, pilot):
        if sampler.destruction is None and not generation:
            raise ValueError(
                "target_copy copies a learned destruction kernel, and this sampler has "
                "none; build it with learn_destruction=True"
            )
        own, state = objective.init(key, sampler, params, energy, pilot)
        return own, (jax.tree.map(jnp.asarray, params), state)

    def loss(params, state, batch):
        copy, inner = state
        condition = batch.condition if batch.condition.shape[-1] else None
        copy = jax.lax.stop_gradient(copy)
        copied, _ = score_paths(
            batch.sampler,
            copy,
            batch.paths,
            condition,
            memory_budget=batch.memory_budget,
            mesh=batch.mesh,
        )
        live = batch.trajectories
        if generation:
            kernels = copied.log_generation, live.log_destruction
        else:
            kernels = live.log_generation, copied.log_destruction
        batch = batch._replace(trajectories=with_kernels(live, *kernels))
        value, metrics = objective.loss(params, inner, batch)
        calls = batch.on_policy.shape[0] * batch.sampler.evaluations_per_path.network
        cost = total_cost([Cost(0, 0, calls), metrics.pop("cost", Cost(0, 0))])
        return value, {**metrics, "cost": cost}

    def update(params, state, batch):
        copy, inner = state
        if rate is not None:
            share = jnp.asarray(rate)
        else:
            share = jnp.where((batch.count + 1) % every == 0, 1.0, 0.0)
        copy = jax.tree.map(
            lambda old, new: old + share.astype(old.dtype) * (new - old),
            copy,
            params["sampler"],
        )
        return copy, objective.update(params, inner, batch)

    return objective._replace(init=init, loss=loss, update=update)
