"""Strict JAX for every test in this folder.

* Rank promotion raises and dtype promotion is strict, including inside module-scoped
  fixtures, so accidental broadcasting and casts are found where they happen.
* Some dependencies promote in their own code. Optax mixes floats with its step count
  (dtypes), Distrax' multivariate normal broadcasts (ranks), OTT does both. A test that
  runs them says so with ``@pytest.mark.relaxed("dtypes")``, ``relaxed("ranks")`` or
  both names, or its file is listed in `RELAXED`.
* float32 is the default; the fixture `x64` turns on float64 within one test.
* Progress bars are off (``CI`` is set) and no compilation cache is used.
* The fast tests mostly wait for XLA's compiler. By themselves they run without most of
  its optimisations, its newest code generator and its threads, in half the time;
  together with the slow ones, every night, all run as compiled for users.
* Tracing makes millions of small objects, and Python's default is to look for garbage
  after every 700 of them, a tenth of the time of the tests.

Doctests of the package are outside this folder: they run as a user's session would.
"""

import contextlib
import gc
import os
import pathlib

# Before JAX is imported.
os.environ.setdefault("CI", "true")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import jaxlib.version
import numpy as np
import pytest

gc.set_threshold(200_000, 20, 50)

SEED = 0
_MANY_MAPS = 25_000
_SLOW_SECONDS = 1_800

# Files whose tests run a dependency that promotes by itself.
RELAXED = {
    "test_behaviours.py": {"dtypes"},  # Optax, through fit
    "test_checkpoint.py": {"dtypes"},
    "test_conditions.py": {"dtypes"},
    "test_docs.py": {"dtypes"},
    "test_drawing.py": {"dtypes"},
    "test_evaluation.py": {"dtypes", "ranks"},  # Optax and OTT
    "test_experiments.py": {"dtypes", "ranks"},
    "test_metrics.py": {"dtypes", "ranks"},  # OTT
    "test_meshes.py": {"dtypes"},
    "test_objectives.py": {"dtypes"},
    "test_scoring.py": {"dtypes"},
    "test_training.py": {"dtypes"},
}


def pytest_configure(config):
    if config.option.markexpr != "not slow":
        return
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes of tests
    # Read when the first array is made. An XLA that does not know a flag ends the
    # process, so later ones than those tried do without.
    if jaxlib.version.__version_info__ < (0, 11):
        before = os.environ.get("XLA_FLAGS", "")
        flags = "--xla_cpu_use_fusion_emitters=false"
        flags += " --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{before} {flags}"


def _relaxed(item) -> set[str]:
    if isinstance(item, pytest.DoctestItem):  # the hook below sees every item
        return {"dtypes", "ranks"}
    names = set(RELAXED.get(item.path.name, ()))
    for mark in item.iter_markers("relaxed"):
        names |= set(mark.args)
    if unknown := names - {"dtypes", "ranks"}:
        raise pytest.UsageError(f"relaxed() knows 'dtypes' and 'ranks', got {unknown}")
    return names


def pytest_collection_modifyitems(config, items):
    """Slow tests may take longer than others, unless the command says how long."""
    if config.getoption("timeout") is not None:
        return
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SLOW_SECONDS))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Wraps setup (so fixtures of any scope), call and teardown of each test."""
    relaxed = _relaxed(item)
    ranks = "allow" if "ranks" in relaxed else "raise"
    dtypes = "standard" if "dtypes" in relaxed else "strict"
    with jax.numpy_rank_promotion(ranks), jax.numpy_dtype_promotion(dtypes):
        yield


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Every compiled program holds memory maps, and Linux grants 65,530 to a process.

    Without any left XLA crashes, as it did after twenty minutes of slow tests.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _seeded():
    """The library takes keys; NumPy's global state is only for careless callees."""
    np.random.seed(SEED)  # noqa: NPY002


@pytest.fixture
def key():
    """A typed PRNG key, the same in every test."""
    return jax.random.key(SEED)


@contextlib.contextmanager
def _x64_enabled():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture
def x64():
    """float64 within one test; request it first, before other fixtures make arrays."""
    with _x64_enabled():
        yield


@pytest.fixture
def compiled():
    """Seconds of each program that XLA compiles within the test, as they come."""
    found = []

    def note(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)
