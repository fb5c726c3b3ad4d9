"""How fast training and drawing are, against the machine and against other programs.

    python experiments/speed.py updates --out outputs/speed.jsonl
    python experiments/speed.py updates --peers    # workloads of other programs
    python experiments/speed.py scoring            # the second pass alone
    python experiments/speed.py profile            # where the time of an update goes
    python experiments/speed.py compile            # each sampler
    python experiments/speed.py precision          # what bfloat16 does to the ELBO
    python experiments/speed.py draws
    python experiments/speed.py quality            # seconds to a given quality
    python experiments/speed.py table [FILES] [--peer-file peers.jsonl]
    python experiments/speed.py plot [FILES]

Every cell runs in a process of its own, so that its peak memory is its own, and adds
one JSON line to --out; cells that are there are skipped. To measure one core, start it
on one: ``taskset -c 0 python experiments/speed.py ...``. A peer file holds one JSON
line per figure of another program, ``{"workload": ..., "peer": ..., "cpu_ms": ...}``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rows import add_mesh_option, append, described, mesh_of, read

import diffsamp as ds
from diffsamp import scoring, training

TARGETS = {
    "gmm25": (ds.targets.gmm25, 7.0),
    "funnel": (ds.targets.funnel_easy, 2.0),
    "manywell": (ds.targets.manywell, 2.0),
    "lgcp": (ds.targets.lgcp, 1.0),
}
GRID = tuple(TARGETS)
TARGETS |= {  # one energy in many dimensions
    f"manywell{dim}": (functools.partial(ds.targets.manywell, dim), 2.0)
    for dim in (8, 128, 512)
}
OBJECTIVES = {
    "reverse_kl": ds.objectives.reverse_kl,
    "log_variance": ds.objectives.log_variance,
    "trajectory_balance": ds.objectives.trajectory_balance,
}
# Network evaluations of an update in units of K B forward ones. Detached: to simulate,
# and forwards and twice backwards to score. Reverse KL: to simulate, again for every
# segment, again for every step, and twice backwards.
PASSES = {"reverse_kl": 5, "log_variance": 4, "trajectory_balance": 4}
GIBI, MEBI = 2**30, 2**20


# -- networks -------------------------------------------------------------------------


class PisGrad(nn.Module):
    """The network of variational_sampling_methods, as described in its paper."""

    width: int = 64

    @nn.compact
    def __call__(self, x, t, context):
        features = ds.networks.FourierFeatures(64)(t)
        time_code = nn.Dense(self.width)(nn.gelu(nn.Dense(self.width)(features)))
        hidden = jnp.concatenate([x, time_code])
        for _ in range(2):
            hidden = nn.gelu(nn.Dense(self.width)(hidden))
        zeros = nn.initializers.zeros
        drift = nn.Dense(x.shape[-1], kernel_init=zeros)(hidden)
        scale = nn.Dense(self.width)(features)
        for _ in range(2):
            scale = nn.Dense(self.width)(nn.gelu(scale))
        scale = nn.Dense(x.shape[-1], kernel_init=zeros)(scale)
        score = jnp.clip(jnp.nan_to_num(context.score), -100.0, 100.0)
        return jnp.clip(jnp.nan_to_num(drift), -1e4, 1e4) + scale * score


class SdeNetwork(nn.Module):
    """The network of sde_sampler: its score factor is one number per time."""

    width: int = 64

    @nn.compact
    def __call__(self, x, t, context):
        drift = ds.networks.FourierMLP(self.width, depth=2)(x, t, None)
        scale = nn.Dense(self.width)(ds.networks.FourierFeatures(64)(t))
        for size in (self.width, self.width, 1):
            scale = nn.Dense(size)(nn.gelu(scale))
        return drift + scale * jnp.nan_to_num(context.score)


def network_of(name, width):
    """The networks by which programs are compared; "gfn" sees no score."""
    if name == "vsm":
        return ds.networks.linen(PisGrad(width), needs_score=True)
    if name == "sde":
        return ds.networks.linen(SdeNetwork(width), needs_score=True)
    if name == "gfn":
        return ds.networks.free(width, depth=2, learn_variance=True)
    return ds.networks.score_guided(width, depth=2)


# -- what a machine can do, and what an update asks of it -----------------------------


@functools.cache
def matmul_rate():
    """Floating-point operations per second of a large float32 matrix product."""
    size = 2_048 if jax.default_backend() == "cpu" else 8_192
    a = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        multiply(a, a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def product_flops(jaxpr):
    """Operations of all matrix products of a traced function without loops."""
    total = 0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            total += product_flops(inner) if hasattr(inner, "eqns") else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * math.prod(out)
    return total


def network_flops(sampler):
    """Operations of one control evaluation: per state, and shared by a step's states.

    The embedding of time is evaluated once per step, whatever the batch.
    """
    params = jax.eval_shape(sampler.init, jax.random.key(0))

    def evaluate(params, x, t, score):
        context = ds.networks.Context(score, jnp.ones(()), None, None, jnp.ones(()))
        return sampler.generation(params["generation"], x, t, context)

    def flops(rows):
        x = jnp.zeros((rows, sampler.dim))
        score = x if sampler.generation.needs_score else x[:, :0]
        run = jax.vmap(evaluate, in_axes=(None, 0, None, 0))
        return product_flops(jax.make_jaxpr(run)(params, x, jnp.ones(()), score).jaxpr)

    per_state = flops(3) - flops(2)
    return per_state, flops(2) - 2 * per_state


# -- one cell -------------------------------------------------------------------------


def sampler_of(cell, target):
    network = network_of(cell["network"], cell["width"])
    if cell.get("bfloat16"):
        network = ds.networks.reduced_precision(network)
    scale = TARGETS[cell["target"]][1]
    return ds.samplers.pis(target.dim, cell["num_steps"], scale=scale, network=network)


def measure_updates(cell, seconds):
    """Time, memory and counts of training updates."""
    target = TARGETS[cell["target"]][0]()
    sampler, mesh = sampler_of(cell, target), mesh_of(cell.get("mesh"))
    optimizer, size = optax.adam(1e-3), cell["batch_size"]
    objective = OBJECTIVES[cell["objective"]]()

    def fit(num_updates, **options):
        return ds.fit(
            jax.random.key(0),
            sampler,
            objective,
            target.energy,
            optimizer=optimizer,
            batch_size=size,
            num_updates=num_updates,
            mesh=mesh,
            progress_bar=False,
            **options,
        )

    first = fit(1, updates_per_chunk=100)
    warm = fit(2, updates_per_chunk=100, state=first.state)
    once = (warm.seconds - warm.compile_seconds) / 2
    num = int(np.clip(seconds / 3 / once, 1, 100))
    walls, cpus = [], []
    for _ in range(3):
        cpu = time.process_time()
        run = fit(num, updates_per_chunk=100, state=warm.state)
        cpus.append((time.process_time() - cpu) / num)
        walls.append((run.seconds - run.compile_seconds) / num)
    per_state, per_step = network_flops(sampler)
    passes = PASSES[cell["objective"]]
    flops = passes * cell["num_steps"] * (size * per_state + per_step)
    calls = run.num_gradient_evaluations / num
    stored = 4 * size * (cell["num_steps"] + 1) * target.dim
    stored *= 2 if sampler.needs_score else 1
    return {
        **cell,
        "dim": target.dim,
        "compile_seconds": first.compile_seconds,
        "seconds": float(np.median(walls)),
        "best_seconds": min(walls),
        "cpu_ms": 1e3 * float(np.median(cpus)),
        "best_cpu_ms": 1e3 * min(cpus),
        "energy_gradients": calls,
        "network_flops": flops,
        "rate": flops / min(walls),
        "matmul_rate": matmul_rate(),
        "temporary_bytes": temporary_bytes(sampler, objective, target, size),
        "stored_bytes": stored,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "num_devices": 1 if mesh is None else mesh.size,
    }


def temporary_bytes(sampler, objective, target, size):
    """What one compiled update needs beside its state."""
    behaviour = ds.behaviours.on_policy()
    recipe = training.Recipe(sampler, objective, behaviour, optax.adam(1e-3), size)
    state, _ = jax.eval_shape(
        lambda key: training.init(key, recipe, target.energy), jax.random.key(0)
    )
    step = jax.jit(lambda state: training.step(recipe, state, target.energy))
    return step.lower(state).compile().memory_analysis().temp_size_in_bytes


def times_of(run, seconds):
    """Wall times of repeated calls of compiled code."""
    jax.block_until_ready(run())
    times = []
    while sum(times) < seconds or len(times) < 3:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return times


def two_passes(cell, sampler, target):
    """Simulation, and the gradient of log-variance for given paths."""
    params = sampler.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), cell["batch_size"])
    each = jax.vmap(sampler.simulate, in_axes=(None, 0, None))
    simulate = jax.jit(lambda params, keys: each(params, keys, target.energy))
    memory = cell.get("memory")

    @jax.jit
    @jax.grad
    def gradient(params, paths):
        scored, _ = scoring.score_paths(sampler, params, paths, memory_budget=memory)
        return jnp.var(scored.log_weight)

    paths = simulate(params, keys)
    first = functools.partial(simulate, params, keys)
    return params, first, functools.partial(gradient, params, paths)


def measure_profile(cell, seconds):
    """An update, its two passes, and training with a progress bar."""
    target = TARGETS[cell["target"]][0]()
    sampler, size = sampler_of(cell, target), cell["batch_size"]
    _, simulate, score = two_passes(cell, sampler, target)
    optimizer = optax.adam(1e-3)

    def fit(num_updates, progress_bar, state=None):
        run = ds.fit(
            jax.random.key(0),
            sampler,
            ds.objectives.log_variance(),
            target.energy,
            optimizer=optimizer,
            batch_size=size,
            num_updates=num_updates,
            state=state,
            progress_bar=progress_bar,
        )
        return run.state, (run.seconds - run.compile_seconds) / num_updates

    os.environ.pop("CI", None)  # bars are shown then
    state, once = fit(20, False)
    num = int(np.clip(seconds / once, 20, 500))
    plain, shown = [], []
    for _ in range(5):  # in turns, so that a busy moment falls on both
        plain.append(fit(num, False, state)[1])
        shown.append(fit(num, True, state)[1])
    return {
        **cell,
        "best_seconds": min(plain),
        "with_bar": min(shown),
        "simulate": min(times_of(simulate, seconds)),
        "score": min(times_of(score, seconds)),
        "matmul_rate": matmul_rate(),
    }


def measure_scoring(cell, seconds):
    """The second pass of log-variance alone: densities forwards and backwards."""
    target = TARGETS[cell["target"]][0]()
    sampler = sampler_of(cell, target)
    params, _, score = two_passes(cell, sampler, target)
    times, size = times_of(score, seconds), cell["batch_size"]
    memory = cell.get("memory")
    per_state, per_step = network_flops(sampler)
    flops = 3 * cell["num_steps"] * (size * per_state + per_step)
    return {
        **cell,
        "best_seconds": min(times),
        "seconds": float(np.median(times)),
        "tile": list(scoring.tile_within(sampler, params, size, memory)),
        "network_flops": flops,
        "rate": flops / min(times),
        "matmul_rate": matmul_rate(),
    }


def measure_compile(cell, seconds):
    """Seconds until the first update of a sampler with its default networks."""
    del seconds
    target, scale = TARGETS[cell["target"]][0](), TARGETS[cell["target"]][1]
    make = getattr(ds.samplers, cell["sampler"])
    sampler = make(target.dim, cell["num_steps"], scale=scale)
    fit = ds.fit(
        jax.random.key(0),
        sampler,
        OBJECTIVES[cell["objective"]](),
        target.energy,
        batch_size=cell["batch_size"],
        num_updates=1,
        progress_bar=False,
    )
    return {**cell, "compile_seconds": fit.compile_seconds}


def measure_precision(cell, seconds):
    """ELBO after as many updates in float32 and with products in bfloat16."""
    del seconds
    target, scale = TARGETS[cell["target"]][0](), TARGETS[cell["target"]][1]
    exact = ds.networks.annealed_score_guided(cell["width"])
    key, found = jax.random.key(cell["seed"]), {}
    networks = {"float32": exact, "bfloat16": ds.networks.reduced_precision(exact)}
    for name, network in networks.items():
        sampler = ds.samplers.dis(target.dim, 32, scale=scale, network=network)
        fit = ds.fit(
            jax.random.fold_in(key, 0),
            sampler,
            ds.objectives.log_variance(),
            target.energy,
            anneal=ds.schedules.cosine_anneal,
            batch_size=cell["batch_size"],
            num_updates=1_000,
            progress_bar=False,
        )
        for_draws = jax.random.fold_in(key, 1)
        draws = ds.draw(for_draws, sampler, fit.params, target.energy, 20_000)
        weights = draws.log_weight
        found |= {
            f"{name}_elbo_gap": target.log_z - draws.log_evidence.lower,
            f"{name}_elbo_error": float(np.std(weights) / math.sqrt(len(weights))),
            f"{name}_log_z_error": draws.log_evidence.estimate - target.log_z,
            f"{name}_log_z_standard_error": draws.log_evidence.standard_error,
        }
    return {**cell, **found}


def measure_draws(cell, seconds):
    """Weighted draws per second, compiled."""
    target = TARGETS[cell["target"]][0]()
    sampler, mesh = sampler_of(cell, target), mesh_of(cell.get("mesh"))
    params, num = sampler.init(jax.random.key(0)), cell["batch_size"]

    def draw(seed):
        begin = time.perf_counter()
        key = jax.random.key(seed)
        energy, options = target.energy, {"batch_size": num, "mesh": mesh}
        ds.draw(key, sampler, params, energy, num, **options)
        return time.perf_counter() - begin

    draw(0)
    times = [draw(1)]
    while sum(times) < seconds:
        times.append(draw(len(times) + 1))
    rate = num / min(times)
    return {**cell, "best_seconds": min(times), "draws_per_second": rate}


def measure_quality(cell, seconds):
    """Seconds of training until log Z and ELBO are close, or all are spent.

    Looking, every hundred updates, costs no time here. Neither measure sees a mode that
    is missing: `eubo_gap` and `mode_tv` in the end do.
    """
    factory, scale, num_steps = QUALITY[cell["target"]]
    target, key = factory(), jax.random.key(cell["seed"])
    sampler = ds.samplers.dis(target.dim, num_steps, scale=scale)
    state, spent, reached, count = None, 0.0, False, 0
    optimizer = optax.adam(cell["learning_rate"])
    while spent < seconds and not reached:
        run = ds.fit(
            jax.random.fold_in(key, 0),
            sampler,
            OBJECTIVES[cell["objective"]](),
            target.energy,
            optimizer=optimizer,
            batch_size=cell["batch_size"],
            num_updates=100,
            updates_per_chunk=100,
            state=state,
            progress_bar=False,
        )
        state, count = run.state, count + 100
        spent += run.seconds - run.compile_seconds
        for_draws = jax.random.fold_in(key, count)
        draws = ds.draw(for_draws, sampler, run.params, target.energy, 4_096)
        found = draws.log_evidence
        error, gap = found.estimate - target.log_z, target.log_z - found.lower
        reached = abs(error) < 0.1 and gap < 0.5
    report = ds.evaluate(
        jax.random.fold_in(key, 1),
        sampler,
        run.params,
        target,
        num_draws=2_000,
        sinkhorn=False,
    )
    per_path = sampler.evaluations_per_path
    calls = count * cell["batch_size"] * (per_path.energy + per_path.gradient)
    return {
        **cell,
        "reached": reached,
        "seconds": spent,
        "updates": count,
        "energies": calls,
        "log_z_error": error,
        "elbo_gap": gap,
        "eubo_gap": report.get("eubo_gap"),
        "mode_tv": report.get("mode_tv"),
        "verdict": report["verdict"],
    }


QUALITY = {  # target, reference scale, steps
    "gmm9": (ds.targets.gmm9, 3.0, 64),
    "funnel_easy": (ds.targets.funnel_easy, 2.0, 64),
    "mw54": (functools.partial(ds.targets.by_name, "mw54"), 2.0, 64),
    "manywell": (ds.targets.manywell, 1.5, 64),
}
MEASURES = {
    "updates": measure_updates,
    "scoring": measure_scoring,
    "profile": measure_profile,
    "compile": measure_compile,
    "precision": measure_precision,
    "draws": measure_draws,
    "quality": measure_quality,
}


# -- which cells ----------------------------------------------------------------------


def product(**choices):
    """All combinations, as dicts."""
    return [
        dict(zip(choices, values, strict=True))
        for values in itertools.product(*choices.values())
    ]


def cells_of(args):
    common = {"network": args.network, "width": args.width}
    if args.bfloat16:
        common["bfloat16"] = True
    if args.mesh:
        common["mesh"] = args.mesh
    if args.command == "quality":
        cells = product(
            seed=args.seeds,
            target=[name for name in QUALITY if name in args.targets],
            objective=args.objectives,
            batch_size=args.batches,
            learning_rate=args.learning_rates,
        )
        return cells
    if args.command == "updates" and args.peers:
        shape = {"num_steps": [100], "batch_size": [512], "width": [64]}
        targets = ["gmm25", "funnel", "manywell"]
        cells = product(
            target=targets,
            objective=list(OBJECTIVES),
            network=["vsm", "sde", "gfn"],
            **shape,
        )
        name = "{target} {objective} {network}"
        return [{**cell, "workload": name.format(**cell)} for cell in cells]
    if args.command == "compile":
        samplers, shape = ["pis", "dds", "dis", "gbs", "scds"], {"num_steps": 100}
        shape |= {"batch_size": 512, "target": "gmm25"}
        cells = product(sampler=samplers, objective=args.objectives)
        return [{**cell, **shape} for cell in cells]
    if args.command == "precision":
        targets, shape = ["gmm25", "manywell"], {"batch_size": 256, "width": 64}
        return [{**cell, **shape} for cell in product(seed=args.seeds, target=targets)]
    cells = product(
        target=args.targets,
        objective=args.objectives,
        num_steps=args.steps,
        batch_size=args.batches,
    )
    if args.command != "updates":
        for cell in cells:
            del cell["objective"]
        cells = [
            dict(pairs) for pairs in dict.fromkeys(tuple(c.items()) for c in cells)
        ]
    if args.command == "scoring" and args.memory:
        cells = [{**cell, "memory": m} for cell in cells for m in args.memory]
    return [{**cell, **common} for cell in cells]


def run(args):
    """Measures every cell that is not in the file yet, each in a new process."""
    rows = [row for row in read(args.out) if row["command"] == args.command]
    done = {(row["cell"], row["cores"]) for row in rows}
    cores = len(os.sched_getaffinity(0))
    for cell in cells_of(args):
        name = json.dumps(cell, sort_keys=True)
        if (name, cores) in done:
            continue
        command = [sys.executable, __file__, "cell", args.command, name]
        command += ["--seconds", str(args.seconds)]
        begin = time.perf_counter()
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            print(name, "failed:", child.stderr[-2_000:], file=sys.stderr)
            continue
        found = json.loads(child.stdout.splitlines()[-1])
        row = {"command": args.command, "cell": name, "cores": cores, **found}
        append(args.out, row)
        shown = {
            k: found[k]
            for k in ("best_cpu_ms", "best_seconds", "seconds")
            if k in found
        }
        print(name, shown, f"{time.perf_counter() - begin:.0f} s", flush=True)


def one_cell(args):
    """In a process of its own; prints the row."""
    cell = json.loads(args.cell)
    print(json.dumps(MEASURES[args.measure](cell, args.seconds)))


# -- what it says ---------------------------------------------------------------------


def table(args):
    rows = [row for file in args.files for row in read(file)]
    by_command = {name: [r for r in rows if r["command"] == name] for name in MEASURES}
    print(f"{described(rows[-1])}.\n")
    if by_command["updates"]:
        _table_of_updates([r for r in by_command["updates"] if "workload" not in r])
        _table_of_peers(
            [r for r in by_command["updates"] if "workload" in r], args.peer_file
        )
        _slopes([r for r in by_command["updates"] if "workload" not in r])
    if by_command["profile"]:
        _table_of_profiles(by_command["profile"])
    if by_command["scoring"]:
        _table_of_scoring(by_command["scoring"])
    if by_command["compile"]:
        header = ["sampler", "objective", "seconds until the first update"]
        lines = [
            (r["sampler"], r["objective"], f"{r['compile_seconds']:.0f}")
            for r in by_command["compile"]
        ]
        _print_table("Compilation", header, lines)
    if by_command["precision"]:
        _table_of_precision(by_command["precision"])
    if by_command["draws"]:
        _table_of_draws(by_command["draws"])
    if by_command["quality"]:
        _table_of_quality(by_command["quality"])


def _print_table(title, header, lines):
    print(f"## {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for line in lines:
        print("| " + " | ".join(str(entry) for entry in line) + " |")
    print()


def _table_of_updates(rows):
    header = "target objective cores K batch ms compile gradients GFLOP rate".split()
    header[-1] = "of matmul"
    header += ["temporary MiB", "over states and scores", "peak MiB"]
    _print_table(
        "Training updates",
        header,
        [
            (
                f"{r['target']}, {r['dim']}-D",
                r["objective"] + (", bfloat16" if r.get("bfloat16") else ""),
                r["cores"] if r["num_devices"] == 1 else f"{r['num_devices']} devices",
                r["num_steps"],
                r["batch_size"],
                f"{1e3 * r['best_seconds']:.0f}",
                f"{r['compile_seconds']:.0f} s",
                f"{r['energy_gradients']:.0f}",
                f"{r['network_flops'] / 1e9:.2f}",
                f"{r['rate'] / r['matmul_rate']:.0%}",
                f"{r['temporary_bytes'] / MEBI:.0f}",
                f"{r['temporary_bytes'] / r['stored_bytes']:.2f}",
                f"{r['peak_bytes'] / MEBI:.0f}",
            )
            for r in rows
        ],
    )


def _table_of_peers(rows, peer_file):
    peers = read(peer_file) if peer_file else []
    lines = []
    for row in rows:
        beside = [p for p in peers if p["workload"] == row["workload"]]
        best = min(beside, key=lambda p: p["cpu_ms"], default=None)
        ratio = "-" if best is None else f"{row['cpu_ms'] / best['cpu_ms']:.2f}"
        name = "-" if best is None else f"{best['peer']}, {best['cpu_ms']:.0f} ms"
        wall, mebi = 1e3 * row["best_seconds"], row["peak_bytes"] / MEBI
        ours = f"{row['cpu_ms']:.0f}", f"{row['best_cpu_ms']:.0f}", f"{wall:.0f}"
        entry = row["workload"], row["cores"], *ours, f"{mebi:.0f}", name, ratio
        lines.append(entry)
    if lines:
        header = "workload,cores,CPU ms,best CPU ms,best wall ms,peak MiB"
        header = [*header.split(","), "fastest peer", "ratio"]
        _print_table("Workloads of other programs", header, lines)


SCALING = {
    "num_steps": "steps K",
    "batch_size": "batch",
    "dim": "dimension",
    "num_devices": "devices",
}


def _series(rows, name):
    """Groups of rows that differ in nothing but one number: {the others: rows}."""
    same = ("family", "objective", "network", "width", "cores", *SCALING)
    same = tuple(s for s in same if s != name)
    if name == "num_devices":  # each with a core of its own
        rows = [row for row in rows if row["cores"] == row["num_devices"]]
        same = tuple(s for s in same if s != "cores")
    groups = {}
    for row in rows:
        family = row["target"].rstrip("0123456789")
        values = {**row, "family": family}
        groups.setdefault(tuple((s, values[s]) for s in same), []).append(row)
    groups = {g: sorted(m, key=lambda row: row[name]) for g, m in groups.items()}
    return {g: m for g, m in groups.items() if m[0][name] < m[-1][name]}


def _slope(members, name):
    x = np.log([m[name] for m in members])
    return np.polyfit(x, np.log([m["best_seconds"] for m in members]), 1)[0]


def _slopes(rows):
    """Log-log slopes of the time of an update."""
    lines, shown = [], ("objective", *SCALING)
    for name in SCALING:
        for group, members in _series(rows, name).items():
            values = dict(group) | {name: ", ".join(str(m[name]) for m in members)}
            cells = [values[s] for s in shown]
            slope = f"{_slope(members, name):.2f}"
            lines.append((SCALING[name], values["family"], *cells, slope))
    if lines:
        header = ["in", "target", "objective", *SCALING.values(), "slope"]
        _print_table("Growth of the time of an update", header, lines)


def _table_of_profiles(rows):
    lines = []
    for r in rows:
        rest = r["best_seconds"] - r["simulate"] - r["score"]
        parts = (r["best_seconds"], r["simulate"], r["score"], rest)
        cell = r["target"], r["width"], r["num_steps"], r["batch_size"], r["cores"]
        bar = f"{r['with_bar'] / r['best_seconds'] - 1:+.1%}"
        lines.append((*cell, *(f"{1e3 * part:.1f}" for part in parts), bar))
    header = "target,width,K,batch,cores,update ms,simulate,score,the rest,progress bar"
    _print_table("Where the time of an update goes", header.split(","), lines)


def _table_of_scoring(rows):
    _print_table(
        "The scoring pass alone",
        ["target", "width", "K", "batch", "cores", "tile", "ms", "GFLOP/s"]
        + ["of matmul"],
        [
            (
                r["target"],
                r["width"],
                r["num_steps"],
                r["batch_size"],
                r["cores"],
                "{} x {}".format(*r["tile"]),
                f"{1e3 * r['best_seconds']:.0f}",
                f"{r['rate'] / 1e9:.0f}",
                f"{r['rate'] / r['matmul_rate']:.0%}",
            )
            for r in rows
        ],
    )


def _table_of_precision(rows):
    lines = []
    for r in rows:
        gaps = [
            f"{r[n + '_elbo_gap']:.3f} ± {r[n + '_elbo_error']:.3f}"
            for n in ("float32", "bfloat16")
        ]
        errors = [
            f"{r[n + '_log_z_error']:+.3f} ± "
            + _number(r[n + "_log_z_standard_error"])  # JSON knows no infinity
            for n in ("float32", "bfloat16")
        ]
        lines.append((r["target"], r["seed"], *gaps, *errors))
    header = "target,seed,ELBO gap float32,bfloat16,log Z error float32,bfloat16"
    _print_table("Products in bfloat16", header.split(","), lines)


def _number(value):
    return "inf" if value is None else f"{value:.3f}"


def _table_of_draws(rows):
    _print_table(
        "Weighted draws",
        ["target", "K", "draws at a time", "cores", "draws per second"],
        [
            (
                r["target"],
                r["num_steps"],
                r["batch_size"],
                r["cores"],
                f"{r['draws_per_second']:,.0f}",
            )
            for r in rows
        ],
    )


def _table_of_quality(rows):
    groups = {}
    for row in rows:
        key = row["target"], row["objective"], row["batch_size"], row["learning_rate"]
        groups.setdefault(key, []).append(row)
    lines = []
    for key, members in groups.items():
        seconds = [r["seconds"] if r["reached"] else math.inf for r in members]
        energies = np.median([r["energies"] for r in members]) / 1e6
        worst = [r for r in members if r["eubo_gap"] is not None]
        eubo = f"{max(r['eubo_gap'] for r in worst):.2f}" if worst else "-"
        modes = [r["mode_tv"] for r in members if r["mode_tv"] is not None]
        lines.append(
            (
                *key,
                f"{sum(r['reached'] for r in members)} of {len(members)}",
                f"{np.median(seconds):.0f} ({max(seconds):.0f})",
                f"{energies:.1f}",
                eubo,
                f"{max(modes):.3f}" if modes else "-",
            )
        )
    header = "target,objective,batch,learning rate,reached,seconds: median (worst)"
    header = [*header.split(","), "M energies", "worst EUBO gap", "worst mode TV"]
    _print_table("Time to quality", header, lines)


def plot(args):
    """Time of an update against steps, batch, dimension and devices."""
    import matplotlib.pyplot as plt

    rows = [row for file in args.files for row in read(file)]
    rows = [r for r in rows if r["command"] == "updates" and "workload" not in r]
    usual = {"num_steps": 100, "batch_size": 512, "dim": 32, "num_devices": 1}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True)
    for axis, (name, label) in zip(axes, SCALING.items(), strict=True):
        fixed = {k: v for k, v in usual.items() if k != name}.items()
        for group, members in _series(rows, name).items():
            if fixed <= dict(group).items():
                times = [1e3 * m["best_seconds"] for m in members]
                text = f"{dict(group)['objective']}, {_slope(members, name):.2f}"
                axis.loglog([m[name] for m in members], times, "o-", label=text)
        axis.set_xlabel(label)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8, title="slope", title_fontsize=8)
    axes[0].set_ylabel("ms per update")
    figure.tight_layout()
    figure.savefig(args.folder / "speed.png", dpi=120)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    file = pathlib.Path("outputs/speed.jsonl")
    for name in MEASURES:
        one = commands.add_parser(name)
        one.add_argument("--out", type=pathlib.Path, default=file)
        seconds = 120.0 if name == "quality" else 6.0  # of training, or of measuring
        one.add_argument("--seconds", type=float, default=seconds)
        names = QUALITY if name == "quality" else TARGETS
        default = list(QUALITY if name == "quality" else GRID)
        one.add_argument("--targets", nargs="+", default=default, choices=list(names))
        objectives = list(OBJECTIVES)
        one.add_argument("--objectives", nargs="+", default=objectives)
        steps = {"draws": [1, 5, 100], "scoring": [100], "profile": [100]}
        steps = steps.get(name, [10, 100, 256])
        one.add_argument("--steps", nargs="+", type=int, default=steps)
        batches = {"draws": [100_000], "quality": [512]}.get(name, [512, 2_048])
        one.add_argument("--batches", nargs="+", type=int, default=batches)
        one.add_argument("--width", type=int, default=64)
        networks = ("guided", "vsm", "sde", "gfn")
        one.add_argument("--network", default="guided", choices=networks)
        one.add_argument("--bfloat16", action="store_true")
        if name in ("updates", "draws"):
            add_mesh_option(one)
        else:
            one.set_defaults(mesh=None)
        if name == "updates":
            one.add_argument("--peers", action="store_true")
        if name == "scoring":
            one.add_argument("--memory", nargs="+", type=int, help="bytes")
        if name in ("quality", "precision"):
            one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        if name == "quality":
            rates = [1e-3]
            one.add_argument("--learning-rates", nargs="+", type=float, default=rates)
        one.set_defaults(function=run)
    cell = commands.add_parser("cell")
    cell.add_argument("measure", choices=MEASURES)
    cell.add_argument("cell")
    cell.add_argument("--seconds", type=float, default=6.0)
    cell.set_defaults(function=one_cell)
    for name, function in (("table", table), ("plot", plot)):
        one = commands.add_parser(name)
        one.add_argument("files", nargs="*", type=pathlib.Path, default=[file])
        if name == "table":
            one.add_argument("--peer-file", type=pathlib.Path)
        else:
            one.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("."))
        one.set_defaults(function=function)
    return parser.parse_args()


def main():
    args = parse()
    args.function(args)


if __name__ == "__main__":
    main()
