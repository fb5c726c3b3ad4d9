"""The probability flow of a Gaussian target, known exactly: what flows are held to."""

import jax.numpy as jnp
import numpy as np

import diffsamp as ds

LOC, SCALE = (0.4, -0.3), (1.8, 1.5)
MEAN, SD = (
    np.array([0.7, -0.2]),
    np.array([0.3, 1.4]),
)  # of the target, unit coordinates


def signal(schedule, t):
    """`NoiseSchedule.signal` of a geometric or linear schedule, differentiable."""
    if isinstance(schedule, ds.schedules.GeometricNoise):
        square = schedule.smallest_scale**2
        share = 1 - (square**t - square) / (1 - square)
        return jnp.maximum(share, schedule.floor)
    slope = schedule.beta_target - schedule.beta_reference
    return jnp.exp(-(schedule.beta_reference * (1 - t) + 0.5 * slope * (1 - t**2)))


def moved(schedule, y, start, end, mean=MEAN, sd=SD):
    """Where the flow takes y from one time to another: marginals keep quantiles."""
    mean, sd = (jnp.asarray(value, y.dtype) for value in (mean, sd))

    def moments(t):
        share = signal(schedule, jnp.asarray(t, y.dtype))
        return jnp.sqrt(share) * mean, jnp.sqrt(share * sd**2 + 1 - share)

    (m, s), (m_next, s_next) = moments(start), moments(end)
    return m_next + s_next / s * (y - m)


def score_control(schedule, sd=SD):
    """The control of the exact score."""

    def drift(params, y, t, context):
        share = signal(schedule, t)
        mean, spread = jnp.asarray(MEAN, y.dtype), jnp.asarray(sd, y.dtype)
        score = (jnp.sqrt(share) * mean - y) / (share * spread**2 + 1 - share)
        return context.gain * (score + y)

    return ds.networks.from_function(lambda key, dim: (), drift)


def kernel_control(schedule, mean=MEAN, sd=SD):
    """The control of the best kernels: their mean is the expected next state."""

    def drift(params, y, t, context):
        now, later = signal(schedule, t), signal(schedule, t + context.step_size)
        decay = jnp.sqrt(now / later)
        m, s = jnp.asarray(mean, y.dtype), jnp.asarray(sd, y.dtype)
        shrink = (later * s**2 + 1 - later) / (now * s**2 + 1 - now)
        expected = jnp.sqrt(later) * m + decay * shrink * (y - jnp.sqrt(now) * m)
        return context.gain * (expected - decay * y) / (2 * (1 - decay))

    return ds.networks.from_function(lambda key, dim: (), drift)


def step_control(schedule, offset=0.0):
    """The control whose flow step is exact for every length; a wrong one at offset."""

    def drift(params, y, t, context):
        decay = jnp.sqrt(signal(schedule, t) / signal(schedule, t + context.step_size))
        end = t + context.step_size
        target = params["mean"], params["sd"]
        displacement = moved(schedule, y, t, end, *target) - y
        wrong = offset * context.step_size**2
        return context.gain * (displacement + wrong) / (1 - decay)

    def init(key, dim):
        return {"mean": jnp.asarray(MEAN), "sd": jnp.asarray(SD)}

    return ds.networks.from_function(init, drift)


def end_prediction(schedule, offset=0.0):
    """The consistency function; a wrong one, right at t = 1, at offset."""

    def drift(params, y, t, context):
        end = moved(schedule, y, t, 1.0, params["mean"], params["sd"])
        return context.gain * (end + offset * (1 - t))

    return ds.networks.from_function(step_control(schedule).init_fn, drift)
