"""The ring of points: order, refusals, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsamp import buffers

add = jax.jit(buffers.add)


def points(*values):
    """One-dimensional points and energies of zero."""
    x = jnp.array(values, float)[:, None]
    return x, jnp.zeros(len(values))


def stored(buffer):
    return [float(v) for v in buffer.x[:, 0]]


def test_empty():
    buffer = buffers.init(4, 3)
    assert buffer.x.shape == (4, 3)
    assert buffer.x.dtype == jnp.float32
    assert int(buffer.size) == int(buffer.cursor) == int(buffer.num_rejected) == 0
    draws = buffers.sample(buffer, jax.random.key(0), 5)
    assert np.array_equal(draws, np.zeros((5, 3)))


def test_float64(x64):
    buffer = buffers.init(2, 1)
    assert buffer.x.dtype == jnp.float64
    filled = buffers.add(buffer, *points(1.0))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, buffer, filled)
    assert all(same)
    assert buffers.sample(filled, jax.random.key(0), 3).dtype == jnp.float64


def test_first_in_first_out():
    buffer = add(buffers.init(4, 1), *points(1.0, 2.0, 3.0))
    assert stored(buffer) == [1.0, 2.0, 3.0, 0.0]
    assert int(buffer.size) == 3
    buffer = add(buffer, *points(4.0, 5.0, 6.0))  # 1 and 2 are the oldest
    assert stored(buffer) == [5.0, 6.0, 3.0, 4.0]
    assert int(buffer.size) == 4
    assert int(buffer.cursor) == 2
    buffer = add(buffer, *points(7.0, 8.0, 9.0, 10.0))
    assert stored(buffer) == [9.0, 10.0, 7.0, 8.0]
    assert int(buffer.num_rejected) == 0


def test_non_finite_points_and_energies_are_refused_and_counted():
    x = jnp.array([[1.0, 0.0], [jnp.nan, 0.0], [3.0, jnp.inf], [4.0, 0.0], [5.0, 0.0]])
    energy = jnp.array([0.0, 0.0, 0.0, jnp.nan, -1.0])
    buffer = add(buffers.init(8, 2), x, energy)
    assert stored(buffer)[:3] == [1.0, 5.0, 0.0]  # no gap
    assert int(buffer.size) == 2
    assert int(buffer.num_rejected) == 3
    buffer = add(buffer, x[:1], jnp.array([-jnp.inf]))
    assert int(buffer.size) == 2
    assert int(buffer.num_rejected) == 4
    assert np.all(np.isfinite(buffer.x))


def test_a_rejected_batch_displaces_nothing():
    full = add(buffers.init(3, 1), *points(1.0, 2.0, 3.0))
    after = add(full, jnp.full((3, 1), jnp.nan), jnp.zeros(3))
    assert stored(after) == stored(full)
    assert int(after.cursor) == int(full.cursor)


def test_rows_not_offered_are_not_counted_as_rejected():
    x, energy = points(1.0, jnp.nan, 3.0)
    rows = jnp.array([True, False, True])
    buffer = add(buffers.init(4, 1), x, energy, rows)
    assert stored(buffer) == [1.0, 3.0, 0.0, 0.0]
    assert int(buffer.num_rejected) == 0
    buffer = add(buffer, x, energy, jnp.zeros(3, bool))
    assert int(buffer.size) == 2


def test_samples_are_uniform_over_what_is_stored():
    buffer = add(buffers.init(100, 1), *points(1.0, 2.0, 3.0, 4.0))
    draws = buffers.sample(buffer, jax.random.key(0), 4_000)
    values, counts = np.unique(np.asarray(draws), return_counts=True)
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert np.all(np.abs(counts - 1_000) < 5 * np.sqrt(1_000 * 0.75))


def test_same_key_same_draws():
    buffer = add(buffers.init(100, 1), *points(1.0, 2.0, 3.0, 4.0))
    first, again, other = (
        buffers.sample(buffer, jax.random.key(k), 20) for k in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_everything_that_is_known_of_a_point_is_kept_with_it():
    x = jnp.arange(6.0).reshape(3, 2)
    energy, score = jnp.array([1.0, 2.0, 3.0]), -x
    log_weight = jnp.array([-1.0, -2.0, -3.0])
    buffer = buffers.init(4, 2, score_dim=2)
    buffer = add(buffer, x, energy, score=score, log_weight=log_weight)
    buffer = add(buffer, x, energy, score=score, log_weight=log_weight)
    np.testing.assert_array_equal(buffer.energy, [2.0, 3.0, 3.0, 1.0])
    np.testing.assert_array_equal(buffer.log_weight, -buffer.energy)
    np.testing.assert_array_equal(buffer.score, -buffer.x)
    with pytest.raises(ValueError, match=r"keeps scores.*\[3, 2\], got None"):
        buffers.add(buffer, x, energy)
    with pytest.raises(ValueError, match=r"score must be \[3, 0\], got \[3, 2\]"):
        buffers.add(buffers.init(4, 2), x, energy, score=score)
    with pytest.raises(ValueError, match="score_dim must be 0 or dim=2, got 1"):
        buffers.init(4, 2, score_dim=1)


def test_entries_with_any_number_that_is_not_finite_are_refused():
    x, energy = points(1.0, 2.0, 3.0, 4.0)
    score = jnp.array([[0.0], [jnp.nan], [0.0], [0.0]])
    log_weight = jnp.array([0.0, 0.0, -jnp.inf, jnp.nan])
    buffer = buffers.init(4, 1, score_dim=1)
    buffer = add(buffer, x, energy, score=score, log_weight=log_weight)
    assert stored(buffer) == [1.0, 0.0, 0.0, 0.0]
    assert int(buffer.num_rejected) == 3


# -- priorities -----------------------------------------------------------------------

DRAWS = 20_000


def _filled(energy, log_weight=None, capacity=None):
    """A buffer whose points are 0, 1, 2, ..., its rows beyond left empty."""
    size = len(energy)
    log_weight = np.zeros(size) if log_weight is None else log_weight
    x, energy = jnp.arange(float(size))[:, None], jnp.asarray(energy, float)
    buffer = buffers.init(capacity or 2 * size, 1)
    return add(buffer, x, energy, log_weight=jnp.asarray(log_weight, float))


def _shares(buffer, priority, seed=0):
    """How often each stored row is drawn; asserts that no other is."""
    draw = jax.jit(priority, static_argnums=2)
    rows = np.asarray(draw(buffer, jax.random.key(seed), DRAWS))
    assert rows.min() >= 0
    assert rows.max() < int(buffer.size)
    return np.bincount(rows, minlength=int(buffer.size)) / DRAWS


def _assert_shares(shares, expected):
    assert np.sum(expected) == pytest.approx(1.0)
    error = np.sqrt(np.maximum(expected * (1 - expected), 1 / DRAWS) / DRAWS)
    assert np.all(np.abs(shares - expected) < 5 * error)


def test_uniform_draws_are_those_of_randint():
    buffer = _filled(np.zeros(5))
    rows = buffers.uniform(buffer, jax.random.key(3), 50)
    expected = jax.random.randint(jax.random.key(3), (50,), 0, 5)
    np.testing.assert_array_equal(rows, expected)
    draws = buffers.sample(buffer, jax.random.key(3), 50)
    np.testing.assert_array_equal(draws[:, 0], expected)


def test_rank_follows_the_order_of_energies():
    energy = np.array([3.0, -50.0, 2.0, 2.5, 1e30, -49.0, 0.0])
    rank = np.argsort(np.argsort(energy))
    expected = 1 / (0.01 * 7 + rank)
    buffer = _filled(energy)
    shares = _shares(buffer, buffers.by_rank(0.01))
    _assert_shares(shares, expected / expected.sum())
    expected = 1 / (3.0 * 7 + rank)
    shares = _shares(buffer, buffers.by_rank(3.0))
    _assert_shares(shares, expected / expected.sum())


def test_rank_moves_on_with_the_ring():
    buffer = _filled([0.0, 1.0, 2.0], capacity=3)
    buffer = add(
        buffer, jnp.full((1, 1), 9.0), jnp.array([5.0])
    )  # in place of the best
    expected = 1 / (0.03 + np.array([2.0, 0.0, 1.0]))
    _assert_shares(_shares(buffer, buffers.by_rank()), expected / expected.sum())


def _exponent(log_weight, min_ess):
    """λ of the tempering, by a root finder in NumPy."""

    def ess(exponent):
        weight = np.exp(exponent * (log_weight - log_weight.max()))
        return weight.sum() ** 2 / (weight**2).sum()

    low, high = 0.0, 1.0
    if ess(1.0) >= min_ess * len(log_weight):
        return 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        enough = ess(middle) >= min_ess * len(log_weight)
        low, high = (middle, high) if enough else (low, middle)
    return low


@pytest.mark.parametrize("spread", [0.5, 3.0, 300.0])
def test_weights_are_tempered_to_an_effective_sample_size(spread):
    log_weight = spread * np.random.default_rng(0).standard_normal(40) - 700.0
    buffer, min_ess = _filled(np.zeros(40), log_weight), 0.3
    log_weight = np.asarray(buffer.log_weight[:40], np.float64)
    exponent = _exponent(log_weight, min_ess)
    assert (exponent == 1.0) == (spread == 0.5)
    tempered = np.asarray(jax.jit(buffers.temper, static_argnums=1)(log_weight, 0.3))
    np.testing.assert_allclose(tempered, exponent * log_weight, rtol=1e-3)
    weight = np.exp(tempered - tempered.max())
    ess = weight.sum() ** 2 / (weight**2).sum()
    assert ess >= min_ess * 40 * (1 - 1e-4)
    if spread > 0.5:
        assert ess == pytest.approx(min_ess * 40, rel=1e-2)
    weight = np.exp(exponent * (log_weight - log_weight.max()))
    _assert_shares(_shares(buffer, buffers.by_weight(0.3)), weight / weight.sum())


def test_equal_weights_are_no_priority_and_rows_without_do_not_count():
    temper = jax.jit(buffers.temper, static_argnums=1)
    log_weight = jnp.array([-3.0, -jnp.inf, -3.0, -jnp.inf])
    np.testing.assert_array_equal(temper(log_weight, 1.0), log_weight)
    np.testing.assert_array_equal(temper(log_weight + 9.0, 1.0), log_weight + 9.0)


@pytest.mark.slow
def test_pooled_weights_lead_from_the_samplers_to_the_target():
    """Two proposals, each weighted with its own density; together, the target."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(-1.0, 1.5, 20_000), rng.normal(2.0, 2.0, 20_000)])
    centre = np.repeat([-1.0, 2.0], 20_000)
    scale = np.repeat([1.5, 2.0], 20_000)
    energy = 0.5 * (x - 0.7) ** 2  # not normalised
    log_weight = -energy + 0.5 * ((x - centre) / scale) ** 2 + np.log(scale)
    buffer = add(
        buffers.init(40_000, 1),
        jnp.asarray(x, jnp.float32)[:, None],
        jnp.asarray(energy, jnp.float32),
        log_weight=jnp.asarray(log_weight, jnp.float32),
    )
    draws = buffers.sample(buffer, jax.random.key(0), DRAWS, buffers.by_weight())
    assert float(draws.mean()) == pytest.approx(0.7, abs=0.05)
    assert float(draws.std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("factory", [buffers.by_rank, buffers.by_weight])
def test_priorities_are_pure_and_shared(factory, x64):
    priority = factory()
    assert factory() is factory(0.01 if factory is buffers.by_rank else 0.05)
    buffer = _filled([3.0, 1.0, 2.0], [0.0, 1.0, 2.0])
    assert buffer.energy.dtype == jnp.float64
    keys = jax.random.split(jax.random.key(0), 3)
    compiled = jax.jit(priority, static_argnums=2)
    mapped = jax.jit(jax.vmap(lambda k: priority(buffer, k, 200)))(keys)
    for key, rows in zip(keys, mapped):
        np.testing.assert_array_equal(compiled(buffer, key, 200), rows)
    assert len({tuple(rows) for rows in np.asarray(mapped).tolist()}) == 3
    nothing = jax.tree.map(jnp.zeros_like, buffer)
    np.testing.assert_array_equal(compiled(nothing, keys[0], 200), np.zeros(200))


@pytest.mark.parametrize("offset", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_offset(offset):
    with pytest.raises(ValueError, match="offset must be positive and finite"):
        buffers.by_rank(offset)


@pytest.mark.parametrize("min_ess", [0.0, 1.5, float("nan")])
def test_bad_min_ess(min_ess):
    with pytest.raises(ValueError, match=r"min_ess must be a share.*\(0, 1\], got"):
        buffers.by_weight(min_ess)


def test_bad_arguments():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        buffers.init(0, 2)
    with pytest.raises(ValueError, match=r"cannot add 3 points .* buffer of 2"):
        buffers.add(buffers.init(2, 1), *points(1.0, 2.0, 3.0))
