"""Quality of the samplers on targets with known answers, beside tempered SMC.

    python experiments/benchmark.py run
    python experiments/benchmark.py table

`run` appends one JSON line per cell (target, method, seed) to --out and skips cells
that are already there, so it can be stopped and started again. `table [FILES]` writes
the Markdown table of the docs from those lines: mean and worst over seeds.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rows import (
    add_reader,
    add_runner,
    append,
    commands_of,
    described,
    markdown,
    mesh_of,
    read,
    rows_of,
    seeds_of,
    summarise,
)
from transport import SINKHORN_POINTS, distances

import diffsamp as ds


@dataclasses.dataclass(frozen=True)
class Cell:
    """One target and how its sampler is set up; chosen on seeds 0, 1 and 100 to 110."""

    target: str
    scale: float
    smallest_scale: float
    num_steps: int
    num_updates: int
    methods: tuple[str, ...] = ("on_policy", "smc")
    huber: float | None = None
    num_repeats: int = 10  # pairs of sets of 2,000 points, for distances


METHODS = ("on_policy", "seeded", "smc")
CELLS = (
    Cell("gmm9", 3.0, 0.18, num_steps=128, num_updates=3_000, num_repeats=50),
    Cell("mw54", 2.0, 0.09, num_steps=64, num_updates=3_000),
    Cell("funnel_easy", 2.0, 0.05, num_steps=64, num_updates=4_000, methods=METHODS),
    Cell("gmm25", 7.0, 0.08, num_steps=64, num_updates=1_000, methods=METHODS),
    Cell("funnel_hard", 5.0, 0.03, 64, 2_000, methods=METHODS, huber=10.0),
)
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
NUM_PARTICLES = 2_048
NUM_POINTS = 2_000  # in a set of which W2 is computed


def make_sampler(cell, dim):
    return ds.samplers.dis(
        dim=dim,
        num_steps=cell.num_steps,
        scale=cell.scale,
        schedule=ds.schedules.geometric(cell.smallest_scale),
        learn_generation_variance=True,
        generation_bounds=ds.Bounds(log_variance=2.0),
    )


def make_behaviour(method):
    on_policy = ds.behaviours.on_policy()
    if method == "on_policy":
        return on_policy
    return ds.behaviours.mixture(
        (on_policy, 0.5),
        (ds.behaviours.replay(20_000), 0.25),
        (ds.behaviours.smc_seeded(NUM_PARTICLES), 0.25),
    )


def run_sampler(cell, method, seed, args):
    """Trains and evaluates one sampler; a flat dict of numbers."""
    target = ds.targets.by_name(cell.target)
    sampler, mesh = make_sampler(cell, target.dim), mesh_of(args.mesh)
    key = jax.random.key(seed)
    fit = ds.fit(
        jax.random.fold_in(key, 0),
        sampler,
        ds.objectives.log_variance(huber=cell.huber),
        target.energy,
        behaviour=make_behaviour(method),
        optimizer=optax.adam(LEARNING_RATE),
        anneal=ds.schedules.cosine_anneal,
        batch_size=BATCH_SIZE,
        num_updates=cell.num_updates,
        mesh=mesh,
        progress_bar=False,
    )
    result = ds.evaluate(
        jax.random.fold_in(key, 1),
        sampler,
        fit.params,
        target,
        num_draws=args.num_draws,
        sinkhorn=False,  # below, averaged
        mesh=mesh,
    )
    num = NUM_POINTS * cell.num_repeats
    draws = ds.draw(
        jax.random.fold_in(key, 2), sampler, fit.params, target.energy, num, mesh=mesh
    )
    points = draws.resample(jax.random.fold_in(key, 3), num)
    numbers = ("log_z", "log_z_error", "log_z_standard_error", "elbo_gap", "eubo_gap")
    numbers += ("log_z_forward", "ess", "forward_ess", "pareto_k", "verdict")
    numbers += ("mode_tv", "mode_tv_floor", "mode_tv_unweighted")
    found = {name: result[name] for name in numbers if name in result}
    return {
        **found,
        **distances(jax.random.fold_in(key, 4), target, points, cell.num_repeats),
        "num_updates": len(fit.metrics["loss"]),
        "num_skipped": fit.num_skipped,
        "energy_evaluations": fit.num_energy_evaluations,
        "gradient_evaluations": fit.num_gradient_evaluations,
        "network_evaluations": fit.num_network_evaluations,
        "seconds": fit.seconds,
        "compile_seconds": fit.compile_seconds,
    }


def run_smc(cell, seed):
    """Independent tempered SMC runs for as many gradients as training took, combined.

    Runs are weighted by their estimates of Z, which keeps the combined one unbiased.
    """
    target = ds.targets.by_name(cell.target)
    key, begin = jax.random.key(seed), time.perf_counter()
    particles, log_weights, log_zs, energies, gradients = [], [], [], 0, 0
    budget = cell.num_updates * BATCH_SIZE * (cell.num_steps + 1)
    while gradients < budget:
        result = ds.mcmc.smc_from_gaussian(
            jax.random.fold_in(key, len(log_zs)),
            target.energy,
            target.dim,
            scale=2 * cell.scale,
            num_particles=NUM_PARTICLES,
        )
        log_zs.append(float(result.log_z))
        energies += int(result.num_energy_evaluations)
        gradients += int(result.num_gradient_evaluations)
        particles.append(np.asarray(result.particles))
        log_weight = np.asarray(jax.nn.log_softmax(result.log_weight))
        log_weights.append(log_weight + log_zs[-1])
    x, log_weight = np.concatenate(particles), np.concatenate(log_weights)
    log_z = float(ds.evidence.log_mean_exp(jnp.asarray(log_zs)))
    relative = np.exp(np.array(log_zs) - log_z)
    out = {
        "log_z": log_z,
        "log_z_error": log_z - target.log_z,
        "log_z_standard_error": float(relative.std() / np.sqrt(len(relative))),
        "num_runs": len(log_zs),
        "energy_evaluations": energies,
        "gradient_evaluations": gradients,
        "network_evaluations": 0,
        "seconds": time.perf_counter() - begin,
    }
    if target.modes is not None:
        weights = ds.metrics.mode_weights(x, target.modes, log_weight)
        out["mode_tv"] = ds.metrics.total_variation(weights, target.modes.weights)
    weights = np.exp(log_weight - log_weight.max())
    pick = np.random.default_rng(seed).choice(
        len(x), NUM_POINTS * cell.num_repeats, p=weights / weights.sum()
    )
    key = jax.random.fold_in(key, 2**31)
    return out | distances(key, target, x[pick], cell.num_repeats)


def run(args):
    done = {(r["target"], r["method"], r["seed"]) for r in read(args.out)}
    for seed in args.seeds:
        for cell in CELLS:
            for method in METHODS:
                wanted = cell.target in args.targets and method in cell.methods
                wanted = wanted and method in args.methods
                if not wanted or (cell.target, method, seed) in done:
                    continue
                if method == "smc":
                    found = run_smc(cell, seed)
                else:
                    found = run_sampler(cell, method, seed, args)
                row = {
                    "target": cell.target,
                    "method": method,
                    "seed": seed,
                    "num_steps": cell.num_steps,
                    "num_draws": args.num_draws,
                    **found,
                }
                append(args.out, row)
                print(cell.target, method, seed, found, flush=True)


COLUMNS = (
    ("log Z error", "log_z_error", "{:+.4f}", abs),
    ("ELBO gap", "elbo_gap", "{:.3f}", float),
    ("EUBO gap", "eubo_gap", "{:.3f}", float),
    ("ESS", "ess", "{:.3f}", lambda v: -v),
    ("k-hat", "pareto_k", "{:.2f}", float),
    ("mode TV", "mode_tv", "{:.3f}", float),
    ("its floor", "mode_tv_floor", "{:.3f}", float),
    ("W2 / floor", "w2_ratio", "{:.3f}", lambda v: abs(v - 1)),
    ("its noise", "w2_ratio_se", "{:.3f}", float),
    ("Sinkhorn / floor", "sinkhorn_ratio", "{:.3f}", lambda v: abs(v - 1)),
    ("its noise", "sinkhorn_ratio_se", "{:.3f}", float),
    ("seconds", "seconds", "{:.0f}", float),
    ("energies alone", "energy_evaluations", "{:.2e}", float),
    ("energy gradients", "gradient_evaluations", "{:.2e}", float),
    ("network calls", "network_evaluations", "{:.2e}", float),
)


def table(args):
    rows, body = rows_of(args.files), []
    for cell in CELLS:
        for method in METHODS:
            label = (cell.target, method)
            own = [r for r in rows if (r["target"], r["method"]) == label]
            if own:
                cells = [summarise(own, *column[1:]) for column in COLUMNS]
                body.append([*label, seeds_of(own), *cells])
    lines = markdown(["target", "method", "seeds", *(c[0] for c in COLUMNS)], body)
    verdicts = [
        f"* {r['target']}, {r['method']}, seed {r['seed']}: {r['verdict']}"
        for r in rows
        if "verdict" in r
    ]
    first = rows[0]
    repeats = ", ".join(f"{c.num_repeats} for {c.target}" for c in CELLS)
    note = (
        f"Mean (worst) over seeds, {first['num_draws']:,} draws, {described(first)}. "
        f"W2 ({NUM_POINTS:,} points) and the debiased Sinkhorn divergence "
        f"({SINKHORN_POINTS:,} points) are means over disjoint sets ({repeats}) over "
        "the same between exact sets, less what mode counts explain of their noise, "
        "which is the standard error of one seed."
    )
    print("\n".join([*lines, "", note, "", "Verdicts:", "", *verdicts]))


def main():
    parser, commands = commands_of(__doc__)
    out, names = pathlib.Path("outputs/benchmark.jsonl"), [c.target for c in CELLS]
    runner = add_runner(commands, run, out, seeds=(2, 3, 4))
    runner.add_argument("--num-draws", type=int, default=20_000)
    runner.add_argument("--targets", nargs="+", choices=names, default=names)
    runner.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    add_reader(commands, table, out)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
