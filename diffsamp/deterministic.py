"""Deterministic draws along the probability flow of a trained sampler, without weights.

The flow has the marginals of the generation process if the control is right, and of
nothing in particular if it is not. Its solution in K steps is a map of the reference's
draws of which nobody knows whether it is one to one, and so no weight is returned and
no log Z: take those from the sampler itself, whose kernels have one at every number of
steps.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import solvers
from diffsamp._distributions import standard_normal
from diffsamp.energies import as_key, bind_condition
from diffsamp.sampler import Evaluations, Final, Sampler
from diffsamp.types import Array, Energy, Key, Params

_FROZEN = solvers.frozen()


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow:
    """The flow of a sampler, as something to draw from; see `probability_flow`.

    Attributes:
        sampler: the sampler whose control it is.
        solver: how steps are taken.
    """

    sampler: Sampler
    solver: solvers.Solver

    def __post_init__(self):
        self.sampler.check_flow()

    @property
    def dim(self) -> int:
        return self.sampler.dim

    @property
    def num_steps(self) -> int:
        return self.sampler.num_steps

    @property
    def evaluations_per_path(self) -> Evaluations:
        """Cost of a draw and its energy."""
        calls = self.solver.num_calls(self.num_steps)
        if self.sampler.needs_score:
            return Evaluations(1, calls, calls)
        return Evaluations(1, 0, calls)

    @property
    def has_weights(self) -> bool:
        return False

    def with_num_steps(self, num_steps: int) -> ProbabilityFlow:
        """The same on a grid of ``num_steps`` steps."""
        sampler = self.sampler.with_num_steps(num_steps)
        return dataclasses.replace(self, sampler=sampler)

    def init(self, key: Key) -> Params:
        """The sampler's initial parameters."""
        return self.sampler.init(key)

    def check_energy(self, energy: Energy, condition: Array | None = None) -> None:
        """Checks, by shapes alone, that energy and condition fit."""
        self.sampler.check_energy(energy, condition)

    def __call__(
        self, params: Params, key: Key, energy: Energy, condition: Array | None = None
    ) -> Array:
        """One draw, [D].

        Args:
            params: from `init` or training of the sampler.
            key: random key; consumed.
            energy: maps [D] to [], or ([D], condition) to [].
            condition: [condition_dim], or None.
        """
        sampler = self.sampler
        dtype = jax.dtypes.canonicalize_dtype(float)
        place = jax.random.fold_in(as_key(key), self.num_steps)
        start = standard_normal(place, (self.dim,), dtype)
        return self.solve(params, sampler.original(start), energy, condition)

    def solve(
        self, params: Params, x: Array, energy: Energy, condition: Array | None = None
    ) -> Array:
        """Where the flow takes a point x [D] of the reference.

        Differentiable in x and params; scores carry no gradient.
        """
        sampler, steps = self.sampler, self.sampler.steps()
        sampler.check_energy(energy, condition)

        def control(k, y):
            x = sampler.original(y)
            score = sampler.score_at(energy, x, condition)
            step = jax.tree.map(lambda column: column[k], steps)
            return sampler.flow_control(params, step, x, score, condition)

        y = self.solver(control, self.grid, sampler.unit(jnp.asarray(x)))
        return sampler.original(y)

    @property
    def grid(self) -> solvers.FlowGrid:
        """Signal and noise on the grid, ending without noise."""
        decay = self.sampler.process.coefficients(self.num_steps).destruction_decay
        alpha = np.append(np.cumprod(decay[::-1])[::-1], 1.0)
        return solvers.FlowGrid(alpha, np.sqrt(1 - alpha**2))

    def final(
        self, params: Params, key: Key, energy: Energy, condition: Array | None = None
    ) -> Final:
        """One draw with its energy and no weight."""
        x = self(params, key, energy, condition)
        return Final(x, None, bind_condition(energy, condition)(x))

    def score(self, *args, **options) -> NoReturn:
        """There is no density of a path to score.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_WEIGHT)

    def trace_back(self, *args, **options) -> NoReturn:
        """There is no destruction kernel of a deterministic path.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_WEIGHT)


_NO_WEIGHT = (
    "a deterministic flow of unknown injectivity has no valid weight; take weights "
    "from the stochastic sampler itself, flow.sampler"
)


def probability_flow(
    sampler: Sampler, solver: solvers.Solver = _FROZEN
) -> ProbabilityFlow:
    """Deterministic draws of a sampler's control.

    `draw` takes it in place of a sampler and returns draws without weights.

    Args:
        sampler: a sampler on a variance-preserving process (dis, dds, scds).
        solver: from `solvers`; the default is the one that self-consistency trains. For
            a control without step conditioning take ``solvers.dpm_solver()``.

    Raises:
        ValueError: when the sampler's process has no probability flow.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.scds(dim=2, num_steps=8, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> flow = ds.probability_flow(sampler.with_num_steps(1))
        >>> draws = ds.draw(jax.random.key(1), flow, params, target.energy, 100)
        >>> draws.x.shape, draws.log_weight
        ((100, 2), None)
    """
    return ProbabilityFlow(sampler, solver)
