"""Training objectives, one per file, all of one shape: `diffsamp.types.Objective`."""

from diffsamp.objectives.at_num_steps import at_num_steps as at_num_steps
from diffsamp.objectives.consistency_distillation import (
    consistency_distillation as consistency_distillation,
)
from diffsamp.objectives.continuous_consistency import (
    continuous_consistency as continuous_consistency,
)
from diffsamp.objectives.detailed_balance import detailed_balance as detailed_balance
from diffsamp.objectives.flows import Flow as Flow
from diffsamp.objectives.forward_kl import forward_kl as forward_kl
from diffsamp.objectives.forward_kl_log_derivative import (
    forward_kl_log_derivative as forward_kl_log_derivative,
)
from diffsamp.objectives.kernels import destruction_only as destruction_only
from diffsamp.objectives.kernels import generation_only as generation_only
from diffsamp.objectives.kernels import gradient_scale as gradient_scale
from diffsamp.objectives.log_variance import log_variance as log_variance
from diffsamp.objectives.progressive_distillation import (
    progressive_distillation as progressive_distillation,
)
from diffsamp.objectives.reverse_kl import reverse_kl as reverse_kl
from diffsamp.objectives.reverse_kl_log_derivative import (
    reverse_kl_log_derivative as reverse_kl_log_derivative,
)
from diffsamp.objectives.self_consistency import Biased as Biased
from diffsamp.objectives.self_consistency import Curriculum as Curriculum
from diffsamp.objectives.self_consistency import Uniform as Uniform
from diffsamp.objectives.self_consistency import self_consistency as self_consistency
from diffsamp.objectives.sub_trajectory_balance import (
    sub_trajectory_balance as sub_trajectory_balance,
)
from diffsamp.objectives.target_copy import target_copy as target_copy
from diffsamp.objectives.trajectory_balance import (
    trajectory_balance as trajectory_balance,
)
from diffsamp.objectives.trajectory_likelihood import (
    trajectory_likelihood as trajectory_likelihood,
)
from diffsamp.objectives.trust_region_log_variance import (
    trust_region_log_variance as trust_region_log_variance,
)
from diffsamp.objectives.weighted_sum import weighted_sum as weighted_sum

__all__ = [
    "Biased",
    "Curriculum",
    "Flow",
    "Uniform",
    "at_num_steps",
    "consistency_distillation",
    "continuous_consistency",
    "destruction_only",
    "detailed_balance",
    "forward_kl",
    "forward_kl_log_derivative",
    "generation_only",
    "gradient_scale",
    "log_variance",
    "progressive_distillation",
    "reverse_kl",
    "reverse_kl_log_derivative",
    "self_consistency",
    "sub_trajectory_balance",
    "target_copy",
    "trajectory_balance",
    "trajectory_likelihood",
    "trust_region_log_variance",
    "weighted_sum",
]
