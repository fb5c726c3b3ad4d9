"""Densities with known truth: factories that return a `diffsamp.Target`."""

from diffsamp.targets.brownian import brownian as brownian
from diffsamp.targets.catalogue import all_targets as all_targets
from diffsamp.targets.catalogue import by_name as by_name
from diffsamp.targets.distorted_manywell import (
    distorted_manywell as distorted_manywell,
)
from diffsamp.targets.drawn_image import drawn_image as drawn_image
from diffsamp.targets.funnels import funnel_easy as funnel_easy
from diffsamp.targets.funnels import funnel_hard as funnel_hard
from diffsamp.targets.gaussian_mixtures import gmm9 as gmm9
from diffsamp.targets.gaussian_mixtures import gmm25 as gmm25
from diffsamp.targets.gaussian_mixtures import gmm40 as gmm40
from diffsamp.targets.gaussians import gaussian as gaussian
from diffsamp.targets.gaussians import spike_and_slab as spike_and_slab
from diffsamp.targets.lgcp import lgcp as lgcp
from diffsamp.targets.logistic_regression import breast_cancer as breast_cancer
from diffsamp.targets.logistic_regression import german_credit as german_credit
from diffsamp.targets.logistic_regression import ionosphere as ionosphere
from diffsamp.targets.logistic_regression import sonar as sonar
from diffsamp.targets.moments import reference_moments as reference_moments
from diffsamp.targets.planar import rings as rings
from diffsamp.targets.planar import two_moons as two_moons
from diffsamp.targets.rosenbrock import rosenbrock as rosenbrock
from diffsamp.targets.seeds import seeds as seeds
from diffsamp.targets.student_t import student_t_mixture as student_t_mixture
from diffsamp.targets.wells import double_well as double_well
from diffsamp.targets.wells import manywell as manywell
from diffsamp.targets.wells import mw52 as mw52
from diffsamp.targets.wells import mw54 as mw54

__all__ = (
    "all_targets",
    "breast_cancer",
    "brownian",
    "by_name",
    "distorted_manywell",
    "double_well",
    "drawn_image",
    "funnel_easy",
    "funnel_hard",
    "gaussian",
    "german_credit",
    "gmm9",
    "gmm25",
    "gmm40",
    "ionosphere",
    "lgcp",
    "manywell",
    "mw52",
    "mw54",
    "reference_moments",
    "rings",
    "rosenbrock",
    "seeds",
    "sonar",
    "spike_and_slab",
    "student_t_mixture",
    "two_moons",
)
