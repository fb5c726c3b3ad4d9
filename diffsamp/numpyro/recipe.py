"""How `DiffusionSampler` trains by default: the sampler, and stages of training.

A `samplers.dis` with learned generation variance and a network that is shown no score
is trained in rounds: by `objectives.forward_kl` on paths traced back from the pilot's
points, then by `objectives.log_variance` on these and its own paths. An update so costs
one energy per path, and no gradient. Where the posterior has several modes, it is a
`samplers.gmp` that starts from a mixture of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import optax

from diffsamp import behaviours, networks, objectives, samplers, schedules
from diffsamp.sampler import Bounds, Sampler
from diffsamp.types import Array, Behaviour, Objective

# Shares of the budget, and of each the share for the stage by forward KL.
ROUNDS = ((0.15, 0.5), (0.3, 0.6), (0.55, 0.7))
IMITATED, BALANCED = 128, 256  # paths per update in the two stages
_MIXED = 0.1  # noise of the mixture, in standard deviations of the posterior


class Stage(NamedTuple):
    """One call of `diffsamp.fit`.

    Attributes:
        objective: its loss.
        behaviour: where its paths come from.
        optimizer: its updates.
        batch_size: paths per update.
        share: of the whole budget.
    """

    objective: Objective
    behaviour: Behaviour
    optimizer: optax.GradientTransformation
    batch_size: int
    share: float


def default_sampler(
    dim: int,
    num_steps: int,
    *,
    smallest_scale: float = 0.05,
    num_components: int | None = None,
    **reference: Any,
) -> Sampler:
    """The sampler of `DiffusionSampler`: DIS, or GMP, with learned generation variance.

    Args:
        dim: dimension D.
        num_steps: steps K from the normal reference; half as many from a mixture, which
            is near the posterior.
        smallest_scale: of `schedules.geometric`.
        num_components: of the mixture from which to start, or None to start from the
            normal reference.
        **reference: ``loc`` and ``scale``, where they are not 0 and 1.
    """
    if num_components is not None:
        smallest_scale = min(smallest_scale, _MIXED / 4)
        return samplers.gmp(
            dim,
            num_components,
            max(num_steps // 2, 1),
            schedule=schedules.geometric(smallest_scale, largest_scale=_MIXED),
            **reference,
        )
    return samplers.dis(
        dim,
        num_steps,
        schedule=schedules.geometric(smallest_scale),
        network=networks.free(learn_variance=True),
        generation_bounds=Bounds(log_variance=2.0),
        **reference,
    )


def stages(
    points: Array,
    objective: Objective | None = None,
    behaviour: Behaviour | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Iterator[Stage]:
    """All of them, one after the other.

    Args:
        points: of the pilot, [N, D].
        objective: of every second stage, in place of `objectives.log_variance`.
        behaviour: of these, in place of half own paths and half into the points.
        optimizer: of all, in place of Adam at 0.002, and 0.001 in every second.
    """
    seeded = behaviours.reference_draws(points)
    both = behaviours.mixture((behaviours.on_policy(), 0.5), (seeded, 0.5))
    for share, imitated in ROUNDS:
        yield Stage(
            objectives.forward_kl(),
            seeded,
            optimizer or _FAST,
            IMITATED,
            share * imitated,
        )
        yield Stage(
            objective or objectives.log_variance(),
            behaviour or both,
            optimizer or _SLOW,
            BALANCED,
            share * (1 - imitated),
        )


_FAST, _SLOW = optax.adam(2e-3), optax.adam(1e-3)
