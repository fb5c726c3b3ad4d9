"""Weighted sums of objectives on one shared batch of paths."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.types import Objective, Requirements, total_cost

Weight = float | Callable


def weighted_sum(*members: tuple[Objective, Weight]) -> Objective:
    """Sum of objectives, each times a constant or a schedule of the update count.

    Metrics of the members keep their names; where two of them share one, that of the
    later member gets its number: ``log_z_1``.

    Args:
        *members: pairs ``(objective, weight)``; a weight is a number or an Optax
            schedule ``count -> number``.

    Raises:
        ValueError: when there is no member, or a member is not such a pair with a
            finite weight.

    Example:
        >>> import optax, diffsamp as ds
        >>> fading = optax.linear_schedule(1.0, 0.0, 10)
        >>> objective = ds.objectives.weighted_sum(
        ...     (ds.objectives.log_variance(), 1.0),
        ...     (ds.objectives.trajectory_balance(), fading),
        ... )
    """
    if not members:
        raise ValueError("weighted_sum needs at least one (objective, weight) pair")
    return _weighted_sum(*map(_checked, members))


def _checked(member):
    is_pair = isinstance(member, tuple | list) and len(member) == 2
    if is_pair and isinstance(member[0], Objective):
        objective, weight = member
        if callable(weight):
            return objective, weight
        with contextlib.suppress(TypeError, ValueError):
            if np.isfinite(float(weight)):
                return objective, float(weight)
    raise ValueError(
        "weighted_sum takes pairs (objective, weight) with a finite number or a "
        f"schedule as weight, got {type(member).__name__}: {member!r}"
    )


@functools.cache
def _weighted_sum(*members: tuple[Objective, Weight]) -> Objective:
    objectives = [objective for objective, _ in members]
    flags = map(any, zip(*(o.requires for o in objectives), strict=True))
    requires = Requirements(*flags)

    def init(key, sampler, params, energy, pilot):
        keys = jax.random.split(key, len(objectives))
        pairs = [
            o.init(k, sampler, params, energy, pilot)
            for o, k in zip(objectives, keys, strict=True)
        ]
        trainable = {str(i): pair[0] for i, pair in enumerate(pairs)}
        return trainable, tuple(pair[1] for pair in pairs)

    def member_params(params, i):
        return {"sampler": params["sampler"], "objective": params["objective"][str(i)]}

    def loss(params, states, batch):
        total, metrics = jnp.zeros((), batch.trajectories.log_weight.dtype), {}
        costs = []
        for i, (objective, weight) in enumerate(members):
            own = batch._replace(key=jax.random.fold_in(batch.key, i))
            value, extra = objective.loss(member_params(params, i), states[i], own)
            factor = weight(batch.count) if callable(weight) else weight
            total = total + jnp.asarray(factor, total.dtype) * value
            costs += [extra.pop("cost")] if "cost" in extra else []
            metrics[f"loss_{i}"] = value
            for name, number in extra.items():
                metrics[f"{name}_{i}" if name in metrics else name] = number
        if costs:
            metrics["cost"] = total_cost(costs)
        return total, metrics

    def update(params, states, batch):
        return tuple(
            o.update(member_params(params, i), states[i], batch)
            for i, o in enumerate(objectives)
        )

    return Objective(requires, init, loss, update)
