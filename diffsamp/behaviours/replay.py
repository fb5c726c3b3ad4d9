"""Replay: last states of earlier paths, traced back by the current destruction kernel.

Only the last state is stored, so that a path is always one the current destruction
kernel could have made: nothing goes stale. Sendera et al. 2024.
"""

from __future__ import annotations

import functools

from diffsamp import buffers
from diffsamp.behaviours.common import FREE, empty_buffer, store, stored_or_simulated
from diffsamp.types import Behaviour, Provides, as_count


@functools.cache
def replay(
    capacity: int = 100_000, *, priority: buffers.Priority = buffers.uniform
) -> Behaviour:
    """Paths into stored last states. To be mixed with a behaviour that simulates.

    The buffer takes in every simulated row of the batch, with its energy, its score
    where the sampler's networks are shown scores, and its log-weight; rows with a
    number that is not finite are refused and counted (metric ``num_rejected``). Until
    it holds anything, rows are simulated on-policy.

    Args:
        capacity: points kept, oldest out first; at least the batch size.
        priority: which of them come up how often: ``buffers.uniform``,
            ``buffers.by_rank()`` for low energies or ``buffers.by_weight()`` for large
            importance weights. Rows from `exploration` have no exact weight: theirs
            leaves the extra noise out.

    Raises:
        ValueError: when capacity is below 1 or priority is no function, and in training
            when capacity is below the batch size.

    Example:
        >>> import diffsamp as ds
        >>> behaviour = ds.behaviours.mixture(
        ...     (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(10_000), 0.5)
        ... )
    """
    capacity = as_count("capacity", capacity)
    buffers.check_priority(priority)

    def init(key, sampler, params, energy):
        del key, params, energy
        return empty_buffer(capacity, sampler), FREE

    def propose(buffer, key, sampler, params, energy, request, count):
        del count
        return stored_or_simulated(
            buffer, priority, key, sampler, params, energy, request
        )

    def update(buffer, key, sampler, params, energy, trajectories, proposal, count):
        del key, sampler, params, energy, count
        return store(buffer, trajectories, proposal), FREE

    def metrics(buffer):
        return {"num_rejected": buffer.num_rejected}

    return Behaviour(init, propose, update, Provides(), metrics)
