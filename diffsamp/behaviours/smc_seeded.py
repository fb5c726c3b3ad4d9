"""Particles of tempered SMC, traced back by the destruction kernel.

Adaptive tempered sequential Monte Carlo (BlackJAX) from the sampler's own reference, or
from the target's prior, leaves particles in every mode that tempering can reach. They
show the sampler where the mass is; the weights stay exact whatever SMC got wrong.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from diffsamp import mcmc
from diffsamp.behaviours.common import num_rows, proposal, trace_back
from diffsamp.types import Array, Behaviour, Cost, Provides, Target


class SMCSeededState(NamedTuple):
    """Attributes: x: particles, [N, D]; log_weight: their log-weights, [N]."""

    x: Array
    log_weight: Array


@functools.cache
def smc_seeded(
    num_particles: int = 1024,
    *,
    every: int | None = None,
    num_mcmc_steps: int = 10,
    prior: Target | None = None,
) -> Behaviour:
    """Paths into particles of tempered SMC, run before and during training.

    Args:
        num_particles: particles per run.
        every: run again after this many updates, replacing the particles; None keeps
            the first run's.
        num_mcmc_steps: BlackJAX HMC moves per temperature.
        prior: a target with ``sample_prior`` and ``log_prior`` to temper from its
            prior; by default SMC starts at the sampler's reference.

    Raises:
        ValueError: when a number is below 1, or ``prior`` has no prior; at the start
            of training when SMC did not reach the target. A later run that does not
            reach it leaves the particles as they are.

    Example:
        >>> import diffsamp as ds
        >>> ds.behaviours.smc_seeded(256, every=500).provides.target_draws
        True
    """
    if num_particles < 2 or num_mcmc_steps < 1 or (every is not None and every < 1):
        raise ValueError(
            "num_particles must be at least 2, num_mcmc_steps and every at least 1, "
            f"got {num_particles}, {num_mcmc_steps} and {every}"
        )
    if prior is not None and (prior.sample_prior is None or prior.log_prior is None):
        raise ValueError(
            f"target {prior.name!r} has no prior to temper from (sample_prior and "
            "log_prior); leave prior=None to start from the sampler's reference"
        )

    def run(key, sampler, energy):
        if prior is None:
            result = mcmc.smc_from_gaussian(
                key,
                energy,
                sampler.dim,
                loc=jnp.asarray(sampler.loc),
                scale=jnp.asarray(sampler.scale),
                num_particles=num_particles,
                num_mcmc_steps=num_mcmc_steps,
            )
        else:
            result = mcmc.smc_from_prior(
                key, prior, num_particles=num_particles, num_mcmc_steps=num_mcmc_steps
            )
        state = SMCSeededState(result.particles, result.log_weight)
        cost = Cost(result.num_energy_evaluations, result.num_gradient_evaluations)
        return state, cost, result

    def init(key, sampler, params, energy):
        del params
        state, cost, result = run(key, sampler, energy)
        traced = isinstance(result.reached_target, Tracer)
        if not traced and not bool(result.reached_target):
            raise ValueError(
                "tempered SMC stopped at inverse temperature "
                f"{float(result.beta):.3g}, so its particles are not draws from the "
                "target; raise num_particles or num_mcmc_steps, or set the sampler's "
                "loc and scale to the target's (ds.standardise finds them)"
            )
        return state, cost

    def propose(state, key, sampler, params, energy, request, count):
        del count
        pick, walk = jax.random.split(key)
        index = jax.random.categorical(
            pick, state.log_weight, shape=(num_rows(request),)
        )
        paths = trace_back(walk, sampler, params, energy, state.x[index])
        return proposal(paths, target_draws=True)

    def update(state, key, sampler, params, energy, trajectories, proposal, count):
        del params, trajectories, proposal
        none = Cost(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        if every is None:
            return state, none

        def again():
            new, cost, result = run(key, sampler, energy)
            keep = result.reached_target  # otherwise these are not target draws
            new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, state)
            return new, Cost(*(jnp.asarray(c, jnp.int32) for c in cost))

        return jax.lax.cond((count + 1) % every == 0, again, lambda: (state, none))

    return Behaviour(init, propose, update, Provides(target_draws=True))
