"""Finding every mode without data: exploration, local search, SMC, trust region.

    python experiments/exploration.py run
    python experiments/exploration.py table

Long chains on targets with many modes, each with the ways of finding them that make
sense there. `run` appends one JSON line per (target, method, seed) to --out and skips
what is already there; `table [FILES]` prints mean and worst over seeds.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
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
    well_errors,
)

import diffsamp as ds


@dataclasses.dataclass(frozen=True)
class Cell:
    """A target and how its sampler is set up; chosen on seeds from 100 on."""

    target: str
    scale: float
    smallest_scale: float
    num_steps: int
    num_updates: int
    methods: tuple[str, ...] = ("on_policy", "exploration", "local_search", "seeded")
    width: int = 64
    batch_size: int = 256
    coordinatewise: bool = False
    learning_rate: float = 2e-3


MANY_WELLS = {
    "scale": 1.6,
    "smallest_scale": 0.1,
    "num_steps": 32,
    "width": 16,
    "batch_size": 128,
    "coordinatewise": True,
    "learning_rate": 3e-3,
    "methods": ("on_policy", "seeded", "trust_region"),
}
CELLS = (
    Cell("gmm25", 7.0, 0.08, num_steps=100, num_updates=2_000),
    Cell("gmm40", 25.0, 0.04, num_steps=100, num_updates=2_000),
    Cell("manywell", num_updates=1_500, **MANY_WELLS),
    Cell("manywell_64", num_updates=1_000, **MANY_WELLS),
    Cell("manywell_128", num_updates=800, **MANY_WELLS),
)
METHODS = ("on_policy", "exploration", "local_search", "seeded", "trust_region")
NUM_PARTICLES = 2_048


def target_of(name):
    if name.startswith("manywell_"):
        return ds.targets.manywell(int(name.removeprefix("manywell_")))
    return ds.targets.by_name(name)


def network_of(cell):
    networks = ds.networks
    make = (
        networks.coordinatewise
        if cell.coordinatewise
        else networks.annealed_score_guided
    )
    return make(cell.width, learn_variance=True)


def make_method(method, num_updates):
    """Objective and behaviour."""
    o, b = ds.objectives, ds.behaviours
    noise = optax.linear_schedule(0.2, 0.0, num_updates // 2)
    again, often = max(1, num_updates // 4), max(10, num_updates // 80)
    on_policy, exploration = b.on_policy(), b.exploration(noise)
    behaviour = {
        "on_policy": lambda: on_policy,
        "exploration": lambda: b.mixture(
            (on_policy, 0.25), (exploration, 0.25), (b.replay(20_000), 0.5)
        ),
        "local_search": lambda: b.mixture(
            (on_policy, 0.25), (exploration, 0.25), (b.local_search(20_000), 0.5)
        ),
        "seeded": lambda: b.mixture(
            (on_policy, 0.5),
            (b.smc_seeded(NUM_PARTICLES, every=again, num_runs=4), 0.5),
        ),
        "trust_region": lambda: b.trust_region(
            NUM_PARTICLES, every=often, max_divergence=1.0
        ),
    }[method]()
    if method == "trust_region":
        return o.trust_region_log_variance(), behaviour
    return o.log_variance(), behaviour


def train_and_evaluate(cell, method, seed, args):
    """One run; a flat dict of numbers."""
    target = target_of(cell.target)
    sampler = ds.samplers.dis(
        dim=target.dim,
        num_steps=cell.num_steps,
        scale=cell.scale,
        schedule=ds.schedules.geometric(cell.smallest_scale),
        network=network_of(cell),
    )
    objective, behaviour = make_method(method, cell.num_updates)
    key, mesh = jax.random.key(seed), mesh_of(args.mesh)
    fit = ds.fit(
        jax.random.fold_in(key, 0),
        sampler,
        objective,
        target.energy,
        behaviour=behaviour,
        optimizer=optax.adam(cell.learning_rate),
        anneal=ds.schedules.cosine_anneal,
        batch_size=cell.batch_size,
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
        sinkhorn=False,
        mesh=mesh,
    )
    names = ("log_z_error", "log_z_standard_error", "elbo_gap", "eubo_gap", "ess")
    names += ("pareto_k", "verdict", "w2", "w2_floor", "mode_tv", "mode_tv_unweighted")
    found = {name: result[name] for name in names if name in result}
    draws = ds.draw(
        jax.random.fold_in(key, 2),
        sampler,
        fit.params,
        target.energy,
        args.num_draws,
        mesh=mesh,
    )
    if target.modes is not None:
        shares = ds.metrics.mode_weights(draws.x, target.modes)
        found["modes_found"] = int(np.sum(shares > 0))
    else:
        for name, log_weight in (("", draws.log_weight), ("_unweighted", None)):
            found["well_error" + name] = float(np.max(well_errors(draws.x, log_weight)))
    return {
        **found,
        "gap": result["eubo"] - result["elbo"],
        "num_updates": len(fit.metrics["loss"]),
        "num_skipped": fit.num_skipped,
        "energy_evaluations": fit.num_energy_evaluations + fit.num_gradient_evaluations,
        "network_evaluations": fit.num_network_evaluations,
        "seconds": fit.seconds,
        "compile_seconds": fit.compile_seconds,
    }


def run(args):
    for seed in args.seeds:
        for cell in CELLS:
            for method in cell.methods:
                if cell.target not in args.targets or method not in args.methods:
                    continue
                label = {"target": cell.target, "method": method, "seed": seed}
                if label in [{k: row[k] for k in label} for row in read(args.out)]:
                    continue
                found = train_and_evaluate(cell, method, seed, args)
                settings = dataclasses.asdict(cell)
                del settings["methods"], settings["num_updates"]
                row = {**settings, **label, "num_draws": args.num_draws, **found}
                append(args.out, row)
                print(*label.values(), found, flush=True)


COLUMNS = (
    ("log Z error", "log_z_error", "{:+.3f}", abs),
    ("ELBO gap", "elbo_gap", "{:.3f}", float),
    ("EUBO gap", "eubo_gap", "{:.3f}", float),
    ("EUBO - ELBO", "gap", "{:.3f}", float),
    ("ESS", "ess", "{:.2f}", lambda v: -v),
    ("modes found", "modes_found", "{:.0f}", lambda v: -v),
    ("mode TV", "mode_tv", "{:.3f}", float),
    ("unweighted", "mode_tv_unweighted", "{:.3f}", float),
    ("worst well", "well_error", "{:.3f}", float),
    ("unweighted", "well_error_unweighted", "{:.3f}", float),
    ("W2", "w2", "{:.2f}", float),
    ("its floor", "w2_floor", "{:.2f}", float),
    ("seconds", "seconds", "{:.0f}", float),
    ("energies", "energy_evaluations", "{:.1e}", float),
    ("network calls", "network_evaluations", "{:.1e}", float),
)


def table(args):
    rows, body = rows_of(args.files), []
    for cell in CELLS:
        for method in METHODS:
            label = (cell.target, method)
            own = [r for r in rows if (r["target"], r["method"]) == label]
            if own:
                cells = [summarise(own, *column[1:]) for column in COLUMNS]
                trusted = sum(r["verdict"].startswith("trust") for r in own)
                body.append([*label, seeds_of(own), trusted, *cells])
    heads = ["target", "method", "seeds", "trust", *(c[0] for c in COLUMNS)]
    lines = markdown(heads, body)
    note = f"Mean (worst) over seeds, {rows[0]['num_draws']:,} draws, "
    print("\n".join([*lines, "", note + described(rows[0]) + "."]))


def main():
    parser, commands = commands_of(__doc__)
    out, names = pathlib.Path("outputs/exploration.jsonl"), [c.target for c in CELLS]
    runner = add_runner(commands, run, out)
    runner.add_argument("--targets", nargs="+", choices=names, default=names)
    runner.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    runner.add_argument("--num-draws", type=int, default=10_000)
    add_reader(commands, table, out)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
