"""The second pass: the naive gradient, whatever is known, tile by tile.

Six paths of five steps. A budget of four steps makes tiles of three rows and one step;
one of fifteen makes tiles of six rows and two steps, the last of which overlap.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from tables import (
    NEED_DESTRUCTION,
    OBJECTIVES,
    SAMPLERS,
    batch_of_paths,
    conditional_energy,
    mostly_slow,
    perturbed,
    rows_of,
    skewed_energy,
)

import diffsamp as ds
from diffsamp.behaviours.common import proposal
from diffsamp.scoring import Tile, bytes_per_step, score_paths, tile_within
from diffsamp.types import Anchor

STEPS, ROWS = 5, 6


def _made(name):
    sampler = SAMPLERS[name](num_steps=STEPS)
    params = perturbed(sampler.init(jax.random.key(0)), 0.2)
    paths = batch_of_paths(sampler, params, ROWS, jax.random.key(1)).paths
    return sampler, params, paths, bytes_per_step(sampler, params)


def _assert_same(found, expected):
    tolerance = 1e-10 if jax.config.jax_enable_x64 else 1e-4
    for a, b in zip(found, expected, strict=True):
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
        assert float(difference) <= tolerance * float(optax.tree.norm(b))


def _check_sampler(name):
    sampler, params, paths, each = _made(name)
    weights = jnp.linspace(-1.0, 2.0, ROWS)

    def loss_of(score):
        def loss(params):
            scored = score(params)
            return jnp.sum(weights * scored.log_weight), scored.log_weight

        (_, log_weight), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            params
        )
        return log_weight, gradient

    def naive(params):
        score = jax.vmap(sampler.score, in_axes=(None, 0, None))
        return score(params, paths.xs, skewed_energy)

    expected = loss_of(naive)
    few, many = 4 * each, 15 * each
    by_steps = sampler.backbone is not None  # whose features serve two steps
    tile = Tile(1, 3) if by_steps else Tile(3, 1)
    assert tile_within(sampler, params, ROWS, few) == tile
    assert tile_within(sampler, params, ROWS, many) == Tile(6, 2)
    unknown = paths._replace(densities=None)
    for given, memory in ((paths, few), (unknown, many)):
        found = loss_of(
            lambda p, g=given, m=memory: score_paths(sampler, p, g, memory_budget=m)[0]
        )
        _assert_same(found, expected)


@pytest.mark.parametrize("name", mostly_slow(SAMPLERS, "dis_shared"))
def test_the_gradient_is_the_naive_one(name):
    _check_sampler(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_gradient_is_the_naive_one_in_double_precision(name, x64):
    _check_sampler(name)


def _check_objective(name):
    sampler = "gbs" if name in NEED_DESTRUCTION else "dis"
    _check_on(sampler, OBJECTIVES[name]())


def _check_on(name, objective):
    sampler, params, paths, each = _made(name)
    pilot = None
    if objective.requires.pilot:
        pilot = jax.vmap(sampler.final, in_axes=(None, 0, None))(
            params, jax.random.split(jax.random.key(2), 8), skewed_energy
        )
    own, state = objective.init(
        jax.random.key(3), sampler, params, skewed_energy, pilot
    )
    rows = proposal(paths, simulated=True, on_policy=True, target_draws=True)
    anchor = jnp.linspace(0.0, 1.0, ROWS)
    rows = rows._replace(anchor=Anchor(anchor, anchor**2))

    def run(paths, memory):
        def loss(params):
            return ds.training.batch_loss(
                params,
                objective,
                state,
                sampler,
                skewed_energy,
                rows._replace(paths=paths),
                rows_of(ROWS),
                keys=(jax.random.key(4), jax.random.key(5)),
                count=jnp.asarray(0),
                memory_budget=memory,
            )[0]

        both = {"sampler": params, "objective": perturbed(own, 0.1)}
        return jax.jit(jax.value_and_grad(loss))(both)

    expected = run(paths._replace(densities=None), 2**31)
    assert float(optax.tree.norm(expected[1])) > 0
    _assert_same(run(paths, 4 * each), expected)


DETACHED = [
    name for name in OBJECTIVES if not OBJECTIVES[name]().requires.simulation_gradient
]


@pytest.mark.parametrize("name", mostly_slow(DETACHED, "target_copy"))
def test_every_objective_has_the_naive_gradient(name):
    _check_objective(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETACHED)
def test_every_objective_has_the_naive_gradient_in_double_precision(name, x64):
    _check_objective(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_objective_on_every_process_has_the_naive_gradient(name, x64):
    """The sum of all that make sense, each with a weight of its own."""
    names = [n for n in DETACHED if n not in NEED_DESTRUCTION]
    if SAMPLERS[name](num_steps=STEPS).destruction is not None:
        names = DETACHED
    terms = [(OBJECTIVES[n](), 1.0 + 0.1 * i) for i, n in enumerate(names)]
    _check_on(name, ds.objectives.weighted_sum(*terms))


def test_with_a_condition():
    sampler = ds.samplers.gbs(
        2, STEPS, condition_dim=3, network=ds.networks.free(width=8, depth=1)
    )
    params = perturbed(sampler.init(jax.random.key(0)), 0.2)
    conditions = jax.random.normal(jax.random.key(1), (ROWS, 3))
    keys = jax.random.split(jax.random.key(2), ROWS)
    simulate = jax.vmap(sampler.simulate, in_axes=(None, 0, None, 0))
    paths = simulate(params, keys, conditional_energy, conditions)
    memory = 4 * bytes_per_step(sampler, params)

    def loss_of(score):
        def loss(params):
            log_weight = score(params).log_weight
            return jnp.var(log_weight)

        return jax.jit(jax.value_and_grad(loss))(params)

    def naive(params):
        score = jax.vmap(sampler.score, in_axes=(None, 0, None, 0))
        return score(params, paths.xs, conditional_energy, conditions)

    found = loss_of(
        lambda p: score_paths(sampler, p, paths, conditions, memory_budget=memory)[0]
    )
    _assert_same(found, loss_of(naive))


def test_the_budget_decides_the_tile():
    sampler = SAMPLERS["dis"](num_steps=100)
    params = sampler.init(jax.random.key(0))
    each = bytes_per_step(sampler, params)

    def tile(num_rows, num_steps):
        return tile_within(sampler, params, 512, num_rows * num_steps * each)

    assert tile(512, 1_000) == Tile(512, 100)
    assert tile(512, 60) == Tile(512, 50)  # 60 would leave a piece of 40
    assert tile(512, 9) == Tile(512, 9)
    assert tile(511, 1) == Tile(256, 1)
    assert tile(1, 1) == Tile(1, 1)
    assert tile_within(sampler, params, 10**6).num_rows >= 128  # unless asked for
    assert tile_within(sampler, params, 503, 502 * each).num_rows == 1  # a prime
    with pytest.raises(ValueError, match=f"memory_budget={each - 1} bytes is too"):
        tile_within(sampler, params, 512, each - 1)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (10, "memory_budget=10 bytes is too small"),
        (2e9, "memory_budget must be an int"),
    ],
)
def test_a_budget_of_training_that_will_not_do(budget, words):
    with pytest.raises(ValueError, match=words):
        ds.fit(
            jax.random.key(0),
            SAMPLERS["dis"](),
            ds.objectives.log_variance(),
            skewed_energy,
            batch_size=8,
            num_updates=1,
            memory_budget=budget,
            progress_bar=False,
        )
