r"""A trained sampler as global move of a Markov chain that is exact all the same.

Extend the target to paths, pi(x_K) q(x_{0:K-1} | x_K) with q the destruction kernels:
its marginal of x_K is the target, and the sampler proposes from p(x_{0:K}), whatever
the path at hand. With the path weight w the ratio of the two is w / Z, so that the
Metropolis ratio of an independent proposal is w'/w. With n proposals at once one is
picked in proportion to its weight and accepted with probability

    min(1, sum_i w_i / (sum_i w_i - w_J + w)),

the multiple-try rule for independent proposals (Liu, Liang, Wong 2000; Martino 2018,
eq. 21), which for n = 1 is the former. It leaves the target invariant for any sampler,
even an untrained one.

A local kernel moves x_K alone. The path that was stored does not lead there: it has to
be drawn anew from q( . | x_K), which is a Gibbs step of the extended target, and w with
it. To keep the old w is not the same chain and is biased.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import constrain_fn, initialize_model, transform_fn
from numpyro.util import is_prng_key

from diffsamp.energies import as_key
from diffsamp.numpyro.coordinates import Coordinates, energy_in
from diffsamp.numpyro.target import latent_sites, undetermined
from diffsamp.sampler import Sampler
from diffsamp.types import Array, ArrayLike, Params, PyTree, as_count

NUM_STARTS = 64


class DiffusionKernelState(NamedTuple):
    """State of one chain.

    Attributes:
        z: unconstrained sites, or whatever ``potential_fn`` takes.
        potential_energy: at z, [].
        log_weight: of the path at hand, which ends in z, [].
        accept_prob: of the last global move, [].
        mean_accept_prob: mean of it since warm-up ended (or began), [].
        diverging: whether the last local move diverged, [].
        i: number of moves since then, [].
        rng_key: key of the next move.
        local_state: state of the local kernel, or ().
    """

    z: PyTree
    potential_energy: Array
    log_weight: Array
    accept_prob: Array
    mean_accept_prob: Array
    diverging: Array
    i: Array
    rng_key: Array
    local_state: Any = ()


class DiffusionKernel(MCMCKernel):
    """Independence Metropolis on paths of a sampler, for ``numpyro.infer.MCMC``.

    Args:
        sampler: the sampler, over flat unconstrained points [D] (sites by name, as
            `target_from_model` has them).
        params: its parameters, trained or not; `init` does not train.
        model: a NumPyro model; or
        potential_fn: minus log density of what ``init_params`` is, of flat points [D]
            where there are none.
        num_proposals: paths per move, of which one is picked.
        local_kernel: a kernel of NumPyro's with the same model or potential, such as
            ``NUTS(model)``, that makes one move after each global one. It has to have
            `refresh`: HMC, NUTS and what is built of them have it.
        coordinates: the map from the sampler's coordinates to the unconstrained ones,
            where it was trained in others (`DiffusionSampler` does).
        starts: points [M, D] in unconstrained coordinates, found without the sampler;
            None for its own draws. A chain starts from one of 64, picked by the weight
            of its path: if one lies where the sampler has too little, from there, so
            that chains which cannot get away disagree with the others, and R-hat shows
            it (`DiffusionSampler` gives its probe where it is not trusted).
        init_strategy: as in NumPyro; for the local kernel's and the model's set-up.

    Raises:
        ValueError: when not exactly one of model and potential_fn is given,
            num_proposals is below 1, the sampler has no valid weights, params are not
            its own, starts are not finite points [M, D], or local_kernel is of another
            model or potential or cannot be moved to another point; in `init` when the
            sampler's dimension or a start is not that of the model, and in a block of
            Gibbs where the support of a site depends on other sites.

    Example:
        >>> import jax, jax.numpy as jnp, diffsamp as ds
        >>> from numpyro.infer import MCMC
        >>> from diffsamp.numpyro import DiffusionKernel
        >>> sampler = ds.samplers.dis(dim=2, num_steps=4)
        >>> kernel = DiffusionKernel(
        ...     sampler,
        ...     sampler.init(jax.random.key(0)),
        ...     potential_fn=lambda x: 0.5 * jnp.sum(x**2),
        ... )
        >>> mcmc = MCMC(kernel, num_warmup=0, num_samples=50, progress_bar=False)
        >>> mcmc.run(jax.random.key(1))
        >>> mcmc.get_samples().shape
        (50, 2)
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        num_proposals: int = 1,
        local_kernel: MCMCKernel | None = None,
        coordinates: Coordinates | None = None,
        starts: ArrayLike | None = None,
        init_strategy: Callable = init_to_uniform,
    ):
        if (model is None) == (potential_fn is None):
            raise ValueError("pass either model or potential_fn, and not both")
        num_proposals = as_count("num_proposals", num_proposals)
        if not sampler.has_weights:
            raise ValueError(f"no valid weight: {sampler.why_no_weight}")
        sampler.check_params(params)
        if local_kernel is not None:
            _check_local(local_kernel, model, potential_fn)
        if starts is not None:
            starts = np.asarray(starts)
            is_right = starts.ndim == 2 and starts.shape[1] == sampler.dim
            if not (is_right and len(starts) and np.all(np.isfinite(starts))):
                raise ValueError(
                    f"starts must be finite points [M, {sampler.dim}] in unconstrained "
                    f"coordinates, got shape {list(starts.shape)}"
                )
        self._sampler = sampler
        self._starts = starts
        self._params = params
        self._model = model
        self._potential_fn = potential_fn
        self._num_proposals = num_proposals
        self._local_kernel = local_kernel
        self._coordinates = coordinates
        self._init_strategy = init_strategy
        self._num_warmup = 0
        self._is_block = False
        self._potential_fn_gen = None
        self._transforms: dict[str, Any] | None = None
        self._without_value: frozenset[str] | None = None
        self._local: Any = None
        # NumPyro calls `init` again, even with a state at hand, while this is None.
        self._sample_fn = None

    @property
    def model(self):
        return self._model

    @property
    def sample_field(self):
        return "z"

    @property
    def default_fields(self):
        return ("z", "diverging")

    def get_diagnostics_str(self, state) -> str:
        if jnp.ndim(state.mean_accept_prob):
            return f"acc. prob={float(jnp.mean(state.mean_accept_prob)):.2f}"
        return f"acc. prob={state.mean_accept_prob:.2f}"

    def init(
        self, rng_key, num_warmup, init_params=None, model_args=(), model_kwargs=None
    ):
        """State of a chain, or of as many as there are keys.

        Args:
            rng_key: one key, or a batch of them.
            num_warmup: moves after which the mean acceptance starts anew.
            init_params: a start in unconstrained coordinates, with a leading axis of
                chains where there are several keys; None for draws of the sampler. In a
                block of Gibbs, which speaks of sites, in constrained ones.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.
        """
        model_kwargs = {} if model_kwargs is None else model_kwargs
        self._num_warmup = num_warmup
        one = is_prng_key(rng_key)
        first = rng_key if one else rng_key[0]
        template = self._template(first, model_args, model_kwargs, init_params, one)
        flat, unravel = ravel_pytree(template)
        if flat.size != self._sampler.dim:
            raise ValueError(
                f"the sampler has dim={self._sampler.dim}, the unconstrained sites "
                f"{jax.tree.map(jnp.shape, template)} have {flat.size} numbers; train "
                "it on this model, with data of this size"
            )
        init_params = self._checked_start(init_params, template, one)
        potential = self._flat_potential(model_args, model_kwargs, unravel)
        start = functools.partial(self._start, potential, unravel)
        if one:
            state = start(rng_key, init_params)
        elif init_params is None:
            state = jax.vmap(lambda key: start(key, None))(rng_key)
        else:
            state = jax.vmap(start)(rng_key, init_params)
        if self._local_kernel is not None:
            for_local = _fold(rng_key, 1)
            # HMC cannot be initialised twice for several chains; copies are as new.
            self._local = copy.copy(self._local_kernel)
            local = self._local.init(
                for_local,
                num_warmup,
                init_params=state.z,
                model_args=model_args,
                model_kwargs=model_kwargs,
            )
            state = state._replace(local_state=local)
        self._sample_fn = self._global_move
        return state

    def sample(self, state, model_args, model_kwargs):
        """One global move and, with a local kernel, one local move.

        Args:
            state: a `DiffusionKernelState`.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.
        """
        model_kwargs = {} if model_kwargs is None else model_kwargs
        one = is_prng_key(state.rng_key)
        along = functools.partial(
            self._global_move, self._generator(model_args, model_kwargs)
        )
        if not one:
            along = jax.vmap(along)
        state = along(state)
        if self._local_kernel is None:
            return state
        local = state.local_state._replace(z=state.z)
        local = self._refreshed(local, one, model_args, model_kwargs)
        local = self._local.sample(local, model_args, model_kwargs)
        diverging = getattr(local, "diverging", state.diverging)
        state = state._replace(z=local.z, local_state=local, diverging=diverging)
        return self.refresh(state, model_args, model_kwargs)

    def refresh(self, state, model_args, model_kwargs):
        """Draws the path anew, backwards from z, and its weight with it.

        Args:
            state: a `DiffusionKernelState` of which z or the target has changed.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.
        """
        model_kwargs = {} if model_kwargs is None else model_kwargs
        generator = self._generator(model_args, model_kwargs)

        def redraw(state):
            flat, unravel = ravel_pytree(state.z)
            key, for_path = jax.random.split(as_key(state.rng_key))
            log_weight, energy = self._trace(for_path, generator(unravel), flat)
            return state._replace(
                log_weight=log_weight,
                potential_energy=energy,
                rng_key=_like(key, state.rng_key),
            )

        if is_prng_key(state.rng_key):
            return redraw(state)
        return jax.vmap(redraw)(state)

    def wrap_model(self, wrapper):
        """A copy whose model is ``wrapper(model)``, for `numpyro.infer.gibbs.Gibbs`."""
        if self._model is None:
            raise ValueError("a kernel built from a potential_fn has no model to wrap")
        kernel = copy.copy(self)
        vars(kernel).update(dict.fromkeys(_MADE_BY_INIT))
        kernel._model = wrapper(self._model)
        if self._local_kernel is not None:
            kernel._local_kernel = self._local_kernel.wrap_model(wrapper)
        kernel._is_block = True
        return kernel

    def get_constrain_fn(self, model_args, model_kwargs):
        """Constrained sites of z by their transforms alone; the rest needs no model."""
        if self._model is None:
            return _identity
        if self._transforms is None:
            return self.postprocess_fn(model_args, model_kwargs)
        return functools.partial(transform_fn, self._transforms)

    def postprocess_fn(self, model_args, model_kwargs):
        """Constrained and deterministic sites of z, by replaying the model.

        Deterministic ones that depend on sites that are summed out are left out.
        """
        if self._model is None:
            return _identity
        return functools.partial(
            _constrain,
            self._model,
            model_args,
            model_kwargs,
            self._without_value or frozenset(),
        )

    def __getstate__(self):
        return self.__dict__ | dict.fromkeys(_MADE_BY_INIT)

    # -- inside -----------------------------------------------------------------------

    def _template(self, key, model_args, model_kwargs, init_params, one):
        """Something of the structure of z."""
        if self._model is None:
            if init_params is None:
                return jnp.zeros(self._sampler.dim)
            return init_params if one else jax.tree.map(lambda a: a[0], init_params)
        info = initialize_model(
            _fold(key, 2),
            self._model,
            init_strategy=self._init_strategy,
            dynamic_args=True,
            model_args=model_args,
            model_kwargs=model_kwargs,
        )
        self._potential_fn_gen = info.potential_fn
        latent = latent_sites(info.model_trace)
        self._transforms = _fixed_transforms(latent)
        self._without_value = frozenset()
        if any(site["fn"].support.is_discrete for site in latent.values()):
            self._without_value = undetermined(
                _fold(key, 3), self._model, model_args, model_kwargs
            )
        return info.param_info.z

    def _checked_start(self, init_params, template, one):
        """What is given, in unconstrained coordinates; None if nothing is."""
        if self._is_block and self._transforms is None:
            raise ValueError(
                f"the supports of sites {sorted(template)} depend on other sites, "
                "which a block of Gibbs cannot follow; use the kernel for all sites"
            )
        if init_params is None:
            return None
        if self._is_block:
            assert self._transforms is not None
            init_params = transform_fn(self._transforms, init_params, invert=True)
        shapes = jax.tree.map(jnp.shape, init_params)
        expected = jax.tree.map(jnp.shape, template)
        if not one:
            shapes = jax.tree.map(lambda a: jnp.shape(a)[1:], init_params)
        if shapes != expected:
            raise ValueError(
                "init_params must be unconstrained values of shapes "
                f"{expected}{'' if one else ' of every chain'}, got {shapes}"
            )
        return init_params

    def _generator(self, model_args, model_kwargs):
        return functools.partial(self._flat_potential, model_args, model_kwargs)

    def _flat_potential(self, model_args, model_kwargs, unravel):
        """The energy of a flat unconstrained point; NaN counts as no density."""
        potential = self._potential_fn
        if potential is None:
            assert self._potential_fn_gen is not None, "`init` comes first"
            potential = self._potential_fn_gen(*model_args, **model_kwargs)

        def energy(x):
            value = potential(unravel(x))
            return jnp.where(jnp.isnan(value), jnp.inf, value)

        return energy

    def _own_energy(self, energy):
        """The same in the sampler's coordinates."""
        if self._coordinates is None:
            return energy
        return functools.partial(energy_in, self._coordinates, energy)

    def _draw(self, key, energy, num):
        """Points [num, D], log-weights and energies of fresh paths."""
        final = jax.vmap(self._sampler.final, in_axes=(None, 0, None))(
            self._params, jax.random.split(key, num), self._own_energy(energy)
        )
        y, log_weight = final.x, final.log_weight
        assert log_weight is not None
        x = y
        if self._coordinates is not None:
            x = jax.vmap(self._coordinates.forward)(y)
        log_weight = jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)
        return x, log_weight, jax.vmap(self._in_z)(final.energy, y)

    def _traced(self, key, energy, num):
        """Some of the given starts, and log-weights of paths traced back from them."""
        for_points, for_paths = jax.random.split(key)
        points = jax.random.choice(for_points, jnp.asarray(self._starts), (num,))
        trace = jax.vmap(lambda key, x: self._trace(key, energy, x)[0])
        return points, trace(jax.random.split(for_paths, num), points)

    def _trace(self, key, energy, x):
        """Log-weight of a path drawn backwards from x, and the energy of x."""
        y = x if self._coordinates is None else self._coordinates.inverse(x)
        path = self._sampler.trace_back(self._params, key, y, self._own_energy(energy))
        log_weight = jnp.where(jnp.isnan(path.log_weight), -jnp.inf, path.log_weight)
        return log_weight, self._in_z(path.energy, y)

    def _in_z(self, energy, y):
        """The energy in unconstrained coordinates, of y in the sampler's."""
        if self._coordinates is None:
            return energy
        _, log_det = self._coordinates.forward_and_log_det(y)
        return energy + log_det.astype(energy.dtype)

    def _start(self, potential, unravel, key, init_params):
        key_next, for_start, for_path, for_pick = jax.random.split(as_key(key), 4)
        if init_params is None:
            if self._starts is None:
                points, log_weight, _ = self._draw(for_start, potential, NUM_STARTS)
            else:
                points, log_weight = self._traced(for_start, potential, NUM_STARTS)
            flat = points[jax.random.categorical(for_pick, log_weight)]
        else:
            flat = ravel_pytree(init_params)[0]
        flat = flat.astype(jnp.result_type(float))
        log_weight, energy = self._trace(for_path, potential, flat)
        zero = jnp.zeros((), log_weight.dtype)
        return DiffusionKernelState(
            z=unravel(flat),
            potential_energy=energy,
            log_weight=log_weight,
            accept_prob=zero,
            mean_accept_prob=zero,
            diverging=jnp.zeros((), bool),
            i=jnp.zeros((), jnp.int32),
            rng_key=_like(key_next, key),
        )

    def _global_move(self, generator, state):
        flat, unravel = ravel_pytree(state.z)
        energy = generator(unravel)
        key, for_paths, for_pick, for_choice = jax.random.split(
            as_key(state.rng_key), 4
        )
        x, log_weight, values = self._draw(for_paths, energy, self._num_proposals)
        pick = jax.random.categorical(for_pick, log_weight)
        others = jnp.where(jnp.arange(len(log_weight)) == pick, -jnp.inf, log_weight)
        stay = jax.nn.logsumexp(jnp.append(others, state.log_weight))
        log_ratio = jax.nn.logsumexp(log_weight) - stay
        accept_prob = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(log_ratio))
        accept_prob = jnp.minimum(accept_prob, 1.0).astype(state.accept_prob.dtype)
        accepted = jax.random.uniform(for_choice) < accept_prob

        def choose(new, old):
            return jnp.where(accepted, new.astype(old.dtype), old)

        i = state.i + 1
        n = jnp.where(i > self._num_warmup, i - self._num_warmup, i)
        step = (accept_prob - state.mean_accept_prob) / n.astype(accept_prob.dtype)
        return state._replace(
            z=unravel(choose(x[pick], flat)),
            potential_energy=choose(values[pick], state.potential_energy),
            log_weight=choose(log_weight[pick], state.log_weight),
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + step,
            i=i,
            rng_key=_like(key, state.rng_key),
        )

    def _refreshed(self, local, one, model_args, model_kwargs):
        refresh = functools.partial(
            self._local.refresh,
            model_args=model_args,
            model_kwargs=model_kwargs,
        )
        return refresh(local) if one else jax.vmap(refresh)(local)


# Of the model and data at hand: another `init` makes them again.
_MADE_BY_INIT = (
    "_sample_fn",
    "_potential_fn_gen",
    "_transforms",
    "_without_value",
    "_local",
)


def _check_local(local_kernel, model, potential_fn):
    """Of another density, or left where the path began, it would not be exact."""
    is_kernel = isinstance(local_kernel, MCMCKernel)
    if not is_kernel or type(local_kernel).refresh is MCMCKernel.refresh:
        raise ValueError(
            "local_kernel must be a NumPyro kernel that can be moved to another "
            f"point (`refresh`), such as NUTS; got {type(local_kernel).__name__}"
        )
    other = getattr(local_kernel, "model", None)
    if other != model:
        raise ValueError(
            f"local_kernel must have the same model, {model}, got one of {other}"
        )
    other = getattr(local_kernel, "_potential_fn", potential_fn)
    if other != potential_fn:
        raise ValueError(
            f"local_kernel must have the same potential_fn, {potential_fn}, got one of "
            f"{other}"
        )


def _fixed_transforms(latent):
    """From unconstrained sites to their supports, or None where these may move."""
    transforms = {}
    for name, site in latent.items():
        support = site["fn"].support
        if support.is_discrete:
            continue
        transforms[name] = biject_to(support)
        while support is not None:
            bounds = [getattr(support, f"{end}_bound", 0) for end in ("lower", "upper")]
            if not all(isinstance(bound, int | float) for bound in bounds):
                return None
            support = getattr(support, "base_constraint", None)
    return transforms


def _identity(z):
    return z


def _constrain(model, model_args, model_kwargs, without_value, z):
    seeded = handlers.seed(model, jax.random.key(0))
    kwargs = {} if model_kwargs is None else model_kwargs
    sites = constrain_fn(seeded, model_args, kwargs, z, return_deterministic=True)
    return {name: v for name, v in sites.items() if name not in without_value}


def _fold(key, number):
    """`fold_in` of one key or of each of several, raw or typed."""
    if is_prng_key(key):
        return jax.random.fold_in(key, number)
    return jax.vmap(lambda k: jax.random.fold_in(k, number))(key)


def _like(key, given):
    """A typed key in the form of a given one, so that states keep their types."""
    if jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.key_data(key).astype(given.dtype)
