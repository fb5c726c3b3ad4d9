"""Trajectory likelihood: the destruction kernel learns the paths that generation takes.

    loss = -mean( sum_k log q(x_k | x_{k+1}) ),  detached on-policy paths

With generation held fixed, reverse KL between the two laws of paths is this plus a
constant, so its gradient for the destruction parameters is exactly reverse KL's, with
less variance than that of trajectory balance, which on top is *not* reverse KL's where
destruction is learned (arXiv 2506.10982). It says nothing to generation: pair it,

    weighted_sum((generation_only(trajectory_balance()), 1.0),
                 (trajectory_likelihood(), 1.0)).

TLM: Gritsaev et al. 2025, arXiv 2410.15474 (discrete) and 2506.01541 (diffusion), who
found it unstable with many steps. Loss values are in nats and may be negative.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from diffsamp.objectives.common import finite_rows, keep_state, row_mean
from diffsamp.types import Objective, Requirements


def _init(key, sampler, params, energy, pilot):
    del key, params, energy, pilot
    if sampler.destruction is None:
        raise ValueError(
            "trajectory_likelihood trains a destruction kernel, and this sampler has "
            "none to train; build it with learn_destruction=True"
        )
    return {}, ()


def _loss(params, state, batch):
    del params, state
    log_destruction = jnp.sum(batch.trajectories.log_destruction, axis=-1)
    rows = finite_rows(log_destruction, batch.on_policy)
    return -row_mean(log_destruction, rows), {}


@functools.cache
def trajectory_likelihood() -> Objective:
    """Minus the log-likelihood of generated paths under the destruction kernel.

    Rows that are not on-policy are ignored.

    Raises:
        ValueError: at the start of training, when destruction is not learned.

    Example:
        >>> import diffsamp as ds
        >>> ds.objectives.trajectory_likelihood().requires.on_policy
        True
    """
    return Objective(Requirements(on_policy=True), _init, _loss, keep_state)
