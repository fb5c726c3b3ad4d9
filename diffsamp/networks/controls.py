"""Controls built on the Fourier MLP: without, with and with annealed target score.

All clips act on network outputs and on score inputs, in unit coordinates, never on
states, noise or weights: the identity E[exp(log_weight)] = Z is untouched by them.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from diffsamp.networks.base import Context, LinenBackbone, LinenControl
from diffsamp.networks.fourier import FourierMLP, TimeScale
from diffsamp.types import Array


def clip_outputs(value: Array, bound: float) -> Array:
    """Within the bounds, and finite."""
    return jnp.clip(jnp.nan_to_num(value), -bound, bound)


def annealed_guide(x: Array, t: Array, score: Array, offset: float) -> Array:
    """``s_t - offset s_0``, see `AnnealedScoreModule`."""
    return (1 - t) * -x + t * score + offset * x


class _Head(nn.Module):
    """The learned part of a control: clipped drift [D], and all else that it returns.

    That is nothing, or log-variances [D]. An MLP, or a linear layer on the features of
    a shared backbone.
    """

    width: int
    depth: int
    output_clip: float
    learn_variance: bool
    step_conditioned: bool
    octaves: int

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> tuple[Array, Array]:
        size = x.shape[-1]
        num_outputs = size * (1 + self.learn_variance)
        if context.features is not None:
            if self.step_conditioned:
                raise ValueError(
                    "a step-conditioned control cannot build on a backbone, whose "
                    "features know no step; leave out backbone= or step_conditioned="
                )
            out = nn.Dense(
                num_outputs,
                kernel_init=nn.initializers.zeros,
                param_dtype=context.features.dtype,
            )(context.features)
        else:
            size_of = self.width, self.depth, num_outputs
            mlp = FourierMLP(*size_of, octaves=self.octaves)
            step_size = context.step_size if self.step_conditioned else None
            out = mlp(x, t, context.condition, step_size)
        drift, log_variance = out[:size], jnp.nan_to_num(out[size:])
        return clip_outputs(drift, self.output_clip), log_variance


def _head(module) -> _Head:
    """Of a module with the same fields."""
    return _Head(
        module.width,
        module.depth,
        module.output_clip,
        module.learn_variance,
        module.step_conditioned,
        module.octaves,
    )


class FreeModule(nn.Module):
    """``u = clip(F(x, t))``."""

    width: int
    depth: int
    output_clip: float
    learn_variance: bool = False
    step_conditioned: bool = False
    octaves: int = 0

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        head = _head(self)
        return jnp.concatenate(head(x, t, context))


class ScoreGuidedModule(nn.Module):
    """``u = clip(F(x, t)) + gain a(t) clip(score)``."""

    width: int
    depth: int
    output_clip: float
    score_clip: float
    initial_guidance: float
    learn_variance: bool = False
    step_conditioned: bool = False
    octaves: int = 0

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        head = _head(self)
        drift, rest = head(x, t, context)
        scale = TimeScale(self.width, x.shape[-1], self.initial_guidance)(t)
        guide = scale * clip_outputs(context.score, self.score_clip)
        return jnp.concatenate([drift + context.gain * guide, rest])


class AnnealedScoreModule(nn.Module):
    """``u = clip(F(x, t)) + gain a(t) [clip(s_t) - offset s_0]``.

    ``s_t = (1 - t) s_0 + t score`` interpolates the score of the reference N(0, I),
    ``s_0 = -x``, and that of the target. ``offset`` is 1 where the process already
    contains the reference's own drift (variance preserving) and 0 where it does not.
    """

    width: int
    depth: int
    output_clip: float
    score_clip: float
    offset: float
    learn_variance: bool = False
    step_conditioned: bool = False
    octaves: int = 0

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        head = _head(self)
        drift, rest = head(x, t, context)
        scale = TimeScale(self.width, x.shape[-1])(t)
        score = clip_outputs(context.score, self.score_clip)
        guide = context.gain * scale * annealed_guide(x, t, score, self.offset)
        return jnp.concatenate([drift + guide, rest])


class ReferenceGuidedModule(nn.Module):
    """``v = clip(F(x, t)) + gain a(t) (1 - t) s_0`` with ``s_0 = -x``; no energy."""

    width: int
    depth: int
    output_clip: float
    learn_variance: bool = False
    step_conditioned: bool = False
    octaves: int = 0

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        head = _head(self)
        drift, rest = head(x, t, context)
        guide = context.gain * TimeScale(self.width, x.shape[-1])(t) * (1 - t) * x
        return jnp.concatenate([drift - guide, rest])


def free(
    width: int = 64,
    depth: int = 2,
    *,
    output_clip: float = 1e4,
    learn_variance: bool = False,
    step_conditioned: bool = False,
    octaves: int = 0,
) -> LinenControl:
    """A Fourier MLP that never asks for the energy gradient.

    Args:
        width: hidden width.
        depth: hidden layers.
        output_clip: bound on each output.
        learn_variance: whether it also returns log-variances, see `Control`.
        step_conditioned: whether it sees the length of the step.
        octaves: of the state, which it sees beside it (`with_octaves`); four or five
            where a step has to lead neighbouring states to different modes.

    Example:
        >>> import diffsamp as ds
        >>> ds.networks.free(width=32).needs_score
        False
    """
    return LinenControl(
        FreeModule(
            width,
            depth,
            output_clip,
            learn_variance,
            step_conditioned,
            octaves,
        ),
        needs_score=False,
    )


def score_guided(
    width: int = 64,
    depth: int = 2,
    *,
    output_clip: float = 1e4,
    score_clip: float = 1e2,
    initial_guidance: float = 0.01,
    learn_variance: bool = False,
    step_conditioned: bool = False,
    octaves: int = 0,
) -> LinenControl:
    """Fourier MLP plus a learned multiple of the target score (PIS and DDS papers).

    Args:
        width: hidden width.
        depth: hidden layers.
        output_clip: bound on each output of the MLP.
        score_clip: bound on each coordinate of the score in unit coordinates.
        initial_guidance: factor on the score before training.
        learn_variance: whether it also returns log-variances, see `Control`.
        step_conditioned: whether it sees the length of the step.
        octaves: of the state, which it sees beside it (`with_octaves`); four or five
            where a step has to lead neighbouring states to different modes.
    """
    module = ScoreGuidedModule(
        width,
        depth,
        output_clip,
        score_clip,
        initial_guidance,
        learn_variance,
        step_conditioned,
        octaves,
    )
    return LinenControl(module, needs_score=True)


def annealed_score_guided(
    width: int = 64,
    depth: int = 2,
    *,
    output_clip: float = 1e4,
    score_clip: float = 1e2,
    offset: float = 1.0,
    learn_variance: bool = False,
    step_conditioned: bool = False,
    octaves: int = 0,
) -> LinenControl:
    """Fourier MLP plus the score interpolated from reference to target (DIS paper).

    Args:
        width: hidden width.
        depth: hidden layers.
        output_clip: bound on each output of the MLP.
        score_clip: bound on each coordinate of the score in unit coordinates. The
            papers use 10 on a reference of scale 1; a reference as wide as the target
            makes the same score larger, hence the wider default.
        offset: 1 if the process contains the reference drift, else 0.
        learn_variance: whether it also returns log-variances, see `Control`.
        step_conditioned: whether it sees the length of the step.
        octaves: of the state, which it sees beside it (`with_octaves`); four or five
            where a step has to lead neighbouring states to different modes.
    """
    module = AnnealedScoreModule(
        width,
        depth,
        output_clip,
        score_clip,
        offset,
        learn_variance,
        step_conditioned,
        octaves,
    )
    return LinenControl(module, needs_score=True)


def reference_guided(
    width: int = 64,
    depth: int = 2,
    *,
    output_clip: float = 1e4,
    learn_variance: bool = False,
    step_conditioned: bool = False,
    octaves: int = 0,
) -> LinenControl:
    """Fourier MLP plus the reference score fading out: the bridge's destruction drift.

    Args:
        width: hidden width.
        depth: hidden layers.
        output_clip: bound on each output of the MLP.
        learn_variance: whether it also returns log-variances, see `Control`.
        step_conditioned: whether it sees the length of the step.
        octaves: as in `free`.
    """
    module = ReferenceGuidedModule(
        width,
        depth,
        output_clip,
        learn_variance,
        step_conditioned,
        octaves=octaves,
    )
    return LinenControl(module, needs_score=False)


def backbone(width: int = 64, depth: int = 2) -> LinenBackbone:
    """A Fourier MLP for both kernels: every control becomes a linear layer on it.

    Args:
        width: hidden width, and the number of features.
        depth: hidden layers.

    Example:
        >>> import jax, diffsamp as ds
        >>> sampler = ds.samplers.dis(
        ...     dim=2, num_steps=4, learn_destruction=True,
        ...     backbone=ds.networks.backbone(width=32),
        ... )
        >>> sorted(sampler.init(jax.random.key(0)))
        ['backbone', 'destruction', 'generation']
    """
    return LinenBackbone(FourierMLP(width, depth, None), width)
