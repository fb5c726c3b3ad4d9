"""The Fourier MLP of the PIS and trajectory-balance papers, in Flax Linen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffsamp.types import Array


def _dtype():
    return jax.dtypes.canonicalize_dtype(float)


class FourierFeatures(nn.Module):
    """Sines and cosines of time at ``count`` fixed frequencies with learned phases.

    Frequencies are spaced linearly from 0.1 to 100 (Zhang and Chen 2022), or to another
    ``highest`` where the derivative in time has to be tame.
    """

    count: int = 64
    highest: float = 100.0

    @nn.compact
    def __call__(self, t: Array) -> Array:
        phase = self.param(
            "phase", nn.initializers.normal(1.0), (self.count,), _dtype()
        )
        angle = (
            t * jnp.linspace(0.1, self.highest, self.count, dtype=phase.dtype) + phase
        )
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])


def with_octaves(x: Array, count: int) -> Array:
    """Coordinates, and sines and cosines of 1, 2, 4, ... times each.

    An MLP is slow to learn a function that is steep in what it sees (Tancik et al.
    2020, arXiv 2006.10739), such as where a path ends from where it starts if there are
    several modes.

    Args:
        x: coordinates, [..., N].
        count: how many frequencies.

    Returns:
        [..., N (1 + 2 count)].

    Example:
        >>> import jax.numpy as jnp, diffsamp as ds
        >>> ds.networks.with_octaves(jnp.zeros(2), 3).shape
        (14,)
    """
    angles = [2.0**k * x for k in range(count)]
    waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate([x, *waves], axis=-1)


class FourierMLP(nn.Module):
    """Sum of embeddings of state, time, condition and step, then ``depth`` GELU layers.

    The last layer starts at zero, so an untrained control is the reference's own.

    Attributes:
        width: hidden width.
        depth: hidden layers after the embedding.
        out_dim: outputs; 0 means as many as the state has, None no last layer: it
            returns ``width`` features.
        highest: highest frequency of time and step.
        octaves: see `with_octaves`.
    """

    width: int = 64
    depth: int = 2
    out_dim: int | None = 0
    highest: float = 100.0
    octaves: int = 0

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        condition: Array | None,
        step_size: Array | None = None,
    ) -> Array:
        def embed(value):
            features = FourierFeatures(self.width, self.highest)(value)
            hidden = nn.Dense(self.width, param_dtype=_dtype())(features)
            return nn.Dense(self.width, param_dtype=_dtype())(nn.gelu(hidden))

        time = embed(t)
        inputs = with_octaves(x, self.octaves)
        hidden = nn.Dense(self.width, param_dtype=_dtype())(inputs) + time
        if condition is not None:
            hidden += nn.Dense(self.width, param_dtype=_dtype())(condition)
        if step_size is not None:
            hidden += embed(step_size)
        for _ in range(self.depth):
            hidden = nn.Dense(self.width, param_dtype=_dtype())(nn.gelu(hidden))
        if self.out_dim is None:
            return nn.gelu(hidden)
        return nn.Dense(
            self.out_dim or x.shape[-1],
            kernel_init=nn.initializers.zeros,
            param_dtype=_dtype(),
        )(nn.gelu(hidden))


class TimeScale(nn.Module):
    """A learned function of time per output, constant at initialisation.

    Attributes:
        width: hidden width.
        out_dim: number of outputs.
        initial: value at initialisation.
    """

    width: int = 64
    out_dim: int = 1
    initial: float = 1.0

    @nn.compact
    def __call__(self, t: Array) -> Array:
        hidden = FourierFeatures(self.width)(t)
        for _ in range(2):
            hidden = nn.gelu(nn.Dense(self.width, param_dtype=_dtype())(hidden))
        return nn.Dense(
            self.out_dim,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.initial),
            param_dtype=_dtype(),
        )(hidden)
