"""What a path starts from where that is not the normal reference.

A mixture about like the target, noised by the sampler's own process up to where the
path begins: with weights w_i, means m_i and factors F_i, and s the signal there,

    x_0 = sqrt(s) (m_i + F_i e) + sqrt(1 - s) e',   i ~ w,   e, e' ~ N(0, I),

in unit coordinates, whose density is that of the mixture of N(sqrt(s) m_i, s F_i F_i^T
+ (1 - s) I). Mass is then spread over far modes by the draw of i, exactly, and steps
have only to find the shape of each. Blessing et al. 2025 (arXiv 2503.00524) train such
a prior with the sampler; here it is fitted to points before (`mixtures.fit_mixture`)
and is a constant, so that no gradient has to pass through the draw of i.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from diffsamp._distributions import normal_log_prob, standard_normal
from diffsamp.schedules import NoiseSchedule
from diffsamp.types import Array, Key, Params


class Prior(Protocol):
    """A distribution of first states: static, hashable, compared by value.

    In unit coordinates: ``init(key, dim) -> params``, ``sample(params, key) -> [D]``
    and the normalised ``log_density(params, y [D]) -> []``.
    """

    def init(self, key: Key, dim: int) -> Params: ...

    def sample(self, params: Params, key: Key) -> Array: ...

    def log_density(self, params: Params, y: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class MixturePrior:
    """A noised Gaussian mixture; a constant in training.

    Attributes:
        num_components: M.
        schedule: noise schedule; the noise is that at time 0.
    """

    num_components: int
    schedule: NoiseSchedule

    def init(self, key: Key, dim: int) -> Params:
        """N(0, I), whatever the noise."""
        del key
        dtype = jax.dtypes.canonicalize_dtype(float)
        count = self.num_components
        return {
            "logits": jnp.zeros((count,), dtype),
            "means": jnp.zeros((count, dim), dtype),
            "factors": jnp.broadcast_to(jnp.eye(dim, dtype=dtype), (count, dim, dim)),
        }

    def sample(self, params: Params, key: Key) -> Array:
        params = jax.lax.stop_gradient(params)
        for_index, inner, outer = jax.random.split(key, 3)
        index = jax.random.categorical(for_index, params["logits"])
        mean, factor = params["means"][index], params["factors"][index]
        within, noise = (
            standard_normal(k, mean.shape, mean.dtype) for k in (inner, outer)
        )
        y = mean + jnp.matmul(factor, within, precision="highest")
        signal = self._signal
        return np.sqrt(signal) * y + np.sqrt(1 - signal) * noise

    def log_density(self, params: Params, y: Array) -> Array:
        params, signal = jax.lax.stop_gradient(params), self._signal

        def of_component(log_weight, mean, factor):
            covariance = signal * jnp.matmul(factor, factor.T, precision="highest")
            covariance += (1 - signal) * jnp.eye(y.shape[0], dtype=y.dtype)
            root = jnp.linalg.cholesky(covariance)
            z = solve_triangular(root, y - np.sqrt(signal) * mean, lower=True)
            log_det = jnp.sum(jnp.log(jnp.diagonal(root)))
            log_density = normal_log_prob(z, jnp.zeros_like(z), jnp.ones((), z.dtype))
            return log_weight + log_density - log_det

        log_weights = jax.nn.log_softmax(params["logits"])
        rows = log_weights, params["means"], params["factors"]
        return jax.nn.logsumexp(jax.vmap(of_component)(*rows))

    @property
    def _signal(self) -> float:
        return float(self.schedule.signal(0.0))
