"""Where the reference should stand and how wide it should be, from a cheap pilot.

A reference much narrower or wider than the target is the most common failure of
diffusion samplers. A pilot's draws need not be right, only of the right size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.optimize import minimize

from diffsamp import mcmc
from diffsamp.energies import as_energy, as_key, check_energy
from diffsamp.types import Array, Energy, Key, Target, as_count

Pilot = Callable[[Key, Target], tuple[Array, int]]


class Reference(NamedTuple):
    """Location and scale of a reference, ready for ``dis(dim, **reference.arguments)``.

    Attributes:
        loc: D numbers.
        scale: D positive numbers.
        num_gradient_evaluations: what the pilot cost.
    """

    loc: tuple[float, ...]
    scale: tuple[float, ...]
    num_gradient_evaluations: int = 0

    @property
    def arguments(self) -> dict[str, tuple[float, ...]]:
        """``loc`` and ``scale`` as keyword arguments of a sampler's factory."""
        return {"loc": self.loc, "scale": self.scale}


def standardise(key: Key, target: Target, pilot: Pilot | None = None) -> Reference:
    """Measures loc and scale for a sampler's reference by a pilot.

    Args:
        key: random key; consumed.
        target: the target.
        pilot: ``(key, target) -> (draws [N, D], gradient evaluations)``. By default
            `short_mcmc`. `prior_draws` is free of charge, but a prior is often much
            wider than the posterior.

    Raises:
        ValueError: when the pilot's draws are not finite or have no spread.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.sonar()
        >>> pilot = ds.prior_draws()
        >>> reference = ds.standardise(jax.random.key(0), target, pilot)
        >>> sampler = ds.samplers.dis(target.dim, **reference.arguments)
        >>> len(sampler.scale) == target.dim
        True
    """
    draws, cost = (pilot or short_mcmc())(as_key(key), target)
    return reference_from(draws)._replace(num_gradient_evaluations=int(cost))


def reference_from(draws: Array) -> Reference:
    """Mean and standard deviation of given draws, coordinate by coordinate.

    Args:
        draws: points, [N, D].

    Raises:
        ValueError: when draws is not [N, D] with N > 1, is not finite, or has a
            coordinate without spread.

    Example:
        >>> import numpy as np, diffsamp as ds
        >>> ds.reference_from(np.array([[0.0], [2.0]])).scale
        (1.0,)
    """
    points = np.asarray(draws, np.float64)
    if points.ndim != 2 or points.shape[0] < 2:
        raise ValueError(
            f"draws must have shape [N, D] with N > 1, got {list(points.shape)}"
        )
    if not np.all(np.isfinite(points)):
        raise ValueError("draws must be finite; remove NaN and infinite rows")
    scale = points.std(axis=0)
    if not np.all(scale > 0):
        raise ValueError(
            f"draws have no spread in coordinates {np.flatnonzero(scale == 0).tolist()}"
        )
    return Reference(tuple(points.mean(axis=0).tolist()), tuple(scale.tolist()))


def prior_draws(num_draws: int = 1_000) -> Pilot:
    """Pilot: draws from the target's prior.

    Args:
        num_draws: N.

    Raises:
        ValueError: when num_draws is no integer of at least 2.
    """
    num_draws = as_count("num_draws", num_draws, least=2)

    def pilot(key, target):
        if target.sample_prior is None:
            raise ValueError(
                f"target {target.name!r} has no prior to draw from (sample_prior); use "
                "short_mcmc()"
            )
        return target.sample_prior(key, num_draws), 0

    return pilot


def laplace(num_starts: int = 8, num_draws: int = 1_000) -> Pilot:
    """Pilot: the normal distribution that fits the energy at its lowest minimum.

    BFGS from several starts, then the Hessian there. For one mode of about elliptic
    shape; far from that `short_mcmc` is the better judge of size.

    Args:
        num_starts: starts, as the chains of `short_mcmc` start.
        num_draws: draws N of the fitted distribution.

    Raises:
        ValueError: when num_starts is no integer of at least 1, or num_draws of 2.

    Example:
        >>> import jax, jax.numpy as jnp, diffsamp as ds
        >>> def energy(x):
        ...     return 50.0 * (x[0] - 3.0) ** 2
        >>> target = ds.Target(energy=energy, dim=1)
        >>> reference = ds.standardise(jax.random.key(0), target, ds.laplace())
        >>> [round(float(a), 1) for a in (*reference.loc, *reference.scale)]
        [3.0, 0.1]
    """
    num_starts = as_count("num_starts", num_starts)
    num_draws = as_count("num_draws", num_draws, least=2)

    def pilot(key, target):
        start, draw = jax.random.split(key)
        energy = as_energy(target.energy)
        points = _starts(start, target, num_starts)
        check_energy(energy, target.dim, points.dtype, gradient=True)
        best, precision, evaluations = _laplace(energy, points)
        precision = np.asarray(precision, np.float64)
        if not (np.isfinite(float(energy(best))) and np.all(np.isfinite(precision))):
            raise ValueError(
                f"none of {num_starts} minima has a finite energy and Hessian: check "
                "the energy's support and sign (energy = -log density), and "
                "target.scale, by which the starts are spread"
            )
        values, vectors = np.linalg.eigh(precision)
        # Differences of 32-bit energies resolve no curvature below this share.
        if not np.all(values > 1e-6 * values.max()):
            raise ValueError(
                "the Hessian at the lowest of "
                f"{num_starts} minima has eigenvalues from {values.min():.3g} to "
                f"{values.max():.3g}, so no normal distribution fits there; use "
                "short_mcmc()"
            )
        noise = jax.random.normal(draw, (num_draws, target.dim), best.dtype)
        factor = jnp.asarray(vectors / np.sqrt(values), best.dtype)
        return best[None] + noise @ factor.T, int(evaluations) + target.dim

    return pilot


def short_mcmc(
    num_chains: int = 32, num_warmup: int = 100, num_draws: int = 50
) -> Pilot:
    """Pilot: many short NUTS chains (BlackJAX) from scattered starts.

    Args:
        num_chains: chains, started at prior draws, or else at normal draws of standard
            deviation ``2 * target.scale``.
        num_warmup: adaptation steps.
        num_draws: draws kept per chain.

    Raises:
        ValueError: when a number is no integer or too small.
    """
    num_chains = as_count("num_chains", num_chains)
    num_warmup = as_count("num_warmup", num_warmup, least=0)
    num_draws = as_count("num_draws", num_draws)

    def pilot(key, target):
        start, run = jax.random.split(key)
        points = _starts(start, target, num_chains)
        draws, info = mcmc.run_hmc(
            run,
            as_energy(target.energy),
            points,
            num_warmup=num_warmup,
            num_draws=num_draws,
        )
        draws = jnp.reshape(draws, (-1, target.dim))
        usable = np.all(np.isfinite(np.asarray(draws)), axis=1)
        if usable.sum() < 2:
            raise ValueError(
                f"none of the pilot's {num_chains} chains has finite draws: the energy "
                "or its gradient is not finite where they start (draws of the prior, "
                "or normal ones of standard deviation 2 * target.scale)"
            )
        return draws[usable], int(info.num_gradient_evaluations)

    return pilot


def _starts(key: Key, target: Target, n: int) -> Array:
    if target.sample_prior is not None:
        return target.sample_prior(key, n)
    return 2 * target.scale * jax.random.normal(key, (n, target.dim))


@jax.jit
def _laplace(energy: Energy, points: Array):
    """The lowest minimum [D], the Hessian there [D, D], gradient evaluations []."""

    def descend(x):
        found = minimize(energy, x, method="BFGS", tol=1e-5)
        return found.x, found.fun, found.njev

    minima, values, evaluations = jax.vmap(descend)(points)
    best = minima[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]
    return best, jax.hessian(energy)(best), jnp.sum(evaluations)
