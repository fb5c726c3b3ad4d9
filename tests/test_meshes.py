"""Eight virtual devices, and two processes that talk over the loopback interface.

The number of devices of a process is fixed when JAX starts, so programs run in
processes of their own. Each prints its results as one line of JSON.
"""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import meshes

ROOT = pathlib.Path(__file__).parents[1]


def devices(num):
    """XLA's flags of this process, and that there be so many virtual devices."""
    before = os.environ.get("XLA_FLAGS", "")
    return f"{before} --xla_force_host_platform_device_count={num}"


COMMON = textwrap.dedent(
    """
    target = ds.targets.gmm9()
    network = ds.networks.free(width=8, depth=1)
    sampler = ds.samplers.dis(2, 4, scale=4.0, network=network)
    behaviour = ds.behaviours.mixture(
        (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(256), 0.5)
    )

    def mesh_of(n):
        return jax.make_mesh((n,), ("batch",), devices=jax.devices()[:n])

    def fit(mesh, num_updates=4, **options):
        return ds.fit(
            jax.random.key(0), sampler, ds.objectives.log_variance(), target.energy,
            behaviour=behaviour, batch_size=16, num_updates=num_updates, mesh=mesh,
            updates_per_chunk=2, progress_bar=False, **options,
        )

    def draw(params, mesh):
        draws = ds.draw(
            jax.random.key(1), sampler, params, target.energy, 3_000, mesh=mesh,
            probe=target.sample(jax.random.key(2), 300),
        )
        bits = draws.x.tobytes() + draws.log_weight.tobytes()
        return [hashlib.sha256(bits).hexdigest(), draws.diagnostics.missing_mass]
    """
)


@pytest.fixture(scope="module")
def loss_alone():
    """Losses of the same training on one device, [4]."""
    return _common()["fit"](None).metrics["loss"]


@pytest.fixture(scope="module")
def own_loss_alone():
    """The same of training on own paths alone."""
    found = _common()
    found["behaviour"] = ds.behaviours.on_policy()
    return found["fit"](None).metrics["loss"]


def _common():
    found = {"jax": jax, "ds": ds, "hashlib": hashlib}
    exec(compile(COMMON, "common", "exec"), found)
    return found


class _Program:
    """A Python process that has COMMON, and the line it prints."""

    def __init__(self, code, before="", **environment):
        parts = "import hashlib, json, os, jax, diffsamp as ds", before, COMMON, code
        environment.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(map(textwrap.dedent, parts))],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def result(self):
        out, errors = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, errors
        return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("sizes", "optimised"),
    [
        ([8], False),
        pytest.param([1, 2, 8], True, marks=pytest.mark.slow),
    ],
)
def test_the_same_on_any_number_of_devices(own_loss_alone, tmp_path, sizes, optimised):
    """Own paths, whose densities are known, scored in tiles; resumed on two devices."""
    code = """
        path, behaviour = os.environ["FILE"], ds.behaviours.on_policy()
        sizes = json.loads(os.environ["SIZES"])
        params = jax.eval_shape(sampler.init, jax.random.key(0))
        each = ds.scoring.bytes_per_step(sampler, params)
        tiles = [ds.scoring.tile_within(sampler, params, n, k * each)
                 for n, k in ((2, 1), (8, 5))]
        eight = fit(mesh_of(8), 2, checkpoint=path, memory_budget=each)
        two = fit(mesh_of(2), checkpoint=path, memory_budget=5 * each)
        try:
            fit(mesh_of(3))
        except ValueError as error:
            refused = str(error)
        print(json.dumps({
            "devices": [len(r.state.count.sharding.device_set) for r in (eight, two)],
            "counts": [r.num_network_evaluations for r in (eight, two)],
            "loss": two.metrics["loss"].tolist(),
            "draws": [draw(two.params, m) for m in (None, *map(mesh_of, sizes))],
            "tiles": tiles,
            "refused": refused,
        }))
        """
    settings = {"XLA_FLAGS": devices(8), "FILE": str(tmp_path / "run")}
    settings["SIZES"] = json.dumps(sizes)
    settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0" if optimised else "1"
    with _Program(code, **settings) as program:
        found = program.result()
    assert found["tiles"] == [[1, 1], [4, 1]]  # rows on each device, and steps
    assert found["devices"] == [8, 2]
    assert "batch_size=16 cannot be spread evenly over the 3" in found["refused"]
    assert np.diff(found["counts"]) == 2 * 16 * 4 * 2  # passes, rows, steps, updates
    np.testing.assert_allclose(found["loss"], own_loss_alone, rtol=1e-4)
    assert all(drawn == found["draws"][0] for drawn in found["draws"])  # bit by bit


def test_objectives_with_paths_of_their_own_spread_them():
    """The value is the same, and each of four devices does far less than all."""
    code = """
        import jax.numpy as jnp
        from diffsamp import meshes, training
        from diffsamp.types import Request

        o, key, size = ds.objectives, jax.random.key(0), 256
        propose, four = ds.behaviours.on_policy().propose, meshes.as_mesh(mesh_of(4))
        small = {"width": 8, "depth": 1}
        finer = {"dim": 2, "num_steps": 4, "scale": 4.0}
        teacher = ds.samplers.dis(network=ds.networks.free(**small), **finer)
        nets = ds.networks
        step_conditioned = nets.free(step_conditioned=True, **small)
        any_step = ds.samplers.scds(network=step_conditioned, **finer)
        student = ds.samplers.cdds(2, scale=4.0, network=nets.consistency(**small))
        leaves, tree = jax.tree.flatten(teacher.init(key))
        trained = tree.unflatten([leaf + 0.1 for leaf in leaves])
        distilled = o.consistency_distillation(teacher, trained, num_times=3)
        cases = {
            "self_consistency": (any_step, o.self_consistency(whole_paths=True)),
            "at_num_steps": (teacher, o.at_num_steps(o.log_variance(), (2, 4))),
            "forward_kl": (teacher, o.forward_kl(target.sample(key, 100))),
            "distillation": (student, distilled),
        }
        request = Request(jnp.zeros((size, 0)), jnp.zeros(size, int))
        found = {}
        for name, (one, objective) in cases.items():
            params = one.init(key)
            given = key, one, params, target.energy, request, jnp.zeros((), int)
            paths = propose((), *given)
            own, state = objective.init(key, one, params, target.energy, None)
            params = {"sampler": params, "objective": own}

            def loss(params, mesh):
                proposal, rows = meshes.spread(mesh, (paths, request))
                return training.batch_loss(
                    params, objective, state, one, target.energy, proposal,
                    rows, keys=(key, key), count=jnp.zeros((), int), mesh=mesh,
                )[0]

            runs = [jax.jit(lambda p, m=m: loss(p, m)) for m in (None, four)]
            runs = [run.lower(params).compile() for run in runs]
            found[name] = {
                "flops": [run.cost_analysis()["flops"] for run in runs],
                "values": [float(run(params)) for run in runs],
            }
        print(json.dumps(found))
        """
    with _Program(code, XLA_FLAGS=devices(4)) as program:
        found = program.result()
    assert len(found) == 4
    for name, row in found.items():
        np.testing.assert_allclose(*row["values"], rtol=1e-5, err_msg=name)
        alone, spread = row["flops"]
        assert spread < 0.5 * alone, name


@pytest.mark.slow
def test_a_report_is_the_same_on_many_devices():
    code = """
        params = sampler.init(jax.random.key(0))
        reports = [
            ds.evaluate(
                jax.random.key(3), sampler, params, target, num_draws=1_000,
                sinkhorn=False, mesh=mesh,
            )
            for mesh in (None, mesh_of(8))
        ]
        names = "elbo", "eubo", "log_z", "ess", "w2", "mode_tv"
        print(json.dumps([[float(r[name]) for name in names] for r in reports]))
        """
    with _Program(code, XLA_FLAGS=devices(8)) as program:
        alone, spread = program.result()
    np.testing.assert_array_equal(alone, spread)


def results_of_two(code, files):
    """What two processes print that talk over the loopback interface, two devices each.

    Each has a file of its own, or both the same.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = """
        jax.distributed.initialize(
            os.environ["ADDRESS"], num_processes=2, process_id=int(os.environ["NUMBER"])
        )
        """
    common = {"ADDRESS": f"127.0.0.1:{port}", "XLA_FLAGS": devices(2)}
    first, second = map(str, files)
    with (
        _Program(code, before, NUMBER="0", FILE=first, **common) as one,
        _Program(code, before, NUMBER="1", FILE=second, **common) as other,
    ):
        return one.result(), other.result()


@pytest.mark.slow
def test_two_processes_on_the_loopback_interface(loss_alone, tmp_path):
    code = """
        mesh, seen = mesh_of(jax.device_count()), []

        def callback(count, metrics):
            seen.append(count)
            return jax.process_index() == 0 and count == 4

        result = fit(mesh, 8, callback=callback, checkpoint=os.environ["FILE"])
        timed = fit(mesh, None, max_seconds=0.5)
        wrote = os.path.exists(os.environ["FILE"])
        try:
            fit(mesh, 8, checkpoint=os.environ["FILE"])
        except RuntimeError as error:
            refused = str(error)
        print(json.dumps({
            "devices": [jax.local_device_count(), jax.device_count()],
            "loss": result.metrics["loss"].tolist(),
            "draws": draw(result.params, mesh),
            "timed": timed.metrics["loss"].tolist(),
            "seen": seen,
            "stopped_by": [result.stopped_by, timed.stopped_by],
            "wrote": wrote,
            "refused": refused,
        }))
        """
    files = [tmp_path / name for name in ("of_first", "of_second")]
    found, other = results_of_two(code, files)
    assert found.pop("wrote")
    assert not other.pop("wrote")
    for result in (found, other):  # each has a file of its own
        assert "do not find the same file at" in result.pop("refused")
    assert found == other
    assert found["devices"] == [2, 4]
    assert found["seen"] == [2, 4]  # the first process stopped both
    assert found["stopped_by"] == ["callback", "max_seconds"]
    np.testing.assert_allclose(found["loss"], loss_alone, rtol=1e-4)


@pytest.mark.slow
def test_one_process_two_and_one_again_go_on_with_the_same_checkpoint(tmp_path):
    fit, path = _common()["fit"], tmp_path / "run"
    begun = fit(None, 2, checkpoint=path)
    assert len(begun.metrics["loss"]) == 2
    code = """
        result = fit(mesh_of(jax.device_count()), 6, checkpoint=os.environ["FILE"])
        print(json.dumps({
            "loss": result.metrics["loss"].tolist(),
            "network_evaluations": result.num_network_evaluations,
            "devices": len(result.state.count.sharding.device_set),
        }))
        """
    found, other = results_of_two(code, [path, path])
    assert found == other
    assert found["devices"] == 4
    after, alone = fit(None, 8, checkpoint=path), fit(None, 8)
    np.testing.assert_array_equal(found["loss"][:2], begun.metrics["loss"])
    np.testing.assert_array_equal(after.metrics["loss"][:6], found["loss"])
    np.testing.assert_allclose(after.metrics["loss"], alone.metrics["loss"], rtol=1e-4)
    assert after.num_network_evaluations == alone.num_network_evaluations
    assert 0 < found["network_evaluations"] < after.num_network_evaluations


# -- bad input ------------------------------------------------------------------------


class _Devices:
    """Of a mesh, what a check needs to know."""

    size = 8


def test_a_batch_that_the_mesh_does_not_divide():
    with pytest.raises(ValueError, match=r"batch_size=100 cannot .* multiple of 8"):
        meshes.check_divides("batch_size", 100, _Devices())
    meshes.check_divides("batch_size", 100, None)
    meshes.check_divides("batch_size", 96, _Devices())


def test_something_that_is_no_mesh():
    sampler = ds.samplers.dis(2, 4, network=ds.networks.free(width=8, depth=1))
    energy, key = ds.targets.gmm9().energy, jax.random.key(0)
    no_mesh = pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh")
    with no_mesh:
        ds.fit(key, sampler, ds.objectives.log_variance(), energy, mesh=2)
    with no_mesh:
        ds.draw(key, sampler, sampler.init(key), energy, mesh=2)
    with no_mesh:
        ds.evaluate(key, sampler, sampler.init(key), ds.targets.gmm9(), mesh=2)
