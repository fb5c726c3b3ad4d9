"""Progressive distillation. Salimans and Ho 2022, arXiv 2202.00512.

A student of K steps learns to go in one step of the probability flow where a teacher
goes in m of its own, on a grid of m K steps:

    loss = mean |F_student(x_k; t_k, t_{k+1}) - F_teacher^m(x_k)|^2 / (D s^2)

in squared deviations s of the reference per coordinate. The paper has m = 2 and halves
the number of steps again and again, each student being the next teacher; m = K of the
teacher, with a student of one step, is plain regression on the ends of its paths. A
teacher trained at its own step count errs least if its steps are taken in pairs
(``second_order``, see `solvers.linear_end`); a student that teaches has learned
displacements, and its steps are taken one by one.

States come from whatever behaviour there is. A step of the teacher costs an energy
gradient per row where the teacher looks at scores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.objectives.common import keep_state, row_mean
from diffsamp.objectives.teachers import (
    check_pair,
    check_second_order,
    check_teacher,
    follow,
)
from diffsamp.sampler import Sampler
from diffsamp.types import Cost, Objective, Params, Requirements


def progressive_distillation(
    teacher: Sampler, teacher_params: Params, *, second_order: bool = False
) -> Objective:
    """Squared distance of one step of the flow to a teacher's m steps.

    Args:
        teacher: a trained sampler with a probability flow.
        teacher_params: its parameters, ``fit.params``.
        second_order: whether its steps are taken in pairs, at the same cost; m is even.

    Raises:
        ValueError: when the teacher has no flow, other parameters than these or is
            untrained (as far as that can be told: not where all of its initial
            parameters are random, or none is); at the start of training when the
            student has no flow or another dimension, size of conditions, reference,
            noise schedule or kind of process, its times are not every m-th time of
            the teacher's, or m is odd where steps are to be taken in pairs.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> teacher = ds.samplers.scds(dim=2, num_steps=8, scale=4.0)
        >>> fit = ds.fit(
        ...     jax.random.key(0), teacher, ds.objectives.log_variance(), target.energy,
        ...     num_updates=2, batch_size=8, progress_bar=False,
        ... )
        >>> objective = ds.objectives.progressive_distillation(teacher, fit.params)
        >>> half = ds.fit(
        ...     jax.random.key(1), teacher.with_num_steps(4), objective, target.energy,
        ...     params=fit.params, num_updates=2, batch_size=8, progress_bar=False,
        ... )
    """
    check_teacher(teacher, teacher_params)

    def init(key, sampler, params, energy, pilot):
        del key, params, energy, pilot
        sampler.check_flow()
        check_pair(teacher, sampler)
        num = teacher.num_steps
        nested = num % sampler.num_steps == 0 and num > sampler.num_steps
        if nested:
            fine, coarse = (
                s.process.coefficients(s.num_steps).times for s in (teacher, sampler)
            )
            nested = np.allclose(fine[:: num // sampler.num_steps], coarse, atol=1e-9)
        if not nested:
            raise ValueError(
                "the student's times must be every m-th time of the teacher's with m "
                f"of 2 or more; the student has {sampler.num_steps} steps and the "
                f"teacher {num}"
            )
        if second_order:
            check_second_order(teacher, num // sampler.num_steps)
        return {}, jax.tree.map(jnp.asarray, teacher_params)

    def loss(params, teacher_params, batch):
        student: Sampler = batch.sampler
        own = student.steps()
        times = teacher.num_steps // student.num_steps
        num_moves = times // 2 if second_order else times
        size = batch.on_policy.shape[0]
        place = jax.random.randint(batch.key, (size,), 0, student.num_steps)
        condition = batch.condition if batch.condition.shape[-1] else None

        def of_row(place, path, condition):
            x, score = path.xs[place], path.scores[place]

            move = follow(
                teacher, teacher_params, batch.energy, condition, second_order
            )

            def advance(x, i):
                return move(num_moves * place + i, x), None

            end, _ = jax.lax.scan(advance, x, jnp.arange(num_moves))
            end = jax.lax.stop_gradient(end)
            step = jax.tree.map(lambda column: column[place], own)
            reached = student.flow_step(params["sampler"], step, x, score, condition)
            return jnp.mean((student.unit(reached) - student.unit(end)) ** 2)

        paths = jax.lax.stop_gradient(batch.paths)
        values = jax.vmap(of_row)(place, paths, condition)
        value = row_mean(values, jnp.isfinite(values))
        gradients = size * times if teacher.needs_score else 0
        cost = Cost(0, gradients, size * (times + 1))
        return value, {"cost": cost, "distillation": value}

    return Objective(Requirements(), init, loss, keep_state)
