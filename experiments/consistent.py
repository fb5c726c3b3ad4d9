"""One-step and any-step samplers: draws and weights at 1, 2, 4, ..., 128 steps.

    python experiments/consistent.py run
    python experiments/consistent.py time
    python experiments/consistent.py table
    python experiments/consistent.py plot
    python experiments/consistent.py footnote
    python experiments/consistent.py parallel

Every method is trained once per target and seed, and judged at all step counts:

* `teacher`: dis with 128 steps, `log_variance`;
* `scds`: the same with a step-conditioned control and `self_consistency`;
* `any_step`: scds, consistent along whole paths, with both kernels learned at few steps
  and fitted there, too, by Jeffreys' divergence; of 32 steps at most where there are
  modes or many coordinates;
* `cdds`: distilled from the teacher of the same seed, with noise and way back fitted,
  and weighed, at 1, 2, 4 and 8 steps.

Draws go along the flow, in pairs of steps (`linear_end`) where kernels are as trained
and one by one where displacements are. `teacher_dpm` is the teacher drawn from by
`dpm_solver`.

`run` appends one JSON line per (target, method, seed, step count) to --out, keeps
checkpoints and a few draws beside it, skips what is already there, and goes on where
one fails. Seeds share what is compiled. Deterministic draws, along the probability flow
(of cdds: with its little noise), are what distances and errors of modes and quantiles
are of; weights are those of the stochastic kernels, in eight steps at most with the
widths of `tune_widths`.
`time` adds how long draws without weights take in one step and in the teacher's many,
in turn and the best of several; run it on an idle machine.
`footnote` has the number of the SCDS paper, which depends on how many points there are,
of draws in one step and between two exact sets. `parallel` times parareal.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import time
import traceback

import jax
import numpy as np
import optax
from consistent_measures import NUM_POINTS, far, shape, truth, weigh
from consistent_report import FEW, METHODS, ONE_STEP, TEACHERS, plot, table
from rows import (
    add_reader,
    add_runner,
    append,
    commands_of,
    environment,
    markdown,
    mesh_of,
    read,
    seeds_of,
    summarise,
    write,
)

import diffsamp as ds

NUM_STEPS = 128
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A target and how samplers are set up for it; chosen on seeds from 100 on."""

    target: str
    scale: float | tuple[float, ...]
    smallest_scale: float
    num_steps: int = NUM_STEPS
    methods: tuple[str, ...] = METHODS
    num_updates: int = 3_000
    student_updates: int = 15_000  # of cdds, which cost a tenth of the teacher's
    width: int = 64
    depth: int = 2
    batch_size: int = 128
    huber: float | None = None
    consistency: float = 10.0  # weight of self-consistency and of distillation
    coordinatewise: bool = False  # one network for all coordinates
    octaves: int = 0  # of the state that networks see
    log_variance: float = -4.0  # at which kernels of few steps start
    num_draws: int = 20_000  # five times as many in at most eight steps
    num_repeats: int = 10  # pairs of sets of points, for distances at both ends
    num_timed: int = 100_000
    num_particles: int = 2_048  # of SMC, for half of the rows of a batch
    tune: bool = True  # the teacher's time grid, and widths of kernels of few steps

    @property
    def steps(self):
        return [k for k in STEPS if k <= self.num_steps]


PLAIN = (*TEACHERS, "scds")  # without kernels of few steps
LONG = {"num_updates": 10_000}
WELLS = (1.4,) * 5 + (1.0,) * 45  # standard deviations of mw52
GMM9 = {"target": "gmm9", "consistency": 20.0, "num_repeats": 50}
MW54 = {"target": "mw54", "width": 32, "coordinatewise": True}
MW52 = {
    **{"target": "mw52", "scale": WELLS, "smallest_scale": 0.1, "width": 16},
    **{"batch_size": 32, "consistency": 500.0, "coordinatewise": True},
}
LGCP = {  # of so many coordinates all else would take longer than training
    **{"target": "lgcp_whitened", "scale": 1.0, "smallest_scale": 0.1},
    **{"student_updates": 1_000, "width": 16, "batch_size": 32},
    **{"coordinatewise": True, "num_draws": 1_000, "num_timed": 1_000},
    **{"num_particles": 256, "tune": False},
}
CELLS = (
    Cell(**GMM9, scale=3.0, smallest_scale=0.18, methods=PLAIN, **LONG, octaves=4),
    Cell(
        **GMM9,
        scale=3.0,
        smallest_scale=0.18,
        methods=("cdds",),
        student_updates=30_000,
        depth=3,
        octaves=5,
    ),
    Cell(
        **GMM9,
        scale=4.0,
        smallest_scale=0.05,
        num_steps=32,
        methods=("any_step",),
        **LONG,
        depth=3,
        octaves=5,
    ),
    Cell(
        **MW54,
        scale=2.0,
        smallest_scale=0.09,
        methods=PLAIN,
        num_updates=5_000,
        consistency=50.0,
        octaves=4,
    ),
    Cell(
        **MW54,
        scale=2.0,
        smallest_scale=0.09,
        methods=("cdds",),
        consistency=50.0,
        octaves=5,
    ),
    Cell(
        **MW54,
        scale=2.5,
        smallest_scale=0.06,
        num_steps=32,
        methods=("any_step",),
        num_updates=15_000,
        consistency=200.0,
        octaves=4,
    ),
    Cell("funnel_hard", 5.0, 0.03, huber=10.0),
    Cell(**MW52, methods=PLAIN, octaves=4),
    Cell(**MW52, methods=("cdds",), student_updates=8_000, octaves=5),
    Cell(**MW52, num_steps=32, methods=("any_step",), num_updates=6_000, octaves=4),
    Cell("drawn_image", 2.0, 0.02, width=128),
    Cell("ionosphere", 1.0, 0.1, num_updates=2_500),
    Cell(**LGCP, methods=(*PLAIN, "cdds"), num_updates=200),
    Cell(
        **LGCP,
        num_steps=32,
        methods=("any_step",),
        num_updates=200,
        log_variance=0.0,
    ),
)
OPTIMIZER = optax.adam(2e-3)  # one object, so that seeds share what is compiled
PAIRS_PER_PATH = 8  # of self-consistency
FEW_REPEATS = 3  # of distances between the ends
FEW_STEPS = 0.1  # weight of the divergence at few steps
STUDENT_STEPS = (1, 2, 4, 8)  # at which the student's kernels are fitted
NUM_TIMES = 18  # of the coarse grid of consistency distillation
PARALLEL = tuple(itertools.product((1, 256, 4_096), (8, 16)))  # paths and blocks


def make_sampler(cell, method, dim):
    networks = ds.networks
    process = {
        "dim": dim,
        "scale": cell.scale,
        "schedule": ds.schedules.geometric(cell.smallest_scale),
    }
    control = networks.annealed_score_guided
    size, seen = (cell.width, cell.depth), {"octaves": cell.octaves}
    learned = {"learn_variance": True, "step_conditioned": True, **seen}
    own = networks.free(*size, **learned)  # of what kernels add to the flow
    if cell.coordinatewise:
        control = networks.coordinatewise
        own = control(*size, use_score=False, **learned)
    if method == "teacher":
        network = control(*size, **seen)
        return ds.samplers.dis(num_steps=cell.num_steps, network=network, **process)
    if method == "cdds":
        each = {"coordinatewise": cell.coordinatewise, **seen}
        return ds.samplers.cdds(
            network=networks.tied(networks.consistency(*size, **each), own),
            destruction_network=own,
            **process,
        )
    flow = control(*size, step_conditioned=True, **seen)
    learns = method == "any_step"
    return ds.samplers.scds(
        num_steps=cell.num_steps,
        network=networks.tied(flow, own, cell.log_variance) if learns else flow,
        destruction_network=own if learns else None,
        **process,
    )


def make_objective(cell, method, teacher):
    o = ds.objectives
    if method == "cdds":
        options = {"num_times": NUM_TIMES, "second_order": True, "whole_paths": True}
        consistency = o.consistency_distillation(*teacher, **options)
        return o.weighted_sum(
            (consistency, cell.consistency),
            (o.at_num_steps(jeffreys(), STUDENT_STEPS), FEW_STEPS),
        )
    log_variance = o.log_variance(huber=cell.huber)
    if method == "teacher":
        return log_variance
    options = {"second_order": True, "whole_paths": method == "any_step"}
    consistency = o.self_consistency(pairs_per_path=PAIRS_PER_PATH, **options)
    terms = [(log_variance, 1.0), (consistency, cell.consistency)]
    if method == "any_step":
        fewer = tuple(k for k in STEPS if k < cell.num_steps)
        terms.append((o.at_num_steps(jeffreys(), fewer), FEW_STEPS))
    return o.weighted_sum(*terms)


def jeffreys():
    o = ds.objectives
    return o.weighted_sum(
        (o.reverse_kl_log_derivative(), 1.0), (o.forward_kl_log_derivative(), 1.0)
    )


def make_behaviour(cell):
    b = ds.behaviours
    return b.mixture((b.on_policy(), 0.5), (b.smc_seeded(cell.num_particles), 0.5))


def train(cell, method, seed, args):
    """Trained sampler and what training took; from its file where there is one.

    The account is kept while training goes on, so that a run that is killed and goes on
    later counts all its calls; those that were cut short count with compilation.
    """
    method = "teacher" if method == "teacher_dpm" else method
    wanted = cell.student_updates if method == "cdds" else cell.num_updates
    num_updates = args.num_updates or wanted
    place = place_of(args)
    name = f"{cell.target}_{method}_{seed}"
    checkpoint, account = place / f"{name}.checkpoint", place / f"{name}.json"
    target = truth(cell.target).target
    sampler = make_sampler(cell, method, target.dim)
    teacher, others = None, []
    if method == "cdds":
        *teacher, of_teacher = train(cell_of_teacher(cell), "teacher", seed, args)
        others = [of_teacher]
    spent = {"num_updates": num_updates, "seconds": 0.0, "num_calls": 0}
    if checkpoint.exists() and account.exists():
        spent = json.loads(account.read_text())
    if spent["num_updates"] != num_updates:
        raise ValueError(
            f"{account} is of {spent['num_updates']} updates, got {num_updates}; give "
            "--num-updates as before, or another --out"
        )
    finished, before = "trained_on" in spent, spent["seconds"]
    spent["num_calls"] += not finished
    begin = time.perf_counter()

    def note(*_):
        seconds = before + time.perf_counter() - begin
        replace(account, json.dumps(spent | {"seconds": seconds}))

    fit = ds.fit(
        jax.random.key(seed),
        sampler,
        make_objective(cell, method, teacher),
        target.energy,
        behaviour=make_behaviour(cell),
        optimizer=OPTIMIZER,
        anneal=ds.schedules.cosine_anneal,
        batch_size=cell.batch_size,
        num_updates=num_updates,
        checkpoint=checkpoint,
        callback=note,
        mesh=mesh_of(args.mesh),
        progress_bar=False,
    )
    if fit.stopped_by == "interrupt":  # not trained yet
        raise KeyboardInterrupt
    if not finished:
        energies = fit.num_energy_evaluations + fit.num_gradient_evaluations
        if teacher is None:
            energies += truth(cell.target).pilot_evaluations
        spent |= {
            "trained_on": environment()["device"],
            "num_skipped": fit.num_skipped,
            "energy_evaluations": energies,
            "network_evaluations": fit.num_network_evaluations,
            "seconds": before + fit.seconds - fit.compile_seconds,
            "compile_seconds": fit.compile_seconds,
        }
        replace(account, json.dumps(spent))
        print(name, "trained", spent, flush=True)
    names = ("energy_evaluations", "network_evaluations", "seconds")
    sums = {f"all_{k}": sum(s[k] for s in (spent, *others)) for k in names}
    return sampler, fit.params, spent | sums


def cell_of_teacher(cell):
    (found,) = (c for c in CELLS if c.target == cell.target and "teacher" in c.methods)
    return found


def place_of(args):
    place = args.out.parent / "consistent"
    place.mkdir(parents=True, exist_ok=True)
    return place


def replace(path, text):
    """Writes a file that is whole at all times."""
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)


def judge(cell, method, sampler, params, num_steps, num_draws, seed, args):
    """Weights and draws without weights at one step count."""
    target = truth(cell.target).target
    few = sampler.with_num_steps(num_steps)
    key = jax.random.fold_in(jax.random.key(seed), 10_000 + num_steps)
    keys = jax.random.split(key, 4)
    mesh, place = mesh_of(args.mesh), place_of(args)
    drawn, *given = unweighted(method, few, params)
    given = drawn, *given, target.energy
    calls = drawn.evaluations_per_path.network
    found = {"num_draws": num_draws, "calls_per_draw": calls}
    if method != "teacher_dpm" and (method != "cdds" or num_steps in STUDENT_STEPS):
        rest = cell.target, params, num_draws, place, mesh
        found |= weigh(keys[0], few, *rest, tune=tunes(cell, method, num_steps))
    draws = ds.draw(keys[1], *given, num_draws, mesh=mesh)
    found |= shape(cell.target, draws.x)
    num_repeats = FEW_REPEATS
    if num_steps in (1, cell.num_steps):
        name = f"{cell.target}_{method}_{seed}_{num_steps}.npy"
        np.save(place / name, draws.x[:NUM_POINTS])
        if num_steps > 1 or method in ONE_STEP:  # a teacher's are far off, and slow
            num_repeats = cell.num_repeats
    if target.sample is not None and cell.target != "funnel_hard":  # of its tails alone
        num = NUM_POINTS * num_repeats
        points = ds.draw(keys[2], *given, num, mesh=mesh).x
        found |= far(cell.target, seed, points, num_repeats)
    if num_steps == 8 and method == "teacher" and cell.tune:
        tuned = ds.tune_time_grid(keys[3], few, params, target.energy)
        found["tuned_gain"] = tuned.elbo_after - tuned.elbo_before
        found["tuned_gain_error"] = tuned.standard_error
    return found


def tunes(cell, method, num_steps):
    return cell.tune and method in ONE_STEP and num_steps in FEW


def num_draws_of(cell, num_steps, args):
    return args.num_draws or cell.num_draws * (5 if num_steps <= 8 else 1)


def unweighted(method, sampler, params):
    """What draws without weights come from, and its parameters.

    The probability flow; of the student, whose last step has next to no noise, its
    consistency function and the noise of its process: what is learned besides is for
    weights, at the step counts at which it was fitted.
    """
    if method == "cdds":
        return sampler.flow_alone(params)
    solver = ds.solvers.frozen()
    if method == "teacher_dpm":
        solver = ds.solvers.dpm_solver()
    elif sampler.finest in (None, sampler.num_steps):
        solver = ds.solvers.linear_end()
    return ds.probability_flow(sampler, solver), params


KEYS = ("target", "method", "num_steps", "seed")


def run(args):
    """Trains and judges; what fails has a row of its own and does not stop the rest."""
    rows, num_failed = read(args.out), 0
    rows = [r for r in rows if "failed" not in r and "draw_seconds" not in r]
    done = {tuple(row[k] for k in KEYS) for row in rows}

    def attempt(function, *label):
        nonlocal num_failed
        try:
            return function()
        except Exception as error:
            traceback.print_exc()
            num_failed += 1
            row = dict(zip(KEYS, label, strict=True)) | environment()
            row["failed"] = f"{type(error).__name__}: {error}"
            write(args.out, row)

    for cell, method in chosen(args):
        labels = itertools.product((cell.target,), (method,), steps_of(cell, args))
        labels = [(*some, seed) for some in labels for seed in args.seeds]
        labels, trained = [label for label in labels if label not in done], {}
        for seed in (s for s in args.seeds if any(label[-1] == s for label in labels)):
            training = functools.partial(train, cell, method, seed, args)
            trained[seed] = attempt(training, cell.target, method, None, seed)
        for label in labels:
            *_, num_steps, seed = label
            if trained[seed] is None:
                continue
            make_room()
            *sampler, spent = trained[seed]
            rest = num_steps, num_draws_of(cell, num_steps, args), seed, args
            judging = functools.partial(judge, cell, method, *sampler, *rest)
            found = attempt(judging, *label)
            if found is None:
                continue
            settings = dataclasses.asdict(cell)
            settings["finest"] = settings.pop("num_steps")
            row = settings | dict(zip(KEYS, label, strict=True))
            write(args.out, row | spent | found | environment())
            brief = ("log_z_error", "ess", "pareto_k", "flow_mode_tv")
            print(*label, {k: found.get(k) for k in brief}, flush=True)
    if num_failed:
        raise SystemExit(f"{num_failed} failed, see the rows in {args.out}")


def make_room():
    """Compiled programs hold memory maps, of which Linux grants a process 65,530."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


def steps_of(cell, args):
    return [k for k in cell.steps if args.num_steps is None or k in args.num_steps]


def chosen(args):
    """The cells and methods that were asked for."""
    for cell in CELLS:
        for method in cell.methods:
            if cell.target in args.targets and method in args.methods:
                yield cell, method


def clock(args):
    """Seconds of draws in one step and in the teacher's many, in turn, the best of all.

    All of a target are timed again where one is missing on this device.
    """
    keys = ("target", "method", "seed", "device")
    for target, seed in itertools.product(args.targets, args.seeds):
        cells = [(c, m) for c in CELLS for m in c.methods if c.target == target]
        cells = [(c, m) for c, m in cells if m == "teacher" or m in args.methods]
        cells = [(c, m) for c, m in cells if m != "teacher_dpm"]
        rows = [r for r in read(args.out) if "draw_seconds" in r]
        done = {tuple(row[k] for k in keys) for row in rows}
        device = environment()["device"]
        if all((target, method, seed, device) in done for _, method in cells):
            continue
        calls, best, num = {}, {}, 0
        for cell, method in cells:
            sampler, params, _ = train(cell, method, seed, args)
            num_steps = cell.num_steps if method == "teacher" else 1
            given = unweighted(method, sampler.with_num_steps(num_steps), params)
            given = jax.random.key(seed), *given, truth(target).target.energy
            num = args.num_draws or cell.num_timed
            options = {"num_draws": num, "mesh": mesh_of(args.mesh)}
            calls[method, num_steps] = functools.partial(ds.draw, *given, **options)
            calls[method, num_steps](num_draws=min(num, 20_000))  # compiled
        for _, (label, call) in itertools.product(range(args.repeats), calls.items()):
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            best[label] = min(seconds, best.get(label, np.inf))
        (many,) = (v for (method, _), v in best.items() if method == "teacher")
        for (method, num_steps), seconds in best.items():
            label = dict(zip(KEYS, (target, method, num_steps, seed), strict=True))
            found = {"timed_draws": num, "draw_seconds": seconds}
            found |= {"wall_ratio": many / seconds}
            found["seconds_per_100_000"] = seconds * 100_000 / num
            append(args.out, label | found)
            print(*label.values(), found, flush=True)


def in_parallel(key, flow, params, target, num_rows, num_blocks):
    """Parareal on one batch: iterations, error, and seconds beside one after the other.

    On a machine with as many idle cores as blocks it would be faster than here.
    """
    starts = flow.sampler.original(jax.random.normal(key, (num_rows, target.dim)))

    def blocks(x):
        return ds.parareal(flow, params, x, target.energy, num_blocks, tolerance=0.01)

    def steps(x):
        return flow.solve(params, x, target.energy)

    functions = [jax.jit(jax.vmap(function)) for function in (blocks, steps)]
    runs = [jax.block_until_ready(function(starts)) for function in functions]
    seconds = [np.inf, np.inf]
    for _, (i, function) in itertools.product(range(3), enumerate(functions)):
        begin = time.perf_counter()
        jax.block_until_ready(function(starts))
        seconds[i] = min(seconds[i], time.perf_counter() - begin)
    error = flow.sampler.unit(runs[0].x) - flow.sampler.unit(runs[1])
    return {
        "parareal_blocks": num_blocks,
        "parareal_iterations": float(np.mean(runs[0].num_iterations)),
        "most_iterations": int(np.max(runs[0].num_iterations)),
        "parareal_error": float(np.sqrt(np.mean(error**2))),
        "parareal_seconds": seconds[0],
        "sequential_seconds": seconds[1],
    }


def footnote(args):
    """Sinkhorn's cost as the SCDS paper has it, at several numbers of points.

    Between exact sets once for a target and seed, whatever the method.
    """
    rows = read(args.out)
    floors = {(r["target"], r["seed"], r["num_points"]): r["floor"] for r in rows}
    for seed, (cell, method) in itertools.product(args.seeds, chosen(args)):
        target = truth(cell.target).target
        if target.sample is None:
            continue
        base = {"target": cell.target, "method": method, "seed": seed}
        keys = (*base, "num_points")
        done = [tuple(row[k] for k in keys) for row in read(args.out)]
        wanted = [num for num in args.points if (*base.values(), num) not in done]
        if not wanted:
            continue
        sampler, params, _ = train(cell, method, seed, args)
        given = unweighted(method, sampler.with_num_steps(1), params)
        for num in wanted:
            key = jax.random.fold_in(jax.random.key(seed), 20_000 + num)
            for_draws, first, second = jax.random.split(key, 3)
            x = ds.draw(for_draws, *given, target.energy, num).x
            exact = np.asarray(target.sample(first, num))
            label = (cell.target, seed, num)
            if label not in floors:
                other = np.asarray(target.sample(second, num))
                floors[label] = ds.metrics.sinkhorn_scds(other, exact)
            cost = ds.metrics.sinkhorn_scds(x, exact)
            row = {**base, "num_points": num, "cost": cost, "floor": floors[label]}
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
    keys = ("target", "method", "seed", "device", "num_rows", "parareal_blocks")
    device = environment()["device"]
    for seed, (cell, method) in itertools.product(args.seeds, chosen(args)):
        done = {tuple(row[k] for k in keys) for row in read(args.out)}
        label = {"target": cell.target, "method": method, "seed": seed}
        wanted = [p for p in PARALLEL if (*label.values(), device, *p) not in done]
        if method not in ("scds", "any_step") or not wanted:
            continue
        target = truth(cell.target).target
        sampler, params, _ = train(cell, method, seed, args)
        flow = ds.probability_flow(sampler)
        for num_rows, num_blocks in wanted:
            key = jax.random.key(seed)
            found = in_parallel(key, flow, params, target, num_rows, num_blocks)
            append(args.out, {**label, "num_rows": num_rows, **found})
    heads = [*keys[:4], "paths", "blocks", "iterations", "at most", "error", "ms"]
    heads += ["one by one"]
    body = [
        [
            *(r[k] for k in keys),
            f"{r['parareal_iterations']:.2f}",
            r["most_iterations"],
            f"{r['parareal_error']:.4f}",
            f"{1e3 * r['parareal_seconds']:.1f}",
            f"{1e3 * r['sequential_seconds']:.1f}",
        ]
        for r in read(args.out)
    ]
    print("\n".join(markdown(heads, body)))


def main():
    parser, commands = commands_of(__doc__)
    out = pathlib.Path("outputs/consistent.jsonl")
    names = list(dict.fromkeys(cell.target for cell in CELLS))
    runner = add_runner(commands, run, out)
    timer = add_runner(commands, clock, out, name="time")
    timer.add_argument("--repeats", type=int, default=3)
    for one in (runner, timer):
        one.add_argument("--num-draws", type=int, help="instead of the cell's own")
    help = "at which to judge, instead of all"
    runner.add_argument("--num-steps", type=int, nargs="+", help=help)
    beside = add_runner(
        commands, footnote, out.with_name("consistent_sinkhorn.jsonl"), name="footnote"
    )
    beside.add_argument("--points", type=int, nargs="+", default=[2_000, 6_000])
    parareal = add_runner(
        commands, parallel, out.with_name("consistent_parallel.jsonl"), name="parallel"
    )
    for one in (runner, timer, beside, parareal):
        some = ["gmm9", "mw54", "ionosphere"] if one is parareal else names
        one.add_argument("--targets", nargs="+", choices=names, default=some)
        one.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
        one.add_argument("--num-updates", type=int, help="instead of the cell's own")
    printer = add_reader(commands, table, out)
    steps = [1, 2, 4, 8, 32, 128]
    printer.add_argument("--num-steps", type=int, nargs="+", default=steps)
    plotter = add_reader(commands, plot, out, "plot")
    plotter.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("."))
    help = "folder of draws, by default `consistent` beside the first file"
    plotter.add_argument("--draws", type=pathlib.Path, help=help)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
