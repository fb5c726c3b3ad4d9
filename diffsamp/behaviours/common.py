"""Batches of paths, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffsamp import buffers
from diffsamp.types import (
    Anchor,
    Array,
    Cost,
    Energy,
    Key,
    Params,
    Path,
    Proposal,
    Request,
    Trajectory,
)

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


def joined(parts: Sequence[Proposal]) -> Proposal:
    """The rows of several proposals; densities only where all have them."""
    if any(part.paths.densities is None for part in parts):
        parts = [without_densities(part) for part in parts]
    if any(part.anchor is not None for part in parts):
        parts = [_anchored(part) for part in parts]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _anchored(proposal: Proposal) -> Proposal:
    if proposal.anchor is not None:
        return proposal
    nothing = jnp.full_like(proposal.paths.energy, jnp.nan)
    return proposal._replace(anchor=Anchor(nothing, nothing))


def without_densities(proposal: Proposal) -> Proposal:
    """The same paths with nothing known of their densities."""
    return proposal._replace(paths=proposal.paths._replace(densities=None))


def empty_buffer(capacity: int, sampler: Any) -> buffers.Buffer:
    """A buffer that keeps scores if the paths of this sampler carry them."""
    return buffers.init(
        capacity, sampler.dim, sampler.dim if sampler.needs_score else 0
    )


def store(
    buffer: buffers.Buffer, trajectories: Trajectory, proposal: Proposal
) -> buffers.Buffer:
    """Adds the last states of the simulated rows."""
    return buffers.add(
        buffer,
        trajectories.x,
        trajectories.energy,
        proposal.simulated,
        score=proposal.paths.scores[:, -1],
        log_weight=trajectories.log_weight,
    )


def stored_or_simulated(
    buffer: buffers.Buffer,
    priority: buffers.Priority,
    key: Key,
    sampler: Any,
    params: Params,
    energy: Energy,
    request: Request,
) -> Proposal:
    """Paths into rows of a buffer; on-policy ones as long as it is empty."""
    pick, walk = jax.random.split(key)

    def stored():
        x = buffers.sample(buffer, pick, num_rows(request), priority)
        return proposal(trace_back(walk, sampler, params, energy, x))

    def fresh():
        paths = simulate(walk, sampler, params, energy, request)
        fresh = proposal(paths, simulated=True, on_policy=True)
        return without_densities(fresh)  # as the others are

    return jax.lax.cond(buffer.size > 0, stored, fresh)


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
