"""A diffusion sampler as a guide for NumPyro's ``SVI``.

With D = log p_0(x_0) + sum_k [log p(x_{k+1} | x_k) - log q(x_k | x_{k+1})] the guide
draws x_K and adds the factor D to its log-density, so that the ELBO of ``SVI`` is the
mean of log rho(x_K) - D, the path-space bound, and its gradient that of
`objectives.reverse_kl`: differentiated through the simulation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import Unit
from numpyro.distributions.transforms import UnpackTransform
from numpyro.infer import init_to_uniform
from numpyro.infer.autoguide import AutoContinuous

from diffsamp.numpyro.recipe import default_sampler
from diffsamp.numpyro.target import subsampled_plates
from diffsamp.sampler import Sampler

NUM_DRAWS = 2_000


class AutoDiffusion(AutoContinuous):
    """Guide whose draws are the ends of a diffusion sampler's paths.

    Its coordinates are those of `target_from_model`: unconstrained sites sorted by
    name.

    Args:
        model: a NumPyro model.
        sampler: ``(dim, num_steps, loc=, scale=) -> Sampler``.
        num_steps: steps K.
        loc: mean of the reference, a number or D numbers, unconstrained.
        scale: standard deviation of the reference, likewise.
        prefix: of its sites and parameters.
        init_loc_fn: as in NumPyro's guides.

    Raises:
        NotImplementedError: for models with a subsampled plate.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from diffsamp.numpyro import AutoDiffusion
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(1.0, 2.0))
        >>> guide = AutoDiffusion(model, num_steps=4)
        >>> svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 3, progress_bar=False)
        >>> guide.sample_posterior(
        ...     jax.random.key(1), result.params, sample_shape=(5,)
        ... )["x"].shape
        (5,)
    """

    def __init__(
        self,
        model: Callable,
        *,
        sampler: Callable[..., Sampler] = default_sampler,
        num_steps: int = 16,
        loc: Any = 0.0,
        scale: Any = 1.0,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_uniform,
    ):
        self._make_sampler = sampler
        self._num_steps = num_steps
        self._reference = {"loc": loc, "scale": scale}
        self._sampler: Sampler | None = None
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    @property
    def sampler(self) -> Sampler:
        """The sampler, once the guide has seen the model."""
        if self._sampler is None:
            raise RuntimeError("the guide has not seen its model yet; run SVI first")
        return self._sampler

    def params_of(self, params: dict[str, Any]) -> Any:
        """Parameters of `sampler`, of those of ``SVI``."""
        return params[f"{self.prefix}_sampler"]

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        assert self.prototype_trace is not None
        for name, _, _ in subsampled_plates(self.prototype_trace):
            raise NotImplementedError(
                f"plate {name!r} is subsampled: the energy of a mini-batch would bias "
                "the paths; use all data"
            )
        self._init_latent = ravel_pytree(self._init_locs)[0]
        shapes = {k: jnp.shape(v) for k, v in self._init_locs.items()}
        unpack = functools.partial(_unpack, shapes)
        self._unpack_latent = UnpackTransform(unpack, _pack)
        self._sampler = self._make_sampler(
            self.latent_dim, self._num_steps, **self._reference
        )

    def _get_posterior(self):
        raise NotImplementedError("the density of the end of a path is not known")

    def _energy(self, args, kwargs):
        """What a network that is shown scores sees; others need not pay for it."""
        if not self.sampler.needs_score:
            return _flat
        return self.energy(*args, **kwargs)

    def energy(self, *args: Any, **kwargs: Any) -> Callable:
        """The posterior's energy in the guide's coordinates, [D] to [].

        Args:
            *args: arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        potential = self._potential_fn_gen(*args, **kwargs)

        def energy(x):
            with handlers.block():
                value = potential(self._unpack_latent(x))
            return jnp.where(jnp.isnan(value), jnp.inf, value)

        return energy

    def _sample_latent(self, *args, **kwargs):
        sampler = self.sampler
        params = numpyro.param(f"{self.prefix}_sampler", lambda key: sampler.init(key))
        key = numpyro.prng_key()
        assert key is not None, "a guide runs under handlers.seed"
        energy = self._energy(args, kwargs)
        trajectory, _ = sampler.rollout(params, key, energy)
        log_ratio = trajectory.log_generation - trajectory.log_destruction
        term = _PathTerm(trajectory.log_prior + jnp.sum(log_ratio))
        numpyro.sample(
            f"{self.prefix}_factor",
            term,
            obs=term.sample(None),
            infer={"is_auxiliary": True},
        )
        return trajectory.x

    def sample_posterior(self, rng_key, params, *args, sample_shape=(), **kwargs):
        """Draws of the sites; arguments of the model where the network sees scores.

        Args:
            rng_key: key; consumed.
            params: of ``SVI``.
            *args: arguments of the model.
            sample_shape: shape of independent draws.
            **kwargs: keyword arguments of the model.
        """
        size = 1
        for length in sample_shape:
            size *= length
        keys = jax.random.split(rng_key, size)
        energy = self._energy(args, kwargs)
        draw = functools.partial(self.sampler.final, self.params_of(params))
        ends = jax.vmap(lambda key: draw(key, energy).x)(keys)
        ends = ends.reshape(*sample_shape, self.latent_dim)
        return self._unpack_and_constrain(ends, params)

    def median(self, params, *args, **kwargs):
        """Medians of 2,000 draws with a fixed key."""
        found = self.quantiles(params, [0.5], *args, **kwargs)
        return jax.tree.map(lambda q: q[0], found)

    def quantiles(self, params, quantiles, *args, **kwargs):
        """Quantiles of 2,000 draws with a fixed key, a leading axis for each."""
        draws = self.sample_posterior(
            jax.random.key(0), params, *args, sample_shape=(NUM_DRAWS,), **kwargs
        )
        levels = jnp.asarray(quantiles)
        return jax.tree.map(lambda x: jnp.quantile(x, levels, axis=0), draws)


class _PathTerm(Unit):
    """A factor whose gradient counts: `TraceGraph_ELBO` stops that of a plain one."""

    reparametrized_params: ClassVar[list[str]] = ["log_factor"]


def _unpack(shapes, flat):
    """Sites, sorted by name in flat, in the order of the trace, as NumPyro's are."""
    names = sorted(shapes)
    ends = np.cumsum([math.prod(shapes[name]) for name in names])
    parts = dict(zip(names, jnp.split(flat, ends[:-1]), strict=True))
    return {name: parts[name].reshape(shape) for name, shape in shapes.items()}


def _pack(sites):
    return ravel_pytree(dict(sites))[0]


def _flat(x):
    return jnp.zeros((), x.dtype)
