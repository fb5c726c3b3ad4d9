"""Real posteriors with several modes and an answer to compare with.

NumPyro models with their data, reference draws, log evidence and mode weights.
Importing this package imports NumPyro; ``import diffsamp`` does not import it.
"""

from __future__ import annotations

from diffsamp.posteriors.galaxies import galaxies_mixture as galaxies_mixture
from diffsamp.posteriors.posterior import Posterior as Posterior
from diffsamp.posteriors.two_sinusoids import two_sinusoids as two_sinusoids

_FACTORIES = {"galaxies_mixture": galaxies_mixture, "two_sinusoids": two_sinusoids}


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
        >>> [posterior.name for posterior in all_posteriors()]
        ['galaxies_mixture', 'two_sinusoids']
    """
    return tuple(_FACTORIES[name]() for name in sorted(_FACTORIES))
