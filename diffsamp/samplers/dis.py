"""DIS: time-reversed diffusion sampler. Berner et al. 2024, arXiv 2211.01364.

Destruction is the variance-preserving noising process, which is fixed; generation is
its time reversal with the score replaced by a control,

    q(x_k | x_{k+1}) = N(sqrt(1 - a_k) x_{k+1}, a_k s^2)
    p(x_{k+1} | x_k) = N(sqrt(1 - a_k) x_k + a_k^(1/2) s K^(-1/2) u(x_k, t_k), a_k s^2)

relative to loc, with ``u = F(x, t) + gain a(t) (s_t(x) - s_0(x))``, s_t the score
interpolated between reference and target. Since q is fixed the optimum is unique: the
score of the noised target. The papers integrate with Euler steps and a continuous-time
weight, which is no exact bound; here the kernels are exact and so is the weight. The
default noise schedule is geometric, which is optimal for narrow modes
(`schedules.geometric`); ``schedules.linear(10.0, 0.1)`` is the papers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffsamp import networks, schedules
from diffsamp.networks import Backbone, Control
from diffsamp.processes import Process, VariancePreserving
from diffsamp.sampler import Bounds, Sampler
from diffsamp.samplers.common import (
    DEFAULT_BOUNDS,
    destruction_control,
    with_variance,
)


def dis(
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
    process: Callable[..., Process] = VariancePreserving,
) -> Sampler:
    """Time-reversed diffusion sampler.

    Args:
        dim: dimension D.
        num_steps: steps K.
        loc: mean of the reference, a number or D numbers.
        scale: standard deviation of the reference, a number or D numbers. Take the
            target's own (`standardise` measures it): a wrong one is the most common
            failure.
        schedule: noise schedule; by default `schedules.geometric`, fine enough for
            structure a tenth as wide as the reference.
        time_grid: ``num_steps -> times``; uniform by default.
        network: control; by default `networks.annealed_score_guided`.
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
        process: ``(schedule, time_grid) -> Process``: the steps are exponential, or
            with `processes.EulerVariancePreserving` those of the papers.

    Raises:
        ValueError: see `Sampler`; when a given network cannot learn the variance
            that it is asked to learn.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.dis(dim=2, num_steps=8, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> trajectory = sampler(params, jax.random.key(1), target.energy)
        >>> trajectory.xs.shape, trajectory.log_weight.shape
        ((9, 2), ())
    """
    return Sampler(
        dim=dim,
        num_steps=num_steps,
        process=process(
            schedule or schedules.geometric(), time_grid or schedules.power_grid()
        ),
        generation=with_variance(
            network or networks.annealed_score_guided(),
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
