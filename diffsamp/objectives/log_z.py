"""The learned log Z of balance objectives.

log Z_psi = offset + scale * raw: the offset is the log-mean-exp of a pilot batch's
weights and ``scale`` multiplies the learning rate of log Z, so that one optimiser for
all parameters works; a log Z that starts at 0 has to travel (165 nats on the 32-D
many-well) at the speed of its learning rate. For a conditional energy ``raw`` is a
network of the condition, and the offset the pilot's mean log-weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffsamp.networks import FourierMLP, LinenBackbone
from diffsamp.objectives.common import row_mean
from diffsamp.types import Array, Batch, Key, Params

_OF_CONDITION = LinenBackbone(FourierMLP(width=64, depth=2, out_dim=1), feature_dim=1)


def init_log_z(key: Key, sampler, pilot) -> tuple[Params, Array]:
    """Raw parameters and the offset."""
    log_weight = pilot.log_weight
    usable = jnp.isfinite(log_weight)
    if sampler.condition_dim:
        offset = row_mean(log_weight, usable)
        raw = _OF_CONDITION.init(key, sampler.condition_dim, 0)
    else:
        masked = jnp.where(usable, log_weight, -jnp.inf)
        number = jnp.maximum(jnp.sum(usable), 1).astype(log_weight.dtype)
        offset = jax.nn.logsumexp(masked) - jnp.log(number)
        raw = jnp.zeros((), log_weight.dtype)
    return raw, jnp.where(jnp.isfinite(offset), offset, jnp.zeros_like(offset))


def log_z_of(raw: Params, offset: Array, scale: float, batch: Batch) -> Array:
    """Log Z for every row of the batch, [B]."""
    if not batch.condition.shape[-1]:
        return jnp.broadcast_to(offset + scale * raw, batch.group.shape)
    now = jnp.zeros((), offset.dtype)
    of_condition = jax.vmap(lambda c: _OF_CONDITION(raw, c, now, None)[0])
    return offset + scale * of_condition(batch.condition)


def check_scale(log_z_scale: float) -> None:
    """Raises where it is not positive."""
    if not log_z_scale > 0:
        raise ValueError(f"log_z_scale must be positive, got {log_z_scale}")
