"""Self-consistency: against the exact flow of a Gaussian, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_flow import LOC, SCALE, moved, step_control
from tables import (
    SMALL,
    batch_of_paths,
    counting_energy,
    perturbed,
    skewed_energy,
)

import diffsamp as ds
from diffsamp.objectives import Biased, Curriculum, Uniform, self_consistency

KEY = jax.random.key(0)
SCHEDULE = ds.schedules.geometric(0.1)


def sampler_of(network, num_steps, **options):
    fields = {"loc": LOC, "scale": SCALE, "schedule": SCHEDULE, **options}
    return ds.samplers.scds(2, num_steps, network=network, **fields)


def loss_of(objective, sampler, params, state=(), count=0):
    batch = batch_of_paths(sampler, params, 64, KEY, count=jnp.asarray(count))

    @jax.jit
    def run(params):
        return objective.loss({"sampler": params, "objective": {}}, state, batch)[0]

    return run


def assert_agree(loss, by_hand, params):
    """In value and gradient."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(by_hand))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-10)
    for a, b in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def test_the_exact_flow_is_consistent(x64):
    sampler = sampler_of(step_control(SCHEDULE), 16)
    params = sampler.init(KEY)
    for steps in (1, 4, 16):  # from the reference to the target at every step count
        few = sampler.with_num_steps(steps)
        x = jnp.array([1.3, -2.0])
        y = (x - jnp.array(LOC)) / jnp.array(SCALE)
        whole = moved(SCHEDULE, y, 0.0, 1.0)
        for k in range(steps):
            step = jax.tree.map(lambda a, k=k: a[k], few.steps())
            x = few.flow_step(params, step, x, jnp.zeros(0))
        np.testing.assert_allclose(
            x, jnp.array(LOC) + jnp.array(SCALE) * whole, rtol=1e-9
        )
    assert float(loss_of(self_consistency(), sampler, params)(params)) < 1e-20
    even = sampler_of(step_control(SCHEDULE), 12)  # steps of 2 and 4, not of 8 and 16
    assert float(loss_of(self_consistency(), even, params)(params)) < 1e-20
    whole = self_consistency(whole_paths=True, pairs_per_path=4)
    for one in (sampler, even):
        assert float(loss_of(whole, one, params)(params)) < 1e-20
    wrong = sampler_of(step_control(SCHEDULE, 0.3), 16)
    for objective in (self_consistency(), whole):
        assert float(loss_of(objective, wrong, params)(params)) > 1e-3


def on_a_line(sampler, x, middle, end):
    """Where x_hat = A + B alpha leads: a line through the kernels' two means."""
    share = SCHEDULE.signal(np.array([0.0, 0.5, 1.0]))
    alpha, noise, decay = np.sqrt(share), 1 - share, np.sqrt(share[:-1] / share[1:])
    x_hat = []
    for k, (here, there) in enumerate(((x, middle), (middle, end))):
        y, moved = sampler.unit(here), sampler.unit(there) - sampler.unit(here)
        mean = decay[k] * y + 2 * moved  # E[y' | y], whose half the flow takes
        score = (decay[k] * mean - y) / (1 - decay[k] ** 2)  # Tweedie
        x_hat.append((y + noise[k] * score) / alpha[k])
    slope = (x_hat[1] - x_hat[0]) / (alpha[1] - alpha[0])
    return sampler.original(x_hat[0] + slope * (1 - alpha[0]))  # alpha is 1 at the end


@pytest.mark.parametrize("second_order", [False, True])
def test_one_pair_by_hand(x64, second_order):
    """K = 2 leaves one pair: both steps against the whole, from the reference."""
    network = ds.networks.annealed_score_guided(**SMALL, step_conditioned=True)
    sampler = sampler_of(network, 2)
    params = perturbed(sampler.init(KEY), 0.3)
    batch = batch_of_paths(sampler, params, 2, KEY)
    short, long = sampler.steps(), sampler.with_num_steps(1).steps()
    scale = jnp.array(SCALE)

    def score(x):
        return -scale * jax.grad(skewed_energy)(x)

    def by_hand(params):
        total = 0.0
        for x in batch.paths.xs[:, 0]:
            end = x
            for k in range(2):
                step = jax.tree.map(lambda a, k=k: a[k], short)
                middle = end
                end = sampler.flow_step(params, step, middle, score(middle))
            if second_order:  # x_hat linear in alpha: two points of a line
                end = on_a_line(sampler, x, middle, end)
            step = jax.tree.map(lambda a: a[0], long)
            reached = sampler.flow_step(params, step, x, score(x))
            end = jax.lax.stop_gradient(end)
            total += jnp.mean(((reached - end) / scale) ** 2) / 2
        return total

    def loss(params):
        both = {"sampler": params, "objective": {}}
        return self_consistency(second_order=second_order).loss(both, (), batch)[0]

    assert_agree(loss, by_hand, params)


def test_only_the_shortest_pair_is_taken_at_once(x64):
    """The longer steps of the exact flow remain consistent, its shortest do not."""
    sampler = sampler_of(step_control(SCHEDULE), 4)
    params, found = sampler.init(KEY), []
    for level in range(2):
        law = functools.partial(_only, level)
        objective = self_consistency(pairs=law, second_order=True)
        found.append(float(loss_of(objective, sampler, params)(params)))
    assert found[0] > 1e-3
    assert found[1] < 1e-20


@pytest.mark.parametrize("second_order", [False, True])
def test_whole_paths_by_hand(x64, second_order):
    """One step of four, from the start, against the four themselves."""
    network = ds.networks.annealed_score_guided(**SMALL, step_conditioned=True)
    sampler = sampler_of(network, 4)
    params = perturbed(sampler.init(KEY), 0.3)
    batch = batch_of_paths(sampler, params, 2, KEY)
    objective = self_consistency(
        pairs=functools.partial(_only, 1), whole_paths=True, second_order=second_order
    )
    solver = ds.solvers.linear_end() if second_order else ds.solvers.frozen()
    flow, scale = ds.probability_flow(sampler, solver), jnp.array(SCALE)
    step = jax.tree.map(lambda a: a[0], sampler.with_num_steps(1).steps())

    def by_hand(params):
        total = 0.0
        for key in jax.random.split(jax.random.split(KEY, 3)[2], 2):
            x = sampler.original(jax.random.normal(key, (2,)))
            end = jax.lax.stop_gradient(flow.solve(params, x, skewed_energy))
            score = -scale * jax.grad(skewed_energy)(x)
            reached = sampler.flow_step(params, step, x, score)
            total += jnp.mean(((reached - end) / scale) ** 2) / 2
        return total

    def loss(params):
        return objective.loss({"sampler": params, "objective": {}}, (), batch)[0]

    assert_agree(loss, by_hand, params)


def _only(level, num_levels, count):
    del count
    return jnp.where(jnp.arange(num_levels) == level, 0.0, -jnp.inf)


@pytest.mark.slow
@pytest.mark.parametrize("whole_paths", [False, True])
def test_the_average_takes_the_short_steps(whole_paths):
    sampler = sampler_of(ds.networks.free(**SMALL, step_conditioned=True), 4)
    params = perturbed(sampler.init(KEY), 0.3)
    objective = self_consistency(ema_decay=0.75, whole_paths=whole_paths)
    _, average = objective.init(KEY, sampler, params, skewed_energy, None)
    other = jax.tree.map(lambda leaf: leaf + 0.4, params)
    moved = objective.update({"sampler": other, "objective": {}}, average, None)
    for start, now in zip(*map(jax.tree.leaves, (params, moved)), strict=True):
        np.testing.assert_allclose(now - start, 0.1, rtol=1e-3)
    same, elsewhere = (
        float(loss_of(objective, sampler, params, average)(params))
        for average in (params, other)
    )
    current = self_consistency(whole_paths=whole_paths)
    live = float(loss_of(current, sampler, params)(params))
    assert same == pytest.approx(live, rel=1e-5)
    assert elsewhere != pytest.approx(live, rel=0.1)


def test_more_pairs_of_a_path_are_a_mean_of_less_noise(x64):
    sampler = sampler_of(step_control(SCHEDULE, 0.3), 16)
    params, found = sampler.init(KEY), {}
    for num in (1, 64):
        loss = loss_of(self_consistency(pairs_per_path=num), sampler, params)
        found[num] = float(loss(params))
    many = loss_of(self_consistency(pairs_per_path=256), sampler, params)
    truth = float(many(params))
    assert abs(found[64] - truth) < 0.1 * truth
    assert 0.02 * truth < abs(found[1] - truth) < truth


def test_laws_of_the_step_length():
    count = jnp.asarray(0)
    uniform, biased = (jax.nn.softmax(Biased(r)(4, count)) for r in (0.0, 1.5))
    np.testing.assert_allclose(uniform, 0.25)
    np.testing.assert_array_equal(jax.nn.softmax(Uniform()(4, count)), uniform)
    np.testing.assert_allclose(biased[1:] / biased[:-1], np.exp(-1.5), rtol=1e-5)
    curriculum = Curriculum(100)
    for count, longest in ((0, 1), (24, 1), (25, 2), (75, 4), (1_000, 4)):
        law = np.isfinite(curriculum(4, jnp.asarray(count)))
        np.testing.assert_array_equal(law, np.arange(4) < longest)


def test_a_curriculum_starts_with_short_steps(x64):
    """The wrong flow is inconsistent for long steps alone."""

    def drift(params, y, t, context):
        exact = step_control(SCHEDULE).drift_fn(params, y, t, context)
        return exact + jnp.where(context.step_size > 0.3, 5.0, 0.0)

    network = ds.networks.from_function(step_control(SCHEDULE).init_fn, drift)
    sampler = sampler_of(network, 16)
    params = sampler.init(KEY)
    objective = self_consistency(pairs=Curriculum(100))
    assert float(loss_of(objective, sampler, params, count=0)(params)) < 1e-20
    assert float(loss_of(objective, sampler, params, count=100)(params)) > 0.1


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
@pytest.mark.parametrize("whole_paths", [False, True])
@pytest.mark.parametrize("network", ["free", "annealed_score_guided"])
def test_energies_are_counted(network, whole_paths):
    network = getattr(ds.networks, network)(**SMALL, step_conditioned=True)
    energy, take = counting_energy(skewed_energy)
    fit = ds.fit(
        KEY,
        sampler_of(network, 4),
        ds.objectives.weighted_sum(
            (ds.objectives.log_variance(), 1.0),
            (self_consistency(pairs_per_path=3, whole_paths=whole_paths), 0.5),
        ),
        energy,
        num_updates=3,
        batch_size=8,
        progress_bar=False,
    )
    made = take()
    assert fit.num_energy_evaluations == made["energy"]
    assert fit.num_gradient_evaluations == made["gradient"]
    assert np.all(np.isfinite(fit.metrics["self_consistency"]))


@pytest.mark.parametrize("whole_paths", [False, True])
def test_network_calls_are_counted(whole_paths):
    count, take = counting_energy(jnp.sum)

    def drift(params, x, t, context):
        return params * (x + 0 * count(x))

    network = ds.networks.from_function(lambda key, dim: jnp.ones(()), drift)
    sampler, params = sampler_of(network, 4), jnp.ones(())
    params = {"generation": params}
    batch = batch_of_paths(sampler, params, 8, KEY)
    take()
    objective = self_consistency(pairs_per_path=3, whole_paths=whole_paths)
    run = jax.jit(lambda p: objective.loss({"sampler": p, "objective": {}}, (), batch))
    _, metrics = run(params)
    calls = 8 * 4 + 8 * 3 if whole_paths else 8 * 3 * 3
    assert take()["energy"] == metrics["cost"].network == calls


def test_whole_paths_have_the_condition_of_their_row(x64):
    """Against the flow of each row, of a network that sees its condition."""
    network = ds.networks.free(**SMALL, step_conditioned=True)
    sampler = sampler_of(network, 4, condition_dim=2)
    params = perturbed(sampler.init(KEY), 0.3)
    condition = jnp.array([[2.0, 0.0], [0.5, -1.0]])
    other = sampler_of(network, 4)
    batch = batch_of_paths(other, other.init(KEY), 2, KEY)._replace(
        sampler=sampler, condition=condition, energy=lambda x, c: skewed_energy(x)
    )
    law = functools.partial(_only, 1)
    objective = self_consistency(pairs=law, whole_paths=True)
    both = {"sampler": params, "objective": {}}
    found = jax.jit(lambda both: objective.loss(both, (), batch)[0])(both)
    flows = [ds.probability_flow(sampler.with_num_steps(k)) for k in (4, 1)]
    values = []
    keys = jax.random.split(jax.random.split(KEY, 3)[2], 2)
    for key, own in zip(keys, condition, strict=True):
        x = sampler.original(jax.random.normal(key, (2,)))
        ends = [flow.solve(params, x, batch.energy, own) for flow in flows]
        gap = sampler.unit(ends[0]) - sampler.unit(ends[1])
        values.append(float(np.mean(gap**2)))
    assert values[0] != pytest.approx(values[1], rel=0.1)
    assert float(found) == pytest.approx(float(np.mean(values)), rel=1e-10)


def halves_elsewhere(num_steps):
    return np.linspace(0, 1, num_steps + 1) ** (1 + 1 / num_steps)


@pytest.mark.parametrize(
    ("sampler", "match"),
    [
        (ds.samplers.pis(2, 4), "PinnedBrownian has no probability flow"),
        (ds.samplers.gbs(2, 4), "Brownian has no probability flow"),
        (
            sampler_of(ds.networks.reduced_precision(ds.networks.free(**SMALL)), 4),
            "sees the length of the step, got FreeModule with step_conditioned=False",
        ),
        (
            sampler_of(ds.networks.contractive(step_conditioned=False), 4),
            "got ContractiveModule with step_conditioned=False",
        ),
        (ds.samplers.scds(2, 15), "must be even, .* got 15"),
        (ds.samplers.scds(2, 1), "must be even, .* got 1"),
        (ds.samplers.scds(2, 4, time_grid=halves_elsewhere), "not every other time"),
    ],
)
def test_samplers_that_cannot(sampler, match):
    with pytest.raises(ValueError, match=match):
        ds.fit(KEY, sampler, self_consistency(), skewed_energy, num_updates=1)


def test_bad_options():
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"ema_decay must be .* got {decay}"):
            self_consistency(ema_decay=decay)
    with pytest.raises(ValueError, match="pairs_per_path must be at least 1, got 0"):
        self_consistency(pairs_per_path=0)
    with pytest.raises(ValueError, match="num_updates must be at least 1, got 0"):
        Curriculum(0)
    network = ds.networks.free(**SMALL, step_conditioned=True)
    backbone = ds.networks.backbone(**SMALL)
    with pytest.raises(ValueError, match="cannot build on a backbone"):
        ds.samplers.dis(2, 4, network=network, backbone=backbone).init(KEY)


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
def test_one_step_arrives_where_many_do():
    target = ds.targets.gmm9()
    sampler = ds.samplers.scds(
        2, 16, scale=4.0, network=ds.networks.free(32, step_conditioned=True)
    )
    points = target.sample(KEY, 2_000)
    objective = ds.objectives.weighted_sum(
        (ds.objectives.forward_kl(), 1.0), (self_consistency(), 20.0)
    )
    fit = ds.fit(
        KEY,
        sampler,
        objective,
        target.energy,
        behaviour=ds.behaviours.reference_draws(points),
        num_updates=4_000,
        batch_size=128,
        progress_bar=False,
    )
    x = 4.0 * jax.random.normal(jax.random.key(1), (2_000, 2))

    def draws(params, num_steps):
        few = sampler.with_num_steps(num_steps)
        ends = x
        for k in range(num_steps):
            step = jax.tree.map(lambda a, k=k: a[k], few.steps())
            ends = jax.vmap(few.flow_step, in_axes=(None, None, 0, None))(
                params, step, ends, jnp.zeros(0)
            )
        return ends

    def distance(params, num_steps):
        return ds.metrics.wasserstein2(np.asarray(draws(params, num_steps)), points)

    untrained = distance(sampler.init(KEY), 1)
    many, one = (distance(fit.params, k) for k in (16, 1))
    assert one < 0.5 * untrained
    assert one < 2 * many
