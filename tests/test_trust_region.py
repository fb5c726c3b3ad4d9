"""Trust region: the tempering, the loss of a round, what a round keeps, its cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from tables import SAMPLERS, counting_energy, perturbed, rows_of, skewed_energy

import diffsamp as ds
from diffsamp.behaviours.trust_region import largest_exponent

KEY = jax.random.key(0)
SAMPLER = SAMPLERS["dis_free"]()


def divergence(exponent, log_weight):
    weight = np.exp(exponent * (log_weight - log_weight.max()))
    share = weight / weight.sum()
    return float(np.sum(share * np.log(np.maximum(len(share) * share, 1e-300))))


@pytest.mark.parametrize("budget", [0.05, 0.5, 2.0])
def test_the_largest_exponent_within_the_budget(x64, budget):
    log_weight = 3 * np.random.default_rng(0).standard_normal(500) - 40.0
    exponent, found = largest_exponent(jnp.asarray(log_weight), budget)
    root = scipy.optimize.brentq(
        lambda e: divergence(e, log_weight) - budget, 1e-6, 1.0
    )
    assert float(exponent) == pytest.approx(root, rel=1e-8)
    assert float(found) == pytest.approx(budget, rel=1e-8)
    bad = np.concatenate([log_weight, [np.nan, -np.inf, np.inf]])
    again, _ = largest_exponent(jnp.asarray(bad), budget)
    assert float(again) == pytest.approx(root, rel=1e-8)


def test_nothing_is_tempered_that_fits_the_budget(x64):
    log_weight = 0.1 * np.random.default_rng(0).standard_normal(500)
    exponent, found = largest_exponent(jnp.asarray(log_weight), 0.5)
    assert float(exponent) == 1.0
    assert float(found) == pytest.approx(divergence(1.0, log_weight))


def proposed(behaviour, state, params, count, size=32):
    energy = skewed_energy
    return behaviour.propose(
        state, KEY, SAMPLER, params, energy, rows_of(size), jnp.asarray(count)
    )


def batch_of(own, params):
    score = jax.vmap(lambda path: SAMPLER.score_path(params, path))
    return ds.Batch(
        trajectories=score(own.paths),
        rollouts=None,
        paths=own.paths,
        on_policy=own.on_policy,
        target_draws=own.target_draws,
        count=jnp.asarray(0),
        key=KEY,
        sampler=SAMPLER,
        energy=skewed_energy,
        anchor=own.anchor,
        **rows_of(len(own.on_policy))._asdict(),
    )


def test_the_loss_of_a_round(x64):
    """At its start the gradient is eta times log-variance's; later by hand."""
    params = perturbed(SAMPLER.init(KEY), 0.2)
    behaviour = ds.behaviours.trust_region(64, max_divergence=0.05)
    objective = ds.objectives.trust_region_log_variance()
    state, _ = behaviour.init(KEY, SAMPLER, params, skewed_energy)
    assert 0 < float(state.exponent) < 1
    own = proposed(behaviour, state, params, 0)

    @jax.jit
    def gradients(params):
        def loss(params, objective):
            both = {"sampler": params, "objective": {}}
            return objective.loss(both, (), batch_of(own, params))[0]

        plain = ds.objectives.log_variance()
        return [jax.value_and_grad(loss)(params, o) for o in (objective, plain)]

    (value, actual), (plain, expected) = gradients(params)
    assert float(value) == pytest.approx(float(state.exponent**2 * plain), rel=1e-9)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, state.exponent * b, rtol=1e-8, atol=1e-10)

    moved = perturbed(params, 0.1, seed=2)
    score = jax.jit(lambda params: batch_of(own, params).trajectories)
    before, after = score(params), score(moved)
    log_ratio = np.sum(np.asarray(after.log_generation - before.log_generation), axis=1)
    tilt = float(state.exponent) * np.asarray(before.log_weight)
    (value, _), _ = gradients(moved)
    assert float(value) == pytest.approx(np.var(log_ratio - tilt, ddof=1), rel=1e-9)


@pytest.mark.slow
def test_a_round_keeps_its_paths_and_the_next_one_draws_new_ones():
    params = SAMPLER.init(KEY)
    behaviour = ds.behaviours.trust_region(64, every=3)
    energy, take = counting_energy(skewed_energy)
    state, cost = behaviour.init(KEY, SAMPLER, params, energy)
    assert take() == {"energy": int(cost.energy), "gradient": int(cost.gradient)}
    first = state
    for count in range(4):
        own = proposed(behaviour, state, params, count)
        ends = np.asarray(state.paths.xs[:, -1])
        found = np.asarray(own.paths.xs[:, -1])
        assert len(np.unique(found, axis=0)) == 32
        assert np.all(np.any(np.all(found[:, None] == ends[None], -1), 1))
        assert np.all(own.on_policy) == (count % 3 == 0)
        assert np.array_equal(own.simulated, own.on_policy)
        state, cost = behaviour.update(
            state, KEY, SAMPLER, params, energy, None, own, jnp.asarray(count)
        )
        made = take()
        assert made == {"energy": int(cost.energy), "gradient": int(cost.gradient)}
        assert (made["energy"] > 0) == (count == 2)
        same = np.array_equal(state.paths.xs, first.paths.xs)
        assert same == (count < 2)
        assert int(state.num_rounds) == (1 if count < 2 else 2)


@pytest.mark.slow
@pytest.mark.relaxed("dtypes")
def test_stored_rows_cost_nothing_in_fit():
    energy, take = counting_energy(skewed_energy)
    fit = ds.fit(
        KEY,
        SAMPLER,
        ds.objectives.trust_region_log_variance(),
        energy,
        behaviour=ds.behaviours.trust_region(64, every=2),
        num_updates=4,
        batch_size=16,
        progress_bar=False,
    )
    made = take()
    assert fit.num_energy_evaluations == made["energy"]
    assert fit.num_gradient_evaluations == made["gradient"] == 0
    np.testing.assert_array_equal(np.isfinite(fit.metrics["elbo"]), [1, 0, 1, 0])


@pytest.mark.relaxed("dtypes")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_paths": 1}, "num_paths must be at least 2"),
        ({"every": 0}, "every at least 1"),
        ({"max_divergence": 0.0}, "max_divergence positive"),
        pytest.param(
            *({"num_paths": 8}, "must be at least the batch size, got 8 and 16"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ds.fit(
            KEY,
            SAMPLER,
            ds.objectives.trust_region_log_variance(),
            skewed_energy,
            behaviour=ds.behaviours.trust_region(**options),
            num_updates=1,
            batch_size=16,
        )


def test_a_mixture_has_one_at_most():
    twice = [(ds.behaviours.trust_region(64, every=n), 0.5) for n in (2, 3)]
    with pytest.raises(ValueError, match=r"one behaviours\.trust_region"):
        ds.behaviours.mixture(*twice)


def learned_destruction(**options):
    network = ds.networks.free(4, learn_variance=True)
    return ds.samplers.dis(
        2, 2, network=network, destruction_network=ds.networks.free(4), **options
    )


def one_update_at_a_time(sampler, objective, behaviour, num_updates, **options):
    """Start and state after each update, in a list."""
    start = perturbed(sampler.init(KEY), 0.1)
    states, now = [], {"params": start}
    for _ in range(num_updates):
        fit = ds.fit(
            KEY,
            sampler,
            objective,
            skewed_energy,
            behaviour=behaviour,
            ema_decay=None,
            num_updates=1,
            batch_size=16,
            progress_bar=False,
            **options,
            **now,
        )
        states.append(fit.state)
        now = {"state": fit.state}
    assert int(fit.state.num_skipped) == 0
    return start, states


def same(before, after):
    pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.relaxed("dtypes")
def test_destruction_frozen_but_for_the_last_update_of_a_round():
    """As the docstring of the behaviour has it."""
    o, b, every = ds.objectives, ds.behaviours, 3
    at_the_end = o.gradient_scale(
        o.trajectory_likelihood(), destruction=lambda count: (count + 1) % every == 0
    )
    rates = {"generation": optax.adam(1e-2), "destruction": optax.adam(1e-2, b1=0.0)}
    start, states = one_update_at_a_time(
        learned_destruction(),
        o.weighted_sum((o.trust_region_log_variance(), 1.0), (at_the_end, 1.0)),
        b.mixture((b.trust_region(64, every=every), 0.5), (b.on_policy(), 0.5)),
        2 * every + 1,
        optimizer=optax.multi_transform(rates, ds.param_labels),
    )
    params = [start, *(state.params["sampler"] for state in states)]
    for kernel, expected in (
        ("generation", [False] * 7),
        ("destruction", [True, True, False, True, True, False, True]),
    ):
        pairs = itertools.pairwise(p[kernel] for p in params)
        assert [same(*pair) for pair in pairs] == expected


@pytest.mark.relaxed("dtypes")
def test_a_shared_backbone_moves_destruction_but_not_the_target_of_a_round():
    sampler = learned_destruction(backbone=ds.networks.backbone(4, 1))
    behaviour = ds.behaviours.trust_region(64, every=4)
    start, states = one_update_at_a_time(
        sampler,
        ds.objectives.trust_region_log_variance(),
        behaviour,
        4,
        optimizer=optax.adam(1e-2),
    )
    params = [state.params["sampler"] for state in states]
    assert same(start["destruction"], params[-1]["destruction"])
    assert not same(start["backbone"], params[0]["backbone"])
    rounds = [state.behaviour_state for state in states]
    assert same(rounds[0], rounds[1])
    assert same(rounds[0], rounds[2])
    score = jax.jit(jax.vmap(sampler.score_path, in_axes=(None, 0)))
    before, after = (score(p, rounds[0].paths) for p in (start, params[2]))
    # Not those of the kernel now, but of the one that began the round.
    kept, now = np.asarray(rounds[2].log_weight), np.asarray(after.log_weight)
    np.testing.assert_allclose(kept, before.log_weight, rtol=1e-4, atol=1e-4)
    moved = np.abs(np.sum(after.log_destruction - before.log_destruction, axis=1))
    assert np.max(moved) > 1e-2
    assert np.max(np.abs(kept - now)) > 1e-2
    assert int(rounds[3].num_rounds) == 2
    last = score(params[3], rounds[3].paths)
    np.testing.assert_allclose(
        rounds[3].log_weight, last.log_weight, rtol=1e-4, atol=1e-4
    )


@pytest.mark.relaxed("dtypes")
@pytest.mark.parametrize(
    "own_rows", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_destruction_moves_only_by_an_objective_of_its_own(own_rows):
    """The mixture ignores rows that know no round, and counts what it evaluates."""
    o, b = ds.objectives, ds.behaviours
    sampler = learned_destruction()
    objective, behaviour = o.trust_region_log_variance(), b.trust_region(64, every=3)
    if own_rows:
        objective = o.weighted_sum((objective, 1.0), (o.trajectory_likelihood(), 1.0))
        behaviour = b.mixture((behaviour, 0.25), (b.on_policy(), 0.75))
    energy, take = counting_energy(skewed_energy)
    start = perturbed(sampler.init(KEY), 0.1)
    fit = ds.fit(
        KEY,
        sampler,
        objective,
        energy,
        params=start,
        behaviour=behaviour,
        optimizer=optax.adam(1e-2),
        ema_decay=None,
        num_updates=7,
        batch_size=16,
        progress_bar=False,
    )
    made = take()
    assert fit.num_skipped == 0
    assert fit.num_energy_evaluations == made["energy"]
    assert fit.num_gradient_evaluations == made["gradient"]
    moved = {
        name: any(
            not np.array_equal(old, new)
            for old, new in zip(
                *map(jax.tree.leaves, (start[name], fit.params[name])), strict=True
            )
        )
        for name in ("generation", "destruction")
    }
    assert moved == {"generation": True, "destruction": own_rows}


def test_rows_of_other_behaviours_do_not_enter_the_loss(x64):
    params = perturbed(SAMPLER.init(KEY), 0.2)
    trust = ds.behaviours.trust_region(64, max_divergence=0.05)
    mixed = ds.behaviours.mixture((trust, 0.5), (ds.behaviours.on_policy(), 0.5))
    state, _ = mixed.init(KEY, SAMPLER, params, skewed_energy)
    both = proposed(mixed, state, params, 1)
    first = jax.tree.map(lambda leaf: leaf[:16], both)
    assert np.isfinite(both.anchor.log_tilt).tolist() == [True] * 16 + [False] * 16
    assert both.on_policy.tolist() == [False] * 16 + [True] * 16
    objective = ds.objectives.trust_region_log_variance()
    moved = {"sampler": perturbed(params, 0.1, seed=2), "objective": {}}
    found, expected = (
        objective.loss(moved, (), batch_of(rows, moved["sampler"]))[0]
        for rows in (both, first)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
    assert float(found) > 0
