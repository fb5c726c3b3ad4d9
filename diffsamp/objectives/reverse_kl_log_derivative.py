"""Reverse KL by the log-derivative trick, without gradients through the simulation.

With L = -log_weight on detached on-policy paths and b its batch mean, the surrogate

    loss = mean( sg[L - b] sum_k log p - sum_k log q )

has the gradient of reverse KL for generation parameters, destruction parameters and
parameters shared by both (rKL-LD, arXiv 2506.10982; the log-variance gradient has not,
once destruction is learned). b is the mean over the other rows (of the same condition,
where there are conditions): with the plain batch mean the estimate would shrink by
1 - 1/B. The loss value itself means nothing; the
metric ``elbo`` does.
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
    rows = finite_rows(trajectories.log_weight, batch.on_policy)
    cost = jax.lax.stop_gradient(-safe(trajectories.log_weight, rows))
    advantage = over_the_others(cost, rows, batch)
    log_generation = jnp.sum(trajectories.log_generation, axis=-1)
    log_destruction = jnp.sum(trajectories.log_destruction, axis=-1)
    return row_mean(advantage * log_generation - log_destruction, rows), {}


@functools.cache
def reverse_kl_log_derivative() -> Objective:
    """Reverse KL by its log-derivative gradient on detached on-policy paths.

    Memory does not grow with the network's depth times K, and learned destruction
    kernels get their true reverse-KL gradient. Rows that are not on-policy are ignored.
    """
    return Objective(Requirements(on_policy=True), no_state, _loss, keep_state)
