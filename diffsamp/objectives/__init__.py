"""Training objectives, one per file, all of one shape: `diffsamp.types.Objective`."""

from diffsamp.objectives.forward_kl import forward_kl as forward_kl
from diffsamp.objectives.log_variance import log_variance as log_variance
from diffsamp.objectives.reverse_kl import reverse_kl as reverse_kl
from diffsamp.objectives.reverse_kl_log_derivative import (
    reverse_kl_log_derivative as reverse_kl_log_derivative,
)
from diffsamp.objectives.trajectory_balance import (
    trajectory_balance as trajectory_balance,
)
from diffsamp.objectives.weighted_sum import weighted_sum as weighted_sum

__all__ = [
    "forward_kl",
    "log_variance",
    "reverse_kl",
    "reverse_kl_log_derivative",
    "trajectory_balance",
    "weighted_sum",
]
