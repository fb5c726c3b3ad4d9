"""Forward KL: maximum likelihood of paths traced back from target draws.

    loss = -mean( sum_k log p(x_{k+1} | x_k) ),  x_K from the target, traced back by q

the generation part of KL(destruction paths of the target || generation paths), the rest
being constant in the generation parameters. Mass-covering. The draws must be (nearly)
from the target; a buffer of the sampler's own states is not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffsamp.energies import as_points
from diffsamp.objectives.common import (
    finite_rows,
    keep_state,
    no_state,
    row_mean,
)
from diffsamp.scoring import score_paths
from diffsamp.types import Array, Cost, Objective, Requirements


def _negative_log_likelihood(trajectories, rows):
    log_generation = jnp.sum(trajectories.log_generation, axis=-1)
    return -row_mean(log_generation, finite_rows(log_generation, rows))


def _batch_loss(params, state, batch):
    del params, state
    return _negative_log_likelihood(batch.trajectories, batch.target_draws), {}


def forward_kl(draws: Array | None = None) -> Objective:
    """Minus the mean log-likelihood of generating given draws.

    Args:
        draws: points from the target, [N, D]. Each update takes as many of them as the
            batch has rows. Without it, the rows that the behaviour marks as target
            draws are used (`behaviours.smc_seeded`, `behaviours.reference_draws`).

    Raises:
        ValueError: when draws is not of shape [N, D] or is not finite.
    """
    if draws is None:
        return _on_behaviour
    points = as_points("draws", draws)

    def init(key, sampler, params, energy, pilot):
        del key, params, energy, pilot
        if sampler.condition_dim:
            raise ValueError(
                "forward_kl(draws) knows no conditions to go with its draws; use a "
                "behaviour that brings both, and forward_kl()"
            )
        if points.shape[1] != sampler.dim:
            raise ValueError(
                f"draws must have {sampler.dim} columns, got {points.shape[1]}"
            )
        return {}, points

    def loss(params, points, batch):
        batch_size = batch.on_policy.shape[0]
        pick, trace = jax.random.split(batch.key)
        index = jax.random.randint(pick, (batch_size,), 0, points.shape[0])
        paths = jax.vmap(batch.sampler.trace_path, in_axes=(None, 0, 0, None))(
            params["sampler"],
            jax.random.split(trace, batch_size),
            points[index],
            batch.energy,
        )
        trajectories, _ = score_paths(
            batch.sampler,
            params["sampler"],
            paths,
            memory_budget=batch.memory_budget,
            mesh=batch.mesh,
        )
        rows = jnp.ones((batch_size,), bool)
        loss = _negative_log_likelihood(trajectories, rows)
        price = batch.sampler.evaluations_per_path
        cost = Cost(
            batch_size * price.energy,
            batch_size * price.gradient,
            2 * batch_size * price.network,  # to trace back and to score
        )
        return loss, {"cost": cost}

    return Objective(Requirements(), init, loss, keep_state)


_on_behaviour = Objective(
    Requirements(target_draws=True), no_state, _batch_loss, keep_state
)
