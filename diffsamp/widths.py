r"""Noise of trained kernels, chosen so that weights of few steps have light tails.

With kernels p of generation and q of destruction, each a mean m and a variance s^2, a
step adds to the log-weight, per coordinate,

    log q(x | x') - log p(x' | x) = (z_p^2 - z_q^2) / 2 + log(s_p / s_q),
    z_p = (x' - m_p) / s_p,    z_q = (x - m_q) / s_q.

Under p, z_p is N(0, 1), and exp(z_p^2 / 2) alone has no finite mean: its tail is that
of a Pareto law with k = 1, up to a logarithm. Where the two kernels are each other's
inverse, z_q^2 and the next step take it back. Where they nearly are, which is as far as
divergences go that ask what happens on the average, some of the tail stays, and k-hat
is above 0.7 although ELBO, ESS and log Z are good. More noise in p and less in q,

    s_p -> exp(g / 2) s_p,    s_q -> exp(d / 2) s_q,    g >= 0 >= d,

take it away: z_p has its law as before, but the way back sees its draws further out, in
units of a smaller s_q. Where z_q = c z_p, k falls from 1 - c^2 to 1 - c^2 exp(g - d).
Kernels that were exact would lose (exp(a) - 1 - a) / 2, about a^2 / 4, of the ELBO per
step and coordinate by a = g or a = -d alone, K D a^2 / 4 in all, and up to twice the
sum by both. `tune_widths` tries a few such costs for each, and takes what has the
lightest tail. Weights are exact with all of them (`Sampler.widths`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np

from diffsamp import evidence
from diffsamp.diagnostics import effective_sample_fraction, pareto_smooth
from diffsamp.energies import as_condition, as_energy, as_key
from diffsamp.sampler import Sampler, Widths
from diffsamp.types import ArrayLike, Energy, Key, Params, as_count

_COSTS = (0.0, 0.01, 0.03, 0.1, 0.3)  # in nats of the ELBO, of kernels that were exact
_LEAST_ESS = 0.8  # of the largest of all pairs
_LIGHT, _EVEN = 0.3, 0.9  # k-hat and effective sample fraction of what is left as is
_CHUNK = 1_024  # paths at a time


class TunedWidths(NamedTuple):
    """A sampler with the noise that was chosen, judged on fresh paths.

    Attributes:
        sampler: with that noise and the parameters of the given one; the given one
            itself if its tail is light, or nothing has a lighter one.
        pareto_k_before: k-hat of the given one's weights.
        pareto_k_after: k-hat of the other's weights, from the same random numbers.
        ess_before: effective sample fraction of the given one.
        ess_after: of the other.
        elbo_before: mean log-weight of the given one, usually the higher one.
        elbo_after: of the other.
        num_energy_evaluations: energies evaluated alone.
        num_gradient_evaluations: energies evaluated with their gradient.
        num_network_evaluations: control evaluations.
    """

    sampler: Sampler
    pareto_k_before: float
    pareto_k_after: float
    ess_before: float
    ess_after: float
    elbo_before: float
    elbo_after: float
    num_energy_evaluations: int
    num_gradient_evaluations: int
    num_network_evaluations: int


def tune_widths(
    key: Key,
    sampler: Sampler,
    params: Params,
    energy: Energy,
    *,
    num_draws: int = 16_384,
    condition: ArrayLike | None = None,
) -> TunedWidths:
    """Gives a trained sampler's kernels the noise with which weights have light tails.

    Unless k-hat is at most 0.3 and the effective sample size at least 90 %, twenty-five
    pairs of widths are tried on ``num_draws`` paths each, of the same random numbers.
    Of those with at least 80 % of the largest effective sample size the one with the
    smallest k-hat is taken, if on fresh paths, too, it is smaller than the given
    sampler's. Draw with what is returned: its weights are as exact as any, and it was
    chosen on other draws. Of a conditional sampler the widths are those of one
    condition.

    Args:
        key: random key; consumed.
        sampler: with the number of steps that is wanted.
        params: its parameters, which stay as they are.
        energy: maps [D] to [].
        num_draws: paths for each of up to 27 sets; rounded up to a multiple of 1,024,
            which run at a time.
        condition: [condition_dim], where the sampler has one.

    Raises:
        ValueError: when ``num_draws`` is not positive, ``sampler`` is a flow, which has
            no kernels, or energy, params or condition do not fit it.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> options = {"learn_generation_variance": True, "learn_destruction": True}
        >>> sampler = ds.samplers.cdds(dim=2, num_steps=2, scale=4.0, **options)
        >>> params = sampler.init(jax.random.key(0))
        >>> tuned = ds.tune_widths(
        ...     jax.random.key(1), sampler, params, target.energy, num_draws=1_024
        ... )
        >>> tuned.pareto_k_after <= tuned.pareto_k_before
        True
    """
    num_chunks = math.ceil(as_count("num_draws", num_draws, 1) / _CHUNK)
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"sampler must be a ds.Sampler, got a {type(sampler).__name__}; a flow has "
            "no kernels, give the sampler that it is the flow of"
        )
    sampler.check_energy(energy, condition)
    sampler.check_params(params)
    given = params, as_energy(energy), as_condition(condition)

    def judge(key, widths):
        keys = jax.random.split(key, (num_chunks, _CHUNK))
        found = np.asarray(_log_weights(sampler, widths, keys, *given), np.float64)
        found = found.ravel()
        found = np.where(np.isnan(found), -np.inf, found)
        k = float(pareto_smooth(found).pareto_k)
        return k, float(effective_sample_fraction(found)), evidence.elbo(found)[0]

    def choose(key, old):
        scale = 2 / math.sqrt(sampler.num_steps * sampler.dim)
        added = [scale * math.sqrt(cost) for cost in _COSTS]
        both = itertools.product(added, repeat=2)
        pairs = [Widths(old.generation + g, old.destruction - d) for g, d in both]
        tried = [judge(key, pair) for pair in pairs]
        enough = _LEAST_ESS * max(ess for _, ess, _ in tried)
        allowed = [(k, i) for i, (k, ess, _) in enumerate(tried) if ess >= enough]
        return pairs[min(allowed)[1]]

    for_choice, for_judging = jax.random.split(as_key(key))
    before, num_judged = judge(for_judging, sampler.widths), 1
    after = before
    if before[0] > _LIGHT or before[1] < _EVEN:
        widths = choose(for_choice, sampler.widths)
        found, num_judged = judge(for_judging, widths), 2 + len(_COSTS) ** 2
        if found[0] < before[0]:
            sampler, after = dataclasses.replace(sampler, widths=widths), found
    price = sampler.evaluations_per_path
    num_paths = num_judged * num_chunks * _CHUNK
    return TunedWidths(
        sampler=sampler,
        pareto_k_before=before[0],
        pareto_k_after=after[0],
        ess_before=before[1],
        ess_after=after[1],
        elbo_before=before[2],
        elbo_after=after[2],
        num_energy_evaluations=num_paths * price.energy,
        num_gradient_evaluations=num_paths * price.gradient,
        num_network_evaluations=num_paths * price.network,
    )


@functools.partial(jax.jit, static_argnames="sampler")
def _log_weights(sampler, widths, keys, params, energy, condition):
    tried = copy.copy(sampler)
    object.__setattr__(tried, "widths", widths)  # traced, and never leaves this
    run = jax.vmap(tried.final, in_axes=(None, 0, None, None))
    return jax.lax.map(
        lambda keys: run(params, keys, energy, condition).log_weight, keys
    )
