"""Do the variances of the two kernels fit together?

In continuous time generation and destruction must have the same noise: with different
ones the two laws of paths are singular and the weights' variance explodes as steps
are added. With few steps and learned variances they may differ, but a ratio far from
one at any step means that one kernel has collapsed or exploded, and that weights will
have heavy tails. The check is a count; it changes nothing.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from diffsamp.energies import as_condition, as_energy, as_key
from diffsamp.sampler import VARIANCE_LIMIT, Sampler
from diffsamp.types import ArrayLike, Energy, Key, Params, as_count

LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99)


class VarianceRatios(NamedTuple):
    """Generation variance over destruction variance on the sampler's own paths.

    Attributes:
        levels: quantile levels, [Q].
        quantiles: of the ratio at every step, over paths and coordinates, [K, Q].
        share_outside: share of paths, steps and coordinates with a ratio beyond 100 or
            below 1/100.
        alarm: what to do about it, or None where every ratio is within these limits.
        num_energy_evaluations: energies evaluated alone.
        num_gradient_evaluations: energies evaluated with their gradient.
        num_network_evaluations: control evaluations.
    """

    levels: np.ndarray
    quantiles: np.ndarray
    share_outside: float
    alarm: str | None
    num_energy_evaluations: int
    num_gradient_evaluations: int
    num_network_evaluations: int


def variance_ratios(
    key: Key,
    sampler: Sampler,
    params: Params,
    energy: Energy,
    num_paths: int = 256,
    *,
    condition: ArrayLike | None = None,
) -> VarianceRatios:
    """Ratios of the kernels' variances, step by step.

    Args:
        key: random key; consumed.
        sampler: the sampler.
        params: its parameters.
        energy: maps [D] to [].
        num_paths: paths drawn.
        condition: [condition_dim], where the sampler has one.

    Raises:
        ValueError: when num_paths is below 1.

    Example:
        The reference kernels of a variance preserving process have equal variances:

        >>> import jax, diffsamp as ds
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> energy = ds.targets.gmm9().energy
        >>> report = ds.variance_ratios(jax.random.key(1), sampler, params, energy, 8)
        >>> report.quantiles.round(3).tolist()[0], report.alarm
        ([1.0, 1.0, 1.0, 1.0, 1.0], None)
    """
    num_paths = as_count("num_paths", num_paths)
    log_ratio = _log_ratios(
        sampler,
        num_paths,
        as_key(key),
        params,
        as_energy(energy),
        as_condition(condition),
    )
    log_ratio = np.asarray(log_ratio, np.float64)
    quantiles = np.exp(np.quantile(log_ratio, LEVELS, axis=(0, 2))).T
    beyond = np.abs(log_ratio) > math.log(VARIANCE_LIMIT)
    outside = float(np.mean(beyond))
    alarm = None
    if outside > 0:
        step = int(np.argmax(np.mean(beyond, axis=(0, 2))))
        median = math.exp(float(np.median(log_ratio[:, step])))
        alarm = (
            "generation and destruction variances differ more than "
            f"{VARIANCE_LIMIT:.0f}-fold on {100 * outside:.2g} % of the paths' steps, "
            f"most at step {step} of {sampler.num_steps} (median ratio {median:.3g}); "
            "narrow the Bounds or lower the learning rate of the destruction kernel"
        )
    price = sampler.evaluations_per_path
    drawn = sampler.num_steps * sampler.networks_of_generation
    return VarianceRatios(
        levels=np.array(LEVELS),
        quantiles=quantiles,
        share_outside=outside,
        alarm=alarm,
        num_energy_evaluations=num_paths * price.energy,
        num_gradient_evaluations=num_paths * price.gradient,
        num_network_evaluations=num_paths * (drawn + price.network),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_ratios(sampler, num_paths, key, params, energy, condition):
    def one(key):
        path = sampler.simulate(params, key, energy, condition)
        return sampler.log_variance_ratios(params, path, condition)

    return jax.vmap(one)(jax.random.split(key, num_paths))
