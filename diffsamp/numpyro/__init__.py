"""NumPyro models as targets. Never imported by ``import diffsamp``."""

from diffsamp.numpyro.target import ModelTarget as ModelTarget
from diffsamp.numpyro.target import target_from_model as target_from_model
