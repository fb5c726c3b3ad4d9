"""Controls: the trainable drift corrections of a process."""

from diffsamp.networks.base import Backbone as Backbone
from diffsamp.networks.base import Context as Context
from diffsamp.networks.base import Control as Control
from diffsamp.networks.base import FunctionControl as FunctionControl
from diffsamp.networks.base import LinenBackbone as LinenBackbone
from diffsamp.networks.base import LinenControl as LinenControl
from diffsamp.networks.base import from_function as from_function
from diffsamp.networks.base import linen as linen
from diffsamp.networks.consistency import ConsistencyModule as ConsistencyModule
from diffsamp.networks.consistency import consistency as consistency
from diffsamp.networks.contractive import ContractiveModule as ContractiveModule
from diffsamp.networks.contractive import contractive as contractive
from diffsamp.networks.controls import AnnealedScoreModule as AnnealedScoreModule
from diffsamp.networks.controls import FreeModule as FreeModule
from diffsamp.networks.controls import ReferenceGuidedModule as ReferenceGuidedModule
from diffsamp.networks.controls import ScoreGuidedModule as ScoreGuidedModule
from diffsamp.networks.controls import annealed_score_guided as annealed_score_guided
from diffsamp.networks.controls import backbone as backbone
from diffsamp.networks.controls import free as free
from diffsamp.networks.controls import reference_guided as reference_guided
from diffsamp.networks.controls import score_guided as score_guided
from diffsamp.networks.coordinatewise import (
    CoordinatewiseModule as CoordinatewiseModule,
)
from diffsamp.networks.coordinatewise import coordinatewise as coordinatewise
from diffsamp.networks.data_prediction import (
    DataPredictionModule as DataPredictionModule,
)
from diffsamp.networks.data_prediction import data_prediction as data_prediction
from diffsamp.networks.fourier import FourierFeatures as FourierFeatures
from diffsamp.networks.fourier import FourierMLP as FourierMLP
from diffsamp.networks.fourier import TimeScale as TimeScale
from diffsamp.networks.fourier import with_octaves as with_octaves
from diffsamp.networks.mixture import MixtureGuidedModule as MixtureGuidedModule
from diffsamp.networks.mixture import mixture_guided as mixture_guided
from diffsamp.networks.precision import ReducedPrecision as ReducedPrecision
from diffsamp.networks.precision import reduced_precision as reduced_precision
from diffsamp.networks.tied import Tied as Tied
from diffsamp.networks.tied import tied as tied

__all__ = [
    "AnnealedScoreModule",
    "Backbone",
    "ConsistencyModule",
    "Context",
    "ContractiveModule",
    "Control",
    "CoordinatewiseModule",
    "DataPredictionModule",
    "FourierFeatures",
    "FourierMLP",
    "FreeModule",
    "FunctionControl",
    "LinenBackbone",
    "LinenControl",
    "MixtureGuidedModule",
    "ReducedPrecision",
    "ReferenceGuidedModule",
    "ScoreGuidedModule",
    "Tied",
    "TimeScale",
    "annealed_score_guided",
    "backbone",
    "consistency",
    "contractive",
    "coordinatewise",
    "data_prediction",
    "free",
    "from_function",
    "linen",
    "mixture_guided",
    "reduced_precision",
    "reference_guided",
    "score_guided",
    "tied",
    "with_octaves",
]
