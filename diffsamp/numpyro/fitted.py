"""Coordinates in which a posterior is about a unit normal, fitted to points of it.

Sites of the model are decentred where that helps (`decentred_from`), correlations are
taken out (`affine_from`), and then skewness and heavy tails (`bent_from`).
"""

from __future__ import annotations

from diffsamp.numpyro.affine import affine_from
from diffsamp.numpyro.bent import bent_from
from diffsamp.numpyro.coordinates import Chain, Coordinates, to_y
from diffsamp.numpyro.decentred import Decentred, decentred_from
from diffsamp.numpyro.target import ModelTarget
from diffsamp.types import Array


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
    decentred = decentred_from(target, draws)
    x = draws if decentred is None else to_y(decentred, draws)
    affine = affine_from(x)
    inner = Chain(affine, bent_from(to_y(affine, x)))
    return inner if decentred is None else Chain(decentred, inner)


def is_decentred(coordinates: Coordinates) -> bool:
    """Whether a site is.

    Args:
        coordinates: what `fitted_coordinates` returned.
    """
    outer = coordinates.outer if isinstance(coordinates, Chain) else None
    return isinstance(outer, Decentred) and any(map(bool, outer.chosen.values()))
