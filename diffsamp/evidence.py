"""Estimators and bounds of log Z from path log-weights.

With w the path weight of a sampler, ``E[w] = Z`` on the sampler's own paths (law P) and
``E[1/w] = 1/Z`` on paths traced back from target draws (law ``dPi = (w/Z) dP``). Hence,
with log-weights ``a`` of own paths and ``b`` of target paths:

=====================  ====================  ==========================================
quantity               estimator             property
=====================  ====================  ==========================================
log Z                  log mean exp(a)       consistent; biased down by about sd^2/2N
log Z, target draws    -log mean exp(-b)     consistent; biased up
ELBO                   mean(a)               at most log Z in expectation (Jensen)
EUBO                   mean(b)               at least log Z in expectation
=====================  ====================  ==========================================

None of the estimators made from own paths alone sees a mode that was never visited;
see `diffsamp.diagnostics.missing_mass`.

Weights that are not numbers: ``-inf`` is an ordinary zero weight. A NaN takes the value
that makes the statement weakest (zero weight in log Z and hence ``-inf`` in the ELBO,
``+inf`` in the EUBO) and a ``RuntimeWarning`` says how many there were. ``+inf`` is
kept and makes the estimate infinite. An estimate that is not finite has an infinite
standard error.

All functions but `log_mean_exp` compute on the host in float64.

Sources: the delta method for the logarithm of a mean is standard; the two-sided bounds
are those of Blessing, Jia, Esslinger, Vargas, Neumann, "Beyond ELBOs: a large-scale
evaluation of variational methods for sampling", ICML 2024; the rule on k-hat is that of
Vehtari et al., JMLR 25(72), 2024.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import diagnostics
from diffsamp.types import Array, LogEvidence

ArrayLike = Array | np.ndarray


class Estimate(NamedTuple):
    """A number with its standard error.

    Attributes:
        estimate: the value.
        standard_error: its standard error; infinite where none is valid.
    """

    estimate: float
    standard_error: float


def log_mean_exp(log_weights: ArrayLike) -> Array:
    """Log of the mean of exp(log_weights), without overflow.

    Args:
        log_weights: log-weights, [N]; ``-inf`` is a zero weight, NaN gives NaN.

    Returns:
        The log of the mean weight, []; ``-inf`` where all weights are zero.

    Raises:
        ValueError: when ``log_weights`` is not of shape [N] with N >= 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from diffsamp import evidence
        >>> log_weights = jnp.array([1000.0, 1000.0, -jnp.inf, -jnp.inf])
        >>> round(float(evidence.log_mean_exp(log_weights)), 3)       # 1000 - log 2
        999.307
    """
    _check_vector("log_weights", log_weights)
    log_weights = jnp.asarray(log_weights)
    return jax.nn.logsumexp(log_weights) - math.log(log_weights.shape[0])


def log_evidence(
    log_weight: ArrayLike,
    *,
    target_log_weight: ArrayLike | None = None,
    pareto_k: float | None = None,
) -> LogEvidence:
    """Estimate of log Z with an error bar and bounds, from the sampler's own paths.

    The standard error is that of the delta method, sd(w) / (mean(w) sqrt(N)), together
    with `PSIS.tail_error` of `diagnostics.pareto_smooth`. It is infinite where k-hat is
    0.7 or more, since nothing bounds the error then.

    Args:
        log_weight: log-weights of the sampler's own paths, [N].
        target_log_weight: log-weights of paths traced back from target draws, [M], or
            None; gives `upper`.
        pareto_k: k-hat of ``log_weight`` where it is already known; computed otherwise.

    Returns:
        `LogEvidence`. `lower` is ``-inf`` where a weight is zero.

    Raises:
        ValueError: when an array is not of shape [N] with N >= 1.

    Warns:
        RuntimeWarning: when log-weights are NaN; see the module's docstring.

    Example:
        >>> import numpy as np
        >>> from diffsamp import evidence
        >>> log_weight = 3.0 + 0.1 * np.random.default_rng(0).normal(size=4_000)
        >>> log_z = evidence.log_evidence(log_weight)         # truth 3.005
        >>> abs(log_z.estimate - 3.005) < 3 * log_z.standard_error
        True
        >>> log_z.lower < log_z.estimate, log_z.upper
        (True, None)
    """
    a = _host("log_weight", log_weight, nan=-math.inf)
    estimate, standard_error = _log_mean(a, pareto_k)
    upper = None
    if target_log_weight is not None:
        b = _host("target_log_weight", target_log_weight, nan=math.inf)
        upper = _mean(b, weakest=math.inf)
    return LogEvidence(estimate, standard_error, _mean(a, weakest=-math.inf), upper)


def log_z_from_target_draws(
    target_log_weight: ArrayLike, *, pareto_k: float | None = None
) -> Estimate:
    """Estimate of log Z from target draws: -log mean exp(-log_weight).

    The counterpart of `log_evidence`, in the literature also called the *forward*
    estimate. It is a harmonic mean: it errs upwards, and needs a sampler whose tails
    are not heavier than the target's. Where the sampler has lost a part of the target
    this estimate stays right, while `log_evidence` is low by minus the log of the
    covered mass: their difference is a check.

    Args:
        target_log_weight: log-weights of paths traced back from target draws, [M].
        pareto_k: k-hat of the inverse weights where it is already known.

    Returns:
        `Estimate` with the delta-method standard error, infinite where the k-hat of the
        inverse weights is 0.7 or more.

    Raises:
        ValueError: when ``target_log_weight`` is not of shape [M] with M >= 1.

    Warns:
        RuntimeWarning: when log-weights are NaN; they count as ``+inf``.

    Example:
        >>> import numpy as np
        >>> from diffsamp import evidence
        >>> noise = np.random.default_rng(0).normal(size=4_000)
        >>> log_z = evidence.log_z_from_target_draws(3.01 + 0.1 * noise)  # truth 3.005
        >>> abs(log_z.estimate - 3.005) < 3 * log_z.standard_error
        True
    """
    minus_b = -_host("target_log_weight", target_log_weight, nan=math.inf)
    log_inverse, standard_error = _log_mean(minus_b, pareto_k)
    return Estimate(-log_inverse, standard_error)


def elbo(log_weight: ArrayLike) -> Estimate:
    """Evidence lower bound: the mean log-weight of the sampler's own paths.

    Args:
        log_weight: log-weights of the sampler's own paths, [N]; NaN counts as ``-inf``.

    Returns:
        `Estimate`, with standard error sd(log_weight) / sqrt(N).

    Raises:
        ValueError: when ``log_weight`` is not of shape [N] with N >= 1.

    Warns:
        RuntimeWarning: when log-weights are NaN.

    Example:
        >>> import numpy as np
        >>> from diffsamp import evidence
        >>> evidence.elbo(np.array([1.0, 3.0]))
        Estimate(estimate=2.0, standard_error=1.0)
    """
    a = _host("log_weight", log_weight, nan=-math.inf)
    return _mean_estimate(a, weakest=-math.inf)


def eubo(target_log_weight: ArrayLike) -> Estimate:
    """Evidence upper bound: the mean log-weight of paths traced back from target draws.

    Args:
        target_log_weight: log-weights of paths traced back from target draws, [M]; NaN
            counts as ``+inf``.

    Returns:
        `Estimate`, with standard error sd(target_log_weight) / sqrt(M).

    Raises:
        ValueError: when ``target_log_weight`` is not of shape [M] with M >= 1.

    Warns:
        RuntimeWarning: when log-weights are NaN.

    Example:
        >>> import numpy as np
        >>> from diffsamp import evidence
        >>> evidence.eubo(np.array([4.0, np.inf]))
        Estimate(estimate=inf, standard_error=inf)
    """
    b = _host("target_log_weight", target_log_weight, nan=math.inf)
    return _mean_estimate(b, weakest=math.inf)


def _check_vector(name: str, value: ArrayLike) -> None:
    shape = np.shape(value)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{name} must have shape [N] with N >= 1, got {shape}")


def _host(name: str, value: ArrayLike, *, nan: float) -> np.ndarray:
    """The log-weights in float64 with NaN replaced, saying so."""
    _check_vector(name, value)
    values = np.asarray(value, np.float64)
    is_nan = np.isnan(values)
    if np.any(is_nan):
        weight = "zero" if nan < 0 else "infinite"
        warnings.warn(
            f"{np.sum(is_nan)} of {values.size} entries of {name} are NaN and count as "
            f"{weight} weights; check that the energy and its gradient are finite",
            RuntimeWarning,
            stacklevel=3,
        )
    return np.where(is_nan, nan, values)


def _log_mean(a: np.ndarray, pareto_k: float | None) -> tuple[float, float]:
    """Log of the mean weight and its standard error."""
    top = float(np.max(a))
    if not math.isfinite(top):
        return top, math.inf
    w = np.exp(a - top)
    mean = float(np.mean(w))
    estimate = top + math.log(mean)
    tail_error = 0.0
    if pareto_k is None:
        pareto_k, tail_error = map(float, diagnostics.pareto_smooth(a)[1:])
    if a.size < 2 or not pareto_k < diagnostics.PARETO_K_LIMIT:
        return estimate, math.inf
    seen = float(np.std(w, ddof=1)) / (mean * math.sqrt(a.size))
    return estimate, math.hypot(seen, tail_error)


def _mean(a: np.ndarray, *, weakest: float) -> float:
    """Mean of numbers among which zero and infinite weights may be."""
    if np.any(np.isneginf(a)) and np.any(np.isposinf(a)):
        return weakest  # the bound says nothing
    return float(np.mean(a))


def _mean_estimate(a: np.ndarray, *, weakest: float) -> Estimate:
    mean = _mean(a, weakest=weakest)
    if a.size < 2 or not math.isfinite(mean):
        return Estimate(mean, math.inf)
    return Estimate(mean, float(np.std(a, ddof=1)) / math.sqrt(a.size))
