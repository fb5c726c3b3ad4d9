"""Replay: last states of earlier paths, traced back by the current destruction kernel.

Only the last state is stored, so that a path is always one the current destruction
kernel could have made: nothing goes stale. Sendera et al. 2024.
"""

from __future__ import annotations

import functools

import jax

from diffsamp import buffers
from diffsamp.behaviours.common import FREE, num_rows, proposal, simulate, trace_back
from diffsamp.types import Behaviour, Provides


@functools.cache
def replay(capacity: int = 100_000) -> Behaviour:
    """Paths into stored last states. To be mixed with a behaviour that simulates.

    The buffer takes in every simulated row of the batch; rows with a non-finite state
    or energy are refused. Until it holds anything, rows are simulated on-policy.

    Args:
        capacity: points kept, oldest out first; at least the batch size.

    Raises:
        ValueError: when capacity is below 1, and in training when it is below the
            batch size.

    Example:
        >>> import diffsamp as ds
        >>> behaviour = ds.behaviours.mixture(
        ...     (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(10_000), 0.5)
        ... )
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")

    def init(key, sampler, params, energy):
        del key, params, energy
        return buffers.init(capacity, sampler.dim), FREE

    def propose(buffer, key, sampler, params, energy, request, count):
        del count
        pick, walk = jax.random.split(key)

        def stored():
            x = buffers.sample(buffer, pick, num_rows(request))
            return proposal(trace_back(walk, sampler, params, energy, x))

        def fresh():
            paths = simulate(walk, sampler, params, energy, request)
            return proposal(paths, simulated=True, on_policy=True)

        return jax.lax.cond(buffer.size > 0, stored, fresh)

    def update(buffer, key, sampler, params, energy, trajectories, proposal, count):
        del key, sampler, params, energy, count
        buffer = buffers.add(
            buffer, trajectories.x, trajectories.energy, proposal.simulated
        )
        return buffer, FREE

    return Behaviour(init, propose, update, Provides())
