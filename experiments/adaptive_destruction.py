"""Few steps with learned generation and destruction: the grid, the ablations, a table.

    python experiments/adaptive_destruction.py grid
    python experiments/adaptive_destruction.py coordinatewise
    python experiments/adaptive_destruction.py ablation
    python experiments/adaptive_destruction.py table
    python experiments/adaptive_destruction.py plot

`grid` trains {1, 2, 5, 10, 20} steps x {fixed, generation variance learned, both
kernels learned} x six targets, every cell with the same caps on energy evaluations and
on seconds; `coordinatewise` compares 5 steps of both kernels learned with 20 fixed ones
on the many-wells, with a small network for every coordinate. `ablation` trains 5 steps
(or --num-steps) with both kernels learned in every way that could go wrong: loss, rows,
rates, bounds, backbone, optimiser. Adam treats every number by itself, so that one for
each kernel differs from one for all by what is clipped: `fit` clips the norm of the
whole gradient to 1, by which a large one of either kernel scales down the other's, and
"two optimisers" that of each kernel. All append one JSON line per run to --out and skip
runs that are already there with the same budget, so they can be stopped, started again,
and split over processes by --targets or --seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
    summarise,
    well_errors,
)

import diffsamp as ds

STEPS = (1, 2, 5, 10, 20)
KERNELS = ("fixed", "generation", "both")
COMPARED = ((20, "fixed"), (5, "both"))
WIDTH, COORDINATE_WIDTH = 64, 16
NUM_PARTICLES = 2_048


@dataclasses.dataclass(frozen=True)
class Problem:
    """A target with its reference, chosen on seeds from 100 on."""

    target: str
    scale: float
    smallest_scale: float


PROBLEMS = (
    Problem("gmm25", 7.0, 0.08),
    Problem("gmm40", 25.0, 0.04),
    Problem("funnel_easy", 2.0, 0.05),
    Problem("funnel_hard", 5.0, 0.03),
    Problem("manywell", 1.6, 0.1),
    Problem("distorted_manywell", 1.8, 0.1),
)


TARGETS = tuple(problem.target for problem in PROBLEMS)
MANY_WELLS = ("manywell", "distorted_manywell")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a sampler is trained; the axes of the ablation."""

    objective: str = "jeffreys"
    reverse_weight: float = 1.0
    behaviour: str = "seeded"
    shared_backbone: bool = False
    destruction_rate: float = 1.0
    frozen_updates: int = 0
    log_variance_bound: float = 4.0
    coordinatewise: bool = False
    learning_rate: float = 2e-3
    separate_optimisers: bool = False


BY_COORDINATES = {
    "coordinatewise": {},
    "coordinatewise, reverse KL weighs 0.1": {"reverse_weight": 0.1},
}
ON_POLICY_BALANCE = {"objective": "tb_tlm", "behaviour": "on_policy"}
ABLATION = {
    "default": {},
    "shared backbone": {"shared_backbone": True},
    "destruction learns 10 times slower": {"destruction_rate": 0.1},
    "destruction learns 3 times faster": {"destruction_rate": 3.0},
    "destruction frozen for 500 updates": {"frozen_updates": 500},
    "log-variance within 1": {"log_variance_bound": 1.0},
    "log-variance within 10": {"log_variance_bound": 10.0},
    "reverse KL weighs 0.3": {"reverse_weight": 0.3},
    "reverse KL weighs 0.1": {"reverse_weight": 0.1},
    "forward KL alone": {"reverse_weight": 0.0},
    "TB for both": {"objective": "tb"},
    "LV for both": {"objective": "lv"},
    "TB + TLM": {"objective": "tb_tlm"},
    "TB with target copy + TLM": {"objective": "tb_copy_tlm"},
    "TB + TLM, shared backbone": {"objective": "tb_tlm", "shared_backbone": True},
    "TB + TLM, on-policy": ON_POLICY_BALANCE,
    "TB + TLM, exploration": {"objective": "tb_tlm", "behaviour": "exploration"},
    "TB + TLM, replay by rank": {"objective": "tb_tlm", "behaviour": "by_rank"},
    "TB for both, on-policy": {"objective": "tb", "behaviour": "on_policy"},
    "TB for both, replay by rank": {"objective": "tb", "behaviour": "by_rank"},
    "reverse KL, on-policy": {"objective": "reverse_kl", "behaviour": "on_policy"},
    "two optimisers": {"separate_optimisers": True},
    **{
        f"TB + TLM, on-policy, {name}": ON_POLICY_BALANCE | change
        for name, change in {
            "destruction learns 10 times slower": {"destruction_rate": 0.1},
            "destruction learns 3 times faster": {"destruction_rate": 3.0},
            "destruction frozen for 500 updates": {"frozen_updates": 500},
            "two optimisers": {"separate_optimisers": True},
        }.items()
    },
    "TB with target copy + TLM, on-policy": {
        "objective": "tb_copy_tlm",
        "behaviour": "on_policy",
    },
}


def make_sampler(problem, dim, num_steps, kernels, setting):
    networks = ds.networks
    learn = kernels != "fixed"
    if setting.coordinatewise:
        make = functools.partial(networks.coordinatewise, COORDINATE_WIDTH)
        generation = make(learn_variance=learn)
        destruction = make(use_score=False, learn_variance=True)
    else:
        generation = networks.annealed_score_guided(WIDTH, learn_variance=learn)
        destruction = networks.free(WIDTH, learn_variance=True)
    bounds = ds.Bounds(setting.log_variance_bound)
    return ds.samplers.dis(
        dim=dim,
        num_steps=num_steps,
        scale=problem.scale,
        schedule=ds.schedules.geometric(problem.smallest_scale),
        network=generation,
        destruction_network=destruction if kernels == "both" else None,
        backbone=networks.backbone(WIDTH) if setting.shared_backbone else None,
        generation_bounds=bounds,
        destruction_bounds=bounds,
    )


def make_objective(setting, learned_destruction):
    o = ds.objectives
    balance, likelihood = o.trajectory_balance(), o.trajectory_likelihood()
    jeffreys = o.weighted_sum(
        (o.reverse_kl_log_derivative(), setting.reverse_weight),
        (o.forward_kl_log_derivative(), 1.0),
    )
    if setting.objective in ("tb_tlm", "tb_copy_tlm") and not learned_destruction:
        return balance
    objective = {
        "jeffreys": lambda: jeffreys,
        "tb": lambda: balance,
        "lv": lambda: o.log_variance(),
        "tb_tlm": lambda: o.weighted_sum(
            (o.generation_only(balance), 1.0), (likelihood, 1.0)
        ),
        "tb_copy_tlm": lambda: o.weighted_sum(
            (o.target_copy(balance, rate=0.05), 1.0), (likelihood, 1.0)
        ),
        "reverse_kl": lambda: o.reverse_kl_log_derivative(),
    }[setting.objective]()
    if setting.frozen_updates:
        start = setting.frozen_updates
        return o.gradient_scale(objective, destruction=lambda count: count >= start)
    return objective


def make_behaviour(setting):
    b = ds.behaviours
    on_policy = b.on_policy()
    noise = optax.linear_schedule(0.2, 0.0, 2_000)
    return {
        "on_policy": lambda: on_policy,
        "seeded": lambda: b.mixture(
            (on_policy, 0.5), (b.smc_seeded(NUM_PARTICLES), 0.5)
        ),
        "exploration": lambda: b.mixture(
            (on_policy, 0.5), (b.exploration(noise), 0.25), (b.replay(20_000), 0.25)
        ),
        "by_rank": lambda: b.mixture(
            (on_policy, 0.5),
            (b.exploration(noise), 0.25),
            (b.replay(20_000, priority=ds.buffers.by_rank()), 0.25),
        ),
    }[setting.behaviour]()


def make_optimizer(setting):
    """The optimiser, and the norm to which `fit` clips the whole gradient."""

    def adam(rate):
        if not setting.separate_optimisers:
            return optax.adam(rate)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    rate = setting.learning_rate
    groups = {
        "generation": adam(rate),
        "backbone": adam(rate),
        "destruction": adam(rate * setting.destruction_rate),
        "log_z": adam(rate),
    }
    whole = None if setting.separate_optimisers else 1.0
    return optax.multi_transform(groups, ds.param_labels), whole


def train_and_evaluate(problem, num_steps, kernels, setting, seed, args):
    """One run; a flat dict of numbers."""
    target = ds.targets.by_name(problem.target)
    sampler = make_sampler(problem, target.dim, num_steps, kernels, setting)
    (optimizer, max_grad_norm), mesh = make_optimizer(setting), mesh_of(args.mesh)
    key = jax.random.key(seed)
    try:
        fit = ds.fit(
            jax.random.fold_in(key, 0),
            sampler,
            make_objective(setting, kernels == "both"),
            target.energy,
            behaviour=make_behaviour(setting),
            optimizer=optimizer,
            max_grad_norm=max_grad_norm,
            anneal=ds.schedules.cosine_anneal,
            batch_size=args.batch_size,
            max_seconds=args.seconds,
            max_energy_evaluations=args.energy_evaluations,
            mesh=mesh,
            progress_bar=False,
        )
    except ds.TrainingDiverged as error:
        return {"diverged": True, "error": str(error)[:300]}
    result = ds.evaluate(
        jax.random.fold_in(key, 1),
        sampler,
        fit.params,
        target,
        num_draws=args.num_draws,
        sinkhorn=False,
        mesh=mesh,
    )
    names = ("elbo", "eubo", "log_z_error", "log_z_standard_error", "elbo_gap")
    names += ("eubo_gap", "ess", "forward_ess", "pareto_k", "verdict", "w2")
    names += ("w2_floor", "w2_unweighted", "mode_tv", "mode_tv_unweighted")
    names += ("mode_tv_floor",)
    found = {name: result[name] for name in names if name in result}
    draws = ds.draw(
        jax.random.fold_in(key, 2),
        sampler,
        fit.params,
        target.energy,
        args.num_draws,
        mesh=mesh,
    )
    if "manywell" in problem.target:
        found["mode_tv_unweighted"] = float(np.mean(well_errors(draws.x, None)))
        found["mode_tv"] = float(np.mean(well_errors(draws.x, draws.log_weight)))
    ratios = ds.variance_ratios(
        jax.random.fold_in(key, 3), sampler, fit.params, target.energy
    )
    diverged = not np.isfinite(found["elbo"]) or fit.num_skipped > 0
    return {
        **found,
        "gap": found["eubo"] - found["elbo"],
        "diverged": bool(diverged),
        "variance_ratio_low": ratios.quantiles[:, 0].tolist(),
        "variance_ratio_high": ratios.quantiles[:, -1].tolist(),
        "variance_share_outside": ratios.share_outside,
        "num_updates": int(fit.state.count),  # none, where SMC took the whole budget
        "num_skipped": fit.num_skipped,
        "energy_evaluations": fit.num_energy_evaluations + fit.num_gradient_evaluations,
        "network_evaluations": fit.num_network_evaluations,
        "seconds": fit.seconds - fit.compile_seconds,
        "compile_seconds": fit.compile_seconds,
        "stopped_by": fit.stopped_by,
    }


def grid(args):
    cells = [
        (problem, num_steps, kernels, "grid", Setting())
        for problem in PROBLEMS
        for num_steps in STEPS
        for kernels in KERNELS
        if problem.target in args.targets and num_steps in args.num_steps
    ]
    run(cells, args)


def coordinatewise(args):
    cells = [
        (problem, *compared, name, Setting(coordinatewise=True, **change))
        for name, change in BY_COORDINATES.items()
        for problem in PROBLEMS
        for compared in COMPARED
        if problem.target in args.targets and name in args.settings
    ]
    run(cells, args)


def ablation(args):
    cells = [
        (problem, num_steps, "both", name, Setting(**change))
        for problem in PROBLEMS
        for num_steps in args.num_steps
        for name, change in ABLATION.items()
        if problem.target in args.targets and name in args.settings
    ]
    run(cells, args)


BUDGET = ("batch_size", "num_draws", "max_seconds", "max_energy_evaluations")


def run(cells, args):
    given = args.batch_size, args.num_draws, args.seconds, args.energy_evaluations
    budget = dict(zip(BUDGET, given, strict=True))
    for seed in args.seeds:
        for problem, num_steps, kernels, name, setting in cells:
            cell = {
                "name": name,
                "target": problem.target,
                "num_steps": num_steps,
                "kernels": kernels,
                "seed": seed,
            }
            wanted = {**cell, **budget}
            if wanted in [{k: row[k] for k in wanted} for row in read(args.out)]:
                continue
            found = train_and_evaluate(problem, num_steps, kernels, setting, seed, args)
            row = {**cell, **dataclasses.asdict(setting), **budget, **found}
            append(args.out, row)
            brief = {k: found.get(k) for k in ("elbo_gap", "gap", "mode_tv", "error")}
            print(*cell.values(), brief, flush=True)


COLUMNS = (
    ("EUBO - ELBO", "gap", "{:.3f}", float),
    ("ELBO gap", "elbo_gap", "{:.3f}", float),
    ("log Z error", "log_z_error", "{:+.3f}", abs),
    ("ESS", "ess", "{:.2f}", lambda v: -v),
    ("k-hat", "pareto_k", "{:.2f}", float),
    ("mode error", "mode_tv", "{:.3f}", float),
    ("unweighted", "mode_tv_unweighted", "{:.3f}", float),
    ("variance alarm", "variance_share_outside", "{:.3f}", float),
    ("W2", "w2", "{:.2f}", float),
    ("its floor", "w2_floor", "{:.2f}", float),
    ("updates", "num_updates", "{:.0f}", float),
    ("seconds", "seconds", "{:.0f}", float),
    ("energies", "energy_evaluations", "{:.1e}", float),
    ("network calls", "network_evaluations", "{:.1e}", float),
)


def table(args):
    rows, lines = rows_of(args.files), []
    for budget in dict.fromkeys(map(_budget_of, rows)):
        lines += _tables([row for row in rows if _budget_of(row) == budget])
    print("\n".join(lines))


def _tables(rows):
    """Those of runs with one budget, which a note under each says."""
    lines, heads = [], [column[0] for column in COLUMNS]
    for name in ("grid", *BY_COORDINATES):
        body = []
        for target, *rest in itertools.product(TARGETS, STEPS, KERNELS):
            own = [r for r in rows if _cell_of(r) == (name, target, *rest)]
            body += _line([target, *rest], own)
        if body:
            labels = ["target", "steps", "learned", "runs", "`trust`"]
            lines += [f"{name}:", "", *markdown([*labels, *heads], body), ""]
            lines += [*claim(rows, name), ""]
            lines += [_note([r for r in rows if r["name"] == name]), ""]
    body = []
    for target, num_steps, name in itertools.product(TARGETS, STEPS, ABLATION):
        own = [r for r in rows if _cell_of(r) == (name, target, num_steps, "both")]
        body += _line([target, name, num_steps], own)
    if body:
        labels = ["target", "both kernels learned", "steps", "runs", "`trust`"]
        lines += [*markdown([*labels, *heads], body), ""]
        lines += [_note([r for r in rows if r["name"] in ABLATION]), ""]
    return lines


def _budget_of(row):
    return tuple(row[name] for name in BUDGET)


def _note(rows):
    batch_size, num_draws, max_seconds, max_energy_evaluations = _budget_of(rows[0])
    places = " or ".join(dict.fromkeys(map(described, rows)))
    return (
        f"Mean (worst) over seeds; batch {batch_size}, at most "
        f"{max_energy_evaluations:,} energy evaluations and {max_seconds:.0f} s of "
        f"updates; {num_draws:,} draws; {places}."
    )


def claim(rows, name):
    """Does T = 5 with both kernels learned beat T = 20 fixed?"""
    body = []
    for problem in PROBLEMS:
        fixed, both = (
            [r for r in rows if _cell_of(r) == (name, problem.target, *cell)]
            for cell in COMPARED
        )
        if not (fixed and both):
            continue
        pairs = list(itertools.product(("gap", "mode_tv_unweighted"), (fixed, both)))
        cells = [summarise(own, number, "{:.3f}", float) for number, own in pairs]
        gaps = [np.mean([r.get("gap", np.inf) for r in own]) for own in (fixed, both)]
        modes = [
            np.mean([r.get("mode_tv_unweighted", np.nan) for r in own])
            for own in (fixed, both)
        ]
        no_worse = np.isnan(modes[1]) or modes[1] <= modes[0]
        verdict = "yes" if gaps[1] < gaps[0] and no_worse else "no"
        body.append([problem.target, *cells, verdict])
    heads = ["gap, 20 fixed", "gap, 5 both", "mode error, 20", "5"]
    return markdown(["target", *heads, "holds"], body) if body else []


def _cell_of(row):
    return row["name"], row["target"], row["num_steps"], row["kernels"]


def _line(labels, own):
    if not own:
        return []
    fine = [r for r in own if "gap" in r]
    bad = sum(r["diverged"] for r in own)
    runs = f"{len(own)}" + (f", {bad} diverged" if bad else "")
    trusted = sum(r["verdict"].startswith("trust") for r in fine)
    cells = [summarise(fine, *column[1:]) for column in COLUMNS]
    return [[*labels, runs, trusted, *cells]]


def plot(args):
    """EUBO - ELBO against the number of steps, one panel per target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(args.files)
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), sharex=True)
    for axis, problem in zip(axes.flat, PROBLEMS, strict=True):
        for kernels in KERNELS:
            points = []
            for num_steps in STEPS:
                cell = ("grid", problem.target, num_steps, kernels)
                gaps = [r["gap"] for r in rows if _cell_of(r) == cell and "gap" in r]
                if gaps:
                    points.append((num_steps, np.mean(gaps), min(gaps), max(gaps)))
            if points:
                steps, mean, low, high = np.array(points).T
                axis.plot(steps, mean, marker="o", label=kernels)
                axis.fill_between(steps, low, high, alpha=0.2)
        axis.set(title=problem.target, xscale="log", yscale="log")
        axis.set_xticks(STEPS, [str(k) for k in STEPS])
    axes[0, 0].set_ylabel("EUBO - ELBO (nats)")
    axes[1, 0].set_ylabel("EUBO - ELBO (nats)")
    for axis in axes[1]:
        axis.set_xlabel("steps")
    axes[0, 0].legend(title="learned")
    figure.tight_layout()
    figure.savefig(args.figure, dpi=150)


def main():
    parser, commands = commands_of(__doc__)
    out = pathlib.Path("outputs/adaptive_destruction.jsonl")
    for name, do, targets in (
        ("grid", grid, TARGETS),
        ("coordinatewise", coordinatewise, MANY_WELLS),
        ("ablation", ablation, TARGETS[:1]),
    ):
        runner = add_runner(commands, do, out, name=name)
        runner.add_argument("--targets", nargs="+", choices=TARGETS, default=targets)
        if name != "coordinatewise":
            steps = STEPS if name == "grid" else [5]
            runner.add_argument(
                "--num-steps", type=int, nargs="+", choices=STEPS, default=steps
            )
        if name != "grid":
            settings = list(ABLATION if name == "ablation" else BY_COORDINATES)
            runner.add_argument(
                "--settings", nargs="+", choices=settings, default=settings
            )
        runner.add_argument("--batch-size", type=int, default=256)
        runner.add_argument("--seconds", type=float, default=60.0)
        runner.add_argument("--energy-evaluations", type=int, default=10_000_000)
        runner.add_argument("--num-draws", type=int, default=10_000)
    add_reader(commands, table, out)
    plotter = add_reader(commands, plot, out, "plot")
    plotter.add_argument("--figure", type=pathlib.Path, default="outputs/adaptive.png")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
