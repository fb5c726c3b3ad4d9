"""Matrix products of a network in fewer bits; everything else as before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from diffsamp.networks.base import LinenBackbone, LinenControl
from diffsamp.networks.tied import Tied, tied
from diffsamp.types import Array, Key, Params

Algorithm = jax.lax.DotAlgorithmPreset


@dataclasses.dataclass(frozen=True)
class ReducedPrecision:
    """A network whose dense layers multiply in fewer bits.

    Attributes:
        network: the control or backbone.
        algorithm: how its dense layers multiply.
    """

    network: Any
    algorithm: Algorithm

    @property
    def needs_score(self) -> bool:
        return self.network.needs_score

    @property
    def feature_dim(self) -> int:
        return self.network.feature_dim

    def init(self, key: Key, *sizes: int) -> Params:
        return self.network.init(key, *sizes)

    def __call__(self, *args: Any) -> Array:
        def multiply(call, args, kwargs, context):
            if type(context.module) is not nn.Dense or kwargs or len(args) != 1:
                return call(*args, **kwargs)
            return _dense(context.module, args[0], self.algorithm)

        with nn.intercept_methods(multiply):
            return self.network(*args)


def reduced_precision(
    network: LinenControl | LinenBackbone | Tied,
    algorithm: Algorithm = Algorithm.BF16_BF16_F32,
) -> ReducedPrecision | Tied:
    """A Flax network with matrix products in bfloat16 or TensorFloat-32.

    Factors are rounded, sums and everything between the products stay in float32, and
    so do states, energies and log-densities: the network is a slightly different
    function, of which the weights are exactly those that they are, E[exp(log_weight)] =
    Z included. Parameters are stored and updated in float32.

    Args:
        network: a control or backbone of this module, or one made by `linen`; of
            `tied` ones both.
        algorithm: ``jax.lax.DotAlgorithmPreset.BF16_BF16_F32``, which rounds on every
            backend and is fast on GPU and TPU, or ``TF32_TF32_F32``, for GPUs only.

    Raises:
        ValueError: when the network is no Flax network, or the algorithm another one.

    Example:
        >>> import diffsamp as ds
        >>> network = ds.networks.reduced_precision(ds.networks.score_guided())
        >>> sampler = ds.samplers.pis(dim=2, num_steps=4, network=network)
    """
    if isinstance(network, Tied):
        both: Any = (network.flow, network.residual)
        both = [reduced_precision(part, algorithm) for part in both]
        return tied(*both, log_variance=network.log_variance)
    if not isinstance(network, LinenControl | LinenBackbone):
        raise ValueError(
            "network must be a Flax control or backbone, got "
            f"{type(network).__name__}; choose the precision of other functions within"
        )
    if algorithm not in (Algorithm.BF16_BF16_F32, Algorithm.TF32_TF32_F32):
        raise ValueError(
            "algorithm must be jax.lax.DotAlgorithmPreset.BF16_BF16_F32 or "
            f"TF32_TF32_F32, got {algorithm}"
        )
    return ReducedPrecision(network, algorithm)


def _dense(layer: nn.Dense, x: Array, algorithm: Algorithm) -> Array:
    kernel = layer.get_variable("params", "kernel")
    left, precision = x, algorithm
    if algorithm == Algorithm.BF16_BF16_F32 and jax.default_backend() == "cpu":
        # It would accept the algorithm and not round. Gradients are products of one
        # factor that is rounded and one that is not; elsewhere of two that are.
        left, kernel = (a.astype(jax.numpy.bfloat16) for a in (x, kernel))
        precision = None
    out = jax.lax.dot_general(
        left,
        kernel,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=x.dtype,
    )
    if not layer.use_bias:
        return out
    bias = layer.get_variable("params", "bias")
    return out + bias.reshape((1,) * (out.ndim - 1) + (-1,))
