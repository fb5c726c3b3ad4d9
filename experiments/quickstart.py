"""From a real multimodal posterior to weighted draws, log Z, a verdict and a picture.

    python experiments/quickstart.py
    python experiments/quickstart.py --target two_sinusoids --seed 1 --out results/

Tempered SMC (BlackJAX) finds the modes and gives the reference its place and scale; a
diffusion sampler is trained on its own paths and on paths into the SMC particles; an
independent SMC run probes the result; NumPyro's NUTS runs beside it on the same
machine.
"""

from __future__ import annotations

import argparse
import pathlib
import time

BEGIN = time.perf_counter()  # the imports that follow take seconds

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from rows import add_mesh_option, dumps, environment, mesh_of

import diffsamp as ds
from diffsamp import posteriors

matplotlib.use("Agg")

OBJECTIVES = {
    "log_variance": ds.objectives.log_variance,
    "trajectory_balance": ds.objectives.trajectory_balance,
    "reverse_kl": ds.objectives.reverse_kl,
    "reverse_kl_log_derivative": ds.objectives.reverse_kl_log_derivative,
    "forward_kl": ds.objectives.forward_kl,
}


def find_target(name):
    """Target, and the packaged posterior it comes from or None."""
    known = {p.name: p for p in posteriors.all_posteriors() if p.modes is not None}
    if name in known:
        return known[name].target(), known[name]
    if name in ds.targets.all_targets():
        return ds.targets.by_name(name), None
    names = sorted([*known, *ds.targets.all_targets()])
    raise SystemExit(f"unknown --target {name!r}; valid names: {', '.join(names)}")


def run_smc(key, target, num_particles):
    """Points from tempered SMC, from the prior where there is one."""
    if target.sample_prior is not None:
        return ds.probes.smc_from_prior(key, target, num_particles=num_particles)
    return ds.probes.smc(
        key, target.energy, target.dim, scale=target.scale, num_particles=num_particles
    )


def train(key, target, particles, args):
    """Imitates the particles by forward KL, then balances its own paths too."""
    sampler = ds.samplers.dis(
        dim=target.dim,
        num_steps=args.num_steps,
        **ds.reference_from(particles.x).arguments,
        schedule=ds.schedules.geometric(0.05),
        network=ds.networks.free(learn_variance=True),
        generation_bounds=ds.Bounds(log_variance=2.0),
    )
    seeded = ds.behaviours.reference_draws(particles.x)
    on_policy = ds.behaviours.on_policy()
    print(f"training for {args.seconds:.0f} s", flush=True)
    warm = ds.fit(
        key,
        sampler,
        ds.objectives.forward_kl(),
        target.energy,
        behaviour=seeded,
        optimizer=optax.adam(2e-3),
        anneal=lambda progress: jnp.cos(0.4 * jnp.pi * progress),
        ema_decay=0.998,
        batch_size=128,
        max_seconds=0.6 * args.seconds,
        mesh=mesh_of(args.mesh),
    )
    objective = OBJECTIVES[args.objective]()
    both = ds.behaviours.mixture((on_policy, 0.5), (seeded, 0.5))
    fit = ds.fit(
        jax.random.fold_in(key, 1),
        sampler,
        objective,
        target.energy,
        behaviour=on_policy if objective.requires.simulation_gradient else both,
        optimizer=optax.adam(1e-3),
        anneal=ds.schedules.cosine_anneal,
        params=warm.params,
        batch_size=256,
        max_seconds=0.4 * args.seconds,
        mesh=mesh_of(args.mesh),
    )
    return sampler, warm, fit


def run_nuts(key, target, posterior):
    """Four NUTS chains: flat draws [4, n, D], maximal split R-hat, cost."""
    begin = time.perf_counter()
    if posterior is not None:
        kernel, data = NUTS(posterior.model), posterior.data()
    else:
        kernel, data = NUTS(potential_fn=target.energy), {}
    mcmc = MCMC(
        kernel,
        num_warmup=1_000,
        num_samples=1_000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    starts, run = jax.random.split(key)
    options = {"extra_fields": ("num_steps", "diverging"), **data}
    if posterior is None:
        options["init_params"] = 2 * jax.random.normal(starts, (4, target.dim))
    mcmc.run(run, **options)
    draws = mcmc.get_samples(group_by_chain=True)
    if posterior is not None:
        sites = {name: draws[name] for name in posterior.shapes}
        draws = jax.vmap(jax.vmap(target.unconstrain))(sites)
    draws = np.asarray(draws)
    fields = mcmc.get_extra_fields()
    return {
        "draws": draws,
        "max_rhat": float(np.max(split_gelman_rubin(draws))),
        "divergences": int(fields["diverging"].sum()),
        # one leapfrog step per gradient; warm-up costs about as many again
        "gradients_after_warmup": int(fields["num_steps"].sum()),
        "seconds": time.perf_counter() - begin,
    }


def named(target, posterior, x):
    """Draws as the user's own parameters."""
    if posterior is None:
        return {"x": x}
    sites = jax.jit(jax.vmap(target.constrain))(jnp.asarray(x))
    return {name: np.asarray(sites[name]) for name in posterior.shapes}


def add_upper_bound(key, target, posterior, sampler, params, draws, mesh):
    """EUBO, from draws of the target that this library had no part in.

    Returns the draws with it, and the number of paths it took.
    """
    for_draws, for_paths = jax.random.split(key)
    if posterior is not None:
        points = jax.vmap(target.unconstrain)(posterior.draws())
    elif target.sample is not None:
        points = target.sample(for_draws, 1_000)
    else:
        return draws, 0
    log_weight = ds.log_weights_of(
        for_paths, sampler, params, target.energy, points, mesh=mesh
    )
    upper = ds.evidence.eubo(log_weight).estimate
    log_evidence = draws.log_evidence._replace(upper=upper)
    return draws._replace(log_evidence=log_evidence), len(points)


def total_cost(results, sampler, num_traced):
    """Evaluations in all: of SMC, training, draws with their probe, and the EUBO."""
    total = {}
    for kind in ("energy", "gradient", "network"):
        name = f"num_{kind}_evaluations"
        traces = num_traced * getattr(sampler.evaluations_per_trace, kind)
        counts = [getattr(result, name, 0) for result in results]
        total[f"{kind}_evaluations"] = sum(counts) + traces
    return total


def mode_table(target, draws, nuts):
    """Mode weights of the truth, the sampler and NUTS."""
    if target.modes is None:
        return None
    flat = nuts["draws"].reshape(-1, target.dim)
    return {
        "truth": np.asarray(target.modes.weights),
        "diffsamp": ds.metrics.mode_weights(draws.x, target.modes, draws.log_weight),
        "NUTS": ds.metrics.mode_weights(flat, target.modes),
    }


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="galaxies_mixture")
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--objective", choices=OBJECTIVES, default="log_variance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="outputs/quickstart")
    by_default = (
        "of updates; by default 65, or fewer where all would take over 3 minutes"
    )
    parser.add_argument("--seconds", type=float, help=by_default)
    parser.add_argument("--num-draws", type=int, default=100_000)
    parser.add_argument("--num-particles", type=int, default=2_048)
    add_mesh_option(parser)
    args = parser.parse_args()
    for name in ("num_steps", "seconds", "num_draws", "num_particles"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} must be positive, got {value}")
    return args


def seconds_that_fit(elapsed):
    """Of training, so that all ends within three minutes; but 20 in any case.

    What follows (compilation, draws, figure) takes about two thirds as long as what
    comes before.
    """
    return float(np.clip(165 - elapsed * 5 / 3, 20, 65))


def main():
    args = parse()
    target, posterior = find_target(args.target)
    # Whatever forbids writing the result shows now, not after training.
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "sampler.diffsamp"
    if file.exists():
        ds.load(file)
    keys = jax.random.split(jax.random.key(args.seed), 6)
    print(f"target {target.name}, dimension {target.dim}", flush=True)
    print("NUTS, 4 chains ...", flush=True)
    nuts = run_nuts(keys[0], target, posterior)
    print("tempered SMC to seed and to probe ...", flush=True)
    particles = run_smc(keys[1], target, args.num_particles)
    probe = run_smc(keys[2], target, args.num_particles)
    if args.seconds is None:
        args.seconds = seconds_that_fit(time.perf_counter() - BEGIN)
    sampler, warm, fit = train(keys[3], target, particles, args)
    mesh = mesh_of(args.mesh)
    ds.save(file, sampler, fit.params)
    draws = ds.draw(
        keys[4],
        sampler,
        fit.params,
        target.energy,
        args.num_draws,
        probe=probe,
        mesh=mesh,
    )
    draws, traced = add_upper_bound(
        keys[5], target, posterior, sampler, fit.params, draws, mesh
    )
    cost = total_cost((particles, warm, fit, draws.diagnostics), sampler, traced)
    print()
    print(ds.summary(named(target, posterior, draws.x), draws.log_weight))
    print()
    print(ds.verdict_lines(draws, target.log_z))
    bars = mode_table(target, draws, nuts)
    if bars is not None:
        print("\nmode weights" + "".join(f"{name:>10}" for name in bars))
        for i in range(min(len(bars["truth"]), 40)):
            print(f"{i:>12}" + "".join(f"{bars[n][i]:>10.3f}" for n in bars))
    print(
        f"\ndiffsamp: {cost['energy_evaluations']:,} energies, "
        f"{cost['gradient_evaluations']:,} gradients (SMC, training, draws, probe, "
        f"EUBO), {warm.seconds + fit.seconds:.0f} s of training"
    )
    print(
        f"NUTS:     {nuts['gradients_after_warmup']:,} gradients after warm-up, "
        f"{nuts['seconds']:.0f} s, max R-hat {nuts['max_rhat']:.2f}, "
        f"{nuts['divergences']} divergences, no log Z"
    )
    save(args, target, fit, draws, nuts, bars, cost)


def save(args, target, fit, draws, nuts, bars, cost):
    """Figure and numbers."""
    figure = ds.plotting.overview(
        draws,
        fit.metrics,
        log_z=target.log_z,
        points={"NUTS": nuts["draws"].reshape(-1, target.dim)[:, :2]}
        if target.dim > 1
        else None,
        bars=bars,
    )
    figure.savefig(args.out / "quickstart.png", dpi=150)
    evidence, report = draws.log_evidence, draws.diagnostics
    seconds = time.perf_counter() - BEGIN
    numbers = {
        "target": target.name,
        "seed": args.seed,
        "num_steps": args.num_steps,
        "objective": args.objective,
        "training_seconds": args.seconds,
        "num_draws": args.num_draws,
        "log_z_true": target.log_z,
        "log_z": evidence.estimate,
        "log_z_standard_error": evidence.standard_error,
        "elbo": evidence.lower,
        "eubo": evidence.upper,
        "ess": report.ess_fraction,
        "pareto_k": report.pareto_k,
        "missing_mass": report.missing_mass,
        "verdict": report.verdict,
        "mode_weights": None if bars is None else bars["diffsamp"].tolist(),
        "mode_weights_true": None if bars is None else bars["truth"].tolist(),
        "mode_weights_nuts": None if bars is None else bars["NUTS"].tolist(),
        **cost,
        "nuts_max_rhat": nuts["max_rhat"],
        "nuts_seconds": nuts["seconds"],
        "nuts_gradients_after_warmup": nuts["gradients_after_warmup"],
        "seconds": seconds,
        **environment(),
    }
    (args.out / "quickstart.json").write_text(dumps(numbers, indent=1))
    print(f"\nwrote {args.out}/quickstart.png, .json and sampler.diffsamp")
    print(f"total {seconds:.0f} s")


if __name__ == "__main__":
    main()
