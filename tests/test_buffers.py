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


def test_bad_arguments():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        buffers.init(0, 2)
    with pytest.raises(ValueError, match=r"cannot add 3 points .* buffer of 2"):
        buffers.add(buffers.init(2, 1), *points(1.0, 2.0, 3.0))
