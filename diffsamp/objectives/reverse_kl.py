"""Reverse KL on paths, differentiated through the simulation.

    loss = mean(-log_weight),  x ~ generation, reparametrised

so that ``loss = KL(generation paths || destruction paths of the target) - log Z``:
minus the ELBO. Zhang and Chen 2022, eq. 9; Vargas et al. 2023. Only on-policy paths
make sense. The simulation is rematerialised: beside the scores that the networks were
shown, its states (2 sqrt(K) of them where all would be more than `fit(memory_budget)`)
and one step's activations are held at a time. Mode-seeking.
"""

from __future__ import annotations

import functools

from diffsamp.objectives.common import (
    finite_rows,
    keep_state,
    no_state,
    row_mean,
    safe,
)
from diffsamp.types import Objective, Requirements


def _loss(params, state, batch):
    del params, state
    log_weight = batch.rollouts.log_weight
    rows = finite_rows(log_weight)
    return -row_mean(safe(log_weight, rows), rows), {}


@functools.cache
def reverse_kl() -> Objective:
    """Minus the ELBO, by gradients through the whole simulation.

    Needs a purely on-policy behaviour. Its value is an upper bound on -log Z.

    Example:
        >>> import diffsamp as ds
        >>> ds.objectives.reverse_kl().requires.simulation_gradient
        True
    """
    return Objective(
        Requirements(simulation_gradient=True, on_policy=True),
        no_state,
        _loss,
        keep_state,
    )
