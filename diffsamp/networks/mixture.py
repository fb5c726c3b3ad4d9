"""A control that knows a Gaussian mixture about like the target, and corrects it.

Noised by the variance-preserving process, a mixture of N(m_i, C_i) is one of
N(sqrt(s) m_i, s C_i + (1 - s) I) with the same weights, s the signal: its score g(y)
and the diagonal h(y) of the Hessian of its log-density are known. Where a step begins
with the share ``r = s_k / s_{k+1}`` of the signal that it ends with, the state y' in
which it ends has by Tweedie's formula (Robbins 1956; Efron 2011), given y,

    mean  (y + (1 - r) g(y)) / sqrt(r),   variances  (1 - r) / r (1 + (1 - r) h(y)),

which are those of the generation kernel before training: of all Gaussian kernels the
best, were the mixture the target. The reference's kernel has mean ``sqrt(r) y`` and
variance ``1 - r``, and its `Context.gain` moves the mean by ``2 (1 - sqrt(r)) c`` for a
control ``gain c``, so that here

    c = (1 + sqrt(r)) / (2 sqrt(r)) (y + g(y))

and the log-variance is ``log((1 + (1 - r) h) / r)``.
The network also sees which components a state may belong to, and where in these it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffsamp.networks.base import Context, LinenControl
from diffsamp.networks.controls import clip_outputs
from diffsamp.networks.fourier import FourierMLP
from diffsamp.schedules import NoiseSchedule
from diffsamp.types import Array, Params

_NARROWEST = 1e-4  # ratio of variances


class MixtureGuidedModule(nn.Module):
    """``u = clip(F(x, t)) + gain c`` and log-variances, c that of a mixture."""

    num_components: int
    schedule: NoiseSchedule
    width: int
    depth: int
    output_clip: float
    learn_variance: bool = False

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        size, count = x.shape[-1], self.num_components
        mixture = self.param("mixture", _normal, count, size, x.dtype)
        assert context.step_size is not None
        signal = jnp.asarray(self.schedule.signal(t), x.dtype)
        later = self.schedule.signal(t + context.step_size)
        keep = signal / jnp.asarray(later, x.dtype)
        share, local, score, curvature = _noised(mixture, signal, x)
        # Softmax of far states, and what is local there, may be large: they are inputs.
        inputs = jnp.concatenate([x, share, clip_outputs(local, 10.0)])
        mlp = FourierMLP(self.width, self.depth, size * (1 + self.learn_variance))
        out = mlp(inputs, t, context.condition)
        drift, log_variance = out[:size], jnp.nan_to_num(out[size:])
        root = jnp.sqrt(keep)
        drift = clip_outputs(drift, self.output_clip)
        drift += context.gain * (1 + root) / (2 * root) * (x + score)
        if self.learn_variance:
            ratio = jnp.maximum((1 + (1 - keep) * curvature) / keep, _NARROWEST)
            log_variance += jnp.log(ratio)
        return jnp.concatenate([drift, log_variance])


def _noised(mixture: Params, signal: Array, x: Array):
    """Of the noised mixture at x: shares [M], local coordinates, g and h, all [D]."""
    mixture = jax.lax.stop_gradient(mixture)

    def of_component(logit, mean, axes, widths):
        variances = signal * widths**2 + (1 - signal)
        z = axes.T @ (x - jnp.sqrt(signal) * mean)
        log_share = logit - 0.5 * jnp.sum(z**2 / variances + jnp.log(variances))
        local, score = z / jnp.sqrt(variances), -axes @ (z / variances)
        return log_share, local, score, score**2 - axes**2 @ (1 / variances)

    names = ("logits", "means", "axes", "widths")
    log_share, *others = jax.vmap(of_component)(*(mixture[name] for name in names))
    share = jax.nn.softmax(log_share)
    local, score, curvature = (share @ values for values in others)
    return share, local, score, curvature - score**2


def _normal(key, count, size, dtype) -> Params:
    del key
    return {
        "logits": jnp.zeros((count,), dtype),
        "means": jnp.zeros((count, size), dtype),
        "axes": jnp.broadcast_to(jnp.eye(size, dtype=dtype), (count, size, size)),
        "widths": jnp.ones((count, size), dtype),
    }


def mixture_guided(
    num_components: int,
    schedule: NoiseSchedule,
    width: int = 64,
    depth: int = 2,
    *,
    output_clip: float = 1e4,
    learn_variance: bool = False,
) -> LinenControl:
    """A Fourier MLP on top of the denoiser of a Gaussian mixture; no energy.

    The mixture is N(0, I) until `mixtures.with_mixture` puts another one in, and a
    constant in training.

    Args:
        num_components: M.
        schedule: the sampler's noise schedule; it must take JAX times.
        width: hidden width.
        depth: hidden layers.
        output_clip: bound on each output of the MLP.
        learn_variance: whether it also returns log-variances, see `Control`.

    Example:
        >>> import diffsamp as ds
        >>> schedule = ds.schedules.geometric(0.05)
        >>> ds.networks.mixture_guided(4, schedule).needs_score
        False
    """
    module = MixtureGuidedModule(
        num_components, schedule, width, depth, output_clip, learn_variance
    )
    return LinenControl(module, needs_score=False)
