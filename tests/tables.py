"""Constructors of every sampler, objective and behaviour, read by the shared tests.

Adding a method to the library means adding one line to a table here. Every value can be
called without arguments; the samplers also take keyword arguments that override what is
written here. Networks are tiny, so that compiling them is what a test costs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

SMALL = {"width": 8, "depth": 1}
REFERENCE = {"dim": 2, "num_steps": 4, "loc": (0.4, -0.3), "scale": (1.8, 1.5)}


MANY = 403_200  # steps; every step count of the tests divides it


_NOISE = ds.schedules.geometric(0.5, largest_scale=0.9)


def _sampler(factory, **networks):
    return functools.partial(factory, **REFERENCE, **networks)


SAMPLERS = {
    "pis": _sampler(ds.samplers.pis, network=ds.networks.score_guided(**SMALL)),
    "dds": _sampler(ds.samplers.dds, network=ds.networks.score_guided(**SMALL)),
    "dis": _sampler(
        ds.samplers.dis, network=ds.networks.annealed_score_guided(**SMALL)
    ),
    "dis_free": _sampler(ds.samplers.dis, network=ds.networks.free(**SMALL)),
    "gmp": functools.partial(
        ds.samplers.gmp,
        **REFERENCE,
        num_components=2,
        schedule=_NOISE,
        network=ds.networks.mixture_guided(2, _NOISE, **SMALL),
    ),
    "gbs": _sampler(
        ds.samplers.gbs,
        diffusion=0.6,
        network=ds.networks.annealed_score_guided(**SMALL, offset=0.0),
        destruction_network=ds.networks.reference_guided(**SMALL),
    ),
    "gbs_variance": _sampler(
        ds.samplers.gbs,
        diffusion=0.6,
        network=ds.networks.free(**SMALL, learn_variance=True),
        destruction_network=ds.networks.free(**SMALL, learn_variance=True),
    ),
    "pis_learned": _sampler(
        ds.samplers.pis,
        network=ds.networks.score_guided(**SMALL, learn_variance=True),
        destruction_network=ds.networks.score_guided(**SMALL, learn_variance=True),
        destruction_bounds=ds.Bounds(log_variance=1.0, shift=0.7),
    ),
    "pis_shared": _sampler(
        ds.samplers.pis,
        network=ds.networks.free(**SMALL, learn_variance=True),
        destruction_network=ds.networks.free(**SMALL, learn_variance=True),
        backbone=ds.networks.backbone(**SMALL),
    ),
    "dds_learned": _sampler(
        ds.samplers.dds,
        network=ds.networks.free(**SMALL, learn_variance=True),
        destruction_network=ds.networks.free(**SMALL, learn_variance=True),
    ),
    "dis_learned": _sampler(
        ds.samplers.dis,
        network=ds.networks.annealed_score_guided(**SMALL, learn_variance=True),
        destruction_network=ds.networks.free(**SMALL, learn_variance=True),
    ),
    "dis_shared": _sampler(
        ds.samplers.dis,
        network=ds.networks.annealed_score_guided(**SMALL, learn_variance=True),
        destruction_network=ds.networks.free(**SMALL, learn_variance=True),
        backbone=ds.networks.backbone(**SMALL),
    ),
    "scds": _sampler(
        ds.samplers.scds,
        destruction_bounds=ds.Bounds(log_variance=3.0),
        finest=MANY,
        network=ds.networks.free(**SMALL, learn_variance=True, step_conditioned=True),
        destruction_network=ds.networks.free(
            **SMALL, learn_variance=True, step_conditioned=True
        ),
    ),
    "scds_data": _sampler(
        ds.samplers.scds,
        schedule=ds.schedules.linear(12.0, 0.2),
        network=ds.networks.tied(
            ds.networks.data_prediction(ds.schedules.linear(12.0, 0.2), **SMALL),
            ds.networks.free(**SMALL, learn_variance=True, step_conditioned=True),
        ),
        finest=MANY,
    ),
    "dis_euler": _sampler(
        ds.samplers.dis,
        schedule=ds.schedules.linear(2.0, 0.2),  # of more it overshoots in one step
        network=ds.networks.annealed_score_guided(**SMALL),
        process=ds.processes.EulerVariancePreserving,
    ),
    "scds_tied": _sampler(
        ds.samplers.scds,
        generation_bounds=ds.Bounds(log_variance=3.0, shift=2.0),
        destruction_bounds=ds.Bounds(log_variance=3.0),
        finest=MANY,
        network=ds.networks.tied(
            ds.networks.free(**SMALL, step_conditioned=True),
            ds.networks.free(**SMALL, learn_variance=True, step_conditioned=True),
        ),
        destruction_network=ds.networks.free(
            **SMALL, learn_variance=True, step_conditioned=True
        ),
    ),
    "scds_coordinatewise": _sampler(
        ds.samplers.scds,
        finest=MANY,
        network=ds.networks.tied(
            ds.networks.coordinatewise(**SMALL, step_conditioned=True),
            ds.networks.coordinatewise(
                **SMALL, learn_variance=True, step_conditioned=True
            ),
        ),
        destruction_network=ds.networks.coordinatewise(
            **SMALL, use_score=False, learn_variance=True, step_conditioned=True
        ),
    ),
    "cdds": _sampler(
        ds.samplers.cdds,
        smallest_std=0.3,
        network=ds.networks.consistency(**SMALL, learn_variance=True),
        destruction_network=ds.networks.free(
            **SMALL, learn_variance=True, step_conditioned=True
        ),
    ),
    "cdds_tied": _sampler(
        ds.samplers.cdds,
        smallest_std=0.3,
        generation_bounds=ds.Bounds(log_variance=3.0),
        destruction_bounds=ds.Bounds(log_variance=3.0),
        network=ds.networks.tied(
            ds.networks.consistency(**SMALL),
            ds.networks.free(**SMALL, learn_variance=True, step_conditioned=True),
        ),
        destruction_network=ds.networks.free(
            **SMALL, learn_variance=True, step_conditioned=True
        ),
    ),
}

# Samplers that differ from another one by what is learned alone: left out where only
# the process matters.
LEARNED = [
    "gbs_variance",
    "pis_learned",
    "pis_shared",
    "dds_learned",
    "dis_learned",
    "dis_shared",
    "scds",
    "scds_data",
    "scds_tied",
    "scds_coordinatewise",
    "cdds",
    "cdds_tied",
]
VARIANTS = {"dis_free", "dis_euler", *LEARNED}
PROCESSES = [name for name in SAMPLERS if name not in VARIANTS]

OBJECTIVES = {
    "reverse_kl": ds.objectives.reverse_kl,
    "reverse_kl_log_derivative": ds.objectives.reverse_kl_log_derivative,
    "log_variance": ds.objectives.log_variance,
    "trajectory_balance": ds.objectives.trajectory_balance,
    "forward_kl": ds.objectives.forward_kl,
    "forward_kl_log_derivative": ds.objectives.forward_kl_log_derivative,
    "forward_kl_draws": lambda: ds.objectives.forward_kl(skewed_draws()),
    "sub_trajectory_balance": lambda: ds.objectives.sub_trajectory_balance(
        1.5, flow=small_flow(forward_looking=True)
    ),
    "detailed_balance": lambda: ds.objectives.detailed_balance(
        flow=small_flow(forward_looking=True)
    ),
    "target_copy": lambda: ds.objectives.target_copy(
        ds.objectives.log_variance(), rate=0.1
    ),
    "one_for_each_kernel": lambda: ds.objectives.weighted_sum(
        (ds.objectives.generation_only(ds.objectives.trajectory_balance()), 1.0),
        (ds.objectives.trajectory_likelihood(), 1.0),
    ),
    "trust_region_log_variance": ds.objectives.trust_region_log_variance,
    "weighted_sum": lambda: ds.objectives.weighted_sum(
        (ds.objectives.log_variance(), 0.5), (ds.objectives.trajectory_balance(), 0.5)
    ),
}

# Objectives that make no sense with the reference's destruction kernel.
NEED_DESTRUCTION = {"target_copy", "one_for_each_kernel"}

BEHAVIOURS = {
    "on_policy": ds.behaviours.on_policy,
    "exploration": lambda: ds.behaviours.exploration(0.2),
    "replay": lambda: ds.behaviours.replay(capacity=256),
    "replay_by_rank": lambda: ds.behaviours.replay(256, priority=ds.buffers.by_rank()),
    "replay_by_weight": lambda: ds.behaviours.replay(
        256, priority=ds.buffers.by_weight()
    ),
    "local_search": lambda: ds.behaviours.local_search(
        256, every=2, num_chains=4, num_steps=6, num_burn_in=2
    ),
    "reference_draws": lambda: ds.behaviours.reference_draws(skewed_draws()),
    "smc_seeded": lambda: ds.behaviours.smc_seeded(64, every=2, num_mcmc_steps=2),
    "smc_pooled": lambda: ds.behaviours.smc_seeded(
        64, every=2, num_mcmc_steps=2, num_runs=2
    ),
    "trust_region": lambda: ds.behaviours.trust_region(64, every=2),
    "mixture": lambda: ds.behaviours.mixture(
        (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(256), 0.5)
    ),
}


NETWORKS = {
    "free": functools.partial(ds.networks.free, **SMALL),
    "score_guided": functools.partial(ds.networks.score_guided, **SMALL),
    "annealed_score_guided": functools.partial(
        ds.networks.annealed_score_guided, **SMALL
    ),
    "reference_guided": functools.partial(ds.networks.reference_guided, **SMALL),
    "coordinatewise": functools.partial(ds.networks.coordinatewise, **SMALL),
    "reduced_precision": lambda *args, **options: ds.networks.reduced_precision(
        ds.networks.free(*args, **SMALL | options)
    ),
}

NOISE_SCHEDULES = {
    "geometric": ds.schedules.geometric,
    "cosine": ds.schedules.cosine,
    "linear": ds.schedules.linear,
    "cosine_power": ds.schedules.cosine_power,
}


def small_flow(**options):
    """A flow with a tiny network."""
    module = ds.networks.FourierMLP(width=8, depth=1, out_dim=1)
    return ds.objectives.Flow(network=ds.networks.LinenBackbone(module, 1), **options)


def mostly_slow(names, *fast):
    """Parameters of which all but ``fast`` are left to `pytest -m slow`."""
    assert set(fast) <= set(names)

    def parameter(name):
        values = name if isinstance(name, tuple) else (name,)
        return pytest.param(*values, marks=() if name in fast else pytest.mark.slow)

    return [parameter(name) for name in names]


# A target that is shifted, skewed and wider in one coordinate than in the other:
# symmetric targets hide errors of sign and of time direction.
WEIGHTS = np.array([0.6, 0.3, 0.1])
MEANS = np.array([[0.8, -0.6], [1.8, 0.4], [-0.7, -1.2]])
STDS = np.array([[0.5, 0.9], [0.8, 0.4], [0.6, 0.5]])
LOG_Z = 0.7


def skewed_energy(x):
    """Minus the log of exp(LOG_Z) times a Gaussian mixture; x of shape [1] or [2]."""
    dim = x.shape[0]
    means, stds = (np.asarray(v[:, :dim], x.dtype) for v in (MEANS, STDS))
    z = (x[None] - means) / stds
    log_component = -0.5 * jnp.sum(z**2 + np.log(2 * np.pi * stds**2), axis=-1)
    return -jax.nn.logsumexp(log_component + np.log(WEIGHTS).astype(x.dtype)) - LOG_Z


def sample_skewed(key, n, dim=2):
    """Exact draws, [n, dim]."""
    pick, noise = jax.random.split(key)
    component = jax.random.categorical(pick, jnp.log(jnp.asarray(WEIGHTS)), shape=(n,))
    means, stds = (jnp.asarray(v[:, :dim]) for v in (MEANS, STDS))
    return means[component] + stds[component] * jax.random.normal(noise, (n, dim))


def skewed_draws():
    return sample_skewed(jax.random.key(100), 512)


CENTRE = np.array([0.9, -0.4])


def scaled_energy(factor, x):
    """`skewed_energy` stretched about CENTRE by ``factor`` []; the same log Z."""
    centre = CENTRE[: x.shape[0]].astype(x.dtype)
    return skewed_energy(centre + (x - centre) / factor) + x.shape[0] * jnp.log(factor)


def sample_scaled(factor, key, n):
    """Exact draws of `scaled_energy` in two dimensions, [n, 2]."""
    centre = jnp.asarray(CENTRE)[None]
    return centre + factor * (sample_skewed(key, n) - centre)


def shifted_energy(data, x):
    """``jax.tree_util.Partial(shifted_energy, data)``: an energy with data [D]."""
    return 0.5 * jnp.sum((x - data) ** 2)


def conditional_energy(x, condition):
    """A Gaussian whose mean is the first D entries of the condition."""
    return 0.5 * jnp.sum((x - condition[: x.shape[0]]) ** 2)


def rows_of(size):
    """A request for so many rows without conditions."""
    return ds.Request(jnp.zeros((size, 0)), jnp.zeros((size,), jnp.int32))


def batch_of_paths(sampler, params, size, key, **fields):
    """An unscored batch of on-policy paths on the skewed energy; fields override."""
    keys = jax.random.split(key, size)
    simulate = jax.vmap(sampler.simulate, in_axes=(None, 0, None))
    paths = jax.jit(lambda params: simulate(params, keys, skewed_energy))(params)
    defaults = {
        "trajectories": None,
        "rollouts": None,
        "paths": paths,
        "on_policy": jnp.ones(size, bool),
        "target_draws": jnp.zeros(size, bool),
        "count": jnp.asarray(0),
        "key": key,
        "sampler": sampler,
        "energy": skewed_energy,
        **rows_of(size)._asdict(),
    }
    return ds.Batch(**(defaults | fields))


def perturbed(params, scale, seed=1):
    """Parameters moved at random, so that no factor or sign hides behind a zero."""
    rng = np.random.default_rng(seed)

    def move(leaf):
        noise = scale * rng.standard_normal(leaf.shape)
        return jnp.asarray(np.asarray(leaf) + noise, leaf.dtype)

    return jax.tree.map(move, params)


def counting_energy(fn):
    """An energy that counts its evaluations; a function that returns and resets them.

    ``take() -> {"energy": ..., "gradient": ...}``. Under ``vmap`` every row counts, by
    one callback: one for each row takes long to compile.
    """
    counts = {"energy": 0, "gradient": 0}

    def counted(kind, rows=1):
        def add(_):
            counts[kind] += rows

        @jax.custom_batching.custom_vmap
        def same(x):
            jax.debug.callback(add, x)
            return x

        @same.def_vmap
        def _(axis_size, is_batched, x):
            return counted(kind, rows * axis_size)(x), is_batched[0]

        return same

    @jax.custom_vjp
    def energy(x):
        return fn(counted("energy")(x))

    def forward(x):
        return fn(counted("gradient")(x)), x

    def backward(x, cotangent):
        return (cotangent * jax.grad(fn)(x),)

    energy.defvjp(forward, backward)

    def take():
        jax.effects_barrier()
        taken = dict(counts)
        counts.update(energy=0, gradient=0)
        return taken

    return energy, take
