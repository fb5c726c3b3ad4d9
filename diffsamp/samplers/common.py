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

import dataclasses
from typing import Any

from diffsamp import networks
from diffsamp.networks import Control, LinenControl, ReducedPrecision, Tied
from diffsamp.sampler import Bounds

DEFAULT_BOUNDS = Bounds()
FEW_STEPS = Bounds(log_variance=10.0)  # as little noise as 1/150 of the reference's


def destruction_control(
    network: Control | None, learned: bool, *, step_conditioned: bool = False
) -> Control | None:
    """The control of the destruction kernel, or None where nothing of it is learned."""
    if network is None:
        if not learned:
            return None
        network = networks.free(step_conditioned=step_conditioned)
    return with_variance(network, learned, "learn_destruction")


def with_variance(control: Control, learned: bool, argument: str) -> Control:
    """The control, with the variance of its kernel learned where that was asked for.

    Args:
        control: a Flax control whose module has the field ``learn_variance``; any, if
            not learned.
        learned: whether it is asked for; otherwise the control is returned as it is.
        argument: name of the argument that asks, for the error.

    Raises:
        ValueError: when the control has no such field.

    Example:
        >>> import diffsamp as ds
        >>> from diffsamp.samplers.common import with_variance
        >>> given = ds.networks.free(width=32)
        >>> learned = with_variance(given, True, "learn_generation_variance")
        >>> learned == ds.networks.free(width=32, learn_variance=True)
        True
    """
    unfit = not hasattr(control, "init") or isinstance(control, Tied)
    if not learned or unfit:  # which `Sampler` reports
        return control
    if isinstance(control, ReducedPrecision):
        network = with_variance(control.network, learned, argument)
        return dataclasses.replace(control, network=network)
    switch = "learn_variance"
    if not isinstance(control, LinenControl) or not hasattr(control.module, switch):
        kind = type(getattr(control, "module", control)).__name__
        raise ValueError(
            f"{argument}=True needs a network that can learn the variance, with the "
            f"field {switch} of its Flax module to switch on, got {kind}; take "
            "networks.free, for one, or, if the network returns log-variances as it "
            f"is, leave {argument} out"
        )
    module = control.module
    if getattr(module, switch):
        return control
    changes: dict[str, Any] = {switch: True}
    return dataclasses.replace(control, module=module.clone(**changes))


def with_residual(flow: Control, learned: bool) -> Control:
    """The control of a flow, with a residual and variances where that was asked for.

    Args:
        flow: any control; a tied one is returned as it is.
        learned: whether it is asked for; otherwise the control is returned as it is.
    """
    if not learned or isinstance(flow, Tied) or not hasattr(flow, "init"):
        return flow
    residual = networks.free(step_conditioned=True, learn_variance=True)
    return networks.tied(flow, residual)
