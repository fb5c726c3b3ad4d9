"""The Sampler: a process, two controls and a reference, run forwards and backwards.

With y = (x - loc) / scale and the kernels of `diffsamp.processes`, the log-weight of a
path is, in the units of x,

    log_weight = -energy(x_K) - log p_0(x_0)
                 + sum_k [log q(x_k | x_{k+1}) - log p(x_{k+1} | x_k)],

with the kernels that were really used. Integrating ``exp(log_weight)`` against the law
of generated paths telescopes to the integral of ``exp(-energy)``: E[exp(log_weight)] is
Z for every parameter value and every number of steps. A point-mass reference has
``log p_0 := 0`` and ``log q(x_0 | x_1) := 0``, the same point mass on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from diffsamp._distributions import normal_log_prob, standard_normal
from diffsamp.energies import as_key, bind_condition, check_energy
from diffsamp.networks import Backbone, Context, Control, Tied
from diffsamp.priors import Prior
from diffsamp.processes import Coefficients, Process, Renoising
from diffsamp.types import (
    Array,
    Densities,
    Energy,
    Key,
    Params,
    Path,
    Trajectory,
    as_count,
)

VARIANCE_LIMIT = 100.0  # of the kernels' variance ratio and of its inverse
_EVALUATED = "energy and score"  # what rematerialisation keeps: O(K D) numbers


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far a learned kernel may go from the reference's.

    Attributes:
        log_variance: c: the learned log-variance is the reference's plus
            ``c tanh(s / c)`` for a network output s.
        shift: m: the mean moves by ``m tanh(d / m)`` standard deviations of the
            reference's kernel instead of d of them, and so does the residual of a mean
            tied to the flow; None for no bound.

    Raises:
        ValueError: when a bound is not positive and finite.
    """

    log_variance: float = 4.0
    shift: float | None = None

    def __post_init__(self):
        for name in ("log_variance", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")


class Widths(NamedTuple):
    """What is added to the log-variances of all kernels; see `widths.tune_widths`.

    Attributes:
        generation: added to those of the generation kernel.
        destruction: added to those of the destruction kernel.
    """

    generation: float = 0.0
    destruction: float = 0.0


class Evaluations(NamedTuple):
    """What one path costs. A gradient evaluation yields the energy too.

    Attributes:
        energy: evaluations of the energy alone.
        gradient: evaluations of energy and gradient together.
        network: evaluations of a control network.
    """

    energy: int
    gradient: int
    network: int


class Final(NamedTuple):
    """The end of a path whose other states were not kept.

    Attributes:
        x: last state, [D].
        log_weight: [], or None where there is no valid one.
        energy: energy of the last state, [].
    """

    x: Array
    log_weight: Array | None
    energy: Array


_ENDS = slice(None, -1), slice(1, None)  # of every step: its state now and later


class _Seen(NamedTuple):
    """What is known of one state: its score [D] or [0], and features [H] or None."""

    score: Array
    features: Array | None


class Step(NamedTuple):
    """Constants of one step of a grid; every field is [], or stacked, [K].

    Attributes:
        index: number of the step, k.
        time: its start.
        next_time: its end.
        shift_scale: 1 / sqrt(K), by which a control is multiplied.
        others: `processes.Coefficients`.
    """

    index: Array
    time: Array
    next_time: Array
    shift_scale: Array
    generation_decay: Array
    generation_std: Array
    destruction_decay: Array
    destruction_std: Array
    score_gain: Array


class _Run(NamedTuple):
    """A simulation: last state in unit coordinates, its score, and what was asked for.

    The last score also stands in the path, but taking it from there would keep all.
    """

    y: Array
    score: Array
    log_prior: Array
    densities: Any
    energy: Array
    path: Any


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A diffusion sampler: static, hashable, compared by value.

    Build one with a factory of `diffsamp.samplers`. ``jax.jit(sampler)`` works, and two
    equal samplers share one compilation.

    Attributes:
        dim: dimension D of the target.
        num_steps: number of steps K.
        process: the pair of reference kernels.
        generation: control of the generation kernel.
        destruction: control of the destruction kernel, or None for the reference's.
        backbone: network whose features both controls build on, or None where each has
            its own.
        loc: location of the reference, a number or D numbers (kept as a tuple), in
            units of x.
        scale: standard deviation of the reference, likewise.
        condition_dim: size of the condition of a conditional energy; 0 for none.
        generation_bounds: how far the generation kernel may leave the reference's.
        destruction_bounds: the same of the destruction kernel.
        finest: number of steps F of the grid on which one set of parameters is trained
            for all step counts, or None for a sampler that is not to share them. Only
            divisors of F are step counts then, and with K steps everything that is
            learned but the drift of generation is multiplied by
            ``((F/K - 1) / (F - 1))^(1/2)``, 0 for F = 1: with F steps nothing else is
            learned.
        prior: where paths start, in unit coordinates, or None for the reference's
            N(0, I) or point mass.
        widths: what is added to the log-variances of both kernels, learned or not; the
            flow does not know of it.

    Raises:
        ValueError: when dim or num_steps is below 1, loc or scale has another length
            than dim or is not finite, scale is not positive, widths are not two finite
            numbers, a network is no control or was built for another noise schedule,
            finest is below 1 or not a multiple of num_steps, it is 1 and the
            destruction kernel is learned, the process starts from a point mass and a
            prior is given, or a network of `networks.tied` is that of destruction, or
            of generation with a backbone, or without a flow that something trains.
    """

    dim: int
    num_steps: int
    process: Process
    generation: Control
    destruction: Control | None = None
    loc: float | Sequence[float] = 0.0
    scale: float | Sequence[float] = 1.0
    condition_dim: int = 0
    backbone: Backbone | None = None
    generation_bounds: Bounds = Bounds()
    destruction_bounds: Bounds = Bounds()
    finest: int | None = None
    prior: Prior | None = None
    widths: Widths = Widths()

    def __post_init__(self):
        for name, least in (("dim", 1), ("num_steps", 1), ("condition_dim", 0)):
            value = as_count(name, getattr(self, name), least)
            object.__setattr__(self, name, value)
        for name in ("loc", "scale"):
            object.__setattr__(
                self, name, _numbers(name, getattr(self, name), self.dim)
            )
        if np.shape(self.widths) != (2,) or not np.all(np.isfinite(self.widths)):
            raise ValueError(
                "widths must be what is added to the log-variances of generation and "
                f"of destruction, two finite numbers, got {self.widths}; (0.0, 0.0) "
                "leaves the kernels as trained, ds.tune_widths chooses"
            )
        object.__setattr__(self, "widths", Widths(*map(float, self.widths)))
        if not np.all(np.asarray(self.scale) > 0):
            raise ValueError(f"scale must be positive, got {self.scale}")
        for name in ("loc", "scale"):
            if not np.all(np.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("generation", "destruction", "backbone"):
            control = getattr(self, name)
            if control is not None and not hasattr(control, "init"):
                raise ValueError(
                    f"the network of {name} must be a control with `init`, got "
                    f"{control!r}; make one of a function by "
                    "networks.from_function(init_fn, drift_fn)"
                )
        schedule = getattr(self.process, "schedule", None)
        if schedule is not None and not hasattr(schedule, "signal"):
            raise ValueError(
                f"schedule must come from diffsamp.schedules, got {schedule!r}; "
                "schedules.cosine(), for one"
            )
        time_grid = getattr(self.process, "time_grid", None)
        if time_grid is not None and not callable(time_grid):
            raise ValueError(
                "time_grid must be a function of the number of steps, got "
                f"{time_grid!r}; schedules.power_grid(2.0), for one"
            )
        if self.finest is not None:
            finest = as_count("finest", self.finest, 1)
            object.__setattr__(self, "finest", finest)
        if self.finest is not None and self.finest % self.num_steps:
            raise ValueError(
                f"num_steps must divide {self.finest}, the number of steps with which "
                f"this sampler is trained, got {self.num_steps}: its network has seen "
                "no steps of that length"
            )
        if self.finest == 1 and self.destruction is not None:
            raise ValueError(
                "with finest=1 there is only the training grid, on which destruction "
                "is not learned; give the number of steps of a finer one, "
                "finest=128 for one, or leave the destruction network out"
            )
        if isinstance(self.destruction, Tied):
            raise ValueError(
                "only the generation kernel can be tied to a flow; give networks.tied "
                "as network, not as destruction_network"
            )
        if isinstance(self.generation, Tied):
            self._check_tied()
        if self.prior is not None and self.process.point_mass:
            raise ValueError(
                "prior must be None where the process starts from a point mass, got "
                f"{self.prior!r}; take a variance-preserving process, such as that of "
                "ds.samplers.gmp"
            )
        networks = [(n, getattr(self, n)) for n in ("generation", "destruction")]
        if isinstance(self.generation, Tied):
            networks[0] = ("generation", self.flow_network)
            networks.append(("generation", self.generation.residual))
        for name, network in networks:
            module = getattr(network, "module", None)
            of_network = getattr(module, "schedule", schedule)
            if of_network != schedule:
                raise ValueError(
                    f"the network of {name} must have the schedule of the sampler, "
                    f"{schedule!r}, got one with {of_network!r}; give both the same"
                )

    # -- what users call ------------------------------------------------------------

    def init(self, key: Key) -> Params:
        """Draws initial parameters.

        Args:
            key: random key; consumed.

        Returns:
            ``{"generation": ...}`` and, where there are such, ``"destruction"``,
            ``"backbone"`` and ``"prior"``.
        """
        key = as_key(key)
        generation, destruction = jax.random.split(key)
        sizes, params = (self.dim, self.condition_dim), {}
        if self.backbone is not None:
            params["backbone"] = self.backbone.init(jax.random.fold_in(key, 2), *sizes)
            sizes = (*sizes, self.backbone.feature_dim)
        params["generation"] = self.generation.init(generation, *sizes)
        if self.destruction is not None:
            params["destruction"] = self.destruction.init(destruction, *sizes)
        if self.prior is not None:
            params["prior"] = self.prior.init(jax.random.fold_in(key, 3), self.dim)
        return params

    def __call__(
        self, params: Params, key: Key, energy: Energy, condition: Array | None = None
    ) -> Trajectory:
        """Draws one trajectory with its log-densities, in one scan.

        Args:
            params: from `init` or training.
            key: random key; consumed.
            energy: maps [D] to [], or ([D], condition) to [].
            condition: [condition_dim], or None.

        Returns:
            A `Trajectory`.
        """
        run = self._run(params, key, energy, condition, keep=True)
        return self._trajectory(run.path.xs, run.log_prior, run.densities, run.energy)

    def score(
        self, params: Params, xs: Array, energy: Energy, condition: Array | None = None
    ) -> Trajectory:
        """The log-densities of a given path, all steps in parallel.

        Args:
            params: parameters.
            xs: states, [K+1, D].
            energy: as in `__call__`.
            condition: [condition_dim], or None.

        Raises:
            ValueError: when xs or condition has another shape.
        """
        if jnp.shape(xs) != (self.num_steps + 1, self.dim):
            raise ValueError(
                f"xs must have shape [num_steps + 1, dim] = [{self.num_steps + 1}, "
                f"{self.dim}], got {list(jnp.shape(xs))}; for another step count use "
                "sampler.with_num_steps(k)"
            )
        self._check_condition(condition)
        return self.score_path(params, self._complete(xs, energy, condition), condition)

    def trace_back(
        self,
        params: Params,
        key: Key,
        x: Array,
        energy: Energy,
        condition: Array | None = None,
    ) -> Trajectory:
        """A path that ends in x, drawn by the destruction kernel.

        For x from the target, the mean of its log_weight is an upper bound on log Z.

        Args:
            params: parameters.
            key: random key; consumed.
            x: last state, [D].
            energy: as in `__call__`.
            condition: [condition_dim], or None.

        Raises:
            ValueError: when x or condition has another shape.
        """
        path = self.trace_path(params, key, x, energy, condition)
        return self.score_path(params, path, condition)

    def with_num_steps(self, num_steps: int) -> Sampler:
        """The same sampler, same parameters, on a grid of ``num_steps`` steps.

        Widths, which are those of one number of steps, do not come along to another.

        Raises:
            ValueError: when it does not divide `finest`, where that is given.
        """
        widths = self.widths if num_steps == self.num_steps else Widths()
        return dataclasses.replace(self, num_steps=num_steps, widths=widths)

    # -- what objectives, behaviours and drawing call ---------------------------------

    @property
    def needs_score(self) -> bool:
        """Whether simulating a path takes energy gradients."""
        networks = [self.flow_network, self.destruction]
        if isinstance(self.generation, Tied) and self._has_residual:
            networks.append(self.generation.residual)
        return any(n is not None and n.needs_score for n in networks)

    @property
    def has_weights(self) -> bool:
        """Whether draws have valid importance weights."""
        return True

    @property
    def why_no_weight(self) -> None:
        """Why draws have no valid weight: they have one."""
        return None

    @property
    def evaluations_per_path(self) -> Evaluations:
        """Cost of drawing one weighted path."""
        networks = self.num_steps * (
            self.networks_of_generation + (self.destruction is not None)
        )
        if self.backbone is not None:  # once per state; the heads are nothing
            networks = self.num_steps + 1
        if self.needs_score:
            return Evaluations(0, self.num_steps + 1, networks)
        return Evaluations(1, 0, networks)

    @property
    def evaluations_per_trace(self) -> Evaluations:
        """Cost of tracing a path back and scoring it: the same."""
        return self.evaluations_per_path

    def check_energy(
        self, energy: Energy, condition: Any = None, *, gradient: bool = False
    ) -> None:
        """Checks, by shapes alone, that energy and condition fit the sampler.

        Args:
            energy: maps [D] to [], or ([D], condition) to [].
            condition: [condition_dim], or None.
            gradient: whether its gradient is needed even if no network sees it.

        Raises:
            ValueError: when they do not.
        """
        self._check_condition(condition)
        bound = bind_condition(energy, condition)
        gradient = gradient or self.needs_score
        check_energy(bound, self.dim, self._dtype, gradient=gradient)

    def check_params(self, params: Params) -> None:
        """Checks that parameters have the shapes of this sampler's.

        Args:
            params: from `init` or training.

        Raises:
            ValueError: when they are another sampler's.
        """
        found, wanted = jax.tree.map(jnp.shape, params), _shapes_of_params(self)
        if found != wanted:
            raise ValueError(
                f"params are not those of this sampler: their shapes are {found}, "
                f"wanted {wanted}"
            )

    def simulate(
        self,
        params: Params,
        key: Key,
        energy: Energy,
        condition: Array | None = None,
        *,
        extra_std: Array | float = 0.0,
    ) -> Path:
        """Draws a path, without gradients.

        Args:
            params: parameters.
            key: random key; consumed.
            energy: as in `__call__`.
            condition: [condition_dim], or None.
            extra_std: exploration noise: standard deviation added in quadrature to
                every generation step, in unit coordinates.
        """
        params = jax.lax.stop_gradient(params)
        run = self._run(params, key, energy, condition, keep=True, extra_std=extra_std)
        return run.path._replace(densities=run.densities)

    def trace_path(
        self,
        params: Params,
        key: Key,
        x: Array,
        energy: Energy,
        condition: Array | None = None,
    ) -> Path:
        """`trace_back` without scoring and without gradients."""
        if jnp.shape(x) != (self.dim,):
            raise ValueError(
                f"x must be one point of shape [{self.dim}], got {list(jnp.shape(x))}; "
                "vmap over several"
            )
        self._check_condition(condition)
        key, params = as_key(key), jax.lax.stop_gradient(params)
        energy = self._bind(energy, condition)
        steps, dtype = self.steps(), self._dtype
        x = jax.lax.stop_gradient(jnp.asarray(x, dtype))
        in_loop = self.destruction is not None and self.destruction.needs_score

        def evaluate(y):
            return self._value_and_score(energy, y) if in_loop else _nothing(dtype)

        def body(carry, step):
            y, x, kept = carry
            value, score = evaluate(y)
            kept = _put(kept, step.index + 1, (x, value, score))
            features = self._features(params, y, step.next_time, condition)
            seen = _Seen(score, features)
            mean, std = self._destroy(params, step, y, seen, condition)
            noise = standard_normal(
                jax.random.fold_in(key, step.index), (self.dim,), dtype
            )
            y = mean + std * noise
            return (y, self.original(y), kept), None

        y = self.unit(x)
        empty = self._empty((x, *jax.eval_shape(evaluate, y)))
        (y, x, kept), _ = jax.lax.scan(body, (y, x, empty), steps, reverse=True)
        xs, values, scores = _put(kept, 0, (x, *evaluate(y)))
        if not in_loop:
            return self._complete(xs, energy, None)
        return Path(xs, values[-1], scores, values)

    def flow_step(
        self,
        params: Params,
        step: Step,
        x: Array,
        score: Array,
        condition: Array | None = None,
    ) -> Array:
        """One step of the probability flow that the generation control stands for.

        In the limit of short steps, generation ``dY = (-Y / 2 + c) d tau + dW`` and its
        noising process have the marginals of the flow ``dY = (c / 2) d tau``. The step
        moves by half of what the control adds to the mean of the generation kernel,
        ``(1 - decay) c``.

        Args:
            params: parameters.
            step: constants of the step, of a grid of any size (`steps`).
            x: state at its start, [D].
            score: minus the energy gradient there in unit coordinates (`score_at`);
                [0] where the control needs none.
            condition: [condition_dim], or None.

        Returns:
            The state at its end, [D].

        Raises:
            ValueError: when the control stands for no such flow (`check_flow`).
        """
        control = self.flow_control(params, step, x, score, condition)
        return self.original(self.unit(x) + (1 - step.generation_decay) * control)

    def flow_control(
        self,
        params: Params,
        step: Step,
        x: Array,
        score: Array,
        condition: Array | None = None,
    ) -> Array:
        """The control c of `flow_step` at the start of a step, [D], unit coordinates.

        At the optimum ``c = (1 + d) / (2 d) (score + y)``, d the decay of the process
        over the step, see `solvers`; for short steps score + y.
        """
        self.check_flow()
        y = self.unit(x)
        seen = _Seen(score, self._features(params, y, step.time, condition))
        control = self._generation_control(params, step, y, seen, condition)
        mean, decay = step.generation_decay * y, step.generation_decay
        controlled, _ = self._controlled(
            step, mean, step.generation_std, control, self.generation_bounds
        )
        return 0.5 * (controlled - mean) / (1 - decay)

    def predicted_end(
        self, params: Params, time: Array, x: Array, condition: Array | None = None
    ) -> Array:
        """The consistency function f(x, t): the end of the flow through x [D] at t [].

        Differentiable in all of them.

        Raises:
            ValueError: when the sampler has no such function.
        """
        self.check_predicts_end()
        y = self.unit(x)
        empty, one = jnp.zeros((0,), y.dtype), jnp.ones((), y.dtype)
        context = Context(empty, one, condition, None, 1 - time)
        control = self.generation(params["generation"], y, time, context)
        return self.original(control[: self.dim])

    def check_predicts_end(self) -> None:
        """Checks that steps go where the generation network says that a path ends.

        Raises:
            ValueError: when they do not.
        """
        if not isinstance(self.process, Renoising):
            raise ValueError(
                f"{type(self.process).__name__} has no network that predicts the end "
                "of a path; the student must be a ds.samplers.cdds"
            )
        if self.generation_bounds.shift is not None:
            raise ValueError(
                "a bound on the mean of generation keeps the steps of a consistency "
                "sampler from the end that its network predicts; leave shift out of "
                f"generation_bounds, got {self.generation_bounds.shift}"
            )

    @property
    def flow_network(self) -> Control:
        """The control of the probability flow: without a residual, if it has one."""
        control = self.generation
        return control.flow if isinstance(control, Tied) else control

    def flow_alone(self, params: Params) -> tuple[Sampler, Params]:
        """Without what kernels learn for their weights besides the flow.

        For draws of a distilled `samplers.cdds` that need no weight: where its network
        is tied to a residual, or destruction is learned, they come from the consistency
        function and the process's little noise then. Weights of the result are valid,
        as all are, and poor.

        Args:
            params: parameters of this sampler; not changed.

        Returns:
            ``(sampler, params)`` without a residual and a destruction network.

        Example:
            >>> import jax, diffsamp as ds
            >>> options = {"learn_generation_variance": True, "learn_destruction": True}
            >>> student = ds.samplers.cdds(dim=2, scale=4.0, **options)
            >>> params = student.init(jax.random.key(0))
            >>> alone, its_params = student.flow_alone(params)
            >>> alone.evaluations_per_path.network, sorted(its_params)
            (1, ['generation'])
        """
        kept = {name: params[name] for name in params if name != "destruction"}
        if isinstance(self.generation, Tied):
            kept["generation"] = params["generation"]["flow"]
        options: dict[str, Any] = {"destruction": None, "widths": Widths()}
        options["generation"] = self.flow_network
        return dataclasses.replace(self, **options), kept

    def check_flow(self) -> None:
        """Checks that half of the generation control is a probability flow.

        It is where the control is learned against a fixed destruction: the paths that
        generation has to reverse then have one law, and so the mean of its kernel has
        one optimum, whether its variance is learned or not. Destruction that is learned
        on the same grid leaves a pair of controls, of which neither alone says how the
        marginals move; `finest` keeps it fixed on the training grid.

        Raises:
            ValueError: when the process has no flow, or destruction is learned at every
                step count.
        """
        self._check_process_has_flow()
        if self.destruction is not None and self.finest is None:
            raise ValueError(
                "destruction is learned, too, and then half of the generation control "
                "is no probability flow; leave out learn_destruction and "
                "destruction_network, or take ds.samplers.scds, which keeps "
                "destruction fixed on its training grid"
            )

    def _check_tied(self) -> None:
        if self.backbone is not None:
            raise ValueError(
                "networks.tied cannot build on a backbone; leave backbone out"
            )
        if isinstance(self.process, Renoising):
            return
        self._check_process_has_flow()
        if self.finest is None:
            raise ValueError(
                "the residual of networks.tied would be free at every step count, and "
                "nothing would train its flow; take ds.samplers.scds, whose training "
                "grid has none, or ds.samplers.cdds, or give the flow's network alone"
            )

    def _check_process_has_flow(self) -> None:
        if not self.process.has_flow:
            raise ValueError(
                f"{type(self.process).__name__} has no probability flow of its "
                "generation control alone; use a variance-preserving process "
                "(ds.samplers.scds, dis or dds)"
            )
        if self.prior is not None:
            raise ValueError(
                "a sampler with a prior of its own does not start where the "
                "probability flow does; take ds.samplers.scds, dis or dds"
            )

    def score_at(
        self,
        energy: Energy,
        x: Array,
        condition: Array | None = None,
        *,
        constant: bool = True,
    ) -> Array:
        """What the networks see of the energy at x: [D], or [0] if they need nothing.

        One evaluation of the energy gradient, as a constant unless told otherwise.
        """
        bound = self._bind(energy, condition)
        return self._value_and_score(bound, self.unit(x), constant)[1]

    def score_path(
        self, params: Params, path: Path, condition: Array | None = None
    ) -> Trajectory:
        """Scores a simulated path without a single energy evaluation.

        Differentiable in params, never in the states.
        """
        path = jax.lax.stop_gradient(path)
        densities = self.densities(
            params, self.steps(), path.xs, path.scores, condition
        )
        return self.with_densities(params, path, densities)

    def densities(
        self,
        params: Params,
        steps: Step,
        xs: Array,
        scores: Array,
        condition: Array | None = None,
    ) -> Densities:
        """The densities of some steps in a row, in parallel.

        Args:
            params: parameters.
            steps: constants of C steps in a row, [C] each.
            xs: the states that they connect, [C+1, D].
            scores: what the networks see of the energy there, [C+1, D] or [C+1, 0].
            condition: [condition_dim], or None.
        """
        states = xs, scores, condition
        return self._of_steps(self._densities, params, steps, *states)

    def with_densities(
        self, params: Params, path: Path, densities: Densities
    ) -> Trajectory:
        """The trajectory that a path and the densities of its steps make."""
        log_prior = self.log_prior(params, self.unit(path.xs[0]))
        return self._trajectory(path.xs, log_prior, densities, path.energy)

    def log_variance_ratios(
        self, params: Params, path: Path, condition: Array | None = None
    ) -> Array:
        """log(generation / destruction variance) of every step of a path, [K, D].

        0 for the transition out of a point mass, where there is no such ratio.
        """

        def ratio(y, y_next, generation, destruction):
            del y, y_next
            return _log_variance_ratio(self.dim, generation[1], destruction[1])

        states = path.xs, path.scores, condition
        return self._of_steps(ratio, params, self.steps(), *states)

    def final(
        self, params: Params, key: Key, energy: Energy, condition: Array | None = None
    ) -> Final:
        """Draws one weighted point and keeps nothing else."""
        run = self._run(params, key, energy, condition)
        log_weight = _log_weight(run.energy, run.log_prior, run.densities)
        return Final(self.original(run.y), log_weight, run.energy)

    def rollout(
        self,
        params: Params,
        key: Key,
        energy: Energy,
        condition: Array | None = None,
        *,
        keep_states: bool = False,
    ) -> tuple[Trajectory, Path]:
        """`__call__`, differentiable through the simulation in O(sqrt(K)) memory.

        Only the energy of the last state is differentiated; scores shown to networks
        carry no gradient and are kept, so that no energy is evaluated again in the
        backward pass. Returns the trajectory and the path it was scored on.

        With ``keep_states`` the K states are kept, too (`bytes_of_states`), and each
        step is computed twice on the whole instead of three times.
        """
        remat = _step_scan if keep_states else _sqrt_scan
        run = self._run(params, key, energy, condition, remat=remat, keep=True)
        y, score, path, energy_value = run.y, run.score, run.path, run.energy
        if not self.needs_score:  # otherwise it is known already
            energy_value, score = self._score_at(self._bind(energy, condition), y)
            path = path._replace(energy=energy_value)
        # Not by differentiating through the energy: one path whose energy is not a
        # number must not spoil the gradient of the whole batch.
        score = jnp.where(jnp.isfinite(score), score, jnp.zeros_like(score))
        zero = y - jax.lax.stop_gradient(y)
        energy_value = energy_value - jnp.sum(score * zero)
        trajectory = self._trajectory(
            path.xs, run.log_prior, run.densities, energy_value
        )
        return trajectory, path._replace(densities=run.densities)

    @property
    def bytes_of_states(self) -> int:
        """Memory that `rollout` takes for the states of one path if it keeps them."""
        features = 0 if self.backbone is None else self.backbone.feature_dim
        size = self.dim * (1 + self.needs_score) + features + 1
        return self.num_steps * size * self._dtype.itemsize

    # -- one step ---------------------------------------------------------------------

    def _features(self, params, y, time, condition):
        if self.backbone is None:
            return None
        return self.backbone(params["backbone"], y, time, condition)

    def _generation_control(self, params, step: Step, y, seen: _Seen, condition):
        context = _context(step, seen, condition)
        return self.generation(params["generation"], y, step.time, context)

    def _generate(self, params, step: Step, y, seen: _Seen, condition):
        mean, std = self._generation_kernel(params, step, y, seen, condition)
        return mean, _widened(std, self.widths.generation)

    def _destroy(self, params, step: Step, y_next, seen: _Seen, condition):
        mean, std = self._destruction_kernel(params, step, y_next, seen, condition)
        return mean, _widened(std, self.widths.destruction)

    def _generation_kernel(self, params, step: Step, y, seen: _Seen, condition):
        network, bounds = self.generation, self.generation_bounds
        if isinstance(network, Tied) and self._has_residual:
            return self._generate_tied(network, params, step, y, seen, condition)
        control = self._generation_control(params, step, y, seen, condition)
        mean, std = step.generation_decay * y, step.generation_std
        return self._controlled(step, mean, std, control, bounds)

    def _generate_tied(
        self, network: Tied, params, step: Step, y, seen: _Seen, condition
    ):
        """See `samplers.scds` and, where means are those of the flow, `cdds`."""
        context, bounds = _context(step, seen, condition), self.generation_bounds
        held = network.held(params["generation"], y, step.time, context)
        mean, reference_std = step.generation_decay * y, step.generation_std
        centre, _ = self._controlled(step, mean, reference_std, held[0], bounds)
        residual = held[1]
        if not isinstance(self.process, Renoising):
            residual = residual.at[self.dim :].add(network.log_variance)
        moved, std = self._controlled(step, mean, reference_std, residual, bounds)
        if not isinstance(self.process, Renoising):
            flow = y + 0.5 * (centre - mean)
            ratio = jnp.minimum((std / reference_std) ** 2, 1.0)
            centre = flow + ratio * (centre - flow)
        return centre + self._freedom * (moved - mean), std

    def _destruction_kernel(self, params, step: Step, y_next, seen: _Seen, condition):
        mean, std = step.destruction_decay * y_next, step.destruction_std
        if self.destruction is None:
            return mean, std
        context = _context(step, seen, condition)
        control = self.destruction(
            params["destruction"], y_next, step.next_time, context
        )
        bounds = self.destruction_bounds
        moved, std = self._controlled(step, mean, std, control, bounds)
        return mean + self._freedom * (moved - mean), std

    @property
    def networks_of_generation(self) -> int:
        """How many networks a step of a path calls: two where one adds a residual."""
        return 1 + self._has_residual

    @property
    def _has_residual(self) -> bool:
        return isinstance(self.generation, Tied) and self.finest != self.num_steps

    @property
    def _freedom(self) -> float:
        if self.finest is None:
            return 1.0
        if self.finest == self.num_steps:
            return 0.0
        return math.sqrt((self.finest / self.num_steps - 1) / (self.finest - 1))

    def _controlled(self, step: Step, mean, std, control, bounds: Bounds):
        """Adds drift and log-variances of a control to a kernel of the reference."""
        dim = self.dim
        if control.shape not in ((dim,), (2 * dim,)):
            raise ValueError(
                f"network must return [{dim}] or, with log-variances, [{2 * dim}] "
                f"numbers for one point, got {list(control.shape)}"
            )
        mean = mean + std * self._shift(step, control[:dim], bounds)
        if control.shape[-1] > dim:
            log_variance = control[dim:].astype(mean.dtype)
            log_ratio = _within(log_variance, bounds.log_variance)
            std = std * jnp.exp(0.5 * self._freedom * log_ratio)
        return mean, std

    def _shift(self, step: Step, control, bounds: Bounds):
        """In standard deviations of the reference's kernel."""
        shift = control.astype(self._dtype) * step.shift_scale
        return shift if bounds.shift is None else _within(shift, bounds.shift)

    def _of_steps(self, function, params, steps: Step, xs, scores, condition):
        """``function(y, y_next, generation, destruction)`` of steps in a row.

        Both kernels are given by mean and standard deviation.
        """
        ys = self.unit(xs)
        times = jnp.concatenate([steps.time, steps.next_time[-1:]])
        features = jax.vmap(lambda y, t: self._features(params, y, t, condition))
        seen = _Seen(scores, features(ys, times))
        now, later = (jax.tree.map(lambda a, s=s: a[s], (ys, seen)) for s in _ENDS)

        def one(step, now, later):
            (y, seen), (y_next, seen_next) = now, later
            generation = self._generate(params, step, y, seen, condition)
            destruction = self._destroy(params, step, y_next, seen_next, condition)
            return function(y, y_next, generation, destruction)

        return jax.vmap(one)(steps, now, later)

    def _densities(self, y, y_next, generation, destruction) -> Densities:
        """Of one step with these kernels, each a mean and a standard deviation."""
        ratio = _log_variance_ratio(self.dim, generation[1], destruction[1])
        outside = jnp.abs(jax.lax.stop_gradient(ratio)) > math.log(VARIANCE_LIMIT)
        return Densities(
            self._log_density(y_next, *generation),
            self._log_density(y, *destruction),
            jnp.mean(outside.astype(y.dtype)),
        )

    def _log_density(self, y, mean, std):
        """Density in units of x; 0 for the transition into a point mass."""
        safe = jnp.where(std > 0, std, jnp.ones_like(std))
        value = normal_log_prob(y, mean, safe) - self._log_volume
        return jnp.where(jnp.all(std > 0), value, jnp.zeros_like(value))

    def log_prior(self, params: Params, y: Array) -> Array:
        """Log-density of the first state y [D], unit coordinates, in units of x, []."""
        if self.process.point_mass:
            return jnp.zeros((), y.dtype)
        if self.prior is not None:
            return self.prior.log_density(params["prior"], y) - self._log_volume
        return normal_log_prob(y, jnp.zeros_like(y), jnp.ones((), y.dtype)) - (
            self._log_volume
        )

    # -- the loop ---------------------------------------------------------------------

    def _run(
        self,
        params: Params,
        key: Key,
        energy: Energy,
        condition: Array | None,
        *,
        keep: bool = False,
        remat: Callable[..., Any] | None = None,
        extra_std: Array | float = 0.0,
    ) -> _Run:
        """Simulates. Scores are computed once per state and carried on.

        States that are kept are written into the arrays in which they are returned; for
        rematerialisation (a scan in place of `lax.scan`), which would store these
        arrays at every segment, they are put together in the end.
        """
        self._check_condition(condition)
        key, dtype = as_key(key), self._dtype
        energy = self._bind(energy, condition)
        steps = self.steps()
        if self.process.point_mass:
            y = jnp.zeros((self.dim,), dtype)
        else:
            place = jax.random.fold_in(key, self.num_steps)
            if self.prior is None:
                y = standard_normal(place, (self.dim,), dtype)
            else:
                y = self.prior.sample(params["prior"], place)
        extra = jnp.asarray(extra_std, dtype)

        def body(carry, step) -> tuple[Any, Any]:
            y, seen, _, kept = carry
            mean, std = self._generate(params, step, y, seen, condition)
            noise = standard_normal(
                jax.random.fold_in(key, step.index), (self.dim,), dtype
            )
            y_next = mean + jnp.sqrt(std**2 + extra**2) * noise
            value, next_score = self._value_and_score(energy, y_next)
            value, next_score = checkpoint_name((value, next_score), _EVALUATED)
            features = self._features(params, y_next, step.next_time, condition)
            next_seen = _Seen(next_score, features)
            destruction = self._destroy(params, step, y_next, next_seen, condition)
            densities = self._densities(y, y_next, (mean, std), destruction)
            state = (self.original(y_next), value, next_score) if keep else None
            if keep and remat is None:
                kept, state = _put(kept, step.index + 1, state), None
            return (y_next, next_seen, value, kept), (densities, state)

        log_prior = self.log_prior(params, y)
        features = self._features(params, y, steps.time[0], condition)
        value, score = self._value_and_score(energy, y)
        first, kept = (self.original(y), value, score), None
        if keep and remat is None:
            kept = _put(self._empty(first), 0, first)
        carry = (y, _Seen(score, features), value, kept)
        scan = jax.lax.scan if remat is None else remat
        (y, seen, value, kept), (densities, later) = scan(body, carry, steps)
        if not self.needs_score:
            value = energy(self.original(y))
        path = None
        if keep:
            if remat is not None:
                kept = jax.tree.map(
                    lambda a, b: jnp.concatenate([a[None], b]), first, later
                )
            assert kept is not None
            xs, energies, scores = kept
            path = Path(
                xs, value, scores, energies if self.needs_score else energies[:0]
            )
        return _Run(y, seen.score, log_prior, densities, value, path)

    def _empty(self, first):
        """Arrays for as many states as a path has, each like the first."""
        return jax.tree.map(
            lambda a: jnp.zeros((self.num_steps + 1, *a.shape), a.dtype), first
        )

    def _complete(self, xs: Array, energy: Energy, condition) -> Path:
        """Adds energy and scores to given states."""
        energy = self._bind(energy, condition)
        xs = jnp.asarray(xs, self._dtype)
        if not self.needs_score:
            empty = jnp.zeros((self.num_steps + 1, 0), self._dtype)
            return Path(xs, energy(xs[-1]), empty, empty[0])
        ys = self.unit(xs)
        values, scores = jax.vmap(lambda y: self._value_and_score(energy, y))(ys)
        return Path(xs, values[-1], scores, values)

    def _trajectory(self, xs, log_prior, densities: Densities, energy):
        log_weight = _log_weight(energy, log_prior, densities)
        kernels = densities.log_generation, densities.log_destruction
        return Trajectory(xs, xs[-1], log_weight, log_prior, *kernels, energy)

    # -- coordinates and constants ----------------------------------------------------

    @property
    def _dtype(self):
        return jax.dtypes.canonicalize_dtype(float)

    @property
    def _log_volume(self) -> float:
        scale = np.broadcast_to(np.asarray(self.scale, np.float64), (self.dim,))
        return float(np.sum(np.log(scale)))

    def unit(self, x: Array) -> Array:
        """``(x - loc) / scale`` of points [..., D]."""
        loc, scale = (np.asarray(v, x.dtype) for v in (self.loc, self.scale))
        return (x - _row(loc, x)) / _row(scale, x)

    def original(self, y: Array) -> Array:
        """``loc + scale y`` of points [..., D]."""
        loc, scale = (np.asarray(v, y.dtype) for v in (self.loc, self.scale))
        return y * _row(scale, y) + _row(loc, y)

    def steps(self) -> Step:
        """Constants of all steps, [K] each."""
        return self._as_steps(self.process.coefficients(self.num_steps))

    def _as_steps(self, table: Coefficients) -> Step:
        columns = (table.times[:-1], table.times[1:], *table[1:])
        root = np.full(self.num_steps, 1 / math.sqrt(self.num_steps))
        columns = (*columns[:2], root, *columns[2:])
        return Step(
            jnp.arange(self.num_steps), *(jnp.asarray(c, self._dtype) for c in columns)
        )

    def _check_condition(self, condition: Any) -> None:
        expected = (self.condition_dim,) if self.condition_dim else None
        shape = None if condition is None else jnp.shape(condition)
        if shape != expected:
            raise ValueError(
                f"condition must be an array of shape [condition_dim] for a sampler "
                f"with condition_dim > 0, else None; condition_dim={self.condition_dim}"
                f", condition is {None if shape is None else list(shape)}"
            )

    def _bind(self, energy: Callable[..., Array], condition: Any) -> Energy:
        bound = bind_condition(energy, condition)
        check_energy(bound, self.dim, self._dtype)
        return lambda x: jnp.asarray(bound(x), self._dtype)

    def _value_and_score(self, energy: Energy, y: Array, constant: bool = True):
        if not self.needs_score:
            return _nothing(y.dtype)
        return self._score_at(energy, y, constant)

    def _score_at(self, energy: Energy, y: Array, constant: bool = True):
        """Energy, and minus its gradient in unit coordinates; constants by default."""
        x = self.original(y)
        x = jax.lax.stop_gradient(x) if constant else x
        value, gradient = jax.value_and_grad(energy)(x)
        return value, -_row(np.asarray(self.scale, y.dtype), y) * gradient


def _context(step: Step, seen: _Seen, condition) -> Context:
    step_size = step.next_time - step.time
    return Context(seen.score, step.score_gain, condition, seen.features, step_size)


def _nothing(dtype) -> tuple[Array, Array]:
    """In place of an energy and a score that nobody asks for."""
    return jnp.zeros((), dtype), jnp.zeros((0,), dtype)


def _put(arrays, index, values):
    """Each array with its row of that index replaced."""
    return jax.tree.map(
        lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, index, 0), arrays, values
    )


def _log_weight(energy, log_prior, densities: Densities):
    log_ratio = jnp.sum(densities.log_destruction - densities.log_generation)
    return -energy - log_prior + log_ratio


def _log_variance_ratio(dim: int, generation: Array, destruction: Array) -> Array:
    """Of two standard deviations, [D] each, or [] where they are not learned."""
    generation, destruction = (
        jnp.broadcast_to(std, (dim,)) for std in (generation, destruction)
    )
    safe = jnp.where(destruction > 0, destruction, generation)
    return 2 * (jnp.log(generation) - jnp.log(safe))


def _within(value: Array, bound: float) -> Array:
    """The value, saturating smoothly at plus and minus the bound."""
    return bound * jnp.tanh(value / bound)


def _row(value: np.ndarray, like: Array):
    """A number or D numbers, shaped to broadcast against [..., D] without promotion."""
    return value if value.ndim == 0 else value.reshape((1,) * (like.ndim - 1) + (-1,))


def _numbers(name: str, value: Any, dim: int) -> float | tuple[float, ...]:
    array = np.asarray(value, np.float64)
    if array.ndim == 0:
        return float(array)
    if array.shape != (dim,):
        raise ValueError(
            f"{name} must be a number or {dim} numbers, got shape {list(array.shape)}"
        )
    return tuple(float(v) for v in array)


def _step_scan(body, carry, xs):
    """`lax.scan` whose backward pass stores K carries and recomputes every step.

    Energies and scores are kept.
    """
    keep = jax.checkpoint_policies.save_only_these_names(_EVALUATED)
    step = jax.checkpoint(body, prevent_cse=False, policy=keep)
    return jax.lax.scan(step, carry, xs)


def _sqrt_scan(body, carry, xs):
    """`lax.scan` whose backward pass stores O(sqrt(K)) carries.

    An outer scan over segments keeps one carry each; a segment is recomputed, and then
    each of its steps, when its gradient is needed. Energies and scores are kept.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    inner = max(1, int(math.sqrt(length)))
    outer, rest = divmod(length, inner)

    def segment(carry, xs):
        return _step_scan(body, carry, xs)

    def split(x):
        return x[: outer * inner].reshape((outer, inner) + x.shape[1:])

    carry, head = _step_scan(segment, carry, jax.tree.map(split, xs))
    head = jax.tree.map(lambda x: x.reshape((outer * inner,) + x.shape[2:]), head)
    if not rest:
        return carry, head
    carry, tail = segment(carry, jax.tree.map(lambda x: x[outer * inner :], xs))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), head, tail)


def _widened(std, log_variance):
    if isinstance(log_variance, float) and log_variance == 0.0:
        return std
    return std * jnp.exp(0.5 * log_variance)


@functools.lru_cache(maxsize=256)
def _shapes_of_params(sampler: Sampler) -> Any:
    params = jax.eval_shape(sampler.init, jax.random.key(0))
    return jax.tree.map(jnp.shape, params)
