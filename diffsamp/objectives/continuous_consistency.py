"""The continuous-time consistency loss, sCM. Lu and Song 2024, arXiv 2410.11081.

Along the teacher's flow ``dx/dt = v(x, t)`` a consistency function f does not change:

    g = df/dt = d_t f(x_t, t) + d_x f(x_t, t) v(x_t, t) = 0.

Two times that come together turn consistency distillation into

    loss = mean |(f(x_t, t) - sg(f(x_t, t) + (1 - t) g / (|g| / D^(1/2) + c)))
                 / (1 - t)|^2 / D

with g in deviations of the reference; |g| is the norm and the paper's c is 0.1. Its
gradient moves f(x_t, t) to where f says the path ends a moment later, at t + dt, nearer
to t = 1 where f is the identity. The normalisation keeps early, steep times from
drowning all others; 1 - t is about the factor of the network in f, so that late times
learn as fast. The value says little (it is near 1 as long as |g| >> c); the metric
``tangent`` is the root mean square of g. A network with fast oscillations in time has a
derivative that is mostly noise: `networks.consistency` has none.

With ``d tau = d log alpha^2`` and the score that the teacher's kernels stand for (see
`solvers`), ``v = (d tau / dt) (score + y) / 2`` in unit coordinates. States are last
states of the batch, noised by the process to the start t of a step of the teacher's
grid (to a thousandth instead of 0, where noise schedules have no slope to speak of): no
path is integrated, and states are as good as the behaviour's. At t = 0 itself, from
where a student draws in one step, it is so trusted to be about as it is a thousandth
later, when the process has kept alpha of the target's mean, 0.08 with
`schedules.geometric(0.05)`: where the reference is off the target's centre the ends
are, by as much of that distance. The teacher's control is asked there as if it had been
learned there; a network says what it learned at 0, and then v is up to 45 % too small
in the first step. One energy gradient per row where the teacher looks at scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._distributions import standard_normal
from diffsamp.deterministic import probability_flow
from diffsamp.objectives.common import keep_state, row_mean
from diffsamp.objectives.teachers import (
    check_boundary,
    check_pair,
    check_teacher,
)
from diffsamp.sampler import Sampler
from diffsamp.solvers import is_exact
from diffsamp.types import Cost, Objective, Params, Requirements

_START, _NUDGE = 1e-3, 1e-6  # of time; the latter for the schedule's derivative


def continuous_consistency(
    teacher: Sampler, teacher_params: Params, *, damping: float = 0.1
) -> Objective:
    """How much the student's prediction changes along the teacher's flow.

    To be trained slowly, by Adam at 1e-3 or less: each prediction is fitted to others
    of its own, and larger steps may undo in some thousand updates what they reached.

    Args:
        teacher: a trained sampler with a probability flow, on its grid of times.
        teacher_params: its parameters, ``fit.params``.
        damping: c, in deviations of the reference per unit of time.

    Raises:
        ValueError: when damping is not positive, or the teacher has no flow, other
            parameters than these or is untrained (as far as that can be told: not where
            all of its initial parameters are random, or none is); at the start of
            training when the student is no `samplers.cdds`, its network is not the
            identity at t = 1, or it has another dimension, size of conditions,
            reference or noise schedule.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> teacher = ds.samplers.dis(dim=2, num_steps=32, scale=4.0)
        >>> fit = ds.fit(
        ...     jax.random.key(0), teacher, ds.objectives.log_variance(), target.energy,
        ...     num_updates=2, batch_size=8, progress_bar=False,
        ... )
        >>> objective = ds.objectives.continuous_consistency(teacher, fit.params)
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    check_teacher(teacher, teacher_params)
    rates = _rates(teacher)

    def init(key, sampler, params, energy, pilot):
        del key, params, energy, pilot
        sampler.check_predicts_end()
        check_pair(teacher, sampler)
        check_boundary(sampler)
        return {}, jax.tree.map(jnp.asarray, teacher_params)

    def loss(params, teacher_params, batch):
        student, steps = batch.sampler, teacher.steps()
        for_time, for_noise = jax.random.split(batch.key)
        ends = jax.lax.stop_gradient(batch.paths.xs[:, -1])
        size, dtype = ends.shape[0], ends.dtype
        place = jax.random.randint(for_time, (size,), 0, teacher.num_steps)
        columns = (jnp.asarray(column, dtype) for column in rates)
        time, alpha, sigma, speed = (column[place] for column in columns)
        condition = batch.condition if batch.condition.shape[-1] else None

        def of_row(key, place, end, time, alpha, sigma, speed, condition):
            step = jax.tree.map(lambda column: column[place], steps)
            step = step._replace(time=time)
            noise = standard_normal(key, end.shape, dtype)
            y = alpha * teacher.unit(end) + sigma * noise
            x = teacher.original(y)
            score = teacher.score_at(batch.energy, x, condition)
            control = teacher.flow_control(teacher_params, step, x, score, condition)
            velocity = speed * control
            one = jnp.ones((), dtype)

            def f(params, y, t):
                x = student.original(y)
                return student.unit(student.predicted_end(params, t, x, condition))

            fixed = jax.lax.stop_gradient(params["sampler"])
            said_fixed, tangent = jax.jvp(
                lambda y, t: f(fixed, y, t), (y, time), (velocity, one)
            )
            size_of = jnp.sqrt(jnp.mean(tangent**2))
            wanted = said_fixed + (1 - time) * tangent / (size_of + damping)
            said = f(params["sampler"], y, time)
            miss = (said - jax.lax.stop_gradient(wanted)) / (1 - time)
            return jnp.mean(miss**2), size_of**2

        keys = jax.random.split(for_noise, size)
        rows = (keys, place, ends, time, alpha, sigma, speed, condition)
        values, squares = jax.vmap(of_row)(*rows)
        usable = jnp.isfinite(values)
        value = row_mean(values, usable)
        tangent = jnp.sqrt(row_mean(jax.lax.stop_gradient(squares), usable))
        gradients = size if teacher.needs_score else 0
        cost = Cost(0, gradients, 4 * size)  # a tangent as much as an evaluation
        return value, {"cost": cost, "tangent": tangent}

    return Objective(Requirements(), init, loss, keep_state)


def _rates(teacher):
    """Time, alpha, sigma and factor on c in v where steps start, [K] each."""
    times = teacher.process.coefficients(teacher.num_steps).times
    times, later = np.maximum(times[:-1], _START), times[1:]
    signal = teacher.process.schedule.signal
    low, high = times - _NUDGE, times + _NUDGE
    speed = (np.log(signal(high)) - np.log(signal(low))) / (high - low)
    alpha = np.sqrt(signal(times))
    share = np.ones(teacher.num_steps)  # (score + y) / c
    if is_exact(probability_flow(teacher).grid):
        share = 2 * alpha / (alpha + np.sqrt(signal(later)))
    return times, alpha, np.sqrt(1 - alpha**2), 0.5 * speed * share
