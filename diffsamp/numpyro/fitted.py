"""Coordinates in which a posterior is about a unit normal, fitted to points of it.

Sites of the model are decentred where that helps (`decentred_from`), correlations are
taken out (`affine_from`), and then skewness and heavy tails (`bent_from`). Posteriors
of several modes, or bent in other ways, are no unit normal in any such coordinates:
there a Gaussian mixture says what they are like, and the last step is left out where it
would bend their narrow modes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffsamp.mixtures import Mixture, fit_mixture, log_density
from diffsamp.numpyro.affine import affine_from
from diffsamp.numpyro.bent import bent_from
from diffsamp.numpyro.coordinates import Chain, Coordinates, log_dets_of, to_y
from diffsamp.numpyro.decentred import Decentred, decentred_from
from diffsamp.numpyro.target import ModelTarget
from diffsamp.types import Array

LEAST_GAIN = 0.5  # nats per point, for a mixture to be worth its network evaluations
WIDER = 1.3  # covariances: weights need tails that are not lighter than the posterior's


class Fitted(NamedTuple):
    """What is fitted to points of a posterior.

    Attributes:
        coordinates: in which it is about a unit normal, or else of unit covariance.
        mixture: in these coordinates, where it is not about a unit normal, or None.
    """

    coordinates: Coordinates
    mixture: Mixture | None


def fitted(target: ModelTarget, draws: Array) -> Fitted:
    """Coordinates, and a mixture where that fits the points much better.

    Args:
        target: the posterior; its own coordinates are put aside.
        draws: points of it in NumPyro's unconstrained coordinates, [N, D], in the order
            in which they were made.

    Raises:
        ValueError: as `affine_from`.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist
        >>> from diffsamp.numpyro import target_from_model
        >>> from diffsamp.numpyro.fitted import fitted
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0.0, 3.0))
        >>> rng = np.random.default_rng(0)
        >>> draws = rng.choice([-2.0, 2.0], size=(999, 1))
        >>> draws += rng.normal(size=(999, 1)) / 4
        >>> len(fitted(target_from_model(model), draws).mixture.means)
        2
    """
    decentred, x = _decentred(target, draws)
    affine = affine_from(x)
    y = to_y(affine, x)
    bent = bent_from(y)
    straight, inner = to_y(bent, y), Chain(affine, bent)
    mixture, gain = fit_mixture(straight)
    if gain < LEAST_GAIN:
        return Fitted(_after(decentred, inner), None)
    flat, _ = fit_mixture(y)
    log_bends = np.mean(np.asarray(log_dets_of(bent, straight)))
    if _fit(flat, y) > _fit(mixture, straight) - log_bends:
        mixture, inner = flat, affine
    return Fitted(_after(decentred, inner), mixture)


def fitted_coordinates(target: ModelTarget, draws: Array) -> Coordinates:
    """The map from such coordinates to NumPyro's unconstrained ones.

    Args:
        target: the posterior; its own coordinates are put aside.
        draws: points of it in NumPyro's unconstrained coordinates, [N, D], in the order
            in which they were made.

    Raises:
        ValueError: as `affine_from`.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from diffsamp.numpyro import fitted_coordinates, target_from_model
        >>> def model():
        ...     v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        ...     numpyro.sample("x", dist.Normal(0.0, jax.numpy.exp(v / 2)))
        >>> target = target_from_model(model)
        >>> draws = target.sample_prior(jax.random.key(0), 2_000)
        >>> unit = target.standardised(fitted_coordinates(target, draws))
        >>> bool(abs(unit.energy(jax.numpy.ones(2)) - 2.84) < 0.1)  # of a unit normal
        True
    """
    decentred, x = _decentred(target, draws)
    affine = affine_from(x)
    return _after(decentred, Chain(affine, bent_from(to_y(affine, x))))


def widened(mixture: Mixture) -> Mixture:
    """The mixture with tails for weights."""
    return mixture._replace(covariances=WIDER * np.asarray(mixture.covariances))


def is_decentred(coordinates: Coordinates) -> bool:
    """Whether a site is.

    Args:
        coordinates: what `fitted_coordinates` returned.
    """
    outer = coordinates.outer if isinstance(coordinates, Chain) else None
    return isinstance(outer, Decentred) and any(map(bool, outer.chosen.values()))


def _decentred(target, draws):
    """The map that decentres sites, or None, and the points in its coordinates."""
    found = decentred_from(target, draws)
    return found, draws if found is None else to_y(found, draws)


def _after(decentred, inner: Coordinates) -> Coordinates:
    return inner if decentred is None else Chain(decentred, inner)


def _fit(mixture: Mixture, y) -> float:
    """Mean log-density of points, [N, D]."""
    return float(np.mean(log_density(mixture, y)))
