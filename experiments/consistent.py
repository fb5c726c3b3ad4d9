"""One-step and any-step samplers: draws and weights at 1, 2, 4, ..., 128 steps.

    python experiments/consistent.py run
    python experiments/consistent.py table
    python experiments/consistent.py plot
    python experiments/consistent.py footnote
    python experiments/consistent.py parallel

Every method is trained once per target and seed, and judged at all step counts:

* `teacher`: dis with 128 steps, `log_variance`;
* `scds`: the same with a step-conditioned control and `self_consistency`;
* `any_step`: scds with both kernels learned at few steps and fitted there, too, by
  Jeffreys' divergence; of 32 steps at most where there are modes;
* `cdds`: distilled from the teacher of the same seed, with noise and way back fitted,
  and judged, at 1, 2, 4 and 8 steps.

`run` appends one JSON line per (target, method, seed, step count) to --out, keeps
checkpoints and a few draws beside it, and skips what is already there. Seeds share
what is compiled. Deterministic draws, along the probability flow (of cdds: with its
little noise), are what distances and errors of modes and quantiles are of; weights are
those of the stochastic kernels.
`footnote` has the number of the SCDS paper, which depends on how many points there are,
of draws in one step and between two exact sets. `parallel` times parareal.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from rows import (
    add_reader,
    add_runner,
    append,
    commands_of,
    described,
    environment,
    markdown,
    mesh_of,
    read,
    rows_of,
    seeds_of,
    summarise,
    write,
)
from transport import distances

import diffsamp as ds

NUM_STEPS = 128
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
METHODS = ("teacher", "scds", "any_step", "cdds")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A target and how samplers are set up for it; chosen on seeds from 100 on."""

    target: str
    scale: float
    smallest_scale: float
    num_steps: int = NUM_STEPS
    methods: tuple[str, ...] = METHODS
    num_updates: int = 3_000
    width: int = 64
    batch_size: int = 128
    huber: float | None = None
    coordinatewise: bool = False  # one network for all coordinates
    num_draws: int = 20_000  # five times as many in at most eight steps
    num_repeats: int = 10  # pairs of sets of points, for distances

    @property
    def steps(self):
        return [k for k in STEPS if k <= self.num_steps]


OTHERS = ("teacher", "scds", "cdds")
CELLS = (
    Cell("gmm9", 3.0, 0.18, methods=OTHERS),
    Cell("gmm9", 4.0, 0.05, 32, ("any_step",), batch_size=256),
    Cell("mw54", 2.0, 0.09, methods=OTHERS),
    Cell("mw54", 2.5, 0.06, 32, ("any_step",), width=16, coordinatewise=True),
    Cell("funnel_hard", 5.0, 0.03, huber=10.0),
    Cell("mw52", 1.4, 0.1, methods=OTHERS, width=128),
    Cell("mw52", 1.4, 0.1, 32, ("any_step",), width=16, coordinatewise=True),
    Cell("drawn_image", 2.0, 0.02, width=128),
    Cell("ionosphere", 1.0, 0.1, num_updates=1_500),
    Cell("lgcp_whitened", 1.0, 0.1, num_updates=400, batch_size=32, num_draws=1_000),
)
REFERENCES = ("ionosphere", "lgcp")  # whose moments are known from long runs
LEARNING_RATE = 2e-3
CONSISTENCY = 10.0  # weight of self-consistency
FEW_STEPS = 0.1  # weight of the divergence at few steps
NUM_PARTICLES = 2_048
STUDENT_STEPS = (1, 2, 4, 8)  # at which the student's kernels are fitted
NUM_TIMES = 18  # of the coarse grid of consistency distillation
NUM_BLOCKS = 8  # of parareal
PARALLEL = tuple(itertools.product((1, 256, 4_096), (8, 16)))  # paths and blocks
TIMED_DRAWS = 100_000
NUM_POINTS = 2_000  # in a set of which W2 is computed


def make_sampler(cell, method, dim):
    networks = ds.networks
    process = {
        "dim": dim,
        "scale": cell.scale,
        "schedule": ds.schedules.geometric(cell.smallest_scale),
    }
    control = networks.annealed_score_guided
    back = networks.free(cell.width, learn_variance=True, step_conditioned=True)
    if cell.coordinatewise:
        control = networks.coordinatewise
        back = control(
            cell.width, use_score=False, learn_variance=True, step_conditioned=True
        )
    if method == "teacher":
        network = control(cell.width)
        return ds.samplers.dis(num_steps=cell.num_steps, network=network, **process)
    if method == "cdds":
        return ds.samplers.cdds(
            network=networks.consistency(cell.width, learn_variance=True),
            destruction_network=back,
            **process,
        )
    tied = method == "any_step"
    return ds.samplers.scds(
        num_steps=cell.num_steps,
        network=control(cell.width, step_conditioned=True, flow_tied=tied),
        destruction_network=back if tied else None,
        **process,
    )


def make_objective(cell, method, teacher):
    o = ds.objectives
    if method == "cdds":
        return o.weighted_sum(
            (o.consistency_distillation(*teacher, num_times=NUM_TIMES), CONSISTENCY),
            (o.at_num_steps(jeffreys(), STUDENT_STEPS), FEW_STEPS),
        )
    log_variance = o.log_variance(huber=cell.huber)
    if method == "teacher":
        return log_variance
    terms = [(log_variance, 1.0), (o.self_consistency(), CONSISTENCY)]
    if method == "any_step":
        fewer = tuple(k for k in STEPS if k < cell.num_steps)
        terms.append((o.at_num_steps(jeffreys(), fewer), FEW_STEPS))
    return o.weighted_sum(*terms)


def jeffreys():
    o = ds.objectives
    return o.weighted_sum(
        (o.reverse_kl_log_derivative(), 1.0), (o.forward_kl_log_derivative(), 1.0)
    )


def make_behaviour():
    b = ds.behaviours
    return b.mixture((b.on_policy(), 0.5), (b.smc_seeded(NUM_PARTICLES), 0.5))


def train(cell, method, seed, args):
    """Trained sampler and what training took; from its file where there is one."""
    place = args.out.parent / "consistent"
    place.mkdir(parents=True, exist_ok=True)
    name = f"{cell.target}_{method}_{seed}"
    account = place / f"{name}.json"  # what training took, if it was done before
    target = ds.targets.by_name(cell.target)
    sampler = make_sampler(cell, method, target.dim)
    teacher = None
    if method == "cdds":
        own = train(cell, "teacher", seed, args)
        teacher = own[:2]
    fit = ds.fit(
        jax.random.key(seed),
        sampler,
        make_objective(cell, method, teacher),
        target.energy,
        behaviour=make_behaviour(),
        optimizer=optax.adam(LEARNING_RATE),
        anneal=ds.schedules.cosine_anneal,
        batch_size=cell.batch_size,
        num_updates=args.num_updates or cell.num_updates,
        checkpoint=place / f"{name}.checkpoint",
        mesh=mesh_of(args.mesh),
        progress_bar=False,
    )
    if account.exists():
        return sampler, fit.params, json.loads(account.read_text())
    spent = {
        "trained_on": environment()["device"],
        "num_updates": len(fit.metrics["loss"]),
        "num_skipped": fit.num_skipped,
        "energy_evaluations": fit.num_energy_evaluations + fit.num_gradient_evaluations,
        "network_evaluations": fit.num_network_evaluations,
        "seconds": fit.seconds - fit.compile_seconds,
        "compile_seconds": fit.compile_seconds,
    }
    account.write_text(json.dumps(spent))
    print(name, "trained", spent, flush=True)
    return sampler, fit.params, spent


def judge(cell, method, sampler, params, num_steps, seed, args):
    """Weights, deterministic draws and times at one step count."""
    target = ds.targets.by_name(cell.target)
    few = sampler.with_num_steps(num_steps)
    key = jax.random.fold_in(jax.random.key(seed), 10_000 + num_steps)
    keys = jax.random.split(key, 4)
    mesh = mesh_of(args.mesh)
    num_draws = num_draws_of(cell, num_steps, args)
    options = {"num_draws": num_draws, "sinkhorn": False, "mesh": mesh}
    result = ds.evaluate(keys[0], few, params, target, **options)
    numbers = ("elbo", "eubo", "log_z", "log_z_error", "log_z_standard_error")
    numbers += ("elbo_standard_error", "eubo_standard_error")
    numbers += ("ess", "forward_ess", "pareto_k", "verdict", "elbo_gap", "eubo_gap")
    numbers += ("mode_tv", "mode_tv_unweighted", "mode_tv_floor")
    found = {name: result[name] for name in numbers if name in result}
    drawn = deterministic(method, few)
    of_target = drawn, params, target.energy
    draws = ds.draw(keys[1], *of_target, num_draws, mesh=mesh)
    found |= shape(target, draws.x)
    if num_steps in (1, cell.num_steps):
        if target.sample is not None:
            num = NUM_POINTS * cell.num_repeats
            points = ds.draw(keys[2], *of_target, num, mesh=mesh).x
            found |= distances(keys[3], target, points, cell.num_repeats)
        name = f"{cell.target}_{method}_{seed}_{num_steps}.npy"
        np.save(args.out.parent / "consistent" / name, draws.x[:NUM_POINTS])
    if num_steps == cell.num_steps and method in ("scds", "any_step"):
        found |= in_parallel(keys[2], drawn, params, target, 256, NUM_BLOCKS)
    if num_steps == 8 and method == "teacher":
        tuned = ds.tune_time_grid(keys[2], few, params, target.energy)
        found["tuned_gain"] = tuned.elbo_after - tuned.elbo_before
        found["tuned_gain_error"] = tuned.standard_error
    if num_steps == 1 or (num_steps == cell.num_steps and method == "teacher"):
        ds.draw(keys[2], *of_target, 1_024, mesh=mesh)  # compiled
        begin = time.perf_counter()
        ds.draw(keys[2], *of_target, TIMED_DRAWS, mesh=mesh)
        found["seconds_per_100_000"] = time.perf_counter() - begin
    return found


def num_draws_of(cell, num_steps, args):
    return args.num_draws or cell.num_draws * (5 if num_steps <= 8 else 1)


def deterministic(method, sampler):
    """Along the probability flow; of the student as it is: it has next to no noise."""
    if method == "cdds":
        return sampler
    return ds.probability_flow(sampler, ds.solvers.frozen())


def in_parallel(key, flow, params, target, num_rows, num_blocks):
    """Parareal on one batch: iterations, error, and seconds beside one after the other.

    On a machine with as many idle cores as blocks it would be faster than here.
    """
    starts = flow.sampler.original(jax.random.normal(key, (num_rows, target.dim)))

    def blocks(x):
        return ds.parareal(flow, params, x, target.energy, num_blocks, tolerance=0.01)

    def steps(x):
        return flow.solve(params, x, target.energy)

    runs, seconds = [], []
    for function in (blocks, steps):
        function = jax.jit(jax.vmap(function))
        jax.block_until_ready(function(starts))  # compiled
        begin = time.perf_counter()
        runs.append(jax.block_until_ready(function(starts)))
        seconds.append(time.perf_counter() - begin)
    error = flow.sampler.unit(runs[0].x) - flow.sampler.unit(runs[1])
    return {
        "parareal_blocks": num_blocks,
        "parareal_iterations": float(np.mean(runs[0].num_iterations)),
        "parareal_error": float(np.sqrt(np.mean(error**2))),
        "parareal_seconds": seconds[0],
        "sequential_seconds": seconds[1],
    }


def shape(target, x):
    """How draws differ from the truth in what a user would look at."""
    out = {}
    if target.modes is not None:
        weights = ds.metrics.mode_weights(x, target.modes)
        out["flow_mode_tv"] = ds.metrics.total_variation(weights, target.modes.weights)
    if target.sample is None:
        return out | moments(target, x)
    exact = np.asarray(target.sample(jax.random.key(2**31 - 1), 100_000))
    if target.modes is not None:
        for name, points in (("", x), ("_floor", exact[: len(x)])):
            out[f"flow_sd_error{name}"] = sd_error(target.modes, points, exact)
    levels = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
    a, b = (np.quantile(v[:, 0], levels) for v in (x, exact))
    out["flow_quantile_error"] = float(np.abs(a - b).max() / np.std(exact[:, 0]))
    if "funnel" in target.name:
        out["flow_band_error"] = band_error(x, exact)
    num = min(NUM_POINTS, len(x))
    first, second = exact[:num], exact[num : 2 * num]
    found, floor = (ds.metrics.wasserstein2(v, first) for v in (x[:num], second))
    out |= {"flow_w2": found, "flow_w2_floor": floor, "flow_w2_ratio": found / floor}
    return out


def sd_error(modes, x, exact, least=0.02):
    """Worst relative error of a standard deviation within a mode of some weight.

    A mode that holds hardly a point counts as one without any spread.
    """
    assign = jax.vmap(modes.assign)
    of_draws, of_exact = (np.asarray(assign(jnp.asarray(v))) for v in (x, exact))
    worst = 0.0
    for mode in np.flatnonzero(np.asarray(modes.weights) >= least):
        inside = x[of_draws == mode]
        ratio = 0.0
        if len(inside) >= 50:
            ratio = np.std(inside, axis=0) / np.std(exact[of_exact == mode], axis=0)
        worst = max(worst, float(np.max(np.abs(ratio - 1))))
    return worst


def moments(target, x):
    """Means and standard deviations against long MCMC: the worst coordinate.

    The error of a field is that of all means at once, relative to their length.
    """
    name = target.name.removesuffix("_whitened")
    if name not in REFERENCES:
        return {}
    true = ds.targets.reference_moments(name)
    if target.constrain is not None:
        x = jax.vmap(target.constrain)(jnp.asarray(x))
    mean, sd = np.mean(x, axis=0), np.std(x, axis=0)
    return {
        "flow_mean_error": float(np.max(np.abs(mean - true["mean"]) / true["sd"])),
        "flow_field_error": float(
            np.linalg.norm(mean - true["mean"]) / np.linalg.norm(true["mean"])
        ),
        "flow_sd_error": float(np.max(np.abs(sd / true["sd"] - 1))),
    }


def band_error(x, exact, num_bands=5):
    """Quantiles of x2 in bands of x1 of equal mass, in conditional sds exp(x1 / 2)."""
    edges = np.quantile(exact[:, 0], np.linspace(0, 1, num_bands + 1)[1:-1])
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    worst = 0.0
    for band in range(num_bands):
        inside = x[np.digitize(x[:, 0], edges) == band]
        if len(inside) == 0:
            return np.inf
        found = np.quantile(inside[:, 1] * np.exp(-inside[:, 0] / 2), levels)
        error = np.abs(found - scipy.stats.norm.ppf(levels)).max()
        worst = max(worst, float(error))
    return worst


def run(args):
    keys = ("target", "method", "num_steps", "seed")
    done = {tuple(row[k] for k in keys) for row in read(args.out)}
    for cell, method in chosen(args):
        steps = STUDENT_STEPS if method == "cdds" else cell.steps
        wanted = {
            num_steps: [
                seed
                for seed in args.seeds
                if (cell.target, method, num_steps, seed) not in done
            ]
            for num_steps in steps
        }
        seeds = [seed for seed in args.seeds if any(seed in w for w in wanted.values())]
        trained = {seed: train(cell, method, seed, args) for seed in seeds}
        for num_steps, num_draws in ((k, num_draws_of(cell, k, args)) for k in steps):
            jax.clear_caches()  # memory maps, of which a process has 65,530
            for seed in wanted[num_steps]:
                *sampler, spent = trained[seed]
                found = judge(cell, method, *sampler, num_steps, seed, args)
                values = (cell.target, method, num_steps, seed)
                label = dict(zip(keys, values, strict=True)) | {"num_draws": num_draws}
                row = {**dataclasses.asdict(cell), **label, **spent, **found}
                write(args.out, row | environment())
                brief = ("log_z_error", "ess", "pareto_k", "flow_mode_tv")
                print(*values, {k: found.get(k) for k in brief}, flush=True)


def chosen(args):
    """The cells and methods that were asked for."""
    for cell in CELLS:
        for method in cell.methods:
            if cell.target in args.targets and method in args.methods:
                yield cell, method


def footnote(args):
    """Sinkhorn's cost as the SCDS paper has it, at several numbers of points."""
    for seed, (cell, method) in itertools.product(args.seeds, chosen(args)):
        target = ds.targets.by_name(cell.target)
        if target.sample is None:
            continue
        base = {"target": cell.target, "method": method, "seed": seed}
        keys = (*base, "num_points")
        done = [tuple(row[k] for k in keys) for row in read(args.out)]
        wanted = [num for num in args.points if (*base.values(), num) not in done]
        if not wanted:
            continue
        sampler, params, _ = train(cell, method, seed, args)
        drawn = deterministic(method, sampler.with_num_steps(1))
        for num in wanted:
            key = jax.random.fold_in(jax.random.key(seed), 20_000 + num)
            for_draws, first, second = jax.random.split(key, 3)
            x = ds.draw(for_draws, drawn, params, target.energy, num).x
            a, b = (np.asarray(target.sample(k, num)) for k in (first, second))
            cost, floor = (ds.metrics.sinkhorn_scds(v, a) for v in (x, b))
            row = {**base, "num_points": num, "cost": cost, "floor": floor}
            append(args.out, row)
            print(*row.values(), flush=True)
    body = []
    for cell, method in chosen(args):
        for num in args.points:
            label = (cell.target, method, num)
            keys = ("target", "method", "num_points")
            own = [r for r in read(args.out) if tuple(r[k] for k in keys) == label]
            if own:
                cells = [summarise(own, c, "{:.4f}", float) for c in ("cost", "floor")]
                body.append([*label, seeds_of(own), *cells])
    heads = ["target", "method", "points", "seeds", "cost", "of exact sets"]
    print("\n".join(["", *markdown(heads, body)]))


def parallel(args):
    """Parareal beside the same steps one after the other."""
    for seed, (cell, method) in itertools.product(args.seeds, chosen(args)):
        if method not in ("scds", "any_step"):
            continue
        target = ds.targets.by_name(cell.target)
        sampler, params, _ = train(cell, method, seed, args)
        flow = deterministic(method, sampler)
        for num_rows, num_blocks in PARALLEL:
            key = jax.random.key(seed)
            found = in_parallel(key, flow, params, target, num_rows, num_blocks)
            label = {"target": cell.target, "method": method, "seed": seed}
            append(args.out, {**label, "num_rows": num_rows, **found})
    heads = ["target", "method", "seed", "device", "paths", "blocks", "iterations"]
    body = [
        [r[k] for k in ("target", "method", "seed", "device", "num_rows")]
        + [
            r["parareal_blocks"],
            f"{r['parareal_iterations']:.2f}",
            f"{r['parareal_error']:.4f}",
            f"{1e3 * r['parareal_seconds']:.1f}",
            f"{1e3 * r['sequential_seconds']:.1f}",
        ]
        for r in read(args.out)
    ]
    print("\n".join(markdown([*heads, "error", "ms", "one by one"], body)))


COLUMNS = (
    ("log Z error", "log_z_error", "{:+.3f}", abs),
    ("ELBO gap", "elbo_gap", "{:.3f}", float),
    ("EUBO gap", "eubo_gap", "{:.3f}", float),
    ("ESS", "ess", "{:.3f}", lambda v: -v),
    ("k-hat", "pareto_k", "{:.2f}", float),
    ("mode error", "flow_mode_tv", "{:.3f}", float),
    ("sd error", "flow_sd_error", "{:.3f}", float),
    ("its floor", "flow_sd_error_floor", "{:.3f}", float),
    ("quantile error", "flow_quantile_error", "{:.3f}", float),
    ("in bands", "flow_band_error", "{:.3f}", float),
    ("mean error", "flow_mean_error", "{:.3f}", float),
    ("of the field", "flow_field_error", "{:.3f}", float),
    ("W2 / floor", "w2_ratio", "{:.3f}", lambda v: abs(v - 1)),
    ("its noise", "w2_ratio_se", "{:.3f}", float),
    ("Sinkhorn / floor", "sinkhorn_ratio", "{:.3f}", lambda v: abs(v - 1)),
    ("s / 100,000 draws", "seconds_per_100_000", "{:.2f}", float),
    ("training s", "seconds", "{:.0f}", float),
    ("energies", "energy_evaluations", "{:.1e}", float),
)


def table(args):
    rows, body = rows_of(args.files), []
    for cell in CELLS:
        for method in cell.methods:
            for num_steps in args.num_steps:
                label = (cell.target, method, num_steps)
                own = [
                    r
                    for r in rows
                    if (r["target"], r["method"], r["num_steps"]) == label
                ]
                if own:
                    cells = [summarise(own, *column[1:]) for column in COLUMNS]
                    body.append([*label, seeds_of(own), *cells])
    labels = ["target", "method", "steps", "seeds"]
    lines = markdown([*labels, *(c[0] for c in COLUMNS)], body)
    first = rows[0]
    note = f"Mean (worst) over seeds, {described(first)}. {honest(rows)}"
    print("\n".join([*lines, "", note, "", *others(rows)]))


def others(rows):
    """Parareal and learned time grids, where they were measured."""
    lines = []
    for row in rows:
        label = f"* {row['target']}, {row['method']}, seed {row['seed']}: "
        if row.get("parareal_iterations") is not None:
            lines.append(
                f"{label}parareal with {row['parareal_blocks']} blocks took "
                f"{row['parareal_iterations']:.2f} iterations to an error of "
                f"{row['parareal_error']:.4f}, {row['parareal_seconds']:.2f} s beside "
                f"{row['sequential_seconds']:.2f} s one step after the other"
            )
        if row.get("tuned_gain") is not None:
            lines.append(
                f"{label}a learned grid of 8 steps gained {row['tuned_gain']:+.3f} "
                f"(standard error {row['tuned_gain_error']:.3f}) in ELBO"
            )
    return lines


def honest(rows):
    """Whether any ELBO lies above log Z or any EUBO below it, beyond its error."""
    known = [r for r in rows if r.get("elbo_gap") is not None]

    def beyond(row, bound):
        gap, error = row.get(f"{bound}_gap"), row.get(f"{bound}_standard_error")
        return gap is not None and error is not None and gap < -3 * error

    wrong = [
        f"{r['target']}, {r['method']}, seed {r['seed']}, {r['num_steps']} steps"
        for r in known
        if beyond(r, "elbo") or beyond(r, "eubo")
    ]
    if wrong:
        return "Bounds violated: " + "; ".join(wrong) + "."
    return (
        f"ELBO <= log Z <= EUBO within three standard errors of each bound on all "
        f"{len(known)} rows."
    )


def plot(args):
    """Quality against steps, calls against draws, and draws in one step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(args.files)
    targets = dict.fromkeys(cell.target for cell in CELLS)
    targets = [name for name in targets if any(r["target"] == name for r in rows)]

    def panels(num_rows, height):
        width = 3 * len(targets)
        figure, axes = plt.subplots(
            num_rows, len(targets), figsize=(width, height), squeeze=False
        )
        for axis, target in zip(axes[0], targets, strict=True):
            axis.set_title(target)
        return figure, axes

    def of(target, method, num_steps):
        label = (target, method, num_steps)
        return [r for r in rows if (r["target"], r["method"], r["num_steps"]) == label]

    quality = (
        ("ess", "ESS"),
        ("elbo_gap", "ELBO gap"),
        ("flow_w2_ratio", "W2 / floor"),
    )
    figure, axes = panels(3, 8)
    for column, target in zip(axes.T, targets, strict=True):
        for axis, (name, text) in zip(column, quality, strict=True):
            for method in METHODS:
                own = {k: [r.get(name) for r in of(target, method, k)] for k in STEPS}
                own = {k: [v for v in vs if v is not None] for k, vs in own.items()}
                points = [(k, np.mean(vs)) for k, vs in own.items() if vs]
                if points:
                    axis.plot(*np.array(points).T, marker="o", label=method)
            axis.set(xscale="log", xlabel="steps", ylabel=text)
        column[1].set_yscale("symlog", linthresh=0.1)
        column[2].set_yscale("log")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(args.folder / "consistent_steps.png", dpi=120)

    def training_calls(target, method, own):
        calls = np.mean([r["network_evaluations"] for r in own])
        if method == "cdds":  # which needs its teacher
            of_teacher = of(target, "teacher", NUM_STEPS)
            calls += np.mean([r["network_evaluations"] for r in of_teacher])
        return calls

    figure, axes = panels(2, 6)
    num_draws = np.geomspace(1e2, 1e7, 50)
    for (cost, quality), target in zip(axes.T, targets, strict=True):
        for method in METHODS:
            num_steps = NUM_STEPS if method == "teacher" else 1
            own = of(target, method, num_steps)
            if own:
                calls = training_calls(target, method, own) + num_steps * num_draws
                cost.plot(num_draws, calls, label=f"{method}, {num_steps} steps")
            points = []
            for k in STEPS:
                own = of(target, method, k)
                found = [v for r in own if (v := r.get("flow_w2_ratio")) is not None]
                if found:
                    calls = training_calls(target, method, own) + k * TIMED_DRAWS
                    points.append((calls, np.mean(found)))
            if points:
                quality.plot(*np.array(points).T, marker="o", label=method)
        cost.set(xscale="log", yscale="log", xlabel="draws", ylabel="network calls")
        label = f"network calls of training and {TIMED_DRAWS:,} draws"
        quality.set(xscale="log", yscale="log", xlabel=label, ylabel="W2 / floor")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(args.folder / "consistent_cost.png", dpi=120)

    figure, axes = panels(1 + len(METHODS), 3 * (1 + len(METHODS)))
    for column, target in zip(axes.T, targets, strict=True):
        exact = ds.targets.by_name(target).sample
        clouds = {"truth": None if exact is None else exact(jax.random.key(0), 2_000)}
        for method in METHODS:
            seeds = sorted(r["seed"] for r in of(target, method, 1))
            for seed in seeds[:1]:
                name = f"{target}_{method}_{seed}_1.npy"
                clouds[method] = np.load(args.files[0].parent / "consistent" / name)
        for axis, name in zip(column, ("truth", *METHODS), strict=True):
            axis.set_ylabel(name)
            if clouds.get(name) is not None:
                axis.plot(*np.asarray(clouds[name])[:, :2].T, ".", markersize=1)
    figure.tight_layout()
    figure.savefig(args.folder / "consistent_draws.png", dpi=120)


def main():
    parser, commands = commands_of(__doc__)
    out = pathlib.Path("outputs/consistent.jsonl")
    names = list(dict.fromkeys(cell.target for cell in CELLS))
    runner = add_runner(commands, run, out)
    runner.add_argument("--num-draws", type=int, help="instead of the cell's own")
    beside = add_runner(
        commands, footnote, out.with_name("consistent_sinkhorn.jsonl"), name="footnote"
    )
    beside.add_argument("--points", type=int, nargs="+", default=[2_000, 6_000])
    timer = add_runner(
        commands, parallel, out.with_name("consistent_parallel.jsonl"), name="parallel"
    )
    for one in (runner, beside, timer):
        one.add_argument("--targets", nargs="+", choices=names, default=names)
        one.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
        one.add_argument("--num-updates", type=int, help="instead of the cell's own")
    printer = add_reader(commands, table, out)
    printer.add_argument("--num-steps", type=int, nargs="+", default=[1, 2, 4, 8, 128])
    plotter = add_reader(commands, plot, out, "plot")
    plotter.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("."))
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
