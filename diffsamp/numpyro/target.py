"""A NumPyro model as a :class:`diffsamp.Target`: energy, parameters, prior.

The energy is NumPyro's own potential in unconstrained space, so it already holds the
log-determinant of every constraining transform and the integral of ``exp(-energy)`` is
the evidence of the model. Nothing here re-implements a model: every value comes from
replaying it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.util import constrain_fn, initialize_model, unconstrain_fn

from diffsamp.types import Array, Key, Target


@dataclasses.dataclass(frozen=True, eq=False)
class ModelTarget(Target):
    """The posterior of a NumPyro model, over its flat unconstrained coordinates.

    Made by :func:`target_from_model`. All callables are `jax.tree_util.Partial` that
    carry the data as array leaves: passed as arguments to compiled code they do not
    recompile for new data of equal shape (see :meth:`with_data`).

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
    """

    unravel: Callable[[Array], dict[str, Array]] | None = None
    unconstrain: Callable[[Mapping[str, Array]], Array] | None = None
    site_names: tuple[str, ...] = ()
    improper_sites: tuple[str, ...] = ()
    is_proper: bool = True
    initial: Array | None = None
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

        def rebind(function):
            return None if function is None else _bind(function, self._program, data)

        return dataclasses.replace(
            self,
            energy=rebind(self.energy),
            constrain=rebind(self.constrain),
            unconstrain=rebind(self.unconstrain),
            log_prior=rebind(self.log_prior),
            log_likelihood=rebind(self.log_likelihood),
            sample_prior=rebind(self.sample_prior),
            log_z=None,
            modes=None,
            sample=None,
        )


def target_from_model(
    model: Callable,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    key: Key | None = None,
    init_strategy: Callable = init_to_uniform,
    name: str | None = None,
) -> ModelTarget:
    """The posterior of a NumPyro model as a target.

    Floating-point leaves and arrays among the arguments are data: they ride in the
    target's callables as array leaves. Integers, booleans, strings and other objects
    are static, as they usually decide shapes. A model that cannot be traced with its
    data as arguments, for it computes with their values in Python or NumPy, gets them
    as constants: all of them are static then, and new data compile anew.

    The prior is the product of the latent sites, the log-determinants of their
    transforms included; the likelihood is everything observed. ``numpyro.factor`` sites
    are observed and so belong to the likelihood. With `factor`, `handlers.scale` or
    `handlers.mask` log Z is that of the density so modified; a scaled or masked latent
    site leaves no normalised prior, and the three prior fields are then None.

    Values of ``param`` and ``mutable`` sites are frozen as of this call.

    Args:
        model: a NumPyro model.
        model_args: its positional arguments.
        model_kwargs: its keyword arguments, or None.
        key: consumed to find a valid initial point; typed or raw, by default
            ``jax.random.key(0)``. It does not influence the energy.
        init_strategy: passed on to NumPyro's ``initialize_model``.
        name: short identifier used in tables; by default the model's name.

    Returns:
        A :class:`ModelTarget` with ``log_z=None``.

    Raises:
        ValueError: when an argument is neither array, number nor hashable.
        RuntimeError: when the model has no continuous latent site. NumPyro's own errors
            (no valid initial point, a discrete site that cannot be enumerated, a Delta
            latent, ...) pass through as they are; see its documentation.

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
    model_kwargs = {} if model_kwargs is None else dict(model_kwargs)
    model_args = tuple(model_args)
    data, structure = _split_data(model_args, model_kwargs)
    found = functools.partial(_initialize, key, model, init_strategy)
    try:
        info, start = found(data, structure)
    except _NEEDS_VALUES:
        data, structure = (), _all_static(model_args, model_kwargs)
        info, start = found(data, structure)
    name = str(getattr(model, "__name__", "model")) if name is None else name
    if not start:
        raise RuntimeError(
            f"model {name!r} has no continuous latent site, so there is nothing to "
            "sample; check that its sites are not all observed"
        )
    # One dtype for all sites makes `unravel` polymorphic: a target made in 32 bits can
    # be evaluated in 64.
    dtype = jnp.result_type(float)
    start = {site: jnp.asarray(z, dtype) for site, z in start.items()}
    initial, unravel = ravel_pytree(start)

    latent = {
        site: message
        for site, message in info.model_trace.items()
        if message["type"] == "sample" and not message["is_observed"]
    }
    frozen = {
        site: message["value"]
        for site, message in info.model_trace.items()
        if message["type"] in ("param", "mutable")
    }
    is_enumerated = any(site not in start for site in latent)
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
        identity=_identity(model, frozen, unravel, structure),
    )
    target = ModelTarget(
        energy=Partial(_energy, program, data),
        dim=int(initial.size),
        name=name,
        constrain=Partial(_constrain, program, data),
        unravel=unravel,
        unconstrain=Partial(_unconstrain, program, data),
        site_names=program.site_names,
        improper_sites=improper,
        is_proper=not improper,
        initial=initial,
        _program=program,
    )
    if improper or is_modified or is_enumerated:
        return target
    sample_prior = Partial(_sample_prior, program, data)
    return dataclasses.replace(
        target,
        log_prior=Partial(_log_prior, program, data),
        log_likelihood=Partial(_log_likelihood, program, data),
        sample_prior=sample_prior if _can_sample(sample_prior) else None,
    )


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


def _bind(function: Partial, program: _Program, data: tuple) -> Partial:
    return Partial(function.func, program, data)


# Eager calls of a NumPyro model cost hundreds of small compilations; `inline` leaves no
# trace of this in a caller's own compiled code.
_compiled = functools.partial(jax.jit, inline=True)


@_compiled
def _energy(program: _Program, data: tuple, x: Array) -> Array:
    """Minus the log joint density in unconstrained space; NaN counts as no density."""
    args, kwargs = program.arguments(data)
    value = program.potential_fn(*args, **kwargs)(program.unravel(x))
    return jnp.where(jnp.isnan(value), jnp.inf, value)


@_compiled
def _constrain(program: _Program, data: tuple, x: Array) -> dict[str, Array]:
    """Latent and deterministic sites at a flat point [D].

    Always by replay: supports may move with other sites, and NumPyro does not notice
    all of those that do. The seed only serves sites that are not determined by x.
    """
    args, kwargs = program.arguments(data)
    return constrain_fn(
        handlers.seed(program.model, jax.random.key(0)),
        args,
        kwargs,
        program.unravel(x),
        return_deterministic=True,
    )


@_compiled
def _unconstrain(program: _Program, data: tuple, sites: Mapping[str, Array]) -> Array:
    args, kwargs = program.arguments(data)
    latent = {site: jnp.asarray(sites[site]) for site in program.site_names}
    return ravel_pytree(unconstrain_fn(program.model, args, kwargs, latent))[0]


def _site_log_probs(program: _Program, data: tuple, x: Array) -> dict[str, Array]:
    """Log-density of each site; `_<site>_log_det` are those of the transforms.

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
def _log_prior(program: _Program, data: tuple, x: Array) -> Array:
    prior = _prior_sites(program)
    log_probs = _site_log_probs(program, data, x)
    zero = jnp.zeros((), x.dtype)
    return _no_nan(sum((v for s, v in log_probs.items() if s in prior), zero))


@_compiled
def _log_likelihood(program: _Program, data: tuple, x: Array) -> Array:
    prior = _prior_sites(program)
    log_probs = _site_log_probs(program, data, x)
    zero = jnp.zeros((), x.dtype)
    return _no_nan(sum((v for s, v in log_probs.items() if s not in prior), zero))


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _sample_prior(program: _Program, data: tuple, key: Key, n: int) -> Array:
    """Draws of the latent sites in unconstrained coordinates, [n, D]; consumes key."""
    args, kwargs = program.arguments(data)

    def draw(key):
        model = handlers.seed(program.model, key)
        trace = handlers.trace(model).get_trace(*args, **kwargs)
        flat = {}
        for site in program.site_names:
            support = trace[site]["fn"].support
            flat[site] = dist.biject_to(support).inv(trace[site]["value"])
        return ravel_pytree(flat)[0]

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
