"""Consistency distillation, CDDS. Jutras-Dubé et al., arXiv 2502.07579.

A trained sampler's probability flow takes a draw of the reference through the times of
its grid. With f(x, t) the student's consistency function and t < t' two neighbouring
times of a coarser grid on the same path,

    loss = mean |f(x_t, t) - sg f(x_t', t')|^2 / (D s^2),

in squared deviations s of the reference per coordinate: f is to say the same all along
the path, and at t = 1 it is the identity, so that it says where the path ends. As in
the paper the pair of times is the same for the whole batch and a path is integrated no
further than its later time; targets are the student's own, without an average. With
``second_order`` steps are taken in pairs (`solvers.linear_end`), and the coarser grid
is one of the pairs.

With ``whole_paths`` each path is followed to its end, which is the target at all of its
times,

    loss = mean |f(x_t, t) - x_1|^2 / (D s^2).

The minimum is the same, for a path has one end; but no error of f at a later time is
handed on to the earlier ones, pair by pair, and every time of a path counts. It takes
about twice the teacher's calls, and half of the student's per time.

Paths are the teacher's, from the reference, whatever the behaviour brings: other terms
of a `weighted_sum` may use it. Each step of them costs an energy gradient per row where
the teacher looks at scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import meshes
from diffsamp._distributions import standard_normal
from diffsamp.objectives.common import keep_state, row_mean
from diffsamp.objectives.teachers import (
    check_boundary,
    check_pair,
    check_second_order,
    check_teacher,
    follow,
)
from diffsamp.sampler import Sampler
from diffsamp.types import Cost, Objective, Params, Requirements


def consistency_distillation(
    teacher: Sampler,
    teacher_params: Params,
    *,
    num_times: int = 18,
    second_order: bool = False,
    whole_paths: bool = False,
) -> Objective:
    """Squared distance of the student's predictions at two times of a teacher's path.

    Args:
        teacher: a trained sampler with a probability flow; paths have its steps.
        teacher_params: its parameters, ``fit.params``.
        num_times: times of the coarse grid, both ends included; spread evenly over
            those of the teacher's.
        second_order: whether the teacher's steps are taken in pairs, at the same cost
            and with less error; the paper's are not.
        whole_paths: whether predictions at all times of a path are compared with where
            it ends; the paper's is one pair of times, and a path up to there.

    Raises:
        ValueError: when the teacher has no flow, is untrained (as far as that can be
            told: not where all of its initial parameters are random, or none is), has
            other parameters than these, fewer than ``num_times - 1`` steps or pairs, or
            is one whose steps cannot be taken in pairs where they are to be; at the
            start of training when the student is no `samplers.cdds`, its network is not
            the identity at t = 1, or it has another dimension, size of conditions,
            reference or noise schedule.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> teacher = ds.samplers.dis(dim=2, num_steps=32, scale=4.0)
        >>> fit = ds.fit(
        ...     jax.random.key(0), teacher, ds.objectives.log_variance(), target.energy,
        ...     num_updates=2, batch_size=8, progress_bar=False,
        ... )
        >>> objective = ds.objectives.consistency_distillation(teacher, fit.params)
    """
    check_teacher(teacher, teacher_params)
    if second_order:
        check_second_order(teacher, teacher.num_steps)
    stride = 2 if second_order else 1
    num_moves = teacher.num_steps // stride
    if not 2 <= num_times <= num_moves + 1:
        of_pairs = " between pairs of steps" if second_order else ""
        raise ValueError(
            "num_times must be between 2 and the number of the teacher's times"
            f"{of_pairs}, {num_moves + 1}, got {num_times}"
        )
    places = np.round(np.linspace(0, num_moves, num_times)).astype(np.int32)

    def init(key, sampler, params, energy, pilot):
        del key, params, energy, pilot
        sampler.check_predicts_end()
        check_pair(teacher, sampler)
        check_boundary(sampler)
        return {}, jax.tree.map(jnp.asarray, teacher_params)

    def loss(params, teacher_params, batch):
        student, steps = batch.sampler, teacher.steps()
        for_pair, for_start = jax.random.split(batch.key)
        size = batch.on_policy.shape[0]
        stops = jnp.asarray(places)
        if not whole_paths:
            index = jax.random.randint(for_pair, (), 0, num_times - 1)
            stops = stops[index + jnp.arange(2)]
        begins = jnp.append(jnp.zeros((1,), stops.dtype), stops[:-1])
        times = jnp.append(steps.time, steps.next_time[-1])[::stride][stops]
        condition = batch.condition if batch.condition.shape[-1] else None

        def of_row(key, condition):
            advance = follow(
                teacher, teacher_params, batch.energy, condition, second_order
            )

            def go(x, ends):
                begin, stop = ends
                x = jax.lax.fori_loop(begin, stop, advance, x)
                return x, x

            noise = standard_normal(key, (teacher.dim,), times.dtype)
            _, xs = jax.lax.scan(go, teacher.original(noise), (begins, stops))
            xs, own = jax.lax.stop_gradient(xs), params["sampler"]
            predict = jax.vmap(student.predicted_end, in_axes=(None, 0, 0, None))
            said = predict(own, times[:-1], xs[:-1], condition)
            if whole_paths:
                wanted = xs[-1:]
            else:
                fixed = jax.lax.stop_gradient(own)
                wanted = predict(fixed, times[1:], xs[1:], condition)
            return jnp.mean((student.unit(said) - student.unit(wanted)) ** 2)

        keys = meshes.spread(batch.mesh, jax.random.split(for_start, size))
        values = jax.vmap(of_row)(keys, condition)
        value = row_mean(values, jnp.isfinite(values))
        calls = stride * stops[-1]
        num_predictions = num_times - 1 if whole_paths else 2
        gradients = size * calls if teacher.needs_score else 0
        cost = Cost(0, gradients, size * (calls + num_predictions))
        return value, {"cost": cost, "consistency": value}

    return Objective(Requirements(), init, loss, keep_state)
