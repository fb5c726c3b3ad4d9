"""Samplers with guarantees of their own, for pilots, probes and exact references.

Thin wrappers round BlackJAX (kernels, adaptation, tempering, resampling) and Optax,
with the conventions of this library: energies instead of log-densities, flat points
[D], counted evaluations, and no particle that is not finite. All of them are pure and
may be called inside compiled code. BlackJAX is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.tree_util import Partial

from diffsamp.energies import as_energy, as_key, check_energy
from diffsamp.types import Array, Energy, Key, Target, as_count

if TYPE_CHECKING:
    import optax

# Log-density of points where the energy is NaN or infinite: finite, so that it can be
# tempered (0 * inf is NaN), and so low that no particle survives there.
_NO_DENSITY = -1e30


MIN_DISTINCT = 0.1
"""Share of an SMC run's particles that must be distinct for it to be of use."""

_SORT_KEYS = 8


class SMCResult(NamedTuple):
    """What tempered SMC returns.

    Attributes:
        particles: equally weighted draws, [N, D]. Resampling makes them dependent.
        log_weight: log Z for each particle, [N], so that as everywhere in the library
            the mean of exp(log_weight) estimates Z.
        log_z: log of the integral of exp(-energy), relative to the reference's
            integral (absolute when the reference is normalised), [].
        num_iterations: number of temperatures visited, [] int.
        num_energy_evaluations: energies without gradient, all particles together, [].
        num_gradient_evaluations: energies with gradient, [].
        acceptance: mean acceptance rate at the last temperature, [].
        beta: inverse temperature reached, [].
        reached_target: whether beta is 1 and the particles have positive density; if
            False, neither particles nor log_z belong to the target, [] bool.
    """

    particles: Array
    log_weight: Array
    log_z: Array
    num_iterations: Array
    num_energy_evaluations: Array
    num_gradient_evaluations: Array
    acceptance: Array
    beta: Array
    reached_target: Array


def num_distinct(result: SMCResult) -> Array:
    """How many of the particles are distinct, [] int.

    A run whose moves are rejected reaches the target with a few points, many times.
    """
    # Copies agree in all coordinates and moves change all: a few will do to put copies
    # side by side, where a sort by thousands compiles for minutes.
    x = result.particles[jnp.lexsort(result.particles[:, :_SORT_KEYS].T)]
    return 1 + jnp.sum(jnp.any(x[1:] != x[:-1], axis=1))


def usable(result: SMCResult) -> Array:
    """Whether a run reached the target with particles that differ, [] bool."""
    enough = num_distinct(result) >= MIN_DISTINCT * result.particles.shape[0]
    return result.reached_target & enough


class HMCInfo(NamedTuple):
    """Throw-away information on a run of :func:`run_hmc`.

    Attributes:
        acceptance: mean acceptance statistic of each chain, [C].
        num_divergences: divergent transitions after warm-up, [C] int.
        step_size: adapted step size, [C].
        num_gradient_evaluations: of all chains, warm-up included, [].
    """

    acceptance: Array
    num_divergences: Array
    step_size: Array
    num_gradient_evaluations: Array


class Chains(NamedTuple):
    """What :func:`run_chains` returns, for n kept states of C chains.

    Attributes:
        positions: states after burn-in, repeats of rejected moves included, [n, C, D].
        energy: their energies, [n, C]; 1e30 where a chain is at no density.
        gradient: gradients of the energy, [n, C, D].
        moved: whether the state is an accepted one that differs from the one before,
            [n, C] bool.
        acceptance: share of ``moved`` among the chains that ran; 0 when none did, [].
        step_size: the step size after burn-in, in units of the scale, [].
        num_running: chains that started where the energy is finite, [] int. The others
            stay where they are.
        num_gradient_evaluations: of all chains, burn-in included, [] int.
    """

    positions: Array
    energy: Array
    gradient: Array
    moved: Array
    acceptance: Array
    step_size: Array
    num_running: Array
    num_gradient_evaluations: Array


def tempered_smc(
    key: Key,
    energy: Energy,
    initial_particles: Array,
    reference_energy: Energy,
    *,
    num_mcmc_steps: int = 5,
    num_integration_steps: int = 8,
    target_ess: float = 0.8,
    target_acceptance: float = 0.8,
    max_iterations: int = 100,
) -> SMCResult:
    """Adaptive tempered sequential Monte Carlo from a reference to the target.

    The path is ``(1 - beta) * reference_energy(x) + beta * energy(x)``. Each
    temperature is chosen so that the conditional effective sample size is
    ``target_ess * N``; particles are then resampled (systematically) and moved by HMC.
    Step size and diagonal metric are tuned from the particles as the run goes on.

    Mode weights are decided along the path: a mode that is missing from the particles
    while the path is still connected never comes back, and nothing here will tell.

    Args:
        key: consumed; typed or raw.
        energy: minus log-density of the target, ``[D] -> []``. Where it is not finite
            the density counts as zero.
        initial_particles: independent draws from the reference, [N, D].
        reference_energy: minus log-density of the reference, ``[D] -> []``, normalised
            if log_z is to be absolute.
        num_mcmc_steps: HMC transitions at each temperature.
        num_integration_steps: leapfrog steps in each transition.
        target_ess: conditional effective sample size of a step, relative to N.
        target_acceptance: acceptance rate that the step size is tuned to.
        max_iterations: number of temperatures after which to give up.

    Returns:
        An :class:`SMCResult`; look at its ``reached_target``.

    Raises:
        ValueError: when initial_particles is not [N, D], an energy does not map [D] to
            a scalar, or an option is out of range.

    Sources: Del Moral, Doucet, Jasra, "Sequential Monte Carlo samplers", 2006; Zhou,
    Johansen, Aston, "Toward automatic model comparison: an adaptive sequential Monte
    Carlo approach", 2016 (conditional ESS); Buchholz, Chopin, Jacob, "Adaptive tuning
    of Hamiltonian Monte Carlo within sequential Monte Carlo", 2021. Kernels,
    resampling and the root finder are BlackJAX's. Its `adaptive_tempered_smc` chooses
    the temperature with the particles' weights left out, hence the own choice here.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffsamp.mcmc import tempered_smc
        >>> def reference_energy(x):
        ...     return 0.5 * jnp.sum(x**2) + 0.5 * x.size * jnp.log(2 * jnp.pi)
        >>> def energy(x):
        ...     return jnp.sum((x - 2.0) ** 2)
        >>> result = tempered_smc(
        ...     jax.random.key(0),
        ...     energy,
        ...     jax.random.normal(jax.random.key(1), (256, 2)),
        ...     reference_energy,
        ... )
        >>> bool(result.reached_target), bool(abs(result.log_z - jnp.log(jnp.pi)) < 0.3)
        (True, True)
    """
    particles = _check_points("initial_particles", initial_particles)
    energy, reference_energy = as_energy(energy), as_energy(reference_energy)
    check_energy(energy, particles.shape[1], particles.dtype)
    check_energy(reference_energy, particles.shape[1], particles.dtype)
    return _smc(
        as_key(key),
        Partial(_minus, reference_energy),
        Partial(_log_ratio, energy, reference_energy),
        particles,
        **_check_smc_options(
            num_mcmc_steps=num_mcmc_steps,
            num_integration_steps=num_integration_steps,
            target_ess=target_ess,
            target_acceptance=target_acceptance,
            max_iterations=max_iterations,
        ),
    )


def smc_from_gaussian(
    key: Key,
    energy: Energy,
    dim: int,
    *,
    loc: Array | float = 0.0,
    scale: Array | float = 1.0,
    num_particles: int = 1024,
    **options,
) -> SMCResult:
    """Tempered SMC from a Gaussian with independent coordinates.

    Args:
        key: consumed; typed or raw.
        energy: minus log-density of the target, ``[D] -> []``.
        dim: dimension D.
        loc: mean of the reference, [] or [D].
        scale: its standard deviation, [] or [D]; rather too large than too small.
        num_particles: number of particles N.
        **options: of :func:`tempered_smc`.

    Returns:
        An :class:`SMCResult`, log_z absolute.

    Raises:
        ValueError: as :func:`tempered_smc`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffsamp.mcmc import smc_from_gaussian
        >>> def energy(x):
        ...     return -jnp.logaddexp(-jnp.sum((x - 3) ** 2), -jnp.sum((x + 3) ** 2))
        >>> result = smc_from_gaussian(jax.random.key(0), energy, 2, scale=4.0)
        >>> bool(abs(result.log_z - jnp.log(2 * jnp.pi)) < 0.3)
        True
    """
    num_particles = as_count("num_particles", num_particles, least=2)
    draw_key, smc_key = jax.random.split(as_key(key))
    dtype = jnp.result_type(float)
    loc = jnp.broadcast_to(jnp.asarray(loc, dtype), (dim,))
    scale = jnp.broadcast_to(jnp.asarray(scale, dtype), (dim,))
    noise = jax.random.normal(draw_key, (num_particles, dim), dtype)
    return tempered_smc(
        smc_key,
        energy,
        loc[None] + scale[None] * noise,
        Partial(_gaussian_energy, loc, scale),
        **options,
    )


def smc_from_prior(
    key: Key, target: Target, num_particles: int = 1024, **options
) -> SMCResult:
    """Tempered SMC from a target's prior: only the likelihood is tempered.

    Args:
        key: consumed; typed or raw.
        target: a target with ``log_prior``, ``log_likelihood`` and ``sample_prior``.
        num_particles: number of particles N.
        **options: of :func:`tempered_smc`.

    Returns:
        An :class:`SMCResult`, log_z absolute.

    Raises:
        ValueError: when the target has no prior to sample from, or as
            :func:`tempered_smc`.

    Example:
        >>> import jax, jax.numpy as jnp, diffsamp as ds
        >>> from diffsamp.mcmc import smc_from_prior
        >>> def log_prior(x):
        ...     return jax.scipy.stats.norm.logpdf(x).sum()
        >>> def log_likelihood(x):
        ...     return jax.scipy.stats.norm.logpdf(x, 2.0).sum()
        >>> target = ds.Target(
        ...     energy=lambda x: -log_prior(x) - log_likelihood(x),
        ...     dim=1,
        ...     log_prior=log_prior,
        ...     log_likelihood=log_likelihood,
        ...     sample_prior=lambda key, n: jax.random.normal(key, (n, 1)),
        ... )
        >>> result = smc_from_prior(jax.random.key(0), target)
        >>> bool(abs(result.particles.mean() - 1.0) < 0.2)
        True
    """
    names = ("log_prior", "log_likelihood", "sample_prior")
    parts = tuple(getattr(target, name) for name in names)
    missing = [name for name, part in zip(names, parts) if part is None]
    if missing:
        raise ValueError(
            f"target {target.name!r} must have a prior to start from, got None for "
            f"{', '.join(missing)}; use smc_from_gaussian(key, target.energy, dim)"
        )
    num_particles = as_count("num_particles", num_particles, least=2)
    draw_key, smc_key = jax.random.split(as_key(key))
    log_prior, log_likelihood, sample_prior = map(as_energy, parts)
    particles = _draw(sample_prior, draw_key, num_particles)
    particles = _check_points("target.sample_prior(key, n)", particles)
    return _smc(
        smc_key,
        log_prior,
        log_likelihood,
        particles,
        **_check_smc_options(**options),
    )


def run_hmc(
    key: Key,
    energy: Energy,
    initial_positions: Array,
    *,
    num_warmup: int = 200,
    num_draws: int = 200,
    max_tree_depth: int = 8,
    target_acceptance: float = 0.8,
) -> tuple[Array, HMCInfo]:
    """Short runs of NUTS, several chains, each with its own window adaptation.

    Args:
        key: consumed; typed or raw.
        energy: minus log-density, ``[D] -> []``.
        initial_positions: one starting point per chain, [C, D].
        num_warmup: adaptation steps, dropped; 0 for none (unit step size and metric
            are then used, which is seldom wise).
        num_draws: draws kept per chain, n.
        max_tree_depth: a trajectory takes at most 2**max_tree_depth gradients.
        target_acceptance: acceptance statistic that the step size is tuned to.

    Returns:
        Draws [C, n, D] and an :class:`HMCInfo`.

    Raises:
        ValueError: when initial_positions is not [C, D], energy does not map [D] to a
            scalar, or num_draws < 1.

    Sources: Hoffman, Gelman, "The No-U-Turn sampler", 2014; BlackJAX.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffsamp.mcmc import run_hmc
        >>> def energy(x):
        ...     return 0.5 * jnp.sum((x - 1.0) ** 2)
        >>> draws, info = run_hmc(jax.random.key(0), energy, jnp.zeros((4, 2)))
        >>> draws.shape, bool(abs(draws.mean() - 1.0) < 0.2)
        ((4, 200, 2), True)
    """
    positions = _check_points("initial_positions", initial_positions)
    energy = as_energy(energy)
    check_energy(energy, positions.shape[1], positions.dtype)
    if num_draws < 1 or num_warmup < 0:
        raise ValueError(
            "num_draws must be at least 1 and num_warmup at least 0, got "
            f"{num_draws} and {num_warmup}"
        )
    return _run_hmc(
        as_key(key),
        energy,
        positions,
        num_warmup=num_warmup,
        num_draws=num_draws,
        max_tree_depth=max_tree_depth,
        target_acceptance=target_acceptance,
    )


def run_chains(
    key: Key,
    energy: Energy,
    initial_positions: Array,
    *,
    scale: Array | float = 1.0,
    step_size: Array | float = 0.5,
    num_steps: int = 200,
    num_burn_in: int = 100,
    num_integration_steps: int = 1,
    target_acceptance: float | None = None,
) -> Chains:
    """Short parallel chains of HMC from given points; of MALA, with one leapfrog step.

    All chains share one step size, jittered by a fifth either way. During burn-in its
    logarithm moves by half of what the mean acceptance rate exceeds the target by, and
    then stays, so that the states kept leave the target unchanged. Pass the returned
    step size to the next call to go on adapting.

    Args:
        key: consumed; typed or raw.
        energy: minus log-density, ``[D] -> []``. Where it is not finite the density
            counts as zero.
        initial_positions: one start per chain, [C, D].
        scale: typical standard deviations of the target, [] or [D]; the metric is
            diagonal with their inverse squares.
        step_size: leapfrog step ε to begin with, in units of the scale. MALA has the
            Langevin step h = ε² / 2.
        num_steps: transitions of each chain.
        num_burn_in: of them, those that adapt the step size and are dropped.
        num_integration_steps: leapfrog steps per transition; 1 is MALA.
        target_acceptance: 0.574 for MALA and 0.651 otherwise by default.

    Returns:
        A :class:`Chains` with n = num_steps - num_burn_in.

    Raises:
        ValueError: when initial_positions is not [C, D], energy does not map [D] to a
            scalar, or an option is out of range.

    Sources: Roberts, Rosenthal, "Optimal scaling of discrete approximations to Langevin
    diffusions", 1998 (0.574); Beskos et al., "Optimal tuning of the hybrid Monte Carlo
    algorithm", 2013 (0.651). The kernel is BlackJAX's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffsamp.mcmc import run_chains
        >>> def energy(x):
        ...     return 0.5 * jnp.sum((x - 1.0) ** 2)
        >>> chains = run_chains(jax.random.key(0), energy, jnp.zeros((64, 2)))
        >>> chains.positions.shape, bool(abs(chains.positions.mean() - 1.0) < 0.1)
        ((100, 64, 2), True)
        >>> bool(abs(chains.acceptance - 0.574) < 0.1)
        True
    """
    positions = _check_points("initial_positions", initial_positions)
    energy, dtype = as_energy(energy), positions.dtype
    check_energy(energy, positions.shape[1], dtype)
    options = check_chain_options(
        num_steps=num_steps,
        num_burn_in=num_burn_in,
        num_integration_steps=num_integration_steps,
        target_acceptance=target_acceptance,
    )
    scale = jnp.broadcast_to(jnp.asarray(scale, dtype), positions.shape[1:])
    start = jnp.asarray(step_size, dtype)
    return _run_chains(as_key(key), energy, positions, scale, start, **options)


def check_chain_options(
    *, num_steps, num_burn_in, num_integration_steps, target_acceptance
) -> dict[str, Any]:
    """The options of :func:`run_chains`, checked and with the default acceptance.

    Raises:
        ValueError: when one is out of range.
    """
    if num_integration_steps < 1:
        raise ValueError(
            f"num_integration_steps must be at least 1, got {num_integration_steps}"
        )
    if not 0 <= num_burn_in < num_steps:
        raise ValueError(
            "num_burn_in must be at least 0 and below num_steps, got "
            f"num_burn_in={num_burn_in} and num_steps={num_steps}"
        )
    if target_acceptance is None:
        target_acceptance = 0.574 if num_integration_steps == 1 else 0.651
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(
            f"target_acceptance must be between 0 and 1, got {target_acceptance}"
        )
    return {
        "num_steps": num_steps,
        "num_burn_in": num_burn_in,
        "num_integration_steps": num_integration_steps,
        "target_acceptance": float(target_acceptance),
    }


def multistart(
    key: Key,
    energy: Energy,
    initial_positions: Array,
    *,
    num_optimisation_steps: int = 300,
    num_hmc_steps: int = 50,
    optimizer: optax.GradientTransformation | None = None,
) -> Array:
    """Points in the modes that can be reached downhill: optimisation, then short HMC.

    Every chain minimises the energy from its own start and then forgets the exact
    minimum by ``num_hmc_steps`` steps of NUTS, two thirds of them adaptation. The
    points say where modes are and nothing about their weights.

    Args:
        key: consumed; typed or raw.
        energy: minus log-density, ``[D] -> []``; gradients that are not finite are
            ignored.
        initial_positions: one start per chain, [C, D], e.g. prior draws.
        num_optimisation_steps: steps of the optimiser, which works in coordinates
            divided by the starts' standard deviation, so that units do not matter.
        num_hmc_steps: steps of NUTS afterwards; 0 returns the optima.
        optimizer: an Optax transformation for each chain; by default Adam, its rate
            falling from 0.03 to 0 by a cosine (faster, momentum carries chains into
            other modes).

    Returns:
        One point per chain, [C, D].

    Raises:
        ValueError: when initial_positions is not [C, D] or energy does not map [D] to
            a scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffsamp.mcmc import multistart
        >>> def energy(x):
        ...     return 10.0 * jnp.sum((x**2 - 1.0) ** 2)
        >>> starts = jnp.array([[-3.0], [3.0]])
        >>> optima = multistart(jax.random.key(0), energy, starts, num_hmc_steps=0)
        >>> [round(float(x), 2) for x in optima[:, 0]]
        [-1.0, 1.0]
    """
    positions = _check_points("initial_positions", initial_positions)
    energy = as_energy(energy)
    check_energy(energy, positions.shape[1], positions.dtype)
    if optimizer is None:
        optimizer = _default_optimizer(num_optimisation_steps)
    points = _optimise(energy, positions, optimizer, num_optimisation_steps)
    if num_hmc_steps == 0:
        return points
    num_warmup = 2 * num_hmc_steps // 3
    draws, _ = run_hmc(
        key,
        energy,
        points,
        num_warmup=num_warmup,
        num_draws=num_hmc_steps - num_warmup,
    )
    return draws[:, -1]


def pathfinder(
    key: Key,
    energy: Energy,
    initial_positions: Array,
    *,
    num_draws: int = 20,
    max_iterations: int = 60,
) -> tuple[Array, Array]:
    """Draws of Gaussians fitted on the way downhill from several starts (BlackJAX).

    Args:
        key: consumed; typed or raw.
        energy: minus log-density, ``[D] -> []``.
        initial_positions: one start per path, [C, D].
        num_draws: draws per path, n.
        max_iterations: of L-BFGS.

    Returns:
        Draws [C, n, D] and their energies [C, n]. They say where the target may be and
        how wide, not what each place weighs.

    Raises:
        ValueError: when initial_positions is not [C, D] or energy does not map [D] to
            a scalar.

    Sources: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder", JMLR 23(306), 2022.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from diffsamp.mcmc import pathfinder
        >>> def energy(x):
        ...     return 0.5 * jnp.sum((x - 3.0) ** 2)
        >>> draws, _ = pathfinder(jax.random.key(0), energy, jnp.zeros((4, 2)))
        >>> draws.shape, bool(abs(draws.mean() - 3.0) < 0.5)
        ((4, 20, 2), True)
    """
    positions = _check_points("initial_positions", initial_positions)
    energy = as_energy(energy)
    check_energy(energy, positions.shape[1], positions.dtype)
    return _pathfinder(as_key(key), energy, positions, num_draws, max_iterations)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _pathfinder(key, energy, positions, num_draws, max_iterations):
    from blackjax.vi import pathfinder as vi

    def log_density(x):
        return -energy(x)

    def one(key, x):
        fit, draw = jax.random.split(key)
        state, _ = vi.approximate(
            fit, log_density, x, num_samples=50, maxiter=max_iterations
        )
        draws, _ = vi.sample(draw, state, num_draws)
        return draws, jax.vmap(energy)(draws)

    return jax.vmap(one)(jax.random.split(key, positions.shape[0]), positions)


# --------------------------------------------------------------------------- SMC


def _minus(function, x):
    return -function(x)


def _log_ratio(energy, reference_energy, x):
    return reference_energy(x) - energy(x)


def _gaussian_energy(loc, scale, x):
    z = (x - loc) / scale
    return jnp.sum(0.5 * z**2 + jnp.log(scale) + 0.5 * math.log(2.0 * math.pi))


@functools.partial(jax.jit, static_argnums=2)
def _draw(sampler, key, n):
    return sampler(key, n)


def _no_nan(log_density: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def safe(x):
        value = log_density(x)
        return jnp.where(jnp.isfinite(value), value, _NO_DENSITY)

    return safe


def _check_points(name: str, points: Array) -> Array:
    points = jnp.asarray(points)
    if points.ndim != 2 or not jnp.issubdtype(points.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating-point of shape [number, D], got shape "
            f"{points.shape} and dtype {points.dtype}; one row per point"
        )
    return points


def _check_smc_options(
    *,
    num_mcmc_steps=5,
    num_integration_steps=8,
    target_ess=0.8,
    target_acceptance=0.8,
    max_iterations=100,
):
    counts = {
        "num_mcmc_steps": num_mcmc_steps,
        "num_integration_steps": num_integration_steps,
        "max_iterations": max_iterations,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    fractions = {"target_ess": target_ess, "target_acceptance": target_acceptance}
    for name, value in fractions.items():
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return counts | fractions


class _Loop(NamedTuple):
    key: Key
    smc: Any  # BlackJAX's TemperedSMCState: particles, weights, tempering_param
    gradient_square: Array  # mean squared gradient of the tempered density, [D]
    log_step: Array
    log_z: Array
    acceptance: Array
    iteration: Array
    is_done: Array


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_mcmc_steps",
        "num_integration_steps",
        "target_ess",
        "target_acceptance",
        "max_iterations",
    ),
)
def _smc(
    key,
    log_prior,
    log_likelihood,
    particles,
    *,
    num_mcmc_steps,
    num_integration_steps,
    target_ess,
    target_acceptance,
    max_iterations,
) -> SMCResult:
    """Tempers ``log_prior(x) + beta * log_likelihood(x)`` from beta = 0 to 1."""
    import blackjax
    from blackjax.smc import resampling, solver, tempered

    log_prior, log_likelihood = _no_nan(log_prior), _no_nan(log_likelihood)
    num_particles, dim = particles.shape
    dtype = particles.dtype
    tiny = float(jnp.finfo(dtype).tiny)
    hmc_kernel = blackjax.hmc.build_kernel()

    def next_beta(beta, weights, log_ratio):
        """Where the conditional ESS of the weighted particles falls to the target."""
        log_weight = jnp.log(weights)
        # The excess does not depend on the origin, its rounding errors do.
        log_ratio = log_ratio - jnp.max(log_ratio)

        def excess(delta):
            log_ess = 2.0 * logsumexp(log_weight + delta * log_ratio)
            log_ess -= logsumexp(log_weight + 2.0 * delta * log_ratio)
            return log_ess - math.log(target_ess)

        rest = 1.0 - beta
        delta = solver.dichotomy(excess, jnp.zeros((), dtype), rest)
        return jnp.where(delta < rest, beta + delta, 1.0)

    def move(step_fn, log_step):
        """An update strategy for BlackJAX: HMC that tunes its step as it goes."""

        def strategy(init_fn, log_density, _, num_mcmc_steps, n_particles):
            def update(keys, positions, _):
                state = jax.vmap(lambda x: init_fn(x, log_density))(positions)

                def body(carry, index):
                    state, log_step = carry

                    def one(key, state):
                        # Random step sizes: no resonance with a mode's period.
                        step_key, jitter_key = jax.random.split(
                            jax.random.fold_in(key, index)
                        )
                        jitter = jax.random.uniform(
                            jitter_key, (), dtype, minval=0.5, maxval=1.5
                        )
                        step_size = jitter * jnp.exp(log_step)
                        return step_fn(step_key, state, log_density, step_size)

                    state, info = jax.vmap(one)(keys, state)
                    acceptance = jnp.mean(info.acceptance_rate)
                    log_step += 1.5 * (acceptance - target_acceptance)
                    return (state, log_step), acceptance

                steps = jnp.arange(num_mcmc_steps)
                (state, tuned), acceptance = jax.lax.scan(
                    body, (state, log_step), steps
                )
                square = jnp.mean(_finite_square(state.logdensity_grad), 0)
                return state.position, (tuned, jnp.mean(acceptance), square)

            return update, n_particles

        return strategy

    def body(loop):
        key, step_key = jax.random.split(loop.key)
        smc = loop.smc
        mean = smc.weights @ smc.particles
        variance = smc.weights @ (smc.particles - mean[None]) ** 2
        # The variance alone is that between modes; inverse squared gradients alone are
        # the stiffest place. Their geometric mean (as in nutpie) serves both, and never
        # exceeds the variance but for noise (Cramér-Rao).
        inverse_mass = jnp.sqrt(variance / loop.gradient_square)
        inverse_mass = jnp.clip(inverse_mass, 1e-8 * variance + tiny, variance + tiny)

        def step_fn(key, state, log_density, step_size):
            return hmc_kernel(
                key, state, log_density, step_size, inverse_mass, num_integration_steps
            )

        kernel = tempered.build_kernel(
            log_prior,
            log_likelihood,
            step_fn,
            blackjax.hmc.init,
            resampling.systematic,
            update_strategy=move(step_fn, loop.log_step),
        )
        log_ratio = jax.vmap(log_likelihood)(smc.particles)
        beta = next_beta(smc.tempering_param, smc.weights, log_ratio)
        new, info = kernel(step_key, smc, num_mcmc_steps, beta, {})
        log_step, acceptance, square = info.update_info
        return _Loop(
            key=key,
            smc=new,
            gradient_square=square,
            log_step=log_step,
            log_z=loop.log_z + info.log_likelihood_increment,
            acceptance=acceptance,
            iteration=loop.iteration + 1,
            # The particles were moved at the temperature the step began with.
            is_done=smc.tempering_param >= 1.0,
        )

    # Restrict the reference to where the target has density: particles outside get
    # weight zero and the position of one inside, their share goes into log Z.
    log_ratio = jax.vmap(log_likelihood)(particles)
    inside = log_ratio > 0.1 * _NO_DENSITY
    inside &= jax.vmap(log_prior)(particles) > 0.1 * _NO_DENSITY
    inside &= jnp.all(jnp.isfinite(particles), 1)
    number = jnp.sum(inside).astype(dtype)
    one = jnp.argmax(inside)
    particles = jnp.where(inside[:, None], particles, particles[one][None])
    particles = jnp.nan_to_num(particles)
    log_ratio = jnp.where(inside, log_ratio, log_ratio[one])
    weights = inside.astype(dtype) / jnp.maximum(number, 1.0)
    weights = jnp.where(number > 0, weights, 1.0 / num_particles)
    beta = next_beta(jnp.zeros((), dtype), weights, log_ratio)
    log_weight = jnp.log(weights) + beta * log_ratio
    log_z = jnp.log(number / num_particles) + logsumexp(log_weight)

    loop = _Loop(
        key=key,
        smc=tempered.TemperedSMCState(particles, jax.nn.softmax(log_weight), beta),
        gradient_square=1.0 / (jnp.var(particles, 0) + tiny),  # no gradients yet
        log_step=jnp.asarray(math.log(0.5 * dim**-0.25), dtype),
        log_z=log_z,
        acceptance=jnp.zeros((), dtype),
        iteration=jnp.zeros((), jnp.int32),
        is_done=jnp.zeros((), bool),
    )
    loop = jax.lax.while_loop(
        lambda loop: ~loop.is_done & (loop.iteration < max_iterations), body, loop
    )
    per_iteration = num_particles * (num_mcmc_steps * num_integration_steps + 1)
    return SMCResult(
        particles=loop.smc.particles,
        log_weight=jnp.full(num_particles, loop.log_z),
        log_z=loop.log_z,
        num_iterations=loop.iteration,
        num_energy_evaluations=num_particles * (2 * loop.iteration + 1),
        num_gradient_evaluations=per_iteration * loop.iteration,
        acceptance=loop.acceptance,
        beta=loop.smc.tempering_param,
        # With one particle inside, none is outside: their weight is zero for good.
        reached_target=loop.is_done & (number > 0),
    )


def _finite_square(gradient):
    return jnp.where(jnp.isfinite(gradient), gradient, 0.0) ** 2


# ------------------------------------------------------------------- HMC, optimisation


@functools.partial(
    jax.jit,
    static_argnames=("num_warmup", "num_draws", "max_tree_depth", "target_acceptance"),
)
def _run_hmc(
    key, energy, positions, *, num_warmup, num_draws, max_tree_depth, target_acceptance
):
    import blackjax
    from blackjax.adaptation.base import get_filter_adapt_info_fn

    log_density = _no_nan(Partial(_minus, energy))
    step = blackjax.nuts.build_kernel()

    def chain(key, position):
        warmup_key, draw_key = jax.random.split(key)
        state = blackjax.nuts.init(position, log_density)
        parameters = {
            "step_size": jnp.ones((), position.dtype),
            "inverse_mass_matrix": jnp.ones_like(position),
        }
        num_gradients = jnp.zeros((), jnp.int32)
        if num_warmup:
            warmup = blackjax.window_adaptation(
                blackjax.nuts,
                log_density,
                initial_step_size=0.1,
                target_acceptance_rate=target_acceptance,
                adaptation_info_fn=get_filter_adapt_info_fn(
                    info_keys={"num_integration_steps"}
                ),
                max_num_doublings=max_tree_depth,
            )
            # BlackJAX's protocol class leaves num_steps out.
            (state, parameters), adaptation = warmup.run(
                warmup_key,
                position,
                num_steps=num_warmup,  # pyright: ignore[reportCallIssue]
            )
            parameters.pop("max_num_doublings", None)
            num_gradients += jnp.sum(adaptation.info.num_integration_steps)

        def one(state, key):
            state, info = step(
                key,
                state,
                log_density,
                **parameters,
                max_num_doublings=max_tree_depth,
            )
            kept = info.acceptance_rate, info.is_divergent, info.num_integration_steps
            return state, (state.position, kept)

        keys = jax.random.split(draw_key, num_draws)
        _, (draws, (acceptance, divergent, steps)) = jax.lax.scan(one, state, keys)
        info = HMCInfo(
            acceptance=jnp.mean(acceptance),
            num_divergences=jnp.sum(divergent),
            step_size=parameters["step_size"],
            num_gradient_evaluations=num_gradients + jnp.sum(steps) + 1,
        )
        return draws, info

    keys = jax.random.split(key, positions.shape[0])
    with _standard_promotion():
        draws, info = jax.vmap(chain)(keys, positions)
    total = jnp.sum(info.num_gradient_evaluations)
    return draws, info._replace(num_gradient_evaluations=total)


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_steps",
        "num_burn_in",
        "num_integration_steps",
        "target_acceptance",
    ),
)
def _run_chains(
    key,
    energy,
    positions,
    scale,
    step_size,
    *,
    num_steps,
    num_burn_in,
    num_integration_steps,
    target_acceptance,
) -> Chains:
    import blackjax

    log_density = _no_nan(Partial(_minus, energy))
    kernel = blackjax.hmc.build_kernel()
    num_chains, dtype = positions.shape[0], positions.dtype
    state = jax.vmap(lambda x: blackjax.hmc.init(x, log_density))(positions)
    running = state.logdensity > 0.1 * _NO_DENSITY
    number = jnp.sum(running).astype(dtype)

    def mean(values):
        total = jnp.sum(jnp.where(running, values, 0.0))
        return total / jnp.maximum(number, 1.0)

    def transition(state, key, log_step):
        def one(key, state, running):
            # Random step sizes: no resonance with a mode's period.
            step_key, jitter_key = jax.random.split(key)
            jitter = jax.random.uniform(jitter_key, (), dtype, minval=0.8, maxval=1.2)
            new, info = kernel(
                step_key,
                state,
                log_density,
                jitter * jnp.exp(log_step),
                scale**2,
                num_integration_steps,
            )
            new = jax.tree.map(lambda a, b: jnp.where(running, a, b), new, state)
            # A step too small for the floating-point grid is accepted and goes nowhere.
            moved = running & jnp.any(new.position != state.position)
            return new, info.acceptance_rate, moved

        return jax.vmap(one)(jax.random.split(key, num_chains), state, running)

    def adapt(carry, key):
        state, log_step = carry
        state, rate, _ = transition(state, key, log_step)
        return (state, log_step + 0.5 * (mean(rate) - target_acceptance)), None

    def keep(state, key):
        state, _, moved = transition(state, key, log_step)
        return state, (*state, moved)

    keys = jax.random.split(key, num_steps)
    carry = state, jnp.log(step_size)
    (state, log_step), _ = jax.lax.scan(adapt, carry, keys[:num_burn_in])
    # Nothing is learned of the step size where no chain runs.
    log_step = jnp.where(number > 0, log_step, jnp.log(step_size))
    _, kept = jax.lax.scan(keep, state, keys[num_burn_in:])
    positions, log_densities, gradients, moved = kept
    return Chains(
        positions=positions,
        energy=-log_densities,
        gradient=-gradients,
        moved=moved,
        acceptance=mean(jnp.mean(moved, 0, dtype=dtype)),
        step_size=jnp.exp(log_step),
        num_running=jnp.sum(running).astype(jnp.int32),
        num_gradient_evaluations=jnp.asarray(
            num_chains * (num_steps * num_integration_steps + 1), jnp.int32
        ),
    )


@functools.cache
def _default_optimizer(num_steps: int):
    import optax

    return optax.adam(optax.cosine_decay_schedule(0.03, max(num_steps, 1)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _optimise(energy, positions, optimizer, num_steps):
    scale = jnp.std(positions, 0)
    scale = jnp.where(scale > 0.0, scale, 1.0)

    def chain(z):
        def step(carry, _):
            z, state = carry
            gradient = scale * jax.grad(energy)(scale * z)
            gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
            update, state = optimizer.update(gradient, state, z)
            return (z + update, state), None

        carry, _ = jax.lax.scan(step, (z, optimizer.init(z)), length=num_steps)
        return scale * carry[0]

    with _standard_promotion():
        return jax.vmap(chain)(positions / scale[None])


@contextlib.contextmanager
def _standard_promotion():
    """BlackJAX's adaptation and Optax mix dtypes; lets them in any user's mode."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
