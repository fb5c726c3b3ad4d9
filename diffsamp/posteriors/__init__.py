"""Posteriors with an answer to compare with, most of real data, some with many modes.

NumPyro models with their data, reference draws, log evidence and mode weights.
Importing this package imports NumPyro; ``import diffsamp`` does not import it.
"""

from __future__ import annotations

from diffsamp.posteriors.ark import ark as ark
from diffsamp.posteriors.eight_schools import (
    eight_schools_centered as eight_schools_centered,
)
from diffsamp.posteriors.eight_schools import (
    eight_schools_noncentered as eight_schools_noncentered,
)
from diffsamp.posteriors.galaxies import galaxies_mixture as galaxies_mixture
from diffsamp.posteriors.garch11 import garch11 as garch11
from diffsamp.posteriors.gp_pois_regr import gp_pois_regr as gp_pois_regr
from diffsamp.posteriors.kidscore_interaction import (
    kidscore_interaction as kidscore_interaction,
)
from diffsamp.posteriors.lotka_volterra import lotka_volterra as lotka_volterra
from diffsamp.posteriors.low_dim_gauss_mix import low_dim_gauss_mix as low_dim_gauss_mix
from diffsamp.posteriors.posterior import Posterior as Posterior
from diffsamp.posteriors.two_sinusoids import two_sinusoids as two_sinusoids

_FACTORIES = {
    "ark": ark,
    "eight_schools_centered": eight_schools_centered,
    "eight_schools_noncentered": eight_schools_noncentered,
    "galaxies_mixture": galaxies_mixture,
    "garch11": garch11,
    "gp_pois_regr": gp_pois_regr,
    "kidscore_interaction": kidscore_interaction,
    "lotka_volterra": lotka_volterra,
    "low_dim_gauss_mix": low_dim_gauss_mix,
    "two_sinusoids": two_sinusoids,
}


def by_name(name: str) -> Posterior:
    """The packaged posterior of that name.

    Args:
        name: one of the names of :func:`all_posteriors`.

    Returns:
        A :class:`Posterior`.

    Raises:
        ValueError: when there is none of that name.

    Example:
        >>> from diffsamp.posteriors import by_name
        >>> by_name("two_sinusoids").dim
        6
    """
    if name not in _FACTORIES:
        raise ValueError(
            f"name must be one of {', '.join(sorted(_FACTORIES))}, got {name!r}"
        )
    return _FACTORIES[name]()


def all_posteriors() -> tuple[Posterior, ...]:
    """All packaged posteriors, by name.

    Example:
        >>> from diffsamp.posteriors import all_posteriors
        >>> [p.name for p in all_posteriors() if p.modes is not None]
        ['galaxies_mixture', 'two_sinusoids']
    """
    return tuple(_FACTORIES[name]() for name in sorted(_FACTORIES))
