"""Non-centred coordinates of a model's own sites.

A site theta ~ F(loc, scale) of a location-scale family, with a scale or a location that
depends on other sites, makes a funnel where data say little of it. In

    theta = loc + scale y,  log det = sum of log scale,

y has none. Location and scale are read off the model by replaying it, so that the map
is as exact in the narrowest neck as the digits of theta allow. Which sites profit is
told by draws: each is decentred if a Gaussian fits them clearly better then, by its KL
divergence from them.

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

from diffsamp.numpyro.affine import affine_from
from diffsamp.numpyro.coordinates import log_dets_of, to_y
from diffsamp.numpyro.target import ModelTarget
from diffsamp.types import Array, ArrayLike

LEAST_GAIN = 0.1  # nats, and what chance makes of so many draws, to decentre a site
FAMILIES = (dist.Normal, dist.LogNormal, dist.StudentT, dist.Cauchy, dist.Laplace)


class Decentred(NamedTuple):
    """The map of the module's equation.

    Attributes:
        program: the static part of a `ModelTarget`.
        data: of its callables.
        chosen: of every site that could be decentred whether it is, [] each.
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
                loc, scale = (jnp.broadcast_to(v, value.shape) for v in parameters)
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
        target: the posterior; its own coordinates are put aside.
        draws: points of it in NumPyro's unconstrained coordinates, [N, D].

    Returns:
        A map; None for a model without such sites. Where none profits it is the
        identity, so that other data find the same compiled code.

    Raises:
        ValueError: as `affine_from`.

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
    num, dim = points.shape
    gain = LEAST_GAIN + 2 * np.sqrt(dim / num)
    for name in sites:
        other = chosen | {name: jnp.ones((), bool)}
        nats = _nats(Decentred(program, data, other), points)
        if nats < best - gain:
            best, chosen = nats, other
    return Decentred(program, data, chosen)


def location_scale(fn: Any) -> tuple[Array, Array] | None:
    """Those of a distribution, as it has them, to be broadcast to its draws; or None.

    Args:
        fn: a NumPyro distribution.
    """
    base: Any = fn
    while isinstance(base, dist.Independent | dist.ExpandedDistribution):
        base = base.base_dist
    if type(base) not in FAMILIES:
        return None
    return jnp.asarray(base.loc), jnp.asarray(base.scale)


def _run(program, data, place):
    """Runs the model with sites where `place` puts them; no draw plays a part."""
    args, kwargs = program.arguments(data)
    seeded = handlers.seed(program.model, jax.random.key(0))
    model = handlers.substitute(seeded, substitute_fn=place)
    handlers.trace(model).get_trace(*args, **kwargs)


class _Watch(Messenger):
    """Sees whether there is control flow, or a site that no coordinate determines."""

    def __init__(self, site_names):
        super().__init__()
        self.site_names, self.found = site_names, False

    def process_message(self, msg):
        is_drawn = (
            msg["type"] == "sample"
            and not msg["is_observed"]
            and msg["name"] not in self.site_names
        )
        self.found |= is_drawn or msg["type"] == "control_flow"


def _is_out_of_reach(program, data, x) -> bool:
    args, kwargs = program.arguments(data)
    watch = _Watch(program.site_names)
    with watch:
        jax.eval_shape(program.potential_fn(*args, **kwargs), program.unravel(x))
    return watch.found


@jax.jit
def _parameters(program, data, x):
    """Location and scale at points [N, D] of the sites that have them."""

    def at(x):
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

    return jax.vmap(at)(x)


def _dependent(program, data, points) -> list[str]:
    """Sites whose location or scale is not the same at all points.

    None of a model with `scan` and the like, within which they are out of reach, or
    with discrete sites, on which parameters may hang.
    """
    if _is_out_of_reach(program, data, points[0]):
        return []
    return [
        name
        for name, values in _parameters(program, data, points).items()
        if any(not np.array_equal(v, np.broadcast_to(v[:1], v.shape)) for v in values)
    ]


def _nats(coordinates, x) -> float:
    """KL divergence of a Gaussian in other coordinates, but for a constant."""
    y = to_y(coordinates, x)
    if not bool(jnp.all(jnp.isfinite(y))):
        return np.inf
    affine = affine_from(y)
    _, log_dets = jax.vmap(affine.forward_and_log_det)(y[:1])
    return float(log_dets[0] + jnp.mean(log_dets_of(coordinates, y)))
