"""What ``trust`` asks for beyond the weights and the probe.

The draws must know means and variances of all sites and unconstrained coordinates well
(`agreement.imprecision`), and the pilots must agree with them and with each other
(`agreement.disagreement`).
"""

from __future__ import annotations

import numpy as np

from diffsamp.drawing import Draws
from diffsamp.numpyro.agreement import (
    PRECISE,
    Imprecision,
    disagreement,
    imprecision,
)
from diffsamp.numpyro.quantities import Columns, columns, comparable
from diffsamp.numpyro.target import ModelTarget
from diffsamp.types import ArrayLike

NEGLIGIBLE = 30.0  # nats below the largest log-weight: sites may overflow there
_UNIT = {"mean": "standard deviation", "variance": "value"}


def checked(
    verdict: str,
    target: ModelTarget,
    draws: Draws,
    pilot: ArrayLike,
    probe: ArrayLike,
) -> str:
    """The verdict, unless the draws know too little or somebody disagrees.

    Args:
        verdict: what weights and probe say.
        target: the posterior.
        draws: weighted draws, in its coordinates.
        pilot: points of one pilot, [N, D].
        probe: of an independent one, [N, D].
    """
    own, log_weight = _relevant(target, draws)
    witnesses = [columns(target, points) for points in (pilot, probe)]
    least, name = _least_known(own, log_weight, witnesses[0])
    if least.excess > 1:
        return (
            f"reweight (the {least.what} of {name} has a standard error of "
            f"{least.error:.2g} of its {_UNIT[least.what]}, more than "
            f"{PRECISE[least.what]}: a few draws decide about it; train longer, or "
            "draw more)"
        )
    own, first, second = comparable(own, *witnesses)
    found = disagreement(own.values, log_weight, first.values, second.values)
    if found is None:
        return verdict
    who = "the two pilots" if found.between_pilots else "draws and pilots"
    return (
        f"reweight ({who} disagree about the {found.what} of "
        f"{own.names[found.coordinate]} by {found.size:.2g} of its "
        f"{_UNIT[found.what]}, {found.z:.1f} standard errors: one of them lacks a part "
        "of the posterior; train longer, or give the pilots more particles)"
    )


def least_known(
    target: ModelTarget, draws: Draws, pilot: ArrayLike
) -> tuple[Imprecision, str]:
    """What the draws know least, and the name of its site.

    Args:
        target: the posterior.
        draws: weighted draws, in its coordinates.
        pilot: points [N, D] that tell what varies at all.
    """
    return _least_known(*_relevant(target, draws), columns(target, pilot))


def _least_known(
    own: Columns, log_weight: np.ndarray, pilot: Columns
) -> tuple[Imprecision, str]:
    own, _ = comparable(own, pilot)
    least = imprecision(own.values, log_weight)
    return least, own.names[least.coordinate]


def _relevant(target: ModelTarget, draws: Draws) -> tuple[Columns, np.ndarray]:
    log_weight = np.asarray(draws.log_weight, np.float64)
    kept = np.flatnonzero(log_weight > np.nanmax(log_weight) - NEGLIGIBLE)
    return columns(target, np.asarray(draws.x)[kept]), log_weight[kept]
