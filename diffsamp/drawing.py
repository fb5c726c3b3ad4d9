"""Drawing: weighted points, their log Z, and whether to believe them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffsamp import batching, evidence, meshes, probes
from diffsamp import diagnostics as judging
from diffsamp.deterministic import ProbabilityFlow
from diffsamp.diagnostics import Diagnostics
from diffsamp.energies import as_condition, as_energy, as_key
from diffsamp.sampler import Sampler
from diffsamp.types import ArrayLike, Energy, Key, LogEvidence, Params, as_count

_UNKNOWN = LogEvidence(math.nan, math.inf, -math.inf, None)  # without weights


class Draws(NamedTuple):
    """Weighted draws with everything needed to judge them.

    Attributes:
        x: points, [N, D].
        log_weight: log importance weights with E[exp(log_weight)] = Z, [N]; None where
            the sampler has no valid weight.
        energy: energies of the points, [N].
        log_evidence: estimate of log Z with its standard error and bounds.
        diagnostics: ESS, k-hat, counts, and a verdict in words.
    """

    x: np.ndarray
    log_weight: np.ndarray | None
    energy: np.ndarray
    log_evidence: LogEvidence
    diagnostics: Diagnostics

    @property
    def smoothed_log_weight(self) -> np.ndarray | None:
        """Pareto-smoothed log-weights (`diagnostics.pareto_smooth`), [N], or None.

        For expectations where k-hat lies between 0.5 and 0.7: less noise for a small
        bias. Their mean is no longer exactly Z in expectation.
        """
        if self.log_weight is None:
            return None
        return np.asarray(judging.pareto_smooth(self.log_weight).log_weight)

    def resample(self, key: Key, num: int) -> np.ndarray:
        """Equal-weight draws, by systematic resampling in random order.

        Args:
            key: random key; consumed.
            num: how many, n.

        Returns:
            [n, D]; the points themselves, at random, where there are no weights.

        Raises:
            ValueError: when num is no integer of at least 1 or no weight is positive.
        """
        num = as_count("num", num)
        offset, order = jax.random.split(as_key(key))
        weights = np.ones(len(self.x))
        if self.log_weight is not None:
            log_weight = np.asarray(self.log_weight, np.float64)
            log_weight = np.where(np.isnan(log_weight), -np.inf, log_weight)
            top = log_weight.max()
            if top == -np.inf:
                raise ValueError("every draw has zero weight: nothing to resample")
            weights = (log_weight == np.inf) * 1.0  # where there are any, these alone
            if top < np.inf:
                weights = np.exp(log_weight - top)
        cumulative = np.cumsum(weights)
        positions = (np.arange(num) + float(jax.random.uniform(offset))) / num
        # From the right, so that a weight of zero is never taken.
        index = np.searchsorted(cumulative / cumulative[-1], positions, side="right")
        return self.x[index[np.asarray(jax.random.permutation(order, num))]]


def draw(
    key: Key,
    sampler: Sampler | ProbabilityFlow,
    params: Params,
    energy: Energy,
    num_draws: int = 1_000,
    *,
    probe: probes.Probe | ArrayLike | None = None,
    condition: ArrayLike | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Draws:
    """Draws weighted points and judges them.

    Only last states are kept. Draw number i depends on ``fold_in(key, i)`` alone:
    neither ``batch_size`` nor ``num_draws`` changes it, on other devices than CPUs but
    for rounding.

    Args:
        key: random key; consumed.
        sampler: the sampler, or a `probability_flow`.
        params: its parameters, ``fit.params``.
        energy: maps [D] to []; ``target.energy``.
        num_draws: N.
        probe: independent points (`probes`), or an array [M, D], which says that these
            are draws from the target itself. Without it the best verdict is
            ``reweight (coverage unchecked)``.
        condition: [condition_dim], where the sampler has one.
        batch_size: draws per compiled call; bounds the memory used. By default 1,024,
            and for more draws on other devices than CPUs 16,384.
        mesh: devices to spread the draws over; they are the same on any, bit by bit on
            CPUs.

    Returns:
        `Draws`.

    Raises:
        ValueError: when num_draws or batch_size is no integer of at least 1, params or
            energy do not fit, or a probe is given for draws without weights.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> draws = ds.draw(jax.random.key(1), sampler, params, target.energy, 100)
        >>> draws.x.shape, draws.log_weight.shape
        ((100, 2), (100,))
    """
    num_draws = as_count("num_draws", num_draws)
    if batch_size is not None:
        batch_size = as_count("batch_size", batch_size)
    if probe is not None and not sampler.has_weights:
        raise ValueError(
            "a probe compares weights, and these draws have none: "
            f"{sampler.why_no_weight}"
        )
    key, energy, mesh = as_key(key), as_energy(energy), meshes.as_mesh(mesh)
    condition = as_condition(condition)
    sampler.check_params(params)
    sampler.check_energy(energy, condition)
    final = batching.draw_final(
        key, sampler, params, energy, num_draws, batch_size, condition, mesh
    )
    price = sampler.evaluations_per_path
    counts = [num_draws * p for p in price]
    probe_log_weight = probe_weights = target_log_weight = None
    if probe is not None:
        probe = probe if isinstance(probe, probes.Probe) else probes.given(probe)
        probe_log_weight = log_weights_of(
            jax.random.fold_in(key, 2**32 - 1),
            sampler,
            params,
            energy,
            probe.x,
            batch_size,
            condition=condition,
            mesh=mesh,
        )
        probe_weights = probe.weights
        if probe.target_draws:
            target_log_weight = probe_log_weight
        per_trace = sampler.evaluations_per_trace
        counts = [c + len(probe.x) * p for c, p in zip(counts, per_trace, strict=True)]
        counts[0] += probe.num_energy_evaluations
        counts[1] += probe.num_gradient_evaluations
    report = judging.diagnose(
        final.log_weight,
        probe_log_weight=probe_log_weight,
        probe_weights=probe_weights,
        num_energy_evaluations=counts[0],
        num_gradient_evaluations=counts[1],
        num_network_evaluations=counts[2],
        why_no_weight=sampler.why_no_weight,
    )
    return Draws(
        x=np.asarray(final.x),
        log_weight=None if final.log_weight is None else np.asarray(final.log_weight),
        energy=np.asarray(final.energy),
        log_evidence=_UNKNOWN
        if final.log_weight is None
        else evidence.log_evidence(
            final.log_weight,
            target_log_weight=target_log_weight,
        ),
        diagnostics=report,
    )


def log_weights_of(
    key: Key,
    sampler: Sampler | ProbabilityFlow,
    params: Params,
    energy: Energy,
    x: ArrayLike,
    batch_size: int | None = None,
    *,
    condition: ArrayLike | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Log-weights of paths traced back from given points.

    For points from the target their mean is an upper bound on log Z (EUBO). Each point
    costs ``sampler.evaluations_per_trace``.

    Args:
        key: random key; consumed.
        sampler: the sampler.
        params: its parameters.
        energy: maps [D] to [].
        x: points, [M, D].
        batch_size: paths per compiled call; by default as in `draw`.
        condition: [condition_dim], where the sampler has one.
        mesh: devices to spread the paths over.

    Raises:
        ValueError: when x is not of shape [M, D], params or condition do not fit, or
            the sampler is a flow that has no weights.
    """
    if not sampler.has_weights:
        raise ValueError(f"no valid weight: {sampler.why_no_weight}")
    if batch_size is not None:
        batch_size = as_count("batch_size", batch_size)
    x = jnp.asarray(x, jax.dtypes.canonicalize_dtype(float))
    if x.ndim != 2 or x.shape[1] != sampler.dim or x.shape[0] == 0:
        raise ValueError(f"x must have shape [M, {sampler.dim}], got {list(x.shape)}")
    condition = as_condition(condition)
    sampler.check_params(params)
    sampler.check_energy(energy, condition)
    return batching.trace_back_log_weights(
        as_key(key),
        sampler,
        params,
        as_energy(energy),
        x,
        batch_size,
        condition,
        meshes.as_mesh(mesh),
    )
