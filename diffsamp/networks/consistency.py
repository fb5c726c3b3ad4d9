"""The consistency function of CDDS: a network that says where a path will end."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from diffsamp.networks.base import Context, LinenControl
from diffsamp.networks.fourier import FourierMLP
from diffsamp.types import Array

_HIGHEST = 5.0  # frequency of time; `objectives.continuous_consistency` takes d/dt


class ConsistencyModule(nn.Module):
    """``u = gain f``, ``f = c_skip(s) x + c_out(s) F(x, s)``, ``s = 1 - t``.

    ``c_skip = d^2 / (s^2 + d^2)`` and ``c_out = s d / (s^2 + d^2)^(1/2)`` make f(x, t)
    the identity at t = 1.
    """

    width: int
    depth: int
    data_std: float
    learn_variance: bool = False

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        size = x.shape[-1]
        num_outputs = size * (1 + self.learn_variance)
        mlp = FourierMLP(self.width, self.depth, num_outputs, _HIGHEST)
        out = mlp(x, t, context.condition)
        remaining, square = 1 - t, self.data_std**2
        spread = remaining**2 + square
        skip, gain = square / spread, remaining * self.data_std / jnp.sqrt(spread)
        end = skip * x + gain * out[:size]
        return jnp.concatenate([context.gain * end, out[size:]])


def consistency(
    width: int = 64,
    depth: int = 2,
    *,
    data_std: float = 0.5,
    learn_variance: bool = False,
) -> LinenControl:
    """A consistency function, for `samplers.cdds`; it never sees the energy.

    Args:
        width: hidden width.
        depth: hidden layers.
        data_std: d, about the target's standard deviation in units of the reference's.
        learn_variance: whether it also returns log-variances, see `Control`.

    Raises:
        ValueError: when data_std is not positive.
    """
    if not data_std > 0:
        raise ValueError(f"data_std must be positive, got {data_std}")
    module = ConsistencyModule(width, depth, float(data_std), learn_variance)
    return LinenControl(module, needs_score=False)
