"""Particles of tempered SMC, traced back by the destruction kernel.

Adaptive tempered sequential Monte Carlo (BlackJAX) from the sampler's own reference, or
from the target's prior, leaves particles in every mode that tempering can reach. They
show the sampler where the mass is; the weights stay exact whatever SMC got wrong.

Particles of several runs are pooled by importance. Run m with N equally weighted
particles x_i and an estimate Z_m of the normaliser is properly weighted: for every g,
E[Z_m mean_i g(x_i)] = Z E_π[g] (exactly so for a fixed ladder of temperatures), with
one Z for all runs. So draws in proportion to Z_m tend to the target as runs are added,
and a run that missed a mode, and with it a part of Z, counts for less. That is the
priority Z_m W_i of reinforced SMC (arXiv 2510.11711), with all W_i = 1 / N; the
sampler's own weighted paths are pooled the same way by
``replay(priority=buffers.by_weight())``. Powers Z_m^λ with λ < 1 keep one lucky
estimate from displacing all others; they still mix runs each of which is near the
target.

More rows for particles that the current sampler underweights, in proportion to powers
of the weights of their paths, would be another choice; but such rows are no draws of
the target any more, which `forward_kl` takes them for.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from diffsamp import buffers, mcmc
from diffsamp.behaviours.common import num_rows, proposal, trace_back
from diffsamp.types import Array, Behaviour, Cost, Provides, Target, counted


class SMCSeededState(NamedTuple):
    """The particles of R runs, the latest first.

    Attributes:
        x: particles, [R N, D]; zero where a run is yet to come.
        log_weight: log of their run's estimate of Z, [R N]; minus infinity there.
        num_failed: later runs that were of no use, [].
    """

    x: Array
    log_weight: Array
    num_failed: Array


@functools.cache
def smc_seeded(
    num_particles: int = 1024,
    *,
    every: int | None = None,
    num_mcmc_steps: int = 10,
    prior: Target | None = None,
    num_runs: int = 1,
    min_ess: float = 0.5,
) -> Behaviour:
    """Paths into particles of tempered SMC, run before and during training.

    Args:
        num_particles: particles per run.
        every: run again after this many updates, replacing the particles of the oldest
            run; None keeps the first run's.
        num_mcmc_steps: BlackJAX HMC moves per temperature.
        prior: a target with ``sample_prior`` and ``log_prior`` to temper from its
            prior; by default SMC starts at the sampler's reference.
        num_runs: runs whose particles are kept, drawn in proportion to Z_m^λ with Z_m
            the run's estimate of Z.
        min_ess: λ in [0, 1] is the largest that leaves so large an effective share of
            the particles; the estimates are noisy themselves.

    Raises:
        ValueError: when a number is out of range, ``prior`` has no prior, or several
            runs are kept without ``every``; at the start of training when SMC did not
            reach the target, or only with copies of a few points. A later run of this
            kind leaves the particles as they are and is counted (metric
            ``num_failed_smc``).

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
    if num_runs < 1 or (num_runs > 1 and every is None):
        raise ValueError(
            f"num_runs must be at least 1, and above that needs every, got {num_runs} "
            f"and every={every}; pass the number of updates between two runs"
        )
    buffers.check_min_ess(min_ess)
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
        none = jnp.zeros((), jnp.int32)
        state = SMCSeededState(result.particles, result.log_weight, none)
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
        if not traced and not bool(mcmc.usable(result)):
            raise ValueError(
                f"tempered SMC left only {int(mcmc.num_distinct(result))} distinct "
                f"points of {num_particles}: its moves were rejected; raise "
                "num_mcmc_steps, or set the sampler's loc and scale to the target's "
                "(ds.standardise finds them)"
            )
        rest = (num_runs - 1) * num_particles
        state = state._replace(
            x=jnp.pad(state.x, ((0, rest), (0, 0))),
            log_weight=jnp.pad(state.log_weight, (0, rest), constant_values=-jnp.inf),
        )
        return state, cost

    def choose(key, log_weight, num):
        if num_runs == 1:  # all weights are equal
            return jax.random.categorical(key, log_weight, shape=(num,))
        tempered = buffers.temper(log_weight, min_ess)
        size = jnp.sum(log_weight > -jnp.inf)
        return buffers.draw(key, jnp.exp(tempered - jnp.max(tempered)), num, size)

    def propose(state, key, sampler, params, energy, request, count):
        del count
        pick, walk = jax.random.split(key)
        index = choose(pick, state.log_weight, num_rows(request))
        paths = trace_back(walk, sampler, params, energy, state.x[index])
        return proposal(paths, target_draws=True)

    def update(state, key, sampler, params, energy, trajectories, proposal, count):
        del params, trajectories, proposal
        none = counted(Cost(0, 0))
        if every is None:
            return state, none

        def again():
            new, cost, result = run(key, sampler, energy)
            keep = mcmc.usable(result)  # otherwise these are not target draws

            def joined(new, old):
                new = jnp.concatenate([new, old[: len(old) - num_particles]])
                return jnp.where(keep, new, old)

            new = SMCSeededState(
                x=joined(new.x, state.x),
                log_weight=joined(new.log_weight, state.log_weight),
                num_failed=state.num_failed + jnp.asarray(~keep, jnp.int32),
            )
            return new, counted(cost)

        return jax.lax.cond((count + 1) % every == 0, again, lambda: (state, none))

    def metrics(state):
        return {"num_failed_smc": state.num_failed} if every else {}

    return Behaviour(init, propose, update, Provides(target_draws=True), metrics)
