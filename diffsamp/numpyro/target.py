"""A NumPyro model as a :class:`diffsamp.Target`: energy, parameters, prior.

The energy is NumPyro's own potential in unconstrained space, so it already holds the
log-determinant of every constraining transform and the integral of ``exp(-energy)`` is
the evidence of the model. Nothing here re-implements a model: every value comes from
replaying it.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.infer import init_to_sample, init_to_uniform, init_to_value
from numpyro.infer.util import constrain_fn, initialize_model, unconstrain_fn
from numpyro.ops.provenance import eval_provenance

from diffsamp.energies import as_key
from diffsamp.numpyro.affine import affine_from
from diffsamp.numpyro.coordinates import Chain, Coordinates, to_y
from diffsamp.standardise import Pilot
from diffsamp.types import Array, Key, Target


@dataclasses.dataclass(frozen=True, eq=False)
class ModelTarget(Target):
    """The posterior of a NumPyro model, over its flat unconstrained coordinates.

    Made by :func:`target_from_model`. All callables are `jax.tree_util.Partial` that
    carry the data as array leaves: passed as arguments to compiled code they do not
    recompile for new data of equal shape (see :meth:`with_data`). To pickle one, the
    model must be a function of a module; it is traced again when it is loaded.

    Attributes:
        unravel: one flat point [D] to the dict of unconstrained sites. Flattening is
            that of `ravel_pytree`: sites sorted by name (NumPyro's guides keep the
            order of the trace instead).
        unconstrain: the dict of constrained latent sites of one draw to the flat
            point [D], the inverse of ``constrain``; other sites are ignored.
        site_names: continuous latent sites, in the order of the flat point.
        improper_sites: those with an improper prior.
        is_proper: whether every prior is a proper density. Where it is False the
            integral of exp(-energy) is no marginal likelihood, and ``log_prior``,
            ``log_likelihood`` and ``sample_prior`` are None.
        initial: a point [D] where energy and gradient are finite.
        coordinates: the map from this target's coordinates to NumPyro's unconstrained
            ones; None where they are the same (see :meth:`standardised`).
    """

    unravel: Callable[[Array], dict[str, Array]] | None = None
    unconstrain: Callable[[Mapping[str, Array]], Array] | None = None
    site_names: tuple[str, ...] = ()
    improper_sites: tuple[str, ...] = ()
    is_proper: bool = True
    initial: Array | None = None
    coordinates: Coordinates | None = None
    _program: Any = dataclasses.field(default=None, repr=False)

    def with_data(self, *model_args: Any, **model_kwargs: Any) -> ModelTarget:
        """The same model with other data of the same structure.

        Args:
            *model_args: positional arguments of the model.
            **model_kwargs: keyword arguments of the model.

        Returns:
            A target whose callables share compiled code with this one's when the
            shapes agree. ``log_z`` and ``modes`` are None: they belonged to the data.

        Raises:
            ValueError: when the arguments do not have the structure, the shapes or the
                static (non-float) values that the target was made with.

        Example:
            >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from diffsamp.numpyro import target_from_model
            >>> def model(y):
            ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
            ...     numpyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
            >>> target = target_from_model(model, (jnp.zeros(3),))
            >>> other = target.with_data(jnp.ones(3))
            >>> bool(other.energy(jnp.ones(1)) < target.energy(jnp.ones(1)))
            True
        """
        data, structure = _split_data(model_args, model_kwargs)
        if not self.energy.args[1]:  # no data, or all of it constant
            data, structure = (), _all_static(model_args, model_kwargs)
        if structure != self._program.structure:
            raise ValueError(
                "model_args and model_kwargs must have the structure and the static "
                f"values the target was made with, {self._program.structure}, got "
                f"{structure}; call target_from_model for a different problem"
            )
        shapes = tuple(np.shape(leaf) for leaf in data)
        expected = tuple(np.shape(leaf) for leaf in self.energy.args[1])
        if shapes != expected:
            raise ValueError(
                f"model_args and model_kwargs must have arrays of shapes {expected}, "
                f"got {shapes}; call target_from_model for data of another size"
            )

        return self._bind(data, self.coordinates, log_z=None)

    def standardised(self, coordinates: Coordinates | None) -> ModelTarget:
        """The same posterior in other coordinates y, with x = coordinates.forward(y).

        Energy and prior hold the log-determinant, so log Z is the same.

        Args:
            coordinates: from y to this target's coordinates; maps follow one another.
                None for NumPyro's unconstrained coordinates again.

        Returns:
            A target; ``modes`` is None, for it belonged to the coordinates.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from diffsamp.numpyro import affine_from, target_from_model
            >>> def model():
            ...     numpyro.sample("x", dist.Normal(100.0, 5.0))
            >>> target = target_from_model(model)
            >>> draws = target.sample_prior(jax.random.key(0), 1_000)
            >>> unit = target.standardised(affine_from(draws))
            >>> bool(jnp.std(unit.sample_prior(jax.random.key(1), 1_000)) < 1.1)
            True
        """
        if coordinates is not None and self.coordinates is not None:
            coordinates = Chain(self.coordinates, coordinates)
        return self._bind(self.energy.args[1], coordinates)

    def __reduce__(self):
        plain = self.standardised(None)
        assert plain.constrain is not None
        assert plain.initial is not None
        start = plain.constrain(plain.initial)
        start = {site: np.asarray(start[site]) for site in self.site_names}
        args, kwargs = self._program.arguments(self.energy.args[1])
        given = self._program.model, args, kwargs, self.name, start, self.coordinates
        return _again, (*given, self.log_z, self.modes, self.sample)

    def _bind(
        self, data: tuple, coordinates: Coordinates | None, **changes: Any
    ) -> ModelTarget:
        def rebind(function):
            if function is None:
                return None
            return Partial(function.func, self._program, data, coordinates)

        initial = self._program.initial
        return dataclasses.replace(
            self,
            energy=rebind(self.energy),
            constrain=rebind(self.constrain),
            unconstrain=rebind(self.unconstrain),
            log_prior=rebind(self.log_prior),
            log_likelihood=rebind(self.log_likelihood),
            sample_prior=rebind(self.sample_prior),
            unravel=Partial(_unravel, self._program, coordinates),
            initial=initial
            if coordinates is None
            else to_y(coordinates, initial[None])[0],
            coordinates=coordinates,
            modes=None,
            sample=None,
            **changes,
        )


def target_from_model(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    key: Key | None = None,
    init_strategy: Callable = init_to_uniform,
    name: str | None = None,
    standardise: Pilot | None = None,
) -> ModelTarget:
    """The posterior of a NumPyro model as a target.

    Floating-point leaves and arrays among the arguments are data: they ride in the
    target's callables as array leaves. Integers, booleans, strings and other objects
    are static, as they usually decide shapes. A model that cannot be traced with its
    data as arguments, for it computes with their values in Python or NumPy, gets them
    as constants: all of them are static then, and new data compile anew.

    Deterministic sites that depend on a site that is summed out have no value at a
    point: ``constrain`` leaves them out, with a warning.

    The prior is the product of the continuous latent sites, the log-determinants of
    their transforms included; the likelihood is all the rest, summed over discrete
    sites. Where a continuous site's prior depends on one of these, there is no prior
    alone. ``numpyro.factor`` sites are observed and so belong to the likelihood. With
    `factor`, `handlers.scale` or `handlers.mask` log Z is that of the density so
    modified; a scaled or masked latent site leaves no normalised prior, and the three
    prior fields are then None.

    Values of ``param`` and ``mutable`` sites are frozen as of this call.

    Args:
        model: a NumPyro model.
        model_args: its positional arguments.
        model_kwargs: its keyword arguments, or None.
        key: consumed to find a valid initial point; typed or raw, by default
            ``jax.random.key(0)``. It does not influence the energy.
        init_strategy: passed on to NumPyro's ``initialize_model``.
        name: short identifier used in tables; by default the model's name.
        standardise: a pilot, such as ``ds.prior_draws()``, ``ds.laplace()`` or
            ``ds.short_mcmc()``, whose draws, of the prior or the posterior, give affine
            coordinates in which that is about a unit normal; None for NumPyro's
            unconstrained ones.

    Returns:
        A :class:`ModelTarget` with ``log_z=None``.

    Raises:
        ValueError: when an argument is neither array, number nor hashable, and for
            plates with a subsample_size.
        RuntimeError: when the model has no continuous latent site. NumPyro's own errors
            (no valid initial point, a discrete site that cannot be enumerated, a Delta
            latent, ...) pass through, with a note where they name neither site nor
            remedy.

    Sources: NumPyro 0.22, `numpyro.infer.util` (`initialize_model`, `constrain_fn`).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from diffsamp.numpyro import target_from_model
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ...     numpyro.deterministic("variance", scale**2)
        ...     numpyro.sample("obs", dist.Normal(0.0, scale), obs=y)
        >>> target = target_from_model(model, (jnp.array([0.3, -0.5]),))
        >>> target.dim, target.site_names
        (1, ('scale',))
        >>> sorted(target.constrain(jnp.zeros(1)))
        ['scale', 'variance']
    """
    key = jax.random.key(0) if key is None else key
    for_pilot = jax.random.fold_in(as_key(key), 1)
    model_kwargs = {} if model_kwargs is None else dict(model_kwargs)
    model_args = tuple(model_args)
    data, structure = _split_data(model_args, model_kwargs)
    found = functools.partial(_initialize, key, model, init_strategy)
    try:
        try:
            info, start = found(data, structure)
        except _NEEDS_VALUES:
            data, structure = (), _all_static(model_args, model_kwargs)
            info, start = found(data, structure)
    except (ImportError, RuntimeError, ValueError) as error:
        _explain(error, key, model, init_strategy, model_args, model_kwargs)
        raise
    name = str(getattr(model, "__name__", "model")) if name is None else name
    if not start:
        raise RuntimeError(
            f"model {name!r} has no continuous latent site, so there is nothing to "
            "sample; check that its sites are not all observed"
        )
    _check_plates(info.model_trace)
    # One dtype for all sites makes `unravel` polymorphic: a target made in 32 bits can
    # be evaluated in 64.
    dtype = jnp.result_type(float)
    start = {site: jnp.asarray(z, dtype) for site, z in start.items()}
    initial, unravel = ravel_pytree(start)

    latent = latent_sites(info.model_trace)
    frozen = {
        site: message["value"]
        for site, message in info.model_trace.items()
        if message["type"] in ("param", "mutable")
    }
    summed_out = sorted(set(latent) - set(start))
    is_enumerated, without_value = bool(summed_out), frozenset()
    if is_enumerated:
        without_value = undetermined(key, model, model_args, model_kwargs)
    if without_value:
        warnings.warn(
            f"deterministic sites {', '.join(sorted(without_value))} depend on what is "
            f"summed out ({', '.join(summed_out)}), and are left out; draw that with "
            "Predictive(model, samples, infer_discrete=True), and them with another "
            "Predictive that is given both",
            UserWarning,
            stacklevel=2,
        )
    improper = tuple(s for s in sorted(latent) if _is_improper(latent[s]["fn"]))
    is_modified = any(
        message["scale"] is not None or _is_masked(message["fn"])
        for message in latent.values()
    )

    program = _Program(
        model=handlers.substitute(model, data=frozen) if frozen else model,
        potential_fn=info.potential_fn,
        unravel=unravel,
        site_names=tuple(sorted(start)),
        structure=structure,
        initial=initial,
        without_value=without_value,
        identity=_identity(model, frozen, unravel, structure),
    )

    def bind(function):
        return Partial(function, program, data, None)

    target = ModelTarget(
        energy=bind(_energy),
        dim=int(initial.size),
        name=name,
        constrain=bind(_constrain),
        unravel=Partial(_unravel, program, None),
        unconstrain=bind(_unconstrain),
        site_names=program.site_names,
        improper_sites=improper,
        is_proper=not improper,
        initial=initial,
        _program=program,
    )
    is_split = not (improper or is_modified)
    if is_split and is_enumerated:
        is_split = not _depends_on_enumerated(program, data)
    if is_split:
        sample_prior = bind(_sample_prior)
        likelihood = _rest_of_log_joint if is_enumerated else _log_likelihood
        target = dataclasses.replace(
            target,
            log_prior=bind(_log_prior),
            log_likelihood=bind(likelihood),
            sample_prior=sample_prior if _can_sample(sample_prior) else None,
        )
    if standardise is None:
        return target
    draws, _ = standardise(for_pilot, target)
    return target.standardised(affine_from(draws))


def _initialize(key, model, init_strategy, data, structure):
    """NumPyro's ModelInfo and a valid initial point {site: unconstrained value}.

    One compiled program instead of hundreds of small ones: 1 s instead of 6 s for a
    mixture model. What NumPyro checks on concrete values only (and the values of
    `param` sites) needs its own, eager, run; it is repeated where that matters.

    The trace in the ModelInfo may hold tracers: use its names and types, not its
    values, unless the model has `param` or `mutable` sites.
    """
    kept = []

    def run(key, data):
        # Compiled, data are arguments: a model that needs their values in Python
        # fails here and not at the first energy.
        args, kwargs = _merge_data(data, structure)
        info = initialize_model(
            key,
            model,
            init_strategy=init_strategy,
            dynamic_args=True,
            model_args=args,
            model_kwargs=kwargs,
        )
        kept.append(info)
        return info.param_info

    found = jax.jit(run)(key, data)
    is_valid = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))
    types = {message["type"] for message in kept[-1].model_trace.values()}
    if not is_valid or types & {"param", "mutable"}:
        found = run(key, data)
    return kept[-1], found.z


def _again(model, args, kwargs, name, start, coordinates, log_z, modes, sample):
    """A target that was pickled."""
    where = functools.partial(init_to_value, values=start)
    target = target_from_model(model, args, kwargs, init_strategy=where, name=name)
    target = target.standardised(coordinates)
    return dataclasses.replace(target, log_z=log_z, modes=modes, sample=sample)


def undetermined(key: Key, model: Callable, args: tuple, kwargs: dict) -> frozenset:
    """Deterministic sites that depend on discrete latent ones.

    Args:
        key: for values of the sites, which do not matter.
        model: a NumPyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    start = handlers.substitute(handlers.seed(model, key), substitute_fn=init_to_sample)
    trace = handlers.trace(start).get_trace(*args, **kwargs)
    sites = latent_sites(trace)
    latent = {site: message["value"] for site, message in sites.items()}
    discrete = {s: v for s, v in latent.items() if sites[s]["fn"].support.is_discrete}
    if not discrete:
        return frozenset()

    def deterministic(**values):
        fixed = handlers.substitute(handlers.seed(model, key), data=latent | values)
        trace = handlers.trace(fixed).get_trace(*args, **kwargs)
        return {k: m["value"] for k, m in trace.items() if m["type"] == "deterministic"}

    found = eval_provenance(deterministic, **discrete)
    return frozenset(k for k, sources in found.items() if any(jax.tree.leaves(sources)))


def latent_sites(model_trace) -> dict[str, Any]:
    """What a trace holds of sites that are sampled and not observed."""
    return {
        site: message
        for site, message in model_trace.items()
        if message["type"] == "sample" and not message["is_observed"]
    }


def subsampled_plates(model_trace) -> list[tuple[str, int, int]]:
    """Plates that take some of their rows at random: name, rows, rows taken."""
    plates = {
        site: message["args"]
        for site, message in model_trace.items()
        if message["type"] == "plate"
    }
    return [
        (site, size, taken)
        for site, (size, taken) in plates.items()
        if taken is not None and taken < size
    ]


def _check_plates(model_trace) -> None:
    for site, size, taken in subsampled_plates(model_trace):
        raise ValueError(
            f"plate {site!r} takes {taken} of {size} rows at random; pass all data and "
            "drop subsample_size: the energy of a mini-batch is a random number, and "
            "weights and log Z need the true one (NumPyro's SVI and HMCECS work with "
            "mini-batches)"
        )


def _explain(error, key, model, init_strategy, args, kwargs) -> None:
    """Adds to NumPyro's error what it does not say."""
    if "funsor" in str(error):
        error.add_note("diffsamp: pip install 'diffsamp[enum]'")
    if "valid initial parameters" not in str(error):
        return
    start = handlers.substitute(handlers.seed(model, key), substitute_fn=init_strategy)
    found = handlers.trace(start).get_trace(*args, **kwargs)
    latent = {s: jnp.asarray(m["value"]) for s, m in latent_sites(found).items()}
    moving = {s: v for s, v in latent.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    def log_prob(values, site):
        fixed = handlers.substitute(handlers.seed(model, key), data=latent | values)
        message = handlers.trace(fixed).get_trace(*args, **kwargs)[site]
        return jnp.sum(message["fn"].log_prob(message["value"]))

    def not_finite(function):
        return [
            site
            for site, message in found.items()
            if message["type"] == "sample"
            and not bool(jnp.isfinite(ravel_pytree(function(moving, site))[0]).all())
        ]

    what, bad = "density", not_finite(log_prob)
    if not bad:
        what, bad = "gradient", not_finite(jax.grad(log_prob))
    where = f"at sites: {', '.join(bad)}" if bad else "at some of the points tried"
    error.add_note(
        f"diffsamp: the {what} is not finite {where}; check data and priors there, or "
        "pass an init_strategy, such as init_to_value, that starts where it is finite."
    )


@dataclasses.dataclass(frozen=True)
class _Structure:
    """What of a model's arguments is static: their tree and the non-float leaves."""

    treedef: Any
    static: tuple[tuple[int, Hashable], ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """The static part of a target's callables; equal programs share compiled code."""

    model: Callable
    potential_fn: Callable
    unravel: Callable
    site_names: tuple[str, ...]
    structure: _Structure
    initial: Array
    without_value: frozenset[str]
    identity: Hashable

    def __eq__(self, other):
        return isinstance(other, _Program) and self.identity == other.identity

    def __hash__(self):
        return hash(self.identity)

    def arguments(self, data) -> tuple[tuple, dict]:
        return _merge_data(data, self.structure)


def _identity(model, frozen, unravel, structure) -> Hashable:
    """Equal for two programs exactly when they compute the same function of the data.

    Frozen `param` values live inside the program, so such programs equal only
    themselves.
    """
    if frozen or not isinstance(model, Hashable):
        return object()
    return (model, unravel, structure)


_DATA_TYPES = (float, complex, np.floating, np.ndarray, jax.Array)
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class _Constant:
    """An array as a static value, compared by content."""

    def __init__(self, array):
        self.array = array
        host = np.asarray(array)
        self._content = (host.dtype.str, host.shape, host.tobytes())

    def __eq__(self, other):
        return isinstance(other, _Constant) and self._content == other._content

    def __hash__(self):
        return hash(self._content)

    def __repr__(self):
        return f"array of shape {list(np.shape(self.array))}"


def _all_static(args: tuple, kwargs: dict) -> _Structure:
    leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
    is_array = [isinstance(x, np.ndarray | jax.Array) for x in leaves]
    constants = (
        _Constant(x) if array else x for x, array in zip(leaves, is_array, strict=True)
    )
    return _Structure(treedef, tuple(enumerate(constants)))


def _split_data(args: tuple, kwargs: dict) -> tuple[tuple, _Structure]:
    leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
    is_data = [isinstance(x, _DATA_TYPES) for x in leaves]
    for x, dynamic in zip(leaves, is_data, strict=True):
        if not dynamic and not isinstance(x, Hashable):
            raise ValueError(
                "model_args and model_kwargs must hold arrays, numbers and hashable "
                f"objects, got {type(x)}; pass its values as arrays"
            )
    data = tuple(x for x, dynamic in zip(leaves, is_data, strict=True) if dynamic)
    static = tuple(
        (i, x)
        for i, (x, dynamic) in enumerate(zip(leaves, is_data, strict=True))
        if not dynamic
    )
    return data, _Structure(treedef, static)


def _merge_data(data: tuple, structure: _Structure) -> tuple[tuple, dict]:
    static, leaves = dict(structure.static), iter(data)
    size = len(data) + len(static)
    merged = [static[i] if i in static else next(leaves) for i in range(size)]
    merged = [x.array if isinstance(x, _Constant) else x for x in merged]
    return jax.tree.unflatten(structure.treedef, merged)


# Eager calls of a NumPyro model cost hundreds of small compilations; `inline` leaves no
# trace of this in a caller's own compiled code.
_compiled = functools.partial(jax.jit, inline=True)


def _unconstrained(coordinates: Coordinates | None, y: Array) -> tuple[Array, Array]:
    """NumPyro's unconstrained point x of y, and the log-determinant of dx/dy."""
    if coordinates is None:
        return y, jnp.zeros((), y.dtype)
    return coordinates.forward_and_log_det(y)


def _unravel(
    program: _Program, coordinates: Coordinates | None, y: Array
) -> dict[str, Array]:
    return program.unravel(y if coordinates is None else coordinates.forward(y))


@_compiled
def _energy(
    program: _Program, data: tuple, coordinates: Coordinates | None, y: Array
) -> Array:
    """Minus the log joint density of y; NaN counts as no density."""
    args, kwargs = program.arguments(data)
    x, log_det = _unconstrained(coordinates, y)
    value = program.potential_fn(*args, **kwargs)(program.unravel(x)) - log_det
    return jnp.where(jnp.isnan(value), jnp.inf, value)


@_compiled
def _constrain(
    program: _Program, data: tuple, coordinates: Coordinates | None, y: Array
) -> dict[str, Array]:
    """Latent and deterministic sites at a flat point [D].

    Always by replay: supports may move with other sites, and NumPyro does not notice
    all of those that do. The seed only serves sites that are not determined by x.
    """
    args, kwargs = program.arguments(data)
    sites = constrain_fn(
        handlers.seed(program.model, jax.random.key(0)),
        args,
        kwargs,
        _unravel(program, coordinates, y),
        return_deterministic=True,
    )
    return {k: v for k, v in sites.items() if k not in program.without_value}


@_compiled
def _unconstrain(
    program: _Program,
    data: tuple,
    coordinates: Coordinates | None,
    sites: Mapping[str, Array],
) -> Array:
    args, kwargs = program.arguments(data)
    latent = {site: jnp.asarray(sites[site]) for site in program.site_names}
    x = ravel_pytree(unconstrain_fn(program.model, args, kwargs, latent))[0]
    return x if coordinates is None else coordinates.inverse(x)


def _site_log_probs(program: _Program, data: tuple, x: Array) -> dict[str, Array]:
    """Log-density of each site at x; `_<site>_log_det` are those of the transforms.

    A trace *around* NumPyro's potential sees every site the potential sums, so the
    parts add up to it by construction.
    """
    args, kwargs = program.arguments(data)
    potential = program.potential_fn(*args, **kwargs)
    with handlers.trace() as trace:
        potential(program.unravel(x))
    log_probs = {}
    for site, message in trace.items():
        if message["type"] == "sample":
            # as numpyro.infer.util.compute_log_probs
            extra = (message["intermediates"],) if message["intermediates"] else ()
            log_prob = message["fn"].log_prob(message["value"], *extra)
            scale = 1.0 if message["scale"] is None else message["scale"]
            log_probs[site] = jnp.sum(scale * log_prob)
    return log_probs


def _prior_sites(program: _Program) -> set[str]:
    return {f"_{site}_log_det" for site in program.site_names} | set(program.site_names)


def _no_nan(log_density: Array) -> Array:
    return jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)


@_compiled
def _log_prior(
    program: _Program, data: tuple, coordinates: Coordinates | None, y: Array
) -> Array:
    prior = _prior_sites(program)
    x, log_det = _unconstrained(coordinates, y)
    log_probs = _site_log_probs(program, data, x)
    return _no_nan(sum((v for s, v in log_probs.items() if s in prior), log_det))


@_compiled
def _log_likelihood(
    program: _Program, data: tuple, coordinates: Coordinates | None, y: Array
) -> Array:
    prior = _prior_sites(program)
    x, _ = _unconstrained(coordinates, y)
    log_probs = _site_log_probs(program, data, x)
    zero = jnp.zeros((), y.dtype)
    return _no_nan(sum((v for s, v in log_probs.items() if s not in prior), zero))


@_compiled
def _rest_of_log_joint(
    program: _Program, data: tuple, coordinates: Coordinates | None, y: Array
) -> Array:
    """The likelihood where sites are summed out, which is no sum over sites."""
    log_prior = _log_prior(program, data, coordinates, y)
    return jnp.where(
        jnp.isneginf(log_prior),
        -jnp.inf,
        _no_nan(-_energy(program, data, coordinates, y) - log_prior),
    )


def _depends_on_enumerated(program: _Program, data: tuple) -> bool:
    """Whether a continuous site's prior does; it has a dimension left of all plates."""
    args, kwargs = program.arguments(data)
    with handlers.trace() as trace:
        potential = program.potential_fn(*args, **kwargs)
        jax.eval_shape(lambda x: potential(program.unravel(x)), program.initial)
    sites = [trace[site] for site in program.site_names]
    return any(
        len(site["fn"].batch_shape)
        > max((-frame.dim for frame in site["cond_indep_stack"]), default=0)
        for site in sites
    )


@functools.partial(jax.jit, static_argnums=4, inline=True)
def _sample_prior(
    program: _Program, data: tuple, coordinates: Coordinates | None, key: Key, n: int
) -> Array:
    """Draws of the latent sites in the target's coordinates, [n, D]; consumes key."""
    args, kwargs = program.arguments(data)

    def draw(key):
        model = handlers.seed(program.model, key)
        trace = handlers.trace(model).get_trace(*args, **kwargs)
        flat = {}
        for site in program.site_names:
            support = trace[site]["fn"].support
            flat[site] = dist.biject_to(support).inv(trace[site]["value"])
        x = ravel_pytree(flat)[0]
        return x if coordinates is None else coordinates.inverse(x)

    return jax.vmap(draw)(jax.random.split(key, n))


def _can_sample(sample_prior: Callable) -> bool:
    try:
        jax.eval_shape(lambda key: sample_prior(key, 1), jax.random.key(0))
    except NotImplementedError:
        return False
    return True


def _base_distributions(distribution):
    while distribution is not None:
        yield distribution
        distribution = getattr(distribution, "base_dist", None)


def _is_improper(distribution) -> bool:
    return any(
        isinstance(base, dist.ImproperUniform)
        for base in _base_distributions(distribution)
    )


def _is_masked(distribution) -> bool:
    return any(
        isinstance(base, dist.MaskedDistribution)
        for base in _base_distributions(distribution)
    )
