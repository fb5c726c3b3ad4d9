"""GMP: a sampler that starts from a Gaussian mixture. Blessing et al. 2025.

Paths start in the mixture, noised to the scale where modes begin to matter
(`priors.MixturePrior`, with the density), and go on as in `dis` from there,

    q(x_k | x_{k+1}) = N(sqrt(r_k) x_{k+1}, (1 - r_k) s^2)
    p(x_{k+1} | x_k) = N(m_k(x_k), s^2 v_k(x_k))

relative to loc, r_k the share of the signal and m_k, v_k the denoiser of the mixture,
corrected by a network (`networks.mixture_guided`, with the derivation). Before training
the weights are about those of importance sampling from the mixture; like all weights
they are exact for any mixture, of which a mode may be missing only in so far as one may
be missing from the draws.

The paper (arXiv 2503.00524) learns the mixture together with controls of a sampler with
Langevin guidance. Here it is fitted before, by `mixtures.fit_mixture` to points of
tempered SMC, for one, put in by `mixtures.with_mixture` and kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffsamp import networks, schedules
from diffsamp.networks import Control, MixtureGuidedModule
from diffsamp.priors import MixturePrior
from diffsamp.processes import VariancePreserving
from diffsamp.sampler import Bounds, Sampler
from diffsamp.samplers.common import (
    DEFAULT_BOUNDS,
    FEW_STEPS,
    destruction_control,
    with_variance,
)
from diffsamp.types import as_count


def gmp(
    dim: int,
    num_components: int,
    num_steps: int = 16,
    *,
    loc: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    schedule: schedules.NoiseSchedule | None = None,
    time_grid: schedules.TimeGrid | None = None,
    network: Control | None = None,
    learn_generation_variance: bool = True,
    learn_destruction: bool = False,
    destruction_network: Control | None = None,
    generation_bounds: Bounds = FEW_STEPS,
    destruction_bounds: Bounds = DEFAULT_BOUNDS,
    condition_dim: int = 0,
) -> Sampler:
    """Sampler that starts from a mixture of normal distributions.

    Args:
        dim: dimension D.
        num_components: components M of the mixture.
        num_steps: steps K.
        loc: origin of unit coordinates, in which the mixture is given, a number or D
            numbers.
        scale: their unit, a number or D numbers.
        schedule: noise schedule, which at time 0 has the noise that the mixture is
            given; by default ``schedules.geometric(0.01, largest_scale=0.1)``.
        time_grid: ``num_steps -> times``; uniform by default.
        network: control; by default `networks.mixture_guided`, for this schedule.
        learn_generation_variance: whether the control also gives the generation
            kernel's variance, per state and coordinate, starting at the mixture's. It
            switches on ``learn_variance`` of a given network.
        learn_destruction: whether mean and variance of the destruction kernel are
            learned, too.
        destruction_network: its control, `networks.free` by default.
        generation_bounds: how far the generation kernel may leave the reference's; the
            mixture's own leaves it, too.
        destruction_bounds: the same of the destruction kernel.
        condition_dim: size of the condition of a conditional energy. The mixture is
            the same for all conditions.

    Raises:
        ValueError: see `Sampler`; when num_components is below 1, a given network
            cannot learn the variance that it is asked to learn, or one from
            `networks.mixture_guided` has another number of components or schedule.

    Example:
        >>> import jax, diffsamp as ds
        >>> from diffsamp.mixtures import fit_mixture, with_mixture
        >>> target = ds.targets.gmm9()
        >>> points = target.sample(jax.random.key(0), 1_000)
        >>> mixture, gain = fit_mixture(points / 4.0)
        >>> sampler = ds.samplers.gmp(2, len(mixture.means), num_steps=4, scale=4.0)
        >>> params = with_mixture(sampler.init(jax.random.key(1)), mixture)
        >>> draws = ds.draw(jax.random.key(2), sampler, params, target.energy, 1_000)
        >>> draws.diagnostics.ess_fraction > 0.5  # without any training
        True
    """
    num_components = as_count("num_components", num_components)
    schedule = schedule or schedules.geometric(0.01, largest_scale=0.1)
    module = getattr(network, "module", None)
    if isinstance(module, MixtureGuidedModule):
        given = module.num_components, module.schedule
        if given != (num_components, schedule):
            raise ValueError(
                "network must be for the sampler's mixture and noise schedule, "
                f"({num_components}, {schedule}), got one for {given}"
            )
    return Sampler(
        dim=dim,
        num_steps=num_steps,
        process=VariancePreserving(schedule, time_grid or schedules.power_grid()),
        generation=with_variance(
            network or networks.mixture_guided(num_components, schedule),
            learn_generation_variance,
            "learn_generation_variance",
        ),
        destruction=destruction_control(destruction_network, learn_destruction),
        loc=loc,
        scale=scale,
        condition_dim=condition_dim,
        generation_bounds=generation_bounds,
        destruction_bounds=destruction_bounds,
        prior=MixturePrior(num_components, schedule),
    )
