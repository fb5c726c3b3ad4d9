"""What the distillation objectives share: a trained sampler that a student follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp.networks import Context, LinenControl
from diffsamp.sampler import Sampler
from diffsamp.types import Params


def check_teacher(teacher: Sampler, params: Params) -> None:
    """Raises where a sampler cannot teach: it has no flow, or was never trained."""
    teacher.check_flow()
    control = teacher.generation
    control = getattr(control, "network", control)  # of a `ReducedPrecision`
    if not isinstance(control, LinenControl) or teacher.backbone is not None:
        return
    # The last layer starts at zero: without training the draw of the rest of the
    # parameters makes no difference.
    fresh = teacher.init(jax.random.key(0))["generation"]
    points = jax.random.normal(jax.random.key(1), (16, teacher.dim))
    times = jnp.linspace(0.1, 0.9, 16)
    condition = jnp.zeros((teacher.condition_dim,)) if teacher.condition_dim else None
    context = Context(
        score=jnp.zeros((teacher.dim if control.needs_score else 0,)),
        gain=jnp.ones(()),
        condition=condition,
        step_size=jnp.ones(()),
    )

    @jax.jit
    def outputs(params):
        return jax.vmap(lambda x, t: control(params, x, t, context))(points, times)

    if np.allclose(outputs(params["generation"]), outputs(fresh), atol=1e-7):
        raise ValueError(
            "the teacher's control is that of an untrained sampler; train it first and "
            "give fit.params"
        )


def check_pair(teacher: Sampler, student: Sampler) -> None:
    """Raises where teacher and student differ in more than their networks."""
    same = ("dim", "loc", "scale", "condition_dim")
    pairs = [(name, getattr(teacher, name), getattr(student, name)) for name in same]
    schedules = [getattr(s.process, "schedule", None) for s in (teacher, student)]
    for name, of_teacher, of_student in [*pairs, ("schedule", *schedules)]:
        if of_teacher != of_student:
            raise ValueError(
                f"teacher and student must have the same {name}, got {of_teacher!r} "
                f"and {of_student!r}"
            )
