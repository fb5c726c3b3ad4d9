"""Batches of paths, forwards and backwards."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffsamp.types import Array, Cost, Energy, Key, Params, Path, Proposal, Request

FREE = Cost(0, 0)


def simulate(
    key: Key,
    sampler: Any,
    params: Params,
    energy: Energy,
    request: Request,
    extra_std: Array | float = 0.0,
) -> Path:
    """One path from the generation process for each row of the request."""

    def one(key, condition):
        condition = condition if condition.size else None
        return sampler.simulate(params, key, energy, condition, extra_std=extra_std)

    keys = jax.random.split(key, num_rows(request))
    return jax.vmap(one)(keys, request.condition)


def num_rows(request: Request) -> int:
    """B."""
    return request.group.shape[0]


def trace_back(
    key: Key, sampler: Any, params: Params, energy: Energy, x: Array
) -> Path:
    """One path into each of the points x [B, D], by the destruction kernel."""

    def one(key, x):
        return sampler.trace_path(params, key, x, energy)

    return jax.vmap(one)(jax.random.split(key, x.shape[0]), x)


def proposal(
    paths: Path,
    *,
    simulated: bool = False,
    on_policy: bool = False,
    target_draws: bool = False,
) -> Proposal:
    """A proposal whose rows are all of one kind."""

    def rows(flag):
        return jnp.full(paths.energy.shape, flag)

    return Proposal(paths, rows(simulated), rows(on_policy), rows(target_draws))


def no_state(
    key: Key, sampler: Any, params: Params, energy: Energy
) -> tuple[Any, Cost]:
    """`Behaviour.init` of behaviours without state."""
    del key, sampler, params, energy
    return (), FREE


def keep_state(state, key, sampler, params, energy, trajectories, proposal, count):
    """`Behaviour.update` that changes nothing."""
    del key, sampler, params, energy, trajectories, proposal, count
    return state, FREE
