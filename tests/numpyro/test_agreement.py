"""Draws and pilots: noise is no disagreement, a lost part is; draws alone."""

import numpy as np
import pytest

from diffsamp.diagnostics import pareto_smooth
from diffsamp.numpyro.agreement import PRECISE, disagreement, imprecision


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


def test_what_takes_two_values_can_be_compared():
    """The square of its distance from the middle does not vary at all."""
    rng = np.random.default_rng(8)
    coin = np.where(np.arange(1_000) % 2, 1.0, -1.0)
    normal = rng.normal(size=(3, 1_000))
    x, first, second = (np.stack([coin, n], axis=1) for n in normal)
    assert disagreement(x, np.zeros(1_000), first, second) is None
    x[:, 1] += 0.5
    found = disagreement(x, np.zeros(1_000), first, second)
    assert found is not None
    assert found.coordinate == 1
    x[:, 0] = 1.0
    found = disagreement(x, np.zeros(1_000), first, second)
    assert found is not None
    assert found.coordinate == 0


def test_small_pilots_differ_by_chance():
    rng = np.random.default_rng(9)
    x, (first, second) = rng.normal(size=(5_000, 30)), rng.normal(size=(2, 64, 30))
    assert disagreement(x, np.zeros(5_000), first, second) is None
    found = disagreement(x, np.zeros(5_000), first, second + 1.0)
    assert found is not None
    assert found.between_pilots


def test_weights_repair_what_they_can():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 2_000, 2))
    x = rng.normal(size=(20_000, 2)) + 0.5
    log_weight = 0.25 - 0.5 * x.sum(axis=1)
    assert disagreement(x, log_weight, first, second) is None
    assert disagreement(x, np.zeros(20_000), first, second) is not None
    assert disagreement(x, np.full(20_000, np.inf), first, second) is None


def test_standard_errors_are_those_of_repeats():
    """Unequal scales and weights: a normal of mean 1 seen by one of mean 0."""
    rng = np.random.default_rng(4)
    found = []
    for _ in range(400):
        x = np.array([1.0, 20.0]) * rng.normal(size=(1_000, 2))
        log_weight = x[:, 0] / 2
        weights = np.exp(log_weight)[:, None]
        weights /= weights.sum()
        centre = np.sum(weights * x, axis=0)
        variance = np.sum(weights * (x - centre) ** 2, axis=0)
        found.append((*centre, *variance, imprecision(x, log_weight)))
    spread = np.std([row[:4] for row in found], axis=0)
    limits = (*[PRECISE["mean"]] * 2, *[PRECISE["variance"]] * 2)
    relative = spread / (1, 20, 1, 400) / limits
    excess = np.mean([row[4].excess for row in found])
    assert np.max(relative) == pytest.approx(excess, rel=0.1)


def test_light_tails_are_imprecise_where_the_weights_still_look_well():
    rng = np.random.default_rng(5)
    found, k_hat = [], []
    for _ in range(20):
        x = 0.7 * rng.normal(size=(2_000, 3))
        log_weight = np.sum(x**2, axis=1) * (0.5 / 0.7**2 - 0.5)
        found.append(imprecision(x, log_weight).excess)
        k_hat.append(pareto_smooth(log_weight).pareto_k)
        assert imprecision(x, np.zeros(2_000)).excess < 1
    assert np.mean(k_hat) < 0.7
    assert np.mean(np.array(found) > 1) > 0.9


@pytest.mark.parametrize("log_weight", [-np.inf, np.inf, np.nan])
def test_useless_weights_know_nothing(log_weight):
    x = np.random.default_rng(6).normal(size=(10, 2))
    assert imprecision(x, np.full(10, log_weight)).excess == np.inf


def test_a_single_draw_knows_nothing():
    x = np.random.default_rng(7).normal(size=(10, 2))
    only = np.where(np.arange(10) == 3, 0.0, -np.inf)
    assert imprecision(x, only).excess == np.inf
