"""Where training paths come from: flags, laws, stores, shares, costs, determinism."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
from diffsamp import buffers, training
from diffsamp.types import Trajectory

# Affine controls on the general bridge: cheap to compile, and both kernels are learned.
LOC, SCALE, DIFFUSION, K = np.array([0.4, -0.3]), np.array([1.8, 1.5]), 0.6, 3
AFFINE = ds.networks.from_function(
    lambda key, dim: {"offset": jnp.full(dim, 0.5), "slope": jnp.full(dim, -0.2)},
    lambda params, y, t, context: params["offset"] + params["slope"] * y,
)
SAMPLER = ds.samplers.gbs(
    2,
    K,
    loc=LOC,
    scale=SCALE,
    diffusion=DIFFUSION,
    network=AFFINE,
    destruction_network=AFFINE,
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
    empty = jnp.zeros((size, K, 0))
    paths = ds.Path(xs, energy, empty, empty[:, 0], empty[:, 0])
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
    "reference_draws": (0.0, 0.0, 1.0),
    "smc_seeded": (0.0, 0.0, 1.0),
    "mixture": (1.0, 1.0, 0.0),
}


@pytest.mark.parametrize(
    "name", mostly_slow(BEHAVIOURS, "on_policy", "replay", "reference_draws")
)
def test_paths_flags_and_determinism(name):
    behaviour = BEHAVIOURS[name]()
    state = started(behaviour)
    proposal = proposed(behaviour, state)
    assert proposal.paths.xs.shape == (16, K + 1, 2)
    assert proposal.paths.scores.shape == (16, K, 0)
    assert proposal.paths.last_score.shape == (16, 0)
    energies = jax.vmap(skewed_energy)(proposal.paths.xs[:, -1])
    np.testing.assert_allclose(proposal.paths.energy, energies, rtol=1e-5, atol=1e-5)
    assert flags(proposal) == FLAGS[name]
    again, other = proposed(behaviour, state), proposed(behaviour, state, seed=9)
    jax.tree.map(np.testing.assert_array_equal, proposal, again)
    assert not np.any(proposal.paths.xs == other.paths.xs)
    jax.tree.map(np.testing.assert_array_equal, state, started(behaviour))


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_what_is_promised_is_what_is_delivered(name):
    """`provides` is what `fit` trusts when it accepts an objective."""
    behaviour = BEHAVIOURS[name]()
    provides = behaviour.provides
    simulated, on_policy, target_draws = FLAGS[name]
    if name != "replay":
        assert provides.simulated == (simulated > 0)
        assert provides.on_policy == (on_policy > 0)
    assert provides.target_draws == (target_draws > 0)
    assert provides.only_on_policy == (name == "on_policy")


@pytest.mark.parametrize(
    "name", ["on_policy", "exploration", "replay", "mixture", "smc_seeded"]
)
def test_equal_arguments_give_one_behaviour(name):
    assert BEHAVIOURS[name]() is BEHAVIOURS[name]()


@pytest.mark.parametrize("name", mostly_slow(BEHAVIOURS, "mixture"))
def test_training_with_it_is_deterministic(name):
    behaviour = BEHAVIOURS[name]()
    if name == "replay":  # by itself it only repeats
        behaviour = ds.behaviours.mixture(
            (behaviour, 0.5), (BEHAVIOURS["on_policy"](), 1)
        )
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


def test_replay_smaller_than_a_batch_is_refused():
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
    assert provides == (True, True, False, True, False)
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
    "arguments",
    [{"num_particles": 1}, {"num_mcmc_steps": 0}, {"every": 0}, {"every": -1}],
)
def test_bad_numbers_for_smc(arguments):
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        ds.behaviours.smc_seeded(**arguments)


# -- cost -----------------------------------------------------------------------------


COUNTED = [("affine", name) for name in BEHAVIOURS] + [("gbs", "mixture")]


@pytest.mark.parametrize(
    ("sampler", "name"), mostly_slow(COUNTED, ("affine", "mixture"))
)
def test_fit_counts_the_evaluations_it_makes(sampler, name):
    sampler = SAMPLER if sampler == "affine" else SAMPLERS[sampler](num_steps=K)
    behaviour = BEHAVIOURS[name]()
    if name == "replay":
        behaviour = ds.behaviours.mixture(
            (behaviour, 0.5), (BEHAVIOURS["on_policy"](), 1)
        )
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
    if name == "smc_seeded":
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
