"""PIS: path integral sampler. Zhang and Chen 2022, arXiv 2111.15141.

A Brownian motion started in one point is steered to the target; destruction is the
Brownian bridge back to that point. With unit horizon and scale s, on times t_k,

    p(x_{k+1} | x_k) = N(x_k + s dt u(x_k, t_k), s^2 dt)
    q(x_k | x_{k+1}) = N(loc + (t_k / t_{k+1}) (x_{k+1} - loc), s^2 dt t_k / t_{k+1})

so that without control x_K ~ N(loc, s^2). The first state is the point ``loc``: its
log-density and that of the transition into it are 0. Control: MLP plus a learned
multiple of the target score, which starts near zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffsamp import networks, schedules
from diffsamp.networks import Backbone, Control
from diffsamp.processes import PinnedBrownian
from diffsamp.sampler import Bounds, Sampler
from diffsamp.samplers.common import (
    DEFAULT_BOUNDS,
    destruction_control,
    with_variance,
)


def pis(
    dim: int,
    num_steps: int = 100,
    *,
    loc: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    time_grid: schedules.TimeGrid | None = None,
    network: Control | None = None,
    learn_generation_variance: bool = False,
    learn_destruction: bool = False,
    destruction_network: Control | None = None,
    backbone: Backbone | None = None,
    generation_bounds: Bounds = DEFAULT_BOUNDS,
    destruction_bounds: Bounds = DEFAULT_BOUNDS,
    condition_dim: int = 0,
) -> Sampler:
    """Path integral sampler: Brownian motion from a point, Brownian bridge back.

    Args:
        dim: dimension D.
        num_steps: steps K.
        loc: start point, a number or D numbers.
        scale: standard deviation of the uncontrolled last state, a number or D numbers.
            Take the target's own scale: too small a reference is hard to leave.
        time_grid: ``num_steps -> times``; uniform by default.
        network: control; by default `networks.score_guided`.
        learn_generation_variance: whether the control also learns the generation
            kernel's variance, per state and coordinate. It switches on
            ``learn_variance`` of a given network.
        learn_destruction: whether mean and variance of the destruction kernel are
            learned, too, starting at the reference's. It switches on
            ``learn_variance`` of a given destruction network.
        destruction_network: its control, `networks.free` by default. Given alone, it
            learns what it returns: without ``learn_variance`` the mean.
        backbone: a network for both kernels to share (`networks.backbone`).
        generation_bounds: how far the generation kernel may leave the reference's.
        destruction_bounds: the same of the destruction kernel.
        condition_dim: size of the condition of a conditional energy.

    Raises:
        ValueError: see `Sampler`; when a given network cannot learn the variance
            that it is asked to learn.

    Example:
        >>> import diffsamp as ds
        >>> sampler = ds.samplers.pis(dim=2, num_steps=8, scale=4.0)
        >>> sampler.process.coefficients(8).destruction_std[0]  # into the point
        np.float64(0.0)
    """
    return Sampler(
        dim=dim,
        num_steps=num_steps,
        process=PinnedBrownian(time_grid or schedules.power_grid()),
        generation=with_variance(
            network or networks.score_guided(),
            learn_generation_variance,
            "learn_generation_variance",
        ),
        destruction=destruction_control(destruction_network, learn_destruction),
        loc=loc,
        scale=scale,
        condition_dim=condition_dim,
        backbone=backbone,
        generation_bounds=generation_bounds,
        destruction_bounds=destruction_bounds,
    )
