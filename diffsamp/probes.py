"""Independent probes: points that show where the target has mass.

Draws of a collapsed sampler look perfect to themselves. A probe is found without the
sampler's help, traced back through its destruction kernel and compared in weight
(`diagnostics.missing_mass`); without one no verdict says ``trust``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import mcmc
from diffsamp.energies import as_energy, as_key
from diffsamp.types import Array, ArrayLike, Energy, Key, Target, as_count


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Points found without the sampler's help.

    Attributes:
        x: points, [M, D].
        weights: their importance weights as target draws, [M], or None for equal ones.
        name: where they come from.
        target_draws: whether they are draws from the target itself, so that their mean
            log-weight is an upper bound on log Z.
        num_energy_evaluations: energies evaluated alone to find them.
        num_gradient_evaluations: energies evaluated with gradient.
        log_z: log Z as SMC estimates it on the way, or None.
    """

    x: Array
    weights: Array | None = None
    name: str = "given draws"
    target_draws: bool = False
    num_energy_evaluations: int = 0
    num_gradient_evaluations: int = 0
    log_z: float | None = None

    def __post_init__(self):
        shape = np.shape(self.x)
        if len(shape) != 2 or shape[0] == 0:
            raise ValueError(f"a probe needs points of shape [M, D], got {list(shape)}")
        if not np.all(np.isfinite(np.asarray(self.x))):
            raise ValueError("a probe's points must be finite; remove the others")


def given(draws: ArrayLike) -> Probe:
    """Reference draws that the user has, for instance from a long trusted run.

    Args:
        draws: points from the target, [M, D].

    Raises:
        ValueError: when they are not finite points [M, D].

    Example:
        >>> import jax, diffsamp as ds
        >>> draws = ds.targets.gmm9().sample(jax.random.key(0), 256)
        >>> ds.probes.given(draws).name
        'given draws'
    """
    return Probe(x=jnp.asarray(draws), target_draws=True)


def smc(
    key: Key,
    energy: Energy,
    dim: int,
    *,
    loc: float | tuple[float, ...] | Array = 0.0,
    scale: float | tuple[float, ...] | Array = 1.0,
    num_particles: int = 1024,
    num_mcmc_steps: int = 10,
) -> Probe:
    """Tempered SMC (BlackJAX) from a Gaussian.

    Args:
        key: random key; consumed.
        energy: maps [D] to [].
        dim: dimension D.
        loc: mean of the Gaussian, a number or [D].
        scale: its standard deviation, a number or [D]; better too wide than too narrow.
        num_particles: M.
        num_mcmc_steps: HMC moves per temperature.

    Raises:
        ValueError: see `mcmc.smc_from_gaussian`; also when SMC did not reach the
            target.
    """
    result = mcmc.smc_from_gaussian(
        as_key(key),
        as_energy(energy),
        dim,
        loc=jnp.asarray(loc),
        scale=jnp.asarray(scale),
        num_particles=num_particles,
        num_mcmc_steps=num_mcmc_steps,
    )
    return _from_smc(result, "tempered SMC from the reference")


def smc_from_prior(
    key: Key, target: Target, *, num_particles: int = 1024, num_mcmc_steps: int = 10
) -> Probe:
    """Tempered SMC (BlackJAX) from the target's prior.

    Args:
        key: random key; consumed.
        target: a target with ``sample_prior``, ``log_prior`` and ``log_likelihood``.
        num_particles: M.
        num_mcmc_steps: HMC moves per temperature.

    Raises:
        ValueError: when the target has no prior, or SMC did not reach it.
    """
    result = mcmc.smc_from_prior(
        as_key(key),
        target,
        num_particles=num_particles,
        num_mcmc_steps=num_mcmc_steps,
    )
    return _from_smc(result, "tempered SMC from the prior")


def prior(key: Key, target: Target, *, num_draws: int = 10_000) -> Probe:
    """Draws from the target's prior, weighted by their likelihood.

    Cheap, and enough where the posterior is not much narrower than the prior; otherwise
    their effective number is too small for any verdict of ``trust``.

    Args:
        key: random key; consumed.
        target: a target with ``sample_prior`` and ``log_likelihood``.
        num_draws: M.

    Raises:
        ValueError: when the target has no prior, num_draws is below 1, or no draw has a
            positive likelihood.

    Example:
        >>> import jax, diffsamp as ds
        >>> from diffsamp import posteriors
        >>> target = posteriors.two_sinusoids().target()
        >>> ds.probes.prior(jax.random.key(0), target, num_draws=64).x.shape
        (64, 6)
    """
    if target.sample_prior is None or target.log_likelihood is None:
        raise ValueError(
            f"target {target.name!r} has no prior to draw from (sample_prior and "
            "log_likelihood); use probes.smc or probes.multistart"
        )
    num_draws = as_count("num_draws", num_draws)
    x = target.sample_prior(as_key(key), num_draws)
    log_weight = jax.jit(jax.vmap(target.log_likelihood))(x)
    log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
    if not bool(jnp.max(log_weight) > -jnp.inf):
        raise ValueError(
            f"none of {num_draws} prior draws has a positive likelihood; raise "
            "num_draws, or use probes.smc_from_prior"
        )
    return Probe(
        x=x,
        weights=jax.nn.softmax(log_weight),
        name="prior draws",
        num_energy_evaluations=num_draws,
    )


def multistart(
    key: Key,
    energy: Energy,
    dim: int,
    *,
    loc: float | tuple[float, ...] | Array = 0.0,
    scale: float | tuple[float, ...] | Array = 1.0,
    num_starts: int = 256,
) -> Probe:
    """Optimisation from scattered starts, then short HMC.

    The points mark modes, not their mass: the missing mass they report is a share of
    starts. A mode of no weight may raise a false alarm, and one that hardly any start
    leads to may be overlooked.

    Args:
        key: random key; consumed.
        energy: maps [D] to [].
        dim: dimension D.
        loc: centre of the starts, a number or [D].
        scale: their standard deviation, a number or [D].
        num_starts: M.
    """
    start, run = jax.random.split(as_key(key))
    noise = jax.random.normal(start, (num_starts, dim))
    row = (1, dim)
    loc, scale = (jnp.broadcast_to(jnp.asarray(v), (dim,)) for v in (loc, scale))
    points = loc.reshape(row).astype(noise.dtype) + scale.reshape(row) * noise
    energy, num_steps = as_energy(energy), 300
    optima = mcmc.multistart(
        run, energy, points, num_optimisation_steps=num_steps, num_hmc_steps=0
    )
    draws, info = mcmc.run_hmc(run, energy, optima, num_warmup=33, num_draws=17)
    return Probe(
        x=draws[:, -1],
        name="multi-start optimisation and HMC",
        num_gradient_evaluations=num_starts * num_steps
        + int(info.num_gradient_evaluations),
    )


class SMCFailed(ValueError):
    """Tempered SMC did not reach the target.

    Attributes:
        num_energy_evaluations: energies that it evaluated alone.
        num_gradient_evaluations: energies evaluated with gradient.
    """

    def __init__(self, message: str, result: mcmc.SMCResult):
        super().__init__(message)
        self.num_energy_evaluations = int(result.num_energy_evaluations)
        self.num_gradient_evaluations = int(result.num_gradient_evaluations)


def _from_smc(result: mcmc.SMCResult, name: str) -> Probe:
    if float(result.log_z) == -np.inf:
        raise SMCFailed(
            f"the energy is not finite at any of {len(result.particles)} particles of "
            f"{name}: check its support and sign (energy = -log density), and where "
            "the reference stands",
            result,
        )
    if not bool(result.reached_target):
        raise SMCFailed(
            f"{name} stopped at inverse temperature {float(result.beta):.3g}; raise "
            "num_particles or num_mcmc_steps, or give a wider reference",
            result,
        )
    num_particles = len(result.particles)
    distinct = int(mcmc.num_distinct(result))
    if distinct < mcmc.MIN_DISTINCT * num_particles:
        raise SMCFailed(
            f"{name} left only {distinct} distinct points of {num_particles}: its "
            "moves were rejected; raise num_mcmc_steps, or give a loc and a scale "
            "nearer to the target's (ds.standardise finds them)",
            result,
        )
    log_weight = jnp.asarray(result.log_weight)
    return Probe(
        x=result.particles,
        weights=jax.nn.softmax(log_weight),
        name=name,
        num_energy_evaluations=int(result.num_energy_evaluations),
        num_gradient_evaluations=int(result.num_gradient_evaluations),
        log_z=float(result.log_z),
    )
