"""Weights of published few-step samplers that are none, for comparison only.

Their means are not Z, their logarithms no bounds on log Z, and they overstate the
evidence the more the fewer the steps: nothing in the library uses them. With D_k the
displacement of step k of a flow, x_0 from the reference p_0 and x_K the end,

* `boundary_ratio` leaves the change of volume out: ``log rho(x_K) - log p_0(x_0)``;
* `first_order_log_determinant` adds ``sum_k tr(dD_k/dx)``, the first term of the series
  of ``log det(1 + dD_k/dx)``, which small steps need and large ones do not obey.

The first is the one-step weight of arXiv 2502.07579, the second the deterministic-flow
weight of arXiv 2512.05251 (there with an estimated trace, and without the divergence
that comes through a score which the control is shown; here with all of it). For weights
that are valid take the sampler's own, or a certified flow's (`probability_flow`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffsamp.deterministic import ProbabilityFlow
from diffsamp.energies import bind_condition
from diffsamp.types import Array, Energy, Params


def boundary_ratio(
    flow: ProbabilityFlow,
    params: Params,
    x: Array,
    energy: Energy,
    condition: Array | None = None,
) -> Array:
    """``log rho(x_K) - log p_0(x_0)``, []: not a bound in any sense.

    Args:
        flow: the flow.
        params: parameters of its sampler.
        x: x_0, a draw of the reference, [D].
        energy: maps [D] to [].
        condition: [condition_dim], or None.
    """
    end = flow.solve(params, x, energy, condition)
    return _log_ratio(flow, x, end, energy, condition)


def first_order_log_determinant(
    flow: ProbabilityFlow,
    params: Params,
    x: Array,
    energy: Energy,
    condition: Array | None = None,
) -> Array:
    """`boundary_ratio` and the divergence of every step, []: not a bound in any sense.

    Where the control sees the score its derivative is part of the divergence, which
    takes second derivatives of the energy.

    Args:
        flow: the flow, with a solver of one call per step.
        params: parameters of its sampler.
        x: x_0, a draw of the reference, [D].
        energy: maps [D] to [].
        condition: [condition_dim], or None.

    Raises:
        ValueError: when the solver needs more than one call per step.
    """
    step = flow.stepper(params, energy, condition, through_score=True)

    def move(y, k):
        divergence = jnp.trace(jax.jacfwd(lambda y: step(k, y) - y)(y))
        return step(k, y), divergence

    start = flow.sampler.unit(jnp.asarray(x))
    y, divergences = jax.lax.scan(move, start, jnp.arange(flow.num_steps))
    end = flow.sampler.original(y)
    return _log_ratio(flow, x, end, energy, condition) + jnp.sum(divergences)


def _log_ratio(flow, x, end, energy, condition):
    return -bind_condition(energy, condition)(end) - flow.log_reference(x)
