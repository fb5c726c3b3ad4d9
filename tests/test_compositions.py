"""Few-step objectives beside any sampling objective, under any behaviour."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import SMALL, mostly_slow, perturbed, skewed_energy

import diffsamp as ds

KEY = jax.random.key(0)
NETWORK = ds.networks.free(**SMALL, step_conditioned=True)
TEACHER = ds.samplers.scds(2, 4, scale=2.0, network=NETWORK)
TRAINED = perturbed(TEACHER.init(KEY), 0.3)
CONSISTENT = ds.samplers.cdds(
    2, 2, scale=2.0, network=ds.networks.consistency(**SMALL, learn_variance=True)
)

FEW_STEP = {
    "self_consistency": (TEACHER.with_num_steps(2), ds.objectives.self_consistency),
    "consistency_distillation": (
        CONSISTENT,
        lambda: ds.objectives.consistency_distillation(TEACHER, TRAINED, num_times=3),
    ),
    "progressive_distillation": (
        TEACHER.with_num_steps(2),
        lambda: ds.objectives.progressive_distillation(TEACHER, TRAINED),
    ),
    "continuous_consistency": (
        CONSISTENT,
        lambda: ds.objectives.continuous_consistency(TEACHER, TRAINED),
    ),
}
METRICS = dict(
    zip(FEW_STEP, ("self_consistency", "consistency", "distillation", "tangent"))
)
SAMPLING = ("log_variance", "trajectory_balance", "reverse_kl")
BEHAVIOURS = {
    "on_policy": ds.behaviours.on_policy,
    "replay": lambda: ds.behaviours.mixture(
        (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(32), 0.5)
    ),
    "smc_seeded": lambda: ds.behaviours.smc_seeded(8, every=2, num_mcmc_steps=1),
}
# A simulation is differentiated on paths of the current sampler alone.
PAIRS = [
    (few_step, sampling, behaviour)
    for few_step in FEW_STEP
    for sampling in SAMPLING
    for behaviour in BEHAVIOURS
    if sampling != "reverse_kl" or behaviour == "on_policy"
]
QUICK = [
    ("self_consistency+progressive_distillation", "trajectory_balance", "replay"),
    ("consistency_distillation+continuous_consistency", "reverse_kl", "on_policy"),
]


@pytest.mark.relaxed("dtypes")
@pytest.mark.parametrize(
    ("few_step", "sampling", "behaviour"), mostly_slow([*QUICK, *PAIRS], *QUICK)
)
def test_all_members_train(few_step, sampling, behaviour):
    names = few_step.split("+")
    (sampler, *others), makes = zip(*(FEW_STEP[name] for name in names), strict=True)
    assert all(other == sampler for other in others)
    sampled = getattr(ds.objectives, sampling)()
    start = perturbed(sampler.init(KEY), 0.1)
    fit = ds.fit(
        KEY,
        sampler,
        ds.objectives.weighted_sum((sampled, 1.0), *((make(), 1.0) for make in makes)),
        skewed_energy,
        behaviour=BEHAVIOURS[behaviour](),
        params=start,
        num_updates=3,
        batch_size=8,
        ema_decay=None,
        progress_bar=False,
    )
    assert (int(fit.state.count), int(fit.state.num_skipped)) == (3, 0)
    assert np.all(np.isfinite(fit.metrics["loss_0"]))
    for i, name in enumerate(names, 1):
        value = fit.metrics[METRICS[name]]
        assert np.all(np.isfinite(value) & (np.asarray(value) > 0)), name
        assert np.all(np.isfinite(fit.metrics[f"loss_{i}"])), name
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), fit.params, start)
    assert all(float(change) > 0 for change in jax.tree.leaves(moved))
