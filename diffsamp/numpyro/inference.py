"""Model in, weighted posterior and evidence out.

What `DiffusionSampler` does by default, each step a function of its own elsewhere:

1. `pilots.find`: tempered SMC, from the prior where there is one.
2. `fitted`: its points give coordinates in which the posterior is about a unit normal,
   without funnels of the model's own making, correlations and heavy tails, so that one
   network and one noise schedule fit all models; or, where it has several modes, a
   Gaussian mixture. Where there was a funnel, in whose neck SMC moves badly, SMC runs
   again in these coordinates, and where there are several modes, each of which few
   points know, with more particles, which then move on within their modes
   (`pilots.moved`).
3. Training in rounds (`recipe.stages`) of a sampler (`recipe.default_sampler`) whose
   noise ends at the width of the narrow places (`pilots.smallest_scale`), and which
   starts from the mixture where there is one.
4. After each stage: draws, weights, and the verdict with an independent probe (another
   pilot) and what else ``trust`` asks for (`verdicts.checked`). It says whether to go
   on; at the end the best state so judged is kept.
5. `DiffusionSampler.run` draws until means and variances are known well, or enough is
   enough.

The pilot only proposes; draws and log Z are those of the sampler's exact weights.
"""

from __future__ import annotations

import math
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

from diffsamp import drawing, metrics, mixtures, probes, schedules, training
from diffsamp.diagnostics import PARETO_K_LIMIT, Diagnostics
from diffsamp.drawing import Draws
from diffsamp.energies import as_key
from diffsamp.numpyro import pilots, recipe
from diffsamp.numpyro.arviz import to_arviz
from diffsamp.numpyro.coordinates import log_dets_of, to_x, to_y
from diffsamp.numpyro.fitted import (
    Fitted,
    fitted,
    fitted_coordinates,
    is_decentred,
    widened,
)
from diffsamp.numpyro.kernel import DiffusionKernel
from diffsamp.numpyro.quantities import constrained
from diffsamp.numpyro.target import ModelTarget, target_from_model
from diffsamp.numpyro.verdicts import checked, least_known
from diffsamp.sampler import Sampler
from diffsamp.summary import summary as table
from diffsamp.summary import verdict_lines
from diffsamp.types import (
    Array,
    Behaviour,
    Cost,
    Key,
    LogEvidence,
    Objective,
    Params,
    as_count,
    total_cost,
)

ENOUGH_ESS = 0.3  # a trusted result below this goes on training while it may
JUDGED_DRAWS = 10_000
LEAST_JUDGED = 100  # who asks for fewer is not told that they can be trusted
MOST_DRAWS = 250_000  # for the sake of precision; more where more are asked for
MOST_NUMBERS = 25_000_000  # coordinates of all of these, for the sake of memory
ENOUGH_PRECISION = 0.75  # of the standard errors allowed
HOPELESS_K = 0.85  # k-hat of which more draws will not make one below the limit
MORE_PARTICLES = 4  # times as many in pilots of a posterior of several modes


class Trained(NamedTuple):
    """Everything that was found out about one posterior.

    Attributes:
        target: the posterior, in the coordinates in which the sampler works.
        pilot: points of it, in these coordinates.
        points: those that the sampler is trained on, and its mixture is fitted to: the
            pilot's, and where there is a mixture where HMC moves them, too.
        probe: independent points, or None where Ctrl-C or an error prevented them.
        sampler: the sampler.
        params: its parameters.
        fit: result of the last training call.
        cost: evaluations of pilots, training and judging so far.
        seconds: wall time so far.
        data: arguments and keyword arguments of the model.
    """

    target: ModelTarget
    pilot: pilots.Pilot
    points: Array
    probe: probes.Probe | None
    sampler: Sampler
    params: Params
    fit: training.FitResult | None
    cost: Cost
    seconds: float
    data: tuple


class DiffusionSampler:
    """Trains a diffusion sampler on a NumPyro model, draws from it, and says how well.

    Built like NumPyro's ``NestedSampler``, with the samples of its ``MCMC``.

    Args:
        model: a NumPyro model.
        sampler: ``(dim, num_steps) -> Sampler``, such as ``ds.samplers.dds``, for a
            posterior that is about a unit normal; by default
            `recipe.default_sampler`.
        objective: of the second stage of training; `objectives.log_variance` by
            default.
        behaviour: of that stage; by default half own paths, half paths into the
            pilot's points.
        optimizer: of both stages; by default Adam at 0.002, and 0.001 in the second.
        num_steps: steps K of the sampler; half as many where the posterior has several
            modes, and it starts from a mixture of them.
        num_particles: of each of the pilots; four times as many where the first one
            says that the posterior has several modes, and there is a prior to temper
            from, a budget for it and no ``sampler``.
        max_seconds: budget of training, without pilots and compilation.
        max_energy_evaluations: budget of energies and gradients of pilots, training and
            judging, or None. Pilots and the last judging are not cut short, and draws
            come on top.
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
        self._objective = objective
        self._behaviour = behaviour
        self._optimizer = optimizer
        self._num_steps = as_count("num_steps", num_steps)
        self._num_particles = as_count("num_particles", num_particles, least=2)
        self._max_seconds = max_seconds
        if max_energy_evaluations is not None:
            as_count("max_energy_evaluations", max_energy_evaluations)
        for name, given, kind, where in (
            ("objective", objective, Objective, "ds.objectives"),
            ("behaviour", behaviour, Behaviour, "ds.behaviours"),
            ("optimizer", optimizer, optax.GradientTransformation, "optax"),
        ):
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{name} must be one of {where}, got {given!r}")
        self._max_energy_evaluations = max_energy_evaluations
        self._init_strategy = init_strategy
        self._mesh = mesh
        self._draws: Draws | None = None
        self._discarded = Cost(0, 0)
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
            state: what to go on from; with the data that it was trained on, or none.
            callback: as in `diffsamp.fit`; a true return value ends training.
            progress_bar: whether to show one.
            **kwargs: keyword arguments of the model.

        Returns:
            The new `state`. Ctrl-C ends training and keeps the best state so far, and
            so does training that diverges, with a warning, once a state was judged;
            within the pilots Ctrl-C works when the one that runs has ended.

        Raises:
            ValueError: when no points of the posterior are found, or state is of other
                data; see also `target_from_model`.
            TrainingDiverged: when training diverges before a state was judged.
        """
        if num_updates is not None:
            as_count("num_updates", num_updates)
        for_target, for_pilots, for_training, for_judging = jax.random.split(
            as_key(key), 4
        )
        if state is None:
            state = self._prepare(for_target, for_pilots, args, kwargs)
        elif (args or kwargs) and not _are_same(state.data, (args, kwargs)):
            raise ValueError(
                "state was trained on other data than those given; leave state out to "
                "train on these (data of the same shape use the compiled code again)"
            )
        self.state, self._draws = state, None
        is_over = state.probe is None and self._find_probe(for_pilots)
        best, is_half, judged = None, False, num_updates is None
        at_start = self._energies_left(self.state)
        options = {"callback": callback, "progress_bar": progress_bar}
        try:
            known = state.fit is not None or state.sampler.prior is not None
            can_judge = judged and not is_over and (at_start is None or at_start > 0)
            if known and can_judge:
                best = _grade(self._judge(for_judging)), state.params
            for i, (stage, budget) in enumerate(self._stages(state, num_updates)):
                left = self._energies_left(self.state)
                if left is not None and left < 1:
                    self._warn_if_untrained(left)
                    break
                if is_over:
                    break
                if left is not None and at_start is not None and judged:
                    left = min(left, math.ceil(stage.share * at_start))
                begin = time.perf_counter()
                training_key = jax.random.fold_in(for_training, i)
                is_over = self._train(training_key, stage, left, budget | options)
                if judged and not is_over:
                    grade = _grade(self._judge(jax.random.fold_in(for_judging, i)))
                    # Half a round, by forward KL alone, leaves light tails at times.
                    is_round = grade.is_trusted and is_half and state.fit is None
                    is_half = (best is None or grade >= best[0]) and not i
                    if best is None or grade >= best[0] or is_round:
                        best = grade, self.state.params
                    is_over = grade.is_trusted and i > 0
                    is_over &= grade.ess_fraction >= ENOUGH_ESS
                seconds = self.state.seconds + time.perf_counter() - begin
                self.state = self.state._replace(seconds=seconds)
        except KeyboardInterrupt:
            pass
        except training.TrainingDiverged as error:
            trained = getattr(error, "fit_result", None)
            self.state = _with_cost(self.state, trained)
            if best is None:
                raise
            warnings.warn(
                f"training diverged, and the best state before is kept: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        finally:
            if best is not None:
                self.state = self.state._replace(params=best[1])
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
            ValueError: when num_samples is below 1, or data are left out with which it
                was trained; see also `fit`.
        """
        as_count("num_samples", num_samples)
        if self.state is not None and not (args or kwargs) and any(self.state.data):
            raise ValueError(
                "run needs the data again that the sampler was trained with, as MCMC "
                "does; without data it would be another posterior, for which make a "
                "new DiffusionSampler"
            )
        for_training, for_draws, for_picks = jax.random.split(as_key(key), 3)
        state = self.state
        if state is None or not _are_same(state.data, (args, kwargs)):
            self.fit(for_training, None, *args, progress_bar=progress_bar, **kwargs)
        elif state.fit is None:  # Ctrl-C, or the budget, came before training
            self.fit(for_training, None, state=state, progress_bar=progress_bar)
        num_draws, drawn, enough = num_samples, None, None
        discarded = Cost(0, 0)
        if num_samples >= LEAST_JUDGED:
            num_draws = max(num_samples, JUDGED_DRAWS)
        try:
            while True:
                before, drawn = drawn, self._draw(for_draws, num_draws)
                if before is not None:
                    discarded = _add(discarded, before.diagnostics)
                if enough is None:  # so that few are drawn twice
                    enough = num_samples / max(drawn.diagnostics.ess_fraction, 0.1)
                most = min(MOST_DRAWS, MOST_NUMBERS // drawn.x.shape[1])
                wanted = min(self._wanted(drawn), max(enough, most))
                if num_draws >= max(wanted, enough):
                    break
                num_draws = math.ceil(max(wanted, enough))
        except KeyboardInterrupt:
            if drawn is None:
                raise
        assert drawn is not None
        self._draws, num_draws = drawn, len(drawn.x)
        self._discarded = discarded
        rows = drawn._replace(x=np.arange(num_draws)[:, None])
        try:
            self._index = rows.resample(for_picks, num_samples)[:, 0]
        except ValueError:  # no weight is positive: the verdict says so
            self._index = np.arange(num_samples)

    def kernel(self, **options: Any) -> DiffusionKernel:
        """A kernel for ``MCMC`` with the trained sampler as its global move.

        Its chains start from points of the probe, by preference from one where the
        sampler has too little, so that they disagree where it lacks something. Once
        `run` has said ``trust`` they start from its own draws.

        Args:
            **options: of `DiffusionKernel`: ``num_proposals``, ``local_kernel``.

        Raises:
            RuntimeError: before training.
        """
        state = self._trained()
        coordinates, starts = state.target.coordinates, None
        assert coordinates is not None
        drawn = self._draws
        if drawn is None or not drawn.diagnostics.verdict.startswith("trust"):
            starts = to_x(coordinates, (state.probe or state.pilot).x)
        return DiffusionKernel(
            state.sampler,
            state.params,
            self.model,
            coordinates=coordinates,
            starts=starts,
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
        sites = constrained(self._trained().target, x)
        return {
            name: jnp.asarray(v[None] if group_by_chain else v)
            for name, v in sites.items()
        }

    def get_weighted_samples(self) -> tuple[dict[str, jax.Array], np.ndarray]:
        """All draws and their normalised log-weights.

        Returns:
            Site to [N, ...] and [N]; N is larger than ``num_samples`` where the weights
            differ much.

        Raises:
            RuntimeError: before `run`.
            ValueError: when no weight is positive, or one is infinite.
        """
        draws = self._drawn()
        assert draws.log_weight is not None
        with np.errstate(divide="ignore"):  # of weights that are zero
            log_weight = np.log(metrics.normalised_weights(draws.log_weight))
        sites = constrained(self._trained().target, draws.x)
        return {name: jnp.asarray(v) for name, v in sites.items()}, log_weight

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """``potential_energy``, ``log_weight``, ``energy_evals`` of `get_samples`.

        The last are energies, with gradient or without, that a draw took.

        Args:
            group_by_chain: whether to have a leading axis of one chain.

        Raises:
            RuntimeError: before `run`.
        """
        draws, state = self._drawn(), self._trained()
        coordinates = state.target.coordinates
        assert draws.log_weight is not None
        assert coordinates is not None
        price = state.sampler.evaluations_per_path
        log_det = log_dets_of(coordinates, draws.x[self._index])
        fields = {
            "potential_energy": draws.energy[self._index] + np.asarray(log_det),
            "log_weight": draws.log_weight[self._index],
            "energy_evals": np.full(self.num_samples, price.energy + price.gradient),
        }
        if group_by_chain:
            fields = {name: values[None] for name, values in fields.items()}
        return fields

    @property
    def log_evidence(self) -> LogEvidence:
        """Log Z with error and bounds; NaN, and a warning, for an improper prior."""
        found, target = self._drawn().log_evidence, self._trained().target
        if target.is_proper:
            return found
        warnings.warn(_why_no_evidence(target), UserWarning, stacklevel=2)
        return _NO_EVIDENCE

    @property
    def diagnostics(self) -> Diagnostics:
        """ESS, k-hat, verdict, and all evaluations, of pilots and training too."""
        report, counts = self._drawn().diagnostics, {}
        cost = total_cost([self._trained().cost, self._discarded])
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
        if not target.is_proper:
            print(_why_no_evidence(target))

    # -- inside -----------------------------------------------------------------------

    @property
    def _args(self) -> tuple:  # these two are what ArviZ reads, too
        return self._trained().data[0]

    @property
    def _kwargs(self) -> dict[str, Any]:
        return self._trained().data[1]

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

    def _target(self, key, args, kwargs) -> ModelTarget:
        """That of the data before with new values, where that is all that differs."""
        if self.state is not None:
            try:
                found = self.state.target.with_data(*args, **kwargs)
            except ValueError:
                pass  # data of another size, or other static arguments
            else:  # which has its compiled code
                return found.standardised(None)
        return target_from_model(
            self.model, args, kwargs, key=key, init_strategy=self._init_strategy
        )

    def _prepare(self, for_target, key, args, kwargs) -> Trained:
        """A state to train from, without a probe."""
        begin = time.perf_counter()
        target = self._target(for_target, args, kwargs)
        first, _, for_params, again = jax.random.split(key, 4)
        pilot = pilots.find(first, target, num_particles=self._num_particles)
        cost, found = _add(Cost(0, 0), pilot), self._fitted(target, pilot)
        num_particles = self._particles_again(target, pilot, found)
        if num_particles is not None:
            try:
                second = pilots.find(
                    again,
                    target,
                    num_particles=num_particles,
                    coordinates=_if_decentred(found.coordinates),
                )
            except ValueError:
                pass  # the first one stands
            else:
                cost = _add(cost, second)
                if second.name == pilot.name:  # not of chains, which may miss modes
                    pilot, found = second, self._fitted(target, second)
        target = target.standardised(found.coordinates)
        pilot = pilot._replace(x=to_y(found.coordinates, pilot.x))
        points, mixture = pilot.x, found.mixture
        if mixture is not None:
            more = pilots.moved(jax.random.fold_in(again, 1), target, pilot)
            cost, points = _add(cost, more), more.x
            mixture = widened(mixtures.fit_mixture(points)[0])
        sampler = self._sampler_for(target.dim, pilot, mixture)
        params = sampler.init(for_params)
        if mixture is not None:
            params = mixtures.with_mixture(params, mixture)
        return Trained(
            target=target,
            pilot=pilot,
            points=points,
            probe=None,
            sampler=sampler,
            params=params,
            fit=None,
            cost=cost,
            seconds=time.perf_counter() - begin,
            data=(args, kwargs),
        )

    def _fitted(self, target, pilot) -> Fitted:
        """Coordinates for the sampler, and a mixture if it can start from one."""
        if self._make_sampler is None:
            return fitted(target, pilot.x)
        return Fitted(fitted_coordinates(target, pilot.x), None)

    def _particles_again(self, target, pilot, found: Fitted) -> int | None:
        """Of a second pilot, in better coordinates or larger, or None for no other."""
        if target.sample_prior is None:
            return None
        again = self._num_particles if is_decentred(found.coordinates) else None
        if found.mixture is None:
            return again
        spent = pilot.num_energy_evaluations + pilot.num_gradient_evaluations
        most = self._max_energy_evaluations
        if most is not None and most < 3 * MORE_PARTICLES * spent:
            return again  # more would leave too little for training
        return MORE_PARTICLES * self._num_particles

    def _sampler_for(self, dim: int, pilot, mixture: mixtures.Mixture | None):
        if self._make_sampler is not None:
            return self._make_sampler(dim, self._num_steps)
        return recipe.default_sampler(
            dim,
            self._num_steps,
            smallest_scale=min(pilots.smallest_scale(pilot.x), 0.05),
            num_components=None if mixture is None else len(mixture.means),
        )

    def _find_probe(self, key) -> bool:
        """Adds another pilot's points to the state; whether Ctrl-C prevented it."""
        begin, state = time.perf_counter(), self._trained()
        coordinates = state.target.coordinates
        assert coordinates is not None
        try:
            found = pilots.find(
                jax.random.split(key, 4)[1],
                state.target.standardised(None),
                num_particles=len(state.pilot.x),
                coordinates=_if_decentred(coordinates),
            )
        except KeyboardInterrupt:
            return True
        except ValueError as error:
            warnings.warn(
                "there is no independent probe, and so no verdict of `trust`, for a "
                f"second pilot failed where the first did not: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        x = to_y(coordinates, found.x)
        self.state = _with_cost(state, found)._replace(
            probe=probes.Probe(x=x, name=found.name),
            seconds=state.seconds + time.perf_counter() - begin,
        )
        return False

    def _warn_if_untrained(self, left: int) -> None:
        if self._trained().fit is None:
            warnings.warn(
                "the pilots alone took all of max_energy_evaluations="
                f"{self._max_energy_evaluations}, and {-left} more: the sampler is not "
                "trained; give more, or fewer num_particles",
                UserWarning,
                stacklevel=3,
            )

    def _stages(self, state: Trained, num_updates: int | None):
        """``(stage, budget)``, one after the other."""
        stages = recipe.stages(
            state.points, self._objective, self._behaviour, self._optimizer
        )
        if num_updates is None:
            for stage in stages:
                yield stage, {"max_seconds": stage.share * self._max_seconds}
            return
        half = num_updates // 2 if state.fit is None else 0
        imitate, balance = next(stages), next(stages)
        if half:
            yield imitate, {"num_updates": half}
        yield balance, {"num_updates": num_updates - half}

    def _train(self, key, stage, max_energy_evaluations, options) -> bool:
        """One stage; whether somebody ended it."""
        state = self._trained()
        fit = training.fit(
            key,
            state.sampler,
            stage.objective,
            state.target.energy,
            behaviour=stage.behaviour,
            optimizer=stage.optimizer,
            anneal=schedules.cosine_anneal,
            ema_decay=0.998,
            batch_size=stage.batch_size,
            params=state.params,
            max_energy_evaluations=max_energy_evaluations,
            mesh=self._mesh,
            **options,
        )
        self.state = _with_cost(state, fit)._replace(params=fit.params, fit=fit)
        return fit.stopped_by in ("interrupt", "callback")

    def _energies_left(self, state: Trained) -> int | None:
        if self._max_energy_evaluations is None:
            return None
        spent = int(state.cost.energy) + int(state.cost.gradient)
        return self._max_energy_evaluations - spent

    def _judge(self, key) -> Diagnostics:
        """What draws of the present state say; they are counted."""
        report = self._draw(key, JUDGED_DRAWS).diagnostics
        self.state = _with_cost(self._trained(), report)
        return report

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
        assert state.probe is not None
        given = state.target, draws, state.pilot.x, state.probe.x
        report = draws.diagnostics._replace(verdict=checked(verdict, *given))
        return draws._replace(diagnostics=report)

    def _wanted(self, draws: Draws) -> float:
        """How many draws would be enough, as far as these can tell."""
        report, num_draws = draws.diagnostics, len(draws.x)
        if report.collapsed or not report.pareto_k <= HOPELESS_K:
            return num_draws
        if report.pareto_k >= PARETO_K_LIMIT:  # perhaps by chance
            return 4 * num_draws
        state = self._trained()
        least, _ = least_known(state.target, draws, state.pilot.x)
        excess = least.excess / ENOUGH_PRECISION
        return 1.1 * num_draws * excess**2 if excess > 1 else num_draws


def _if_decentred(coordinates):
    """Coordinates in which SMC moves better than in the plain ones, or None."""
    return coordinates if is_decentred(coordinates) else None


def _are_same(data: tuple, other: tuple) -> bool:
    """Whether two sets of arguments of a model are equal."""
    old, old_tree = jax.tree.flatten(data)
    new, new_tree = jax.tree.flatten(other)
    same = old_tree == new_tree and len(old) == len(new)
    return same and all(map(_is_equal, old, new))


def _is_equal(a: Any, b: Any) -> bool:
    try:
        return np.array_equal(a, b, equal_nan=True)
    except TypeError:  # of strings and objects
        return np.array_equal(a, b)


class _Grade(NamedTuple):
    """What makes one state better than another, most important first."""

    is_trusted: bool
    has_error_bar: bool
    ess_fraction: float


def _grade(report: Diagnostics) -> _Grade:
    good = report.pareto_k < PARETO_K_LIMIT and not report.collapsed
    return _Grade(report.verdict.startswith("trust"), good, report.ess_fraction)


def _why_no_evidence(target: ModelTarget) -> str:
    return (
        "the model has no evidence: the priors of "
        f"{', '.join(target.improper_sites)} are improper; give them proper ones, or, "
        "where a factor stands for the prior, see draws.log_evidence"
    )


_NO_EVIDENCE = LogEvidence(np.nan, np.inf, np.nan, None)


def _with_cost(state: Trained, result: Any) -> Trained:
    return state._replace(cost=_add(state.cost, result))


def _add(cost: Cost, result: Any) -> Cost:
    """The cost and the counts of a result."""
    counts = [
        int(getattr(result, f"num_{kind}_evaluations", 0) or 0)
        for kind in ("energy", "gradient", "network")
    ]
    return Cost(*(int(a) + b for a, b in zip(cost, counts, strict=True)))
