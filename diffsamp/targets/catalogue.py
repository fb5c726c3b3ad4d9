"""Every target by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from diffsamp.targets.brownian import brownian
from diffsamp.targets.distorted_manywell import distorted_manywell
from diffsamp.targets.drawn_image import drawn_image
from diffsamp.targets.funnels import funnel_easy, funnel_hard
from diffsamp.targets.gaussian_mixtures import gmm9, gmm25, gmm40
from diffsamp.targets.gaussians import gaussian, spike_and_slab
from diffsamp.targets.lgcp import lgcp
from diffsamp.targets.logistic_regression import (
    breast_cancer,
    german_credit,
    ionosphere,
    sonar,
)
from diffsamp.targets.planar import rings, two_moons
from diffsamp.targets.rosenbrock import rosenbrock
from diffsamp.targets.seeds import seeds
from diffsamp.targets.student_t import student_t_mixture
from diffsamp.targets.wells import double_well, manywell, mw52, mw54
from diffsamp.types import Target

_FACTORIES: dict[str, Callable[[], Target]] = {
    "brownian": brownian,
    "breast_cancer": breast_cancer,
    "distorted_manywell": distorted_manywell,
    "distorted_manywell_8": functools.partial(distorted_manywell, 8),
    "double_well": double_well,
    "drawn_image": drawn_image,
    "funnel_easy": funnel_easy,
    "funnel_hard": funnel_hard,
    "gaussian": gaussian,
    "german_credit": german_credit,
    "german_credit_1": functools.partial(german_credit, 1.0),
    "gmm9": gmm9,
    "gmm25": gmm25,
    "gmm40": gmm40,
    "gmm40_sde_sampler": functools.partial(gmm40, "sde_sampler"),
    "gmm40_vsm": functools.partial(gmm40, "vsm"),
    "gmm40_vsm_50": functools.partial(gmm40, "vsm", 50),
    "gmm40_vsm_200": functools.partial(gmm40, "vsm", 200),
    "ionosphere": ionosphere,
    "lgcp": lgcp,
    "lgcp_whitened": functools.partial(lgcp, whitened=True),
    "manywell": manywell,
    "manywell_8": functools.partial(manywell, 8),
    "mw52": mw52,
    "mw54": mw54,
    "rings": rings,
    "rosenbrock": rosenbrock,
    "rosenbrock_15": functools.partial(rosenbrock, 15, 10.0, math.log(1e5)),
    "seeds": seeds,
    "sonar": sonar,
    "spike_and_slab": spike_and_slab,
    "student_t_mixture": student_t_mixture,
    "student_t_mixture_50": functools.partial(student_t_mixture, 50),
    "student_t_mixture_200": functools.partial(student_t_mixture, 200),
    "two_moons": two_moons,
}


def all_targets() -> dict[str, Callable[[], Target]]:
    """Returns a factory without arguments for every named target.

    The key is the ``name`` of the target that the factory makes. Nothing is computed
    until a factory is called.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.all_targets()["mw54"]().dim
        5
    """
    return dict(_FACTORIES)


def by_name(name: str) -> Target:
    """Returns the target of that name.

    Args:
        name: a key of `all_targets`.

    Raises:
        ValueError: when there is none; the message lists the valid names.

    Example:
        >>> import diffsamp as ds
        >>> ds.targets.by_name("manywell_8").dim
        8
    """
    if name not in _FACTORIES:
        raise ValueError(f"name must be one of {', '.join(_FACTORIES)}; got {name!r}")
    return _FACTORIES[name]()
