"""Noise added to trained kernels: exact weights, and the one with light tails."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tables import CENTRE, LOG_Z, SMALL, perturbed, skewed_energy

import diffsamp as ds

KEY = jax.random.key(0)
WIDTHS = ds.Widths(0.4, -0.3)


def energy(x):
    """N(1, 0.5^2) in both coordinates, times 3."""
    return jnp.sum((x - 1) ** 2) / (2 * 0.5**2) - jnp.log(3.0)


LOG_Z_OF_ENERGY = np.log(3.0) + np.log(2 * np.pi * 0.5**2)


def one_step(noise=0.1, excess=0.0):
    """From N(0, 1) to the target in one step, with the exact way back, or a wider one.

    x' = 1 + 0.49 x + ``noise`` e, of variance 0.25 where noise is 0.1; the way back has
    the variance of the inverse times exp(excess).
    """
    slope = np.sqrt(0.25 - noise**2)
    sampler = ds.samplers.cdds(2, 1, smallest_std=noise)
    step = jax.tree.map(lambda column: column[0], sampler.steps())

    def forwards(params, y, t, context):
        return context.gain * (1 + slope * y)

    inverse_variance = np.log(noise**2 / 0.25) + excess
    decay, std = float(step.destruction_decay), float(step.destruction_std)

    def back(params, y, t, context):
        mean = slope * (y - 1) / 0.25
        shift = (mean - decay * y) / (std * step.shift_scale)
        log_ratio = jnp.full(2, inverse_variance - 2 * np.log(std))
        return jnp.concatenate([shift, log_ratio])

    made = [ds.networks.from_function(lambda key, dim: (), f) for f in (forwards, back)]
    return dataclasses.replace(
        sampler,
        generation=made[0],
        destruction=made[1],
        destruction_bounds=ds.Bounds(log_variance=1e4),
    )


def test_of_exact_kernels_every_weight_is_z():
    """So that what follows is about kernels of which all is known."""
    sampler = one_step()
    draws = ds.draw(KEY, sampler, sampler.init(KEY), energy, 100)
    np.testing.assert_allclose(draws.log_weight, LOG_Z_OF_ENERGY, atol=1e-3)


def test_widths_multiply_the_variances_of_both_kernels(x64):
    sampler = ds.samplers.dis(2, 3, network=ds.networks.free(**SMALL), scale=(2.0, 0.5))
    wide = dataclasses.replace(sampler, widths=(0.4, -0.3))
    assert wide.widths == WIDTHS
    params = perturbed(sampler.init(KEY), 0.3)
    path = jax.jit(lambda: sampler.simulate(params, KEY, skewed_energy))()
    ratios = (s.log_variance_ratios(params, path) for s in (wide, sampler))
    np.testing.assert_allclose(next(ratios) - next(ratios), 0.7, rtol=1e-12)
    plain, other = (s.score_path(params, path) for s in (sampler, wide))
    log_stds = -np.sum(np.log(sampler.scale))
    for name, added in zip(("generation", "destruction"), WIDTHS, strict=True):
        before, after = (getattr(t, f"log_{name}") for t in (plain, other))
        std = getattr(sampler.steps(), f"{name}_std")
        constant = log_stds - np.log(2 * np.pi) - 2 * np.log(std)
        square = constant - before  # z^2 / 2
        expected = constant - added - square * np.exp(-added)
        np.testing.assert_allclose(after, expected, rtol=1e-9)
    # What a path was drawn with is what it is scored with.
    drawn = jax.jit(lambda: wide(params, KEY, skewed_energy))()
    again = wide.score(params, drawn.xs, skewed_energy)
    np.testing.assert_allclose(drawn.log_weight, again.log_weight, rtol=1e-9)
    back = wide.trace_back(params, KEY, path.xs[-1], skewed_energy)
    assert not np.allclose(
        back.xs[0],
        sampler.trace_back(params, KEY, path.xs[-1], skewed_energy).xs[0],
    )


@pytest.mark.parametrize("num_steps", [1, 4])
def test_weights_are_exact_at_any_width(num_steps):
    sampler = ds.samplers.scds(
        2, num_steps, finest=8, loc=CENTRE, scale=1.5, learn_destruction=True,
        learn_generation_variance=True,
    )  # fmt: skip
    from_reference = dataclasses.replace(sampler.generation, log_variance=0.0)
    changes = {"generation": from_reference, "widths": (0.5, -0.4)}
    sampler = dataclasses.replace(sampler, **changes)
    params = perturbed(sampler.init(KEY), 0.05)
    draws = ds.draw(KEY, sampler, params, skewed_energy, 40_000)
    mean = scipy.special.logsumexp(draws.log_weight) - np.log(40_000)
    error = np.std(np.exp(draws.log_weight - mean)) / np.sqrt(40_000)
    assert error < 0.1
    assert abs(mean - LOG_Z) < 4.5 * error


def test_a_way_back_that_is_too_wide_gets_narrower():
    sampler = one_step(excess=0.8)
    params = sampler.init(KEY)
    tuned = ds.tune_widths(KEY, sampler, params, energy)
    assert tuned.pareto_k_before > 0.5
    assert tuned.pareto_k_after < 0.3
    assert tuned.sampler.widths.generation >= 0 > tuned.sampler.widths.destruction
    draws = ds.draw(jax.random.key(9), tuned.sampler, params, energy, 16_384)
    assert draws.diagnostics.pareto_k < 0.5
    assert draws.log_evidence.estimate == pytest.approx(LOG_Z_OF_ENERGY, abs=0.02)
    assert draws.diagnostics.ess_fraction == pytest.approx(tuned.ess_after, abs=0.02)
    lower = draws.log_evidence.lower
    assert lower == pytest.approx(tuned.elbo_after, abs=0.02)
    assert lower > tuned.elbo_before + 0.05  # it was no good way back
    num_paths = 27 * 16_384
    assert tuned.num_energy_evaluations == num_paths
    assert tuned.num_gradient_evaluations == 0
    assert tuned.num_network_evaluations == 2 * num_paths
    # Tuned again, it starts from where it is.
    again = ds.tune_widths(KEY, tuned.sampler, params, energy, num_draws=2_048)
    assert again.sampler.widths.destruction <= tuned.sampler.widths.destruction


def test_widths_that_are_no_better_are_not_taken():
    sampler = one_step()
    tuned = ds.tune_widths(KEY, sampler, sampler.init(KEY), energy, num_draws=1_000)
    assert tuned.sampler == sampler
    assert tuned.num_energy_evaluations == 1_024  # nothing else was tried
    assert tuned.pareto_k_after == tuned.pareto_k_before <= 0.0
    assert tuned.ess_after == tuned.ess_before == pytest.approx(1.0, abs=1e-3)


def test_the_flow_alone_has_no_widths():
    sampler = dataclasses.replace(one_step(), widths=WIDTHS)
    alone, _ = sampler.flow_alone({"generation": (), "destruction": ()})
    assert alone.widths == ds.Widths()


def test_widths_are_those_of_one_number_of_steps():
    sampler = dataclasses.replace(ds.samplers.dis(2, 4), widths=WIDTHS)
    assert sampler.with_num_steps(4) == sampler
    assert sampler.with_num_steps(2) == ds.samplers.dis(2, 2)


def test_bad_input():
    sampler = one_step()
    for widths in (0.1, (0.1,), (0.1, np.inf), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match="widths must be what is added to the log"):
            dataclasses.replace(sampler, widths=widths)
    params = sampler.init(KEY)
    with pytest.raises(ValueError, match="num_draws must be"):
        ds.tune_widths(KEY, sampler, params, energy, num_draws=0)
    with pytest.raises(ValueError, match="params are not those of this sampler"):
        ds.tune_widths(KEY, sampler, {"generation": ()}, energy)
    flow = ds.probability_flow(ds.samplers.dis(2, 2))
    with pytest.raises(ValueError, match=r"sampler must be a ds\.Sampler, got"):
        ds.tune_widths(KEY, flow, params, energy)
    with pytest.raises(ValueError, match="condition"):
        ds.tune_widths(KEY, sampler, params, energy, condition=jnp.ones(1))
