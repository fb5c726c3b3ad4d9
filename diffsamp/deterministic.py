"""Deterministic draws along the probability flow of a trained sampler.

The flow has the marginals of the generation process if the control is right, and of
nothing in particular if it is not. Its solution in K steps is a map of the reference's
draws, and such draws have a density, and so a weight, only if the map is one to one.

Nobody knows that of a network in general, and then no weight is returned. It is known
of a step ``y' = a y + b c(y)`` where a is not 0 and the displacement b c(y) / a has a
Lipschitz constant L below 1 (Behrmann et al. 2019, arXiv 1811.00995): then the step
has one inverse, the limit of ``y <- (y' - b c(y)) / a``, and

    log_weight = -energy(x_K) - log p_0(x_0) + sum_k log abs det(a_k + b_k dc_k/dy)

is exact, by the change of variables in each step; the determinants are those of full
Jacobians, which takes D more network evaluations a step. `networks.contractive` has the
constant it was asked for, whatever its parameters. ``b / a`` shrinks with the step, so
that a flow may be certified with many steps and not with one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import solvers
from diffsamp._distributions import standard_normal
from diffsamp.energies import as_key, bind_condition
from diffsamp.sampler import Evaluations, Final, Sampler
from diffsamp.types import Array, Energy, Key, Params, Trajectory

_FROZEN = solvers.frozen()
_PRECISION = 1e-8  # of the inverse, relative to the first guess's error


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
    def lipschitz(self) -> float | None:
        """The largest Lipschitz constant of a step's displacement.

        After the affine part of the step has been factored out; None where no bound is
        known, as of a control that sees the score: a network's constant says nothing of
        the energy's second derivatives.
        """
        control, solver = self.sampler.flow_network, self.solver
        bound = getattr(control, "lipschitz", None)
        if bound is None or control.needs_score:
            return None
        if not isinstance(solver, solvers.OneCallSolver):
            return None
        keep, gain = solver.coefficients(self.grid)
        if not np.all(keep != 0):
            return None
        return float(bound * np.max(np.abs(gain / keep)))

    @property
    def why_no_weight(self) -> str | None:
        """Why draws have no valid weight; None where they have one."""
        advice = (
            "take weights from the stochastic sampler itself, flow.sampler, or build "
            "it with ds.networks.contractive and use a solver of one call per step"
        )
        bound = self.lipschitz
        if bound is None:
            return f"this flow is not known to be one to one; {advice}"
        if bound >= 1:
            return (
                f"a step of this flow need not be one to one: its displacement has a "
                f"Lipschitz constant of up to {bound:.3g}, which must be below 1; use "
                f"more steps than {self.num_steps}, or {advice}"
            )
        return None

    @property
    def has_weights(self) -> bool:
        """Whether every step is certified to be one to one."""
        return self.why_no_weight is None

    @property
    def evaluations_per_path(self) -> Evaluations:
        """Cost of a draw and its energy; with Jacobians where there are weights."""
        calls = self.solver.num_calls(self.num_steps)
        gradients = calls if self.sampler.needs_score else 0
        return Evaluations(1, gradients, calls * (1 + self.dim * self.has_weights))

    @property
    def evaluations_per_trace(self) -> Evaluations:
        """Cost of a weighted path that ends in a given point."""
        forward = self.evaluations_per_path
        inverse = self.num_steps * self._num_iterations
        return forward._replace(network=forward.network + inverse)

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

    def check_params(self, params: Params) -> None:
        """Checks that parameters have the shapes of the sampler's."""
        self.sampler.check_params(params)

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
        return self.solve(params, self._start(key), energy, condition)

    def solve(
        self, params: Params, x: Array, energy: Energy, condition: Array | None = None
    ) -> Array:
        """Where the flow takes a point x [D] of the reference.

        Differentiable in x and params; scores carry no gradient.
        """
        self.check_energy(energy, condition)
        control = self._control(params, energy, condition)
        y = self.solver(control, self.grid, self.sampler.unit(jnp.asarray(x)))
        return self.sampler.original(y)

    def transport(
        self, params: Params, x: Array, energy: Energy, condition: Array | None = None
    ) -> Trajectory:
        """`solve` with all states on the way and the weight of the end.

        Args:
            params: parameters.
            x: a point of the reference, [D].
            energy: as in `__call__`.
            condition: [condition_dim], or None.

        Returns:
            A `Trajectory`, whose log_generation is minus the log-determinants of the
            steps, and log_destruction zero.

        Raises:
            ValueError: when the flow has no valid weight.
        """
        self._check_weight()
        self.check_energy(energy, condition)
        step = self.stepper(params, energy, condition)

        def move(y, k):
            def twice(y):
                moved = step(k, y)
                return moved, moved

            jacobian, moved = jax.jacfwd(twice, has_aux=True)(y)
            return moved, (y, jnp.linalg.slogdet(jacobian)[1])

        y, places = self.sampler.unit(jnp.asarray(x)), jnp.arange(self.num_steps)
        y, (ys, log_dets) = jax.lax.scan(move, y, places)
        xs = self.sampler.original(jnp.concatenate([ys, y[None]]))
        value = bind_condition(energy, condition)(xs[-1])
        log_prior = self.log_reference(x)
        log_weight = -value - log_prior + jnp.sum(log_dets)
        zeros = jnp.zeros_like(log_dets)
        return Trajectory(xs, xs[-1], log_weight, log_prior, -log_dets, zeros, value)

    def trace_back(
        self,
        params: Params,
        key: Key,
        x: Array,
        energy: Energy,
        condition: Array | None = None,
    ) -> Trajectory:
        """The one path that ends in x [D]; the key is not used.

        Raises:
            ValueError: when the flow has no valid weight.
        """
        del key
        self._check_weight()
        self.check_energy(energy, condition)
        control = self._control(params, energy, condition)
        keep, gain = self._coefficients

        def step(y_next, k):
            def improve(_, y):
                return (y_next - gain[k] * control(k, y)) / keep[k]

            y = jax.lax.fori_loop(0, self._num_iterations, improve, y_next / keep[k])
            return y, None

        end = self.sampler.unit(jnp.asarray(x))
        places = jnp.arange(self.num_steps)
        y, _ = jax.lax.scan(step, end, places, reverse=True)
        return self.transport(params, self.sampler.original(y), energy, condition)

    def final(
        self, params: Params, key: Key, energy: Energy, condition: Array | None = None
    ) -> Final:
        """One draw with its energy, and its weight where there is one."""
        start = self._start(key)
        if self.has_weights:
            path = self.transport(params, start, energy, condition)
            return Final(path.x, path.log_weight, path.energy)
        x = self.solve(params, start, energy, condition)
        return Final(x, None, bind_condition(energy, condition)(x))

    def score(self, *args, **options) -> NoReturn:
        """There is no density of a path to score; see `transport`.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a path of a flow has no density of its own; the weight of its end, where "
            "there is one, is that of flow.transport(params, xs[0], energy)"
        )

    @property
    def grid(self) -> solvers.FlowGrid:
        """Signal and noise, none at the end, and the decay of generation."""
        process: Any = self.sampler.process
        table = process.coefficients(self.num_steps)
        signal = process.schedule.signal(table.times)
        signal = signal / signal[-1]
        decay = table.generation_decay
        return solvers.FlowGrid(np.sqrt(signal), np.sqrt(1 - signal), decay)

    def _start(self, key):
        dtype = jax.dtypes.canonicalize_dtype(float)
        place = jax.random.fold_in(as_key(key), self.num_steps)
        return self.sampler.original(standard_normal(place, (self.dim,), dtype))

    def stepper(
        self,
        params: Params,
        energy: Energy,
        condition: Array | None = None,
        *,
        through_score: bool = False,
    ):
        """``(k, y [D]) -> y [D]``, step number k in unit coordinates.

        Args:
            params: parameters.
            energy: as in `__call__`.
            condition: [condition_dim], or None.
            through_score: whether derivatives in y include those of the score, by
                second derivatives of the energy.

        Raises:
            ValueError: when the solver needs more than one call per step.
        """
        if not isinstance(self.solver, solvers.OneCallSolver):
            raise ValueError(
                f"{type(self.solver).__name__} cannot take a single step; use a solver "
                "of one call per step: ds.solvers.frozen, euler or exponential"
            )
        keep, gain = self._coefficients
        control = self._control(params, energy, condition, through_score)
        return lambda k, y: keep[k] * y + gain[k] * control(k, y)

    def log_reference(self, x: Array) -> Array:
        """Log-density of the reference at x [D], []."""
        return self.sampler.log_prior({}, self.sampler.unit(jnp.asarray(x)))

    def _control(self, params, energy, condition, through_score=False):
        sampler, steps = self.sampler, self.sampler.steps()

        def control(k, y):
            x = sampler.original(y)
            score = sampler.score_at(energy, x, condition, constant=not through_score)
            step = jax.tree.map(lambda column: column[k], steps)
            return sampler.flow_control(params, step, x, score, condition)

        return control

    @property
    def _coefficients(self):
        assert isinstance(self.solver, solvers.OneCallSolver)
        dtype = jax.dtypes.canonicalize_dtype(float)
        columns = self.solver.coefficients(self.grid)
        return tuple(jnp.asarray(column, dtype) for column in columns)

    @property
    def _num_iterations(self) -> int:
        bound = self.lipschitz
        if bound is None or not 0 < bound < 1:
            return 0
        return math.ceil(math.log(_PRECISION) / math.log(bound))

    def _check_weight(self):
        if self.why_no_weight is not None:
            raise ValueError(f"no valid weight: {self.why_no_weight}")


def probability_flow(
    sampler: Sampler, solver: solvers.Solver = _FROZEN
) -> ProbabilityFlow:
    """Deterministic draws of a sampler's control.

    `draw` takes it in place of a sampler. Draws have weights where every step is
    certified to be one to one (`ProbabilityFlow.why_no_weight`), and none otherwise.

    Args:
        sampler: a sampler on a variance-preserving process (dis, dds, scds), whose
            destruction is not learned but where `scds` learns it.
        solver: from `solvers`; the default takes `Sampler.flow_step`, which is what
            self-consistency trains. For a control without step conditioning take
            ``solvers.linear_end()``.

    Raises:
        ValueError: when half of the sampler's control is no probability flow
            (`Sampler.check_flow`).

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.scds(dim=2, num_steps=8, scale=4.0)
        >>> params = sampler.init(jax.random.key(0))
        >>> flow = ds.probability_flow(sampler.with_num_steps(1))
        >>> draws = ds.draw(jax.random.key(1), flow, params, target.energy, 100)
        >>> draws.x.shape, draws.log_weight
        ((100, 2), None)
        >>> print(flow.why_no_weight.partition(";")[0])
        this flow is not known to be one to one
    """
    return ProbabilityFlow(sampler, solver)
