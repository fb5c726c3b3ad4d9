"""NumPyro models as targets. Never imported by ``import diffsamp``."""

from diffsamp.numpyro import pilots as pilots
from diffsamp.numpyro.affine import Affine as Affine
from diffsamp.numpyro.affine import affine_from as affine_from
from diffsamp.numpyro.affine import affine_from_curvature as affine_from_curvature
from diffsamp.numpyro.arviz import to_arviz as to_arviz
from diffsamp.numpyro.bent import Bent as Bent
from diffsamp.numpyro.bent import bent_from as bent_from
from diffsamp.numpyro.coordinates import Chain as Chain
from diffsamp.numpyro.coordinates import Coordinates as Coordinates
from diffsamp.numpyro.decentred import Decentred as Decentred
from diffsamp.numpyro.decentred import decentred_from as decentred_from
from diffsamp.numpyro.elbo import PathELBO as PathELBO
from diffsamp.numpyro.fitted import fitted_coordinates as fitted_coordinates
from diffsamp.numpyro.guide import AutoDiffusion as AutoDiffusion
from diffsamp.numpyro.inference import DiffusionSampler as DiffusionSampler
from diffsamp.numpyro.inference import Trained as Trained
from diffsamp.numpyro.kernel import DiffusionKernel as DiffusionKernel
from diffsamp.numpyro.kernel import DiffusionKernelState as DiffusionKernelState
from diffsamp.numpyro.random_step import RandomStepNUTS as RandomStepNUTS
from diffsamp.numpyro.target import ModelTarget as ModelTarget
from diffsamp.numpyro.target import target_from_model as target_from_model
