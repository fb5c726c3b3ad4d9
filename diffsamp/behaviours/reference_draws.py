"""Given target draws, traced back by the destruction kernel."""

from __future__ import annotations

import jax

from diffsamp.behaviours.common import FREE, keep_state, num_rows, proposal, trace_back
from diffsamp.energies import as_points
from diffsamp.types import Array, Behaviour, Provides


def reference_draws(draws: Array) -> Behaviour:
    """Paths into draws from the target that the user already has.

    Args:
        draws: points, [N, D], from the target or nearly so.

    Raises:
        ValueError: when draws is not a finite array of shape [N, D].

    Example:
        >>> import jax, diffsamp as ds
        >>> draws = ds.targets.gmm9().sample(jax.random.key(0), 256)
        >>> ds.behaviours.reference_draws(draws).provides.target_draws
        True
    """
    points = as_points("draws", draws)

    def init(key, sampler, params, energy):
        del key, params, energy
        if points.shape[1] != sampler.dim:
            raise ValueError(
                f"draws must have {sampler.dim} columns, got {points.shape[1]}"
            )
        return points, FREE

    return Behaviour(init, _propose, keep_state, Provides(target_draws=True))


def _propose(points, key, sampler, params, energy, request, count):
    """At the top level, so that other points do not compile an update again."""
    del count
    pick, walk = jax.random.split(key)
    index = jax.random.randint(pick, (num_rows(request),), 0, points.shape[0])
    paths = trace_back(walk, sampler, params, energy, points[index])
    return proposal(paths, target_draws=True)
