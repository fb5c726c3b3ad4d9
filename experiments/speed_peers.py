"""Updates of another program, timed on the machine on which ours are.

    git clone https://github.com/DenisBless/variational_sampling_methods ../vsm
    taskset -c 0 python experiments/speed_peers.py run --checkout ../vsm
    taskset -c 0 python experiments/speed.py updates --peers
    python experiments/speed.py table --peer-file outputs/speed_peers.jsonl

The workloads `vsm` of speed.py: batches of 512, 100 steps, width 64, our densities, its
networks, losses and updates, of which it compiles the gradient alone. Its
detached losses do not run as they are: an import is missing, which is set here, and
log-variance, which unpacks three of four values, is put together from what it
simulates. Their weights are not those of its kernels, which costs as much as right ones
would.
`run` appends one JSON line per workload to --out and skips what is there.
"""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys
import time
import types

import distrax
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from rows import append, commands_of, read
from speed import GRID, TARGETS

NAME = "variational_sampling_methods"
LEAST_UPDATES, WARM_UP = 20, 3
SETTINGS = {
    "batch_size": 512,
    "step_size": 1e-3,
    "grad_clip": 1.0,
    "init_logZ": 0.0,
    "logZ_step_size": 1e-2,
}
NETWORK = {
    "num_layers": 2,
    "num_hid": 64,
    "outer_clip": 1e4,
    "inner_clip": 1e2,
    "weight_init": 1e-8,
    "bias_init": 1.0,
}
NUM_STEPS = 100
METHODS = {  # its method, and whether larger times come first in its noise schedule
    "reverse_kl": ("pis", True),
    "log_variance": ("gfn", False),
    "trajectory_balance": ("gfn", False),
}


class Density:
    """A target as the program wants it."""

    def __init__(self, target):
        self.log_prob, self.dim = lambda x: -target.energy(x), target.dim


def update_of(objective, target):
    """Its update as ``(key, state) -> state``, and the state before the first."""
    method, reverse = METHODS[objective]
    code = importlib.import_module(f"algorithms.{method}.{method}_rnd")
    shared = "algorithms.common.diffusion_related"
    schedule = importlib.import_module(f"{shared}.noise_schedule")
    init_model = importlib.import_module(f"{shared}.init_model").init_model
    vars(importlib.import_module("utils.helper"))["traverse_util"] = flax.traverse_util
    network = NETWORK | {"dim": target.dim}
    settings = types.SimpleNamespace(name=method, model=network, **SETTINGS)
    noise = schedule.get_cosine_noise_schedule(NUM_STEPS, reverse=reverse)

    def normal(x, scale):
        loc = jnp.zeros(target.dim)
        return distrax.MultivariateNormalDiag(loc, loc + scale).log_prob(x)

    def log_variance(*given):
        x, running, _, terminal = code.rnd(*given, stop_grad=True)
        return jnp.var(running + terminal), (running + terminal, x)

    losses = {"reverse_kl": "neg_elbo", "trajectory_balance": "trajectory_balance"}
    loss = log_variance
    if objective in losses:
        loss = getattr(code, losses[objective])
    gradient = jax.jit(jax.grad(loss, 2, has_aux=True), static_argnums=(3, 4, 5, 6, 7))
    fixed = SETTINGS["batch_size"], (target.dim, normal), target, NUM_STEPS, noise

    def update(key, state):
        gradients, _ = gradient(key, state, state.params, *fixed)
        return state.apply_gradients(grads=gradients)

    return update, init_model(jax.random.key(0), target.dim, settings)


def measure(objective, target, seconds):
    update, state = update_of(objective, target)
    cpus, walls = [], []
    key, begin = jax.random.key(1), time.perf_counter()
    while time.perf_counter() - begin < seconds or len(cpus) < LEAST_UPDATES + WARM_UP:
        key, own = jax.random.split(key)
        cpu, wall = time.process_time(), time.perf_counter()
        state = jax.block_until_ready(update(own, state))
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
    cpus, walls = cpus[WARM_UP:], walls[WARM_UP:]
    finite = all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
    return {
        "cpu_ms": 1e3 * float(np.median(cpus)),
        "best_cpu_ms": 1e3 * min(cpus),
        "best_ms": 1e3 * min(walls),
        "num_updates": len(cpus),
        "finite": bool(finite),
    }


def run(args):
    sys.path.insert(0, str(args.checkout))
    head = ["git", "-C", args.checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True)
    done = {row["workload"] for row in read(args.out)}
    for name in args.targets:
        target = Density(TARGETS[name][0]())
        for objective, (method, _) in METHODS.items():
            row = {"workload": f"{name} {objective} vsm"}
            if row["workload"] in done:
                continue
            row["peer"] = f"{NAME} {method.upper()}, same machine"
            row["peer_commit"] = commit.stdout.strip() or None
            row |= measure(objective, target, args.seconds)
            append(args.out, row)
            print(*row.items(), flush=True)


def main():
    parser, commands = commands_of(__doc__)
    runner = commands.add_parser("run")
    runner.add_argument("--checkout", type=pathlib.Path, required=True)
    names = [name for name in GRID if name != "lgcp"]
    runner.add_argument("--targets", nargs="+", choices=names, default=names)
    runner.add_argument("--seconds", type=float, default=10.0, help="of each workload")
    out = pathlib.Path("outputs/speed_peers.jsonl")
    runner.add_argument("--out", type=pathlib.Path, default=out)
    runner.set_defaults(do=run)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
