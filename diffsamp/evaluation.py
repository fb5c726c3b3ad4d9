"""Evaluation against the truth a target knows about itself."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffsamp import diagnostics, drawing, evidence, metrics, probes
from diffsamp.deterministic import ProbabilityFlow
from diffsamp.energies import as_key
from diffsamp.sampler import Sampler
from diffsamp.types import ArrayLike, Key, Params, Target, as_count


def evaluate(
    key: Key,
    sampler: Sampler | ProbabilityFlow,
    params: Params,
    target: Target,
    *,
    num_draws: int = 2_000,
    reference_draws: Any = None,
    condition: ArrayLike | None = None,
    sinkhorn: bool | None = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Every measure of quality that the target allows, each beside its floor.

    Distances are between ``num_draws`` points (at most 2,000) resampled by weight and
    as many exact draws; ``*_unweighted`` uses the raw draws. The floor is the same
    distance between two independent sets of exact draws: a value below it is as wrong
    as one far above.

    Args:
        key: random key; consumed.
        sampler: the sampler, or a `probability_flow`, which leaves out what needs
            weights.
        params: its parameters.
        target: the target; ``sample``, ``log_z`` and ``modes`` are used where known.
        num_draws: N.
        reference_draws: draws from the target, [M, D], where it cannot sample itself.
        condition: [condition_dim], where the sampler has one; ``log_z``, ``sample`` and
            ``modes`` are taken to be those of ``target.energy`` under this condition.
        sinkhorn: whether to compute Sinkhorn divergences, which needs OTT
            (``pip install diffsamp[ot]``) and some seconds; by default where OTT is
            installed. The entropy is 0.05 times the target's total variance; one that
            does not converge is NaN.
        batch_size: paths per compiled call.
        mesh: devices to spread paths over.

    Returns:
        A dict with ``elbo``, ``log_z``, ``log_z_standard_error``, ``log_z_smoothed``
        (from Pareto-smoothed weights), ``elbo_standard_error``, ``ess`` (fraction),
        ``pareto_k``, ``verdict``, ``collapsed``, counts; with reference draws also
        ``missing_mass`` and its noise ``coverage_tolerance``, ``eubo``,
        ``eubo_standard_error``, ``log_z_forward``, ``forward_ess``, ``w2``,
        ``sinkhorn``, ``mmd``, ``quantile_error`` (the largest, in standard deviations)
        and their floors, ``quantiles``; with known modes ``mode_weights``, ``mode_tv``;
        with a known log Z ``log_z_error``, ``elbo_gap``, ``eubo_gap``.

    Raises:
        ValueError: when target is none or of another dimension than the sampler,
            num_draws is below 2, batch_size is below 1, or there are fewer than four
            reference draws.
        ImportError: when ``sinkhorn`` is true and OTT is not installed.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> options = {"num_draws": 256, "sinkhorn": False}
        >>> report = ds.evaluate(jax.random.key(1), sampler, params, target, **options)
        >>> report["elbo"] < report["eubo"]
        True
    """
    if not isinstance(target, Target):
        raise ValueError(
            f"target must be a Target, got {type(target).__name__}; make one of an "
            "energy by ds.Target(energy=energy, dim=dim)"
        )
    if target.dim != sampler.dim:
        raise ValueError(
            f"target has dim={target.dim}, but the sampler has dim={sampler.dim}"
        )
    num_draws = as_count("num_draws", num_draws, least=2)
    if sinkhorn is None:
        sinkhorn = importlib.util.find_spec("ott") is not None
    if sinkhorn:
        importlib.import_module("ott")  # now, not after all other work
    for_draws, for_exact, for_trace, for_resampling = jax.random.split(as_key(key), 4)
    exact = _exact_sets(for_exact, target, num_draws, reference_draws)
    weighted = sampler.has_weights
    probe = probes.given(exact[0]) if weighted and exact is not None else None
    draws = drawing.draw(
        for_draws,
        sampler,
        params,
        target.energy,
        num_draws,
        probe=probe,
        condition=condition,
        batch_size=batch_size,
        mesh=mesh,
    )
    report = draws.diagnostics
    out: dict[str, Any] = {
        "num_draws": num_draws,
        "verdict": report.verdict,
        "num_energy_evaluations": report.num_energy_evaluations,
        "num_gradient_evaluations": report.num_gradient_evaluations,
        "num_network_evaluations": report.num_network_evaluations,
        "collapsed": report.collapsed,
    }
    if report.missing_mass is not None:
        out["missing_mass"] = report.missing_mass
        out["coverage_tolerance"] = report.coverage_tolerance
    if weighted:
        assert draws.log_weight is not None
        out["elbo"], out["elbo_standard_error"] = evidence.elbo(draws.log_weight)
        out["log_z"] = draws.log_evidence.estimate
        out["log_z_standard_error"] = draws.log_evidence.standard_error
        smoothed = draws.smoothed_log_weight
        assert smoothed is not None
        found = evidence.log_evidence(smoothed)
        out["log_z_smoothed"] = found.estimate
        out["ess"], out["pareto_k"] = report.ess_fraction, report.pareto_k
    if target.log_z is not None:
        out["log_z_true"] = target.log_z
    if weighted and target.log_z is not None:
        out["log_z_error"] = out["log_z"] - target.log_z
        out["elbo_gap"] = target.log_z - out["elbo"]
    equal, usable_log_weight = draws.x, None  # unweighted where no weight is usable
    log_weight = draws.log_weight
    if log_weight is not None and np.isfinite(np.nanmax(log_weight, initial=-np.inf)):
        equal = draws.resample(for_resampling, num_draws)
        usable_log_weight = log_weight
    out["mean"], out["sd"] = metrics.moments(draws.x, usable_log_weight)
    if target.modes is not None:
        weights = metrics.mode_weights(draws.x, target.modes, usable_log_weight)
        raw = metrics.mode_weights(draws.x, target.modes)
        out["mode_weights"] = weights
        out["mode_tv"] = metrics.total_variation(weights, target.modes.weights)
        out["mode_tv_unweighted"] = metrics.total_variation(raw, target.modes.weights)
        pool = np.concatenate(exact) if exact is not None else draws.x[:0]
        if len(pool) >= num_draws:  # a floor of fewer points would be too high
            floor = metrics.mode_weights(pool[:num_draws], target.modes)
            out["mode_tv_floor"] = metrics.total_variation(floor, target.modes.weights)
    if weighted and exact is not None:
        log_weight = drawing.log_weights_of(
            for_trace,
            sampler,
            params,
            target.energy,
            exact[1],
            batch_size,
            condition=condition,
            mesh=mesh,
        )
        forward = evidence.log_z_from_target_draws(log_weight)
        names = ("energy", "gradient", "network")
        for name, price in zip(names, sampler.evaluations_per_trace, strict=True):
            out[f"num_{name}_evaluations"] += len(exact[1]) * price
        out["eubo"], out["eubo_standard_error"] = evidence.eubo(log_weight)
        out["log_z_forward"], out["log_z_forward_standard_error"] = forward
        out["forward_ess"] = float(
            diagnostics.forward_effective_sample_size(log_weight)
        )
        if target.log_z is not None:
            out["eubo_gap"] = out["eubo"] - target.log_z
    if exact is not None:
        out |= _distances(equal, draws.x, exact, sinkhorn)
    return out


def _exact_sets(key, target, num, reference_draws):
    """Two independent sets of at most num draws from the target, or None."""
    if reference_draws is not None:
        draws = np.asarray(reference_draws)
        if draws.ndim != 2 or len(draws) < 4:
            raise ValueError(
                "reference_draws must be at least four points [M, D], got shape "
                f"{list(draws.shape)}"
            )
        draws = draws[np.asarray(jax.random.permutation(key, len(draws)))]
        half = min(num, len(draws) // 2)
        return draws[:half], draws[half : 2 * half]
    if target.sample is None:
        return None
    first, second = jax.random.split(key)
    return tuple(np.asarray(target.sample(k, num)) for k in (first, second))


def _distances(equal, raw, exact, sinkhorn):
    """Distances of resampled and raw draws from one exact set, beside their floors."""
    num, epsilon = min(2_000, len(equal), len(exact[0])), None
    a, b = (e[:num] for e in exact)
    functions = {
        "w2": metrics.wasserstein2,
        "mmd": metrics.mmd,
        "quantile_error": metrics.quantile_error,
    }
    if sinkhorn:
        epsilon = 0.05 * float(np.sum(np.var(a, axis=0)))  # one for all three
        functions["sinkhorn"] = functools.partial(_converged_sinkhorn, epsilon=epsilon)
        functions[f"sinkhorn_scds_n{num}"] = metrics.sinkhorn_scds
    out: dict[str, Any] = {"sinkhorn_epsilon": epsilon} if sinkhorn else {}
    for name, function in functions.items():
        found = metrics.with_floor(function, equal[:num], a, b)
        out[name], out[f"{name}_floor"] = found.value, found.floor
        out[f"{name}_unweighted"] = function(raw[:num], a)
    levels = np.array([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    out["quantile_levels"] = levels
    out["quantiles"] = metrics.quantiles(equal, levels)
    out["quantiles_exact"] = metrics.quantiles(a, levels)
    return out


def _converged_sinkhorn(x, y, epsilon):
    result = metrics.sinkhorn_divergence(
        x, y, epsilon=epsilon, require_convergence=False
    )
    return result.value if result.converged else float("nan")
