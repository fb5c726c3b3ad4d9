"""Drawing: the same draws whatever the chunks, honest counts, honest verdicts.

A VP sampler whose reference is the Gaussian target itself is exact without training;
a reference of another scale or place makes it as good or bad as a test wants.
"""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import diffsamp as ds

NUM_STEPS = 4
CONTROL = ds.networks.from_function(
    lambda key, dim: jnp.zeros(dim), lambda params, x, t, context: params + 0.0 * x
)


def sampler_at(loc, scale, dim=2, num_steps=NUM_STEPS, network=CONTROL):
    return ds.samplers.dis(dim, num_steps, loc=loc, scale=scale, network=network)


def start(sampler):
    return sampler.init(jax.random.key(0))


GAUSSIAN = ds.targets.gaussian((1.0, -2.0), (4.0, 4.0), log_z=1.3)
EXACT = sampler_at((1.0, -2.0), 2.0)
WIDE = sampler_at((1.0, -2.0), 2.5)  # weights with a finite variance


def draw(num_draws, sampler=WIDE, target=GAUSSIAN, seed=1, **options):
    return ds.draw(
        jax.random.key(seed),
        sampler,
        start(sampler),
        target.energy,
        num_draws=num_draws,
        **options,
    )


@pytest.fixture(scope="module")
def wide():
    return draw(4_000)


# ------------------------------------------------------------------ shapes and chunks


def test_fields(wide):
    assert wide.x.shape == (4_000, 2)
    assert wide.log_weight.shape == wide.energy.shape == (4_000,)
    assert isinstance(wide.x, np.ndarray)
    energy = jax.vmap(GAUSSIAN.energy)(jnp.asarray(wide.x))
    np.testing.assert_allclose(wide.energy, energy, rtol=1e-4, atol=1e-4)
    assert isinstance(wide, ds.Draws)
    assert isinstance(wide.log_evidence, ds.LogEvidence)
    assert isinstance(wide.diagnostics, ds.Diagnostics)


def test_other_devices_take_whole_batches(wide, monkeypatch):
    """Not blocks of few rows, one after the other; the draws are the same."""
    monkeypatch.setattr(ds.meshes, "on_cpu", lambda mesh: False)
    few, many = (ds.batching.blocks_of(None, n, None) for n in (1_000, 4_000))
    assert few == (1, ds.batching.BATCH)
    assert many == (1, ds.batching.LARGE_BATCH)
    found = draw(4_000)
    np.testing.assert_allclose(found.x, wide.x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.log_weight, wide.log_weight, atol=1e-5)


def test_smoothed_weights(wide):
    found = ds.diagnostics.pareto_smooth(wide.log_weight)
    np.testing.assert_array_equal(wide.smoothed_log_weight, found.log_weight)
    changed = wide.smoothed_log_weight != wide.log_weight
    assert 0 < np.sum(changed) <= 3 * np.sqrt(4_000) + 1  # the tail alone
    assert wide._replace(log_weight=None).smoothed_log_weight is None


def test_draws_are_a_pytree(wide):
    doubled = jax.tree.map(lambda a: a, wide)
    assert type(doubled) is ds.Draws
    assert doubled.diagnostics.verdict == wide.diagnostics.verdict
    np.testing.assert_array_equal(doubled.x, wide.x)


@pytest.mark.parametrize("batch_size", [1, 256, 1_000, 8_192])
def test_batch_size_changes_nothing(wide, batch_size):
    num = 300 if batch_size == 1 else 4_000
    other = draw(num, batch_size=batch_size)
    for name in ("x", "log_weight", "energy"):
        np.testing.assert_array_equal(getattr(other, name), getattr(wide, name)[:num])


@pytest.mark.parametrize("num", [1, 255, 256, 257, 1_024, 1_025])
def test_fewer_draws_are_the_first_ones(wide, num):
    fewer = draw(num)
    np.testing.assert_array_equal(fewer.x, wide.x[:num])
    np.testing.assert_array_equal(fewer.log_weight, wide.log_weight[:num])


def test_keys(wide):
    raw = ds.draw(
        jax.random.PRNGKey(1), WIDE, start(WIDE), GAUSSIAN.energy, num_draws=300
    )
    np.testing.assert_array_equal(raw.x, wide.x[:300])
    assert not np.array_equal(draw(300, seed=2).x, wide.x[:300])
    assert len(np.unique(wide.x, axis=0)) == 4_000


def test_draws_are_those_of_the_sampler(wide):
    key = jax.random.fold_in(jax.random.key(1), 17)
    one = WIDE(start(WIDE), key, GAUSSIAN.energy)
    np.testing.assert_allclose(one.x, wide.x[17], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.log_weight, wide.log_weight[17], atol=1e-4)


def test_log_weights_of_given_points_do_not_depend_on_chunks():
    x = GAUSSIAN.sample(jax.random.key(3), 600)

    def trace(x, batch_size):
        return ds.log_weights_of(
            jax.random.key(4), WIDE, start(WIDE), GAUSSIAN.energy, x, batch_size
        )

    whole = trace(x, 1_024)
    assert whole.shape == (600,)
    np.testing.assert_array_equal(trace(x, 256), whole)
    np.testing.assert_array_equal(trace(x[:300], 1_024), whole[:300])


# --------------------------------------------------------------------------- bad input


def test_parameters_of_another_sampler():
    key, other = jax.random.key(0), start(sampler_at((1.0, -2.0, 0.0), 2.5, dim=3))
    for params in ({}, {"sampler": start(WIDE)}, other):
        with pytest.raises(ValueError, match="params are not those of this sampler"):
            ds.draw(key, WIDE, params, GAUSSIAN.energy, 10)
        with pytest.raises(ValueError, match="params are not those of this sampler"):
            ds.log_weights_of(key, WIDE, params, GAUSSIAN.energy, np.zeros((5, 2)))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("num_draws must be at least 1, got 0", {"num_draws": 0}),
        ("num_draws must be at least 1, got -3", {"num_draws": -3}),
        ("num_draws must be an integer, got 1000.0", {"num_draws": 1e3}),
        ("batch_size must be at least 1, got 0", {"num_draws": 10, "batch_size": 0}),
        ("batch_size must be an integer", {"num_draws": 10, "batch_size": 2.5}),
    ],
)
def test_numbers_that_are_none(words, options):
    with pytest.raises(ValueError, match=words):
        draw(**options)


@pytest.mark.parametrize(
    ("words", "energy"),
    [
        ("scalar", lambda x: x),
        ("dim=2", ds.targets.gaussian((0.0, 0.0, 0.0), 1.0).energy),
        ("floating", lambda x: jnp.sum(x > 0)),
        ("target.energy", GAUSSIAN),
    ],
)
def test_bad_energies(words, energy):
    with pytest.raises(ValueError, match=words):
        ds.draw(jax.random.key(0), WIDE, start(WIDE), energy, num_draws=10)


@pytest.mark.parametrize("shape", [(5,), (0, 2), (5, 3), (2, 5, 2)])
def test_bad_points(shape):
    with pytest.raises(ValueError, match="shape"):
        ds.log_weights_of(
            jax.random.key(0), WIDE, start(WIDE), GAUSSIAN.energy, np.zeros(shape)
        )
    with pytest.raises(ValueError, match="shape"):
        draw(10, probe=np.zeros(shape))


def test_probe_points_must_be_finite():
    with pytest.raises(ValueError, match="finite"):
        draw(10, probe=np.full((5, 2), np.nan))


# ---------------------------------------------------------------------------- counting


def test_evaluations_are_counted(wide):
    report = wide.diagnostics
    counts = (
        report.num_energy_evaluations,
        report.num_gradient_evaluations,
        report.num_network_evaluations,
    )
    assert counts == (4_000, 0, 4_000 * NUM_STEPS)


def test_evaluations_of_the_probe_are_counted():
    control = ds.networks.from_function(
        lambda key, dim: jnp.zeros(dim),
        lambda params, x, t, context: params * context.score,
        needs_score=True,
    )
    guided = sampler_at((1.0, -2.0), 2.5, network=control)
    plain = draw(10, guided).diagnostics
    assert plain.num_energy_evaluations == 0
    assert plain.num_gradient_evaluations == 10 * (NUM_STEPS + 1)
    probe = ds.Probe(
        jnp.zeros((7, 2)), num_energy_evaluations=5, num_gradient_evaluations=9
    )
    with_probe = draw(10, guided, probe=probe).diagnostics
    assert with_probe.num_energy_evaluations == 5
    assert with_probe.num_gradient_evaluations == 17 * (NUM_STEPS + 1) + 9
    assert with_probe.num_network_evaluations == 17 * NUM_STEPS


# ---------------------------------------------------------------------------- evidence


def test_exact_sampler_has_constant_weights():
    draws = draw(1_000, EXACT)
    np.testing.assert_allclose(draws.log_weight, 1.3, atol=1e-3)
    assert draws.diagnostics.ess_fraction > 0.999
    assert draws.log_evidence.upper is None


def test_log_evidence_covers_the_truth(wide):
    evidence = wide.log_evidence
    assert 0 < evidence.standard_error < 0.1
    assert abs(evidence.estimate - 1.3) < 4 * evidence.standard_error
    assert evidence.lower < 1.3
    assert wide.diagnostics.pareto_k < 0.5


def test_target_draws_give_an_upper_bound(wide):
    probe = GAUSSIAN.sample(jax.random.key(8), 1_000)
    evidence = draw(4_000, probe=probe).log_evidence
    assert evidence.lower < 1.3 < evidence.upper
    assert evidence[:3] == wide.log_evidence[:3]
    unknown = ds.Probe(probe)  # points of unknown origin bound nothing
    assert draw(4_000, probe=unknown).log_evidence.upper is None


# -------------------------------------------------------------------------- resampling


def made(log_weight, x=None):
    """Draws with given weights; the points are their own numbers."""
    number = len(log_weight) if log_weight is not None else len(x)
    x = np.arange(number, dtype=np.float32)[:, None] if x is None else x
    evidence = ds.LogEvidence(0.0, 0.0, 0.0, None)
    report = ds.diagnostics.diagnose(np.zeros(30))
    return ds.Draws(x, log_weight, np.zeros(number), evidence, report)


def shares(draws, num, seed=0):
    index = draws.resample(jax.random.key(seed), num)[:, 0].astype(int)
    return np.bincount(index, minlength=len(draws.x)) / num


def test_resampling_respects_the_weights():
    weights = np.array([0.5, 0.0, 0.125, 0.3, 0.075])
    log_weight = np.log(np.maximum(weights, 1e-300)) + 1_000.0  # no overflow
    log_weight[1] = -np.inf
    # Systematic: no share is off by more than one draw.
    for num in (1, 7, 1_000):
        off = np.abs(shares(made(log_weight), num) - weights)
        assert np.all(off * num < 1 + 1e-9)


def test_resampling_is_unbiased():
    weights = np.array([0.55, 0.3, 0.15])
    draws = made(np.log(weights))
    mean = np.mean([shares(draws, 2, seed) for seed in range(400)], axis=0)
    np.testing.assert_allclose(mean, weights, atol=4 * np.sqrt(0.25 / 400))


def test_resampled_order_is_random():
    resampled = made(np.zeros(500)).resample(jax.random.key(0), 500)[:, 0]
    assert sorted(resampled) == list(range(500))
    assert abs(np.corrcoef(resampled, np.arange(500))[0, 1]) < 0.2


def test_resampling_ignores_zero_and_nan():
    log_weight = np.full(50, -np.inf)
    log_weight[[0, 10]] = np.nan
    log_weight[[20, 30]] = -5.0
    for seed in range(20):
        share = shares(made(log_weight), 3, seed)
        assert share[[20, 30]].sum() == 1


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_resampling_nothing(value):
    with pytest.raises(ValueError, match="zero weight"):
        made(np.full(5, value)).resample(jax.random.key(0), 3)


def test_resampling_infinite_weights_takes_them_alone():
    share = shares(made(np.array([0.0, np.inf, 1.0, np.inf])), 100)
    np.testing.assert_allclose(share, [0.0, 0.5, 0.0, 0.5])


def test_resampling_without_weights():
    assert shares(made(None, x=np.arange(4.0)[:, None]), 100).max() == 0.25


def test_resampling_a_bad_number(wide):
    assert wide.resample(jax.random.PRNGKey(0), 5).shape == (5, 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        wide.resample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match=r"num must be an integer, got 2\.5"):
        wide.resample(jax.random.key(0), 2.5)


def test_resampling_moves_the_moments(wide):
    equal = wide.resample(jax.random.key(7), 4_000)
    np.testing.assert_allclose(wide.x.std(axis=0), 2.5, rtol=0.06)
    np.testing.assert_allclose(equal.std(axis=0), 2.0, rtol=0.06)


# ---------------------------------------------------------------------------- verdicts


def _two_modes(x):
    left, right = (jnp.sum((x - m) ** 2) for m in (-4.0, 4.0))
    return -jnp.logaddexp(-0.5 * left, -0.5 * right)


TWO_MODES = ds.Target(energy=Partial(_two_modes), dim=2)
ONE_OF_TWO = sampler_at((4.0, 4.0), 1.0)


def two_mode_draws(num):
    """Exact, [num, 2]: the energy sums the modes' unit Gaussians with equal weight."""
    sign_key, key = jax.random.split(jax.random.key(11))
    sign = jax.random.rademacher(sign_key, (num, 1), jnp.float32)
    return 4.0 * sign + jax.random.normal(key, (num, 2))


def test_collapse_is_not_seen_without_a_probe():
    draws = draw(2_000, ONE_OF_TWO, TWO_MODES)
    assert draws.diagnostics.ess_fraction > 0.99  # full marks to itself
    assert draws.diagnostics.verdict == "reweight (coverage unchecked)"
    assert not draws.diagnostics.collapsed
    assert draws.diagnostics.missing_mass is None


@pytest.mark.parametrize("wrap", [ds.probes.given, np.asarray])
def test_collapse_is_loud_with_a_probe(wrap):  # more probes: test_probes.py
    probe = wrap(two_mode_draws(1_000))
    report = draw(2_000, ONE_OF_TWO, TWO_MODES, probe=probe).diagnostics
    assert report.verdict.startswith("do not trust")
    assert "lost a part of the target" in report.verdict
    assert report.collapsed
    assert 0.3 < report.missing_mass < 0.7
    assert report.missing_mass > report.coverage_tolerance


def test_a_good_sampler_is_trusted_with_a_probe():
    probe = ds.probes.given(GAUSSIAN.sample(jax.random.key(5), 1_000))
    report = draw(2_000, EXACT, probe=probe).diagnostics
    assert report.verdict == "trust"
    assert not report.collapsed
    report = draw(4_000, WIDE, probe=probe).diagnostics
    assert report.verdict.startswith("trust (with the weights")


def test_a_trained_sampler_is_trusted_with_a_probe():
    target = ds.targets.gaussian((1.0, -1.0), 1.0, log_z=-2.0)
    control = ds.networks.from_function(
        lambda key, dim: {"shift": jnp.zeros(dim), "gain": jnp.zeros(dim)},
        lambda params, x, t, context: params["shift"] - params["gain"] * x,
    )
    sampler = sampler_at(0.0, 1.5, num_steps=8, network=control)
    fit = ds.fit(
        jax.random.key(0),
        sampler,
        ds.objectives.log_variance(),
        target.energy,
        optimizer=optax.adam(1e-2),
        batch_size=64,
        num_updates=500,
        progress_bar=False,
    )
    draws = ds.draw(
        jax.random.key(1),
        sampler,
        fit.params,
        target.energy,
        num_draws=2_000,
        probe=target.sample(jax.random.key(2), 1_000),
    )
    assert draws.diagnostics.verdict.startswith("trust")
    assert draws.diagnostics.ess_fraction > 0.5
    evidence = draws.log_evidence
    assert abs(evidence.estimate + 2.0) < 4 * evidence.standard_error


@pytest.mark.parametrize("num", [1, 2, 24, 25, 30])
def test_a_handful_of_draws_is_never_trusted(num):
    probe = GAUSSIAN.sample(jax.random.key(5), 1_000)
    for options in ({}, {"probe": probe}):
        draws = draw(num, EXACT, **options)
        assert not draws.diagnostics.verdict.startswith("trust")
        if num < 25:
            assert draws.diagnostics.verdict.startswith("do not trust")
            assert draws.log_evidence.standard_error == np.inf


def test_a_handful_of_probe_points_is_never_trusted():
    probe = GAUSSIAN.sample(jax.random.key(5), 20)
    assert draw(2_000, EXACT, probe=probe).diagnostics.verdict.startswith("reweight")


@pytest.mark.parametrize(
    "name", ["manywell", pytest.param("gmm25", marks=pytest.mark.slow)]
)
def test_an_untrained_sampler_on_a_hard_target_is_not_trusted(name):
    target = getattr(ds.targets, name)()
    sampler = sampler_at(0.0, 1.0, target.dim)  # narrow
    for probe in (None, target.sample(jax.random.key(2), 1_000)):
        draws = draw(1_000, sampler, target, probe=probe)
        verdict = draws.diagnostics.verdict
        assert verdict.startswith(("do not trust", "reweight"))
        if probe is not None:
            assert verdict.startswith("do not trust")
            assert draws.diagnostics.missing_mass > 0.5


def test_weights_that_are_not_numbers_are_reported():
    def energy(x):
        return jnp.where(x[0] > 1.0, jnp.nan, GAUSSIAN.energy(x))

    with pytest.warns(RuntimeWarning, match="NaN"):
        draws = ds.draw(jax.random.key(0), EXACT, start(EXACT), energy, num_draws=400)
    assert draws.diagnostics.num_nonfinite == np.isnan(draws.log_weight).sum() > 100
    assert draws.diagnostics.verdict.startswith("do not trust")
    equal = draws.resample(jax.random.key(1), 100)
    assert np.all(equal[:, 0] <= 1.0)


def test_a_hard_boundary_is_not_an_error():
    """+inf energies are zero weights, not failures: half of a Gaussian."""

    def energy(x):
        return jnp.where(x[0] > 1.0, jnp.inf, GAUSSIAN.energy(x))

    draws = ds.draw(jax.random.key(0), EXACT, start(EXACT), energy, num_draws=4_000)
    assert draws.diagnostics.num_nonfinite == 0
    evidence = draws.log_evidence
    assert evidence.lower == -np.inf
    assert abs(evidence.estimate - (1.3 - np.log(2))) < 4 * evidence.standard_error
    assert draws.diagnostics.verdict == "reweight (coverage unchecked)"


# ------------------------------------------------------------------------------ memory

MEMORY = """
import pathlib
import jax, diffsamp as ds
target = ds.targets.funnel_easy()
sampler = ds.samplers.dis(target.dim, 100, scale=target.scale)
params = sampler.init(jax.random.key(0))
draws = ds.draw(jax.random.key(1), sampler, params, target.energy, num_draws=1_000_000)
assert draws.x.shape == (1_000_000, 10)
draws.resample(jax.random.key(2), 1_000_000)
# Not `ru_maxrss`, which a child inherits from the process that started it.
status = pathlib.Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_million_draws_fit_in_one_gigabyte():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=pathlib.Path(ds.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=3_600,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert int(done.stdout.split()[-1]) * 1_024 < 1e9
