"""What the distillation objectives share: a trained sampler that a student follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.deterministic import probability_flow
from diffsamp.networks import Tied
from diffsamp.sampler import Sampler
from diffsamp.solvers import pair_weights
from diffsamp.types import Array, Energy, Params

_LEARNED = ("generation", "backbone")  # what the flow depends on


def check_teacher(teacher: Sampler, params: Params) -> None:
    """Raises where a sampler cannot teach: it has no flow, or was never trained.

    Initial parameters are partly drawn and partly given: biases are zero, and so are
    last layers that start at zero. Training moves them, so that a sampler is untrained
    if every given one is where it starts. Where all are drawn, or all are given, as of
    a function that returns its fitted parameters, nobody can tell, and it may teach.
    """
    teacher.check_flow()
    teacher.check_params(params)
    draws = [teacher.init(jax.random.key(seed)) for seed in range(2)]
    rows = zip(*(_leaves(teacher, p) for p in (params, *draws)), strict=True)
    given, drawn = [], False
    for now, first, second in rows:
        if np.array_equal(first, second):
            given.append(np.allclose(now, first, rtol=1e-6, atol=0))
        else:
            drawn = True
    if drawn and given and all(given):
        raise ValueError(
            "the teacher's parameters are those of an untrained sampler: none that "
            "starts from a given value has moved; train it first and give fit.params"
        )


def follow(
    teacher: Sampler,
    params: Params,
    energy: Energy,
    condition: Array | None,
    second_order: bool,
):
    """``(k, x) -> x`` along the teacher's flow: over step k, or over pair k of them.

    A pair is taken as `solvers.linear_end` does.
    """
    steps = teacher.steps()

    def control_at(k, x):
        step = jax.tree.map(lambda column: column[k], steps)
        score = teacher.score_at(energy, x, condition)
        control = teacher.flow_control(params, step, x, score, condition)
        return control, 1 - step.generation_decay

    def one(k, x):
        control, share = control_at(k, x)
        return teacher.original(teacher.unit(x) + share * control)

    if not second_order:
        return one
    of_first, of_second = weights_of_pairs(teacher)

    def two(k, x):
        y = teacher.unit(x)
        now, share = control_at(2 * k, x)
        later, _ = control_at(2 * k + 1, teacher.original(y + share * now))
        return teacher.original(y + of_first[k] * now + of_second[k] * later)

    return two


def weights_of_pairs(sampler: Sampler) -> tuple[Array, Array]:
    """Factors on the two controls of each pair of steps, `solvers.pair_weights`."""
    dtype = jax.dtypes.canonicalize_dtype(float)
    first, second = pair_weights(probability_flow(sampler).grid)
    return jnp.asarray(first, dtype), jnp.asarray(second, dtype)


def check_second_order(sampler: Sampler, num_steps: int) -> None:
    """Raises where so many of a sampler's steps cannot be taken in pairs."""
    if num_steps % 2:
        raise ValueError(
            "second_order=True takes the teacher's steps in pairs: their number (of "
            "progressive_distillation: in one step of the student) must be even, got "
            f"{num_steps}"
        )
    if sampler.finest not in (None, sampler.num_steps):
        raise ValueError(
            "second_order=True takes controls that were trained as kernels: a sampler "
            "for many step counts with its training grid's "
            f"{sampler.finest} steps, got {sampler.num_steps}, of which it knows "
            "displacements; leave second_order=True out, or take all its steps"
        )
    weights_of_pairs(sampler)  # refuses Euler steps


def _leaves(teacher, params):
    parts = {name: params[name] for name in _LEARNED if name in params}
    if isinstance(teacher.generation, Tied):
        parts["generation"] = parts["generation"]["flow"]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parts)]


def check_pair(teacher: Sampler, student: Sampler) -> None:
    """Raises where teacher and student differ in more than their networks.

    Students that take steps of a flow have the teacher's process; those that predict
    its end (`samplers.cdds`) one of the same noise schedule.
    """
    same = ("dim", "condition_dim", "loc", "scale")
    pairs = [(name, getattr(teacher, name), getattr(student, name)) for name in same]
    for i, (name, *both) in enumerate(pairs):
        if teacher.dim == student.dim and name in ("loc", "scale"):
            numbers = (np.broadcast_to(v, (teacher.dim,)).tolist() for v in both)
            pairs[i] = (name, *numbers)
    a, b = teacher.process, student.process
    of_a, of_b = (getattr(process, "schedule", None) for process in (a, b))
    pairs.append(("schedule", of_a, of_b))
    if b.has_flow:
        pairs.append(("kind of process", type(a).__name__, type(b).__name__))
    for name, of_teacher, of_student in pairs:
        if of_teacher != of_student:
            raise ValueError(
                f"teacher and student must have the same {name}, got {of_teacher!r} of "
                f"the teacher and {of_student!r} of the student; build the student "
                "with the teacher's"
            )


def check_boundary(student: Sampler) -> None:
    """Raises where a student's prediction of the end is not the identity at the end.

    Such a function is consistent, with a loss of zero, if it always says the same.
    Asked of initial parameters, and of others, since it has to hold for all.
    """
    with jax.ensure_compile_time_eval():  # also where only shapes are asked for
        params = student.init(jax.random.key(0))
        x = student.original(jnp.linspace(-1.0, 1.0, student.dim + 1)[1:])
        condition = None
        if student.condition_dim:
            condition = jnp.zeros((student.condition_dim,), x.dtype)
        for moved in (params, jax.tree.map(_elsewhere, params)):
            end = student.predicted_end(moved, jnp.ones((), x.dtype), x, condition)
            y, y_end = (np.asarray(student.unit(v)) for v in (x, end))
            if not np.allclose(y, y_end, atol=1e-4):
                raise ValueError(
                    "the student's network must predict x itself at t = 1, where the "
                    f"path ends; at {y} (unit coordinates) it predicts {y_end}. A "
                    "consistency loss can be zero for no reason without it: use "
                    "ds.networks.consistency, or ((1 - t) F(x, t) + t x) with your F"
                )


def _elsewhere(leaf):
    leaf = jnp.asarray(leaf)
    return leaf + 0.1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
