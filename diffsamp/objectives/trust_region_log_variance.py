"""Log-variance within a trust region: Blessing et al. 2025.

A round begins with paths of the sampler P_i and their log-weights l = log dQ/dP_i
(`behaviours.trust_region`), and asks for P_{i+1} proportional to P_i e^(eta l). The
loss, on a batch of these paths, is

    Var_batch( log p(path) - log p_i(path) - eta l(path) ),

with log p the sum of log-generations of the current parameters and log p_i that of the
parameters at the start of the round. It vanishes exactly at P_{i+1}; neither its
normaliser nor log Z is needed. In the first batch of a round log p = log p_i, and the
gradient is eta times that of log-variance.

Destruction enters through l alone, as it was at the start of the round: l and log p_i
are numbers kept with the paths. This loss has no gradient in log q, yet a learned
destruction kernel can move within a round: with a shared backbone, whose features log p
trains and log q uses, too, or by another objective in a sum. That does not move what
the round asks for, P_{i+1} with Q as it was; the next round weighs its paths with Q as
it is then, whose last states have the target's law as well. What is lost is that all
rounds approach one and the same Q, which the paper assumes. `behaviours.trust_region`
shows how to keep Q fixed but between rounds.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from diffsamp.objectives.common import (
    finite_rows,
    group_mean,
    keep_state,
    no_state,
    row_mean,
    safe,
)
from diffsamp.types import Objective, Requirements


def _loss(params, state, batch):
    del params, state
    log_generation = jnp.sum(batch.trajectories.log_generation, axis=-1)
    log_ratio = log_generation - batch.anchor.log_generation - batch.anchor.log_tilt
    rows = finite_rows(log_ratio)
    log_ratio = safe(log_ratio, rows)
    mean, count = group_mean(log_ratio, rows, batch)
    square = (log_ratio - mean) ** 2 * count / jnp.maximum(count - 1, 1)
    return row_mean(square, rows), {}


@functools.cache
def trust_region_log_variance() -> Objective:
    """Batch variance of the log-ratio to the tempered sampler of the round.

    Needs `behaviours.trust_region`.

    Example:
        >>> import diffsamp as ds
        >>> objective = ds.objectives.trust_region_log_variance()
        >>> behaviour = ds.behaviours.trust_region(2_048, every=100)
        >>> objective.requires.anchor and behaviour.provides.anchor
        True
    """
    return Objective(Requirements(anchor=True), no_state, _loss, keep_state)
