"""DiffusionSampler on posteriors with known answers, default settings, beside NUTS.

    python experiments/numpyro_posteriors.py run     # about 6 minutes a posterior, seed
    python experiments/numpyro_posteriors.py table > docs/benchmarks/numpyro.md

Every number of the table is from `run`. A posterior is won when every parameter's mean
is within 0.1 reference standard deviations, its standard deviation within 10 %, k-hat
below 0.7 and, where it is known, log Z within 0.1 and three standard errors. The
verdict is given before the comparison is made.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import HMC, MCMC, NUTS
from rows import add_mesh_option, append, described, mesh_of, read

import diffsamp as ds
from diffsamp import posteriors
from diffsamp.numpyro import DiffusionSampler

MEAN, SD, LOG_Z, MODE = 0.1, 0.1, 0.1, 0.05
NUM_SAMPLES = 4_000
NUM_CHAINS, CHAIN_DRAWS = 4, 1_000


class Compilation:
    """Seconds that XLA spent on compiling so far; tracing, a few seconds, is not."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            self.seconds += seconds


def errors(posterior, sites, log_weight=None):
    """Worst errors of means and standard deviations in reference sds, what misses."""
    worst, misses = {"mean": 0.0, "sd": 0.0}, []
    flat = posterior.flatten(sites)
    for name, reference in posterior.reference()["parameters"].items():
        values = np.asarray(flat[name], np.float64)[:, None]
        mean, sd = (float(v[0]) for v in ds.metrics.moments(values, log_weight))
        found = {
            "mean": abs(mean - reference["mean"]) / reference["sd"],
            "sd": abs(sd / reference["sd"] - 1),
        }
        worst = {kind: max(worst[kind], found[kind]) for kind in worst}
        if not (found["mean"] <= MEAN and found["sd"] <= SD):
            misses.append(name)
    return {"mean_error": worst["mean"], "sd_error": worst["sd"], "misses": misses}


def mode_error(posterior, x, log_weight=None):
    if posterior.modes is None:
        return None
    weights = ds.metrics.mode_weights(x, posterior.modes, log_weight)
    return float(np.max(np.abs(weights - np.asarray(posterior.modes.weights))))


def run_sampler(posterior, seed, seconds, compilation, mesh):
    """The result of `DiffusionSampler` with default settings."""
    begin, before = time.perf_counter(), compilation.seconds
    inference = DiffusionSampler(posterior.model, max_seconds=seconds, mesh=mesh)
    key = jax.random.key(seed)
    inference.run(key, NUM_SAMPLES, progress_bar=False, **posterior.data())
    row = {
        "seconds": time.perf_counter() - begin,
        "compile_seconds": compilation.seconds - before,
    }
    report, state = inference.diagnostics, inference.state
    row |= {
        "verdict": report.verdict,
        "ess": report.ess_fraction,
        "pareto_k": report.pareto_k,
        "energies": report.num_energy_evaluations,
        "gradients": report.num_gradient_evaluations,
        "pilot_gradients": state.pilot.num_gradient_evaluations,
        "pilot_name": state.pilot.name,
    }
    sites, log_weight = inference.get_weighted_samples()
    row |= errors(posterior, sites, log_weight)
    affine = state.target.affine
    row["mode_error"] = mode_error(
        posterior, jax.vmap(affine.forward)(jnp.asarray(inference.draws.x)), log_weight
    )
    if posterior.log_evidence is not None:
        evidence = inference.draws.log_evidence
        row["log_z_error"] = evidence.estimate - posterior.log_evidence
        row["log_z_standard_error"] = evidence.standard_error
    # The same questions, asked of the points that it was trained on.
    pilot = jax.jit(jax.vmap(state.target.constrain))(state.pilot.x)
    row |= {f"pilot_{k}": v for k, v in errors(posterior, pilot).items()}
    row["pilot_mode_error"] = mode_error(
        posterior, jax.vmap(affine.forward)(state.pilot.x)
    )
    return inference, row


def run_chains(kernel, posterior, target, key, fields, num_warmup, compilation):
    """Four chains: their draws and what they cost and show."""
    begin, before = time.perf_counter(), compilation.seconds
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=CHAIN_DRAWS,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    gradients = 0
    if num_warmup and "num_steps" in fields:
        mcmc.warmup(
            key, collect_warmup=True, extra_fields=("num_steps",), **posterior.data()
        )
        gradients = int(mcmc.get_extra_fields()["num_steps"].sum())
        key = mcmc.post_warmup_state.rng_key
    mcmc.run(key, extra_fields=fields, **posterior.data())
    found = mcmc.get_extra_fields(group_by_chain=True)
    seconds = time.perf_counter() - begin
    sites = mcmc.get_samples(group_by_chain=True)
    latent = {name: sites[name] for name in target.site_names}
    x = jax.jit(jax.vmap(jax.vmap(target.unconstrain)))(latent)
    flat = {name: np.asarray(v).reshape(-1, *v.shape[2:]) for name, v in sites.items()}
    row = {
        "seconds": seconds,
        "compile_seconds": compilation.seconds - before,
        "max_rhat": float(np.max(split_gelman_rubin(np.asarray(x)))),
        "mode_error": mode_error(posterior, x.reshape(-1, target.dim)),
    }
    row |= errors(posterior, flat)
    if "num_steps" in found:  # a gradient each
        row["gradients"] = gradients + int(found["num_steps"].sum())
        row["divergences"] = int(found["diverging"].sum())
    if "accept_prob" in found:
        row["accept_prob"] = float(found["accept_prob"].mean())
    if posterior.modes is not None:
        index = np.asarray(jax.vmap(jax.vmap(posterior.modes.assign))(x))
        row["jumps_per_1000"] = 1_000 * float(np.mean(np.diff(index, axis=1) != 0))
    return row


def run(args):
    compilation = Compilation()
    done = {(row["name"], row["seed"]) for row in read(args.out)}
    for seed in args.seeds:
        for name in args.names:
            if (name, seed) in done:
                continue
            posterior = posteriors.by_name(name)
            jax.config.update("jax_enable_x64", posterior.x64)
            jax.clear_caches()  # the next one's compilation is its own
            target = posterior.target()
            inference, sampler = run_sampler(
                posterior, seed, args.seconds, compilation, mesh_of(args.mesh)
            )
            for_nuts, for_kernel = jax.random.split(jax.random.key(1_000 + seed))
            options = {"compilation": compilation, "num_warmup": 1_000}
            nuts = run_chains(
                NUTS(posterior.model),
                posterior,
                target,
                for_nuts,
                ("num_steps", "diverging"),
                **options,
            )
            row = {"name": name, "seed": seed, "sampler": sampler, "nuts": nuts}
            local = None
            if not sampler["verdict"].startswith("trust"):
                local = HMC(posterior.model, trajectory_length=1.0)
            kernel = inference.kernel(num_proposals=8, local_kernel=local)
            row["kernel"] = run_chains(
                kernel,
                posterior,
                target,
                for_kernel,
                ("accept_prob",),
                **options,
            )
            append(args.out, row)
            print(name, seed, sampler["verdict"][:60], sampler["misses"], flush=True)


def won(row):
    """Whether the sampler's answer is right, within the limits above."""
    good = not row["misses"] and row["pareto_k"] < 0.7
    if row.get("log_z_error") is not None:
        error = row["log_z_error"]
        good &= abs(error) <= LOG_Z and abs(error) <= 3 * row["log_z_standard_error"]
    if row.get("mode_error") is not None:
        good &= row["mode_error"] <= MODE
    return bool(good)


def spread(rows, kind, name, form="{:.3f}"):
    """Mean and worst of an absolute value over seeds."""
    values = [row[kind].get(name) for row in rows]
    if any(v is None for v in values):
        return "-"
    values = np.abs(np.array(values, float))
    return f"{form.format(values.mean())} ({form.format(values.max())})"


def table(args):
    rows = read(args.out)
    names = sorted({row["name"] for row in rows})
    groups = {n: [row for row in rows if row["name"] == n] for n in names}
    seeds = sorted({row["seed"] for row in rows})
    count = sum(len(g) for g in groups.values())
    trusted = [row for row in rows if row["sampler"]["verdict"].startswith("trust")]
    wrong = [row for row in trusted if not won(row["sampler"])]
    print("# Posteriors with known answers\n")
    print(
        "`DiffusionSampler` with default settings on all posteriors of\n"
        "`diffsamp.posteriors`, the verdict given before the comparison. Made by\n"
        "`python experiments/numpyro_posteriors.py run` and `table`; seeds "
        f"{', '.join(map(str, seeds))};\n{described(rows[0])}.\n"
    )
    print(
        f"Of {count} runs {len(trusted)} earn `trust`; {len(wrong)} of these miss a "
        "limit: "
        + (", ".join(f"{r['name']} (seed {r['seed']})" for r in wrong) or "-")
        + ".\n"
    )
    print(
        "Errors are the worst of all parameters, of means in reference standard\n"
        "deviations (limit 0.1) and of standard deviations (0.1); mean over seeds and, "
        "in\nbrackets, the worst seed.\n"
    )
    header = (
        "posterior", "trust", "right", "mean", "sd", "log Z", "mode weight",
        "ESS", "k-hat",
    )  # fmt: skip
    _head(header)
    for name, group in groups.items():
        own = [row["sampler"] for row in group]
        cells = [
            f"{sum(r['verdict'].startswith('trust') for r in own)}/{len(own)}",
            f"{sum(map(won, own))}/{len(own)}",
            *(
                spread(group, "sampler", key)
                for key in ("mean_error", "sd_error", "log_z_error", "mode_error")
            ),
            spread(group, "sampler", "ess", "{:.2f}"),
            spread(group, "sampler", "pareto_k", "{:.2f}"),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n## Cost, and NUTS beside it\n")
    print(
        "Seconds without compilation, and compilation; gradients of pilots, training "
        "and\njudging together (energies without gradient in brackets). NUTS: 4 "
        "chains of 1,000 draws\nafter 1,000 of warm-up, on the same machine.\n"
    )
    _head((
        "posterior", "seconds", "compilation", "gradients", "NUTS seconds",
        "compilation", "gradients", "R-hat", "mean", "sd", "mode weight",
    ))  # fmt: skip
    for name, group in groups.items():
        cells = []
        for kind in ("sampler", "nuts"):
            run_time = [r[kind]["seconds"] - r[kind]["compile_seconds"] for r in group]
            compile_time = [r[kind]["compile_seconds"] for r in group]
            gradients = np.mean([r[kind]["gradients"] for r in group])
            cells += [f"{np.mean(run_time):.0f}", f"{np.mean(compile_time):.0f}"]
            cells.append(f"{gradients:.2g}")
        energies = np.mean([r["sampler"]["energies"] for r in group])
        cells[2] += f" ({energies:.2g})"
        cells.append(spread(group, "nuts", "max_rhat", "{:.2f}"))
        for key in ("mean_error", "sd_error", "mode_error"):
            cells.append(spread(group, "nuts", key, "{:.2f}"))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n## The pilot alone\n")
    print("What the answer would be from the points that the sampler is trained on.\n")
    _head(("posterior", "pilot", "gradients", "mean", "sd", "mode weight"))
    for name, group in groups.items():
        gradients = np.mean([r["sampler"]["pilot_gradients"] for r in group])
        cells = [
            group[0]["sampler"]["pilot_name"],
            f"{gradients:.2g}",
            *(
                spread(group, "sampler", f"pilot_{key}")
                for key in ("mean_error", "sd_error", "mode_error")
            ),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n## As a kernel of MCMC\n")
    print(
        "`DiffusionKernel` with 8 proposals, 4 chains of 1,000 draws after 1,000; HMC\n"
        "moves between where the verdict was not `trust`.\n"
    )
    _head((
        "posterior", "accepted", "R-hat", "mode jumps in 1,000", "mean", "sd",
        "mode weight",
    ))  # fmt: skip
    for name, group in groups.items():
        cells = [
            spread(group, "kernel", "accept_prob", "{:.2f}"),
            spread(group, "kernel", "max_rhat"),
            spread(group, "kernel", "jumps_per_1000", "{:.0f}"),
            *(
                spread(group, "kernel", key, "{:.2f}")
                for key in ("mean_error", "sd_error", "mode_error")
            ),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n## Verdicts that are not `trust`, and what misses\n")
    _head(("posterior", "seed", "verdict", "parameters beyond a limit"))
    for row in rows:
        own = row["sampler"]
        if not own["verdict"].startswith("trust") or not won(own):
            said = own["verdict"].split(";")[0]
            misses = ", ".join(own["misses"]) or "-"
            print(f"| {row['name']} | {row['seed']} | {said} | {misses} |")


def _head(names):
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    names = [posterior.name for posterior in posteriors.all_posteriors()]
    parser.add_argument("--names", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=240.0, help="of training")
    default = pathlib.Path("outputs/numpyro_posteriors.jsonl")
    parser.add_argument("--out", type=pathlib.Path, default=default)
    add_mesh_option(parser)
    args = parser.parse_args()
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
