"""Training: the pure step, the loop around it, its budgets, and what goes wrong.

One small recipe (a linear control, K = 4, 16 paths) is compiled once and serves most
tests: data, number of updates and budgets are arguments of the compiled code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from tables import OBJECTIVES

import diffsamp as ds

DIM, NUM_STEPS, BATCH = 2, 4, 16
PILOT = 1024  # paths of the check at the start
TRACES = []  # one entry for each time Python runs the energy
COMPILATIONS = []  # the name of each program XLA compiles


def _count_compilation(name, seconds, fun_name="", **_):
    del seconds
    if name.endswith("backend_compile_duration"):
        COMPILATIONS.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def _init(key, dim):
    del key
    return {"shift": jnp.zeros(dim), "gain": jnp.zeros(())}


def _drift(params, x, t, context):
    del t, context
    return params["shift"] - params["gain"] * x


def _score_drift(params, x, t, context):
    del t
    return params["shift"] - params["gain"] * (x - context.score)


CONTROL = ds.networks.from_function(_init, _drift)
SAMPLER = ds.samplers.dis(DIM, NUM_STEPS, scale=1.5, network=CONTROL)
SGD, ADAM = optax.sgd(1.0), optax.adam(0.1)


def _energy(data, x):
    TRACES.append(None)
    value = 0.5 * jnp.sum((x - data["mean"]) ** 2)
    return jnp.where(x[0] > data["edge"], jnp.nan, value)


def energy_of(mean=(1.0, -1.0), edge=np.inf, bad=()):
    """A Gaussian energy that is NaN right of ``edge``; ``bad`` is for an objective."""
    bad = np.array(tuple(bad) + (-1,) * (4 - len(bad)))
    data = {"mean": np.float32(mean), "edge": np.float32(edge), "bad": bad}
    return Partial(_energy, jax.tree.map(jnp.asarray, data))


def fit(num_updates=20, *, seed=0, sampler=SAMPLER, objective=None, **options):
    options = {"batch_size": BATCH, "progress_bar": False} | options
    return ds.fit(
        jax.random.key(seed),
        sampler,
        objective or ds.objectives.log_variance(),
        options.pop("energy", None) or energy_of(),
        num_updates=num_updates,
        **options,
    )


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_same(a, b):
    """Equal to the last bit, keys included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def base():
    """Twenty updates of the shared recipe."""
    return fit(20)


# ------------------------------------------------------------------ the pure pair


@pytest.fixture(scope="module")
def recipe():
    return ds.training.Recipe(
        SAMPLER,
        ds.objectives.log_variance(),
        ds.behaviours.on_policy(),
        ADAM,
        BATCH,
        ema_decay=0.5,
    )


@pytest.fixture(scope="module")
def stepped(recipe):
    """States and metrics of twelve hand-made updates, from the key that fit uses."""
    step = jax.jit(ds.training.step, static_argnums=0)
    key = jax.random.split(jax.random.key(0))[1]
    state, cost = ds.training.init(key, recipe, energy_of())
    assert cost == (0, 0, 0)
    states, metrics = [state], []
    for _ in range(12):
        state, info, cost = step(recipe, state, energy_of())
        states.append(state)
        metrics.append(info)
    return step, states, metrics


def test_init_and_step_are_pure(recipe, stepped):
    step, states, metrics = stepped
    key = jax.random.split(jax.random.key(0))[1]
    assert_same(ds.training.init(key, recipe, energy_of())[0], states[0])
    again, info, _ = step(recipe, states[3], energy_of())
    assert_same(again, states[4])
    assert_same(info, metrics[3])
    assert [int(s.count) for s in states] == list(range(13))


def test_fit_is_the_pure_pair_in_a_loop(stepped):
    _, states, metrics = stepped
    result = fit(12, optimizer=ADAM, ema_decay=0.5, max_grad_norm=None)
    np.testing.assert_allclose(
        flat(result.state.params), flat(states[-1].params), rtol=1e-5
    )
    np.testing.assert_allclose(flat(result.params), flat(states[-1].average), rtol=1e-5)
    losses = [float(m["loss"]) for m in metrics]
    np.testing.assert_allclose(result.metrics["loss"], losses, rtol=1e-4)


def test_moving_average(stepped):
    _, states, _ = stepped
    average = flat(states[0].params["sampler"])
    for count, state in enumerate(states[1:]):
        rate = max(1 - 0.5, 9 / (10 + count))  # a longer memory is earned
        average = rate * flat(state.params["sampler"]) + (1 - rate) * average
        np.testing.assert_allclose(flat(state.average), average, rtol=1e-5, atol=1e-6)
    assert not np.allclose(flat(states[-1].average), flat(states[-1].params["sampler"]))


# --------------------------------------------------------------- chunks, bar, callback


@pytest.mark.parametrize("length", [1, 7])
def test_chunks_change_nothing(base, length):
    chunked = fit(20, updates_per_chunk=length)
    assert_same(chunked.params, base.params)
    assert_same(chunked.state, base.state)
    assert_same(chunked.metrics, base.metrics)


def test_progress_bar_changes_no_number(base, monkeypatch, capsys):
    for name in ("CI", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    with_bar = fit(20, progress_bar=True)
    assert "elbo" in capsys.readouterr().err
    without = fit(20, progress_bar=False)
    assert capsys.readouterr().err == ""
    for result in (with_bar, without):
        assert_same(result.state, base.state)
        assert_same(result.metrics, base.metrics)


@pytest.mark.parametrize("name", ["CI", "PYTEST_XDIST_WORKER"])
def test_progress_bar_is_silent_where_nobody_looks(monkeypatch, capsys, name):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv(name, "1")
    fit(5, progress_bar=True)
    assert capsys.readouterr() == ("", "")


def test_metrics_of_every_update(base):
    expected = {"loss", "grad_norm", "skipped", "elbo", "ess", "num_nonfinite"}
    expected |= {"variance_alarm"}
    assert set(base.metrics) == expected
    for values in base.metrics.values():
        assert isinstance(values, np.ndarray)
        assert values.shape == (20,)
        assert np.all(np.isfinite(values))
    assert np.all((base.metrics["ess"] > 0) & (base.metrics["ess"] <= 1.0 + 1e-6))
    assert base.stopped_by == "num_updates"
    assert base.num_skipped == 0
    assert base.seconds >= base.compile_seconds > 0


def test_callback_sees_every_chunk(base):
    seen = []
    result = fit(20, callback=lambda count, metrics: seen.append((count, metrics)))
    assert seen[-1][0] == 20
    assert [count for count, _ in seen] == sorted({count for count, _ in seen})
    for name, values in base.metrics.items():
        np.testing.assert_array_equal(
            np.concatenate([metrics[name] for _, metrics in seen]), values
        )
    assert_same(result.params, base.params)


def test_callback_stops(base):
    result = fit(20, updates_per_chunk=7, callback=lambda count, _: count >= 14)
    assert result.stopped_by == "callback"
    assert int(result.state.count) == len(result.metrics["loss"]) == 14
    np.testing.assert_array_equal(result.metrics["loss"], base.metrics["loss"][:14])


def test_interrupt_returns_the_state_so_far(base):
    def interrupt(count, metrics):
        del metrics
        if count >= 14:
            raise KeyboardInterrupt

    result = fit(20, updates_per_chunk=7, callback=interrupt)
    assert result.stopped_by == "interrupt"
    assert int(result.state.count) == len(result.metrics["loss"]) == 14
    assert_same(fit(6, state=result.state).params, base.params)


@pytest.mark.parametrize("ema_decay", [0.99, None])
def test_donated_states(ema_decay):
    first = fit(8, donate_state=True, ema_decay=ema_decay)
    second = fit(12, state=first.state, donate_state=True, ema_decay=ema_decay)
    expected = fit(20, ema_decay=ema_decay)
    assert_same(second.state, expected.state)
    assert_same(second.params, expected.params)
    again = fit(12, state=first.state, ema_decay=ema_decay)  # it is still there
    assert_same(again.state, expected.state)


def test_an_interrupt_within_donated_updates(base, tmp_path, monkeypatch):
    seen, wait = [], jax.block_until_ready

    def interrupted(tree):
        if isinstance(tree, ds.training.TrainState):
            seen.append(tree)
            if int(tree.count) == 14:
                raise KeyboardInterrupt
        return wait(tree)

    options = {"checkpoint": tmp_path / "run", "checkpoint_seconds": 0.0}
    options |= {"updates_per_chunk": 7, "donate_state": True}
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(20, **options)
    *before, last = seen
    assert all(leaf.is_deleted() for s in before for leaf in jax.tree.leaves(s))
    assert not last.count.is_deleted()
    resumed = fit(20, **options)
    assert_same(resumed.state, base.state)
    np.testing.assert_array_equal(resumed.metrics["loss"], base.metrics["loss"])


def test_an_exception_carries_what_was_trained(base):
    class Pruned(Exception):
        pass

    def prune(count, metrics):
        del metrics
        if count >= 14:
            raise Pruned("not promising")

    with pytest.raises(Pruned, match="not promising") as caught:
        fit(20, updates_per_chunk=7, callback=prune)
    result = caught.value.fit_result
    assert "fit_result" in caught.value.__notes__[0]
    assert result.stopped_by == "exception"
    assert int(result.state.count) == len(result.metrics["loss"]) == 14
    assert_same(fit(6, state=result.state).params, base.params)


# ------------------------------------------------------------ continuing, warm starts


def test_continued_fit_equals_one_longer_run(base):
    first = fit(8)
    second = fit(12, seed=99, state=first.state)  # the key of the state counts
    assert_same(second.state, base.state)
    assert_same(second.params, base.params)
    np.testing.assert_array_equal(
        np.concatenate([first.metrics["loss"], second.metrics["loss"]]),
        base.metrics["loss"],
    )


def test_raw_keys_are_accepted(base):
    result = ds.fit(
        jax.random.PRNGKey(0),
        SAMPLER,
        ds.objectives.log_variance(),
        energy_of(),
        num_updates=20,
        batch_size=BATCH,
        progress_bar=False,
    )
    assert_same(result.params, base.params)


def test_warm_start():
    values = {"shift": np.float32([0.8, -0.8]), "gain": np.float32(0.25)}
    trained = {"generation": values}
    nothing = fit(0, params=trained)
    assert_same(nothing.params, trained)
    assert nothing.metrics == {}
    cold, warm = fit(5), fit(5, params=trained)
    assert warm.metrics["elbo"][0] > cold.metrics["elbo"][0] + 0.1


def test_training_learns(base):
    longer = fit(400, state=base.state)
    assert longer.metrics["elbo"][-50:].mean() > base.metrics["elbo"][:10].mean() + 0.2


def test_noisier_paths_give_no_lower_bound():
    """Of paths with exploration noise the mean log-weight may exceed log Z."""
    metrics = fit(2, behaviour=ds.behaviours.exploration(0.5)).metrics
    assert np.isnan(metrics["elbo"]).all()
    assert np.isnan(metrics["ess"]).all()
    assert np.isfinite(metrics["loss"]).all()


# ------------------------------------------------------------------------- budgets


def test_budget_of_energy_evaluations():
    budget = PILOT + 10 * BATCH + 5
    result = fit(None, max_energy_evaluations=budget)
    assert result.stopped_by == "max_energy_evaluations"
    spent = result.num_energy_evaluations + result.num_gradient_evaluations
    assert budget <= spent < budget + BATCH
    assert len(result.metrics["loss"]) == int(result.state.count) == 11


def test_budget_in_chunks_is_overrun_by_less_than_a_chunk():
    budget = PILOT + 10 * BATCH
    result = fit(None, max_energy_evaluations=budget, updates_per_chunk=7)
    spent = result.num_energy_evaluations + result.num_gradient_evaluations
    assert budget <= spent < budget + 7 * BATCH


def test_budget_below_the_pilot_trains_nothing():
    result = fit(None, max_energy_evaluations=10)
    assert result.stopped_by == "max_energy_evaluations"
    assert int(result.state.count) == 0


def test_budget_of_seconds():
    result = fit(None, max_seconds=0.5)
    assert result.stopped_by == "max_seconds"
    assert result.seconds - result.compile_seconds >= 0.5
    assert len(result.metrics["loss"]) == int(result.state.count)


def test_first_budget_to_run_out_stops():
    assert fit(3, max_seconds=1e3).stopped_by == "num_updates"
    assert fit(10**6, max_seconds=0.2).stopped_by == "max_seconds"


def test_no_budget_is_five_thousand_updates():
    result = fit(None, callback=lambda count, _: count >= 10)
    assert result.stopped_by == "callback"


@pytest.mark.parametrize("case", ["energy alone", "with score, replay", "reverse KL"])
def test_evaluations_are_counted_as_they_happen(case):
    happened = {"energy": 0, "gradient": 0}

    def count(kind, x):
        """Zero, counting the points on the way; one call for a whole batch."""

        def host(x):
            happened[kind] += x.size // DIM
            return np.zeros(x.shape[:-1], x.dtype)

        shape = jax.ShapeDtypeStruct((), x.dtype)
        return jax.pure_callback(host, shape, x, vmap_method="expand_dims")

    def value(x):
        return 0.5 * jnp.sum((x - 1.0) ** 2)

    @jax.custom_vjp
    def energy(x):
        return value(x) + count("energy", x)

    def forward(x):
        x = x + count("gradient", x)
        return value(x), x - 1.0

    energy.defvjp(forward, lambda gradient, g: (g * gradient,))
    if case == "energy alone":  # the objective's pilot is counted too
        options = {"objective": ds.objectives.trajectory_balance()}
        expected = (2 * PILOT + 2 * 4, 0)
    elif case == "reverse KL":  # differentiates the energy, not its pilot
        options = {"objective": ds.objectives.reverse_kl()}
        expected = (PILOT, 2 * 4)
    else:
        network = ds.networks.from_function(_init, _score_drift, needs_score=True)
        options = {
            "sampler": ds.samplers.dis(DIM, NUM_STEPS, network=network),
            "behaviour": ds.behaviours.mixture(
                (ds.behaviours.on_policy(), 0.5), (ds.behaviours.replay(64), 0.5)
            ),
        }
        expected = (0, (PILOT + 2 * 4) * (NUM_STEPS + 1))
    result = fit(2, energy=energy, batch_size=4, **options)
    counted = result.num_energy_evaluations, result.num_gradient_evaluations
    assert counted == (happened["energy"], happened["gradient"])
    assert counted == expected
    assert result.num_network_evaluations > 0


def test_what_the_behaviour_spends_is_counted():
    """As tempered SMC does: something at the start, something at every third update."""

    def init(key, sampler, params, energy):
        return (), ds.Cost(1_000, 2_000)

    def update(state, key, sampler, params, energy, trajectories, proposal, count):
        return state, ds.Cost(*(jnp.where(count % 3 == 2, c, 0) for c in (10, 20)))

    behaviour = ds.behaviours.on_policy()._replace(init=init, update=update)
    result = fit(7, behaviour=behaviour)
    assert result.num_energy_evaluations == PILOT + 1_000 + 7 * BATCH + 2 * 10
    assert result.num_gradient_evaluations == 2_000 + 2 * 20


# ----------------------------------------------------------------------- optimisers


def test_gradient_norm_is_clipped():
    for bound in (0.1, None):
        result = fit(1, optimizer=SGD, max_grad_norm=bound, ema_decay=None)
        assert_same(result.params, result.state.params["sampler"])
        norm = result.metrics["grad_norm"][0]
        assert norm > 0.1  # as it was before clipping
        moved = np.linalg.norm(flat(result.params))  # from zero, at rate one
        np.testing.assert_allclose(moved, bound or norm, rtol=1e-5)


def test_anneal_follows_the_budget():
    def half(progress):
        return jnp.where(progress < 0.5, 1.0, 0.0)

    annealed = fit(10, anneal=half)
    np.testing.assert_allclose(
        flat(annealed.state.params), flat(fit(5).state.params), rtol=1e-6
    )


def test_param_labels_name_the_groups():
    sampler = ds.samplers.gbs(DIM, 4, network=CONTROL, destruction_network=CONTROL)
    params = {
        "sampler": sampler.init(jax.random.key(0)),
        "objective": {"0": {}, "1": {"log_z": jnp.zeros(())}},
    }
    labels = ds.param_labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert set(jax.tree.leaves(labels["sampler"]["generation"])) == {"generation"}
    assert set(jax.tree.leaves(labels["sampler"]["destruction"])) == {"destruction"}
    assert labels["objective"]["1"]["log_z"] == "log_z"


def test_parameter_groups_have_their_own_optimiser():
    sampler = ds.samplers.gbs(DIM, 4, network=CONTROL, destruction_network=CONTROL)
    optimizer = optax.multi_transform(
        {
            "generation": optax.set_to_zero(),
            "destruction": optax.adam(1e-2),
            "log_z": optax.adam(1e-1),
        },
        ds.param_labels,
    )
    result = fit(
        3,
        sampler=sampler,
        objective=ds.objectives.trajectory_balance(),
        optimizer=optimizer,
        ema_decay=None,
    )
    assert np.all(flat(result.params["generation"]) == 0)
    assert np.any(flat(result.params["destruction"]) != 0)
    assert result.state.params["objective"]["log_z"] != 0
    assert result.metrics["log_z"].shape == (3,)


# ----------------------------------------------------------------------- compiled once


def test_nothing_compiles_again(base):
    fit(12, state=base.state)  # warms what continuing needs
    TRACES.clear()
    COMPILATIONS.clear()
    other = fit(30, seed=5, energy=energy_of((-1.0, 0.5)))  # new data of equal shape
    fit(7, seed=6, state=other.state, energy=energy_of((0.0, 0.5)), max_seconds=1e3)
    assert COMPILATIONS == []
    assert len(TRACES) <= 4  # the check of its shape
    assert not np.array_equal(flat(other.params), flat(base.params))


def test_a_resumed_run_compiles_nothing(tmp_path):
    path = tmp_path / "run"
    for num_updates in (4, 8):  # the second warms what resuming needs
        fit(num_updates, checkpoint=path)
    COMPILATIONS.clear()
    resumed = fit(12, checkpoint=path)
    assert COMPILATIONS == []
    assert int(resumed.state.count) == 12


def test_a_new_closure_compiles_and_works(base):
    data = energy_of().args[0]

    def closure(x):
        return _energy(data, x)

    COMPILATIONS.clear()
    result = fit(20, energy=closure)
    assert [name for name in COMPILATIONS if "_updates" in name] == ["jit(_updates)"]
    np.testing.assert_allclose(flat(result.params), flat(base.params), rtol=1e-4)
    COMPILATIONS.clear()
    assert_same(fit(20, energy=closure).params, result.params)
    assert COMPILATIONS == []


# ------------------------------------------------------------------- non-finite numbers


def test_non_finite_rows_are_left_out_and_counted():
    result = fit(20, energy=energy_of(edge=1.0))
    assert result.num_skipped == 0
    assert np.all(result.metrics["num_nonfinite"] > 0)
    assert np.all(np.isfinite(flat(result.params)))


def test_updates_without_a_finite_row_are_skipped_and_counted():
    # At the start about one row in 25 is finite, so that half of the batches have none.
    result = fit(40, energy=energy_of(edge=-2.6))
    skipped = result.metrics["skipped"]
    assert 0 < result.num_skipped == skipped.sum() < 40
    np.testing.assert_array_equal(np.isnan(result.metrics["loss"]), skipped == 1)
    assert np.all(np.isfinite(flat(result.state.params)))
    assert np.all(np.isfinite(flat(result.state.opt_state)))


def _poison(x, factor):
    return x


poison = jax.custom_vjp(_poison)
poison.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def _failing_init(key, sampler, params, energy, pilot):
    del key, sampler, params, energy, pilot
    return {}, jnp.zeros((), jnp.int32)


def _failing_loss(params, state, batch):
    """Finite, but its gradient is NaN at the updates that the energy's data name."""
    del state
    fails = jnp.any(batch.count == batch.energy.args[0]["bad"])
    shift = params["sampler"]["generation"]["shift"]
    return jnp.sum((poison(shift, jnp.where(fails, jnp.nan, 1.0)) - 1.0) ** 2), {}


FAILING = ds.Objective(
    ds.Requirements(), _failing_init, _failing_loss, lambda p, state, b: state + 1
)


def test_a_skipped_update_changes_nothing_but_the_counts():
    result = fit(8, objective=FAILING, energy=energy_of(bad=(3, 5, 6)))
    np.testing.assert_array_equal(result.metrics["skipped"], [0, 0, 0, 1, 0, 1, 1, 0])
    assert np.all(np.isfinite(result.metrics["loss"]))
    assert result.num_skipped == 3
    state = result.state
    assert int(state.count) == 8
    assert int(state.objective_state) == 5
    # Five good updates lead where five updates in a row lead.
    undisturbed = fit(5, objective=FAILING).state
    assert_same(state.params, undisturbed.params)
    assert_same(state.opt_state, undisturbed.opt_state)


@pytest.mark.parametrize("length", [None, 1])
def test_too_many_skips_in_a_row_raise_whatever_the_chunks(length):
    options = {"objective": FAILING, "updates_per_chunk": length}
    options["max_skipped_in_a_row"] = 3
    energy = energy_of(bad=(2, 4, 5, 6))
    with pytest.raises(ds.TrainingDiverged, match=r"3 updates in a row.*learning rate"):
        fit(10, energy=energy, **options)
    assert fit(10, energy=energy_of(bad=(2, 4, 5)), **options).num_skipped == 3


def test_divergence_hands_back_a_usable_state(base):
    broken = energy_of(mean=(np.nan, 0.0))
    with pytest.raises(ds.TrainingDiverged) as caught:
        fit(50, state=base.state, energy=broken, max_skipped_in_a_row=5)
    state = caught.value.state
    assert_same(state.params, base.state.params)
    assert_same(state.average, base.state.average)
    assert_same(state.opt_state, base.state.opt_state)
    assert int(state.num_skipped) >= 5
    repaired = fit(5, state=state, max_skipped_in_a_row=5)
    assert np.all(np.isfinite(repaired.metrics["loss"]))
    assert not np.array_equal(flat(repaired.params), flat(base.params))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_energy_without_a_finite_value_at_the_start(value):
    with pytest.raises(ValueError, match=r"loc and scale.*standardise"):
        fit(5, energy=energy_of(mean=(value, 0.0)))


# ---------------------------------------------------------------------------- bad input


BAD_ENERGIES = [
    ("scalar", lambda x: x),
    ("scalar", lambda x: jnp.sum(x, keepdims=True)),
    ("dim=2", lambda x: jnp.sum(x * jnp.ones(3))),
    ("floating", lambda x: jnp.sum(x > 0)),
    ("target.energy", ds.Target(energy=jnp.sum, dim=DIM)),
    ("one point", lambda x: float(x[0])),
]


@pytest.mark.parametrize(("words", "energy"), BAD_ENERGIES)
def test_bad_energies_are_named(words, energy):
    with pytest.raises(ValueError, match=words):
        fit(5, energy=energy)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (r"log_variance\(\)", {"objective": ds.objectives.log_variance}),
        (r"on_policy\(\)", {"behaviour": ds.behaviours.on_policy}),
        (r"diffsamp\.samplers", {"sampler": ds.samplers.dis}),
        ("at least 2, got 1", {"batch_size": 1}),
        ("at least 2, got 0", {"batch_size": 0}),
        ("num_updates", {"num_updates": -1}),
        (r"num_updates must be an integer, got 600\.0", {"num_updates": 600.0}),
        ("max_energy_evaluations must be an int", {"max_energy_evaluations": 1e4}),
        (r"batch_size must be an integer, got 8\.0", {"batch_size": 8.0}),
        ("params are not those", {"params": {"generation": {"shift": jnp.zeros(3)}}}),
        ("max_seconds", {"max_seconds": -1.0}),
        ("at least 1, got 0", {"max_energy_evaluations": 0}),
        ("max_seconds", {"max_seconds": float("nan")}),
        ("updates_per_chunk", {"updates_per_chunk": 0}),
        ("folder", {"checkpoint": "/nowhere/at/all/run.ds"}),
        ("only repeats", {"behaviour": ds.behaviours.replay(64)}),
        (
            "needs behaviours.on_policy",
            {
                "objective": ds.objectives.reverse_kl(),
                "behaviour": ds.behaviours.exploration(0.1),
            },
        ),
        ("target draws", {"objective": ds.objectives.forward_kl()}),
        (
            "on-policy rows",
            {
                "objective": ds.objectives.reverse_kl_log_derivative(),
                "behaviour": ds.behaviours.exploration(0.1),
            },
        ),
    ],
)
def test_bad_requests_are_named(words, options):
    with pytest.raises(ValueError, match=words):
        fit(**({"num_updates": 5} | options))


def test_a_key_that_is_none():
    with pytest.raises(ValueError, match=r"jax\.random\.key"):
        ds.fit(0, SAMPLER, ds.objectives.log_variance(), energy_of(), num_updates=1)


def test_no_update_calls_the_host():
    objective, behaviour = ds.objectives.log_variance(), ds.behaviours.on_policy()
    recipe = ds.training.Recipe(SAMPLER, objective, behaviour, optax.adam(1e-3), 16)
    energy = energy_of()
    state, _ = jax.eval_shape(
        lambda key: ds.training.init(key, recipe, energy), jax.random.key(0)
    )
    update = jax.make_jaxpr(lambda state: ds.training.step(recipe, state, energy))
    assert "callback" not in str(update(state))


# -------------------------------------------------------------------------- memory


def _temporary_bytes(objective, num_steps, batch_size=256):
    sampler = ds.samplers.dis(
        2, num_steps, network=ds.networks.annealed_score_guided(width=32)
    )
    recipe = ds.training.Recipe(
        sampler,
        objective,
        ds.behaviours.on_policy(),
        optax.adam(1e-3),
        batch_size,
        memory_budget=2**20,
    )
    energy = ds.targets.gmm9().energy
    state, _ = jax.eval_shape(
        lambda key: ds.training.init(key, recipe, energy), jax.random.key(0)
    )
    step = jax.jit(lambda state: ds.training.step(recipe, state, energy))
    compiled = step.lower(state).compile()
    floats = (num_steps + 1) * 2 + num_steps * (2 + 1)  # states, scores and energies
    return compiled.memory_analysis().temp_size_in_bytes, 4 * batch_size * floats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log_variance", "trajectory_balance"])
def test_memory_does_not_grow_with_the_number_of_steps(name):
    """But for the stored states: steps are scored a chunk at a time."""
    objective = OBJECTIVES[name]()
    few, many = (_temporary_bytes(objective, k) for k in (10, 100))
    assert many[0] < 1.3 * few[0] + many[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "log_variance",
        "trajectory_balance",
        "detailed_balance",
        "sub_trajectory_balance",
    ],
)
def test_memory_is_that_of_the_states_and_scores(name):
    """256 steps of 2,048 paths in 32 dimensions."""
    target = ds.targets.manywell()
    sampler, batch_size = ds.samplers.pis(target.dim, 256), 2_048
    objective, behaviour = getattr(ds.objectives, name)(), ds.behaviours.on_policy()
    recipe = ds.training.Recipe(
        sampler, objective, behaviour, optax.adam(1e-3), batch_size
    )
    state, _ = jax.eval_shape(
        lambda key: ds.training.init(key, recipe, target.energy), jax.random.key(0)
    )
    step = jax.jit(lambda state: ds.training.step(recipe, state, target.energy))
    used = step.lower(state).compile().memory_analysis().temp_size_in_bytes
    assert used < 1.3 * 2 * 4 * batch_size * 257 * target.dim
