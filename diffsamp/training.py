"""Training: a pure step, compiled many updates at a time, and the loop around it.

One update: the behaviour proposes paths (no gradients), they are scored in parallel
over time, the objective is differentiated, the optimiser moves. Update number n draws
its randomness from ``fold_in(key, n)``, so results do not depend on how updates are
chunked, shown or interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
import re
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial
from tqdm import tqdm

from diffsamp import batching, behaviours, meshes, scoring
from diffsamp import checkpoint as files
from diffsamp.behaviours import common
from diffsamp.energies import as_energy, as_key
from diffsamp.sampler import Evaluations, Sampler
from diffsamp.types import (
    Array,
    ArrayLike,
    Batch,
    Behaviour,
    Cost,
    Energy,
    Key,
    Objective,
    Params,
    Proposal,
    Request,
    Trajectory,
    as_count,
    counted,
    total_cost,
)

MAX_CHUNK = 500
STATES_MEMORY = 2**28  # bytes of states that `rollout` may keep on a device

Conditions = Callable[[Key, int], Array]


class TrainState(NamedTuple):
    """Everything training carries from one update to the next.

    Attributes:
        params: ``{"sampler": ..., "objective": ...}``.
        average: moving average of ``params["sampler"]``.
        opt_state: Optax state.
        objective_state: teachers, offsets, ...
        behaviour_state: buffers, particles, ...
        count: updates done, skipped ones included, [].
        num_skipped: updates skipped for a non-finite loss or gradient, [].
        skipped_in_a_row: how many of them end at the last update, [].
        key: key of the run.
    """

    params: Params
    average: Params
    opt_state: Any
    objective_state: Any
    behaviour_state: Any
    count: Array
    num_skipped: Array
    skipped_in_a_row: Array
    key: Key


class FitResult(NamedTuple):
    """What training returns.

    Attributes:
        params: parameters of the sampler, their moving average where one was asked for.
        state: full state; pass it as ``fit(..., state=...)`` to go on.
        metrics: per update, [num_updates] each: loss, elbo and ess (of on-policy paths,
            NaN without any), grad_norm, skipped, num_nonfinite, variance_alarm (the
            share of steps whose kernels' variances differ more than 100-fold) and what
            the objective adds.
        num_energy_evaluations: energies evaluated alone, pilots included; these three
            counts are of this call, and of all calls that a checkpoint holds.
        num_gradient_evaluations: energies evaluated with their gradient.
        num_network_evaluations: control evaluations to simulate and to differentiate
            every path, and those of objectives and behaviours of their own. What is
            computed again to save memory is not counted.
        num_skipped: updates skipped for a non-finite loss or gradient.
        seconds: wall time, compilation included.
        compile_seconds: of it, spent before the first update: pilots and compilation.
        stopped_by: "num_updates", "max_seconds", "max_energy_evaluations", "callback",
            "interrupt" or "exception".
    """

    params: Params
    state: TrainState
    metrics: dict[str, np.ndarray]
    num_energy_evaluations: int
    num_gradient_evaluations: int
    num_network_evaluations: int
    num_skipped: int
    seconds: float
    compile_seconds: float
    stopped_by: str


class TrainingDiverged(FloatingPointError):
    """Too many updates in a row had a non-finite loss or gradient.

    Attributes:
        state: the state after the last good update.
    """

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of training; equal recipes share one compilation.

    Attributes:
        sampler: the sampler.
        objective: the objective.
        behaviour: the behaviour.
        optimizer: Optax transformation over ``{"sampler", "objective"}``.
        batch_size: paths per update.
        ema_decay: decay of the moving average, or None.
        anneal: maps progress in [0, 1] to a factor on every update, or None.
        paths_per_condition: rows of a batch with the same condition, if there are any.
        memory_budget: bytes that scoring may take on a device (`scoring`), or None.
        mesh: devices over which rows of a batch are spread, or None.
    """

    sampler: Sampler
    objective: Objective
    behaviour: Behaviour
    optimizer: optax.GradientTransformation
    batch_size: int
    ema_decay: float | None = None
    anneal: Callable[[Array], Array] | None = None
    paths_per_condition: int = 1
    memory_budget: int | None = None
    mesh: Mesh | None = None

    @property
    def begun(self) -> Recipe:
        """All that a compiled update depends on: not where buffers start from."""
        return dataclasses.replace(self, behaviour=self.behaviour.begun)


def init(
    key: Key,
    recipe: Recipe,
    energy: Energy,
    params: Params | None = None,
    conditions: Conditions | None = None,
) -> tuple[TrainState, Cost]:
    """The state before the first update, and what its pilots cost.

    Args:
        key: random key; consumed.
        recipe: what is trained and how.
        energy: maps [D] to [].
        params: parameters of the sampler to start from; drawn if None.
        conditions: draws them, where the sampler has any.
    """
    key = as_key(key)
    run, for_params, for_objective, for_behaviour = jax.random.split(key, 4)
    sampler = recipe.sampler
    if params is None:
        params = sampler.init(for_params)
    behaviour_state, cost = recipe.behaviour.init(
        for_behaviour, sampler, params, energy
    )
    pilot = None
    if recipe.objective.requires.pilot:
        for_pilot, for_objective = jax.random.split(for_objective)
        pilot = _pilot(for_pilot, sampler, params, energy, conditions)
        price = (p * batching.BATCH for p in sampler.evaluations_per_path[:2])
        cost = total_cost([cost, Cost(*price)])
    own, objective_state = recipe.objective.init(
        for_objective, sampler, params, energy, pilot
    )
    trainable = {"sampler": params, "objective": own}
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        params=trainable,
        average=params,
        opt_state=recipe.optimizer.init(trainable),
        objective_state=objective_state,
        behaviour_state=behaviour_state,
        count=zero,
        num_skipped=zero,
        skipped_in_a_row=zero,
        key=run,
    )
    return state, cost


def keeps_states(
    sampler: Sampler, num_rows: int, memory_budget: int | None = None
) -> bool:
    """Whether the states of so many paths are kept for gradients through them.

    Args:
        sampler: the sampler.
        num_rows: paths, on each device.
        memory_budget: bytes, or None for 256 MiB.
    """
    room = STATES_MEMORY if memory_budget is None else memory_budget
    return num_rows * sampler.bytes_of_states <= room


def batch_loss(
    params: Params,
    objective: Objective,
    objective_state: Any,
    sampler: Sampler,
    energy: Energy,
    proposal: Proposal | None,
    request: Request,
    *,
    keys: tuple[Key, Key],
    count: Array,
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, tuple[Proposal, Trajectory, Any, dict[str, Any], Array]]:
    """The loss of one batch of paths; to be differentiated.

    Args:
        params: ``{"sampler": ..., "objective": ...}``.
        objective: the objective.
        objective_state: its state.
        sampler: the sampler.
        energy: maps [D] to [].
        proposal: the paths, or None to simulate them with gradients.
        request: conditions and groups of the rows.
        keys: for paths that are simulated here, and for the objective; consumed.
        count: updates done before, [].
        memory_budget: bytes for scoring a tile of the paths (`scoring`).
        mesh: devices over which the paths are spread, or None.

    Returns:
        The loss, and the paths, their scores (and those with gradients, or None), what
        the objective adds, and the share of steps whose kernels' variances differ too
        much.
    """
    for_paths, for_loss = keys
    condition = request.condition if sampler.condition_dim else None
    rollouts = None
    if proposal is None:
        each = jax.random.split(for_paths, request.group.shape[0])
        num_rows = each.shape[0] // (1 if mesh is None else mesh.size)
        fits = keeps_states(sampler, num_rows, memory_budget)
        rollout = functools.partial(sampler.rollout, keep_states=fits)
        each = meshes.spread(mesh, each)
        roll = jax.vmap(rollout, in_axes=(None, 0, None, 0))
        rollouts, paths = roll(params["sampler"], each, energy, condition)
        proposal = common.proposal(paths, simulated=True, on_policy=True)
    trajectories, outside = scoring.score_paths(
        sampler,
        params["sampler"],
        proposal.paths,
        condition,
        memory_budget=memory_budget,
        mesh=mesh,
    )
    # From here on parameters may be others than those they are of.
    proposal = common.without_densities(proposal)
    scored = proposal, trajectories, rollouts
    batch = _batch(
        sampler, energy, request, for_loss, count, *scored, memory_budget, mesh
    )
    value, extra = objective.loss(params, objective_state, batch)
    return value, (proposal, trajectories, rollouts, extra, jnp.mean(outside))


def _batch(
    sampler,
    energy,
    request,
    key,
    count,
    proposal,
    trajectories,
    rollouts,
    memory_budget,
    mesh,
):
    return Batch(
        trajectories=trajectories,
        rollouts=rollouts,
        paths=proposal.paths,
        on_policy=proposal.on_policy,
        target_draws=proposal.target_draws,
        condition=request.condition,
        group=request.group,
        count=count,
        key=key,
        sampler=sampler,
        energy=energy,
        anchor=proposal.anchor,
        memory_budget=memory_budget,
        mesh=mesh,
    )


def step(
    recipe: Recipe,
    state: TrainState,
    energy: Energy,
    progress: Array | float = 0.0,
    conditions: Conditions | None = None,
) -> tuple[TrainState, dict[str, Array], Cost]:
    """One update; pure and jittable with a static recipe.

    Args:
        recipe: what is trained and how.
        state: state before the update.
        energy: maps [D] to [].
        progress: share of the budget that is spent, in [0, 1], for ``anneal``.
        conditions: draws them, where the sampler has any.

    Returns:
        The new state, metrics, and what the behaviour itself cost.
    """
    sampler, objective, behaviour = recipe.sampler, recipe.objective, recipe.behaviour
    key = jax.random.fold_in(state.key, state.count)
    for_paths, for_loss, for_behaviour = jax.random.split(key, 3)
    current = state.params["sampler"]
    differentiable = objective.requires.simulation_gradient
    request = _request(jax.random.fold_in(key, 3), recipe, conditions)
    request = meshes.spread(recipe.mesh, request)
    proposal = None
    if not differentiable:
        proposal = behaviour.propose(
            state.behaviour_state,
            for_paths,
            sampler,
            current,
            energy,
            request,
            state.count,
        )
        proposal = meshes.spread(recipe.mesh, proposal)

    def loss(params):
        return batch_loss(
            params,
            objective,
            state.objective_state,
            sampler,
            energy,
            proposal,
            request,
            keys=(for_paths, for_loss),
            count=state.count,
            memory_budget=recipe.memory_budget,
            mesh=recipe.mesh,
        )

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    own, trajectories, rollouts, extra, outside = aux
    grad_norm = optax.tree.norm(gradient)
    good = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state = recipe.optimizer.update(
        gradient, state.opt_state, state.params
    )
    if recipe.anneal is not None:
        factor = recipe.anneal(jnp.asarray(progress))
        updates = jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), updates)
    params: Any = optax.apply_updates(state.params, updates)
    average = _average(recipe.ema_decay, state, params["sampler"])
    scored = own, trajectories, rollouts, recipe.memory_budget, recipe.mesh
    batch = _batch(sampler, energy, request, for_loss, state.count, *scored)
    objective_state = objective.update(params, state.objective_state, batch)
    kept = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, average, opt_state, objective_state),
        (state.params, state.average, state.opt_state, state.objective_state),
    )
    behaviour_state, cost = behaviour.update(
        state.behaviour_state,
        for_behaviour,
        sampler,
        kept[0]["sampler"],
        energy,
        trajectories,
        own,
        state.count,
    )
    bad = jnp.asarray(~good, jnp.int32)
    new = TrainState(
        *kept[:3],
        objective_state=kept[3],
        behaviour_state=behaviour_state,
        count=state.count + 1,
        num_skipped=state.num_skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        key=state.key,
    )
    metrics = {
        "loss": value,
        "grad_norm": grad_norm,
        "skipped": bad,
        "variance_alarm": outside,
        **_path_metrics(trajectories.log_weight, own),
        **{k: v for k, v in extra.items() if k != "cost"},
        **behaviour.metrics(behaviour_state),
    }
    cost = total_cost([cost, extra.get("cost", Cost(0, 0))])
    return meshes.everywhere(recipe.mesh, (new, metrics, counted(cost)))


def fit(
    key: Key,
    sampler: Sampler,
    objective: Objective,
    energy: Energy,
    *,
    behaviour: Behaviour | None = None,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 512,
    num_updates: int | None = None,
    max_seconds: float | None = None,
    max_energy_evaluations: int | None = None,
    max_grad_norm: float | None = 1.0,
    ema_decay: float | None = 0.99,
    anneal: Callable[[Array], Array] | None = None,
    conditions: Conditions | ArrayLike | None = None,
    paths_per_condition: int = 8,
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
    donate_state: bool = False,
    params: Params | None = None,
    state: TrainState | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 30.0,
    callback: Callable[[int, dict[str, np.ndarray]], Any] | None = None,
    updates_per_chunk: int | None = None,
    max_skipped_in_a_row: int = 100,
    progress_bar: bool = True,
) -> FitResult:
    """Trains a sampler on an energy.

    Args:
        key: random key; consumed. Ignored when a state or checkpoint is continued.
        sampler: the sampler.
        objective: what is minimised.
        energy: maps [D] to []; ``target.energy``.
        behaviour: where paths come from; on-policy by default.
        optimizer: any Optax transformation of ``{"sampler", "objective"}``; by default
            Adam at 1e-3.
        batch_size: paths per update.
        num_updates: updates to do, in addition to those of ``state``. 5,000 if no
            budget is given at all.
        max_seconds: wall time of the updates themselves; pilots and compilation come
            on top (``compile_seconds``), so that a slow compiler does not cost updates.
        max_energy_evaluations: energies and gradients together, pilots included.
        max_grad_norm: global gradient norm is clipped to this; None for no clipping.
        ema_decay: decay of the moving average of parameters (with warm-up), or None.
        anneal: maps the share of the budget spent, in [0, 1], to a factor on every
            update: learning-rate decay under any budget (`schedules.cosine_anneal`).
        conditions: for an amortised sampler of a conditional energy: conditions to
            train on, an array [N, C] or a function ``(key, n) -> [n, C]``.
        paths_per_condition: rows of a batch that share a condition; divides batch_size.
        memory_budget: bytes that differentiating the densities of paths may take at a
            time; by default what suits the cache of a CPU, or 1 GiB. Gradients through
            the simulation keep all states where they fit, by default 256 MiB. Results
            do not depend on it but for rounding.
        mesh: devices to spread the rows of every batch over; it must divide batch_size.
            Parameters and buffers are whole on each. Results do not depend on it but
            for rounding, and a checkpoint may be resumed on another number of devices.
        donate_state: whether updates write over the state they start from, which
            otherwise exists twice: what large buffers need. An interrupt or exception
            in the middle of a chunk then has nothing to give back but the checkpoint.
        params: parameters to start from (warm start).
        state: state to go on from (continued fitting).
        checkpoint: file to write to; if it exists, the run it holds is resumed in place
            of ``params`` and ``state``, with ``num_updates`` counted from that run's
            own start. A resumed run budgeted by
            ``num_updates`` ends bit-identical to an uninterrupted one on the same CPU.
            The energy at sixteen points, by which the file is told from those of other
            energies, is not counted.
        checkpoint_seconds: least time between two writes.
        callback: called as ``callback(count, metrics)`` after each chunk with that
            chunk's metrics; a true return value stops training.
        updates_per_chunk: updates per compiled call; by default about a second's worth.
            Results do not depend on it.
        max_skipped_in_a_row: so many skipped updates in a row raise.
        progress_bar: whether to show one; never shown where CI is set.

    Returns:
        A `FitResult`. An interrupt from the keyboard returns the state so far, unless
        that was donated: then it is raised.

    Raises:
        ValueError: for an energy that fails or is non-finite wherever the sampler
            starts, a batch size below 2 or one that the mesh does not divide, a memory
            budget too small for one step of one path, conditions of a wrong shape, or
            an objective the behaviour cannot serve.
        TrainingDiverged: after ``max_skipped_in_a_row`` skipped updates in a row; the
            exception carries the last good state.
        Exception: whatever a callback raises. As every exception after the first
            update it has an attribute ``fit_result``: the training so far.
        CheckpointError: for a checkpoint that is damaged, foreign or of another
            configuration; the file is left as it is.

    Example:
        >>> import jax, diffsamp as ds
        >>> target = ds.targets.gmm9()
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4, scale=4.0)
        >>> fit = ds.fit(
        ...     jax.random.key(0), sampler, ds.objectives.log_variance(), target.energy,
        ...     num_updates=2, batch_size=8, progress_bar=False,
        ... )
        >>> fit.metrics["loss"].shape
        (2,)
    """
    begin = time.perf_counter()
    key, energy, mesh = as_key(key), as_energy(energy), meshes.as_mesh(mesh)
    behaviour = behaviour or behaviours.on_policy()
    _check_parts(sampler, objective, behaviour, batch_size)
    meshes.check_divides("batch_size", batch_size, mesh)
    law = _as_conditions(conditions, sampler, paths_per_condition, batch_size)
    _check_energy(sampler, objective, energy, law)
    _check_memory(sampler, memory_budget)
    if params is not None:
        sampler.check_params(params)
    limits = num_updates, max_seconds, max_energy_evaluations
    _check_budget(*limits, updates_per_chunk, checkpoint)
    if num_updates is None and max_seconds is None and max_energy_evaluations is None:
        num_updates = 5_000
    recipe = Recipe(
        sampler,
        objective,
        behaviour,
        _optimizer(optimizer, max_grad_norm),
        int(batch_size),
        ema_decay,
        anneal,
        paths_per_condition if sampler.condition_dim else 1,
        memory_budget,
        mesh,
    )
    pilot_key, init_key = jax.random.split(key)
    progress = _Progress(recipe)
    if checkpoint is not None:
        progress.energies = _energies_at_fixed_points(sampler, energy, law)
    resumed = checkpoint is not None and os.path.exists(checkpoint)
    if resumed:
        shapes = jax.eval_shape(
            lambda k: init(k, recipe, energy, params, law)[0], init_key
        )
        state = progress.read(checkpoint, recipe, shapes)
    if checkpoint is not None:
        meshes.check_agreed(
            mesh,
            (resumed, int(state.count) if state is not None else 0),
            f"the processes that share a mesh do not find the same file at {checkpoint}"
            ": put it on a disk that all of them see",
        )
    if state is None:
        progress.add_pilot(_check_start(pilot_key, sampler, params, energy, law))
        state, cost = init(init_key, recipe, energy, params, law)
        progress.add_cost(cost)
    if not resumed:
        progress.first = int(state.count)
    state, energy, law = meshes.put_everywhere(mesh, (state, energy, law))
    if donate_state:
        state = _copy(state)  # the caller's arrays stay
    total = None if num_updates is None else progress.first + num_updates

    chunk = _chunk_in_place if donate_state else _chunk
    chunk = functools.partial(chunk, recipe.begun, updates_per_chunk or MAX_CHUNK)
    total_or_never = np.float32(np.inf if num_updates is None else num_updates)
    first = np.int32(progress.first)

    def run(state, num, elapsed) -> tuple[TrainState, dict[str, Array], Cost]:
        spent = elapsed / max_seconds if max_seconds else 0.0
        if max_energy_evaluations:
            spent = max(spent, progress.num_evaluations / max_energy_evaluations)
        share = np.float32(min(spent, 1.0))
        numbers = np.int32(num), total_or_never, first, share
        return chunk(state, energy, law, *numbers)

    def keep(state):
        if checkpoint is not None and meshes.is_first_process(mesh):
            try:
                progress.write(checkpoint, recipe, state)
            except OSError as error:  # a full disk must not cost the run
                warnings.warn(
                    f"{checkpoint} could not be written ({error}); training goes on",
                    RuntimeWarning,
                    stacklevel=3,
                )

    ready = begin
    if total is None or int(state.count) < total:
        state = run(state, 0, 0.0)[0]
        jax.block_until_ready(state)
    ready = last_write = time.perf_counter()
    per_update = None
    stopped_by, last_good = "num_updates", state
    nobody_looks = any(map(os.environ.get, ("CI", "PYTEST_XDIST_WORKER")))
    silent = not progress_bar or nobody_looks
    bar = tqdm(
        total=num_updates, initial=int(state.count) - progress.first, disable=silent
    )

    def result(state, stopped_by):
        return FitResult(
            params=state.params["sampler"] if ema_decay is None else state.average,
            state=state,
            metrics=progress.metrics,
            num_energy_evaluations=progress.num_energy,
            num_gradient_evaluations=progress.num_gradient,
            num_network_evaluations=progress.num_network,
            num_skipped=int(state.num_skipped),
            seconds=time.perf_counter() - begin,
            compile_seconds=ready - begin,
            stopped_by=stopped_by,
        )

    try:
        while total is None or int(state.count) < total:
            clock = time.perf_counter() - ready, _chunk_length(per_update)
            elapsed, length = meshes.agreed(mesh, clock)
            if max_seconds is not None and elapsed >= max_seconds:
                stopped_by = "max_seconds"
                break
            budget = max_energy_evaluations
            if budget is not None and progress.num_evaluations >= budget:
                stopped_by = "max_energy_evaluations"
                break
            num = updates_per_chunk or int(length)
            if total is not None:
                num = min(num, total - int(state.count))
            if budget is not None:
                num = min(num, progress.updates_within(budget))
            chunk_begin, in_a_row = time.perf_counter(), int(state.skipped_in_a_row)
            state, metrics, cost = run(state, num, elapsed)
            jax.block_until_ready(state)
            per_update = (time.perf_counter() - chunk_begin) / num
            metrics = {name: np.asarray(v)[:num] for name, v in metrics.items()}
            progress.add_chunk(num, metrics, cost)
            last_good = state
            bar.update(num)
            bar.set_postfix(_bar_text(metrics, state), refresh=False)
            in_a_row = _longest_run(metrics["skipped"], in_a_row)
            if in_a_row >= max_skipped_in_a_row:
                # Skipped updates left everything but the counts as it was.
                last_good = state._replace(skipped_in_a_row=jnp.zeros((), jnp.int32))
                raise TrainingDiverged(
                    f"{in_a_row} updates in a row had a non-finite "
                    "loss or gradient. Lower the learning rate, raise the reference "
                    "scale to the target's, or check the energy for NaN where the "
                    "sampler goes; the last good state is in the exception's .state",
                    last_good,
                )
            if time.perf_counter() - last_write >= checkpoint_seconds:
                keep(state)
                last_write = time.perf_counter()
            if callback is not None:
                wish = bool(callback(int(state.count), metrics))
                if meshes.agreed(mesh, (wish,))[0]:
                    stopped_by = "callback"
                    break
    except KeyboardInterrupt:
        if _is_gone(last_good):
            raise
        stopped_by, state = "interrupt", last_good
    except Exception as error:
        if not _is_gone(last_good):
            vars(error)["fit_result"] = result(last_good, "exception")
            error.add_note("What was trained so far is in this exception's .fit_result")
        raise
    finally:
        bar.close()
        if not _is_gone(last_good):
            keep(last_good)
    meshes.wait_for_others(mesh)  # the file is written when any of them goes on
    return result(state, stopped_by)


def param_labels(params: Params) -> Params:
    """Labels every trainable parameter with its group, for `optax.multi_transform`.

    Groups are "generation", "destruction", "backbone" where there is one, and whatever
    an objective names its own parameters ("log_z", "flow", ...).

    Args:
        params: ``{"sampler": ..., "objective": ...}``.

    Returns:
        A tree of strings of the same structure.

    Example:
        >>> import jax, optax, diffsamp as ds
        >>> optimizer = optax.multi_transform(
        ...     {"generation": optax.adam(1e-3), "destruction": optax.adam(1e-4),
        ...      "log_z": optax.adam(1e-2)},
        ...     ds.param_labels,
        ... )
    """
    groups = {"generation", "destruction", "log_z", "flow"}

    def label(path, _):
        names = [getattr(entry, "key", None) for entry in path]
        known = [name for name in names if name in groups]
        return known[0] if known else str(names[1] if len(names) > 1 else names[0])

    return jax.tree_util.tree_map_with_path(label, params)


def _updates(recipe, length, state, energy, conditions, num, total, first, share):
    """``num <= length`` updates in one compiled call; ``num`` is dynamic."""

    def progress(state):
        done = (state.count - first).astype(jnp.float32) / total
        return jnp.maximum(done, share)

    def one(state):
        return step(recipe, state, energy, progress(state), conditions)

    _, shapes, _ = jax.eval_shape(one, state)
    store = {k: jnp.zeros((length,), v.dtype) for k, v in shapes.items()}
    none = counted(Cost(0, 0))

    def body(i, carry):
        state, store, cost = carry
        state, metrics, own = one(state)
        store = {k: store[k].at[i].set(v) for k, v in metrics.items()}
        return state, store, Cost(*(a + b for a, b in zip(cost, own, strict=True)))

    return jax.lax.fori_loop(0, num, body, (state, store, none))


_chunk = jax.jit(_updates, static_argnums=(0, 1))
_chunk_in_place = jax.jit(_updates, static_argnums=(0, 1), donate_argnums=2)


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def _is_gone(state: TrainState) -> bool:
    """Whether updates that were not finished have written over it."""
    return state.count.is_deleted()


class _Progress:
    """Host-side counts and history of one run, and their checkpoint."""

    def __init__(self, recipe: Recipe):
        self.price = price = recipe.sampler.evaluations_per_path
        if recipe.objective.requires.simulation_gradient:  # energies are differentiated
            price = Evaluations(0, price.energy + price.gradient, price.network)
        size = recipe.batch_size
        made = size - recipe.behaviour.provides.stored_rows(size)
        passes = made + size  # to simulate or trace back, and to differentiate
        self.per_update = Evaluations(
            made * price.energy, made * price.gradient, passes * price.network
        )
        self.num_energy = self.num_gradient = self.num_network = 0
        self.first = 0
        self.energies: list[float] = []
        self._history: list[dict[str, np.ndarray]] = []

    @property
    def num_evaluations(self) -> int:
        return self.num_energy + self.num_gradient

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        names = self._history[0] if self._history else {}
        return {n: np.concatenate([m[n] for m in self._history]) for n in names}

    def updates_within(self, budget: int) -> int:
        per_update = self.per_update.energy + self.per_update.gradient
        return max(1, (budget - self.num_evaluations) // max(per_update, 1))

    def add_pilot(self, paths: int) -> None:
        self.num_energy += paths * self.price.energy
        self.num_gradient += paths * self.price.gradient
        self.num_network += paths * self.price.network

    def add_cost(self, cost: Cost) -> None:
        self.num_energy += int(cost.energy)
        self.num_gradient += int(cost.gradient)
        self.num_network += int(cost.network)

    def add_chunk(self, num: int, metrics: dict[str, np.ndarray], cost: Cost) -> None:
        self.add_cost(cost)
        self.num_energy += num * self.per_update.energy
        self.num_gradient += num * self.per_update.gradient
        self.num_network += num * self.per_update.network
        self._history.append(metrics)

    def write(self, path, recipe: Recipe, state: TrainState) -> None:
        header = {
            "kind": "training",
            "configuration": _configuration(recipe),
            "energies": self.energies,
            "counts": [self.num_energy, self.num_gradient, self.num_network],
            "first": self.first,
        }
        state = meshes.on_this_host(state)
        files.write(path, header, {"state": state, "metrics": self.metrics})

    def read(self, path, recipe: Recipe, shapes: TrainState) -> TrainState:
        header, payload = files.read(path)
        if header.get("kind") != "training":
            raise files.CheckpointError(
                f"{path} holds {header.get('kind')!r}, not a training checkpoint; it "
                "was left untouched. Choose another path"
            )
        held, wanted = header["configuration"], _configuration(recipe)
        if held != wanted:
            differences = [
                f"\n  {name}: it holds {held.get(name)}, wanted {wanted[name]}"
                for name in wanted
                if held.get(name) != wanted[name]
            ]
            raise files.CheckpointError(
                f"{path} was written for another configuration and was left "
                f"untouched.{''.join(differences)}\n"
                "Choose another path, or restore the settings"
            )
        # A mended energy may go on where it was not finite before.
        difference = np.subtract(header["energies"], self.energies)
        tolerance = 1e-3 * (1 + np.abs(self.energies))
        if np.any(np.isfinite(difference) & (np.abs(difference) > tolerance)):
            raise files.CheckpointError(
                f"{path} was written for another energy (or other data) and was left "
                f"untouched: at the same points it has {header['energies'][:3]}, ..., "
                f"wanted {self.energies[:3]}, .... Choose another path"
            )
        state = files.restore(shapes, payload["state"], path)
        self.num_energy, self.num_gradient, self.num_network = header["counts"]
        self.first = header["first"]
        if payload["metrics"]:
            self._history.append(payload["metrics"])
        return state


def _configuration(recipe: Recipe) -> dict[str, str]:
    """What has to be the same for a run to go on, readable and stable over processes.

    Functions are told apart by a digest of all they close over: `log_variance` from
    `trajectory_balance`, and Adam at 1e-3 from Adam at 1e-4.
    """

    def name_and_digest(part, function):
        digest = hashlib.sha256(_described(part).encode()).hexdigest()[:8]
        return f"{getattr(function, '__module__', None)} {digest}"

    objective, behaviour = recipe.objective, recipe.behaviour
    return {
        "sampler": _stable_repr(recipe.sampler),
        "batch_size": str(recipe.batch_size),
        "paths_per_condition": str(recipe.paths_per_condition),
        "ema_decay": str(recipe.ema_decay),
        "objective": name_and_digest(objective, objective.loss),
        "behaviour": name_and_digest(behaviour, behaviour.propose),
        "optimizer": name_and_digest(recipe.optimizer, recipe.optimizer.update),
        "anneal": name_and_digest(recipe.anneal, recipe.anneal),
    }


def _stable_repr(value: Any) -> str:
    """Without addresses: functions move in memory between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _energies_at_fixed_points(sampler: Sampler, energy: Energy, conditions) -> list:
    """What tells one energy from another in a checkpoint; not counted as a cost."""
    shape = (16, sampler.dim)
    noise = np.asarray(jax.random.normal(jax.random.key(0), shape))
    points = np.asarray(sampler.loc) + np.asarray(sampler.scale) * noise
    points = (jnp.asarray(points, noise.dtype),)
    if conditions is not None:
        points += (conditions(jax.random.key(1), 16),)
    values = _energies(energy, *points)
    return np.asarray(values, np.float64).tolist()


@jax.jit
def _energies(energy: Energy, *points: Array) -> Array:
    return jax.vmap(energy)(*points)


def _described(value: Any, seen: tuple[int, ...] = ()) -> str:
    """Text of a function and of everything it closes over."""
    if id(value) in seen:
        return "..."
    seen = (*seen, id(value))
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return f"{array.dtype}{array.shape}{digest}"
    if isinstance(value, dict):
        value = tuple(sorted(value.items(), key=lambda item: str(item[0])))
    if isinstance(value, tuple | list):
        return f"({', '.join(_described(v, seen) for v in value)})"
    if isinstance(value, functools.partial):
        return _described((value.func, value.args, value.keywords), seen)
    function = inspect.unwrap(value) if callable(value) else value
    if inspect.isfunction(function):
        cells = inspect.getclosurevars(function).nonlocals
        held = (cells, function.__defaults__, function.__kwdefaults__)
        return f"{function.__module__}.{function.__qualname__}{_described(held, seen)}"
    return _stable_repr(value)


def _optimizer(optimizer, max_grad_norm):
    optimizer = optimizer or _default_optimizer()
    return optimizer if max_grad_norm is None else _clipped(optimizer, max_grad_norm)


@functools.cache
def _default_optimizer():
    return optax.adam(1e-3)


@functools.cache
def _clipped(optimizer, max_grad_norm):
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def _average(decay, state: TrainState, params: Params) -> Params:
    if decay is None:
        return params
    count = state.count.astype(jnp.float32)
    rate = jnp.maximum(1 - decay, 9 / (10 + count))
    return optax.incremental_update(params, state.average, rate)


def _path_metrics(log_weight: Array, own: Proposal) -> dict[str, Array]:
    """ELBO and relative effective sample size of the on-policy rows.

    Paths with exploration noise are no draws of the sampler and give no lower bound.
    """
    finite = own.on_policy & jnp.isfinite(log_weight)
    count = jnp.sum(finite).astype(log_weight.dtype)
    elbo = jnp.sum(jnp.where(finite, log_weight, 0.0)) / count
    masked = jnp.where(finite, log_weight, -jnp.inf)
    log_sum, log_square = (jax.nn.logsumexp(c * masked) for c in (1, 2))
    return {
        "elbo": elbo,
        "ess": jnp.exp(2 * log_sum - log_square) / count,
        "num_nonfinite": jnp.sum(own.simulated & ~jnp.isfinite(log_weight)),
    }


def _longest_run(skipped: np.ndarray, before: int) -> int:
    """Longest run of skipped updates, with ``before`` of them just ahead."""
    longest = run = before
    for bad in skipped:
        run = run + 1 if bad else 0
        longest = max(longest, run)
    return longest


def _chunk_length(per_update: float | None) -> int:
    if per_update is None:
        return 1  # which may take minutes
    return int(np.clip(1.0 / max(per_update, 1e-6), 1, MAX_CHUNK))


def _bar_text(metrics: dict[str, np.ndarray], state: TrainState) -> dict[str, str]:
    elbo = metrics["elbo"][np.isfinite(metrics["elbo"])]
    text = {"elbo": f"{elbo.mean():.3f}" if elbo.size else "-"}
    text["loss"] = f"{metrics['loss'][-1]:.3g}"
    if metrics["variance_alarm"][-1] > 0:
        text["variance_alarm"] = f"{metrics['variance_alarm'][-1]:.2g}"
    if int(state.num_skipped):
        text["skipped"] = str(int(state.num_skipped))
    return text


def _check_parts(sampler, objective, behaviour, batch_size) -> None:
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"sampler must come from diffsamp.samplers, got {type(sampler).__name__}"
        )
    if not isinstance(objective, Objective):
        raise ValueError(
            "objective must come from diffsamp.objectives, called: log_variance(), got "
            f"{type(objective).__name__}"
        )
    if not isinstance(behaviour, Behaviour):
        raise ValueError(
            "behaviour must come from diffsamp.behaviours, called: on_policy(), got "
            f"{type(behaviour).__name__}"
        )
    as_count("batch_size", batch_size, least=2)
    requires, provides = objective.requires, behaviour.provides
    if requires.simulation_gradient and not provides.only_on_policy:
        raise ValueError(
            "this objective differentiates through the simulation and needs "
            "behaviours.on_policy() alone; for other behaviours use log_variance, "
            "trajectory_balance or reverse_kl_log_derivative"
        )
    if requires.on_policy and not provides.on_policy:
        raise ValueError(
            "this objective needs on-policy rows; put behaviours.on_policy() into a "
            "behaviours.mixture"
        )
    if requires.target_draws and not provides.target_draws:
        raise ValueError(
            "this objective needs paths into target draws; use "
            "behaviours.smc_seeded(...) or behaviours.reference_draws(draws), or pass "
            "draws to the objective"
        )
    if not (provides.simulated or provides.target_draws):
        raise ValueError(
            "this behaviour only repeats what another one found; combine it: "
            "behaviours.mixture((on_policy(), 0.5), (replay(), 0.5))"
        )
    if requires.anchor and not provides.anchor:
        raise ValueError(
            "this objective fits a trust region; use behaviours.trust_region(), by "
            "itself or in a behaviours.mixture"
        )
    if sampler.condition_dim and not provides.conditions:
        raise ValueError(
            "this behaviour (or a member of it) has points but no conditions to go "
            "with them; for a conditional energy use behaviours.on_policy() or "
            "exploration(noise)"
        )


def _as_conditions(conditions, sampler, paths_per_condition, batch_size):
    """A `Partial` that draws conditions, or None."""
    size = sampler.condition_dim
    if not size:
        if conditions is not None:
            raise ValueError(
                "conditions were given, but the sampler has condition_dim=0; build it "
                "with the condition_dim of the energy"
            )
        return None
    if conditions is None:
        raise ValueError(
            f"the sampler has condition_dim={size}: pass conditions to train on, an "
            "array [N, C] or a function (key, n) -> [n, C]"
        )
    if not 2 <= paths_per_condition <= batch_size or batch_size % paths_per_condition:
        raise ValueError(
            "paths_per_condition must be at least 2 and divide batch_size, got "
            f"{paths_per_condition} and {batch_size}"
        )
    if not callable(conditions):
        points = jnp.asarray(conditions, jax.dtypes.canonicalize_dtype(float))
        if points.ndim != 2 or len(points) == 0 or not bool(jnp.isfinite(points).all()):
            raise ValueError(
                "conditions must be a finite array [N, C] or a function, got shape "
                f"{list(points.shape)}"
            )
        conditions = Partial(_some_rows, points)
    elif not isinstance(conditions, Partial):
        conditions = Partial(conditions)
    shape = jax.eval_shape(lambda k: conditions(k, 2), jax.random.key(0)).shape
    if shape != (2, size):
        raise ValueError(
            f"conditions must have {size} columns (condition_dim), got "
            f"{list(shape[1:])} for one condition"
        )
    return conditions


def _some_rows(points: Array, key: Key, num: int) -> Array:
    return points[jax.random.randint(key, (num,), 0, points.shape[0])]


def _request(key: Key, recipe: Recipe, conditions) -> Request:
    """Conditions for every row of a batch; none at all for most energies."""
    repeats, size = recipe.paths_per_condition, recipe.batch_size
    group = jnp.arange(size, dtype=jnp.int32) // repeats
    if conditions is None:
        return Request(jnp.zeros((size, 0)), jnp.zeros_like(group))
    return Request(jnp.repeat(conditions(key, size // repeats), repeats, 0), group)


def _pilot(key, sampler, params, energy, conditions):
    if conditions is None:
        return batching.pilot(key, sampler, params, energy)
    key, for_conditions = jax.random.split(key)
    drawn = conditions(for_conditions, batching.BATCH)
    return batching.pilot(key, sampler, params, energy, drawn)


def _check_energy(sampler, objective, energy, conditions) -> None:
    condition = None
    if conditions is not None:
        condition = conditions(jax.random.key(0), 1)[0]
    gradient = objective.requires.simulation_gradient
    sampler.check_energy(energy, condition, gradient=gradient)


def _check_memory(sampler, memory_budget) -> None:
    if memory_budget is None:
        return
    if not isinstance(memory_budget, int | np.integer):
        raise ValueError(
            f"memory_budget must be an int, a number of bytes, got {memory_budget!r}"
        )
    params = jax.eval_shape(sampler.init, jax.random.key(0))
    scoring.tile_within(sampler, params, 1, int(memory_budget))


def _check_budget(
    num_updates, max_seconds, max_energies, updates_per_chunk, checkpoint
) -> None:
    for name, value, least in (
        ("num_updates", num_updates, 0),
        ("max_energy_evaluations", max_energies, 1),
        ("updates_per_chunk", updates_per_chunk, 1),
    ):
        if value is not None:
            as_count(name, value, least)
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")
    if checkpoint is not None:
        folder = os.path.dirname(os.path.abspath(checkpoint))
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise ValueError(
                f"checkpoint {checkpoint} cannot be written: {folder} is not a folder "
                "you may write to; create it first"
            )


def _check_start(key, sampler, params, energy, conditions) -> int:
    """Raises when no draw of the starting sampler has a finite energy.

    Returns the number of paths drawn.
    """
    params = sampler.init(key) if params is None else params
    final = _pilot(key, sampler, params, energy, conditions)
    values = np.asarray(final.energy)
    if not np.isfinite(values).any():
        raise ValueError(
            f"energy is {values[0]} at x = {np.asarray(final.x[0])} and not finite at "
            f"any of {len(values)} draws of the starting sampler. Check its support "
            "and sign (energy = -log density), and set the sampler's loc and scale to "
            "where the target is (ds.standardise finds them)"
        )
    return len(values)
