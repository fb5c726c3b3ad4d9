"""Draws and pilots: noise is no disagreement, a lost part is."""

import numpy as np
import pytest

from diffsamp.numpyro.agreement import disagreement


def test_noise_is_seldom_called_a_disagreement():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        x, first, second = rng.standard_t(6, size=(3, 1_000, 8))
        log_weight = 0.5 * rng.normal(size=1_000)  # says nothing about x
        found.append(disagreement(x, log_weight, first, second) is not None)
    assert np.mean(found) < 0.02


def test_pilots_that_differ_from_each_other_say_little():
    """Two modes whose weights the pilots do not know well."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(100):
        sets = []
        for share in (0.5, *rng.normal(0.5, 0.05, size=2)):
            mode = np.where(rng.random((2_000, 1)) < share, -2.0, 2.0)
            sets.append(mode + rng.normal(size=(2_000, 4)))
        found.append(disagreement(sets[0], np.zeros(2_000), *sets[1:]) is not None)
    assert np.mean(found) < 0.15


@pytest.mark.parametrize("power", [1, 2])
def test_a_lost_part_is_found(power):
    """A normal without its lowest 4 %, or without both tails."""
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 2_000, 5))
    x = rng.normal(size=(20_000, 5))
    limit = -1.75 if power == 1 else -2.0
    lost = x[:, 3] < limit if power == 1 else np.abs(x[:, 3]) > -limit
    found = disagreement(x, np.where(lost, -np.inf, 0.0), first, second)
    assert found is not None
    assert found.coordinate == 3
    assert found.what == ("mean" if power == 1 else "variance")


def test_weights_repair_what_they_can():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 2_000, 2))
    x = rng.normal(size=(20_000, 2)) + 0.5
    log_weight = 0.25 - 0.5 * x.sum(axis=1)
    assert disagreement(x, log_weight, first, second) is None
    assert disagreement(x, np.zeros(20_000), first, second) is not None
    assert disagreement(x, np.full(20_000, np.inf), first, second) is None
