"""DiffusionKernel: exact for any sampler, in every way in which MCMC runs a kernel."""

import functools
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import HMC, MCMC, NUTS, BarkerMH, Gibbs
from tables import mostly_slow

import diffsamp as ds
from diffsamp.numpyro import (
    Affine,
    Bent,
    DiffusionKernel,
    RandomStepNUTS,
    target_from_model,
)

pytestmark = pytest.mark.relaxed("dtypes", "ranks")

MEANS, SDS, WEIGHTS = (-1.0, 2.5), (0.5, 1.0), (0.3, 0.7)
MEAN = WEIGHTS[0] * MEANS[0] + WEIGHTS[1] * MEANS[1]
SECOND = sum(w * (m**2 + s**2) for w, m, s in zip(WEIGHTS, MEANS, SDS))


def skewed(x):
    """Two unequal modes in the first coordinate, a shifted normal in the second."""
    first = jnp.stack(
        [
            jnp.log(w / s) - 0.5 * ((x[0] - m) / s) ** 2
            for w, m, s in zip(WEIGHTS, MEANS, SDS)
        ]
    )
    return -jax.nn.logsumexp(first) + 0.5 * ((x[1] - 1.0) / 0.7) ** 2


def _perturbed(params, key, size=0.1):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        a + size * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys)
    ]
    return jax.tree.unflatten(tree, noisy)


@functools.cache
def untrained(dim=2):
    """A sampler of the wrong place and scale, with arbitrary networks."""
    network = ds.networks.free(width=8, depth=1, learn_variance=True)
    sampler = ds.samplers.dis(
        dim, 3, loc=0.7, scale=2.0, network=network, learn_destruction=True
    )
    return sampler, _perturbed(sampler.init(jax.random.key(0)), jax.random.key(1))


def model(y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    loc = numpyro.sample("loc", dist.Normal(0.0, 3.0))
    numpyro.deterministic("double", 2 * loc)
    with numpyro.plate("data", 4):
        numpyro.sample("y", dist.Normal(loc, scale), obs=y)


DATA = jnp.array([0.3, 1.4, -0.2, 0.9])


def run(kernel, num=200, *, seed=0, make_key=jax.random.key, num_warmup=0, **options):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num,
        **({"progress_bar": False} | options),
    )
    return mcmc, functools.partial(mcmc.run, make_key(seed))


def standard_error(chains):
    """Of the mean, by batch means, for chains [C, N]."""
    means = chains.reshape(-1, 50, chains.shape[1] // 50).mean(axis=2).ravel()
    return means.std(ddof=1) / np.sqrt(means.size)


def check_moments(x):
    """Means and mean square of chains [C, N, 2] within four standard errors."""
    for values, truth in (
        (x[..., 0], MEAN),
        (x[..., 0] ** 2, SECOND),
        (x[..., 1], 1.0),
        (x[..., 1] ** 2, 1.49),
    ):
        error = standard_error(values)
        assert error < 0.15
        assert abs(values.mean() - truth) < 4 * error, (values.mean(), truth, error)


@pytest.mark.parametrize("num_proposals", mostly_slow([1, 8], 1))
def test_an_untrained_sampler_is_corrected(num_proposals):
    kernel = DiffusionKernel(
        *untrained(), potential_fn=skewed, num_proposals=num_proposals
    )
    mcmc, go = run(kernel, 20_000, num_chains=4, chain_method="vectorized")
    go(extra_fields=("accept_prob", "potential_energy", "log_weight"))
    x = np.asarray(mcmc.get_samples(group_by_chain=True))
    assert x.shape == (4, 20_000, 2)
    check_moments(x)
    fields = mcmc.get_extra_fields()
    assert 0.02 < fields["accept_prob"].mean() < 0.98
    energies = jax.vmap(skewed)(mcmc.get_samples())
    np.testing.assert_allclose(fields["potential_energy"], energies, atol=1e-3)


def short_hmc(model=None, step_size=0.6, **options):
    return HMC(
        model,
        step_size=step_size,
        num_steps=4,
        trajectory_length=None,
        adapt_step_size=False,
        adapt_mass_matrix=False,
        **options,
    )


class Stale(DiffusionKernel):
    """What must not be done: the weight stays that of the path before the move."""

    def refresh(self, state, model_args, model_kwargs):
        return state


def _with_local(cls, local=None):
    local = local or short_hmc(potential_fn=skewed)
    kernel = cls(*untrained(), potential_fn=skewed, local_kernel=local)
    mcmc, go = run(kernel, 20_000, num_chains=4, chain_method="vectorized")
    go()
    return np.asarray(mcmc.get_samples(group_by_chain=True))


@pytest.mark.slow
def test_local_moves_leave_it_exact():
    check_moments(_with_local(DiffusionKernel))


@pytest.mark.slow
def test_steps_of_random_size_leave_it_exact():
    local = RandomStepNUTS(potential_fn=skewed, smallest=0.1, max_tree_depth=3)
    check_moments(_with_local(DiffusionKernel, local))


def test_steps_of_random_size_are_drawn_after_warm_up():
    kernel = RandomStepNUTS(potential_fn=skewed)
    mcmc, go = run(kernel, 200, num_warmup=100, num_chains=2, chain_method="vectorized")
    go(init_params=jnp.zeros((2, 2)), extra_fields=("adapt_state.step_size",))
    sizes = mcmc.get_extra_fields()["adapt_state.step_size"]
    assert len(np.unique(sizes)) == 2  # adapted, and kept, of either chain
    x = np.asarray(mcmc.get_samples(group_by_chain=True))
    moves = np.log(np.linalg.norm(np.diff(x, axis=1), axis=-1) + 1e-6)
    assert moves.std() > 1.0
    with pytest.raises(ValueError, match="smallest must lie in"):
        RandomStepNUTS(potential_fn=skewed, smallest=0.0)


@pytest.mark.slow
def test_without_redrawing_the_path_the_answer_would_be_wrong():
    """The second coordinate's mean square is 1.49."""
    square = _with_local(Stale)[..., 1] ** 2
    error = standard_error(square)
    assert error < 0.01
    assert square.mean() - 1.49 > 5 * error


def test_the_path_is_redrawn_after_a_local_move():
    local = short_hmc(potential_fn=skewed)
    kernel = DiffusionKernel(*untrained(), potential_fn=skewed, local_kernel=local)
    state = kernel.init(jax.random.key(0), 0)
    move = jax.jit(lambda state: kernel.sample(state, (), {}))
    for _ in range(5):
        new = move(state)
        assert np.all(new.z != state.z)  # HMC always moves
        assert new.log_weight != state.log_weight
        assert new.potential_energy == pytest.approx(float(skewed(new.z)), abs=1e-4)
        state = new


OTHERS = {
    "affine": Affine(jnp.array([1.0, 0.5]), jnp.array([[1.2, 0.0], [0.4, 0.8]])),
    "bent": Bent(
        shift=jnp.array([0.5, 1.0]),
        stretch=jnp.array([0.8, 0.5]),
        skew=jnp.array([0.3, 0.0]),
        tail=jnp.array([1.0, 1.3]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("coordinates", OTHERS.values(), ids=OTHERS)
def test_other_coordinates(coordinates):
    """A sampler trained in other coordinates moves the same chain."""
    sampler = ds.samplers.dis(2, 3, scale=1.5, network=ds.networks.free(8, 1))
    params = sampler.init(jax.random.key(0))
    kernel = DiffusionKernel(
        sampler, params, potential_fn=skewed, num_proposals=4, coordinates=coordinates
    )
    mcmc, go = run(kernel, 10_000, num_chains=4, chain_method="vectorized")
    go(extra_fields=("potential_energy",))
    check_moments(np.asarray(mcmc.get_samples(group_by_chain=True)))
    energies = jax.vmap(skewed)(mcmc.get_samples())
    found = mcmc.get_extra_fields()["potential_energy"]
    np.testing.assert_allclose(found, energies, atol=1e-3)


def test_log_weights_of_an_exact_sampler_are_log_z():
    """A reference that is the target itself: every move is accepted."""
    target = ds.targets.gaussian((1.0, -2.0), (4.0, 4.0), log_z=1.3)
    control = ds.networks.from_function(
        lambda key, dim: jnp.zeros(dim), lambda params, x, t, context: params + 0.0 * x
    )
    sampler = ds.samplers.dis(2, 4, loc=(1.0, -2.0), scale=2.0, network=control)
    params = sampler.init(jax.random.key(0))
    kernel = DiffusionKernel(sampler, params, potential_fn=target.energy)
    mcmc, go = run(kernel, 100)
    go(extra_fields=("log_weight", "accept_prob", "mean_accept_prob"))
    fields = mcmc.get_extra_fields()
    np.testing.assert_allclose(fields["log_weight"], 1.3, atol=1e-3)
    np.testing.assert_allclose(fields["accept_prob"], 1.0, atol=1e-3)
    np.testing.assert_allclose(fields["mean_accept_prob"], 1.0, atol=1e-3)
    assert len(np.unique(mcmc.get_samples(), axis=0)) == 100


METHODS = {
    "one": {},
    "sequential": {"num_chains": 2, "chain_method": "sequential"},
    "vectorized": {"num_chains": 2, "chain_method": "vectorized"},
    "vmap": {"num_chains": 2, "chain_method": jax.vmap},
}


KEYS = {"typed": jax.random.key, "raw": jax.random.PRNGKey}
WAYS = [
    (method, kind, bar)
    for method in METHODS
    for kind in KEYS
    for bar in (False, True)
    if not (method == "vmap" and bar)  # NumPyro shows none there
]


# NumPyro's own, where chains are mapped by a function.
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    ("method", "make_key", "bar"),
    mostly_slow(WAYS, ("one", "raw", False)),
)
def test_every_way_to_run_chains(method, make_key, bar, monkeypatch):
    if bar:  # which NumPyro hides on CI
        for name in ("CI", "PYTEST_XDIST_WORKER"):
            monkeypatch.delenv(name, raising=False)
    local = short_hmc(model, step_size=0.1)
    kernel = DiffusionKernel(*untrained(), model, local_kernel=local)
    options = METHODS[method]
    mcmc, go = run(
        kernel, 30, num_warmup=5, make_key=KEYS[make_key], **options, progress_bar=bar
    )
    go(DATA, extra_fields=("log_weight", "mean_accept_prob"))
    num_chains = options.get("num_chains", 1)
    samples = mcmc.get_samples(group_by_chain=True)
    assert sorted(samples) == ["double", "loc", "scale"]
    for name in samples:
        assert samples[name].shape == (num_chains, 30)
        assert np.all(np.isfinite(samples[name]))
    np.testing.assert_allclose(samples["double"], 2 * samples["loc"], rtol=1e-5)
    assert np.all(samples["scale"] > 0)
    assert len(np.unique(samples["loc"][0])) > 5
    go(DATA)  # no tracer is left over
    mcmc.post_warmup_state = mcmc.last_state
    monkeypatch.setattr(kernel, "init", lambda *_, **__: pytest.fail("init again"))
    mcmc.run(mcmc.post_warmup_state.rng_key, DATA)
    assert np.all(np.isfinite(mcmc.get_samples()["loc"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("make_key", KEYS)
@pytest.mark.parametrize("method", METHODS)
def test_x64(method, make_key, x64):
    sampler = ds.samplers.dis(2, 3, network=ds.networks.free(8, 1))
    params = sampler.init(jax.random.key(0))
    kernel = DiffusionKernel(sampler, params, model, local_kernel=NUTS(model))
    options = {"make_key": KEYS[make_key], **METHODS[method]}
    mcmc, go = run(kernel, 20, num_warmup=5, **options)
    go(DATA)
    assert mcmc.get_samples()["loc"].dtype == jnp.float64
    assert mcmc.last_state.log_weight.dtype == jnp.float64
    assert np.all(np.isfinite(mcmc.get_samples()["loc"]))


@pytest.mark.slow
def test_a_local_kernel_that_adapts():
    """NUTS finds step sizes and masses of each chain while the path is redrawn."""
    kernel = DiffusionKernel(*untrained(), model, local_kernel=NUTS(model))
    mcmc, go = run(
        kernel, 4_000, num_warmup=500, num_chains=4, chain_method="vectorized"
    )
    go(DATA, extra_fields=("local_state.adapt_state.step_size",))
    sizes = mcmc.get_extra_fields()["local_state.adapt_state.step_size"]
    assert len(np.unique(sizes)) == 4
    _check_against_nuts(mcmc, model)


@pytest.mark.slow
def test_the_model_gives_the_answer_of_nuts():
    kernel = DiffusionKernel(*untrained(), model, num_proposals=16)
    mcmc, go = run(kernel, 10_000, num_chains=4, chain_method="vectorized")
    go(DATA)
    _check_against_nuts(mcmc, model)


def _check_against_nuts(mcmc, model):
    """Means and mean squares of all sites of the model, given DATA."""
    nuts, go = run(NUTS(model), 5_000, num_warmup=500)
    go(DATA)
    exact = nuts.get_samples(group_by_chain=True)
    found = mcmc.get_samples(group_by_chain=True)
    assert exact.keys() == found.keys()
    for name in exact:
        # [chain, draw, number], powers side by side
        one, other = (
            np.concatenate([v, v**2], -1).astype(np.float64)
            for v in (
                np.reshape(m[name], (*m[name].shape[:2], -1)) for m in (found, exact)
            )
        )
        for column in range(one.shape[-1]):
            a, b = one[..., column], other[..., column]
            error = np.hypot(standard_error(a), standard_error(b))
            assert error < 0.1 * max(b.std(), 0.1)
            assert abs(a.mean() - b.mean()) < 4 * error


PARALLEL = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
import diffsamp as ds
from diffsamp.numpyro import DiffusionKernel

jax.config.update("jax_enable_x64", sys.argv[1] == "x64")
assert jax.local_device_count() == 2


def model(y=None):
    loc = numpyro.sample("loc", dist.Normal(0.0, 3.0))
    numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


sampler = ds.samplers.dis(1, 3, scale=2.0, network=ds.networks.free(8, 1))
params = sampler.init(jax.random.key(0))
for make_key, local, bar in (
    (jax.random.key, None, False),
    (jax.random.PRNGKey, NUTS(model), True),
):
    kernel = DiffusionKernel(sampler, params, model, local_kernel=local)
    mcmc = MCMC(
        kernel, num_warmup=5, num_samples=400, num_chains=2, chain_method="parallel",
        progress_bar=bar,
    )
    mcmc.run(make_key(0), jnp.array([0.5, 1.5]))
    mcmc.run(make_key(1), jnp.array([0.5, 1.5]))  # no tracer is left over
    loc = np.asarray(mcmc.get_samples(group_by_chain=True)["loc"])
    assert loc.shape == (2, 400)
    assert (loc.dtype == np.float64) == (sys.argv[1] == "x64")
    assert abs(loc.mean() - 18 / 19) < 0.3
    assert not np.array_equal(loc[0], loc[1])
    mcmc.post_warmup_state = mcmc.last_state
    kernel.init, init = None, kernel.init  # would fail if it were called
    mcmc.run(mcmc.post_warmup_state.rng_key, jnp.array([0.5, 1.5]))
    kernel.init = init
"""


@pytest.mark.slow
@pytest.mark.parametrize("floats", ["x32", "x64"])
def test_parallel_on_two_devices(floats, tmp_path):
    """In a process of its own: the number of devices is set before JAX starts."""
    program = tmp_path / "parallel.py"
    program.write_text(PARALLEL)
    root = str(pathlib.Path(ds.__file__).parents[1])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), floats],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2_000:]


@pytest.mark.slow
def test_data_may_be_traced():
    kernel = DiffusionKernel(*untrained(), model, local_kernel=short_hmc(model))
    mcmc, go = run(kernel, 100, num_warmup=5, jit_model_args=True)
    for data in (DATA, DATA + 100.0):
        go(data)
        assert np.all(np.isfinite(mcmc.get_samples()["loc"]))
    plain, go = run(
        DiffusionKernel(*untrained(), model, local_kernel=short_hmc(model)),
        100,
        num_warmup=5,
    )
    go(DATA + 100.0)
    np.testing.assert_allclose(
        mcmc.get_samples()["loc"], plain.get_samples()["loc"], rtol=1e-3
    )


@pytest.mark.slow
def test_starts_may_be_given():
    kernel = DiffusionKernel(*untrained(), model)
    start = {"loc": jnp.array(0.25), "scale": jnp.array(-0.5)}
    state = kernel.init(jax.random.key(0), 0, start, (DATA,), {})
    assert state.z == start
    both = jax.tree.map(lambda a: jnp.stack([a, a + 1]), start)
    keys = jax.random.split(jax.random.key(0), 2)
    state = kernel.init(keys, 0, both, (DATA,), {})
    np.testing.assert_array_equal(state.z["loc"], both["loc"])
    assert state.log_weight.shape == (2,)
    energy = target_from_model(model, (DATA,)).energy
    expected = [energy(jnp.array([v, w])) for v, w in zip(both["loc"], both["scale"])]
    np.testing.assert_allclose(state.potential_energy, expected, rtol=1e-5)


def test_chains_start_where_the_sampler_has_too_little():
    """Of points found without it; so chains that all lack a mode are not agreed."""

    def two(x):
        return -jnp.logaddexp(-0.5 * jnp.sum(x**2), -0.5 * jnp.sum((x - 30.0) ** 2))

    points = np.concatenate([np.zeros((90, 2)), np.full((10, 2), 30.0)])
    keys = jax.random.split(jax.random.key(0), 4)
    lost = DiffusionKernel(*untrained(), potential_fn=two)
    assert np.all(np.abs(lost.init(keys, 0).z) < 15)
    found = DiffusionKernel(*untrained(), potential_fn=two, starts=points)
    np.testing.assert_array_equal(found.init(keys, 0).z, 30.0)


def test_a_bad_start_is_left():
    """From a point without density every proposal is better."""
    kernel = DiffusionKernel(
        *untrained(), potential_fn=lambda x: jnp.where(x[0] > 90, jnp.nan, skewed(x))
    )
    state = kernel.init(jax.random.key(0), 0, jnp.array([99.0, 0.0]))
    assert state.log_weight == -np.inf
    state = kernel.sample(state, (), {})
    assert np.isfinite(state.log_weight)
    assert state.accept_prob == 1


@pytest.mark.slow
def test_pickle():
    kernel = DiffusionKernel(*untrained(), model, local_kernel=short_hmc(model))
    mcmc, go = run(kernel, 20)
    go(DATA)
    again = pickle.loads(pickle.dumps(mcmc))
    again.run(jax.random.key(1), DATA)
    assert again.get_samples()["loc"].shape == (20,)
    assert pickle.loads(pickle.dumps(kernel))._sample_fn is None


@pytest.mark.slow
def test_as_a_block_of_gibbs():
    """Sites of several supports, coupled to an improper one that NUTS moves."""
    mcmc, go = run(in_blocks(), 6_000, num_warmup=300)
    go(DATA)
    _check_against_nuts(mcmc, coupled)


@pytest.mark.slow
def test_a_support_that_moves():
    """x is uniform below a site above it; NUTS has the same sites from its replay."""

    def moving(y=None):
        top = numpyro.sample("top", dist.LogNormal(0.5, 0.5))
        x = numpyro.sample("x", dist.Uniform(0.0, top))
        numpyro.sample("y", dist.Normal(x, 1.0).expand([4]).to_event(1), obs=y)

    kernel = DiffusionKernel(*untrained(), moving, num_proposals=16)
    mcmc, go = run(kernel, 10_000, num_chains=4, chain_method="vectorized")
    go(DATA)
    samples = mcmc.get_samples()
    assert np.all(samples["x"] < samples["top"])
    _check_against_nuts(mcmc, moving)


def coupled(y=None):
    share = numpyro.sample("share", dist.Dirichlet(jnp.array([2.0, 3.0, 1.0])))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    loc = numpyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    mean = loc + share[0] + 2 * share[1]
    numpyro.sample("y", dist.Normal(mean, 0.1 + scale), obs=y)


def in_blocks():
    block = DiffusionKernel(*untrained(3), coupled, num_proposals=8)
    return Gibbs([(block, ["share", "scale"]), (NUTS(coupled), None)])


def test_starts_of_a_block_of_gibbs_are_of_its_sites():
    start = {"scale": jnp.array(0.25)}
    state = in_blocks().init(jax.random.key(0), 0, start, (DATA,), {})
    assert float(jnp.exp(state.z["scale"])) == pytest.approx(0.25)


def test_gibbs_with_supports_that_move():
    def moving(y=None):
        top = numpyro.sample("top", dist.HalfNormal(1.0))
        numpyro.sample("x", dist.Uniform(0.0, top))

    block = DiffusionKernel(*untrained(1), moving)
    kernel = Gibbs([(block, ["x"]), (NUTS(moving), ["top"])])
    with pytest.raises(ValueError, match=r"supports of sites .*'x'.* depend on"):
        kernel.init(jax.random.key(0), 0, None, (DATA,), {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": model, "potential_fn": skewed}, "either model or potential_fn"),
        ({}, "either model or potential_fn"),
        ({"potential_fn": skewed, "num_proposals": 0}, "at least 1, got 0"),
        ({"potential_fn": skewed, "num_proposals": 2.0}, "an integer, got 2.0"),
        ({"potential_fn": skewed, "starts": np.ones(2)}, r"starts must .* shape \[2\]"),
        ({"potential_fn": skewed, "local_kernel": 3}, "local_kernel .* got int"),
        ({"model": model, "local_kernel": BarkerMH(model)}, "moved to .* BarkerMH"),
        ({"model": model, "local_kernel": NUTS(skewed)}, "the same model.*skewed"),
        (
            {"potential_fn": skewed, "local_kernel": NUTS(potential_fn=abs)},
            "same potential_fn.*abs",
        ),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        DiffusionKernel(*untrained(), **change)


def test_samplers_that_cannot_be_and_parameters_of_others_are_named():
    sampler, _ = untrained()
    flow = ds.probability_flow(ds.samplers.dis(2, 3))
    with pytest.raises(ValueError, match="no valid weight"):
        DiffusionKernel(flow, flow.sampler.init(jax.random.key(0)), model)
    with pytest.raises(ValueError, match="params are not those of this sampler"):
        DiffusionKernel(sampler, untrained(3)[1], model)


def test_a_start_of_another_shape_is_named():
    kernel = DiffusionKernel(*untrained(), model)
    with pytest.raises(ValueError, match=r"init_params .* shapes \{'loc': \(\), .*got"):
        kernel.init(jax.random.key(0), 0, {"loc": jnp.zeros(2)}, (DATA,), {})


def test_a_sampler_of_another_dimension_is_named():
    kernel = DiffusionKernel(*untrained(3), model)
    with pytest.raises(ValueError, match=r"dim=3, the unconstrained sites .*loc.* 2"):
        kernel.init(jax.random.key(0), 0, None, (DATA,), {})
