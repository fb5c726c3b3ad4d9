"""Checks and adapters at the border between users' functions and compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from diffsamp.types import Array, ArrayLike, Energy, Key


def as_key(key: Any) -> Key:
    """Accepts one typed key or one raw uint32 key of shape [2]; returns a typed key.

    Raises:
        ValueError: when it is neither.
    """
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if shape == ():
            return key
    elif dtype == jnp.uint32 and shape == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
    raise ValueError(
        "key must be one jax.random.key(seed) or one raw uint32 key of shape [2]; vmap "
        f"over several. Got {type(key).__name__} of dtype {dtype} and shape {shape}"
    )


def as_condition(condition: ArrayLike | None) -> Array | None:
    """A condition as an array of the default float type; None stays None."""
    if condition is None:
        return None
    return jnp.asarray(condition, jax.dtypes.canonicalize_dtype(float))


def as_points(name: str, draws: Any) -> Array:
    """Points [N, D] as an array.

    Raises:
        ValueError: when there are none, they have another shape, or are not finite.
    """
    points = jnp.asarray(draws)
    if points.ndim != 2 or points.shape[0] == 0:
        raise ValueError(f"{name} must have shape [N, D], got {list(points.shape)}")
    if not bool(jnp.all(jnp.isfinite(points))):
        raise ValueError(f"{name} must be finite; remove NaN and infinite rows")
    return points


def as_energy(energy: Callable[..., Array]) -> Partial:
    """Wraps any callable so that it can be an argument of compiled code.

    A ``jax.tree_util.Partial`` passes unchanged, its data stay data. Anything else is
    wrapped; two wraps of the same function share compiled code.

    Raises:
        ValueError: when it is not callable.
    """
    if isinstance(energy, Partial):
        return energy
    if not callable(energy):
        raise ValueError(
            "energy must be a function of one point [D]; for a Target pass "
            f"target.energy. Got {type(energy).__name__}"
        )
    return Partial(energy)


def bind_condition(energy: Callable[..., Array], condition: Any) -> Energy:
    """``energy(x, condition)`` as a function of x; unchanged without a condition."""
    if condition is None:
        return energy
    return lambda x: energy(x, condition)


def check_energy(
    energy: Energy, dim: int, dtype: Any, *, gradient: bool = False
) -> None:
    """Checks by shape evaluation alone that energy maps [dim] to a float scalar.

    Args:
        energy: what is checked.
        dim: D.
        dtype: of a point.
        gradient: whether it has to have a gradient, too.

    Raises:
        ValueError: when it fails on such a point, returns something else, or has no
            gradient.
    """
    point = jax.ShapeDtypeStruct((dim,), dtype)
    try:
        out = jax.eval_shape(energy, point)
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"energy failed on one point of shape [{dim}]: it does what JAX cannot "
            f"trace ({type(error).__name__}: {str(error).splitlines()[0]}). Write it "
            "with jax.numpy; or call code that is not JAX's by jax.pure_callback, with "
            "its gradient by jax.custom_jvp, or with none and a network that sees "
            "none, ds.networks.free()"
        ) from error
    except Exception as error:
        raise ValueError(
            f"energy failed on one point of shape [{dim}] ({type(error).__name__}: "
            f"{error}). Check that dim={dim} is the target's dimension and that energy "
            "takes one point, not a batch, and is traceable by JAX"
        ) from error
    if not hasattr(out, "shape") or out.shape != ():
        raise ValueError(
            "energy must return a scalar for one point [D], got "
            f"{getattr(out, 'shape', type(out))}; sum over coordinates, do not batch"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"energy must return a floating-point number, got {out.dtype}; "
            "convert integer data to float"
        )
    points = jax.ShapeDtypeStruct((2, dim), dtype)
    try:
        jax.eval_shape(jax.vmap(energy), points)
    except Exception as error:
        raise ValueError(
            "energy works on one point but not under jax.vmap "
            f"({type(error).__name__}: {error}). Give jax.pure_callback a vmap_method, "
            'for instance "sequential"'
        ) from error
    if not gradient:
        return
    try:
        jax.eval_shape(jax.vmap(jax.grad(energy)), points)
    except Exception as error:
        raise ValueError(
            "energy has a value but no gradient, which this sampler's networks are "
            "shown, or this objective needs "
            f"({type(error).__name__}: {error}). Give code that JAX cannot trace "
            "a derivative by jax.custom_jvp, or use a network that sees none, "
            "network=ds.networks.free(), and another objective than reverse_kl"
        ) from error
