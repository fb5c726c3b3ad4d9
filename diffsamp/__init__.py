"""Diffusion samplers in JAX: from an energy to weighted draws and log Z."""

from diffsamp import behaviours as behaviours
from diffsamp import buffers as buffers
from diffsamp import diagnostics as diagnostics
from diffsamp import evidence as evidence
from diffsamp import mcmc as mcmc
from diffsamp import metrics as metrics
from diffsamp import mixtures as mixtures
from diffsamp import networks as networks
from diffsamp import not_bounds as not_bounds
from diffsamp import objectives as objectives
from diffsamp import plotting as plotting
from diffsamp import probes as probes
from diffsamp import processes as processes
from diffsamp import samplers as samplers
from diffsamp import schedules as schedules
from diffsamp import solvers as solvers
from diffsamp import targets as targets
from diffsamp import training as training
from diffsamp.checkpoint import CheckpointError as CheckpointError
from diffsamp.checkpoint import load as load
from diffsamp.checkpoint import save as save
from diffsamp.deterministic import ProbabilityFlow as ProbabilityFlow
from diffsamp.deterministic import probability_flow as probability_flow
from diffsamp.diagnostics import Diagnostics as Diagnostics
from diffsamp.drawing import Draws as Draws
from diffsamp.drawing import draw as draw
from diffsamp.drawing import log_weights_of as log_weights_of
from diffsamp.evaluation import evaluate as evaluate
from diffsamp.parallel_in_time import Parareal as Parareal
from diffsamp.parallel_in_time import parareal as parareal
from diffsamp.probes import Probe as Probe
from diffsamp.sampler import Bounds as Bounds
from diffsamp.sampler import Sampler as Sampler
from diffsamp.sampler import Widths as Widths
from diffsamp.standardise import Reference as Reference
from diffsamp.standardise import laplace as laplace
from diffsamp.standardise import prior_draws as prior_draws
from diffsamp.standardise import reference_from as reference_from
from diffsamp.standardise import short_mcmc as short_mcmc
from diffsamp.standardise import standardise as standardise
from diffsamp.summary import summary as summary
from diffsamp.summary import verdict_lines as verdict_lines
from diffsamp.time_grids import TunedGrid as TunedGrid
from diffsamp.time_grids import tune_time_grid as tune_time_grid
from diffsamp.training import FitResult as FitResult
from diffsamp.training import TrainingDiverged as TrainingDiverged
from diffsamp.training import TrainState as TrainState
from diffsamp.training import fit as fit
from diffsamp.training import param_labels as param_labels
from diffsamp.types import Batch as Batch
from diffsamp.types import Behaviour as Behaviour
from diffsamp.types import Cost as Cost
from diffsamp.types import LogEvidence as LogEvidence
from diffsamp.types import Modes as Modes
from diffsamp.types import Objective as Objective
from diffsamp.types import Path as Path
from diffsamp.types import Proposal as Proposal
from diffsamp.types import Provides as Provides
from diffsamp.types import Request as Request
from diffsamp.types import Requirements as Requirements
from diffsamp.types import Target as Target
from diffsamp.types import Trajectory as Trajectory
from diffsamp.variances import VarianceRatios as VarianceRatios
from diffsamp.variances import variance_ratios as variance_ratios
from diffsamp.widths import TunedWidths as TunedWidths
from diffsamp.widths import tune_widths as tune_widths

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Behaviour",
    "Bounds",
    "CheckpointError",
    "Cost",
    "Diagnostics",
    "Draws",
    "FitResult",
    "LogEvidence",
    "Modes",
    "Objective",
    "Parareal",
    "Path",
    "ProbabilityFlow",
    "Probe",
    "Proposal",
    "Provides",
    "Reference",
    "Request",
    "Requirements",
    "Sampler",
    "Target",
    "TrainState",
    "TrainingDiverged",
    "Trajectory",
    "TunedGrid",
    "TunedWidths",
    "VarianceRatios",
    "Widths",
    "behaviours",
    "buffers",
    "diagnostics",
    "draw",
    "evaluate",
    "evidence",
    "fit",
    "laplace",
    "load",
    "log_weights_of",
    "mcmc",
    "metrics",
    "mixtures",
    "networks",
    "not_bounds",
    "objectives",
    "param_labels",
    "parareal",
    "plotting",
    "prior_draws",
    "probability_flow",
    "probes",
    "processes",
    "reference_from",
    "samplers",
    "save",
    "schedules",
    "short_mcmc",
    "solvers",
    "standardise",
    "summary",
    "targets",
    "training",
    "tune_time_grid",
    "tune_widths",
    "variance_ratios",
    "verdict_lines",
]
