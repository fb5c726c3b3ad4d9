"""SCDS: a sampler whose control knows the step. Jutras-Dubé et al., arXiv 2502.07579.

The process is that of DIS: a fixed variance-preserving destruction and a generation
that reverses it with a control u(x, t, d), which here also sees the length d of the
step. One set of parameters so serves every number of steps:

    p(x' | x) = N(sqrt(1 - a) x + a^(1/2) s K^(-1/2) u(x, t, d), a s^2),  d = t' - t,

with a = a(t, t') from the noise schedule. An objective on paths of K = 128 steps makes
u(., ., 1/128) what the score of the noised target asks for;
``objectives.self_consistency`` teaches one long step to go where two of half the length
go along the probability flow (`Sampler.flow_step`), and so, doubling by doubling, a
single step to do the work of all. The kernels, and therefore the weights, are valid at
every number of steps; with few they are only as good as Gaussian kernels of the
process' variance can be.

With ``learn_generation_variance`` the noise becomes a network's choice, and the mean
follows it: with f the step of the flow, M the mean above and r the share of the
process' variance that the kernel keeps, per state, coordinate and step length,

    p(x' | x) = N(f + min(r, 1) (M - f) + g a^(1/2) s K^(-1/2) e,  r a s^2),
    r = exp(g c tanh((v - 4) / c)),    g = ((F/K - 1) / (F - 1))^(1/2).

At r = 1 this is the kernel above; as r falls the paths tend to those of the flow, whose
law of x' is right where that of M without its noise would be far too narrow (composed
over many steps it shrinks a unit normal to 0.08). The residual e is whatever is left to
correct, and comes with v from a network of its own (`networks.tied`): f is
self-consistency's alone, and no objective on paths of fewer than F steps moves it.
Training starts near the flow, at v = 0; `networks.tied` says why, and what starts
elsewhere (the 4 is its ``log_variance``).
``learn_destruction`` adds the way back, which for small r has to learn the inverse of
the flow's step.

The factor g multiplies e and all of the learned destruction, too. It is 0 at F steps,
the number with which the sampler was built (`Sampler.finest`): there the kernels are
those of DIS with u alone, whose optimum is unique. Were destruction free there as well,
many controls would do, most of which are nobody's flow, and nothing for the few steps
to be consistent with.

Unlike the paper's Euler step, which at K = 1 turns x into 6 x + 1.6 u and is there for
comparison, the step is an exponential integrator: the control never has to undo the
process. `networks.data_prediction` is a third parametrisation, by the end of the path.
Neither the reference nor the states are truncated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from diffsamp import networks, schedules
from diffsamp.networks import Control
from diffsamp.processes import Process, VariancePreserving
from diffsamp.sampler import Bounds, Sampler
from diffsamp.samplers.common import FEW_STEPS, destruction_control, with_residual
from diffsamp.samplers.dis import dis


def scds(
    dim: int,
    num_steps: int = 128,
    *,
    loc: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    schedule: schedules.NoiseSchedule | None = None,
    time_grid: schedules.TimeGrid | None = None,
    network: Control | None = None,
    learn_generation_variance: bool = False,
    learn_destruction: bool = False,
    destruction_network: Control | None = None,
    generation_bounds: Bounds = FEW_STEPS,
    destruction_bounds: Bounds = FEW_STEPS,
    condition_dim: int = 0,
    finest: int | None = None,
    process: Callable[..., Process] = VariancePreserving,
) -> Sampler:
    """Self-consistent diffusion sampler: parameters shared between step counts.

    Args:
        dim: dimension D.
        num_steps: steps K of training; even for `self_consistency`, and a power of two
            if a single step is to be trained.
        loc: mean of the reference, a number or D numbers.
        scale: standard deviation of the reference, a number or D numbers.
        schedule: noise schedule; by default `schedules.geometric`.
        time_grid: ``num_steps -> times``; uniform by default. A grid of half the steps
            must be every other time of this one.
        network: control; by default `networks.annealed_score_guided` with
            ``step_conditioned=True``.
        learn_generation_variance: whether the generation kernel's variance, and how
            far its mean is from the flow, is learned, per state, coordinate and step
            length, by a `networks.free` of its own. For another of its kind, or size,
            give ``network`` as `networks.tied`.
        learn_destruction: whether mean and variance of the destruction kernel are
            learned, too, starting at the reference's. The probability flow stays that
            of the reference's destruction. It switches on ``learn_variance`` of a given
            destruction network.
        destruction_network: its control; by default `networks.free` with
            ``step_conditioned=True``. Given alone, it learns what it returns: without
            ``learn_variance`` the mean.
        generation_bounds: how far the generation kernel may leave the reference's.
        destruction_bounds: the same of the destruction kernel.
        finest: number of steps F of the training grid, where that is not ``num_steps``.
            Every step count has to divide it. With F = 1 nothing but the drift is
            learned, and no kernel may be.
        process: ``(schedule, time_grid) -> Process``: the steps are exponential, or
            with `processes.EulerVariancePreserving` those of the paper.
        condition_dim: size of the condition of a conditional energy.

    Raises:
        ValueError: see `Sampler`; when a kernel is to be learned with F = 1, or a given
            destruction network cannot learn the variance that it is asked to learn.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.scds(dim=2, num_steps=8, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> fast = sampler.with_num_steps(1)
        >>> fast(params, jax.random.key(1), target.energy).xs.shape
        (2, 2)
    """
    network = network or networks.annealed_score_guided(step_conditioned=True)
    sampler = dis(
        dim,
        num_steps,
        loc=loc,
        scale=scale,
        schedule=schedule,
        time_grid=time_grid,
        destruction_network=destruction_control(
            destruction_network, learn_destruction, step_conditioned=True
        ),
        generation_bounds=generation_bounds,
        destruction_bounds=destruction_bounds,
        condition_dim=condition_dim,
        process=process,
    )
    finest = num_steps if finest is None else finest
    if finest == 1 and learn_generation_variance:
        raise ValueError(
            "with finest=1 there is only the training grid, on which the generation "
            "variance is not learned; give the number of steps of a finer one, "
            "finest=128 for one, or leave out learn_generation_variance"
        )
    network = with_residual(network, learn_generation_variance)
    return dataclasses.replace(sampler, generation=network, finest=finest)
