"""Non-centred coordinates of a model's own sites.

A site theta ~ F(loc, scale) of a location-scale family, with a scale or a location that
depends on other sites, makes a funnel where data say little of it. In

    theta = loc + scale y,  log det = sum of log scale,

y has none. Location and scale are read off the model by replaying it, so that the map
is exact in the narrowest neck. Which sites profit is told by draws: each is decentred
if a Gaussian fits them better then, by its KL divergence from them.

Papaspiliopoulos, Roberts, Skoeld (2007), "A general framework for the parametrization
of hierarchical models"; `numpyro.infer.reparam.LocScaleReparam` is the same inside of a
model. For log-normal sites theta is the logarithm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.primitives import Messenger

from diffsamp.numpyro.coordinates import to_y
from diffsamp.numpyro.target import ModelTarget
from diffsamp.types import Array, ArrayLike

LEAST_GAIN = 0.1  # nats, for a site to be decentred
FAMILIES = (dist.Normal, dist.LogNormal, dist.StudentT, dist.Cauchy, dist.Laplace)


class Decentred(NamedTuple):
    """The map of the module's equation.

    Attributes:
        program: the static part of a `ModelTarget`.
        data: of its callables.
        chosen: whether a site is decentred; every site has a number, an array without
            dimensions.
    """

    program: Any
    data: tuple
    chosen: dict[str, Array]

    def forward(self, y: Array) -> Array:
        """X of y, [D]."""
        return self.forward_and_log_det(y)[0]

    def inverse(self, x: Array) -> Array:
        """Y of x, [D]."""
        return self._replay(x, is_inverse=True)[0]

    def forward_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """Both x of y, [D], and the log-determinant of dx/dy at y, []."""
        return self._replay(y, is_inverse=False)

    def _replay(self, point, is_inverse):
        given, found = self.program.unravel(point), {}
        log_scales = [jnp.zeros(0, point.dtype)]

        def place(site):
            name = site["name"]
            if site["type"] != "sample" or name not in given:
                return None
            value = found[name] = given[name]
            if name in self.chosen:
                parameters = location_scale(site["fn"])
                assert parameters is not None
                loc, scale = parameters
                loc = jnp.where(self.chosen[name], loc, 0.0).astype(point.dtype)
                scale = jnp.where(self.chosen[name], scale, 1.0).astype(point.dtype)
                log_scales.append(jnp.ravel(jnp.log(scale)))
                if is_inverse:
                    found[name] = (value - loc) / scale
                else:
                    value = found[name] = loc + scale * value
            return dist.biject_to(site["fn"].support)(value)

        _run(self.program, self.data, place)
        log_det = jnp.sum(jnp.concatenate(log_scales))
        return ravel_pytree(found)[0].astype(point.dtype), log_det


def decentred_from(target: ModelTarget, draws: ArrayLike) -> Decentred | None:
    """The map for a posterior, chosen by draws of it.

    Args:
        target: the posterior, in NumPyro's unconstrained coordinates.
        draws: points of it, [N, D].

    Returns:
        A map, perhaps the identity; None for a model without such sites.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from diffsamp.numpyro import decentred_from, target_from_model
        >>> def model():
        ...     tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
        ...     numpyro.sample("theta", dist.Normal(0.0, tau))
        >>> target = target_from_model(model)
        >>> draws = target.sample_prior(jax.random.key(0), 1_000)
        >>> {k: bool(v) for k, v in decentred_from(target, draws).chosen.items()}
        {'theta': True}
    """
    program, data = target._program, target.energy.args[1]
    points = jnp.asarray(draws, jnp.result_type(float))
    sites = _dependent(program, data, points)
    if not sites:
        return None
    chosen = {name: jnp.zeros((), bool) for name in sites}
    best = _nats(Decentred(program, data, chosen), points)
    for name in sites:
        other = chosen | {name: jnp.ones((), bool)}
        nats = _nats(Decentred(program, data, other), points)
        if nats < best - LEAST_GAIN:
            best, chosen = nats, other
    return Decentred(program, data, chosen)


def location_scale(fn: Any) -> tuple[Array, Array] | None:
    """Those of a distribution, of the shape of its draws, if it has them.

    Args:
        fn: a NumPyro distribution.
    """
    base: Any = fn
    while isinstance(base, dist.Independent | dist.ExpandedDistribution):
        base = base.base_dist
    if type(base) not in FAMILIES:
        return None
    shape = fn.batch_shape + fn.event_shape
    return jnp.broadcast_to(base.loc, shape), jnp.broadcast_to(base.scale, shape)


def _run(program, data, place):
    """Runs the model with sites where `place` puts them."""
    args, kwargs = program.arguments(data)
    model = handlers.seed(program.model, jax.random.key(0))
    model = handlers.substitute(model, substitute_fn=place)
    handlers.trace(model).get_trace(*args, **kwargs)


class _Watch(Messenger):
    """Sees whether there is control flow."""

    found = False

    def process_message(self, msg):
        self.found |= msg["type"] == "control_flow"


def _has_control_flow(program, data, x) -> bool:
    args, kwargs = program.arguments(data)
    watch = _Watch()
    with watch:
        jax.eval_shape(program.potential_fn(*args, **kwargs), program.unravel(x))
    return watch.found


@jax.jit
def _parameters(program, data, x):
    """Location and scale of the sites that have them, at x."""
    given, found = program.unravel(x), {}

    def place(site):
        if site["type"] != "sample" or site["name"] not in given:
            return None
        parameters = location_scale(site["fn"])
        if parameters is not None:
            found[site["name"]] = parameters
        return dist.biject_to(site["fn"].support)(given[site["name"]])

    _run(program, data, place)
    return found


def _dependent(program, data, points) -> list[str]:
    """Sites whose location or scale is not the same at all points.

    None of a model with `scan` and the like, within which they are out of reach.
    """
    if _has_control_flow(program, data, points[0]):
        return []
    several = [_parameters(program, data, x) for x in points[:3]]
    first = several[0]
    return [
        name
        for name in first
        if any(
            not np.array_equal(a, b)
            for other in several[1:]
            for a, b in zip(first[name], other[name], strict=True)
        )
    ]


def _nats(coordinates, x) -> float:
    """KL divergence of a Gaussian in other coordinates, but for a constant."""
    y = np.asarray(to_y(coordinates, x), np.float64)
    if not np.all(np.isfinite(y)):
        return np.inf
    covariance = np.cov(y, rowvar=False).reshape(y.shape[1], -1)
    log_dets = _log_dets(coordinates, jnp.asarray(y, x.dtype))
    sign, half = np.linalg.slogdet(covariance)
    return float(0.5 * half + np.mean(log_dets)) if sign > 0 else np.inf


@jax.jit
def _log_dets(coordinates, y):
    return jax.vmap(coordinates.forward_and_log_det)(y)[1]
