"""DiffusionSampler: from a model to draws, evidence and a verdict."""

import contextlib
import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.stats
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS, Predictive

import diffsamp as ds
from diffsamp.numpyro import DiffusionSampler, RandomStepNUTS, pilots
from diffsamp.numpyro.agreement import PRECISE, imprecision
from diffsamp.numpyro.coordinates import to_x
from diffsamp.numpyro.verdicts import checked
from diffsamp.types import Target

pytestmark = pytest.mark.relaxed("dtypes", "ranks")

DATA = jnp.array([0.5, 1.5, 1.0])


def model(y=None):
    """Conjugate: N(0, 4) prior, unit noise."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    numpyro.deterministic("twice", 2 * mean)
    with numpyro.plate("data", 3):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


PRECISION = 3 + 1 / 4
POSTERIOR_MEAN, POSTERIOR_SD = 3.0 / PRECISION, PRECISION**-0.5
COVARIANCE = np.eye(3) + 4.0
LOG_Z = -0.5 * (
    np.asarray(DATA) @ np.linalg.solve(COVARIANCE, np.asarray(DATA))
    + np.linalg.slogdet(2 * np.pi * COVARIANCE)[1]
)


def improper(y):
    mean = numpyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def small(model, **options):
    defaults = {"num_steps": 4, "num_particles": 256, "max_seconds": 2.0}
    return DiffusionSampler(model, **(defaults | options))


@pytest.fixture(scope="module")
def inference():
    made = small(model)
    made.fit(jax.random.key(0), 400, y=DATA, progress_bar=False)
    made.run(jax.random.key(1), 2_000, y=DATA, progress_bar=False)
    return made


def test_the_answer(inference):
    samples = inference.get_samples()
    assert samples["mean"].shape == samples["twice"].shape == (2_000,)
    np.testing.assert_allclose(samples["twice"], 2 * samples["mean"], 1e-5, 1e-6)
    assert samples["mean"].mean() == pytest.approx(POSTERIOR_MEAN, abs=0.05)
    assert samples["mean"].std() == pytest.approx(POSTERIOR_SD, rel=0.1)
    evidence = inference.log_evidence
    assert abs(evidence.estimate - LOG_Z) < 4 * evidence.standard_error + 1e-3
    assert evidence.lower <= LOG_Z + 0.01
    assert inference.diagnostics.verdict.startswith("trust")


def two_modes(y):
    x = numpyro.sample("x", dist.Normal(0.0, 3.0))
    numpyro.sample("y", dist.Normal(jnp.abs(x + 1.0), 0.3), obs=y)


def test_several_modes_are_started_from_a_mixture(monkeypatch):
    """Unequal modes at 1 and -3: the sampler starts in both, and has their weights."""
    made = small(two_modes)
    made.fit(jax.random.key(0), 60, y=2.0, progress_bar=False)
    state = made.state
    assert state.sampler.num_steps == 2
    assert len(state.pilot.x) == len(state.probe.x) == 4 * 256
    assert np.array_equal(state.points[::4], state.pilot.x)
    shares = jax.nn.softmax(state.params["prior"]["logits"])
    assert 2 <= len(shares) <= 8
    grid = np.linspace(-8.0, 8.0, 20_001)
    logs = -(grid**2) / 18 - (np.abs(grid + 1.0) - 2.0) ** 2 / 0.18
    density = np.exp(logs) / (2 * np.pi * 3.0 * 0.3)
    mass = density.sum() * (grid[1] - grid[0])
    made.run(jax.random.key(1), 2_000, y=2.0, progress_bar=False)
    right = float(np.mean(made.get_samples()["x"] > -1.0))
    expected = density[grid > -1.0].sum() / density.sum()
    assert right == pytest.approx(expected, abs=0.04)
    evidence = made.log_evidence
    assert abs(evidence.estimate - np.log(mass)) < 4 * evidence.standard_error + 1e-3
    assert made.diagnostics.verdict.startswith("trust")
    mcmc = MCMC(made.kernel(), num_warmup=5, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(3), y=2.0)
    jumps = np.abs(np.diff(np.asarray(mcmc.get_samples()["x"]) > -1.0)).sum()
    assert jumps > 50
    again = pickle.loads(pickle.dumps(state.params))
    jax.tree.map(np.testing.assert_array_equal, again, state.params)
    pilot = state.pilot
    monkeypatch.setattr(
        "diffsamp.numpyro.inference.pilots.find", lambda *_, **__: pytest.fail("again")
    )
    made.fit(jax.random.key(2), 20, state=state, progress_bar=False)
    assert made.state.pilot is pilot


def rotated_funnel():
    """Along a diagonal, by a factor: there is no site to decentre."""
    prior = dist.Normal(0.0, 20.0).expand([6]).to_event(1)
    x = numpyro.sample("x", prior)
    z = x - x.sum() / 3  # a reflection
    v = numpyro.deterministic("v", z[0])
    log_density = dist.Normal(0.0, 3.0).log_prob(v)
    log_density += dist.Normal(0.0, jnp.exp(v / 2)).log_prob(z[1:]).sum()
    numpyro.factor("funnel", log_density - prior.log_prob(x))


@pytest.mark.slow
def test_of_a_geometry_that_is_too_hard_the_verdict_says_so(monkeypatch):
    """And chains with the sampler in them are right, or disagree."""
    monkeypatch.setattr("diffsamp.numpyro.inference.MOST_DRAWS", 20_000)
    made = small(rotated_funnel)
    made.run(jax.random.key(0), 1_000, progress_bar=False)
    assert not made.diagnostics.verdict.startswith("trust")
    local = RandomStepNUTS(rotated_funnel, max_tree_depth=6)
    kernel = made.kernel(num_proposals=8, local_kernel=local)
    mcmc = MCMC(
        kernel,
        num_warmup=500,
        num_samples=4_000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1))
    v = np.asarray(mcmc.get_samples(group_by_chain=True)["v"])
    parts = v.reshape(-1, 500)
    error = parts.mean(axis=1).std(ddof=1) / np.sqrt(len(parts))
    is_right = abs(v.mean()) < 4 * error and abs(v.std() / 3.0 - 1) < 0.2
    assert is_right or split_gelman_rubin(v) > 1.01


def test_moved_points_stay_in_the_posterior():
    """Of a Gaussian with an offset, from exact draws; families stay together."""
    rng, scale = np.random.default_rng(0), jnp.array([0.5, 2.0])
    target = Target(lambda x: 0.5 * jnp.sum(((x - 3.0) / scale) ** 2), 2)
    x = jnp.asarray(3.0 + rng.normal(size=(2_000, 2)) * scale, jnp.float32)
    pilot = pilots.Pilot(x, "exact", 5, 7, log_z=-2.0)
    found = pilots.moved(jax.random.key(0), target, pilot, num_times=2)
    families = np.asarray(found.x).reshape(2_000, 3, 2)
    assert np.array_equal(families[:, 0], x)
    for points in (families[:, 1], families[:, 2]):
        assert np.all(np.mean(points != families[:, 0], axis=0) > 0.9)
        np.testing.assert_allclose(points.mean(axis=0), 3.0, atol=4 * 2 / 2_000**0.5)
        np.testing.assert_allclose(points.std(axis=0), scale, rtol=0.08)
    assert found.num_gradient_evaluations >= 2 * 2_000 * 10
    assert found.num_energy_evaluations > 0
    assert found.log_z == -2.0


def test_a_small_budget_and_a_given_sampler_have_small_pilots():
    for options in (
        {"max_energy_evaluations": 400_000},
        {"sampler": lambda dim, num_steps: ds.samplers.dis(dim, num_steps)},
    ):
        made = small(two_modes, **options)
        made.fit(jax.random.key(0), 2, y=2.0, progress_bar=False)
        assert len(made.state.pilot.x) == len(made.state.probe.x) == 256


def test_shapes_are_those_of_mcmc(inference):
    mcmc = MCMC(NUTS(model), num_warmup=20, num_samples=30, progress_bar=False)
    mcmc.run(jax.random.key(0), y=DATA)
    for grouped in (False, True):
        one, other = (m.get_samples(group_by_chain=grouped) for m in (mcmc, inference))
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].shape[1 + grouped :] == other[name].shape[1 + grouped :]
    fields = inference.get_extra_fields(group_by_chain=True)
    assert fields["potential_energy"].shape == fields["log_weight"].shape == (1, 2_000)
    assert np.all(fields["energy_evals"] == 1)  # the network is shown no score


def test_potential_energies_are_in_the_models_coordinates(inference):
    energy = inference.state.target.standardised(None).energy
    x = inference.get_samples()["mean"][:20]
    expected = jax.vmap(energy)(x[:, None])
    found = inference.get_extra_fields()["potential_energy"][:20]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_weighted_samples(inference):
    samples, log_weight = inference.get_weighted_samples()
    assert len(log_weight) == len(samples["mean"]) >= 2_000
    assert np.exp(log_weight).sum() == pytest.approx(1.0, abs=1e-3)
    mean = np.exp(log_weight) @ np.asarray(samples["mean"])
    assert mean == pytest.approx(POSTERIOR_MEAN, abs=0.05)


def test_summary(inference, capsys):
    inference.print_summary()
    printed = capsys.readouterr().out
    for words in ("mean", "5.0%", "log Z", "ELBO", "k-hat", "verdict"):
        assert words in printed
    assert "twice" not in printed


def test_everything_is_counted(inference):
    report, cost = inference.diagnostics, inference.state.cost
    assert report.num_energy_evaluations > cost.energy > 0
    assert report.num_gradient_evaluations >= cost.gradient > 0
    assert report.num_network_evaluations > cost.network > 0
    pilot = inference.state.pilot
    assert cost.gradient >= pilot.num_gradient_evaluations


def test_predictive(inference):
    predictive = Predictive(model, inference.get_samples())
    assert predictive(jax.random.key(1))["y"].shape == (2_000, 3)


@pytest.mark.slow
def test_the_kernel(inference):
    mcmc = MCMC(inference.kernel(), num_warmup=0, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(2), y=DATA, extra_fields=("accept_prob",))
    assert mcmc.get_samples()["mean"].mean() == pytest.approx(POSTERIOR_MEAN, abs=0.15)
    assert mcmc.get_extra_fields()["accept_prob"].mean() > 0.5


def test_chains_of_what_is_not_trusted_start_from_the_probe(inference, monkeypatch):
    """In the kernel's private parts, for a chain's start alone says nothing."""
    assert inference.diagnostics.verdict.startswith("trust")
    assert inference.kernel()._starts is None
    state, draws = inference.state, inference.draws
    for verdict in (None, "reweight", "do not trust: for no reason"):
        report = draws.diagnostics._replace(verdict=verdict)
        drawn = draws._replace(diagnostics=report) if verdict else None
        monkeypatch.setattr(inference, "_draws", drawn)
        starts = inference.kernel()._starts
        np.testing.assert_allclose(
            starts, to_x(state.target.coordinates, state.probe.x)
        )


def test_trained_once_for_the_same_data(inference, monkeypatch):
    monkeypatch.setattr(inference, "fit", lambda *_, **__: pytest.fail("trained"))
    inference.run(jax.random.key(3), 100, y=jnp.array(DATA))
    assert inference.num_samples == 100


def test_draws_until_moments_are_known(inference, monkeypatch):
    made = copy.copy(inference)
    monkeypatch.setattr("diffsamp.numpyro.inference.JUDGED_DRAWS", 400)
    made.run(jax.random.key(3), 100, y=DATA)
    assert made.get_samples()["mean"].shape == (100,)
    draws = made.draws
    assert len(draws.x) > 1_000  # 0.03 sd for the mean
    assert imprecision(draws.x, draws.log_weight).excess < 0.85
    assert made.diagnostics.verdict.startswith("trust")
    monkeypatch.setattr("diffsamp.numpyro.inference.MOST_DRAWS", 500)
    monkeypatch.setitem(PRECISE, "mean", 0.01)
    made.run(jax.random.key(3), 100, y=DATA)
    assert len(made.draws.x) == 500
    assert "has a standard error of" in made.diagnostics.verdict
    assert "(the mean of '" in made.diagnostics.verdict


def test_too_few_draws_are_said_to_be_too_few(inference, capsys):
    made = copy.copy(inference)
    made.run(jax.random.key(3), 1, y=DATA)
    assert made.get_samples()["mean"].shape == (1,)
    made.print_summary()
    assert "do not trust: too few draws" in capsys.readouterr().out


def test_new_data_of_equal_shape_do_not_compile_the_training_again(inference, compiled):
    made = copy.copy(inference)
    compiled.clear()
    made.fit(jax.random.key(0), 20, y=DATA + 1.0, progress_bar=False)
    made.run(jax.random.key(1), 2_000, y=DATA + 1.0)
    assert sum(compiled) < 2.0  # of about 15 seconds
    expected = float(jnp.sum(DATA + 1.0)) / PRECISION
    samples, log_weight = made.get_weighted_samples()
    mean = np.exp(log_weight) @ np.asarray(samples["mean"])
    assert mean == pytest.approx(expected, abs=0.05)


def shared(y):
    """The same with as many data as there are."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(mean, 1.0).expand(y.shape).to_event(1), obs=y)


@pytest.mark.slow
def test_other_data_are_trained_on():
    """Of another size, too; raw keys do."""
    made = small(shared)
    for data in (DATA, DATA + 10.0, jnp.full(8, -3.0)):
        made.run(jax.random.PRNGKey(0), 500, y=data, progress_bar=False)
        expected = float(jnp.sum(data)) / (len(data) + 1 / 4)
        assert made.get_samples()["mean"].mean() == pytest.approx(expected, abs=0.15)


@pytest.mark.slow
def test_objective_behaviour_and_optimizer_may_be_given():
    made = small(
        model,
        objective=ds.objectives.trajectory_balance(),
        behaviour=ds.behaviours.on_policy(),
        optimizer=optax.adam(5e-3),
    )
    made.fit(jax.random.key(0), 200, y=DATA, progress_bar=False)
    assert "log_z" in made.state.fit.metrics  # of trajectory balance
    made.run(jax.random.key(1), 1_000, y=DATA)
    assert made.get_samples()["mean"].mean() == pytest.approx(POSTERIOR_MEAN, abs=0.1)


@pytest.mark.slow
def test_what_is_summed_out_by_the_way():
    """An enumerated site: the weights of the two values of x's mean, and log Z."""
    pytest.importorskip("funsor")

    def enumerated(y):
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + 2.0 * z, 0.5), obs=y)

    made = small(enumerated)
    made.run(jax.random.key(0), 2_000, y=1.5, progress_bar=False)
    normal, var = scipy.stats.norm.pdf, 1.25
    parts = np.array([0.7 * normal(1.5, 0, var**0.5), 0.3 * normal(-0.5, 0, var**0.5)])
    means = np.array([1.5, -0.5]) / var
    expected = parts @ means / parts.sum()
    assert made.get_samples()["x"].mean() == pytest.approx(expected, abs=0.1)
    evidence = made.log_evidence
    exact = np.log(parts.sum())
    assert abs(evidence.estimate - exact) < 4 * evidence.standard_error + 1e-3


def test_a_trained_sampler_is_pickled(inference):
    """Also its state alone, from which another goes on."""
    again = pickle.loads(pickle.dumps(inference))
    for name, values in inference.get_samples().items():
        np.testing.assert_array_equal(again.get_samples()[name], values)
    other = small(model)
    state = pickle.loads(pickle.dumps(inference.state))
    other.fit(jax.random.key(2), 3, state=state, progress_bar=False)
    other.run(jax.random.key(3), 200, y=DATA)
    assert other.get_samples()["mean"].mean() == pytest.approx(POSTERIOR_MEAN, abs=0.2)


def test_run_without_the_data_of_training_is_refused(inference):
    with pytest.raises(ValueError, match="run needs the data again"):
        copy.copy(inference).run(jax.random.key(0), 100)


def test_a_weight_that_is_no_number_counts_as_none(inference):
    made = copy.copy(inference)
    log_weight = np.array(made.draws.log_weight)
    log_weight[0] = np.nan
    made._draws = made.draws._replace(log_weight=log_weight)
    _, found = made.get_weighted_samples()
    assert found[0] == -np.inf
    assert np.exp(found).sum() == pytest.approx(1.0)


@pytest.mark.slow
def test_fit_goes_on():
    made = small(model)
    first = made.fit(jax.random.key(0), 10, y=DATA, progress_bar=False)
    assert len(first.fit.metrics["loss"]) == 5  # of the second stage
    second = made.fit(jax.random.key(1), 7, y=DATA, state=first, progress_bar=False)
    assert len(second.fit.metrics["loss"]) == 7
    assert second.pilot is first.pilot
    assert second.cost.energy > first.cost.energy


@pytest.mark.slow
def test_a_budget_of_energies():
    made = small(model, max_energy_evaluations=1)
    with pytest.warns(UserWarning, match="the pilots alone took all of max_energy"):
        state = made.fit(jax.random.key(0), None, y=DATA, progress_bar=False)
    assert state.fit is None
    with pytest.warns(UserWarning, match="the sampler is not trained"):
        made.run(jax.random.key(1), 50, y=DATA)
    assert made.get_samples()["mean"].shape == (50,)


def fails(error, *when):
    """`pilots.find` that does not work at these of its calls."""
    find, calls = pilots.find, []

    def find_or_fail(*args, **kwargs):
        calls.append(1)
        if len(calls) in when:
            raise error
        return find(*args, **kwargs)

    return find_or_fail


def test_a_state_stays_with_its_data(inference, monkeypatch):
    """Draws for new data never come from what was trained on the old."""
    made = copy.copy(inference)
    draws = made.draws
    monkeypatch.setattr(pilots, "find", fails(ValueError("no points"), 1, 2))
    for _ in range(2):
        with pytest.raises(ValueError, match="no points"):
            made.run(jax.random.key(3), 100, y=DATA + 50.0, progress_bar=False)
    assert made.state is inference.state
    assert made.draws is draws
    with pytest.raises(ValueError, match="state was trained on other data"):
        made.fit(jax.random.key(0), 2, y=DATA + 50.0, state=made.state)


def test_the_bar_shows_the_elbo(inference, monkeypatch, capsys):
    for name in ("CI", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    made = copy.copy(inference)
    made.fit(jax.random.key(0), 20, state=made.state)
    assert "elbo=" in capsys.readouterr().err


def test_to_go_on_needs_no_data_again(inference):
    made = copy.copy(inference)
    made.fit(jax.random.key(0), 3, state=made.state, progress_bar=False)
    assert np.array_equal(made.state.data[1]["y"], DATA)
    assert len(made.state.fit.metrics["loss"]) == 3


@pytest.mark.parametrize("error", [ValueError("hopeless"), KeyboardInterrupt()])
def test_without_a_second_pilot_there_is_no_trust(inference, monkeypatch, error):
    made = copy.copy(inference)
    monkeypatch.setattr(pilots, "find", fails(error, 2))
    is_error = isinstance(error, ValueError)
    expect = pytest.warns(RuntimeWarning, match="second pilot failed.*hopeless")
    with expect if is_error else contextlib.nullcontext():
        made.fit(jax.random.key(0), 400, y=DATA, progress_bar=False)
    assert made.state.probe is None
    assert (made.state.fit is None) != is_error  # Ctrl-C ends all of it
    made.run(jax.random.key(1), 500, y=DATA)
    assert ("unchecked" in made.diagnostics.verdict) == is_error
    assert (made.state.probe is None) == is_error  # the other is looked for again
    assert made.state.fit is not None


def test_missing_values_are_the_same_data(inference):
    made, y = copy.copy(inference), jnp.array([jnp.nan, 1.0])
    made.state = made.state._replace(data=((), {"y": y}))
    state = made.fit(
        jax.random.key(0), 2, state=made.state, y=y + 0, progress_bar=False
    )
    assert len(state.fit.metrics["loss"]) == 2


def judged(made, monkeypatch, verdicts):
    """As if the stages had been judged like this; an exception is raised."""
    found = iter(verdicts)
    report = made.draws.diagnostics

    def judge(*_):
        verdict = next(found)
        if isinstance(verdict, BaseException):
            raise verdict
        return report._replace(verdict=verdict, ess_fraction=0.1)

    monkeypatch.setattr(made, "_judge", judge)


def stages_of(made, monkeypatch, outcomes):
    """As if stages had trained this; an exception is raised."""
    found = iter(outcomes)

    def train(*_):
        outcome = next(found)
        if isinstance(outcome, BaseException):
            raise outcome
        made.state = made.state._replace(params=outcome)
        return False

    monkeypatch.setattr(made, "_train", train)


def test_the_best_state_so_judged_is_kept(inference, monkeypatch):
    made = copy.copy(inference)
    stages_of(made, monkeypatch, "abcdef")
    judged(made, monkeypatch, ["reweight", "trust", *["reweight"] * 4])
    assert made.fit(jax.random.key(0), y=DATA, progress_bar=False).params == "b"


def test_going_on_never_loses_what_there_was(inference, monkeypatch):
    made = copy.copy(inference)
    stages_of(made, monkeypatch, "abcdef")
    judged(made, monkeypatch, ["trust", *["reweight"] * 6])
    before = made.state.params
    assert made.fit(jax.random.key(0), state=made.state).params is before


@pytest.mark.parametrize("when", ["training", "judging", "divergence"])
def test_an_end_before_time_keeps_the_best_state(inference, monkeypatch, when):
    made = copy.copy(inference)
    stop = KeyboardInterrupt()
    if when == "divergence":
        stop = ds.TrainingDiverged("100 updates in a row", None)
    trained, verdicts = ["a", "b", "c"], ["trust", "reweight", stop]
    if when != "judging":
        trained[2] = stop
    stages_of(made, monkeypatch, trained)
    judged(made, monkeypatch, verdicts)
    warns = when == "divergence"
    expect = pytest.warns(RuntimeWarning, match="training diverged, and the best")
    with expect if warns else contextlib.nullcontext():
        made.fit(jax.random.key(0), y=DATA, progress_bar=False)
    assert made.state.params == "a"


def test_ctrl_c_in_training_ends_it(inference):
    made = copy.copy(inference)

    def press(*_):
        raise KeyboardInterrupt

    made.fit(jax.random.key(0), 400, y=DATA, callback=press, progress_bar=False)
    assert made.state.fit.stopped_by == "interrupt"
    assert len(made.state.fit.metrics["loss"]) < 200
    made.run(jax.random.key(1), 50, y=DATA)
    assert made.get_samples()["mean"].shape == (50,)


def test_ctrl_c_while_more_is_drawn_keeps_what_was(inference, monkeypatch):
    made = copy.copy(inference)
    draw, sizes = made._draw, []

    def draw_twice(key, num_draws):
        sizes.append(num_draws)
        if len(sizes) > 2:
            raise KeyboardInterrupt
        return draw(key, num_draws)

    monkeypatch.setattr(made, "_draw", draw_twice)
    monkeypatch.setattr(made, "_wanted", lambda draws: 2 * len(draws.x))
    made.run(jax.random.key(3), 5, y=DATA)
    assert sizes == [5, 10, 20]
    assert len(made.draws.x) == 10
    counted = made.diagnostics.num_energy_evaluations - int(made.state.cost.energy)
    assert counted == 15 + 2 * len(made.state.probe.x)


def test_a_budget_of_energies_is_shared_by_the_stages(inference, monkeypatch):
    made = copy.copy(inference)
    made._max_energy_evaluations = 10_000_000
    given = []
    monkeypatch.setattr(made, "_train", lambda *args: bool(given.append(args[2])))
    judged(made, monkeypatch, ["reweight"] * 6)
    made.fit(jax.random.key(0), y=DATA, progress_bar=False)
    spent = int(made.state.cost.energy) + int(made.state.cost.gradient)
    assert 0.9 * (10_000_000 - spent) < sum(given) <= 10_000_006 - spent


def test_pilots_that_disagree_are_no_witnesses(inference):
    state, draws = inference.state, inference.draws
    pilot, probe = state.pilot.x, state.probe.x
    assert checked("trust", state.target, draws, pilot, probe) == "trust"
    verdict = checked("trust", state.target, draws, pilot, probe + 0.4)
    assert verdict.startswith("reweight (the two pilots disagree about the mean of '")
    other = draws._replace(log_weight=draws.log_weight + 0.5 * draws.x[:, 0])
    verdict = checked("trust", state.target, other, pilot, probe)
    assert "(draws and pilots disagree about the mean" in verdict


@pytest.mark.slow
def test_an_improper_prior_has_no_evidence(capsys):
    made = small(improper)
    made.run(jax.random.key(0), 500, y=DATA, progress_bar=False)
    assert made.get_samples()["mean"].mean() == pytest.approx(1.0, abs=0.1)
    with pytest.warns(UserWarning, match="no evidence: the priors of mean .*proper"):
        evidence = made.log_evidence
    assert np.isnan(evidence.estimate)
    made.print_summary()
    assert "no evidence: the priors of mean are improper" in capsys.readouterr().out


def test_before_anything_is_done():
    made = small(model)
    for call in (made.get_samples, made.print_summary, made.get_weighted_samples):
        with pytest.raises(RuntimeError, match="call run"):
            call()
    with pytest.raises(RuntimeError, match="nothing is trained yet"):
        made.kernel()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DiffusionSampler(3), "model must be a NumPyro model, got"),
        (lambda: DiffusionSampler(model, max_seconds=0.0), "max_seconds must be pos"),
        (
            lambda: DiffusionSampler(model, max_energy_evaluations=1e6),
            "max_energy_evaluations must be an integer",
        ),
        (lambda: small(model, objective="tb"), "one of ds.objectives, got 'tb'"),
        (lambda: small(model, behaviour=3), "one of ds.behaviours, got 3"),
        (lambda: small(model, optimizer=1e-3), "one of optax, got 0.001"),
        (lambda: small(model).run(jax.random.key(0), 0), "num_samples must be at le"),
        (lambda: small(model).run(jax.random.key(0), 4e3), "num_samples must be an"),
        (lambda: small(model).fit(jax.random.key(0), 0), "num_updates must be at le"),
        (lambda: small(model, num_steps=0), "num_steps must be at least"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# -------------------------------------------------------------------- smallest scale


def test_the_narrow_places_set_the_smallest_scale():
    rng = np.random.default_rng(0)
    for dim in (1, 60):
        assert pilots.smallest_scale(rng.normal(size=(2_048, dim))) >= 0.5
        assert pilots.smallest_scale(rng.normal(size=(50, dim))) == 1.0
    z = rng.normal(size=(2_048, 2))
    share = (rng.random((2_048, 1)) < 0.2) * 0.98
    assert pilots.smallest_scale((1 - share) * z + 3 * (share > 0)) < 0.1


def far_energy(x):
    return 0.5 * jnp.sum(((x - jnp.array([30.0, -4.0])) / jnp.array([0.1, 2.0])) ** 2)


@pytest.mark.slow
def test_a_prior_that_leads_nowhere_has_its_price():
    target = Target(
        energy=far_energy,
        dim=2,
        sample_prior=lambda key, n: jax.random.normal(key, (n, 2)),
        log_prior=lambda x: -0.5 * jnp.sum(x**2),
        log_likelihood=lambda x: jnp.where(x[0] > 20, 0.0, -jnp.inf),
    )
    found = pilots.find(jax.random.key(0), target, num_particles=512)
    alone = dataclasses.replace(target, sample_prior=None)
    other = pilots.find(jax.random.key(0), alone, num_particles=512)
    np.testing.assert_array_equal(found.x, other.x)
    assert found.num_energy_evaluations >= other.num_energy_evaluations + 512


@pytest.mark.slow
def test_pilots_without_a_prior_find_a_far_narrow_place():
    target = Target(energy=far_energy, dim=2)
    found = pilots.find(jax.random.key(0), target, num_particles=512)
    np.testing.assert_allclose(found.x.mean(axis=0), [30.0, -4.0], atol=0.5)
    np.testing.assert_allclose(found.x.std(axis=0), [0.1, 2.0], rtol=0.2)
    assert found.log_z == pytest.approx(np.log(2 * np.pi * 0.1 * 2.0), abs=0.3)
    assert found.num_gradient_evaluations > 0
