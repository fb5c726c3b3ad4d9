"""Drawing: weighted points, their log Z, and whether to believe them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import diagnostics as judging
from diffsamp import evidence, probes
from diffsamp.diagnostics import Diagnostics
from diffsamp.energies import as_energy, as_key, check_energy
from diffsamp.sampler import Sampler
from diffsamp.types import Array, Energy, Key, LogEvidence, Params

BLOCK = 256


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

    def resample(self, key: Key, num: int) -> np.ndarray:
        """Equal-weight draws, by systematic resampling in random order.

        Args:
            key: random key; consumed.
            num: how many, n.

        Returns:
            [n, D]; the points themselves, at random, where there are no weights.

        Raises:
            ValueError: when num is below 1 or no weight is positive.
        """
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        offset, order = jax.random.split(as_key(key))
        weights = np.ones(len(self.x))
        if self.log_weight is not None:
            log_weight = np.nan_to_num(self.log_weight.astype(np.float64), nan=-np.inf)
            if not np.isfinite(log_weight).any():
                raise ValueError("every draw has zero weight: nothing to resample")
            weights = np.exp(log_weight - log_weight.max())
        cumulative = np.cumsum(weights) / weights.sum()
        positions = (np.arange(num) + float(jax.random.uniform(offset))) / num
        index = np.minimum(np.searchsorted(cumulative, positions), len(self.x) - 1)
        return self.x[index[np.asarray(jax.random.permutation(order, num))]]


def draw(
    key: Key,
    sampler: Sampler,
    params: Params,
    energy: Energy,
    num_draws: int = 1_000,
    *,
    probe: probes.Probe | Array | None = None,
    batch_size: int = 8_192,
) -> Draws:
    """Draws weighted points and judges them.

    Only last states are kept. Draw number i depends on ``fold_in(key, i)`` alone and is
    computed in blocks of fixed size, so neither ``batch_size`` nor ``num_draws``
    changes it.

    Args:
        key: random key; consumed.
        sampler: the sampler.
        params: its parameters, ``fit.params``.
        energy: maps [D] to []; ``target.energy``.
        num_draws: N.
        probe: independent points (`probes`), or reference draws [M, D]. Without it the
            best verdict is ``reweight (coverage unchecked)``.
        batch_size: draws per compiled call; bounds the memory used.

    Returns:
        `Draws`.

    Raises:
        ValueError: when num_draws or batch_size is below 1, or the energy does not fit.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> draws = ds.draw(jax.random.key(1), sampler, params, target.energy, 100)
        >>> draws.x.shape, draws.log_weight.shape
        ((100, 2), (100,))
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    key, energy = as_key(key), as_energy(energy)
    check_energy(energy, sampler.dim, jax.dtypes.canonicalize_dtype(float))
    num_blocks = min(-(-batch_size // BLOCK), -(-num_draws // BLOCK))
    size = num_blocks * BLOCK
    parts = []
    for start in range(0, num_draws, size):
        part = _draw_blocks(sampler, num_blocks, params, key, energy, np.int32(start))
        keep = min(size, num_draws - start)
        parts.append(jax.tree.map(lambda a, n=keep: np.asarray(a)[:n], part))
    final = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    price = sampler.evaluations_per_path
    counts = [num_draws * p for p in price]
    probe_log_weight = probe_weights = None
    if probe is not None:
        probe = probe if isinstance(probe, probes.Probe) else probes.given(probe)
        probe_log_weight = log_weights_of(
            jax.random.fold_in(key, 2**32 - 1), sampler, params, energy, probe.x, batch_size
        )
        probe_weights = probe.weights
        counts = [c + len(probe.x) * p for c, p in zip(counts, price, strict=True)]
        counts[0] += probe.num_energy_evaluations
        counts[1] += probe.num_gradient_evaluations
    report = judging.diagnose(
        final.log_weight,
        probe_log_weight=probe_log_weight,
        probe_weights=probe_weights,
        num_energy_evaluations=counts[0],
        num_gradient_evaluations=counts[1],
        num_network_evaluations=counts[2],
    )
    return Draws(
        x=final.x,
        log_weight=final.log_weight,
        energy=final.energy,
        log_evidence=evidence.log_evidence(
            final.log_weight, pareto_k=report.pareto_k
        ),
        diagnostics=report,
    )


def log_weights_of(
    key: Key,
    sampler: Sampler,
    params: Params,
    energy: Energy,
    x: Array,
    batch_size: int = 8_192,
) -> np.ndarray:
    """Log-weights of paths traced back from given points.

    For points from the target their mean is an upper bound on log Z (EUBO).

    Args:
        key: random key; consumed.
        sampler: the sampler.
        params: its parameters.
        energy: maps [D] to [].
        x: points, [M, D].
        batch_size: paths per compiled call.

    Raises:
        ValueError: when x is not of shape [M, D].
    """
    x = jnp.asarray(x, jax.dtypes.canonicalize_dtype(float))
    if x.ndim != 2 or x.shape[1] != sampler.dim or x.shape[0] == 0:
        raise ValueError(f"x must have shape [M, {sampler.dim}], got {list(x.shape)}")
    key, energy = as_key(key), as_energy(energy)
    num_blocks = min(-(-batch_size // BLOCK), -(-x.shape[0] // BLOCK))
    size = num_blocks * BLOCK
    parts = []
    for start in range(0, x.shape[0], size):
        rows = x[start : start + size]
        padding = jnp.broadcast_to(rows[:1], (size - len(rows), x.shape[1]))
        filled = jnp.concatenate([rows, padding])
        values = _trace_blocks(
            sampler, num_blocks, params, key, energy, np.int32(start), filled
        )
        parts.append(np.asarray(values)[: len(rows)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_blocks(sampler, num_blocks, params, key, energy, start):
    def block(index):
        keys = _keys(key, start, index)
        return jax.vmap(sampler.final, in_axes=(None, 0, None))(params, keys, energy)

    return _flat(jax.lax.map(block, jnp.arange(num_blocks)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trace_blocks(sampler, num_blocks, params, key, energy, start, x):
    def block(inputs):
        index, rows = inputs
        keys = _keys(key, start, index)
        trace = jax.vmap(sampler.trace_back, in_axes=(None, 0, 0, None))
        return trace(params, keys, rows, energy).log_weight

    blocks = x.reshape(num_blocks, BLOCK, -1)
    return _flat(jax.lax.map(block, (jnp.arange(num_blocks), blocks)))


def _keys(key, start, index):
    number = start + index * BLOCK + jnp.arange(BLOCK)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(number)


def _flat(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), tree)
