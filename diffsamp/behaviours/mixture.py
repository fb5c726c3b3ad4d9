"""Mixtures of behaviours: each gets a fixed share of every batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from diffsamp.behaviours.common import joined, num_rows
from diffsamp.types import Behaviour, Provides, total_cost


def mixture(*members: tuple[Behaviour, float]) -> Behaviour:
    """A batch made of shares from several behaviours.

    Args:
        *members: pairs ``(behaviour, share)``; shares are positive and are normalised.

    Raises:
        ValueError: when a member is not such a pair, a share is not positive, or (in
            training) a share of the batch is less than one row.

    Example:
        >>> import diffsamp as ds
        >>> behaviour = ds.behaviours.mixture(
        ...     (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(), 0.5)
        ... )
    """
    if not members:
        raise ValueError("mixture needs at least one (behaviour, share) pair")
    return _mixture(*map(_checked, members))


def _checked(member):
    is_pair = isinstance(member, tuple | list) and len(member) == 2
    if is_pair and isinstance(member[0], Behaviour):
        with contextlib.suppress(TypeError, ValueError):
            if 0 < float(member[1]) < np.inf:
                return member[0], float(member[1])
    raise ValueError(
        f"mixture takes pairs (behaviour, share > 0), got {type(member).__name__}: "
        f"{member!r}"
    )


@functools.cache
def _mixture(*members: tuple[Behaviour, float]) -> Behaviour:
    behaviours = [behaviour for behaviour, _ in members]
    if sum(b.provides.anchor for b in behaviours) > 1:
        raise ValueError(
            "a mixture takes one behaviours.trust_region() at most: its objective fits "
            "the paths of one sampler"
        )

    def init(key, sampler, params, energy):
        keys = jax.random.split(key, len(behaviours))
        pairs = [
            b.init(k, sampler, params, energy)
            for b, k in zip(behaviours, keys, strict=True)
        ]
        return tuple(state for state, _ in pairs), total_cost(
            [cost for _, cost in pairs]
        )

    begun = tuple((b.begun, share) for b, share in members)
    provides = Provides(
        simulated=any(b.provides.simulated for b in behaviours),
        on_policy=any(b.provides.on_policy for b in behaviours),
        only_on_policy=all(b.provides.only_on_policy for b in behaviours),
        target_draws=any(b.provides.target_draws for b in behaviours),
        conditions=all(b.provides.conditions for b in behaviours),
        anchor=any(b.provides.anchor for b in behaviours),
        stored_rows=_Of(_stored_rows, begun),
    )
    functions = [_Of(f, begun) for f in (_propose, _update, _metrics)]
    return Behaviour(init, functions[0], functions[1], provides, functions[2])


class _Of(NamedTuple):
    """A function of the members; equal ones share compiled code."""

    function: Callable
    members: tuple[tuple[Behaviour, float], ...]

    def __call__(self, *args):
        return self.function(self.members, *args)


def _stored_rows(members, batch_size):
    sizes = np.diff(_ends(members, batch_size), prepend=0)
    return sum(
        b.provides.stored_rows(int(size))
        for (b, _), size in zip(members, sizes, strict=True)
    )


def _propose(members, states, key, sampler, params, energy, request, count):
    keys = jax.random.split(key, len(members))
    parts = [
        b.propose(state, k, sampler, params, energy, rows, count)
        for (b, _), state, k, rows in zip(
            members, states, keys, _split(members, request), strict=True
        )
    ]
    return joined(parts)


def _update(
    members, states, key, sampler, params, energy, trajectories, proposal, count
):
    keys = jax.random.split(key, len(members))
    pairs = [
        b.update(s, k, sampler, params, energy, trajectories, proposal, count)
        for (b, _), s, k in zip(members, states, keys, strict=True)
    ]
    return tuple(state for state, _ in pairs), total_cost([cost for _, cost in pairs])


def _metrics(members, states):
    parts = [b.metrics(s) for (b, _), s in zip(members, states, strict=True)]
    names = [name for part in parts for name in part]
    if len(set(names)) < len(names):
        parts = [
            {f"{i}_{name}": value for name, value in part.items()}
            for i, part in enumerate(parts)
        ]
    return {name: value for part in parts for name, value in part.items()}


def _ends(members, batch_size):
    shares = np.array([share for _, share in members], np.float64)
    return np.round(np.cumsum(shares / shares.sum()) * batch_size).astype(int)


def _split(members, request):
    batch_size = num_rows(request)
    ends = _ends(members, batch_size)
    starts = ends - np.diff(ends, prepend=0)
    if np.min(ends - starts) < 1:
        raise ValueError(
            f"batch_size={batch_size} leaves a member of the mixture without a "
            "row; raise batch_size or the smallest share"
        )
    return [
        jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], request)
        for a, b in zip(starts, ends, strict=True)
    ]
