r"""What the weights say about the draws: ESS, Pareto k-hat, missing mass, a verdict.

Policy for weights that are not numbers, the same here and in `diffsamp.evidence`:

* ``-inf`` is an ordinary zero weight (the energy is ``+inf`` there);
* ``NaN`` counts as a zero weight, and is counted and reported;
* ``+inf`` is never removed: estimates become infinite, k-hat infinite, the verdict bad.

**The independent probe.** A sampler that has lost a mode gives itself full marks: its
own draws never visit the place where the weight would be huge. Points that come from
elsewhere can tell. Let P be the law of the sampler's paths and w the path weight, so
that the paths of target draws traced back through the destruction kernel have the law
``dPi = (w / Z) dP``. Hence for every threshold c

    Pi(log w <= c) = E_P[w 1(log w <= c)] / E_P[w].

The right side is estimated from the sampler's own log-weights a_i by the normalised
weighted distribution function F_own(c), the left side from the log-weights b_j of the
probe's traced-back paths by F_probe(c). If the sampler covers the target both converge
to the same function. If it has (almost) no draws in a region R of target mass m, the
weight in R is large, no a_i is up there, and the probe shows the mass m to the right of
where F_own has reached one. Therefore

    D = sup_c [F_own(c) - F_probe(c + resolution)]

estimates the missing mass from below: it is a lower bound of the total variation
between the target's path law and the sampler's weighted sample, up to sampling noise.
Only this side is taken: a surplus of F_probe at small weights says that the *probe* has
not been where the sampler has. A small ``resolution`` in log-weight keeps the rounding
errors of an (almost) perfect sampler, whose weights are all equal, from mattering.

Noise. With normalised weights u_i (own) and v_j (probe; 1/M without weights) and
G = F_probe, the delta method gives

    var F_own(c)   = sum_i u_i^2 [1(a_i <= c) - F_own(c)]^2,
    var F_probe(c) = sum_j v_j^2 [1(b_j <= c) - G(c)]^2,

and s^2 = max_c of their sum, never taken below the (1/ESS_own + 1/ESS_probe)/4 that it
is for equal weights. The one-sided Smirnov limit P(D > s x) = exp(-x^2 / 2) then gives
``tolerance = s sqrt(2 log(1/alpha))``; for equal weights this is the
Dvoretzky-Kiefer-Wolfowitz-Massart number. Under heavy-tailed weights F_own lacks its
upper tail and D is biased upwards; k-hat reports that case.

Few points, far off. A lost part of small mass hides in that noise, but not in the size
of its weights: its points lie above *every* own weight, by far. How many probe points
may lie above c times the largest own weight follows from the tail of the own weights.
If P(w > t) falls as t^(-1/k) with k < 1, the largest of N weights is exceeded with
probability U / N, U standard exponential for large N. With its share u_max of the total
the target mass above c times it is the tail's first moment

    m(c) = U u_max c^(1 - 1/k) / (1 - k).

With U <= 7 (99.9 %) and M_eff probe points, their number has at most the mean M_eff
m(c); `unexplained` is by how many it exceeds this mean, three of its (Poisson) standard
deviations and two points more, at the worst of several c. Two points cannot be told
from luck, or from an SMC particle that was left behind.

Limits. The probe must represent the target: a probe that over-represents a mode which
the sampler under-represents (the sampler's weights repair that, the probe's do not)
is read as missing mass, and mass that neither has seen is seen by no one.

Sources: Kong 1992 (ESS); Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed
importance sampling", JMLR 25(72), 2024; Zhang and Stephens, "A new and efficient
estimation method for the generalized Pareto distribution", Technometrics 51, 2009;
Massart, Annals of Probability 18, 1990. The probe test is derived above.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffsamp.types import Array

ArrayLike = Array | np.ndarray

PARETO_K_LIMIT = 0.7
"""From here on neither the draws nor an error bar can be trusted (Vehtari et al.)."""

MISSING_MASS_LIMIT = 0.1
"""`verdict` says "trust" only where a missing mass of this size can be excluded."""

MISSING_MASS_NEGLIGIBLE = 0.05
"""A missing mass below this is never called a collapse, however certain it is."""

MIN_EFFECTIVE_DRAWS = 400
"""Below this ESS draws are too few for `verdict` to say "trust"."""

_MIN_DRAWS = 25  # below, the tail min(N/5, 3 sqrt(N)) has fewer than five points
_NEGLIGIBLE_SPREAD = 1e-3  # log of largest weight over tail cutoff; see pareto_smooth
_NEGLIGIBLE_TAIL = 5e-3  # share of Z above the cutoff, drawn or not; see pareto_smooth
_MAX_NAN_FRACTION = 0.01


class PSIS(NamedTuple):
    """Pareto-smoothed weights.

    Attributes:
        log_weight: smoothed log-weights on the scale of the input, [N].
        pareto_k: estimated shape k-hat of the upper tail, []; ``inf`` where none can be
            estimated.
        tail_error: what the delta method does not see of the relative error of Z, [];
            not zero only where k-hat was lowered because the tail holds so little.
    """

    log_weight: ArrayLike
    pareto_k: ArrayLike
    tail_error: ArrayLike | float = 0.0


class CoverageCheck(NamedTuple):
    """The result of comparing the sampler with an independent probe.

    Attributes:
        missing_mass: D of the module's docstring, in [0, 1].
        tolerance: what D stays below, with the confidence asked for, when nothing is
            missing.
        upper: approximate one-sided 99 % upper limit of the missing mass.
        beyond: probe mass with a log-weight above every one of the sampler's own; the
            part of `missing_mass` that does not depend on the probe's proportions.
        unexplained: effective number of probe points with log-weights above the
            sampler's own, beyond what the tail of the own weights explains. Positive
            where a part of the target is lost, however small it is.
    """

    missing_mass: float
    tolerance: float
    upper: float
    beyond: float
    unexplained: float = 0.0


class Diagnostics(NamedTuple):
    """Everything worth knowing before the draws are used.

    Attributes:
        ess: Kish effective sample size, in draws.
        ess_fraction: the same over the number of draws, in [0, 1].
        pareto_k: k-hat of the weights; ``inf`` where it cannot be estimated.
        missing_mass: target mass that the sampler lacks by the probe, or None without
            a probe.
        coverage_tolerance: noise level of `missing_mass`, or None without a probe.
        num_energy_evaluations: energies evaluated, or None when not counted.
        num_gradient_evaluations: energy gradients evaluated, or None.
        num_network_evaluations: network evaluations, or None.
        num_nonfinite: number of weights that are NaN or infinite (a weight of zero is
            neither).
        collapsed: the probe found mass where the sampler has (almost) none.
        verdict: a sentence that starts with "trust", "reweight" or "do not trust".
    """

    ess: float
    ess_fraction: float
    pareto_k: float
    missing_mass: float | None
    coverage_tolerance: float | None
    num_energy_evaluations: int | None
    num_gradient_evaluations: int | None
    num_network_evaluations: int | None
    num_nonfinite: int
    collapsed: bool
    verdict: str


def count_nonfinite(log_weight: ArrayLike) -> int:
    """Number of weights that are NaN or infinite; zero weights are not among them.

    Args:
        log_weight: log-weights, [N], concrete (not inside ``jit``).

    Returns:
        How many entries are ``NaN`` or ``+inf``.

    Raises:
        ValueError: when ``log_weight`` is not of shape [N] with N >= 1.

    Example:
        >>> import numpy as np
        >>> from diffsamp import diagnostics
        >>> diagnostics.count_nonfinite(np.array([0.0, -np.inf, np.nan, np.inf]))
        2
    """
    _check_vector("log_weight", log_weight)
    values = np.asarray(log_weight)
    return int(np.sum(np.isnan(values) | np.isposinf(values)))


def effective_sample_size(log_weight: ArrayLike) -> Array:
    """Kish's effective sample size ``(sum w)^2 / sum w^2``, in draws.

    Of the sampler's own draws only: it does not see a mode that was never visited, see
    `missing_mass`. Where infinite weights exist it is their number, the limit.

    Args:
        log_weight: log-weights of the sampler's draws, [N].

    Returns:
        A number between 0 (all weights are zero) and N, [].

    Raises:
        ValueError: when ``log_weight`` is not of shape [N] with N >= 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from diffsamp import diagnostics
        >>> float(diagnostics.effective_sample_size(jnp.array([0.0, 0.0, -jnp.inf])))
        2.0
    """
    _check_vector("log_weight", log_weight)
    w = _relative_weights(jnp.asarray(log_weight))
    total = jnp.sum(w)
    return jnp.where(total > 0, total**2 / jnp.maximum(jnp.sum(w**2), 1e-30), 0.0)


def effective_sample_fraction(log_weight: ArrayLike) -> Array:
    """`effective_sample_size` over the number of draws, in [0, 1].

    Args:
        log_weight: log-weights of the sampler's draws, [N].

    Returns:
        The fraction, [].

    Raises:
        ValueError: when ``log_weight`` is not of shape [N] with N >= 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from diffsamp import diagnostics
        >>> float(diagnostics.effective_sample_fraction(jnp.array([1.0, 1.0])))
        1.0
    """
    return effective_sample_size(log_weight) / np.shape(log_weight)[0]


def forward_effective_sample_size(target_log_weight: ArrayLike) -> Array:
    r"""ESS fraction of the sampler, estimated from target draws instead of its own.

    With P the sampler's path law, the ESS fraction in the limit of many draws is
    ``(E_P w)^2 / E_P w^2``. Target draws traced back have the law ``dPi = (w/Z) dP``,
    so ``E_P w = Z``, ``E_P w^2 = Z E_Pi w`` and ``1/Z = E_Pi[1/w]``, hence

        fraction = Z / E_Pi[w] = 1 / (E_Pi[w] E_Pi[1/w]),

    which is at most one by Jensen's inequality, also for the sample means used here.
    Unlike the ESS of the sampler's own draws it goes to zero when a mode is missing.

    Args:
        target_log_weight: log-weights of paths traced back from target draws, [M].

    Returns:
        The fraction, in [0, 1], []. It is 0 where a weight is infinite or NaN.

    Raises:
        ValueError: when ``target_log_weight`` is not of shape [M] with M >= 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from diffsamp import diagnostics
        >>> w = jnp.array([1.0, 3.0])
        >>> round(float(diagnostics.forward_effective_sample_size(jnp.log(w))), 4)
        0.75
    """
    _check_vector("target_log_weight", target_log_weight)
    log_w = jnp.asarray(target_log_weight)
    bad = jnp.any(~jnp.isfinite(log_w))
    log_w = jnp.where(bad, jnp.zeros_like(log_w), log_w)
    log_mean = jax.nn.logsumexp(log_w) + jax.nn.logsumexp(-log_w)
    fraction = jnp.exp(2 * math.log(log_w.shape[0]) - log_mean)
    return jnp.where(bad, 0.0, jnp.minimum(fraction, 1.0))


def pareto_smooth(log_weight: ArrayLike) -> PSIS:
    r"""Pareto-smoothed importance sampling with the fit of Zhang and Stephens.

    The M = ceil(min(N/5, 3 sqrt(N))) largest weights are replaced by the expected order
    statistics of a generalised Pareto distribution fitted to them, cut at the largest
    raw weight. k-hat below 0.5: the variance of the weights is finite; up to 0.7: the
    estimates are still usable; above: they are not.

    Concrete arrays are treated on the host in float64. Under ``jit`` and ``vmap`` the
    same lines run in JAX, in the precision of the input.

    As in ArviZ 0.x, weights tied with the cutoff are not part of the tail. Where
    nothing, or next to nothing, is above the cutoff (the largest weight exceeds it by
    less than 0.1 %) the weights are constant for every practical purpose: k-hat is 0
    and nothing is smoothed. ArviZ reports ``inf`` for exact ties.

    The shape of a tail is all noise where the weights are nearly equal, so that a
    sampler would be refused for being too good. Let s be the mean exceedance over the
    cutoff (weights at most equal to it count 0), and r that of a draw beyond the
    largest one, u, by the fit, which happens about once in N:

        r = u + (scale + k u) / (1 - k),    k < 1.

    Where k-hat is 0.7 or more, but s + r / N below 0.5 % of the mean weight, the tail,
    drawn or not, hardly matters: k-hat is given as 0.5, where its prior lies, and that
    share as `PSIS.tail_error`, which the standard error of log Z then contains.

    Args:
        log_weight: log-weights, unnormalised, [N].

    Returns:
        `PSIS` with the smoothed log-weights on the scale of the input, and k-hat. k-hat
        is ``inf``, and nothing smoothed, for N < 25, for infinite weights, where all
        weights are zero, and where fewer than five weights make the tail. NaN becomes a
        zero weight.

    Raises:
        ValueError: when ``log_weight`` is not of shape [N] with N >= 1.

    Example:
        >>> import numpy as np
        >>> from diffsamp import diagnostics
        >>> u = (np.arange(1000) + 0.5) / 1000
        >>> pareto = -0.9 * np.log(u)                    # a Pareto tail with k = 0.9
        >>> bool(diagnostics.pareto_smooth(pareto).pareto_k > 0.7)
        True
        >>> float(diagnostics.pareto_smooth(np.zeros(1000)).pareto_k)
        0.0
    """
    _check_vector("log_weight", log_weight)
    if isinstance(log_weight, Tracer):
        return _pareto_smooth(log_weight, jnp)
    with np.errstate(all="ignore"):
        return _pareto_smooth(np.asarray(log_weight, np.float64), np)


def missing_mass(
    log_weight: ArrayLike,
    probe_log_weight: ArrayLike,
    probe_weights: ArrayLike | None = None,
    *,
    alpha: float = 0.01,
    resolution: float = 0.05,
) -> CoverageCheck:
    """Target mass that the sampler lacks, by an independent probe.

    See the module's docstring for the derivation. The probe's points must be (weighted)
    draws from the target that were found without the sampler's help.

    Args:
        log_weight: log-weights of the sampler's own draws, [N].
        probe_log_weight: log-weights of the paths traced back from the probe's points
            through the destruction kernel, [M]. NaN counts as ``+inf``: as missed.
        probe_weights: importance weights of the probe's points as draws from the target
            (not logs, need not sum to one), [M]; None for equal weights.
        alpha: probability with which `tolerance` is exceeded when nothing is missing.
        resolution: difference in log-weight that counts as equality.

    Returns:
        `CoverageCheck`; its numbers are fractions of the target's mass.

    Raises:
        ValueError: when a shape, ``alpha`` or ``resolution`` is out of range, or the
            probe's weights are negative, not finite or sum to zero.

    Example:
        >>> import numpy as np
        >>> from diffsamp import diagnostics
        >>> own = np.zeros(1000)                         # a sampler content with itself
        >>> probe = np.where(np.arange(1000) < 700, 0.0, 40.0)     # 30 % in a lost mode
        >>> check = diagnostics.missing_mass(own, probe)
        >>> round(check.missing_mass, 3), check.missing_mass > check.tolerance
        (0.3, True)
    """
    _check_vector("log_weight", log_weight)
    _check_vector("probe_log_weight", probe_log_weight)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if not resolution >= 0:
        raise ValueError(f"resolution must not be negative, got {resolution}")
    a, u = _sorted_law(np.asarray(log_weight, np.float64))
    b = np.asarray(probe_log_weight, np.float64)
    b = np.where(np.isnan(b), np.inf, b)
    v = _probe_weights(probe_weights, b.shape[0])
    order = np.argsort(b, kind="stable")
    b, v = b[order], v[order]
    v_squared = np.concatenate([[0.0], np.cumsum(v**2)])
    v_below = np.concatenate([[0.0], np.cumsum(v)])
    ess_probe = 1 / v_squared[-1]

    if a.size == 0:  # all weights are zero: the sampler has nothing anywhere
        tolerance = min(1.0, math.sqrt(math.log(1 / alpha) / 2 / ess_probe))
        return CoverageCheck(1.0, tolerance, 1.0, 1.0, ess_probe)

    index = np.searchsorted(b, a + resolution, side="right")
    f_own, f_probe = np.minimum(np.cumsum(u), 1.0), np.minimum(v_below[index], 1.0)
    u_squared = np.cumsum(u**2)
    ess_own = 1 / u_squared[-1]
    var_own = _variance_of_cdf(f_own, u_squared, u_squared[-1])
    var_probe = _variance_of_cdf(f_probe, v_squared[index], v_squared[-1])

    difference = f_own - f_probe
    worst = int(np.argmax(difference))
    missing = max(0.0, float(difference[worst]))
    noise = max(np.max(var_own + var_probe), (1 / ess_own + 1 / ess_probe) / 4)
    # At the limit of the missing mass that has to be excluded the variance of an
    # empirical distribution function is p (1 - p) / n; a smaller one is luck.
    least = MISSING_MASS_LIMIT * (1 - MISSING_MASS_LIMIT)
    margin = 2.326 * math.sqrt(
        max(var_own[worst], least / ess_own) + max(var_probe[worst], least / ess_probe)
    )
    return CoverageCheck(
        missing_mass=missing,
        tolerance=min(1.0, math.sqrt(2 * math.log(1 / alpha) * float(noise))),
        upper=min(1.0, missing + margin),
        beyond=max(0.0, 1.0 - float(f_probe[-1])),
        unexplained=_unexplained(log_weight, a[-1], u[-1], b, v, resolution),
    )


def _unexplained(log_weight, top, top_share, b, v, resolution) -> float:
    """Probe points above the own weights beyond what their tail explains."""
    # k-hat has a standard error of about 0.1, and too low a value would alarm.
    k = float(np.clip(pareto_smooth(log_weight).pareto_k + 0.2, 0.2, PARETO_K_LIMIT))
    num_probe = 1 / np.sum(v**2)
    worst = -np.inf
    for margin in (resolution, 1.0, 3.0, 10.0):
        found = num_probe * np.sum(v[b > top + margin])
        mass = 7 * top_share * math.exp(margin * (1 - 1 / k)) / (1 - k)
        expected = num_probe * min(1.0, mass)
        worst = max(worst, found - expected - 3 * math.sqrt(expected) - 2)
    return max(0.0, float(worst))


def is_collapsed(coverage: CoverageCheck | None) -> bool:
    """Whether a probe found mass where the sampler has (almost) none.

    Args:
        coverage: result of `missing_mass`, or None without a probe.

    Returns:
        True where the missing mass is beyond its noise and not negligible (5 %).

    Example:
        >>> from diffsamp import diagnostics
        >>> diagnostics.is_collapsed(diagnostics.CoverageCheck(0.3, 0.1, 0.35, 0.3))
        True
    """
    if coverage is None:
        return False
    threshold = max(coverage.tolerance, MISSING_MASS_NEGLIGIBLE)
    return coverage.missing_mass > threshold


def verdict(
    pareto_k: float | None,
    coverage: CoverageCheck | None = None,
    *,
    ess_fraction: float = 1.0,
    num_draws: int | None = None,
    num_nonfinite: int = 0,
    why_no_weight: str | None = None,
) -> str:
    """One sentence on what the draws are good for, and what to change.

    * ``"do not trust: ..."`` where no weights exist, k-hat is 0.7 or more (or unknown),
      more than 1 % of the weights are not numbers, or the probe found missing mass
      (`is_collapsed`);
    * ``"reweight (coverage unchecked)"``, exactly, where all is well but no independent
      probe was made; ``"reweight (...)"`` where the probe is too small to exclude a
      missing mass of 10 %, shows a smaller one beyond noise or a small part of the
      target where the sampler does not come at all, a few weights are not numbers, or
      the ESS is below 400: a few draws then decide (Vehtari et al. 2021 ask as much of
      chains);
    * ``"trust"`` otherwise, with a note to use the weights where the ESS asks for it.

    Args:
        pareto_k: k-hat of the weights, or None where the sampler has no valid weight.
        coverage: result of `missing_mass`, or None without a probe.
        ess_fraction: ESS over the number of draws, in [0, 1].
        num_draws: number of draws, where known.
        num_nonfinite: number of weights that are NaN or infinite.
        why_no_weight: why there are no weights, where there are none.

    Returns:
        The sentence.

    Example:
        >>> from diffsamp import diagnostics
        >>> diagnostics.verdict(0.2)
        'reweight (coverage unchecked)'
        >>> diagnostics.verdict(0.2, diagnostics.CoverageCheck(0.01, 0.06, 0.04, 0.0))
        'trust'
    """
    if pareto_k is None:
        why = why_no_weight or (
            "use a stochastic sampler, or correct the draws by MCMC"
        )
        return (
            "do not trust: no valid weights exist, so nothing about the draws can be "
            f"checked; {why}"
        )
    if is_collapsed(coverage):
        assert coverage is not None
        return (
            f"do not trust: probe points hold about {coverage.missing_mass:.0%} of the "
            "mass where the sampler has (almost) none (noise level "
            f"{coverage.tolerance:.0%}); the sampler has lost a part of the target: "
            "train with the replay, smc_seeded or reference-draws behaviour, or widen "
            "the reference to the target's scale"
        )
    if num_draws is not None and num_draws < _MIN_DRAWS:
        return (
            f"do not trust: too few draws ({num_draws}) to judge the weights; take "
            f"{_MIN_DRAWS} at the very least, better 1,000"
        )
    count = "some" if num_draws is None else f"{num_nonfinite} of {num_draws}"
    many = num_nonfinite > _MAX_NAN_FRACTION * (num_draws or num_nonfinite)
    if many or (num_nonfinite and not math.isfinite(pareto_k)):
        return (
            f"do not trust: {count} weights are NaN or infinite; check that the energy "
            "and its gradient are finite over the reference's range, and lower the "
            "learning rate"
        )
    if not pareto_k < PARETO_K_LIMIT:
        found = "cannot be estimated" if not math.isfinite(pareto_k) else ""
        return (
            f"do not trust: Pareto k-hat {found or f'is {pareto_k:.2f}'} (limit "
            f"{PARETO_K_LIMIT}), a few draws carry nearly all the weight and no error "
            "bar is valid; train longer, use more steps, train with the replay or "
            "smc_seeded behaviour, or widen the reference to the target's scale"
        )
    if coverage is None:
        return "reweight (coverage unchecked)"
    if coverage.unexplained > 0:
        return (
            f"reweight (about {coverage.beyond:.1%} of the probe lies where the "
            "sampler has (almost) nothing: that part of the target is absent from the "
            "draws, and log Z is low by as much as it holds, beyond its standard "
            "error; train longer on more SMC particles or reference draws)"
        )
    if not coverage.upper <= MISSING_MASS_LIMIT:
        return (
            "reweight (coverage unchecked: probe or draws too few to exclude a missing "
            f"mass of {MISSING_MASS_LIMIT:.0%}, the upper limit is "
            f"{coverage.upper:.0%}; take 1,000 effective points of each)"
        )
    if coverage.missing_mass > coverage.tolerance:
        return (
            f"reweight (the probe shows about {coverage.missing_mass:.1%} of the mass "
            "under-represented, more than noise explains: log Z may be low by as much, "
            "beyond its standard error)"
        )
    if num_nonfinite:
        return f"reweight ({count} weights are NaN and were given zero weight)"
    if num_draws is not None and ess_fraction * num_draws < MIN_EFFECTIVE_DRAWS:
        return (
            f"reweight (the ESS is {ess_fraction * num_draws:.0f}, less than "
            f"{MIN_EFFECTIVE_DRAWS}: take more draws)"
        )
    if ess_fraction < 0.9:
        return f"trust (with the weights: the ESS is {ess_fraction:.2g} of the draws)"
    return "trust"


def diagnose(
    log_weight: ArrayLike | None,
    *,
    probe_log_weight: ArrayLike | None = None,
    probe_weights: ArrayLike | None = None,
    num_energy_evaluations: int | None = None,
    num_gradient_evaluations: int | None = None,
    num_network_evaluations: int | None = None,
    why_no_weight: str | None = None,
) -> Diagnostics:
    """All diagnostics of a set of draws, with the verdict.

    Args:
        log_weight: log-weights of the draws, [N], or None where no valid weight exists.
        probe_log_weight: log-weights of paths traced back from an independent probe,
            [M], or None.
        probe_weights: importance weights of the probe's points, [M], or None.
        num_energy_evaluations: energies evaluated for these draws.
        num_gradient_evaluations: energy gradients evaluated.
        num_network_evaluations: network evaluations.
        why_no_weight: why there are no weights, for the verdict.

    Returns:
        `Diagnostics`; without weights its ESS and k-hat are NaN.

    Raises:
        ValueError: from `missing_mass` and `pareto_smooth`, on wrong shapes.

    Example:
        >>> import numpy as np
        >>> from diffsamp import diagnostics
        >>> report = diagnostics.diagnose(np.zeros(1000))
        >>> report.ess, report.pareto_k, report.verdict
        (1000.0, 0.0, 'reweight (coverage unchecked)')
    """
    counts = (num_energy_evaluations, num_gradient_evaluations, num_network_evaluations)
    if log_weight is None:
        nan = float("nan")
        said = verdict(None, why_no_weight=why_no_weight)
        return Diagnostics(nan, nan, nan, None, None, *counts, 0, False, said)
    _check_vector("log_weight", log_weight)
    num_draws = int(np.shape(log_weight)[0])
    ess = float(effective_sample_size(log_weight))
    pareto_k = float(pareto_smooth(log_weight).pareto_k)
    num_nonfinite = count_nonfinite(log_weight)
    coverage = None
    if probe_log_weight is not None:
        coverage = missing_mass(log_weight, probe_log_weight, probe_weights)
    return Diagnostics(
        ess=ess,
        ess_fraction=ess / num_draws,
        pareto_k=pareto_k,
        missing_mass=None if coverage is None else coverage.missing_mass,
        coverage_tolerance=None if coverage is None else coverage.tolerance,
        num_energy_evaluations=num_energy_evaluations,
        num_gradient_evaluations=num_gradient_evaluations,
        num_network_evaluations=num_network_evaluations,
        num_nonfinite=num_nonfinite,
        collapsed=is_collapsed(coverage),
        verdict=verdict(
            pareto_k,
            coverage,
            ess_fraction=ess / num_draws,
            num_draws=num_draws,
            num_nonfinite=num_nonfinite,
        ),
    )


def _check_vector(name: str, value: Any) -> None:
    shape = np.shape(value)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{name} must have shape [N] with N >= 1, got {shape}")


def _relative_weights(log_weight: Array) -> Array:
    """Weights over the largest one; infinite ones are one and the others then zero."""
    log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
    top = jnp.max(log_weight)
    relative = jnp.exp(log_weight - jnp.where(jnp.isfinite(top), top, 0.0))
    infinite = jnp.isposinf(log_weight).astype(relative.dtype)
    return jnp.where(jnp.isposinf(top), infinite, relative)


def _sorted_law(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending log-weights that are not zero weights, and their normalised weights."""
    a = np.sort(log_weight[(log_weight > -np.inf)])  # drops NaN too
    if a.size == 0:
        return a, a
    w = np.isposinf(a) * 1.0 if np.isposinf(a[-1]) else np.exp(a - a[-1])
    return a, w / np.sum(w)


def _probe_weights(probe_weights: ArrayLike | None, num_probes: int) -> np.ndarray:
    if probe_weights is None:
        return np.full(num_probes, 1 / num_probes)
    v = np.asarray(probe_weights, np.float64)
    if v.shape != (num_probes,):
        raise ValueError(
            f"probe_weights must have the shape of probe_log_weight, ({num_probes},), "
            f"got {v.shape}"
        )
    if not (np.all(np.isfinite(v)) and np.all(v >= 0) and np.sum(v) > 0):
        raise ValueError(
            "probe_weights must be finite, not negative and not all zero; pass "
            "exp(log_weight - max(log_weight)), not logs"
        )
    return v / np.sum(v)


def _variance_of_cdf(f: np.ndarray, squares_below: np.ndarray, squares: Any):
    """sum_i u_i^2 [1(a_i <= c) - F(c)]^2 from partial sums of u_i^2."""
    return squares_below * (1 - f) ** 2 + (squares - squares_below) * f**2


def _pareto_smooth(log_weight: Any, xp: Any) -> PSIS:
    """`pareto_smooth` in NumPy or JAX; static shapes, so that the tail is masked."""
    num_draws, dtype = log_weight.shape[0], log_weight.dtype
    inf = float("inf")
    log_weight = xp.where(xp.isnan(log_weight), -inf, log_weight)
    if num_draws < _MIN_DRAWS:
        return PSIS(log_weight, xp.asarray(inf, dtype), xp.asarray(0.0, dtype))
    top = xp.max(log_weight)
    usable = xp.isfinite(top)  # neither all weights zero nor one infinite
    x = xp.where(usable, log_weight - xp.where(usable, top, 0.0), 0.0)

    size = math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))
    order = xp.argpartition(x, num_draws - size - 1)[num_draws - size - 1 :]
    smallest = math.log(float(np.finfo(dtype).tiny))
    cutoff = xp.maximum(x[order[0]], smallest)
    order = order[1:][xp.argsort(x[order[1:]])]
    tail = x[order]
    # Exceedances in units of the largest; zero where not above the cutoff, which adds
    # nothing to the sums of the fit.
    exceedance = xp.expm1(xp.maximum(tail - cutoff, 0.0))
    unit = xp.where(exceedance[-1] > 0, exceedance[-1], 1.0)
    length = xp.sum((tail > cutoff).astype(dtype))
    constant = usable & (tail[-1] - cutoff < _NEGLIGIBLE_SPREAD)
    k, scale = _fit_generalised_pareto(exceedance / unit, xp.maximum(length, 5.0), xp)
    fitted = usable & ~constant & (length > 4) & xp.isfinite(k) & (scale > 0)

    last = exceedance[-1]
    beyond = xp.where(k < 1, last + (unit * scale + k * last) / (1 - k), inf)
    held = xp.exp(cutoff) * (xp.sum(exceedance) + beyond) / xp.sum(xp.exp(x))
    lowered = fitted & (k >= PARETO_K_LIMIT) & (held < _NEGLIGIBLE_TAIL)

    rank = xp.arange(size).astype(dtype) - (size - length)
    p = xp.clip((rank + 0.5) / xp.maximum(length, 1.0), 0.0, 1 - 0.5 / size)
    log_survival = -xp.log1p(-p)
    tiny = xp.abs(k) < float(np.finfo(dtype).eps)
    safe_k = xp.where(tiny, 1.0, k)
    quantile = xp.where(tiny, log_survival, xp.expm1(safe_k * log_survival) / safe_k)
    smoothed = xp.minimum(cutoff + xp.log1p(unit * scale * quantile), 0.0)
    smoothed = xp.where(fitted & (tail > cutoff), smoothed, tail)
    reported = xp.where(lowered, 0.5, k)
    restored = _put(x, order, smoothed, xp) + xp.where(usable, top, 0.0)
    return PSIS(
        log_weight=xp.where(fitted, restored, log_weight),
        pareto_k=xp.where(constant, 0.0, xp.where(fitted, reported, inf)),
        tail_error=xp.where(lowered, held, 0.0),
    )


def _put(x: Any, index: Any, values: Any, xp: Any) -> Any:
    if xp is not np:
        return x.at[index].set(values)
    out = x.copy()
    out[index] = values
    return out


def _fit_generalised_pareto(x: Any, length: Any, xp: Any) -> tuple[Any, Any]:
    """Shape and scale of the last `length` of the ascending x [M]; the rest is zero.

    Zhang and Stephens (2009): posterior mean of b = k / scale over a grid, with the
    weakly informative prior on k of Vehtari et al., Appendix C (10 points at k = 0.5).
    """
    size, dtype = x.shape[0], x.dtype
    grid_size = 30.0 + xp.floor(xp.sqrt(length))
    j = xp.arange(1, 31 + math.isqrt(size)).astype(dtype)
    active = j <= grid_size
    quarter = xp.floor(length / 4 + 0.5) - 1
    x_quarter = x[(size - length + quarter).astype(int)]
    b = (1 - xp.sqrt(grid_size / (j - 0.5))) / (3 * x_quarter) + 1 / x[-1]
    b = xp.where(active, b, b[0])
    k = xp.sum(xp.log1p(-b[:, None] * x[None, :]), axis=1) / length
    # b / k -> -1 / mean(x) as b -> 0.
    ratio = xp.where(b == 0, length / xp.sum(x), -b / xp.where(b == 0, 1.0, k))
    log_profile = xp.where(active, length * (xp.log(ratio) - k - 1), -float("inf"))
    weights = xp.exp(log_profile - xp.max(log_profile))
    weights = weights / xp.sum(weights)
    weights = xp.where(weights >= 10 * float(np.finfo(dtype).eps), weights, 0.0)
    b_mean = xp.sum(b * weights) / xp.sum(weights)
    k_mean = xp.sum(xp.log1p(-b_mean * x)) / length
    return (length * k_mean + 5) / (length + 10), -k_mean / b_mean
