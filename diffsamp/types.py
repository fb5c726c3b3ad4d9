"""The contracts of the library: what flows between samplers, objectives and users.

Conventions, valid everywhere:

* ``energy(x) = -log rho(x)`` for one point ``x`` of shape [D]; users ``vmap``.
* Time runs from 0 (reference) to 1 (target); a path ``xs`` has shape [K+1, D].
* *generation* is the kernel ``p(x_{k+1} | x_k)`` towards the target, *destruction* the
  kernel ``q(x_k | x_{k+1})`` back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
Key = jax.Array
Params = Any
PyTree = Any


class Energy(Protocol):
    """Minus the log of an unnormalised density: ``energy(x [D]) -> []``.

    A module-level function, or a ``jax.tree_util.Partial`` that carries its data, can
    be reused by compiled code; every new closure compiles anew.
    """

    def __call__(self, x: Array, /) -> Array: ...


class Densities(NamedTuple):
    """What a pass over a path finds out about its K steps.

    Attributes:
        log_generation: log p(x_{k+1} | x_k), [K].
        log_destruction: log q(x_k | x_{k+1}) (0 into a point mass), [K].
        share_outside: share of coordinates in which the variances of the two kernels
            differ too much (`variances`), [K].
    """

    log_generation: Array
    log_destruction: Array
    share_outside: Array


class Path(NamedTuple):
    """A simulated path, and what its simulation found.

    Attributes:
        xs: states from reference to target, [K+1, D].
        energy: energy of the last state, [].
        scores: minus the energy gradient at every state, [K+1, D]; of shape [K+1, 0]
            where no network asks for it.
        energies: the energies that came with the scores, [K+1], or [0].
        densities: what is known of its steps under the parameters that it was simulated
            with, so that scoring it with the same ones costs a gradient and no value;
            None where nothing is.
    """

    xs: Array
    energy: Array
    scores: Array
    energies: Array
    densities: Densities | None = None


class Trajectory(NamedTuple):
    """A path with the log-densities of everything that made it.

    Attributes:
        xs: states from reference to target, [K+1, D].
        x: the last state, the draw, [D].
        log_weight: ``-energy - log_prior + sum(log_destruction - log_generation)``, [].
        log_prior: log-density of the first state (0 for a point mass), [].
        log_generation: log p(x_{k+1} | x_k), [K].
        log_destruction: log q(x_k | x_{k+1}) (0 into a point mass), [K].
        energy: energy of the last state, [].
    """

    xs: Array
    x: Array
    log_weight: Array
    log_prior: Array
    log_generation: Array
    log_destruction: Array
    energy: Array


class Modes(NamedTuple):
    """The separated modes of a target.

    Attributes:
        weights: true probability of each mode, [M], sums to one.
        assign: pure function from a point [D] to the index of its mode, [] int.
    """

    weights: Array
    assign: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A density to sample from, with whatever truth about it is known.

    Attributes:
        energy: minus the log unnormalised density of one point [D].
        dim: dimension D.
        name: short identifier used in tables.
        log_z: log of the integral of exp(-energy), or None when unknown.
        sample: exact sampler ``(key, n) -> [n, D]``, or None.
        modes: separated modes with their true weights, or None.
        scale: advisable standard deviation of the reference, in the units of x.
        log_prior: normalised log-density of a prior, or None. With `log_likelihood`
            it satisfies ``energy(x) == -(log_prior(x) + log_likelihood(x))``.
        log_likelihood: the rest of the log-density, or None.
        sample_prior: sampler of that prior, ``(key, n) -> [n, D]``, or None.
        constrain: map from a point [D] to the user's parameters, or None.

    Raises:
        ValueError: when ``dim`` is not a positive integer or energy is not callable.

    Example:
        >>> import jax.numpy as jnp, diffsamp as ds
        >>> target = ds.Target(energy=lambda x: 0.5 * jnp.sum(x**2), dim=3)
        >>> float(target.energy(jnp.ones(3)))
        1.5
    """

    energy: Callable[..., Array]
    dim: int
    name: str = "target"
    log_z: float | None = None
    sample: Callable[[Key, int], Array] | None = None
    modes: Modes | None = None
    scale: float = 1.0
    log_prior: Callable[[Array], Array] | None = None
    log_likelihood: Callable[[Array], Array] | None = None
    sample_prior: Callable[[Key, int], Array] | None = None
    constrain: Callable[[Array], PyTree] | None = None

    def __post_init__(self):
        if not callable(self.energy):
            raise ValueError(f"energy must be callable, got {type(self.energy)}")
        object.__setattr__(self, "dim", as_count("dim", self.dim))


class LogEvidence(NamedTuple):
    """An estimate of log Z.

    Attributes:
        estimate: log of the mean weight.
        standard_error: delta-method standard error; infinite where k-hat >= 0.7.
        lower: ELBO, a lower bound in expectation.
        upper: EUBO, an upper bound in expectation, or None without target draws.
    """

    estimate: float
    standard_error: float
    lower: float
    upper: float | None


class Requirements(NamedTuple):
    """What an objective needs from the paths it is given.

    Attributes:
        simulation_gradient: paths simulated with gradients; on-policy only.
        on_policy: at least some on-policy rows.
        target_draws: at least some rows that end in draws from the target.
        pilot: draws of the untrained sampler, for its `init`.
        anchor: rows that know the sampler of their round.
    """

    simulation_gradient: bool = False
    on_policy: bool = False
    target_draws: bool = False
    pilot: bool = False
    anchor: bool = False


class Anchor(NamedTuple):
    """What rows of a trust region know of the sampler that made them.

    Rows of other behaviours in a mixture have NaN.

    Attributes:
        log_generation: log-density of the path under that sampler's generation, [B].
        log_tilt: log of what this density is to be multiplied with, up to a constant:
            a tempered log-weight, [B].
    """

    log_generation: Array
    log_tilt: Array


class Batch(NamedTuple):
    """The shared batch of B paths that objectives are evaluated on.

    Attributes:
        trajectories: scored paths with detached states, differentiable in the
            parameters; leaves have a leading axis B.
        rollouts: the same with gradients through the states, or None.
        paths: the same paths before they were scored.
        on_policy: rows drawn from the current generation process, [B].
        target_draws: rows traced back from (approximate) target draws, [B].
        condition: what each row is conditioned on, [B, C]; C = 0 for nothing.
        group: rows with the same number have the same condition, [B] int below B.
        count: number of updates done, [].
        key: random key of this update.
        sampler: the sampler.
        energy: the energy.
        anchor: from behaviours that provide it, or None.
        memory_budget: bytes that scoring further paths may take, or None (`scoring`).
        mesh: devices over which rows are spread, or None.
    """

    trajectories: Trajectory
    rollouts: Trajectory | None
    paths: Path
    on_policy: Array
    target_draws: Array
    condition: Array
    group: Array
    count: Array
    key: Key
    sampler: Any
    energy: Energy
    anchor: Anchor | None = None
    memory_budget: int | None = None
    mesh: Any = None


class Objective(NamedTuple):
    """A training objective, as pure functions.

    Attributes:
        requires: what it needs from the behaviour.
        init: ``(key, sampler, params, energy, pilot) -> (objective_params, state)``;
            pilot is a `Final` of draws before training, or None where the objective
            requires none.
        loss: ``(params, state, batch) -> (loss [], metrics dict)`` with params
            ``{"sampler": ..., "objective": ...}``. A metric "cost" is a `Cost`: what it
            evaluated itself.
        update: ``(params, state, batch) -> state``, after each optimiser step.
    """

    requires: Requirements
    init: Callable[..., tuple[Params, PyTree]]
    loss: Callable[..., tuple[Array, dict[str, Any]]]
    update: Callable[..., PyTree]


class Request(NamedTuple):
    """The B rows that a behaviour is asked for.

    Attributes:
        condition: what each row is to be conditioned on, [B, C]; C = 0 for nothing.
        group: rows with the same number have the same condition, [B] int below B.
    """

    condition: Array
    group: Array


class Proposal(NamedTuple):
    """Training paths from a behaviour.

    Attributes:
        paths: unscored paths, leaves with a leading axis B, one per requested row.
        simulated: rows whose last state is new, not taken from a store, [B].
        on_policy: rows drawn from the current generation process, [B].
        target_draws: rows traced back from (approximate) target draws, [B].
        anchor: what the rows know of the sampler that made them, or None.
    """

    paths: Path
    simulated: Array
    on_policy: Array
    target_draws: Array
    anchor: Anchor | None = None


def no_rows(batch_size: int) -> int:
    """For `Provides.stored_rows`: none of them."""
    del batch_size
    return 0


class Provides(NamedTuple):
    """What a behaviour can promise to objectives.

    Attributes:
        simulated: some rows bring new last states.
        on_policy: some rows are on-policy.
        only_on_policy: all rows are.
        target_draws: some rows end in (approximate) target draws.
        conditions: rows can be had under any condition.
        anchor: some rows know the sampler of their round.
        stored_rows: ``batch_size -> count``: how many rows are paths from a store, so
            that proposing them evaluates nothing.
    """

    simulated: bool = False
    on_policy: bool = False
    only_on_policy: bool = False
    target_draws: bool = False
    conditions: bool = False
    anchor: bool = False
    stored_rows: Callable[[int], int] = no_rows


class Cost(NamedTuple):
    """Evaluations, as counts. A gradient evaluation yields the energy, too.

    Attributes:
        energy: evaluations of the energy alone, [].
        gradient: evaluations of energy and gradient together, [].
        network: evaluations of a control network, [].
    """

    energy: Array | int
    gradient: Array | int
    network: Array | int = 0


def total_cost(costs: Sequence[Cost]) -> Cost:
    """The sum of several."""
    return Cost(*(sum(column) for column in zip(*costs, strict=True)))


def as_count(name: str, value: Any, least: int = 1) -> int:
    """An argument that counts something.

    Raises:
        ValueError: when it is no integer, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def counted(cost: Cost) -> Cost:
    """The same as arrays of 32-bit integers, so that branches and loops agree."""
    return Cost(*(jnp.asarray(count, jnp.int32) for count in cost))


def no_metrics(state: PyTree) -> dict[str, Array]:
    """`Behaviour.metrics` of behaviours that have nothing to report."""
    del state
    return {}


def _has_begun(*_):
    raise RuntimeError("this behaviour has begun; call init of the one it came from")


class Behaviour(NamedTuple):
    """Where training paths come from, as pure functions.

    Attributes:
        init: ``(key, sampler, params, energy) -> (state, Cost)``.
        propose: ``(state, key, sampler, params, energy, request, count) -> Proposal``.
        update: ``(state, key, sampler, params, energy, trajectories, proposal, count)
            -> (state, Cost)``, after each optimiser step.
        provides: what the rows are.
        metrics: ``state -> {name: []}``, what it reports after each update.
    """

    init: Callable[..., tuple[PyTree, Cost]]
    propose: Callable[..., Proposal]
    update: Callable[..., tuple[PyTree, Cost]]
    provides: Provides
    metrics: Callable[..., dict[str, Array]] = no_metrics

    @property
    def begun(self) -> Behaviour:
        """Itself without ``init``: all that a compiled update depends on."""
        return self._replace(init=_has_begun)
