"""A flow from one network, and what a kernel adds to it from another.

Where steps are few, the mean of a Gaussian kernel and the place where the flow leads
are two things: self-consistency or distillation says what the flow is, an objective on
paths what the best kernel. A kernel that is to make up for what cannot be Gaussian
widens the flow's draws by as much; so the two have networks of their own, and what
kernels ask for moves the second alone. It returns what is added to the mean, and
log-variances (`samplers.scds` and `samplers.cdds` say how); the first is held
(`jax.lax.stop_gradient`), except on the grid where flow and kernel are one.

Kernels of few steps start with next to no noise, beside the flow: from the reference's
noise, single steps to a target of several modes end in an optimum that keeps so much of
it that the way back need not know anything. In many dimensions it is the other way
round: every coordinate costs as much as the way back does not yet know of it, and a
target that is near to the reference is best started at its noise (``log_variance=0``).
"""

from __future__ import annotations

import dataclasses
import math

import jax

from diffsamp.networks.base import Context, Control
from diffsamp.types import Array, Key, Params


@dataclasses.dataclass(frozen=True)
class Tied:
    """Two controls; see `tied`."""

    flow: Control
    residual: Control
    log_variance: float = -4.0

    @property
    def needs_score(self) -> bool:
        return self.flow.needs_score or self.residual.needs_score

    def init(self, key: Key, dim: int, condition_dim: int) -> Params:
        for_flow, for_residual = jax.random.split(key)
        return {
            "flow": self.flow.init(for_flow, dim, condition_dim),
            "residual": self.residual.init(for_residual, dim, condition_dim),
        }

    def __call__(self, params: Params, x: Array, t: Array, context: Context) -> Array:
        """The flow's control alone, [D]."""
        control = self.flow(params["flow"], x, t, context)
        if control.shape != x.shape:
            raise ValueError(
                f"the network of a flow must return [{len(x)}] numbers for one point, "
                f"got {list(control.shape)}; leave learn_variance out, which is for "
                "the network of the residual"
            )
        return control

    def held(
        self, params: Params, x: Array, t: Array, context: Context
    ) -> tuple[Array, Array]:
        """The flow's control [D] as it is, and residual and log-variances [2 D]."""
        fixed = {"flow": jax.lax.stop_gradient(params["flow"])}
        flow = self(fixed, x, t, context)
        residual = self.residual(params["residual"], x, t, context)
        if residual.shape != (2 * len(x),):
            raise ValueError(
                f"the network of a residual must return [{2 * len(x)}] numbers for "
                f"one point, got {list(residual.shape)}; build it with "
                "learn_variance=True"
            )
        return flow, residual


def tied(flow: Control, residual: Control, log_variance: float = -4.0) -> Tied:
    """A control for few steps whose flow no objective on paths moves.

    For the generation kernel of `samplers.scds`, where the flow is trained on the
    finest grid and by `objectives.self_consistency`, and of `samplers.cdds`, where it
    is the consistency function and trained by distillation.

    Args:
        flow: any control of [D] numbers; `consistency`, or another with
            ``step_conditioned=True``.
        residual: any control of [2 D] numbers: what is added to the mean, and
            log-variances; `free`, for one, with ``learn_variance=True`` and
            ``step_conditioned=True``.
        log_variance: added to the log-variances that the residual returns, relative to
            the reference's, and bounded with them (`sampler.Bounds`): where training
            starts. The student of `samplers.cdds`, whose process has next to no noise
            anyhow, starts at that.

    Raises:
        ValueError: when either is no control, or tied itself, or ``log_variance`` is
            not finite; while a path is drawn, when either returns another number.

    Example:
        >>> import diffsamp as ds
        >>> network = ds.networks.tied(
        ...     ds.networks.annealed_score_guided(step_conditioned=True, octaves=4),
        ...     ds.networks.free(step_conditioned=True, learn_variance=True),
        ... )
        >>> sampler = ds.samplers.scds(dim=2, network=network, learn_destruction=True)
    """
    for name, control in (("flow", flow), ("residual", residual)):
        if not hasattr(control, "init") or isinstance(control, Tied):
            raise ValueError(
                f"{name} must be a control that is not tied itself, got {control!r}; "
                "make one of a function by networks.from_function(init_fn, drift_fn)"
            )
    if not math.isfinite(log_variance):
        raise ValueError(
            f"log_variance must be a finite number, got {log_variance}; 0 starts at "
            "the reference's noise, the default of -4 near the flow"
        )
    return Tied(flow, residual, float(log_variance))
