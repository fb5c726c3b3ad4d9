"""Distillation: zero on exact flows, and students that arrive where teachers do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gaussian_flow import (
    LOC,
    MEAN,
    SCALE,
    SD,
    end_prediction,
    kernel_control,
    moved,
    step_control,
)
from tables import LOG_Z, SMALL, batch_of_paths, counting_energy, skewed_energy

import diffsamp as ds
from diffsamp.objectives.teachers import check_pair

KEY = jax.random.key(0)
SCHEDULE = ds.schedules.geometric(0.1)
PROCESS = {"loc": LOC, "scale": SCALE, "schedule": SCHEDULE}
FREE = ds.networks.free(**SMALL, step_conditioned=True)


def teacher_of(network, num_steps, **options):
    return ds.samplers.scds(2, num_steps, network=network, **{**PROCESS, **options})


def student_of(network=None, **options):
    return ds.samplers.cdds(2, 2, network=network, **{**PROCESS, **options})


def consistency(teacher, num_times=5, **options):
    params = teacher.init(KEY)
    objective = ds.objectives.consistency_distillation
    return objective(teacher, params, num_times=num_times, **options)


def continuous(teacher):
    return ds.objectives.continuous_consistency(teacher, teacher.init(KEY))


def progressive(teacher):
    return ds.objectives.progressive_distillation(teacher, teacher.init(KEY))


def loss_of(objective, student):
    params = student.init(KEY)
    batch = batch_of_paths(student, params, 32, KEY)
    _, state = objective.init(KEY, student, params, skewed_energy, None)

    @jax.jit
    def run(params):
        both = {"sampler": params, "objective": {}}
        value, metrics = objective.loss(both, state, batch)
        return value, metrics

    return jax.tree.map(float, run(params))


def test_the_exact_student_has_no_loss(x64):
    teacher = teacher_of(step_control(SCHEDULE), 16)
    for objective, student, wrong in (
        (
            consistency(teacher),
            student_of(end_prediction(SCHEDULE)),
            student_of(end_prediction(SCHEDULE, 0.3)),
        ),
        (
            consistency(teacher, whole_paths=True),
            student_of(end_prediction(SCHEDULE)),
            student_of(end_prediction(SCHEDULE, 0.3)),
        ),
        (
            progressive(teacher),
            teacher_of(step_control(SCHEDULE), 4),
            teacher_of(step_control(SCHEDULE, 0.3), 4),
        ),
    ):
        assert loss_of(objective, student)[0] < 1e-20
        assert loss_of(objective, wrong)[0] > 1e-4


@pytest.mark.parametrize("second_order", [False, True])
def test_pairs_lose_less_than_steps(x64, second_order):
    """A student that knows the flow, and a teacher that has the best kernels."""
    teacher = teacher_of(kernel_control(SCHEDULE), 64)
    params, o = teacher.init(KEY), ds.objectives
    options = {"second_order": second_order}
    pairs = (
        (
            o.consistency_distillation(teacher, params, num_times=5, **options),
            student_of(end_prediction(SCHEDULE)),
        ),
        (
            o.progressive_distillation(teacher, params, **options),
            teacher_of(step_control(SCHEDULE), 4),
        ),
    )
    for objective, student in pairs:
        loss, metrics = loss_of(objective, student)
        assert loss < 1e-4 if second_order else loss > 1e-3
        calls = metrics["cost"].network / 32 - (2 if student is pairs[0][1] else 1)
        assert calls == 16 or (student is pairs[0][1] and calls in (16, 32, 48, 64))


def test_the_exact_prediction_does_not_change_along_the_flow(x64):
    teacher = teacher_of(kernel_control(SCHEDULE), 64)
    exact = student_of(end_prediction(SCHEDULE))
    wrong = student_of(end_prediction(SCHEDULE, 0.3))
    found, missed = (
        loss_of(continuous(teacher), s)[1]["tangent"] for s in (exact, wrong)
    )
    assert found < 1e-5  # the schedule's derivative is a difference
    assert missed == pytest.approx(0.3, rel=1e-4)  # d/dt of 0.3 (1 - t)


@pytest.mark.parametrize("coordinatewise", [False, True])
def test_the_end_is_the_identity_at_the_end(coordinatewise):
    network = ds.networks.consistency(**SMALL, coordinatewise=coordinatewise)
    student = student_of(network)
    params, x = student.init(KEY), jnp.array([1.3, -2.0])
    params = jax.tree.map(lambda leaf: leaf + 0.3, params)
    end = student.predicted_end(params, jnp.ones(()), x)
    np.testing.assert_allclose(end, x, rtol=1e-5)
    early = student.predicted_end(params, jnp.array(0.2), x)
    assert not np.any(np.isclose(early, x))


@pytest.mark.parametrize("coordinatewise", [False, True])
def test_no_prediction_of_a_step_is_farther_off_than_the_clip(coordinatewise):
    options = {"output_clip": 3.0, "coordinatewise": coordinatewise}
    student = student_of(ds.networks.consistency(**SMALL, **options))
    params = jax.tree.map(lambda leaf: leaf + 9.0, student.init(KEY))
    y = jnp.array([100.0, -100.0])
    end = student.unit(
        student.predicted_end(params, jnp.zeros(()), student.original(y))
    )
    skip, gain = 0.25 / 1.25, 0.5 / np.sqrt(1.25)
    np.testing.assert_allclose(np.abs(end - skip * y), 3 * gain, rtol=1e-5)


@pytest.mark.slow
def test_a_step_noises_the_prediction(x64):
    """The mean of each kernel, from the definition."""
    student = student_of(ds.networks.consistency(**SMALL))
    params = jax.tree.map(lambda leaf: leaf + 0.1, student.init(KEY))
    keys = jax.random.split(KEY, 20_000)
    run = jax.vmap(student, in_axes=(None, 0, None))
    xs = jax.jit(lambda params: run(params, keys, skewed_energy).xs)(params)
    alpha = np.sqrt(SCHEDULE.signal(np.array([0.5, 1.0])))
    for k, time in enumerate((0.0, 0.5)):
        predict = jax.vmap(student.predicted_end, in_axes=(None, None, 0))
        ends = predict(params, jnp.asarray(time), xs[:, k])
        noise = student.unit(xs[:, k + 1]) - alpha[k] * student.unit(ends)
        std = np.sqrt(1 - alpha[k] ** 2 + 0.01**2)
        np.testing.assert_allclose(np.mean(noise, 0), 0, atol=4 * std / np.sqrt(2e4))
        np.testing.assert_allclose(np.std(noise, 0), std, rtol=0.03)


OBJECTIVES = {
    "consistency": (ds.objectives.consistency_distillation, {"num_times": 5}),
    "whole_paths": (
        ds.objectives.consistency_distillation,
        {"num_times": 5, "whole_paths": True},
    ),
    "continuous": (ds.objectives.continuous_consistency, {}),
    "progressive": (ds.objectives.progressive_distillation, {}),
}
IN_PAIRS = {
    "consistency_in_pairs": (
        ds.objectives.consistency_distillation,
        {"num_times": 3, "second_order": True},
    ),
    "progressive_in_pairs": (
        ds.objectives.progressive_distillation,
        {"second_order": True},
    ),
}


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
@pytest.mark.parametrize("name", OBJECTIVES | IN_PAIRS)
def test_energies_are_counted(name):
    network = ds.networks.annealed_score_guided(**SMALL, step_conditioned=True)
    teacher = teacher_of(network, 4)
    params = jax.tree.map(lambda leaf: leaf + 0.1, teacher.init(KEY))
    make, options = (OBJECTIVES | IN_PAIRS)[name]
    flow = name.startswith("progressive")
    student = teacher.with_num_steps(2) if flow else student_of()
    energy, take = counting_energy(skewed_energy)
    fit = ds.fit(
        KEY,
        student,
        ds.objectives.weighted_sum(
            (ds.objectives.log_variance(), 1.0), (make(teacher, params, **options), 1.0)
        ),
        energy,
        num_updates=3,
        batch_size=8,
        progress_bar=False,
    )
    made = take()
    assert fit.num_energy_evaluations == made["energy"]
    assert fit.num_gradient_evaluations == made["gradient"] > 0


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_call_arrives_where_the_teacher_does(name):
    """From the best kernels of a shifted Gaussian of unequal scales."""
    teacher = teacher_of(kernel_control(SCHEDULE), 64)
    make, options = OBJECTIVES[name]
    options = options | ({"num_times": 9} if "num_times" in options else {})
    flow = name == "progressive"
    if flow:
        student = teacher_of(ds.networks.free(32, step_conditioned=True), 1)
    else:
        student = student_of(ds.networks.consistency(32))
    noise = jax.random.normal(KEY, (4_000, 2))
    points = student.original(MEAN[None] + SD[None] * noise)
    fit = ds.fit(
        KEY,
        student,
        make(teacher, {"generation": ()}, **options),
        skewed_energy,
        behaviour=ds.behaviours.reference_draws(points),
        optimizer=optax.adam(1e-3 if name == "continuous" else 3e-3),
        anneal=ds.schedules.cosine_anneal,
        num_updates=3_000,
        batch_size=128,
        progress_bar=False,
    )
    x = student.original(jax.random.normal(KEY, (500, 2)))
    solve = jax.vmap(ds.probability_flow(teacher).solve, in_axes=(None, 0, None))
    of_teacher = solve({"generation": ()}, x, skewed_energy)
    if name == "continuous":  # of the flow itself, not of its 64 steps
        of_teacher = student.original(exact_flow(student.unit(x)))
    if flow:
        step = jax.tree.map(lambda column: column[0], student.steps())
        go = jax.vmap(student.flow_step, in_axes=(None, None, 0, None))
        ends = go(fit.params, step, x, jnp.zeros(0))
    else:
        go = jax.vmap(student.predicted_end, in_axes=(None, None, 0))
        ends = go(fit.params, jnp.zeros(()), x)
    error = np.sqrt(np.mean((student.unit(ends) - student.unit(of_teacher)) ** 2))
    assert error < 0.08


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
def test_weights_of_a_trained_student_are_honest():
    """One step, with its noise and its way back learned, briefly."""
    mean = jnp.array(LOC) + jnp.array(SCALE) * MEAN
    sd = jnp.array(SCALE) * SD

    def energy(x):
        z = (x - mean) / sd
        return 0.5 * jnp.sum(z**2) + jnp.sum(jnp.log(sd)) + jnp.log(2 * jnp.pi) - LOG_Z

    o = ds.objectives
    teacher = teacher_of(kernel_control(SCHEDULE), 16)
    student = ds.samplers.cdds(
        2,
        1,
        **PROCESS,
        smallest_std=0.3,
        network=ds.networks.consistency(16, learn_variance=True),
        destruction_network=ds.networks.free(
            16, learn_variance=True, step_conditioned=True
        ),
    )
    draws = mean[None] + sd[None] * jax.random.normal(KEY, (2_000, 2))
    fit = ds.fit(
        KEY,
        student,
        o.weighted_sum(
            (consistency(teacher), 1.0),
            (o.reverse_kl_log_derivative(), 1.0),
            (o.forward_kl_log_derivative(), 1.0),
        ),
        energy,
        behaviour=ds.behaviours.mixture(
            (ds.behaviours.on_policy(), 0.5),
            (ds.behaviours.reference_draws(draws), 0.5),
        ),
        optimizer=optax.adam(3e-3),
        num_updates=400,
        batch_size=128,
        progress_bar=False,
    )
    found = ds.draw(KEY, student, fit.params, energy, 20_000)
    before = ds.draw(KEY, student, student.init(KEY), energy, 20_000)
    log_weight = np.asarray(found.log_weight, np.float64)
    assert found.diagnostics.ess_fraction > 3 * before.diagnostics.ess_fraction
    assert found.diagnostics.ess_fraction > 0.05
    assert found.diagnostics.pareto_k < 0.5
    ratio = np.exp(log_weight - LOG_Z)
    error = ratio.std() / np.sqrt(ratio.size)
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 4 * error
    back = ds.log_weights_of(KEY, student, fit.params, energy, draws)
    assert np.mean(log_weight) < LOG_Z < np.mean(back)


def exact_flow(ys):
    return jax.vmap(lambda y: moved(SCHEDULE, y, 0.0, 1.0))(ys)


def test_a_scale_for_all_is_that_of_each():
    teacher = ds.samplers.scds(2, 4, scale=1.5)
    check_pair(teacher, ds.samplers.scds(2, 2, scale=(1.5, 1.5)))


TRAINED = jax.tree.map(lambda leaf: leaf + 0.1, teacher_of(FREE, 8).init(KEY))


@pytest.mark.parametrize(
    ("name", "student", "match"),
    [
        ("consistency", teacher_of(FREE, 4), "student must be a ds.samplers.cdds"),
        ("continuous", teacher_of(FREE, 4), "student must be a ds.samplers.cdds"),
        ("progressive", student_of(), "Renoising has no probability flow"),
        ("consistency", student_of(scale=1.0), "the same scale"),
        (
            "continuous",
            student_of(schedule=ds.schedules.cosine()),
            "the same schedule",
        ),
        ("progressive", teacher_of(FREE, 4, loc=0.0), "the same loc"),
        (
            "progressive",
            ds.samplers.scds(3, 4),
            "same dim, got 2 of the teacher and 3 of",
        ),
        ("consistency", ds.samplers.cdds(3), "same dim, got 2 of .* build the student"),
        ("continuous", student_of(condition_dim=1), "same condition_dim, got 0 of"),
        (
            "progressive",
            teacher_of(FREE, 4, condition_dim=1),
            "the same condition_dim, got 0 of the teacher and 1",
        ),
        (
            "progressive",
            teacher_of(FREE, 4, process=ds.processes.EulerVariancePreserving),
            "same kind of process, got 'VariancePreserving' of .* and 'EulerVariance",
        ),
        ("progressive", ds.samplers.pis(2, 4), "PinnedBrownian has no probability"),
        ("consistency", student_of(FREE), "must predict x itself at t = 1"),
        ("continuous", student_of(FREE), "must predict x itself at t = 1"),
        (
            "consistency",
            student_of(generation_bounds=ds.Bounds(shift=2.0)),
            "leave shift out of generation_bounds, got 2.0",
        ),
        ("progressive", teacher_of(FREE, 8), "the student has 8 steps and the teacher"),
        ("progressive", teacher_of(FREE, 3), "the student has 3 steps and the teacher"),
        ("progressive", teacher_of(FREE, 16), "student has 16 steps and the teacher 8"),
    ],
)
def test_students_that_cannot(name, student, match):
    make, options = OBJECTIVES[name]
    objective = make(teacher_of(FREE, 8), TRAINED, **options)
    with pytest.raises(ValueError, match=match):
        objective.init(KEY, student, None, skewed_energy, None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_teachers_that_cannot(name):
    make, options = OBJECTIVES[name]
    untrained = teacher_of(FREE, 8)
    with pytest.raises(ValueError, match="those of an untrained sampler"):
        make(untrained, untrained.init(jax.random.key(5)), **options)
    with pytest.raises(ValueError, match="has no probability flow"):
        make(ds.samplers.pis(2, 8), {}, **options)
    with pytest.raises(ValueError, match="destruction is learned, too"):
        make(ds.samplers.dis(2, 8, learn_destruction=True), {}, **options)
    with pytest.raises(ValueError, match="params are not those of this sampler"):
        make(teacher_of(ds.networks.free(4, step_conditioned=True), 8), TRAINED)


def wrapped(init):
    """A function for a control, whose parameters init returns."""
    return ds.networks.from_function(init, lambda p, y, t, context: p["w"] * y + p["b"])


UNTRAINED = {
    "contractive": {"network": ds.networks.contractive(**SMALL)},
    "backbone": {
        "network": ds.networks.free(**SMALL),
        "backbone": ds.networks.backbone(**SMALL),
    },
    "reduced_precision": {"network": ds.networks.reduced_precision(FREE)},
    "function": {
        "network": wrapped(
            lambda key, dim: {"w": jax.random.normal(key, (dim,)), "b": jnp.zeros(dim)}
        )
    },
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_untrained_teachers(name):
    """However the last layer starts."""
    teacher = ds.samplers.dis(2, 4, **PROCESS, **UNTRAINED[name])
    params = teacher.init(jax.random.key(5))
    with pytest.raises(ValueError, match="those of an untrained sampler"):
        ds.objectives.progressive_distillation(teacher, params)
    moved = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    ds.objectives.progressive_distillation(teacher, moved)


def test_a_residual_alone_teaches_nothing():
    teacher = ds.samplers.scds(2, 4, **PROCESS, learn_generation_variance=True)
    params = teacher.init(jax.random.key(5))
    moved = jax.tree.map(lambda leaf: leaf + 1e-3, params["generation"])
    for part in ("residual", "flow"):
        generation = {**params["generation"], part: moved[part]}
        given = teacher, {**params, "generation": generation}
        if part == "flow":
            ds.objectives.progressive_distillation(*given)
            continue
        with pytest.raises(ValueError, match="those of an untrained sampler"):
            ds.objectives.progressive_distillation(*given)


@pytest.mark.parametrize(
    "init",
    [
        lambda key, dim: {"w": jnp.ones(dim), "b": jnp.zeros(dim)},
        lambda key, dim: dict(zip("wb", jax.random.normal(key, (2, dim)), strict=True)),
    ],
)
def test_teachers_of_which_nobody_can_tell(init):
    """Fitted parameters that a function returns, or nothing to recognise."""
    teacher = teacher_of(wrapped(init), 8)
    ds.objectives.progressive_distillation(teacher, teacher.init(KEY))


def test_the_boundary_holds_for_all_parameters():
    """x + F(x, t) with F zero before training is no consistency function."""

    def drift(params, y, t, context):
        return context.gain * (y + params * jnp.ones_like(y))

    network = ds.networks.from_function(lambda key, dim: jnp.zeros(()), drift)
    objective = consistency(teacher_of(step_control(SCHEDULE), 8))
    with pytest.raises(ValueError, match="must predict x itself at t = 1"):
        objective.init(KEY, student_of(network), None, skewed_energy, None)
    student = student_of(ds.networks.consistency(**SMALL))
    shapes = jax.eval_shape(
        lambda key: objective.init(key, student, None, skewed_energy, None), KEY
    )
    assert jax.tree.map(jnp.shape, shapes[1]["generation"]["mean"]) == (2,)


def test_bad_options():
    with pytest.raises(ValueError, match=r"num_times must be between 2 and .* 9, got"):
        ds.objectives.consistency_distillation(teacher_of(FREE, 8), TRAINED)
    with pytest.raises(ValueError, match=r"num_times must be between 2 and .* 5, got"):
        ds.objectives.consistency_distillation(
            teacher_of(FREE, 8), TRAINED, second_order=True
        )
    with pytest.raises(ValueError, match="must be even, got 7"):
        ds.objectives.consistency_distillation(
            teacher_of(FREE, 7), TRAINED, num_times=3, second_order=True
        )
    with pytest.raises(ValueError, match="training grid's 8 steps, got 4"):
        ds.objectives.consistency_distillation(
            teacher_of(FREE, 8).with_num_steps(4),
            TRAINED,
            num_times=3,
            second_order=True,
        )
    thirds = ds.objectives.progressive_distillation(
        teacher_of(FREE, 12), TRAINED, second_order=True
    )
    with pytest.raises(ValueError, match="must be even, got 3"):
        thirds.init(KEY, teacher_of(FREE, 4), None, skewed_energy, None)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        ds.objectives.continuous_consistency(teacher_of(FREE, 8), TRAINED, damping=0)
    with pytest.raises(ValueError, match="data_std must be positive, got -1"):
        ds.networks.consistency(data_std=-1)
    with pytest.raises(ValueError, match="output_clip must be positive, got 0"):
        ds.networks.consistency(output_clip=0)
    with pytest.raises(ValueError, match="smallest_std must lie strictly between"):
        student_of(smallest_std=0.0)
