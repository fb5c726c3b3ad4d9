"""What is found about a posterior before a sampler is trained: where it is.

Tempered SMC from the prior, where the model has one to draw from: it reaches modes that
chains from single starts do not. Otherwise Gaussians fitted on the way downhill from
scattered starts (Pathfinder) and short NUTS chains from the better of these say where
and how wide the posterior is, and SMC tempers from a Gaussian of twice that size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp import mcmc, probes
from diffsamp.energies import as_energy, as_key
from diffsamp.numpyro.affine import affine_from
from diffsamp.numpyro.coordinates import Coordinates, in_coordinates, to_x, to_y
from diffsamp.numpyro.target import ModelTarget
from diffsamp.types import Array, ArrayLike, Key, Target

_NUM_CHAINS = 32
_SCATTER = (1.0, 3.0)  # standard deviations of starts, taken in turn
_ITERATIONS = 60
_TREE_DEPTH = 6  # of NUTS in coordinates fitted before; deeper, one chain delays all
_WIDER = 2.0  # standard deviations of a fitted Gaussian to temper from


class Pilot(NamedTuple):
    """Points of the posterior, in unconstrained coordinates.

    Attributes:
        x: points, [N, D].
        name: where they come from.
        num_energy_evaluations: energies evaluated alone.
        num_gradient_evaluations: energies evaluated with gradient.
        log_z: log Z as SMC estimates it on the way, without an error bar, or None.
    """

    x: Array
    name: str
    num_energy_evaluations: int
    num_gradient_evaluations: int
    log_z: float | None = None


def find(
    key: Key,
    target: Target,
    *,
    num_particles: int = 2048,
    coordinates: Coordinates | None = None,
) -> Pilot:
    """Points from tempered SMC.

    Args:
        key: random key; consumed.
        target: the posterior, with its prior if it has one.
        num_particles: N.
        coordinates: in which particles move on the way from the prior of a
            `ModelTarget`, such as those that `fitted_coordinates` finds by an earlier
            pilot: in a funnel's neck they do not get far in others. None for the
            target's own.

    Raises:
        ValueError: when SMC reaches the target neither from the prior nor from a
            Gaussian around short chains.

    Example:
        >>> import jax
        >>> from diffsamp import posteriors
        >>> from diffsamp.numpyro import pilots
        >>> target = posteriors.two_sinusoids().target()
        >>> pilots.find(jax.random.key(0), target, num_particles=64).x.shape
        (64, 6)
    """
    from_prior, from_chains = jax.random.split(as_key(key))
    tried, num_energies, num_gradients = "", 0, 0
    if target.sample_prior is not None:
        moving = target
        if coordinates is not None:
            if not isinstance(target, ModelTarget):
                raise TypeError(
                    "coordinates are for a ModelTarget, of `target_from_model`; got "
                    f"target of type {type(target).__name__}"
                )
            moving = target.standardised(coordinates)
        try:
            probe = probes.smc_from_prior(
                from_prior, moving, num_particles=num_particles
            )
        except ValueError as error:
            tried = f"{error}; and then: "
            if isinstance(error, probes.SMCFailed):  # which has cost something
                num_energies = error.num_energy_evaluations
                num_gradients = error.num_gradient_evaluations
        else:
            x = probe.x if coordinates is None else to_x(coordinates, probe.x)
            return _as_pilot(probe, x)
    chains, tempering = jax.random.split(from_chains)
    draws, *spent = _short_chains(chains, target)
    num_energies, num_gradients = num_energies + spent[0], num_gradients + spent[1]
    affine = affine_from(draws)
    try:
        probe = probes.smc(
            tempering,
            in_coordinates(target.energy, affine),
            target.dim,
            scale=_WIDER,
            num_particles=num_particles,
        )
    except ValueError as error:
        raise ValueError(
            f"no points of the posterior were found: {tried}{error}. More "
            "num_particles, or a prior that is nearer to the posterior, may help"
        ) from error
    found = _as_pilot(probe, to_x(affine, probe.x))
    return found._replace(
        num_energy_evaluations=found.num_energy_evaluations + num_energies,
        num_gradient_evaluations=found.num_gradient_evaluations + num_gradients,
    )


def moved(key: Key, target: Target, pilot: Pilot, num_times: int = 3) -> Pilot:
    """Points of a pilot, each followed by where HMC goes from it.

    Moves within the posterior cost little beside the tempering that led there, and a
    mixture or a sampler that is shown more points of a mode knows its shape better.
    How many points a mode has is not improved.

    Args:
        key: random key; consumed.
        target: the posterior.
        pilot: points of it, in its coordinates.
        num_times: how often to move on, each time by ten transitions.

    Returns:
        ``(1 + num_times) N`` points, those from one place next to each other, and the
        evaluations that they took beyond the pilot's.

    Example:
        >>> import jax
        >>> from diffsamp import posteriors
        >>> from diffsamp.numpyro import pilots
        >>> target = posteriors.two_sinusoids().target()
        >>> pilot = pilots.find(jax.random.key(0), target, num_particles=64)
        >>> pilots.moved(jax.random.key(1), target, pilot).x.shape
        (256, 6)
    """
    points, num_energies, num_gradients = [pilot.x], 0, 0
    for move_key in jax.random.split(as_key(key), num_times):
        there = Target(
            energy=target.energy,
            dim=target.dim,
            name=f"{target.name}, again",
            log_prior=Partial(_minus, as_energy(target.energy)),
            log_likelihood=_nothing,
            sample_prior=Partial(_given, points[-1]),
        )
        found = mcmc.smc_from_prior(move_key, there, num_particles=len(pilot.x))
        points.append(found.particles)
        num_energies += int(found.num_energy_evaluations)
        num_gradients += int(found.num_gradient_evaluations)
    x = jnp.stack(points, axis=1).reshape(-1, target.dim)
    return Pilot(x, pilot.name, num_energies, num_gradients, pilot.log_z)


def _minus(energy, x):
    return -energy(x)


def _nothing(x):
    return jnp.zeros((), x.dtype)


def _given(points, key, num_draws):
    del key, num_draws
    return points


def _short_chains(key: Key, target: Target):
    """Draws [N, D], and the energies and gradients they took.

    Pathfinder counts as if every path had gone on to the last iteration.
    """
    scatter, downhill, pick, run = jax.random.split(key, 4)
    centre = getattr(target, "initial", None)
    starts = jax.random.normal(scatter, (_NUM_CHAINS, target.dim))
    starts *= jnp.resize(jnp.asarray(_SCATTER), (_NUM_CHAINS, 1))
    starts = starts if centre is None else centre.astype(starts.dtype) + starts
    points, energies = mcmc.pathfinder(
        downhill, target.energy, starts, max_iterations=_ITERATIONS
    )
    points, energies = points.reshape(-1, target.dim), energies.ravel()
    finite = jnp.isfinite(energies) & jnp.all(jnp.isfinite(points), axis=1)
    if not bool(jnp.any(finite)):
        raise ValueError(
            "no point of finite density was found downhill from "
            f"{_NUM_CHAINS} starts; check the model, or pass another init_strategy"
        )
    energies = jnp.where(finite, energies, jnp.inf)
    # What lies much lower than the best has no mass, however many paths end there.
    near = energies <= jnp.min(energies) + 10 + 2 * target.dim
    logits = jnp.where(near, 0.0, -jnp.inf)
    chosen = points[jax.random.categorical(pick, logits, shape=(_NUM_CHAINS,))]
    affine = affine_from(chosen)
    draws, info = mcmc.run_hmc(
        run,
        in_coordinates(target.energy, affine),
        to_y(affine, chosen),
        num_warmup=150,
        num_draws=50,
        max_tree_depth=_TREE_DEPTH,
    )
    draws = to_x(affine, draws.reshape(-1, target.dim))
    draws = draws[jnp.all(jnp.isfinite(draws), axis=1)]
    per_path = _ITERATIONS * 50 + 20
    num_gradients = _NUM_CHAINS * _ITERATIONS + int(info.num_gradient_evaluations)
    return draws, _NUM_CHAINS * per_path, num_gradients


def smallest_scale(y: ArrayLike) -> float:
    """Width of the narrow places, in their narrowest direction.

    The smallest standard deviation among the nearest neighbours of a point, in units of
    what it is for a unit normal, of which a tenth of the points have a smaller one: a
    mode or a funnel's neck of less mass is not seen. Rounded down to a power of two, so
    that similar posteriors get equal samplers.

    Args:
        y: points, [N, D], about of unit scale.

    Returns:
        A number in [1/256, 1]; 1 where the points are too few for their dimension.

    Example:
        >>> import numpy as np
        >>> from diffsamp.numpyro import pilots
        >>> rng = np.random.default_rng(0)
        >>> modes = rng.choice([-1.0, 1.0], size=(2_000, 1))
        >>> y = np.concatenate([modes, modes], 1) + rng.normal(size=(2_000, 2)) / 50
        >>> pilots.smallest_scale(y)
        0.015625
    """
    points = np.asarray(y, np.float64)
    num_near = max(40, 5 * points.shape[1])  # fewer have no width in some directions
    if len(points) < 2 * num_near:
        return 1.0
    rng = np.random.default_rng(0)
    normal = rng.normal(size=points.shape)
    found, expected = (_local_width(p, num_near, rng) for p in (points, normal))
    ratio = max(found / expected, 1e-9)
    return float(np.clip(2.0 ** np.floor(np.log2(ratio)), 2.0**-8, 1.0))


def _local_width(points, num_near, rng) -> float:
    chosen = rng.choice(len(points), min(200, len(points)), replace=False)
    widths = []
    for point in points[chosen]:
        distance = np.sum((points - point) ** 2, axis=1)
        near = points[np.argpartition(distance, num_near - 1)[:num_near]]
        covariance = np.cov(near, rowvar=False).reshape(points.shape[1], -1)
        widths.append(np.linalg.eigvalsh(covariance)[0])
    return float(np.sqrt(max(np.quantile(widths, 0.1), 0.0)))


def _as_pilot(probe: probes.Probe, x: Array) -> Pilot:
    return Pilot(
        x=jnp.asarray(x),
        name=probe.name,
        num_energy_evaluations=probe.num_energy_evaluations,
        num_gradient_evaluations=probe.num_gradient_evaluations,
        log_z=probe.log_z,
    )
