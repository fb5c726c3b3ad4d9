"""The backbone: E[exp(log_weight)] = Z, for every parameter value and step count."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    CENTRE,
    LEARNED,
    LOG_Z,
    PROCESSES,
    SAMPLERS,
    SMALL,
    mostly_slow,
    perturbed,
    sample_scaled,
    scaled_energy,
    skewed_energy,
)

import diffsamp as ds

Partial = jax.tree_util.Partial


@pytest.mark.parametrize(
    "name", mostly_slow(SAMPLERS, *PROCESSES, "gbs_variance", "dis_shared")
)
def test_every_way_to_the_log_weight_agrees(x64, key, name):
    sampler = SAMPLERS[name](num_steps=3)
    params = perturbed(sampler.init(key), 0.2)

    @jax.jit
    def ways(key):
        trajectory = sampler(params, key, skewed_energy)
        return (
            trajectory,
            sampler.score(params, trajectory.xs, skewed_energy),
            sampler.final(params, key, skewed_energy),
        )

    # `rollout` is compared in test_samplers.py, with its gradient.
    trajectory, scored, final = ways(jax.random.key(3))
    for field, a, b in zip(trajectory._fields, trajectory, scored, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=field)
    assert final.x.shape == (2,)
    np.testing.assert_allclose(final.x, trajectory.x, rtol=1e-12)
    np.testing.assert_allclose(final.log_weight, trajectory.log_weight, rtol=1e-11)
    np.testing.assert_allclose(final.energy, trajectory.energy, rtol=1e-11)
    parts = trajectory.log_destruction - trajectory.log_generation
    whole = -trajectory.energy - trajectory.log_prior + jnp.sum(parts)
    np.testing.assert_allclose(trajectory.log_weight, whole, rtol=1e-12)
    np.testing.assert_allclose(trajectory.energy, skewed_energy(trajectory.x))
    assert np.array_equal(trajectory.x, trajectory.xs[-1])


QUICK = [
    (name, k) for name in [*PROCESSES, "pis_learned", "dis_shared"] for k in (1, 2)
]
QUICK += [("scds_tied", 1), ("cdds", 1), ("cdds_tied", 1)]
WIDE_TAILS = {"gmp": 1.75}  # where components far out differ in their scores


@pytest.mark.parametrize(
    ("name", "num_steps"),
    mostly_slow(
        [(n, k) for n in [*PROCESSES, *LEARNED, "dis_euler"] for k in (1, 2)], *QUICK
    ),
)
def test_quadrature_over_all_paths(x64, key, name, num_steps):
    """Both path densities, integrated over a grid of paths, give 1 and Z.

    The trapezoid rule converges faster than any power for such integrands: 1e-6 needs
    only steps finer than the narrowest kernel.
    """
    loc = 0.2
    sampler = SAMPLERS[name](dim=1, num_steps=num_steps, loc=loc, scale=1.3)
    params = perturbed(sampler.init(key), 0.2)
    point_mass = sampler.process.point_mass
    num_free = num_steps if point_mass else num_steps + 1
    reach = WIDE_TAILS.get(name, 1.0)
    num_points = int(reach * {1: 1000, 2: 160, 3: 80}[num_free]) + 1
    points = np.linspace(-12.0 * reach, 12.0 * reach, num_points)
    grids = np.meshgrid(*[points] * num_free, indexing="ij")
    xs = np.stack(grids, axis=-1).reshape(-1, num_free, 1)
    if point_mass:  # the first state is loc, with log-density 0
        xs = np.concatenate([np.full((len(xs), 1, 1), loc), xs], axis=1)
    cell = (points[1] - points[0]) ** num_free

    @jax.jit
    def integrals(xs):
        def densities(xs):
            t = sampler.score(params, xs, skewed_energy)
            generation = t.log_prior + jnp.sum(t.log_generation)
            return jnp.exp(generation), jnp.exp(-t.energy + jnp.sum(t.log_destruction))

        return [cell * jnp.sum(v) for v in jax.vmap(densities)(xs)]

    generation, destruction = integrals(jnp.asarray(xs))
    assert float(generation) == pytest.approx(1.0, abs=1e-6)
    assert float(destruction) == pytest.approx(np.exp(LOG_Z), rel=1e-6)


NUM_PATHS = 20_000
# The target relative to the reference: narrower, so that exp(log_weight) has a finite
# variance, and wider, so that its inverse has.
NARROW, WIDE = 0.6, 1.8


class Simulated(NamedTuple):
    """How a sampler is simulated: so that its weights have no heavy tails.

    Of a tail no number of paths has the mean.
    """

    factory: Callable[..., ds.Sampler]
    perturbation: float = 0.02
    narrow: float = NARROW


FREE = ds.networks.free(**SMALL, learn_variance=True, step_conditioned=True)


def _inverted_consistency(num_steps, loc, scale, std=0.3, tied=False):
    """Consistency sampling of which untrained networks know the way back.

    Until it is perturbed its path is a Gaussian chain, y' = gain y + noise, of which
    the table of the destruction kernel is the inverse. The process' own way back knows
    nothing of the jumps.
    """
    network = ds.networks.consistency(**SMALL, data_std=std, learn_variance=not tied)
    if tied:
        network = ds.networks.tied(network, FREE)
    make = functools.partial(
        ds.samplers.cdds,
        2,
        num_steps,
        loc=loc,
        smallest_std=std,
        network=network,
    )
    process = make().process
    table = process.coefficients(num_steps)
    skip = std**2 / ((1 - table.times[:-1]) ** 2 + std**2)
    gain = np.sqrt(process.schedule.signal(table.times[1:])) * skip
    variance = [1.0]
    for factor, noise in zip(gain, table.generation_std, strict=True):
        variance.append(factor**2 * variance[-1] + noise**2)
    before, after = np.array(variance[:-1]), np.array(variance[1:])
    slope = gain * before / after - table.destruction_decay
    slope *= np.sqrt(num_steps) / table.destruction_std
    ratio = before * table.generation_std**2 / after / table.destruction_std**2
    inverse = jnp.asarray(np.stack([slope, np.log(ratio)]), jnp.float32)

    def way_back(params, y, t, context):
        index = jnp.round(t * num_steps).astype(int) - 1
        drift, log_variance = inverse[0, index] * y, inverse[1, index] + 0 * y
        out = FREE(params, y, t, context)
        return jnp.concatenate([drift, log_variance]) + out

    return make(
        scale=tuple(s / variance[-1] ** 0.5 for s in scale),
        destruction_network=ds.networks.from_function(
            lambda key, dim: FREE.init(key, dim, 0), way_back
        ),
        destruction_bounds=ds.Bounds(log_variance=80.0),
    )


def _from_the_reference(name, **options):
    sampler = SAMPLERS[name](**options)
    network = dataclasses.replace(sampler.generation, log_variance=0.0)
    return dataclasses.replace(sampler, generation=network)


TIED = {
    name: Simulated(functools.partial(_from_the_reference, name))
    for name in ("scds_tied", "scds_coordinatewise", "scds_data")
}
SIMULATED = {name: Simulated(factory) for name, factory in SAMPLERS.items()} | {
    **TIED,
    "scds_data": TIED["scds_data"]._replace(perturbation=0.005),
    "scds_coordinatewise": TIED["scds_coordinatewise"]._replace(narrow=0.8),
    "dis_euler": Simulated(
        functools.partial(
            SAMPLERS["dis_euler"], schedule=ds.schedules.linear(1.0, 0.1)
        ),
        narrow=0.8,
    ),
    "cdds": Simulated(_inverted_consistency),
    "cdds_tied": Simulated(functools.partial(_inverted_consistency, tied=True)),
}
FEW_STEPS = ("scds", "scds_tied", "cdds", "cdds_tied")


@functools.cache
def _sampler_and_params(name, num_steps):
    own = SIMULATED[name]
    sampler = own.factory(num_steps=num_steps, loc=tuple(CENTRE), scale=(1.0, 0.9))
    return sampler, perturbed(sampler.init(jax.random.key(0)), own.perturbation)


@functools.cache
def _generated(name, num_steps):
    """Log-weights of generated paths."""
    sampler, params = _sampler_and_params(name, num_steps)

    @jax.jit
    def log_weights(key):
        energy = Partial(scaled_energy, jnp.asarray(SIMULATED[name].narrow))
        keys = jax.random.split(key, NUM_PATHS)
        return jax.vmap(lambda k: sampler(params, k, energy).log_weight)(keys)

    return log_weights(jax.random.key(7))


@functools.cache
def _traced_back(name, num_steps):
    """A function from the target's width to log-weights of paths into exact draws."""
    sampler, params = _sampler_and_params(name, num_steps)

    @jax.jit
    def log_weights(factor):
        energy = Partial(scaled_energy, factor)
        x = sample_scaled(factor, jax.random.key(8), NUM_PATHS)
        keys = jax.random.split(jax.random.key(9), NUM_PATHS)

        def one(key, x):
            return sampler.trace_back(params, key, x, energy).log_weight

        return jax.vmap(one)(keys, x)

    return log_weights


def _assert_mean_is_one(log_ratio):
    """The mean of exp(log_ratio) is 1 within 4 standard errors, where these mean
    something: a heavy tail fails the gates, not the bound."""
    assert np.all(np.isfinite(log_ratio))
    assert ds.diagnostics.effective_sample_fraction(log_ratio) > 0.05
    assert ds.diagnostics.pareto_smooth(log_ratio).pareto_k < 0.5
    ratio = np.exp(np.asarray(log_ratio, np.float64))
    standard_error = ratio.std() / np.sqrt(ratio.size)
    assert standard_error < 0.02
    assert abs(ratio.mean() - 1.0) < 4 * standard_error


@pytest.mark.parametrize("num_steps", mostly_slow([1, 2, 5, 100], 1, 5))
@pytest.mark.parametrize("name", mostly_slow(SIMULATED, *PROCESSES))
def test_mean_weight_is_z(name, num_steps):
    log_weight = _generated(name, num_steps)
    _assert_mean_is_one(log_weight - LOG_Z)
    assert np.mean(log_weight) < LOG_Z  # ELBO


@pytest.mark.parametrize("num_steps", mostly_slow([1, 2, 5, 100], 5))
@pytest.mark.parametrize("name", mostly_slow(SIMULATED, *PROCESSES))
def test_mean_inverse_weight_of_exact_draws_is_inverse_z(name, num_steps):
    log_weight = _traced_back(name, num_steps)
    _assert_mean_is_one(LOG_Z - log_weight(jnp.asarray(WIDE)))
    upper = np.mean(log_weight(jnp.asarray(SIMULATED[name].narrow)))  # EUBO
    assert np.mean(_generated(name, num_steps)) < LOG_Z < upper


@pytest.mark.parametrize(
    ("name", "num_steps"),
    mostly_slow(
        [(name, num_steps) for name in FEW_STEPS for num_steps in (1, 2, 4, 8)],
        ("scds_tied", 1),
        ("scds_tied", 4),
        ("cdds", 1),
    ),
)
def test_few_steps_have_honest_weights(name, num_steps):
    log_weight, traced = _generated(name, num_steps), _traced_back(name, num_steps)
    _assert_mean_is_one(log_weight - LOG_Z)
    _assert_mean_is_one(LOG_Z - traced(jnp.asarray(WIDE)))
    upper = np.mean(traced(jnp.asarray(SIMULATED[name].narrow)))
    assert np.mean(log_weight) < LOG_Z < upper


@pytest.mark.parametrize("name", PROCESSES)
def test_trace_back_ends_exactly_in_x(x64, key, name):
    sampler = SAMPLERS[name](num_steps=3)
    params = perturbed(sampler.init(key), 0.2)

    @jax.jit
    def both(key, x):
        back = sampler.trace_back(params, key, x, skewed_energy)
        return back, sampler.score(params, back.xs, skewed_energy)

    x = jnp.array([0.1234567890123, -1.3])
    back, scored = both(jax.random.key(2), x)
    assert np.array_equal(back.x, x)
    assert np.array_equal(back.xs[-1], x)
    assert len(np.unique(np.asarray(back.xs[:, 0]))) == 4
    if sampler.process.point_mass:
        np.testing.assert_allclose(back.xs[0], sampler.loc, rtol=1e-14)
        assert float(back.log_prior) == 0.0
        assert float(back.log_destruction[0]) == 0.0
    np.testing.assert_allclose(back.log_weight, scored.log_weight, rtol=1e-11)
    again, _ = both(jax.random.key(2), x)
    other, _ = both(jax.random.key(3), x)
    assert np.array_equal(again.xs, back.xs)
    assert not np.any(other.xs[1:-1] == back.xs[1:-1])


def test_destruction_of_a_point_mass_has_no_floor_at_any_step_count(key):
    for num_steps in (1, 2, 100):
        sampler = SAMPLERS["pis"](num_steps=num_steps)
        coefficients = sampler.process.coefficients(num_steps)
        assert coefficients.destruction_std[0] == 0.0
        assert np.all(coefficients.destruction_std[1:] > 0)


# A Gaussian N(M, R^2) in unit coordinates has an affine optimal control in continuous
# time. With it the log-weights' variance falls like 1/K, and only with the right signs,
# factors and direction of time.
M, R = 0.8, 0.4
LOC, SCALE, DIFFUSION = 0.3, 2.0, 1.5


def gaussian_energy(mean, x):
    z = (x - (LOC + SCALE * mean)) / (SCALE * R)
    return 0.5 * jnp.sum(z**2) + 0.5 * np.log(2 * np.pi * (SCALE * R) ** 2) - LOG_Z


def _control(drift_fn):
    return ds.networks.from_function(lambda key, dim: jnp.asarray(M), drift_fn)


def _time_reversal(signal):
    """Minus the reference's score plus that of the target noised to ``signal(t)``."""

    def drift_fn(mean, y, t, context):
        share = jnp.maximum(signal(t), 1e-6)
        variance = share * R**2 + 1 - share
        return context.gain * (y - (y - jnp.sqrt(share) * mean) / variance)

    return _control(drift_fn)


def _geometric_signal(t):
    return 1 - (R ** (2 * t) - R**2) / (1 - R**2)


def _cosine_power_signal(t):
    mass = 3 * t / 8 + jnp.sin(jnp.pi * t) / (2 * jnp.pi)
    mass += jnp.sin(2 * jnp.pi * t) / (16 * jnp.pi)
    return jnp.exp(-12 * (1 - mass * 8 / 3))


def _h_transform(mean, y, t, context):
    excess = 1 / R**2 - 1
    return (mean / R**2 - excess * y) / (1 + excess * (1 - t))


def _bridge(direction):
    """Marginals N(t m, 1 + (R^2 - 1) t): drift = velocity +- half diffusion * score."""

    def drift_fn(mean, y, t, context):
        variance = 1 + (R**2 - 1) * t
        slope = (direction * (R**2 - 1) - DIFFUSION**2) / (2 * variance)
        return (direction * mean + slope * (y - t * mean)) / DIFFUSION

    return _control(drift_fn)


OPTIMAL = {
    "pis": functools.partial(ds.samplers.pis, network=_control(_h_transform)),
    "dds": functools.partial(
        ds.samplers.dds, network=_time_reversal(_cosine_power_signal)
    ),
    "dis": functools.partial(
        ds.samplers.dis,
        schedule=ds.schedules.geometric(R),
        network=_time_reversal(_geometric_signal),
    ),
    "gbs": functools.partial(
        ds.samplers.gbs,
        diffusion=DIFFUSION,
        network=_bridge(+1),
        destruction_network=_bridge(-1),
    ),
}


def _optimal_log_weights(name, num_steps, mean):
    sampler = OPTIMAL[name](dim=1, num_steps=num_steps, loc=LOC, scale=SCALE)
    params = jax.tree.map(lambda _: mean, sampler.init(jax.random.key(0)))

    @jax.jit
    def log_weights(key, mean):
        energy = Partial(gaussian_energy, mean)
        keys = jax.random.split(key, 4096)
        return jax.vmap(lambda k: sampler.final(params, k, energy).log_weight)(keys)

    return np.asarray(log_weights(jax.random.key(1), mean), np.float64)


@pytest.mark.parametrize("name", OPTIMAL)
def test_optimal_control_of_a_gaussian(name):
    coarse, fine = (_optimal_log_weights(name, k, jnp.asarray(M)) for k in (25, 100))
    assert np.std(coarse) < 0.5
    assert 3.2 < np.var(coarse) / np.var(fine) < 5.6  # 4, as 1/K
    gap = LOG_Z - np.mean(fine)
    assert 0 < gap < 0.04
    assert gap == pytest.approx(np.var(fine) / 2, abs=float(np.std(fine)) / 12)


def test_geometric_schedule_costs_what_its_docstring_says():
    log_weight = _optimal_log_weights("dis", 100, jnp.asarray(0.0))
    expected = np.log(R**2) ** 2 / (4 * 100)
    assert np.var(log_weight) / 2 == pytest.approx(expected, rel=0.1)


def test_shifted_gaussian_under_pis_has_constant_weights():
    """A Brownian motion with constant drift has the same bridge at any step count."""

    def energy(x):
        z = (x - 1.1) / 0.7
        return 0.5 * jnp.sum(z**2) + np.log(2 * np.pi * 0.7**2) - LOG_Z

    control = ds.networks.from_function(
        lambda key, dim: jnp.full(dim, (1.1 - 0.4) / 0.7), lambda p, x, t, context: p
    )
    for num_steps in (1, 7):
        sampler = ds.samplers.pis(2, num_steps, loc=0.4, scale=0.7, network=control)
        params = sampler.init(jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), 16)
        draw = jax.jit(
            jax.vmap(sampler.final, in_axes=(None, 0, None)), static_argnums=2
        )
        np.testing.assert_allclose(
            draw(params, keys, energy).log_weight, LOG_Z, atol=2e-5
        )
