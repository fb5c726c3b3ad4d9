"""How draws and weights of consistent.py differ from what is known of their targets.

What many rows share is computed once for a target: exact draws, the errors of a second,
independent set of them, which are the floors, and pairs of exact sets for distances.
A target without an exact sampler, a posterior, has long NUTS chains instead, for the
upper bound, and is sampled in coordinates in which it is about a unit normal.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from transport import distances, exact_pairs

import diffsamp as ds
from diffsamp.numpyro import affine_from_curvature
from diffsamp.numpyro.coordinates import in_coordinates, to_y

NUM_EXACT = 100_000
NUM_POINTS = 2_000  # in a set of which W2 is computed, and in a probe
LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NUM_WELLS = {"mw54": 5, "mw52": 5}  # in the first coordinates; the others are N(0, 1)
NUM_CHAINS = 16
PILOT = ds.short_mcmc(num_chains=16)  # which says what coordinates are of use
CURVATURES = {"ionosphere": 16, "lgcp_whitened": 64}  # Hessians, of which the mean is
NUTS = {"ionosphere": (400, 1_000), "lgcp_whitened": (300, 128)}  # warm-up and draws


class Truth(NamedTuple):
    """A target and two independent sets of exact draws, or the cost of a pilot."""

    target: ds.Target
    exact: np.ndarray | None = None
    other: np.ndarray | None = None
    pilot_evaluations: int = 0


@functools.cache
def truth(name):
    target = ds.targets.by_name(name)
    if target.sample is None:
        target, num_evaluations = standardised(target)
        return Truth(target, pilot_evaluations=num_evaluations)
    keys = jax.random.split(jax.random.key(2**31 - 1))
    sets = (np.asarray(target.sample(key, NUM_EXACT), np.float64) for key in keys)
    return Truth(target, *sets)


def standardised(target):
    """A posterior in the coordinates of a pilot, and what that took.

    Prior and likelihood are left behind, for nothing here asks for either alone.
    """
    draws, num_evaluations = PILOT(jax.random.key(2**31 - 3), target)
    num_points = CURVATURES[target.name]
    affine = affine_from_curvature(draws, target.energy, num_points=num_points)
    num_evaluations += num_points * target.dim  # a gradient and its slope, each

    def constrain(y):
        x = affine.forward(y)
        return x if target.constrain is None else target.constrain(x)

    standard = dataclasses.replace(
        target,
        energy=in_coordinates(target.energy, affine),
        log_prior=None,
        log_likelihood=None,
        sample_prior=lambda key, num: to_y(affine, target.sample_prior(key, num)),
        constrain=constrain,
    )
    return standard, num_evaluations


def untrained(name, seed, num_draws):
    """What the coordinates of a posterior do alone, by draws of their unit normal."""
    target = truth(name).target
    x = jax.random.normal(jax.random.key(seed), (num_draws, target.dim))
    energy = jax.jit(lambda x: jax.lax.map(target.energy, x))(x)
    log_prior = jnp.sum(jax.scipy.stats.norm.logpdf(x), axis=1)
    gap = target.log_z - float(np.mean(np.asarray(-energy - log_prior, np.float64)))
    return {"elbo_gap": gap, **moments(target, x)}


def nuts_draws(name, folder):
    """Draws of a target without an exact sampler, from their file if there is one."""
    place, target = folder / f"{name}_nuts.npy", truth(name).target
    if not place.exists():
        for_start, for_run = jax.random.split(jax.random.key(2**31 - 2))
        start = target.sample_prior(for_start, NUM_CHAINS)
        num_warmup, num_draws = NUTS[name]
        options = {"num_warmup": num_warmup, "num_draws": num_draws}
        x, _ = ds.mcmc.run_hmc(for_run, target.energy, start, **options)
        beside = place.with_suffix(".part.npy")  # a file is whole at all times
        np.save(beside, np.asarray(x).reshape(-1, target.dim))
        beside.replace(place)
    return np.load(place)


# -------------------------------------------------------------------- with weights


def weigh(key, sampler, name, params, num_draws, folder, mesh=None, *, tune=False):
    """Log Z, its bounds and how far weights can be trusted.

    With ``tune`` kernels have the widths of `tune_widths`. The lower bound is of
    ``num_draws`` paths, the upper one of as many from exact draws, or of half of the
    NUTS chains; the probe is of the other half.
    """
    target = truth(name).target
    keys, found = jax.random.split(key, 3), {}
    if tune:
        for_widths = jax.random.fold_in(key, 3)
        tuned = ds.tune_widths(for_widths, sampler, params, target.energy)
        sampler, found["widths"] = tuned.sampler, tuned.sampler.widths
        found["untuned_pareto_k"] = tuned.pareto_k_before
        found["untuned_ess"] = tuned.ess_before
        found["untuned_elbo"] = tuned.elbo_before
        found["tuning_network_evaluations"] = tuned.num_network_evaluations
    if target.sample is not None:
        exact = np.asarray(target.sample(keys[0], NUM_POINTS + num_draws))
        probe, exact = exact[:NUM_POINTS], exact[NUM_POINTS:]
    else:
        chains = nuts_draws(name, folder)
        found["nuts_mean_error"] = moments(target, chains)["flow_mean_error"]
        probe, exact = np.split(chains, 2)
        probe = probe[:: -(-len(probe) // NUM_POINTS)]
    given = sampler, params, target.energy
    draws = ds.draw(keys[1], *given, num_draws, probe=probe, mesh=mesh)
    log_weight, report = draws.log_weight, draws.diagnostics
    found["num_weighted"] = num_draws
    found["elbo"], found["elbo_standard_error"] = ds.evidence.elbo(log_weight)
    found["log_z"] = draws.log_evidence.estimate
    found["log_z_standard_error"] = draws.log_evidence.standard_error
    found["ess"], found["pareto_k"] = report.ess_fraction, report.pareto_k
    found["verdict"] = report.verdict
    upward = ds.log_weights_of(keys[2], *given, exact, mesh=mesh)
    found["eubo"], found["eubo_standard_error"] = ds.evidence.eubo(upward)
    if target.sample is None:  # draws of a chain know of each other
        means = np.mean(np.reshape(upward, (NUM_CHAINS // 2, -1)), axis=1)
        error = np.std(means, ddof=1) / np.sqrt(len(means))
        found["eubo_standard_error"] = float(error)
    upward = ds.diagnostics.forward_effective_sample_size(upward)
    found["forward_ess"] = float(upward)
    if target.log_z is not None:
        found["log_z_error"] = found["log_z"] - target.log_z
        found["elbo_gap"] = target.log_z - found["elbo"]
        if tune:
            found["untuned_elbo_gap"] = target.log_z - found["untuned_elbo"]
        found["eubo_gap"] = found["eubo"] - target.log_z
        found["log_z_true_error"] = 0.0
    if has_moments(target):
        known = ds.targets.reference_moments(unwhitened(target))
        found["log_z_true_error"] = known["log_z_se"]
    if target.modes is not None:
        top = np.max(np.where(np.isnan(log_weight), -np.inf, log_weight))
        shares = np.zeros(len(target.modes.weights))
        if np.isfinite(top):
            shares = ds.metrics.mode_weights(draws.x, target.modes, log_weight)
        found["mode_tv"] = ds.metrics.total_variation(shares, target.modes.weights)
    return found


# ----------------------------------------------------------------- without weights


def shape(name, x):
    """How draws differ from the truth in what a user would look at, beside floors."""
    if truth(name).exact is None:
        return moments(truth(name).target, x)
    floors = {f"flow_{k}_floor": v for k, v in floors_of(name, len(x)).items()}
    return {f"flow_{k}": v for k, v in errors(name, x).items()} | floors


@functools.cache
def floors_of(name, num):
    """Errors of so many exact draws."""
    return errors(name, truth(name).other[:num])


@np.errstate(over="ignore", invalid="ignore")
def errors(name, x):
    target, exact, *_ = truth(name)
    x = np.asarray(x, np.float64)
    a, b = (np.quantile(v[:, 0], LEVELS) for v in (x, exact))
    out = {
        "quantile_error": worst(np.abs(a - b) / np.std(exact[:, 0])),
    }
    if target.modes is not None:
        true = np.asarray(target.modes.weights)
        shares = ds.metrics.mode_weights(x, target.modes)
        out["mode_tv"] = ds.metrics.total_variation(shares, true)
        out["modes_missed"] = int(np.sum(shares < 0.1 * true))
        out["sd_error"] = sd_error(name, x)
    if name in NUM_WELLS:
        num = NUM_WELLS[name]
        out["well_sd_error"] = worst(well_sds(x, num) / well_sds(exact, num) - 1)
        if target.dim > num:
            out["gaussian_sd_error"] = worst(np.std(x[:, num:], axis=0) - 1)
    if name.startswith("funnel"):
        out["band_error"] = band_error(x, exact)
    return out


def worst(values):
    """The largest size of any; infinite where one is no number."""
    sizes = np.abs(np.asarray(values, np.float64))
    return float(np.max(np.where(np.isfinite(sizes), sizes, np.inf)))


def sd_error(name, x, least=0.02):
    """Worst relative error of a standard deviation within a mode of some weight.

    A mode that holds hardly a point counts as one without any spread.
    """
    modes, found = truth(name).target.modes, []
    index = mode_of(modes, x)
    for mode in np.flatnonzero(np.asarray(modes.weights) >= least):
        inside = x[index == mode]
        few = len(inside) < 50
        ratio = 0.0 if few else np.std(inside, axis=0) / mode_sds(name)[mode]
        found.append(worst(ratio - 1))
    return worst(found)


@functools.cache
def mode_sds(name):
    """Standard deviations within the modes, [M][D]."""
    target, exact, *_ = truth(name)
    index = mode_of(target.modes, exact)
    modes = range(len(target.modes.weights))
    return [np.std(exact[index == mode], axis=0) for mode in modes]


def mode_of(modes, x):
    return np.asarray(jax.vmap(modes.assign)(jnp.asarray(x)))


def well_sds(x, num):
    """Standard deviation in either well of each of the first coordinates, [num, 2].

    Not a number where a well is empty or a coordinate is none.
    """
    wells = [x[~(s * x[:, i] < 0), i] for i in range(num) for s in (-1, 1)]
    sds = [np.std(well) if len(well) else np.nan for well in wells]
    return np.array(sds).reshape(num, 2)


def band_error(x, exact, num_bands=5):
    """Quantiles of x2 in bands of x1 of equal mass, in conditional sds exp(x1 / 2)."""
    edges = np.quantile(exact[:, 0], np.linspace(0, 1, num_bands + 1)[1:-1])
    bands, found = np.digitize(x[:, 0], edges), []
    scaled = x[:, 1] * np.exp(-x[:, 0] / 2)
    for band in range(num_bands):
        inside = scaled[bands == band]
        if len(inside) == 0:
            return np.inf
        found.append(np.quantile(inside, LEVELS) - scipy.stats.norm.ppf(LEVELS))
    return worst(found)


def unwhitened(target):
    return target.name.removesuffix("_whitened")


def has_moments(target):
    return target.name in NUTS


@np.errstate(over="ignore", invalid="ignore")
def moments(target, x):
    """Means and standard deviations against long MCMC: the worst coordinate.

    The error of a field is that of all means at once, relative to their length.
    """
    if not has_moments(target):
        return {}
    true = ds.targets.reference_moments(unwhitened(target))
    if target.constrain is not None:
        x = jax.vmap(target.constrain)(jnp.asarray(x))
    x = np.asarray(x, np.float64)
    mean, sd = np.mean(x, axis=0), np.std(x, axis=0)
    field = np.linalg.norm(mean - true["mean"]) / np.linalg.norm(true["mean"])
    return {
        "flow_mean_error": worst((mean - true["mean"]) / true["sd"]),
        "flow_field_error": worst(field),
        "flow_sd_error": worst(sd / true["sd"] - 1),
    }


@functools.lru_cache(maxsize=8)
def pairs_of(name, seed, num_repeats):
    """Exact sets, the same for all methods and step counts of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), 30_000)
    return key, exact_pairs(key, truth(name).target, NUM_POINTS, num_repeats)


def far(name, seed, points, num_repeats):
    """W2 and Sinkhorn over their floors; see `transport`."""
    key, pairs = pairs_of(name, seed, num_repeats)
    return distances(key, truth(name).target, points, num_repeats, pairs)
