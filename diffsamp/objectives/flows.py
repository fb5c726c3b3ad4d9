"""Learned flows: log F(x, t), the unnormalised density that a path has at time t.

At the ends it is known: ``log F_0(x) = log Z + log p_0(x)`` and ``log F_K(x) =
-energy(x)``. In between it is a network, either on its own,

    log F_k(x) = offset + N(x, t_k),

or *forward-looking* (Pan et al. 2023; DGFS, Zhang et al. 2024, arXiv 2310.02679), added
to the geometric path between the reference's marginal and the target,

    log F_k(x) = N(x, t_k) + (1 - t_k) (log Z + log N(x; loc, scale^2 v_k))
                 - t_k energy(x),

v_k the variance of the reference process at step k in unit coordinates. DGFS writes
the same without log Z, which its network then has to learn. Energies at states between
the ends come with the scores where the networks ask for these; otherwise they are
evaluated here, and counted.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import scoring
from diffsamp.networks import Backbone, FourierMLP, LinenBackbone
from diffsamp.objectives.log_z import init_log_z, log_z_of
from diffsamp.types import Array, Batch, Cost, Key, Params

_DEFAULT = LinenBackbone(FourierMLP(width=64, depth=2, out_dim=1), feature_dim=1)


@dataclasses.dataclass(frozen=True)
class Flow:
    """A learned flow: static, hashable.

    Attributes:
        forward_looking: whether the network is added to the geometric path.
        network: N, a `Backbone` with one feature, in unit coordinates.
        log_z_scale: factor on log Z's raw parameter and on the network.

    Raises:
        ValueError: when log_z_scale is not positive or the network has more features.

    Example:
        DGFS is PIS trained with the forward-looking flow:

        >>> import diffsamp as ds
        >>> sampler = ds.samplers.pis(dim=2, num_steps=100)
        >>> objective = ds.objectives.sub_trajectory_balance(
        ...     flow=ds.objectives.Flow(forward_looking=True)
        ... )
    """

    forward_looking: bool = False
    network: Backbone = _DEFAULT
    log_z_scale: float = 10.0

    def __post_init__(self):
        if not self.log_z_scale > 0:
            raise ValueError(f"log_z_scale must be positive, got {self.log_z_scale}")
        if self.network.feature_dim != 1:
            raise ValueError(
                "the network of a flow must return one number, got feature_dim="
                f"{self.network.feature_dim}"
            )

    def init(self, key: Key, sampler, pilot) -> tuple[Params, Array]:
        """Parameters ``{"flow", "log_z"}``, and the offset of log Z."""
        for_flow, for_log_z = jax.random.split(key)
        raw, offset = init_log_z(for_log_z, sampler, pilot)
        flow = self.network.init(for_flow, sampler.dim, sampler.condition_dim)
        return {"flow": flow, "log_z": raw}, offset

    def __call__(
        self, params: Params, offset: Array, batch: Batch
    ) -> tuple[Array, Array, Cost]:
        """Log F at all states [B, K+1], log Z [B], and what it evaluated."""
        log_z = log_z_of(params["log_z"], offset, self.log_z_scale, batch)
        first = batch.trajectories.log_prior + log_z
        last = -batch.trajectories.energy
        energies, cost = self._energies(batch)
        inner = self._between(params, batch, log_z, energies)
        flow = jnp.concatenate([first[:, None], inner, last[:, None]], axis=1)
        return flow, log_z, cost

    def _between(self, params, batch: Batch, log_z, energies) -> Array:
        """Log F at the states between the ends, [B, K-1].

        As many steps at a time as fit the memory budget; their activations are computed
        again on the way back.
        """
        sampler, num_rows = batch.sampler, log_z.shape[0]
        condition = batch.condition if sampler.condition_dim else None
        each = scoring.bytes_per_state(
            self.network, params["flow"], sampler.dim, sampler.condition_dim
        )
        memory = batch.memory_budget or scoring.default_memory()
        num_devices = 1 if batch.mesh is None else batch.mesh.size
        together = max(1, memory * num_devices // (each * num_rows))
        together = min(together, max(1, sampler.num_steps - 1))
        table = sampler.process.coefficients(sampler.num_steps)
        dtype = batch.paths.xs.dtype
        times = jnp.asarray(table.times, dtype)
        variances = jnp.asarray(_reference_variance(sampler), dtype)
        at_state = functools.partial(self._at_state, params["flow"], sampler)

        @jax.checkpoint
        def at_step(index):
            take = functools.partial(jnp.take, indices=index, axis=1)
            energy = take(energies) if self.forward_looking else log_z
            of_rows = jax.vmap(at_state, in_axes=(None, None, 0, 0, 0, 0))
            known = times[index], variances[index], take(batch.paths.xs)
            return of_rows(*known, log_z, energy, condition)

        inner = jnp.arange(1, sampler.num_steps)
        return jax.lax.map(at_step, inner, batch_size=together).T

    def _at_state(self, params, sampler, time, variance, x, log_z, energy, condition):
        """Log F of one state between the ends."""
        y = sampler.unit(x)
        learned = self.network(params, y, time, condition)[0] * self.log_z_scale
        if not self.forward_looking:
            return log_z + learned
        log_density = -0.5 * (y**2 / variance + jnp.log(2 * jnp.pi * variance))
        scale = np.broadcast_to(np.asarray(sampler.scale), (sampler.dim,))
        log_reference = jnp.sum(log_density) - float(np.sum(np.log(scale)))
        return learned + (1 - time) * (log_z + log_reference) - time * energy

    def _energies(self, batch: Batch) -> tuple[Array, Cost]:
        """Energies at all states, [B, K+1], or nothing that is used."""
        known, xs = batch.paths.energies, batch.paths.xs[:, 1:-1]
        if not self.forward_looking or known.shape[1]:
            return known, Cost(0, 0)

        def energy(x, condition):
            return batch.energy(*((x, condition) if condition.size else (x,)))

        over_path = jax.vmap(energy, in_axes=(0, None))
        energies = jax.lax.stop_gradient(jax.vmap(over_path)(xs, batch.condition))
        energies = jnp.pad(energies, ((0, 0), (1, 1)))  # the ends' are not asked for
        return energies, Cost(xs.shape[0] * xs.shape[1], 0)


def _reference_variance(sampler) -> np.ndarray:
    """Variance of the uncontrolled process at every state, unit coordinates, [K+1]."""
    table = sampler.process.coefficients(sampler.num_steps)
    variance = [0.0 if sampler.process.point_mass else 1.0]
    for decay, std in zip(table.generation_decay, table.generation_std, strict=True):
        variance.append(decay**2 * variance[-1] + std**2)
    return np.asarray(variance)
