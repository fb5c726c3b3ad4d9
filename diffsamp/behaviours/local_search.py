"""Local search: short MCMC chains from found states, traced back.

A sampler finds the outskirts of a mode first. Chains of MALA or HMC (BlackJAX) walk
from there to where its mass is, and show the sampler. They need not have converged: a
training path may end anywhere. Sendera et al. 2024.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffsamp import buffers, mcmc
from diffsamp.behaviours.common import empty_buffer, store, stored_or_simulated
from diffsamp.types import Array, Behaviour, Cost, Provides, counted


class LocalSearchState(NamedTuple):
    """What local search carries from update to update.

    Attributes:
        found: last states of simulated rows, from which chains start.
        searched: states of the chains, which are traced back.
        step_size: leapfrog step of the next search, in unit coordinates, [].
        acceptance: share of accepted moves in the last search, NaN before any, [].
        num_searches: searches so far, [] int.
        num_failures: of them, those in which nothing was accepted, [] int.
    """

    found: buffers.Buffer
    searched: buffers.Buffer
    step_size: Array
    acceptance: Array
    num_searches: Array
    num_failures: Array


@functools.cache
def local_search(
    capacity: int = 100_000,
    *,
    every: int = 100,
    num_chains: int = 128,
    num_steps: int = 200,
    num_burn_in: int = 100,
    num_integration_steps: int = 1,
    initial_step_size: float = 0.1,
    target_acceptance: float | None = None,
    priority: buffers.Priority | None = None,
) -> Behaviour:
    """Paths into states of MALA or HMC chains. To be mixed with one that simulates.

    One buffer takes in every simulated row of the batch. After every ``every`` updates
    chains start from states of it, and what they accept after burn-in goes into a
    second buffer, from which rows are traced back by the current destruction kernel.
    Until that holds anything, rows are simulated on-policy.

    The step size is adapted during burn-in and carried on to the next search. A search
    in which nothing is accepted stores nothing, is counted, and starts again at
    ``initial_step_size``. Metrics: ``local_search_acceptance`` and
    ``local_search_step_size`` of the last search, ``local_search_failures`` so far.

    A search costs num_chains (num_steps num_integration_steps + 1) gradients, by
    default 257 per update.

    Args:
        capacity: points kept in each of the two buffers, oldest out first; at least the
            batch size, and at least what one search may find.
        every: updates between two searches.
        num_chains: parallel chains of a search.
        num_steps: transitions of each.
        num_burn_in: of them, those that adapt the step size and are dropped.
        num_integration_steps: leapfrog steps per transition; 1 is MALA, more is HMC.
        initial_step_size: leapfrog step of the first search, in units of the sampler's
            scale.
        target_acceptance: acceptance rate that the step size is adapted to; by default
            0.574 for MALA and 0.651 for HMC.
        priority: which rows of either buffer come up how often; ``buffers.by_rank()``
            by default. Chain states have no importance weight: to
            ``buffers.by_weight()`` they are all alike, and only starts are chosen.

    Raises:
        ValueError: when a number is out of range, a search may find more than capacity,
            and in training when capacity is below the batch size.

    Example:
        >>> import diffsamp as ds
        >>> behaviour = ds.behaviours.mixture(
        ...     (ds.behaviours.exploration(0.1), 0.5),
        ...     (ds.behaviours.local_search(), 0.5),
        ... )
    """
    if every < 1 or num_chains < 1:
        raise ValueError(
            f"every and num_chains must be at least 1, got {every} and {num_chains}"
        )
    options = mcmc.check_chain_options(
        num_steps=num_steps,
        num_burn_in=num_burn_in,
        num_integration_steps=num_integration_steps,
        target_acceptance=target_acceptance,
    )
    if not 0 < initial_step_size < math.inf:
        raise ValueError(
            f"initial_step_size must be positive and finite, got {initial_step_size}"
        )
    most = num_chains * (num_steps - num_burn_in)
    if capacity < most:
        raise ValueError(
            f"capacity must hold what one search may find, num_chains * (num_steps - "
            f"num_burn_in) = {most}, got {capacity}; raise it or lower num_chains"
        )
    priority = buffers.by_rank() if priority is None else priority
    buffers.check_priority(priority)

    def init(key, sampler, params, energy):
        del key, params, energy
        dtype = jax.dtypes.canonicalize_dtype(float)
        zero = jnp.zeros((), jnp.int32)
        state = LocalSearchState(
            found=empty_buffer(capacity, sampler),
            searched=empty_buffer(capacity, sampler),
            step_size=jnp.asarray(initial_step_size, dtype),
            acceptance=jnp.full((), jnp.nan, dtype),
            num_searches=zero,
            num_failures=zero,
        )
        return state, Cost(0, 0)

    def propose(state, key, sampler, params, energy, request, count):
        del count
        return stored_or_simulated(
            state.searched, priority, key, sampler, params, energy, request
        )

    def search(state, key, sampler, energy):
        pick, walk = jax.random.split(key)
        scale = jnp.asarray(sampler.scale, state.found.x.dtype)
        chains = mcmc.run_chains(
            walk,
            energy,
            buffers.sample(state.found, pick, num_chains, priority),
            scale=scale,
            step_size=state.step_size,
            **options,
        )
        x = chains.positions.reshape(most, -1)
        score = None
        if sampler.needs_score:
            score = -jnp.broadcast_to(scale, x.shape) * chains.gradient.reshape(x.shape)
        searched = buffers.add(
            state.searched,
            x,
            chains.energy.reshape(most),
            chains.moved.reshape(most),
            score=score,
        )
        failed = ~jnp.any(chains.moved)
        state = LocalSearchState(
            found=state.found,
            searched=searched,
            step_size=jnp.where(failed, initial_step_size, chains.step_size),
            acceptance=chains.acceptance,
            num_searches=state.num_searches + 1,
            num_failures=state.num_failures + failed.astype(jnp.int32),
        )
        return state, counted(Cost(0, chains.num_gradient_evaluations))

    def update(state, key, sampler, params, energy, trajectories, proposal, count):
        del params
        state = state._replace(found=store(state.found, trajectories, proposal))
        due = ((count + 1) % every == 0) & (state.found.size > 0)
        return jax.lax.cond(
            due,
            lambda: search(state, key, sampler, energy),
            lambda: (state, counted(Cost(0, 0))),
        )

    def metrics(state):
        return {
            "local_search_acceptance": state.acceptance,
            "local_search_step_size": state.step_size,
            "local_search_failures": state.num_failures,
        }

    return Behaviour(init, propose, update, Provides(), metrics)
