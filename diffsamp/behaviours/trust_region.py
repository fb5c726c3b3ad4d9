"""Trust region: rounds of paths, re-weighted no further than a budget of nats.

At the start of a round N paths are drawn from the current sampler P_i, with weights
w = dQ / dP_i. Among all laws P with KL(P || P_i) <= eps the one closest to the target's
law, min KL(P || Q), is the tempered

    dP_{i+1} / dP_i  proportional to  w^eta,   eta in (0, 1],

and since KL(P_{i+1} || P_i) grows with eta, eta is the largest that keeps it within the
budget, or 1. With W the normalised w^eta of the N paths it is estimated by
sum W log(N W), and found by bisection. Until the next round the sampler is fitted to
P_{i+1} on these paths (`objectives.trust_region_log_variance`). The variance of weights
between rounds is about 2 eps: no single path ever dominates, and modes that P_0 covers
are not lost on the way. Blessing et al. 2025, trust region optimal control.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from diffsamp.behaviours.common import num_rows, proposal, simulate
from diffsamp.types import (
    Anchor,
    Array,
    Behaviour,
    Cost,
    Path,
    Provides,
    Request,
    counted,
)

_BISECTIONS = 40


class TrustRegionState(NamedTuple):
    """The paths of a round.

    Attributes:
        paths: unscored paths, leaves with a leading axis N.
        log_generation: log-density of each under the sampler that made it, [N].
        log_weight: its log-weight then, [N].
        exponent: eta of this round, [].
        divergence: KL(P_{i+1} || P_i) in nats, [].
        num_rounds: rounds begun, [] int.
    """

    paths: Path
    log_generation: Array
    log_weight: Array
    exponent: Array
    divergence: Array
    num_rounds: Array


@functools.cache
def trust_region(
    num_paths: int = 2_048, *, every: int = 200, max_divergence: float = 0.5
) -> Behaviour:
    """Rows from the paths of a round, with the tempered weights they should get.

    For `objectives.trust_region_log_variance`, which needs it and ignores the other
    rows of a mixture. A learned destruction kernel is part of w. That objective has no
    gradient in it, but moves it by a shared backbone; another objective may train it,
    on rows of its own. What a round asks for is kept with its paths and moves with
    neither. To have the kernel itself stand still within a round, as the paper assumes,
    give it networks of its own and train it at the last update of each, as below.

    Metrics: ``trust_region_exponent``, 1 once the target itself is within the budget,
    and ``trust_region_divergence``. The first batch of a round is on-policy.

    Args:
        num_paths: N; all of them are kept with their states, [N, K+1, D].
        every: updates in a round.
        max_divergence: eps, in nats.

    Raises:
        ValueError: when a number is out of range, and in training when num_paths is
            below the batch size.

    Example:
        >>> import diffsamp as ds
        >>> rounds = ds.behaviours.trust_region(1_024, every=100)
        >>> rounds.provides.anchor
        True

        Destruction learned from on-policy rows, but between rounds alone. Its Adam has
        no momentum, which would carry the move on into the next round:

        >>> import optax
        >>> o, b, every = ds.objectives, ds.behaviours, 100
        >>> behaviour = b.mixture(
        ...     (b.trust_region(1_024, every=every), 0.5), (b.on_policy(), 0.5)
        ... )
        >>> at_the_end = o.gradient_scale(
        ...     o.trajectory_likelihood(),
        ...     destruction=lambda count: (count + 1) % every == 0,
        ... )
        >>> objective = o.weighted_sum(
        ...     (o.trust_region_log_variance(), 1.0), (at_the_end, 1.0)
        ... )
        >>> rates = {
        ...     "generation": optax.adam(1e-3),
        ...     "destruction": optax.adam(1e-3, b1=0.0),
        ... }
        >>> optimizer = optax.multi_transform(rates, ds.param_labels)
    """
    if num_paths < 2 or every < 1 or not max_divergence > 0:
        raise ValueError(
            "num_paths must be at least 2, every at least 1 and max_divergence "
            f"positive, got {num_paths}, {every} and {max_divergence}"
        )

    def begin(key, sampler, params, energy, num_rounds):
        request = Request(jnp.zeros((num_paths, 0)), jnp.zeros((num_paths,), jnp.int32))
        paths = simulate(key, sampler, params, energy, request)
        with_densities = functools.partial(sampler.with_densities, params)
        scored = jax.vmap(with_densities)(paths, paths.densities)
        paths = paths._replace(densities=None)  # parameters move on within a round
        exponent, divergence = largest_exponent(scored.log_weight, max_divergence)
        return TrustRegionState(
            paths=paths,
            log_generation=jnp.sum(scored.log_generation, axis=-1),
            log_weight=scored.log_weight,
            exponent=exponent,
            divergence=divergence,
            num_rounds=num_rounds + 1,
        )

    def price(sampler):
        per_path = sampler.evaluations_per_path
        return Cost(
            num_paths * per_path.energy,
            num_paths * per_path.gradient,
            num_paths * per_path.network,
        )

    def init(key, sampler, params, energy):
        state = begin(key, sampler, params, energy, jnp.zeros((), jnp.int32))
        return state, price(sampler)

    def propose(state, key, sampler, params, energy, request, count):
        del sampler, params, energy
        size = num_rows(request)
        if size > num_paths:
            raise ValueError(
                f"num_paths must be at least the batch size, got {num_paths} and "
                f"{size}; raise num_paths or lower batch_size"
            )
        rows = jax.random.choice(key, num_paths, (size,), replace=False)
        paths, log_generation, log_weight = jax.tree.map(lambda a: a[rows], state[:3])
        first = jnp.broadcast_to(jnp.asarray(count % every == 0), (size,))
        return proposal(paths)._replace(
            simulated=first,
            on_policy=first,
            anchor=Anchor(log_generation, state.exponent * log_weight),
        )

    def update(state, key, sampler, params, energy, trajectories, proposal, count):
        del trajectories, proposal
        none = counted(Cost(0, 0))

        def again():
            new = begin(key, sampler, params, energy, state.num_rounds)
            return new, counted(price(sampler))

        return jax.lax.cond((count + 1) % every == 0, again, lambda: (state, none))

    def metrics(state):
        return {
            "trust_region_exponent": state.exponent,
            "trust_region_divergence": state.divergence,
        }

    provides = Provides(simulated=True, anchor=True, stored_rows=all_rows)
    return Behaviour(init, propose, update, provides, metrics)


def all_rows(batch_size: int) -> int:
    """For `Provides.stored_rows`: every one."""
    return batch_size


def largest_exponent(log_weight: Array, max_divergence: float) -> tuple[Array, Array]:
    """The largest eta in [0, 1] within the budget, and the divergence it has.

    Args:
        log_weight: [N]; those that are not finite count as zero weights.
        max_divergence: budget in nats.

    Returns:
        eta [] and KL(P_{i+1} || P_i) [].
    """
    usable = jnp.isfinite(log_weight)
    top = jnp.max(jnp.where(usable, log_weight, -jnp.inf))
    centred = jnp.where(usable, log_weight - top, 0.0)
    log_count = jnp.log(jnp.sum(usable).astype(log_weight.dtype))

    def divergence(exponent):
        tempered = jnp.where(usable, exponent * centred, -jnp.inf)
        log_share = tempered - logsumexp(tempered)
        log_ratio = jnp.where(usable, log_share + log_count, 0.0)
        return jnp.sum(jnp.exp(log_share) * log_ratio)

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        good = divergence(middle) <= max_divergence
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    zero, one = jnp.zeros((), log_weight.dtype), jnp.ones((), log_weight.dtype)
    low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (zero, one))
    exponent = jnp.where(divergence(one) <= max_divergence, one, low)
    return exponent, divergence(exponent)
