"""Shared by the targets: shape checks, data files, safe functions, exact rejection."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.types import Array, Key


def point(x: Any, dim: int) -> Array:
    """Returns ``x`` as an array after checking that it is one point of shape [dim].

    Raises:
        ValueError: when ``x`` has another shape or is not floating-point.
    """
    x = jnp.asarray(x)
    if x.shape != (dim,):
        raise ValueError(
            f"x must be one point of shape ({dim},), got shape {x.shape}; "
            "use jax.vmap for a batch"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
    return x


def cast(dtype: Any, *arrays: Any) -> tuple[Array, ...]:
    """Returns ``arrays`` as JAX arrays of ``dtype``; targets store float64 data."""
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def default_float() -> Any:
    """Dtype of fresh draws: float32, or float64 where x64 is enabled."""
    return jnp.result_type(float)


def read_csv(filename: str) -> np.ndarray:
    """Reads a packaged table without its header row, float64 [rows, columns]."""
    path = importlib.resources.files("diffsamp.targets") / "data" / filename
    with path.open("r", encoding="utf-8") as file:
        return np.genfromtxt(file, delimiter=",", skip_header=1)


def require_dim(dim: int, valid: str, is_valid: bool) -> None:
    """Raises a ValueError saying which values of ``dim`` are valid, unless it is."""
    if not is_valid:
        raise ValueError(f"dim must be {valid}, got {dim!r}")


def capped_exp(x: Array, cap: float = 60.0) -> Array:
    """exp(x), continued linearly beyond ``cap``.

    Keeps values and gradients finite in float32. A density changes only where its
    logarithm is of the order of -exp(cap).
    """
    return jnp.exp(jnp.minimum(x, cap)) * (1.0 + jnp.maximum(x - cap, 0.0))


def safe_norm(x: Array) -> Array:
    """Euclidean norm of ``x`` [D] whose gradient at the origin is zero, not NaN."""
    squared = jnp.sum(x**2)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def root_mean_square(mean: Any, sd: Any) -> float:
    """Root mean square distance to 0 per coordinate, the default advice for `scale`."""
    return float(np.sqrt(np.mean(np.square(mean) + np.square(sd))))


def rejection(
    key: Key, propose: Callable[[Key], Array], log_accept: Callable[[Array], Array]
) -> Array:
    """Exact rejection sampling of a whole array, pure and traceable.

    Args:
        key: consumed.
        propose: fresh independent proposals of shape [...] or [..., D].
        log_accept: their log acceptance probabilities, at most 0, [...].

    Returns:
        Accepted proposals, of the shape that ``propose`` gives.
    """

    def body(state):
        key, x, done = state
        key, key_x, key_u = jax.random.split(key, 3)
        proposal = propose(key_x)
        log_p = log_accept(proposal)
        accept = jnp.log(jax.random.uniform(key_u, log_p.shape, log_p.dtype)) < log_p
        take = (accept & ~done).reshape(done.shape + (1,) * (x.ndim - done.ndim))
        return key, jnp.where(take, proposal, x), done | accept

    shape = jax.eval_shape(propose, key)
    done = jnp.zeros(jax.eval_shape(log_accept, shape).shape, bool)
    start = (key, jnp.zeros(shape.shape, shape.dtype), done)
    return jax.lax.while_loop(lambda state: ~jnp.all(state[2]), body, start)[1]
