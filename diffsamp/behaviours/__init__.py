"""Where training paths come from, one behaviour per file."""

from diffsamp.behaviours.exploration import exploration as exploration
from diffsamp.behaviours.local_search import local_search as local_search
from diffsamp.behaviours.mixture import mixture as mixture
from diffsamp.behaviours.on_policy import on_policy as on_policy
from diffsamp.behaviours.reference_draws import reference_draws as reference_draws
from diffsamp.behaviours.replay import replay as replay
from diffsamp.behaviours.smc_seeded import smc_seeded as smc_seeded
from diffsamp.behaviours.trust_region import trust_region as trust_region

__all__ = [
    "exploration",
    "local_search",
    "mixture",
    "on_policy",
    "reference_draws",
    "replay",
    "smc_seeded",
    "trust_region",
]
