"""One sampler for the posteriors of a decoder's latent variables, one per image.

    python experiments/amortised.py run
    python experiments/amortised.py table

`run` trains a small VAE on scikit-learn's digits for every seed, freezes its decoder
and trains samplers of p(z | image), with few steps, on the training images alone. They
are judged on held-out images against long NUTS runs, and beside importance sampling
from the VAE's own encoder. It appends one JSON line per cell (seed, steps, kernels) to
--out and skips cells that are already there, so it can be stopped and started again.
`table [FILES]` writes the Markdown table of the docs from those lines. It needs
scikit-learn: pip install 'diffsamp[experiments]'.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.tree_util import Partial
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
)

import diffsamp as ds

PACKAGES = ("scikit-learn",)
STEPS = (5, 10, 20)
KERNELS = ("generation", "both")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Decoder, samplers and what they are judged by; chosen on seed 100."""

    latent_dim: int = 8
    decoder_width: int = 64
    noise: float = 0.15  # of a pixel
    vae_updates: int = 4_000
    num_held_out: int = 360
    width: int = 64
    smallest_scale: float = 0.07
    num_updates: int = 3_000
    batch_size: int = 256
    paths_per_condition: int = 8
    learning_rate: float = 3e-3
    num_images: int = 20
    num_draws: int = 2_048
    num_points: int = 500  # in each set, for W2
    num_particles: int = 256  # of tempered SMC, where chains start
    num_chains: int = 4
    num_warmup: int = 500
    num_nuts_draws: int = 1_250  # per chain
    num_proposals: int = 16_384  # for the reference value of log Z


SETTING = Setting()
MAX_RHAT = 1.05


class Encoder(nn.Module):
    """Mean and log standard deviation of a Gaussian over z, [2 D]."""

    width: int
    latent_dim: int

    @nn.compact
    def __call__(self, image):
        hidden = image
        for _ in range(2):
            hidden = nn.gelu(nn.Dense(2 * self.width)(hidden))
        return nn.Dense(2 * self.latent_dim)(hidden)


class Decoder(nn.Module):
    """Mean of the pixels given z, [64]."""

    width: int
    num_pixels: int = 64

    @nn.compact
    def __call__(self, z):
        hidden = z
        for _ in range(2):
            hidden = nn.gelu(nn.Dense(self.width)(hidden))
        return nn.sigmoid(nn.Dense(self.num_pixels)(hidden))


class Family(NamedTuple):
    """Posteriors p(z | image), and what is known of those of the judged images.

    Attributes:
        energy: energy(z, image), minus the log of the joint density.
        vae: parameters of encoder and decoder.
        train: images to train on, [N, 64].
        images: judged images, not among them, [M, 64].
        nuts: draws of their posteriors, [M, chains, n, D].
        log_z: log evidence of each by importance sampling from a Student t with the
            mean and covariance of the NUTS draws, [M].
        numbers: about the VAE and the NUTS runs.
    """

    energy: Partial
    vae: Any
    train: np.ndarray
    images: np.ndarray
    nuts: np.ndarray
    log_z: np.ndarray
    numbers: dict


def load_digits(seed):
    """Training and held-out images of 8 x 8 pixels in [0, 1], flat."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            "this experiment needs the digits of scikit-learn, which is not installed: "
            "pip install 'diffsamp[experiments]'"
        ) from error
    images = np.asarray(load_digits().data / 16.0, np.float32)
    images = images[np.random.default_rng(seed).permutation(len(images))]
    return images[SETTING.num_held_out :], images[: SETTING.num_held_out]


def decode(params, z):
    return Decoder(SETTING.decoder_width).apply(params, z)


def encode(params, image):
    out = Encoder(SETTING.decoder_width, SETTING.latent_dim).apply(params, image)
    return jnp.split(out, 2)


def joint_energy(decoder, z, image):
    """-log N(z; 0, I) - log N(image; mean(z), noise^2 I)."""
    log_prior = jax.scipy.stats.norm.logpdf(z).sum()
    mean = decode(decoder, z)
    return -log_prior - jax.scipy.stats.norm.logpdf(image, mean, SETTING.noise).sum()


def energy_of_image(decoder, image, z):
    return joint_energy(decoder, z, image)


def train_vae(key, images):
    """Parameters of encoder and decoder, and the mean ELBO of the last updates."""
    for_params, key = jax.random.split(key)
    keys = jax.random.split(for_params)
    setting = SETTING
    encoder = Encoder(setting.decoder_width, setting.latent_dim)
    params = {
        "encoder": encoder.init(keys[0], jnp.zeros(64)),
        "decoder": Decoder(setting.decoder_width).init(
            keys[1], jnp.zeros(setting.latent_dim)
        ),
    }
    rate = optax.cosine_decay_schedule(3e-3, setting.vae_updates)
    optimizer = optax.adam(rate)

    def minus_elbo(params, key, image):
        mean, log_std = encode(params["encoder"], image)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1)
        pixels = decode(params["decoder"], z)
        return kl - jax.scipy.stats.norm.logpdf(image, pixels, setting.noise).sum()

    def update(images, carry, key):
        params, state = carry
        for_rows, for_noise = jax.random.split(key)
        rows = images[jax.random.randint(for_rows, (128,), 0, len(images))]
        keys = jax.random.split(for_noise, 128)

        def loss(params):
            return jax.vmap(minus_elbo, in_axes=(None, 0, 0))(params, keys, rows).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def train(params, key, images):
        keys = jax.random.split(key, setting.vae_updates)
        start = params, optimizer.init(params)
        (params, _), values = jax.lax.scan(
            functools.partial(update, images), start, keys
        )
        return params, values

    params, values = train(params, key, jnp.asarray(images))
    return params, -float(values[-100:].mean())


def make_family(seed):
    """The VAE of a seed, and long NUTS runs for the judged images."""
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    key, begin = jax.random.key(seed), time.perf_counter()
    train, held_out = load_digits(seed)
    vae, elbo = train_vae(jax.random.fold_in(key, 0), train)
    numbers = {"vae_seconds": time.perf_counter() - begin, "vae_train_elbo": elbo}
    images, begin = held_out[: SETTING.num_images], time.perf_counter()
    nuts, info, smc = run_nuts(jax.random.fold_in(key, 1), vae["decoder"], images)
    numbers |= {
        "nuts_seconds": time.perf_counter() - begin,
        "nuts_gradient_evaluations": int(info.num_gradient_evaluations.sum()),
        "smc_gradient_evaluations": int(smc.num_gradient_evaluations.sum()),
        "smc_energy_evaluations": int(smc.num_energy_evaluations.sum()),
        "nuts_divergences": int(info.num_divergences.sum()),
        "nuts_rhat": [float(split_gelman_rubin(x).max()) for x in nuts],
        "nuts_ess": [float(effective_sample_size(x).min()) for x in nuts],
    }
    numbers["nuts_sd"] = float(np.std(nuts, axis=(1, 2)).mean())
    weights = student_weights(jax.random.fold_in(key, 2), vae["decoder"], images, nuts)
    evidences = [ds.evidence.log_evidence(w) for w in weights]
    numbers |= {
        "reference_standard_error": [e.standard_error for e in evidences],
        "reference_pareto_k": [
            float(ds.diagnostics.pareto_smooth(w).pareto_k) for w in weights
        ],
    }
    log_z = np.array([e.estimate for e in evidences])
    numbers["smc_log_z_error"] = (smc.log_z - log_z).tolist()
    return Family(
        energy=Partial(joint_energy, vae["decoder"]),
        vae=vae,
        train=train,
        images=images,
        nuts=nuts,
        log_z=log_z,
        numbers=numbers,
    )


def run_nuts(key, decoder, images):
    """NUTS for all images at once, chains starting in particles of tempered SMC.

    From the prior a chain may end in a mode of no weight and never leave it.
    """

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def run(decoder, key, image):
        for_particles, for_chains = jax.random.split(key)
        energy = Partial(energy_of_image, decoder, image)
        smc = ds.mcmc.smc_from_gaussian(
            for_particles,
            energy,
            SETTING.latent_dim,
            num_particles=SETTING.num_particles,
        )
        every = SETTING.num_particles // SETTING.num_chains
        draws, info = ds.mcmc.run_hmc(
            for_chains,
            energy,
            smc.particles[::every][: SETTING.num_chains],
            num_warmup=SETTING.num_warmup,
            num_draws=SETTING.num_nuts_draws,
        )
        return draws, info, smc

    out = run(decoder, jax.random.split(key, len(images)), jnp.asarray(images))
    return jax.tree.map(np.asarray, out)


def student_weights(key, decoder, images, nuts):
    """Log-weights of draws from a Student t of 5 degrees with the moments of NUTS."""
    size = SETTING.latent_dim

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0, 0))
    def run(decoder, key, image, mean, covariance):
        factor = jnp.linalg.cholesky(covariance)
        for_normal, for_chi = jax.random.split(key)
        noise = jax.random.normal(for_normal, (SETTING.num_proposals, size))
        chi = jax.random.chisquare(for_chi, 5.0, (SETTING.num_proposals, 1))
        unit = noise / jnp.sqrt(chi / 5.0)
        energies = jax.vmap(lambda z: joint_energy(decoder, z, image))
        log_density = jax.scipy.special.gammaln(0.5 * (5.0 + size))
        log_density -= jax.scipy.special.gammaln(2.5) + 0.5 * size * jnp.log(5 * jnp.pi)
        log_density -= jnp.log(jnp.diag(factor)).sum()
        square = jnp.sum(unit**2, axis=1)
        log_density -= 0.5 * (5.0 + size) * jnp.log1p(square / 5.0)
        return -energies(mean + unit @ factor.T) - log_density

    flat = nuts.reshape(len(images), -1, size)
    covariance = np.stack([np.cov(x.T) for x in flat])
    keys = jax.random.split(key, len(images))
    return np.asarray(run(decoder, keys, images, flat.mean(1), covariance))


def make_sampler(num_steps, kernels):
    networks, learn = ds.networks, kernels == "both"
    return ds.samplers.dis(
        dim=SETTING.latent_dim,
        num_steps=num_steps,
        condition_dim=64,
        schedule=ds.schedules.geometric(SETTING.smallest_scale),
        network=networks.annealed_score_guided(SETTING.width, learn_variance=True),
        destruction_network=networks.free(SETTING.width, learn_variance=True)
        if learn
        else None,
    )


def make_objective(kernels):
    o = ds.objectives
    if kernels == "generation":
        return o.log_variance()
    return o.weighted_sum(
        (o.generation_only(o.log_variance()), 1.0), (o.trajectory_likelihood(), 1.0)
    )


def run_sampler(seed, num_steps, kernels, family, mesh):
    """Trains one amortised sampler and judges it; a flat dict of numbers."""
    key = jax.random.key(seed)
    sampler = make_sampler(num_steps, kernels)
    fit = ds.fit(
        jax.random.fold_in(key, 3),
        sampler,
        make_objective(kernels),
        family.energy,
        conditions=family.train,
        paths_per_condition=SETTING.paths_per_condition,
        optimizer=optax.adam(SETTING.learning_rate),
        anneal=ds.schedules.cosine_anneal,
        batch_size=SETTING.batch_size,
        num_updates=SETTING.num_updates,
        mesh=mesh,
        progress_bar=False,
    )
    draw = functools.partial(
        ds.draw,
        sampler=sampler,
        params=fit.params,
        energy=family.energy,
        num_draws=SETTING.num_draws,
        mesh=mesh,
    )
    draw(jax.random.fold_in(key, 4), condition=family.train[0])  # compiles
    draws, begin = [], time.perf_counter()
    for i, image in enumerate(family.images):
        draws.append(draw(jax.random.fold_in(key, 100 + i), condition=image))
    seconds = (time.perf_counter() - begin) / len(draws)
    seen = [
        draw(jax.random.fold_in(key, 10_000 + i), condition=image)
        for i, image in enumerate(family.train[: SETTING.num_images])
    ]
    judged = []
    for i, image in enumerate(family.images):
        target_log_weight = ds.log_weights_of(
            jax.random.fold_in(key, 20_000 + i),
            sampler,
            fit.params,
            family.energy,
            thinned(family.nuts[i], SETTING.num_draws),
            condition=image,
            mesh=mesh,
        )
        judged.append(judge(seed, i, family, draws[i], target_log_weight))
    report = draws[0].diagnostics
    return {
        **over_images(judged),
        "ess_train_images": float(np.mean([share(d.log_weight) for d in seen])),
        "num_updates": len(fit.metrics["loss"]),
        "num_skipped": fit.num_skipped,
        "variance_alarm": float(fit.metrics["variance_alarm"][-1]),
        "energy_evaluations": fit.num_energy_evaluations + fit.num_gradient_evaluations,
        "network_evaluations": fit.num_network_evaluations,
        "seconds": fit.seconds - fit.compile_seconds,
        "compile_seconds": fit.compile_seconds,
        "draw_energy_evaluations": report.num_energy_evaluations
        + report.num_gradient_evaluations,
        "draw_network_evaluations": report.num_network_evaluations,
        "draw_seconds": seconds,
    }


def run_encoder(seed, family):
    """Judges the VAE's encoder as a proposal; a flat dict of numbers."""
    encoder, decoder = family.vae["encoder"], family.vae["decoder"]
    energy = functools.partial(joint_energy, decoder)

    def log_weights(mean, log_std, image, z):
        log_density = jax.scipy.stats.norm.logpdf(z, mean, jnp.exp(log_std)).sum(-1)
        return -jax.vmap(energy, in_axes=(0, None))(z, image) - log_density

    @jax.jit
    def run(key, image, target_draws):
        mean, log_std = encode(encoder, image)
        noise = jax.random.normal(key, (SETTING.num_draws, SETTING.latent_dim))
        z = mean + jnp.exp(log_std) * noise
        weigh = functools.partial(log_weights, mean, log_std, image)
        return z, weigh(z), weigh(target_draws)

    key, judged, seconds = jax.random.key(seed), [], 0.0
    for i, image in enumerate(family.images):
        nuts = thinned(family.nuts[i], SETTING.num_draws)
        begin = time.perf_counter()
        found = run(jax.random.fold_in(key, 100 + i), image, nuts)
        x, log_weight, target_log_weight = (np.asarray(a) for a in found)
        if i:  # the first one compiles
            seconds += time.perf_counter() - begin
        draws = ds.Draws(
            x,
            log_weight,
            energy=None,
            log_evidence=ds.evidence.log_evidence(log_weight),
            diagnostics=ds.diagnostics.diagnose(log_weight),
        )
        judged.append(judge(seed, i, family, draws, target_log_weight))
    return {
        **over_images(judged),
        "seconds": family.numbers["vae_seconds"],
        "draw_energy_evaluations": SETTING.num_draws,
        "draw_network_evaluations": 1,
        "draw_seconds": seconds / max(len(judged) - 1, 1),
    }


def judge(seed, i, family, draws, target_log_weight):
    """Draws for judged image i against one half of its NUTS chains.

    The floor of a distance is that of the other half.
    """
    half = SETTING.num_chains // 2
    truth, other = (
        thinned(x, SETTING.num_points)
        for x in (family.nuts[i][:half], family.nuts[i][half:])
    )
    key = jax.random.fold_in(jax.random.key(seed), 30_000 + i)
    resampled = draws.resample(key, SETTING.num_points)
    evidence = draws.log_evidence
    upper = ds.evidence.eubo(target_log_weight).estimate
    centre = family.nuts[i][:half].reshape(-1, SETTING.latent_dim)
    errors = functools.partial(moment_errors, centre.mean(0), centre.std(0))
    return {
        "log_z_error": evidence.estimate - family.log_z[i],
        "log_z_standard_error": evidence.standard_error,
        "elbo_gap": family.log_z[i] - evidence.lower,
        "eubo_gap": upper - family.log_z[i],
        "ess": share(draws.log_weight),
        "pareto_k": float(draws.diagnostics.pareto_k),
        **errors(draws.x, None),
        **errors(draws.x, draws.log_weight, "_weighted"),
        **errors(family.nuts[i][half:].reshape(centre.shape), None, "_floor"),
        "w2": ds.metrics.wasserstein2(draws.x[: SETTING.num_points], truth),
        "w2_weighted": ds.metrics.wasserstein2(resampled, truth),
        "w2_floor": ds.metrics.wasserstein2(other, truth),
    }


def share(log_weight):
    return float(ds.diagnostics.effective_sample_fraction(log_weight))


def moment_errors(mean, sd, x, log_weight, suffix=""):
    """Of means, in standard deviations, and the ratio of standard deviations.

    The first is the root mean square over coordinates, the second a geometric mean.
    """
    found = ds.metrics.moments(x, log_weight)
    ratios = found.standard_deviation / sd
    return {
        f"mean_error{suffix}": float(np.sqrt(np.mean(((found.mean - mean) / sd) ** 2))),
        f"sd_ratio{suffix}": float(np.exp(np.mean(np.log(ratios)))),
    }


def thinned(chains, num):
    """``num`` points [num, D] spread evenly over chains [C, n, D]."""
    flat = chains.reshape(-1, chains.shape[-1])
    if len(flat) < num:
        raise ValueError(
            f"num must be at most the {len(flat)} draws of these chains, got {num}; "
            "raise num_nuts_draws"
        )
    return flat[np.linspace(0, len(flat) - 1, num).astype(int)]


def over_images(judged):
    """Means over images, and every image's own numbers."""
    images = {name: [float(j[name]) for j in judged] for name in judged[0]}
    ratios = np.array(images["w2"]) / np.array(images["w2_floor"])
    images["w2_ratio"] = ratios.tolist()
    ratios = np.array(images["w2_weighted"]) / np.array(images["w2_floor"])
    images["w2_ratio_weighted"] = ratios.tolist()
    absolute = np.abs(images["log_z_error"]).tolist()
    images["log_z_absolute_error"] = absolute
    means = {name: float(np.mean(values)) for name, values in images.items()}
    return {**means, "images": images}


def run(args):
    for seed in args.seeds:
        cells = [(0, "encoder")]
        cells += [(steps, name) for steps in args.num_steps for name in args.kernels]
        done = {_cell_of(row) for row in read(args.out) if row["seed"] == seed}
        cells = [cell for cell in cells if cell not in done]
        if not cells:
            continue
        family = make_family(seed)
        print(seed, family.numbers, flush=True)
        for num_steps, kernels in cells:
            if kernels == "encoder":
                found = run_encoder(seed, family)
            else:
                mesh = mesh_of(args.mesh)
                found = run_sampler(seed, num_steps, kernels, family, mesh)
            row = {
                "seed": seed,
                "num_steps": num_steps,
                "kernels": kernels,
                **dataclasses.asdict(SETTING),
                **family.numbers,
                **found,
            }
            append(args.out, row, PACKAGES)
            brief = {k: v for k, v in found.items() if k != "images"}
            print(seed, num_steps, kernels, brief, flush=True)


def _from_one(value):
    return abs(np.log(value))


COLUMNS = (
    ("log Z error", "log_z_error", "{:+.3f}", abs),
    ("ELBO gap", "elbo_gap", "{:.3f}", float),
    ("EUBO gap", "eubo_gap", "{:.3f}", float),
    ("ESS", "ess", "{:.2f}", lambda v: -v),
    ("k-hat", "pareto_k", "{:.2f}", float),
    ("mean error", "mean_error", "{:.3f}", float),
    ("weighted", "mean_error_weighted", "{:.3f}", float),
    ("its floor", "mean_error_floor", "{:.3f}", float),
    ("sd ratio", "sd_ratio", "{:.3f}", _from_one),
    ("weighted", "sd_ratio_weighted", "{:.3f}", _from_one),
    ("W2 / floor", "w2_ratio", "{:.3f}", _from_one),
    ("weighted", "w2_ratio_weighted", "{:.3f}", _from_one),
)
COSTS = (
    ("training s", "seconds", "{:.0f}"),
    ("training energies", "energy_evaluations", "{:.1e}"),
    ("training network calls", "network_evaluations", "{:.1e}"),
    ("s per image", "draw_seconds", "{:.3f}"),
    ("energies per image", "draw_energy_evaluations", "{:.1e}"),
)


def table(args):
    rows = [row for row in rows_of(args.files) if _mixed(row, row["nuts_rhat"])]
    if not rows:
        raise SystemExit("no row whose NUTS chains agree; give them more draws")
    order = [(0, "encoder"), *((k, n) for n in KERNELS for k in STEPS)]
    cells = {cell: [r for r in rows if _cell_of(r) == cell] for cell in order}
    cells = {cell: own for cell, own in cells.items() if own}
    heads = ["kernels learned", "steps", "seeds"]
    quality = [
        [*_labels(cell, own), *(summarise(own, *c[1:]) for c in COLUMNS), reliable(own)]
        for cell, own in cells.items()
    ]
    costs = [
        [*_labels(cell, own), *(_mean(own, *c[1:]) for c in COSTS)]
        for cell, own in cells.items()
    ]
    lines = markdown([*heads, *(c[0] for c in COLUMNS), "k-hat < 0.7"], quality)
    lines += ["", *markdown([*heads, *(c[0] for c in COSTS)], costs)]
    print("\n".join([*lines, "", note(rows)]))


def note(rows):
    """What the numbers are, and the state of the NUTS runs they are judged by."""
    seeds = {row["seed"]: row for row in rows}
    first, each = rows[0], list(seeds.values())
    kept = [value for row in each for value in _mixed(row, row["nuts_rhat"])]
    ess = min(min(_mixed(row, row["nuts_ess"])) for row in each)
    errors = [e for row in each for e in _mixed(row, row["reference_standard_error"])]
    smc = [e for row in each for e in _mixed(row, row["smc_log_z_error"])]
    num_images = sum(len(row["nuts_rhat"]) for row in each)
    seconds = sum(row["nuts_seconds"] for row in each) / num_images
    return (
        f"Mean over {first['num_images']} held-out images and all seeds (worst seed; "
        f"worst image of any seed), {first['num_draws']:,} draws per image; the last "
        "column is the share of images. NUTS: "
        f"{first['num_chains']} chains of {first['num_nuts_draws']:,} draws, "
        f"{num_images - len(kept)} of {num_images} images left out for an R-hat above "
        f"{MAX_RHAT}, the others at most {max(kept):.3f}, effective draws at least "
        f"{ess:.0f}, {seconds:.1f} s (compilation and the tempered SMC for its starts "
        f"included) and {evaluations(each)} per image. Standard error of the "
        f"reference's log Z at most {max(errors):.3f}; that SMC, "
        f"{first['num_particles']} particles, is off by "
        f"{np.sqrt(np.mean(np.square(smc))):.2f} (root mean square). "
        f"{described(first)}."
    )


def evaluations(rows):
    """Of the NUTS runs of these rows and of the SMC that starts them, for one image."""
    num_images = sum(len(row["nuts_rhat"]) for row in rows)

    def mean(*names):
        return sum(row[name] for row in rows for name in names) / num_images

    nuts, smc = "nuts_gradient_evaluations", "smc_gradient_evaluations"
    if not all(smc in row for row in rows):  # older ones
        return f"{mean(nuts):.1e} gradients (those of the SMC not counted)"
    energies = mean("smc_energy_evaluations")
    return f"{mean(nuts, smc):.1e} gradients and {energies:.1e} energies"


def summarise(rows, name, form, badness):
    images = [_mixed(row, row["images"][name]) for row in rows]
    means = [float(np.mean(values)) for values in images]
    worst = (max(v, key=badness) for v in (means, np.concatenate(images)))
    return "{} ({}; {})".format(*map(form.format, (float(np.mean(means)), *worst)))


def reliable(rows):
    """Share of images whose weights can be used, and the worst seed's."""
    shares = [
        float(np.mean(np.less(_mixed(row, row["images"]["pareto_k"]), 0.7)))
        for row in rows
    ]
    return f"{np.mean(shares):.2f} ({min(shares):.2f})"


def _mixed(row, values):
    """The values of images whose NUTS chains agree."""
    pairs = zip(values, row["nuts_rhat"], strict=True)
    finite = ((np.nan if v is None else v, rhat) for v, rhat in pairs)
    return [v for v, rhat in finite if rhat is not None and rhat <= MAX_RHAT]


def _mean(rows, name, form):
    values = [row[name] for row in rows if name in row]
    return form.format(float(np.mean(values))) if values else "-"


def _labels(cell, own):
    steps, kernels = cell
    return [kernels, steps or "-", seeds_of(own)]


def _cell_of(row):
    return row["num_steps"], row["kernels"]


def main():
    parser, commands = commands_of(__doc__)
    out = pathlib.Path("outputs/amortised.jsonl")
    runner = add_runner(commands, run, out)
    runner.add_argument(
        "--num-steps", type=int, nargs="+", choices=STEPS, default=STEPS
    )
    runner.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    add_reader(commands, table, out)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
