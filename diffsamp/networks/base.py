"""What a sampler asks of a network, and adapters for any framework."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffsamp.types import Array, Key, Params


class Context(NamedTuple):
    """What a control may look at besides the state and the time.

    Attributes:
        score: minus the energy gradient in unit coordinates, [D]; [0] where the control
            did not ask for it. No gradient flows through it.
        gain: factor that turns a score into a control at this step, [].
        condition: what a conditional energy is conditioned on, [C], or None.
        features: what a shared backbone says about state, time and condition, [H], or
            None without one.
        step_size: length of the step in time, [], for controls that share parameters
            between step counts.
    """

    score: Array
    gain: Array
    condition: Array | None
    features: Array | None = None
    step_size: Array | None = None


class Control(Protocol):
    """A drift correction: static, hashable, compared by value.

    ``init(key, dim, condition_dim) -> params`` and ``control(params, x [D], t [],
    context) -> [D] or [2 D]`` in unit coordinates; ``needs_score`` says whether the
    energy gradient is worth computing. The second D numbers s, where returned, multiply
    the kernel's variance by ``exp(c tanh(s / c))`` with c from the sampler's `Bounds`:
    zero leaves the reference's variance. A control that can build on a shared
    `Backbone` also takes ``feature_dim`` in ``init``.
    """

    @property
    def needs_score(self) -> bool: ...

    def init(self, key: Key, dim: int, condition_dim: int) -> Params: ...

    def __call__(
        self, params: Params, x: Array, t: Array, context: Context
    ) -> Array: ...


class Backbone(Protocol):
    """Features of state, time and condition: static, hashable, compared by value.

    ``init(key, dim, condition_dim) -> params`` and ``backbone(params, x [D], t [],
    condition [C] or None) -> [feature_dim]``, evaluated once per state and shared by
    the generation and the destruction control.
    """

    @property
    def feature_dim(self) -> int: ...

    def init(self, key: Key, dim: int, condition_dim: int) -> Params: ...

    def __call__(
        self, params: Params, x: Array, t: Array, condition: Array | None
    ) -> Array: ...


def _full_precision() -> contextlib.AbstractContextManager[None]:
    """GPUs and TPUs would multiply float32 matrices in fewer bits, unasked.

    `reduced_precision` names another precision at each product, which then holds.
    """
    return jax.default_matmul_precision("highest")


@dataclasses.dataclass(frozen=True)
class LinenBackbone:
    """A Flax Linen module called as ``module(x, t, condition)``.

    Attributes:
        module: the module; equal modules share compiled code.
        feature_dim: length of what it returns.
    """

    module: nn.Module
    feature_dim: int

    def init(self, key: Key, dim: int, condition_dim: int) -> Params:
        dtype = jax.dtypes.canonicalize_dtype(float)
        condition = jnp.zeros((condition_dim,), dtype) if condition_dim else None
        x, t = jnp.zeros((dim,), dtype), jnp.zeros((), dtype)
        return self.module.init(key, x, t, condition)

    def __call__(
        self, params: Params, x: Array, t: Array, condition: Array | None
    ) -> Array:
        with _full_precision():
            out = self.module.apply(params, x, t, condition)
        assert isinstance(out, jax.Array)
        return out


@dataclasses.dataclass(frozen=True)
class LinenControl:
    """A Flax Linen module called as ``module(x, t, context)``.

    Attributes:
        module: the module; equal modules share compiled code.
        needs_score: whether the energy gradient is computed for it.
        lipschitz: certified bound on the Lipschitz constant in x of what it returns
            over ``context.gain``, or None where none is known.
    """

    module: nn.Module
    needs_score: bool
    lipschitz: float | None = None

    def init(
        self, key: Key, dim: int, condition_dim: int, feature_dim: int = 0
    ) -> Params:
        dtype = jax.dtypes.canonicalize_dtype(float)
        context = Context(
            score=jnp.zeros((dim if self.needs_score else 0,), dtype),
            gain=jnp.ones((), dtype),
            condition=jnp.zeros((condition_dim,), dtype) if condition_dim else None,
            features=jnp.zeros((feature_dim,), dtype) if feature_dim else None,
            step_size=jnp.ones((), dtype),
        )
        x, t = jnp.zeros((dim,), dtype), jnp.zeros((), dtype)
        return self.module.init(key, x, t, context)

    def __call__(self, params: Params, x: Array, t: Array, context: Context) -> Array:
        with _full_precision():
            out = self.module.apply(params, x, t, context)
        assert isinstance(out, jax.Array)
        return out


@dataclasses.dataclass(frozen=True)
class FunctionControl:
    """A control from two plain functions, for any framework.

    Attributes:
        init_fn: ``(key, dim) -> params``.
        drift_fn: ``(params, x [D], t [], context) -> [D]``.
        needs_score: whether ``context.score`` is computed.
    """

    init_fn: Callable[[Key, int], Params]
    drift_fn: Callable[[Params, Array, Array, Context], Array]
    needs_score: bool = False

    def init(
        self, key: Key, dim: int, condition_dim: int, feature_dim: int = 0
    ) -> Params:
        del condition_dim, feature_dim
        return self.init_fn(key, dim)

    def __call__(self, params: Params, x: Array, t: Array, context: Context) -> Array:
        return self.drift_fn(params, x, t, context)


def linen(module: nn.Module, *, needs_score: bool) -> LinenControl:
    """Adapts a Flax Linen module called as ``module(x, t, context)``.

    Args:
        module: maps x [D], t [] and a `Context` to a control [D].
        needs_score: whether it reads ``context.score``.
    """
    return LinenControl(module, needs_score)


def from_function(
    init_fn: Callable[[Key, int], Params],
    drift_fn: Callable[..., Any],
    *,
    needs_score: bool = False,
) -> FunctionControl:
    """Adapts any ``drift_fn(params, x, t, context) -> [D]``.

    Args:
        init_fn: ``(key, dim) -> params``; the key is consumed.
        drift_fn: pure function in unit coordinates.
        needs_score: whether it reads ``context.score``.

    Example:
        >>> import jax, jax.numpy as jnp, diffsamp as ds
        >>> control = ds.networks.from_function(
        ...     lambda key, dim: jnp.zeros(dim), lambda p, x, t, context: p - x
        ... )
        >>> sampler = ds.samplers.pis(dim=2, num_steps=4, network=control)
        >>> sampler.init(jax.random.key(0))["generation"].tolist()
        [0.0, 0.0]
    """
    return FunctionControl(init_fn, drift_fn, needs_score)
