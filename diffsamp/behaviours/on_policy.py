"""On-policy behaviour: paths of the current generation process."""

from __future__ import annotations

import functools

from diffsamp.behaviours.common import keep_state, no_state, proposal, simulate
from diffsamp.types import Behaviour, Provides


def _propose(state, key, sampler, params, energy, request, count):
    del state, count
    paths = simulate(key, sampler, params, energy, request)
    return proposal(paths, simulated=True, on_policy=True)


@functools.cache
def on_policy() -> Behaviour:
    """Trains on the sampler's own paths. Modes it never visits stay unseen.

    Example:
        >>> import diffsamp as ds
        >>> ds.behaviours.on_policy().provides.only_on_policy
        True
    """
    return Behaviour(
        no_state,
        _propose,
        keep_state,
        Provides(simulated=True, on_policy=True, only_on_policy=True, conditions=True),
    )
