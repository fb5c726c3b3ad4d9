"""Where training paths come from: flags, laws, stores, shares, costs, determinism."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from tables import (
    BEHAVIOURS,
    LOG_Z,
    SAMPLERS,
    counting_energy,
    mostly_slow,
    rows_of,
    skewed_draws,
    skewed_energy,
)

import diffsamp as ds
from diffsamp import buffers, mcmc, training
from diffsamp.types import Trajectory

# Affine controls on the general bridge: cheap to compile, and both kernels are learned.
LOC, SCALE, DIFFUSION, K = np.array([0.4, -0.3]), np.array([1.8, 1.5]), 0.6, 3
_PARTS = (
    lambda key, dim: {"offset": jnp.full(dim, 0.5), "slope": jnp.full(dim, -0.2)},
    lambda params, y, t, context: params["offset"] + params["slope"] * y,
)
AFFINE = ds.networks.from_function(*_PARTS)
SAMPLER = ds.samplers.gbs(
    2,
    K,
    loc=LOC,
    scale=SCALE,
    diffusion=DIFFUSION,
    network=AFFINE,
    destruction_network=AFFINE,
)
SCORED = dataclasses.replace(
    SAMPLER, generation=ds.networks.from_function(*_PARTS, needs_score=True)
)
PARAMS = SAMPLER.init(jax.random.key(0))
STD = DIFFUSION / np.sqrt(K)  # of a step, in unit coordinates


@functools.cache
def jitted(behaviour):
    """The three functions of a behaviour for SAMPLER and PARAMS, compiled."""
    state_and_cost = jax.jit(
        lambda key: behaviour.init(key, SAMPLER, PARAMS, skewed_energy)
    )
    propose = jax.jit(
        lambda state, key, size, count: behaviour.propose(
            state, key, SAMPLER, PARAMS, skewed_energy, rows_of(size), count
        ),
        static_argnums=2,
    )
    update = jax.jit(
        lambda state, key, trajectories, proposal, count: behaviour.update(
            state, key, SAMPLER, PARAMS, skewed_energy, trajectories, proposal, count
        )
    )
    return state_and_cost, propose, update


def started(behaviour, seed=0):
    return jitted(behaviour)[0](jax.random.key(seed))[0]


def proposed(behaviour, state=None, seed=1, size=16, count=0):
    state = started(behaviour) if state is None else state
    return jitted(behaviour)[1](state, jax.random.key(seed), size, jnp.asarray(count))


def updated(behaviour, state, x, energy, simulated, count=0, seed=2):
    """State and cost after an update with last states x [B, D]."""
    size = len(x)
    xs = jnp.broadcast_to(jnp.asarray(x, float)[:, None], (size, K + 1, 2))
    zeros = jnp.zeros((size, K))
    energy = jnp.asarray(energy, float)
    trajectories = Trajectory(
        xs, xs[:, -1], energy, energy, zeros, zeros, energy=energy
    )
    empty = jnp.zeros((size, K + 1, 0))
    paths = ds.Path(xs, energy, empty, empty[:, 0])
    rows = jnp.asarray(simulated)
    proposal = ds.Proposal(paths, rows, rows, ~rows)
    update = jitted(behaviour)[2]
    return update(state, jax.random.key(seed), trajectories, proposal, count)


def flags(proposal):
    """Shares of the rows that are simulated, on-policy and target draws."""
    rows = proposal.simulated, proposal.on_policy, proposal.target_draws
    return tuple(float(np.mean(r)) for r in rows)


# -- every behaviour ------------------------------------------------------------------

FLAGS = {
    "on_policy": (1.0, 1.0, 0.0),
    "exploration": (1.0, 0.0, 0.0),
    "replay": (1.0, 1.0, 0.0),  # nothing stored yet: simulated on-policy
    "replay_by_rank": (1.0, 1.0, 0.0),
    "replay_by_weight": (1.0, 1.0, 0.0),
    "local_search": (1.0, 1.0, 0.0),
    "reference_draws": (0.0, 0.0, 1.0),
    "smc_seeded": (0.0, 0.0, 1.0),
    "smc_pooled": (0.0, 0.0, 1.0),
    "trust_region": (1.0, 1.0, 0.0),  # the first batch of a round
    "mixture": (1.0, 1.0, 0.0),
}
REPEATS = {"replay", "replay_by_rank", "replay_by_weight", "local_search"}


def trainable(name):
    """The behaviour, with one that simulates beside those that only repeat."""
    behaviour = BEHAVIOURS[name]()
    if name not in REPEATS:
        return behaviour
    return ds.behaviours.mixture((behaviour, 0.5), (BEHAVIOURS["on_policy"](), 1))


@pytest.mark.parametrize(
    "name", mostly_slow(BEHAVIOURS, "on_policy", "replay", "reference_draws")
)
def test_paths_flags_and_determinism(name):
    behaviour = BEHAVIOURS[name]()
    state = started(behaviour)
    proposal = proposed(behaviour, state)
    assert proposal.paths.xs.shape == (16, K + 1, 2)
    assert proposal.paths.scores.shape == (16, K + 1, 0)
    energies = jax.vmap(skewed_energy)(proposal.paths.xs[:, -1])
    np.testing.assert_allclose(proposal.paths.energy, energies, rtol=1e-5, atol=1e-5)
    assert flags(proposal) == FLAGS[name]
    again, other = proposed(behaviour, state), proposed(behaviour, state, seed=9)
    jax.tree.map(np.testing.assert_array_equal, proposal, again)
    same = np.all(proposal.paths.xs == other.paths.xs, axis=(1, 2))
    if name == "trust_region":  # 16 of 64 stored paths: one may come up again in place
        assert np.mean(same) < 0.3
    else:
        assert not np.any(same)
    jax.tree.map(np.testing.assert_array_equal, state, started(behaviour))


PROMISES = ("on_policy", "exploration", "reference_draws", "mixture", "trust_region")


@pytest.mark.parametrize("name", mostly_slow(BEHAVIOURS, *PROMISES))
def test_what_is_promised_is_what_is_delivered(name):
    """`provides` is what `fit` trusts when it accepts an objective."""
    behaviour = BEHAVIOURS[name]()
    provides = behaviour.provides
    simulated, on_policy, target_draws = FLAGS[name]
    if name not in REPEATS:
        assert provides.simulated == (simulated > 0)
    if name not in REPEATS | {"trust_region"}:
        assert provides.on_policy == (on_policy > 0)
    assert provides.target_draws == (target_draws > 0)
    assert provides.only_on_policy == (name == "on_policy")


@pytest.mark.parametrize("name", sorted(set(BEHAVIOURS) - {"reference_draws"}))
def test_equal_arguments_give_one_behaviour(name):
    assert BEHAVIOURS[name]() is BEHAVIOURS[name]()


@pytest.mark.parametrize("name", mostly_slow(BEHAVIOURS, "replay"))
def test_training_with_it_is_deterministic(name):
    behaviour = trainable(name)
    runs = [
        ds.fit(
            jax.random.key(3),
            SAMPLER,
            ds.objectives.log_variance(),
            skewed_energy,
            behaviour=behaviour,
            optimizer=optax.sgd(1e-3),
            num_updates=4,
            batch_size=8,
            progress_bar=False,
        )
        for _ in range(2)
    ]
    first, second = (jax.tree.leaves(run.state) for run in runs)
    for a, b in zip(first, second, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    moved = jax.tree.map(lambda a, b: np.any(a != b), runs[0].params, PARAMS)
    assert any(jax.tree.leaves(moved))


# -- laws of the simulated paths ------------------------------------------------------


def _residuals(paths):
    """Standardised steps of generation: standard normal on-policy, [B K, D]."""
    ys = (np.asarray(paths.xs) - LOC) / SCALE
    drift = 0.5 - 0.2 * ys[:, :-1]
    mean = ys[:, :-1] + STD / np.sqrt(K) * drift
    return ((ys[:, 1:] - mean) / STD).reshape(-1, 2)


def _assert_normal(residuals, std):
    count = residuals.shape[0]
    assert np.all(np.abs(residuals.mean(0)) < 5 * std / np.sqrt(count))
    spread = residuals.std(0) / std
    assert np.all(np.abs(spread - 1) < 5 / np.sqrt(2 * count))


def test_on_policy_paths_have_the_kernels_own_noise():
    proposal = proposed(ds.behaviours.on_policy(), size=1_000)
    _assert_normal(_residuals(proposal.paths), 1.0)


FADING = optax.linear_schedule(1.0, 0.0, 10)


def test_exploration_widens_the_noise_and_not_the_score():
    noise = 0.5
    proposal = proposed(ds.behaviours.exploration(FADING), size=1_000, count=5)
    residuals = _residuals(proposal.paths)
    _assert_normal(residuals, np.sqrt(STD**2 + noise**2) / STD)
    # The kernel's own density: that of a standard normal at the widened residuals.
    path = jax.tree.map(lambda a: a[0], proposal.paths)
    scored = SAMPLER.score_path(PARAMS, path)
    own = -0.5 * np.sum(residuals[:K] ** 2 + np.log(2 * np.pi * (STD * SCALE) ** 2), -1)
    np.testing.assert_allclose(scored.log_generation, own, rtol=1e-4)


def test_exploration_follows_its_schedule():
    behaviour = ds.behaviours.exploration(FADING)
    paths = [proposed(behaviour, size=1_000, count=n).paths for n in (0, 5, 10, 99)]
    expected = [np.sqrt(STD**2 + n**2) / STD for n in (1.0, 0.5, 0.0, 0.0)]
    spreads = [_residuals(path).std() for path in paths]
    np.testing.assert_allclose(spreads, expected, rtol=0.1)
    plain = proposed(ds.behaviours.on_policy(), size=1_000).paths
    np.testing.assert_array_equal(paths[-1].xs, plain.xs)


@pytest.mark.parametrize("noise", [-0.1, float("nan")])
def test_bad_noise(noise):
    with pytest.raises(ValueError, match="noise must not be negative"):
        ds.behaviours.exploration(noise)


# -- replay ---------------------------------------------------------------------------


def test_replay_traces_stored_points_back():
    behaviour = ds.behaviours.replay(capacity=8)
    x = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    state, cost = updated(behaviour, started(behaviour), x, np.zeros(3), [True] * 3)
    assert (int(cost.energy), int(cost.gradient)) == (0, 0)
    proposal = proposed(behaviour, state, size=1_000)
    assert flags(proposal) == (0.0, 0.0, 0.0)  # nothing new, nothing from the target
    ends = np.unique(np.asarray(proposal.paths.xs[:, -1]), axis=0)
    np.testing.assert_array_equal(ends, x)
    # drawn by the destruction kernel: y = y' + std sqrt(h) v(y') + std noise
    ys = (np.asarray(proposal.paths.xs) - LOC) / SCALE
    drift = 0.5 - 0.2 * ys[:, 1:]
    residuals = (ys[:, :-1] - ys[:, 1:] - STD / np.sqrt(K) * drift) / STD
    _assert_normal(residuals.reshape(-1, 2), 1.0)


def test_replay_stores_simulated_rows_only_and_forgets_the_oldest():
    behaviour = ds.behaviours.replay(capacity=4)
    state = started(behaviour)
    x = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [np.nan, 0.0]])
    energy = [0.0, np.inf, 0.0, 0.0]
    state, _ = updated(behaviour, state, x, energy, [True, True, True, True])
    assert np.asarray(state.x[:2, 0]).tolist() == [1.0, 3.0]
    assert int(state.num_rejected) == 2
    x = np.array([[5.0, 0.0], [6.0, 0.0], [7.0, 0.0], [8.0, 0.0]])
    state, _ = updated(behaviour, state, x, np.zeros(4), [True, False, True, True])
    assert sorted(np.asarray(state.x[:, 0]).tolist()) == [3.0, 5.0, 7.0, 8.0]
    assert int(state.size) == 4


def test_a_buffer_smaller_than_a_batch_is_refused():
    search = ds.behaviours.local_search(4, num_chains=2, num_steps=2, num_burn_in=1)
    with pytest.raises(ValueError, match=r"cannot add 8 points .* buffer of 4; raise"):
        updated(search, started(search), np.zeros((8, 2)), np.zeros(8), [True] * 8)
    behaviour = ds.behaviours.mixture(
        (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(capacity=4), 0.5)
    )
    with pytest.raises(ValueError, match="raise its capacity or lower batch_size"):
        ds.fit(
            jax.random.key(0),
            SAMPLER,
            ds.objectives.log_variance(),
            skewed_energy,
            behaviour=behaviour,
            num_updates=1,
            batch_size=8,
            progress_bar=False,
        )


def test_bad_capacity():
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        ds.behaviours.replay(capacity=0)


def test_replay_keeps_what_the_batch_knows_and_follows_the_priority():
    behaviour = BEHAVIOURS["replay_by_rank"]()
    x = np.arange(8.0).reshape(4, 2)
    energy = np.array([5.0, 4.0, np.inf, 3.0])
    state, _ = updated(behaviour, started(behaviour), x, energy, [True] * 4)
    np.testing.assert_array_equal(state.energy[:3], [5.0, 4.0, 3.0])
    np.testing.assert_array_equal(state.log_weight[:3], [5.0, 4.0, 3.0])
    assert state.score.shape == (256, 0)  # no network of SAMPLER is shown scores
    ends = np.asarray(proposed(behaviour, state, size=1_000).paths.xs[:, -1, 0])
    share = (1 / 0.03) / np.sum(1 / (0.03 + np.arange(3)))
    assert np.mean(ends == 6.0) == pytest.approx(share, abs=0.03)
    assert set(ends) <= {0.0, 2.0, 6.0}


def test_replay_keeps_the_score_that_came_with_the_path():
    behaviour = ds.behaviours.replay(capacity=8)

    @jax.jit
    def once(key):
        state, _ = behaviour.init(key, SCORED, PARAMS, skewed_energy)
        simulate = jax.vmap(SCORED.simulate, in_axes=(None, 0, None))
        paths = simulate(PARAMS, jax.random.split(key, 4), skewed_energy)
        trajectories = jax.vmap(SCORED.score_path, in_axes=(None, 0))(PARAMS, paths)
        rows = jnp.ones(4, bool)
        proposal = ds.Proposal(paths, rows, rows, ~rows)
        arguments = key, SCORED, PARAMS, skewed_energy
        return behaviour.update(state, *arguments, trajectories, proposal, 0)[0]

    state = once(jax.random.key(1))
    gradients = jax.jit(jax.vmap(jax.grad(skewed_energy)))(state.x[:4])
    expected = -SCALE[None] * np.asarray(gradients)
    np.testing.assert_allclose(state.score[:4], expected, rtol=1e-4, atol=1e-4)
    assert np.any(state.log_weight[:4] != 0)


@pytest.mark.parametrize(
    "factory",
    [
        lambda: ds.behaviours.replay(8, priority="rank"),
        lambda: ds.behaviours.local_search(priority="rank"),
    ],
)
def test_a_priority_is_a_function(factory):
    with pytest.raises(ValueError, match=r"priority must be a function.*got 'rank'"):
        factory()


# -- local search ---------------------------------------------------------------------


@jax.custom_vjp
def _breakable(broken, x):
    """`skewed_energy`, with NaN for a gradient if it is broken: nothing is accepted."""
    del broken
    return skewed_energy(x)


def _backward(residuals, cotangent):
    broken, x = residuals
    gradient = jnp.where(broken > 0, jnp.nan, jax.grad(skewed_energy)(x))
    return None, cotangent * gradient


_breakable.defvjp(lambda broken, x: (skewed_energy(x), (broken, x)), _backward)
SOUND, BROKEN = (Partial(_breakable, jnp.full((), broken)) for broken in (0.0, 1.0))
SEARCH = ds.behaviours.local_search(
    256, every=2, num_chains=16, num_steps=30, num_burn_in=20
)


@functools.partial(jax.jit, static_argnums=0)
def _start_and_update(sampler, energy, key, x, count):
    size = len(x)
    xs = jnp.broadcast_to(x[:, None], (size, K + 1, 2))
    energies, zeros = jax.vmap(energy)(x), jnp.zeros((size, K))
    scores = jnp.zeros((size, K + 1, 2 * sampler.needs_score))
    paths = ds.Path(xs, energies, scores, energies)
    trajectories = Trajectory(xs, x, energies, energies, zeros, zeros, energies)
    rows = jnp.ones(size, bool)
    proposal = ds.Proposal(paths, rows, rows, ~rows)
    state, _ = SEARCH.init(key, sampler, PARAMS, energy)
    return SEARCH.update(
        state, key, sampler, PARAMS, energy, trajectories, proposal, count
    )


def _searched(energy=SOUND, x=None, sampler=SAMPLER, count=1):
    """State and cost of SEARCH after one update; a search is due at 1."""
    x = skewed_draws()[:32] if x is None else jnp.asarray(x, jnp.float32)
    return _start_and_update(sampler, energy, jax.random.key(4), x, jnp.asarray(count))


def test_local_search_stores_what_chains_accept():
    state, cost = _searched()
    assert (int(cost.energy), int(cost.gradient)) == (0, 16 * 31)
    assert int(state.found.size) == 32
    size = int(state.searched.size)
    assert size == round(float(state.acceptance) * 160) > 60
    x = np.asarray(state.searched.x[:size])
    energies = jax.jit(jax.vmap(skewed_energy))(x)
    held = state.searched.energy[:size]
    np.testing.assert_allclose(energies, held, rtol=1e-4, atol=1e-4)
    assert len(np.unique(x[:, 0])) == size  # no repeats
    assert float(state.step_size) > 0.1
    assert (int(state.num_searches), int(state.num_failures)) == (1, 0)
    reported = SEARCH.metrics(state)
    assert float(reported["local_search_acceptance"]) == float(state.acceptance)
    proposal = proposed(SEARCH, state)
    assert flags(proposal) == (0.0, 0.0, 0.0)
    distance = np.asarray(proposal.paths.xs)[:, None, -1] - x[None]
    assert np.all(np.abs(distance).sum(-1).min(1) == 0)


@pytest.mark.slow
def test_local_search_keeps_scores_for_samplers_that_use_them():
    state, _ = _searched(sampler=SCORED)
    size = int(state.searched.size)
    gradients = jax.vmap(jax.grad(skewed_energy))(state.searched.x[:size])
    expected = -SCALE[None] * np.asarray(gradients)
    np.testing.assert_allclose(
        state.searched.score[:size], expected, rtol=1e-3, atol=1e-3
    )


def test_local_search_waits_until_it_is_due():
    state, cost = _searched(count=0)
    assert (
        int(cost.gradient) == int(state.searched.size) == int(state.num_searches) == 0
    )
    assert int(state.found.size) == 32
    assert np.isnan(SEARCH.metrics(state)["local_search_acceptance"])
    assert flags(proposed(SEARCH, state)) == (1.0, 1.0, 0.0)


def test_local_search_from_nothing_waits():
    state, cost = _searched(x=np.full((32, 2), np.nan))
    assert int(cost.gradient) == int(state.num_searches) == int(state.found.size) == 0
    assert int(state.found.num_rejected) == 32


def test_a_search_that_never_accepts_is_counted_and_starts_afresh():
    """Every move of these chains leads to NaN."""
    state, cost = _searched(BROKEN)
    assert int(cost.gradient) == 16 * 31
    assert (int(state.num_searches), int(state.num_failures)) == (1, 1)
    assert int(state.searched.size) == int(state.searched.num_rejected) == 0
    assert float(state.acceptance) == 0
    assert float(state.step_size) == pytest.approx(0.1)  # and not vanishing
    assert int(SEARCH.metrics(state)["local_search_failures"]) == 1
    assert flags(proposed(SEARCH, state)) == (1.0, 1.0, 0.0)


@pytest.mark.slow
def test_training_survives_searches_that_never_accept():
    behaviour = trainable("local_search")
    fit = ds.fit(
        jax.random.key(0),
        SAMPLER,
        ds.objectives.log_variance(),
        BROKEN,
        behaviour=behaviour,
        num_updates=4,
        batch_size=8,
        progress_bar=False,
    )
    assert fit.metrics["local_search_failures"].tolist() == [0, 1, 1, 2]
    assert np.isfinite(fit.metrics["local_search_acceptance"]).tolist() == [0, 1, 1, 1]
    assert fit.num_skipped == 0
    assert np.all(np.isfinite(fit.metrics["loss"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every and num_chains must be at least 1"),
        ({"num_chains": 0}, "every and num_chains must be at least 1"),
        ({"num_burn_in": 200}, "num_burn_in must be at least 0 and below num_steps"),
        ({"num_integration_steps": 0}, "num_integration_steps must be at least 1"),
        ({"initial_step_size": 0.0}, "initial_step_size must be positive"),
        ({"target_acceptance": 1.0}, "target_acceptance must be between 0 and 1"),
        ({"capacity": 1_000}, "capacity must hold what one search may find.* = 12800"),
    ],
)
def test_bad_numbers_for_local_search(options, message):
    with pytest.raises(ValueError, match=message):
        ds.behaviours.local_search(**options)


# -- mixtures -------------------------------------------------------------------------


def test_mixture_keeps_its_shares():
    behaviours = ds.behaviours
    draws = behaviours.reference_draws(skewed_draws())
    mixture = behaviours.mixture(
        (behaviours.on_policy(), 2), (behaviours.exploration(0.1), 1), (draws, 1)
    )
    proposal = proposed(mixture, size=16)
    assert proposal.paths.xs.shape == (16, K + 1, 2)
    assert flags(proposal) == (0.75, 0.5, 0.25)
    assert np.all(proposal.on_policy[:8])  # in the order given
    assert np.all(proposal.target_draws[12:])
    provides = mixture.provides
    assert provides[:-1] == (True, True, False, True, False, False)
    assert provides.stored_rows(16) == 0
    assert not np.any(proposal.paths.xs[:4] == proposal.paths.xs[8:12])


@pytest.mark.parametrize("size", [5, 7, 10, 33])
def test_rounding_fills_the_batch(size):
    on_policy, explore = ds.behaviours.on_policy(), ds.behaviours.exploration(0.1)
    mixture = ds.behaviours.mixture((on_policy, 0.3), (explore, 0.3), (on_policy, 0.4))

    def propose(key):
        return mixture.propose(
            ((), (), ()), key, SAMPLER, PARAMS, skewed_energy, rows_of(size), 0
        )

    shapes = jax.eval_shape(propose, jax.random.key(0))
    assert shapes.paths.xs.shape == (size, K + 1, 2)
    assert shapes.on_policy.shape == (size,)


def test_a_share_of_less_than_a_row_is_refused():
    mixture = ds.behaviours.mixture(
        (ds.behaviours.on_policy(), 0.98), (ds.behaviours.replay(64), 0.02)
    )
    with pytest.raises(ValueError, match="batch_size=8 leaves a member"):
        ds.fit(
            jax.random.key(0),
            SAMPLER,
            ds.objectives.log_variance(),
            skewed_energy,
            behaviour=mixture,
            num_updates=1,
            batch_size=8,
            progress_bar=False,
        )


def test_members_are_updated_and_nested():
    """The buffer of a replay takes what the others simulate, and nothing else."""
    behaviours = ds.behaviours
    inner = behaviours.mixture((behaviours.replay(64), 1), (behaviours.on_policy(), 1))
    outer = behaviours.mixture((inner, 1), [behaviours.exploration(0.1), 1])
    x = np.arange(16.0).reshape(8, 2)
    simulated = np.arange(8) % 2 == 0
    state, _ = updated(outer, started(outer), x, np.zeros(8), simulated)
    buffer = state[0][0]
    assert isinstance(buffer, buffers.Buffer)
    np.testing.assert_array_equal(buffer.x[:4], x[simulated])


def test_metrics_of_members_are_merged():
    behaviours = ds.behaviours
    search = BEHAVIOURS["local_search"]()
    one = behaviours.mixture((behaviours.on_policy(), 1), (search, 1))
    state = (), started(search)
    assert behaviours.on_policy().metrics(()) == {}
    assert set(one.metrics(state)) == set(search.metrics(state[1]))
    two = behaviours.mixture((one, 1), (search, 1))
    names = set(two.metrics((state, state[1])))
    assert names == {f"{i}_{name}" for i in (0, 1) for name in one.metrics(state)}


@pytest.mark.parametrize(
    "members",
    [
        (),
        (ds.behaviours.on_policy(),),
        ((ds.behaviours.on_policy, 1.0),),
        ((ds.behaviours.on_policy(), 0.0),),
        ((ds.behaviours.on_policy(), -1.0),),
        ((ds.behaviours.on_policy(), float("nan")),),
        ((ds.behaviours.on_policy(), "half"),),
        ((ds.behaviours.on_policy(), None),),
        ((0.5, ds.behaviours.on_policy()),),
        ((ds.objectives.log_variance(), 0.5),),
    ],
)
def test_bad_members(members):
    with pytest.raises(ValueError, match="mixture"):
        ds.behaviours.mixture(*members)


# -- target draws ---------------------------------------------------------------------


def test_reference_draws_end_in_the_given_points():
    draws = np.array([[1.0, 2.0], [3.0, 4.0]])
    proposal = proposed(ds.behaviours.reference_draws(draws), size=32)
    ends = np.unique(np.asarray(proposal.paths.xs[:, -1]), axis=0)
    np.testing.assert_array_equal(ends, draws)


def test_reference_draws_of_another_dimension():
    with pytest.raises(ValueError, match="draws must have 2 columns, got 3"):
        started(ds.behaviours.reference_draws(np.zeros((4, 3))))


def test_smc_that_does_not_arrive_is_no_seed():
    """Its particles would pass for draws from the target."""
    behaviour = ds.behaviours.smc_seeded(16)

    def nowhere(x):
        return jnp.nan * jnp.sum(x)

    with pytest.raises(ValueError, match=r"inverse temperature.*loc and scale"):
        behaviour.init(jax.random.key(0), SAMPLER, PARAMS, nowhere)


def test_smc_that_only_copied_points_is_no_seed(monkeypatch):
    zero = jnp.zeros((), jnp.int32)
    x = jnp.repeat(jnp.arange(4.0), 64)[:, None] + jnp.zeros((1, 2))
    stuck = mcmc.SMCResult(
        x, jnp.zeros(256), zero, zero, zero, zero, zero, zero, jnp.asarray(True)
    )
    monkeypatch.setattr(mcmc, "smc_from_gaussian", lambda *_, **__: stuck)
    behaviour = ds.behaviours.smc_seeded(256)
    with pytest.raises(ValueError, match="only 4 distinct points of 256"):
        behaviour.init(jax.random.key(0), SAMPLER, PARAMS, two_modes)


WEIGHTS = jnp.array([0.7, 0.3])
MODES = jnp.array([[-4.0, 2.0], [3.0, -3.0]])


def two_modes(x):
    distance = jnp.sum((x[None] - MODES) ** 2, -1) / (2 * 0.5**2)
    return -jax.nn.logsumexp(jnp.log(WEIGHTS) - distance) + jnp.log(2 * jnp.pi * 0.25)


@functools.cache
def _seeded():
    """SMC on the two-mode target from a reference of scale 3."""
    behaviour = ds.behaviours.smc_seeded(256, every=4, num_mcmc_steps=3)
    sampler = dataclasses.replace(SAMPLER, loc=0.0, scale=3.0)
    init = jax.jit(lambda key: behaviour.init(key, sampler, PARAMS, two_modes))
    return behaviour, sampler, *init(jax.random.key(0))


def test_smc_covers_both_modes_and_counts_its_cost():
    behaviour, sampler, state, cost = _seeded()
    assert state.x.shape == (256, 2)
    first = np.linalg.norm(np.asarray(state.x - MODES[:1]), axis=1) < 3
    second = np.linalg.norm(np.asarray(state.x - MODES[1:]), axis=1) < 3
    assert np.all(first | second)
    assert abs(first.mean() - 0.7) < 0.2  # particles are dependent
    log_z = jax.nn.logsumexp(state.log_weight) - jnp.log(256.0)
    assert abs(float(log_z)) < 0.4  # this target is normalised
    assert int(cost.gradient) > 256 * 3
    assert int(cost.energy) > 0
    proposal = behaviour.propose(
        state, jax.random.key(1), sampler, PARAMS, two_modes, rows_of(16), 0
    )
    ends = np.asarray(proposal.paths.xs[:, -1])
    distance = np.abs(ends[:, None] - np.asarray(state.x)[None]).sum(-1).min(1)
    assert np.all(distance == 0)
    assert np.all(proposal.target_draws)


def test_smc_runs_again_when_it_is_due():
    behaviour, sampler, state, _ = _seeded()

    @jax.jit
    def update(count):
        return behaviour.update(
            state, jax.random.key(5), sampler, PARAMS, two_modes, None, None, count
        )

    for count, due in ((0, False), (2, False), (3, True), (4, False), (7, True)):
        new, cost = update(jnp.asarray(count))
        assert np.any(new.x != state.x) == due, count
        assert (int(cost.gradient) > 0) == due
        assert (int(cost.energy) > 0) == due


def test_smc_without_every_keeps_its_particles_for_nothing():
    behaviour = ds.behaviours.smc_seeded(64)
    state = object()
    new, cost = behaviour.update(
        state, jax.random.key(5), SAMPLER, PARAMS, two_modes, None, None, 3
    )
    assert new is state
    assert (int(cost.energy), int(cost.gradient)) == (0, 0)


def test_runs_of_smc_are_pooled_by_their_share_of_z(monkeypatch):
    """A run whose estimate of Z is twice as large comes up twice as often."""
    runs = iter([0.0, 1.0, 2.0, 3.0])

    def smc(*_, **__):
        run = next(runs)
        x = jnp.full((8, 2), run)
        log_z = jnp.log(1 + (run == 1.0) * jnp.ones(()))
        zeros = jnp.zeros((), jnp.int32)
        reached = jnp.asarray(run != 3.0)
        return mcmc.SMCResult(
            x, jnp.full(8, log_z), log_z, zeros, zeros, zeros, log_z, log_z, reached
        )

    monkeypatch.setattr(mcmc, "smc_from_gaussian", smc)
    behaviour = ds.behaviours.smc_seeded(8, every=1, num_runs=3)
    arguments = SAMPLER, PARAMS, two_modes

    @jax.jit
    def propose(state):
        return behaviour.propose(
            state, jax.random.key(1), *arguments, rows_of(3_000), 0
        )

    def share(state):
        proposal = propose(state)
        ends, counts = np.unique(proposal.paths.xs[:, -1, 0], return_counts=True)
        assert np.all(proposal.target_draws)
        return dict(zip(ends.tolist(), counts / 3_000, strict=True))

    def again(state):
        key = jax.random.key(2)
        return behaviour.update(state, key, *arguments, None, None, jnp.asarray(0))[0]

    state, _ = behaviour.init(jax.random.key(0), *arguments)
    assert state.x.shape == (24, 2)
    assert share(state) == {0.0: 1.0}
    state = again(state)
    assert share(state) == pytest.approx({0.0: 1 / 3, 1.0: 2 / 3}, abs=0.05)
    state = again(state)
    third = {0.0: 0.25, 1.0: 0.5, 2.0: 0.25}
    assert share(state) == pytest.approx(third, abs=0.05)
    kept = again(state)  # the fourth run does not reach the target
    np.testing.assert_array_equal(kept.x, state.x)
    np.testing.assert_array_equal(kept.log_weight, state.log_weight)
    assert behaviour.metrics(kept) == {"num_failed_smc": 1}


@pytest.mark.slow
def test_smc_from_a_prior():
    """A wide prior finds what a reference in the wrong place does not."""

    def log_prior(x):
        return -0.5 * jnp.sum((x / 5) ** 2) - 2 * jnp.log(5.0) - jnp.log(2 * jnp.pi)

    def log_likelihood(x):
        return -two_modes(x) - log_prior(x)

    prior = ds.Target(
        energy=two_modes,
        dim=2,
        log_prior=log_prior,
        log_likelihood=log_likelihood,
        sample_prior=lambda key, n: 5 * jax.random.normal(key, (n, 2)),
    )
    behaviour = ds.behaviours.smc_seeded(128, num_mcmc_steps=2, prior=prior)
    state, _ = behaviour.init(jax.random.key(0), SAMPLER, PARAMS, two_modes)
    first = np.linalg.norm(np.asarray(state.x - MODES[:1]), axis=1) < 3
    assert 0.3 < first.mean() < 0.95
    with pytest.raises(ValueError, match="has no prior to temper from"):
        ds.behaviours.smc_seeded(prior=ds.Target(energy=two_modes, dim=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_runs": 2}, "num_runs .* needs every, got 2 and every=None"),
        ({"num_runs": 0, "every": 3}, "num_runs must be at least 1"),
        ({"min_ess": 0.0}, "min_ess must be a share"),
    ],
)
def test_bad_pools_of_smc_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        ds.behaviours.smc_seeded(8, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"num_particles": 1}, {"num_mcmc_steps": 0}, {"every": 0}, {"every": -1}],
)
def test_bad_numbers_for_smc(arguments):
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        ds.behaviours.smc_seeded(**arguments)


# -- cost -----------------------------------------------------------------------------


COUNTED = [("affine", name) for name in BEHAVIOURS]
COUNTED += [("gbs", "mixture"), ("gbs", "local_search")]


@pytest.mark.parametrize(
    ("sampler", "name"),
    mostly_slow(COUNTED, ("affine", "mixture")),
)
def test_fit_counts_the_evaluations_it_makes(sampler, name):
    sampler = SAMPLER if sampler == "affine" else SAMPLERS[sampler](num_steps=K)
    behaviour = trainable(name)
    energy, take = counting_energy(skewed_energy)
    fit = ds.fit(
        jax.random.key(3),
        sampler,
        ds.objectives.trajectory_balance(),
        energy,
        behaviour=behaviour,
        num_updates=3,
        batch_size=8,
        progress_bar=False,
    )
    made = take()
    counted = fit.num_energy_evaluations + fit.num_gradient_evaluations
    if name.startswith("smc"):
        # BlackJAX evaluates in loops of its own and the compiler merges some of it.
        assert counted == pytest.approx(made["energy"] + made["gradient"], rel=0.3)
    else:
        assert fit.num_energy_evaluations == made["energy"]
        assert fit.num_gradient_evaluations == made["gradient"]


def test_initial_pilots_are_in_the_count():
    recipe = training.Recipe(
        SAMPLER,
        ds.objectives.trajectory_balance(),
        ds.behaviours.on_policy(),
        optax.sgd(1e-3),
        batch_size=8,
    )
    state, cost = training.init(jax.random.key(0), recipe, skewed_energy)
    assert int(cost.energy) == ds.batching.BATCH
    assert float(state.objective_state) == pytest.approx(LOG_Z, abs=1.0)
