"""Noise schedules, time grids and the tables of constants made from them."""

import dataclasses

import numpy as np
import pytest
from tables import NOISE_SCHEDULES, SAMPLERS

import diffsamp as ds
from diffsamp.schedules import FORGETTING

TIMES = np.linspace(0.0, 1.0, 1001)
STEPS = (1, 2, 7, 100)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_signal_rises_from_almost_nothing_to_one(name):
    signal = NOISE_SCHEDULES[name]().signal(TIMES)
    assert signal.dtype == np.float64
    assert signal[-1] == pytest.approx(1.0, abs=1e-12)
    assert 0 < signal[0] <= FORGETTING
    assert np.all(np.diff(signal) >= 0)
    assert np.all(np.diff(signal[TIMES >= 0.02]) > 0)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_schedules_are_compared_by_value(name):
    make = NOISE_SCHEDULES[name]
    assert make() == make()
    assert hash(make()) == hash(make())
    first = dataclasses.fields(make())[0].name
    assert make() != dataclasses.replace(make(), **{first: 0.123})


def test_geometric_noise_falls_geometrically():
    r = 0.05
    signal = ds.schedules.geometric(r, floor=1e-12).signal(TIMES)
    total_variance = signal * r**2 + 1 - signal  # of a target of standard deviation r
    expected = np.linspace(0.0, 2 * np.log(r), TIMES.size)
    np.testing.assert_allclose(np.log(total_variance), expected, atol=1e-8)
    assert ds.schedules.geometric(r, floor=1e-3).signal(0.0) == 1e-3


def test_linear_is_the_integral_of_a_linear_rate():
    schedule = ds.schedules.linear(12.0, 0.3)
    t = np.linspace(0.4, 1.0, 20_001)
    rate = 12.0 * (1 - t) + 0.3 * t
    assert schedule.signal(0.4) == pytest.approx(np.exp(-np.trapezoid(rate, t)))


def test_cosine_power_is_the_integral_of_its_fourth_power():
    schedule = ds.schedules.cosine_power(10.0)
    u = np.linspace(0.0, 1.0, 20_001)
    rate = np.cos(np.pi * u / 2) ** 4
    share = np.trapezoid(np.where(u >= 0.3, rate, 0.0), u) / np.trapezoid(rate, u)
    assert schedule.signal(0.3) == pytest.approx(np.exp(-10.0 * share), rel=1e-3)
    assert schedule.signal(0.0) == pytest.approx(np.exp(-10.0))


def test_cosine_is_a_squared_sine():
    schedule = ds.schedules.cosine()
    assert schedule.signal(0.5) == pytest.approx(0.5)
    assert schedule.signal(0.0) == 1e-6
    # the floor does not flatten it, however fine the grid
    coefficients = ds.processes.VariancePreserving(schedule).coefficients(5_000)
    assert np.all(coefficients.generation_std > 0)


def test_power_grid():
    np.testing.assert_allclose(ds.schedules.power_grid()(5), np.linspace(0, 1, 6))
    times = ds.schedules.power_grid(2.0)(10)
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert np.all(np.diff(np.diff(times)) < 0)  # finer near the target
    assert ds.schedules.power_grid(1) == ds.schedules.power_grid(1.0)


def test_cosine_anneal():
    values = [float(ds.schedules.cosine_anneal(p)) for p in (0.0, 0.25, 1.0)]
    np.testing.assert_allclose(values, [1.0, 0.5 + 0.25 * np.sqrt(2), 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ds.schedules.geometric(0.0), "smallest_scale"),
        (lambda: ds.schedules.geometric(1.0), "smallest_scale"),
        (lambda: ds.schedules.geometric(float("nan")), "smallest_scale"),
        (lambda: ds.schedules.geometric(0.1, floor=0.0), "floor"),
        (lambda: ds.schedules.cosine(floor=2.0), "floor"),
        (lambda: ds.schedules.linear(0.0, 0.1), "beta_reference"),
        (lambda: ds.schedules.linear(1.0, -0.1), "beta_target"),
        (lambda: ds.schedules.cosine_power(5.0), "total"),
        (lambda: ds.schedules.cosine_power(float("nan")), "total"),
        (lambda: ds.schedules.power_grid(0.0), "power"),
        (lambda: ds.samplers.gbs(2, diffusion=0.0), "diffusion"),
        (lambda: ds.samplers.gbs(2, diffusion=float("nan")), "diffusion"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_coefficients_are_finite_at_every_step_count(name, num_steps):
    table = SAMPLERS[name]().process.coefficients(num_steps)
    assert table.times.shape == (num_steps + 1,)
    assert table.times[0] == 0.0
    assert table.times[-1] == 1.0
    for field, values in zip(table._fields[1:], table[1:], strict=True):
        assert values.shape == (num_steps,), field
        assert np.all(np.isfinite(values)), field
        assert np.all(values >= 0), field
    assert np.all(table.generation_std > 0)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("noise", NOISE_SCHEDULES)
def test_variance_preserving_kernels_keep_the_reference_and_forget_the_target(
    noise, num_steps
):
    schedule = NOISE_SCHEDULES[noise]()
    process = ds.processes.VariancePreserving(schedule)
    table = process.coefficients(num_steps)
    stationary = table.destruction_decay**2 + table.destruction_std**2
    np.testing.assert_allclose(stationary, 1.0, rtol=1e-12)
    forgotten = np.prod(table.destruction_decay**2)
    assert forgotten == pytest.approx(schedule.signal(0.0), rel=1e-9)
    assert forgotten <= FORGETTING


def test_variance_preserving_generation_is_the_exponential_integrator():
    table = ds.processes.VariancePreserving(ds.schedules.cosine_power()).coefficients(9)
    # a score s moves the mean by 2 (1 - decay) s
    shift = table.generation_std * np.sqrt(1 / 9) * table.score_gain
    np.testing.assert_allclose(shift, 2 * (1 - table.generation_decay), rtol=1e-12)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_pinned_brownian_kernels_are_reverses_of_each_other(num_steps, power):
    grid = ds.schedules.power_grid(power)
    table = ds.processes.PinnedBrownian(grid).coefficients(num_steps)
    t, s = table.times[:-1], table.times[1:]
    assert np.sum(table.generation_std**2) == pytest.approx(1.0)
    # E[y | y'] and Var[y | y'] of a Brownian motion from 0
    np.testing.assert_allclose(table.destruction_decay, t / s, rtol=1e-12)
    np.testing.assert_allclose(table.destruction_std**2, t * (s - t) / s, atol=1e-15)


def test_brownian_has_its_diffusion():
    table = ds.processes.Brownian(0.7).coefficients(5)
    for std in (table.generation_std, table.destruction_std):
        assert np.sum(std**2) == pytest.approx(0.49)


@dataclasses.dataclass(frozen=True)
class Flat:
    """A schedule that stands still."""

    def signal(self, t):
        return np.maximum(np.asarray(t, np.float64), 0.5)


def test_a_schedule_that_stands_still_is_refused():
    process = ds.processes.VariancePreserving(Flat())
    assert process.coefficients(1).times.size == 2
    with pytest.raises(ValueError, match="noise schedule must increase"):
        process.coefficients(4)
