"""Forward KL by the log-derivative trick: also for a learned destruction kernel.

With paths x ~ q traced back from target draws, L = log_weight = log Z + log(Q / P) and
b its batch mean, the surrogate

    loss = mean( sg[L - b] sum_k log q - sum_k log p )

has the gradient of KL(Q || P), Q the law of destruction paths and P that of generation
paths, for generation parameters (maximum likelihood, as in `forward_kl`), destruction
parameters (score function; b is the mean over the other rows) and parameters shared by
both. It mirrors `reverse_kl_log_derivative`; the sum of both,

    weighted_sum((reverse_kl_log_derivative(), 1.0), (forward_kl_log_derivative(), 1.0))

descends Jeffreys' divergence KL(P || Q) + KL(Q || P) = EUBO - ELBO. Batch variances do
not replace it where destruction is learned: the variance of L under P does not see what
Q puts where P never goes. The loss value itself means nothing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffsamp.objectives.common import (
    finite_rows,
    keep_state,
    no_state,
    over_the_others,
    row_mean,
    safe,
)
from diffsamp.types import Objective, Requirements


def _loss(params, state, batch):
    del params, state
    trajectories = batch.trajectories
    rows = finite_rows(trajectories.log_weight, batch.target_draws)
    log_ratio = jax.lax.stop_gradient(safe(trajectories.log_weight, rows))
    excess = over_the_others(log_ratio, rows, batch)
    log_generation = jnp.sum(trajectories.log_generation, axis=-1)
    log_destruction = jnp.sum(trajectories.log_destruction, axis=-1)
    return row_mean(excess * log_destruction - log_generation, rows), {}


@functools.cache
def forward_kl_log_derivative() -> Objective:
    """Forward KL by its log-derivative gradient, on rows traced back from target draws.

    The behaviour has to bring such rows (`behaviours.smc_seeded`,
    `behaviours.reference_draws`), traced back by the current destruction kernel; the
    others are ignored.

    Example:
        >>> import diffsamp as ds
        >>> jeffreys = ds.objectives.weighted_sum(
        ...     (ds.objectives.reverse_kl_log_derivative(), 1.0),
        ...     (ds.objectives.forward_kl_log_derivative(), 1.0),
        ... )
    """
    return Objective(Requirements(target_draws=True), no_state, _loss, keep_state)
