"""What the factories share: learned destruction and the bounds of learned kernels.

With T steps and both kernels free, a pair of Gaussian chains can fit the target where
T steps of a fixed noising process cannot: generation and destruction have means and
variances of their own, per state and coordinate. In unit coordinates, with the
reference's decay a_k and deviation b_k of either kernel and h = 1/T,

    mean = a_k y + b_k m tanh(h^(1/2) u / m),    variance = b_k^2 exp(c tanh(s / c)),

where (u, s) is a network's output, 0 before training, and (m, c) its `Bounds`; without
m the mean is ``a_k y + b_k h^(1/2) u``. The transition into a point mass has b_k = 0
and stays that point mass. Gritsaev et al. 2025 (arXiv 2506.01541); the variance as in
Sendera et al. 2024, who take c = 4.
"""

from __future__ import annotations

from diffsamp import networks
from diffsamp.networks import Control
from diffsamp.sampler import Bounds

DEFAULT_BOUNDS = Bounds()
FEW_STEPS = Bounds(log_variance=10.0)  # as little noise as 1/150 of the reference's


def free_destruction(
    learned: bool, *, step_conditioned: bool = False
) -> Control | None:
    """A control of mean and variance of the destruction kernel, if it is learned."""
    if not learned:
        return None
    return networks.free(learn_variance=True, step_conditioned=step_conditioned)
