"""One small network for every coordinate, which knows the others by a summary.

A network of one width for a whole state has to learn each coordinate's own function
anew. Where coordinates depend on one another little, or through the target score, it
is enough to learn one function

    out_i = f(x_i, score_i, e_i, g(x, t)),

with e_i a learned embedding of the index and g the features of a Fourier MLP of state,
time, condition and step: the shared-weights idea of DeepSets (Zaheer et al. 2017, arXiv
1703.06114), with an index, since coordinates of a posterior are not exchangeable. Its
parameters grow by ``2 width`` for each coordinate.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from diffsamp.networks.base import Context, LinenControl
from diffsamp.networks.controls import annealed_guide, clip_outputs
from diffsamp.networks.fourier import FourierMLP, TimeScale, with_octaves
from diffsamp.types import Array


class CoordinatewiseModule(nn.Module):
    """``u_i = clip(f_i) + gain a(t) [clip(s_t) - offset s_0]_i``, see `controls`."""

    width: int
    depth: int
    output_clip: float
    score_clip: float = 1e2
    offset: float = 1.0
    use_score: bool = True
    learn_variance: bool = False
    step_conditioned: bool = False
    octaves: int = 0
    highest: float = 100.0  # frequency of time and step

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        step_size = context.step_size if self.step_conditioned else None
        mlp = FourierMLP(self.width, 1, None, self.highest)
        summary = mlp(x, t, context.condition, step_size)
        dtype = summary.dtype
        own = with_octaves(x[:, None], self.octaves)
        if self.use_score:
            score = clip_outputs(context.score, self.score_clip)
            own = jnp.concatenate([own, jnp.arcsinh(score)[:, None]], axis=1)
        embedding = self.param(
            "embedding", nn.initializers.normal(0.5), (len(x), self.width), dtype
        )
        hidden = nn.Dense(self.width, param_dtype=dtype)(own) + embedding
        hidden += nn.Dense(self.width, param_dtype=dtype)(summary)[None, :]
        for _ in range(self.depth):
            hidden = nn.Dense(self.width, param_dtype=dtype)(nn.gelu(hidden))
        out = nn.Dense(
            1 + self.learn_variance,
            kernel_init=nn.initializers.zeros,
            param_dtype=dtype,
        )(nn.gelu(hidden))
        drift = clip_outputs(out[:, 0], self.output_clip)
        if self.use_score:
            scale = TimeScale(self.width, len(x))(t)
            guide = annealed_guide(x, t, score, self.offset)
            drift += context.gain * scale * guide
        return jnp.concatenate([drift, jnp.nan_to_num(out[:, 1:]).ravel()])


def coordinatewise(
    width: int = 32,
    depth: int = 2,
    *,
    output_clip: float = 1e4,
    score_clip: float = 1e2,
    offset: float = 1.0,
    use_score: bool = True,
    learn_variance: bool = False,
    step_conditioned: bool = False,
    octaves: int = 0,
) -> LinenControl:
    """One network for all coordinates, and the score as `annealed_score_guided` has it.

    For targets of many coordinates that depend on one another little, or through the
    score. It costs about as much as a `free` network of ``sqrt(D)`` times its width.

    Args:
        width: hidden width.
        depth: hidden layers.
        output_clip: bound on each output of the network.
        score_clip: bound on each coordinate of the score in unit coordinates.
        offset: 1 if the process contains the reference drift, else 0.
        use_score: whether it asks for the energy gradient, as an input and as a guide.
        learn_variance: whether it also returns log-variances, see `Control`.
        step_conditioned: whether it sees the length of the step.
        octaves: of each coordinate, as in `networks.free`.

    Example:
        >>> import diffsamp as ds
        >>> network = ds.networks.coordinatewise(learn_variance=True)
        >>> sampler = ds.samplers.dis(dim=32, network=network)
    """
    module = CoordinatewiseModule(
        width,
        depth,
        output_clip,
        score_clip,
        offset,
        use_score,
        learn_variance,
        step_conditioned,
        octaves,
    )
    return LinenControl(module, needs_score=use_score)
