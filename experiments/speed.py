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
on one: ``taskset -c 0 python experiments/speed.py ...``; to make every core a device,
set XLA_FLAGS=--xla_force_host_platform_device_count=N and pass --mesh N. On a GPU,
``XLA_PYTHON_CLIENT_PREALLOCATE=false python experiments/speed.py ... --jobs 12`` has so
many cells compiled side by side, and one of them timed at a time. A peer file holds one
JSON line per figure of another program,
``{"workload": ..., "peer": ..., "cpu_ms": ...}``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rows import (
    add_mesh_option,
    described,
    dumps,
    environment,
    markdown,
    mesh_of,
    read,
    write,
)

import diffsamp as ds
from diffsamp import batching, meshes, scoring, training

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
GIBI, MEBI = 2**30, 2**20
LOCK = pathlib.Path(tempfile.gettempdir()) / "diffsamp_speed.lock"


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
def large_product():
    """A large float32 matrix product to run, compiled, and its number of operations."""
    size = 2_048 if jax.default_backend() == "cpu" else 8_192
    a = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    run = functools.partial(multiply, a, a)
    jax.block_until_ready(run())
    return run, 2 * size**3


def matmul_rate():
    """Floating-point operations per second of a large float32 matrix product."""
    run, flops = large_product()
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - begin)
    return flops / best


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


@contextlib.contextmanager
def alone():
    """While no other process of this run is in here."""
    large_product()
    with open(LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def peak_bytes():
    """Of the device's memory, or where that is the host's, of the process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def passes_of(cell, sampler):
    """Network evaluations of an update in units of K B forward ones.

    Detached: to simulate, and forwards and twice backwards to score. Reverse KL: to
    simulate, again for every step, and twice backwards; where the states of a batch are
    too many to be kept, once more for every segment.
    """
    if cell["objective"] != "reverse_kl":
        return 4
    size = cell["batch_size"] // (cell.get("mesh") or 1)
    return 4 if training.keeps_states(sampler, size) else 5


def sampler_of(cell, target, make=ds.samplers.pis):
    network = network_of(cell["network"], cell["width"])
    if cell.get("bfloat16"):
        network = ds.networks.reduced_precision(network)
    scale = TARGETS[cell["target"]][1]
    return make(target.dim, cell["num_steps"], scale=scale, network=network)


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

    first = warm = fit(1, updates_per_chunk=100)
    needed, peak = None, peak_bytes()
    if not cell.get("no_memory"):  # which is another compilation
        needed = temporary_bytes(sampler, objective, target, size)
    once, repeats = first.seconds - first.compile_seconds, 1
    if once < seconds:  # else one more run, of one update, says enough
        warm, repeats = fit(2, updates_per_chunk=100, state=first.state), 3
        once = (warm.seconds - warm.compile_seconds) / 2
    num = int(np.clip(seconds / 3 / once, 1, 100))
    walls, cpus = [], []
    with alone():
        rate = matmul_rate()
        for _ in range(repeats):
            cpu = time.process_time()
            run = fit(num, updates_per_chunk=100, state=warm.state)
            cpus.append((time.process_time() - cpu) / num)
            walls.append((run.seconds - run.compile_seconds) / num)
    per_state, per_step = network_flops(sampler)
    flops = passes_of(cell, sampler) * cell["num_steps"] * (size * per_state + per_step)
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
        "matmul_rate": rate,
        "temporary_bytes": needed,
        "stored_bytes": stored,
        "peak_bytes": peak,
        "repeats": repeats,
        "num_devices": 1 if mesh is None else mesh.size,
    }


def update_of(sampler, objective, target, size, mesh=None):
    """One update as a function of its state, and the state before the first."""
    behaviour, optimizer = ds.behaviours.on_policy(), optax.adam(1e-3)
    parts = sampler, objective, behaviour, optimizer, size
    recipe = training.Recipe(*parts, mesh=mesh)

    def start(key):
        return training.init(key, recipe, target.energy)[0]

    return lambda state: training.step(recipe, state, target.energy), start


def temporary_bytes(sampler, objective, target, size):
    """What one compiled update needs beside its state."""
    update, start = update_of(sampler, objective, target, size)
    state = jax.eval_shape(start, jax.random.key(0))
    compiled = jax.jit(update).lower(state).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def times_of(seconds, *runs):
    """Wall times of calls of compiled code, made in turns: a list for each."""
    for run in runs:
        jax.block_until_ready(run())
    times = [[] for _ in runs]
    while sum(map(sum, times)) < seconds * len(runs) or len(times[0]) < 3:
        for run, own in zip(runs, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            own.append(time.perf_counter() - begin)
    return times


def two_passes(cell, sampler, target, mesh):
    """Simulation, and the gradient of log-variance for given paths."""
    params = meshes.put_everywhere(mesh, sampler.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), cell["batch_size"])
    each = jax.vmap(sampler.simulate, in_axes=(None, 0, None))
    options = {"memory_budget": cell.get("memory"), "mesh": mesh}

    @jax.jit
    def simulate(params, keys):
        return each(params, meshes.spread(mesh, keys), target.energy)

    @jax.jit
    @jax.grad
    def gradient(params, paths):
        scored, _ = scoring.score_paths(sampler, params, paths, **options)
        return jnp.var(scored.log_weight)

    paths = simulate(params, keys)
    first = functools.partial(simulate, params, keys)
    return params, first, functools.partial(gradient, params, paths)


def measure_profile(cell, seconds):
    """An update, its two passes, its metrics, and training with a progress bar."""
    target = TARGETS[cell["target"]][0]()
    sampler, size = sampler_of(cell, target), cell["batch_size"]
    mesh = meshes.as_mesh(mesh_of(cell.get("mesh")))
    _, simulate, score = two_passes(cell, sampler, target, mesh)
    objective, optimizer = ds.objectives.log_variance(), optax.adam(1e-3)

    def fit(num_updates, progress_bar, state=None):
        run = ds.fit(
            jax.random.key(0),
            sampler,
            objective,
            target.energy,
            optimizer=optimizer,
            batch_size=size,
            num_updates=num_updates,
            state=state,
            mesh=mesh,
            progress_bar=progress_bar,
        )
        return run.state, (run.seconds - run.compile_seconds) / num_updates

    os.environ.pop("CI", None)  # bars are shown then
    state, once = fit(20, False)
    num = int(np.clip(seconds / once, 20, 500))
    update, start = update_of(sampler, objective, target, size, mesh)
    first = meshes.put_everywhere(mesh, start(jax.random.key(0)))
    whole = functools.partial(jax.jit(update), first)
    # What is not returned is not computed.
    bare = functools.partial(jax.jit(lambda state: update(state)[0]), first)
    jax.block_until_ready([run() for run in (whole, bare, simulate, score)])
    plain, shown = [], []
    with alone():
        for _ in range(5):  # in turns, so that a busy moment falls on both
            plain.append(fit(num, False, state)[1])
            shown.append(fit(num, True, state)[1])
        parts = map(np.median, times_of(seconds, whole, bare, simulate, score))
        with_metrics, without_metrics, simulation, scoring_pass = map(float, parts)
        rate = matmul_rate()
    return {
        **cell,
        "seconds": float(np.median(plain)),
        "with_bar": float(np.median(shown)),
        "with_metrics": with_metrics,
        "without_metrics": without_metrics,
        "simulate": simulation,
        "score": scoring_pass,
        "matmul_rate": rate,
    }


def measure_scoring(cell, seconds):
    """The second pass of log-variance alone: densities forwards and backwards."""
    target = TARGETS[cell["target"]][0]()
    sampler, size = sampler_of(cell, target), cell["batch_size"]
    mesh = meshes.as_mesh(mesh_of(cell.get("mesh")))
    params, _, score = two_passes(cell, sampler, target, mesh)
    jax.block_until_ready(score())
    with alone():
        (times,), rate = times_of(seconds, score), matmul_rate()
    memory = cell.get("memory")
    rows = size // (1 if mesh is None else mesh.size)
    per_state, per_step = network_flops(sampler)
    flops = 3 * cell["num_steps"] * (size * per_state + per_step)
    return {
        **cell,
        "best_seconds": min(times),
        "seconds": float(np.median(times)),
        "tile": list(scoring.tile_within(sampler, params, rows, memory)),
        "network_flops": flops,
        "rate": flops / min(times),
        "matmul_rate": rate,
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
        mesh=mesh_of(cell.get("mesh")),
        progress_bar=False,
    )
    return {**cell, "compile_seconds": fit.compile_seconds}


def measure_precision(cell, seconds):
    """ELBO after as many updates in float32 and with products in bfloat16."""
    del seconds
    target, scale = TARGETS[cell["target"]][0](), TARGETS[cell["target"]][1]
    exact = ds.networks.annealed_score_guided(cell["width"])
    key, found = jax.random.key(cell["seed"]), {}
    mesh = mesh_of(cell.get("mesh"))
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
            mesh=mesh,
            progress_bar=False,
        )
        for_draws = jax.random.fold_in(key, 1), sampler, fit.params
        draws = ds.draw(*for_draws, target.energy, 20_000, mesh=mesh)
        weights = draws.log_weight
        found |= {
            f"{name}_elbo_gap": target.log_z - draws.log_evidence.lower,
            f"{name}_elbo_error": float(np.std(weights) / math.sqrt(len(weights))),
            f"{name}_log_z_error": draws.log_evidence.estimate - target.log_z,
            f"{name}_log_z_standard_error": draws.log_evidence.standard_error,
        }
    return {**cell, **found}


def measure_draws(cell, seconds):
    """Weighted draws per second, compiled: as they are, and judged by `ds.draw`.

    Of a sampler that starts from a normal: where all start in one point, the network's
    first call is one for all of them.
    """
    target = TARGETS[cell["target"]][0]()
    sampler = sampler_of(cell, target, ds.samplers.dis)
    mesh = mesh_of(cell.get("mesh"))
    params, num = sampler.init(jax.random.key(0)), cell["batch_size"]
    keys = (jax.random.key(seed) for seed in itertools.count())
    parts, options = (sampler, params, target.energy, num), {"batch_size": num}

    def bare():
        return batching.draw_final(
            next(keys), *parts, **options, mesh=meshes.as_mesh(mesh)
        )

    def judged():
        return ds.draw(next(keys), *parts, **options, mesh=mesh).x

    jax.block_until_ready([judged(), bare()])  # compiled
    with alone():
        times, of_judged = map(min, times_of(seconds, bare, judged))
    return {
        **cell,
        "best_seconds": times,
        "judged_seconds": of_judged,
        "draws_per_second": num / times,
    }


def measure_quality(cell, seconds):
    """Seconds of training until log Z and ELBO are close, or all are spent.

    Looking, every hundred updates, costs no time here. Neither measure sees a mode that
    is missing: `eubo_gap` and `mode_tv` in the end do. Where training diverges, the
    last look counts.
    """
    factory, options = QUALITY[cell["target"]]
    target, key = factory(), jax.random.key(cell["seed"])
    sampler = ds.samplers.dis(target.dim, **options)
    optimizer, mesh = optax.adam(cell["learning_rate"]), mesh_of(cell.get("mesh"))
    params = state = error = gap = None
    spent, reached, diverged, report = 0.0, False, False, {}
    while spent < seconds and not (reached or diverged):
        try:
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
                mesh=mesh,
                progress_bar=False,
            )
        except ds.TrainingDiverged as exception:
            run, diverged = exception.fit_result, True
        state, count = run.state, int(run.state.count)
        spent += run.seconds - run.compile_seconds
        if not diverged:
            params, for_draws = run.params, jax.random.fold_in(key, count)
            look = for_draws, sampler, params, target.energy, 4_096
            found = ds.draw(*look, mesh=mesh).log_evidence
            error, gap = found.estimate - target.log_z, target.log_z - found.lower
            reached = abs(error) < 0.1 and gap < 0.5
    if params is not None:
        report = ds.evaluate(
            jax.random.fold_in(key, 1),
            sampler,
            params,
            target,
            num_draws=2_000,
            sinkhorn=False,
            mesh=mesh,
        )
    per_path = sampler.evaluations_per_path
    calls = count * cell["batch_size"] * (per_path.energy + per_path.gradient)
    return {
        **cell,
        "reached": reached,
        "diverged": diverged,
        "seconds": spent,
        "updates": count,
        "energies": calls,
        "log_z_error": error,
        "elbo_gap": gap,
        "eubo_gap": report.get("eubo_gap"),
        "mode_tv": report.get("mode_tv"),
        "verdict": report.get("verdict"),
    }


WELLS = {  # equal functions of many coordinates
    "num_steps": 32,
    "schedule": ds.schedules.geometric(0.1),
    "network": ds.networks.coordinatewise(16, learn_variance=True),
}
QUALITY = {  # target, and its sampler
    "gmm9": (ds.targets.gmm9, {"num_steps": 64, "scale": 3.0}),
    "funnel_easy": (ds.targets.funnel_easy, {"num_steps": 64, "scale": 2.0}),
    "mw54": (functools.partial(ds.targets.by_name, "mw54"), {"scale": 2.0, **WELLS}),
    "manywell": (ds.targets.manywell, {"scale": 1.6, **WELLS}),
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
    cells = _cells_of(args)
    return cells if args.mesh is None else [{**c, "mesh": args.mesh} for c in cells]


def _cells_of(args):
    if args.command == "quality":
        return product(
            seed=args.seeds,
            target=args.targets,
            objective=args.objectives,
            batch_size=args.batches,
            learning_rate=args.learning_rates,
        )
    if args.command == "updates" and args.peers:
        shape = {"num_steps": [100], "batch_size": [512], "width": [64]}
        targets = ["gmm25", "funnel", "manywell"]
        networks = ["vsm", "sde", "gfn"]
        cells = product(
            network=networks, target=targets, objective=list(OBJECTIVES), **shape
        )
        name = "{target} {objective} {network}"
        return [{**cell, "workload": name.format(**cell)} for cell in cells]
    if args.command == "compile":
        steps = dict.fromkeys(["pis", "dds", "dis", "gbs", "scds"], 100) | {"cdds": 1}
        shape = {"batch_size": 512, "target": "gmm25"}
        cells = product(sampler=list(steps), objective=args.objectives)
        return [{**c, "num_steps": steps[c["sampler"]], **shape} for c in cells]
    if args.command == "precision":
        targets, shape = ["gmm25", "manywell"], {"batch_size": 256, "width": 64}
        return [{**cell, **shape} for cell in product(seed=args.seeds, target=targets)]
    choices = {"target": args.targets}
    if args.command == "updates":
        choices["objective"] = args.objectives
    choices |= {"num_steps": args.steps, "batch_size": args.batches}
    if args.command == "scoring" and args.memory:
        choices["memory"] = args.memory
    common = {"network": args.network, "width": args.width}
    if args.bfloat16:
        common["bfloat16"] = True
    if args.command == "updates" and args.no_memory:
        common["no_memory"] = True
    return [{**cell, **common} for cell in product(**choices)]


def run(args):
    """Measures every cell that is not in the file yet, each in a new process."""
    mesh_of(args.mesh)  # before the work, if there are too few devices
    rows = [row for row in read(args.out) if row["command"] == args.command]
    done = {(row["cell"], row["cores"]) for row in rows}
    cores = len(os.sched_getaffinity(0))
    names = [json.dumps(cell, sort_keys=True) for cell in cells_of(args)]

    def measure(name):
        command = [sys.executable, __file__, "cell", args.command, name]
        if "seconds" in args:
            command += ["--seconds", str(args.seconds)]
        begin = time.perf_counter()
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            print(name, "failed:", child.stderr[-2_000:], file=sys.stderr)
            return
        found = json.loads(child.stdout.splitlines()[-1])
        write(args.out, {"command": args.command, "cell": name, "cores": cores} | found)
        shown = {
            k: found[k]
            for k in ("best_cpu_ms", "best_seconds", "seconds")
            if k in found
        }
        print(name, shown, f"{time.perf_counter() - begin:.0f} s", flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(measure, [name for name in names if (name, cores) not in done]))


def one_cell(args):
    """In a process of its own; prints the row, with the environment it was made in."""
    cell = json.loads(args.cell)
    flags = {"xla_flags": os.environ.get("XLA_FLAGS", "")}
    print(dumps(MEASURES[args.measure](cell, args.seconds) | flags | environment()))


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
        header = ["sampler", "objective", "cores", "seconds until the first update"]
        lines = [
            (r["sampler"], r["objective"], _cores(r), f"{r['compile_seconds']:.0f}")
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
    print("\n".join([f"## {title}", "", *markdown(header, lines), ""]))


ONCE = " (one run)"  # after the times of slow updates, which are not repeated
UNUSUAL = {  # what is usual, and how a table names anything else
    "network": ("guided", "{} network"),
    "width": (64, "width {}"),
    "bfloat16": (False, "bfloat16"),
    "cores": (1, "{} cores"),
}


def _unusual(row, *names):
    """What is not as usual in a row, to follow its target: ", width 128"."""
    names = [name for name in names if name != "cores" or _is_cpu(row)]
    found = [(row.get(name, UNUSUAL[name][0]), *UNUSUAL[name]) for name in names]
    return "".join(", " + form.format(v) for v, usual, form in found if v != usual)


def _is_cpu(row):
    return row.get("device", "cpu").startswith("cpu")


def _cores(row):
    """Cores, or devices where there are several, or what is no CPU."""
    if row.get("mesh", 1) > 1:
        return f"{row['mesh']} devices"
    return row["cores"] if _is_cpu(row) else row["device"].split(",")[0]


def _table_of_updates(rows):
    header = "target objective cores K batch ms compile gradients GFLOP rate".split()
    header[-1] = "of matmul"
    header += ["temporary MiB", "over states and scores", "peak MiB"]
    _print_table(
        "Training updates",
        header,
        [
            (
                f"{r['target']}, {r['dim']}-D"
                + _unusual(r, "network", "width", "bfloat16"),
                r["objective"],
                _cores(r),
                r["num_steps"],
                r["batch_size"],
                f"{1e3 * r['best_seconds']:.0f}" + ONCE * (r["repeats"] == 1),
                f"{r['compile_seconds']:.0f} s",
                f"{r['energy_gradients']:.0f}",
                f"{r['network_flops'] / 1e9:.2f}",
                f"{r['rate'] / r['matmul_rate']:.0%}",
                *_memory(r),
                f"{r['peak_bytes'] / MEBI:.0f}",
            )
            for r in rows
        ],
    )


def _memory(row):
    """Temporary memory in MiB, and over that of states and scores."""
    needed = row["temporary_bytes"]
    if needed is None:
        return "-", "-"
    return f"{needed / MEBI:.0f}", f"{needed / row['stored_bytes']:.2f}"


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
        entry = row["workload"], _cores(row), *ours, f"{mebi:.0f}", name, ratio
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
    same = ("family", "objective", "device", *UNUSUAL, *SCALING)
    same = tuple(s for s in same if s != name)
    if name == "num_devices":  # each with a core of its own
        rows = [row for row in rows if row["cores"] == row["num_devices"]]
        same = tuple(s for s in same if s != "cores")
    groups = {}
    for row in rows:
        family = row["target"].rstrip("0123456789")
        values = {"bfloat16": False, "device": "cpu", **row, "family": family}
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
            target = values["family"] + _unusual(values, *UNUSUAL)
            lines.append((SCALING[name], target, *cells, slope))
    if lines:
        header = ["in", "target", "objective", *SCALING.values(), "slope"]
        _print_table("Growth of the time of an update", header, lines)


def _table_of_profiles(rows):
    lines = []
    for r in rows:
        whole = r.get("seconds", r.get("best_seconds"))  # older rows have best times
        parts = (whole, r["simulate"], r["score"], whole - r["simulate"] - r["score"])
        target = r["target"] + _unusual(r, "network", "bfloat16")
        cell = target, r["width"], r["num_steps"], r["batch_size"], _cores(r)
        bar, metrics = f"{r['with_bar'] / whole - 1:+.1%}", "-"
        if "with_metrics" in r:
            metrics = f"{r['with_metrics'] / r['without_metrics'] - 1:+.1%}"
        lines.append((*cell, *(f"{1e3 * part:.1f}" for part in parts), metrics, bar))
    header = "target,width,K,batch,cores,update ms,simulate,score,the rest"
    header = [*header.split(","), "metrics", "progress bar"]
    _print_table("Where the time of an update goes", header, lines)


def _table_of_scoring(rows):
    _print_table(
        "The scoring pass alone",
        ["target", "width", "K", "batch", "cores", "tile", "ms", "GFLOP/s"]
        + ["of matmul"],
        [
            (
                r["target"] + _unusual(r, "network", "bfloat16"),
                r["width"],
                r["num_steps"],
                r["batch_size"],
                _cores(r),
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
        ["target", "K", "draws at a time", "cores", "draws per second", "ms", "judged"],
        [
            (
                r["target"] + _unusual(r, "network", "width", "bfloat16"),
                r["num_steps"],
                r["batch_size"],
                _cores(r),
                f"{r['draws_per_second']:,.0f}",
                f"{1e3 * r['best_seconds']:.1f}",
                f"{1e3 * r['judged_seconds']:.1f}",
            )
            for r in rows
        ],
    )


def _table_of_quality(rows):
    groups = {}
    for row in rows:
        names = "target", "objective", "batch_size", "learning_rate"
        key = (*(row[name] for name in names), _cores(row))
        groups.setdefault(key, []).append(row)
    lines = []
    for key, members in groups.items():
        good = [r for r in members if r["reached"]]
        diverged = sum(r.get("diverged", False) for r in members)
        count = f"{len(good)} of {len(members)}"
        seconds = [r["seconds"] if r["reached"] else math.inf for r in members]
        energies = [r["energies"] / 1e6 for r in good]
        eubo = [r["eubo_gap"] for r in members if r["eubo_gap"] is not None]
        modes = [r["mode_tv"] for r in members if r["mode_tv"] is not None]
        lines.append(
            (
                *key,
                count + (f", {diverged} diverged" if diverged else ""),
                sum((r.get("verdict") or "").startswith("trust") for r in members),
                f"{np.median(seconds):.0f} ({max(seconds):.0f})",
                f"{np.median(energies):.1f}" if energies else "-",
                f"{max(eubo):.2f}" if eubo else "-",
                f"{max(modes):.3f}" if modes else "-",
            )
        )
    header = "target,objective,batch,learning rate,cores,reached"
    header = [*header.split(","), "trust", "seconds: median (worst)", "M energies"]
    header += ["worst EUBO gap", "worst mode TV"]
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
                values, slope = dict(group), f"{_slope(members, name):.2f}"
                text = f"{values['objective']}{_unusual(values, *UNUSUAL)}, {slope}"
                axis.loglog([m[name] for m in members], times, "o-", label=text)
        axis.set_xlabel(label)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8, title="slope", title_fontsize=8)
    axes[0].set_ylabel("ms per update")
    figure.tight_layout()
    figure.savefig(args.folder / "speed.png", dpi=120)


MANY_INTS = {"nargs": "+", "type": int}
FLAG = {"action": "store_true"}
FORMS = {  # of options
    "targets": {"nargs": "+"},
    "objectives": {"nargs": "+", "choices": list(OBJECTIVES)},
    "steps": MANY_INTS,
    "batches": MANY_INTS,
    "seeds": MANY_INTS,
    "learning_rates": {"nargs": "+", "type": float},
    "memory": {**MANY_INTS, "help": "bytes"},
    "network": {"choices": ("guided", "vsm", "sde", "gfn")},
    "width": {"type": int},
    "bfloat16": FLAG,
    "peers": FLAG,
    "no_memory": {**FLAG, "help": "save the compilation that tells what it takes"},
    "seconds": {"type": float, "help": "of training, or of measuring"},
}
SHAPES = {
    **{"targets": GRID, "steps": (10, 100, 256), "batches": (512, 2_048)},
    **{"network": "guided", "width": 64, "bfloat16": False, "seconds": 6.0},
}
OPTIONS = {  # of every command beside --out and --mesh, and what they are by default
    "updates": {**SHAPES, "objectives": tuple(OBJECTIVES)}
    | {"peers": False, "no_memory": False},
    "scoring": {**SHAPES, "steps": (100,), "memory": None},
    "profile": {**SHAPES, "steps": (100,)},
    "compile": {"objectives": tuple(OBJECTIVES)},
    "precision": {"seeds": (0, 1, 2)},
    "draws": {**SHAPES, "steps": (1, 5, 100), "batches": (100_000,)},
    "quality": {
        **{"targets": tuple(QUALITY), "objectives": tuple(OBJECTIVES)},
        **{"batches": (512,), "learning_rates": (1e-3,), "seeds": (0, 1, 2)},
        "seconds": 120.0,
    },
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    file = pathlib.Path("outputs/speed.jsonl")
    for name, options in OPTIONS.items():
        one = commands.add_parser(name)
        one.add_argument("--out", type=pathlib.Path, default=file)
        one.add_argument("--jobs", type=int, default=1, help="cells at a time")
        add_mesh_option(one)
        for option in options:
            form = FORMS[option]
            if option == "targets":
                form = {**form, "choices": QUALITY if name == "quality" else TARGETS}
            flag = "--" + option.replace("_", "-")
            one.add_argument(flag, default=None, **form)  # None says: not given
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
    args = parser.parse_args()
    options = OPTIONS.get(args.command, {})
    given = [option for option in options if getattr(args, option) is not None]
    refused = [option for option in given if option not in ("peers", "seconds")]
    if "peers" in given and refused:
        flags = ", ".join("--" + option for option in refused)
        parser.error(f"--peers has workloads of its own; leave out {flags}")
    for option in options.keys() - set(given):
        setattr(args, option, options[option])
    return args


def main():
    args = parse()
    args.function(args)


if __name__ == "__main__":
    main()
