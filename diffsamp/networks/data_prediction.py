"""A control that predicts the end of the path, and steps there as DDIM does.

The network says x_hat(x, t, d), where the path is thought to end, in unit coordinates.
With signal alpha and noise sigma at the start of a step and alpha', sigma' at its end,
the probability flow with a constant x_hat goes to

    y' = (sigma' / sigma) y + (alpha' - alpha sigma' / sigma) x_hat

(Song et al. 2021, arXiv 2010.02502), and the control is the one whose flow step is
that: a single step from the reference arrives at x_hat itself. The network corrects the
prediction ``(1 - sigma' / sigma) / (alpha' - alpha sigma' / sigma) y``, which goes to y
itself in one step and is alpha y, the mean for a target N(0, I), in short ones: without
training the flow stands still.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from diffsamp.networks.base import Context, LinenControl
from diffsamp.networks.fourier import FourierMLP
from diffsamp.schedules import NoiseSchedule
from diffsamp.types import Array


class DataPredictionModule(nn.Module):
    """``u = gain c``, c of the step to a prediction that the network corrects."""

    width: int
    depth: int
    schedule: NoiseSchedule
    learn_variance: bool = False
    octaves: int = 0

    @nn.compact
    def __call__(self, x: Array, t: Array, context: Context) -> Array:
        size = x.shape[-1]
        num_outputs = size * (1 + self.learn_variance)
        size_of = self.width, self.depth, num_outputs
        mlp = FourierMLP(*size_of, octaves=self.octaves)
        out = mlp(x, t, context.condition, context.step_size)
        assert context.step_size is not None
        signals = (self.schedule.signal(time) for time in (t, t + context.step_size))
        (alpha, sigma), (next_alpha, next_sigma) = (
            (jnp.sqrt(s), jnp.sqrt(jnp.maximum(1 - s, 0.0))) for s in signals
        )
        share = next_alpha - alpha * next_sigma / sigma
        control = share * out[:size] / (1 - alpha / next_alpha)
        return jnp.concatenate([context.gain * control, out[size:]])


def data_prediction(
    schedule: NoiseSchedule,
    width: int = 64,
    depth: int = 2,
    *,
    learn_variance: bool = False,
    octaves: int = 0,
) -> LinenControl:
    """A step-conditioned network that predicts the end of the path; no energy.

    Args:
        schedule: the sampler's noise schedule; it must take JAX times. Exponential
            steps lead to the predicted end, those of
            `processes.EulerVariancePreserving` do not.
        width: hidden width.
        depth: hidden layers.
        learn_variance: whether it also returns log-variances, see `Control`.
        octaves: as in `networks.free`.

    Example:
        >>> import diffsamp as ds
        >>> schedule = ds.schedules.geometric(0.05)
        >>> sampler = ds.samplers.scds(
        ...     dim=2, schedule=schedule, network=ds.networks.data_prediction(schedule)
        ... )
    """
    module = DataPredictionModule(width, depth, schedule, learn_variance, octaves)
    return LinenControl(module, needs_score=False)
