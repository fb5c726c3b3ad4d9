"""The consistency function of CDDS: a network that says where a path will end."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from diffsamp.networks.base import Context, LinenControl
from diffsamp.networks.controls import clip_outputs
from diffsamp.networks.coordinatewise import CoordinatewiseModule
from diffsamp.networks.fourier import FourierMLP
from diffsamp.types import Array

_HIGHEST = 5.0  # frequency of time; `objectives.continuous_consistency` takes d/dt


class ConsistencyModule(nn.Module):
    """``u = gain f``, ``f = c_skip(s) x + c_out(s) clip(F(x, s))``, ``s = 1 - t``.

    ``c_skip = d^2 / (s^2 + d^2)`` and ``c_out = s d / (s^2 + d^2)^(1/2)`` make f(x, t)
    the identity at t = 1.
    """

    width: int
    depth: int
    data_std: float
    output_clip: float
    learn_variance: bool = False
    octaves: int = 0
    coordinatewise: bool = False

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        size = x.shape[-1]
        if self.coordinatewise:
            body = CoordinatewiseModule(
                self.width,
                self.depth,
                self.output_clip,
                use_score=False,
                learn_variance=self.learn_variance,
                octaves=self.octaves,
                highest=_HIGHEST,
            )
            out = body(x, t, context)
        else:
            num_outputs = size * (1 + self.learn_variance)
            size_of = self.width, self.depth, num_outputs
            mlp = FourierMLP(*size_of, _HIGHEST, self.octaves)
            out = mlp(x, t, context.condition)
        remaining, square = 1 - t, self.data_std**2
        spread = remaining**2 + square
        skip, gain = square / spread, remaining * self.data_std / jnp.sqrt(spread)
        end = skip * x + gain * clip_outputs(out[:size], self.output_clip)
        return jnp.concatenate([context.gain * end, out[size:]])


def consistency(
    width: int = 64,
    depth: int = 2,
    *,
    data_std: float = 0.5,
    output_clip: float = 20.0,
    learn_variance: bool = False,
    octaves: int = 0,
    coordinatewise: bool = False,
) -> LinenControl:
    """A consistency function, for `samplers.cdds`; it never sees the energy.

    Args:
        width: hidden width.
        depth: hidden layers.
        data_std: d, about the target's standard deviation in units of the reference's.
        output_clip: bound on each F, which is of order 1 where d is right. Of several
            steps each starts where the one before has arrived: a network that has never
            seen a place must not send it further off.
        learn_variance: whether it also returns log-variances, see `Control`.
        octaves: as in `free`; four for a target of several modes.
        coordinatewise: whether one network is for all coordinates, as in
            `networks.coordinatewise`.

    Raises:
        ValueError: when data_std or output_clip is not positive.
    """
    for name, value in (("data_std", data_std), ("output_clip", output_clip)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    bounds = float(data_std), float(output_clip)
    module = ConsistencyModule(
        width, depth, *bounds, learn_variance, octaves, coordinatewise
    )
    return LinenControl(module, needs_score=False)
