"""CDDS: a consistency function distilled from a sampler. The SCDS paper, 2502.07579.

The network f(x, t) is to say where the probability flow through x at time t ends. One
step draws x_0 from the reference and returns f(x_0, 0). More steps alternate f with
fresh noise (Song et al. 2023, arXiv 2303.01469):

    p(x' | x) = N(alpha' f(x, t), (1 - alpha'^2 + e^2) s^2),    alpha^2 = alpha_bar,
    q(x | x') = N(alpha / alpha' x', (1 - alpha^2 / alpha'^2) s^2),

relative to loc. The papers' last step has no noise, and then draws have no density and
no weight; here it keeps ``smallest_std`` e, by default a hundredth of the reference's
scale, and so there is a weight at every number of steps, 1 included. It is a good one
only if the kernel q knows which x led to x': learn it (``learn_destruction``), and the
noise with it (``learn_generation_variance``), which is then

    p(x' | x) = N(alpha' f(x, t) + w K^(-1/2) r, exp(c tanh(v / c)) w^2),

with w^2 = (1 - alpha'^2 + e^2) s^2, and the residual r and v from a network of their
own (`networks.tied`).

Train f by `objectives.consistency_distillation` or `objectives.continuous_consistency`,
in a sum with any objective on paths for the rest; a tied f is left by that as it is,
and draws that need no weight can be had from it alone (`Sampler.flow_alone`).
The student has no energy gradients in its network.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffsamp import networks, schedules
from diffsamp.networks import Control
from diffsamp.processes import Renoising
from diffsamp.sampler import Bounds, Sampler
from diffsamp.samplers.common import FEW_STEPS, destruction_control, with_residual


def cdds(
    dim: int,
    num_steps: int = 1,
    *,
    loc: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    schedule: schedules.NoiseSchedule | None = None,
    time_grid: schedules.TimeGrid | None = None,
    smallest_std: float = 0.01,
    network: Control | None = None,
    learn_generation_variance: bool = False,
    learn_destruction: bool = False,
    destruction_network: Control | None = None,
    generation_bounds: Bounds = FEW_STEPS,
    destruction_bounds: Bounds = FEW_STEPS,
    condition_dim: int = 0,
) -> Sampler:
    """Consistency-distilled diffusion sampler: one network call per step.

    Args:
        dim: dimension D.
        num_steps: steps K of drawing.
        loc: mean of the reference, a number or D numbers; the teacher's.
        scale: standard deviation of the reference; the teacher's.
        schedule: noise schedule, the teacher's; by default `schedules.geometric`.
        time_grid: ``num_steps -> times``; uniform by default.
        smallest_std: noise of the last step, in units of the reference's scale.
        network: by default `networks.consistency`.
        learn_generation_variance: whether how much noise each step has, and how far its
            mean is from where f says, is learned by a `networks.free` of its own. For
            another of its kind, or size, give ``network`` as `networks.tied`.
        learn_destruction: whether mean and variance of the destruction kernel are
            learned. It switches on ``learn_variance`` of a given destruction network.
        destruction_network: its control; by default `networks.free` with
            ``step_conditioned=True``. Given alone, it learns what it returns: without
            ``learn_variance`` the mean.
        generation_bounds: how far the generation kernel may leave the reference's.
        destruction_bounds: the same of the destruction kernel.
        condition_dim: size of the condition of a conditional energy.

    Raises:
        ValueError: see `Sampler`; when smallest_std is not in (0, 1), or a given
            destruction network cannot learn the variance that it is asked to learn.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> student = ds.samplers.cdds(dim=2, scale=4.0)
        >>> params = student.init(jax.random.key(0))
        >>> student(params, jax.random.key(1), target.energy).xs.shape
        (2, 2)
    """
    return Sampler(
        dim=dim,
        num_steps=num_steps,
        process=Renoising(
            schedule or schedules.geometric(),
            time_grid or schedules.power_grid(),
            smallest_std,
        ),
        generation=with_residual(
            network or networks.consistency(), learn_generation_variance
        ),
        destruction=destruction_control(
            destruction_network, learn_destruction, step_conditioned=True
        ),
        loc=loc,
        scale=scale,
        condition_dim=condition_dim,
        generation_bounds=generation_bounds,
        destruction_bounds=destruction_bounds,
    )
