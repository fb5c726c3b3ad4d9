import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsamp import diagnostics, evidence
from diffsamp.diagnostics import CoverageCheck

with warnings.catch_warnings():  # ArviZ announces its next version on import
    warnings.simplefilter("ignore")
    import arviz


def tails(num_draws):
    """Named log-weights of every kind of upper tail."""
    rng = np.random.default_rng(num_draws)
    normal = rng.normal(size=num_draws)
    exponential = rng.exponential(size=num_draws)
    return {
        "light": 0.3 * normal,
        "bounded": -exponential,
        "lognormal, shifted": 1.5 * normal + 700.0,
        "pareto k=0.3": 0.3 * exponential,
        "pareto k=0.9": 0.9 * exponential - 300.0,
        "degenerate": 6.0 * normal,
        "many zeros": np.where(rng.random(num_draws) < 0.6, -np.inf, normal),
        "t": np.abs(rng.standard_t(4, size=num_draws)),
    }


@pytest.mark.parametrize("num_draws", [100, 1_000, 10_000])
@pytest.mark.parametrize("name", tails(100))
def test_psis_is_that_of_arviz(name, num_draws):
    log_weight = tails(num_draws)[name]
    expected, expected_k = arviz.psislw(log_weight.copy(), normalize=False)
    nonzero = log_weight > -np.inf  # ArviZ gives zero weights the log of tiny

    on_host = diagnostics.pareto_smooth(log_weight)
    assert on_host.pareto_k == pytest.approx(float(expected_k), abs=1e-10)
    np.testing.assert_allclose(on_host.log_weight[nonzero], expected[nonzero], 1e-12)

    with jax.enable_x64(True):
        psis = jax.jit(diagnostics.pareto_smooth)(jnp.asarray(log_weight))
        assert psis.log_weight.dtype == psis.pareto_k.dtype == jnp.float64
        assert float(psis.pareto_k) == pytest.approx(float(expected_k), abs=1e-10)
        smoothed = np.asarray(psis.log_weight)[nonzero]
        np.testing.assert_allclose(smoothed, expected[nonzero], 1e-12)

    psis = jax.jit(diagnostics.pareto_smooth)(jnp.asarray(log_weight, jnp.float32))
    assert psis.log_weight.dtype == psis.pareto_k.dtype == jnp.float32
    # The largest weights are given to 6e-5 only at a log-weight of 700.
    assert float(psis.pareto_k) == pytest.approx(float(expected_k), abs=1e-3)


def test_a_tail_that_holds_nothing_is_no_reason_for_distrust():
    rng = np.random.default_rng(0)
    lowered = []
    for _ in range(300):  # weights of one and a little, of a tail of index 0.8
        excess = np.expm1(0.8 * rng.exponential(size=2_000)) / 0.8
        log_weight = np.log1p(1e-4 * excess)
        psis = diagnostics.pareto_smooth(log_weight)
        if psis.tail_error > 0:
            assert psis.pareto_k == 0.5
            log_z = evidence.log_evidence(log_weight)
            error = log_z.estimate - np.log1p(1e-4 / 0.2)
            lowered.append(abs(error) / log_z.standard_error)
        heavy = diagnostics.pareto_smooth(np.log1p(0.1 * excess))
        assert heavy.tail_error == 0
    assert len(lowered) > 100
    assert np.mean(np.array(lowered) < 2) > 0.95


def test_psis_vmaps():
    log_weight = jnp.asarray(np.stack([tails(200)["light"], tails(200)["degenerate"]]))
    smooth = jax.jit(diagnostics.pareto_smooth)
    psis = jax.jit(jax.vmap(smooth))(log_weight)
    for row, smoothed, k in zip(log_weight, psis.log_weight, psis.pareto_k):
        single = smooth(row)
        np.testing.assert_allclose(smoothed, single.log_weight, 1e-4, 1e-4)
        assert float(k) == pytest.approx(float(single.pareto_k), abs=1e-3)


def test_psis_smooths_towards_the_truth():
    # The mean of exp(0.6 e), e exponential, is 2.5, and its variance is infinite.
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        log_weight = 0.6 * rng.exponential(size=500)
        smoothed = diagnostics.pareto_smooth(log_weight).log_weight
        errors.append([np.exp(a).mean() - 2.5 for a in (log_weight, smoothed)])
    raw, smooth = np.sqrt(np.mean(np.square(errors), axis=0))
    assert smooth < 0.8 * raw


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["host", "jit"])
def test_psis_special_weights(run):
    pareto_smooth = run(diagnostics.pareto_smooth)
    normal = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
    constant = np.full(1_000, 300.0, np.float32)
    assert pareto_smooth(jnp.asarray(constant)).pareto_k == 0
    # A perfect sampler, up to rounding.
    assert pareto_smooth(jnp.asarray(constant + 1e-4 * normal)).pareto_k == 0
    # Constant but for zero weights.
    mixed = np.where(np.arange(1_000) < 300, 0.0, -np.inf)
    assert pareto_smooth(jnp.asarray(mixed)).pareto_k == 0
    for k_hat_is_infinite in (
        normal[:24],
        np.full(1_000, -np.inf),
        np.where(np.arange(1_000) == 3, np.inf, normal),
        np.where(np.arange(1_000) < 3, normal, -np.inf),
        np.where(np.arange(1_000) < 3, 1.0, 0.0),
    ):
        psis = pareto_smooth(jnp.asarray(k_hat_is_infinite))
        assert psis.pareto_k == np.inf
        np.testing.assert_array_equal(
            psis.log_weight, np.asarray(k_hat_is_infinite, psis.log_weight.dtype)
        )
    with_nan = np.where(np.arange(1_000) == 3, np.nan, normal)
    with_zero = np.where(np.arange(1_000) == 3, -np.inf, normal)
    for one, other in zip(
        pareto_smooth(jnp.asarray(with_nan)), pareto_smooth(jnp.asarray(with_zero))
    ):
        np.testing.assert_array_equal(one, other)


def test_effective_sample_size():
    log_weight = jnp.log(jnp.array([1.0, 2.0, 3.0])) + 5_000.0
    ess = diagnostics.effective_sample_size(log_weight)
    assert float(ess) == pytest.approx(36 / 14, rel=1e-3)
    fraction = diagnostics.effective_sample_fraction(log_weight)
    assert float(fraction) == pytest.approx(12 / 14, rel=1e-3)
    inf = jnp.inf
    for log_weight, expected in (
        ([-inf, -inf], 0.0),
        ([jnp.nan, 0.0, 0.0], 2.0),
        ([inf, 0.0, 0.0], 1.0),
        ([7.0], 1.0),
    ):
        assert jax.jit(diagnostics.effective_sample_size)(jnp.array(log_weight)) == (
            expected
        )


def test_both_effective_sample_sizes_agree_for_log_normal_weights():
    # Under P: log w ~ N(-s^2/2, s^2); under Pi: N(+s^2/2, s^2). ESS fraction exp(-s^2).
    s, noise = 0.7, np.random.default_rng(0).normal(size=(2, 400_000))
    own, target = s * noise[0] - s**2 / 2 + 3.0, s * noise[1] + s**2 / 2 + 3.0
    exact = np.exp(-(s**2))
    own_fraction = diagnostics.effective_sample_fraction(own)
    assert float(own_fraction) == pytest.approx(exact, rel=0.02)
    target_fraction = diagnostics.forward_effective_sample_size(target)
    assert float(target_fraction) == pytest.approx(exact, rel=0.02)


def test_forward_effective_sample_size_sees_a_lost_mode():
    target = np.where(np.arange(1_000) < 900, 0.0, 30.0)
    assert diagnostics.effective_sample_fraction(np.zeros(1_000)) == 1
    assert diagnostics.forward_effective_sample_size(target) < 1e-10
    assert diagnostics.forward_effective_sample_size(np.full(5, -800.0)) == 1
    assert diagnostics.forward_effective_sample_size(np.array([0.0, np.inf])) == 0


# The independent probe, on importance sampling in one dimension.


class Mixture:
    def __init__(self, weights, means, scales):
        self.weights, self.means = np.array(weights), np.array(means)
        self.scales = np.array(scales)

    def sample(self, rng, n):
        i = rng.choice(self.weights.size, p=self.weights, size=n)
        return self.means[i] + self.scales[i] * rng.normal(size=n)

    def log_prob(self, x):
        z = (x[:, None] - self.means) / self.scales
        parts = np.exp(-(z**2) / 2) * self.weights / self.scales
        return np.log(np.sum(parts, axis=1)) - 0.5 * np.log(2 * np.pi)


EVEN = Mixture([0.5, 0.5], [-4.0, 5.0], [1.0, 0.7])
UNEVEN = Mixture([0.9, 0.1], [-4.0, 5.0], [1.0, 0.7])


def check(rng, target, proposal, num_draws=2_000, num_probes=1_000):
    x, y = proposal.sample(rng, num_draws), target.sample(rng, num_probes)
    own = target.log_prob(x) - proposal.log_prob(x) + 50.0
    probe = target.log_prob(y) - proposal.log_prob(y) + 50.0
    return own, probe, diagnostics.missing_mass(own, probe)


@pytest.mark.parametrize(
    ("target", "proposal", "mass"),
    [
        (EVEN, Mixture([1.0], [-4.0], [1.1]), 0.5),
        (EVEN, Mixture([1.0], [5.0], [1.0]), 0.5),
        (UNEVEN, Mixture([1.0], [-4.0], [1.1]), 0.1),
        (UNEVEN, Mixture([1.0], [-4.0], [1.5]), 0.1),
        (UNEVEN, Mixture([1.0], [5.0], [1.0]), 0.9),
    ],
)
def test_a_lost_mode_is_found(target, proposal, mass):
    rng = np.random.default_rng(1)
    alarms, below = 0, 0
    for _ in range(100):
        own, probe, coverage = check(rng, target, proposal)
        assert abs(coverage.missing_mass - mass) < 0.07
        below += mass <= coverage.upper
        report = diagnostics.diagnose(own, probe_log_weight=probe)
        assert not report.verdict.startswith("trust")
        assert report.collapsed == ("probe points hold" in report.verdict)
        alarms += report.collapsed
        # Without the probe the sampler is content with itself.
        assert diagnostics.diagnose(own).collapsed is False
    assert alarms >= 97
    assert below >= 97


@pytest.mark.parametrize(
    ("target", "proposal", "alarmed", "trusted"),
    [
        (EVEN, EVEN, 0.02, 0.95),
        (EVEN, Mixture([0.6, 0.4], [-4.2, 5.1], [1.2, 0.9]), 0.02, 0.95),
        # The weights repair wrong proportions of the modes.
        (UNEVEN, Mixture([0.5, 0.5], [-4.0, 5.0], [1.1, 0.8]), 0.02, 0.95),
        (UNEVEN, Mixture([1.0], [0.0], [6.0]), 0.02, 0.8),
        # Tails that are too light: k is 0.36, and then 0.64, where the variance of the
        # weights is infinite and the noise level too low.
        (UNEVEN, Mixture([0.5, 0.5], [-4.0, 5.0], [0.8, 0.8]), 0.05, 0.9),
        (UNEVEN, Mixture([0.5, 0.5], [-4.0, 5.0], [0.6, 0.6]), 0.1, 0.0),
    ],
)
def test_no_alarm_where_nothing_is_missing(target, proposal, alarmed, trusted):
    rng = np.random.default_rng(2)
    alarms, trusts = [], []
    for _ in range(200):
        own, probe, coverage = check(rng, target, proposal)
        lost = coverage.unexplained > 0
        alarms.append(diagnostics.is_collapsed(coverage) or lost)
        report = diagnostics.diagnose(own, probe_log_weight=probe)
        trusts.append(report.verdict.startswith("trust"))
        assert report.missing_mass == coverage.missing_mass
    assert np.mean(alarms) <= alarmed
    assert np.mean(trusts) >= trusted


@pytest.mark.parametrize(
    ("num_draws", "num_probes", "mass"),
    [(4_000, 1_024, 0.03), (20_000, 1_024, 0.01), (4_000, 256, 0.05)],
)
def test_a_lost_mode_of_small_mass_is_found(num_draws, num_probes, mass):
    """Its mass drowns in the noise of the shares, its weights stand out."""
    rng = np.random.default_rng(7)
    target = Mixture([1 - mass, mass], [-4.0, 8.0], [1.0, 0.7])
    proposal = Mixture([1.0], [-4.0], [1.1])
    for _ in range(20):
        own, probe, coverage = check(rng, target, proposal, num_draws, num_probes)
        assert coverage.missing_mass < coverage.tolerance  # drowned
        verdict = diagnostics.diagnose(own, probe_log_weight=probe).verdict
        found = verdict.startswith("reweight (about")
        assert found == (np.sum(probe > own.max() + 10) > 2)
        assert found == ("absent from the draws" in verdict)


def test_points_that_the_tail_explains_are_no_collapse():
    """Weights with a Pareto tail, which any finite sample cuts off."""
    rng = np.random.default_rng(8)
    for k in (0.3, 0.5, 0.6):
        alarms = []
        for _ in range(200):
            own = k * rng.exponential(size=5_000)  # P(w > t) = t^(-1/k)
            probe = k / (1 - k) * rng.exponential(size=2_000)  # its law times w
            alarms.append(diagnostics.missing_mass(own, probe).unexplained > 0)
        assert np.mean(alarms) <= 0.01


def test_tolerance_is_a_quantile_of_the_noise():
    # The same continuous law without weights: Smirnov's one-sided statistic.
    rng = np.random.default_rng(3)
    for alpha in (0.3, 0.05):
        above = []
        for _ in range(2_000):
            # Equal weights need own log-weights that hardly vary.
            own, probe = 1e-6 * rng.normal(size=400), 1e-6 * rng.normal(size=300)
            c = diagnostics.missing_mass(own, probe, alpha=alpha, resolution=0.0)
            above.append(c.missing_mass > c.tolerance)
        assert 0.6 * alpha < np.mean(above) <= 1.1 * alpha


def test_a_small_probe_never_gives_trust():
    rng = np.random.default_rng(4)
    for _ in range(50):
        own, probe, _ = check(rng, UNEVEN, Mixture([1.0], [-4.0], [1.1]), 2_000, 20)
        verdict = diagnostics.diagnose(own, probe_log_weight=probe).verdict
        assert not verdict.startswith("trust")
    own, probe, _ = check(rng, EVEN, EVEN, 2_000, 30)
    verdict = diagnostics.diagnose(own, probe_log_weight=probe).verdict
    assert verdict.startswith("reweight (coverage unchecked: probe or draws too few")


def test_weighted_probe():
    # A probe drawn with the wrong proportions of the modes, and weights that repair it.
    rng = np.random.default_rng(5)
    proposal = Mixture([0.97, 0.03], [-4.0, 5.0], [1.1, 0.8])
    skewed = Mixture([0.5, 0.5], [-4.0, 5.0], [1.0, 0.7])
    x, y = proposal.sample(rng, 4_000), skewed.sample(rng, 4_000)
    own = UNEVEN.log_prob(x) - proposal.log_prob(x)
    probe = UNEVEN.log_prob(y) - proposal.log_prob(y)
    weights = 7.0 * np.exp(UNEVEN.log_prob(y) - skewed.log_prob(y))
    wrong = diagnostics.missing_mass(own, probe)
    assert wrong.missing_mass > 0.3
    assert wrong.beyond < 0.1
    right = diagnostics.missing_mass(own, probe, weights)
    assert right.missing_mass < right.tolerance
    equal = diagnostics.missing_mass(own, probe, np.full(4_000, 3.0))
    np.testing.assert_allclose(equal, wrong, rtol=1e-9)


def test_rounding_of_a_perfect_sampler_is_not_missing_mass():
    own, probe = np.zeros(1_000), np.full(1_000, 0.01)
    assert diagnostics.missing_mass(own, probe).missing_mass == 0
    assert diagnostics.missing_mass(own, probe, resolution=0.0).missing_mass == 1
    report = diagnostics.diagnose(own, probe_log_weight=probe)
    assert report.verdict == "trust"
    assert report.ess == 1_000


def test_missing_mass_of_special_weights():
    zeros = np.zeros(500)
    inf = np.inf
    # No weight at all, and NaN of the probe, count as missing.
    nothing = diagnostics.missing_mass(np.full(500, -inf), zeros)
    assert nothing[:1] + nothing[2:4] == (1.0, 1.0, 1.0)
    assert nothing.unexplained > 0
    half = np.where(np.arange(500) < 250, 0.0, np.nan)
    assert diagnostics.missing_mass(zeros, half).beyond == pytest.approx(0.5)
    # Zero weights and NaN of the sampler do not count; the probe being elsewhere, too.
    own = np.concatenate([zeros, np.full(500, -inf), np.full(500, np.nan)])
    assert diagnostics.missing_mass(own, zeros).missing_mass == 0
    assert diagnostics.missing_mass(zeros, np.full(500, -9.0)).missing_mass == 0
    assert diagnostics.missing_mass(np.full(9, inf), zeros).missing_mass == 0


GOOD = CoverageCheck(0.01, 0.06, 0.05, 0.0)


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ({"pareto_k": None}, "do not trust: no valid weights exist"),
        ({"pareto_k": None, "coverage": GOOD}, "do not trust: no valid weights exist"),
        ({"pareto_k": 0.7}, "do not trust: Pareto k-hat is 0.70"),
        ({"pareto_k": 0.7, "coverage": GOOD}, "do not trust: Pareto k-hat is 0.70"),
        ({"pareto_k": np.inf}, "do not trust: Pareto k-hat cannot be estimated"),
        (
            {"pareto_k": np.inf, "num_draws": 1_000, "num_nonfinite": 1},
            "do not trust: 1 of 1000 weights are NaN or infinite; check that the energ",
        ),
        ({"pareto_k": np.nan}, "do not trust: Pareto k-hat cannot be estimated"),
        ({"pareto_k": np.inf, "num_draws": 20}, "do not trust: too few draws (20)"),
        (
            {"pareto_k": 0.1, "coverage": CoverageCheck(0.32, 0.06, 0.4, 0.3)},
            "do not trust: probe points hold about 32% of the mass",
        ),
        (
            {"pareto_k": 0.1, "num_draws": 1_000, "num_nonfinite": 11},
            "do not trust: 11 of 1000 weights are NaN or infinite",
        ),
        (
            {
                "pareto_k": 0.1,
                "coverage": GOOD,
                "num_draws": 1_000,
                "num_nonfinite": 10,
            },
            "reweight (10 of 1000 weights are NaN",
        ),
        ({"pareto_k": 0.69, "coverage": GOOD}, "trust"),
        ({"pareto_k": 0.1, "coverage": GOOD, "ess_fraction": 0.3}, "trust (with the"),
        (
            {"pareto_k": 0.1, "coverage": CoverageCheck(0.08, 0.2, 0.3, 0.0)},
            "reweight (coverage unchecked: ",
        ),
    ],
)
def test_verdict(arguments, start):
    assert diagnostics.verdict(**arguments).startswith(start)


def test_verdict_without_a_probe_is_at_best_to_reweight():
    assert diagnostics.verdict(0.0, None) == "reweight (coverage unchecked)"
    assert diagnostics.diagnose(np.zeros(2_000)).verdict == (
        "reweight (coverage unchecked)"
    )


def test_diagnose_fills_every_field():
    report = diagnostics.diagnose(
        jnp.array([0.0, jnp.nan, jnp.inf, -jnp.inf] * 10),
        num_energy_evaluations=1,
        num_gradient_evaluations=2,
        num_network_evaluations=3,
    )
    assert report.num_nonfinite == 20
    assert report.ess == 10
    assert report.ess_fraction == 0.25
    assert report[5:8] == (1, 2, 3)
    assert report.verdict.startswith("do not trust: 20 of 40 weights")
    assert report.missing_mass is None
    assert report.coverage_tolerance is None
    without = diagnostics.diagnose(None, num_network_evaluations=5)
    assert np.isnan(without.ess)
    assert np.isnan(without.pareto_k)
    assert without.num_network_evaluations == 5
    assert without.verdict.startswith("do not trust: no valid weights")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.pareto_smooth(np.zeros((2, 3))), "log_weight must have shape"),
        (lambda f: f.effective_sample_size(np.zeros(0)), "log_weight must have shape"),
        (lambda f: f.missing_mass(np.zeros(3), np.float32(1)), "probe_log_weight must"),
        (lambda f: f.missing_mass(np.zeros(3), np.zeros(3), alpha=0.0), "alpha must"),
        (
            lambda f: f.missing_mass(np.zeros(3), np.zeros(3), np.ones(2)),
            "probe_weights must have the shape",
        ),
        (
            lambda f: f.missing_mass(np.zeros(3), np.zeros(3), -np.ones(3)),
            "probe_weights must be finite, not negative",
        ),
        (
            lambda f: f.missing_mass(np.zeros(3), np.zeros(3), resolution=-1.0),
            "resolution must not",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(diagnostics)


def test_few_effective_draws_earn_no_trust():
    """300 of them exclude a missing mass of 10 %, and are few all the same."""
    probe = np.zeros(10_000)
    few = diagnostics.diagnose(np.zeros(300), probe_log_weight=probe)
    assert few.verdict == "reweight (the ESS is 300, less than 400: take more draws)"
    enough = diagnostics.diagnose(np.zeros(500), probe_log_weight=probe)
    assert enough.verdict == "trust"
