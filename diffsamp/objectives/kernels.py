"""Which kernel an objective trains: only one of the two, or one after a while.

A path's log-generation depends on the generation parameters alone and its
log-destruction on the destruction parameters alone (on a shared backbone each also on
the backbone). Scaling the gradient of one of them therefore trains one kernel and
leaves the value of the objective as it is; so objectives for different kernels can be
added:

    weighted_sum((generation_only(trajectory_balance()), 1.0),
                 (destruction_only(reverse_kl_log_derivative()), 1.0))
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.types import Array, Objective, Trajectory

Scale = float | Callable[[Array], Array]


@functools.cache
def gradient_scale(
    objective: Objective, *, generation: Scale = 1.0, destruction: Scale = 1.0
) -> Objective:
    """An objective whose gradient through either kernel is multiplied by a number.

    The value is unchanged. With Adam a constant factor other than 0 does nothing but
    set this objective's share in a sum; learning rates per group of parameters are
    Optax's: ``optax.multi_transform({...}, ds.param_labels)``.

    Args:
        objective: the objective.
        generation: factor for the generation kernel, a number or an Optax schedule of
            the update count.
        destruction: the same for the destruction kernel. To freeze it for the first
            1,000 updates: ``optax.piecewise_constant_schedule(0.0, ...)`` cannot leave
            zero, ``lambda count: count >= 1_000`` can.

    Raises:
        ValueError: when the objective differentiates the simulation (reverse KL), where
            the kernels cannot be told apart, or a constant factor is not finite.

    Example:
        >>> import diffsamp as ds
        >>> balance = ds.objectives.trajectory_balance()
        >>> frozen = ds.objectives.gradient_scale(
        ...     balance, destruction=lambda count: count >= 1_000
        ... )
    """
    if objective.requires.simulation_gradient:
        raise ValueError(
            "an objective that differentiates the simulation trains both kernels at "
            "once; use reverse_kl_log_derivative, which has the same gradient and can "
            "be split"
        )
    for name, scale in (("generation", generation), ("destruction", destruction)):
        if not callable(scale) and not np.isfinite(scale):
            raise ValueError(f"{name} must be a finite number, got {scale}")

    def scaled(batch):
        parts = batch.trajectories
        log_generation = _scaled(parts.log_generation, generation, batch.count)
        log_destruction = _scaled(parts.log_destruction, destruction, batch.count)
        return batch._replace(
            trajectories=with_kernels(parts, log_generation, log_destruction)
        )

    def loss(params, state, batch):
        return objective.loss(params, state, scaled(batch))

    return objective._replace(loss=loss)


def generation_only(objective: Objective) -> Objective:
    """The objective, training the generation kernel alone.

    Example:
        >>> import diffsamp as ds
        >>> objective = ds.objectives.generation_only(ds.objectives.log_variance())
    """
    return gradient_scale(objective, destruction=0.0)


def destruction_only(objective: Objective) -> Objective:
    """The objective, training the destruction kernel alone.

    Example:
        >>> import diffsamp as ds
        >>> objective = ds.objectives.destruction_only(
        ...     ds.objectives.reverse_kl_log_derivative()
        ... )
    """
    return gradient_scale(objective, generation=0.0)


def with_kernels(
    trajectory: Trajectory, log_generation: Array, log_destruction: Array
) -> Trajectory:
    """The trajectory with other log-densities, and the log-weight to go with them."""
    log_ratio = jnp.sum(log_destruction - log_generation, axis=-1)
    log_weight = -trajectory.energy - trajectory.log_prior + log_ratio
    return trajectory._replace(
        log_weight=log_weight,
        log_generation=log_generation,
        log_destruction=log_destruction,
    )


def _scaled(value: Array, scale: Scale, count: Array) -> Array:
    if not callable(scale) and scale == 1.0:
        return value
    constant = jax.lax.stop_gradient(value)
    if not callable(scale) and scale == 0.0:
        return constant
    factor = jnp.asarray(scale(count) if callable(scale) else scale, value.dtype)
    # Not factor * value + (1 - factor) * constant: infinite values would become NaN.
    return constant + factor * (value - constant)
