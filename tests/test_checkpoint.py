"""Files: nothing trained is lost, nothing foreign is overwritten or unpickled."""

import builtins
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import diffsamp as ds
from diffsamp import checkpoint
from diffsamp.checkpoint import MAGIC

DIM, NUM_STEPS, BATCH, TOTAL = 2, 4, 16, 24
SLOW = pytest.mark.slow


def _init(key, dim):
    del key
    return {"shift": jnp.zeros(dim), "gain": jnp.zeros(())}


def _drift(params, x, t, context):
    del t, context
    return params["shift"] - params["gain"] * x


CONTROL = ds.networks.from_function(_init, _drift)
SAMPLER = ds.samplers.dis(DIM, NUM_STEPS, scale=1.5, network=CONTROL)
TINY = ds.networks.score_guided(width=8, depth=1)


def _energy(mean, x):
    return 0.5 * jnp.sum((x - mean) ** 2)


def _anneal(progress):
    return 1.0 - 0.5 * progress


def fit(num_updates=TOTAL, *, sampler=SAMPLER, objective=None, **options):
    mean = options.pop("mean", 1.0)
    defaults = {
        "batch_size": BATCH,
        "progress_bar": False,
        "updates_per_chunk": 4,
        "anneal": _anneal,
    }
    return ds.fit(
        jax.random.key(0),
        sampler,
        objective or ds.objectives.log_variance(),
        Partial(_energy, jnp.full(DIM, mean)),
        num_updates=num_updates,
        **(defaults | options),
    )


def assert_same(a, b):
    """Equal to the last bit, keys included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run, without a checkpoint."""
    return fit()


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """What a run that dies after twelve of its updates leaves behind."""
    folder = tmp_path_factory.mktemp("halfway")
    path, copy = folder / "run.ds", folder / "copy.ds"

    def copy_at_twelve(count, metrics):
        del metrics
        if count == 12:
            shutil.copy(path, copy)

    fit(checkpoint=path, checkpoint_seconds=0.0, callback=copy_at_twelve)
    return copy


# ------------------------------------------------------------------ samplers and params


def _samplers():
    loc, scale = (0.5, -1.0, 2.0), (1.0, 2.0, 0.25)
    place = {"loc": loc, "scale": scale, "network": TINY}
    networks, schedules = ds.networks, ds.schedules
    yield "pis", ds.samplers.pis(3, 5, time_grid=schedules.power_grid(2.0), **place)
    yield "dis", ds.samplers.dis(3, 5, schedule=schedules.cosine(1e-5), **place)
    yield (
        "dis, defaults but for the width",
        ds.samplers.dis(3, 7, network=networks.annealed_score_guided(4, 3, offset=0.5)),
    )
    yield (
        "dds",
        ds.samplers.dds(
            3, 5, schedule=schedules.linear(15.0, 0.2), scale=0.7, network=TINY
        ),
    )
    yield "dds, cos^4", ds.samplers.dds(3, 4, network=networks.free(8, 1), loc=loc)
    yield (
        "gbs",
        ds.samplers.gbs(
            3,
            5,
            diffusion=0.8,
            destruction_network=networks.reference_guided(4, 1),
            **place,
        ),
    )
    yield "tied", ds.samplers.scds(3, 4, learn_generation_variance=True, loc=loc)
    widened = dataclasses.replace(ds.samplers.dis(3, 5), widths=ds.Widths(0.1, -0.2))
    yield "widths", widened
    yield "conditional", ds.samplers.dis(3, 5, condition_dim=2, network=TINY)
    yield "gmp", ds.samplers.gmp(3, 2, 5, loc=loc, scale=scale)
    yield (
        "learned kernels on a shared backbone",
        ds.samplers.pis(
            3,
            5,
            learn_generation_variance=True,
            learn_destruction=True,
            backbone=networks.backbone(4, 1),
            destruction_bounds=ds.Bounds(1.5, shift=2.0),
        ),
    )


SAMPLERS = list(_samplers())


@pytest.mark.parametrize(
    "sampler", [s for _, s in SAMPLERS], ids=[name for name, _ in SAMPLERS]
)
def test_save_and_load(tmp_path, sampler):
    params = jax.tree.map(
        lambda p: p + jnp.sqrt(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape),
        sampler.init(jax.random.key(1)),
    )
    ds.save(tmp_path / "s.ds", sampler, params)
    again, loaded = ds.load(tmp_path / "s.ds")
    assert again == sampler
    assert hash(again) == hash(sampler)
    assert_same(loaded, params)
    assert os.listdir(tmp_path) == ["s.ds"]


def test_load_at_another_step_count(tmp_path):
    sampler = ds.samplers.dis(2, 8, network=TINY)
    ds.save(tmp_path / "s.ds", sampler, sampler.init(jax.random.key(0)))
    again, _ = ds.load(tmp_path / "s.ds")
    assert again.with_num_steps(2) == sampler.with_num_steps(2)


def test_a_control_of_ones_own_needs_the_sampler(tmp_path):
    params = {"generation": {"shift": jnp.ones(2), "gain": jnp.full((), 3.0)}}
    ds.save(tmp_path / "s.ds", SAMPLER, params)
    with pytest.raises(ds.CheckpointError, match="sampler=sampler"):
        ds.load(tmp_path / "s.ds")
    again, loaded = ds.load(tmp_path / "s.ds", sampler=SAMPLER)
    assert again == SAMPLER
    assert_same(loaded, params)


@pytest.mark.parametrize(
    "other",
    [
        ds.samplers.dis(3, NUM_STEPS, network=CONTROL),
        ds.samplers.dis(2, NUM_STEPS, network=TINY),
        ds.samplers.gbs(2, network=CONTROL, destruction_network=CONTROL),
    ],
    ids=["dim", "network", "destruction"],
)
def test_a_sampler_that_does_not_fit(tmp_path, other):
    ds.save(tmp_path / "s.ds", SAMPLER, SAMPLER.init(jax.random.key(0)))
    with pytest.raises(ds.CheckpointError, match="another configuration"):
        ds.load(tmp_path / "s.ds", sampler=other)


def test_more_parameters_than_wanted_are_not_dropped(tmp_path):
    more = ds.samplers.gbs(2, network=CONTROL, destruction_network=CONTROL)
    ds.save(tmp_path / "s.ds", more, more.init(jax.random.key(0)))
    with pytest.raises(ds.CheckpointError, match="destruction/gain"):
        ds.load(tmp_path / "s.ds", sampler=SAMPLER)


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64(tmp_path):
    sampler = ds.samplers.dis(2, 4, network=TINY)
    params = jax.tree.map(lambda p: p + 1e-12, sampler.init(jax.random.key(0)))
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float64")}
    ds.save(tmp_path / "s.ds", sampler, params)
    assert_same(ds.load(tmp_path / "s.ds")[1], params)
    jax.config.update("jax_enable_x64", False)  # the fixture puts it back
    with pytest.raises(ds.CheckpointError, match=r"float64.*wanted float32"):
        ds.load(tmp_path / "s.ds")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "s.ds"
    ds.save(path, SAMPLER, SAMPLER.init(jax.random.key(0)))
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="no space"):
                ds.save(path, SAMPLER, {"generation": {"shift": jnp.ones(2)}})
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["s.ds"]


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ds.load(tmp_path / "nothing.ds")


# ----------------------------------------------------------------------------- resuming


def test_checkpoint_changes_nothing(whole, tmp_path):
    result = fit(checkpoint=tmp_path / "run.ds", checkpoint_seconds=0.0)
    assert_same(result.state, whole.state)
    assert os.listdir(tmp_path) == ["run.ds"]


def test_resume_ends_where_the_whole_run_ends(whole, halfway, tmp_path):
    path = shutil.copy(halfway, tmp_path / "run.ds")
    counts = []
    result = fit(checkpoint=path, callback=lambda count, _: counts.append(count))
    assert counts == [16, 20, 24]
    assert_same(result.state, whole.state)
    assert_same(result.params, whole.params)
    assert_same(result.metrics, whole.metrics)
    for name in ("num_energy_evaluations", "num_network_evaluations", "num_skipped"):
        assert getattr(result, name) == getattr(whole, name)


def test_behaviours_with_buffers_resume_to_the_same_bits(tmp_path):
    """Interrupted between two searches, with all that they have found on file."""
    behaviours, buffers = ds.behaviours, ds.buffers
    options = {"every": 3, "num_chains": 4, "num_steps": 4, "num_burn_in": 2}
    search = behaviours.local_search(64, priority=buffers.by_weight(), **options)
    other = behaviours.local_search(64, priority=buffers.by_weight(0.9), **options)
    behaviour, another = (
        behaviours.mixture((behaviours.on_policy(), 1), (member, 1))
        for member in (search, other)
    )
    path = tmp_path / "run.ds"
    options = {"behaviour": behaviour, "updates_per_chunk": 4}
    uninterrupted = fit(12, **options)
    stop = {"callback": lambda count, _: count == 4}
    stopped = fit(12, checkpoint=path, **options, **stop)
    assert int(stopped.state.count) == 4
    resumed = fit(12, checkpoint=path, **options)
    assert_same(resumed.state, uninterrupted.state)
    assert_same(resumed.metrics, uninterrupted.metrics)
    assert resumed.num_gradient_evaluations == uninterrupted.num_gradient_evaluations
    state = resumed.state.behaviour_state[-1]
    assert int(state.num_searches) == 4
    assert int(state.searched.size) > int(
        stopped.state.behaviour_state[-1].searched.size
    )
    _refused(path, "another configuration", behaviour=another)


def _with_state():
    o, b = ds.objectives, ds.behaviours
    learned = ds.samplers.dis(
        DIM, NUM_STEPS, network=CONTROL, destruction_network=CONTROL
    )
    trust = {"objective": o.trust_region_log_variance()}
    pooled = b.smc_seeded(32, every=3, num_mcmc_steps=1, num_runs=2)
    pooled = b.mixture((b.on_policy(), 0.5), (pooled, 0.5))
    copy = o.target_copy(o.trajectory_balance(), rate=0.1)
    return {
        "trust_region": trust | {"behaviour": b.trust_region(32, every=3)},
        "smc_pooled": {"behaviour": pooled},
        "target_copy": {"objective": copy, "sampler": learned},
    }


@pytest.mark.parametrize(
    "name",
    [
        "target_copy",
        *(pytest.param(n, marks=SLOW) for n in ("trust_region", "smc_pooled")),
    ],
)
def test_what_rounds_and_copies_hold_resumes_to_the_same_bits(tmp_path, name):
    """Interrupted in the middle of a round, and while the copy lags behind."""
    options = _with_state()[name] | {"updates_per_chunk": 4}
    uninterrupted = fit(8, **options)
    path = tmp_path / "run.ds"
    stop = {"callback": lambda count, _: count == 4}
    assert int(fit(8, checkpoint=path, **options, **stop).state.count) == 4
    resumed = fit(8, checkpoint=path, **options)
    assert_same(resumed.state, uninterrupted.state)
    assert_same(resumed.metrics, uninterrupted.metrics)


def test_resume_of_a_finished_run_returns_at_once(whole, tmp_path):
    path = tmp_path / "run.ds"
    fit(checkpoint=path)
    before = path.read_bytes()
    calls = []
    result = fit(checkpoint=path, callback=lambda *_: calls.append(1))
    assert calls == []
    assert_same(result.state, whole.state)
    assert_same(result.metrics, whole.metrics)
    assert path.read_bytes() == before


def test_a_finished_run_goes_on_with_a_larger_budget(tmp_path):
    path = tmp_path / "run.ds"
    fit(12, checkpoint=path, anneal=None)
    longer = fit(TOTAL, checkpoint=path, anneal=None)
    assert_same(longer.state, fit(TOTAL, anneal=None).state)


def test_an_interrupted_run_resumes(whole, tmp_path):
    path = tmp_path / "run.ds"

    def interrupt(count, metrics):
        del metrics
        if count == 8:
            raise KeyboardInterrupt

    assert fit(checkpoint=path, callback=interrupt).stopped_by == "interrupt"
    assert_same(fit(checkpoint=path).state, whole.state)


def test_a_callback_that_fails_costs_nothing(whole, tmp_path):
    path = tmp_path / "run.ds"

    def fail(count, metrics):
        del metrics
        if count == 8:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(checkpoint=path, callback=fail)
    assert_same(fit(checkpoint=path).state, whole.state)


def test_continued_fit_with_a_checkpoint(whole, tmp_path):
    path = tmp_path / "second.ds"
    first = fit(8, anneal=None)
    once = fit(16, state=first.state, anneal=None)
    fit(8, state=first.state, anneal=None, checkpoint=path)
    twice = fit(16, state=first.state, anneal=None, checkpoint=path)
    assert_same(twice.state, once.state)
    assert int(whole.state.count) == int(twice.state.count) == TOTAL


def test_divergence_leaves_the_last_good_state(tmp_path):
    path = tmp_path / "run.ds"
    good = fit(8, anneal=None)
    with pytest.raises(ds.TrainingDiverged) as caught:
        fit(
            16,
            state=good.state,
            anneal=None,
            mean=np.nan,
            checkpoint=path,
            max_skipped_in_a_row=6,
        )
    held = fit(0, anneal=None, checkpoint=path)
    assert_same(held.state, caught.value.state)
    assert_same(held.params, good.params)
    assert len(held.metrics["loss"]) == 8
    resumed = fit(16, anneal=None, checkpoint=path, max_skipped_in_a_row=6)
    assert int(resumed.state.count) == TOTAL
    assert resumed.num_skipped == 8
    assert np.all(np.isfinite(resumed.metrics["loss"][8:]))


def test_a_full_disk_does_not_end_the_run(whole, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match=r"no space.*training goes on"):
        result = fit(checkpoint=tmp_path / "run.ds", checkpoint_seconds=0.0)
    assert_same(result.state, whole.state)


# --------------------------------------------------------------- foreign, damaged files


def _zip():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("x", "y")
    return data.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"my thesis, the only copy\n",
    "random": random.Random(0).randbytes(5_000),
    "zip": _zip(),
    "json": json.dumps({"kind": "training"}).encode(),
    "pickle": pickle.dumps({"kind": "training"}),
}


def _refused(path, words, **options):
    """A fit with this checkpoint fails and leaves the file and its folder alone."""
    before, folder = path.read_bytes(), sorted(os.listdir(path.parent))
    with pytest.raises(ds.CheckpointError, match=words) as caught:
        fit(checkpoint=path, checkpoint_seconds=0.0, **options)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == folder


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file(tmp_path, kind):
    path = tmp_path / "run.ds"
    path.write_bytes(FOREIGN[kind])
    _refused(path, "not a diffsamp file.*untouched")
    with pytest.raises(ds.CheckpointError, match="not a diffsamp file"):
        ds.load(path)


def test_a_truncated_or_altered_file(halfway, tmp_path):
    path, data = tmp_path / "run.ds", halfway.read_bytes()
    header = len(MAGIC) + 32 + 8 + data[len(MAGIC) + 32 :].index(b"}")
    for size in (14, 20, 30, header // 2, header, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        _refused(path, "truncated or damaged.*untouched")
    for position in (16, 40, len(data) // 2, len(data) - 1):
        altered = bytearray(data)
        altered[position] ^= 0x55
        path.write_bytes(altered)
        _refused(path, "truncated or damaged")
    path.write_bytes(data + b"more")
    _refused(path, "truncated or damaged")


def test_a_file_of_the_other_kind(halfway, tmp_path):
    path = tmp_path / "s.ds"
    ds.save(path, SAMPLER, SAMPLER.init(jax.random.key(0)))
    _refused(path, "'sampler', not a training checkpoint")
    with pytest.raises(ds.CheckpointError, match="'training', not a sampler"):
        ds.load(halfway)


@pytest.mark.parametrize("kind", [*FOREIGN, "training"])
def test_save_replaces_samplers_only(halfway, tmp_path, kind):
    path, params = tmp_path / "s.ds", SAMPLER.init(jax.random.key(0))
    path.write_bytes(FOREIGN.get(kind, halfway.read_bytes()))
    before = path.read_bytes()
    what = "a training checkpoint" if kind == "training" else "no file of this library"
    with pytest.raises(ds.CheckpointError, match=f"{what}; it was left untouched"):
        ds.save(path, SAMPLER, params)
    assert path.read_bytes() == before
    path.unlink()
    ds.save(path, SAMPLER, params)
    ds.save(path, SAMPLER, jax.tree.map(lambda p: p + 1, params))
    assert float(ds.load(path, sampler=SAMPLER)[1]["generation"]["gain"]) == 1


def test_files_of_similar_names_are_not_ours(tmp_path):
    other = tmp_path / "s.ds.partial"
    other.write_text("my notes")
    ds.save(tmp_path / "s.ds", SAMPLER, SAMPLER.init(jax.random.key(0)))
    assert other.read_text() == "my notes"


TRAJECTORY_BALANCE = ds.objectives.trajectory_balance()


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SAMPLER.with_num_steps(5)},
        {"sampler": ds.samplers.dis(DIM, NUM_STEPS, scale=1.6, network=CONTROL)},
        {"sampler": ds.samplers.dis(DIM, NUM_STEPS, scale=1.5, network=TINY)},
        {"batch_size": 32},
        {"ema_decay": 0.5},
        {"ema_decay": None},
        {"objective": TRAJECTORY_BALANCE},
        {"objective": ds.objectives.reverse_kl_log_derivative()},  # of equal state
        {"optimizer": optax.adam(1e-4)},
        {"anneal": ds.schedules.cosine_anneal},
        {
            "behaviour": ds.behaviours.mixture(
                (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(64), 0.5)
            )
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_another_configuration(halfway, tmp_path, options):
    path = tmp_path / "run.ds"
    shutil.copy(halfway, path)
    _refused(path, "another configuration", **options)


def test_functions_inside_a_behaviour_may_move_in_memory(tmp_path):
    """As they do from one process to the next: this is the same configuration."""

    def behaviour():
        target = ds.Target(
            energy=lambda x: jnp.sum(x**2),
            dim=DIM,
            log_prior=lambda x: -jnp.sum(x**2),
            log_likelihood=lambda x: 0.0 * jnp.sum(x),
            sample_prior=lambda key, n: jax.random.normal(key, (n, DIM)),
        )
        seeded = ds.behaviours.smc_seeded(8, num_mcmc_steps=1, prior=target)
        return ds.behaviours.mixture((ds.behaviours.on_policy(), 1), (seeded, 1))

    path = tmp_path / "run.ds"
    first = fit(0, behaviour=behaviour(), checkpoint=path)
    again = fit(0, behaviour=behaviour(), checkpoint=path)
    assert_same(again.state, first.state)


def test_another_energy(halfway, tmp_path):
    """Data of equal shape: the answer to another question."""
    path = tmp_path / "run.ds"
    shutil.copy(halfway, path)
    _refused(path, "another energy", mean=-3.0)


def test_a_richer_configuration_is_not_cut_down(tmp_path):
    path = tmp_path / "run.ds"
    fit(0, objective=TRAJECTORY_BALANCE, checkpoint=path)
    _refused(path, r"(?s)another configuration.*\n  objective: it holds")


def test_nothing_is_unpickled(halfway, whole, tmp_path, monkeypatch):
    path = tmp_path / "run.ds"
    shutil.copy(halfway, path)
    ds.save(tmp_path / "s.ds", SAMPLERS[0][1], SAMPLERS[0][1].init(jax.random.key(0)))

    def refuse(*_, **__):
        raise AssertionError("a file was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("eval", "exec"):
        monkeypatch.setattr(f"diffsamp.checkpoint.{name}", refuse, raising=False)
    ds.load(tmp_path / "s.ds")
    assert_same(fit(checkpoint=path).state, whole.state)


def test_a_header_names_no_class_outside_the_table(tmp_path):
    path = tmp_path / "s.ds"
    sampler = ds.samplers.pis(2, 4, network=TINY)
    ds.save(path, sampler, sampler.init(jax.random.key(0)))
    start = len(MAGIC) + 32
    content = path.read_bytes()[start:].replace(b"PinnedBrownian", b"PinnedBrowniam")
    path.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)
    with pytest.raises(ds.CheckpointError, match=r"unknown part.*PinnedBrowniam"):
        ds.load(path)
    assert not hasattr(builtins, "PinnedBrowniam")


# -------------------------------------------------------------------------- kill -9

# Everything that has a state: a buffer, particles that are renewed, log Z, averages.
SCRIPT = """
import sys, time
import jax, jax.numpy as jnp
import diffsamp as ds

def init(key, dim):
    return {"shift": jnp.zeros(dim), "gain": jnp.zeros(())}

sampler = ds.samplers.dis(2, 4, scale=2.0, network=ds.networks.from_function(
    init, lambda params, x, t, context: params["shift"] - params["gain"] * x))
behaviours = ds.behaviours
behaviour = behaviours.mixture(
    (behaviours.on_policy(), 0.5),
    (behaviours.replay(64), 0.25),
    (behaviours.smc_seeded(32, every=30, num_mcmc_steps=1), 0.25),
)

def energy(x):
    return 0.5 * jnp.sum((x - 1.0) ** 2)

checkpoint, result = sys.argv[1:]
fit = ds.fit(
    jax.random.key(0), sampler, ds.objectives.trajectory_balance(), energy,
    behaviour=behaviour, num_updates=300, batch_size=16, updates_per_chunk=5,
    checkpoint=checkpoint, checkpoint_seconds=0.0, progress_bar=False,
    callback=lambda count, metrics: time.sleep(0.02),
)
ds.save(result, sampler, fit.params)
"""


def _start(folder, name):
    root = str(pathlib.Path(ds.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    arguments = [str(folder / f"{name}.run"), str(folder / f"{name}.result")]
    with open(folder / "errors", "wb") as errors:  # a pipe that nobody reads fills up
        return subprocess.Popen(
            [sys.executable, str(folder / "train.py"), *arguments],
            env=environment,
            stderr=errors,
        )


def _finish(process, folder):
    assert process.wait(timeout=250) == 0, (folder / "errors").read_text()[-2_000:]


def _bytes(path):
    return path.read_bytes() if path.exists() else b""


@pytest.mark.slow  # .ci/run takes one life
@pytest.mark.parametrize("lives", [1, 3])
def test_killed_runs_end_with_the_same_bits(tmp_path, lives):
    (tmp_path / "train.py").write_text(SCRIPT)
    _finish(_start(tmp_path, "whole"), tmp_path)
    path = tmp_path / "killed.run"
    chance = random.Random(0)
    sizes = []
    for _ in range(lives):
        before = _bytes(path)
        process = _start(tmp_path, "killed")
        while _bytes(path) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was still at work
        assert not (tmp_path / "killed.result").exists()
        sizes.append(len(_bytes(path)))
    assert sizes[0] > 0
    assert np.all(np.diff(sizes) > 0)  # the metrics grow: each life got further
    _finish(_start(tmp_path, "killed"), tmp_path)
    assert _bytes(tmp_path / "killed.result") == _bytes(tmp_path / "whole.result")
    # Buffer, particles, log Z and metrics as well.
    assert _bytes(path) == _bytes(tmp_path / "whole.run")


def test_every_part_of_a_configuration_can_be_written():
    """A process, schedule or network that is not in the table would be left out."""
    modules = (ds.processes, ds.schedules, ds.networks)
    parts = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    helpers = {ds.networks.FourierFeatures, ds.networks.TimeScale}
    own = {ds.networks.FunctionControl}  # the user's, never written
    missing = parts - helpers - own - set(checkpoint.CLASSES.values())
    assert not missing
