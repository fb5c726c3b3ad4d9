"""DDS: denoising diffusion sampler. Vargas, Grathwohl, Doucet 2023, arXiv 2302.13834.

Exponential integrator of the variance-preserving process: with b_k^2 in (0, 1),

    q(x_k | x_{k+1}) = N(sqrt(1 - b_k^2) x_{k+1}, b_k^2 s^2)
    p(x_{k+1} | x_k) = N(sqrt(1 - b_k^2) x_k + 2 (1 - sqrt(1 - b_k^2)) f(x_k, t_k),
                         b_k^2 s^2)

(the paper's factor of f is b_k^2, equal to first order; this one is the exact solution
for a control frozen over the step). b_k^2 follows cos^4, small near the target, with
``prod(1 - b_k^2) = exp(-12)``: published defaults forget too little. Control: MLP plus
a learned multiple of the target score. States and noise are not clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffsamp import networks, schedules
from diffsamp.networks import Backbone, Control
from diffsamp.processes import VariancePreserving
from diffsamp.sampler import Bounds, Sampler
from diffsamp.samplers.common import (
    DEFAULT_BOUNDS,
    destruction_control,
    with_variance,
)


def dds(
    dim: int,
    num_steps: int = 100,
    *,
    loc: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    schedule: schedules.NoiseSchedule | None = None,
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
    """Denoising diffusion sampler with the cos^4 noise schedule.

    Args:
        dim: dimension D.
        num_steps: steps K.
        loc: mean of the reference, a number or D numbers.
        scale: standard deviation of the reference, a number or D numbers.
        schedule: noise schedule; `schedules.cosine_power` by default.
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
        >>> import numpy as np, diffsamp as ds
        >>> sampler = ds.samplers.dds(dim=2, num_steps=50)
        >>> b2 = sampler.process.coefficients(50).destruction_std ** 2
        >>> bool(np.prod(1 - b2) <= 1e-4)
        True
    """
    return Sampler(
        dim=dim,
        num_steps=num_steps,
        process=VariancePreserving(
            schedule or schedules.cosine_power(), time_grid or schedules.power_grid()
        ),
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
