"""Model in, weighted posterior and evidence out.

What `DiffusionSampler` does by default, each step a function of its own elsewhere:

1. `pilots.find`: tempered SMC, from the prior where there is one.
2. `affine_from`: its mean and covariance give coordinates in which the posterior is
   about a unit normal, so that one network and one noise schedule fit all models.
3. Training of a `samplers.dis` with learned generation variance and a network that is
   shown no score, in rounds: first by `objectives.forward_kl` on paths traced back from
   the pilot's points, then by `objectives.log_variance` on these and its own paths. An
   update so costs one energy per path, and no gradient. The noise ends at the width of
   the narrowest mode (`pilots.smallest_scale`).
4. After each stage: draws, weights, and the verdict with an independent probe (a second
   pilot); ``trust`` also asks that the draws know means and variances well
   (`agreement.imprecision`) and that the pilots agree (`agreement.disagreement`). It
   says whether to go on; at the end the best state so judged is kept.
5. `DiffusionSampler.run` draws until means and variances are known well, or enough is
   enough.

The pilot only proposes; draws and log Z are those of the sampler's exact weights.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from numpyro.infer import init_to_uniform

from diffsamp import (
    behaviours,
    drawing,
    networks,
    objectives,
    probes,
    samplers,
    schedules,
    training,
)
from diffsamp.diagnostics import PARETO_K_LIMIT, Diagnostics
from diffsamp.drawing import Draws
from diffsamp.energies import as_key
from diffsamp.numpyro import pilots
from diffsamp.numpyro.affine import affine_from
from diffsamp.numpyro.agreement import (
    PRECISE,
    Imprecision,
    disagreement,
    imprecision,
)
from diffsamp.numpyro.arviz import to_arviz
from diffsamp.numpyro.kernel import DiffusionKernel
from diffsamp.numpyro.target import ModelTarget, target_from_model
from diffsamp.sampler import Bounds, Sampler
from diffsamp.summary import summary as table
from diffsamp.summary import verdict_lines
from diffsamp.types import (
    Behaviour,
    Cost,
    Key,
    LogEvidence,
    Objective,
    Params,
    as_count,
)

# Shares of the budget, and of each the share for the stage by forward KL.
ROUNDS = ((0.15, 0.5), (0.3, 0.6), (0.55, 0.7))
ENOUGH_ESS = 0.3  # a trusted result below this goes on training while it may
JUDGED_DRAWS = 10_000
MOST_DRAWS = 100_000  # for the sake of precision; more where more are asked for
ENOUGH_PRECISION = 0.6  # of the standard errors allowed
IMITATED, BALANCED = 128, 256  # paths per update in the two stages


class Trained(NamedTuple):
    """Everything that was found out about one posterior.

    Attributes:
        target: the posterior, in the affine coordinates in which the sampler works.
        pilot: the points that it was trained on, in these coordinates.
        probe: independent points.
        sampler: the sampler.
        params: its parameters.
        fit: result of the last training call.
        cost: evaluations of pilots, training and judging so far.
        seconds: wall time so far.
    """

    target: ModelTarget
    pilot: pilots.Pilot
    probe: probes.Probe
    sampler: Sampler
    params: Params
    fit: training.FitResult | None
    cost: Cost
    seconds: float


def default_sampler(
    dim: int, num_steps: int, *, smallest_scale: float = 0.05, **reference: Any
) -> Sampler:
    """The sampler of `DiffusionSampler`: DIS with learned generation variance.

    Args:
        dim: dimension D.
        num_steps: steps K.
        smallest_scale: of `schedules.geometric`.
        **reference: ``loc`` and ``scale``, where they are not 0 and 1.
    """
    return samplers.dis(
        dim,
        num_steps,
        schedule=schedules.geometric(smallest_scale),
        network=networks.free(learn_variance=True),
        generation_bounds=Bounds(log_variance=2.0),
        **reference,
    )


class DiffusionSampler:
    """Trains a diffusion sampler on a NumPyro model, draws from it, and says how well.

    Built like NumPyro's ``NestedSampler``, with the samples of its ``MCMC``.

    Args:
        model: a NumPyro model.
        sampler: ``(dim, num_steps) -> Sampler``, such as ``ds.samplers.dds``, for a
            posterior that is about a unit normal; by default `default_sampler`.
        objective: of the second stage of training; `objectives.log_variance` by
            default.
        behaviour: of that stage; by default half own paths, half paths into the
            pilot's points.
        optimizer: of both stages; by default Adam at 0.002, and 0.001 in the second.
        num_steps: steps K of the sampler.
        num_particles: of each of the two pilots.
        max_seconds: budget of training, without pilots and compilation.
        max_energy_evaluations: budget of energies and gradients of training, or None.
        init_strategy: as in NumPyro.
        mesh: devices to spread the rows of batches and the draws over, or None.

    Attributes:
        state: what was trained so far, a `Trained`, or None.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from diffsamp.numpyro import DiffusionSampler
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
        >>> inference = DiffusionSampler(
        ...     model, num_steps=4, num_particles=64, max_seconds=0.1
        ... )
        >>> inference.run(jax.random.key(0), 100, y=jnp.array([0.5, 1.0]))
        >>> inference.get_samples()["mean"].shape
        (100,)
    """

    num_chains = 1  # these four are what ArviZ 0.x reads
    thinning = 1

    def __init__(
        self,
        model: Callable,
        *,
        sampler: Callable[..., Sampler] | None = None,
        objective: Objective | None = None,
        behaviour: Behaviour | None = None,
        optimizer: optax.GradientTransformation | None = None,
        num_steps: int = 32,
        num_particles: int = 2_048,
        max_seconds: float = 240.0,
        max_energy_evaluations: int | None = None,
        init_strategy: Callable = init_to_uniform,
        mesh: Mesh | None = None,
    ):
        if not callable(model):
            raise ValueError(f"model must be a NumPyro model, got {type(model)}")
        if not max_seconds > 0:
            raise ValueError(f"max_seconds must be positive, got {max_seconds}")
        self.model = model
        self.state: Trained | None = None
        self._make_sampler = sampler
        self._objective = objective or objectives.log_variance()
        self._behaviour = behaviour
        self._optimizer = optimizer
        self._num_steps = num_steps
        self._num_particles = num_particles
        self._max_seconds = max_seconds
        if max_energy_evaluations is not None:
            as_count("max_energy_evaluations", max_energy_evaluations)
        self._max_energy_evaluations = max_energy_evaluations
        self._init_strategy = init_strategy
        self._mesh = mesh
        self._args: tuple = ()
        self._kwargs: dict[str, Any] = {}
        self._draws: Draws | None = None
        self._index: np.ndarray | None = None

    # -- training and drawing ---------------------------------------------------------

    def fit(
        self,
        key: Key,
        num_updates: int | None = None,
        *args: Any,
        state: Trained | None = None,
        callback: Callable | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> Trained:
        """Trains; again with ``state=inference.state`` to go on.

        Args:
            key: random key; consumed.
            num_updates: updates to do, half of them by forward KL where training
                starts; None to train in rounds until the verdict is ``trust`` or the
                budget is spent.
            *args: arguments of the model.
            state: what to go on from.
            callback: as in `diffsamp.fit`; a true return value ends training.
            progress_bar: whether to show one.
            **kwargs: keyword arguments of the model.

        Returns:
            The new `state`. Ctrl-C ends training and keeps what there is.

        Raises:
            ValueError: when no points of the posterior are found; see also
                `target_from_model`.
        """
        begin = time.perf_counter()
        for_target, for_pilots, for_training, for_judging = jax.random.split(
            as_key(key), 4
        )
        self._remember(args, kwargs)
        if state is None:
            state = self._prepare(for_target, for_pilots)
        seconds, energy = state.seconds, state.target.energy
        options = {"callback": callback, "progress_bar": progress_bar}
        best = None
        for i, (stage, budget) in enumerate(self._stages(state, num_updates)):
            left = self._energies_left(state)
            if left is not None and left < 1:
                break
            fit = training.fit(
                jax.random.fold_in(for_training, i),
                state.sampler,
                stage.objective,
                energy,
                behaviour=stage.behaviour,
                optimizer=stage.optimizer,
                anneal=schedules.cosine_anneal,
                ema_decay=0.998,
                batch_size=stage.batch_size,
                params=state.params,
                max_energy_evaluations=left,
                mesh=self._mesh,
                **budget,
                **options,
            )
            state = state._replace(
                params=fit.params,
                fit=fit,
                cost=_add(state.cost, fit),
                seconds=seconds + time.perf_counter() - begin,
            )
            self.state, self._draws = state, None
            ended = fit.stopped_by in ("interrupt", "callback")
            if num_updates is None:
                judging = jax.random.fold_in(for_judging, i)
                report = self._draw(judging, JUDGED_DRAWS).diagnostics
                state = state._replace(cost=_add(state.cost, report))
                grade = _grade(report)
                if best is None or grade >= best[0]:
                    best = grade, state.params
                ended |= grade.is_trusted and grade.ess_fraction >= ENOUGH_ESS
            if ended:
                break
        if best is not None:
            state = state._replace(params=best[1])
        seconds += time.perf_counter() - begin
        self.state = state._replace(seconds=seconds)
        return self.state

    def run(
        self,
        key: Key,
        num_samples: int,
        *args: Any,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> None:
        """Trains if that is yet to be done for these data, draws and weighs.

        Args:
            key: random key; consumed.
            num_samples: equally weighted draws that `get_samples` is to return.
            *args: arguments of the model.
            progress_bar: whether to show one.
            **kwargs: keyword arguments of the model.

        Raises:
            ValueError: when num_samples is below 1; see also `fit`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        for_training, for_draws, for_picks = jax.random.split(as_key(key), 3)
        if self.state is None or not self._is_trained_on(args, kwargs):
            self.fit(for_training, None, *args, progress_bar=progress_bar, **kwargs)
        state = self._trained()
        pilot, rest = jax.random.split(for_draws)
        report = self._draw(pilot, min(num_samples, JUDGED_DRAWS)).diagnostics
        share = max(report.ess_fraction, 0.1)
        num_draws = int(np.ceil(num_samples / share))  # so that few are drawn twice
        most = max(num_draws, MOST_DRAWS)
        while True:
            state = state._replace(cost=_add(state.cost, report))
            self.state, draws = state, self._draw(rest, num_draws)
            report = draws.diagnostics
            if not _grade(report).has_error_bar:
                break  # more draws are no help
            excess = _least_known(state, draws).excess / ENOUGH_PRECISION
            wanted = min(1.1 * num_draws * excess**2, most)
            if excess <= 1 or num_draws >= wanted:
                break
            num_draws = int(wanted)
        self._draws = draws
        rows = self._draws._replace(x=np.arange(num_draws)[:, None])
        try:
            self._index = rows.resample(for_picks, num_samples)[:, 0]
        except ValueError:  # no weight is positive: the verdict says so
            self._index = np.arange(num_samples)

    def kernel(self, **options: Any) -> DiffusionKernel:
        """A kernel for ``MCMC`` with the trained sampler as its global move.

        Args:
            **options: of `DiffusionKernel`: ``num_proposals``, ``local_kernel``.

        Raises:
            RuntimeError: before training.
        """
        state = self._trained()
        return DiffusionKernel(
            state.sampler,
            state.params,
            self.model,
            affine=state.target.affine,
            init_strategy=self._init_strategy,
            **options,
        )

    # -- results ----------------------------------------------------------------------

    @property
    def sampler(self) -> DiffusionSampler:
        """Itself, whose ``model`` ArviZ 0.x asks for."""
        return self

    @property
    def num_samples(self) -> int:
        """Number of equally weighted draws."""
        self._drawn()
        assert self._index is not None
        return len(self._index)

    @property
    def draws(self) -> Draws:
        """All draws, in the coordinates of ``state.target``, with their weights.

        Raises:
            RuntimeError: before `run`.
        """
        return self._drawn()

    def get_samples(self, group_by_chain: bool = False) -> dict[str, jax.Array]:
        """Equally weighted draws, resampled, with deterministic sites.

        Args:
            group_by_chain: whether to have a leading axis of one chain, as in ``MCMC``.

        Returns:
            Site to [num_samples, ...], or [1, num_samples, ...].

        Raises:
            RuntimeError: before `run`.
        """
        x = self._drawn().x[self._index]
        sites = self._constrained(x)
        if group_by_chain:
            sites = jax.tree.map(lambda a: a[None], sites)
        return sites

    def get_weighted_samples(self) -> tuple[dict[str, jax.Array], np.ndarray]:
        """All draws and their normalised log-weights.

        Returns:
            Site to [N, ...] and [N]; N is larger than ``num_samples`` where the weights
            differ much.

        Raises:
            RuntimeError: before `run`.
        """
        draws = self._drawn()
        log_weight = np.asarray(jax.nn.log_softmax(jnp.asarray(draws.log_weight)))
        return self._constrained(draws.x), log_weight

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """``potential_energy`` and ``log_weight`` of the draws of `get_samples`.

        Args:
            group_by_chain: whether to have a leading axis of one chain.

        Raises:
            RuntimeError: before `run`.
        """
        draws, affine = self._drawn(), self._trained().target.affine
        assert draws.log_weight is not None
        assert affine is not None
        fields = {
            "potential_energy": draws.energy + float(affine.log_det),
            "log_weight": draws.log_weight,
        }
        fields = {name: values[self._index] for name, values in fields.items()}
        if group_by_chain:
            fields = {name: values[None] for name, values in fields.items()}
        return fields

    @property
    def log_evidence(self) -> LogEvidence:
        """Log Z with error and bounds; NaN, and a warning, for an improper prior."""
        found, target = self._drawn().log_evidence, self._trained().target
        if target.is_proper:
            return found
        warnings.warn(
            "the model has no evidence: the priors of "
            f"{', '.join(target.improper_sites)} are improper",
            UserWarning,
            stacklevel=2,
        )
        return _NO_EVIDENCE

    @property
    def diagnostics(self) -> Diagnostics:
        """ESS, k-hat, verdict, and all evaluations, of pilots and training too."""
        report, cost = self._drawn().diagnostics, self._trained().cost
        counts = {}
        for kind in ("energy", "gradient", "network"):
            name = f"num_{kind}_evaluations"
            counts[name] = int(getattr(cost, kind)) + (getattr(report, name) or 0)
        return report._replace(**counts)

    def to_arviz(self, **options: Any) -> Any:
        """The draws of `get_samples` for ArviZ; see `diffsamp.numpyro.to_arviz`."""
        return to_arviz(self, **options)

    def print_summary(self, prob: float = 0.9) -> None:
        """Prints the table, the evidence and the verdict.

        Args:
            prob: probability of the central interval.

        Raises:
            RuntimeError: before `run`.
        """
        draws, target = self._drawn(), self._trained().target
        sites, _ = self.get_weighted_samples()
        latent = {name: sites[name] for name in target.site_names}
        print(table(latent, draws.log_weight, prob=prob))
        if not target.is_proper:
            draws = draws._replace(log_evidence=_NO_EVIDENCE)
        print()
        print(verdict_lines(draws))

    # -- inside -----------------------------------------------------------------------

    def _trained(self) -> Trained:
        if self.state is None:
            raise RuntimeError(
                "nothing is trained yet; call run(key, num_samples, ...)"
            )
        return self.state

    def _drawn(self) -> Draws:
        if self._draws is None:
            raise RuntimeError("nothing is drawn yet; call run(key, num_samples, ...)")
        return self._draws

    def _remember(self, args, kwargs) -> None:
        self._args, self._kwargs, self._draws = args, kwargs, None

    def _is_trained_on(self, args, kwargs) -> bool:
        old, old_tree = jax.tree.flatten((self._args, self._kwargs))
        new, new_tree = jax.tree.flatten((args, kwargs))
        same = old_tree == new_tree and len(old) == len(new)
        return same and all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))

    def _target(self, key) -> ModelTarget:
        """That of the data before with new values, where that is all that differs."""
        if self.state is not None:
            try:
                found = self.state.target.with_data(*self._args, **self._kwargs)
            except ValueError:
                pass  # data of another size, or other static arguments
            else:  # which has its compiled code
                return found.standardised(None)
        return target_from_model(
            self.model,
            self._args,
            self._kwargs,
            key=key,
            init_strategy=self._init_strategy,
        )

    def _prepare(self, for_target, key) -> Trained:
        begin = time.perf_counter()
        target = self._target(for_target)
        first, second, for_params = jax.random.split(key, 3)
        found = [
            pilots.find(k, target, num_particles=self._num_particles)
            for k in (first, second)
        ]
        affine = affine_from(found[0].x)
        pilot, other = (p._replace(x=pilots.to_y(affine, p.x)) for p in found)
        make = self._make_sampler
        if make is None:
            smallest = min(pilots.smallest_scale(pilot.x), 0.05)
            make = functools.partial(default_sampler, smallest_scale=smallest)
        sampler = make(target.dim, self._num_steps)
        return Trained(
            target=target.standardised(affine),
            pilot=pilot,
            probe=probes.Probe(x=other.x, name=other.name),
            sampler=sampler,
            params=sampler.init(for_params),
            fit=None,
            cost=_add(_add(Cost(0, 0), found[0]), found[1]),
            seconds=time.perf_counter() - begin,
        )

    def _stages(self, state: Trained, num_updates: int | None):
        """``(stage, budget)``, one after the other."""
        seeded = behaviours.reference_draws(state.pilot.x)
        both = self._behaviour or behaviours.mixture(
            (behaviours.on_policy(), 0.5), (seeded, 0.5)
        )
        imitate = _Stage(
            objectives.forward_kl(), seeded, self._optimizer or _FAST, IMITATED
        )
        balance = _Stage(self._objective, both, self._optimizer or _SLOW, BALANCED)
        if num_updates is not None:
            half = num_updates // 2 if state.fit is None else 0
            if half:
                yield imitate, {"num_updates": half}
            yield balance, {"num_updates": num_updates - half}
            return
        for share, imitated in ROUNDS:
            seconds = share * self._max_seconds
            yield imitate, {"max_seconds": imitated * seconds}
            yield balance, {"max_seconds": (1 - imitated) * seconds}

    def _energies_left(self, state: Trained) -> int | None:
        if self._max_energy_evaluations is None:
            return None
        spent = int(state.cost.energy) + int(state.cost.gradient)
        return self._max_energy_evaluations - spent

    def _draw(self, key, num_draws) -> Draws:
        state = self._trained()
        draws = drawing.draw(
            key,
            state.sampler,
            state.params,
            state.target.energy,
            num_draws,
            probe=state.probe,
            mesh=self._mesh,
        )
        verdict = draws.diagnostics.verdict
        if not verdict.startswith("trust"):
            return draws
        report = draws.diagnostics._replace(verdict=_checked(verdict, state, draws))
        return draws._replace(diagnostics=report)

    def _constrained(self, y) -> dict[str, jax.Array]:
        return _constrain_all(self._trained().target.constrain, jnp.asarray(y))


def _checked(verdict: str, state: Trained, draws: Draws) -> str:
    """The verdict, unless the draws know too little or the two pilots disagree."""
    affine = state.target.affine
    assert affine is not None
    assert draws.log_weight is not None
    plain = state.target.standardised(None)
    assert plain.unravel is not None
    index = plain.unravel(jnp.arange(plain.dim, dtype=jnp.result_type(float)))

    def site_of(coordinate):
        return next(s for s, i in index.items() if coordinate in np.asarray(i))

    unit = {"mean": "standard deviation", "variance": "value"}
    least = _least_known(state, draws)
    if least.excess > 1:
        return (
            f"reweight (the {least.what} of {site_of(least.coordinate)!r}, "
            f"unconstrained, has a standard error of {least.error:.2g} of its "
            f"{unit[least.what]}, more than {PRECISE[least.what]}: a few draws decide "
            "about it; train longer, or draw more)"
        )
    points = (jnp.asarray(v) for v in (draws.x, state.pilot.x, state.probe.x))
    x, first, second = (pilots.to_x(affine, v) for v in points)
    found = disagreement(x, draws.log_weight, first, second)
    if found is None:
        return verdict
    site = site_of(found.coordinate)
    return (
        f"reweight (draws and pilots disagree about the {found.what} of {site!r}, "
        f"unconstrained, by {found.size:.2g} of its "
        f"{unit[found.what]}, {found.z:.1f} standard errors: one of them lacks a part "
        "of the posterior; train longer, or give the pilots more particles)"
    )


def _least_known(state: Trained, draws: Draws) -> Imprecision:
    """The mean or variance of an unconstrained coordinate that draws know least."""
    affine = state.target.affine
    assert affine is not None
    assert draws.log_weight is not None
    return imprecision(pilots.to_x(affine, jnp.asarray(draws.x)), draws.log_weight)


class _Grade(NamedTuple):
    """What makes one state better than another, most important first."""

    is_trusted: bool
    has_error_bar: bool
    ess_fraction: float


def _grade(report: Diagnostics) -> _Grade:
    good = report.pareto_k < PARETO_K_LIMIT and not report.collapsed
    return _Grade(report.verdict.startswith("trust"), good, report.ess_fraction)


class _Stage(NamedTuple):
    objective: Objective
    behaviour: Behaviour
    optimizer: optax.GradientTransformation
    batch_size: int


_FAST, _SLOW = optax.adam(2e-3), optax.adam(1e-3)
_NO_EVIDENCE = LogEvidence(np.nan, np.inf, np.nan, None)


@jax.jit
def _constrain_all(constrain, y):
    return jax.vmap(constrain)(y)


def _add(cost: Cost, result: Any) -> Cost:
    """The cost and the counts of a result."""
    counts = [
        int(getattr(result, f"num_{kind}_evaluations", 0) or 0)
        for kind in ("energy", "gradient", "network")
    ]
    return Cost(*(int(a) + b for a, b in zip(cost, counts, strict=True)))
