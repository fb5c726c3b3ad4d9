"""GBS: general bridge sampler. Richter and Berner 2024, arXiv 2307.01198.

Both drifts are learned over a Brownian reference of scale s and diffusion g, with
dt = 1/K and Gaussian start N(loc, s^2):

    p(x_{k+1} | x_k) = N(x_k + s g dt u(x_k, t_k), s^2 g^2 dt)
    q(x_k | x_{k+1}) = N(x_{k+1} + s g dt v(x_{k+1}, t_{k+1}), s^2 g^2 dt)

``u = F + (g/2) a(t) s_t(x)`` with the annealed score s_t, ``v = F' + (g/2) a'(t)(1 - t)
s_0(x)``: before training generation is annealed Langevin dynamics. The optimum is not
unique. In this discrete form no divergence of v is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffsamp import networks, schedules
from diffsamp.networks import Backbone, Control
from diffsamp.processes import Brownian
from diffsamp.sampler import Bounds, Sampler
from diffsamp.samplers.common import (
    DEFAULT_BOUNDS,
    destruction_control,
    with_variance,
)


def gbs(
    dim: int,
    num_steps: int = 100,
    *,
    loc: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    diffusion: float = 1.5,
    time_grid: schedules.TimeGrid | None = None,
    network: Control | None = None,
    destruction_network: Control | None = None,
    learn_generation_variance: bool = False,
    learn_destruction: bool = False,
    backbone: Backbone | None = None,
    generation_bounds: Bounds = DEFAULT_BOUNDS,
    destruction_bounds: Bounds = DEFAULT_BOUNDS,
    condition_dim: int = 0,
) -> Sampler:
    """General bridge sampler: generation and destruction drift both learned.

    Args:
        dim: dimension D.
        num_steps: steps K.
        loc: mean of the reference, a number or D numbers.
        scale: standard deviation of the reference, a number or D numbers.
        diffusion: noise over the whole path in units of scale.
        time_grid: ``num_steps -> times``; uniform by default.
        network: generation control; `networks.annealed_score_guided` by default.
        destruction_network: `networks.reference_guided` by default.
        learn_generation_variance: whether the control also learns the generation
            kernel's variance, per state and coordinate. It switches on
            ``learn_variance`` of a given network.
        learn_destruction: whether the destruction control learns the variance, too; its
            mean always is learned. It switches on ``learn_variance`` of a given
            destruction network.
        backbone: a network for both kernels to share (`networks.backbone`).
        generation_bounds: how far the generation kernel may leave the reference's.
        destruction_bounds: the same of the destruction kernel.
        condition_dim: size of the condition of a conditional energy.

    Raises:
        ValueError: see `Sampler`; when diffusion is not positive, or a given network
            cannot learn the variance that it is asked to learn.

    Example:
        >>> import jax, diffsamp as ds
        >>> sampler = ds.samplers.gbs(dim=2, num_steps=8)
        >>> sorted(sampler.init(jax.random.key(0)))
        ['destruction', 'generation']
    """
    if not diffusion > 0:
        raise ValueError(f"diffusion must be positive, got {diffusion}")
    return Sampler(
        dim=dim,
        num_steps=num_steps,
        process=Brownian(float(diffusion), time_grid or schedules.power_grid()),
        generation=with_variance(
            network or networks.annealed_score_guided(offset=0.0),
            learn_generation_variance,
            "learn_generation_variance",
        ),
        destruction=destruction_control(
            destruction_network or networks.reference_guided(), learn_destruction
        ),
        loc=loc,
        scale=scale,
        condition_dim=condition_dim,
        backbone=backbone,
        generation_bounds=generation_bounds,
        destruction_bounds=destruction_bounds,
    )
