"""The scripts: their options, what they write, what their tables say.

`.ci/run` runs the quickstart as a user does; here are its parts, and whole small runs
behind ``slow``.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(FOLDER))  # scripts share rows.py


def _script(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def quickstart():
    return _script("quickstart")


@pytest.fixture
def arguments(monkeypatch):
    def use(*words):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])

    return use


def test_a_wrong_target_lists_the_valid_names(quickstart):
    with pytest.raises(SystemExit, match="unknown --target 'galaxy'") as caught:
        quickstart.find_target("galaxy")
    for name in ("galaxies_mixture", "two_sinusoids", "gmm9", "funnel_hard"):
        assert name in str(caught.value)


def test_targets_and_posteriors_are_found(quickstart):
    target, posterior = quickstart.find_target("galaxies_mixture")
    assert target.dim == posterior.dim == 8
    target, posterior = quickstart.find_target("gmm9")
    assert (target.dim, posterior) == (2, None)


def test_options_of_the_quickstart(quickstart, arguments):
    arguments()
    assert quickstart.parse().target == "galaxies_mixture"
    arguments(
        *("--target", "gmm9", "--num-steps", 8, "--objective", "forward_kl"),
        *("--seed", 3, "--out", "here", "--seconds", 4.5),
    )
    args = quickstart.parse()
    assert (args.target, args.num_steps, args.seed) == ("gmm9", 8, 3)
    assert (args.objective, args.seconds) == ("forward_kl", 4.5)
    assert args.out == pathlib.Path("here")
    for option in ("--num-steps", "--seconds", "--num-draws", "--num-particles"):
        arguments(option, 0)
        with pytest.raises(SystemExit):
            quickstart.parse()
    arguments("--objective", "elbow")
    with pytest.raises(SystemExit):
        quickstart.parse()


@pytest.mark.parametrize(("elapsed", "expected"), [(30, 65), (69, 50), (120, 20)])
def test_training_shortens_where_the_machine_is_slow(quickstart, elapsed, expected):
    assert quickstart.seconds_that_fit(elapsed) == expected


def test_json_knows_no_infinity():
    row = {"a": np.float32("inf"), "b": [float("nan"), 0], "c": {"d": np.int32(2)}}
    row |= {"e": True, "f": "inf", "g": None}
    plain = {"a": None, "b": [None, 0], "c": {"d": 2}, "e": True, "f": "inf", "g": None}
    assert json.loads(_script("rows").dumps(row)) == plain


def test_what_is_no_number_is_not_left_out():
    summarise = _script("rows").summarise
    rows = [{"a": 1.0, "b": None}, {"a": -3.0, "b": 2.0}, {}]
    assert summarise(rows, "a", "{:.1f}", abs) == "-1.0 (-3.0)"
    assert summarise(rows, "b", "{:.1f}", abs) == "inf (inf)"
    assert summarise(rows, "c", "{:.1f}", abs) == "-"


@pytest.mark.parametrize("num_devices", [0, -1])
def test_a_mesh_of_no_devices(num_devices):
    with pytest.raises(SystemExit, match=f"at least 1, got {num_devices}"):
        _script("rows").mesh_of(num_devices)


def test_a_mesh_of_too_many_devices_says_how_to_get_them():
    num = 8 * jax.device_count()
    option = f"XLA_FLAGS=--xla_force_host_platform_device_count={num}$"
    with pytest.raises(SystemExit, match=option):
        _script("rows").mesh_of(num)


RUNS = {  # the commands of every script that train, draw or time either
    "adaptive_destruction": ("grid", "coordinatewise", "ablation"),
    "amortised": ("run",),
    "benchmark": ("run",),
    "consistent": ("run", "time", "footnote", "parallel"),
    "exploration": ("run",),
    "numpyro_posteriors": ("run",),
    "quickstart": ("",),
    "speed": tuple(_script("speed").MEASURES),
}


def test_no_script_is_left_out():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    not_training = {"rows", "transport", "quickstart_table", "speed_peers"}
    not_training |= {"consistent_measures", "consistent_report"}
    not_training |= {"tutorial"}  # the page as it stands
    assert scripts - not_training == set(RUNS)


@pytest.mark.parametrize(
    ("name", "command"), [(name, c) for name, each in RUNS.items() for c in each]
)
def test_what_trains_takes_a_mesh(name, command, arguments, capsys):
    arguments(*command.split(), "--help")
    with pytest.raises(SystemExit):
        _script(name).main()
    assert "[--mesh N]" in capsys.readouterr().out


ROW = {
    "target": "galaxies_mixture",
    "num_steps": 32,
    "objective": "log_variance",
    "training_seconds": 65.0,
    "num_draws": 20_000,
    **{"device": "cpu", "python": "3", "versions": {"jax": "1.2.3"}},
    "log_z_true": -2.0,
    "log_z": -2.25,
    "log_z_standard_error": None,
    "elbo": -3.0,
    "eubo": 1.5,
    "ess": 0.5,
    "pareto_k": 0.75,
    "mode_weights": [0.5, 0.5],
    "mode_weights_true": [0.75, 0.25],
    "mode_weights_nuts": [1.0, 0.0],
    "energy_evaluations": 5e5,
    "gradient_evaluations": 1e6,
    "network_evaluations": 2e6,
    "seconds": 100.0,
    "nuts_max_rhat": 4.0,
    "nuts_seconds": 10.0,
    "verdict": "do not trust: ...",
}


def test_table_of_the_quickstart(tmp_path, arguments, capsys):
    for seed, log_z in ((1, -1.25), (0, -2.25)):
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps({**ROW, "seed": seed, "log_z": log_z}))
    arguments(tmp_path / "1.json", tmp_path / "0.json")
    _script("quickstart_table").main()
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:9] == [
        "0",
        "-0.250",
        "inf",
        "1.00",
        "3.50",
        "0.500",
        "0.75",
        "0.250",
        "5.00e+05",
    ]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[4].startswith("| mean (worst) | +0.250 (+0.750) | inf (inf) |")
    assert lines[6] == "* seed 0: do not trust: ..."
    assert "galaxies_mixture, 32 steps" in lines[-1]
    assert "jax 1.2.3" in lines[-1]


def test_table_of_a_quickstart_without_truth(tmp_path, arguments, capsys):
    unknown = {"log_z_true": None, "mode_weights_true": None, "mode_weights": None}
    path = tmp_path / "0.json"
    path.write_text(json.dumps({**ROW, **unknown, "seed": 0}))
    arguments(path)
    _script("quickstart_table").main()
    assert "| 0 | - | inf | - | - | 0.500 |" in capsys.readouterr().out


def test_table_of_the_benchmark_has_mean_and_worst(tmp_path, arguments, capsys):
    benchmark = _script("benchmark")
    shared = {"target": "gmm9", "method": "smc", "num_draws": 10}
    shared |= {"device": "cpu", "python": "3", "versions": {"jax": "1.2.3"}}
    rows = [
        {**shared, "seed": seed, "log_z_error": error, "w2_ratio": ratio}
        for seed, error, ratio in ((3, 0.25, 1.0), (2, -0.75, 0.75))
    ]
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments("table", out)
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| gmm9 | smc | 2, 3 | -0.2500 (-0.7500) |")
    assert "0.875 (0.750)" in lines[2]


def test_cells_that_are_there_are_not_run_again(tmp_path, arguments, monkeypatch):
    benchmark = _script("benchmark")
    out, ran = tmp_path / "rows.jsonl", []

    def fake(cell, method, seed, args):
        ran.append((cell.target, method, seed))
        return {"log_z_error": np.float32(0.5)}

    monkeypatch.setattr(benchmark, "run_sampler", fake)
    options = ("run", "--out", out, "--seeds", 7, "--methods", "on_policy", "seeded")
    arguments(*options, "--targets", "gmm9", "gmm25")
    benchmark.main()
    wanted = [
        ("gmm9", "on_policy", 7),
        ("gmm25", "on_policy", 7),
        ("gmm25", "seeded", 7),
    ]
    assert ran == wanted
    benchmark.main()
    assert ran == wanted
    assert [row["seed"] for row in benchmark.read(out)] == [7, 7, 7]


def _amortised_row(seed, kernels, num_steps, ess):
    script = _script("amortised")
    images = {name: [1.0] * 3 for _, name, *_ in script.COLUMNS} | {"ess": ess}
    means = {name: float(np.mean(values)) for name, values in images.items()}
    return {
        **{"seed": seed, "kernels": kernels, "num_steps": num_steps, **means},
        **{"images": images, "draw_seconds": 0.5, "num_draws": 10, "num_images": 3},
        **{"nuts_rhat": [1.0, 1.25, 1.0], "nuts_ess": [70.0, 2.0, 80.0]},
        **{"reference_standard_error": [0.01] * 3, "smc_log_z_error": [0.25] * 3},
        **{"nuts_gradient_evaluations": 4e3, "nuts_seconds": 3.0, "num_particles": 8},
        **{"num_chains": 4, "num_nuts_draws": 50, "device": "cpu", "python": "3"},
        "versions": {"jax": "1.2.3"},
    }


def test_table_of_amortised_sampling(tmp_path, arguments, capsys):
    out = tmp_path / "rows.jsonl"
    rows = [
        _amortised_row(1, "generation", 5, [0.25, 0.0, 0.75]),
        _amortised_row(0, "generation", 5, [0.5, 0.0, 1.0]),
        _amortised_row(0, "encoder", 0, [0.125, 0.0, 0.375]),
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments("table", out)
    _script("amortised").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| encoder | - | 0 | +1.000 (+1.000; +1.000) |")
    assert lines[3].startswith("| generation | 5 | 0, 1 |")
    assert "| 0.62 (0.50; 0.25) |" in lines[3]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[8] == "| generation | 5 | 0, 1 | - | - | - | 0.500 | - |"
    assert "2 of 6 images left out for an R-hat above 1.05" in lines[-1]
    assert "effective draws at least 70" in lines[-1]
    alone = "1.3e+03 gradients (those of the SMC not counted) per image"
    assert alone in lines[-1]
    counted = {"smc_gradient_evaluations": 2e3, "smc_energy_evaluations": 6e2}
    for some, said in (
        ([row | counted for row in rows], "2.0e+03 gradients and 2.0e+02 energies per"),
        ([rows[0] | counted, *rows[1:]], alone),
    ):
        out.write_text("".join(json.dumps(row) + "\n" for row in some))
        _script("amortised").main()
        assert said in capsys.readouterr().out
    arguments("table", tmp_path / "none.jsonl")
    with pytest.raises(SystemExit, match=r"no rows in .*none\.jsonl"):
        _script("amortised").main()


def test_amortised_cells_that_are_there_are_not_run_again(
    tmp_path, arguments, monkeypatch
):
    script, ran = _script("amortised"), []
    family = script.Family(*[None] * 6, numbers={})

    def fake(*cell):
        ran.append(cell[: cell.index(family)])
        return {"ess": 0.5}

    monkeypatch.setattr(script, "make_family", lambda seed: family)
    monkeypatch.setattr(script, "run_sampler", fake)
    monkeypatch.setattr(script, "run_encoder", fake)
    monkeypatch.setattr(script, "PACKAGES", ())
    out = tmp_path / "rows.jsonl"
    for steps in ((5,), (5, 20)):
        arguments(
            "run",
            *("--seeds", 3, "--kernels", "generation", "--out", out),
            *("--num-steps", *steps),
        )
        script.main()
    assert ran == [(3,), (3, 5, "generation"), (3, 20, "generation")]


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'diffsamp\[experiments\]'"):
        _script("amortised").load_digits(0)


def test_a_foreign_file_in_the_way_shows_before_the_work(
    quickstart, tmp_path, arguments, monkeypatch
):
    monkeypatch.setattr(quickstart, "run_nuts", lambda *_: pytest.fail("too late"))
    (tmp_path / "sampler.diffsamp").write_text("mine")
    arguments("--target", "gmm9", "--out", tmp_path)
    with pytest.raises(ds.CheckpointError, match="not a diffsamp file"):
        quickstart.main()


@pytest.mark.slow
def test_a_small_quickstart(quickstart, tmp_path, arguments, capsys):
    arguments(
        *("--target", "gmm9", "--num-steps", 4, "--seconds", 1, "--num-draws", 200),
        *("--num-particles", 256, "--out", tmp_path),
    )
    quickstart.main()
    printed = capsys.readouterr().out
    for words in ("log Z", "verdict", "mode weights", "R-hat", "EUBO"):
        assert words in printed
    numbers = json.loads((tmp_path / "quickstart.json").read_text())
    assert numbers["elbo"] < numbers["eubo"]
    # Drawing alone costs as much: 200 draws, 256 points of the probe, 1,000 for EUBO.
    assert numbers["gradient_evaluations"] > 1_456 * 5
    assert numbers["energy_evaluations"] > 0  # SMC tempers by energies alone
    assert numbers["network_evaluations"] > 1_456 * 2 * 4
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


GRID_ROW = {
    **{"name": "grid", "target": "gmm25", "num_steps": 20, "kernels": "fixed"},
    **{"batch_size": 256, "max_seconds": 90.0, "max_energy_evaluations": 1000},
    **{"num_draws": 2000, "diverged": False, "device": "cpu", "python": "3.11"},
    **{"versions": {"jax": "0.10"}, "log_z_error": -0.01, "elbo_gap": 0.4},
    **{"verdict": "trust", "pareto_k": 0.3},
}


def test_the_grid_of_steps_says_whether_few_learned_ones_are_better(
    tmp_path, arguments, capsys
):
    script, rows = _script("adaptive_destruction"), []
    for seed, gap in enumerate((1.0, 1.4)):
        fixed = {"gap": gap, "mode_tv_unweighted": 0.05}
        both = {"gap": gap - 0.4, "mode_tv_unweighted": 0.04}
        few = {"num_steps": 5, "kernels": "both"}
        rows += [GRID_ROW | fixed | {"seed": seed}, GRID_ROW | both | few]
        rows[-1]["seed"] = seed
        worse = {"target": "gmm40", "mode_tv_unweighted": 0.2}
        rows += [
            r | (worse if r["num_steps"] == 5 else {"target": "gmm40"})
            for r in rows[-2:]
        ]
    rows.append(
        GRID_ROW
        | few
        | {"name": "TB for both", "seed": 0, "diverged": True, "gap": 7.0}
        | {"verdict": "do not trust: k-hat", "separate_optimisers": False}
    )
    short = {"max_seconds": 30.0, "python": "3.12"}
    rows.append(rows[-1] | short | {"diverged": False, "gap": 8.0, "seed": 1})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments("table", path)
    script.main()
    text = capsys.readouterr().out
    assert "| gmm25 | 20 | fixed | 2 | 2 | 1.200 (1.400) | 0.400 (0.400) |" in text
    assert "| gmm25 | TB for both | 5 | 1, 1 diverged | 0 | 7.000 (7.000) |" in text
    gaps = "1.200 (1.400) | 0.800 (1.000)"
    assert f"| gmm25 | {gaps} | 0.050 (0.050) | 0.040 (0.040) | yes |" in text
    assert f"| gmm40 | {gaps} | 0.050 (0.050) | 0.200 (0.200) | no |" in text
    grid, ablation, shorter = (text.split("over seeds;")[i] for i in (1, 2, 3))
    assert "1,000 energy evaluations and 90 s of updates" in grid
    assert "2,000 draws; cpu, Python 3.11, jax 0.10." in grid
    assert "| gmm25 | TB for both | 5 | 1 | 0 | 8.000 (8.000) |" in ablation
    assert "evaluations and 30 s of updates; 2,000 draws; cpu, Python 3.12" in shorter


def test_the_grid_goes_on_where_it_stopped(tmp_path, arguments, monkeypatch):
    script, ran = _script("adaptive_destruction"), []

    def fake(problem, num_steps, kernels, setting, seed, args):
        ran.append((problem.target, num_steps, kernels, seed))
        return {"gap": 1.0, "diverged": False}

    monkeypatch.setattr(script, "train_and_evaluate", fake)
    out = tmp_path / "deep" / "rows.jsonl"
    options = ("--targets", "gmm25", "--num-steps", 5, "--out", out)
    arguments("grid", "--seeds", 7, *options)
    script.main()
    assert ran == [("gmm25", 5, kernels, 7) for kernels in script.KERNELS]
    arguments("grid", "--seeds", 7, 8, *options)
    script.main()
    assert [seed for *_, seed in ran] == [7, 7, 7, 8, 8, 8]
    arguments("ablation", "--seeds", 7, "--settings", "TB for both", "--out", out)
    script.main()
    assert ran[6:] == [("gmm25", 5, "both", 7)]
    arguments("coordinatewise", "--seeds", 7, "--out", out)
    script.main()
    compared = [(t, *c, 7) for t in script.MANY_WELLS for c in script.COMPARED]
    assert ran[7:] == compared * len(script.BY_COORDINATES)
    del ran[:]
    for changed in (
        ("--seconds", 5),
        ("--energy-evaluations", 100),
        ("--batch-size", 64),
        ("--num-draws", 50),
    ):
        for _ in range(2):
            arguments("grid", "--seeds", 7, *options, *changed)
            script.main()
    assert ran == [("gmm25", 5, kernels, 7) for kernels in script.KERNELS] * 4


def test_table_of_exploration(tmp_path, arguments, capsys):
    script = _script("exploration")
    shared = {"num_draws": 10, "device": "cpu", "python": "3", "versions": {"jax": "1"}}
    rows = [
        {"target": "manywell", "method": "seeded", "log_z_error": 0.25, "gap": 8.0},
        {"target": "manywell", "method": "seeded", "log_z_error": -0.75, "gap": 9.0}
        | {"verdict": "do not trust: why"},
        {"target": "gmm25", "method": "local_search", "modes_found": 24, "ess": None},
        {"target": "gmm25", "method": "local_search", "modes_found": 25, "ess": 0.5},
    ]
    shared["verdict"] = "trust (with the weights)"
    rows = [{**shared, "seed": i % 2, **row} for i, row in enumerate(rows)]
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments("table", out)
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| gmm25 | local_search | 0, 1 | 2 | - | - |")
    assert "| inf (inf) | 24 (24) |" in lines[2]
    assert lines[3].startswith("| manywell | seeded | 0, 1 | 1 | -0.250 (-0.750) |")
    assert "8.500 (9.000)" in lines[3]
    assert "10 draws, cpu" in lines[-1]


def test_table_of_posteriors_names_false_trust(tmp_path, arguments, capsys):
    chain = {"seconds": 9.0, "compile_seconds": 4.0, "gradients": 1e5, "max_rhat": 1.5}
    chain |= {"mean_error": 0.5, "sd_error": 0.25}
    good = {"mean_error": 0.0625, "sd_error": 0.03125, "misses": [], "pareto_k": 0.25}
    good |= {"seconds": 90.0, "compile_seconds": 30.0, "gradients": 2e6, "energies": 4}
    good |= {"ess": 0.5, "pilot_gradients": 1e6, "pilot_name": "SMC"}
    changes = [
        {"verdict": "trust"},
        {"verdict": "trust", "misses": ["mu"], "mean_error": 0.1875, "ess": 0.25},
        {"verdict": "reweight (why)", "misses": ["mu", "tau"]},
        {"verdict": "trust", "log_z_error": 0.05, "log_z_standard_error": 0.01},
    ]
    shared = {"name": "ark", "nuts": chain, "kernel": chain | {"accept_prob": 0.5}}
    shared |= {"device": "cpu", "python": "3", "versions": {"jax": "1.2.3"}}
    rows = [
        {**shared, "seed": seed, "sampler": good | change}
        for seed, change in enumerate(changes)
    ]
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments("table", out)
    _script("numpyro_posteriors").main()
    lines = capsys.readouterr().out.splitlines()
    missing = "ark (seed 1), ark (seed 3)."
    assert lines[0] == f"Of 4 runs 3 earn `trust`; of these miss a limit: {missing}"
    assert lines[4].startswith("| ark | 0, 1, 2, 3 | 3 | 1 | 0.094 (0.188) | 0.031 ")
    assert "| - | - | 0.44 (0.25) | 0.25 (0.25) |" in lines[4]
    costs = "| ark | 60 | 30 | 2.0e+06 | 4.0e+00 | 5 | 4 | 1.0e+05 | 1.50 (1.50) |"
    assert any(line.startswith(costs) for line in lines)
    assert "| ark | 1 | trust | mu |" in lines
    assert "| ark | 2 | reweight (why) | mu, tau |" in lines
    assert "jax 1.2.3" in lines[-1]


def test_methods_of_exploration_fit_their_objectives():
    script = _script("exploration")
    for cell in script.CELLS:
        for method in cell.methods:
            objective, behaviour = script.make_method(method, cell.num_updates)
            needs, has = objective.requires, behaviour.provides
            assert has.anchor or not needs.anchor
            assert has.on_policy or not needs.on_policy
        assert script.target_of(cell.target).dim % 2 == 0


@pytest.mark.parametrize("kernels", ["fixed", "generation", "both"])
def test_settings_of_the_grid_make_what_they_say(kernels):
    script = _script("adaptive_destruction")
    problem = script.PROBLEMS[0]
    by_coordinates = [
        {"coordinatewise": True, **change} for change in script.BY_COORDINATES.values()
    ]
    for change in (*script.ABLATION.values(), *by_coordinates):
        setting = script.Setting(**change)
        sampler = script.make_sampler(problem, 2, 5, kernels, setting)
        assert (sampler.destruction is not None) == (kernels == "both")
        assert (sampler.backbone is not None) == setting.shared_backbone
        behaviour = script.make_behaviour(setting)
        objective = script.make_objective(setting, kernels == "both")
        needs, has = objective.requires, behaviour.provides
        assert has.target_draws or not needs.target_draws
        assert has.on_policy or not needs.on_policy


def test_two_optimisers_clip_each_kernels_gradient():
    script = _script("adaptive_destruction")
    (two, whole), (one, all_of_it) = (
        script.make_optimizer(script.Setting(separate_optimisers=separate))
        for separate in (True, False)
    )
    assert (whole, all_of_it) == (None, 1.0)
    params = {
        "sampler": {"generation": jnp.ones(2), "destruction": jnp.ones(2)},
        "objective": {},
    }

    def second_update(optimizer, large):
        """Of destruction, where generation had a large gradient first."""
        state, update = optimizer.init(params), None
        for size in (large, 1.0):
            gradient = {"generation": jnp.full(2, size), "destruction": jnp.ones(2)}
            gradient = {"sampler": gradient, "objective": {}}
            update, state = optimizer.update(gradient, state, params)
        return update["sampler"]

    small, large = (second_update(two, size) for size in (1.0, 1e6))
    np.testing.assert_array_equal(small["destruction"], large["destruction"])
    np.testing.assert_allclose(small["generation"], large["generation"], rtol=1e-5)
    moved = second_update(one, 1e6)["generation"]  # unclipped, Adam remembers it
    assert float(jnp.max(jnp.abs(moved - large["generation"]))) > 1e-4


@pytest.mark.slow
def test_a_small_benchmark(tmp_path, arguments, monkeypatch):
    benchmark = _script("benchmark")
    cell = benchmark.Cell("gmm9", 3.0, 0.2, 4, 3, methods=("on_policy", "smc"))
    monkeypatch.setattr(benchmark, "CELLS", (cell,))
    monkeypatch.setattr(benchmark, "NUM_POINTS", 100)
    monkeypatch.setattr(benchmark, "SINKHORN_POINTS", 50)
    monkeypatch.setattr(benchmark, "NUM_PARTICLES", 128)
    out = tmp_path / "rows.jsonl"
    arguments(
        "run", "--targets", "gmm9", "--seeds", 0, "--num-draws", 200, "--out", out
    )
    benchmark.main()
    rows = benchmark.read(out)
    assert [row["method"] for row in rows] == ["on_policy", "smc"]
    for row in rows:
        assert row["gradient_evaluations"] > 0
        assert row["w2_ratio"] > 0
        assert row["sinkhorn_ratio"] > 0
    assert rows[0]["elbo_gap"] > 0


def _without_the_last(path):
    """The rows of a file, of which the last is taken out."""
    rows = _script("rows").read(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    return rows


@pytest.mark.slow
def test_a_small_run_of_adaptive_destruction(tmp_path, arguments, monkeypatch, capsys):
    script = _script("adaptive_destruction")
    monkeypatch.setattr(script, "WIDTH", 8)
    monkeypatch.setattr(script, "COORDINATE_WIDTH", 8)
    monkeypatch.setattr(script, "NUM_PARTICLES", 64)
    out = tmp_path / "rows.jsonl"
    settings = ["TB + TLM, replay by rank", "two optimisers"]
    budget = ("--seconds", 30, "--energy-evaluations", 150_000, "--batch-size", 128)
    budget += ("--num-draws", 100, "--seeds", 0, "--out", out)
    commands = (
        ("grid", "--targets", "gmm25", "--num-steps", 1),
        ("ablation", "--num-steps", 2, "--settings", *settings),
        ("coordinatewise", "--targets", "manywell", "--settings", "coordinatewise"),
    )
    for command in commands:
        arguments(*command, *budget)
        script.main()
    rows = _without_the_last(out)
    names = ["grid"] * 3 + settings + ["coordinatewise"] * 2
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["stopped_by"] == "max_energy_evaluations"
        assert row["energy_evaluations"] >= 150_000
        assert row["num_updates"] > 0
        assert not row["diverged"]
        assert np.isfinite([row["gap"], row["mode_tv"], row["w2"]]).all()
        assert len(row["variance_ratio_low"]) == row["num_steps"]
    script.main()  # the last again, and no other
    again = script.read(out)
    assert again[:-1] == rows[:-1]
    for same in ("name", "seed", "num_steps", "num_updates"):  # seconds anneal the rest
        assert again[-1][same] == rows[-1][same]
    script.main()  # nothing left to do
    assert script.read(out) == again
    capsys.readouterr()
    arguments("table", out)
    script.main()
    said = capsys.readouterr().out
    for label in ("1 | fixed", "TB + TLM, replay by rank | 2", "two optimisers | 2"):
        assert f"| gmm25 | {label} | 1 |" in said
    assert said.count("150,000 energy evaluations and 30 s of updates") == 3
    arguments("plot", out, "--figure", tmp_path / "figure.png")
    script.main()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_small_run_of_exploration(tmp_path, arguments, monkeypatch, capsys):
    script = _script("exploration")
    small = {"num_steps": 2, "num_updates": 3, "width": 8, "batch_size": 16}
    few = {**small, "methods": ("exploration", "local_search")}
    cells = (
        script.Cell("gmm25", 7.0, 0.08, **few),
        script.Cell("manywell", **script.MANY_WELLS | small),
    )
    monkeypatch.setattr(script, "CELLS", cells)
    monkeypatch.setattr(script, "NUM_PARTICLES", 64)
    out = tmp_path / "rows.jsonl"
    arguments("run", "--seeds", 0, "--num-draws", 100, "--out", out)
    script.main()
    rows = _without_the_last(out)
    assert [(row["target"], row["method"]) for row in rows] == [
        (cell.target, method) for cell in cells for method in cell.methods
    ]
    for row in rows:
        assert row["num_updates"] == 3
        assert row["num_skipped"] == 0
        assert row["energy_evaluations"] > 0
        assert np.isfinite([row["gap"], row["elbo_gap"], row["w2"]]).all()
        found = "modes_found" if row["target"] == "gmm25" else "well_error"
        assert np.isfinite(row[found])
    script.main()  # the last again, and no other
    again = script.read(out)
    assert again[:-1] == rows[:-1]
    assert again[-1]["gap"] == pytest.approx(rows[-1]["gap"], rel=1e-6)
    script.main()  # nothing left to do
    assert script.read(out) == again
    capsys.readouterr()
    arguments("table", out)
    script.main()
    said = capsys.readouterr().out
    assert "| gmm25 | local_search | 0 |" in said
    assert "| manywell | trust_region | 0 |" in said


@pytest.mark.slow
def test_a_small_amortised_run(tmp_path, arguments, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    script = _script("amortised")
    small = {"latent_dim": 2, "decoder_width": 8, "vae_updates": 300, "width": 8}
    small |= {"num_updates": 3, "batch_size": 16, "num_images": 2, "num_draws": 64}
    small |= {"num_points": 50, "num_particles": 64, "num_warmup": 50}
    small |= {"num_nuts_draws": 100, "num_proposals": 256}
    setting = dataclasses.replace(script.Setting(), **small)
    monkeypatch.setattr(script, "SETTING", setting)
    monkeypatch.setattr(script, "MAX_RHAT", np.inf)
    out = tmp_path / "rows.jsonl"
    options = ("--seeds", 0, "--num-steps", 5, "--kernels", "both", "--out", out)
    arguments("run", *options)
    script.main()
    rows = script.read(out)
    assert [r["kernels"] for r in rows] == ["encoder", "both"]
    for row in rows:
        assert np.isfinite(row["elbo_gap"])
        assert len(row["images"]["ess"]) == 2
        assert row["w2_ratio"] > 0
        # 64 particles for each of two images, of which every move counts.
        assert row["smc_gradient_evaluations"] > 2 * 64
        assert row["smc_energy_evaluations"] >= 2 * 64 * 3
    capsys.readouterr()
    arguments("table", out)
    script.main()
    said = capsys.readouterr().out
    assert "| both | 5 | 0 |" in said
    assert re.search(r"included\) and \S+ gradients and \S+ energies per image", said)


def test_transport_between_mode_shares():
    transport = _script("transport").transport
    price = np.subtract.outer([0.0, 1.0, 3.0], [0.0, 1.0, 3.0]) ** 2
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.3, 0.3, 0.4])
    # Along a line the order is kept: 0.2 of the first to 1, then 0.4 of 1 to 3.
    assert transport(price, p, q) == pytest.approx(0.2 * 1 + 0.4 * 4)
    assert transport(price, q, q) == pytest.approx(0, abs=1e-12)
    assert np.isnan(transport(price, 0 * p, q))


def test_distances_of_draws_that_are_not_finite():
    transport, target = _script("transport"), ds.targets.gmm9()
    x = np.array(target.sample(jax.random.key(1), 100))
    x[7, 1] = np.nan
    found = transport.distances(jax.random.key(0), target, x, 2)
    assert np.isnan([found["w2"], found["sinkhorn_ratio"], found["w2_ratio_se"]]).all()


def test_what_mode_counts_explain_is_taken_out():
    controlled = _script("transport").controlled
    rng = np.random.default_rng(0)
    simulated = rng.gamma(2.0, size=(5_000, 2))
    beside = rng.gamma(2.0, size=(10, 2)) + 1.0  # a bad sample of these
    rest = 0.01 * rng.normal(size=(10, 2))
    values = np.array([1.0, 2.0]) + 3.0 * beside + rest
    found = controlled(values, (beside, simulated))
    assert found.found == pytest.approx(1 + 3 * 2, abs=0.2)
    assert found.floor == pytest.approx(2 + 3 * 2, abs=0.2)
    plain = controlled(values)
    assert plain.found > 9
    assert found.noise < plain.noise / 10
    # What simulation leaves: 3 times the standard error of a difference of means.
    assert found.noise == pytest.approx(3 * np.sqrt(2 * 2 / 5_000), rel=0.1)


@pytest.mark.slow
def test_distances_are_at_their_floor_for_exact_draws_only():
    distances = _script("transport").distances
    target = ds.targets.gmm9()
    x = np.asarray(target.sample(jax.random.key(1), 4_000))
    found = distances(jax.random.key(0), target, x, 10)
    for name in ("w2", "sinkhorn"):
        ratio, noise = found[f"{name}_ratio"], found[f"{name}_ratio_se"]
        assert noise < 0.1
        assert abs(ratio - 1) < 4 * noise
    found = distances(jax.random.key(0), target, x + np.array([1.0, 0.0]), 10)
    assert found["sinkhorn_ratio"] > 1 + 4 * found["sinkhorn_ratio_se"]


def test_consistent_settings_are_defined():
    script = _script("consistent")
    for cell in script.CELLS:
        dim = ds.targets.by_name(cell.target).dim
        for method in cell.methods:
            if method == "teacher_dpm":  # drawn from the teacher
                continue
            sampler = script.make_sampler(cell, method, dim)
            if method == "cdds":  # its objective needs a teacher
                assert sampler.num_steps == 1
                continue
            assert sampler.num_steps == cell.num_steps
            assert not script.make_objective(cell, method, None).requires.anchor
            for num_steps in script.STEPS:
                if num_steps <= cell.num_steps:
                    assert sampler.with_num_steps(num_steps).has_weights
        assert script.make_behaviour(cell).provides.target_draws
    pairs = [(cell.target, m) for cell in script.CELLS for m in cell.methods]
    assert len(pairs) == len(set(pairs)) == 7 * len(script.METHODS)


def test_students_draw_without_their_way_back():
    script = _script("consistent")
    cell = script.Cell("gmm9", 3.0, 0.2, width=8)
    student = script.make_sampler(cell, "cdds", 2).with_num_steps(2)
    params, energy = student.init(jax.random.key(0)), ds.targets.gmm9().energy
    alone, own = script.unweighted("cdds", student, params)
    assert student.evaluations_per_path.network == 2 * 3
    assert alone.evaluations_per_path.network == 2
    a = student.final(params, jax.random.key(1), energy).x
    np.testing.assert_allclose(
        alone.final(own, jax.random.key(1), energy).x, a, rtol=1e-5
    )


def test_posteriors_are_sampled_in_the_coordinates_of_a_pilot(monkeypatch):
    measures, target = _script("consistent_measures"), ds.targets.ionosphere()
    monkeypatch.setattr(measures, "PILOT", ds.prior_draws(100))
    standard, num_evaluations = measures.standardised(target)
    assert standard.log_z == target.log_z
    assert num_evaluations == 16 * target.dim  # of Hessians
    y = jax.random.normal(jax.random.key(0), (3, target.dim))
    x = jax.vmap(standard.constrain)(y)
    found, expected = jax.vmap(standard.energy)(y), jax.vmap(target.energy)(x)
    matrix = jax.jacfwd(standard.constrain)(y[0])
    _, log_det = np.linalg.slogdet(np.asarray(matrix, np.float64))
    assert abs(log_det) > 1
    np.testing.assert_allclose(found, expected - log_det, rtol=1e-5)
    key = jax.random.key(1)
    x = jax.vmap(standard.constrain)(standard.sample_prior(key, 4))
    np.testing.assert_allclose(x, target.sample_prior(key, 4), atol=1e-4)


def test_what_coordinates_do_alone(monkeypatch):
    """A density that is normal in them, but for its scale in one."""
    measures, report = _script("consistent_measures"), _script("consistent_report")

    def energy(x):
        return 0.5 * (x[0] ** 2 + (x[1] / 1.5) ** 2) + 1.0

    log_z = float(np.log(2 * np.pi * 1.5) - 1.0)
    target = ds.Target(energy=energy, dim=2, name="plain", log_z=log_z)
    monkeypatch.setattr(measures, "truth", lambda _: measures.Truth(target))
    monkeypatch.setattr(report, "truth", measures.truth)
    found = measures.untrained("plain", 0, 4_000)
    divergence = np.log(1.5) - 0.5 * (1 - 1 / 1.5**2)
    assert found == {"elbo_gap": pytest.approx(divergence, abs=0.02)}
    rows = [{"target": "plain", "num_draws": 4_000}, {"target": "plain"}]
    (line,) = report.coordinates(rows)
    assert line.startswith("* plain, the unit normal of its coordinates itself: ELBO ")
    assert line.endswith("mean error -, of the field -, sd error -")


BOUNDS = {
    **{"target": "gmm9", "method": "cdds", "seed": 0, "num_steps": 1},
    **{"elbo_gap": 0.1, "eubo_gap": 0.2, "log_z_standard_error": None},
    **{"elbo_standard_error": 0.01, "eubo_standard_error": 0.02},
    "log_z_true_error": 0.0,
}


def test_consistent_tables_name_violated_bounds():
    honest, row = _script("consistent_report").honest, BOUNDS
    alone = {k: v for k, v in row.items() if "eubo" not in k}
    said = honest([row, row | {"eubo_gap": -0.05}, alone])
    assert "Of 3 rows with weights ELBO <= log Z on 3 and log Z <= EUBO on 2" in said
    assert "1 have no EUBO" in said
    assert "violated" not in said
    label = "gmm9, cdds, 1 steps, seed 0"
    for wrong in ({"elbo_gap": -0.04}, {"eubo_gap": -0.07}):
        assert f"Bounds violated: {label}." in honest([row, row | wrong])
        vague = {"log_z_true_error": 0.03}
        assert "violated" not in honest([row, row | wrong | vague])
    said = honest([row | {"elbo_gap": None}])
    assert "ELBO <= log Z on 0 and log Z <= EUBO on 1" in said
    assert f"not finite: {label}." in said


def test_consistent_says_how_far_error_bars_hold():
    calibration = _script("consistent_report").calibration
    row = {"method": "cdds", "num_steps": 2, "log_z_error": 0.03}
    rows = [
        row | {"log_z_standard_error": 0.01},
        row | {"log_z_error": -0.05, "log_z_standard_error": 0.03}
        | {"log_z_true_error": 0.04},
        row | {"log_z_standard_error": None},
        row | {"method": "teacher", "log_z_standard_error": 0.01},
    ]  # fmt: skip
    found = {method: cells for method, *cells in calibration(rows)}
    assert found["cdds"] == ["- (-) of 0", "2.2 (+1.0) of 2", *["- (-) of 0"] * 2]
    assert set(found["scds"]) == {"- (-) of 0"}


def test_consistent_claims_hold_for_the_worst_seed():
    report, rows = _script("consistent_report"), []
    for seed, error in ((0, 0.02), (1, 0.035)):
        row = {"target": "gmm9", "seed": seed, "calls_per_draw": 1}
        row |= {"flow_mode_tv": error, "w2_ratio": 1.04, "sinkhorn_ratio": None}
        rows += [row | {"method": "scds", "num_steps": k} for k in (1, 128)]
        rows += [row | {"method": "cdds", "num_steps": 1}]
        many = {"calls_per_draw": 128, "w2_ratio": 1.0 + seed / 50, "num_steps": 128}
        rows += [row | many | {"method": "teacher"}]
        for method, bar, k_hat in (("scds", None, 0.9), ("cdds", 0.01, -0.3)):
            weighed = {"log_z_error": -error / 2, "log_z_standard_error": bar}
            weighed["pareto_k"] = k_hat
            here = [r for r in rows if (r["method"], r["seed"]) == (method, seed)]
            here[0] |= weighed
            rows += [here[0] | {"num_steps": k} for k in (2, 4, 8)]
    lost = {"target": "gmm9", "method": "any_step", "num_steps": None, "seed": 1}
    rows.append(lost | {"failed": "TrainingDiverged: NaN"})
    timed = {"method": "cdds", "num_steps": 1, "draw_seconds": 0.5, "wall_ratio": 80.0}
    rows.append(timed | {"target": "gmm9", "seed": 0})
    lines = {text: cells for _, text, _, *cells in report.claims(rows)}
    assert lines["mode error"][0] == "0.028 (0.035) of 2 seeds in the mean"
    assert lines["mode error"][1] == "inf (inf) of 1 seeds no"
    assert lines["W2 / floor - 1"][2] == "0.040 (0.040) of 2 seeds yes"
    assert lines["Sinkhorn / floor - 1"][0] == "inf (inf) of 2 seeds no"
    assert lines["W2 over 128 steps, less 1"][2] == "0.030 (0.040) of 2 seeds yes"
    assert lines["log Z error, 1 to 8 steps"][0] == "inf (inf) of 2 seeds no"
    assert (
        lines["log Z error, 1 to 8 steps, any k-hat"][0] == "0.014 (0.018) of 2 seeds"
    )
    assert lines["log Z error, 1 to 8 steps"][2] == "0.014 (0.018) of 2 seeds yes"
    assert lines["k-hat, 1 to 8 steps"][0] == "0.900 (0.900) of 2 seeds no"
    assert lines["k-hat, 1 to 8 steps"][2] == "-0.300 (-0.300) of 2 seeds yes"
    calls = lines["network calls over the teacher's"]
    assert calls[2] == "0.008 (0.008) of 2 seeds yes"
    seconds = lines["wall time over the teacher's"]
    assert seconds[2] == "0.013 (0.013) of 1 seeds yes"
    assert lines["draws to break even with the teacher"][2] == "-"
    assert lines["sd error in a mode"][2] == "-"
    failed = "* gmm9, any_step, seed 1 failed: TrainingDiverged: NaN"
    assert report.failures(rows)[0] == failed
    assert report.failures([*rows, lost | {"num_steps": 1}]) == []


def test_break_even_counts_training():
    report = _script("consistent_report")
    calls = {"scds": (9_000, 1), "teacher": (1_000, 101)}

    def one(method, num_steps):
        training, each = calls[method]
        return {"all_network_evaluations": training, "calls_per_draw": each}

    assert report.break_even(one, "scds") == 80
    calls["scds"] = (500, 1)
    assert report.break_even(one, "scds") == 0
    assert report.verdict([2e5, 3e5, 4e5], None) == "3.0e+05 (4.0e+05)"


def test_shape_of_consistent_draws():
    measures = _script("consistent_measures")
    true = ds.targets.reference_moments("ionosphere")
    noise = np.random.default_rng(0).normal(size=(4_000, 35))
    noise = (noise - noise.mean(0)) / noise.std(0)
    x = true["mean"] + true["sd"] * (1.2 * noise + 0.5)
    found = measures.moments(ds.targets.ionosphere(), x)
    assert found["flow_mean_error"] == pytest.approx(0.5, abs=1e-3)
    assert found["flow_sd_error"] == pytest.approx(0.2, abs=1e-3)
    mixture, _, others, _ = measures.truth("gmm9")
    mode = np.asarray(jax.vmap(mixture.modes.assign)(jnp.asarray(others)))
    centre = np.array([others[mode == m].mean(0) for m in range(9)])[mode]
    stretched = centre + np.where(mode % 2, 1.2, 0.8)[:, None] * (others - centre)
    floors = measures.floors_of("gmm9", 50_000)
    assert 0 < floors["sd_error"] < 0.05
    assert 0 < floors["quantile_error"] < 0.05
    assert measures.sd_error("gmm9", stretched) == pytest.approx(0.2, abs=0.05)
    assert measures.sd_error("gmm9", others[mode != 3]) == 1.0
    assert measures.errors("gmm9", others[mode != 3])["modes_missed"] == 1
    a, b = measures.truth("funnel_hard")[1:3]
    assert measures.band_error(a, b) < 0.1
    wide = np.where(np.arange(10) == 1, 2.0, 1.0)
    assert measures.band_error(a * wide, b) == pytest.approx(2.33, abs=0.2)
    assert measures.band_error(a + 100.0, b) == np.inf


def test_shape_of_wells(monkeypatch):
    measures = _script("consistent_measures")
    monkeypatch.setattr(measures, "NUM_POINTS", 100)  # W2 is not looked at
    x = measures.truth("mw52").other[:20_000]
    found = measures.errors("mw52", x)
    assert 0 < found["gaussian_sd_error"] < 0.03
    assert 0 < found["well_sd_error"] < 0.05
    wide = measures.errors("mw52", np.where(np.arange(50) < 6, x, 1.2 * x))
    assert wide["gaussian_sd_error"] == pytest.approx(0.2, abs=0.03)
    assert wide["well_sd_error"] == found["well_sd_error"]
    one = measures.errors("mw52", np.abs(x))
    assert one["well_sd_error"] == np.inf


@pytest.mark.parametrize("name", ["gmm9", "funnel_hard", "mw54", "ionosphere"])
def test_draws_that_are_not_finite_are_infinitely_wrong(name, monkeypatch):
    measures = _script("consistent_measures")
    monkeypatch.setattr(measures, "NUM_POINTS", 100)
    dim = measures.truth(name).target.dim
    for bad in (np.nan, np.inf, -1e30):
        x = np.random.default_rng(0).normal(size=(300, dim)).astype(np.float32)
        x[5:15] = bad
        found = measures.shape(name, x)
        floors = {k for k in found if k.endswith("_floor")}
        wrong = {k for k in found if not found[k] < 10} - floors
        known = {"gmm9": "flow_quantile_error", "mw54": "flow_well_sd_error"}
        known |= {"funnel_hard": "flow_band_error", "ionosphere": "flow_sd_error"}
        assert known[name] in wrong


def test_a_failure_of_consistent_does_not_stop_the_others(
    tmp_path, arguments, monkeypatch, capsys
):
    script, judged = _script("consistent"), []
    cell = script.Cell("gmm9", 3.0, 0.2, num_steps=2, methods=("teacher", "scds"))
    monkeypatch.setattr(script, "CELLS", (cell,))
    spoilt = [("teacher", None, 0), ("scds", 2, 1)]

    def train(cell, method, seed, args):
        if (method, None, seed) in spoilt:
            raise ds.TrainingDiverged("no number", None)
        return "sampler", "params", {"seconds": 1.0}

    def judge(cell, method, sampler, params, num_steps, num_draws, seed, args):
        if (method, num_steps, seed) in spoilt:
            raise ValueError("SMC did not arrive")
        judged.append((method, num_steps, seed))
        return {"num_draws": num_draws, "elbo_gap": np.float32(np.nan)}

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "judge", judge)
    out = tmp_path / "rows.jsonl"
    arguments("run", "--targets", "gmm9", "--seeds", 0, 1, "--out", out)
    with pytest.raises(SystemExit, match="2 failed"):
        script.main()
    first = [("teacher", 1, 1), ("teacher", 2, 1)]
    first += [("scds", 1, 0), ("scds", 1, 1), ("scds", 2, 0)]
    assert judged == first
    assert "SMC did not arrive" in capsys.readouterr().err
    failed = [r["failed"] for r in script.read(out) if "failed" in r]
    assert failed == ["TrainingDiverged: no number", "ValueError: SMC did not arrive"]
    spoilt[:] = []
    script.main()
    assert judged[5:] == [("teacher", 1, 0), ("teacher", 2, 0), ("scds", 2, 1)]


def test_accounts_of_consistent_training_add_up(tmp_path, monkeypatch):
    script, stops = _script("consistent"), iter(["interrupt"])
    cell = script.Cell("gmm9", 3.0, 0.2, num_steps=2, num_updates=9)
    args = types.SimpleNamespace(out=tmp_path / "rows", num_updates=None, mesh=None)
    account = script.place_of(args) / "gmm9_teacher_0.json"

    def fit(*_, checkpoint, callback, **options):
        checkpoint.write_text("state")
        callback(3, {})
        return types.SimpleNamespace(
            **{"params": "params", "seconds": 30.0, "compile_seconds": 10.0},
            **{"num_energy_evaluations": 1, "num_gradient_evaluations": 2},
            **{"num_network_evaluations": 5, "num_skipped": 0},
            stopped_by=next(stops, "num_updates"),
        )

    monkeypatch.setattr(script.ds, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        script.train(cell, "teacher", 0, args)
    begun = json.loads(account.read_text())
    assert begun["seconds"] > 0
    account.write_text(json.dumps(begun | {"seconds": 7.0}))
    spent = script.train(cell, "teacher", 0, args)[2]
    assert (spent["seconds"], spent["num_calls"]) == (27.0, 2)
    assert spent["all_network_evaluations"] == 5
    assert script.train(cell, "teacher_dpm", 0, args)[2] == spent
    args.num_updates = 8
    with pytest.raises(ValueError, match="is of 9 updates, got 8; give --num-updates"):
        script.train(cell, "teacher", 0, args)


SMALL_CELL = {"num_updates": 2, "width": 8, "batch_size": 8, "num_repeats": 2}
SMALL_CELL |= {"num_particles": 64, "student_updates": 2}


@pytest.fixture
def small_consistent(monkeypatch):
    """The script with everything small, and a function to give it its cells."""
    script, measures = _script("consistent"), _script("consistent_measures")
    for name, value in (
        *(("NUM_STEPS", 4), ("STEPS", (1, 4)), ("STUDENT_STEPS", (1, 4))),
        *(("NUM_TIMES", 3), ("PARALLEL", ((8, 2),)), ("NUM_POINTS", 100)),
    ):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(measures, "NUM_POINTS", 100)
    monkeypatch.setattr(measures, "NUM_EXACT", 2_000)
    monkeypatch.setattr(_script("transport"), "SIMULATIONS", 2)
    monkeypatch.setattr(measures, "NUM_CHAINS", 4)
    short = {"ionosphere": (30, 100), "lgcp_whitened": (5, 8)}
    monkeypatch.setattr(measures, "NUTS", short)

    def use(*cells):
        monkeypatch.setattr(script, "CELLS", cells)
        return script

    option, names = "jax_disable_most_optimizations", ("truth", "floors_of", "mode_sds")
    cached = [getattr(measures, name) for name in (*names, "pairs_of")]
    before = jax.config.read(option)
    jax.config.update(option, True)  # compiling is what costs
    for function in cached:
        function.cache_clear()
    yield use
    for function in cached:
        function.cache_clear()
    jax.config.update(option, before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_run_of_consistent(tmp_path, arguments, small_consistent, capsys):
    cell_of = _script("consistent").Cell
    script = small_consistent(
        cell_of("gmm9", 3.0, 0.2, num_steps=4, num_timed=256, **SMALL_CELL)
    )
    out = tmp_path / "rows.jsonl"
    arguments("run", "--seeds", 0, "--num-draws", 200, "--out", out)
    script.main()
    rows = script.read(out)
    labels = [(r["method"], r["num_steps"]) for r in rows]
    assert labels == [(m, k) for m in script.METHODS for k in (1, 4)]
    weighted = [r for r in rows if r["method"] != "teacher_dpm"]
    assert all(np.isfinite(r["elbo_gap"]) for r in weighted)
    assert all(r["num_updates"] == 2 and r["seconds"] > 0 for r in rows)
    assert all(r["w2_ratio"] > 0 for r in rows)
    assert [r["calls_per_draw"] for r in rows] == [1, 4] * 5
    (*_, again) = rows
    assert again["all_network_evaluations"] > again["network_evaluations"]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    script.main()  # the last is judged again, and not trained
    (*_, again) = script.read(out)
    measured = ("elbo", "log_z", "w2_ratio", "seconds")
    assert [again[k] for k in measured] == [rows[-1][k] for k in measured]
    arguments("time", "--seeds", 0, "--repeats", 2, "--out", out)
    for _ in range(2):  # then nothing is left to do
        script.main()
        assert len(script.read(out)) == len(rows) + 4
    arguments("run", "--seeds", 0, "--num-draws", 200, "--out", out)
    script.main()
    assert len(script.read(out)) == len(rows) + 4
    arguments("table", "--num-steps", 1, 4, "--", out)
    script.main()
    said = capsys.readouterr().out
    assert "| gmm9 | any_step | 1 | 0 |" in said
    assert "| gmm9 | wall time over the teacher's | 0.02 |" in said
    place = tmp_path / "parallel.jsonl"
    arguments("parallel", "--seeds", 0, "--methods", "scds", "--out", place)
    for _ in range(2):
        script.main()
        assert len(script.read(place)) == 1
    assert "| gmm9 | scds | 0 | cpu" in capsys.readouterr().out
    place = tmp_path / "sinkhorn.jsonl"
    options = ("--seeds", 0, "--points", 50, "--methods", "scds", "cdds")
    arguments("footnote", *options, "--out", place)
    script.main()
    assert len({row["floor"] for row in script.read(place)}) == 1
    arguments("plot", out, "--folder", tmp_path)
    script.main()
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(
    "target", ["ionosphere", "drawn_image", "funnel_hard", "mw54", "lgcp_whitened"]
)
def test_every_kind_of_target_gets_through_consistent(
    target, tmp_path, arguments, small_consistent, monkeypatch, capsys
):
    """Modes and none, exact draws and none, every network: against late crashes."""
    small = {**SMALL_CELL, "num_steps": 2, "tune": False}
    cells = [c for c in _script("consistent").CELLS if c.target == target]
    script = small_consistent(*(dataclasses.replace(c, **small) for c in cells))
    monkeypatch.setattr(script, "STEPS", (1, 2))
    monkeypatch.setattr(script, "STUDENT_STEPS", (1,))
    monkeypatch.setattr(script, "NUM_TIMES", 2)
    points = np.random.default_rng(0).normal(size=(16, ds.targets.by_name(target).dim))
    mixed = ds.behaviours.mixture(
        (ds.behaviours.on_policy(), 0.5), (ds.behaviours.reference_draws(points), 0.5)
    )
    monkeypatch.setattr(script, "make_behaviour", lambda cell: mixed)  # SMC compiles
    out = tmp_path / "rows.jsonl"
    arguments("run", "--seeds", 0, "--num-draws", 128, "--out", out)
    script.main()
    rows = script.read(out)
    assert len(rows) == 2 * 5
    assert not [row for row in rows if "failed" in row]
    without = {(r["method"], r["num_steps"]) for r in rows if "eubo" not in r}
    assert without == {("teacher_dpm", 1), ("teacher_dpm", 2), ("cdds", 2)}
    arguments("table", "--num-steps", 1, 2, "--", out)
    script.main()
    assert f"| {target} | network calls over the teacher's |" in capsys.readouterr().out
    for draws in ((), ("--draws", tmp_path / "nowhere")):
        arguments("plot", out, "--folder", tmp_path, *draws)
        script.main()


# ---------------------------------------------------------------------------- speed


def test_operations_of_a_network_are_those_of_its_matrices():
    """Per state 2 (D H + 2 H^2 + H D), per step 2 (3 H^2) of time.

    The 2 H Fourier features of a time take 2 H^2, the layer after them H^2; the scale
    of a score takes as much, and H D more.
    """
    script, dim, width = _script("speed"), 3, 16
    sampler = ds.samplers.pis(dim, 4, network=ds.networks.free(width, depth=2))
    per_state = 2 * (dim * width + 2 * width**2 + width * dim)
    per_step = 2 * (2 * width * width + width**2)
    assert script.network_flops(sampler) == (per_state, per_step)
    guided = ds.samplers.pis(dim, 4, network=ds.networks.score_guided(width, depth=2))
    scale = 2 * (2 * width * width + width**2 + width * dim)
    assert script.network_flops(guided) == (per_state, per_step + scale)


def _speed_row(command, **fields):
    environment = {"device": "cpu", "python": "3", "versions": {"jax": "1.2.3"}}
    return {"command": command, "cell": str(fields), **environment, **fields}


def _update_row(num_steps, batch_size, seconds, **fields):
    usual = {"target": "gmm25", "dim": 2, "cores": 1, "num_devices": 1, "width": 64}
    usual |= {"repeats": 3, "temporary_bytes": 3 * 2**20}
    return _speed_row(
        "updates",
        objective="log_variance",
        network="guided",
        num_steps=num_steps,
        batch_size=batch_size,
        best_seconds=seconds,
        cpu_ms=1e3 * seconds,
        best_cpu_ms=1e3 * seconds,
        compile_seconds=9.0,
        energy_gradients=100.0,
        network_flops=2e9,
        rate=2e9 / seconds,
        matmul_rate=4e9 / seconds,
        stored_bytes=2 * 2**20,
        peak_bytes=800 * 2**20,
        **usual | fields,
    )


def test_table_of_speed(tmp_path, arguments, capsys):
    script, out = _script("speed"), tmp_path / "rows.jsonl"
    peers = tmp_path / "peers.jsonl"
    rows = [_update_row(100, 512, 0.1), _update_row(10, 512, 0.01)]
    rows += [_update_row(256, 512, 9.0, repeats=1, target="lgcp", dim=1600)]
    wells = {"target": "manywell8", "dim": 8}, {"target": "manywell", "dim": 32}
    rows += [_update_row(5, 8, s, **w) for s, w in zip((0.1, 0.2), wells, strict=True)]
    two = {"cores": 2, "num_devices": 2, "mesh": 2}
    rows += [_update_row(100, 512, 0.05, **two), _update_row(100, 512, 0.2, cores=2)]
    for seconds, change in ((0.3, {"width": 128}), (0.4, {"bfloat16": True})):
        rows += [_update_row(100, 512, seconds, **change)]
        rows += [_update_row(10, 512, seconds / 4, **change)]
    rows += [_update_row(100, 512, 0.1, workload="gmm25 log_variance vsm")]
    rows += [_update_row(7, 8, 0.1, device="A100, 16 cores", temporary_bytes=None)]
    draws = {"num_steps": 1, "batch_size": 10, "cores": 1, "draws_per_second": 5e5}
    draws |= {"best_seconds": 0.25, "judged_seconds": 0.5}
    rows += [_speed_row("draws", target="gmm25", **draws)]
    rows += [_speed_row("compile", sampler="dds", objective="log_variance", cores=2)]
    rows[-1]["compile_seconds"] = 9.0
    profile = {"best_seconds": 0.1, "simulate": 0.03, "score": 0.06, "with_bar": 0.101}
    profile |= {"width": 64, "num_steps": 9, "batch_size": 8, "cores": 1}
    metrics = {"with_metrics": 0.102, "without_metrics": 0.1}
    rows += [_speed_row("profile", target="gmm25", **profile, **metrics)]
    rows += [_speed_row("profile", target="funnel", **profile)]  # measured before
    quality = {"objective": "reverse_kl", "batch_size": 8, "learning_rate": 0.1}
    quality |= {"eubo_gap": 0.25, "mode_tv": None, "cores": 1, "verdict": "trust"}
    runs = [("gmm9", 3.0, True), ("gmm9", 5.0, True), ("gmm9", 60.0, False)]
    rows += [
        _speed_row(
            "quality", target=t, seconds=s, reached=r, energies=s * 1e6, **quality
        )
        for t, s, r in [*runs, ("mw54", 60.0, False)]
    ]
    rows += [
        _speed_row("quality", target="mw54", seconds=7.0, reached=False, **quality)
    ]
    rows[-1] |= {"energies": 7e6, "eubo_gap": None, "diverged": True, "verdict": None}
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    peer = {"workload": "gmm25 log_variance vsm", "peer": "other", "cpu_ms": 200.0}
    peers.write_text(json.dumps(peer) + "\n" + json.dumps(peer | {"cpu_ms": 400.0}))
    arguments("table", out, "--peer-file", peers)
    script.main()
    said = capsys.readouterr().out
    assert "| gmm25, 2-D | log_variance | 1 | 100 | 512 | 100 | 9 s | 100 |" in said
    assert "| 256 | 512 | 9000 (one run) |" in said
    assert "| 2.00 | 50% | 3 | 1.50 | 800 |" in said
    assert "| other, 200 ms | 0.50 |" in said
    same = "| gmm | log_variance |"
    assert f"| steps K {same} 10, 100 | 512 | 2 | 1 | 1.00 |" in said
    assert "| manywell | log_variance | 5 | 8 | 8, 32 | 1 | 0.50 |" in said
    assert f"| devices {same} 100 | 512 | 2 | 1, 2 | -1.00 |" in said
    assert said.count("| -1.00 |") == 1  # a device with two cores is no half of them
    for unusual in ("width 128", "bfloat16"):
        assert f"| gmm25, 2-D, {unusual} | log_variance | 1 | 100 | 512 |" in said
        line = f"| gmm, {unusual} | log_variance | 10, 100 | 512 | 2 | 1 | 0.60 |"
        assert line in said
    assert "| gmm25, 2-D | log_variance | 2 devices | 100 | 512 | 50 |" in said
    assert "| dds | log_variance | 2 | 9 |" in said
    assert (
        "| gmm25 | 64 | 9 | 8 | 1 | 100.0 | 30.0 | 60.0 | 10.0 | +2.0% | +1.0% |"
        in said
    )
    assert "| 10.0 | - | +1.0% |" in said
    assert "| gmm25 | 1 | 10 | 1 | 500,000 | 250.0 | 500.0 |" in said
    assert "| gmm25, 2-D | log_variance | A100 | 7 | 8 | 100 |" in said
    assert "| 50% | - | - | 800 |" in said
    assert "| 1 | 2 of 3 | 3 | 5 (inf) | 4.0 | 0.25 | - |" in said
    assert "| 1 | 0 of 2, 1 diverged | 1 | inf (inf) | - | 0.25 | - |" in said


def test_quality_of_a_run_that_diverges(monkeypatch):
    """The row stays, with what was known at the last look."""
    script, starts = _script("speed"), []

    def fit(key, sampler, objective, energy, *, state, **options):
        starts.append(state)
        count = 0 if state is None else int(state.count)
        params = sampler.init(key) if len(starts) < 3 else None
        run = types.SimpleNamespace(
            params=params,
            state=types.SimpleNamespace(count=count + options["num_updates"]),
            seconds=3.0,
            compile_seconds=2.0,
        )
        if params is None:
            error = ds.TrainingDiverged("NaN", run.state)
            error.fit_result = run
            raise error
        return run

    evidence = types.SimpleNamespace(estimate=-5.0, lower=-7.0)
    draws = types.SimpleNamespace(log_evidence=evidence)
    report = {"eubo_gap": 4.0, "verdict": "do not trust"}
    monkeypatch.setattr(script.ds, "fit", fit)
    monkeypatch.setattr(script.ds, "draw", lambda *_, **__: draws)
    monkeypatch.setattr(script.ds, "evaluate", lambda *_, **__: report)
    cell = {"target": "gmm9", "objective": "reverse_kl", "batch_size": 8, "seed": 0}
    row = script.measure_quality(cell | {"learning_rate": 1.0}, 60.0)
    assert (row["reached"], row["diverged"]) == (False, True)
    assert (row["seconds"], row["updates"], len(starts)) == (3.0, 300, 3)
    assert (row["log_z_error"], row["elbo_gap"], row["eubo_gap"]) == (-5.0, 7.0, 4.0)
    starts[:] = [None, None]  # now it diverges before the first look
    row = script.measure_quality(cell | {"learning_rate": 1.0}, 60.0)
    assert (row["diverged"], row["updates"], row["seconds"]) == (True, 100, 1.0)
    assert row["log_z_error"] is row["elbo_gap"] is row["verdict"] is None


def test_workloads_of_other_programs(arguments):
    script = _script("speed")
    arguments("updates", "--peers")
    names = {cell["workload"] for cell in script.cells_of(script.parse())}
    peers = script.read(FOLDER / "peers.jsonl")
    assert {peer["workload"] for peer in peers} <= names


def test_cells_of_speed_with_a_mesh(arguments):
    script = _script("speed")
    for command in script.MEASURES:
        arguments(command, "--mesh", 2)
        assert {cell["mesh"] for cell in script.cells_of(script.parse())} == {2}
    arguments("updates", "--peers", "--mesh", 2, "--seconds", 1)
    assert {cell["mesh"] for cell in script.cells_of(script.parse())} == {2}


@pytest.mark.parametrize(
    "words",
    [
        "compile --targets gmm25",
        "compile --seconds 1",
        "precision --steps 4",
        "quality --width 8",
        "draws --objectives log_variance",
        "updates --peers --targets gmm25",
        "updates --bfloat16 --peers",
    ],
)
def test_options_that_a_command_of_speed_does_not_use(words, arguments, capsys):
    arguments(*words.split())
    with pytest.raises(SystemExit):
        _script("speed").parse()
    flag = re.search(r"--(?!peers)\w+", words).group()
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("name", ["speed", "speed_gpu"])
def test_commands_of_the_pages_on_speed_parse(name, arguments):
    page = FOLDER.parent / "docs" / "benchmarks" / f"{name}.md"
    text = page.read_text().replace("\\\n", "").replace("[", "").replace("]", "")
    commands = re.findall(r"^.*experiments/speed\.py (.*)$", text, re.M)
    assert len(commands) > 5
    for command in commands:
        arguments(*shlex.split(command, comments=True))
        _script("speed").parse()


def test_a_speed_cell_that_fails_is_named(tmp_path, arguments, capfd):
    script, out = _script("speed"), tmp_path / "rows.jsonl"
    arguments("draws", "--batches", 0, "--steps", 1, "--targets", "gmm25", "--out", out)
    script.main()
    assert "num_draws must be at least 1, got 0" in capfd.readouterr().err
    assert script.read(out) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_runs_of_speed(tmp_path, arguments, capsys):
    script, out = _script("speed"), tmp_path / "rows.jsonl"
    small = ("--seconds", 0.1, "--width", 8, "--targets", "gmm25", "--out", out)
    shape = ("--steps", 4, "--batches", 16)
    for words in (
        ("updates", "--objectives", "log_variance", *shape),
        ("scoring", *shape),
        ("profile", *shape),
        ("draws", *shape),
    ):
        arguments(*words, *small)
        script.main()
    options = ("--seconds", 0.1, "--objectives", "reverse_kl", "--batches", 16)
    arguments("quality", "--targets", "gmm9", "--seeds", 0, *options, "--out", out)
    script.main()
    rows = script.read(out)
    assert [r["command"] for r in rows] == [
        "updates",
        "scoring",
        "profile",
        "draws",
        "quality",
    ]
    assert rows[0]["energy_gradients"] == 16 * 5
    arguments("table", out)
    script.main()
    assert "Where the time of an update goes" in capsys.readouterr().out
    arguments("plot", out, "--folder", tmp_path)
    script.main()
    assert (tmp_path / "speed.png").exists()


PROGRAM = {
    "utils/helper.py": "",
    "algorithms/common/diffusion_related/noise_schedule.py": """
        def get_cosine_noise_schedule(total_steps, reverse):
            return lambda step: 1.0 + step / total_steps * reverse
        """,
    "algorithms/common/diffusion_related/init_model.py": """
        import jax.numpy as jnp, optax
        from flax.training.train_state import TrainState
        from utils import helper

        def init_model(key, dim, settings):
            params = {"params": {"mean": jnp.zeros(dim), "logZ": jnp.zeros(1)}}
            assert helper.traverse_util.flatten_dict(params)
            tx = optax.sgd(settings.step_size)
            return TrainState.create(apply_fn=None, params=params, tx=tx)
        """,
    "algorithms/pis/pis_rnd.py": """
        import jax, jax.numpy as jnp

        def rnd(key, state, params, size, prior, target, steps, noise, stop_grad=True):
            x = params["params"]["mean"] + jax.random.normal(key, (size, target.dim))
            terminal = -jax.vmap(target.log_prob)(x) + prior[1](x, noise(steps))
            return x, jnp.zeros(size), None, terminal

        def neg_elbo(*given):
            x, running, _, terminal = rnd(*given)
            return jnp.mean(running + terminal), (terminal, x)

        def trajectory_balance(key, state, params, *rest):
            x, running, _, terminal = rnd(key, state, params, *rest)
            miss = running + terminal - params["params"]["logZ"]
            return jnp.mean(miss**2), (miss, x)
        """,
}
PROGRAM["algorithms/gfn/gfn_rnd.py"] = PROGRAM["algorithms/pis/pis_rnd.py"]


def test_another_program_is_timed_on_our_densities(
    tmp_path, arguments, capsys, monkeypatch
):
    """A small one with its names: every loss is one of our densities and moves."""
    checkout, out = tmp_path / "program", tmp_path / "peers.jsonl"
    for name, text in PROGRAM.items():
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    script = _script("speed_peers")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(script, "LEAST_UPDATES", 2)
    words = ["run", "--checkout", checkout, "--targets", "gmm25", "--seconds", "0"]
    for _ in range(2):  # the second time there is nothing left to do
        arguments(*words, "--out", out)
        script.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    labels = ["reverse_kl", "log_variance", "trajectory_balance"]
    assert [r["workload"] for r in rows] == [f"gmm25 {label} vsm" for label in labels]
    assert all(r["finite"] and r["cpu_ms"] > 0 and r["num_updates"] == 2 for r in rows)
    assert "gmm25 trajectory_balance vsm" in capsys.readouterr().out
    for name in [n for n in sys.modules if n.split(".")[0] in ("algorithms", "utils")]:
        del sys.modules[name]
